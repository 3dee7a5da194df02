"""SQLite as the log's queryable projection and as a memo of pure results; both can be deleted at any time."""

import itertools
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from blake3 import blake3

from him.errors import StorageError
from him.types import (
    MALFORMED,
    AttributeSet,
    Batch,
    CommitRecord,
    DirectoryWrapped,
    LiveState,
    Operation,
    PackCondemned,
    PackFinished,
    PackRange,
    PackRemoved,
    PackState,
    RefSet,
    RetentionSet,
    Sealed,
    Snapshot,
    SnapshotDropped,
    SnapshotId,
    SnapshotOpened,
    SnapshotShredded,
    StreamDeclared,
    StreamSpec,
    TilesExpired,
)

_Result = TypeVar("_Result")
_Struct = TypeVar("_Struct", bound=msgspec.Struct)

_FIX: Final = "run `him fsck --rebuild`, or delete the folder cache: it is made anew"
_SCHEMA_VERSION: Final = 5
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
CREATE TABLE packs (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, seq INTEGER NOT NULL, finished BLOB,
    condemned INTEGER NOT NULL DEFAULT 0, removed INTEGER NOT NULL DEFAULT 0);
CREATE INDEX packs_by_seq ON packs (seq);
CREATE INDEX packs_released ON packs (max(condemned, removed)) WHERE condemned > 0;
CREATE TABLE retention (stream TEXT NOT NULL, task TEXT NOT NULL, ttl_s INTEGER NOT NULL, PRIMARY KEY (stream, task))
    WITHOUT ROWID;
CREATE TABLE expired (stream TEXT NOT NULL, origin TEXT NOT NULL, before_ns INTEGER NOT NULL,
    PRIMARY KEY (stream, origin)) WITHOUT ROWID;
CREATE TABLE ranges (pack INTEGER NOT NULL, start INTEGER NOT NULL, seq INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (pack, start)) WITHOUT ROWID;
CREATE INDEX ranges_by_seq ON ranges (seq);
CREATE TABLE shredded (snapshot TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO position VALUES (1, 0, zeroblob(32), 0);
"""

_TABLES: Final = ("snapshots", "attributes", "refs", "streams", "packs", "ranges", "retention", "expired", "shredded")
_APPLIED_AT_ONCE: Final = 1_000
"""Records a transaction: an old log is not read into memory whole."""


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


def wal_fault(path: Path) -> str:
    """What keeps a database with a write-ahead log from working in that place; empty when it works. Leaves nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
            connection.execute("CREATE TABLE probe (key BLOB PRIMARY KEY, value INTEGER) WITHOUT ROWID")
            connection.execute("INSERT INTO probe VALUES (?, 1)", (b"\0\xff",))
            connection.execute("INSERT INTO probe VALUES (?, 2) ON CONFLICT DO UPDATE SET value = 3", (b"\0\xff",))
            found = connection.execute("SELECT key, value FROM probe").fetchall()
        finally:
            connection.close()
            _remove(path)
    except (OSError, sqlite3.Error) as error:
        return f"SQLite fails ({error})"
    return "" if (mode, found) == ("wal", [(b"\0\xff", 3)]) else f"journal mode {mode}, rows {found}"


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

    def apply(self, records: Iterable[tuple[int, bytes, CommitRecord]]) -> None:
        """Apply records beyond the position; another process may have applied some already."""
        left = iter(records)
        while part := list(itertools.islice(left, _APPLIED_AT_ONCE)):
            with self._lock:
                if self.position()[0] >= part[-1][0]:
                    continue
                try:
                    self._in_transaction(lambda part=part: self._apply_all(part))
                except sqlite3.OperationalError:
                    # The disk is full, or another process will not let go: go on in memory, with what is there.
                    memory = _prepared(":memory:", "")
                    self._db.backup(memory)
                    self._swap(memory)
                    self._in_transaction(lambda part=part: self._apply_all(part))

    def restore(self, state: LiveState, *, expected: tuple[int, bytes] | None) -> bool:
        """Replace everything by `state` if nobody moved the position; a file too damaged for that is replaced."""
        with self._lock:
            try:
                return self._in_transaction(lambda: self._restore(state, expected))
            except sqlite3.OperationalError:
                self._swap(_prepared(":memory:", _SCHEMA))
            except (sqlite3.DatabaseError, StorageError):
                self._db.close()
                if self._path is not None:
                    _remove(self._path)
                self._db = _connect(self._path, _SCHEMA)
            return self._in_transaction(lambda: self._restore(state, None))

    def state(self) -> LiveState:
        """Everything, read in one transaction."""
        with self._lock:
            self._db.execute("BEGIN")
            try:
                return self._state()
            finally:
                self._db.execute("ROLLBACK")

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
        return {name: _decode(body, StreamSpec) for name, body in rows}

    def packs(self, first: int) -> list[str]:
        """Names by number, from `first` on."""
        return [name for (name,) in self._rows("SELECT name FROM packs WHERE number >= ? ORDER BY number", first)]

    def pack_changes(self, since: int) -> list[tuple[int, PackRange | PackFinished]]:
        """(seq, range or finish) after `since`, in log order."""
        rows = self._rows(
            "SELECT seq, 0 AS start, finished AS body, 1 AS done FROM packs WHERE seq > ?1 AND finished IS NOT NULL"
            " UNION ALL SELECT seq, start, body, 0 FROM ranges WHERE seq > ?1 ORDER BY seq, start",
            since,
        )
        return [(seq, _decode(body, PackFinished if done else PackRange)) for seq, _, body, done in rows]

    def released(self, since: int) -> list[tuple[str, int, int]]:
        """(name, condemned, removed): packs that a record after `since` condemned or removed."""
        question = "SELECT name, condemned, removed FROM packs WHERE condemned > 0 AND max(condemned, removed) > ?"
        return self._rows(question + " ORDER BY number", since)  # pyright: ignore[reportReturnType] - rows are untyped

    def retention(self) -> dict[tuple[str, str], int]:
        """(stream, task) → seconds."""
        rows = self._rows("SELECT stream, task, ttl_s FROM retention ORDER BY stream, task")
        return {(stream, task): ttl_s for stream, task, ttl_s in rows}

    def expired(self) -> dict[tuple[str, str], int]:
        """(stream, snapshot id or "") → ns."""
        rows = self._rows("SELECT stream, origin, before_ns FROM expired ORDER BY stream, origin")
        return {(stream, origin): before for stream, origin, before in rows}

    def shredded(self) -> frozenset[str]:
        """Ids of shredded snapshots."""
        return frozenset(name for (name,) in self._rows("SELECT snapshot FROM shredded"))

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
                raise StorageError(f"a cache file is damaged ({error})", place=str(self._path), fix=_FIX) from error

    def _swap(self, other: sqlite3.Connection) -> None:
        self._db.close()
        self._db = other

    def _in_transaction(self, work: Callable[[], _Result]) -> _Result:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            result = work()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return result

    def _apply_all(self, records: list[tuple[int, bytes, CommitRecord]]) -> None:
        at = self.position()[0]
        for seq, digest, record in records:
            if seq <= at:
                continue
            if seq > at + 1:
                # Another process has restored an older state meanwhile: the next look goes on from there.
                break
            for operation in record.operations:
                self._apply(seq, operation)
            at = seq
            self._db.execute("UPDATE position SET seq = ?, hash = ?", (seq, digest))

    def _restore(self, state: LiveState, expected: tuple[int, bytes] | None) -> bool:
        if expected is not None and self.position() != expected:
            return False
        run, many = self._db.execute, self._db.executemany
        for table in _TABLES:
            run(f"DELETE FROM {table}")  # noqa: S608 - names of our own
        for seq, found in state.snapshots:
            self._store(seq, msgspec.structs.replace(found, tags={}))
            tags = [(found.snapshot_id, key, value) for key, value in found.tags.items()]
            many("INSERT INTO attributes VALUES (?, ?, ?)", tags)
        many("INSERT INTO refs VALUES (?, ?, ?)", state.refs)
        many("INSERT INTO streams VALUES (?, ?)", [(spec.name, _encode(spec)) for spec in state.streams])
        for number, pack in enumerate(state.packs):
            finished = None if pack.finished is None else _encode(pack.finished)
            row = (number, pack.name, pack.seq, finished, pack.condemned, pack.removed)
            run("INSERT INTO packs VALUES (?, ?, ?, ?, ?, ?)", row)
            ranges = [(number, named.start, seq, _encode(named)) for seq, named in pack.ranges]
            many("INSERT INTO ranges VALUES (?, ?, ?, ?)", ranges)
        many("INSERT INTO retention VALUES (?, ?, ?)", state.retention)
        many("INSERT INTO expired VALUES (?, ?, ?)", state.expired)
        many("INSERT INTO shredded VALUES (?)", [(one,) for one in state.shredded])
        run("UPDATE position SET seq = ?, hash = ?, lamport = ?", (state.seq, state.hash, state.lamport))
        return True

    def _state(self) -> LiveState:
        tags: dict[str, dict[str, str]] = {}
        for snapshot, key, value in self._rows("SELECT snapshot, key, value FROM attributes ORDER BY snapshot, key"):
            tags.setdefault(snapshot, {})[key] = value
        snapshots = [
            (seq, msgspec.structs.replace(_decode(body, Snapshot), tags=tags.pop(name, {})))
            for seq, name, body in self._rows("SELECT seq, id, body FROM snapshots ORDER BY seq, id")
        ]
        ranges: dict[int, list[tuple[int, PackRange]]] = {}
        for number, seq, body in self._rows("SELECT pack, seq, body FROM ranges ORDER BY pack, seq, start"):
            ranges.setdefault(number, []).append((seq, _decode(body, PackRange)))
        packs = [
            PackState(
                name,
                seq,
                tuple(ranges.get(number, ())),
                None if finished is None else _decode(finished, PackFinished),
                condemned,
                removed,
            )
            for number, name, seq, finished, condemned, removed in self._rows("SELECT * FROM packs ORDER BY number")
        ]
        refs = tuple((name, kind, target) for name, (kind, target) in self.refs().items())
        ((seq, digest, lamport),) = self._rows("SELECT seq, hash, lamport FROM position")
        return LiveState(
            seq, digest, lamport, tuple(snapshots), refs, tuple(self.streams().values()), tuple(packs),
            tuple((*rule, ttl_s) for rule, ttl_s in self.retention().items()),
            tuple((*what, before) for what, before in self.expired().items()),
            tuple(SnapshotId(one) for (one,) in self._rows("SELECT snapshot FROM shredded ORDER BY snapshot")),
        )  # fmt: skip

    def _with_tags(self, body: bytes) -> Snapshot:
        found = _decode(body, Snapshot)
        rows = self._rows("SELECT key, value FROM attributes WHERE snapshot = ? ORDER BY key", found.snapshot_id)
        return msgspec.structs.replace(found, tags=dict(rows))

    def _store(self, seq: int, found: Snapshot) -> None:
        row = (found.snapshot_id, seq, found.lamport, _encode(found))
        self._db.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)", row)

    def _change(self, snapshot_id: str, change: Callable[[Snapshot], Snapshot]) -> None:
        """Change a snapshot, if it is there still."""
        rows = self._rows("SELECT seq, body FROM snapshots WHERE id = ?", snapshot_id)
        for seq, body in rows:
            self._store(seq, change(_decode(body, Snapshot)))

    def _apply(self, seq: int, operation: Operation) -> None:
        run = self._db.execute
        match operation:
            case SnapshotOpened():
                run("DELETE FROM attributes WHERE snapshot = ?", (operation.snapshot_id,))
                self._store(seq, operation.snapshot())
            case Batch():
                self._change(operation.snapshot_id, lambda found: found.moved(operation.directory))
            case Sealed():
                # Kept apart from the snapshots: a time is not given twice, even if its snapshot was dropped.
                run("UPDATE position SET lamport = max(lamport, ?)", (operation.lamport,))
                self._change(operation.snapshot_id, lambda found: msgspec.structs.replace(found, **operation.fields()))
            case DirectoryWrapped():
                self._change(operation.snapshot_id, lambda found: found.opened_by(operation.wrap))
            case SnapshotShredded():
                run("INSERT OR IGNORE INTO shredded VALUES (?)", (operation.snapshot_id,))
            case PackRange():
                number = self._pack(operation.pack, seq)
                run("UPDATE packs SET seq = ? WHERE number = ?", (seq, number))
                row = (number, operation.start, seq, _encode(operation))
                run("INSERT OR REPLACE INTO ranges VALUES (?, ?, ?, ?)", row)
            case PackFinished():
                # Its footer has the rows of all its ranges.
                number = self._pack(operation.pack, seq)
                run("UPDATE packs SET finished = ? WHERE number = ?", (_encode(operation), number))
                run("DELETE FROM ranges WHERE pack = ?", (number,))
            case RefSet() if operation.snapshot_id:
                row = (operation.name, operation.kind, operation.snapshot_id)
                run("INSERT OR REPLACE INTO refs VALUES (?, ?, ?)", row)
            case RefSet():
                run("DELETE FROM refs WHERE name = ?", (operation.name,))
            case AttributeSet(value=None):
                run("DELETE FROM attributes WHERE snapshot = ? AND key = ?", (operation.snapshot_id, operation.key))
            case AttributeSet():
                run(
                    "INSERT OR REPLACE INTO attributes SELECT id, ?, ? FROM snapshots WHERE id = ?",
                    (operation.key, operation.value, operation.snapshot_id),
                )
            case SnapshotDropped():
                run("DELETE FROM snapshots WHERE id = ?", (operation.snapshot_id,))
                run("DELETE FROM attributes WHERE snapshot = ?", (operation.snapshot_id,))
            case StreamDeclared():
                run("INSERT OR REPLACE INTO streams VALUES (?, ?)", (operation.spec.name, _encode(operation.spec)))
            case PackCondemned() | PackRemoved() | RetentionSet() | TilesExpired():
                self._release(seq, operation)

    def _release(self, seq: int, operation: PackCondemned | PackRemoved | RetentionSet | TilesExpired) -> None:
        run = self._db.execute
        match operation:
            case PackCondemned():
                run("UPDATE packs SET condemned = ? WHERE name = ?", (seq, operation.pack))
            case PackRemoved():
                # Its name stays, for packs are numbered by rank.
                run("UPDATE packs SET removed = ?, finished = NULL WHERE name = ?", (seq, operation.pack))
                run("DELETE FROM ranges WHERE pack = (SELECT number FROM packs WHERE name = ?)", (operation.pack,))
            case RetentionSet(ttl_s=ttl_s) if ttl_s < 0:
                run("DELETE FROM retention WHERE stream = ? AND task = ?", (operation.stream, operation.task))
            case RetentionSet():
                run(
                    "INSERT OR REPLACE INTO retention VALUES (?, ?, ?)",
                    (operation.stream, operation.task, operation.ttl_s),
                )
            case TilesExpired():
                rows = [(operation.stream, str(origin), operation.before_ns) for origin in operation.origins or ("",)]
                self._db.executemany(
                    "INSERT INTO expired VALUES (?, ?, ?) ON CONFLICT DO UPDATE"
                    " SET before_ns = max(before_ns, excluded.before_ns)",
                    rows,
                )

    def _pack(self, name: str, seq: int) -> int:
        """The pack's number, its rank by first appearance."""
        self._db.execute(
            "INSERT OR IGNORE INTO packs SELECT coalesce(max(number) + 1, 0), ?, ?, NULL, 0, 0 FROM packs", (name, seq)
        )
        ((number,),) = self._rows("SELECT number FROM packs WHERE name = ?", name)
        return int(number)


def _encode(value: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(value)


def _decode(body: bytes, kind: type[_Struct]) -> _Struct:
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except MALFORMED as error:
        raise StorageError(f"a cache file is damaged ({error})", place="cache", fix=_FIX) from error


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
