"""What to do about each kind of fault that fsck finds: every remedy is carried out by a test on a broken repository."""

from typing import Final

from him.errors import KINDS

RELIST: Final = "run `him fsck --rebuild`: it is written again from the records, and proved by the log"
HEAL: Final = "run `him heal`: the cold tier, another record or parity may have it; else put it again, or from a copy"
PACK: Final = "run `him heal`, which takes it from the cold tier or from parity; else put the file back from a copy"
PARITY_SETTINGS: Final = "set it again: `him parity set 10+4`"
PARITY: Final = "run `him heal`, or `him parity update`: it is made again from the packs"
FOREIGN_PACK: Final = "put this repository's own pack of that name back from a copy"
CACHE: Final = "run `him fsck --rebuild`, or delete the folder cache: it is made anew"
CHECKPOINT: Final = "delete the file: the log says the same, and a new one is written at the next mark"
NEWER_CHECKPOINT: Final = "nothing to repair: the log says the same, and newer software wrote it"
END: Final = "nothing to do: where the log ends is found again, and written at the next opening"
REF: Final = "delete the name: `him branch {name} --delete`"
SEAL: Final = "run `him fsck --rebuild`: him.json is given a digest of its own"
RECEIPTS: Final = "run `him fsck --rebuild`: which packs the cold tier holds is asked from it again"
TIER_MISSING: Final = "name the cold tier again: `him tier set --cold PLACE --budget SIZE`"
PINS: Final = "pin again what is to stay: `him tier pin`"
ACCOUNT: Final = "nothing to do: what the packs take is counted again"
LEASE: Final = "nothing to do: it ends with its process; until then no pack is removed"
LEFT_OVER: Final = "delete the file"
ORPHAN: Final = "nothing to do: `him gc` removes it, unless a writer names it first"
FOREIGN_FILE: Final = "move it away: nothing reads it"
_SPARE: Final = "run `him fsck --rebuild`, which mends it from its spare copy or the cold tier, where these have it"
SPARE: Final = "delete the file: it is made again when the repository is closed"
BRIDGED: Final = f"{_SPARE}; what stands now is whole, `him log` alone lacks what was before"
BY_CACHE: Final = (
    f"{_SPARE}; else keep the folder cache, by which alone it opens, and copy the repository with `him clone`, or put "
    "log/000001.log back from a copy"
)
OLDER_LOG: Final = f"{_SPARE}; else put the newest copy of log/000001.log back, or take it as it is: delete checkpoints"
FOREIGN_LOG: Final = "put this repository's own log/000001.log back from a copy, and delete log/end"
NEWER: Final = KINDS["version"].fix


def log_remedy(sound: int, end: int, cold: str) -> str:
    """For a log that bars opening.

    Args:
        sound: records before the damage.
        end: where the last of them ends, in bytes.
        cold: the place of the cold tier; empty without one.
    """
    ways = [_SPARE, "put log/000001.log back from a copy of the repository"]
    if cold:
        ways.append(f"make a new one from the cold tier: `him restore {cold} NEW`")
    if sound:
        ways.append(
            f"in a copy of the folder, cut log/000001.log to its first {end} bytes and delete log/end, "
            f"log/checkpoints, care/log and cache: it is then as it was at record {sound}"
        )
    return "; or ".join(ways)
