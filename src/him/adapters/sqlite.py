"""SQLite as the log's queryable projection and as a memo of pure results; both can be deleted at any time."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from blake3 import blake3

from him.errors import StorageError
from him.types import (
    AttributeSet,
    Batch,
    CommitRecord,
    Operation,
    PackFinished,
    PackRange,
    RefSet,
    Sealed,
    Snapshot,
    SnapshotDropped,
    SnapshotOpened,
    StreamDeclared,
    StreamSpec,
)

_SCHEMA_VERSION: Final = 2
_BUSY_TIMEOUT_S: Final = 60.0
_DIGEST: Final = 16
_CHECKED_BYTES_MAX: Final = 16 * 1024 * 1024
"""Files up to this size are checked when opened (milliseconds); damage in larger ones shows when it is read."""
_SCHEMA: Final = """
CREATE TABLE position (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL, hash BLOB NOT NULL,
    lamport INTEGER NOT NULL);
CREATE TABLE snapshots (id TEXT PRIMARY KEY, seq INTEGER NOT NULL, lamport INTEGER NOT NULL, body BLOB NOT NULL)
    WITHOUT ROWID;
CREATE INDEX snapshots_by_seq ON snapshots (seq);
CREATE TABLE attributes (snapshot TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (snapshot, key))
    WITHOUT ROWID;
CREATE TABLE refs (name TEXT PRIMARY KEY, kind TEXT NOT NULL, snapshot TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE streams (name TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE ranges (seq INTEGER NOT NULL, pack TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (seq, pack));
CREATE TABLE finished (pack TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
INSERT INTO position VALUES (1, 0, zeroblob(32), 0);
"""

_CLEAR: Final = (
    "DELETE FROM snapshots",
    "DELETE FROM attributes",
    "DELETE FROM refs",
    "DELETE FROM streams",
    "DELETE FROM ranges",
    "DELETE FROM finished",
    "UPDATE position SET seq = 0, hash = zeroblob(32), lamport = 0",
)


def _connect(path: Path | None, schema: str) -> sqlite3.Connection:
    """Open a cache file, or memory for None.

    A file that is no database of this version is made anew; where the disk refuses (full, read-only), memory serves:
    everything here can be computed again.
    """
    if path is None:
        return _prepared(":memory:", schema)
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return _prepared(str(path), schema)
        except (OSError, sqlite3.OperationalError):
            break
        except sqlite3.DatabaseError:
            _remove(path)
    return _prepared(":memory:", schema)


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _prepared(place: str, schema: str) -> sqlite3.Connection:
    connection = sqlite3.connect(place, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        _ensure_schema(connection, schema)
        if place != ":memory:" and Path(place).stat().st_size <= _CHECKED_BYTES_MAX:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(found)
    except BaseException:
        connection.close()
        raise
    return connection


def _ensure_schema(connection: sqlite3.Connection, schema: str) -> None:
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != _SCHEMA_VERSION:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in tables:
            connection.execute(f'DROP TABLE "{name}"')
        for statement in schema.split(";"):
            if statement.strip():
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    connection.execute("COMMIT")


class SqliteProjection:
    """`ports.Projection`; `path` None keeps it in memory (read-only repositories)."""

    def __init__(self, path: Path | None) -> None:
        self._db = _connect(path, _SCHEMA)
        self._path = path
        self._lock = threading.RLock()

    def position(self) -> tuple[int, bytes]:
        """(seq, hash) of the last record applied."""
        ((seq, digest),) = self._rows("SELECT seq, hash FROM position")
        return int(seq), bytes(digest)

    def clear(self) -> None:
        """Forget everything, to be rebuilt from the log; a file too damaged for that is replaced."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                for statement in _CLEAR:
                    self._db.execute(statement)
                self._db.execute("COMMIT")
            except sqlite3.DatabaseError:
                self._db.close()
                if self._path is not None:
                    _remove(self._path)
                self._db = _connect(self._path, _SCHEMA)

    def apply(self, records: Iterable[tuple[int, bytes, CommitRecord]]) -> None:
        """Apply records beyond the position; another process may have applied some already."""
        known = list(records)
        with self._lock:
            try:
                self._apply_all(known)
            except sqlite3.OperationalError:
                # The disk is full, or another process will not let go: go on in memory, with what is there.
                memory = _prepared(":memory:", "")
                self._db.backup(memory)
                self._db.close()
                self._db = memory
                self._apply_all(known)

    def snapshot(self, snapshot_id: str) -> Snapshot | None:
        """The snapshot with its tags."""
        rows = self._rows("SELECT body FROM snapshots WHERE id = ?", snapshot_id)
        return self._with_tags(rows[0][0]) if rows else None

    def snapshots(self) -> Iterator[Snapshot]:
        """All snapshots, oldest first."""
        for (body,) in self._rows("SELECT body FROM snapshots ORDER BY seq, id"):
            yield self._with_tags(body)

    def refs(self) -> dict[str, tuple[str, str]]:
        """Name → (kind, snapshot id), by name."""
        rows = self._rows("SELECT name, kind, snapshot FROM refs ORDER BY name")
        return {name: (kind, snapshot) for name, kind, snapshot in rows}

    def streams(self) -> dict[str, StreamSpec]:
        """Declared streams by name."""
        rows = self._rows("SELECT name, body FROM streams ORDER BY name")
        return {name: msgspec.msgpack.decode(body, type=StreamSpec) for name, body in rows}

    def ranges(self, since: int) -> list[tuple[int, PackRange]]:
        """(seq, range) in log order."""
        rows = self._rows("SELECT seq, body FROM ranges WHERE seq > ? ORDER BY seq, rowid", since)
        return [(seq, msgspec.msgpack.decode(body, type=PackRange)) for seq, body in rows]

    def finished_packs(self) -> dict[str, PackFinished]:
        """Finished packs by name."""
        rows = self._rows("SELECT pack, body FROM finished ORDER BY pack")
        return {name: msgspec.msgpack.decode(body, type=PackFinished) for name, body in rows}

    def lamport(self) -> int:
        """The highest Lamport time seen."""
        return int(self._rows("SELECT lamport FROM position")[0][0])

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def _rows(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(question, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise StorageError(
                    f"a cache file is damaged ({error})",
                    place=str(self._path),
                    fix="run `him fsck --rebuild`, or delete the folder cache: it is made anew",
                ) from error

    def _apply_all(self, records: list[tuple[int, bytes, CommitRecord]]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            at = self.position()[0]
            for seq, digest, record in records:
                if seq <= at:
                    continue
                for operation in record.operations:
                    self._apply(seq, operation)
                self._db.execute("UPDATE position SET seq = ?, hash = ?", (seq, digest))
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _with_tags(self, body: bytes) -> Snapshot:
        found = msgspec.msgpack.decode(body, type=Snapshot)
        rows = self._rows("SELECT key, value FROM attributes WHERE snapshot = ? ORDER BY key", found.snapshot_id)
        return msgspec.structs.replace(found, tags=dict(rows))

    def _store(self, seq: int | None, found: Snapshot) -> None:
        body = msgspec.msgpack.encode(found)
        if seq is not None:
            self._db.execute(
                "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)", (found.snapshot_id, seq, found.lamport, body)
            )
        else:
            self._db.execute(
                "UPDATE snapshots SET body = ?, lamport = ? WHERE id = ?", (body, found.lamport, found.snapshot_id)
            )

    def _apply(self, seq: int, operation: Operation) -> None:
        run = self._db.execute
        match operation:
            case SnapshotOpened():
                self._store(
                    seq,
                    Snapshot(
                        operation.snapshot_id,
                        operation.parents,
                        operation.created_at,
                        operation.writer,
                        operation.directory,
                        provenance=operation.provenance,
                        merge_policy=operation.merge_policy,
                    ),
                )
            case Batch():
                found = self.snapshot(operation.snapshot_id)
                if found is not None:
                    self._store(None, msgspec.structs.replace(found, directory=operation.directory))
            case Sealed():
                # Kept apart from the snapshots: a time is not given twice, even if its snapshot was dropped.
                run("UPDATE position SET lamport = max(lamport, ?)", (operation.lamport,))
                found = self.snapshot(operation.snapshot_id)
                if found is not None:
                    self._store(
                        None,
                        msgspec.structs.replace(
                            found,
                            sealed=True,
                            directory=operation.directory,
                            levels_root=operation.levels_root,
                            lamport=operation.lamport,
                            signature=operation.signature,
                        ),
                    )
            case PackRange():
                body = msgspec.msgpack.encode(operation)
                run("INSERT OR REPLACE INTO ranges VALUES (?, ?, ?)", (seq, operation.pack, body))
            case PackFinished():
                run(
                    "INSERT OR REPLACE INTO finished VALUES (?, ?)", (operation.pack, msgspec.msgpack.encode(operation))
                )
            case RefSet() if operation.snapshot_id:
                row = (operation.name, operation.kind, operation.snapshot_id)
                run("INSERT OR REPLACE INTO refs VALUES (?, ?, ?)", row)
            case RefSet():
                run("DELETE FROM refs WHERE name = ?", (operation.name,))
            case AttributeSet(value=None):
                run("DELETE FROM attributes WHERE snapshot = ? AND key = ?", (operation.snapshot_id, operation.key))
            case AttributeSet():
                row = (operation.snapshot_id, operation.key, operation.value or "")
                run("INSERT OR REPLACE INTO attributes VALUES (?, ?, ?)", row)
            case SnapshotDropped():
                run("DELETE FROM snapshots WHERE id = ?", (operation.snapshot_id,))
                run("DELETE FROM attributes WHERE snapshot = ?", (operation.snapshot_id,))
            case StreamDeclared():
                row = (operation.spec.name, msgspec.msgpack.encode(operation.spec))
                run("INSERT OR REPLACE INTO streams VALUES (?, ?)", row)


def _digest(kind: str, key: bytes, value: bytes) -> bytes:
    """SQLite has no checksums of its own: a damaged memo must be a miss, not a wrong result."""
    return blake3(kind.encode() + b"\0" + key + value).digest()[:_DIGEST]


class SqliteMemo:
    """`ports.Memo`; a failing, full or damaged disk makes it forgetful, never wrong."""

    def __init__(self, path: Path | None) -> None:
        self._db = _connect(
            path, "CREATE TABLE memo (kind TEXT, key BLOB, value BLOB, PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )
        self._lock = threading.RLock()

    def get(self, kind: str, key: bytes) -> bytes | None:
        """The stored result, or None."""
        with self._lock:
            try:
                row = self._db.execute("SELECT value FROM memo WHERE kind = ? AND key = ?", (kind, key)).fetchone()
            except sqlite3.DatabaseError:
                return None
        if row is None:
            return None
        value, digest = bytes(row[0])[:-_DIGEST], bytes(row[0])[-_DIGEST:]
        return value if digest == _digest(kind, key, value) else None

    def put(self, kind: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Remember results in one transaction."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                rows = [(kind, key, value + _digest(kind, key, value)) for key, value in items]
                self._db.executemany("INSERT OR REPLACE INTO memo VALUES (?, ?, ?)", rows)
                self._db.execute("COMMIT")
            except sqlite3.DatabaseError:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()
