"""Writes a small repository that holds something of everything the format knows; the same bytes every time.

`python tests/golden/build.py FOLDER` makes the repository FOLDER/repository and FOLDER/expected.json beside it.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
from blake3 import blake3

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import FakeEncoder, FakeReader, picture
from independent_reader import dtype_of

import him
from him.adapters.local import LocalDisk, LocalFile
from him.catalog.changes import FrameChange
from him.errors import ExpiredError
from him.pyramid import levels
from him.types import BlobId, Frame, StreamSpec, TileKey, TileMeta, tile_id_text

REPOSITORY, EXPECTED = "repository", "expected.json"
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32"),
    *("float64", "complex64", "complex128", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
)
RULES = {
    "mean": ("uint8", (21, 11, 3)), "max": ("float16", (20, 9)), "min": ("bfloat16", (9, 20)),
    "first": ("complex64", (11, 11)), "nearest": ("float8_e4m3fn", (17, 8, 2)), "min-max": ("float32", (12, 13, 2)),
}  # fmt: skip


class GoldenClock:
    """Stands still: only the script moves it. How often the software looks at it changes nothing."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000_000_000

    def now_ns(self) -> int:
        return self.now

    def monotonic_ns(self) -> int:
        return self.now


class GoldenRng:
    """A row of tokens for each size, so that one more pack does not change the ids of snapshots."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count: Counter[int] = Counter()

    def token(self, size: int) -> bytes:
        self._count[size] += 1
        return hashlib.shake_128(f"{self._seed}:{size}:{self._count[size]}".encode()).digest(size)


def noise(seed: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Any bits at all (but whole `bool`s)."""
    kind = dtype_of(dtype)
    data = hashlib.shake_128(seed.encode()).digest(kind.itemsize * int(np.prod(shape)))
    values = np.frombuffer(data, "u1" if dtype == "bool" else kind).reshape(shape)
    return (values & 1).astype(bool) if dtype == "bool" else values


def numbers(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [-1, 1)."""
    return (noise(seed, "int16", shape) / np.float32(32768)).astype("f4")


def marks(seed: str, height: int, width: int) -> np.ndarray:
    """A grey picture of text-like marks, as screens have them."""
    out = np.full((height, width), 245, "u1")
    for y, x, h, w, v in noise(seed, "uint8", (height * width // 80, 5)).astype(int):
        y, x = y * height // 256, x * width // 256
        out[y : y + 1 + h % 4, x : x + 1 + w % 9] = v
    return out


def prose(seed: str, words: int) -> bytes:
    """Text that compresses about as prose does."""
    stems = [noise(f"stem {n}", "uint8", (7,)).tobytes().hex()[: 3 + n % 8] for n in range(400)]
    return " ".join(stems[n % 400] for n in noise(seed, "uint16", (words,)).tolist()).encode()


@contextmanager
def fixed_world() -> Iterator[None]:
    """Small packs, frequent checkpoints, and no name, number or version of the machine in the log."""
    with ExitStack() as stack:
        for owner, name, value in (
            (platform, "node", lambda: "golden"), (platform, "platform", lambda: "Golden-1"),
            (platform, "python_version", lambda: "3"), (os, "getpid", lambda: 1), (him, "__version__", "0"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch("him.tier.warm.PACK_TARGET_BYTES", 48 * 1024))
        stack.enter_context(mock.patch("him.catalog.history.CHECKPOINT_RECORDS", 40))
        yield


class NoSyncFile(LocalFile):
    def sync(self) -> None:
        """Nothing: what is built here is built again."""


class NoSyncDisk(LocalDisk):
    def open(self, path: str, *, create: bool = False) -> LocalFile:
        return NoSyncFile(super().open(path, create=create).detach(), path)


class Build:
    """The calls, in order. Each step is what one user might do."""

    def __init__(self, folder: Path) -> None:
        self.clock = GoldenClock()
        self._folder = folder
        self.repo = self._open(1, create=True)
        self.other = self._open(2)

    def _open(self, seed: int, *, create: bool = False) -> him.Repository:
        return him.open(
            self._folder, create=create, clock=self.clock, rng=GoldenRng(seed), reader=FakeReader(),
            encoder=FakeEncoder(), disk=NoSyncDisk(self._folder),
        )  # fmt: skip

    def run(self, *, collected: bool = False) -> None:
        steps = (self.streams, self.dtypes, self.levels, self.quantised, self.deltas, self.documents, self.branches,
                 self.pictures, self.directory, self.names, *((self.garbage,) if collected else ()))  # fmt: skip
        for step in steps:
            self.clock.now += 1_000_000_000
            step()
        self.repo.close()
        self.other.close()

    def streams(self) -> None:
        for rule in RULES:
            self.repo.declare_stream(StreamSpec(f"levels-{rule}", tile_height=8, tile_width=8, level_rule=rule))
        for way in ("int8", "fp8", "fp16"):
            self.repo.declare_stream(StreamSpec(f"quantised-{way}", tile_height=64, tile_width=64, quantise=way))
        self.repo.declare_stream(StreamSpec("deep", tile_height=4, tile_width=4, dtype="uint8", level_rule="mean"))
        self.repo.declare_stream(StreamSpec("plane"))

    def dtypes(self) -> None:
        for number, name in enumerate(DTYPES):
            self.repo.writable(f"dtypes {number % 3}").put_array("plane", noise(name, name, (5, 7)), frame=name)
        work = self.repo.writable("dtypes 0")
        work.put_array("plane", noise("one axis", "int16", (33,)), frame="one axis")
        work.put_array("plane", noise("channels", "float64", (4, 3, 2)), frame="channels")
        work.put_array("plane", np.arange(4000, dtype="i8").reshape(40, 100), frame="shuffled")
        work.put_array("kv_cache", numbers("kv", (2, 2, 2, 24, 8)).astype("f2"), frame="chat-7")
        work.set_tag("task_id", "T-1")
        work.set_tag("owner", "nobody")
        work.set_tag("owner", None)

    def levels(self) -> None:
        work = self.repo.writable("levels")
        for rule, (dtype, shape) in RULES.items():
            work.put_array(f"levels-{rule}", noise(rule, dtype, shape), frame="ü/a b")
        for at in ((0, 0), (9, 9), (3, 70)):
            work.put("deep", noise(f"deep {at}", "uint8", (4, 4)), frame="sparse", y=at[0], x=at[1])
        work.put("deep", noise("small", "uint8", (3, 2)), frame="sparse", y=10, x=0)
        work.put_many("deep", {(9, 9): None, (8, 8): noise("late", "uint8", (4, 4))}, frame="sparse")
        work.seal()
        self.repo.writable("levels").put("deep", noise("child", "uint8", (4, 4)), frame="sparse", y=9, x=9)
        self.repo.writable("levels").seal()

    def quantised(self) -> None:
        work = self.other.writable("quantised")
        for way, kind in (("int8", "float32"), ("fp8", "bfloat16"), ("fp16", "float32"), ("int8", "float16")):
            values = numbers(f"{way} {kind}", (66, 5, 3)).astype(dtype_of(kind))
            work.put_array(f"quantised-{way}", values, frame=f"of {kind}")
        work.put_array("quantised-int8", numbers("flat", (10, 6)), frame="two axes")
        work.put_array("quantised-fp8", numbers("row", (50,)), frame="one axis")
        work.put_array("quantised-int8", numbers("few", (10, 6, 4)), frame="few rows")
        work.seal()

    def deltas(self) -> None:
        work = self.repo.writable("deltas")
        # Stored raw, and large enough to be aligned.
        tile = noise("base", "uint8", (256, 256))
        for step in range(5):
            work.put("plane", tile, frame="chain")
            tile = tile.copy()
            tile[16 * step : 16 * step + 16, 16:240] = noise(f"step {step}", "uint8", (16, 224))
        bits = noise("bits", "int32", (20, 20))
        work.put("plane", bits, frame="everywhere")
        work.put("plane", bits ^ (noise("flips", "uint8", (20, 20)) < 20), frame="everywhere")
        page = marks("page", 240, 180)
        work.put("plane", page[:180], frame="scrolled")
        work.put("plane", page[37 : 37 + 180], frame="scrolled")
        change = work.make_delta("plane", page[40 : 40 + 180], frame="scrolled")
        assert change is not None
        work.put_delta("plane", change, frame="scrolled")
        grown = marks("grown", 120, 90)
        work.put("plane", grown[:100], frame="grown")
        work.put("plane", grown, frame="grown")

    def documents(self) -> None:
        work = self.other.writable("documents")
        text = prose("long", 8_900)
        work.put("skills", text, frame="long")
        work.put("skills", text[:30_000] + b" put in here " + text[30_000:], frame="long")
        work.put("skills", b"", frame="empty")
        short = prose("short", 400)
        work.put("skills", short, frame="short")
        work.put("skills", short.replace(short[300:320], b"other words"), frame="short")
        for number in range(5):
            work.append("logs", [{"n": number, "line": line} for line in range(number + 1)], writer="w")
        self.other.writable("documents").append("audit", [{"event": "made"}])
        work.seal()
        self.repo.writable("documents").append("logs", [{"after": "the seal"}], writer="w")

    def branches(self) -> None:
        self.repo.branch("side", source="deltas").put("plane", noise("side", "uint8", (9, 9)), frame="side")
        self.other.writable("deltas").put("plane", noise("main", "uint8", (9, 9)), frame="main")
        work = self.other.writable("deltas")
        work.put_many("plane", {(0, 0): None}, frame="grown")
        self.repo.snapshot("deltas").seal()
        self.repo.create_snapshot(parent="side", branch="third", tags={"kind": "third"}, provenance={"from": "side"})

    def pictures(self) -> None:
        work = self.other.writable("pictures")
        work.put_image(picture(300, 400, {(10, 10): "Submit", (60, 200): "Cancel"}), "login")
        work.put_image(picture(300, 400, {(10, 10): "Submit", (60, 200): "Email"}), "login")
        work.put_image(picture(540, 600, {(500, 490): "Search"}, noise=3), "search")
        work.put_image(picture(80, 80, {}), "blank")
        work.seal()

    def directory(self) -> None:
        """Sixty-four frames are one leaf, sixty-five are not."""
        meta = self.repo.writable("directory").put("skills", b"one of many", frame="skill 0")
        self.many("directory", meta, range(1, 64))
        self.repo.branch("larger directory", source="directory")
        self.many("larger directory", meta, range(64, 65))

    def many(self, branch: str, meta: TileMeta, numbers: range) -> None:
        """One commit: a hundred of one frame each would be most of the repository."""
        work = self.repo.writable(branch)
        frame, parts = work.frames("skills")[0], work.parts
        cells = {(0, 0): BlobId(bytes.fromhex(meta.checksum))}
        changes = [FrameChange(msgspec.structs.replace(frame, name=f"skill {number}"), cells) for number in numbers]
        parts.history.commit(work.id, changes, begun=parts.history.begin())

    def names(self) -> None:
        self.repo.tag("v1", "documents")
        self.repo.tag("gone", "levels")
        self.repo.delete_ref("gone")
        empty = self.repo.branch("empty")
        self.repo.branch("sealed and empty").seal()
        dropped = self.repo.branch("dropped", source="dtypes 0")
        self.repo.delete_ref("dropped")
        self.repo.delete_snapshot(dropped.id)
        assert empty.info.directory == b""

    def garbage(self) -> None:
        """What format 2 has beside: rules, what they let go, packs that are condemned and packs that are gone."""
        self.repo.declare_stream(StreamSpec("brief", tile_height=8, tile_width=8, retention_days=1))
        self.repo.set_retention("plane", 3600, task="T-2")
        self.repo.set_retention("kv_cache", 7 * 24 * 3600)
        self.repo.set_retention("kv_cache", -1)
        old = self.repo.create_snapshot(branch="old", tags={"task_id": "T-2"})
        for step in range(4):
            old.put("brief", noise(f"brief {step}", "uint8", (8, 8)), frame="f", x=step)
        old.put("plane", noise("of a task", "uint8", (9, 9)), frame="of a task")
        case = self.repo.create_snapshot(branch="case")
        case.put("brief", noise("held", "uint8", (8, 8)), frame="f")
        self.repo.hold("case", "case 17")
        self.clock.now += 2 * 24 * 3600 * 10**9
        self.repo.branch("new").put("brief", noise("new", "uint8", (8, 8)), frame="f")
        # As soon as the last handle is gone nobody reads under an older lease.
        del old, case
        reader = self.other.snapshot("new")
        self.repo.gc(dead_share=0.02)
        del reader
        self.repo.gc(dead_share=0.02)
        reader = self.other.snapshot("new")
        self.repo.writable("new").put("brief", noise("newer", "uint8", (8, 8)), frame="f")
        self.repo.gc(dead_share=0.02)
        del reader


def build(folder: Path, *, collected: bool = False) -> None:
    """Make the repository; `collected`, with what format 2 has beside."""
    with fixed_world():
        Build(folder).run(collected=collected)
    shutil.rmtree(folder / "cache", ignore_errors=True)


def digest(value: np.ndarray | bytes) -> str:
    return blake3(value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()).hexdigest()


def places(handle: him.SnapshotHandle, frame: Frame) -> Iterator[tuple[int, int, int]]:
    """(level, row, column) of all present tiles of a frame."""
    cells = {(meta.y, meta.x) for meta in handle.tiles(frame.stream, frame=frame.name)}
    for level in range(levels.apex_level(frame) + 1):
        for y, x in sorted({(y >> level, x >> level) for y, x in cells}):
            yield level, y, x


def described(repo: him.Repository) -> dict:
    """What the software reads of a repository: refs, and every snapshot with all values of all its frames' levels."""
    out = {}
    for one in repo.snapshots():
        handle, frames = repo.snapshot(one.snapshot_id), []
        for frame in handle.frames():
            tiles = []
            for level, y, x in places(handle, frame):
                at = {"frame": frame.name, "level": level, "y": y, "x": x}
                name = tile_id_text(handle.reader.tile_id(TileKey(frame.stream, frame.name, level, y, x)))
                try:
                    value = handle.get(frame.stream, **at)
                except ExpiredError:
                    tiles.append([level, y, x, [], "expired", "", name])
                    continue
                shape = [len(value)] if isinstance(value, bytes) else list(value.shape)
                kind = "bytes" if isinstance(value, bytes) else value.dtype.name
                tiles.append([level, y, x, shape, kind, digest(value), name])
            fields = [key for key in frame.__struct_fields__ if key != "encrypted" or frame.encrypted]
            record = {key: getattr(frame, key) for key in fields} | {"root": frame.root.hex()}
            frames.append(record | {"attributes": [list(pair) for pair in frame.attributes], "tiles": tiles})
        out[one.snapshot_id] = {
            "directory": one.directory.hex(), "levels_root": one.levels_root.hex(), "sealed": one.sealed,
            "lamport": one.lamport, "tags": one.tags, "parents": [parent.snapshot_id for parent in one.parents],
            "created_at": one.created_at, "writer": one.writer, "provenance": one.provenance, "frames": frames,
        }  # fmt: skip
    return {"refs": {name: list(ref) for name, ref in sorted(repo.refs().items())}, "snapshots": out}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    build(target / REPOSITORY, collected=True)
    with him.open(target / REPOSITORY, reader=FakeReader(), encoder=FakeEncoder()) as opened:
        (target / EXPECTED).write_text(json.dumps(described(opened)) + "\n")
    shutil.rmtree(target / REPOSITORY / "cache", ignore_errors=True)
