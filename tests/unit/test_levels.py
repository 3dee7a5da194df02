"""Levels: rules that give the same bits as exact arithmetic, and a pyramid that derives what changed and no more."""

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import cv2
import ml_dtypes
import msgspec
import numpy as np
import pytest
from fakes import CountingStore, DictMemo
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from him.config import LEVEL_THREADS
from him.errors import IntegrityError, NotFoundError, UsageError
from him.pyramid import directory, levels, page
from him.pyramid.update import NOTHING, update
from him.tile import downsample
from him.tile.address import KIND_COMPANION
from him.tile.codec import DTYPES, EncodedTile, encode_array
from him.tile.downsample import RULES, check, halve
from him.types import BlobId, Entry, Frame

Array = NDArray[np.generic]
Cell = tuple[int, int]

# -- level rules: the definitions of docs/FORMAT.md, sample by sample, in exact numbers

INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
FLOATS = {
    "float16": (11, -14),
    "bfloat16": (8, -126),
    "float8_e4m3fn": (4, -6),
    "float8_e5m2": (3, -14),
    "float32": (24, -126),
    "float64": (53, -1022),
}
"""Bits of the significand, exponent of the smallest normal number."""


def rounded(value: float, dtype: str) -> float:
    """A float64 value to the nearest of `dtype`, ties to even, in exact arithmetic."""
    if dtype == "float64" or not math.isfinite(value) or value == 0:
        return value
    bits, smallest = FLOATS[dtype]
    exact = Fraction(value)
    exponent = max(math.frexp(value)[1] - 1, smallest)
    step = Fraction(2) ** (exponent - bits + 1)
    return math.copysign(float(round(exact / step) * step), value)


def mean_of(samples: Sequence[Sequence[np.generic]], dtype: str) -> float | int:
    """The mean of one or two rows of one or two samples."""
    if dtype in INTEGERS:
        some = [int(sample) for row in samples for sample in row]
        return (2 * sum(some) + len(some)) // (2 * len(some))
    rows = [[float(sample) for sample in row] for row in samples]
    rows = [row * (2 // len(row)) for row in rows] * (2 // len(rows))
    (a, b), (c, d) = rows
    if dtype == "float64":
        mean = (a * 0.25 + c * 0.25) + (b * 0.25 + d * 0.25)
    else:
        mean = rounded(((a + c) + (b + d)) * 0.25, dtype)
    return math.nan if math.isnan(mean) else mean


def extreme_of(samples: Sequence[Sequence[np.generic]], choose: Callable[..., np.generic]) -> np.generic:
    """The greatest or least sample: −0 is less than +0, and any NaN wins."""
    some = [sample for row in samples for sample in row]
    for sample in some:
        if math.isnan(sample):
            return type(sample)("nan")
    return choose(some, key=lambda sample: (sample, -int(np.signbit(sample)) if sample == 0 else 0))


def defined(values: Array, rule: str, first: bool) -> Array:
    """The definition of a level, one sample after the other."""
    if rule == "min-max":
        channels = values.reshape(*values.shape[:2], -1)
        middle = channels.shape[2] // 2
        low, high = (channels, channels) if first else (channels[..., :middle], channels[..., middle:])
        return np.concatenate([defined(low, "min", first), defined(high, "max", first)], axis=2)
    height, width = values.shape[:2]
    out = np.zeros((-(-height // 2), -(-width // 2), *values.shape[2:]), dtype=values.dtype)
    for at in np.ndindex(*out.shape):
        rows, columns = ([2 * i, 2 * i + 1][: n - 2 * i] for i, n in zip(at[:2], values.shape[:2], strict=True))
        samples = [[values[(row, column, *at[2:])] for column in columns] for row in rows]
        if rule == "mean":
            out[at] = mean_of(samples, values.dtype.name)
        elif rule == "first":
            out[at] = samples[0][0]
        elif rule == "nearest":
            out[at] = samples[-1][-1]
        else:
            out[at] = extreme_of(samples, max if rule == "max" else min)
    return out


def same_bits(found: Array, wanted: Array) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if found.tobytes() != wanted.tobytes():
        kind = f"u{found.dtype.itemsize}"
        ours, theirs = (np.ascontiguousarray(one).view(kind) for one in (found, wanted))
        at = tuple(int(i) for i in np.argwhere(ours != theirs)[0])
        raise AssertionError(f"at {at}: {found[at]!r} ({ours[at]:#x}), not {wanted[at]!r} ({theirs[at]:#x})")


def some_values(name: str, shape: tuple[int, ...], seed: int) -> Array:
    """Values in which every bit pattern may occur, extremes are frequent, and neighbours are often close."""
    rng, dtype = np.random.default_rng(seed), DTYPES[name]
    if name == "bool":
        return rng.random(shape) < 0.5
    values = np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype=dtype).reshape(shape).copy()
    if seed % 3 == 1:
        info = ml_dtypes.finfo(dtype) if name in FLOATS else np.iinfo(dtype)
        ends = [info.max, info.min, 0, 1, 2, 3]
        if name in FLOATS:
            ends += [-0.0, math.nan, -math.nan, float(info.tiny), -float(info.smallest_subnormal)]
            ends += [] if name == "float8_e4m3fn" else [math.inf, -math.inf]
        values = rng.choice(np.array(ends).astype(dtype) if name in FLOATS else np.array(ends, dtype=dtype), shape)
    elif seed % 3 == 2 and name in FLOATS:
        values = (rng.standard_normal(shape) * 2.0 ** rng.integers(-8, 8)).astype(dtype)
    return values


@given(
    st.sampled_from([*INTEGERS, *FLOATS]), st.sampled_from(list(RULES)), st.booleans(), st.integers(0, 2**32 - 1),
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 1, 2, 3, 4, 10]),
)  # fmt: skip
@settings(max_examples=400)
def test_every_rule_gives_the_bits_of_its_definition(
    name: str, rule: str, first: bool, seed: int, height: int, width: int, channels: int
) -> None:
    tail = (2 * channels or 2,) if rule == "min-max" and not first else (channels,) if channels else ()
    values = some_values(name, (height, width, *tail), seed)
    same_bits(halve(values, rule, first=first), defined(values, rule, first))


@given(
    st.sampled_from([*INTEGERS, *FLOATS]), st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 70),
    st.sampled_from([0, 1, 2, 3, 4, 5, 64]),
)  # fmt: skip
@example("uint8", 0, 1, 1, 3)
@example("uint8", 1, 511, 513, 3)
@example("int8", 3, 640, 1, 4)
@example("float16", 2, 37, 70, 64)
@example("uint16", 1, 513, 511, 1)
@settings(max_examples=60)
def test_fast_paths_and_plain_numpy_agree_on_larger_tiles(
    name: str, seed: int, height: int, width: int, channels: int
) -> None:
    values = some_values(name, (height, width, channels) if channels else (height, width), seed)
    same_bits(halve(values, "mean"), plain_mean(values))


def plain_mean(values: Array) -> Array:
    """The formula of the mean in a few lines of numpy, checked against the definition above."""
    height, width = values.shape[:2]
    pad = [(0, height % 2), (0, width % 2)] + [(0, 0)] * (values.ndim - 2)
    even = np.pad(values, pad, mode="edge")
    four = (even[0::2, 0::2], even[1::2, 0::2], even[0::2, 1::2], even[1::2, 1::2])
    name = values.dtype.name
    if name in INTEGERS:
        a, c, b, d = (one.astype(object) for one in four)
        return ((a + b + c + d + 2) >> 2).astype(values.dtype)
    with np.errstate(all="ignore"):
        a, c, b, d = (one.astype(np.float64) for one in four)
        means = (a * 0.25 + c * 0.25) + (b * 0.25 + d * 0.25)
        if name in ("float16", "float32", "float64"):
            out = means.astype(values.dtype)
        else:
            out = np.array([rounded(float(one), name) for one in means.flat]).reshape(means.shape).astype(values.dtype)
    out[np.isnan(means)] = values.dtype.type("nan")
    return out


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
def test_the_plain_mean_is_the_definition(name: str) -> None:
    for seed in range(6):
        values = some_values(name, (7, 9, 2), seed)
        same_bits(plain_mean(values), defined(values, "mean", True))


@pytest.mark.parametrize("name", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 64])
def test_every_sum_of_four_is_rounded_half_up(name: str, channels: int) -> None:
    """All sums of four bytes, in every way a fast path may vectorise."""
    sums = np.arange(1021)
    shift = -128 if name in ("int8", "int16") else 0
    quads = np.stack([np.clip(sums - 255 * i, 0, 255) for i in range(4)]) + shift
    values = np.zeros((2, 2 * len(sums), channels), dtype=name)
    for i in range(4):
        values[i // 2, i % 2 :: 2] = quads[i][:, None]
    wanted = (sums + 4 * shift + 2) >> 2
    np.testing.assert_array_equal(halve(values, "mean")[0], np.repeat(wanted[:, None], channels, 1))


@pytest.mark.parametrize(
    ("name", "samples", "mean"),
    [
        ("float16", (2048, 2048, 2, 2.0**-24), 1025),
        ("bfloat16", (256, 256, 2, 2.0**-20), 129),
        ("float8_e5m2", (32768, 32768, 8192, 2.0**-16), 20480),
        ("float32", (2.0**24, 2.0**24, 4, 2.0**-20), 2.0**23 + 1),
    ],
)
def test_a_mean_is_rounded_once(name: str, samples: tuple[float, ...], mean: float) -> None:
    """Just above the middle of two neighbours; rounding on the way there would fall back to the even one."""
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)):
        values = np.array([samples[i] for i in order], dtype=DTYPES[name]).reshape(2, 2)
        # As few samples as there are, and enough of them for every fast path.
        for times in (1, 20):
            assert (halve(np.tile(values, (times, times)), "mean").astype(np.float64) == mean).all()


@pytest.mark.parametrize("name", FLOATS)
def test_a_mean_of_the_largest_numbers_does_not_overflow(name: str) -> None:
    largest = ml_dtypes.finfo(DTYPES[name]).max
    values = np.full((2, 2), largest, dtype=DTYPES[name])
    assert halve(values, "mean")[0, 0] == largest
    values[1] = -values[1]
    assert float(halve(values, "mean")[0, 0]) == 0


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("rule", ["mean", "max", "min"])
def test_any_nan_gives_the_one_quiet_nan(name: str, rule: str) -> None:
    dtype = DTYPES[name]
    quiet = np.array("nan", dtype=np.float64).astype(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    # Every sign, and payloads that a processor would hand on.
    odd = (quiet.view(unsigned) | np.array([0, 1], dtype=unsigned)).tolist()
    for bits in [*odd, *(one | 1 << 8 * dtype.itemsize - 1 for one in odd)]:
        values = np.ones((2, 2), dtype=dtype)
        values.view(unsigned)[1, 0] = bits
        assert halve(values, rule).tobytes() == quiet.tobytes()


@pytest.mark.parametrize("name", FLOATS)
def test_zeros_keep_the_sign_that_the_rule_gives_them(name: str) -> None:
    dtype = DTYPES[name]
    mixed = np.array([[0.0, -0.0], [-0.0, -0.0]]).astype(dtype)
    for values in (mixed, mixed[::-1], mixed[:, ::-1]):
        assert not np.signbit(halve(values, "max")[0, 0])
        assert np.signbit(halve(values, "min")[0, 0])
        assert not np.signbit(halve(values, "mean")[0, 0])
    assert np.signbit(halve(np.full((2, 2), -0.0).astype(dtype), "mean")[0, 0])
    tiny = np.zeros((2, 2), dtype=dtype)
    tiny[0, 0] = -ml_dtypes.finfo(dtype).smallest_subnormal
    found = halve(tiny, "mean")[0, 0]
    assert found == 0
    # Float64 is quartered before it is added: minus nothing and nothing are nothing.
    assert np.signbit(found) == (name != "float64")


@pytest.mark.parametrize("name", ["complex64", "complex128"])
def test_complex_means_are_those_of_their_parts(name: str) -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((7, 5, 3)) + 1j * rng.standard_normal((7, 5, 3))).astype(name)
    found = halve(values, "mean")
    part = np.dtype(f"f{values.dtype.itemsize // 2}")
    same_bits(found.real.astype(part), plain_mean(values.real.astype(part)))
    same_bits(found.imag.astype(part), plain_mean(values.imag.astype(part)))
    for rule in ("max", "min", "min-max"):
        with pytest.raises(UsageError):
            halve(values, rule)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (1, 1), (9, 1, 3), (6, 10, 4)])
def test_a_level_is_written_where_it_is_wanted(rule: str, shape: tuple[int, ...]) -> None:
    """A part of a larger tile gets the same bits, and nothing beside it is touched."""
    values = some_values("float16", shape, 5)
    values.flags.writeable = False
    alone = halve(values, rule)
    whole = np.full((alone.shape[0] + 3, alone.shape[1] + 4, *alone.shape[2:]), 7, dtype=values.dtype)
    halve(values, rule, out=whole[1:-2, 3:-1])
    same_bits(np.ascontiguousarray(whole[1:-2, 3:-1]), alone)
    whole[1:-2, 3:-1] = 7
    assert (whole == 7).all()


def test_without_opencv_arithmetic_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """An OpenCV that rounds otherwise, or knows no float16, is found out and not used."""

    def other(source: Array, size: Cell, dst: Array, interpolation: int) -> None:
        dst[...] = source[0::2, 0::2]

    def unable(*_: object, **__: object) -> None:
        raise cv2.error("no such depth")

    cases = [some_values(name, (70, 66, 3), seed) for name in ("uint8", "int8", "float16") for seed in range(3)]
    with_it = [halve(values, "mean") for values in cases]
    caches = (downsample._core_of_mean, downsample._cv2_means, downsample._cv2_knows_halves)
    for one in caches:
        one.cache_clear()
    monkeypatch.setattr(cv2, "resize", other)
    monkeypatch.setattr(cv2, "add", unable)
    try:
        for values, wanted in zip(cases, with_it, strict=True):
            same_bits(halve(values, "mean"), wanted)
        assert not downsample._cv2_means(np.dtype(np.uint8), 3)
        assert not downsample._cv2_knows_halves()
    finally:
        for one in caches:
            one.cache_clear()


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UsageError):
        halve(np.zeros((2, 2)), "median")
    with pytest.raises(UsageError):
        check("median", np.dtype(np.uint8))


# -- the pyramid

TILE = 4


def put_image(
    store: CountingStore, pixels: Array, present: Iterable[Cell] | None = None, rule: str = "mean", tile: int = TILE,
    origins: Callable[[Cell], bytes] = lambda cell: bytes(16), base: Frame | None = None,
) -> Frame:  # fmt: skip
    """Store an image in tiny tiles; cells outside `present` are left out (or as `base` has them)."""
    rows, columns = -(-pixels.shape[0] // tile), -(-pixels.shape[1] // tile)
    cells: dict[Cell, Entry | None] = {}
    everywhere = ((row, column) for row in range(rows) for column in range(columns))
    for row, column in everywhere if present is None else present:
        item = encode_array(pixels[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile])
        store.put_tile(item, bytes(16))
        cells[row, column] = Entry(item.ref, origins((row, column)))
    height = page.root_height(rows, columns)
    root = update(store, NOTHING if base is None else base.root, height, cells)
    channels = pixels.shape[2] if pixels.ndim == 3 else 0
    return Frame(
        "screen", "f", "array", pixels.shape[0], pixels.shape[1], channels, pixels.dtype.name, tile, tile, 0, rule,
        root, height,
    )  # fmt: skip


def image(height: int, width: int, seed: int, channels: int = 0) -> NDArray[np.uint8]:
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def whole_levels(one: Frame, pixels: Array, present: set[Cell] | None = None) -> list[tuple[Array, set[Cell]]]:
    """For each level from 1 up the whole picture halved, and the tiles that have something below."""
    there = {(r, c) for r in range(one.rows) for c in range(one.columns)} if present is None else present
    whole = np.zeros_like(pixels)
    for row, column in there:
        part = np.s_[
            row * one.tile_height : (row + 1) * one.tile_height, column * one.tile_width : (column + 1) * one.tile_width
        ]
        whole[part] = pixels[part]
    found: list[tuple[Array, set[Cell]]] = []
    for level in range(1, levels.apex_level(one) + 1):
        whole = defined(whole, one.level_rule, level == 1) if whole.size < 600 else halve(
            whole, one.level_rule, first=level == 1
        )  # fmt: skip
        there = {(r // 2, c // 2) for r, c in there}
        found.append((whole, there))
    return found


def companions(store: CountingStore, blob: BlobId) -> list[levels.Companion]:
    """A companion and all below it."""
    made = levels.decode(store, blob)
    return [made, *(one for _, child in made.below for one in companions(store, BlobId(child)))]


def stored_levels(store: CountingStore, memo: DictMemo, one: Frame) -> BlobId:
    return levels.companion(store, memo, one, one.root, one.root_height, (one.height, one.width))


class ReadOnly:
    """A LevelStore that refuses to be written to."""

    def __init__(self, store: CountingStore) -> None:
        self.has, self.page, self.parsed, self.read_tile = store.has, store.page, store.parsed, store.read_tile

    def put_page(self, kind: int, payload: bytes, *, encrypted: bool = False) -> BlobId:
        raise AssertionError("reading wrote a page")

    def put_tile(self, tile: EncodedTile, origin: bytes) -> bool:
        raise AssertionError("reading wrote a tile")


def check_levels(store: CountingStore, one: Frame, pixels: Array, present: set[Cell] | None = None) -> None:
    """Every tile of every level against the whole image halved again and again; open, then sealed."""
    apex, tile = levels.apex_level(one), one.tile_height
    assert (1 << apex) >= max(one.rows, one.columns) > (1 << apex) // 2
    wanted = whole_levels(one, pixels, present)
    open_memo, sealed_memo = DictMemo(), DictMemo()
    for sealed in (False, True):
        memo = sealed_memo if sealed else open_memo
        if sealed:
            stored_levels(store, memo, one)
        for level, (whole, there) in enumerate(wanted, 1):
            for row in range(-(-whole.shape[0] // tile)):
                for column in range(-(-whole.shape[1] // tile)):
                    found = levels.entry(ReadOnly(store), memo, one, level, row, column)
                    values = levels.read(ReadOnly(store), memo, one, level, row, column)
                    if (row, column) not in there:
                        assert found is None
                        assert values is None
                        continue
                    assert found is not None, (level, row, column)
                    assert values is not None
                    part = whole[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
                    np.testing.assert_array_equal(values, part, err_msg=f"level {level} ({column},{row})")
                    assert found.ref == encode_array(part).ref
                    assert found.origin == levels.latest_origin(store, one, level, row, column)
                    assert values.shape == levels.shape_at(one, level, row, column)


RAGGED = st.integers(1, 45) | st.sampled_from([4, 8, 16, 31, 32, 33, 64, 65])


@given(RAGGED, RAGGED, st.sampled_from([0, 1, 3]), st.sampled_from(list(RULES)), st.integers(0, 99))
@settings(max_examples=60)
def test_levels_equal_the_whole_image_halved(height: int, width: int, channels: int, rule: str, seed: int) -> None:
    store, pixels = CountingStore(), image(height, width, seed, channels)
    check_levels(store, put_image(store, pixels, rule=rule), pixels)


@pytest.mark.parametrize(("height", "width"), [(3, 37), (70, 33), (131, 5), (40, 140)])
@pytest.mark.parametrize("rule", ["mean", "min-max"])
def test_levels_of_frames_wider_than_a_page(height: int, width: int, rule: str) -> None:
    """More than 8 tiles a side: inner pages with companions of their own."""
    store, pixels = CountingStore(), image(height, width, 3)
    check_levels(store, put_image(store, pixels, rule=rule), pixels)


def test_levels_three_pages_deep() -> None:
    store, pixels = CountingStore(), image(5, 2 * 65 + 1, 3)
    one = put_image(store, pixels, tile=2)
    assert one.root_height == 2
    check_levels(store, one, pixels)


def some_cells(rows: int, columns: int, count: int, seed: int) -> set[Cell]:
    rng = np.random.default_rng(seed)
    return {(int(rng.integers(rows)), int(rng.integers(columns))) for _ in range(count)}


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**16))
@settings(max_examples=40)
def test_absent_cells_count_as_zeros_and_absent_regions_have_no_levels(
    height: int, width: int, count: int, seed: int
) -> None:
    store, pixels = CountingStore(), image(height, width, seed)
    present = some_cells(-(-height // TILE), -(-width // TILE), count, seed)
    check_levels(store, put_image(store, pixels, present), pixels, present)


def test_the_youngest_origin_under_a_tile_is_its_origin() -> None:
    store, pixels = CountingStore(), image(40 * TILE, 9 * TILE, 4)

    def origin(cell: Cell) -> bytes:
        return (cell[0] * 7919 % 256 * 1000 + cell[1]).to_bytes(16, "big")

    check_levels(store, put_image(store, pixels, origins=origin), pixels)


def test_a_cell_that_was_put_smaller_than_it_is_now_is_filled_up_with_zeros() -> None:
    store, pixels = CountingStore(), image(6, 6, 1)
    one = put_image(store, pixels)
    grown = msgspec.structs.replace(one, height=2 * TILE, width=3 * TILE)
    whole = np.zeros((2 * TILE, 3 * TILE), dtype=np.uint8)
    whole[:6, :6] = pixels
    check_levels(store, grown, whole, {(0, 0), (0, 1), (1, 0), (1, 1)})


def test_levels_are_a_pure_function_of_page_rule_and_extent() -> None:
    pixels = image(50, 70, 1)
    made = []
    for _ in range(2):
        store = CountingStore()
        made.append(stored_levels(store, DictMemo(), put_image(store, pixels)))
    assert made[0] == made[1]
    for other in ("max", "nearest"):
        assert stored_levels(store, DictMemo(), put_image(store, pixels, rule=other)) != made[0]
    taller = msgspec.structs.replace(put_image(store, pixels), height=52)
    assert stored_levels(store, DictMemo(), taller) != made[0]


@given(st.integers(0, 2**16), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(list(RULES)))
@settings(max_examples=30)
def test_levels_grown_change_by_change_equal_levels_made_at_once(seed: int, changes: list[int], rule: str) -> None:
    rng = np.random.default_rng(seed)
    store, memo = CountingStore(), DictMemo()
    pixels = image(int(rng.integers(1, 90)), int(rng.integers(1, 90)), seed)
    rows, columns = -(-pixels.shape[0] // TILE), -(-pixels.shape[1] // TILE)
    present = some_cells(rows, columns, int(rng.integers(1, 80)), seed)
    one = put_image(store, pixels, present, rule)
    stored_levels(store, memo, one)
    for number, count in enumerate(changes):
        cells = some_cells(rows, columns, count, seed + number + 1)
        for row, column in cells:
            pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = number
        one = put_image(store, pixels, cells, rule, base=one)
        present |= cells
        grown = stored_levels(store, memo, one)
        afresh = CountingStore()
        assert stored_levels(afresh, DictMemo(), put_image(afresh, pixels, present, rule)) == grown
        # Whatever is said to be stored is there.
        for found in companions(store, grown):
            for at, level in enumerate(found.levels):
                if 3 * found.page_height + 1 + at >= found.stored_from:
                    assert all(store.has(BlobId(blob)) for _, blob in level)


def test_one_changed_tile_costs_one_tile_a_level() -> None:
    store, memo = CountingStore(), DictMemo()
    pixels = image(24 * TILE, 24 * TILE, 5)
    one = put_image(store, pixels)
    stored_levels(store, memo, one)
    pixels[:TILE, :TILE] = 255
    other = put_image(store, pixels, [(0, 0)], base=one)
    store.reset()
    stored_levels(store, memo, other)
    # 24 tiles a side: 5 levels, and a sixth that both pages' companions hold.
    assert store.tiles_put == 6
    # Four cells; then three unchanged tiles a level: 4×4, 2×2, and above the page; the last has none beside it.
    assert store.tiles_read == 4 + 3 + 3 + 3 + 3
    store.reset()
    stored_levels(store, memo, one)
    assert (store.tiles_read, store.tiles_put) == (0, 0)


def test_a_tile_that_moved_is_not_derived_again() -> None:
    """Names go by content: a picture scrolled by a whole quad finds its levels."""
    store, memo = CountingStore(), DictMemo()
    pixels = image(8 * TILE, 8 * TILE, 5)
    stored_levels(store, memo, put_image(store, pixels))
    moved = put_image(store, np.roll(pixels, 4 * TILE, axis=0))
    store.reset()
    stored_levels(store, memo, moved)
    assert store.tiles_put == 1, "the apex alone"


def test_equal_tiles_are_derived_once() -> None:
    store, memo = CountingStore(), DictMemo()
    one = put_image(store, np.zeros((64 * TILE, 64 * TILE), dtype=np.uint8))
    store.reset()
    stored_levels(store, memo, one)
    assert store.tiles_put == 2, "a level above zeros, and a level above that, are all there is"
    assert store.tiles_read <= 8


def test_a_forgotten_memo_changes_nothing_but_time() -> None:
    store = CountingStore()
    one = put_image(store, image(40, 40, 2))
    first = stored_levels(store, DictMemo(), one)
    assert stored_levels(store, DictMemo(), one) == first


def test_what_the_memo_names_but_the_store_lost_is_made_again() -> None:
    store, memo = CountingStore(), DictMemo()
    pixels = image(20 * TILE, 20 * TILE, 2)
    one = put_image(store, pixels)
    cells = set(store.tiles)
    made = stored_levels(store, memo, one)
    for lost in store.tiles.keys() - cells:
        del store.tiles[lost]
    store.pages = {blob: one for blob, one in store.pages.items() if one[0] != KIND_COMPANION}
    assert stored_levels(store, memo, one) == made
    check_levels(store, one, pixels)


def test_reading_one_derived_tile_reads_what_lies_below_it() -> None:
    store, memo = CountingStore(), DictMemo()
    one = put_image(store, image(64 * TILE, 64 * TILE, 7))
    for level, cells in ((1, 4), (2, 16), (3, 64)):
        store.reset()
        assert levels.read(store, DictMemo(), one, level, 9, 9) is not None if level == 1 else True
        store.reset()
        assert levels.entry(ReadOnly(store), memo, one, level, 1, 1) is not None
        assert store.tiles_read <= cells
    store.reset()
    assert levels.entry(ReadOnly(store), memo, one, 3, 1, 1) is not None
    assert store.tiles_read == 0, "its name is remembered"


@pytest.mark.parametrize("level", [0, -1, 4, 99])
def test_a_level_that_is_not_there_is_said_to_be_missing(level: int) -> None:
    store = CountingStore()
    one = put_image(store, image(30, 30, 2))
    for ask in (levels.entry, levels.read, levels.tile):
        with pytest.raises(NotFoundError):
            ask(store, DictMemo(), one, level, 0, 0)


def test_cells_outside_a_level_are_absent() -> None:
    store = CountingStore()
    one = put_image(store, image(40, 40, 2))
    for at in ((5, 0), (0, 500), (-1, 0), (0, -1), (2**40, 0)):
        assert levels.entry(store, DictMemo(), one, 1, *at) is None
        assert levels.read(store, DictMemo(), one, 1, *at) is None


def test_a_damaged_tile_is_named_whoever_reads_it() -> None:
    """Also by a thread that works ahead."""

    class Damaged(CountingStore):
        def read_tile(self, blob: BlobId) -> Array | bytes:
            if blob == bad:
                raise IntegrityError("damaged", object=blob.hex())
            return super().read_tile(blob)

    store, pixels = Damaged(), image(8 * TILE, 8 * TILE, 3)
    bad = encode_array(pixels[4 * TILE : 5 * TILE, 4 * TILE : 5 * TILE]).ref
    one = put_image(store, pixels)
    with pytest.raises(IntegrityError):
        stored_levels(store, DictMemo(), one)
    with pytest.raises(IntegrityError):
        levels.read(store, DictMemo(), one, 3, 0, 0)


# -- how much is in memory, in which order it is written


class Watching(CountingStore):
    """Counts how many arrays it handed out are alive at once."""

    def __init__(self, other: CountingStore) -> None:
        super().__init__()
        self.pages, self.tiles = other.pages, other.tiles
        self.alive = self.most = 0

    def read_tile(self, blob: BlobId) -> Array | bytes:
        values = np.array(super().read_tile(blob))
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(values, self.gone)
        return values

    def gone(self) -> None:
        self.alive -= 1


def watch_derived(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[alive, most alive at once] of derived tiles' values."""
    count, lock, derive = [0, 0], threading.Lock(), levels.tile_of

    def add(number: int) -> None:
        with lock:
            count[0] += number
            count[1] = max(count)

    def watched(values: Array, hash_key: bytes | None, *, compress: bool) -> EncodedTile:
        add(1)
        weakref.finalize(values, add, -1)
        return derive(values, hash_key, compress=compress)

    monkeypatch.setattr(levels, "tile_of", watched)
    return count


@pytest.mark.parametrize("sealed", [True, False])
def test_a_few_tiles_a_level_are_in_memory(sealed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CountingStore()
    one = put_image(plain, image(64 * 2, 64 * 2, 7), tile=2)
    store, derived = Watching(plain), watch_derived(monkeypatch)
    if sealed:
        stored_levels(store, DictMemo(), one)
    else:
        assert levels.read(store, DictMemo(), one, 6, 0, 0) is not None
    assert store.tiles_read >= 64 * 64
    # A thread holds the cell it halves; of derived tiles one a level is put together, beside those read ahead.
    assert store.most <= LEVEL_THREADS + 1
    assert derived[1] <= levels.apex_level(one) + 2 * LEVEL_THREADS
    assert (store.alive, derived[0]) == (0, 0)


def test_what_is_written_is_written_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the threads do: they compute, one writes."""
    orders = []
    for threads in (LEVEL_THREADS, 1, 2 * LEVEL_THREADS):
        monkeypatch.setattr(levels, "LEVEL_THREADS", threads)
        store = CountingStore()
        one = put_image(store, image(20 * TILE, 30 * TILE, 7))
        before = len(store.tiles)
        stored_levels(store, DictMemo(), one)
        orders.append((list(store.tiles)[before:], store.put))
    assert orders[0] == orders[1] == orders[2]


# -- which levels are stored


def pixels_stored(store: CountingStore, blob: BlobId) -> int:
    """Pixels of the stored levels under a companion, none counted twice."""
    total = 0
    for found in companions(store, blob):
        for at, level in enumerate(found.levels):
            if 3 * found.page_height + 1 + at >= found.stored_from:
                for _, tile in level:
                    values = store.read_tile(BlobId(tile))
                    assert not isinstance(values, bytes)
                    total += values.shape[0] * values.shape[1]
    return total


def test_of_a_dense_frame_every_level_is_stored() -> None:
    store = CountingStore()
    for side in (1, 3, 8 * 16, 8 * 16 + 1, 17 * 16 - 1):
        one = put_image(store, image(side, 2 * side, side), tile=16)
        made = companions(store, stored_levels(store, DictMemo(), one))
        assert all(found.stored_from == 3 * found.page_height + 1 for found in made)


@pytest.mark.parametrize("side", [1000, 3200])
def test_levels_of_scattered_tiles_take_a_third_and_an_apex_a_page(side: int) -> None:
    """Up to 10⁷ cells with a tile here and there: pixels of levels ≤ pixels of tiles / 3 + one tile a page."""
    store = CountingStore()
    cells = some_cells(side, side, 300, side)
    whole = np.zeros((2 * side, 2 * side), dtype=np.uint8)
    for number, (row, column) in enumerate(sorted(cells)):
        whole[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1 + number % 255
    one = put_image(store, whole, cells, tile=2)
    memo = DictMemo()
    blob = stored_levels(store, memo, one)
    made = companions(store, blob)
    singles = [found for found in made if found.page_height == 0 and len(found.levels[0]) == 1]
    assert singles
    assert all(found.stored_from == 3 for found in singles), "of a single tile's page the apex alone"
    # Each page's allowance: a third of its cells (tiles, or apexes of the pages below) and a tile.
    present, taken = 4 * len(cells), pixels_stored(store, blob)
    assert taken <= (present + 4 * (len(made) - 1)) / 3 + 4 * len(made)
    assert present + taken <= 4 / 3 * present + (1 + 1 / 3) * 4 * len(made)
    # What is not stored has a name, and the bytes that belong to it.
    row, column = sorted(cells)[7]
    for level in range(1, levels.apex_level(one) + 1):
        at = (level, row >> level, column >> level)
        sealed, found = (levels.entry(ReadOnly(store), kept, one, *at) for kept in (memo, DictMemo()))
        values = levels.read(ReadOnly(store), memo, one, *at)
        assert sealed is not None
        assert values is not None
        assert sealed == found
        assert found.ref == encode_array(values).ref


def test_a_page_with_few_tiles_stores_the_levels_that_fit() -> None:
    """The examples of docs/design/005, from the apex down: what fits a third of the tiles and one."""
    store, pixels = CountingStore(), image(8 * TILE, 8 * TILE, 3)
    corners = [(0, 0), (0, 7), (7, 0), (7, 7)]
    row = [(0, column) for column in range(8)]
    square = [(row, column) for row in range(4) for column in range(4)]
    exactly = [(0, 0), (0, 1), (1, 0)]
    for cells, stored_from in (
        (corners[:1], 3),
        (exactly, 2),
        (corners, 3),
        (row, 2),
        (square, 1),
        (square + corners, 2),
    ):
        made = levels.decode(store, stored_levels(store, DictMemo(), put_image(store, pixels, cells)))
        assert made.stored_from == stored_from, cells


# -- the levels root


def keyed(frames: Sequence[Frame]) -> dict[directory.FrameKey, Frame | None]:
    return {(frame.stream, frame.name): frame for frame in frames}


class CountingStoreOver(CountingStore):
    """A fresh store with the same blobs."""

    def __init__(self, other: CountingStore) -> None:
        super().__init__()
        self.pages, self.tiles = dict(other.pages), dict(other.tiles)


def test_levels_root_covers_every_frame_and_nothing_else() -> None:
    store, memo = CountingStore(), DictMemo()
    one = put_image(store, image(20, 20, 1))
    two = msgspec.structs.replace(put_image(store, image(20, 20, 2)), name="g")
    plain = msgspec.structs.replace(two, name="h", level_rule="none")
    roots = set()
    for frames in ([], [one], [two], [one, two], [plain]):
        root = directory.update(store, directory.EMPTY, keyed(frames))
        roots.add(levels.levels_root(store, memo, root))
        assert levels.levels_root(CountingStoreOver(store), DictMemo(), root) in roots
    assert len(roots) == 5


def many_frames(store: CountingStore, count: int) -> list[Frame]:
    return [
        msgspec.structs.replace(put_image(store, image(5, 5, number)), name=f"f{number}") for number in range(count)
    ]


def test_the_levels_root_visits_what_changed() -> None:
    store, memo = CountingStore(), DictMemo()
    frames = many_frames(store, 300)
    root = directory.update(store, directory.EMPTY, keyed(frames))
    levels.levels_root(store, memo, root)
    changed = msgspec.structs.replace(put_image(store, image(5, 5, 999)), name="f7")
    after = directory.update(store, root, keyed([changed]))
    store.reset()
    found = levels.levels_root(store, memo, after)
    assert len(store.loaded) <= 6, "one leaf of the directory and the way to it"
    assert found == levels.levels_root(store, DictMemo(), after)


def test_a_levels_root_whose_companions_were_lost_is_made_again() -> None:
    """A crash takes the end of a pack, but not the memo."""
    store, memo = CountingStore(), DictMemo()
    root = directory.update(store, directory.EMPTY, keyed(many_frames(store, 100)))
    kept = CountingStoreOver(store)
    found = levels.levels_root(store, memo, root)
    assert levels.levels_root(kept, memo, root) == found
    assert kept.tiles_put > 0
    assert set(kept.pages) == set(store.pages)
