"""Watches a repository's log from outside: takes each published record over into the model, and sees that it stays."""

import struct
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from blake3 import blake3

from him.sim.disk import Volume
from him.sim.model import Act, Contents, Model, Violation
from him.types import CommitRecord

LOG: Final = "log/000001.log"
END: Final = "log/end"
_HEAD: Final = struct.Struct("<4sIQ32s")
_END: Final = struct.Struct("<QQ32s")
_DIGEST: Final = 32
_decoder: Final = msgspec.msgpack.Decoder(CommitRecord)


def records(data: bytes | bytearray, offset: int = 0, seq: int = 0, before: bytes = bytes(32)) -> Iterator[
    tuple[int, bytes, bytes, int]
]:  # fmt: skip
    """(seq, hash, body, where it ends) of the whole records from an offset on, read by docs/FORMAT.md alone."""
    view = memoryview(data)
    while offset + _HEAD.size <= len(view):
        magic, size, own, previous = _HEAD.unpack_from(view, offset)
        end = offset + _HEAD.size + size + _DIGEST + 4
        if magic != b"HLOG" or own != seq + 1 or previous != before or end > len(view):
            return
        digest = bytes(view[end - _DIGEST - 4 : end - 4])
        if blake3(view[offset : end - _DIGEST - 4]).digest() != digest:
            return
        yield own, digest, bytes(view[offset + _HEAD.size : end - _DIGEST - 4]), end
        offset, seq, before = end, own, digest


def published(volume: Volume) -> int | None:
    """The sequence number that the published end names; None where it does not verify."""
    data = bytes(volume.files[END].now) if END in volume.files else b""
    if not data:
        return 0
    if len(data) < _END.size + _DIGEST or blake3(data[: _END.size]).digest() != data[_END.size : _END.size + _DIGEST]:
        return None
    return int(_END.unpack_from(data)[0])


class Ledger:
    """The model of one repository, kept at what its log has published.

    Args:
        writer: the call that made a record, by the record's time; None where nobody did.
    """

    def __init__(self, contents: Contents, writer: Callable[[int], Act | None]) -> None:
        self.model = Model(contents)
        self._writer = writer
        self._end = 0
        self.hashes: list[bytes] = []
        """Of the records taken over, in order."""
        self.ends: list[int] = []
        self.taken: list[CommitRecord] = []

    def look(self, volume: Volume, *, up_to: int = 0) -> None:
        """Take over what is published, and what a process that was told so knows to be durable (`up_to`).

        Raises:
            Violation: a record that nobody may have written, or that is not there.
        """
        target = max(published(volume) or 0, up_to)
        if target <= self.model.seq:
            return
        before = self.hashes[-1] if self.hashes else bytes(_DIGEST)
        for seq, digest, body, end in records(volume.files[LOG].now, self._end, self.model.seq, before):
            self._take(seq, digest, body, end)
            if seq == target:
                return
        raise Violation("a record that was told of is not in the log", f"{target}, the last one is {self.model.seq}")

    def check(self, volume: Volume) -> None:
        """Every record that was published is in the log still. Raises Violation."""
        found = [digest for _, digest, _, _ in records(volume.files[LOG].now)] if LOG in volume.files else []
        if found[: len(self.hashes)] != self.hashes:
            same = next((n for n, (a, b) in enumerate(zip(found, self.hashes, strict=False)) if a != b), len(found))
            raise Violation("a published record is lost", f"record {same + 1} of {len(self.hashes)}")

    def at(self, seq: int) -> Model:
        """The model as it stood after a record."""
        model = Model(self.model.contents)
        for number, record in enumerate(self.taken[:seq], 1):
            model.take(number, record, None)
        return model

    def _take(self, seq: int, digest: bytes, body: bytes, end: int) -> None:
        record = _decoder.decode(body)
        act = self._writer(record.time_ns)
        if act is None:
            raise Violation("a record nobody wrote", f"record {seq} by {record.writer}")
        if act.ended not in ("", "ok") and not act.doubt:
            raise Violation("a failed commit became visible", f"record {seq}: {act.kind} #{act.number}, {act.ended}")
        self.model.take(seq, record, act)
        self.hashes.append(digest)
        self.ends.append(end)
        self.taken.append(record)
        self._end = end
