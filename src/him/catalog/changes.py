"""What a batch changes in a snapshot's directory: pure over pages, the same result in whatever order."""

from collections.abc import Iterable, Iterator, Mapping

import msgspec
import numpy as np

from him.errors import ConflictError
from him.pyramid import directory, update
from him.pyramid.directory import FrameKey
from him.pyramid.page import PagesStore, root_height
from him.pyramid.update import Cells
from him.types import Entry, Frame, Ref


class FrameChange(msgspec.Struct, frozen=True):
    """Cells to put or (None) delete in one frame.

    `shape` tells extent, tile shape and dtype; its root is ignored. With `replace` the frame becomes exactly `shape`
    and `cells` (without cells it is removed); otherwise the extent only grows. `append` adds documents below the
    last row, wherever that is when the batch is committed. Millions of cells come as a table, whose origins are
    ignored.
    """

    shape: Frame
    cells: Mapping[tuple[int, int], Ref | None] | Cells
    replace: bool = False
    append: tuple[Ref, ...] = ()


def apply(store: PagesStore, root: bytes, base: bytes, origin: bytes, changes: Iterable[FrameChange]) -> bytes:
    """The directory after the changes.

    Args:
        root: the open snapshot's directory.
        base: the first parent's directory at branching (or the empty one): a cell put with the parent's content
            keeps the parent's entry, so that writing the same again is no change.
        origin: 16 bytes of the snapshot that writes.

    Raises:
        ConflictError: a frame of that name has another dtype, tile shape or level rule.
    """
    result: dict[FrameKey, Frame | None] = {}
    for change in changes:
        key = (change.shape.stream, change.shape.name)
        current = result[key] if key in result else directory.find(store, root, key)
        result[key] = _changed(store, current, directory.find(store, base, key), origin, change)
    return directory.update(store, root, result)


def blobs(changes: Iterable[FrameChange]) -> Iterator[Ref]:
    """The tiles that changes put."""
    for change in changes:
        yield from change.append
        if isinstance(change.cells, Cells):
            raw = change.cells.raw[change.cells.present, :32]
            yield from (change.shape.ref(row.tobytes()) for row in raw)
        else:
            yield from (ref for ref in change.cells.values() if ref is not None)


def _changed(
    store: PagesStore, current: Frame | None, base: Frame | None, origin: bytes, change: FrameChange
) -> Frame | None:
    shape = change.shape
    if change.replace or current is None:
        height, width = shape.height, shape.width
    else:
        _check_same_shape(current, shape)
        height, width = max(current.height, shape.height), max(current.width, shape.width)
    first_free = 0 if current is None else current.rows
    height = max(height, (first_free + len(change.append)) * shape.tile_height if change.append else 0)
    frame = msgspec.structs.replace(shape, height=height, width=width)
    if current is not None and not change.replace and (height, width) == (current.height, current.width):
        # A tile put into a frame of the same extent leaves what the whole frame is bound to.
        frame = msgspec.structs.replace(frame, attributes=current.attributes)
    if current is None or change.replace:
        # Made from nothing, a frame that holds what it held gets the pages it had.
        pages, at = update.NOTHING, root_height(frame.rows, frame.columns)
    else:
        pages, at = update.grow(store, current.root, current.root_height, frame.rows, frame.columns)
    cells = _entries(store, base, origin, change, first_free)
    pages = update.update(store, pages, at, cells, encrypted=frame.encrypted)
    return msgspec.structs.replace(frame, root=pages, root_height=at) if pages else None


def _entries(store: PagesStore, base: Frame | None, origin: bytes, change: FrameChange, first_free: int) -> Cells:
    """The cells with their origins: this snapshot's, or that of the base's entry where it holds the same content."""
    if isinstance(change.cells, Cells):
        cells = change.cells._replace(raw=change.cells.raw.copy())
        cells.raw[:, 32:] = np.frombuffer(origin, dtype=np.uint8)
    else:
        put = dict(change.cells) | {(first_free + i, 0): ref for i, ref in enumerate(change.append)}
        cells = Cells.of({cell: None if ref is None else Entry(ref, origin) for cell, ref in put.items()})
    if base is None or not _same_grid(base, change.shape):
        return cells
    theirs, there = update.look_up(store, base.root, base.root_height, cells.rows, cells.columns)
    same = there & cells.present & (theirs[:, :32] == cells.raw[:, :32]).all(axis=1)
    cells.raw[same] = theirs[same]
    return cells


def _same_grid(one: Frame, other: Frame) -> bool:
    return all(
        getattr(one, field) == getattr(other, field) for field in ("tile_height", "tile_width", "content", "encrypted")
    )


def _check_same_shape(current: Frame, shape: Frame) -> None:
    for field in ("content", "dtype", "channels", "tile_height", "tile_width", "level_rule", "halo", "encrypted"):
        if getattr(current, field) != getattr(shape, field):
            raise ConflictError(
                f"the frame has {field} {getattr(current, field)!r}, not {getattr(shape, field)!r}",
                object=str(current),
                fix="write to another frame, or replace the whole frame",
            )
