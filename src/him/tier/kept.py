"""Memory that is used again: buffers for large records, and what was read or written last."""

import sys
import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from him.config import BUFFER_GRAIN_BYTES, BUFFERS_KEPT_BYTES
from him.pack import format as layout

_K = TypeVar("_K", bound=Hashable)
_T = TypeVar("_T")


class Buffers:
    """Memory for large records, used again once nothing refers to it any more."""

    def __init__(self) -> None:
        self._kept: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> memoryview:
        """A writable view of `size` bytes; its memory is free again when the last reference to it goes."""
        with self._lock:
            # The one that was free last is the likeliest to be in the processor's cache.
            for at in reversed(range(len(self._kept))):
                buffer = self._kept[at]
                # The list's reference, this loop's, and getrefcount's own.
                if size <= buffer.size <= 2 * size and sys.getrefcount(buffer) <= 3:
                    self._kept.append(self._kept.pop(at))
                    return buffer.data[:size]
            fresh = np.empty(layout.aligned(size, BUFFER_GRAIN_BYTES), dtype=np.uint8)
            self._kept.append(fresh)
            while sum(buffer.size for buffer in self._kept) > BUFFERS_KEPT_BYTES:
                self._kept.pop(0)
            return fresh.data[:size]


class Recent(Generic[_K, _T]):
    """What was used last, in two generations: a hit takes no lock and moves nothing."""

    def __init__(self, room_bytes: int) -> None:
        self._half = room_bytes // 2
        self.young: dict[_K, tuple[_T, int]] = {}
        self._old: dict[_K, tuple[_T, int]] = {}
        self._young_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: _K) -> _T | None:
        """What was kept, or None."""
        found = self.young.get(key)
        if found is None and (found := self._old.get(key)) is not None:
            self.put(key, *found)
        return None if found is None else found[0]

    def put(self, key: _K, value: _T, size: int) -> None:
        """Keep a value of `size` bytes; when the young fill half of the room, old ones nobody asked for go."""
        with self._lock:
            if key not in self.young:
                self._young_bytes += size
            self.young[key] = (value, size)
            if self._young_bytes > self._half:
                self._old, self.young, self._young_bytes = self.young, {}, 0

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self.young, self._old, self._young_bytes = {}, {}, 0
