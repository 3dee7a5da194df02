"""The README's examples run as they are written."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `login.png` and a changed copy of it, as the examples expect."""
    screen = ROOT / "examples" / "screens" / "adminlte-login.png"
    shutil.copy(screen, tmp_path / "login.png")
    picture = cv2.imread(str(screen))
    assert picture is not None
    picture[:60, :200] = np.uint8(120)
    (tmp_path / "changed").mkdir()
    cv2.imwrite(str(tmp_path / "changed" / "login.png"), picture)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def him(line: str, folder: Path) -> str:
    """Run a `him …` line and return what it printed."""
    words = shlex.split(line, comments=True)
    done = subprocess.run(
        [sys.executable, "-m", "him.cli.entry", *words[1:]],
        cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


def test_the_python_example_runs(desk: Path) -> None:
    (example,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", example], cwd=desk, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("accepted Candidate(bbox=Box(")
    assert done.stdout.rstrip().endswith("True")


def test_the_command_lines_run_in_the_order_they_stand(desk: Path) -> None:
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith(("him ", "cd "))]
    assert len(lines) >= 10
    folder, trace = desk, ""
    for line in lines:
        if line.startswith("cd "):
            folder = desk / line.split()[1]
            continue
        him(line.replace("tr_…", trace) if trace else line, folder)
        if line.startswith("him query") and "--json" not in line:
            trace = json.loads(him(f"{line} --json", folder))["trace_id"]
