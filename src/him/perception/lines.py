"""Whole lines of text from the pieces single tiles saw: stitching at seams and cutting at wide gaps (pure geometry)."""

from collections.abc import Sequence
from itertools import pairwise
import re
from typing import Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from him.types import Box

_OVERLAP_SAME: Final = 0.5
"""Pieces of two tiles that share this part of the smaller one's height and width are one text seen twice."""
_OVERLAP_ROW: Final = 0.6
"""Pieces that meet over a vertical seam belong to one line when they share this part of the smaller height."""
_JOIN_GAP: Final = 0.45
"""A gap at a seam up to this part of the line's height is a space between words, not a gap between texts."""
_EDGE_PX: Final = 3
_MEET_PX: Final = 6
_INK: Final = 28
"""Difference of neighbouring pixels, in any channel, that counts as ink."""
_CUT_GAP: Final = 0.5
"""A blank as wide as this part of the crop's height separates two texts (a space between words is a third of it)."""
_RULE_PX: Final = 4
_DIVIDER_PX: Final = 3
"""A control's side this near to a line's end belongs to the end."""
_SEPARATOR: Final = re.compile(r"\s+[/|>]\s+|\s*[›»•·∙⋅|¦]\s*|\s{2,}")
_MARK_WIDTH: Final = 0.5


class Piece(NamedTuple):
    """A text found in one tile, in picture pixels; `cut` says on which sides it reaches the tile's own end."""

    box: Box
    tile: tuple[int, int]
    cut_left: bool
    cut_top: bool
    cut_right: bool
    cut_low: bool


def piece(quad: Sequence[tuple[int, int]], tile: tuple[int, int], region: Box, picture: tuple[int, int]) -> Piece:
    """The upright box of a quad given in pixels of `region`, with the sides on which the region cuts it off.

    Args:
        quad: four corners (x, y) in pixels of `region`.
        tile: (row, column) of the tile that saw it.
        region: the tile with its halo, in picture pixels.
        picture: (height, width) in pixels; a side at the picture's own border is never cut.
    """
    left, right = min(x for x, _ in quad), max(x for x, _ in quad) + 1
    top, low = min(y for _, y in quad), max(y for _, y in quad) + 1
    height, width = picture
    return Piece(
        Box(region.x + left, region.y + top, right - left, low - top),
        tile,
        left <= _EDGE_PX and region.x > 0,
        top <= _EDGE_PX and region.y > 0,
        right >= region.w - _EDGE_PX and region.x + region.w < width,
        low >= region.h - _EDGE_PX and region.y + region.h < height,
    )


def stitched(pieces: Sequence[Piece]) -> list[Box]:
    """Whole lines from the pieces of all tiles, top to bottom then left to right; the order given is irrelevant."""
    ordered = sorted(set(pieces))
    leader = list(range(len(ordered)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for first, second in _neighbours(ordered):
        if _one_line(ordered[first], ordered[second]):
            leader[find(second)] = find(first)
    whole: dict[int, Box] = {}
    for index, found in enumerate(ordered):
        head = find(index)
        whole[head] = whole[head].union(found.box) if head in whole else found.box
    return sorted(set(whole.values()), key=lambda box: (box.y, box.x, box.h, box.w))


def _neighbours(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Pairs of pieces from different, touching tiles; only these can be one line."""
    by_tile: dict[tuple[int, int], list[int]] = {}
    for index, found in enumerate(pieces):
        by_tile.setdefault(found.tile, []).append(index)
    pairs: list[tuple[int, int]] = []
    for (row, column), here in sorted(by_tile.items()):
        for other in ((row, column + 1), (row + 1, column - 1), (row + 1, column), (row + 1, column + 1)):
            pairs += [(a, b) for a in here for b in by_tile.get(other, ())]
    return pairs


def _one_line(a: Piece, b: Piece) -> bool:
    """Whether two tiles' pieces show one line of text."""
    shared_x = min(a.box.x + a.box.w, b.box.x + b.box.w) - max(a.box.x, b.box.x)
    shared_y = min(a.box.y + a.box.h, b.box.y + b.box.h) - max(a.box.y, b.box.y)
    part_x = shared_x / min(a.box.w, b.box.w)
    part_y = shared_y / min(a.box.h, b.box.h)
    if part_x >= _OVERLAP_SAME and part_y >= _OVERLAP_SAME:
        return True
    beside = a.tile[1] != b.tile[1]
    if beside and part_y >= _OVERLAP_ROW:
        left, right = (a, b) if a.box.x <= b.box.x else (b, a)
        if left.cut_right or right.cut_left:
            return shared_x >= -_MEET_PX
        return shared_x >= -_JOIN_GAP * min(a.box.h, b.box.h)
    if a.tile[0] != b.tile[0] and part_x >= _OVERLAP_SAME:
        upper, lower = (a, b) if a.box.y <= b.box.y else (b, a)
        return upper.cut_low and lower.cut_top and shared_y >= _MEET_PX
    return False


def cut_at_gaps(
    picture: NDArray[np.uint8], box: Box, controls: Sequence[Box] = (), marks: Sequence[Box] = ()
) -> list[Box]:
    """`box` cut into texts where a wide blank, a rule as high as the line or a control's side parts them.

    Args:
        picture: (h, w, 3) uint8.
        box: a line inside the picture.
        controls: boxes of controls; a text does not run through their sides.
        marks: boxes of checkboxes and radios; one with blanks around it is cut out of the text.

    Returns:
        The parts left to right; `[box]` when there is nothing to cut.
    """
    return [
        part
        for free in _without_marks(picture, box, marks)
        for whole in _cut_at_sides(free, controls)
        for part in _cut_at_blanks(picture, whole)
    ]


def _without_marks(picture: NDArray[np.uint8], box: Box, marks: Sequence[Box]) -> list[Box]:
    """What is left of `box` without the marks in it; letters look like marks, but touch their neighbours."""
    inside = [
        mark
        for mark in sorted(marks)
        if box.y - 4 <= mark.y and mark.y + mark.h <= box.y + box.h + 4 and 2 * mark.h >= box.h
        if box.x - mark.w < mark.x < box.x + box.w
    ]
    if not inside:
        return [box]
    ink, _ = _ink_columns(picture[box.y : box.y + box.h, box.x : box.x + box.w])
    parts: list[Box] = []
    start = 0
    for mark in inside:
        left, right = mark.x - box.x, mark.x + mark.w - box.x
        gap = max(3, box.h // 8)
        if ink[max(0, left - gap) : max(0, left - 1)].any() or ink[right + 2 : right + gap + 1].any():
            continue
        parts.append(Box(box.x + start, box.y, max(0, left - 1 - start), box.h))
        start = max(start, min(box.w, right + 1))
    parts.append(Box(box.x + start, box.y, box.w - start, box.h))
    return [part for part in parts if part.w > _RULE_PX]


def _cut_at_sides(box: Box, controls: Sequence[Box]) -> list[Box]:
    """`box` cut where the side of a control that holds its middle row passes."""
    middle = box.y + box.h // 2
    sides: set[int] = set()
    for control in controls:
        if control.y < middle < control.y + control.h and control.h >= box.h * 2 // 3:
            sides |= {control.x, control.x + control.w}
    inner = sorted(x for x in sides if box.x + _DIVIDER_PX < x < box.x + box.w - _DIVIDER_PX)
    edges = [box.x, *inner, box.x + box.w]
    parts = [Box(start, box.y, end - start, box.h) for start, end in pairwise(edges) if end - start > _DIVIDER_PX]
    return parts or [box]


def _cut_at_blanks(picture: NDArray[np.uint8], box: Box) -> list[Box]:
    """`box` cut at wide blanks and at rules, each part with a margin of its blank."""
    if box.w < 2 * box.h or box.h < 6:
        return [box]
    ink, rules = _ink_columns(picture[box.y : box.y + box.h, box.x : box.x + box.w])
    gap_least = max(8, round(_CUT_GAP * box.h))
    parts: list[list[int]] = [[]]
    for start, end in _runs(ink):
        if end - start <= _RULE_PX and bool(rules[start:end].all()):
            parts.append([])
        elif parts[-1] and start - parts[-1][1] < gap_least:
            parts[-1][1] = end
        else:
            parts.append([start, end])
    kept = [part for part in parts if part]
    if len(kept) < 2:
        return [box]
    margin = max(2, box.h // 6)
    edges = [0, *(_middle(a, b, margin) for a, b in pairwise(kept)), box.w]
    spans = [
        (max(left, part[0] - margin), min(right, part[1] + margin))
        for part, (left, right) in zip(kept, pairwise(edges), strict=True)
    ]
    return [Box(box.x + start, box.y, end - start, box.h) for start, end in spans]


def cut_at_separators(picture: NDArray[np.uint8], box: Box, text: str) -> list[tuple[Box, str]]:
    """A line cut at the marks that part its items, as in "Home › Library" or "Next | Last".

    Args:
        picture: (h, w, 3) uint8.
        box: the line.
        text: what was read in it.

    Returns:
        (box, text) of each item, left to right; the line itself when no mark is found in both text and pixels.
    """
    marks = list(_SEPARATOR.finditer(text.strip()))
    text = text.strip()
    if not marks or box.w < 2 * box.h:
        return [(box, text)]
    ink, _ = _ink_columns(picture[box.y : box.y + box.h, box.x : box.x + box.w])
    runs = _words(_runs(ink), max(2, box.h // 8))
    cuts = _places(runs, [((m.start() + m.end()) / 2 / len(text), bool(m.group().strip())) for m in marks], box)
    if cuts is None:
        return [(box, text)]
    starts = [0, *(m.end() for m in marks)]
    ends = [*(m.start() for m in marks), len(text)]
    lefts = [0, *(right for _, right in cuts)]
    rights = [*(left for left, _ in cuts), box.w]
    return [
        (Box(box.x + left, box.y, right - left, box.h), text[start:end])
        for start, end, left, right in zip(starts, ends, lefts, rights, strict=True)
        if text[start:end] and right > left
    ]


def _places(runs: list[tuple[int, int]], wanted: list[tuple[float, bool]], box: Box) -> list[tuple[int, int]] | None:
    """[left, right) columns of each separator: the narrow word, or the blank, nearest to where the text has it."""
    if len(runs) < 2:
        return None
    first, last = runs[0][0], runs[-1][1]
    found: list[tuple[int, int]] = []
    for part, is_mark in wanted:
        at = first + part * (last - first)
        blanks = [(left[1], right[0]) for left, right in pairwise(runs)]
        narrow = [run for run in runs[1:-1] if run[1] - run[0] <= _MARK_WIDTH * box.h]
        options = narrow if is_mark else blanks
        near = min(options, key=lambda span: (abs(span[0] + span[1] - 2 * at), span), default=None)
        floor = found[-1][1] if found else first
        if near is None or abs((near[0] + near[1]) / 2 - at) > 2 * box.h or near[0] <= floor:
            return None
        found.append(near)
    return found


def _words(runs: list[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Runs of ink joined over gaps smaller than `gap` columns."""
    words: list[tuple[int, int]] = []
    for start, end in runs:
        if words and start - words[-1][1] < gap:
            words[-1] = (words[-1][0], end)
        else:
            words.append((start, end))
    return words


def _middle(a: list[int], b: list[int], margin: int) -> int:
    """The column between two parts at which neither loses its margin, if the gap allows."""
    return max(a[1], min((a[1] + b[0]) // 2, b[0] - margin))


def _ink_columns(crop: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(columns with ink in the crop's middle rows, columns that are one colour from top to bottom)."""
    height = crop.shape[0]
    middle = crop[height // 6 : height - height // 6]
    down = cv2.absdiff(middle[1:], middle[:-1]).max(axis=(0, 2)) > _INK
    along = np.zeros_like(down)
    along[1:] = cv2.absdiff(middle[:, 1:], middle[:, :-1]).max(axis=(0, 2)) > _INK
    spread = (crop.max(axis=0).astype(np.int16) - crop.min(axis=0)).max(axis=1) <= _INK
    return down | along, spread


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, end) of every run of True."""
    steps = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in zip(steps[::2], steps[1::2], strict=True)]
