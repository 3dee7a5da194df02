"""Share of goals answered rightly on the shipped screens, each class apart, from pixels alone and with trees.

The tree arm shares its witness with the truth (both come from the browser), so it shows fusion, not seeing.
"""

from bench.examples import goals, repository, right
from bench.measure import Rows, calibration_error, row, share

BUDGET_MS = 2_000
"""Wide, so that quality is measured and not the machine's speed; `latency` measures that."""


def run(*, tiny: bool = False) -> Rows:
    """Rows by arm, class and whether a frame was named."""
    for arm, trees in (("pixels", False), ("tree", True)):
        judged: list[tuple[str, bool, bool]] = []
        pairs: list[tuple[float, bool]] = []
        with repository(tiny=tiny, trees=trees) as repo:
            for goal in goals(tiny=tiny):
                found = repo.query(goal["goal"], "main", frame=goal["frame"], budget_ms=BUDGET_MS).as_json()
                ok = right(goal, found)
                judged.append((goal["class"], goal["frame"] is not None, ok))
                if found["found"]:
                    pairs.append((found["confidence"], ok))
        yield from _rows(arm, judged, pairs)


def _rows(arm: str, judged: list[tuple[str, bool, bool]], pairs: list[tuple[float, bool]]) -> Rows:
    for name in ("text", "field", "absent", "ambiguous"):
        of = [ok for kind, _, ok in judged if kind == name]
        yield share("goals", f"{arm}: {name}", sum(of), len(of))
    for label, named in (("frame named", True), ("over all frames", False)):
        of = [ok for _, framed, ok in judged if framed is named]
        yield share("goals", f"{arm}: {label}", sum(of), len(of))
    sure = [ok for p, ok in pairs if p >= 0.95]
    yield share("goals", f"{arm}: accepted answers that are right", sum(sure), len(sure))
    if pairs:
        yield row("goals", f"{arm}: ECE of answered goals", round(calibration_error(pairs), 4), "share", n=len(pairs))
