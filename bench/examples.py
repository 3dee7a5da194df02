"""The shipped screens and their goals as benchmarks use them."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

import him
from him.adapters.pillow import PillowDecoder

SCREENS = Path(__file__).parent.parent / "examples" / "screens"
TINY = ("adminlte-login", "ckeditor-table-dialog")


def goals(*, tiny: bool = False) -> list[dict[str, Any]]:
    """Goals with their boxes; a tiny run keeps those that name one of two screens."""
    lines = (SCREENS / "goals.jsonl").read_text().splitlines()
    return [goal for goal in map(json.loads, lines) if not tiny or goal["frame"] in TINY]


def screens(*, tiny: bool = False) -> list[Path]:
    """The pictures."""
    return sorted(path for path in SCREENS.glob("*.png") if not tiny or path.stem in TINY)


def screen_tiles(count: int, *, tiny: bool = False) -> NDArray[np.uint8]:
    """`count` distinct tiles of the pictures, below one another: (count · 512, 512, 3) uint8.

    Cut on the tile grid first, then on grids shifted by a quarter, so that no store gains by equal content.
    """
    pictures = [PillowDecoder().decode(path.read_bytes(), path.name) for path in screens(tiny=tiny)]
    found: dict[bytes, NDArray[np.uint8]] = {}
    for shift in ((0, 0), (128, 0), (0, 128), (128, 128), (256, 0), (0, 256), (256, 256)):
        for picture in pictures:
            for y in range(shift[0], picture.shape[0] - 511, 512):
                for x in range(shift[1], picture.shape[1] - 511, 512):
                    part = picture[y : y + 512, x : x + 512]
                    found.setdefault(blake3(part.tobytes()).digest(), part)
                    if len(found) == count:
                        return np.concatenate(list(found.values()))
    raise ValueError(f"the pictures have {len(found)} distinct tiles; {count} are asked for")


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
