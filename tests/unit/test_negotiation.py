"""Software that is older than what it reads says so, clearly and everywhere; rot is never taken for that."""

import io
import json
import sqlite3
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fakes import FakeEncoder, FakeReader, picture

import him
from him.catalog import marker
from him.catalog.marker import parsed
from him.cli.main import run
from him.cli.session import Session
from him.config import PLAIN_FORMAT, REPOSITORY_FORMAT
from him.errors import IntegrityError, VersionError
from him.pyramid import directory, page
from him.sealed import holds, sealed
from him.tier.settings import TierSettings
from him.types import StreamSpec

BUDGET = 16 * 1024 * 1024


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with opened(tmp_path / "memory", create=True) as repo:
        repo.writable("main").put("skills", b"a document", frame="one")
        repo.writable("main").put_image(picture(60, 260, {(10, 10): "Submit"}), "login")
    return tmp_path / "memory"


def opened(path: Path, *, create: bool = False) -> him.Repository:
    return him.open(path, create=create, reader=FakeReader(), encoder=FakeEncoder())


def raise_format(folder: Path) -> None:
    """What newer software does before it writes what this one does not know."""
    told = parsed((folder / "him.json").read_bytes(), "")
    (folder / "him.json").write_bytes(msgspec.structs.replace(told, format=REPOSITORY_FORMAT + 1).encoded())


def says_newer(error: VersionError) -> bool:
    return (
        f"format {REPOSITORY_FORMAT + 1}" in error.message
        and str(REPOSITORY_FORMAT) in error.message
        and bool(error.fix)
    )


def test_every_entry_point_says_that_the_format_is_newer(place: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "sound", create=True) as repo:
        repo.writable("main").put("skills", b"x", frame="f")
        repo.writable("main").seal()
    raise_format(place)
    with opened(tmp_path / "sound") as sound:
        for enter in (
            lambda: opened(place),
            lambda: him.check(place),
            lambda: him.check(place, rebuild=True),
            lambda: him.clone(place, tmp_path / "copy"),
            lambda: sound.push(place),
            lambda: sound.pull(place),
        ):
            with pytest.raises(VersionError) as caught:
                enter()
            assert says_newer(caught.value)
    assert not (tmp_path / "copy").exists()


def test_the_command_line_says_so_with_its_own_exit_code(place: Path) -> None:
    raise_format(place)
    for words in (["snap", "list"], ["fsck"], ["fsck", "--rebuild"], ["stats"], ["log"]):
        out, err = io.StringIO(), io.StringIO()
        session = Session(out, err, str(place.parent), {}, started_ns=0)
        assert run([*words, "--repo", str(place), "--json"], session) == 8
        told = json.loads(out.getvalue().splitlines()[-1])
        assert told["error"] == "version" and told["fix"] == "install a newer `him`"


def test_a_cold_tier_of_newer_software_is_left_alone(place: Path, tmp_path: Path) -> None:
    cold = tmp_path / "cold"
    with opened(place) as repo:
        repo.set_tier(str(cold), BUDGET)
    with opened(place) as repo:
        repo.writable("main").put("skills", b"more", frame="two")
        repo.tier.push(all=True)
    raise_format(cold)
    before = sorted(file.read_bytes() for file in cold.rglob("*") if file.is_file())
    with opened(place) as repo, pytest.raises(VersionError) as caught:
        repo.set_tier(str(cold), BUDGET)
    assert says_newer(caught.value)
    with pytest.raises(VersionError):
        him.restore(str(cold), tmp_path / "again")
    assert before == sorted(file.read_bytes() for file in cold.rglob("*") if file.is_file())
    assert not (tmp_path / "again").exists()


def test_a_process_that_is_open_when_newer_software_writes(place: Path) -> None:
    """What it holds stays readable; what is new it neither reads nor writes on."""
    with opened(place) as repo, opened(place) as newer:
        handle = repo.snapshot("main")
        body = msgspec.msgpack.encode([1, "newer", [["entangle", "what", "with"]]])
        newer._log.commit(lambda: body)
        size = (place / "log/000001.log").stat().st_size
        assert handle.get("skills", frame="one") == b"a document"
        for use in (
            lambda: repo.snapshot("main"), lambda: repo.branch("new"), lambda: repo.writable("main"), lambda: repo.gc(),
            lambda: handle.put("skills", b"late", frame="late"), lambda: repo.fsck(), lambda: list(repo.log()),
        ):  # fmt: skip
            with pytest.raises(VersionError, match="entangle") as caught:
                use()
            assert caught.value.object.startswith("record ")
        assert (place / "log/000001.log").stat().st_size == size


def test_a_marker_that_is_no_digest_s_own_is_damaged(place: Path) -> None:
    """Every flipped bit of him.json is damage: none makes a newer format or another repository of it."""
    whole = (place / "him.json").read_bytes()
    assert holds(whole)
    for at in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            with pytest.raises(IntegrityError):
                parsed(bytes(data), "")


def test_software_of_format_2_reads_what_is_written_now(place: Path) -> None:
    """It knew three members, and passed over others."""

    class Older(msgspec.Struct):
        format: int
        repository_id: str
        created_at_ns: int

    told = msgspec.json.decode((place / "him.json").read_bytes(), type=Older)
    assert told.format == PLAIN_FORMAT and len(told.repository_id) == 32
    (place / "him.json").write_bytes(msgspec.json.encode(told) + b"\n")
    with opened(place) as repo:
        assert repo.fsck().ok
        # Written again with a digest as soon as it is written at all.
        repo.set_retention("logs", 60)
    assert holds((place / "him.json").read_bytes())


def test_members_of_the_future_are_covered_and_passed_over(place: Path) -> None:
    class Later(msgspec.Struct):
        format: int
        repository_id: str
        created_at_ns: int
        region: str

    told = parsed((place / "him.json").read_bytes(), "")
    later = Later(told.format, told.repository_id, told.created_at_ns, "north")
    assert parsed(sealed(later), "") == told
    with pytest.raises(IntegrityError):
        parsed(sealed(later).replace(b"north", b"south"), "")


def test_caches_of_other_software_are_made_anew(place: Path) -> None:
    for name in ("projection", "memo"):
        with sqlite3.connect(place / f"cache/{name}.sqlite") as connection:
            connection.execute("PRAGMA user_version = 99")
            connection.execute("CREATE TABLE novel (x)")
        connection.close()
    segment = place / "cache/addresses/0000000000000001.seg"
    segment.parent.mkdir(exist_ok=True)
    segment.write_bytes(b"HIMADDR\x09" + bytes(500))
    with opened(place) as repo:
        assert repo.snapshot("main").get("skills", frame="one") == b"a document"
        assert repo.fsck().ok
    assert not segment.exists()


def test_pages_and_directories_of_newer_formats() -> None:
    for parse, data, kind in (
        (page.decode, b"HPG\x02" + bytes(60), VersionError), (page.decode, b"XPG\x01" + bytes(60), IntegrityError),
        (directory._parse, b"HDL\x03" + bytes(9), VersionError), (directory._parse, b"HDX\x01", VersionError),
        (directory._parse, b"XDL\x01" + bytes(9), IntegrityError),
    ):  # fmt: skip
        with pytest.raises(kind):
            parse(data)


def test_a_scene_of_newer_software(place: Path) -> None:
    with opened(place) as repo:
        scene = json.loads(repo.snapshot("main").get("scene", frame="login"))
        repo.writable("main").put("scene", json.dumps({**scene, "version": 7, "aura": []}).encode(), frame="login")
        with pytest.raises(VersionError, match="version 7"):
            repo.query("find button 'Submit'", "main")


def test_a_tile_of_a_dtype_that_is_not_known(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(place) as repo:
        repo.declare_stream(StreamSpec("half", tile_height=8, tile_width=8))
        repo.writable("main").put("half", np.ones((8, 8), np.float16), frame="f")
    known = {name: dtype for name, dtype in him.tile.codec.DTYPES.items() if name != "float16"}
    monkeypatch.setattr("him.tile.codec.DTYPES", known)
    with opened(place) as repo:
        with pytest.raises(VersionError, match="float16"):
            repo.snapshot("main").get("half", frame="f")
        assert {fault.kind for fault in repo.fsck().errors} == {"version"}


def test_settings_without_a_digest_are_those_of_older_software(place: Path, tmp_path: Path) -> None:
    older = {"cold": str(tmp_path / "cold"), "budget_bytes": BUDGET}
    (place / "tier.json").write_text(json.dumps(older))
    with opened(place) as repo:
        assert repo.tier.status().budget_bytes == BUDGET
    (place / "tier.json").write_text(json.dumps({**older, "generatiom": None}))
    with pytest.raises(IntegrityError, match="generatiom"):
        opened(place)
    whole = TierSettings(str(tmp_path / "cold"), BUDGET, None).encoded()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 2
        (place / "tier.json").write_bytes(data)
        with pytest.raises(IntegrityError):
            opened(place)


def test_the_lowest_format_follows_from_the_operations() -> None:
    from him.types import Batch, PackCondemned, SnapshotId

    assert marker.needed_format([]) == 1
    assert marker.needed_format([Batch(SnapshotId("snp_"), b"", b"")]) == 1
    assert marker.needed_format([PackCondemned("packs/x.pack")]) == 2
