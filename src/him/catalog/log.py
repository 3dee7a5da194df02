"""The local commit log: one append-only file, a published end, and a lock that dies with its holder.

A record is durable before the end is published; readers never pass the published end. Bytes beyond it are the
last writer's unfinished business: the next holder of the lock publishes whole records and cuts a torn one. A
broken record with a whole one behind it is rot, not a torn tail, and is reported.

Record: magic `HLOG`, body length u32, sequence number u64, hash of the record before (32), body, digest of all
that (32), which is the record's hash.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final

from blake3 import blake3

from him.config import LOG_RECORD_BYTES_MAX
from him.errors import IntegrityError, LimitError, NotFoundError
from him.ports import Disk, File

LOG_PATH: Final = "log/000001.log"
END_PATH: Final = "log/end"
_MAGIC: Final = b"HLOG"
_HEAD: Final = struct.Struct("<4sIQ32s")
_DIGEST: Final = 32
_END: Final = struct.Struct("<QQ32s")
_START: Final = (0, 0, bytes(32))


class FileLog:
    """`ports.CommitLog` on a Disk."""

    def __init__(self, disk: Disk, *, read_only: bool = False) -> None:
        self._disk = disk
        self._read_only = read_only
        try:
            self._file = disk.open(LOG_PATH)
        except NotFoundError as error:
            raise IntegrityError("the commit log is missing", place=LOG_PATH) from error
        self._end = disk.open(END_PATH, create=not read_only)
        self._known = [_START]
        self._recover()

    @staticmethod
    def create(disk: Disk) -> None:
        """Make an empty log."""
        for path in (LOG_PATH, END_PATH):
            file = disk.open(path, create=True)
            file.sync()
            file.close()
        disk.sync_folder("log")

    def head(self) -> tuple[int, bytes]:
        """(seq, hash) of the last published record."""
        seq, _, digest = self._published()
        return seq, digest

    def read(self, since: int) -> Iterator[tuple[int, bytes, bytes]]:
        """(seq, hash, body) after `since`, up to the published end.

        Raises:
            IntegrityError: a record below the published end is damaged or out of order.
        """
        last, end, _ = self._published()
        if since >= last:
            return
        seq, offset, before = max((known for known in self._known if known[0] <= since), default=_START)
        while seq < last:
            record = _parse(self._file, offset, seq + 1, before)
            if record is None or record[2] > end:
                raise IntegrityError(
                    "the commit log is damaged", object=f"record {seq + 1}", place=f"{LOG_PATH} @ {offset}"
                )
            body, before, offset = record
            seq += 1
            if seq > since:
                yield seq, before, body
        self._known = [_START, (seq, offset, before)]

    def commit(self, build: Callable[[], bytes | None]) -> int:
        """Append under the lock: durable first, then published."""
        self._file.lock(wait=True)
        try:
            self._finish_tail()
            body = build()
            seq, offset, before = self._published()
            if body is None:
                return seq
            if len(body) > LOG_RECORD_BYTES_MAX:
                raise LimitError(f"a commit record holds at most {LOG_RECORD_BYTES_MAX} bytes; got {len(body)}")
            head = _HEAD.pack(_MAGIC, len(body), seq + 1, before) + body
            digest = blake3(head).digest()
            try:
                self._file.write_at(offset, head + digest)
                self._file.sync()
            except Exception:
                # Nothing of a failed commit may be found by the next holder.
                self._file.truncate(offset)
                raise
            self._publish((seq + 1, offset + len(head) + _DIGEST, digest))
            return seq + 1
        finally:
            self._file.unlock()

    def close(self) -> None:
        """Release the files."""
        self._file.close()
        self._end.close()

    def _recover(self) -> None:
        """At opening, when no writer is alive: publish or cut what the last one left."""
        if not self._read_only and self._file.lock(wait=False):
            try:
                self._finish_tail()
            finally:
                self._file.unlock()

    def _finish_tail(self) -> None:
        seq, offset, before = start = self._published()
        size = self._file.size()
        while offset < size and (record := _parse(self._file, offset, seq + 1, before)) is not None:
            _, before, offset = record
            seq += 1
        if offset < size:
            if _has_whole_record(self._file, offset + 1, size, seq + 1):
                raise IntegrityError(
                    "the commit log is damaged", object=f"record {seq + 1}", place=f"{LOG_PATH} @ {offset}"
                )
            self._file.truncate(offset)
        if (seq, offset, before) != start:
            self._file.sync()
            self._publish((seq, offset, before))

    def _published(self) -> tuple[int, int, bytes]:
        """(seq, end offset, hash); the start when the end file is unreadable, whence all is scanned again."""
        data = self._end.read_at(0, _END.size + _DIGEST)
        if len(data) == _END.size + _DIGEST and blake3(data[: _END.size]).digest() == data[_END.size :]:
            return _END.unpack(data[: _END.size])
        return _START

    def _publish(self, end: tuple[int, int, bytes]) -> None:
        data = _END.pack(*end)
        self._end.write_at(0, data + blake3(data).digest())


def _parse(file: File, offset: int, seq: int, before: bytes) -> tuple[bytes, bytes, int] | None:
    """(body, hash, next offset) of the record `seq` that follows the hash `before`, or None."""
    head = file.read_at(offset, _HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, size, own_seq, own_before = _HEAD.unpack(head)
    if magic != _MAGIC or size > LOG_RECORD_BYTES_MAX or own_seq != seq or own_before != before:
        return None
    rest = file.read_at(offset + _HEAD.size, size + _DIGEST)
    body, digest = rest[:size], rest[size:]
    if len(rest) != size + _DIGEST or blake3(head + body).digest() != digest:
        return None
    return body, digest, offset + _HEAD.size + size + _DIGEST


def _has_whole_record(file: File, offset: int, end: int, above: int) -> bool:
    """Whether a whole record numbered above `above` begins anywhere in [offset, end)."""
    data = file.read_at(offset, end - offset)
    at = data.find(_MAGIC)
    while at >= 0:
        head = data[at : at + _HEAD.size]
        if len(head) == _HEAD.size:
            _, _, seq, before = _HEAD.unpack(head)
            if seq > above and _parse(file, offset + at, seq, before) is not None:
                return True
        at = data.find(_MAGIC, at + 1)
    return False
