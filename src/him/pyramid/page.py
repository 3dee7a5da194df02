"""A page: 8×8 cells of a frame, or the hashes of 8×8 pages below; its hash covers just that (design §2).

Bytes: magic `HPG`, version, height u8 (0: cells), kind of references u8 (0: blob_ids, 1: secrets of what is encrypted,
as the page is then), two zero bytes, bitmap u64 (bit 8·y+x), then the present entries in bit order: a reference and the
origin (48 bytes) for cells, a reference to a page (32 bytes) above them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from him.config import PAGE_SIDE
from him.errors import IntegrityError, VersionError
from him.tile.address import KIND_PAGE
from him.types import BlobId, Entry, Ref, Secret

_MAGIC: Final = b"HPG\x01"
_HEAD: Final = 16
_HEADS: Final = [[_MAGIC + bytes((height, kind, 0, 0)) for height in range(256)] for kind in (0, 1)]
CELL_BYTES: Final = 48
CHILD_BYTES: Final = 32
_SPLICES_MAX: Final = 6
"""Up to so many changes are cheaper to cut in one by one than to parse the page for (measured)."""


_T = TypeVar("_T")


class PageStore(Protocol):
    """Where pages are kept by hash."""

    def page(self, kind: int, ref: Ref) -> bytes:
        """Verified payload; raises IntegrityError."""
        ...

    def parsed(self, kind: int, ref: bytes, parse: Callable[[bytes], _T]) -> _T:
        """`parse(page(kind, ref))`, which may be remembered; nobody changes it."""
        ...

    def put_page(self, kind: int, payload: bytes, *, encrypted: bool = False) -> Ref:
        """Store; returns how to refer to it."""
        ...


class PagesStore(PageStore, Protocol):
    """A PageStore that takes many pages at once: a frame's update writes its pages level by level."""

    def put_pages(self, kind: int, payloads: Sequence[bytes], *, encrypted: bool = False) -> Sequence[Ref]:
        """Store; returns how to refer to them."""
        ...


class Page:
    """A parsed page; slots are 8·y+x."""

    __slots__ = ("_bitmap", "_payload", "_size", "encrypted", "height")

    def __init__(self, height: int, bitmap: int, payload: bytes) -> None:
        self.height = height
        self.encrypted = payload[5] == 1
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

    def ref(self, slot: int) -> Ref | None:
        """The page, or the tile, at a slot; None where nothing is."""
        raw = self.get(slot)
        return None if raw is None else self.refers(raw)

    def refers(self, raw: bytes) -> Ref:
        """What a raw entry refers to."""
        return Secret(raw[:CHILD_BYTES]) if self.encrypted else BlobId(raw[:CHILD_BYTES])

    def entry(self, raw: bytes) -> Entry:
        """The cell entry behind 48 raw bytes."""
        return Entry(self.refers(raw), raw[CHILD_BYTES:])

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

    def names(self) -> NDArray[np.uint8]:
        """The blob_ids of what is present (n, 32), in slot order."""
        raw = self.entries()[:, :CHILD_BYTES]
        if not self.encrypted:
            return raw
        names = b"".join(Secret(row.tobytes()).blob_id for row in raw)
        return np.frombuffer(names, dtype=np.uint8).reshape(-1, CHILD_BYTES)

    def edited(self, changes: Sequence[tuple[int, bytes | None]]) -> bytes:
        """Payload of the page after setting (or, with None, removing) slots; nothing when no slot is left."""
        if len(changes) > _SPLICES_MAX:
            slots: dict[int, bytes | None] = dict(self.slots())
            slots.update(changes)
            left = {slot: raw for slot, raw in slots.items() if raw is not None}
            return encode(self.height, left, encrypted=self.encrypted)
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
        return assembled(self.height, bitmap, payload[_HEAD:], encrypted=self.encrypted) if bitmap else b""


def encode(height: int, slots: dict[int, bytes], *, encrypted: bool = False) -> bytes:
    """Canonical bytes of a page: a pure function of what it holds; nothing when it would be empty."""
    bitmap = 0
    for slot in slots:
        bitmap |= 1 << slot
    entries = b"".join(slots[slot] for slot in sorted(slots))
    return assembled(height, bitmap, entries, encrypted=encrypted) if slots else b""


def assembled(height: int, bitmap: int, entries: bytes, *, encrypted: bool = False) -> bytes:
    """Bytes of a page from its bitmap and its raw entries in slot order."""
    return b"".join((_HEADS[encrypted][height], bitmap.to_bytes(8, "little"), entries))


def decode(payload: bytes) -> Page:
    """Parse a page.

    Raises:
        IntegrityError: not a page, or a length that does not fit the bitmap. VersionError: a page of a newer format.
    """
    if payload[:3] == _MAGIC[:3] and payload[3:4] != _MAGIC[3:]:
        raise VersionError("the page is of a newer format")
    if len(payload) < _HEAD or payload[5] > 1 or not payload.startswith(_HEADS[payload[5]][payload[4]]):
        raise IntegrityError("not a page")
    height, bitmap = payload[4], int.from_bytes(payload[8:_HEAD], "little")
    if not bitmap or len(payload) != _HEAD + bitmap.bit_count() * (CHILD_BYTES if height else CELL_BYTES):
        raise IntegrityError("page length does not fit its bitmap")
    return Page(height, bitmap, payload)


def load(store: PageStore, ref: bytes, height: int) -> Page:
    """The page that is referred to, which must stand at `height`. Raises IntegrityError."""
    found = store.parsed(KIND_PAGE, ref, decode)
    if found.height != height or found.encrypted != isinstance(ref, Secret):
        raise IntegrityError(f"not a page of height {height}", object=ref.hex())
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


def raw_entry(value: Entry) -> bytes:
    """48 raw bytes of a cell entry."""
    return value.ref + value.origin
