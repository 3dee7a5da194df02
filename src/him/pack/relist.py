"""What of a pack follows from its records and the log, byte for byte: so it can be written again when it is damaged.

That is all but the records themselves: the file header, index records, footer and trailer, and the zeros between. A
list is only given where it has the Merkle root that the log committed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from him.config import META_BYTES_MAX
from him.errors import HimError, IntegrityError
from him.pack import format as layout
from him.pack import merkle
from him.ports import File
from him.tile.address import KIND_FOOTER, KIND_INDEX, blob_id
from him.types import PackFinished, PackRange

_Row = tuple[bytes, int, int, int, int]


class Repair(NamedTuple):
    """Bytes that belong at an offset and are not there."""

    offset: int
    data: bytes


class Repairs(NamedTuple):
    """What to write; `size` to cut the file to, or None where it may be longer."""

    writes: tuple[Repair, ...]
    size: int | None


class Repaired:
    """A file as it would read with its repairs: to be checked before anything is written."""

    def __init__(self, file: File, repairs: Repairs) -> None:
        self._file, self._repairs = file, repairs

    def size(self) -> int:
        """Length in bytes."""
        end = max((offset + len(data) for offset, data in self._repairs.writes), default=0)
        known = max(self._file.size(), end)
        return known if self._repairs.size is None else min(known, self._repairs.size)

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes."""
        size = max(0, min(size, self.size() - offset))
        found = bytearray(self._file.read_at(offset, size))
        found += bytes(size - len(found))
        for start, data in self._repairs.writes:
            low, high = max(offset, start), min(offset + size, start + len(data))
            if low < high:
                found[low - offset : high - offset] = data[low - start : high - start]
        return bytes(found)


def repairs(
    file: File, name: str, ranges: Sequence[PackRange], finished: PackFinished | None, repository_id: bytes
) -> Repairs:
    """What of a pack differs from what it must be, as far as that is known.

    Args:
        ranges: all that were committed, in order; of a finished pack none where they are not known.
        repository_id: 16 bytes.
    """
    writes = list[Repair]()
    head = file.read_at(0, layout.FILE_HEADER_BYTES)
    try:
        layout.check_file_header(head, name)
    except IntegrityError:
        pack_id = bytes.fromhex(name.rpartition("/")[2].removesuffix(".pack"))
        writes.append(Repair(0, layout.encode_file_header(repository_id, pack_id)))
    except HimError:
        return Repairs((), None)
    rows: list[_Row] | None = []
    for named in ranges:
        listed = _range(file, named, writes)
        rows = None if rows is None or listed is None else rows + listed
    if finished is None:
        return Repairs(tuple(writes), None)
    end = ranges[-1].end if ranges else 0
    whole = bool(ranges) and ranges[0].start == layout.FILE_HEADER_BYTES
    if whole and rows is not None and merkle.root([named.merkle_root for named in ranges]) == finished.merkle_root:
        footer = _list(KIND_FOOTER, end, end, rows, finished.merkle_root)
        trailer = layout.encode_trailer(end, len(footer), finished.merkle_root)
        if end + len(footer) + len(trailer) == finished.size:
            _wanted(file, end, footer + trailer, writes)
    return Repairs(tuple(writes), finished.size)


def _range(file: File, named: PackRange, writes: list[Repair]) -> list[_Row] | None:
    """The rows of a range by its records' headers; None when one of these is damaged. Adds what is to be written."""
    rows: list[_Row] = []
    leaves: list[bytes] = []
    offset = named.start
    while offset < named.index_offset:
        header = _header(file, offset)
        if header is None:
            return None
        rows.append((header.blob_id, offset, header.record_size, header.kind, header.delta_depth))
        leaves.append(header.digest)
        _wanted(file, offset + layout.RECORD_HEADER_BYTES + header.meta_size, bytes(header.pad_size), writes)
        after = layout.aligned(offset + header.record_size)
        _wanted(file, offset + header.record_size, bytes(after - offset - header.record_size), writes)
        offset = after
    if offset != named.index_offset or merkle.root(leaves) != named.merkle_root:
        return None
    listed = _list(KIND_INDEX, named.start, named.index_offset, rows, named.merkle_root)
    if named.index_offset + len(listed) == named.end:
        _wanted(file, named.index_offset, listed, writes)
    return rows


def _list(kind: int, begins: int, offset: int, rows: list[_Row], root: bytes) -> bytes:
    """An index record or a footer as it stands at `offset`, with the zeros behind it."""
    payload = layout.encode_rows(layout.rows_of(rows))
    meta = msgspec.msgpack.encode([begins, len(rows), root])
    draft = layout.Draft(kind, 0, blob_id(kind, meta, payload), meta, payload, len(payload))
    return b"".join(bytes(part) for part in layout.encode_record(offset, draft).parts)


def _header(file: File, offset: int) -> layout.RecordHeader | None:
    data = file.read_at(offset, layout.RECORD_HEADER_BYTES)
    try:
        header = layout.decode_header(data, "")
    except IntegrityError:
        return None
    if header.meta_size > META_BYTES_MAX:
        return None
    whole = file.read_at(offset, layout.RECORD_HEADER_BYTES + header.meta_size)
    return header if layout.header_verifies(whole) else None


def _wanted(file: File, offset: int, data: bytes, writes: list[Repair]) -> None:
    if data and file.read_at(offset, len(data)) != data:
        writes.append(Repair(offset, data))
