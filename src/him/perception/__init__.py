"""What a screen shows, read once when it is stored: text, widgets and the scene graph they make.

    seen = see(picture, reader, memo, tree=parse_tree(data))
    seen.scene.nodes[0].text, seen.counts.tiles_detected

Reading text costs seconds and is remembered by content; all else is pure rules over rectangles that take
milliseconds. The scene is a pure function of the picture, the tree, the reader's pin and this room's rules.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.perception.ocr import Counts, checked, read
from him.perception.scene import build
from him.perception.tree import parse_tree
from him.perception.widgets import find
from him.ports import Memo, Progress, TextReader
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
    known = {"reader": reader.pin(), **_code()}
    if tree is not None:
        known["tree"] = blake3(msgspec.json.encode(list(tree), order="sorted")).hexdigest()
    return known


@cache
def _code() -> dict[str, str]:
    """Digests of this room's own text: a scene names the rules that made it, and nobody has to raise a number."""
    folder = Path(__file__).parent
    digests = {"widgets": blake3(), "rules": blake3()}
    for path in sorted(folder.glob("*.py")):
        text = path.read_bytes()
        digest = digests["widgets" if path.stem == "widgets" else "rules"]
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return {name: digest.hexdigest() for name, digest in digests.items()}


__all__ = ["Counts", "Progress", "Seen", "parse_tree", "pins", "see"]
