"""Reading and copy-on-write updating of one frame's pages: get, scan, update, resize."""

from collections.abc import Iterator, Mapping

from him.config import PAGE_SIDE
from him.pyramid import page
from him.pyramid.page import PageStore
from him.tile.address import KIND_PAGE
from him.types import BlobId, Box, Entry

Cell = tuple[int, int]
"""(row, column) of a tile at level 0."""
NOTHING = b""
"""The root of a frame without tiles: empty pages vanish."""


def load(store: PageStore, root: bytes, height: int) -> page.Page:
    """The parsed page with this hash. Raises IntegrityError."""
    return page.decode(store.page(KIND_PAGE, BlobId(root)), height)


def get(store: PageStore, root: bytes, height: int, row: int, column: int) -> Entry | None:
    """The entry at a cell, or None where nothing was put."""
    if not root or max(row, column) >= page.side(height):
        return None
    while True:
        step = page.side(height) // PAGE_SIDE
        raw = load(store, root, height).get(row // step % PAGE_SIDE * PAGE_SIDE + column // step % PAGE_SIDE)
        if raw is None or height == 0:
            return None if raw is None else page.entry(raw)
        root, height = raw, height - 1


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
    step = page.side(height) // PAGE_SIDE
    for slot, raw in load(store, root, height).slots():
        row, column = at[0] + slot // PAGE_SIDE * step, at[1] + slot % PAGE_SIDE * step
        if window is not None and not Box(column, row, step, step).intersection(window).area:
            continue
        if height == 0:
            yield row, column, page.entry(raw)
        else:
            yield from scan(store, raw, height - 1, window, (row, column))


def update(store: PageStore, root: bytes, height: int, changes: Mapping[Cell, Entry | None]) -> bytes:
    """The root after putting (or, with None, deleting) cells; NOTHING when no cell is left.

    Every change must lie within the cells that `height` covers. Untouched pages are shared.
    """
    step = page.side(height) // PAGE_SIDE
    slots = dict(load(store, root, height).slots()) if root else {}
    if height == 0:
        for (row, column), value in changes.items():
            slot = row % PAGE_SIDE * PAGE_SIDE + column % PAGE_SIDE
            if value is None:
                slots.pop(slot, None)
            else:
                slots[slot] = page.raw_entry(value)
    else:
        below: dict[int, dict[Cell, Entry | None]] = {}
        for (row, column), value in changes.items():
            slot = row // step % PAGE_SIDE * PAGE_SIDE + column // step % PAGE_SIDE
            below.setdefault(slot, {})[row, column] = value
        for slot in sorted(below):
            child = update(store, slots.get(slot, NOTHING), height - 1, below[slot])
            if child:
                slots[slot] = child
            else:
                slots.pop(slot, None)
    return store.put_page(KIND_PAGE, page.encode(height, slots)) if slots else NOTHING


def resize(store: PageStore, root: bytes, height: int, rows: int, columns: int, *, cut: bool) -> tuple[bytes, int]:
    """(root, height) of the same cells in a frame of rows × columns tiles.

    Args:
        cut: remove what falls outside; not needed (and slower) where the frame only grows.
    """
    wanted = page.root_height(rows, columns)
    while height < wanted:
        root = store.put_page(KIND_PAGE, page.encode(height + 1, {0: root})) if root else NOTHING
        height += 1
    covered = page.side(height)
    outside = [
        window
        for window in (Box(columns, 0, covered - columns, covered), Box(0, rows, covered, covered - rows))
        if cut and root and window.area
    ]
    gone: dict[Cell, Entry | None] = {
        (row, column): None for window in outside for row, column, _ in scan(store, root, height, window)
    }
    if gone:
        root = update(store, root, height, gone)
    while height > wanted:
        root = (load(store, root, height).get(0) or NOTHING) if root else NOTHING
        height -= 1
    return root, height
