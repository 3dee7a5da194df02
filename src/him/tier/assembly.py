"""How tiles are made of records: one in full with a chain of deltas, or chunks (docs/design/004-deltas.md)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.config import CHUNKS_FROM_BYTES, DELTA_FROM_BYTES, PARTS_DEPTH_MAX
from him.errors import IntegrityError
from him.pack import format as layout
from him.pack.format import Draft
from him.tile import chunks, codec, delta
from him.tile.address import KIND_TILE, blob_id
from him.tile.chunks import CHUNKS
from him.types import BlobId

Values = NDArray[np.generic] | bytes
"""A tile's array, or a document."""
Read = Callable[[BlobId, bool], "Blob"]
"""The verified record of a blob; False leaves its payload's digest to a caller who digests what is made of it."""


class Blob(msgspec.Struct, frozen=True):
    """A verified record's content: its kind, header bytes and stored payload.

    The payload may be compressed or (from `delta_depth` 1 on) a change of the tile `delta_base`.
    """

    kind: int
    codec: int
    meta: bytes
    stored: memoryview
    raw_size: int
    origin: bytes
    delta_base: BlobId
    delta_depth: int


class _Chain(NamedTuple):
    """How a tile is stored: one in full, and the deltas that lead from it to the tile, in that order."""

    root_id: BlobId
    root: Blob
    links: list[delta.Link]


class _Change(NamedTuple):
    """What makes a record one of a delta: fields of a `Draft`."""

    codec: int
    stored: bytes
    delta_base: bytes
    delta_depth: int


class Prepared(NamedTuple):
    """A tile's record and those of its chunks; none when it is stored already, and so that it can be relied on."""

    blob_id: BlobId
    drafts: list[Draft]
    anew: bool = False
    """There is a record of it, which leads nowhere any more."""


def parts_of(found: Blob) -> list[BlobId]:
    """What a verified record is made of: the base of a delta, the chunks of a document. Raises IntegrityError."""
    if found.delta_depth:
        return [found.delta_base]
    if found.codec != CHUNKS:
        return []
    size = math.prod(codec.parse_header(found.meta).shape)
    return [chunk.blob_id for chunk in chunks.decode_list(found.stored, size)]


class Assembly:
    """Takes tiles apart and puts them together; holds nothing.

    Args:
        read: the records.
        place: where a blob lies, for messages.
    """

    def __init__(self, read: Read, place: Callable[[BlobId], str]) -> None:
        self._read, self._place = read, place

    def values(self, blob: BlobId, found: Blob) -> Values:
        """The decoded values of a tile whose record was found. Raises IntegrityError."""
        try:
            return codec.values_of(found.meta, self.payload(blob, found))
        except IntegrityError as error:
            below = f" (in {error.object[:12]}…, which it is made of)" if error.object not in ("", blob.hex()) else ""
            raise IntegrityError(
                error.message + below, object=blob.hex(), place=error.place or self._place(blob)
            ) from error

    def payload(self, blob: BlobId, found: Blob, within: int = 0) -> bytes | memoryview:
        """The canonical payload; one put together from others is digested again: no digest of stored bytes covers it.

        Args:
            within: how many documents in chunks this is a part of.
        """
        if not found.delta_depth and found.codec != CHUNKS:
            return self._whole(found)
        try:
            # Only the end is digested: its blob_id proves every link.
            return self._joined(blob, found, within, digest=False)
        except IntegrityError:
            # Where a link is damaged, this tells which; or it was healed, and is read once more.
            return self._joined(blob, found, within, digest=True)

    def _joined(self, blob: BlobId, found: Blob, within: int, *, digest: bool) -> bytes | memoryview:
        chain = self._chain(blob, found, digest=digest)
        root = self._whole(chain.root, within)
        # What was read into a buffer is this reader's alone.
        own = isinstance(root, memoryview) and not root.readonly
        payload = delta.decode_chain(root, chain.links, in_place=own)
        if blob_id(KIND_TILE, found.meta, payload) != blob:
            raise IntegrityError("the parts make a tile with another blob_id", object=blob.hex())
        return payload

    def _whole(self, found: Blob, within: int = 0) -> bytes | memoryview:
        """The payload of a tile that is no delta: put together from its chunks where it has some."""
        if found.kind != KIND_TILE:
            raise IntegrityError("a tile's place holds something else")
        if found.codec != CHUNKS:
            return codec.unpack(found.meta, found.codec, found.stored)
        if within == PARTS_DEPTH_MAX:
            raise IntegrityError("chunks within chunks without end")
        listed = chunks.decode_list(found.stored, math.prod(codec.parse_header(found.meta).shape))
        return b"".join(self.payload(chunk.blob_id, self._read(chunk.blob_id, True), within + 1) for chunk in listed)

    def _chain(self, blob: BlobId, found: Blob, *, digest: bool = True) -> _Chain:
        links: list[delta.Link] = []
        while found.delta_depth:
            links.append(delta.Link(codec.parse_header(found.meta), found.codec, found.stored))
            blob, depth = found.delta_base, found.delta_depth
            found = self._read(blob, digest)
            if found.delta_depth >= depth:
                raise IntegrityError(f"a delta of depth {depth} has a base of depth {found.delta_depth}")
        return _Chain(blob, found, links[::-1])

    def drafts(self, tile: codec.EncodedTile, origin: bytes, replaced: BlobId | None) -> list[Draft]:
        """The record of a tile (a change of what it replaces, chunks, or the whole), then those of its chunks."""
        whole = Draft(KIND_TILE, tile.codec, tile.blob_id, tile.header, tile.stored, len(tile.payload), origin)
        if len(tile.stored) < DELTA_FROM_BYTES:
            return [whole]
        change = None if replaced in (None, tile.blob_id) else self._change(tile, replaced)
        if change is not None:
            return [whole._replace(**change._asdict())]
        if codec.parse_header(tile.header).dtype != "bytes" or len(tile.payload) < CHUNKS_FROM_BYTES:
            return [whole]
        parts = [codec.encode_bytes(bytes(part)) for part in chunks.split(tile.payload)]
        if len(parts) == 1:
            return [whole]
        listed = chunks.encode_list([chunks.Chunk(part.blob_id, len(part.payload)) for part in parts])
        return [
            whole._replace(codec=CHUNKS, stored=listed),
            *(Draft(KIND_TILE, p.codec, p.blob_id, p.header, p.stored, len(p.payload), origin) for p in parts),
        ]

    def _change(self, tile: codec.EncodedTile, replaced: BlobId) -> _Change | None:
        """The tile as a change of what it replaces, when that is small and (tried here) leads back to the tile."""
        try:
            chain = self._chain(replaced, self._read(replaced, True))
            base, header = self._whole(chain.root), codec.parse_header(tile.header)
            made = delta.compose(
                header, base, lambda: delta.decode_chain(base, chain.links), tile.payload,
                full_size=min(len(chain.root.stored), len(tile.stored)),
                chain_size=sum(len(link.stored) for link in chain.links), depth=len(chain.links),
            )  # fmt: skip
            if made is None:
                return None
            link = delta.Link(header, made.delta.codec, made.delta.stored)
            back = delta.decode_chain(base, [link] if made.depth == 1 else [*chain.links, link])
        except IntegrityError:
            # A tile that replaces a damaged one does not depend on it.
            return None
        if blob_id(KIND_TILE, tile.header, back) != tile.blob_id:
            return None
        base_id = chain.root_id if made.depth == 1 else replaced
        return _Change(made.delta.codec, made.delta.stored, base_id, made.depth)


def checked(record: layout.Record, place: str) -> Blob:
    """A verified record as a blob. Raises IntegrityError for one that is encrypted."""
    header = record.header
    if any(header.key_id):
        raise IntegrityError("the record needs a feature this version lacks", object=header.blob_id.hex(), place=place)
    base = BlobId(header.delta_base)
    return Blob(
        header.kind, header.codec, record.meta, record.stored, header.raw_size, header.origin, base, header.delta_depth
    )
