"""A key ring in one file, encrypted under a passphrase; outside the repository, so that no copy of that holds keys.

File: the magic `HIMKEYS` 1, BLAKE3 of what follows (32 bytes), MessagePack of `_File`. The entries are encrypted under
a key of the file's own, which is made anew whenever entries are destroyed and is itself wrapped by what the passphrase
leads to (Argon2id, RFC 9106). The file is replaced whole, and what it was before is overwritten as far as the file
system lets us.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final, Protocol

import msgspec
from blake3 import blake3
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from him.crypto import KEY_BYTES, unwrap, wrap
from him.errors import ConflictError, IntegrityError, KeyNeededError, NotFoundError, StorageError, UsageError
from him.ports import Disk, File, Rng
from him.types import MALFORMED, HashKey, KeyEntry

_MAGIC: Final = b"HIMKEYS\x01"
_HEAD: Final = len(_MAGIC) + 32
_BYTES_MAX: Final = 64 * 1024 * 1024
_SALT_BYTES: Final = 16
_MEMORY_KIB: Final = 64 * 1024
_ITERATIONS: Final = 3
_LANES: Final = 4
_LANES_MAX: Final = 64
_SALT_BYTES_LEAST: Final = 8
_MEMORY_KIB_MAX: Final = 512 * 1024
"""What a file may ask for before anything tells that it is ours: eight times what is written."""
_WORK_KIB_MAX: Final = 4 * 1024 * 1024
"""Memory times passes: some ten seconds."""


class Wrapping(Protocol):
    """What wraps the key of a ring's file: a passphrase, or a service."""

    def wrap(self, key: bytes, about: bytes) -> bytes:
        """The key as only this can read it."""
        ...

    def unwrap(self, wrapped: bytes, about: bytes) -> bytes:
        """Inverse of `wrap`. Raises KeyNeededError where it is not of this."""
        ...


class _Wrapped(msgspec.Struct, frozen=True, array_like=True):
    salt: bytes
    memory_kib: int
    iterations: int
    lanes: int
    key: bytes

    @property
    def possible(self) -> bool:
        """Whether a derivation is within the limits, ours and those of RFC 9106 (eight blocks a lane)."""
        return (
            len(self.salt) >= _SALT_BYTES_LEAST
            and 0 < self.lanes <= _LANES_MAX
            and 8 * self.lanes <= self.memory_kib <= _MEMORY_KIB_MAX
            and 0 < self.iterations <= _WORK_KIB_MAX // self.memory_kib
        )


class Passphrase:
    """Wraps with a key that Argon2id makes of a passphrase: 64 MiB, three passes, four lanes (RFC 9106, section 4)."""

    def __init__(self, passphrase: str, rng: Rng) -> None:
        if not passphrase:
            raise UsageError("the passphrase is empty", fix="set HIM_PASSPHRASE, or HIM_PASSPHRASE_FILE")
        self._passphrase = passphrase.encode()
        self._rng = rng
        self._derived: dict[tuple[bytes, int, int, int], bytes] = {}

    def wrap(self, key: bytes, about: bytes) -> bytes:
        """The key, and how to derive what it is wrapped with."""
        known = next(iter(self._derived), (self._rng.token(_SALT_BYTES), _MEMORY_KIB, _ITERATIONS, _LANES))
        return msgspec.msgpack.encode(_Wrapped(*known, wrap(self._key(*known), about, key)))

    def unwrap(self, wrapped: bytes, about: bytes) -> bytes:
        """The key. Raises KeyNeededError for another passphrase, IntegrityError for what is none of ours."""
        try:
            found = msgspec.msgpack.decode(wrapped, type=_Wrapped)
        except MALFORMED as error:
            raise IntegrityError(f"the key ring does not parse ({error})") from error
        if not found.possible:
            raise IntegrityError("the key ring asks for an impossible derivation")
        try:
            return unwrap(self._key(found.salt, found.memory_kib, found.iterations, found.lanes), about, found.key)
        except IntegrityError:
            raise KeyNeededError("the passphrase does not open the key ring", fix="give the one it has") from None

    def _key(self, salt: bytes, memory_kib: int, iterations: int, lanes: int) -> bytes:
        how = salt, memory_kib, iterations, lanes
        if how not in self._derived:
            made = Argon2id(salt=salt, length=KEY_BYTES, iterations=iterations, lanes=lanes, memory_cost=memory_kib)
            self._derived = {how: made.derive(self._passphrase)}
        return self._derived[how]


class _File(msgspec.Struct, frozen=True, array_like=True):
    """`body` is a `_Body` encrypted under a key that is `wrapped`; both are bound to the repository's id."""

    repository_id: str
    wrapped: bytes
    body: bytes


class _Body(msgspec.Struct, frozen=True, array_like=True):
    hash_key_id: bytes
    hash_key: bytes
    entries: tuple[KeyEntry, ...]


class KeyFile:
    """`ports.KeyRing` in a file of a folder.

    Raises:
        NotFoundError: no such file.
        KeyNeededError: the wrapping does not open it, or it is another repository's.
        IntegrityError: it is damaged.
    """

    def __init__(self, disk: Disk, name: str, repository_id: str, wrapping: Wrapping, rng: Rng) -> None:
        self._disk, self._name, self._repository_id = disk, name, repository_id
        self._wrapping, self._rng = wrapping, rng
        self._seen = b""
        self._key = b""
        self._body = _Body(b"", b"", ())
        self._keys: dict[bytes, bytes] = {}
        self._refresh()

    @staticmethod
    def create(disk: Disk, name: str, repository_id: str, wrapping: Wrapping, rng: Rng) -> "KeyFile":
        """Make a ring with a hash key of its own. Raises ConflictError where a file is already."""
        with suppress(NotFoundError):
            disk.open(name).close()
            raise ConflictError("there is a key ring already", place=name, fix="use it, or name another file")
        body = _Body(rng.token(_SALT_BYTES), rng.token(KEY_BYTES), ())
        disk.write_whole(name, _encoded(repository_id, body, rng.token(KEY_BYTES), wrapping))
        return KeyFile(disk, name, repository_id, wrapping, rng)

    @property
    def hash_key(self) -> HashKey:
        """What the repository's encrypted content is named with."""
        return HashKey(self._body.hash_key_id, self._body.hash_key)

    def get(self, key_id: bytes) -> bytes | None:
        """A key; where it is not known, the file is looked at anew."""
        if key_id not in self._keys:
            self._refresh()
        return self._keys.get(key_id)

    def entries(self) -> Sequence[KeyEntry]:
        """All keys, in the order they were added."""
        self._refresh()
        return self._body.entries

    def change(self, add: Sequence[KeyEntry], destroy: Iterable[bytes]) -> None:
        """Replace the file by one with and without keys. Raises StorageError: then the old one stands."""
        unwanted = set(destroy)
        with _Locked(self._disk, self._name):
            self._refresh()
            kept = tuple(one for one in self._body.entries if one.key_id not in unwanted)
            # A copy of the file as it was cannot be told from the file: only another key keeps it apart.
            key = self._rng.token(KEY_BYTES) if len(kept) < len(self._body.entries) else self._key
            self._write(msgspec.structs.replace(self._body, entries=(*kept, *add)), key)

    def rewrap(self, wrapping: Wrapping) -> None:
        """Wrap the ring otherwise from now on: another passphrase, another service. No data is written anew."""
        with _Locked(self._disk, self._name):
            self._refresh()
            self._wrapping = wrapping
            self._write(self._body, self._rng.token(KEY_BYTES))

    # -- inner

    def _write(self, body: _Body, key: bytes) -> None:
        data = _encoded(self._repository_id, body, key, self._wrapping)
        if len(data) > _BYTES_MAX:
            raise StorageError(
                "the key ring is full", place=self._name, fix="shred or collect snapshots that are done with"
            )
        old = self._disk.open(self._name)
        try:
            self._disk.write_whole(self._name, data)
            with suppress(StorageError):  # Its name leads to the new file: this is care, not the promise.
                old.write_at(0, bytes(old.size()))
                old.sync()
        finally:
            old.close()
        self._take(data, key, body)

    def _refresh(self) -> None:
        data = self._read()
        if data[:_HEAD] == self._seen:
            return
        try:
            found = _decoded(data, self._name)
        except IntegrityError:
            # What another process has just replaced is overwritten: look at what took its place.
            data = self._read()
            found = _decoded(data, self._name)
        if found.repository_id != self._repository_id:
            raise KeyNeededError("the key ring is another repository's", place=self._name)
        about = self._repository_id.encode()
        key = self._wrapping.unwrap(found.wrapped, about)
        try:
            body = msgspec.msgpack.decode(unwrap(key, about, found.body), type=_Body)
        except MALFORMED as error:
            raise IntegrityError(f"the key ring does not parse ({error})", place=self._name) from error
        self._take(data, key, body)

    def _read(self) -> bytes:
        try:
            file = self._disk.open(self._name)
        except NotFoundError as error:
            fix = "name the file with HIM_KEYS; `him keys create` makes one"
            raise NotFoundError("there is no key ring", place=self._name, fix=fix) from error
        try:
            head = file.read_at(0, _HEAD)
            return head if head == self._seen else head + file.read_at(_HEAD, _BYTES_MAX)
        finally:
            file.close()

    def _take(self, data: bytes, key: bytes, body: _Body) -> None:
        self._seen, self._key, self._body = data[:_HEAD], key, body
        self._keys = {one.key_id: one.key for one in body.entries}


class _Locked:
    """The ring's lock, for the length of a `with` block."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._file: File = disk.open(f"{name}.lock", create=True)

    def __enter__(self) -> None:
        self._file.lock(wait=True)

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _encoded(repository_id: str, body: _Body, key: bytes, wrapping: Wrapping) -> bytes:
    about = repository_id.encode()
    found = _File(repository_id, wrapping.wrap(key, about), wrap(key, about, msgspec.msgpack.encode(body)))
    rest = msgspec.msgpack.encode(found)
    return _MAGIC + blake3(rest).digest() + rest


def _decoded(data: bytes, name: str) -> _File:
    if data[: len(_MAGIC)] != _MAGIC or blake3(data[_HEAD:]).digest() != data[len(_MAGIC) : _HEAD]:
        raise IntegrityError("the key ring is damaged", place=name, fix="put back a copy; without it nothing opens")
    try:
        return msgspec.msgpack.decode(data[_HEAD:], type=_File)
    except MALFORMED as error:
        raise IntegrityError(f"the key ring does not parse ({error})", place=name) from error
