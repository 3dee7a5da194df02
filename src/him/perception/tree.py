"""Reads an accessibility tree handed in beside a picture, and says clearly what is wrong with a bad one."""

from typing import Any, cast

import msgspec

from him.config import TREE_BYTES_MAX, TREE_NODES_MAX
from him.errors import LimitError, UsageError
from him.types import Box, TreeNode

_FORM = 'a tree is a JSON list of {"id", "parent", "role", "name", "bbox": [x, y, w, h], "state": {…}}'
_COORDINATE_MAX = 1 << 24


def parse_tree(data: bytes) -> tuple[TreeNode, ...]:
    """Nodes of an accessibility tree from its JSON form `[{id, parent, role, name, bbox, state}]`.

    `id`, `role` and `bbox` are required; other keys are ignored; bbox values are rounded to whole pixels.

    Raises:
        LimitError: more bytes or nodes than `him.config` allows.
        UsageError: anything else that is not such a list; the message names the node.
    """
    if len(data) > TREE_BYTES_MAX:
        raise LimitError(f"an accessibility tree has at most {TREE_BYTES_MAX} bytes, this one has {len(data)}")
    try:
        raw: object = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"the accessibility tree is not JSON: {error}", fix=_FORM) from error
    if not isinstance(raw, list):
        raise UsageError(f"the accessibility tree is a {type(raw).__name__}, not a list", fix=_FORM)
    items = cast("list[object]", raw)
    if len(items) > TREE_NODES_MAX:
        raise LimitError(f"an accessibility tree has at most {TREE_NODES_MAX} nodes, this one has {len(items)}")
    nodes = tuple(_node(item, index) for index, item in enumerate(items))
    known: set[str] = set()
    for index, node in enumerate(nodes):
        if node.id in known:
            raise _wrong(index, f"its id {node.id!r} is given twice")
        known.add(node.id)
    for index, node in enumerate(nodes):
        if node.parent is not None and node.parent not in known:
            raise _wrong(index, f"its parent {node.parent!r} is not in the tree")
    return nodes


def _node(item: object, index: int) -> TreeNode:
    """One node, checked."""
    if not isinstance(item, dict):
        raise _wrong(index, f"it is a {type(item).__name__}, not an object")
    fields = cast("dict[str, Any]", item)
    parent = fields.get("parent")
    return TreeNode(
        id=_text(fields, "id", index, required=True),
        role=_text(fields, "role", index, required=True),
        bbox=_box(fields.get("bbox"), index),
        name=_text(fields, "name", index, required=False),
        parent=None if parent is None else _text(fields, "parent", index, required=True),
        state=_state(fields.get("state"), index),
    )


def _text(fields: dict[str, Any], key: str, index: int, *, required: bool) -> str:
    """A string field; ids may be whole numbers."""
    value: object = fields.get(key)
    if key in ("id", "parent") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None and not required:
        return ""
    if not isinstance(value, str) or (required and not value):
        raise _wrong(index, f"its {key} is {_shown(value)}, not a text")
    return value


def _box(value: object, index: int) -> Box:
    """A box of four finite numbers, width and height not negative."""
    if not isinstance(value, list):
        raise _wrong(index, f"its bbox is {_shown(value)}, not [x, y, w, h]")
    numbers = cast("list[object]", value)
    sides = [round(n) for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and _fits(n)]
    if len(numbers) != 4 or len(sides) != 4 or sides[2] < 0 or sides[3] < 0:
        raise _wrong(index, f"its bbox is {_shown(numbers)}, not [x, y, w, h] with w, h ≥ 0")
    return Box(*sides)


def _fits(number: float) -> bool:
    """Whether a coordinate is finite and within what pictures can have."""
    return -_COORDINATE_MAX <= number <= _COORDINATE_MAX


def _state(value: object, index: int) -> dict[str, str | bool | int | float | None]:
    """State flags; only flat values."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(index, f"its state is {_shown(value)}, not an object")
    state: dict[str, str | bool | int | float | None] = {}
    for key, item in cast("dict[str, object]", value).items():
        if not (item is None or isinstance(item, str | bool | int | float)):
            raise _wrong(index, f"its state {key!r} is {_shown(item)}, not a flat value")
        state[key] = round(item, 4) if isinstance(item, float) else item
    return state


def _shown(value: object) -> str:
    """A value, short enough for an error line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _wrong(index: int, message: str) -> UsageError:
    """The error for one node of the list."""
    return UsageError(f"node {index} of the accessibility tree: {message}", fix=_FORM)
