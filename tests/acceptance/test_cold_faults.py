"""A repository whose bucket dies and answers 503 while two threads write and read: no wrong byte, nothing lost."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import him
from bench.s3 import CREDENTIALS, FaultProxy, S3Server, serve
from him.adapters.objects import ObjectBucket
from him.config import EXTENT_BYTES
from him.errors import StorageError, UnavailableError
from him.types import StreamSpec

SIDE = 256
BUDGET = 16 * 1024 * 1024
CELLS = 160
OPERATIONS = 400
"""Of each thread, in each part of the test."""
DEADLINE_SECONDS = 120
Tile = NDArray[np.uint8]


def tile(worker: int, cell: int, version: int) -> Tile:
    """Noise that names what it is."""
    made = np.random.default_rng((worker, cell, version)).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    made.reshape(-1)[:24].view("<u8")[:] = worker, cell, version
    return made


class Worker:
    """A thread that writes cells of its own and reads them back; it knows what was acknowledged.

    A write that failed may have become durable all the same: then either version is right.
    """

    def __init__(self, repo: him.Repository, number: int) -> None:
        self.repo, self.number, self.random = repo, number, random.Random(number)
        self.acknowledged: dict[int, int] = {}
        self.tried: dict[int, int] = {}
        self.done = self.refused = self.failed_reads = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"worker {number}")

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.step()
                self.done += 1
        except BaseException as error:  # noqa: BLE001 - told in the test's own thread
            self.failure = error

    def step(self) -> None:
        """One write or one verified read."""
        if not self.acknowledged or self.random.random() < 0.2:
            cell = self.random.randrange(CELLS)
            version = self.tried[cell] = self.tried.get(cell, 0) + 1
            try:
                self.repo.writable("main").put("noise", tile(self.number, cell, version), frame=self.name, x=cell)
            except StorageError:
                self.refused += 1
            else:
                self.acknowledged[cell] = version
        else:
            try:
                self.check(self.random.choice(sorted(self.acknowledged)))
            except UnavailableError:
                self.failed_reads += 1

    @property
    def name(self) -> str:
        return f"w{self.number}"

    def check(self, cell: int) -> None:
        """The newest version that was acknowledged, or one that was tried after it; byte for byte."""
        found = np.asarray(self.repo.snapshot("main").get("noise", frame=self.name, x=cell))
        version = int(found.reshape(-1)[:24].view("<u8")[2])
        assert self.acknowledged[cell] <= version <= self.tried[cell], "an acknowledged write was lost"
        assert np.array_equal(found, tile(self.number, cell, version)), f"wrong bytes in cell {cell}"


def until(holds: Callable[[], bool], what: str, workers: list[Worker]) -> None:
    """Wait for a condition, as long as no worker failed."""
    deadline, once = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not holds():
        for worker in workers:
            if worker.failure is not None:
                raise worker.failure
        assert time.monotonic() < deadline, f"in vain: {what}"
        once.wait(0.02)


def go_on(workers: list[Worker], operations: int) -> None:
    """Until each worker has done so many operations more."""
    for worker in workers:
        goal = worker.done + operations
        until(lambda worker=worker, goal=goal: worker.done >= goal, f"{operations} operations", workers)


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[S3Server, FaultProxy]]:
    """A server of the test's own, for it is killed; requests are given up early, so that outages are seen soon."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("him.adapters.objects.COLD_RETRY_SECONDS", 2)
    with serve(tmp_path / "s3") as (server, proxy):
        yield server, proxy


@pytest.mark.slow
def test_no_outage_gives_wrong_bytes_or_loses_a_commit(far: tuple[S3Server, FaultProxy], tmp_path: Path) -> None:
    server, proxy = far
    place, url = tmp_path / "memory", server.url("him", port=proxy.port)
    with him.open(place, create=True) as repo:
        repo.declare_stream(StreamSpec("noise", tile_height=SIDE, tile_width=SIDE, dtype="uint8"))
        repo.set_tier(url, BUDGET)
    with him.open(place) as repo:
        workers = [Worker(repo, number) for number in range(2)]
        with workers[0], workers[1]:
            go_on(workers, OPERATIONS)
            until(lambda: repo.tier.status().cold_bytes > 0, "packs in the cold tier", workers)
            _dead(repo, server, workers)
            proxy.faults.refused_share = 0.3
            go_on(workers, OPERATIONS)
            assert proxy.counts.refused > 0
            proxy.faults.refused_share = 0
            _recovered(repo, workers)
            go_on(workers, OPERATIONS)
        for worker in workers:
            assert worker.failure is None
            assert sum(worker.acknowledged.values()) > OPERATIONS / 10
        _all_is_right(repo, workers)
    with him.open(place) as repo:
        for worker in workers:
            worker.repo = repo
        _all_is_right(repo, workers)
    _cold_copies_are_whole(place, ObjectBucket("him", "him", endpoint=f"http://127.0.0.1:{server.port}"))


def _dead(repo: him.Repository, server: S3Server, workers: list[Worker]) -> None:
    """Kill the server under work; what is warm goes on, the fault is told, and it ends by itself."""
    cell, value = 10**6, tile(9, 9, 9)
    repo.writable("main").put("noise", value, frame="warm", x=cell)
    server.kill()
    # Pages and tile of what was just written are here, whatever else is not.
    until(lambda: repo.tier.status().fault != "", "a fault that is told", workers)
    for _ in range(50):
        assert np.array_equal(np.asarray(repo.snapshot("main").get("noise", frame="warm", x=cell)), value)
    assert repo.tier.status().fault
    server.start()
    _recovered(repo, workers)


def _recovered(repo: him.Repository, workers: list[Worker]) -> None:
    """Nobody does anything but go on working."""
    until(lambda: not repo.tier.status().fault, "the end of the fault", workers)
    go_on(workers, OPERATIONS // 4)
    assert not repo.tier.status().fault


def _all_is_right(repo: him.Repository, workers: list[Worker]) -> None:
    """Everything that was acknowledged, from the cold tier; and fsck."""
    repo.tier.push()
    repo.tier.demote()
    status = repo.tier.status()
    assert not status.only_warm_packs
    assert status.cold_packs > 4 * 2 and status.cold_bytes > BUDGET
    assert status.used_bytes <= BUDGET + 2 * EXTENT_BYTES
    for worker in workers:
        for cell in worker.acknowledged:
            worker.check(cell)
    assert repo.tier.status().fetched_bytes > status.fetched_bytes
    report = repo.fsck()
    assert report.ok, report.errors


def _cold_copies_are_whole(place: Path, bucket: ObjectBucket) -> None:
    """Every pack in the bucket, asked past the proxy, is what its receipt says."""
    from blake3 import blake3

    from him.adapters.local import LocalDisk
    from him.tier.receipts import receipts

    found = receipts(LocalDisk(place))
    assert found
    for receipt in found:
        data = bucket.get(receipt.pack, receipt.size)
        assert (len(data), blake3(data).hexdigest()) == (receipt.size, receipt.digest)
