"""Whole lines of text from the pieces single tiles saw: stitching at seams and cutting at wide gaps (pure geometry)."""

import re
from collections.abc import Sequence
from itertools import pairwise
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
_CUT_GAP: Final = (0.75, 1.15)
"""A blank this many times as wide as the letters are high parts two texts: the first where the line's own spaces
are much narrower, the second always (fixed-width fonts have spaces of 0.9)."""
_CUT_SPACES: Final = 1.7
_SPACE_LEAST: Final = 0.2
_RULE_PX: Final = 4
_SIDE_PX: Final = 3
_DIVIDER_PX: Final = 3
"""What a control's side cuts off at a line's end is no text when it is no wider than this."""
_SEPARATOR: Final = re.compile(r"\s+[/|>]\s+|\s*[›»•·∙⋅|¦]\s*|\s{2,}")
_LOOSE_MARKS: Final = " |›»•·∙⋅¦"
_MARK_WIDTH: Final = 0.5
_WIDE_SPACE: Final = 0.42


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
        if box.y - 4 <= mark.y and mark.y + mark.h <= box.y + box.h + 4
        if box.x - mark.w < mark.x < box.x + box.w and box.w > 2 * mark.w
    ]
    if not inside:
        return [box]
    crop = picture[box.y : box.y + box.h, box.x : box.x + box.w]
    ink, _ = _ink_columns(crop)
    beside = np.ones(box.w, dtype=bool)
    for mark in inside:
        beside[max(0, mark.x - box.x - 2) : mark.x - box.x + mark.w + 2] = False
    least = _ink_height(crop[:, beside]) if beside.sum() > _RULE_PX else box.h
    parts: list[Box] = []
    start = 0
    for mark in inside:
        left, right = mark.x - box.x, mark.x + mark.w - box.x
        # Letters of a word stand closer than a box and its label do, and both distances grow with the scale.
        gap = max(3, mark.h // 4)
        touched = ink[max(0, left - gap) : max(0, left - 1)].any() or ink[right + 2 : right + gap + 1].any()
        # A box to tick is at least as high as the letters beside it; a round letter is lower than they are.
        if touched or mark.h <= least:
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
    inner = sorted(x for x in sides if box.x < x < box.x + box.w)
    edges = [box.x, *inner, box.x + box.w]
    parts = [Box(start, box.y, end - start, box.h) for start, end in pairwise(edges) if end - start > _DIVIDER_PX]
    return parts or [box]


def _cut_at_blanks(picture: NDArray[np.uint8], box: Box) -> list[Box]:
    """`box` cut at wide blanks and at rules, each part with a margin of its blank."""
    if box.w < 2 * box.h or box.h < 6:
        return [box]
    crop = picture[box.y : box.y + box.h, box.x : box.x + box.w]
    ink, rules = _ink_columns(crop)
    runs = _runs(ink)
    gap_least = _gap_least(runs, _ink_height(crop))
    parts: list[list[int]] = [[]]
    for start, end in runs:
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


def _gap_least(runs: list[tuple[int, int]], ink_height: int) -> float:
    """How wide a blank must be to part two texts of a line, in pixels."""
    low, high = (max(6.0, factor * ink_height) for factor in _CUT_GAP)
    spaces = sorted(b[0] - a[1] for a, b in pairwise(runs) if b[0] - a[1] >= _SPACE_LEAST * ink_height)
    usual = spaces[(len(spaces) - 1) // 2] if spaces else 0
    return min(high, max(low, _CUT_SPACES * usual)) if len(spaces) > 1 else low


def _ink_rows(crop: NDArray[np.uint8]) -> tuple[int, int]:
    """[first, end) of the rows with ink; steps along a row only, so that rules across the crop do not count.

    The outermost columns are left out: a crop cut at a control's side holds that side's line.
    """
    crop = crop[:, _SIDE_PX:-_SIDE_PX] if crop.shape[1] > 4 * _SIDE_PX else crop
    inked = (cv2.absdiff(crop[:, 1:], crop[:, :-1]).max(axis=2) > _INK).any(axis=1)
    # The tails of a neighbouring line may reach into the crop: the highest band of ink is the line itself.
    bands = _words(_runs(inked), max(2, crop.shape[0] // 8))
    return max(bands, key=lambda band: (band[1] - band[0], -band[0]), default=(0, crop.shape[0]))


def _ink_height(crop: NDArray[np.uint8]) -> int:
    """Rows from the first to the last with ink."""
    first, end = _ink_rows(crop)
    return end - first


def tight(picture: NDArray[np.uint8], box: Box) -> Box:
    """`box` shrunk to the rows and columns its letters stand in, with one pixel around them.

    The detector's boxes of one font differ by half their height; letters tell size and place of a text.
    """
    crop = picture[box.y : box.y + box.h, box.x : box.x + box.w]
    first, end = _ink_rows(crop)
    ink, _ = _ink_columns(crop)
    if box.w > 4 * _SIDE_PX:
        ink[:_SIDE_PX] = ink[-_SIDE_PX:] = False
    columns = np.flatnonzero(ink)
    left, right = (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, box.w)
    left, first = max(0, left - 1), max(0, first - 1)
    right, end = min(box.w, right + 1), min(box.h, end + 1)
    return Box(box.x + left, box.y + first, right - left, end - first)


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
    crop = picture[box.y : box.y + box.h, box.x : box.x + box.w]
    ink, _ = _ink_columns(crop)
    runs = _words(_runs(ink), max(2, box.h // 8))
    cuts = _places(runs, [((m.start() + m.end()) / 2 / len(text), bool(m.group().strip())) for m in marks], box)
    # A slash between plain spaces is part of a text ("Win 95 / OSX"); between wide ones it parts the items of a path.
    wide = _WIDE_SPACE * _ink_height(crop)
    chosen = [
        (mark, cut)
        for mark, cut in zip(marks, cuts, strict=True)
        if cut is not None and (mark.group().strip() not in ("/", ">") or _room(runs, cut) >= wide)
    ]
    if not chosen:
        return [(box, text)]
    starts = [0, *(mark.end() for mark, _ in chosen)]
    ends = [*(mark.start() for mark, _ in chosen), len(text)]
    lefts = [0, *(right for _, (_, right) in chosen)]
    rights = [*(left for _, (left, _) in chosen), box.w]
    return [
        (Box(box.x + left, box.y, right - left, box.h), item)
        for start, end, left, right in zip(starts, ends, lefts, rights, strict=True)
        if (item := text[start:end].strip(_LOOSE_MARKS)) and right > left
    ]


def _places(runs: list[tuple[int, int]], wanted: list[tuple[float, bool]], box: Box) -> list[tuple[int, int] | None]:
    """[left, right) columns of each separator: the narrow word, or the blank, nearest to where the text has it.

    None for a separator that the pixels do not show there.
    """
    first, last = (runs[0][0], runs[-1][1]) if runs else (0, 0)
    blanks = [(left[1], right[0]) for left, right in pairwise(runs)]
    narrow = [run for run in runs[1:-1] if run[1] - run[0] <= _MARK_WIDTH * box.h]
    found: list[tuple[int, int] | None] = []
    floor = first
    for part, is_mark in wanted:
        at = first + part * (last - first)
        options = narrow if is_mark else blanks
        near = min(options, key=lambda span: (abs(span[0] + span[1] - 2 * at), span), default=None)
        if near is None or abs((near[0] + near[1]) / 2 - at) > 2 * box.h or near[0] <= floor:
            found.append(None)
        else:
            found.append(near)
            floor = near[1]
    return found


def _room(runs: list[tuple[int, int]], mark: tuple[int, int]) -> int:
    """The narrower of the blanks left and right of a separator."""
    before = max((end for _, end in runs if end <= mark[0]), default=0)
    after = min((start for start, _ in runs if start >= mark[1]), default=mark[1])
    return min(mark[0] - before, after - mark[1])


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
