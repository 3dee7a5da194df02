"""Where each blob lies: immutable sorted segments of 32 bytes a row and a tail in memory, rebuildable at any time.

A row is the first 16 bytes of the blob_id, the pack's number, the offset in units of 64 bytes, the record's
length and its delta depth. Sixteen bytes may in theory collide; the record's own header holds the full blob_id and
decides.

Segments are mapped, and merged so that each is at least four times as large as the next: five for ten million rows.
A segment keeps its columns apart, so that a search by name stays in few lines of the processor's cache.
"""

import contextlib
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence, Set
from typing import Final, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import ADDRESS_MERGE_RATIO, ADDRESS_TAIL_ROWS, PACK_ALIGN_BYTES
from him.errors import HimError
from him.pack.format import ROW, Rows
from him.ports import Disk
from him.types import BlobId

PLACE: Final = np.dtype([("pack", "<u4"), ("unit", "<u4"), ("length", "<u4"), ("depth", "<u4")])
_NAME: Final = struct.Struct(">QQ")
_MAGIC: Final = b"HIMADDR\x04"
_HEAD: Final = 128
"""Magic, position before and after and rows (u64 each), the columns' digest, the digest of all that, zeros."""
_SIGNED: Final = struct.Struct("<8s3Q32s")
_ROW: Final = 32
_FOLDER: Final = "cache/addresses"
_FEW: Final = 16


class Location(NamedTuple):
    """Where a record lies: pack number (its rank in the log), byte offset, byte length; its delta depth."""

    pack: int
    offset: int
    length: int
    depth: int


class _Table(NamedTuple):
    """Sorted rows: bytes 0–7 and 8–15 of the blob_ids as big-endian numbers, and the places."""

    highs: NDArray[np.uint64]
    lows: NDArray[np.uint64]
    places: NDArray[np.void]

    def columns(self) -> list[memoryview]:
        """The bytes of the columns, one after the other."""
        return [np.ascontiguousarray(column).view(np.uint8).data for column in self]

    def digest(self) -> bytes:
        """BLAKE3 over the columns."""
        hasher = blake3()
        for column in self.columns():
            hasher.update(column)
        return hasher.digest()

    def ordered(self) -> "_Table":
        """The rows sorted by name; of equal names the least deep first, then in the order they had."""
        order = np.lexsort((self.places["depth"], self.lows, self.highs))
        return _Table(self.highs[order], self.lows[order], self.places[order])


class _Segment:
    """The rows of the commits after `since` up to `until`."""

    def __init__(self, path: str, since: int, until: int, table: _Table, digest: bytes) -> None:
        self.path, self.since, self.until, self.table, self.digest = path, since, until, table, digest
        self._highs = table.highs.view(np.uint8).data.cast("Q")
        self._lows = table.lows.view(np.uint8).data.cast("Q")
        self._places = table.places.view(np.uint8).data.cast("I")

    def sound(self) -> bool:
        """Whether it still has the rows it was written with (reads them all)."""
        return self.table.digest() == self.digest

    @property
    def partial(self) -> bool:
        """Whether it was written while rows were being learnt, and says nothing of commits."""
        return self.since == self.until

    def find(self, high: int, low: int, avoid: Set[int], bad: Set[tuple[int, int]]) -> Location | None:
        """The place of a name in a pack that is not to be avoided, the least deep, then the newest; or None."""
        highs, count = self._highs, len(self._highs)
        at = bisect_left(highs, high)
        while at < count and highs[at] == high:
            places, row = self._places, 4 * at
            if self._lows[at] == low and (not avoid or places[row] not in avoid):
                found = Location(places[row], places[row + 1] * PACK_ALIGN_BYTES, places[row + 2], places[row + 3])
                if not bad or found[:2] not in bad:
                    return found
            at += 1
        return None


class AddressIndex:
    """blob_id → Location over segments and tail. Not thread-safe for writers; readers may run beside one.

    Two writers may store one blob, in full and as a delta, or as deltas of each other's tiles. A delta was made on a
    record one less deep, so the least deep record of each blob is the one that leads to an end: it is what is found.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._segments: list[_Segment] = []
        self._tail: dict[bytes, Location] = {}
        self._others: dict[bytes, list[Location]] = {}
        """Older places of blobs in the tail: which one will be left when packs go is not known yet."""
        self.position = 0
        self.damaged = False
        """Whether a segment that was to be merged has other rows than it was written with: all are to be made anew."""
        self.removed: frozenset[int] = frozenset()
        """Numbers of packs whose rows lead nowhere any more."""
        self.condemned: frozenset[int] = frozenset()
        """Numbers of packs that can be read and must not be relied on."""
        self.lost: frozenset[int] = frozenset()
        """Numbers of packs that are missing though they should be there: as those of `bad`, all they hold."""
        self.bad: frozenset[tuple[int, int]] = frozenset()
        """Packs' numbers and offsets of damaged records: found where there is no other, and never relied on."""

    def load(self, head: int) -> None:
        """Map the segments that are there; damaged ones, leftovers and those beyond `head` are removed."""
        found = [self.mapped(f"{_FOLDER}/{name}") for name in self._disk.list(_FOLDER)]
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
        return all(one.sound() for one in self._segments)

    def find(self, blob: BlobId) -> Location | None:
        """Where the least deep record of a blob lies (of equally deep ones the newest), or None."""
        if not self.lost and not self.bad:
            return self._found(blob, self.removed)
        return self._found(blob, self.removed | self.lost, self.bad) or self._found(blob, self.removed)

    def doubtful(self) -> bool:
        """Whether there is any record, or pack, that may not be relied on."""
        return bool(self._unreliable() or self.bad)

    def _unreliable(self) -> frozenset[int]:
        return self.removed | self.condemned | self.lost

    def _found(self, blob: BlobId, avoid: Set[int], bad: Set[tuple[int, int]] = frozenset()) -> Location | None:
        found = self._tail.get(blob)
        best: Location | None = None
        if found is not None:
            for place in (found, *reversed(self._others.get(blob, ()))):
                if (place.pack in avoid) or (bad and place[:2] in bad):
                    continue
                if not place.depth:
                    return place
                best = place if best is None or place.depth < best.depth else best
        high, low = _NAME.unpack_from(blob)
        for segment in reversed(self._segments):
            found = segment.find(high, low, avoid, bad)
            if found is not None:
                if not found.depth:
                    return found
                best = found if best is None or found.depth < best.depth else best
        return best

    def relied(self, blob: BlobId, avoid: Set[int]) -> bool:
        """Whether a blob lies in a pack that may be relied on and is none of `avoid`."""
        return self._found(blob, self._unreliable() | avoid, self.bad) is not None

    def missing(self, blobs: Sequence[BlobId]) -> list[bool]:
        """Whether each blob is in no pack that may be relied on: for many blobs at once far cheaper than `find`."""
        tail, avoid, bad = self._tail, self._unreliable(), self.bad
        if len(blobs) < _FEW:
            return [self._found(blob, avoid, bad) is None for blob in blobs]
        absent = np.array([(at := tail.get(blob)) is None or at.pack in avoid or at[:2] in bad for blob in blobs])
        if self._others:
            for number in map(int, np.flatnonzero(absent)):
                if blobs[number] in self._others:
                    absent[number] = self._found(blobs[number], avoid, bad) is None
        names = np.frombuffer(b"".join(blob[:16] for blob in blobs), dtype=">u8").reshape(-1, 2).astype(np.uint64)
        for segment in self._segments:
            highs = segment.table.highs
            at = highs.searchsorted(names[:, 0])
            # Two blobs that share eight bytes are left to `find`: almost always the first row decides.
            inside = np.flatnonzero(absent & (at < len(highs)))
            close = inside[highs[at[inside]] == names[inside, 0]]
            for number in map(int, close):
                absent[number] = self._found(blobs[number], avoid, bad) is None
        return absent.tolist()

    def add(self, pack: int, rows: Rows) -> None:
        """Add the rows of a range, or of a finished pack; they count once `reached` says up to where all are in."""
        # Of one blob the least deep last.
        rows = rows[np.argsort(-rows["depth"].astype(np.int8), kind="stable")]
        if len(rows) >= ADDRESS_TAIL_ROWS:
            # In the order of their age: a tail that could not be written stays, and these rows go there too.
            if self._tail and self._spill(self._sorted_tail()):
                self._tail, self._others = {}, {}
            if not self._tail and self._spill(_addresses(rows, pack)):
                return
        blobs = rows["blob"].tobytes()
        columns = zip(rows["offset"].tolist(), rows["length"].tolist(), rows["depth"].tolist(), strict=True)
        for number, (offset, length, depth) in enumerate(columns):
            blob, place = blobs[32 * number : 32 * number + 32], Location(pack, offset, length, depth)
            before = self._tail.get(blob)
            if before is not None and before != place:
                known = self._others.setdefault(blob, [])
                if before not in known:
                    known.append(before)
            self._tail[blob] = place

    def reached(self, head: int, *, keep: bool, above: int | None = None) -> None:
        """All rows of the commits up to `head` are in.

        A finished pack brings rows of earlier commits with it: so in the midst of learning no position can be named.

        Args:
            keep: flush.
        """
        self.position = max(self.position, head)
        if keep:
            self.flush(above=above)

    def flush(self, *, above: int | None = None) -> None:
        """Move a tail of more rows than a tail may have (or than `above`) into a segment.

        A full disk is no error: it can be rebuilt.
        """
        spilt = bool(self._segments) and self._segments[-1].partial
        limit = ADDRESS_TAIL_ROWS if above is None else above
        if (spilt or len(self._tail) > limit) and self._write(self._sorted_tail()):
            self._tail, self._others = {}, {}

    def _spill(self, table: _Table) -> bool:
        """Make sorted rows a segment that says nothing of commits, for this process alone."""
        path = f"{_FOLDER}/{self.position:016d}.{len(self._segments)}.part"
        made = self._stored(path, self.position, table)
        if made is not None:
            self._segments.append(made)
        return made is not None

    def _write(self, table: _Table) -> bool:
        """Make sorted rows up to the position a segment, merged with those that are not much larger."""
        kept = list(self._segments)
        while kept and (kept[-1].partial or len(kept[-1].table.highs) < ADDRESS_MERGE_RATIO * len(table.highs)):
            older = kept.pop()
            if not older.sound():
                # Merged, its damage would have a digest that says it is right.
                self.damaged = True
                return False
            table = _merged(older.table, table)
        since, path = kept[-1].until if kept else 0, f"{_FOLDER}/{self.position:016d}.seg"
        if since >= self.position:
            return False
        gone = [old.path for old in self._segments[len(kept) :] if old.path != path]
        made = self._stored(path, since, table)
        if made is None:
            if len(table.highs) < ADDRESS_TAIL_ROWS:
                return False
            made, gone = _Segment(path, since, self.position, table, table.digest()), []
        self._segments = [*kept, made]
        for old in gone:
            self._remove(old)
        return True

    def _stored(self, path: str, since: int, table: _Table) -> _Segment | None:
        """Rows of the commits after `since` up to the position, written and mapped; None where the disk refuses."""
        digest = table.digest()
        head = _SIGNED.pack(_MAGIC, since, self.position, len(table.highs), digest)
        head += blake3(head).digest()
        try:
            self._disk.write_whole(path, head + bytes(_HEAD - len(head)), *table.columns())
        except HimError:
            return None
        made = self.mapped(path)
        # Another process may have put its own there, or removed it as a leftover.
        return made if made.digest == digest else _Segment(path, since, self.position, table, digest)

    def _remove(self, path: str) -> None:
        """One that stays does no harm: `load` takes a segment only where the one before it ends."""
        with contextlib.suppress(HimError):
            self._disk.remove(path)

    def _sorted_tail(self) -> _Table:
        # Of equal names the newest first.
        held = [*self._tail.items(), *((blob, at) for blob, known in self._others.items() for at in reversed(known))]
        names = np.frombuffer(b"".join(blob[:16] for blob, _ in held), dtype=">u8").reshape(-1, 2)
        rows = [(at.pack, at.offset // PACK_ALIGN_BYTES, at.length, at.depth) for _, at in held]
        return _named(names, np.array(rows, dtype=PLACE))

    def mapped(self, path: str) -> _Segment:
        """The segment in a file; one without rows that fits nowhere when the file is not whole.

        The rows' digest is not checked here (320 MB at ten million rows): a wrong row leads to a record that says
        so, and then `sound` tells.
        """
        broken = _Segment(path, -1, -1, _addresses(np.zeros(0, dtype=ROW), 0), b"")
        try:
            file = self._disk.open(path)
            try:
                size = file.size()
            finally:
                file.close()
            # All from one view: another process may put another segment in the place of this one at any time.
            view = self._disk.view(path, 0, size)
        except HimError:
            return broken
        signed = bytes(view[: _SIGNED.size])
        if size <= _HEAD or blake3(signed).digest() != bytes(view[_SIGNED.size : _SIGNED.size + 32]):
            return broken
        magic, since, until, count, digest = _SIGNED.unpack(signed)
        if magic != _MAGIC or size != _HEAD + _ROW * count:
            return broken
        body = view[_HEAD:]
        highs, lows = (np.frombuffer(body[at * count : (at + 8) * count], dtype=np.uint64) for at in (0, 8))
        return _Segment(path, since, until, _Table(highs, lows, np.frombuffer(body[16 * count :], dtype=PLACE)), digest)


def damaged_segments(disk: Disk) -> Iterator[str]:
    """Paths of segments that do not hold what they were written with; reads them all."""
    index = AddressIndex(disk)
    for name in disk.list(_FOLDER):
        segment = index.mapped(f"{_FOLDER}/{name}")
        # One that is gone by now another process has merged.
        if (segment.until < 0 or not segment.sound()) and name in disk.list(_FOLDER):
            yield segment.path


def _addresses(rows: Rows, pack: int) -> _Table:
    """The rows of an index record or footer as those of a segment."""
    places = np.zeros(len(rows), dtype=PLACE)
    names = np.ascontiguousarray(rows["blob"][:, :16]).view(">u8").reshape(-1, 2)
    places["pack"], places["unit"] = pack, rows["offset"] // PACK_ALIGN_BYTES
    places["length"], places["depth"] = rows["length"], rows["depth"]
    return _named(names, places)


def _named(names: NDArray[np.uint64], places: NDArray[np.void]) -> _Table:
    """Names (n, 2) of either byte order and their places, as a sorted table."""
    return _Table(names[:, 0].astype(np.uint64), names[:, 1].astype(np.uint64), places).ordered()


def _merged(older: _Table, newer: _Table) -> _Table:
    """Both tables as one; of a name that both have the newer row comes first."""
    return _Table(
        np.concatenate([newer.highs, older.highs]),
        np.concatenate([newer.lows, older.lows]),
        np.concatenate([newer.places, older.places]),
    ).ordered()
