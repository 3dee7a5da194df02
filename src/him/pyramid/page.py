"""A page: 8×8 cells of a frame, or the hashes of 8×8 pages below; its hash covers just that (design §2).

Bytes: magic `HPG`, version, height u8 (0: cells), three zero bytes, bitmap u64 (bit 8·y+x), then the present
entries in bit order: blob_id and origin (48 bytes) for cells, a page hash (32 bytes) above them.
"""

from collections.abc import Iterator
from typing import Final, Protocol

from him.config import PAGE_SIDE
from him.errors import IntegrityError
from him.types import BlobId, Entry

_MAGIC: Final = b"HPG\x01"
_HEAD: Final = 16
CELL_BYTES: Final = 48
CHILD_BYTES: Final = 32


class PageStore(Protocol):
    """Where pages are kept by hash."""

    def page(self, kind: int, blob: BlobId) -> bytes:
        """Verified payload; raises IntegrityError."""
        ...

    def put_page(self, kind: int, payload: bytes, meta: bytes = b"") -> BlobId:
        """Store; returns the hash."""
        ...


class Page:
    """A parsed page; slots are 8·y+x."""

    __slots__ = ("_bitmap", "_data", "_size", "height")

    def __init__(self, height: int, bitmap: int, data: bytes) -> None:
        self.height = height
        self._bitmap = bitmap
        self._data = data
        self._size = CHILD_BYTES if height else CELL_BYTES

    def get(self, slot: int) -> bytes | None:
        """The raw entry at a slot, or None."""
        if not self._bitmap >> slot & 1:
            return None
        at = (self._bitmap & ((1 << slot) - 1)).bit_count() * self._size
        return self._data[at : at + self._size]

    def slots(self) -> Iterator[tuple[int, bytes]]:
        """(slot, raw entry) of what is present, in slot order."""
        bits, at = self._bitmap, 0
        while bits:
            low = bits & -bits
            yield low.bit_length() - 1, self._data[at : at + self._size]
            at += self._size
            bits ^= low


def encode(height: int, slots: dict[int, bytes]) -> bytes:
    """Canonical bytes of a page: a pure function of what it holds."""
    bitmap = 0
    for slot in slots:
        bitmap |= 1 << slot
    head = _MAGIC + bytes([height, 0, 0, 0]) + bitmap.to_bytes(8, "little")
    return head + b"".join(slots[slot] for slot in sorted(slots))


def decode(payload: bytes, height: int) -> Page:
    """Parse a page that must stand at `height`.

    Raises:
        IntegrityError: not a page, another height, or a length that does not fit the bitmap.
    """
    if len(payload) < _HEAD or payload[:4] != _MAGIC or payload[4] != height or any(payload[5:8]):
        raise IntegrityError(f"not a page of height {height}")
    bitmap = int.from_bytes(payload[8:_HEAD], "little")
    size = CHILD_BYTES if height else CELL_BYTES
    if not bitmap or len(payload) != _HEAD + bitmap.bit_count() * size:
        raise IntegrityError("page length does not fit its bitmap")
    return Page(height, bitmap, payload[_HEAD:])


def side(height: int) -> int:
    """Cells per side that a page at `height` covers."""
    return PAGE_SIDE ** (height + 1)


def root_height(rows: int, columns: int) -> int:
    """Height of the lowest page from (0, 0) that covers rows × columns cells."""
    height = 0
    while side(height) < max(rows, columns):
        height += 1
    return height


def entry(raw: bytes) -> Entry:
    """The cell entry behind 48 raw bytes."""
    return Entry(BlobId(raw[:32]), raw[32:])


def raw_entry(value: Entry) -> bytes:
    """48 raw bytes of a cell entry."""
    return value.blob_id + value.origin
