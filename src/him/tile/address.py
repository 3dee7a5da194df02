"""Identities: what content is called, and what content at a place in a snapshot is called (design §6)."""

from typing import Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.types import BlobId, Ref, Secret, TileId, TileKey, name_of, stream_frame_text

KIND_TILE: Final = 1
KIND_PAGE: Final = 2
KIND_DIRECTORY: Final = 3
KIND_COMPANION: Final = 4
KIND_INDEX: Final = 5
KIND_FOOTER: Final = 6

KIND_NAMES: Final = {1: "tile", 2: "page", 3: "directory", 4: "companion", 5: "index", 6: "footer"}
_PREFIX_BYTES: Final = 8


def prefixes(blobs: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The first eight bytes of blob_ids (n, 32) as numbers (n): enough to tell millions apart, not to prove one."""
    return np.ascontiguousarray(blobs[:, :_PREFIX_BYTES]).view(np.uint64)[:, 0]


def blob_id(kind: int, header: bytes, payload: bytes | memoryview) -> BlobId:
    """BLAKE3 over kind ‖ length of header ‖ header ‖ canonical payload: 32 bytes.

    The length makes the split between header and payload unambiguous, the kind keeps a page from passing
    for a tile.
    """
    return BlobId(_digested(kind, header, payload, None))


def reference(kind: int, header: bytes, payload: bytes | memoryview, hash_key: bytes | None) -> Ref:
    """How pages refer to content: by its blob_id, or with a repository's hash key by the keyed digest of the same."""
    digest = _digested(kind, header, payload, hash_key)
    return BlobId(digest) if hash_key is None else Secret(digest)


def _digested(kind: int, header: bytes, payload: bytes | memoryview, key: bytes | None) -> bytes:
    head = bytes([kind]) + len(header).to_bytes(4, "little") + header
    hasher = blake3(head) if key is None else blake3(head, key=key)
    hasher.update(payload)
    return hasher.digest()


def tile_id(key: TileKey, origin: bytes, content: Ref) -> TileId:
    """BLAKE3 over the length-prefixed `stream:frame`, origin, level, x, y and blob_id: 32 bytes."""
    parts = (
        stream_frame_text(key.stream, key.frame).encode(),
        origin,
        key.level.to_bytes(4, "little"),
        key.x.to_bytes(8, "little"),
        key.y.to_bytes(8, "little"),
        name_of(content),
    )
    return TileId(blake3(b"".join(len(part).to_bytes(4, "little") + part for part in parts)).digest())
