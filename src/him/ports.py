"""Protocols between the core and the outside: each one to five methods, each with one embedded default."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from him.types import (
    CommitRecord,
    HashKey,
    KeyEntry,
    LiveState,
    PackFinished,
    PackRange,
    Snapshot,
    StreamSpec,
)

Progress = Callable[[int, int, str], None]
"""Told of long work: how much is done, of how much in all, and what is at hand."""


def silent(_done: int, _total: int, _what: str) -> None:
    """No progress is shown."""


class Clock(Protocol):
    """Time, handed in so that replay and simulation can decide it."""

    def now_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC."""
        ...

    def monotonic_ns(self) -> int:
        """Nanoseconds that never run backwards, for durations."""
        ...


class Rng(Protocol):
    """Randomness, handed in so that replay and simulation can decide it."""

    def token(self, size: int) -> bytes:
        """`size` random bytes."""
        ...


class File(Protocol):
    """An open file of a Disk."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; shorter only at the end of the file."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`; how many bytes there were (fewer only at the end of the file)."""
        ...

    def write_at(self, offset: int, *parts: bytes | memoryview) -> None:
        """Write all parts, one after the other, from `offset` on. Raises StorageError (full disk, read-only)."""
        ...

    def size(self) -> int:
        """Length in bytes."""
        ...

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes."""
        ...

    def allocated(self) -> int:
        """Bytes the file takes on the disk; fewer than `size` where it has holes."""
        ...

    def data_runs(self) -> list[tuple[int, int]]:
        """(start, end) of the runs that are not holes, in order; what is no hole may still be zeros."""
        ...

    def punch(self, offset: int, size: int) -> bool:
        """Free a range, which then reads as zeros; False when someone views a part of it, or nothing can be freed."""
        ...

    def sync(self) -> None:
        """Return once everything written is durable. Raises StorageError; the file must not be trusted after."""
        ...

    def lock(self, *, wait: bool) -> bool:
        """Take the file's exclusive lock (dies with the process); False if it is held and `wait` is False."""
        ...

    def unlock(self) -> None:
        """Give the lock back."""
        ...

    def close(self) -> None:
        """Release the descriptor and the lock."""
        ...


class Disk(Protocol):
    """A folder of files; paths are relative with `/`. The only way the core touches a file system."""

    def open(self, path: str, *, create: bool = False) -> File:
        """Open for reading and writing (for reading alone where the disk is read-only).

        Raises:
            NotFoundError: it does not exist and `create` is False.
        """
        ...

    def view(self, path: str, offset: int, size: int) -> memoryview:
        """A range of a file without copying, read-only.

        The range carries a shared lock for as long as anything refers to the memory: whoever frees its space must
        take the exclusive one first, since a view of freed space turns to zeros.

        Raises:
            NotFoundError: no such file.
            StorageError: the range is not there, or the system refuses.
        """
        ...

    def list(self, folder: str) -> list[str]:
        """Names in a folder, sorted; empty when it does not exist."""
        ...

    def write_whole(self, path: str, *parts: bytes | memoryview) -> None:
        """Replace a file atomically and durably."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        ...

    def sync_folder(self, folder: str) -> None:
        """Make created and removed names durable."""
        ...


class ObjectStore(Protocol):
    """Objects by name in a bucket, or in a folder that serves as one: the cold tier.

    Names are relative with `/`. Every method may raise StorageError when the store refuses (credentials, quota, a full
    disk) and UnavailableError when it did not answer, or answered 5xx, for as long as retries are worth it.
    """

    def size(self, name: str) -> int | None:
        """Bytes of an object; None when it does not exist."""
        ...

    def get(self, name: str, limit: int) -> bytes:
        """A whole small object. Raises NotFoundError, and LimitError above `limit` bytes."""
        ...

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """One GET for each (offset, size), several in flight; bytes in the order asked for.

        Raises:
            NotFoundError: no such object, or one that ends before a range does.
        """
        ...

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Replace a small object atomically; with `if_absent` only where there is none. Whether it was written.

        A reply that was lost leaves the outcome open: then UnavailableError, and the caller reads what is there.
        """
        ...

    def upload(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Put a large object from its parts in order, in several requests; nothing is visible before the last."""
        ...

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every object whose name begins with `prefix`, sorted; never asked for a decision."""
        ...

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; those that are not there count as removed."""
        ...


class ErasureCode(Protocol):
    """The arithmetic of Reed–Solomon codes: every implementation gives the same bytes."""

    def __call__(self, matrix: NDArray[np.uint8], parts: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """(rows, n) coefficients times n parts of equal length, over GF(2^8) with polynomial 0x11d; a part a row."""
        ...


class CommitLog(Protocol):
    """The one ordered log that is the authority of a repository (design §6)."""

    def head(self) -> tuple[int, bytes]:
        """Sequence number and hash of the last published record; (0, 32 zero bytes) when empty."""
        ...

    def read(self, since: int) -> Iterator[tuple[int, bytes, bytes]]:
        """(seq, hash, body) of every published record after `since`, in order. Raises IntegrityError."""
        ...

    def hash_at(self, seq: int) -> bytes:
        """Hash of a published record; 32 zero bytes for 0. Raises IntegrityError."""
        ...

    def commit(self, build: Callable[[], bytes | None]) -> int:
        """Append the record `build` returns, and return its seq (the head's when `build` returns None).

        `build` runs when no other record can slip in between (under the lock) and may be called again by logs
        that retry. On return the record is durable and visible.
        """
        ...

    def checkpoints(self) -> list[int]:
        """Sequence numbers of the checkpoints kept, up to the head, newest first; nothing is verified."""
        ...

    def checkpoint(self, seq: int) -> tuple[bytes, bytes]:
        """(hash of record `seq`, body) of a checkpoint.

        Raises:
            NotFoundError: none is kept there.
            IntegrityError: it is damaged, or of another log. VersionError: written by newer software.
        """
        ...

    def put_checkpoint(self, seq: int, body: bytes) -> None:
        """Keep the state at record `seq`, atomically, and drop older ones but the newest few. Raises StorageError."""
        ...


class Projection(Protocol):
    """A queryable copy of the log's live state; can be deleted and rebuilt at any time."""

    def position(self) -> tuple[int, bytes]:
        """Sequence number and hash of the last record applied."""
        ...

    def apply(self, records: Iterable[tuple[int, bytes, CommitRecord]]) -> None:
        """Apply records in order, each once; those at or below the position are passed over."""
        ...

    def restore(self, state: LiveState, *, expected: tuple[int, bytes] | None) -> bool:
        """Replace everything by `state` in one transaction, if the position is `expected` still; whether it was.

        None expects nothing: the caller holds the log's lock.
        """
        ...

    def state(self) -> LiveState:
        """Everything, as it stood at one moment."""
        ...

    def snapshot(self, snapshot_id: str) -> Snapshot | None:
        """The snapshot with its tags, or None."""
        ...

    def snapshots(self) -> Iterator[Snapshot]:
        """All snapshots, oldest first."""
        ...

    def refs(self) -> dict[str, tuple[str, str]]:
        """Name → (kind "branch" or "tag", snapshot id)."""
        ...

    def streams(self) -> dict[str, StreamSpec]:
        """Streams declared beside the built-in ones."""
        ...

    def packs(self, first: int) -> list[str]:
        """Names of the packs numbered from `first` on; a pack's number is its rank by first appearance in the log."""
        ...

    def pack_changes(self, since: int) -> list[tuple[int, PackRange | PackFinished]]:
        """What brought rows after record `since`, in order of the records that brought them.

        Each range of an unfinished pack; of a finished one that got a range after `since` its finish alone (at the
        seq of its last range), for its footer has all rows.
        """
        ...

    def released(self, since: int) -> list[tuple[str, int, int]]:
        """(name, condemned, removed) of packs that a record after `since` condemned or removed; 0 where none did."""
        ...

    def retention(self) -> dict[tuple[str, str], int]:
        """(stream, task or "") → seconds its tiles are kept; 0 for ever."""
        ...

    def expired(self) -> dict[tuple[str, str], int]:
        """(stream, snapshot id or "" for any) → tiles written by snapshots opened before (ns) are let go."""
        ...

    def shredded(self) -> frozenset[str]:
        """Ids of shredded snapshots."""
        ...

    def lamport(self) -> int:
        """The highest Lamport time seen."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class Memo(Protocol):
    """A cache of pure results by content: losing it costs time, never an answer."""

    def get(self, kind: str, key: bytes) -> bytes | None:
        """The stored result, or None."""
        ...

    def put(self, kind: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Remember results; may be dropped at any time."""
        ...


class KeyRing(Protocol):
    """Keys that are kept outside the repository; what it gave and was told is the same for all processes.

    Every method may raise StorageError, and KeyNeededError where the ring does not open any more.
    """

    @property
    def hash_key(self) -> HashKey:
        """What the repository's encrypted content is named with."""
        ...

    def get(self, key_id: bytes) -> bytes | None:
        """A key, or None when it is not there (any more)."""
        ...

    def entries(self) -> Sequence[KeyEntry]:
        """All that is there now."""
        ...

    def change(self, add: Sequence[KeyEntry], destroy: Iterable[bytes]) -> None:
        """Add keys, and destroy others by their ids; durable when it returns."""
        ...


class ArraySource(Protocol):
    """An array that need not fit into memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its length on every axis."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The type of its values."""
        ...

    def part(self, begin: Sequence[int], end: Sequence[int]) -> NDArray[np.generic] | None:
        """Values [begin, end) on every axis; None where all bytes are known to be zero.

        Rows are asked for from the first to the last; of the same rows several parts may be asked for.

        Raises:
            UsageError: the values cannot be read.
        """
        ...


class PictureDecoder(Protocol):
    """Turns the bytes of an image file into pixels."""

    def decode(self, data: bytes, name: str) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB. Raises UsageError (truncated, unknown format) and LimitError (too many pixels)."""
        ...


class TextReader(Protocol):
    """Reads text from pixels in two steps, so that each can be remembered by content."""

    def pin(self) -> str:
        """Hex digest of models, configuration, code and runtime that decide the result."""
        ...

    def detect(self, picture: NDArray[np.uint8]) -> list[list[tuple[int, int]]]:
        """Quadrilaterals (four (x, y) corners, clockwise from top left) of text in an (h, w, 3) RGB picture."""
        ...

    def recognise(self, crops: Sequence[NDArray[np.uint8]]) -> list[tuple[str, float]]:
        """(text, confidence 0…1) of each (h, w, 3) RGB crop of one line."""
        ...


class TextEncoder(Protocol):
    """Turns texts into unit vectors of meaning."""

    def pin(self) -> str:
        """Hex digest of model, tokenizer, settings and runtime that decide the result."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.int8]:
        """(n, EMBEDDING_DIMS) int8: each unit vector × EMBEDDING_SCALE, rounded and clipped."""
        ...


class Recorder(Protocol):
    """Where a run's outside effects and step digests pass through (design §10)."""

    def effect(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The result of an outside effect: made and noted when recording, taken from the trace when replaying."""
        ...

    def step(self, name: str, inputs: bytes, output: bytes) -> None:
        """Note (or compare) the digests of a recomputed step's canonical input and output."""
        ...


__all__ = [
    "ArraySource",
    "Clock",
    "CommitLog",
    "Disk",
    "ErasureCode",
    "File",
    "KeyRing",
    "Memo",
    "ObjectStore",
    "PictureDecoder",
    "Progress",
    "Projection",
    "Recorder",
    "Rng",
    "TextEncoder",
    "TextReader",
    "silent",
]
