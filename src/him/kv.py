"""KV caches of transformers as memory: a tensor, the token ids it stands for, and the model it belongs to.

    binding = kv.Binding(model="blake3:…", tokenizer="blake3:…", positions="rope base 100000, no scaling",
                         dtype="float32", layers=30, kv_heads=3, dim=64)
    kv.save(repo.writable("main"), "chat-7", tensor, token_ids, binding)
    found = kv.longest_prefix(repo.snapshot("main"), prompt, binding)
    if found:
        tensor, token_ids = kv.load(repo.snapshot("main"), found.frame, binding, tokens=found.tokens)

A cache is a frame of tiles and, in the same commit, a record: binding, token ids, and which tiles they are
(docs/design/009-kv.md).
"""

import threading
import weakref
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.catalog.reader import SnapshotReader, kv_tensor
from him.config import KV_BINDING_CHARS_MAX, KV_ORDERS_KEPT, KV_RECORDS_AT_ONCE, KV_TOKENS_MAX, STREAMS
from him.errors import ConflictError, DriftError, IntegrityError, LimitError, NotFoundError, UsageError, VersionError
from him.handle import SnapshotHandle
from him.ingest import Beside, IngestReport
from him.pyramid import directory
from him.pyramid.update import Cell
from him.tier.warm import WarmStore
from him.tile.codec import DTYPES, dtype_name
from him.types import MALFORMED, Frame, Ref, StreamSpec, TileKey, checked_name, name_of

Array = NDArray[np.generic]
TokenIds = Sequence[int] | NDArray[np.integer]

RECORDS: Final = StreamSpec("kv_records", content="bytes", tile_height=1, tile_width=1, merge_unit="frame")
"""One document a cache, in a frame of the cache's own name."""
TENSORS: Final[Mapping[str, StreamSpec]] = {
    "": STREAMS["kv_cache"],
    **{way: StreamSpec(f"kv_{way}", quantise=way, merge_unit="frame") for way in ("int8", "fp8", "fp16")},
}
"""Quantisation → the stream whose tiles are stored so."""
_FLOATS: Final = ("float16", "float32", "bfloat16")
_QUANTISE_OF: Final = {spec.name: way for way, spec in TENSORS.items()}
_VERSION: Final = 1
_TOKEN_BYTES: Final = 4
_FEW: Final = 16
"""Below one in so many, new places are put where they belong; above, all are sorted again."""


class Binding(msgspec.Struct, frozen=True):
    """What a cache is only good for: the model that made it. No field is empty.

    `model` and `tokenizer` are digests or exact names of the weights and the vocabulary; `positions` says how positions
    are put into keys (RoPE base and scaling); `dtype`, `layers`, `kv_heads` and `dim` are the cache's, a token.

    Raises:
        UsageError: an empty field.
        LimitError: a text longer than KV_BINDING_CHARS_MAX.
    """

    model: str
    tokenizer: str
    positions: str
    dtype: str
    layers: int
    kv_heads: int
    dim: int

    def __post_init__(self) -> None:
        for name, value in self.fields().items():
            if isinstance(value, str) and len(value) > KV_BINDING_CHARS_MAX:
                raise LimitError(f"the binding's {name} has more than {KV_BINDING_CHARS_MAX} characters")
            if not value.strip() if isinstance(value, str) else value < 1:
                raise UsageError(f"the binding's {name} is empty", fix="name every part: a cache fits one model alone")

    def fields(self) -> dict[str, str | int]:
        """Name → value."""
        return msgspec.structs.asdict(self)

    def digest(self) -> str:
        """Hex digest of all fields."""
        return blake3(b"him.kv.Binding" + msgspec.msgpack.encode(tuple(self.fields().items()))).hexdigest()

    def differences(self, other: "Binding") -> list[str]:
        """Names of the fields that differ."""
        theirs = other.fields()
        return [name for name, value in self.fields().items() if value != theirs[name]]


class Cache(NamedTuple):
    """What `load` gives: (layers, 2, kv heads, tokens, dim) and (tokens,) int64."""

    tensor: Array
    token_ids: NDArray[np.int64]


class Prefix(NamedTuple):
    """The cache that shares most: its frame, how many leading tokens, and how it is quantised ("" is lossless)."""

    frame: str
    tokens: int
    quantise: str


class Known(NamedTuple):
    """A cache as it is listed."""

    frame: str
    tokens: int
    quantise: str
    binding: Binding


class _Record(msgspec.Struct, frozen=True, array_like=True):
    """The document beside a cache: `tiles` are its blob_ids row by row, `tokens` uint32 that sort as bytes do."""

    version: int
    binding: Binding
    stream: str
    tiles: tuple[bytes, ...]
    tokens: bytes

    @property
    def count(self) -> int:
        """Tokens of the cache."""
        return len(self.tokens) // _TOKEN_BYTES


def save(
    handle: SnapshotHandle, name: str, tensor: Array, token_ids: TokenIds, binding: Binding, quantise: str = ""
) -> IngestReport:
    """Store a cache, or replace the one of that name, in one commit with its token ids and its binding.

    Tiles that are stored already, in whatever frame or branch, are not stored again: a cache that has grown costs its
    last incomplete tile and the new ones.

    Args:
        handle: an open snapshot; it moves to what was written.
        tensor: (layers, 2, kv heads, tokens, dim) of the binding's dtype.
        token_ids: one id a token, 0 … 2³² − 1.
        quantise: "" keeps every bit; "int8", "fp8" or "fp16" (where a tile's range does not fit: fp16, else lossless).

    Raises:
        UsageError: tensor, token ids and binding do not fit together.
        LimitError: more than KV_TOKENS_MAX tokens.
        SealedError: the snapshot is sealed.
        ConflictError: a stream of the quantisation's name is declared otherwise.
    """
    name = checked_name(name, what="frame")
    tokens = _token_bytes(token_ids)
    spec = _fitting(tensor, len(tokens) // _TOKEN_BYTES, binding, quantise)
    try:
        before = _record(handle.reader, name).stream
    except NotFoundError:
        before = spec.name

    def beside(cells: Mapping[Cell, Ref]) -> list[Beside]:
        tiles = tuple(name_of(cells[cell]) for cell in sorted(cells))
        record = _Record(_VERSION, binding, spec.name, tiles, tokens)
        made = [Beside(history.stream(RECORDS.name), name, msgspec.msgpack.encode(record))]
        # Saved otherwise quantised, it leaves the stream it was in.
        return made if before == spec.name else [*made, Beside(TENSORS[_QUANTISE_OF[before]], name, None)]

    history = handle.parts.history
    for needed in (spec, RECORDS):
        if needed.name not in STREAMS:
            history.declare_stream(needed)
    return handle.put_array(spec.name, tensor, frame=name, beside=beside)


def check(tensor: Array, token_ids: TokenIds, binding: Binding, quantise: str = "") -> None:
    """Refuse what `save` would refuse of these. Raises UsageError, LimitError."""
    _fitting(tensor, len(_token_bytes(token_ids)) // _TOKEN_BYTES, binding, quantise)


def load(handle: SnapshotHandle, name: str, binding: Binding, *, tokens: int | None = None) -> Cache:
    """A cache and its token ids, verified; with `tokens` the first so many, reading no tile beyond.

    Raises:
        NotFoundError: no such cache.
        DriftError: it is bound to another model; the message names the fields that differ.
        UsageError: fewer than one token asked for, or more than there are.
        ConflictError: its tiles were changed otherwise since it was saved, so that its token ids may be another's.
        IntegrityError: stored bytes are damaged.
    """
    reader = handle.reader
    record = _record(reader, name)
    _check_bound(record.binding, binding, name)
    count = record.count if tokens is None else tokens
    if not 1 <= count <= record.count:
        raise UsageError(f"the cache has {record.count} tokens; {count} are asked for", object=name)
    intact = _intact(reader, name, record)
    if intact is None:
        raise ConflictError(
            "the cache's tiles are not those its token ids were saved with", object=name, fix="save the cache again"
        )
    frame, tiles = intact
    shape = (binding.layers, 2, binding.kv_heads, count, binding.dim)
    whole: Array = np.empty(shape, dtype=DTYPES[binding.dtype])
    store = handle.parts.store

    def place(row: int) -> None:
        parts = [np.asarray(store.read_tile(ref)) for ref in tiles[row * frame.columns : (row + 1) * frame.columns]]
        band = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        top = row * frame.tile_height
        low = min(top + len(band), count)
        kv_tensor(band[: low - top], (*shape[:3], low - top, shape[4]), whole[:, :, :, top:low])

    rows = -(-count // frame.tile_height)
    store.spread(place, range(rows))
    reader.was_read(tiles[: rows * frame.columns])
    return Cache(whole, np.frombuffer(record.tokens, dtype=">u4", count=count).astype(np.int64))


def longest_prefix(handle: SnapshotHandle, token_ids: TokenIds, binding: Binding) -> Prefix | None:
    """The cache of the snapshot that has the longest common beginning with `token_ids`; None where none has a token.

    Exact on token ids and of any length. Of caches that share as much, the first by token ids is taken (so the one
    that ends there, if any), a lossless one before a quantised one, then by name.

    Raises:
        DriftError: there are caches, and all are bound to other models; the message names the fields that differ.
        UsageError, LimitError: these are no token ids.
        IntegrityError: a record is damaged.
    """
    wanted = _token_bytes(token_ids)
    reader = handle.reader
    orders = _orders_of(handle.parts.store).at(reader)
    order = orders.get(binding)
    if order is None:
        if orders:
            _check_bound(min(orders, key=lambda one: (len(one.differences(binding)), one.digest())), binding, handle.id)
        return None
    left: Sequence[_Place] = order
    while left:
        place, shared = _nearest(left, wanted)
        if not shared:
            return None
        if _intact(reader, place.frame, _record(reader, place.frame)) is not None:
            return Prefix(place.frame, shared, place.quantise)
        left = [one for one in left if one != place]
    return None


def caches(handle: SnapshotHandle) -> list[Known]:
    """The snapshot's caches by name. Raises IntegrityError."""
    reader = handle.reader
    found = [(frame.name, _record(reader, frame.name)) for frame in reader.frames(RECORDS.name)]
    return [Known(name, one.count, _QUANTISE_OF[one.stream], one.binding) for name, one in found]


# -- records


def _record(reader: SnapshotReader, name: str) -> _Record:
    """The record of a cache. Raises NotFoundError, IntegrityError."""
    try:
        document = reader.document(RECORDS.name, name)
    except NotFoundError as error:
        raise NotFoundError(
            f"the snapshot has no KV cache {name!r}", object=name, fix="list what there is: `him kv list`"
        ) from error
    return _parsed(document, name)


def _parsed(document: bytes, name: str) -> _Record:
    try:
        found = msgspec.msgpack.decode(document, type=_Record)
    except (*MALFORMED, UsageError) as error:
        raise IntegrityError(f"the record of a KV cache does not parse: {error}", object=name) from error
    if found.version != _VERSION:
        raise VersionError(f"the record of a KV cache has version {found.version}, this software knows {_VERSION}")
    if found.stream not in _QUANTISE_OF or not found.tokens or len(found.tokens) % _TOKEN_BYTES:
        raise IntegrityError("the record of a KV cache holds no cache", object=name)
    return found


def _intact(reader: SnapshotReader, name: str, record: _Record) -> tuple[Frame, list[Ref]] | None:
    """Frame and tiles of a cache, if these are what it was saved with; None when anything was put there since."""
    try:
        frame = reader.frame(record.stream, name)
    except NotFoundError:
        return None
    bound = record.binding
    extent = (record.count, bound.kv_heads * bound.dim, 2 * bound.layers, bound.dtype)
    if (frame.height, frame.width, frame.channels, frame.dtype) != extent:
        return None
    cells = [(row, column) for row in range(frame.rows) for column in range(frame.columns)]
    entries = [reader.entry(TileKey(record.stream, name, 0, row, column)) for row, column in cells]
    tiles = [one.ref for one in entries if one is not None]
    return (frame, tiles) if tuple(map(name_of, tiles)) == record.tiles and len(tiles) == len(entries) else None


def _check_bound(there: Binding, asked: Binding, name: str) -> None:
    differing = there.differences(asked)
    if differing:
        shown = "; ".join(f"{one}: {there.fields()[one]!r}, not {asked.fields()[one]!r}" for one in differing)
        fix = "use the model the cache was made with, or compute the cache anew"
        raise DriftError(f"bound to another model ({shown})", object=name, fix=fix)


def _token_bytes(token_ids: TokenIds) -> bytes:
    """Token ids as they are kept. Raises UsageError, LimitError."""
    if len(token_ids) > KV_TOKENS_MAX:
        raise LimitError(f"{len(token_ids)} tokens; at most {KV_TOKENS_MAX}")
    if not len(token_ids):
        return b""
    try:
        given = np.asarray(token_ids)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"these are no token ids: {error}", fix="give a list of integers") from error
    if given.ndim != 1 or given.dtype.kind not in "iu" or int(given.min()) < 0 or int(given.max()) >> 32:
        raise UsageError("token ids are integers from 0 to 2^32 - 1, in one row", fix="give a list of integers")
    return given.astype(">u4").tobytes()


def _fitting(tensor: Array, count: int, binding: Binding, quantise: str) -> StreamSpec:
    """The stream of a tensor that fits its binding and the number of its token ids. Raises UsageError."""
    spec = TENSORS.get(quantise)
    if spec is None:
        raise UsageError(f"unknown quantisation {quantise!r}", fix=f"use one of: {', '.join(filter(None, TENSORS))}")
    if dtype_name(tensor.dtype) not in _FLOATS:
        raise UsageError(f"a KV cache of {tensor.dtype} is not known", fix=f"use one of: {', '.join(_FLOATS)}")
    if dtype_name(tensor.dtype) != binding.dtype:
        raise UsageError(f"the tensor is {tensor.dtype}, its binding says {binding.dtype}")
    due = (binding.layers, 2, binding.kv_heads, count, binding.dim)
    if tensor.shape != due or not count:
        raise UsageError(
            f"binding and token ids tell of a tensor of shape {due}; got {tensor.shape}",
            fix="give (layers, 2, kv heads, tokens, dim), and one token id a token",
        )
    return spec


# -- order


class _Place(NamedTuple):
    """A cache in the order of token ids; `record` refers to its record."""

    tokens: bytes
    quantise: str
    frame: str
    record: bytes


_Order = dict[Binding, list[_Place]]


class _Orders:
    """The caches of directories lately searched, each binding's sorted by token ids.

    Whatever shares most with a row of token ids then stands beside the place where that row would stand. A directory
    near one that was searched is put in order by reading what differs.
    """

    def __init__(self, store: WarmStore) -> None:
        self._store = weakref.proxy(store)
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, _Order] = OrderedDict()

    def at(self, reader: SnapshotReader) -> _Order:
        """The order of the reader's directory; not to be changed."""
        with self._lock:
            known = self._kept.get(reader.directory)
            if known is None:
                last = next(reversed(self._kept), directory.EMPTY)
                known = self._moved(reader, last, self._kept.get(last, {}))
                self._kept[reader.directory] = known
                if len(self._kept) > KV_ORDERS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(reader.directory)
            return known

    def _moved(self, reader: SnapshotReader, last: bytes, before: _Order) -> _Order:
        differing = [
            (was or now, now)
            for was, now in directory.diff(self._store, last, reader.directory)
            if RECORDS.name in (one.stream for one in (was, now) if one is not None)
        ]
        gone = {frame.name for frame, _ in differing if frame is not None}
        order = {
            binding: [one for one in places if one.frame not in gone] if gone else list(places)
            for binding, places in before.items()
        }
        fresh: _Order = {}
        names = [now.name for _, now in differing if now is not None]
        for at in range(0, len(names), KV_RECORDS_AT_ONCE):
            part = names[at : at + KV_RECORDS_AT_ONCE]
            blobs = [reader.present(TileKey(RECORDS.name, name, 0, 0, 0)).ref for name in part]
            for name, blob, document in zip(part, blobs, self._store.read_tiles(blobs), strict=True):
                if not isinstance(document, bytes):
                    raise IntegrityError("the record of a KV cache is no document", object=name)
                record = _parsed(document, name)
                place = _Place(record.tokens, _QUANTISE_OF[record.stream], name, blob)
                fresh.setdefault(record.binding, []).append(place)
        for binding, places in fresh.items():
            into = order.setdefault(binding, [])
            if len(places) * _FEW < len(into):
                for place in places:
                    insort(into, place)
            else:
                into += places
                into.sort()
        return {binding: places for binding, places in order.items() if places}


_orders: "weakref.WeakKeyDictionary[WarmStore, _Orders]" = weakref.WeakKeyDictionary()


def _orders_of(store: WarmStore) -> _Orders:
    return _orders.setdefault(store, _Orders(store))


def _nearest(order: Sequence[_Place], wanted: bytes) -> tuple[_Place, int]:
    """The first place that shares most leading tokens with `wanted`, and how many."""
    at = bisect_left(order, (wanted,))
    shared = max(_shared(one.tokens, wanted) for one in order[max(0, at - 1) : at + 1])
    first = bisect_left(order, (wanted[: shared * _TOKEN_BYTES],))
    return order[min(first, len(order) - 1)], shared


def _shared(one: bytes, other: bytes) -> int:
    """How many leading tokens two rows of ids have in common."""
    count = min(len(one), len(other)) // _TOKEN_BYTES
    differ = np.frombuffer(one, dtype="u4", count=count) != np.frombuffer(other, dtype="u4", count=count)
    return int(differ.argmax()) if differ.any() else count
