"""One derived tile: which four tiles lie below it, how they become its values, and what it is called.

A page's cells carry three levels of tiles, 4×4, 2×2 and 1×1; they have the indices 0, 1 and 2 here, and the cells
themselves -1 (design §2).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Final

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import LEVEL_PIXELS_DIVISOR, LEVELS_PER_PAGE, PAGE_SIDE
from him.pyramid import page
from him.pyramid.page import Page
from him.tile import codec
from him.tile.address import KIND_TILE, reference
from him.tile.codec import EncodedTile, TileHeader
from him.tile.downsample import halve, tail_at
from him.types import Entry, Frame, Ref

Array = NDArray[np.generic]
CELLS: Final = -1
APEX: Final = LEVELS_PER_PAGE - 1
Place = tuple[int, int]
"""(row, column) within one index of a page."""


def extent_at(length: int, level: int) -> int:
    """Pixels of `length` at a level: ⌈length / 2^level⌉."""
    return -(-length >> level)


class Grid:
    """A page as part of its frame: which tiles stand above it, and how large each is.

    Args:
        clip: (height, width) in level-0 pixels of the frame's part that the page covers.
        target: (index, row, column) of the derived tile that is asked for: the apex, or one below it.
    """

    def __init__(
        self, frame: Frame, content: Page, clip: tuple[int, int], target: tuple[int, int, int] = (APEX, 0, 0)
    ) -> None:
        self.frame, self.height, self.clip, self.target = frame, content.height, clip, target
        self.slots = dict(content.slots())
        self.page = content
        self.stored_from = self._stored_from()
        """Index of the finest level that is stored."""
        self.found: tuple[dict[int, Entry], ...] = tuple({} for _ in range(LEVELS_PER_PAGE))
        """What was derived, by index and slot."""
        self.ahead: Ahead | None = None

    def level(self, index: int) -> int:
        """The frame's level that stands at `index` of this page."""
        return LEVELS_PER_PAGE * self.height + 1 + index

    def extent(self, index: int, row: int, column: int) -> tuple[int, int]:
        """Pixels (height, width) of a tile; 0 outside the frame."""
        frame, level = self.frame, self.level(index)
        high = extent_at(self.clip[0], level) - row * frame.tile_height
        wide = extent_at(self.clip[1], level) - column * frame.tile_width
        return max(0, min(frame.tile_height, high)), max(0, min(frame.tile_width, wide))

    @property
    def tile_bytes(self) -> int:
        """What a tile above the cells takes in memory."""
        tail = tail_at(self.frame.level_rule, (max(1, self.frame.channels),), first=True)
        return self.frame.tile_height * self.frame.tile_width * tail[0] * codec.DTYPES[self.frame.dtype].itemsize

    def places(self, index: int) -> set[tuple[int, int]]:
        """(row, column) of the tiles at `index` with a cell below."""
        return {(slot // PAGE_SIDE >> index + 1, slot % PAGE_SIDE >> index + 1) for slot in self.slots}

    def child_clip(self, slot: int) -> tuple[int, int]:
        """The part of the frame that the child page at a slot covers."""
        cells = page.side(self.height - 1)
        high, wide = cells * self.frame.tile_height, cells * self.frame.tile_width
        row, column = divmod(slot, PAGE_SIDE)
        return min(high, self.clip[0] - row * high), min(wide, self.clip[1] - column * wide)

    def _stored_from(self) -> int:
        """From the apex down, the levels whose pixels fit the allowance.

        A third of the pixels of the present cells, which is what a dense page needs, and one tile, so that the apex
        always fits.
        """

        def pixels(index: int) -> int:
            return sum(high * wide for high, wide in (self.extent(index, *place) for place in self.places(index)))

        left = pixels(CELLS) + LEVEL_PIXELS_DIVISOR * self.frame.tile_height * self.frame.tile_width
        for index in range(APEX, -1, -1):
            left -= LEVEL_PIXELS_DIVISOR * pixels(index)
            if left < 0:
                return index + 1
        return 0


class Quad:
    """A tile being put together from the up to four tiles below it; absent ones count as zeros."""

    def __init__(self, grid: Grid, index: int, row: int, column: int) -> None:
        self._frame, self._first = grid.frame, grid.level(index) == 1
        self.places = [(2 * row + down, 2 * column + right) for down in (0, 1) for right in (0, 1)]
        self._extents = [grid.extent(index - 1, *place) for place in self.places]
        self._shape = grid.extent(index, row, column)
        self._values: Array | None = None

    def key(self, children: Sequence[Ref | None]) -> bytes:
        """Digest of all that the tile's values depend on."""
        sizes = (*self._extents[0], *self._extents[3])
        head = f"{self._frame.level_rule}|{self._first}|{sizes}|".encode()
        return blake3(head + b"".join(child or bytes(32) for child in children)).digest()

    def add(self, place: int, values: Array) -> None:
        """Put a child's part in; a cell stored smaller than its extent is filled up with zeros."""
        high, wide = self._extents[place]
        if values.shape[:2] != (high, wide):
            part, values = values[:high, :wide], np.zeros((high, wide, *values.shape[2:]), dtype=values.dtype)
            values[: part.shape[0], : part.shape[1]] = part
        if self._values is None:
            tail = tail_at(self._frame.level_rule, values.shape[2:], first=self._first)
            self._values = np.zeros((*self._shape, *tail), dtype=values.dtype)
        down, right = place // 2 * (self._frame.tile_height // 2), place % 2 * (self._frame.tile_width // 2)
        part = self._values[down : down + -(-high // 2), right : right + -(-wide // 2)]
        halve(values, self._frame.level_rule, first=self._first, out=part)

    @property
    def values(self) -> Array:
        """What was put together."""
        assert self._values is not None, "a derived tile has a tile below it"
        return self._values


Work = Callable[[], tuple[EncodedTile, Array]]


class Ahead:
    """Work on several threads, begun before its results are taken, which happens in its order.

    Args:
        most: how many results may be begun and not taken.
    """

    def __init__(self, pool: Executor, work: dict[bytes, Work], most: int) -> None:
        self._pool, self._work, self._most = pool, work, most
        self._begun: dict[bytes, Future[tuple[EncodedTile, Array]]] = {}

    def take(self, key: bytes) -> tuple[EncodedTile, Array] | None:
        """The result; None when it was not foreseen or was taken already."""
        while key in self._work and key not in self._begun:
            # What comes before it in the order is wanted no more.
            self._begin()
            while len(self._begun) > self._most:
                self._begun.pop(next(iter(self._begun))).cancel()
        begun = self._begun.pop(key, None)
        while self._work and len(self._begun) < self._most:
            self._begin()
        return None if begun is None else begun.result()

    def stop(self) -> None:
        """Drop what nobody took."""
        for begun in self._begun.values():
            begun.cancel()

    def _begin(self) -> None:
        key = next(iter(self._work))
        self._begun[key] = self._pool.submit(self._work.pop(key))


def morton(place: tuple[int, int]) -> int:
    """Rank of a place in the order in which quads of quads are walked."""
    return sum(
        (place[0] >> bit & 1) << 2 * bit + 1 | (place[1] >> bit & 1) << 2 * bit for bit in range(LEVELS_PER_PAGE)
    )


def tile_of(values: Array, hash_key: bytes | None, *, compress: bool) -> EncodedTile:
    """A derived tile; one that is only named or handed on is not compressed."""
    if compress:
        return codec.encode_array(values, hash_key=hash_key)
    name = codec.dtype_name(values.dtype)
    header = msgspec.msgpack.encode(TileHeader(name, values.shape))
    payload = np.ascontiguousarray(values, dtype=codec.DTYPES[name]).tobytes()
    return EncodedTile(reference(KIND_TILE, header, payload, hash_key), header, codec.RAW, payload, payload)
