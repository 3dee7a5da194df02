"""The house stays tidy: sizes, names, locks, machine traces and generated pages."""

import ast
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 1_000
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
TEXT_SUFFIXES = {"", ".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".yml", ".yaml", ".cfg", ".sh", ".js", ".ts"}
TEXT_SUFFIXES |= {".lock", ".html", ".css", ".proto", ".ini"}
# Spelt in pieces, so that this file does not name them itself.
MACHINE_PATHS = re.compile(
    "(?<![\\w.])/(?:" + "|".join(("wo" + "rk", "ro" + "ot", "tmp/" + "dev")) + ")(?=[/\\s\"'`)]|$)"
)
REGISTRIES = re.compile("|".join(("py" + r"pi\.org", "files\\.python" + "hosted", "registry\\." + "npmjs")))


def tracked_files() -> Iterator[Path]:
    """Files git knows or would add; every file when there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listing.stdout.split("\0") if listing.returncode == 0 else []
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file():
            yield path


def readable_files() -> Iterator[tuple[Path, str]]:
    """Tracked text files with their text."""
    for path in tracked_files():
        if path.suffix in TEXT_SUFFIXES:
            try:
                yield path.relative_to(ROOT), path.read_text("utf-8")
            except UnicodeDecodeError:
                continue


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT / "src").as_posix())
def test_functions_and_modules_stay_short(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= MODULE_LINES_MAX, f"{path} has more than {MODULE_LINES_MAX} lines: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{path}:{node.lineno} {node.name} has {lines} lines: split it"


def test_no_room_for_odds_and_ends() -> None:
    bad = [p for p in SOURCES if p.stem in BANNED_NAMES or p.parent.name in BANNED_NAMES]
    assert not bad, f"name these after what they hold: {bad}"


def test_every_module_says_what_it_hides() -> None:
    missing = [
        p for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text("utf-8"))) and p.read_text("utf-8").strip()
    ]
    assert not missing, f"no module docstring: {missing}"


def test_locks_carry_hashes_and_no_address() -> None:
    locks = sorted(ROOT.glob("requirements*.lock"))
    assert [p.name for p in locks] == [
        "requirements-bench.lock", "requirements-dev.lock", "requirements-model.lock", "requirements.lock",
    ]  # fmt: skip
    for path in [*locks, *ROOT.rglob("package-lock.json")]:
        if "node_modules" in path.parts or ".venv" in path.parts:
            continue
        text = path.read_text("utf-8")
        assert "://" not in text, f"{path.name} holds an address: make it with `make lock`"
    for path in locks:
        text = path.read_text("utf-8")
        pins = re.findall(r"^[A-Za-z0-9][\w.\-]*==", text, re.MULTILINE)
        assert pins
        assert text.count("--hash=sha256:") >= len(pins), f"{path.name} lacks hashes"
        assert not re.search(r"^\s*#.*/", text, re.MULTILINE), f"{path.name} has a comment with a path"


def test_locks_agree_with_each_other() -> None:
    def pins(name: str) -> dict[str, str]:
        rows = re.findall(r"^([\w.\-]+)==([^\s;\\]+)([^\\\n]*)", (ROOT / name).read_text("utf-8"), re.MULTILINE)
        return {f"{package}{marker.strip()}": version for package, version, marker in rows}

    locks = [pins(f"requirements{name}.lock") for name in ("", "-dev", "-bench")]
    for one, other in itertools.combinations(locks, 2):
        differing = {name for name, version in one.items() if name in other and other[name] != version}
        assert not differing, f"resolve again with `make lock`: {differing}"


def test_no_trace_of_a_machine() -> None:
    found = [
        f"{path}:{text[: hit.start()].count(chr(10)) + 1} {hit.group()}"
        for path, text in readable_files()
        for hit in [*MACHINE_PATHS.finditer(text), *REGISTRIES.finditer(text)]
    ]
    assert not found, found


def test_generated_pages_are_current() -> None:
    from him.cli.reference import pages

    for path, text in pages().items():
        assert (ROOT / path).read_text("utf-8") == text, f"{path} is stale: run `make docs`"
