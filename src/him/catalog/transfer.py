"""Copying snapshots from one repository to another, by Merkle diff (docs/design/010-transfer.md).

What has one hash on both sides, below directories of sealed snapshots the target has, is not visited. Everything else
is asked for blob by blob, so that an interrupted transfer resumes without sending bytes twice. Records go as they are
stored, what they are made of first. Blobs are committed batch by batch; the snapshots and the refs to them appear
together, in one last record.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Final, NamedTuple

import msgspec

from him.catalog.group import Begun
from him.catalog.history import BRANCH, LOST, RESUMES, History
from him.config import (
    DELTA_DEPTH_MAX,
    PARTS_DEPTH_MAX,
    READ_THREADS_MAX,
    TRANSFER_BATCH_BYTES,
    TRANSFER_BATCH_RECORDS,
    TRANSFER_TWINS_MAX,
)
from him.errors import BusyError, ConflictError, IntegrityError, NotFoundError
from him.pack.format import RECORD_HEADER_BYTES, Draft
from him.ports import Progress
from him.pyramid import directory
from him.pyramid.page import Page, load
from him.tier.warm import WarmStore
from him.tile import chunks, codec
from him.tile.address import KIND_TILE, blob_id
from him.tile.chunks import CHUNKS
from him.types import (
    AttributeSet,
    BlobId,
    Frame,
    Operation,
    RefSet,
    Sealed,
    Secret,
    Snapshot,
    SnapshotId,
    SnapshotOpened,
    StreamDeclared,
    StreamSpec,
    name_of,
    snapshot_bytes,
)

Refs = Mapping[str, tuple[str, str]]
"""Name → (kind, snapshot id)."""
Twin = tuple[bytes, int]
"""Root and height of a page in the target that stands where a page of the source stands."""
_BLOB: Final = 32
_WITHIN_MAX: Final = DELTA_DEPTH_MAX + PARTS_DEPTH_MAX


class Side(NamedTuple):
    """A repository, as far as a transfer needs it."""

    history: History
    store: WarmStore


class RefMove(msgspec.Struct, frozen=True):
    """A branch or tag that was set; `before` is None where it is new."""

    name: str
    kind: str
    before: str | None
    after: str


class TransferReport(msgspec.Struct, frozen=True):
    """What a transfer did.

    `left_open` are refs of which nothing was sent: their heads are open. `records` were appended, `sent_bytes` of them;
    `present_records` and `present_bytes` were looked at and there already; `shared_subtrees` (directory nodes, frames
    and pages) were not even looked into.
    """

    snapshots: tuple[SnapshotId, ...]
    refs: tuple[RefMove, ...]
    left_open: tuple[str, ...]
    records: int
    sent_bytes: int
    present_records: int
    present_bytes: int
    shared_subtrees: int


class _Plan(NamedTuple):
    """What is to be sent: names that come with it, snapshots (parents first), the DAG of both sides by ids."""

    wanted: dict[str, tuple[str, str]]
    left_open: tuple[str, ...]
    snapshots: list[Snapshot]
    known: dict[str, Snapshot]
    there: dict[str, Snapshot]


def transfer(
    source: Side,
    target: Side,
    refs: Sequence[str] | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> TransferReport:
    """Copy what branches and tags name, with all their ancestors, from `source` to `target`.

    Args:
        refs: the names; None for all whose heads are sealed.
        force: move branches even where that is no fast-forward. (Tags never move.)
        progress: called with (snapshots done, snapshots in all, what is in work).

    Raises:
        NotFoundError: no such branch or tag.
        ConflictError: a named head is open; a branch of the target has other snapshots; a tag, a stream or a snapshot
            of that name or id is another one there.
        IntegrityError: what is read from the source is damaged; nothing of it can be seen in the target.
        BusyError, StorageError: run it again, it resumes.
    """
    begun = target.history.begin()
    with begun.lease, source.history.lease():
        return _transferred(source, target, begun, refs, force=force, progress=progress)


def _transferred(
    source: Side, target: Side, begun: Begun, refs: Sequence[str] | None, *, force: bool, progress: Progress | None
) -> TransferReport:
    plan = _planned(source.history, target.history, refs)
    for one in plan.snapshots:
        if any(isinstance(root, Secret) for root in (one.directory, *(parent.directory for parent in one.parents))):
            raise ConflictError(
                "the snapshot holds encrypted frames, whose keys are this repository's alone", object=one.snapshot_id,
                fix="copy the whole folder, or its cold tier: `him restore`",
            )  # fmt: skip
    theirs = target.history.refs()
    _moves(plan, theirs, force=force)
    target.history.prepare()
    sender = _Sender(source, target, begun)
    complete = {one.directory for one in plan.there.values() if one.sealed}
    try:
        for number, one in enumerate(plan.snapshots):
            sender.tell = _teller(progress, number, len(plan.snapshots), one.snapshot_id)
            sender.tell(sender.sent_bytes)
            for root in [*(parent.directory for parent in one.parents), one.directory]:
                sender.directory(root, _twins(one, plan, theirs, complete))
                complete.add(root)
    except IntegrityError as error:
        if target.store.epoch != begun.epoch:
            raise BusyError(LOST, fix=RESUMES) from error
        raise
    moved: list[RefMove] = []
    sent: list[SnapshotId] = []

    def build() -> Sequence[Operation]:
        """Under the log's lock, on what the target holds by now."""
        fresh = [one for one in plan.snapshots if not _is_there(one, _found(target.history, one.snapshot_id))]
        moved[:] = _moves(plan, target.history.refs(), force=force)
        sent[:] = [one.snapshot_id for one in fresh]
        streams = [StreamDeclared(spec) for spec in sender.new_streams()]
        opened = [operation for one in fresh for operation in _operations(one)]
        return [*streams, *opened, *(RefSet(move.name, move.kind, move.after) for move in moved)]

    sender.finish(build)
    return TransferReport(
        tuple(sent), tuple(moved), plan.left_open, sender.records, sender.sent_bytes, sender.present_records,
        sender.present_bytes, sender.shared_subtrees,
    )  # fmt: skip


# -- what to send


def _planned(source: History, target: History, names: Sequence[str] | None) -> _Plan:
    refs, ours = _of_one_moment(source)
    there = {one.snapshot_id: one for one in target.snapshots()}
    wanted: dict[str, tuple[str, str]] = {}
    left_open: list[str] = []
    for name in sorted(refs) if names is None else dict.fromkeys(names):
        if name not in refs or refs[name][1] not in ours:
            raise NotFoundError(f"no branch or tag is called {name!r}", object=name)
        if ours[SnapshotId(refs[name][1])].sealed:
            wanted[name] = refs[name]
        elif names is None:
            left_open.append(name)
        else:
            raise ConflictError(
                f"{name} is still written to: only sealed snapshots are sent",
                object=refs[name][1],
                fix=f"seal it first: `him snap seal {name}`",
            )
    lacking = _lacking(ours, there, [head for _, head in wanted.values()])
    return _Plan(wanted, tuple(left_open), lacking, {**there, **ours}, {**there})


def _of_one_moment(source: History) -> tuple[Mapping[str, tuple[str, str]], dict[SnapshotId, Snapshot]]:
    """Names and snapshots: others drop and name them meanwhile."""
    while True:
        refs = source.refs()
        found = {one.snapshot_id: one for one in source.snapshots()}
        if source.refs() == refs:
            return refs, found


def _lacking(
    ours: Mapping[SnapshotId, Snapshot], there: Mapping[SnapshotId, Snapshot], heads: Iterable[str]
) -> list[Snapshot]:
    """The sealed snapshots the target lacks, parents first; an open or dropped ancestor stays a name in its child."""
    order: TopologicalSorter[SnapshotId] = TopologicalSorter()
    left, seen = [SnapshotId(head) for head in heads], set[SnapshotId]()
    while left:
        one = ours.get(left.pop())
        if one is None or one.snapshot_id in seen:
            continue
        seen.add(one.snapshot_id)
        if one.sealed and _is_there(one, there.get(one.snapshot_id)):
            continue
        parents = [parent.snapshot_id for parent in one.parents]
        order.add(one.snapshot_id, *parents)
        left += parents
    try:
        found = [ours[name] for name in order.static_order() if name in seen]
    except CycleError as error:
        raise IntegrityError("snapshots are ancestors of each other", object=str(error.args[1][0])) from error
    found = [one for one in found if one.sealed and one.snapshot_id not in there]
    for one in found:
        snapshot_bytes(one.snapshot_id)  # What comes from outside must be an id.
    return found


def _is_there(one: Snapshot, other: Snapshot | None) -> bool:
    """Whether the target has that snapshot. Raises ConflictError when it has another one of that id."""
    if other is None:
        return False
    if not other.sealed or other.directory != one.directory:
        state = "with other content" if other.sealed else "still open"
        raise ConflictError(
            f"both repositories have the snapshot, there it is {state}",
            object=one.snapshot_id,
            fix="copies of one repository went on writing to one open snapshot: make a child of one of them, "
            "`him snap create --from`, seal that and send it",
        )
    return True


def _found(history: History, name: SnapshotId) -> Snapshot | None:
    try:
        return history.snapshot(name)
    except NotFoundError:
        return None


def _moves(plan: _Plan, theirs: Refs, *, force: bool) -> list[RefMove]:
    """The refs that must be set. Raises ConflictError for one that may not."""
    moves: list[RefMove] = []
    for name, (kind, head) in plan.wanted.items():
        known = theirs.get(name)
        if known == (kind, head):
            continue
        if known is not None:
            if known[0] != kind or kind != BRANCH:
                what = (
                    f"is a {known[0]} there"
                    if known[0] != kind
                    else "names another snapshot there, and tags never move"
                )
                raise ConflictError(f"{name!r} {what}", object=known[1], fix="send it under another name")
            if not force and not _is_ancestor(known[1], head, plan.known):
                raise ConflictError(
                    f"{name} is at {known[1]} in the target, which is no ancestor of {head}",
                    object=known[1],
                    fix="get the target's branch under another name first, or overwrite it with --force",
                )
        moves.append(RefMove(name, kind, None if known is None else known[1], head))
    return moves


def _is_ancestor(old: str, new: str, known: Mapping[str, Snapshot]) -> bool:
    left, seen = [new], set[str]()
    while left:
        name = left.pop()
        if name == old:
            return True
        if name not in seen and name in known:
            seen.add(name)
            left += [parent.snapshot_id for parent in known[name].parents]
    return False


def _twins(one: Snapshot, plan: _Plan, theirs: Refs, complete: set[bytes]) -> list[bytes]:
    """Complete directories in the target that are likely to resemble a snapshot's: its nearest ancestors' first."""
    found: dict[bytes, None] = {}
    left, seen = deque([one]), set[str]()
    while left and len(found) < TRANSFER_TWINS_MAX:
        for parent in left.popleft().parents:
            ancestor = plan.known.get(parent.snapshot_id)
            near = [parent.directory] + ([] if ancestor is None else [ancestor.directory])
            hits = [root for root in near if root in complete]
            found.update(dict.fromkeys(hits))
            if not hits and ancestor is not None and parent.snapshot_id not in seen:
                left.append(ancestor)
            seen.add(parent.snapshot_id)
    heads = [
        plan.there[theirs[name][1]].directory
        for name in plan.wanted
        if name in theirs and theirs[name][1] in plan.there
    ]
    found.update(dict.fromkeys(root for root in heads if root in complete))
    return [root for root in found if root and not isinstance(root, Secret)][:TRANSFER_TWINS_MAX]


def _operations(one: Snapshot) -> list[Operation]:
    """A sealed snapshot as the records that made it; together they leave it as it is at the source."""
    start = one.parents[0].directory if one.parents else directory.EMPTY
    return [
        SnapshotOpened(
            one.snapshot_id, one.parents, one.created_at, one.writer, start, one.merge_policy, one.provenance
        ),
        *(AttributeSet(one.snapshot_id, key, value) for key, value in sorted(one.tags.items())),
        Sealed(one.snapshot_id, one.directory, one.levels_root, one.lamport, signature=one.signature),
    ]


def _teller(progress: Progress | None, number: int, total: int, name: str) -> Callable[[int], None]:
    def tell(sent_bytes: int) -> None:
        if progress is not None:
            progress(number, total, f"{name}, {sent_bytes / 1e6:.1f} MB sent")

    return tell


# -- sending


class _Sender:
    """Walks trees of the source beside trees of the target, and sends what the target lacks.

    Twins are nodes of the target that stand in the same place, below complete directories: equal hashes there mean
    that all below is there. `_done` are nodes of the source all of which was sent, or found there, in this transfer.
    """

    def __init__(self, source: Side, target: Side, begun: Begun) -> None:
        self._source, self._target, self._begun = source, target, begun
        self._done: set[bytes] = set()
        self._streams: set[str] = set()
        self._wanted: dict[BlobId, bool] = {}
        self._wanted_bytes = 0
        self._uncommitted_bytes = 0
        self.tell: Callable[[int], None] = lambda sent_bytes: None
        self.records = self.sent_bytes = self.present_records = self.present_bytes = self.shared_subtrees = 0

    def directory(self, root: bytes, twins: Sequence[bytes]) -> None:
        """Send what a directory reaches; it may be a twin from then on."""
        if root:
            self._node(root, list(twins), 0)
            # Twins are read in the target.
            self._flush()

    def new_streams(self) -> list[StreamSpec]:
        """Streams of what was sent that the target lacks. Raises ConflictError for one it declares otherwise."""
        return [self._source.history.stream(name) for name in sorted(self._streams) if not self._is_declared(name)]

    def finish(self, build: Callable[[], Sequence[Operation]]) -> None:
        """Commit what was not yet, with the operations, in one record."""
        self._target.history.adopt(build, begun=self._begun)

    # -- the walk

    def _node(self, root: bytes, twins: list[bytes], depth: int) -> None:
        if root in twins or root in self._done:
            self.shared_subtrees += 1
            return
        node, store = directory.children(self._source.store, root), self._target.store
        if isinstance(node, tuple):
            for frame in node:
                beside = (directory.find(store, twin, (frame.stream, frame.name), depth) for twin in twins)
                self._frame(frame, [one for one in beside if one is not None])
        else:
            below = {nibble: _below(store, twins, nibble) for nibble in node}
            self._source.store.bring([child for nibble, (child, _) in node.items() if child not in below[nibble]])
            for nibble in sorted(node):
                self._node(node[nibble][0], below[nibble], depth + 1)
        self._want([BlobId(root)])
        self._done.add(root)

    def _frame(self, frame: Frame, twins: Sequence[Frame]) -> None:
        if frame in twins:
            self.shared_subtrees += 1
            return
        self._stream(frame.stream)
        if not frame.root:
            return
        beside: list[Twin] = []
        for twin in twins:
            root, height = twin.root, twin.root_height
            while root and height > frame.root_height:
                # The lower root is what stands in the first slot of the higher one.
                root, height = load(self._target.store, root, height).get(0) or b"", height - 1
            if root:
                beside.append((root, height))
        self._page(frame.root, frame.root_height, beside, document=frame.content == "bytes")

    def _page(self, root: bytes, height: int, twins: Sequence[Twin], *, document: bool) -> None:
        if (root, height) in twins or root in self._done:
            self.shared_subtrees += 1
            return
        page = load(self._source.store, root, height)
        beside = [load(self._target.store, twin, at) for twin, at in twins if at == height]
        lower = [(twin, at) for twin, at in twins if at < height]
        if height == 0:
            self._tiles(page, beside, document=document)
        else:
            below = {
                slot: [(child, height - 1) for other in beside if (child := other.get(slot))] + ([] if slot else lower)
                for slot, _ in page.slots()
            }
            self._source.store.bring([raw for slot, raw in page.slots() if (raw, height - 1) not in below[slot]])
            for slot, raw in page.slots():
                self._page(raw, height - 1, below[slot], document=document)
        self._want([BlobId(root)])
        self._done.add(root)

    def _tiles(self, page: Page, beside: Sequence[Page], *, document: bool) -> None:
        wanted: dict[BlobId, None] = {}
        for slot, raw in page.slots():
            blob = BlobId(raw[:_BLOB])
            if any((other.get(slot) or b"")[:_BLOB] == blob for other in beside):
                self._present(blob)
            else:
                wanted[blob] = None
        self._want(list(wanted), document=document)

    def _stream(self, name: str) -> None:
        """Remember a stream that frames are of; better refused now than after all is sent."""
        if name not in self._streams:
            self._is_declared(name)
            self._streams.add(name)

    def _is_declared(self, name: str) -> bool:
        try:
            known = self._target.history.stream(name)
        except NotFoundError:
            return False
        if known != self._source.history.stream(name):
            raise ConflictError("the target declares a stream of that name otherwise", object=name)
        return True

    def _present(self, blob: BlobId) -> None:
        self.present_records += 1
        self.present_bytes += self._target.store.size_of(blob)

    # -- blobs

    def _want(self, blobs: Sequence[BlobId], *, document: bool = False) -> None:
        """Have blobs in the target: those it lacks, or could not read, are sent with the next batch."""
        for blob, absent in zip(blobs, self._target.store.missing(blobs), strict=True):
            if blob in self._wanted:
                continue
            if not absent and self._readable(blob, document=document):
                self._present(blob)
                continue
            self._wanted[blob] = document
            self._wanted_bytes += self._source.store.size_of(blob)
            if self._wanted_bytes >= TRANSFER_BATCH_BYTES or len(self._wanted) >= TRANSFER_BATCH_RECORDS:
                self._flush()
                self._commit()

    def _readable(self, blob: BlobId, *, document: bool) -> bool:
        """Whether the target can read a blob it has: what a delta or a list of chunks is made of may be gone, or go."""
        if not document and not self._target.store.depth_of(blob):
            return True
        if not self._target.store.keeps(blob):
            return False
        try:
            self._target.store.payload(blob)
        except IntegrityError:
            return False
        return True

    def _flush(self) -> None:
        """Append what is wanted, read in the order it lies in."""
        if not self._wanted:
            return
        wanted, self._wanted, self._wanted_bytes = self._wanted, {}, 0
        store = self._source.store
        store.bring(list(wanted))
        places = dict(zip(wanted, store.places(wanted), strict=True))
        absent = dict(zip(wanted, self._target.store.missing(list(wanted)), strict=True))
        self._send([blob for blob in sorted(wanted, key=places.__getitem__) if absent[blob]])
        for blob in wanted:
            if not absent[blob] and not self._readable(blob, document=wanted[blob]):
                self._send_again(blob)
        self.tell(self.sent_bytes)

    def _commit(self) -> None:
        """Make what was appended durable and name it in the log; no snapshot shows it yet."""
        self._target.history.adopt(lambda: (), begun=self._begun)
        self._uncommitted_bytes = 0

    def _send(self, blobs: Sequence[BlobId], within: int = 0) -> None:
        """Append blobs as the source stores them; what one is made of comes before it."""
        if within > _WITHIN_MAX:
            raise IntegrityError("a tile is made of others without end", object=blobs[0].hex())
        # A few parts for each thread: handing over a tiny tile alone would cost more than reading it.
        step = max(1, len(blobs) // (4 * READ_THREADS_MAX))
        slices = [blobs[at : at + step] for at in range(0, len(blobs), step)]
        read = self._source.store.spread(lambda part: [self._verified(blob) for blob in part], slices)
        drafts = [draft for part in read for draft in part]
        self._put([draft for draft in drafts if not _parts(draft)])
        for draft in drafts:
            if parts := _parts(draft):
                gone = self._target.store.missing(parts)
                self._send([part for part, absent in zip(parts, gone, strict=True) if absent], within + 1)
                document = codec.parse_header(draft.meta).dtype == "bytes"
                for part, absent in zip(parts, gone, strict=True):
                    if not absent and not self._readable(part, document=document):
                        self._send_again(part)
                # Here the base may be stored as a deeper delta than there; from now on it only gets less deep.
                deep = draft.delta_depth and self._target.store.depth_of(BlobId(draft.delta_base)) >= draft.delta_depth
                self._put([self._in_full(draft.blob_id)] if deep else [draft])

    def _put(self, drafts: Sequence[Draft], *, again: bool = False) -> None:
        """The one way by which records get into the target."""
        self.records += self._target.store.put_drafts(drafts, again=again)
        size = sum(RECORD_HEADER_BYTES + len(draft.meta) + len(draft.stored) for draft in drafts)
        self.sent_bytes += size
        self._uncommitted_bytes += size
        if self._uncommitted_bytes >= TRANSFER_BATCH_BYTES:
            self._commit()

    def _verified(self, blob: BlobId) -> Draft:
        """A record of the source whose content is what its blob_id names: reading alone trusts the record's header."""
        store = self._source.store
        draft = store.draft(blob)
        if _parts(draft):
            store.payload(blob)
        elif draft.kind == KIND_TILE and draft.codec != codec.RAW:
            codec.decode(draft.meta, draft.codec, draft.stored, expect=blob)
        elif blob_id(draft.kind, draft.meta, draft.stored) != blob:
            raise IntegrityError(
                "a record holds other content than it says", object=blob.hex(), place=store.place(blob)
            )
        return draft

    def _in_full(self, blob: BlobId) -> Draft:
        """The source's tile as a record that needs no other."""
        found = self._source.store.read(blob)
        tile = codec.encode_payload(found.meta, self._source.store.payload(blob))
        return Draft(KIND_TILE, tile.codec, blob, tile.header, tile.stored, len(tile.payload), found.origin)

    def _send_again(self, blob: BlobId) -> None:
        """Put right a tile the target has and cannot read: in full, and (it may be listed there) its chunks in full."""
        whole = self._in_full(blob)
        self._put([whole], again=True)
        if codec.parse_header(whole.meta).dtype == "bytes":
            parts = [codec.encode_bytes(bytes(part)) for part in chunks.split(self._source.store.payload(blob))]
            drafts = [
                Draft(KIND_TILE, one.codec, name_of(one.ref), one.header, one.stored, len(one.payload)) for one in parts
            ]
            self._put(drafts, again=True)


def _below(store: WarmStore, twins: Sequence[bytes], nibble: int) -> list[bytes]:
    """The twins of a child: the nodes in its place, or the leaf that holds all of them."""
    found: dict[bytes, None] = {}
    for twin in twins:
        node = directory.children(store, twin)
        child = twin if isinstance(node, tuple) else node.get(nibble, (b"", 0))[0]
        if child:
            found[child] = None
    return list(found)


def _parts(draft: Draft) -> list[BlobId]:
    """What a record is made of: a delta's base, or the chunks it lists."""
    if draft.delta_depth:
        return [BlobId(draft.delta_base)]
    if draft.codec != CHUNKS or draft.kind != KIND_TILE:
        return []
    listed = chunks.decode_list(draft.stored, math.prod(codec.parse_header(draft.meta).shape))
    return list(dict.fromkeys(name_of(chunk.ref) for chunk in listed))
