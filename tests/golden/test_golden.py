"""The format on disk: docs/FORMAT.md says it all, and repositories of every version stay readable."""

import json
import random
import shutil
from pathlib import Path

import pytest
from fakes import FakeEncoder, FakeReader
from golden import build
from golden.compare import read_independently, same
from independent_reader import Damaged, Repository

import him

GOLDEN = Path(__file__).parent / "v1"
VERSIONS = ("v1", "v2")
KINDS = {"tile": 1, "page": 2, "directory": 3, "companion": 4, "index": 5, "footer": 6}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What today's software writes."""
    folder = tmp_path_factory.mktemp("made") / "repository"
    build.build(folder)
    return folder


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """Each golden repository in turn."""
    return str(request.param)


@pytest.fixture
def golden(tmp_path: Path, version: str) -> Path:
    """A copy: opening writes caches."""
    return Path(shutil.copytree(GOLDEN.parent / version / build.REPOSITORY, tmp_path / "repository"))


def opened(folder: Path) -> him.Repository:
    return him.open(folder, reader=FakeReader(), encoder=FakeEncoder())


def expected(version: str = "v1") -> dict:
    return json.loads((GOLDEN.parent / version / build.EXPECTED).read_bytes())


def described(folder: Path) -> dict:
    with opened(folder) as repo:
        return json.loads(json.dumps(build.described(repo)))


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


def test_the_golden_repository_reads_as_it_did_when_it_was_made(golden: Path, version: str) -> None:
    same(described(golden), expected(version))
    same(read_independently(golden)[0], expected(version))
    with opened(golden) as repo:
        assert repo.fsck().errors == ()
        assert repo.fsck(rebuild=True).errors == ()
    same(described(golden), expected(version))


def test_the_golden_repository_can_be_written_on(golden: Path, version: str) -> None:
    """In packs that were begun then, on tiles that become bases of deltas, in a directory that splits."""
    with opened(golden) as repo:
        for branch in ("deltas", "levels", "directory", "documents"):
            work = repo.writable(branch)
            work.put("plane", build.marks("new", 256, 256), frame="scrolled")
            work.put("skills", b"new", frame="one more")
            work.seal()
        assert repo.fsck().errors == ()
    told, was = described(golden), expected(version)
    same(read_independently(golden)[0], told)
    sealed = {key: one for key, one in was["snapshots"].items() if one["sealed"]}
    assert {key: told["snapshots"][key] for key in sealed} == sealed


def test_a_repository_of_format_1_is_collected_and_then_says_2(tmp_path: Path) -> None:
    """Nothing that can be read changes; what was deleted or replaced goes."""
    folder = Path(shutil.copytree(GOLDEN / build.REPOSITORY, tmp_path / "repository"))
    assert json.loads((folder / "him.json").read_bytes())["format"] == 1
    # At the time it was made: its logs are to be kept for thirty days.
    with him.open(folder, clock=build.GoldenClock()) as repo:
        assert repo.gc(dead_share=0.01).removed_packs > 0
        after = repo.gc(dead_share=0.01)
        assert after.dead_bytes < after.live_bytes / 100
        assert repo.fsck().errors == ()
    assert json.loads((folder / "him.json").read_bytes())["format"] == 2
    same(described(folder), expected())
    same(read_independently(folder)[0], expected())


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
