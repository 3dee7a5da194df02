"""Levels of a 16k×16k picture against OpenCV alone: their values, all of it stored, and after one tile changed."""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import cv2
import numpy as np
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

import him
from bench.measure import Rows, row
from him.config import LEVEL_THREADS, PAGE_SIDE, ZSTD_LEVEL
from him.pyramid import levels
from him.tile.downsample import halve
from him.types import StreamSpec

Array = NDArray[Any]
SIDE, TINY_SIDE = 16_384, 1_024
TILE: Final = 512
ROUNDS = {"uint8": 15, "float16": 5}
GOAL: Final = 1.3


def run(*, tiny: bool = False) -> Rows:
    """Rows for uint8 and float16."""
    for name, rounds in ROUNDS.items():
        whole = _picture(TINY_SIDE if tiny else SIDE, name)
        yield from _values(whole, 1 if tiny else rounds)
        yield from _stored(whole)


def _picture(side: int, name: str) -> Array:
    """Slopes under noise; the float one has values of every size, as activations have."""
    rng = np.random.default_rng(3)
    out = np.empty((side, side), dtype=name)
    for top in range(0, side, TILE):
        slope = np.add.outer(np.arange(top, top + TILE), np.arange(side)) // 16
        if name == "uint8":
            out[top : top + TILE] = (slope + rng.integers(0, 8, slope.shape)) & 255
        else:
            out[top : top + TILE] = rng.standard_normal(slope.shape, dtype=np.float32) * (1 + slope % 7)
    return out


# -- values


def _values(whole: Array, rounds: int) -> Rows:
    """All levels, the best of some rounds of each in turn: OpenCV's of the whole picture, and ours tile by tile."""
    # Both read from one large piece of memory: pages of 4 KiB alone would cost more than the work.
    # A tile is copied out before it is halved, since that is how a store hands it over: just written, in the cache.
    tiles = _tiled(whole)
    ours, theirs = list[float](), list[float]()
    for _ in range(rounds):
        theirs.append(_timed(lambda: _by_cv2(whole)))
        ours.append(_timed(lambda: _by_tiles(tiles)))
    name = f"{whole.dtype.name} {whole.shape[0]}²: values of all levels"
    ratio = min(ours) / min(theirs)
    yield row(
        "pyramid", name, round(min(ours) * 1e3, 1), "ms", against=f"{min(theirs) * 1e3:.1f} ms, cv2 alone",
        ratio=round(ratio, 3), goal=f"<= {GOAL}", holds=ratio <= GOAL, rounds=rounds,
    )  # fmt: skip
    if whole.dtype == np.uint8:
        found: dict[int, Array] = {}
        _by_tiles(tiles, found)
        differing = sum(int((found[len(level)] != level).sum()) for level in _by_cv2(whole))
        yield row("pyramid", f"{name}: samples that differ from cv2's", differing, "samples")


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _tiled(whole: Array) -> Array:
    """(rows, columns, 512, 512)."""
    side = len(whole) // TILE
    return np.ascontiguousarray(whole.reshape(side, TILE, side, TILE).transpose(0, 2, 1, 3))


def _by_cv2(whole: Array) -> list[Array]:
    """INTER_AREA down to one tile; float16 through float32, which OpenCV needs, by its own conversions."""
    found: list[Array] = []
    half = whole.dtype == np.float16
    values: Any = cv2.subtract(whole, 0.0, dtype=cv2.CV_32F) if half else whole  # type: ignore[call-overload]
    while max(values.shape) > TILE:
        values = cv2.resize(values, (values.shape[1] // 2, values.shape[0] // 2), interpolation=cv2.INTER_AREA)
        found.append(cv2.subtract(values, 0.0, dtype=cv2.CV_16F) if half else values)
    return found


def _by_tiles(tiles: Array, found: dict[int, Array] | None = None) -> Array:
    """The apex; every tile on the way is put together from four and let go, as when it is stored.

    Pages are shared between as many threads as sealing takes.

    Args:
        found: takes the levels as whole pictures, by their side.
    """
    side = len(tiles)
    block = min(PAGE_SIDE, side)
    places = [(y, x) for y in range(0, side, block) for x in range(0, side, block)]
    with ThreadPoolExecutor(LEVEL_THREADS) as pool:
        tops = list(pool.map(lambda at: _halved(tiles, *at, block, found), places))
    count = side // block
    return _halved(np.stack(tops).reshape(count, count, TILE, TILE), 0, 0, count, found, side)


def _halved(tiles: Array, top: int, left: int, side: int, found: dict[int, Array] | None, of: int = 0) -> Array:
    """The tile above `side`×`side` tiles, depth-first; `of` tells of how many cells a side `tiles` are the apexes."""
    if side == 1:
        return tiles[top, left] if of else np.array(tiles[top, left])
    out, half, quarter = np.empty((TILE, TILE), dtype=tiles.dtype), side // 2, TILE // 2
    for down in (0, 1):
        for right in (0, 1):
            child = _halved(tiles, top + down * half, left + right * half, half, found, of)
            part = out[down * quarter : (down + 1) * quarter, right * quarter : (right + 1) * quarter]
            halve(child, "mean", first=half == 1 and not of, out=part)
    if found is not None:
        # Sides of the level in tiles: of all cells, divided by those under one tile.
        wide = len(tiles) // side
        whole = found.setdefault(wide * TILE, np.empty((wide * TILE, wide * TILE), dtype=tiles.dtype))
        whole[top // side * TILE :, left // side * TILE :][:TILE, :TILE] = out
    return out


# -- stored


def _stored(whole: Array) -> Rows:
    """A sealed snapshot with all levels, and a child of it with one changed tile."""
    name, side = f"{whole.dtype.name} {whole.shape[0]}²", whole.shape[0] // TILE
    derived, count = levels.tile_of, [0]

    def counted(values: Array, hash_key: bytes | None, *, compress: bool) -> Any:
        count[0] += 1
        return derived(values, hash_key, compress=compress)

    with tempfile.TemporaryDirectory() as folder, him.open(f"{folder}/memory.him", create=True) as repo:
        repo.declare_stream(StreamSpec("plane", dtype=whole.dtype.name, level_rule="mean"))
        levels.tile_of = counted
        try:
            repo.writable("main").put_array("plane", whole, frame="f")
            full = _timed(repo.snapshot("main").seal)
            tiles, count[0] = count[0], 0
            repo.writable("main").put("plane", np.full((TILE, TILE), 255, dtype=whole.dtype), frame="f", y=1, x=1)
            pages = repo.stored_pages()
            one = _timed(repo.snapshot("main").seal)
        finally:
            levels.tile_of = derived
        pages = repo.stored_pages() - pages
    alone = _timed(lambda: _kept_by_cv2(whole))
    yield row("pyramid", f"{name}: tiles derived in all", tiles, "tiles")
    yield row(
        "pyramid", f"{name}: derived, named, stored; level 0 read and verified", round(full, 2), "s",
        against=f"{alone:.2f} s, cv2 + BLAKE3 + zstd of the levels", ratio=round(full / alone, 2),
    )  # fmt: skip
    depth = side.bit_length() - 1
    # The companions of the pages on the way hold three levels each, whatever of them lies above the frame's apex.
    limit = 3 * -(-depth // 3)
    yield row(
        "pyramid", f"{name}: tiles derived after one changed", count[0], "tiles", against=f"{depth} levels",
        goal=f"<= {limit}", holds=0 < count[0] <= limit,
    )  # fmt: skip
    yield row("pyramid", f"{name}: companions written after one tile changed", pages, "pages")
    yield row(
        "pyramid", f"{name}: sealed again after one tile changed", round(one * 1e3, 1), "ms",
        against="the full build", ratio=round(one / full, 4),
    )  # fmt: skip


def _kept_by_cv2(whole: Array) -> int:
    """Levels by OpenCV; each tile of them digested and compressed."""
    packer, size = zstandard.ZstdCompressor(level=ZSTD_LEVEL), 0
    for level in _by_cv2(whole):
        for tile in _tiled(level).reshape(-1, TILE, TILE):
            data = tile.tobytes()
            blake3(data).digest()
            size += len(packer.compress(data))
    return size
