"""What a repository holds and what it saves: bytes by stream and tier, sharing, compression and deltas."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.catalog.history import History
from him.config import EXTENT_BYTES
from him.pack import format as layout
from him.ports import Progress, Projection
from him.pyramid import directory, page, update
from him.tier.warm import WarmStore
from him.tile import codec
from him.tile.address import KIND_NAMES, KIND_TILE, prefixes
from him.types import Frame, PackState, name_of

_Scalar = TypeVar("_Scalar", bound=np.generic)


class StreamStats(msgspec.Struct, frozen=True):
    """What one stream takes. Tiles are those of level 0; what is shared counts once but in `logical_bytes`."""

    stream: str
    frames: int
    """Of all snapshots together, one of the same content once."""
    tiles: int
    """Cells of all snapshots, in each that has them."""
    logical_bytes: int
    """What all snapshots would take as plain arrays and documents."""
    distinct_tiles: int
    raw_bytes: int
    """Of the distinct tiles, as plain arrays and documents."""
    stored_bytes: int
    """Of their records."""
    deltas: int
    delta_raw_bytes: int
    delta_stored_bytes: int
    warm_bytes: int
    """Of the records, what is on this disk."""
    cold_bytes: int
    """Of the records, what the cold tier holds."""

    @property
    def sharing(self) -> float:
        """How many times the distinct tiles are used, by bytes."""
        return self.logical_bytes / self.raw_bytes if self.raw_bytes else 1.0

    @property
    def compression(self) -> float:
        """Plain bytes to stored ones, of the distinct tiles."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0

    @property
    def delta_gain(self) -> float:
        """Plain bytes to stored ones, of those stored as changes of others."""
        return self.delta_raw_bytes / self.delta_stored_bytes if self.delta_stored_bytes else 1.0


class Stats(msgspec.Struct, frozen=True):
    """What the whole repository takes."""

    streams: tuple[StreamStats, ...]
    snapshots: int
    packs: int
    pack_bytes: int
    """The size of all packs, wherever their bytes are."""
    page_bytes: int
    """Of records of pages, directories and levels' companions."""
    other_bytes: int
    """Of the packs: derived levels, chunks, bases of deltas, indexes, and what nothing refers to."""
    condemned_packs: int

    def as_json(self) -> dict[str, object]:
        """The object documented in docs/CLI_JSON.md."""
        value: dict[str, object] = msgspec.to_builtins(self)
        value["streams"] = [
            {
                **msgspec.to_builtins(one),
                "sharing": round(one.sharing, 3),
                "compression": round(one.compression, 3),
                "delta_gain": round(one.delta_gain, 3),
            }
            for one in self.streams
        ]
        return value


class _Records(NamedTuple):
    """The record by which each blob is found, sorted by name: (n) each."""

    names: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    depths: NDArray[np.uint8]
    warm: NDArray[np.bool_]
    cold: NDArray[np.bool_]


class _Tally:
    """What is met of one stream."""

    def __init__(self) -> None:
        self.frames: set[bytes] = set()
        self.tiles = self.logical = 0
        self.names: list[NDArray[np.uint64]] = []
        self.sizes: list[NDArray[np.int64]] = []


def measure(history: History, projection: Projection, store: WarmStore, progress: Progress) -> Stats:
    """Walk every snapshot; each page is read once. Raises IntegrityError."""
    with history.lease():
        history.refresh()
        state = projection.state()
        packs = [pack for pack in state.packs if not pack.removed]
        rows = {pack.name: history.pack_rows(pack) for pack in packs}
        records = _records(store, rows)
        tallies: dict[str, _Tally] = {}
        counted: dict[tuple[str, bytes, int, int], tuple[int, int]] = {}
        for number, (_, found) in enumerate(state.snapshots):
            progress(number, len(state.snapshots), "snapshots")
            for frame in directory.scan(store, history.opened(found).directory):
                _count(store, frame, tallies.setdefault(frame.stream, _Tally()), counted)
        streams = tuple(_stream(name, tallies[name], records) for name in sorted(tallies))
        kinds = np.concatenate([held["kind"] for held in rows.values()]) if rows else np.zeros(0, np.uint8)
        lengths = np.concatenate([held["length"] for held in rows.values()]) if rows else np.zeros(0, np.uint64)
        page_bytes = int(lengths[np.isin(kinds, [kind for kind in KIND_NAMES if kind != KIND_TILE])].sum())
        sizes = [_end(pack) for pack in packs]
    return Stats(
        streams, len(state.snapshots), len(packs), sum(sizes), page_bytes,
        sum(sizes) - page_bytes - sum(one.stored_bytes for one in streams),
        sum(1 for pack in packs if pack.condemned),
    )  # fmt: skip


def _end(pack: PackState) -> int:
    if pack.finished is not None:
        return pack.finished.size
    return pack.ranges[-1][1].end if pack.ranges else 0


def _records(store: WarmStore, rows: dict[str, layout.Rows]) -> _Records:
    """Of each blob the record that is found: the least deep, then the newest."""
    names = [prefixes(held["blob"]) for held in rows.values()]
    warm, cold = list[NDArray[np.bool_]](), list[NDArray[np.bool_]]()
    for name, held in rows.items():
        here = store.resident(name)
        cold.append(np.full(len(held), here is not None))
        warm.append(np.ones(len(held), np.bool_) if here is None else _all_here(here, held))
    every = _Records(
        _joined(names, np.uint64), _joined([held["length"].astype(np.int64) for held in rows.values()], np.int64),
        _joined([held["depth"] for held in rows.values()], np.uint8), _joined(warm, np.bool_), _joined(cold, np.bool_),
    )  # fmt: skip
    order = np.lexsort((-np.arange(len(every.names)), every.depths, every.names))
    first = order[np.flatnonzero(np.diff(every.names[order], prepend=~every.names[order][:1]))]
    return _Records(every.names[first], every.lengths[first], every.depths[first], every.warm[first], every.cold[first])


def _all_here(here: NDArray[np.bool_], held: layout.Rows) -> NDArray[np.bool_]:
    """Which records lie whole in extents that are on this disk."""
    absent = np.concatenate([[0], np.cumsum(~here)])
    begin = held["offset"] // EXTENT_BYTES
    end = -(-(held["offset"] + held["length"]).astype(np.int64) // EXTENT_BYTES)
    return absent[end] == absent[begin.astype(np.int64)]


def _count(
    store: WarmStore, frame: Frame, tally: _Tally, counted: dict[tuple[str, bytes, int, int], tuple[int, int]]
) -> None:
    """Add a frame of a snapshot; what it holds is looked at once, however many snapshots have it."""
    key = (frame.stream, frame.root, frame.height, frame.width)
    if key not in counted:
        tiles = size = 0
        for blobs, sizes in _leaves(store, frame):
            tally.names.append(prefixes(blobs))
            tally.sizes.append(sizes)
            tiles, size = tiles + len(sizes), size + int(sizes.sum())
        counted[key] = tiles, size
    tiles, size = counted[key]
    tally.frames.add(f"{frame.name}\0{frame.height}\0{frame.width}".encode() + frame.root)
    tally.tiles, tally.logical = tally.tiles + tiles, tally.logical + size


def _leaves(store: WarmStore, frame: Frame) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Blobs (n, 32) and plain sizes (n) of a frame's tiles, some at a time."""
    if frame.content == "bytes":
        refs = [entry.ref for _, _, entry in update.scan(store, frame.root, frame.root_height)]
        sizes = [store.read(ref).raw_size if store.has(ref) else 0 for ref in refs]
        names = b"".join(map(name_of, refs))
        yield np.frombuffer(names, np.uint8).reshape(-1, 32), np.array(sizes, np.int64)
        return
    item = codec.DTYPES[frame.dtype].itemsize * max(1, frame.channels)
    for at, leaf in _pages(store, frame.root, frame.root_height, (0, 0)):
        cells = np.array([at[0] + slot // page.PAGE_SIDE for slot, _ in leaf.slots()], np.int64)
        columns = np.array([at[1] + slot % page.PAGE_SIDE for slot, _ in leaf.slots()], np.int64)
        high = np.minimum(frame.tile_height, frame.height - cells * frame.tile_height)
        wide = np.minimum(frame.tile_width, frame.width - columns * frame.tile_width)
        yield leaf.names(), high * wide * item


def _pages(
    store: WarmStore, root: bytes, height: int, at: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], page.Page]]:
    """The leaf pages below a page, with the first cell of each."""
    if not root:
        return
    found, step = page.load(store, root, height), page.side(height) // page.PAGE_SIDE
    if height == 0:
        yield at, found
        return
    for slot, child in found.slots():
        corner = at[0] + slot // page.PAGE_SIDE * step, at[1] + slot % page.PAGE_SIDE * step
        yield from _pages(store, found.refers(child), height - 1, corner)


def _stream(name: str, tally: _Tally, records: _Records) -> StreamStats:
    names, first = np.unique(_joined(tally.names, np.uint64), return_index=True)
    raw = _joined(tally.sizes, np.int64)[first]
    at = np.minimum(records.names.searchsorted(names), max(0, len(records.names) - 1))
    there = records.names[at] == names if len(records.names) else np.zeros(len(names), np.bool_)
    at, raw_there = at[there], raw[there]
    stored, deep = records.lengths[at], records.depths[at] > 0
    return StreamStats(
        name, len(tally.frames), tally.tiles, tally.logical, len(names), int(raw.sum()), int(stored.sum()),
        int(deep.sum()), int(raw_there[deep].sum()), int(stored[deep].sum()),
        int(stored[records.warm[at]].sum()), int(stored[records.cold[at]].sum()),
    )  # fmt: skip


def _joined(parts: Sequence[NDArray[_Scalar]], dtype: type[_Scalar]) -> NDArray[_Scalar]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
