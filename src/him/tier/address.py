"""Where each blob lies: immutable sorted segments of 32-byte rows and a tail in memory, rebuildable at any time.

A row is the first 16 bytes of the blob_id, the pack's number, the offset in units of 64 bytes, the record's
length and its kind. Sixteen bytes may in theory collide; the record's own header holds the full blob_id and decides.

Segments are mapped, and merged so that each is at least four times as large as the next: five for ten million rows.
"""

import contextlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import ADDRESS_MERGE_RATIO, ADDRESS_TAIL_ROWS, PACK_ALIGN_BYTES
from him.errors import HimError
from him.pack.format import Rows
from him.ports import Disk
from him.types import BlobId

SEGMENT_ROW: Final = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("pack", "<u4"), ("unit", "<u4"), ("length", "<u4"), ("kind", "<u4")]
)
_MAGIC: Final = b"HIMADDR\x02"
_HEAD: Final = 128
"""Magic, position before and after (u64 each), the rows' digest, the digest of all that, zeros."""
_FOLDER: Final = "cache/addresses"


class Location(NamedTuple):
    """Where a record lies: pack number (its rank in the log), byte offset, byte length, kind."""

    pack: int
    offset: int
    length: int
    kind: int


class _Segment(NamedTuple):
    """Sorted rows of the commits after `since` up to `until`."""

    path: str
    since: int
    until: int
    rows: NDArray[np.void]
    digest: bytes


class AddressIndex:
    """blob_id → Location over segments and tail. Not thread-safe for writers; readers may run beside one."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._segments: list[_Segment] = []
        self._tail: dict[bytes, Location] = {}
        self.position = 0

    def load(self, head: int) -> None:
        """Map the segments that are there; damaged ones, leftovers and those beyond `head` are removed."""
        found = [self._mapped(f"{_FOLDER}/{name}") for name in self._disk.list(_FOLDER)]
        while True:
            fitting = [one for one in found if one.since == self.position < one.until <= head]
            if not fitting:
                break
            # After an interrupted merge the merged one is the longest.
            self._segments.append(max(fitting, key=lambda one: one.until))
            self.position = self._segments[-1].until
        used = {one.path for one in self._segments}
        for one in found:
            if one.path not in used:
                self._remove(one.path)

    def drop(self) -> None:
        """Delete the segment files."""
        for name in self._disk.list(_FOLDER):
            self._disk.remove(f"{_FOLDER}/{name}")

    def sound(self) -> bool:
        """Whether every segment still has the digest it was written with (reads them all)."""
        return all(_digest(one.rows) == one.digest for one in self._segments)

    def find(self, blob: BlobId) -> Location | None:
        """The newest location of a blob, or None."""
        found = self._tail.get(blob)
        if found is not None:
            return found
        high, low = np.uint64(int.from_bytes(blob[:8], "big")), int.from_bytes(blob[8:16], "big")
        for segment in reversed(self._segments):
            rows = segment.rows
            at = int(rows["high"].searchsorted(high))
            while at < len(rows):
                own_high, own_low, pack, unit, length, kind = rows[at].item()
                if own_high != high:
                    break
                if own_low == low:
                    return Location(pack, unit * PACK_ALIGN_BYTES, length, kind)
                at += 1
        return None

    def missing(self, blobs: Sequence[BlobId]) -> list[bool]:
        """Whether each blob is in no row: for many blobs at once, far cheaper than `find`."""
        absent = np.array([blob not in self._tail for blob in blobs], dtype=np.bool_)
        names = np.frombuffer(b"".join(blob[:16] for blob in blobs), dtype=">u8").reshape(-1, 2).astype(np.uint64)
        for segment in self._segments:
            highs = segment.rows["high"]
            at = highs.searchsorted(names[:, 0])
            # Two blobs that share eight bytes are left to `find`: almost always the first row decides.
            inside = np.flatnonzero(absent & (at < len(highs)))
            close = inside[highs[at[inside]] == names[inside, 0]]
            for number in map(int, close):
                absent[number] = self.find(blobs[number]) is None
        return absent.tolist()

    def add(self, seq: int, pack: int, rows: Rows) -> None:
        """Add the rows of the range (or the finished pack) that was committed at `seq`."""
        if len(rows) >= ADDRESS_TAIL_ROWS:
            self.flush(force=True)
            self.position = seq
            self._write(_addresses(rows, pack))
            return
        blobs = rows["blob"].tobytes()
        columns = zip(rows["offset"].tolist(), rows["length"].tolist(), rows["kind"].tolist(), strict=True)
        for number, (offset, length, kind) in enumerate(columns):
            self._tail[blobs[32 * number : 32 * number + 32]] = Location(pack, offset, length, kind)
        self.position = seq

    def flush(self, *, force: bool = False) -> None:
        """Move a tail that has grown large into a segment; a full disk is no error (it can be rebuilt)."""
        if self._tail and (len(self._tail) >= ADDRESS_TAIL_ROWS or force) and self._write(self._sorted_tail()):
            self._tail = {}

    def _write(self, table: NDArray[np.void]) -> bool:
        """Make sorted rows up to the position a segment, merged with those that are not much larger."""
        kept = list(self._segments)
        while kept and len(kept[-1].rows) < ADDRESS_MERGE_RATIO * len(table):
            table = _merged(kept.pop().rows, table)
        since = kept[-1].until if kept else 0
        path, digest = f"{_FOLDER}/{self.position:016d}.seg", _digest(table)
        head = _MAGIC + since.to_bytes(8, "little") + self.position.to_bytes(8, "little") + digest
        head += blake3(head).digest()
        made = _Segment(path, since, self.position, table, digest)
        gone = [old.path for old in self._segments[len(kept) :] if old.path != path]
        try:
            self._disk.write_whole(path, head + bytes(_HEAD - len(head)), table.view(np.uint8).data)
            made = self._mapped(path)
        except HimError:
            if len(table) < ADDRESS_TAIL_ROWS:
                return False
            gone = []
        self._segments = [*kept, made]
        for old in gone:
            self._remove(old)
        return True

    def _remove(self, path: str) -> None:
        """One that stays does no harm: `load` takes a segment only where the one before it ends."""
        with contextlib.suppress(HimError):
            self._disk.remove(path)

    def _sorted_tail(self) -> NDArray[np.void]:
        table = np.zeros(len(self._tail), dtype=SEGMENT_ROW)
        names = np.frombuffer(b"".join(blob[:16] for blob in self._tail), dtype=">u8").reshape(-1, 2)
        places = np.array([(p.pack, p.offset // PACK_ALIGN_BYTES, p.length, p.kind) for p in self._tail.values()])
        table["high"], table["low"] = names[:, 0], names[:, 1]
        table["pack"], table["unit"], table["length"], table["kind"] = places.T
        return _in_order(table)

    def _mapped(self, path: str) -> _Segment:
        """The segment in a file; one without rows that fits nowhere when the file is not whole.

        The rows' digest is not checked here (320 MB at ten million rows): a wrong row leads to a record that says
        so, and then `sound` tells.
        """
        broken = _Segment(path, -1, -1, np.zeros(0, dtype=SEGMENT_ROW), b"")
        try:
            file = self._disk.open(path)
            try:
                size, head = file.size(), file.read_at(0, _HEAD)
            finally:
                file.close()
            signed = len(_MAGIC) + 48
            if len(head) < _HEAD or head[: len(_MAGIC)] != _MAGIC or (size - _HEAD) % SEGMENT_ROW.itemsize:
                return broken
            if blake3(head[:signed]).digest() != head[signed : signed + 32] or size == _HEAD:
                return broken
            rows = np.frombuffer(self._disk.view(path, 0, size)[_HEAD:], dtype=SEGMENT_ROW)
        except HimError:
            return broken
        since, until = (int.from_bytes(head[at : at + 8], "little") for at in (8, 16))
        return _Segment(path, since, until, rows, head[24:56])


def _digest(rows: NDArray[np.void]) -> bytes:
    return blake3(rows.view(np.uint8).data).digest()


def _addresses(rows: Rows, pack: int) -> NDArray[np.void]:
    """The rows of an index record or footer as rows of a segment."""
    table = np.zeros(len(rows), dtype=SEGMENT_ROW)
    names = np.ascontiguousarray(rows["blob"][:, :16]).view(">u8")
    table["high"], table["low"], table["pack"] = names[:, 0], names[:, 1], pack
    table["unit"], table["length"], table["kind"] = rows["offset"] // PACK_ALIGN_BYTES, rows["length"], rows["kind"]
    return _in_order(table)


def _in_order(table: NDArray[np.void]) -> NDArray[np.void]:
    return table[np.lexsort((table["low"], table["high"]))]


def _merged(older: NDArray[np.void], newer: NDArray[np.void]) -> NDArray[np.void]:
    """Both tables as one; of an address that both have the newer row comes first."""
    return _in_order(np.concatenate([newer, older]))
