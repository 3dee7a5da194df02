"""How tiles are made of records: one in full with a chain of deltas, or chunks (docs/design/004-deltas.md)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.config import CHUNKS_FROM_BYTES, DELTA_FROM_BYTES, PARTS_DEPTH_MAX
from him.errors import IntegrityError, KeyNeededError
from him.pack import format as layout
from him.pack.encrypted import decrypted, encrypted
from him.pack.format import Draft
from him.tile import chunks, codec, delta
from him.tile.address import KIND_TILE, reference
from him.tile.chunks import CHUNKS
from him.types import BlobId, HashKey, Ref, Secret, name_of

Values = NDArray[np.generic] | bytes
"""A tile's array, or a document."""
Read = Callable[[Ref, bool], "Blob"]
"""The verified record of a blob; False leaves its payload's digest to a caller who digests what is made of it."""


class Blob(msgspec.Struct, frozen=True):
    """A verified record's content: its kind, header bytes and stored payload.

    The payload may be compressed or (from `delta_depth` 1 on) a change of the tile `delta_base`. With a `nonce` it is
    as it lies there, encrypted; what it is made of is `encrypted` like itself.
    """

    kind: int
    codec: int
    meta: bytes
    stored: memoryview
    raw_size: int
    origin: bytes
    delta_base: BlobId
    delta_depth: int
    key_id: bytes = bytes(16)
    nonce: bytes = b""
    encrypted: bool = False


class _Chain(NamedTuple):
    """How a tile is stored: one in full, and the deltas that lead from it to the tile, in that order."""

    root_id: Ref
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

    ref: Ref
    drafts: list[Draft]
    anew: bool = False
    """There is a record of it, which leads nowhere any more."""


def parts_of(found: Blob) -> list[Ref]:
    """What a verified record is made of: the base of a delta, the chunks of a document. Raises IntegrityError."""
    if found.delta_depth:
        return [found.delta_base]
    if found.codec != CHUNKS:
        return []
    size = math.prod(codec.parse_header(found.meta).shape)
    return [chunk.ref for chunk in chunks.decode_list(found.stored, size, encrypted=found.encrypted)]


class Assembly:
    """Takes tiles apart and puts them together; holds nothing.

    Args:
        read: the records.
        place: where a blob lies, for messages.
        hash_key: of encrypted content, where the repository's keys are at hand.
    """

    def __init__(self, read: Read, place: Callable[[Ref], str], hash_key: HashKey | None = None) -> None:
        self._read, self._place, self._hash_key = read, place, hash_key

    def values(self, blob: Ref, found: Blob) -> Values:
        """The decoded values of a tile whose record was found. Raises IntegrityError."""
        try:
            return codec.values_of(found.meta, self.payload(blob, found))
        except IntegrityError as error:
            below = f" (in {error.object[:12]}…, which it is made of)" if error.object not in ("", blob.hex()) else ""
            raise IntegrityError(
                error.message + below, object=blob.hex(), place=error.place or self._place(blob)
            ) from error

    def payload(self, blob: Ref, found: Blob, within: int = 0) -> bytes | memoryview:
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

    def _joined(self, blob: Ref, found: Blob, within: int, *, digest: bool) -> bytes | memoryview:
        chain = self._chain(blob, found, digest=digest)
        root = self._whole(chain.root, within)
        # What was read into a buffer is this reader's alone.
        own = isinstance(root, memoryview) and not root.readonly
        payload = delta.decode_chain(root, chain.links, in_place=own)
        if reference(KIND_TILE, found.meta, payload, self.hash_key(blob)) != blob:
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
        size = math.prod(codec.parse_header(found.meta).shape)
        listed = chunks.decode_list(found.stored, size, encrypted=found.encrypted)
        return b"".join(self.payload(chunk.ref, self._read(chunk.ref, True), within + 1) for chunk in listed)

    def _chain(self, blob: Ref, found: Blob, *, digest: bool = True) -> _Chain:
        links: list[delta.Link] = []
        while found.delta_depth:
            links.append(delta.Link(codec.parse_header(found.meta), found.codec, found.stored))
            blob, depth = found.delta_base, found.delta_depth
            found = self._read(blob, digest)
            if found.delta_depth >= depth:
                raise IntegrityError(f"a delta of depth {depth} has a base of depth {found.delta_depth}")
        return _Chain(blob, found, links[::-1])

    def hash_key(self, ref: Ref) -> bytes | None:
        """What a reference was made with: nothing where it is a blob_id. Raises KeyNeededError."""
        return self.key().key if isinstance(ref, Secret) else None

    def key(self) -> HashKey:
        """What secrets are made with. Raises KeyNeededError."""
        if self._hash_key is None:
            raise KeyNeededError("the repository's keys are needed to write what is encrypted")
        return self._hash_key

    def draft(self, ref: Ref, plain: Draft) -> Draft:
        """The record of content that is referred to so, encrypted where that is a secret. Raises KeyNeededError."""
        return encrypted(plain, ref, self.key()) if isinstance(ref, Secret) else plain

    def whole(self, tile: codec.EncodedTile, origin: bytes = bytes(16)) -> Draft:
        """The record of a tile that needs no other."""
        plain = Draft(KIND_TILE, tile.codec, name_of(tile.ref), tile.header, tile.stored, len(tile.payload), origin)
        return self.draft(tile.ref, plain)

    def drafts(self, tile: codec.EncodedTile, origin: bytes, replaced: Ref | None) -> list[Draft]:
        """The record of a tile (a change of what it replaces, chunks, or the whole), then those of its chunks.

        What is encrypted is no change of another: the smallest would tell how much differs.
        """
        if len(tile.stored) < DELTA_FROM_BYTES:
            return [self.whole(tile, origin)]
        secret = isinstance(replaced, Secret) or isinstance(tile.ref, Secret)
        change = None if replaced is None or secret or replaced == tile.ref else self._change(tile, replaced)
        if change is not None:
            return [self.whole(tile, origin)._replace(**change._asdict())]
        if codec.parse_header(tile.header).dtype != "bytes" or len(tile.payload) < CHUNKS_FROM_BYTES:
            return [self.whole(tile, origin)]
        key = self.hash_key(tile.ref)
        parts = [codec.encode_bytes(bytes(part), key) for part in chunks.split(tile.payload)]
        if len(parts) == 1:
            return [self.whole(tile, origin)]
        listed = chunks.encode_list([chunks.Chunk(part.ref, len(part.payload)) for part in parts])
        plain_list = Draft(KIND_TILE, CHUNKS, name_of(tile.ref), tile.header, listed, len(tile.payload), origin)
        return [self.draft(tile.ref, plain_list), *(self.whole(part, origin) for part in parts)]

    def _change(self, tile: codec.EncodedTile, replaced: Ref) -> _Change | None:
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
        if reference(KIND_TILE, tile.header, back, None) != tile.ref:
            return None
        base_id = name_of(chain.root_id if made.depth == 1 else replaced)
        return _Change(made.delta.codec, made.delta.stored, base_id, made.depth)


def as_stored(record: layout.Record) -> Blob:
    """A verified record as a blob; an encrypted one stays so."""
    header = record.header
    base, key = BlobId(header.delta_base), any(header.key_id)
    return Blob(
        header.kind, header.codec, record.meta, record.stored, header.raw_size, header.origin, base, header.delta_depth,
        header.key_id, header.nonce if key else b"", key,
    )  # fmt: skip


def opened(found: Blob, ref: Ref, place: str) -> Blob:
    """The content of a record, decrypted where it is encrypted.

    Raises:
        KeyNeededError: it is, and is referred to by its blob_id alone.
        IntegrityError: encrypted bytes that do not match their tag, or plain ones where a secret leads.
    """
    if not isinstance(ref, Secret):
        if found.nonce:
            raise KeyNeededError("the content is encrypted", object=ref.hex(), place=place)
        return found
    try:
        if not found.nonce:
            raise IntegrityError("it is not encrypted where it has to be")
        meta, stored = decrypted(
            ref, found.kind, found.codec, found.raw_size, found.origin, found.key_id, found.nonce, found.stored
        )
    except IntegrityError as error:
        raise IntegrityError(error.message, object=ref.hex(), place=place) from error
    return msgspec.structs.replace(found, meta=meta, stored=stored, nonce=b"")
