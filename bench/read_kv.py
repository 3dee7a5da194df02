"""Verified reads of 512×512×64 int8 KV tiles (16 MiB, stored raw), page cache warm: owned, viewed, eight at once.

Against pread + BLAKE3 and against stores that verify nothing. The values are synthetic int8 noise, spread like a real
quantised cache (bench/codecs.py measures that one): only their bytes matter here.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

import him
from bench.measure import OURS, Rows, Took, aim, compared, interleaved, missing, took
from bench.peers import PEERS, Layout, Peer, make, span

CHANNELS, TILES, TOGETHER, THREADS = 64, 8, 8, 2
ROUNDS, ROUNDS_TOGETHER = 40, 15
LIMIT = "pread + BLAKE3"
STREAM, FRAME = "kv_cache", "bench"

Array = NDArray[Any]


def noise(tiles: int, channels: int) -> Array:
    """(tiles · 512, 512, channels) int8: normal values with a deviation of 32, no two tiles alike."""
    base = np.random.default_rng(1).standard_normal((512, 512, channels), dtype=np.float32) * 32
    one = np.clip(np.rint(base), -127, 127).astype(np.int8)
    return np.concatenate([np.roll(one.reshape(-1), 4_099 * number).reshape(one.shape) for number in range(tiles)])


def run(*, tiny: bool = False) -> Rows:
    """Rows of milliseconds a tile, owned and viewed, and of eight tiles on two threads."""
    channels, tiles, rounds, rounds_together = (4, 2, 3, 2) if tiny else (CHANNELS, TILES, ROUNDS, ROUNDS_TOGETHER)
    whole = noise(tiles, channels)
    layout = Layout(tiles, channels, "int8", compressed=False)
    with tempfile.TemporaryDirectory() as name, him.open(Path(name) / "memory.him", create=True) as repo:
        folder = Path(name)
        made = {peer: make(peer, folder / f"peer-{number}", layout) for number, peer in enumerate(PEERS)}
        peers = {peer: store for peer, store in made.items() if not isinstance(store, str)}
        for peer, store in peers.items():
            store.write(whole)
            _check(peer, [store.read(number) for number in range(tiles)], whole)
        snapshot = _stored(repo, whole)
        limit = Limit(folder / "limit", whole)
        order = np.random.default_rng(2).integers(0, tiles, rounds).tolist()
        singles = {side: _on(read, order) for side, read in _single(snapshot, limit, peers, whole).items()}
        ms = _ms(interleaved(singles, rounds))
        together = _together(snapshot, limit, peers, whole, min(TOGETHER, tiles))
        ms_together = _ms(interleaved({side: _plain(read) for side, read in together.items()}, rounds_together))
        for store in peers.values():
            store.close()
        limit.close()
    yield from _rows(ms, made)
    yield from _rows_together(ms_together, made)


def _rows(ms: dict[str, list[float]], made: Mapping[str, Peer | str]) -> Rows:
    yield compared("read_kv", f"owned against {LIMIT}", ms["owned"], ms[LIMIT], "ms", goal=1.3)
    yield compared("read_kv", f"view against {LIMIT}", ms["view"], ms[LIMIT], "ms")
    goals = {"owned": 1.5, "view": 1.0}
    for peer, store in made.items():
        for side in ("owned", "view"):
            metric = f"{side} against {peer}, which verifies nothing"
            goal = goals[side] if peer == "tensorstore" else None
            if isinstance(store, str):
                yield missing("read_kv", metric, "ms", store, goal=aim(OURS, goal))
            else:
                yield compared("read_kv", metric, ms[side], ms[peer], "ms", goal=goal, settings=store.settings)


def _rows_together(ms: dict[str, list[float]], made: Mapping[str, Peer | str]) -> Rows:
    metric = f"{TOGETHER} tiles on {THREADS} threads against"
    if "him" not in ms:
        why = "SnapshotHandle has no get_many yet"
        yield missing("read_kv", f"{metric} {LIMIT}", "ms", why, goal=aim(OURS, 1.3))
        return
    yield compared("read_kv", f"{metric} {LIMIT}", ms["him"], ms[LIMIT], "ms", goal=1.3)
    if isinstance(made["tensorstore"], str):
        yield missing("read_kv", f"{metric} tensorstore", "ms", made["tensorstore"])
    else:
        yield compared("read_kv", f"{metric} tensorstore", ms["him"], ms["tensorstore"], "ms")


def _stored(repo: him.Repository, whole: Array) -> him.SnapshotHandle:
    cells = {(number, 0): whole[span(number)] for number in range(len(whole) // 512)}
    repo.writable("main").put_many(STREAM, cells, frame=FRAME)
    return repo.snapshot("main")


def _single(
    snapshot: him.SnapshotHandle, limit: "Limit", peers: Mapping[str, Peer], whole: Array
) -> dict[str, Callable[[int], object]]:
    """One tile by each side; checked once before anything is timed."""

    def owned(number: int) -> Array:
        return np.asarray(snapshot.get(STREAM, frame=FRAME, y=number, x=0))

    def view(number: int) -> None:
        with snapshot.view(STREAM, frame=FRAME, y=number, x=0):
            pass

    numbers = range(len(whole) // 512)
    _check("him", [owned(number) for number in numbers], whole)
    for number in numbers:
        with snapshot.view(STREAM, frame=FRAME, y=number, x=0) as seen:
            _check("him's view", [np.asarray(seen)], whole[span(number)])
        limit.read(number)
    return {"owned": owned, "view": view, LIMIT: limit.read, **{peer: store.read for peer, store in peers.items()}}


def _together(
    snapshot: him.SnapshotHandle, limit: "Limit", peers: Mapping[str, Peer], whole: Array, count: int
) -> dict[str, Callable[[], object]]:
    """`count` tiles in one call."""
    sides: dict[str, Callable[[], object]] = {LIMIT: lambda: limit.read_first(count)}
    get_many: Any = getattr(snapshot, "get_many", None)
    cells = [(number, 0) for number in range(count)]
    if get_many is not None:
        found = get_many(STREAM, cells, frame=FRAME)
        ordered = [found[cell] for cell in cells] if isinstance(found, Mapping) else list(found)
        _check("him's get_many", ordered, whole[: count * 512])
        del found, ordered
        sides["him"] = lambda: get_many(STREAM, cells, frame=FRAME)
    if "tensorstore" in peers:
        read_first: Any = peers["tensorstore"].read_first  # pyright: ignore[reportAttributeAccessIssue]
        sides["tensorstore"] = lambda: read_first(count)
    return sides


class Limit:
    """What must be done at least to return verified bytes: read them into a buffer that is there, and digest them."""

    def __init__(self, path: Path, whole: Array) -> None:
        path.write_bytes(whole.data)
        self._size = whole.nbytes // (len(whole) // 512)
        self._digests = [blake3(whole[span(number)].reshape(-1)).digest() for number in range(len(whole) // 512)]
        self._descriptor = os.open(path, os.O_RDONLY)
        self._buffers = [np.zeros(self._size, dtype=np.uint8) for _ in range(THREADS)]
        self._threads = ThreadPoolExecutor(THREADS)

    def read(self, number: int, buffer: int = 0) -> None:
        """One tile into a buffer; raises when its digest is another."""
        into = self._buffers[buffer]
        os.preadv(self._descriptor, [into], number * self._size)
        if blake3(into).digest() != self._digests[number]:
            raise AssertionError("the limit read other bytes")

    def read_first(self, count: int) -> None:
        """The first tiles, divided among the threads."""

        def part(thread: int) -> None:
            for number in range(thread, count, THREADS):
                self.read(number, thread)

        list(self._threads.map(part, range(THREADS)))

    def close(self) -> None:
        """Release the file and the threads."""
        self._threads.shutdown()
        os.close(self._descriptor)


def _check(side: str, found: list[Array], whole: Array) -> None:
    for number, tile in enumerate(found):
        if not np.array_equal(tile, whole[span(number)]):
            raise AssertionError(f"{side} gives other values for tile {number}")


def _on(read: Callable[[int], object], order: list[int]) -> Callable[[int], Took]:
    return lambda number: took(lambda: read(order[number]))


def _plain(read: Callable[[], object]) -> Callable[[int], Took]:
    return lambda number: took(read)


def _ms(found: dict[str, list[Took]]) -> dict[str, list[float]]:
    return {side: [one.wall * 1000 for one in times] for side, times in found.items()}
