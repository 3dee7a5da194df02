"""The command line: spellings, JSON shapes, one line for every mistake, completion, and the warm daemon."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import ml_dtypes
import msgspec
import numpy as np
import pytest
import typer.main
from numpy.typing import NDArray
from typer.core import TyperGroup

import him
import him.app
from him.catalog.marker import parsed
from him.cli import place
from him.cli.commands import EXAMPLES
from him.cli.entry import FORWARDED, process_start_ns
from him.cli.main import program, run
from him.cli.session import Session, plain
from him.config import EMBEDDING_DIMS
from him.errors import KINDS
from him.server import wire

HIM = [sys.executable, "-m", "him.cli.entry"]
MAIN = ("--snapshot", "main", "--budget", "60000", "--json")
"""A budget no slow machine exceeds: these tests are about answers, not about time."""
JsonRow = dict[str, Any]


class BlindReader:
    """A TextReader that sees no text: the trees of these tests name the elements."""

    def pin(self) -> str:
        return "blind"

    def detect(self, picture: NDArray[np.uint8]) -> list[list[tuple[int, int]]]:
        return []

    def recognise(self, crops: Sequence[NDArray[np.uint8]]) -> list[tuple[str, float]]:
        return [("", 0.0) for _ in crops]


class LetterEncoder:
    """A TextEncoder that counts letters: equal words point the same way."""

    def pin(self) -> str:
        return "letters"

    def encode(self, texts: Sequence[str]) -> NDArray[np.int8]:
        out = np.zeros((len(texts), EMBEDDING_DIMS), dtype=np.float64)
        for row, text in enumerate(texts):
            for letter in text.lower():
                out[row, ord(letter) % EMBEDDING_DIMS] += 1
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        return np.round(out / np.maximum(norms, 1) * 127).astype(np.int8)


class Ran:
    """What one command line did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def rows(self) -> list[JsonRow]:
        return [json.loads(line) for line in self.out.splitlines()]

    def row(self) -> JsonRow:
        rows = self.rows()
        assert len(rows) == 1, self.out + self.err
        return rows[0]


Him = Callable[..., Ran]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Him:
    """Runs command lines in this process, in a folder of their own, on the real repository with light models."""
    real = him.app.open

    def light(path: str | os.PathLike[str], *, create: bool = False) -> him.app.Repository:
        return real(path, create=create, reader=BlindReader(), encoder=LetterEncoder())

    monkeypatch.setattr(him, "open", light, raising=False)

    def call(
        *words: str | Path, cwd: Path = tmp_path, environ: Mapping[str, str] | None = None, stdin: str = ""
    ) -> Ran:
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        session = Session(
            out=out, err=err, cwd=str(cwd), environ=environ or {}, started_ns=process_start_ns(),
            raw=out.buffer, stdin=io.StringIO(stdin),
        )  # fmt: skip
        code = run([str(word) for word in words], session)
        out.flush()
        return Ran(code, out.buffer.getvalue().decode("utf-8", "replace"), err.getvalue())  # type: ignore[attr-defined]

    return call


@pytest.fixture
def repo(cli: Him, tmp_path: Path) -> Path:
    """A repository with one screen on `main`."""
    folder = tmp_path / "memory"
    assert cli("init", folder).code == 0
    picture(tmp_path / "login.png")
    tree(tmp_path / "login.json")
    done = cli("ingest", "login.png", "--repo", folder, "--snapshot", "main", "--tree", "login.json")
    assert done.code == 0, done.err
    return folder


def picture(path: Path, shade: int = 230) -> None:
    pixels = np.full((600, 700, 3), shade, dtype=np.uint8)
    cv2.rectangle(pixels, (100, 100), (220, 140), (200, 90, 30), -1)
    cv2.rectangle(pixels, (100, 300), (400, 340), (90, 90, 90), 2)
    assert cv2.imwrite(str(path), pixels)


def tree(path: Path, word: str = "Submit") -> None:
    nodes = [
        {"id": "a", "role": "button", "name": word, "bbox": [100, 100, 120, 40], "state": {"enabled": True}},
        {"id": "b", "role": "textbox", "name": "Password", "bbox": [100, 300, 300, 40], "state": {}},
    ]
    path.write_text(json.dumps(nodes), "utf-8")


TIER = dict.fromkeys(
    ("budget_bytes", "used_bytes", "pinned_bytes", "cold_bytes", "cold_packs", "warm_bytes", "only_warm_packs",
     "fetched_bytes", "fetches", "freed_bytes", "passed_through"), int
) | {"fault": str}  # fmt: skip


def shape(value: object, schema: object, where: str = "$") -> None:
    """Check a JSON value: a dict names exactly its keys, a list its items' schema, a tuple the allowed types."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), f"{where}: {value!r}"
        assert list(value) == list(schema), f"{where}: {list(value)}"
        for key, inner in schema.items():
            shape(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), f"{where}: {value!r}"
        for index, item in enumerate(value):
            shape(item, schema[0], f"{where}[{index}]")
    elif isinstance(schema, str):
        assert isinstance(value, str) and re.fullmatch(schema, value), f"{where}: {value!r} is not {schema}"
    else:
        types = schema if isinstance(schema, tuple) else (schema,)
        assert type(value) in types, f"{where}: {value!r}"


NUMBER = (int, float)
SNAPSHOT_ID = r"snp_[0-9A-Z]{26}"
TILE_ID = r"tl_[0-9a-f]{64}"
TRACE_ID = r"tr_[0-9A-Z]{26}"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
INGEST = {
    "snapshot_id": SNAPSHOT_ID, "stream": str, "frame": str, "tiles_written": int, "tiles_reused": int,
    "bytes_stored": int, "elements": int, "ms": NUMBER,
}  # fmt: skip
PLANNED = {"tile_id": TILE_ID, "stream": str, "frame": str, "level": int, "x": int, "y": int}
ANSWER = {
    "status": "accepted|tentative|ambiguous|absent|deadline", "found": bool, "frame": (str, type(None)),
    "snapshot_id": SNAPSHOT_ID, "bbox": (list, type(None)), "confidence": NUMBER, "reason": str,
    "plan": {
        "directory": r"[0-9a-f]{64}", "tile_ids": [TILE_ID], "tiles": [PLANNED], "acceptance": NUMBER, "budget_ms": int,
    },
    "candidates": [{"bbox": [int], "frame": str, "text": str, "type": str, "confidence": NUMBER}],
    "stages_ms": dict, "skipped": [str], "elapsed_ms": NUMBER, "startup_ms": NUMBER, "trace_id": TRACE_ID,
}  # fmt: skip
PLAN = {
    "goal": str, "snapshot_id": SNAPSHOT_ID, "directory": r"[0-9a-f]{64}", "frame": (str, type(None)),
    "tile_ids": [TILE_ID], "tiles": [PLANNED], "coarse": list, "rois": list, "acceptance": NUMBER, "budget_ms": int,
}  # fmt: skip
REPLAY = {
    "identical": bool, "grade": "R1|R2", "steps": int, "recomputed": int, "from_trace": int,
    "first_divergence": (dict, type(None)),
}  # fmt: skip
FAULT = {"object": str, "place": str, "fault": str, "fix": str, "kind": str}
FSCK = {
    "ok": bool, "errors": [FAULT], "notes": [FAULT], "expired": int, "shredded": int, "tiles": int, "packs": int,
    "bytes": int,
}  # fmt: skip
SNAPSHOT = {
    "snapshot_id": SNAPSHOT_ID, "parents": [SNAPSHOT_ID], "created_at": TIME, "tags": dict, "provenance": dict,
    "merge_policy": str, "sealed": bool, "lamport": int, "writer": str, "directory": r"([0-9a-f]{64})?", "refs": [str],
}  # fmt: skip
TILE = {
    "tile_id": TILE_ID, "stream": str, "frame": str, "snapshot_id": SNAPSHOT_ID, "level": int, "x": int, "y": int,
    "shape": [int], "dtype": str, "parent_tile_id": (str, type(None)), "halo": int, "checksum": str, "size_bytes": int,
}  # fmt: skip
TRANSFER = {
    "snapshots": [SNAPSHOT_ID],
    "refs": [{"name": str, "kind": "branch|tag", "before": (str, type(None)), "after": SNAPSHOT_ID}],
    "left_open": [str], "records": int, "sent_bytes": int, "present_records": int, "present_bytes": int,
    "shared_subtrees": int,
}  # fmt: skip
ERROR = {"error": str, "message": str, "object": str, "place": str, "fix": str}


# -- help and completion


def leaves(group: TyperGroup, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in group.commands.items():
        full = f"{before} {name}".strip()
        if isinstance(inner, TyperGroup):
            yield from leaves(inner, full)
        else:
            yield full, inner


COMMANDS = dict(leaves(typer.main.get_command(program)))  # type: ignore[arg-type]


def test_the_commands_of_the_issue_are_there() -> None:
    wanted = (
        "init|snap create|snap seal|snap list|snap show|snap diff|snap delete|snap tag|log|branch|tiles put|"
        "tiles delta|tiles get|tiles ls|ingest|query|prefetch|replay|fsck|doctor|demo|daemon start|daemon stop|"
        "daemon status|daemon run|tier set|tier status|tier push|tier demote|tier admit|tier pin|tier unpin|"
        "kv save|kv load|kv prefix|kv list|gc|compact|stats|retention list|retention set|snap hold|"
        "push|pull|clone|restore|scrub|heal|parity set|parity off|parity update|parity status|sim|"
        "keys create|keys encrypt|keys status|keys passphrase|snap shred"
    )
    assert set(COMMANDS) == set(wanted.split("|")) == set(EXAMPLES)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_shows_examples(cli: Him, name: str) -> None:
    ran = cli(*name.split(), "--help")
    # --help goes to the process's own stdout, so the text is taken from the command itself.
    assert ran.code == 0
    assert "Examples:" in str(COMMANDS[name].help)
    assert all(example in str(COMMANDS[name].help) for example in EXAMPLES[name])
    assert all(example.startswith(f"him {name}") for example in EXAMPLES[name])


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"daemon run"}))
def test_every_command_speaks_json(name: str) -> None:
    assert any("--json" in parameter.opts for parameter in COMMANDS[name].params)


@pytest.mark.parametrize(
    ("words", "expected"), [("him sn", "snap"), ("him snap c", "create"), ("him query --sn", "--snapshot")]
)
def test_shell_completion(words: str, expected: str) -> None:
    environ = {**os.environ, "_HIM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    ran = subprocess.run(HIM_SCRIPT, env=environ, capture_output=True, text=True, check=True)
    assert expected in ran.stdout.split()


HIM_SCRIPT = [sys.executable, "-c", "import sys; sys.argv[0] = 'him'; from him.cli.entry import main; main()"]


# -- the main job and its JSON


def test_ingest_json(cli: Him, repo: Path, tmp_path: Path) -> None:
    picture(tmp_path / "other.png", 200)
    ran = cli("ingest", "other.png", "--repo", repo, "--snapshot", "main", "--json")
    shape(ran.row(), INGEST)
    assert ran.row()["frame"] == "other"
    assert (ran.code, ran.err) == (0, "")


def test_ingest_folder_gives_one_line_a_picture(cli: Him, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "many" / "deep").mkdir(parents=True)
    picture(tmp_path / "many" / "a.png", 100)
    picture(tmp_path / "many" / "deep" / "b.png", 110)
    rows = cli("ingest", "many", "--repo", repo, "--snapshot", "main", "--json").rows()
    assert [row["frame"] for row in rows] == ["a", "deep/b"]


def test_query_json(cli: Him, repo: Path) -> None:
    ran = cli(
        "query", "--goal", "find button 'Submit'", "--snapshot", "main", "--repo", repo, "--budget", "60000", "--json"
    )
    row = ran.row()
    shape(row, ANSWER)
    assert row["found"] is (row["status"] in ("accepted", "tentative"))
    assert row["bbox"] == [100, 100, 120, 40]
    assert row["plan"]["tile_ids"] == [tile["tile_id"] for tile in row["plan"]["tiles"]]
    assert row["startup_ms"] > 0


def test_query_that_finds_nothing_exits_with_0(cli: Him, repo: Path) -> None:
    ran = cli(
        "query", "--goal", "find button 'Zyx'", "--snapshot", "main", "--repo", repo, "--budget", "60000", "--json"
    )
    assert ran.code == 0
    assert ran.row()["found"] is False
    assert ran.row()["bbox"] is None


def test_goals_come_back_in_order_with_their_ids(cli: Him, repo: Path, tmp_path: Path) -> None:
    lines = [
        {"goal": "find button 'Submit'", "id": "first"},
        {"goal": "find the Password field", "id": 2, "frame": "login", "budget_ms": 60000, "class": "field"},
        {"goal": "find button 'Submit'", "frame": "nowhere", "id": None},
        {"goal": "find button 'Submit'"},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "goals.jsonl").write_text(text + "\n\n", "utf-8")
    for ran in (
        cli("query", "--goals", "goals.jsonl", "--snapshot", "main", "--repo", repo, "--json"),
        cli("query", "--goals", "-", "--snapshot", "main", "--repo", repo, "--json", stdin=text),
    ):
        rows = ran.rows()
        assert [row.get("id", "none") for row in rows] == ["first", 2, None, "none"]
        assert rows[1]["plan"]["budget_ms"] == 60000
        for row in (rows[0], rows[1], rows[3]):
            shape({key: value for key, value in row.items() if key != "id"}, ANSWER)
        assert len({row["startup_ms"] for row in rows if "startup_ms" in row}) == 1


def test_plan_feeds_prefetch(cli: Him, repo: Path, tmp_path: Path) -> None:
    ran = cli("query", "--goal", "find button 'Submit'", "--snapshot", "main", "--repo", repo, "--plan-only")
    shape(ran.row(), PLAN)
    (tmp_path / "plan.json").write_text(ran.out, "utf-8")
    report = cli("prefetch", "--plan", "plan.json", "--repo", repo, "--json").row()
    assert report["planned"] == len(ran.row()["tiles"]) > 0
    assert report["missing"] == 0


def test_replay_json(cli: Him, repo: Path) -> None:
    cli("query", "--goal", "find button 'Submit'", "--snapshot", "main", "--repo", repo, "--json")
    (known,) = cli("replay", "--list", "--repo", repo, "--json").rows()
    for extra in ((), ("--snapshot", "main"), ("--deterministic",)):
        ran = cli("replay", "--trace", known["trace_id"], "--repo", repo, "--json", *extra)
        shape(ran.row(), REPLAY)
        assert (ran.code, ran.row()["identical"]) == (0, True)
    assert cli("replay", "--trace", known["trace_id"], "--repo", repo).out.startswith("identical")


def test_fsck_json(cli: Him, repo: Path) -> None:
    ran = cli("fsck", "--repo", repo, "--json")
    shape(ran.row(), FSCK)
    assert (ran.code, ran.row()["ok"]) == (0, True)
    assert cli("fsck", "--repo", repo, "--rebuild").code == 0


def test_fsck_names_a_flipped_bit_and_exits_with_5(cli: Him, repo: Path) -> None:
    (pack,) = repo.glob("packs/*.pack")
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 4
    pack.write_bytes(data)
    ran = cli("fsck", "--repo", repo, "--json")
    shape(ran.row(), FSCK)
    assert (ran.code, ran.row()["ok"]) == (5, False)
    assert ran.row()["errors"]


def test_tier_json(cli: Him, tmp_path: Path) -> None:
    memory, values = str(tmp_path / "m"), tmp_path / "a.npy"
    cli("init", memory)
    missing = cli("tier", "status", "--repo", memory, "--json")
    assert missing.code == 2 and "him tier set" in missing.row()["fix"]
    for size, cold in (("3kB", "cold"), ("lots", "cold"), ("1GB", "http://example.com/x")):
        assert cli("tier", "set", "--cold", cold, "--budget", size, "--repo", memory).code == 2
    ran = cli("tier", "set", "--cold", str(tmp_path / "cold"), "--budget", "16MiB", "--repo", memory, "--json")
    assert ran.row() == {"cold": str(tmp_path / "cold"), "budget_bytes": 16 * 2**20}
    for seed, frame in enumerate("abc"):
        np.save(values, np.random.default_rng(seed).integers(0, 255, (3000, 3000), dtype=np.uint8))
        cli("ingest", str(values), "--snapshot", "main", "--frame", frame, "--repo", memory)
    tier = ("--repo", memory, "--json")
    assert cli("tier", "push", *tier).row().keys() == {"packs"}
    assert cli("tier", "demote", *tier).row()["freed_bytes"] > 0
    named = ("--snapshot", "main", "--stream", "kv_cache", "--frame", "a")
    assert cli("tier", "admit", *named, *tier).row() == {"admitted": True}
    assert cli("tier", "pin", *named, "--minutes", "5", *tier).row().keys() == {"extents", "minutes"}
    assert cli("tier", "status", *tier).row()["pinned_bytes"] > 0
    assert cli("tier", "unpin", *named, *tier).row() == {"unpinned": True}
    status = cli("tier", "status", *tier).row()
    shape(status, TIER)
    assert status["pinned_bytes"] == 0 and status["used_bytes"] <= status["budget_bytes"] < status["cold_bytes"]
    assert cli("fsck", *tier).row()["ok"]
    shown = cli("tier", "status", "--repo", memory)
    assert "the cold tier answered" in shown.out and "MB" in shown.out
    assert cli("tier", "push", "--all", *tier).code == 0
    again = str(tmp_path / "again")
    ran = cli("restore", str(tmp_path / "cold"), again, "--budget", "64MiB", "--json")
    shape(ran.row(), {"commits": int, "until": str, "left_out": int, "lacking": str, "packs": int, "cold_bytes": int})
    assert ran.row()["left_out"] == 0 and ran.row()["until"].endswith("Z")
    assert cli("fsck", "--repo", again, "--json").row()["ok"]
    assert cli("restore", str(tmp_path / "cold"), again, "--json").row()["error"] == "conflict"
    shown = cli("restore", str(tmp_path / "cold"), str(tmp_path / "third"), "--all")
    assert "restored" in shown.out and "left out" not in shown.out
    there = ("--cold", str(tmp_path / "cold"), "--budget", "64MiB", "--repo", again, "--json")
    assert cli("tier", "set", *there, "--take-over").code == 0
    assert cli("tier", "push", *tier).row()["error"] == "conflict"


def test_push_pull_and_clone_json(cli: Him, repo: Path, tmp_path: Path) -> None:
    held = cli("clone", repo, "copy", "--json")
    assert held.row()["left_open"] == ["main"] and "him snap seal main" in held.err
    cli("snap", "seal", "main", "--repo", repo)
    cloned = cli("clone", repo, "copy", "--json").row()
    shape(cloned, TRANSFER)
    assert [move["name"] for move in cloned["refs"]] == ["main"] and cloned["records"] > 0
    tiles = cli("tiles", "ls", "--stream", "screen", "--frame", "login", "--snapshot", "main", "--repo", repo, "--json")
    same = cli(
        "tiles", "ls", "--stream", "screen", "--frame", "login", "--snapshot", "main", "--repo", "copy", "--json"
    )
    assert [row["tile_id"] for row in tiles.rows()] == [row["tile_id"] for row in same.rows()]
    answer = cli("query", "--goal", "find button 'Submit'", "--snapshot", "main", "--repo", "copy", "--json").row()
    assert (answer["found"], answer["frame"]) == (True, "login")
    picture(tmp_path / "login.png", 120)
    cli("ingest", "login.png", "--repo", "copy", "--snapshot", "main")
    cli("snap", "seal", "main", "--repo", "copy")
    cli("snap", "tag", "v1", "--snapshot", "main", "--repo", "copy")
    pushed = cli("push", repo, "main", "--repo", "copy", "--json").row()
    shape(pushed, TRANSFER)
    assert len(pushed["snapshots"]) == 1 and pushed["refs"][0]["before"] == cloned["refs"][0]["after"]
    pulled = cli("pull", "copy", "--repo", repo, "--json").row()
    shape(pulled, TRANSFER)
    assert pulled["records"] == 0 and [move["name"] for move in pulled["refs"]] == ["v1"]
    again = cli("push", repo, "--all", "--repo", "copy")
    assert again.code == 0 and "no branch or tag had to be set" in again.out
    assert cli("fsck", "--repo", repo, "--json").row()["ok"] and cli("fsck", "--repo", "copy", "--json").row()["ok"]


def test_branches_that_went_apart_are_named(cli: Him, repo: Path, tmp_path: Path) -> None:
    cli("snap", "seal", "main", "--repo", repo)
    cli("clone", repo, "copy")
    for shade, folder in ((120, repo), (60, tmp_path / "copy")):
        picture(tmp_path / "login.png", shade)
        cli("ingest", "login.png", "--repo", folder, "--snapshot", "main")
        cli("snap", "seal", "main", "--repo", folder)
    heads = [cli("snap", "show", "main", "--repo", folder, "--json").row()["snapshot_id"] for folder in (repo, "copy")]
    ran = cli("push", "copy", "main", "--repo", repo)
    assert ran.code == 4 and all(head in ran.err for head in heads) and "--force" in ran.err
    assert f"{heads[1]} -> {heads[0]}" in cli("push", "copy", "main", "--force", "--repo", repo).out


def test_snapshots_json(cli: Him, repo: Path) -> None:
    (listed,) = cli("snap", "list", "--repo", repo, "--json").rows()
    shape(listed, SNAPSHOT)
    assert listed["refs"] == ["main"]
    shown = cli("snap", "show", "main", "--repo", repo, "--json").row()
    frames = shown.pop("frames")
    shape(shown, SNAPSHOT)
    assert ("screen", "login") in {(frame["stream"], frame["frame"]) for frame in frames}
    sealed = cli("snap", "seal", "main", "--repo", repo, "--json").row()
    shape(sealed, SNAPSHOT)
    assert sealed["sealed"] is True
    tagged = cli("snap", "tag", "v1", "--snapshot", "main", "--tag", "owner=ann", "--repo", repo, "--json").row()
    shape(tagged, SNAPSHOT)
    assert (tagged["tags"], tagged["refs"]) == ({"owner": "ann"}, ["main", "v1"])


def test_log_json(cli: Him, repo: Path) -> None:
    rows = cli("log", "--repo", repo, "--json").rows()
    assert [row["seq"] for row in rows] == list(range(len(rows), 0, -1))
    assert all({"seq", "hash", "time_ns", "operations"} <= set(row) for row in rows)
    assert len(cli("log", "--repo", repo, "--limit", "1", "--json").rows()) == 1


def test_branch_diff_and_delete(cli: Him, repo: Path, tmp_path: Path) -> None:
    made = cli("branch", "experiment", "--from", "main", "--repo", repo, "--json").row()
    assert made["from"] == "main"
    picture(tmp_path / "login.png", 120)
    cli("ingest", "login.png", "--repo", repo, "--snapshot", "experiment")
    rows = cli("snap", "diff", "main", "experiment", "--repo", repo, "--json").rows()
    for row in rows:
        shape(row, {"stream": str, "frame": str, "level": int, "x": int, "y": int, "change": "added|removed|changed"})
    assert {row["stream"] for row in rows} >= {"screen", "scene"}
    assert cli("snap", "diff", "main", "main", "--repo", repo, "--json").rows() == []
    listed = {row["name"]: row["kind"] for row in cli("branch", "--repo", repo, "--json").rows()}
    assert listed == {"main": "branch", "experiment": "branch"}
    assert cli("branch", "experiment", "--delete", "--repo", repo, "--json").row() == {"deleted": "experiment"}
    assert cli("snap", "delete", made["snapshot_id"], "--repo", repo, "--json").row() == {
        "deleted": made["snapshot_id"]
    }


def test_tiles_come_out_as_they_went_in(cli: Him, repo: Path, tmp_path: Path) -> None:
    array = np.arange(512 * 512 * 2, dtype=np.int16).reshape(512, 512, 2)
    np.save(tmp_path / "tile.npy", array)
    place = ("--stream", "kv_cache", "--snapshot", "main", "--frame", "chat-7", "--x", "1", "--y", "2", "--repo", repo)
    shape(cli("tiles", "put", *place, "tile.npy", "--json").row(), TILE)
    got = cli("tiles", "get", *place, "-o", "back.npy", "--json").row()
    assert (got["shape"], got["dtype"]) == ([512, 512, 2], "int16")
    assert np.array_equal(np.load(tmp_path / "back.npy"), array)
    cli("tiles", "get", *place, "-o", "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == array.tobytes()
    rows = cli("tiles", "ls", "--snapshot", "main", "--stream", "kv_cache", "--repo", repo, "--json").rows()
    assert [(row["frame"], row["x"], row["y"]) for row in rows] == [("chat-7", 1, 2)]
    shape(rows[0], TILE)
    scene = cli("tiles", "get", "--stream", "scene", "--snapshot", "main", "--frame", "login", "--repo", repo)
    assert json.loads(scene.out)["width"] == 700
    assert not list(tmp_path.glob("*.part"))


MODEL = {
    "model": "m", "tokenizer": "t", "positions": "rope", "dtype": "float32", "layers": 2, "kv_heads": 1, "dim": 4,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_caches_come_out_as_they_went_in(cli: Him, repo: Path, tmp_path: Path, dtype: str) -> None:
    whole = np.random.default_rng(1).standard_normal((2, 2, 1, 600, 4), dtype=np.float32)
    whole = whole.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    np.save(tmp_path / "cache.npy", whole)
    np.save(tmp_path / "ids.npy", np.arange(600))
    (tmp_path / "asked.json").write_text(json.dumps([*range(550), 7, 7]))
    binding = {**MODEL, "dtype": dtype}
    (tmp_path / "model.json").write_text(json.dumps(binding))
    place = ("--snapshot", "main", "--frame", "chat", "--binding", "model.json", "--repo", repo)
    saved = cli("kv", "save", "cache.npy", "ids.npy", *place, "--json").row()
    shape(saved, {"snapshot_id": str, "stream": str, "frame": str, "tokens": int, "tiles_written": int,
                  "tiles_reused": int, "bytes_stored": int, "ms": float})  # fmt: skip
    assert (saved["stream"], saved["tokens"], saved["tiles_written"]) == ("kv_cache", 600, 2)
    ask = ("kv", "prefix", "asked.json", "--snapshot", "main", "--binding", "model.json", "--repo", repo)
    assert cli(*ask, "--json").row() == {"found": True, "frame": "chat", "tokens": 550, "quantise": ""}
    assert "550 of 552" in cli(*ask).out
    (tmp_path / "asked.json").write_text("[999]")
    assert cli(*ask, "--json").row() == {"found": False, "frame": None, "tokens": 0, "quantise": None}
    loaded = cli("kv", "load", *place, "--tokens", "550", "-o", "back.npy", "--ids", "back.json", "--json").row()
    assert loaded == {
        "path": str(tmp_path / "back.npy"), "ids_path": str(tmp_path / "back.json"), "frame": "chat", "tokens": 550,
        "shape": [2, 2, 1, 550, 4], "dtype": dtype, "size_bytes": 16 * 550 * whole.itemsize,
    }  # fmt: skip
    assert np.load(tmp_path / "back.npy").tobytes() == whole[:, :, :, :550].tobytes()
    assert json.loads((tmp_path / "back.json").read_text()) == list(range(550))
    cli("kv", "save", "cache.npy", "ids.npy", *place, "--quantise", "int8")
    listed = cli("kv", "list", "--snapshot", "main", "--repo", repo, "--json").rows()
    assert listed == [{"frame": "chat", "tokens": 600, "quantise": "int8", "binding": binding}]
    assert "int8" in cli("kv", "list", "--snapshot", "main", "--repo", repo).out
    (tmp_path / "model.json").write_text(json.dumps({**binding, "tokenizer": "another"}))
    ran = cli("kv", "load", *place, "-o", "wrong.npy", "--json")
    assert (ran.code, ran.row()["error"]) == (7, "drift")
    assert "tokenizer" in ran.row()["message"] and not (tmp_path / "wrong.npy").exists()


def test_s10_spellings(cli: Him, repo: Path, tmp_path: Path) -> None:
    """Spec §10: the commands as they are written there."""
    environ = {"HIM_REPO": str(repo)}
    cli("snap", "tag", "snp_base", "--snapshot", "main", environ=environ)
    base = cli("snap", "list", "--json", environ=environ).rows()[0]["snapshot_id"]
    made = cli("snap", "create", "--from", base, "--tag", "task_id=TX-423", environ=environ)
    name = made.out.strip()
    assert re.fullmatch(SNAPSHOT_ID, name), made.err
    np.save(tmp_path / "tile.npy", np.zeros((512, 512), dtype=np.int8))
    words = ("tiles put --stream kv_cache --snapshot", name, "--level 0 --x 10 --y 12 tile.npy")
    assert cli(*" ".join(words).split(), environ=environ).code == 0
    found = cli(
        "query", "--goal", "find submit button", "--snapshot", name, "--budget", "150", "--json", environ=environ
    )
    shape(found.row(), ANSWER)
    plan = cli("query", "--goal", "find submit button", "--snapshot", name, "--plan-only", environ=environ)
    (tmp_path / "plan.json").write_text(plan.out, "utf-8")
    assert cli("prefetch", "--plan", "plan.json", environ=environ).code == 0
    trace = found.row()["trace_id"]
    assert cli("replay", "--snapshot", name, "--trace", trace, environ=environ).code == 0


def test_where_the_repository_comes_from(repo: Path, tmp_path: Path) -> None:
    deep = repo / "packs"
    assert place.find_repository(None, {}, str(deep)) == str(repo)
    assert place.find_repository(None, {"HIM_REPO": "memory"}, str(tmp_path)) == str(repo)
    assert place.find_repository("memory", {"HIM_REPO": "other"}, str(tmp_path)) == str(repo)
    assert place.find_repository(None, {}, str(tmp_path)) is None
    assert place.option_value(["query", "--repo", "a", "--repo=b"], "--repo") == "b"
    assert place.option_value(["query", "--", "--repo", "a"], "--repo") is None


# -- the demonstration


def test_demo_on_a_picture_of_ones_own(cli: Him, tmp_path: Path) -> None:
    picture(tmp_path / "mine.png")
    ran = cli("demo", "mine.png", "--goal", "find button 'Save'", "--out", "shown", "--json")
    row = ran.row()
    assert (ran.code, row["agrees"]) == (0, True), ran.err
    assert list(row) == ["out", "agrees", "ingested", "asked", "change", "replay", "times_ms"]
    shape(row["ingested"], [INGEST])
    shape({key: value for key, value in row["asked"][0].items() if key not in ("goal", "right")}, ANSWER)
    assert (tmp_path / "shown" / "mine.found.png").is_file()
    again = cli("demo", "mine.png", "--goal", "find button 'Save'", "--out", "shown")
    assert again.code == 0
    assert "everything is left in" in again.out


@pytest.mark.slow
def test_demo_agrees_with_the_saved_boxes(tmp_path: Path) -> None:
    ran = process("demo", "--out", tmp_path / "demo", "--json")
    row = ran.row()
    wrong = [one["goal"] for one in row["asked"] if one["right"] is not True]
    assert (wrong, row["change"]["right"], row["replay"]["identical"]) == ([], True, True)
    assert row["change"]["tiles_stored"] == row["change"]["tiles_differing"] < row["change"]["tiles_of_frame"]
    assert len({one["frame"] for one in row["asked"]}) >= 6
    assert (ran.code, row["agrees"]) == (0, True)


def test_doctor_json(cli: Him, repo: Path, tmp_path: Path) -> None:
    rows = cli("doctor", "--repo", repo, "--json").rows()
    for row in rows:
        shape(row, {"check": str, "ok": bool, "detail": str, "fix": str})
    names = [row["check"] for row in rows]
    assert {"parts", "repository", "daemon"} <= set(names)
    assert len(set(names)) == len(names)
    assert "repository" in cli("doctor").out
    assert cli("doctor", "--repo", tmp_path / "nowhere").code == 1


# -- mistakes

GOOD = ("--snapshot", "main", "--repo", "memory")
CACHE = ("--frame", "chat", "--binding", "model.json", *GOOD)
MISTAKES: dict[str, tuple[int, tuple[str, ...]]] = {
    "no such command": (2, ("remember",)),
    "no subcommand": (2, ("snap",)),
    "no such option": (2, ("query", "--gaol", "x", *GOOD)),
    "missing option": (2, ("query", "--goal", "x")),
    "no number": (2, ("query", "--goal", "x", "--budget", "soon", *GOOD)),
    "budget of 0": (2, ("query", "--goal", "x", "--budget", "0", *GOOD)),
    "empty goal": (2, ("query", "--goal", " ", *GOOD)),
    "long goal": (2, ("query", "--goal", "x" * 2000, *GOOD)),
    "two kinds of goals": (2, ("query", "--goal", "x", "--goals", "goals.jsonl", *GOOD)),
    "no goal": (2, ("query", *GOOD)),
    "missing goals file": (3, ("query", "--goals", "nowhere.jsonl", *GOOD)),
    "goals are no JSON": (2, ("query", "--goals", "login.json", *GOOD)),
    "unknown snapshot": (3, ("query", "--goal", "x", "--snapshot", "nope", "--repo", "memory")),
    "unknown snapshot id": (3, ("snap", "show", "snp_01ARZ3NDEKTSV4RRFFQ69G5FAV", "--repo", "memory")),
    "no snapshot id": (3, ("snap", "show", "snp_short", "--repo", "memory")),
    "unknown frame": (3, ("query", "--goal", "x", "--frame", "nope", *GOOD)),
    "unknown trace": (3, ("replay", "--trace", "tr_01ARZ3NDEKTSV4RRFFQ69G5FAV", "--repo", "memory")),
    "no trace": (2, ("replay", "--repo", "memory")),
    "no repository": (3, ("snap", "list", "--repo", "elsewhere")),
    "no repository upwards": (3, ("snap", "list")),
    "repository is there": (4, ("init", "memory")),
    "folder is not empty": (4, ("init", ".")),
    "missing picture": (3, ("ingest", "nowhere.png", *GOOD)),
    "truncated picture": (2, ("ingest", "cut.png", *GOOD)),
    "picture is text": (2, ("ingest", "text.png", *GOOD)),
    "missing tree": (3, ("ingest", "login.png", "--tree", "nowhere.json", *GOOD)),
    "folder without pictures": (2, ("ingest", "empty", *GOOD)),
    "tile of objects": (2, ("tiles", "put", "objects.npy", "--stream", "kv_cache", *GOOD)),
    "truncated tile": (2, ("tiles", "put", "short.npy", "--stream", "kv_cache", *GOOD)),
    "tile with a tail": (2, ("tiles", "put", "long.npy", "--stream", "kv_cache", *GOOD)),
    "tile that claims too much": (2, ("tiles", "put", "huge.npy", "--stream", "kv_cache", *GOOD)),
    "tile is text": (2, ("tiles", "put", "text.npy", "--stream", "kv_cache", *GOOD)),
    "wrong dtype": (2, ("tiles", "put", "floats.npy", "--stream", "screen", *GOOD)),
    "unknown stream": (3, ("tiles", "put", "floats.npy", "--stream", "nope", *GOOD)),
    "put above level 0": (2, ("tiles", "put", "floats.npy", "--stream", "kv_cache", "--level", "1", *GOOD)),
    "negative place": (2, ("tiles", "put", "floats.npy", "--stream", "kv_cache", "--x", "-1", *GOOD)),
    "absent tile": (3, ("tiles", "get", "--stream", "screen", "--frame", "login", "--x", "99", "-o", "x.npy", *GOOD)),
    "tile into a folder": (2, ("tiles", "get", "--stream", "screen", "--frame", "login", "-o", "empty", *GOOD)),
    "cache without ids": (3, ("kv", "save", "cache.npy", "nowhere.json", *CACHE)),
    "ids are no ids": (2, ("kv", "save", "cache.npy", "object.json", *CACHE)),
    "ids are floats": (2, ("kv", "save", "cache.npy", "floats.npy", *CACHE)),
    "ids are too few": (2, ("kv", "save", "cache.npy", "one.json", *CACHE)),
    "cache is none": (2, ("kv", "save", "floats.npy", "ids.json", *CACHE)),
    "cache is truncated": (2, ("kv", "save", "short.npy", "ids.json", *CACHE)),
    "cache quantised by what is not": (2, ("kv", "save", "cache.npy", "ids.json", "--quantise", "int4", *CACHE)),
    "no binding": (2, ("kv", "prefix", "ids.json", *GOOD)),
    "missing binding": (3, ("kv", "prefix", "ids.json", "--binding", "nowhere.json", *GOOD)),
    "binding is no binding": (2, ("kv", "prefix", "ids.json", "--binding", "object.json", *GOOD)),
    "binding with an empty field": (2, ("kv", "prefix", "ids.json", "--binding", "hollow.json", *GOOD)),
    "no cache of that name": (3, ("kv", "load", "-o", "x.npy", *CACHE)),
    "cache into no .npy": (2, ("kv", "load", "-o", "x.bin", *CACHE)),
    "no tokens of a cache": (2, ("kv", "load", "-o", "x.npy", "--tokens", "0", *CACHE)),
    "no KEY=VALUE": (2, ("snap", "create", "--tag", "owner", "--repo", "memory")),
    "KEY twice": (2, ("snap", "create", "--tag", "a=1", "--tag", "a=2", "--repo", "memory")),
    "nothing to tag": (2, ("snap", "tag", *GOOD)),
    "branch is there": (4, ("branch", "main", "--from", "main", "--repo", "memory")),
    "branch from nothing": (3, ("branch", "new", "--from", "nope", "--repo", "memory")),
    "delete what is not": (3, ("branch", "nope", "--delete", "--repo", "memory")),
    "delete what a branch holds": (4, ("snap", "delete", "main", "--repo", "memory")),
    "missing plan": (3, ("prefetch", "--plan", "nowhere.json", "--repo", "memory")),
    "plan is no plan": (2, ("prefetch", "--plan", "text.png", "--repo", "memory")),
    "plan without tiles": (2, ("prefetch", "--plan", "object.json", "--repo", "memory")),
    "push without names": (2, ("push", "other", "--repo", "memory")),
    "push of names and all": (2, ("push", "other", "main", "--all", "--repo", "memory")),
    "push to itself": (2, ("push", "memory", "--all", "--repo", "memory")),
    "pull from itself": (2, ("pull", "./memory/../memory", "--repo", "memory")),
    "push to nothing": (3, ("push", "elsewhere", "--all", "--repo", "memory")),
    "push to a file": (3, ("push", "login.png", "--all", "--repo", "memory")),
    "push of an unknown name": (3, ("push", "other", "nope", "--repo", "memory")),
    "push of an open head": (4, ("push", "other", "main", "--repo", "memory")),
    "push to a newer format": (8, ("push", "newer", "--all", "--repo", "memory")),
    "pull from a broken one": (5, ("pull", "broken", "--repo", "memory")),
    "pull of an unknown name": (3, ("pull", "other", "nope", "--repo", "memory")),
    "clone of nothing": (3, ("clone", "elsewhere", "copy")),
    "clone of an unknown name": (3, ("clone", "memory", "copy", "--ref", "nope")),
    "clone onto itself": (2, ("clone", "memory", "memory")),
    "clone into a full folder": (4, ("clone", "memory", ".")),
    "clone into a repository": (4, ("clone", "other", "memory")),
    "no daemon to stop": (3, ("daemon", "stop", "--repo", "memory")),
    "demo without a goal": (2, ("demo", "login.png")),
    "demo without a picture": (3, ("demo", "nowhere.png", "--goal", "x")),
}


@pytest.fixture
def clutter(repo: Path, tmp_path: Path) -> None:
    """Files that are wrong in one way each."""
    whole = (tmp_path / "login.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    for name in ("other", "newer", "broken"):
        with him.open(tmp_path / name, create=True):
            pass
    marker = tmp_path / "newer" / "him.json"
    marker.write_bytes(msgspec.structs.replace(parsed(marker.read_bytes(), ""), format=99).encoded())
    (tmp_path / "broken" / "him.json").write_text("{")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "hollow.json").write_text(json.dumps({**MODEL, "tokenizer": ""}))
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    (tmp_path / "one.json").write_text("[1]")
    np.save(tmp_path / "cache.npy", np.zeros((2, 2, 1, 3, 4), dtype=np.float32))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "object.json").write_text("{}")
    np.save(tmp_path / "floats.npy", np.zeros((4, 4, 3)))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    data = (tmp_path / "floats.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(data[:-1])
    (tmp_path / "long.npy").write_bytes(data + b"x")
    (tmp_path / "huge.npy").write_bytes(data.replace(b"(4, 4, 3)", b"(9999999, 9999999, 3)")[: len(data)])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_a_code(cli: Him, clutter: None, name: str) -> None:
    code, words = MISTAKES[name]
    ran = cli(*words)
    assert re.fullmatch(r"error: [^\n]+ — [^\n]+\n", ran.err), ran.err + ran.out
    assert "Traceback" not in ran.err
    assert (ran.code, ran.out) == (code, "")
    again = cli(*words, "--json")
    if name != "no subcommand":
        shape(again.row(), ERROR)
        assert KINDS[again.row()["error"]].exit_code == again.code == code


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, "storage"), (errno.EROFS, "storage"), (errno.EACCES, "storage"), (errno.EIO, "storage")],
)
def test_a_refusing_disk_is_one_line(
    cli: Him, repo: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "packs/x.pack")

    monkeypatch.setattr(him.app.Repository, "snapshots", refuse)
    ran = cli("snap", "list", "--repo", repo, "--json")
    row = ran.row()
    assert (ran.code, row["error"], row["place"]) == (KINDS["storage"].exit_code, "storage", "packs/x.pack")
    assert ran.err.count("\n") == 1


def test_a_fault_of_ours_is_one_line_too(cli: Him, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(him.app.Repository, "snapshots", fail)
    ran = cli("snap", "list", "--repo", repo)
    assert (ran.code, ran.err.count("\n")) == (70, 1)
    assert "HIM_DEBUG=1" in ran.err
    loud = cli("snap", "list", "--repo", repo, environ={"HIM_DEBUG": "1"})
    assert "Traceback" in loud.err


def test_a_damaged_repository_is_one_line(cli: Him, repo: Path) -> None:
    (repo / "him.json").write_text("{")
    ran = cli("snap", "list", "--repo", repo)
    assert (ran.code, ran.err.count("\n")) == (5, 1)


def test_names_cannot_steer_the_terminal(cli: Him, repo: Path) -> None:
    assert plain("a\x1b[31mb\n") == "a\\x1b[31mb\\n"
    ran = cli("query", "--goal", "x", "--snapshot", "\x1b[2J", "--repo", repo)
    assert "\x1b" not in ran.err


# -- the process: start-up, pipes, the daemon


def process(*words: str | Path, cwd: Path | None = None, **environ: str) -> Ran:
    done = subprocess.run(
        [*HIM, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **environ}
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_importing_him_loads_nothing_heavy() -> None:
    code = (
        "import sys, him, him.cli.entry, him.cli.place, him.server.wire\n"
        "heavy = {'numpy', 'msgspec', 'typer', 'rich', 'cv2', 'onnxruntime', 'pathlib', 'him.app'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": str(Path(him.__file__).parents[1])})  # fmt: skip
    assert ran.stdout.strip() == "[]"


def test_a_reader_that_leaves_is_no_error(repo: Path) -> None:
    command = [*HIM, "log", "--repo", str(repo), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None and started.stderr is not None
        started.stdout.close()
        assert started.stderr.read() == b""
        assert started.wait(60) == 141


def test_the_socket_path_is_short_and_its_folder_private(tmp_path: Path) -> None:
    far = "/" + "/".join(["folder" * 20] * 5)
    for environ in ({}, {"XDG_RUNTIME_DIR": "/" + "x" * 120}, {"XDG_RUNTIME_DIR": str(tmp_path)}):
        assert len(wire.socket_path(environ, far)) <= wire.SUN_PATH_BYTES_MAX + 7
    folder = tmp_path / "him"
    assert not wire.trusted(str(folder))
    folder.mkdir(mode=0o700)
    assert wire.trusted(str(folder))
    folder.chmod(0o750)
    assert not wire.trusted(str(folder))
    (tmp_path / "link").symlink_to(folder)
    assert not wire.trusted(str(tmp_path / "link"))


def test_a_dead_socket_is_passed_over(repo: Path) -> None:
    path = Path(wire.socket_path(os.environ, str(repo)))
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(b"")
    ran = process("snap", "list", "--repo", repo, "--json")
    assert (ran.code, ran.err, len(ran.rows())) == (0, "", 1)


@pytest.fixture
def daemon(repo: Path) -> Iterator[Path]:
    """A repository with its daemon running."""
    started = process("daemon", "start", "--repo", repo, "--json")
    assert started.code == 0, started.err
    yield repo
    process("daemon", "stop", "--repo", repo)


def steady(out: str) -> str:
    """Output without what differs between any two runs."""
    return re.sub(r'"(\w*_ms|trace_id)":("[^"]*"|[\d.e+-]+|\{[^}]*\})', r'"\1":0', out)


def test_the_daemon_answers_as_the_process_would(daemon: Path) -> None:
    for words in (
        ("snap", "list"), ("snap", "list", "--json"), ("log",), ("log", "--json"),
        ("tiles", "ls", "--snapshot", "main"),
        ("query", "--goal", "find button 'Submit'", *MAIN),
        ("query", "--goal", "x", "--snapshot", "nope"), ("query", "--goal", "x", "--snapshot", "nope", "--json"),
        ("query", "--gaol", "x"), ("replay", "--trace", "tr_01ARZ3NDEKTSV4RRFFQ69G5FAV"),
    ):  # fmt: skip
        warm = process(*words, "--repo", daemon)
        cold = process(*words, "--repo", daemon, "--no-daemon")
        assert (warm.code, steady(warm.out), warm.err) == (cold.code, steady(cold.out), cold.err), words
    assert process("daemon", "status", "--repo", daemon, "--json").row()["served"] == 10


def test_the_daemon_sees_what_others_write(daemon: Path, tmp_path: Path) -> None:
    tree(tmp_path / "login.json", "Approve")
    picture(tmp_path / "new.png", 90)
    done = process("ingest", "new.png", "--tree", "login.json", "--snapshot", "main", "--repo", daemon, cwd=tmp_path)
    assert done.code == 0, done.err
    words = ("query", "--goal", "find button 'Approve'", *MAIN)
    assert process(*words, "--repo", daemon).row()["frame"] == "new"
    assert process("daemon", "status", "--repo", daemon, "--json").row()["served"] == 1


def test_the_daemon_reads_paths_as_its_caller_means_them(daemon: Path, tmp_path: Path) -> None:
    (tmp_path / "goals.jsonl").write_text('{"goal":"find button \'Submit\'","id":7}\n')
    ran = process("query", "--goals", "goals.jsonl", "--snapshot", "main", "--json", cwd=tmp_path, HIM_REPO="memory")
    assert ran.row()["id"] == 7
    assert process("daemon", "status", "--repo", daemon, "--json").row()["served"] == 1


def test_one_daemon_a_repository_and_none_after_stop(daemon: Path) -> None:
    again = process("daemon", "start", "--repo", daemon, "--json")
    assert (again.code, again.row()["error"]) == (KINDS["busy"].exit_code, "busy")
    socket = Path(process("daemon", "status", "--repo", daemon, "--json").row()["socket"])
    assert (socket.stat().st_mode & 0o777, socket.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert process("daemon", "stop", "--repo", daemon, "--json").row()["stopped"] is True
    assert process("daemon", "status", "--repo", daemon, "--json").row()["running"] is False
    assert not socket.exists()


def test_a_daemon_ends_when_its_repository_is_replaced(daemon: Path) -> None:
    marker = daemon / "him.json"
    text = marker.read_bytes()
    marker.rename(daemon / "old.json")
    marker.write_bytes(text)
    assert process("snap", "list", "--repo", daemon, "--json").code == 0
    deadline = time.monotonic() + 20
    while process("daemon", "status", "--repo", daemon, "--json").row()["running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process("daemon", "status", "--repo", daemon, "--json").row()["running"] is False


def test_rubbish_on_the_socket_harms_nobody(daemon: Path) -> None:
    path = wire.socket_path(os.environ, str(daemon))
    for rubbish in (
        b"",
        b"\n",
        b"[1]\n",
        b"{\n",
        b'{"kind":"run"}\n',
        b'{"protocol":1,"kind":"dance"}\n',
        b"x" * 2_000_000,
    ):
        link = wire.connect(path)
        assert link is not None
        with link:
            try:
                link.sendall(rubbish)
                link.shutdown(1)
                while link.recv(4096):
                    pass
            except OSError:
                pass
    assert process("daemon", "status", "--repo", daemon, "--json").row()["running"] is True


def test_forwarded_commands_only_read() -> None:
    assert {" ".join(words) for words in FORWARDED} <= {"query", "replay", "log", "tiles ls", "snap list"}


def test_an_idle_daemon_ends(repo: Path) -> None:
    assert process("daemon", "start", "--repo", repo, "--idle", "0.2").code == 0
    socket = Path(wire.socket_path(os.environ, str(repo)))
    deadline = time.monotonic() + 20
    while socket.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not socket.exists()
