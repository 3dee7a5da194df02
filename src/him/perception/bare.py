"""Fields without a border, known by the hint they show and by the rows of the form they stand in (pure geometry)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from him.perception.parts import line_height
from him.types import Box, TextLine

_HINT_WORDS_MAX: Final = 5
"""A hint is short; a longer text that ends in dots is the start of a message."""
DOTS: Final = ("...", "…")
_SEARCH_WORDS_MAX: Final = 8
"""…but one to search by may name all it searches in."""
_COLUMN_PX: Final = 4
_JOINED_PX: Final = 12
"""Tags stand at most this far in front of what is written next in their field."""
_TAG_HEIGHT: Final = 3
_LABEL_PX: Final = 160
_PITCH: Final = 4
"""Rows of one form are at most this many line heights apart."""


def is_placeholder(text: str) -> bool:
    """Whether a text reads as the hint of an empty field: "Search", "Add another…"."""
    return len(text.split()) <= _HINT_WORDS_MAX and (text.endswith(DOTS) or is_search(text))


def is_search(text: str) -> bool:
    """Whether a text is the hint of a field to search in."""
    return text.casefold().startswith("search") and len(text.split()) <= _SEARCH_WORDS_MAX


def bare_fields(
    loose: Sequence[TextLine], lines: Sequence[TextLine], frames: Sequence[Box]
) -> dict[TextLine, TextLine]:
    """The hints and values of fields that have no border, as the head of a message to write shows them.

    A form is a column of labels, of which one has a hint at the end of its row. Another of its rows holds a field if
    one text alone stands beside its label, where the content of the first row begins.

    Args:
        loose: texts that lie in no control.
        lines: all texts.
        frames: boxes of controls; those joined in front of a hint are its field's tags.

    Returns:
        What each field shows, and its label.
    """
    found: dict[TextLine, TextLine] = {}
    for hint in loose:
        if not is_placeholder(hint.text) or not hint.text.endswith(DOTS):
            continue
        start = _start(hint.box, frames)
        label = _beside(start, hint.box, loose)
        form = _column(label, loose) if label is not None else []
        if label is None or len(form) < 2:
            continue
        found[hint] = label
        for other in form:
            right = [line for line in _row(other.box, lines) if line.box.x > other.box.x]
            if len(right) == 1 and abs(right[0].box.x - start) <= _COLUMN_PX and right[0] in loose:
                found[right[0]] = other
    return found


def _start(hint: Box, frames: Sequence[Box]) -> int:
    """Where the field of a hint begins: at its first tag, or at the hint itself."""
    start = hint.x
    for tag in sorted(frames, key=lambda box: (-box.x, box)):
        joined = 0 <= start - tag.x - tag.w <= _JOINED_PX
        if joined and _same_row(tag, hint) and tag.h <= _TAG_HEIGHT * hint.h:
            start = tag.x
    return start


def _beside(start: int, hint: Box, loose: Sequence[TextLine]) -> TextLine | None:
    """The nearest text left of a field that starts at `start`."""
    left = [line for line in _row(hint, loose) if 0 <= start - line.box.x - line.box.w <= _LABEL_PX]
    return max(left, key=lambda line: (line.box.x + line.box.w, line.box), default=None)


def _column(label: TextLine, loose: Sequence[TextLine]) -> list[TextLine]:
    """The labels above and below a label, without a gap between them."""
    aligned = sorted(
        (line for line in loose if abs(line.box.x - label.box.x) <= _COLUMN_PX), key=lambda line: (line.box.y, line.box)
    )
    reach = _PITCH * line_height(label)
    runs: list[list[TextLine]] = [aligned[:1]]
    for upper, lower in pairwise(aligned):
        if lower.box.y - upper.box.y <= reach and abs(lower.box.h - upper.box.h) * 3 <= upper.box.h:
            runs[-1].append(lower)
        else:
            runs.append([lower])
    return next(run for run in runs if label in run)


def _row(box: Box, lines: Sequence[TextLine]) -> list[TextLine]:
    """The texts level with a box, left to right."""
    return sorted((line for line in lines if _same_row(line.box, box)), key=lambda line: (line.box.x, line.box))


def _same_row(one: Box, other: Box) -> bool:
    """Whether two boxes share half of the lower one's height."""
    shared = min(one.y + one.h, other.y + other.h) - max(one.y, other.y)
    return 2 * shared >= min(one.h, other.h)
