"""Edges of a scene: what contains, labels and stands beside what (rectangles only)."""

from collections.abc import Sequence
from typing import Final

from him.perception.bare import is_search
from him.perception.parts import Part, Rows, overlap_part
from him.types import Box, Edge

_FIELDS: Final = frozenset({"textbox", "searchbox", "combobox", "spinbutton", "listbox", "slider"})
_MARKS: Final = frozenset({"checkbox", "radio", "switch"})
_LABELS: Final = frozenset({"text", "label", "heading", "legend"})
_ABOVE_PX: Final = 28
LEFT_PX: Final = 240
"""A label ends at most this far left of its field."""
_ROW_PX: Final = 720
"""A switch at the end of a row of settings is at most this far from its name."""
_ALIGNED_PX: Final = 24
_MARK_PX: Final = 28
_ROW_GAP_PX: Final = 160
_ROW_HEIGHT_MAX: Final = 80


def related(parts: Sequence[Part], ids: Sequence[str]) -> tuple[Edge, ...]:
    """All edges between parts in reading order, sorted.

    Args:
        parts: parts in reading order.
        ids: the node id of each.
    """
    pairs = [(a, b, "contains") for a, b in _contains(parts)]
    pairs += [(a, b, "labels") for a, b in _labels(parts)]
    pairs += [(a, b, "row") for a, b in _rows(parts)]
    return tuple(Edge(ids[a], ids[b], rel) for a, b, rel in sorted(set(pairs)))


def _contains(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Tree parents, and the smallest panel around whatever has no tree parent."""
    by_key = {part.key: index for index, part in enumerate(parts) if part.key is not None}
    panels = sorted(
        (index for index, part in enumerate(parts) if part.type == "panel"), key=lambda index: parts[index].box.area
    )
    found: list[tuple[int, int]] = []
    for index, part in enumerate(parts):
        if part.parent is not None and part.parent in by_key:
            found.append((by_key[part.parent], index))
            continue
        for panel in panels:
            around = parts[panel].box
            if panel != index and around.area > part.box.area and overlap_part(part.box, around) >= 0.9:
                found.append((panel, index))
                break
    return found


def _labels(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """The nearest aligned text of every field and mark."""
    texts = [index for index, part in enumerate(parts) if part.type in _LABELS and part.text]
    buttons = [index for index, part in enumerate(parts) if part.type == "button" and part.text]
    rows, button_rows = Rows([parts[text].box for text in texts]), Rows([parts[button].box for button in buttons])
    found: list[tuple[int, int]] = []
    for index, part in enumerate(parts):
        if part.type not in _FIELDS and part.type not in _MARKS:
            continue
        beside = [buttons[row] for row in button_rows.near(part.box)]
        if part.type in _MARKS and (held := [one for one in beside if _starts(part.box, parts[one].box)]):
            found.append((held[0], index))
            continue
        cost_of = _field_cost if part.type in _FIELDS else mark_cost
        near = [texts[row] for row in rows.near(part.box.grown(max(_ABOVE_PX, part.box.h)))]
        if part.label is not None:
            found += [(text, index) for text in near if parts[text].box == part.label]
            continue
        if is_search(part.text):
            # A field that says it searches is named by that; what stands some way off is a heading or another's.
            near = [text for text in near if _is_close(parts[text].box, part.box)]
        costs = [(cost, text) for text in near if (cost := cost_of(parts[text].box, part.box)) is not None]
        if costs:
            found.append((min(costs)[1], index))
        elif part.type in _MARKS and 2 * part.box.w >= 3 * part.box.h:
            found += [(text, index) for text in _row_start(parts, near, part.box)]
    return found


def _row_start(parts: Sequence[Part], texts: Sequence[int], switch: Box) -> list[int]:
    """The text that names a switch at the end of its row: the upper one of the column next to it, if any."""
    left = [
        (switch.x - box.x, box.y, text)
        for text in texts
        if (box := parts[text].box).x + box.w <= switch.x
        and switch.x - box.x - box.w <= _ROW_PX
        and abs(2 * box.y + box.h - 2 * switch.y - switch.h) <= 2 * switch.h
    ]
    return [text for _, _, text in sorted(left)[:1]]


def _is_close(label: Box, field: Box) -> bool:
    """Whether a text is no further above a field than it is high, and no further left than three times that."""
    return field.y - label.y - label.h <= label.h and field.x - label.x - label.w <= 3 * label.h


def _starts(mark: Box, button: Box) -> bool:
    """Whether a mark is what a button starts with: a box to tick that is drawn as a button."""
    level = abs(2 * mark.y + mark.h - 2 * button.y - button.h) <= 4
    return level and overlap_part(mark, button) >= 0.9 and mark.x - button.x <= button.h and 4 * mark.w < button.w


def _field_cost(label: Box, field: Box) -> int | None:
    """How far a label above or left of a field is, or None when it is not in place."""
    above = field.y - label.y - label.h
    aligned = abs(label.x - field.x)
    # A label may start further left than its field, over a sign or an icon joined to the field.
    reach = 2 * _ALIGNED_PX if label.x < field.x else _ALIGNED_PX
    if -label.h // 3 <= above <= max(_ABOVE_PX, field.h * 3 // 4) and aligned <= reach:
        return 2 * max(0, above) + aligned
    left = field.x - label.x - label.w
    apart = abs(2 * label.y + label.h - 2 * field.y - field.h) // 2
    if -4 <= left <= LEFT_PX and apart <= max(8, field.h // 2) and apart * 2 <= field.h:
        return max(0, left) + apart + 4
    return None


def mark_cost(label: Box, mark: Box) -> int | None:
    """How far a text right of a checkbox or radio is, or None when it is not in place."""
    right = label.x - mark.x - mark.w
    apart = abs(2 * label.y + label.h - 2 * mark.y - mark.h) // 2
    if -6 <= right <= _MARK_PX and apart <= max(label.h, mark.h) // 2:
        return max(0, right) + apart
    return None


def _rows(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Each part and its nearest right neighbour on the same line."""
    flat = [index for index, part in enumerate(parts) if part.type != "panel" and part.box.h <= _ROW_HEIGHT_MAX]
    rows = Rows([parts[index].box for index in flat])
    found: list[tuple[int, int]] = []
    for index in flat:
        box = parts[index].box
        best: tuple[int, int] | None = None
        for other in (flat[row] for row in rows.near(box)):
            beside = parts[other].box
            gap = beside.x - box.x - box.w
            shared = min(box.y + box.h, beside.y + beside.h) - max(box.y, beside.y)
            if other == index or not 0 <= gap <= _ROW_GAP_PX or 2 * shared < min(box.h, beside.h):
                continue
            if best is None or (gap, other) < best:
                best = (gap, other)
        if best is not None:
            found.append((index, best[1]))
    return found
