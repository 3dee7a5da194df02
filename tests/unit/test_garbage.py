"""Garbage collection, leases and retention, on real packs with a plain model beside."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from fakes import FakeClock, FakeRng, Faults, MemDisk, PowerLoss, Stack
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from numpy.typing import NDArray

import him
from him.catalog.changes import FrameChange
from him.catalog.garbage import Choice, Collected, Collector
from him.catalog.lease import Leases
from him.catalog.log import FileLog
from him.catalog.reader import SnapshotReader
from him.errors import ConflictError, ExpiredError, HimError, UsageError
from him.tile.codec import encode_array
from him.types import Frame, StreamSpec, TileKey

SIDE = 64
Tile = NDArray[np.uint8]
NOISE = StreamSpec("noise", tile_height=SIDE, tile_width=SIDE, dtype="uint8")
NOTE = StreamSpec("note", content="bytes", tile_height=1, tile_width=1)
DAY_NS = 24 * 3600 * 1_000_000_000


def fresh(faults: Faults | None = None) -> MemDisk:
    """A disk with an empty repository; its operations are counted from here on."""
    disk = MemDisk()
    FileLog.create(disk)
    disk.faults = faults or Faults()
    return disk


def noise(seed: int) -> Tile:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def little_changed(tile: Tile) -> Tile:
    """So little that it is stored as a delta of what it replaces."""
    changed = tile.copy()
    changed[7, 7] ^= 255
    return changed


def document(seed: int) -> bytes:
    """Long enough to be kept in chunks, and sharing most of them with those of the same tens."""
    body = bytearray(np.random.default_rng(seed // 10).integers(0, 256, 200_000, dtype=np.uint8).tobytes())
    body[1000 * (seed % 10) : 1000 * (seed % 10) + 8] = seed.to_bytes(8, "little")
    return bytes(body)


def collect(stack: Stack, share: float = 0.01, small: int = 0, roots: Sequence[bytes] = ()) -> Collected:
    collector = Collector(stack.history, stack.projection, stack.store, stack.clock, lambda: roots)
    return collector.run(Choice(share, small))


@pytest.fixture
def stack() -> Iterator[Stack]:
    made = Stack(fresh())
    made.history.declare_stream(NOISE)
    made.history.declare_stream(NOTE)
    yield made
    made.close()


def put(stack: Stack, values: dict[int, Tile | bytes], stream: str = "noise", branch: str = "main") -> None:
    stack.ingest.tiles(branch, stream, "", {(0, x): value for x, value in values.items()})


def got(stack: Stack, x: int, stream: str = "noise", branch: str = "main") -> Tile | bytes:
    return stack.at(branch).tile(TileKey(stream, "", 0, 0, x))  # pyright: ignore[reportReturnType]


def pack_bytes(stack: Stack) -> int:
    files = [stack.disk.open(f"packs/{name}") for name in stack.disk.list("packs")]
    return sum(file.size() for file in files)


def test_what_nothing_refers_to_is_reclaimed_and_the_rest_stays(stack: Stack) -> None:
    for version in range(5):
        put(stack, {x: noise(10 * version + x) for x in range(10)})
    before = pack_bytes(stack)
    found = collect(stack)
    assert found.dead_bytes > 3 * found.live_bytes
    assert (found.condemned_packs, found.removed_packs, found.waiting_packs) == (1, 1, 0)
    assert pack_bytes(stack) < before / 4
    assert all(np.array_equal(got(stack, x), noise(40 + x)) for x in range(10))
    assert stack.fsck().ok
    again = collect(stack)
    assert (again.dead_bytes, again.condemned_packs) == (0, 0)


def test_a_dry_run_changes_nothing(stack: Stack) -> None:
    put(stack, {0: noise(1)})
    put(stack, {0: noise(2)})
    head, size = stack.log.head(), pack_bytes(stack)
    collector = Collector(stack.history, stack.projection, stack.store, stack.clock, tuple)
    found = collector.run(Choice(0.01), dry_run=True)
    assert found.dead_bytes > SIDE * SIDE
    assert (stack.log.head(), pack_bytes(stack)) == (head, size)


def test_parents_at_branching_and_traces_keep_what_they_name(stack: Stack) -> None:
    put(stack, {0: noise(1)})
    at = stack.history.snapshot("main").directory
    stack.history.open_snapshot(parent="main", branch="other")
    put(stack, {0: noise(2)})
    traced = stack.history.snapshot("main").directory
    put(stack, {0: noise(3)})
    collect(stack, roots=[traced])
    for directory, seed in ((at, 1), (traced, 2)):
        reader = SnapshotReader(stack.store, stack.memo, directory)
        assert np.array_equal(reader.tile(TileKey("noise", "", 0, 0, 0)), noise(seed))  # pyright: ignore
    assert np.array_equal(got(stack, 0, branch="other"), noise(1))
    assert np.array_equal(got(stack, 0), noise(3))


def test_bases_of_deltas_and_chunks_of_documents_stay(stack: Stack) -> None:
    changed = noise(1)
    put(stack, {0: np.repeat(changed, 1, 0)})
    changed = changed.copy()
    changed[5, 5] ^= 255
    put(stack, {0: changed})
    put(stack, {0: document(10)}, stream="note")
    put(stack, {0: document(11)}, stream="note")
    collect(stack)
    collect(stack, small=1 << 40)
    assert np.array_equal(got(stack, 0), changed)
    assert got(stack, 0, stream="note") == document(11)
    assert stack.fsck().ok


def test_a_reader_keeps_a_condemned_pack_until_it_is_through(stack: Stack) -> None:
    put(stack, {0: noise(1)})
    lease = stack.history.lease()
    reader = stack.at("main")
    put(stack, {0: noise(2)})
    found = collect(stack)
    assert (found.removed_packs, found.waiting_packs) == (0, 1)
    assert np.array_equal(reader.tile(TileKey("noise", "", 0, 0, 0)), noise(1))  # pyright: ignore
    lease.release()
    found = collect(stack)
    assert (found.removed_packs, found.waiting_packs) == (1, 0)


def test_a_lease_of_another_process_counts_and_one_of_a_dead_process_does_not() -> None:
    disk = fresh()
    mine, other = Leases(disk), Leases(disk)
    held = other.take(7)
    assert list(mine.floors().values()) == [7]
    own = mine.take(3)
    assert sorted(mine.floors().values()) == [3, 7]
    own.release()
    assert list(mine.floors().values()) == [7]
    other.close()
    assert list(mine.floors().values()) == []
    held.release()


def test_a_lease_is_given_back_without_waiting_for_who_is_at_work_there(stack: Stack) -> None:
    """A finalizer runs in whatever thread, also in one that others wait for."""
    leases = stack.history.leases
    lease = leases.take(1)
    held, release = threading.Event(), threading.Event()

    def busy() -> None:
        with leases._lock:  # As whoever writes the file.
            held.set()
            release.wait()

    worker = threading.Thread(target=busy)
    worker.start()
    held.wait()
    giver = threading.Thread(target=lease.release, daemon=True)
    giver.start()
    giver.join(timeout=10)
    waited = giver.is_alive()
    release.set()
    worker.join()
    assert not waited
    with leases.take(7):
        assert list(leases.floors().values()) == [7]


def test_a_batch_that_shares_what_is_condemned_under_it_stores_it_again(stack: Stack) -> None:
    put(stack, {0: noise(1), 1: noise(5)})
    put(stack, {0: noise(2)})
    opened, begun = stack.history.snapshot("main"), stack.history.begin()
    tile = encode_array(noise(1))
    assert stack.store.put_tile(tile, bytes(16)) is False  # It is there, though nothing refers to it.
    other = Stack(stack.disk, rng=FakeRng(5))
    stack.history.finish_packs()
    found = collect(other)
    assert (found.condemned_packs, found.waiting_packs) == (1, 1)
    shape = Frame("noise", "", "array", SIDE, 4 * SIDE, 0, "uint8", SIDE, SIDE, 0, "none", b"", 0)
    stack.history.commit(opened.snapshot_id, [FrameChange(shape, {(0, 3): tile.ref})], begun=begun)
    del begun
    found = collect(other)
    assert found.removed_packs >= 1
    assert found.waiting_packs == 0
    for reader in (stack, other):
        assert np.array_equal(got(reader, 3), noise(1))
        assert np.array_equal(got(reader, 0), noise(2))
        assert reader.fsck().ok
    other.close()


def test_what_is_left_of_an_expired_tile_is_expired_and_a_late_hold_does_not_ask_for_it(stack: Stack) -> None:
    """The base of a delta lies in a pack that goes, the delta in one that stays; then a hold is put on its snapshot."""
    put(stack, {0: noise(1)})
    stack.history.finish_packs()
    changed = little_changed(noise(1))
    put(stack, {0: changed})
    assert stack.store.made_of(next(entry.ref for _, _, entry in _cells(stack))), "stored as a delta"
    stack.history.seal("main")
    stack.clock.now += DAY_NS
    put(stack, {x: noise(100 + x) for x in range(1, 9)})
    stack.history.finish_packs()
    stack.history.set_retention("noise", "", 60)
    assert collect(stack, share=0.9).removed_packs == 1
    stack.history.set_attribute("main", "hold", "case 17")
    with pytest.raises(ExpiredError):
        got(stack, 0)
    collect(stack)
    assert np.array_equal(got(stack, 1), noise(101))
    assert stack.fsck().errors == ()


def test_no_delta_is_made_of_what_is_on_its_way_out(stack: Stack) -> None:
    """A tile that retention has let go is replaced while only a condemned pack has it."""
    put(stack, {0: noise(1)})
    stack.history.finish_packs()
    stack.history.seal("main")
    stack.clock.now += DAY_NS
    stack.history.set_retention("noise", "", 60)
    changed = little_changed(noise(1))
    with stack.history.lease():
        assert collect(stack).waiting_packs == 1
        put(stack, {0: changed})
    assert collect(stack).removed_packs == 1
    assert np.array_equal(got(stack, 0), changed)
    stack.store.forget_addresses()
    assert np.array_equal(got(stack, 0), changed)
    assert stack.fsck().errors == ()


def test_a_put_does_not_rely_on_a_delta_whose_base_is_gone(stack: Stack) -> None:
    """The base lies in a pack that is removed, the delta in one that stays, and nothing refers to either."""
    put(stack, {0: noise(1)})
    stack.history.finish_packs()
    changed = little_changed(noise(1))
    put(stack, {0: changed, **{x: noise(100 + x) for x in range(1, 9)}})
    stack.history.finish_packs()
    name = next(e.ref for _, _, e in _cells(stack))
    assert stack.store.made_of(name), "stored as a delta"
    put(stack, {0: noise(3)})
    found = collect(stack, share=0.9)
    assert found.removed_packs == 1
    put(stack, {0: changed})
    assert np.array_equal(got(stack, 0), changed)
    assert stack.fsck().errors == ()
    stack.store.forget_addresses()
    assert np.array_equal(got(stack, 0), changed)


def _cells(stack: Stack):
    from him.pyramid import update

    frame = stack.at("main").frame("noise", "")
    return list(update.scan(stack.store, frame.root, frame.root_height))


def test_orphans_go_and_a_living_writers_pack_stays(stack: Stack) -> None:
    put(stack, {0: noise(1)})
    stray = stack.disk.open("packs/" + "0" * 32 + ".pack", create=True)
    stray.write_at(0, b"what a crash left")
    stray.close()
    other = Stack(stack.disk, rng=FakeRng(5))
    other.store.put_tile(encode_array(noise(77)), bytes(16))  # Its pack is named by no record yet.
    found = collect(stack)
    assert found.orphan_packs == 1
    opened, begun = other.history.writable("main"), other.history.begin()
    other.history.commit(
        opened.snapshot_id,
        [
            FrameChange(
                Frame("noise", "", "array", SIDE, SIDE, 0, "uint8", SIDE, SIDE, 0, "none", b"", 0),
                {(0, 0): encode_array(noise(77)).ref},
            )
        ],
        begun=begun,
    )
    assert np.array_equal(got(stack, 0), noise(77))
    other.close()


def test_two_collections_at_once_do_not_rely_on_each_others_packs(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile lies in two packs; each collector gives one of them up, and counts on the other."""
    # An index in memory knows one place of a tile, segments know all.
    monkeypatch.setattr("him.tier.address.ADDRESS_TAIL_ROWS", 1)
    other, tile = Stack(stack.disk, rng=FakeRng(5)), encode_array(noise(1))
    put(stack, {9: noise(99)})
    begun = [each.history.begin() for each in (stack, other)]
    for each in (stack, other):
        each.store.put_tile(tile, bytes(16))  # Neither knows of the other's.
    shape = Frame("noise", "", "array", SIDE, SIDE, 0, "uint8", SIDE, SIDE, 0, "none", b"", 0)
    for each, when in zip((stack, other), begun, strict=True):
        target = each.history.snapshot("main").snapshot_id
        each.history.commit(target, [FrameChange(shape, {(0, 0): tile.ref})], begun=when)
        put(each, {1: noise(2), 2: noise(3)})
        each.history.finish_packs()
    put(stack, {1: noise(4), 2: noise(5), 9: noise(6)})
    stack.history.finish_packs()
    del begun, when
    packs = [f"packs/{name}" for name in stack.disk.list("packs")]
    holding = [name for name in packs if tile.ref in _blobs(stack, name)]
    assert len(holding) == 2
    chosen, append = iter([[holding[0]], [holding[1]]]), stack.history.append

    def late(build: Callable[[], Sequence[object]], **given: bool) -> None:
        if stack.history.append is late and given == {} and copied:
            monkeypatch.setattr(stack.history, "append", append)
            collect(other)
        append(build, **given)  # pyright: ignore[reportArgumentType]

    copied: list[object] = []
    copy = stack.store.copy
    monkeypatch.setattr("him.catalog.garbage.chosen", lambda *_: next(chosen, []))
    monkeypatch.setattr(stack.store, "copy", lambda blobs: copied.append(blobs) or copy(blobs))
    monkeypatch.setattr(stack.history, "append", late)
    collect(stack)
    collect(stack)
    assert not {name.removeprefix("packs/") for name in holding} & set(stack.disk.list("packs"))
    for each in (stack, other):
        assert np.array_equal(got(each, 0), noise(1))
        assert each.fsck().errors == ()
    other.close()


def _blobs(stack: Stack, name: str) -> set[bytes]:
    state = next(pack for pack in stack.projection.state().packs if pack.name == name)
    return {blob.tobytes() for blob in stack.store.rows(state)["blob"]} if state.finished else set()


def test_small_packs_are_joined(stack: Stack) -> None:
    for x in range(6):
        put(stack, {x: noise(x)})
        stack.history.finish_packs()
    found = collect(stack, share=0.5, small=1 << 30)
    assert found.condemned_packs == 6
    assert len(stack.disk.list("packs")) == 1
    assert all(np.array_equal(got(stack, x), noise(x)) for x in range(6))
    assert collect(stack, share=0.5, small=1 << 30).condemned_packs == 0


# -- retention


def aged(path: Path, clock: FakeClock) -> him.Repository:
    repo = him.open(path, create=True, clock=clock)
    repo.declare_stream(NOISE)
    return repo


def test_what_is_too_old_expires_and_is_never_called_damage(tmp_path: Path) -> None:
    clock = FakeClock()
    with aged(tmp_path / "memory", clock) as repo:
        repo.writable("main").put_many("noise", {(0, x): noise(x) for x in range(4)})
        repo.snapshot("main").seal()
        repo.tag("kept", "main")
        clock.now += 10 * DAY_NS
        repo.writable("main").put("noise", noise(9), x=1)
        repo.set_retention("noise", 5 * 24 * 3600)
        found = repo.gc(dead_share=0.01)
        assert found.expired == ("noise",)
        assert found.removed_packs == 1
    with him.open(tmp_path / "memory", clock=clock) as repo:
        assert np.array_equal(repo.snapshot("main").get("noise", x=1), noise(9))
        for name, x in (("main", 0), ("kept", 1)):
            with pytest.raises(ExpiredError):
                repo.snapshot(name).get("noise", x=x)
        report = repo.fsck()
        assert report.ok
        assert report.expired == 4
        assert repo.gc().expired == ()


def test_what_expired_cannot_be_sealed_until_it_is_deleted(stack: Stack) -> None:
    stack.history.declare_stream(StreamSpec("grid", tile_height=64, tile_width=64, dtype="uint8", level_rule="mean"))
    put(stack, {x: noise(x) for x in range(3)}, stream="grid")
    stack.history.set_retention("grid", "", 60)
    stack.clock.now += DAY_NS
    assert collect(stack).removed_packs == 1
    with pytest.raises(ExpiredError, match="levels are computed from it") as told:
        stack.history.seal("main")
    assert told.value.object == "grid L0 (0,0)"
    stack.ingest.tiles("main", "grid", "", {(0, x): None for x in range(3)})
    assert stack.history.seal("main").sealed


def test_a_legal_hold_keeps_what_it_reaches(tmp_path: Path) -> None:
    clock = FakeClock()
    with aged(tmp_path / "memory", clock) as repo:
        case = repo.writable("case")
        case.put("noise", noise(1))
        held = case.id
        del case  # A handle is a reader.
        repo.writable("main").put("noise", noise(2))
        repo.hold("case", "case 17")
        repo.delete_ref("case")
        with pytest.raises(ConflictError, match="legal hold"):
            repo.delete_snapshot(held)
        repo.set_retention("noise", 60)
        clock.now += DAY_NS
        repo.gc(dead_share=0.01)
        assert np.array_equal(repo.snapshot(held).get("noise"), noise(1))
        with pytest.raises(ExpiredError):
            repo.snapshot("main").get("noise")
        repo.release_hold(held)
        repo.delete_snapshot(held)
        assert repo.gc(dead_share=0.01).removed_packs == 1


def test_a_tasks_rule_is_for_its_snapshots_alone(tmp_path: Path) -> None:
    clock = FakeClock()
    with aged(tmp_path / "memory", clock) as repo:
        for name in ("short", "long"):
            made = repo.create_snapshot(branch=name, tags={"task_id": name})
            made.put("noise", noise(len(name)))
        repo.writable("main").put("noise", noise(3))
        repo.set_retention("noise", 60, task="short")
        repo.set_retention("noise", 30 * 24 * 3600)
        repo.set_retention("noise", 0, task="long")
        clock.now += DAY_NS
        del made
        repo.gc(dead_share=0.01)
        with pytest.raises(ExpiredError):
            repo.snapshot("short").get("noise")
        assert np.array_equal(repo.snapshot("main").get("noise"), noise(3))
        clock.now += 60 * DAY_NS
        repo.gc(dead_share=0.01)
        with pytest.raises(ExpiredError):
            repo.snapshot("main").get("noise")
        assert np.array_equal(repo.snapshot("long").get("noise"), noise(4))
        assert repo.retention()["logs", ""] == 30 * 24 * 3600
        repo.set_retention("noise", -1, task="long")
        assert ("noise", "long") not in repo.retention()
        with pytest.raises(UsageError):
            repo.gc(dead_share=2)


# -- failures

Values = dict[tuple[str, int], Tile | bytes]


def _put(values: Values) -> tuple[Callable[[Stack], object], Values]:
    def work(stack: Stack) -> None:
        for stream in sorted({stream for stream, _ in values}):
            put(stack, {x: value for (own, x), value in values.items() if own == stream}, stream)

    return work, values


_CHANGED = noise(3).copy()
_CHANGED[9, 9] ^= 255
STEPS: list[tuple[Callable[[Stack], object], Values]] = [
    (lambda stack: stack.history.declare_stream(NOISE), {}),
    (lambda stack: stack.history.declare_stream(NOTE), {}),
    _put({("noise", 0): noise(1), ("noise", 1): noise(2)}),
    _put({("noise", 0): noise(3)}),
    (lambda stack: collect(stack), {}),
    _put({("noise", 0): _CHANGED}),
    _put({("note", 0): document(1)}),
    _put({("note", 0): document(2)}),
    _put({("noise", 1): noise(1)}),
    (lambda stack: collect(stack, 0.3), {}),
    (lambda stack: stack.history.seal("main"), {}),
    (lambda stack: collect(stack, 0.5, 1 << 30), {}),
    _put({("noise", 2): noise(2)}),
    (lambda stack: collect(stack, 0.01, 1 << 30), {}),
]


def after(done: int) -> Values:
    model: Values = {}
    for _, values in STEPS[:done]:
        model |= values
    return model


def opened_again(disk: MemDisk, number: int) -> Stack:
    return Stack(disk, rng=FakeRng(1000 + number), clock=FakeClock(1_800_000_000_000_000_000))


def run_steps(disk: MemDisk, first: int = 0, stack: Stack | None = None) -> tuple[Stack | None, int, HimError | None]:
    """Until one fails, or the power does (then there is no process left)."""
    done = first
    try:
        if stack is None:
            stack = Stack(disk)
        for work, _ in STEPS[first:]:
            work(stack)
            done += 1
    except PowerLoss:
        return None, done, None
    except HimError as error:
        return stack, done, error
    return stack, done, None


def holds(stack: Stack, choices: Sequence[Values], why: str) -> None:
    """The newest snapshot shows one of these, and nothing is damaged."""
    if "main" not in stack.history.refs():
        assert {} in choices, why
        return
    reader = stack.at("main")
    found: Values = {}
    for stream in ("noise", "note"):
        frames = {frame.name for frame in reader.frames(stream)}
        for key in reader.keys(stream, "") if "" in frames else ():
            found[stream, key.x] = reader.tile(key)  # pyright: ignore[reportArgumentType]
    same = [
        found.keys() == choice.keys() and all(np.array_equal(found[key], choice[key]) for key in found)
        for choice in choices
    ]
    assert any(same), why
    assert stack.fsck().errors == (), why


def count_of_operations() -> int:
    disk = fresh()
    begun = disk.faults.count
    _, done, error = run_steps(disk)
    assert (done, error) == (len(STEPS), None)
    assert sum(kind.startswith("remove packs/") for kind in disk.faults.kinds) >= 3
    return disk.faults.count - begun


def every(stride: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stride", [stride, pytest.param(1, marks=pytest.mark.slow)])


@every(9)
@pytest.mark.parametrize("mode", ["refuse", "partial", "late"])
def test_a_failed_operation_loses_nothing_and_is_made_up_for(mode: str, stride: int) -> None:
    for at in range(1 + len(mode) % stride, count_of_operations() + 1, stride):
        disk = fresh(Faults(at, mode))
        stack, done, error = run_steps(disk)
        assert stack is not None
        why = f"{mode} {at}: {disk.faults.kinds[at - 1]} in step {done}, {error}"
        other = opened_again(disk.copy(), at)
        holds(other, [after(done)], f"another process after {why}")
        other.close()
        if error is None:
            continue  # What failed could wait.
        _, done, error = run_steps(disk, done, stack)
        assert (done, error) == (len(STEPS), None), why
        holds(stack, [after(done)], why)
        stack.close()
        again = opened_again(disk, at)
        collect(again)
        holds(again, [after(done)], f"reopened after {why}")
        again.close()


@every(7)
@pytest.mark.parametrize("kept", ["none", "all", "half"])
@pytest.mark.parametrize("mode", ["power", "power-after"])
def test_no_power_loss_while_packs_are_given_up_loses_anything(mode: str, kept: str, stride: int) -> None:
    for at in range(1 + len(mode + kept) % stride, count_of_operations() + 1, stride):
        disk = fresh(Faults(at, mode))
        stack, done, _ = run_steps(disk)
        assert stack is None
        why = f"{mode} {at}, unsynced kept: {kept}: {disk.faults.kinds[at - 1]} in step {done}"
        left = disk.after_power_loss(lambda: kept)
        again = opened_again(left, at)
        holds(again, [after(done), after(done + 1)], why)
        collect(again)
        holds(again, [after(done), after(done + 1)], f"collected after {why}")
        again.close()


# -- anything in any order


class Machine(RuleBasedStateMachine):
    """Two processes write, branch, drop and collect in one repository; a dict says what must be readable."""

    readers = Bundle("readers")
    batches = Bundle("batches")

    @initialize(rows=st.sampled_from([1, 5, 1 << 20]))
    def begin(self, rows: int) -> None:
        self.rows = mock.patch("him.tier.address.ADDRESS_TAIL_ROWS", rows)
        self.rows.start()
        self.disk, self.count = fresh(), 0
        first = Stack(self.disk)
        first.history.declare_stream(NOISE)
        first.history.declare_stream(NOTE)
        self.stacks = [first, Stack(self.disk, rng=FakeRng(6))]
        self.model: dict[str, dict[tuple[str, int], Tile | bytes]] = {"main": {}}
        self.stacks[0].history.open_snapshot(branch="main")

    def teardown(self) -> None:
        for stack in getattr(self, "stacks", []):
            stack.close()
        if hasattr(self, "rows"):
            self.rows.stop()

    def value(self, stream: str, seed: int, before: Tile | bytes | None) -> Tile | bytes:
        if stream == "note":
            return document(seed)
        if seed % 3 == 0 and isinstance(before, np.ndarray):
            changed = before.copy()
            changed[seed % SIDE, seed % SIDE] ^= 255
            return changed
        return noise(seed)

    @rule(who=st.integers(0, 1), on=st.integers(0, 5), stream=st.sampled_from(["noise", "note"]),
          x=st.integers(0, 5), seed=st.integers(0, 12))  # fmt: skip
    def write(self, who: int, on: int, stream: str, x: int, seed: int) -> None:
        branch = sorted(self.model)[on % len(self.model)]
        value = self.value(stream, seed, self.model[branch].get((stream, x)))
        put(self.stacks[who], {x: value}, stream, branch)
        self.model[branch][stream, x] = value

    @rule(who=st.integers(0, 1), on=st.integers(0, 5), stream=st.sampled_from(["noise", "note"]), x=st.integers(0, 5))
    def delete(self, who: int, on: int, stream: str, x: int) -> None:
        branch = sorted(self.model)[on % len(self.model)]
        if self.model[branch].pop((stream, x), None) is not None:
            self.stacks[who].ingest.tiles(branch, stream, "", {(0, x): None})

    @rule(who=st.integers(0, 1), on=st.integers(0, 5))
    def branch(self, who: int, on: int) -> None:
        source = sorted(self.model)[on % len(self.model)]
        if len(self.model) < 5:
            self.count += 1
            self.stacks[who].history.open_snapshot(parent=source, branch=f"b{self.count}")
            self.model[f"b{self.count}"] = dict(self.model[source])

    @rule(who=st.integers(0, 1), on=st.integers(0, 5))
    def drop(self, who: int, on: int) -> None:
        branch = sorted(self.model)[on % len(self.model)]
        if branch != "main":
            history = self.stacks[who].history
            gone = history.snapshot(branch).snapshot_id
            history.delete_ref(branch)
            history.drop(gone)
            del self.model[branch]

    @rule(who=st.integers(0, 1), on=st.integers(0, 5))
    def seal(self, who: int, on: int) -> None:
        self.stacks[who].history.seal(sorted(self.model)[on % len(self.model)])

    @rule(target=readers, who=st.integers(0, 1), on=st.integers(0, 5))
    def open_reader(self, who: int, on: int) -> object:
        branch, stack = sorted(self.model)[on % len(self.model)], self.stacks[who]
        lease = stack.history.lease()
        return stack, lease, stack.at(branch), dict(self.model[branch])

    @rule(reader=consumes(readers))
    def read_on(self, reader: tuple[Stack, object, SnapshotReader, dict[tuple[str, int], Tile | bytes]]) -> None:
        stack, _, found, model = reader
        if stack not in self.stacks:
            return  # Its process has ended.
        for (stream, x), value in model.items():
            assert np.array_equal(found.tile(TileKey(stream, "", 0, 0, x)), value)  # pyright: ignore

    @rule(target=batches, who=st.integers(0, 1), seed=st.integers(0, 12))
    def begin_batch(self, who: int, seed: int) -> object:
        stack = self.stacks[who]
        begun, tile = stack.history.begin(), encode_array(noise(seed))
        stack.store.put_tile(tile, bytes(16))
        return stack, begun, tile, seed

    @rule(batch=consumes(batches), on=st.integers(0, 5), x=st.integers(0, 5))
    def commit_batch(self, batch: tuple[Stack, object, object, int], on: int, x: int) -> None:
        stack, begun, tile, seed = batch
        if stack not in self.stacks:
            return
        branch = sorted(self.model)[on % len(self.model)]
        opened = stack.history.writable(branch)
        shape = Frame("noise", "", "array", SIDE, (x + 1) * SIDE, 0, "uint8", SIDE, SIDE, 0, "none", b"", 0)
        change = FrameChange(shape, {(0, x): tile.ref})  # pyright: ignore
        try:
            stack.history.commit(opened.snapshot_id, [change], begun=begun)  # pyright: ignore
        except HimError as error:
            assert error.kind == "busy"
            return
        self.model[branch]["noise", x] = noise(seed)

    @rule(who=st.integers(0, 1), share=st.sampled_from([0.01, 0.3, 0.9]), small=st.sampled_from([0, 1 << 30]))
    def gc(self, who: int, share: float, small: int) -> None:
        collect(self.stacks[who], share, small)

    @rule(who=st.integers(0, 1), call=st.integers(1, 5), share=st.sampled_from([0.01, 0.3, 0.9]))
    def two_collect(self, who: int, call: int, share: float) -> None:
        """The other process collects whole while this one is between two records."""
        history, other = self.stacks[who].history, self.stacks[1 - who]
        append, left = history.append, [call]

        def late(build: Callable[[], Sequence[object]], **given: bool) -> None:
            left[0] -= 1
            if left[0] == 0:
                collect(other, 0.01)
            append(build, **given)  # pyright: ignore[reportArgumentType]

        history.append = late  # pyright: ignore[reportAttributeAccessIssue]
        try:
            collect(self.stacks[who], share)
        finally:
            del history.append  # The method again.

    @rule(who=st.integers(0, 1))
    def finish(self, who: int) -> None:
        self.stacks[who].history.finish_packs()

    @rule(who=st.integers(0, 1), forget=st.booleans())
    def reopen(self, who: int, forget: bool) -> None:
        old = self.stacks[who]
        if forget:
            old.store.forget_addresses()
        old.close()
        self.count += 1
        self.stacks[who] = Stack(self.disk, rng=FakeRng(100 + self.count))

    @invariant()
    def everything_is_readable(self) -> None:
        for stack in getattr(self, "stacks", []):
            for branch, model in self.model.items():
                reader = stack.at(branch)
                for (stream, x), value in model.items():
                    assert np.array_equal(reader.tile(TileKey(stream, "", 0, 0, x)), value)  # pyright: ignore

    @rule()
    def check(self) -> None:
        assert self.stacks[0].fsck().errors == ()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def test_nobody_writes_on_in_a_pack_that_is_being_ended(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its footer and the record that names it, another process looks for a pack to continue."""
    put(stack, {0: noise(1)})
    other, commit = Stack(stack.disk, rng=FakeRng(5)), stack.log.commit

    def late(build: Callable[[], bytes | None]) -> int:
        monkeypatch.undo()
        put(other, {1: noise(2)})
        return commit(build)

    packs = len(stack.disk.list("packs"))
    monkeypatch.setattr(stack.log, "commit", late)
    stack.history.finish_packs()
    assert len(stack.disk.list("packs")) == packs + 1
    for each in (stack, other):
        assert np.array_equal(got(each, 0), noise(1))
        assert np.array_equal(got(each, 1), noise(2))
        assert each.fsck().errors == ()
    other.close()


def test_a_pack_that_goes_while_a_process_learns_of_it_is_passed_over(stack: Stack) -> None:
    put(stack, {0: noise(1)})
    put(stack, {0: noise(2)})
    other = Stack(stack.disk, rng=FakeRng(5))
    collect(stack)
    opened = Stack(stack.disk, rng=FakeRng(6))  # Its projection is made; its addresses are not.
    put(stack, {0: noise(3)})
    collect(stack)
    collect(stack)
    for each in (other, opened):
        assert np.array_equal(got(each, 0), noise(3))
        each.close()
