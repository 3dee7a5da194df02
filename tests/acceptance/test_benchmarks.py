"""Every benchmark runs tiny, so that none can rot; what they find is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import NAMES

ROOT = Path(__file__).parents[2]
FIELDS = {"bench", "metric", "value", "unit", "against", "ratio", "goal", "holds"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_benchmark_prints_one_json_object_a_line(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", name, "--json", "--tiny"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and "Traceback" not in done.stderr, done.stderr
    assert all(row.keys() >= FIELDS and row["bench"] == name for row in rows)
