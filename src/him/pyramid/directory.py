"""The directory of a snapshot: (stream, frame) → Frame, as a canonical 16-way hash trie (design §2).

A subtree of at most 64 frames is one leaf, a larger one an inner node; so the hash depends on the set of
frames alone. The path of a frame is the nibbles of BLAKE3 over its length-prefixed stream and name.

Bytes: leaf `HDL` version, then msgpack of the records sorted by path; inner `HDI` version, bitmap u16, two zero
bytes, then for each present child its hash (32) and count of frames (u64). Version 2 is of nodes above encrypted
frames, which are encrypted themselves: each record says whether its frame is, and before each child stands a byte, 1
where what follows is a secret.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec
from blake3 import blake3

from him.config import DIRECTORY_FANOUT, DIRECTORY_LEAF_RECORDS, FRAME_CELLS_MAX
from him.errors import IntegrityError, VersionError
from him.pyramid.page import PageStore, root_height
from him.tile.address import KIND_DIRECTORY
from him.types import MALFORMED, BlobId, Frame, Ref, Secret

FrameKey = tuple[str, str]
"""(stream, frame name)."""
EMPTY: Final = b""
"""The directory of a snapshot without frames."""

_LEAF: Final = b"HDL\x01"
_INNER: Final = b"HDI\x01"
_ENCRYPTED_LEAF: Final = b"HDL\x02"
_ENCRYPTED_INNER: Final = b"HDI\x02"
_CHILD: Final = 40
_HASH: Final = 32
_HEIGHT_MAX: Final = root_height(FRAME_CELLS_MAX, FRAME_CELLS_MAX)
_ROOT: Final = Frame.__struct_fields__.index("root")


def path_of(key: FrameKey) -> bytes:
    """64 nibbles (one per byte) that lead to a frame."""
    stream, name = key[0].encode(), key[1].encode()
    digest = blake3(len(stream).to_bytes(4, "little") + stream + len(name).to_bytes(4, "little") + name).digest()
    return bytes(nibble for byte in digest for nibble in (byte >> 4, byte & 15))


def find(store: PageStore, root: bytes, key: FrameKey, above: int = 0) -> Frame | None:
    """The frame's record, or None; `above` are the nodes on the way from the directory to `root`."""
    path = path_of(key)
    for depth in range(above, len(path)):
        if not root:
            return None
        node = _load(store, root)
        if isinstance(node, tuple):
            return next((frame for frame in node if (frame.stream, frame.name) == key), None)
        root = node.get(path[depth], (EMPTY, 0))[0]
    raise IntegrityError("the directory is deeper than a path is long")


def scan(store: PageStore, root: bytes) -> Iterator[Frame]:
    """Every frame, in path order."""
    if not root:
        return
    node = _load(store, root)
    if isinstance(node, tuple):
        yield from node
    else:
        for nibble in sorted(node):
            yield from scan(store, node[nibble][0])


def update(store: PageStore, root: bytes, changes: Mapping[FrameKey, Frame | None]) -> bytes:
    """The directory after setting (or, with None, removing) frames; EMPTY when none is left."""
    pathed = {path_of(key): frame for key, frame in changes.items()}
    return _update(store, root, pathed, 0)[0]


def diff(store: PageStore, old: bytes, new: bytes) -> Iterator[tuple[Frame | None, Frame | None]]:
    """(old record, new record) of frames that differ, in path order."""
    if old == new:
        return
    before, after = _load(store, old) if old else (), _load(store, new) if new else ()
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for nibble in sorted(before.keys() | after.keys()):
            yield from diff(store, before.get(nibble, (EMPTY, 0))[0], after.get(nibble, (EMPTY, 0))[0])
        return
    was = {(frame.stream, frame.name): frame for frame in (scan(store, old) if old else ())}
    now = {(frame.stream, frame.name): frame for frame in (scan(store, new) if new else ())}
    for key in sorted(was.keys() | now.keys(), key=path_of):
        if was.get(key) != now.get(key):
            yield was.get(key), now.get(key)


Node = tuple[Frame, ...] | Mapping[int, tuple[bytes, int]]
"""A leaf's records, or an inner node's nibble → (hash, count)."""


def children(store: PageStore, root: bytes) -> Node:
    """One node parsed, for walks that memoise by node hash."""
    return _load(store, root)


def _update(store: PageStore, root: bytes, changes: dict[bytes, Frame | None], depth: int) -> tuple[bytes, int]:
    """(hash, count) of a subtree after changes whose paths share their first `depth` nibbles."""
    found: Node = _load(store, root) if root else ()
    if isinstance(found, tuple):
        records: dict[bytes, Frame] = {path_of((frame.stream, frame.name)): frame for frame in found}
        for path, frame in changes.items():
            if frame is None:
                records.pop(path, None)
            else:
                records[path] = frame
        return _build(store, records, depth)
    node = dict(found)
    below: dict[int, dict[bytes, Frame | None]] = {}
    for path, frame in changes.items():
        below.setdefault(path[depth], {})[path] = frame
    for nibble, part in below.items():
        child = _update(store, node.get(nibble, (EMPTY, 0))[0], part, depth + 1)
        if child[1]:
            node[nibble] = child
        else:
            node.pop(nibble, None)
    total = sum(count for _, count in node.values())
    if total <= DIRECTORY_LEAF_RECORDS:
        left = {path_of((f.stream, f.name)): f for child, _ in node.values() for f in scan(store, child)}
        return _build(store, left, depth)
    return _put_inner(store, node), total


def _build(store: PageStore, records: dict[bytes, Frame], depth: int) -> tuple[bytes, int]:
    """(hash, count) of the subtree holding exactly these records."""
    if not records:
        return EMPTY, 0
    if len(records) <= DIRECTORY_LEAF_RECORDS:
        return _put_leaf(store, [records[path] for path in sorted(records)]), len(records)
    parts: dict[int, dict[bytes, Frame]] = {}
    for path, frame in records.items():
        parts.setdefault(path[depth], {})[path] = frame
    node = {nibble: _build(store, part, depth + 1) for nibble, part in parts.items()}
    return _put_inner(store, node), len(records)


def _put_leaf(store: PageStore, frames: Sequence[Frame]) -> Ref:
    if any(frame.encrypted for frame in frames):
        payload = _ENCRYPTED_LEAF + msgspec.msgpack.encode([_row(frame) for frame in frames])
        return store.put_page(KIND_DIRECTORY, payload, encrypted=True)
    return store.put_page(KIND_DIRECTORY, _LEAF + msgspec.msgpack.encode([_row(frame)[:-1] for frame in frames]))


def _row(frame: Frame) -> list[object]:
    fields = list(msgspec.structs.astuple(frame))
    fields[_ROOT] = bytes(frame.root)  # A secret may stand here: the node is encrypted.
    return fields


def _put_inner(store: PageStore, node: dict[int, tuple[bytes, int]]) -> Ref:
    encrypted = any(isinstance(child, Secret) for child, _ in node.values())
    head = (_ENCRYPTED_INNER if encrypted else _INNER) + sum(1 << nibble for nibble in node).to_bytes(2, "little")
    rows = (
        bytes([isinstance(child, Secret)])[:encrypted] + child + count.to_bytes(8, "little")
        for _, (child, count) in sorted(node.items())
    )
    return store.put_page(KIND_DIRECTORY, b"".join((head, bytes(2), *rows)), encrypted=encrypted)


def _load(store: PageStore, root: bytes) -> Node:
    return store.parsed(KIND_DIRECTORY, root, _parse)


def _parse(payload: bytes) -> Node:
    magic, body = payload[:4], payload[4:]
    if magic[:2] == _LEAF[:2] and magic not in (_LEAF, _INNER, _ENCRYPTED_LEAF, _ENCRYPTED_INNER):
        raise VersionError("the directory node is of a newer format")
    if magic in (_LEAF, _ENCRYPTED_LEAF):
        try:
            frames = msgspec.msgpack.decode(body, type=tuple[Frame, ...])
        except MALFORMED as error:
            raise IntegrityError(f"directory leaf does not parse: {error}") from error
        if not all(map(_possible, frames)):
            raise IntegrityError("a directory leaf names a frame that cannot be")
        return frames if magic == _LEAF else tuple(map(_with_secret, frames))
    bitmap, flag = int.from_bytes(body[:2], "little"), int(magic == _ENCRYPTED_INNER)
    size = flag + _CHILD
    if magic not in (_INNER, _ENCRYPTED_INNER) or len(body) != 4 + bitmap.bit_count() * size:
        raise IntegrityError("not a directory node")
    present = [nibble for nibble in range(DIRECTORY_FANOUT) if bitmap >> nibble & 1]
    rows = [body[at : at + size] for at in range(4, len(body), size)]
    counted = [(_child(row[flag:-8], row[:flag]), int.from_bytes(row[-8:], "little")) for row in rows]
    return MappingProxyType(dict(zip(present, counted, strict=True)))


def _possible(frame: Frame) -> bool:
    """Whether its sizes are ones a frame can have: what reads it divides by them, and walks as deep as they say."""
    sides = frame.height, frame.width, frame.channels, frame.halo
    return (
        min(sides) >= 0 < min(frame.tile_height, frame.tile_width)
        and 0 <= frame.root_height <= _HEIGHT_MAX
        and len(frame.root) in (0, _HASH)
    )


def _with_secret(frame: Frame) -> Frame:
    return msgspec.structs.replace(frame, root=Secret(frame.root)) if frame.encrypted and frame.root else frame


def _child(raw: bytes, flag: bytes) -> Ref:
    return Secret(raw) if flag == b"\x01" else BlobId(raw)
