"""Reading and copy-on-write updating of one frame's pages: get, look up, scan, update, grow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from him.config import PAGE_SIDE
from him.pyramid import page
from him.pyramid.page import CELL_BYTES, Page, PagesStore, PageStore, load
from him.tile.address import KIND_PAGE
from him.types import Box, Entry, Secret

Cell = tuple[int, int]
"""(row, column) of a tile at level 0."""
NOTHING = b""
"""The root of a frame without tiles: empty pages vanish."""
SIDE_BITS: Final = PAGE_SIDE.bit_length() - 1
"""A cell's row or column shifted right by these is its leaf's."""
_SLOT_BITS: Final = 2 * SIDE_BITS
_SLOTS: Final = PAGE_SIDE * PAGE_SIDE


class Cells(NamedTuple):
    """Cells of one frame as columns of a table: rows and columns (n) int64, raw entries (n, 48), presence (n).

    An absent one is to be deleted. Millions of cells fit where as many Python objects would not.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    raw: NDArray[np.uint8]
    present: NDArray[np.bool_]

    @staticmethod
    def of(cells: Mapping[Cell, Entry | None]) -> "Cells":
        """The same cells, in the mapping's order."""
        places = np.array(list(cells), dtype=np.int64).reshape(-1, 2)
        absent = bytes(CELL_BYTES)
        raw = b"".join(absent if value is None else page.raw_entry(value) for value in cells.values())
        present = np.fromiter((value is not None for value in cells.values()), dtype=np.bool_, count=len(cells))
        table = np.frombuffer(bytearray(raw), dtype=np.uint8).reshape(-1, CELL_BYTES)
        return Cells(places[:, 0], places[:, 1], table, present)


def get(store: PageStore, root: bytes, height: int, row: int, column: int) -> Entry | None:
    """The entry at a cell, or None where nothing was put."""
    leaf = leaf_at(store, root, height, row >> SIDE_BITS, column >> SIDE_BITS)
    return None if leaf is None else in_leaf(leaf, row, column)


def leaf_at(store: PageStore, root: bytes, height: int, row: int, column: int) -> Page | None:
    """The page of height 0 at a row and column of such pages, or None where nothing was put."""
    if not root or (row | column) >> (SIDE_BITS * height):
        return None
    for step in range(height, 0, -1):
        down = SIDE_BITS * (step - 1)
        slot = (row >> down & PAGE_SIDE - 1) << SIDE_BITS | column >> down & PAGE_SIDE - 1
        below = load(store, root, step).ref(slot)
        if below is None:
            return None
        root = below
    return load(store, root, 0)


def bring(
    store: PageStore, have: Callable[[Sequence[bytes]], object], root: bytes, height: int, leaves: Sequence[Cell]
) -> None:
    """Call `have` with the pages on the way to pages of height 0 (row, column), a level at a time from the top."""
    below = {leaf: root for leaf in leaves if root and not (leaf[0] | leaf[1]) >> (SIDE_BITS * height)}
    for step in range(height, -1, -1):
        have(list(dict.fromkeys(below.values())))
        if step:
            down, above, below = SIDE_BITS * (step - 1), below, {}
            for (row, column), blob in above.items():
                slot = (row >> down & PAGE_SIDE - 1) << SIDE_BITS | column >> down & PAGE_SIDE - 1
                if (found := load(store, blob, step).ref(slot)) is not None:
                    below[row, column] = found


def in_leaf(leaf: Page, row: int, column: int) -> Entry | None:
    """The entry at a cell of the page of height 0 that covers it, or None."""
    raw = leaf.get((row & PAGE_SIDE - 1) << SIDE_BITS | column & PAGE_SIDE - 1)
    return None if raw is None else leaf.entry(raw)


def look_up(
    store: PagesStore, root: bytes, height: int, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Raw entries (n, 48) at many cells, zeros where nothing was put, and which are present (n)."""
    raw = np.zeros((len(rows), CELL_BYTES), dtype=np.uint8)
    present = np.zeros(len(rows), dtype=np.bool_)
    inside = np.flatnonzero((rows | columns) >> (SIDE_BITS * (height + 1)) == 0)
    if not root or not len(inside):
        return raw, present
    keys = _paths(rows[inside], columns[inside], height)
    leaves = _touched(store, root, height, np.unique(keys))[0]
    for at, key in zip(inside.tolist(), keys.tolist(), strict=True):
        leaf = leaves[key >> _SLOT_BITS]
        found = None if leaf is None else leaf.get(key & _SLOTS - 1)
        if found is not None:
            raw[at] = np.frombuffer(found, dtype=np.uint8)
            present[at] = True
    return raw, present


def scan(
    store: PageStore, root: bytes, height: int, window: Box | None = None, at: Cell = (0, 0)
) -> Iterator[tuple[int, int, Entry]]:
    """(row, column, entry) of present cells, page by page in row-major order within each.

    Args:
        window: cells to visit, as a Box of columns and rows; all when left out.
        at: the first cell the root covers.
    """
    if not root:
        return
    step, found = page.side(height) // PAGE_SIDE, load(store, root, height)
    for slot, raw in found.slots():
        row, column = at[0] + slot // PAGE_SIDE * step, at[1] + slot % PAGE_SIDE * step
        if window is not None and not Box(column, row, step, step).intersection(window).area:
            continue
        if height == 0:
            yield row, column, found.entry(raw)
        else:
            yield from scan(store, found.refers(raw), height - 1, window, (row, column))


def update(
    store: PagesStore, root: bytes, height: int, changes: Cells | Mapping[Cell, Entry | None], *,
    encrypted: bool = False,
) -> bytes:  # fmt: skip
    """The root after putting (or deleting) cells; NOTHING when no cell is left.

    Every change must lie within the cells that `height` covers, each cell at most once. Untouched pages are shared.
    The touched pages are read from the top down and written from the bottom up, a level at a time.
    """
    cells = changes if isinstance(changes, Cells) else Cells.of(changes)
    if not len(cells.rows):
        return root
    keys = _paths(cells.rows, cells.columns, height)
    order = np.argsort(keys, kind="stable")
    keys, raw, present = keys[order], cells.raw[order], cells.present[order]
    old = _touched(store, root, height, keys)
    payloads = _leaves(old[0], keys, raw, present, encrypted=encrypted)
    for step in range(height + 1):
        changed = [path for path, payload in payloads.items() if payload]
        hashes: dict[int, bytes] = dict.fromkeys(payloads, NOTHING)
        made = store.put_pages(KIND_PAGE, [payloads[path] for path in changed], encrypted=encrypted)
        hashes.update(zip(changed, made, strict=True))
        if step == height:
            return hashes[0]
        above: dict[int, list[tuple[int, bytes | None]]] = {}
        for path, blob in hashes.items():
            above.setdefault(path >> _SLOT_BITS, []).append((path & _SLOTS - 1, blob or None))
        pages = old[step + 1]
        payloads = {path: _edited(pages[path], step + 1, slots, encrypted) for path, slots in above.items()}
    raise AssertionError("the loop ends at the root")


def grow(store: PageStore, root: bytes, height: int, rows: int, columns: int) -> tuple[bytes, int]:
    """(root, height) of the same cells in a frame that has become at least rows × columns tiles large."""
    wanted = page.root_height(rows, columns)
    while height < wanted:
        if root:
            encrypted = isinstance(root, Secret)
            payload = page.encode(height + 1, {0: root}, encrypted=encrypted)
            root = store.put_page(KIND_PAGE, payload, encrypted=encrypted)
        height += 1
    return root, height


# -- inner


def _paths(rows: NDArray[np.int64], columns: NDArray[np.int64], height: int) -> NDArray[np.uint64]:
    """The way from the root to each cell: the slots taken, six bits each, the root's first.

    Shifted right by six bits, the path of a cell is that of its page, and so on up; sorted, it is Morton order
    between pages of one level.
    """
    keys = np.zeros(len(rows), dtype=np.int64)
    for step in range(height, -1, -1):
        down = SIDE_BITS * step
        keys = keys << _SLOT_BITS | (rows >> down & PAGE_SIDE - 1) << SIDE_BITS | columns >> down & PAGE_SIDE - 1
    return keys.view(np.uint64)


def _touched(store: PagesStore, root: bytes, height: int, keys: NDArray[np.uint64]) -> list[dict[int, Page | None]]:
    """For each height the pages on the way to sorted cell paths, by page path; None where there is none yet."""
    found: list[dict[int, Page | None]] = [{} for _ in range(height + 1)]
    for step in range(height, -1, -1):
        paths = keys >> np.uint64(_SLOT_BITS * (step + 1))
        wanted: dict[int, bytes | None] = {}
        for path in paths[np.flatnonzero(np.diff(paths, prepend=~paths[:1]))].tolist():
            parent = found[step + 1][path >> _SLOT_BITS] if step < height else None
            wanted[path] = root if step == height else parent and parent.ref(path & _SLOTS - 1)
        found[step] = {path: load(store, blob, step) if blob else None for path, blob in wanted.items()}
    return found


def _leaves(
    old: Mapping[int, Page | None], keys: NDArray[np.uint64], raw: NDArray[np.uint8], present: NDArray[np.bool_], *,
    encrypted: bool,
) -> dict[int, bytes]:  # fmt: skip
    """New payloads of the touched leaf pages, by page path."""
    paths = keys >> np.uint64(_SLOT_BITS)
    starts = np.flatnonzero(np.diff(paths, prepend=~paths[:1]))
    slots = keys & np.uint64(_SLOTS - 1)
    bitmaps = np.bitwise_or.reduceat(np.uint64(1) << slots, starts).tolist()
    whole = np.logical_and.reduceat(present, starts).tolist()
    bounds = [*starts.tolist(), len(keys)]
    data, numbers, kept = raw.tobytes(), slots.tolist(), present.tolist()
    payloads: dict[int, bytes] = {}
    for number, path in enumerate(paths[starts].tolist()):
        start, end = bounds[number], bounds[number + 1]
        page_before = old[path]
        if page_before is None and whole[number]:
            entries = data[start * CELL_BYTES : end * CELL_BYTES]
            payloads[path] = page.assembled(0, bitmaps[number], entries, encrypted=encrypted)
            continue
        changes = [
            (numbers[at], data[at * CELL_BYTES : (at + 1) * CELL_BYTES] if kept[at] else None)
            for at in range(start, end)
        ]
        payloads[path] = _edited(page_before, 0, changes, encrypted)
    return payloads


def _edited(before: Page | None, height: int, changes: list[tuple[int, bytes | None]], encrypted: bool) -> bytes:
    if before is not None:
        return before.edited(changes)
    put = {slot: raw for slot, raw in changes if raw is not None}
    return page.encode(height, put, encrypted=encrypted)
