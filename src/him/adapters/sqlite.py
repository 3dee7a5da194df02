"""SQLite as the log's queryable projection and as a memo of pure results; both can be deleted at any time."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

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

_SCHEMA_VERSION: Final = 1
_BUSY_TIMEOUT_S: Final = 60.0
_DIGEST: Final = 16
_SCHEMA: Final = """
CREATE TABLE position (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL, hash BLOB NOT NULL);
CREATE TABLE snapshots (id TEXT PRIMARY KEY, seq INTEGER NOT NULL, lamport INTEGER NOT NULL, body BLOB NOT NULL)
    WITHOUT ROWID;
CREATE INDEX snapshots_by_seq ON snapshots (seq);
CREATE TABLE attributes (snapshot TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (snapshot, key))
    WITHOUT ROWID;
CREATE TABLE refs (name TEXT PRIMARY KEY, kind TEXT NOT NULL, snapshot TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE streams (name TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE ranges (seq INTEGER NOT NULL, pack TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (seq, pack));
CREATE TABLE finished (pack TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
INSERT INTO position VALUES (1, 0, zeroblob(32));
"""

_CLEAR: Final = (
    "DELETE FROM snapshots",
    "DELETE FROM attributes",
    "DELETE FROM refs",
    "DELETE FROM streams",
    "DELETE FROM ranges",
    "DELETE FROM finished",
)


def _connect(path: Path | None, schema: str) -> sqlite3.Connection:
    """Open (in memory for None); a file that is no database of this version is made anew."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for attempt in (1, 2):
        connection = sqlite3.connect(
            str(path) if path else ":memory:", timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            _ensure_schema(connection, schema)
            return connection
        except sqlite3.DatabaseError as error:
            connection.close()
            if attempt == 2 or path is None or isinstance(error, sqlite3.OperationalError):
                raise StorageError(
                    f"a cache file cannot be used ({error})", place=str(path), fix="delete it: it is rebuilt"
                ) from error
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
    raise AssertionError("unreachable")


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
        self._lock = threading.RLock()

    def position(self) -> tuple[int, bytes]:
        """(seq, hash) of the last record applied."""
        with self._lock:
            seq, digest = self._db.execute("SELECT seq, hash FROM position").fetchone()
            return int(seq), bytes(digest)

    def clear(self) -> None:
        """Forget everything, to be rebuilt from the log."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            for statement in _CLEAR:
                self._db.execute(statement)
            self._db.execute("UPDATE position SET seq = 0, hash = zeroblob(32)")
            self._db.execute("COMMIT")

    def apply(self, records: Iterable[tuple[int, bytes, CommitRecord]]) -> None:
        """Apply records beyond the position; another process may have applied some already."""
        with self._lock:
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
                self._db.execute("ROLLBACK")
                raise

    def snapshot(self, snapshot_id: str) -> Snapshot | None:
        """The snapshot with its tags."""
        with self._lock:
            row = self._db.execute("SELECT body FROM snapshots WHERE id = ?", (snapshot_id,)).fetchone()
            return None if row is None else self._with_tags(row[0])

    def snapshots(self) -> Iterator[Snapshot]:
        """All snapshots, oldest first."""
        with self._lock:
            rows = self._db.execute("SELECT body FROM snapshots ORDER BY seq, id").fetchall()
        for (body,) in rows:
            with self._lock:
                yield self._with_tags(body)

    def refs(self) -> dict[str, tuple[str, str]]:
        """Name → (kind, snapshot id), by name."""
        with self._lock:
            rows = self._db.execute("SELECT name, kind, snapshot FROM refs ORDER BY name").fetchall()
            return {name: (kind, snapshot) for name, kind, snapshot in rows}

    def streams(self) -> dict[str, StreamSpec]:
        """Declared streams by name."""
        with self._lock:
            rows = self._db.execute("SELECT name, body FROM streams ORDER BY name").fetchall()
            return {name: msgspec.msgpack.decode(body, type=StreamSpec) for name, body in rows}

    def ranges(self, since: int) -> list[tuple[int, PackRange]]:
        """(seq, range) in log order."""
        with self._lock:
            rows = self._db.execute("SELECT seq, body FROM ranges WHERE seq > ? ORDER BY seq, rowid", (since,))
            return [(seq, msgspec.msgpack.decode(body, type=PackRange)) for seq, body in rows.fetchall()]

    def finished_packs(self) -> dict[str, PackFinished]:
        """Finished packs by name."""
        with self._lock:
            rows = self._db.execute("SELECT pack, body FROM finished ORDER BY pack").fetchall()
            return {name: msgspec.msgpack.decode(body, type=PackFinished) for name, body in rows}

    def lamport(self) -> int:
        """The highest Lamport time seen."""
        with self._lock:
            (value,) = self._db.execute("SELECT coalesce(max(lamport), 0) FROM snapshots").fetchone()
            return int(value)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def _with_tags(self, body: bytes) -> Snapshot:
        found = msgspec.msgpack.decode(body, type=Snapshot)
        rows = self._db.execute(
            "SELECT key, value FROM attributes WHERE snapshot = ? ORDER BY key", (found.snapshot_id,)
        ).fetchall()
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
            row = self._db.execute("SELECT value FROM memo WHERE kind = ? AND key = ?", (kind, key)).fetchone()
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
            except sqlite3.OperationalError:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()
