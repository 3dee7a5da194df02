"""Exact nearest rows by meaning: an int8 dot product scan in RAM."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from him.config import EMBEDDING_SCALE

CHUNK_ROWS: Final = 4096
"""Rows converted at a time: 6 MB of float32, which stays in the cache."""
FULL_SCORE: Final = EMBEDDING_SCALE * EMBEDDING_SCALE
"""Score of two equal unit vectors, up to rounding."""


def scan(vectors: NDArray[np.int8], query: NDArray[np.int8]) -> NDArray[np.int64]:
    """(n,) exact dot products of (n, d) int8 rows with a (d,) int8 query.

    Every partial sum is an integer of magnitude ≤ 384 × 127 × 127 < 2²⁴, which float32 holds exactly; so the fast
    float32 product is exact whatever the order of addition, the number of threads or the instruction set.
    """
    out = np.empty(len(vectors), dtype=np.int64)
    wide = query.astype(np.float32)
    for start in range(0, len(vectors), CHUNK_ROWS):
        out[start : start + CHUNK_ROWS] = vectors[start : start + CHUNK_ROWS].astype(np.float32) @ wide
    return out


def top(scores: NDArray[np.int64], count: int) -> list[tuple[int, int]]:
    """The best (row, score), best first, equal scores by row; only scores above zero."""
    if len(scores) > count:
        # Everything that ties with the last place is kept for the sort, so the cut depends on rows alone.
        limit = np.partition(scores, len(scores) - count)[len(scores) - count]
        rows = np.flatnonzero(scores >= max(int(limit), 1))
    else:
        rows = np.flatnonzero(scores > 0)
    order = np.lexsort((rows, -scores[rows]))[:count]
    return [(int(row), int(scores[row])) for row in rows[order]]
