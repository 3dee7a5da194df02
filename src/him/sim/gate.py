"""What every port call of one simulated process passes through: the scheduler, then the faults that are due."""

from collections import Counter
from collections.abc import Callable, Mapping, Set
from random import Random
from typing import Final

from him.errors import StorageError, UnavailableError
from him.sim.disk import PowerLoss
from him.sim.faults import DISK, FAULTS, STORE
from him.sim.schedule import Schedule, Task

_LOG: Final = "log/0"
_GROWS: Final = ("write", "create", "replace")


class Weather:
    """What holds for the whole machine for a while, in port calls left: a full disk, a store that is away."""

    def __init__(self) -> None:
        self.full = 0
        self.down = 0


class Gate:
    """One life of a process.

    Args:
        faults: names of those that may happen.
        counts: where each that happened is counted.
        crash: called where the process's, or the machine's, end is due; raises.
    """

    def __init__(
        self, schedule: Schedule, faults: Set[str], counts: Counter[str], weather: Weather, crash: Callable[[], None]
    ) -> None:
        self._schedule, self._faults, self._counts, self._weather = schedule, faults, counts, weather
        self._crash = crash
        self._rng = Random(0)
        self._due: dict[str, int] = {}
        self.task: Task | None = None
        self.dead = False
        self.quiet = 0
        """Above 0 nothing fails and nobody else runs: for whoever checks."""
        self.injected = 0
        """Faults that met the call at hand."""
        self.missed = False
        """Whether the store gave no answer to it."""
        self.undoing = False
        """Whether one of them kept a failed commit from being undone."""
        self.ports = 0
        self._cut = False

    def arm(self, rng: Random) -> None:
        """Draw, for a workload call, when the next fault of each kind is due."""
        self._rng, self.injected, self.missed, self.undoing = rng, 0, False, False
        drawn: Mapping[str, int] = {
            fault.name: 1 + int(rng.expovariate(1 / fault.every))
            for fault in (*DISK, *STORE)
            if fault.name in self._faults
        }
        self._due = dict(drawn)

    def coin(self) -> bool:
        """One of two, by the seed."""
        return self._rng.random() < 0.5

    # -- the disk

    def look(self, kind: str, path: str) -> None:
        """Before something is read."""
        if self._step() and self._is_due("read error"):
            raise StorageError("the disk failed (simulated)", place=path)

    def run(self, kind: str, path: str, whole: Callable[[], None], part: Callable[[], None] | None = None) -> None:
        """Do a changing operation, or fail it."""
        if not self._step():
            whole()
            return
        if path.startswith(_LOG):
            self._cut = kind == "truncate" or (self._cut and kind == "sync")
        if kind == "sync":
            if self._is_due("fsync lost"):
                self._hit("", path, kind)
                (part or whole)()
                raise StorageError("the disk failed (simulated fsync)", place=path)
        elif self._weather.full and kind in _GROWS:
            self._hit("disk full", path, kind)
            if part is not None and self.coin():
                part()
            raise StorageError("the disk is full (simulated)", place=path)
        elif self._is_due("write refused"):
            self._hit("", path, kind)
            raise StorageError("the disk failed (simulated)", place=path)
        elif part is not None and self._is_due("write partial"):
            self._hit("", path, kind)
            part()
            raise StorageError("the disk failed half-way (simulated)", place=path)
        elif self._is_due("write late"):
            self._hit("", path, kind)
            whole()
            raise StorageError("the disk failed late (simulated)", place=path)
        whole()

    def wait(self, path: str, free: Callable[[], bool]) -> None:
        """Others run until a lock is free."""
        self._schedule.wait(lambda: self.dead or free())
        if self.dead:
            raise PowerLoss

    # -- the object store

    def ask(self, name: str, *, writes: Callable[[], None] | None = None) -> None:
        """A request: `writes` carries it out, if it changes anything."""
        if not self._step():
            if writes is not None:
                writes()
            return
        if self._weather.down:
            self._weather.down -= 1
            self.injected += 1
            self.missed = True
            self._counts["store down"] += 1
            raise UnavailableError("the store answers 503 (simulated)", place=name)
        if self._is_due("store 5xx"):
            self.missed = True
            raise UnavailableError("the store answers 500 (simulated)", place=name)
        if writes is None:
            return
        writes()
        if self._is_due("request twice"):
            writes()
        if self._is_due("reply lost"):
            raise UnavailableError("no reply (simulated)", place=name)

    def stale(self) -> bool:
        """Whether a list is of some time ago."""
        if self.quiet or not self._is_due("list stale"):
            return False
        self.injected -= 1  # It explains no error.
        return True

    # -- inner

    def _step(self) -> bool:
        """Whether faults may happen; another process may have run meanwhile."""
        if self.dead:
            raise PowerLoss
        if self.quiet or self._schedule.current is not self.task or self.task is None:
            return False  # A finalizer may run in another process's thread.
        self.ports += 1
        self._crash()
        self._schedule.step()
        if self.dead:
            raise PowerLoss
        if self._weather.full:
            self._weather.full -= 1
        return True

    def _is_due(self, name: str) -> bool:
        left = self._due.get(name)
        if left is None:
            return False
        if left > 1:
            self._due[name] = left - 1
            return False
        self._due[name] = 1 + int(self._rng.expovariate(1 / FAULTS[name].every))
        self._counts[name] += 1
        self.injected += 1
        return True

    def _hit(self, name: str, path: str, kind: str) -> None:
        if name:
            self._counts[name] += 1
            self.injected += 1
        if path.startswith(_LOG) and self._cut:
            self.undoing = True


__all__ = ["Gate", "Weather"]
