"""Time and randomness of the simulated machine: both follow from the seed."""

import hashlib
from collections.abc import Callable
from typing import Final

_START_MS: Final = 1_700_000_000_000
_NS_PER_MS: Final = 1_000_000


class SimClock:
    """The machine's clock: a millisecond passes with each reading; it may be put forwards and back.

    No two readings are alike, whatever the jumps: so a record's time tells who wrote it.
    """

    def __init__(self) -> None:
        self._wall_ms = _START_MS
        self._readings = 0
        self._passed = 0
        self.latest_ns = 0
        """The greatest reading there was."""

    def now_ns(self) -> int:
        """Wall time."""
        self._wall_ms += 1
        self._passed += 1
        self._readings += 1
        reading = self._wall_ms * _NS_PER_MS + self._readings % _NS_PER_MS
        self.latest_ns = max(self.latest_ns, reading)
        return reading

    def monotonic_ns(self) -> int:
        """Time passed, which never runs backwards."""
        self._passed += 1
        return self._passed * _NS_PER_MS

    def jump(self, ms: int) -> None:
        """Put the wall clock forwards, or back."""
        self._wall_ms = max(_START_MS, self._wall_ms + ms)


class ProcessClock:
    """The clock as one process reads it, which tells `noted` each reading."""

    def __init__(self, clock: SimClock, noted: Callable[[int], None]) -> None:
        self._clock, self._noted = clock, noted
        self.monotonic_ns = clock.monotonic_ns

    def now_ns(self) -> int:
        """Wall time."""
        reading = self._clock.now_ns()
        self._noted(reading)
        return reading


class SimRng:
    """The same bytes for the same name."""

    def __init__(self, name: str) -> None:
        self._name, self._count = name, 0

    def token(self, size: int) -> bytes:
        """`size` bytes."""
        self._count += 1
        return hashlib.shake_128(f"{self._name}:{self._count}".encode()).digest(size)
