"""Arithmetic in GF(2^8), the field of 256 elements that Reed–Solomon codes over bytes are made of (docs/FORMAT.md).

Addition is XOR; multiplication is of polynomials over GF(2) modulo x⁸ + x⁴ + x³ + x² + 1 (0x11d), of which 2 is a
generator.
"""

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_POLYNOMIAL: Final = 0x11D


def _powers() -> list[int]:
    found, value = list[int](), 1
    for _ in range(255):
        found.append(value)
        value <<= 1
        value ^= _POLYNOMIAL if value & 0x100 else 0
    return found


_POWER: Final = _powers()
_LOG: Final = {value: exponent for exponent, value in enumerate(_POWER)}


def multiply(one: int, other: int) -> int:
    """The product of two elements."""
    return _POWER[(_LOG[one] + _LOG[other]) % 255] if one and other else 0


def inverse(one: int) -> int:
    """The element whose product with `one`, which is not 0, is 1."""
    return _POWER[-_LOG[one] % 255]


_TABLES: Final = np.array([[multiply(one, other) for other in range(256)] for one in range(256)], dtype=np.uint8)
"""Row c: the products of c with every byte."""


def cauchy(data: int, parity: int) -> Bytes:
    """(parity, data) coefficients 1 / ((data + i) XOR j): each square part of them can be inverted.

    So of data + parity rows, those of the identity above these, any `data` determine all others (Blömer et al., "An
    XOR-Based Erasure-Resilient Coding Scheme", 1995).
    """
    return np.array([[inverse((data + i) ^ j) for j in range(data)] for i in range(parity)], dtype=np.uint8)


def inverted(matrix: Bytes) -> Bytes:
    """The inverse of a square matrix, by elimination. Raises ValueError when it has none."""
    size = len(matrix)
    left, right = matrix.copy(), np.eye(size, dtype=np.uint8)
    for at in range(size):
        pivots = np.flatnonzero(left[at:, at])
        if not len(pivots):
            raise ValueError("the matrix has no inverse")
        found = at + int(pivots[0])
        for half in (left, right):
            half[[at, found]] = half[[found, at]]
        scale = inverse(int(left[at, at]))
        left[at], right[at] = _TABLES[scale][left[at]], _TABLES[scale][right[at]]
        for row in range(size):
            factor = int(left[row, at])
            if row != at and factor:
                left[row] ^= _TABLES[factor][left[at]]
                right[row] ^= _TABLES[factor][right[at]]
    return right


def product(matrix: Bytes, parts: Sequence[Bytes]) -> list[Bytes]:
    """`ports.ErasureCode`: (rows, n) coefficients times n parts of equal length; 0.5 GB/s a core for 10 + 4."""
    out: list[Bytes] = []
    for row in matrix:
        total = np.zeros(len(parts[0]), dtype=np.uint8)
        for factor, part in zip(row.tolist(), parts, strict=True):
            np.bitwise_xor(total, cv2.LUT(part, _TABLES[factor]).reshape(-1), out=total)
        out.append(total)
    return out
