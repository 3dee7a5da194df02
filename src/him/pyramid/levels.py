"""Levels above 0: companions of pages, a pure function of (page, level rule, clipped extent).

A companion holds the 4×4, 2×2 and 1×1 tiles above its page's 8×8 cells; an inner page's cells are the apex tiles
of the pages below. So a page that no branch changed never computes its levels again, and diff, merge and the
directory's hash never look here (design §2).
"""

from collections.abc import Callable
from typing import Final, Protocol, TypeVar

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import LEVELS_PER_PAGE, PAGE_SIDE
from him.errors import IntegrityError, NotFoundError, UsageError
from him.ports import Memo
from him.pyramid import directory, page
from him.pyramid.page import PageStore, load
from him.pyramid.update import scan
from him.tile import codec
from him.tile.address import KIND_COMPANION
from him.tile.codec import EncodedTile
from him.tile.downsample import halve
from him.types import BlobId, Box, Frame

Array = NDArray[np.generic]
T = TypeVar("T")
_MEMO: Final = "levels"


class LevelStore(PageStore, Protocol):
    """A PageStore that keeps tiles too."""

    def has(self, blob: BlobId) -> bool:
        """Whether the blob is stored."""
        ...

    def read_tile(self, blob: BlobId) -> Array | bytes:
        """Verified values."""
        ...

    def put_tile(self, tile: EncodedTile, origin: bytes) -> bool:
        """Store an encoded tile."""
        ...


class Companion(msgspec.Struct, frozen=True, array_like=True):
    """The levels above one page.

    `levels[i]` lists (8·row+column, blob_id) at level base+1+i; `below` the companions of an inner page's children
    by slot.
    """

    rule: str
    page: bytes
    page_height: int
    clip_height: int
    clip_width: int
    levels: tuple[tuple[tuple[int, bytes], ...], ...]
    below: tuple[tuple[int, bytes], ...]


class Scratch:
    """A LevelStore that keeps what is computed in memory: reading an open snapshot's levels writes nothing."""

    def __init__(self, store: LevelStore) -> None:
        self._store = store
        self._pages: dict[bytes, bytes] = {}
        self._tiles: dict[bytes, EncodedTile] = {}

    def has(self, blob: BlobId) -> bool:
        """Here or in the store behind."""
        return blob in self._pages or blob in self._tiles or self._store.has(blob)

    def page(self, kind: int, blob: BlobId) -> bytes:
        """From here, else from the store behind."""
        return self._pages[blob] if blob in self._pages else self._store.page(kind, blob)

    def parsed(self, kind: int, blob: bytes, parse: Callable[[bytes], T]) -> T:
        """Parsed here, or by the store behind."""
        return parse(self._pages[blob]) if blob in self._pages else self._store.parsed(kind, blob, parse)

    def put_page(self, kind: int, payload: bytes, meta: bytes = b"") -> BlobId:
        """Keep in memory."""
        blob = codec.blob_id(kind, meta, payload)
        self._pages[blob] = payload
        return blob

    def read_tile(self, blob: BlobId) -> Array | bytes:
        """From here, else from the store behind."""
        kept = self._tiles.get(blob)
        return self._store.read_tile(blob) if kept is None else codec.decode(kept.header, kept.codec, kept.stored)

    def put_tile(self, tile: EncodedTile, origin: bytes) -> bool:
        """Keep in memory."""
        self._tiles[tile.blob_id] = tile
        return True


def apex_level(frame: Frame) -> int:
    """The level at which one tile covers the frame (0 without a level rule)."""
    level = 0
    while frame.level_rule != "none" and max(frame.rows, frame.columns) > 1 << level:
        level += 1
    return level


def tile(store: LevelStore, memo: Memo, frame: Frame, level: int, row: int, column: int) -> BlobId | None:
    """blob_id of a derived tile (level ≥ 1), computing what is not there; None where nothing lies below.

    Raises:
        NotFoundError: a level above the apex, or a stream without levels.
    """
    if not 1 <= level <= apex_level(frame):
        raise NotFoundError(
            f"level {level} does not exist: {frame} has levels 0 to {apex_level(frame)}", object=str(frame)
        )
    height = (level - 1) // LEVELS_PER_PAGE
    root, at, clip = frame.root, (0, 0), (frame.height, frame.width)
    for step in range(frame.root_height, height, -1):
        cells = page.side(step - 1)
        # The page at `step - 1` that holds the cell, as a slot of the page above it.
        slot_row, slot_column = (row << level) // cells % PAGE_SIDE, (column << level) // cells % PAGE_SIDE
        if not root:
            return None
        child = load(store, root, step).get(slot_row * PAGE_SIDE + slot_column)
        if child is None:
            return None
        root, clip = child, _clipped(frame, clip, step, slot_row, slot_column)
        at = (at[0] + slot_row * cells, at[1] + slot_column * cells)
    if not root:
        return None
    found = decode(store, companion(store, memo, frame, root, height, clip))
    index = level - 1 - LEVELS_PER_PAGE * height
    wide = PAGE_SIDE >> (index + 1)
    slot = (row - (at[0] >> level)) * PAGE_SIDE + column - (at[1] >> level)
    if not (0 <= row - (at[0] >> level) < wide and 0 <= column - (at[1] >> level) < wide):
        return None
    return next((BlobId(blob) for own, blob in found.levels[index] if own == slot), None)


def latest_origin(store: PageStore, frame: Frame, level: int, row: int, column: int) -> bytes:
    """The youngest origin under a derived tile (snapshot ids are ordered by time); its tile_id is made of it."""
    side = 1 << level
    window = Box(column * side, row * side, side, side)
    return max((entry.origin for _, _, entry in scan(store, frame.root, frame.root_height, window)), default=bytes(16))


def companion(store: LevelStore, memo: Memo, frame: Frame, root: bytes, height: int, clip: tuple[int, int]) -> BlobId:
    """Hash of the companion of a page of `frame`'s shape, computed unless it is remembered and stored.

    Args:
        clip: (height, width) in level-0 pixels of the frame's part that the page covers.
    """
    key = blake3(
        root + f"{frame.level_rule}|{clip[0]}|{clip[1]}|{frame.tile_height}|{frame.tile_width}".encode()
    ).digest()
    known = memo.get(_MEMO, key)
    if known is not None and store.has(BlobId(known)):
        return BlobId(known)
    grid: dict[int, Array] = {}
    below: list[tuple[int, bytes]] = []
    for slot, raw in load(store, root, height).slots():
        if height == 0:
            grid[slot] = _array(store, page.entry(raw).blob_id)
            continue
        inner = _clipped(frame, clip, height, slot // PAGE_SIDE, slot % PAGE_SIDE)
        child = companion(store, memo, frame, raw, height - 1, inner)
        below.append((slot, child))
        grid[slot] = _array(store, BlobId(decode(store, child).levels[-1][0][1]))
    levels: list[tuple[tuple[int, bytes], ...]] = []
    for index in range(LEVELS_PER_PAGE):
        grid = _shrunk(frame, grid, clip, LEVELS_PER_PAGE * height + index, PAGE_SIDE >> index)
        encoded = [(slot, codec.encode_array(values)) for slot, values in sorted(grid.items())]
        for _, item in encoded:
            store.put_tile(item, bytes(16))
        levels.append(tuple((slot, item.blob_id) for slot, item in encoded))
    made = Companion(frame.level_rule, root, height, clip[0], clip[1], tuple(levels), tuple(below))
    blob = store.put_page(KIND_COMPANION, msgspec.msgpack.encode(made))
    memo.put(_MEMO, [(key, blob)])
    return blob


def decode(store: PageStore, blob: BlobId) -> Companion:
    """Parse a companion. Raises IntegrityError."""
    try:
        return msgspec.msgpack.decode(store.page(KIND_COMPANION, blob), type=Companion)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(f"a companion page does not parse: {error}", object=blob.hex()) from error


def levels_root(store: LevelStore, memo: Memo, root: bytes) -> bytes:
    """One digest over the levels of every frame under a directory node; the seal record signs it."""
    if not root:
        return blake3(b"no frames").digest()
    node = directory.children(store, root)
    if not isinstance(node, tuple):
        parts = [bytes([nibble]) + levels_root(store, memo, node[nibble][0]) for nibble in sorted(node)]
        return blake3(b"inner" + b"".join(parts)).digest()
    hasher = blake3(b"leaf")
    for frame in node:
        if frame.level_rule != "none" and frame.root:
            made = companion(store, memo, frame, frame.root, frame.root_height, (frame.height, frame.width))
            hasher.update(directory.path_of((frame.stream, frame.name)) + made)
    return hasher.digest()


def extent_at(length: int, level: int) -> int:
    """Pixels of `length` at a level: ⌈length / 2^level⌉."""
    return -(-length >> level)


def _clipped(frame: Frame, clip: tuple[int, int], height: int, row: int, column: int) -> tuple[int, int]:
    """The part of `clip` that the child (row, column) of a page at `height` covers."""
    cells = page.side(height - 1)
    high, wide = cells * frame.tile_height, cells * frame.tile_width
    return min(high, clip[0] - row * high), min(wide, clip[1] - column * wide)


def _array(store: LevelStore, blob: BlobId) -> Array:
    values = store.read_tile(blob)
    if isinstance(values, bytes):
        raise UsageError("documents have no levels", fix='declare the stream with level_rule "none"')
    return values


def _shrunk(frame: Frame, grid: dict[int, Array], clip: tuple[int, int], level: int, side: int) -> dict[int, Array]:
    """The tiles one level up; `grid` holds side × side cells of `level`, absent cells count as zeros."""
    result: dict[int, Array] = {}
    high, wide = extent_at(clip[0], level), extent_at(clip[1], level)
    for slot in sorted({(s // PAGE_SIDE // 2) * PAGE_SIDE + s % PAGE_SIDE // 2 for s in grid}):
        row, column = slot // PAGE_SIDE * 2, slot % PAGE_SIDE * 2
        rows: list[Array] = []
        for y in (row, row + 1):
            cell_high = min(frame.tile_height, high - y * frame.tile_height)
            parts: list[Array] = []
            for x in (column, column + 1):
                cell_wide = min(frame.tile_width, wide - x * frame.tile_width)
                if cell_high > 0 and cell_wide > 0 and y < side and x < side:
                    parts.append(halve(_filled(grid, y * PAGE_SIDE + x, cell_high, cell_wide), frame.level_rule))
            if parts:
                rows.append(np.concatenate(parts, axis=1))
        result[slot] = np.concatenate(rows, axis=0)
    return result


def _filled(grid: dict[int, Array], slot: int, height: int, width: int) -> Array:
    """The cell at its full extent: zeros where it is absent or was stored smaller."""
    values = grid.get(slot)
    if values is not None and values.shape[:2] == (height, width):
        return values
    model = next(iter(grid.values()))
    whole = np.zeros((height, width, *model.shape[2:]), dtype=model.dtype)
    if values is not None:
        part = values[:height, :width]
        whole[: part.shape[0], : part.shape[1]] = part
    return whole
