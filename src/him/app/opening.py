"""The ways to a repository: opened, checked, cloned, restored."""

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

from him import selftest
from him.adapters.local import LocalDisk, SystemClock, SystemRng
from him.adapters.minilm import MiniLmEncoder
from him.adapters.objects import open_store
from him.adapters.rapidocr import RapidTextReader
from him.app.folder import create as make
from him.app.folder import left_by_restore
from him.app.repository import Repository, check_budget
from him.app.rings import ring_of_environment
from him.catalog import marker as marker_file
from him.catalog import spare
from him.catalog.files import examine
from him.catalog.fsck import FsckReport, unopened
from him.catalog.heal import HealReport
from him.catalog.log import LOG_PATH
from him.catalog.marker import MARKER, MARKER_BYTES_MAX
from him.catalog.mend import mend
from him.catalog.restore import Restored
from him.catalog.restore import restore as restore_log
from him.catalog.salvage import RESTORING, unmarked
from him.catalog.transfer import TransferReport
from him.config import (
    RESTORE_BUDGET_BYTES,
    WARM_FREE_RATIO,
)
from him.errors import (
    ConflictError,
    HimError,
    IntegrityError,
    LimitError,
    NotFoundError,
    UsageError,
)
from him.ports import Clock, Disk, KeyRing, ObjectStore, Progress, Rng, TextEncoder, TextReader, silent
from him.tier.care import Journal
from him.tier.mirror import Mirror
from him.tier.settings import TIER, TierSettings, tier_settings
from him.tier.warm import PACK_FOLDER


def open(
    path: str | os.PathLike[str],
    *,
    create: bool = False,
    clock: Clock | None = None,
    rng: Rng | None = None,
    reader: TextReader | None = None,
    encoder: TextEncoder | None = None,
    disk: Disk | None = None,
    cold: ObjectStore | None = None,
    keys: KeyRing | None = None,
) -> "Repository":
    """Open a repository.

    Args:
        path: its folder.
        create: make it when the folder is missing or empty.
        clock, rng, reader, encoder, disk: other ports than the embedded ones; a disk must hold the same folder.
        cold: another cold store than the one `tier.json` names; only used where there is such a file.
        keys: its key ring (`him.open_ring`); the one that the environment names when left out. Without it what is
            encrypted stays closed.

    Raises:
        NotFoundError: no repository there.
        ConflictError: `create`, and the folder holds something else.
        VersionError: written by a newer format.
        IntegrityError: its commit log is damaged.
        MissingPartError: the self-test failed; nothing was touched.
    """
    selftest.ensure()
    root = Path(path)
    clock, rng = clock or SystemClock(), rng or SystemRng()
    if not (root / MARKER).is_file():
        if not create:
            raise unmarked(LocalDisk(root), str(root))
        make(root, disk or LocalDisk(root), clock, rng)
    read, encode = reader or RapidTextReader(), encoder or MiniLmEncoder()
    ring = keys or ring_of_environment(root)
    try:
        return Repository(root, clock, rng, read, encode, disk, cold, ring)
    except IntegrityError as error:
        if not error.place.startswith("log") or not _mended_log(root, disk or LocalDisk(root), clock, cold):
            raise
    return Repository(root, clock, rng, read, encode, disk, cold, ring)


def _mended_log(root: Path, disk: Disk, clock: Clock, cold: ObjectStore | None) -> bool:
    """Put back what is damaged of a log that does not open, if there is a copy of it; whether anything was."""
    if not os.access(root, os.W_OK):
        return False
    with contextlib.suppress(HimError):
        settings = tier_settings(disk)
        cold = cold or (open_store(settings.cold) if settings is not None else None)
    mended, journal = spare.mend(disk, cold), Journal(disk, clock)
    for seq in mended:
        journal.add("healed", LOG_PATH, 0, 0, why=f"record {seq}, from a copy of the log")
    journal.close()
    return bool(mended)


def clone(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    refs: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> TransferReport:
    """Make a repository at `path` that holds what branches and tags of another one name (`Repository.push`).

    Run again after a break it goes on: a repository without a snapshot is taken as it is.

    Raises:
        NotFoundError: no repository at `source`, or no such branch or tag.
        ConflictError: `path` holds something else, or a named branch's head is open.
    """
    with open(source) as origin:
        absent = [name for name in refs or () if name not in origin.refs()]
        if absent:
            raise NotFoundError(f"no branch or tag is called {absent[0]!r}", object=absent[0])
        if Path(path).exists() and Path(path).samefile(origin.path):
            raise UsageError("both sides are one repository", object=str(path), fix="name another folder")
        with open(path, create=True) as made:
            if made.snapshots():
                raise ConflictError("there is a repository already", object=str(path), fix="use `him pull` in it")
            return made.pull(source, refs, progress=progress)


def check(path: str | os.PathLike[str], *, rebuild: bool = False, progress: Progress | None = None) -> FsckReport:
    """`Repository.fsck` for a repository that may be too damaged to open: then its packs are checked by themselves.

    Args:
        rebuild: first write again what can be told from elsewhere: him.json, receipts of the cold tier, caches, lists.

    Raises:
        NotFoundError: no repository there. VersionError: written by newer software.
    """
    selftest.ensure()
    root = Path(path)
    if not (root / MARKER).is_file() and not isinstance(error := unmarked(LocalDisk(root), str(root)), IntegrityError):
        raise error
    disk = LocalDisk(root, read_only=not os.access(root, os.W_OK))
    mended = mend(disk, lambda tier: open_store(tier.cold), SystemRng()) if rebuild else []
    before = examine(disk)
    try:
        # Not `open`, which would mend the log: a check only tells.
        ring = ring_of_environment(root)
        repository = Repository(root, SystemClock(), SystemRng(), RapidTextReader(), MiniLmEncoder(), ring=ring)
    except IntegrityError as error:
        return unopened(disk, before, error)
    with repository:
        return repository.fsck(rebuild=rebuild, progress=progress).after(before, mended)


def heal(path: str | os.PathLike[str], *, progress: Progress | None = None) -> HealReport:
    """`CareHandle.heal` for a repository that may be too damaged to open: him.json and receipts are mended before.

    Raises:
        NotFoundError: no repository there. VersionError: written by newer software.
        IntegrityError: it cannot be opened; `him fsck` tells what can be had back.
        BusyError: another process scrubs it.
    """
    selftest.ensure()
    root = Path(path)
    if not (root / MARKER).is_file() and not isinstance(error := unmarked(LocalDisk(root), str(root)), IntegrityError):
        raise error
    mended = mend(LocalDisk(root), lambda tier: open_store(tier.cold), SystemRng())
    with open(path) as repository:
        found = repository.care.heal(progress)
    return msgspec.structs.replace(found, healed=(*mended, *found.healed))


def restore(
    cold: str,
    path: str | os.PathLike[str],
    *,
    budget_bytes: int = RESTORE_BUDGET_BYTES,
    everything: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Make a repository from its cold tier alone; it only reads that tier until `set_tier(…, take_over=True)`.

    What the newest, unfinished packs held is not there: the log is cut before the first commit that needs it. Packs are
    fetched as they are read. An interrupted restore goes on when it is called again.

    Args:
        cold: a folder, or `s3://bucket/prefix` (credentials come from the environment).
        path: a folder that does not exist or is empty.
        budget_bytes: what the packs may take on this disk.
        everything: fetch all packs at once.

    Raises:
        ConflictError: the folder holds something else.
        NotFoundError: there is no repository in the cold tier.
        IntegrityError: what it holds is damaged; names the place.
        LimitError: not everything fits into the budget.
    """
    root = Path(path)
    check_budget(budget_bytes)
    if "://" not in cold and not Path(cold).is_dir():
        raise NotFoundError("there is no such folder", object=cold, fix="name the place that `him tier set` was given")
    store = open_store(cold)
    try:
        marker = store.get(MARKER, MARKER_BYTES_MAX)
    except NotFoundError as error:
        fix = "name the place that `him tier set` was given"
        raise NotFoundError("there is no repository in the cold tier", object=cold, fix=fix) from error
    if root.exists() and not left_by_restore(root, marker):
        raise ConflictError(f"{root} is not empty", object=str(root), fix="name a new or empty folder")
    marker_file.parsed(marker, cold)
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    disk = LocalDisk(root)
    disk.write_whole(RESTORING, marker)
    (root / PACK_FOLDER).mkdir(exist_ok=True, mode=0o700)
    show = progress or silent
    found = restore_log(disk, store, SystemClock(), f"{platform.node()}:{os.getpid()}", show)
    if everything and found.cold_bytes > budget_bytes * (1 - WARM_FREE_RATIO):
        raise LimitError(
            f"all packs take {found.cold_bytes:,} bytes, of the budget of {budget_bytes:,} nine tenths may be filled",
            fix="give a larger --budget, or leave --all out: packs are then fetched as they are read",
        )
    settings = TierSettings(cold, budget_bytes, None)
    if everything:
        mirror = Mirror(disk, store, SystemClock(), budget_bytes, claim=settings.claim())
        with contextlib.closing(mirror):
            mirror.prefetch_all(show)
    disk.write_whole(TIER, settings.encoded())
    # Last, so that a crash leaves either something to go on with or a whole repository.
    disk.write_whole(MARKER, marker)
    disk.remove(RESTORING)
    return found
