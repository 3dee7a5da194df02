"""The commit path: group commit, fair shares between processes, opening after many commits, and nothing lost."""

import multiprocessing
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import him
from bench.measure import Rows, row
from bench.survive import begin, survive, tile_of
from him.adapters.local import LocalDisk, LocalFile
from him.catalog.group import Queue, Request
from him.catalog.log import FileLog

THREADS = (1, 4, 16)
SLOW_SYNC_S = 0.003
"""A sync of an ordinary SSD without a battery; the disk below may be faster than any."""
ROUNDS = 3
SHARE_AIM = 0.5
OPENED_COMMITS = 10_000


def run(*, tiny: bool = False) -> Rows:
    """Rows of group commit, fairness, opening and survival."""
    with tempfile.TemporaryDirectory(prefix="him-commits-") as folder:
        base = Path(folder)
        yield from _group(base, tiny=tiny)
        yield from _fair(base, tiny=tiny)
        yield from _opening(base, 300 if tiny else OPENED_COMMITS)
        yield from _survival(base, tiny=tiny)


# -- group commit


class _SlowFile(LocalFile):
    def sync(self) -> None:
        super().sync()
        time.sleep(SLOW_SYNC_S)


class _SlowDisk(LocalDisk):
    def open(self, path: str, *, create: bool = False) -> LocalFile:
        return _SlowFile(super().open(path, create=create).detach(), path)


class _NoSyncFile(LocalFile):
    def sync(self) -> None:
        """Nothing."""


class NoSyncDisk(LocalDisk):
    """Keeps nothing over a power loss: to build something large quickly."""

    def open(self, path: str, *, create: bool = False) -> LocalFile:
        return _NoSyncFile(super().open(path, create=create).detach(), path)


@contextmanager
def _alone() -> Iterator[None]:
    """Every batch in a record of its own, as without group commit."""

    def take(queue: Queue) -> list[Request]:
        with queue._lock:
            return [queue._waiting.popleft()] if queue._waiting else []

    grouped = Queue.take
    Queue.take = take
    try:
        yield
    finally:
        Queue.take = grouped


def _group(base: Path, *, tiny: bool) -> Rows:
    commits = 32 if tiny else 240
    for disk, name in ((LocalDisk, "this disk"), (_SlowDisk, f"sync + {SLOW_SYNC_S * 1000:.0f} ms")):
        for threads in THREADS[1:2] if tiny else THREADS:
            together, single = list[float](), list[float]()
            for _ in range(1 if tiny else ROUNDS):
                with _alone():
                    single.append(_rate(base, disk, threads, commits // threads))
                together.append(_rate(base, disk, threads, commits // threads))
            value, against = statistics.median(together), statistics.median(single)
            goal = {1: 0.9, 4: 1.3, 16: 2.0}[threads] if disk is _SlowDisk else None
            yield row(
                "commits", f"{name}: {threads} threads, group commit", round(value), "commits/s",
                against=round(against), ratio=round(value / against, 2),
                goal=f">= {goal} × ungrouped" if goal else "", holds=value / against >= goal if goal else None,
            )  # fmt: skip


def _rate(base: Path, disk: Callable[[Path], LocalDisk], threads: int, each: int) -> float:
    """Commits a second of small tiles by threads of one process, each to a frame of its own."""
    path = base / "group"
    begin(path)
    with him.open(path, disk=disk(path)) as repo:

        def write(number: int) -> None:
            snapshot = repo.snapshot("main")
            for n in range(each):
                snapshot.put_many("grid", {(n, 0): tile_of(number, n)}, frame=f"w{number}")

        write(99)
        team = [threading.Thread(target=write, args=(number,)) for number in range(threads)]
        began = time.perf_counter()
        for one in team:
            one.start()
        for one in team:
            one.join()
        took = time.perf_counter() - began
    shutil.rmtree(path)
    return threads * each / took


# -- fair shares


def _log_only(path: str, turnstile: bool, seconds: float, ready: Any, told: Any) -> None:
    """Append records as fast as can be: nothing is done between two commits."""
    log = FileLog(LocalDisk(Path(path)))
    if not turnstile:
        log._lock = lambda: log._file.lock(wait=True)
    told.put(_count(lambda number: log.commit(lambda: bytes(200)), seconds, ready))


def _repository(path: str, turnstile: bool, seconds: float, ready: Any, told: Any) -> None:
    """Commit tiles as fast as can be, each process to a frame of its own."""
    with him.open(path) as repo:
        if not turnstile:
            repo._log._lock = lambda: repo._log._file.lock(wait=True)
        snapshot, own = repo.snapshot("main"), multiprocessing.current_process().name
        told.put(
            _count(
                lambda number: snapshot.put_many("grid", {(number, 0): tile_of(0, number)}, frame=own), seconds, ready
            )
        )


def _count(commit: Callable[[int], object], seconds: float, ready: Any) -> int:
    ready.wait()
    number, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        commit(number)
        number += 1
    return number


def shares(base: Path, what: str, processes: int, *, turnstile: bool, seconds: float) -> list[int]:
    """Commits of each of some processes that commit as fast as they can, fewest first."""
    path = base / "shares"
    begin(path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(["pytest"] if "pytest" in sys.modules else [])])
    ready, told = context.Barrier(processes), context.Queue()
    target = {"log": _log_only, "repository": _repository}[what]
    team = [context.Process(target=target, args=(str(path), turnstile, seconds, ready, told)) for _ in range(processes)]
    for one in team:
        one.start()
    counts = sorted(told.get(timeout=seconds + 60) for _ in team)
    for one in team:
        one.join()
    shutil.rmtree(path)
    return counts


def _fair(base: Path, *, tiny: bool) -> Rows:
    for what in ("log", "repository"):
        for processes in (4,) if tiny else (4, 8):
            found: dict[bool, tuple[float, float]] = {}
            for turnstile in (False, True):
                runs = [
                    shares(base, what, processes, turnstile=turnstile, seconds=0.3 if tiny else 1.5)
                    for _ in range(1 if tiny else ROUNDS)
                ]
                least = statistics.median(counts[0] / max(1, counts[-1]) for counts in runs)
                found[turnstile] = least, statistics.median(sum(counts) for counts in runs)
            (plain, plain_total), (fair, total) = found[False], found[True]
            yield row(
                "commits", f"{what}: {processes} processes, smallest / largest share", round(fair, 2), "share",
                against=round(plain, 2), ratio=round(fair / plain, 2) if plain else None, goal=f">= {SHARE_AIM}",
                holds=fair >= SHARE_AIM, throughput=round(total / plain_total, 2),
            )  # fmt: skip


# -- opening


def _opening(base: Path, commits: int) -> Rows:
    """Time to open and read one tile, with the cache, without it, and with the log alone."""
    path = base / "opening"
    begin(path)
    with him.open(path, disk=NoSyncDisk(path)) as repo:
        snapshot = repo.snapshot("main")
        for number in range(commits):
            snapshot.put_many("grid", {(number // 100, number % 100): tile_of(0, number)})
    fresh = base / "fresh"
    begin(fresh)
    with him.open(fresh) as repo:
        repo.snapshot("main").put_many("grid", {(0, 0): tile_of(0, 0)})
    least = _opened(fresh, ())
    for name, without in (
        ("cache there", ()),
        ("no cache: checkpoint and tail", ("cache",)),
        ("no cache, no checkpoint: the whole log", ("cache", "log/checkpoints")),
    ):
        took = _opened(path, without)
        yield row(
            "commits", f"open and read, {commits} commits, {name}", round(took * 1000, 1), "ms",
            against=round(least * 1000, 1), ratio=round(took / least, 2),
        )  # fmt: skip


def _opened(path: Path, without: tuple[str, ...]) -> float:
    """Median seconds from opening to the first tile read."""
    times: list[float] = []
    for _ in range(ROUNDS):
        for folder in without:
            shutil.rmtree(path / folder, ignore_errors=True)
        began = time.perf_counter()
        with him.open(path) as repo:
            repo.snapshot("main").get("grid")
            times.append(time.perf_counter() - began)
    return statistics.median(times)


# -- nothing lost


def _survival(base: Path, *, tiny: bool) -> Rows:
    for processes, threads, commits in ((2, 1, 40 if tiny else 1_000), (2, 3, 15 if tiny else 150)):
        kills, cuts = (3, 2) if tiny else (16, 6)
        folder = base / f"survive{threads}"
        found = survive(
            folder, processes=processes, threads=threads, commits=commits, kills=kills, cuts=cuts, seed=threads
        )
        yield row(
            "commits", f"acknowledged commits lost, {processes} processes × {threads} writers", 0, "commits", goal="0",
            holds=True, **found._asdict(),
        )  # fmt: skip
