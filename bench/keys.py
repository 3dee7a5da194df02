"""What encryption costs: the same calls on an encrypted stream and on a plain one, in turn, page cache warm."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import him
from bench.examples import screen_tiles
from bench.measure import Rows, Took, compared, interleaved, took
from bench.peers import span
from him.types import StreamSpec

Array = NDArray[Any]
TILE = 512
SIDES = ("encrypted", "plain")


def run(*, tiny: bool = False) -> Rows:
    """Rows for screens, which are compressed, and for noise, which is stored as it is: a tile read, a frame put."""
    tiles, rounds = (4, 3) if tiny else (96, 20)
    noise = np.random.default_rng(2).integers(0, 256, (tiles * TILE, TILE, 3), dtype=np.uint8)
    for what, whole in (("screens", screen_tiles(tiles, tiny=tiny)), ("noise", noise)):
        cells = {(number, 0): whole[span(number)] for number in range(tiles)}
        with _repository() as repo:
            put = interleaved({side: partial(_put, repo, side, cells) for side in SIDES}, rounds)
            read = interleaved({side: partial(_read, repo, side, tiles) for side in SIDES}, rounds)
        for call, found in (("read a tile of", read), ("put a tile of", put)):
            ms = {side: [one.wall * 1000 / tiles for one in times] for side, times in found.items()}
            yield compared("keys", f"{call} {what}, encrypted against plain", ms["encrypted"], ms["plain"], "ms")


@contextmanager
def _repository() -> Iterator[him.Repository]:
    with tempfile.TemporaryDirectory() as name:
        path, ring = Path(name) / "memory.him", Path(name) / "keys.ring"
        him.open(path, create=True).close()
        with him.open(path, keys=him.create_ring(path, "bench", ring)) as repo:
            for side in SIDES:
                shape = StreamSpec(side, tile_height=TILE, tile_width=TILE, encrypted=side == "encrypted")
                repo.declare_stream(shape)
            yield repo


def _put(repo: him.Repository, side: str, cells: dict[tuple[int, int], Array], number: int) -> Took:
    # Of other content in each round, or nothing would be stored.
    fresh = {cell: values ^ np.uint8(number + 1) for cell, values in cells.items()}
    work = repo.writable(side)
    return took(lambda: work.put_many(side, fresh, frame=f"round {number}"))


def _read(repo: him.Repository, side: str, tiles: int, _number: int) -> Took:
    snapshot = repo.snapshot(side)

    def every() -> None:
        for number in range(tiles):
            snapshot.get(side, frame="round 0", y=number)

    return took(every)
