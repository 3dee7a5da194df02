"""Read the planned tiles, verified."""

import numpy as np
from numpy.typing import NDArray

from him.query.source import QuerySource
from him.types import QueryPlan, TileKey

Tiles = dict[TileKey, NDArray[np.uint8]]


def fetch(plan: QueryPlan, source: QuerySource) -> Tiles:
    """The values of every planned tile, (h, w, channels) each, in the plan's order.

    Raises:
        IntegrityError: a tile's bytes do not match their digest; nothing of it is returned.
    """
    return {tile.key: source.tile(tile.key) for tile in plan.tiles}
