"""Put fetched tiles together: one working buffer a region, and which tiles changed since they were read."""

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.config import OCR_HALO_PX, SCREEN_TILE_PX
from him.index import SnapshotRows
from him.query.fetch import Tiles
from him.query.plan import STREAM, grid_of
from him.query.source import QuerySource
from him.types import Box, QueryPlan, Scene, TileKey

INSET_PX: Final = 2
INK_STEP: Final = 40
"""Difference from the background, of 255, from which a pixel is ink."""
BORDER_SHARE: Final = 0.95
INK_SAMPLES: Final = 10_000
"""Pixels that decide the background."""
INK_AREA_MAX: Final = 512 * 1024
"""Pixels of a box that are looked at; a larger one is no line of text."""

Place = tuple[str, int, int]
"""(frame, y, x) of a level-0 tile."""


class Buffer(msgspec.Struct, frozen=True):
    """Pixels around a region: `pixels` is (h, w, channels); `box` says where; `whole` if every tile was there."""

    frame: str
    box: Box
    pixels: NDArray[np.uint8]
    whole: bool


class State(msgspec.Struct, frozen=True):
    """What a query has in hand after reading.

    Attributes:
        rows: the visible rows the plan was made from.
        buffers: one a region of interest, in the plan's order.
        read: tiles that were fetched and verified.
        stale: tiles whose content is no longer what the scene was read from.
    """

    rows: SnapshotRows
    plan: QueryPlan
    buffers: tuple[Buffer, ...]
    read: frozenset[Place]
    stale: frozenset[Place]

    def scene(self, frame: str) -> Scene:
        """The scene of a frame."""
        return next(seen.scene for seen in self.rows.frames if seen.frame == frame)

    def buffer(self, frame: str, box: Box) -> Buffer | None:
        """The working buffer that holds all of `box`, if it was read whole."""
        return next(
            (one for one in self.buffers if one.whole and one.frame == frame and box.intersection(one.box) == box), None
        )

    def is_stale(self, frame: str, box: Box) -> bool:
        """Whether a tile that `box` or its halo meets changed since the scene was read."""
        cells = grid_of(self.scene(frame)).cells(box.grown(OCR_HALO_PX))
        return any((frame, y, x) in self.stale for y, x in cells)

    def is_read(self, frame: str, box: Box) -> bool:
        """Whether the tile under the middle of `box` was fetched (a plan reads those around it as K allows)."""
        cells = grid_of(self.scene(frame)).cells(box)
        return bool(cells) and (frame, *cells[0]) in self.read


def letters(box: Box, buffer: Buffer) -> Box:
    """The part of `box` that differs from its background, as seen in the buffer; `box` itself when nothing does.

    A tree gives a heading or a cell the width of its column; what a person means, and points at, are its letters.
    """
    inner = Box(box.x + INSET_PX, box.y + INSET_PX, box.w - 2 * INSET_PX, box.h - 2 * INSET_PX)
    if inner.w <= 0 or inner.h <= 0 or inner.area > INK_AREA_MAX or inner.intersection(buffer.box) != inner:
        return box
    left, top = inner.x - buffer.box.x, inner.y - buffer.box.y
    pixels = buffer.pixels[top : top + inner.h, left : left + inner.w].astype(np.int16)
    samples = pixels.reshape(-1, pixels.shape[2])
    ground = np.median(samples[:: 1 + len(samples) // INK_SAMPLES], axis=0)
    ink = (np.abs(pixels - ground) > INK_STEP).any(axis=2)
    # A line across the whole box is a border.
    ink &= ~(ink.mean(axis=1) > BORDER_SHARE)[:, None]
    ys, xs = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(ys):
        return box
    return Box(inner.x + int(xs[0]), inner.y + int(ys[0]), int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1)


def stale_tiles(rows: SnapshotRows, source: QuerySource, frames: Iterable[str]) -> frozenset[Place]:
    """Tiles of `frames` whose entry is not the blob the scene names (or that came or went since)."""
    wanted = set(frames)
    out: set[Place] = set()
    for seen in rows.frames:
        if seen.frame not in wanted:
            continue
        for y, x, blob in seen.scene.tiles:
            entry = source.entry(TileKey(STREAM, seen.frame, 0, y, x))
            if entry is None or entry.ref.hex() != blob:
                out.add((seen.frame, y, x))
    return frozenset(out)


def fuse(
    plan: QueryPlan, tiles: Tiles, source: QuerySource, *, rows: SnapshotRows | None = None, frames: Sequence[str] = ()
) -> State:
    """Working buffers of the plan's regions, and the freshness of the scenes behind them.

    Args:
        plan: what was planned.
        tiles: what `fetch` returned.
        source: where the scenes came from.
        rows: the rows the plan was made from; read again from `source` when left out.
        frames: further frames whose scenes are to be compared with their tiles.

    Raises:
        IntegrityError: a page is damaged.
    """
    rows = source.rows(plan.frame) if rows is None else rows
    buffers = tuple(_buffer(rows, frame, box, tiles) for frame, box in plan.rois)
    stale = stale_tiles(rows, source, {*frames, *(frame for frame, _ in plan.rois)})
    read = frozenset((key.frame, key.y, key.x) for key in tiles)
    return State(rows, plan, buffers, read, stale)


def _buffer(rows: SnapshotRows, frame: str, box: Box, tiles: Tiles) -> Buffer:
    scene = next(seen.scene for seen in rows.frames if seen.frame == frame)
    area = box.grown(OCR_HALO_PX).intersection(Box(0, 0, scene.width, scene.height))
    channels = next((tile.shape[2] for tile in tiles.values() if tile.ndim == 3), 1)
    pixels = np.zeros((area.h, area.w, channels), dtype=np.uint8)
    missing = False
    for y, x in grid_of(scene).cells(area):
        tile = tiles.get(TileKey(STREAM, frame, 0, y, x))
        if tile is None:
            missing = True
            continue
        values = tile if tile.ndim == 3 else tile[:, :, None]
        place = Box(x * SCREEN_TILE_PX, y * SCREEN_TILE_PX, values.shape[1], values.shape[0])
        part = area.intersection(place)
        pixels[part.y - area.y : part.y - area.y + part.h, part.x - area.x : part.x - area.x + part.w] = values[
            part.y - place.y : part.y - place.y + part.h, part.x - place.x : part.x - place.x + part.w
        ]
    return Buffer(frame, area, pixels, not missing)
