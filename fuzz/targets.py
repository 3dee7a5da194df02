"""What is fed to each parser, and what it may do: return a value or raise a HimError, in bounded time and memory.

Most of what is parsed carries a digest, which mutations break at once. Digests have no key, so who writes hostile bytes
computes them too: each target parses its input as it is, and once more with its digests mended.
"""

import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from unittest import mock

import msgspec
import numpy as np

from fuzz import mended, seeds
from him import kv
from him.adapters import keyfile, pillow, png
from him.adapters.local import LocalDisk
from him.adapters.npy import NpyFile
from him.adapters.pillow import PillowDecoder
from him.adapters.png import PngFile
from him.catalog import checkpoint, marker
from him.catalog.log import END_PATH, LOG_PATH, FileLog, parsed
from him.crypto import encrypt_record, wrap
from him.errors import HimError, IntegrityError
from him.index.rows import labels, row_texts
from him.pack import format as layout
from him.pack import parity
from him.pack.encrypted import decrypted
from him.pack.file import read_footer, read_index, walk
from him.perception.scene import build
from him.perception.tree import parse_tree
from him.pyramid import directory, levels, page
from him.pyramid import update as cells
from him.query import snapshot as scenes
from him.query.plan import grid_of
from him.replay import trace
from him.tier.settings import TIER, tier_settings
from him.tile import chunks, codec, delta
from him.tile.address import KIND_TILE, blob_id
from him.types import BlobId, Box, Frame, PackFinished, PackRange, Scene

MEMORY_BYTES: Final = 1024**3
"""What a parser may take beside what the process has: tiles of TILE_BYTES_MAX (256 MiB) are unpacked in steps."""
SECONDS: Final = 10
"""After which one input hangs."""
_PIXELS_MAX: Final = 4 * 1024 * 1024
"""Instead of IMAGE_PIXELS_MAX, so that the memory above is far more than a picture within the limit takes."""
_DERIVED_KIB: Final = 4 * 1024
"""Argon2id is run up to here; above, what is checked is that it is asked for within its limits."""

T = TypeVar("T")
_NAME: Final = "packs/00.pack"


class Target(NamedTuple):
    """A parser: `check` raises nothing for any bytes, unless the contract is broken; `seeds` are inputs it accepts."""

    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def attempt(call: Callable[..., T], *given: Any) -> T | None:
    """What it returns, or None where it refuses."""
    try:
        return call(*given)
    except HimError:
        return None


@cache
def _folder() -> Path:
    memory = Path("/dev/shm")
    made = tempfile.TemporaryDirectory(prefix="him-fuzz-", dir=memory if memory.is_dir() else None)
    _kept.append(made)
    return Path(made.name)


_kept: Final[list[tempfile.TemporaryDirectory[str]]] = []
"""Removed when the process ends."""


@cache
def _disk() -> LocalDisk:
    """A real one: the one in memory does not mind sizes that a system call refuses."""
    disk = LocalDisk(_folder())
    for name in ("packs", "log", "spool"):
        (_folder() / name).mkdir()
    return disk


def _written(path: str, data: bytes) -> Path:
    _disk()
    (_folder() / path).write_bytes(data)
    return _folder() / path


class _One:
    """A store with one blob; whatever else is asked for is damaged."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def page(self, kind: int, ref: bytes) -> bytes:
        if ref != _ROOT:
            raise IntegrityError("not stored", object=ref.hex())
        return self.payload

    def parsed(self, kind: int, ref: bytes, parse: Callable[[bytes], T]) -> T:
        return parse(self.page(kind, ref))

    def put_page(self, kind: int, payload: bytes, *, encrypted: bool = False) -> BlobId:
        return _ROOT


_ROOT: Final = BlobId(b"\x01" * 32)


# -- packs


def _pack(data: bytes) -> None:
    for one in (data, mended.pack(data)):
        attempt(layout.check_file_header, one, _NAME)
        attempt(layout.decode_record, one, _NAME)
        attempt(layout.decode_rows, one, _NAME)
        _written(_NAME, one)
        with closing(_disk().open(_NAME)) as file:
            for offset, found in walk(file, _NAME, 0, len(one)):
                if not isinstance(found, HimError):
                    attempt(layout.decode_rows, found.stored, _NAME)
                    named = PackRange(_NAME, 0, offset, offset + found.header.record_size, found.meta[-32:])
                    attempt(read_index, file, named)
            end = attempt(layout.decode_trailer, one[-layout.TRAILER_BYTES :], _NAME)
            if end is not None:
                attempt(read_footer, file, PackFinished(_NAME, len(one), end[2]))


def _encrypted(data: bytes) -> None:
    kind, how, size, nonce, stored = data[:1], data[1:2], data[2:10], data[10:34], data[34:]
    fields = int.from_bytes(kind), int.from_bytes(how) % 8, int.from_bytes(size, "little"), bytes(16), bytes(16)
    attempt(decrypted, seeds.SECRET, *fields, nonce, stored)
    bound = fields[0].to_bytes() + fields[1].to_bytes() + fields[2].to_bytes(8, "little") + bytes(32)
    sealed = encrypt_record(seeds.SECRET, bound, stored)
    body = attempt(decrypted, seeds.SECRET, *fields, sealed.nonce + bytes(12), sealed.stored)
    if body is not None:
        attempt(codec.decode, body[0], fields[1], body[1])


def _parity(data: bytes) -> None:
    for one in (data, mended.parity(data)):
        path = _written("packs/00.parity", one[:96])
        at = 4096 * (1 + -(-int.from_bytes(one[24:32], "little") // 4096))
        if at < MEMORY_BYTES:
            with path.open("r+b") as file:  # What lies between is a hole.
                file.seek(at)
                file.write(one[96:])
        with closing(_disk().open("packs/00.parity")) as file:
            attempt(parity.read_head, file, f"packs/{one[48:64].hex()}.00.parity", one[32:48])


# -- pages and what names them


def _page(data: bytes) -> None:
    found = attempt(page.decode, data)
    if found is not None:
        slots = dict(found.slots())
        assert all(found.get(slot) == raw for slot, raw in slots.items())
        assert len(found.entries()) == len(found.names()) == len(slots)
        found.edited([(next(iter(slots)), None)])
        attempt(page.load, _One(data), _ROOT, found.height)


def _directory(data: bytes) -> None:
    store = _One(data)
    node = attempt(directory.children, store, _ROOT)
    if isinstance(node, tuple):
        for frame in node:
            _frame(store, frame)
        attempt(directory.update, store, _ROOT, {("screen", "x"): None})
    attempt(directory.find, store, _ROOT, ("screen", "x"))


def _frame(store: _One, frame: Frame) -> None:
    _ = frame.rows, frame.columns, str(frame)
    attempt(lambda: list(cells.scan(store, frame.root, frame.root_height, Box(0, 0, 8, 8))))


def _companion(data: bytes) -> None:
    attempt(levels.decode, _One(data), _ROOT)


# -- log, checkpoints, markers


def _log(data: bytes) -> None:
    record = attempt(parsed, 1, data)
    if record is not None:
        fold = checkpoint.Fold()
        fold.apply([(1, bytes(32), record)])
        checkpoint.encode(fold.state())
    for one in (data, mended.log(data)):
        for read_only in (True, False):
            _written(LOG_PATH, one[: -seeds.END_BYTES])
            _written(END_PATH, one[-seeds.END_BYTES :])
            log = attempt(partial(FileLog, read_only=read_only), _disk())
            if log is not None:
                attempt(_all, log)
                if not read_only:
                    attempt(log.commit, lambda: b"next")
                log.close()


def _all(log: FileLog) -> None:
    for seq, _, body in log.read(0):
        parsed(seq, body)


def _checkpoint(data: bytes) -> None:
    for one in (data, mended.checkpoint(data)):
        attempt(checkpoint.decode_head, one, "")
        found = attempt(checkpoint.decode_file, one, "")
        state = attempt(checkpoint.decode, found[1], found[0].seq) if found else None
        if state is not None:
            checkpoint.encode(checkpoint.Fold(state).state())


def _marker(data: bytes) -> None:
    for one in (data, mended.sealed(data)):
        attempt(marker.parsed, one, marker.MARKER)


def _tier(data: bytes) -> None:
    for one in (data, mended.sealed(data)):
        _written(TIER, one)
        attempt(tier_settings, _disk())


def _trace(data: bytes) -> None:
    key = bytes(32)
    body = wrap(key, b"tr_0", data)
    whole = {"version": 2, "trace_id": "tr_0", "snapshot_id": "", "key_id": "00", "body": body, "digest": ""}
    for one in (data, msgspec.json.encode(whole)):
        _written("spool/tr_0.json", one)
        attempt(trace.load, _disk(), "tr_0", lambda _id: key)
        attempt(lambda: list(trace.faults(_disk())))


# -- tiles


def _tile(data: bytes) -> None:
    how, size = int.from_bytes(data[:1]), int.from_bytes(data[1:3], "little")
    header, stored = data[3 : 3 + size], data[3 + size :]
    attempt(codec.shape_and_dtype, header)
    attempt(codec.decode, header, how % 4, stored)
    attempt(codec.values_of, header, stored)


def _delta(data: bytes) -> None:
    base, base_header = seeds.base()
    given = attempt(delta.unpack, data)
    if given is not None:
        attempt(delta.apply, given, base_header, base)
        head = attempt(codec.parse_header, given.header)
        made = head and attempt(delta.decode, given.codec, head, base, given.stored)
        if made is not None:
            named = blob_id(KIND_TILE, given.header, made).hex()
            attempt(delta.apply, msgspec.structs.replace(given, blob_id=named), base_header, base)
    head = codec.TileHeader("uint8", ((64, 64), (4096,), (32, 32, 4), (70, 64))[int.from_bytes(data[:1]) % 4])
    how = delta.BLOCKS + int.from_bytes(data[1:2]) % 3
    attempt(delta.decode_chain, base, [delta.Link(head, how, data[2:])])


def _chunk_list(data: bytes) -> None:
    size = int.from_bytes(data[:8], "little")
    attempt(chunks.decode_list, data[8:], size)
    rows = np.frombuffer(data[8 : 8 + (len(data) - 8) // 36 * 36], dtype=[("blob", "V32"), ("length", "<u4")])
    attempt(chunks.decode_list, rows.tobytes(), int(rows["length"].sum(dtype=np.int64)))


# -- what is seen


class _Reader:
    """A snapshot's reader that finds one scene, and as many vectors as it has nodes."""

    def __init__(self, document: bytes) -> None:
        self._document = document

    def document(self, stream: str, frame: str) -> bytes:
        return self._document

    def array(self, stream: str, frame: str) -> np.ndarray:
        return np.zeros((len(msgspec.json.decode(self._document, type=Scene).nodes), 384), dtype=np.int8)


def _scene(data: bytes) -> None:
    found = attempt(partial(scenes._parsed, with_vectors=True), _Reader(data), "frame")
    if found is not None:
        labels(found.scene), row_texts(found.scene)
        attempt(grid_of, found.scene)


def _tree(data: bytes) -> None:
    nodes = attempt(parse_tree, data)
    if nodes is not None:
        build((600, 800), (), (), nodes, {})


def _kv(data: bytes) -> None:
    attempt(kv._parsed, data, "cache")


# -- files that are given


def _keyring(data: bytes) -> None:
    for one in (data, mended.keyring(data)):
        _written("ring", one)
        with mock.patch.object(keyfile, "Argon2id", _Argon2id):
            wrapping = keyfile.Passphrase(seeds.PASSPHRASE, seeds.RNG)
            attempt(keyfile.KeyFile, _disk(), "ring", seeds.REPOSITORY_ID, wrapping, seeds.RNG)


_Real: Final = keyfile.Argon2id


class _Argon2id:
    """The real one; a derivation that takes long is not run, but has to be within the limits."""

    def __init__(self, **given: Any) -> None:
        memory, work = given["memory_cost"], given["memory_cost"] * given["iterations"]
        assert memory <= 512 * 1024 and work <= 4 * 1024 * 1024, f"a file may ask for {memory} KiB, {given}"
        self._real = _Real(**given)
        self._cheap = work <= _DERIVED_KIB

    def derive(self, passphrase: bytes) -> bytes:
        return self._real.derive(passphrase) if self._cheap else bytes(32)


def _npy(data: bytes) -> None:
    source = attempt(NpyFile, _written("array.npy", data))
    if source is not None:
        with closing(source):
            last = [min(side, 8) for side in source.shape]
            attempt(source.part, [0] * len(last), last)


def _png(data: bytes) -> None:
    for one in (data, mended.png(data)):
        path = _written("picture.png", one)
        png.is_large_png(path)
        with mock.patch.object(png, "IMAGE_BAND_BYTES", 256 * 1024):
            source = attempt(PngFile, path)
            if source is not None:
                with closing(source):
                    attempt(_rows, source)


def _rows(source: PngFile) -> None:
    source.check()
    height, width, channels = source.shape
    for row in range(0, min(height, 4096), 256):
        source.part([row, 0, 0], [min(row + 256, height), width, channels])


def _picture(data: bytes) -> None:
    with mock.patch.object(pillow, "IMAGE_PIXELS_MAX", _PIXELS_MAX):
        for one in (data, mended.png(data)):
            attempt(PillowDecoder().decode, one, "picture")


TARGETS: Final[dict[str, Target]] = {
    "pack": Target(_pack, seeds.packs),
    "encrypted": Target(_encrypted, seeds.encrypted),
    "parity": Target(_parity, seeds.parities),
    "page": Target(_page, seeds.pages),
    "directory": Target(_directory, seeds.directories),
    "companion": Target(_companion, seeds.companions),
    "log": Target(_log, seeds.logs),
    "checkpoint": Target(_checkpoint, seeds.checkpoints),
    "marker": Target(_marker, seeds.markers),
    "tier": Target(_tier, seeds.tiers),
    "trace": Target(_trace, seeds.traces),
    "tile": Target(_tile, seeds.tiles),
    "delta": Target(_delta, seeds.deltas),
    "chunks": Target(_chunk_list, seeds.chunk_lists),
    "scene": Target(_scene, seeds.scenes),
    "tree": Target(_tree, seeds.trees),
    "kv": Target(_kv, seeds.kv_records),
    "keyring": Target(_keyring, seeds.keyrings),
    "npy": Target(_npy, seeds.arrays),
    "png": Target(_png, seeds.pngs),
    "pillow": Target(_picture, seeds.pictures),
}
"""By name."""
