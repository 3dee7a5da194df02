"""Files of a repository are damaged at random, one at a time: what is read then, what fsck says, and whether it can be
written to.

The repository holds example screens with what was seen on one of them, a KV cache, documents in chunks, logs, deltas,
levels, branches, finished and growing packs, checkpoints and a recorded query; once by itself, once before a cold tier
with parts of it freed here. Each trial damages a fresh copy: a flipped bit, two swapped blocks of 4 KiB, a cut, or a
file gone. Everything is then read and compared with what was stored, and another copy with the same damage is checked.
"""

import contextlib
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import msgspec
import numpy as np
from blake3 import blake3

import him
from bench.examples import screens
from bench.measure import Row, Rows, row
from him.adapters.local import LocalDisk
from him.adapters.pillow import PillowDecoder
from him.errors import ExpiredError, HimError, IntegrityError, NotFoundError
from him.tier.settings import TIER, tier_settings
from him.types import StreamSpec

TRIALS, TINY_TRIALS = 500, 24
"""Of each arm."""
BLOCK = 4096
PACK_BYTES = 300_000
CHECKPOINT_RECORDS = 8
BUDGET = 16 * 1024 * 1024
REPOSITORY, COLD = "memory", "cold"
HEALED = "what is not here, or not right, is fetched from the cold tier"
HARMLESS = {
    "cache": "made again, or passed over, when it does not verify",
    "cold/hotness": "only says what to free first",
    "cold/log": "only says where the log's copy ended when it was last looked at",
    "cold/account": "counted again",
    "log/turn": "empty: only its lock counts",
    "log/end": "found again in the log",
    "leases": "a dead process's: the next collection removes it",
    "growing pack": "beyond the last committed range: the next writer cuts it off",
    "cold tier's copy": "what is here is read first; the copy is verified whenever it is used",
}
"""Kinds of files damage to which may harm nothing though fsck does not name it, and why."""
HARMLESS_GONE = {
    "checkpoint": "the log says the same, and one is written at the next mark",
    "spool": "a recorded query that nothing else refers to",
}
"""Kinds of files that may be gone without a word."""


# -- what is damaged


def build(folder: Path, *, cold: bool, tiny: bool) -> None:
    """A repository at `folder/memory`, and its cold tier beside it."""
    with (
        mock.patch("him.tier.warm.PACK_TARGET_BYTES", PACK_BYTES),
        mock.patch("him.catalog.history.CHECKPOINT_RECORDS", CHECKPOINT_RECORDS),
    ):
        if cold:
            with him.open(folder / REPOSITORY, create=True) as repo:
                repo.set_tier(str(folder / COLD), BUDGET)
        with him.open(folder / REPOSITORY, create=not cold) as repo:
            _fill(repo, tiny=tiny)
            if cold:
                repo.tier.push()
                repo.tier.demote(1_000_000)
        # As a process that was killed leaves it.
        lease = folder / REPOSITORY / "leases" / "0"
        lease.parent.mkdir(exist_ok=True)
        lease.write_bytes((5).to_bytes(8, "little") + blake3((5).to_bytes(8, "little")).digest())


def _fill(repo: him.Repository, *, tiny: bool) -> None:
    rng = np.random.default_rng(7)
    repo.declare_stream(StreamSpec("grid", tile_height=64, tile_width=64, dtype="uint8", level_rule="mean"))
    work, decoder = repo.writable("main"), PillowDecoder()
    pictures = screens(tiny=tiny)
    work.put_image(decoder.decode(pictures[0].read_bytes(), pictures[0].name)[:512, :700].copy(), "seen")
    for picture in pictures[: 2 if tiny else 6]:
        pixels = decoder.decode(picture.read_bytes(), picture.name)[:768, :1024].copy()
        work.put_array("screen", pixels, frame=picture.stem)
    pixels[40:60, 100:300] = 17
    work.put_array("screen", pixels, frame=picture.stem)
    repo.tag("before", "main")
    text = b" ".join(b"%x" % number for number in rng.integers(0, 5000, 30_000))
    work.put("skills", text, frame="manual")
    work.put("skills", text[:50_000] + b" put in here " + text[50_000:], frame="manual")
    values = rng.standard_normal((4, 2, 4, 256, 16)).astype(np.float16)
    work.put_array("kv_cache", values, frame="chat")
    values[:, :, :, 250:] *= np.float16(2)
    work.put_array("kv_cache", values, frame="chat")
    work.put_array("grid", rng.integers(0, 256, (600, 600), dtype=np.uint8), frame="noise")
    work.seal()
    child = repo.branch("other", source="main")
    for number in range(12):
        child.put("grid", rng.integers(0, 256, (64, 64), dtype=np.uint8), frame="more", y=number // 4, x=number % 4)
        child.append("logs", [{"n": number, "text": "x" * number}], writer="w")
    repo.query("find button 'Sign In'", "main", budget_ms=5_000)


def kind_of(path: str) -> str:
    """The kind of file at a path below the folder that holds memory and cold tier."""
    if path.startswith(f"{COLD}/"):
        return "cold tier's copy"
    name = path.removeprefix(f"{REPOSITORY}/")
    if name.startswith(("cache/", "leases/", "spool/")):
        return name.partition("/")[0]
    if name.startswith("log/checkpoints/"):
        return "checkpoint"
    return "pack" if name.startswith("packs/") else name


class Kinds(NamedTuple):
    """The files to choose from, by kind; growing packs are a kind of their own."""

    files: dict[str, list[str]]

    @staticmethod
    def of(folder: Path) -> "Kinds":
        with him.open(folder / REPOSITORY) as repo:
            growing = {pack.name for pack in repo._projection.state().packs if pack.finished is None}
        files: dict[str, list[str]] = {}
        for file in sorted(folder.rglob("*")):
            path = str(file.relative_to(folder))
            if file.is_file() and file.stat().st_size + path.endswith("log/turn"):
                own = path.removeprefix(f"{REPOSITORY}/") in growing
                files.setdefault("growing pack" if own else kind_of(path), []).append(path)
        return Kinds(files)


# -- damage


def flip(file: Path, rng: random.Random) -> str:
    """One bit."""
    at = rng.randrange(max(1, file.stat().st_size))
    bit = rng.randrange(8)
    with file.open("r+b") as opened:
        opened.seek(at)
        was = opened.read(1) or b"\0"
        opened.seek(at)
        opened.write(bytes([was[0] ^ 1 << bit]))
    return f"bit {bit} of byte {at} flipped"


def swap(file: Path, rng: random.Random) -> str:
    """Two blocks of 4 KiB that differ; of a small file two eighths."""
    data = file.read_bytes()
    size = BLOCK if len(data) >= 2 * BLOCK else max(1, len(data) // 8)
    count = max(1, len(data) // size)
    for _ in range(100):
        one, other = sorted((rng.randrange(count) * size, rng.randrange(count) * size))
        first, second = data[one : one + size], data[other : other + size]
        if first != second:
            break
    else:
        return flip(file, rng)
    with file.open("r+b") as opened:
        for at, part in ((one, second), (other, first)):
            opened.seek(at)
            opened.write(part)
    return f"{size} bytes at {one} and {other} swapped"


def cut(file: Path, rng: random.Random) -> str:
    """The end gone."""
    size = rng.randrange(max(1, file.stat().st_size))
    with file.open("r+b") as opened:
        opened.truncate(size)
    return f"cut to {size} bytes"


def remove(file: Path, _rng: random.Random) -> str:
    """All gone."""
    file.unlink()
    return "removed"


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {"flip": flip, "swap": swap, "cut": cut, "remove": remove}


# -- what is read


Place = tuple[str, str, str, int, int, int]
"""(snapshot, stream, frame, level, row, column)."""


class Content(NamedTuple):
    """All that can be read of a repository, by digest."""

    tiles: dict[Place, str]
    refs: dict[str, tuple[str, str]]


def content(folder: Path) -> Content:
    """What a sound repository holds."""
    tiles: dict[Place, str] = {}
    with him.open(folder) as repo:
        for one in repo.snapshots():
            handle = repo.snapshot(one.snapshot_id)
            for frame in handle.frames():
                for meta in handle.tiles(frame.stream, frame=frame.name):
                    place = (one.snapshot_id, frame.stream, frame.name, 0, meta.y, meta.x)
                    tiles[place] = _value(handle, place)
                if frame.level_rule != "none":
                    place = (one.snapshot_id, frame.stream, frame.name, 1, 0, 0)
                    with contextlib.suppress(NotFoundError):
                        tiles[place] = _value(handle, place)
        return Content(tiles, {name: (kind, str(target)) for name, (kind, target) in repo.refs().items()})


def _value(handle: him.SnapshotHandle, place: Place) -> str:
    _, stream, frame, level, y, x = place
    try:
        value = handle.get(stream, frame=frame, level=level, y=y, x=x)
    except ExpiredError:
        return "expired"
    return blake3(value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()).hexdigest()


class Read(NamedTuple):
    """What came of reading everything."""

    right: int
    errors: list[str]
    """Located errors, one a tile; one for all where the repository did not open."""
    wrong: list[str]
    """Other values than were stored, and tiles or names that are gone without an error."""
    tracebacks: list[str]
    writable: str
    """Empty when it could be written to, else the error's kind."""
    opened: bool


def survey(folder: Path, known: Content) -> Read:
    """Open a repository, read all that it should hold, and write something."""
    found = Read(0, [], [], [], "", False)
    try:
        with him.open(folder) as repo:
            found = _read_all(repo, known)
            return found._replace(writable=_write(repo, found.tracebacks))
    except HimError as error:
        _located(error, found)
        return found._replace(writable=error.kind)
    except Exception as error:  # noqa: BLE001 - what a user would see as a traceback is what is counted
        found.tracebacks.append(f"open: {type(error).__name__}: {error}")
        return found._replace(writable="traceback")


def _read_all(repo: him.Repository, known: Content) -> Read:
    found = Read(0, [], [], [], "", True)
    right, handles = 0, dict[str, him.SnapshotHandle]()
    for place, digest in known.tiles.items():
        try:
            if place[0] not in handles:
                handles[place[0]] = repo.snapshot(place[0])
            if _value(handles[place[0]], place) == digest:
                right += 1
            else:
                found.wrong.append(f"{place} has another value")
        except NotFoundError as error:
            found.wrong.append(f"{place} is gone: {error.message}")
        except HimError as error:
            _located(error, found)
        except Exception as error:  # noqa: BLE001 - as above
            found.tracebacks.append(f"{place}: {type(error).__name__}: {error}")
    try:
        refs = {name: (kind, str(target)) for name, (kind, target) in repo.refs().items()}
        if not known.refs.items() <= refs.items():
            found.wrong.append(f"names: {refs}")
    except HimError as error:
        _located(error, found)
    return found._replace(right=right)


def _located(error: HimError, found: Read) -> None:
    """An error that names what it is of and where: any other is as bad as a traceback."""
    if isinstance(error, IntegrityError) and not (error.place and error.fix):
        found.tracebacks.append(f"no place: {error.line()}")
    found.errors.append(error.line())


def _write(repo: him.Repository, tracebacks: list[str]) -> str:
    try:
        repo.writable("probe").put("skills", b"written after", frame="probe")
        if repo.snapshot("probe").get("skills", frame="probe") != b"written after":
            tracebacks.append("what was just written reads otherwise")
        return ""
    except HimError as error:
        return error.kind
    except Exception as error:  # noqa: BLE001 - as above
        tracebacks.append(f"write: {type(error).__name__}: {error}")
        return "traceback"


# -- trials


class Outcome(NamedTuple):
    """One trial."""

    kind: str
    damage: str
    what: str
    read: Read
    detected: bool
    said: str
    """What fsck said first, or its traceback."""


class Base(NamedTuple):
    """What trials start from."""

    folder: Path
    kinds: Kinds
    known: Content
    notes: frozenset[str]
    """Places that fsck notes of the sound repository."""


def base(folder: Path) -> Base:
    """A built repository, read and checked while it is sound."""
    known = content(folder / REPOSITORY)
    report = him.check(folder / REPOSITORY)
    assert report.ok, report.errors
    return Base(folder, Kinds.of(folder), known, frozenset(note.place for note in report.notes))


def trial(of: Base, seed: int) -> Outcome:
    """Damage one file of a copy; read it; check another copy."""
    rng = random.Random(seed)
    kind = rng.choice(sorted(of.kinds.files))
    name, path = rng.choice(sorted(DAMAGES)), rng.choice(of.kinds.files[kind])
    if kind == "log/turn":
        name = "remove"
    with tempfile.TemporaryDirectory(prefix="him-damage-", dir=of.folder.parent) as scratch:
        copy = copied(of.folder, Path(scratch) / "a")
        what = f"{path}: {DAMAGES[name](copy / path, rng)}"
        other = copied(copy, Path(scratch) / "b")
        read = survey(copy / REPOSITORY, of.known)
        detected, said = _checked(other / REPOSITORY, of.notes, read)
    return Outcome(kind, name, what, read, detected, said)


def copied(folder: Path, to: Path) -> Path:
    """A copy whose cold tier is its own; holes stay holes."""
    shutil.copytree(folder, to, copy_function=_copy_file)
    with contextlib.suppress(HimError):
        disk = LocalDisk(to / REPOSITORY)
        settings = tier_settings(disk)
        if settings is not None:
            disk.write_whole(TIER, msgspec.structs.replace(settings, cold=str(to / COLD)).encoded())
    return to


def _copy_file(source: str, target: str) -> str:
    data = Path(source).read_bytes()
    with Path(target).open("wb") as made:
        for at in range(0, len(data), 64 * 1024):
            part = data[at : at + 64 * 1024]
            if part.count(0) == len(part):
                made.seek(len(part), 1)
            else:
                made.write(part)
        made.truncate(len(data))
    return target


def _checked(folder: Path, usual: frozenset[str], read: Read) -> tuple[bool, str]:
    try:
        report = him.check(folder)
    except HimError as error:
        return True, error.line()
    except Exception as error:  # noqa: BLE001 - as above
        read.tracebacks.append(f"fsck: {type(error).__name__}: {error}")
        return False, f"{type(error).__name__}: {error}"
    told = [*report.errors, *(note for note in report.notes if note.place not in usual)]
    for fault in report.errors:
        if not (fault.object and fault.place and fault.fault and fault.fix and fault.kind):
            read.tracebacks.append(f"fsck: a fault without place or remedy: {fault}")
    return bool(told), f"{told[0].fault} [{told[0].object}] at {told[0].place}" if told else ""


def _batch(of: Base, seeds: range) -> list[Outcome]:
    return [trial(of, seed) for seed in seeds]


def outcomes(of: Base, trials: int, *, workers: int = 2) -> list[Outcome]:
    """All trials of a base, by seed."""
    if trials <= TINY_TRIALS:
        return _batch(of, range(trials))
    parts = [range(start, min(start + 25, trials)) for start in range(0, trials, 25)]
    # Forked from one that never ran a model: its threads would be missing.
    with ProcessPoolExecutor(workers, get_context("forkserver")) as pool:
        return [one for part in pool.map(_batch, [of] * len(parts), parts) for one in part]


# -- rows


def run(*, tiny: bool = False) -> Rows:
    """Rows for a repository by itself, and for one before a cold tier."""
    for cold in (False, True):
        with tempfile.TemporaryDirectory(prefix="him-damage-") as name:
            folder = Path(name) / "base"
            folder.mkdir()
            build(folder, cold=cold, tiny=tiny)
            yield from _rows("before a cold tier" if cold else "by itself", base(folder), tiny=tiny)


def _rows(arm: str, of: Base, *, tiny: bool) -> Rows:
    found = outcomes(of, TINY_TRIALS if tiny else TRIALS)
    count = len(found)

    def total(what: str, value: int, unit: str, *, goal: str = "", holds: bool | None = None, **more: object) -> Row:
        return row("damage", f"{arm}: {what}", value, unit, goal=goal, holds=holds, **more)

    kinds = dict(sorted(Counter(one.kind for one in found).items()))
    yield total("files damaged", count, "trials", kinds=kinds, damages=dict(Counter(one.damage for one in found)))
    yield total("tiles read right", sum(one.read.right for one in found), "tiles", against=count * len(of.known.tiles))
    hurt = sum(1 for one in found if one.read.errors)
    yield total("located errors", sum(len(one.read.errors) for one in found), "errors", trials_with_one=hurt)
    wrong = [f"{one.what}: {said}" for one in found for said in one.read.wrong]
    yield total("wrong or silently gone", len(wrong), "tiles", goal="0", holds=not wrong, examples=wrong[:3])
    broken = [f"{one.what}: {said}" for one in found for said in one.read.tracebacks]
    yield total(
        "tracebacks, errors without a place", len(broken), "errors", goal="0", holds=not broken, examples=broken[:3]
    )
    gone = [one for one in found if not one.detected and one.damage == "remove" and one.kind in HARMLESS_GONE]
    missed = [one for one in found if not one.detected and one not in gone]
    harmless = HARMLESS | ({"pack": HEALED} if (of.folder / COLD).is_dir() else {})
    silent = [one for one in [*missed, *gone] if one.read.errors or one.read.wrong]
    silent += [one for one in missed if one.kind not in harmless]
    yield total(
        "damage that harms and fsck does not name", len(silent), "trials", goal="0", holds=not silent,
        examples=[one.what for one in silent[:3]],
    )  # fmt: skip
    yield total(
        "harmless and not named",
        len(missed) + len(gone) - len(silent),
        "trials",
        why=_reasons(missed, harmless) | _reasons(gone, HARMLESS_GONE),
    )
    unwritable = [one for one in found if one.read.writable]
    yield total(
        "still writable", count - len(unwritable), "trials", barred_by=dict(Counter(one.kind for one in unwritable))
    )


def _reasons(missed: list[Outcome], harmless: dict[str, str]) -> dict[str, str]:
    counted = Counter(one.kind for one in missed)
    return {kind: f"{counted[kind]}: {harmless[kind]}" for kind in sorted(counted) if kind in harmless}
