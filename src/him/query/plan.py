"""Which tiles to read: coarse cells, regions of interest, and at most K tiles that cover them (spec §1.1, §9)."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from him.config import (
    ACCEPT_CONFIDENCE,
    ANSWER_CANDIDATES_MAX,
    COARSE_TILES_MAX,
    OCR_HALO_PX,
    SCREEN_TILE_PX,
    TILES_CAP,
    TILES_MAX,
)
from him.index import SnapshotRows
from him.query.goal import Goal
from him.query.score import Match
from him.query.source import QuerySource
from him.types import Box, PlannedTile, QueryPlan, Scene, TileKey, tile_id_text

STREAM: Final = "screen"
ROI_SHARE: Final = 70
"""Per cent of the best evidence that a match must have to become a region of interest."""


class Cell(NamedTuple):
    """A coarse tile and the best score under it."""

    frame: str
    level: int
    y: int
    x: int
    score: int


class Grid(NamedTuple):
    """Tiles of a frame at level 0, with its extent in pixels."""

    height: int
    width: int

    @property
    def rows(self) -> int:
        """Tile rows."""
        return max(1, -(-self.height // SCREEN_TILE_PX))

    @property
    def columns(self) -> int:
        """Tile columns."""
        return max(1, -(-self.width // SCREEN_TILE_PX))

    @property
    def apex(self) -> int:
        """The level with a single tile."""
        return (max(self.rows, self.columns) - 1).bit_length()

    def cells(self, box: Box) -> list[tuple[int, int]]:
        """(y, x) of every level-0 tile that `box` meets, nearest to its centre first, ties in row-major order."""
        left, top = max(0, box.x) // SCREEN_TILE_PX, max(0, box.y) // SCREEN_TILE_PX
        right = min(self.columns - 1, (box.x + max(1, box.w) - 1) // SCREEN_TILE_PX)
        low = min(self.rows - 1, (box.y + max(1, box.h) - 1) // SCREEN_TILE_PX)
        x, y = box.centre

        def away(cell: tuple[int, int]) -> tuple[int, tuple[int, int]]:
            dx = (2 * cell[1] + 1) * SCREEN_TILE_PX - 2 * x
            dy = (2 * cell[0] + 1) * SCREEN_TILE_PX - 2 * y
            return dx * dx + dy * dy, cell

        return sorted(((r, c) for r in range(top, low + 1) for c in range(left, right + 1)), key=away)


def grid_of(scene: Scene) -> Grid:
    """The tiles of the frame a scene was read from."""
    return Grid(scene.height, scene.width)


def coarse_cells(rows: SnapshotRows, occurrences: NDArray[np.int64], scores: NDArray[np.int64]) -> tuple[Cell, ...]:
    """The best ≤ COARSE_TILES_MAX cells of the second-highest level; a cell scores as its best row.

    The apexes (L(n)) are compared first: the best three cells of L(n−1) lie under the best three apexes, because
    the maximum of a cell is the maximum of its children. A frame of one tile is its own coarse cell.

    Args:
        rows: the visible rows.
        occurrences: (m,) occurrence numbers.
        scores: (m,) a score for each; those below 1 do not count.
    """
    keep = scores > 0
    occurrences, scores = occurrences[keep], scores[keep]
    if not len(occurrences):
        return ()
    frame = rows.frame[occurrences]
    best = np.zeros(len(rows.frames), dtype=np.int64)
    np.maximum.at(best, frame, scores)
    apexes = np.lexsort((np.arange(len(best)), -best))[:COARSE_TILES_MAX]
    found: list[Cell] = []
    for number in map(int, apexes):
        if best[number] <= 0:
            continue
        seen = rows.frames[number]
        grid = grid_of(seen.scene)
        level = max(0, grid.apex - 1)
        at = frame == number
        boxes = rows.boxes[occurrences[at]]
        y = np.clip((boxes[:, 1] + boxes[:, 3] // 2) // SCREEN_TILE_PX, 0, grid.rows - 1) >> level
        x = np.clip((boxes[:, 0] + boxes[:, 2] // 2) // SCREEN_TILE_PX, 0, grid.columns - 1) >> level
        cells = np.zeros(((grid.rows - 1 >> level) + 1, (grid.columns - 1 >> level) + 1), dtype=np.int64)
        np.maximum.at(cells, (y, x), scores[at])
        found += [
            Cell(seen.frame, level, int(cy), int(cx), int(cells[cy, cx])) for cy, cx in np.argwhere(cells).tolist()
        ]
    return tuple(sorted(found, key=lambda cell: (-cell.score, cell.frame, cell.y, cell.x))[:COARSE_TILES_MAX])


def tiles_to_read(cells: int, area_px: int, *, cap: int = TILES_MAX) -> int:
    """K: every cell that meets the regions and their halo, at most `cap`, never fewer than the spec's area formula."""
    by_area = -(-area_px // (SCREEN_TILE_PX * SCREEN_TILE_PX))
    return max(min(cap, cells), min(cap, by_area))


def _under(cell: Cell, frame: str, grid: Grid, box: Box) -> bool:
    x, y = box.centre
    column = min(max(x // SCREEN_TILE_PX, 0), grid.columns - 1) >> cell.level
    row = min(max(y // SCREEN_TILE_PX, 0), grid.rows - 1) >> cell.level
    return (cell.frame, cell.y, cell.x) == (frame, row, column)


def regions(
    rows: SnapshotRows, matches: Sequence[Match], cells: Sequence[Cell]
) -> tuple[list[tuple[str, Box]], list[tuple[str, int, int]]]:
    """(regions of interest best first, level-0 tiles (frame, y, x) to read for them).

    Regions lie under the coarse cells. The best one is read whole as far as TILES_CAP reaches; others join while
    TILES_MAX holds.
    """
    grids = {seen.frame: grid_of(seen.scene) for seen in rows.frames}
    rois: list[tuple[str, Box]] = []
    tiles: list[tuple[str, int, int]] = []
    for match in matches[:ANSWER_CANDIDATES_MAX]:
        if match.evidence * 100 < matches[0].evidence * ROI_SHARE:
            break
        grid = grids[match.frame]
        if not any(_under(cell, match.frame, grid, match.box) for cell in cells):
            continue
        around = match.box.grown(OCR_HALO_PX)
        wanted = [(match.frame, y, x) for y, x in grid.cells(around)]
        wanted = [tile for tile in wanted if tile not in tiles]
        count = tiles_to_read(len(wanted), around.area, cap=TILES_MAX if rois else TILES_CAP)
        if rois and len(tiles) + len(wanted) > TILES_MAX:
            break
        rois.append((match.frame, match.box))
        tiles += wanted[:count]
    return rois, tiles


def make(
    goal: Goal,
    source: QuerySource,
    rows: SnapshotRows,
    matches: Sequence[Match],
    cells: Sequence[Cell],
    *,
    frame: str | None,
    snapshot_id: str,
    directory: str,
    budget_ms: int,
) -> QueryPlan:
    """The plan for matches that were scored; absent tiles are left out.

    Raises:
        IntegrityError: a page on the way to a tile is damaged.
    """
    rois, places = regions(rows, matches, cells)
    planned: list[PlannedTile] = []
    for name, y, x in places:
        key = TileKey(STREAM, name, 0, y, x)
        if source.entry(key) is not None:
            planned.append(PlannedTile(tile_id_text(source.tile_id(key)), STREAM, name, 0, x, y))
    return QueryPlan(
        goal=goal.raw,
        snapshot_id=snapshot_id,
        directory=directory,
        frame=frame,
        tiles=tuple(planned),
        coarse=tuple((cell.frame, cell.level, cell.y, cell.x, cell.score) for cell in cells),
        rois=tuple(rois),
        acceptance=ACCEPT_CONFIDENCE,
        budget_ms=budget_ms,
    )
