"""Draws on copies of pictures: found boxes, and another text over a region."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from him.errors import StorageError, UsageError
from him.types import Box

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RIGHT_BGR: Final = (60, 160, 30)
WRONG_BGR: Final = (40, 40, 220)
WHITE_BGR: Final = (255, 255, 255)
BUTTON_BGR: Final = (200, 110, 20)


class MarkedBox(NamedTuple):
    """A box to draw, and the words beside it."""

    box: Box
    words: str
    right: bool


def load(path: Path) -> "NDArray[np.uint8]":
    """A picture as BGR pixels. Raises UsageError."""
    import cv2
    import numpy as np

    picture = cv2.imdecode(np.frombuffer(path.read_bytes(), dtype=np.uint8), cv2.IMREAD_COLOR)
    if picture is None:  # pyright: ignore[reportUnnecessaryComparison] - the stubs leave out None
        raise UsageError("not a picture that can be read", object=str(path))
    return picture.astype(np.uint8, copy=False)


def save(path: Path, picture: "NDArray[np.uint8]") -> None:
    """Write a PNG. Raises StorageError, OSError."""
    import cv2

    done, data = cv2.imencode(".png", picture)
    if not done:
        raise StorageError("the picture could not be encoded", place=str(path))
    path.write_bytes(data.tobytes())


def draw(source: Path, target: Path, marks: Sequence[MarkedBox]) -> None:
    """Write a copy of a picture with boxes and words on it."""
    import cv2

    picture = load(source)
    scale = max(0.5, picture.shape[1] / 3200)
    thick = max(2, round(3 * scale))
    for mark in marks:
        colour = RIGHT_BGR if mark.right else WRONG_BGR
        x, y, w, h = mark.box
        cv2.rectangle(picture, (x, y), (x + w, y + h), colour, thick)
        words = mark.words.encode("ascii", "replace").decode()
        (width, height), _ = cv2.getTextSize(words, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        low = y - thick if y > 2 * height else y + h + height + 2 * thick
        left = max(0, min(x, picture.shape[1] - width))
        cv2.rectangle(picture, (left, low - height - thick), (left + width, low + thick), colour, -1)
        cv2.putText(picture, words, (left, low), cv2.FONT_HERSHEY_SIMPLEX, scale, WHITE_BGR, 1, cv2.LINE_AA)
    save(target, picture)


def paint_over(source: Path, target: Path, box: Box, words: str) -> None:
    """Write a copy of a picture in which a box is a plain button with other words."""
    import cv2

    picture = load(source)
    x, y, w, h = box
    cv2.rectangle(picture, (x, y), (x + w - 1, y + h - 1), BUTTON_BGR, -1)
    (wide, high), _ = cv2.getTextSize(words, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 2)
    scale = min(0.85 * w / wide, 0.6 * h / high, 1.2)
    thick = 1 if scale < 0.75 else 2
    (wide, high), _ = cv2.getTextSize(words, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
    place = (x + (w - wide) // 2, y + (h + high) // 2)
    cv2.putText(picture, words, place, cv2.FONT_HERSHEY_SIMPLEX, scale, WHITE_BGR, thick, cv2.LINE_AA)
    save(target, picture)
