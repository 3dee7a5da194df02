"""Garbage is collected and packs are joined while two processes read, write and share what was just condemned.

Each writer puts values of a small pool into cells of its own frame, so that what it writes is often content that
nothing refers to any more, in packs that are being given up; some values are small changes of what is there and stored
as such. It reads cells as they are, and as an older handle must show them; now and then it forks a branch and deletes
it again. A collector runs beside, one after the other: they are killed wherever they are. Packs are small, so that many
are finished.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import him
from bench.measure import Rows, row
from him.tier import warm
from him.types import StreamSpec

SIDE, CELLS, POOL = 128, 200, 600
WORKERS = 2
SECONDS, TINY_SECONDS = 90, 5
KILL_AFTER = (1.0, 5.0)
HANDLE_FOR = 60
"""Operations an older handle is read through."""
PACK_BYTES = 1024 * 1024
KEPT_SHARE = 0.5
"""Of the packs at the end at least so much must be in use: what less is used of is given up."""

Tile = NDArray[np.uint8]


def run(*, tiny: bool = False) -> Rows:
    """Rows of operations, of what was reclaimed, and of what is left."""
    seconds = TINY_SECONDS if tiny else SECONDS
    with tempfile.TemporaryDirectory(prefix="him-collect-") as name:
        place = Path(name) / "memory"
        with him.open(place, create=True) as repo:
            repo.declare_stream(StreamSpec("noise", tile_height=SIDE, tile_width=SIDE, dtype="uint8"))
        workers = [_started(place, "work", str(number), str(seconds)) for number in range(WORKERS)]
        kills = _collectors(place, seconds)
        told = [_result(one) for one in workers]
        with him.open(place) as repo:
            before = _content(repo, told)
            last, size = repo.compact(), 0
            again = repo.gc()
            after, report = _content(repo, told), repo.fsck()
            removed = sum(1 for one in _operations(repo) if one == "removed")
        size = sum(one.stat().st_size for one in (place / "packs").iterdir())
    written = sum(one["stored"] for one in told)
    done = sum(one["reads"] + one["writes"] + one["old_reads"] for one in told)
    yield row(
        "collect", "operations beside collections, all verified", done, "operations",
        against=f"{kills} collectors killed", goal="all right", holds=True,
        **{key: sum(one[key] for one in told) for key in ("reads", "old_reads", "writes", "shared", "forks")},
    )  # fmt: skip
    yield row(
        "collect", "cells that read the same after the last collection", len(after), "cells", against=len(before),
        goal="all", holds=before == after and len(after) > 0,
    )  # fmt: skip
    yield row(
        "collect", "reclaimed", written - size, "bytes", against=written, ratio=round(1 - size / written, 3),
        goal="what nothing refers to", holds=again.waiting_packs == 0 and removed > 0, ratio_of="of all written",
        packs_removed=removed, packs_left=again.packs,
    )  # fmt: skip
    yield row(
        "collect", "in use of what is left", again.live_bytes, "bytes", against=size,
        ratio=round(again.live_bytes / size, 3), goal=f">= {KEPT_SHARE}", holds=again.live_bytes / size >= KEPT_SHARE,
        copied_by_the_last=last.copied_bytes,
    )  # fmt: skip
    yield row("collect", "fsck at the end", len(report.errors), "faults", goal="0", holds=report.ok,
              first=str(report.errors[:2]))  # fmt: skip


def _started(place: Path, *given: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "bench.collect", str(place), *given], stdout=subprocess.PIPE, text=True
    )


def _result(process: "subprocess.Popen[str]") -> Any:
    """What a process told at its end. Raises RuntimeError when it failed."""
    assert process.stdout is not None
    told = process.stdout.read()
    if process.wait():
        raise RuntimeError(f"a process ended with {process.returncode}: {told}")
    return json.loads(told)


def _collectors(place: Path, seconds: float) -> int:
    """Collect for so long, killing one collector after the other; how many were killed."""
    rng, end, kills = random.Random(5), time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 0:
        process = _started(place, "collect")
        try:
            if process.wait(min(left, rng.uniform(*KILL_AFTER))):
                raise RuntimeError(f"a collector ended with {process.returncode}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    return kills


def _content(repo: him.Repository, told: list[Any]) -> dict[tuple[int, int], bytes]:
    """Every cell, which must hold what its writer put last."""
    found: dict[tuple[int, int], bytes] = {}
    for number, one in enumerate(told):
        handle = repo.snapshot("main")
        for cell, seed in enumerate(one["cells"]):
            if seed is not None:
                value = np.asarray(handle.get("noise", frame=f"w{number}", x=cell))
                _check(value, seed)
                found[number, cell] = value.tobytes()
    return found


def _operations(repo: him.Repository) -> list[str]:
    return [one["operation"] for record in repo.log() for one in record["operations"]]


def tile(seed: int) -> Tile:
    """Noise; an odd seed's differs from the even one's before it in a few blocks."""
    made = np.frombuffer(random.Random(seed - seed % 2).randbytes(SIDE * SIDE), dtype=np.uint8).copy()
    if seed % 2:
        made.reshape(SIDE, SIDE)[:16, :16] ^= 255
    return made.reshape(SIDE, SIDE)


def _check(found: Tile, seed: int) -> None:
    assert np.array_equal(found, tile(seed)), f"wrong bytes where {seed} is due"


def _work(place: Path, me: int, seconds: float) -> dict[str, Any]:
    """Write, read and fork until the time is over; an assertion fails at the first wrong byte."""
    rng, frame, branch = random.Random(me), f"w{me}", f"fork {me}"
    cells: list[int | None] = [None] * CELLS
    told = dict.fromkeys(("reads", "old_reads", "writes", "shared", "forks"), 0)
    end = time.monotonic() + seconds
    with him.open(place) as repo:
        old, shows, until, number = repo.writable("main"), list(cells), 0, 0
        while time.monotonic() < end:
            number += 1
            cell, what = rng.randrange(CELLS), rng.random()
            if what < 0.3 or cells[cell] is None:
                chosen = rng.sample(range(CELLS), 4)
                fresh = {at: rng.randrange(POOL) for at in chosen}
                before = repo.stored_bytes()
                repo.writable("main").put_many(
                    "noise", {(0, at): tile(seed) for at, seed in fresh.items()}, frame=frame
                )
                told["writes"] += len(fresh)
                told["shared"] += repo.stored_bytes() - before < len(fresh) * SIDE * SIDE // 2
                for at, seed in fresh.items():
                    cells[at] = seed
            elif what < 0.31:
                gone = repo.branch(branch, source="main")
                gone.put("noise", tile(rng.randrange(POOL)), frame=frame, x=cell)
                repo.delete_ref(branch)
                repo.delete_snapshot(gone.id)
                told["forks"] += 1
            elif what < 0.7 and shows[cell] is not None:
                _check(np.asarray(old.get("noise", frame=frame, x=cell)), shows[cell] or 0)
                told["old_reads"] += 1
            else:
                _check(np.asarray(repo.snapshot("main").get("noise", frame=frame, x=cell)), cells[cell] or 0)
                told["reads"] += 1
            if number > until:
                old, shows, until = repo.snapshot("main"), list(cells), number + HANDLE_FOR
        stored = repo.stored_bytes()
    return {**told, "cells": cells, "stored": stored}


def _collect(place: Path) -> None:
    with him.open(place) as repo:
        while True:
            repo.gc(dead_share=0.1)
            repo.compact()


if __name__ == "__main__":
    folder, role, *rest = sys.argv[1:]
    warm.PACK_TARGET_BYTES = PACK_BYTES  # type: ignore[misc]
    if role == "collect":
        _collect(Path(folder))
    else:
        print(json.dumps(_work(Path(folder), int(rest[0]), float(rest[1]))))
