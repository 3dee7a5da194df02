"""Reading one snapshot at one directory hash: frames, entries, verified tiles, whole arrays."""

import unicodedata
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from him.catalog.retention import Expiry, lacks
from him.errors import ExpiredError, IntegrityError, NotFoundError, UsageError
from him.ports import Memo
from him.pyramid import directory, levels, update
from him.pyramid.levels import Scratch
from him.pyramid.page import Page
from him.tier.warm import WarmStore
from him.tile import codec
from him.tile.address import tile_id
from him.types import Box, Entry, Frame, Ref, TileId, TileKey, TileMeta, snapshot_id, tile_id_text

Array = NDArray[np.generic]
CRITICAL: Final = "critical"
"""The attribute, of whatever value, of a snapshot whose tiles stay on this disk for a while once they were read."""


class SnapshotReader:
    """A snapshot's content as it stood at `directory_hash`; later commits do not change what it shows.

    Args:
        critical: what is read is pinned (spec §7).
    """

    def __init__(self, store: WarmStore, memo: Memo, directory_hash: bytes, *, critical: bool = False) -> None:
        self._store = store
        self._critical = critical
        self._memo = memo
        self.directory = directory_hash
        self._frames: dict[tuple[str, str], Frame] = {}

    def frame(self, stream: str, name: str) -> Frame:
        """The frame's record. Raises NotFoundError."""
        known = self._frames.get((stream, name))
        if known is not None:
            return known
        name = unicodedata.normalize("NFC", name)
        found = directory.find(self._store, self.directory, (stream, name))
        if found is None:
            raise NotFoundError(f"the snapshot has no frame {name!r} in stream {stream!r}", object=f"{stream}:{name}")
        self._frames[stream, name] = found
        return found

    def frames(self, stream: str | None = None) -> list[Frame]:
        """Frames (of one stream), sorted by stream and name."""
        found = (one for one in directory.scan(self._store, self.directory) if stream in (None, one.stream))
        return sorted(found, key=lambda one: (one.stream, one.name))

    def entry(self, key: TileKey) -> Entry | None:
        """What a cell holds: for a derived tile its blob and the youngest origin it covers; None when absent.

        Raises:
            NotFoundError: no such frame or level.
        """
        frame = self.frame(key.stream, key.frame)
        if key.level == 0:
            leaf = self._leaf(frame, key.y >> update.SIDE_BITS, key.x >> update.SIDE_BITS)
            return None if leaf is None else update.in_leaf(leaf, key.y, key.x)
        blob = levels.tile(Scratch(self._store), self._memo, frame, key.level, key.y, key.x)
        if blob is None:
            return None
        return Entry(blob, levels.latest_origin(self._store, frame, key.level, key.y, key.x))

    def _leaf(self, frame: Frame, row: int, column: int) -> Page | None:
        place = frame.root, row, column
        leaf = self._store.leaves.get(place)
        if leaf is None:
            leaf = update.leaf_at(self._store, frame.root, frame.root_height, row, column)
            if leaf is not None:
                self._store.leaves.put(place, leaf, leaf.size)
        return leaf

    def _bring_pages(self, keys: Sequence[TileKey]) -> None:
        """Have the pages on the way to level-0 keys here before they are read one by one."""
        if not self._store.tiered:
            return
        leaves: dict[tuple[str, str], dict[tuple[int, int], None]] = {}
        for key in keys:
            if key.level == 0:
                place = key.y >> update.SIDE_BITS, key.x >> update.SIDE_BITS
                leaves.setdefault((key.stream, key.frame), {})[place] = None
        for (stream, name), places in leaves.items():
            frame = self.frame(stream, name)
            unread = [place for place in places if self._store.leaves.get((frame.root, *place)) is None]
            if len(unread) > 1:
                update.bring(self._store, self._store.bring, frame.root, frame.root_height, unread)

    def tile_id(self, key: TileKey) -> TileId:
        """Identity of a present tile. Raises NotFoundError."""
        entry = self.present(key)
        return tile_id(key, entry.origin, entry.ref)

    def tile(self, key: TileKey) -> Array | bytes:
        """Verified values at true extent, read-only; a document's bytes.

        Raises:
            NotFoundError: nothing was put there.
            IntegrityError: the stored bytes are damaged; the message names the tile and the place.
            ExpiredError: retention has let it, or something below it, go.
        """
        with self._expiring([key]):
            entry = self.present(key)
            if key.level == 0 or self._store.has(entry.ref):
                values = self._store.read_tile(entry.ref)
                self.was_read([entry.ref])
                return values
            values = levels.read(self._store, _Forgetful(), self.frame(key.stream, key.frame), key.level, key.y, key.x)
            assert values is not None
            values.flags.writeable = False
            return values

    @contextmanager
    def _expiring(self, keys: Sequence[TileKey]) -> Generator[None]:
        """What is missing because retention has let it go is expired, not damaged."""
        try:
            yield
        except IntegrityError as error:
            for key in keys:
                if self._gone(key):
                    raise ExpiredError("the tile was let go by its stream's retention", object=str(key)) from error
            raise

    def _gone(self, key: TileKey) -> bool:
        """Whether a tile that retention lets go lies at, or below, a place and is missing."""
        expiry = Expiry(self._store.expired)
        if not expiry.touches(key.stream):
            return False
        frame, side = self.frame(key.stream, key.frame), 1 << key.level
        cells = update.scan(self._store, frame.root, frame.root_height, Box(key.x * side, key.y * side, side, side))
        return any(expiry.covers_one(key.stream, found.origin) and lacks(self._store, found.ref) for *_, found in cells)

    def tiles(self, keys: Sequence[TileKey]) -> list[Array | bytes]:
        """`tile` of each key, in the order asked for; level 0 is read in the order it lies in, on several threads."""
        with self._expiring(keys):
            self._bring_pages(keys)
            entries = [self.present(key) for key in keys]
            stored = [at for at, key in enumerate(keys) if key.level == 0 or self._store.has(entries[at].ref)]
            refs = [entries[at].ref for at in stored]
            found = dict(zip(stored, self._store.read_tiles(refs), strict=True))
            self.was_read(refs)
            return [found[at] if at in found else self.tile(key) for at, key in enumerate(keys)]

    @contextmanager
    def view(self, key: TileKey) -> Generator[Array | bytes]:
        """A tile without copying where it is stored raw; its place in the pack is locked while the array lives."""
        entry = self.present(key)
        if key.level and not self._store.has(entry.ref):
            yield self.tile(key)
            return
        with self._expiring([key]), self._store.view(entry.ref) as values:
            self.was_read([entry.ref])
            yield values

    def was_read(self, refs: Sequence[Ref]) -> None:
        """Keep tiles of a critical snapshot on this disk: whoever reads them by their references tells so."""
        if self._critical:
            self._store.keep(refs)

    def meta(self, key: TileKey) -> TileMeta:
        """What is known of a tile without its values; one that retention has let go takes 0 bytes.

        Raises:
            NotFoundError: nothing was put there.
        """
        entry = self.present(key)
        frame = self.frame(key.stream, key.frame)
        plain = frame if key.level else msgspec.structs.replace(frame, level_rule="none")
        shape, dtype, parent, size = levels.shape_at(plain, key.level, key.y, key.x), frame.dtype, None, 0
        if self._store.has(entry.ref) or not self._gone(key):
            found = self._store.read(entry.ref)
            shape, dtype = codec.shape_and_dtype(found.meta)
            if found.delta_depth:
                parent = tile_id_text(tile_id(key, self._store.read(found.delta_base).origin, found.delta_base))
            size = self._store.size_of(entry.ref)
        return TileMeta(
            tile_id_text(tile_id(key, entry.origin, entry.ref)), key.stream, key.frame,
            snapshot_id(entry.origin), key.level, key.x, key.y, shape, dtype, parent, frame.halo,
            entry.ref.hex(), size,
        )  # fmt: skip

    def keys(self, stream: str, name: str, window: Box | None = None) -> Iterator[TileKey]:
        """Keys of present level-0 tiles (within a window of columns and rows)."""
        frame = self.frame(stream, name)
        for row, column, _ in update.scan(self._store, frame.root, frame.root_height, window):
            yield TileKey(stream, name, 0, row, column)

    def document(self, stream: str, name: str) -> bytes:
        """The single document of a frame. Raises NotFoundError, IntegrityError."""
        found = self.tile(TileKey(stream, name, 0, 0, 0))
        if not isinstance(found, bytes):
            raise UsageError(f"{stream}:{name} holds arrays, not a document")
        return found

    def array(self, stream: str, name: str) -> Array:
        """A frame's whole array at its extent; absent tiles are zeros.

        Shapes: (height, width) or (height, width, channels); a KV tensor in the shape it was given.
        """
        frame = self.frame(stream, name)
        if frame.content != "array":
            raise UsageError(f"{frame} holds documents, not an array", fix="read its tiles one by one")
        tail = (frame.channels,) if frame.channels else ()
        whole = np.zeros((frame.height, frame.width, *tail), dtype=codec.DTYPES[frame.dtype])
        for key in self.keys(stream, name):
            values = self.tile(key)
            if not isinstance(values, bytes):
                y, x = key.y * frame.tile_height, key.x * frame.tile_width
                part = values.reshape(values.shape[0], values.shape[1], *tail)
                whole[y : y + part.shape[0], x : x + part.shape[1]] = part
        shape = dict(frame.attributes).get("kv_shape")
        return whole if shape is None else kv_tensor(whole, tuple(int(n) for n in shape.split(",")))

    def present(self, key: TileKey) -> Entry:
        """`entry` of a cell that holds something. Raises NotFoundError."""
        entry = self.entry(key)
        if entry is None:
            raise NotFoundError("nothing is stored at that place", object=str(key))
        return entry


class _Forgetful:
    """A memo that remembers nothing, so that values are computed, not just named."""

    def get(self, kind: str, key: bytes) -> bytes | None:
        """Nothing."""
        return None

    def put(self, kind: str, items: object) -> None:
        """Nothing."""


_KV_ROWS: Final = 64
"""Tokens that are turned at a time: what one pass writes the next still finds in a core's cache."""
_TURNED_AS: Final = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.int32)}
"""Item size → a dtype that cv2.transpose takes; it moves bits, whatever they mean."""


def kv_plane(tensor: Array) -> Array:
    """A KV tensor as an array of tiles: (layers, 2, heads, tokens, dim) → (tokens, heads·dim, layers·2).

    Tokens run down the rows, so that two caches with one prefix share their first tiles.
    """
    layers, two, heads, tokens, dim = tensor.shape
    kind = _TURNED_AS.get(tensor.itemsize)
    if kind is None or not tensor[..., :1, :].size:
        return np.ascontiguousarray(tensor.transpose(3, 2, 4, 0, 1)).reshape(tokens, heads * dim, layers * two)
    plane = np.empty((tokens, heads * dim, layers * two), dtype=tensor.dtype)
    for top in range(0, tokens, _KV_ROWS):
        rows = np.ascontiguousarray(tensor[:, :, :, top : top + _KV_ROWS].transpose(0, 1, 3, 2, 4))
        cv2.transpose(
            rows.reshape(layers * two, -1).view(kind),
            plane[top : top + _KV_ROWS].reshape(-1, layers * two).view(kind),
        )
    return plane


def kv_tensor(plane: Array, shape: tuple[int, ...], out: Array | None = None) -> Array:
    """Inverse of `kv_plane`; into `out` of that shape, where it is given."""
    layers, two, heads, tokens, dim = shape
    tensor = np.empty(shape, dtype=plane.dtype) if out is None else out
    kind = _TURNED_AS.get(plane.itemsize)
    if kind is None or not plane.size:
        tensor[:] = plane.reshape(tokens, heads, dim, layers, two).transpose(3, 4, 1, 0, 2)
        return tensor
    for top in range(0, tokens, _KV_ROWS):
        rows = np.ascontiguousarray(plane[top : top + _KV_ROWS]).reshape(-1, layers * two).view(kind)
        turned = np.asarray(cv2.transpose(rows)).view(plane.dtype).reshape(layers, two, -1, heads, dim)
        tensor[:, :, :, top : top + _KV_ROWS] = turned.transpose(0, 1, 3, 2, 4)
    return tensor


def bytes_of(value: msgspec.Struct) -> bytes:
    """Canonical JSON of a value: keys sorted, no spaces."""
    return msgspec.json.encode(value, order="sorted")
