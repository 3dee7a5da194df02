"""A long document as chunks cut where its content says so, so that an edit changes the chunks around it and no others.

A boundary follows a byte at which the gear hash of the last 32 bytes is small (FastCDC, Xia et al. 2016: harder before
the average length, easier after). No chunk but the last is shorter than the hash's window, so what follows a boundary
decides all later boundaries alone. The cuts are published and stay as they are: docs/FORMAT.md, "Deltas and chunks".
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, NamedTuple

import cv2
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import CHUNK_BYTES_AVERAGE, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN
from him.errors import IntegrityError, UsageError
from him.types import BlobId, Ref, Secret

CHUNKS: Final = 6
"""The codec number of a document stored as a list of chunks."""

GEAR: Final[NDArray[np.uint32]] = np.frombuffer(
    b"".join(blake3(b"him gear 1" + bytes([value])).digest()[:4] for value in range(256)), dtype="<u4"
)
"""One pseudo-random number for each byte value."""
WINDOW_BYTES: Final = 32
"""A byte's number has left the 32-bit hash after so many shifts."""
STRICT_BELOW: Final = 2**32 // (2 * CHUNK_BYTES_AVERAGE)
"""A hash below this ends a chunk shorter than the average."""
LOOSE_BELOW: Final = 2**32 // (CHUNK_BYTES_AVERAGE // 2)
"""A hash below this ends a chunk of the average length or more."""

_SLAB_BYTES: Final = 32 * 1024
"""Hashed at a time: what stays in a core's first caches."""
_ROW: Final = np.dtype([("blob", "V32"), ("length", "<u4")])


class Chunk(NamedTuple):
    """One chunk of a document: its blob (a document of its own) and its length in bytes."""

    ref: Ref
    length: int


def split(document: bytes | memoryview) -> list[memoryview]:
    """Views of the document's chunks in order; none for an empty document.

    Each is CHUNK_BYTES_MIN to CHUNK_BYTES_MAX long, the last perhaps shorter.
    """
    view = memoryview(document)
    ends, hashes = _candidates(np.frombuffer(document, dtype=np.uint8))
    strict, loose = ends[hashes < STRICT_BELOW].tolist(), ends.tolist()
    chunks: list[memoryview] = []
    start = 0
    while start < len(view):
        end = _next_end(strict, loose, start, len(view))
        chunks.append(view[start:end])
        start = end
    return chunks


def encode_list(chunks: Sequence[Chunk]) -> bytes:
    """The stored bytes of a document in chunks: 36 bytes a chunk.

    Raises:
        UsageError: a length that no chunk has.
    """
    rows = np.zeros(len(chunks), dtype=_ROW)
    for at, (blob, length) in enumerate(chunks):
        if not 0 < length <= CHUNK_BYTES_MAX or len(blob) != 32:
            raise UsageError(f"chunk {at} of {length} bytes", fix=f"cut chunks of 1 to {CHUNK_BYTES_MAX} bytes")
        rows[at] = (blob, length)
    return rows.tobytes()


def decode_list(stored: bytes | memoryview, size: int, *, encrypted: bool = False) -> list[Chunk]:
    """The chunks of a document of `size` bytes; of an encrypted one they are, and are listed by their secrets.

    Whether each blob holds its `length` bytes, and all of them the document, its blob_id tells.

    Raises:
        IntegrityError: torn rows, a length beyond the limits, or lengths that do not add up.
    """
    if len(stored) % _ROW.itemsize:
        raise IntegrityError(f"a chunk list of {len(stored)} bytes is torn")
    rows = np.frombuffer(stored, dtype=_ROW)
    lengths = rows["length"]
    beyond = (lengths[:-1] < CHUNK_BYTES_MIN).any() or (lengths < 1).any() or (lengths > CHUNK_BYTES_MAX).any()
    if beyond or int(lengths.sum(dtype=np.int64)) != size:
        raise IntegrityError(f"the {len(rows)} lengths of a chunk list do not make a document of {size} bytes")
    blobs: list[bytes] = rows["blob"].tolist()
    kind = Secret if encrypted else BlobId
    return [Chunk(kind(blob), length) for blob, length in zip(blobs, lengths.tolist(), strict=True)]


def _next_end(strict: list[int], loose: list[int], start: int, size: int) -> int:
    """Where the chunk that begins at `start` ends; both lists are positions after a byte, ascending."""
    at = bisect_left(strict, start + CHUNK_BYTES_MIN)
    if at < len(strict) and strict[at] < start + CHUNK_BYTES_AVERAGE:
        return strict[at]
    at = bisect_left(loose, start + CHUNK_BYTES_AVERAGE)
    return min(loose[at] if at < len(loose) else size, start + CHUNK_BYTES_MAX, size)


def _candidates(values: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """(positions after which a chunk may end, their hashes): every byte's hash below LOOSE_BELOW, ascending.

    The hash of byte i is the sum of GEAR[byte i-k] << k over the window, modulo 2^32; that of twice as many bytes is
    the sum of two, so that a window of 32 takes five passes.
    """
    ends, hashes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.uint32)]
    table = GEAR.view(np.int32).reshape(1, 256)
    shifted = np.empty(_SLAB_BYTES + WINDOW_BYTES, dtype=np.uint32)
    for start in range(0, len(values), _SLAB_BYTES):
        before = min(start, WINDOW_BYTES - 1)
        slab = values[start - before : start + _SLAB_BYTES].reshape(1, -1)
        gear = np.asarray(cv2.LUT(slab, table)).view(np.uint32).reshape(-1)
        width = 1
        while width < WINDOW_BYTES:
            older = np.left_shift(gear[:-width], width, out=shifted[: max(0, len(gear) - width)])
            gear[width:] += older
            width *= 2
        found = np.flatnonzero(gear[before:] < LOOSE_BELOW)
        ends.append(found + (start + 1))
        hashes.append(gear[before:][found])
    return np.concatenate(ends), np.concatenate(hashes)
