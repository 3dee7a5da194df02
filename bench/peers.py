"""Stores that HIM is measured against, each behind the same three calls: write durably, read one tile, close.

Everybody gets the same array (tiles × rows, columns, channels) in chunks of one tile, and the same codec: zstd 1, or
none. All other settings are each store's own defaults; `settings` says what that means for checksums and durability. A
store that cannot be imported or made is reported with its error, never left out.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CHUNK = 512


class Layout(NamedTuple):
    """What is stored: `count` tiles of CHUNK × CHUNK × `channels`, compressed by zstd 1 or raw."""

    count: int
    channels: int
    dtype: str
    compressed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the whole array: tiles below one another."""
        return self.count * CHUNK, CHUNK, self.channels

    @property
    def chunk(self) -> tuple[int, int, int]:
        """Of one tile."""
        return CHUNK, CHUNK, self.channels


class Peer(Protocol):
    """One store, made empty in a folder of its own."""

    name: str
    settings: str

    def write(self, whole: Array) -> None:
        """Store the whole array; durable on return."""
        ...

    def read(self, number: int) -> Array:
        """One tile as values of its own."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


def span(number: int) -> slice:
    """The rows of one tile in the whole array."""
    return slice(number * CHUNK, (number + 1) * CHUNK)


def sync_all(folder: Path) -> None:
    """Fsync every file and folder below, eight at once: what makes stores durable that do not do it themselves."""

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(sync, [folder, *folder.rglob("*")]))


class Zarr:
    """zarr-python on its LocalStore, with the codec pipeline it comes with."""

    name = "zarr"
    settings = "LocalStore, no checksum; durable: fsync of all files by the benchmark"
    pipeline = "zarr.core.codec_pipeline.BatchedCodecPipeline"

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._zarr: Any = importlib.import_module("zarr")
        self._folder = folder
        # The pipeline is chosen when an array is made, not when it is read.
        with self._zarr.config.set({"codec_pipeline.path": self.pipeline}):
            store = self._zarr.storage.LocalStore(folder)
            self._array = _zarr_array(self._zarr, store, layout)
        used = type(self._array.async_array.codec_pipeline)
        if used.__name__ != self.pipeline.rpartition(".")[2]:
            raise RuntimeError(f"zarr took the codec pipeline {used.__name__} instead of {self.pipeline}")

    def write(self, whole: Array) -> None:
        self._array[:] = whole
        sync_all(self._folder)

    def read(self, number: int) -> Array:
        return self._array[span(number)]

    def close(self) -> None:
        self._array.store.close()


class ZarrRust(Zarr):
    """zarr-python with the codec pipeline of the Rust crate zarrs."""

    name = "zarr + zarrs"
    settings = "LocalStore, no checksum; durable: fsync of all files by the benchmark"
    pipeline = "zarrs.ZarrsCodecPipeline"

    def __init__(self, folder: Path, layout: Layout) -> None:
        importlib.import_module("zarrs")
        super().__init__(folder, layout)


class TensorStore:
    """TensorStore's zarr3 driver on files."""

    name = "tensorstore"
    settings = "zarr3 on files, no checksum, no cache; durable: file_io_sync (its default)"

    def __init__(self, folder: Path, layout: Layout) -> None:
        library: Any = importlib.import_module("tensorstore")
        codecs: list[dict[str, Any]] = [{"name": "bytes"}]
        if layout.compressed:
            codecs.append({"name": "zstd", "configuration": {"level": 1}})
        grid = {"name": "regular", "configuration": {"chunk_shape": layout.chunk}}
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder), "file_io_sync": True},
            "metadata": {"shape": layout.shape, "data_type": layout.dtype, "chunk_grid": grid, "codecs": codecs},
        }
        self._array = library.open(spec, create=True).result()

    def write(self, whole: Array) -> None:
        self._array.write(whole).result()

    def read(self, number: int) -> Array:
        return self._array[span(number)].read().result()

    def read_first(self, count: int) -> Array:
        """The first `count` tiles in one call, on the store's own threads."""
        return self._array[: count * CHUNK].read().result()

    def close(self) -> None:
        self._array = None


class Icechunk:
    """Icechunk on a local folder, read through zarr-python."""

    name = "icechunk"
    settings = "local file system, one commit, no checksum; durable: fsync of all files by the benchmark"

    def __init__(self, folder: Path, layout: Layout) -> None:
        zarr: Any = importlib.import_module("zarr")
        library: Any = importlib.import_module("icechunk")
        library.set_logs_filter("error")
        self._zarr, self._folder = zarr, folder
        self._repository = library.Repository.create(library.local_filesystem_storage(str(folder)))
        session = self._repository.writable_session("main")
        _zarr_array(zarr, session.store, layout, name="a")
        session.commit("empty")
        self._array: Any = None

    def write(self, whole: Array) -> None:
        session = self._repository.writable_session("main")
        self._zarr.open_array(session.store, path="a")[:] = whole
        session.commit("tiles")
        sync_all(self._folder)
        self._array = None

    def read(self, number: int) -> Array:
        if self._array is None:
            session = self._repository.readonly_session("main")
            self._array = self._zarr.open_array(session.store, path="a", mode="r")
        return self._array[span(number)]

    def close(self) -> None:
        self._array = None


class TileDb:
    """TileDB's dense array."""

    name = "tiledb"
    settings = "dense array, no checksum filter; durable: fsync of all files by the benchmark"

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._library: Any = importlib.import_module("tiledb")
        self._folder, self._opened = folder, None
        library = self._library
        axes = zip("yxc", layout.shape, layout.chunk, strict=True)
        domain = library.Domain(
            *(library.Dim(name=n, domain=(0, length - 1), tile=tile, dtype=np.int32) for n, length, tile in axes)
        )
        filters = library.FilterList([library.ZstdFilter(level=1)] if layout.compressed else [])
        value = library.Attr(name="v", dtype=np.dtype(layout.dtype), filters=filters)
        library.Array.create(str(folder), library.ArraySchema(domain=domain, attrs=[value]))

    def write(self, whole: Array) -> None:
        with self._library.open(str(self._folder), "w") as array:
            array[:] = whole
        sync_all(self._folder)

    def read(self, number: int) -> Array:
        if self._opened is None:
            self._opened = self._library.open(str(self._folder))
        found = self._opened[span(number)]
        return found["v"] if isinstance(found, dict) else found

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()


class Lance:
    """Lance: one row a tile in a column of bytes."""

    name = "lance"
    settings = "a row of large_binary a tile, no checksum; durable: fsync of all files by the benchmark"

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._library: Any = importlib.import_module("lance")
        arrow: Any = importlib.import_module("pyarrow")
        self._folder, self._layout, self._dataset = folder, layout, None
        packed = {"lance-encoding:compression": "zstd", "lance-encoding:compression-level": "1"}
        plain = {"lance-encoding:compression": "none"}
        field = arrow.field("v", arrow.large_binary(), metadata=packed if layout.compressed else plain)
        self._table = lambda rows: arrow.table([arrow.array(rows, type=field.type)], schema=arrow.schema([field]))

    def write(self, whole: Array) -> None:
        rows = [whole[span(number)].tobytes() for number in range(self._layout.count)]
        self._dataset = self._library.write_dataset(self._table(rows), str(self._folder))
        sync_all(self._folder)

    def read(self, number: int) -> Array:
        if self._dataset is None:
            self._dataset = self._library.dataset(str(self._folder))
        value = self._dataset.take([number], columns=["v"])["v"].chunk(0)[0].as_buffer()
        return np.frombuffer(value, dtype=self._layout.dtype).reshape(self._layout.chunk)

    def close(self) -> None:
        self._dataset = None


class Lmdb:
    """LMDB: a tile's bytes behind its number, compressed here."""

    name = "lmdb"
    settings = "one transaction, no checksum, values copied out of the map; durable: sync (its default)"

    def __init__(self, folder: Path, layout: Layout) -> None:
        library: Any = importlib.import_module("lmdb")
        import zstandard

        self._packer = zstandard.ZstdCompressor(level=1)
        self._unpacker = zstandard.ZstdDecompressor()
        self._layout = layout
        size = int(np.prod(layout.shape)) * np.dtype(layout.dtype).itemsize
        self._environment = library.open(str(folder), map_size=2 * size + (64 << 20))

    def write(self, whole: Array) -> None:
        with self._environment.begin(write=True) as transaction:
            for number in range(self._layout.count):
                tile = np.ascontiguousarray(whole[span(number)]).reshape(-1).view(np.uint8).data
                transaction.put(b"%08d" % number, self._packer.compress(tile) if self._layout.compressed else tile)

    def read(self, number: int) -> Array:
        with self._environment.begin(buffers=True) as transaction:
            found = transaction.get(b"%08d" % number)
            data = self._unpacker.decompress(found) if self._layout.compressed else np.array(found)
        return np.frombuffer(data, dtype=self._layout.dtype).reshape(self._layout.chunk)

    def close(self) -> None:
        self._environment.close()


def _zarr_array(zarr: Any, store: Any, layout: Layout, **more: Any) -> Any:
    packed = [importlib.import_module("zarr.codecs").ZstdCodec(level=1)] if layout.compressed else None
    return zarr.create_array(
        store=store, shape=layout.shape, chunks=layout.chunk, dtype=layout.dtype, compressors=packed, filters=None,
        fill_value=0, **more,
    )  # fmt: skip


PEERS: dict[str, Callable[[Path, Layout], Peer]] = {
    made.name: made for made in (TensorStore, ZarrRust, Zarr, Icechunk, TileDb, Lance, Lmdb)
}


def make(name: str, folder: Path, layout: Layout) -> Peer | str:
    """An empty store in a new folder, or why there is none."""
    folder.mkdir(parents=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PEERS[name](folder, layout)
    # Whatever a foreign library does on import or opening is its row's text, not the end of the others.
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
