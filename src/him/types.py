"""The frozen values every room of the house speaks in; no behaviour beyond naming and conversion."""

import unicodedata
from typing import Final, NamedTuple, NewType, SupportsIndex
from urllib.parse import quote

import msgspec
from blake3 import blake3

from him.errors import UsageError

BlobId = NewType("BlobId", bytes)
"""32 bytes: identity of content, and what a record is called on the outside."""


class Secret(bytes):
    """32 bytes that name encrypted content and open it: who has them can read all that it reaches (design/015-keys.md).

    Shown, they are the blob_id they lead to; msgspec refuses to write them, so that none gets out by accident.
    """

    __slots__ = ()

    @property
    def blob_id(self) -> BlobId:
        """What the content is called on the outside."""
        return BlobId(blake3(self).digest())

    def hex(self, sep: str | bytes = "", bytes_per_sep: SupportsIndex = 1) -> str:
        """The digits of the blob_id."""
        return self.blob_id.hex(sep, bytes_per_sep) if sep else self.blob_id.hex()

    def __repr__(self) -> str:
        return f"<secret of {self.hex()}>"

    __str__ = __repr__


Ref = BlobId | Secret
"""What a page or directory holds of what lies below: a blob_id, or the secret of what is encrypted."""
TileId = NewType("TileId", bytes)
"""32 bytes: identity of content at a place in a snapshot."""
SnapshotId = NewType("SnapshotId", str)
"""`snp_` and 26 Crockford base-32 digits (a ULID: 48 bits of milliseconds, 80 random bits)."""

SNAPSHOT_PREFIX: Final = "snp_"
TILE_PREFIX: Final = "tl_"
TRACE_PREFIX: Final = "tr_"
MALFORMED: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError)
"""What decoding raises of bytes that are no value of a type: no such members, text that is not UTF-8, arrays within
arrays without end, and integers that cannot be written again."""
_CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ULID_LENGTH: Final = 26
_NAME_BYTES_MAX: Final = 255


def ref_of(raw: bytes) -> Ref:
    """Bytes that are a reference already, as one."""
    return raw if isinstance(raw, Secret) else BlobId(raw)


def name_of(ref: Ref) -> BlobId:
    """What a reference's content is called on the outside."""
    return ref.blob_id if isinstance(ref, Secret) else ref


def ulid_text(value: bytes) -> str:
    """26 Crockford digits of a 16-byte ULID."""
    number = int.from_bytes(value, "big")
    return "".join(_CROCKFORD[(number >> (5 * i)) & 31] for i in reversed(range(_ULID_LENGTH)))


def snapshot_id(value: bytes) -> SnapshotId:
    """Text form of a 16-byte snapshot id."""
    return SnapshotId(SNAPSHOT_PREFIX + ulid_text(value))


def snapshot_bytes(text: str) -> bytes:
    """The 16 bytes behind a snapshot id.

    Raises:
        UsageError: `text` is no snapshot id.
    """
    digits = text.removeprefix(SNAPSHOT_PREFIX)
    if not text.startswith(SNAPSHOT_PREFIX) or len(digits) != _ULID_LENGTH:
        raise UsageError(f"not a snapshot id: {text!r}")
    number = 0
    for digit in digits:
        value = _CROCKFORD.find(digit)
        if value < 0:
            raise UsageError(f"not a snapshot id: {text!r}")
        number = number * 32 + value
    if number >> 128:
        raise UsageError(f"not a snapshot id: {text!r}")
    return number.to_bytes(16, "big")


def tile_id_text(value: bytes) -> str:
    """`tl_` and 64 hex digits."""
    return TILE_PREFIX + value.hex()


def checked_name(name: str, *, what: str) -> str:
    """`name` in NFC if it may name a stream or a frame (design §2).

    Raises:
        UsageError: longer than 255 bytes, control characters, or (for a stream) empty or with a `:`.
    """
    name = unicodedata.normalize("NFC", name)
    if len(name.encode()) > _NAME_BYTES_MAX:
        raise UsageError(f"{what} name is longer than {_NAME_BYTES_MAX} bytes: {name[:40]!r}…")
    if any(unicodedata.category(c) == "Cc" for c in name):
        raise UsageError(f"{what} name has control characters: {name!r}")
    if what == "stream" and (not name or ":" in name):
        raise UsageError(f"a stream's name is not empty and has no ':': {name!r}")
    return name


def stream_frame_text(stream: str, frame: str) -> str:
    """The wire form `stream:frame`, percent-encoded; the plain stream name for the frame ""."""
    head = quote(stream, safe="")
    return f"{head}:{quote(frame, safe='')}" if frame else head


class Box(NamedTuple):
    """A rectangle in pixels of level 0 of its frame; `x`, `y` are its left upper corner."""

    x: int
    y: int
    w: int
    h: int

    @property
    def centre(self) -> tuple[int, int]:
        """(x, y) of the middle, rounded down."""
        return self.x + self.w // 2, self.y + self.h // 2

    @property
    def area(self) -> int:
        """Pixels covered."""
        return self.w * self.h

    def intersection(self, other: "Box") -> "Box":
        """The common part; zero width or height when there is none."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        right, low = min(self.x + self.w, other.x + other.w), min(self.y + self.h, other.y + other.h)
        return Box(x, y, max(0, right - x), max(0, low - y))

    def union(self, other: "Box") -> "Box":
        """The smallest box around both."""
        x, y = min(self.x, other.x), min(self.y, other.y)
        right, low = max(self.x + self.w, other.x + other.w), max(self.y + self.h, other.y + other.h)
        return Box(x, y, right - x, low - y)

    def contains_point(self, x: int, y: int) -> bool:
        """Whether the pixel (x, y) lies inside."""
        return self.x <= x < self.x + self.w and self.y <= y < self.y + self.h

    def grown(self, margin: int) -> "Box":
        """The box with `margin` pixels added on each side, cut at zero."""
        x, y = max(0, self.x - margin), max(0, self.y - margin)
        return Box(x, y, self.x + self.w + margin - x, self.y + self.h + margin - y)


class TileKey(NamedTuple):
    """A place in a snapshot: stream, frame, level (0 = full resolution), row y and column x in tiles."""

    stream: str
    frame: str
    level: int
    y: int
    x: int

    def __str__(self) -> str:
        return f"{stream_frame_text(self.stream, self.frame)} L{self.level} ({self.x},{self.y})"


class Entry(NamedTuple):
    """What a level-0 cell holds: which content, and which snapshot wrote it (16 bytes)."""

    ref: Ref
    origin: bytes


class StreamSpec(msgspec.Struct, frozen=True):
    """A declared stream (design §6): how its new frames are cut, typed, compressed and merged.

    `tile_height` × `tile_width` pixels a tile; `dtype` "" takes the array's own; `quantise` is one of
    "", "int8", "fp8", "fp16"; `level_rule` one of "none", "mean", "max", "min", "first", "nearest", "min-max";
    `content` "array" or "bytes"; `retention_days` 0 keeps for ever. With `encrypted` new frames are
    (docs/design/015-keys.md).
    """

    name: str
    content: str = "array"
    tile_height: int = 512
    tile_width: int = 512
    dtype: str = ""
    quantise: str = ""
    halo: int = 0
    level_rule: str = "none"
    merge_policy: str = "lww"
    merge_unit: str = "cell"
    retention_days: int = 0
    encrypted: bool | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if not self.encrypted:
            # One way to say so, which is written as it was before there was anything else to say.
            msgspec.structs.force_setattr(self, "encrypted", msgspec.UNSET)


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """A frame's record in a snapshot's directory.

    `height` × `width` is the extent in level-0 pixels (cells for `content` "bytes"); `root` is the hash of
    the root page (empty when no tile is present), `root_height` how many pages stand below it. `attributes` are sorted
    pairs that bind the frame to what made it (a KV cache's tensor shape; model digests later). Of an `encrypted` frame
    all pages and tiles are, and `root` is a Secret.
    """

    stream: str
    name: str
    content: str
    height: int
    width: int
    channels: int
    dtype: str
    tile_height: int
    tile_width: int
    halo: int
    level_rule: str
    root: bytes
    root_height: int
    attributes: tuple[tuple[str, str], ...] = ()
    encrypted: bool = False

    def ref(self, raw: bytes) -> Ref:
        """What 32 bytes in one of its pages refer to."""
        return Secret(raw) if self.encrypted else BlobId(raw)

    @property
    def rows(self) -> int:
        """Tile rows at level 0."""
        return -(-self.height // self.tile_height)

    @property
    def columns(self) -> int:
        """Tile columns at level 0."""
        return -(-self.width // self.tile_width)

    def __str__(self) -> str:
        return stream_frame_text(self.stream, self.name)


class Parent(msgspec.Struct, frozen=True, array_like=True):
    """An edge of the snapshot DAG; `directory` is the parent's at branching, the later merge base."""

    snapshot_id: SnapshotId
    directory: bytes
    merge_policy: str = "lww"


class HashKey(NamedTuple):
    """What a repository's secrets are made with: 32 bytes, and the id by which records name it (16 bytes)."""

    key_id: bytes
    key: bytes


class KeyEntry(msgspec.Struct, frozen=True, array_like=True):
    """A key of the key ring, and what it is for.

    `purpose` is "open" (the directory of an open snapshot), "sealed" (of a sealed one), "base" (of the parent `of` at
    branching) or "trace" (the trace `of`).
    """

    key_id: bytes
    key: bytes
    purpose: str
    snapshot_id: SnapshotId
    of: str = ""


class Wrap(msgspec.Struct, frozen=True, array_like=True):
    """The secret of an encrypted directory (its blob_id), readable with a key of the key ring: nonce, secret, tag."""

    directory: bytes
    key_id: bytes
    wrapped: bytes


class Snapshot(msgspec.Struct, frozen=True):
    """A node of the history DAG (spec §2.1). `created_at` is nanoseconds since 1970 from the Clock port.

    `wraps` are of its directory, and of its parents' at branching, as far as these are encrypted.
    """

    snapshot_id: SnapshotId
    parents: tuple[Parent, ...]
    created_at: int
    writer: str
    directory: bytes
    sealed: bool = False
    lamport: int = 0
    levels_root: bytes = b""
    signature: bytes = b""
    tags: dict[str, str] = {}
    provenance: dict[str, str] = {}
    merge_policy: str = "lww"
    wraps: tuple[Wrap, ...] = ()

    def moved(self, directory: bytes) -> "Snapshot":
        """With another directory; what opened the one before is forgotten."""
        needed = {directory, *(parent.directory for parent in self.parents)}
        wraps = tuple(one for one in self.wraps if one.directory in needed)
        return msgspec.structs.replace(self, directory=directory, wraps=wraps)

    def opened_by(self, wrap: Wrap) -> "Snapshot":
        """With a wrap, in place of one of the same directory."""
        others = tuple(one for one in self.wraps if one.directory != wrap.directory)
        return msgspec.structs.replace(self, wraps=(*others, wrap))


class SnapshotOpened(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="snapshot"):
    """A new open snapshot; `directory` is the first parent's at branching (or the empty one)."""

    snapshot_id: SnapshotId
    parents: tuple[Parent, ...]
    created_at: int
    writer: str
    directory: bytes
    merge_policy: str
    provenance: dict[str, str]

    def snapshot(self) -> Snapshot:
        """The snapshot as it stands when it was just opened."""
        return Snapshot(
            self.snapshot_id, self.parents, self.created_at, self.writer, self.directory,
            provenance=self.provenance, merge_policy=self.merge_policy,
        )  # fmt: skip


class Batch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="batch"):
    """A durable batch: `directory` replaces `before` as the open snapshot's directory."""

    snapshot_id: SnapshotId
    before: bytes
    directory: bytes


class PackRange(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="range"):
    """Bytes of a pack that became part of the repository; `index_offset` is its range's index record."""

    pack: str
    start: int
    index_offset: int
    end: int
    merkle_root: bytes


class PackFinished(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="finished"):
    """A pack got its footer and will not grow; parity groups are made of such packs."""

    pack: str
    size: int
    merkle_root: bytes


class Sealed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="seal"):
    """The end of writing to a snapshot. `signature` and `key_id` are empty while sealing is unsigned."""

    snapshot_id: SnapshotId
    directory: bytes
    levels_root: bytes
    lamport: int
    key_id: bytes = b""
    signature: bytes = b""

    def fields(self) -> dict[str, object]:
        """What sealing sets in the snapshot."""
        return {
            "sealed": True, "directory": self.directory, "levels_root": self.levels_root,
            "lamport": self.lamport, "signature": self.signature,
        }  # fmt: skip


class RefSet(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ref"):
    """A branch or tag now names a snapshot; an empty `snapshot_id` removes the name."""

    name: str
    kind: str
    snapshot_id: str


class AttributeSet(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="attribute"):
    """A key-value pair on a snapshot; None removes it."""

    snapshot_id: SnapshotId
    key: str
    value: str | None
    signature: bytes = b""


class SnapshotDropped(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="drop"):
    """A snapshot is no longer listed or kept; what only it reached becomes garbage."""

    snapshot_id: SnapshotId


class StreamDeclared(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="stream"):
    """A stream beside the built-in ones."""

    spec: StreamSpec


class PackCondemned(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="condemned"):
    """A pack that will be removed: from this record on no commit may rely on what it holds.

    What is still referred to was copied to other packs, in this record's or earlier ranges.
    """

    pack: str


class PackRemoved(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="removed"):
    """Nobody reads a condemned pack any more; its file goes. Its number is not given to another."""

    pack: str


class RetentionSet(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="retention"):
    """How long a stream's tiles are kept: those of snapshots whose attribute `task_id` is `task`, or ("") all others.

    `ttl_s` 0 keeps for ever; a negative one takes the rule back.
    """

    stream: str
    task: str
    ttl_s: int


class TilesExpired(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="expired"):
    """Tiles of a stream that retention lets go: those a snapshot opened before a time wrote (ns), or these snapshots.

    Directories that name them stay what they are. `signature` and `key_id` are empty while expiry is unsigned.
    """

    stream: str
    before_ns: int
    origins: tuple[SnapshotId, ...] = ()
    key_id: bytes = b""
    signature: bytes = b""


class DirectoryWrapped(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="wrap"):
    """What opens a directory of a snapshot: its present one, or a parent's at branching."""

    snapshot_id: SnapshotId
    wrap: Wrap


class SnapshotShredded(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="shred"):
    """A snapshot was dropped, and the keys that opened it are destroyed."""

    snapshot_id: SnapshotId


Operation = (
    SnapshotOpened
    | Batch
    | PackRange
    | PackFinished
    | Sealed
    | RefSet
    | AttributeSet
    | SnapshotDropped
    | StreamDeclared
    | PackCondemned
    | PackRemoved
    | RetentionSet
    | TilesExpired
    | DirectoryWrapped
    | SnapshotShredded
)


class CommitRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One record of the commit log: operations that become true together."""

    time_ns: int
    writer: str
    operations: tuple[Operation, ...]


class PackState(msgspec.Struct, frozen=True, array_like=True):
    """What the log says of a pack.

    `seq` is the record that last added to it; `ranges` are [seq, range] in order while it grows. Once it is finished
    its footer lists what they held, and they are dropped. `condemned` and `removed` are the records that said so (0:
    none did).
    """

    name: str
    seq: int
    ranges: tuple[tuple[int, PackRange], ...] = ()
    finished: PackFinished | None = None
    condemned: int = 0
    removed: int = 0


class LiveState(msgspec.Struct, frozen=True, array_like=True):
    """All that the log's records up to `seq` leave standing; the body of a checkpoint.

    `snapshots` are [seq of the record that opened it, snapshot with its tags], oldest first; `refs` [name, kind,
    snapshot id] and `streams` by name; `packs` in the order of their first appearance, which numbers them; `retention`
    [stream, task, seconds] and `expired` [stream, snapshot id or "", ns] sorted; `shredded` are ids, sorted.
    """

    seq: int = 0
    hash: bytes = bytes(32)
    lamport: int = 0
    snapshots: tuple[tuple[int, Snapshot], ...] = ()
    refs: tuple[tuple[str, str, str], ...] = ()
    streams: tuple[StreamSpec, ...] = ()
    packs: tuple[PackState, ...] = ()
    retention: tuple[tuple[str, str, int], ...] = ()
    expired: tuple[tuple[str, str, int], ...] = ()
    shredded: tuple[SnapshotId, ...] = ()


class TileMeta(msgspec.Struct, frozen=True):
    """What is known of a tile without its values (spec §2.1)."""

    tile_id: str
    stream: str
    frame: str
    snapshot_id: str
    level: int
    x: int
    y: int
    shape: tuple[int, ...]
    dtype: str
    parent_tile_id: str | None
    halo: int
    checksum: str
    size_bytes: int


class TextLine(msgspec.Struct, frozen=True, array_like=True):
    """A line of text read from pixels; `confidence` in 0…1."""

    box: Box
    text: str
    confidence: float


class WidgetBox(msgspec.Struct, frozen=True, array_like=True):
    """A rectangle that looks like a control; `kind` one of "button", "field", "check", "radio", "icon", "panel"."""

    box: Box
    kind: str
    confidence: float


class Node(msgspec.Struct, frozen=True):
    """An element of a screen (spec §4.1). `source` is "tree", "ocr", "widget" or "fused"."""

    id: str
    type: str
    text: str
    bbox: Box
    state: dict[str, str | bool | int | float | None] = {}
    confidence: float = 1.0
    source: str = "ocr"


class Edge(msgspec.Struct, frozen=True, rename={"source": "from", "target": "to"}):
    """A relation between two nodes: `rel` is "contains", "labels" or "row"."""

    source: str
    target: str
    rel: str


class Scene(msgspec.Struct, frozen=True):
    """What was seen on one frame: the payload of the `scene` stream, one canonical JSON document.

    `tiles` are [row, column, blob_id hex] of every tile it was read from, in row-major order; `pins` name the
    digests of the models and rules that read it (`reader`, `widgets`, `tree`, `rules`).
    """

    version: int
    width: int
    height: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    confidence: float
    tiles: tuple[tuple[int, int, str], ...] = ()
    pins: dict[str, str] = {}


class TreeNode(msgspec.Struct, frozen=True):
    """A node of an accessibility tree handed in beside a picture; `bbox` in picture pixels."""

    id: str
    role: str
    bbox: Box
    name: str = ""
    parent: str | None = None
    state: dict[str, str | bool | int | float | None] = {}


class PlannedTile(msgspec.Struct, frozen=True):
    """A tile a plan wants read: its id and its key (an id cannot be inverted)."""

    tile_id: str
    stream: str
    frame: str
    level: int
    x: int
    y: int

    @property
    def key(self) -> TileKey:
        """The place to read."""
        return TileKey(self.stream, self.frame, self.level, self.y, self.x)


class Candidate(msgspec.Struct, frozen=True):
    """An element that may be the answer; `confidence` is the calibrated probability that its box is right."""

    bbox: Box
    frame: str
    text: str
    type: str
    confidence: float


class QueryPlan(msgspec.Struct, frozen=True):
    """What a query will read and why it may stop (spec §2.2).

    `directory` is the hex hash the ids were resolved on; `coarse` the ≤ 3 cells [frame, level, y, x, score] the
    scan chose; `rois` the regions of interest [frame, box] best first; `acceptance` the probability to reach.
    """

    goal: str
    snapshot_id: str
    directory: str
    frame: str | None
    tiles: tuple[PlannedTile, ...]
    coarse: tuple[tuple[str, int, int, int, int], ...]
    rois: tuple[tuple[str, Box], ...]
    acceptance: float
    budget_ms: int

    @property
    def tile_ids(self) -> list[str]:
        """The planned ids in reading order."""
        return [tile.tile_id for tile in self.tiles]


class Hint(msgspec.Struct, frozen=True):
    """A wish that tiles be warm soon (spec §1.4)."""

    query_id: str
    snapshot_id: str
    stream: str
    level_range: tuple[int, int]
    bboxes: tuple[Box, ...]
    confidence: float


class Fault(msgspec.Struct, frozen=True):
    """One finding of fsck: which object, where, what is wrong, what to do, and of which kind it is.

    `kind` is one of "marker", "log", "checkpoint", "pack", "list" (what lists records, or stands between them),
    "record", "tile", "ref", "parity", "cache", "tier", "lease", "trace", "file" and "version" (only newer software can
    read it).
    """

    object: str
    place: str
    fault: str
    fix: str
    kind: str = ""
