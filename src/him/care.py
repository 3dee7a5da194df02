"""Taking care of a repository: parity, scrubbing and healing, as its users reach them."""

from collections.abc import Iterator
from typing import Final

import msgspec

from him.catalog import spare
from him.catalog.heal import Check, Healer, HealReport
from him.catalog.history import History
from him.catalog.log import FileLog
from him.config import PARITY_DATA, PARITY_EXTRA
from him.errors import NotFoundError, UsageError, VersionError
from him.ports import Clock, Disk, Progress, Projection, silent
from him.sealed import holds, sealed
from him.tier.care import Event, Journal
from him.tier.protect import OFF, Made, ParityStatus, Shape
from him.tier.scrub import Pace, Scrubbed, Scrubber
from him.tier.warm import WarmStore
from him.types import MALFORMED

PARITY: Final = "parity.json"
_SETTINGS_BYTES_MAX: Final = 4096


class ScrubStatus(msgspec.Struct, frozen=True):
    """How long ago what is stored was read, and what came of it."""

    files: int
    never_read: int
    oldest_ns: int
    """When the file was read that was read longest ago, in ns since 1970; 0: one never was."""
    quarantined: tuple[Event, ...]
    healed: tuple[Event, ...]
    """The last ones, oldest first."""


def shape_of(disk: Disk) -> Shape | None:
    """What `parity.json` sets; None where there is none, or one that is damaged: what is protected stays so.

    Raises:
        VersionError: it is whole, and says what this software does not know.
    """
    try:
        file = disk.open(PARITY)
    except NotFoundError:
        return None
    try:
        data = file.read_at(0, _SETTINGS_BYTES_MAX)
    finally:
        file.close()
    if not holds(data):
        return None
    try:
        return msgspec.json.decode(data, type=_Settings).shape()
    except (*MALFORMED, UsageError) as error:
        raise VersionError(f"{PARITY} was written by newer software ({error})", object=PARITY, place=PARITY) from error


class CareHandle:
    """Parity, scrubbing and healing of one repository."""

    def __init__(
        self, disk: Disk, store: WarmStore, history: History, projection: Projection, log: FileLog, journal: Journal,
        clock: Clock, check: Check,
    ) -> None:  # fmt: skip
        self._disk, self._store, self._history, self._projection = disk, store, history, projection
        self._log, self._journal, self._clock, self._check = log, journal, clock, check

    def set_parity(self, data: int = PARITY_DATA, extra: int = PARITY_EXTRA) -> None:
        """Protect packs in groups of `data` with `extra` parity files from now on; elsewhere from the next opening.

        Any `extra` files of a full group may then be lost or damaged. With 0 and 0 nothing is protected any more.

        Raises:
            UsageError: a shape that cannot be.
        """
        shape = OFF if data == extra == 0 else Shape(data, extra).checked()
        self._disk.write_whole(PARITY, sealed(_Settings(*shape)))
        assert self._store.parity is not None
        self._store.parity.shape = shape

    def parity(self) -> ParityStatus:
        """What is protected."""
        assert self._store.parity is not None
        return self._store.parity.status()

    def protect(self, progress: Progress | None = None, *, all: bool = False) -> Made:
        """Bring parity up to date with the packs; interrupted, it is taken up by the next call.

        Args:
            all: end the packs that are being written first, so that everything is protected.

        Raises:
            BusyError: another process does the same. StorageError: the disk refused.
        """
        if all:
            self._history.finish_packs()
        self._history.refresh()
        spare.keep(self._disk, self._log)
        assert self._store.parity is not None
        return self._store.parity.update(progress or silent)

    def scrub(self, pace: Pace | None = None, *, heal: bool = True, copies: bool = False) -> Iterator[Scrubbed]:
        """Read what is stored, that first which was read longest ago, and mend what is damaged; may end anywhere.

        Args:
            pace: told how many bytes were read after each record; may wait.
            copies: read what the cold tier holds, too.

        Raises:
            BusyError: another process scrubs.
        """
        with self._history.lease():
            spare.keep(self._disk, self._log)
            yield from self._scrubber(pace, heal=heal, copies=copies).run()

    def scrubbed(self) -> ScrubStatus:
        """What scrubbing and healing have come to."""
        names, last = self._scrubber(None).last_of_all()
        return ScrubStatus(
            len(names), len(names) - len(last), 0 if len(last) < len(names) else min(last.values(), default=0),
            tuple(self._journal.quarantined().values()), tuple(self._journal.healed()),
        )  # fmt: skip

    def heal(self, progress: Progress | None = None) -> HealReport:
        """Mend everything that can be mended, from parity, the cold tier, or what says the same; tells what is left.

        Raises:
            BusyError: another process scrubs. StorageError: the disk refused.
        """
        tiered = self._store.tiered
        with self._history.lease():
            scrubber = self._scrubber(None, copies=tiered)
            return Healer(self._check, self._store, self._log, self._journal, scrubber, progress or silent).run()

    def _scrubber(self, pace: Pace | None, *, heal: bool = True, copies: bool = False) -> Scrubber:
        self._history.refresh()
        packs = self._projection.state().packs
        return Scrubber(
            self._disk, self._store, self._journal, self._clock, packs, pace or _at_once, heal=heal, copies=copies,
            removed=self._history.removed,
        )  # fmt: skip


class _Settings(msgspec.Struct, frozen=True):
    """What `parity.json` holds."""

    data: int
    extra: int

    def shape(self) -> Shape:
        shape = Shape(self.data, self.extra)
        return OFF if shape == OFF else shape.checked()


def _at_once(_size: int) -> None:
    """Nobody waits."""
