"""What perception promises: whole lines over seams, remembered equals fresh, labels, trees that win, clear errors."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from him.adapters.rapidocr import RapidTextReader
from him.config import EMBEDDING_DIMS, TREE_BYTES_MAX, TREE_NODES_MAX
from him.errors import LimitError, UsageError
from him.index import FrameScene, SnapshotRows
from him.perception import parse_tree, see
from him.perception.lines import cut_at_gaps, cut_at_separators, piece, stitched
from him.perception.ocr import read
from him.perception.scene import build
from him.perception.widgets import find
from him.query import parse
from him.query.search import fuse_scores
from him.types import Box, Node, Scene, TextLine, TreeNode, WidgetBox

SCREENS = Path(__file__).resolve().parents[2] / "examples" / "screens"
Picture = NDArray[np.uint8]


class Memory:
    """A Memo in a dict."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, bytes], bytes] = {}

    def get(self, kind: str, key: bytes) -> bytes | None:
        return self.items.get((kind, key))

    def put(self, kind: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        for key, value in items:
            self.items[kind, key] = value


class Forgetful(Memory):
    """A Memo that keeps nothing."""

    def put(self, kind: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        pass


class Boxes:
    """A reader that finds dark rectangles and calls each by its width: the rules of tiling, without a model."""

    def pin(self) -> str:
        return "boxes/1"

    def detect(self, picture: Picture) -> list[list[tuple[int, int]]]:
        dark = (picture.max(axis=2) < 128).astype(np.uint8)
        count, _, stats, _ = cv2.connectedComponentsWithStats(dark, connectivity=8)
        boxes = [tuple(int(v) for v in stats[i, :4]) for i in range(1, count)]
        return [[(x, y), (x + w - 1, y), (x + w - 1, y + h - 1), (x, y + h - 1)] for x, y, w, h in boxes]

    def recognise(self, crops: Sequence[Picture]) -> list[tuple[str, float]]:
        return [(f"w{crop.shape[1]}", 1.0) for crop in crops]


@pytest.fixture(scope="module")
def reader() -> RapidTextReader:
    return RapidTextReader()


def white(height: int, width: int) -> Picture:
    return np.full((height, width, 3), 255, np.uint8)


def write(
    picture: Picture, text: str, x: int, y: int, scale: float = 0.6, colour: tuple[int, int, int] = (20, 20, 20)
) -> None:
    """Text whose baseline starts at (x, y)."""
    cv2.putText(picture, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)


def node_with(scene: Scene, text: str) -> Node:
    found = [node for node in scene.nodes if node.text == text]
    assert len(found) == 1, [node.text for node in scene.nodes]
    return found[0]


@pytest.fixture(scope="module")
def form() -> Picture:
    """A small form: two labelled fields, a checkbox, a filled and an outlined button."""
    picture = white(260, 480)
    for y, label, value in ((20, "Full name", "Ada Lovelace"), (90, "Mail address", "ada@example.org")):
        write(picture, label, 20, y + 14)
        cv2.rectangle(picture, (20, y + 26), (360, y + 58), (130, 130, 130), 1)
        write(picture, value, 30, y + 47, colour=(60, 60, 60))
    cv2.rectangle(picture, (20, 170), (35, 185), (110, 110, 110), 1)
    write(picture, "Remember me", 46, 184)
    cv2.rectangle(picture, (20, 205), (140, 245), (30, 90, 200), -1)
    write(picture, "Submit", 51, 231, colour=(255, 255, 255))
    cv2.rectangle(picture, (160, 205), (280, 245), (90, 90, 90), 1)
    write(picture, "Cancel", 194, 231)
    return picture


@pytest.fixture(scope="module")
def form_scene(form: Picture, reader: RapidTextReader) -> Scene:
    return see(form, reader, Memory()).scene


# ---------------------------------------------------------------------------------------------- tiles and seams


def test_line_over_a_vertical_seam_is_one_line() -> None:
    picture = white(100, 1200)
    picture[40:60, 300:1100] = 0
    reading = read(picture, Boxes(), Memory())
    assert [line.box for line in reading.lines] == [Box(300, 40, 800, 20)]


@pytest.mark.parametrize(("top", "height"), [(500, 20), (490, 40), (480, 60), (495, 17), (510, 5), (512, 12)])
def test_line_over_a_horizontal_seam_is_one_line(top: int, height: int) -> None:
    picture = white(700, 400)
    picture[top : top + height, 100:300] = 0
    assert [line.box.w for line in read(picture, Boxes(), Memory()).lines] == [200]


def test_lines_beside_a_seam_stay_apart() -> None:
    picture = white(700, 400)
    for top in (478, 494, 512, 530):
        picture[top : top + 12, 100:300] = 0
    boxes = stitched_boxes(picture)
    assert [(box.y, box.h) for box in boxes] == [(478, 12), (494, 12), (512, 12), (530, 12)]


def stitched_boxes(picture: Picture) -> list[Box]:
    return [line.box._replace(y=line.box.y, h=line.box.h) for line in read(picture, Boxes(), Memory()).lines]


def test_stitching_does_not_depend_on_order() -> None:
    picture = (200, 1100)
    left, right = Box(0, 0, 528, 200), Box(496, 0, 544, 200)
    pieces = [
        piece([(480, 50), (527, 50), (527, 70), (480, 70)], (0, 0), left, picture),
        piece([(0, 51), (90, 51), (90, 70), (0, 70)], (0, 1), right, picture),
        piece([(10, 100), (60, 100), (60, 120), (10, 120)], (0, 1), right, picture),
    ]
    assert stitched(pieces) == stitched(pieces[::-1]) == [Box(480, 50, 107, 21), Box(506, 100, 51, 21)]


def test_real_text_over_both_seams_is_read_whole(reader: RapidTextReader) -> None:
    picture = white(640, 760)
    write(picture, "The quick brown fox jumps over", 340, 200, 0.7)
    write(picture, "Centred on the lower seam", 60, 518, 0.7)
    texts = [line.text for line in read(picture, reader, Memory()).lines]
    assert texts == ["The quick brown fox jumps over", "Centred on the lower seam"]


def test_change_in_one_region_detects_only_tiles_that_see_it() -> None:
    picture = white(1400, 1400)
    for y in range(60, 1400, 130):
        picture[y : y + 14, 700:900] = 0
    memo = Memory()
    first = read(picture, Boxes(), memo).counts
    assert (first.tiles_detected, first.tiles_remembered) == (9, 0)
    inside = picture.copy()
    inside[700:710, 760:800] = 0  # in the middle tile only
    assert read(inside, Boxes(), memo).counts.tiles_detected == 1
    halo = picture.copy()
    halo[700:710, 1030:1036] = 0  # in the right tile, and in the middle tile's halo
    assert read(halo, Boxes(), memo).counts.tiles_detected == 2
    corner = picture.copy()
    corner[1020:1028, 1020:1028] = 0
    assert read(corner, Boxes(), memo).counts.tiles_detected == 4


def test_remembered_reading_equals_fresh_reading(form: Picture, reader: RapidTextReader) -> None:
    memo = Memory()
    first = see(form, reader, memo)
    again = see(form, reader, memo)
    assert again.scene == first.scene == see(form, reader, Forgetful()).scene
    assert (again.counts.tiles_detected, again.counts.crops_recognised) == (0, 0)
    assert first.counts.tiles_detected == 1 and first.counts.crops_recognised > 0
    assert msgspec.json.encode(first.scene) == msgspec.json.encode(again.scene)


def test_equal_crops_are_recognised_once() -> None:
    picture = white(300, 300)
    for y in (50, 100, 150):
        picture[y : y + 14, 40:140] = 0
    counts = read(picture, Boxes(), Memory()).counts
    assert (counts.crops_recognised, counts.crops_remembered) == (1, 2)


def test_another_reader_does_not_see_what_the_first_remembered() -> None:
    class Newer(Boxes):
        def pin(self) -> str:
            return "boxes/2"

    picture = white(200, 200)
    picture[50:64, 40:140] = 0
    memo = Memory()
    read(picture, Boxes(), memo)
    assert read(picture, Newer(), memo).counts.tiles_detected == 1


def test_progress_reaches_its_total() -> None:
    picture = white(600, 600)
    picture[50:64, 40:140] = 0
    seen: list[tuple[int, int, str]] = []
    read(picture, Boxes(), Memory(), lambda done, total, what: seen.append((done, total, what)))
    assert (4, 4, "detect") in seen and (1, 1, "recognise") in seen


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (33, 17)])
def test_tiny_and_narrow_pictures_are_read(size: tuple[int, int], reader: RapidTextReader) -> None:
    picture = np.zeros((*size, 3), np.uint8)
    picture[::2, ::2] = 200
    scene = see(picture, reader, Memory()).scene
    assert (scene.height, scene.width) == size


def test_picture_of_another_shape_is_refused(reader: RapidTextReader) -> None:
    with pytest.raises(UsageError, match="uint8 RGB"):
        see(np.zeros((10, 10), np.uint8), reader, Memory())
    with pytest.raises(UsageError, match="uint8 RGB"):
        see(np.zeros((0, 10, 3), np.uint8), reader, Memory())


# ------------------------------------------------------------------------------------------------ the reader


def test_recognition_does_not_depend_on_the_batch(form: Picture, reader: RapidTextReader) -> None:
    crops = [form[y : y + h, x : x + w] for x, y, w, h in ((15, 18, 120, 24), (15, 88, 150, 24), (20, 205, 120, 40))]
    together = reader.recognise(crops)
    assert together == [reader.recognise([crop])[0] for crop in crops]
    assert together == reader.recognise(crops[::-1])[::-1]
    assert reader.recognise(crops[:2]) == together[:2]


def test_reader_is_silent_and_its_pin_stays(reader: RapidTextReader, capfd: pytest.CaptureFixture[str]) -> None:
    reader.detect(white(64, 64))
    assert len(reader.pin()) == 64 and reader.pin() == RapidTextReader().pin()
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------- cutting lines


def test_line_is_cut_at_wide_gaps_but_not_between_words() -> None:
    picture = white(40, 500)
    write(picture, "First item", 10, 26)
    write(picture, "Second", 160, 26)
    parts = cut_at_gaps(picture, Box(4, 8, 260, 26))
    assert len(parts) == 2
    assert parts[0].x + parts[0].w <= parts[1].x and parts[1].x < 160


def test_line_is_cut_at_a_control_s_side() -> None:
    picture = white(40, 300)
    write(picture, "13", 20, 26)
    write(picture, "14", 50, 26)
    assert len(cut_at_gaps(picture, Box(15, 8, 70, 26), [Box(5, 4, 40, 30), Box(45, 4, 40, 30)])) == 2


def test_items_between_separators_are_apart_and_in_place() -> None:
    picture = white(40, 400)
    write(picture, "Home | Data | Last", 10, 26)
    parts = cut_at_separators(picture, Box(6, 8, 190, 26), "Home | Data | Last")
    assert [text for _, text in parts] == ["Home", "Data", "Last"]
    (_, first), (second, _), _ = ((box, text) for box, text in parts)
    assert first == "Home" and 75 < second.centre[0] < 115


# ------------------------------------------------------------------------------------------ widgets and scenes


def test_widgets_of_a_form_are_found(form: Picture) -> None:
    widgets = find(form)
    kinds = {(one.kind, one.box.centre) for one in widgets}
    for kind, (x, y) in (("field", (190, 62)), ("check", (27, 177)), ("button", (80, 225)), ("field", (220, 225))):
        assert any(k == kind and abs(cx - x) <= 3 and abs(cy - y) <= 3 for k, (cx, cy) in kinds), kind
    assert find(form) == widgets


def test_text_in_a_button_becomes_the_button_s(form_scene: Scene) -> None:
    for text, box in (("Submit", Box(20, 205, 121, 41)), ("Cancel", Box(160, 205, 121, 41))):
        node = node_with(form_scene, text)
        assert node.type == "button"
        assert all(abs(a - b) <= 2 for a, b in zip(node.bbox, box, strict=True))


def test_label_above_a_field_and_beside_a_box_labels_it(form_scene: Scene) -> None:
    by_id = {node.id: node for node in form_scene.nodes}
    labels = {by_id[e.source].text: by_id[e.target] for e in form_scene.edges if e.rel == "labels"}
    assert (labels["Full name"].type, labels["Full name"].text) == ("textbox", "Ada Lovelace")
    assert (labels["Mail address"].type, labels["Mail address"].text) == ("textbox", "ada@example.org")
    assert labels["Remember me"].type == "checkbox"


def test_label_left_of_a_field_labels_it() -> None:
    lines = [TextLine(Box(10, 12, 60, 16), "Port", 0.99), TextLine(Box(10, 52, 60, 16), "Host", 0.99)]
    fields = [WidgetBox(Box(120, 6, 200, 28), "field", 0.9), WidgetBox(Box(120, 46, 200, 28), "field", 0.9)]
    scene = build((100, 400), lines, fields, None, {})
    by_id = {node.id: node for node in scene.nodes}
    pairs = {by_id[e.source].text: by_id[e.target].bbox.y for e in scene.edges if e.rel == "labels"}
    assert pairs == {"Port": 6, "Host": 46}


def lines_of(*texts: tuple[str, int, int]) -> list[TextLine]:
    """Lines 13 px high at (x, y), 8 px a letter."""
    return [TextLine(Box(x, y, 8 * len(text), 13), text, 0.99) for text, x, y in texts]


def seen_in(lines: Sequence[TextLine], widgets: Sequence[WidgetBox]) -> tuple[dict[str, Node], Scene]:
    """What each text labels, and the scene."""
    scene = build((400, 900), lines, widgets, None, {})
    by_id = {node.id: node for node in scene.nodes}
    return {by_id[e.source].text: by_id[e.target] for e in scene.edges if e.rel == "labels"}, scene


def test_control_painted_in_two_tones_is_one_control() -> None:
    picture = white(100, 320)
    cv2.rectangle(picture, (20, 20), (270, 54), (197, 219, 236), 1)
    picture[21:37, 21:270], picture[37:54, 21:270] = (232, 244, 254), (220, 236, 251)
    write(picture, "Harbour", 36, 44)
    frames = [one for one in find(picture) if one.kind in ("button", "field")]
    assert [one.kind for one in frames] == ["field"]
    assert all(abs(a - b) <= 2 for a, b in zip(frames[0].box, Box(20, 20, 251, 35), strict=True))


def test_frame_around_two_controls_is_not_a_third() -> None:
    picture = white(100, 320)
    cv2.rectangle(picture, (20, 20), (270, 54), (90, 90, 90), 1)
    cv2.line(picture, (140, 20), (140, 54), (90, 90, 90), 1)
    assert len([one for one in find(picture) if one.kind in ("button", "field")]) == 2


def test_full_square_is_a_box_to_tick_only_beside_a_text() -> None:
    picture = white(120, 300)
    for y in (30, 80):
        picture[y : y + 16, 30:46] = (225, 112, 9)
    scene = build((120, 300), lines_of(("Whiteboard", 52, 32)), find(picture), None, {})
    boxes = [node for node in scene.nodes if node.type == "checkbox"]
    assert [abs(node.bbox.y - 30) <= 2 for node in boxes] == [True]


def test_box_to_tick_that_a_button_starts_with_bears_the_button_s_name() -> None:
    widgets = [WidgetBox(Box(20, 20, 100, 32), "field", 0.9), WidgetBox(Box(34, 28, 16, 16), "check", 0.6)]
    labels, scene = seen_in(lines_of(("Bold", 58, 29)), widgets)
    assert node_with(scene, "Bold").type == "button"
    assert (labels["Bold"].type, labels["Bold"].bbox) == ("checkbox", Box(34, 28, 16, 16))


def test_text_area_is_known_by_a_label_left_of_it_or_a_caption_joined_to_it() -> None:
    lines = lines_of(("Name", 20, 30), ("Message", 20, 80), ("Remarks", 520, 30))
    widgets = [
        WidgetBox(Box(160, 20, 300, 36), "field", 0.9),
        WidgetBox(Box(160, 70, 300, 110), "field", 0.9),
        WidgetBox(Box(500, 18, 300, 38), "button", 0.9),
        WidgetBox(Box(501, 56, 298, 100), "field", 0.9),
    ]
    labels, _ = seen_in(lines, widgets)
    assert {text: node.bbox for text, node in labels.items()} == {
        "Name": Box(160, 20, 300, 36),
        "Message": Box(160, 70, 300, 110),
        "Remarks": Box(501, 56, 298, 100),
    }


def test_frame_beside_a_text_but_in_no_column_of_fields_is_no_text_area() -> None:
    lines, widgets = lines_of(("Yesterday", 20, 80)), [WidgetBox(Box(160, 70, 300, 110), "field", 0.9)]
    assert [node.type for node in seen_in(lines, widgets)[1].nodes] == ["panel", "text"]


def test_icon_of_a_field_read_as_a_letter_does_not_hide_the_field() -> None:
    lines = [*lines_of(("Password", 20, 20), ("At least 12 letters", 56, 53)), TextLine(Box(32, 51, 15, 16), "8", 0.9)]
    labels, _ = seen_in(lines, [WidgetBox(Box(20, 40, 300, 40), "field", 0.9)])
    assert (labels["Password"].type, labels["Password"].text) == ("textbox", "At least 12 letters")


def test_filled_rectangle_is_a_field_by_its_hint_or_by_a_label_over_its_corner() -> None:
    lines = lines_of(("Search mail...", 50, 33), ("Nickname", 20, 90), ("grizzly", 32, 121), ("FOLDERS", 510, 90))
    lines += lines_of(("Inbox", 510, 121), ("Sign in", 640, 33))
    widgets = [WidgetBox(Box(x, y, 320, 36), "button", 0.9) for x, y in ((20, 21), (20, 109), (500, 109), (500, 21))]
    labels, scene = seen_in(lines, widgets)
    assert node_with(scene, "Search mail...").type == "textbox"
    assert labels["Nickname"].text == "grizzly"
    # The chosen row of a menu and a wide button stay what they are.
    assert node_with(scene, "Inbox").type != "textbox" and node_with(scene, "Sign in").type == "button"


def test_text_some_way_off_a_field_to_search_in_does_not_name_it() -> None:
    widgets, far = [WidgetBox(Box(20, 50, 300, 36), "field", 0.9)], WidgetBox(Box(230, 50, 300, 36), "field", 0.9)
    assert "Inbox" not in seen_in(lines_of(("Inbox", 20, 17), ("Search...", 30, 62)), widgets)[0]
    assert "Email" not in seen_in(lines_of(("Email", 20, 62), ("Search...", 240, 62)), [far])[0]
    assert "Title" in seen_in(lines_of(("Title", 20, 17), ("A story", 30, 62)), widgets)[0]


def test_text_area_is_known_by_its_hint_and_a_low_one_by_its_label() -> None:
    lines = lines_of(("Tell us a bit more...", 30, 32), ("Comment", 500, 22))
    widgets = [WidgetBox(Box(20, 20, 300, 100), "field", 0.9), WidgetBox(Box(500, 40, 300, 65), "field", 0.9)]
    labels, scene = seen_in(lines, widgets)
    assert node_with(scene, "Tell us a bit more...").bbox == Box(20, 20, 300, 100)
    assert labels["Comment"].bbox == Box(500, 40, 300, 65)


def test_sign_at_the_end_of_a_field_is_not_its_value() -> None:
    lines = [*lines_of(("Postcode", 20, 20), ("12", 32, 53)), TextLine(Box(290, 51, 18, 18), "①", 0.9)]
    assert seen_in(lines, [WidgetBox(Box(20, 40, 300, 38), "field", 0.9)])[0]["Postcode"].text == "12"


def test_empty_pill_beside_a_text_is_a_switch() -> None:
    labels, _ = seen_in(lines_of(("Invites", 60, 21)), [WidgetBox(Box(20, 20, 32, 16), "field", 0.6)])
    assert labels["Invites"].type == "checkbox"


def test_rows_of_a_form_without_borders_are_fields() -> None:
    lines = lines_of(("TO", 20, 20), ("Sara Kim", 130, 20), ("Add another...", 220, 20))
    lines += lines_of(("SUBJECT", 20, 60), ("Final review", 120, 60))
    tag = WidgetBox(Box(120, 12, 90, 28), "button", 0.9)
    labels, _ = seen_in(lines, [tag])
    assert {text: node.text for text, node in labels.items()} == {"TO": "Add another...", "SUBJECT": "Final review"}
    without_hint = [line for line in lines if line.text != "Add another..."]
    assert seen_in(without_hint, [tag])[0] == {}


def test_switch_at_the_end_of_its_row_is_named_by_the_start_of_the_row() -> None:
    switch = WidgetBox(Box(700, 20, 36, 20), "check", 0.6)
    labels, _ = seen_in(lines_of(("Flight mode", 20, 16), ("Stops all radios of it", 20, 34)), [switch])
    assert list(labels) == ["Flight mode"]


def test_label_above_the_prefix_of_a_field_names_the_field() -> None:
    lines = lines_of(("Site address", 20, 20), ("example.org/", 32, 53), ("Acme", 160, 53))
    scene = seen_in(lines, [WidgetBox(Box(148, 41, 300, 38), "field", 0.9)])[1]
    vectors = np.zeros((len(scene.nodes), EMBEDDING_DIMS), np.int8)
    found = fuse_scores(
        SnapshotRows.of([FrameScene("page", scene, vectors)]), parse("type into 'Site address'"), None, None
    )
    assert found[0].box == Box(148, 41, 300, 38)


def test_scene_does_not_depend_on_the_order_of_its_inputs(form: Picture, reader: RapidTextReader) -> None:
    lines, widgets = read(form, reader, Memory(), None, find(form)).lines, find(form)
    tree = [
        TreeNode("a", "button", Box(20, 205, 121, 41), "Submit"),
        TreeNode("b", "text", Box(20, 20, 90, 20), "Full name"),
    ]
    one = build((260, 480), lines, widgets, tree, {"b": "2", "a": "1"})
    other = build((260, 480), lines[::-1], widgets[::-1], tree[::-1], {"a": "1", "b": "2"})
    assert msgspec.json.encode(one) == msgspec.json.encode(other)


def test_ids_and_boxes_are_valid(form_scene: Scene) -> None:
    ids = [node.id for node in form_scene.nodes]
    assert len(set(ids)) == len(ids)
    assert all(edge.source in ids and edge.target in ids for edge in form_scene.edges)
    whole = Box(0, 0, form_scene.width, form_scene.height)
    assert all(node.bbox.intersection(whole) == node.bbox and node.bbox.area > 0 for node in form_scene.nodes)
    assert set(form_scene.pins) == {"reader", "widgets", "rules"}


def test_blank_picture_has_an_empty_scene(reader: RapidTextReader) -> None:
    seen = see(white(600, 600), reader, Memory())
    assert seen.scene.nodes == () and seen.scene.edges == () and seen.scene.confidence == 0.0


# --------------------------------------------------------------------------------------------------- the tree


def test_tree_wins_names_and_roles_and_pixels_vouch_for_it(form: Picture, reader: RapidTextReader) -> None:
    tree = (
        TreeNode("1", "form", Box(0, 0, 480, 260), "Sign up"),
        TreeNode("2", "textbox", Box(20, 46, 341, 33), "Your full name", "1", {"required": True}),
        TreeNode("3", "link", Box(20, 205, 121, 41), "Submit", "1", {"enabled": True}),
        TreeNode("4", "text", Box(48, 215, 70, 20), "Submit", "3"),
        TreeNode("5", "button", Box(300, 205, 100, 40), "Invisible", "1"),
        TreeNode("6", "button", Box(900, 205, 100, 40), "Off the picture", "1"),
    )
    scene = see(form, reader, Memory(), tree).scene
    submit = node_with(scene, "Submit")
    assert (submit.type, submit.source, submit.state) == ("link", "fused", {"enabled": True})
    field = node_with(scene, "Your full name")
    assert (field.type, field.source) == ("textbox", "fused")
    assert field.state == {"required": True, "shown": "Ada Lovelace"}
    unseen = node_with(scene, "Invisible")
    assert (unseen.source, unseen.confidence) == ("tree", 0.6)
    assert not any(node.text == "Off the picture" for node in scene.nodes)
    assert node_with(scene, "Cancel").source == "ocr"
    outer = node_with(scene, "Sign up")
    assert any(e.source == outer.id and e.target == submit.id and e.rel == "contains" for e in scene.edges)
    assert "tree" in scene.pins


def test_tree_with_a_parent_loop_is_survived() -> None:
    tree = (TreeNode("a", "generic", Box(0, 0, 9, 9), "", "b"), TreeNode("b", "generic", Box(0, 0, 9, 9), "", "a"))
    leaf = TreeNode("c", "button", Box(0, 0, 9, 9), "Go", "a")
    assert [node.text for node in build((50, 50), [], [], (*tree, leaf), {}).nodes] == ["Go"]


def test_tree_is_parsed() -> None:
    data = [
        {"id": 1, "role": "button", "bbox": [1.4, 2.6, 3, 4], "name": "OK", "parent": None, "state": {"x": 0.123456}},
        {"id": "2", "parent": 1, "role": "text", "bbox": [0, 0, 1, 1], "extra": []},
    ]
    first, second = parse_tree(json.dumps(data).encode())
    assert first == TreeNode("1", "button", Box(1, 3, 3, 4), "OK", None, {"x": 0.1235})
    assert second.parent == "1"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "not a list"),
        (b"[3]", "node 0 .* not an object"),
        (b'[{"id":"a","role":"b"}]', "bbox is None"),
        (b'[{"id":"a","role":"b","bbox":[1,2,3]}]', "bbox"),
        (b'[{"id":"a","role":"b","bbox":[1,2,-3,4]}]', "bbox"),
        (b'[{"id":"a","role":"b","bbox":[1,2,3,1e300]}]', "bbox"),
        (b'[{"id":"a","role":"b","bbox":[1,2,3,true]}]', "bbox"),
        (b'[{"id":"a","role":4,"bbox":[1,2,3,4]}]', "role is 4"),
        (b'[{"id":"","role":"b","bbox":[1,2,3,4]}]', "id is ''"),
        (b'[{"id":"a","role":"b","bbox":[1,2,3,4],"name":7}]', "name is 7"),
        (b'[{"id":"a","role":"b","bbox":[1,2,3,4],"state":[]}]', "state"),
        (b'[{"id":"a","role":"b","bbox":[1,2,3,4],"state":{"x":[]}}]', "flat value"),
        (b'[{"id":"a","role":"b","bbox":[1,2,3,4],"parent":"z"}]', "parent 'z'"),
        (b'[{"id":"a","role":"b","bbox":[1,2,3,4]},{"id":"a","role":"b","bbox":[1,2,3,4]}]', "twice"),
    ],
)
def test_malformed_tree_is_refused_with_the_reason(data: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_tree(data)
    assert "bbox" in caught.value.fix


def test_tree_larger_than_its_limits_is_refused() -> None:
    with pytest.raises(LimitError, match="bytes"):
        parse_tree(b" " * (TREE_BYTES_MAX + 1))
    node = b'{"id":"a","role":"b","bbox":[1,2,3,4]}'
    with pytest.raises(LimitError, match="nodes"):
        parse_tree(b"[" + b",".join([node] * (TREE_NODES_MAX + 1)) + b"]")


# --------------------------------------------------------------------------------------------- a real screen


def test_real_screen_is_understood(reader: RapidTextReader) -> None:
    picture = cv2.imread(str(SCREENS / "adminlte-login.png"))
    if picture is None:
        pytest.skip("examples/screens is not there")
    picture = np.ascontiguousarray(picture[250:620, 760:1180, ::-1])
    scene = see(picture, reader, Memory()).scene
    types = {node.text: node.type for node in scene.nodes if node.text}
    assert types["Sign in to start your session"] == "text"
    assert types["Sign In"] == "button"
    assert types["Email"] == types["Password"] == "textbox"
    by_id = {node.id: node for node in scene.nodes}
    labels = {(by_id[e.source].text, by_id[e.target].type) for e in scene.edges if e.rel == "labels"}
    assert ("Remember Me", "checkbox") in labels


def test_a_word_that_begins_with_a_round_letter_keeps_it() -> None:
    ring = WidgetBox(Box(62, 17, 16, 17), "radio", 0.6)
    texts = {"Option 1": "Option 1", "ORemember": "Remember", "O Remember": "Remember"}
    for as_read, expected in texts.items():
        line = TextLine(Box(61, 15, 87, 24), as_read, 0.99)
        scene = build((60, 200), [line], [ring], None, {})
        assert expected in {node.text for node in scene.nodes}, as_read
