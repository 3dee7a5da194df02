"""Durable commits of 96 screen tiles and of 16 KV tiles (16 MiB each), against other stores made durable.

Each round writes the same new tiles into a new, empty store by one call; making the store is not counted, being durable
is. The limit is what HIM's promises need at least, on one thread: compressing (screens), one digest a tile, one write,
one fdatasync; the kernel is told to begin writing after each tile (sync_file_range), so that the disk works meanwhile.
"""

import ctypes
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

import him
from bench.examples import screen_tiles
from bench.measure import OURS, THEIRS, Rows, Took, aim, compared, interleaved, missing, took
from bench.peers import PEERS, Layout, Peer, make, span
from bench.read_kv import noise

SCREEN_TILES, KV_TILES, KV_CHANNELS = 96, 16, 64
ROUNDS = 7
LIMIT = "digest + write + fdatasync"
SYNC_FILE_RANGE_WRITE = 2
AIMS = {("screen", "cpu"): (THEIRS, 2.0), ("kv_cache", "wall"): (OURS, 1.0)}
"""Goals against durable TensorStore."""

Array = NDArray[Any]


def run(*, tiny: bool = False) -> Rows:
    """Rows of processor and wall milliseconds of one commit."""
    rounds = 1 if tiny else ROUNDS
    screens = screen_tiles(4 if tiny else SCREEN_TILES, tiny=tiny)
    yield from _rows("screen", screens, Layout(len(screens) // 512, 3, "uint8", compressed=True), rounds)
    caches = noise(2 if tiny else KV_TILES, 4 if tiny else KV_CHANNELS)
    yield from _rows("kv_cache", caches, Layout(len(caches) // 512, caches.shape[2], "int8", compressed=False), rounds)


def _rows(stream: str, whole: Array, layout: Layout, rounds: int) -> Rows:
    errors: dict[str, str] = {}
    settings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides: dict[str, Callable[[int], Took]] = {
            "him": lambda number: _him(folder, stream, whole),
            LIMIT: lambda number: _limit(folder, whole, compressed=layout.compressed),
        }
        for peer in PEERS:
            tried = make(peer, folder / "tried", layout)
            if isinstance(tried, str):
                errors[peer] = tried
            else:
                settings[peer] = tried.settings
                tried.close()
                sides[peer] = lambda number, peer=peer: _peer(peer, folder, whole, layout, check=number == 0)
            shutil.rmtree(folder / "tried")
        found = interleaved(sides, rounds)
    for measure in ("cpu", "wall"):
        ms = {side: [getattr(one, measure) * 1000 for one in times] for side, times in found.items()}
        what = f"{layout.count} {stream} tiles, {measure}"
        yield compared("ingest", f"{what}, against {LIMIT}", ms["him"], ms[LIMIT], "ms")
        yield from _against_peers(what, ms, errors, settings, AIMS.get((stream, measure), (OURS, None)))


def _against_peers(
    what: str, ms: Mapping[str, list[float]], errors: Mapping[str, str], settings: Mapping[str, str],
    aimed: tuple[str, float | None],
) -> Rows:  # fmt: skip
    of = aimed[0]
    for peer in PEERS:
        metric, goal = f"{what}, against {peer}", aimed[1] if peer == "tensorstore" else None
        if peer in errors:
            yield missing("ingest", metric, "ms", errors[peer], goal=aim(of, goal))
        else:
            yield compared("ingest", metric, ms["him"], ms[peer], "ms", of=of, goal=goal, settings=settings[peer])


def _him(folder: Path, stream: str, whole: Array) -> Took:
    place, columns = folder / "memory.him", 12
    cells = {divmod(number, columns): whole[span(number)] for number in range(len(whole) // 512)}
    with him.open(place, create=True) as repo:
        snapshot = repo.writable("main")
        gc.collect()
        time = took(lambda: snapshot.put_many(stream, cells, frame="bench"))
        for (y, x), tile in list(cells.items())[::5]:
            if not np.array_equal(np.asarray(snapshot.get(stream, frame="bench", y=y, x=x)), tile):
                raise AssertionError(f"him gives other values for tile {y}, {x}")
    shutil.rmtree(place)
    return time


def _peer(name: str, folder: Path, whole: Array, layout: Layout, *, check: bool) -> Took:
    place = folder / "peer"
    store = make(name, place, layout)
    if isinstance(store, str):
        raise RuntimeError(f"{name} could be made before and cannot now: {store}")
    gc.collect()
    time = took(lambda: store.write(whole))
    _checked(name, store, whole, check=check)
    store.close()
    shutil.rmtree(place)
    return time


def _checked(name: str, store: Peer, whole: Array, *, check: bool) -> None:
    for number in range(0, len(whole) // 512, 5) if check else ():
        if not np.array_equal(store.read(number), whole[span(number)]):
            raise AssertionError(f"{name} gives other values for tile {number}")


def _limit(folder: Path, whole: Array, *, compressed: bool) -> Took:
    place = folder / "limit"
    packer = zstandard.ZstdCompressor(level=1)
    library = ctypes.CDLL(None)

    def start_writing(offset: int, size: int) -> None:
        if hasattr(library, "sync_file_range"):
            library.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)

    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def write() -> None:
        at = 0
        for number in range(len(whole) // 512):
            tile = np.ascontiguousarray(whole[span(number)]).reshape(-1).view(np.uint8)
            blake3(tile).digest()
            view = memoryview(packer.compress(tile.data) if compressed else tile.data)
            began = at
            while view:
                done = os.pwrite(descriptor, view, at)
                at, view = at + done, view[done:]
            start_writing(began, at - began)
        os.fdatasync(descriptor)

    time = took(write)
    os.close(descriptor)
    place.unlink()
    return time
