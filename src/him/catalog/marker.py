"""`him.json`: which repository a folder, or a cold tier, is of, and which log records there may be (docs/FORMAT.md).

It carries its own digest (design/013-negotiation.md). The first two formats had none, so one that says 1 or 2 may do
without it; then only exactly the bytes that the software of that time wrote are taken for whole.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from him.config import REPOSITORY_FORMAT
from him.errors import IntegrityError, VersionError
from him.sealed import holds, sealed
from him.types import (
    MALFORMED,
    DirectoryWrapped,
    Operation,
    PackCondemned,
    PackRemoved,
    RetentionSet,
    SnapshotShredded,
    TilesExpired,
)

MARKER: Final = "him.json"
MARKER_BYTES_MAX: Final = 4096
REWRITE: Final = "run `him fsck --rebuild`: it is written again from what packs and log say"
_UNSEALED_FORMAT_MAX: Final = 2
_SINCE: Final[dict[type[Operation], int]] = {
    PackCondemned: 2, PackRemoved: 2, RetentionSet: 2, TilesExpired: 2, DirectoryWrapped: 3, SnapshotShredded: 3,
}  # fmt: skip
"""The format that first had an operation; those that are not named were always there."""
_ID_DIGITS: Final = 32


class Marker(msgspec.Struct, frozen=True):
    """What it holds."""

    format: int
    repository_id: str
    created_at_ns: int

    def encoded(self) -> bytes:
        """The bytes of the file."""
        return sealed(self)

    def raised(self, format: int) -> "Marker":
        """The marker once records of a format are written."""
        return msgspec.structs.replace(self, format=max(self.format, format))


class _Header(msgspec.Struct):
    format: int


def parsed(data: bytes, place: str) -> Marker:
    """The marker in a file at `place`.

    Raises:
        IntegrityError: it is none, or is damaged. VersionError: written by newer software.
    """
    try:
        if holds(data):
            known = msgspec.json.decode(data, type=_Header).format
            if known > REPOSITORY_FORMAT:
                raise VersionError(
                    f"the repository has format {known}, this software knows formats up to {REPOSITORY_FORMAT}",
                    object=MARKER, place=place,
                )  # fmt: skip
            marker = msgspec.json.decode(data, type=Marker)
        else:
            marker = msgspec.json.decode(data, type=Marker)
            if data != msgspec.json.encode(marker) + b"\n" or not 1 <= marker.format <= _UNSEALED_FORMAT_MAX:
                raise IntegrityError(f"{MARKER} is damaged", object=MARKER, place=place, fix=REWRITE)
        if len(bytes.fromhex(marker.repository_id).hex()) != _ID_DIGITS:
            raise ValueError("an id of another length")
    except (*MALFORMED, ValueError) as error:
        raise IntegrityError(f"{MARKER} does not parse ({error})", object=MARKER, place=place, fix=REWRITE) from error
    return marker


def same_repository(copy: bytes, repository_id: str, place: str) -> bool:
    """Whether a marker at a place, is of this repository. Raises VersionError, IntegrityError."""
    return parsed(copy, place).repository_id == repository_id


def needed_format(operations: Iterable[Operation]) -> int:
    """The lowest format in which there may be these operations."""
    return max((_SINCE.get(type(operation), 1) for operation in operations), default=1)
