"""The machine HIM runs on: a folder as a Disk, the system's clock and its randomness."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from him.errors import HimError, NotFoundError, StorageError

_JOIN_BELOW_BYTES: Final = 64 * 1024
"""Parts smaller than this are cheaper to copy together than to hand to the kernel one by one."""
_OFFSET_MAX: Final = 2**63 - 1
_TRUSTED_BYTES: Final = 16 * 1024 * 1024
_PARTS_MAX: Final = 512
"""Well below IOV_MAX (1,024 on Linux)."""
_WRITE_OUT_FROM_BYTES: Final = 1024 * 1024
_START_WRITING: Final = 2
"""SYNC_FILE_RANGE_WRITE of Linux: begin writing out, wait for nothing."""
_sync_file_range: Final = getattr(ctypes.CDLL(None), "sync_file_range", None)
_PUNCH_HOLE: Final = 2 | 1
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE."""
_fallocate: Final = getattr(ctypes.CDLL(None), "fallocate", None)
_FLOCK: Final = struct.Struct("hhqqi4x")
"""struct flock of 64-bit Linux: type, whence, start, length, pid."""


def _refused(error: OSError, path: str) -> HimError:
    """The HIM error for an operating system's refusal."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"the disk is full ({reason})", place=path)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageError(
            f"not allowed to write ({reason})", place=path, fix="mend the permissions, or copy the repository"
        )
    return StorageError(f"the disk failed ({reason})", place=path)


class LocalFile:
    """A file descriptor with positional reads and writes and an exclusive lock (flock)."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._path = path

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes; raises StorageError when the disk fails."""
        parts: list[bytes] = []
        try:
            if size > _TRUSTED_BYTES or offset > _OFFSET_MAX:
                # What names a place or a size may lie: memory is only taken for what is there.
                size = min(size, max(0, self.size() - offset))
            while size > 0:
                part = os.pread(self._descriptor, size, offset)
                if not part:
                    break
                parts.append(part)
                offset += len(part)
                size -= len(part)
        except OSError as error:
            raise _refused(error, self._path) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer`; the number of bytes there were. Raises StorageError."""
        done = 0
        try:
            while done < len(buffer):
                got = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                if not got:
                    break
                done += got
        except OSError as error:
            raise _refused(error, self._path) from error
        return done

    def write_at(self, offset: int, *parts: bytes | memoryview) -> None:
        """Write all parts one after the other; raises StorageError."""
        views, start = list(_joined(parts)), offset
        try:
            while views:
                done = os.pwritev(self._descriptor, views[:_PARTS_MAX], offset)
                offset += done
                while views and done >= len(views[0]):
                    done -= len(views.pop(0))
                if done:
                    views[0] = views[0][done:]
        except OSError as error:
            raise _refused(error, self._path) from error
        if offset - start >= _WRITE_OUT_FROM_BYTES and _sync_file_range is not None:
            # Let the disk begin now; the sync that makes it durable then waits for less. Only a hint.
            _sync_file_range(self._descriptor, ctypes.c_int64(start), ctypes.c_int64(offset - start), _START_WRITING)

    def size(self) -> int:
        """Length in bytes."""
        return os.fstat(self._descriptor).st_size

    def allocated(self) -> int:
        """Blocks the file system keeps for it, in bytes."""
        return 512 * os.fstat(self._descriptor).st_blocks

    def data_runs(self) -> list[tuple[int, int]]:
        """By SEEK_DATA and SEEK_HOLE; the whole file where the system knows no holes."""
        size, at = self.size(), 0
        runs: list[tuple[int, int]] = []
        try:
            while at < size:
                start = os.lseek(self._descriptor, at, os.SEEK_DATA)
                at = os.lseek(self._descriptor, start, os.SEEK_HOLE)
                runs.append((start, at))
        except OSError as error:
            if error.errno != errno.ENXIO:  # No data behind `at`.
                return [(0, size)]
        return runs

    def punch(self, offset: int, size: int) -> bool:
        """Punch under the exclusive lock of the range, so that nobody's view turns to zeros."""
        if _fallocate is None:
            return False
        # A description of its own: a lock of this one would not meet the views this process lends.
        descriptor = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, size, 0))
            punched = _fallocate(descriptor, _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(size))
            return int(punched) == 0
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise _refused(error, self._path) from error
        finally:
            os.close(descriptor)

    def truncate(self, size: int) -> None:
        """Cut or extend to `size` bytes."""
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            raise _refused(error, self._path) from error

    def sync(self) -> None:
        """fdatasync; raises StorageError when the disk did not take it."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise _refused(error, self._path) from error

    def lock(self, *, wait: bool) -> bool:
        """Flock exclusively; it is given back by the kernel when the process dies."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if wait:
                raise _refused(error, self._path) from error
            return False
        return True

    def unlock(self) -> None:
        """Give the lock back."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the descriptor."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def detach(self) -> int:
        """The descriptor, which is the caller's to close from now on."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def __del__(self) -> None:
        # The interpreter may be half gone.
        with contextlib.suppress(AttributeError, TypeError, OSError):
            self.close()


def _joined(parts: Sequence[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes in fewer parts: runs of small ones become one. Empty parts vanish."""
    run: list[bytes | memoryview] = []
    for part in parts:
        if len(part) < _JOIN_BELOW_BYTES:
            run.append(part)
            continue
        if run:
            yield memoryview(b"".join(run))
            run = []
        yield memoryview(part)
    if joined := b"".join(run):
        yield memoryview(joined)


class LocalDisk:
    """A folder; files are created for the owner alone (0600, folders 0700)."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self._root = root
        self._read_only = read_only

    def open(self, path: str, *, create: bool = False) -> LocalFile:
        """Open for reading and writing, or for reading alone where writing is not allowed."""
        full = self._root / path
        try:
            if self._read_only:
                return LocalFile(os.open(full, os.O_RDONLY | os.O_CLOEXEC), path)
            if create:
                full.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return LocalFile(os.open(full, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600), path)
        except FileNotFoundError as error:
            raise NotFoundError("no such file in the repository", place=path) from error
        except OSError as error:
            raise _refused(error, path) from error

    def view(self, path: str, offset: int, size: int) -> memoryview:
        """Map a range; its shared lock belongs to the mapping's own descriptor and goes with it."""
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            # An open file description of its own: locks of one description never stand in each other's way.
            descriptor = os.open(self._root / path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, size, 0))
                mapped = mmap.mmap(descriptor, offset - start + size, access=mmap.ACCESS_READ, offset=start)
            finally:
                # The mapping keeps a duplicate, and with it the lock.
                os.close(descriptor)
        except FileNotFoundError as error:
            raise NotFoundError("no such file in the repository", place=path) from error
        except ValueError as error:
            raise StorageError(f"the file ends before the range does ({error})", place=path) from error
        except OSError as error:
            raise _refused(error, path) from error
        return memoryview(mapped)[offset - start :]

    def list(self, folder: str) -> list[str]:
        """Sorted names, leftovers of `write_whole` excluded."""
        try:
            return sorted(one.name for one in (self._root / folder).iterdir() if one.suffix != ".new")
        except FileNotFoundError:
            return []

    def write_whole(self, path: str, *parts: bytes | memoryview) -> None:
        """Write beside, sync, rename, sync the folder."""
        beside = self.open(f"{path}.{os.getpid()}.new", create=True)
        try:
            beside.truncate(0)
            beside.write_at(0, *parts)
            beside.sync()
        finally:
            beside.close()
        try:
            (self._root / f"{path}.{os.getpid()}.new").replace(self._root / path)
        except OSError as error:
            raise _refused(error, path) from error
        self.sync_folder(str(Path(path).parent))

    def remove(self, path: str) -> None:
        """Unlink if present."""
        try:
            (self._root / path).unlink(missing_ok=True)
        except OSError as error:
            raise _refused(error, path) from error

    def sync_folder(self, folder: str) -> None:
        """Fsync the folder itself."""
        try:
            descriptor = os.open(self._root / folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _refused(error, folder) from error


class SystemClock:
    """The machine's clocks."""

    def now_ns(self) -> int:
        """Wall clock."""
        return time.time_ns()

    def monotonic_ns(self) -> int:
        """Monotonic clock."""
        return time.monotonic_ns()


class SystemRng:
    """The machine's cryptographic randomness."""

    def token(self, size: int) -> bytes:
        """`size` bytes of os.urandom."""
        return secrets.token_bytes(size)
