"""Spec §1.2, design §2: the same writes under the same snapshot id give one directory hash, however they are made.

In whatever order, batched however, by threads that commit in groups or by several processes on one repository. Writes
to different keys commute. Of two writes to one key the later commit counts, so those of one key keep their order here;
replacing a frame writes to all its cells and its extent, so the writes to a replaced frame are of one key. A frame that
loses its last cell is gone, and its extent with it, which no write to another cell brings back: so none is emptied.
"""

import multiprocessing
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import him
from bench.commits import NoSyncDisk
from bench.survive import GRID, Steady
from him.types import StreamSpec

Place = tuple[str, str, int, int]
"""(stream, frame, row, column); row and column are -1 for a whole frame."""
RUNS = 50
DEEP = StreamSpec("deep", tile_height=4, tile_width=4, dtype="uint8", level_rule="mean")


class Write(NamedTuple):
    """One write: a tile or a document to put, or (None) a cell to delete, or an array that becomes the whole frame."""

    place: Place
    seed: int | None

    @property
    def key(self) -> Place:
        """What must keep its order: the cell, or the whole frame where one of its writes replaces it."""
        stream, frame, _, _ = self.place
        return (stream, frame, -1, -1) if frame.startswith("whole") else self.place

    def value(self) -> np.ndarray | bytes | None:
        if self.seed is None:
            return None
        rng = np.random.default_rng(self.seed)
        if self.place[0] == "skills":
            return rng.bytes(20)
        side = {"grid": 16, "deep": 4}[self.place[0]]
        shape = tuple(rng.integers(1, 4, 2) * side - 1) if self.place[2] < 0 else (side, side)
        return rng.integers(0, 256, shape, dtype=np.uint8)


def writes() -> list[Write]:
    """All that is written, in one possible order."""
    rng, found = random.Random(5), list[Write]()
    for stream in ("grid", "deep", "skills"):
        for frame in ("f0", "f1"):
            # Never deleted, so that no order empties the frame.
            found.append(Write((stream, frame, 11, 0), len(found)))
    for number in range(10, 90):
        stream = rng.choice(["grid", "deep", "skills"])
        frame, row, column = f"f{rng.randrange(2)}", rng.randrange(10), rng.randrange(12)
        found.append(Write((stream, frame, row, column), number))
    # Overwritten, some of them twice; some deleted, and one of these put again.
    places = sorted({write.place for write in rng.sample(found[6:], 30)})
    rng.shuffle(places)
    found += [Write(place, 1_000 + number) for number, place in enumerate(places[:15])]
    found += [Write(place, 2_000 + number) for number, place in enumerate(places[5:10])]
    found += [Write(place, None) for place in places[13:]]
    found += [Write(places[20], 3_000)]
    # Frames that are replaced by smaller or larger ones, and written to in between.
    for frame in ("whole-a", "whole-b"):
        found += [Write(("grid", frame, -1, -1), 4_000), Write(("grid", frame, 5, 5), 4_001)]
        found += [Write(("grid", frame, -1, -1), 4_002 + len(frame) % 2), Write(("grid", frame, 0, 0), 4_004)]
    return found


def shuffled(rng: random.Random) -> list[Write]:
    """The writes in a random order in which those of one key stay as they are."""
    left: dict[Place, list[Write]] = {}
    for write in writes():
        left.setdefault(write.key, []).append(write)
    order = [key for key, own in left.items() for _ in own]
    rng.shuffle(order)
    return [left[key].pop(0) for key in order]


def batched(order: list[Write], rng: random.Random) -> Iterator[list[Write]]:
    """Runs of writes that may be one commit: cells of one frame, none of them twice; a whole frame alone."""
    batch: list[Write] = []
    limit = rng.choice([1, 3, 20])
    for write in order:
        same = batch and batch[0].place[:2] == write.place[:2] and batch[0].place[2] >= 0 <= write.place[2]
        if not same or len(batch) >= limit or write.place in [one.place for one in batch]:
            if batch:
                yield batch
            batch = []
        batch.append(write)
    if batch:
        yield batch


def commit(snapshot: him.SnapshotHandle, batch: list[Write]) -> None:
    stream, frame, row, _ = batch[0].place
    if row < 0:
        value = batch[0].value()
        assert isinstance(value, np.ndarray)
        snapshot.put_array(stream, value, frame=frame)
    else:
        snapshot.put_many(stream, {write.place[2:]: write.value() for write in batch}, frame=frame)


def begin(path: Path) -> None:
    steady = Steady(3)
    with him.open(path, create=True, clock=steady, rng=steady, disk=NoSyncDisk(path)) as repo:
        for spec in (GRID, DEEP):
            repo.declare_stream(spec)
        base = repo.create_snapshot(branch="base")
        base.put_many("grid", {(n, n): Write(("grid", "f0", n, n), 6_000 + n).value() for n in range(5)}, frame="f0")
        repo.create_snapshot(parent="base", branch="main")


def parted(order: list[Write], parts: int, rng: random.Random) -> list[list[Write]]:
    """The order dealt out to several writers; all of one key go to the same."""
    owner: dict[Place, int] = {}
    dealt: list[list[Write]] = [[] for _ in range(parts)]
    for write in order:
        dealt[owner.setdefault(write.key, rng.randrange(parts))].append(write)
    return dealt


def by_one(path: Path, order: list[Write], rng: random.Random) -> None:
    with him.open(path, disk=NoSyncDisk(path)) as repo:
        snapshot = repo.snapshot("main")
        for batch in batched(order, rng):
            commit(snapshot, batch)


def by_threads(path: Path, order: list[Write], rng: random.Random) -> None:
    failed: list[BaseException] = []

    def run(batches: list[list[Write]]) -> None:
        try:
            for batch in batches:
                commit(repo.snapshot("main"), batch)
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            failed.append(error)

    with him.open(path, disk=NoSyncDisk(path)) as repo:
        shares = [list(batched(part, rng)) for part in parted(order, rng.choice([2, 5]), rng)]
        threads = [threading.Thread(target=run, args=(share,)) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


def _process(path: str, order: list[Write], seed: int) -> None:
    by_one(Path(path), order, random.Random(seed))


def by_processes(path: Path, order: list[Write], rng: random.Random) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "bench.survive", *(["pytest"] if "pytest" in sys.modules else [])])
    team = [
        context.Process(target=_process, args=(str(path), part, rng.randrange(1 << 30)))
        for part in parted(order, rng.choice([2, 3]), rng)
    ]
    for one in team:
        one.start()
    for one in team:
        one.join(120)
        assert one.exitcode == 0


WAYS: dict[str, Callable[[Path, list[Write], random.Random], None]] = {
    "one writer": by_one,
    "threads": by_threads,
    "processes": by_processes,
}


def made(path: Path, way: str, order: list[Write], rng: random.Random) -> bytes:
    """The directory hash, which a rebuilt catalogue must confirm."""
    begin(path)
    WAYS[way](path, order, rng)
    with him.open(path, disk=NoSyncDisk(path)) as repo:
        found = repo.snapshot("main").info.directory
        assert repo.fsck(rebuild=True).ok
        assert repo.snapshot("main").info.directory == found
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return made(tmp_path_factory.mktemp("same") / "first", "one writer", writes(), random.Random(0))


@pytest.mark.parametrize("way", WAYS)
def test_s1_2_the_same_writes_give_one_directory(tmp_path: Path, expected: bytes, way: str) -> None:
    for seed in range(RUNS // len(WAYS) + 1):
        rng = random.Random(f"{way} {seed}")
        order = shuffled(rng)
        assert made(tmp_path / str(seed), way, order, rng) == expected, seed


def test_other_writes_give_another_directory(tmp_path: Path, expected: bytes) -> None:
    counts = Counter(write.key for write in writes())
    once = [write for write in writes() if counts[write.key] == 1]
    for seed in range(3):
        order = shuffled(random.Random(seed))
        order.remove(once[seed * 15])
        assert made(tmp_path / str(seed), "one writer", order, random.Random(seed)) != expected


def test_of_two_writes_to_one_key_the_later_commit_counts(tmp_path: Path, expected: bytes) -> None:
    order = writes()
    first = next(n for n, write in enumerate(order) if write.seed == 1_000)
    earlier = next(n for n, write in enumerate(order) if write.place == order[first].place)
    order[first], order[earlier] = order[earlier], order[first]
    assert made(tmp_path / "swapped", "one writer", order, random.Random(1)) != expected
