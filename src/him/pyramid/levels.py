"""Levels above 0: companions of pages, a pure function of (page, level rule, clipped extent).

A companion names the 4×4, 2×2 and 1×1 tiles above its page's 8×8 cells; an inner page's cells are the apex tiles of
the pages below. So a page that no branch changed never computes its levels again, and diff, merge and the
directory's hash never look here (design §2). Tiles are derived depth-first, four by four, each remembered by the
content it was derived from: one changed tile costs one tile a level, and at most a few tiles a level are in memory.
Levels of encrypted frames are derived whenever they are read, and not stored (docs/design/015-keys.md).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import LEVEL_AHEAD_BYTES, LEVEL_NOTES_HELD, LEVEL_THREADS, LEVELS_PER_PAGE, PAGE_SIDE
from him.errors import IntegrityError, NotFoundError, UsageError
from him.ports import Memo
from him.pyramid import directory, page
from him.pyramid.page import PageStore, load
from him.pyramid.quad import APEX, CELLS, Ahead, Grid, Quad, Work, extent_at, morton, tile_of
from him.pyramid.update import scan
from him.tile import codec
from him.tile.address import KIND_COMPANION, reference
from him.tile.codec import EncodedTile
from him.tile.downsample import tail_at
from him.types import MALFORMED, BlobId, Box, Entry, Frame, Ref

Array = NDArray[np.generic]
T = TypeVar("T")
_COMPANIONS: Final = "companion"
_QUADS: Final = "quad"
_ROOTS: Final = "levels root"


class LevelStore(PageStore, Protocol):
    """A PageStore that keeps tiles too; tiles are read from several threads."""

    @property
    def hash_key(self) -> bytes:
        """What encrypted content is named with. Raises KeyNeededError."""
        ...

    def has(self, ref: Ref) -> bool:
        """Whether the blob is stored."""
        ...

    def read_tile(self, ref: Ref) -> Array | bytes:
        """Verified values."""
        ...

    def put_tile(self, tile: EncodedTile, origin: bytes) -> bool:
        """Store an encoded tile."""
        ...


class Companion(msgspec.Struct, frozen=True, array_like=True):
    """The levels above one page.

    `levels[i]` lists (8·row+column, blob_id) of the tiles at level 3·page_height+1+i, `origins[i]` the youngest origin
    under each (16 bytes a tile, same order). Levels below `stored_from` are named but not stored: they are derived
    when read. `below` lists the companions of an inner page's children by slot.
    """

    rule: str
    page: bytes
    page_height: int
    clip_height: int
    clip_width: int
    stored_from: int
    levels: tuple[tuple[tuple[int, bytes], ...], ...]
    origins: tuple[bytes, ...]
    below: tuple[tuple[int, bytes], ...]

    def entry(self, index: int, slot: int) -> Entry | None:
        """The derived tile at a slot of `levels[index]`, with the youngest origin under it."""
        for at, (own, blob) in enumerate(self.levels[index]):
            if own == slot:
                return Entry(BlobId(blob), self.origins[index][16 * at : 16 * at + 16])
        return None


class Scratch:
    """A LevelStore that keeps what was last derived in memory: reading an open snapshot's levels writes nothing."""

    def __init__(self, store: LevelStore) -> None:
        self._store = store
        self._last: EncodedTile | None = None

    @property
    def hash_key(self) -> bytes:
        """Of the store behind."""
        return self._store.hash_key

    def has(self, ref: Ref) -> bool:
        """Here or in the store behind."""
        return (self._last is not None and ref == self._last.ref) or self._store.has(ref)

    def page(self, kind: int, ref: Ref) -> bytes:
        """From the store behind."""
        return self._store.page(kind, ref)

    def parsed(self, kind: int, ref: bytes, parse: Callable[[bytes], T]) -> T:
        """By the store behind."""
        return self._store.parsed(kind, ref, parse)

    def put_page(self, kind: int, payload: bytes, *, encrypted: bool = False) -> Ref:
        """How it would be referred to."""
        return reference(kind, b"", payload, self.hash_key if encrypted else None)

    def read_tile(self, ref: Ref) -> Array | bytes:
        """From here, else from the store behind."""
        if self._last is None or ref != self._last.ref:
            return self._store.read_tile(ref)
        return codec.decode(self._last.header, self._last.codec, self._last.stored)

    def put_tile(self, tile: EncodedTile, origin: bytes) -> bool:
        """Keep in memory, in place of the one before."""
        self._last = tile
        return True


# -- what can be asked


def apex_level(frame: Frame) -> int:
    """The level at which one tile covers the frame (0 without a level rule)."""
    level = 0
    while frame.level_rule != "none" and max(frame.rows, frame.columns) > 1 << level:
        level += 1
    return level


def shape_at(frame: Frame, level: int, row: int, column: int) -> tuple[int, ...]:
    """Shape of a derived tile (level ≥ 1) at its true extent."""
    high = extent_at(frame.height, level) - row * frame.tile_height
    wide = extent_at(frame.width, level) - column * frame.tile_width
    tail = (frame.channels,) if frame.channels else ()
    return min(frame.tile_height, high), min(frame.tile_width, wide), *tail_at(frame.level_rule, tail, first=True)


def entry(store: LevelStore, memo: Memo, frame: Frame, level: int, row: int, column: int) -> Entry | None:
    """Blob and youngest origin of a derived tile (level ≥ 1); None where nothing lies below. Stores nothing.

    Raises:
        NotFoundError: a level above the apex, or a stream without levels.
    """
    found = _derived(store, memo, frame, level, row, column, want=False)
    return None if found is None else Entry(found.blob, found.origin)


def read(store: LevelStore, memo: Memo, frame: Frame, level: int, row: int, column: int) -> Array | None:
    """Values of a derived tile, from the store or derived from what lies below; None where nothing does.

    Stores nothing; at most a few tiles a level are in memory.

    Raises:
        NotFoundError: a level above the apex, or a stream without levels.
        IntegrityError: a tile below is damaged.
    """
    found = _derived(store, memo, frame, level, row, column, want=True)
    return None if found is None else found.values


def tile(store: LevelStore, memo: Memo, frame: Frame, level: int, row: int, column: int) -> Ref | None:
    """A derived tile, as pages would refer to it; one that had to be derived is put into `store`.

    None where nothing lies below.

    Raises:
        NotFoundError: a level above the apex, or a stream without levels.
    """
    found = _derived(store, memo, frame, level, row, column, want=False)
    if found is not None and found.values is not None:
        store.put_tile(tile_of(found.values, _hash_key(store, frame), compress=False), bytes(16))
    return None if found is None else found.blob


def latest_origin(store: PageStore, frame: Frame, level: int, row: int, column: int) -> bytes:
    """The youngest origin under a derived tile, by looking at every cell; `entry` has it from the companion."""
    side = 1 << level
    window = Box(column * side, row * side, side, side)
    return max((found.origin for _, _, found in scan(store, frame.root, frame.root_height, window)), default=bytes(16))


def companion(store: LevelStore, memo: Memo, frame: Frame, root: bytes, height: int, clip: tuple[int, int]) -> BlobId:
    """Hash of the companion of a page of `frame`'s shape, made and stored with its tiles unless it is there.

    Args:
        clip: (height, width) in level-0 pixels of the frame's part that the page covers.
    """
    with ThreadPoolExecutor(LEVEL_THREADS) as pool:
        notes = _Notes(memo)
        made, _ = _Builder(store, notes, pool, keep=True).companion(frame, root, height, clip)
        notes.hand_on()
    return made


def decode(store: PageStore, blob: BlobId) -> Companion:
    """Parse a companion. Raises IntegrityError."""
    try:
        return msgspec.msgpack.decode(store.page(KIND_COMPANION, blob), type=Companion)
    except MALFORMED as error:
        raise IntegrityError(f"a companion page does not parse: {error}", object=blob.hex()) from error


def levels_root(store: LevelStore, memo: Memo, root: bytes) -> bytes:
    """One digest over the levels of every frame under a directory node, which are stored; the seal record signs it."""
    with ThreadPoolExecutor(LEVEL_THREADS) as pool:
        notes = _Notes(memo)
        digest = _root_digest(store, notes, _Builder(store, notes, pool, keep=True), root)
        notes.hand_on()
    return digest


def _root_digest(store: LevelStore, notes: "_Notes", builder: "_Builder", root: bytes) -> bytes:
    """The levels root of a directory node, remembered for subtrees that no snapshot changed."""
    if not root:
        return blake3(b"no frames").digest()
    known = notes.get(_ROOTS, root)
    # Beside the digest stands the last companion that was stored for it: had a crash taken the end of the pack, it
    # would have taken this one.
    if known is not None and (len(known) == 32 or store.has(BlobId(known[32:]))):
        return known[:32]
    before = builder.newest
    node = directory.children(store, root)
    if not isinstance(node, tuple):
        parts = [bytes([nibble]) + _root_digest(store, notes, builder, node[nibble][0]) for nibble in sorted(node)]
        hasher = blake3(b"inner" + b"".join(parts))
    else:
        hasher = blake3(b"leaf")
        for frame in node:
            if frame.level_rule != "none" and frame.root and not frame.encrypted:
                clip = (frame.height, frame.width)
                made = builder.known(frame, frame.root, clip)
                made = made or builder.companion(frame, frame.root, frame.root_height, clip)[0]
                hasher.update(directory.path_of((frame.stream, frame.name)) + made)
    notes.put(_ROOTS, root, hasher.digest() + (builder.newest if builder.newest != before else b""))
    return hasher.digest()


# -- how they are derived


class _Node(NamedTuple):
    """A tile of a page: a cell or a derived one; its values where they are at hand."""

    blob: Ref
    origin: bytes
    values: Array | None = None


class _Notes:
    """A memo whose new results are handed on in batches."""

    def __init__(self, memo: Memo) -> None:
        self._memo = memo
        self._fresh: dict[str, dict[bytes, bytes]] = {_QUADS: {}, _COMPANIONS: {}, _ROOTS: {}}

    def get(self, kind: str, key: bytes) -> bytes | None:
        """The result, handed on or not."""
        return self._fresh[kind].get(key) or self._memo.get(kind, key)

    def put(self, kind: str, key: bytes, value: bytes) -> None:
        """Remember a result."""
        self._fresh[kind][key] = value
        if len(self._fresh[kind]) >= LEVEL_NOTES_HELD:
            self.hand_on()

    def hand_on(self) -> None:
        """Give the memo all that is new."""
        for kind, items in self._fresh.items():
            if items:
                self._memo.put(kind, items.items())
                items.clear()


class _Builder:
    """Derives tiles. With `keep` they are stored, as far as their level is to be stored, and so are companions."""

    def __init__(self, store: LevelStore, notes: _Notes, pool: Executor, *, keep: bool) -> None:
        self._store, self._notes, self._pool, self._keep = store, notes, pool, keep
        self.newest = b""
        """The last companion that was stored anew."""

    def companion(self, frame: Frame, root: bytes, height: int, clip: tuple[int, int]) -> tuple[BlobId, _Node]:
        """(hash, apex) of a page's companion, which is stored with all below it."""
        known = self.known(frame, root, clip)
        apex = None if known is None else decode(self._store, known).entry(APEX, 0)
        if known is not None and apex is not None:
            return known, _Node(*apex)
        grid = Grid(frame, load(self._store, root, height), clip)
        below: dict[int, bytes] = {}
        top = self.node(grid, APEX, 0, 0, below=below)
        if top is None:
            raise IntegrityError("a page holds nothing", object=root.hex())
        tiles = [sorted(level.items()) for level in grid.found]
        made = Companion(
            frame.level_rule, root, height, *clip, grid.level(grid.stored_from),
            tuple(tuple((slot, one.ref) for slot, one in level) for level in tiles),
            tuple(b"".join(one.origin for _, one in level) for level in tiles),
            tuple(sorted(below.items())),
        )  # fmt: skip
        stored = BlobId(self._store.put_page(KIND_COMPANION, msgspec.msgpack.encode(made)))
        self._notes.put(_COMPANIONS, _page_key(frame, root, clip), stored)
        self.newest = stored
        return stored, top

    def known(self, frame: Frame, root: bytes, clip: tuple[int, int]) -> BlobId | None:
        """Hash of a page's companion, if it is stored."""
        if frame.encrypted:
            return None
        known = self._notes.get(_COMPANIONS, _page_key(frame, root, clip))
        return BlobId(known) if known is not None and self._store.has(BlobId(known)) else None

    def node(
        self, grid: Grid, index: int, row: int, column: int, *, want: bool = False,
        below: dict[int, bytes] | None = None,
    ) -> _Node | None:  # fmt: skip
        """A tile of a page; None where nothing lies below.

        Args:
            want: its values are needed, not just its name.
            below: takes the companions of the child pages that are met.
        """
        if index == CELLS:
            return self._cell(grid, row * PAGE_SIDE + column, want, below)
        quad = Quad(grid, index, row, column)
        children: list[_Node | None] = []
        absent: list[int] = []
        for place, at in enumerate(quad.places):
            child = self.node(grid, index - 1, *at, below=below)
            if child is not None and child.values is None:
                absent.append(place)
            elif child is not None and child.values is not None:
                # Used at once and let go: only what is being put together stays in memory.
                quad.add(place, child.values)
                child = _Node(child.blob, child.origin)
            children.append(child)
        if not any(children):
            return None
        key = quad.key([child and child.blob for child in children])
        blob = self._named(grid, index, key, want)
        if blob is None:
            found = self._made(grid, index, quad, key, absent, want)
        else:
            found = _Node(blob, b"", _array(self._store, blob) if want else None)
        origin = max(child.origin for child in children if child)
        grid.found[index][row * PAGE_SIDE + column] = Entry(found.blob, origin)
        return _Node(found.blob, origin, found.values)

    # -- inner

    def _cell(self, grid: Grid, slot: int, want: bool, below: dict[int, bytes] | None) -> _Node | None:
        raw = grid.slots.get(slot)
        if raw is None:
            return None
        if grid.height == 0:
            own = grid.page.entry(raw)
            return _Node(own.ref, own.origin, _array(self._store, own.ref) if want else None)
        child = grid.page.refers(raw)
        clip = grid.child_clip(slot)
        if self._keep:
            made, apex = self.companion(grid.frame, child, grid.height - 1, clip)
            if below is not None:
                below[slot] = made
        else:
            known = self.known(grid.frame, child, clip)
            stored = None if known is None else decode(self._store, known).entry(APEX, 0)
            if stored is None:
                below_it = Grid(grid.frame, load(self._store, child, grid.height - 1), clip)
                return self.node(below_it, APEX, 0, 0, want=want)
            apex = _Node(*stored)
        return apex._replace(values=_array(self._store, apex.blob)) if want and apex.values is None else apex

    def _named(self, grid: Grid, index: int, key: bytes, want: bool) -> Ref | None:
        """The tile if its name is remembered, and it is there as far as it has to be."""
        known = self._notes.get(_QUADS, key)
        needed = want or (self._keep and index >= grid.stored_from)
        ref = None if known is None else grid.frame.ref(known)
        return None if ref is None or (needed and not self._store.has(ref)) else ref

    def _made(self, grid: Grid, index: int, quad: Quad, key: bytes, absent: list[int], want: bool) -> _Node:
        """The tile derived from its children; those of `absent` places are not in the quad yet."""
        store = self._keep and index >= grid.stored_from
        ahead = self._foreseen(grid, want).take(key) if (index, grid.height) == (0, 0) else None
        if ahead is None:
            for place in absent:
                child = self.node(grid, index - 1, *quad.places[place], want=True)
                if child is not None and child.values is not None:
                    quad.add(place, child.values)
            ahead = tile_of(quad.values, _hash_key(self._store, grid.frame), compress=store), quad.values
        encoded, values = ahead
        if store:
            self._store.put_tile(encoded, bytes(16))
        self._notes.put(_QUADS, key, encoded.ref)
        return _Node(encoded.ref, b"", values)

    def _foreseen(self, grid: Grid, want: bool) -> Ahead:
        """The tiles above the grid's cells that will have to be derived, in the order they will be asked for."""
        if grid.ahead is None:
            work: dict[bytes, Work] = {}
            for row, column in sorted(grid.places(0), key=morton):
                index, wanted_row, wanted_column = grid.target
                if (row >> index, column >> index) != (wanted_row, wanted_column):
                    continue
                quad = Quad(grid, 0, row, column)
                raw = [grid.slots.get(y * PAGE_SIDE + x) for y, x in quad.places]
                blobs = [None if one is None else grid.page.refers(one) for one in raw]
                key = quad.key(blobs)
                if key not in work and self._named(grid, 0, key, want) is None:
                    keep = self._keep and grid.stored_from == 0
                    work[key] = partial(self._from_cells, quad, blobs, keep, _hash_key(self._store, grid.frame))
            grid.ahead = Ahead(self._pool, work, max(1, min(2 * LEVEL_THREADS, LEVEL_AHEAD_BYTES // grid.tile_bytes)))
        return grid.ahead

    def _from_cells(
        self, quad: Quad, blobs: Sequence[Ref | None], store: bool, hash_key: bytes | None
    ) -> tuple[EncodedTile, Array]:
        """Runs on several threads."""
        for place, blob in enumerate(blobs):
            if blob is not None:
                quad.add(place, _array(self._store, blob))
        return tile_of(quad.values, hash_key, compress=store), quad.values


def _hash_key(store: LevelStore, frame: Frame) -> bytes | None:
    return store.hash_key if frame.encrypted else None


def _derived(
    store: LevelStore, memo: Memo, frame: Frame, level: int, row: int, column: int, *, want: bool
) -> _Node | None:
    """A derived tile of a frame, from its companion or from what lies below."""
    if not 1 <= level <= apex_level(frame):
        raise NotFoundError(
            f"level {level} does not exist: {frame} has levels 0 to {apex_level(frame)}", object=str(frame)
        )
    height, index = divmod(level - 1, LEVELS_PER_PAGE)
    found = _page_at(store, frame, height, row << level, column << level)
    if found is None:
        return None
    root, clip = found
    place = row & (PAGE_SIDE >> index + 1) - 1, column & (PAGE_SIDE >> index + 1) - 1
    notes = _Notes(memo)
    with ThreadPoolExecutor(LEVEL_THREADS) as pool:
        builder = _Builder(store, notes, pool, keep=False)
        known = builder.known(frame, root, clip)
        if known is not None:
            there = decode(store, known).entry(index, place[0] * PAGE_SIDE + place[1])
            if there is None or not want:
                return there and _Node(*there)
            if store.has(there.ref):
                return _Node(*there, _array(store, there.ref))
        grid = Grid(frame, load(store, root, height), clip, (index, *place))
        node = builder.node(grid, index, *place, want=want)
        if grid.ahead is not None:
            grid.ahead.stop()
        notes.hand_on()
    return node


def _page_at(
    store: PageStore, frame: Frame, height: int, row: int, column: int
) -> tuple[bytes, tuple[int, int]] | None:
    """(hash, clip) of the frame's page at `height` over a level-0 cell; None where there is none."""
    if not frame.root or not (0 <= row < page.side(frame.root_height) and 0 <= column < page.side(frame.root_height)):
        return None
    root, clip = frame.root, (frame.height, frame.width)
    for step in range(frame.root_height, height, -1):
        grid = Grid(frame, load(store, root, step), clip)
        cells = page.side(step - 1)
        slot = row // cells % PAGE_SIDE * PAGE_SIDE + column // cells % PAGE_SIDE
        if slot not in grid.slots:
            return None
        root, clip = grid.page.refers(grid.slots[slot]), grid.child_clip(slot)
    return root, clip


def _page_key(frame: Frame, root: bytes, clip: tuple[int, int]) -> bytes:
    shape = f"{frame.level_rule}|{clip[0]}|{clip[1]}|{frame.tile_height}|{frame.tile_width}"
    return blake3(root + shape.encode()).digest()


def _array(store: LevelStore, ref: Ref) -> Array:
    values = store.read_tile(ref)
    if isinstance(values, bytes):
        raise UsageError("documents have no levels", fix='declare the stream with level_rule "none"')
    return values
