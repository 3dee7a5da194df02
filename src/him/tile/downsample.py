"""Level rules: four samples of one level become one of the next, by formulas that give the same bits on every machine.

The formulas stand in docs/FORMAT.md ("Level rules"). An odd last row or column uses the samples that exist; the result
has size ⌈n/2⌉ (design §6). OpenCV and numpy only make them fast: where OpenCV's own arithmetic is used, it has been
asked once whether it gives the formula's bits.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, cast

import cv2
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from him.errors import UsageError

Array = NDArray[np.generic]
_Ufunc = Callable[..., Any]
_Core = Callable[[Array, Array], None]
"""Halves an even number of rows and columns: (2h, 2w[, c]) → writes (h, w[, c])."""

_STRIP_BYTES: Final = 512 * 1024
"""Wide sums of a strip of rows stay within a core's second-level cache."""
_FEW_CHANNELS: Final = 8
"""Below, channels are taken one by one: numpy's inner loop over so few would cost more than the work."""
_CV2_CHANNELS: Final = (1, 3, 4)
"""For other counts OpenCV takes another path, which rounds half to even."""
_CV2_SAMPLES_MIN: Final = 64
"""OpenCV takes up to four samples for one number with up to four channels."""
_WIDER: Final[Mapping[str, str]] = {
    "uint8": "uint16", "int8": "int16", "uint16": "uint32", "int16": "int32", "uint32": "uint64", "int32": "int64",
}  # fmt: skip
_BEYOND_FLOAT32: Final = (1 << 29) - 1
"""Bits of a float64 significand that float32 lacks."""


def halve(values: Array, rule: str, *, first: bool = True, out: Array | None = None) -> Array:
    """Values of the next level.

    Args:
        values: (h, w) or (h, w, c).
        rule: one of RULES.
        first: `values` are of level 0, which `min-max` splits into minima and maxima.
        out: where to write the result (a part of a larger tile); made when left out.

    Shapes:
        (h, w[, c]) → (⌈h/2⌉, ⌈w/2⌉[, c]), same dtype; `min-max` on level 0: (⌈h/2⌉, ⌈w/2⌉, 2·max(1, c)).

    Raises:
        UsageError: an unknown rule, or values without order for a rule that compares.
    """
    check(rule, values.dtype)
    if out is None:
        shape = (-(-values.shape[0] // 2), -(-values.shape[1] // 2), *tail_at(rule, values.shape[2:], first=first))
        out = np.empty(shape, dtype=values.dtype)
    RULES[rule](values, out, first)
    return out


@cache
def check(rule: str, dtype: np.dtype[np.generic]) -> None:
    """Whether values of a dtype can have levels by a rule. Raises UsageError."""
    if rule not in RULES:
        raise UsageError(f"unknown level rule {rule!r}", fix=f"use one of: {', '.join(RULES)}")
    if dtype.kind == "c" and rule in ("max", "min", "min-max"):
        raise UsageError(f"{dtype.name} values have no order for the level rule {rule!r}", fix="use mean or first")


def tail_at(rule: str, tail: tuple[int, ...], *, first: bool) -> tuple[int, ...]:
    """What follows height and width in the shape of the level above a tile with `tail` (() or (channels,))."""
    return (2 * (tail[0] if tail else 1),) if rule == "min-max" and first else tail


# -- the formulas


def _mean(values: Array, out: Array, _first: bool) -> None:
    _everywhere(values, out, _core_of_mean(values.dtype, values.shape[2] if values.ndim == 3 else 1))


def _max(values: Array, out: Array, _first: bool) -> None:
    _extreme(np.maximum, values, out)


def _min(values: Array, out: Array, _first: bool) -> None:
    _extreme(np.minimum, values, out)


def _first(values: Array, out: Array, _first: bool) -> None:
    out[...] = values[0::2, 0::2]


def _nearest(values: Array, out: Array, _first: bool) -> None:
    def core(values: Array, out: Array) -> None:
        out[...] = values[1::2, 1::2]

    _everywhere(values, out, core)


def _min_max(values: Array, out: Array, first: bool) -> None:
    values = _in_three(values)
    middle = out.shape[2] // 2
    _extreme(np.minimum, values if first else values[:, :, :middle], out[:, :, :middle])
    _extreme(np.maximum, values if first else values[:, :, middle:], out[:, :, middle:])


RULES: Final[dict[str, Callable[[Array, Array, bool], None]]] = {
    "mean": _mean, "max": _max, "min": _min, "first": _first, "nearest": _nearest, "min-max": _min_max,
}  # fmt: skip
"""Level rules by name; a stream with the rule "none" has level 0 alone."""


# -- how they are computed


@cache
def _core_of_mean(dtype: np.dtype[np.generic], channels: int) -> _Core:
    if dtype.kind == "b":
        return _mean_of_bools
    if dtype.kind == "c":
        return _mean_of_complex
    if dtype.name == "int8" and _cv2_means(np.dtype(np.uint8), channels):
        return _mean_of_signed_bytes
    if dtype.kind in "iu":
        return _mean_by_cv2 if _cv2_means(dtype, channels) else _mean_of_integers
    return _mean_of_floats


def _in_three(values: Array) -> Array:
    return values if values.ndim == 3 else values[:, :, np.newaxis]


def _everywhere(values: Array, out: Array, core: _Core) -> None:
    """Run `core` on the even part; the edge samples, repeated, on an odd last row and column.

    Repeating them leaves mean, maximum and minimum of the samples that exist unchanged, and the last one is nearest.
    """
    height, width = values.shape[0] & ~1, values.shape[1] & ~1
    if (height, width) == values.shape[:2]:
        core(values, out)
        return
    if height and width:
        core(values[:height, :width], out[: height // 2, : width // 2])
    if width < values.shape[1] and height:
        core(np.repeat(values[:height, width:], 2, axis=1), out[: height // 2, width // 2 :])
    if height < values.shape[0]:
        _everywhere(np.repeat(values[height:], 2, axis=0), out[height // 2 :], core)


def _strips(values: Array, out: Array, itemsize: int) -> list[tuple[Array, Array]]:
    """Both in strips of rows, always with three axes."""
    values, out = _in_three(values), _in_three(out)
    rows = max(1, _STRIP_BYTES // (values.shape[1] * values.shape[2] * itemsize))
    return [(values[2 * at : 2 * (at + rows)], out[at : at + rows]) for at in range(0, len(out), rows)]


def _columns(combine: _Ufunc, rows: Array, out: Array) -> None:
    """Combine horizontal neighbours: (h, 2w, c) → (h, w, c)."""
    left, right = rows[:, 0::2], rows[:, 1::2]
    if out.shape[2] >= _FEW_CHANNELS:
        combine(left, right, out=out)
    else:
        for channel in range(out.shape[2]):
            combine(left[:, :, channel], right[:, :, channel], out=out[:, :, channel])


def _mean_by_cv2(values: Array, out: Array) -> None:
    if values.ndim == 3 and values.shape[2] == 1:
        values, out = values[:, :, 0], out[:, :, 0]
    high, wide = out.shape[:2]
    cv2.resize(cast("Any", values), (wide, high), dst=cast("Any", out), interpolation=cv2.INTER_AREA)


def _mean_of_signed_bytes(values: Array, out: Array) -> None:
    # (sum + 4·128 + 2) >> 2 is 128 more than (sum + 2) >> 2: signs are moved away and back.
    source, target = values.view(np.uint8), out.view(np.uint8)
    _mean_by_cv2(source ^ np.uint8(128), target)
    np.bitwise_xor(target, 128, out=target)


def _mean_of_bools(values: Array, out: Array) -> None:
    _mean_of_integers(values.view(np.uint8), out.view(np.uint8))


def _mean_of_complex(values: Array, out: Array) -> None:
    part, means = f"f{values.dtype.itemsize // 2}", np.empty_like(_in_three(out), order="C")
    _mean_of_floats(np.ascontiguousarray(_in_three(values)).view(part), means.view(part))
    out[...] = means.reshape(out.shape)


@cache
def _cv2_means(dtype: np.dtype[np.generic], channels: int) -> bool:
    """Whether this OpenCV gives the formula's bits for such values."""
    if channels not in _CV2_CHANNELS or dtype.name not in ("uint8", "uint16", "int16"):
        return False
    values = _probe(6, 142, channels, dtype)
    fast, exact = np.empty((2, 3, 71, channels), dtype=dtype)
    _mean_by_cv2(values, fast)
    _mean_of_integers(values, exact)
    return fast.tobytes() == exact.tobytes()


def _probe(height: int, width: int, channels: int, dtype: np.dtype[np.generic]) -> Array:
    """Fixed values in which every bit varies."""
    count = height * width * channels
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    return mixed.astype(np.uint16).astype(f"u{dtype.itemsize}").view(dtype).reshape(height, width, channels)


def _mean_of_integers(values: Array, out: Array) -> None:
    if values.dtype.itemsize == 8:
        _mean_of_long_integers(values, out)
        return
    wide = np.dtype(_WIDER[values.dtype.name])
    for strip, target in _strips(values, out, wide.itemsize):
        rows = np.add(strip[0::2], strip[1::2], dtype=wide)
        sums = np.empty(target.shape, dtype=wide)
        _columns(np.add, rows, sums)
        sums += 2
        sums >>= 2
        target[...] = sums


def _mean_of_long_integers(values: Array, out: Array) -> None:
    """The sum may not fit 64 bits: quarters and remainders are added apart, with the same result."""
    for strip, target in _strips(values, out, 8):
        a, b, c, d = (cast("NDArray[np.int64]", strip[y::2, x::2]) for y in (0, 1) for x in (0, 1))
        target[...] = (a >> 2) + (b >> 2) + (c >> 2) + (d >> 2) + (((a & 3) + (b & 3) + (c & 3) + (d & 3) + 2) >> 2)


def _mean_of_floats(values: Array, out: Array) -> None:
    """((a + c) + (b + d)) / 4 in float64, rounded once to the dtype; any NaN gives the one positive quiet NaN."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for strip, target in _strips(values, out, 8):
            rows = _row_sums(strip)
            means = np.empty(target.shape)
            _columns(np.add, rows, means)
            if values.dtype.itemsize < 8:
                means *= 0.25
            target[...] = _rounded(means, values.dtype)
            unknown = np.isnan(means)
            if unknown.any():
                target[unknown] = values.dtype.type("nan")


def _row_sums(values: Array) -> NDArray[np.float64]:
    """Upper + lower sample of each column in float64."""
    name = values.dtype.name
    if name == "float64":
        # Quartered first, so that no sum overflows; those of narrower floats can't, and are quartered last.
        wide = cast("NDArray[np.float64]", values)
        return wide[0::2] * 0.25 + wide[1::2] * 0.25
    if name == "float16" and values.size >= _CV2_SAMPLES_MIN and _cv2_knows_halves():
        flat = values.reshape(values.shape[0], -1)
        return _cv2_sums(flat).reshape(-1, *values.shape[1:])
    if name == "bfloat16":
        values = values.astype(np.float32)
    elif name.startswith("float8"):
        values = np.take(_all_of(values.dtype), values.view(np.uint8))
    return np.add(values[0::2], values[1::2], dtype=np.float64)


@cache
def _all_of(dtype: np.dtype[np.generic]) -> NDArray[np.float32]:
    """Every value of an 8-bit float: its own conversions are slow."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _rounded(means: NDArray[np.float64], dtype: np.dtype[np.generic]) -> Array:
    """Float64 values as `dtype`, rounded once to nearest, ties to even."""
    if dtype.itemsize >= 4:
        return means.astype(dtype)
    # Conversions to small floats pass through float32 and would round twice. The 29 bits that float32 lacks are
    # folded into its last one (rounding to odd), so the first step loses nothing that the second needs.
    bits = means.view(np.int64)
    odd = bits & _BEYOND_FLOAT32
    odd += _BEYOND_FLOAT32
    odd |= bits
    odd &= ~_BEYOND_FLOAT32
    folded = odd.view(np.float64)
    if dtype.name == "float16" and means.size >= _CV2_SAMPLES_MIN and _cv2_knows_halves():
        return _cv2_halves(folded.reshape(len(folded), -1)).reshape(folded.shape)
    return folded.astype(np.float32).astype(dtype)


def _cv2_sums(values: Array) -> NDArray[np.float64]:
    return cast("NDArray[np.float64]", cv2.add(cast("Any", values[0::2]), cast("Any", values[1::2]), dtype=cv2.CV_64F))


def _cv2_halves(values: NDArray[np.float64]) -> Array:
    # Nothing is subtracted, because adding nothing would lose the sign of a zero.
    return cast("Array", cv2.subtract(cast("Any", values), cast("Any", 0.0), dtype=cv2.CV_16F))


@cache
def _cv2_knows_halves() -> bool:
    """Whether this OpenCV converts float16 as numpy does, several times faster (before version 5 it can't at all)."""
    values = cast("NDArray[np.float16]", _probe(4, 66, 1, np.dtype(np.float16)).reshape(4, 66))
    values = np.where(np.isfinite(values), values, np.float16(-0.0))
    exact = np.add(values[0::2], values[1::2], dtype=np.float64)
    folded = exact.astype(np.float32).astype(np.float64)
    try:
        return (
            _cv2_sums(values).tobytes() == exact.tobytes()
            and _cv2_halves(folded).tobytes() == folded.astype(np.float16).tobytes()
        )
    except (cv2.error, AttributeError):
        return False


def _extreme(choose: _Ufunc, values: Array, out: Array) -> None:
    """Maxima or minima; floats by IEEE totalOrder (−0 < +0), any NaN gives the one positive quiet NaN."""

    def core(values: Array, out: Array) -> None:
        for strip, target in _strips(values, out, values.dtype.itemsize):
            _columns(choose, choose(strip[0::2], strip[1::2]), target)

    def core_of_floats(values: Array, out: Array) -> None:
        for strip, target in _strips(values, out, values.dtype.itemsize):
            keys = _sortable(strip, choose is np.maximum)
            found = np.empty(target.shape, dtype=keys.dtype)
            _columns(choose, choose(keys[0::2], keys[1::2]), found)
            target[...] = _from_sortable(found, values.dtype)

    _everywhere(values, out, core if values.dtype.kind in "iub" else core_of_floats)


def _sortable(values: Array, nan_wins_above: bool) -> NDArray[np.signedinteger[Any]]:
    """Floats as integers in the same order; a NaN, whatever its sign, at the end that wins."""
    keys = np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")
    limits, last = np.iinfo(keys.dtype), _last_number(values.dtype)
    unsigned = keys & limits.max
    ordered = keys ^ ((keys >> (limits.bits - 1)) & limits.max)
    if unsigned.max() > last:
        ordered[unsigned > last] = limits.max if nan_wins_above else limits.min
    return ordered


def _from_sortable(keys: NDArray[np.signedinteger[Any]], dtype: np.dtype[np.generic]) -> Array:
    limits, last = np.iinfo(keys.dtype), _last_number(dtype)
    bits = keys ^ ((keys >> (limits.bits - 1)) & limits.max)
    values = bits.view(dtype)
    unsigned = bits & limits.max
    if unsigned.max() > last:
        values[unsigned > last] = dtype.type("nan")
    return values


@cache
def _last_number(dtype: np.dtype[np.generic]) -> int:
    """Bits of infinity, or of the largest number where there is none; beyond lie only NaN."""
    infinity = np.array(np.inf).astype(dtype)
    largest = infinity if np.isinf(infinity) else np.array(cast("Any", ml_dtypes.finfo(dtype)).max)
    return int(largest.view(f"u{dtype.itemsize}"))
