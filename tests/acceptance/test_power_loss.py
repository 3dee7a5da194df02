"""Spec §1.2, design §5 rule 2: real processes that are killed at random operations, and power cuts, lose nothing told.

Each run checks, after every cut and at the end: every acknowledged put is there byte for byte, each writer's commits
stand in the log in its order, fsck is clean, and a rebuilt catalogue, and a fresh repository that is told the same
writes under the same snapshot id, come to the same directory hash. (`bench/survive.py` holds the machinery.)
"""

from pathlib import Path

import pytest

from bench.commits import SHARE_AIM, shares
from bench.power import Fuse, Places, PowerDisk, cut_power
from bench.survive import survive


def test_s1_2_two_processes_on_one_snapshot_lose_nothing_to_kills_and_power_cuts(tmp_path: Path) -> None:
    found = survive(tmp_path, processes=2, commits=60, kills=4, cuts=3, seed=1)
    assert found.acknowledged == 120
    assert found.cuts == 3
    assert found.kills >= 3


def test_s1_2_group_commits_of_threads_in_two_processes_lose_nothing(tmp_path: Path) -> None:
    found = survive(tmp_path, processes=2, threads=3, commits=20, kills=3, cuts=2, seed=2)
    assert found.acknowledged == 120
    assert found.records < found.batches, "no batches were committed together"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_s1_2_two_processes_of_a_thousand_commits_each(tmp_path: Path, seed: int) -> None:
    found = survive(tmp_path, processes=2, commits=1_000, kills=16, cuts=6, seed=seed)
    assert found.acknowledged == 2_000
    assert found.cuts == 6
    assert found.kills >= 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_s1_2_groups_of_threads_in_three_processes(tmp_path: Path, seed: int) -> None:
    found = survive(tmp_path, processes=3, threads=3, commits=100, kills=16, cuts=8, seed=10 + seed)
    assert found.acknowledged == 900
    assert found.records < found.batches


@pytest.mark.slow
@pytest.mark.parametrize("processes", [4, 8])
@pytest.mark.parametrize("what", ["log", "repository"])
def test_s1_2_processes_that_commit_as_fast_as_they_can_get_fair_shares(
    tmp_path: Path, what: str, processes: int
) -> None:
    counts = shares(tmp_path, what, processes, turnstile=True, seconds=4)
    assert min(counts) > 10
    assert min(counts) >= SHARE_AIM * max(counts), counts


# -- the disk that these runs trust


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


class Nothing:
    """Of what was not synced nothing reaches the medium."""

    def choice(self, _: object) -> float:
        return 0.0

    def random(self) -> float:
        return 0.5

    def shuffle(self, _: object) -> None:
        pass


def read(places: Places, path: str) -> bytes | None:
    file = places.volatile / path
    return file.read_bytes() if file.exists() else None


def test_a_power_cut_takes_what_was_not_synced(places: Places) -> None:
    disk = PowerDisk(places)
    file = disk.open("packs/a", create=True)
    file.write_at(0, b"synced")
    file.sync()
    disk.sync_folder("packs")
    file.write_at(6, b" and not")
    disk.open("packs/nameless", create=True).write_at(0, b"x")
    assert read(places, "packs/a") == b"synced and not"
    cut_power(places, Nothing())
    assert read(places, "packs/a") == b"synced"
    assert read(places, "packs/nameless") is None


def test_a_sync_makes_durable_what_another_wrote(places: Places) -> None:
    one, other = PowerDisk(places).open("log", create=True), PowerDisk(places).open("log")
    PowerDisk(places).sync_folder(".")
    one.write_at(0, b"by one ")
    other.write_at(7, b"by the other")
    other.sync()
    one.truncate(3)
    cut_power(places, Nothing())
    assert read(places, "log") == b"by one by the other"


def test_a_file_written_whole_is_durable_and_a_removed_one_may_come_back(places: Places) -> None:
    disk = PowerDisk(places)
    disk.write_whole("log/whole", b"first")
    disk.write_whole("log/whole", b"second")
    disk.write_whole("log/gone", b"gone")
    disk.remove("log/gone")
    assert disk.list("log") == ["whole"]
    disk.sync_folder("log")
    disk.remove("log/whole")
    cut_power(places, Nothing())
    assert read(places, "log/whole") == b"second"
    assert read(places, "log/gone") is None


def test_a_fuse_counts_changing_operations(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    dead: list[int] = []
    monkeypatch.setattr("bench.power.os.kill", lambda pid, sig: dead.append(sig))
    fuse = Fuse(3, "half")
    file = PowerDisk(places, fuse).open("f", create=True)
    file.write_at(0, b"whole")
    file.write_at(5, b"halved")
    assert read(places, "f") == b"wholehal"
    assert len(dead) == 1
