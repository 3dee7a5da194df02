"""Level rules: four samples of level ℓ−1 become one of level ℓ, by integer formulas where values are integers.

An odd last row or column uses the samples that exist; the result has size ⌈n/2⌉ (design §6, level rules).
"""

from collections.abc import Callable
from typing import Final, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from him.errors import UsageError

Array = NDArray[np.generic]
T = TypeVar("T", bound=np.generic)


def halve(values: Array, rule: str) -> Array:
    """Shapes: (h, w, …) → (⌈h/2⌉, ⌈w/2⌉, …), same dtype.

    Raises:
        UsageError: an unknown rule.
    """
    if rule not in RULES:
        raise UsageError(f"unknown level rule {rule!r}", fix=f"use one of: {', '.join(RULES)}")
    return RULES[rule](values)


def _quads(values: NDArray[T]) -> tuple[NDArray[T], NDArray[T], NDArray[T], NDArray[T]]:
    """The four samples under each result; a missing one repeats its existing neighbour."""
    height, width = values.shape[:2]
    pad = [(0, height % 2), (0, width % 2)] + [(0, 0)] * (values.ndim - 2)
    even = np.pad(values, pad, mode="edge")
    return even[0::2, 0::2], even[0::2, 1::2], even[1::2, 0::2], even[1::2, 1::2]


def _mean(values: Array) -> Array:
    # Repeating an edge sample leaves the mean of those that exist unchanged: (2a+2b)/4 = (a+b)/2.
    height, width = values.shape[:2]
    # For two channels cv2 takes another path, which rounds half to even.
    if values.dtype == np.uint8 and values.ndim in (2, 3) and (values.ndim == 2 or values.shape[2] in (1, 3, 4)):
        even = np.pad(
            values.view(np.uint8), [(0, height % 2), (0, width % 2)] + [(0, 0)] * (values.ndim - 2), mode="edge"
        )
        size = (even.shape[1] // 2, even.shape[0] // 2)
        shrunk = np.asarray(cv2.resize(even, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        return shrunk.reshape((size[1], size[0], *values.shape[2:]))
    return mean_oracle(values)


def mean_oracle(values: Array) -> Array:
    """The definition of the mean rule: integers are rounded half up, floats averaged in float64."""
    if np.issubdtype(values.dtype, np.integer) and values.dtype.itemsize == 8:
        a, b, c, d = _quads(cast("NDArray[np.int64]", values))
        # The sum may not fit 64 bits: quarters and remainders are added apart, with the same result.
        return (a >> 2) + (b >> 2) + (c >> 2) + (d >> 2) + (((a & 3) + (b & 3) + (c & 3) + (d & 3) + 2) >> 2)
    a, b, c, d = _quads(values)
    if np.issubdtype(values.dtype, np.integer):
        total = a.astype(np.int64) + b.astype(np.int64) + c.astype(np.int64) + d.astype(np.int64)
        return ((total + 2) >> 2).astype(values.dtype)
    total = a.astype(np.float64) + b.astype(np.float64) + c.astype(np.float64) + d.astype(np.float64)
    return (total / 4).astype(values.dtype)


def _max(values: Array) -> Array:
    a, b, c, d = _quads(values)
    return np.maximum(np.maximum(a, b), np.maximum(c, d))


def _min(values: Array) -> Array:
    a, b, c, d = _quads(values)
    return np.minimum(np.minimum(a, b), np.minimum(c, d))


def _first(values: Array) -> Array:
    return np.ascontiguousarray(values[0::2, 0::2])


RULES: Final[dict[str, Callable[[Array], Array]]] = {"mean": _mean, "max": _max, "min": _min, "first": _first}
"""Level rules by name; a stream with the rule "none" has level 0 alone."""
