"""The local commit log: one append-only file, a published end, and a lock that dies with its holder.

A record is durable before the end is published; readers never pass the published end. Bytes beyond it are the
last writer's unfinished business: the next holder of the lock publishes whole records and cuts a torn one. A
broken record with a whole one behind it is rot, not a torn tail, and is reported.

Record: magic `HLOG`, body length u32, sequence number u64, hash of the record before (32), body, digest of all
that (32), which is the record's hash, and the record's whole length u32, by which a reader walks back from the end.
"""

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Final

from blake3 import blake3

from him.config import LOG_RECORD_BYTES_MAX
from him.errors import IntegrityError, LimitError, NotFoundError, StorageError
from him.ports import Disk, File

LOG_PATH: Final = "log/000001.log"
END_PATH: Final = "log/end"
_MAGIC: Final = b"HLOG"
_HEAD: Final = struct.Struct("<4sIQ32s")
_DIGEST: Final = 32
_SIZE: Final = 4
_TRIES: Final = 5
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
        self._last = _START
        self._undone: int | None = None
        # The file's lock holds between processes; threads of one share its descriptor.
        self._threads = threading.Lock()
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
        seq, offset = since, self._end_of(since)
        before = self._file.read_at(offset - _SIZE - _DIGEST, _DIGEST) if seq else bytes(_DIGEST)
        while seq < last:
            record = _parse(self._file, offset, seq + 1, before)
            if record is None or record[2] > end:
                raise _damaged(seq + 1, offset)
            body, before, offset = record
            seq += 1
            yield seq, before, body

    def hash_at(self, seq: int) -> bytes:
        """Hash of a published record; zeros for 0. Raises IntegrityError."""
        return self._file.read_at(self._end_of(seq) - _SIZE - _DIGEST, _DIGEST) if seq else bytes(_DIGEST)

    def commit(self, build: Callable[[], bytes | None]) -> int:
        """Append under the lock: durable first, then published.

        Raises:
            StorageError: the disk refused; the record will not be found, unless undoing it was refused too.
        """
        with self._threads:
            return self._commit(build)

    def _commit(self, build: Callable[[], bytes | None]) -> int:
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
                size = len(head) + _DIGEST + _SIZE
                self._file.write_at(offset, head + digest + size.to_bytes(_SIZE, "little"))
                self._file.sync()
            except BaseException:
                # Nothing of a failed commit may be found by the next holder.
                self._undone = offset
                self._file.truncate(offset)
                self._undone = None
                raise
            self._publish((seq + 1, offset + size, digest))
            return seq + 1
        finally:
            self._file.unlock()

    def close(self) -> None:
        """Release the files."""
        self._file.close()
        self._end.close()

    def _recover(self) -> None:
        """At opening, when no writer is alive: publish or cut what the last one left (or look behind the end)."""
        if self._file.lock(wait=False):
            try:
                if self._read_only:
                    self._last = self._whole(self._published())
                else:
                    self._finish_tail()
            finally:
                self._file.unlock()

    def _whole(self, start: tuple[int, int, bytes]) -> tuple[int, int, bytes]:
        """The end of the last whole record from `start` on."""
        seq, offset, before = start
        while (record := _parse(self._file, offset, seq + 1, before)) is not None:
            _, before, offset = record
            seq += 1
        return seq, offset, before

    def _finish_tail(self) -> None:
        start = self._published()
        if self._undone == start[1]:
            # The record of our failed commit could not be cut then; nobody took it for whole since.
            self._file.truncate(start[1])
        self._undone = None
        seq, offset, before = self._whole(start)
        size = self._file.size()
        if offset < size:
            if _has_whole_record(self._file, offset + 1, size, seq + 1):
                raise _damaged(seq + 1, offset)
            self._file.truncate(offset)
        if (seq, offset, before) != self._written_end():
            self._file.sync()
            self._publish((seq, offset, before))

    def _end_of(self, seq: int) -> int:
        """Where record `seq` ends, by walking back from the published end.

        Raises:
            IntegrityError: a length on the way is damaged.
        """
        last, offset, _ = self._published()
        if seq == 0:
            return 0
        for number in range(last, seq, -1):
            size = int.from_bytes(self._file.read_at(offset - _SIZE, _SIZE), "little")
            if not _HEAD.size + _DIGEST + _SIZE <= size <= offset:
                raise _damaged(number, offset)
            offset -= size
        return offset

    def _published(self) -> tuple[int, int, bytes]:
        """(seq, end offset, hash). An end file that does not verify is damaged: the last whole record is the end."""
        found = self._written_end()
        if found is None:
            found = self._whole(self._last)
        # This process may know of a record whose end could not be written.
        self._last = max(self._last, found)
        return self._last

    def _written_end(self) -> tuple[int, int, bytes] | None:
        """What the end file says; None when it is damaged."""
        for _ in range(_TRIES):
            # A reader may see half of what a writer is just publishing; the next look sees it whole.
            data = self._end.read_at(0, _END.size + _DIGEST)
            if not data:
                return _START
            if blake3(data[: _END.size]).digest() == data[_END.size :]:
                return _END.unpack(data[: _END.size])
        return None

    def _publish(self, end: tuple[int, int, bytes]) -> None:
        """Let others see what is durable.

        That it is durable has decided its fate: after a refusal here the next holder of the lock publishes it.
        """
        self._last = end
        data = _END.pack(*end)
        with contextlib.suppress(StorageError):
            self._end.write_at(0, data + blake3(data).digest())


def _parse(file: File, offset: int, seq: int, before: bytes) -> tuple[bytes, bytes, int] | None:
    """(body, hash, next offset) of the record `seq` that follows the hash `before`, or None."""
    head = file.read_at(offset, _HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, size, own_seq, own_before = _HEAD.unpack(head)
    if magic != _MAGIC or size > LOG_RECORD_BYTES_MAX or own_seq != seq or own_before != before:
        return None
    rest = file.read_at(offset + _HEAD.size, size + _DIGEST + _SIZE)
    body, digest, total = rest[:size], rest[size : size + _DIGEST], rest[size + _DIGEST :]
    whole = _HEAD.size + size + _DIGEST + _SIZE
    if total != whole.to_bytes(_SIZE, "little") or blake3(head + body).digest() != digest:
        return None
    return body, digest, offset + whole


def _damaged(seq: int, offset: int) -> IntegrityError:
    return IntegrityError("the commit log is damaged", object=f"record {seq}", place=f"{LOG_PATH} @ {offset}")


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
