"""Checking a whole repository against its own digests: the log, every byte of every pack, and all that is reachable.

Every fault is named with the object, its place, and the remedy for faults of its kind (`catalog.remedy`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final, cast

import msgspec

from him.catalog import checkpoint, remedy
from him.catalog.checkpoint import Fold
from him.catalog.files import Examined, examine
from him.catalog.history import History
from him.catalog.log import CHECKPOINT_FOLDER, LOG_PATH
from him.catalog.marker import MARKER, REWRITE, needed_format
from him.catalog.retention import Expiry, lacks
from him.catalog.salvage import owners, told_unopened
from him.config import CHECKPOINT_BYTES_MAX, MENDS_MAX
from him.errors import HimError, IntegrityError, KeyNeededError, NotFoundError, StorageError, VersionError
from him.pack import format as layout
from him.pack.check import check_pack
from him.pack.relist import Repaired, Repairs, repairs
from him.ports import Disk, File, Progress, Projection, silent
from him.pyramid import directory, update
from him.tier.warm import PACK_FOLDER, WarmStore
from him.tile import codec
from him.tile.address import KIND_FOOTER, KIND_INDEX, KIND_NAMES, KIND_TILE, blob_id, reference
from him.tile.chunks import CHUNKS
from him.types import (
    BlobId,
    Fault,
    Frame,
    LiveState,
    PackRange,
    PackState,
    Ref,
    Secret,
    Snapshot,
    TileKey,
    name_of,
)

_ADDRESSES: Final = "cache/addresses"


class FsckReport(msgspec.Struct, frozen=True):
    """What was checked and what is wrong. `tiles` counts level-0 cells over all snapshots, each entry once.

    `notes` harm nothing: what was put right, what is left over, what nobody knows.
    """

    errors: tuple[Fault, ...]
    expired: int
    shredded: int
    tiles: int
    packs: int
    size_bytes: int
    notes: tuple[Fault, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors

    def after(self, before: Examined, mended: Sequence[Fault]) -> "FsckReport":
        """With what was put right before the check: by `catalog.mend`, and by opening what was found before."""
        known = {fault.place for fault in (*self.errors, *self.notes, *mended)}
        gone = [fault for fault in (*before.faults, *before.notes) if fault.place not in known]
        return msgspec.structs.replace(self, notes=(*self.notes, *mended, *gone))

    def as_json(self) -> dict[str, object]:
        """The object documented in docs/CLI_JSON.md."""
        return {
            "ok": self.ok,
            "errors": [msgspec.to_builtins(fault) for fault in self.errors],
            "notes": [msgspec.to_builtins(fault) for fault in self.notes],
            "expired": self.expired,
            "shredded": self.shredded,
            "tiles": self.tiles,
            "packs": self.packs,
            "bytes": self.size_bytes,
        }


class Fsck:
    """One check of a repository; reads everything, and changes only what differs from its cold copy.

    Args:
        known: faults that were found elsewhere.
        rebuild: first make projection and address index anew; then write again what follows from sound records: lists
            in packs, and zeros between records.
        format: what him.json says; 0 where there is none.
    """

    def __init__(
        self,
        history: History,
        projection: Projection,
        store: WarmStore,
        progress: Progress | None = None,
        *,
        known: Iterable[Fault] = (),
        rebuild: bool = False,
        format: int = 0,
    ) -> None:
        self._disk = store.disk
        self._history = history
        self._projection = projection
        self._store = store
        self._progress = progress or silent
        self._rebuild = rebuild
        self._format = format
        self._faults = {(fault.object, fault.place): fault for fault in known}
        self._notes: dict[tuple[str, str], Fault] = {}
        self._damaged: set[bytes] = set()
        self._partless: set[bytes] = set()
        self._seen: set[bytes] = set()
        self._tiles: set[tuple[bytes, bytes]] = set()
        self._expired: set[tuple[bytes, bytes]] = set()
        self._ranges: dict[str, list[PackRange]] = {}
        self._needed = 0

    def run(self) -> FsckReport:
        """Check log, checkpoints, packs and reachability. Raises VersionError for a log of newer software."""
        with self._history.lease():
            return self._run()

    def _run(self) -> FsckReport:
        self._beside()
        checkpoints = self._disk.list(CHECKPOINT_FOLDER)
        try:
            self._history.refresh()
        except (IntegrityError, StorageError) as error:
            self._fault(error, "log", error.fix)
        told = self._told()
        live = self._projection.state()
        # The projection has no digests of its own. (At other records another process commits right now.)
        if told is not None and told.seq == live.seq and told != live:
            fault = Fault("catalog", "cache/projection.sqlite", "differs from the log", remedy.CACHE, "cache")
            self._faults["catalog", "cache"] = fault
        self._beyond(checkpoints, live.seq)
        if 0 < self._format < self._needed:
            text = f"it says format {self._format}, and the log has records of format {self._needed}"
            self._faults[MARKER, MARKER] = Fault(MARKER, MARKER, text, REWRITE, "marker")
        there = (pack for pack in (told or live).packs if not pack.removed)
        packs = sorted(there, key=lambda pack: pack.name)
        size = 0
        for number, pack in enumerate(packs):
            self._progress(number, len(packs), pack.name)
            size += self._pack(pack)
        self._parity()
        self._others({pack.name for pack in (told or live).packs})
        # Snapshots and names of one moment: others drop and name them meanwhile.
        self._history.refresh()
        live = self._projection.state()
        for number, (_, found) in enumerate(live.snapshots):
            self._progress(number, len(live.snapshots), "snapshots")
            self._snapshot(self._history.opened(found))
        self._refs(live)
        faults, notes = tuple(self._faults.values()), tuple(self._notes.values())
        shredded = len(live.shredded)
        return FsckReport(faults, len(self._expired), shredded, len(self._tiles), len(packs), size, notes)

    def _beside(self) -> None:
        """What follows from log and packs, and the small files."""
        if self._rebuild:
            # A log that is too damaged to rebuild from is a fault to report, not to stop at.
            with suppress(IntegrityError):
                self._history.rebuild()
            self._store.forget_addresses()
        with suppress(HimError):
            self._store.refresh()  # Which puts right what it finds in caches.
        found = examine(self._disk)
        if found.faults:
            # What another process is just writing is whole when it is looked at again.
            again = examine(self._disk)
            found = again._replace(faults=[fault for fault in found.faults if fault in again.faults])
        self._faults |= {(fault.object, fault.place): fault for fault in found.faults}
        self._notes |= {(fault.object, fault.place): fault for fault in found.notes}

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
                error = IntegrityError(damage.message + since, object=damage.object, place=damage.place)
                self._fault(error, "log", remedy.BRIDGED)
            return told
        if damage is not None:
            self._fault(damage, "log", remedy.BY_CACHE)
        return None

    def _checkpoints(self) -> dict[int, LiveState]:
        kept: dict[int, LiveState] = {}
        for seq in self._history.log.checkpoints():
            try:
                kept[seq] = checkpoint.load(self._history.log, seq)
            except NotFoundError:
                continue  # A newer one has just taken its place.
            except VersionError as error:
                named = f"checkpoint {seq}"
                self._note(Fault(named, error.place, error.message, remedy.NEWER_CHECKPOINT, "version"))
            except HimError as error:
                self._checkpoint_fault(seq, error.message, error.place)
        return kept

    def _fold(self, start: LiveState, kept: Mapping[int, LiveState]) -> LiveState:
        """The state at the log's end, folded from `start`; every checkpoint on the way must be the same."""
        fold = Fold(start)
        self._ranges, self._needed = {}, 0
        for seq, digest, record in self._history.records(start.seq):
            fold.apply([(seq, digest, record)])
            self._needed = max(self._needed, needed_format(record.operations))
            for named in record.operations:
                if isinstance(named, PackRange):
                    self._ranges.setdefault(named.pack, []).append(named)
            if seq in kept and kept[seq] != fold.state():
                self._checkpoint_fault(seq, "differs from the log")
        return fold.state()

    def _checkpoint_fault(self, seq: int, message: str, place: str = "") -> None:
        named = f"checkpoint {seq}"
        fault = Fault(named, place or CHECKPOINT_FOLDER, message, remedy.CHECKPOINT, "checkpoint")
        self._faults[named, place] = fault

    def _beyond(self, names: list[str], head: int) -> None:
        """Checkpoints of records that the log does not have, though it had them when they were written."""
        for name in names:
            if not name.isdecimal() or int(name) <= head:
                continue
            path = f"{CHECKPOINT_FOLDER}/{name}"
            try:
                file = self._disk.open(path)
                try:
                    checkpoint.decode_file(file.read_at(0, min(file.size(), CHECKPOINT_BYTES_MAX)), path)
                finally:
                    file.close()
            except NotFoundError:
                continue
            except HimError as error:
                self._checkpoint_fault(int(name), error.message, path)
                continue
            text = f"the log ends at record {head} and there is a checkpoint of record {int(name)}: it is an older copy"
            self._faults["commit log", path] = Fault("commit log", path, text, remedy.OLDER_LOG, "log")

    # -- packs

    def _pack(self, pack: PackState) -> int:
        """Check all that belongs to a pack, once more after it was put right; its size in bytes."""
        faults, damaged = dict(self._faults), set(self._damaged)
        size = self._examined(pack)
        if len(self._faults) > len(faults) and self._history.removed(pack.name):
            self._faults, self._damaged = faults, damaged
        return size

    def _examined(self, pack: PackState) -> int:
        try:
            file = self._opened(pack.name)
        except HimError:
            error = IntegrityError("a pack is missing", object=pack.name, place=pack.name)
            self._fault(error, "pack", remedy.PACK)
            return 0
        try:
            errors, healed = self._checked(file, pack), False
            for _ in range(MENDS_MAX):
                if not errors:
                    break
                # Reading what is made of a damaged record may have mended it meanwhile: so look again in any case.
                more, before = self._store.mend(pack.name), len(errors)
                errors = self._checked(file, pack)
                healed = healed or len(errors) < before
                if not more:
                    break
            if healed:
                self._note_mended(pack.name)
            if errors:
                errors = self._relisted(file, pack, errors)
            # Only what the cold tier holds was ever freed here.
            freed = self._store.tiered and self._store.resident(pack.name) is None and len(file.data_runs()) != 1
            for error in errors:
                self._pack_fault(error, pack.name, remedy.RECEIPTS if freed else remedy.HEAL)
            return file.size()
        finally:
            file.close()

    def _opened(self, name: str) -> File:
        try:
            return self._disk.open(name)
        except NotFoundError:
            if not self._store.mend(name):
                raise
            self._note_mended(name)
            return self._disk.open(name)

    def _note_mended(self, name: str) -> None:
        text = "it was damaged, and was mended from the cold tier or from parity"
        self._note(Fault(name, name, text, "nothing: it was mended", "pack"))

    def _checked(self, file: File, pack: PackState) -> list[HimError]:
        """Every fault of a pack."""
        found: list[HimError] = []

        def look(record: layout.Record, place: str) -> None:
            error = self._content(record, place, found_by_name=not pack.condemned)
            if error is not None:
                found.append(error)

        found += check_pack(file, pack, look, self._store.repository_id)
        return found

    def _relisted(self, file: File, pack: PackState, errors: list[HimError]) -> list[HimError]:
        """What is left of a pack's faults once all that follows from its records is written again.

        The others are written right, or are faults with that remedy.
        """
        ranges = self._ranges.get(pack.name, []) if pack.finished else [named for _, named in pack.ranges]
        wanted = repairs(file, pack.name, ranges, pack.finished, self._store.repository_id)
        if self._store.resident(pack.name) is not None:
            return errors  # The cold tier has it otherwise, or does not answer.
        left = self._checked(cast("File", Repaired(file, wanted)), pack)
        kept = {(error.object, error.place, error.message) for error in left}
        lists = [error for error in errors if (error.object, error.place, error.message) not in kept]
        written = bool(lists) and self._rebuild and self._written(file, pack.name, wanted)
        for error in lists:
            named = pack.name if error.object in ("", pack.name) else f"a list ({error.object[:12]}…)"
            if written:
                text = f"{error.message}: it was written again"
                self._note(Fault(named, error.place, text, "nothing: it was mended", "list"))
            else:
                self._fault(IntegrityError(error.message, object=named, place=error.place), "list", remedy.RELIST)
        return left

    def _written(self, file: File, name: str, wanted: Repairs) -> bool:
        """Write the repairs of a pack; whether the disk let us."""
        try:
            for offset, data in wanted.writes:
                file.write_at(offset, data)
            if wanted.size is not None and file.size() > wanted.size:
                file.truncate(wanted.size)
            file.sync()
        except StorageError as error:
            self._fault(error, "pack", error.fix)
            return False
        return True

    def _pack_fault(self, error: HimError, pack: str, fix: str) -> None:
        if isinstance(error, VersionError):
            self._fault(error, "version", remedy.NEWER)
        elif error.object == pack and error.place == f"{pack} @ 0":
            self._fault(error, "pack", remedy.FOREIGN_PACK)
        else:
            self._fault(error, "record" if error.object != pack else "pack", fix)

    def _content(self, found: layout.Record, place: str, *, found_by_name: bool) -> HimError | None:
        """Whether the stored bytes decode to what the blob_id names, and whether the addresses know of them.

        Args:
            found_by_name: the addresses have to know of them (what is in a condemned pack nobody need find).
        """
        header = found.header
        try:
            if any(header.key_id):
                pass  # Its digest holds; what it says is looked at where a snapshot leads to it.
            elif header.delta_depth or header.codec == CHUNKS:
                self._store.read_tile(header.blob_id)
            else:
                tile = header.kind == KIND_TILE
                payload = codec.unpack(found.meta, header.codec, found.stored) if tile else found.stored
                if blob_id(header.kind, found.meta, payload) != header.blob_id:
                    raise IntegrityError(f"{KIND_NAMES.get(header.kind, 'record')} has another identity")
                if tile:
                    codec.values_of(found.meta, payload)
        except (IntegrityError, VersionError) as error:
            if isinstance(error, IntegrityError) and self._lacks(header.blob_id):
                # No fault while nothing refers to it: a restored log may end before the commit that it is of.
                self._partless.add(header.blob_id)
                return None
            return type(error)(error.message, object=header.blob_id.hex(), place=place)
        if found_by_name and header.kind not in (KIND_INDEX, KIND_FOOTER) and not self._known(header.blob_id):
            text = f"the addresses do not know of the record at {place}"
            self._faults[_ADDRESSES, _ADDRESSES] = Fault(_ADDRESSES, _ADDRESSES, text, remedy.CACHE, "cache")
        return None

    def _known(self, blob: BlobId) -> bool:
        """Whether the addresses know of a blob; the log may be ahead of them, where another process commits."""
        if self._store.has(blob):
            return True
        self._history.refresh()
        return self._store.has(blob)

    def _lacks(self, ref: Ref) -> bool:
        """Whether something that a tile is made of is not stored, as far as the log goes now."""
        if not lacks(self._store, ref):
            return False
        self._history.refresh()
        return lacks(self._store, ref)

    def _parity(self) -> None:
        if self._store.parity is not None:
            for held in self._store.parity.groups():
                for name in held.names:
                    error = self._parity_error(name)
                    if error is not None:
                        self._fault(error, "parity", remedy.PARITY)

    def _parity_error(self, name: str) -> IntegrityError | None:
        """What is wrong with a parity file, once it was put right from the cold tier; others may replace its group."""
        assert self._store.parity is not None
        error = self._store.parity.check_file(name)
        for _ in range(MENDS_MAX):
            if error is None or not self._store.mend(name):
                break
            error = self._store.parity.check_file(name)
        there = name.removeprefix(f"{PACK_FOLDER}/") in self._disk.list(PACK_FOLDER)
        return error if there else None

    def _others(self, named: set[str]) -> None:
        """Packs that the log does not name: of interrupted commits, of other repositories, or of a longer log."""
        whose = dict(owners(self._disk))
        packs = [f"{PACK_FOLDER}/{name}" for name in self._disk.list(PACK_FOLDER) if name.endswith(".pack")]
        for path in packs:
            if path in named:
                continue
            own = whose.get(path, self._store.repository_id) == self._store.repository_id
            text = "no record names it" if own else "another repository's pack"
            self._note(Fault(path, path, text, remedy.ORPHAN if own else remedy.FOREIGN_FILE, "pack"))
        ours = [path for path, owner in whose.items() if owner == self._store.repository_id]
        if ours and named and named.isdisjoint(packs):
            text = "it names none of the packs that are here, which are this repository's: it is another one's"
            self._faults["commit log", LOG_PATH] = Fault("commit log", LOG_PATH, text, remedy.FOREIGN_LOG, "log")

    # -- what snapshots reach

    def _snapshot(self, found: Snapshot) -> None:
        expiry = Expiry(self._store.expired)
        roots = [(found.directory, found.snapshot_id)]
        roots += [(parent.directory, parent.snapshot_id) for parent in found.parents]
        for root, name in roots:
            for frame in self._frames(root, name):
                for key, ref, origin in self._cells(frame, name):
                    blob = name_of(ref)
                    self._tiles.add((blob, origin))
                    if isinstance(ref, Secret):
                        self._decrypted(ref)
                    partless = blob in self._partless
                    if partless or blob in self._damaged or not self._store.has(blob):
                        if blob not in self._damaged and expiry.covers_one(frame.stream, origin):
                            self._expired.add((blob, origin))
                            continue
                        what = "damaged" if blob in self._damaged else "missing a part" if partless else "missing"
                        place = self._store.place(blob)
                        error = IntegrityError(f"tile is {what}", object=f"{name} {key}", place=place)
                        self._fault(error, "tile", remedy.HEAL)

    def _decrypted(self, ref: Secret) -> None:
        """Whether an encrypted tile holds what its secret names."""
        if ref in self._seen or not self._store.has(ref):
            return
        self._seen.add(ref)
        try:
            found = self._store.read(ref)
            if reference(KIND_TILE, found.meta, self._store.payload(ref), self._store.hash_key) != ref:
                raise IntegrityError("tile has another identity", object=ref.hex(), place=self._store.place(ref))
        except KeyNeededError:
            return  # It opens, and without the repository's hash key no more can be said.
        except IntegrityError as error:
            if self._lacks(ref):
                self._partless.add(ref.blob_id)
            else:
                self._fault(error, "record", remedy.HEAL)

    def _frames(self, root: bytes, snapshot: str) -> Iterator[Frame]:
        """Frames under directory nodes not visited before."""
        if not root or root in self._seen:
            return
        self._seen.add(root)
        try:
            node = directory.children(self._store, root)
        except KeyNeededError as error:
            text = "it is encrypted, and what it holds was not looked at"
            self._note(Fault(snapshot, "log", text, error.fix, "record"))
            return
        except HimError as error:
            self._within(error, snapshot)
            return
        if not isinstance(node, tuple):
            for child, _ in node.values():
                yield from self._frames(child, snapshot)
        else:
            yield from node

    def _cells(self, frame: Frame, snapshot: str) -> Iterator[tuple[TileKey, Ref, bytes]]:
        if not frame.root or frame.root in self._seen:
            return
        self._seen.add(frame.root)
        try:
            for row, column, entry in update.scan(self._store, frame.root, frame.root_height):
                yield TileKey(frame.stream, frame.name, 0, row, column), entry.ref, entry.origin
        except HimError as error:
            self._within(error, f"{snapshot} {frame}")

    def _refs(self, live: LiveState) -> None:
        known = {str(one.snapshot_id) for _, one in live.snapshots}
        for name, kind, target in live.refs:
            if target not in known:
                error = IntegrityError(f"the {kind} names no snapshot", object=name, place="log")
                self._fault(error, "ref", remedy.REF.format(name=name))

    def _fault(self, error: HimError, kind: str, fix: str) -> None:
        if len(error.object) == 64 and error.kind == "integrity":
            self._damaged.add(bytes.fromhex(error.object))
        fault = Fault(error.object or "repository", error.place, error.message, fix, kind)
        self._faults.setdefault((fault.object, fault.place), fault)

    def _within(self, error: HimError, owner: str) -> None:
        """What a snapshot, or a frame of one, cannot be read for."""
        newer = isinstance(error, VersionError)
        kind, fix = ("version", remedy.NEWER) if newer else ("tile", remedy.HEAL)
        if isinstance(error, StorageError):
            kind, fix = "pack", error.fix
        named = f"{owner} {error.object[:12]}"
        self._faults.setdefault((named, error.place), Fault(named, error.place, error.message, fix, kind))

    def _note(self, note: Fault) -> None:
        self._notes.setdefault((note.object, note.place), note)


def unopened(disk: Disk, before: Examined, error: HimError) -> FsckReport:
    """The report on a repository that `error` bars from opening."""
    found = told_unopened(disk, error)
    known = {fault.place for fault in before.faults}
    faults = (*before.faults, *(fault for fault in found.faults if fault.place not in known))
    return FsckReport(faults, 0, 0, 0, found.packs, found.size_bytes, (*before.notes, *found.notes))
