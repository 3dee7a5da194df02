"""Joins an accessibility tree with what pixels show: the tree wins names, roles and states, pixels vouch for it."""

import unicodedata
from collections.abc import Sequence
from typing import Final

from him.perception.parts import Part, Rows, iou, overlap_part
from him.types import Box, TreeNode

_ROLES: Final = {
    "pushbutton": "button",
    "push button": "button",
    "togglebutton": "button",
    "img": "image",
    "graphic": "image",
    "statictext": "text",
    "label": "text",
    "textfield": "textbox",
    "entry": "textbox",
    "check box": "checkbox",
    "radio button": "radio",
    "combo box": "combobox",
    "menu item": "menuitem",
    "page tab": "tab",
}
_SKIPPED: Final = frozenset({"generic", "none", "presentation", "document", "inlinetextbox", "rootwebarea"})
_ALIKE: Final = 0.6
"""Part of a line's letter pairs that a name must have for the line to be that name."""
_COVERED: Final = 0.5
_UNSEEN: Final = 0.6
"""Confidence of a tree node that no pixels vouch for."""
_MARGIN_PX: Final = 3
_WITHIN: Final = 0.8
_SAME_PLACE: Final = 0.6
_ROOM: Final = 16
"""A control is at most this many times as large as the strokes of its icon."""
_FIELDS: Final = frozenset({"textbox", "searchbox", "combobox", "spinbutton", "listbox"})
_PRESSED: Final = frozenset(
    {"button", "link", "tab", "menuitem", "checkbox", "radio", "switch", "image", "menuitemcheckbox", "menuitemradio"}
)


def fused(parts: Sequence[Part], tree: Sequence[TreeNode], picture_size: tuple[int, int]) -> list[Part]:
    """The tree's nodes, each with the pixels that vouch for it, and the parts the tree leaves out.

    Args:
        parts: what pixels show.
        tree: nodes of the accessibility tree.
        picture_size: (height, width) in pixels; nodes off the picture are dropped.
    """
    height, width = picture_size
    whole = Box(0, 0, width, height)
    by_id = {node.id: node for node in tree}
    kept = [node for node in tree if _is_kept(node, by_id, whole)]
    names = {node.id for node in kept}
    rows = Rows([part.box for part in parts])
    part_pairs = [_pairs(part.text) for part in parts]
    said: list[set[str]] = [set() for _ in parts]
    taken: set[int] = set()
    found: list[Part] = []
    for node in kept:
        pairs = _pairs(_spoken(node))
        best, shown = 0.0, ""
        for index in rows.near(node.bbox.intersection(whole)):
            score = _vouches(parts[index], part_pairs[index], node, pairs)
            if score <= 0:
                continue
            said[index] |= pairs
            best = max(best, score)
            if parts[index].type in _FIELDS or not part_pairs[index]:
                taken.add(index)
            if parts[index].type in _FIELDS and role(node) in _FIELDS:
                shown = parts[index].text
        found.append(_part(node, whole, best, shown, _kept_parent(node, by_id, names)))
    for index, mine in enumerate(part_pairs):
        if mine and len(mine & said[index]) >= _ALIKE * len(mine):
            taken.add(index)
    return found + [part for index, part in enumerate(parts) if index not in taken]


def role(node: TreeNode) -> str:
    """A node's role in ARIA words, whichever toolkit named it."""
    name = node.role.lower()
    return _ROLES.get(name, name)


def _part(node: TreeNode, whole: Box, best: float, shown: str, parent: str | None) -> Part:
    """A tree node as a part; what a field shows beside its name (a value, a placeholder) goes into its state."""
    state = dict(node.state)
    if shown and "value" not in state and _plain(shown) != _plain(node.name):
        state["shown"] = shown
    return Part(
        role(node),
        node.name,
        node.bbox.intersection(whole),
        round(0.9 + 0.1 * min(best, 1.0), 4) if best > 0 else _UNSEEN,
        "fused" if best > 0 else "tree",
        tuple(sorted(state.items())),
        node.id,
        parent,
    )


def _is_kept(node: TreeNode, by_id: dict[str, TreeNode], whole: Box) -> bool:
    """Whether a node is on the picture and says something its parent does not say already."""
    if not node.bbox.intersection(whole).area or node.role.lower() in _SKIPPED:
        return False
    parent = by_id.get(node.parent) if node.parent is not None else None
    if node.role.lower() in ("text", "statictext") and parent is not None:
        return not (_plain(parent.name) == _plain(node.name) and parent.role.lower() not in _SKIPPED)
    return True


def _kept_parent(node: TreeNode, by_id: dict[str, TreeNode], names: set[str]) -> str | None:
    """The nearest ancestor that became a part; a parent loop ends at its first repetition."""
    seen: set[str] = {node.id}
    parent = node.parent
    while parent is not None and parent not in seen:
        if parent in names:
            return parent
        seen.add(parent)
        above = by_id.get(parent)
        parent = above.parent if above is not None else None
    return None


def _vouches(part: Part, mine: set[str], node: TreeNode, pairs: set[str]) -> float:
    """How well a part seen in pixels confirms a tree node, 0…1; 0 when it does not.

    A part confirms a node that says what it shows, around it (a line of a paragraph) or within it (a word of a
    line); a field confirms the field in its place whatever it shows; strokes confirm the small control around them.
    """
    kind = role(node)
    alone = iou(part.box, node.bbox)
    if part.type in _FIELDS and kind in _FIELDS:
        return alone if alone >= _SAME_PLACE else 0.0
    if mine:
        if overlap_part(part.box, node.bbox.grown(_MARGIN_PX)) >= _COVERED:
            alike = len(mine & pairs) / len(mine)
            return alike if alike >= _ALIKE else 0.0
        if pairs and overlap_part(node.bbox, part.box) >= _WITHIN:
            alike = len(mine & pairs) / len(pairs)
            return alike if alike >= _WITHIN else 0.0
        return 0.0
    if part.type == "panel":
        return alone if alone >= _SAME_PLACE else 0.0
    around = overlap_part(part.box, node.bbox.grown(_MARGIN_PX)) >= 0.9
    if kind in _PRESSED and around and node.bbox.area <= _ROOM * part.box.area:
        return max(alone, 0.5)
    return alone if alone >= 0.4 else 0.0


def _spoken(node: TreeNode) -> str:
    """All a node may show as text."""
    value = node.state.get("value")
    return f"{node.name} {value}" if isinstance(value, str) else node.name


def _plain(text: str) -> str:
    """Text without case, blanks and marks, as OCR and names differ in them."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def _pairs(text: str) -> set[str]:
    """The letter pairs of a text; a single letter is its own pair."""
    plain = _plain(text)
    return {plain[i : i + 2] for i in range(len(plain) - 1)} if len(plain) > 1 else {plain} - {""}
