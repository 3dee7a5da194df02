"""Disks that are full, or turn read-only, at every stage of a day: real ones, a few MiB of tmpfs each (design §5).

Where the system lets nobody mount (not root, or no privilege in a container), files are limited by RLIMIT_FSIZE in a
process of their own instead, which says "file too large" where a full disk says "no space": the same stages, one kind
of refusal less. The simulated part, every single operation refused in turn, is tests/unit/test_faults.py.
"""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder, FakeReader, picture

import him
from him.errors import HimError, StorageError

MIB = 1024 * 1024
SIZE = 24 * MIB
BUDGET = 16 * MIB


def mounted(folder: Path, *options: str) -> bool:
    """Whether a small file system of its own could be put there."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={SIZE}", *options)), "him-test", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mounted(folder):
        pytest.skip("NOT TESTED: no tmpfs can be mounted here; the limit on file sizes below stands in for it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def opened(path: Path, *, create: bool = False) -> him.Repository:
    return him.open(path, create=create, reader=FakeReader(), encoder=FakeEncoder())


def noise(seed: int, side: int = 700) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


@contextmanager
def suppress_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        assert error.errno == errno.ENOSPC


@contextmanager
def full(disk: Path, *, leave: int = 0) -> Iterator[None]:
    """The rest of the disk is taken by something else."""
    ballast = disk / "ballast"
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    for size in (MIB, 4096, 1):
        with suppress_full():
            while True:
                os.write(descriptor, bytes(size))
    os.close(descriptor)
    if leave:
        os.truncate(ballast, max(0, ballast.stat().st_size - leave))
    try:
        yield
    finally:
        ballast.unlink()


def begun(path: Path) -> him.Repository:
    """A repository in the middle of its day."""
    repo = opened(path, create=True)
    work = repo.writable("main")
    work.put("skills", b"kept", frame="note")
    work.put_image(picture(60, 260, {(10, 10): "Submit"}), "login")
    work.put_array("kv_cache", noise(0), frame="first")
    return repo


Stage = Callable[[him.Repository, Path], object]


def fill_log(repo: him.Repository, _other: Path) -> None:
    """So many small commits that a checkpoint is due."""
    for number in range(12):
        repo.writable("main").append("logs", [{"n": number}], writer="w")


def push_tier(repo: him.Repository, _other: Path) -> None:
    repo.tier.push(all=True)


STAGES: dict[str, Stage] = {
    "put a document": lambda repo, _: repo.writable("main").put("skills", bytes(noise(1, 2000)), frame="large"),
    "put an array": lambda repo, _: repo.writable("main").put_array("kv_cache", noise(2, 1500), frame="second"),
    "put a picture": lambda repo, _: repo.writable("main").put_image(
        picture(600, 900, {(10, 10): "Cancel"}, noise=3), "noisy"
    ),
    "branch": lambda repo, _: [
        repo.branch(f"b{number}", source="main") for number in range(300) if f"b{number}" not in repo.refs()
    ],
    "seal": lambda repo, _: (
        repo.writable("main").put_image(picture(540, 600, {}, noise=9), "s"),
        repo.snapshot("main").seal(),
    ),
    "checkpoint": fill_log,
    "collect": lambda repo, _: (repo.delete_ref("old") if "old" in repo.refs() else None, repo.gc(dead_share=0.01)),
    "compact": lambda repo, _: repo.compact(),
    "rebuild": lambda repo, _: repo.fsck(rebuild=True),
    "transfer": lambda repo, other: repo.pull(other),
    "parity": lambda repo, _: (repo.care.set_parity(2, 1), repo.care.protect(all=True)),
}


def sound(path: Path) -> None:
    """What was acknowledged is there, and nothing is wrong."""
    with opened(path) as repo:
        assert repo.fsck().errors == ()
        assert repo.snapshot("main").get("skills", frame="note") == b"kept"
        assert np.array_equal(tiles(repo, "first"), noise(0))


def tiles(repo: him.Repository, frame: str) -> np.ndarray:
    """A frame put together."""
    handle = repo.snapshot("main")
    found = {(meta.y, meta.x): handle.get("kv_cache", frame=frame, y=meta.y, x=meta.x)
             for meta in handle.tiles("kv_cache", frame=frame)}  # fmt: skip
    rows = sorted({y for y, _ in found})
    return np.concatenate(
        [np.concatenate([np.asarray(found[at]) for at in sorted(found) if at[0] == y], axis=1) for y in rows]
    )


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A repository on another disk, with something to pull."""
    path = tmp_path / "other"
    with opened(path, create=True) as repo:
        repo.writable("theirs").put_array("kv_cache", noise(5, 1200), frame="theirs")
        repo.writable("theirs").seal()
    return path


@pytest.mark.parametrize("leave", [0, 20_000, 300_000])
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up(
    stage: str, leave: int, disk: Path, other: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clear error or none, nothing lost, and work goes on: in the same process, and in a new one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("him.catalog.history.CHECKPOINT_RECORDS", 10)
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 400_000)
    path = disk / "memory"
    with begun(path) as repo:
        repo.branch("old").put_array("kv_cache", noise(8), frame="old")
        with full(disk, leave=leave):
            try:
                STAGES[stage](repo, other)
            except StorageError as error:
                assert "full" in error.message and "free space" in error.fix
            # What is there can be read and asked for on a full disk.
            assert repo.snapshot("main").get("skills", frame="note") == b"kept"
            assert np.array_equal(tiles(repo, "first"), noise(0))
            assert repo.query("find button 'Submit'", "main", budget_ms=60_000).found
            sound(path)
        STAGES[stage](repo, other)
        repo.writable("main").put("skills", b"after", frame="after")
    sound(path)
    with opened(path) as repo:
        assert repo.snapshot("main").get("skills", frame="after") == b"after"
        STAGES[stage](repo, other)
    sound(path)


def test_a_full_disk_at_the_beginning(disk: Path) -> None:
    with full(disk):
        with pytest.raises(StorageError) as caught:
            opened(disk / "memory", create=True)
        assert "full" in caught.value.message
    with begun(disk / "memory"):
        pass
    sound(disk / "memory")


def test_caches_that_find_no_room_are_done_without(disk: Path) -> None:
    with begun(disk / "memory"):
        pass
    for file in (disk / "memory/cache").rglob("*"):
        if file.is_file():
            file.unlink()
    with full(disk):
        sound(disk / "memory")
        with opened(disk / "memory") as repo:
            assert repo.query("find button 'Submit'", "main", budget_ms=60_000).found
    sound(disk / "memory")


def test_a_full_disk_before_a_cold_tier(disk: Path, tmp_path: Path) -> None:
    """The tier's place is another disk: what is copied there gives room here."""
    with begun(disk / "memory") as repo:
        repo.set_tier(str(tmp_path / "cold"), BUDGET)
    with opened(disk / "memory") as repo:
        with full(disk):
            try:
                push_tier(repo, tmp_path)
            except StorageError as error:
                assert "full" in error.message
            sound(disk / "memory")
        push_tier(repo, tmp_path)
        assert repo.tier.demote() > 0
        with full(disk):
            # What is not here has no room to come to, and is passed through.
            assert np.array_equal(tiles(repo, "first"), noise(0))
    sound(disk / "memory")


def test_a_cold_tier_on_a_full_disk(disk: Path, tmp_path: Path) -> None:
    with begun(tmp_path / "memory") as repo:
        repo.set_tier(str(disk / "cold"), BUDGET)
    with opened(tmp_path / "memory") as repo:
        with full(disk), pytest.raises(StorageError) as caught:
            push_tier(repo, tmp_path)
        assert "full" in caught.value.message and caught.value.fix
        sound(tmp_path / "memory")
        push_tier(repo, tmp_path)
    him.restore(str(disk / "cold"), tmp_path / "again")
    sound(tmp_path / "again")


def test_a_restore_that_finds_no_room_goes_on_when_there_is(disk: Path, tmp_path: Path) -> None:
    with begun(tmp_path / "memory") as repo:
        repo.set_tier(str(tmp_path / "cold"), BUDGET)
    with opened(tmp_path / "memory") as repo:
        push_tier(repo, tmp_path)
    for leave in (0, 5_000, 20_000):
        with full(disk, leave=leave):
            try:
                him.restore(str(tmp_path / "cold"), disk / "again", everything=True)
                break
            except HimError as error:
                assert isinstance(error, StorageError) and "full" in error.message
    if not (disk / "again/him.json").exists():
        him.restore(str(tmp_path / "cold"), disk / "again", everything=True)
    sound(disk / "again")


def test_a_disk_that_turns_read_only(disk: Path, other: Path) -> None:
    """Reading, asking and checking work, writing says so; all goes on when it can be written to again.

    A tmpfs with files open for writing cannot be made read-only: what an open repository meets is in test_faults.py.
    """
    path = disk / "memory"
    begun(path).close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        repo = opened(path)
        assert repo.read_only
        assert repo.snapshot("main").get("skills", frame="note") == b"kept"
        for stage in ("put a document", "put an array", "branch", "collect", "transfer"):
            with pytest.raises(StorageError) as caught:
                STAGES[stage](repo, other)
            assert caught.value.kind == "storage" and caught.value.fix, stage
        assert repo.query("find button 'Submit'", "main", budget_ms=60_000).found
        assert repo.fsck().errors == ()
        assert him.check(path).errors == ()
        sound(path)
        repo.close()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    with opened(path) as repo:
        repo.writable("main").put("skills", b"after", frame="after")
    sound(path)


def limited(path: str, mode: str) -> None:
    """In a process of its own: no file may grow beyond what it has, and a little."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    repo = opened(Path(path))
    largest = max(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + int(mode), resource.RLIM_INFINITY))
    refused = 0
    for number in range(6):
        try:
            repo.writable("main").put_array("kv_cache", noise(100 + number), frame=f"n{number}")
        except StorageError as error:
            assert error.fix
            refused += 1
        assert repo.snapshot("main").get("skills", frame="note") == b"kept"
    assert refused
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    repo.writable("main").put("skills", b"after", frame="after")
    repo.close()


@pytest.mark.parametrize("mode", ["0", "1000", "400000"])
def test_files_that_may_not_grow(mode: str, tmp_path: Path) -> None:
    """Needs no privilege: so it stands in for the disk above where nothing can be mounted."""
    with begun(tmp_path / "memory"):
        pass
    process = multiprocessing.get_context("spawn").Process(target=limited, args=(str(tmp_path / "memory"), mode))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    sound(tmp_path / "memory")
    with opened(tmp_path / "memory") as repo:
        assert repo.snapshot("main").get("skills", frame="after") == b"after"
