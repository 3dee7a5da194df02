"""Where each blob lies: immutable sorted segments of 32-byte rows and a tail in memory, rebuildable at any time.

A row is the first 16 bytes of the blob_id, the pack's number, the offset in units of 64 bytes and the record's
length. Sixteen bytes may in theory collide; the record's own header holds the full blob_id and decides.
"""

import contextlib
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import ADDRESS_SEGMENTS_MAX, ADDRESS_TAIL_ROWS, PACK_ALIGN_BYTES
from him.errors import HimError
from him.ports import Disk
from him.types import BlobId

SEGMENT_ROW: Final = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("pack", "<u4"), ("unit", "<u4"), ("length", "<u4"), ("kind", "<u4")]
)
_MAGIC: Final = b"HIMADDR\x01"
_HEAD: Final = len(_MAGIC) + 8 + 8 + 32
_FOLDER: Final = "cache/addresses"


class Location(NamedTuple):
    """Where a record lies: pack number (its rank in the log), byte offset, byte length, kind."""

    pack: int
    offset: int
    length: int
    kind: int


class AddressIndex:
    """blob_id → Location over segments and tail. Not thread-safe for writers; readers may run beside one."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._segments: list[NDArray[np.void]] = []
        self._names: list[str] = []
        self._tail: dict[bytes, Location] = {}
        self._flushed = 0
        self.position = 0

    def load(self, head: int) -> None:
        """Read the segments that are there; damaged or future ones (beyond `head`) are dropped and rebuilt."""
        for name in self._disk.list(_FOLDER):
            path = f"{_FOLDER}/{name}"
            first, last, rows = self._read_segment(path)
            if rows is None or first != self.position or last > head:
                self._remove(path)
                continue
            self._segments.append(rows)
            self._names.append(path)
            self.position = self._flushed = last

    def drop(self) -> None:
        """Delete the segment files."""
        for name in self._disk.list(_FOLDER):
            self._disk.remove(f"{_FOLDER}/{name}")

    def find(self, blob: BlobId) -> Location | None:
        """The newest location of a blob, or None."""
        found = self._tail.get(blob)
        if found is not None:
            return found
        high, low = int.from_bytes(blob[:8], "big"), int.from_bytes(blob[8:16], "big")
        for rows in reversed(self._segments):
            at = int(np.searchsorted(rows["high"], np.uint64(high)))
            while at < len(rows) and int(rows["high"][at]) == high:
                if int(rows["low"][at]) == low:
                    row = rows[at]
                    offset = int(row["unit"]) * PACK_ALIGN_BYTES
                    return Location(int(row["pack"]), offset, int(row["length"]), int(row["kind"]))
                at += 1
        return None

    def add(self, seq: int, pack: int, rows: Iterable[tuple[bytes, int, int, int]]) -> None:
        """Add the rows (blob_id, offset, length, kind) of the range committed at `seq`."""
        for blob, offset, length, kind in rows:
            self._tail[blob] = Location(pack, offset, length, kind)
        self.position = seq

    def flush(self, *, force: bool = False) -> None:
        """Move a tail that has grown large into a segment; a full disk is no error (it can be rebuilt)."""
        if not self._tail or (len(self._tail) < ADDRESS_TAIL_ROWS and not force):
            return
        table, since = self._sorted_tail(), self._flushed
        if len(self._segments) >= ADDRESS_SEGMENTS_MAX:
            everything = np.concatenate([*self._segments, table])
            order = np.lexsort((everything["low"], everything["high"]))
            table, since = everything[order], 0
        body = table.tobytes()
        head = since.to_bytes(8, "little") + self.position.to_bytes(8, "little")
        path = f"{_FOLDER}/{self.position:016d}.seg"
        try:
            self._disk.write_whole(path, _MAGIC + head + blake3(head + body).digest() + body)
        except HimError:
            return
        if since == 0:
            for old in self._names:
                self._remove(old)
            self._segments, self._names = [], []
        self._segments.append(table)
        self._names.append(path)
        self._tail = {}
        self._flushed = self.position

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
        return table[np.lexsort((table["low"], table["high"]))]

    def _read_segment(self, path: str) -> tuple[int, int, NDArray[np.void] | None]:
        file = self._disk.open(path)
        try:
            data = file.read_at(0, file.size())
        finally:
            file.close()
        body = data[_HEAD:]
        head = data[len(_MAGIC) : len(_MAGIC) + 16]
        if (
            data[: len(_MAGIC)] != _MAGIC
            or len(body) % SEGMENT_ROW.itemsize
            or data[_HEAD - 32 : _HEAD] != blake3(head + body).digest()
        ):
            return 0, 0, None
        rows = np.frombuffer(body, dtype=SEGMENT_ROW)
        return int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little"), rows
