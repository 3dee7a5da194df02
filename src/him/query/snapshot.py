"""A snapshot as the read path's source: rows from stored scenes and vectors, tiles verified on the way out."""

from collections import OrderedDict
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.catalog.reader import SnapshotReader
from him.config import EMBEDDING_DIMS
from him.errors import IntegrityError, NotFoundError, VersionError
from him.index import FrameScene, SnapshotRows
from him.perception.scene import SCENE_VERSION
from him.types import MALFORMED, Entry, Scene, TileKey

_SCENES_KEPT: Final = 4096
_SNAPSHOTS_KEPT: Final = 16


class RowCache:
    """Parsed scenes by content and rows by (directory, frame): both are pure, so a stale one cannot be found."""

    def __init__(self) -> None:
        self._scenes: OrderedDict[bytes, FrameScene] = OrderedDict()
        self._rows: OrderedDict[tuple[bytes, str | None], SnapshotRows] = OrderedDict()

    def rows(self, reader: SnapshotReader, frame: str | None) -> SnapshotRows:
        """Rows of one frame, or of all that have a scene."""
        key = (reader.directory, frame)
        known = self._rows.get(key)
        if known is None:
            names = [frame] if frame is not None else [one.name for one in reader.frames("scene")]
            known = SnapshotRows.of([self._scene(reader, name) for name in names])
            self._rows[key] = known
            if len(self._rows) > _SNAPSHOTS_KEPT:
                self._rows.popitem(last=False)
        return known

    def _scene(self, reader: SnapshotReader, name: str) -> FrameScene:
        try:
            record = reader.frame("scene", name)
        except NotFoundError as error:
            raise NotFoundError(
                f"no screen is called {name!r} in this snapshot", object=name, fix="list them: `him tiles ls`"
            ) from error
        try:
            vectors_root = reader.frame("emb", name).root
        except NotFoundError:
            vectors_root = b""
        key = record.root + vectors_root + name.encode()
        known = self._scenes.get(key)
        if known is None:
            known = self._scenes[key] = _parsed(reader, name, with_vectors=bool(vectors_root))
            if len(self._scenes) > _SCENES_KEPT:
                self._scenes.popitem(last=False)
        return known


class _Version(msgspec.Struct):
    version: int


def _parsed(reader: SnapshotReader, name: str, *, with_vectors: bool) -> FrameScene:
    try:
        document = reader.document("scene", name)
        version = msgspec.json.decode(document, type=_Version).version
        if version > SCENE_VERSION:
            raise VersionError(
                f"the scene has version {version}, this software knows {SCENE_VERSION}", object=f"scene:{name}"
            )
        scene = msgspec.json.decode(document, type=Scene)
    except MALFORMED as error:
        raise IntegrityError(f"a scene does not parse: {error}", object=f"scene:{name}") from error
    vectors = np.zeros((0, EMBEDDING_DIMS), dtype=np.int8)
    if with_vectors:
        vectors = reader.array("emb", name).astype(np.int8, copy=False)
    if vectors.shape != (len(scene.nodes), EMBEDDING_DIMS):
        raise IntegrityError(f"{len(scene.nodes)} elements have vectors of shape {vectors.shape}", object=f"emb:{name}")
    return FrameScene(name, scene, vectors)


class SnapshotSource:
    """`query.QuerySource` over one snapshot at one directory hash."""

    def __init__(self, reader: SnapshotReader, cache: RowCache) -> None:
        self._reader = reader
        self._cache = cache

    def rows(self, frame: str | None) -> SnapshotRows:
        """Visible rows; kept while the directory stays the same."""
        return self._cache.rows(self._reader, frame)

    def entry(self, key: TileKey) -> Entry | None:
        """What a cell holds, or None."""
        return self._reader.entry(key)

    def tile_id(self, key: TileKey) -> bytes:
        """Identity of a present tile."""
        return self._reader.tile_id(key)

    def tile(self, key: TileKey) -> NDArray[np.uint8]:
        """Verified values."""
        values = self._reader.tile(key)
        if isinstance(values, bytes) or values.dtype != np.uint8:
            raise IntegrityError("a screen's tile holds no picture", object=str(key))
        return values.view(np.uint8)
