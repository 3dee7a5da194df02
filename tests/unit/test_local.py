"""The local disk: whole writes, refusals that name the fix, locks that die with their holder."""

import errno
import fcntl
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from him.adapters.local import LocalDisk, SystemClock, SystemRng
from him.errors import NotFoundError, StorageError


@pytest.fixture
def disk(tmp_path: Path) -> LocalDisk:
    return LocalDisk(tmp_path)


def test_bytes_come_back_from_where_they_were_written(disk: LocalDisk) -> None:
    file = disk.open("a/b", create=True)
    file.write_at(10, b"hello")
    file.write_at(0, memoryview(b"xy"))
    assert file.read_at(0, 100) == b"xy" + bytes(8) + b"hello"
    assert file.read_at(12, 2) == b"ll"
    assert file.read_at(99, 5) == b""
    file.truncate(12)
    file.sync()
    assert file.size() == 12
    file.close()
    file.close()


def test_short_writes_and_reads_are_continued(disk: LocalDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_read, real_into = os.pwrite, os.pread, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: real_write(fd, b"".join(parts)[:3], at))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: real_read(fd, min(size, 2), at))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: real_into(fd, [parts[0][:2]], at))
    file = disk.open("f", create=True)
    file.write_at(0, b"01", b"", memoryview(b"2345"), b"6789")
    buffer = bytearray(12)
    assert file.read_into(3, memoryview(buffer)[:5]) == 5
    assert file.read_into(8, memoryview(buffer)[5:]) == 2
    assert buffer == b"3456789" + bytes(5)
    assert file.read_at(1, 7) == b"1234567"
    assert file.read_at(5, 100) == b"56789"


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "ftruncate", "pread", "preadv"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_what_the_system_refuses_is_a_storage_error(
    disk: LocalDisk, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    file = disk.open("f", create=True)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    work = {
        "pwritev": lambda: file.write_at(0, b"x"),
        "fdatasync": file.sync,
        "ftruncate": lambda: file.truncate(0),
        "pread": lambda: file.read_at(0, 1),
        "preadv": lambda: file.read_into(0, memoryview(bytearray(1))),
    }[call]
    with pytest.raises(StorageError) as caught:
        work()
    assert caught.value.place == "f"
    assert os.strerror(number) in caught.value.message
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert "full" in caught.value.message


def test_many_parts_of_all_sizes_are_written_in_order(disk: LocalDisk) -> None:
    parts = [bytes([number % 251]) * size for number, size in enumerate([1, 70_000, 0, 5, 65_536, 65_535] * 120)]
    file = disk.open("f", create=True)
    file.write_at(7, *parts)
    assert file.read_at(7, file.size()) == b"".join(parts)


def locked(disk: LocalDisk, offset: int, size: int) -> bool:
    """Whether whoever wants to free the range's space has to wait."""
    probe = os.open(disk._root / "f", os.O_RDWR)
    try:
        fcntl.fcntl(probe, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, size, 0))
    except BlockingIOError:
        return True
    finally:
        os.close(probe)
    return False


def test_a_view_shows_the_file_and_locks_its_range_while_it_lives(disk: LocalDisk) -> None:
    file = disk.open("f", create=True)
    data = np.random.default_rng(1).bytes(20_000)
    file.write_at(0, data)
    for offset, size in ((0, 10), (5_000, 9_000), (4096, 4096)):
        view = disk.view("f", offset, size)
        assert bytes(view) == data[offset : offset + size]
        assert view.readonly
        array = np.frombuffer(view, dtype=np.uint8)
        del view
        assert locked(disk, offset, size)
        assert not locked(disk, offset + size, 1)
        other = disk.view("f", offset, size)
        assert bytes(other) == data[offset : offset + size], "views share their lock"
        del array
        assert locked(disk, offset, size)
        del other
        assert not locked(disk, offset, size)


def test_a_view_of_what_is_not_there_is_refused(disk: LocalDisk) -> None:
    disk.open("f", create=True).write_at(0, b"12345")
    with pytest.raises(StorageError):
        disk.view("f", 3, 10)
    with pytest.raises(NotFoundError):
        disk.view("g", 0, 1)


def test_replacing_a_file_is_all_or_nothing(disk: LocalDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write_whole("folder/f", b"old")
    for call in ("fsync", "fdatasync", "pwritev", "replace"):
        disk.write_whole("folder/f", b"old")
        with monkeypatch.context() as patch:

            def refuse(*_: object) -> None:
                raise OSError(errno.ENOSPC, "full")

            patch.setattr(os, call, refuse)
            with pytest.raises(StorageError):
                disk.write_whole("folder/f", b"new")
        file = disk.open("folder/f")
        assert file.read_at(0, 9) in ((b"old",) if call != "fsync" else (b"old", b"new"))
        file.close()
    disk.write_whole("folder/f", b"newest")
    assert disk.open("folder/f").read_at(0, 9) == b"newest"
    assert disk.list("folder") == ["f"]


def test_listing_is_sorted_and_a_missing_folder_is_empty(disk: LocalDisk) -> None:
    for name in ("b", "a", "c"):
        disk.open(f"folder/{name}", create=True).close()
    assert disk.list("folder") == ["a", "b", "c"]
    assert disk.list("nowhere") == []
    disk.remove("folder/b")
    disk.remove("folder/b")
    assert disk.list("folder") == ["a", "c"]


def test_files_are_for_their_owner_alone(disk: LocalDisk, tmp_path: Path) -> None:
    disk.open("folder/f", create=True).close()
    assert (tmp_path / "folder/f").stat().st_mode & 0o077 == 0
    assert (tmp_path / "folder").stat().st_mode & 0o077 == 0


def test_a_missing_file_is_not_found_and_not_made(disk: LocalDisk, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        disk.open("f")
    assert not (tmp_path / "f").exists()


def test_a_read_only_disk_makes_and_changes_nothing(disk: LocalDisk, tmp_path: Path) -> None:
    disk.write_whole("f", b"there")
    mine = LocalDisk(tmp_path, read_only=True)
    file = mine.open("f", create=True)
    assert file.read_at(0, 9) == b"there"
    with pytest.raises(StorageError):
        file.write_at(0, b"x")
    with pytest.raises(NotFoundError):
        mine.open("g", create=True)


def test_a_lock_is_held_against_other_descriptors_and_given_back(disk: LocalDisk) -> None:
    one, other = disk.open("f", create=True), disk.open("f")
    assert one.lock(wait=True)
    assert not other.lock(wait=False)
    one.unlock()
    assert other.lock(wait=False)
    assert not one.lock(wait=False)
    other.close()
    assert one.lock(wait=False)


def test_a_lock_dies_with_its_process(disk: LocalDisk, tmp_path: Path) -> None:
    file = disk.open("f", create=True)
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "f")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert not file.lock(wait=False)
        holder.kill()
    assert file.lock(wait=False)


def test_clock_and_randomness() -> None:
    clock, rng = SystemClock(), SystemRng()
    assert clock.monotonic_ns() <= clock.monotonic_ns()
    assert clock.now_ns() > 1_700_000_000_000_000_000
    assert len(rng.token(16)) == 16
    assert rng.token(16) != rng.token(16)
