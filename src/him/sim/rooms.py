"""The production modules of one repository, put together as `app` does it, over simulated ports."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from him.adapters.sqlite import SqliteProjection
from him.care import CareHandle
from him.catalog import spare
from him.catalog.fsck import Fsck, FsckReport
from him.catalog.garbage import Choice, Collected, Collector
from him.catalog.history import History
from him.catalog.log import FileLog
from him.catalog.marker import MARKER, Marker
from him.catalog.reader import SnapshotReader
from him.catalog.transfer import Side
from him.config import EMBEDDING_DIMS, PLAIN_FORMAT
from him.errors import HimError
from him.ingest import Ingest
from him.pack.galois import product
from him.ports import Clock, Disk, ObjectStore, Progress, Rng
from him.sim.disk import FileData, Volume
from him.tier.care import Journal
from him.tier.cold import Claim
from him.tier.mirror import Mirror
from him.tier.protect import Parity, Shape
from him.tier.scrub import put_right
from him.tier.settings import TIER, TierSettings
from him.tier.warm import WarmStore

REPOSITORY_ID: Final = bytes(range(16))
BUDGET_BYTES: Final = 1536 * 1024
PARITY: Final = Shape(3, 1)


def furnish(volume: Volume, claim: Claim | None = None) -> bytes:
    """Put the files there that `app` keeps beside log and packs; him.json.

    Args:
        claim: to a cold tier.
    """
    marker = Marker(PLAIN_FORMAT, REPOSITORY_ID.hex(), 0).encoded()
    volume.files[MARKER] = FileData(marker, named=True)
    if claim is not None:
        volume.files[TIER] = FileData(TierSettings("sim", BUDGET_BYTES, *claim).encoded(), named=True)
    return marker


class SimMemo:
    """`ports.Memo` in a dict; what a cache file holds, which processes share and crashes may take."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, bytes], bytes] = {}

    def get(self, kind: str, key: bytes) -> bytes | None:
        """What is remembered."""
        return self.items.get((kind, key))

    def put(self, kind: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Remember."""
        self.items.update({(kind, key): value for key, value in items})


class Unseeing:
    """`ports.TextReader` and `ports.TextEncoder` that find nothing: pictures are no part of the workload."""

    def pin(self) -> str:
        """No model."""
        return "0" * 64

    def detect(self, picture: NDArray[np.uint8]) -> list[list[tuple[int, int]]]:
        """No text."""
        return []

    def recognise(self, crops: Sequence[NDArray[np.uint8]]) -> list[tuple[str, float]]:
        """Nothing read."""
        return [("", 0.0) for _ in crops]

    def encode(self, texts: Sequence[str]) -> NDArray[np.int8]:
        """No meaning."""
        return np.zeros((len(texts), EMBEDDING_DIMS), dtype=np.int8)


class Rooms:
    """An opened repository. Raises what opening does."""

    def __init__(
        self, disk: Disk, cold: ObjectStore | None, clock: Clock, rng: Rng, writer: str, memo: SimMemo,
        claim: Claim = Claim(0, 0), budget_bytes: int = BUDGET_BYTES,
    ) -> None:  # fmt: skip
        self.disk, self.memo, self.clock, self.claim = disk, memo, clock, claim
        self.log = FileLog(disk)
        self.projection = SqliteProjection(None)
        self.mirror = None if cold is None else Mirror(disk, cold, clock, budget_bytes, claim=claim)
        self.journal = Journal(disk, clock)
        parity = self.parity = Parity(
            self.mirror or disk, product, REPOSITORY_ID, lambda: self.history.finished_packs(), self.journal,
            shape=PARITY, write=self.mirror and self.mirror.put_back, drop=lambda name: self.store.let_go(name),
        )  # fmt: skip
        self.store = WarmStore(
            disk, self.projection, rng, REPOSITORY_ID, self.mirror, journal=self.journal, parity=parity
        )
        self.history = History(self.log, self.projection, self.store, memo, clock, rng, writer)
        self.history.refresh()
        if self.mirror is not None:
            self.mirror.watch(
                lambda: [*self.history.finished_packs(), *parity.files()], self.log.published,
                lambda finished: put_right(self.store, finished),
            )  # fmt: skip
        self.ingest = Ingest(self.history, self.store, memo, clock, Unseeing(), Unseeing())

    def reader(self, directory: bytes, *, critical: bool = False) -> SnapshotReader:
        """Read access at a directory."""
        return SnapshotReader(self.store, self.memo, directory, critical=critical)

    def care(self) -> CareHandle:
        """Parity, scrubbing and healing."""
        return CareHandle(
            self.disk, self.store, self.history, self.projection, self.log, self.journal, self.clock, self.fsck
        )

    def side(self) -> Side:
        """What a transfer needs."""
        return Side(self.history, self.store)

    def collect(self, choice: Choice, roots: Callable[[], Iterable[bytes]], *, dry_run: bool = False) -> Collected:
        """One collection of garbage."""
        return Collector(self.history, self.projection, self.store, self.clock, roots).run(choice, dry_run=dry_run)

    def fsck(self, *, rebuild: bool = False, progress: Progress | None = None) -> FsckReport:
        """One check."""
        return Fsck(self.history, self.projection, self.store, progress, rebuild=rebuild).run()

    def close(self) -> None:
        """Release everything, as `app.Repository.close` does."""
        with contextlib.suppress(HimError):
            spare.keep(self.disk, self.log)
        self.store.close()
        self.journal.close()
        if self.mirror is not None:
            self.mirror.close()
        self.history.leases.close()
        self.log.close()
        self.projection.close()
