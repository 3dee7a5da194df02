"""Bugs planted on purpose: a simulator that does not find them would not find others either.

Each replaces a piece of production code for the length of a `with` block.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

from him.catalog.lease import Leases
from him.catalog.log import FileLog
from him.errors import UnavailableError, UsageError
from him.ports import File, ObjectStore
from him.tier import cold
from him.tier.cold import Claim, ReadLog


@contextmanager
def _replaced(owner: Any, name: str, by: object) -> Generator[None]:
    was = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, was)


class _Unsynced:
    """A file whose sync does nothing."""

    def __init__(self, file: File) -> None:
        self._file = file

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def sync(self) -> None:
        """Nothing."""


@contextmanager
def skipped_fsync() -> Generator[None]:
    """A commit record is published without being synced before."""
    made = FileLog.__init__

    def careless(log: FileLog, *given: Any, **named: Any) -> None:
        made(log, *given, **named)
        file = "_file"
        setattr(log, file, _Unsynced(getattr(log, file)))

    with _replaced(FileLog, "__init__", careless):
        yield


class _Hopeful:
    """A store whose conditional put counts as carried out where no reply came."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.size, self.get, self.get_ranges = store.size, store.get, store.get_ranges
        self.upload, self.delete = store.upload, store.delete

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Taken for done."""
        try:
            return self._store.put(name, data, if_absent=if_absent)
        except UnavailableError:
            return True

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """As it is."""
        return self._store.list(prefix)


@contextmanager
def dropped_nonce() -> Generator[None]:
    """Whoever takes a cold tier over does not look whose nonce is there after a reply was lost."""
    take_over = cold.take_over

    def careless(store: ObjectStore, log: ReadLog, nonce: str) -> Claim:
        return take_over(_Hopeful(store), log, nonce)

    with _replaced(cold, "take_over", careless):
        yield


@contextmanager
def ignored_leases() -> Generator[None]:
    """Collecting garbage removes packs that others still read."""

    def none(_: Leases) -> dict[str, int]:
        return {}

    with _replaced(Leases, "floors", none):
        yield


PLANTS: Final[dict[str, Callable[[], Any]]] = {
    "skipped-fsync": skipped_fsync,
    "dropped-nonce": dropped_nonce,
    "ignored-leases": ignored_leases,
}
"""By name."""

NEEDED: Final[dict[str, Sequence[str]]] = {
    "skipped-fsync": ("declare", "put", "read_tile"),
    "dropped-nonce": ("declare", "put", "push", "take_over"),
    "ignored-leases": ("declare", "put", "slow_put", "replace", "drop", "keep", "recall", "gc", "read_tile"),
}
"""Kinds of calls among which each is found soonest; it is found among all of them too."""


def planted(name: str) -> Any:
    """A `with` block in which a bug is planted; none for no name. Raises UsageError."""
    if not name:
        return nullcontext()
    if name not in PLANTS:
        raise UsageError(f"no bug is called {name!r}", fix=f"use one of: {', '.join(PLANTS)}")
    return PLANTS[name]()
