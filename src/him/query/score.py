"""How well an element fits a goal: integer features of one place, and the score that ranks them. Pure functions."""

from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from him.index.roles import role_of
from him.index.text import folded, plain
from him.index.vector import FULL_SCORE
from him.query.goal import Goal
from him.types import Box, Node

FULL: Final = 1000
"""Features are per mille."""
EXACT: Final = 940
"""A text match from here on is the same text, up to look-alike characters, spaces and punctuation."""
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
LABEL_MALUS: Final = 30
LABEL_UNASKED_MALUS: Final = 300
EDIT_CHARS_MAX: Final = 120
FUZZY_MIN: Final = 550
"""Below this likeness two texts have nothing to do with each other."""
DIGITS_DIFFER: Final = 600
"""The best that texts with other digits can reach: "Page 1" and "Page 2" look alike and are never the same."""

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
    "menu": frozenset({"menuitem", "button", "dropdown", "area"}),
    "option": frozenset({"menuitem", "cell", "radio", "link", "checkbox"}),
    "icon": frozenset({"button", "link"}),
    "heading": frozenset({"text", "label"}),
    "label": frozenset({"text", "heading"}),
    "text": frozenset({"label", "heading", "cell", "option"}),
    "cell": frozenset({"text", "link", "heading"}),
    "area": frozenset({"heading"}),
}
_ALIKE: Final = str.maketrans(
    {"5": "s", "8": "b", "2": "z", "v": "u", "c": "e", "y": "u", "q": "g", "9": "g", "t": "f"}
)


class Features(NamedTuple):
    """What speaks for a place, per mille unless said otherwise.

    `text` match of the element's own text; `label` match of what labels it; `role` −2 (another) … 2 (as asked);
    `meaning` cosine of the vectors; `words` share of the goal's words held; `seen` confidence of the reading;
    `chars` length of the target in characters.
    """

    text: int
    label: int
    role: int
    meaning: int
    words: int
    seen: int
    chars: int


class Match(msgspec.Struct, frozen=True):
    """An occurrence with its features and scores.

    `place` is the occurrence's number in the rows, `copies` counts other nodes of the same target (a link's text).
    """

    place: int
    frame: str
    node: str
    box: Box
    text: str
    type: str
    features: Features
    evidence: int
    score: int
    copies: int = 0


def _distance(a: str, b: str) -> int:
    """Levenshtein distance, bit-parallel (Myers 1999, Hyyrö's form): one step a character of `b`."""
    if not a:
        return len(b)
    at: dict[str, int] = {}
    for place, char in enumerate(a):
        at[char] = at.get(char, 0) | (1 << place)
    last, full = 1 << (len(a) - 1), (1 << len(a)) - 1
    more, less, distance = full, 0, len(a)
    for char in b:
        same = at.get(char, 0)
        across = (((same & more) + more) ^ more) | same | less
        grown, shrunk = less | ~(across | more), more & across
        distance += 1 if grown & last else -1 if shrunk & last else 0
        grown, shrunk = (grown << 1) | 1, shrunk << 1
        more, less = (shrunk | ~(across | grown)) & full, grown & across & full
    return distance


def _fuzzy(a: str, b: str) -> int:
    """0…1000 likeness of two folded texts, a look-alike letter counting half; 0 below FUZZY_MIN."""
    longest = max(len(a), len(b))
    # Texts without half their letters in common cannot reach FUZZY_MIN: most pairs end here.
    if longest > EDIT_CHARS_MAX or 2 * (Counter(a) & Counter(b)).total() < longest:
        return 0
    cost = _distance(a, b) + _distance(a.translate(_ALIKE), b.translate(_ALIKE))
    likeness = FULL - FULL * cost // (2 * longest)
    return likeness if likeness >= FUZZY_MIN else 0


def _contained(target: str, text: str) -> int:
    """Score of `target` standing inside `text` at word borders; 0 if it does not."""
    at = text.find(target)
    while at >= 0:
        end = at + len(target)
        before, after = text[at - 1 : at], text[end : end + 1]
        if not (before.isalnum() and target[0].isalnum()) and not (after.isalnum() and target[-1].isalnum()):
            return (580 if at == 0 else 520) + 320 * len(target) // len(text)
        at = text.find(target, at + 1)
    return 0


def _digits(text: str) -> str:
    return "".join(char for char in text if char.isdigit())


def similarity(target: str, text: str) -> int:
    """0…1000: how sure `text`, perhaps misread, is the text `target` asks for."""
    target, text = plain(target), plain(text)
    if not target or not text:
        return 0
    if target == text:
        return FULL
    bare, bare_text = folded(target), folded(text)
    if bare and bare == bare_text:
        return 985 if _digits(target) == _digits(text) else 950
    if not bare or not bare_text:
        return 0
    if bare.replace("rn", "m") == bare_text.replace("rn", "m"):
        return EXACT
    score = min(_fuzzy(bare, bare_text), EXACT - 1 if _digits(target) == _digits(text) else DIGITS_DIFFER)
    score = max(score, _contained(target, text))
    if inner := _contained(text, target):
        score = max(score, (inner - 520) * 2 // 3 + 250)
    return score


def role_fit(asked: str, kind: str, source: str) -> int:
    """−2…2: how the type of an element agrees with the role asked for; 0 when none is asked or nothing is known."""
    role = role_of(kind)
    if not asked:
        return 0
    if role == asked:
        return 2
    if role in _COMPATIBLE.get(asked, ()):
        return 1
    if source == "ocr" or not role:
        return 0  # read from pixels alone, "text" says nothing about what it is part of
    return -2 if source in ("tree", "fused") else -1


def _best(goal: Goal, text: str) -> int:
    found = 0
    for place, variant in enumerate(goal.variants):
        found = max(found, similarity(variant, text) - (VARIANT_MALUS if place else 0))
    return found


def texts(goal: Goal, text: str, label: str) -> tuple[int, int]:
    """(text match, label match) of a content, each 0…1000."""
    return _best(goal, text), _best(goal, label) if label else 0


def lexical(goal: Goal, features: Features, kind: str) -> int:
    """The better of text and label, where a label counts fully only for what is usually labelled."""
    role = role_of(kind)
    asked = goal.role in CONTROLS or (goal.relation == "label" and not goal.role)
    malus = LABEL_MALUS if asked and role in CONTROLS else LABEL_UNASKED_MALUS
    return max(features.text, features.label - malus, 0)


def scored(goal: Goal, place: int, frame: str, node: Node, label: str, features: Features) -> Match:
    """The match of one occurrence: `evidence` decides ties, `score` adds what only orders."""
    role = role_of(node.type)
    evidence = TEXT_WEIGHT * lexical(goal, features, node.type) + ROLE_WEIGHT * features.role
    if role in CLICKABLE and not goal.role:
        evidence += CLICKABLE_BONUS if goal.verb == "find" or not goal.verb else CLICK_BONUS
    if role == "area" and goal.role != "area":
        evidence -= AREA_MALUS
    score = evidence + features.meaning // 2 + features.words // 2 + features.seen // 5
    return Match(place, frame, node.id, node.bbox, node.text or label, node.type, features, evidence, score)


def meaning(dot: int) -> int:
    """A dot product of int8 vectors as cosine per mille, 0…1000."""
    return max(0, min(FULL, FULL * dot // FULL_SCORE))


def _order(match: Match) -> tuple[int, str, int, int, int, int, str]:
    # Of equal scores the first in reading order comes first; nothing depends on the order of input.
    box = match.box
    return -match.score, match.frame, box.y, box.x, box.h, box.w, match.node


def ranked(matches: Sequence[Match]) -> list[Match]:
    """Best first, ties by frame and place; nodes that show one target (a button and its text) joined into one."""
    kept: list[Match] = []
    on_frame: dict[str, list[int]] = {}
    for match in sorted(matches, key=_order):
        beside = on_frame.setdefault(match.frame, [])
        twin = next((place for place in beside if _same_target(kept[place], match)), None)
        if twin is None:
            beside.append(len(kept))
            kept.append(match)
        else:
            kept[twin] = msgspec.structs.replace(kept[twin], copies=kept[twin].copies + 1)
    return kept


def _same_target(a: Match, b: Match) -> bool:
    """Whether two places of one frame lie on each other and carry the same text."""
    smaller = min(a.box.area, b.box.area)
    if smaller == 0 or 10 * a.box.intersection(b.box).area < 7 * smaller:
        return False
    one, two = folded(a.text), folded(b.text)
    return one == two or not one or not two or one in two or two in one
