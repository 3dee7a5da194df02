"""What a scene is made of before its nodes are numbered, and the few measures its rules share."""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from him.types import Box, TextLine

_BAND_PX: Final = 64
_ASCENDERS: Final = frozenset("bdfhiklt!?()[]{}/|%&#$€£@'\"")
_DESCENDERS: Final = frozenset("gjpqyQ()[]{}/|,;@$")
_X_HEIGHT, _ASCENT, _DESCENT, _LINE_PER_FONT = 0.53, 0.2, 0.2, 1.5
"""Parts of a font's size that letters without, with upper and with lower ends take, as most screen fonts have them."""
State = tuple[tuple[str, str | bool | int | float | None], ...]


class Part(NamedTuple):
    """A node without an id; `key` and `parent` are the tree's ids, where it came from a tree."""

    type: str
    text: str
    box: Box
    confidence: float
    source: str
    state: State = ()
    key: str | None = None
    parent: str | None = None
    label: Box | None = None
    """Where the text stands that is known to label it."""


class Rows:
    """Finds boxes near a height without looking at all of them; a picture can have tens of thousands of nodes."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._bands: dict[int, list[int]] = {}
        for index, box in enumerate(boxes):
            for band in range(box.y // _BAND_PX, (box.y + box.h) // _BAND_PX + 1):
                self._bands.setdefault(band, []).append(index)

    def near(self, box: Box) -> list[int]:
        """Indices, ascending, of the boxes that share a band of 64 px with `box`."""
        found: set[int] = set()
        for band in range(box.y // _BAND_PX, (box.y + box.h) // _BAND_PX + 1):
            found.update(self._bands.get(band, ()))
        return sorted(found)


def overlap_part(inner: Box, outer: Box) -> float:
    """Part of `inner`'s area that lies in `outer`, 0…1."""
    return inner.intersection(outer).area / inner.area if inner.area else 0.0


def iou(a: Box, b: Box) -> float:
    """Area shared over area covered, 0…1."""
    shared = a.intersection(b).area
    covered = a.area + b.area - shared
    return shared / covered if covered else 0.0


def line_height(line: TextLine) -> int:
    """The height in pixels a line of this font takes, from the height of the letters that stand in it."""
    up = any(c.isupper() or c.isdigit() or c in _ASCENDERS or ord(c) >= 0x2E80 for c in line.text)
    down = any(c in _DESCENDERS for c in line.text)
    letters = max(1, line.box.h - 2)
    return round(_LINE_PER_FONT * letters / (_X_HEIGHT + _ASCENT * up + _DESCENT * down))


def median_height(lines: Iterable[TextLine]) -> int:
    """The line height in pixels most texts have; 0 without lines."""
    heights = sorted(line_height(line) for line in lines)
    return heights[len(heights) // 2] if heights else 0


def reading_order(parts: Iterable[Part]) -> list[Part]:
    """Top to bottom, then left to right, the larger first, so that a container precedes what it holds."""
    return sorted(
        parts,
        key=lambda part: (
            part.box.y,
            part.box.x,
            -part.box.area,
            part.type,
            part.text,
            part.key or "",
            part.source,
            part.confidence,
            part.box.w,
        ),
    )
