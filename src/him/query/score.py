"""How well an element fits a goal: integer features of one place, and the score that ranks them. Pure functions."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from him.index import Relations
from him.index.roles import role_of
from him.index.text import folded, plain
from him.index.vector import FULL_SCORE
from him.query.goal import Goal
from him.query.likeness import EXACT, FULL, inside, similarity
from him.types import Box, Node

TIE_MARGIN: Final = 200
"""Two places whose evidence differs by less than this cannot be told apart."""

TEXT_WEIGHT: Final = 8
ROLE_WEIGHT: Final = 400
CLICKABLE_BONUS: Final = 150
"""Less than a tie: a link and a heading of one text stay two places when no role is asked for."""
CLICK_BONUS: Final = 350
"""More than a tie: of a link and a heading of one text, the link is what can be clicked."""
AREA_MALUS: Final = 300
VARIANT_MALUS: Final = 25
WHOLE_MIN: Final = 985
"""Likeness of a longer reading of an unquoted goal from which on that is what was meant: "Show password" is shown."""
WHOLE_BONUS: Final = TIE_MARGIN
"""What sets a longer reading that is shown apart from a shorter one that is shown too."""
LABEL_MALUS: Final = 30
LABEL_UNASKED_MALUS: Final = 300
PART: Final = 860
"""Likeness of a text that stands whole in a line that pixels show, which may hold several elements…"""
PART_SHARE: Final = 79
"""…and what it gains as it takes up more of that line; together below EXACT."""
LABELS_APART: Final = 100
"""A label and what it labels fit a goal alike, or the label is another's."""
CONTROLS: Final = frozenset({"field", "dropdown", "checkbox", "switch", "radio", "slider"})
"""Roles whose text usually stands beside them, in a label."""
CLICKABLE: Final = frozenset({"button", "link", "tab", "menuitem", "option"}) | CONTROLS
_COMPATIBLE: Final[dict[str, frozenset[str]]] = {
    "button": frozenset({"tab", "menuitem", "switch", "dropdown", "link", "icon"}),
    "link": frozenset({"menuitem", "tab", "button", "option"}),
    "tab": frozenset({"link", "button", "radio", "menuitem"}),
    "field": frozenset({"dropdown", "slider"}),
    "dropdown": frozenset({"field", "button"}),
    "checkbox": frozenset({"switch", "radio"}),
    "switch": frozenset({"checkbox", "button"}),
    "radio": frozenset({"option", "tab", "checkbox"}),
    "menuitem": frozenset({"link", "option", "button", "tab"}),
    "menu": frozenset({"menuitem", "link", "button", "tab", "dropdown", "area"}),
    "option": frozenset({"menuitem", "cell", "radio", "link", "checkbox"}),
    "icon": frozenset({"button", "link"}),
    "heading": frozenset({"text", "label"}),
    "label": frozenset({"text", "heading"}),
    "text": frozenset({"label", "heading", "cell", "option"}),
    "cell": frozenset({"text", "link", "heading"}),
    "area": frozenset({"heading"}),
}
_PIXELS: Final = frozenset({"ocr", "widget"})
_CARRIES_TEXT: Final = frozenset({"text", "label", "heading", "cell", "icon", ""})
"""Roles of nodes that show the text of the control they lie in."""
_PARENTS_MAX: Final = 3
_PARENT_AREA_MAX: Final = 40


class Features(NamedTuple):
    """What speaks for a place, per mille unless said otherwise.

    `text` match of the element's own text; `label` match of what labels it; `part` above 0, its share, when the text
    is only part of a longer line; `beside` 1 when the label is one by its place alone; `role` −2 (another) … 2 (as
    asked); `meaning` cosine of the vectors; `words` share of the goal's words held; `seen` confidence of the reading;
    `chars` length of the target in characters.
    """

    text: int
    label: int
    part: int
    beside: int
    role: int
    meaning: int
    words: int
    seen: int
    chars: int


class Match(msgspec.Struct, frozen=True):
    """An occurrence with its features and scores.

    `place` is the occurrence's number in the rows, `labels` the nodes that label it, `copies` counts other nodes of
    the same target (a link's own text, a field's label).
    """

    place: int
    frame: str
    node: str
    box: Box
    text: str
    type: str
    source: str
    features: Features
    evidence: int
    score: int
    labels: tuple[str, ...] = ()
    copies: int = 0


def role_fit(asked: str, kind: str, source: str, *, with_tree: bool = False) -> int:
    """−2…2: how the type of an element agrees with the role asked for; 0 when none is asked or nothing is known.

    Args:
        asked: the role asked for.
        kind: the element's type.
        source: what saw it; pixels alone tell a button from a text by its frame, and often neither.
        with_tree: an accessibility tree was there and does not have it.
    """
    role = role_of(kind)
    if not asked:
        return 0
    if source in _PIXELS and with_tree:
        return 0 if role == asked else -1
    if role == asked:
        return 2
    alike = role in _COMPATIBLE.get(asked, ())
    if source in _PIXELS:
        if role in CONTROLS and alike:
            return 2  # what kind of control it is is a guess from pixels
        return 1 if role in CLICKABLE and alike else 0
    return 1 if alike or not role else -2


def role_in_place(asked: str, node: Node, relations: Relations) -> int:
    """`role_fit` of a node, or of the control it lies in when it is that control's text."""
    fit = role_fit(asked, node.type, node.source, with_tree=relations.with_tree)
    inner, steps = node, 0
    while asked and fit < 1 and role_of(inner.type) in _CARRIES_TEXT | {"area"} and steps < _PARENTS_MAX:
        outer = relations.parent(inner.id)
        if outer is None or outer.bbox.area > _PARENT_AREA_MAX * max(1, node.bbox.area):
            break
        if role_of(outer.type) in CLICKABLE and role_of(node.type) in _CARRIES_TEXT:
            fit = max(fit, role_fit(asked, outer.type, outer.source, with_tree=relations.with_tree))
        inner, steps = outer, steps + 1
    return fit


def _best(goal: Goal, text: str) -> tuple[int, str]:
    """(likeness, variant) of the variant that fits best."""
    found, chosen = 0, goal.text
    for place, variant in enumerate(goal.variants):
        likeness = similarity(variant, text) - (VARIANT_MALUS if place else 0)
        if likeness > found:
            found, chosen = likeness, variant
    return found, chosen


class Fit(NamedTuple):
    """How a content's texts fit a goal: likeness of text and label, and where in the text a part of it lies."""

    text: int
    label: int
    part: tuple[int, int, int] | None
    """(start, end, length) in characters of the compared text."""
    whole: bool = False
    """The text is a longer reading of an unquoted goal, its verb or noun part of it."""


def fit_of(goal: Goal, text: str, label: str) -> Fit:
    """How a content fits a goal."""
    likeness, variant = _best(goal, text)
    if likeness >= EXACT and variant != goal.text and similarity(goal.text, text) < EXACT:
        shown = similarity(variant, text)
        if shown >= WHOLE_MIN:
            return Fit(shown, _best(goal, label)[0] if label else 0, None, whole=True)
    part: tuple[int, int, int] | None = None
    if 0 < likeness < EXACT and (at := inside(plain(variant), plain(text))):
        part = *at, len(plain(text))
    return Fit(likeness, _best(goal, label)[0] if label else 0, part)


def lexical(goal: Goal, features: Features, kind: str) -> int:
    """The better of text and label, where a label counts fully only for what is usually labelled."""
    role = role_of(kind)
    asked = goal.role in CONTROLS or goal.role == "option" or (goal.relation == "label" and not goal.role)
    malus = LABEL_MALUS if asked and role in CONTROLS else LABEL_UNASKED_MALUS
    return max(features.text, features.label - malus, PART + PART_SHARE * features.part // FULL if features.part else 0)


def is_line(node: Node) -> bool:
    """Whether a node is a line of text read from pixels: it may hold several links, and the answer is one of them."""
    return node.source == "ocr" and role_of(node.type) in ("text", "heading")


def part_box(box: Box, part: tuple[int, int, int]) -> Box:
    """The part of a line's box where some of its characters stand, taking all to be as wide."""
    start, end, length = part
    left, right = box.x + box.w * start // length, box.x + -(-box.w * end // length)
    return Box(left, box.y, max(1, right - left), box.h)


def scored(goal: Goal, place: int, frame: str, node: Node, fit: Fit, label: str, features: Features) -> Match:
    """The match of one occurrence: `evidence` decides ties, `score` adds what only orders."""
    role = role_of(node.type)
    # A word that belongs to the text asks for no role; but what names a control may end in the control's noun, and a
    # heading is not what a noun such as "tab" means.
    named = goal.role in CONTROLS or (role == "heading" and goal.role not in ("", "heading"))
    whole = fit.whole and (not named or role in CLICKABLE)
    if whole:
        features = features._replace(role=2)
    evidence = TEXT_WEIGHT * lexical(goal, features, node.type) + ROLE_WEIGHT * features.role
    if whole:
        evidence += WHOLE_BONUS
    if role in CLICKABLE and (whole or not goal.role):
        evidence += CLICKABLE_BONUS if goal.verb == "find" or not goal.verb else CLICK_BONUS
    if role == "area" and goal.role != "area":
        evidence -= AREA_MALUS
    score = evidence + features.meaning // 2 + features.words // 2 + features.seen // 5
    box = part_box(node.bbox, fit.part) if fit.part and features.part else node.bbox
    return Match(place, frame, node.id, box, node.text or label, node.type, node.source, features, evidence, score)


def meaning(dot: int) -> int:
    """A dot product of int8 vectors as cosine per mille, 0…1000."""
    return max(0, min(FULL, FULL * dot // FULL_SCORE))


def _order(match: Match) -> tuple[int, str, int, int, int, int, str]:
    # Of equal scores the first in reading order comes first; nothing depends on the order of input.
    box = match.box
    return -match.score, match.frame, box.y, box.x, box.h, box.w, match.node


def ranked(matches: Sequence[Match]) -> list[Match]:
    """Best first, ties by frame and place; nodes that show one target joined into the best of them.

    One target are a button and the text in it, and a field and its label.
    """
    kept: list[Match] = []
    on_frame: dict[str, list[int]] = {}
    for match in sorted(matches, key=_order):
        known = on_frame.setdefault(match.frame, [])
        twin = next((place for place in known if _same_target(kept[place], match)), None)
        if twin is None:
            known.append(len(kept))
            kept.append(match)
        else:
            kept[twin] = msgspec.structs.replace(kept[twin], copies=kept[twin].copies + 1)
    return kept


def _same_target(a: Match, b: Match) -> bool:
    """Whether two places of one frame carry one text and lie on each other, or one labels the other."""
    if b.node in a.labels or a.node in b.labels:
        return abs(max(a.features.text, a.features.label) - max(b.features.text, b.features.label)) < LABELS_APART
    smaller = min(a.box.area, b.box.area)
    if smaller == 0 or 10 * a.box.intersection(b.box).area < 7 * smaller:
        return False
    one, two = folded(a.text), folded(b.text)
    return one == two or not one or not two or one in two or two in one
