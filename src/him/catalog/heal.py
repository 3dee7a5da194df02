"""Healing a repository: whatever is damaged and can be made again, from wherever that is, in one go."""

from collections.abc import Iterable
from typing import Protocol

import msgspec

from him.catalog import spare
from him.catalog.fsck import FsckReport
from him.catalog.log import CHECKPOINT_FOLDER, FileLog
from him.errors import HimError
from him.ports import Progress
from him.tier.care import Event, Journal
from him.tier.scrub import Scrubber
from him.tier.warm import WarmStore
from him.types import Fault


class Check(Protocol):
    """`Repository.fsck`."""

    def __call__(self, *, rebuild: bool, progress: Progress | None) -> FsckReport:
        """Check everything; what was found."""
        ...


class HealReport(msgspec.Struct, frozen=True):
    """What was wrong and is right again, and what is left."""

    healed: tuple[Fault, ...]
    left: tuple[Fault, ...]
    """With what can be done about each; damaged records among them are in quarantine."""
    quarantined: int
    """Records that count as not stored: whoever puts their content again mends them."""

    @property
    def ok(self) -> bool:
        """Whether nothing is left."""
        return not self.left


class Healer:
    """One healing of a repository that can be opened.

    Args:
        check: a check of the whole repository, which with `rebuild` writes again what follows from sound records.
        scrubber: reads every file once and mends it.
    """

    def __init__(
        self, check: Check, store: WarmStore, log: FileLog, journal: Journal, scrubber: Scrubber, progress: Progress
    ) -> None:
        self._check, self._store, self._log = check, store, log
        self._journal, self._scrubber, self._progress = journal, scrubber, progress

    def run(self) -> HealReport:
        """Scrub everything, make again what can be, and check what came of it.

        Raises:
            BusyError: another process scrubs. StorageError: the disk refused.
        """
        wrong: dict[tuple[str, str], Fault] = {}
        before = set(self._journal.healed())
        for number, one in enumerate(self._scrubber.run()):
            self._progress(number, 0, one.name)
            wrong.update(_keyed(map(_fault_from, one.faults)))
        self._store.protect(self._progress)
        found = self._check(rebuild=False, progress=self._progress)
        wrong.update(_keyed(found.errors))
        for fault in found.errors:
            if fault.kind == "checkpoint" and fault.place.startswith(CHECKPOINT_FOLDER):
                # The log says the same. (One that it contradicts is no such fault.)
                self._store.disk.remove(f"{CHECKPOINT_FOLDER}/{int(fault.object.split()[1]):016d}")
        if not found.ok:
            found = self._check(rebuild=True, progress=self._progress)
        spare.keep(self._store.disk, self._log)
        # What is made again takes with it what else is damaged there, before anybody has read that.
        told = {fault.place.partition(" @ ")[0] for fault in wrong.values()}
        again = [event for event in self._journal.healed() if event not in before and event.pack not in told]
        wrong.update(_keyed(map(_of_event, again)))
        left = {(fault.object, fault.place) for fault in found.errors}
        healed = tuple(fault for key, fault in wrong.items() if key not in left)
        return HealReport(healed, found.errors, len(self._journal.quarantined()))


def _keyed(faults: Iterable[Fault]) -> dict[tuple[str, str], Fault]:
    return {(fault.object, fault.place): fault for fault in faults}


def _of_event(event: Event) -> Fault:
    return Fault(event.pack, f"{event.pack} @ {event.offset}", f"{event.size} bytes were damaged", "", "pack")


def _fault_from(error: HimError) -> Fault:
    """An error as a fault, with the error's own remedy."""
    return Fault(error.object or "repository", error.place, error.message, error.fix)
