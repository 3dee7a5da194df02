"""What the packs take on this disk, kept by all processes together, and the lock under which room is made."""

import threading
from collections.abc import Callable
from typing import Final

from blake3 import blake3

from him.ports import Disk

_PATH: Final = "cold/account"
_DIGEST: Final = 16


class Account:
    """A number in a file, and its lock between threads, then processes; who holds it may take it again."""

    def __init__(self, disk: Disk, recount: Callable[[], int], *, read_only: bool) -> None:
        self._file = disk.open(_PATH, create=not read_only)
        self._recount, self._read_only = recount, read_only
        self._depth = 0
        self._threads = threading.RLock()

    def __enter__(self) -> None:
        self._threads.acquire()
        if not self._depth:
            self._file.lock(wait=True)
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._file.unlock()
        self._threads.release()

    @property
    def used(self) -> int:
        """Bytes the packs take; counted anew where the file is damaged. Only with the lock held."""
        data = self._file.read_at(0, 8 + _DIGEST)
        if blake3(data[:8]).digest()[:_DIGEST] != data[8:]:
            return self._recount()
        return int.from_bytes(data[:8], "little")

    @used.setter
    def used(self, size: int) -> None:
        if self._read_only:
            return
        data = max(0, size).to_bytes(8, "little")
        self._file.write_at(0, data + blake3(data).digest()[:_DIGEST])

    def close(self) -> None:
        """Release the file."""
        self._file.close()
