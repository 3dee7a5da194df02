"""What a repository is to hold: plain dicts that know nothing of packs, pages or tiers.

The order of commits is the log's. Each record is checked against the call that wrote it (`Act`), and carried out on the
dicts; so a directory's hash comes to mean a content, and what is read under that hash is compared with it.
"""

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import STREAMS
from him.types import (
    AttributeSet,
    Batch,
    CommitRecord,
    DirectoryWrapped,
    Operation,
    PackCondemned,
    PackFinished,
    PackRange,
    PackRemoved,
    RefSet,
    RetentionSet,
    Sealed,
    SnapshotDropped,
    SnapshotOpened,
    SnapshotShredded,
    StreamDeclared,
    StreamSpec,
    TilesExpired,
    snapshot_bytes,
)

Array = NDArray[np.generic]
Place = tuple[int, int]
FrameName = tuple[str, str]
HOLD: Final = "hold"
_NS: Final = 1_000_000_000
_NS_PER_MS: Final = 1_000_000


class Violation(Exception):
    """What must not happen: the name of the check, and what was seen."""

    def __init__(self, check: str, seen: str) -> None:
        super().__init__(f"{check}: {seen}")
        self.check, self.seen = check, seen


class Value(NamedTuple):
    """A tile's dtype ("" for a document), shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def of(given: "Array | bytes") -> "Value":
        """Of what is put, or was read."""
        if isinstance(given, bytes):
            return Value("", (), given)
        return Value(given.dtype.name, given.shape, given.tobytes())

    def array(self) -> Array:
        """The values of a tile."""
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)


class Cell(NamedTuple):
    """What a cell holds, and which snapshot wrote it (16 bytes)."""

    value: Value
    origin: bytes


class FrameModel(NamedTuple):
    """A frame: its stream, extent in pixels (in cells for documents) and cells."""

    spec: StreamSpec
    height: int
    width: int
    cells: Mapping[Place, Cell]

    def key(self) -> bytes:
        """Equal for equal frames."""
        hasher = blake3(repr((self.spec.name, self.height, self.width)).encode())
        for place in sorted(self.cells):
            value, origin = self.cells[place]
            hasher.update(repr((place, value.dtype, value.shape, origin)).encode())
            hasher.update(value.data)
        return hasher.digest()


class Content:
    """What one directory holds; never changed."""

    def __init__(self, frames: Mapping[FrameName, FrameModel], keys: Mapping[FrameName, bytes]) -> None:
        self.frames = frames
        self._keys = keys
        self.key = blake3(repr(sorted(keys.items())).encode()).digest()

    def with_frame(self, name: FrameName, frame: FrameModel | None) -> "Content":
        """The same with another frame under a name; one without cells is none."""
        frames, keys = dict(self.frames), dict(self._keys)
        if frame is None or not frame.cells:
            frames.pop(name, None)
            keys.pop(name, None)
        else:
            frames[name], keys[name] = frame, frame.key()
        return Content(frames, keys)


EMPTY: Final = Content({}, {})


class Change(NamedTuple):
    """What a batch does to one frame: cells put or (None) deleted, with `replace` the whole of it, or one appended."""

    spec: StreamSpec
    frame: str
    """Its name; `{}` in it stands for the snapshot's id."""
    cells: Mapping[Place, Value | None]
    extent: tuple[int, int]
    """What the cells show of the frame; with `replace` what it is."""
    replace: bool = False
    append: Value | None = None

    def on(self, content: Content, base: Content, origin: bytes) -> Content:
        """The content after it.

        Args:
            base: that of the first parent at branching: a cell that is put as it was there keeps its origin.
        """
        name = (self.spec.name, self.frame)
        now, before = content.frames.get(name), base.frames.get(name)
        cells: dict[Place, Cell] = {} if now is None or self.replace else dict(now.cells)
        height, width = self.extent
        put = dict(self.cells)
        if self.append is not None:
            free = 0 if now is None else now.height
            put[free, 0] = self.append
            height, width = free + 1, 1
        if now is not None and not self.replace:
            height, width = max(height, now.height), max(width, now.width)
        for place, value in put.items():
            if value is None:
                cells.pop(place, None)
                continue
            theirs = None if before is None else before.cells.get(place)
            cells[place] = theirs if theirs is not None and theirs.value == value else Cell(value, origin)
        return content.with_frame(name, FrameModel(self.spec, height, width, cells))


class Act:
    """A workload call at work: what it may write to the log, and how it ended."""

    def __init__(self, number: int, kind: str) -> None:
        self.number, self.kind = number, kind
        self.changes: tuple[Change, ...] = ()
        """What its batch does."""
        self.branch = ""
        """Whose head it writes to."""
        self.wants: Callable[[Operation], bool] | None = None
        """Operations it may write, to the letter."""
        self.may: frozenset[type[Operation]] = frozenset()
        """Kinds of operations it may write beside."""
        self.seals = False
        self.written = 0
        """Records of it that were seen."""
        self.batches = 0
        self.ended = ""
        self.began = 0
        """The last record that was seen before it."""
        self.must = False
        """Whether success means that a record was written."""
        self.doubt = False
        """Whether what it failed to commit may be seen yet."""


_ALWAYS: Final = frozenset({PackRange, PackFinished})


class Snap:
    """A snapshot as it stands."""

    def __init__(self, opened: SnapshotOpened, seq: int) -> None:
        self.opened = opened
        self.directory = opened.directory
        self.sealed = False
        self.lamport = 0
        self.tags: dict[str, str] = {}
        self.versions: list[tuple[int, bytes]] = [(seq, opened.directory)]
        self.held_since = 0

    @property
    def origin(self) -> bytes:
        """The 16 bytes that its cells name."""
        return snapshot_bytes(self.opened.snapshot_id)

    def directory_at(self, seq: int) -> bytes:
        """As it stood after a record."""
        return next(directory for at, directory in reversed(self.versions) if at <= seq)

    def shown_since(self, seq: int) -> set[bytes]:
        """Its directories from a record on."""
        return {self.directory_at(max(seq, self.versions[0][0])), *(one for at, one in self.versions if at > seq)}


class Expired(NamedTuple):
    """A record that let tiles go."""

    seq: int
    stream: str
    before_ns: int
    origins: frozenset[bytes]

    def covers(self, stream: str, origin: bytes) -> bool:
        """Whether a tile is among them."""
        if stream != self.stream:
            return False
        made_ms = int.from_bytes(origin[:6], "big")
        return origin in self.origins if self.origins else made_ms < self.before_ns // _NS_PER_MS


class Contents:
    """Which content a directory's hash means, and the other way round, for all repositories together."""

    def __init__(self) -> None:
        self.by_directory: dict[bytes, Content] = {b"": EMPTY}
        self._directories: dict[bytes, bytes] = {EMPTY.key: b""}

    def note(self, directory: bytes, content: Content) -> None:
        """A directory holds a content: the same one whoever wrote it, and no other has that hash."""
        known = self.by_directory.setdefault(directory, content)
        if known.key != content.key:
            raise Violation("one directory for two contents", directory.hex())
        other = self._directories.setdefault(content.key, directory)
        if other != directory:
            raise Violation("two directories for one content", f"{other.hex()} and {directory.hex()}")


class Model:
    """One repository after so many records."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.seq = 0
        self.lamport = 0
        self.snapshots: dict[str, Snap] = {}
        self.refs: dict[str, tuple[str, str]] = {}
        self.streams: dict[str, StreamSpec] = {}
        self.retention: dict[tuple[str, str], int] = {}
        self.expired: list[Expired] = []
        self.heads: dict[str, set[str]] = {}
        """Every snapshot that a branch ever named."""
        self.removed_at: list[int] = []
        """Records that removed packs: prefixes before them may lack what they held."""

    def stream(self, name: str) -> StreamSpec | None:
        """A stream's declaration."""
        return STREAMS.get(name) or self.streams.get(name)

    def find(self, name: str) -> Snap | None:
        """What a ref or an id names."""
        named = self.refs.get(name)
        return self.snapshots.get(named[1] if named else name)

    def content(self, directory: bytes) -> Content:
        """What a directory holds."""
        found = self.contents.by_directory.get(directory)
        if found is None:
            raise Violation("a directory nobody committed", directory.hex())
        return found

    def gone(self, stream: str, origin: bytes) -> bool:
        """Whether retention has let a tile go."""
        return any(one.covers(stream, origin) for one in self.expired)

    def take(self, seq: int, record: CommitRecord, act: Act | None) -> None:
        """The next record. Raises Violation where the call that wrote it had no business to."""
        self.seq = seq
        for operation in record.operations:
            if act is not None:
                self._check(operation, act, record)
            self._apply(seq, operation, act)
        if act is not None:
            act.written += 1

    def _check(self, operation: Operation, act: Act, record: CommitRecord) -> None:
        kind = type(operation)
        if kind in _ALWAYS or kind in act.may or (act.wants is not None and act.wants(operation)):
            if isinstance(operation, TilesExpired):
                self._check_expiry(operation, record)
            return
        allowed = False
        match operation:
            case Batch():
                heads = self.heads.get(act.branch, set())
                allowed = bool(act.changes) and (operation.snapshot_id in heads or operation.snapshot_id == act.branch)
            case SnapshotOpened():
                allowed = bool(act.branch)
            case RefSet():
                allowed = operation.name == act.branch and operation.kind == "branch"
            case Sealed():
                allowed = act.seals
            case _:
                pass
        if not allowed:
            raise Violation("a record its call did not ask for", f"{operation} by {act.kind} #{act.number}")

    def _check_expiry(self, operation: TilesExpired, record: CommitRecord) -> None:
        rules = [ttl for (stream, _), ttl in self.retention.items() if stream == operation.stream and ttl > 0]
        rules += [spec.retention_days * 86_400 for spec in STREAMS.values() if spec.name == operation.stream]
        if not any(operation.before_ns <= record.time_ns - ttl * _NS + _NS for ttl in rules if ttl):
            raise Violation("tiles let go before their time", str(operation))

    def _apply(self, seq: int, operation: Operation, act: Act | None) -> None:
        match operation:
            case SnapshotOpened():
                self._open(seq, operation, act)
            case Batch():
                self._batch(seq, operation, act)
            case Sealed():
                snap = self.snapshots[operation.snapshot_id]
                sent = act is None or Sealed in act.may
                if snap.sealed or (operation.directory != snap.directory and not sent):
                    raise Violation("sealed twice, or as something else", str(operation))
                self.content(operation.directory)
                snap.sealed, snap.lamport, snap.directory = True, operation.lamport, operation.directory
                snap.versions.append((seq, operation.directory))
                self.lamport = max(self.lamport, operation.lamport)
            case RefSet(name=name, kind=kind, snapshot_id=target):
                if target:
                    self.refs[name] = (kind, target)
                    self.heads.setdefault(name, set()).add(target)
                else:
                    self.refs.pop(name, None)
            case AttributeSet():
                self._tag(seq, operation)
            case SnapshotDropped():
                if any(target == operation.snapshot_id for _, target in self.refs.values()):
                    raise Violation("a snapshot dropped that a name holds", operation.snapshot_id)
                self.snapshots.pop(operation.snapshot_id, None)
            case StreamDeclared():
                self.streams[operation.spec.name] = operation.spec
            case RetentionSet(stream=stream, task=task, ttl_s=ttl_s):
                if ttl_s < 0:
                    self.retention.pop((stream, task), None)
                else:
                    self.retention[stream, task] = ttl_s
            case TilesExpired():
                origins = frozenset(snapshot_bytes(one) for one in operation.origins)
                self.expired.append(Expired(seq, operation.stream, operation.before_ns, origins))
            case PackRemoved():
                self.removed_at.append(seq)
            case PackRange() | PackFinished() | PackCondemned() | DirectoryWrapped() | SnapshotShredded():
                pass

    def _open(self, seq: int, operation: SnapshotOpened, act: Act | None) -> None:
        if operation.snapshot_id in self.snapshots and act is not None:
            raise Violation("a snapshot opened twice", operation.snapshot_id)
        if act is not None and SnapshotOpened not in act.may:
            start = b""
            if operation.parents:
                parent = self.snapshots.get(operation.parents[0].snapshot_id)
                start = b"?" if parent is None else parent.directory
                if operation.parents[0].directory != start:
                    raise Violation("a child of what its parent was not", operation.snapshot_id)
            if operation.directory != start:
                raise Violation("a child that begins with something else", operation.snapshot_id)
        self.snapshots[operation.snapshot_id] = Snap(operation, seq)

    def _batch(self, seq: int, operation: Batch, act: Act | None) -> None:
        snap = self.snapshots.get(operation.snapshot_id)
        if snap is None or snap.sealed or snap.directory != operation.before:
            raise Violation("a batch on what was not there", str(operation))
        if act is not None:
            act.batches += 1
            content = after(self, snap, act.changes)
            self.contents.note(operation.directory, content)
        snap.directory = operation.directory
        snap.versions.append((seq, operation.directory))

    def _tag(self, seq: int, operation: AttributeSet) -> None:
        snap = self.snapshots.get(operation.snapshot_id)
        if snap is None:
            return
        if operation.value is None:
            snap.tags.pop(operation.key, None)
        else:
            snap.tags[operation.key] = operation.value
        if operation.key == HOLD:
            snap.held_since = seq if operation.value is not None else 0


def after(model: Model, snap: Snap, changes: tuple[Change, ...]) -> Content:
    """A snapshot's content once changes were made to it."""
    parents = snap.opened.parents
    base = model.content(parents[0].directory if parents else b"")
    content = model.content(snap.directory)
    for change in changes:
        named = change._replace(frame=change.frame.replace("{}", snap.opened.snapshot_id))
        content = named.on(content, base, snap.origin)
    return content


Halve = Callable[[Array], Array]


def halved(values: Array, rule: str) -> Array:
    """The next level of (h, w) integers, by the formulas of docs/FORMAT.md."""
    height, width = values.shape
    padded = np.pad(values, ((0, height % 2), (0, width % 2)), mode="edge")
    a, b, c, d = padded[::2, ::2], padded[::2, 1::2], padded[1::2, ::2], padded[1::2, 1::2]
    if rule == "mean":
        wide = sum(one.astype(np.int64) for one in (a, b, c, d)) + 2
        return np.asarray(wide >> 2).astype(values.dtype)
    four = np.stack([a, b, c, d])
    return {"max": four.max(axis=0), "min": four.min(axis=0), "first": a, "nearest": d}[rule]


def whole(frame: FrameModel) -> Array:
    """A frame's values at its extent; absent cells are zeros."""
    first = next(iter(frame.cells.values())).value
    found = np.zeros((frame.height, frame.width, *first.shape[2:]), dtype=first.dtype)
    for (row, column), cell in frame.cells.items():
        y, x = row * frame.spec.tile_height, column * frame.spec.tile_width
        values = cell.value.array()
        found[y : y + values.shape[0], x : x + values.shape[1]] = values
    return found


def level_tile(frame: FrameModel, level: int, y: int, x: int) -> Array | None:
    """A derived tile; None where no cell lies below it."""
    if not any((row >> level, column >> level) == (y, x) for row, column in frame.cells):
        return None
    values = whole(frame)
    for _ in range(level):
        values = halved(values, frame.spec.level_rule)
    high, wide = frame.spec.tile_height, frame.spec.tile_width
    return values[y * high : (y + 1) * high, x * wide : (x + 1) * wide]
