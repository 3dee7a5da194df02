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
    if height == 0:
        was, now = _entries(store, old), _entries(store, new)
        for slot in sorted(was.keys() | now.keys()):
            if was.get(slot) != now.get(slot):
                yield at[0] + slot // PAGE_SIDE, at[1] + slot % PAGE_SIDE, was.get(slot), now.get(slot)
        return
    before, after = _below(store, old, old_height, height), _below(store, new, new_height, height)
    step = page.side(height) // PAGE_SIDE
    for slot in sorted(before.keys() | after.keys()):
        place = at[0] + slot // PAGE_SIDE * step, at[1] + slot % PAGE_SIDE * step
        nothing = NOTHING, height - 1
        yield from cells(store, *before.get(slot, nothing), *after.get(slot, nothing), place)


def _entries(store: PageStore, root: bytes) -> dict[int, Entry]:
    if not root:
        return {}
    found = load(store, root, 0)
    return {slot: found.entry(raw) for slot, raw in found.slots()}


def _below(store: PageStore, root: bytes, own_height: int, height: int) -> dict[int, tuple[bytes, int]]:
    """The pages below a root seen from `height`: a lower root is the first slot of an imagined page."""
    if not root:
        return {}
    if own_height < height:
        # An imagined parent holds the lower root whole; its height travels with it.
        return {0: (root, own_height)}
    found = load(store, root, height)
    return {slot: (found.refers(raw), height - 1) for slot, raw in found.slots()}
