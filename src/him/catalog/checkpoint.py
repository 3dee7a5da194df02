"""Checkpoints: all that the log's records leave standing at one of them, so that opening never reads them all.

`Fold` is what the log means, record by record; the projection says the same in SQL, and fsck compares the two. A
checkpoint is the fold at a record, made from the log and the checkpoint before, never from the projection, which has
no digests. So its bytes follow from the log alone, whoever writes it.

File: magic `HIMCKPT` 1, version u16 (1 has neither retention nor what became of packs, 2 nothing of keys), six zeros,
sequence number u64, end offset of that record in the log u64, its hash (32), digest of these 64 bytes and the body
(32), body (MessagePack). Version 3 is written only where there is anything of keys to say.
"""

import struct
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, cast

import msgspec
from blake3 import blake3

from him.errors import HimError, IntegrityError, VersionError
from him.ports import CommitLog
from him.types import (
    MALFORMED,
    AttributeSet,
    Batch,
    CommitRecord,
    DirectoryWrapped,
    LiveState,
    Operation,
    PackCondemned,
    PackFinished,
    PackRange,
    PackRemoved,
    PackState,
    RefSet,
    RetentionSet,
    Sealed,
    Snapshot,
    SnapshotDropped,
    SnapshotId,
    SnapshotOpened,
    SnapshotShredded,
    StreamDeclared,
    StreamSpec,
    TilesExpired,
)

_MAGIC: Final = b"HIMCKPT\x01"
_VERSION: Final = 3
_PLAIN: Final = 2
_WITH_KEYS: Final = 0x9A
"""How a body of version 3 begins: an array of ten."""
_HEAD: Final = struct.Struct("<8sH6sQQ32s")
_DIGEST: Final = 32
HEAD_BYTES: Final = _HEAD.size + _DIGEST


class Mark(NamedTuple):
    """A place in the log: sequence number, end offset and hash of a record."""

    seq: int
    end: int
    hash: bytes


class _Pack:
    """A pack as the fold holds it."""

    def __init__(self, state: PackState) -> None:
        self.seq = state.seq
        self.ranges = list(state.ranges)
        self.finished = state.finished
        self.condemned, self.removed = state.condemned, state.removed

    def state(self, name: str) -> PackState:
        return PackState(name, self.seq, tuple(self.ranges), self.finished, self.condemned, self.removed)


class Fold:
    """The live state as one record after the other changes it."""

    def __init__(self, start: LiveState = LiveState()) -> None:
        self.seq, self._hash, self._lamport = start.seq, start.hash, start.lamport
        self._snapshots = {one.snapshot_id: (seq, one) for seq, one in start.snapshots}
        self._refs = {name: (kind, target) for name, kind, target in start.refs}
        self._streams: dict[str, StreamSpec] = {spec.name: spec for spec in start.streams}
        self._packs = {pack.name: _Pack(pack) for pack in start.packs}
        self._retention = {(stream, task): ttl_s for stream, task, ttl_s in start.retention}
        self._expired = {(stream, origin): before for stream, origin, before in start.expired}
        self._shredded = set(start.shredded)

    def apply(self, records: Iterable[tuple[int, bytes, CommitRecord]]) -> None:
        """Take in records that follow in order."""
        for seq, digest, record in records:
            for operation in record.operations:
                self._apply(seq, operation)
            self.seq, self._hash = seq, digest

    def state(self) -> LiveState:
        """What stands now; equal histories give equal states."""
        return LiveState(
            self.seq,
            self._hash,
            self._lamport,
            tuple(sorted(self._snapshots.values(), key=lambda found: (found[0], found[1].snapshot_id))),
            tuple((name, *self._refs[name]) for name in sorted(self._refs)),
            tuple(self._streams[name] for name in sorted(self._streams)),
            tuple(pack.state(name) for name, pack in self._packs.items()),
            tuple((*rule, self._retention[rule]) for rule in sorted(self._retention)),
            tuple((*what, self._expired[what]) for what in sorted(self._expired)),
            tuple(sorted(self._shredded)),
        )

    def _apply(self, seq: int, operation: Operation) -> None:
        match operation:
            case SnapshotOpened():
                self._snapshots[operation.snapshot_id] = (seq, operation.snapshot())
            case Batch():
                self._replace(operation.snapshot_id, lambda found: found.moved(operation.directory))
            case Sealed():
                # Kept apart from the snapshots: a time is not given twice, even if its snapshot was dropped.
                self._lamport = max(self._lamport, operation.lamport)
                self._change(operation.snapshot_id, **operation.fields())
            case AttributeSet():
                self._tag(operation)
            case SnapshotDropped():
                self._snapshots.pop(operation.snapshot_id, None)
            case DirectoryWrapped():
                self._replace(operation.snapshot_id, lambda found: found.opened_by(operation.wrap))
            case SnapshotShredded():
                self._shredded.add(operation.snapshot_id)
            case RefSet() if operation.snapshot_id:
                self._refs[operation.name] = (operation.kind, operation.snapshot_id)
            case RefSet():
                self._refs.pop(operation.name, None)
            case StreamDeclared():
                self._streams[operation.spec.name] = operation.spec
            case PackRange():
                pack = self._packs.setdefault(operation.pack, _Pack(PackState(operation.pack, seq)))
                pack.seq = seq
                pack.ranges.append((seq, operation))
            case PackFinished():
                pack = self._packs.setdefault(operation.pack, _Pack(PackState(operation.pack, seq)))
                # Its footer has the rows of all its ranges.
                pack.ranges, pack.finished = [], operation
            case PackCondemned() | PackRemoved() | RetentionSet() | TilesExpired():
                self._release(seq, operation)

    def _release(self, seq: int, operation: PackCondemned | PackRemoved | RetentionSet | TilesExpired) -> None:
        match operation:
            case PackCondemned():
                if (pack := self._packs.get(operation.pack)) is not None:
                    pack.condemned = seq
            case PackRemoved():
                # Its name stays, for packs are numbered by rank.
                if (pack := self._packs.get(operation.pack)) is not None:
                    pack.removed, pack.ranges, pack.finished = seq, [], None
            case RetentionSet(ttl_s=ttl_s) if ttl_s < 0:
                self._retention.pop((operation.stream, operation.task), None)
            case RetentionSet():
                self._retention[operation.stream, operation.task] = operation.ttl_s
            case TilesExpired():
                for origin in operation.origins or ("",):
                    what = (operation.stream, str(origin))
                    self._expired[what] = max(operation.before_ns, self._expired.get(what, 0))

    def _change(self, snapshot_id: SnapshotId, **fields: object) -> None:
        self._replace(snapshot_id, lambda found: msgspec.structs.replace(found, **fields))

    def _replace(self, snapshot_id: SnapshotId, change: Callable[[Snapshot], Snapshot]) -> None:
        found = self._snapshots.get(snapshot_id)
        if found is not None:
            self._snapshots[snapshot_id] = (found[0], change(found[1]))

    def _tag(self, operation: AttributeSet) -> None:
        found = self._snapshots.get(operation.snapshot_id)
        if found is not None:
            tags = {key: value for key, value in found[1].tags.items() if key != operation.key}
            if operation.value is not None:
                tags[operation.key] = operation.value
            self._change(operation.snapshot_id, tags=tags)


_decoder: Final = msgspec.msgpack.Decoder(LiveState)


def encode(state: LiveState) -> bytes:
    """The body of a checkpoint: canonical MessagePack."""
    body = cast("list[Any]", msgspec.to_builtins(state, builtin_types=(bytes,), order="deterministic"))
    keyed = (
        state.shredded or any(one.wraps for _, one in state.snapshots) or any(one.encrypted for one in state.streams)
    )
    if not keyed:
        body.pop()
        for _, snapshot in body[3]:
            del snapshot["wraps"]
    return msgspec.msgpack.encode(body)


def load(log: CommitLog, seq: int) -> LiveState:
    """The state in a checkpoint the log keeps.

    Raises:
        IntegrityError: it is damaged, or not of this log. VersionError: written by newer software.
        NotFoundError: there is none at `seq`.
    """
    digest, body = log.checkpoint(seq)
    state = decode(body, seq)
    if (state.seq, state.hash) != (seq, digest):
        raise IntegrityError("a checkpoint is of another record", object=f"checkpoint {seq}")
    return state


def decode(body: bytes, seq: int) -> LiveState:
    """Inverse of `encode`, of a body whose digest holds. Raises VersionError."""
    try:
        return _decoder.decode(body)
    except MALFORMED as error:
        raise VersionError(
            f"a checkpoint says what newer software does ({error})", object=f"checkpoint {seq}"
        ) from error


def newest(log: CommitLog, *, up_to: int | None = None) -> LiveState:
    """The newest checkpoint that is sound (and not beyond a record); the empty state when there is none."""
    for seq in log.checkpoints():
        if up_to is None or seq <= up_to:
            try:
                return load(log, seq)
            except HimError:
                continue
    return LiveState()


def encode_file(mark: Mark, body: bytes) -> bytes:
    """The bytes of a checkpoint's file."""
    version = _VERSION if body[0] == _WITH_KEYS else _PLAIN
    head = _HEAD.pack(_MAGIC, version, bytes(6), mark.seq, mark.end, mark.hash)
    return head + blake3(head + body).digest() + body


def decode_head(data: bytes, place: str) -> Mark:
    """Which record a file that begins with `data` says it is of; nothing is verified but its magic.

    Raises:
        IntegrityError.
    """
    if len(data) < HEAD_BYTES or data[: len(_MAGIC)] != _MAGIC:
        raise IntegrityError("not a checkpoint", place=place)
    _, _, _, seq, end, digest = _HEAD.unpack(data[: _HEAD.size])
    return Mark(seq, end, digest)


def decode_file(data: bytes, place: str) -> tuple[Mark, bytes]:
    """Inverse of `encode_file`. Raises IntegrityError, VersionError."""
    mark, body = decode_head(data, place), data[HEAD_BYTES:]
    if blake3(data[: _HEAD.size] + body).digest() != data[_HEAD.size : HEAD_BYTES]:
        raise IntegrityError("a checkpoint does not match its digest", object=f"checkpoint {mark.seq}", place=place)
    # Only now: a version whose digest does not hold is no newer one, but damage.
    version = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 2], "little")
    if version > _VERSION:
        raise VersionError(
            f"the checkpoint has version {version}, this software knows {_VERSION}",
            object=f"checkpoint {mark.seq}", place=place,
        )  # fmt: skip
    return mark, body
