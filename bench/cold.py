"""A thousand clustered tiles that lie in S3 alone, read through 20 ms a request; against one GET an object.

The store is a real S3 server (SeaweedFS) behind a proxy that delays and counts requests. The tiles are windows of
neighbours in several places of a large frame, whose packs were copied and freed. Read twice: by a process that has just
opened the repository (address index on this disk, pages in S3), and again, freed anew, with its pages in memory. The
peer is the same tile payloads as an object each, by the same adapter with as many GETs in flight; it verifies nothing.

The optimum: the fewest ranged GETs, of at most COLD_PART_BYTES each, that cover the extents which hold the tiles, where
a gap is bridged if its bytes, at the bandwidth measured with all requests in flight, take less time than a request
(its latency shared by those in flight). It counts no GETs for pages.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

import him
from bench.measure import THEIRS, Rows, aim, compared, missing, row
from bench.s3 import CREDENTIALS, FaultProxy, binary, serve
from him.adapters.objects import open_store
from him.config import COLD_FLIGHT_MAX, COLD_GAP_BYTES, COLD_PART_BYTES, EXTENT_BYTES
from him.ports import ObjectStore
from him.types import StreamSpec, TileKey

SIDE = 256
LATENCY_MS = 20
CELLS, TINY_CELLS = 64, 16
"""Side of the frame, in tiles."""
WINDOW, TINY_WINDOW = 10, 4
WINDOWS, TINY_WINDOWS = 10, 2
BAND, TINY_BAND = 8, 16
"""Rows of tiles a commit, and so a pack."""
ROUNDS, TINY_ROUNDS = 5, 1
FASTER, REQUESTS = 3.0, 1.2
BUDGET = 512 * 1024 * 1024

Cell = tuple[int, int]
Tile = NDArray[np.uint8]


def run(*, tiny: bool = False) -> Rows:
    """Rows of time and of requests, with pages cold and in memory."""
    try:
        binary()
    except FileNotFoundError as error:
        yield missing("cold", "tiles from S3", "ms", str(error), goal=aim(THEIRS, FASTER))
        return
    with (
        tempfile.TemporaryDirectory(prefix="him-cold-") as name,
        _credentials(),
        serve(Path(name) / "s3") as (server, proxy),
    ):
        cells = wanted(tiny=tiny)
        place = _make(Path(name) / "memory", server.url("him", port=proxy.port), tiny=tiny)
        objects = open_store(server.url("objects", port=proxy.port))
        with ThreadPoolExecutor(COLD_FLIGHT_MAX) as pool:
            list(pool.map(lambda cell: objects.put(_name(cell), tile(cell).tobytes()), cells))
        yield from _compared(place, objects, proxy, cells, rounds=TINY_ROUNDS if tiny else ROUNDS)


def wanted(*, tiny: bool) -> list[Cell]:
    """(row, column) of the tiles: windows that do not overlap, not aligned with anything."""
    side, window = (TINY_CELLS, TINY_WINDOW) if tiny else (CELLS, WINDOW)
    rng, tops = np.random.default_rng(8), list[Cell]()
    while len(tops) < (TINY_WINDOWS if tiny else WINDOWS):
        y, x = (int(at) for at in rng.integers(0, side - window + 1, 2))
        if all(abs(y - v) >= window or abs(x - u) >= window for v, u in tops):
            tops.append((y, x))
    return [(y + at // window, x + at % window) for y, x in tops for at in range(window * window)]


def tile(cell: Cell) -> Tile:
    """Noise: nothing compresses it."""
    return np.random.default_rng(cell).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def _name(cell: Cell) -> str:
    return f"tiles/{cell[0]}/{cell[1]}"


def _make(place: Path, cold: str, *, tiny: bool) -> Path:
    """A repository whose frame is all in S3, written band by band from the top."""
    side, band = (TINY_CELLS, TINY_BAND) if tiny else (CELLS, BAND)
    with him.open(place, create=True) as repo:
        repo.declare_stream(StreamSpec("noise", tile_height=SIDE, tile_width=SIDE, dtype="uint8"))
        # A pack of such a budget is finished with every band.
        repo.set_tier(cold, BUDGET // (4 if tiny else 1))
    with him.open(place) as repo:
        for top in range(0, side, band):
            rows = {(y, x): tile((y, x)) for y in range(top, top + band) for x in range(side)}
            repo.writable("main").put_many("noise", rows)
        repo.tier.push()
        if repo.tier.status().only_warm_packs:
            raise RuntimeError("not every pack is in the cold tier")
    return place


def _compared(place: Path, objects: ObjectStore, proxy: FaultProxy, cells: Sequence[Cell], *, rounds: int) -> Rows:
    """Both sides in turn, so that what else the machine does meets both."""
    expected = {cell: tile(cell) for cell in cells}
    proxy.faults.latency_ms = LATENCY_MS
    seconds: dict[str, list[float]] = {"cold": [], "memory": [], "objects": []}
    gets: dict[str, list[int]] = {"cold": [], "memory": [], "objects": []}
    down: dict[str, list[int]] = {"cold": [], "memory": [], "objects": []}
    extents: dict[str, set[int]] = {}

    def measured(side: str, work: Callable[[], Sequence[object]]) -> None:
        proxy.counts = type(proxy.counts)()
        began = time.perf_counter()
        found = work()
        seconds[side].append(time.perf_counter() - began)
        gets[side].append(proxy.counts.gets)
        down[side].append(proxy.counts.bytes_down)
        for cell, got in zip(cells, found, strict=True):
            if not np.array_equal(np.asarray(got).reshape(SIDE, SIDE), expected[cell]):
                raise RuntimeError(f"{side}: wrong bytes in {cell}")

    def peer() -> Sequence[object]:
        with ThreadPoolExecutor(COLD_FLIGHT_MAX) as pool:
            got = pool.map(lambda cell: objects.get(_name(cell), SIDE * SIDE), cells)
            return [np.frombuffer(data, np.uint8) for data in got]

    for _ in range(rounds):
        with him.open(place) as repo:
            read = partial(repo.snapshot("main").get_many, "noise", cells)
            repo.tier.demote()
            measured("cold", read)
            repo.tier.demote()
            measured("memory", read)
            extents = _extents(repo, cells)
        measured("objects", peer)
    bandwidth = median(down["memory"]) / median(seconds["memory"])
    yield from _rows(seconds, gets, down, extents, bandwidth)


def _rows(
    seconds: Mapping[str, list[float]], gets: Mapping[str, list[int]], down: Mapping[str, list[int]],
    extents: Mapping[str, set[int]], bandwidth: float,
) -> Rows:  # fmt: skip
    gap = int(bandwidth * LATENCY_MS / 1000 / COLD_FLIGHT_MAX)
    best = optimum(extents, gap)
    for side, pages in (("cold", "pages in S3"), ("memory", "pages in memory")):
        took, against = ([1000 * one for one in seconds[at]] for at in (side, "objects"))
        yield compared(
            "cold", f"clustered tiles, {pages}", took, against,
            "ms", of=THEIRS, goal=FASTER, gets=median(gets[side]), gets_against=median(gets["objects"]),
            mb=round(median(down[side]) / 1e6, 1), mb_against=round(median(down["objects"]) / 1e6, 1),
        )  # fmt: skip
    for side, pages in (("cold", "pages in S3"), ("memory", "pages in memory")):
        ratio = median(gets[side]) / best
        yield row(
            "cold", f"requests, {pages}", median(gets[side]), "GETs", against=best, ratio=round(ratio, 3),
            goal=f"<= {REQUESTS} x the optimum", holds=ratio <= REQUESTS, ratio_of="GETs / optimum",
            gap_kib=gap // 1024, bandwidth_mb_s=round(bandwidth / 1e6),
            optimum_at_gap_used=optimum(extents, COLD_GAP_BYTES),
            optimum_alone=optimum(extents, gap * COLD_FLIGHT_MAX),
        )  # fmt: skip


def optimum(extents: Mapping[str, set[int]], gap: int) -> int:
    """The fewest GETs of at most COLD_PART_BYTES that cover extents by pack, bridging gaps of at most `gap` bytes."""
    count = 0
    for ranks in extents.values():
        first, last = -1, -1
        for at in sorted(ranks):
            if first < 0 or (at - last - 1) * EXTENT_BYTES > gap or (at + 1 - first) * EXTENT_BYTES > COLD_PART_BYTES:
                first, count = at, count + 1
            last = at
    return count


def _extents(repo: him.Repository, cells: Sequence[Cell]) -> dict[str, set[int]]:
    """Which extents of which packs hold the tiles' records."""
    found: dict[str, set[int]] = {}
    reader = repo.snapshot("main").reader
    blobs = [reader.present(TileKey("noise", "", 0, y, x)).ref for y, x in cells]
    for path, offset, size in repo._store.places(blobs):  # pyright: ignore[reportPrivateUsage]
        found.setdefault(path, set()).update(range(offset // EXTENT_BYTES, -(-(offset + size) // EXTENT_BYTES)))
    return found


@contextmanager
def _credentials() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(CREDENTIALS)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
