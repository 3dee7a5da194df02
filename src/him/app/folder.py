"""A repository's folder: made, and told from others."""

import os
from pathlib import Path

from him.catalog.log import FileLog
from him.catalog.marker import MARKER, Marker
from him.catalog.salvage import RESTORING
from him.config import (
    PLAIN_FORMAT,
)
from him.errors import (
    ConflictError,
)
from him.ports import Clock, Disk, Rng
from him.tier.warm import PACK_FOLDER


def create(root: Path, disk: Disk, clock: Clock, rng: Rng) -> None:
    """Make an empty repository. Raises ConflictError when the folder holds something else."""
    if root.exists() and (not root.is_dir() or not all(_left_by_creation(entry) for entry in root.iterdir())):
        raise ConflictError(f"{root} is not empty", object=str(root), fix="name a new or empty folder")
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    FileLog.create(disk)
    (root / PACK_FOLDER).mkdir(exist_ok=True, mode=0o700)
    marker = Marker(PLAIN_FORMAT, rng.token(16).hex(), clock.now_ns())
    # Last, so that a crash leaves either no repository or a whole one.
    disk.write_whole(MARKER, marker.encoded())


def state_folder() -> Path:
    """Where what is the user's own, and no repository's, is kept."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "him"


def left_by_restore(root: Path, marker: bytes) -> bool:
    """Whether the folder is empty, or holds what an interrupted restore of this repository has left."""
    if not root.is_dir():
        return False
    names = {
        entry.name for entry in root.iterdir() if not (entry.name.startswith(RESTORING) and entry.suffix == ".new")
    }
    if not names:
        return True
    return MARKER not in names and RESTORING in names and (root / RESTORING).read_bytes() == marker


def _left_by_creation(entry: Path) -> bool:
    """Whether an interrupted creation left this in the folder, where nothing can be stored yet."""
    if entry.name.startswith(f"{MARKER}.") and entry.suffix == ".new":
        return True
    return (
        entry.name in ("log", PACK_FOLDER)
        and entry.is_dir()
        and not any(not file.is_file() or file.stat().st_size for file in entry.iterdir())
    )
