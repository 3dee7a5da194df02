"""What `him fsck --rebuild` mends before it opens a repository: the log, him.json, and receipts of the cold tier."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from him.catalog import spare
from him.catalog.log import LOG_PATH
from him.catalog.marker import MARKER, MARKER_BYTES_MAX, Marker, parsed
from him.catalog.salvage import log_facts, marker_bytes, owners
from him.errors import IntegrityError, NotFoundError, StorageError
from him.ports import Disk, ObjectStore, Rng
from him.sealed import holds
from him.tier.cold import receipt_of
from him.tier.receipts import RECEIPTS, keep_receipts, receipt_lines, receipts
from him.tier.settings import TierSettings, tier_settings
from him.types import Fault

_DONE = "nothing: it was mended"
_ID_BYTES = 16


def mend(disk: Disk, cold: Callable[[TierSettings], ObjectStore], rng: Rng) -> list[Fault]:
    """Write again what follows from packs, log and cold tier; what was done.

    Args:
        cold: opens the cold tier.
        rng: gives a repository without packs its id, when nothing else tells it.

    Raises:
        VersionError: newer software wrote him.json, tier.json or a record of the log.
        StorageError: the disk refuses.
    """

    def other_id() -> str:
        with suppress(NotFoundError, IntegrityError):
            if store is not None:
                return parsed(store.get(MARKER, MARKER_BYTES_MAX), MARKER).repository_id
        return rng.token(_ID_BYTES).hex()

    done: list[Fault] = []
    store: ObjectStore | None = None
    with suppress(IntegrityError, StorageError):
        settings = tier_settings(disk)
        store = None if settings is None else cold(settings)
    for number in spare.mend(disk, store):
        text = "it was taken from the log's copy"
        done.append(Fault(f"record {number}", LOG_PATH, text, _DONE, "log"))
    if rewrite_marker(disk, other_id):
        done.append(Fault(MARKER, MARKER, "it was written again", _DONE, "marker"))
    with suppress(IntegrityError, StorageError):  # Then they stay faults.
        if store is not None and _ask_receipts(disk, store):
            done.append(Fault(RECEIPTS, RECEIPTS, "they were asked from the cold tier again", _DONE, "tier"))
    return done


def rewrite_marker(disk: Disk, other_id: Callable[[], str]) -> bool:
    """Write him.json again where it is damaged, another repository's or without a digest; whether that was so.

    The id is that of the packs, the format that of the log's records, the time that of the first of these (or what
    the file said, where it is whole).

    Args:
        other_id: gives the id where there is no pack.

    Raises:
        VersionError: newer software wrote it, or a record of the log.
        StorageError: it cannot be written.
    """
    data, facts = marker_bytes(disk), log_facts(disk)
    try:
        told: Marker | None = parsed(data, MARKER)
    except IntegrityError:
        told = None
    found = Counter(owner.hex() for path, owner in owners(disk) if path in facts.packs or not facts.packs)
    if found and (told is None or told.repository_id not in found):
        own = max(sorted(found), key=lambda owner: found[owner])
    else:
        own = other_id() if told is None else told.repository_id
    known, created = (facts.format, facts.first_ns) if told is None else (told.format, told.created_at_ns)
    made = Marker(max(facts.format, known), own, created)
    if made == told and holds(data):
        return False
    disk.write_whole(MARKER, made.encoded())
    return True


def _ask_receipts(disk: Disk, cold: ObjectStore) -> bool:
    """Ask the cold tier for the receipts of packs that have none here; whether there were any."""
    known = receipts(disk)
    absent = sorted(log_facts(disk).packs - {receipt.pack for receipt in known})
    if not absent:
        return False
    asked = [found for pack in absent if (found := receipt_of(cold, pack)) is not None]
    if asked or any(receipt is None for receipt, _, _ in receipt_lines(disk)):
        keep_receipts(disk, [*known, *asked])
    return bool(asked)
