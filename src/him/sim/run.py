"""One simulation: a seed in, a report out."""

from collections.abc import Sequence, Set
from typing import Final

import msgspec

from him.sim.faults import FAULTS
from him.sim.model import Violation
from him.sim.repair import settled
from him.sim.schedule import Deadlock
from him.sim.small import small
from him.sim.workload import KINDS, weather, workload
from him.sim.world import Op, World

PROCESSES: Final = 3
ALL_FAULTS: Final = frozenset(FAULTS)


class Failure(msgspec.Struct, frozen=True):
    """What must not have happened."""

    check: str
    seen: str
    events: tuple[str, ...]
    """The last ones before it."""


class Report(msgspec.Struct, frozen=True):
    """What a simulation did."""

    seed: int
    operations: int
    writes: int
    """Of the operations, those that may change the repository."""
    records: int
    """Of the repository's log."""
    calls: dict[str, int]
    faults: dict[str, int]
    switches: int
    """How often another process took over."""
    digest: str
    """Of all events: equal for equal runs."""
    failure: Failure | None = None


def simulate(
    seed: int,
    count: int,
    *,
    processes: int = PROCESSES,
    faults: Set[str] = ALL_FAULTS,
    ops: Sequence[Op] | None = None,
) -> Report:
    """Run `count` operations (or `ops` of them) of a seed.

    Args:
        processes: how many work on the repository at once.
        faults: names of those in `faults.FAULTS` that may happen.
    """
    given = workload(seed, count, processes) if ops is None else ops
    failure: Failure | None = None
    with small():
        world = World(seed, processes, faults, KINDS, weather)
        try:
            world.run(given)
            settled(world, world.sites["a"])
        except Violation as found:
            failure = Failure(found.check, found.seen, tuple(world.events))
        except Deadlock as found:
            failure = Failure("deadlock", str(found), tuple(world.events))
        writes = sum(number for kind, number in world.calls.items() if KINDS[kind].writes)
        return Report(
            seed, world.finished, writes, world.sites["a"].ledger.model.seq, dict(sorted(world.calls.items())),
            dict(sorted(world.counts.items())), world.schedule.switches, world.digest, failure,
        )  # fmt: skip


__all__ = ["ALL_FAULTS", "PROCESSES", "Failure", "Report", "simulate"]
