"""Checkpoints: what the log leaves standing, from the log alone, so that opening never reads all of it."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from fakes import FakeClock, FakeRng, Faults, MemDisk, MemFile, Stack, new_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from him.adapters.sqlite import SqliteProjection
from him.catalog import checkpoint
from him.catalog.checkpoint import Fold
from him.catalog.log import CHECKPOINT_FOLDER, END_PATH, LOG_PATH, FileLog
from him.errors import HimError, IntegrityError
from him.pack import format as layout
from him.pack import merkle
from him.tier import warm
from him.types import (
    AttributeSet,
    Batch,
    BlobId,
    CommitRecord,
    LiveState,
    Operation,
    PackFinished,
    PackRange,
    Parent,
    RefSet,
    Sealed,
    SnapshotDropped,
    SnapshotId,
    SnapshotOpened,
    StreamDeclared,
    StreamSpec,
    TileKey,
)

EVERY = 5
GRID = StreamSpec("grid", tile_height=8, tile_width=8, dtype="uint8")


def array(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.catalog.history.CHECKPOINT_RECORDS", EVERY)
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 8_000)


def write(stack: Stack, count: int, *, first: int = 0) -> None:
    for number in range(first, first + count):
        stack.ingest.tiles("main", "grid", f"f{number % 3}", {(number, 0): array(number)})


def filled(count: int = 4 * EVERY + 2) -> Stack:
    """A repository of several checkpoints, finished packs, and every kind of record."""
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)
    write(stack, count // 2)
    stack.history.open_snapshot(parent="main", branch="dev", tags={"b": "2", "a": "1"}, provenance={"z": "1", "y": "2"})
    stack.history.seal("dev")
    gone = stack.history.open_snapshot(tags={"x": "y"})
    stack.history.drop(gone.snapshot_id)
    stack.history.set_ref("v1", "tag", "dev")
    write(stack, count - count // 2, first=count // 2)
    assert any(pack.finished for pack in stack.projection.state().packs)
    return stack


def files(disk: MemDisk) -> dict[int, bytes]:
    folder = f"{CHECKPOINT_FOLDER}/"
    return {int(path.removeprefix(folder)): bytes(f.now) for path, f in disk.files.items() if path.startswith(folder)}


def path_of(seq: int) -> str:
    return f"{CHECKPOINT_FOLDER}/{seq:016d}"


def fold(stack: Stack, up_to: int | None = None) -> LiveState:
    made = Fold()
    made.apply(record for record in stack.history.records() if up_to is None or record[0] <= up_to)
    return made.state()


def reopened(disk: MemDisk) -> Stack:
    return Stack(disk, rng=FakeRng(99), clock=FakeClock(1_800_000_000_000_000_000))


def rot_beginning(disk: MemDisk) -> None:
    """The first records are gone, as if a bad sector lay there."""
    disk.files[LOG_PATH].now[10:400] = bytes(390)


# -- one meaning: the fold, the projection, the checkpoint


NAMES = [SnapshotId(f"snp_{n}") for n in range(4)]
ids = st.sampled_from(NAMES)
small = st.integers(0, 3)
operations = st.one_of(
    st.builds(
        SnapshotOpened, ids, st.lists(st.builds(Parent, ids, st.binary(max_size=3)), max_size=2).map(tuple), small,
        st.just("w"), st.binary(max_size=4), st.just("lww"), st.dictionaries(st.text(max_size=2), st.text(max_size=2)),
    ),
    st.builds(Batch, ids, st.binary(max_size=4), st.binary(max_size=4)),
    st.builds(Sealed, ids, st.binary(max_size=4), st.binary(max_size=4), small),
    st.builds(RefSet, st.sampled_from("ab"), st.sampled_from(["branch", "tag"]), st.one_of(ids, st.just(""))),
    st.builds(AttributeSet, ids, st.sampled_from("kl"), st.one_of(st.none(), st.text(max_size=3))),
    st.builds(SnapshotDropped, ids),
    st.builds(StreamDeclared, st.builds(StreamSpec, st.sampled_from("st"), tile_height=st.integers(1, 4))),
)  # fmt: skip


def with_packs(batches: list[list[Operation]], rng: random.Random) -> list[CommitRecord]:
    """Records of the operations, and among them ranges of packs that grow and are finished."""
    ends: dict[str, int] = {}
    records: list[CommitRecord] = []
    for number, batch in enumerate(batches):
        more: list[Operation] = []
        name = f"packs/{rng.randrange(3) + number // 6}.pack"
        if rng.random() < 0.7:
            start = ends.get(name, 128)
            ends[name] = start + rng.randrange(1, 9) * 64
            more.append(PackRange(name, start, ends[name] - 64, ends[name], bytes([number % 256]) * 32))
        if name in ends and rng.random() < 0.2:
            more.append(PackFinished(name, ends.pop(name), bytes(32)))
        records.append(CommitRecord(number, "w", (*more, *batch)))
    return records


def hashed(records: list[CommitRecord]) -> list[tuple[int, bytes, CommitRecord]]:
    return [(seq, bytes([seq % 256]) * 32, record) for seq, record in enumerate(records, 1)]


@given(st.lists(st.lists(operations, max_size=3), max_size=25), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_projection_means_what_the_fold_means(batches: list[list[Operation]], rng: random.Random) -> None:
    records = hashed(with_packs(batches, rng))
    projection, whole = SqliteProjection(None), Fold()
    projection.apply(records)
    whole.apply(records)
    assert projection.state() == whole.state()
    # From any checkpoint on, by either way, it comes to the same.
    at = rng.randrange(len(records) + 1)
    part = Fold()
    part.apply(records[:at])
    body = checkpoint.encode(part.state())
    rest = Fold(part.state())
    rest.apply(records[at:])
    assert rest.state() == whole.state()
    assert checkpoint.encode(rest.state()) == checkpoint.encode(whole.state()) == checkpoint.encode(projection.state())
    restored = SqliteProjection(None)
    restored.apply(hashed(with_packs([[RefSet("old", "tag", NAMES[0])]], rng)))
    assert restored.restore(part.state(), expected=restored.position())
    assert restored.state() == part.state()
    restored.apply(records)
    assert restored.state() == whole.state()
    assert checkpoint.encode(Fold(part.state()).state()) == body


def test_a_checkpoint_is_a_pure_function_of_the_log() -> None:
    stack = filled()
    for seq, data in files(stack.disk).items():
        end = FileLog(stack.disk)._end_of(seq)
        mark = checkpoint.Mark(seq, end, stack.log.hash_at(seq))
        assert data == checkpoint.encode_file(mark, checkpoint.encode(fold(stack, seq)))


def test_a_damaged_projection_does_not_spoil_a_checkpoint() -> None:
    stack = filled(2 * EVERY)
    stack.projection._db.execute("UPDATE refs SET snapshot = 'snp_mallory' WHERE name = 'v1'")
    write(stack, EVERY + 1, first=100)
    newest = max(files(stack.disk))
    assert checkpoint.load(stack.log, newest) == fold(stack, newest)


# -- when they are written


def test_one_is_written_at_every_mark_and_the_two_newest_are_kept() -> None:
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)
    seen: list[int] = []
    for number in range(6 * EVERY):
        write(stack, 1, first=number)
        kept = sorted(files(stack.disk))
        seen += [seq for seq in kept if seq not in seen]
        assert len(kept) <= 2
        assert kept == seen[-2:]
        head = stack.log.head()[0]
        assert max(kept, default=0) == head // EVERY * EVERY
    assert all(seq % EVERY == 0 for seq in seen)
    # Another process finds it there, and does not write it again.
    while stack.log.head()[0] % EVERY != 1:
        write(stack, 1, first=100 + stack.log.head()[0])
    newest = max(files(stack.disk))
    again = reopened(stack.disk.copy())
    write(again, 1, first=90)
    assert again.log.head()[0] // EVERY * EVERY == newest
    assert not [kind for kind in again.disk.faults.kinds if CHECKPOINT_FOLDER in kind]


def test_one_that_could_not_be_written_is_no_error_and_made_up_for_later() -> None:
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)

    class NoRoom(Faults):
        def run(self, kind: str, path: str, whole: Callable[[], None], part: Callable[[], None] | None = None) -> None:
            self.at = self.count + 1 if path.startswith(CHECKPOINT_FOLDER) else None
            super().run(kind, path, whole, part)

    stack.disk.faults = NoRoom()
    write(stack, 2 * EVERY)
    assert any(CHECKPOINT_FOLDER in kind for kind in stack.disk.faults.kinds)
    assert not files(stack.disk)
    stack.disk.faults = Faults()
    # Another process: it has not gone past a mark yet, and looks at the first commit.
    other = reopened(stack.disk.copy())
    write(other, 1, first=50)
    assert list(files(other.disk)) == [other.log.head()[0] // EVERY * EVERY]
    assert other.fsck().ok


def test_it_is_written_by_no_one_who_holds_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)
    put, free = stack.log.put_checkpoint, list[bool]()

    def watched(seq: int, body: bytes) -> None:
        free.append(stack.disk.files[LOG_PATH].holder is None and not stack.history._turn.locked())
        put(seq, body)

    monkeypatch.setattr(stack.log, "put_checkpoint", watched)
    write(stack, 2 * EVERY)
    assert free
    assert all(free)


# -- what they are for


class CountingDisk(MemDisk):
    """Counts what is read of the log."""

    def __init__(self, other: MemDisk) -> None:
        super().__init__(volume=other.volume.copy())
        self.log_bytes = 0
        self.log_reads = 0

    def open(self, path: str, *, create: bool = False) -> MemFile:
        file = super().open(path, create=create)
        if path == LOG_PATH:
            read = file.read_at

            def counted(offset: int, size: int) -> bytes:
                data = read(offset, size)
                self.log_bytes += len(data)
                self.log_reads += 1
                return data

            file.read_at = counted
        return file


def test_a_missing_projection_is_restored_from_the_newest_and_the_tail() -> None:
    stack = filled(20 * EVERY)
    size = len(stack.disk.files[LOG_PATH].now)
    disk = CountingDisk(stack.disk)
    again = reopened(disk)
    assert again.projection.state() == stack.projection.state() == fold(stack)
    assert disk.log_bytes < size / 10
    assert again.content() == stack.content()
    # Without checkpoints everything is read, to the same end.
    for seq in files(disk):
        disk.remove(path_of(seq))
    disk.log_bytes = 0
    assert reopened(disk).projection.state() == stack.projection.state()
    assert disk.log_bytes >= size


@pytest.mark.parametrize("left", ["nothing", "half"])
def test_a_lost_end_is_found_without_walking_far(left: str) -> None:
    stack = filled(60 * EVERY)
    size = len(stack.disk.files[LOG_PATH].now)
    disk = CountingDisk(stack.disk)
    del disk.files[END_PATH].now[0 if left == "nothing" else 40 :]
    log = FileLog(disk)
    assert log.head() == stack.log.head()
    assert disk.log_bytes < size / 10


def test_offsets_are_found_from_the_nearest_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.catalog.log._WALK_MAX", 1)
    stack = filled(4 * EVERY)
    disk = CountingDisk(stack.disk)
    log, hashes = FileLog(disk), [digest for _, digest, _ in stack.log.read(0)]
    for mark in files(disk):
        for seq in (mark, mark - 1):
            disk.log_reads = 0
            assert log.hash_at(seq) == hashes[seq - 1]
            # Two to see whether the log holds the checkpoints, the hash, and a length for each record walked back.
            assert disk.log_reads <= 3 + mark - seq


def test_a_rotten_beginning_is_bridged_and_reported() -> None:
    stack = filled()
    content = stack.content()
    rot_beginning(stack.disk)
    again = reopened(stack.disk.copy())
    assert again.content() == content
    write(again, 3, first=70)
    assert np.array_equal(again.at("main").tile(TileKey("grid", "f1", 0, 70, 0)), array(70))
    (fault,) = again.fsck().errors
    assert fault.place.startswith(LOG_PATH)
    assert "taken from the checkpoint" in fault.fault
    before = again.projection.state()
    again.history.rebuild()
    again.store.forget_addresses()
    assert again.projection.state() == before
    assert len(again.fsck().errors) == 1


@pytest.mark.parametrize("where", ["body", "length"])
def test_one_who_is_behind_is_taken_over_the_rot(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 1 << 30)
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)
    write(stack, EVERY)
    slow = reopened(stack.disk)
    at = slow.projection.position()[0]
    while stack.log.head()[0] < 2 * EVERY:
        write(stack, 1, first=40 + stack.log.head()[0])
    # Not so far behind that it would be restored without trying to read on.
    assert at + EVERY >= stack.log.head()[0]
    end = stack.log._end_of(at + 1)
    at = end - (80 if where == "body" else 4)
    stack.disk.files[LOG_PATH].now[at : at + 4] = b"\xff" * 4
    assert slow.content() == stack.content()
    assert slow.projection.state() == stack.projection.state()


def test_rot_that_no_checkpoint_bridges_bars_opening_or_rebuilding() -> None:
    stack = filled()
    for seq in files(stack.disk):
        stack.disk.remove(path_of(seq))
    rot_beginning(stack.disk)
    with pytest.raises(IntegrityError):
        reopened(stack.disk.copy())
    # One whose projection stands goes on, and a failed rebuild does not take it away.
    before = stack.projection.state()
    with pytest.raises(IntegrityError):
        stack.history.rebuild()
    assert stack.projection.state() == before


def test_a_sound_log_is_rebuilt_from_its_beginning_whatever_a_checkpoint_says() -> None:
    stack = filled()
    newest = max(files(stack.disk))
    state = checkpoint.load(stack.log, newest)
    lie = LiveState(state.seq, state.hash, state.lamport, state.snapshots, (("lie", "tag", "snp_x"),))
    stack.log.put_checkpoint(newest, checkpoint.encode(lie))
    assert [(fault.object, fault.fault) for fault in stack.fsck().errors] == [
        (f"checkpoint {newest}", "differs from the log")
    ]
    assert "lie" in reopened(stack.disk).history.refs()
    stack.history.rebuild()
    assert stack.projection.state() == fold(stack)


def test_every_flipped_bit_of_a_checkpoint_is_found_and_passed_over() -> None:
    stack = filled()
    newest, older = sorted(files(stack.disk), reverse=True)
    data = stack.disk.files[path_of(newest)].now
    whole, rng = bytes(data), random.Random(1)
    for at in {*range(checkpoint.HEAD_BYTES), *rng.sample(range(len(data)), 200)}:
        data[at] ^= 1 << rng.randrange(8)
        with pytest.raises(HimError):
            checkpoint.load(stack.log, newest)
        assert checkpoint.newest(stack.log).seq == older
        if at % 40 == 0:
            assert reopened(stack.disk.copy()).projection.state() == stack.projection.state()
            (fault,) = stack.fsck().errors
            assert fault.object == f"checkpoint {newest}"
            assert "delete" in fault.fix
        data[:] = whole
    assert stack.fsck().ok
    for cut in (0, 1, checkpoint.HEAD_BYTES, len(data) - 1):
        left = stack.disk.copy()
        del left.files[path_of(newest)].now[cut:]
        assert checkpoint.newest(reopened(left).log).seq == older


def test_when_all_are_damaged_the_whole_log_is_read() -> None:
    stack = filled()
    for seq in files(stack.disk):
        stack.disk.files[path_of(seq)].now[80] ^= 1
    again = reopened(stack.disk.copy())
    assert again.projection.state() == stack.projection.state()
    assert len(again.fsck().errors) == 2


def test_a_checkpoint_of_another_log_is_passed_over() -> None:
    stack, other = filled(), Stack(new_disk(), rng=FakeRng(7))
    other.history.declare_stream(GRID)
    write(other, 9 * EVERY)
    state = stack.projection.state()
    for seq in files(stack.disk):
        stack.disk.remove(path_of(seq))
    for seq, data in files(other.disk).items():
        assert seq > stack.log.head()[0]
        stack.disk.write_whole(path_of(seq), data)
    # Beyond the head they are not even looked at …
    again = reopened(stack.disk)
    assert again.log.checkpoints() == []
    assert again.projection.state() == state
    # … and once the log has grown so far, they are known for what they are, and replaced.
    write(again, 6 * EVERY, first=200)
    assert again.projection.state() == fold(again)
    newest = max(files(again.disk))
    assert checkpoint.load(again.log, newest) == fold(again, newest)
    assert again.fsck().ok
    # One of the same record of another log is sound in itself.
    while newest not in files(other.disk):
        write(other, 1, first=500 + other.log.head()[0])
    again.disk.write_whole(path_of(newest), files(other.disk)[newest])
    with pytest.raises(IntegrityError, match="not of this log"):
        checkpoint.load(again.log, newest)
    assert checkpoint.newest(again.log).seq < newest


def test_an_older_copy_of_the_log_beside_newer_checkpoints_is_read_right() -> None:
    stack = filled(2 * EVERY)
    left = stack.disk.copy()
    write(stack, 4 * EVERY, first=300)
    for seq, data in files(stack.disk).items():
        left.write_whole(path_of(seq), data)
    again = reopened(left)
    assert again.projection.state() == fold(again)
    write(again, 5 * EVERY, first=400)
    assert again.fsck().ok
    assert checkpoint.newest(again.log) == fold(again, max(files(left)))


# -- the projection keeps what lives


def test_ranges_of_finished_packs_are_dropped_and_the_footer_is_read_instead() -> None:
    stack = filled(8 * EVERY)
    state = stack.projection.state()
    finished = [pack for pack in state.packs if pack.finished]
    assert len(finished) > 3
    assert all(not pack.ranges for pack in finished)
    changes = stack.projection.pack_changes(0)
    assert sum(isinstance(change, PackFinished) for _, change in changes) == len(finished)
    assert [seq for seq, _ in changes] == sorted(seq for seq, _ in changes)
    growing = sum(len(pack.ranges) for pack in state.packs)
    again = reopened(stack.disk.copy())
    reads: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("read_index", "read_footer"):
            real = getattr(warm, name)
            patch.setattr(warm, name, lambda file, named, real=real, name=name: reads.append(name) or real(file, named))
        assert again.content() == stack.content()
    assert (reads.count("read_footer"), reads.count("read_index")) == (len(finished), growing)


@pytest.mark.parametrize("damaged", ["footer", "trailer", "index record"])
def test_a_damaged_list_of_a_pack_makes_nothing_unreadable(damaged: str) -> None:
    """The records say themselves what they are: one bit in a list must not bar the whole repository."""
    stack = filled(4 * EVERY)
    packs = stack.projection.state().packs
    if damaged == "index record":
        pack = next(pack for pack in packs if pack.ranges)
        at = pack.ranges[0][1].index_offset + 300
    else:
        pack = next(pack for pack in packs if pack.finished)
        size = len(stack.disk.files[pack.name].now)
        at = size - (100 if damaged == "trailer" else 300)
    stack.disk.files[pack.name].now[at] ^= 8
    again = reopened(stack.disk.copy())
    assert again.content() == stack.content()
    write(again, 2, first=90)
    places = [fault.place for fault in again.fsck().errors]
    assert places
    assert all(place.startswith(pack.name) for place in places)


def test_a_missing_pack_is_named() -> None:
    stack = filled(4 * EVERY)
    for pack in stack.projection.state().packs[:2]:
        left = stack.disk.copy()
        left.remove(pack.name)
        again = reopened(left)
        with pytest.raises(IntegrityError) as caught:
            again.content()
        assert caught.value.place == pack.name


def test_one_who_followed_every_commit_reads_no_footer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("its ranges were known already")

    monkeypatch.setattr("him.tier.warm.read_footer", refuse)
    stack = filled(4 * EVERY)
    for number in range(4 * EVERY):
        assert (
            stack.at("main").tile(TileKey("grid", f"f{number % 3}", 0, number, 0)).tobytes() == array(number).tobytes()
        )


def test_a_record_that_brought_no_rows_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = filled()
    stack.history.set_ref("v9", "tag", "main")
    unknown, asked = BlobId(bytes(32)), list[int]()
    real = stack.projection.pack_changes
    monkeypatch.setattr(stack.projection, "pack_changes", lambda since: asked.append(since) or real(since))
    for _ in range(3):
        assert not stack.store.has(unknown)
    assert len(asked) <= 1


def test_packs_have_the_same_numbers_after_any_restoring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.address.ADDRESS_TAIL_ROWS", 10)
    stack = filled(6 * EVERY)
    names = stack.projection.packs(0)
    assert len(names) > 3
    segments = {path for path in stack.disk.files if path.endswith(".seg")}
    assert segments
    for make in (reopened, lambda disk: (one := reopened(disk), one.history.rebuild())[0]):
        again = make(stack.disk.copy())
        assert again.projection.packs(0) == names
        assert again.projection.packs(2) == names[2:]
        # The segments of the first process are read with these numbers.
        assert again.content() == stack.content()
        assert segments <= set(again.disk.files)


def test_a_pack_of_many_ranges_is_finished_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 1 << 30)
    monkeypatch.setattr("him.tier.warm.PACK_RANGES_MAX", 7)
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)
    write(stack, 12)
    # Another process takes up the growing pack, and counts what is there.
    again = reopened(stack.disk.copy())
    write(again, 10, first=12)
    packs = again.projection.state().packs
    assert [pack.finished is not None for pack in packs] == [True, True, True, False]
    assert again.fsck().ok


def test_restoring_does_not_undo_what_another_has_done() -> None:
    """Two processes share the file: the one that was slow to see it foreign must not put an older state back."""
    stack = filled()
    old = fold(stack, 7)
    position = stack.projection.position()
    assert not stack.projection.restore(old, expected=(7, old.hash))
    assert stack.projection.position() == position
    assert stack.projection.restore(old, expected=position)
    # Records that do not follow on are left for the next look.
    stack.projection.apply(list(stack.history.records(12)))
    assert stack.projection.position()[0] == 7
    stack.history.refresh()
    assert stack.projection.state() == fold(stack)


def test_a_finished_pack_is_checked_byte_by_byte() -> None:
    stack = filled(4 * EVERY)
    assert stack.fsck().ok
    name = next(pack.name for pack in stack.projection.state().packs if pack.finished)
    data = stack.disk.files[name].now
    for at in range(0, len(data), 23):
        data[at] ^= 1 << at % 8
        report = stack.fsck()
        assert not report.ok, at
        assert any(fault.place.startswith(name) for fault in report.errors), (at, report.errors)
        data[at] ^= 1 << at % 8
    assert stack.fsck().ok


@pytest.mark.parametrize("what", ["row", "root"])
def test_a_pack_that_contradicts_its_own_index_is_reported(what: str) -> None:
    """Every digest holds; only what the records say of one another is wrong."""
    rows, root = layout.encode_rows, merkle.root
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)
    with pytest.MonkeyPatch.context() as patch:
        if what == "row":
            patch.setattr(layout, "encode_rows", lambda given: rows(longer(given)))
        else:
            patch.setattr(merkle, "root", lambda leaves: root(leaves[:-1]))
        write(stack, 1)
    report = stack.fsck()
    assert "the index record does not list the records before it" in {fault.fault for fault in report.errors}


def longer(rows: layout.Rows) -> layout.Rows:
    """The same rows, each telling of 64 bytes more."""
    told = rows.copy()
    told["length"] += 64
    return told


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        (lambda rows, roots: (longer(rows), roots), "does not list"),
        (lambda rows, roots: (rows[1:], roots), "root is not that"),
        (lambda rows, roots: (rows, roots[:-1]), "root is not that"),
    ],
    ids=["row", "count", "root"],
)
def test_a_footer_that_lists_other_than_the_ranges_is_reported(
    spoilt: Callable[..., tuple[object, object]], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = warm.PackWriter.finish
    with monkeypatch.context() as patch:
        patch.setattr(warm.PackWriter, "finish", lambda self, rows, roots: real(self, *spoilt(rows, roots)))
        stack = filled()
    assert any(told in fault.fault for fault in stack.fsck().errors)
