"""Where a repository's key ring is, and how it is opened."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from him.adapters.keyfile import KeyFile, Passphrase
from him.adapters.local import LocalDisk, SystemRng
from him.app.folder import state_folder
from him.catalog import marker as marker_file
from him.catalog.marker import MARKER
from him.catalog.salvage import marker_bytes
from him.errors import KeyNeededError, UsageError
from him.handle import read_limited
from him.ports import KeyRing

KEYS: Final = "HIM_KEYS"
PASSPHRASE: Final = "HIM_PASSPHRASE"
PASSPHRASE_FILE: Final = "HIM_PASSPHRASE_FILE"
_PASSPHRASE_BYTES_MAX: Final = 64 * 1024

Place = str | os.PathLike[str]


def ring_path(repository: Place, environ: Mapping[str, str] = os.environ) -> Path:
    """Where a repository's key ring is: HIM_KEYS, else a file in the user's own state folder."""
    named = environ.get(KEYS)
    return Path(named).absolute() if named else state_folder() / "keys" / f"{_id(repository)}.ring"


def create_ring(repository: Place, passphrase: str, keys: Place | None = None) -> KeyFile:
    """Make the key ring of a repository, which exists.

    Args:
        keys: its file, outside the repository; as `ring_path` says when left out.

    Raises:
        UsageError: an empty passphrase, or a file inside the repository.
        ConflictError: there is one already.
    """
    path, rng = Path(keys or ring_path(repository)).absolute(), SystemRng()
    if Path(repository).resolve() in path.resolve().parents:
        raise UsageError(
            "the key ring would lie in the repository, whose copies would then hold the keys", object=str(path),
            fix="name a file elsewhere",
        )  # fmt: skip
    wrapping = Passphrase(passphrase, rng)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return KeyFile.create(LocalDisk(path.parent), path.name, _id(repository), wrapping, rng)


def open_ring(repository: Place, passphrase: str, keys: Place | None = None) -> KeyFile:
    """Open the key ring of a repository.

    Raises:
        NotFoundError: there is none. KeyNeededError: the passphrase does not open it. IntegrityError: it is damaged.
    """
    path, rng = Path(keys or ring_path(repository)).absolute(), SystemRng()
    return KeyFile(LocalDisk(path.parent), path.name, _id(repository), Passphrase(passphrase, rng), rng)


def change_passphrase(ring: KeyFile, passphrase: str) -> None:
    """Open a ring with another passphrase from now on; no data is written anew. Raises UsageError, StorageError."""
    ring.rewrap(Passphrase(passphrase, SystemRng()))


def ring_of_environment(repository: Place, environ: Mapping[str, str] = os.environ) -> KeyRing | None:
    """The key ring as the environment names it; None where there is none, or no passphrase. Raises as `open_ring`."""
    passphrase = passphrase_of(environ)
    if not passphrase:
        return None
    path = ring_path(repository, environ)
    return open_ring(repository, passphrase, path) if path.is_file() or KEYS in environ else None


def passphrase_of(environ: Mapping[str, str], prefix: str = "") -> str:
    """HIM_PASSPHRASE, or the first line of the file that HIM_PASSPHRASE_FILE names; empty where neither is set.

    Args:
        prefix: of both names, such as "NEW_" for HIM_NEW_PASSPHRASE.
    """
    named = environ.get(PASSPHRASE_FILE.replace("HIM_", f"HIM_{prefix}"))
    if not named:
        return environ.get(PASSPHRASE.replace("HIM_", f"HIM_{prefix}"), "")
    try:
        return read_limited(Path(named), _PASSPHRASE_BYTES_MAX).decode().splitlines()[0]
    except (UnicodeDecodeError, IndexError) as error:
        raise KeyNeededError("the passphrase's file holds none", object=named) from error


def _id(repository: Place) -> str:
    return marker_file.parsed(marker_bytes(LocalDisk(Path(repository), read_only=True)), MARKER).repository_id
