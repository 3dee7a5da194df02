"""A page: 8×8 cells of a frame, or the hashes of 8×8 pages below; its hash covers just that (design §2).

Bytes: magic `HPG`, version, height u8 (0: cells), three zero bytes, bitmap u64 (bit 8·y+x), then the present
entries in bit order: blob_id and origin (48 bytes) for cells, a page hash (32 bytes) above them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from him.config import PAGE_SIDE
from him.errors import IntegrityError, VersionError
from him.tile.address import KIND_PAGE
from him.types import BlobId, Entry

_MAGIC: Final = b"HPG\x01"
_HEAD: Final = 16
_HEADS: Final = [_MAGIC + bytes((height, 0, 0, 0)) for height in range(256)]
CELL_BYTES: Final = 48
CHILD_BYTES: Final = 32
_SPLICES_MAX: Final = 6
"""Up to so many changes are cheaper to cut in one by one than to parse the page for (measured)."""


_T = TypeVar("_T")


class PageStore(Protocol):
    """Where pages are kept by hash."""

    def page(self, kind: int, blob: BlobId) -> bytes:
        """Verified payload; raises IntegrityError."""
        ...

    def parsed(self, kind: int, blob: bytes, parse: Callable[[bytes], _T]) -> _T:
        """`parse(page(kind, blob))`, which may be remembered; nobody changes it."""
        ...

    def put_page(self, kind: int, payload: bytes, meta: bytes = b"") -> BlobId:
        """Store; returns the hash."""
        ...


class PagesStore(PageStore, Protocol):
    """A PageStore that takes many pages at once: a frame's update writes its pages level by level."""

    def put_pages(self, kind: int, payloads: Sequence[bytes]) -> list[BlobId]:
        """Store; returns the hashes."""
        ...


class Page:
    """A parsed page; slots are 8·y+x."""

    __slots__ = ("_bitmap", "_payload", "_size", "height")

    def __init__(self, height: int, bitmap: int, payload: bytes) -> None:
        self.height = height
        self._bitmap = bitmap
        self._payload = payload
        self._size = CHILD_BYTES if height else CELL_BYTES

    @property
    def size(self) -> int:
        """Bytes of its payload."""
        return len(self._payload)

    def get(self, slot: int) -> bytes | None:
        """The raw entry at a slot, or None."""
        bitmap = self._bitmap
        if not bitmap >> slot & 1:
            return None
        at = _HEAD + (bitmap & ((1 << slot) - 1)).bit_count() * self._size
        return self._payload[at : at + self._size]

    def slots(self) -> Iterator[tuple[int, bytes]]:
        """(slot, raw entry) of what is present, in slot order."""
        bits, at = self._bitmap, _HEAD
        while bits:
            low = bits & -bits
            yield low.bit_length() - 1, self._payload[at : at + self._size]
            at += self._size
            bits ^= low

    def entries(self) -> NDArray[np.uint8]:
        """The raw entries of what is present (n, 48 or 32), in slot order."""
        return np.frombuffer(self._payload, dtype=np.uint8, offset=_HEAD).reshape(-1, self._size)

    def edited(self, changes: Sequence[tuple[int, bytes | None]]) -> bytes:
        """Payload of the page after setting (or, with None, removing) slots; nothing when no slot is left."""
        if len(changes) > _SPLICES_MAX:
            slots: dict[int, bytes | None] = dict(self.slots())
            slots.update(changes)
            return encode(self.height, {slot: raw for slot, raw in slots.items() if raw is not None})
        bitmap, payload, size = self._bitmap, self._payload, self._size
        for slot, raw in changes:
            bit = 1 << slot
            at = _HEAD + (bitmap & (bit - 1)).bit_count() * size
            if raw is not None:
                payload = payload[:at] + raw + payload[at + size if bitmap & bit else at :]
                bitmap |= bit
            elif bitmap & bit:
                payload = payload[:at] + payload[at + size :]
                bitmap ^= bit
        if bitmap == self._bitmap:
            return payload
        return assembled(self.height, bitmap, payload[_HEAD:]) if bitmap else b""


def encode(height: int, slots: dict[int, bytes]) -> bytes:
    """Canonical bytes of a page: a pure function of what it holds; nothing when it would be empty."""
    bitmap = 0
    for slot in slots:
        bitmap |= 1 << slot
    return assembled(height, bitmap, b"".join(slots[slot] for slot in sorted(slots))) if slots else b""


def assembled(height: int, bitmap: int, entries: bytes) -> bytes:
    """Bytes of a page from its bitmap and its raw entries in slot order."""
    return b"".join((_HEADS[height], bitmap.to_bytes(8, "little"), entries))


def decode(payload: bytes) -> Page:
    """Parse a page.

    Raises:
        IntegrityError: not a page, or a length that does not fit the bitmap. VersionError: a page of a newer format.
    """
    if payload[:3] == _MAGIC[:3] and payload[3:4] != _MAGIC[3:]:
        raise VersionError("the page is of a newer format")
    if len(payload) < _HEAD or not payload.startswith(_HEADS[payload[4]]):
        raise IntegrityError("not a page")
    height, bitmap = payload[4], int.from_bytes(payload[8:_HEAD], "little")
    if not bitmap or len(payload) != _HEAD + bitmap.bit_count() * (CHILD_BYTES if height else CELL_BYTES):
        raise IntegrityError("page length does not fit its bitmap")
    return Page(height, bitmap, payload)


def load(store: PageStore, blob: bytes, height: int) -> Page:
    """The page with this hash, which must stand at `height`. Raises IntegrityError."""
    found = store.parsed(KIND_PAGE, blob, decode)
    if found.height != height:
        raise IntegrityError(f"not a page of height {height}", object=blob.hex())
    return found


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
