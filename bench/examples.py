"""The shipped screens and their goals as benchmarks use them."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import him

SCREENS = Path(__file__).parent.parent / "examples" / "screens"
TINY = ("adminlte-login", "ckeditor-table-dialog")


def goals(*, tiny: bool = False) -> list[dict[str, Any]]:
    """Goals with their boxes; a tiny run keeps those that name one of two screens."""
    lines = (SCREENS / "goals.jsonl").read_text().splitlines()
    return [goal for goal in map(json.loads, lines) if not tiny or goal["frame"] in TINY]


def screens(*, tiny: bool = False) -> list[Path]:
    """The pictures."""
    return sorted(path for path in SCREENS.glob("*.png") if not tiny or path.stem in TINY)


@contextmanager
def repository(*, tiny: bool = False, trees: bool = False) -> Iterator[him.Repository]:
    """A new repository with the screens on branch `main`, sealed; read from pixels unless `trees`."""
    with tempfile.TemporaryDirectory() as folder, him.open(Path(folder) / "memory.him", create=True) as repo:
        for screen in screens(tiny=tiny):
            tree = screen.with_suffix(".tree.json") if trees else None
            list(repo.ingest(screen, "main", tree=tree))
        repo.snapshot("main").seal()
        yield repo


def right(goal: dict[str, Any], answer: dict[str, Any]) -> bool:
    """Whether an answer is right, judged by the boxes saved at rendering.

    A target must be found with its centre in an accepted box on the right screen; absent and ambiguous goals must be
    answered as such.
    """
    if goal["class"] in ("absent", "ambiguous"):
        return answer["status"] == goal["class"]
    return answer["found"] and hits(goal, answer["frame"], answer["bbox"])


def hits(goal: dict[str, Any], frame: str, bbox: list[int]) -> bool:
    """Whether the centre of a box lies in one of the goal's boxes."""
    x, y = bbox[0] + bbox[2] / 2, bbox[1] + bbox[3] / 2
    inside = any(b[0] <= x < b[0] + b[2] and b[1] <= y < b[1] + b[3] for b in goal["boxes"])
    return inside and frame == goal["screen"]
