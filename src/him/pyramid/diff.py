"""What differs between two frames or two directories, descending only where hashes differ."""

from collections.abc import Iterator

from him.config import PAGE_SIDE
from him.pyramid import page
from him.pyramid.page import PageStore, load
from him.pyramid.update import NOTHING, Cell
from him.types import Entry


def cells(
    store: PageStore, old: bytes, old_height: int, new: bytes, new_height: int, at: Cell = (0, 0)
) -> Iterator[tuple[int, int, Entry | None, Entry | None]]:
    """(row, column, old entry, new entry) of cells that differ between two roots."""
    height = max(old_height, new_height)
    if old == new and old_height == new_height:
        return
    before, after = _slots(store, old, old_height, height), _slots(store, new, new_height, height)
    step = page.side(height) // PAGE_SIDE
    for slot in sorted(before.keys() | after.keys()):
        was, now = before.get(slot, (NOTHING, height - 1)), after.get(slot, (NOTHING, height - 1))
        if was == now:
            continue
        row, column = at[0] + slot // PAGE_SIDE * step, at[1] + slot % PAGE_SIDE * step
        if height == 0:
            yield row, column, page.entry(was[0]) if was[0] else None, page.entry(now[0]) if now[0] else None
        else:
            yield from cells(store, was[0], was[1], now[0], now[1], (row, column))


def _slots(store: PageStore, root: bytes, own_height: int, height: int) -> dict[int, tuple[bytes, int]]:
    """Slots of a root seen from `height`: a lower root is the first slot of an imagined page."""
    if not root:
        return {}
    if own_height < height:
        # An imagined parent holds the lower root whole; its height travels with it.
        return {0: (root, own_height)}
    return {slot: (raw, height - 1) for slot, raw in load(store, root, height).slots()}
