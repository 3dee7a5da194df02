"""Builds the scene graph of a screen (spec §4.1) from lines of text, widget boxes and, if given, a tree.

Pure rules over rectangles: which text belongs to which control, what labels what, what stands in a row.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from him.perception.bare import DOTS, bare_fields, is_placeholder
from him.perception.fuse import fused
from him.perception.parts import Part, line_height, median_height, overlap_part, reading_order
from him.perception.relate import LEFT_PX, mark_cost, related
from him.perception.widgets import SOLID_CONFIDENCE
from him.types import Box, Node, Scene, TextLine, TreeNode, WidgetBox

SCENE_VERSION: Final = 1

_PREFIXES: Final = {
    "button": "btn",
    "checkbox": "chk",
    "combobox": "cmb",
    "dialog": "dlg",
    "heading": "hdg",
    "icon": "icn",
    "image": "img",
    "link": "lnk",
    "menuitem": "mnu",
    "panel": "pnl",
    "radio": "rad",
    "tab": "tab",
    "text": "txt",
    "textbox": "fld",
}
_HEADING_RATIO: Final = 1.4
"""A text this many times as high as most is a heading; less may be an icon read with its word."""
_LARGE_RATIO: Final = 1.25
_SNUG_HEIGHT: Final = 3.4
"""A control is at most this many times as high as the text it is the button of."""
_SNUG_SIDES: Final = 9
"""…and leaves at most this many line heights free beside it."""
_INSIDE: Final = 0.7
_CENTRED: Final = 0.06
_ICON_COVERED: Final = 0.3
_EMPTY_FIELD_PX: Final = (20, 60)
_ICON_LEAST_PX: Final = 8
_ICON_SIDE_LEAST_PX: Final = 6
_MARK_RATIO: Final = 1.15
_MARK_LEAST_PX: Final = 24
_STACK_PX: Final = 4
_COLUMN_PX: Final = 3
"""Fields of one form start at the same column, give or take this."""
_TALL_PX: Final = 74
"""A bordered rectangle higher than this that is no field is a panel."""
_FIELD_HEIGHT: Final = 3.4
_FIELD_CHARS_MAX: Final = 48
_CARET_SIDE: Final = 0.6
"""A caret is at most this part of a line in size; an envelope or a lens is larger."""
_CARET_LEFT_PX: Final = 9
_WIDE_FROM: Final = 0x2E80
"""The first code point of the East Asian scripts."""
_PLAIN_SIGNS: Final = frozenset("?!+#%&@$€£-–—/|*=<>:")
_ROUND: Final = frozenset(("0", "O", "o", "○", "C", "Q", "V", "v", "口"))
"""What a tick, a ring or a box is read as."""
_ROUND_LETTERS: Final = frozenset("OQCGDo0")
_ROUND_FOLLOWERS: Final = frozenset("0123456789.,:%/-")
_CARETS: Final = frozenset("Vv∨⌄▾▼˅~﹀Y一>›")


def build(
    picture_size: tuple[int, int],
    lines: Sequence[TextLine],
    widgets: Sequence[WidgetBox],
    tree: Sequence[TreeNode] | None,
    pins: Mapping[str, str],
) -> Scene:
    """The scene of one picture, without its tiles; the same inputs in any order give the same scene.

    Args:
        picture_size: (height, width) in pixels.
        lines: text read from the picture.
        widgets: widget boxes found in it.
        tree: its accessibility tree, or None.
        pins: digests of what read it, copied into the scene.
    """
    height, width = picture_size
    parts = _from_pixels(lines, widgets)
    if tree is not None:
        parts = fused(parts, tree, picture_size)
    whole = Box(0, 0, width, height)
    seen = [part._replace(box=part.box.intersection(whole)) for part in parts]
    ordered = reading_order(part for part in seen if part.box.area)
    ids = [f"{_PREFIXES.get(part.type, 'nod')}_{number}" for number, part in enumerate(ordered, 1)]
    nodes = tuple(
        Node(name, part.type, part.text, part.box, dict(part.state), round(part.confidence, 4), part.source)
        for name, part in zip(ids, ordered, strict=True)
    )
    # Frames without a text say nothing about how well the screen was read.
    counted = [round(node.confidence * 10_000) for node in nodes if node.text] or [0]
    confidence = sum(counted) / (10_000 * len(counted))
    edges = related(ordered, ids)
    return Scene(SCENE_VERSION, width, height, nodes, edges, round(confidence, 4), (), dict(sorted(pins.items())))


def _from_pixels(lines: Sequence[TextLine], widgets: Sequence[WidgetBox]) -> list[Part]:
    """What pixels alone show."""
    usual = median_height(lines)
    widgets = [_rescaled(one, usual) for one in widgets]
    widgets = [WidgetBox(one.box, "check", 0.6) if _is_pill(one, lines, usual) else one for one in widgets]
    marks = [one for one in widgets if one.kind in ("check", "radio") and not _is_letter(one.box, lines)]
    marks = [one for one in marks if not any(_is_badge(one.box, line) for line in lines)]
    marks = [one for one in marks if one.confidence != SOLID_CONFIDENCE or _is_named(one.box, lines)]
    marks = [one for one in marks if not any(other.box != one.box and _in_mark(one, other) for other in marks)]
    glyphs = _glyphs(lines)
    lines = [line for line in lines if not (line.text in _ROUND and _has_stroke(line.box, (), marks, 0.3))]
    strokes = [one for one in widgets if one.kind == "icon"]
    lines = [_clear_of_icons(_clear_of_marks(line, marks), strokes) for line in lines if line not in glyphs]
    icons = [one for one in strokes if _is_icon(one.box, lines, marks)]
    icons += [WidgetBox(line.box, "icon", 0.5) for line in glyphs if not _has_stroke(line.box, icons, marks)]
    areas = _areas(widgets, lines, usual)
    lines = [line for line in lines if not any(overlap_part(line.box, area.box) >= _INSIDE for area in areas)]
    controls = [one for one in _controls(widgets) if not any(one.box == area.box for area in areas)]
    homes: dict[Box, list[TextLine]] = {}
    loose: list[TextLine] = []
    by_size = sorted(controls, key=lambda one: (one.box.area, one.box))
    for line in lines:
        home = next((one for one in by_size if overlap_part(line.box, one.box) >= _INSIDE), None)
        if home is None:
            loose.append(line)
        else:
            homes.setdefault(home.box, []).append(line)
    parts = list(areas)
    used: list[Box] = []
    for control in sorted(controls, key=lambda one: (one.box, one.kind)):
        inside = [one.box for one in icons if overlap_part(one.box, control.box) >= _INSIDE]
        nested = any(other.box != control.box and overlap_part(other.box, control.box) >= 0.9 for other in controls)
        held = homes.get(control.box, [])
        part = _control(control, held, inside, nested, usual)
        if part is None and not nested and _is_filled_field(control, held, inside, lines, usual):
            value = held[0] if held else None
            text, sure = (value.text, value.confidence) if value else ("", round(control.confidence * 0.6, 4))
            part = Part("textbox", text, control.box, sure, "ocr" if value else "widget")
        if part is None:
            loose += held
        else:
            parts.append(part)
            used += inside
    least = _HEADING_RATIO * usual
    bare = bare_fields(loose, lines, [one.box for one in controls])
    parts += [
        Part("textbox", line.text, line.box, line.confidence, "ocr", label=label.box) for line, label in bare.items()
    ]
    parts += [_text(line, least) for line in loose if line not in bare]
    parts += [Part(_mark_type(one, loose, lines, marks), "", one.box, one.confidence, "widget") for one in marks]
    free = [one for one in icons if one.box not in used and min(one.box.w, one.box.h) >= _ICON_SIDE_LEAST_PX]
    parts += [Part("icon", "", one.box, one.confidence, "widget") for one in free]
    taken = {part.box for part in parts}
    parts += [
        Part("panel", "", one.box, one.confidence, "widget")
        for one in widgets
        if one.kind == "panel" or (one.kind == "field" and one.box.h > _TALL_PX and one.box not in taken)
    ]
    return parts


def _mark_type(
    mark: WidgetBox, loose: Iterable[TextLine], lines: Iterable[TextLine], marks: Iterable[WidgetBox]
) -> str:
    """What a box or a ring is: "checkbox", "radio", or "icon".

    A box may stand alone, as in the rows of a table; a ring without a text beside it is an icon or a counter. A ring
    and a text in one button are an icon too, unless a like ring in its row offers another choice.
    """
    box = mark.box
    if mark.kind == "check":
        return "checkbox"
    if _is_named(box, loose):
        return "radio"
    level = (one.box for one in marks if one.kind == "radio" and abs(one.box.y - box.y) <= 2 and one.box.x != box.x)
    alike = [other for other in level if abs(other.h - box.h) <= 2]
    return "radio" if _is_named(box, lines) and any(_is_named(one, lines) for one in alike) else "icon"


def _is_named(mark: Box, lines: Iterable[TextLine]) -> bool:
    """Whether a text stands beside a mark."""
    return any(mark_cost(line.box, mark) is not None for line in lines)


def _rescaled(widget: WidgetBox, usual: int) -> WidgetBox:
    """A square much larger than the screen's text is a button with an icon, not a box to tick."""
    if widget.kind in ("check", "radio") and widget.box.h > max(_MARK_LEAST_PX, _MARK_RATIO * usual):
        return WidgetBox(widget.box, "button", widget.confidence)
    return widget


def _is_pill(widget: WidgetBox, lines: Iterable[TextLine], usual: int) -> bool:
    """Whether an outline is a switch: empty, no higher than a line, about twice as wide, with a text beside it."""
    box = widget.box
    if widget.kind not in ("field", "button") or not 3 * box.h <= 2 * box.w <= 5 * box.h or box.h > usual:
        return False
    return _is_named(box, lines) and not any(overlap_part(line.box, box) > 0 for line in lines)


def _glyphs(lines: Sequence[TextLine]) -> list[TextLine]:
    """Lines that are an icon read as a letter: a lone Chinese or odd sign on a screen that is not Chinese."""
    letters = sum(1 for line in lines for c in line.text if c.isalpha())
    wide = sum(1 for line in lines if len(line.text) > 2 for c in line.text if ord(c) >= _WIDE_FROM)
    foreign = wide * 5 < letters
    return [
        line
        for line in lines
        if (len(line.text) <= 2 and foreign and any(ord(c) >= _WIDE_FROM for c in line.text))
        or (len(line.text) <= 2 and not any(c.isalnum() or c in "?!+#%&@$€£" for c in line.text))
    ]


def _controls(widgets: Sequence[WidgetBox]) -> list[WidgetBox]:
    """Rectangles that may be controls: not those stacked edge to edge as table rows and parts of cards are."""
    frames = [one for one in widgets if one.kind in ("button", "field", "panel")]
    ends: dict[tuple[int, int], list[Box]] = {}
    for one in frames:
        ends.setdefault((one.box.x // 8, one.box.w // 8), []).append(one.box)
    found: list[WidgetBox] = []
    for one in frames:
        box = one.box
        near = [
            other
            for x in (-1, 0, 1)
            for w in (-1, 0, 1)
            for other in ends.get((box.x // 8 + x, box.w // 8 + w), ())
            if other != box and abs(other.x - box.x) <= 3 and abs(other.w - box.w) <= 4
        ]
        stacked = any(
            abs(other.y - box.y - box.h) <= _STACK_PX or abs(box.y - other.y - other.h) <= _STACK_PX for other in near
        )
        if one.kind != "panel" and not stacked:
            found.append(one)
    return found


def _text(line: TextLine, heading_least: float) -> Part:
    """A line that belongs to no control."""
    kind = "heading" if line_height(line) >= heading_least and len(line.text) >= 2 else "text"
    return Part(kind, line.text, line.box, line.confidence, "ocr")


def _control(widget: WidgetBox, lines: list[TextLine], icons: list[Box], nested: bool, usual: int) -> Part | None:
    """The control a rectangle and its content make, or None when it is only a frame around texts."""
    box = widget.box
    if not lines:
        return None if nested else _empty_control(widget, icons)
    ordered = sorted(lines, key=lambda line: (line.box.y, line.box.x))
    if len(ordered) == 2 and len(ordered[1].text) == 1 and ordered[1].text in _CARETS:
        icons = [*icons, ordered.pop().box]
    if (sign := _icon_read(widget, ordered)) is not None:
        ordered.remove(sign)
        icons = [*icons, sign.box]
    content = ordered[0].box
    for line in ordered[1:]:
        content = content.union(line.box)
    high = max(line_height(line) for line in ordered)
    side_by_side = len(ordered) > 1 and content.h < high
    uneven = high * 4 > min(line_height(line) for line in ordered) * 5
    if box.h > _SNUG_HEIGHT * high or side_by_side or uneven or len(ordered) > 2:
        return None
    kind = _control_type(widget, content, icons, high)
    text = " ".join(line.text for line in ordered)
    if kind is None and is_placeholder(text) and len(ordered) == 1 and content.x - box.x <= 2 * box.h:
        # Wide and filled without a border, with a hint at its start: a field, as a button's words stand snug.
        kind = "textbox"
    if kind == "textbox" and high >= _LARGE_RATIO * usual:
        return None
    if kind is None or (kind != "button" and len(text) > _FIELD_CHARS_MAX):
        return None
    return Part(kind, text, box, min(line.confidence for line in ordered), "ocr")


def _is_filled_field(
    widget: WidgetBox, held: Sequence[TextLine], icons: Sequence[Box], lines: Iterable[TextLine], usual: int
) -> bool:
    """Whether a wide filled rectangle without a border is a field: a label above its corner, one text at its start.

    The row chosen in a menu has its heading over its text, not over its corner, and a bar that fills is lower.
    """
    box = widget.box
    if widget.kind != "button" or box.w < 4 * box.h or not usual <= box.h <= _FIELD_HEIGHT * usual:
        return False
    if len(held) > 1 or (held and (len(held[0].text) > _FIELD_CHARS_MAX or held[0].box.x - box.x > box.h)):
        return False
    if not held and (box.h < _EMPTY_FIELD_PX[0] or icons):
        return False
    return any(
        abs(line.box.x - box.x) <= _COLUMN_PX and 0 <= box.y - line.box.y - line.box.h <= usual for line in lines
    )


def _icon_read(widget: WidgetBox, texts: Sequence[TextLine]) -> TextLine | None:
    """Of two texts in a field the one that is an icon at its start or end (a lock, a warning) read as a letter."""
    if widget.kind != "field" or len(texts) != 2:
        return None
    box, (first, second) = widget.box, sorted(texts, key=lambda line: (line.box.x, line.box))
    a, b = first.box, second.box
    if abs(2 * a.y + a.h - 2 * b.y - b.h) > max(a.h, b.h) or (b.x - a.x - a.w) * 4 < min(a.w, b.w):
        return None
    signs = [
        line
        for line, room in ((first, a.x - box.x), (second, box.x + box.w - b.x - b.w))
        if len(line.text) <= 2 and line.box.w * 2 <= line.box.h * 3 and room <= box.h // 2
    ]
    # Of a short value and an icon the icon is the stranger sign.
    return min(signs, key=lambda line: (line.text.isascii(), len(line.text), line.box), default=None)


def _control_type(widget: WidgetBox, content: Box, icons: list[Box], high: int) -> str | None:
    """What a rectangle is by where its text stands: "combobox", "textbox", "button"; None for a mere frame."""
    box, end = widget.box, widget.box.x + widget.box.w
    text_end = content.x + content.w
    carets = [
        icon.x
        for icon in icons
        if end - icon.x <= 2 * box.h and icon.x >= text_end - 2 and max(icon.w, icon.h) <= _CARET_SIDE * high
    ]
    if widget.kind == "field" and carets:
        apart = min(carets) - text_end
        if apart * 5 > high * 4 or content.x - box.x < _CARET_LEFT_PX:
            return "combobox"
    for icon in sorted(icons):
        # An icon beside the words belongs to them; one at the far end does not move their middle.
        if max(icon.x - content.x - content.w, content.x - icon.x - icon.w) <= high:
            content = content.union(icon)
    left, right = content.x - box.x, end - content.x - content.w
    clipped = right <= 3 < left
    centred = abs(left - right) <= max(5, _CENTRED * box.w) and not clipped
    if widget.kind == "field" and left <= box.h and not centred:
        return "textbox"
    free = box.w - content.w
    return "button" if free <= _SNUG_SIDES * high or (centred and free <= 2 * _SNUG_SIDES * high) else None


def _areas(widgets: Sequence[WidgetBox], lines: Sequence[TextLine], usual: int) -> list[Part]:
    """Fields of several lines: tall bordered rectangles with a label or a hint and only text inside."""
    found: list[Part] = []
    frames = [one.box for one in widgets if one.kind in ("button", "field", "panel", "check", "radio")]
    fields = [one.box for one in widgets if one.kind == "field" and one.box.h <= _FIELD_HEIGHT * usual]
    for one in widgets:
        box = one.box
        if one.kind != "field" or box.h <= min(_FIELD_HEIGHT * usual, _EMPTY_FIELD_PX[1]):
            continue
        holds = any(frame != box and overlap_part(frame, box) >= 0.9 for frame in frames)
        inside = sorted(
            (line for line in lines if overlap_part(line.box, box) >= _INSIDE),
            key=lambda line: (line.box.y, line.box.x),
        )
        begins = not inside or (inside[0].box.x - box.x <= usual and inside[0].box.y - box.y <= usual)
        in_column = any(abs(field.x - box.x) <= _COLUMN_PX for field in fields)
        captioned = not inside and _has_caption(box, frames, usual)
        hinted = len(inside) == 1 and inside[0].text.endswith(DOTS)
        labelled = hinted or any(
            _is_above(line.box, box, usual, anywhere=captioned) or (in_column and _is_left(line.box, box, usual))
            for line in lines
        )
        if labelled and begins and not holds:
            confidence = min((line.confidence for line in inside), default=one.confidence)
            found.append(Part("textbox", " ".join(line.text for line in inside), box, round(confidence, 4), "ocr"))
    return found


def _has_caption(area: Box, frames: Iterable[Box], usual: int) -> bool:
    """Whether a frame one line high and as wide as the area is joined to its upper side."""
    return any(
        abs(frame.x - area.x) <= _COLUMN_PX
        and abs(frame.w - area.w) <= 2 * _COLUMN_PX
        and abs(frame.y + frame.h - area.y) <= _STACK_PX
        and frame.h <= _FIELD_HEIGHT * usual
        for frame in frames
    )


def _is_above(label: Box, area: Box, usual: int, *, anywhere: bool) -> bool:
    """Whether a text stands right above the start of an area, or anywhere above it in a caption."""
    aligned = abs(label.x - area.x) <= usual // 2 or (anywhere and area.x <= label.x < area.x + area.w)
    return aligned and -usual // 3 <= area.y - label.y - label.h <= usual


def _is_left(label: Box, area: Box, usual: int) -> bool:
    """Whether a text stands left of the first line of an area."""
    return 0 <= area.x - label.x - label.w <= LEFT_PX and 0 <= label.y - area.y <= usual


def _empty_control(widget: WidgetBox, icons: list[Box]) -> Part | None:
    """A control without text: a button with one icon, or an empty field."""
    box = widget.box
    if len(icons) == 1 and box.w <= 3 * box.h:
        return Part("button", "", box, round(widget.confidence * 0.8, 4), "widget")
    low, high = _EMPTY_FIELD_PX
    if widget.kind != "field" or not low <= box.h <= high:
        return None
    if icons and min(icon.x for icon in icons) > box.x + box.w - 2 * box.h:
        return Part("combobox", "", box, round(widget.confidence * 0.6, 4), "widget")
    low_part = all(icon.x + icon.w <= box.x + box.w // 2 and 3 * icon.h <= 2 * box.h for icon in icons)
    # Strokes at the left alone are the dots of a password.
    return None if not low_part else Part("textbox", "", box, round(widget.confidence * 0.6, 4), "widget")


def _is_letter(box: Box, lines: Iterable[TextLine]) -> bool:
    """Whether a mark lies within a text, where it is the inside of a letter, or is the round letter it begins with."""
    return any(
        overlap_part(box, line.box) >= 0.5
        and (
            box.x - line.box.x > line_height(line)
            or box.h * 3 < line_height(line)
            or (_begins_round(line.text) and box.h <= line.box.h)
        )
        for line in lines
    )


def _begins_round(text: str) -> bool:
    """Whether a word begins with a letter like a ring; a real ring stands before a capital or a space."""
    return len(text) > 1 and text[0] in _ROUND_LETTERS and (text[1].islower() or text[1] in _ROUND_FOLLOWERS)


def _clear_of_marks(line: TextLine, marks: Iterable[WidgetBox]) -> TextLine:
    """A line without the checkbox or radio it was read together with."""
    for mark in marks:
        end = mark.box.x + mark.box.w
        if overlap_part(mark.box, line.box) >= 0.5 and end < line.box.x + line.box.w:
            text = line.text
            if len(text) > 2 and (not text[0].isalnum() or text[1] == " " or ord(text[0]) > 0x2E80 or text[0] in "O0"):
                text = text[1:].strip()
            return TextLine(Box(end, line.box.y, line.box.x + line.box.w - end, line.box.h), text, line.confidence)
    return line


def _clear_of_icons(line: TextLine, strokes: Iterable[WidgetBox]) -> TextLine:
    """A line without the icon at its start or end that was read as a lone sign."""
    text, box = line.text, line.box
    words = text.split()
    if len(words) < 2:
        return line
    first, last = words[0], words[-1]
    for stroke in (one.box for one in strokes):
        if overlap_part(stroke, line.box) < 0.7 or stroke.w > 2 * stroke.h:
            continue
        if _is_sign(first) and stroke.x - line.box.x < line_height(line) // 2 and box.x == line.box.x:
            end = stroke.x + stroke.w + 1
            text, box = text[len(first) :].strip(), Box(end, box.y, box.x + box.w - end, box.h)
        elif (
            _is_sign(last)
            and line.box.x + line.box.w - stroke.x - stroke.w < line_height(line) // 2
            and box.w == line.box.w
        ):
            text, box = text[: -len(last)].strip(), Box(box.x, box.y, stroke.x - 1 - box.x, box.h)
    return TextLine(box, text, line.confidence) if text and box.w > 0 else line


def _is_sign(word: str) -> bool:
    """Whether a word is one sign that no Latin text has alone."""
    return len(word) == 1 and (ord(word) >= _WIDE_FROM or not (word.isalnum() or word in _PLAIN_SIGNS))


def _is_badge(mark: Box, line: TextLine) -> bool:
    """Whether a text fills a disc or square: a counter, a letter in a circle, no mark to tick."""
    return (
        any(c.isalnum() or c in _PLAIN_SIGNS for c in line.text)
        and line.text not in _ROUND
        and max(overlap_part(line.box, mark), overlap_part(mark, line.box) if len(line.text) == 1 else 0) >= 0.5
        and line.box.area * 4 >= mark.area
    )


def _in_mark(inner: WidgetBox, outer: WidgetBox) -> bool:
    """Whether a mark is the inside of another, or the same one found again."""
    if overlap_part(inner.box, outer.box) < 0.8:
        return False
    return (outer.confidence, outer.box.area, outer.box) > (inner.confidence, inner.box.area, inner.box)


def _is_icon(box: Box, lines: Iterable[TextLine], marks: Iterable[WidgetBox]) -> bool:
    """Whether strokes are large enough for an icon, are no letters of a text and belong to no mark."""
    return (
        max(box.w, box.h) >= _ICON_LEAST_PX
        and not any(overlap_part(box, line.box) >= _ICON_COVERED for line in lines)
        and not any(overlap_part(mark.box, box) >= 0.5 for mark in marks)
    )


def _has_stroke(box: Box, icons: Iterable[WidgetBox], marks: Iterable[WidgetBox], least: float = 0.5) -> bool:
    """Whether an icon or a mark lies where a lone sign was read."""
    return any(overlap_part(one.box, box) >= least for one in (*icons, *marks))
