"""The Merkle pyramid against plain dicts and brute force: same cells, same hash, and only what differs is touched."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from fakes import CountingStore
from hypothesis import given, settings
from hypothesis import strategies as st

from him.config import DIRECTORY_LEAF_RECORDS, PAGE_SIDE
from him.errors import IntegrityError
from him.pyramid import diff, directory, page
from him.pyramid.update import NOTHING, get, grow, scan, update
from him.tile.address import KIND_PAGE
from him.types import BlobId, Box, Entry, Frame

Cell = tuple[int, int]
Grid = dict[Cell, Entry]


def entry(number: int) -> Entry:
    return Entry(BlobId(hashlib.sha256(b"%d" % number).digest()), number.to_bytes(16, "big"))


def built(store: CountingStore, cells: Mapping[Cell, Entry | None], height: int, root: bytes = NOTHING) -> bytes:
    return update(store, root, height, cells)


def listed(store: CountingStore, root: bytes, height: int, window: Box | None = None) -> Grid:
    found = list(scan(store, root, height, window))
    assert len({(row, column) for row, column, _ in found}) == len(found)
    return {(row, column): one for row, column, one in found}


SIDES = st.sampled_from([1, 2, 7, 8, 9, 63, 64, 65, 100, 511, 512, 513, 600])


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, Grid]:
    """Rows, columns and up to 60 cells, half of them close together."""
    rows, columns = draw(SIDES), draw(SIDES)
    anywhere = st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1))
    corner = st.tuples(st.integers(max(0, rows - 9), rows - 1), st.integers(max(0, columns - 9), columns - 1))
    cells = draw(st.dictionaries(anywhere | corner, st.integers(0, 5).map(entry), max_size=60))
    return rows, columns, cells


# -- pages


def test_a_page_is_its_bitmap_and_its_present_entries() -> None:
    payload = page.encode(0, {9: page.raw_entry(entry(1)), 2: page.raw_entry(entry(2))})
    assert payload[:8] == b"HPG\x01\0\0\0\0"
    assert int.from_bytes(payload[8:16], "little") == 1 << 9 | 1 << 2
    assert payload[16:] == page.raw_entry(entry(2)) + page.raw_entry(entry(1))
    assert hashlib.sha256(payload).hexdigest() == "201a4864811d5c53de8b8bfaa47f861d78e6ebca3586d60133959244fed2f77e"


@given(st.integers(0, 3), st.dictionaries(st.integers(0, 63), st.binary(min_size=48, max_size=48), min_size=1))
def test_pages_round_trip(height: int, slots: dict[int, bytes]) -> None:
    slots = {slot: raw[: page.CHILD_BYTES if height else page.CELL_BYTES] for slot, raw in slots.items()}
    found = page.decode(page.encode(height, slots))
    assert dict(found.slots()) == slots
    assert [slot for slot, _ in found.slots()] == sorted(slots)
    assert {slot: found.get(slot) for slot in range(64) if found.get(slot)} == slots


@pytest.mark.parametrize("spoil", ["magic", "height", "short", "long", "empty", "reserved"])
def test_what_is_no_page_is_refused(spoil: str) -> None:
    payload = bytearray(page.encode(1, {3: bytes(32), 4: bytes(32)}))
    if spoil == "magic":
        payload[0] ^= 1
    elif spoil == "height":
        payload[4] = 0
    elif spoil == "short":
        del payload[-1:]
    elif spoil == "long":
        payload += b"\0"
    elif spoil == "reserved":
        payload[6] = 1
    else:
        payload = payload[:8] + bytes(8)
    with pytest.raises(IntegrityError):
        page.decode(bytes(payload))


def test_a_page_of_another_height_is_refused() -> None:
    store = CountingStore()
    blob = store.put_page(KIND_PAGE, page.encode(1, {3: bytes(32)}))
    assert page.load(store, blob, 1).get(3) == bytes(32)
    with pytest.raises(IntegrityError, match="height 2"):
        page.load(store, blob, 2)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_root_is_the_lowest_page_that_covers_the_extent(rows: int, columns: int) -> None:
    height = page.root_height(rows, columns)
    assert page.side(height) >= max(rows, columns)
    assert height == 0 or page.side(height - 1) < max(rows, columns)


# -- a frame's cells


@given(grids(), st.data())
@settings(max_examples=150)
def test_update_get_and_scan_behave_like_a_dict(grid: tuple[int, int, Grid], data: st.DataObject) -> None:
    rows, columns, cells = grid
    height, store = page.root_height(rows, columns), CountingStore()
    model: Grid = dict(cells)
    root = built(store, cells, height)
    known = sorted(cells) or [(0, 0)]
    changes = data.draw(
        st.dictionaries(st.sampled_from(known), st.none() | st.integers(0, 9).map(entry), max_size=len(known))
    )
    root = built(store, changes, height, root)
    for cell, value in changes.items():
        if value is None:
            model.pop(cell, None)
        else:
            model[cell] = value
    assert listed(store, root, height) == model
    for row, column in known[:20]:
        assert get(store, root, height, row, column) == model.get((row, column))
        assert get(store, root, height, row, (column + 1) % columns) == model.get((row, (column + 1) % columns))
    assert bool(root) == bool(model)


@given(grids(), st.data())
@settings(max_examples=100)
def test_one_hash_in_whatever_order_and_batches(grid: tuple[int, int, Grid], data: st.DataObject) -> None:
    rows, columns, cells = grid
    height = page.root_height(rows, columns)
    one = built(CountingStore(), cells, height)
    store, root = CountingStore(), NOTHING
    order = data.draw(st.permutations(sorted(cells)))
    at = 0
    while at < len(order):
        size = data.draw(st.integers(1, 20))
        batch: dict[Cell, Entry | None] = {cell: cells[cell] for cell in order[at : at + size]}
        # A detour through another value and through absence leaves no trace.
        root = built(store, {cell: entry(99) for cell in batch}, height, root)
        root = built(store, {min(batch): None}, height, root)
        root = built(store, batch, height, root)
        at += size
    assert root == one


@given(grids())
@settings(max_examples=60)
def test_empty_pages_vanish(grid: tuple[int, int, Grid]) -> None:
    rows, columns, cells = grid
    height, store = page.root_height(rows, columns), CountingStore()
    root = built(store, cells, height)
    assert built(store, dict.fromkeys(cells), height, root) == NOTHING
    some = dict(sorted(cells.items())[: len(cells) // 2])
    rest: dict[Cell, Entry | None] = {cell: None for cell in cells if cell not in some}
    assert built(store, rest, height, root) == built(CountingStore(), some, height)


def test_deleting_what_is_not_there_changes_nothing() -> None:
    store = CountingStore()
    assert update(store, NOTHING, 2, {(500, 3): None}) == NOTHING
    root = update(store, NOTHING, 2, {(1, 1): entry(1)})
    assert update(store, root, 2, {(500, 3): None}) == root


def test_looking_outside_the_covered_cells_finds_nothing() -> None:
    store = CountingStore()
    root = update(store, NOTHING, 0, {(0, 0): entry(1)})
    assert get(store, root, 0, 8, 0) is None
    assert get(store, root, 0, 0, 64) is None
    assert get(store, NOTHING, 3, 0, 0) is None


def test_one_change_writes_one_page_per_height_and_shares_the_rest() -> None:
    store = CountingStore()
    cells = {(row, column): entry(row * 600 + column) for row in range(0, 600, 7) for column in range(0, 600, 7)}
    root = built(store, cells, 3)
    before = len(store.pages)
    store.reset()
    update(store, root, 3, {(300, 300): entry(7)})
    assert len(store.put) == 4
    assert len(store.pages) == before + 4
    assert len(store.loaded) <= 4


@given(grids(), st.integers(0, 599), st.integers(0, 599), st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=100)
def test_a_window_shows_just_what_lies_in_it(grid: tuple[int, int, Grid], x: int, y: int, w: int, h: int) -> None:
    rows, columns, cells = grid
    height, store = page.root_height(rows, columns), CountingStore()
    root = built(store, cells, height)
    store.reset()
    found = listed(store, root, height, Box(x, y, w, h))
    wanted = {(r, c): one for (r, c), one in cells.items() if y <= r < y + h and x <= c < x + w}
    assert found == wanted
    # Of the level-0 pages only those that meet the window are read.
    touched = {(r // PAGE_SIDE, c // PAGE_SIDE) for r, c in cells}
    assert len(store.loaded) <= len(touched) * (height + 1)


@given(grids(), SIDES, SIDES)
@settings(max_examples=60)
def test_growing_reads_nothing_and_is_canonical(grid: tuple[int, int, Grid], rows: int, columns: int) -> None:
    own_rows, own_columns, cells = grid
    rows, columns = max(rows, own_rows), max(columns, own_columns)
    store = CountingStore()
    root = built(store, cells, page.root_height(own_rows, own_columns))
    store.reset()
    found, height = grow(store, root, page.root_height(own_rows, own_columns), rows, columns)
    assert not store.loaded
    assert found == built(CountingStore(), cells, height)


# -- diff of cells


@given(grids(), grids(), st.booleans())
@settings(max_examples=150)
def test_cell_diff_equals_brute_force(one: tuple[int, int, Grid], other: tuple[int, int, Grid], related: bool) -> None:
    store = CountingStore()
    before, after = one[2], {**one[2], **other[2]} if related else other[2]
    old_height = page.root_height(one[0], one[1])
    new_height = (
        page.root_height(max(one[0], other[0]), max(one[1], other[1])) if related else page.root_height(*other[:2])
    )
    old, new = built(store, before, old_height), built(store, after, new_height)
    found = list(diff.cells(store, old, old_height, new, new_height))
    wanted = {
        cell: (before.get(cell), after.get(cell))
        for cell in before.keys() | after.keys()
        if before.get(cell) != after.get(cell)
    }
    assert {(row, column): (was, now) for row, column, was, now in found} == wanted
    assert len(found) == len(wanted)


@given(st.sets(st.tuples(st.integers(0, 511), st.integers(0, 511)), min_size=1, max_size=5))
@settings(max_examples=30)
def test_a_diff_touches_only_pages_that_differ(changed: set[Cell]) -> None:
    store = STORE_512
    new = update(store, ROOT_512, 2, {cell: entry(999) for cell in changed})
    store.reset()
    found = list(diff.cells(store, ROOT_512, 2, new, 2))
    assert {(row, column) for row, column, _, _ in found} == changed
    pages = {(h, row // page.side(h), column // page.side(h)) for row, column in changed for h in range(3)}
    assert len(store.loaded) == 2 * len(pages)


STORE_512 = CountingStore()
ROOT_512 = update(
    STORE_512, NOTHING, 2, {(row, column): entry(row) for row in range(0, 512, 4) for column in range(0, 512, 4)}
)


def test_equal_roots_are_not_even_opened() -> None:
    STORE_512.reset()
    assert not list(diff.cells(STORE_512, ROOT_512, 2, ROOT_512, 2))
    assert not STORE_512.loaded


# -- the directory


def frame(number: int, *, version: int = 0, stream: str = "screen") -> Frame:
    return Frame(
        stream, f"frame {number}", "array", 10 + version, 10, 3, "uint8", 512, 512, 16, "mean", entry(number)[0], 0
    )


def keyed(frames: Sequence[Frame]) -> dict[tuple[str, str], Frame]:
    return {(one.stream, one.name): one for one in frames}


NUMBERS = st.sets(st.integers(0, 400), max_size=400) | st.sampled_from([63, 64, 65, 66, 128, 400]).map(
    lambda count: set(range(count))
)


@given(NUMBERS, st.sets(st.integers(0, 400), max_size=100), st.sets(st.integers(0, 400), max_size=400))
@settings(max_examples=40)
def test_the_directory_behaves_like_a_dict(there: set[int], changed: set[int], removed: set[int]) -> None:
    store = CountingStore()
    model = keyed([frame(n) for n in there])
    root = directory.update(store, directory.EMPTY, model)
    changes: dict[tuple[str, str], Frame | None] = dict(keyed([frame(n, version=1) for n in changed]))
    changes |= dict.fromkeys(keyed([frame(n) for n in removed]))
    root = directory.update(store, root, changes)
    for key, value in changes.items():
        if value is None:
            model.pop(key, None)
        else:
            model[key] = value
    assert keyed(list(directory.scan(store, root))) == model
    for number in range(0, 401, 13):
        key = ("screen", f"frame {number}")
        assert directory.find(store, root, key) == model.get(key)
    assert directory.find(store, root, ("other", "frame 1")) is None
    # The hash depends on what is there, not on how it came to be.
    assert root == directory.update(CountingStore(), directory.EMPTY, model)


@given(NUMBERS, st.integers(0, 2**16), st.integers(1, 50))
@settings(max_examples=25)
def test_one_directory_hash_in_whatever_order(there: set[int], seed: int, batch: int) -> None:
    one = directory.update(CountingStore(), directory.EMPTY, keyed([frame(n) for n in there]))
    order = np.random.default_rng(seed).permutation(sorted(there)).tolist()
    store, root = CountingStore(), directory.EMPTY
    for at in range(0, len(order), batch):
        root = directory.update(store, root, keyed([frame(n) for n in order[at : at + batch]]))
    assert root == one


def test_a_leaf_splits_above_64_frames_and_joins_below() -> None:
    store = CountingStore()
    root, roots = directory.EMPTY, [directory.EMPTY]
    for number in range(DIRECTORY_LEAF_RECORDS + 2):
        root = directory.update(store, root, keyed([frame(number)]))
        roots.append(root)
    assert isinstance(directory.children(store, roots[DIRECTORY_LEAF_RECORDS]), tuple)
    split = directory.children(store, roots[DIRECTORY_LEAF_RECORDS + 1])
    assert isinstance(split, Mapping)
    assert sum(count for _, count in split.values()) == DIRECTORY_LEAF_RECORDS + 1
    for number in reversed(range(DIRECTORY_LEAF_RECORDS + 2)):
        root = directory.update(store, root, {("screen", f"frame {number}"): None})
        assert root == roots[number]


@given(NUMBERS, NUMBERS, st.sets(st.integers(0, 400), max_size=30))
@settings(max_examples=40)
def test_directory_diff_equals_brute_force(one: set[int], other: set[int], changed: set[int]) -> None:
    store = CountingStore()
    before = keyed([frame(n) for n in one])
    after = keyed([frame(n, version=int(n in changed)) for n in other])
    old, new = (directory.update(store, directory.EMPTY, some) for some in (before, after))
    found = list(directory.diff(store, old, new))
    wanted = {
        key: (before.get(key), after.get(key))
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }
    assert {(f.stream, f.name): pair for pair in found for f in [pair[0] or pair[1]] if f is not None} == wanted
    assert len(found) == len(wanted)


def test_a_directory_diff_reads_only_the_branches_that_differ() -> None:
    store = CountingStore()
    old = directory.update(store, directory.EMPTY, keyed([frame(n) for n in range(2000)]))
    new = directory.update(store, old, keyed([frame(7, version=1)]))
    store.reset()
    assert len(list(directory.diff(store, old, new))) == 1
    assert len(store.loaded) <= 8


def test_a_damaged_directory_node_is_an_integrity_error() -> None:
    store = CountingStore()
    for payload in (b"HDL\x01\xff\xff", b"HDI\x01\x01\x00\x00\x00short", b"nonsense", b"HDL\x01\x91\x9d\xa2\xff\xfe"):
        blob = store.put_page(3, payload)
        with pytest.raises(IntegrityError):
            directory.children(store, blob)


def test_names_with_the_same_letters_have_different_paths() -> None:
    assert directory.path_of(("ab", "c")) != directory.path_of(("a", "bc"))
