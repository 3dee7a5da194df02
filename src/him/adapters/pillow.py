"""Image files to pixels through Pillow, which refuses truncated files (OpenCV fills them with grey)."""

import io
import struct
import warnings
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from him.config import IMAGE_FILE_BYTES_MAX, IMAGE_PIXELS_MAX
from him.errors import LimitError, UsageError

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")


UNREADABLE: Final = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError,
    RecursionError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises of damaged pictures: its readers of metadata check little."""


class PillowDecoder:
    """`ports.PictureDecoder`."""

    def decode(self, data: bytes, name: str) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB, turned upright as its metadata says; alpha is laid over white."""
        if len(data) > IMAGE_FILE_BYTES_MAX:
            raise LimitError(f"the file holds {len(data)} bytes; at most {IMAGE_FILE_BYTES_MAX}", object=name)
        try:
            with warnings.catch_warnings():
                # Pillow warns of large pictures; the limit below decides.
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                    width, height = picture.size
                    if width * height > IMAGE_PIXELS_MAX:
                        raise LimitError(
                            f"{width}×{height} pixels; at most {IMAGE_PIXELS_MAX} are read for what they show",
                            object=name, fix="ingest it as a PNG file or an .npy array: those are stored without that",
                        )  # fmt: skip
                    picture.load()
                    return rgb(ImageOps.exif_transpose(picture))
        except UnidentifiedImageError as error:
            raise UsageError("not a picture", object=name, fix=f"give a {', '.join(FORMATS)} file") from error
        except Image.DecompressionBombError as error:
            raise LimitError(f"the picture has too many pixels ({error})", object=name) from error
        except UNREADABLE as error:
            raise UsageError(f"the picture cannot be read ({error})", object=name, fix="save it again") from error


def rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """(h, w, 3) uint8 RGB; alpha is laid over white."""
    if "A" in picture.getbands() or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return np.array(picture.convert("RGB"), dtype=np.uint8)
