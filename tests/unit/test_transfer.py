"""Snapshots between repositories: what arrives is the same, what is shared is not read, and a break leaves no half."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import FakeClock, FakeEncoder, FakeReader, FakeRng, Faults, MemDisk, PowerLoss, Stack, new_disk, picture
from hypothesis import given, settings
from hypothesis import strategies as st

import him
from him.catalog.changes import FrameChange
from him.catalog.garbage import Choice, Collected, Collector
from him.catalog.group import Begun
from him.catalog.transfer import Side, TransferReport, _parts, transfer
from him.errors import BusyError, ConflictError, HimError, IntegrityError, NotFoundError, StorageError, UsageError
from him.pack.format import Draft
from him.pyramid import directory
from him.pyramid.page import load
from him.tile import codec
from him.tile.address import KIND_DIRECTORY, KIND_PAGE, KIND_TILE
from him.tile.chunks import CHUNKS
from him.types import BlobId, StreamSpec, TileKey

GRID = StreamSpec("grid", tile_height=8, tile_width=8, dtype="uint8", level_rule="mean")
WIDE = StreamSpec("wide", tile_height=64, tile_width=64, dtype="uint8")
NOTES = StreamSpec("notes", content="bytes", tile_height=1, tile_width=1)


def array(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def document(seed: int, size: int = 200_000) -> bytes:
    return np.random.default_rng(seed).integers(97, 123, size, dtype=np.uint8).tobytes()


def new(disk: MemDisk | None = None, seed: int = 0) -> Stack:
    return Stack(disk or new_disk(), rng=FakeRng(seed), clock=FakeClock(1_700_000_000_000_000_000 + seed * 10**12))


def side(stack: Stack) -> Side:
    return Side(stack.history, stack.store)


def push(source: Stack, target: Stack, *refs: str, force: bool = False) -> TransferReport:
    return transfer(side(source), side(target), refs or None, force=force)


@pytest.fixture
def source() -> Stack:
    made = new(seed=1)
    for spec in (GRID, WIDE, NOTES):
        made.history.declare_stream(spec)
    return made


@pytest.fixture
def target() -> Stack:
    return new(seed=2)


def same(source: Stack, target: Stack, report: TransferReport | None = None) -> None:
    """Every sealed snapshot the target has is the source's, to the last field and byte; fsck finds nothing."""
    ours = {one.snapshot_id: one for one in source.history.snapshots()}
    content, copied = source.content(), target.content()
    for one in target.history.snapshots():
        if one.snapshot_id in ours:
            assert one == ours[one.snapshot_id]
            keys = [key for key in content if key.startswith(one.snapshot_id)]
            assert {key: copied.get(key) for key in keys} == {key: content[key] for key in keys}
    if report is not None:
        assert all(source.history.refs()[move.name] == (move.kind, move.after) for move in report.refs)
    checked = target.fsck()
    assert checked.ok, checked.errors


def rewrite(stack: Stack, frame: str, cells: Iterable[tuple[int, int]], seed: int, branch: str = "main") -> None:
    stack.ingest.tiles(branch, "grid", frame, {cell: array(seed + n) for n, cell in enumerate(cells)})


def kinds(stack: Stack) -> dict[int, int]:
    """How many blobs of each depth can be found that are tiles."""
    found: dict[int, int] = {}
    for one in stack.history.snapshots():
        reader = stack.at(one.snapshot_id)
        for frame in reader.frames():
            for key in reader.keys(frame.stream, frame.name):
                depth = stack.store.depth_of(reader.present(key).ref)
                found[depth] = found.get(depth, 0) + 1
    return found


def busy(stack: Stack) -> None:
    """Sealed branches with deltas, chunks, deleted cells and frames, tags, and a frame several pages deep."""
    stack.ingest.array("main", "grid", "deep", array(1, 70 * 8, 20 * 8))
    stack.ingest.array("main", "wide", "w", array(2, 200, 130))
    stack.ingest.tiles("main", "notes", "long", {(0, 0): document(1)})
    stack.ingest.append("main", "logs", [{"n": 1}], writer="w")
    stack.history.seal("main")
    changed = array(2, 200, 130)
    for step in range(3):
        changed[step * 3, 5:9] ^= 255
        stack.ingest.array("main", "wide", "w", changed)
        edited = bytearray(document(1))
        edited[1000 * step : 1000 * step + 4] = b"EDIT"
        stack.ingest.tiles("main", "notes", "long", {(0, 0): bytes(edited)})
        stack.history.seal("main")
    stack.history.set_ref("v1", "tag", "main")
    stack.history.set_attribute("main", "owner", "ann")
    stack.history.open_snapshot(parent="main", branch="dev", tags={"task_id": "t"}, provenance={"by": "test"})
    rewrite(stack, "deep", [(69, 19), (0, 0), (30, 11)], 50, "dev")
    stack.ingest.tiles("dev", "grid", "deep", {(5, 5): None})
    stack.history.seal("dev")


# -- what arrives


def test_all_of_a_history_arrives_as_it_is(source: Stack, target: Stack) -> None:
    busy(source)
    assert {0, 1} <= set(kinds(source))
    report = push(source, target)
    assert sorted(report.snapshots) == sorted(one.snapshot_id for one in source.history.snapshots())
    assert {move.name: (move.kind, move.before) for move in report.refs} == {
        "dev": ("branch", None), "main": ("branch", None), "v1": ("tag", None),
    }  # fmt: skip
    same(source, target, report)
    assert kinds(target) == kinds(source), "records go as they are stored"
    assert set(target.projection.streams()) == {"grid", "wide", "notes"}
    assert target.projection.lamport() == source.projection.lamport()
    # Another process, from the log alone, and a projection made anew.
    again = new(target.disk.copy(), seed=3)  # type: ignore[attr-defined]
    same(source, again)
    target.history.rebuild()
    target.store.forget_addresses()
    same(source, target)


def test_a_second_push_sends_nothing_and_leaves_no_record(source: Stack, target: Stack) -> None:
    busy(source)
    push(source, target)
    head = target.log.head()
    report = push(source, target)
    assert (report.records, report.snapshots, report.refs) == (0, (), ())
    assert target.log.head() == head


def test_only_what_is_named_is_sent_with_its_ancestors(source: Stack, target: Stack) -> None:
    busy(source)
    report = push(source, target, "v1")
    assert set(target.history.refs()) == {"v1"}
    dev = source.history.snapshot("dev")
    assert set(report.snapshots) == {one.snapshot_id for one in source.history.snapshots()} - {dev.snapshot_id}
    report = push(source, target, "dev")
    assert report.snapshots == (dev.snapshot_id,)
    same(source, target)


def test_only_streams_in_use_are_declared(source: Stack, target: Stack) -> None:
    source.history.declare_stream(StreamSpec("idle", tile_height=8, tile_width=8))
    rewrite(source, "f", [(0, 0)], 1)
    source.history.seal("main")
    push(source, target)
    assert set(target.projection.streams()) == {"grid"}


def test_a_target_goes_on_where_the_source_stopped_and_gives_back(source: Stack, target: Stack) -> None:
    busy(source)
    push(source, target)
    rewrite(target, "deep", [(1, 1)], 99)
    target.history.seal("main")
    assert target.history.snapshot("main").lamport > source.projection.lamport()
    report = push(target, source, "main")
    assert len(report.snapshots) == 1
    same(target, source)
    assert source.history.refs()["main"] == target.history.refs()["main"]


# -- what it costs


class Reads:
    """Counts records a store reads, by kind."""

    def __init__(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: list[int] = []
        read = stack.store._read

        def counted(*asked: Any, **how: Any) -> object:
            found = read(*asked, **how)
            self.kinds.append(found.kind)
            return found

        monkeypatch.setattr(stack.store, "_read", counted)

    def count(self, *kinds: int) -> int:
        return sum(kind in kinds for kind in self.kinds)


@pytest.mark.parametrize("side_tiles", [70, 520])
@pytest.mark.parametrize("changes", [1, 5, 40])
def test_a_push_after_some_changes_costs_their_paths(
    side_tiles: int, changes: int, target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = new(seed=1)
    tiny = StreamSpec("grid", tile_height=2, tile_width=2, dtype="uint8")
    source.history.declare_stream(tiny)
    source.ingest.array("main", "grid", "f", array(1, side_tiles * 2, 2 * side_tiles if side_tiles < 100 else 40))
    for name in range(100):
        source.ingest.array("main", "grid", f"other {name}", array(name, 4, 4))
    source.history.seal("main")
    push(source, target)
    rng = np.random.default_rng(5)
    columns = side_tiles if side_tiles < 100 else 20
    cells = {(int(rng.integers(side_tiles)), int(rng.integers(columns))) for _ in range(changes)}
    source.ingest.tiles("main", "grid", "f", {cell: array(1000 + n, 2, 2) for n, cell in enumerate(cells)})
    source.history.seal("main")
    depth = source.at("main").frame("grid", "f").root_height + 1
    assert depth == (3 if side_tiles == 70 else 4)
    # A process that has read nothing yet.
    fresh, other = new(source.disk.copy(), seed=7), new(target.disk.copy(), seed=8)  # type: ignore[attr-defined]
    reads = Reads(fresh, monkeypatch)
    report = push(fresh, other)
    # A tile and a page at each height for each change; two directory nodes, as a hundred frames make a root and leaves.
    assert report.records <= len(cells) * (1 + depth) + 2
    # Each is looked into once and sent once.
    assert reads.count(KIND_PAGE, KIND_DIRECTORY) <= 2 * (len(cells) * depth + 2)
    assert reads.count(KIND_TILE) == len(cells)
    assert report.shared_subtrees > 0
    same(fresh, other)
    assert push(fresh, other).records == 0


def test_a_frame_that_grows_or_shrinks_by_a_height_is_still_compared(
    target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = new(seed=1)
    source.history.declare_stream(StreamSpec("grid", tile_height=2, tile_width=2, dtype="uint8"))
    first = array(1, 120, 120)
    source.ingest.array("main", "grid", "f", first)
    source.history.seal("main")
    push(source, target)
    source.ingest.tiles("main", "grid", "f", {(70, 0): array(2, 2, 2)})
    source.history.seal("main")
    reads = Reads(source, monkeypatch)
    report = push(source, target)
    # The tile, the pages above it (the old root below the new one has not changed), the directory's leaf.
    assert (report.records, report.present_records) == (5, 0)
    assert reads.count(KIND_PAGE) <= 2 * 3
    first[:2, :2] ^= 1
    source.ingest.array("main", "grid", "f", first)
    source.history.seal("main")
    reads.kinds.clear()
    report = push(source, target)
    assert (report.records, reads.count(KIND_TILE)) == (4, 1)
    assert report.present_records == 63, "the leaf page's other tiles"
    same(source, target)


def test_a_directory_that_splits_or_joins_is_still_compared(target: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    source = new(seed=1)
    source.history.declare_stream(GRID)
    for number in range(60):
        rewrite(source, f"f{number}", [(0, 0)], number)
    source.history.seal("main")
    push(source, target)
    for number in range(60, 70):
        rewrite(source, f"f{number}", [(0, 0)], number)
    source.history.seal("main")
    reads = Reads(source, monkeypatch)
    report = push(source, target)
    # Ten tiles and their pages, the root and at most sixteen leaves.
    assert 20 < report.records <= 20 + 17
    assert (reads.count(KIND_TILE), report.present_records) == (10, 0)
    same(source, target)
    for number in range(50):
        source.ingest.tiles("main", "grid", f"f{number}", {(0, 0): None})
    rewrite(source, "f60", [(0, 0)], 1000)
    source.history.seal("main")
    reads.kinds.clear()
    report = push(source, target)
    assert (report.records, reads.count(KIND_TILE), report.present_records) == (3, 1, 0)
    same(source, target)


def test_a_leaf_is_compared_with_an_inner_node_below_the_root(target: Stack) -> None:
    """1,500 frames stand three nodes deep; then most of those below one child of the root go."""
    source = new(seed=1)
    source.history.declare_stream(GRID)
    rewrite(source, "f0", [(0, 0)], 1)
    opened, blob = source.history.snapshot("main"), blob_at(source, "main", "grid", "f0")
    shape = msgspec.structs.replace(source.at("main").frame("grid", "f0"), root=b"", root_height=0)
    frames = [msgspec.structs.replace(shape, name=f"f{number}") for number in range(1500)]
    begun = source.history.begin()
    source.history.commit(opened.snapshot_id, [FrameChange(one, {(0, 0): blob}) for one in frames], begun=begun)
    source.history.seal("main")
    push(source, target)
    one_side = [one for one in frames if directory.path_of(("grid", one.name))[0] == 7]
    assert len(one_side) > 80
    child = source.history.writable("main")
    gone = [FrameChange(one, {}, replace=True) for one in one_side[30:]]
    source.history.commit(child.snapshot_id, gone, begun=source.history.begin())
    rewrite(source, one_side[0].name, [(0, 0)], 2)
    source.history.seal("main")
    report = push(source, target)
    # The tile, its page, the leaf it is in, the root; of the 29 frames beside it nothing is looked at.
    assert (report.records, report.present_records) == (4, 0)
    assert report.shared_subtrees == 29 + 15 + 1, "frames, the root's other children, the merge base"
    assert target.fsck().ok


def test_nothing_is_read_when_a_branch_is_named_anew(
    source: Stack, target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(source)
    push(source, target)
    child = source.history.open_snapshot(parent="main", branch="copy")
    source.history.seal("copy")
    reads = Reads(source, monkeypatch)
    report = push(source, target, "copy")
    assert report.snapshots == (child.snapshot_id,)
    assert (report.records, reads.kinds) == (0, [])
    same(source, target)


# -- deltas and documents


def chain(stack: Stack, length: int, seed: int = 3) -> list[np.ndarray]:
    """Versions of one tile that are each stored as a change of the one before; sealed one by one."""
    current = array(seed, 64, 64)
    made = [current.copy()]
    stack.ingest.array("main", "wide", "c", current)
    stack.history.seal("main")
    for step in range(length):
        current[8 * step : 8 * step + 8] ^= np.random.default_rng(step).integers(1, 256, (8, 64), dtype=np.uint8)
        made.append(current.copy())
        stack.ingest.array("main", "wide", "c", current)
        stack.history.seal("main")
    return made


def test_a_delta_is_sent_with_what_it_is_made_of(source: Stack, target: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tile.delta.DELTA_TINY_BYTES", 0)
    made = chain(source, 2)
    tip = blob_at(source, "main", "wide", "c")
    assert source.store.depth_of(tip) == 2
    source.history.open_snapshot(branch="alone")
    source.ingest.array("alone", "wide", "c", made[-1])
    source.history.seal("alone")
    report = push(source, target, "alone")
    # The tile, its base, the base's base, a page and a directory leaf.
    assert report.records == 5
    assert target.store.depth_of(tip) == 2
    same(source, target)


def test_a_delta_whose_base_is_a_deeper_delta_there_is_sent_in_full(
    source: Stack, target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side met the same tiles in another order: a base must be less deep than what is made on it."""
    monkeypatch.setattr("him.tile.delta.DELTA_TINY_BYTES", 0)
    made = chain(source, 1, seed=3)
    target.history.declare_stream(WIDE)
    first = made[0].copy()
    first[60:] ^= 9
    for version in (first, made[0]):
        target.ingest.array("main", "wide", "c", version)
    base, tip = blob_at(target, "main", "wide", "c"), blob_at(source, "main", "wide", "c")
    assert (target.store.depth_of(base), source.store.depth_of(base), source.store.depth_of(tip)) == (1, 0, 1)
    source.history.set_ref("theirs", "branch", "main")
    push(source, target, "theirs")
    assert target.store.depth_of(tip) == 0
    same(source, target)


def test_long_documents_share_the_chunks_that_are_there(source: Stack, target: Stack) -> None:
    source.ingest.tiles("main", "notes", "long", {(0, 0): document(1)})
    source.history.seal("main")
    target.history.declare_stream(NOTES)
    edited = document(1)[:100_000] + b"EDIT" + document(1)[100_000:]
    target.ingest.tiles("main", "notes", "mine", {(0, 0): edited})
    source.history.set_ref("theirs", "branch", "main")
    report = push(source, target, "theirs")
    assert source.store.read(blob_at(source, "main", "notes", "long")).codec == CHUNKS
    assert report.records < 8, "the list, a chunk or two, a page and a directory leaf"
    same(source, target)


def blob_at(stack: Stack, branch: str, stream: str, frame: str, y: int = 0, x: int = 0) -> BlobId:
    return stack.at(branch).present(TileKey(stream, frame, 0, y, x)).ref


# -- what is there without what lies below it


def reached(stack: Stack, root: bytes, into: dict[BlobId, bool]) -> dict[BlobId, bool]:
    """Every blob below a directory → whether it stands above others; nodes, pages, tiles, what tiles are made of."""
    node = directory.children(stack.store, root)
    into[BlobId(root)] = True
    if isinstance(node, tuple):
        for frame in node:
            pages(stack, frame.root, frame.root_height, into)
    else:
        for child, _ in node.values():
            reached(stack, child, into)
    return into


def pages(stack: Stack, root: bytes, height: int, into: dict[BlobId, bool]) -> None:
    into[BlobId(root)] = True
    for _, raw in load(stack.store, root, height).slots():
        if height:
            pages(stack, raw, height - 1, into)
        else:
            tile(stack, BlobId(raw[:32]), into)


def tile(stack: Stack, blob: BlobId, into: dict[BlobId, bool]) -> None:
    draft = stack.store.draft(blob)
    parts = _parts(draft)
    into[blob] = bool(parts)
    for part in parts:
        tile(stack, part, into)


def plant(source: Stack, target: Stack, blobs: Iterable[BlobId]) -> None:
    """Commit records to the target that no snapshot reaches, as an interrupted push or a collection may leave them."""
    target.history.prepare()
    begun = target.history.begin()
    target.store.put_drafts([source.store.draft(blob) for blob in blobs])
    target.history.adopt(lambda: (), begun=begun)


@pytest.mark.parametrize("which", ["above", "below", "roots", *range(6)])
def test_what_a_target_has_without_what_lies_below_is_completed(source: Stack, target: Stack, which: str | int) -> None:
    busy(source)
    into: dict[BlobId, bool] = {}
    for one in source.history.snapshots():
        reached(source, one.directory, into)
    chosen = {
        "above": [blob for blob, above in into.items() if above],
        "below": [blob for blob, above in into.items() if not above],
        "roots": [BlobId(one.directory) for one in source.history.snapshots()],
    }
    if isinstance(which, int):
        rng = np.random.default_rng(which)
        chosen[which] = [blob for blob in into if rng.random() < 0.5]  # type: ignore[index]
    plant(source, target, chosen[which])  # type: ignore[index]
    report = push(source, target)
    same(source, target, report)
    assert {blob for blob in into if target.store.has(blob)} == set(into)
    if which == "below":
        assert report.records == sum(into.values())
    assert push(source, target).records == 0
    # Nobody but the log knows it all: addresses made anew find the records that can be read.
    target.store.forget_addresses()
    same(source, new(target.disk.copy(), seed=4))  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", ["wide", "notes"])
def test_a_tile_that_cannot_be_read_there_is_sent_in_full(
    source: Stack, target: Stack, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target has it as a delta on what is gone, which the source never had: it holds the tile in full."""
    monkeypatch.setattr("him.tile.delta.DELTA_TINY_BYTES", 0)
    third = new(seed=6)
    for spec in (WIDE, NOTES):
        third.history.declare_stream(spec)
    first, last = (array(1, 64, 64), array(1, 64, 64)) if stream == "wide" else (document(1, 9_000), b"")
    if isinstance(first, bytes):
        last = first[:500] + b"EDIT" + first[504:]
    else:
        last[0] ^= 255  # type: ignore[index]
    for version in (first, last):
        third.ingest.tiles("main", stream, "f", {(0, 0): version})
    tip = blob_at(third, "main", stream, "f")
    assert third.store.depth_of(tip) == 1
    plant(third, target, [tip])
    with pytest.raises(IntegrityError):
        target.store.payload(tip)
    source.ingest.tiles("main", stream, "f", {(0, 0): last})
    source.history.seal("main")
    assert (source.store.depth_of(tip), source.store.has(third.store.read(tip).delta_base)) == (0, False)
    push(source, target)
    same(source, target)
    # Whatever order the addresses are learnt in.
    again = new(target.disk.copy(), seed=4)  # type: ignore[attr-defined]
    again.store.forget_addresses()
    same(source, again)
    assert push(source, again).records == 0


def test_a_root_whose_pages_were_collected_is_walked(source: Stack, target: Stack) -> None:
    """The target once had the snapshot, and dropped it: what is left of it proves nothing."""
    busy(source)
    tag = source.history.snapshot("v1")
    plant(source, target, [BlobId(tag.directory)])
    frame = source.at("v1").frame("grid", "deep")
    plant(source, target, [BlobId(frame.root)])
    report = push(source, target, "v1")
    assert report.records > 100
    same(source, target)


# -- a break


def transfer_disk(faults: Faults | None = None) -> MemDisk:
    disk = new_disk()
    disk.faults = faults or Faults()
    return disk


def small_source() -> Stack:
    made = new(seed=1)
    for spec in (GRID, WIDE, NOTES):
        made.history.declare_stream(spec)
    made.ingest.array("main", "grid", "deep", array(1, 12 * 8, 9 * 8))
    made.ingest.tiles("main", "notes", "long", {(0, 0): document(1, 70_000)})
    made.history.seal("main")
    edited = bytearray(document(1, 70_000))
    edited[5000:5004] = b"EDIT"
    made.ingest.tiles("main", "notes", "long", {(0, 0): bytes(edited)})
    rewrite(made, "deep", [(0, 0), (11, 8)], 5)
    made.history.seal("main")
    made.history.set_ref("v1", "tag", "main")
    return made


def begun(disk: MemDisk) -> Stack:
    """A target with a snapshot of its own, that knows the first of the source's."""
    stack = new(disk, seed=2)
    stack.history.declare_stream(GRID)
    rewrite(stack, "own", [(0, 0)], 70, "own")
    stack.history.seal("own")
    return stack


def check_whole_or_absent(source: Stack, disk: MemDisk, why: str) -> Stack:
    """All or nothing of a push can be seen, it is sound, and the next push completes it."""
    stack = new(disk, seed=9)
    names = set(stack.history.refs())
    assert names in ({"own"}, {"own", "main", "v1"}), (why, names)
    assert len(stack.history.snapshots()) == (1 if names == {"own"} else 3), why
    assert stack.fsck().ok, (why, stack.fsck().errors)
    resumed = push(source, stack)
    same(source, stack, resumed)
    assert set(stack.history.refs()) == {"own", "main", "v1"}, why
    return stack


@pytest.fixture(params=["roomy", "cramped"])
def cramped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Small batches and packs, so that a push is many commits and several packs."""
    if request.param == "cramped":
        monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 30_000)
        monkeypatch.setattr("him.catalog.transfer.TRANSFER_BATCH_BYTES", 9_000)
        monkeypatch.setattr("him.catalog.transfer.TRANSFER_BATCH_RECORDS", 20)
        monkeypatch.setattr("him.catalog.history.CHECKPOINT_RECORDS", 3)
    return request.param == "cramped"


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["refuse", "partial", "late", "power", "power-after"])
def test_a_push_broken_at_any_operation_shows_nothing_half_and_resumes(cramped: bool, mode: str, stride: int) -> None:
    source = small_source()
    disk = transfer_disk()
    stack, before = begun(disk), 0
    before = disk.faults.count
    whole = push(source, stack)
    operations = disk.faults.count
    # The first snapshots open, then the blobs: with small batches in many records, else in one.
    assert (len([*stack.history.records()]) > 12) == cramped
    for at in range(before + 1, operations + 1, stride):
        disk = transfer_disk()
        stack = begun(disk)
        assert disk.faults.count == before
        disk.faults.at, disk.faults.mode = at, mode
        failed = False
        try:
            push(source, stack)
        except (HimError, PowerLoss):
            failed = True
        why = f"{mode} {at}: {disk.faults.kinds[at - 1]}"
        if mode.startswith("power"):
            check_whole_or_absent(source, disk.after_power_loss(lambda: "none"), why)
            check_whole_or_absent(source, disk.after_power_loss(lambda: "half"), why)
            continue
        check_whole_or_absent(source, disk.copy(), f"another process after {why}")
        # The same process goes on; what was committed is not sent again.
        report = push(source, stack)
        same(source, stack)
        assert failed or report.records == 0, why
        assert report.records <= whole.records, why
        stack.close()


def test_a_resumed_push_sends_only_what_was_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.catalog.transfer.TRANSFER_BATCH_BYTES", 9_000)
    source = small_source()
    stack = begun(transfer_disk())
    commit, count = stack.log.commit, [0]

    def failing(build: Callable[[], bytes | None]) -> int:
        count[0] += 1
        if count[0] == 6:
            raise BusyError("stopped")
        return commit(build)

    stack.log.commit = failing  # type: ignore[method-assign]
    with pytest.raises(BusyError):
        push(source, stack)
    del stack.log.commit
    held = new(stack.disk.copy(), seed=5)  # type: ignore[attr-defined]
    committed = {blob for blob in all_of(source) if held.store.has(blob)}
    assert 0 < len(committed) < len(all_of(source))
    report = push(source, held)
    assert report.records == len(all_of(source)) - len(committed)
    same(source, held)


def all_of(stack: Stack) -> dict[BlobId, bool]:
    into: dict[BlobId, bool] = {}
    for one in stack.history.snapshots():
        reached(stack, one.directory, into)
    return into


# -- others at work


def test_a_writer_in_the_target_commits_between_the_batches(
    source: Stack, target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("him.catalog.transfer.TRANSFER_BATCH_BYTES", 30_000)
    busy(source)
    other = Stack(target.disk, rng=FakeRng(33), writer="test:2")
    other.history.declare_stream(GRID)
    rows: list[int] = []
    put = target.store.put_drafts

    def beside(drafts: Sequence[Draft], *, again: bool = False) -> int:
        for stack in (other, target):
            rows.append(len(rows))
            rewrite(stack, "theirs", [(rows[-1], 0)], rows[-1], "theirs")
        return put(drafts, again=again)

    monkeypatch.setattr(target.store, "put_drafts", beside)
    report = push(source, target)
    same(source, target, report)
    assert len(rows) > 10
    reader = other.at("theirs")
    assert [reader.tile(TileKey("grid", "theirs", 0, row, 0)).tobytes() for row in rows] == [
        array(row).tobytes() for row in rows
    ]


def test_a_branch_that_moved_meanwhile_is_not_overwritten(
    source: Stack, target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(source)
    push(source, target, "main")
    rewrite(source, "deep", [(9, 9)], 9)
    source.history.seal("main")
    adopt = target.history.adopt

    def late(build: Callable[[], Sequence[object]], *, begun: Begun) -> None:
        monkeypatch.undo()
        rewrite(target, "deep", [(8, 8)], 8)
        adopt(build, begun=begun)  # type: ignore[arg-type]

    monkeypatch.setattr(target.history, "adopt", late)
    with pytest.raises(ConflictError, match="no ancestor"):
        push(source, target, "main")
    assert source.history.refs()["main"][1] not in {one.snapshot_id for one in target.history.snapshots()}


def test_two_pushes_of_one_snapshot_at_once_both_end_well(
    source: Stack, target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(source)
    adopt = target.history.adopt

    def late(build: Callable[[], Sequence[object]], *, begun: Begun) -> None:
        monkeypatch.undo()
        push(source, Stack(target.disk, rng=FakeRng(34), writer="test:2"))
        adopt(build, begun=begun)  # type: ignore[arg-type]

    monkeypatch.setattr(target.history, "adopt", late)
    report = push(source, target)
    assert (report.snapshots, report.refs) == ((), ())
    same(source, target)


def test_blobs_that_a_failed_write_took_along_stop_the_push(
    source: Stack, target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(source)
    adopt = target.history.adopt

    def late(build: Callable[[], Sequence[object]], *, begun: Begun) -> None:
        target.store.abandon()
        adopt(build, begun=begun)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(target.history, "adopt", late)
        with pytest.raises(BusyError) as caught:
            push(source, target)
    assert "it resumes" in caught.value.fix
    assert not target.history.snapshots()
    same(source, target, push(source, target))


# -- what is refused


def diverged(source: Stack, target: Stack) -> tuple[str, str]:
    """A branch that went on on both sides; the heads."""
    busy(source)
    push(source, target)
    rewrite(source, "deep", [(1, 1)], 11)
    source.history.seal("main")
    rewrite(target, "deep", [(2, 2)], 12)
    target.history.seal("main")
    return source.history.refs()["main"][1], target.history.refs()["main"][1]


def test_a_branch_only_moves_forward_unless_forced(source: Stack, target: Stack) -> None:
    ours, theirs = diverged(source, target)
    records = len([*target.history.records()])
    with pytest.raises(ConflictError) as caught:
        push(source, target, "main")
    assert ours in caught.value.line()
    assert theirs in caught.value.line()
    assert "--force" in caught.value.fix
    assert len([*target.history.records()]) == records, "nothing was sent"
    report = push(source, target, "main", force=True)
    assert [(move.before, move.after) for move in report.refs] == [(theirs, ours)]
    same(source, target, report)
    assert target.history.snapshot(theirs), "what it named stays"


def test_a_target_that_is_ahead_is_not_set_back(source: Stack, target: Stack) -> None:
    busy(source)
    push(source, target)
    rewrite(target, "deep", [(2, 2)], 12)
    target.history.seal("main")
    with pytest.raises(ConflictError, match="no ancestor"):
        push(source, target, "main")


def test_an_ancestor_dropped_on_one_side_is_still_one(source: Stack, target: Stack) -> None:
    busy(source)
    push(source, target, "main")
    dropped = source.history.refs()["main"][1]
    rewrite(source, "deep", [(1, 1)], 11)
    source.history.seal("main")
    source.history.delete_ref("v1")
    source.history.drop(dropped)
    report = push(source, target, "main")
    assert [move.before for move in report.refs] == [dropped]
    assert report.records <= 6, "the dropped parent is still what it is compared with"
    same(source, target)


def test_an_ancestor_neither_side_can_prove_needs_force(source: Stack, target: Stack) -> None:
    """The target never saw the snapshot between, and the source dropped it: nobody knows the edge any more."""
    busy(source)
    push(source, target, "main")
    source.history.delete_ref("v1")
    for row in (1, 2):
        rewrite(source, "deep", [(row, row)], row)
        source.history.seal("main")
    source.history.drop(source.history.snapshot("main").parents[0].snapshot_id)
    with pytest.raises(ConflictError, match="no ancestor"):
        push(source, target, "main")
    report = push(source, target, "main", force=True)
    assert report.present_records < 200, "the target's head is still what it is compared with"
    same(source, target)


def test_a_child_of_a_dropped_parent_arrives_with_its_merge_base(source: Stack, target: Stack) -> None:
    busy(source)
    head = source.history.refs()["main"][1]
    rewrite(source, "deep", [(row, 0) for row in range(0, 70, 3)], 11)
    source.history.seal("main")
    source.history.delete_ref("v1")
    source.history.drop(head)
    push(source, target, "main")
    base = target.history.snapshot("main").parents[0].directory
    assert all(target.store.has(blob) for blob in reached(source, base, {}))
    same(source, target)


def test_tags_never_move(source: Stack, target: Stack) -> None:
    busy(source)
    push(source, target)
    source.history.delete_ref("v1")
    source.history.set_ref("v1", "tag", "dev")
    for force in (False, True):
        with pytest.raises(ConflictError, match="tags never move"):
            push(source, target, "v1", force=force)
    source.history.delete_ref("v1")
    source.history.set_ref("v1", "branch", "dev")
    with pytest.raises(ConflictError, match="is a tag there"):
        push(source, target, "v1", force=True)


def test_an_open_head_is_refused_by_name_and_left_out_of_all(source: Stack, target: Stack) -> None:
    busy(source)
    rewrite(source, "deep", [(1, 1)], 11)
    with pytest.raises(ConflictError, match="written to") as caught:
        push(source, target, "main")
    assert caught.value.fix == "seal it first: `him snap seal main`"
    report = push(source, target)
    assert report.left_open == ("main",)
    assert set(target.history.refs()) == {"dev", "v1"}
    same(source, target)


def test_an_open_parent_stays_behind_and_its_child_arrives(source: Stack, target: Stack) -> None:
    busy(source)
    rewrite(source, "deep", [(1, 1)], 11)
    opened = source.history.snapshot("main")
    source.history.open_snapshot(parent="main", branch="fork")
    rewrite(source, "deep", [(2, 2)], 12, "fork")
    rewrite(source, "deep", [(3, 3)], 13)
    source.history.seal("fork")
    push(source, target, "fork")
    assert opened.snapshot_id not in {one.snapshot_id for one in target.history.snapshots()}
    assert target.history.snapshot("fork").parents[0].snapshot_id == opened.snapshot_id
    same(source, target)
    source.history.seal("main")
    push(source, target, "main")
    same(source, target)


def test_one_id_with_two_contents_is_refused(source: Stack) -> None:
    rewrite(source, "f", [(0, 0)], 1)
    copy = new(source.disk.copy(), seed=5)  # type: ignore[attr-defined]
    name = source.history.snapshot("main").snapshot_id
    rewrite(source, "f", [(0, 1)], 2)
    source.history.seal("main")
    with pytest.raises(ConflictError, match="still open") as caught:
        push(source, copy, "main")
    assert caught.value.object == name
    copy.history.seal("main")
    with pytest.raises(ConflictError, match="other content") as caught:
        push(source, copy, "main")
    assert caught.value.object == name


def test_a_stream_declared_otherwise_is_refused(source: Stack, target: Stack) -> None:
    busy(source)
    target.history.declare_stream(StreamSpec("grid", tile_height=16, tile_width=16, dtype="uint8"))
    with pytest.raises(ConflictError, match="stream"):
        push(source, target)
    assert not target.history.snapshots()


def test_a_stream_declared_otherwise_meanwhile_is_refused(
    source: Stack, target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(source)
    adopt = target.history.adopt

    def late(build: Callable[[], Sequence[object]], *, begun: Begun) -> None:
        monkeypatch.undo()
        target.history.declare_stream(StreamSpec("grid", tile_height=16, tile_width=16, dtype="uint8"))
        adopt(build, begun=begun)  # type: ignore[arg-type]

    monkeypatch.setattr(target.history, "adopt", late)
    with pytest.raises(ConflictError, match="stream"):
        push(source, target)
    assert not target.history.snapshots()


@pytest.mark.parametrize("name", ["nope", "", "snp_01ARZ3NDEKTSV4RRFFQ69G5FAV"])
def test_an_unknown_name_is_refused(source: Stack, target: Stack, name: str) -> None:
    busy(source)
    with pytest.raises(NotFoundError):
        push(source, target, name)


def test_damage_at_the_source_leaves_nothing_in_the_target(source: Stack, target: Stack) -> None:
    busy(source)
    assert isinstance(source.disk, MemDisk)
    blob = blob_at(source, "dev", "grid", "deep", 30, 11)
    ((path, offset, size),) = source.store.places([blob])
    source.disk.files[path].now[offset + size - 1] ^= 1
    with pytest.raises(IntegrityError) as caught:
        push(source, target)
    assert caught.value.object == blob.hex()
    assert not target.history.snapshots()
    assert not target.history.refs()
    assert target.fsck().ok


@pytest.mark.parametrize("raw", [True, False])
def test_a_record_that_says_to_be_another_tile_is_not_taken(source: Stack, target: Stack, raw: bool) -> None:
    """Digests of a forged record can all be right but its name: a repository from outside is not trusted."""
    plain = np.arange(64, dtype=np.uint8).reshape(8, 8) if raw else np.zeros((64, 64), dtype=np.uint8)
    stream = "grid" if raw else "wide"
    source.ingest.array("main", stream, "f", plain)
    honest = blob_at(source, "main", stream, "f")
    forged = codec.encode_array(plain ^ 1)
    lie = Draft(KIND_TILE, forged.codec, honest, forged.header, forged.stored, len(forged.payload))
    source.history.seal("main")
    source.store.put_drafts([lie], again=True)
    with pytest.raises(IntegrityError):
        push(source, target)
    assert not target.store.has(honest)


# -- any history

Step = tuple[str, str, int, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["tile", "tile", "tile", "replace", "note", "delete", "seal", "branch", "tag", "push", "drop"]),
        st.sampled_from("abc"), st.integers(0, 25), st.integers(0, 9), st.integers(0, 4),
    ),
    min_size=1, max_size=40,
)  # fmt: skip


def play(stack: Stack, target: Stack, step: Step, number: int) -> None:
    what, branch, row, column, seed = step
    refs = stack.history.refs()
    if what == "tile":
        value = array(1, 64, 64)
        value[seed * 8 : seed * 8 + 2] ^= 1 + seed  # Often a small change of another version.
        stack.ingest.tiles(branch, "wide", f"f{column % 3}", {(row, column): value})
    elif what == "replace":
        stack.ingest.array(branch, "grid", f"f{column % 3}", array(seed, 8 * (row + 1), 8 * (column + 1)))
    elif what == "note":
        text = bytearray(document(1, 66_000))
        text[1000 * row : 1000 * row + 2] = bytes([seed, column])
        stack.ingest.tiles(branch, "notes", "n", {(seed, 0): bytes(text)})
    elif what == "delete" and branch in refs and not stack.history.snapshot(branch).sealed:
        for frame in stack.at(branch).frames("wide")[:1]:
            cells = list(stack.at(branch).keys("wide", frame.name))[: seed + 1]
            stack.ingest.tiles(branch, "wide", frame.name, {(key.y, key.x): None for key in cells})
    elif what == "seal" and branch in refs:
        stack.history.seal(branch)
    elif what == "branch" and branch in refs and f"b{number}" not in refs:
        stack.history.open_snapshot(parent=branch, branch=f"b{number}")
        stack.ingest.tiles(f"b{number}", "wide", "f0", {(row, column): array(seed, 64, 64)})
        if seed % 2:
            stack.history.seal(f"b{number}")
    elif what == "tag" and branch in refs:
        stack.history.set_ref(f"t{number}", "tag", branch)
    elif what == "drop":
        named = {head for _, head in refs.values()}
        for one in [one for one in stack.history.snapshots() if one.sealed and one.snapshot_id not in named][:1]:
            stack.history.drop(one.snapshot_id)
    elif what == "push":
        push_over_gaps(stack, target)


def push_over_gaps(source: Stack, target: Stack) -> TransferReport:
    """A push that is forced only where dropped snapshots hide from both sides what descends from what."""
    try:
        return push(source, target)
    except ConflictError:
        both = {one.snapshot_id: one for stack in (source, target) for one in stack.history.snapshots()}
        assert any(parent.snapshot_id not in both for one in both.values() for parent in one.parents)
        return push(source, target, force=True)


@settings(max_examples=40, deadline=None)
@given(STEPS, st.booleans(), st.sampled_from([20_000, 8 * 2**20]))
def test_any_history_arrives_whole(steps: list[Step], begun_there: bool, batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("him.catalog.transfer.TRANSFER_BATCH_BYTES", batch)
        patch.setattr("him.tile.delta.DELTA_TINY_BYTES", 64)
        source, target = new(seed=1), new(seed=2)
        for spec in (GRID, WIDE, NOTES):
            source.history.declare_stream(spec)
        if begun_there:
            # The same tiles in another order, so that they are other deltas; a branch that only the target has.
            target.history.declare_stream(WIDE)
            for seed in (3, 1, 0):
                value = array(1, 64, 64)
                value[seed * 8 : seed * 8 + 2] ^= 1 + seed
                target.ingest.tiles("own", "wide", "f0", {(0, 0): value})
        for number, step in enumerate(steps):
            play(source, target, step, number)
        for name in source.history.refs():
            source.history.seal(name)
        report = push_over_gaps(source, target)
        same(source, target, report)
        refs = target.history.refs()
        assert {name: refs.get(name) for name in source.history.refs()} == source.history.refs()
        assert push(source, target).records == 0


# -- on real disks, through the public surface


def open_repo(path: Path, *, create: bool = False) -> him.Repository:
    return him.open(path, create=create, reader=FakeReader(), encoder=FakeEncoder())


@pytest.fixture
def here(tmp_path: Path) -> Path:
    with open_repo(tmp_path / "here", create=True) as repo:
        repo.declare_stream(GRID)
        work = repo.writable("main")
        work.put_image(picture(60, 260, {(10, 10): "Submit"}), "login")
        work.put_array("grid", array(1, 100, 100), frame="f")
        work.append("logs", [{"n": 1}])
        work.seal()
        repo.tag("v1", "main")
    return tmp_path / "here"


def test_clone_answers_as_its_source_and_gives_levels_that_were_not_sent(here: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    report = him.clone(here, tmp_path / "copy", progress=lambda *call: told.append(call))
    assert [move.name for move in report.refs] == ["main", "v1"]
    assert told and told[-1][1] == 1 and "MB sent" in told[-1][2]
    with open_repo(here) as one, open_repo(tmp_path / "copy") as other:
        ours, theirs = one.snapshot("main"), other.snapshot("main")
        assert ours.info == theirs.info
        goal = "find button 'Submit'"
        assert one.query(goal, "main").choice == other.query(goal, "main").choice
        assert theirs.info.levels_root != b""
        for level in range(5):
            named = [(meta.tile_id, meta.checksum) for meta in ours.tiles("grid", frame="f", level=level)]
            assert named == [(meta.tile_id, meta.checksum) for meta in theirs.tiles("grid", frame="f", level=level)]
            np.testing.assert_array_equal(
                ours.get("grid", frame="f", level=level), theirs.get("grid", frame="f", level=level)
            )
        assert other.fsck().ok


def test_clone_goes_on_and_takes_no_other_folder(here: Path, tmp_path: Path) -> None:
    with open_repo(tmp_path / "copy", create=True):
        pass
    assert him.clone(here, tmp_path / "copy", refs=["v1"]).refs
    with pytest.raises(ConflictError, match="repository already"):
        him.clone(here, tmp_path / "copy")
    with pytest.raises(ConflictError, match="not empty"):
        him.clone(here, tmp_path)
    with pytest.raises(NotFoundError):
        him.clone(here, tmp_path / "new", refs=["nope"])
    assert not (tmp_path / "new").exists()


def test_a_repository_is_not_its_own_other_side(here: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(here)
    with open_repo(here) as repo:
        for path in (here, tmp_path / "link", here / ".." / "here"):
            with pytest.raises(UsageError, match="one repository"):
                repo.push(path)
            with pytest.raises(UsageError, match="one repository"):
                repo.pull(path)


def write_beside(path: str, count: int) -> None:
    with open_repo(Path(path)) as repo:
        for number in range(count):
            repo.writable("theirs").put("skills", b"%d" % number, frame=f"s{number}")


def test_another_process_writes_while_snapshots_arrive(here: Path, tmp_path: Path) -> None:
    with open_repo(here) as repo, open_repo(tmp_path / "there", create=True) as there:
        writer = multiprocessing.get_context("spawn").Process(target=write_beside, args=(str(there.path), 30))
        writer.start()
        for number in range(10):
            repo.writable("main").put_array("grid", array(number, 100, 100), frame="f")
            repo.writable("main").seal()
            repo.push(there.path, ["main"])
        writer.join(120)
        assert writer.exitcode == 0
        assert there.snapshot("main").info == repo.snapshot("main").info
        assert [there.snapshot("theirs").get("skills", frame=f"s{n}") for n in range(30)] == [
            b"%d" % n for n in range(30)
        ]
        assert there.fsck().ok
        assert repo.push(there.path, ["main"]).records == 0


def test_a_read_only_repository_gives_and_does_not_take(here: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        real = os.access
        patch = pytest.MonkeyPatch()
        patch.setattr(os, "access", lambda path, mode: str(path) != str(here) and real(path, mode))
    else:
        patch = pytest.MonkeyPatch()
        here.chmod(0o555)
    try:
        assert him.clone(here, tmp_path / "copy").refs
        with open_repo(tmp_path / "copy") as copy, pytest.raises(StorageError, match="read-only"):
            copy.push(here)
    finally:
        patch.undo()
        here.chmod(0o755)


def test_a_collection_in_the_target_stops_the_push_and_the_next_one_completes_it(
    source: Stack, target: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent and not yet referred to is garbage to it."""
    busy(source)
    adopt, collected = target.history.adopt, list[Collected]()

    def collect() -> Collected:
        other = Stack(target.disk, rng=FakeRng(71), writer="test:3")
        found = Collector(other.history, other.projection, other.store, other.clock, tuple).run(Choice(0.01))
        other.close()
        return found

    def late(build: Callable[[], Sequence[object]], *, begun: Begun) -> None:
        if not collected:
            target.history.adopt = adopt
            target.history.adopt(lambda: (), begun=begun)
            target.history.finish_packs()
            collected.append(collect())
        adopt(build, begun=begun)  # type: ignore[arg-type]

    monkeypatch.setattr(target.history, "adopt", late)
    with pytest.raises(BusyError, match="garbage"):
        push(source, target)
    assert collected[0].condemned_packs > 0
    assert target.history.refs() == {}
    push(source, target)
    assert collect().waiting_packs == 0
    assert target.fsck().errors == ()
    assert target.content() == source.content()
