"""Processes that commit to one open snapshot while they are killed and the power is cut, and what must hold after."""

import hashlib
import multiprocessing
import os
import random
import selectors
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

import him
from bench.power import Fuse, Places, PowerDisk, cut_power
from him.pyramid import diff, directory
from him.tile import codec
from him.types import Batch, StreamSpec

GRID = StreamSpec("grid", tile_height=16, tile_width=16, dtype="uint8")
_SHARED_EVERY = 5
_SHARED_CELLS = 8
_OPERATIONS_A_COMMIT = 12
Place = tuple[str, int, int]
"""(frame, row, column)."""


class Steady:
    """A clock and a source of bytes that repeat, so that two repositories open snapshots of one id."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def now_ns(self) -> int:
        self._count += 1
        return 1_700_000_000_000_000_000 + self._count * 1_000_000

    monotonic_ns = now_ns

    def token(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_128(f"{self._seed}:{self._count}".encode()).digest(size)


class Survived(NamedTuple):
    """What happened in one run that nothing was lost in."""

    acknowledged: int
    records: int
    batches: int
    kills: int
    """Processes that ended before their work was done, by themselves or in a power cut."""
    cuts: int
    torn: int
    """Power cuts that left a record to publish or to cut."""


def place_of(writer: int, number: int) -> Place:
    """Where a writer's n-th commit writes: mostly to cells of its own, at times to one that all write."""
    if number % _SHARED_EVERY == _SHARED_EVERY - 1:
        return "shared", number // _SHARED_EVERY % _SHARED_CELLS, 0
    return f"w{writer}", number // 16, number % 16


def tile_of(writer: int, number: int) -> np.ndarray:
    """(16, 16) uint8 that no other commit writes."""
    return np.random.default_rng((writer, number)).integers(0, 256, (16, 16), dtype=np.uint8)


def begin(path: Path, disk: PowerDisk | None = None) -> str:
    """Make a repository with one open snapshot, whose id is the same every time."""
    steady = Steady(1)
    with him.open(path, create=True, clock=steady, rng=steady, disk=disk) as repo:
        repo.declare_stream(GRID)
        return repo.create_snapshot(branch="main").id


# -- one process, of one writer or of several threads that write


def work(base: str, first: dict[int, int], count: int, fuse: tuple[int, str], told: Connection) -> None:
    """For each writer commit `first` … `count` - 1, and acknowledge each once its commit has returned."""
    places = Places(Path(base))

    def write(writer: int) -> None:
        snapshot = repo.snapshot("main")
        for number in range(first[writer], count):
            frame, row, column = place_of(writer, number)
            snapshot.put_many("grid", {(row, column): tile_of(writer, number)}, frame=frame)
            os.write(told.fileno(), f"{writer} {number}\n".encode())

    with (
        him.open(places.volatile, disk=PowerDisk(places, Fuse(*fuse))) as repo,
        ThreadPoolExecutor(len(first)) as threads,
    ):
        for done in [threads.submit(write, writer) for writer in first]:
            done.result()


class _Process:
    """A process that writes, and what its writers have acknowledged, over all its lives."""

    def __init__(self, places: Places, writers: range, count: int) -> None:
        self._base, self._count = str(places.volatile.parent), count
        self.acknowledged = dict.fromkeys(writers, 0)
        self.killed = 0
        self._pipe = b""
        self.process: BaseProcess | None = None
        self.ear: Connection | None = None

    @property
    def done(self) -> bool:
        """Whether all was written; it may live still."""
        return set(self.acknowledged.values()) == {self._count}

    def start(self, fuse_at: int, mode: str) -> None:
        """Begin, or go on where the last acknowledgements were."""
        # Starting by fork from a process that has imported everything takes milliseconds, so that the others do not
        # get far meanwhile.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *(["pytest"] if "pytest" in sys.modules else [])])
        self.ear, mouth = context.Pipe(duplex=False)
        order = (self._base, dict(self.acknowledged), self._count, (fuse_at, mode), mouth)
        self.process = context.Process(target=work, args=order, daemon=True)
        self.process.start()
        mouth.close()

    def listen(self) -> bool:
        """Take in acknowledgements; False once the process has ended."""
        assert self.ear is not None
        data = os.read(self.ear.fileno(), 65_536)
        *lines, self._pipe = (self._pipe + data).split(b"\n")
        for line in lines:
            writer, number = map(int, line.split())
            assert number == self.acknowledged[writer], "acknowledged out of order"
            self.acknowledged[writer] += 1
        return bool(data)

    def end(self) -> None:
        """Kill it if it lives, and hear its last words."""
        assert self.process is not None
        assert self.ear is not None
        self.process.kill()
        while self.listen():
            pass
        self.process.join()
        assert self.process.exitcode in (0, -signal.SIGKILL), f"a writing process failed: {self.process.exitcode}"
        self.ear.close()
        self.process, self._pipe = None, b""
        self.killed += not self.done


# -- the run


def survive(
    base: Path, *, processes: int, threads: int = 1, commits: int, kills: int, cuts: int, seed: int
) -> Survived:
    """Let processes commit through kills at random operations and power cuts; then check all that must hold.

    Args:
        threads: writers in each process; more than one, and they commit in groups.
        commits: of each writer.
        kills, cuts: how many there should be; each cut also kills everybody.

    Raises:
        AssertionError: something acknowledged is gone or wrong, or the repository is not sound.
    """
    rng = random.Random(seed)
    places = Places(base)
    begin(places.volatile, PowerDisk(places))
    team = [_Process(places, range(n * threads, (n + 1) * threads), commits) for n in range(processes)]
    events = ["kill"] * kills + ["cut"] * cuts
    rng.shuffle(events)
    # What a process may do before it dies, on average: so that the events fill the whole run.
    life = processes * threads * commits * _OPERATIONS_A_COMMIT // (len(events) + 2)
    torn = 0
    while not all(one.done for one in team):
        event = events.pop() if events else "none"
        for one in team:
            if one.process is None and not one.done:
                at = 0 if event == "none" else 1 + rng.randrange(2 * life)
                one.start(at, rng.choice(["before", "after", "half"]))
        _until_one_ends(team)
        if event == "cut":
            for one in team:
                if one.process is not None:
                    one.end()
            cut_power(places, rng)
            torn += check(places, team)
    for one in team:
        if one.process is not None:
            one.end()
    check(places, team)
    return _proof(base, places, team, cuts, torn)


def _until_one_ends(team: list[_Process]) -> None:
    """Hear the workers until one of them is no more."""
    with selectors.DefaultSelector() as waiting:
        for one in team:
            if one.process is not None:
                waiting.register(one.ear, selectors.EVENT_READ, one)
        while waiting.get_map():
            for key, _ in waiting.select():
                one: _Process = key.data
                if not one.listen():
                    one.end()
                    return


def check(places: Places, team: list[_Process]) -> bool:
    """Everything acknowledged is there byte for byte, in the order of each writer, and fsck is clean.

    Returns:
        Whether opening found a record to publish or to cut.
    """
    before = _tail(places)
    with him.open(places.volatile, disk=PowerDisk(places)) as repo:
        after = _tail(places)
        report = repo.fsck()
        assert report.ok, report.errors
        orders = _orders(repo, team)
        snapshot = repo.snapshot("main")
        last = {place_of(*write): write for write in orders}
        for writer, acknowledged in ((w, n) for one in team for w, n in one.acknowledged.items()):
            mine = [n for own, n in orders if own == writer]
            # One that was killed before it could tell writes the same again: no change, or (a shared cell) once more.
            assert mine == sorted(mine), f"writer {writer} is out of order"
            missing = set(range(acknowledged)) - set(mine)
            assert not missing, f"writer {writer} lost {sorted(missing)[:5]}"
            assert set(mine) <= set(range(acknowledged + 1)), "something was committed that nobody wrote"
        for (frame, row, column), write in last.items():
            found = snapshot.get("grid", frame=frame, y=row, x=column)
            assert np.array_equal(np.asarray(found), tile_of(*write)), write
    return before != after


def _orders(repo: him.Repository, team: list[_Process]) -> list[tuple[int, int]]:
    counts = [count for one in team for count in one.acknowledged.values()]
    return writes_in_order(repo, len(counts), max(counts) + 1)


def _tail(places: Places) -> tuple[int, bytes]:
    """How long the log is, and which end of it is published."""
    return (places.volatile / "log/000001.log").stat().st_size, (places.volatile / "log/end").read_bytes()


def writes_in_order(repo: him.Repository, writers: int, commits: int) -> list[tuple[int, int]]:
    """(writer, number) of every cell that each batch of the log changed, found by what it then held."""
    names = {codec.encode_array(tile_of(w, n)).ref: (w, n) for w in range(writers) for n in range(commits)}
    store, found = repo._store, list[tuple[int, int]]()
    for _, _, record in repo._history.records():
        for batch in record.operations:
            if isinstance(batch, Batch):
                for was, now in directory.diff(store, batch.before, batch.directory):
                    old = (was.root, was.root_height) if was else (b"", 0)
                    new = (now.root, now.root_height) if now else (b"", 0)
                    found += [names[entry.ref] for *_, entry in diff.cells(store, *old, *new) if entry]
    return found


def _proof(base: Path, places: Places, team: list[_Process], cuts: int, torn: int) -> Survived:
    """What a rebuilt repository, and a fresh one that is told all of it again, make of it is the same directory."""
    with him.open(places.volatile, disk=PowerDisk(places)) as repo:
        orders = _orders(repo, team)
        hashed = repo.snapshot("main").info.directory
        records = list(repo._history.records())
        batches = sum(isinstance(one, Batch) for _, _, record in records for one in record.operations)
    shutil.rmtree(places.volatile / "cache")
    with him.open(places.volatile, disk=PowerDisk(places)) as repo:
        assert repo.snapshot("main").info.directory == hashed
        assert repo.fsck(rebuild=True).ok
        assert repo.snapshot("main").info.directory == hashed
    name = begin(base / "fresh")
    with him.open(base / "fresh") as repo:
        snapshot = repo.snapshot(name)
        for writer, number in orders:
            frame, row, column = place_of(writer, number)
            snapshot.put_many("grid", {(row, column): tile_of(writer, number)}, frame=frame)
        assert snapshot.info.directory == hashed, "the same writes gave another directory"
    acknowledged = sum(sum(one.acknowledged.values()) for one in team)
    return Survived(acknowledged, len(records), batches, sum(one.killed for one in team), cuts, torn)
