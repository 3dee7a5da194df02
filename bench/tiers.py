"""A repository four times its warm budget, used by two processes at once: every byte verified, the budget watched.

Each process writes cells of its own and reads those of both. A tile names its writer, cell and version and is otherwise
noise grown from these, so that every read proves itself; of its own cells a process knows the version it must find.
In the second half each process keeps a view of some tile open while it goes on. Between the halves both end.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import him
from bench.measure import Rows, row
from him.config import EXTENT_BYTES
from him.types import StreamSpec

SIDE, BUDGET, TIMES = 256, 64 * 1024 * 1024, 4
WORKERS = 2
OPERATIONS, TINY = 100_000, 600
HALF_SECONDS = 75
"""So long a half runs at most, unless in full."""
WRITES = 0.1
VIEW_FOR = 40
"""Operations a view is kept for."""

Tile = NDArray[np.uint8]


def run(*, tiny: bool = False, full: bool = False) -> Rows:
    """Rows of operations, wrong bytes, the budget, residency over a restart; `full` runs until all are done."""
    budget = BUDGET // 4 if tiny else BUDGET
    # A little more, for what was written last is not in the cold tier yet.
    cells = int(1.2 * TIMES * budget) // (SIDE * SIDE) // WORKERS
    wanted = TINY if tiny else OPERATIONS
    operations, seconds = wanted // (2 * WORKERS), 10**6 if full else HALF_SECONDS
    with tempfile.TemporaryDirectory(prefix="him-tiers-") as name:
        place, most, began = Path(name) / "memory", 0, time.perf_counter()
        _make(place, Path(name) / "cold", budget, cells)
        known: list[list[int]] = [[0] * cells for _ in range(WORKERS)]
        totals: dict[str, int] = {}
        for half in range(2):
            found = list(_workers(place, operations, seconds, known, half, viewing=half == 1))
            most = max([most, *(one["most"] for one in found)])
            known = [one["versions"] for one in found]
            for key in ("read", "written", "views", "fetches", "through"):
                totals[key] = totals.get(key, 0) + sum(one[key] for one in found)
            if half == 0:
                with him.open(place) as repo:
                    before = repo.tier.status().warm_bytes
                with him.open(place) as repo:
                    after = repo.tier.status().warm_bytes
        with him.open(place) as repo:
            status, sound = repo.tier.status(), repo.fsck()
            most = max(most, _used(place))
        size = status.cold_bytes / budget
        allowed = budget + WORKERS * EXTENT_BYTES
        done = totals["read"] + totals["written"]
        took = time.perf_counter() - began
        yield row(
            "tiers", "operations, all verified", done, "operations", against=f"{totals['written']} of them writes",
            goal="all right", holds=True, **totals, seconds=round(took, 1), wanted=wanted,
            ended="all done" if done >= wanted else f"after {2 * seconds} s; --full runs all",
        )  # fmt: skip
        yield row(
            "tiers", "bytes behind the budget", status.cold_bytes, "bytes", against=budget,
            ratio=round(size, 1), goal=f">= {TIMES}", holds=size >= TIMES,
        )  # fmt: skip
        yield row(
            "tiers", "most the packs took", most, "bytes", against=budget, ratio=round(most / budget, 4),
            goal="<= budget + 1 extent a writer", holds=most <= allowed,
        )  # fmt: skip
        yield row(
            "tiers", "bytes here after a restart", after, "bytes", against=before, goal="equal",
            holds=after == before and before > 0,
        )  # fmt: skip
        yield row("tiers", "fsck at the end", len(sound.errors), "faults", goal="0", holds=sound.ok,
                  first=str(sound.errors[:2]))  # fmt: skip


def _make(place: Path, cold: Path, budget: int, cells: int) -> None:
    """The repository with its first versions, as large as the budget allows several times over."""
    with him.open(place, create=True) as repo:
        repo.declare_stream(StreamSpec("noise", tile_height=SIDE, tile_width=SIDE, dtype="uint8"))
        repo.set_tier(str(cold), budget)
    with him.open(place) as repo:
        for worker in range(WORKERS):
            for first in range(0, cells, 32):
                part = {(0, at): tile(worker, at, 0) for at in range(first, min(first + 32, cells))}
                repo.writable("main").put_many("noise", part, frame=f"w{worker}")


def _workers(
    place: Path, operations: int, seconds: int, known: list[list[int]], half: int, *, viewing: bool
) -> Iterator[Any]:
    """What each process tells at its end. Raises RuntimeError when one found a wrong byte."""
    given = [str(one) for one in (operations, seconds, half, int(viewing))]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.tiers", str(place), str(number), *given],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(WORKERS)
    ]  # fmt: skip
    for process in started:
        assert process.stdin is not None
        process.stdin.write(json.dumps(known))
        process.stdin.close()
    for number, process in enumerate(started):
        assert process.stdout is not None
        told = process.stdout.read()
        if process.wait():
            raise RuntimeError(f"process {number} ended with {process.returncode}: {told}")
        yield json.loads(told)


def tile(worker: int, cell: int, version: int) -> Tile:
    """Noise that names what it is."""
    made = np.frombuffer(random.Random(f"{worker} {cell} {version}").randbytes(SIDE * SIDE), dtype=np.uint8).copy()
    made[:24].view("<u8")[:] = worker, cell, version
    return made.reshape(SIDE, SIDE)


def _used(place: Path) -> int:
    return sum(512 * one.st_blocks for one in map(os.stat, (place / "packs").iterdir()))


def _work(
    place: Path, me: int, operations: int, seconds: int, half: int, *, viewing: bool, known: list[list[int]]
) -> dict[str, Any]:
    """One process's share, as much as `seconds` allow; an assertion fails at the first wrong byte."""
    rng, versions = random.Random(f"{me} {half}"), known[me]
    told = dict.fromkeys(("read", "written", "views", "most"), 0)
    cells = len(versions)
    order = list(range(cells))
    random.Random(half).shuffle(order)
    with him.open(place) as repo, ExitStack() as lent:
        until, shown, end = 0, None, time.monotonic() + seconds
        for number in range(operations):
            if time.monotonic() > end:
                break
            if rng.random() < WRITES:
                cell = order[int(cells * rng.random() ** 3)]
                value = tile(me, cell, versions[cell] + 1)
                repo.writable("main").put("noise", value, frame=f"w{me}", x=cell)
                versions[cell] += 1
                told["written"] += 1
            else:
                worker, cell = rng.randrange(WORKERS), order[int(cells * rng.random() ** 3)]
                found = np.asarray(repo.snapshot("main").get("noise", frame=f"w{worker}", x=cell))
                _proved(
                    found, worker, cell, versions[cell] if worker == me else known[worker][cell], exact=worker == me
                )
                known[worker][cell] = int(found.reshape(-1)[:24].view("<u8")[2])
                told["read"] += 1
            if viewing and number == until:
                if shown is not None:
                    _proved(*shown, exact=True)
                    shown = None
                    lent.close()
                cell, until = rng.randrange(cells), number + VIEW_FOR
                view = lent.enter_context(repo.snapshot("main").view("noise", frame=f"w{me}", x=cell))
                shown = np.asarray(view), me, cell, versions[cell]
                told["views"] += 1
            told["most"] = max(told["most"], _used(place))
        shown = None
        status = repo.tier.status()
    return {**told, "versions": versions, "fetches": status.fetches, "through": status.passed_through}


def _proved(found: Tile, worker: int, cell: int, version: int, *, exact: bool) -> None:
    shown = int(found.reshape(-1)[:24].view("<u8")[2])
    assert shown == version if exact else shown >= version, f"version {shown} of cell {cell}, where {version} is due"
    assert np.array_equal(found, tile(worker, cell, shown)), f"wrong bytes in cell {cell} of {worker}"


if __name__ == "__main__":
    folder, who, count, longest, which, views = sys.argv[1:]
    print(json.dumps(_work(
        Path(folder), int(who), int(count), int(longest), int(which), viewing=views == "1", known=json.load(sys.stdin)
    )))  # fmt: skip
