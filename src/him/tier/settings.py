"""`tier.json`: where the cold tier is, how much of this disk the packs may take, and as whom it is written to.

It carries its own digest (docs/FORMAT.md). What newer software added to it is not passed over: it may say where bytes
go. A file without a digest is of software that knew of none.
"""

from typing import Final

import msgspec

from him.errors import IntegrityError, NotFoundError, VersionError
from him.ports import Disk
from him.sealed import holds, sealed
from him.tier.cold import Claim
from him.types import MALFORMED

TIER: Final = "tier.json"
_BYTES_MAX: Final = 64 * 1024
_FIX: Final = "delete the file, then name the same place again: `him tier set --cold PLACE --budget SIZE`"


class TierSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `tier.json` holds.

    `generation` and `log_begins` say as whom the repository writes there (`tier.cold.Claim`); null: it only reads.
    """

    cold: str
    budget_bytes: int
    generation: int | None = 0
    log_begins: int = 0
    storage_class: str = ""

    def claim(self) -> Claim:
        """As whom it writes."""
        return Claim(self.generation, self.log_begins)

    def encoded(self) -> bytes:
        """The bytes of the file."""
        return sealed(self)


def tier_settings(disk: Disk) -> TierSettings | None:
    """The tier that is set, if any.

    Raises:
        IntegrityError: the file is damaged. VersionError: it says what this software does not know.
    """
    try:
        file = disk.open(TIER)
    except NotFoundError:
        return None
    try:
        data = file.read_at(0, _BYTES_MAX)
    finally:
        file.close()
    whole = holds(data)
    try:
        members = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        members.pop("digest", None) if whole else None
        unknown = members.keys() - set(TierSettings.__struct_fields__)
        if whole and unknown:
            known = ", ".join(sorted(unknown))
            raise VersionError(f"{TIER} was written by newer software: it says {known}", object=TIER, place=TIER)
        settings = msgspec.json.decode(msgspec.json.encode(members), type=TierSettings)
    except MALFORMED as error:
        raise IntegrityError(f"{TIER} is damaged ({error})", object=TIER, place=TIER, fix=_FIX) from error
    return settings
