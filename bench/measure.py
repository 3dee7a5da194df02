"""What benchmarks share: intervals, percentiles and the one form of a result row."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]
Rows = Iterator[Row]


def row(
    bench: str, metric: str, value: float, unit: str, *, against: float | str | None = None,
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
    ratio = f"  ratio {found['ratio']:.2f}" if found.get("ratio") is not None else ""
    holds = "" if found["holds"] is None else ("  holds" if found["holds"] else f"  MISSED (goal {found['goal']})")
    return f"{found['bench']:<8} {found['metric']:<44} {found['value']:>10} {found['unit']}{extra}{ratio}{holds}"
