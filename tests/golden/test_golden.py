"""The format on disk: docs/FORMAT.md says it all, and repositories of every version stay readable."""

import json
import random
import shutil
from pathlib import Path

import pytest
from fakes import FakeEncoder, FakeReader
from golden import build
from independent_reader import Damaged, Repository, derived_levels

import him

GOLDEN = Path(__file__).parent / "v1"
KINDS = {"tile": 1, "page": 2, "directory": 3, "companion": 4, "index": 5, "footer": 6}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What today's software writes."""
    folder = tmp_path_factory.mktemp("made") / "repository"
    build.build(folder)
    return folder


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy: opening writes caches."""
    return Path(shutil.copytree(GOLDEN / build.REPOSITORY, tmp_path / "repository"))


def opened(folder: Path) -> him.Repository:
    return him.open(folder, reader=FakeReader(), encoder=FakeEncoder())


def expected() -> dict:
    return json.loads((GOLDEN / build.EXPECTED).read_bytes())


def described(folder: Path) -> dict:
    with opened(folder) as repo:
        return json.loads(json.dumps(build.described(repo)))


def read_independently(folder: Path) -> tuple[dict, Repository]:
    """What `build.described` says, by docs/FORMAT.md alone."""
    reader, snapshots = Repository(folder), {}
    for key, one in reader.snapshots.items():
        frames = [
            frame_of(reader, frame, one["sealed"]) for _, frame in sorted(reader.frames(one["directory"]).items())
        ]
        if one["sealed"]:
            assert reader.levels_root(one["directory"]) == one["levels_root"]
        snapshots[key] = {
            "directory": one["directory"].hex(), "levels_root": one["levels_root"].hex(), "sealed": one["sealed"],
            "lamport": one["lamport"], "tags": one["tags"], "parents": [parent[0] for parent in one["parents"]],
            "created_at": one["created_at"], "writer": one["writer"], "provenance": one["provenance"], "frames": frames,
        }  # fmt: skip
    return {"refs": {name: list(ref) for name, ref in sorted(reader.refs.items())}, "snapshots": snapshots}, reader


def frame_of(reader: Repository, frame: list, sealed: bool) -> dict:
    """One frame with all its tiles; of an open snapshot the levels are derived."""
    stream, name, tile_height, tile_width = frame[0], frame[1], frame[7], frame[8]
    tiles = []
    cells = reader.cells(frame)
    for (y, x), (blob, origin) in sorted(cells.items()):
        value = reader.tile(blob)
        tiles.append([0, y, x, value, reader.tile_id(stream, name, origin, 0, x, y, blob)])
    rows, columns = -(-frame[3] // tile_height), -(-frame[4] // tile_width)
    top = (max(rows, columns) - 1).bit_length()
    if frame[10] != "none":
        named, seen = reader.levels(frame) if sealed else None, set()
        for (level, y, x), value, blob in derived_levels(frame, reader.whole(frame)):
            under = [o for (r, c), (_, o) in cells.items() if (r >> level, c >> level) == (y, x)]
            if not under:
                continue
            if named is not None:
                seen.add((level, y, x))
                assert named[level, y, x][:2] == (blob, max(under))
                if named[level, y, x][2]:
                    assert reader.tile(blob).tobytes() == value.tobytes()
            if level <= top:
                tile_id = reader.tile_id(stream, name, max(under), level, x, y, blob)
                tiles.append([level, y, x, value, tile_id])
        assert named is None or seen == set(named)
    shown = [
        [level, y, x, [len(value)] if isinstance(value, bytes) else list(value.shape),
         "bytes" if isinstance(value, bytes) else value.dtype.name, build.digest(value), tile_id]
        for level, y, x, value, tile_id in tiles
    ]  # fmt: skip
    fields = ("stream", "name", "content", "height", "width", "channels", "dtype", "tile_height", "tile_width", "halo",
              "level_rule", "root", "root_height", "attributes")  # fmt: skip
    return dict(zip(fields, frame, strict=True)) | {"root": frame[11].hex(), "tiles": shown}


def same(left: dict, right: dict) -> None:
    """The same, tiles in whatever order; a difference is named by its place."""
    assert left["refs"] == right["refs"]
    assert list(left["snapshots"]) == list(right["snapshots"])
    for key, one in left["snapshots"].items():
        other = right["snapshots"][key]
        for field in one.keys() | other.keys() - {"frames"}:
            if field != "frames":
                assert one[field] == other[field], (key, field)
        for ours, theirs in zip(one["frames"], other["frames"], strict=True):
            assert sorted(ours["tiles"]) == sorted(theirs["tiles"]), (key, ours["stream"], ours["name"])
            assert {**ours, "tiles": 0} == {**theirs, "tiles": 0}


def test_the_document_alone_reads_what_the_software_wrote(made: Path) -> None:
    software, (document, reader) = described(made), read_independently(made)
    same(document, software)
    tiles = sum(len(frame["tiles"]) for one in document["snapshots"].values() for frame in one["frames"])
    print(f"{len(reader.records)} records and {tiles} tiles read alike")
    wanted = {("tile", codec) for codec in range(7)} | {(kind, 0) for kind in KINDS}
    kinds = {
        (kind, record.codec) for record in reader.records for kind, number in KINDS.items() if number == record.kind
    }
    assert kinds >= wanted
    assert {record.depth for record in reader.records} == {0, 1, 2, 3, 4}
    assert reader.checkpoints == 2


def test_the_golden_repository_reads_as_it_did_when_it_was_made(golden: Path) -> None:
    same(described(golden), expected())
    same(read_independently(golden)[0], expected())
    with opened(golden) as repo:
        assert repo.fsck().errors == ()
        assert repo.fsck(rebuild=True).errors == ()
    same(described(golden), expected())


def test_todays_writer_gives_the_same_identities(made: Path) -> None:
    """What was seen on pictures follows the rules of seeing, which may change: those frames are left out."""

    def identities(told: dict) -> dict:
        out = {}
        for key, one in told["snapshots"].items():
            seen = any(frame["stream"] == "scene" for frame in one["frames"])
            frames = [frame for frame in one["frames"] if frame["stream"] not in ("scene", "emb")]
            out[key] = (None if seen else one["directory"], None if seen else one["levels_root"], frames)
        return out

    assert identities(described(made)) == identities(expected())


def test_building_twice_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    build.build(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(made)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and "cache" not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_flipped_byte_is_never_read_as_another_value(golden: Path) -> None:
    """Every byte of the log and of the packs is covered; what the document calls cache is not read."""
    rng, files = random.Random(7), [*sorted(golden.glob("packs/*.pack")), golden / "log/000001.log", golden / "log/end"]
    sizes = [file.stat().st_size for file in files]
    for file in rng.choices(files, sizes, k=40):
        whole = bytearray(file.read_bytes())
        at, was = rng.randrange(len(whole)), bytes(whole)
        whole[at] ^= 1 << rng.randrange(8)
        file.write_bytes(whole)
        with pytest.raises((Damaged, ValueError, KeyError, OverflowError)):
            Repository(golden)
            pytest.fail(f"{file.name} byte {at}")
        file.write_bytes(was)
