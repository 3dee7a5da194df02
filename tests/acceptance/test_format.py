"""docs/FORMAT.md against what the software writes at random: alone, in several openings, in several processes."""

import itertools
import multiprocessing
import random
import shutil
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder, FakeReader
from golden.build import RULES, GoldenClock, GoldenRng, NoSyncDisk, described, marks, noise, numbers, prose
from golden.compare import read_independently, same
from independent_reader import dtype_of

import him
from him.tile.codec import DTYPES
from him.types import StreamSpec

PLAIN = sorted(DTYPES)
SPECS = (
    *(StreamSpec(f"levels-{rule}", tile_height=16, tile_width=8, level_rule=rule) for rule in RULES),
    *(StreamSpec(f"quantised-{way}", tile_height=32, tile_width=32, quantise=way) for way in ("int8", "fp8", "fp16")),
    StreamSpec("plain", tile_height=128, tile_width=128),
)


class Writer:
    """Writes whatever its seed says into branches that others write to too."""

    def __init__(self, folder: Path, seed: int, clock: GoldenClock | None = None) -> None:
        self._random, self._count, self._seed = random.Random(seed), itertools.count(), seed
        self.repo = him.open(
            folder, clock=clock, rng=GoldenRng(seed), reader=FakeReader(), encoder=FakeEncoder(),
            disk=NoSyncDisk(folder),
        )  # fmt: skip

    def fresh(self) -> str:
        return f"{self._seed}:{next(self._count)}"

    def step(self) -> None:
        name = self._random.choice(["main", "side", f"own {self._seed}"])
        act = self._random.choices(
            [self.array, self.levels, self.quantised, self.changed, self.document, self.log, self.history],
            [4, 5, 3, 10, 5, 2, 4],
        )[0]  # fmt: skip
        try:
            act(name)
        except (him.HimError, np.exceptions.DTypePromotionError) as error:
            # What others did meanwhile may forbid it: a sealed snapshot, a frame of another dtype, a name taken.
            if type(error).__name__ not in ("ConflictError", "SealedError", "NotFoundError"):
                raise

    def array(self, name: str) -> None:
        dtype = self._random.choice(PLAIN)
        shape = tuple(self._random.randint(1, 40) for _ in range(self._random.randint(1, 3)))
        values = noise(self.fresh(), dtype, shape)
        if self._random.random() < 0.3:
            values = np.zeros_like(values)
        self.repo.writable(name).put_array("plain", values, frame=f"a{self._random.randint(0, 5)}")

    def levels(self, name: str) -> None:
        rule = self._random.choice(list(RULES))
        dtype = self._random.choice(
            [one for one in PLAIN if rule in ("mean", "first", "nearest") or "complex" not in one]
        )
        shape = (
            self._random.randint(1, 180),
            self._random.randint(1, 30),
            *([self._random.randint(1, 3)] * self._random.randint(0, 1)),
        )
        frame, work = f"l{self._random.randint(0, 2)}", self.repo.writable(name)
        if self._random.random() < 0.5:
            work.put_array(f"levels-{rule}", noise(self.fresh(), dtype, shape), frame=frame)
            return
        cells = {
            (self._random.randint(0, 9), self._random.randint(0, 70)): self._random.choice([
                None, noise(self.fresh(), "float32", (self._random.randint(1, 16), self._random.randint(1, 8)))
            ])
            for _ in range(4)
        }  # fmt: skip
        work.put_many(f"levels-{rule}", cells, frame=f"sparse {rule}")

    def quantised(self, name: str) -> None:
        way = self._random.choice(["int8", "fp8", "fp16"])
        dtype = self._random.choice(["float16", "bfloat16", "float32", "float64"])
        shape = (self._random.choice([3, 70]), *(self._random.randint(1, 9) for _ in range(self._random.randint(1, 2))))
        values = numbers(self.fresh(), shape).astype("f8") * 10.0 ** self._random.randint(-3, 4)
        self.repo.writable(name).put_array(f"quantised-{way}", values.astype(dtype_of(dtype)), frame=f"q {dtype}")

    def changed(self, name: str) -> None:
        """A tile that differs a little from what is there."""
        frame = f"c{self._random.randint(0, 3)}"
        work = self.repo.writable(name)
        try:
            old = np.asarray(work.get("plain", frame=frame)).copy()
        except him.HimError:
            start = marks if frame == "c0" else lambda seed, high, wide: noise(seed, "uint8", (high, wide))
            work.put("plain", start(self.fresh(), 128, 96), frame=frame)
            return
        way = self._random.randint(0, 4)
        y, x = self._random.randint(0, old.shape[0] - 17), self._random.randint(0, 70)
        if way == 0:
            old[y : y + 16, x : x + 20] = noise(self.fresh(), "uint8", (16, 20))
        elif way == 1:
            old ^= (noise(self.fresh(), "uint8", old.shape) < 9).astype("u1")
        elif way == 2:
            old = np.concatenate([old[5:], noise(self.fresh(), "uint8", (5, old.shape[1]))])
        elif way == 3:
            old[y, x] += 1
        else:
            old = np.concatenate([old, old[:3]])[-128:]
        if self._random.random() < 0.3 and (delta := work.make_delta("plain", old, frame=frame)) is not None:
            work.put_delta("plain", delta, frame=frame)
        else:
            work.put("plain", old, frame=frame)

    def document(self, name: str) -> None:
        work, frame = self.repo.writable(name), f"d{self._random.randint(0, 4)}"
        try:
            text = bytes(work.get("skills", frame=frame))
            at = self._random.randint(0, len(text))
            text = text[:at] + self.fresh().encode() * self._random.randint(0, 300) + text[at:]
        except him.HimError:
            text = prose(self.fresh(), self._random.choice([0, 1, 300, 12_000]))
        work.put("skills", text, frame=frame)

    def log(self, name: str) -> None:
        self.repo.writable(name).append("logs", [{"n": self.fresh()}] * self._random.randint(1, 50))

    def history(self, name: str) -> None:
        way, work = self._random.randint(0, 5), self.repo.writable(name)
        if way <= 1:
            work.seal()
        elif way == 2:
            self.repo.tag(f"tag {self.fresh()}", work.id)
        elif way == 3:
            work.set_tag(f"key {self._random.randint(0, 2)}", self._random.choice([None, self.fresh()]))
        elif way == 4:
            self.repo.create_snapshot(parent=name, branch=f"branch {self.fresh()}", provenance={"z": "1", "a": "2"})
        else:
            self.repo.delete_snapshot(self.repo.create_snapshot(parent=name).id)


def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 200_000)
    monkeypatch.setattr("him.catalog.history.CHECKPOINT_RECORDS", 30)


def prepared(folder: Path) -> None:
    with him.open(folder, create=True, reader=FakeReader(), encoder=FakeEncoder()) as repo:
        for spec in SPECS:
            repo.declare_stream(spec)


def agree(folder: Path) -> Counter[tuple[int, int, int]]:
    """Both readers on all there is; (kind, codec, depth) of the records."""
    with him.open(folder, reader=FakeReader(), encoder=FakeEncoder()) as repo:
        software = described(repo)
    document, reader = read_independently(folder)
    same(document, software)
    return Counter((record.kind, record.codec, record.depth) for record in reader.records)


def written_at_random(folder: Path, seed: int, steps: int) -> Counter[tuple[int, int, int]]:
    prepared(folder)
    clock = GoldenClock()
    writers = [Writer(folder, 10 * seed + n, clock) for n in (1, 2)]
    order = random.Random(seed)
    for _ in range(steps):
        clock.now += 1_000_000
        order.choice(writers).step()
    for writer in writers:
        writer.repo.close()
    return agree(folder)


def test_two_writers_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_packs(monkeypatch)
    kinds = written_at_random(tmp_path / "r", 1, 120)
    print(f"{kinds.total()} records read alike: {sorted(kinds.items())}")
    assert {codec for kind, codec, _ in kinds if kind == 1} >= {0, 1, 2, 3, 5, 6}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 32))
def test_many_writers_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    small_packs(monkeypatch)
    print(written_at_random(tmp_path / "r", seed, 150).total(), "records read alike")


def run(folder: Path, seed: int, steps: int, barrier: Barrier) -> None:
    """One process's work; both hold the repository open all the while."""
    writer = Writer(folder, seed)
    barrier.wait(100)
    for _ in range(steps):
        writer.step()
    barrier.wait(100)
    writer.repo.close()


def test_processes_beside_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    prepared(folder)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=run, args=(folder, seed, 25, barrier)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert len(list((folder / "packs").iterdir())) >= 2
    print(agree(folder).total(), "records read alike")


def test_the_software_reads_the_right_values_or_none(tmp_path: Path) -> None:
    """Bits flipped in the packs of the golden repository: what is read is what was written, or an error."""
    folder = Path(shutil.copytree(Path(__file__).parents[1] / "golden/v1/repository", tmp_path / "r"))
    with him.open(folder, reader=FakeReader(), encoder=FakeEncoder()) as repo:
        whole = described(repo)
    rng, packs, refused = random.Random(11), sorted(folder.glob("packs/*.pack")), 0
    for _ in range(25):
        pack = rng.choice(packs)
        was = pack.read_bytes()
        at = rng.randrange(len(was))
        pack.write_bytes(was[:at] + bytes([was[at] ^ 1 << rng.randrange(8)]) + was[at + 1 :])
        shutil.rmtree(folder / "cache")
        try:
            with him.open(folder, reader=FakeReader(), encoder=FakeEncoder()) as repo:
                assert described(repo) == whole
        except him.HimError:
            refused += 1
        pack.write_bytes(was)
    assert refused > 5
