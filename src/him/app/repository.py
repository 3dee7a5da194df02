"""A repository as its users hold it: adapters behind the ports, and every room behind one name."""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

import him
from him import doctor
from him.adapters import isal
from him.adapters.local import LocalDisk
from him.adapters.notes import EncryptedMemo
from him.adapters.npy import NpyFile
from him.adapters.objects import open_store
from him.adapters.pillow import PillowDecoder
from him.adapters.png import PngFile, is_large_png
from him.adapters.sqlite import SqliteMemo, SqliteProjection, wal_fault
from him.app.folder import state_folder
from him.care import CareHandle, shape_of
from him.catalog import marker as marker_file
from him.catalog import spare
from him.catalog.fsck import Fsck, FsckReport
from him.catalog.garbage import Choice, Collected, Collector
from him.catalog.history import TAG, History, new_ulid
from him.catalog.log import FileLog
from him.catalog.marker import MARKER, MARKER_BYTES_MAX, Marker
from him.catalog.reader import CRITICAL, SnapshotReader
from him.catalog.retention import HOLD
from him.catalog.salvage import check_owner, marker_bytes, unmarked
from him.catalog.stats import Stats, measure
from him.catalog.transfer import Side, TransferReport, transfer
from him.config import (
    BUDGET_MS,
    COLD_PACK_BYTES,
    COLD_PACK_BYTES_LEAST,
    COLLECT_DEAD_SHARE,
    ENCRYPTED_TOGETHER,
    FOLDER_PICTURES_MAX,
    FORMAT_VERSION,
    IMAGE_FILE_BYTES_MAX,
    IMAGE_PIXELS_MAX,
    PLAIN_FORMAT,
    REPOSITORY_FORMAT,
    TREE_BYTES_MAX,
    WARM_BUDGET_BYTES_LEAST,
)
from him.errors import (
    ConflictError,
    HimError,
    IntegrityError,
    LimitError,
    NotFoundError,
    ShreddedError,
    StorageError,
    UsageError,
    VersionError,
)
from him.handle import Parts, SnapshotHandle, TierHandle, read_limited
from him.ingest import Ingest, IngestReport
from him.kv import RECORDS, TENSORS
from him.pack.galois import product
from him.perception import parse_tree
from him.ports import Clock, Disk, KeyRing, Memo, ObjectStore, Progress, Recorder, Rng, TextEncoder, TextReader, silent
from him.query import Answer, QuerySource, answer, plan
from him.query.calibrate import shipped
from him.query.snapshot import RowCache, SnapshotSource
from him.replay import Recording, ReplayReport, Trace
from him.replay import load as load_trace
from him.replay import replay as replay_trace
from him.replay import save as save_trace
from him.replay.trace import TraceKey, new_trace
from him.replay.trace import faults as trace_faults
from him.replay.trace import names as trace_names
from him.tier.care import Journal
from him.tier.cold import Claim, newest
from him.tier.cold import take_over as claim_tier
from him.tier.mirror import Mirror
from him.tier.protect import Parity
from him.tier.receipts import receipts
from him.tier.scrub import put_right
from him.tier.settings import TIER, TierSettings, tier_settings
from him.tier.warm import WarmStore
from him.types import (
    TRACE_PREFIX,
    QueryPlan,
    Ref,
    Secret,
    Snapshot,
    SnapshotId,
    StreamSpec,
    TileKey,
    TreeNode,
    ulid_text,
)

Array = NDArray[np.generic]
PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_NOT_READ: Final = "too large to be read for what it shows: stored with its levels, found by no query"
_DECISION_ROOMS: Final = ("query", "index")
_SAMPLES_KEPT: Final = 64
_SAMPLES_NEEDED: Final = 20


def check_budget(budget_bytes: int) -> None:
    """Whether one can work within a warm budget. Raises UsageError."""
    if budget_bytes < WARM_BUDGET_BYTES_LEAST:
        raise UsageError(
            f"a warm budget of {budget_bytes} bytes is too small", fix=f"give at least {WARM_BUDGET_BYTES_LEAST}"
        )


def _mirror(disk: Disk, clock: Clock, cold: ObjectStore | None, *, read_only: bool) -> Mirror | None:
    """The packs' way to the cold tier, where one is set. Raises IntegrityError, VersionError for its settings."""
    settings = tier_settings(disk)
    if settings is None or (read_only and not receipts(disk)):
        return None  # All of it is here.
    store = cold or open_store(settings.cold, settings.storage_class)
    # What a restored repository writes stays here until it has a place to go to.
    background = settings.generation is not None
    return Mirror(
        disk, store, clock, settings.budget_bytes,
        background=background, read_only=read_only, claim=settings.claim(),
    )  # fmt: skip


def _read_marker(disk: Disk) -> Marker:
    return marker_file.parsed(marker_bytes(disk), MARKER)


class KeyState(NamedTuple):
    """What is known of a repository's keys without showing any."""

    opened: bool
    streams: tuple[str, ...]


class Repository:
    """A repository: snapshots to write and read, queries, replays, checks. Use as a context manager."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        rng: Rng,
        reader: TextReader,
        encoder: TextEncoder,
        disk: Disk | None = None,
        cold: ObjectStore | None = None,
        ring: KeyRing | None = None,
    ) -> None:
        self.path = path
        self.read_only = not os.access(path, os.W_OK)
        self._clock, self._rng, self._text_reader, self._encoder = clock, rng, reader, encoder
        self._disk: Disk = disk or LocalDisk(path, read_only=self.read_only)
        marker = _read_marker(self._disk)
        self._repository_id = marker.repository_id
        self._log = FileLog(self._disk, read_only=self.read_only)
        cache = None if self.read_only else path / "cache"
        self._projection = SqliteProjection(cache / "projection.sqlite" if cache else None)
        self._notes = SqliteMemo(cache / "memo.sqlite" if cache else None)
        self._memo: Memo = self._notes if ring is None else EncryptedMemo(self._notes, ring.hash_key.key)
        self._mirror = _mirror(self._disk, clock, cold, read_only=self.read_only)
        self._journal = Journal(self._disk, clock, read_only=self.read_only)
        mirror, own_id = self._mirror, bytes.fromhex(self._repository_id)
        parity = Parity(
            mirror or self._disk, isal.load() or product, own_id, lambda: self._history.finished_packs(), self._journal,
            shape=shape_of(self._disk), write=mirror and mirror.put_back, drop=lambda name: self._store.let_go(name),
        )  # fmt: skip
        self._store = WarmStore(
            self._disk, self._projection, rng, own_id, mirror, journal=self._journal, parity=parity,
            hash_key=None if ring is None else ring.hash_key,
        )  # fmt: skip
        writer = f"{platform.node()}:{os.getpid()}"
        self._history = History(
            self._log,
            self._projection,
            self._store,
            self._memo,
            clock,
            rng,
            writer,
            read_only=self.read_only,
            ring=ring,
        )
        self._history.refresh()
        check_owner(self._disk, marker, frozenset(self._projection.packs(0)))
        if self._mirror is not None:
            self._mirror.watch(
                lambda: [*self._history.finished_packs(), *parity.files()], self._log.published,
                lambda finished: put_right(self._store, finished),
            )  # fmt: skip
        self._ingest = Ingest(self._history, self._store, self._memo, clock, reader, encoder)
        self._decoder = PillowDecoder()
        self._parts = Parts(self._store, self._memo, self._history, self._ingest, self._decoder, self.query)
        self._rows = RowCache()
        self._took_ms: dict[str, list[float]] = {}
        self._warm = False
        self._pins: dict[str, str] = {}

    def __enter__(self) -> "Repository":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release files and locks; what was acknowledged is durable already."""
        if not self.read_only:
            with contextlib.suppress(HimError):
                spare.keep(self._disk, self._log)
        self._store.close()
        self._journal.close()
        if self._mirror is not None:
            self._mirror.close()
        self._history.leases.close()
        self._log.close()
        self._projection.close()
        self._notes.close()

    # -- tiers

    def set_tier(self, cold: str, budget_bytes: int, *, take_over: bool = False, storage_class: str = "") -> None:
        """Name the cold tier and the warm budget; they hold from the next opening on.

        Args:
            cold: a folder, or `s3://bucket/prefix` (credentials come from the environment).
            budget_bytes: what the packs may take on this disk.
            take_over: write to it from now on in place of the repository that does so; that one then only reads.
            storage_class: of S3, for packs that are copied from now on, such as STANDARD_IA; empty: the bucket's own.

        Raises:
            UsageError: a store that cannot be, or a budget too small to work in.
            ConflictError: the cold tier belongs to another repository, or lacks packs that only the present one holds.
        """
        check_budget(budget_bytes)
        store, marker = open_store(cold, storage_class), marker_bytes(self._disk)
        if not store.put(MARKER, marker, if_absent=True) and not marker_file.same_repository(
            store.get(MARKER, MARKER_BYTES_MAX), self._repository_id, cold
        ):
            raise ConflictError("the cold tier belongs to another repository", object=cold, fix="name another prefix")
        absent = [receipt.pack for receipt in receipts(self._disk) if store.size(receipt.pack) != receipt.size]
        if absent:
            raise ConflictError(
                f"{len(absent)} packs are in the present cold tier and not in this one",
                object=absent[0],
                fix="copy its objects to the new place first; parts of them may be nowhere else",
            )
        claim = self._claim(store, cold, take_over=take_over)
        settings = TierSettings(cold, budget_bytes, *claim, storage_class)
        self._disk.write_whole(TIER, settings.encoded())

    def _claim(self, store: ObjectStore, cold: str, *, take_over: bool) -> Claim:
        """As whom to write to a cold tier: as before where it is the present one."""
        present = tier_settings(self._disk)
        if take_over:
            return claim_tier(store, self._log.published, self._rng.token(16).hex())
        if present is not None and present.cold == cold:
            return present.claim()
        if newest(store):
            raise ConflictError("another repository has taken the cold tier over", object=cold, fix="give --take-over")
        return Claim(0, 0)

    @property
    def tier(self) -> "TierHandle":
        """The cold tier behind the packs. Raises UsageError when none is set."""
        if self._mirror is None:
            raise UsageError(
                "the repository has no cold tier", fix="name one: `him tier set --cold PLACE --budget 10GB`"
            )
        return TierHandle(self._mirror, self._store, self._memo, self._history, self._clock)

    @property
    def care(self) -> CareHandle:
        """Parity, scrubbing and healing."""
        return CareHandle(
            self._disk,
            self._store,
            self._history,
            self._projection,
            self._log,
            self._journal,
            self._clock,
            self.fsck,
        )

    # -- snapshots and names

    def snapshot(self, name: str) -> "SnapshotHandle":
        """The snapshot a branch, a tag or an id names, as it stands now. Raises NotFoundError."""
        lease = self._history.lease()
        return SnapshotHandle(self._parts, self._history.snapshot(name), lease)

    def create_snapshot(
        self,
        *,
        parent: str | None = None,
        branch: str | None = None,
        tags: Mapping[str, str] | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> "SnapshotHandle":
        """Open a snapshot (O(1), whatever its parent holds). Raises NotFoundError, ConflictError."""
        lease = self._history.lease()
        own = {"him": him.__version__, "python": platform.python_version(), "platform": platform.platform()}
        opened = self._history.open_snapshot(
            parent=parent, branch=branch, tags=tags, provenance={**own, **(provenance or {})}
        )
        return SnapshotHandle(self._parts, opened, lease)

    def writable(self, name: str) -> "SnapshotHandle":
        """The open snapshot behind a branch (made if unknown; a child if its head is sealed) or an id."""
        lease = self._history.lease()
        return SnapshotHandle(self._parts, self._history.writable(name), lease)

    def branch(self, name: str, *, source: str | None = None) -> "SnapshotHandle":
        """A new branch from `source` (empty when left out), in O(1). Raises ConflictError, NotFoundError."""
        return self.create_snapshot(parent=source, branch=name)

    def tag(self, name: str, target: str) -> None:
        """Name a snapshot for good. Raises ConflictError when the name is taken."""
        self._history.set_ref(name, TAG, target)

    def delete_ref(self, name: str) -> None:
        """Remove a branch or tag; its snapshot stays. Raises NotFoundError."""
        self._history.delete_ref(name)

    def refs(self) -> dict[str, tuple[str, SnapshotId]]:
        """Name → ("branch" or "tag", snapshot id)."""
        return {name: (kind, SnapshotId(target)) for name, (kind, target) in self._history.refs().items()}

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, oldest first."""
        return self._history.snapshots()

    def delete_snapshot(self, name: str) -> None:
        """Stop listing a snapshot that no name holds. Raises ConflictError, NotFoundError."""
        self._history.drop(name)

    def declare_stream(self, spec: StreamSpec) -> None:
        """Add a stream of one's own. Raises ConflictError."""
        if spec.encrypted:
            self._raise_format(REPOSITORY_FORMAT)
        self._history.declare_stream(spec)

    def encrypt(self, stream: str) -> list[str]:
        """From now on encrypt a stream's frames, and those of the streams that say what they show; their names.

        Frames that are there stay as they are until they are replaced whole.

        Raises:
            NotFoundError: no such stream.
            KeyNeededError: the repository was opened without a key ring.
        """
        together = next((names for names in ENCRYPTED_TOGETHER if stream in names), (stream,))
        own = {spec.name: spec for spec in (*TENSORS.values(), RECORDS)}
        specs = [own.get(name) or self._history.stream(name) for name in together]
        self._raise_format(REPOSITORY_FORMAT)
        self._history.encrypt(specs)
        return list(together)

    def key_state(self) -> KeyState:
        """Whether the key ring was opened, and which streams are encrypted from now on."""
        streams = sorted(spec.name for spec in self._projection.streams().values() if spec.encrypted)
        return KeyState(self._history.keys.ring is not None, tuple(streams))

    def shred(self, name: str) -> Snapshot:
        """Drop a snapshot and destroy its keys: what only it reached can be read by nobody any more, from no copy.

        Raises:
            ConflictError: a branch or tag names it, a legal hold is on it, or nothing of it is encrypted.
            KeyNeededError: the keys are not at hand.
        """
        return self._history.shred(name)

    def log(self, limit: int | None = None) -> Iterator[dict[str, object]]:
        """Commit records, newest first (the last `limit`): seq, hash, time_ns, writer, operations."""
        first = 0 if limit is None else max(0, self._log.head()[0] - limit)
        for seq, digest, record in reversed(list(self._history.records(first))):
            yield {
                "seq": seq,
                "hash": digest.hex(),
                "time_ns": record.time_ns,
                "writer": record.writer,
                "operations": [_plain(operation) for operation in record.operations],
            }

    # -- writing

    def ingest(
        self,
        path: str | os.PathLike[str],
        snapshot: str,
        *,
        frame: str | None = None,
        tree: str | os.PathLike[str] | None = None,
        stream: str | None = None,
        progress: Progress | None = None,
    ) -> Iterator[IngestReport]:
        """Store a picture, a `.npy` array or a folder of pictures; one report each, each durable when yielded.

        Running it again skips what is stored already, so an interrupted folder is resumed. Beside `NAME.png` in a
        folder, `NAME.tree.json` is not read: a tree is given with `tree`, for one picture.

        Raises:
            UsageError: nothing readable there, two files of one frame name, a tree for a folder.
        """
        source = Path(path)
        if source.is_dir():
            if frame is not None or tree is not None:
                raise UsageError("a frame's name and a tree belong to one picture, not to a folder")
            items = _folder(source)
        elif source.is_file():
            items = [(frame if frame is not None else source.stem, source)]
        else:
            raise NotFoundError(f"no such file: {source}", object=str(source), fix="check the path")
        nodes = None if tree is None else parse_tree(read_limited(Path(tree), TREE_BYTES_MAX))
        for number, (name, file) in enumerate(items):
            if progress is not None and len(items) > 1:
                progress(number, len(items), name)
            yield self._ingest_file(file, snapshot, name, nodes, stream, progress if len(items) == 1 else None)

    def _ingest_file(
        self,
        file: Path,
        snapshot: str,
        frame: str,
        tree: Sequence[TreeNode] | None,
        stream: str | None,
        progress: Progress | None,
    ) -> IngestReport:
        if file.suffix.lower() == ".npy":
            with contextlib.closing(NpyFile(file)) as source:
                return self._ingest.array(snapshot, stream or "kv_cache", frame, source, progress=progress)
        if stream not in (None, "screen"):
            raise UsageError(f"a picture goes into the stream screen, not {stream!r}")
        if is_large_png(file):
            return self._ingest_large(file, snapshot, frame, tree, progress)
        pixels = self._decoder.decode(read_limited(file, IMAGE_FILE_BYTES_MAX), str(file))
        return self._ingest.picture(snapshot, frame, pixels, tree=tree, progress=progress)

    def _ingest_large(
        self, file: Path, snapshot: str, frame: str, tree: Sequence[TreeNode] | None, progress: Progress | None
    ) -> IngestReport:
        """A picture larger than what is read for what it shows: its pixels and levels are stored, band by band."""
        if tree is not None:
            raise UsageError(f"a tree belongs to a picture of at most {IMAGE_PIXELS_MAX} pixels", object=str(file))
        with contextlib.closing(PngFile(file)) as source:
            source.check()
            return self._ingest.array(snapshot, "screen", frame, source, progress=progress, note=_NOT_READ)

    # -- other repositories

    def push(
        self,
        other: str | os.PathLike[str],
        refs: Sequence[str] | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> TransferReport:
        """Send what branches and tags name, with all ancestors, to another repository; only what it lacks is read.

        Args:
            other: its folder; it may be open elsewhere and written to meanwhile.
            refs: names; all whose heads are sealed when left out.
            force: set its branches even where they have other snapshots.

        Raises:
            NotFoundError, ConflictError, IntegrityError, BusyError, StorageError: see `catalog.transfer.transfer`.
            UsageError: the other repository is this one.
        """
        with self._beside(other) as there:
            return transfer(self._side(), there._side(write=True), refs, force=force, progress=progress)

    def pull(
        self,
        other: str | os.PathLike[str],
        refs: Sequence[str] | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> TransferReport:
        """`push` from the other repository to this one."""
        with self._beside(other) as there:
            return transfer(there._side(), self._side(write=True), refs, force=force, progress=progress)

    # -- queries

    def warm(self, snapshot: str | None = None) -> None:
        """Load the models and, for a snapshot, its rows: what a query must not wait for."""
        self._load(None if snapshot is None else self._history.snapshot(snapshot))

    def query(
        self,
        goal: str,
        snapshot: str,
        *,
        frame: str | None = None,
        budget_ms: int = BUDGET_MS,
        startup: Callable[[], float] | None = None,
    ) -> Answer:
        """Answer a goal on a snapshot within a budget; leaves a trace that `replay` recomputes.

        Args:
            goal: what to find, in a person's words.
            snapshot: branch, tag or id; a branch's head is read as it stands now.
            frame: search this frame alone.
            budget_ms: from receipt (when models and rows are loaded) to the answer.
            startup: milliseconds from the caller's start to now, asked once at receipt and repeated in the answer.

        Raises:
            UsageError, NotFoundError, IntegrityError.
        """
        with self._history.lease():  # Until its trace keeps what was read.
            return self._query(goal, snapshot, frame, budget_ms, startup)

    def _query(
        self, goal: str, snapshot: str, frame: str | None, budget_ms: int, startup: Callable[[], float] | None
    ) -> Answer:
        found = self._history.snapshot(snapshot)
        self._load(found)
        trace_id = TRACE_PREFIX + ulid_text(new_ulid(self._clock.now_ns(), self._rng))
        recording = Recording()
        startup_ms = startup() if startup is not None else 0.0
        result = answer(
            goal, self._source(found), recording, self._clock, self._encoder, frame=frame, budget_ms=budget_ms,
            snapshot_id=found.snapshot_id, directory=found.directory.hex(), trace_id=trace_id, startup_ms=startup_ms,
            p95_ms=self._learned(),
        )  # fmt: skip
        self._learn(result)
        request: dict[str, str | int | float | None] = {
            "goal": goal, "frame": frame, "budget_ms": budget_ms, "startup_ms": startup_ms,
        }  # fmt: skip
        line = answer_line(result)
        trace = new_trace(
            trace_id, "query", found.snapshot_id, found.directory.hex(), request, self._pins, recording, line
        )
        entry = self._history.trace_key(found)
        key = None
        if entry is not None and isinstance(found.directory, Secret):
            key = TraceKey(entry.key_id, entry.key, found.directory)
        self._save_trace(trace, key)
        return result

    def plan(self, goal: str, snapshot: str, *, frame: str | None = None, budget_ms: int = BUDGET_MS) -> QueryPlan:
        """The tiles a query would read, without reading any."""
        found = self._history.snapshot(snapshot)
        return plan(
            goal, self._source(found), self._encoder, frame=frame, budget_ms=budget_ms,
            snapshot_id=found.snapshot_id, directory=found.directory.hex(),
        )  # fmt: skip

    def source(self, snapshot: str) -> QuerySource:
        """Read access for `him.query.fetch` and `fuse`, at the snapshot's present directory."""
        return self._source(self._history.snapshot(snapshot))

    def prefetch(self, plan: Mapping[str, object]) -> dict[str, object]:
        """Where the tiles of a plan (an answer's `plan`, or `--plan-only`'s) stand; without a cold tier all are warm.

        Raises:
            UsageError: not a plan.
        """
        inner = plan.get("plan", plan)
        try:
            tiles = msgspec.convert(inner, type=_PlanInput)
        except msgspec.ValidationError as error:
            raise UsageError(f"not a plan: {error}", fix="give the JSON of `him query --plan-only --json`") from error
        name = str(plan.get("snapshot_id") or tiles.snapshot_id)
        reader = SnapshotReader(self._store, self._memo, self._history.directory(name, bytes.fromhex(tiles.directory)))
        warm = sum(
            1 for tile in tiles.tiles if reader.entry(TileKey(tile.stream, tile.frame, tile.level, tile.y, tile.x))
        )
        return {
            "snapshot_id": name,
            "planned": len(tiles.tiles),
            "warm": warm,
            "missing": len(tiles.tiles) - warm,
            "staged": 0,
        }

    # -- replay

    def replay(self, trace_id: str) -> ReplayReport:
        """Recompute a recorded query and compare every step and the answer's bytes. Changes nothing.

        Raises:
            NotFoundError: no such trace.
        """
        trace, root = self._load_trace(trace_id)
        with self._history.lease():
            self._history.refresh()  # It may be of what another process has committed.
            return replay_trace(trace, self._fresh_pins, partial(self._rerun, root))

    def traces(self) -> list[str]:
        """Ids of recorded queries, oldest first."""
        return sorted(name for spool in self._spools for name in trace_names(spool))

    def _rerun(self, root: Ref, trace: Trace, recorder: Recorder) -> str:
        reader = SnapshotReader(self._store, self._memo, root)
        request = trace.request
        result = answer(
            str(request["goal"]), SnapshotSource(reader, RowCache()), recorder, self._clock, self._encoder,
            frame=None if request["frame"] is None else str(request["frame"]),
            budget_ms=int(request["budget_ms"] or 0), snapshot_id=trace.snapshot_id, directory=trace.directory,
            trace_id=trace.trace_id, startup_ms=float(request["startup_ms"] or 0.0),
        )  # fmt: skip
        return answer_line(result)

    # -- care

    def fsck(self, *, rebuild: bool = False, progress: Progress | None = None) -> FsckReport:
        """Check every digest; with `rebuild` make projection and address index anew from log and packs first."""
        spooled = [fault for spool in self._spools for fault in trace_faults(spool)]
        return Fsck(
            self._history, self._projection, self._store, progress,
            known=spooled, rebuild=rebuild, format=_read_marker(self._disk).format,
        ).run()  # fmt: skip

    def gc(
        self, *, dead_share: float = COLLECT_DEAD_SHARE, dry_run: bool = False, progress: Progress | None = None
    ) -> Collected:
        """Let go what nothing refers to: packs that hold little else are given up, what is used in them being copied.

        Runs beside readers and writers of any process. A pack stays until all who began before it was condemned are
        through: then the next collection removes it. First, tiles that a retention rule lets go are expired.

        Args:
            dead_share: from which share of dead bytes on a pack is given up, 0 to 1.
            dry_run: only count.

        Raises:
            UsageError: a share beyond that.
            IntegrityError: something that is referred to is damaged; nothing is removed before it is mended.
        """
        if not 0 < dead_share <= 1:
            raise UsageError(f"a share of {dead_share}", fix="give one above 0 and up to 1")
        return self._collected(Choice(dead_share), dry_run=dry_run, progress=progress)

    def compact(self, *, dry_run: bool = False, progress: Progress | None = None) -> Collected:
        """`gc`, and small packs are joined to ones of the size that a cold tier is best used with."""
        target = COLD_PACK_BYTES if self._mirror is None else min(COLD_PACK_BYTES, self._mirror.pack_bytes)
        self._store.target_bytes = target
        try:
            choice = Choice(COLLECT_DEAD_SHARE, min(COLD_PACK_BYTES_LEAST, target // 2))
            return self._collected(choice, dry_run=dry_run, progress=progress)
        finally:
            self._store.target_bytes = None

    def _collected(self, choice: Choice, *, dry_run: bool, progress: Progress | None) -> Collected:
        if not dry_run:
            self._raise_format()
            self._history.tidy_keys(dropped=True)
        roots = self._trace_directories
        collector = Collector(self._history, self._projection, self._store, self._clock, roots, progress)
        return collector.run(choice, dry_run=dry_run)

    def _trace_directories(self) -> Iterator[bytes]:
        """What recorded queries read: it stays readable, so that they can be replayed."""
        for trace_id in self.traces():
            with contextlib.suppress(IntegrityError, NotFoundError, ShreddedError, VersionError):
                yield self._load_trace(trace_id)[1]

    def _raise_format(self, format: int = PLAIN_FORMAT) -> None:
        """Records that older software does not know are about to be written: it must say so instead of stumbling."""
        raised = _read_marker(self._disk).raised(format).encoded()
        if marker_bytes(self._disk) != raised:
            self._disk.write_whole(MARKER, raised)

    def stats(self, progress: Progress | None = None) -> Stats:
        """Bytes by stream and tier, and what sharing, compression and deltas save. Reads every page."""
        return measure(self._history, self._projection, self._store, progress or silent)

    def retention(self) -> dict[tuple[str, str], int]:
        """How long tiles are kept: (stream, task or "") → seconds; a stream that is not named keeps for ever."""
        return self._history.retention()

    def set_retention(self, stream: str, ttl_s: int, *, task: str = "") -> None:
        """Keep a stream's tiles for so long after their snapshot was opened; `gc` lets older ones go.

        Args:
            ttl_s: seconds; 0 for ever, negative takes the rule back.
            task: only tiles of snapshots whose attribute `task_id` is this.

        Raises:
            NotFoundError: no such stream.
        """
        self._raise_format()
        self._history.set_retention(stream, task, ttl_s)

    def hold(self, snapshot: str, reason: str) -> None:
        """Put a legal hold on a snapshot: it cannot be deleted, and retention lets nothing of it go."""
        if not reason:
            raise UsageError("a legal hold has a reason")
        self._history.set_attribute(snapshot, HOLD, reason)

    def release_hold(self, snapshot: str) -> None:
        """Take a legal hold back."""
        self._history.set_attribute(snapshot, HOLD, None)

    def doctor(self) -> list[dict[str, object]]:
        """Checks of the machine and the installation: check, ok, detail, fix."""
        found = doctor.examine(self.path, self._disk, self._clock, self._encoder, self._text_reader)
        return [*found, doctor.sqlite(None if self.read_only else wal_fault(self.path / "cache/doctor.sqlite"))]

    def stored_bytes(self) -> int:
        """Bytes this object appended to packs."""
        return self._store.written_bytes

    def stored_pages(self) -> int:
        """Pages, directory nodes and companions this object appended to packs."""
        return self._store.written_pages

    # -- inner

    def _beside(self, other: str | os.PathLike[str]) -> "Repository":
        """Another repository, opened with the same ports."""
        path = Path(other)
        if path.exists() and path.samefile(self.path):
            raise UsageError("both sides are one repository", object=str(path), fix="name another folder")
        if not (path / MARKER).is_file():
            raise unmarked(LocalDisk(path), str(path))
        return Repository(path, self._clock, self._rng, self._text_reader, self._encoder)

    def _side(self, *, write: bool = False) -> Side:
        """What a transfer needs of it. Raises StorageError when it cannot be written to."""
        if write and self.read_only:
            raise StorageError(
                "the repository is read-only", place=str(self.path), fix="give this user the right to it"
            )
        return Side(self._history, self._store)

    @property
    def _spools(self) -> tuple[Disk, ...]:
        """Where traces go: the repository; where that refuses (read-only, full), the user's own state folder."""
        elsewhere = LocalDisk(state_folder() / self._repository_id)
        return (elsewhere,) if self.read_only else (self._disk, elsewhere)

    def _save_trace(self, trace: Trace, key: TraceKey | None) -> None:
        *first, last = self._spools
        for spool in first:
            with contextlib.suppress(StorageError):
                save_trace(spool, trace, key)
                return
        save_trace(last, trace, key)

    def _load_trace(self, trace_id: str) -> tuple[Trace, Ref]:
        *first, last = self._spools
        for spool in first:
            with contextlib.suppress(NotFoundError):
                return load_trace(spool, trace_id, self._history.keys.get)
        return load_trace(last, trace_id, self._history.keys.get)

    def _load(self, found: Snapshot | None) -> None:
        if not self._warm:
            self._encoder.encode(["warm"])
            shipped()
            self._pins = self._fresh_pins()
            self._warm = True
        if found is not None:
            self._rows.rows(self._reader(found), None)

    def _reader(self, found: Snapshot) -> SnapshotReader:
        return SnapshotReader(self._store, self._memo, found.directory, critical=CRITICAL in found.tags)

    def _source(self, found: Snapshot) -> SnapshotSource:
        return SnapshotSource(self._reader(found), self._rows)

    def _fresh_pins(self) -> dict[str, str]:
        return {
            "code": _code_digest(),
            "encoder": self._encoder.pin(),
            "calibrator": shipped().digest(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "machine": platform.machine(),
            "him_format": str(FORMAT_VERSION),
        }

    def _learn(self, result: Answer) -> None:
        for name, took in result.stages_ms.items():
            samples = self._took_ms.setdefault(name, [])
            samples.append(took)
            del samples[:-_SAMPLES_KEPT]
        for name in self._took_ms.keys() - result.stages_ms.keys():
            # A stage that did not run leaves no new duration: forget old ones, or a slow hour would be for ever.
            del self._took_ms[name][: len(self._took_ms[name]) // 4 + 1]

    def _learned(self) -> dict[str, float]:
        """p95 of the last durations of each stage, once there are enough."""
        return {
            name: sorted(samples)[len(samples) * 95 // 100]
            for name, samples in self._took_ms.items()
            if len(samples) >= _SAMPLES_NEEDED
        }


class _PlanTile(msgspec.Struct):
    stream: str
    frame: str
    level: int
    x: int
    y: int
    tile_id: str = ""


class _PlanInput(msgspec.Struct):
    directory: str
    tiles: list[_PlanTile]
    snapshot_id: str = ""


def answer_line(result: Answer) -> str:
    """The one line of an answer: what `--json` prints and what a replay compares."""
    return msgspec.json.encode(result.as_json()).decode()


def _code_digest() -> str:
    """Digest of the source of what decides an answer."""
    hasher = blake3()
    for room in _DECISION_ROOMS:
        folder = resources.files("him") / room
        for name in sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".py")):
            source = (folder / name).read_bytes()
            hasher.update(f"{room}/{name}:{len(source)}:".encode() + source)
    return hasher.hexdigest()


def _folder(root: Path) -> list[tuple[str, Path]]:
    """(frame name, file) of every picture below a folder, sorted by name."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise UsageError(f"no pictures in {root}", object=str(root), fix=f"pictures end in {', '.join(PICTURES)}")
    if len(files) > FOLDER_PICTURES_MAX:
        raise LimitError(f"{len(files)} pictures; at most {FOLDER_PICTURES_MAX}")
    named: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(root).with_suffix("").as_posix()
        if name in named:
            raise UsageError(
                f"two files would be one frame {name!r}: {named[name].name} and {file.name}", fix="rename one of them"
            )
        named[name] = file
    return sorted(named.items())


def _plain(operation: msgspec.Struct) -> dict[str, object]:
    """An operation for people: its name and its fields, bytes as hex."""
    fields = {name: getattr(operation, name) for name in operation.__struct_fields__}
    shown = {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}
    return {"operation": str(operation.__struct_config__.tag), **shown}
