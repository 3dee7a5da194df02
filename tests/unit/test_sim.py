"""The simulator itself: it repeats, finds what was planted, cuts failures down; its world is as hard as a real one."""

import os
import subprocess
import sys
from collections.abc import Callable
from random import Random

import pytest
from fakes import MemDisk

from him.errors import StorageError, UnavailableError
from him.sim.disk import FileData, Volume
from him.sim.faults import FAULTS
from him.sim.model import EMPTY, Contents, Violation
from him.sim.objects import Bucket, SimObjects
from him.sim.plant import NEEDED, PLANTS, planted
from him.sim.run import ALL_FAULTS, simulate
from him.sim.schedule import Deadlock, Schedule
from him.sim.shrink import Case, shrink
from him.sim.small import LIMITS, small
from him.sim.workload import KINDS, workload

FOUND_WITHIN = {"skipped-fsync": 12, "dropped-nonce": 6, "ignored-leases": 8}
"""Seeds of 400 calls each within which a planted bug is found."""


@pytest.mark.parametrize("seed", range(1, 5))
def test_nothing_is_lost_or_wrong(seed: int) -> None:
    report = simulate(seed, 600, processes=1 + seed % 4)
    assert report.failure is None, report.failure
    assert report.operations == 600
    assert report.records > 100
    assert sum(report.faults.values()) > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_nothing_is_lost_or_wrong_for_long(seed: int) -> None:
    report = simulate(seed, 3_000, processes=1 + seed % 4)
    assert report.failure is None, report.failure


def test_the_same_seed_gives_the_same_events() -> None:
    first, again = (simulate(7, 300) for _ in range(2))
    assert first == again
    assert first.switches > 50
    assert simulate(8, 300).digest != first.digest


def test_events_do_not_hang_on_the_order_of_hashes() -> None:
    told = {
        subprocess.run(
            [sys.executable, "-c", "from him.sim.run import simulate; print(simulate(9, 250).digest)"],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_a_planted_bug_is_found(name: str) -> None:
    failures = []
    for seed in range(1, FOUND_WITHIN[name] + 1):
        with planted(name):
            report = simulate(seed, 400, ops=workload(seed, 400, 3, NEEDED[name]))
        if report.failure is not None:
            failures.append(report.failure.check)
            break
    assert failures, f"not within {FOUND_WITHIN[name]} seeds"


def test_a_failure_is_cut_down() -> None:
    with planted("dropped-nonce"):
        for seed in range(1, 20):
            ops = tuple(workload(seed, 150, 3, NEEDED["dropped-nonce"]))
            report = Case(seed, ops, 3, ALL_FAULTS).run()
            if report.failure is not None:
                break
        assert report.failure is not None
        case, found = shrink(seed, ops, 3, ALL_FAULTS, report, tries=60)
    assert found.failure is not None
    assert found.failure.check == report.failure.check
    assert len(case.ops) < len(ops) // 2
    assert len(case.faults) < len(ALL_FAULTS)


def test_every_fault_has_its_reason_and_happens() -> None:
    assert all(fault.why and fault.every > 0 for fault in FAULTS.values())
    told: set[str] = set()
    for seed in range(20, 26):
        told |= simulate(seed, 700).faults.keys()
    assert told >= set(FAULTS) - {"list stale"}


def test_limits_come_back_and_a_renamed_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from him.tier import warm

    before = warm.PACK_TARGET_BYTES
    with small():
        assert warm.PACK_TARGET_BYTES == LIMITS["PACK_TARGET_BYTES"] != before
    assert before == warm.PACK_TARGET_BYTES
    monkeypatch.setitem(LIMITS, "NO_SUCH_LIMIT", 1)
    with pytest.raises(LookupError, match="NO_SUCH_LIMIT"), small():
        pass
    assert before == warm.PACK_TARGET_BYTES


def test_a_kind_of_call_comes_as_often_as_it_says() -> None:
    ops = workload(1, 20_000, 3)
    share = sum(op.kind == "put" for op in ops) / len(ops)
    assert share == pytest.approx(KINDS["put"].often / sum(work.often for work in KINDS.values()), rel=0.2)


# -- its world


def test_a_failed_sync_is_never_mended_by_the_next() -> None:
    data = FileData()
    data.change(0, b"lost")
    data.fail_sync(lambda: False)
    data.sync()
    assert bytes(data.now) == b"lost"
    assert bytes(data.settled(lambda: "all").now) == b""


def test_a_torn_piece_keeps_any_of_its_sectors() -> None:
    data = FileData()
    data.change(100, bytes([1]) * 1_500)
    coin = iter([False, True, False, True])
    left = bytes(data.settled(lambda: "torn", lambda: next(coin)).now)
    kept = {at // 512 for at, byte in enumerate(left) if byte}
    assert kept == {1, 3}


def test_a_removal_lasts_once_its_folder_was_synced() -> None:
    disk = MemDisk()
    for name in ("packs/a", "packs/b"):
        disk.write_whole(name, b"x")
    disk.remove("packs/a")
    disk.sync_folder("packs")
    disk.remove("packs/b")
    assert sorted(disk.after_power_loss(lambda: "none").files) == ["packs/b"]
    assert sorted(disk.after_power_loss(lambda: "all").files) == []


def test_a_file_that_nobody_holds_gives_its_lock_back() -> None:
    volume = Volume()
    one, other = MemDisk(volume=volume), MemDisk(volume=volume)
    held = one.open("lock", create=True)
    assert held.lock(wait=False)
    assert not other.open("lock").lock(wait=False)
    del held
    assert other.open("lock").lock(wait=False)


class Lossy:
    """Carries requests out and loses their replies."""

    def ask(self, name: str, *, writes: Callable[[], None] | None = None) -> None:
        if writes is not None:
            writes()
            raise UnavailableError("no reply")

    def stale(self) -> bool:
        return True


def test_a_lost_reply_leaves_the_object_and_a_stale_list_hides_it() -> None:
    bucket = Bucket()
    store = SimObjects(bucket, Lossy())
    with pytest.raises(UnavailableError):
        store.put("a", b"x", if_absent=True)
    assert store.get("a", 10) == b"x"
    assert list(store.list("")) == []
    bucket.remember()
    assert list(store.list("")) == [("a", 1)]


def test_processes_that_wait_for_each_other_are_told() -> None:
    schedule = Schedule(Random(1), 5)
    with pytest.raises(Deadlock):
        schedule.run([lambda: schedule.wait(lambda: False)] * 2)


def test_an_error_of_one_process_ends_all() -> None:
    schedule, ran = Schedule(Random(1), 2), []

    def fails() -> None:
        raise StorageError("the end")

    def works() -> None:
        for _ in range(1_000):
            schedule.step()
            ran.append(1)

    with pytest.raises(StorageError):
        schedule.run([works, fails, works])
    assert len(ran) < 2_000


def test_two_directories_of_one_content_are_told() -> None:
    contents = Contents()
    contents.note(b"", EMPTY)
    with pytest.raises(Violation, match="two directories"):
        contents.note(b"d" * 32, EMPTY)
