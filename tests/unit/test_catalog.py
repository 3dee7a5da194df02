"""History: branches cost nothing, equal writes give equal hashes, and the log decides what is true."""

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from fakes import (
    Announcing,
    DictMemo,
    FakeClock,
    FakeEncoder,
    FakeReader,
    FakeRng,
    Faults,
    FaultsAt,
    MemDisk,
    Stack,
    chunks,
    new_disk,
    together,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import him
from him.adapters.local import LocalDisk
from him.adapters.sqlite import SqliteMemo, SqliteProjection
from him.catalog import changes as changing
from him.catalog import log as commit_log
from him.catalog.changes import FrameChange
from him.catalog.group import Queue, Request
from him.catalog.log import END_PATH, LOG_PATH, TURN_PATH, FileLog
from him.catalog.marker import parsed
from him.catalog.reader import SnapshotReader
from him.errors import (
    BusyError,
    ConflictError,
    HimError,
    IntegrityError,
    NotFoundError,
    SealedError,
    StorageError,
    UsageError,
    VersionError,
)
from him.pyramid import diff, directory, update
from him.tile.codec import encode_bytes
from him.tile.downsample import RULES
from him.types import Batch, Frame, LiveState, SnapshotId, StreamSpec, TileKey, snapshot_bytes

ROOT = Path(__file__).parents[2]
GRID = StreamSpec("grid", tile_height=8, tile_width=8, dtype="uint8", level_rule="mean")


def array(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


@pytest.fixture
def stack() -> Stack:
    made = Stack(new_disk())
    made.history.declare_stream(GRID)
    return made


def puts(disk: MemDisk) -> int:
    return sum(kind.startswith("write packs/") for kind in disk.faults.kinds)


# -- branching and copy-on-write


@pytest.mark.parametrize("side", [1, 30, 150])
def test_a_branch_writes_one_log_record_whatever_the_parent_holds(stack: Stack, side: int) -> None:
    stack.ingest.array("main", "grid", "f", array(1, side * 8, side * 8))
    assert isinstance(stack.disk, MemDisk)
    stack.disk.faults.kinds.clear()
    size = len(stack.disk.files[LOG_PATH].now)
    child = stack.history.open_snapshot(parent="main", branch="dev")
    assert not puts(stack.disk)
    assert len(stack.disk.files[LOG_PATH].now) - size < 500
    parent = stack.history.snapshot("main")
    assert child.directory == parent.directory
    assert child.parents[0].directory == parent.directory


def test_one_changed_tile_writes_its_path_and_nothing_else(stack: Stack) -> None:
    stack.ingest.array("main", "grid", "f", array(1, 70 * 8, 70 * 8))  # three pages deep
    stack.history.open_snapshot(parent="main", branch="dev")
    assert isinstance(stack.disk, MemDisk)
    stack.disk.faults.kinds.clear()
    stack.ingest.tiles("dev", "grid", "f", {(69, 3): array(2)})
    # The tile, a page at each of three heights, the directory's leaf, the range's index record.
    assert puts(stack.disk) == 1 + 3 + 1 + 1
    assert stack.at("main").tile(TileKey("grid", "f", 0, 69, 3)).tobytes() != array(2).tobytes()
    changed = list(diff.cells(stack.store, *_root(stack, "main"), *_root(stack, "dev")))
    assert [(row, column) for row, column, _, _ in changed] == [(69, 3)]


def _root(stack: Stack, name: str) -> tuple[bytes, int]:
    frame = stack.at(name).frame("grid", "f")
    return frame.root, frame.root_height


def test_writing_the_parents_content_again_is_no_change(stack: Stack) -> None:
    stack.ingest.array("main", "grid", "f", array(1, 40, 40))
    before = stack.history.snapshot("main").directory
    stack.history.open_snapshot(parent="main", branch="dev")
    assert isinstance(stack.disk, MemDisk)
    stack.ingest.tiles("dev", "grid", "f", {(0, 0): array(9)})
    assert stack.history.snapshot("dev").directory != before
    seq = stack.log.head()[0]
    stack.ingest.tiles("dev", "grid", "f", {(0, 0): array(1, 40, 40)[:8, :8]})
    assert stack.history.snapshot("dev").directory == before
    assert stack.log.head()[0] == seq + 1
    stack.ingest.array("dev", "grid", "f", array(1, 40, 40))
    assert stack.history.snapshot("dev").directory == before
    assert stack.log.head()[0] == seq + 1, "no change, no record"
    origin = update.get(stack.store, *_root(stack, "dev"), 0, 0)
    assert origin is not None
    assert origin.origin == snapshot_bytes(stack.history.snapshot("main").snapshot_id)


Writes = list[tuple[str, int, int, int]]


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 70), st.integers(0, 9), st.integers(0, 3)),
        min_size=1, max_size=25, unique_by=lambda write: write[:3],
    ),
    st.randoms(use_true_random=False),
    st.lists(st.integers(1, 6), max_size=25),
)  # fmt: skip
@settings(max_examples=40)
def test_the_same_writes_give_one_directory_hash_in_any_order_and_batches(
    writes: Writes, random, sizes: list[int]
) -> None:
    def run(batches: list[Writes]) -> bytes:
        stack = Stack(new_disk())
        stack.history.declare_stream(GRID)
        stack.ingest.array("base", "grid", "a", array(0, 8, 24))
        stack.history.open_snapshot(parent="base", branch="dev")
        for batch in batches:
            for name in "ab":
                cells = {(row, column): array(seed) for own, row, column, seed in batch if own == name}
                if cells:
                    stack.ingest.tiles("dev", "grid", name, cells)
        return stack.history.snapshot("dev").directory

    shuffled = list(writes)
    random.shuffle(shuffled)
    assert run([writes]) == run([list(part) for part in chunks(shuffled, sizes)])


@given(st.permutations(range(6)))
@settings(max_examples=15)
def test_of_two_writes_to_one_key_the_later_counts(order: list[int]) -> None:
    stack = Stack(new_disk())
    for seed in order:
        stack.ingest.tiles("main", "skills", "s", {(0, 0): b"%d" % seed})
    assert stack.at("main").document("skills", "s") == b"%d" % order[-1]


# -- extents


def test_puts_grow_the_extent_and_only_replace_cuts(stack: Stack) -> None:
    stack.ingest.tiles("main", "grid", "f", {(2, 1): array(1, 5, 6)})
    frame = stack.at("main").frame("grid", "f")
    assert (frame.height, frame.width) == (21, 14)
    stack.ingest.tiles("main", "grid", "f", {(0, 9): array(2, 8, 3)})
    frame = stack.at("main").frame("grid", "f")
    assert (frame.height, frame.width) == (21, 75)
    stack.ingest.tiles("main", "grid", "f", {(2, 1): None})
    frame = stack.at("main").frame("grid", "f")
    assert (frame.height, frame.width) == (21, 75), "deleting a tile leaves the extent"
    stack.ingest.array("main", "grid", "f", array(3, 9, 9))
    reader = stack.at("main")
    assert (reader.frame("grid", "f").height, reader.frame("grid", "f").width) == (9, 9)
    assert sorted((k.y, k.x) for k in reader.keys("grid", "f")) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    np.testing.assert_array_equal(reader.array("grid", "f"), array(3, 9, 9))


def test_a_frame_without_tiles_vanishes(stack: Stack) -> None:
    stack.ingest.tiles("main", "grid", "f", {(0, 0): array(1)})
    stack.ingest.tiles("main", "grid", "f", {(0, 0): None})
    with pytest.raises(NotFoundError):
        stack.at("main").frame("grid", "f")
    assert stack.history.snapshot("main").directory == directory.EMPTY


def test_tiles_of_one_frame_have_one_shape(stack: Stack) -> None:
    stack.ingest.tiles("main", "kv_cache", "f", {(0, 0): array(1)})
    with pytest.raises(ConflictError):
        stack.ingest.tiles("main", "kv_cache", "f", {(0, 1): array(1).astype(np.float32)})
    assert stack.fsck().ok


def test_appended_rows_follow_each_other_whoever_writes(stack: Stack) -> None:
    for number in range(5):
        stack.ingest.append("main", "logs", [{"n": number}], writer="w")
    reader = stack.at("main")
    (frame,) = reader.frames("logs")
    lines = [reader.tile(TileKey("logs", frame.name, 0, row, 0)) for row in range(frame.rows)]
    assert lines == [b'{"n":%d}\n' % number for number in range(5)]


@pytest.mark.parametrize(
    "spec",
    [
        StreamSpec("s", tile_height=0),
        StreamSpec("s", tile_width=-8),
        StreamSpec("s", tile_height=7, level_rule="mean"),
        StreamSpec("s", level_rule="median"),
        StreamSpec("s", content="bytes", level_rule="mean"),
        StreamSpec("s", content="rows"),
        StreamSpec("s", dtype="float99"),
        StreamSpec("s", quantise="int3"),
        StreamSpec("a:b"),
        StreamSpec(""),
    ],
    ids=lambda spec: f"{spec.name}-{spec.content}-{spec.level_rule}-{spec.tile_height}",
)
def test_a_stream_that_could_not_be_written_or_halved_is_refused(stack: Stack, spec: StreamSpec) -> None:
    with pytest.raises(UsageError):
        stack.history.declare_stream(spec)


def test_a_stream_is_declared_once(stack: Stack) -> None:
    seq = stack.log.head()[0]
    stack.history.declare_stream(GRID)
    assert stack.log.head()[0] == seq
    with pytest.raises(ConflictError):
        stack.history.declare_stream(StreamSpec("grid"))
    with pytest.raises(ConflictError):
        stack.history.declare_stream(StreamSpec("screen"))


# -- sealing, names, attributes


def test_a_sealed_snapshot_is_never_written_and_a_branch_opens_a_child(stack: Stack) -> None:
    stack.ingest.tiles("main", "grid", "f", {(0, 0): array(1)})
    sealed = stack.history.seal("main")
    assert sealed.sealed
    assert sealed.lamport == 1
    assert sealed.levels_root
    with pytest.raises(SealedError):
        stack.ingest.tiles(sealed.snapshot_id, "grid", "f", {(0, 0): array(2)})
    stack.history.set_ref("v1", "tag", "main")
    with pytest.raises(SealedError):
        stack.ingest.tiles("v1", "grid", "f", {(0, 0): array(2)})
    child = stack.ingest.tiles("main", "grid", "f", {(0, 0): array(2)})
    assert child.parents[0].snapshot_id == sealed.snapshot_id
    assert child.parents[0].directory == sealed.directory
    assert stack.history.snapshot(sealed.snapshot_id).directory == sealed.directory
    assert stack.at("v1").tile(TileKey("grid", "f", 0, 0, 0)).tobytes() == array(1).tobytes()


def test_sealing_twice_is_no_change(stack: Stack) -> None:
    stack.ingest.tiles("main", "grid", "f", {(0, 0): array(1)})
    first, seq = stack.history.seal("main"), stack.log.head()
    assert stack.history.seal("main") == first
    assert stack.log.head() == seq


def test_two_writers_may_create_one_branch_at_once(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.history.prepare()
    stack.history.refresh()
    other = Stack(stack.disk, rng=FakeRng(5))
    monkeypatch.setattr(other.history, "prepare", lambda: None)
    real = other.history.refresh

    def refreshed() -> None:
        real()
        monkeypatch.setattr(other.history, "refresh", real)
        stack.history.open_snapshot(branch="new")

    monkeypatch.setattr(other.history, "refresh", refreshed)
    assert other.history.writable("new").snapshot_id == stack.history.snapshot("new").snapshot_id
    other.close()


def test_a_batch_prepared_before_sealing_is_refused(stack: Stack) -> None:
    opened, begun = stack.history.writable("main"), stack.history.begin()
    tile = encode_bytes(b"late")
    stack.store.put_tile(tile, bytes(16))
    stack.history.seal("main")
    shape = Frame("skills", "s", "bytes", 1, 1, 0, "bytes", 1, 1, 0, "none", b"", 0)
    with pytest.raises(SealedError):
        stack.history.commit(opened.snapshot_id, [FrameChange(shape, {(0, 0): tile.ref})], begun=begun)
    assert stack.fsck().ok


def test_lamport_times_grow_and_a_dropped_one_is_not_used_again(stack: Stack) -> None:
    times = []
    for name in ("a", "b", "c"):
        stack.ingest.tiles(name, "grid", "f", {(0, 0): array(1)})
        times.append(stack.history.seal(name).lamport)
    assert times == [1, 2, 3]
    stack.history.delete_ref("c")
    stack.history.drop(stack.history.snapshots()[-1].snapshot_id)
    stack.history.writable("d")
    assert stack.history.seal("d").lamport == 4
    stack.history.rebuild()
    stack.history.writable("e")
    assert stack.history.seal("e").lamport == 5


def test_branches_move_and_tags_do_not(stack: Stack) -> None:
    one, two = stack.history.writable("one"), stack.history.writable("two")
    stack.history.set_ref("one", "branch", two.snapshot_id)
    assert stack.history.snapshot("one").snapshot_id == two.snapshot_id
    stack.history.set_ref("v1", "tag", one.snapshot_id)
    for kind in ("tag", "branch"):
        with pytest.raises(ConflictError):
            stack.history.set_ref("v1", kind, two.snapshot_id)
    with pytest.raises(ConflictError):
        stack.history.open_snapshot(branch="v1")
    with pytest.raises(NotFoundError):
        stack.history.set_ref("v2", "tag", "nowhere")
    stack.history.delete_ref("v1")
    with pytest.raises(NotFoundError):
        stack.history.delete_ref("v1")
    assert stack.history.snapshot(one.snapshot_id).snapshot_id == one.snapshot_id


@pytest.mark.parametrize("name", ["", "snp_x", "-x", ".x", "a\nb", "x" * 300])
def test_names_that_could_be_taken_for_something_else_are_refused(stack: Stack, name: str) -> None:
    with pytest.raises(UsageError):
        stack.history.open_snapshot(branch=name)


def test_a_snapshot_is_found_by_an_unambiguous_beginning(stack: Stack) -> None:
    one = stack.history.writable("one")
    assert stack.history.snapshot(one.snapshot_id[:-2]).snapshot_id == one.snapshot_id
    stack.history.writable("two")
    with pytest.raises(NotFoundError):
        stack.history.snapshot(one.snapshot_id[:10])


def test_attributes_are_set_replaced_and_removed_even_when_sealed(stack: Stack) -> None:
    stack.history.open_snapshot(branch="main", tags={"owner": "me", "task_id": "1"})
    stack.history.seal("main")
    stack.history.set_attribute("main", "owner", "you")
    stack.history.set_attribute("main", "task_id", None)
    stack.history.set_attribute("main", "semantic_summary", "ü" * 1000)
    assert stack.history.snapshot("main").tags == {"owner": "you", "semantic_summary": "ü" * 1000}


def test_a_snapshot_with_a_name_is_not_dropped(stack: Stack) -> None:
    one = stack.history.writable("one")
    with pytest.raises(ConflictError, match="one"):
        stack.history.drop("one")
    stack.history.set_ref("keep", "tag", "one")
    stack.history.delete_ref("one")
    with pytest.raises(ConflictError, match="keep"):
        stack.history.drop(one.snapshot_id)
    stack.history.delete_ref("keep")
    stack.history.drop(one.snapshot_id)
    with pytest.raises(NotFoundError):
        stack.history.snapshot(one.snapshot_id)
    with pytest.raises(NotFoundError):
        stack.ingest.tiles(one.snapshot_id, "grid", "f", {(0, 0): array(1)})


def test_a_child_outlives_its_dropped_parent(stack: Stack) -> None:
    stack.ingest.tiles("one", "grid", "f", {(0, 0): array(1)})
    parent = stack.history.snapshot("one").snapshot_id
    stack.history.open_snapshot(parent="one", branch="two")
    stack.history.delete_ref("one")
    stack.history.drop(parent)
    assert stack.at("two").tile(TileKey("grid", "f", 0, 0, 0)).tobytes() == array(1).tobytes()
    assert stack.fsck().ok


# -- batches committed together


def tile_write(stack: Stack, name: str, row: int, seed: int, branch: str = "main") -> Callable[[], object]:
    return lambda: stack.ingest.tiles(branch, "grid", name, {(row, 0): array(seed)})


def batches(stack: Stack) -> list[list[Batch]]:
    """The batches of each record that has any."""
    found = [[one for one in record.operations if isinstance(one, Batch)] for _, _, record in stack.history.records()]
    return [record for record in found if record]


def cell(stack: Stack, branch: str, name: str, row: int) -> bytes:
    found = stack.at(branch).tile(TileKey("grid", name, 0, row, 0))
    assert isinstance(found, np.ndarray)
    return found.tobytes()


@pytest.fixture
def begun(stack: Stack) -> Stack:
    for branch in ("main", "dev"):
        stack.ingest.tiles(branch, "grid", "f", {(0, 0): array(1)})
    return stack


def test_batches_of_one_moment_share_a_record_and_see_each_other(begun: Stack) -> None:
    seq, syncs = begun.log.head()[0], begun.disk.faults.kinds.count(f"sync {LOG_PATH}")
    assert (
        together(begun, [tile_write(begun, "f", row, row, "main" if row % 3 else "dev") for row in range(1, 9)])
        == [None] * 8
    )
    assert begun.log.head()[0] == seq + 1
    assert begun.disk.faults.kinds.count(f"sync {LOG_PATH}") == syncs + 1
    last = batches(begun)[-1]
    assert len(last) == 8
    for target in {one.snapshot_id for one in last}:
        chain = [one for one in last if one.snapshot_id == target]
        assert [one.directory for one in chain[:-1]] == [one.before for one in chain[1:]]
        assert chain[-1].directory == begun.history.snapshot(target).directory
    assert [cell(begun, "main" if row % 3 else "dev", "f", row) for row in range(1, 9)] == [
        array(row).tobytes() for row in range(1, 9)
    ]
    assert begun.fsck().ok


def test_a_group_gives_the_directory_that_its_batches_give_alone() -> None:
    def run(grouped: bool) -> bytes:
        stack = Stack(new_disk())
        stack.history.declare_stream(GRID)
        stack.ingest.tiles("main", "grid", "f", {(0, 0): array(1)})
        writes = [tile_write(stack, f"f{n % 3}", n, n) for n in range(9)]
        writes.append(lambda: stack.ingest.tiles("main", "grid", "f", {(0, 0): None}))
        if grouped:
            assert together(stack, writes) == [None] * 10
        else:
            for write in writes:
                write()
        assert len(batches(stack)) == (2 if grouped else 11)
        return stack.history.snapshot("main").directory

    assert run(True) == run(False)


@given(st.permutations(range(5)))
@settings(max_examples=10)
def test_of_two_batches_in_a_group_the_one_that_queued_later_counts(order: list[int]) -> None:
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)
    stack.ingest.tiles("main", "grid", "f", {(0, 0): array(99)})
    together(stack, [tile_write(stack, "f", 0, seed) for seed in order])
    assert cell(stack, "main", "f", 0) == array(order[-1]).tobytes()


def test_each_batch_returns_the_snapshot_as_it_left_it(begun: Stack) -> None:
    left: dict[int, bytes] = {}

    def write(row: int) -> Callable[[], object]:
        def run() -> None:
            left[row] = begun.ingest.tiles("main", "grid", "f", {(row, 0): array(row)}).directory

        return run

    together(begun, [write(row) for row in (1, 2, 3)])
    for row in (1, 2, 3):
        reader = SnapshotReader(begun.store, begun.memo, left[row])
        assert sorted(key.y for key in reader.keys("grid", "f")) == list(range(row + 1))


def test_a_batch_that_may_not_be_committed_fails_alone(begun: Stack) -> None:
    opened = begun.history.snapshot("dev").snapshot_id
    shape = Frame("skills", "s", "bytes", 1, 1, 0, "bytes", 1, 1, 0, "none", b"", 0)
    late = encode_bytes(b"late")

    def stale() -> None:
        begun.store.put_tile(late, bytes(16))
        begun.history.commit(
            opened, [FrameChange(shape, {(0, 0): late.ref})], begun=begun.history.begin()._replace(epoch=-1)
        )

    def sealed() -> None:
        begun.history.commit(gone.snapshot_id, [FrameChange(shape, {(0, 0): late.ref})], begun=begun.history.begin())

    begun.history.writable("old")
    gone = begun.history.seal("old")
    begun.ingest.tiles("main", "kv_cache", "c", {(0, 0): array(1)})
    writes = [
        tile_write(begun, "f", 1, 1),
        stale,
        sealed,
        lambda: begun.ingest.tiles("main", "kv_cache", "c", {(0, 1): array(1).astype(np.float32)}),
        tile_write(begun, "f", 2, 2),
    ]
    seq = begun.log.head()[0]
    found = together(begun, writes)
    assert [type(error) for error in found] == [type(None), BusyError, SealedError, ConflictError, type(None)]
    assert begun.log.head()[0] == seq + 1
    assert len(batches(begun)[-1]) == 2
    assert begun.fsck().ok


@pytest.mark.parametrize("path", [LOG_PATH, "packs/"])
def test_a_failed_sync_fails_the_whole_group_and_the_next_one_works(begun: Stack, path: str) -> None:
    before, seq = begun.content(), begun.log.head()[0]
    begun.disk.faults = FaultsAt(f"sync {path}")
    errors = together(begun, [tile_write(begun, "g", row, row) for row in range(4)])
    assert [type(error) for error in errors] == [StorageError] * 4
    assert len({id(error) for error in errors}) == 4, "each thread raises an error of its own"
    assert (begun.content(), begun.log.head()[0]) == (before, seq)
    assert together(begun, [tile_write(begun, "g", row, row) for row in range(4)]) == [None] * 4
    assert begun.log.head()[0] == seq + 1
    assert begun.fsck().ok
    other = Stack(begun.disk.copy(), rng=FakeRng(5))
    assert other.content() == begun.content()
    assert other.fsck().ok


def test_an_interrupted_leader_leaves_nobody_waiting(begun: Stack) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    before = begun.content()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changing, "apply", interrupted)
        errors = together(begun, [tile_write(begun, "g", row, row) for row in range(4)])
    assert [type(error) for error in errors] == [KeyboardInterrupt, BusyError, BusyError, BusyError]
    assert begun.content() == before
    assert together(begun, [tile_write(begun, "g", row, row) for row in range(4)]) == [None] * 4
    assert begun.fsck().ok


def test_an_interruption_after_the_record_takes_nothing_back(begun: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(begun.store, "committed", interrupted)
        errors = together(begun, [tile_write(begun, "g", row, row) for row in range(4)])
    assert [type(error) for error in errors] == [KeyboardInterrupt, type(None), type(None), type(None)]
    assert [cell(begun, "main", "g", row) for row in range(4)] == [array(row).tobytes() for row in range(4)]
    begun.ingest.tiles("main", "grid", "h", {(0, 0): array(5)})
    assert begun.fsck().ok


def test_a_pack_lost_between_building_and_syncing_fails_the_commit(
    begun: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's failed sync takes the pack away when this one's pages are in it already."""
    real, before = changing.apply, begun.content()

    def losing(*arguments: object) -> bytes:
        after = real(*arguments)
        begun.store.abandon()
        return after

    with monkeypatch.context() as patch:
        patch.setattr(changing, "apply", losing)
        with pytest.raises(BusyError):
            begun.ingest.tiles("main", "grid", "g", {(0, 0): array(5)})
    assert begun.content() == before
    begun.ingest.tiles("main", "grid", "g", {(0, 0): array(5)})
    assert begun.fsck().ok
    assert Stack(begun.disk.copy()).fsck().ok


class SyncWatch(Faults):
    """Notes for each sync of a pack whether the log's lock was held."""

    def __init__(self, disk: MemDisk) -> None:
        super().__init__()
        self._disk = disk
        self.under_lock: list[bool] = []

    def run(self, kind: str, path: str, whole: Callable[[], None], part: Callable[[], None] | None = None) -> None:
        if kind == "sync" and path.startswith("packs/"):
            self.under_lock.append(self._disk.files[LOG_PATH].holder is not None)
        super().run(kind, path, whole, part)


def test_large_blobs_are_synced_before_the_lock_and_small_ones_once(begun: Stack) -> None:
    begun.disk.faults = watch = SyncWatch(begun.disk)
    begun.ingest.tiles("main", "grid", "g", {(0, 0): array(5)})
    assert watch.under_lock == [True]
    begun.ingest.tiles("main", "skills", "large", {(0, 0): np.random.default_rng(1).bytes(3 << 20)})
    assert watch.under_lock == [True, False, True]
    begun.ingest.tiles("main", "grid", "g", {(0, 1): array(6)})
    assert watch.under_lock == [True, False, True, True]


def test_a_failed_sync_before_the_lock_fails_its_batch_and_those_in_the_same_pack(begun: Stack) -> None:
    before = begun.content()
    begun.disk.faults = FaultsAt("sync packs/")
    large = np.random.default_rng(1).bytes(3 << 20)
    errors = together(
        begun, [tile_write(begun, "g", 0, 5), lambda: begun.ingest.tiles("main", "skills", "large", {(0, 0): large})]
    )
    assert [type(error) for error in errors] == [BusyError, StorageError]
    assert begun.content() == before
    begun.ingest.tiles("main", "skills", "large", {(0, 0): large})
    assert begun.at("main").document("skills", "large") == large
    assert begun.fsck().ok


def test_a_pack_is_not_finished_on_a_projection_that_lacks_a_range(
    begun: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The footer would lack its rows, and once the pack is finished nobody reads the index records."""
    monkeypatch.setattr("him.tier.warm.PACK_RANGES_MAX", 1)
    begun.projection._db.execute("DELETE FROM ranges WHERE seq = (SELECT min(seq) FROM ranges)")
    begun.ingest.tiles("main", "grid", "g", {(0, 0): array(5)})
    assert not finished_packs(begun.projection)
    begun.history.rebuild()
    begun.ingest.tiles("main", "grid", "g", {(0, 1): array(6)})
    assert begun.fsck().ok
    assert Stack(begun.disk.copy()).content() == begun.content()


def test_a_pack_is_finished_though_others_have_appended_to_it(begun: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.warm.PACK_RANGES_MAX", 1)
    pending = encode_bytes(b"put by another thread, not committed yet")
    batch = begun.history.begin()
    real = begun.store.committed

    def committed() -> None:
        real()
        begun.store.put_tile(pending, bytes(16))

    with monkeypatch.context() as patch:
        patch.setattr(begun.store, "committed", committed)
        begun.ingest.tiles("main", "grid", "g", {(0, 0): array(5)})
    assert len(finished_packs(begun.projection)) == 1
    shape = Frame("skills", "s", "bytes", 1, 1, 0, "bytes", 1, 1, 0, "none", b"", 0)
    opened = begun.history.snapshot("main").snapshot_id
    begun.history.commit(opened, [FrameChange(shape, {(0, 0): pending.ref})], begun=batch)
    other = Stack(begun.disk.copy())
    assert other.at("main").document("skills", "s").startswith(b"put by another")
    assert other.fsck().ok


def test_a_refused_lock_fails_the_one_that_asked_and_the_next_leads(begun: Stack) -> None:
    commit, asked = begun.log.commit, iter([True])

    def refuse(build: Callable[[], bytes | None]) -> int:
        if next(asked, False):
            raise StorageError("no lock")
        return commit(build)

    begun.log.commit = refuse
    errors = together(begun, [tile_write(begun, "g", row, row) for row in range(3)])
    assert [type(error) for error in errors] == [StorageError, type(None), type(None)]
    assert begun.fsck().ok


def test_one_that_is_interrupted_when_it_should_lead_hands_the_lead_on() -> None:
    queue, inside, go = Queue(), threading.Event(), threading.Event()
    queued = threading.Semaphore(0)
    queue._waiting = Announcing(queued)
    ends: list[str] = []

    def first() -> None:
        taken = queue.take()
        inside.set()
        go.wait()
        for request in taken:
            request.settle()

    def second() -> None:
        raise KeyboardInterrupt

    def third() -> None:
        for request in queue.take():
            request.settle()
        ends.append("third led")

    def enter(lead: Callable[[], None]) -> None:
        try:
            queue.pass_through(Request(SnapshotId("snp"), (), 0), lead)
        except KeyboardInterrupt:
            ends.append("second was interrupted")

    threads = [threading.Thread(target=enter, args=(lead,)) for lead in (first, second, third)]
    for thread in threads:
        thread.start()
        queued.acquire()
        inside.wait()
    go.set()
    for thread in threads:
        thread.join(60)
    assert ends == ["second was interrupted", "third led"]
    assert len(queue) == 0


# -- the projection follows from the log


def dump(projection: SqliteProjection) -> dict[str, list[tuple[object, ...]]]:
    tables = ("position", "snapshots", "attributes", "refs", "streams", "packs", "ranges")
    return {table: projection._db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables}


def finished_packs(projection: SqliteProjection) -> list[str]:
    return [pack.name for pack in projection.state().packs if pack.finished is not None]


def busy(stack: Stack) -> None:
    stack.ingest.array("main", "grid", "f", array(1, 30, 30))
    stack.history.open_snapshot(parent="main", branch="dev", tags={"a": "b"})
    stack.ingest.tiles("dev", "grid", "f", {(0, 0): array(7)})
    stack.history.seal("dev")
    stack.history.set_ref("v1", "tag", "dev")
    stack.ingest.append("main", "logs", [1, 2], writer="w")
    gone = stack.history.open_snapshot(tags={"x": "y"})
    stack.history.drop(gone.snapshot_id)
    stack.history.set_attribute("main", "k", "v")
    stack.history.set_attribute("main", "k", None)


def test_a_rebuilt_projection_equals_the_live_one(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 3_000)
    busy(stack)
    live = dump(stack.projection)
    assert finished_packs(stack.projection)
    stack.history.rebuild()
    assert dump(stack.projection) == live


def test_a_projection_of_another_history_is_built_anew() -> None:
    one, other = Stack(new_disk()), Stack(new_disk(), rng=FakeRng(5))
    for stack in (one, other):
        stack.history.declare_stream(GRID)
        busy(stack)
    other.ingest.append("main", "logs", [3], writer="w")
    for source, target in ((one, other), (other, one)):
        mixed = Stack(source.disk, rng=FakeRng(9))
        mixed.projection.restore(LiveState(), expected=None)
        mixed.projection.apply(target.history.records())
        mixed.history.refresh()
        assert dump(mixed.projection) == dump(source.projection)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE attributes SET value = 'mallory'",
        "DELETE FROM attributes",
        "UPDATE refs SET name = 'nain' WHERE name = 'main'",
        "UPDATE refs SET snapshot = (SELECT max(id) FROM snapshots)",
        "DELETE FROM ranges WHERE seq = (SELECT max(seq) FROM ranges)",
        "UPDATE packs SET number = number + 7",
        "DELETE FROM streams",
        "DELETE FROM snapshots WHERE id = (SELECT max(id) FROM snapshots)",
    ],
)
def test_a_projection_that_says_other_than_the_log_is_reported_and_rebuilt(stack: Stack, statement: str) -> None:
    busy(stack)
    assert stack.fsck().ok
    before = dump(stack.projection)
    stack.projection._db.execute(statement)
    assert dump(stack.projection) != before
    assert "differs from the log" in {fault.fault for fault in stack.fsck().errors}
    stack.history.rebuild()
    assert dump(stack.projection) == before
    assert stack.fsck().ok


# -- a repository on a real disk


def open_repo(path: Path, *, seed: int | None = None, create: bool = False) -> him.Repository:
    rng = None if seed is None else FakeRng(seed)
    return him.open(path, create=create, reader=FakeReader(), encoder=FakeEncoder(), rng=rng)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with open_repo(tmp_path / "r", create=True) as repo:
        repo.declare_stream(GRID)
        repo.writable("main").put_array("grid", array(1, 30, 30), frame="f")
        repo.create_snapshot(parent="main", branch="dev").put("skills", b"hello", frame="s")
        repo.snapshot("main").seal()
    return tmp_path / "r"


def check_place(path: Path) -> None:
    with open_repo(path) as repo:
        np.testing.assert_array_equal(repo.snapshot("main").array("grid", frame="f"), array(1, 30, 30))
        assert repo.snapshot("dev").get("skills", frame="s") == b"hello"
        assert repo.snapshot("main").info.sealed
        report = repo.fsck()
        assert report.ok, report.errors


def test_a_copied_folder_is_a_repository(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    shutil.rmtree(place)
    check_place(tmp_path / "copy")
    with open_repo(tmp_path / "copy") as repo:
        repo.writable("dev").put("skills", b"more", frame="t")
    check_place(tmp_path / "copy")


def test_a_folder_copied_while_it_is_open_is_a_repository(place: Path, tmp_path: Path) -> None:
    with open_repo(place) as repo:
        repo.writable("dev").put("skills", b"more", frame="t")
        shutil.copytree(place, tmp_path / "copy")
        repo.writable("dev").put("skills", b"yet more", frame="u")
    check_place(tmp_path / "copy")


def test_an_older_copy_put_back_beside_newer_caches_is_read_right(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "backup")
    with open_repo(place) as repo:
        for number in range(5):
            repo.writable("dev").put("skills", b"%d" % number, frame="later")
        repo._store._addresses.flush(above=0)
    for folder in ("log", "packs"):
        shutil.rmtree(place / folder)
        shutil.copytree(tmp_path / "backup" / folder, place / folder)
    with open_repo(place) as repo:
        for number in range(9):
            repo.writable("other").put("skills", b"other %d" % number, frame=f"o{number}")
        for number in range(9):
            assert repo.snapshot("other").get("skills", frame=f"o{number}") == b"other %d" % number
    check_place(place)


def test_deleting_the_cache_loses_nothing(place: Path) -> None:
    with open_repo(place) as repo:
        repo._store._addresses.flush(above=0)
    shutil.rmtree(place / "cache")
    check_place(place)


def test_deleting_the_cache_of_an_open_repository_loses_nothing(place: Path) -> None:
    with open_repo(place) as repo:
        repo.snapshot("main").array("grid", frame="f")
        shutil.rmtree(place / "cache")
        repo.writable("dev").put("skills", b"after", frame="after")
        assert repo.snapshot("dev").get("skills", frame="after") == b"after"
        with open_repo(place) as other:
            other.writable("dev").put("skills", b"other", frame="other")
            assert other.snapshot("dev").get("skills", frame="after") == b"after"
        assert repo.snapshot("dev").get("skills", frame="other") == b"other"
    check_place(place)


@pytest.mark.parametrize("name", ["projection.sqlite", "memo.sqlite"])
@pytest.mark.parametrize("spoil", ["garbage", "empty", "half", "pages"])
def test_a_damaged_cache_file_costs_time_alone(place: Path, name: str, spoil: str) -> None:
    path = place / "cache" / name
    data = path.read_bytes()
    wrong = {
        "garbage": b"not a database at all" * 300,
        "empty": b"",
        "half": data[: len(data) // 2 + 100],
        "pages": data[:4096] + b"\xff" * (len(data) - 4096),
    }[spoil]
    for suffix in ("-wal", "-shm"):
        path.with_name(name + suffix).unlink(missing_ok=True)
    path.write_bytes(wrong)
    check_place(place)


def test_a_memo_that_breaks_while_in_use_only_forgets(tmp_path: Path) -> None:
    memo = SqliteMemo(tmp_path / "memo.sqlite")
    memo.put("k", [(b"%d" % n, bytes(1000)) for n in range(100)])
    assert memo.get("k", b"5") == bytes(1000)
    memo._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    memo._db.execute("PRAGMA cache_size=1")
    size = (tmp_path / "memo.sqlite").stat().st_size
    with (tmp_path / "memo.sqlite").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    assert all(memo.get("k", b"%d" % n) in (None, bytes(1000)) for n in range(100))
    memo.put("k", [(b"new", b"x")])
    memo.close()


def test_a_marker_that_is_no_marker_or_newer(place: Path) -> None:
    whole = (place / "him.json").read_bytes()
    marker = parsed(whole, "him.json")
    newer = msgspec.structs.replace(marker, format=9).encoded()
    (place / "him.json").write_bytes(newer)
    with pytest.raises(VersionError, match="format 9"):
        open_repo(place)
    (place / "him.json").write_bytes(newer.replace(b'"format":9', b'"format":8'))
    with pytest.raises(IntegrityError):
        open_repo(place)
    # Formats 1 and 2 had no digest.
    (place / "him.json").write_bytes(msgspec.json.encode(marker) + b"\n")
    with open_repo(place):
        pass
    (place / "him.json").write_bytes(b"{")
    with pytest.raises(IntegrityError):
        open_repo(place)


def test_an_interrupted_creation_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(path: Path, at: int) -> int:
        """Create a repository, interrupted at the `at`-th call of its disk; how many calls there were."""
        calls = 0
        with monkeypatch.context() as patch:
            for name in ("open", "write_whole", "sync_folder"):
                real = getattr(LocalDisk, name)

                def count(self: LocalDisk, *args: object, real=real, **more: object) -> object:
                    nonlocal calls
                    calls += 1
                    if calls == at:
                        raise KeyboardInterrupt
                    return real(self, *args, **more)

                patch.setattr(LocalDisk, name, count)
            with contextlib.suppress(KeyboardInterrupt):
                open_repo(path, create=True).close()
        return calls

    for at in range(1, create(tmp_path / "whole", 0) + 1):
        create(tmp_path / f"r{at}", at)
        with open_repo(tmp_path / f"r{at}", create=True) as repo:
            repo.writable("main").put("skills", b"x", frame="s")
            assert repo.fsck().ok


@pytest.mark.parametrize(
    "name", ["notes.txt", "log/notes.txt", "log/000001.log", "packs/x.pack", "him.json.bak", "log/a/b"]
)
def test_a_folder_with_anything_in_it_is_not_taken(tmp_path: Path, name: str) -> None:
    file = tmp_path / "r" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"precious")
    with pytest.raises(ConflictError):
        open_repo(tmp_path / "r", create=True)
    assert file.read_bytes() == b"precious"


def test_the_open_file_limit_is_not_reached_by_many_failures(place: Path) -> None:
    with open_repo(place) as repo:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(30):
            repo.writable("dev").put("skills", os.urandom(9), frame="s")
            with pytest.raises(ConflictError):
                repo.create_snapshot(branch="main")
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4


# -- several at once


def test_two_repositories_in_one_process_see_each_other_at_once(place: Path) -> None:
    with open_repo(place) as one, open_repo(place) as two:
        for number in range(10):
            writer, reader = (one, two) if number % 2 else (two, one)
            writer.writable("dev").put("skills", b"%d" % number, frame=f"n{number}")
            assert reader.snapshot("dev").get("skills", frame=f"n{number}") == b"%d" % number
        assert len(list((place / "packs").iterdir())) == 2, "each writes to a pack of its own"
    check_place(place)


def test_threads_of_one_repository_lose_nothing(place: Path) -> None:
    failures: list[BaseException] = []
    with open_repo(place) as repo:

        def write(thread: int) -> None:
            try:
                for number in range(12):
                    repo.writable("dev").put("skills", b"%d %d" % (thread, number), frame=f"t{thread}-{number}")
            except BaseException as error:  # noqa: BLE001 - told to the main thread
                failures.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        for thread in range(4):
            for number in range(12):
                assert repo.snapshot("dev").get("skills", frame=f"t{thread}-{number}") == b"%d %d" % (thread, number)
    check_place(place)


def _write_some(path: str, name: str, count: int) -> None:
    with open_repo(Path(path)) as repo:
        for number in range(count):
            while True:
                try:
                    repo.writable("dev").put("skills", f"{name} {number}".encode(), frame=f"{name}-{number}")
                    break
                except SealedError:
                    # The other process sealed it in between: the branch has a child by now, or gets one.
                    continue
            if number % 5 == 4:
                repo.snapshot("dev").seal()


def test_two_processes_writing_at_once_lose_nothing(place: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_write_some, args=(str(place), name, 20)) for name in ("p", "q")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    with open_repo(place) as repo:
        for name in ("p", "q"):
            for number in range(20):
                assert repo.snapshot("dev").get("skills", frame=f"{name}-{number}") == f"{name} {number}".encode()
        assert len({one.lamport for one in repo.snapshots() if one.sealed}) == sum(
            one.sealed for one in repo.snapshots()
        )
    check_place(place)


def test_a_pack_is_not_continued_on_an_older_view(place: Path) -> None:
    """A process that committed and died must not be cut off by one that looked before."""
    with open_repo(place) as slow:
        with open_repo(place) as quick:
            quick.writable("dev").put("skills", b"one", frame="one")
            quick.writable("dev").put("skills", b"two", frame="two")
        # A process killed after its commit, before its projection: the view ends one record behind the log.
        records = list(slow._history.records())
        slow._projection.restore(LiveState(), expected=None)
        slow._projection.apply(records[:-1])
        slow._history.writable("dev")
        slow._store.put_tile(encode_bytes(b"unrelated"), bytes(16))
        assert slow.snapshot("dev").get("skills", frame="two") == b"two"
        slow.writable("dev").put("skills", b"three", frame="three")
    check_place(place)
    with open_repo(place) as repo:
        assert [repo.snapshot("dev").get("skills", frame=name) for name in ("one", "two", "three")] == [
            b"one",
            b"two",
            b"three",
        ]


# -- the log


def filled_log(count: int = 6) -> tuple[MemDisk, list[bytes]]:
    disk = new_disk()
    log = FileLog(disk)
    bodies = [b"record %d " % number * (number + 1) for number in range(count)]
    for body in bodies:
        log.commit(lambda body=body: body)
    return disk, bodies


def bodies_of(log: FileLog, since: int = 0) -> list[bytes]:
    return [body for _, _, body in log.read(since)]


def test_records_come_back_in_order_from_anywhere() -> None:
    disk, bodies = filled_log()
    log = FileLog(disk)
    for since in range(len(bodies) + 2):
        assert bodies_of(log, since) == bodies[since:]
        assert [seq for seq, _, _ in log.read(since)] == list(range(since + 1, len(bodies) + 1))
    hashes = [digest for _, digest, _ in log.read(0)]
    assert log.head() == (len(bodies), hashes[-1])
    assert [log.hash_at(seq) for seq in range(len(bodies) + 1)] == [bytes(32), *hashes]
    assert len(set(hashes)) == len(hashes)


def test_the_format_of_a_record_is_pinned() -> None:
    disk, _ = filled_log(2)
    assert (
        blake3(bytes(disk.files[LOG_PATH].now)).hexdigest()
        == "2b6ee3295f34f0c99a02cddce9cce477b3dc2f476f6b6ca5749aaf3b87bf9242"
    )
    assert (
        blake3(bytes(disk.files[END_PATH].now)).hexdigest()
        == "c46d1457bbb079ccdbff4feaf04d2d9233b3b8aa862da7bc4cdd0f2917e9b246"
    )


def test_nothing_built_nothing_written() -> None:
    disk, bodies = filled_log()
    log = FileLog(disk)
    before = bytes(disk.files[LOG_PATH].now)
    assert log.commit(lambda: None) == len(bodies)
    assert bytes(disk.files[LOG_PATH].now) == before


def test_a_torn_last_record_is_cut_at_every_length() -> None:
    disk, bodies = filled_log()
    whole = bytes(disk.files[LOG_PATH].now)
    end = bytes(disk.files[END_PATH].now)
    log = FileLog(disk)
    log.commit(lambda: b"the last record, HLOG in its midst")
    longer = bytes(disk.files[LOG_PATH].now)
    for size in range(len(whole), len(longer) + 1):
        left = MemDisk()
        for path, data in ((LOG_PATH, longer[:size]), (END_PATH, end)):
            left.open(path, create=True).write_at(0, data)
        found = FileLog(left)
        wanted = [*bodies, b"the last record, HLOG in its midst"] if size == len(longer) else bodies
        assert bodies_of(found) == wanted
        assert found.commit(lambda: b"next") == len(wanted) + 1
        assert bodies_of(FileLog(left)) == [*wanted, b"next"]


def test_every_flipped_bit_before_the_end_is_reported_with_its_place() -> None:
    disk, bodies = filled_log(4)
    log = FileLog(disk)
    data = disk.files[LOG_PATH].now
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        with pytest.raises(IntegrityError) as caught:
            list(log.read(0))
        assert caught.value.place.startswith(LOG_PATH)
        assert caught.value.object.startswith("record ")
        data[at] ^= 1 << at % 8
    assert bodies_of(log) == bodies


def test_rot_is_reported_and_never_cut_even_without_an_end_file() -> None:
    disk, _bodies = filled_log(4)
    size = len(disk.files[LOG_PATH].now)
    for at in range(0, size // 2, 7):
        left = disk.copy()
        left.files[LOG_PATH].now[at] ^= 4
        left.files[END_PATH].now.clear()
        with pytest.raises(IntegrityError):
            log = FileLog(left)
            log.commit(lambda: b"more")
        assert len(left.files[LOG_PATH].now) == size


def test_a_damaged_end_file_recovers_for_readers_and_writers() -> None:
    disk, bodies = filled_log()
    for at in range(len(disk.files[END_PATH].now)):
        left = disk.copy()
        left.files[END_PATH].now[at] ^= 16
        log = FileLog(left)
        assert bodies_of(log) == bodies
        assert log.commit(lambda: b"more") == len(bodies) + 1
        assert bodies_of(FileLog(left)) == [*bodies, b"more"]
    for size in range(len(disk.files[END_PATH].now)):
        left = disk.copy()
        del left.files[END_PATH].now[size:]
        assert bodies_of(FileLog(left)) == bodies


def test_an_end_file_that_breaks_under_an_open_log_is_mended() -> None:
    disk, bodies = filled_log()
    log = FileLog(disk)
    disk.files[END_PATH].now[3] ^= 1
    assert bodies_of(log) == bodies
    log.commit(lambda: b"more")
    assert bodies_of(FileLog(disk.copy())) == [*bodies, b"more"]


def test_a_record_too_large_is_refused_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_log, "LOG_RECORD_BYTES_MAX", 100)
    disk = new_disk()
    log = FileLog(disk)
    with pytest.raises(HimError):
        log.commit(lambda: bytes(101))
    assert log.commit(lambda: b"fits") == 1


def test_a_missing_log_is_an_integrity_error() -> None:
    with pytest.raises(IntegrityError):
        FileLog(MemDisk())


def test_readers_never_pass_the_published_end() -> None:
    disk, bodies = filled_log()
    reader = FileLog(disk)
    writer = FileLog(disk)

    def build() -> bytes:
        assert bodies_of(reader) == bodies
        return b"more"

    writer.commit(build)
    assert bodies_of(reader) == [*bodies, b"more"]


def test_an_exception_while_building_leaves_nothing() -> None:
    disk, bodies = filled_log()
    log = FileLog(disk)

    def build() -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log.commit(build)
    assert bodies_of(log) == bodies
    assert log.commit(lambda: b"next") == len(bodies) + 1


def test_a_locked_log_waits_for_its_holder(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    FileLog.create(disk)
    other = disk.open(LOG_PATH)
    assert other.lock(wait=False)
    log = FileLog(disk)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (log.commit(lambda: b"x"), done.set()))
    thread.start()
    assert not done.wait(0.05)
    other.unlock()
    thread.join(10)
    assert done.is_set()


def test_one_waiter_stands_before_the_lock_and_the_others_queue_behind_it(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    FileLog.create(disk)
    holder, turn = disk.open(LOG_PATH), disk.open(TURN_PATH)
    assert holder.lock(wait=False)
    logs = [FileLog(disk), FileLog(disk)]
    order: list[int] = []
    threads = [threading.Thread(target=log.commit, args=(lambda n=n: order.append(n),)) for n, log in enumerate(logs)]
    threads[0].start()
    while turn.lock(wait=False):
        turn.unlock()  # Until the first has taken its turn.
    threads[1].start()
    assert not order
    holder.unlock()
    threads[0].join(10)
    assert order[0] == 0
    # Who had the lock has to pass the turnstile again, and it is free.
    threads[1].join(10)
    assert order == [0, 1]
    assert turn.lock(wait=False)


# -- what a real disk refuses


def test_a_real_full_disk_gives_one_clear_error_and_loses_nothing(place: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the kernel refuses to let a file grow."""
    script = f"""
import resource, signal, sys
sys.path[:0] = [{str(ROOT / "src")!r}, {str(ROOT / "tests")!r}]
import him, os
from fakes import FakeEncoder, FakeReader
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
repo = him.open({str(place)!r}, reader=FakeReader(), encoder=FakeEncoder())
repo.writable("dev").put("skills", b"before", frame="before")
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    repo.writable("dev").put("skills", os.urandom(100_000), frame="large")
except him.HimError as error:
    print(error.kind, "|", error.line())
repo.writable("dev").put("skills", b"after", frame="after")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("storage |")
    check_place(place)
    with open_repo(place) as repo:
        assert repo.snapshot("dev").get("skills", frame="after") == b"after"
        with pytest.raises(NotFoundError):
            repo.snapshot("dev").get("skills", frame="large")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_readable(place: Path) -> None:
    for path in [place, *place.rglob("*")]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        with open_repo(place) as repo:
            assert repo.read_only
            assert repo.snapshot("dev").get("skills", frame="s") == b"hello"
            with pytest.raises(HimError):
                repo.writable("dev").put("skills", b"x", frame="x")
    finally:
        for path in [place, *place.rglob("*")]:
            path.chmod(0o700)


def test_reading_through_a_read_only_disk_works(place: Path) -> None:
    disk = LocalDisk(place, read_only=True)
    log = FileLog(disk, read_only=True)
    assert log.head()[0] > 3
    projection = SqliteProjection(None)
    from him.catalog.history import History
    from him.tier.warm import WarmStore

    store = WarmStore(disk, projection, FakeRng(), bytes(16))
    history = History(log, projection, store, DictMemo(), FakeClock(), FakeRng(), "t")
    reader = SnapshotReader(store, DictMemo(), history.snapshot("dev").directory)
    assert reader.document("skills", "s") == b"hello"
    with pytest.raises(HimError):
        history.writable("new")


@pytest.mark.parametrize("rule", [*RULES])
def test_levels_above_one_colour_are_read_though_nothing_of_them_is_stored(rule: str) -> None:
    """A level made of equal tiles may be equal to the one below it: known by name, and nowhere stored."""
    stack = Stack(new_disk())
    stack.history.declare_stream(StreamSpec("n", tile_height=8, tile_width=8, dtype="uint8", level_rule=rule))
    stack.ingest.tiles("main", "n", "f", {(y, x): np.full((8, 8), 7, np.uint8) for y in range(8) for x in range(8)})
    for level in (1, 2, 3):
        values = np.asarray(stack.at("main").tile(TileKey("n", "f", level, 0, 0)))
        assert (values == 7).all()
        assert values.shape[:2] == (8, 8)
        assert not values.flags.writeable
    stack.close()
