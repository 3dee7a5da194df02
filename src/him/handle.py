"""One snapshot as its users hold it: what is written to it, read from it and compared with it."""

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.catalog.history import History
from him.catalog.lease import Lease
from him.catalog.reader import CRITICAL, SnapshotReader
from him.config import BUDGET_MS, IMAGE_FILE_BYTES_MAX, PIN_MINUTES
from him.errors import BusyError, LimitError, NotFoundError, UsageError
from him.ingest import Ingest, IngestReport, MakeBeside
from him.ports import Clock, Memo, PictureDecoder, Progress
from him.pyramid import diff, directory, levels
from him.query import Answer
from him.tier.mirror import Mirror, TierStatus
from him.tier.warm import WarmStore
from him.tile import delta
from him.tile.address import tile_id
from him.tile.delta import ClientDelta
from him.types import Entry, Frame, Snapshot, SnapshotId, TileKey, TileMeta, TreeNode, snapshot_id, tile_id_text

Array = NDArray[np.generic]


class Parts(NamedTuple):
    """The rooms of one repository that a snapshot's user reaches."""

    store: WarmStore
    memo: Memo
    history: History
    ingest: Ingest
    decoder: PictureDecoder
    query: Callable[..., Answer]


class TierHandle:
    """What is here and what is only in the cold tier, and how to move it."""

    def __init__(self, mirror: Mirror, store: WarmStore, memo: Memo, history: History, clock: Clock) -> None:
        self._mirror, self._store, self._memo, self._history, self._clock = mirror, store, memo, history, clock

    def status(self) -> TierStatus:
        """Figures of this moment."""
        return self._mirror.status()

    def push(self, progress: Progress | None = None, *, all: bool = False) -> int:
        """Copy to the cold tier, and read back, every finished pack it does not hold; how many there were.

        Args:
            all: end the packs that are being written first, so that a restore from the cold tier has everything.

        Raises:
            UnavailableError, StorageError, IntegrityError: what was copied until then stays copied.
            BusyError: with `all`, another process writes to a pack; the rest was copied.
        """
        growing = self._history.finish_packs() if all else []
        copied = self._mirror.push_all(progress)
        if growing:
            fix = "push again once the other process has ended"
            raise BusyError("another process writes to a pack, which was not copied", place=growing[0], fix=fix)
        return copied

    def demote(self, keep_bytes: int = 0) -> int:
        """Free what is used least until the packs take at most `keep_bytes`; what is only here stays. Bytes freed."""
        return self._mirror.demote(keep_bytes)

    def admit(self, snapshot: str, stream: str, frame: str) -> bool:
        """Have a frame's tiles here; False when the budget has no room for all of them.

        Raises:
            NotFoundError: no such frame.
            UnavailableError: the cold tier gave no answer lately; it is then left to those who wait for what they read.
        """
        return self._mirror.prefetch(self._places(snapshot, stream, frame))

    def pin(self, snapshot: str, stream: str, frame: str, minutes: float = PIN_MINUTES) -> int:
        """Keep a frame's tiles from being freed for a while; extents pinned. Raises NotFoundError."""
        return self._mirror.pin(self._places(snapshot, stream, frame), self._clock.now_ns() + int(minutes * 60e9))

    def unpin(self, snapshot: str, stream: str, frame: str) -> None:
        """Take that back. Raises NotFoundError."""
        self._mirror.unpin(self._places(snapshot, stream, frame))

    def _places(self, snapshot: str, stream: str, frame: str) -> list[tuple[str, int, int]]:
        reader = SnapshotReader(self._store, self._memo, self._history.snapshot(snapshot).directory)
        return self._store.places(reader.present(key).ref for key in reader.keys(stream, frame))


class SnapshotHandle:
    """One snapshot as it stood when the handle was made; writing moves the handle to what it wrote."""

    def __init__(self, parts: Parts, info: Snapshot, lease: Lease) -> None:
        self.parts = parts
        """The rooms behind it, for the modules of HIM that stand above this one."""
        self._lease = lease
        self.info = info
        self._read: SnapshotReader | None = None

    @property
    def id(self) -> SnapshotId:
        """The snapshot's id."""
        return self.info.snapshot_id

    # -- writing

    def put(
        self, stream: str, value: Array | bytes, *, frame: str = "", level: int = 0, y: int = 0, x: int = 0
    ) -> TileMeta:
        """Put one tile (an array) or document (bytes). Raises UsageError, SealedError."""
        if level != 0:
            raise UsageError("tiles are put at level 0", fix="declare a level rule for the stream: levels follow")
        self.info = self.parts.ingest.tiles(self.id, stream, frame, {(y, x): value})
        return self.reader.meta(TileKey(stream, frame, 0, y, x))

    def put_delta(
        self, stream: str, change: ClientDelta | bytes, *, frame: str = "", y: int = 0, x: int = 0
    ) -> TileMeta:
        """Put the tile that a delta makes of the one that is there (spec §2.2).

        Raises:
            ConflictError: another tile is there by now.
            UsageError, LimitError, IntegrityError: a delta that does not fit or leads elsewhere than it says.
        """
        given = delta.unpack(change) if isinstance(change, bytes) else change
        self.info = self.parts.ingest.delta(self.id, stream, frame, (y, x), given)
        return self.reader.meta(TileKey(stream, frame, 0, y, x))

    def make_delta(self, stream: str, value: Array | bytes, *, frame: str = "", y: int = 0, x: int = 0) -> bytes | None:
        """The delta that makes `value` of the tile that is there, packed; None where it saves too little."""
        made = self.parts.ingest.make_delta(self.id, stream, frame, (y, x), value)
        return None if made is None else msgspec.msgpack.encode(made)

    def put_many(self, stream: str, cells: Mapping[tuple[int, int], Array | bytes | None], *, frame: str = "") -> None:
        """Put (or, with None, delete) several cells (row, column) in one commit."""
        self.info = self.parts.ingest.tiles(self.id, stream, frame, cells)

    def put_array(
        self, stream: str, array: Array, *, frame: str = "", beside: MakeBeside | None = None
    ) -> IngestReport:
        """Replace a frame by an array of 1–3 dimensions, or a KV tensor (layers, 2, heads, tokens, dim).

        Args:
            beside: makes documents that are committed with it (`ingest.Beside`).
        """
        return self._moved(self.parts.ingest.array(self.id, stream, frame, array, beside=beside))

    def put_image(
        self,
        image: NDArray[np.uint8] | str | os.PathLike[str],
        frame: str,
        *,
        tree: Sequence[TreeNode] | None = None,
        progress: Progress | None = None,
    ) -> IngestReport:
        """Replace a screen by a picture, (h, w, 3) uint8 RGB or a file, with all that it shows."""
        if not isinstance(image, np.ndarray):
            image = self.parts.decoder.decode(read_limited(Path(image), IMAGE_FILE_BYTES_MAX), str(image))
        return self._moved(self.parts.ingest.picture(self.id, frame, image, tree=tree, progress=progress))

    def append(self, stream: str, rows: Sequence[object], *, writer: str = "main") -> str:
        """Append rows (JSON values) to a log stream; the name of the frame they went to."""
        self.info, frame = self.parts.ingest.append(self.id, stream, rows, writer=writer)
        return frame

    def seal(self) -> Snapshot:
        """End writing: levels are computed, the Lamport time is set. Sealing twice is no change."""
        self.info = self.parts.history.seal(self.id)
        return self.info

    def set_tag(self, key: str, value: str | None) -> None:
        """Set (or, with None, remove) an attribute such as task_id, owner, semantic_summary."""
        self.parts.history.set_attribute(self.id, key, value)
        self.info, self._read = self.parts.history.snapshot(self.id), None

    # -- reading

    def get(self, stream: str, *, frame: str = "", level: int = 0, y: int = 0, x: int = 0) -> Array | bytes:
        """Verified values of a tile; a document's bytes. Raises NotFoundError, IntegrityError."""
        return self.reader.tile(TileKey(stream, frame, level, y, x))

    def array(self, stream: str, *, frame: str = "") -> Array:
        """A frame's whole array; absent tiles are zeros."""
        return self.reader.array(stream, frame)

    def get_many(
        self, stream: str, cells: Sequence[tuple[int, int]], *, frame: str = "", level: int = 0
    ) -> list[Array | bytes]:
        """Verified values of several tiles (row, column), in the order asked for; read on several threads.

        Raises:
            NotFoundError, IntegrityError: for the first that fails.
        """
        return self.reader.tiles([TileKey(stream, frame, level, y, x) for y, x in cells])

    @contextmanager
    def view(self, stream: str, *, frame: str = "", level: int = 0, y: int = 0, x: int = 0) -> Generator[Array | bytes]:
        """A tile without copying, read-only and verified, for the length of a `with` block.

        What is stored compressed or quantised is a copy. Keep no reference to the array beyond the block: while one
        lives the tile's place in its pack stays mapped and cannot be evicted.
        """
        with self.reader.view(TileKey(stream, frame, level, y, x)) as values:
            yield values

    def frames(self, stream: str | None = None) -> list[Frame]:
        """Frames (of one stream), sorted."""
        return self.reader.frames(stream)

    def tiles(self, stream: str, *, frame: str = "", level: int = 0) -> Iterator[TileMeta]:
        """Present tiles of a frame at a level, row by row within a page."""
        reader = self.reader
        if level == 0:
            for key in reader.keys(stream, frame):
                yield reader.meta(key)
            return
        record = reader.frame(stream, frame)
        for y in range(-(-record.rows >> level)):
            for x in range(-(-record.columns >> level)):
                entry = reader.entry(TileKey(stream, frame, level, y, x))
                if entry is not None:
                    yield self._derived(record, TileKey(stream, frame, level, y, x), entry)

    def query(self, goal: str, *, frame: str | None = None, budget_ms: int = BUDGET_MS) -> Answer:
        """Answer a goal on this snapshot; see `Repository.query`."""
        return self.parts.query(goal, self.id, frame=frame, budget_ms=budget_ms)

    def diff(self, other: "SnapshotHandle") -> Iterator[dict[str, object]]:
        """What differs from this snapshot to `other`, tile by tile; only differing pages are read."""
        store = self.parts.store
        for was, now in directory.diff(store, self.info.directory, other.info.directory):
            frame = now or was
            if frame is None:
                continue
            old, old_height = (was.root, was.root_height) if was else (b"", 0)
            new, new_height = (now.root, now.root_height) if now else (b"", 0)
            for row, column, before, after in diff.cells(store, old, old_height, new, new_height):
                change = "added" if before is None else "removed" if after is None else "changed"
                yield {
                    "stream": frame.stream, "frame": frame.name, "level": 0, "x": column, "y": row, "change": change,
                }  # fmt: skip

    @property
    def reader(self) -> SnapshotReader:
        """The reader of the present directory, kept while that stays: it remembers the frames it found."""
        if self._read is None or self._read.directory != self.info.directory:
            critical = CRITICAL in self.info.tags
            self._read = SnapshotReader(self.parts.store, self.parts.memo, self.info.directory, critical=critical)
        return self._read

    def _derived(self, frame: Frame, key: TileKey, entry: Entry) -> TileMeta:
        """What is known of a derived tile, which need not be stored; then it takes no place."""
        store = self.parts.store
        return TileMeta(
            tile_id_text(tile_id(key, entry.origin, entry.ref)), key.stream, key.frame,
            snapshot_id(entry.origin), key.level, key.x, key.y, levels.shape_at(frame, key.level, key.y, key.x),
            frame.dtype, None, frame.halo, entry.ref.hex(),
            store.size_of(entry.ref) if store.has(entry.ref) else 0,
        )  # fmt: skip

    def _moved(self, report: IngestReport) -> IngestReport:
        self.info = self.parts.history.snapshot(self.id)
        return report


def read_limited(file: Path, limit: int) -> bytes:
    """The bytes of a file from outside.

    Raises:
        NotFoundError: it is not there.
        LimitError: longer than `limit` bytes.
        UsageError: it cannot be read.
    """
    try:
        if file.stat().st_size > limit:
            raise LimitError(f"the file holds {file.stat().st_size} bytes; at most {limit}", object=str(file))
        return file.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file: {file}", object=str(file), fix="check the path") from error
    except OSError as error:
        raise UsageError(f"the file cannot be read ({error.strerror})", object=str(file)) from error
