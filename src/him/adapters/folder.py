"""A folder that serves as a bucket: objects are files, whole or absent, and durable when a call returns."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from him.config import OBJECT_NAME_CHARS_MAX
from him.errors import HimError, LimitError, NotFoundError, StorageError, UnavailableError, UsageError

_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_PREFIX: Final = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)*(?:[A-Za-z0-9_-][A-Za-z0-9._-]*)?")
_BESIDE: Final = ".new"
"""Folder of what is being written. No object's name may begin with a dot."""
_AWAY: Final = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN)
"""What a mounted share answers when its server does not."""


def checked_name(name: str) -> str:
    """The name itself, if every store can hold it. Raises UsageError."""
    if len(name) > OBJECT_NAME_CHARS_MAX or not _NAME.fullmatch(name):
        raise UsageError(f"not an object's name: {name[:100]!r}", fix="use letters, digits, `.`, `_`, `-` and `/`")
    return name


def checked_prefix(prefix: str) -> str:
    """The beginning of a name, or nothing. Raises UsageError."""
    if len(prefix) > OBJECT_NAME_CHARS_MAX or not _PREFIX.fullmatch(prefix):
        raise UsageError(f"no object's name begins so: {prefix[:100]!r}", fix="use letters, digits, `.`, `_`, `-`, `/`")
    return prefix


def _refused(error: OSError, place: str) -> HimError:
    """The HIM error for an operating system's refusal."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return NotFoundError("no such object in the cold store", place=place)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"the cold folder's disk is full ({reason})", place=place)
    if error.errno in _AWAY:
        return UnavailableError(f"the cold folder does not answer ({reason})", place=place)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageError(f"the cold folder refused ({reason})", place=place, fix="mend the folder's permissions")
    return StorageError(f"the cold folder failed ({reason})", place=place)


class ObjectFolder:
    """Objects as files below a root (0600, folders 0700).

    What is written lies under `.new` until it is whole and on the disk, and gets its name by one rename or link: no
    reader sees a part of it. Whoever writes holds a lock on it, so that what a crash left there is known and removed.
    """

    def __init__(self, root: Path) -> None:
        """Make the folder if only its last part is missing. Raises StorageError: a mount may be missing."""
        self._root = root
        self._durable = {root}
        if root.is_dir():
            return
        try:
            root.mkdir(mode=0o700)
        except OSError as error:
            raise StorageError(
                f"the cold folder cannot be made ({os.strerror(error.errno or 0)})",
                place=str(root),
                fix="mount it, or make the folder it lies in",
            ) from error
        self._sync(root.parent)

    def size(self, name: str) -> int | None:
        """By stat; None for what is not there."""
        try:
            with self._opened(name) as descriptor:
                return os.fstat(descriptor).st_size
        except NotFoundError:
            return None

    def get(self, name: str, limit: int) -> bytes:
        """The whole file. Raises NotFoundError and LimitError."""
        with self._opened(name) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise LimitError(f"the object has {size:,} bytes, above {limit:,}", place=self._place(name))
            return self._read(descriptor, name, 0, size)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """One positional read each. Raises NotFoundError."""
        with self._opened(name) as descriptor:
            return [memoryview(self._read(descriptor, name, offset, size)) for offset, size in ranges]

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write beside, sync, then rename over it, or link where nothing is."""
        return self._write(name, (data,), if_absent=if_absent)

    def upload(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write beside part by part, sync, rename."""
        self._write(name, parts, if_absent=False)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Walk the folder the prefix names; sorted as a bucket sorts."""
        folder = checked_prefix(prefix).rpartition("/")[0]
        yield from sorted(one for one in self._walk(folder) if one[0].startswith(prefix))

    def delete(self, names: Sequence[str]) -> None:
        """Unlink what is there, then sync the folders."""
        folders = set[Path]()
        for name in names:
            full = self._root / checked_name(name)
            try:
                full.unlink()
                folders.add(full.parent)
            except (FileNotFoundError, NotADirectoryError):
                self._there()
            except OSError as error:
                raise _refused(error, self._place(name)) from error
        for folder in sorted(folders):
            self._sync(folder)

    def _place(self, name: str) -> str:
        return str(self._root / name)

    def _there(self) -> None:
        """Raise UnavailableError if the root itself is gone: then nothing is known about what it holds."""
        if not self._root.is_dir():
            raise UnavailableError(
                "the cold folder is not there", place=str(self._root), fix="mount it, then try again"
            )

    @contextlib.contextmanager
    def _opened(self, name: str) -> Generator[int]:
        """A descriptor for reading a regular file."""
        full = self._root / checked_name(name)
        try:
            descriptor = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            self._there()
            raise _refused(error, str(full)) from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise NotFoundError("no such object in the cold store", place=str(full))
            yield descriptor
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, name: str, offset: int, size: int) -> bytes:
        """All of a range; NotFoundError where the file ends before it does."""
        parts: list[bytes] = []
        try:
            while size > 0:
                part = os.pread(descriptor, size, offset)
                if not part:
                    raise NotFoundError("the object ends before the range does", place=self._place(name))
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        except OSError as error:
            raise _refused(error, self._place(name)) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _write(self, name: str, parts: Iterable[bytes | memoryview], *, if_absent: bool) -> bool:
        full = self._root / checked_name(name)
        self._there()
        with _writing(full):
            beside, descriptor = self._begin()
        try:
            for part in parts:
                with _writing(full):
                    _write_all(descriptor, part)
            with _writing(full):
                os.fsync(descriptor)
                self._make_folder(full.parent)
                written = _name(beside, full, if_absent=if_absent)
                # Also when it was there before: its writer may not have come so far.
                self._sync(full.parent)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            os.close(descriptor)
        return written

    def _begin(self) -> tuple[Path, int]:
        """A new locked file under `.new`, and its descriptor; what dead writers left there is removed."""
        folder = self._root / _BESIDE
        folder.mkdir(mode=0o700, exist_ok=True)
        for left in folder.iterdir():
            with contextlib.suppress(OSError):
                descriptor = os.open(left, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
                finally:
                    os.close(descriptor)
        while True:
            path = folder / secrets.token_hex(16)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return path, descriptor
            os.close(descriptor)  # Taken for a leftover before it was locked.

    def _make_folder(self, folder: Path) -> None:
        """Make missing folders; each is durable in the one above before something is put into it."""
        if folder in self._durable:
            return
        self._make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        # Also when it was there: whoever made it may not have come so far.
        self._sync(folder.parent)
        self._durable.add(folder)

    def _sync(self, folder: Path) -> None:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _refused(error, str(folder)) from error

    def _walk(self, folder: str) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every file below a folder, in no order."""
        try:
            with os.scandir(self._root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if not _NAME.fullmatch(name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        yield from self._walk(name)
                    elif entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            yield name, entry.stat(follow_symlinks=False).st_size
        except (FileNotFoundError, NotADirectoryError):
            self._there()
        except OSError as error:
            raise _refused(error, self._place(folder)) from error


@contextlib.contextmanager
def _writing(full: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        failure = _refused(error, str(full))
        if isinstance(failure, NotFoundError):
            failure = StorageError(
                "the cold folder holds an object or nothing where a folder is needed", place=str(full)
            )
        raise failure from error


def _write_all(descriptor: int, part: bytes | memoryview) -> None:
    rest = memoryview(part).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _name(beside: Path, full: Path, *, if_absent: bool) -> bool:
    """Give a whole file its name; False if `if_absent` and the name is taken."""
    if not if_absent:
        beside.replace(full)
        return True
    try:
        full.hardlink_to(beside)
    except FileExistsError:
        return False
    return True
