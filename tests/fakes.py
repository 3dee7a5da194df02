"""Ports for tests: a clock and randomness that repeat, disks that fail on purpose, seeing and meaning without models.

A "picture" here is white with rectangles of plain colour, and the colour is the word: `FakeReader` reads it back.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from him.adapters.sqlite import SqliteProjection
from him.catalog.fsck import Fsck, FsckReport
from him.catalog.history import History
from him.catalog.log import FileLog
from him.catalog.marker import MARKER, Marker
from him.catalog.reader import SnapshotReader
from him.config import EMBEDDING_DIMS, PLAIN_FORMAT
from him.errors import NotFoundError, UnavailableError
from him.ingest import Ingest
from him.pack.galois import product
from him.ports import Disk
from him.sim.disk import Faults as Faults
from him.sim.disk import FileData
from him.sim.disk import MemDisk as MemDisk
from him.sim.disk import MemFile as MemFile
from him.sim.disk import PowerLoss as PowerLoss
from him.tier.care import Journal
from him.tier.mirror import Mirror
from him.tier.protect import Parity, Shape
from him.tier.scrub import put_right
from him.tier.settings import TIER, TierSettings
from him.tier.warm import WarmStore
from him.tile import codec
from him.tile.address import blob_id
from him.tile.codec import EncodedTile
from him.types import BlobId

Array = NDArray[np.generic]
T = TypeVar("T")
WORDS = ("Submit", "Cancel", "Settings", "Password", "Email", "Delete", "Profile", "Search", "Upload", "Help")


class FakeClock:
    """Every reading is a millisecond later than the one before."""

    def __init__(self, start_ns: int = 1_700_000_000_000_000_000) -> None:
        self.now = start_ns

    def now_ns(self) -> int:
        self.now += 1_000_000
        return self.now

    def monotonic_ns(self) -> int:
        return self.now_ns()


class FakeRng:
    """The same bytes for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._count = 0

    def token(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_128(f"{self._seed}:{self._count}".encode()).digest(size)


class DictMemo:
    """`ports.Memo` in a dict."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, bytes], bytes] = {}

    def get(self, kind: str, key: bytes) -> bytes | None:
        return self.items.get((kind, key))

    def put(self, kind: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        self.items.update({(kind, key): value for key, value in items})

    def close(self) -> None:
        pass


class CountingStore:
    """A LevelStore in dicts that counts what passes."""

    def __init__(self) -> None:
        self.pages: dict[bytes, tuple[int, bytes]] = {}
        self.tiles: dict[bytes, EncodedTile] = {}
        self.loaded: list[bytes] = []
        self.put: list[bytes] = []
        self.tiles_put = 0
        self.tiles_read = 0

    def reset(self) -> None:
        self.loaded, self.put, self.tiles_put, self.tiles_read = [], [], 0, 0

    def has(self, blob: BlobId) -> bool:
        return blob in self.pages or blob in self.tiles

    def page(self, kind: int, blob: BlobId) -> bytes:
        self.loaded.append(blob)
        own, payload = self.pages[blob]
        assert own == kind
        return payload

    @property
    def hash_key(self) -> bytes:
        raise AssertionError("nothing here is encrypted")

    def put_page(self, kind: int, payload: bytes, *, encrypted: bool = False) -> BlobId:
        assert not encrypted
        blob = blob_id(kind, b"", payload)
        self.pages[blob] = (kind, payload)
        self.put.append(blob)
        return blob

    def parsed(self, kind: int, blob: bytes, parse: Callable[[bytes], T]) -> T:
        return parse(self.page(kind, BlobId(blob)))

    def put_pages(self, kind: int, payloads: Sequence[bytes], *, encrypted: bool = False) -> list[BlobId]:
        return [self.put_page(kind, payload, encrypted=encrypted) for payload in payloads]

    def put_tile(self, tile: EncodedTile, origin: bytes) -> bool:
        self.tiles_put += 1
        new = tile.ref not in self.tiles
        self.tiles[tile.ref] = tile
        return new

    def read_tile(self, blob: BlobId) -> Array | bytes:
        self.tiles_read += 1
        tile = self.tiles[blob]
        return codec.decode(tile.header, tile.codec, tile.stored)


# -- seeing and meaning without models


def colour_of(word: str) -> tuple[int, int, int]:
    """The colour that spells a word of WORDS."""
    number = WORDS.index(word) + 1
    return 10 * number, 250 - 20 * number, 5 * number


def picture(
    height: int, width: int, texts: Mapping[tuple[int, int], str], noise: int | None = None
) -> NDArray[np.uint8]:
    """(h, w, 3) white with a 90×24 box of the word's colour at each (y, x)."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    if noise is not None:
        pixels[-1, :, 0] = np.random.default_rng(noise).integers(240, 255, width)
    for (y, x), word in texts.items():
        pixels[y : y + 24, x : x + 90] = colour_of(word)
    return pixels


class FakeReader:
    """`ports.TextReader`: finds rectangles of dark colour, reads the word their colour spells; counts its work."""

    def __init__(self, pin: str = "fake-reader-1") -> None:
        self._pin = pin
        self.detections = 0
        self.recognitions = 0

    def pin(self) -> str:
        return hashlib.sha256(self._pin.encode()).hexdigest()

    def detect(self, picture: NDArray[np.uint8]) -> list[list[tuple[int, int]]]:
        self.detections += 1
        ink = (picture.min(axis=2) < 128).astype(np.uint8)
        count, _, stats, _ = cv2.connectedComponentsWithStats(ink)
        boxes = sorted((int(y), int(x), int(w), int(h)) for x, y, w, h, _ in stats[1:count])
        return [[(x, y), (x + w - 1, y), (x + w - 1, y + h - 1), (x, y + h - 1)] for y, x, w, h in boxes]

    def recognise(self, crops: Sequence[NDArray[np.uint8]]) -> list[tuple[str, float]]:
        self.recognitions += len(crops)
        return [self._word(crop) for crop in crops]

    def _word(self, crop: NDArray[np.uint8]) -> tuple[str, float]:
        for word in WORDS:
            if (crop == np.array(colour_of(word), dtype=np.uint8)).all(axis=2).mean() > 0.3:
                return word, 0.99
        return "", 0.0


class FakeEncoder:
    """`ports.TextEncoder`: texts that share words get near vectors."""

    def __init__(self, pin: str = "fake-encoder-1") -> None:
        self._pin = pin
        self.encoded = 0

    def pin(self) -> str:
        return hashlib.sha256(self._pin.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> NDArray[np.int8]:
        self.encoded += len(texts)
        out = np.zeros((len(texts), EMBEDDING_DIMS), dtype=np.int8)
        for row, text in enumerate(texts):
            total = np.zeros(EMBEDDING_DIMS)
            for word in text.casefold().replace(",", " ").split():
                seed = int.from_bytes(hashlib.sha256(f"{self._pin}{word}".encode()).digest()[:4], "big")
                total += np.random.default_rng(seed).standard_normal(EMBEDDING_DIMS)
            length = float(np.sqrt((total * total).sum())) or 1.0
            out[row] = np.clip(np.rint(total / length * 127), -127, 127).astype(np.int8)
        return out


# -- disks


class FaultsAt(Faults):
    """Fails the first operation of a kind ("sync log/000001.log"; the path may be cut short)."""

    def __init__(self, operation: str, mode: str = "late") -> None:
        super().__init__(None, mode)
        self._operation = operation

    def run(self, kind: str, path: str, whole: Callable[[], None], part: Callable[[], None] | None = None) -> None:
        if self.at is None and f"{kind} {path}".startswith(self._operation):
            self.at = self.count + 1
        super().run(kind, path, whole, part)


class MemObjects:
    """`ports.ObjectStore` in a dict that counts requests and can be told to fail, or to keep other bytes."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, int, int]] = []
        self.down = False
        self.spoil: Callable[[bytes], bytes] = bytes

    def _answer(self, name: str) -> bytes:
        if self.down:
            raise UnavailableError("the store answers 503", place=name)
        if name not in self.objects:
            raise NotFoundError("no such object", place=name)
        return self.objects[name]

    def size(self, name: str) -> int | None:
        try:
            return len(self._answer(name))
        except NotFoundError:
            return None

    def get(self, name: str, limit: int) -> bytes:
        assert len(self._answer(name)) <= limit
        return self._answer(name)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        data = self._answer(name)
        assert all(offset + size <= len(data) for offset, size in ranges)
        self.requests += [(name, offset, size) for offset, size in ranges]
        return [memoryview(data)[offset : offset + size] for offset, size in ranges]

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        if self.size(name) is not None and if_absent:
            return False
        self.objects[name] = bytes(data)
        return True

    def upload(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        self.size(name)
        self.objects[name] = self.spoil(b"".join(parts))

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return iter(sorted((name, len(data)) for name, data in self.objects.items() if name.startswith(prefix)))

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.objects.pop(name, None)


# -- a repository without `app`


REPOSITORY_ID = bytes(range(16))


def _furnish(disk: Disk, *, tiered: bool) -> None:
    """Put the files there that `app` keeps; a simulated disk does not count that as an operation."""
    files = {MARKER: Marker(PLAIN_FORMAT, REPOSITORY_ID.hex(), 0).encoded()}
    if tiered:
        files[TIER] = TierSettings("test", 1).encoded()
    for path, data in files.items():
        if isinstance(disk, MemDisk):
            disk.files.setdefault(path, FileData(data, named=True))
        elif path not in disk.list(""):
            disk.write_whole(path, data)


class Stack:
    """The storage rooms put together over any Disk; projection and memo in memory."""

    def __init__(
        self,
        disk: Disk,
        *,
        clock: FakeClock | None = None,
        rng: FakeRng | None = None,
        writer: str = "test:1",
        mirror: Mirror | None = None,
        parity: Shape | None = None,
    ) -> None:
        self.disk = disk
        self.clock, self.rng = clock or FakeClock(), rng or FakeRng()
        _furnish(disk, tiered=mirror is not None)
        self.log = FileLog(disk)
        self.projection = SqliteProjection(None)
        self.memo = DictMemo()
        self.journal = Journal(disk, self.clock)
        self.parity = Parity(
            mirror or disk, product, REPOSITORY_ID, lambda: self.history.finished_packs(), self.journal, shape=parity,
            write=mirror.put_back if mirror else None,
        )  # fmt: skip
        self.store = WarmStore(
            disk, self.projection, self.rng, REPOSITORY_ID, mirror, journal=self.journal, parity=self.parity
        )
        self.history = History(self.log, self.projection, self.store, self.memo, self.clock, self.rng, writer)
        self.history.refresh()
        if mirror is not None:
            mirror.watch(
                self.history.finished_packs, self.log.published, lambda finished: put_right(self.store, finished)
            )
        self.reader, self.encoder = FakeReader(), FakeEncoder()
        self.ingest = Ingest(self.history, self.store, self.memo, self.clock, self.reader, self.encoder)

    def close(self) -> None:
        self.store.close()
        self.journal.close()
        self.history.leases.close()
        self.log.close()
        self.projection.close()

    def at(self, name: str) -> SnapshotReader:
        return SnapshotReader(self.store, self.memo, self.history.snapshot(name).directory)

    def fsck(self) -> FsckReport:
        return Fsck(self.history, self.projection, self.store).run()

    def content(self) -> dict[str, object]:
        """Everything a user could see, by value: names, attributes, and each snapshot's frames with all their bytes."""
        seen: dict[str, object] = {f"ref {name}": value for name, value in self.history.refs().items()}
        for one in self.history.snapshots():
            seen[one.snapshot_id] = (one.sealed, one.lamport, tuple(sorted(one.tags.items())), one.parents)
            reader = SnapshotReader(self.store, self.memo, one.directory)
            for frame in reader.frames():
                cells = {key: _value(reader.tile(key)) for key in reader.keys(frame.stream, frame.name)}
                seen[f"{one.snapshot_id} {frame}"] = (frame.height, frame.width, cells)
        return seen


class Announcing(deque[object]):
    """A deque that tells when something was appended."""

    def __init__(self, told: threading.Semaphore) -> None:
        super().__init__()
        self._told = told

    def append(self, item: object) -> None:
        super().append(item)
        self._told.release()


def together(stack: Stack, writes: Sequence[Callable[[], object]]) -> list[BaseException | None]:
    """Run each write in a thread of its own so that those that come so far are committed as one group; their errors.

    They queue in the order given, whatever the machine does: the first to arrive waits before the log until the
    others have queued, or failed before that. The first must put something new.
    """
    arrived, everyone = threading.Semaphore(0), threading.Event()
    errors: list[BaseException | None] = [None] * len(writes)
    commit, queue = stack.log.commit, stack.history._queue
    queue._waiting = Announcing(arrived)

    def gated(build: Callable[[], bytes | None]) -> int:
        if len(queue):
            everyone.wait()
        return commit(build)

    def run(number: int) -> None:
        try:
            writes[number]()
        except BaseException as error:  # noqa: BLE001 - told to the caller
            errors[number] = error
        finally:
            arrived.release()

    stack.log.commit = gated
    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(writes))]
    for thread in threads:
        thread.start()
        arrived.acquire()
    everyone.set()
    for thread in threads:
        thread.join()
    del stack.log.commit
    return errors


def _value(found: Array | bytes) -> object:
    return found if isinstance(found, bytes) else (found.dtype.name, found.shape, found.tobytes())


def new_disk(faults: Faults | None = None) -> MemDisk:
    """An empty repository in memory."""
    disk = MemDisk()
    FileLog.create(disk)
    disk.sync_folder("packs")
    disk.faults = faults or Faults()
    return disk


def flip(path: Path, offset: int, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def chunks(items: Sequence[object], sizes: Iterable[int]) -> Iterator[list[object]]:
    """The items in runs of the given sizes, the rest last."""
    at = 0
    for size in sizes:
        if at >= len(items):
            return
        yield list(items[at : at + size])
        at += size
    if at < len(items):
        yield list(items[at:])
