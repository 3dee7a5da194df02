"""Snapshots, branches and the durable commit: every change is one record of the commit log.

`History` is the only writer of records. It keeps the projection at the log's head, builds pages on the current
directory under the log's lock (so nobody retries), and makes pages durable before the record that names them.

Batches that threads commit at the same time share one record: each is built on the directory the one before it made.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import msgspec

from him.catalog import changes as changing
from him.catalog import checkpoint, keys
from him.catalog.changes import FrameChange
from him.catalog.checkpoint import Fold
from him.catalog.group import Begun, Queue, Request
from him.catalog.keys import DirectoryKeys
from him.catalog.lease import Lease, Leases
from him.catalog.log import parsed
from him.catalog.retention import first_gone, held, rules
from him.config import CHECKPOINT_RECORDS, STREAMS
from him.errors import (
    BusyError,
    ConflictError,
    ExpiredError,
    HimError,
    IntegrityError,
    KeyNeededError,
    NotFoundError,
    SealedError,
    ShreddedError,
    UsageError,
)
from him.pack.format import Rows, rows_of
from him.ports import Clock, CommitLog, KeyRing, Memo, Projection, Rng
from him.pyramid import directory, levels
from him.tier.warm import WarmStore
from him.tile import codec
from him.tile.downsample import RULES
from him.types import (
    SNAPSHOT_PREFIX,
    AttributeSet,
    Batch,
    BlobId,
    CommitRecord,
    KeyEntry,
    LiveState,
    Operation,
    PackFinished,
    PackRange,
    PackState,
    Parent,
    Ref,
    RefSet,
    RetentionSet,
    Sealed,
    Secret,
    Snapshot,
    SnapshotDropped,
    SnapshotId,
    SnapshotOpened,
    SnapshotShredded,
    StreamDeclared,
    StreamSpec,
    checked_name,
    snapshot_bytes,
    snapshot_id,
)

Build = Callable[[], Sequence[Operation]]
"""Makes the operations of a record; runs under the log's lock with the projection at its head. None, no record."""

BRANCH: Final = "branch"
TAG: Final = "tag"
LOST: Final = "a failed write, or a collection of garbage, took blobs of this transfer with it"
RESUMES: Final = "run it again: it resumes"
_NS_PER_MS: Final = 1_000_000


def new_ulid(now_ns: int, rng: Rng) -> bytes:
    """16 bytes: 48 bits of milliseconds, 80 random bits."""
    return (now_ns // _NS_PER_MS).to_bytes(6, "big") + rng.token(10)


class History:
    """The DAG of snapshots and the refs into it; may be used by several threads."""

    def __init__(
        self,
        log: CommitLog,
        projection: Projection,
        store: WarmStore,
        memo: Memo,
        clock: Clock,
        rng: Rng,
        writer: str,
        *,
        read_only: bool = False,
        ring: KeyRing | None = None,
    ) -> None:
        self.log = log
        self.keys = DirectoryKeys(ring, rng)
        self.leases = Leases(store.disk, read_only=read_only)
        self._projection = projection
        self._store = store
        self._memo = memo
        self._clock = clock
        self._rng = rng
        self._writer = writer
        self._queue = Queue()
        # Held while this process commits: one thread after the other, and until a failed commit is undone.
        self._turn = threading.Lock()
        self._checkpointing = threading.Lock()
        self._committed = 0
        self._marked = 0

    # -- reading

    def lease(self) -> Lease:
        """What is resolved from now on can be read until the lease is released, whatever is collected meanwhile."""
        return self.leases.take(self.log.head()[0])

    def begin(self) -> Begun:
        """Before the first blob of a batch is looked for or put; `commit` asks for it.

        Raises:
            StorageError, IntegrityError: as `refresh`.
        """
        lease = self.lease()
        self.refresh()
        return Begun(self._store.epoch, self._store.condemned, lease)

    def finished_packs(self) -> list[PackFinished]:
        """The packs that grow no more and are to stay. Raises StorageError, IntegrityError as `refresh`."""
        self.refresh()
        going = {name for name, _, _ in self._projection.released(0)}
        packs = (named for _, named in self._projection.pack_changes(0) if isinstance(named, PackFinished))
        return [named for named in packs if named.pack not in going]

    def removed(self, pack: str) -> bool:
        """Whether a pack that was condemned is removed by now."""
        self.refresh()
        return any(removed and name == pack for name, _, removed in self._projection.released(0))

    def pack_rows(self, pack: PackState) -> Rows:
        """All that a pack holds; nothing of one that another process has removed since. Raises IntegrityError."""
        try:
            return self._store.rows(pack)
        except IntegrityError:
            if not pack.condemned or not self.removed(pack.name):
                raise
            return rows_of([])

    def refresh(self) -> None:
        """Bring the projection to the log's head; one of another history, or far behind, is restored."""
        while True:
            position = self._projection.position()
            # Read after the position: whoever moved the one had seen the other.
            head = self.log.head()
            if position == head:
                return
            if self._follows(position, head):
                # Where the way is damaged a checkpoint may stand beyond.
                with contextlib.suppress(IntegrityError):
                    self._projection.apply(self.records(position[0]))
                    continue
            self._projection.restore(self._live(), expected=position)

    def rebuild(self) -> None:
        """Make the projection anew from the whole log; where its beginning is damaged, from a checkpoint.

        Raises:
            IntegrityError: the log is damaged, and no checkpoint bridges it.
        """

        def build() -> None:
            # Under the lock, where nobody commits on what stands before.
            self._projection.restore(self._live(whole=True), expected=None)

        with self._turn:
            self.log.commit(build)

    def records(self, since: int = 0) -> Iterator[tuple[int, bytes, CommitRecord]]:
        """(seq, hash, record) after `since`, oldest first. Raises IntegrityError, VersionError."""
        for seq, digest, body in self.log.read(since):
            yield seq, digest, parsed(seq, body)

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
        if found is None and name in self._projection.shredded():
            raise ShreddedError("the snapshot was shredded", object=name)
        if found is None:
            raise NotFoundError(f"no snapshot, branch or tag is called {name!r}", object=name)
        return self.opened(found)

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, oldest first."""
        self.refresh()
        return [*map(self.opened, self._projection.snapshots())]

    def opened(self, found: Snapshot) -> Snapshot:
        """A snapshot of the projection whose directories are secrets, where they are encrypted and the keys are there.

        A parent that is shredded has no directory. Raises IntegrityError.
        """
        return self.keys.opened(found, self._projection.shredded()) if found.wraps else found

    def refs(self) -> dict[str, tuple[str, str]]:
        """Name → (kind, snapshot id)."""
        self.refresh()
        return self._projection.refs()

    def stream(self, name: str) -> StreamSpec:
        """The declared stream. Raises NotFoundError."""
        found = self._projection.streams().get(name) or STREAMS.get(name)
        if found is None:
            known = ", ".join([*STREAMS, *self._projection.streams()])
            raise NotFoundError(f"no stream is called {name!r}", object=name, fix=f"declare it, or use one of: {known}")
        return found

    def directory(self, name: str, wanted: bytes) -> Ref:
        """How to refer to a directory (by its blob_id) that a snapshot has, or had: a secret, if it has it now."""
        with contextlib.suppress(NotFoundError):
            found = self.snapshot(name)
            if isinstance(found.directory, Secret) and found.directory.blob_id == wanted:
                return found.directory
        return BlobId(wanted)

    def trace_key(self, found: Snapshot) -> KeyEntry | None:
        """What the traces of a snapshot are encrypted with; None where nothing of it is encrypted.

        Raises:
            StorageError: the key ring could not be written.
        """
        if not isinstance(found.directory, Secret):
            return None
        entry = self.keys.traced(found.snapshot_id, make=False)

        def made() -> None:
            nonlocal entry
            entry = self.keys.traced(found.snapshot_id, make=True)

        if entry is None:
            with self._turn:
                self.log.commit(made)
        return entry

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

        def build() -> Sequence[Operation]:
            if branch is not None and branch in self._projection.refs():
                raise ConflictError(f"the name {branch!r} is taken", object=branch)
            source = self.snapshot(parent) if parent is not None else None
            return self._opening(new_id, source, now, branch, tags or {}, provenance or {})

        self.append(build)
        return self.snapshot(new_id)

    def writable(self, name: str) -> Snapshot:
        """The open snapshot to write to under a name: an unknown branch is created empty, a sealed head gets a child.

        Raises:
            SealedError: an id (or a tag) names a sealed snapshot.
        """
        self.prepare()
        self.refresh()
        named = self._projection.refs().get(name)
        if named is None and not name.startswith(SNAPSHOT_PREFIX):
            try:
                return self.open_snapshot(branch=name)
            except ConflictError:
                # Another writer was faster.
                named = self._projection.refs().get(name)
        found = self.snapshot(name)
        if not found.sealed:
            return found
        if named is None or named[0] != BRANCH:
            raise SealedError(f"{name} is sealed", object=found.snapshot_id)
        return self._open_child(name)

    def commit(self, target: SnapshotId, changes: Sequence[FrameChange], *, begun: Begun) -> Snapshot:
        """Make a batch durable and visible, all of it or nothing.

        Args:
            begun: what `begin` gave before the first blob of the batch was put.

        Raises:
            SealedError: the snapshot was sealed meanwhile.
            StorageError: the disk refused; nothing of the batch is visible.
        """
        request = Request(target, changes, begun)
        with begun.lease:
            self._store.sync_ahead()
            self._queue.pass_through(request, self._lead)
        self._checkpoint()
        return request.outcome()

    def seal(self, name: str) -> Snapshot:
        """End writing to a snapshot: its levels are computed, its Lamport time is set. Sealing twice is no change.

        Raises:
            ExpiredError: retention has let go of tiles that the levels are computed from.
        """
        with self.lease():
            self.prepare()
            found = self.snapshot(name)
            while not found.sealed:
                root = self._levels(found.directory)
                self.append(partial(self._sealing, found, root))
                found = self.snapshot(found.snapshot_id)
            if found.wraps:
                self.tidy_keys()
            return found

    def finish_packs(self) -> list[str]:
        """End every pack that grows, however small, so that all of it can be copied; those that others write to.

        Raises:
            StorageError: the disk refused.
        """
        with self.lease(), self._turn:
            while True:
                if not self._store.writing:
                    self.log.commit(self._take_up)
                if not self._store.writing:
                    break
                self._finish_pack(always=True)
            self.refresh()
        return sorted({named.pack for _, named in self._projection.pack_changes(0) if isinstance(named, PackRange)})

    def set_ref(self, name: str, kind: str, target: str) -> None:
        """Point a tag or branch at a snapshot. Raises ConflictError when the name is of the other kind."""
        _check_ref_name(name)

        def build() -> Sequence[Operation]:
            taken = self._projection.refs().get(name)
            if taken is not None and (taken[0] != kind or kind == TAG):
                raise ConflictError(f"{name!r} is already a {taken[0]}", object=name)
            return [RefSet(name, kind, self.snapshot(target).snapshot_id)]

        self.append(build)

    def delete_ref(self, name: str) -> None:
        """Remove a branch or tag; the snapshot stays. Raises NotFoundError."""

        def build() -> Sequence[Operation]:
            taken = self._projection.refs().get(name)
            if taken is None:
                raise NotFoundError(f"no branch or tag is called {name!r}", object=name)
            return [RefSet(name, taken[0], "")]

        self.append(build)

    def set_retention(self, stream: str, task: str, ttl_s: int) -> None:
        """Keep a stream's tiles (of one task's snapshots) for so long: 0 for ever; negative takes the rule back.

        Raises:
            NotFoundError: no such stream.
        """
        self.refresh()
        self.stream(stream)
        self.append(lambda: [RetentionSet(stream, task, ttl_s)])

    def retention(self) -> dict[tuple[str, str], int]:
        """All rules that hold: (stream, task or "") → seconds."""
        self.refresh()
        declared = {**STREAMS, **self._projection.streams()}
        return rules(declared.values(), self._projection.retention())

    def set_attribute(self, name: str, key: str, value: str | None) -> None:
        """Set (or, with None, remove) a key-value pair on a snapshot."""
        if not key:
            raise UsageError("an attribute's key is not empty")
        target = self.snapshot(name).snapshot_id
        self.append(lambda: [AttributeSet(target, key, value)])

    def declare_stream(self, spec: StreamSpec) -> None:
        """Add a stream of the user's own.

        Raises:
            UsageError: it could not be written, or not be halved exactly.
            ConflictError: the name means something else already.
        """
        _check_stream(spec)

        def build() -> Sequence[Operation]:
            known = self._projection.streams().get(spec.name) or STREAMS.get(spec.name)
            if known is not None and msgspec.structs.replace(known, encrypted=spec.encrypted) == spec:
                return ()  # That it is encrypted by now does not make it another.
            if known is not None:
                raise ConflictError("a stream of that name is declared otherwise", object=spec.name)
            return [StreamDeclared(spec)]

        self.append(build)

    def encrypt(self, specs: Sequence[StreamSpec]) -> None:
        """From now on encrypt the frames of streams that are put or replaced; those that are there stay as they are.

        Raises:
            KeyNeededError: no key ring is at hand.
        """
        if self.keys.ring is None:
            raise KeyNeededError("there is no key ring to encrypt with", fix="make one first: `him keys create`")

        def build() -> Sequence[Operation]:
            known = {**STREAMS, **self._projection.streams()}
            wanted = [msgspec.structs.replace(known.get(spec.name, spec), encrypted=True) for spec in specs]
            return [StreamDeclared(spec) for spec in wanted if known.get(spec.name) != spec]

        self.append(build)

    def shred(self, name: str) -> Snapshot:
        """Drop a snapshot and destroy the keys that open it: what only it reached cannot be read by anybody any more.

        Run again after a break it goes on. What other snapshots reach stays readable; those that began with this one
        forget that.

        Raises:
            ConflictError: as `drop`; or nothing of it is encrypted.
            KeyNeededError: the keys are not at hand.
        """
        if self.keys.ring is None:
            raise KeyNeededError("there is no key ring to destroy keys of", object=name)
        found = self.snapshot(name)
        self.keys.check(found)
        if not isinstance(found.directory, Secret):
            fix = f"delete it: `him snap delete {found.snapshot_id}`"
            raise ConflictError("nothing of the snapshot is encrypted", object=found.snapshot_id, fix=fix)

        def build() -> Sequence[Operation]:
            self._check_droppable(found)
            others = (one for one in self._projection.snapshots() if one.snapshot_id != found.snapshot_id)
            renewed = [operation for one in others for operation in self.keys.renewed(self.opened(one))]
            return [SnapshotDropped(found.snapshot_id), SnapshotShredded(found.snapshot_id), *renewed]

        self.append(build)
        self.tidy_keys(dropped=True)
        return found

    def tidy_keys(self, *, dropped: bool = False) -> None:
        """Destroy the keys that open nothing any more that is to be opened.

        Args:
            dropped: those of dropped snapshots too.

        Raises:
            StorageError: the ring could not be written; run it again.
        """
        if self.keys.ring is None:
            return

        def destroyed() -> None:
            self.refresh()
            self.keys.tidy(self._projection.state(), dropped=dropped)

        with self._turn:
            self.log.commit(destroyed)

    def drop(self, name: str) -> Snapshot:
        """Stop listing a snapshot; its bytes stay until garbage collection.

        Raises:
            ConflictError: a branch or tag names it, or a legal hold is on it. (A child may outlive it: its pages are
                its own.)
        """
        found = self.snapshot(name)

        def build() -> Sequence[Operation]:
            self._check_droppable(found)
            return [SnapshotDropped(found.snapshot_id)]

        self.append(build)
        return found

    def _check_droppable(self, found: Snapshot) -> None:
        if held(self.snapshot(found.snapshot_id)):
            raise ConflictError(
                "a legal hold is on the snapshot", object=found.snapshot_id,
                fix=f"release it first: `him snap hold {found.snapshot_id} --release`",
            )  # fmt: skip
        holders = [ref for ref, (_, held) in self._projection.refs().items() if held == found.snapshot_id]
        if holders:
            raise ConflictError(
                f"the snapshot is named by {', '.join(holders)}",
                object=found.snapshot_id,
                fix=f"delete the name first: `him branch {holders[0]} --delete`",
            )

    # -- what another repository wrote (catalog/transfer.py)

    def adopt(self, build: Build, *, begun: Begun) -> None:
        """Make durable, and name in the log, all blobs put until now, with operations or without any.

        Args:
            build: runs under the log's lock; its operations are checked as if a user had asked for them.
            begun: what `begin` gave before anything was looked for.

        Raises:
            UsageError: a name or a stream that cannot be.
            BusyError: a failed write, or a collection of garbage, took blobs of this transfer with it.
        """

        def checked() -> Sequence[Operation]:
            # What was put and not yet referred to is garbage to whoever collects it.
            if self._store.epoch != begun.epoch or self._store.condemned > begun.condemned:
                raise BusyError(LOST, fix=RESUMES)
            operations = build()
            for operation in operations:
                if isinstance(operation, RefSet):
                    _check_ref_name(operation.name)
                elif isinstance(operation, StreamDeclared):
                    _check_stream(operation.spec)
            return operations

        self.append(checked, blobs=True)

    # -- inner

    def _open_child(self, branch: str) -> Snapshot:
        """A child of the branch's sealed head, as its new head; another writer may have opened it first."""
        now = self._clock.now_ns()
        new_id = snapshot_id(new_ulid(now, self._rng))

        def build() -> Sequence[Operation]:
            head = self.snapshot(branch)
            return self._opening(new_id, head, now, branch, {}, {}) if head.sealed else ()

        self.append(build)
        return self.snapshot(branch)

    def _levels(self, root: bytes) -> bytes:
        try:
            return levels.levels_root(self._store, self._memo, root)
        except IntegrityError as error:
            gone = first_gone(self._store, root)
            if not gone:
                raise
            raise ExpiredError(
                "a tile was let go by its stream's retention, and levels are computed from it", object=gone,
                fix="delete it there, then seal; put it again in a newer snapshot",
            ) from error  # fmt: skip

    def _sealing(self, expected: Snapshot, root: bytes) -> Sequence[Operation]:
        """The record that seals a snapshot with its levels; none if it is not as it was when they were computed."""
        now = self.snapshot(expected.snapshot_id)
        if now.sealed or now.directory != expected.directory:
            return ()
        sealed = Sealed(now.snapshot_id, _name(now.directory), root, self._projection.lamport() + 1)
        return [sealed, *self.keys.wrapped(now.snapshot_id, now.directory, keys.SEALED)]

    def _opening(
        self,
        new_id: SnapshotId,
        source: Snapshot | None,
        now: int,
        branch: str | None,
        tags: Mapping[str, str],
        provenance: Mapping[str, str],
    ) -> list[Operation]:
        root = directory.EMPTY if source is None else source.directory
        start = _name(root)
        parents = () if source is None else (Parent(source.snapshot_id, start),)
        operations: list[Operation] = [
            SnapshotOpened(new_id, parents, now, self._writer, start, "lww", dict(provenance))
        ]
        if source is not None:
            self.keys.check(source)
            operations += self.keys.wrapped(new_id, root, keys.BASE, source.snapshot_id)
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
        return self.opened(found)

    def append(self, build: Build, *, blobs: bool = False) -> None:
        """Commit operations that are no batch in a record of their own.

        Args:
            build: makes them, under the log's lock with the projection at its head; none, no record.
            blobs: a record that names what was put into packs is wanted even so.
        """
        self._store.sync_ahead()
        with self.lease(), self._turn:
            self._record(build, blobs=blobs)
            self._catch_up()
        self._checkpoint()

    def _lead(self) -> None:
        """Commit every batch that waits, in one record; each gets its result or its error."""
        group: list[Request] = []

        def build() -> Sequence[Operation]:
            # As late as can be: those who came while others held the log's lock are taken along.
            group.extend(self._queue.take())
            return self._batches(group)

        with self._turn:
            try:
                self._record(build)
            except HimError as error:
                if not group:
                    raise
                for request in group:
                    request.fail(error)
            except BaseException:
                for request in group:
                    request.fail(BusyError("the commit was interrupted", fix="write the batch again"))
                raise
            finally:
                for request in group:
                    request.settle()
            self._catch_up()

    def _batches(self, group: Sequence[Request]) -> Sequence[Operation]:
        """One batch after the other; a request that may not be committed fails alone."""
        staged: dict[SnapshotId, bytes] = {}
        operations: list[Operation] = []
        for request in group:
            request.error = None
            try:
                found = self._open(request.target)
                if self._store.epoch != request.begun.epoch:
                    raise BusyError("an earlier failure took this batch's blobs with it", fix="write the batch again")
                if self._store.condemned > request.begun.condemned:
                    self._store.rely(changing.blobs(request.changes))
                before = staged.get(request.target, found.directory)
                base, origin = self.base_directory(found), snapshot_bytes(request.target)
                after = changing.apply(self._store, before, base, origin, request.changes)
                opening = self.keys.wrapped(request.target, after, keys.OPEN) if after != before else []
            except HimError as error:
                request.fail(error)
                continue
            request.result = msgspec.structs.replace(found, directory=after)
            if after != before:
                staged[request.target] = after
                operations += [Batch(request.target, _name(before), _name(after)), *opening]
        return operations

    def _record(self, build: Build, *, blobs: bool = False) -> None:
        """Commit a record, what it names being durable before it. Only with the turn held.

        Args:
            blobs: name what was put even where there are no operations.
        """
        closed: list[PackRange] = []

        def durable() -> bytes | None:
            self.refresh()
            epoch = self._store.epoch
            operations = build()
            if not operations and not blobs:
                return None
            added = self._store.close_range()
            if added is not None:
                closed.append(added)
            elif not operations:
                return None
            if self._store.epoch != epoch:
                raise BusyError("a failed write took the pages with it", fix="write the batch again")
            return self._encoded([*closed, *operations])

        try:
            self._committed = self.log.commit(durable)
        except BaseException:
            if closed:
                # The range's blobs were taken for stored, but no record will ever name them.
                self._store.abandon()
            raise

    def _catch_up(self) -> None:
        """After a record, which is durable whatever becomes of this.

        The projection catches up at the next look, and a pack without a footer is whole too.
        """
        with contextlib.suppress(HimError):
            self.refresh()
            self._store.committed()
            self._finish_pack()

    def _finish_pack(self, *, always: bool = False) -> bool:
        """Commit the end of the pack that is written to, if it is due; whether it was."""
        finished = self._store.finish_if_large(always=always)
        if not finished:
            return False
        try:
            self.log.commit(lambda: self._encoded(finished))
        except BaseException:
            # What was still pending in it has no record to name it.
            self._store.abandon()
            raise
        self._store.finished()
        self.refresh()
        self._store.committed()
        return True

    def prepare(self) -> None:
        """Before the first blob of a batch: take up a pack under the log's lock, where nobody can commit to it."""
        if self._store.writing:
            return

        with self._turn:
            self.log.commit(self._take_up)

    def _take_up(self) -> None:
        """Under the log's lock: an unfinished pack that nobody holds becomes this process's, if there is one."""
        self.refresh()
        self._store.continue_pack()

    def _follows(self, position: tuple[int, bytes], head: tuple[int, bytes]) -> bool:
        """Whether the projection is of this log, and reading on is less than restoring it from a checkpoint."""
        seq, digest = position
        if seq > head[0]:
            return False
        if head[0] - seq > CHECKPOINT_RECORDS and max(self.log.checkpoints(), default=0) > seq + CHECKPOINT_RECORDS:
            return False
        with contextlib.suppress(IntegrityError):
            return self.log.hash_at(seq) == digest
        return False

    def _live(self, *, whole: bool = False) -> LiveState:
        """The state at the log's head, from the newest checkpoint on; or from the beginning as far as it is sound."""
        if whole:
            with contextlib.suppress(IntegrityError):
                return self._folded(LiveState())
        return self._folded(checkpoint.newest(self.log))

    def _folded(self, start: LiveState) -> LiveState:
        fold = Fold(start)
        fold.apply(self.records(start.seq))
        return fold.state()

    def _checkpoint(self) -> None:
        """Write the checkpoint at the last mark this process went past, unless it is there. Failing is no error."""
        mark = self._committed // CHECKPOINT_RECORDS * CHECKPOINT_RECORDS
        if mark <= self._marked or not self._checkpointing.acquire(blocking=False):
            return
        try:
            self._marked = mark
            with contextlib.suppress(HimError):
                if max(self.log.checkpoints(), default=0) < mark:
                    fold = Fold(checkpoint.newest(self.log, up_to=mark))
                    fold.apply(itertools.islice(self.records(fold.seq), mark - fold.seq))
                    self.log.put_checkpoint(mark, checkpoint.encode(fold.state()))
        finally:
            self._checkpointing.release()

    def _encoded(self, operations: Sequence[Operation]) -> bytes:
        return msgspec.msgpack.encode(CommitRecord(self._clock.now_ns(), self._writer, tuple(operations)))


def _name(root: bytes) -> bytes:
    """What a directory is called on the outside; of the empty one nothing."""
    return root.blob_id if isinstance(root, Secret) else root


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
