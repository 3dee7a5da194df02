"""Checking a whole repository against its own digests: the log, every byte of every pack, and all that is reachable."""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import msgspec

from him.catalog import checkpoint
from him.catalog.checkpoint import Fold
from him.catalog.history import History
from him.catalog.retention import Expiry
from him.config import MENDS_MAX
from him.errors import HimError, IntegrityError, NotFoundError
from him.pack import format as layout
from him.pack.check import check_pack
from him.ports import Projection
from him.pyramid import directory, update
from him.tier.warm import WarmStore
from him.tile import codec
from him.tile.address import KIND_NAMES, KIND_TILE, blob_id
from him.tile.chunks import CHUNKS
from him.types import BlobId, Fault, Frame, LiveState, PackState, Snapshot, TileKey

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


class Fsck:
    """One check of a repository; reads everything, and changes only what differs from its cold copy."""

    def __init__(
        self, history: History, projection: Projection, store: WarmStore, progress: Progress | None = None
    ) -> None:
        self._disk = store.disk
        self._history = history
        self._projection = projection
        self._store = store
        self._progress = progress or _silent
        self._faults: dict[tuple[str, str], Fault] = {}
        self._damaged: set[bytes] = set()
        self._partless: set[bytes] = set()
        self._seen: set[bytes] = set()
        self._tiles: set[tuple[bytes, bytes]] = set()
        self._expired: set[tuple[bytes, bytes]] = set()

    def run(self) -> FsckReport:
        """Check log, checkpoints, packs and reachability."""
        with self._history.lease():
            return self._run()

    def _run(self) -> FsckReport:
        try:
            self._history.refresh()
        except HimError as error:
            self._fault(error)
        told = self._told()
        live = self._projection.state()
        # The projection has no digests of its own. (At other records another process commits right now.)
        if told is not None and told.seq == live.seq and told != live:
            fix = "run `him fsck --rebuild`, or delete the folder cache: it is made anew"
            self._faults["catalog", "cache"] = Fault("catalog", "cache/projection.sqlite", "differs from the log", fix)
        there = (pack for pack in (told or live).packs if not pack.removed)
        packs = sorted(there, key=lambda pack: pack.name)
        size = 0
        for number, pack in enumerate(packs):
            self._progress(number, len(packs), pack.name)
            size += self._pack(pack)
        self._history.refresh()
        # Snapshots and names of one moment: others drop and name them meanwhile.
        live = self._projection.state()
        for number, (_, found) in enumerate(live.snapshots):
            self._progress(number, len(live.snapshots), "snapshots")
            self._snapshot(found)
        self._refs(live)
        return FsckReport(tuple(self._faults.values()), len(self._expired), 0, len(self._tiles), len(packs), size)

    # -- the log

    def _told(self) -> LiveState | None:
        """What the log says; where its beginning is damaged, what it says from a checkpoint on. None: neither."""
        kept = self._checkpoints()
        damage: IntegrityError | None = None
        for start in (LiveState(), *sorted(kept.values(), key=lambda state: state.seq)):
            try:
                told = self._fold(start, kept)
            except IntegrityError as error:
                damage = damage or error
                continue
            if damage is not None:
                since = f"; what it said before record {start.seq + 1} is taken from the checkpoint there"
                self._fault(IntegrityError(damage.message + since, object=damage.object, place=damage.place))
            return told
        if damage is not None:
            self._fault(damage)
        return None

    def _checkpoints(self) -> dict[int, LiveState]:
        kept: dict[int, LiveState] = {}
        for seq in self._history.log.checkpoints():
            try:
                kept[seq] = checkpoint.load(self._history.log, seq)
            except NotFoundError:
                continue  # A newer one has just taken its place.
            except HimError as error:
                self._checkpoint_fault(seq, error.message, error.place)
        return kept

    def _fold(self, start: LiveState, kept: Mapping[int, LiveState]) -> LiveState:
        """The state at the log's end, folded from `start`; every checkpoint on the way must be the same."""
        fold = Fold(start)
        for seq, digest, record in self._history.records(start.seq):
            fold.apply([(seq, digest, record)])
            if seq in kept and kept[seq] != fold.state():
                self._checkpoint_fault(seq, "differs from the log")
        return fold.state()

    def _checkpoint_fault(self, seq: int, message: str, place: str = "") -> None:
        named = f"checkpoint {seq}"
        fix = "delete the file: the log says the same, and a new one is written at the next mark"
        self._faults[named, place] = Fault(named, place or "log/checkpoints", message, fix)

    # -- packs

    def _pack(self, pack: PackState) -> int:
        """Check all that belongs to a pack, once more each time it was put right; its size in bytes."""
        faults, damaged = dict(self._faults), set(self._damaged)
        size = self._checked(pack)
        for _ in range(MENDS_MAX):
            if len(self._faults) == len(faults) or not self._store.mend(pack.name):
                break
            self._faults, self._damaged = dict(faults), set(damaged)
            size = self._checked(pack)
        if len(self._faults) > len(faults) and self._removed(pack.name):
            self._faults, self._damaged = faults, damaged
        return size

    def _removed(self, name: str) -> bool:
        """Whether another process has removed a pack, which was condemned before, since this check began."""
        self._history.refresh()
        return any(removed and name == gone for gone, _, removed in self._projection.released(0))

    def _checked(self, pack: PackState) -> int:
        try:
            file = self._disk.open(pack.name)
        except HimError:
            self._fault(IntegrityError("a pack is missing", object=pack.name, place=pack.name))
            return 0
        try:
            for error in check_pack(file, pack, self._content, self._store.repository_id):
                self._fault(error)
            return file.size()
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
            if self._lacks_part(header.blob_id):
                # No fault while nothing refers to it: a restored log may end before the commit that it is of.
                self._partless.add(header.blob_id)
                return
            self._fault(IntegrityError(error.message, object=header.blob_id.hex(), place=place))

    def _lacks_part(self, blob: BlobId) -> bool:
        """Whether something that a tile is made of is not stored at all."""
        waiting = [blob]
        try:
            while waiting:
                blob = waiting.pop()
                if not self._store.has(blob):
                    return True
                found = self._store.read(blob)
                waiting += self._store.parts(found)
        except IntegrityError:
            pass
        return False

    # -- what snapshots reach

    def _snapshot(self, found: Snapshot) -> None:
        expiry = Expiry(self._store.expired)
        roots = [(found.directory, found.snapshot_id)]
        roots += [(parent.directory, parent.snapshot_id) for parent in found.parents]
        for root, name in roots:
            for frame in self._frames(root, name):
                for key, blob, origin in self._cells(frame, name):
                    self._tiles.add((blob, origin))
                    partless = blob in self._partless
                    if partless or blob in self._damaged or not self._store.has(blob):
                        if blob not in self._damaged and expiry.covers_one(frame.stream, origin):
                            self._expired.add((blob, origin))
                            continue
                        what = "damaged" if blob in self._damaged else "missing a part" if partless else "missing"
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

    def _refs(self, live: LiveState) -> None:
        known = {str(one.snapshot_id) for _, one in live.snapshots}
        for name, kind, target in live.refs:
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
