"""What a screen shows, read once when it is stored: text, widgets and the scene graph they make.

    seen = see(picture, reader, memo, tree=parse_tree(data))
    seen.scene.nodes[0].text, seen.counts.tiles_detected

Reading text costs seconds and is remembered by content; all else is pure rules over rectangles that take
milliseconds. The scene is a pure function of the picture, the tree, the reader's pin and this room's rules.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.perception.ocr import Counts, Progress, checked, read
from him.perception.scene import RULES, build
from him.perception.tree import parse_tree
from him.perception.widgets import RULES as WIDGET_RULES
from him.perception.widgets import find
from him.ports import Memo, TextReader
from him.types import Scene, TreeNode


class Seen(msgspec.Struct, frozen=True):
    """A picture's scene (its `tiles` are filled by the caller, who knows their blob_ids) and what reading it cost."""

    scene: Scene
    counts: Counts


def see(
    picture: NDArray[np.uint8],
    reader: TextReader,
    memo: Memo,
    tree: Sequence[TreeNode] | None = None,
    progress: Progress | None = None,
) -> Seen:
    """Read a picture into a scene.

    Args:
        picture: (h, w, 3) uint8 RGB, any size.
        reader: finds and reads text.
        memo: remembers detection per tile and recognition per line by content; changes time, never the result.
        tree: the accessibility tree taken with the picture, boxes in its pixels.
        progress: called with (done, total, what) where what is "detect" (tiles) or "recognise" (lines).

    Returns:
        The scene with nodes in reading order, edges, and pins `reader`, `widgets`, `rules` and (with a tree) `tree`.

    Raises:
        UsageError: the picture is not (h, w, 3) uint8.
    """
    widgets = find(checked(picture))
    reading = read(picture, reader, memo, progress, widgets)
    size = (picture.shape[0], picture.shape[1])
    return Seen(build(size, reading.lines, widgets, tree, pins(reader, tree)), reading.counts)


def pins(reader: TextReader, tree: Sequence[TreeNode] | None = None) -> dict[str, str]:
    """What decides how a picture would be read now: hex digests of the reader, the rules and the tree."""
    known = {"reader": reader.pin(), "widgets": WIDGET_RULES, "rules": RULES}
    if tree is not None:
        known["tree"] = blake3(msgspec.json.encode(list(tree), order="sorted")).hexdigest()
    return known


__all__ = ["Counts", "Progress", "Seen", "parse_tree", "pins", "see"]
