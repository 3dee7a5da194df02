"""What benchmarks share: intervals, percentiles and the one form of a result row."""

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

Row = dict[str, Any]
Rows = Iterator[Row]


class Took(NamedTuple):
    """Seconds of one call: on the wall, and of the processors for this process, its threads and its children."""

    wall: float
    cpu: float


def took(call: Callable[[], object]) -> Took:
    """How long a call takes; what it returns is dropped within."""
    cpu, wall = _cpu(), time.perf_counter()
    call()
    return Took(time.perf_counter() - wall, _cpu() - cpu)


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def interleaved(sides: Mapping[str, Callable[[int], Took]], rounds: int) -> dict[str, list[Took]]:
    """Each side once a round, given the round's number; the order turns, so that nobody always follows the same one."""
    names, found = list(sides), {name: [] for name in sides}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(sides[name](number))
    return found


OURS, THEIRS = "ours / theirs", "theirs / ours"
"""Which way a ratio goes: how much of theirs we take (a goal is a most), or how many times faster (a least)."""


def compared(
    bench: str, metric: str, ours: Sequence[float], theirs: Sequence[float], unit: str, *, of: str = OURS,
    goal: float | None = None, **more: Any,
) -> Row:  # fmt: skip
    """Ours beside theirs, round by round: the ratio is the median of the rounds' ratios."""
    pairs = list(zip(ours, theirs, strict=True))
    ratio = median(a / b if of == OURS else b / a for a, b in pairs)
    holds = None if goal is None else ratio <= goal if of == OURS else ratio >= goal
    return row(
        bench, metric, round(median(ours), 4), unit, against=round(median(theirs), 4), ratio=round(ratio, 3),
        goal=aim(of, goal), holds=holds, ratio_of=of, rounds=len(pairs), **more,
    )  # fmt: skip


def aim(of: str, goal: float | None) -> str:
    """A goal in words; empty when there is none."""
    return "" if goal is None else f"{of} {'<=' if of == OURS else '>='} {goal}"


def missing(bench: str, metric: str, unit: str, why: str, *, goal: str = "") -> Row:
    """What could not be measured, and why."""
    return row(bench, metric, None, unit, goal=goal, error=why)


def row(
    bench: str, metric: str, value: float | None, unit: str, *, against: float | str | None = None,
    ratio: float | None = None, goal: str = "", holds: bool | None = None, **more: Any,
) -> Row:  # fmt: skip
    """One result; `holds` is None where there is no goal."""
    return {
        "bench": bench, "metric": metric, "value": value, "unit": unit, "against": against, "ratio": ratio,
        "goal": goal, "holds": holds, **more,
    }  # fmt: skip


def share(bench: str, metric: str, right: int, of: int, **more: Any) -> Row:
    """A rate of success with its Wilson 95 % interval."""
    low, high = wilson(right, of)
    value = round(right / of, 4) if of else 0.0
    return row(bench, metric, value, "share", right=right, of=of, low=round(low, 4), high=round(high, 4), **more)


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    if not of:
        return 0.0, 1.0
    z = 1.959964
    rate = right / of
    middle = (rate + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(rate * (1 - rate) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(len(ordered) * percent / 100) - 1))]


def calibration_error(pairs: Sequence[tuple[float, bool]], bins: int = 10) -> float:
    """Expected calibration error over equal-width bins of (confidence, was right)."""
    total = 0.0
    for number in range(bins):
        inside = [(p, ok) for p, ok in pairs if number <= p * bins < number + 1 or (number == bins - 1 and p == 1)]
        if inside:
            gap = sum(p for p, _ in inside) / len(inside) - sum(ok for _, ok in inside) / len(inside)
            total += len(inside) / len(pairs) * abs(gap)
    return total


def show(found: Row, *, as_json: bool) -> str:
    """A row as one JSON line, or for a person."""
    if as_json:
        return json.dumps(found)
    extra = f"  ({found['right']}/{found['of']}, {found['low']:.3f}–{found['high']:.3f})" if "right" in found else ""
    if isinstance(found["against"], float):
        extra += f"  against {found['against']} {found['unit']}"
    ratio = f"  {found.get('ratio_of', 'ratio')} {found['ratio']:.2f}" if found.get("ratio") is not None else ""
    holds = "" if found["holds"] is None else ("  holds" if found["holds"] else f"  MISSED (goal {found['goal']})")
    value = f"missing: {found['error']}" if "error" in found else f"{found['value']:>10} {found['unit']}"
    return f"{found['bench']:<11} {found['metric']:<52} {value}{extra}{ratio}{holds}"
