"""Latency of `him query` on the shipped screens: through the warm daemon and as a cold process, whole and by stage."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from bench.examples import goals, repository
from bench.measure import Row, Rows, percentile, row

BUDGET_MS = 150
COLD_RUNS = 20
WARM_ROUNDS = 3
HIM = (sys.executable, "-m", "him.cli.entry")


def run(*, tiny: bool = False) -> Rows:
    """Rows of p50 and p95: whole process, from receipt to answer, and by stage."""
    asked = goals(tiny=tiny)
    with repository(tiny=tiny) as repo:
        place = str(repo.path)
        cold = [_query(place, goal, "--no-daemon") for goal in asked[: 2 if tiny else COLD_RUNS]]
        _him("daemon", "start", "--repo", place)
        try:
            for goal in asked[:20]:
                _query(place, goal)
            warm = [_query(place, goal) for _ in range(1 if tiny else WARM_ROUNDS) for goal in asked]
        finally:
            _him("daemon", "stop", "--repo", place)
    yield from _rows("daemon", warm)
    yield from _rows("cold", cold)
    within = sum(answer["status"] != "deadline" for _, answer in warm) / len(warm)
    yield row(
        "latency", "daemon: answered within 150 ms", round(within, 4), "share", goal=">= 0.99", holds=within >= 0.99
    )


def _rows(arm: str, runs: Sequence[tuple[float, dict[str, object]]]) -> Rows:
    yield from _pair(f"{arm}: whole process", [wall for wall, _ in runs])
    answers = [answer for _, answer in runs]
    for name in ("elapsed_ms", "startup_ms"):
        yield from _pair(f"{arm}: {name}", [float(str(answer[name])) for answer in answers])
    stages: dict[str, list[float]] = {}
    for answer in answers:
        taken = answer["stages_ms"]
        if isinstance(taken, dict):
            for name, took in taken.items():
                stages.setdefault(name, []).append(took)
    for name, took in stages.items():
        yield from _pair(f"{arm}: stage {name}", took)


def _pair(metric: str, values: Sequence[float]) -> list[Row]:
    return [
        row("latency", f"{metric} p{percent}", round(percentile(values, percent), 2), "ms", n=len(values))
        for percent in (50, 95)
    ]


def _query(place: str, goal: dict[str, object], *more: str) -> tuple[float, dict[str, object]]:
    frame = ["--frame", str(goal["frame"])] if goal["frame"] else []
    began = time.perf_counter()
    line = _him(
        "query", "--repo", place, "--snapshot", "main", "--goal", str(goal["goal"]), *frame,
        "--budget", str(BUDGET_MS), "--json", *more,
    )  # fmt: skip
    return (time.perf_counter() - began) * 1000, json.loads(line)


def _him(*arguments: str) -> str:
    done = subprocess.run([*HIM, *arguments], capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(f"him {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout
