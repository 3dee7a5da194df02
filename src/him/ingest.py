"""THE WRITE PATH, read top-down: picture or array → tiles → packs → pyramid → commit → index.

picture ─ tiles (512²) ─ blobs in a pack ─┐
    └─ see ─ scene ─ vectors ─ blobs ─────┴─ one commit: screen + scene + emb become visible together
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.catalog.changes import FrameChange
from him.catalog.history import History
from him.catalog.reader import SnapshotReader, bytes_of, kv_plane
from him.config import ARRAY_PART_BYTES, FRAME_CELLS_MAX, ROWS_PER_APPEND_MAX, TILE_BYTES_MAX
from him.errors import ConflictError, LimitError, NotFoundError, UsageError
from him.index import row_texts
from him.perception import pins, see
from him.ports import ArraySource, Clock, Memo, Progress, TextEncoder, TextReader
from him.pyramid import directory, update
from him.pyramid.update import Cell
from him.tier.assembly import Prepared
from him.tier.warm import WarmStore
from him.tile import codec, delta
from him.tile.delta import ClientDelta
from him.tile.downsample import check as check_rule
from him.tile.downsample import tail_at
from him.types import (
    Frame,
    Ref,
    Scene,
    Snapshot,
    StreamSpec,
    TileKey,
    TreeNode,
    checked_name,
    snapshot_bytes,
    tile_id_text,
)

Array = NDArray[np.generic]


_EMBED_KIND: Final = "embed"


class IngestReport(msgspec.Struct, frozen=True):
    """What one picture or array cost: level-0 tiles of the frame, and bytes appended for all its streams."""

    snapshot_id: str
    stream: str
    frame: str
    tiles_written: int
    tiles_reused: int
    bytes_stored: int
    elements: int
    ms: float
    tiles_read: int = 0
    """Tiles whose text was looked for anew (the others were remembered)."""
    lines_read: int = 0
    """Lines whose text was recognised anew."""
    note: str = ""
    """What the user should know beside."""

    def as_json(self) -> dict[str, object]:
        """The object documented in docs/CLI_JSON.md."""
        shown: dict[str, object] = {
            "snapshot_id": self.snapshot_id,
            "stream": self.stream,
            "frame": self.frame,
            "tiles_written": self.tiles_written,
            "tiles_reused": self.tiles_reused,
            "bytes_stored": self.bytes_stored,
            "elements": self.elements,
            "ms": round(self.ms, 2),
        }
        return shown | {"note": self.note} if self.note else shown


class Beside(NamedTuple):
    """A document that becomes visible with an array, in the same commit; None removes the frame."""

    stream: StreamSpec
    frame: str
    document: bytes | None


MakeBeside = Callable[[Mapping[Cell, Ref]], Sequence[Beside]]
"""From an array's cells, once they are stored, what is to be committed with them."""


class _Put(NamedTuple):
    """Blobs put for one frame: cells, and how many of them were new."""

    cells: dict[tuple[int, int], Ref]
    written: int


class Plane:
    """An array of 1 to 3 dimensions, or a KV tensor, laid out as rows and columns of tiles; held or read in parts.

    Raises:
        UsageError: a shape that does not fit.
    """

    def __init__(self, source: Array | ArraySource) -> None:
        self._source = source
        self.dtype = source.dtype
        self.attributes: tuple[tuple[str, str], ...] = ()
        given = source.shape
        if not (1 <= len(given) <= 3 or len(given) == 5) or 0 in given:
            raise UsageError(
                f"an array of shape {given} does not fit into tiles",
                fix="give 1 to 3 dimensions, or a KV tensor (layers, 2, heads, tokens, dim)",
            )
        self.shape: tuple[int, ...] = (1, *given) if len(given) == 1 else given
        if len(given) == 5:
            layers, two, heads, tokens, dim = given
            self.shape = (tokens, heads * dim, layers * two)
            self.attributes = (("kv_shape", ",".join(str(n) for n in given)),)

    def count(self, high: int, wide: int) -> int:
        """Tiles of a size that it takes."""
        return -(-self.shape[0] // high) * -(-self.shape[1] // wide)

    def tiles(self, high: int, wide: int) -> Iterator[list[tuple[tuple[int, int], Array | tuple[int, ...]]]]:
        """Runs of tiles, row by row, as ((row, column), values); the shape alone where all values are zero.

        A run has about ARRAY_PART_BYTES, or one tile if that has more.
        """
        size = high * wide * math.prod(self.shape[2:]) * self.dtype.itemsize
        columns = -(-self.shape[1] // wide)
        step = columns if len(self._source.shape) == 5 else max(1, ARRAY_PART_BYTES // size)
        for row in range(-(-self.shape[0] // high)):
            for first in range(0, columns, step):
                top, left = row * high, first * wide
                low, right = min(top + high, self.shape[0]), min(left + step * wide, self.shape[1])
                values = self._read(top, low, left, right)
                batch: list[tuple[tuple[int, int], Array | tuple[int, ...]]] = []
                for at in range(0, right - left, wide):
                    width = min(wide, right - left - at)
                    part = (low - top, width, *self.shape[2:]) if values is None else values[:, at : at + width]
                    batch.append(((row, first + at // wide), part))
                yield batch

    def _read(self, top: int, low: int, left: int, right: int) -> Array | None:
        """Values of some rows and columns; of a KV tensor the columns are all."""
        if len(self._source.shape) == 5:
            layers, two, heads, _, dim = self._source.shape
            tensor = self._part((0, 0, 0, top, 0), (layers, two, heads, low, dim))
            return None if tensor is None else kv_plane(tensor)
        if len(self._source.shape) == 1:
            row = self._part((left,), (right,))
            return None if row is None else row[np.newaxis, :]
        behind = self.shape[2:]
        return self._part((top, left, *(0 for _ in behind)), (low, right, *behind))

    def _part(self, begin: tuple[int, ...], end: tuple[int, ...]) -> Array | None:
        if isinstance(self._source, np.ndarray):
            return self._source[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]
        return self._source.part(begin, end)


class Ingest:
    """Writes pictures, arrays, tiles and rows into open snapshots."""

    def __init__(
        self, history: History, store: WarmStore, memo: Memo, clock: Clock, reader: TextReader, encoder: TextEncoder
    ) -> None:
        self._history = history
        self._store = store
        self._memo = memo
        self._clock = clock
        self._reader = reader
        self._encoder = encoder

    def picture(
        self,
        target: str,
        frame: str,
        pixels: NDArray[np.uint8],
        *,
        tree: Sequence[TreeNode] | None = None,
        progress: Progress | None = None,
    ) -> IngestReport:
        """Store a picture with what it shows: `screen`, `scene` and `emb` in one commit.

        A picture already stored with the same tiles, models and tree is not read again.

        Args:
            target: branch or open snapshot.
            pixels: (h, w, 3) uint8 RGB.
            tree: accessibility nodes in picture pixels.
        """
        began = self._clock.monotonic_ns()
        frame = checked_name(frame, what="frame")
        spec = self._history.stream("screen")
        key = self._hash_key(spec)
        tiles = {(row, column): codec.encode_array(part, hash_key=key) for row, column, part in _parts(pixels, spec)}
        known = self._known(target, frame, tiles, tree)
        if known is not None:
            snapshot, elements = known
            ms = (self._clock.monotonic_ns() - began) / 1e6
            return IngestReport(snapshot, "screen", frame, 0, len(tiles), 0, elements, ms)
        seen = see(pixels, self._reader, self._memo, tree, progress)
        opened = self._history.writable(target)
        origin, begun, before = snapshot_bytes(opened.snapshot_id), self._history.begin(), self._store.written_bytes
        before_it = self._replaced(opened, "screen", frame, tiles)
        written = self._store.put_tiles(list(tiles.values()), origin, [before_it.get(cell) for cell in tiles])
        scene = msgspec.structs.replace(
            seen.scene, tiles=tuple((row, column, tile.ref.hex()) for (row, column), tile in sorted(tiles.items()))
        )
        changes = [
            FrameChange(
                _frame(spec, frame, pixels.shape, pixels.dtype),
                {at: tile.ref for at, tile in tiles.items()},
                replace=True,
            ),
            *self._scene_changes(opened, frame, scene),
        ]
        after = self._history.commit(opened.snapshot_id, changes, begun=begun)
        return IngestReport(
            after.snapshot_id, "screen", frame, written, len(tiles) - written,
            self._store.written_bytes - before, len(scene.nodes), (self._clock.monotonic_ns() - began) / 1e6,
            seen.counts.tiles_detected, seen.counts.crops_recognised,
        )  # fmt: skip

    def array(
        self,
        target: str,
        stream: str,
        frame: str,
        values: Array | ArraySource,
        *,
        progress: Progress | None = None,
        note: str = "",
        beside: MakeBeside | None = None,
    ) -> IngestReport:
        """Store an array of 1–3 dimensions, or a KV tensor (layers, 2, heads, tokens, dim), as a frame's tiles.

        It is read part by part, tiles in rows, and nothing of it is kept in memory; nothing is visible before the
        end. A screen stored so is not read for what it shows, and loses the scene it had.

        Args:
            note: what the report shall say.
            beside: makes the documents that are committed with the array.
        """
        began = self._clock.monotonic_ns()
        frame = checked_name(frame, what="frame")
        spec = self._array_stream(stream)
        plane = Plane(values)
        # Before the branch may be created: what is refused leaves nothing.
        shape = msgspec.structs.replace(_frame(spec, frame, plane.shape, plane.dtype), attributes=plane.attributes)
        snapshot = self._history.writable(target)
        begun, before = self._history.begin(), self._store.written_bytes
        put = self._put_tiles(snapshot, frame, plane, spec, progress)
        changes = [FrameChange(shape, put.cells, replace=True)]
        if stream == "screen":
            changes += [
                FrameChange(_cell_frame(self._history.stream(seen), frame, 0, 0, (1, 1), "bytes"), {}, replace=True)
                for seen in ("scene", "emb")
            ]
        if beside is not None:
            changes += self._beside_changes(snapshot, beside(put.cells))
        after = self._history.commit(snapshot.snapshot_id, changes, begun=begun)
        return IngestReport(
            after.snapshot_id, stream, frame, put.written, len(put.cells) - put.written,
            self._store.written_bytes - before, 0, (self._clock.monotonic_ns() - began) / 1e6, note=note,
        )  # fmt: skip

    def tiles(
        self, target: str, stream: str, frame: str, cells: Mapping[tuple[int, int], Array | bytes | None]
    ) -> Snapshot:
        """Put (or, with None, delete) single level-0 cells (row, column) in one commit; the extent grows as needed."""
        spec = self._history.stream(stream)
        frame = checked_name(frame, what="frame")
        if not cells or any(not 0 <= n < FRAME_CELLS_MAX for cell in cells for n in cell):
            raise UsageError("tiles are put at rows and columns from 0 up")
        given = {cell: value for cell, value in sorted(cells.items()) if value is not None}
        shape: Frame | None = None
        for (row, column), value in given.items():
            _check_value(spec, value)
            shape = _grown(shape, _cell_frame(spec, frame, row, column, *_shape_of(value)))
        if shape is None:
            # Without an extent: another writer may give the frame a smaller one before this is committed.
            there = self._existing(self._history.snapshot(target), stream, frame)
            shape = msgspec.structs.replace(there, height=0, width=0)
        # Only now may the branch be created: what is refused leaves nothing.
        snapshot = self._history.writable(target)
        origin, begun = snapshot_bytes(snapshot.snapshot_id), self._history.begin()
        put: dict[tuple[int, int], Ref | None] = dict.fromkeys(cells)
        before = self._replaced(snapshot, stream, frame, given)

        def prepared(place: tuple[Cell, Array | bytes]) -> tuple[Cell, Prepared]:
            cell, value = place
            return cell, self._store.prepare(self._encoded(spec, value), origin, before.get(cell))

        for batch in self._store.ahead(prepared, _parts_of(given.items())):
            self._store.put_prepared([tile for _, tile in batch])
            put.update((cell, tile.ref) for cell, tile in batch)
        return self._history.commit(snapshot.snapshot_id, [FrameChange(shape, put)], begun=begun)

    def delta(self, target: str, stream: str, frame: str, cell: tuple[int, int], change: ClientDelta) -> Snapshot:
        """Put the tile that a client's delta makes of the one in its cell; how it is stored is decided anew.

        Raises:
            ConflictError: the cell holds another tile than the delta was made on.
            UsageError, LimitError, IntegrityError: a delta that does not fit, or leads to another tile than it names.
        """
        found = self._history.snapshot(target)
        reader = SnapshotReader(self._store, self._memo, found.directory)
        key = TileKey(stream, frame, 0, *cell)
        if tile_id_text(reader.tile_id(key)) != change.parent:
            fix = "read the tile that is there, make the delta on it, and send it once more"
            raise ConflictError("the place holds another tile than the delta was made on", object=str(key), fix=fix)
        base = reader.present(key).ref
        applied = delta.apply(change, self._store.read(base).meta, self._store.payload(base))
        value = codec.values_of(applied.header, applied.payload)
        spec = self._history.stream(stream)
        tile = codec.encode_payload(applied.header, applied.payload, self._hash_key(spec))
        _check_value(spec, value)
        opened = self._history.writable(target)
        begun = self._history.begin()
        shape = _cell_frame(spec, frame, *cell, *_shape_of(value))
        replaced = self._replaced(opened, stream, frame, [cell])
        self._store.put_tiles([tile], snapshot_bytes(opened.snapshot_id), [replaced.get(cell)])
        return self._history.commit(opened.snapshot_id, [FrameChange(shape, {cell: tile.ref})], begun=begun)

    def make_delta(
        self, target: str, stream: str, frame: str, cell: tuple[int, int], value: Array | bytes
    ) -> ClientDelta | None:
        """What a client sends instead of `value`: a delta on the tile in that cell; None when it saves too little."""
        reader = SnapshotReader(self._store, self._memo, self._history.snapshot(target).directory)
        key = TileKey(stream, frame, 0, *cell)
        spec = self._history.stream(stream)
        _check_value(spec, value)
        tile = self._encoded(spec, value)
        payload = self._store.payload(reader.present(key).ref)
        return delta.make(reader.tile_id(key), payload, tile.header, tile.payload)

    def append(self, target: str, stream: str, rows: Sequence[object], *, writer: str) -> tuple[Snapshot, str]:
        """Append rows (JSON values) as one document to the log frame of this snapshot and writer; (snapshot, frame)."""
        spec = self._history.stream(stream)
        if spec.content != "bytes":
            raise UsageError(f"stream {stream!r} holds arrays, not rows", fix="append to logs, audit or skills")
        if not rows or len(rows) > ROWS_PER_APPEND_MAX:
            raise LimitError(f"append takes 1 to {ROWS_PER_APPEND_MAX} rows; got {len(rows)}")
        try:
            lines = [msgspec.json.encode(row, order="sorted") for row in rows]
        except (TypeError, msgspec.MsgspecError) as error:
            raise UsageError(f"a row is not JSON: {error}", fix="rows are dicts of plain values") from error
        snapshot = self._history.writable(target)
        frame = checked_name(f"{snapshot.snapshot_id}.{writer}", what="frame")
        begun = self._history.begin()
        encoded = codec.encode_bytes(b"\n".join(lines) + b"\n", self._hash_key(spec))
        self._store.put_tile(encoded, snapshot_bytes(snapshot.snapshot_id))
        shape = _cell_frame(spec, frame, 0, 0, (0, 1), "bytes")
        change = FrameChange(shape, {}, append=(encoded.ref,))
        return self._history.commit(snapshot.snapshot_id, [change], begun=begun), frame

    # -- inner

    def _known(
        self,
        target: str,
        frame: str,
        tiles: Mapping[tuple[int, int], codec.EncodedTile],
        tree: Sequence[TreeNode] | None,
    ) -> tuple[str, int] | None:
        """(snapshot id, elements) when the frame holds this picture already, read by the present models and rules."""
        try:
            found = self._history.snapshot(target)
            reader = SnapshotReader(self._store, self._memo, found.directory)
            stored = msgspec.json.decode(reader.document("scene", frame), type=Scene)
            entries = {(key.y, key.x): reader.entry(key) for key in reader.keys("screen", frame)}
            vectors = dict(reader.frame("emb", frame).attributes) if stored.nodes else {"encoder": self._encoder.pin()}
        except (NotFoundError, msgspec.MsgspecError):
            return None
        ours = tuple((row, column, tile.ref.hex()) for (row, column), tile in sorted(tiles.items()))
        # The screen itself is looked at too: single tiles of it may have been put since it was read.
        there = tuple((row, column, one.ref.hex()) for (row, column), one in sorted(entries.items()) if one)
        same = ours == stored.tiles == there and stored.pins == pins(self._reader, tree)
        same = same and vectors.get("encoder") == self._encoder.pin()
        return (found.snapshot_id, len(stored.nodes)) if same else None

    def _vectors(self, texts: Sequence[str]) -> NDArray[np.int8]:
        """(n, dims) int8 vectors; a text embedded before under this pin is remembered."""
        pin = self._encoder.pin().encode()
        keys = [blake3(pin + text.encode()).digest() for text in texts]
        vectors = {key: kept for key in keys if (kept := self._memo.get(_EMBED_KIND, key)) is not None}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in vectors}
        if missing:
            made = self._encoder.encode(list(missing.values()))
            fresh = {key: vector.tobytes() for key, vector in zip(missing, made, strict=True)}
            self._memo.put(_EMBED_KIND, fresh.items())
            vectors |= fresh
        return np.frombuffer(b"".join(vectors[key] for key in keys), dtype=np.int8).reshape(len(texts), -1)

    def _encoded(self, spec: StreamSpec, value: Array | bytes) -> codec.EncodedTile:
        key = self._hash_key(spec)
        if isinstance(value, bytes):
            return codec.encode_bytes(value, key)
        return codec.encode_array(value, quantise=spec.quantise, buffer=self._store.buffer, hash_key=key)

    def _hash_key(self, spec: StreamSpec) -> bytes | None:
        return self._store.hash_key if spec.encrypted else None

    def _replaced(self, snapshot: Snapshot, stream: str, frame: str, cells: Collection[Cell]) -> dict[Cell, Ref]:
        """The tiles that stand in these cells now."""
        found = directory.find(self._store, snapshot.directory, (stream, frame))
        if found is None or not cells:
            return {}
        places = np.array(list(cells), dtype=np.int64)
        raw, present = update.look_up(self._store, found.root, found.root_height, places[:, 0], places[:, 1])
        return {cell: found.ref(raw[number, :32].tobytes()) for number, cell in enumerate(cells) if present[number]}

    def _scene_changes(self, opened: Snapshot, frame: str, scene: Scene) -> Iterator[FrameChange]:
        spec, vectors_spec = self._history.stream("scene"), self._history.stream("emb")
        origin, document = snapshot_bytes(opened.snapshot_id), self._encoded(spec, bytes_of(scene))
        self._store.put_tiles([document], origin, [*self._replaced(opened, "scene", frame, [(0, 0)]).values()])
        yield FrameChange(_cell_frame(spec, frame, 0, 0, (1, 1), "bytes"), {(0, 0): document.ref}, replace=True)
        vectors = self._vectors(row_texts(scene)) if scene.nodes else np.zeros((1, 1), dtype=np.int8)
        put = self._put_tiles(opened, frame, Plane(vectors), vectors_spec) if scene.nodes else _Put({}, 0)
        shape = msgspec.structs.replace(
            _frame(vectors_spec, frame, vectors.shape, vectors.dtype),
            attributes=(("encoder", self._encoder.pin()),),
        )
        yield FrameChange(shape, put.cells, replace=True)

    def _beside_changes(self, opened: Snapshot, made: Sequence[Beside]) -> Iterator[FrameChange]:
        for one in made:
            cells: dict[Cell, Ref] = {}
            if one.document is not None:
                tile = self._encoded(one.stream, one.document)
                replaced = self._replaced(opened, one.stream.name, one.frame, [(0, 0)])
                self._store.put_tiles([tile], snapshot_bytes(opened.snapshot_id), [replaced.get((0, 0))])
                cells = {(0, 0): tile.ref}
            yield FrameChange(_cell_frame(one.stream, one.frame, 0, 0, (1, 1), "bytes"), cells, replace=True)

    def _put_tiles(
        self, opened: Snapshot, frame: str, plane: Plane, spec: StreamSpec, progress: Progress | None = None
    ) -> _Put:
        """Put an array's tiles: read some, encode them on several threads, store them, forget them."""
        cells: dict[tuple[int, int], Ref] = {}
        written = 0
        zeros: dict[tuple[int, ...], codec.EncodedTile] = {}
        origin = snapshot_bytes(opened.snapshot_id)

        def encoded(part: Array | tuple[int, ...]) -> codec.EncodedTile:
            if isinstance(part, tuple):
                return empty(part)
            whole = np.ascontiguousarray(part)
            return self._encoded(spec, whole) if whole.view(np.uint8).any() else empty(whole.shape)

        def empty(shape: tuple[int, ...]) -> codec.EncodedTile:
            # Of zeros there is one tile a shape, which is stored and named like any other.
            if shape not in zeros:
                empty_tile = np.zeros(shape, dtype=plane.dtype)
                zeros[shape] = codec.encode_array(empty_tile, quantise=spec.quantise, hash_key=self._hash_key(spec))
            return zeros[shape]

        def batches() -> Iterator[list[tuple[Cell, Array | tuple[int, ...], Ref | None]]]:
            for batch in plane.tiles(spec.tile_height, spec.tile_width):
                before = self._replaced(opened, spec.name, frame, [cell for cell, _ in batch])
                yield [(cell, part, before.get(cell)) for cell, part in batch]

        def prepared(place: tuple[Cell, Array | tuple[int, ...], Ref | None]) -> tuple[Cell, Prepared]:
            cell, part, before = place
            return cell, self._store.prepare(encoded(part), origin, before)

        for batch in self._store.ahead(prepared, batches()):
            written += self._store.put_prepared([tile for _, tile in batch])
            cells.update((cell, tile.ref) for cell, tile in batch)
            if progress is not None:
                progress(len(cells), plane.count(spec.tile_height, spec.tile_width), "store")
        return _Put(cells, written)

    def _array_stream(self, name: str) -> StreamSpec:
        spec = self._history.stream(name)
        if spec.content != "array":
            raise UsageError(f"stream {name!r} holds documents, not arrays", fix="use screen, emb or kv_cache")
        return spec

    def _existing(self, snapshot: Snapshot, stream: str, frame: str) -> Frame:
        return SnapshotReader(self._store, self._memo, snapshot.directory).frame(stream, frame)


def _parts(values: Array, spec: StreamSpec) -> Iterator[tuple[int, int, Array]]:
    """(row, column, values) of each tile at its true extent."""
    high, wide = spec.tile_height, spec.tile_width
    for row in range(-(-values.shape[0] // high)):
        for column in range(-(-values.shape[1] // wide)):
            yield row, column, values[row * high : (row + 1) * high, column * wide : (column + 1) * wide]


def _parts_of(given: Iterable[tuple[Cell, Array | bytes]]) -> Iterator[list[tuple[Cell, Array | bytes]]]:
    """Runs of values of about ARRAY_PART_BYTES: what is encoded and not yet stored is in memory twice."""
    run: list[tuple[Cell, Array | bytes]] = []
    size = 0
    for cell, value in given:
        run.append((cell, value))
        size += len(value) if isinstance(value, bytes) else value.nbytes
        if size >= ARRAY_PART_BYTES:
            yield run
            run, size = [], 0
    if run:
        yield run


def _check_value(spec: StreamSpec, value: Array | bytes) -> None:
    """Whether a tile or document fits its stream."""
    if isinstance(value, bytes) != (spec.content == "bytes"):
        what = "arrays; got a document" if isinstance(value, bytes) else "documents; got an array"
        raise UsageError(f"stream {spec.name!r} holds {what}")
    if not isinstance(value, bytes):
        _check_tile(spec, value)
    elif len(value) > TILE_BYTES_MAX:
        raise LimitError(f"a document holds at most {TILE_BYTES_MAX} bytes; got {len(value)}")


def _check_tile(spec: StreamSpec, value: Array) -> None:
    if (
        value.ndim not in (2, 3)
        or not 0 < value.shape[0] <= spec.tile_height
        or not 0 < value.shape[1] <= spec.tile_width
    ):
        raise UsageError(
            f"a tile of {spec.name!r} has 1×1 to {spec.tile_height}×{spec.tile_width} pixels; got {value.shape}"
        )
    _check_values(spec, value.shape, value.dtype)


def _check_values(spec: StreamSpec, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    """Whether a stream takes tiles of this shape, and levels can stand above them."""
    if spec.dtype and dtype.name != spec.dtype:
        raise UsageError(
            f"stream {spec.name!r} holds {spec.dtype}; got {dtype.name}", fix=f"convert it to {spec.dtype}"
        )
    tail = shape[2:]
    if spec.level_rule != "none":
        check_rule(spec.level_rule, dtype)
        tail = tail_at(spec.level_rule, tail, first=True)
    size = min(spec.tile_height, shape[0]) * min(spec.tile_width, shape[1]) * math.prod(tail) * dtype.itemsize
    if size > TILE_BYTES_MAX:
        raise LimitError(f"tiles of {size} bytes exceed {TILE_BYTES_MAX}", object=spec.name)


def _frame(spec: StreamSpec, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Frame:
    """The frame that holds a whole array, which must fit its stream and the limits of a tile."""
    _check_values(spec, shape, dtype)
    return _cell_frame(spec, name, 0, 0, shape, codec.dtype_name(dtype))


def _cell_frame(spec: StreamSpec, name: str, row: int, column: int, shape: tuple[int, ...], dtype: str) -> Frame:
    """The frame as far as one cell shows it: its extent ends with that cell."""
    channels = shape[2] if len(shape) == 3 else 0
    return Frame(
        spec.name, name, spec.content, row * spec.tile_height + shape[0], column * spec.tile_width + shape[1],
        channels, dtype, spec.tile_height, spec.tile_width, spec.halo, spec.level_rule, b"", 0,
        encrypted=bool(spec.encrypted),
    )  # fmt: skip


def _shape_of(value: Array | bytes) -> tuple[tuple[int, ...], str]:
    """Shape of a cell in pixels (a document is one) and the name of its dtype."""
    return ((1, 1), "bytes") if isinstance(value, bytes) else (value.shape, codec.dtype_name(value.dtype))


def _grown(known: Frame | None, cell: Frame) -> Frame:
    if known is None:
        return cell
    if (known.dtype, known.channels) != (cell.dtype, cell.channels):
        raise ConflictError("tiles of one frame have one dtype and channel count", object=str(cell))
    return msgspec.structs.replace(known, height=max(known.height, cell.height), width=max(known.width, cell.width))
