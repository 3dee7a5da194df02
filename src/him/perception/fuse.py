"""Joins an accessibility tree with what pixels show: the tree wins names, roles and states, pixels vouch for it."""

from collections.abc import Sequence
from typing import Final
import unicodedata

from him.perception.parts import Part, iou, overlap_part
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
    pairs = {node.id: _pairs(_spoken(node)) for node in kept}
    taken: set[int] = set()
    found: list[Part] = []
    for node in kept:
        best = 0.0
        for index, part in enumerate(parts):
            score = _vouches(part, node, pairs[node.id])
            if score > 0 and (part.type != "panel" or score > 0.8):
                taken.add(index)
                best = max(best, score)
        seen = best > 0
        found.append(
            Part(
                _ROLES.get(node.role.lower(), node.role.lower()),
                node.name,
                node.bbox.intersection(whole),
                round(0.9 + 0.1 * best, 4) if seen else _UNSEEN,
                "fused" if seen else "tree",
                tuple(sorted(node.state.items())),
                node.id,
                _kept_parent(node, by_id, names),
            )
        )
    return found + [part for index, part in enumerate(parts) if index not in taken]


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


def _vouches(part: Part, node: TreeNode, pairs: set[str]) -> float:
    """How well a part seen in pixels confirms a tree node, 0…1; 0 when it does not."""
    if overlap_part(part.box, node.bbox.grown(_MARGIN_PX)) < _COVERED:
        return 0.0
    if part.text:
        mine = _pairs(part.text)
        alike = len(mine & pairs) / len(mine) if mine else 0.0
        return alike if alike >= _ALIKE else 0.0
    return iou(part.box, node.bbox) if iou(part.box, node.bbox) >= 0.4 else 0.0


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
