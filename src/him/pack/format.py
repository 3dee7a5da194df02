"""The bytes of a pack: file header, records, index records, footer and trailer (docs/FORMAT.md).

Every byte is covered: headers carry their own digest, payloads are digested in their header, padding is zero.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import FORMAT_VERSION, META_BYTES_MAX, PACK_ALIGN_BYTES, PAYLOAD_ALIGN_BYTES, PAYLOAD_ALIGN_FROM_BYTES
from him.errors import IntegrityError, VersionError
from him.tile.address import KIND_NAMES, blob_id
from him.types import BlobId

FILE_HEADER_BYTES: Final = 128
RECORD_HEADER_BYTES: Final = 256
TRAILER_BYTES: Final = 128
_FILE_MAGIC: Final = b"HIMPACK\x01"
_RECORD_MAGIC: Final = b"HREC"
_TRAILER_MAGIC: Final = b"HIMPKEND"
_NO_ID: Final = bytes(16)
_RAW: Final = 0
"""The codec of payloads stored as they are (`tile.codec.RAW`)."""
_CODEC_MAX: Final = 6
"""The last one there is (`tile.chunks.CHUNKS`)."""

# magic, version, kind, codec, header length, padding length, stored length, raw length, blob_id, stored digest,
# delta base, delta depth, flags, reserved, key id, nonce, origin, parity group, reserved
_RECORD: Final = struct.Struct("<4sHBBIIQQ32s32s32sBB6s16s24s16s16s16s")
_FILE: Final = struct.Struct("<8sH6s16s16s16s16s16s")
_TRAILER: Final = struct.Struct("<8sQQ32s8s")

ROW: Final = np.dtype(
    [("blob", "u1", 32), ("offset", "<u8"), ("length", "<u8"), ("kind", "u1"), ("depth", "u1"), ("zero", "u1", 6)]
)
"""A row of an index record or footer: 56 bytes, sorted by blob, then offset."""
Rows = NDArray[np.void]
"""A table of `ROW`."""


class RecordHeader(NamedTuple):
    """The fixed part of a record; `key_id` and `nonce` are zero where it is not encrypted, flags and group always."""

    kind: int
    codec: int
    meta_size: int
    pad_size: int
    stored_size: int
    raw_size: int
    blob_id: BlobId
    stored_digest: bytes
    delta_base: bytes
    delta_depth: int
    flags: int
    key_id: bytes
    nonce: bytes
    origin: bytes
    parity_group: bytes
    digest: bytes

    @property
    def record_size(self) -> int:
        """Bytes from the record's first to its last, without what aligns the next one."""
        return RECORD_HEADER_BYTES + self.meta_size + self.pad_size + self.stored_size


class Record(NamedTuple):
    """A verified record; `stored` is a view of the bytes it was read from."""

    header: RecordHeader
    meta: bytes
    stored: memoryview


class Draft(NamedTuple):
    """What a record will hold, before its place is known. A delta names the blob it changes and its depth.

    With a `key_id` it is encrypted already (`pack.encrypted`).
    """

    kind: int
    codec: int
    blob_id: BlobId
    meta: bytes
    stored: bytes | memoryview
    raw_size: int
    origin: bytes = _NO_ID
    delta_base: bytes = bytes(32)
    delta_depth: int = 0
    key_id: bytes = _NO_ID
    nonce: bytes = bytes(24)


class Encoded(NamedTuple):
    """A record for one place: the bytes to append there, the header's digest, its size without what aligns the next."""

    parts: tuple[bytes | memoryview, ...]
    digest: bytes
    size: int


def aligned(offset: int, to: int = PACK_ALIGN_BYTES) -> int:
    """`offset` rounded up to a multiple of `to`."""
    return -(-offset // to) * to


def encode_file_header(repository_id: bytes, pack_id: bytes) -> bytes:
    """FILE_HEADER_BYTES that open a pack; both ids are 16 bytes."""
    head = _FILE.pack(_FILE_MAGIC, FORMAT_VERSION, bytes(6), repository_id, pack_id, _NO_ID, _NO_ID, _NO_ID)
    return head + blake3(head).digest()[: FILE_HEADER_BYTES - len(head)]


def check_file_header(data: bytes, place: str) -> None:
    """Raises IntegrityError for damage and VersionError for a format of the future."""
    head, digest = data[: _FILE.size], data[_FILE.size : FILE_HEADER_BYTES]
    if len(data) < FILE_HEADER_BYTES or blake3(head).digest()[: len(digest)] != digest or head[:8] != _FILE_MAGIC:
        raise IntegrityError("damaged pack header", place=f"{place} @ 0")
    if int.from_bytes(head[8:10], "little") > FORMAT_VERSION:
        raise VersionError("the pack was written by a newer format", place=place)


def repository_of(data: bytes) -> bytes:
    """Whose pack it is: the 16 bytes in a file header that `check_file_header` let pass."""
    return data[16:32]


def pack_of(data: bytes) -> bytes:
    """Its own id: the 16 bytes in a file header that `check_file_header` let pass."""
    return data[32:48]


def may_grow(data: bytes, repository_id: bytes) -> bool:
    """Whether a file header is one to write records behind: this repository's, sound and of no newer format."""
    try:
        check_file_header(data, "")
    except (IntegrityError, VersionError):
        return False
    return repository_of(data) == repository_id


def encode_record(offset: int, draft: Draft) -> Encoded:
    """The record as it stands at `offset`, with zeros up to the next aligned offset.

    Large raw payloads are aligned to pages of memory, so that they can be mapped.
    """
    meta, stored = draft.meta, draft.stored
    start = offset + RECORD_HEADER_BYTES + len(meta)
    raw = draft.codec == _RAW and draft.key_id == _NO_ID
    align = PAYLOAD_ALIGN_BYTES if raw and len(stored) >= PAYLOAD_ALIGN_FROM_BYTES else 1
    pad = aligned(start, align) - start
    fixed = _RECORD.pack(
        _RECORD_MAGIC, FORMAT_VERSION, draft.kind, draft.codec, len(meta), pad, len(stored), draft.raw_size,
        draft.blob_id, draft.blob_id if raw else blake3(stored).digest(), draft.delta_base,
        draft.delta_depth, 0, bytes(6), draft.key_id, draft.nonce, draft.origin, _NO_ID, bytes(16),
    )  # fmt: skip
    digest = blake3(fixed + meta).digest()
    size = RECORD_HEADER_BYTES + len(meta) + pad + len(stored)
    return Encoded(
        (fixed + digest + meta + bytes(pad), stored, bytes(-(offset + size) % PACK_ALIGN_BYTES)), digest, size
    )


def decode_header(data: bytes | memoryview, place: str) -> RecordHeader:
    """The fixed header at the start of `data` (digest and version are checked in `decode_record`, with the meta).

    Raises:
        IntegrityError: too short, no magic, or sizes beyond all limits.
    """
    if len(data) < RECORD_HEADER_BYTES or data[:4] != _RECORD_MAGIC:
        raise IntegrityError("no record header here", place=place)
    (
        _, _, kind, codec, meta, pad, stored, raw, blob, digest, base, depth, flags, _, key, nonce, origin, group, _,
    ) = _RECORD.unpack_from(data)  # fmt: skip
    if meta > META_BYTES_MAX or pad > PAYLOAD_ALIGN_BYTES or stored > 2**32:
        raise IntegrityError("record header names impossible sizes", place=place)
    own = bytes(data[_RECORD.size : RECORD_HEADER_BYTES])
    return RecordHeader(
        kind, codec, meta, pad, stored, raw, BlobId(blob), digest, base, depth, flags, key, nonce, origin, group, own
    )


def header_verifies(data: bytes | memoryview) -> bool:
    """Whether `data` begins with a record header whose digest, meta included, holds."""
    try:
        header = decode_header(data, "")
    except IntegrityError:
        return False
    return _header_digest(data, header) == header.digest


def decode_record(data: bytes | memoryview, place: str, expect: BlobId | None = None, *, digest: bool = True) -> Record:
    """The verified record at the start of `data`, whose payload is not copied.

    Args:
        expect: the blob_id it must bear, so that a misplaced record cannot pass.
        digest: False leaves the payload's digest to a caller who digests what is made of it.

    Raises:
        IntegrityError: any byte of header, meta, padding or payload that is not as digested.
        VersionError: a record of a newer format (its header verifies, so that it is no damage): its version, a flag, a
            kind or a codec is not known.
    """
    header = decode_header(data, place)
    body = RECORD_HEADER_BYTES + header.meta_size
    if _header_digest(data, header) != header.digest:
        raise IntegrityError("record header does not match its digest", object=header.blob_id.hex(), place=place)
    if data[4] | data[5] << 8 > FORMAT_VERSION:
        raise VersionError("the record was written by a newer format", object=header.blob_id.hex(), place=place)
    if header.flags:
        raise VersionError("the record has a flag of a newer format", object=header.blob_id.hex(), place=place)
    if header.kind not in KIND_NAMES or header.codec > _CODEC_MAX:
        told = f"kind {header.kind}" if header.kind not in KIND_NAMES else f"codec {header.codec}"
        raise VersionError(f"the record is of a newer format ({told})", object=header.blob_id.hex(), place=place)
    if expect is not None and header.blob_id != expect:
        raise IntegrityError(
            f"another record lies here ({header.blob_id.hex()[:12]}…)", object=expect.hex(), place=place
        )
    meta = bytes(data[RECORD_HEADER_BYTES:body])
    stored = memoryview(data)[body + header.pad_size : body + header.pad_size + header.stored_size]
    if len(stored) != header.stored_size or (digest and _stored_digest(header, meta, stored) != header.stored_digest):
        raise IntegrityError("stored bytes do not match their digest", object=header.blob_id.hex(), place=place)
    if bytes(data[body : body + header.pad_size]).count(0) != header.pad_size:
        raise IntegrityError("padding is not zero", object=header.blob_id.hex(), place=place)
    return Record(header, meta, stored)


def _header_digest(data: bytes | memoryview, header: RecordHeader) -> bytes:
    fixed, end = memoryview(data)[: _RECORD.size], RECORD_HEADER_BYTES + header.meta_size
    return blake3(b"".join((fixed, memoryview(data)[RECORD_HEADER_BYTES:end]))).digest()


def _stored_digest(header: RecordHeader, meta: bytes, stored: memoryview) -> bytes:
    """A payload stored as it is is covered by the blob_id itself: it is digested once, not twice."""
    if header.codec == _RAW and not any(header.key_id):
        return blob_id(header.kind, meta, stored)
    return blake3(stored).digest()


def rows_of(rows: Sequence[tuple[bytes, int, int, int, int]]) -> Rows:
    """Rows (blob_id, offset, length, kind, delta depth) as a table, in the order given."""
    table = np.zeros(len(rows), dtype=ROW)
    if rows:
        table["blob"] = np.frombuffer(b"".join(row[0] for row in rows), dtype=np.uint8).reshape(-1, 32)
        table["offset"] = [row[1] for row in rows]
        table["length"] = [row[2] for row in rows]
        table["kind"] = [row[3] for row in rows]
        table["depth"] = [row[4] for row in rows]
    return table


def encode_rows(table: Rows) -> bytes:
    """An index record's payload: the rows sorted by blob_id, then offset."""
    if not len(table):
        return b""
    words = np.ascontiguousarray(table["blob"]).view(">u8")
    return table[np.lexsort((table["offset"], *(words[:, i] for i in reversed(range(4)))))].tobytes()


def decode_rows(payload: bytes | memoryview, place: str) -> Rows:
    """Inverse of `encode_rows`. Raises IntegrityError for a torn table."""
    if len(payload) % ROW.itemsize:
        raise IntegrityError("index rows are torn", place=place)
    return np.frombuffer(payload, dtype=ROW)


def encode_trailer(footer_offset: int, footer_size: int, merkle_root: bytes) -> bytes:
    """TRAILER_BYTES that end a finished pack."""
    head = _TRAILER.pack(_TRAILER_MAGIC, footer_offset, footer_size, merkle_root, bytes(8))
    fill = TRAILER_BYTES - len(head) - 32
    return head + blake3(head).digest() + bytes(fill)


def decode_trailer(data: bytes, place: str) -> tuple[int, int, bytes]:
    """(footer offset, footer size, Merkle root). Raises IntegrityError for damage."""
    head, digest, fill = data[: _TRAILER.size], data[_TRAILER.size : _TRAILER.size + 32], data[_TRAILER.size + 32 :]
    if len(data) != TRAILER_BYTES or blake3(head).digest() != digest or fill.count(0) != len(fill):
        raise IntegrityError("damaged pack trailer", object=place.partition(" @ ")[0], place=place)
    _, offset, size, merkle_root, _ = _TRAILER.unpack(head)
    return offset, size, merkle_root
