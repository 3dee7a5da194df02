"""Scrubbing: every stored byte is read and compared with its digest now and then, and healed while others are sound."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.config import EXTENT_BYTES
from him.errors import BusyError, HimError, IntegrityError, NotFoundError
from him.pack import format as layout
from him.pack.check import check_pack, first_fault
from him.pack.file import read_record
from him.pack.parity import SUFFIX as PARITY
from him.ports import Clock, Disk, File
from him.tier import lines
from him.tier.care import Journal
from him.tier.warm import WarmStore
from him.types import BlobId, PackFinished, PackState

_STATE: Final = "care/scrubbed"
_LOCK: Final = "care/scrub"
Pace = Callable[[int], None]
"""Told how many bytes were read; may wait before it returns."""


def put_right(store: WarmStore, finished: PackFinished) -> bool:
    """Mend what is damaged of a finished pack, or parity file, that is wholly here; whether it is whole then.

    A pack that is as long as it was counts as whole, whatever of it nothing mends: most of it can still be read.

    Raises:
        UnavailableError: what it is to be made of is in the cold tier, which does not answer.
    """
    name, parity = finished.pack, store.parity
    if parity is not None and name.endswith(PARITY):
        if parity.check_file(name) is None:
            return True
        with suppress(IntegrityError):
            parity.mend_file(name)
        return parity.check_file(name) is None
    if first_fault(store.disk, finished, store.repository_id) is not None:
        store.mend_now(name)
    try:
        file = store.disk.open(name)
    except NotFoundError:
        return False
    try:
        return file.size() >= finished.size
    finally:
        file.close()


class Scrubbed(msgspec.Struct, frozen=True):
    """A pack, or parity file, that was read."""

    name: str
    size_bytes: int
    """What was read of it: what is only in the cold tier is not fetched."""
    faults: tuple[HimError, ...]
    """What was wrong when it was read."""
    left: tuple[HimError, ...]
    """What still is: nothing could heal it."""


class _Checked(msgspec.Struct, frozen=True):
    """A line of the state: when a file was last read."""

    name: str
    time_ns: int


class Scrubber:
    """One pass over the packs of a repository, those first that were read longest ago; it can end anywhere.

    Args:
        packs: what is to be there.
        pace: called after each record.
        heal: mend what is damaged; else it is only told.
        removed: whether a pack that was condemned is removed by now.
        copies: also read what the cold tier holds, and copy it there again where it is damaged.
    """

    def __init__(
        self, disk: Disk, store: WarmStore, journal: Journal, clock: Clock, packs: Sequence[PackState], pace: Pace,
        *, heal: bool = True, copies: bool = False, removed: Callable[[str], bool] = lambda _: False,
    ) -> None:  # fmt: skip
        self._removed = removed
        self._disk, self._store, self._journal, self._clock = disk, store, journal, clock
        self._packs = {pack.name: pack for pack in packs if not pack.removed}
        self._pace, self._heal, self._copies = pace, heal, copies

    def run(self) -> Iterator[Scrubbed]:
        """Read file after file; each is noted when it is through, so that the next pass goes on behind it.

        Raises:
            BusyError: another process scrubs.
        """
        lock = self._disk.open(_LOCK, create=True)
        try:
            if not lock.lock(wait=False):
                raise BusyError("another process scrubs this repository", place=_LOCK)
            known = self.last()
            state = self._rewritten(known)
            try:
                for name in sorted(self._names(), key=lambda one: (known.get(one, 0), one)):
                    yield self._file(name)
                    lines.append(state, state.size(), _Checked(name, self._clock.now_ns()))
            finally:
                state.close()
        finally:
            lock.close()

    def last_of_all(self) -> tuple[list[str], dict[str, int]]:
        """All files, and when each that was read through was, in ns since 1970."""
        return self._names(), self.last()

    def last(self) -> dict[str, int]:
        """When each file was last read through, in ns since 1970; of those that are there."""
        try:
            file = self._disk.open(_STATE)
        except NotFoundError:
            return {}
        try:
            told = [one for one, _ in lines.read(file, 0, _Checked) if one is not None]
        finally:
            file.close()
        names = set(self._names())
        return {one.name: one.time_ns for one in told if one.name in names}

    def _rewritten(self, known: dict[str, int]) -> File:
        """The state without what is no longer there, to be added to."""
        self._disk.write_whole(_STATE, b"".join(lines.encode(_Checked(*one)) for one in known.items()))
        return self._disk.open(_STATE)

    def _names(self) -> list[str]:
        parity = self._store.parity
        return [*self._packs, *(name for held in (parity.groups() if parity else ()) for name in held.names)]

    def _file(self, name: str) -> Scrubbed:
        if name not in self._packs:
            return self._parity_file(name)
        size, faults = self._pack(name)
        if faults and self._packs[name].condemned and self._removed(name):
            return Scrubbed(name, 0, (), ())
        left = faults
        if self._heal:
            if faults and self._store.mend(name):
                size, left = self._pack(name)
            if left:
                self._set_aside(name)
            elif any(pack == name for pack, _ in self._journal.quarantined()):
                self._journal.add("released", name, 0, max(size, 1), why="sound again")
        return Scrubbed(name, size, (*faults, *self._copy(name)), tuple(left))

    def _pack(self, name: str) -> tuple[int, list[HimError]]:
        """(bytes read, faults) of what is on this disk of a pack."""
        pack, read = self._packs[name], 0

        def look(record: layout.Record, _place: str) -> None:
            nonlocal read
            read += record.header.record_size
            self._pace(record.header.record_size)

        here = self._store.resident(name)
        try:
            file = self._disk.open(name)
        except NotFoundError:
            return 0, [IntegrityError("a pack is missing", object=name, place=name)]
        try:
            if here is None or here.all():
                return file.size(), list(check_pack(file, pack, look, self._store.repository_id))
            return read, list(self._resident(file, pack, here, look))
        finally:
            file.close()

    def _resident(
        self, file: File, pack: PackState, here: NDArray[np.bool_], look: Callable[[layout.Record, str], None]
    ) -> Iterator[HimError]:
        """Faults of the records that are wholly here, of a pack that the cold tier holds."""
        try:
            rows = self._store.rows(pack)
        except IntegrityError as error:
            yield error
            return
        for row in rows:
            offset, size = int(row["offset"]), int(row["length"])
            if here[offset // EXTENT_BYTES : (offset + size - 1) // EXTENT_BYTES + 1].all():
                try:
                    look(read_record(file, pack.name, offset, size, BlobId(row["blob"].tobytes())), "")
                except HimError as error:
                    yield error

    def _set_aside(self, name: str) -> None:
        """Read each record once as a user would: what nothing heals goes into quarantine."""
        with suppress(HimError):  # Of a pack that is missing the store itself notes that.
            for row in self._store.rows(self._packs[name]):
                with suppress(HimError):
                    self._store.read(BlobId(row["blob"].tobytes()))

    def _copy(self, name: str) -> list[HimError]:
        """Faults of a pack's copy in the cold tier; a damaged copy is made again from what is here, or from parity."""
        if not self._copies:
            return []
        return list(self._store.check_copy(name, self._pace, mend=self._heal))

    def _parity_file(self, name: str) -> Scrubbed:
        assert self._store.parity is not None
        error = self._store.parity.check_file(name)
        left = error
        if error is not None and self._heal:
            with suppress(HimError):
                self._store.parity.mend_file(name)
            left = self._store.parity.check_file(name)
        size = self._store.parity.file_size(name)
        self._pace(size)
        return Scrubbed(name, size, (error,) if error else (), (left,) if left else ())
