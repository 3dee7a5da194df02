"""Spec §1.1 at size: inputs far larger than what a process may hold, and pyramids over wide frames."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import him
from him.types import StreamSpec

ROOT = Path(__file__).parents[2]


def step(*arguments: object) -> dict[str, Any]:
    """A step of the benchmark, in a process of its own whose peak memory it tells."""
    command = [sys.executable, "-m", "bench.large", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "side", "peak_mb"), [("picture", 8_192, 320), ("array", 100_000, 220)])
def test_s1_1_inputs_larger_than_the_memory_they_may_take(what: str, side: int, peak_mb: int, tmp_path) -> None:
    """A picture of 201 MB and an array of 10 GB; the whole sizes are in `python -m bench large`."""
    file, place = tmp_path / f"x{'.png' if what == 'picture' else '.npy'}", tmp_path / "r"
    made = step("make", what, side, file)
    took = step("ingest", what, file, place, True)
    found = step("check", what, side, place)
    assert took["peak_mb"] < peak_mb, "with the interpreter, OpenCV and all: about 80"
    assert made["decoded_mb"] >= 200
    assert found["right"] == found["sampled"]
    assert took["tiles"] == (-(-side // 512)) ** 2
    if what == "array":
        assert took["stored_mb"] < 30, "zeros are stored once"
        assert made["file_mb"] < 100, "nor are they in the file"


def test_s1_1_a_frame_of_a_million_cells_has_levels_where_it_has_tiles(tmp_path) -> None:
    """Scattered tiles: what is stored for levels is bounded by what is there, not by the extent."""
    rng = np.random.default_rng(1)
    cells = {
        (int(y), int(x)): np.full((8, 8), 1 + n % 250, dtype=np.uint8)
        for n, (y, x) in enumerate(rng.integers(0, 1000, (200, 2)))
    }
    with him.open(tmp_path / "r", create=True) as repo:
        repo.declare_stream(StreamSpec("grid", tile_height=8, tile_width=8, dtype="uint8", level_rule="max"))
        repo.writable("main").put_many("grid", cells, frame="f")
        pages = repo.stored_pages()
        open_tiles = [list(repo.snapshot("main").tiles("grid", frame="f", level=level)) for level in (5, 10)]
        repo.snapshot("main").seal()
        assert repo.stored_pages() < 2 * pages, "a companion for each page there is"
        main = repo.snapshot("main")
        (frame,) = main.frames("grid")
        assert (frame.rows > 900, frame.columns > 900) == (True, True)
        apex = main.get("grid", frame="f", level=10)
        assert isinstance(apex, np.ndarray)
        assert int(apex.max()) == max(int(tile.max()) for tile in cells.values())
        for level, before in zip((5, 10), open_tiles, strict=True):
            after = list(main.tiles("grid", frame="f", level=level))
            assert [one.tile_id for one in before] == [one.tile_id for one in after]
            for one in before[::17]:
                values = main.get("grid", frame="f", level=level, y=one.y, x=one.x)
                assert isinstance(values, np.ndarray)
                assert (one.shape, one.dtype) == (values.shape, values.dtype.name)
            assert {one.size_bytes > 0 for one in before} == {False}, "an open snapshot stores no levels"
            # Where a page has few tiles its apex alone is stored.
            assert {one.size_bytes > 0 for one in after} == ({True, False} if level == 5 else {True})
        # A level below every page's apex is not stored for single tiles, and is there all the same.
        for (y, x), tile in sorted(cells.items())[:5]:
            found = main.get("grid", frame="f", level=1, y=y // 2, x=x // 2)
            assert isinstance(found, np.ndarray)
            assert (
                found[4 * (y % 2) : 4 * (y % 2) + 4, 4 * (x % 2) : 4 * (x % 2) + 4].tolist()
                == [[int(tile[0, 0])] * 4] * 4
            )
        assert repo.fsck().ok
