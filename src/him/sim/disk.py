"""Disks in memory that know what a power loss would leave.

Bytes last once their file was synced, names once their folder was. Whatever changes a disk passes through a `Gate`,
which decides whether it is done, done in part, or refused, and whether the machine stops there.
"""

from collections.abc import Callable, Iterable
from typing import Final, Protocol

from him.errors import NotFoundError, StorageError

SECTOR_BYTES: Final = 512
"""What a disk writes whole or not at all."""
BLOCK_BYTES: Final = 4096
"""What a file system keeps or frees at once, and what firmware swaps or puts in the wrong place."""
_HOLE: Final = bytes(BLOCK_BYTES)
Keep = Callable[[], str]
"""What becomes of a piece or a name that was not synced: "all", "none", "half", or "torn" (see `FileData.settled`)."""
Coin = Callable[[], bool]


class PowerLoss(BaseException):
    """The machine stopped, or the process was killed: nothing of the program runs on (hence no Exception)."""


class Gate(Protocol):
    """What every operation on a disk passes through."""

    def run(self, kind: str, path: str, whole: Callable[[], None], part: Callable[[], None] | None = None) -> None:
        """Do a changing operation: `whole`, or `part` of it, or nothing. Raises StorageError, PowerLoss."""
        ...

    def look(self, kind: str, path: str) -> None:
        """Before something is read. Raises StorageError, PowerLoss."""
        ...

    def wait(self, path: str, free: Callable[[], bool]) -> None:
        """Return once a lock is free."""
        ...

    def coin(self) -> bool:
        """Whether a piece that a failed sync was about is durable all the same."""
        ...


class Faults:
    """A gate that counts changing operations and fails some of them.

    `mode` says how the chosen one fails: "refuse" changes nothing, "partial" writes half (and syncs every other piece),
    "late" does all and still reports failure, "power" stops the machine before it, "power-after" right after it.
    """

    def __init__(self, at: int | None = None, mode: str = "refuse", times: int = 1) -> None:
        self.at = at
        self.mode = mode
        self.times = times
        self.count = 0
        self.kinds: list[str] = []
        self.dead = False
        self._coin = False

    def run(self, kind: str, path: str, whole: Callable[[], None], part: Callable[[], None] | None = None) -> None:
        """Run one changing operation or fail it."""
        if self.dead:
            raise PowerLoss
        self.count += 1
        self.kinds.append(f"{kind} {path}")
        if self.at is None or not self.at <= self.count < self.at + self.times:
            whole()
            return
        if self.mode == "power":
            self.dead = True
            raise PowerLoss
        if self.mode == "partial" and part is not None:
            part()
        elif self.mode in ("late", "power-after"):
            whole()
        if self.mode == "power-after":
            self.dead = True
            raise PowerLoss
        raise StorageError(f"the disk is full ({kind} {self.count})", place=path)

    def look(self, kind: str, path: str) -> None:
        """Reads fail too once the machine stopped."""
        if self.dead:
            raise PowerLoss

    def wait(self, path: str, free: Callable[[], bool]) -> None:
        """Nobody else runs who could give it back."""
        raise AssertionError(f"{path}: a test would wait for ever")

    def coin(self) -> bool:
        """Every other time."""
        self._coin = not self._coin
        return self._coin


class Owner:
    """Who holds a lock: one descriptor of the process behind a gate."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate


class FileData:
    """A file's bytes as programs see them, and what has reached the medium.

    `pending` holds what was done since the last sync, in order: (offset, bytes), or (size, None) for a truncation.
    """

    def __init__(self, data: bytes | bytearray = b"", *, named: bool = False) -> None:
        self.now = bytearray(data)
        self.durable = bytearray(data)
        self.pending: list[tuple[int, bytes | None]] = []
        self.named = named
        self.holder: Owner | None = None

    def change(self, offset: int, piece: bytes | None) -> None:
        """Write a piece, or truncate: seen at once, not yet durable."""
        _apply(self.now, offset, piece)
        self.pending.append((offset, piece))

    def sync(self) -> None:
        """All that was written since the last sync is durable."""
        for offset, piece in self.pending:
            _apply(self.durable, offset, piece)
        self.pending = []

    def fail_sync(self, coin: Coin) -> None:
        """A failed fsync, as Linux has it: each piece is durable or not, and no later fsync will tell or mend it."""
        for offset, piece in self.pending:
            if coin():
                _apply(self.durable, offset, piece)
        self.pending = []

    def settled(self, keep: Keep, coin: Coin | None = None) -> "FileData":
        """What a restart finds.

        Args:
            keep: the fate of each piece: "all" and "none" of it reached the medium, "half": what begins it, "torn":
                any of its sectors.
            coin: which sectors of a torn piece.
        """
        left = bytearray(self.durable)
        for offset, piece in self.pending:
            fate = keep()
            if fate == "all" or (fate != "none" and piece is None):
                _apply(left, offset, piece)
            elif fate == "half" and piece is not None:
                _apply(left, offset, piece[: len(piece) // 2])
            elif fate == "torn" and piece is not None and coin is not None:
                for start, sector in _sectors(offset, piece):
                    if coin():
                        _apply(left, start, sector)
        return FileData(left, named=True)


def _sectors(offset: int, piece: bytes) -> Iterable[tuple[int, bytes]]:
    at = 0
    while at < len(piece):
        size = SECTOR_BYTES - (offset + at) % SECTOR_BYTES
        yield offset + at, piece[at : at + size]
        at += size


def _apply(data: bytearray, offset: int, piece: bytes | None) -> None:
    if piece is None:
        if offset < len(data):
            del data[offset:]
        else:
            data.extend(bytes(offset - len(data)))
        return
    if len(data) < offset:
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(piece)] = piece


class Volume:
    """The files of one disk, and those whose removal may not have lasted."""

    def __init__(self) -> None:
        self.files: dict[str, FileData] = {}
        self.removed: dict[str, FileData] = {}

    def after_power_loss(self, keep: Keep, coin: Coin | None = None) -> "Volume":
        """What a restart finds: a name that was not synced is there unless `keep` says "none".

        A file whose removal was not synced comes back where `keep` says "none" and nothing took its place.
        """
        found = Volume()
        for path, data in self.files.items():
            if data.named or keep() != "none":
                found.files[path] = data.settled(keep, coin)
        for path, data in self.removed.items():
            if path not in found.files and keep() == "none":
                found.files[path] = data.settled(keep, coin)
        return found

    def copy(self) -> "Volume":
        """What another process sees after all others were killed: everything written, no locks."""
        found = Volume()
        found.files = {path: FileData(data.now, named=True) for path, data in self.files.items()}
        return found


class MemDisk:
    """`ports.Disk` on a Volume, as one process sees it."""

    def __init__(self, faults: Gate | None = None, volume: Volume | None = None) -> None:
        self.faults: Gate = faults or Faults()
        self.volume = volume or Volume()

    @property
    def files(self) -> dict[str, FileData]:
        """By path."""
        return self.volume.files

    def open(self, path: str, *, create: bool = False) -> "MemFile":
        """A descriptor of its own. Raises NotFoundError."""
        self.faults.look("open", path)
        if path not in self.files:
            if not create:
                raise NotFoundError("no such file in the repository", place=path)

            def make() -> None:
                self.files.setdefault(path, FileData())

            self.faults.run("create", path, make)
        if path not in self.files:  # Removed by another process since.
            return self.open(path, create=create)
        return MemFile(self, path, self.files[path])

    def view(self, path: str, offset: int, size: int) -> memoryview:
        """A copy: nothing is freed under it."""
        data = self.open(path).read_at(offset, size)
        if len(data) < size:
            raise StorageError("the file ends before the range does", place=path)
        return memoryview(data)

    def list(self, folder: str) -> list[str]:
        """Sorted names."""
        self.faults.look("list", folder)
        head = f"{folder}/" if folder else ""
        cut = len(head)
        return sorted({path[cut:].split("/", 1)[0] for path in self.files if path.startswith(head)})

    def write_whole(self, path: str, *parts: bytes | memoryview) -> None:
        """Replace a file, durably."""
        data = b"".join(parts)

        def replace() -> None:
            self.files[path] = FileData(data, named=True)
            self.volume.removed.pop(path, None)

        self.faults.run("replace", path, replace)

    def remove(self, path: str) -> None:
        """Unlink if present; whoever has it open keeps it."""

        def unlink() -> None:
            gone = self.files.pop(path, None)
            if gone is not None and gone.named:
                self.volume.removed[path] = gone

        self.faults.run("remove", path, unlink)

    def sync_folder(self, folder: str) -> None:
        """Names and removals in it last from now on."""

        def sync() -> None:
            for path, data in self.files.items():
                if not data.named and path.rpartition("/")[0] == folder:
                    data.named = True
            for path in [one for one in self.volume.removed if one.rpartition("/")[0] == folder]:
                del self.volume.removed[path]

        self.faults.run("sync_folder", folder, sync)

    def after_power_loss(self, keep: Keep) -> "MemDisk":
        """The disk after a restart, without faults (`Volume.after_power_loss`)."""
        return MemDisk(volume=self.volume.after_power_loss(keep))

    def copy(self) -> "MemDisk":
        """The disk as another process finds it (`Volume.copy`), without faults."""
        return MemDisk(volume=self.volume.copy())


class MemFile:
    """A descriptor on a MemDisk."""

    def __init__(self, disk: MemDisk, path: str, data: FileData) -> None:
        self._disk, self._path, self._data = disk, path, data
        # Not the file itself: one that nobody refers to any more is closed, as the kernel's are.
        self._owner = Owner(disk.faults)

    def __del__(self) -> None:
        self.unlock()

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes."""
        self._disk.faults.look("read", self._path)
        return bytes(self._data.now[offset : offset + size])

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer`; how many bytes there were."""
        data = self.read_at(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write_at(self, offset: int, *parts: bytes | memoryview) -> None:
        """Write all parts."""
        whole, change = b"".join(parts), self._data.change
        self._disk.faults.run(
            "write", self._path, lambda: change(offset, whole), lambda: change(offset, whole[: len(whole) // 2])
        )

    def size(self) -> int:
        """Bytes."""
        self._disk.faults.look("size", self._path)
        return len(self._data.now)

    def truncate(self, size: int) -> None:
        """Cut or extend."""
        self._disk.faults.run("truncate", self._path, lambda: self._data.change(size, None))

    def allocated(self) -> int:
        """Bytes of the blocks that are no holes."""
        return sum(end - start for start, end in self.data_runs())

    def data_runs(self) -> list[tuple[int, int]]:
        """Runs of blocks that are not all zero."""
        now, runs = self._data.now, list[tuple[int, int]]()
        for start in range(0, len(now), BLOCK_BYTES):
            block = bytes(now[start : start + BLOCK_BYTES])
            if block == _HOLE or not any(block):
                continue
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], start + len(block))
            else:
                runs.append((start, start + len(block)))
        return runs

    def punch(self, offset: int, size: int) -> bool:
        """Zeros in place of a range."""
        inside = max(0, min(size, len(self._data.now) - offset))
        self._disk.faults.run("punch", self._path, lambda: self._data.change(offset, bytes(inside)))
        return True

    def sync(self) -> None:
        """All that anybody wrote to it lasts."""
        gate = self._disk.faults
        gate.run("sync", self._path, self._data.sync, lambda: self._data.fail_sync(gate.coin))

    def lock(self, *, wait: bool) -> bool:
        """The file's lock, which belongs to this descriptor."""
        self._disk.faults.look("lock", self._path)
        while self._data.holder not in (None, self._owner):
            if not wait:
                return False
            self._disk.faults.wait(self._path, lambda: self._data.holder is None)
        self._data.holder = self._owner
        return True

    def unlock(self) -> None:
        """Give it back."""
        if self._data.holder is self._owner:
            self._data.holder = None

    def close(self) -> None:
        """Give the lock back."""
        self.unlock()
