"""Cutting a failure down: the fewest calls, faults and processes that still fail in the same way."""

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

from him.sim.run import Report, simulate
from him.sim.world import Op

TRIES_MAX = 200
"""Simulations that cutting down may take."""


class Case(NamedTuple):
    """What to simulate."""

    seed: int
    ops: tuple[Op, ...]
    processes: int
    faults: frozenset[str]

    def run(self) -> Report:
        """Simulate it."""
        return simulate(self.seed, len(self.ops), processes=self.processes, faults=self.faults, ops=self.ops)


def shrink(
    seed: int,
    ops: Sequence[Op],
    processes: int,
    faults: Set[str],
    report: Report,
    *,
    tries: int = TRIES_MAX,
    told: Callable[[str], None] = lambda _: None,
) -> tuple[Case, Report]:
    """A smaller case that fails in the same check as `report` of these calls, and its own report."""
    assert report.failure is not None
    check, left = report.failure.check, tries
    best = Case(seed, tuple(ops), processes, frozenset(faults)), report

    def fails(case: Case) -> bool:
        nonlocal best, left
        if left <= 0:
            return False
        left -= 1
        found = case.run()
        if found.failure is None or found.failure.check != check:
            return False
        best = case, found
        told(f"{len(case.ops)} calls of {case.processes} processes, {len(case.faults)} faults")
        return True

    case = best[0]
    # What came long after the failure was never begun.
    for share in (1.5, 3.0):
        if fails(case._replace(ops=case.ops[: int(report.operations * share) + 20])):
            break
    for fewer in range(1, best[0].processes):
        if fails(best[0]._replace(processes=fewer)):
            break
    for name in sorted(best[0].faults):
        if name in best[0].faults:
            fails(best[0]._replace(faults=best[0].faults - {name}))
    _cut(lambda: best[0].ops, lambda ops: fails(best[0]._replace(ops=tuple(ops))))
    return best


def _cut(now: Callable[[], Sequence[Op]], fails: Callable[[Sequence[Op]], bool]) -> None:
    """Leave out runs of calls, half of them first, then ever smaller ones (ddmin, Zeller 2002)."""
    size = max(1, len(now()) // 2)
    while True:
        at, cut = 0, False
        while at < len(now()):
            ops = now()
            if fails([*ops[:at], *ops[at + size :]]):
                cut = True
            else:
                at += size
        if size == 1 and not cut:
            return
        size = size if cut and size == 1 else max(1, size // 2)
