"""What can be told of a repository without opening it: whose it is, and what its log and its packs still hold."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Final, NamedTuple

from him.catalog import checkpoint, remedy
from him.catalog.log import CHECKPOINT_FOLDER, LOG_PATH, parsed, records_in
from him.catalog.marker import MARKER, MARKER_BYTES_MAX, REWRITE, Marker, needed_format
from him.catalog.marker import parsed as parsed_marker
from him.config import CHECKPOINT_BYTES_MAX
from him.errors import ConflictError, HimError, IntegrityError, NotFoundError
from him.pack import format as layout
from him.pack.file import walk
from him.ports import Disk
from him.tier.settings import TIER, tier_settings
from him.tier.warm import PACK_FOLDER
from him.tile.address import KIND_FOOTER, KIND_INDEX
from him.types import Fault, PackRange

_SUFFIX: Final = ".pack"
RESTORING: Final = "restoring.json"
"""Holds the marker of a repository that is being restored into the folder."""


class LogFacts(NamedTuple):
    """What the whole records say that a log begins with."""

    records: int
    end: int
    """Where the last of them ends, in bytes."""
    packs: frozenset[str]
    format: int
    """The lowest in which there may be such records."""
    first_ns: int
    """Time of the first one; 0 without any."""
    broken: bool = False
    """Whether the file is missing, or goes on with something else."""


def log_facts(disk: Disk) -> LogFacts:
    """Read the log as far as it is whole. Raises VersionError for what newer software wrote."""
    try:
        file = disk.open(LOG_PATH)
    except NotFoundError:
        return LogFacts(0, 0, frozenset(), 1, 0, broken=True)
    packs, needed, first, records, end = set[str](), 1, 0, 0, 0
    try:
        for seq, _, body, after in records_in(file):
            record = parsed(seq, body)
            records, end = seq, after
            packs.update(named.pack for named in record.operations if isinstance(named, PackRange))
            needed = max(needed, needed_format(record.operations))
            first = first or record.time_ns
        return LogFacts(records, end, frozenset(packs), needed, first, broken=file.size() > end)
    finally:
        file.close()


def owners(disk: Disk) -> Iterator[tuple[str, bytes]]:
    """(pack, repository id) of every pack whose header is whole and names the pack itself."""
    for name in disk.list(PACK_FOLDER):
        path = f"{PACK_FOLDER}/{name}"
        if not name.endswith(_SUFFIX):
            continue
        try:
            file = disk.open(path)
        except NotFoundError:
            continue  # Another process has just removed it.
        try:
            head = file.read_at(0, layout.FILE_HEADER_BYTES)
            layout.check_file_header(head, path)
        except HimError:
            continue
        finally:
            file.close()
        if layout.pack_of(head).hex() == name.removesuffix(_SUFFIX):
            yield path, layout.repository_of(head)


def check_owner(disk: Disk, marker: Marker, packs: frozenset[str]) -> None:
    """Whether him.json is of the repository that packs named by the log are of; one that says so is enough.

    Raises:
        IntegrityError: all that say whose they are belong to another one.
    """
    own, others = bytes.fromhex(marker.repository_id), False
    for path, owner in owners(disk):
        if owner == own:
            return
        others |= path in packs
    if others:
        raise IntegrityError(f"{MARKER} is another repository's", object=MARKER, place=MARKER, fix=REWRITE)


def unmarked(disk: Disk, place: str) -> HimError:
    """Why a folder without him.json is no repository: it lost it, a restore was interrupted, or it never was one."""
    if RESTORING in disk.list(""):
        return ConflictError("a restore was interrupted", object=place, fix="run `him restore` again: it goes on")
    if any(name.endswith(_SUFFIX) for name in disk.list(PACK_FOLDER)) or log_facts(disk).records:
        return IntegrityError(f"{MARKER} is missing", object=MARKER, place=MARKER, fix=REWRITE)
    return NotFoundError(f"no repository at {place}", object=place, fix=f"make one with `him init {place}`")


def marker_bytes(disk: Disk) -> bytes:
    """him.json as it is; empty when it is missing."""
    try:
        file = disk.open(MARKER)
    except NotFoundError:
        return b""
    try:
        return file.read_at(0, MARKER_BYTES_MAX)
    finally:
        file.close()


class Walked(NamedTuple):
    """What is in a pack, by itself."""

    faults: list[Fault]
    records: int
    """Sound ones, up to the end of the last whole range."""
    size: int


def walk_pack(disk: Disk, path: str, owner: bytes | None) -> Walked:
    """Check a pack without the log: up to the end of its last whole range, for nobody knows whether more was committed.

    Args:
        owner: whose it must be, when that is known.
    """
    faults: list[Fault] = []
    file = disk.open(path)
    try:
        head, size = file.read_at(0, layout.FILE_HEADER_BYTES), file.size()
        try:
            layout.check_file_header(head, path)
            if owner not in (None, layout.repository_of(head)):
                place, text = f"{path} @ 0", "the pack is another repository's"
                faults.append(Fault(path, place, text, remedy.FOREIGN_PACK, "pack"))
        except HimError as error:
            faults.append(Fault(path, error.place, error.message, error.fix, "pack"))
        waiting: list[Fault] = []
        sound = beyond = 0
        for offset, found in walk(file, path, layout.FILE_HEADER_BYTES, size):
            if isinstance(found, HimError):
                kind, fix = ("record", remedy.HEAL) if isinstance(found, IntegrityError) else ("version", remedy.NEWER)
                waiting.append(
                    Fault(found.object or path, found.place or f"{path} @ {offset}", found.message, fix, kind)
                )
                continue
            beyond += 1
            if found.header.kind in (KIND_INDEX, KIND_FOOTER):
                faults, waiting, sound, beyond = faults + waiting, [], sound + beyond, 0
        return Walked(faults, sound, size)
    finally:
        file.close()


def newest_checkpoint(disk: Disk) -> tuple[int, int, list[str]] | None:
    """(record, snapshots, names of branches and tags) by the newest sound checkpoint, whatever the log says of it."""
    for name in sorted(disk.list(CHECKPOINT_FOLDER), reverse=True):
        path = f"{CHECKPOINT_FOLDER}/{name}"
        file = disk.open(path)
        try:
            mark, body = checkpoint.decode_file(file.read_at(0, min(file.size(), CHECKPOINT_BYTES_MAX)), path)
            state = checkpoint.decode(body, mark.seq)
        except HimError:
            continue
        finally:
            file.close()
        return mark.seq, len(state.snapshots), [ref for ref, _, _ in state.refs]
    return None


class Unopened(NamedTuple):
    """What can be told of a repository that does not open."""

    faults: list[Fault]
    notes: list[Fault]
    packs: int
    size_bytes: int


def told_unopened(disk: Disk, error: HimError) -> Unopened:
    """What bars opening, what the packs hold by themselves, and what can be had back."""
    facts, cold, owner = LogFacts(0, 0, frozenset(), 1, 0), "", None
    with suppress(HimError):
        facts = log_facts(disk)
    with suppress(HimError):
        settings = tier_settings(disk)
        cold = settings.cold if settings is not None else ""
    with suppress(HimError):
        owner = bytes.fromhex(parsed_marker(marker_bytes(disk), MARKER).repository_id)
    found = Unopened([], [], 0, 0)
    if error.place.startswith("log"):
        fix = remedy.log_remedy(facts.records, facts.end, cold)
        found.faults.append(Fault("commit log", error.place, error.message, fix, "log"))
    else:
        kind = {MARKER: "marker", TIER: "tier"}.get(error.object, "pack")
        found.faults.append(Fault(error.object or "repository", error.place, error.message, error.fix, kind))
    found.notes.append(Fault("commit log", LOG_PATH, f"its first {facts.records} records are whole", "", "log"))
    kept = newest_checkpoint(disk)
    if kept is not None:
        seq, count, names = kept
        text = f"it tells of {count} snapshots, and of the names {', '.join(names[:20])}"
        found.notes.append(Fault(f"checkpoint {seq}", CHECKPOINT_FOLDER, text, "", "checkpoint"))
    if cold:
        text, fix = "it has a copy of the log, and of packs", f"`him restore {cold} NEW` makes a repository of these"
        found.notes.append(Fault("cold tier", cold, text, fix, "tier"))
    size = packs = 0
    for name in disk.list(PACK_FOLDER):
        path = f"{PACK_FOLDER}/{name}"
        walked = walk_pack(disk, path, owner)
        found.faults.extend(walked.faults)
        found.notes.append(Fault(path, path, f"{walked.records} records are sound", "", "pack"))
        size, packs = size + walked.size, packs + 1
    return found._replace(packs=packs, size_bytes=size)
