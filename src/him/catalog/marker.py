"""`him.json`: which repository a folder, or a cold tier, is of, and which log records there may be (docs/FORMAT.md)."""

from typing import Final

import msgspec

from him.config import REPOSITORY_FORMAT
from him.errors import IntegrityError, VersionError

MARKER: Final = "him.json"


class Marker(msgspec.Struct, frozen=True):
    """What it holds."""

    format: int
    repository_id: str
    created_at_ns: int

    def encoded(self) -> bytes:
        """The bytes of the file."""
        return msgspec.json.encode(self) + b"\n"

    def raised(self) -> "Marker":
        """The marker once records of the newest format are written."""
        return msgspec.structs.replace(self, format=max(self.format, REPOSITORY_FORMAT))


def parsed(data: bytes, place: str) -> Marker:
    """The marker in a file at `place`.

    Raises:
        IntegrityError: it is none. VersionError: written by newer software.
    """
    try:
        marker = msgspec.json.decode(data, type=Marker)
        bytes.fromhex(marker.repository_id)
    except (msgspec.MsgspecError, ValueError) as error:
        raise IntegrityError(f"{MARKER} does not parse ({error})", object=MARKER, place=place) from error
    if marker.format > REPOSITORY_FORMAT:
        raise VersionError(f"the repository has format {marker.format}, this software knows {REPOSITORY_FORMAT}")
    return marker


def same_repository(one: bytes, other: bytes) -> bool:
    """Whether two markers are of one repository, whatever their formats."""
    try:
        first, second = (msgspec.json.decode(data, type=Marker) for data in (one, other))
    except msgspec.MsgspecError:
        return False
    return first.repository_id == second.repository_id
