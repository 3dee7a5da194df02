"""What a scene is made of before its nodes are numbered, and the few measures its rules share."""

from collections.abc import Iterable
from typing import NamedTuple

from him.types import Box, TextLine

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


def overlap_part(inner: Box, outer: Box) -> float:
    """Part of `inner`'s area that lies in `outer`, 0…1."""
    return inner.intersection(outer).area / inner.area if inner.area else 0.0


def iou(a: Box, b: Box) -> float:
    """Area shared over area covered, 0…1."""
    shared = a.intersection(b).area
    covered = a.area + b.area - shared
    return shared / covered if covered else 0.0


def median_height(lines: Iterable[TextLine]) -> int:
    """The height in pixels most texts have; 0 without lines."""
    heights = sorted(line.box.h for line in lines)
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
