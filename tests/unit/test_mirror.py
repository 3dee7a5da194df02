"""Packs whose bytes lie in the cold tier: what is freed comes back verified, and the budget is kept."""

import random
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes import REPOSITORY_ID, DictMemo, FakeRng, Faults, FaultsAt, MemDisk, MemObjects, PowerLoss, Stack
from numpy.typing import NDArray

from him.adapters.local import LocalDisk
from him.adapters.sqlite import SqliteProjection
from him.catalog.history import History
from him.catalog.log import FileLog
from him.catalog.reader import SnapshotReader
from him.config import EXTENT_BYTES
from him.errors import IntegrityError, StorageError, UnavailableError
from him.tier import lines
from him.tier.cold import Receipt
from him.tier.mirror import Mirror
from him.tier.receipts import receipts
from him.tier.warm import WarmStore
from him.types import TileKey

MIB = 1024 * 1024
SHAPE = (512, 512, 2)
TILE_BYTES = 512 * 512 * 2
Values = NDArray[np.int8]


def tile(number: int) -> Values:
    return np.random.default_rng(number).integers(-128, 127, SHAPE, dtype=np.int8)


class Tiered:
    """A repository with a cold tier, opened as often as there are processes."""

    def __init__(self, folder: Path, budget: int = 64 * MIB) -> None:
        self.folder, self.budget, self.cold = folder, budget, MemObjects()
        folder.mkdir(exist_ok=True)
        FileLog.create(LocalDisk(folder))
        self.open()

    def open(self, seed: str = "0") -> Stack:
        self.disk = LocalDisk(self.folder)
        self.mirror = Mirror(self.disk, self.cold, self.clock(), self.budget)
        self.stack = Stack(self.disk, mirror=self.mirror, rng=FakeRng(seed))
        return self.stack

    def clock(self) -> "Ticking":
        return Ticking()

    def close(self) -> None:
        self.stack.close()
        self.mirror.close()

    def put(self, numbers: range) -> None:
        cells = {(number // 1000, number % 1000): tile(number) for number in numbers}
        self.stack.ingest.tiles("main", "kv_cache", "f", cells)

    def read(self, number: int) -> Values:
        self.stack.history.refresh()
        return np.asarray(self.stack.at("main").tile(key(number)))

    def used(self) -> int:
        return sum(512 * pack.stat().st_blocks for pack in (self.folder / "packs").iterdir())


class Ticking:
    def __init__(self) -> None:
        self._ns = 10**18

    def now_ns(self) -> int:
        self._ns += 1000
        return self._ns

    def monotonic_ns(self) -> int:
        return self.now_ns()


def key(number: int) -> TileKey:
    return TileKey("kv_cache", "f", 0, number // 1000, number % 1000)


@pytest.fixture
def tiered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiered:
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 4 * MIB)
    made = Tiered(tmp_path / "r")
    made.put(range(20))
    made.put(range(20, 40))
    made.put(range(40, 41))
    return made


def everything_is_right(tiered: Tiered, count: int = 41) -> None:
    for number in range(count):
        assert np.array_equal(tiered.read(number), tile(number))


def test_what_is_freed_comes_back(tiered: Tiered) -> None:
    assert tiered.mirror.push_all() == 2
    before = tiered.used()
    freed = tiered.mirror.demote()
    assert freed >= 40 * TILE_BYTES
    assert tiered.used() <= before - freed + EXTENT_BYTES
    everything_is_right(tiered)
    assert tiered.mirror.status().fetched_bytes >= 40 * TILE_BYTES
    requests = len(tiered.cold.requests)
    everything_is_right(tiered)
    assert len(tiered.cold.requests) == requests, "what was fetched is here"


def test_a_small_gap_is_fetched_with_what_lies_around_it(tiered: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    tiered.mirror.push_all()
    name = min(path for path in tiered.cold.objects if path.startswith("packs/"))
    data, size = tiered.cold.objects[name], EXTENT_BYTES

    def places(*extents: int) -> list[tuple[str, int, int]]:
        return [(name, at * size, size) for at in extents]

    def asked(*extents: int) -> list[tuple[int, int]]:
        before, freed = len(tiered.cold.requests), tiered.mirror.demote()
        assert freed >= 0 and tiered.mirror.ahead(places(*extents))
        return sorted((offset // size, length // size) for _, offset, length in tiered.cold.requests[before:])

    monkeypatch.setattr("him.tier.mirror.COLD_GAP_BYTES", 2 * size)
    monkeypatch.setattr("him.tier.mirror.COLD_PART_BYTES", 6 * size)
    assert asked(0, 1, 4) == [(0, 5)], "a gap of two"
    held = tiered.used()
    assert asked(0, 4) == [(0, 1), (4, 1)], "a gap of three"
    assert asked(0, 3, 6) == [(0, 4), (6, 1)], "no more than a part"
    assert asked(0, 1, 4) == [(0, 5)]
    assert tiered.used() == held, "the gap itself is not kept"
    # What is here already stays as it is, though fetched once more.
    assert asked(2) == [(2, 1)]
    with (tiered.folder / name).open("r+b") as file:
        file.seek(2 * size)
        file.write(b"here")
    assert tiered.mirror.ahead(places(1, 3))
    assert tiered.cold.requests[-1] == (name, size, 3 * size)
    found = (tiered.folder / name).read_bytes()
    assert found[2 * size : 2 * size + 4] == b"here"
    assert (found[size : 2 * size], found[3 * size : 4 * size]) == (data[size : 2 * size], data[3 * size : 4 * size])


def test_several_packs_are_asked_at_once(tiered: Tiered) -> None:
    tiered.mirror.push_all()
    tiered.mirror.demote()
    packs = sorted(path for path in tiered.cold.objects if path.startswith("packs/"))
    assert len(packs) == 2
    together, answer = threading.Barrier(2, timeout=30), tiered.cold.get_ranges

    def meet(name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        together.wait()
        return answer(name, ranges)

    tiered.cold.get_ranges = meet  # type: ignore[method-assign]
    assert tiered.mirror.ahead([(name, 0, EXTENT_BYTES) for name in packs])
    tiered.cold.get_ranges = answer  # type: ignore[method-assign]
    everything_is_right(tiered)


def test_pages_of_many_tiles_come_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", MIB)
    tiered = Tiered(tmp_path / "r")
    for page in range(4):
        tiered.put(range(8 * page, 8 * page + 4))
    assert tiered.mirror.push_all() == 4
    tiered.mirror.demote()
    tiered.close()
    tiered.open()
    batches: list[set[str]] = []
    ahead = tiered.mirror.ahead

    def noted(places: Iterable[tuple[str, int, int]]) -> bool:
        found = list(places)
        batches.append({name for name, _, _ in found})
        return ahead(found)

    monkeypatch.setattr(tiered.mirror, "ahead", noted)
    numbers = [8 * page + at for page in range(4) for at in range(4)]
    found = tiered.stack.at("main").tiles([key(number) for number in numbers])
    for number, values in zip(numbers, found, strict=True):
        assert np.array_equal(np.asarray(values), tile(number))
    assert [len(packs) for packs in batches] == [1, 4, 4], "the root, the pages below it, the tiles"


def test_what_came_before_a_failure_can_be_freed(tiered: Tiered) -> None:
    tiered.mirror.push_all()
    tiered.mirror.demote()
    packs, answer = [path for path in tiered.cold.objects if path.startswith("packs/")], tiered.cold.get_ranges
    first, last = sorted(packs, key=[one.pack for one in receipts(tiered.disk)].index)

    def half(name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        if name == last:
            raise UnavailableError("the store answers 503", place=name)
        return answer(name, ranges)

    held = tiered.used()
    tiered.cold.get_ranges = half  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        tiered.mirror.ahead([(name, 0, EXTENT_BYTES) for name in (first, last)])
    tiered.cold.get_ranges = answer  # type: ignore[method-assign]
    assert tiered.used() == held + EXTENT_BYTES
    assert int.from_bytes((tiered.folder / "cold" / "account").read_bytes()[:8], "little") == held + EXTENT_BYTES
    assert tiered.mirror.demote() >= EXTENT_BYTES
    assert tiered.used() == held
    everything_is_right(tiered)


def test_nothing_is_freed_that_the_cold_tier_does_not_hold(tiered: Tiered) -> None:
    assert tiered.mirror.demote() == 0
    everything_is_right(tiered)


def test_a_copy_that_does_not_come_back_as_it_was_is_no_copy(tiered: Tiered) -> None:
    tiered.cold.spoil = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(IntegrityError):
        tiered.mirror.push_all()
    assert tiered.mirror.demote() == 0
    tiered.cold.spoil = bytes
    assert tiered.mirror.push_all() == 2


def test_an_interrupted_copy_is_taken_up(tiered: Tiered) -> None:
    tiered.mirror.push_all()
    (tiered.folder / "cold" / "receipts").write_bytes(b'{"pack":"half a rec')
    uploads = dict(tiered.cold.objects)
    tiered.cold.upload = None  # type: ignore[method-assign, assignment]
    tiered.close()
    tiered.open()
    assert tiered.mirror.push_all() == 2, "read back, not sent again"
    assert tiered.cold.objects == uploads
    tiered.mirror.demote()
    everything_is_right(tiered)


def test_a_store_that_is_down_serves_what_is_here_and_says_so(tiered: Tiered) -> None:
    tiered.mirror.push_all()
    tiered.mirror.demote()
    tiered.read(3)
    tiered.cold.down = True
    assert np.array_equal(tiered.read(3), tile(3))
    assert np.array_equal(tiered.read(40), tile(40))
    with pytest.raises(UnavailableError):
        tiered.read(17)
    assert "503" in tiered.mirror.status().fault
    tiered.put(range(41, 42))
    tiered.cold.down = False
    everything_is_right(tiered, 42)
    assert not tiered.mirror.status().fault


def test_the_log_is_copied_piece_by_piece(tiered: Tiered) -> None:
    for first in (41, 43, 45):
        tiered.put(range(first, first + 2))
        tiered.mirror.push_all()
    tiered.close()
    tiered.open()
    tiered.put(range(47, 48))
    tiered.mirror.push_all()
    pieces = {name: data for name, data in tiered.cold.objects.items() if name.startswith("log/")}
    assert len(pieces) == 4
    whole = b"".join(pieces[name] for name in sorted(pieces))
    assert whole == (tiered.folder / "log" / "000001.log").read_bytes()


def test_rot_in_a_pack_that_is_cold_too_heals(tiered: Tiered) -> None:
    tiered.mirror.push_all()
    name, offset, size = tiered.stack.store.places([tiered.stack.at("main").present(key(5)).ref])[0]
    with (tiered.folder / name).open("r+b") as file:
        file.seek(offset + size // 2)
        file.write(b"rot")
    everything_is_right(tiered)
    requests = len(tiered.cold.requests)
    assert np.array_equal(tiered.read(5), tile(5))
    assert len(tiered.cold.requests) == requests, "mended in place"
    assert tiered.stack.fsck().ok


def test_a_view_is_never_freed(tiered: Tiered) -> None:
    tiered.mirror.push_all()
    with tiered.stack.at("main").view(key(7)) as values:
        tiered.mirror.demote()
        assert np.array_equal(values, tile(7))
        assert tiered.used() >= TILE_BYTES
    del values
    tiered.mirror.demote()
    with tiered.stack.at("main").view(key(7)) as again:
        assert np.array_equal(again, tile(7))


def test_a_copy_without_its_holes_loses_nothing(tiered: Tiered, tmp_path: Path) -> None:
    tiered.mirror.push_all()
    tiered.mirror.demote(8 * MIB)
    tiered.close()
    shutil.copytree(tiered.folder, tmp_path / "copy")
    for pack in (tmp_path / "copy" / "packs").iterdir():
        pack.write_bytes(pack.read_bytes())
    tiered.folder = tmp_path / "copy"
    tiered.open()
    everything_is_right(tiered)
    assert tiered.stack.fsck().ok


def test_a_pack_that_was_deleted_comes_from_the_cold_tier(tiered: Tiered) -> None:
    tiered.mirror.push_all()
    tiered.close()
    for pack in (name for name in tiered.cold.objects if name.startswith("packs/")):
        (tiered.folder / pack).unlink()
    shutil.rmtree(tiered.folder / "cache", ignore_errors=True)
    tiered.open()
    everything_is_right(tiered)


def test_a_read_only_repository_reads_what_is_only_cold(tiered: Tiered) -> None:
    tiered.mirror.push_all()
    tiered.mirror.demote()
    tiered.close()
    before = {path: path.stat().st_mtime_ns for path in tiered.folder.rglob("*") if path.is_file()}
    disk = LocalDisk(tiered.folder, read_only=True)
    mirror = Mirror(disk, tiered.cold, Ticking(), tiered.budget, read_only=True)
    log, projection = FileLog(disk, read_only=True), SqliteProjection(None)
    store = WarmStore(disk, projection, FakeRng("9"), REPOSITORY_ID, mirror)
    history = History(log, projection, store, DictMemo(), Ticking(), FakeRng("9"), "reader")
    history.refresh()
    reader = SnapshotReader(store, DictMemo(), history.snapshot("main").directory)
    for number in range(41):
        assert np.array_equal(reader.tile(key(number)), tile(number))
    with reader.view(key(3)) as values:
        assert np.array_equal(values, tile(3))
    store.close()
    mirror.close()
    assert before == {path: path.stat().st_mtime_ns for path in tiered.folder.rglob("*") if path.is_file()}


def test_what_cannot_be_kept_is_passed_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 4 * MIB)
    tiered = Tiered(tmp_path / "r", 16 * MIB)
    for first in range(0, 60, 4):
        tiered.put(range(first, first + 4))
    tiered.mirror.push_all()
    tiered.mirror.demote()
    blobs = [tiered.stack.at("main").present(key(number)).ref for number in range(40)]
    places = tiered.stack.store.places(blobs)
    for place in places:
        tiered.mirror.ahead([place])
        tiered.mirror.pin([place], 2**62)
    assert tiered.used() <= 16 * MIB
    through = tiered.mirror.status().passed_through
    for number in range(60):
        assert np.array_equal(tiered.read(number), tile(number))
    assert tiered.mirror.status().passed_through > through
    assert tiered.used() <= 16 * MIB
    tiered.mirror.unpin(places)
    everything_is_right(tiered, 60)


def test_a_budget_full_of_what_cannot_leave_refuses_to_write(tmp_path: Path) -> None:
    tiered = Tiered(tmp_path / "r", 4 * MIB)
    tiered.cold.down = True
    with pytest.raises(StorageError):
        for first in range(0, 40, 2):
            tiered.put(range(first, first + 2))
    assert tiered.used() <= 4 * MIB + EXTENT_BYTES
    tiered.cold.down = False
    count = len(list(tiered.stack.at("main").keys("kv_cache", "f")))
    everything_is_right(tiered, count)


def workload(tiered: Tiered, steps: int, seed: int, check: Callable[[], None]) -> int:
    """Random writes and reads; how many tiles there are at the end."""
    rng, count = random.Random(seed), 0
    for _ in range(steps):
        if count == 0 or rng.random() < 0.3:
            tiered.put(range(count, count + 2))
            count += 2
        else:
            number = min(int(rng.paretovariate(0.6)) - 1, count - 1)
            assert np.array_equal(tiered.read(number), tile(number))
        check()
    return count


def test_a_repository_four_times_its_budget(tmp_path: Path) -> None:
    tiered = Tiered(tmp_path / "r", 16 * MIB)

    def within() -> None:
        assert tiered.used() <= 16 * MIB + EXTENT_BYTES

    count = workload(tiered, 300, 1, within)
    assert count * TILE_BYTES >= 4 * 16 * MIB
    warm = tiered.mirror.status().warm_bytes
    tiered.close()
    tiered.open()
    assert tiered.mirror.status().warm_bytes == warm, "what is here stays here over a restart"
    everything_is_right(tiered, count)
    within()


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    first = Tiered(tmp_path / "r", 16 * MIB)
    second = Tiered.__new__(Tiered)
    second.folder, second.budget, second.cold = first.folder, first.budget, first.cold
    second.open("1")
    rng, count = random.Random(3), 0
    for step in range(200):
        one = (first, second)[step % 2]
        if count < 4 or rng.random() < 0.4:
            one.put(range(count, count + 2))
            count += 2
        else:
            number = rng.randrange(count)
            assert np.array_equal(one.read(number), tile(number))
        assert first.used() <= 16 * MIB + 2 * EXTENT_BYTES
    for one in (first, second):
        everything_is_right(one, count)


# -- a disk that fails, or loses power, at every operation


SMALL = (64, 64, 1)
MODES = ("refuse", "partial", "late", "power", "power-after")


def small(number: int) -> Values:
    return np.random.default_rng(number).integers(-128, 127, SMALL, dtype=np.int8)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extents and packs so small that a few tiles fill many."""
    monkeypatch.setattr("him.tier.mirror.EXTENT_BYTES", 4096)
    monkeypatch.setattr("him.tier.mirror.COLD_PART_BYTES", 3 * 4096)
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 20_000)


class Life:
    """A workload on a disk that fails: what was acknowledged, and what must then be found."""

    def __init__(self, disk: MemDisk, cold: MemObjects, seed: str) -> None:
        self.mirror = Mirror(disk, cold, Ticking(), 60_000)
        self.stack = Stack(disk, mirror=self.mirror, rng=FakeRng(seed))

    def put(self, number: int) -> None:
        self.stack.ingest.tiles("main", "kv_cache", "f", {(0, number): small(number)})

    def check(self, count: int) -> None:
        self.stack.history.refresh()
        for number in range(count):
            reader = self.stack.at("main")
            assert np.array_equal(reader.tile(TileKey("kv_cache", "f", 0, 0, number)), small(number)), number

    def steps(self, done: list[int]) -> None:
        """Twenty-four tiles, copied, freed and read on the way; `done` holds how many are acknowledged."""
        for number in range(24):
            self.put(number)
            done[0] = number + 1
            if number % 6 == 5:
                self.mirror.push_all()
                self.mirror.demote(8192)
                self.check(number + 1)


def life(faults: Faults, cold: MemObjects) -> tuple[MemDisk, list[int], Life | None]:
    disk, done = MemDisk(), [0]
    FileLog.create(disk)
    disk.faults = faults
    begun: Life | None = None
    try:
        begun = Life(disk, cold, "a")
        begun.steps(done)
    except (StorageError, PowerLoss):
        pass
    return disk, done, begun


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [83, pytest.param(9, marks=pytest.mark.slow)])
def test_no_failed_operation_loses_what_was_acknowledged(mode: str, stride: int) -> None:
    disk, done, _ = life(Faults(), MemObjects())
    assert done == [24]
    kinds = disk.faults.kinds
    assert {"punch", "write", "sync"} <= {kind.split(" ")[0] for kind in kinds}
    for at in range(1 + 17 * MODES.index(mode) % stride, len(kinds) + 1, stride):
        cold = MemObjects()
        disk, done, begun = life(Faults(at, mode), cold)
        why = f"{mode} at {kinds[at - 1]} ({at})"
        if begun is not None and not disk.faults.dead:
            begun.check(done[0])
        for keep in ("all", "half", "none"):
            left = disk.after_power_loss(lambda keep=keep: keep) if mode.startswith("power") else disk.copy()
            left.faults = Faults()
            # Each may go on otherwise, and a cold tier refuses two logs.
            behind = MemObjects()
            behind.objects = dict(cold.objects)
            again = Life(left, behind, "b")
            again.check(done[0])
            again.mirror.push_all()
            again.mirror.demote()
            again.check(done[0])
            report = again.stack.fsck()
            assert report.ok, (why, keep, report.errors)


@pytest.mark.parametrize("mode", ["late", "partial"])
@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_line_that_could_not_be_made_durable_is_not_left_for_others(operation: str, mode: str) -> None:
    disk = MemDisk()
    file = disk.open("cold/receipts", create=True)
    end = lines.append(file, 0, Receipt("packs/a.pack", 1, "aa"))
    disk.faults = FaultsAt(f"{operation} cold/receipts", mode)
    with pytest.raises(StorageError):
        lines.append(file, end, Receipt("packs/b.pack", 1, "bb"))
    assert [receipt.pack for receipt in receipts(disk)] == ["packs/a.pack"]
    lines.append(file, end, Receipt("packs/c.pack", 1, "cc"))
    assert [receipt.pack for receipt in receipts(disk)] == ["packs/a.pack", "packs/c.pack"]


def test_a_list_that_rotted_while_the_cold_tier_is_away_is_not_taken_for_lost(tiered: Tiered) -> None:
    """Else what it lists is missing for as long as the process lives, though the cold tier has it."""
    tiered.mirror.push_all()
    name = min(path for path in tiered.cold.objects if path.startswith("packs/"))
    tiered.close()
    shutil.rmtree(tiered.folder / "cache", ignore_errors=True)
    file = tiered.disk.open(name)
    size = file.size()
    file.write_at(size - 300, b"\xff" * 64)
    file.close()
    tiered.open("1")
    tiered.cold.down = True
    with pytest.raises(UnavailableError):
        tiered.read(0)
    tiered.cold.down = False
    everything_is_right(tiered)
