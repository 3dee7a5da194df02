"""Appending to a pack and walking through one, on a Disk."""

import threading
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from him.config import META_BYTES_MAX, PACK_ALIGN_BYTES
from him.errors import HimError, IntegrityError
from him.pack import format as layout
from him.pack import merkle
from him.ports import File
from him.tile.address import KIND_FOOTER, KIND_INDEX, blob_id
from him.types import MALFORMED, BlobId, PackFinished, PackRange

_READ_AHEAD: Final = 64 * 1024


class PackWriter:
    """The exclusive writer of one pack; safe to call from several threads.

    Records become part of the repository when a commit record names the range that `close_range` returns.
    """

    def __init__(self, file: File, name: str, end: int) -> None:
        self.name = name
        self.file = file
        self._end = end
        self._start = end
        self._rows: list[tuple[BlobId, int, int, int, int]] = []
        self._leaves: list[bytes] = []
        self._lock = threading.Lock()

    @property
    def end(self) -> int:
        """Where the next record will begin."""
        return self._end

    @property
    def start(self) -> int:
        """Where the range that is being written begins."""
        return self._start

    def append(self, drafts: Sequence[layout.Draft]) -> list[tuple[int, int]]:
        """Write records one after the other in one go; (offset, size) of each.

        On failure nothing has advanced and the next append overwrites what may have been written.
        """
        with self._lock:
            end, parts = self._end, list[bytes | memoryview]()
            places: list[tuple[int, int]] = []
            digests: list[bytes] = []
            for draft in drafts:
                record = layout.encode_record(end, draft)
                parts += record.parts
                places.append((end, record.size))
                digests.append(record.digest)
                end = layout.aligned(end + record.size)
            self.file.write_at(self._end, *parts)
            self._end = end
            self._rows += [
                (draft.blob_id, *at, draft.kind, draft.delta_depth) for draft, at in zip(drafts, places, strict=True)
            ]
            self._leaves += digests
            return places

    def close_range(self) -> PackRange:
        """Write the index record of what was appended since the last range; durable once the file is synced."""
        with self._lock:
            root = merkle.root(self._leaves)
            index_offset, end = self._index(KIND_INDEX, layout.rows_of(self._rows), root)
            closed = PackRange(self.name, self._start, index_offset, end, root)
            self._start = self._end = end
            self._rows, self._leaves = [], []
            return closed

    def finish(self, rows: layout.Rows, range_roots: list[bytes]) -> PackFinished:
        """Write footer and trailer after the last range; the pack never grows again.

        Args:
            rows: every row of every range, index records excluded.
            range_roots: the Merkle roots of the ranges in file order; the pack's root is made of them.
        """
        with self._lock:
            root = merkle.root(range_roots)
            offset, end = self._index(KIND_FOOTER, rows, root)
            self.file.write_at(end, layout.encode_trailer(offset, end - offset, root))
            size = end + layout.TRAILER_BYTES
            # A record that was half written and then overwritten by a shorter one would stick out.
            self.file.truncate(size)
            self.file.sync()
            return PackFinished(self.name, size, root)

    def _index(self, kind: int, rows: layout.Rows, root: bytes) -> tuple[int, int]:
        payload = layout.encode_rows(rows)
        meta = msgspec.msgpack.encode([self._start, len(rows), root])
        draft = layout.Draft(kind, 0, blob_id(kind, meta, payload), meta, payload, len(payload))
        record = layout.encode_record(self._end, draft)
        self.file.write_at(self._end, *record.parts)
        return self._end, layout.aligned(self._end + record.size)

    def close(self) -> None:
        """Release the file and its lock; an unfinished pack may be continued by another writer."""
        self.file.close()


def read_record(
    file: File,
    name: str,
    offset: int,
    length: int,
    expect: BlobId | None = None,
    buffer: memoryview | None = None,
    *,
    digest: bool = True,
) -> layout.Record:
    """The verified record at `offset`, in `buffer` (of `length` bytes) when one is given; see `decode_record`.

    Raises:
        IntegrityError: with object and place.
    """
    place = f"{name} @ {offset}"
    if buffer is None:
        return layout.decode_record(file.read_at(offset, length), place, expect, digest=digest)
    return layout.decode_record(buffer[: file.read_into(offset, buffer)], place, expect, digest=digest)


def read_index(file: File, named: PackRange) -> layout.Rows:
    """Rows of a committed range.

    Raises:
        IntegrityError: the index record is damaged or not the one the commit record names.
    """
    place = f"{named.pack} @ {named.index_offset}"
    record = read_record(file, named.pack, named.index_offset, named.end - named.index_offset)
    try:
        start, _, merkle_root = msgspec.msgpack.decode(record.meta, type=tuple[int, int, bytes])
    except MALFORMED:
        start, merkle_root = -1, b""
    if record.header.kind != KIND_INDEX or start != named.start or merkle_root != named.merkle_root:
        raise IntegrityError("the index record is not the one committed", place=place)
    return layout.decode_rows(record.stored, place)


def read_footer(file: File, finished: PackFinished) -> layout.Rows:
    """Rows of all ranges of a finished pack.

    Raises:
        IntegrityError: trailer or footer is damaged or not the one the commit record names.
    """
    at = finished.size - layout.TRAILER_BYTES
    offset, size, root = layout.decode_trailer(file.read_at(at, layout.TRAILER_BYTES), f"{finished.pack} @ {at}")
    place = f"{finished.pack} @ {offset}"
    record = read_record(file, finished.pack, offset, size)
    if record.header.kind != KIND_FOOTER or root != finished.merkle_root or offset + size != at:
        raise IntegrityError("the footer is not the one committed", place=place)
    return layout.decode_rows(record.stored, place)


def contiguous(ranges: Sequence[PackRange], end: int) -> bool:
    """Whether the ranges fill a pack from its header to `end`."""
    starts = [named.start for named in ranges] + [end]
    return starts == [layout.FILE_HEADER_BYTES] + [named.end for named in ranges]


def walk_rows(file: File, name: str, start: int, end: int) -> layout.Rows:
    """Rows of the records between two offsets that verify: for when what should list them is damaged."""
    return layout.rows_of(
        [
            (found.header.blob_id, offset, found.header.record_size, found.header.kind, found.header.delta_depth)
            for offset, found in walk(file, name, start, end)
            if not isinstance(found, HimError) and found.header.kind not in (KIND_INDEX, KIND_FOOTER)
        ]
    )


def walk(file: File, name: str, start: int, end: int) -> Iterator[tuple[int, layout.Record | HimError]]:
    """Every record in [start, end), each verified, with the zeros between them.

    Damage, and what only newer software can read, is yielded, not raised. When a header can't be trusted the walk goes
    on at the next offset where a header verifies.
    """
    offset = start
    while offset < end:
        place = f"{name} @ {offset}"
        head = file.read_at(offset, layout.RECORD_HEADER_BYTES + META_BYTES_MAX)
        if not layout.header_verifies(head):
            yield offset, IntegrityError("record header does not match its digest", place=place)
            offset = _next_header(file, offset + PACK_ALIGN_BYTES, end)
            continue
        size = layout.decode_header(head, place).record_size
        try:
            yield offset, layout.decode_record(file.read_at(offset, size), place)
        except HimError as error:
            yield offset, error
        after = layout.aligned(offset + size)
        if file.read_at(offset + size, after - offset - size).count(0) != after - offset - size:
            yield offset, IntegrityError("padding after the record is not zero", place=f"{name} @ {offset + size}")
        offset = after


def _next_header(file: File, offset: int, end: int) -> int:
    """The first offset at or after `offset` whose header and meta verify; `end` if there is none."""
    while offset < end:
        data = file.read_at(offset, _READ_AHEAD)
        for at in range(0, len(data), PACK_ALIGN_BYTES):
            if data[at : at + 4] == b"HREC":
                whole = file.read_at(offset + at, layout.RECORD_HEADER_BYTES + META_BYTES_MAX)
                if layout.header_verifies(whole):
                    return min(offset + at, end)
        offset += _READ_AHEAD
    return end
