"""Garbage collection and compaction: what nothing refers to any more is let go, a pack at a time.

Collecting marks what is referred to, copies it out of packs that hold little else, condemns these packs by a log
record, and removes them once nobody reads under an older lease (docs/design/011-garbage.md). It runs beside readers
and writers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.catalog import retention
from him.catalog.history import History
from him.catalog.retention import Expiry, lacks
from him.config import COLLECT_COPY_BYTES
from him.errors import ConflictError, IntegrityError, NotFoundError, UnavailableError
from him.pack import format as layout
from him.pack.parity import SUFFIX as PARITY
from him.ports import Clock, Progress, Projection, silent
from him.pyramid import directory, levels, page
from him.tier.warm import PACK_FOLDER, WarmStore
from him.tile.address import KIND_COMPANION, prefixes
from him.types import (
    BlobId,
    Frame,
    LiveState,
    Operation,
    PackCondemned,
    PackFinished,
    PackRemoved,
    PackState,
    Ref,
    Secret,
    TilesExpired,
)

Roots = Callable[[], Iterable[bytes]]
"""Directories that are read without any snapshot naming them: those of traces."""


class Collected(msgspec.Struct, frozen=True):
    """What a collection did."""

    live_bytes: int
    """Of records that something refers to."""
    dead_bytes: int
    """Of all other records, before."""
    packs: int
    """Before, those apart that are condemned already."""
    condemned_packs: int
    copied_bytes: int
    """What was copied out of the condemned packs."""
    removed_packs: int
    freed_bytes: int
    """The size of the packs that were removed."""
    waiting_packs: int
    """Condemned, and not removed because of a reader or writer that began before."""
    orphan_packs: int
    """Files no record ever named, which were removed."""
    expired: tuple[str, ...] = ()
    """Streams of which tiles were let go."""


class Choice(NamedTuple):
    """Which packs to give up."""

    dead_share: float
    """From which share of dead bytes on."""
    small_bytes: int = 0
    """Below this size too, where there are several."""


class Marks:
    """The blobs that directories refer to, and what these are made of. Pages visited once are not read again.

    A blob is known by its prefix: one that is mistaken for it is only kept longer.

    Args:
        every: look at every tile for what it is made of; else only at documents, and at those that packs' rows call
            deltas.
    """

    def __init__(self, store: WarmStore, expiry: Expiry, *, every: bool = False) -> None:
        self._store, self._expiry, self._every = store, expiry, every
        self._seen: set[tuple[str, bytes]] = set()
        self._nodes: set[bytes] = set()
        self._fresh: list[NDArray[np.uint64]] = []
        self._known: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._documents: list[Ref] = []

    def directory(self, root: bytes, *, held: bool = False) -> None:
        """Mark all that a directory reaches; held, what retention has let go too."""
        if not root or not self._visit("held" if held else "", root):
            return
        node = directory.children(self._store, root)
        if not isinstance(node, tuple):
            for child, _ in node.values():
                self.directory(child, held=held)
            return
        for frame in node:
            if frame.root:
                expiring = self._expiry.touches(frame.stream)
                self._page(frame, frame.root, frame.root_height, frame.stream if expiring else "", held=held)

    def parts(self, rows: Mapping[str, layout.Rows]) -> None:
        """Mark what marked tiles are made of: bases of deltas (told by the packs' rows) and chunks of documents."""
        found = self._documents
        self._documents = []
        for held in rows.values():
            deep = held[held["depth"] > 0]
            found += [BlobId(blob.tobytes()) for blob in deep["blob"][self.has(deep)]]
        while found:
            ref = found.pop()
            if self._visit("parts", ref):
                made_of = self._store.made_of(ref)
                self._mark(made_of)
                found += made_of

    def companions(self, rows: Mapping[str, layout.Rows]) -> None:
        """Mark the levels above marked pages, with the tiles that are stored for them."""
        for held in rows.values():
            for blob in held["blob"][held["kind"] == KIND_COMPANION]:
                name = BlobId(blob.tobytes())
                if self._visit("companion", name):
                    try:
                        found = levels.decode(self._store, name)
                    except IntegrityError:
                        if self._store.has(name):
                            raise
                        continue  # It went with a pack that another process was allowed to remove.
                    if found.page in self._nodes:
                        self._mark([name, *(tile for level in found.levels for _, tile in level)])

    def has(self, rows: layout.Rows) -> NDArray[np.bool_]:
        """Which rows are of marked blobs."""
        if self._fresh:
            self._known = np.unique(np.concatenate([self._known, *self._fresh]))
            self._fresh = []
        if not len(self._known):
            return np.zeros(len(rows), dtype=np.bool_)
        names = prefixes(rows["blob"])
        at = np.minimum(self._known.searchsorted(names), len(self._known) - 1)
        return self._known[at] == names

    def _page(self, frame: Frame, blob: bytes, height: int, expiring: str, *, held: bool) -> None:
        # The same page may stand in a stream that lets go and in one that does not, in documents and in arrays.
        if not self._visit(f"{frame.content}:{expiring}{':held' * held}" if expiring else frame.content, blob):
            return
        found = page.load(self._store, blob, height)
        raw, names = found.entries(), found.names()
        if height:
            for child in raw:
                self._page(frame, found.refers(child.tobytes()), height - 1, expiring, held=held)
            return
        if expiring:
            gone = self._expiry.covers(expiring, raw[:, 32:])
            if held:
                # A hold keeps what is still there: it may have come after parts of it went.
                gone[gone] = [lacks(self._store, found.refers(row.tobytes())) for row in raw[gone]]
            raw, names = raw[~gone], names[~gone]
        self._fresh.append(prefixes(names))
        if self._every or frame.content == "bytes":
            self._documents += [found.refers(row.tobytes()) for row in raw]

    def _visit(self, how: str, blob: bytes) -> bool:
        if (how, blob) in self._seen:
            return False
        self._seen.add((how, blob))
        if how not in ("parts", "companion"):
            self._nodes.add(blob)
            self._mark([blob])
        return True

    def _mark(self, refs: Sequence[bytes]) -> None:
        if refs:
            names = b"".join(ref.blob_id if isinstance(ref, Secret) else ref for ref in refs)
            self._fresh.append(prefixes(np.frombuffer(names, dtype=np.uint8).reshape(-1, 32)))


class Collector:
    """One collection in a repository."""

    def __init__(
        self, history: History, projection: Projection, store: WarmStore, clock: Clock, roots: Roots,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self._history, self._projection, self._store, self._clock = history, projection, store, clock
        self._roots = roots
        self._progress = progress or silent

    def run(self, choice: Choice, *, dry_run: bool = False) -> Collected:
        """Mark, copy, condemn, remove. What was done until an error stays done; run again, it goes on.

        Args:
            dry_run: only count.

        Raises:
            IntegrityError: something that is referred to is missing or damaged: nothing is removed before it is mended.
            StorageError, UnavailableError: the disk or the cold tier refused.
        """
        expired = () if dry_run else self._expire()
        if not dry_run:
            self._history.finish_packs()
        with self._history.lease():
            # Before the state is looked at: a trace may be of what was committed a moment ago.
            roots = tuple(self._roots())
            self._history.refresh()
            live = self._projection.state()
            rows = self._rows(live)
            marks = Marks(self._store, Expiry(self._projection.expired()))
            self._mark(marks, live, rows, roots)
            used = {name: int(_sizes(held[marks.has(held)]).sum()) for name, held in rows.items()}
            total = {name: int(_sizes(held).sum()) for name, held in rows.items()}
            staying = {pack.name: pack for pack in live.packs if not pack.condemned and not pack.removed}
            packs = {name: pack.finished for name, pack in staying.items() if pack.finished}
            victims = [] if dry_run else chosen(packs, used, total, choice)
            copied = self._give_up(marks, victims, rows, live.seq) if victims else 0
        live_bytes = sum(used[name] for name in staying)
        found = Collected(
            live_bytes, sum(total[name] for name in staying) - live_bytes, len(staying), len(victims), copied,
            0, 0, 0, 0, tuple(expired),
        )  # fmt: skip
        return found if dry_run else self._removed(found)

    # -- retention

    def _expire(self) -> Sequence[str]:
        """Let go what has come of age; the streams."""
        streams: list[str] = []

        def build() -> Sequence[Operation]:
            rules = self._history.retention()
            snapshots = list(self._projection.snapshots())
            due = list(retention.due(rules, self._projection.expired(), snapshots, self._clock.now_ns()))
            streams.extend(sorted({one.stream for one in due if isinstance(one, TilesExpired)}))
            return due

        self._history.append(build)
        return streams

    # -- marking

    def _rows(self, live: LiveState) -> dict[str, layout.Rows]:
        """What every pack holds that is there, in the order of their names."""
        packs = [pack for pack in live.packs if not pack.removed]
        rows: dict[str, layout.Rows] = {}
        for number, pack in enumerate(sorted(packs, key=lambda one: one.name)):
            self._progress(number, len(packs), "reading what packs hold")
            rows[pack.name] = self._history.pack_rows(pack)
        return rows

    def _mark(
        self, marks: Marks, live: LiveState, rows: Mapping[str, layout.Rows], roots: Iterable[bytes], *,
        companions: bool = True,
    ) -> None:  # fmt: skip
        """Everything that may be read: what snapshots hold and began with, and what traces name."""
        # The held first: what they reach is kept whole.
        for number, (_, found) in enumerate(sorted(live.snapshots, key=lambda one: not retention.held(one[1]))):
            self._progress(number, len(live.snapshots), "marking")
            held = retention.held(found)
            there = self._history.opened(found)
            for root in (there.directory, *(parent.directory for parent in there.parents)):
                marks.directory(root, held=held)
        for root in roots:
            marks.directory(root)
        if companions:  # Else what lacks is derived when it is asked for.
            marks.companions(rows)
        marks.parts(rows)

    # -- giving packs up

    def _give_up(self, marks: Marks, victims: Sequence[str], rows: Mapping[str, layout.Rows], since: int) -> int:
        """Copy what is used out of packs, and condemn them; the bytes copied.

        Args:
            since: the record up to which `marks` and `rows` are complete.
        """
        avoid, copied = frozenset(victims), 0
        for number, name in enumerate(victims):
            self._progress(number, len(victims), "copying")
            for batch in _batches(rows[name][marks.has(rows[name])]):
                copied += self._store.copy(self._store.only_in(batch, avoid))
                # Named at once: what was copied before a crash is found by the next collection.
                self._history.append(lambda: (), blobs=True)

        def build() -> Sequence[Operation]:
            # What came since the packs were marked is marked now, when nothing more can come.
            nonlocal copied
            live = self._projection.state()
            new = {pack.name: self._store.rows(pack) for pack in live.packs if pack.seq > since and not pack.removed}
            self._mark(marks, live, {**rows, **new}, self._roots(), companions=False)
            # Another collection may have been faster.
            still = [name for name in victims if not _state(live, name).condemned]
            for name in still:
                found = [BlobId(blob.tobytes()) for blob in rows[name]["blob"][marks.has(rows[name])]]
                copied += self._store.copy(self._store.only_in(found, avoid))
            return [PackCondemned(name) for name in still]

        self._history.append(build)
        self._history.finish_packs()
        return copied

    # -- removing

    def _removed(self, found: Collected) -> Collected:
        """Remove the condemned packs that nobody reads, then what crashes left."""
        condemned = self._store.condemned_packs()
        floor = min(self._history.leases.floors().values(), default=None)
        free = [name for name, seq in condemned.items() if floor is None or floor >= seq]
        packs = [pack.finished for pack in self._projection.state().packs if pack.name in free]
        freed = sum(finished.size for finished in packs if finished)
        if free:
            rescued = self._of_traces()
            # The others are protected without them before they go.
            self._store.protect(self._progress)
            self._history.append(lambda: self._removing(free, rescued))
        for number, name in enumerate(free):
            self._progress(number, len(free), "removing")
            self._store.remove(name)
        orphans = self._orphans()
        if self._store.tiered:
            # What the cold tier keeps longer the next collection takes.
            with suppress(UnavailableError, ConflictError):
                self._clear_cold()
        return msgspec.structs.replace(
            found, removed_packs=len(free), freed_bytes=freed, waiting_packs=len(condemned) - len(free),
            orphan_packs=orphans,
        )  # fmt: skip

    def _of_traces(self) -> Marks:
        """What traces refer to that may have been saved since the packs were condemned.

        Whoever read before that is through: what is traced from now on is of directories that are referred to.
        """
        with self._history.lease():
            roots = tuple(self._roots())
            self._history.refresh()
            marks = Marks(self._store, Expiry(self._projection.expired()), every=True)
            live = {found.directory for _, found in self._projection.state().snapshots}
            for root in roots:
                if (root.blob_id if isinstance(root, Secret) else root) not in live:
                    marks.directory(root)
            marks.parts({})
            return marks

    def _removing(self, packs: Sequence[str], rescued: Marks) -> Sequence[Operation]:
        """The record that packs go, after what is to be rescued from them was copied."""
        live = self._projection.state()
        rows = {name: self._store.rows(_state(live, name)) for name in packs if not _state(live, name).removed}
        for held in rows.values():
            found = [BlobId(blob.tobytes()) for blob in held["blob"][rescued.has(held)]]
            self._store.copy(self._store.only_in(found, frozenset()))
        return [PackRemoved(name) for name in rows]

    def _clear_cold(self) -> None:
        """Remove copies of packs that are gone.

        From the cold tier alone a repository is restored up to the first record that names a pack it lacks. So a copy
        stays until all that was named before its pack was removed, and the record of that, are there.
        """
        self._store.copy_out()
        packs, copied = self._projection.state().packs, self._store.copies()
        here = (pack for pack in packs if not pack.removed and pack.name not in copied)
        reach = min((pack.ranges[0][0] if pack.ranges else 0 for pack in here), default=None)
        for pack in packs:
            if pack.removed and pack.name in copied and (reach is None or reach > pack.removed):
                self._store.remove_copy(pack.name)

    def _orphans(self) -> int:
        """Remove files no record names or that one says are gone; how many of the former there were."""
        self._history.refresh()
        state = {pack.name: pack for pack in self._projection.state().packs}
        names = [f"{PACK_FOLDER}/{name}" for name in self._store.disk.list(PACK_FOLDER) if not name.endswith(PARITY)]
        for name in names:
            if name in state and state[name].removed:
                self._store.remove(name)
        return sum(self._orphaned(name) for name in names if name not in state)

    def _orphaned(self, name: str) -> bool:
        """Remove a file that no writer holds and no record names; whether it was one."""
        try:
            file = self._store.disk.open(name)
        except NotFoundError:
            return False
        try:
            if not file.lock(wait=False):
                return False
            # Its writer may have committed to it just before it died.
            self._history.refresh()
            if name in self._projection.packs(0):
                return False
            self._store.remove(name)
            return True
        finally:
            file.close()


def chosen(
    packs: Mapping[str, PackFinished], used: Mapping[str, int], total: Mapping[str, int], choice: Choice
) -> list[str]:
    """The packs to give up, oldest first: those that hold mostly what is dead, and small ones where there are several.

    Args:
        used, total: bytes of the records in each: those that something refers to, and all.
    """
    small = [name for name, pack in packs.items() if pack.size < choice.small_bytes]
    if len(small) == 1:
        small = []
    dead = [name for name in packs if used[name] <= (1 - choice.dead_share) * total[name]]
    given = {*small, *dead}
    return [name for name in packs if name in given]


def _batches(rows: layout.Rows) -> Iterator[list[BlobId]]:
    """The rows' blobs in the order they lie in, COLLECT_COPY_BYTES at a time."""
    batch, size = list[BlobId](), 0
    rows = rows[np.argsort(rows["offset"])]
    for blob, length in zip(rows["blob"], rows["length"].tolist(), strict=True):
        batch.append(BlobId(blob.tobytes()))
        size += length
        if size >= COLLECT_COPY_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sizes(rows: layout.Rows) -> NDArray[np.int64]:
    return rows["length"].astype(np.int64)


def _state(live: LiveState, name: str) -> PackState:
    return next(pack for pack in live.packs if pack.name == name)
