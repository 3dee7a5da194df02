"""The warm tier: blobs in local packs, every read verified, every write appended to this process's own pack."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import zip_longest
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from him.config import (
    ADDRESS_KEPT_ROWS,
    BATCHES_AHEAD,
    BUFFER_FROM_BYTES,
    BUFFER_GRAIN_BYTES,
    MENDS_MAX,
    OPEN_PACKS_MAX,
    PACK_RANGES_MAX,
    PACK_TARGET_BYTES,
    PAGE_CACHE_BYTES,
    READ_THREADS_MAX,
    SYNC_AHEAD_BYTES,
    TILE_BYTES_MAX,
)
from him.errors import (
    BusyError,
    ConflictError,
    HimError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnavailableError,
    VersionError,
)
from him.pack import format as layout
from him.pack.file import PackWriter, contiguous, read_footer, read_index, read_record, walk_rows
from him.pack.format import Draft
from him.ports import Disk, File, Progress, Projection, Rng
from him.tier.address import AddressIndex, Location
from him.tier.assembly import Assembly, Blob, Prepared, Values, as_stored, opened, parts_of
from him.tier.care import Journal
from him.tier.kept import Buffers, Recent
from him.tier.mender import Mender
from him.tier.mirror import Mirror
from him.tier.protect import Made, Parity
from him.tile import codec
from him.tile.address import reference
from him.tile.chunks import CHUNKS
from him.types import BlobId, HashKey, PackFinished, PackRange, PackState, Ref, Secret, name_of, ref_of

PACK_FOLDER: Final = "packs"
_T = TypeVar("_T")
_R = TypeVar("_R")
_K = TypeVar("_K", bound=Hashable)


class WarmStore:
    """Reads and writes blobs of one repository.

    Reading verifies the record's digest and its full blob_id (rule 1). Writing goes to a pack this process holds the
    lock of; what was appended becomes visible to others with the commit record that names its range.
    """

    def __init__(
        self,
        disk: Disk,
        projection: Projection,
        rng: Rng,
        repository_id: bytes,
        mirror: Mirror | None = None,
        *,
        journal: Journal | None = None,
        parity: Parity | None = None,
        hash_key: HashKey | None = None,
    ) -> None:
        self.disk: Disk = disk if mirror is None else mirror
        """Where packs are read through."""
        self._journal = journal
        self.mender = Mender(mirror, parity, journal)
        """What puts right what is damaged here."""
        self._mirror = mirror
        self._projection = projection
        self._rng = rng
        self.repository_id = repository_id
        self._files: dict[str, File] = {}
        self._retired: list[File] = []
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._addresses = AddressIndex(disk)
        self._addresses_loaded = False
        self._addresses_sound = False
        self._salvaged = False
        self._pending: dict[bytes, tuple[str, Location]] = {}
        self._writer: PackWriter | None = None
        self._ended: File | None = None
        self._ranges = 0
        self._synced: tuple[PackWriter | None, int] = (None, 0)
        self._syncing = threading.RLock()
        self._spoiled: set[str] = set()
        # Verified payloads as they were written or read, and what they were parsed into.
        self._pages = Recent[bytes, bytes](PAGE_CACHE_BYTES // 4)
        self._parsed = Recent[bytes, Any](PAGE_CACHE_BYTES)
        self.leaves = Recent[tuple[bytes, int, int], Any](PAGE_CACHE_BYTES // 2)
        """Parsed leaves by root, row and column: who knows the place need not go from the root, as in a TLB."""
        self._buffers = Buffers()
        self._assembly = Assembly(self._record, self.place, hash_key)
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()
        # One batch is appended at a time, while others read.
        self._appending = threading.RLock()
        self.written_bytes = 0
        """Bytes appended to packs since the store was opened."""
        self.written_pages = 0
        """Pages and directory nodes among them."""
        self.epoch = 0
        """Grows when appended blobs are forgotten: a batch that spans such a moment must not commit."""
        self._released = 0
        self._condemned: dict[str, int] = {}
        self.target_bytes: int | None = None
        """From which size on a pack is finished, instead of PACK_TARGET_BYTES."""

    # -- reading

    def has(self, ref: Ref) -> bool:
        """Whether the blob is committed or was appended by this process."""
        blob = name_of(ref)
        with self._lock:
            return blob in self._pending or self._find(blob) is not None

    def depth_of(self, ref: Ref) -> int:
        """How many deltas lead to the blob as it is stored; 0 in full. Raises IntegrityError when it is missing."""
        return self._place(name_of(ref))[1].depth

    def read(self, ref: Ref) -> Blob:
        """The verified blob, decrypted where it is encrypted.

        Raises:
            IntegrityError: missing though something refers to it, or damaged; names the place.
            KeyNeededError: it is encrypted, and named by its blob_id alone.
        """
        return self._record(ref, digest=True)

    def stored(self, blob: BlobId) -> Blob:
        """The verified record of a blob as it lies there, which may be encrypted. Raises IntegrityError."""
        return self._located(blob, partial(self._read, blob, None))

    def read_tile(self, ref: Ref) -> Values:
        """Decoded values of a tile (read-only memory of their own), or a document's bytes. Raises as `read`."""
        return self._assembly.values(ref, self.read(ref))

    def payload(self, ref: Ref) -> bytes | memoryview:
        """The canonical payload of a tile, verified. Raises as `read`."""
        return self._assembly.payload(ref, self.read(ref))

    def read_tiles(self, refs: Sequence[Ref]) -> list[Values]:
        """`read_tile` of each, in the order asked for; read in the order they lie in, on several threads."""
        places = {ref: self._place(name_of(ref)) for ref in refs}
        order = sorted(places, key=lambda ref: (places[ref][0], places[ref][1].offset))
        if self._mirror is not None:
            self._mirror.ahead(self.places(places))
        size = sum(at.length for _, at in places.values())
        values = self.spread(self.read_tile, order) if size >= BUFFER_FROM_BYTES else [*map(self.read_tile, order)]
        found = dict(zip(order, values, strict=True))
        return [found[ref] for ref in refs]

    @property
    def parity(self) -> Parity | None:
        """What makes damaged bytes of finished packs again, if anything does."""
        return self.mender.parity

    @property
    def tiered(self) -> bool:
        """Whether what it reads may have to be fetched from a cold tier."""
        return self._mirror is not None

    def bring(self, pages: Sequence[bytes]) -> None:
        """Have pages on this disk that are not in memory, together; what is missing is for their reader to say."""
        if self._mirror is not None:
            with suppress(IntegrityError):
                unread = (page for page in pages if self._parsed.get(page) is None and self._pages.get(page) is None)
                self._mirror.ahead(self.places(map(ref_of, unread)))

    def keep(self, refs: Sequence[Ref]) -> None:
        """Pin tiles that were just read, and what they are made of: they are touched together."""
        if self._mirror is None:
            return
        waiting = [ref for ref in refs if not self._mirror.kept_lately(name_of(ref))]
        found: dict[Ref, None] = {}
        with suppress(HimError):  # It was read; that it is kept is a service.
            while waiting:
                ref = waiting.pop()
                if ref not in found:
                    found[ref] = None
                    waiting += self.parts(self.read(ref))
            if found:
                self._mirror.keep(map(name_of, found), self.places(found))

    @contextmanager
    def view(self, ref: Ref) -> Generator[Values]:
        """A tile without copying: read-only memory of the pack itself, verified, locked against eviction.

        Only what is stored raw and unquantised can be lent; anything else is a copy. The range stays locked while
        any reference to the array lives.
        """
        found = self.read(ref) if isinstance(ref, Secret) else self._located(ref, partial(self._lent, ref))
        yield self._assembly.values(ref, found)

    def spread(self, work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """The results of `work` on each item, in order; on several threads where the machine has them."""
        if len(items) < 2 or (os.cpu_count() or 1) < 2:
            return [work(item) for item in items]
        return list(self._pool().map(work, items))

    def ahead(self, work: Callable[[_T], _R], batches: Iterable[Sequence[_T]]) -> Iterator[list[_R]]:
        """`spread` of each batch in turn, the next BATCHES_AHEAD being worked on while the caller uses the last."""
        begun: deque[list[Future[_R]]] = deque()
        for batch in batches:
            begun.append([self._pool().submit(work, item) for item in batch])
            if len(begun) > BATCHES_AHEAD:
                yield [one.result() for one in begun.popleft()]
        while begun:
            yield [one.result() for one in begun.popleft()]

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(min(READ_THREADS_MAX, os.cpu_count() or 1), "him")
            return self._threads

    def page(self, kind: int, ref: Ref) -> bytes:
        """Payload of a page, directory node or companion, from a cache of verified copies when possible."""
        payload = self._pages.get(ref)
        if payload is None:
            payload = self._page(kind, ref)
            self._pages.put(ref, payload, len(payload))
        return payload

    def parsed(self, kind: int, ref: bytes, parse: Callable[[bytes], _T]) -> _T:
        """`parse(page(kind, ref))`, remembered: pure, and its result is never changed."""
        kept = self._parsed.young.get(ref)
        if kept is not None:  # Asked once a level of every look-up: not even a call.
            return kept[0]
        found = self._parsed.get(ref)
        if found is None:
            payload = self._pages.get(ref) or self._page(kind, ref_of(ref))
            try:
                found = parse(payload)
            except (IntegrityError, VersionError) as error:
                raise type(error)(error.message, object=ref.hex(), place=self.place(ref_of(ref))) from error
            self._parsed.put(ref, found, len(payload))
        return found

    def parts(self, found: Blob) -> list[Ref]:
        """What a verified record is made of: the base of a delta, the chunks of a document. Raises IntegrityError."""
        return parts_of(found)

    def made_of(self, ref: Ref) -> list[Ref]:
        """`parts` of a stored tile, of which little more than the header is read."""
        blob = name_of(ref)
        head = self._located(blob, partial(self._header, blob))
        if head.delta_depth:
            return [BlobId(head.delta_base)]
        return self.parts(self.read(ref)) if head.codec == CHUNKS else []

    def place(self, ref: Ref) -> str:
        """`packs/NAME @ offset` for messages; "nowhere" when unknown."""
        try:
            name, at = self._place(name_of(ref))
        except IntegrityError:
            return "nowhere"
        return f"{name} @ {at.offset}"

    def places(self, refs: Iterable[Ref]) -> list[tuple[str, int, int]]:
        """(path, offset, bytes) of each record. Raises IntegrityError for a missing one."""
        return [(name, at.offset, at.length) for name, at in map(self._place, map(name_of, refs))]

    def size_of(self, ref: Ref) -> int:
        """Bytes the blob's record takes on disk."""
        return self._place(name_of(ref))[1].length

    # -- writing

    def put_tile(self, tile: codec.EncodedTile, origin: bytes) -> bool:
        """Store an encoded tile unless it is there; True when bytes were written."""
        return self.put_tiles([tile], origin) == 1

    def put_tiles(self, tiles: Sequence[codec.EncodedTile], origin: bytes, replaced: Sequence[Ref | None] = ()) -> int:
        """Store the tiles that are not there yet; how many were written.

        Args:
            replaced: which tile each takes the place of, if any (see `prepare`).
        """
        pairs = list(zip_longest(tiles, replaced))
        return self.put_prepared(self.spread(lambda pair: self.prepare(pair[0], origin, pair[1]), pairs))

    def prepare(self, tile: codec.EncodedTile, origin: bytes, replaced: Ref | None = None) -> Prepared:
        """The records of a tile, ready to be appended; what they do not need of it can be forgotten.

        Args:
            replaced: the tile whose place it takes; it is stored as a change of that where this is small.
        """
        if self.missing([tile.ref])[0]:
            # What retention has let go may be replaced, and be on its way out.
            base = replaced if replaced is not None and self.keeps(replaced) else None
            return Prepared(tile.ref, self._assembly.drafts(tile, origin, base))
        if self.keeps(tile.ref):
            return Prepared(tile.ref, [])
        # No delta: of two records the less deep one counts.
        return Prepared(tile.ref, self._assembly.drafts(tile, origin, None), anew=True)

    def keeps(self, ref: Ref) -> bool:
        """Whether a tile is stored, with all it is made of, where it can be relied on.

        What nothing refers to may have lost its base, or its chunks, with a pack that was removed.
        """
        if self.missing([ref])[0]:
            return False
        whole = not self._addresses.doubtful()
        return whole or all(self.keeps(part) for part in self.made_of(ref))

    def put_prepared(self, tiles: Sequence[Prepared]) -> int:
        """Append the tiles that are not there yet, their chunks first; how many were written."""
        chunks = [chunk for tile in tiles for chunk in tile.drafts[1:]]
        absent = self.missing([chunk.blob_id for chunk in chunks])
        self._put(chunks)
        shared = [chunk for chunk, new in zip(chunks, absent, strict=True) if not new]
        self._put([chunk for chunk in shared if not self.keeps(chunk.blob_id)], again=True)
        again = self._put([tile.drafts[0] for tile in tiles if tile.anew], again=True)
        return again + self._put([tile.drafts[0] for tile in tiles if tile.drafts and not tile.anew])

    def buffer(self, size: int) -> memoryview:
        """Writable memory, free again when the last reference to it goes: `codec.encode_array` copies into it."""
        return self._buffers.take(size) if size >= BUFFER_GRAIN_BYTES else memoryview(bytearray(size))

    def put_page(self, kind: int, payload: bytes, *, encrypted: bool = False) -> Ref:
        """Store a page, directory node or companion unless it is there; how to refer to it."""
        return self.put_pages(kind, [payload], encrypted=encrypted)[0]

    def put_pages(self, kind: int, payloads: Sequence[bytes], *, encrypted: bool = False) -> Sequence[Ref]:
        """Store the pages that are not there yet; how to refer to them, in order. Raises KeyNeededError."""
        key = self.hash_key if encrypted else None
        refs = [reference(kind, b"", payload, key) for payload in payloads]
        drafts = [
            Draft(kind, codec.RAW, name_of(ref), b"", payload, len(payload))
            for ref, payload in zip(refs, payloads, strict=True)
        ]
        if encrypted:
            new = zip(refs, drafts, self.missing(refs), strict=True)
            drafts = [self._assembly.draft(ref, draft) for ref, draft, absent in new if absent]
        self.written_pages += self._put(drafts)
        for ref, payload in zip(refs, payloads, strict=True):
            self._pages.put(ref, payload, len(payload))
        return refs

    @property
    def hash_key(self) -> bytes:
        """What encrypted content is named with. Raises KeyNeededError."""
        return self._assembly.key().key

    def draft(self, blob: BlobId) -> Draft:
        """The record of a blob as it is stored, verified: for another pack, or another repository that has its base.

        Raises:
            IntegrityError: missing or damaged.
        """
        found = self.stored(blob)
        return Draft(
            found.kind, found.codec, blob, found.meta, found.stored, found.raw_size, found.origin, found.delta_base,
            found.delta_depth, found.key_id, found.nonce or bytes(24),
        )  # fmt: skip

    def put_drafts(self, drafts: Sequence[Draft], *, again: bool = False) -> int:
        """Append records as they are unless their blobs are there; how many. What they are made of comes first.

        Args:
            again: append them even so: of two records of a blob the least deep, then the newest is found.
        """
        return self._put(drafts, again=again)

    def copy(self, blobs: Sequence[BlobId]) -> int:
        """Append the records of blobs again, as they are found now, but those this process has just appended; bytes."""
        before = self.written_bytes
        self._put([self.draft(blob) for blob in blobs if blob not in self._pending], again=True)
        return self.written_bytes - before

    def rely(self, refs: Iterable[Ref]) -> int:
        """Before a record refers to blobs: those that only condemned packs hold are appended in full; how many.

        What they, or others among them, are made of is looked at too.

        Raises:
            BusyError: one is in no pack any more.
        """
        return sum(map(self._relied, refs))

    @property
    def expired(self) -> dict[tuple[str, str], int]:
        """What retention has let go: (stream, snapshot id or "") → tiles of snapshots opened before (ns)."""
        return self._projection.expired()

    def only_in(self, blobs: Sequence[BlobId], packs: Set[str]) -> list[BlobId]:
        """Which blobs lie in no pack but condemned ones and `packs`."""
        with self._lock:
            self._caught_up()
            avoid = frozenset(self._numbers[name] for name in packs)
            return [blob for blob in blobs if blob not in self._pending and not self._addresses.relied(blob, avoid)]

    def rows(self, pack: PackState) -> layout.Rows:
        """All that a pack holds. Raises IntegrityError, also where only its list is damaged."""
        named = [pack.finished] if pack.finished else [one for _, one in pack.ranges]
        return np.concatenate([layout.rows_of([]), *(self._rows(one, salvage=False) for one in named)])

    def protect(self, progress: Progress) -> Made | None:
        """Bring parity up to date with the packs that are to stay; None when another process does, or there is none.

        Raises:
            StorageError: the disk refused.
        """
        if self.parity is None:
            return None
        with suppress(BusyError):
            return self.parity.update(progress)
        return None

    def remove(self, name: str) -> None:
        """Remove what is on this disk of a pack that a record says is gone."""
        if self._mirror is None:
            self.disk.remove(name)
        else:
            self._mirror.drop_here(name)

    def let_go(self, name: str) -> None:
        """Remove a parity file, here and from the cold tier; where that does not answer its copy stays."""
        self.remove(name)
        if self._mirror is not None and name in self.copies():
            with suppress(UnavailableError, ConflictError):
                self._mirror.drop(name)

    def copies(self) -> set[str]:
        """The packs that the cold tier holds, those among them that are gone here."""
        return set() if self._mirror is None else self._mirror.copies()

    def copy_out(self) -> None:
        """Copy finished packs, and the log up to its present end, to the cold tier. Raises as `Mirror.push_all`."""
        if self._mirror is not None:
            self._mirror.push_all()

    def check_copy(self, name: str, pace: Callable[[int], None], *, mend: bool) -> Iterator[HimError]:
        """What is wrong with a pack's copy in the cold tier, if it is to be there; with `mend` it is copied again.

        Args:
            pace: told of every part that was read.
        """
        if self._mirror is None or not self._mirror.holds(name):
            return
        try:
            self._mirror.check_copy(name, pace)
        except IntegrityError as error:
            if not self._mirror.holds(name):
                return  # Another process has removed it meanwhile.
            yield error
            if mend:
                parts = None if self.parity is None or not self.parity.protects(name) else self.parity.chunks(name)
                try:
                    self._mirror.copy_again(name, None if parts is None else (chunk.data for chunk in parts))
                except HimError as again:
                    yield again
        except HimError as error:
            yield error

    def remove_copy(self, name: str) -> None:
        """Remove a pack that is gone from the cold tier. Raises as `Mirror.drop`."""
        if self._mirror is not None:
            self._mirror.drop(name)

    def resident(self, name: str) -> NDArray[np.bool_] | None:
        """Which extents of a pack are on this disk; None for a pack that is nowhere else."""
        return None if self._mirror is None else self._mirror.resident(name)

    @property
    def condemned(self) -> int:
        """The record that last condemned a pack, as far as this store has looked; 0 for none."""
        return max(self.condemned_packs().values(), default=0)

    def condemned_packs(self) -> dict[str, int]:
        """Packs that are to be removed once nobody reads them, and the records that condemned them."""
        with self._lock:
            self._caught_up()
            return dict(self._condemned)

    @property
    def writing(self) -> bool:
        """Whether this process holds a pack to append to."""
        return self._writer is not None

    def continue_pack(self) -> None:
        """Take up an unfinished pack that nobody holds, if there is one.

        Only under the log's lock, with the projection at its head: a range that was committed after an older view
        would be cut off.
        """
        with self._appending, self._lock:
            if self._writer is not None:
                return
            growing: dict[str, list[PackRange]] = {}
            for _, named in self._projection.pack_changes(0):
                if isinstance(named, PackRange):
                    growing.setdefault(named.pack, []).append(named)
            for name in sorted(growing.keys() - self._spoiled):
                try:
                    file = self.disk.open(name)
                except NotFoundError:
                    continue
                head = file.read_at(0, layout.FILE_HEADER_BYTES)
                if not file.lock(wait=False) or not layout.may_grow(head, self.repository_id):
                    file.close()
                    continue
                end = growing[name][-1].end
                if file.size() > end:
                    # Whatever lies beyond the last committed range was left by a process that died.
                    file.truncate(end)
                if name in self._files:
                    # Another thread may be reading through it: closed with the store.
                    self._retired.append(self._files[name])
                self._files[name] = file
                self._writer, self._ranges = PackWriter(file, name, end), len(growing[name])
                self._synced = (self._writer, end)
                return

    def sync_ahead(self) -> None:
        """Make much that was appended durable while nobody waits; under the log's lock only little is then left.

        Raises:
            StorageError: the disk refused; the pack is abandoned.
        """
        if self._unsynced()[1] < SYNC_AHEAD_BYTES:
            return
        with self._syncing:
            # Again, for another thread may just have done it.
            writer, size = self._unsynced()
            if writer is not None and size >= SYNC_AHEAD_BYTES:
                end = writer.end
                self._sync(writer)
                self._synced = (writer, end)

    def close_range(self) -> PackRange | None:
        """Make all that was appended durable; None when nothing was. After a failure the pack is abandoned."""
        with self._syncing:
            with self._appending, self._lock:
                writer = self._writer
                if writer is None or writer.end == writer.start:
                    return None
                try:
                    closed = writer.close_range()
                except BaseException:
                    self._spoil(writer)
                    raise
                self._ranges += 1
            # Others may append meanwhile: what they add belongs to the next range.
            self._sync(writer)
            self._synced = (writer, closed.end)
            return closed

    def committed(self) -> None:
        """The last range was named by a commit record: its blobs are now found through the addresses."""
        with self._lock:
            self.refresh()
            # What another thread has put since the range was closed waits for its own.
            name, start = ("", 0) if self._writer is None else (self._writer.name, self._writer.start)
            self._pending = {
                blob: (pack, at) for blob, (pack, at) in self._pending.items() if pack == name and at.offset >= start
            }

    def finish_if_large(self, *, always: bool = False) -> tuple[PackRange | PackFinished, ...]:
        """Give the writer's pack its footer once it is large, or of many ranges; the next write opens another.

        What other threads have appended meanwhile becomes a last range, which the same record must name.

        Args:
            always: however small it is, if it holds anything.
        """
        with self._syncing, self._appending, self._lock:
            writer = self._writer
            target = self.target_bytes or PACK_TARGET_BYTES
            if self._mirror is not None:
                target = min(target, self._mirror.pack_bytes)
            if writer is None or (not always and writer.end < target and self._ranges < PACK_RANGES_MAX):
                return ()
            try:
                last = self.close_range()
                ranges = [named for _, named in self._projection.pack_changes(0) if isinstance(named, PackRange)]
                ranges = [named for named in ranges if named.pack == writer.name] + ([last] if last else [])
                if not ranges:
                    # Nothing of it was ever committed: an orphan from now on.
                    writer.file.unlock()
                    self._retired.append(writer.file)
                    self._files.pop(writer.name, None)
                    self._writer = None
                    return ()
                if not contiguous(ranges, writer.end):
                    raise IntegrityError("the projection does not know every range of the pack", place=writer.name)
                rows = np.concatenate([read_index(writer.file, named) for named in ranges])
                finished = writer.finish(rows, [named.merkle_root for named in ranges])
            except BaseException:
                self._spoil(writer)
                raise
            # Its lock stays until a record has named its end: whoever got it before would write on where it ended.
            self._ended, self._writer, self._ranges = writer.file, None, 0
            return (finished,) if last is None else (last, finished)

    def finished(self) -> None:
        """A pack's end was committed: nobody writes on, and it may be copied to the cold tier."""
        self._let_go_of_ended()
        if self._mirror is not None:
            self._mirror.nudge()

    def _let_go_of_ended(self) -> None:
        with self._lock:
            if self._ended is not None:
                self._ended.unlock()
                self._ended = None

    def abandon(self) -> None:
        """Forget the writer's pack and what was appended but not committed (after a failed write or sync)."""
        with self._appending, self._lock:
            self._let_go_of_ended()
            if self._writer is not None:
                # Another thread may be reading through it: closed with the store.
                self._retired.append(self._writer.file)
                self._files.pop(self._writer.name, None)
                self._writer.file.unlock()
            self._writer, self._ranges, self._pending = None, 0, {}
            self._pages.clear()
            self._parsed.clear()
            self.leaves.clear()
            self.epoch += 1

    def refresh(self) -> None:
        """Learn what was committed since the last look: a finished pack from its footer, others range by range."""
        with self._lock:
            head, _ = self._projection.position()
            opening = not self._addresses_loaded
            if opening:
                self._addresses.load(head)
            changes = self._projection.pack_changes(self._addresses.position)
            self._learn_names()
            self._learn_released(head)
            self._learn_quarantined()
            for _, named in changes:
                self._addresses.add(self._numbers[named.pack], self._rows(named))
            # Only now: look-ups do not take the lock, and need the packs' names.
            self._addresses_loaded = True
            # What could not be read today may be restored tomorrow: a segment would not know of it.
            self._addresses.reached(head, keep=not self._salvaged, above=ADDRESS_KEPT_ROWS if opening else None)
            if self._addresses.damaged:
                self.forget_addresses()
                self.refresh()

    def mend(self, name: str) -> bool:
        """Put right what is here of a pack by parity or its cold copy; whether reading it again is worth while."""
        with suppress(StorageError):
            return self.mend_now(name)
        return False

    def mend_now(self, name: str) -> bool:
        """`mend`. Raises StorageError when the cold tier, which may have it right, does not answer, or the disk."""
        return self.mender.pack(name)

    def forget_addresses(self) -> None:
        """Drop the address index, segments included; the next look-up builds it from the packs' index records."""
        with self._lock:
            self._addresses.drop()
            self._addresses = AddressIndex(self.disk)
            self._addresses_loaded = self._addresses_sound = False
            self._released, self._condemned = 0, {}

    def close(self) -> None:
        """Release every file and lock; what the next opening would read from many index records is kept for it."""
        with self._lock:
            threads, self._threads = self._threads, None
        # Not under the lock: what still runs, for a caller that gave up, may ask for it.
        if threads is not None:
            threads.shutdown(cancel_futures=True)
        with self._lock:
            if not self._salvaged:
                self._addresses.flush(above=ADDRESS_KEPT_ROWS)
            for file in [*self._files.values(), *self._retired]:
                file.close()
            self._retired = []
            self._files, self._writer, self._pending = {}, None, {}

    # -- inner

    def _place(self, blob: BlobId) -> tuple[str, Location]:
        # Without the lock: what moves goes from the pending to the tail to a segment, and is looked for in that order.
        kept = self._pending.get(blob)
        if kept is not None:
            return kept
        found = self._addresses.find(blob) if self._addresses_loaded else None
        if found is None:
            with self._lock:
                if blob in self._pending:
                    return self._pending[blob]
                found = self._find(blob)
            if found is None:
                # In one of the packs that are gone, if any is.
                lost = ", ".join(self._names[number] for number in sorted(self._addresses.lost))
                raise IntegrityError(
                    "a blob that is referred to is missing", object=blob.hex(), place=lost or PACK_FOLDER
                )
        if found.pack >= len(self._names) or found.length > 2 * TILE_BYTES_MAX:
            # A damaged segment: whoever reads by it makes the index anew.
            raise IntegrityError("the address index leads nowhere", object=blob.hex(), place="cache/addresses")
        return self._names[found.pack], found

    def _find(self, blob: BlobId) -> Location | None:
        if not self._addresses_loaded:
            self.refresh()
        found = self._addresses.find(blob)
        if found is None and self._addresses.position < self._projection.position()[0]:
            self.refresh()
            found = self._addresses.find(blob)
        return found

    def _record(self, ref: Ref, digest: bool) -> Blob:
        blob = name_of(ref)
        return self._located(blob, partial(self._read, blob, ref, digest=digest))

    def _read(self, blob: BlobId, ref: Ref | None, name: str, at: Location, *, digest: bool = True) -> Blob:
        """A record; its content, or (with `ref` None) as it is stored."""
        buffer = self._buffers.take(at.length) if at.length >= BUFFER_FROM_BYTES else None
        place = f"{name} @ {at.offset}"

        def content(record: layout.Record) -> Blob:
            found = as_stored(record)
            return found if ref is None else opened(found, ref, place)

        try:
            # Of what is decrypted the tag proves every byte.
            digest = digest and not isinstance(ref, Secret)
            return content(read_record(self._file(name), name, at.offset, at.length, blob, buffer, digest=digest))
        except IntegrityError:
            size = at.length
            record = self.mender.record(
                blob, name, at.offset, size, lambda: read_record(self._file(name), name, at.offset, size, blob)
            )
            if record is None:
                raise
        return content(record)

    def _page(self, kind: int, ref: Ref) -> bytes:
        found = self.read(ref)
        # Its bytes are those of its name: a raw record is verified by its blob_id.
        if found.kind != kind or found.codec != codec.RAW:
            raise IntegrityError("a page's place holds something else", object=ref.hex(), place=self.place(ref))
        return bytes(found.stored)

    def _lent(self, blob: BlobId, name: str, at: Location) -> Blob:
        try:
            view = self.disk.view(name, at.offset, at.length)
            place = f"{name} @ {at.offset}"
            return opened(as_stored(layout.decode_record(view, place, blob)), blob, place)
        except IntegrityError:
            # Freed before its range was locked, or damaged: a copy of one's own then.
            return self._read(blob, blob, name, at)

    def _located(self, blob: BlobId, work: Callable[[str, Location], _R]) -> _R:
        try:
            return work(*self._place(blob))
        except IntegrityError:
            # Its pack may be gone since this store last looked, and the record lie in another.
            if not (self._caught_up() or self._mended()):
                return self._elsewhere(blob, work)
        try:
            return work(*self._place(blob))
        except IntegrityError:
            return self._elsewhere(blob, work)

    def _elsewhere(self, blob: BlobId, work: Callable[[str, Location], _R]) -> _R:
        """What nothing could heal goes into quarantine; another record of the blob serves, if there is one."""
        name, at = self._place(blob)
        try:
            return work(name, at)
        except IntegrityError as error:
            if at.pack < 0 or self._journal is None:
                raise
            self.mender.note("quarantined", name, at.offset, at.length, blob=blob.hex(), why=error.message)
            self._learn_quarantined()
            if self._place(blob) == (name, at):
                raise
        return work(*self._place(blob))

    def _learn_quarantined(self) -> None:
        if self._journal is not None:
            held = [key for key in self._journal.quarantined() if key[0] in self._numbers]
            self._addresses.bad = frozenset((self._numbers[name], offset) for name, offset in held if offset)
            # No record begins a pack: there it says that all of it is gone.
            self._addresses.lost = frozenset(self._numbers[name] for name, offset in held if not offset)

    def _caught_up(self) -> bool:
        """Learn what the projection knows already; whether that was anything."""
        with self._lock:
            if self._addresses.position >= self._projection.position()[0]:
                return False
            self.refresh()
            return True

    def _mended(self) -> bool:
        """Whether a damaged address index led astray; it is made anew (once: then its segments are our own)."""
        with self._lock:
            if self._addresses_sound or self._addresses.sound():
                self._addresses_sound = True
                return False
            self.forget_addresses()
            return True

    def _put(self, drafts: Sequence[Draft], *, again: bool = False) -> int:
        """Append the records whose blobs are not there yet (or all); how many."""
        with self._appending:
            new = {draft.blob_id: draft for draft in drafts}
            for blob, absent in zip(list(new), self.missing(list(new)), strict=True):
                if not absent and not again:
                    del new[blob]
            if not new:
                return 0
            writer = self._writer or self._open_writer()
            places = writer.append(list(new.values()))
            with self._lock:
                for draft, (offset, size) in zip(new.values(), places, strict=True):
                    self._pending[draft.blob_id] = (writer.name, Location(-1, offset, size, draft.delta_depth))
                    self.written_bytes += size
            return len(new)

    def missing(self, refs: Sequence[Ref]) -> list[bool]:
        """Whether each blob is in no pack that may be relied on."""
        blobs = [*map(name_of, refs)]
        with self._lock:
            if not self._addresses_loaded or self._addresses.position < self._projection.position()[0]:
                self.refresh()
            absent = self._addresses.missing(blobs)
            return [gone and blob not in self._pending for blob, gone in zip(blobs, absent, strict=True)]

    def _open_writer(self) -> PackWriter:
        """Begin a new pack."""
        while True:
            pack = self._rng.token(16)
            name = f"{PACK_FOLDER}/{pack.hex()}.pack"
            file = self.disk.open(name, create=True)
            # Whoever collects garbage may have taken it for an orphan before it was locked, and removed it.
            there = file.lock(wait=False) and name.removeprefix(f"{PACK_FOLDER}/") in self.disk.list(PACK_FOLDER)
            # Nor is one ever written over: randomness repeats where a machine is copied while it runs.
            if there and not file.size():
                break
            file.close()
        file.write_at(0, layout.encode_file_header(self.repository_id, pack))
        self.disk.sync_folder(PACK_FOLDER)
        self._files[name] = file
        self._writer = PackWriter(file, name, layout.FILE_HEADER_BYTES)
        return self._writer

    def _unsynced(self) -> tuple[PackWriter | None, int]:
        """The pack that is written to, and about how many of its bytes were never synced."""
        with self._lock:
            writer, (synced, end) = self._writer, self._synced
            return writer, 0 if writer is None else writer.end - (end if synced is writer else 0)

    def _sync(self, writer: PackWriter) -> None:
        """Sync the pack, one thread at a time: of two at once only one would be told of a failed write."""
        try:
            writer.file.sync()
        except BaseException:
            self._spoil(writer)
            raise

    def _spoil(self, writer: PackWriter) -> None:
        """After a failed sync nobody knows what the pack holds: this process never writes to it again."""
        self._spoiled.add(writer.name)
        self.abandon()

    def _rows(self, named: PackRange | PackFinished, *, salvage: bool = True) -> layout.Rows:
        """What a range or a finished pack holds; where its list is damaged, what the records say themselves."""
        if self._just_removed(named.pack):
            return layout.rows_of([])
        try:
            file = self._opened(named.pack)
        except IntegrityError:
            if self._just_removed(named.pack):
                return layout.rows_of([])
            if not salvage:
                raise
            self._salvaged = True
            return layout.rows_of([])  # Others can still be read, and what it held be put again.
        ranged = isinstance(named, PackRange)
        try:
            for left in reversed(range(MENDS_MAX)):
                try:
                    return read_index(file, named) if ranged else read_footer(file, named)
                except IntegrityError:
                    if self._just_removed(named.pack):
                        return layout.rows_of([])
                    # A list that is only away must not be taken for one that is lost.
                    if not left or not self.mend_now(named.pack):
                        if not salvage:
                            raise
                        break
            self._salvaged = True
            start, end = (named.start, named.end) if ranged else (layout.FILE_HEADER_BYTES, named.size)
            return walk_rows(file, named.pack, start, end)
        finally:
            # Not kept open: a repository may have more packs than a process may open files.
            file.close()

    def _just_removed(self, name: str) -> bool:
        """Whether another process was allowed to remove a pack, and has done so."""
        known = name in self._condemned or self._numbers.get(name) in self._addresses.removed
        return known and name.removeprefix(f"{PACK_FOLDER}/") not in self.disk.list(PACK_FOLDER)

    def _learn_released(self, head: int) -> None:
        """Which packs must not be relied on, and which are gone."""
        for name, condemned, removed in self._projection.released(self._released):
            number = self._numbers[name]
            if removed:
                self._condemned.pop(name, None)
                self._addresses.removed |= {number}
                # Closed once no thread reads from it any more.
                self._files.pop(name, None)
                if self._mirror is not None:
                    self._mirror.forget(name)
            else:
                self._condemned[name] = condemned
        self._addresses.condemned = frozenset(self._numbers[name] for name in self._condemned)
        self._released = head

    def _relied(self, ref: Ref) -> int:
        if not self.missing([ref])[0]:
            return sum(self._relied(part) for part in self.made_of(ref))
        try:
            found = self.read(ref)
            tile = codec.encode_payload(found.meta, self.payload(ref), self._assembly.hash_key(ref))
        except IntegrityError as error:
            raise BusyError(
                "what this batch shares was removed meanwhile", object=ref.hex(), fix="write the batch again"
            ) from error
        return self._put([self._assembly.whole(tile, found.origin)], again=True)

    def _header(self, blob: BlobId, name: str, at: Location) -> layout.RecordHeader:
        """A record's verified header; its payload is not read unless the header is damaged and has to be healed."""
        file, place = self._file(name), f"{name} @ {at.offset}"

        def look() -> layout.RecordHeader | None:
            data = file.read_at(at.offset, layout.RECORD_HEADER_BYTES)
            with suppress(IntegrityError):
                head = layout.decode_header(data, place)
                data = file.read_at(at.offset, layout.RECORD_HEADER_BYTES + head.meta_size)
                return head if layout.header_verifies(data) and head.blob_id == blob else None
            return None

        found = look()
        if found is None:
            self._read(blob, None, name, at)
            found = look()
        if found is None:
            raise IntegrityError("a record's header is damaged", object=blob.hex(), place=place)
        return found

    def _learn_names(self) -> None:
        """Packs are numbered by rank in the log; address segments, loaded ones too, hold these numbers."""
        for name in self._projection.packs(len(self._names)):
            self._numbers[name] = len(self._names)
            self._names.append(name)

    def _file(self, name: str) -> File:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._opened(name)
                self._files[name] = file
                if len(self._files) > OPEN_PACKS_MAX:
                    # Closed once no thread reads from it any more; the pack that is written to is held elsewhere too.
                    del self._files[next(iter(self._files))]
            return file

    def _opened(self, name: str) -> File:
        """A pack's file, made again if it is gone and parity can. Raises IntegrityError."""
        try:
            return self.disk.open(name)
        except NotFoundError as error:
            if self.mend(name):
                return self.disk.open(name)
            if self._journal is not None and name not in self._condemned:
                self.mender.note("quarantined", name, 0, 1, why="the pack is missing")
                self._learn_quarantined()
            raise IntegrityError("a pack is missing", place=name) from error
