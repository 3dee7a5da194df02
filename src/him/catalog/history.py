"""Snapshots, branches and the durable commit: every change is one record of the commit log.

`History` is the only writer of records. It keeps the projection at the log's head, builds pages on the current
directory under the log's lock (so nobody retries), and makes pages durable before the record that names them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from him.catalog import changes as changing
from him.catalog.changes import FrameChange
from him.config import STREAMS
from him.errors import BusyError, ConflictError, HimError, IntegrityError, NotFoundError, SealedError, UsageError
from him.ports import Clock, CommitLog, Memo, Projection, Rng
from him.pyramid import directory, levels
from him.tier.warm import WarmStore
from him.tile import codec
from him.tile.downsample import RULES
from him.types import (
    SNAPSHOT_PREFIX,
    AttributeSet,
    Batch,
    CommitRecord,
    Operation,
    PackRange,
    Parent,
    RefSet,
    Sealed,
    Snapshot,
    SnapshotDropped,
    SnapshotId,
    SnapshotOpened,
    StreamDeclared,
    StreamSpec,
    checked_name,
    snapshot_bytes,
    snapshot_id,
)

BRANCH: Final = "branch"
TAG: Final = "tag"
_NS_PER_MS: Final = 1_000_000


def new_ulid(now_ns: int, rng: Rng) -> bytes:
    """16 bytes: 48 bits of milliseconds, 80 random bits."""
    return (now_ns // _NS_PER_MS).to_bytes(6, "big") + rng.token(10)


class History:
    """The DAG of snapshots and the refs into it."""

    def __init__(
        self,
        log: CommitLog,
        projection: Projection,
        store: WarmStore,
        memo: Memo,
        clock: Clock,
        rng: Rng,
        writer: str,
    ) -> None:
        self._log = log
        self._projection = projection
        self._store = store
        self._memo = memo
        self._clock = clock
        self._rng = rng
        self._writer = writer

    # -- reading

    def refresh(self) -> None:
        """Bring the projection to the log's head; a projection of another history is rebuilt."""
        seq, digest = self._projection.position()
        head = self._log.head()
        if (seq, digest) == head:
            return
        if seq > head[0] or self._log.hash_at(seq) != digest:
            self._projection.clear()
            seq = 0
        self._projection.apply(self._decoded(seq))

    def rebuild(self) -> None:
        """Make the projection anew from the log alone."""
        self._projection.clear()
        self._projection.apply(self._decoded(0))

    def records(self, since: int = 0) -> Iterator[tuple[int, bytes, CommitRecord]]:
        """(seq, hash, record) after `since`, oldest first."""
        return self._decoded(since)

    def snapshot(self, name: str) -> Snapshot:
        """The snapshot that a branch, a tag or an id (or an unambiguous beginning of one) names.

        Raises:
            NotFoundError: nothing bears that name.
        """
        self.refresh()
        named = self._projection.refs().get(name)
        found = self._projection.snapshot(named[1] if named else name)
        if found is None and name.startswith(SNAPSHOT_PREFIX) and len(name) > len(SNAPSHOT_PREFIX) + 5:
            matches = [one for one in self._projection.snapshots() if one.snapshot_id.startswith(name)]
            found = matches[0] if len(matches) == 1 else None
        if found is None:
            raise NotFoundError(f"no snapshot, branch or tag is called {name!r}", object=name)
        return found

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, oldest first."""
        self.refresh()
        return list(self._projection.snapshots())

    def refs(self) -> dict[str, tuple[str, str]]:
        """Name → (kind, snapshot id)."""
        self.refresh()
        return self._projection.refs()

    def stream(self, name: str) -> StreamSpec:
        """The declared stream. Raises NotFoundError."""
        found = STREAMS.get(name) or self._projection.streams().get(name)
        if found is None:
            known = ", ".join([*STREAMS, *self._projection.streams()])
            raise NotFoundError(f"no stream is called {name!r}", object=name, fix=f"declare it, or use one of: {known}")
        return found

    def base_directory(self, found: Snapshot) -> bytes:
        """The first parent's directory at branching, or the empty one."""
        return found.parents[0].directory if found.parents else directory.EMPTY

    # -- writing

    def open_snapshot(
        self,
        *,
        parent: str | None = None,
        branch: str | None = None,
        tags: Mapping[str, str] | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> Snapshot:
        """A new open snapshot, in O(1): it starts with its parent's directory.

        Raises:
            ConflictError: the branch exists already.
            NotFoundError: no such parent.
        """
        now = self._clock.now_ns()
        new_id = snapshot_id(new_ulid(now, self._rng))
        if branch is not None:
            _check_ref_name(branch)

        def build() -> bytes:
            self.refresh()
            if branch is not None and branch in self._projection.refs():
                raise ConflictError(f"the name {branch!r} is taken", object=branch)
            source = self.snapshot(parent) if parent is not None else None
            return self._encoded(self._opening(new_id, source, now, branch, tags or {}, provenance or {}))

        self._commit(build)
        return self.snapshot(new_id)

    def writable(self, name: str) -> Snapshot:
        """The open snapshot to write to under a name: an unknown branch is created empty, a sealed head gets a child.

        Raises:
            SealedError: an id (or a tag) names a sealed snapshot.
        """
        self._prepare()
        self.refresh()
        named = self._projection.refs().get(name)
        if named is None and not name.startswith(SNAPSHOT_PREFIX):
            return self.open_snapshot(branch=name)
        found = self.snapshot(name)
        if not found.sealed:
            return found
        if named is None or named[0] != BRANCH:
            raise SealedError(f"{name} is sealed", object=found.snapshot_id)
        return self._open_child(name)

    def commit(self, target: SnapshotId, changes: Sequence[FrameChange], *, epoch: int) -> Snapshot:
        """Make a batch durable and visible, all of it or nothing.

        Args:
            epoch: `WarmStore.epoch` from before the first blob of the batch was put.

        Raises:
            SealedError: the snapshot was sealed meanwhile.
            StorageError: the disk refused; nothing of the batch is visible.
        """
        origin = snapshot_bytes(target)

        def build() -> bytes | None:
            self.refresh()
            found = self._open(target)
            if self._store.epoch != epoch:
                raise BusyError("an earlier failure took this batch's blobs with it", fix="write the batch again")
            base = self.base_directory(found)
            after = changing.apply(self._store, found.directory, base, origin, changes)
            if after == found.directory:
                return None
            return self._encoded([Batch(target, found.directory, after)])

        self._commit(build)
        return self.snapshot(target)

    def seal(self, name: str) -> Snapshot:
        """End writing to a snapshot: its levels are computed, its Lamport time is set. Sealing twice is no change."""
        self._prepare()
        found = self.snapshot(name)
        while not found.sealed:
            root = levels.levels_root(self._store, self._memo, found.directory)
            expected = found

            def build(expected: Snapshot = expected, root: bytes = root) -> bytes | None:
                self.refresh()
                now = self.snapshot(expected.snapshot_id)
                if now.sealed or now.directory != expected.directory:
                    return None
                lamport = self._projection.lamport() + 1
                return self._encoded([Sealed(now.snapshot_id, now.directory, root, lamport)])

            self._commit(build)
            found = self.snapshot(found.snapshot_id)
        return found

    def set_ref(self, name: str, kind: str, target: str) -> None:
        """Point a tag or branch at a snapshot. Raises ConflictError when the name is of the other kind."""
        _check_ref_name(name)

        def build() -> bytes:
            self.refresh()
            taken = self._projection.refs().get(name)
            if taken is not None and (taken[0] != kind or kind == TAG):
                raise ConflictError(f"{name!r} is already a {taken[0]}", object=name)
            return self._encoded([RefSet(name, kind, self.snapshot(target).snapshot_id)])

        self._commit(build)

    def delete_ref(self, name: str) -> None:
        """Remove a branch or tag; the snapshot stays. Raises NotFoundError."""

        def build() -> bytes:
            self.refresh()
            taken = self._projection.refs().get(name)
            if taken is None:
                raise NotFoundError(f"no branch or tag is called {name!r}", object=name)
            return self._encoded([RefSet(name, taken[0], "")])

        self._commit(build)

    def set_attribute(self, name: str, key: str, value: str | None) -> None:
        """Set (or, with None, remove) a key-value pair on a snapshot."""
        if not key:
            raise UsageError("an attribute's key is not empty")
        target = self.snapshot(name).snapshot_id
        self._commit(lambda: self._encoded([AttributeSet(target, key, value)]))

    def declare_stream(self, spec: StreamSpec) -> None:
        """Add a stream of the user's own.

        Raises:
            UsageError: it could not be written, or not be halved exactly.
            ConflictError: the name means something else already.
        """
        _check_stream(spec)

        def build() -> bytes | None:
            self.refresh()
            known = STREAMS.get(spec.name) or self._projection.streams().get(spec.name)
            if known == spec:
                return None
            if known is not None:
                raise ConflictError("a stream of that name is declared otherwise", object=spec.name)
            return self._encoded([StreamDeclared(spec)])

        self._commit(build)

    def drop(self, name: str) -> Snapshot:
        """Stop listing a snapshot; its bytes stay until garbage collection.

        Raises:
            ConflictError: a branch or tag names it. (A child may outlive it: its pages are its own.)
        """
        found = self.snapshot(name)

        def build() -> bytes:
            self.refresh()
            holders = [ref for ref, (_, held) in self._projection.refs().items() if held == found.snapshot_id]
            if holders:
                raise ConflictError(
                    f"the snapshot is named by {', '.join(holders)}",
                    object=found.snapshot_id,
                    fix=f"delete the name first: `him branch {holders[0]} --delete`",
                )
            return self._encoded([SnapshotDropped(found.snapshot_id)])

        self._commit(build)
        return found

    # -- inner

    def _open_child(self, branch: str) -> Snapshot:
        """A child of the branch's sealed head, as its new head; another writer may have opened it first."""
        now = self._clock.now_ns()
        new_id = snapshot_id(new_ulid(now, self._rng))

        def build() -> bytes | None:
            head = self.snapshot(branch)
            return self._encoded(self._opening(new_id, head, now, branch, {}, {})) if head.sealed else None

        self._commit(build)
        return self.snapshot(branch)

    def _opening(
        self,
        new_id: SnapshotId,
        source: Snapshot | None,
        now: int,
        branch: str | None,
        tags: Mapping[str, str],
        provenance: Mapping[str, str],
    ) -> list[Operation]:
        parents = () if source is None else (Parent(source.snapshot_id, source.directory),)
        start = directory.EMPTY if source is None else source.directory
        operations: list[Operation] = [
            SnapshotOpened(new_id, parents, now, self._writer, start, "lww", dict(provenance))
        ]
        operations += [AttributeSet(new_id, key, value) for key, value in sorted(tags.items())]
        if branch is not None:
            operations.append(RefSet(branch, BRANCH, new_id))
        return operations

    def _open(self, target: SnapshotId) -> Snapshot:
        found = self._projection.snapshot(target)
        if found is None:
            raise NotFoundError("the snapshot was deleted", object=target)
        if found.sealed:
            raise SealedError("the snapshot is sealed", object=target)
        return found

    def _commit(self, build: Callable[[], bytes | None]) -> None:
        """Run `build` under the log's lock; what it (or its batch) appended is durable before its record."""
        closed = False

        def durable() -> bytes | None:
            nonlocal closed
            body = build()
            if body is None:
                return None
            added = self._store.close_range()
            closed = added is not None
            return body if added is None else _with_range(body, added)

        try:
            self._log.commit(durable)
        except BaseException:
            if closed:
                # The range's blobs were taken for stored, but no record will ever name them.
                self._store.abandon()
            raise
        self.refresh()
        self._store.committed()
        with contextlib.suppress(HimError):
            # The batch is durable, whatever becomes of this: a pack without a footer is whole too.
            self._finish_pack()

    def _finish_pack(self) -> None:
        finished = self._store.finish_if_large()
        if finished is not None:
            self._log.commit(lambda: self._encoded([finished]))
            self.refresh()

    def _prepare(self) -> None:
        """Before the first blob of a batch: take up a pack under the log's lock, where nobody can commit to it."""
        if self._store.writing:
            return

        def build() -> None:
            self.refresh()
            self._store.continue_pack()

        self._log.commit(build)

    def _encoded(self, operations: Sequence[Operation]) -> bytes:
        return msgspec.msgpack.encode(CommitRecord(self._clock.now_ns(), self._writer, tuple(operations)))

    def _decoded(self, since: int) -> Iterator[tuple[int, bytes, CommitRecord]]:
        for seq, digest, body in self._log.read(since):
            try:
                yield seq, digest, _decode(body)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise IntegrityError(f"a commit record does not parse: {error}", object=f"record {seq}") from error


def _with_range(body: bytes, added: PackRange) -> bytes:
    record = _decode(body)
    return msgspec.msgpack.encode(CommitRecord(record.time_ns, record.writer, (added, *record.operations)))


def _decode(body: bytes) -> CommitRecord:
    return msgspec.msgpack.decode(body, type=CommitRecord)


def _check_stream(spec: StreamSpec) -> None:
    checked_name(spec.name, what="stream")
    choices = (
        ("content", spec.content, ("array", "bytes")),
        ("dtype", spec.dtype, ("", *codec.DTYPES)),
        ("quantise", spec.quantise, ("", "int8", "fp8", "fp16")),
        ("level rule", spec.level_rule, ("none", *RULES)),
    )
    for what, value, known in choices:
        if value not in known:
            raise UsageError(f"unknown {what} {value!r}", object=spec.name, fix=f"use one of: {', '.join(known)}")
    if min(spec.tile_height, spec.tile_width) < 1:
        raise UsageError("a tile is at least one pixel high and wide", object=spec.name)
    if spec.level_rule != "none" and (spec.content == "bytes" or spec.tile_height % 2 or spec.tile_width % 2):
        raise UsageError(
            "levels need arrays in tiles of even height and width", object=spec.name, fix='or use level_rule "none"'
        )


def _check_ref_name(name: str) -> None:
    if not name or name.startswith((SNAPSHOT_PREFIX, "-", ".")) or checked_name(name, what="ref") != name:
        raise UsageError(
            f"not a name for a branch or tag: {name!r}", fix="choose another, not beginning with snp_ or -"
        )
