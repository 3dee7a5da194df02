"""Reads tiles from files that come from outside: nothing is executed, and nothing is read before it was measured."""

from pathlib import Path
from typing import TYPE_CHECKING

from him.config import TILE_BYTES_MAX
from him.errors import LimitError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FIX = "save it with numpy.save(path, array)"


def read_npy(path: Path, limit_bytes: int = TILE_BYTES_MAX) -> "NDArray[np.generic]":
    """The array in a file.

    Shapes:
        Any; C order is given back whatever the file holds.

    Raises:
        UsageError: no `.npy` file, truncated, with bytes behind the array, or holding Python objects.
        LimitError: the array has more than `limit_bytes`.
        OSError: it cannot be read.
    """
    import numpy as np
    from numpy.lib import format as npy

    with path.open("rb") as file:
        try:
            version = npy.read_magic(file)
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, _, dtype = read_header(file)
        except (ValueError, KeyError) as error:
            raise UsageError("not an .npy file of version 1 or 2", object=str(path), fix=_FIX) from error
        if dtype.hasobject:
            raise UsageError("the array holds Python objects, which are never loaded", object=str(path), fix=_FIX)
        size = dtype.itemsize
        for side in shape:
            size *= side
        if size > limit_bytes:
            raise LimitError(f"the array has {size} bytes, more than {limit_bytes}", object=str(path))
        here = path.stat().st_size - file.tell()
        if here != size:
            word = "truncated" if here < size else "followed by other bytes"
            raise UsageError(f"the file is {word}: {here} bytes where the array has {size}", object=str(path), fix=_FIX)
        file.seek(0)
        array: NDArray[np.generic] = np.load(file, allow_pickle=False)
    return np.ascontiguousarray(array)


def read_bytes(path: Path, limit_bytes: int = TILE_BYTES_MAX) -> bytes:
    """A file's bytes. Raises LimitError, OSError."""
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise LimitError(f"the file is larger than {limit_bytes} bytes", object=str(path))
    return data
