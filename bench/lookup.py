"""Key → address in a frame of ten million tiles, against LMDB; branching, and updates scattered over it.

The frame's pages are real and go through the real commit; its tiles are names without content, and the address
rows that lead to them are handed to the index directly: nothing here reads a payload.
"""

import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

import him
from bench.measure import Row, Rows, row
from him.app import Repository
from him.catalog.changes import FrameChange
from him.catalog.reader import SnapshotReader
from him.pack.format import ROW
from him.pyramid import update
from him.pyramid.update import Cells
from him.tier.address import Location
from him.tile.address import KIND_PAGE
from him.types import Entry, Frame, StreamSpec, TileKey

STREAM = StreamSpec("tiles", tile_height=16, tile_width=16, dtype="uint8")
KEYS = 1_000
REPEATS = 7
_BAND = 64
_CELL = struct.Struct(">QQ")
_K = TypeVar("_K")


def run(*, tiny: bool = False) -> Rows:
    """Rows for each size, then the comparison between them."""
    sides = (40, 100) if tiny else (100, 1_000, 3_163)
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            place = Path(folder) / str(side)
            place.mkdir()
            blobs = _build(place / "him", side)
            yield from _looked_up(place, side, blobs, largest=side == sides[-1])
            with him.open(place / "him") as repo:
                yield from _updated(repo, side, largest=side == sides[-1])
        yield _branched(Path(folder), sides[0], sides[-1])
    yield from _frames(100 if tiny else 1_000, 1_000 if tiny else 100_000)


def _branched(folder: Path, small: int, large: int) -> Row:
    """Durable branches in turn, in the smallest and the largest."""
    best = {small: 1.0, large: 1.0}
    with him.open(folder / f"{small}/him") as one, him.open(folder / f"{large}/him") as other:
        for number in range(40):
            for side, repo in ((small, one), (large, other)):
                took = _best(lambda _, repo=repo, number=number: repo.branch(f"b{number}", source="main"), 1)
                best[side] = min(best[side], took)
    return row(
        "lookup", f"branch at {large * large:,} tiles", round(best[large] * 1e3, 3), "ms",
        against=f"at {small * small:,} tiles: {best[small] * 1e3:.3f} ms", ratio=best[large] / best[small],
        goal="<= 1.25", holds=best[large] <= 1.25 * best[small],
    )  # fmt: skip


# -- what is looked up in


def _build(place: Path, side: int) -> NDArray[np.uint8]:
    """A repository with one frame of side × side tiles; the tiles' names (side², 32)."""
    rng = np.random.default_rng(side)
    with him.open(place, create=True) as repo:
        repo.declare_stream(STREAM)
        blobs = rng.integers(0, 256, (side * side, 32), dtype=np.uint8)
        handle, extent = repo.writable("main"), 16 * side
        shape = Frame("tiles", "f", "array", extent, extent, 0, "uint8", 16, 16, 0, "none", b"", 0)
        for top in range(0, side, _BAND):
            high = min(_BAND, side - top)
            rows, columns = (grid.ravel() + at for grid, at in zip(np.indices((high, side)), (top, 0), strict=True))
            raw = np.zeros((high * side, 48), dtype=np.uint8)
            raw[:, :32] = blobs[top * side : (top + high) * side]
            cells = Cells(rows, columns, raw, np.ones(len(raw), dtype=np.bool_))
            repo._history.commit(handle.id, [FrameChange(shape, cells)], begun=repo._history.begin())
        repo._store.has(him.types.BlobId(bytes(32)))
        repo._store._addresses.flush(above=0)
        # A record without blobs, so that the rows have a place in the log of their own.
        handle.set_tag("rows", "synthetic")
        table = np.zeros(len(blobs), dtype=ROW)
        table["blob"], table["length"], table["kind"] = blobs, 320, 1
        table["offset"] = 128 + 320 * np.arange(len(blobs))
        repo._store._addresses.add(0, table)
        repo._store._addresses.reached(repo._log.head()[0], keep=True, above=0)
    return blobs


@contextmanager
def _lmdb(place: Path, side: int, blobs: NDArray[np.uint8] | None = None) -> Iterator[Callable[[bytes], bytes]]:
    """A look-up in LMDB; the table is filled when the names are given."""
    import lmdb

    with lmdb.open(str(place), map_size=8 << 30, subdir=False, lock=False, max_dbs=0) as env:
        if blobs is not None:
            names = blobs.tobytes()
            with env.begin(write=True) as filling, filling.cursor() as cursor:
                items = (
                    (_lmdb_key(n // side, n % side), names[32 * n : 32 * n + 32] + bytes(36))
                    for n in range(side * side)
                )
                cursor.putmulti(items, append=True)
        with env.begin() as reading:
            yield reading.get


# -- measuring


def _looked_up(place: Path, side: int, blobs: NDArray[np.uint8], *, largest: bool) -> Iterator[Row]:
    places = np.random.default_rng(7).integers(0, side, (KEYS, 2)).tolist()
    own_keys = [TileKey("tiles", "f", 0, y, x) for y, x in places]
    lmdb_keys = [_lmdb_key(y, x) for y, x in places]
    names = [blobs[y * side + x].tobytes() for y, x in places]
    size = f"{side * side:,} tiles"
    try:
        with _lmdb(place / "lmdb", side, blobs):
            pass
    except ImportError as error:
        yield row("lookup", f"at {size}", 0, "µs", against=f"lmdb is missing: {error} (pip install lmdb)")
        return
    first, hot = [1.0, 1.0], [1.0, 1.0]
    for _ in range(REPEATS):
        with him.open(place / "him") as repo, _lmdb(place / "lmdb", side) as get:
            ours = _resolver(repo)
            times = [_each(ours, own_keys), _each(get, lmdb_keys)]
            first = [min(a, b) for a, b in zip(first, times, strict=True)]
            assert [(ours(key)[1].offset - 128) // 320 for key in own_keys] == [y * side + x for y, x in places]
            assert [get(key)[:32] for key in lmdb_keys] == names
            for _ in range(5):
                times = [_each(ours, own_keys), _each(get, lmdb_keys)]
                hot = [min(a, b) for a, b in zip(hot, times, strict=True)]
    for name, (mine, theirs), limit in (("hot", hot, 4), ("first touch", first, 25)):
        yield row(
            "lookup", f"key → address at {size}, {name}", round(mine * 1e6, 2), "µs",
            against=f"LMDB get {theirs * 1e6:.2f} µs", ratio=mine / theirs,
            goal=f"<= {limit}" if largest else "", holds=mine <= limit * theirs if largest else None,
        )  # fmt: skip


def _lmdb_key(y: int, x: int) -> bytes:
    return b"tiles:f" + _CELL.pack(y, x)


def _resolver(repo: Repository) -> Callable[[TileKey], tuple[str, Location]]:
    """Pack and place of a cell's content: its entry by the pages, then its address."""
    found = repo.snapshot("main").info
    reader = SnapshotReader(repo._store, repo._memo, found.directory)
    reader.frame("tiles", "f")
    repo._store.has(him.types.BlobId(bytes(32)))
    place, entry = repo._store._place, reader.entry
    return lambda key: place(entry(key).ref)


def _updated(repo: Repository, side: int, *, largest: bool) -> Iterator[Row]:
    """CPU of 1,000 scattered changes against writing as many pages of the same sizes."""
    frame = SnapshotReader(repo._store, repo._memo, repo.snapshot("main").info.directory).frame("tiles", "f")
    rng, store = np.random.default_rng(11), repo._store
    places = rng.integers(0, side, (KEYS, 2)).tolist()
    took: list[float] = []
    writing, pages = 1.0, 0
    for _ in range(REPEATS):
        changes = {(y, x): Entry(him.types.BlobId(rng.bytes(32)), bytes(16)) for y, x in places}
        before, size = store.written_pages, store.written_bytes
        began = time.process_time()
        update.update(store, frame.root, frame.root_height, changes)
        took.append(time.process_time() - began)
        pages = store.written_pages - before
        payloads = [rng.bytes((store.written_bytes - size) // pages - 256) for _ in range(pages)]
        began = time.process_time()
        store.put_pages(KIND_PAGE, payloads)
        writing = min(writing, time.process_time() - began)
    for name, value, goal in (("pages known", min(took[1:]), largest), ("pages read first", took[0], False)):
        yield row(
            "lookup", f"{KEYS:,} scattered updates at {side * side:,} tiles, {name}", round(value * 1e3, 2), "CPU-ms",
            against=f"writing {pages} such pages {writing * 1e3:.2f} CPU-ms", ratio=value / writing,
            goal="<= 2" if goal else "", holds=value <= 2 * writing if goal else None,
        )  # fmt: skip
    repo._store.abandon()
    handle = repo.writable("main")
    tile = np.arange(256, dtype=np.uint8).reshape(16, 16)
    durable = _best(lambda number: handle.put("tiles", tile + np.uint8(number), frame="f", y=side // 2, x=number), 20)
    yield row("lookup", f"durable commit of one tile at {side * side:,} tiles", round(durable * 1e3, 3), "ms")


def _frames(*counts: int) -> Iterator[Row]:
    """A snapshot of many frames: what a commit, a look-up and a listing cost in it."""
    commits: list[float] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder, him.open(Path(folder) / "him", create=True) as repo:
            repo.declare_stream(STREAM)
            handle, tile = repo.writable("main"), np.arange(256, dtype=np.uint8).reshape(16, 16)
            handle.put("tiles", tile, frame="first")
            (model,) = handle.frames("tiles")
            blob = him.types.BlobId(bytes.fromhex(next(handle.tiles("tiles", frame="first")).checksum))
            for first in range(0, count, 10_000):
                names = (f"frame {number:06d}" for number in range(first, min(count, first + 10_000)))
                changes = [FrameChange(msgspec.structs.replace(model, name=name), {(0, 0): blob}) for name in names]
                repo._history.commit(handle.id, changes, begun=repo._history.begin())
            handle = repo.writable("main")
            commits.append(_best(lambda n, h=handle, t=tile: h.put("tiles", t + np.uint8(n + 1), frame="one"), 20))
            began = time.perf_counter()
            found = handle.frames("tiles")
            yield row("lookup", f"listing {len(found):,} frames", round((time.perf_counter() - began) * 1e3, 1), "ms")
    yield row(
        "lookup", f"durable commit of one tile at {counts[-1]:,} frames", round(commits[-1] * 1e3, 3), "ms",
        against=f"at {counts[0]:,} frames: {commits[0] * 1e3:.3f} ms", ratio=commits[-1] / commits[0],
    )  # fmt: skip


def _each(work: Callable[[_K], object], keys: Sequence[_K]) -> float:
    began = time.perf_counter()
    for key in keys:
        work(key)
    return (time.perf_counter() - began) / len(keys)


def _best(work: Callable[[int], object], times: int) -> float:
    best = float("inf")
    for number in range(times):
        began = time.perf_counter()
        work(number)
        best = min(best, time.perf_counter() - began)
    return best
