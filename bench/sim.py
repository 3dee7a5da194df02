"""The seeded simulator at full length: a million workload calls over hundreds of seeds, all faults on, on every core.

A seed's report is kept as soon as it ends: a run that was interrupted goes on where it was, as long as the source is
the same. Lines of the rooms are measured over some of the seeds, apart from the others, since that takes its time.
"""

import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

import him
from bench.measure import Row, Rows, missing, row

CALLS_AIM, SEEDS_AIM, LINES_AIM = 1_000_000, 200, 0.85
SEEDS = 500
"""Many short histories find more than few long ones, which mostly grow."""
ROOMS = ("pack", "tier", "pyramid", "catalog")
OUT = Path(__file__).parent / "out" / "sim.jsonl"
LOST = {
    "a published record is lost", "an acknowledged batch is not there", "an acknowledged record is not there",
    "an acknowledged commit cannot be seen", "an acknowledged name cannot be seen", "a restore lacks what was pushed",
    "nothing can be restored",
}  # fmt: skip
"""Checks whose failure is a lost acknowledged commit; `wrong bytes` and the others are silent errors."""
_SILENT = {
    "wrong bytes", "a tile nobody put", "frames differ", "places differ", "names differ", "snapshots differ",
    "streams differ", "a diff differs", "one directory for two contents", "two directories for one content",
    "a failed commit became visible", "a directory nobody committed", "expired before its time",
}  # fmt: skip
"""Those whose failure means that something wrong was told as if it were right."""


def run(*, tiny: bool = False) -> Rows:
    """Rows: calls, seeds, what failed, faults by kind, lines of each room, calls a second."""
    seeds, calls = (range(1, 5), 150) if tiny else (range(1, SEEDS + 1), CALLS_AIM // SEEDS)
    source, began = _source(), time.monotonic()
    known = {} if tiny else {one["seed"]: one for one in _kept(source, calls)}
    todo = [(seed, calls) for seed in seeds if seed not in known]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count() or 1) as pool:
        for found in pool.imap_unordered(_simulated, todo):
            known[found["seed"]] = found
            if not tiny:
                _keep(found, source, calls)
    took = time.monotonic() - began
    yield from _rows([known[seed] for seed in seeds], took if todo else 0.0, len(todo))
    yield from _lines([1] if tiny else range(1, 13), calls if tiny else 1_500)


def _simulated(case: tuple[int, int]) -> dict[str, Any]:
    """One seed's report as plain values; two to four processes, by the seed."""
    from him.sim.run import simulate

    seed, calls = case
    report = simulate(seed, calls, processes=2 + seed % 3)
    failure = report.failure
    return {
        "seed": seed, "calls": report.operations, "writes": report.writes, "commits": report.records,
        "faults": report.faults, "switches": report.switches, "check": failure and failure.check,
        "seen": failure and failure.seen,
    }  # fmt: skip


def _rows(reports: Sequence[dict[str, Any]], took: float, fresh: int) -> Rows:
    calls, faults = sum(one["calls"] for one in reports), Counter[str]()
    for one in reports:
        faults.update(one["faults"])
    failed = [one for one in reports if one["check"]]
    yield row(
        "sim", "workload calls", calls, "calls", goal=f">= {CALLS_AIM}", holds=calls >= CALLS_AIM,
        writes=sum(one["writes"] for one in reports), commits=sum(one["commits"] for one in reports),
        switches=sum(one["switches"] for one in reports),
    )  # fmt: skip
    yield row("sim", "seeds", len(reports), "seeds", goal=f">= {SEEDS_AIM}", holds=len(reports) >= SEEDS_AIM)
    for metric, checks in (("silent errors", _SILENT), ("lost acknowledged commits", LOST)):
        seeds = [one["seed"] for one in failed if one["check"] in checks]
        yield row("sim", metric, len(seeds), "seeds", goal="0", holds=not seeds, seeds=seeds)
    others = [one["seed"] for one in failed if one["check"] not in _SILENT | LOST]
    seen = {one["seed"]: f"{one['check']}: {one['seen']}"[:200] for one in failed}
    yield row("sim", "other failures", len(others), "seeds", goal="0", holds=not others, seeds=others, seen=seen)
    for name, count in sorted(faults.items()):
        yield row("sim", f"faults: {name}", count, "times")
    if fresh:
        rate = sum(one["calls"] for one in reports) * fresh / len(reports) / took
        yield row("sim", "calls a second", round(rate), "calls/s", cores=os.cpu_count())


def _lines(seeds: Sequence[int], calls: int) -> Rows:
    """The share of lines of each room that the simulator runs through."""
    try:
        import coverage
    except ImportError as error:
        for room in ROOMS:
            yield missing("sim", f"lines of {room}", "share", str(error), goal=f">= {LINES_AIM}")
        return
    package = Path(him.__file__).parent
    measured = coverage.Coverage(data_file=None, include=[str(package / room / "*") for room in ROOMS])
    # Modules that were imported before would lack their definitions.
    child = multiprocessing.get_context("spawn").Pool(1)
    with child as pool:
        (executed,) = pool.map(_covered, [(tuple(seeds), calls)])
    for room in ROOMS:
        yield _room(measured, package, room, executed)


def _room(measured: Any, package: Path, room: str, executed: dict[str, list[int]]) -> Row:
    lines = hit = 0
    worst: dict[str, float] = {}
    for file in sorted((package / room).glob("*.py")):
        _, statements, excluded, _, _ = measured.analysis2(str(file))
        wanted = set(statements) - set(excluded)
        done = wanted & set(executed.get(str(file), []))
        lines, hit = lines + len(wanted), hit + len(done)
        if wanted:
            worst[file.name] = round(len(done) / len(wanted), 3)
    share = hit / lines
    lowest = dict(sorted(worst.items(), key=lambda one: one[1])[:3])
    return row(
        "sim", f"lines of {room}", round(share, 4), "share", goal=f">= {LINES_AIM}", holds=share >= LINES_AIM,
        lines=lines, lowest=lowest,
    )  # fmt: skip


def _covered(case: tuple[Sequence[int], int]) -> dict[str, list[int]]:
    """Lines that were run, by file: in a process of its own, from the first import on."""
    import coverage

    package = Path(him.__file__).parent
    measured = coverage.Coverage(data_file=None, include=[str(package / room / "*") for room in ROOMS])
    measured.start()
    try:
        seeds, calls = case
        for seed in seeds:
            _simulated((seed, calls))
    finally:
        measured.stop()
    data = measured.get_data()
    return {name: sorted(data.lines(name) or []) for name in data.measured_files()}


# -- going on after an interruption


def _source() -> str:
    """A digest of the program's source: reports of another one do not count."""
    hasher = blake3()
    for file in sorted(Path(him.__file__).parent.rglob("*.py")):
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


def _kept(source: str, calls: int) -> Iterator[dict[str, Any]]:
    if OUT.exists():
        for line in OUT.read_text().splitlines():
            found = json.loads(line)
            if (found["source"], found["asked"]) == (source, calls):
                yield found


def _keep(found: dict[str, Any], source: str, calls: int) -> None:
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as file:
        file.write(json.dumps({**found, "source": source, "asked": calls}) + "\n")
