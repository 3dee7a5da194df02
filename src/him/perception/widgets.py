"""Finds rectangles that look like controls, by flat areas inside closed edges (classical vision, integers only).

An interface paints a control as a flat area inside an edge. So: mark every pixel that differs from its right or
lower neighbour, take the connected areas between the marks, and keep those whose border runs along a rectangle or
a circle. Small unconnected strokes that are no such area become icon candidates; letters are among them, and
`scene` drops those that text covers.
"""

from typing import Final, NamedTuple

import cv2
import numpy as np
from cv2.typing import MatLike
from numpy.typing import NDArray

from him.types import Box, WidgetBox

_EDGE: Final = 7
"""Difference of neighbouring pixels, in any channel, that ends a flat area (a #f0f0f0 line on white is 15)."""
_SIDE_LEAST: Final = 6
_SIDE_COVER: Final = 0.5
"""Part of each straight side that must belong to the area; the rest may be rounded corners or text."""
_CHECK_PX: Final = (9, 40)
"""Up to a checkbox at twice the usual scale; `scene` knows the size of the text and drops what is too large."""
_CONTROL_HEIGHT_PX: Final = (13, 112)
"""Up to a large field at twice the usual scale; `scene` compares it with the height of the text."""
_CONTROL_WIDTH_LEAST: Final = 20
_FIELD_WIDTH_LEAST: Final = 30
_AREA_WIDTH_LEAST: Final = 120
_AREA_HEIGHT_MAX: Final = 320
"""A bordered rectangle up to this height may be a field of several lines."""
_PANEL_LEAST_PX: Final = (80, 48)
_DISC_CORNERS: Final = 0.395
"""Corners of the square around a disc that an area may fill: a small ring fills up to 0.39, a rounded box from 0.40."""
_BORDER: Final = 10
SOLID_CONFIDENCE: Final = 0.55
"""Of a full square without a border: a box to tick only if a text stands beside it (`scene` decides)."""
_OUTLINE_CONFIDENCE: Final = 0.6
_ICON_PX: Final = (2, 56)
_ICON_HEIGHT_LEAST: Final = 4
_ICON_JOIN_PX: Final = 3
_WIDGETS_MAX: Final = 4000
"""More than this is a photograph, not an interface; the largest are kept."""


class _Area(NamedTuple):
    """A flat area: its box, its number in the label map and its pixels."""

    box: Box
    label: int
    pixels: int


def find(picture: NDArray[np.uint8]) -> tuple[WidgetBox, ...]:
    """Widget boxes of an (h, w, 3) uint8 RGB picture, top to bottom then left to right.

    Kinds: "button" (a filled or outlined rectangle of a control's size), "field" (the same, wide and holding little),
    "check" and "radio" (small squares and circles), "panel" (large rectangles), "icon" (compact strokes).
    """
    height, width = picture.shape[:2]
    if height < 2 * _SIDE_LEAST or width < 2 * _SIDE_LEAST:
        return ()
    edges = _edges(picture)
    found = _rectangles(picture, edges)
    marks, outlines = _outlines(edges)
    found = _with_outlines(picture, found, outlines)
    found += marks
    found += _icons(edges)
    found = _with_switches(found)
    best: dict[tuple[Box, str], WidgetBox] = {}
    for widget in found:
        best.setdefault((widget.box, widget.kind), widget)
    ordered = sorted(best.values(), key=lambda one: (-one.box.area, one.box, one.kind))[:_WIDGETS_MAX]
    return tuple(sorted(ordered, key=lambda one: (one.box.y, one.box.x, one.box.h, one.box.w, one.kind)))


def _edges(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(h, w) uint8: 1 where a pixel differs from its left or upper neighbour, 0 where it continues flat."""
    edges = np.zeros(picture.shape[:2], dtype=np.uint8)
    down = cv2.absdiff(picture[1:], picture[:-1])
    along = cv2.absdiff(picture[:, 1:], picture[:, :-1])
    edges[1:] |= (_strongest(down) > _EDGE).astype(np.uint8)
    edges[:, 1:] |= (_strongest(along) > _EDGE).astype(np.uint8)
    return edges


def _strongest(difference: MatLike) -> NDArray[np.uint8]:
    """The largest of three channels; two maxima of planes are ten times faster than a maximum along an axis."""
    first, second, third = cv2.split(difference)
    return np.asarray(cv2.max(cv2.max(first, second), third), dtype=np.uint8)


def _rectangles(picture: NDArray[np.uint8], edges: NDArray[np.uint8]) -> list[WidgetBox]:
    """Flat areas with a rectangle's or a circle's outline, named by size."""
    flat = (1 - edges).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(flat, connectivity=4, ltype=cv2.CV_32S)
    if count < 2:
        return []
    height, width = edges.shape
    widths, heights, pixels = stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT], stats[:, cv2.CC_STAT_AREA]
    boxed = widths.astype(np.int64) * heights
    likely = (widths >= _SIDE_LEAST) & (heights >= _SIDE_LEAST) & (pixels * 8 >= boxed) & (boxed < height * width * 0.9)
    likely[0] = False
    found: list[WidgetBox] = []
    for label in np.flatnonzero(likely).tolist():
        x, y, w, h, area = (int(value) for value in stats[label])
        widget = _named(picture, labels, _Area(Box(x, y, w, h), label, area))
        if widget is not None:
            found.append(widget)
    return found


def _named(picture: NDArray[np.uint8], labels: MatLike, area: _Area) -> WidgetBox | None:
    """The widget a flat area shows, or None when its outline is neither a rectangle nor a circle."""
    box = area.box
    mine = labels[box.y : box.y + box.h, box.x : box.x + box.w] == area.label
    # An area ends one pixel inside the line drawn around it: the control is one pixel larger on each side.
    outer = Box(max(0, box.x - 1), max(0, box.y - 1), box.w + 2, box.h + 2)
    low, high = _CHECK_PX
    if low <= min(box.w, box.h) and max(box.w, box.h) <= high and abs(box.w - box.h) <= 2:
        # An icon in a square button leaves a hole as a tick does: which it is, the scene decides by the text's size.
        solid = _filled(mine)
        holed = np.count_nonzero(solid) * 20 >= np.count_nonzero(mine) * 21
        kind = _mark_kind(solid)
        if holed or _is_bordered(picture, box):
            return WidgetBox(outer, kind, 0.8) if kind is not None else None
        # A full square may be a box to tick without a border; a full disc is mostly a dot that tells a state.
        return WidgetBox(outer, kind, SOLID_CONFIDENCE) if kind == "check" else None
    cover = _cover(mine)
    if cover < _SIDE_COVER:
        return None
    tall = _CONTROL_HEIGHT_PX[0] <= box.h <= _CONTROL_HEIGHT_PX[1]
    if tall and box.w >= _CONTROL_WIDTH_LEAST and box.w * 4 >= box.h * 3:
        field = box.w >= _FIELD_WIDTH_LEAST and box.w * 5 >= 6 * box.h and _is_bordered(picture, box)
        return WidgetBox(outer, "field" if field else "button", round(0.5 + 0.4 * cover, 4))
    if box.w >= _AREA_WIDTH_LEAST and box.h <= _AREA_HEIGHT_MAX and _is_bordered(picture, box):
        return WidgetBox(outer, "field", round(0.4 + 0.4 * cover, 4))
    if box.w >= _PANEL_LEAST_PX[0] and box.h >= _PANEL_LEAST_PX[1]:
        return WidgetBox(outer, "panel", round(0.4 + 0.4 * cover, 4))
    return None


def _is_bordered(picture: NDArray[np.uint8], box: Box) -> bool:
    """Whether a line unlike both inside and outside runs around a flat area, at the middle of three sides or more."""
    height, width = picture.shape[:2]
    x, y = box.x + box.w // 2, box.y + box.h // 2
    sides = 0
    for start, step in (
        ((box.y + 1, x), (-1, 0)),
        ((box.y + box.h - 2, x), (1, 0)),
        ((y, box.x + 1), (0, -1)),
        ((y, box.x + box.w - 2), (0, 1)),
    ):
        points = [(start[0] + step[0] * d, start[1] + step[1] * d) for d in (0, 2, 3, 4, 7)]
        if not all(0 <= py < height and 0 <= px < width for py, px in points):
            continue
        inside, *line, outside = (picture[py, px].astype(np.int16) for py, px in points)
        sides += any(
            int(np.abs(at - inside).max()) > _BORDER and int(np.abs(at - outside).max()) > _BORDER for at in line
        )
    return sides >= 3


def _mark_kind(mine: NDArray[np.bool_]) -> str | None:
    """The mark an area shows: "radio" for a disc, "check" for a square with small corners, else None."""
    height, width = mine.shape
    y, x = np.ogrid[:height, :width]
    distance = (2 * y - height + 1) ** 2 * width * width + (2 * x - width + 1) ** 2 * height * height
    disc = distance <= (height * width) ** 2
    inside = np.count_nonzero(mine & disc) / max(1, np.count_nonzero(disc))
    outside = np.count_nonzero(mine & ~disc) / max(1, np.count_nonzero(~disc))
    if inside < 0.6:
        return None
    if outside < _DISC_CORNERS:
        return "radio"
    return "check" if _cover(mine) >= 0.7 else None


def _outlines(edges: NDArray[np.uint8]) -> tuple[list[WidgetBox], list[Box]]:
    """Closed outlines, found by their edges alone: checked boxes and chosen radios, and boxes of a control's size."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(edges, connectivity=8, ltype=cv2.CV_32S)
    if count < 2:
        return [], []
    low, high = _CHECK_PX
    w, h = stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT]
    small = (w >= low + 2) & (h >= low + 2) & (w <= high + 2) & (h <= high + 2) & (np.abs(w - h) <= 2)
    control = (h >= _CONTROL_HEIGHT_PX[0]) & (h <= _CONTROL_HEIGHT_PX[1]) & (w >= _FIELD_WIDTH_LEAST) & (w * 5 >= h * 6)
    likely = (small | control) & (stats[:, cv2.CC_STAT_AREA] >= 2 * (w + h))
    likely[0] = False
    marks: list[WidgetBox] = []
    controls: list[Box] = []
    for label in np.flatnonzero(likely).tolist():
        x, y, width, height, pixels = (int(value) for value in stats[label])
        outline = labels[y : y + height, x : x + width] == label
        # An edge lies on the pixel after the step: the control starts where the edge does and ends one before.
        box = Box(x, y, width - 1, height - 1)
        if not _is_closed(outline):
            continue
        if not small[label]:
            controls.append(box)
        elif pixels >= 3 * (width + height) and (kind := _mark_kind(_filled(outline))) is not None:
            marks.append(WidgetBox(box, kind, 0.6))
    return marks, controls


def _with_outlines(picture: NDArray[np.uint8], found: list[WidgetBox], outlines: list[Box]) -> list[WidgetBox]:
    """Controls painted in two tones or in a gradient, whose inside is no flat area; their tones go."""
    frames = [one for one in found if one.kind in ("button", "field", "panel")]
    tones: set[Box] = set()
    added: list[WidgetBox] = []
    for outline in outlines:
        inside = [one.box for one in frames if one.box.intersection(outline).area * 10 >= one.box.area * 9]
        # Anything narrower is a control of its own, and a flat area as high as the outline is the control already.
        if any(abs(box.w - outline.w) > 6 or box.h * 5 > outline.h * 4 for box in inside):
            continue
        inner = Box(outline.x + 1, outline.y + 1, outline.w - 2, outline.h - 2)
        added.append(WidgetBox(outline, "field" if _is_bordered(picture, inner) else "button", _OUTLINE_CONFIDENCE))
        tones.update(inside)
    return [one for one in found if one.box not in tones] + added


def _with_switches(found: list[WidgetBox]) -> list[WidgetBox]:
    """A disc at one end of a lying pill is the knob of a switch: the pill becomes a "check", the disc goes."""
    pills = [one.box for one in found if one.kind == "icon" and one.box.h * 3 <= one.box.w * 2 <= one.box.h * 5]
    switches: dict[Box, Box] = {}
    for disc in (one.box for one in found if one.kind == "radio"):
        for pill in pills:
            held = disc.intersection(pill).area * 10 >= disc.area * 9 and disc.h * 2 >= pill.h
            held = held and abs(2 * disc.y + disc.h - 2 * pill.y - pill.h) <= 3
            at_end = min(disc.x - pill.x, pill.x + pill.w - disc.x - disc.w) <= pill.h // 3
            if held and at_end and disc.w < pill.w // 2 + 4:
                switches[disc] = pill
    kept = [one for one in found if not (one.kind == "radio" and one.box in switches)]
    return kept + [WidgetBox(pill, "check", 0.6) for pill in sorted(set(switches.values()))]


def _filled(outline: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every pixel that has the outline on both sides in its row and in its column."""
    across = np.logical_or.accumulate(outline, axis=1) & np.logical_or.accumulate(outline[:, ::-1], axis=1)[:, ::-1]
    down = np.logical_or.accumulate(outline, axis=0) & np.logical_or.accumulate(outline[::-1], axis=0)[::-1]
    return across & down


def _is_closed(outline: NDArray[np.bool_]) -> bool:
    """Whether the outline runs along most of each side's middle half, within three pixels of it."""
    height, width = outline.shape
    rows, columns = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
    sides = (
        outline[:3, columns].any(axis=0),
        outline[-3:, columns].any(axis=0),
        outline[rows, :3].any(axis=1),
        outline[rows, -3:].any(axis=1),
    )
    return all(np.count_nonzero(side) * 5 >= side.size * 4 for side in sides)


def _cover(mine: NDArray[np.bool_]) -> float:
    """The least covered side's part of the straight length it could have between rounded corners."""
    height, width = mine.shape
    corner = min(height, width) // 2
    rows = slice(min(corner, 12), max(height - min(corner, 12), min(corner, 12) + 1))
    columns = slice(min(corner, 12), max(width - min(corner, 12), min(corner, 12) + 1))
    sides = (
        mine[:2, columns].any(axis=0),
        mine[-2:, columns].any(axis=0),
        mine[rows, :2].any(axis=1),
        mine[rows, -2:].any(axis=1),
    )
    return min(float(np.count_nonzero(side)) / max(1, side.size) for side in sides)


def _icons(edges: NDArray[np.uint8]) -> list[WidgetBox]:
    """Compact groups of strokes with a clear distance to everything else."""
    side = 2 * _ICON_JOIN_PX + 1
    joined = cv2.morphologyEx(edges, cv2.MORPH_CLOSE, np.ones((side, side), np.uint8))
    count, _, stats, _ = cv2.connectedComponentsWithStats(joined, connectivity=8, ltype=cv2.CV_32S)
    if count < 2:
        return []
    w, h, pixels = stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT], stats[:, cv2.CC_STAT_AREA]
    low, high = _ICON_PX
    compact = (w >= low) & (w <= high) & (h >= _ICON_HEIGHT_LEAST) & (h <= high) & (w * 5 <= h * 12) & (h <= w * 4)
    compact &= pixels * 5 >= w * h
    compact[0] = False
    return [
        WidgetBox(Box(*(int(value) for value in stats[label, :4])), "icon", 0.5)
        for label in np.flatnonzero(compact).tolist()
    ]
