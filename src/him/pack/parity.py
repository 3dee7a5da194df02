"""Parity of packs: a group of finished packs has parity files beside it, any of whose chunks make lost ones again.

Packs are cut into chunks; the i-th chunks of all packs of a group, padded with zeros, are the data of a Reed–Solomon
code, and each parity file holds one more chunk of every such row (docs/FORMAT.md, docs/design/012-parity.md). Every
parity file also lists the digests of all chunks, so that it is known which are damaged.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3

from him.config import PARITY_CHUNK_BYTES, PARITY_TABLE_BYTES_MAX
from him.errors import IntegrityError, VersionError
from him.pack import galois
from him.pack.galois import Bytes
from him.ports import ErasureCode, File
from him.types import MALFORMED, PackFinished

SUFFIX: Final = ".parity"
_MAGIC: Final = b"HIMPRTY\x01"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sHBBBxxxIIQ16s16s")
_FIRST_CHUNK: Final = 4096
_DIGEST: Final = 32


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A pack of a group, with the digests of its chunks one after the other."""

    name: str
    size: int
    merkle_root: bytes
    digests: bytes = b""


class Group(msgspec.Struct, frozen=True, array_like=True):
    """Packs that are protected together: what every parity file of theirs says.

    Rows are numbered from 0; in a row the chunks of the members come first, then those of the parity files.
    """

    members: tuple[Member, ...]
    parity: tuple[bytes, ...]
    """For each parity file, the digests of its chunks one after the other."""

    @property
    def size(self) -> int:
        """Bytes of the largest member, which are those of each parity file's chunks."""
        return max((member.size for member in self.members), default=0)

    @property
    def rows(self) -> int:
        """Chunks of the largest member."""
        return -(-self.size // PARITY_CHUNK_BYTES)

    def row_bytes(self, row: int) -> int:
        """How long the chunks of a row are; the last may be shorter."""
        return min(PARITY_CHUNK_BYTES, self.size - row * PARITY_CHUNK_BYTES)

    def chunk_bytes(self, number: int, row: int) -> int:
        """How long a chunk is without the zeros that fill it up: of a member that is shorter, less."""
        if number >= len(self.members):
            return self.row_bytes(row)
        return max(0, min(PARITY_CHUNK_BYTES, self.members[number].size - row * PARITY_CHUNK_BYTES))

    def digest(self, number: int, row: int) -> bytes:
        """The digest of a chunk; empty for one beyond its member's end."""
        count = len(self.members)
        held = self.members[number].digests if number < count else self.parity[number - count]
        return held[_DIGEST * row : _DIGEST * (row + 1)]

    def verifies(self, number: int, row: int, chunk: bytes | memoryview) -> bool:
        """Whether a chunk, of `chunk_bytes`, is the one that was protected."""
        return len(chunk) == self.chunk_bytes(number, row) and (
            not len(chunk) or digest(chunk) == self.digest(number, row)
        )


class ParityFile(NamedTuple):
    """What a parity file says: its group, and which of the group's parity files it is."""

    name: str
    group: Group
    number: int


def digest(chunk: bytes | memoryview) -> bytes:
    """Of a chunk, without the zeros that fill it up."""
    return blake3(chunk).digest()


def group_id(repository_id: bytes, packs: Sequence[PackFinished], extra: int) -> bytes:
    """16 bytes that follow from which packs are protected by how many parity files."""
    named = [(pack.pack, pack.size, pack.merkle_root) for pack in packs]
    return blake3(msgspec.msgpack.encode([repository_id, named, extra, PARITY_CHUNK_BYTES])).digest()[:16]


def file_name(folder: str, group: bytes, index: int) -> str:
    """`packs/GROUP.INDEX.parity`: beside the packs, for it is kept and moved between tiers as they are."""
    return f"{folder}/{group.hex()}.{index:02d}{SUFFIX}"


def encode_ends(repository_id: bytes, group: Group, index: int) -> tuple[bytes, int, bytes]:
    """The head of a parity file; where its table stands, behind the chunks, and the table.

    The head is written last: a file without one was never finished.
    """
    table = msgspec.msgpack.encode(group)
    packs = [PackFinished(member.name, member.size, member.merkle_root) for member in group.members]
    head = _HEAD.pack(
        _MAGIC, _VERSION, len(group.members), len(group.parity), index, PARITY_CHUNK_BYTES, len(table),
        group.size, repository_id,
        group_id(repository_id, packs, len(group.parity)),
    )  # fmt: skip
    return head + blake3(head + table).digest(), _table_at(group.size), table


def read_head(file: File, name: str, repository_id: bytes) -> ParityFile:
    """What a parity file says.

    Raises:
        IntegrityError: it is damaged, was never finished, or is another repository's. VersionError: of newer software.
    """
    data = file.read_at(0, _HEAD.size + _DIGEST)
    if len(data) < _HEAD.size + _DIGEST or data[:8] != _MAGIC:
        raise IntegrityError("not a whole parity file", object=name, place=f"{name} @ 0")
    _, version, count, extra, index, chunk, size, covered, repository, group = _HEAD.unpack_from(data)
    table = file.read_at(_table_at(covered), min(size, PARITY_TABLE_BYTES_MAX))
    if blake3(data[: _HEAD.size] + table).digest() != data[_HEAD.size :]:
        raise IntegrityError("what a parity file says of itself is damaged", object=name, place=f"{name} @ 0")
    if version > _VERSION:
        raise VersionError("the parity file was written by newer software", object=name, place=name)
    try:
        found = msgspec.msgpack.decode(table, type=Group)
    except MALFORMED as error:
        raise IntegrityError(f"the table of a parity file does not parse ({error})", object=name, place=name) from error
    packs = [PackFinished(member.name, member.size, member.merkle_root) for member in found.members]
    fits = (len(found.members), len(found.parity), found.size) == (count, extra, covered) and index < extra
    own = (repository, group) == (repository_id, group_id(repository_id, packs, extra))
    if not fits or not own or chunk != PARITY_CHUNK_BYTES or not name.endswith(file_name("", group, index)):
        raise IntegrityError("the parity file belongs elsewhere", object=name, place=f"{name} @ 0")
    return ParityFile(name, found, index)


def chunk_at(row: int) -> int:
    """Where a row's chunk begins in a parity file."""
    return _FIRST_CHUNK + row * PARITY_CHUNK_BYTES


def padded(chunk: bytes | memoryview, size: int) -> Bytes:
    """A chunk filled up with zeros to the length of its row."""
    out = np.zeros(size, dtype=np.uint8)
    out[: len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
    return out


def parity_of(code: ErasureCode, chunks: Sequence[Bytes], extra: int) -> list[Bytes]:
    """The parity chunks of a row, given its data chunks, all of the row's length."""
    return code(galois.cauchy(len(chunks), extra), chunks)


def made_again(
    code: ErasureCode, count: int, extra: int, have: Mapping[int, Bytes], want: Sequence[int]
) -> list[Bytes]:
    """Chunks of a row made from `count` others of it.

    Args:
        count, extra: how many members and parity files the group has.
        have: `count` sound chunks by their number in the row, all of the row's length.
        want: the numbers of those to make.
    """
    rows = np.concatenate([np.eye(count, dtype=np.uint8), galois.cauchy(count, extra)])
    numbers = sorted(have)
    data_of_have = galois.inverted(rows[numbers])
    wanted = rows[list(want)]
    # What each wanted chunk is of those at hand: its row of the code times the inverse.
    factors = np.stack(galois.product(wanted, [np.ascontiguousarray(row) for row in data_of_have]))
    return code(factors, [have[number] for number in numbers])


def _table_at(size: int) -> int:
    return _FIRST_CHUNK + -(-size // _FIRST_CHUNK) * _FIRST_CHUNK
