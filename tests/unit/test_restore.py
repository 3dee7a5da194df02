"""A repository from its cold tier alone: all that the cold tier holds, nothing that lacks a part, never another's."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fakes import FakeClock, FakeRng, Faults, MemDisk, MemObjects, PowerLoss, Stack, flip

import him
from him.adapters.folder import ObjectFolder
from him.app import Repository
from him.catalog.log import FileLog
from him.catalog.marker import parsed
from him.catalog.restore import restore
from him.errors import ConflictError, HimError, IntegrityError, LimitError, NotFoundError, StorageError, VersionError
from him.tier.mirror import Mirror
from him.types import TileKey

BUDGET = 16 * 2**20
Values = np.ndarray


def noise(seed: int, side: int = 700) -> Values:
    return np.random.default_rng(seed).integers(0, 255, (side, side), dtype=np.uint8)


def content(repo: Repository) -> dict[str, object]:
    """All a reader could see, by value."""
    seen: dict[str, object] = {f"ref {name}": value for name, value in repo.refs().items()}
    for one in repo.snapshots():
        handle = repo.snapshot(one.snapshot_id)
        seen[one.snapshot_id] = (one.sealed, tuple(sorted(one.tags.items())), one.parents)
        for frame in handle.frames():
            cells = [(tile.y, tile.x) for tile in handle.tiles(frame.stream, frame=frame.name)]
            values = [handle.get(frame.stream, frame=frame.name, y=y, x=x) for y, x in cells]
            shown = [one if isinstance(one, bytes) else (str(one.dtype), one.shape, one.tobytes()) for one in values]
            seen[f"{one.snapshot_id} {frame}"] = dict(zip(cells, shown, strict=True))
    return seen


class Place:
    """A repository and its cold tier in folders."""

    def __init__(self, folder: Path) -> None:
        self.memory, self.cold, self.again = folder / "memory", folder / "cold", folder / "again"
        with him.open(self.memory, create=True) as repo:
            repo.set_tier(str(self.cold), BUDGET)

    def fill(self, *, everything: bool) -> dict[str, object]:
        """Three kinds of content over two branches, copied; what a reader sees then."""
        with him.open(self.memory) as repo:
            main = repo.writable("main")
            for seed in range(4):
                main.put_array("kv_cache", noise(seed), frame=f"f{seed % 3}")
            main.append("logs", [{"step": 1}, {"step": 2}])
            main.put("skills", b"a document" * 4000, frame="notes")
            main.put_array("kv_cache", changed(noise(3)), frame="f0")
            repo.tag("v1", "main")
            main.seal()
            repo.branch("other", source="main").put_array("kv_cache", noise(9), frame="f2")
            repo.tier.push(all=everything)
            return content(repo)

    def restore(self, **options: bool) -> him.app.Restored:  # type: ignore[name-defined]
        return him.restore(str(self.cold), self.again, budget_bytes=BUDGET, **options)

    def objects(self) -> dict[str, bytes]:
        store = ObjectFolder(self.cold)
        return {name: store.get(name, size) for name, size in store.list("")}


def changed(values: Values) -> Values:
    """A tile that is stored as a delta of the other."""
    other = values.copy()
    other[10:14, 20:40] ^= 1
    return other


def used(folder: Path) -> int:
    return sum(512 * pack.stat().st_blocks for pack in (folder / "packs").iterdir())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 600_000)
    return Place(tmp_path)


def test_everything_comes_back_from_the_cold_tier_alone(place: Place) -> None:
    before = place.fill(everything=True)
    commits = len(list(him.open(place.memory).log()))
    shutil.rmtree(place.memory)
    found = place.restore()
    assert (found.commits, found.left_out, found.lacking) == (commits, 0, "")
    assert found.packs >= 3 and found.until_ns > 0
    with him.open(place.again) as repo:
        assert used(place.again) < found.cold_bytes // 10, "packs are fetched as they are read"
        assert content(repo) == before
        assert repo.tier.status().fetched_bytes > 0
        assert repo.fsck().ok


def test_all_of_it_can_be_fetched_at_once(place: Place) -> None:
    before = place.fill(everything=True)
    shutil.rmtree(place.memory)
    place.restore(everything=True)
    place.cold.rename(place.cold.with_name("gone"))
    with him.open(place.again) as repo:
        assert content(repo) == before


def test_fetching_all_goes_on_where_it_was_interrupted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = place.fill(everything=True)
    ranges, left = ObjectFolder.get_ranges, [0]

    def failing(store: ObjectFolder, name: str, wanted: list[tuple[int, int]]) -> list[memoryview]:
        left[0] -= name.startswith("packs/")
        if left[0] < 0:
            raise StorageError("the store is gone", place=name)
        return ranges(store, name, wanted)

    left[0] = 2
    monkeypatch.setattr(ObjectFolder, "get_ranges", failing)
    with pytest.raises(StorageError):
        place.restore(everything=True)
    assert used(place.again) > 0 and not (place.again / "him.json").exists()
    left[0] = 10**6
    place.restore(everything=True)
    assert 10**6 - left[0] == len(list((place.cold / "packs").iterdir())) - 2, "what was fetched is not again"
    place.cold.rename(place.cold.with_name("gone"))
    with him.open(place.again) as repo:
        assert content(repo) == before


def test_a_marker_of_newer_software_is_refused_before_anything_is_written(place: Place) -> None:
    place.fill(everything=True)
    marker = place.cold / "him.json"
    marker.write_bytes(msgspec.structs.replace(parsed(marker.read_bytes(), ""), format=99).encoded())
    with pytest.raises(VersionError):
        place.restore()
    assert not place.again.exists()


def test_more_than_the_budget_is_refused_before_anything_is_fetched(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.fill(everything=True)
    monkeypatch.setattr("him.app.opening.WARM_FREE_RATIO", 0.95)
    with pytest.raises(LimitError, match="budget"):
        place.restore(everything=True)
    assert used(place.again) == 0
    assert place.restore().commits, "the same folder, without everything"


def test_what_only_the_first_machine_had_is_left_out_and_said(place: Place) -> None:
    place.fill(everything=True)
    with him.open(place.memory) as repo:
        before = content(repo)
        done = next(repo.log(1))
        repo.writable("main").put_array("kv_cache", noise(50, 100), frame="new")
        repo.tag("late", "main")
        repo.tier.push()
        assert repo.tier.status().only_warm_packs == 0
    found = place.restore()
    assert found.left_out == 2 and found.lacking.startswith("packs/")
    # The one that opened a child of the sealed head names no pack.
    assert found.commits == int(str(done["seq"])) + 1 and found.until_ns > int(str(done["time_ns"]))
    with him.open(place.again) as repo:
        now = content(repo)
        assert {name: now.get(name) for name in before} == before | {"ref main": now["ref main"]}
        assert repo.fsck().ok
        assert "late" not in repo.refs()


@pytest.mark.parametrize("which", ["first", "middle"])
@pytest.mark.parametrize("how", ["missing", "flipped"])
def test_a_missing_or_damaged_piece_of_the_log_is_named(place: Place, which: str, how: str) -> None:
    for _ in range(3):
        place.fill(everything=True)
        with him.open(place.memory) as repo:
            repo.delete_ref("v1")
            repo.delete_ref("other")
    names = sorted((place.cold / "log").iterdir())
    assert len(names) >= 3
    piece = names[0 if which == "first" else len(names) // 2]
    if how == "missing":
        piece.unlink()
    else:
        flip(piece, piece.stat().st_size // 2, 3)
    with pytest.raises((IntegrityError, NotFoundError)) as caught:
        place.restore()
    assert f"log/{piece.name}" in caught.value.place
    assert not (place.again / "him.json").exists()


@pytest.mark.parametrize("what", ["last byte", "length", "last byte of a full piece"])
def test_a_damaged_end_of_the_log_is_not_taken_for_a_short_one(
    place: Place, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.fill(everything=True)
    last = max((place.cold / "log").iterdir())
    size = last.stat().st_size
    if what == "last byte of a full piece":
        monkeypatch.setattr("him.catalog.restore.COLD_PART_BYTES", size)
    record = int.from_bytes(last.read_bytes()[-4:], "little")
    # The length of a record's body is the second field of its head.
    flip(last, size - record + 6 if what == "length" else size - 1, 1)
    with pytest.raises(IntegrityError) as caught:
        place.restore()
    assert f"log/{last.name} @" in caught.value.place


def test_a_log_copied_in_part_is_restored_up_to_its_last_whole_record(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tier.cold", "catalog.restore"):
        monkeypatch.setattr(f"him.{module}.COLD_PART_BYTES", 1000)
    place.fill(everything=True)
    pieces = sorted((place.cold / "log").iterdir())
    assert len(pieces) > 3
    whole = place.restore()
    shutil.rmtree(place.again)
    # As a copy is left that was interrupted before its last piece.
    pieces[-1].unlink()
    found = place.restore()
    assert 0 < found.commits < whole.commits
    with him.open(place.again) as repo:
        assert repo.fsck().ok


def test_a_pack_that_the_cold_tier_lost_cuts_the_log_before_it(place: Place) -> None:
    place.fill(everything=True)
    with him.open(place.memory) as repo:
        lost = [operation["pack"] for entry in repo.log() for operation in entry["operations"] if "pack" in operation]  # type: ignore[attr-defined]
    (place.cold / str(lost[0])).unlink()
    found = place.restore()
    assert found.left_out > 0 and found.lacking == lost[0]
    with him.open(place.again) as repo:
        assert repo.fsck().ok


def test_a_cold_tier_without_receipts_is_read_once(place: Place) -> None:
    before = place.fill(everything=True)
    shutil.rmtree(place.cold / "receipts")
    assert place.restore().left_out == 0
    with him.open(place.again) as repo:
        assert content(repo) == before and repo.fsck().ok


def test_a_folder_with_something_in_it_is_left_alone(place: Place) -> None:
    place.fill(everything=True)
    place.again.mkdir()
    (place.again / "notes.txt").write_text("mine")
    with pytest.raises(ConflictError):
        place.restore()
    assert [one.name for one in place.again.iterdir()] == ["notes.txt"]
    with pytest.raises(ConflictError):
        him.restore(str(place.cold), place.memory)
    nowhere = place.again.with_name("nowhere")
    with pytest.raises(NotFoundError):
        him.restore(str(nowhere), place.again.with_name("third"))
    assert not nowhere.exists()
    nowhere.mkdir()
    with pytest.raises(NotFoundError, match="no repository"):
        him.restore(str(nowhere), place.again.with_name("third"))


def test_an_interrupted_restore_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = place.fill(everything=True)
    shutil.rmtree(place.memory)
    get, left = ObjectFolder.get, [3]

    def failing(store: ObjectFolder, name: str, limit: int) -> bytes:
        left[0] -= 1
        if left[0] < 0:
            raise StorageError("the store is gone", place=name)
        return get(store, name, limit)

    for tries in range(1, 40):
        left[0] = tries
        monkeypatch.setattr(ObjectFolder, "get", failing)
        try:
            place.restore()
            break
        except StorageError:
            monkeypatch.setattr(ObjectFolder, "get", get)
            with pytest.raises(HimError):
                him.open(place.again)
    else:
        pytest.fail("never done")
    assert tries > 2
    monkeypatch.setattr(ObjectFolder, "get", get)
    with him.open(place.again) as repo:
        assert content(repo) == before and repo.fsck().ok


# -- whose the cold tier is


def test_a_restored_repository_writes_nothing_to_the_first_ones_cold_tier(place: Place) -> None:
    place.fill(everything=True)
    place.restore()
    objects = place.objects()
    with him.open(place.again) as repo:
        repo.writable("main").put_array("kv_cache", noise(70), frame="mine")
        with pytest.raises(ConflictError, match="only reads") as refused:
            repo.tier.push(all=True)
        assert "--take-over" in refused.value.fix
        assert repo.tier.demote() >= 0
        repo.set_tier(str(place.cold), 2 * BUDGET)
    with him.open(place.again) as repo, pytest.raises(ConflictError, match="only reads"):
        repo.tier.push(all=True)
    assert place.objects() == objects
    with him.open(place.memory) as repo:
        repo.writable("main").put_array("kv_cache", noise(71), frame="theirs")
        repo.tier.push(all=True)
        assert repo.tier.status().only_warm_packs == 0


def test_who_takes_over_goes_on_and_the_first_notices(place: Place, tmp_path: Path) -> None:
    place.fill(everything=True)
    with him.open(place.memory) as repo:
        repo.writable("main").put_array("kv_cache", noise(60), frame="lost")
        repo.tier.push()
    assert place.restore().left_out > 0
    objects = place.objects()
    with him.open(place.again) as repo:
        repo.set_tier(str(place.cold), BUDGET, take_over=True)
    with him.open(place.again) as repo:
        repo.writable("main").put_array("kv_cache", noise(61), frame="mine")
        repo.tier.push(all=True)
        assert repo.tier.status().only_warm_packs == 0
        mine = content(repo)
    with him.open(place.memory) as repo:
        repo.writable("main").put_array("kv_cache", noise(62), frame="theirs")
        theirs = content(repo)
        with pytest.raises(ConflictError, match="taken the cold tier over"):
            repo.tier.push(all=True)
        assert "taken" in repo.tier.status().fault
        assert content(repo) == theirs, "the first one loses nothing it has"
    now = place.objects()
    assert {name: now[name] for name in objects} == objects, "nothing of the first one was changed"
    him.restore(str(place.cold), tmp_path / "third", budget_bytes=BUDGET)
    with him.open(tmp_path / "third") as repo:
        assert content(repo) == mine and repo.fsck().ok


def test_the_first_can_take_it_back(place: Place, tmp_path: Path) -> None:
    place.fill(everything=True)
    place.restore()
    with him.open(place.again) as repo:
        repo.set_tier(str(place.cold), BUDGET, take_over=True)
    with him.open(place.again) as repo:
        repo.writable("main").put_array("kv_cache", noise(61), frame="mine")
        repo.tier.push(all=True)
    with him.open(place.memory) as repo:
        repo.set_tier(str(place.cold), BUDGET, take_over=True)
    with him.open(place.memory) as repo:
        repo.writable("main").put_array("kv_cache", noise(62), frame="theirs")
        repo.tier.push(all=True)
        theirs = content(repo)
    him.restore(str(place.cold), tmp_path / "third", budget_bytes=BUDGET)
    with him.open(tmp_path / "third") as repo:
        assert content(repo) == theirs and repo.fsck().ok
    with him.open(place.again) as repo, pytest.raises(ConflictError):
        repo.tier.push()


def test_two_copies_of_one_repository_do_not_share_a_cold_tier(place: Place, tmp_path: Path) -> None:
    place.fill(everything=True)
    with him.open(place.memory) as repo:
        repo.writable("main").put_array("kv_cache", noise(80, 300), frame="both")
    shutil.copytree(place.memory, tmp_path / "copy")
    for number, folder in enumerate((place.memory, tmp_path / "copy")):
        with him.open(folder) as repo:
            repo.writable("main").put_array("kv_cache", noise(81 + number), frame="own")
            own = content(repo)
            if number == 0:
                repo.tier.push(all=True)
                first = own
                continue
            with pytest.raises(ConflictError):
                repo.tier.push(all=True)
    place.restore()
    with him.open(place.again) as repo:
        assert content(repo) == first and repo.fsck().ok


def test_two_copies_that_share_every_pack_do_not_share_a_log(place: Place, tmp_path: Path) -> None:
    place.fill(everything=True)
    shutil.copytree(place.memory, tmp_path / "copy")
    with him.open(place.memory) as repo:
        repo.tag("mine", "main")
        repo.tier.push()
    with him.open(tmp_path / "copy") as repo:
        repo.tag("theirs", "main")
        with pytest.raises(ConflictError, match="log of another"):
            repo.tier.push()
    place.restore()
    with him.open(place.again) as repo:
        assert {"mine", "v1"} <= repo.refs().keys()


# -- on a disk that fails


class Machine:
    """The storage rooms over a disk in memory, with the cold tier in a dict."""

    def __init__(self, disk: MemDisk, cold: MemObjects, seed: str) -> None:
        self.mirror = Mirror(disk, cold, FakeClock(), 10**7)
        self.stack = Stack(disk, mirror=self.mirror, rng=FakeRng(seed))

    def put(self, number: int, value: Values | None = None) -> None:
        self.stack.ingest.tiles(
            "main", "kv_cache", f"f{number}", {(0, 0): noise(number, 64) if value is None else value}
        )

    def ends(self) -> None:
        self.stack.history.finish_packs()


def machine(cold: MemObjects) -> tuple[MemDisk, Machine]:
    disk = MemDisk()
    FileLog.create(disk)
    return disk, Machine(disk, cold, "a")


def silent(_done: int, _total: int, _what: str) -> None:
    """No progress."""


def restored(disk: MemDisk, cold: MemObjects) -> Iterator[Stack]:
    again = Machine(disk, cold, "z")
    yield again.stack
    again.stack.close()


def test_a_pack_across_the_cut_gets_its_end_and_its_name_is_never_used_again() -> None:
    """Two processes write at once; what one of them holds is not copied, though the other's deltas are made of it."""
    cold = MemObjects()
    disk, one = machine(cold)
    one.put(0)
    other = Machine(disk, cold, "b")
    for number in (1, 2, 3):
        other.put(number)
    one.put(4)
    one.put(4, changed(noise(4, 64)))
    # A delta in the other's pack of a tile in this one's.
    one.put(1, changed(noise(1, 64)))
    other.put(4, changed(changed(changed(noise(4, 64)))[::-1].copy()))
    (kept,) = {name for name in disk.list("packs") if f"packs/{name}" == one.stack.store._writer.name}  # type: ignore[union-attr]
    one.ends()
    one.mirror.push_all()
    assert [name for name in cold.objects if name.startswith("packs/")] == [f"packs/{kept}"]
    left = MemDisk()
    found = restore(left, cold, FakeClock(), "again", silent)
    assert found.left_out > 0 and found.packs == 1
    for stack in restored(left, cold):
        assert stack.at("main").tile(TileKey("kv_cache", "f0", 0, 0, 0)).tobytes() == noise(0, 64).tobytes()  # type: ignore[union-attr]
        report = stack.fsck()
        assert report.ok, report.errors
        names = {pack.name for pack in stack.projection.state().packs}
        assert names == {f"packs/{kept}"}
        stack.ingest.tiles("main", "kv_cache", "new", {(0, 0): noise(9, 64)})
        assert {pack.name for pack in stack.projection.state().packs} > names


def test_what_was_begun_when_the_cold_tier_held_less_goes_on() -> None:
    cold = MemObjects()
    disk, one = machine(cold)
    one.put(0)
    other = Machine(disk, cold, "b")
    other.put(1)
    one.put(2)
    one.ends()
    one.mirror.push_all()
    left = MemDisk()
    before = restore(left, cold, FakeClock(), "again", silent)
    assert (before.packs, before.left_out > 0) == (1, True)
    other.put(3)
    other.ends()
    other.mirror.push_all()
    after = restore(left, cold, FakeClock(), "again", silent)
    assert (after.packs, after.left_out) == (2, 0)
    other.stack.history.refresh()
    for stack in restored(left, cold):
        assert stack.content() == other.stack.content()
        assert stack.fsck().ok


@pytest.mark.parametrize("mode", ["power", "power-after", "refuse", "partial"])
def test_a_power_cut_during_a_restore_loses_nothing(mode: str) -> None:
    cold = MemObjects()
    _, one = machine(cold)
    for number in range(6):
        one.put(number)
        if number % 2:
            one.ends()
            one.mirror.push_all()
    one.put(7)
    one.mirror.push_all()
    whole = MemDisk()
    expected = restore(whole, cold, FakeClock(), "again", silent)
    assert expected.left_out > 0
    (before,) = (stack.content() for stack in restored(whole, cold))
    count = MemDisk()
    restore(count, cold, FakeClock(), "again", silent)
    assert count.faults.count > 8
    for at in range(1, count.faults.count + 1):
        for keep in ("all", "half", "none"):
            disk = MemDisk(Faults(at, mode))
            with suppress(PowerLoss, StorageError):
                restore(disk, cold, FakeClock(), "again", silent)
            left = disk.after_power_loss(lambda keep=keep: keep) if mode.startswith("power") else disk.copy()
            assert restore(left, cold, FakeClock(), "again", silent) == expected, (at, keep)
            for stack in restored(left, cold):
                assert stack.content() == before
                assert stack.fsck().ok


def test_what_was_collected_is_gone_from_the_cold_tier_and_nothing_else(place: Place) -> None:
    place.fill(everything=True)
    with him.open(place.memory) as repo:
        for version in range(4):
            repo.writable("busy").put_array("kv_cache", noise(20 + version), frame="f")
        repo.tier.push(all=True)
    before = set(place.objects())
    with him.open(place.memory) as repo:
        found = repo.gc(dead_share=0.01)
        assert found.condemned_packs > 0
        assert found.removed_packs == found.condemned_packs
        held = content(repo)
        kept = {f"packs/{path.name}" for path in (place.memory / "packs").iterdir()}
    gone = {name for name in before - set(place.objects()) if name.startswith("packs/")}
    assert len(gone) == found.removed_packs
    assert {name for name in place.objects() if name.startswith("packs/")} == kept
    assert {name for name in place.objects() if name.startswith("receipts/")} == {
        name.replace("packs/", "receipts/") for name in kept
    }
    shutil.rmtree(place.memory)
    assert place.restore().left_out == 0
    with him.open(place.again) as repo:
        assert content(repo) == held
        assert repo.fsck().ok


def test_a_copy_stays_as_long_as_a_restore_could_need_it(place: Place) -> None:
    """Another process writes to a pack that the cold tier lacks: a restore ends before its first record."""
    place.fill(everything=True)
    with him.open(place.memory) as other:
        other.writable("other's").put_array("kv_cache", noise(30), frame="f")
        with him.open(place.memory) as repo:
            for version in range(4):
                repo.writable("busy").put_array("kv_cache", noise(20 + version), frame="f")
            repo.tier.push()
            before = {name for name in place.objects() if name.startswith("packs/")}
            assert repo.gc(dead_share=0.01).removed_packs > 0
            assert before <= set(place.objects()), "nothing is gone from there yet"
        shutil.rmtree(place.again, ignore_errors=True)
        assert place.restore().left_out > 0
        with him.open(place.again) as repo:
            assert repo.fsck().ok
            assert repo.refs()["v1"]
    with him.open(place.memory) as repo:
        repo.tier.push(all=True)
        repo.gc(dead_share=0.01)
    here = {f"packs/{path.name}" for path in (place.memory / "packs").iterdir()}
    assert {name for name in place.objects() if name.startswith("packs/")} == here
