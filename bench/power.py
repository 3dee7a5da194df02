"""A disk whose power can be cut: what processes write is seen by all of them at once, and lasts once it was synced.

Two folders stand for one disk. Programs read and write the volatile one, as they would the kernel's page cache; the
durable one holds what has reached the medium. Beside each file a journal notes which pieces were written since the
last sync, by whomever: so one process's sync makes durable what another wrote, as a kernel does. A name lasts once its
folder was synced. Cutting the power (after every process was killed) throws the volatile folder away; of what was
not synced any pieces may have reached the medium, torn and in any order.
"""

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from him.adapters.local import LocalDisk, LocalFile

_ENTRY = struct.Struct("<cQQ")
_PIECE = 64
"""Bytes that reach the medium together or not at all: far less than a sector, to tear more."""


class Fuse:
    """Kills this process (SIGKILL) at its `at`-th changing operation: before it, after it, or with half of it done."""

    def __init__(self, at: int = 0, mode: str = "before") -> None:
        self._at = at
        self._mode = mode
        self._count = 0

    def run(self, whole: Callable[[], None], half: Callable[[], None] | None = None) -> None:
        """Do a changing operation, unless it is the one."""
        self._count += 1
        if self._count != self._at:
            whole()
            return
        if self._mode == "after":
            whole()
        elif self._mode == "half" and half is not None:
            half()
        os.kill(os.getpid(), signal.SIGKILL)


class Places:
    """Where the folders of one such disk lie."""

    def __init__(self, base: Path) -> None:
        self.volatile = base / "volatile"
        self.durable = base / "durable"
        self.unnamed = base / "unnamed"
        self._journals = base / "journals"
        for folder in (self.volatile, self.durable, self.unnamed, self._journals):
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def names(self) -> Iterator[None]:
        """Held while a name is made durable, or while it is found out whether it is."""
        with (self.volatile.parent / "names").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def journal(self, path: str) -> Path:
        """What was written to a file since its last sync."""
        return self._journals / path.replace("/", "%")

    def medium(self, path: str) -> Path:
        """Where a file's synced bytes are: under its name, or without one as long as its folder was not synced."""
        named = self.durable / path
        return named if named.exists() else self.unnamed / path.replace("/", "%")


class _Journal:
    """The journal of one open file, locked against other processes and threads while one works on it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._thread = threading.Lock()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._thread:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def note(self, kind: bytes, offset: int, size: int) -> None:
        os.write(self._descriptor, _ENTRY.pack(kind, offset, size))

    def entries(self) -> list[tuple[bytes, int, int]]:
        return _entries(os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0))

    def clear(self) -> None:
        os.ftruncate(self._descriptor, 0)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _entries(data: bytes) -> list[tuple[bytes, int, int]]:
    whole = len(data) // _ENTRY.size * _ENTRY.size
    return [_ENTRY.unpack_from(data, at) for at in range(0, whole, _ENTRY.size)]


class PowerFile(LocalFile):
    """A file in the volatile folder whose changes are noted before they are made."""

    def __init__(self, inner: LocalFile, path: str, places: Places, fuse: Fuse) -> None:
        super().__init__(inner.detach(), path)
        self._name, self._places, self._fuse = path, places, fuse
        self._journal = _Journal(places.journal(path))

    def write_at(self, offset: int, *parts: bytes | memoryview) -> None:
        data = b"".join(parts)
        with self._journal.held():
            self._journal.note(b"w", offset, len(data))
            write = super().write_at
            self._fuse.run(lambda: write(offset, data), lambda: write(offset, data[: len(data) // 2]))

    def truncate(self, size: int) -> None:
        with self._journal.held():
            self._journal.note(b"t", size, 0)
            cut = super().truncate
            self._fuse.run(lambda: cut(size))

    def sync(self) -> None:
        with self._journal.held():
            self._fuse.run(self._settle)

    def close(self) -> None:
        super().close()
        self._journal.close()

    def _settle(self) -> None:
        with self._places.names():
            descriptor = os.open(self._places.medium(self._name), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            for kind, offset, size in self._journal.entries():
                if kind == b"t":
                    os.ftruncate(descriptor, offset)
                else:
                    os.pwrite(descriptor, self.read_at(offset, size), offset)
        finally:
            os.close(descriptor)
        self._journal.clear()


class PowerDisk(LocalDisk):
    """`ports.Disk` over the volatile folder."""

    def __init__(self, places: Places, fuse: Fuse | None = None) -> None:
        super().__init__(places.volatile)
        self._places = places
        self._fuse = fuse or Fuse()

    def open(self, path: str, *, create: bool = False) -> PowerFile:
        make = super().open
        if create and not (self._places.volatile / path).exists():
            self._fuse.run(lambda: make(path, create=True).close())
        return PowerFile(make(path, create=create), path, self._places, self._fuse)

    def write_whole(self, path: str, *data: bytes) -> None:
        def replace() -> None:
            whole = b"".join(data)
            for folder in (self._places.volatile, self._places.durable):
                LocalDisk(folder).write_whole(path, whole)
            self._places.journal(path).unlink(missing_ok=True)

        self._fuse.run(replace)

    def remove(self, path: str) -> None:
        gone = super().remove
        self._fuse.run(lambda: gone(path))

    def sync_folder(self, folder: str) -> None:
        with self._places.names():
            self._fuse.run(lambda: self._name_all(folder))

    def _name_all(self, folder: str) -> None:
        there, kept = self._places.volatile / folder, self._places.durable / folder
        kept.mkdir(parents=True, exist_ok=True)
        names = {one.name for one in there.iterdir() if one.is_file()}
        for name in names - {one.name for one in kept.iterdir()}:
            synced = self._places.medium(f"{folder}/{name}")
            synced.rename(kept / name) if synced.exists() else (kept / name).touch()
        for one in list(kept.iterdir()):
            if one.is_file() and one.name not in names:
                one.unlink()


def cut_power(places: Places, rng: random.Random) -> None:
    """What a machine finds when it starts again; every process must be dead. Caches may or may not have survived."""
    share = rng.choice([0.0, 0.5, 1.0])
    for path in sorted(one for one in places.volatile.rglob("*") if one.is_file()):
        name = path.relative_to(places.volatile).as_posix()
        if name.startswith("cache/") and "addresses" not in name:
            continue
        medium = places.medium(name)
        if not (places.durable / name).exists() and rng.random() >= share:
            continue  # The name itself was lost.
        (places.durable / name).parent.mkdir(parents=True, exist_ok=True)
        data = bytearray(medium.read_bytes() if medium.exists() else b"")
        journal = places.journal(name)
        pieces = _entries(journal.read_bytes()) if journal.exists() else []
        _keep_some(data, path.read_bytes(), pieces, share, rng)
        (places.durable / name).write_bytes(data)
    caches = places.volatile / "cache"
    if caches.exists() and rng.random() < 0.5:
        for one in caches.glob("*.sqlite*"):
            (places.durable / "cache").mkdir(exist_ok=True)
            shutil.copy(one, places.durable / "cache" / one.name)
    base = places.volatile.parent
    for folder in (places.volatile, places.unnamed, base / "journals"):
        shutil.rmtree(folder)
    shutil.copytree(places.durable, places.volatile)
    shutil.rmtree(places.durable / "cache", ignore_errors=True)
    Places(base)


def _keep_some(
    data: bytearray, now: bytes, pieces: list[tuple[bytes, int, int]], share: float, rng: random.Random
) -> None:
    """Apply a share of what was not synced, in small parts and in any order."""
    parts: list[tuple[int, int]] = []
    for kind, offset, size in pieces:
        if kind == b"t":
            if rng.random() < share and offset < len(data):
                del data[offset:]
            continue
        end = min(offset + size, len(now))
        borders = [offset, *range((offset // _PIECE + 1) * _PIECE, end, _PIECE), end]
        parts += itertools.pairwise(borders) if offset < end else []
    rng.shuffle(parts)
    for start, end in parts:
        if rng.random() < share:
            data.extend(bytes(max(0, end - len(data))))
            data[start:end] = now[start:end]
