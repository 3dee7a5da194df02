"""A tile as a change of another: changed blocks, XOR, or a patch; the smallest, unless another decodes faster.

Decoding checks sizes, counts and limits, so that damaged bytes end in an IntegrityError or in other values of the right
size. Whether they are the right values only the blob_id can tell: whoever decodes computes it again (docs/FORMAT.md,
"Deltas and chunks"; docs/design/004-deltas.md).
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from him.config import (
    CLIENT_DELTA_BYTES_MAX,
    COMPRESSION_SAMPLE_BYTES,
    DELTA_BLOCK_CELLS,
    DELTA_DEPTH_MAX,
    DELTA_FEW_BLOCKS_RATIO,
    DELTA_FEW_BYTES,
    DELTA_FLATTEN_RATIO,
    DELTA_LONG_BASE_BYTES,
    DELTA_TIE_RATIO,
    DELTA_TINY_BYTES,
    META_BYTES_MAX,
    RAW_BELOW_RATIO,
    TILE_BYTES_MAX,
    ZSTD_LEVEL,
)
from him.errors import IntegrityError, LimitError, UsageError
from him.tile import codec as tile_codec
from him.tile.address import KIND_TILE, blob_id
from him.tile.codec import DTYPES, RAW, SHUFFLE_ZSTD, ZSTD, TileHeader
from him.types import MALFORMED, TILE_PREFIX, BlobId, TileId, tile_id_text

BLOCKS: Final = 3
"""A bitmap of changed blocks and their new bytes."""
XOR: Final = 4
"""Base and target XORed, compressed."""
PATCH: Final = 5
"""A zstd frame whose window begins with the base (what `zstd --patch-from` makes)."""

DELTA_NAMES: Final = {BLOCKS: "blocks", XOR: "xor", PATCH: "patch"}

Bytes = bytes | memoryview
_Octets = NDArray[np.uint8]
_Mask = NDArray[np.bool_]
_Runs = NDArray[np.void]

_BITMAP_ALIGN_BYTES: Final = 16
"""A multiple of every itemsize, so that bitmap and blocks are shuffled as one."""
_ZSTD_GAIN_LOG: Final = 15
"""A zstd block takes 4 bytes or more and gives at most 128 KiB."""
_PREFIX_BYTES_MIN: Final = 8
"""Shorter bases are refused as prefixes by the compressor."""
_PROBES: Final = 16
_BLOB_HEX: Final = re.compile("[0-9a-f]{64}")


class Delta(NamedTuple):
    """A tile ready to be stored as a change of another."""

    codec: int
    stored: bytes


class Link(NamedTuple):
    """One delta of a chain, with the header of the tile it leads to."""

    header: TileHeader
    codec: int
    stored: Bytes


class Composed(NamedTuple):
    """A delta and what it changes: the root of the chain (`depth` 1), or the tile before."""

    delta: Delta
    depth: int


class ClientDelta(msgspec.Struct, frozen=True):
    """A delta made elsewhere: on which tile, what changes, and what must come out.

    `parent` is a tile id (`tl_…`), `header` the encoded TileHeader of the result, `blob_id` the result's, in hex.
    """

    parent: str
    header: bytes
    codec: int
    stored: bytes
    blob_id: str


class Applied(NamedTuple):
    """The verified result of a client's delta."""

    header: bytes
    payload: memoryview
    blob_id: BlobId


class _Grid(NamedTuple):
    """A payload as rows × columns cells of `cell` bytes; no rows where it has one axis and is never cut into blocks."""

    size: int
    itemsize: int
    rows: int
    columns: int
    cell: int

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.rows // DELTA_BLOCK_CELLS), -(-self.columns // DELTA_BLOCK_CELLS)

    @property
    def row_size(self) -> int:
        return self.columns * self.cell

    @property
    def run(self) -> int:
        """Neighbouring cells of a row that lie in one block wherever they begin: what is copied at a time."""
        return self.columns if self.columns < DELTA_BLOCK_CELLS else math.gcd(self.columns, DELTA_BLOCK_CELLS)

    def runs(self, values: _Octets) -> _Runs:
        """Shapes: (size,) → (rows, columns / run), a view."""
        return values.view(f"V{self.run * self.cell}").reshape(self.rows, self.columns // self.run)

    def runs_of(self, changed: _Mask) -> _Mask:
        """Which runs lie in changed blocks. Shapes: blocks → (rows, columns / run)."""
        tall = np.repeat(changed, DELTA_BLOCK_CELLS, axis=0)[: self.rows]
        if self.run in (self.columns, DELTA_BLOCK_CELLS):
            return tall
        return np.repeat(tall, DELTA_BLOCK_CELLS // self.run, axis=1)[:, : self.columns // self.run]


# -- encoding


def encode(header: TileHeader, base: Bytes, target: Bytes, full_size: int) -> Delta | None:
    """`target` as a change of `base`, both canonical payloads; None when it is better stored in full.

    Of the encodings that may win, the smallest is taken; of those within DELTA_TIE_RATIO of it (RAW_BELOW_RATIO for
    blocks stored raw), the one that decodes fastest. Where few blocks changed and take few bytes, only they are tried.

    Args:
        header: the target's. The base may have another size (a tile or document that grew).
        full_size: bytes the base takes when stored in full; above DELTA_FLATTEN_RATIO of it no delta is worth it.

    Raises:
        UsageError: a target that is not what its header says.
    """
    grid, old, new = _opened(header, base, target)
    limit = int(DELTA_FLATTEN_RATIO * full_size)
    found: list[Delta] = []  # fastest to decode first
    drifted, moved = header.dtype != "bytes" and len(old) == len(new), True
    if grid.rows:
        changed = _changed(grid, old, new)
        runs = grid.runs_of(changed)
        if _may_fit(grid, new, runs, limit):
            found.append(_blocks_delta(grid, changed, grid.runs(new)[runs]))
        few = _few(changed)
        if few and found and len(found[0].stored) <= DELTA_FEW_BYTES:
            return _best(found, limit)
        drifted = drifted and not few and _drifted(grid, old, new, runs, limit)
        moved = len(old) <= DELTA_LONG_BASE_BYTES or _moved(grid, old, new, changed)
    if moved and len(old) >= _PREFIX_BYTES_MIN:
        found.append(Delta(PATCH, _patch(base, target)))
    if drifted:
        found.append(Delta(XOR, _packed(old ^ new, grid.itemsize)[1]))
    return _best(found, limit)


def encode_as(codec: int, header: TileHeader, base: Bytes, target: Bytes) -> Delta:
    """`target` as a change of `base` in one given encoding, however large.

    Raises:
        UsageError: an encoding that these two tiles cannot have.
    """
    grid, old, new = _opened(header, base, target)
    if codec == BLOCKS and grid.rows:
        changed = _changed(grid, old, new)
        return _blocks_delta(grid, changed, grid.runs(new)[grid.runs_of(changed)])
    if codec == XOR and len(old) == len(new):
        return Delta(XOR, _packed(old ^ new, grid.itemsize)[1])
    if codec == PATCH and len(old) >= _PREFIX_BYTES_MIN:
        return Delta(PATCH, _patch(base, target))
    fix = "blocks need two axes, XOR equal sizes, a patch a base of 8 bytes"
    raise UsageError(f"codec {codec} cannot make {len(new)} bytes of {len(old)}", fix=fix)


def compose(
    header: TileHeader, root: Bytes, last: Callable[[], Bytes], target: Bytes, *, full_size: int, chain_size: int,
    depth: int,
) -> Composed | None:  # fmt: skip
    """How a tile follows a chain of deltas: tiny changes join into one delta on the chain's root.

    A chain of at most DELTA_TINY_BYTES is begun anew on its root when all changes together still fit in that. A chain
    of DELTA_DEPTH_MAX is begun anew whenever that is worth it. Else the chain grows by a delta on its last tile. None
    when the tile is better stored in full.

    Args:
        header: the target's.
        root: payload of the tile stored in full.
        last: gives the payload of the chain's last tile; only called when the chain grows (and then for `depth` > 0).
        full_size: bytes the root takes as stored.
        chain_size: bytes all deltas of the chain take.
        depth: how many they are; 0 when the last tile is the root itself.
    """
    anew = depth == 0 or depth >= DELTA_DEPTH_MAX
    if anew or chain_size <= DELTA_TINY_BYTES:
        joint = encode(header, root, target, full_size)
        if anew or (joint is not None and len(joint.stored) <= DELTA_TINY_BYTES):
            return None if joint is None else Composed(joint, 1)
    step = encode(header, last(), target, full_size)
    return None if step is None else Composed(step, depth + 1)


def merge(header: TileHeader, first: Bytes, second: Bytes) -> Delta:
    """Two block masks, a → b and b → c, as one, a → c, without any of the three tiles: the later replacement wins.

    Args:
        header: c's; b has the same shape and dtype.

    Raises:
        IntegrityError: stored bytes that are no block mask of such a tile.
    """
    grid = _grid(header)
    before, after = _read_blocks(grid, first), _read_blocks(grid, second)
    changed, runs = before.changed | after.changed, before.runs | after.runs
    replaced = np.empty(int(np.count_nonzero(runs)), dtype=before.replaced.dtype)
    for mask in (before, after):
        replaced[mask.runs[runs]] = mask.replaced
    return _blocks_delta(grid, changed, replaced)


# -- decoding


def decode(codec: int, header: TileHeader, base: Bytes, stored: Bytes) -> memoryview:
    """The payload of a tile stored as a change of `base`, read-only, in a buffer of its own.

    The blob_id is not checked here: the caller digests header and payload and compares.

    Args:
        header: the result's.
        base: canonical payload of the delta's base.

    Raises:
        IntegrityError: bytes that do not decode to the size the header names.
    """
    return decode_chain(base, [Link(header, codec, stored)])


def decode_chain(base: Bytes, links: Sequence[Link], *, in_place: bool = False) -> memoryview:
    """The payload at the end of a chain of deltas: one copy of the base, changed in place (a patch takes a new one).

    Without links it is the base itself.

    Args:
        in_place: the base is writable memory that the caller gives away: it is changed instead of a copy.

    Raises:
        IntegrityError: as `decode`; tiles between are not verified, only the last blob_id can be.
    """
    values, owned = np.frombuffer(base, dtype=np.uint8), in_place
    for header, codec, stored in links:
        grid = _grid(header)
        if grid.size > len(values) + (len(stored) << _ZSTD_GAIN_LOG):
            raise IntegrityError(f"{len(stored)} bytes of delta cannot make {grid.size} bytes")
        if codec == BLOCKS:
            values = _with_blocks(grid, values, stored, owned=owned)
        elif codec == XOR:
            values = _with_xor(grid, values, stored, owned=owned)
        elif codec == PATCH:
            values = _patched(grid, values, stored)
        else:
            raise IntegrityError(f"codec {codec} is no delta")
        owned = codec != PATCH
    return values.data.toreadonly()


# -- deltas made by clients


def make(parent: TileId, base: Bytes, header: bytes, target: Bytes) -> ClientDelta | None:
    """The client's side: `target` as a change of the parent's payload; None when it had better be sent in full.

    Args:
        parent: id of the tile whose payload `base` is.
        header: the encoded TileHeader of the target.
    """
    head = tile_codec.parse_header(header)
    full = tile_codec.compress(bytes(base), _grid(head).itemsize)[1]
    delta = encode(head, base, target, len(full))
    if delta is None:
        return None
    named = blob_id(KIND_TILE, header, memoryview(target)).hex()
    return ClientDelta(tile_id_text(parent), header, delta.codec, delta.stored, named)


def unpack(data: Bytes) -> ClientDelta:
    """A client's delta from MessagePack, with its fields' form and sizes checked.

    Raises:
        LimitError: longer than META_BYTES_MAX and CLIENT_DELTA_BYTES_MAX allow.
        UsageError: anything else that is no ClientDelta.
    """
    if len(data) > META_BYTES_MAX + CLIENT_DELTA_BYTES_MAX:
        raise LimitError(f"a client's delta of {len(data)} bytes", fix="send the tile in full")
    try:
        given = msgspec.msgpack.decode(data, type=ClientDelta)
    except MALFORMED as error:
        raise UsageError(f"not a client's delta: {error}") from error
    _check_form(given)
    return given


def apply(given: ClientDelta, base_header: bytes, base: Bytes) -> Applied:
    """The tile a client's delta makes of its parent, verified to be the one it names.

    Args:
        base_header: the encoded TileHeader of the parent, `base` its canonical payload.

    Raises:
        LimitError: larger than a limit in `him.config`.
        UsageError: fields that are malformed, or a result of another kind than the parent.
        IntegrityError: bytes that do not decode on this parent, or to another blob_id.
    """
    _check_form(given)
    parent = tile_codec.parse_header(base_header)
    try:
        header = tile_codec.parse_header(given.header)
        size = _grid(header).size
    except IntegrityError as error:
        raise UsageError(f"the delta's header is no tile header: {error.message}", object=given.parent) from error
    if msgspec.msgpack.encode(header) != given.header:
        raise UsageError("the delta's header is not in its shortest form", object=given.parent)
    kept = (parent.dtype, parent.logical, parent.quantise, len(parent.shape))
    if (header.dtype, header.logical, header.quantise, len(header.shape)) != kept:
        fix = "send a tile of another dtype or number of axes in full"
        raise UsageError("the delta would change what kind of tile its parent is", object=given.parent, fix=fix)
    try:
        payload = decode(given.codec, header, base, given.stored)
        if blob_id(KIND_TILE, given.header, payload).hex() != given.blob_id:
            raise IntegrityError(f"it makes {size} bytes with another blob_id")
        tile_codec.decode(given.header, RAW, bytes(payload))
    except IntegrityError as error:
        fix = "read the parent again, make the delta on what it holds, and send it once more"
        raise IntegrityError(f"the delta does not fit: {error.message}", object=given.parent, fix=fix) from error
    return Applied(given.header, payload, BlobId(bytes.fromhex(given.blob_id)))


def _check_form(given: ClientDelta) -> None:
    if len(given.header) > META_BYTES_MAX or len(given.stored) > CLIENT_DELTA_BYTES_MAX:
        raise LimitError(f"a client's delta of {len(given.stored)} bytes", fix="send the tile in full")
    if not given.parent.startswith(TILE_PREFIX) or not _BLOB_HEX.fullmatch(given.parent.removeprefix(TILE_PREFIX)):
        raise UsageError(f"not a tile id: {given.parent[:80]!r}", fix="name the parent as `tl_` and 64 hex digits")
    if not _BLOB_HEX.fullmatch(given.blob_id):
        raise UsageError(f"not a blob_id: {given.blob_id[:80]!r}", fix="name the result's blob_id as 64 hex digits")
    if given.codec not in DELTA_NAMES:
        known = ", ".join(f"{number} ({name})" for number, name in DELTA_NAMES.items())
        raise UsageError(f"codec {given.codec} is no delta", fix=f"use one of: {known}")


# -- shapes


def _grid(header: TileHeader) -> _Grid:
    """Raises IntegrityError for a header no tile has."""
    shape = header.shape
    if header.dtype == "bytes":
        itemsize, fits = 1, len(shape) == 1 and shape[0] >= 0
    else:
        itemsize = DTYPES[header.dtype].itemsize if header.dtype in DTYPES else 0
        fits = itemsize > 0 and 1 <= len(shape) <= 4 and min(shape) > 0
    size = itemsize * math.prod(shape) if fits else 0  # the product of very many would take very long
    if not fits or size > TILE_BYTES_MAX:
        raise IntegrityError(f"a tile header names dtype {header.dtype[:40]!r} and shape {shape[:5]}")
    if len(shape) == 1:
        return _Grid(size, itemsize, 0, 0, itemsize)
    return _Grid(size, itemsize, shape[0], shape[1], itemsize * math.prod(shape[2:]))


def _opened(header: TileHeader, base: Bytes, target: Bytes) -> tuple[_Grid, _Octets, _Octets]:
    grid = _grid(header)
    if len(target) != grid.size:
        raise UsageError(f"the header names {grid.size} bytes, the payload has {len(target)}")
    return grid, np.frombuffer(base, dtype=np.uint8), np.frombuffer(target, dtype=np.uint8)


# -- changed blocks


def _changed(grid: _Grid, old: _Octets, new: _Octets) -> _Mask:
    """Which blocks differ; those that reach beyond the old payload's whole rows count as changed."""
    rows = min(grid.rows, len(old) // grid.row_size)
    step = DELTA_BLOCK_CELLS * grid.cell
    word = math.gcd(grid.row_size, step, 8)
    words, even = grid.row_size // word, rows // DELTA_BLOCK_CELLS
    before, after = (values[: rows * grid.row_size].view(f"u{word}").reshape(rows, words) for values in (old, new))
    differ = before != after
    lines = np.empty((-(-rows // DELTA_BLOCK_CELLS), words), dtype=np.bool_)
    whole = differ[: even * DELTA_BLOCK_CELLS].reshape(even, DELTA_BLOCK_CELLS, words)
    np.logical_or.reduce(whole, axis=1, out=lines[:even])
    if even < len(lines):
        np.logical_or.reduce(differ[even * DELTA_BLOCK_CELLS :], axis=0, out=lines[even])
    changed = np.ones(grid.blocks, dtype=np.bool_)
    changed[: len(lines)] = np.logical_or.reduceat(lines, np.arange(0, words, step // word), axis=1)
    if rows < grid.rows:
        changed[even:] = True
    return changed


def _few(changed: _Mask) -> bool:
    return int(np.count_nonzero(changed)) <= DELTA_FEW_BLOCKS_RATIO * changed.size


def _with_bitmap(changed: _Mask, replaced: _Runs) -> _Octets:
    """Bitmap, zeros up to _BITMAP_ALIGN_BYTES, then the changed blocks' runs in the payload's order."""
    bits = np.packbits(changed, bitorder="little")
    values = np.zeros(_bitmap_size(changed.size) + replaced.nbytes, dtype=np.uint8)
    values[: len(bits)] = bits
    values[_bitmap_size(changed.size) :] = replaced.view(np.uint8)
    return values


def _bitmap_size(blocks: int) -> int:
    return -(-blocks // (8 * _BITMAP_ALIGN_BYTES)) * _BITMAP_ALIGN_BYTES


def _blocks_delta(grid: _Grid, changed: _Mask, replaced: _Runs) -> Delta:
    values = _with_bitmap(changed, replaced)
    if not _few(changed):
        codec, packed = tile_codec.compress(values.tobytes(), grid.itemsize)
        return Delta(BLOCKS, b"".join((bytes([codec]), packed)))
    # Few blocks unpack in less time than the base takes to copy: any gain is taken.
    codec, packed = _packed(values, grid.itemsize)
    if len(values) <= DELTA_TIE_RATIO * len(packed):
        codec, packed = RAW, values.tobytes()
    return Delta(BLOCKS, bytes([codec]) + packed)


class _Blocks(NamedTuple):
    """A block mask as read: which blocks, the same as runs, and the runs' new bytes."""

    changed: _Mask
    runs: _Mask
    replaced: _Runs


def _read_blocks(grid: _Grid, stored: Bytes) -> _Blocks:
    if not grid.rows or len(stored) < 2:
        raise IntegrityError(f"{len(stored)} bytes are no block mask of this tile")
    codec, body = stored[0], memoryview(stored)[1:]
    count, head = math.prod(grid.blocks), _bitmap_size(math.prod(grid.blocks))
    if codec == RAW:
        values = np.frombuffer(body, dtype=np.uint8)
    else:
        size = _content_size(body)
        if size > head + grid.size or size % grid.itemsize:
            raise IntegrityError(f"a block mask holds {size} bytes")
        values = np.frombuffer(tile_codec.decompress(codec, bytes(body), size, grid.itemsize), dtype=np.uint8)
    bits = np.unpackbits(values[:head], bitorder="little")
    if len(bits) != 8 * head or (len(bits) > count and bits[count:].any()):
        raise IntegrityError("a block mask names blocks the tile does not have")
    changed = bits[:count].view(np.bool_).reshape(grid.blocks)
    runs = grid.runs_of(changed)
    due = _size_of(grid, runs)
    if len(values) - head != due:
        raise IntegrityError(f"a block mask holds {len(values) - head} bytes of blocks where {due} are due")
    return _Blocks(changed, runs, values[head:].view(f"V{grid.run * grid.cell}"))


def _with_blocks(grid: _Grid, old: _Octets, stored: Bytes, *, owned: bool) -> _Octets:
    mask = _read_blocks(grid, stored)
    if len(old) < grid.size and not mask.changed[len(old) // grid.row_size // DELTA_BLOCK_CELLS :].all():
        raise IntegrityError("a block mask keeps blocks beyond the end of its base")
    if owned and len(old) == grid.size:
        new = old
    else:
        new = np.empty(grid.size, dtype=np.uint8)
        new[: len(old)] = old[: grid.size]
    grid.runs(new)[mask.runs] = mask.replaced
    return new


# -- XOR


def _drifted(grid: _Grid, old: _Octets, new: _Octets, runs: _Mask, limit: int) -> bool:
    """Whether changed runs are smaller as XOR than as they are, and small enough, by a sample of them."""
    before, after = _sample(grid, old, runs), _sample(grid, new, runs)
    plain, drift = (len(_packed(values, grid.itemsize)[1]) for values in (after, before ^ after))
    return drift * DELTA_TIE_RATIO < plain and drift * _size_of(grid, runs) <= 2 * limit * len(after)


def _with_xor(grid: _Grid, old: _Octets, stored: Bytes, *, owned: bool) -> _Octets:
    if len(old) != grid.size:
        raise IntegrityError(f"XOR of {grid.size} bytes with a base of {len(old)}")
    codec = SHUFFLE_ZSTD if grid.itemsize > 1 else ZSTD
    values = np.frombuffer(tile_codec.decompress(codec, bytes(stored), grid.size, grid.itemsize), dtype=np.uint8)
    return np.bitwise_xor(old, values, out=old if owned else None)


# -- patches: the one place that knows how zstd is given a prefix


def _patch(base: Bytes, target: Bytes) -> bytes:
    """A zstd frame of `target` that may refer to `base`.

    A short base fills one hash table of every third position (as fast as storing in full, and as small as level 3);
    of a long one that table would not stay in the cache, and long-distance matching takes over.
    """
    import pyzstd  # takes longer to import than the whole of this room; decoding does without it

    known = pyzstd.CParameter
    options: dict[int, int] = {known.compressionLevel: ZSTD_LEVEL, known.windowLog: _window_log(base, len(target))}
    if len(base) > DELTA_LONG_BASE_BYTES:
        options[known.enableLongDistanceMatching] = 1
    else:
        options |= {known.minMatch: 6, known.hashLog: max(_WINDOW_LOG_MIN, len(base).bit_length() - 2)}
    return pyzstd.compress(target, options, pyzstd.ZstdDict(base, is_raw=True).as_prefix)


def _patched(grid: _Grid, old: _Octets, stored: Bytes) -> _Octets:
    # The other library gives a prefix to one-shot decoding too, and twice as fast: as a dictionary of raw content.
    try:
        if zstandard.frame_content_size(stored) != grid.size:
            raise IntegrityError(f"a patch does not hold the {grid.size} bytes that are due")
        prefix = zstandard.ZstdCompressionDict(old.data, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        window = 1 << _window_log(old.data, grid.size)
        unpacker = zstandard.ZstdDecompressor(dict_data=prefix, max_window_size=window)
        payload = unpacker.decompress(stored, max_output_size=grid.size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"a patch does not decompress: {error}") from error
    if len(payload) != grid.size:
        raise IntegrityError(f"a patch gave {len(payload)} bytes where {grid.size} are due")
    return np.frombuffer(payload, dtype=np.uint8)


_WINDOW_LOG_MIN: Final = 10


def _window_log(base: Bytes, size: int) -> int:
    """The window that reaches from the last byte of the target back to the first of the base."""
    return max(_WINDOW_LOG_MIN, (len(base) + size - 1).bit_length())


def _moved(grid: _Grid, old: _Octets, new: _Octets, changed: _Mask) -> bool:
    """Whether half of _PROBES changed cells stand elsewhere in their column or row of the base (by 8 bytes of each).

    A patch of a long base costs as much as storing the tile, so this is asked first. Diagonal moves go unseen.
    """
    rows, words = len(old) // grid.row_size, (grid.row_size - 8) // grid.cell + 1
    if not rows or grid.row_size < 8:
        return True
    strides = (grid.row_size, grid.cell)
    before = np.ndarray((rows, words), "<u8", old.data, 0, strides)
    after = np.ndarray((grid.rows, words), "<u8", new.data, 0, strides)
    blocks = np.argwhere(changed)
    hits = 0
    for at in range(_PROBES):
        y, x = (int(i) * DELTA_BLOCK_CELLS + DELTA_BLOCK_CELLS // 2 for i in blocks[len(blocks) * at // _PROBES])
        y, x = min(y, grid.rows - 1), min(x, words - 1)
        found = np.count_nonzero(before[:, x] == after[y, x])
        if y < rows:
            found += np.count_nonzero(before[y] == after[y, x]) - 2 * int(before[y, x] == after[y, x])
        hits += int(found > 0)
    return hits >= _PROBES // 2


# -- sizes


def _best(found: Sequence[Delta], limit: int) -> Delta | None:
    """The first of those nearly as small as the smallest; None when all are above the limit."""
    worth = [delta for delta in found if len(delta.stored) <= limit]
    least = min((len(delta.stored) for delta in worth), default=0)
    return next((delta for delta in worth if len(delta.stored) <= _tie_ratio(delta) * least), None)


def _tie_ratio(delta: Delta) -> float:
    """How much larger than another a delta may be that decodes faster; what is raw is hardly decoded at all."""
    return RAW_BELOW_RATIO if delta.codec == BLOCKS and delta.stored[0] == RAW else DELTA_TIE_RATIO


def _packed(values: _Octets, itemsize: int) -> tuple[int, bytes]:
    codec = SHUFFLE_ZSTD if itemsize > 1 else ZSTD
    planes = np.ascontiguousarray(values.reshape(-1, itemsize).T) if itemsize > 1 else values
    return codec, zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False).compress(planes.data)


def _may_fit(grid: _Grid, new: _Octets, runs: _Mask, limit: int) -> bool:
    """Whether changed runs may compress to `limit`: if they are long, a sample must come within twice of it."""
    size = _size_of(grid, runs)
    if size <= max(limit, COMPRESSION_SAMPLE_BYTES):
        return True
    sample = _sample(grid, new, runs)
    return len(_packed(sample, grid.itemsize)[1]) * size <= 2 * limit * len(sample)


def _sample(grid: _Grid, values: _Octets, runs: _Mask) -> _Octets:
    """A quarter of COMPRESSION_SAMPLE_BYTES of the changed runs, from four places."""
    where = np.flatnonzero(runs)
    many = max(1, COMPRESSION_SAMPLE_BYTES // 16 // (grid.run * grid.cell))
    picked = np.concatenate([where[len(where) * part // 4 :][:many] for part in range(4)])
    return grid.runs(values).reshape(-1)[picked].view(np.uint8)


def _size_of(grid: _Grid, runs: _Mask) -> int:
    return int(np.count_nonzero(runs)) * grid.run * grid.cell


def _content_size(frame: Bytes) -> int:
    try:
        size = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"stored bytes are no zstd frame: {error}") from error
    if size < 0:
        raise IntegrityError("a zstd frame does not name its size")
    return size
