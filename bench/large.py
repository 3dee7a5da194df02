"""Inputs larger than memory: a picture of 16k×16k pixels and a sparse array of 40 GB, each with its peak memory.

Every step runs in a process of its own, so that the peak it prints is that of the step alone.
"""

import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.measure import Row, Rows, row

LIMIT_MB: Final = 1024
SIDE, TINY_SIDE = 16_384, 1_300
ARRAY_SIDE, TINY_ARRAY_SIDE = 200_000, 3_000
ISLAND = 700
ISLANDS = 24
STRIP = 64
TILE = 512


def _peak_mb() -> float:
    """The most memory this program had at once.

    What getrusage tells begins with what the process that started it had, so a large one hides a small one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def run(*, tiny: bool = False) -> Rows:
    """Rows of peak memory (which has the goal), time and bytes, for making nothing of what was ingested differ."""
    side, array_side = (TINY_SIDE, TINY_ARRAY_SIDE) if tiny else (SIDE, ARRAY_SIDE)
    with tempfile.TemporaryDirectory() as folder:
        for what, length, suffix in (("picture", side, ".png"), ("array", array_side, ".npy")):
            file, place = f"{folder}/{what}{suffix}", f"{folder}/{what}.him"
            made = _step("make", what, str(length), file)
            took = _step("ingest", what, file, place, str(tiny))
            checked = _step("check", what, str(length), place)
            yield from _rows(what, length, made | took | checked)


def _rows(what: str, length: int, found: dict[str, Any]) -> Iterator[Row]:
    shape = f"{length}×{length}"
    name = f"{what} {shape}" + ("×3" if what == "picture" else "")
    yield row("large", f"{name}: decoded", found["decoded_mb"], "MB", against=f"{found['file_mb']} MB on disk")
    peak = round(found["peak_mb"])
    yield row(
        "large", f"{name}: peak memory of ingest" + (" and seal" if what == "picture" else ""), peak, "MB",
        against=f"{LIMIT_MB} MB", ratio=round(peak / LIMIT_MB, 3), goal="<= 1 GiB", holds=peak <= LIMIT_MB,
    )  # fmt: skip
    yield row("large", f"{name}: ingest", found["ingest_s"], "s")
    if what == "picture":
        yield row("large", f"{name}: seal, with levels", found["seal_s"], "s")
    yield row("large", f"{name}: stored", found["stored_mb"], "MB")
    yield row("large", f"{name}: tiles", found["tiles"], "tiles")
    yield row("large", f"{name}: tiles stored, equal ones once", found["tiles_written"], "tiles")
    yield row(
        "large", f"{name}: sampled tiles that are bit for bit what was made", found["right"], "tiles",
        against=found["sampled"], goal="all", holds=found["right"] == found["sampled"],
    )  # fmt: skip


def _step(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.large", *arguments], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[1], env=dict(os.environ),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"large {arguments[0]} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


# -- what is made: a pure function of the place, so that any part can be checked without the whole


def picture_rows(start: int, stop: int, width: int) -> NDArray[np.uint8]:
    """Rows of a picture: windows of plain colour with lines of noise that looks like text, as on a screen."""
    parts: list[NDArray[np.uint8]] = []
    for strip in range(start // STRIP, -(-stop // STRIP)):
        rng = np.random.default_rng(strip)
        pixels = np.repeat(rng.integers(0, 256, (1, -(-width // 160), 3), dtype=np.uint8), 160, axis=1)[:, :width]
        pixels = np.repeat(pixels, STRIP, axis=0)
        for line in range(8, STRIP - 12, 18):
            ink = rng.random((12, width)) < 0.3
            pixels[line : line + 12][ink] = rng.integers(0, 80, 3, dtype=np.uint8)
        pixels[40:52, ::7] += rng.integers(0, 8, (12, -(-width // 7), 3), dtype=np.uint8)
        parts.append(pixels)
    return np.concatenate(parts)[start % STRIP :][: stop - start]


def islands(side: int) -> list[tuple[int, int, NDArray[np.uint8]]]:
    """(row, column, values) of what is not zero in the array."""
    rng = np.random.default_rng(7)
    size = min(ISLAND, side // 4)
    places = [(int(rng.integers(side - size)), int(rng.integers(side - size))) for _ in range(ISLANDS)]
    return [(y, x, np.random.default_rng(y).integers(0, 256, (size, size), dtype=np.uint8)) for y, x in places]


def array_part(side: int, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
    """A part of the array."""
    out = np.zeros((height, width), dtype=np.uint8)
    for y, x, values in islands(side):
        a, b = max(y, top), min(y + len(values), top + height)
        c, d = max(x, left), min(x + values.shape[1], left + width)
        if a < b and c < d:
            out[a - top : b - top, c - left : d - left] = values[a - y : b - y, c - x : d - x]
    return out


def write_png(path: Path, side: int) -> None:
    """A PNG written strip by strip, its rows filtered in all five ways in turn."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(1)
    above = np.zeros((1, side, 3), dtype=np.uint8)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)))
        for start in range(0, side, STRIP):
            pixels = picture_rows(start, min(start + STRIP, side), side)
            file.write(chunk(b"IDAT", packer.compress(_filtered(np.concatenate([above, pixels])))))
            above = pixels[-1:]
        file.write(chunk(b"IDAT", packer.flush()) + chunk(b"IEND", b""))


def _filtered(rows: NDArray[np.uint8]) -> bytes:
    """PNG filters 0 to 4 in turn over all rows but the first, which is the one above them."""
    out = np.zeros((len(rows) - 1, 1 + rows[0].size), dtype=np.uint8)
    for number in range(len(out)):
        kind = number % 5
        here, up = rows[number + 1].astype(np.int16), rows[number].astype(np.int16)
        left, corner = (np.concatenate([np.zeros_like(one[:1]), one[:-1]]) for one in (here, up))
        if kind == 4:
            a, b, c = (np.abs(left + up - corner - one) for one in (left, up, corner))
            guess = np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))
        else:
            guess = (np.zeros_like(here), left, up, (left + up) >> 1)[kind]
        out[number, 0] = kind
        out[number, 1:] = (here - guess).astype(np.uint8).reshape(-1)
    return out.tobytes()


def write_npy(path: Path, side: int) -> None:
    """An array whose zeros are a hole in the file."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (side, side)}
        )  # fmt: skip
        offset = file.tell()
        file.truncate(offset + side * side)
        for y, x, values in islands(side):
            for number, line in enumerate(values):
                file.seek(offset + (y + number) * side + x)
                file.write(line.tobytes())


# -- the steps


def make(what: str, side: str, file: str) -> dict[str, Any]:
    """Write the input."""
    (write_png if what == "picture" else write_npy)(Path(file), int(side))
    disk = Path(file).stat().st_blocks * 512
    return {"decoded_mb": int(side) ** 2 * (3 if what == "picture" else 1) // 10**6, "file_mb": disk // 10**6}


def ingest(what: str, file: str, place: str, tiny: str) -> dict[str, Any]:
    """Ingest it into a new repository, as a user would; the picture is sealed, which makes its levels."""
    import him
    from him.adapters import png

    if tiny == "True":
        # A small picture takes the way of a large one.
        png.IMAGE_PIXELS_MAX = 0
    began = time.perf_counter()
    with him.open(place, create=True) as repo:
        (report,) = repo.ingest(file, "main")
        ingested = time.perf_counter()
        if what == "picture":
            repo.snapshot("main").seal()
        sealed = time.perf_counter()
        return {
            "peak_mb": _peak_mb(),
            "ingest_s": round(ingested - began, 2),
            "seal_s": round(sealed - ingested, 2),
            "stored_mb": round(repo.stored_bytes() / 1e6, 1),
            "tiles": report.tiles_written + report.tiles_reused,
            "tiles_written": report.tiles_written,
        }


def check(what: str, side: str, place: str) -> dict[str, int]:
    """Compare sampled tiles, and of the picture one of level 1, with what was made."""
    import him

    length, stream = int(side), "screen" if what == "picture" else "kv_cache"
    last = -(-length // TILE) - 1
    cells = {(0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 3), (last // 3, last // 2)}
    if what == "array":
        cells |= {((y + 300) // TILE, (x + 300) // TILE) for y, x, _ in islands(length)}
    right = 0
    with him.open(place) as repo:
        (frame,) = repo.snapshot("main").frames(stream)
        for y, x in sorted(cells):
            found = repo.snapshot("main").get(stream, frame=frame.name, y=y, x=x)
            right += np.array_equal(np.asarray(found), _made(what, length, y * TILE, x * TILE, TILE))
        if what == "picture":
            found = repo.snapshot("main").get(stream, frame=frame.name, level=1, y=0, x=last // 2)
            below = _made(what, length, 0, last // 2 * 2 * TILE, 2 * TILE).astype(np.int64)
            below = np.pad(below, [(0, n % 2) for n in below.shape[:2]] + [(0, 0)], mode="edge")
            total = below[0::2, 0::2] + below[0::2, 1::2] + below[1::2, 0::2] + below[1::2, 1::2]
            right += np.array_equal(np.asarray(found), ((total + 2) >> 2).astype(np.uint8))
    return {"sampled": len(cells) + (what == "picture"), "right": int(right)}


def _made(what: str, side: int, top: int, left: int, size: int) -> NDArray[np.uint8]:
    high, wide = min(size, side - top), min(size, side - left)
    if what == "array":
        return array_part(side, top, left, high, wide)
    return picture_rows(top, top + high, side)[:, left : left + wide]


if __name__ == "__main__":
    print(json.dumps({"make": make, "ingest": ingest, "check": check}[sys.argv[1]](*sys.argv[2:])))
