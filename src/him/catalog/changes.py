"""What a batch changes in a snapshot's directory: pure over pages, the same result in whatever order."""

from collections.abc import Iterable, Mapping

import msgspec

from him.errors import ConflictError
from him.pyramid import directory, update
from him.pyramid.directory import FrameKey
from him.pyramid.page import PageStore, root_height
from him.types import BlobId, Entry, Frame


class FrameChange(msgspec.Struct, frozen=True):
    """Cells to put or (None) delete in one frame.

    `shape` tells extent, tile shape and dtype; its root is ignored. With `replace` the frame becomes exactly `shape`
    and `cells` (without cells it is removed); otherwise the extent only grows. `append` adds documents below the
    last row, wherever that is when the batch is committed.
    """

    shape: Frame
    cells: Mapping[tuple[int, int], BlobId | None]
    replace: bool = False
    append: tuple[BlobId, ...] = ()


def apply(store: PageStore, root: bytes, base: bytes, origin: bytes, changes: Iterable[FrameChange]) -> bytes:
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


def _changed(
    store: PageStore, current: Frame | None, base: Frame | None, origin: bytes, change: FrameChange
) -> Frame | None:
    shape = change.shape
    if change.replace or current is None:
        height, width = shape.height, shape.width
    else:
        _check_same_shape(current, shape)
        height, width = max(current.height, shape.height), max(current.width, shape.width)
    first_free = 0 if current is None else current.rows
    height = max(height, (first_free + len(change.append)) * shape.tile_height if change.append else 0)
    put = dict(change.cells) | {(first_free + i, 0): blob for i, blob in enumerate(change.append)}
    frame = msgspec.structs.replace(shape, height=height, width=width)
    if current is not None and not change.replace and (height, width) == (current.height, current.width):
        # A tile put into a frame of the same extent leaves what the whole frame is bound to.
        frame = msgspec.structs.replace(frame, attributes=current.attributes)
    keep = current is not None and (not change.replace or _same_grid(current, shape))
    pages, at = (current.root, current.root_height) if keep and current is not None else (update.NOTHING, 0)
    pages, at = update.resize(store, pages, at, frame.rows, frame.columns, cut=change.replace)
    cells: dict[tuple[int, int], Entry | None] = {}
    if change.replace and pages:
        cells = {(row, column): None for row, column, _ in update.scan(store, pages, at) if (row, column) not in put}
    inherit = base if base is not None and _same_grid(base, shape) else None
    for (row, column), blob in put.items():
        entry = None if blob is None else Entry(blob, origin)
        if entry is not None and inherit is not None:
            theirs = update.get(store, inherit.root, inherit.root_height, row, column)
            if theirs is not None and theirs.blob_id == blob:
                entry = theirs
        cells[row, column] = entry
    if cells:
        pages = update.update(store, pages, at, cells)
    if not pages:
        return None
    return msgspec.structs.replace(frame, root=pages, root_height=root_height(frame.rows, frame.columns))


def _same_grid(one: Frame, other: Frame) -> bool:
    return (one.tile_height, one.tile_width, one.content) == (other.tile_height, other.tile_width, other.content)


def _check_same_shape(current: Frame, shape: Frame) -> None:
    for field in ("content", "dtype", "channels", "tile_height", "tile_width", "level_rule", "halo"):
        if getattr(current, field) != getattr(shape, field):
            raise ConflictError(
                f"the frame has {field} {getattr(current, field)!r}, not {getattr(shape, field)!r}",
                object=str(current),
                fix="write to another frame, or replace the whole frame",
            )
