"""The read path on hand-made scenes: what is answered, what is refused, and that replays give equal bytes."""

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from him.config import EMBEDDING_DIMS, GOAL_CHARS_MAX
from him.errors import IntegrityError, LimitError, NotFoundError, UsageError
from him.index import FrameScene, SnapshotRows, row_texts
from him.query import Answer, answer, fetch, fuse, locate, parse, plan
from him.query.calibrate import decoded, shipped
from him.query.likeness import EXACT, similarity
from him.query.plan import Cell, Grid, coarse_cells, tiles_to_read
from him.query.run import P95_MS
from him.query.score import role_fit
from him.types import BlobId, Box, Edge, Entry, Node, Scene, TileKey

BLOB = b"\xaa" * 32
SNAPSHOT = "snp_00000000000000000000000000"


class HashEncoder:
    """Texts with common words get near vectors; no model needed."""

    def pin(self) -> str:
        return "hash"

    def encode(self, texts: Sequence[str]) -> NDArray[np.int8]:
        out = np.zeros((len(texts), EMBEDDING_DIMS), dtype=np.int8)
        for row, text in enumerate(texts):
            total = np.zeros(EMBEDDING_DIMS)
            for word in text.casefold().replace(",", " ").split():
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
                total += np.random.default_rng(seed).standard_normal(EMBEDDING_DIMS)
            length = float(np.sqrt((total * total).sum())) or 1.0
            out[row] = np.rint(total / length * 127).astype(np.int8)
        return out


class Source:
    """A snapshot in memory; `changed` tiles hold other content than their scene was read from."""

    def __init__(self, frames: Sequence[FrameScene]) -> None:
        self.frames = list(frames)
        self.changed: set[tuple[str, int, int]] = set()
        self.damaged: set[tuple[str, int, int]] = set()
        self.tiles_read: list[TileKey] = []

    def rows(self, frame: str | None) -> SnapshotRows:
        found = [one for one in self.frames if frame in (None, one.frame)]
        if frame is not None and not found:
            raise NotFoundError(f"no frame {frame!r}")
        return SnapshotRows.of(found)

    def entry(self, key: TileKey) -> Entry | None:
        changed = (key.frame, key.y, key.x) in self.changed
        return Entry(BlobId(b"\xbb" * 32 if changed else BLOB), bytes(16))

    def tile_id(self, key: TileKey) -> bytes:
        return hashlib.sha256(str(key).encode()).digest()

    def tile(self, key: TileKey) -> NDArray[np.uint8]:
        if (key.frame, key.y, key.x) in self.damaged:
            raise IntegrityError("damaged", object=str(key))
        self.tiles_read.append(key)
        scene = next(one.scene for one in self.frames if one.frame == key.frame)
        shape = min(512, scene.height - 512 * key.y), min(512, scene.width - 512 * key.x), 3
        return np.full(shape, 10 * key.y + key.x, dtype=np.uint8)


class Tape:
    """A recorder that keeps everything, and plays effects back when given a tape."""

    def __init__(self, played: "Tape | None" = None) -> None:
        self.effects: list[tuple[str, bytes]] = []
        self.steps: list[tuple[str, bytes, bytes]] = []
        self._played = list(played.effects) if played else None

    def effect(self, name: str, make: Callable[[], bytes]) -> bytes:
        if self._played is not None:
            known, value = self._played.pop(0)
            assert known == name
        else:
            value = make()
        self.effects.append((name, value))
        return value

    def step(self, name: str, inputs: bytes, output: bytes) -> None:
        self.steps.append((name, inputs, output))


class Ticks:
    """A clock that advances a fixed time at each reading."""

    def __init__(self, step_ms: float = 0.5) -> None:
        self.at = 1_000_000
        self.step = int(step_ms * 1_000_000)

    def now_ns(self) -> int:
        return self.at

    def monotonic_ns(self) -> int:
        self.at += self.step
        return self.at


Element = tuple[str, str, tuple[int, int, int, int]]


def frame_of(
    name: str,
    elements: Sequence[Element],
    edges: Sequence[Edge] = (),
    *,
    size: tuple[int, int] = (1080, 1920),
    source: str = "fused",
) -> FrameScene:
    height, width = size
    nodes = tuple(
        Node(f"n{i}", kind, text, Box(*box), {}, 0.98, source) for i, (kind, text, box) in enumerate(elements)
    )
    grid = Grid(height, width)
    tiles = tuple((y, x, BLOB.hex()) for y in range(grid.rows) for x in range(grid.columns))
    scene = Scene(1, width, height, nodes, tuple(edges), 1.0, tiles)
    return FrameScene(name, scene, HashEncoder().encode(row_texts(scene)))


def login() -> FrameScene:
    elements: list[Element] = [
        ("heading", "Sign in to Acme", (700, 100, 300, 40)),
        ("text", "Email address", (700, 200, 120, 20)),
        ("textbox", "", (700, 230, 400, 40)),
        ("text", "Password", (700, 300, 90, 20)),
        ("textbox", "", (700, 330, 400, 40)),
        ("button", "Sign in", (700, 420, 120, 40)),
        ("link", "Forgot password?", (900, 430, 150, 20)),
    ]
    return frame_of("login", elements, [Edge("n1", "n2", "labels"), Edge("n3", "n4", "labels")])


def users() -> FrameScene:
    elements: list[Element] = [("heading", "Users", (40, 40, 100, 30))]
    for row, name in enumerate(("Ada", "Bob", "Cleo")):
        y = 200 + 60 * row
        elements += [
            ("cell", name, (40, y, 100, 30)),
            ("link", "Edit", (900, y, 50, 30)),
            ("button", "Delete", (1000, y, 70, 30)),
        ]
    return frame_of("users", elements)


def ask(
    goal: str,
    frames: Sequence[FrameScene] | Source,
    *,
    frame: str | None = None,
    budget_ms: int = 150,
    tape: Tape | None = None,
    clock: Ticks | None = None,
) -> Answer:
    source = frames if isinstance(frames, Source) else Source(frames)
    return answer(
        goal,
        source,
        tape or Tape(),
        clock or Ticks(),
        HashEncoder(),
        frame=frame,
        budget_ms=budget_ms,
        snapshot_id=SNAPSHOT,
        directory="d" * 64,
        trace_id="tr_1",
    )


def content(given: Answer) -> bytes:
    """The answer without times and ids, as bytes."""
    whole = given.as_json()
    for key in ("stages_ms", "elapsed_ms", "startup_ms", "trace_id"):
        del whole[key]
    return json.dumps(whole).encode()


# Goals


@pytest.mark.parametrize(
    ("goal", "verb", "role", "text"),
    [
        ("find button 'Submit'", "find", "button", "Submit"),
        ("click the Sign in link", "click", "link", "Sign in"),
        ("where is the search box?", "find", "field", "search"),
        ("field labelled 'Email address'", "", "field", "Email address"),
        ('the input with placeholder "Search…"', "", "field", "Search…"),
        ("open the menu item Preferences", "click", "menuitem", "Preferences"),
        ("press 'Don't save'", "click", "", "Don't save"),
        ("find the checkbox", "find", "checkbox", ""),
        ("Open", "click", "", "Open"),
        ("link to documentation", "", "link", "documentation"),
        ("find “Speichern”", "find", "", "Speichern"),
        ("locate «Enregistrer» button", "find", "button", "Enregistrer"),
        ("find ‘Don’t ask’", "find", "", "Don’t ask"),
        ("find 'Dark mode' radio button", "find", "radio", "Dark mode"),
        ("select 'Berlin' in the dropdown 'City'", "click", "", "Berlin"),
        ("type into 'Name'", "type", "field", "Name"),
        ("find button Save & close", "find", "button", "Save & close"),
        ("the Submit button on the login form", "", "button", "Submit"),
        ("日本語", "", "", "日本語"),
    ],
)
def test_goals_are_understood(goal: str, verb: str, role: str, text: str) -> None:
    got = parse(goal)
    assert (got.verb, got.role, got.text) == (verb, role, text)


def test_unquoted_words_may_all_belong_to_the_text() -> None:
    assert "Show password" in parse("Show password").variants
    assert "search box" in parse("find the search box").variants


@pytest.mark.parametrize(
    ("goal", "text", "context"),
    [
        ("open Layout Options in the side menu", "Layout Options", "side menu"),
        ("where is Beverly Armstrong in the table", "Beverly Armstrong", "table"),
        ("Next page of the table", "Next", "table"),
        ("the Edit link in the Users table of the Admin panel", "Edit", "Users table"),
        *[
            (f"go to Billing in the {where}", "Billing", where)
            for where in ("toolbar", "sidebar", "footer", "header", "dialog", "list", "form", "navigation", "menu")
        ],
        ("find Billing under the panel", "Billing", "panel"),
        ("find Billing on the page", "Billing", ""),
        ("find Billing on the screen", "Billing", ""),
        ("find Sign in on the login form", "Sign in", "login form"),
    ],
)
def test_surroundings_of_an_unquoted_target_are_its_context(goal: str, text: str, context: str) -> None:
    got = parse(goal)
    assert (got.text, got.context) == (text, context)


@pytest.mark.parametrize(
    "text", ["Sign in", "Terms of service", "Log in to continue", "Lord of the Rings", "Back to the list", "Log on"]
)
def test_a_target_with_a_preposition_of_its_own_stays_whole(text: str) -> None:
    for goal in (text, f"find {text}", f"click {text} in the footer"):
        assert parse(goal).text == text


@pytest.mark.parametrize(
    ("goal", "role", "text"),
    [
        ("open the Components menu", "menu", "Components"),
        ("go to the Junk folder", "", "Junk"),
        ("Compose button", "button", "Compose"),
        ("open the Settings page", "", "Settings"),
        ("mail icon", "icon", "mail"),
        ("Users tab", "tab", "Users"),
        ("find the Shipping section", "area", "Shipping"),
        ("open the Preferences dialog", "", "Preferences"),
        ("open the menu", "", "menu"),
        ("New folder", "", "New folder"),
        ("click Save page", "", "Save page"),
    ],
)
def test_a_kind_after_an_unquoted_target_is_no_part_of_it(goal: str, role: str, text: str) -> None:
    got = parse(goal)
    assert (got.role, got.text) == (role, text)


@pytest.mark.parametrize(
    ("goal", "verb", "role", "text"),
    [
        ("type the Caption", "type", "field", "Caption"),
        ("type in Caption", "type", "field", "Caption"),
        ("type into the Caption", "type", "field", "Caption"),
        ("enter the Postal code", "type", "field", "Postal code"),
        ("fill in Remarks", "type", "field", "Remarks"),
        ("go to the Inbox", "click", "", "Inbox"),
        ("look for Invoices", "find", "", "Invoices"),
        ("select Berlin", "click", "", "Berlin"),
        ("choose the Berlin option", "click", "option", "Berlin"),
        ("tick Remember me", "click", "checkbox", "Remember me"),
        ("check the Newsletter", "click", "checkbox", "Newsletter"),
        ("toggle sidebar", "click", "", "sidebar"),
        ("Type", "type", "", "Type"),
        ("Enter", "type", "", "Enter"),
    ],
)
def test_a_verb_is_no_text_and_may_imply_a_role(goal: str, verb: str, role: str, text: str) -> None:
    got = parse(goal)
    assert (got.verb, got.role, got.text) == (verb, role, text)


def test_relation_context_and_ordinal_are_read() -> None:
    goal = parse("the second 'Edit' button in the 'Users' table")
    assert (goal.ordinal, goal.context) == (2, "Users")
    assert parse("the field labelled 'A'").relation == "label"


@pytest.mark.parametrize("goal", ["", "   ", "''", "\n\t", "?!", "…"])
def test_an_empty_goal_is_refused(goal: str) -> None:
    with pytest.raises(UsageError):
        parse(goal)


def test_a_goal_that_is_too_long_or_no_text_is_refused() -> None:
    with pytest.raises(LimitError):
        parse("x" * (GOAL_CHARS_MAX + 1))
    with pytest.raises(UsageError):
        parse("find \udc80")


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_goal_or_is_refused_by_name(goal: str) -> None:
    try:
        got = parse(goal)
    except UsageError:
        return
    assert got.text or got.role


# Scores


@pytest.mark.parametrize(
    ("target", "text"), [("Submit", "submit:"), ("Log in", "Login"), ("Settings", "Sett1ngs"), ("Zoom", "Zoorn")]
)
def test_misread_texts_are_the_same_text(target: str, text: str) -> None:
    assert EXACT <= similarity(target, text) < 1000


@pytest.mark.parametrize(
    ("target", "text"),
    [("Page 1", "Page 2"), ("Sign in", "Sign out"), ("Save", "Save as"), ("Submit", "Resubmit"), ("10", "100")],
)
def test_near_texts_are_not_the_same_text(target: str, text: str) -> None:
    assert similarity(target, text) < EXACT


@given(st.text(max_size=30), st.text(max_size=30))
@settings(deadline=None)
def test_similarity_is_bounded_and_full_only_for_equal_texts(a: str, b: str) -> None:
    assert 0 <= similarity(a, b) <= 1000
    if similarity(a, a):
        assert similarity(a, a) == 1000


def test_a_role_in_the_tree_disagrees_and_pixels_do_not_know() -> None:
    assert role_fit("button", "button", "tree") == 2
    assert role_fit("button", "link", "tree") == 1
    assert role_fit("button", "heading", "tree") == -2
    assert role_fit("button", "text", "ocr") == 0
    assert role_fit("", "heading", "tree") == 0


# Plans


@pytest.mark.parametrize(
    ("cells", "area", "cap", "want"), [(1, 100, 8, 1), (5, 100, 8, 5), (30, 100, 8, 8), (30, 100, 16, 16), (0, 0, 8, 0)]
)
def test_k_is_the_cells_that_meet_up_to_the_cap(cells: int, area: int, cap: int, want: int) -> None:
    assert tiles_to_read(cells, area, cap=cap) == want


@given(st.integers(1, 5000), st.integers(1, 5000), st.data())
def test_grid_cells_are_those_a_box_meets(height: int, width: int, data: st.DataObject) -> None:
    grid = Grid(height, width)
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    w, h = data.draw(st.integers(1, width - x)), data.draw(st.integers(1, height - y))
    want = {
        (r, c)
        for r in range(grid.rows)
        for c in range(grid.columns)
        if r * 512 < y + h and y < (r + 1) * 512 and c * 512 < x + w and x < (c + 1) * 512
    }
    assert set(grid.cells(Box(x, y, w, h))) == want
    assert 1 << grid.apex >= max(grid.rows, grid.columns)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1900), st.integers(0, 1000), st.integers(-3, 9)), max_size=40)
)
@settings(deadline=None)
def test_coarse_cells_are_the_best_maxima(places: list[tuple[int, int, int, int]]) -> None:
    per = {number: [p for p in places if p[0] == number] for number in range(6)}
    frames = [frame_of(str(n), [("text", "t", (x, y, 1, 1)) for _, x, y, _ in ps]) for n, ps in per.items()]
    rows = SnapshotRows.of(frames)
    scores = np.array([s for ps in per.values() for _, _, _, s in ps], dtype=np.int64)
    best: dict[tuple[str, int, int], int] = {}
    for n, x, y, s in places:
        cell = str(n), y // 1024, x // 1024
        if s > 0:
            best[cell] = max(best.get(cell, 0), s)
    want = [Cell(f, 1, y, x, s) for (f, y, x), s in sorted(best.items(), key=lambda i: (-i[1], i[0]))][:3]
    assert list(coarse_cells(rows, np.arange(len(rows.row), dtype=np.int64), scores)) == want


def test_a_plan_reads_few_tiles_and_only_under_its_coarse_cells() -> None:
    source = Source([login(), users()])
    made = plan("find button 'Sign in'", source, HashEncoder(), snapshot_id=SNAPSHOT, directory="d")
    assert 1 <= len(made.tiles) <= 8
    assert len(made.coarse) <= 3
    assert {tile.frame for tile in made.tiles} == {"login"}
    assert source.tiles_read == []
    for tile in made.tiles:
        assert any((f, y, x) == (tile.frame, tile.y >> level, tile.x >> level) for f, level, y, x, _ in made.coarse)


def test_a_box_larger_than_k_tiles_is_read_up_to_the_cap() -> None:
    wide = frame_of("wide", [("dialog", "Everything", (0, 0, 4000, 4000))], size=(4096, 4096))
    given_answer = ask("find dialog 'Everything'", [wide])
    assert len(given_answer.plan.tiles) == 16
    assert given_answer.found


def test_the_four_steps_one_by_one_find_what_the_answer_finds() -> None:
    source = Source([login(), users()])
    goal = parse("find button 'Sign in'")
    made = plan(goal, source, HashEncoder())
    tiles = fetch(made, source)
    state = fuse(made, tiles, source)
    best = locate(state, goal, encoder=HashEncoder())[0]
    assert (best.frame, best.bbox) == ("login", Box(700, 420, 120, 40))
    assert best.bbox == Box(*ask("find button 'Sign in'", source).as_json()["bbox"])


def test_working_buffers_hold_the_pixels_of_their_tiles() -> None:
    across = frame_of("f", [("button", "Go", (500, 500, 30, 30))])
    source = Source([across])
    made = plan("find button 'Go'", source)
    buffer = fuse(made, fetch(made, source), source).buffers[0]
    assert buffer.whole
    assert buffer.box == Box(484, 484, 62, 62)
    assert buffer.pixels.shape == (62, 62, 3)
    assert buffer.pixels[0, 0, 0] == 0
    assert buffer.pixels[0, 61, 0] == 1
    assert buffer.pixels[61, 0, 0] == 10
    assert buffer.pixels[61, 61, 0] == 11


# Answers


def test_a_button_is_found_with_its_box_and_plan() -> None:
    got = ask("find button 'Sign in'", [login(), users()]).as_json()
    assert got["status"] == "accepted"
    assert got["found"] is True
    assert (got["frame"], got["bbox"]) == ("login", [700, 420, 120, 40])
    assert got["confidence"] >= 0.95
    assert list(got) == [
        "status",
        "found",
        "frame",
        "snapshot_id",
        "bbox",
        "confidence",
        "reason",
        "plan",
        "candidates",
        "stages_ms",
        "skipped",
        "elapsed_ms",
        "startup_ms",
        "trace_id",
    ]
    assert list(got["plan"]) == ["directory", "tile_ids", "tiles", "acceptance", "budget_ms"]
    assert list(got["plan"]["tiles"][0]) == ["tile_id", "stream", "frame", "level", "x", "y"]
    assert got["plan"]["tile_ids"] == [tile["tile_id"] for tile in got["plan"]["tiles"]]
    assert got["plan"]["tile_ids"][0].startswith("tl_")
    assert list(got["candidates"][0]) == ["bbox", "frame", "text", "type", "confidence"]
    assert json.loads(json.dumps(got)) == got


def test_a_field_is_found_by_its_label() -> None:
    assert ask("find the 'Password' field", [login()]).as_json()["bbox"] == [700, 330, 400, 40]
    assert ask("field labelled Email address", [login()]).as_json()["bbox"] == [700, 230, 400, 40]


def test_what_is_not_there_is_absent_with_a_reason() -> None:
    for goal in ("find button 'Export'", "find the 'Phone' field", "find 'Sign out'", "find 'Users list'"):
        got = ask(goal, [login()])
        assert (got.status, got.choice, got.frame) == ("absent", None, None), goal
        assert got.reason


def test_a_text_as_another_control_is_absent() -> None:
    assert ask("find button 'Sign in to Acme'", [login()]).status == "absent"


def test_an_empty_snapshot_answers_absent() -> None:
    got = ask("find button 'Save'", [])
    assert (got.status, got.plan.tiles) == ("absent", ())


def test_equal_places_are_ambiguous_with_candidates_and_no_box() -> None:
    got = ask("find link 'Edit'", [users()]).as_json()
    assert (got["status"], got["found"], got["bbox"]) == ("ambiguous", False, None)
    edits = [one["bbox"] for one in got["candidates"] if one["text"] == "Edit"]
    assert edits == [[900, 200, 50, 30], [900, 260, 50, 30], [900, 320, 50, 30]]


def test_equal_places_on_two_frames_are_ambiguous_until_one_is_named() -> None:
    twin = login()._replace(frame="copy")
    assert ask("find button 'Sign in'", [login(), twin]).status == "ambiguous"
    assert ask("find button 'Sign in'", [login(), twin], frame="copy").frame == "copy"


def test_ordinals_and_neighbours_settle_a_tie() -> None:
    assert ask("the second 'Edit' link", [users()]).as_json()["bbox"] == [900, 260, 50, 30]
    assert ask("the last 'Edit' link", [users()]).as_json()["bbox"] == [900, 320, 50, 30]
    assert ask("the 'Delete' button next to 'Bob'", [users()]).as_json()["bbox"] == [1000, 260, 70, 30]


def test_surroundings_of_an_unquoted_goal_settle_a_tie_or_are_ignored() -> None:
    assert ask("the Delete button in the Bob row", [users()]).as_json()["bbox"] == [1000, 260, 70, 30]
    assert ask("the Delete button in the side menu", [users()]).status == "ambiguous"
    assert ask("the Sign in button in the side menu", [login()]).as_json()["bbox"] == [700, 420, 120, 40]


@pytest.mark.parametrize(
    ("goal", "whole", "short"),
    [
        ("show archive", ("text", "Show archive"), ("link", "Archive")),
        ("users tab", ("text", "Users tab"), ("tab", "Users")),
        ("check out", ("button", "Check out"), ("checkbox", "Out")),
        ("go to the Settings page", ("link", "Settings page"), ("link", "Settings")),
        ("Next page", ("button", "Next page"), ("button", "Next")),
    ],
)
def test_a_whole_text_that_is_shown_wins_over_a_part_of_the_goal(
    goal: str, whole: tuple[str, str], short: tuple[str, str]
) -> None:
    both = frame_of("f", [(*short, (100, 100, 120, 30)), (*whole, (100, 300, 120, 30))])
    assert ask(goal, [both]).as_json()["bbox"][1] >= 300
    alone = frame_of("f", [(*short, (100, 100, 120, 30))])
    assert ask(goal, [alone]).candidates[0].bbox == Box(100, 100, 120, 30)


def test_a_heading_of_the_whole_words_is_not_the_tab_they_ask_for() -> None:
    both = frame_of("f", [("tab", "Users", (100, 100, 120, 30)), ("heading", "Users tab", (100, 300, 120, 30))])
    assert ask("users tab", [both]).as_json()["bbox"] == [100, 100, 120, 30]


def test_a_label_that_ends_in_the_noun_of_its_control_means_the_control() -> None:
    seen = frame_of(
        "f",
        [("text", "Email field", (100, 100, 90, 20)), ("textbox", "", (100, 130, 300, 40))],
        [Edge("n0", "n1", "labels")],
    )
    assert ask("find the Email field", [seen]).as_json()["bbox"] == [100, 130, 300, 40]


def test_a_click_means_the_link_and_not_the_heading_of_that_name() -> None:
    both = frame_of("f", [("heading", "Reports", (300, 40, 100, 30)), ("link", "Reports", (20, 200, 80, 20))])
    assert ask("click 'Reports'", [both]).as_json()["bbox"] == [20, 200, 80, 20]
    assert ask("find heading 'Reports'", [both]).as_json()["bbox"] == [300, 40, 100, 30]
    assert ask("find 'Reports'", [both]).status == "ambiguous"


def test_a_button_and_its_own_text_are_one_place() -> None:
    nested = frame_of("f", [("button", "Save", (100, 100, 80, 30)), ("text", "Save", (120, 105, 40, 20))])
    assert ask("find button 'Save'", [nested]).status == "accepted"
    assert ask("find 'Save'", [nested]).found


def test_an_unknown_frame_is_an_error() -> None:
    with pytest.raises(NotFoundError):
        ask("find 'Save'", [login()], frame="nowhere")


def test_a_budget_that_is_not_positive_is_an_error() -> None:
    with pytest.raises(UsageError):
        ask("find 'Save'", [login()], budget_ms=0)


def test_a_changed_tile_is_not_answered_from() -> None:
    source = Source([login(), users()])
    source.changed.add(("login", 0, 1))
    got = ask("find button 'Sign in'", source)
    assert not got.found
    assert "changed" in got.reason
    assert all(one.frame != "login" or one.bbox.x >= 1024 + 16 for one in got.candidates)
    source.changed = {("login", 2, 3), ("users", 0, 1)}
    assert ask("find button 'Sign in'", source).found


def test_a_damaged_tile_is_an_error_and_never_an_answer() -> None:
    source = Source([login()])
    source.damaged.add(("login", 0, 1))
    with pytest.raises(IntegrityError):
        ask("find button 'Sign in'", source)


# Budget


def test_a_small_budget_skips_by_name_and_still_answers() -> None:
    got = ask("find button 'Sign in'", [login()], budget_ms=92)
    assert got.found
    assert got.skipped == ("embed", "coarse", "localise")
    assert "embed" not in got.stages_ms


def test_a_budget_too_small_is_a_deadline() -> None:
    got = ask("find button 'Sign in'", [login()], budget_ms=40)
    assert (got.status, got.choice) == ("deadline", None)
    assert "fetch" in got.reason


def test_a_late_answer_is_a_deadline_with_its_candidates() -> None:
    got = answer(
        "find button 'Sign in'",
        Source([login()]),
        Tape(),
        Ticks(16),
        HashEncoder(),
        snapshot_id=SNAPSHOT,
        directory="d",
        p95_ms=dict.fromkeys(P95_MS, 0.0),
    )
    assert got.status == "deadline"
    assert got.as_json()["bbox"] is None
    assert got.candidates[0].bbox == Box(700, 420, 120, 40)


def test_a_bad_minute_does_not_rule_a_stage_out_for_ever() -> None:
    slow = dict.fromkeys(P95_MS, 10_000.0)
    got = answer(
        "find button 'Sign in'",
        Source([login()]),
        Tape(),
        Ticks(),
        HashEncoder(),
        snapshot_id=SNAPSHOT,
        directory="d",
        p95_ms=slow,
    )
    assert got.found
    assert got.skipped == ()


def test_the_budget_starts_at_receipt() -> None:
    source, clock = Source([login()]), Ticks(0.5)
    clock.at = 10**9
    got = answer(
        "find button 'Sign in'",
        source,
        Tape(),
        clock,
        HashEncoder(),
        snapshot_id=SNAPSHOT,
        directory="d",
        received_ns=10**9 - 200 * 10**6,
    )
    assert got.status == "deadline"


# Replay and sameness


@pytest.mark.parametrize("budget_ms", [20, 92, 150])
@pytest.mark.parametrize("goal", ["find button 'Sign in'", "find 'Edit'", "find 'Nothing like it'"])
def test_a_replay_gives_the_same_bytes_under_another_clock(goal: str, budget_ms: int) -> None:
    tape = Tape()
    first = ask(goal, [login(), users()], tape=tape, budget_ms=budget_ms)
    again = Tape(tape)
    second = ask(goal, [users(), login()], tape=again, budget_ms=budget_ms, clock=Ticks(40))
    assert json.dumps(first.as_json()) == json.dumps(second.as_json())
    assert tape.steps == again.steps


def test_every_stage_is_recorded_once_in_order() -> None:
    tape = Tape()
    ask("find button 'Sign in'", [login()], tape=tape)
    want = ["parse", "rows", "embed", "coarse", "localise", "bm25", "fuse_scores", "plan", "fetch", "locate", "accept"]
    assert [name for name, _, _ in tape.steps] == want


def test_another_vector_changes_the_embed_step() -> None:
    class Other(HashEncoder):
        def encode(self, texts: Sequence[str]) -> NDArray[np.int8]:
            return super().encode([text + " x" for text in texts])

    tapes = Tape(), Tape()
    for tape, encoder in zip(tapes, (HashEncoder(), Other()), strict=True):
        answer("find 'Edit'", Source([users()]), tape, Ticks(), encoder, snapshot_id=SNAPSHOT, directory="d")
    first = next(a[0] for a, b in zip(tapes[0].steps, tapes[1].steps, strict=True) if a != b)
    assert first == "embed"


GOALS = ["find button 'Sign in'", "find 'Edit'", "click 'Delete'", "find the Password field", "find 'Nowhere'", "Bob"]


@given(st.sampled_from(GOALS), st.permutations(range(3)))
@settings(max_examples=30, deadline=None)
def test_the_order_of_frames_does_not_matter(goal: str, order: list[int]) -> None:
    frames = [login(), users(), login()._replace(frame="again")]
    assert content(ask(goal, [frames[i] for i in order])) == content(ask(goal, frames))


words = st.sampled_from(["Edit", "Delete", "Sign in", "Password", "Bob", "Export", "Users"])
elements = st.lists(
    st.tuples(
        st.sampled_from(["button", "link", "text", "textbox", "heading"]),
        words,
        st.tuples(st.integers(0, 1800), st.integers(0, 1000), st.integers(1, 100), st.integers(1, 60)),
    ),
    max_size=12,
)


@given(st.sampled_from(GOALS), elements)
@settings(max_examples=40, deadline=None)
def test_an_unrelated_frame_changes_nothing_for_a_named_frame(goal: str, others: list[Element]) -> None:
    alone = ask(goal, [login()], frame="login")
    beside = ask(goal, [login(), frame_of("other", others)], frame="login")
    assert content(alone) == content(beside)


@given(elements, words)
@settings(max_examples=60, deadline=None)
def test_an_answer_is_always_one_of_the_shown_elements(shown: list[Element], word: str) -> None:
    got = ask(f"find '{word}'", [frame_of("f", shown)])
    if got.choice is not None:
        assert tuple(got.choice.bbox) in {box for _, _, box in shown}
        assert got.confidence >= 0.5
    assert (got.choice is None) == (got.status not in ("accepted", "tentative"))
    assert len(got.candidates) <= 10


@given(words, st.integers(2, 5), st.sampled_from(["button", "link", "text"]))
@settings(max_examples=30, deadline=None)
def test_equal_candidates_always_abstain(word: str, count: int, kind: str) -> None:
    same = frame_of("f", [(kind, word, (100, 100 + 80 * i, 60, 20)) for i in range(count)])
    assert ask(f"find '{word}'", [same]).status == "ambiguous"


# Calibrator


def test_the_shipped_calibrator_says_where_it_comes_from() -> None:
    model = shipped()
    assert model.provenance
    assert model.split
    assert len(model.digest()) == 64


def test_a_calibrator_for_other_features_is_refused() -> None:
    with pytest.raises(IntegrityError):
        decoded(b"{}")
    with pytest.raises(IntegrityError):
        decoded(
            b'{"version":1,"features":["x"],"weights":[1.0],"bias":0.0,"n":0,"split":"","ece":null,'
            b'"ece_interval":null,"provenance":""}'
        )


# What pixels and trees leave open


def test_a_part_of_a_line_is_answered_with_its_own_box() -> None:
    line = frame_of("f", [("text", "Already a customer? Sign in", (100, 100, 270, 20))], source="ocr")
    got = ask("find 'Sign in'", [line])
    assert got.candidates[0].bbox == Box(300, 100, 70, 20)


def test_a_label_and_its_checkbox_are_one_place_and_the_box_is_the_checkbox() -> None:
    seen = frame_of(
        "f",
        [("radio", "", (100, 100, 16, 16)), ("text", "Send news", (124, 98, 90, 20))],
        [Edge("n1", "n0", "labels")],
        source="ocr",
    )
    assert ask("find checkbox 'Send news'", [seen]).candidates[0].bbox == Box(100, 100, 16, 16)
    assert ask("find 'Send news'", [seen]).candidates[0].bbox == Box(124, 98, 90, 20)


def test_a_field_without_a_label_edge_is_found_beside_its_text() -> None:
    seen = frame_of("f", [("text", "Message", (100, 200, 70, 16)), ("textbox", "", (300, 190, 300, 110))], source="ocr")
    assert ask("find the 'Message' field", [seen]).candidates[0].bbox == Box(300, 190, 300, 110)


def test_a_text_in_a_link_counts_as_the_link() -> None:
    nested = frame_of(
        "f",
        [("link", "", (10, 100, 200, 36)), ("text", "Charts", (60, 108, 42, 16)), ("text", "Charts", (600, 8, 42, 16))],
        [Edge("n0", "n1", "contains")],
    )
    assert ask("find link 'Charts'", [nested]).candidates[0].bbox == Box(60, 108, 42, 16)


def test_of_a_wide_heading_the_letters_are_answered() -> None:
    class Inked(Source):
        def tile(self, key: TileKey) -> NDArray[np.uint8]:
            values = np.full((512, 512, 3), 250, dtype=np.uint8)
            values[100:120, 60:140] = 20
            return values

    wide = frame_of("f", [("heading", "Shipping", (50, 90, 440, 40))])
    assert ask("find heading 'Shipping'", Inked([wide])).as_json()["bbox"] == [60, 100, 80, 20]
    assert ask("find heading 'Shipping'", Source([wide])).as_json()["bbox"] == [50, 90, 440, 40]


def test_another_word_is_no_misreading() -> None:
    assert similarity("Close account", "Create account") <= 600
    assert similarity("Delete account", "Delete acount") > 900
    assert similarity("3 h", "3h") >= EXACT


def test_what_a_tree_does_not_have_is_no_control() -> None:
    assert role_fit("field", "text", "ocr", with_tree=True) == -1
    assert role_fit("field", "text", "ocr") == 0
