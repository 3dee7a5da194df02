"""Deltas: what comes back is what was stored, the encoding fits the change, and damaged bytes never get through."""

import functools
import itertools
import tracemalloc
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import pyzstd
import zstandard
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from him.config import (
    CLIENT_DELTA_BYTES_MAX,
    DELTA_DEPTH_MAX,
    DELTA_FLATTEN_RATIO,
    DELTA_LONG_BASE_BYTES,
    DELTA_TINY_BYTES,
    META_BYTES_MAX,
    TILE_BYTES_MAX,
)
from him.errors import IntegrityError, LimitError, UsageError
from him.tile import delta
from him.tile.codec import DTYPES, RAW, SHUFFLE_ZSTD, ZSTD, TileHeader, encode_array, encode_bytes
from him.tile.delta import BLOCKS, PATCH, XOR, ClientDelta, Delta, Link
from him.types import TileId

Array = NDArray[np.generic]
ANY_SIZE = 2**40
"""A full size that no delta is too large for."""
PARENT = TileId(bytes(range(32)))


def head(array: Array) -> TileHeader:
    return TileHeader(array.dtype.name, array.shape)


def document(data: bytes) -> TileHeader:
    return TileHeader("bytes", (len(data),))


def random_array(name: str, shape: tuple[int, ...], seed: int) -> Array:
    """Any bit pattern at all, NaN payloads included; every third seed gives zeros."""
    size = int(np.prod(shape)) * DTYPES[name].itemsize
    raw = np.random.default_rng(seed).bytes(size) if seed % 3 else bytes(size)
    return np.frombuffer(raw, dtype=DTYPES[name]).reshape(shape)


@st.composite
def changes(draw: st.DrawFn) -> tuple[Array, Array]:
    """(base, target): the same shape, some cells changed."""
    name = draw(st.sampled_from(["uint8", "int8", "float16", "float32", "bfloat16", "float8_e4m3fn", "int64"]))
    sides = st.integers(1, 40)
    shape = draw(st.one_of(
        st.tuples(st.integers(1, 300)), st.tuples(sides, sides), st.tuples(sides, sides, st.integers(1, 5)),
        st.tuples(sides, sides, st.integers(1, 3), st.integers(1, 3)),
    ))  # fmt: skip
    base = random_array(name, shape, draw(st.integers(0, 2**32 - 1)))
    target = base.copy()
    cells = target.view(np.uint8).reshape(-1)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, cells.size - 1))
        cells[start : start + draw(st.integers(1, 50))] = draw(st.integers(0, 255))
    return base, target


def screen(seed: int = 1, side: int = 512) -> NDArray[np.uint8]:
    """Text-like marks on flat areas: compresses as screens do."""
    rng = np.random.default_rng(seed)
    picture = np.full((side, side, 3), 245, dtype=np.uint8)
    for _ in range(side * 3):
        y, x = rng.integers(0, side, 2)
        picture[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = rng.integers(0, 256, 3)
    return picture


def noise(shape: tuple[int, ...], seed: int) -> NDArray[np.int8]:
    """What a quantised KV cache looks like to a compressor."""
    values = np.random.default_rng(seed).normal(0, 26, shape)
    return np.clip(np.rint(values), -127, 127).astype(np.int8)


def full_size(array: Array) -> int:
    return len(encode_array(array).stored)


def encoded(base: Array, target: Array) -> Delta:
    found = delta.encode(head(target), base.tobytes(), target.tobytes(), full_size(base))
    assert found is not None
    assert len(found.stored) <= DELTA_FLATTEN_RATIO * full_size(base)
    assert delta.decode(found.codec, head(target), base.tobytes(), found.stored) == target.tobytes()
    return found


# -- what comes back


@given(changes(), st.sampled_from([BLOCKS, XOR, PATCH]))
def test_every_encoding_gives_the_target_back(pair: tuple[Array, Array], codec: int) -> None:
    base, target = pair
    assume(codec != BLOCKS or base.ndim > 1)
    assume(codec != PATCH or base.nbytes >= 8)
    made = delta.encode_as(codec, head(target), base.tobytes(), target.tobytes())
    assert made.codec == codec
    assert delta.decode(codec, head(target), base.tobytes(), made.stored) == target.tobytes()


@given(changes())
def test_whatever_is_picked_gives_the_target_back(pair: tuple[Array, Array]) -> None:
    base, target = pair
    found = delta.encode(head(target), base.tobytes(), target.tobytes(), ANY_SIZE)
    if found is None:
        assert base.ndim == 1 and base.nbytes == 0
        return
    assert delta.decode(found.codec, head(target), base.tobytes(), found.stored) == target.tobytes()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))), st.integers(1, 40))
def test_a_base_of_another_height_is_as_good(target: NDArray[np.uint8], rows: int) -> None:
    base = np.resize(target, (rows, *target.shape[1:]))
    for codec in (BLOCKS, PATCH):
        assume(codec != PATCH or base.nbytes >= 8)
        made = delta.encode_as(codec, head(target), base.tobytes(), target.tobytes())
        assert delta.decode(codec, head(target), base.tobytes(), made.stored) == target.tobytes()


@given(st.binary(max_size=400), st.binary(max_size=400), st.integers(0, 400))
@example(b"\x37\xa4\x30\xec" + bytes(100), b"\x37\xa4\x30\xec" + bytes(101), 0)
def test_documents_come_back_whatever_their_sizes(base: bytes, more: bytes, at: int) -> None:
    target = base[:at] + more + base[at:]
    found = delta.encode(document(target), base, target, ANY_SIZE)
    if len(base) < 8:
        assert found is None
        return
    assert found is not None
    assert found.codec == PATCH
    assert delta.decode(PATCH, document(target), base, found.stored) == target


def test_views_are_as_good_as_bytes_and_nothing_is_changed_in_place() -> None:
    base, target = screen(), screen()
    target[40:60, 40:90] = 7
    data = bytearray(base.tobytes())
    for codec in (BLOCKS, XOR, PATCH):
        made = delta.encode_as(codec, head(target), memoryview(data), memoryview(target.tobytes()))
        stored = memoryview(b"x" + made.stored)[1:]
        found = delta.decode(codec, head(target), memoryview(data), stored)
        assert found == target.tobytes()
        assert found.readonly
        assert data == base.tobytes()
        assert not np.shares_memory(np.frombuffer(found, np.uint8), np.frombuffer(data, np.uint8))


def test_same_input_same_bytes() -> None:
    base, target = screen(3), screen(4)
    for codec in (BLOCKS, XOR, PATCH):
        made = [delta.encode_as(codec, head(target), base.tobytes(), target.tobytes()) for _ in range(2)]
        assert made[0] == made[1]


def test_a_patch_is_what_any_zstd_makes_and_reads() -> None:
    """The seam decodes with another library than it encodes with; both speak `zstd --patch-from`."""
    base, target = screen(5).tobytes(), screen(5)[37:].tobytes()
    prefix = pyzstd.ZstdDict(base, is_raw=True).as_prefix
    made = delta.encode_as(PATCH, document(target), base, target)
    assert pyzstd.decompress(made.stored, prefix) == target
    theirs = pyzstd.compress(target, {pyzstd.CParameter.windowLog: 22}, prefix)
    assert delta.decode(PATCH, document(target), base, theirs) == target


# -- which encoding


def test_scattered_pixels_are_kept_as_blocks() -> None:
    base, target = screen(), screen()
    for y, x in ((3, 3), (100, 350), (101, 351), (480, 20), (511, 511)):
        target[y, x] ^= 255
    found = encoded(base, target)
    assert found.codec == BLOCKS
    assert len(found.stored) < 300


def test_a_scroll_is_kept_as_a_patch() -> None:
    tall = screen(2, 600)
    base, target = tall[:512, :512].copy(), tall[37:549, :512].copy()
    found = encoded(base, target)
    assert found.codec == PATCH
    assert len(found.stored) < full_size(base) / 4


def test_a_drift_of_all_values_is_kept_as_xor() -> None:
    base = noise((128, 128, 16), 1)
    target = (base + (np.random.default_rng(2).random(base.shape) < 0.1)).astype(np.int8)
    assert encoded(base, target).codec == XOR


def test_a_drift_of_one_axis_is_kept_as_xor() -> None:
    base = np.random.default_rng(3).normal(size=50_000).astype(np.float32)
    target = base.copy()
    target.view(np.uint32)[::100] ^= 1
    assert encoded(base, target).codec == XOR


@pytest.mark.parametrize("shape", [(512, 512, 3), (160, 512, 64)], ids=["screen", "larger than a long base"])
def test_new_content_is_stored_in_full(shape: tuple[int, ...]) -> None:
    base, target = noise(shape, 1), noise(shape, 2)
    assert (base.nbytes > DELTA_LONG_BASE_BYTES) == (shape[2] == 64)
    assert delta.encode(head(target), base.tobytes(), target.tobytes(), full_size(base)) is None


def test_a_long_base_that_moved_is_kept_as_a_patch() -> None:
    tokens = noise((197, 512, 64), 3)
    base, target = tokens[:160].copy(), tokens[37:].copy()
    assert encoded(base, target).codec == PATCH


def test_added_rows_are_kept_as_blocks() -> None:
    tokens = noise((128, 64, 32), 4)
    base, target = tokens[:112].copy(), tokens
    assert encoded(base, target).codec == BLOCKS


def test_blocks_of_noise_are_kept_raw_when_they_are_many() -> None:
    """Unpacking them would take longer than all else; the few are packed, the many as codec.compress would."""
    base = noise((512, 64, 64), 5)
    few, many = base.copy(), base.copy()
    few[:16, :64] = noise((16, 64, 64), 6)
    many[:144, :64] = noise((144, 64, 64), 7)
    assert encoded(base, few).stored[0] == ZSTD
    assert encoded(base, many).stored[0] == RAW


def test_more_than_the_flatten_ratio_is_stored_in_full() -> None:
    base = noise((512, 64, 16), 8)
    target = base.copy()
    target[:208] = noise((208, 64, 16), 9)
    assert delta.encode(head(target), base.tobytes(), target.tobytes(), base.nbytes) is None
    target[144:] = base[144:]
    assert delta.encode(head(target), base.tobytes(), target.tobytes(), base.nbytes) is not None
    assert delta.encode(head(target), base.tobytes(), target.tobytes(), base.nbytes // 2) is None


def test_an_edited_document_is_a_patch_and_another_is_stored_in_full() -> None:
    lines = [f"{i * i} {'x' * (i % 7)} line {i}\n".encode() for i in range(3_000)]
    base = b"".join(lines)
    target = b"".join([*lines[:1500], b"an inserted line\n", *lines[1502:]])
    full = len(encode_bytes(base).stored)
    found = delta.encode(document(target), base, target, full)
    assert found is not None
    assert found.codec == PATCH
    assert len(found.stored) < 100
    other = np.random.default_rng(1).bytes(len(base))
    assert delta.encode(document(other), base, other, full) is None


def test_the_picked_encoding_is_nearly_the_smallest() -> None:
    tall = screen(6, 600)
    base = tall[:512, :512].copy()
    for target in (tall[37:549, :512].copy(), np.roll(base, 3, axis=1), screen(7)):
        made = [
            delta.encode_as(codec, head(target), base.tobytes(), target.tobytes()) for codec in (BLOCKS, XOR, PATCH)
        ]
        found = delta.encode(head(target), base.tobytes(), target.tobytes(), ANY_SIZE)
        assert found is not None
        assert len(found.stored) <= 1.05 * min(len(one.stored) for one in made)


def test_encodings_that_cannot_be_are_refused() -> None:
    line, square = np.zeros(64, np.uint8), np.zeros((8, 8), np.uint8)
    for codec, target, base in (
        (BLOCKS, line, line.tobytes()), (XOR, square, bytes(63)), (PATCH, square, bytes(7)), (RAW, square, bytes(64)),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            delta.encode_as(codec, head(target), base, target.tobytes())
    with pytest.raises(UsageError):
        delta.encode(head(square), bytes(64), bytes(63), 64)


# -- chains


def steps(count: int) -> list[NDArray[np.uint8]]:
    """A screen and what becomes of it: edits, a scroll, a drift, edits."""
    tall = screen(8, 600)
    tiles = [tall[:512, :512].copy()]
    for at in range(count):
        last = tiles[-1]
        after = tall[37:549, :512].copy() if at == 1 else last ^ 1 if at == 2 else last.copy()
        after[at * 20 : at * 20 + 9, 30:90] = at
        tiles.append(after)
    return tiles


def test_a_chain_of_four_gives_its_end() -> None:
    tiles = steps(4)
    made = [delta.encode(head(b), a.tobytes(), b.tobytes(), ANY_SIZE) for a, b in itertools.pairwise(tiles)]
    links = [Link(head(tile), one.codec, one.stored) for tile, one in zip(tiles[1:], made, strict=True) if one]
    assert [link.codec for link in links] == [BLOCKS, PATCH, XOR, BLOCKS]
    for length in range(5):
        assert delta.decode_chain(tiles[0].tobytes(), links[:length]) == tiles[length].tobytes()


@given(st.permutations([BLOCKS, XOR, PATCH, BLOCKS, XOR]))
def test_encodings_follow_one_another_in_any_order(codecs: list[int]) -> None:
    base = random_array("uint8", (40, 33, 3), 1)
    tiles, links = [base], list[Link]()
    for at, codec in enumerate(codecs):
        after = tiles[-1].copy()
        after[at * 3 : at * 3 + 5, at * 5 :] ^= 3
        made = delta.encode_as(codec, head(after), tiles[-1].tobytes(), after.tobytes())
        links.append(Link(head(after), made.codec, made.stored))
        tiles.append(after)
    assert delta.decode_chain(base.tobytes(), links) == tiles[-1].tobytes()


def test_a_chain_may_grow() -> None:
    tokens = noise((96, 64, 8), 10)
    tiles = [tokens[:rows].copy() for rows in (40, 48, 80, 96)]
    links = list[Link]()
    for before, after in itertools.pairwise(tiles):
        made = delta.encode_as(BLOCKS, head(after), before.tobytes(), after.tobytes())
        links.append(Link(head(after), made.codec, made.stored))
    assert delta.decode_chain(tiles[0].tobytes(), links) == tokens.tobytes()


def test_tiny_changes_stay_one_delta_on_the_root() -> None:
    root = screen(9)
    last, depth, chain_size = root, 0, 0
    for at in range(30):
        after = last.copy()
        after[200:212, 100 + at * 8 : 108 + at * 8] = at
        payload = functools.partial(last.tobytes)
        found = delta.compose(
            head(after), root.tobytes(), payload, after.tobytes(),
            full_size=full_size(root), chain_size=chain_size, depth=depth,
        )  # fmt: skip
        assert found is not None
        assert found.depth == 1
        assert delta.decode(found.delta.codec, head(after), root.tobytes(), found.delta.stored) == after.tobytes()
        last, depth, chain_size = after, found.depth, len(found.delta.stored)
    assert chain_size <= DELTA_TINY_BYTES


def test_the_last_tile_is_not_read_for_a_change_that_joins() -> None:
    root, after = screen(9), screen(9)
    after[5, 5] = 1

    def unread() -> bytes:
        raise AssertionError("read")

    sizes = {"full_size": full_size(root), "chain_size": 100}
    for depth in (0, 1):
        assert delta.compose(head(after), root.tobytes(), unread, after.tobytes(), depth=depth, **sizes) is not None


def test_larger_changes_make_a_chain_that_begins_anew_at_its_limit() -> None:
    root = noise((512, 64, 16), 11)
    last, depth, chain_size, depths = root, 0, 0, list[int]()
    for at in range(6):
        after = last.copy()
        after[at * 16 : at * 16 + 16] = noise((16, 64, 16), 20 + at)
        found = delta.compose(
            head(after), root.tobytes(), functools.partial(last.tobytes), after.tobytes(),
            full_size=root.nbytes, chain_size=chain_size, depth=depth,
        )  # fmt: skip
        assert found is not None
        base = root if found.depth == 1 else last
        assert delta.decode(found.delta.codec, head(after), base.tobytes(), found.delta.stored) == after.tobytes()
        chain_size = len(found.delta.stored) + (chain_size if found.depth > 1 else 0)
        last, depth = after, found.depth
        depths.append(depth)
    assert depths == [1, 2, 3, 4, 1, 2]
    assert max(depths) == DELTA_DEPTH_MAX


def test_a_larger_change_after_a_tiny_one_is_a_delta_on_the_last_tile() -> None:
    root = noise((512, 64, 16), 11)
    last = root.copy()
    last[100, 20, 3] ^= 1
    after = last.copy()
    after[:16] = noise((16, 64, 16), 20)
    found = delta.compose(
        head(after), root.tobytes(), last.tobytes, after.tobytes(), full_size=root.nbytes, chain_size=300, depth=1
    )
    assert found is not None
    assert found.depth == 2
    assert delta.decode(found.delta.codec, head(after), last.tobytes(), found.delta.stored) == after.tobytes()
    assert delta.decode(found.delta.codec, head(after), root.tobytes(), found.delta.stored) != after.tobytes()


def test_a_change_too_large_for_any_delta_ends_the_chain() -> None:
    root = noise((64, 64, 16), 12)
    after = noise((64, 64, 16), 13)
    for depth, chain_size in ((0, 0), (1, 50), (2, 9_000), (4, 20_000)):
        found = delta.compose(
            head(after), root.tobytes(), root.tobytes, after.tobytes(),
            full_size=root.nbytes, chain_size=chain_size, depth=depth,
        )  # fmt: skip
        assert found is None


@given(st.data())
def test_two_masks_merge_to_what_they_do_one_after_the_other(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(40, 40, 3), (33, 50), (7, 9, 2), (64, 64)]))
    name = data.draw(st.sampled_from(["uint8", "float32"]))
    tiles = [random_array(name, shape, 3)]
    for _ in range(2):
        after = tiles[-1].copy()
        y, x = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
        after[y : y + data.draw(st.integers(0, 30)), x : x + data.draw(st.integers(0, 30))] = data.draw(
            st.integers(0, 9)
        )
        tiles.append(after)
    a, b, c = (tile.tobytes() for tile in tiles)
    header = head(tiles[0])
    first, second = (delta.encode_as(BLOCKS, header, x, y).stored for x, y in ((a, b), (b, c)))
    merged = delta.merge(header, first, second)
    assert delta.decode(merged.codec, header, a, merged.stored) == c


# -- damaged bytes


def outcome(codec: int, header: TileHeader, base: bytes, stored: bytes) -> bytes | None:
    """What decodes, or None where it is refused; any other exception fails the test."""
    try:
        found = delta.decode(codec, header, base, stored)
    except IntegrityError:
        return None
    return bytes(found)


@given(changes(), st.sampled_from([BLOCKS, XOR, PATCH]), st.data())
def test_altered_bytes_are_refused_or_give_other_values_of_the_same_size(
    pair: tuple[Array, Array], codec: int, data: st.DataObject
) -> None:
    base, target = pair
    assume((codec != BLOCKS or base.ndim > 1) and (codec != PATCH or base.nbytes >= 8))
    stored = delta.encode_as(codec, head(target), base.tobytes(), target.tobytes()).stored
    how = data.draw(st.sampled_from(["flip", "short", "long", "random", "codec", "base"]))
    number, payload = codec, base.tobytes()
    if how == "flip":
        part = bytearray(stored)
        part[data.draw(st.integers(0, len(part) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        stored = bytes(part)
    elif how == "short":
        stored = stored[: data.draw(st.integers(0, len(stored) - 1))]
    elif how == "long":
        stored += data.draw(st.binary(min_size=1, max_size=20))
    elif how == "random":
        stored = data.draw(st.binary(max_size=200))
    elif how == "codec":
        number = data.draw(st.integers(0, 255))
    else:
        payload = payload[: data.draw(st.integers(0, len(payload)))] + data.draw(st.binary(max_size=9))
    found = outcome(number, head(target), payload, stored)
    assert found is None or len(found) == target.nbytes


@given(st.binary(max_size=300), st.sampled_from([BLOCKS, XOR, PATCH]), st.binary(max_size=100))
def test_random_bytes_never_give_another_error(stored: bytes, codec: int, base: bytes) -> None:
    for header in (TileHeader("uint8", (20, 20)), TileHeader("float32", (5, 5)), TileHeader("bytes", (50,))):
        frame = zstandard.compress(stored)
        for bytes_read in (stored, bytes([RAW]) + stored, bytes([ZSTD]) + frame, bytes([SHUFFLE_ZSTD]) + frame):
            found = outcome(codec, header, base, bytes_read)
            assert found is None or len(found) in (400, 100, 50)


@pytest.mark.parametrize("codec", [BLOCKS, XOR, PATCH])
def test_a_shortened_delta_is_refused(codec: int) -> None:
    base, target = screen(1, 64), screen(2, 64)
    stored = delta.encode_as(codec, head(target), base.tobytes(), target.tobytes()).stored
    for length in range(len(stored)):
        assert outcome(codec, head(target), base.tobytes(), stored[:length]) is None


@pytest.mark.parametrize(
    "header",
    [
        TileHeader("float99", (2, 2)),
        TileHeader("uint8", ()),
        TileHeader("uint8", (-4, 4)),
        TileHeader("uint8", (4, 0)),
        TileHeader("uint8", (1, 1, 1, 1, 1)),
        TileHeader("bytes", (4, 4)),
        TileHeader("bytes", (-1,)),
        TileHeader("uint8", (2**40, 2**40)),
        TileHeader("uint8", (TILE_BYTES_MAX, 2)),
    ],
    ids=lambda header: f"{header.dtype} {header.shape}",
)
def test_impossible_headers_are_integrity_errors(header: TileHeader) -> None:
    for codec in (BLOCKS, XOR, PATCH):
        with pytest.raises(IntegrityError):
            delta.decode(codec, header, bytes(16), b"0123456789")


def refused_without_much_memory(codec: int, header: TileHeader, base: bytes, stored: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            delta.decode(codec, header, base, stored)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", [BLOCKS, XOR, PATCH])
def test_a_few_bytes_cannot_ask_for_much_memory(codec: int) -> None:
    huge = TileHeader("uint8", (16_384, 16_384))
    small = TileHeader("uint8", (64, 64))
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(50_000_000))
    bitmap = 2**17 * (codec == BLOCKS)
    promise = b"\x28\xb5\x2f\xfd\xa0" + (16_384**2 + bitmap).to_bytes(4, "little") + bytes(50)
    for stored in (bytes(100), bytes([ZSTD]) * (codec == BLOCKS) + promise):
        refused_without_much_memory(codec, huge, b"the base", stored)
    refused_without_much_memory(codec, small, bytes(64 * 64), bytes([ZSTD]) * (codec == BLOCKS) + bomb)


def test_a_patch_that_asks_for_a_huge_window_is_refused_or_right() -> None:
    """Raw block, whole and torn, in a frame whose window is 2 GiB."""
    base = bytes(range(100))
    for length in (100, 60):
        frame = b"\x28\xb5\x2f\xfd\x80\xa8" + (100).to_bytes(4, "little") + (100 << 3 | 1).to_bytes(3, "little")
        frame += base[:length]
        tracemalloc.start()
        assert outcome(PATCH, document(base), base, frame) in (None, base)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()


def test_a_patch_with_bytes_behind_it_is_refused() -> None:
    base = bytes(range(100))
    made = delta.encode_as(PATCH, document(base), base, base)
    for more in (b"x", made.stored, zstandard.compress(b"y")):
        assert outcome(PATCH, document(base), base, made.stored + more) is None


def test_a_mask_names_no_blocks_beyond_the_tile_nor_keeps_any_beyond_its_base() -> None:
    header = TileHeader("uint8", (16, 16))
    for bits in (2, 1 << 127):
        assert outcome(BLOCKS, header, bytes(256), bytes([RAW]) + bits.to_bytes(16, "little") + bytes(256)) is None
    tall = TileHeader("uint8", (32, 16))
    kept_first = bytes([RAW]) + (2).to_bytes(16, "little") + bytes(256)
    kept_last = bytes([RAW]) + (1).to_bytes(16, "little") + bytes(256)
    assert outcome(BLOCKS, tall, bytes(256), kept_first) == bytes(512)
    assert outcome(BLOCKS, tall, bytes(256), kept_last) is None


def test_merging_damaged_masks_is_refused() -> None:
    header = TileHeader("uint8", (32, 32))
    made = delta.encode_as(BLOCKS, header, bytes(1024), b"\1" + bytes(1023)).stored
    for damaged in (b"", made[:-1], made[1:], b"\7" + made):
        for pair in ((made, damaged), (damaged, made)):
            with pytest.raises(IntegrityError):
                delta.merge(header, *pair)


# -- deltas made by clients


def made_by_client(base: Array, target: Array) -> ClientDelta:
    tile = encode_array(target)
    found = delta.make(PARENT, base.tobytes(), tile.header, target.tobytes())
    assert found is not None
    return found


@pytest.fixture(name="pair", scope="module")
def _pair() -> tuple[Array, Array]:
    base, target = screen(20), screen(20)
    target[30:50, 60:120] = 9
    return base, target


def changed(given_delta: ClientDelta, **fields: object) -> ClientDelta:
    return msgspec.structs.replace(given_delta, **fields)


def test_a_clients_delta_arrives(pair: tuple[Array, Array]) -> None:
    base, target = pair
    sent = msgspec.msgpack.encode(made_by_client(base, target))
    assert len(sent) < 1_000
    applied = delta.apply(delta.unpack(sent), encode_array(base).header, base.tobytes())
    expected = encode_array(target)
    assert applied.payload == target.tobytes()
    assert (applied.blob_id, applied.header) == (expected.ref, expected.header)


def test_a_client_sends_other_content_in_full() -> None:
    base, target = noise((64, 64, 4), 1), noise((64, 64, 4), 2)
    assert delta.make(PARENT, base.tobytes(), encode_array(target).header, target.tobytes()) is None


def test_a_clients_delta_on_another_parent_is_refused(pair: tuple[Array, Array]) -> None:
    base, target = pair
    other = base.copy()
    other[400, 400] ^= 1
    with pytest.raises(IntegrityError, match="another blob_id") as caught:
        delta.apply(made_by_client(base, target), encode_array(base).header, other.tobytes())
    assert "read the parent again" in caught.value.fix
    assert caught.value.object.startswith("tl_")


@given(st.data())
def test_a_damaged_clients_delta_never_gives_another_tile(data: st.DataObject) -> None:
    base, target = screen(20, 64), screen(21, 64)
    tile = encode_array(target)
    made = delta.encode_as(
        data.draw(st.sampled_from([BLOCKS, XOR, PATCH])), head(target), base.tobytes(), target.tobytes()
    )
    good = ClientDelta("tl_" + "0" * 64, tile.header, made.codec, made.stored, tile.ref.hex())
    name = data.draw(st.sampled_from(["header", "stored"]))
    part = bytearray(getattr(good, name))
    part[data.draw(st.integers(0, len(part) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        applied = delta.apply(changed(good, **{name: bytes(part)}), encode_array(base).header, base.tobytes())
    except (UsageError, IntegrityError) as error:
        assert error.fix
        return
    assert applied.payload == target.tobytes()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"parent": "tl_123"}, UsageError),
        ({"parent": "0" * 64}, UsageError),
        ({"blob_id": "zz" * 32}, UsageError),
        ({"blob_id": "00" * 32}, IntegrityError),
        ({"codec": 1}, UsageError),
        ({"codec": 6}, UsageError),
        ({"header": b"\xff"}, UsageError),
        ({"header": b""}, UsageError),
        ({"header": msgspec.msgpack.encode(TileHeader("uint8", (2**30, 2**30, 3)))}, UsageError),
        ({"header": msgspec.msgpack.encode(TileHeader("int8", (512, 512, 3)))}, UsageError),
        ({"header": msgspec.msgpack.encode(TileHeader("uint8", (512, 1536)))}, UsageError),
        ({"header": msgspec.msgpack.encode(TileHeader("uint8", (512, 512, 3), "float32", "int8", b"1"))}, UsageError),
        ({"header": b"\x95\xa5uint8\x93\xcd\x02\x00\xcd\x02\x00\xcd\x00\x03\xa0\xa0\xc4\x00"}, UsageError),
        ({"header": msgspec.msgpack.encode(TileHeader("uint8", (2**63,) * 100_000))}, UsageError),
        ({"header": bytes(META_BYTES_MAX + 1)}, LimitError),
        ({"stored": b""}, IntegrityError),
    ],
    ids=lambda value: str(value)[:60],
)
def test_malformed_clients_deltas_are_refused_with_a_fix(
    pair: tuple[Array, Array], fields: dict[str, object], error: type[UsageError | IntegrityError]
) -> None:
    base, target = pair
    with pytest.raises(error) as caught:
        delta.apply(changed(made_by_client(base, target), **fields), encode_array(base).header, base.tobytes())
    assert caught.value.fix
    assert type(caught.value) is error


def test_a_quantised_result_must_have_scales_that_decode() -> None:
    values = np.random.default_rng(1).normal(size=(64, 64, 2)).astype(np.float32)
    tile = encode_array(values, quantise="int8")
    base_header = msgspec.msgpack.decode(tile.header, type=TileHeader)
    broken = msgspec.msgpack.encode(msgspec.structs.replace(base_header, scales=b"123"))
    payload = tile.stored
    made = delta.make(PARENT, payload, broken, b"\1" + payload[1:])
    assert made is not None
    with pytest.raises(IntegrityError, match="scales"):
        delta.apply(made, tile.header, payload)


@given(st.binary(max_size=300))
def test_what_is_no_clients_delta_is_a_usage_error(data: bytes) -> None:
    with pytest.raises(UsageError):
        delta.unpack(data)


@pytest.mark.parametrize("make", [
    lambda: delta.unpack(bytes(META_BYTES_MAX + CLIENT_DELTA_BYTES_MAX + 1)),
    lambda: delta.apply(
        ClientDelta("tl_" + "0" * 64, b"", BLOCKS, bytes(CLIENT_DELTA_BYTES_MAX + 1), "0" * 64), b"", b""
    ),
])  # fmt: skip
def test_too_large_a_clients_delta_is_a_limit_error(make: Callable[[], object]) -> None:
    with pytest.raises(LimitError):
        make()
