"""Which keys open which directories: made with snapshots, changed when they are sealed, destroyed to shred them.

The secret of an encrypted directory opens all that it reaches. The log holds it wrapped under a key of the key ring:
one key for an open snapshot, another once it is sealed, one for each parent's directory at branching (the later merge
base). Keys are added and destroyed under the log's lock alone, so that no process destroys what another is about to
name (docs/design/015-keys.md).
"""

from collections.abc import Collection, Mapping, Set
from typing import Final

import msgspec

from him.crypto import KEY_BYTES, unwrap, wrap
from him.errors import IntegrityError, KeyNeededError
from him.ports import KeyRing, Rng
from him.pyramid import directory
from him.types import (
    BlobId,
    DirectoryWrapped,
    KeyEntry,
    LiveState,
    Operation,
    Secret,
    Snapshot,
    SnapshotId,
    Wrap,
    name_of,
)

OPEN: Final = "open"
SEALED: Final = "sealed"
BASE: Final = "base"
TRACE: Final = "trace"
_ID_BYTES: Final = 16
_KNOWN_MAX: Final = 10_000


class DirectoryKeys:
    """The keys of one repository's directories; without a ring nothing encrypted opens."""

    def __init__(self, ring: KeyRing | None, rng: Rng) -> None:
        self.ring = ring
        self._rng = rng
        self._known: dict[Wrap, Secret] = {}

    def get(self, key_id: bytes) -> bytes | None:
        """A key of the ring; None once it is destroyed. Raises KeyNeededError without a ring."""
        return self._there().get(key_id)

    def _there(self) -> KeyRing:
        if self.ring is None:
            raise KeyNeededError("it is encrypted, and the repository was opened without its keys")
        return self.ring

    def opened(self, found: Snapshot, shredded: Collection[str] = ()) -> Snapshot:
        """A snapshot whose directories are secrets as far as the keys are there; of shredded parents none is left.

        Raises:
            IntegrityError: a wrap that leads to another directory.
        """
        gone = {parent.snapshot_id for parent in found.parents}.intersection(shredded)
        if not found.wraps and not gone:
            return found
        secrets = {one.directory: secret for one in found.wraps if (secret := self._secret(found, one)) is not None}
        parents = tuple(
            msgspec.structs.replace(
                one,
                directory=directory.EMPTY
                if one.snapshot_id in gone
                else secrets.get(one.directory, BlobId(one.directory)),
            )
            for one in found.parents
        )
        present = secrets.get(found.directory, BlobId(found.directory))
        return msgspec.structs.replace(found, directory=present, parents=parents)

    def check(self, found: Snapshot) -> None:
        """Whether a snapshot's directory was opened, where it is encrypted. Raises KeyNeededError."""
        if not isinstance(found.directory, Secret) and found.directory in (one.directory for one in found.wraps):
            raise KeyNeededError("the snapshot is encrypted, and its keys are not at hand", object=found.snapshot_id)

    def wrapped(self, snapshot_id: SnapshotId, root: bytes, purpose: str, of: str = "") -> list[Operation]:
        """What the log must say so that a directory opens: nothing where it is not encrypted.

        Only under the log's lock. A key of that purpose is used again, but for sealing.

        Raises:
            KeyNeededError: there is no ring.
        """
        if not isinstance(root, Secret):
            return []
        entry = self._entry(snapshot_id, purpose, of)
        return [DirectoryWrapped(snapshot_id, self._wrap(snapshot_id, root, entry))]

    def renewed(self, found: Snapshot) -> list[Operation]:
        """What the log must say of an open snapshot when another is shredded: its own directory under a new key.

        Its earlier directories, which the log has under the key it had, may lead to what is to be shredded.
        """
        if found.sealed or not isinstance(found.directory, Secret):
            return []
        entry = self._made(found.snapshot_id, OPEN, "")
        return [DirectoryWrapped(found.snapshot_id, self._wrap(found.snapshot_id, found.directory, entry))]

    def traced(self, snapshot_id: SnapshotId, *, make: bool) -> KeyEntry | None:
        """The key of a snapshot's traces; made, under the log's lock alone, where there is none."""
        for entry in self._there().entries():
            if (entry.snapshot_id, entry.purpose) == (snapshot_id, TRACE):
                return entry
        return self._made(snapshot_id, TRACE, "") if make else None

    def tidy(self, live: LiveState, *, dropped: bool) -> None:
        """Destroy the keys that open nothing any more that is to be opened. Only under the log's lock.

        A snapshot's wraps are of its directory and of its parents'; whatever other key was made for it opened what it
        was once, or a parent that is shredded.

        Args:
            dropped: those of snapshots too that are dropped.

        Raises:
            StorageError: the ring could not be written.
        """
        if self.ring is None:
            return
        named = {one.snapshot_id: {wrap.key_id for wrap in one.wraps} for _, one in live.snapshots}
        gone = [entry.key_id for entry in self.ring.entries() if _is_needless(entry, named, live.shredded, dropped)]
        if gone:
            self.ring.change((), gone)

    # -- inner

    def _secret(self, found: Snapshot, one: Wrap) -> Secret | None:
        known = self._known.get(one)
        if known is not None:
            return known
        key = None if self.ring is None else self.ring.get(one.key_id)
        if key is None:
            return None
        secret = Secret(unwrap(key, _bound(found.snapshot_id, one.directory), one.wrapped))
        if secret.blob_id != one.directory:
            raise IntegrityError("a wrapped secret is of another directory", object=found.snapshot_id, place="log")
        self._keep(one, secret)
        return secret

    def _entry(self, snapshot_id: SnapshotId, purpose: str, of: str) -> KeyEntry:
        known = [
            one for one in self._there().entries()
            if (one.snapshot_id, one.purpose, one.of) == (snapshot_id, purpose, of)
        ]  # fmt: skip
        return known[-1] if known and purpose != SEALED else self._made(snapshot_id, purpose, of)

    def _made(self, snapshot_id: SnapshotId, purpose: str, of: str) -> KeyEntry:
        entry = KeyEntry(self._rng.token(_ID_BYTES), self._rng.token(KEY_BYTES), purpose, snapshot_id, of)
        self._there().change([entry], ())
        return entry

    def _wrap(self, snapshot_id: SnapshotId, secret: Secret, entry: KeyEntry) -> Wrap:
        name = name_of(secret)
        made = Wrap(name, entry.key_id, wrap(entry.key, _bound(snapshot_id, name), secret))
        self._keep(made, secret)
        return made

    def _keep(self, one: Wrap, secret: Secret) -> None:
        if len(self._known) >= _KNOWN_MAX:
            self._known.clear()
        self._known[one] = secret


def _is_needless(
    entry: KeyEntry, named: Mapping[SnapshotId, Set[bytes]], shredded: Collection[str], dropped: bool
) -> bool:
    if entry.snapshot_id in shredded or (entry.purpose == BASE and entry.of in shredded):
        return True
    if entry.purpose == TRACE:
        return False
    wraps = named.get(entry.snapshot_id)
    return dropped if wraps is None else entry.key_id not in wraps


def _bound(snapshot_id: SnapshotId, name: bytes) -> bytes:
    return snapshot_id.encode() + name
