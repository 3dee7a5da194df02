"""The write path: what goes in comes out, what is there already costs nothing, and bad input leaves no trace."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from fakes import WORDS, FakeEncoder, FakeReader, Stack, new_disk, picture
from hypothesis import given, settings
from hypothesis import strategies as st

import him
from him.config import ROWS_PER_APPEND_MAX, STREAMS
from him.errors import ConflictError, HimError, LimitError, NotFoundError, UsageError
from him.index import row_texts
from him.types import Scene, StreamSpec, TileKey


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()


@pytest.fixture
def stack() -> Stack:
    return Stack(new_disk())


@pytest.fixture
def repo(tmp_path: Path):
    with him.open(tmp_path / "r", create=True, reader=FakeReader(), encoder=FakeEncoder()) as opened:
        yield opened


# -- pictures


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**16))
@settings(max_examples=12)
def test_a_picture_comes_back_pixel_for_pixel(height: int, width: int, seed: int) -> None:
    stack = Stack(new_disk())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    report = stack.ingest.picture("main", "f", pixels)
    assert report.tiles_written == -(-height // 512) * -(-width // 512)
    np.testing.assert_array_equal(stack.at("main").array("screen", "f"), pixels)


def test_screen_scene_and_vectors_become_visible_in_one_record(stack: Stack) -> None:
    stack.history.writable("main")
    before = stack.log.head()[0]
    report = stack.ingest.picture("main", "login", picture(200, 700, {(20, 20): "Submit", (90, 540): "Cancel"}))
    assert stack.log.head()[0] == before + 1
    reader = stack.at("main")
    assert [one.stream for one in reader.frames()] == ["emb", "scene", "screen"]
    seen = msgspec.json.decode(reader.document("scene", "login"), type=Scene)
    assert {"Submit", "Cancel"} <= {node.text for node in seen.nodes}
    assert report.elements == len(seen.nodes)
    np.testing.assert_array_equal(reader.array("emb", "login"), stack.encoder.encode(row_texts(seen)))
    # The scene names the tiles it was read from, so that a query can verify them.
    for row, column, blob in seen.tiles:
        entry = reader.entry(TileKey("screen", "login", 0, row, column))
        assert entry is not None
        assert entry.ref.hex() == blob
    assert len(seen.tiles) == 2


def test_a_picture_without_any_element_is_stored_too(stack: Stack) -> None:
    report = stack.ingest.picture("main", "blank", np.full((30, 30, 3), 255, dtype=np.uint8))
    assert report.elements == 0
    assert [one.stream for one in stack.at("main").frames()] == ["scene", "screen"]
    assert stack.fsck().ok


def test_a_picture_that_loses_its_elements_loses_their_vectors(stack: Stack) -> None:
    stack.ingest.picture("main", "f", picture(60, 200, {(10, 10): "Submit"}))
    stack.ingest.picture("main", "f", np.full((60, 200, 3), 255, dtype=np.uint8))
    assert [one.stream for one in stack.at("main").frames()] == ["scene", "screen"]


def test_the_same_picture_again_is_no_work_and_no_record(stack: Stack) -> None:
    pixels = picture(600, 700, {(20, 20): "Submit", (560, 600): "Help"})
    first = stack.ingest.picture("main", "f", pixels)
    head, detections, encoded = stack.log.head(), stack.reader.detections, stack.encoder.encoded
    again = stack.ingest.picture("main", "f", pixels)
    assert (again.tiles_written, again.tiles_reused, again.bytes_stored, again.tiles_read) == (0, 4, 0, 0)
    assert again.elements == first.elements
    assert (stack.log.head(), stack.reader.detections, stack.encoder.encoded) == (head, detections, encoded)


def test_a_picture_is_put_back_after_one_of_its_tiles_was_overwritten(stack: Stack) -> None:
    pixels = picture(600, 700, {(20, 20): "Submit"})
    stack.ingest.picture("main", "f", pixels)
    stack.ingest.tiles("main", "screen", "f", {(0, 1): np.zeros((512, 188, 3), dtype=np.uint8)})
    stack.ingest.picture("main", "f", pixels)
    np.testing.assert_array_equal(stack.at("main").array("screen", "f"), pixels)


def test_a_scene_that_is_none_is_replaced(stack: Stack) -> None:
    stack.ingest.tiles("main", "scene", "f", {(0, 0): b"no scene"})
    stack.ingest.picture("main", "f", picture(60, 200, {(20, 20): "Submit"}))
    assert b"Submit" in stack.at("main").document("scene", "f")


def test_the_same_picture_under_another_name_shares_its_tiles(stack: Stack) -> None:
    pixels = picture(600, 700, {(20, 20): "Submit"}, noise=1)
    stack.ingest.picture("main", "f", pixels)
    detections = stack.reader.detections
    again = stack.ingest.picture("main", "g", pixels)
    assert (again.tiles_written, again.tiles_reused, again.tiles_read) == (0, 4, 0)
    assert stack.reader.detections == detections
    assert again.bytes_stored < 6_000


def test_another_reader_reads_again(stack: Stack) -> None:
    pixels = picture(60, 200, {(10, 10): "Submit"})
    stack.ingest.picture("main", "f", pixels)
    stack.ingest._reader = other = FakeReader("another pin")
    report = stack.ingest.picture("main", "f", pixels)
    assert other.detections == 1
    assert report.tiles_read == 1
    assert report.tiles_reused == 1


def test_another_encoder_embeds_again(stack: Stack) -> None:
    pixels = picture(60, 200, {(10, 10): "Submit"})
    stack.ingest.picture("main", "f", pixels)
    before = stack.at("main").array("emb", "f")
    stack.ingest._encoder = FakeEncoder("another model")
    stack.ingest.picture("main", "f", pixels)
    assert (stack.at("main").array("emb", "f") != before).any()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((5, 5), dtype=np.uint8),
        np.zeros((5, 5, 4), dtype=np.uint8),
        np.zeros((5, 5, 3), dtype=np.float32),
        np.zeros((0, 5, 3), dtype=np.uint8),
    ],
    ids=["grey", "rgba", "float", "empty"],
)
def test_what_is_no_picture_is_refused_and_leaves_nothing(stack: Stack, pixels: np.ndarray) -> None:
    with pytest.raises(UsageError):
        stack.ingest.picture("main", "f", pixels)
    assert not stack.history.refs()
    assert not stack.history.snapshots()


def test_a_failing_reader_leaves_nothing_visible(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.ingest.picture("main", "f", picture(60, 200, {(10, 10): "Submit"}))
    before = stack.content()
    for number, (port, name) in enumerate(
        [(stack.encoder, "encode"), (stack.reader, "recognise"), (stack.reader, "detect")]
    ):
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise MemoryError

            patch.setattr(port, name, fail)
            with pytest.raises(MemoryError):
                stack.ingest.picture("main", "f", picture(90, 210, {(30, 30): WORDS[number + 1]}))
        assert stack.content() == before
    stack.ingest.picture("main", "f", picture(90, 210, {(30, 30): "Delete"}))
    assert stack.fsck().ok


# -- arrays, tiles, rows


@given(st.sampled_from(["float16", "float32", "int8", "bool", "float64"]), st.integers(0, 2**16))
@settings(max_examples=15)
def test_a_kv_tensor_comes_back_in_its_own_shape(dtype: str, seed: int) -> None:
    stack = Stack(new_disk())
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 4)), 2, int(rng.integers(1, 4)), int(rng.integers(1, 700)), int(rng.integers(1, 9)))
    tensor = (rng.standard_normal(shape) * 9).astype(dtype)
    stack.ingest.array("main", "kv_cache", "chat", tensor)
    found = stack.at("main").array("kv_cache", "chat")
    assert (found.dtype, found.shape, found.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())


def test_caches_with_one_prefix_share_its_tiles(stack: Stack) -> None:
    long = np.random.default_rng(1).standard_normal((2, 2, 2, 1536, 4)).astype(np.float16)
    stack.ingest.array("main", "kv_cache", "a", long[:, :, :, :1024])
    report = stack.ingest.array("main", "kv_cache", "b", long)
    assert (report.tiles_written, report.tiles_reused) == (1, 2)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (5, 7, 2), (1000,), (513, 513)])
def test_arrays_come_back(stack: Stack, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).standard_normal(shape)
    stack.ingest.array("main", "kv_cache", "a", values)
    assert stack.at("main").array("kv_cache", "a").reshape(shape).tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("stream", "values"),
    [
        ("kv_cache", np.zeros((1, 1, 1, 1))),
        ("kv_cache", np.zeros((2, 0))),
        ("kv_cache", np.zeros(())),
        ("kv_cache", np.array(["a", "b"])),
        ("emb", np.zeros((3, 3), dtype=np.float32)),
        ("screen", np.zeros((3, 3, 3), dtype=np.int16)),
        ("logs", np.zeros((3, 3))),
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_leave_nothing(stack: Stack, stream: str, values: np.ndarray) -> None:
    with pytest.raises(UsageError):
        stack.ingest.array("main", stream, "f", values)
    assert not stack.history.snapshots()
    with pytest.raises(NotFoundError):
        stack.ingest.array("main", "nowhere", "f", np.zeros((2, 2)))
    assert not stack.history.snapshots()


@pytest.mark.parametrize(
    ("stream", "cells"),
    [
        ("skills", {}),
        ("skills", {(-1, 0): b"x"}),
        ("skills", {(0, 2**31): b"x"}),
        ("skills", {(0, 0): np.zeros((2, 2))}),
        ("screen", {(0, 0): b"x"}),
        ("screen", {(0, 0): np.zeros((2, 2))}),
        ("screen", {(0, 0): np.zeros((513, 2), dtype=np.uint8)}),
        ("screen", {(0, 0): np.zeros((2,), dtype=np.uint8)}),
        ("screen", {(0, 0): np.zeros((2, 2), dtype=np.uint8), (0, 1): np.zeros((2, 2, 3), dtype=np.uint8)}),
    ],
)
def test_tiles_that_do_not_fit_are_refused_and_leave_nothing(stack: Stack, stream: str, cells: dict) -> None:
    with pytest.raises(HimError) as caught:
        stack.ingest.tiles("main", stream, "f", cells)
    assert isinstance(caught.value, UsageError | ConflictError)
    assert not stack.history.snapshots()


def test_cells_far_apart_cost_pages_not_memory(stack: Stack) -> None:
    stack.ingest.tiles("main", "skills", "f", {(2**31 - 1, 0): b"far", (0, 0): b"near", (5, 10**6): b"wide"})
    reader = stack.at("main")
    assert reader.tile(TileKey("skills", "f", 0, 2**31 - 1, 0)) == b"far"
    assert len(list(reader.keys("skills", "f"))) == 3
    assert stack.fsck().ok


def test_rows_are_json_and_bounded(stack: Stack) -> None:
    with pytest.raises(UsageError):
        stack.ingest.append("main", "logs", [object()], writer="w")
    with pytest.raises(LimitError):
        stack.ingest.append("main", "logs", [], writer="w")
    with pytest.raises(LimitError):
        stack.ingest.append("main", "logs", [1] * (ROWS_PER_APPEND_MAX + 1), writer="w")
    with pytest.raises(UsageError):
        stack.ingest.append("main", "screen", [1], writer="w")
    assert not stack.history.snapshots()


@pytest.mark.parametrize("name", ["", "a/b:c d", "ü" * 127, "Ａ"])
def test_frames_bear_any_name(stack: Stack, name: str) -> None:
    stack.ingest.tiles("main", "skills", name, {(0, 0): b"x"})
    assert stack.at("main").document("skills", name) == b"x"


def test_names_are_compared_in_one_normal_form(stack: Stack) -> None:
    stack.ingest.tiles("main", "skills", "cafe\u0301", {(0, 0): b"x"})
    stack.ingest.array("main", "kv_cache", "cafe\u0301", np.ones((2, 2)))
    stack.ingest.picture("main", "cafe\u0301", picture(50, 200, {(10, 10): "Help"}))
    assert stack.at("main").document("skills", "caf\u00e9") == b"x"
    assert stack.at("main").document("skills", "cafe\u0301") == b"x"
    assert {frame.name for frame in stack.at("main").frames()} == {"caf\u00e9"}


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "x" * 256, "ü" * 128])
def test_impossible_frame_names_are_refused(stack: Stack, name: str) -> None:
    for write in (
        lambda: stack.ingest.tiles("main", "skills", name, {(0, 0): b"x"}),
        lambda: stack.ingest.array("main", "kv_cache", name, np.zeros((2, 2))),
        lambda: stack.ingest.picture("main", name, picture(50, 50, {})),
    ):
        with pytest.raises(UsageError):
            write()
    assert not stack.history.snapshots()


def test_a_quantised_stream_hands_back_its_logical_dtype(stack: Stack) -> None:
    stack.history.declare_stream(StreamSpec("kv8", tile_height=16, tile_width=16, quantise="int8"))
    values = np.random.default_rng(1).standard_normal((40, 20, 4)).astype(np.float32)
    stack.ingest.array("main", "kv8", "f", values)
    found = stack.at("main").array("kv8", "f")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values, atol=np.abs(values).max() / 254 * 1.01)


# -- files


def folder(tmp_path: Path, count: int) -> Path:
    place = tmp_path / "pictures"
    for number in range(count):
        file = place / f"day {number % 2}" / f"p{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(picture(60, 220, {(10, 10): WORDS[number % len(WORDS)]}, noise=number)))
    return place


def test_a_folder_is_stored_by_relative_path(repo: him.Repository, tmp_path: Path) -> None:
    reports = list(repo.ingest(folder(tmp_path, 4), "main"))
    names = ["day 0/p0", "day 0/p2", "day 1/p1", "day 1/p3"]
    assert [report.frame for report in reports] == names
    assert [frame.name for frame in repo.snapshot("main").frames("screen")] == names


def test_an_interrupted_folder_is_resumed(tmp_path: Path) -> None:
    place, path = folder(tmp_path, 6), tmp_path / "r"
    with him.open(path, create=True, reader=FakeReader(), encoder=FakeEncoder()) as repo:
        some = repo.ingest(place, "main")
        assert len([next(some) for _ in range(3)]) == 3
    reader = FakeReader()
    with him.open(path, reader=reader, encoder=FakeEncoder()) as repo:
        reports = list(repo.ingest(place, "main"))
        assert [report.tiles_written for report in reports] == [0, 0, 0, 1, 1, 1]
        assert [report.bytes_stored == 0 for report in reports] == [True] * 3 + [False] * 3
        assert reader.detections == 3
        assert len(repo.snapshot("main").frames("screen")) == 6
        assert repo.fsck().ok


def test_two_files_for_one_frame_are_refused_before_anything_is_stored(repo: him.Repository, tmp_path: Path) -> None:
    place = folder(tmp_path, 2)
    (place / "day 0" / "p0.jpg").write_bytes(cv2.imencode(".jpg", picture(9, 9, {}))[1].tobytes())
    with pytest.raises(UsageError, match="p0"):
        list(repo.ingest(place, "main"))
    assert not repo.snapshots()


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it is side × side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99_999))) + chunk(b"IEND", b"")
    )


WHOLE = png(picture(80, 300, {(10, 10): "Submit"}, noise=3))


def npy(values: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(values), allow_pickle=True)
    return out.getvalue()


BAD: dict[str, tuple[str, bytes, type[HimError]]] = {
    "truncated png": ("x.png", WHOLE[: len(WHOLE) // 2], UsageError),
    "png header alone": ("x.png", WHOLE[:33], UsageError),
    "altered png": ("x.png", WHOLE[:60] + b"\xff\xff" + WHOLE[62:], UsageError),
    "empty png": ("x.png", b"", UsageError),
    "text as png": ("x.png", b"<html>", UsageError),
    "decompression bomb": ("x.png", bomb(100_000), LimitError),
    "half a bomb": ("x.png", bomb(9_000), UsageError),
    "objects": ("x.npy", npy([{"a": 1}]), UsageError),
    "strings": ("x.npy", npy(["a", "b"]), UsageError),
    "truncated npy": ("x.npy", npy(np.zeros((9, 9)))[:-9], UsageError),
    "no npy": ("x.npy", b"PK\x03\x04", UsageError),
    "empty npy": ("x.npy", b"", UsageError),
    "npy with a zero side": ("x.npy", npy(np.zeros((0, 4))), UsageError),
    "unknown kind": ("x.docx", b"hello", UsageError),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_give_one_clear_error_and_leave_nothing(repo: him.Repository, tmp_path: Path, what: str) -> None:
    name, data, kind = BAD[what]
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(kind) as caught:
        list(repo.ingest(file, "main"))
    assert "\n" not in caught.value.line()
    assert caught.value.fix
    assert not repo.snapshots(), "not even an empty branch"
    assert repo.fsck().ok
    good = tmp_path / "good.png"
    good.write_bytes(WHOLE)
    assert len(list(repo.ingest(good, "main"))) == 1


def test_a_bad_picture_in_a_folder_keeps_what_came_before(repo: him.Repository, tmp_path: Path) -> None:
    place = folder(tmp_path, 3)
    (place / "day 0" / "p1.png").write_bytes(WHOLE[:100])
    reports = []
    with pytest.raises(UsageError, match="picture"):
        for report in repo.ingest(place, "main"):
            reports.append(report.frame)
    assert reports == ["day 0/p0"]
    assert [frame.name for frame in repo.snapshot("main").frames("screen")] == ["day 0/p0"]
    assert repo.fsck().ok


def test_missing_files_and_misplaced_options_are_said_so(repo: him.Repository, tmp_path: Path) -> None:
    place = folder(tmp_path, 1)
    with pytest.raises(NotFoundError):
        list(repo.ingest(tmp_path / "nowhere.png", "main"))
    with pytest.raises(UsageError):
        list(repo.ingest(place, "main", frame="f"))
    with pytest.raises(UsageError):
        list(repo.ingest(next(place.rglob("*.png")), "main", stream="kv_cache"))
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError):
        list(repo.ingest(tmp_path / "none", "main"))
    assert not repo.snapshots()


def test_built_in_streams_can_all_be_written(stack: Stack) -> None:
    for name, spec in STREAMS.items():
        value = b"x" if spec.content == "bytes" else np.zeros((4, 4), dtype=spec.dtype or "float32")
        stack.ingest.tiles("main", name, "f", {(0, 0): value})
    assert len(stack.at("main").frames()) == len(STREAMS)
    stack.history.seal("main")
    assert stack.fsck().ok


def test_a_deletion_does_not_grow_a_frame_that_became_smaller_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(new_disk())
    large, small = (np.ones((side, side), dtype=np.uint8) for side in (1_200, 300))
    stack.ingest.array("main", "kv_cache", "f", large)
    writable = stack.history.writable

    def late(name: str) -> object:
        monkeypatch.setattr(stack.history, "writable", writable)
        stack.ingest.array("main", "kv_cache", "f", small)
        return writable(name)

    monkeypatch.setattr(stack.history, "writable", late)
    stack.ingest.tiles("main", "kv_cache", "f", {(1, 1): None})
    frame = stack.at("main").frame("kv_cache", "f")
    assert (frame.height, frame.width) == (300, 300)
    stack.close()
