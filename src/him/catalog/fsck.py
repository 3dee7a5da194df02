"""Checking a whole repository against its own digests: the log, every byte of every pack, and all that is reachable."""

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from him.catalog.history import History
from him.errors import HimError, IntegrityError
from him.pack import format as layout
from him.pack import merkle
from him.pack.file import read_index, read_record, walk
from him.ports import Disk, Projection
from him.pyramid import directory, update
from him.tier.warm import WarmStore
from him.tile import codec
from him.tile.address import KIND_FOOTER, KIND_NAMES, KIND_TILE, blob_id
from him.tile.chunks import CHUNKS
from him.types import (
    AttributeSet,
    Batch,
    BlobId,
    Fault,
    Frame,
    Operation,
    PackFinished,
    PackRange,
    RefSet,
    Sealed,
    Snapshot,
    SnapshotDropped,
    SnapshotOpened,
    TileKey,
)

Progress = Callable[[int, int, str], None]
_RESTORE: Final = "restore the object from a copy of the repository"


class FsckReport(msgspec.Struct, frozen=True):
    """What was checked and what is wrong. `tiles` counts level-0 cells over all snapshots, each entry once."""

    errors: tuple[Fault, ...]
    expired: int
    shredded: int
    tiles: int
    packs: int
    size_bytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors

    def as_json(self) -> dict[str, object]:
        """The object documented in docs/CLI_JSON.md."""
        return {
            "ok": self.ok,
            "errors": [msgspec.to_builtins(fault) for fault in self.errors],
            "expired": self.expired,
            "shredded": self.shredded,
            "tiles": self.tiles,
            "packs": self.packs,
            "bytes": self.size_bytes,
        }


class _Told:
    """What the log's records say when heard in order."""

    def __init__(
        self,
        snapshots: dict[str, tuple[bytes, bool, int]],
        refs: dict[str, tuple[str, str]],
        tags: dict[tuple[str, str], str],
        ranges: dict[str, list[PackRange]],
    ) -> None:
        self.seq = 0
        self.snapshots = snapshots
        self.refs = refs
        self.tags = tags
        self.ranges = ranges

    def hear(self, operation: Operation) -> None:
        """Take one operation in."""
        match operation:
            case SnapshotOpened():
                self.snapshots[operation.snapshot_id] = (operation.directory, False, 0)
            case Batch() if operation.snapshot_id in self.snapshots:
                _, sealed, lamport = self.snapshots[operation.snapshot_id]
                self.snapshots[operation.snapshot_id] = (operation.directory, sealed, lamport)
            case Sealed() if operation.snapshot_id in self.snapshots:
                self.snapshots[operation.snapshot_id] = (operation.directory, True, operation.lamport)
            case SnapshotDropped():
                self.snapshots.pop(operation.snapshot_id, None)
                self.tags = {key: value for key, value in self.tags.items() if key[0] != operation.snapshot_id}
            case RefSet() if operation.snapshot_id:
                self.refs[operation.name] = (operation.kind, operation.snapshot_id)
            case RefSet():
                self.refs.pop(operation.name, None)
            case AttributeSet(value=None):
                self.tags.pop((operation.snapshot_id, operation.key), None)
            case AttributeSet():
                self.tags[operation.snapshot_id, operation.key] = operation.value or ""
            case PackRange():
                self.ranges.setdefault(operation.pack, []).append(operation)
            case _:
                pass


class Fsck:
    """One check of a repository; reads everything, changes nothing."""

    def __init__(
        self, disk: Disk, history: History, projection: Projection, store: WarmStore, progress: Progress | None = None
    ) -> None:
        self._disk = disk
        self._history = history
        self._projection = projection
        self._store = store
        self._progress = progress or _silent
        self._faults: dict[tuple[str, str], Fault] = {}
        self._damaged: set[bytes] = set()
        self._seen: set[bytes] = set()
        self._tiles: set[tuple[bytes, bytes]] = set()

    def run(self) -> FsckReport:
        """Check log, packs and reachability."""
        ranges: dict[str, list[PackRange]] = {}
        told = _Told({}, {}, {}, ranges)
        try:
            for seq, _, record in self._history.records():
                for operation in record.operations:
                    told.hear(operation)
                told.seq = seq
            self._catalog(told)
        except HimError as error:
            self._fault(error)
        size = self._packs(ranges)
        snapshots = self._history.snapshots()
        for number, found in enumerate(snapshots):
            self._progress(number, len(snapshots), "snapshots")
            self._snapshot(found)
        self._refs(snapshots)
        return FsckReport(tuple(self._faults.values()), 0, 0, len(self._tiles), len(ranges), size)

    def _catalog(self, told: "_Told") -> None:
        """Whether the projection, which has no digests of its own, says what the log says."""
        self._history.refresh()
        if self._projection.position()[0] != told.seq:
            return  # Another process commits right now: both are in motion.
        known = {one.snapshot_id: (one.directory, one.sealed, one.lamport) for one in self._projection.snapshots()}
        tags = {(one.snapshot_id, *pair) for one in self._projection.snapshots() for pair in one.tags.items()}
        ranges: dict[str, list[PackRange]] = {}
        for _, named in self._projection.ranges(0):
            ranges.setdefault(named.pack, []).append(named)
        same = (known, self._projection.refs(), ranges) == (told.snapshots, told.refs, told.ranges)
        if not (same and tags == {(*key, value) for key, value in told.tags.items() if key[0] in known}):
            fix = "run `him fsck --rebuild`, or delete the folder cache: it is made anew"
            self._faults["catalog", "cache"] = Fault("catalog", "cache/projection.sqlite", "differs from the log", fix)

    # -- packs

    def _packs(self, ranges: dict[str, list[PackRange]]) -> int:
        finished = self._projection.finished_packs()
        size = 0
        for number, (name, parts) in enumerate(sorted(ranges.items())):
            self._progress(number, len(ranges), name)
            try:
                file = self._disk.open(name)
            except HimError:
                self._fault(IntegrityError("a pack is missing", object=name, place=name))
                continue
            try:
                size += file.size()
                layout.check_file_header(file.read_at(0, layout.FILE_HEADER_BYTES), name)
                for part in parts:
                    self._range(name, part)
                if name in finished:
                    self._footer(name, finished[name], parts)
            except HimError as error:
                self._fault(error)
            finally:
                file.close()
        return size

    def _range(self, name: str, part: PackRange) -> None:
        """Every record between two commits: its digests, its content's identity, the range's Merkle root."""
        file = self._disk.open(name)
        try:
            if file.size() < part.end:
                self._fault(IntegrityError("the pack is cut short", object=name, place=f"{name} @ {file.size()}"))
            leaves: list[bytes] = []
            for offset, found in walk(file, name, part.start, part.end):
                if isinstance(found, IntegrityError):
                    self._fault(found)
                    continue
                if offset != part.index_offset:
                    leaves.append(found.header.digest)
                self._content(found, f"{name} @ {offset}")
            if not any(fault.place.startswith(name) for fault in self._faults.values()):
                read_index(file, part)
                if merkle.root(leaves) != part.merkle_root:
                    self._fault(
                        IntegrityError("the range's Merkle root differs", object=name, place=f"{name} @ {part.start}")
                    )
        except HimError as error:
            self._fault(error)
        finally:
            file.close()

    def _content(self, found: layout.Record, place: str) -> None:
        """Whether the stored bytes decode to what the blob_id names."""
        header = found.header
        try:
            if header.delta_depth or header.codec == CHUNKS:
                self._store.read_tile(header.blob_id)
            elif header.kind == KIND_TILE:
                codec.decode(found.meta, header.codec, found.stored, expect=header.blob_id)
            elif blob_id(header.kind, found.meta, found.stored) != header.blob_id:
                raise IntegrityError(f"{KIND_NAMES.get(header.kind, 'record')} has another identity")
        except IntegrityError as error:
            self._fault(IntegrityError(error.message, object=header.blob_id.hex(), place=place))

    def _footer(self, name: str, finished: PackFinished, parts: list[PackRange]) -> None:
        file = self._disk.open(name)
        try:
            at = finished.size - layout.TRAILER_BYTES
            offset, size, root = layout.decode_trailer(file.read_at(at, layout.TRAILER_BYTES), f"{name} @ {at}")
            place = f"{name} @ {offset}"
            record = read_record(file, name, offset, size)
            between = file.read_at(offset + record.header.record_size, size - record.header.record_size)
            if between.count(0) != len(between):
                raise IntegrityError("padding after the footer is not zero", object=name, place=place)
            whole = merkle.root([part.merkle_root for part in parts])
            if record.header.kind != KIND_FOOTER or root != whole or root != finished.merkle_root:
                raise IntegrityError("the footer is not the one committed", object=name, place=place)
            if file.size() != finished.size or offset != parts[-1].end:
                raise IntegrityError("bytes follow the trailer or precede the footer", object=name, place=place)
        finally:
            file.close()

    # -- what snapshots reach

    def _snapshot(self, found: Snapshot) -> None:
        roots = [(found.directory, found.snapshot_id)]
        roots += [(parent.directory, parent.snapshot_id) for parent in found.parents]
        for root, name in roots:
            for frame in self._frames(root, name):
                for key, blob, origin in self._cells(frame, name):
                    self._tiles.add((blob, origin))
                    if blob in self._damaged or not self._store.has(blob):
                        what = "damaged" if blob in self._damaged else "missing"
                        self._fault(
                            IntegrityError(f"tile is {what}", object=f"{name} {key}", place=self._store.place(blob))
                        )

    def _frames(self, root: bytes, snapshot: str) -> Iterator[Frame]:
        """Frames under directory nodes not visited before."""
        if not root or root in self._seen:
            return
        self._seen.add(root)
        try:
            node = directory.children(self._store, root)
        except HimError as error:
            self._fault(_within(error, snapshot))
            return
        if not isinstance(node, tuple):
            for child, _ in node.values():
                yield from self._frames(child, snapshot)
        else:
            yield from node

    def _cells(self, frame: Frame, snapshot: str) -> Iterator[tuple[TileKey, BlobId, bytes]]:
        if not frame.root or frame.root in self._seen:
            return
        self._seen.add(frame.root)
        try:
            for row, column, entry in update.scan(self._store, frame.root, frame.root_height):
                yield TileKey(frame.stream, frame.name, 0, row, column), entry.blob_id, entry.origin
        except HimError as error:
            self._fault(_within(error, f"{snapshot} {frame}"))

    def _refs(self, snapshots: list[Snapshot]) -> None:
        known = {one.snapshot_id for one in snapshots}
        for name, (kind, target) in self._history.refs().items():
            if target not in known:
                self._fault(IntegrityError(f"the {kind} names no snapshot", object=name, place="log"))

    def _fault(self, error: HimError) -> None:
        if len(error.object) == 64 and error.kind == "integrity":
            self._damaged.add(bytes.fromhex(error.object))
        fault = fault_of(error)
        self._faults.setdefault((fault.object, fault.place), fault)


def fault_of(error: HimError) -> Fault:
    """A fault as fsck lists it."""
    return Fault(error.object or "repository", error.place, error.message, _RESTORE)


def _within(error: HimError, owner: str) -> IntegrityError:
    return IntegrityError(error.message, object=f"{owner} {error.object[:12]}", place=error.place)


def _silent(_done: int, _total: int, _what: str) -> None:
    """No progress is shown."""
