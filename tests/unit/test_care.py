"""Scrubbing, healing, quarantine, the journal, and the log's spare copy."""

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeClock, FakeEncoder, FakeReader, FakeRng, MemDisk, MemObjects, Stack, new_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import him
from him.adapters.local import LocalDisk
from him.app import Repository
from him.app import open as open_repository
from him.catalog import spare
from him.catalog.log import LOG_PATH, FileLog
from him.cli import service
from him.cli.main import run
from him.cli.session import Session
from him.errors import BusyError, IntegrityError, UsageError
from him.tier.care import Journal
from him.tier.mirror import Mirror
from him.tier.protect import OFF, Shape
from him.tier.scrub import Scrubbed, Scrubber, put_right
from him.types import StreamSpec, TileKey

NOISE = StreamSpec("noise", tile_height=256, tile_width=256, dtype="uint8")
MIB = 1024 * 1024


def noise(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (256, 256), dtype=np.uint8)


def filled(disk: MemDisk, packs: int = 5, **options: object) -> Stack:
    stack = Stack(disk, **options)  # type: ignore[arg-type]
    stack.history.declare_stream(NOISE)
    for number in range(packs):
        stack.ingest.tiles("main", "noise", f"f{number}", {(0, 0): noise(number), (0, 1): noise(100 + number)})
        stack.history.finish_packs()
    return stack


def scrubber(stack: Stack, *, heal: bool = True, read: list[int] | None = None) -> Scrubber:
    pace = (lambda _size: None) if read is None else read.append
    return Scrubber(
        stack.store.disk, stack.store, stack.journal, stack.clock, stack.projection.state().packs, pace, heal=heal
    )


def packs_of(disk: MemDisk) -> list[str]:
    return sorted(name for name in disk.files if name.endswith(".pack"))


@pytest.fixture
def stack() -> Iterator[Stack]:
    made = filled(new_disk())
    yield made
    made.close()


def disk_of(stack: Stack) -> MemDisk:
    assert isinstance(stack.disk, MemDisk)
    return stack.disk


# -- scrubbing


def test_a_scrub_reads_everything_and_finds_nothing_wrong(stack: Stack) -> None:
    read: list[int] = []
    found = list(scrubber(stack, read=read).run())
    assert sorted(one.name for one in found) == packs_of(disk_of(stack))
    assert not any(one.faults for one in found)
    sizes = sum(len(disk_of(stack).files[name].now) for name in packs_of(disk_of(stack)))
    assert sum(one.size_bytes for one in found) == sizes
    assert 0.97 * sizes < sum(read) <= sizes


def test_what_was_read_longest_ago_comes_first_and_a_scrub_may_end_anywhere(stack: Stack) -> None:
    first: list[Scrubbed] = []
    for one in scrubber(stack).run():
        first.append(one)
        if len(first) == 2:
            break  # As an interrupted process: what was yielded last is not noted, for nobody has used it.
    again = [one.name for one in scrubber(stack).run()]
    assert again[-1] == first[0].name
    assert sorted(again) == packs_of(disk_of(stack))
    assert [one.name for one in scrubber(stack).run()] == again


def test_one_scrub_at_a_time(stack: Stack) -> None:
    running = scrubber(stack).run()
    next(running)
    with pytest.raises(BusyError, match="scrubs"):
        next(scrubber(stack).run())
    running.close()  # type: ignore[attr-defined]
    assert len(list(scrubber(stack).run())) == 5


def test_damage_is_told_healed_or_set_aside_and_released_when_it_is_sound_again(stack: Stack) -> None:
    disk = disk_of(stack)
    name = packs_of(disk)[0]
    good = bytes(disk.files[name].now)
    disk.files[name].now[5000] ^= 1
    told = [one for one in scrubber(stack, heal=False).run() if one.faults]
    assert [(one.name, len(one.left)) for one in told] == [(name, 1)]
    assert not stack.journal.quarantined()
    assert next(one.left for one in scrubber(stack).run() if one.faults)
    assert [pack for pack, _ in stack.journal.quarantined()] == [name]
    disk.files[name].now[:] = good
    assert not any(one.faults for one in scrubber(stack).run())
    assert not stack.journal.quarantined()


# -- the journal


def test_the_journal_is_one_for_all_processes() -> None:
    disk = MemDisk()
    one, other = Journal(disk, FakeClock()), Journal(disk, FakeClock())
    assert not one.quarantined()
    other.add("quarantined", "packs/a.pack", 128, 64, blob="00", why="rot")
    other.add("quarantined", "packs/a.pack", 128, 64, blob="00", why="told once")
    assert list(one.quarantined()) == [("packs/a.pack", 128)]
    one.add("healed", "packs/a.pack", 0, 4096, why="parity")
    assert not other.quarantined()
    assert [event.why for event in other.healed()] == ["parity"]


def test_a_damaged_line_costs_that_line_and_a_full_journal_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemDisk()
    journal = Journal(disk, FakeClock())
    for offset in (128, 256, 384):
        journal.add("quarantined", "packs/a.pack", offset, 64)
    disk.files["care/journal"].now[5] ^= 1
    assert list(Journal(disk, FakeClock()).quarantined()) == [("packs/a.pack", 256), ("packs/a.pack", 384)]
    monkeypatch.setattr("him.tier.care.CARE_JOURNAL_BYTES_MAX", 2_000)
    monkeypatch.setattr("him.tier.care.CARE_EVENTS_KEPT", 2)
    other = Journal(disk, FakeClock())
    other.quarantined()
    for offset in range(0, 64 * 50, 64):
        journal.add("healed", "packs/b.pack", offset, 64)
    assert len(disk.files["care/journal"].now) < 3_000
    assert [offset for _, offset in other.quarantined()] == [256, 384]
    assert len(other.healed()) >= 2


# -- the log's spare copy


def log_bytes(disk: MemDisk) -> bytearray:
    return disk.files[LOG_PATH].now


@given(st.integers(0, 2**32 - 1), st.sampled_from(["flip", "zeros", "cut", "gone", "many"]))
@settings(max_examples=40, deadline=None)
def test_a_damaged_log_is_mended_from_its_copy(seed: int, kind: str) -> None:
    disk = new_disk()
    stack = filled(disk, 3)
    spare.keep(disk, stack.log)
    stack.close()
    good, rng = bytes(log_bytes(disk)), np.random.default_rng(seed)
    at = int(rng.integers(len(good)))
    if kind == "flip":
        log_bytes(disk)[at] ^= 1 << int(rng.integers(8))
    elif kind == "zeros":
        log_bytes(disk)[at : at + 512] = bytes(len(good[at : at + 512]))
    elif kind == "cut":
        del log_bytes(disk)[at:]
    elif kind == "gone":
        del disk.files[LOG_PATH]
    else:
        for other in rng.integers(len(good), size=20):
            log_bytes(disk)[int(other)] ^= 255
    assert spare.mend(disk) or bytes(log_bytes(disk)) == good
    assert bytes(log_bytes(disk)) == good
    again = Stack(disk)
    assert again.fsck().ok
    again.close()


def test_the_copy_of_another_log_mends_nothing_and_is_made_anew(stack: Stack) -> None:
    disk, other = disk_of(stack), filled(new_disk(), 2, rng=FakeRng(9), clock=FakeClock(10**18))
    spare.keep(disk_of(other), other.log)
    foreign = bytes(disk_of(other).files[spare.SPARE].now)
    disk.open(spare.SPARE, create=True).write_at(0, foreign)
    good = bytes(log_bytes(disk))
    log_bytes(disk)[200] ^= 1
    assert spare.mend(disk) == []
    log_bytes(disk)[200] ^= 1
    spare.keep(disk, stack.log)
    assert bytes(disk.files[spare.SPARE].now) == good
    other.close()


def test_a_record_that_was_never_published_does_not_get_into_the_copy(stack: Stack) -> None:
    disk, end = disk_of(stack), len(log_bytes(disk_of(stack)))
    log_bytes(disk).extend(b"HLOG half a record")
    spare.keep(disk, stack.log)
    assert len(disk.files[spare.SPARE].now) == end
    assert spare.mend(disk) == []


# -- with a cold tier


class Mirrored:
    """A repository whose packs, and their parity, are in a cold tier too."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cold = folder, MemObjects()
        FileLog.create(LocalDisk(folder))
        self.stack = self.opened(0)
        self.stack.history.declare_stream(NOISE)
        for number in range(5):
            self.stack.ingest.tiles("main", "noise", f"f{number}", {(0, x): noise(10 * number + x) for x in range(6)})
            self.stack.history.finish_packs()
        self.stack.store.protect(lambda _done, _total, _what: None)
        self.mirror.push_all()

    def opened(self, seed: int) -> Stack:
        disk = LocalDisk(self.folder)
        self.mirror = Mirror(disk, self.cold, FakeClock(), 64 * MIB)
        self.stack = Stack(disk, mirror=self.mirror, rng=FakeRng(seed), parity=Shape(4, 2))
        packs, parity = self.stack.history.finished_packs, self.stack.parity.files
        store = self.stack.store
        self.mirror.watch(
            lambda: [*packs(), *parity()], self.stack.log.published, lambda finished: put_right(store, finished)
        )
        return self.stack

    def everything_is_right(self) -> None:
        for number in range(5):
            for x in range(6):
                found = self.stack.at("main").tile(TileKey("noise", f"f{number}", 0, 0, x))
                assert np.array_equal(found, noise(10 * number + x))

    def packs(self) -> list[str]:
        return sorted(name for name in self.cold.objects if name.endswith(".pack") and name.startswith("packs/"))


@pytest.fixture
def mirrored(tmp_path: Path) -> Iterator[Mirrored]:
    made = Mirrored(tmp_path)
    yield made
    made.stack.close()
    made.mirror.close()


def test_parity_goes_to_the_cold_tier_as_packs_do(mirrored: Mirrored) -> None:
    parity = [name for name in mirrored.cold.objects if name.endswith(".parity") and name.startswith("packs/")]
    assert len(parity) == 2 + 1
    assert mirrored.mirror.status().only_warm_packs == 0
    assert mirrored.mirror.demote() > 0
    mirrored.everything_is_right()


def test_what_both_tiers_have_lost_is_made_of_the_others_in_the_cold_tier(mirrored: Mirrored) -> None:
    mirrored.mirror.demote()
    for name in mirrored.packs()[:2]:
        del mirrored.cold.objects[name]
    mirrored.everything_is_right()


def test_a_scrub_of_the_copies_copies_again_what_the_cold_tier_lost_or_spoilt(mirrored: Mirrored) -> None:
    lost, spoilt, *_ = mirrored.packs()
    good = {name: mirrored.cold.objects[name] for name in (lost, spoilt)}
    mirrored.mirror.demote()
    del mirrored.cold.objects[lost]
    mirrored.cold.objects[spoilt] = good[spoilt][:-1] + bytes([good[spoilt][-1] ^ 1])
    stack = mirrored.stack
    packs = stack.projection.state().packs
    scrub = Scrubber(stack.store.disk, stack.store, stack.journal, stack.clock, packs, lambda _size: None, copies=True)
    told = {one.name: [error.message for error in one.faults] for one in scrub.run() if one.faults}
    assert told[lost] == ["the cold tier does not hold a pack it was given"]
    assert "the cold tier does not give back what it was given" in told[spoilt]
    assert {name: mirrored.cold.objects[name] for name in good} == good
    mirrored.everything_is_right()


def test_a_pack_is_mended_before_it_is_copied(tmp_path: Path) -> None:
    made = Mirrored(tmp_path)
    try:
        made.stack.ingest.tiles("main", "noise", "f9", {(0, 0): noise(99)})
        made.stack.history.finish_packs()
        made.stack.store.protect(lambda _done, _total, _what: None)
        new = next(one for one in made.stack.history.finished_packs() if not made.mirror.holds(one.pack))
        sound = (tmp_path / new.pack).read_bytes()
        spoil(tmp_path / new.pack, 5_000)
        made.mirror.push_all()
        assert made.cold.objects[new.pack] == sound == (tmp_path / new.pack).read_bytes()
    finally:
        made.stack.close()
        made.mirror.close()


def test_a_pack_that_is_cut_short_keeps_no_other_from_being_copied(tmp_path: Path) -> None:
    made = Mirrored(tmp_path)
    try:
        made.stack.parity.shape = OFF
        for number in (8, 9):
            made.stack.ingest.tiles("main", "noise", f"f{number}", {(0, 0): noise(90 + number)})
            made.stack.history.finish_packs()
        cut, whole = (one for one in made.stack.history.finished_packs() if not made.mirror.holds(one.pack))
        with (tmp_path / cut.pack).open("r+b") as file:
            file.truncate(cut.size // 2)
        with pytest.raises(IntegrityError, match="was not copied") as told:
            made.mirror.push_all()
        assert told.value.place == cut.pack
        assert cut.pack not in made.cold.objects
        assert len(made.cold.objects[whole.pack]) == whole.size
    finally:
        made.stack.close()
        made.mirror.close()


def test_a_scrub_fetches_nothing(mirrored: Mirrored) -> None:
    mirrored.mirror.demote()
    fetched = mirrored.mirror.status().fetched_bytes
    stack = mirrored.stack
    list(
        Scrubber(
            stack.store.disk,
            stack.store,
            stack.journal,
            stack.clock,
            stack.projection.state().packs,
            lambda _size: None,
        ).run()
    )
    assert mirrored.mirror.status().fetched_bytes - fetched < 2 * MIB, "lists of packs, and heads of parity files"


# -- all of it, as its users hold it


def repository(path: Path, *, create: bool = False) -> Repository:
    return open_repository(path, create=create, reader=FakeReader(), encoder=FakeEncoder())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("him.app.opening.RapidTextReader", FakeReader)
    monkeypatch.setattr("him.app.opening.MiniLmEncoder", FakeEncoder)
    monkeypatch.setattr("him.catalog.history.CHECKPOINT_RECORDS", 10)
    path = tmp_path / "memory"
    with repository(path, create=True) as repo:
        repo.declare_stream(NOISE)
        repo.care.set_parity(6, 3)
        for number in range(6):
            repo.writable("main").put("noise", noise(number), frame=f"f{number}")
            repo.care.protect(all=True)
    return path


def values(path: Path) -> list[bytes]:
    with repository(path) as repo:
        return [np.asarray(repo.snapshot("main").get("noise", frame=f"f{number}")).tobytes() for number in range(6)]


def spoil(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset if offset >= 0 else len(data) // 2] ^= 1
    path.write_bytes(data)


def test_heal_mends_everything_at_once(folder: Path) -> None:
    before = values(folder)
    packs = sorted((folder / "packs").glob("*.pack"))
    parity = sorted((folder / "packs").glob("*.parity"))
    spoil(packs[0])
    packs[1].unlink()
    os.truncate(packs[2], 1000)
    spoil(parity[0], 20)
    spoil(folder / "him.json", 12)
    spoil(folder / LOG_PATH, 400)
    spoil(max((folder / "log/checkpoints").iterdir()))
    (folder / "cache/projection.sqlite").write_bytes(b"no database at all" * 100)
    report = him.heal(folder)
    assert report.left == ()
    assert {fault.object for fault in report.healed} >= {"him.json", packs[1].relative_to(folder).as_posix()}
    assert him.check(folder).ok
    assert values(folder) == before
    with repository(folder) as repo:
        assert repo.care.parity().damaged_files == 0
        healed = repo.care.scrubbed().healed
    assert {event.why.split(",")[0] for event in healed} == {
        "parity",
        *(e.why.split(",")[0] for e in healed if "log" in e.why),
    }
    assert any(fault.place.startswith(LOG_PATH) for fault in report.healed), report.healed


def test_what_cannot_be_healed_is_told_with_its_remedy(folder: Path) -> None:
    for pack in sorted((folder / "packs").iterdir()):
        spoil(pack)
    report = him.heal(folder)
    assert not report.ok
    assert all(fault.fix and fault.place for fault in report.left)
    assert report.quarantined
    with pytest.raises(IntegrityError):
        values(folder)


def test_a_log_that_does_not_open_is_mended_by_opening(folder: Path) -> None:
    before = values(folder)
    (folder / LOG_PATH).unlink()
    assert values(folder) == before
    spoil(folder / LOG_PATH, 300)
    (folder / "cache/projection.sqlite").unlink()
    for kept in (folder / "log/checkpoints").iterdir():
        kept.unlink()
    assert values(folder) == before


def test_no_parity_any_more(folder: Path) -> None:
    with repository(folder) as repo:
        repo.care.set_parity(0, 0)
        repo.care.protect()
        assert repo.care.parity().groups == 0
    assert not list((folder / "packs").glob("*.parity"))
    with repository(folder) as repo, pytest.raises(UsageError, match="no group has"):
        repo.care.set_parity(60, 5)


def test_a_daemon_scrubs_beside_its_commands(folder: Path) -> None:
    """The background scrubber mends what it meets, waits as its rate asks, and ends at once when it is told to."""
    packs = sorted((folder / "packs").glob("*.pack"))
    good = packs[0].read_bytes()
    spoil(packs[0])
    with repository(folder) as repo:
        with service.scrubbing(repo, 10**9):
            scrubbed = threading.Event()
            while not scrubbed.wait(0.01):
                if not repo.care.scrubbed().never_read:
                    scrubbed.set()
        assert packs[0].read_bytes() == good
        with service.scrubbing(repo, 1):
            pass  # At a byte a second it would take years.


@pytest.mark.parametrize("words", ["scrub --json", "heal --json", "parity status --json", "parity update --all --json"])
def test_on_the_command_line(folder: Path, words: str) -> None:
    told, _ = run_line(folder, words)
    assert told[-1].get("ok", True) is True
    spoil(next((folder / "packs").glob("*.pack")))
    for pack in (folder / "packs").glob("*.parity"):
        pack.unlink()
    told, code = run_line(folder, words)
    if words.startswith(("scrub", "heal")):
        assert (told[-1]["ok"], code) == (False, 5)
    elif words.startswith("parity update"):
        assert (told[-1]["unsound_packs"], code) == (1, 5)
    else:
        assert (told[-1]["waiting_packs"], code) == (6, 0)


def run_line(folder: Path, words: str) -> tuple[list[dict[str, object]], int]:
    out, err = io.StringIO(), io.StringIO()
    session = Session(out=out, err=err, cwd=str(folder), environ={}, started_ns=0)
    code = run([*words.split(), "--repo", str(folder)], session)
    return [json.loads(line) for line in out.getvalue().splitlines()], code


def test_what_a_scrub_says_to_a_person(folder: Path) -> None:
    spoil(min((folder / "packs").glob("*.pack")))
    out = io.StringIO()
    session = Session(out=out, err=io.StringIO(), cwd=str(folder), environ={}, started_ns=0)
    assert run(["scrub", "--limit", "1GB", "--rate", "1GB", "--repo", str(folder)], session) == 0
    assert "— healed" in out.getvalue()
    assert "1 faults, 0 of them left" in out.getvalue()
    assert run(["scrub", "--status", "--repo", str(folder)], session) == 0
    assert "healed packs/" in out.getvalue()
    for wrong in (
        ["scrub", "--rate", "0"],
        ["parity", "set", "ten"],
        ["parity", "set", "0+4"],
        ["parity", "set", "99+9"],
    ):
        assert run([*wrong, "--repo", str(folder)], session) == 2


def test_damaged_settings_of_parity_take_nothing_away(folder: Path) -> None:
    """Rot in parity.json must neither bar the repository nor be taken for "off" by the next collection."""
    before = sorted((folder / "packs").glob("*.parity"))
    spoil(folder / "parity.json", 3)
    with repository(folder) as repo:
        repo.writable("main").put("noise", noise(99), frame="f0")
        repo.gc()
        assert repo.care.protect(all=True).removed_groups == 0
    assert sorted((folder / "packs").glob("*.parity")) == before
    told = [fault for fault in him.check(folder).errors if fault.object == "parity.json"]
    assert [(fault.kind, "him parity set" in fault.fix) for fault in told] == [("parity", True)]
    with repository(folder) as repo:
        repo.care.set_parity(6, 3)
        repo.care.protect(all=True)
        assert repo.care.parity().waiting_packs == 0
    assert him.check(folder).ok


def test_an_older_copy_of_the_log_does_not_shorten_the_spare_one(folder: Path) -> None:
    older = (folder / LOG_PATH).read_bytes()
    with repository(folder) as repo:
        repo.writable("main").put("noise", noise(99), frame="f0")
    newer = (folder / LOG_PATH).read_bytes()
    (folder / LOG_PATH).write_bytes(older)
    (folder / "log/end").unlink()
    (folder / "cache/projection.sqlite").unlink()
    repository(folder).close()
    assert (folder / spare.SPARE).read_bytes() == newer
