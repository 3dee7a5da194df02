"""The small files beside log and packs, each against its own digest, and what nobody knows: a part of fsck.

Nothing is opened but files, so that it can be asked of a repository that does not open, and before opening one that
opening would mend.
"""

from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from blake3 import blake3

from him.catalog import lease, remedy
from him.catalog.log import CHECKPOINT_FOLDER, END_BYTES, END_PATH, LOG_PATH, TURN_PATH, cut_short, records_in
from him.catalog.marker import MARKER, parsed
from him.catalog.salvage import RESTORING, marker_bytes
from him.catalog.spare import SPARE
from him.config import PINS_BYTES_MAX
from him.errors import IntegrityError, NotFoundError, VersionError
from him.ports import Disk
from him.sealed import holds
from him.tier.address import damaged_segments
from him.tier.pins import PINS
from him.tier.receipts import RECEIPTS, receipt_lines
from him.tier.settings import TIER, tier_settings
from him.types import Fault

_PARITY: Final = "parity.json"
_KNOWN: Final = {
    "": {MARKER, TIER, _PARITY, RESTORING, "log", "packs", "leases", "spool", "cache", "cold", "care"},
    "log": {LOG_PATH.partition("/")[2], END_PATH.partition("/")[2], TURN_PATH.partition("/")[2], "checkpoints"},
    "cold": {"account", "pins", "receipts", "hotness", "log"},
}
_SMALL_BYTES_MAX: Final = 64 * 1024


class Examined(NamedTuple):
    """What is wrong, and what is worth knowing and harms nothing."""

    faults: list[Fault]
    notes: list[Fault]

    def names(self) -> set[str]:
        """The places of both."""
        return {fault.place for fault in (*self.faults, *self.notes)}


def examine(disk: Disk) -> Examined:
    """Look at every small file of a repository."""
    found = Examined([], [])
    for look in (
        _marker,
        _end,
        _spare,
        _tier,
        _settings_of_parity,
        _receipts,
        _pins,
        _account,
        _leases,
        _segments,
        _unknown,
    ):
        for fault, harms in look(disk):
            (found.faults if harms else found.notes).append(fault)
    return found


_Findings = Iterator[tuple[Fault, bool]]
"""Findings, each with whether it harms."""


def _read(disk: Disk, path: str, limit: int = _SMALL_BYTES_MAX) -> bytes | None:
    """A small file; None when it is missing."""
    try:
        file = disk.open(path)
    except NotFoundError:
        return None
    try:
        return file.read_at(0, limit)
    finally:
        file.close()


def _marker(disk: Disk) -> _Findings:
    data = marker_bytes(disk)
    try:
        parsed(data, MARKER)
    except VersionError as error:
        yield Fault(MARKER, MARKER, error.message, error.fix, "version"), True
    except IntegrityError as error:
        yield Fault(MARKER, MARKER, error.message if data else f"{MARKER} is missing", error.fix, "marker"), True
    else:
        if not holds(data):
            yield Fault(MARKER, MARKER, "it has no digest: damage to it might pass", remedy.SEAL, "marker"), False


def _end(disk: Disk) -> _Findings:
    data = _read(disk, END_PATH)
    if data is None:
        yield Fault(END_PATH, END_PATH, "the published end is missing", remedy.END, "log"), False
    elif data and blake3(data[: END_BYTES - 32]).digest() != data[END_BYTES - 32 :]:
        yield Fault(END_PATH, END_PATH, "the published end does not match its digest", remedy.END, "log"), False


def _spare(disk: Disk) -> _Findings:
    """The log is never shorter than its copy, unless it was cut or is an older one; the copy has whole records."""
    try:
        spare = disk.open(SPARE)
    except NotFoundError:
        return
    try:
        size = spare.size()
        last = deque(records_in(spare), maxlen=1)
        end = last[0][3] if last else 0
        # One that ends in the middle of a record only lags behind.
        if end < size and not cut_short(spare, end):
            # A power loss may leave it so: it is never synced.
            text = "the spare copy of the log is damaged"
            yield Fault("spare copy of the log", f"{SPARE} @ {end}", text, remedy.SPARE, "log"), False
            return
    finally:
        spare.close()
    try:
        log = disk.open(LOG_PATH)
    except NotFoundError:
        return
    if log.size() < size:
        text = "it is shorter than its spare copy: it was cut, or is an older one"
        yield Fault("commit log", LOG_PATH, text, remedy.OLDER_LOG, "log"), True
    log.close()


def _tier(disk: Disk) -> _Findings:
    try:
        settings = tier_settings(disk)
    except VersionError as error:
        yield Fault(TIER, TIER, error.message, error.fix, "version"), True
        return
    except IntegrityError as error:
        yield Fault(TIER, TIER, error.message, error.fix, "tier"), True
        return
    if settings is None and any(receipt for receipt, _, _ in receipt_lines(disk)):
        text = "it is missing, and packs were copied to a cold tier: parts of them may be nowhere else"
        yield Fault(TIER, TIER, text, remedy.TIER_MISSING, "tier"), True


def _settings_of_parity(disk: Disk) -> _Findings:
    data = _read(disk, _PARITY)
    if data is not None and not holds(data):
        text = "it does not match its digest: no pack is protected anew, and what is stays so"
        yield Fault(_PARITY, _PARITY, text, remedy.PARITY_SETTINGS, "parity"), True


def _receipts(disk: Disk) -> _Findings:
    if _read(disk, RECEIPTS, 1) is None and TIER in disk.list(""):
        text = "no receipts are here: nothing was copied to the cold tier yet, or the file is gone"
        yield Fault("receipts", RECEIPTS, text, remedy.RECEIPTS, "tier"), False
    for receipt, offset, whole in receipt_lines(disk):
        place = f"{RECEIPTS} @ {offset}"
        if receipt is None and whole:
            yield Fault("receipt", place, "a receipt does not match its digest", remedy.RECEIPTS, "tier"), True
        elif receipt is None:
            yield Fault("receipt", place, "the last receipt is cut short", remedy.RECEIPTS, "tier"), False


def _pins(disk: Disk) -> _Findings:
    data = _read(disk, PINS, PINS_BYTES_MAX)
    if data and blake3(data[32:]).digest() != data[:32]:
        text = "what is pinned does not match its digest: nothing is"
        yield Fault(PINS, PINS, text, remedy.PINS, "tier"), True


def _account(disk: Disk) -> _Findings:
    data = _read(disk, "cold/account")
    if data and blake3(data[:8]).digest()[:16] != data[8:24]:
        yield Fault("cold/account", "cold/account", "it does not match its digest", remedy.ACCOUNT, "tier"), False


def _leases(disk: Disk) -> _Findings:
    for name in disk.list(lease.FOLDER):
        path = f"{lease.FOLDER}/{name}"
        data = _read(disk, path)
        if data and not lease.verifies(data):
            yield Fault(path, path, "a lease does not match its digest", remedy.LEASE, "lease"), False


def _segments(disk: Disk) -> _Findings:
    for path in damaged_segments(disk):
        yield Fault("address segment", path, "it does not match its digest", remedy.CACHE, "cache"), True


def _unknown(disk: Disk) -> _Findings:
    """What nothing reads: in the folders whose names are known."""
    for folder, known in _KNOWN.items():
        for name in disk.list(folder):
            if name not in known:
                yield _nobodys(f"{folder}/{name}" if folder else name)
    for name in disk.list(CHECKPOINT_FOLDER):
        if len(name) != 16 or not name.isdecimal():
            yield _nobodys(f"{CHECKPOINT_FOLDER}/{name}")
    for folder, suffixes in (("packs", (".pack", ".parity")), ("spool", (".json",))):
        for name in disk.list(folder):
            if not name.endswith(suffixes):
                yield _nobodys(f"{folder}/{name}")
    for name in disk.list(lease.FOLDER):
        if not name.isdecimal():
            yield _nobodys(f"{lease.FOLDER}/{name}")
    if {RESTORING, MARKER} <= set(disk.list("")):
        yield Fault(RESTORING, RESTORING, "a restore that came to its end left it", remedy.LEFT_OVER, "file"), False


def _nobodys(path: str) -> tuple[Fault, bool]:
    return Fault(path, path, "no file of a repository is called so", remedy.FOREIGN_FILE, "file"), False
