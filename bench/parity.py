"""Parity: what coding, protecting, healing and scrubbing cost, and whether four lost packs of fourteen come back.

Ten packs of KV caches (bytes that do not compress) are protected 10 + 4. The limit of protecting is to read what is
protected, digest it twice (chunks, and records once more to be sure) and write the parity; that of a scrub, to read and
digest once. Files are in the page cache on both sides, and synced where ours are.
"""

import os
import random
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

import him
from bench.measure import OURS, Rows, compared, row, took
from him.adapters import isal
from him.pack import galois, parity
from him.ports import ErasureCode
from him.types import StreamSpec

DATA, EXTRA = 10, 4
CHUNK = 1024 * 1024
MIB = 1024 * 1024
ROUNDS = 5
TRIALS = 12
"""Sets of four lost files."""


class Size(NamedTuple):
    """How large a run is."""

    pack_tiles: int
    """Of 4 MiB, in each of ten packs."""
    rounds: int
    trials: int


FULL, TINY = Size(16, ROUNDS, TRIALS), Size(1, 2, 2)


def run(*, tiny: bool = False) -> Rows:
    """Rows of the arithmetic, then of a repository on this disk."""
    size = TINY if tiny else FULL
    yield from _arithmetic(size)
    with tempfile.TemporaryDirectory(prefix="him-parity-") as name:
        place = Path(name) / "memory"
        _made(place, size)
        yield from _protected(place, size)
        yield from _scrubbed(place, size)
        yield from _healed(place, size)


def _arithmetic(size: Size) -> Rows:
    chunks = [np.frombuffer(random.Random(at).randbytes(CHUNK), dtype=np.uint8) for at in range(DATA)]
    codes: dict[str, ErasureCode | None] = {"tables": galois.product, "ISA-L": isal.load()}
    whole = [*chunks, *parity.parity_of(galois.product, chunks, EXTRA)]
    have = {at: whole[at] for at in range(EXTRA, DATA + EXTRA)}
    for name, code in codes.items():
        if code is None:
            yield row("parity", f"code 10 + 4, {name}", None, "MB/s", error="not there: pip install pyeclib")
            continue
        encoding = partial(parity.parity_of, code, chunks, EXTRA)
        healing = partial(parity.made_again, code, DATA, EXTRA, have, range(EXTRA))
        right = all(bool((one == other).all()) for one, other in zip(healing(), chunks, strict=False))
        encode, heal = (min(took(call).wall for _ in range(size.rounds)) for call in (encoding, healing))
        yield row(
            "parity", f"code 10 + 4, {name}", round(DATA * CHUNK / encode / 1e6), "MB/s", goal="bytes equal",
            holds=right, heal_4_mb_s=round(DATA * CHUNK / heal / 1e6),
        )  # fmt: skip


def _made(place: Path, size: Size) -> None:
    """Ten finished packs."""
    with him.open(place, create=True) as repo:
        repo.declare_stream(StreamSpec("bits", tile_height=2048, tile_width=2048, dtype="uint8"))
        for number in range(DATA):
            cells = {(0, at): _tile(100 * number + at) for at in range(size.pack_tiles)}
            repo.writable("main").put_many("bits", cells, frame=f"f{number}")
            repo.care.protect(all=True)


def _tile(seed: int) -> NDArray[np.uint8]:
    return np.frombuffer(random.Random(seed).randbytes(2048 * 2048), dtype=np.uint8).reshape(2048, 2048)


def _packs(place: Path, suffix: str = ".pack") -> list[Path]:
    return sorted((place / "packs").glob(f"*{suffix}"))


def _protected(place: Path, size: Size) -> Rows:
    data = sum(pack.stat().st_size for pack in _packs(place))
    ours, limit = list[float](), list[float]()
    with him.open(place) as repo:
        for _ in range(size.rounds):
            repo.care.set_parity(0, 0)
            repo.care.protect()
            repo.care.set_parity(DATA, EXTRA)
            ours.append(took(repo.care.protect).wall)
            limit.append(took(lambda: _limit(place, twice=True)).wall)
        status = repo.care.parity()
    yield compared(
        "parity", "protect ten packs, against read + 2 digests + write", ours, limit, "s", of=OURS,
        mb_s=round(data / min(ours) / 1e6), packs=len(_packs(place)), data_bytes=data,
        parity_bytes=status.parity_bytes, space=round(status.parity_bytes / data, 3),
    )  # fmt: skip


def _limit(place: Path, *, twice: bool) -> None:
    """Read and digest the packs; with `twice` digest them again, and write as much as the parity takes, synced."""
    for pack in _packs(place):
        for _ in range(1 + twice):
            _digest(pack)
    if twice:
        for number, one in enumerate(_packs(place, ".parity")):
            beside = place / f"beside{number}"
            with beside.open("wb") as file:
                file.write(bytes(one.stat().st_size))
                os.fsync(file.fileno())
            beside.unlink()


def _digest(path: Path) -> bytes:
    """Through a buffer that is used again: fresh memory for each file would cost more than the reading."""
    hasher, buffer = blake3(), memoryview(bytearray(4 * MIB))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            hasher.update(buffer[:got])
    return hasher.digest()


def _scrubbed(place: Path, size: Size) -> Rows:
    files = [*_packs(place), *_packs(place, ".parity")]
    data = sum(one.stat().st_size for one in files)

    def scrub() -> None:
        assert not any(one.faults for one in repo.care.scrub())

    def read() -> None:
        for one in files:
            _digest(one)

    with him.open(place) as repo:
        ours, theirs = ([took(call).wall for _ in range(size.rounds)] for call in (scrub, read))
    yield compared(
        "parity", "scrub everything, against read + digest", ours, theirs, "s", of=OURS,
        mb_s=round(data / min(ours) / 1e6),
    )  # fmt: skip


def _healed(place: Path, size: Size) -> Rows:
    """Four of the fourteen files are removed, damaged or cut; afterwards each byte must be as before."""
    files = [*_packs(place), *_packs(place, ".parity")]
    good = {one: _digest(one) for one in files}
    rng, seconds, healed, lost = random.Random(7), list[float](), 0, 0
    for trial in range(size.trials):
        chosen = rng.sample(files[:DATA], EXTRA) if trial % 2 == 0 else rng.sample(files, EXTRA)
        sizes = sum(one.stat().st_size for one in chosen)
        for number, one in enumerate(chosen):
            _spoil(one, "removed" if trial < 2 else ("removed", "cut", "overwritten", "zeroed")[number], rng)
        begun = time.perf_counter()
        with him.open(place) as repo:
            left = [one for one in repo.care.scrub() if one.left]
        if trial % 2 == 0:
            seconds.append(sizes / (time.perf_counter() - begun))
        right = not left and all(one.exists() and _digest(one) == good[one] for one in files)
        healed, lost = healed + right, lost + (not right)
    yield row(
        "parity", "4 lost or damaged files of 14, byte for byte again", healed, "trials", against=size.trials,
        goal="all", holds=not lost, mb_s_made_again=round(max(seconds) / 1e6),
    )  # fmt: skip
    five = rng.sample(files[:DATA], EXTRA + 1)
    for one in five:
        _spoil(one, "removed", rng)
    with him.open(place) as repo:
        told = sum(len(one.left) for one in repo.care.scrub())
    yield row(
        "parity", "5 lost packs: told, and nothing made up", told, "faults", goal=">= 5",
        holds=told >= EXTRA + 1 and not any(one.exists() for one in five) and _sound(files, good, five),
    )  # fmt: skip


def _sound(files: Iterable[Path], good: dict[Path, bytes], without: Iterable[Path]) -> bool:
    gone = set(without)
    return all(_digest(one) == good[one] for one in files if one not in gone)


def _spoil(path: Path, how: str, rng: random.Random) -> None:
    size = path.stat().st_size
    if how == "removed":
        path.unlink()
    elif how == "cut":
        os.truncate(path, rng.randrange(size))
    else:
        with path.open("r+b") as file:
            file.seek(rng.randrange(size // 2))
            file.write(bytes(size // 3) if how == "zeroed" else rng.randbytes(size // 3))
