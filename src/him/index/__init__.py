"""Find by meaning and by words: what a snapshot's screens show, as rows that can be scored.

`rows` turns scenes into distinct contents and their places; `vector` and `text` score contents against a goal.
They only propose: the answer is decided in `him.query` from the goal and the visible rows alone (design §8).
"""

from him.index.rows import Content, FrameScene, Relations, SnapshotRows, row_text, row_texts

__all__ = ["Content", "FrameScene", "Relations", "SnapshotRows", "row_text", "row_texts"]
