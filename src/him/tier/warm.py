"""The warm tier: blobs in local packs, every read verified, every write appended to this process's own pack."""

import threading
from collections import OrderedDict
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.config import PACK_TARGET_BYTES, PAGE_CACHE_PAGES
from him.errors import BusyError, IntegrityError, NotFoundError
from him.pack import format as layout
from him.pack.file import PackWriter, read_index, read_record
from him.ports import Disk, File, Projection, Rng
from him.tier.address import AddressIndex, Location
from him.tile import codec
from him.tile.address import KIND_TILE, blob_id
from him.types import BlobId, PackFinished, PackRange

PACK_FOLDER: Final = "packs"


class Blob(msgspec.Struct, frozen=True):
    """A verified record's content: its kind, header bytes and stored (perhaps compressed) payload."""

    kind: int
    codec: int
    meta: bytes
    stored: bytes


class WarmStore:
    """Reads and writes blobs of one repository.

    Reading verifies the record's digest and its full blob_id (rule 1). Writing goes to a pack this process holds the
    lock of; what was appended becomes visible to others with the commit record that names its range.
    """

    def __init__(self, disk: Disk, projection: Projection, rng: Rng, repository_id: bytes) -> None:
        self._disk = disk
        self._projection = projection
        self._rng = rng
        self._repository_id = repository_id
        self._files: dict[str, File] = {}
        self._retired: list[File] = []
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._addresses = AddressIndex(disk)
        self._addresses_loaded = False
        self._pending: dict[bytes, tuple[str, Location]] = {}
        self._writer: PackWriter | None = None
        self._spoiled: set[str] = set()
        self._pages: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.RLock()
        self.written_bytes = 0
        """Bytes appended to packs since the store was opened."""
        self.written_pages = 0
        """Pages and directory nodes among them."""
        self.epoch = 0
        """Grows when appended blobs are forgotten: a batch that spans such a moment must not commit."""

    # -- reading

    def has(self, blob: BlobId) -> bool:
        """Whether the blob is committed or was appended by this process."""
        with self._lock:
            return blob in self._pending or self._find(blob) is not None

    def read(self, blob: BlobId) -> Blob:
        """The verified blob.

        Raises:
            IntegrityError: missing though something refers to it, or damaged; names the place.
        """
        name, at = self._place(blob)
        record = read_record(self._file(name), name, at.offset, at.length, blob)
        if record.header.delta_depth or any(record.header.key_id):
            raise IntegrityError("the record needs a feature this version lacks", object=blob.hex(), place=name)
        return Blob(record.header.kind, record.header.codec, record.meta, record.stored)

    def read_tile(self, blob: BlobId) -> NDArray[np.generic] | bytes:
        """Decoded values of a tile (owned, read-only), or a document's bytes. Raises IntegrityError."""
        found = self.read(blob)
        if found.kind != KIND_TILE:
            raise IntegrityError("a tile's place holds something else", object=blob.hex())
        try:
            return codec.decode(found.meta, found.codec, found.stored)
        except IntegrityError as error:
            raise IntegrityError(error.message, object=blob.hex(), place=self.place(blob)) from error

    def page(self, kind: int, blob: BlobId) -> bytes:
        """Payload of a page, directory node or companion, from a cache of verified copies when possible."""
        with self._lock:
            cached = self._pages.get(blob)
            if cached is not None:
                self._pages.move_to_end(blob)
                return cached
        found = self.read(blob)
        if found.kind != kind or found.codec != codec.RAW or blob_id(kind, found.meta, found.stored) != blob:
            raise IntegrityError("a page's place holds something else", object=blob.hex(), place=self.place(blob))
        self._remember(blob, found.stored)
        return found.stored

    def place(self, blob: BlobId) -> str:
        """`packs/NAME @ offset` for messages; "nowhere" when unknown."""
        try:
            name, at = self._place(blob)
        except IntegrityError:
            return "nowhere"
        return f"{name} @ {at.offset}"

    def size_of(self, blob: BlobId) -> int:
        """Bytes the blob's record takes on disk."""
        return self._place(blob)[1].length

    # -- writing

    def put_tile(self, tile: codec.EncodedTile, origin: bytes) -> bool:
        """Store an encoded tile unless it is there; True when bytes were written."""
        return self._put(KIND_TILE, tile.codec, tile.blob_id, tile.header, tile.stored, tile.raw_size, origin)

    def put_page(self, kind: int, payload: bytes, meta: bytes = b"") -> BlobId:
        """Store a page, directory node or companion unless it is there; its hash."""
        blob = blob_id(kind, meta, payload)
        self.written_pages += self._put(kind, codec.RAW, blob, meta, payload, len(payload), bytes(16))
        self._remember(blob, payload)
        return blob

    @property
    def writing(self) -> bool:
        """Whether this process holds a pack to append to."""
        return self._writer is not None

    def continue_pack(self) -> None:
        """Take up an unfinished pack that nobody holds, if there is one.

        Only under the log's lock, with the projection at its head: a range that was committed after an older view
        would be cut off.
        """
        with self._lock:
            if self._writer is not None:
                return
            ends = {named.pack: named.end for _, named in self._projection.ranges(0)}
            for name in sorted(ends.keys() - self._projection.finished_packs().keys() - self._spoiled):
                try:
                    file = self._disk.open(name)
                except NotFoundError:
                    continue
                if not file.lock(wait=False):
                    file.close()
                    continue
                if file.size() > ends[name]:
                    # Whatever lies beyond the last committed range was left by a process that died.
                    file.truncate(ends[name])
                if name in self._files:
                    # Another thread may be reading through it: closed with the store.
                    self._retired.append(self._files[name])
                self._files[name] = file
                self._writer = PackWriter(file, name, ends[name])
                return

    def close_range(self) -> PackRange | None:
        """Make all that was appended durable; None when nothing was. After a failure the pack is abandoned."""
        with self._lock:
            if self._writer is None or not self._pending:
                return None
            try:
                return self._writer.close_range()
            except BaseException:
                # After a failed sync nobody knows what the pack holds: this process never writes to it again.
                self._spoiled.add(self._writer.name)
                self.abandon()
                raise

    def committed(self) -> None:
        """The last range was named by a commit record: its blobs are now found through the addresses."""
        with self._lock:
            self.refresh()
            # What another thread has put since the range was closed waits for its own.
            find = self._addresses.find
            self._pending = {blob: at for blob, at in self._pending.items() if find(BlobId(blob)) is None}

    def finish_if_large(self) -> PackFinished | None:
        """Give the writer's pack its footer once it is large; the next write opens another."""
        with self._lock:
            writer = self._writer
            if writer is None or self._pending or writer.end < PACK_TARGET_BYTES:
                return None
            ranges = [named for _, named in self._projection.ranges(0) if named.pack == writer.name]
            rows = [row for named in ranges for row in read_index(writer.file, named)]
            try:
                finished = writer.finish(rows, [named.merkle_root for named in ranges])
            except BaseException:
                self._spoiled.add(writer.name)
                raise
            finally:
                writer.file.unlock()
                self._writer = None
            return finished

    def abandon(self) -> None:
        """Forget the writer's pack and what was appended but not committed (after a failed write or sync)."""
        with self._lock:
            if self._writer is not None:
                # Another thread may be reading through it: closed with the store.
                self._retired.append(self._writer.file)
                self._files.pop(self._writer.name, None)
                self._writer.file.unlock()
            self._writer, self._pending = None, {}
            self._pages.clear()
            self.epoch += 1

    def refresh(self) -> None:
        """Learn the ranges committed since the last look."""
        with self._lock:
            since = self._addresses.position
            if not self._addresses_loaded:
                self._addresses.load(self._projection.position()[0])
                self._addresses_loaded, since = True, 0
            for seq, named in self._projection.ranges(since):
                # Numbers go by the pack's rank in the log, so those behind the loaded segments are counted too.
                number = self._number(named.pack)
                if seq > self._addresses.position:
                    self._addresses.add(seq, number, read_index(self._file(named.pack), named))
            self._addresses.flush()

    def forget_addresses(self) -> None:
        """Drop the address index, segments included; the next look-up builds it from the packs' index records."""
        with self._lock:
            self._addresses.drop()
            self._addresses = AddressIndex(self._disk)
            self._addresses_loaded = False

    def close(self) -> None:
        """Release every file and lock."""
        with self._lock:
            for file in [*self._files.values(), *self._retired]:
                file.close()
            self._retired = []
            self._files, self._writer, self._pending = {}, None, {}

    # -- inner

    def _place(self, blob: BlobId) -> tuple[str, Location]:
        with self._lock:
            if blob in self._pending:
                return self._pending[blob]
            found = self._find(blob)
            if found is None:
                raise IntegrityError("a blob that is referred to is missing", object=blob.hex(), place=PACK_FOLDER)
            return self._names[found.pack], found

    def _find(self, blob: BlobId) -> Location | None:
        if not self._addresses_loaded:
            self.refresh()
        found = self._addresses.find(blob)
        if found is None and self._addresses.position < self._projection.position()[0]:
            self.refresh()
            found = self._addresses.find(blob)
        return found

    def _put(
        self, kind: int, codec_id: int, blob: BlobId, meta: bytes, stored: bytes, raw_size: int, origin: bytes
    ) -> bool:
        with self._lock:
            if self.has(blob):
                return False
            writer = self._writer or self._open_writer()
            offset, size = writer.append(kind, codec_id, blob, meta, stored, raw_size, origin)
            self._pending[blob] = (writer.name, Location(-1, offset, size, kind))
            self.written_bytes += size
            return True

    def _open_writer(self) -> PackWriter:
        """Begin a new pack."""
        pack = self._rng.token(16)
        name = f"{PACK_FOLDER}/{pack.hex()}.pack"
        file = self._disk.open(name, create=True)
        if not file.lock(wait=False):
            raise BusyError("a new pack is held by another process", place=name)
        file.write_at(0, layout.encode_file_header(self._repository_id, pack))
        self._disk.sync_folder(PACK_FOLDER)
        self._files[name] = file
        self._writer = PackWriter(file, name, layout.FILE_HEADER_BYTES)
        return self._writer

    def _number(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self._names)
            self._names.append(name)
        return number

    def _file(self, name: str) -> File:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                try:
                    file = self._disk.open(name)
                except NotFoundError as error:
                    raise IntegrityError("a pack is missing", place=name) from error
                self._files[name] = file
            return file

    def _remember(self, blob: BlobId, payload: bytes) -> None:
        with self._lock:
            self._pages[blob] = payload
            if len(self._pages) > PAGE_CACHE_PAGES:
                self._pages.popitem(last=False)
