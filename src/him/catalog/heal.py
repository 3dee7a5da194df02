"""Healing a repository: whatever is damaged and can be made again, from wherever that is, in one go."""

import msgspec

from him.catalog import spare
from him.catalog.fsck import Fsck, FsckReport, Progress
from him.catalog.history import History
from him.catalog.log import CHECKPOINT_FOLDER, FileLog
from him.errors import HimError
from him.ports import Projection
from him.tier.care import Journal
from him.tier.scrub import Scrubbed, Scrubber
from him.tier.warm import WarmStore
from him.types import Fault


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
    """One healing of a repository that can be opened."""

    def __init__(
        self, history: History, projection: Projection, store: WarmStore, log: FileLog, journal: Journal,
        scrubber: Scrubber, progress: Progress,
    ) -> None:  # fmt: skip
        self._history, self._projection, self._store = history, projection, store
        self._log, self._journal, self._scrubber, self._progress = log, journal, scrubber, progress

    def run(self) -> HealReport:
        """Scrub everything, make again what can be, and check what came of it.

        Raises:
            BusyError: another process scrubs. StorageError: the disk refused.
        """
        wrong: dict[tuple[str, str], Fault] = {}
        for one in self._scrubber.run():
            self._progress(len(wrong), 0, one.name)
            wrong.update(_keyed(one))
        self._store.protect(self._progress)
        found = self._fsck()
        wrong.update({(fault.object, fault.place): fault for fault in found.errors})
        mended = [self._mend(fault) for fault in found.errors]
        if any(mended):
            found = self._fsck()
        spare.keep(self._store.disk, self._log)
        left = {(fault.object, fault.place) for fault in found.errors}
        healed = tuple(fault for key, fault in wrong.items() if key not in left)
        return HealReport(healed, found.errors, len(self._journal.quarantined()))

    def _fsck(self) -> FsckReport:
        return Fsck(self._history, self._projection, self._store, self._progress).run()

    def _mend(self, fault: Fault) -> bool:
        """Do what the fault's remedy says, where that loses nothing; whether anything was done."""
        if fault.place.startswith("cache") or fault.object == "catalog":
            self._history.rebuild()
            self._store.forget_addresses()
            return True
        if fault.object.startswith("checkpoint"):
            # The log says the same.
            self._store.disk.remove(f"{CHECKPOINT_FOLDER}/{int(fault.object.split()[1]):016d}")
            return True
        return False


def _keyed(one: Scrubbed) -> dict[tuple[str, str], Fault]:
    faults = [fault_from(error) for error in one.faults]
    return {(fault.object, fault.place): fault for fault in faults}


def fault_from(error: HimError) -> Fault:
    """An error as a fault, with the error's own remedy."""
    return Fault(error.object or "repository", error.place, error.message, error.fix)
