"""Verified reads of single 512×512×3 screen tiles, page cache warm, against pread + zstd and against other stores.

HIM's read looks the tile up in its snapshot, reads it, verifies it and decodes it; the limit reads at a known offset
and decompresses; no other store verifies anything.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

import him
from bench.examples import screen_tiles
from bench.measure import THEIRS, Rows, Took, aim, compared, interleaved, missing, took
from bench.peers import PEERS, Layout, Peer, make, span

TILES, COLUMNS = 96, 12
READS, ROUNDS = 48, 30
FASTER_THAN = {"zarr + zarrs": 2.0, "tensorstore": 3.0, "icechunk": 5.0}
LIMIT = "pread + zstd"

Array = NDArray[Any]
Read = Callable[[int], Array]


def run(*, tiny: bool = False) -> Rows:
    """A row against the limit and one against each peer: milliseconds a tile."""
    tiles, reads, rounds = (4, 4, 3) if tiny else (TILES, READS, ROUNDS)
    whole = screen_tiles(tiles, tiny=tiny)
    layout = Layout(tiles, 3, "uint8", compressed=True)
    with tempfile.TemporaryDirectory() as name, him.open(Path(name) / "memory.him", create=True) as repo:
        folder = Path(name)
        made = {peer: make(peer, folder / f"peer-{number}", layout) for number, peer in enumerate(PEERS)}
        peers = {peer: store for peer, store in made.items() if not isinstance(store, str)}
        sides: dict[str, Read] = {"him": _him(repo, whole), LIMIT: _limit(folder / "limit", whole)}
        for peer, store in peers.items():
            store.write(whole)
            sides[peer] = store.read
        _same(sides, whole, tiles)
        order = np.random.default_rng(1).integers(0, tiles, (rounds, reads))
        found = interleaved({side: _timed(read, order) for side, read in sides.items()}, rounds)
        for store in peers.values():
            store.close()
    ms = {side: [one.wall * 1000 / reads for one in times] for side, times in found.items()}
    yield compared("read_screen", f"a tile against {LIMIT}", ms["him"], ms[LIMIT], "ms", goal=1.5)
    yield from _rows(ms, made)


def _rows(ms: dict[str, list[float]], made: dict[str, Peer | str]) -> Rows:
    for peer, store in made.items():
        metric, goal = f"a tile against {peer}", FASTER_THAN.get(peer)
        if isinstance(store, str):
            yield missing("read_screen", metric, "ms", store, goal=aim(THEIRS, goal))
        else:
            yield compared(
                "read_screen", metric, ms["him"], ms[peer], "ms", of=THEIRS, goal=goal, settings=store.settings
            )


def _timed(read: Read, order: NDArray[np.int64]) -> Callable[[int], Took]:
    def round_of(number: int) -> Took:
        def all_reads() -> None:
            for tile in order[number].tolist():
                read(tile)

        return took(all_reads)

    return round_of


def _same(sides: dict[str, Read], whole: Array, tiles: int) -> None:
    """Every side gives every tile back (and has read it once: the page cache is warm)."""
    for side, read in sides.items():
        for number in range(tiles):
            if not np.array_equal(read(number), whole[span(number)]):
                raise AssertionError(f"{side} gives other values for tile {number}")


def _him(repo: him.Repository, whole: Array) -> Read:
    cells = {divmod(number, COLUMNS): whole[span(number)] for number in range(len(whole) // 512)}
    repo.writable("main").put_many("screen", cells, frame="bench")
    snapshot = repo.snapshot("main")

    def read(number: int) -> Array:
        y, x = divmod(number, COLUMNS)
        return np.asarray(snapshot.get("screen", frame="bench", y=y, x=x))

    return read


def _limit(path: Path, whole: Array) -> Read:
    """What must be done at least: one positional read of compressed bytes, and decompressing them."""
    packer, unpacker = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    parts = [packer.compress(np.ascontiguousarray(whole[span(n)]).data) for n in range(len(whole) // 512)]
    path.write_bytes(b"".join(parts))
    ends = np.cumsum([len(part) for part in parts]).tolist()
    places = [(end - len(part), len(part)) for end, part in zip(ends, parts, strict=True)]
    descriptor = os.open(path, os.O_RDONLY)

    def read(number: int) -> Array:
        offset, size = places[number]
        return np.frombuffer(unpacker.decompress(os.pread(descriptor, size, offset)), np.uint8).reshape(512, 512, 3)

    return read
