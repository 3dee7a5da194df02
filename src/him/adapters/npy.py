"""`.npy` files, read part by part: the file is not mapped, so nothing of it stays in memory, and holes are not read."""

import errno
import os
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from him.errors import UsageError

_HEADER_ERRORS: Final = (SyntaxError, tokenize.TokenError, TypeError, OverflowError, RecursionError, MemoryError)
"""What numpy raises beside of a header that is no Python literal, or of sizes that nothing has."""
_HOLE_BYTES: Final = 64 * 1024
"""In shorter runs nobody looks for holes."""


class NpyFile:
    """`ports.ArraySource` over an array of any dimensions, in C or Fortran order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of headers that Python 2 wrote.
                # Checks the header and that the file is long enough; no value is touched.
                mapped = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError, *_HEADER_ERRORS) as error:
            raise self._unreadable(str(error)) from error
        self.shape: tuple[int, ...] = mapped.shape
        self.dtype: np.dtype[np.generic] = mapped.dtype
        self._offset = int(mapped.offset)
        self._turned = mapped.flags.f_contiguous and not mapped.flags.c_contiguous
        del mapped
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(str(error)) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def part(self, begin: Sequence[int], end: Sequence[int]) -> NDArray[np.generic] | None:
        """Values [begin, end) on every axis; None where the file has nothing but a hole, which reads as zeros.

        Raises:
            UsageError: the file was cut or the disk failed.
        """
        # An array in Fortran order lies in the file as its transpose does in C order.
        shape, low, high = (tuple(one)[:: -1 if self._turned else 1] for one in (self.shape, begin, end))
        size = self.dtype.itemsize
        first = self._offset + _rank(shape, low) * size
        last = self._offset + (_rank(shape, [stop - 1 for stop in high]) + 1) * size
        try:
            if os.fstat(self._descriptor).st_size < last:
                raise self._unreadable("the file was cut while it was read")
            if self._data_from(first) >= last:
                return None
            values = np.zeros([stop - start for start, stop in zip(low, high, strict=True)], dtype=self.dtype)
            memory, at = values.reshape(-1).view(np.uint8).data, 0
            for start, length in _runs(shape, low, high):
                self._fill(memory[at : at + length * size], self._offset + start * size)
                at += length * size
        except OSError as error:
            raise self._unreadable(str(error)) from error
        return values.T if self._turned else values

    def _fill(self, memory: memoryview, offset: int) -> None:
        """Read into memory that is zero already."""
        at, end = 0, len(memory)
        while at < end:
            stop = end
            if end - at >= _HOLE_BYTES:
                start = self._data_from(offset + at) - offset
                if start < at:
                    raise self._unreadable("the file was cut while it was read")
                at = start
                stop = min(end, self._hole_from(offset + at) - offset) if at < end else end
            while at < stop:
                done = os.preadv(self._descriptor, [memory[at:stop]], offset + at)
                if not done:
                    raise self._unreadable("the file was cut while it was read")
                at += done

    def _data_from(self, offset: int) -> int:
        """Where the next bytes that are no hole begin; the end of the file when there are none."""
        try:
            return os.lseek(self._descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            # A system that knows no holes has data everywhere.
            return os.fstat(self._descriptor).st_size if error.errno == errno.ENXIO else offset

    def _hole_from(self, offset: int) -> int:
        try:
            return os.lseek(self._descriptor, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise self._unreadable("the file was cut while it was read") from error
            return os.fstat(self._descriptor).st_size

    def _unreadable(self, reason: str) -> UsageError:
        return UsageError(f"not a .npy array ({reason})", object=str(self._path), fix="write it with numpy.save")


def _rank(shape: Sequence[int], index: Sequence[int]) -> int:
    """Number of an element in a C-order array."""
    rank = 0
    for length, at in zip(shape, index, strict=True):
        rank = rank * length + at
    return rank


def _runs(shape: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(rank of the first element, number of elements) of each run of a box of a C-order array, in order."""
    axis = len(shape) - 1
    while axis > 0 and (begin[axis], end[axis]) == (0, shape[axis]):
        axis -= 1
    # All axes behind `axis` are taken whole: they are one run with it.
    length = (end[axis] - begin[axis]) * prod(shape[axis + 1 :])
    for index in product(*(range(start, stop) for start, stop in zip(begin[:axis], end[:axis], strict=True))):
        yield _rank(shape, (*index, *begin[axis:])), length
