"""Rows, vectors and words: what they hold, and that nothing but the scenes decides it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from him.adapters.minilm import MiniLmEncoder, model_file, tokenizer_file
from him.config import EMBEDDING_DIMS
from him.errors import IntegrityError, UsageError
from him.index import FrameScene, SnapshotRows, row_text, row_texts
from him.index.roles import role_of, role_word
from him.index.text import GramIndex, WordIndex, folded, grams, plain, words
from him.index.vector import scan, top
from him.types import Box, Edge, Node, Scene


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-60, 60, EMBEDDING_DIMS).astype(np.int8)


def scene_of(texts: list[tuple[str, str]], edges: tuple[Edge, ...] = ()) -> Scene:
    nodes = tuple(Node(f"n{i}", kind, text, Box(10 * i, 20 * i, 80, 20)) for i, (kind, text) in enumerate(texts))
    return Scene(1, 1920, 1080, nodes, edges, 1.0)


def frame_of(name: str, texts: list[tuple[str, str]], edges: tuple[Edge, ...] = ()) -> FrameScene:
    scene = scene_of(texts, edges)
    seeds = [sum(text.encode()) for text in row_texts(scene)]
    return FrameScene(name, scene, np.array([vector(s) for s in seeds], dtype=np.int8).reshape(-1, EMBEDDING_DIMS))


def test_row_text_names_text_label_and_role() -> None:
    scene = scene_of([("text", "Email"), ("textbox", ""), ("button", "Save")], (Edge("n0", "n1", "labels"),))
    assert row_text(scene.nodes[1], scene) == "Email, text field"
    assert row_texts(scene) == ["Email", "Email, text field", "Save, button"]


def test_a_label_equal_to_the_text_is_said_once() -> None:
    scene = scene_of([("text", "Email"), ("textbox", "Email")], (Edge("n0", "n1", "labels"),))
    assert row_text(scene.nodes[1], scene) == "Email, text field"


def test_equal_contents_share_a_row_and_keep_their_places() -> None:
    rows = SnapshotRows.of([frame_of("b", [("link", "Edit"), ("link", "Edit")]), frame_of("a", [("link", "Edit")])])
    assert len(rows) == 1
    assert [rows.place(i)[0] for i in rows.occurrences(0)] == ["a", "b", "b"]
    assert rows.box(2) == Box(10, 20, 80, 20)


def test_another_type_or_label_or_vector_is_another_row() -> None:
    plain_frame = frame_of("a", [("link", "Edit"), ("button", "Edit"), ("text", "Edit")])
    other = frame_of("b", [("link", "Edit")])
    other.embeddings[0, 0] += 1
    assert len(SnapshotRows.of([plain_frame, other])) == 4


def test_rows_do_not_depend_on_the_order_of_frames() -> None:
    frames = [frame_of(name, [("link", f"{name} {i}") for i in range(5)]) for name in "dacb"]
    one, two = SnapshotRows.of(frames), SnapshotRows.of(frames[::-1])
    assert one.contents == two.contents
    assert one.digest == two.digest
    assert one.vectors.tobytes() == two.vectors.tobytes()
    assert (one.row == two.row).all()


def test_no_frames_and_empty_frames_give_no_rows() -> None:
    assert len(SnapshotRows.of([])) == 0
    rows = SnapshotRows.of([frame_of("a", [])])
    assert len(rows) == 0
    assert rows.words.scores("x").shape == (0,)
    assert rows.grams.scores("x").shape == (0,)
    assert scan(rows.vectors, vector(1)).shape == (0,)


def test_vectors_that_do_not_fit_are_refused_by_name() -> None:
    bad = frame_of("login", [("link", "Edit")])._replace(embeddings=np.zeros((2, EMBEDDING_DIMS), np.int8))
    with pytest.raises(IntegrityError) as error:
        SnapshotRows.of([bad])
    assert "login" in error.value.object


def test_a_frame_twice_is_refused() -> None:
    with pytest.raises(UsageError):
        SnapshotRows.of([frame_of("a", []), frame_of("a", [])])


def test_scan_is_exact_at_the_largest_values() -> None:
    rows = np.full((5000, EMBEDDING_DIMS), 127, dtype=np.int8)
    rows[1] = -127
    rows[2, 0] = 126
    scores = scan(rows, np.full(EMBEDDING_DIMS, 127, dtype=np.int8))
    assert scores[0] == EMBEDDING_DIMS * 127 * 127
    assert scores[1] == -EMBEDDING_DIMS * 127 * 127
    assert scores[2] == scores[0] - 127


@given(st.integers(0, 1000), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_scan_equals_integer_arithmetic(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(-127, 128, (count, EMBEDDING_DIMS)).astype(np.int8)
    query = rng.integers(-127, 128, EMBEDDING_DIMS).astype(np.int8)
    assert (scan(rows, query) == rows.astype(np.int64) @ query.astype(np.int64)).all()


@given(st.lists(st.integers(-5, 20), max_size=60), st.integers(1, 12))
def test_top_is_the_sorted_head_of_positive_scores(scores: list[int], count: int) -> None:
    want = sorted(((i, s) for i, s in enumerate(scores) if s > 0), key=lambda p: (-p[1], p[0]))[:count]
    assert top(np.array(scores, dtype=np.int64), count) == want


def test_plain_is_idempotent_for_hard_unicode() -> None:
    for text in ("ﬁle İstanbul ẞ", "Ａ１", "ϓ", "e\u0301", "\u00a0x "):
        assert plain(plain(text)) == plain(text)


def test_words_and_folding() -> None:
    assert words("Save-As… «Ünïcode» 2×") == ["save", "as", "ünïcode", "2"]
    assert folded("Sett1ngs") == folded("SettIngs") == folded("settings")
    assert folded("O0o") == "ooo"
    assert grams("") == set()
    assert len(grams("x")) == 1


def test_bm25_prefers_rare_words_and_short_texts() -> None:
    index = WordIndex(["save file", "save", "save all the open files now", "close"])
    scores = index.scores("save")
    assert scores.argmax() == 1
    assert scores[3] == 0
    assert index.scores("close")[3] > scores[1]
    assert scores.dtype == np.int64


def test_bm25_coverage_is_the_weighted_share_of_words() -> None:
    index = WordIndex(["save file", "save"])
    assert index.coverage("save file").tolist()[0] == 1_000_000
    assert 0 < index.coverage("save file").tolist()[1] < 500_000
    assert index.coverage("…").tolist() == [0, 0]


def test_letters_find_misread_and_contained_texts() -> None:
    index = GramIndex([("Submit", ""), ("Subrnit", ""), ("Cancel", ""), ("", "Submit order")])
    scores = index.scores("Submit")
    assert scores[0] > scores[1] > scores[2]
    assert scores[3] > scores[2]


def test_types_of_trees_and_widgets_mean_the_same_roles() -> None:
    assert role_of("push button") == role_of("Button") == "button"
    assert role_of("searchbox") == role_of("field") == "field"
    assert role_of("flux capacitor") == ""
    assert role_word("textbox") == "text field"
    assert role_word("panel") == ""


@pytest.fixture(scope="module")
def encoder() -> MiniLmEncoder:
    return MiniLmEncoder()


def test_a_text_has_the_same_bits_alone_and_in_a_batch(encoder: MiniLmEncoder) -> None:
    texts = ["Submit, button", "x", "", "Search repositories and packages by their name", "日本語", "é" * 3000]
    batch = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    assert batch.dtype == np.int8
    assert batch.tobytes() == alone.tobytes()


def test_meaning_is_near_for_synonyms(encoder: MiniLmEncoder) -> None:
    log_in, sign_in, delete = encoder.encode(["log in button", "sign in, button", "delete, button"]).astype(int)
    assert log_in @ sign_in > log_in @ delete


def test_no_texts_give_no_vectors(encoder: MiniLmEncoder) -> None:
    assert encoder.encode([]).shape == (0, EMBEDDING_DIMS)


def test_the_pin_is_stable_and_needs_no_model_run(encoder: MiniLmEncoder) -> None:
    assert MiniLmEncoder().pin() == encoder.pin()
    assert len(bytes.fromhex(encoder.pin())) == 32


def test_an_altered_model_is_refused_by_name(tmp_path: Path) -> None:
    data = bytearray(model_file().read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(IntegrityError) as error:
        MiniLmEncoder(model=tmp_path / "model.onnx").encode(["x"])
    assert "model.onnx" in error.value.line()


def test_an_altered_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(tokenizer_file().read_bytes() + b" ")
    with pytest.raises(IntegrityError) as error:
        MiniLmEncoder(tokenizer=tmp_path / "t.json").pin()
    assert "t.json" in error.value.line()
