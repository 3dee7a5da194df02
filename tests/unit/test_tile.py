"""One tile: identities that never change, values that come back, levels by an exact rule."""

import threading

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from him.config import META_BYTES_MAX, RAW_BELOW_RATIO, TILE_BYTES_MAX
from him.errors import IntegrityError, LimitError, UsageError
from him.tile import codec
from him.tile.address import KIND_DIRECTORY, KIND_PAGE, KIND_TILE, blob_id, tile_id
from him.tile.codec import DTYPES, RAW, SHUFFLE_ZSTD, ZSTD, TileHeader, decode, encode_array, encode_bytes
from him.types import BlobId, TileKey

Array = NDArray[np.generic]


def decoded(tile: codec.EncodedTile) -> Array:
    found = decode(tile.header, tile.codec, tile.stored, expect=tile.ref)
    assert not isinstance(found, bytes)
    return found


def arrays_of(*dtypes: str) -> st.SearchStrategy[Array]:
    """Arrays of 1–4 dimensions with any bit pattern at all, NaN payloads included."""

    def build(name: str, shape: tuple[int, ...], seed: int) -> Array:
        size = int(np.prod(shape)) * DTYPES[name].itemsize
        rng = np.random.default_rng(seed)
        raw = rng.bytes(size) if seed % 3 else bytes(size)
        if name == "bool":
            raw = bytes(byte & 1 for byte in raw)
        return np.frombuffer(raw, dtype=DTYPES[name]).reshape(shape)

    shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=7)
    return st.builds(build, st.sampled_from(dtypes), shapes, st.integers(0, 2**32 - 1))


# -- identity


def test_identities_are_pinned() -> None:
    """These constants are the format: if one changes, every stored repository is lost."""
    array = np.arange(12, dtype="<u2").reshape(3, 4)
    assert blob_id(KIND_TILE, b"h", b"payload").hex() == PINNED["blob"]
    assert encode_array(array).ref.hex() == PINNED["array"]
    assert encode_array(array.astype(">u2")).ref.hex() == PINNED["array"]
    assert encode_array(array.astype("<f4"), quantise="int8").ref.hex() == PINNED["int8"]
    assert encode_array(array.astype("<f4"), quantise="fp8").ref.hex() == PINNED["fp8"]
    assert encode_array(array.astype("<f4"), quantise="fp16").ref.hex() == PINNED["fp16"]
    assert encode_bytes(b"a document").ref.hex() == PINNED["bytes"]
    key = TileKey("screen", "a/b ü", 0, 3, 5)
    assert tile_id(key, bytes(range(16)), BlobId(bytes(32))).hex() == PINNED["tile_id"]


PINNED = {
    "blob": "03bf88ca58403530db7844f417188989c93e7103c412d99295fb05353fe5f0e5",
    "array": "9df8acdf2d08327a87b470ff790787c4ae0a9c4ec4d9526498ea776479406035",
    "int8": "36ede1bdb8c105f465694ebcd817984815732a4396bf79a6756d2139ef868975",
    "fp8": "27be299f5cd14a4166ba865b9fb12907f6165eaef9097d0fbf6317e90abc9a87",
    "fp16": "d7bb631207500160f33612ad1be43bca190d34134979b56beffd600d5ca1a858",
    "bytes": "0f16dc83e30b7543ec3b27cb93d72ddd0389aa454abb3cbec4fe328d7239aca0",
    "tile_id": "704c8b80bd28aac2c66cad966ec949556e2b290cba219e702356f4d307d4ca49",
}


def test_kind_and_header_split_are_part_of_the_identity() -> None:
    assert blob_id(KIND_PAGE, b"", b"x") != blob_id(KIND_DIRECTORY, b"", b"x")
    assert blob_id(KIND_TILE, b"ab", b"c") != blob_id(KIND_TILE, b"a", b"bc")


@given(
    st.tuples(
        st.sampled_from(["s", "t"]), st.text(max_size=3), st.integers(0, 2), st.integers(0, 9), st.integers(0, 9)
    ),
    st.tuples(
        st.sampled_from(["s", "t"]), st.text(max_size=3), st.integers(0, 2), st.integers(0, 9), st.integers(0, 9)
    ),
)
def test_tile_ids_are_equal_only_for_equal_places(
    one: tuple[str, str, int, int, int], other: tuple[str, str, int, int, int]
) -> None:
    ids = [tile_id(TileKey(*key), bytes(16), BlobId(bytes(32))) for key in (one, other)]
    assert (ids[0] == ids[1]) == (one == other)


@given(arrays_of(*DTYPES))
def test_identity_does_not_depend_on_memory_order(array: Array) -> None:
    assert encode_array(np.asfortranarray(array)).ref == encode_array(array).ref


@given(arrays_of("uint8", "int8"), st.data())
def test_shape_and_dtype_are_part_of_the_identity(array: Array, data: st.DataObject) -> None:
    assert encode_array(array.reshape(-1, 1)).ref != encode_array(array.reshape(1, -1)).ref or array.size == 1
    assert encode_array(array.view("int8")).ref != encode_array(array.view("uint8")).ref


# -- values come back


@given(arrays_of(*DTYPES))
def test_every_dtype_and_shape_comes_back_bit_for_bit(array: Array) -> None:
    found = decoded(encode_array(array))
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()
    assert not found.flags.writeable


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_survives_compression(name: str) -> None:
    array = np.zeros((64, 65, 3), dtype=DTYPES[name])
    array[3, 4] = 1
    tile = encode_array(array)
    assert tile.codec in (ZSTD, SHUFFLE_ZSTD)
    assert (tile.codec == ZSTD) == (DTYPES[name].itemsize == 1)
    assert decoded(tile).tobytes() == array.tobytes()


@given(st.binary(max_size=5000))
@example(b"")
@example(bytes(100_000))
def test_documents_come_back(document: bytes) -> None:
    tile = encode_bytes(document)
    assert decode(tile.header, tile.codec, tile.stored, expect=tile.ref) == document


def test_shape_and_dtype_are_known_without_values() -> None:
    tile = encode_array(np.ones((3, 4), dtype="float32"), quantise="int8")
    assert codec.shape_and_dtype(tile.header) == ((3, 4), "float32")
    assert codec.shape_and_dtype(encode_bytes(b"abc").header) == ((3,), "bytes")


@pytest.mark.parametrize(
    "array",
    [
        np.array(5),
        np.zeros((0, 3)),
        np.zeros((1, 1, 1, 1, 1)),
        np.array(["a"]),
        np.array([None]),
        np.array([(1, 2)], "i,i"),
    ],
    ids=["0-d", "empty", "5-d", "strings", "objects", "records"],
)
def test_what_is_no_tile_is_refused(array: Array) -> None:
    with pytest.raises(UsageError):
        encode_array(array)


def test_too_large_a_tile_is_refused_without_copying_it() -> None:
    huge = np.broadcast_to(np.uint8(1), (TILE_BYTES_MAX + 1,))
    with pytest.raises(LimitError):
        encode_array(huge)


# -- raw or compressed


@pytest.mark.parametrize("name", ["uint16", "float32", "float64", "complex128"])
@pytest.mark.parametrize("count", [1, 2, 3, 1023, 70_001])
def test_shuffling_is_a_transposition_of_bytes(name: str, count: int) -> None:
    size = DTYPES[name].itemsize
    values = np.random.default_rng(count).integers(0, 256, count * size, dtype=np.uint8)
    found = codec._shuffled(values, size)
    np.testing.assert_array_equal(found, values.reshape(count, size).T.reshape(-1))
    np.testing.assert_array_equal(codec._unshuffled(found, size), values)


def test_an_encoded_tile_does_not_change_with_the_array_it_was_made_of() -> None:
    array = np.random.default_rng(3).integers(0, 256, (512, 512), dtype=np.uint8)
    tile, was = encode_array(array), array.copy()
    array[:] = 0
    assert tile.codec == RAW
    np.testing.assert_array_equal(decoded(tile), was)


def test_a_borrowed_array_is_not_copied_and_has_the_same_identity() -> None:
    array = np.random.default_rng(3).integers(0, 256, (512, 512), dtype=np.uint8)
    tile = encode_array(array, borrow=True)
    assert np.shares_memory(np.frombuffer(tile.stored, dtype=np.uint8), array)
    copied = encode_array(array)
    assert (tile.ref, tile.header, tile.codec) == (copied.ref, copied.header, RAW)
    assert not np.shares_memory(np.frombuffer(copied.stored, dtype=np.uint8), array)


def test_raw_values_are_a_read_only_view_of_the_stored_bytes() -> None:
    array = np.random.default_rng(3).integers(0, 256, (64, 64), dtype=np.uint8)
    tile, buffer = encode_array(array), bytearray(array.tobytes())
    found = decode(tile.header, tile.codec, memoryview(buffer), expect=tile.ref)
    assert isinstance(found, np.ndarray)
    assert np.shares_memory(found, np.frombuffer(buffer, dtype=np.uint8))
    assert not found.flags.writeable


def test_threads_encode_and_decode_at_once() -> None:
    arrays = [np.add.outer(np.arange(500), np.arange(700) * i).astype(np.float32) for i in range(4)]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(20):
            if decoded(encode_array(arrays[number])).tobytes() != arrays[number].tobytes():
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


@pytest.mark.parametrize("size", [100, 70_000, 3_000_000])
def test_noise_is_stored_raw_and_order_is_compressed(size: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    assert encode_array(noise).codec == RAW
    assert encode_array(noise).stored == noise.tobytes()
    assert encode_array(np.zeros(size, dtype=np.uint8)).codec == ZSTD
    assert encode_array(np.arange(size, dtype=np.float32)).codec == SHUFFLE_ZSTD


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(64, 40_000))
def test_compressed_only_where_it_gains_a_quarter(seed: int, bits: int, size: int) -> None:
    tile = encode_array(np.random.default_rng(seed).integers(0, 2**bits, size, dtype=np.uint8))
    assert (tile.codec == RAW) == (len(tile.stored) == len(tile.payload))
    if tile.codec != RAW:
        assert len(tile.payload) >= RAW_BELOW_RATIO * len(tile.stored)


def test_a_mostly_random_tile_whose_samples_look_random_is_raw() -> None:
    values = np.random.default_rng(2).integers(0, 256, 8_000_000, dtype=np.uint8)
    values[100_000:100_600] = 0
    tile = encode_array(values)
    assert tile.codec == RAW
    assert decoded(tile).tobytes() == values.tobytes()


# -- quantisation

FLOATS = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=FLOATS))
@example(np.full((2, 2, 2), 3.4028235e38, dtype=np.float32))
@example(np.full((2, 2), 1e-40, dtype=np.float32))
@example(np.array([[[0.0, 1e-30]], [[0.0, 1e30]]], dtype=np.float32))
def test_int8_error_is_at_most_half_a_step_of_its_channel(array: NDArray[np.float32]) -> None:
    tile = encode_array(array, quantise="int8")
    head = msgspec.msgpack.decode(tile.header, type=TileHeader)
    found = decoded(tile)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    wide = np.abs(array.astype(np.float64))
    peak = wide.max(axis=tuple(range(array.ndim - 1))) if array.ndim >= 3 else wide.max()
    error = np.abs(found.astype(np.float64) - array.astype(np.float64))
    if head.quantise == "int8":
        assert (error <= peak / 254 * 1.0001).all()
    elif head.quantise == "fp16":
        assert (error <= wide.max() * 2.0**-11).all(), "fp16 only where the range fits"
    else:
        assert found.tobytes() == array.tobytes()


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=FLOATS))
def test_fp8_error_is_at_most_a_sixteenth_of_the_value_or_a_step(array: NDArray[np.float32]) -> None:
    tile = encode_array(array, quantise="fp8")
    head = msgspec.msgpack.decode(tile.header, type=TileHeader)
    found = decoded(tile).astype(np.float64)
    wide = array.astype(np.float64)
    peak = np.abs(wide).max(axis=tuple(range(array.ndim - 1))) if array.ndim >= 3 else np.abs(wide).max()
    error = np.abs(found - wide)
    if head.quantise == "fp8":
        # Three bits of mantissa; below 2^-6 of the scaled range steps are constant (subnormal).
        assert (error <= np.maximum(np.abs(wide) / 16, peak / 448 * 2.0**-10) * 1.001).all()
    elif head.quantise == "fp16":
        assert (error <= np.abs(wide).max() * 2.0**-11).all()
    else:
        assert decoded(tile).tobytes() == array.tobytes()


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=5), elements=FLOATS))
@example(np.array([1e-9], dtype=np.float32))
@example(np.array([65505.0], dtype=np.float32))
def test_fp16_where_the_range_fits_else_lossless(array: NDArray[np.float32]) -> None:
    tile = encode_array(array, quantise="fp16")
    found = decoded(tile)
    error = np.abs(found.astype(np.float64) - array.astype(np.float64))
    assert (error <= np.abs(array.astype(np.float64)).max() * 2.0**-11).all()


@pytest.mark.parametrize("quantise", ["int8", "fp8", "fp16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_kept_exactly(quantise: str, bad: float) -> None:
    array = np.array([[1.0, bad], [2.0, 3.0]], dtype=np.float32)
    assert decoded(encode_array(array, quantise=quantise)).tobytes() == array.tobytes()


@pytest.mark.parametrize("quantise", ["int8", "fp8", "fp16"])
def test_a_range_that_does_not_fit_is_kept_exactly(quantise: str) -> None:
    array = np.array([[1e300, 1.0]], dtype=np.float64)
    assert decoded(encode_array(array, quantise=quantise)).tobytes() == array.tobytes()


TALL = hnp.array_shapes(min_dims=1, max_dims=3, max_side=4).map(lambda shape: (64 + shape[0], *shape))


@given(TALL, st.integers(0, 2**32 - 1), st.sampled_from(["float16", "float32", "float64"]))
def test_int8_error_of_a_tall_tile_is_at_most_half_a_step_of_its_column(
    shape: tuple[int, ...], seed: int, name: str
) -> None:
    rng = np.random.default_rng(seed)
    peaks = 10.0 ** rng.integers(-3, 4, shape[1:])
    array = (rng.uniform(-1, 1, shape) * peaks * (rng.random(shape[1:]) < 0.9)).astype(name)
    tile = encode_array(array, quantise="int8")
    head = msgspec.msgpack.decode(tile.header, type=TileHeader)
    assert head.quantise == "int8"
    assert len(head.scales) == 4 * np.prod(shape[1:], dtype=int)
    wide = array.astype(np.float64)
    own = np.finfo(name).eps * np.abs(wide) + (2.0**-24 if name == "float16" else 0)
    error = np.abs(decoded(tile).astype(np.float64) - wide)
    assert (error <= np.abs(wide).max(axis=0) / 254 * 1.0001 + own).all()


@pytest.mark.parametrize(("rows", "scales"), [(63, 3), (64, 6)])
def test_int8_has_a_scale_a_column_from_64_rows_on(rows: int, scales: int) -> None:
    tile = encode_array(np.ones((rows, 2, 3), dtype=np.float32), quantise="int8")
    assert len(msgspec.msgpack.decode(tile.header, type=TileHeader).scales) == 4 * scales


def test_scales_never_outgrow_a_records_header() -> None:
    wide = np.ones((64, 600, 600), dtype=np.float32)
    by_channel = encode_array(wide, quantise="int8")
    assert msgspec.msgpack.decode(by_channel.header, type=TileHeader).scales == np.full(600, 1 / 127, "<f4").tobytes()
    many = np.ones((2, 1, 300_000), dtype=np.float32)
    for quantise in ("int8", "fp8"):
        tile = encode_array(many, quantise=quantise)
        assert msgspec.msgpack.decode(tile.header, type=TileHeader).quantise == "fp16"
        assert len(tile.header) < META_BYTES_MAX
        assert decoded(tile).tobytes() == many.tobytes()


@pytest.mark.parametrize("quantise", ["int8", "fp8"])
@pytest.mark.parametrize("low", [1e-40, 1e-37, 1e-45])
def test_a_channel_too_small_for_a_scale_is_not_lost_to_fp16(quantise: str, low: float) -> None:
    array = np.ones((4, 4, 2), dtype=np.float32)
    array[..., 1] = low
    assert decoded(encode_array(array, quantise=quantise)).tobytes() == array.tobytes()


@pytest.mark.parametrize("quantise", ["int8", "fp8", "fp16"])
def test_what_is_0_in_float32_alone_is_kept_exactly(quantise: str) -> None:
    array = np.full((4, 4), 1e-300)
    assert decoded(encode_array(array, quantise=quantise)).tobytes() == array.tobytes()


@pytest.mark.parametrize("quantise", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 63, 64, 65])
def test_peaks_are_kept(quantise: str, rows: int) -> None:
    array = np.zeros((rows, 3, 2), dtype=np.float32)
    array[-1] = np.array([[3.3e38, -3.3e38], [1e-30, -7.0], [65504.0, 0.1]])
    found = decoded(encode_array(array, quantise=quantise))
    np.testing.assert_allclose(np.abs(found).max(axis=(0, 1)), np.abs(array).max(axis=(0, 1)), rtol=1e-6)


def test_each_channel_has_its_own_scale() -> None:
    array = np.ones((4, 4, 2), dtype=np.float32)
    array[..., 0] *= 1e-3
    array[..., 1] *= 1e3
    found = decoded(encode_array(array, quantise="int8"))
    np.testing.assert_allclose(found, array, rtol=1e-6)


@pytest.mark.parametrize("name", ["uint8", "int32", "bool", "complex64", "float8_e4m3fn"])
def test_only_floats_are_quantised(name: str) -> None:
    array = np.ones((3, 3), dtype=DTYPES[name])
    assert decoded(encode_array(array, quantise="int8")).tobytes() == array.tobytes()


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "bfloat16"])
def test_the_logical_dtype_comes_back(name: str) -> None:
    array = np.linspace(-3, 3, 24).reshape(2, 4, 3).astype(DTYPES[name])
    for quantise in ("int8", "fp8", "fp16"):
        assert decoded(encode_array(array, quantise=quantise)).dtype == array.dtype


def test_unknown_quantisation_is_refused() -> None:
    with pytest.raises(UsageError):
        encode_array(np.ones((2, 2), dtype=np.float32), quantise="int3")


# -- altered bytes


@given(arrays_of("uint8", "float32", "int64"), st.data())
def test_altered_bytes_are_refused(array: Array, data: st.DataObject) -> None:
    tile = encode_array(array)
    which = data.draw(st.sampled_from(["header", "stored", "codec", "short", "long"]))
    header, number, stored = tile.header, tile.codec, bytes(tile.stored)
    if which == "short":
        stored = stored[: data.draw(st.integers(0, len(stored) - 1))]
    elif which == "long":
        stored += b"\0"
    elif which == "codec":
        number = data.draw(st.sampled_from([n for n in (0, 1, 2, 3, 200) if n != number]))
    else:
        part = bytearray(header if which == "header" else stored)
        part[data.draw(st.integers(0, len(part) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        header, stored = (bytes(part), stored) if which == "header" else (header, bytes(part))
    try:
        found = decode(header, number, stored, expect=tile.ref)
    except IntegrityError:
        return
    # The checksum-free zstd frame has bits without meaning; the values they decode to are still exactly right.
    assert not isinstance(found, bytes)
    assert (found.tobytes(), found.shape, found.dtype) == (array.tobytes(), array.shape, array.dtype)


@pytest.mark.parametrize(
    "head",
    [
        TileHeader("float99", (2, 2)),
        TileHeader("uint8", (-2, -2)),
        TileHeader("uint8", (-4,)),
        TileHeader("uint8", (2**40, 2**40)),
        TileHeader("uint8", ()),
        TileHeader("int8", (2, 2), "float32", "int8", b"123"),
        TileHeader("int8", (2, 2), "nothing", "int8", b"1234"),
        TileHeader("int8", (2, 2), "float32", "int8", bytes(12)),
        TileHeader("int8", (2, 1, 2), "float32", "int8", bytes(4)),
        TileHeader("int8", (1, 2, 2), "float32", "int8", bytes(13)),
        TileHeader("int8", (1, 2, 2), "float32", "int8", bytes(9)),
        TileHeader("float16", (2,), "", "fp16"),
        TileHeader("float16", (2,), "bytes", "fp16"),
        TileHeader("float16", (2,), "complex64", "fp16"),
        TileHeader("uint8", (4,), "float32", "int8", bytes(4)),
        TileHeader("uint8", (4,), "float32", "int3", bytes(4)),
        TileHeader("uint32", (), "float32", "int8", bytes(4)),
        TileHeader("bytes", (4,), "float32", "int8", bytes(4)),
    ],
)
def test_impossible_headers_are_integrity_errors(head: TileHeader) -> None:
    with pytest.raises(IntegrityError):
        decode(msgspec.msgpack.encode(head), RAW, b"1234")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(50_000_000))
    header = msgspec.msgpack.encode(TileHeader("uint8", (2, 2)))
    with pytest.raises(IntegrityError):
        decode(header, ZSTD, bomb)
