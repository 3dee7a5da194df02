"""What may be forgotten on purpose: how long streams keep their tiles, and what a legal hold keeps for ever.

A rule names a stream and, where it is for the snapshots of one task, the task (their attribute `task_id`). When tiles
are let go a record says so before anything is removed: then what is missing is expired, not lost (design §5). A tile's
age is that of the snapshot that wrote it; that of a snapshot is told by its id.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from him.errors import IntegrityError, VersionError
from him.pyramid import directory, update
from him.tier.warm import WarmStore
from him.types import Operation, Ref, Snapshot, StreamSpec, TileKey, TilesExpired, snapshot_bytes

HOLD: Final = "hold"
"""The attribute that keeps a snapshot, and all it reaches, whatever rules say; its value is the reason."""
TASK: Final = "task_id"
_DAY_S: Final = 24 * 60 * 60
_NS: Final = 1_000_000_000
_NS_PER_MS: Final = 1_000_000
_TIME_BYTES: Final = 6

Rules = Mapping[tuple[str, str], int]
"""(stream, task or "") → seconds; 0 for ever."""


class Expiry:
    """Which tiles retention has let go."""

    def __init__(self, expired: Mapping[tuple[str, str], int] = {}) -> None:
        self._before = {stream: before for (stream, origin), before in expired.items() if not origin}
        self._origins: dict[str, list[bytes]] = {}
        for stream, origin in expired:
            if origin:
                self._origins.setdefault(stream, []).append(snapshot_bytes(origin))

    def touches(self, stream: str) -> bool:
        """Whether any tile of a stream is let go."""
        return stream in self._before or stream in self._origins

    def covers(self, stream: str, origins: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which tiles (n) are let go, by their origins (n, 16)."""
        times = np.zeros((len(origins), 8), dtype=np.uint8)
        times[:, 2:] = origins[:, :_TIME_BYTES]
        gone = times.view(">u8")[:, 0].astype(np.uint64) < np.uint64(self._before.get(stream, 0) // _NS_PER_MS)
        for origin in self._origins.get(stream, ()):
            gone |= (origins == np.frombuffer(origin, dtype=np.uint8)).all(axis=1)
        return gone

    def covers_one(self, stream: str, origin: bytes) -> bool:
        """Whether a tile with this origin is let go."""
        return self.touches(stream) and bool(self.covers(stream, np.frombuffer(origin, np.uint8).reshape(1, -1))[0])


def lacks(store: WarmStore, ref: Ref) -> bool:
    """Whether a tile, or something it is made of, is not stored at all; what is damaged is stored."""
    waiting = [ref]
    with suppress(IntegrityError, VersionError):
        while waiting:
            ref = waiting.pop()
            if not store.has(ref):
                return True
            waiting += store.parts(store.read(ref))
    return False


def first_gone(store: WarmStore, root: bytes) -> str:
    """A tile of a directory that retention has let go and that is missing; empty without one. Raises IntegrityError."""
    expiry = Expiry(store.expired)
    for frame in directory.scan(store, root):
        if frame.root and expiry.touches(frame.stream):
            for row, column, entry in update.scan(store, frame.root, frame.root_height):
                if expiry.covers_one(frame.stream, entry.origin) and lacks(store, entry.ref):
                    return str(TileKey(frame.stream, frame.name, 0, row, column))
    return ""


def rules(declared: Iterable[StreamSpec], set_by_hand: Rules) -> dict[tuple[str, str], int]:
    """All rules that hold: those of the streams' declarations, then those that were set, by stream and task."""
    own = {(spec.name, ""): spec.retention_days * _DAY_S for spec in declared if spec.retention_days}
    return dict(sorted({**own, **set_by_hand}.items()))


def due(
    rules: Rules, expired: Mapping[tuple[str, str], int], snapshots: Iterable[Snapshot], now_ns: int
) -> Iterator[Operation]:
    """The records to write before tiles are let go: one a rule under which some snapshot has come of age since."""
    found = list(snapshots)
    tasks = {(stream, task) for stream, task in rules if task}
    for (stream, task), ttl_s in rules.items():
        before = now_ns - ttl_s * _NS
        if not ttl_s or before <= 0:
            continue
        old = [one for one in found if one.created_at < before]
        if task:
            new = [one for one in old if one.tags.get(TASK) == task]
            origins = tuple(one.snapshot_id for one in new if (stream, one.snapshot_id) not in expired)
            if origins:
                yield TilesExpired(stream, before, origins)
            continue
        # A task with a rule of its own keeps to that.
        apart = [one.snapshot_id for one in found if (stream, one.tags.get(TASK, "")) in tasks]
        if apart:
            origins = tuple(
                one.snapshot_id for one in old
                if one.snapshot_id not in apart and (stream, one.snapshot_id) not in expired
                and one.created_at >= expired.get((stream, ""), 0)
            )  # fmt: skip
            if origins:
                yield TilesExpired(stream, before, origins)
        elif any(one.created_at >= expired.get((stream, ""), 0) for one in old):
            yield TilesExpired(stream, before)


def held(one: Snapshot) -> bool:
    """Whether a legal hold is on a snapshot."""
    return HOLD in one.tags
