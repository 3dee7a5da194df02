"""Arrays and pictures that are read part by part: the same values as read whole, and no trace of what is damaged."""

import io
import os
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from fakes import Stack, new_disk, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import him
from him import ingest
from him.adapters import npy, png
from him.adapters.npy import NpyFile
from him.adapters.pillow import PillowDecoder
from him.adapters.png import PngFile
from him.config import BATCHES_AHEAD
from him.errors import HimError, LimitError, UsageError
from him.types import StreamSpec, TileKey

Array = NDArray[np.generic]
Box = tuple[tuple[int, ...], tuple[int, ...]]

# -- PNG


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int, height: int, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def filtered(pixels: NDArray[np.uint8], filters: Sequence[int]) -> bytes:
    """Rows of (h, w, c) filtered in the given ways, byte by byte as the PNG standard has it."""
    height, width, channels = pixels.shape
    lines = pixels.reshape(height, -1).astype(int)
    out = bytearray()
    for number, kind in enumerate(filters):
        up = lines[number - 1] if number else np.zeros(width * channels, dtype=int)
        out.append(kind)
        for at, value in enumerate(lines[number]):
            left = lines[number][at - channels] if at >= channels else 0
            corner = up[at - channels] if at >= channels else 0
            near = sorted(
                (abs(left + up[at] - corner - one), rank, one) for rank, one in enumerate((left, up[at], corner))
            )
            out.append((value - (0, left, up[at], (left + up[at]) // 2, near[0][2])[kind]) % 256)
    return bytes(out)


def png_of(pixels: NDArray[np.uint8], filters: Sequence[int], part: int = 50, colour: int | None = None) -> bytes:
    """A PNG with its data in parts of some bytes."""
    height, width, channels = pixels.shape
    data = zlib.compress(filtered(pixels, filters))
    parts = [chunk(b"IDAT", data[at : at + part]) for at in range(0, len(data), part)]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels] if colour is None else colour
    return b"\x89PNG\r\n\x1a\n" + header(width, height, colour=kind) + b"".join(parts) + chunk(b"IEND", b"")


def in_bands(file: Path, rows: int) -> NDArray[np.uint8]:
    source = PngFile(file)
    try:
        source.check()
        height, width, _ = source.shape
        bands = [source.part((at, 0, 0), (min(at + rows, height), width, 3)).copy() for at in range(0, height, rows)]
    finally:
        source.close()
    return np.concatenate(bands)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 10), st.integers(1, 60), st.data())
@settings(max_examples=60)
def test_bands_of_a_png_are_the_whole_png(
    height: int, width: int, channels: int, rows: int, part: int, data: st.DataObject
) -> None:
    """Every filter after every other, data cut anywhere, bands of any height."""
    filters = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    pixels = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    whole = png_of(pixels, filters, part)
    with scratch(whole) as file:
        np.testing.assert_array_equal(in_bands(file, rows), PillowDecoder().decode(whole, "x"))
        if channels == 3:
            np.testing.assert_array_equal(in_bands(file, rows), pixels)


@contextmanager
def scratch(data: bytes) -> Iterator[Path]:
    """A file for one hypothesis example."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        file.write_bytes(data)
        yield file


@pytest.mark.parametrize("rows", [1, 100, 512])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "L transparent", "P transparent", "RGB transparent"])
def test_pictures_of_every_mode_look_as_they_do_whole(mode: str, rows: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    kind, _, clear = mode.partition(" ")
    pixels = rng.integers(0, 256, (333, 70, {"LA": 2, "RGBA": 4}.get(kind, 3)), dtype=np.uint8)
    if kind == "L":
        picture = Image.fromarray(pixels[..., 0], "L")
    elif kind == "P":
        picture = Image.fromarray(pixels, "RGB").quantize(200)
    else:
        picture = Image.fromarray(pixels, kind)
    key = {"RGB": tuple(int(n) for n in pixels[1, 1])}.get(kind, 7)
    picture.save(tmp_path / "x.png", **({"transparency": key} if clear else {}))
    wanted = PillowDecoder().decode((tmp_path / "x.png").read_bytes(), "x")
    np.testing.assert_array_equal(in_bands(tmp_path / "x.png", rows), wanted)


def test_a_row_wider_than_a_band_is_a_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "IMAGE_BAND_BYTES", 100)
    pixels = np.random.default_rng(1).integers(0, 256, (20, 300, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), pixels[..., ::-1])
    np.testing.assert_array_equal(in_bands(tmp_path / "x.png", 7), pixels)


GOOD = png_of(np.random.default_rng(2).integers(0, 256, (40, 30, 3), dtype=np.uint8), [n % 5 for n in range(40)], 500)
PIXELS = np.zeros((4, 5, 3), dtype=np.uint8)


def turned() -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS, "RGB").save(out, "PNG", exif=exif)
    return out.getvalue()


def with_data(data: bytes, head: bytes = header(5, 4)) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


PLAIN = filtered(PIXELS, [0] * 4)
BAD: dict[str, tuple[bytes, type[HimError]]] = {
    "cut in its data": (GOOD[:-700], UsageError),
    "cut before its end": (GOOD[:-12], UsageError),
    "a flipped bit": (GOOD[:300] + bytes([GOOD[300] ^ 4]) + GOOD[301:], UsageError),
    "no data": (b"\x89PNG\r\n\x1a\n" + header(5, 4) + chunk(b"IEND", b""), UsageError),
    "rows missing": (with_data(zlib.compress(PLAIN[:-16])), UsageError),
    "rows too many": (with_data(zlib.compress(PLAIN + PLAIN[:16])), UsageError),
    "the stream's sum missing": (with_data(zlib.compress(PLAIN)[:-4]), UsageError),
    "the stream's sum wrong": (with_data(zlib.compress(PLAIN)[:-1] + b"!"), UsageError),
    "no stream": (with_data(b"hello"), UsageError),
    "an unknown filter": (with_data(zlib.compress(b"\x05" + PLAIN[1:])), UsageError),
    "interlaced": (with_data(zlib.compress(PLAIN), header(5, 4, interlaced=1)), UsageError),
    "16 bits": (with_data(zlib.compress(bytes(4 * 31)), header(5, 4, depth=16)), UsageError),
    "an unknown colour type": (with_data(zlib.compress(PLAIN), header(5, 4, colour=5)), UsageError),
    "a bomb": (with_data(zlib.compress(PLAIN), header(2**31 - 1, 2**31 - 1)), LimitError),
    "half a bomb": (with_data(zlib.compress(PLAIN), header(40_000, 40_000)), UsageError),
    "lying on its side": (turned(), UsageError),
    "a huge text": (
        b"\x89PNG\r\n\x1a\n" + header(5, 4) + struct.pack(">I", 2**30) + b"tEXt" + bytes(99),
        UsageError,
    ),
}


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A repository for which every PNG is a large one."""
    monkeypatch.setattr(png, "IMAGE_PIXELS_MAX", 0)
    with him.open(tmp_path / "r", create=True) as opened:
        yield opened


@pytest.mark.parametrize("what", BAD)
def test_a_bad_large_picture_gives_one_clear_error_and_leaves_nothing(
    what: str, repo: him.Repository, tmp_path: Path
) -> None:
    data, kind = BAD[what]
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(kind) as caught:
        list(repo.ingest(tmp_path / "x.png", "main"))
    assert caught.value.fix
    assert "x.png" in caught.value.object
    assert not repo.snapshots(), "not even an empty branch"
    (tmp_path / "good.png").write_bytes(GOOD)
    assert len(list(repo.ingest(tmp_path / "good.png", "main"))) == 1


@pytest.mark.parametrize("at", range(0, len(GOOD) - 1, 97))
def test_a_png_cut_anywhere_is_refused(at: int, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(GOOD[:at])
    with pytest.raises(UsageError):
        in_bands(tmp_path / "x.png", 7)


def test_a_large_picture_is_stored_with_its_levels_and_says_that_it_was_not_read(
    repo: him.Repository, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (1100, 700, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "map.png"), pixels[..., ::-1])
    (report,) = repo.ingest(tmp_path / "map.png", "main")
    assert (report.stream, report.frame, report.tiles_written, report.elements) == ("screen", "map", 6, 0)
    assert "too large" in str(report.as_json()["note"])
    np.testing.assert_array_equal(repo.snapshot("main").array("screen", frame="map"), pixels)
    repo.snapshot("main").seal()
    apex = repo.snapshot("main").get("screen", frame="map", level=2)
    assert isinstance(apex, np.ndarray)
    assert apex.shape == (275, 175, 3)
    assert repo.fsck().ok
    with pytest.raises(UsageError, match="tree"):
        (tmp_path / "tree.json").write_text("[]")
        list(repo.ingest(tmp_path / "map.png", "main", tree=tmp_path / "tree.json"))


# -- .npy


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    begin = tuple(draw(st.integers(0, length - 1)) for length in shape)
    end = tuple(draw(st.integers(start + 1, length)) for start, length in zip(begin, shape, strict=True))
    return shape, (begin, end)


@given(boxes(), st.sampled_from(["u1", "<f4", ">i2", "c8"]), st.booleans())
def test_parts_of_an_npy_file_are_parts_of_its_array(
    given_box: tuple[tuple[int, ...], Box], dtype: str, turned: bool
) -> None:
    shape, (begin, end) = given_box
    values = np.arange(1, 1 + int(np.prod(shape))).reshape(shape).astype(dtype)
    out = io.BytesIO()
    np.save(out, np.asfortranarray(values) if turned else values)
    with scratch(out.getvalue()) as path:
        source = NpyFile(path)
        try:
            found = source.part(begin, end)
        finally:
            source.close()
    assert found is not None
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))])


def sparse(path: Path, side: int, islands: Sequence[tuple[int, int]]) -> None:
    """A uint8 array whose zeros were never written."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (side, side)})
        offset = file.tell()
        file.truncate(offset + side * side)
        for row, column in islands:
            file.seek(offset + row * side + column)
            file.write(b"\x07")


@pytest.mark.parametrize("holes", [True, False])
def test_holes_are_zeros_and_are_not_read(holes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side, islands = 3_000_000 // 1000, [(0, 0), (1500, 2999), (2999, 2999)]
    sparse(tmp_path / "x.npy", side, islands)
    read, real = [0], os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        done = real(descriptor, buffers, offset)
        read[0] += done
        return done

    monkeypatch.setattr(npy.os, "preadv", counted)
    if not holes:

        def unknown(*_: int) -> int:
            raise OSError(22, "no holes here")

        monkeypatch.setattr(npy.os, "lseek", unknown)
    source = NpyFile(tmp_path / "x.npy")
    try:
        for top in range(0, side, 500):
            wanted = np.zeros((500, side), dtype=np.uint8)
            for row, column in islands:
                if top <= row < top + 500:
                    wanted[row - top, column] = 7
            found = source.part((top, 0), (top + 500, side))
            assert (found is None) == (holes and not wanted.any())
            np.testing.assert_array_equal(np.zeros_like(wanted) if found is None else found, wanted)
    finally:
        source.close()
    assert read[0] < 200_000 if holes else read[0] == side * side


def test_a_file_cut_while_it_is_read_is_an_error_not_a_crash(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((1000, 1000)))
    source = NpyFile(tmp_path / "x.npy")
    try:
        assert source.part((0, 0), (10, 1000)) is not None
        os.truncate(tmp_path / "x.npy", 4_000_000)
        assert source.part((0, 0), (10, 1000)) is not None
        with pytest.raises(UsageError, match="cut"):
            source.part((400, 0), (600, 1000))
        with pytest.raises(UsageError, match="cut"):
            source.part((900, 0), (1000, 1000))
    finally:
        source.close()


# -- into tiles


class Parts:
    """An ArraySource over an array that counts what it handed out and what of it is alive."""

    def __init__(self, values: Array) -> None:
        self._values = values
        self.shape, self.dtype = values.shape, values.dtype
        self.alive = self.most = self.asked = 0

    def part(self, begin: Sequence[int], end: Sequence[int]) -> Array | None:
        values = self._values[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))].copy()
        self.asked += 1
        if not values.tobytes().strip(b"\0"):
            return None
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(values, self._gone)
        return values

    def _gone(self) -> None:
        self.alive -= 1


GRID = StreamSpec("grid", tile_height=8, tile_width=8, level_rule="mean")


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from(["u1", "<f4", "f2", ">i4"]),
    st.booleans(), st.integers(1, 3000), st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40)
def test_an_array_read_in_parts_is_stored_as_the_array_held(
    shape: list[int], dtype: str, sparse: bool, part_bytes: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 99, shape)
    if sparse:
        values[rng.random(shape[0]) < 0.7] = 0
    values = values.astype(dtype)
    directories = set()
    before = ingest.ARRAY_PART_BYTES
    try:
        for source in (values, Parts(values)):
            stack = Stack(new_disk())
            stack.history.declare_stream(GRID)
            ingest.ARRAY_PART_BYTES = part_bytes
            report = stack.ingest.array("main", "grid", "f", source)
            high, wide = (1, *shape)[:2] if len(shape) == 1 else shape[:2]
            assert report.tiles_written + report.tiles_reused == -(-high // 8) * -(-wide // 8)
            directories.add(stack.history.snapshot("main").directory)
            found = stack.at("main").array("grid", "f")
            np.testing.assert_array_equal(found.reshape(values.shape), values)
    finally:
        ingest.ARRAY_PART_BYTES = before
    assert len(directories) == 1


def test_a_kv_tensor_read_in_parts_comes_back_in_its_shape(tmp_path: Path) -> None:
    tensor = np.random.default_rng(1).standard_normal((2, 2, 3, 1100, 5)).astype(np.float16)
    for order in "CF":
        np.save(tmp_path / f"{order}.npy", np.asarray(tensor, order=order))
    with him.open(tmp_path / "r", create=True) as repo:
        for order in "CF":
            list(repo.ingest(tmp_path / f"{order}.npy", "main"))
            np.testing.assert_array_equal(repo.snapshot("main").array("kv_cache", frame=order), tensor)
        repo.snapshot("main").put_array("kv_cache", tensor, frame="held")
        roots = {frame.root for frame in repo.snapshot("main").frames("kv_cache")}
    assert len(roots) == 1


def test_a_part_is_forgotten_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "ARRAY_PART_BYTES", 8 * 8 * 4)
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)
    source = Parts(np.random.default_rng(0).integers(1, 9, (300, 200), dtype=np.uint8))
    stack.ingest.array("main", "grid", "f", source)
    assert source.asked == 38 * 7
    assert source.most <= BATCHES_AHEAD + 1
    assert source.alive == 0


def test_zeros_are_stored_like_anything_else_once(tmp_path: Path) -> None:
    sparse(tmp_path / "x.npy", 5000, [(4000, 4000)])
    with him.open(tmp_path / "r", create=True) as repo:
        (report,) = repo.ingest(tmp_path / "x.npy", "main")
        # Of zeros: one tile inside, one at each edge, one at the corner; and the one with a seven.
        assert (report.tiles_written, report.tiles_reused) == (5, 95)
        main = repo.snapshot("main")
        tile = main.get("kv_cache", frame="x", y=1, x=2)
        assert isinstance(tile, np.ndarray)
        assert tile.shape == (512, 512)
        assert not tile.any()
        assert int(main.array("kv_cache", frame="x").sum()) == 7


def test_minus_zero_is_not_zero() -> None:
    stack = Stack(new_disk())
    values = np.zeros((600, 600), dtype=np.float32)
    values[5, 5] = -0.0
    stack.ingest.array("main", "kv_cache", "f", values)
    found = stack.at("main").tile(TileKey("kv_cache", "f", 0, 0, 0))
    assert isinstance(found, np.ndarray)
    assert np.signbit(found[5, 5])
    assert found.tobytes() == values[:512, :512].tobytes()


def test_an_interrupted_array_leaves_nothing_visible_and_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "ARRAY_PART_BYTES", 8 * 8 * 4)
    stack = Stack(new_disk())
    stack.history.declare_stream(GRID)
    values = np.random.default_rng(0).integers(1, 9, (80, 80), dtype=np.uint8)
    stack.ingest.array("main", "grid", "f", values[:8, :8])
    before = stack.content()

    def stop(done: int, total: int, what: str) -> None:
        assert (total, what) == (100, "store")
        if done >= 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stack.ingest.array("main", "grid", "f", values, progress=stop)
    assert stack.content() == before
    report = stack.ingest.array("main", "grid", "f", values)
    assert report.tiles_reused >= 60
    np.testing.assert_array_equal(stack.at("main").array("grid", "f"), values)
    assert stack.fsck().ok


def test_a_screen_stored_as_an_array_loses_the_scene_it_had() -> None:
    stack = Stack(new_disk())
    stack.ingest.picture("main", "f", picture(200, 300, {(20, 20): "Submit"}))
    assert [frame.stream for frame in stack.at("main").frames()] == ["emb", "scene", "screen"]
    stack.ingest.array("main", "screen", "f", np.zeros((200, 300, 3), dtype=np.uint8))
    assert [frame.stream for frame in stack.at("main").frames()] == ["screen"]


@pytest.mark.parametrize(
    ("rule", "dtype", "error"), [("max", "complex64", UsageError), ("min-max", "float64", LimitError)]
)
def test_what_could_have_no_levels_is_refused_when_it_is_put(rule: str, dtype: str, error: type[HimError]) -> None:
    stack = Stack(new_disk())
    stack.history.declare_stream(StreamSpec("s", tile_height=512, tile_width=512, level_rule=rule))
    # 512 × 512 × 100 float64 fit a tile; twice the channels, above them, would not.
    shape = (512, 512, 1) if dtype == "complex64" else (512, 512, 100)
    values = np.broadcast_to(np.zeros((), dtype=dtype), shape)
    for put in (
        lambda: stack.ingest.array("main", "s", "f", values),
        lambda: stack.ingest.tiles("main", "s", "f", {(0, 0): np.asarray(values)}),
    ):
        with pytest.raises(error):
            put()
    assert not stack.history.snapshots()
