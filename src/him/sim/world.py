"""A machine with disks and a bucket, and the processes that run on it until the power goes."""

import contextlib
import gc
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from random import Random
from typing import Final, NamedTuple, Protocol

from blake3 import blake3

from him.catalog.lease import Lease
from him.catalog.log import FileLog
from him.catalog.marker import MARKER
from him.errors import HimError
from him.sim.clock import ProcessClock, SimClock, SimRng
from him.sim.disk import MemDisk, PowerLoss, Volume
from him.sim.faults import CRASH_FATES
from him.sim.gate import Gate, Weather
from him.sim.ledger import Ledger
from him.sim.model import Act, Contents, Model, Violation
from him.sim.objects import Bucket, SimObjects
from him.sim.rooms import Rooms, SimMemo, furnish
from him.sim.schedule import Schedule, Stopped
from him.tier.cold import Claim

EVENTS_SHOWN: Final = 30
_COLLECT_EVERY: Final = 200
_STRETCH: Final = 25


class Op(NamedTuple):
    """One workload call: its number decides all that is drawn for it, whatever stands before it."""

    number: int
    kind: str
    process: int


class Kind(Protocol):
    """What a kind of workload call does."""

    def run(self, process: "Process", rooms: Rooms, rng: Random) -> None:
        """Do it. Raises HimError, Violation."""
        ...

    def judge(self, process: "Process", error: HimError) -> None:
        """Whether something explains an error. Raises Violation."""
        ...

    def done(self, process: "Process") -> None:
        """Whether what reported success did what it says. Raises Violation."""
        ...


class Site:
    """A repository: its disk, the caches beside it, and what it is to hold."""

    def __init__(self, name: str, contents: Contents, world: "World") -> None:
        self.name = name
        self.volume = Volume()
        self.memo = SimMemo()
        self.ledger = Ledger(contents, world.written_at)
        self.rotted: set[str] = set()
        """Files that were damaged and may not have healed yet."""

    @property
    def model(self) -> Model:
        """What it is to hold."""
        return self.ledger.model


class Kept(NamedTuple):
    """What a process holds a lease on."""

    lease: Lease
    snapshot_id: str
    directory: bytes


class World:
    """Everything that is simulated.

    Args:
        seed: decides all.
        processes: how many write to the repository at once.
        faults: names of those that may happen.
        kinds: of workload calls, by name.
        weather: what befalls a process before a call.
    """

    def __init__(
        self, seed: int, processes: int, faults: Set[str], kinds: Mapping[str, "Kind"],
        weather: Callable[["Process", Random], None],
    ) -> None:  # fmt: skip
        self.seed, self.faults, self.kinds, self.weather_of = seed, faults, kinds, weather
        self.counts: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.schedule = Schedule(Random(f"{seed}:schedule"), _STRETCH)
        self.clock, self.weather, self.bucket = SimClock(), Weather(), Bucket()
        self.contents = Contents()
        self._acts: dict[int, Act] = {}
        self.sites = {name: Site(name, self.contents, self) for name in ("a", "b")}
        self.claim = Claim(0, 0)
        self.claims: dict[int, str] = {}
        """Generations of the cold tier, and which call was given each."""
        self.pushed = 0
        """The record up to which a restore has to come."""
        self.traces: list[bytes] = []
        """Directories that recorded queries read."""
        self.power_in = 0
        self.events: deque[str] = deque(maxlen=EVENTS_SHOWN)
        self._digest = blake3()
        self.finished = 0
        self.processes = [Process(self, number) for number in range(processes)]
        for name, site in self.sites.items():
            disk = MemDisk(volume=site.volume)
            FileLog.create(disk)
            disk.sync_folder("packs")
            self.bucket.objects[MARKER] = furnish(site.volume, self.claim if name == "a" else None)

    def run(self, ops: Sequence[Op], *, close: bool = True) -> None:
        """Run a workload. Raises Violation, or whatever went wrong.

        Args:
            close: at the end every process closes the repository.
        """
        for process in self.processes:
            process.ops = [op for op in ops if op.process % len(self.processes) == process.number]
            process.closes = close
        was, _ = gc.isenabled(), gc.freeze()
        gc.disable()
        try:
            self.schedule.run([process.main for process in self.processes])
        finally:
            gc.unfreeze()
            if was:
                gc.enable()

    @property
    def digest(self) -> str:
        """Of all events: equal where two runs were the same."""
        return self._digest.hexdigest()

    def written_at(self, time_ns: int) -> Act | None:
        """The call that read the clock so."""
        return self._acts.get(time_ns)

    def noted(self, act: Act, reading_ns: int) -> None:
        """A call has read the clock."""
        self._acts[reading_ns] = act

    def tell(self, process: "Process", act: Act) -> None:
        """A call has ended."""
        self.finished += 1
        self.calls[act.kind] += 1
        said = f"#{act.number} p{process.number}.{process.life} {act.kind}: {act.ended} ({process.gate.ports})"
        self.events.append(said)
        self._digest.update(f"{said} {self.sites['a'].ledger.model.seq}\n".encode())
        if self.finished % _COLLECT_EVERY == 0:
            gc.collect()

    def note(self, said: str) -> None:
        """Something that is no call has happened."""
        self.events.append(said)
        self._digest.update(f"{said}\n".encode())

    def cut_power(self) -> None:
        """The machine stops and starts again: every process is dead, and of what was not synced some is there."""
        rng = Random(f"{self.seed}:power:{self.counts['power loss']}")
        self.counts["power loss"] += 1
        self.note("power loss")
        for process in self.processes:
            process.gate.dead = True
        for site in self.sites.values():
            # What was published until now was durable.
            site.ledger.look(site.volume)
            fates = rng.choice((CRASH_FATES, ("all",), ("none",)))
            site.volume = site.volume.after_power_loss(
                lambda fates=fates: rng.choice(fates), lambda: rng.random() < 0.5
            )
            site.ledger.check(site.volume)
            kept = [item for item in site.memo.items.items() if rng.random() < 0.7]
            site.memo.items = dict(kept)
        self.weather.full = 0

    @contextmanager
    def quietly(self, process: "Process") -> Generator[None]:
        """For whoever checks: nothing fails and nobody else runs."""
        process.gate.quiet += 1
        try:
            yield
        finally:
            process.gate.quiet -= 1


class Process:
    """A process that carries out its part of the workload, dies, and is started again."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.ops: Sequence[Op] = ()
        self.closes = True
        self.life = 0
        self.rooms: Rooms | None = None
        self.kept: list[Kept] = []
        self.kill_in = 0
        self.act = Act(-1, "start")
        self.gate = self._gate()

    def _gate(self) -> Gate:
        world = self.world
        return Gate(world.schedule, world.faults, world.counts, world.weather, self._crash)

    @property
    def site(self) -> Site:
        """The repository it works on."""
        return self.world.sites["a"]

    def disk(self, name: str = "a") -> MemDisk:
        """A disk as it sees it."""
        return MemDisk(self.gate, self.world.sites[name].volume)

    def objects(self) -> SimObjects:
        """The bucket as it reaches it."""
        return SimObjects(self.world.bucket, self.gate)

    def clock(self) -> ProcessClock:
        """The clock; what it reads belongs to the call at work."""
        return ProcessClock(self.world.clock, lambda reading: self.world.noted(self.act, reading))

    def rng(self, what: str) -> SimRng:
        """Randomness of its present life."""
        return SimRng(f"{self.world.seed}:{self.number}:{self.life}:{what}")

    def opened(self) -> Rooms:
        """The repository, opened anew where it was closed or another claim to the cold tier holds."""
        if self.rooms is not None and self.rooms.claim != self.world.claim:
            self.close()
        if self.rooms is None:
            self.life += 1
            self.rooms = Rooms(
                self.disk(), self.objects(), self.clock(), self.rng("rooms"), f"p{self.number}.{self.life}",
                self.site.memo, self.world.claim,
            )  # fmt: skip
        return self.rooms

    def close(self) -> None:
        """Close the repository in good order."""
        rooms, self.rooms = self.rooms, None
        self.kept.clear()
        if rooms is not None:
            rooms.close()

    def main(self) -> None:
        """The process's thread."""
        self.gate.task = self.world.schedule.current
        for op in self.ops:
            self._perform(op)
        if self.closes:
            with contextlib.suppress(HimError, PowerLoss):
                self.close()

    def _perform(self, op: Op) -> None:
        kind = self.world.kinds[op.kind]
        rng = Random(f"{self.world.seed}:{op.number}")
        self.act = act = Act(op.number, op.kind)
        act.began = self.site.model.seq
        self.gate.arm(Random(f"{self.world.seed}:{op.number}:faults"))
        self.world.weather_of(self, rng)
        try:
            try:
                rooms = self.opened()
                kind.run(self, rooms, rng)
            except HimError as error:
                self._settle()
                act.ended, act.doubt = error.kind, self.gate.undoing
                kind.judge(self, error)
            else:
                self._settle()
                act.ended = "ok"
                kind.done(self)
        except PowerLoss:
            act.ended, act.doubt = "crashed", True
            self._restart()
        except Stopped:
            raise
        except Exception as error:
            if isinstance(error, Violation):
                raise
            raise Violation(
                "a fault of the program", f"{act.kind} #{act.number}: {type(error).__name__}: {error}"
            ) from error
        self.world.tell(self, act)

    def _settle(self) -> None:
        """See what is published now, and what this process knows."""
        if self.rooms is None:
            return
        with self.world.quietly(self):
            try:
                head = self.rooms.log.head()[0]
            except HimError:
                head = 0
            self.site.ledger.look(self.site.volume, up_to=head)

    def _crash(self) -> None:
        if self.kill_in:
            self.kill_in -= 1
            if not self.kill_in:
                self.world.counts["kill"] += 1
                self.gate.dead = True
                raise PowerLoss
        if self.world.power_in:
            self.world.power_in -= 1
            if not self.world.power_in:
                self.world.cut_power()
                raise PowerLoss

    def _restart(self) -> None:
        """The kernel has closed what the dead process had open."""
        for site in self.world.sites.values():
            for data in site.volume.files.values():
                if data.holder is not None and data.holder.gate is self.gate:
                    data.holder = None
        if self.rooms is not None:
            self.rooms.projection.close()
        self.rooms = None
        self.kept.clear()
        task = self.gate.task
        self.gate = self._gate()
        self.gate.task = task
        self.kill_in = 0


__all__ = ["Kept", "Op", "Process", "Site", "World"]
