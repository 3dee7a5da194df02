"""What the read path needs of storage, as one Protocol, so that decisions stay pure and tests need no disk."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from him.index import SnapshotRows
from him.types import Entry, TileKey


class QuerySource(Protocol):
    """Read access to one snapshot at one directory hash."""

    def rows(self, frame: str | None) -> SnapshotRows:
        """Rows of every frame with a scene, or of that frame alone.

        `SnapshotRows.of(scenes)` builds them; keep them while the directory stays the same. Raises NotFoundError
        when `frame` is named and unknown, IntegrityError when a scene or its vectors are damaged.
        """
        ...

    def entry(self, key: TileKey) -> Entry | None:
        """What a level-0 cell holds, or None."""
        ...

    def tile_id(self, key: TileKey) -> bytes:
        """The 32-byte tile id of a present cell."""
        ...

    def tile(self, key: TileKey) -> NDArray[np.uint8]:
        """The verified values of a tile at its true extent, (h, w, channels). Raises IntegrityError."""
        ...
