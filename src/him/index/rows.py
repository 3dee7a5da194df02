"""Rows and places: distinct element contents of a snapshot's scenes, and where each occurs (design §8)."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Final, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import EMBEDDING_DIMS
from him.errors import IntegrityError, UsageError
from him.index.roles import role_word
from him.index.text import GramIndex, WordIndex
from him.types import Box, Node, Scene

ROW_TEXT_CHARS_MAX: Final = 400
"""Characters of an element's text that are embedded; the encoder reads 128 tokens anyway."""


class FrameScene(NamedTuple):
    """A frame's scene with the vectors of its nodes: `embeddings` is (n_nodes, EMBEDDING_DIMS) int8."""

    frame: str
    scene: Scene
    embeddings: NDArray[np.int8]


class Content(NamedTuple):
    """What makes a row distinct: an element's type, its text, and the text of what labels it."""

    type: str
    text: str
    label: str


def labels(scene: Scene) -> dict[str, str]:
    """Node id → text of the nodes that label it, in edge order joined by a space."""
    text = {node.id: node.text for node in scene.nodes}
    out: dict[str, str] = {}
    for edge in scene.edges:
        if edge.rel == "labels" and text.get(edge.source):
            known = out.get(edge.target)
            out[edge.target] = f"{known} {text[edge.source]}" if known else text[edge.source]
    return out


def _joined(node: Node, label: str) -> str:
    own = node.text[:ROW_TEXT_CHARS_MAX]
    parts = [own, "" if label == node.text else label[:ROW_TEXT_CHARS_MAX], role_word(node.type)]
    return ", ".join(part for part in parts if part)


def row_text(node: Node, scene: Scene) -> str:
    """What is embedded for a node: its text, the text that labels it, the word for its role."""
    return _joined(node, labels(scene).get(node.id, ""))


def row_texts(scene: Scene) -> list[str]:
    """`row_text` of every node, in node order, in one pass over the edges."""
    known = labels(scene)
    return [_joined(node, known.get(node.id, "")) for node in scene.nodes]


class Relations:
    """What one scene's edges say: which node lies in which, and what labels what."""

    def __init__(self, scene: Scene) -> None:
        self._nodes = {node.id: node for node in scene.nodes}
        self._parents = {edge.target: edge.source for edge in scene.edges if edge.rel == "contains"}
        self._labels: dict[str, tuple[str, ...]] = {}
        for edge in scene.edges:
            if edge.rel == "labels":
                self._labels[edge.target] = (*self._labels.get(edge.target, ()), edge.source)
        self.with_tree: bool = any(node.source in ("tree", "fused") for node in scene.nodes)

    def parent(self, node: str) -> Node | None:
        """What contains a node, or None."""
        return self._nodes.get(self._parents.get(node, ""))

    def labels(self, node: str) -> tuple[str, ...]:
        """Ids of the nodes that label a node."""
        return self._labels.get(node, ())


class SnapshotRows:
    """The visible rows of a snapshot (or of one of its frames) and the places where they occur.

    Rows are ordered by content, occurrences by (frame, node), so that equal scenes give equal rows in whatever
    order they come. Build with `of`; keep it as long as the directory it was read from does not change.

    Attributes:
        frames: the scenes, sorted by frame name.
        contents: one entry a row.
        vectors: (n_rows, EMBEDDING_DIMS) int8.
        row: (n_occurrences,) int32, the row of each occurrence.
        frame: (n_occurrences,) int32, index into `frames`.
        node: (n_occurrences,) int32, index into the scene's nodes.
        boxes: (n_occurrences, 4) int64 of x, y, w, h.
        first: (n_rows + 1,) int64; occurrences of row r are `by_row[first[r]:first[r + 1]]`.
        by_row: (n_occurrences,) int64, occurrence numbers grouped by row.
    """

    def __init__(self, frames: tuple[FrameScene, ...]) -> None:
        """Use `of`: this expects sorted, checked frames."""
        self.frames = frames
        self._relations: dict[int, Relations] = {}
        keys: dict[tuple[Content, bytes], int] = {}
        row: list[int] = []
        frame: list[int] = []
        node: list[int] = []
        for number, seen in enumerate(frames):
            known = labels(seen.scene)
            for index, one in enumerate(seen.scene.nodes):
                # The vector is part of the key: a frame embedded under another pin must not lend its vector.
                key = Content(one.type, one.text, known.get(one.id, "")), seen.embeddings[index].tobytes()
                row.append(keys.setdefault(key, len(keys)))
                frame.append(number)
                node.append(index)
        ordered = sorted(keys)
        place = np.empty(len(keys), dtype=np.int32)
        place[[keys[key] for key in ordered]] = np.arange(len(keys), dtype=np.int32)
        self.contents: tuple[Content, ...] = tuple(content for content, _ in ordered)
        vectors = b"".join(vector for _, vector in ordered)
        self.vectors: NDArray[np.int8] = np.frombuffer(vectors, dtype=np.int8).reshape(-1, EMBEDDING_DIMS)
        self.row: NDArray[np.int32] = place[np.array(row, dtype=np.int64)] if row else place
        self.frame: NDArray[np.int32] = np.array(frame, dtype=np.int32)
        self.node: NDArray[np.int32] = np.array(node, dtype=np.int32)
        boxes = [one.bbox for seen in frames for one in seen.scene.nodes]
        self.boxes: NDArray[np.int64] = np.array(boxes, dtype=np.int64).reshape(-1, 4)
        self.by_row: NDArray[np.int64] = np.argsort(self.row, kind="stable").astype(np.int64)
        self.first: NDArray[np.int64] = np.searchsorted(
            self.row[self.by_row], np.arange(len(self.contents) + 1)
        ).astype(np.int64)

    @classmethod
    def of(cls, scenes: Sequence[FrameScene]) -> "SnapshotRows":
        """Rows of `scenes`, which may come in any order.

        Raises:
            UsageError: two scenes of one frame.
            IntegrityError: a frame's vectors do not fit its nodes.
        """
        frames = tuple(sorted(scenes, key=lambda seen: seen.frame))
        for before, after in pairwise(frames):
            if before.frame == after.frame:
                raise UsageError(f"two scenes of frame {after.frame!r}")
        for seen in frames:
            want = (len(seen.scene.nodes), EMBEDDING_DIMS)
            if seen.embeddings.shape != want or seen.embeddings.dtype != np.int8:
                raise IntegrityError(
                    f"vectors do not fit the scene: {seen.embeddings.dtype}{seen.embeddings.shape}, want int8{want}",
                    object=f"emb:{seen.frame}",
                    fix="ingest the frame again",
                )
        rows = cls(frames)
        # Built now and not within the first query's budget: rows exist to be queried.
        _ = rows.digest, rows.words, rows.grams
        return rows

    def __len__(self) -> int:
        return len(self.contents)

    def occurrences(self, row: int) -> NDArray[np.int64]:
        """Occurrence numbers of a row, by (frame, node)."""
        return self.by_row[self.first[row] : self.first[row + 1]]

    def place(self, occurrence: int) -> tuple[str, Node]:
        """(frame name, node) of an occurrence."""
        seen = self.frames[int(self.frame[occurrence])]
        return seen.frame, seen.scene.nodes[int(self.node[occurrence])]

    def relations(self, frame: int) -> Relations:
        """The edges of a frame (index into `frames`); built on first use."""
        if frame not in self._relations:
            self._relations[frame] = Relations(self.frames[frame].scene)
        return self._relations[frame]

    def box(self, occurrence: int) -> Box:
        """Where an occurrence lies, in level-0 pixels of its frame."""
        return Box(*(int(value) for value in self.boxes[occurrence]))

    @cached_property
    def digest(self) -> str:
        """Hex BLAKE3 of all scenes and vectors: what every answer from these rows is a function of."""
        digest = blake3()
        for seen in self.frames:
            for part in (seen.frame.encode(), msgspec.json.encode(seen.scene), seen.embeddings.tobytes()):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.hexdigest()

    @cached_property
    def words(self) -> WordIndex:
        """BM25 over the rows' texts and labels."""
        return WordIndex([f"{content.text} {content.label}" for content in self.contents])

    @cached_property
    def grams(self) -> GramIndex:
        """Character trigrams of the rows' texts and labels."""
        return GramIndex([(content.text, content.label) for content in self.contents])
