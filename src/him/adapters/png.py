"""Large PNG files, read in bands of rows: in memory is one band, however many rows there are.

The rows of a PNG are filtered against the row above and compressed as one stream. Some inflated rows, headed by the
last row before them, are a small PNG again, which Pillow decodes as it would have done in the whole.
"""

import io
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from him.adapters.pillow import UNREADABLE, rgb
from him.config import (
    IMAGE_BAND_BYTES,
    IMAGE_FILE_BYTES_MAX,
    IMAGE_META_BYTES_MAX,
    IMAGE_PIXELS_MAX,
    IMAGE_SIDE_MAX,
)
from him.errors import LimitError, NotFoundError, UsageError

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Bytes a pixel of 8 bits by colour type: grey, RGB, palette, grey and alpha, RGBA."""
_KEPT: Final = (b"PLTE", b"tRNS", b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Parts that say how pixels are shown: colours, transparency, and which side is up."""
_UPRIGHT: Final = 1
_LAST_FILTER: Final = 4
_ORIENTATION: Final = 0x0112
_READ_BYTES: Final = 1024 * 1024


def is_large_png(path: Path) -> bool:
    """Whether a file is a PNG with more pixels or bytes than are decoded in memory."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_SIGNATURE) + 16)
            size = path.stat().st_size
    except OSError:
        return False
    if len(head) < len(_SIGNATURE) + 16 or not head.startswith(_SIGNATURE):
        return False
    width, height = struct.unpack(">II", head[-8:])
    return size > IMAGE_FILE_BYTES_MAX or width * height > IMAGE_PIXELS_MAX


class PngFile:
    """`ports.ArraySource`: (height, width, 3) uint8 RGB as `PillowDecoder` gives it, rows in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
        except FileNotFoundError as error:
            raise NotFoundError(f"no such file: {path}", object=str(path), fix="check the path") from error
        except OSError as error:
            raise UsageError(f"the file cannot be read ({error.strerror})", object=str(path)) from error
        try:
            kind, _, self._header = self._chunk(len(_SIGNATURE))
            self._file.seek(0)
            if self._file.read(len(_SIGNATURE)) != _SIGNATURE or kind != b"IHDR" or len(self._header) != 13:
                raise self.unreadable("it is no PNG")
            width, height, self._depth, self._colour, *_, self._interlaced = struct.unpack(">IIBBBBB", self._header)
            if not width or not height:
                raise self.unreadable("it is empty")
        except BaseException:
            self._file.close()
            raise
        self.shape: tuple[int, ...] = (height, width, 3)
        self.dtype: np.dtype[np.generic] = np.dtype(np.uint8)
        self._meta = b""
        self._rows = _Rows(self, [])
        self._done = 0
        self._last = b""
        self._band: tuple[int, int, NDArray[np.uint8]] = (0, 0, np.zeros((0, 0, 3), dtype=np.uint8))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def check(self) -> None:
        """Read every part of the file once: what is wrong with it is said before anything is stored.

        Raises:
            UsageError: cut off, damaged, or of a kind whose rows cannot be read one after the other.
            LimitError: wider or higher than IMAGE_SIDE_MAX.
        """
        height, width, _ = self.shape
        if max(height, width) > IMAGE_SIDE_MAX:
            raise LimitError(f"{width}×{height} pixels; at most {IMAGE_SIDE_MAX} a side", object=str(self._path))
        if self._depth != 8 or self._colour not in _CHANNELS or self._interlaced:
            raise UsageError(
                f"a PNG of {width}×{height} pixels is read row by row, which needs 8 bits a channel and no interlacing",
                object=str(self._path), fix="save it so, or as an .npy array",
            )  # fmt: skip
        self._last = bytes(width * _CHANNELS[self._colour])
        at, kind, data = len(_SIGNATURE) + 12 + len(self._header), b"", list[tuple[int, int]]()
        while kind != b"IEND":
            kind, length, body = self._chunk(at)
            if kind == b"IDAT":
                data.append((at + 8, length))
            elif kind in _KEPT:
                self._meta += _chunk(kind, body)
            if len(self._meta) > IMAGE_META_BYTES_MAX:
                raise LimitError(f"more than {IMAGE_META_BYTES_MAX} bytes of metadata", object=str(self._path))
            at += 12 + length
        self._check_rows(_Rows(self, data))
        self._rows = _Rows(self, data)
        with warnings.catch_warnings(), self._small([b"\0" + self._last]) as picture:
            try:
                warnings.simplefilter("ignore")  # Pillow warns of EXIF it cannot read, and goes on.
                orientation = picture.getexif().get(_ORIENTATION, _UPRIGHT)
            except UNREADABLE as error:
                raise self.unreadable(f"its EXIF cannot be read, {error}") from error
            if orientation != _UPRIGHT:
                raise UsageError(
                    "a picture this large is not turned", object=str(self._path), fix="save it upright, without EXIF"
                )

    def part(self, begin: Sequence[int], end: Sequence[int]) -> NDArray[np.uint8]:
        """Pixels; after `check`. Rows are never asked for again once later ones were.

        Raises:
            UsageError: the rows cannot be inflated.
        """
        first, last, band = self._band
        if (first, last) != (begin[0], end[0]):
            if begin[0] != self._done:
                raise ValueError("rows of a PNG come in order")
            # The one before is let go first.
            self._band = (0, 0, band := np.zeros((0, 0, 3), dtype=np.uint8))
            band = np.empty((end[0] - begin[0], *self.shape[1:]), dtype=np.uint8)
            for row in range(0, len(band), self._band_rows):
                self._decode(band[row : row + self._band_rows])
            self._band = (begin[0], end[0], band)
        return band[:, begin[1] : end[1], begin[2] : end[2]]

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes of the file."""
        self._file.seek(offset)
        return self._file.read(size)

    def unreadable(self, reason: str) -> UsageError:
        """The error that says why."""
        return UsageError(f"the picture cannot be read ({reason})", object=str(self._path), fix="save it again")

    # -- inner

    def _check_rows(self, rows: "_Rows") -> None:
        """Whether there are as many rows as the header says, each filtered in a known way."""
        size, step = 1 + len(self._last), self._band_rows
        for row in range(0, self.shape[0], step):
            if max(rows.read(min(step, self.shape[0] - row) * size)[::size]) > _LAST_FILTER:
                raise self.unreadable("a row is filtered in an unknown way")
        rows.finish()

    @property
    def _band_rows(self) -> int:
        return max(1, IMAGE_BAND_BYTES // (4 * self.shape[1]))

    def _decode(self, out: NDArray[np.uint8]) -> None:
        """Decode the next rows."""
        size = 1 + len(self._last)
        with self._small([b"\0" + self._last, self._rows.read(len(out) * size)]) as picture:
            try:
                picture.load()
            except UNREADABLE as error:
                raise self.unreadable(str(error)) from error
            self._last = picture.crop((0, len(out), out.shape[1], len(out) + 1)).tobytes()
            out[...] = rgb(picture)[1:]
        self._done += len(out)

    def _small(self, rows: list[bytes]) -> Image.Image:
        """A PNG of some filtered rows, opened."""
        count = sum(map(len, rows)) // (1 + len(self._last))
        header = self._header[:4] + count.to_bytes(4, "big") + self._header[8:]
        packer = zlib.compressobj(0)
        body = b"".join([*map(packer.compress, rows), packer.flush()])
        data = [_SIGNATURE, _chunk(b"IHDR", header), self._meta, _chunk(b"IDAT", body), _chunk(b"IEND", b"")]
        try:
            return Image.open(io.BytesIO(b"".join(data)), formats=("PNG",))
        except UNREADABLE as error:
            raise self.unreadable(str(error)) from error

    def _chunk(self, at: int) -> tuple[bytes, int, bytes]:
        """(kind, length, body) of the chunk at an offset, its check sum compared; the body of data is not kept."""
        self._file.seek(at)
        length, kind = struct.unpack(">I4s", self._file.read(8).ljust(8, b"\0"))
        if length > IMAGE_META_BYTES_MAX and kind != b"IDAT":
            raise self.unreadable(f"a part of {length} bytes at {at}")
        left, check, body = length, zlib.crc32(kind), b""
        while left:
            piece = self._file.read(min(left, _READ_BYTES))
            if not piece:
                raise self.unreadable("it is cut off")
            left, check = left - len(piece), zlib.crc32(piece, check)
            body += piece if kind != b"IDAT" else b""
        if self._file.read(4) != check.to_bytes(4, "big"):
            raise self.unreadable(f"the part at {at} does not match its check sum")
        return kind, length, body


class _Rows:
    """The filtered rows of a PNG, inflated in order from the parts of the file that hold them."""

    def __init__(self, file: PngFile, parts: list[tuple[int, int]]) -> None:
        self._file, self._parts = file, deque(parts)
        self._inflater = zlib.decompressobj()
        self._waiting = b""

    def read(self, size: int) -> bytes:
        """The next bytes. Raises UsageError."""
        pieces: list[bytes] = []
        while size:
            piece = self._more(size)
            if piece is None:
                raise self._file.unreadable("rows are missing")
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def finish(self) -> None:
        """Whether they end here, as the check sum over all of them does. Raises UsageError."""
        while not self._inflater.eof:
            if self._more(1) != b"":
                raise self._file.unreadable("its rows do not end where they should")

    def _more(self, size: int) -> bytes | None:
        """Some of the next bytes, perhaps none yet; None at the end of what there is."""
        if not self._waiting and self._parts:
            at, length = self._parts.popleft()
            self._waiting = self._file.read_at(at, min(length, _READ_BYTES))
            if self._waiting and len(self._waiting) < length:
                self._parts.appendleft((at + len(self._waiting), length - len(self._waiting)))
        given = self._waiting
        try:
            piece = self._inflater.decompress(given, size)
        except zlib.error as error:
            raise self._file.unreadable(str(error)) from error
        self._waiting = self._inflater.unconsumed_tail
        return piece if piece or given or self._parts else None


def _chunk(kind: bytes, body: bytes) -> bytes:
    return b"".join((struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))))
