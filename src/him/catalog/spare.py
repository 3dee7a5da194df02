"""A spare copy of the commit log on the same disk: rot in the log is mended from it, the chain of hashes deciding.

The log is the one thing that nothing else tells. The copy lags behind what was committed last, and costs no sync.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from him.catalog.log import LOG_PATH, FileLog, Readable, hash_of, published_mark, record_at
from him.errors import IntegrityError, NotFoundError
from him.ports import Disk, ObjectStore
from him.tier import cold as copies

SPARE: Final = "care/log"
_PART: Final = 1024 * 1024
_TAIL: Final = 4096


def keep(disk: Disk, log: FileLog) -> None:
    """Add to the copy what the log has grown by; of another log it is made anew. Raises StorageError.

    One that goes on where the log ends stays: an older copy of the log may have been put back by mistake.
    """
    file = disk.open(SPARE, create=True)
    try:
        if not file.lock(wait=False):
            return  # Another process does the same.
        end = file.size()
        tail = file.read_at(max(0, end - _TAIL), min(end, _TAIL))
        if log.published(end - len(tail), len(tail)) != tail:
            seq, before = log.head()
            if record_at(file, log.end(), seq + 1, before):
                return
            end = 0
        while part := log.published(end, _PART):
            file.write_at(end, part)
            end += len(part)
        file.truncate(end)
    finally:
        file.close()


def mend(disk: Disk, cold: ObjectStore | None = None) -> list[int]:
    """Put records that are damaged in the log back from the copy, or from that in the cold tier; their numbers.

    Only with the log's lock, which is waited for: nobody writes meanwhile.

    Raises:
        StorageError: the disk refused.
    """
    with suppress(NotFoundError):
        spare = disk.open(SPARE)
        try:
            mended = _mended(disk, spare)
        finally:
            spare.close()
        if mended:
            return mended
    with suppress(IntegrityError, NotFoundError):
        return [] if cold is None else _mended(disk, _Pieces(cold))
    return []


def _mended(disk: Disk, source: Readable) -> list[int]:
    log = disk.open(LOG_PATH, create=True)
    try:
        log.lock(wait=True)
        found = list(_repairs(log, source))
        # What follows from a sound record of this log is of this log; the first record follows from nothing.
        if found and found[0].seq == 1 and not _continues(disk, log, source, found):
            return []
        for repair in found:
            log.write_at(repair.offset, repair.record)
        log.sync()
        return [repair.seq for repair in found]
    finally:
        log.close()


class _Repair(NamedTuple):
    """A record that is to stand at an offset of the log."""

    seq: int
    offset: int
    record: bytes


def _repairs(log: Readable, source: Readable) -> Iterator[_Repair]:
    """The records that the log lacks and the source has, as far as either has one."""
    seq, offset, before = 1, 0, bytes(32)
    while True:
        record = record_at(log, offset, seq, before)
        if not record:
            record = record_at(source, offset, seq, before)
            if not record:
                return
            yield _Repair(seq, offset, record)
        seq, offset, before = seq + 1, offset + len(record), hash_of(record)


def _continues(disk: Disk, log: Readable, source: Readable, found: Sequence[_Repair]) -> bool:
    """Whether a sound record of the log follows from those of the source, or its end was published behind one."""
    mark = published_mark(disk)
    for repair in found:
        seq, offset, before = repair.seq + 1, repair.offset + len(repair.record), hash_of(repair.record)
        if record_at(log, offset, seq, before) or (seq - 1, offset, before) == mark:
            return True
    return False


class _Pieces:
    """The log's copy in a cold tier."""

    def __init__(self, cold: ObjectStore) -> None:
        self._cold, self._pieces = cold, list(copies.pieces(cold))

    def read_at(self, offset: int, size: int) -> bytes:
        """Put together from the pieces it reaches into."""
        parts: list[bytes] = []
        for piece in self._pieces:
            begin, end = max(offset, piece.start), min(offset + size, piece.start + piece.size)
            if begin < end:
                parts += map(bytes, self._cold.get_ranges(piece.name, [(begin - piece.start, end - begin)]))
        return b"".join(parts)
