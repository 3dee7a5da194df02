"""Leases: from which record on each process still reads, so that what was condemned before is not removed under it.

A process keeps one file in `leases/`, whose lock dies with it, and in it the lowest sequence number that anything it
holds was resolved at (design §6). A lease is written before anything is resolved under it: so whoever removes a pack
either sees the lease, or the reader sees that the pack was condemned.

File: sequence number u64, BLAKE3 of it (32); all ones when nothing is held.
"""

import contextlib
import itertools
import threading
import weakref
from collections import Counter, deque
from typing import Final

from blake3 import blake3

from him.errors import HimError, NotFoundError, StorageError
from him.ports import Disk, File

FOLDER: Final = "leases"
_NOTHING: Final = (1 << 64) - 1
_EVERYTHING: Final = 0
"""The floor of a lease that cannot be read: before every record."""
_FLOOR_BYTES: Final = 8


class Lease:
    """That its holder may read what stood at record `seq`, until it is released or forgotten."""

    def __init__(self, leases: "Leases", seq: int) -> None:
        self.seq = seq
        self.release = weakref.finalize(self, leases.released, seq)
        """Give it back; more than once is no error."""
        self.release.atexit = False

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Leases:
    """The leases of one process; safe to use from several threads."""

    def __init__(self, disk: Disk, *, read_only: bool = False) -> None:
        self._disk, self._read_only = disk, read_only
        self._lock = threading.RLock()
        self._held: Counter[int] = Counter()
        self._over: deque[int] = deque()
        """What was released and is still counted as held."""
        self._written = _NOTHING
        self._file: File | None = None
        self._path = ""

    def take(self, seq: int) -> Lease:
        """A lease on what stands at record `seq` and after; only in name where no file can be made for it.

        What is read under one in name may be collected meanwhile: that is then said, and nothing wrong is read.
        """
        with self._lock:
            self._settle()
            self._held[seq] += 1
            self._write()
            return Lease(self, seq)

    def released(self, seq: int) -> None:
        """One that was taken at `seq` is over.

        A finalizer runs in whatever thread, whatever that holds: so it never waits for one that is at work here.
        """
        self._over.append(seq)
        if self._lock.acquire(blocking=False):
            try:
                # Refused: then what was held stays held until the process ends. Nobody hears what a finalizer raises.
                with contextlib.suppress(BaseException):
                    self._settle()
                    self._write()
            finally:
                self._lock.release()

    def floors(self) -> dict[str, int]:
        """The lowest record each living process reads at, this one included; those that hold nothing are left out."""
        found: dict[str, int] = {}
        for name in self._disk.list(FOLDER):
            path = f"{FOLDER}/{name}"
            if path == self._path:
                floor: int | None = self._written
            else:
                floor = self._floor(path)
            if floor not in (None, _NOTHING):
                found[name] = floor
        return found

    def close(self) -> None:
        """Give all back."""
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(HimError):
                    self._disk.remove(self._path)
                self._file.close()
                self._file, self._path = None, ""
            self._held.clear()
            self._over.clear()
            self._read_only = True

    def _settle(self) -> None:
        while self._over:
            seq = self._over.popleft()
            self._held[seq] -= 1
            if not self._held[seq]:
                del self._held[seq]

    def _write(self) -> None:
        floor = min(self._held, default=_NOTHING)
        if floor == self._written or self._read_only:
            return
        try:
            if self._file is None:
                self._file = self._made()
            data = floor.to_bytes(_FLOOR_BYTES, "little")
            self._file.write_at(0, data + blake3(data).digest())
            self._written = floor
        except StorageError:
            # A full disk is no reason not to read. An empty lease whose lock is held keeps every pack.
            if self._file is not None:
                self._file.truncate(0)
                self._written = _EVERYTHING

    def _made(self) -> File:
        for number in itertools.count():
            self._path = f"{FOLDER}/{number}"
            file = self._disk.open(self._path, create=True)
            # Another process may have found it unlocked, taken it for a dead one's, and removed it.
            if file.lock(wait=False) and str(number) in self._disk.list(FOLDER):
                return file
            file.close()
        raise AssertionError("numbers do not end")

    def _floor(self, path: str) -> int | None:
        """What a file says; None when its process is gone (the file goes too), 0 for one that cannot be read."""
        try:
            file = self._disk.open(path)
        except NotFoundError:
            return None
        try:
            if file.lock(wait=False):
                self._disk.remove(path)
                return None
            data = file.read_at(0, _FLOOR_BYTES + 32)
        finally:
            file.close()
        return int.from_bytes(data[:_FLOOR_BYTES], "little") if verifies(data) else _EVERYTHING


def verifies(data: bytes) -> bool:
    """Whether these are the bytes of a lease, with their digest."""
    return blake3(data[:_FLOOR_BYTES]).digest() == data[_FLOOR_BYTES:]
