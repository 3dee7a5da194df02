"""The local commit log: one append-only file, a published end, and a lock that dies with its holder.

A record is durable before the end is published; readers never pass the published end. Bytes beyond it are the
last writer's unfinished business: the next holder of the lock publishes whole records and cuts a torn one. A
broken record with a whole one behind it is rot, not a torn tail, and is reported.

Record: magic `HLOG`, body length u32, sequence number u64, hash of the record before (32), body, digest of all
that (32), which is the record's hash, and the record's whole length u32, by which a reader walks back from the end.

The lock is not fair by itself: who gives it back and wants it again is awake, while those who wait must be woken. A
second file is a turnstile: its lock is taken first and given back once the main lock is held, so that there is
always one who comes next, and whoever had the main lock last has to queue behind it.
"""

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Final, Protocol, get_args

import msgspec
from blake3 import blake3

from him.catalog import checkpoint as checkpoints
from him.catalog.checkpoint import HEAD_BYTES, Mark
from him.config import CHECKPOINT_BYTES_MAX, CHECKPOINTS_KEPT, LOG_RECORD_BYTES_MAX
from him.errors import HimError, IntegrityError, LimitError, NotFoundError, StorageError, VersionError
from him.ports import Disk, File
from him.types import MALFORMED, CommitRecord, Operation

LOG_PATH: Final = "log/000001.log"
END_PATH: Final = "log/end"
TURN_PATH: Final = "log/turn"
CHECKPOINT_FOLDER: Final = "log/checkpoints"
_MAGIC: Final = b"HLOG"
_HEAD: Final = struct.Struct("<4sIQ32s")
_DIGEST: Final = 32
_SIZE: Final = 4
_LEAST: Final = _HEAD.size + _DIGEST + _SIZE
_TRIES: Final = 5
_END: Final = struct.Struct("<QQ32s")
END_BYTES: Final = _END.size + _DIGEST
"""Of the file that says where the published log ends; the digest is the last 32."""
_START: Final = Mark(0, 0, bytes(32))
_NAME_DIGITS: Final = 16
_WALK_MAX: Final = 100
"""Records walked back from the end before checkpoints are asked for a nearer place."""


_decoder: Final = msgspec.msgpack.Decoder(CommitRecord)
_KNOWN: Final = {str(kind.__struct_config__.tag) for kind in get_args(Operation)}


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
        self._turn = None if read_only else disk.open(TURN_PATH, create=True)
        self._last = _START
        self._undone: int | None = None
        # The file's lock holds between processes; threads of one share its descriptor.
        self._threads = threading.Lock()
        self._recover()

    @staticmethod
    def create(disk: Disk) -> None:
        """Make an empty log."""
        for path in (LOG_PATH, END_PATH, TURN_PATH):
            file = disk.open(path, create=True)
            file.sync()
            file.close()
        disk.sync_folder("log")

    def head(self) -> tuple[int, bytes]:
        """(seq, hash) of the last published record."""
        found = self._published()
        return found.seq, found.hash

    def read(self, since: int) -> Iterator[tuple[int, bytes, bytes]]:
        """(seq, hash, body) after `since`, up to the published end.

        Raises:
            IntegrityError: a record below the published end is damaged or out of order.
        """
        last = self._published()
        if since >= last.seq:
            return
        seq, offset = since, self._end_of(since)
        before = self._hash_before(offset)
        while seq < last.seq:
            record = _parse(self._file, offset, seq + 1, before)
            if record is None or record[2] > last.end:
                raise self._broken(seq + 1, offset)
            body, before, offset = record
            seq += 1
            yield seq, before, body

    def _broken(self, seq: int, offset: int) -> IntegrityError:
        """What is wrong with a record below the published end."""
        if offset >= self._file.size() or cut_short(self._file, offset):
            return IntegrityError(
                "the commit log is cut short, or an older copy of it", object=f"record {seq}",
                place=f"{LOG_PATH} @ {offset}",
            )  # fmt: skip
        return _damaged(seq, offset)

    def end(self) -> int:
        """Where the last published record ends."""
        return self._published().end

    def published(self, start: int, limit: int) -> bytes:
        """At most `limit` bytes of the log's file from an offset on, up to the published end."""
        return self._file.read_at(start, max(0, min(limit, self._published().end - start)))

    def hash_at(self, seq: int) -> bytes:
        """Hash of a published record; zeros for 0. Raises IntegrityError."""
        return self._hash_before(self._end_of(seq))

    def commit(self, build: Callable[[], bytes | None]) -> int:
        """Append under the lock: durable first, then published.

        Raises:
            StorageError: the disk refused; the record will not be found, unless undoing it was refused too.
        """
        with self._threads:
            self._lock()
            try:
                return self._commit(build)
            finally:
                self._file.unlock()

    def checkpoints(self) -> list[int]:
        """Sequence numbers of the checkpoints kept, newest first; those beyond the head belong to another log."""
        last = self._published().seq
        return [seq for seq in self._checkpoint_names() if seq <= last]

    def checkpoint(self, seq: int) -> tuple[bytes, bytes]:
        """(hash, body) of a checkpoint that verifies and belongs to this log.

        Raises:
            NotFoundError, IntegrityError, VersionError.
        """
        path = _checkpoint_path(seq)
        file = self._disk.open(path)
        try:
            if file.size() > CHECKPOINT_BYTES_MAX:
                raise IntegrityError("a checkpoint is larger than any can be", object=f"checkpoint {seq}", place=path)
            mark, body = checkpoints.decode_file(file.read_at(0, file.size()), path)
        finally:
            file.close()
        if mark.seq != seq or not self._holds(mark):
            raise IntegrityError("a checkpoint is not of this log", object=f"checkpoint {seq}", place=path)
        return mark.hash, body

    def put_checkpoint(self, seq: int, body: bytes) -> None:
        """Write one in one go, then remove older ones but the newest few.

        Raises:
            StorageError: the disk refused. LimitError: it is too large.
        """
        if len(body) + HEAD_BYTES > CHECKPOINT_BYTES_MAX:
            raise LimitError(f"a checkpoint holds at most {CHECKPOINT_BYTES_MAX} bytes")
        end = self._end_of(seq)
        mark = Mark(seq, end, self._hash_before(end))
        new_folder = not self._checkpoint_names()
        self._disk.write_whole(_checkpoint_path(seq), checkpoints.encode_file(mark, body))
        if new_folder:
            self._disk.sync_folder("log")
        names = self._checkpoint_names()
        # Asked for after the names: what another process has put is not beyond it.
        last = self._published().seq
        kept = [known for known in names if known <= last][:CHECKPOINTS_KEPT]
        for old in set(names) - set(kept):
            self._disk.remove(_checkpoint_path(old))

    def _lock(self) -> None:
        """Wait for the lock in the turnstile."""
        if self._turn is None:
            self._file.lock(wait=True)
            return
        self._turn.lock(wait=True)
        try:
            self._file.lock(wait=True)
        finally:
            self._turn.unlock()

    def _commit(self, build: Callable[[], bytes | None]) -> int:
        self._finish_tail()
        body = build()
        seq, offset, before = self._last
        if body is None:
            return seq
        if offset > self._file.size():
            # Written there the record would stand behind a hole.
            raise self._broken(seq, offset)
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
            # A failed sync may have made it durable: else a power loss would bring it back.
            self._file.sync()
            self._undone = None
            raise
        self._publish(Mark(seq + 1, offset + size, digest))
        return seq + 1

    def close(self) -> None:
        """Release the files."""
        self._file.close()
        self._end.close()
        if self._turn is not None:
            self._turn.close()

    def _recover(self) -> None:
        """At opening: publish or cut what the last writer left (or look behind the end).

        A power loss may have left an end that is far behind. If another process is just about to see to that, it has to
        be waited for: until then acknowledged commits would not be seen.
        """
        if not self._file.lock(wait=False):
            if self._file.size() <= self._published().end:
                return
            self._lock()
        try:
            self._finish_tail()
        finally:
            self._file.unlock()

    def _whole(self, start: Mark) -> Mark:
        """The end of the last whole record from `start` on."""
        seq, offset, before = start
        while (record := _parse(self._file, offset, seq + 1, before)) is not None:
            _, before, offset = record
            seq += 1
        return Mark(seq, offset, before)

    def _finish_tail(self) -> None:
        """Under the lock: what lies beyond the published end is published where it is whole, and cut where not."""
        start = self._published()
        if self._read_only:
            self._last = self._whole(start)
            return
        if self._undone == start.end:
            # The record of our failed commit could not be cut then; nobody took it for whole since.
            self._file.truncate(start.end)
        self._undone = None
        size = self._file.size()
        if start.end < size:
            # An end that a power loss left far behind is caught up with from the newest checkpoint.
            start = max([start, *self._marks()])
        found = self._whole(start)
        if found.end < size:
            if _has_whole_record(self._file, found.end + 1, size, found.seq + 1):
                raise _damaged(found.seq + 1, found.end)
            self._file.truncate(found.end)
        if found != self._written_end():
            self._file.sync()
            self._publish(found)

    def _end_of(self, seq: int) -> int:
        """Where record `seq` ends, by walking back from the nearest place behind it that is known.

        Raises:
            IntegrityError: a length on the way is damaged.
        """
        if seq == 0:
            return 0
        at, offset, _ = self._published()
        if at - seq > _WALK_MAX:
            at, offset, _ = min([Mark(at, offset, b""), *(mark for mark in self._marks() if mark.seq >= seq)])
        while at > seq:
            size = int.from_bytes(self._file.read_at(offset - _SIZE, _SIZE), "little")
            if not _LEAST <= size <= offset:
                raise self._broken(at, offset)
            at, offset = at - 1, offset - size
        return offset

    def _hash_before(self, offset: int) -> bytes:
        """Hash of the record that ends at `offset`."""
        return self._file.read_at(offset - _SIZE - _DIGEST, _DIGEST) if offset else bytes(_DIGEST)

    def _holds(self, mark: Mark) -> bool:
        """Whether the log has that record in that place."""
        return _LEAST <= mark.end <= self._file.size() and self._hash_before(mark.end) == mark.hash

    def _marks(self) -> list[Mark]:
        """The places checkpoints name, newest first, as far as the log confirms them."""
        marks: list[Mark] = []
        for seq in self._checkpoint_names():
            path = _checkpoint_path(seq)
            with contextlib.suppress(HimError):
                file = self._disk.open(path)
                try:
                    mark = checkpoints.decode_head(file.read_at(0, HEAD_BYTES), path)
                finally:
                    file.close()
                if self._holds(mark):
                    marks.append(mark)
        return marks

    def _checkpoint_names(self) -> list[int]:
        names = self._disk.list(CHECKPOINT_FOLDER)
        return sorted((int(name) for name in names if len(name) == _NAME_DIGITS and name.isdecimal()), reverse=True)

    def _published(self) -> Mark:
        """The published end. An end file that does not verify is damaged: the last whole record is the end."""
        found = self._written_end()
        if found is None:
            found = self._whole(max([self._last, *self._marks()]))
        # This process may know of a record whose end could not be written.
        self._last = max(self._last, found)
        return self._last

    def _written_end(self) -> Mark | None:
        """What the end file says; None when it is damaged."""
        for _ in range(_TRIES):
            # A reader may see half of what a writer is just publishing; the next look sees it whole.
            data = self._end.read_at(0, END_BYTES)
            if not data:
                return _START
            if blake3(data[: _END.size]).digest() == data[_END.size :]:
                return Mark(*_END.unpack(data[: _END.size]))
        return None

    def _publish(self, end: Mark) -> None:
        """Let others see what is durable.

        That it is durable has decided its fate: after a refusal here the next holder of the lock publishes it.
        """
        self._last = end
        data = _END.pack(*end)
        with contextlib.suppress(StorageError):
            self._end.write_at(0, data + blake3(data).digest())


def _checkpoint_path(seq: int) -> str:
    return f"{CHECKPOINT_FOLDER}/{seq:0{_NAME_DIGITS}d}"


class Readable(Protocol):
    """Bytes by place: a file, or the pieces of one."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end alone."""
        ...


def _parse(file: Readable, offset: int, seq: int, before: bytes) -> tuple[bytes, bytes, int] | None:
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


def parsed(seq: int, body: bytes) -> CommitRecord:
    """The record behind a body whose digest holds: what does not parse is not damaged, but newer.

    Raises:
        VersionError: it holds operations, or members of them, that this software does not know.
    """
    try:
        return _decoder.decode(body)
    except MALFORMED as error:
        raise VersionError(
            f"a commit record holds {_news(body, error)}", object=f"record {seq}", place=LOG_PATH
        ) from error


def _news(body: bytes, error: Exception) -> str:
    """What of a record is new, in words."""
    try:
        _, _, operations = msgspec.msgpack.decode(body)
        names = {str(operation[0])[:40] for operation in operations}
        if unknown := sorted(names - _KNOWN):
            return f"operations of newer software: {', '.join(unknown)}"
    except (*MALFORMED, ValueError, TypeError, IndexError, KeyError):
        pass
    return f"what newer software says ({error})"


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


def records_in(file: File) -> Iterator[tuple[int, bytes, bytes, int]]:
    """(seq, hash, body, where it ends) of the whole records a log's file begins with, whatever its published end."""
    seq, before, offset = _START.seq, _START.hash, _START.end
    while (record := _parse(file, offset, seq + 1, before)) is not None:
        body, before, offset = record
        seq += 1
        yield seq, before, body, offset


def record_at(file: Readable, offset: int, seq: int, before: bytes) -> bytes:
    """All bytes of the record `seq` that follows the hash `before`, as they stand at an offset; b"" when it is not."""
    record = _parse(file, offset, seq, before)
    return b"" if record is None else file.read_at(offset, record[2] - offset)


def published_mark(disk: Disk) -> Mark | None:
    """Where the log was published up to, as the end file says; None when that is damaged, or missing."""
    try:
        file = disk.open(END_PATH)
    except NotFoundError:
        return None
    try:
        data = file.read_at(0, END_BYTES)
    finally:
        file.close()
    whole = len(data) == END_BYTES and blake3(data[: _END.size]).digest() == data[_END.size :]
    return Mark(*_END.unpack(data[: _END.size])) if whole else None


def hash_of(record: bytes) -> bytes:
    """The hash that the record after it names."""
    return record[-_SIZE - _DIGEST : -_SIZE]


def cut_short(file: File, offset: int) -> bool:
    """Whether what stands at an offset begins as a record does and is longer than the file."""
    head = file.read_at(offset, _HEAD.size)
    if len(head) < _HEAD.size:
        return head.startswith(_MAGIC[: len(head)])
    magic, size, _, _ = _HEAD.unpack(head)
    return magic == _MAGIC and size <= LOG_RECORD_BYTES_MAX and offset + _LEAST + size > file.size()
