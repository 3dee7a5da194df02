"""Values ↔ bytes of one tile: canonical form, optional quantisation, and a codec chosen by measurement.

The canonical form (which the blob_id is made of) is a small msgpack header and the little-endian C-order
values; the codec only decides how those are stored, so identity never depends on compression.
"""

from typing import Final

import ml_dtypes
import msgspec
import numpy as np
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

from him.config import COMPRESSION_SAMPLE_BYTES, RAW_BELOW_RATIO, TILE_BYTES_MAX, ZSTD_LEVEL
from him.errors import IntegrityError, LimitError, UsageError
from him.tile.address import KIND_TILE, blob_id
from him.types import BlobId

RAW: Final = 0
ZSTD: Final = 1
SHUFFLE_ZSTD: Final = 2
"""Bytes of equal significance side by side, then zstd (floats of 2, 4 or 8 bytes)."""

CODEC_NAMES: Final = {RAW: "raw", ZSTD: "zstd", SHUFFLE_ZSTD: "shuffle+zstd"}

_NUMPY_DTYPES: Final = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
DTYPES: Final[dict[str, np.dtype[np.generic]]] = {name: np.dtype(name).newbyteorder("<") for name in _NUMPY_DTYPES} | {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_FP8_MAX: Final = 448.0
_FP16_RANGE: Final = (2.0**-14, 65504.0)
"""Smallest normal and largest float16: a tile whose peak lies within loses at most 2^-11 of it."""


class TileHeader(msgspec.Struct, frozen=True, array_like=True):
    """What is needed to read a tile's values: part of its identity.

    `dtype` "bytes" is an opaque document. `logical` is the dtype handed back; with `quantise` "int8" or "fp8"
    `scales` holds one float32 per channel (last axis of three, else a single one).
    """

    dtype: str
    shape: tuple[int, ...]
    logical: str = ""
    quantise: str = ""
    scales: bytes = b""


class EncodedTile(msgspec.Struct, frozen=True):
    """A tile ready to be stored."""

    blob_id: BlobId
    header: bytes
    codec: int
    stored: bytes
    raw_size: int


def encode_array(array: NDArray[np.generic], *, quantise: str = "") -> EncodedTile:
    """Encode an array of 1–4 dimensions.

    Args:
        array: any dtype of `DTYPES`.
        quantise: "", "fp16", "int8" or "fp8"; ignored for arrays that are not floats. Falls back to fp16, then to
            lossless, where the range does not fit.

    Raises:
        UsageError: a dtype or number of dimensions that cannot be stored.
        LimitError: larger than TILE_BYTES_MAX.
    """
    name = dtype_name(array.dtype)
    if not 1 <= array.ndim <= 4 or 0 in array.shape:
        raise UsageError(f"a tile has 1 to 4 dimensions, none of them 0; got shape {array.shape}")
    if array.nbytes > TILE_BYTES_MAX:
        raise LimitError(f"a tile holds at most {TILE_BYTES_MAX} bytes; got {array.nbytes}")
    values, header = _quantised(array, name, quantise)
    payload = np.ascontiguousarray(values, dtype=DTYPES[header.dtype]).tobytes()
    return _encode(header, payload, itemsize=DTYPES[header.dtype].itemsize)


def encode_bytes(document: bytes) -> EncodedTile:
    """Encode an opaque document. Raises LimitError above TILE_BYTES_MAX."""
    if len(document) > TILE_BYTES_MAX:
        raise LimitError(f"a document holds at most {TILE_BYTES_MAX} bytes; got {len(document)}")
    return _encode(TileHeader("bytes", (len(document),)), document, itemsize=1)


def decode(
    header: bytes, codec: int, stored: bytes | memoryview, *, expect: BlobId | None = None
) -> NDArray[np.generic] | bytes:
    """Values of a stored tile, read-only (those stored raw in the memory they were read into); a document as bytes.

    Args:
        expect: when given, the canonical bytes are digested again and must have this blob_id.

    Raises:
        IntegrityError: bytes that do not decode to the size the header names, or another blob_id.
    """
    try:
        head = msgspec.msgpack.decode(header, type=TileHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(f"tile header does not parse: {error}") from error
    size = _payload_size(head)
    itemsize = 1 if head.dtype == "bytes" else DTYPES[head.dtype].itemsize
    payload = decompress(codec, stored, size, itemsize)
    if expect is not None and blob_id(KIND_TILE, header, payload) != expect:
        raise IntegrityError("decoded bytes have another blob_id", object=expect.hex())
    if head.dtype == "bytes":
        return bytes(payload)
    values = np.frombuffer(payload, dtype=DTYPES[head.dtype]).reshape(head.shape)
    if not values.flags.aligned:
        values = values.copy()
    values.flags.writeable = False
    return _dequantised(values, head)


def shape_and_dtype(header: bytes) -> tuple[tuple[int, ...], str]:
    """Shape and logical dtype a stored tile decodes to, without its values."""
    head = msgspec.msgpack.decode(header, type=TileHeader)
    return head.shape, head.logical or head.dtype


def dtype_name(dtype: np.dtype[np.generic]) -> str:
    """The name a dtype is stored under. Raises UsageError for objects, strings and records."""
    name = dtype.name
    if name not in DTYPES:
        raise UsageError(f"dtype {name} cannot be stored", fix=f"use one of: {', '.join(DTYPES)}")
    return name


def compress(payload: bytes, itemsize: int) -> tuple[int, bytes]:
    """(codec, stored bytes): raw when a sample gains less than RAW_BELOW_RATIO."""
    codec = SHUFFLE_ZSTD if itemsize > 1 else ZSTD
    if len(payload) > 4 * COMPRESSION_SAMPLE_BYTES:
        quarter = COMPRESSION_SAMPLE_BYTES // 4
        step = len(payload) // 4 // itemsize * itemsize
        sample = b"".join(payload[i * step : i * step + quarter] for i in range(4))
        if len(sample) < RAW_BELOW_RATIO * len(_pack(codec, sample, itemsize)):
            return RAW, payload
    stored = _pack(codec, payload, itemsize)
    return (codec, stored) if len(payload) >= RAW_BELOW_RATIO * len(stored) else (RAW, payload)


def decompress(codec: int, stored: bytes | memoryview, size: int, itemsize: int) -> bytes | memoryview:
    """Inverse of `compress`: exactly `size` bytes, else IntegrityError."""
    try:
        if codec != RAW and zstandard.frame_content_size(stored) != size:
            # Asked before unpacking: a frame that names its size is unpacked whole, whatever the limit.
            raise IntegrityError(f"stored bytes do not hold the {size} bytes that are due")
        payload = stored if codec == RAW else zstandard.ZstdDecompressor().decompress(stored, max_output_size=size)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"stored bytes do not decompress: {error}") from error
    if len(payload) != size or codec not in CODEC_NAMES:
        raise IntegrityError(f"codec {codec} gave {len(payload)} bytes where {size} are due")
    if codec == SHUFFLE_ZSTD:
        planes = np.frombuffer(payload, dtype=np.uint8).reshape(itemsize, size // itemsize)
        return planes.T.tobytes()
    return payload


def _pack(codec: int, payload: bytes, itemsize: int) -> bytes:
    if codec == SHUFFLE_ZSTD:
        planes = np.frombuffer(payload, dtype=np.uint8).reshape(len(payload) // itemsize, itemsize)
        payload = planes.T.tobytes()
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False).compress(payload)


def _encode(header: TileHeader, payload: bytes, itemsize: int) -> EncodedTile:
    head = msgspec.msgpack.encode(header)
    codec, stored = compress(payload, itemsize)
    return EncodedTile(blob_id(KIND_TILE, head, payload), head, codec, stored, len(payload))


def _payload_size(head: TileHeader) -> int:
    if any(name != "bytes" and name not in DTYPES for name in (head.dtype, head.logical or head.dtype)):
        raise IntegrityError(f"tile header names an unknown dtype {head.dtype!r} {head.logical!r}")
    channels = head.shape[-1] if len(head.shape) >= 3 else 1
    if head.quantise in ("int8", "fp8") and len(head.scales) != 4 * channels:
        raise IntegrityError(f"tile header has {len(head.scales)} bytes of scales for {channels} channels")
    size = 1 if head.dtype == "bytes" else DTYPES[head.dtype].itemsize
    for length in head.shape:
        size *= length
    if min(head.shape, default=0) < 0 or size > TILE_BYTES_MAX:
        raise IntegrityError(f"tile header names {size} bytes")
    return size


def _quantised(array: NDArray[np.generic], name: str, quantise: str) -> tuple[NDArray[np.generic], TileHeader]:
    lossless = array, TileHeader(name, array.shape)
    if not quantise or name not in ("float16", "float32", "float64", "bfloat16"):
        return lossless
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not bool(np.isfinite(values).all()):
        return lossless
    if quantise in ("int8", "fp8"):
        axes = tuple(range(values.ndim - 1)) if values.ndim >= 3 else None
        peak = np.abs(values).max(axis=axes)
        largest = 127.0 if quantise == "int8" else _FP8_MAX
        scales = np.where(peak > 0, peak / largest, 1.0).astype("<f4")
        with np.errstate(over="ignore"):
            fits = np.isfinite(scales * np.float32(largest)) & (scales >= np.finfo(np.float32).tiny)
        if bool(fits.all()):
            scaled = values / scales
            stored: NDArray[np.generic] = (
                np.clip(np.rint(scaled), -127, 127).astype(np.int8)
                if quantise == "int8"
                else scaled.astype(ml_dtypes.float8_e4m3fn)
            )
            return stored, TileHeader(stored.dtype.name, array.shape, name, quantise, scales.tobytes())
    elif quantise != "fp16":
        raise UsageError(f"unknown quantisation {quantise!r}", fix="use fp16, int8 or fp8")
    low, high = _FP16_RANGE
    if (peak_value := float(np.abs(values).max())) == 0 or low <= peak_value <= high:
        return values.astype(np.float16), TileHeader("float16", array.shape, name, "fp16")
    return lossless


def _dequantised(values: NDArray[np.generic], head: TileHeader) -> NDArray[np.generic]:
    if not head.quantise:
        return values
    logical = DTYPES[head.logical]
    if head.quantise == "fp16":
        return values.astype(logical)
    scales = np.frombuffer(head.scales, dtype="<f4")
    return (values.astype(np.float32) * scales).astype(logical)


def stored_digest(stored: bytes | memoryview) -> bytes:
    """32-byte BLAKE3 of stored bytes: lets a scrub verify without keys and without decoding."""
    return blake3(stored).digest()
