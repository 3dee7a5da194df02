"""What the processes do: each kind of call with how often it comes, what it may write, and what may go wrong with it.

A call is told only its number; what it puts and where follows from that and from what is there when it runs. So calls
can be left out of a workload and the others stay what they were.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Final, NamedTuple

import numpy as np

from him.catalog import stats
from him.catalog.changes import FrameChange
from him.catalog.garbage import Choice
from him.catalog.reader import CRITICAL, SnapshotReader
from him.catalog.transfer import transfer
from him.errors import (
    BusyError,
    ConflictError,
    ExpiredError,
    HimError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from him.ports import silent
from him.pyramid import diff as cells_diff
from him.pyramid import directory
from him.sim import checks
from him.sim.faults import FAULTS, ROTTING, STORE
from him.sim.ledger import published
from him.sim.model import (
    HOLD,
    Array,
    Cell,
    Change,
    Content,
    FrameModel,
    Model,
    Snap,
    Value,
    Violation,
    after,
    level_tile,
    whole,
)
from him.sim.repair import repaired
from him.sim.rooms import Rooms
from him.sim.world import Kept, Op, Process
from him.tier import cold
from him.types import (
    AttributeSet,
    Frame,
    PackCondemned,
    PackRemoved,
    RefSet,
    RetentionSet,
    Sealed,
    SnapshotDropped,
    SnapshotOpened,
    StreamDeclared,
    StreamSpec,
    TileKey,
    TilesExpired,
)

GRID: Final = StreamSpec("grid", tile_height=16, tile_width=16, dtype="uint8", level_rule="mean")
PEAK: Final = StreamSpec("peak", tile_height=8, tile_width=8, dtype="int16", level_rule="max")
NOISE: Final = StreamSpec("noise", tile_height=32, tile_width=32, dtype="uint8")
NOTE: Final = StreamSpec("note", content="bytes", tile_height=1, tile_width=1)
DECLARED: Final = (GRID, PEAK, NOISE, NOTE)
ARRAYS: Final = (GRID, PEAK, NOISE)
BRANCHES: Final = ("main", "dev", "wild", "old")
TAGS: Final = ("v1", "v2", "v3")
FRAMES: Final = ("", "f1", "f2", "ü")
TASKS: Final = ("", "t1")
_STORE: Final = {"store down", *(fault.name for fault in STORE)}
_TAKE_OVER_TRIES: Final = 5
_SIDE: Final = 4
_FAR: Final = 70
Call = Callable[[Process, Rooms, Random], None]


class Work(NamedTuple):
    """A kind of call."""

    often: int
    call: Call
    writes: bool
    expects: tuple[type[HimError], ...] = ()
    """Errors that what is there may be the reason for."""

    def run(self, process: Process, rooms: Rooms, rng: Random) -> None:
        """Do it."""
        self.call(process, rooms, rng)

    def judge(self, process: Process, error: HimError) -> None:
        """Whether something explains an error. Raises Violation."""
        act, gate = process.act, process.gate
        if isinstance(error, self.expects):
            return
        if isinstance(error, StorageError | BusyError) and (gate.injected or process.world.weather.full):
            return
        if isinstance(error, UnavailableError) and act.kind == "pin" and process.world.counts.keys() & _STORE:
            return  # Nothing is fetched ahead for a while after the store gave no answer.
        if error.message.startswith("the warm budget of"):
            return  # Full of what is pinned, or of what is not copied yet.
        if isinstance(error, BusyError) and process.site.model.seq > act.began:
            return  # Somebody else collected garbage, or writes to a pack.
        if isinstance(error, IntegrityError) and (process.site.rotted or gate.missed):
            return  # What was damaged, or freed by another process, could not be fetched.
        raise Violation("an error nothing explains", f"{act.kind} #{act.number}: {error.kind}: {error.line()}")

    def done(self, process: Process) -> None:
        """Whether a call that reported success did what it says. Raises Violation."""
        act, model = process.act, process.site.model
        alone = model.seq == act.began + act.written
        if act.changes and not act.batches and alone:
            snap = model.find(act.branch)
            if snap is None or after(model, snap, act.changes).key != model.content(snap.directory).key:
                raise Violation("an acknowledged batch is not there", f"{act.kind} #{act.number}")
        if act.must and not act.written and alone:
            raise Violation("an acknowledged record is not there", f"{act.kind} #{act.number}")


# -- choosing


def weather(process: Process, rng: Random) -> None:
    """Before a call: what befalls the process, or the machine, during it and after."""
    world = process.world

    def falls(name: str) -> bool:
        return name in world.faults and rng.random() < 1 / FAULTS[name].every

    if falls("kill"):
        process.kill_in = 1 + int(rng.expovariate(1 / 15))
    if falls("power loss"):
        world.power_in = 1 + int(rng.expovariate(1 / 40))
    if falls("disk full"):
        world.weather.full = rng.randrange(20, 400)
    if falls("store down"):
        world.weather.down = rng.randrange(5, 60)
    if falls("clock jump"):
        world.counts["clock jump"] += 1
        world.clock.jump(rng.choice((-3_600_000, -5_000, 5_000, 120_000, 86_400_000)))
    if falls("memo lost"):
        world.counts["memo lost"] += 1
        process.site.memo.items.clear()
    if rng.random() < 1 / 20:
        world.bucket.remember()
    if falls("rot"):
        rot(process, rng)


def rot(process: Process, rng: Random) -> None:
    """Damage a file at rest that can be done without, or is somewhere else too."""
    world, site = process.world, process.site
    held = checks.elsewhere(site.volume, world.bucket) if not site.rotted else set[str]()
    found = [
        path
        for path in sorted(site.volume.files)
        if path.startswith(ROTTING) and (path in held or not path.startswith("packs/"))
    ]
    if not found:
        return
    path = rng.choice(found)
    data = site.volume.files[path]
    if checks.spoil(data.now, rng):
        world.counts["rot"] += 1
        site.rotted.add(path)
        world.note(f"rot {path}")


def some(rng: Random, items: Sequence[str]) -> str:
    """One of them, the first more often."""
    return items[min(int(rng.expovariate(0.7)), len(items) - 1)]


def target_of(model: Model, rng: Random) -> str:
    """A name to read: mostly a ref, else a snapshot's id, rarely nothing that exists."""
    refs, ids = sorted(model.refs), list(model.snapshots)
    if refs and rng.random() < 0.7:
        return rng.choice(refs)
    return rng.choice(ids) if ids and rng.random() < 0.95 else "nothing"


def tile_value(spec: StreamSpec, rng: Random, old: Value | None) -> Array:
    """A tile: noise, one colour, or what stood there a little changed."""
    how = rng.random()
    if old is not None and how < 0.5:
        values = old.array().copy()
        flat = values.reshape(-1)
        for _ in range(rng.choice((1, 3, 12))):
            flat[rng.randrange(flat.size)] ^= 1 + rng.randrange(100)
        return values
    high, wide = spec.tile_height, spec.tile_width
    if rng.random() < 0.2:
        high, wide = rng.randrange(1, high + 1), rng.randrange(1, wide + 1)
    if how < 0.7:
        return np.full((high, wide), rng.randrange(4), dtype=spec.dtype)
    size = high * wide * np.dtype(spec.dtype).itemsize
    return np.frombuffer(rng.randbytes(size), dtype=spec.dtype).reshape(high, wide)


def document(rng: Random, old: Value | None) -> bytes:
    """A document: short, or long enough for chunks; or what stood there with an insertion."""
    if old is not None and old.data and rng.random() < 0.6:
        at = rng.randrange(len(old.data))
        return old.data[:at] + rng.randbytes(rng.randrange(1, 40)) + old.data[at:][:60_000]
    return rng.randbytes(rng.choice((0, 5, 300, 3_000, 20_000)))


def frame_at(process: Process, branch: str, spec: StreamSpec, frame: str) -> FrameModel | None:
    """A frame as the model has it at a branch's head."""
    snap = process.site.model.find(branch)
    return None if snap is None else process.site.model.content(snap.directory).frames.get((spec.name, frame))


# -- writing


def declare(process: Process, rooms: Rooms, rng: Random) -> None:
    """Declare a stream."""
    spec = DECLARED[process.act.number % len(DECLARED)]
    process.act.wants = StreamDeclared(spec).__eq__
    process.act.must = spec.name not in process.site.model.streams
    rooms.history.declare_stream(spec)


def put(process: Process, rooms: Rooms, rng: Random) -> None:
    """Put some tiles of a frame."""
    spec, branch, frame = rng.choice(ARRAYS), some(rng, BRANCHES), some(rng, FRAMES)
    now = frame_at(process, branch, spec, frame)
    side = _FAR if rng.random() < 0.03 else _SIDE
    cells: dict[tuple[int, int], Array] = {}
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(side), rng.randrange(_SIDE)
        old = None if now is None else now.cells.get(place)
        cells[place] = tile_value(spec, rng, None if old is None else old.value)
    extent = (
        max(row * spec.tile_height + one.shape[0] for (row, _), one in cells.items()),
        max(column * spec.tile_width + one.shape[1] for (_, column), one in cells.items()),
    )
    process.act.branch = branch
    process.act.changes = (Change(spec, frame, {at: Value.of(one) for at, one in cells.items()}, extent),)
    rooms.ingest.tiles(branch, spec.name, frame, cells)


def put_document(process: Process, rooms: Rooms, rng: Random) -> None:
    """Put a document."""
    branch, frame, place = some(rng, BRANCHES), some(rng, FRAMES), (rng.randrange(3), 0)
    now = frame_at(process, branch, NOTE, frame)
    old = None if now is None else now.cells.get(place)
    value = document(rng, None if old is None else old.value)
    process.act.branch = branch
    process.act.changes = (Change(NOTE, frame, {place: Value.of(value)}, (place[0] + 1, 1)),)
    rooms.ingest.tiles(branch, NOTE.name, frame, {place: value})


def append(process: Process, rooms: Rooms, rng: Random) -> None:
    """Append rows to a log."""
    branch, row = some(rng, BRANCHES), {"n": rng.randrange(1000)}
    line = b'{"n":%d}\n' % row["n"]
    logs = process.site.model.stream("logs")
    assert logs is not None
    process.act.branch = branch
    process.act.changes = (Change(logs, "{}.w", {}, (0, 1), append=Value.of(line)),)
    rooms.ingest.append(branch, "logs", [row], writer="w")


def replace(process: Process, rooms: Rooms, rng: Random) -> None:
    """Replace a frame by an array of another size."""
    spec, branch, frame = rng.choice(ARRAYS), some(rng, BRANCHES), some(rng, FRAMES)
    height, width = rng.randrange(1, 3 * spec.tile_height), rng.randrange(1, 3 * spec.tile_width)
    if rng.random() < 0.3:
        values = np.zeros((height, width), dtype=spec.dtype)
    else:
        size = height * width * np.dtype(spec.dtype).itemsize
        values = np.frombuffer(rng.randbytes(size), dtype=spec.dtype).reshape(height, width)
    high, wide = spec.tile_height, spec.tile_width
    cells = {
        (row, column): Value.of(values[row * high : (row + 1) * high, column * wide : (column + 1) * wide])
        for row in range(-(-height // high))
        for column in range(-(-width // wide))
    }
    process.act.branch = branch
    process.act.changes = (Change(spec, frame, cells, (height, width), replace=True),)
    rooms.ingest.array(branch, spec.name, frame, values)


def delete(process: Process, rooms: Rooms, rng: Random) -> None:
    """Delete tiles, perhaps all of a frame's."""
    branch, spec, frame = some(rng, BRANCHES), rng.choice(DECLARED), some(rng, FRAMES)
    now = frame_at(process, branch, spec, frame)
    places = sorted(now.cells) if now is not None else []
    chosen = places if rng.random() < 0.3 else places[: rng.randrange(1, 3)]
    cells: dict[tuple[int, int], None] = dict.fromkeys(chosen or [(0, 0)])
    process.act.branch = branch
    process.act.changes = (Change(spec, frame, cells, (0, 0)),)
    rooms.ingest.tiles(branch, spec.name, frame, cells)


def drop_frame(process: Process, rooms: Rooms, rng: Random) -> None:
    """Remove a frame whole."""
    spec, branch, frame = rng.choice(DECLARED), some(rng, BRANCHES), some(rng, FRAMES)
    process.act.branch = branch
    process.act.changes = (Change(spec, frame, {}, (0, 0), replace=True),)
    opened, begun = rooms.history.writable(branch), rooms.history.begin()
    high, wide = spec.tile_height, spec.tile_width
    shape = Frame(spec.name, frame, spec.content, high, wide, 0, spec.dtype, high, wide, 0, spec.level_rule, b"", 0)
    rooms.history.commit(opened.snapshot_id, [FrameChange(shape, {}, replace=True)], begun=begun)


def slow_put(process: Process, rooms: Rooms, rng: Random) -> None:
    """A batch that begins, lets others work, and commits what others may have stored, dropped or collected since."""
    branch, frame = some(rng, BRANCHES), some(rng, FRAMES)
    model = process.site.model
    values = [
        cell.value
        for snap in list(model.snapshots.values())[-6:]
        for (stream, _), one in model.content(snap.directory).frames.items()
        if stream == NOISE.name
        for cell in one.cells.values()
    ]
    old = rng.choice(values) if values else None
    value = tile_value(NOISE, rng, None) if old is None else old.array()
    process.act.branch = branch
    place = (rng.randrange(_SIDE), rng.randrange(_SIDE))
    extent = place[0] * NOISE.tile_height + value.shape[0], place[1] * NOISE.tile_width + value.shape[1]
    process.act.changes = (Change(NOISE, frame, {place: Value.of(value)}, extent),)
    with checks.slowed(rooms.store, process.world.schedule):
        rooms.ingest.tiles(branch, NOISE.name, frame, {place: value})


def seal(process: Process, rooms: Rooms, rng: Random) -> None:
    """Seal a branch's head."""
    process.act.seals = True
    rooms.history.seal(some(rng, BRANCHES))


def branch(process: Process, rooms: Rooms, rng: Random) -> None:
    """Make a branch from something."""
    name, model = some(rng, BRANCHES[::-1]), process.site.model
    parent = target_of(model, rng) if rng.random() < 0.8 else None
    process.act.branch = name
    tags = {"task_id": "t1"} if rng.random() < 0.3 else {}
    process.act.may = frozenset({AttributeSet})
    rooms.history.open_snapshot(parent=parent, branch=name, tags=tags)


def tag(process: Process, rooms: Rooms, rng: Random) -> None:
    """Name a snapshot for good."""
    name = some(rng, TAGS)
    model = process.site.model
    process.act.wants = lambda one: (
        isinstance(one, RefSet) and (one.name, one.kind) == (name, "tag") and one.snapshot_id in model.snapshots
    )
    process.act.must = True
    rooms.history.set_ref(name, "tag", target_of(model, rng))


def delete_ref(process: Process, rooms: Rooms, rng: Random) -> None:
    """Remove a name."""
    name = rng.choice((*BRANCHES[1:], *TAGS))
    process.act.wants = lambda one: isinstance(one, RefSet) and (one.name, one.snapshot_id) == (name, "")
    process.act.must = True
    rooms.history.delete_ref(name)


def drop(process: Process, rooms: Rooms, rng: Random) -> None:
    """Drop a snapshot that no name holds."""
    model = process.site.model
    named = {target for _, target in model.refs.values()}
    free = [one for one in model.snapshots if one not in named]
    chosen = rng.choice(free) if free and rng.random() < 0.95 else target_of(model, rng)
    snap = model.find(chosen)
    process.act.wants = lambda one: (
        isinstance(one, SnapshotDropped) and (snap is None or one.snapshot_id == snap.opened.snapshot_id)
    )
    process.act.must = True
    rooms.history.drop(chosen)


def attribute(process: Process, rooms: Rooms, rng: Random) -> None:
    """Set or remove an attribute, a legal hold and a critical mark among them."""
    key = rng.choice(("owner", HOLD, CRITICAL, "task_id"))
    value = None if rng.random() < 0.5 else f"x{rng.randrange(3)}"
    name = target_of(process.site.model, rng)
    process.act.wants = lambda one: isinstance(one, AttributeSet) and (one.key, one.value) == (key, value)
    process.act.must = True
    rooms.history.set_attribute(name, key, value)


def retain(process: Process, rooms: Rooms, rng: Random) -> None:
    """Say how long a stream is kept."""
    stream, task = rng.choice(DECLARED).name, rng.choice(TASKS)
    ttl_s = rng.choice((0, -1, -1, 3_600, 600))
    process.act.wants = RetentionSet(stream, task, ttl_s).__eq__
    process.act.must = True
    rooms.history.set_retention(stream, task, ttl_s)


# -- reading


@contextmanager
def reading(process: Process, rooms: Rooms, name: str) -> Generator[tuple[Snap, Content, SnapshotReader]]:
    """A snapshot under a lease, with what it has to hold; nothing that was published before is missing in it."""
    site = process.site
    floor = seen(process, rooms)
    known = site.model.find(name)
    with rooms.history.lease():
        try:
            found = rooms.history.snapshot(name)
        except NotFoundError:
            if known is not None and seen(process, rooms) == floor == site.model.seq:
                raise Violation("an acknowledged name cannot be seen", name) from None
            raise
        with process.world.quietly(process):
            site.ledger.look(site.volume, up_to=rooms.log.head()[0])
        snap = site.model.snapshots.get(found.snapshot_id)
        if snap is None:
            raise NotFoundError("dropped meanwhile", object=name)
        if found.directory not in snap.shown_since(floor):
            raise Violation("an acknowledged commit cannot be seen", f"{name} {found.directory.hex()}")
        reader = rooms.reader(found.directory, critical=CRITICAL in found.tags)
        yield snap, site.model.content(found.directory), reader


def seen(process: Process, rooms: Rooms) -> int:
    """The last record that this process has to see: what it was told itself, and what is published.

    Where the published end could not be written the next commit will; until then others need not see what it is of.
    """
    site = process.site
    with process.world.quietly(process):
        own = rooms.log.head()[0]
    site.ledger.look(site.volume, up_to=own)
    told = published(site.volume)
    return site.model.seq if told is None else max(told, own)


def same(process: Process, key: TileKey, got: "Array | bytes", want: Value) -> None:
    """What was read is what was put. Raises Violation."""
    if Value.of(got) != want:
        raise Violation("wrong bytes", f"{key} in {process.act.kind} #{process.act.number}")


@contextmanager
def expiring(process: Process, content: Content, streams: Sequence[str]) -> Generator[None]:
    """A tile may be missing where retention has let it go, and no legal hold stood above."""
    try:
        yield
    except ExpiredError as error:
        model = process.site.model
        cells = [
            (name, cell)
            for name, frame in content.frames.items()
            if name[0] in streams
            for cell in frame.cells.values()
        ]
        if not any(model.gone(name[0], cell.origin) for name, cell in cells):
            raise Violation("expired before its time", error.line()) from None


def read_tile(process: Process, rooms: Rooms, rng: Random) -> None:
    """Read tiles of level 0."""
    with reading(process, rooms, target_of(process.site.model, rng)) as (_, content, reader):
        read_some(process, reader, content, rng, rng.choice((1, 1, 3)))


def read_some(process: Process, reader: SnapshotReader, content: Content, rng: Random, count: int) -> None:
    """Read some tiles of a content; at times one that is not there."""
    for _ in range(count):
        if not content.frames or rng.random() < 0.05:
            checks.absent(reader, TileKey("grid", some(rng, FRAMES), 0, 300, 300))
            continue
        name = rng.choice(list(content.frames))
        frame = content.frames[name]
        place = rng.choice(list(frame.cells))
        key = TileKey(*name, 0, *place)
        with expiring(process, content, [name[0]]):
            if rng.random() < 0.2:
                with reader.view(key) as values:
                    same(process, key, values if isinstance(values, bytes) else values.copy(), frame.cells[place].value)
                    del values
            else:
                same(process, key, reader.tile(key), frame.cells[place].value)


def read_level(process: Process, rooms: Rooms, rng: Random) -> None:
    """Read a derived tile."""
    with reading(process, rooms, target_of(process.site.model, rng)) as (_, content, reader):
        leveled = [name for name, frame in content.frames.items() if frame.spec.level_rule != "none"]
        if not leveled:
            return
        name = rng.choice(leveled)
        frame, (row, column) = content.frames[name], rng.choice(list(content.frames[name].cells))
        rows, columns = -(-frame.height // frame.spec.tile_height), -(-frame.width // frame.spec.tile_width)
        apex = (max(rows, columns) - 1).bit_length()
        if not apex:
            return
        level = rng.randrange(1, apex + 1)
        key = TileKey(*name, level, row >> level, column >> level)
        want = level_tile(frame, level, key.y, key.x)
        assert want is not None
        with expiring(process, content, [name[0]]):
            same(process, key, reader.tile(key), Value.of(want))


def read_frame(process: Process, rooms: Rooms, rng: Random) -> None:
    """Read a whole frame, or many of its tiles at once."""
    with reading(process, rooms, target_of(process.site.model, rng)) as (_, content, reader):
        if not content.frames:
            return
        name = rng.choice(list(content.frames))
        frame = content.frames[name]
        places = sorted(frame.cells)
        with expiring(process, content, [name[0]]):
            if frame.spec.content == "array" and rng.random() < 0.5 and frame.height * frame.width < 200_000:
                same(process, TileKey(*name, 0, 0, 0), reader.array(*name), Value.of(whole(frame)))
                return
            keys = [TileKey(*name, 0, *place) for place in places[:20]]
            for key, got in zip(keys, reader.tiles(keys), strict=True):
                same(process, key, got, frame.cells[key.y, key.x].value)


def list_all(process: Process, rooms: Rooms, rng: Random) -> None:
    """List frames, places and what is known of a tile."""
    with reading(process, rooms, target_of(process.site.model, rng)) as (_, content, reader):
        listed = {(one.stream, one.name): (one.height, one.width) for one in reader.frames()}
        wanted = {name: (frame.height, frame.width) for name, frame in content.frames.items()}
        if listed != wanted:
            raise Violation("frames differ", f"{listed} instead of {wanted}")
        if not listed:
            return
        name = rng.choice(list(content.frames))
        keys = [(key.y, key.x) for key in reader.keys(*name)]
        if sorted(keys) != sorted(content.frames[name].cells):
            raise Violation("places differ", f"{name}: {sorted(keys)}")
        place = rng.choice(keys)
        with expiring(process, content, [name[0]]):
            reader.meta(TileKey(*name, 0, *place))


def cells_of(content: Content, name: tuple[str, str]) -> Mapping[tuple[int, int], Cell]:
    """The cells of a frame; none where there is no such frame."""
    frame = content.frames.get(name)
    return {} if frame is None else frame.cells


def diff(process: Process, rooms: Rooms, rng: Random) -> None:
    """Compare two snapshots, cell by cell."""
    model, store = process.site.model, rooms.store
    with (
        reading(process, rooms, target_of(model, rng)) as (_, one, first),
        reading(process, rooms, target_of(model, rng)) as (_, other, second),
    ):
        found = set[tuple[str, str, int, int]]()
        for was, now in directory.diff(store, first.directory, second.directory):
            frame = now or was
            assert frame is not None
            old, old_height = (was.root, was.root_height) if was else (b"", 0)
            new, new_height = (now.root, now.root_height) if now else (b"", 0)
            changed = cells_diff.cells(store, old, old_height, new, new_height)
            found.update((frame.stream, frame.name, row, column) for row, column, _, _ in changed)
    wanted = set[tuple[str, str, int, int]]()
    for name in {*one.frames, *other.frames}:
        before, after_ = (cells_of(content, name) for content in (one, other))
        for place in {*before, *after_}:
            if before.get(place) != after_.get(place):
                wanted.add((*name, *place))
    if found != wanted:
        raise Violation("a diff differs", f"{sorted(found ^ wanted)}")


def keep(process: Process, rooms: Rooms, rng: Random) -> None:
    """Take a lease for a while."""
    lease = rooms.history.lease()
    found = rooms.history.snapshot(target_of(process.site.model, rng))
    process.kept.append(Kept(lease, found.snapshot_id, found.directory))
    if len(process.kept) > 3:
        process.kept.pop(0).lease.release()


def recall(process: Process, rooms: Rooms, rng: Random) -> None:
    """Read under a lease that was taken some time ago."""
    if not process.kept:
        return
    kept = rng.choice(process.kept)
    process.site.ledger.look(process.site.volume, up_to=rooms.log.head()[0])
    content = process.site.model.content(kept.directory)
    read_some(process, rooms.reader(kept.directory), content, rng, 4)
    if rng.random() < 0.3:
        process.kept.remove(kept)
        kept.lease.release()


def trace(process: Process, rooms: Rooms, rng: Random) -> None:
    """Read, and leave a trace of what was read, as a query does; or read what a trace names."""
    traces = process.world.traces
    if traces and rng.random() < 0.6:
        kept = rng.choice(traces)
        try:
            with rooms.history.lease():
                rooms.history.refresh()
                read_some(process, rooms.reader(kept), process.site.model.content(kept), rng, 3)
        except IntegrityError:
            if kept in traces:
                raise  # Else another process has deleted it meanwhile, and nothing keeps what it names.
        return
    with reading(process, rooms, target_of(process.site.model, rng)) as (_, content, reader):
        read_some(process, reader, content, rng, 2)
        traces.append(reader.directory)
        if len(traces) > 6:
            traces.pop(0)


# -- care


def gc(process: Process, rooms: Rooms, rng: Random) -> None:
    """Collect garbage."""
    process.act.may = frozenset({PackCondemned, PackRemoved, TilesExpired})
    share = rng.choice((0.01, 0.2, 0.5, 1.0))
    rooms.collect(Choice(share), lambda: tuple(process.world.traces), dry_run=rng.random() < 0.1)


def compact(process: Process, rooms: Rooms, rng: Random) -> None:
    """Collect garbage, and join small packs."""
    process.act.may = frozenset({PackCondemned, PackRemoved, TilesExpired})
    rooms.store.target_bytes = 48 * 1024
    try:
        rooms.collect(Choice(0.5, 24 * 1024), lambda: tuple(process.world.traces))
    finally:
        rooms.store.target_bytes = None


def fsck(process: Process, rooms: Rooms, rng: Random) -> None:
    """Check everything."""
    report = rooms.fsck()
    site = process.site
    if not report.ok and not site.rotted and not process.gate.injected:
        raise Violation("fsck names a fault where there is none", str(report.errors[:3]))
    if report.ok:
        site.rotted -= {path for path in site.rotted if path.startswith("packs/")}


def rebuild(process: Process, rooms: Rooms, rng: Random) -> None:
    """Make projection and addresses anew."""
    rooms.history.rebuild()
    rooms.store.forget_addresses()


def measure(process: Process, rooms: Rooms, rng: Random) -> None:
    """Figures of what is held."""
    stats.measure(rooms.history, rooms.projection, rooms.store, silent)


def protect(process: Process, rooms: Rooms, rng: Random) -> None:
    """Bring parity up to date."""
    rooms.care().protect(all=rng.random() < 0.5)


def scrub(process: Process, rooms: Rooms, rng: Random) -> None:
    """Read what is stored, for a while, and mend what is damaged."""
    for _, _ in zip(range(rng.randrange(1, 8)), rooms.care().scrub(copies=rng.random() < 0.3), strict=False):
        pass


def heal(process: Process, rooms: Rooms, rng: Random) -> None:
    """Mend all that can be mended."""
    rooms.care().heal()


def reopen(process: Process, rooms: Rooms, rng: Random) -> None:
    """Close the repository, or (as often) let the process be killed at once."""
    process.close()


# -- tiers


def push(process: Process, rooms: Rooms, rng: Random) -> None:
    """Copy to the cold tier."""
    assert rooms.mirror is not None
    whole_log = rng.random() < 0.6
    growing = rooms.history.finish_packs() if whole_log else ["?"]
    reach = rooms.projection.position()[0]
    try:
        rooms.mirror.push_all()
    except ConflictError:
        # Another process has taken it over; or this one did, and was not told.
        claimed(process, rooms)
        return
    if not growing:
        process.world.pushed = max(process.world.pushed, reach)


def demote(process: Process, rooms: Rooms, rng: Random) -> None:
    """Free what is here."""
    assert rooms.mirror is not None
    rooms.mirror.demote(rng.choice((0, 20_000, 100_000)))


def pin(process: Process, rooms: Rooms, rng: Random) -> None:
    """Have a frame here, keep it, or let it go again."""
    assert rooms.mirror is not None
    with reading(process, rooms, target_of(process.site.model, rng)) as (_, content, reader):
        if not content.frames:
            return
        name = rng.choice(list(content.frames))
        model = process.site.model
        cells = content.frames[name].cells
        blobs = [
            reader.present(TileKey(*name, 0, *at)).ref for at in cells if not model.gone(name[0], cells[at].origin)
        ]
        places = rooms.store.places(blobs)
        how = rng.random()
        if how < 0.4:
            rooms.mirror.pin(places, process.world.clock.latest_ns + rng.randrange(60_000) * 1_000_000)
        elif how < 0.6:
            rooms.mirror.unpin(places)
        else:
            rooms.mirror.prefetch(places)
        rooms.mirror.status()


def take_over(process: Process, rooms: Rooms, rng: Random) -> None:
    """Become the one who writes to the cold tier; whoever gets no answer asks again."""
    for left in reversed(range(_TAKE_OVER_TRIES)):
        try:
            claimed(process, rooms)
            return
        except UnavailableError:
            if not left:
                raise


def claimed(process: Process, rooms: Rooms) -> None:
    """Take the cold tier over; of one generation there is one owner. Raises Violation."""
    world = process.world
    nonce = process.rng(f"nonce {process.act.number} {world.clock.now_ns()}").token(8).hex()
    claim = cold.take_over(process.objects(), rooms.log.published, nonce)
    assert claim.generation is not None
    if claim.generation in world.claims:
        raise Violation("two own one generation of the cold tier", f"{claim.generation}: {world.claims}")
    world.claims[claim.generation] = nonce
    if claim.generation > (world.claim.generation or 0):
        world.claim = claim


def restore(process: Process, rooms: Rooms, rng: Random) -> None:
    """Make a repository from the cold tier, and compare it."""
    checks.restored(process, rng)


# -- another repository


def send(process: Process, rooms: Rooms, rng: Random) -> None:
    """Send what is sealed to the other repository."""
    process.act.may = frozenset({SnapshotOpened, Sealed, RefSet, AttributeSet, StreamDeclared})
    with checks.other(process, "b") as there:
        transfer(rooms.side(), there.side(), force=rng.random() < 0.8)
        checks.opened_elsewhere(process, there, "b", rng)


def fetch(process: Process, rooms: Rooms, rng: Random) -> None:
    """Fetch what the other repository has."""
    process.act.may = frozenset({SnapshotOpened, Sealed, RefSet, AttributeSet, StreamDeclared})
    with checks.other(process, "b") as there:
        transfer(there.side(), rooms.side(), force=rng.random() < 0.8)


# -- what is tried on copies


def prefix(process: Process, rooms: Rooms, rng: Random) -> None:
    """Open a beginning of the log."""
    with process.world.quietly(process):
        checks.prefix(process.world, process.site, rng)


def damage(process: Process, rooms: Rooms, rng: Random) -> None:
    """Damage a copy: right bytes or a located error."""
    with process.world.quietly(process):
        checks.damaged(process.world, process.site, rng)


def repair(process: Process, rooms: Rooms, rng: Random) -> None:
    """Damage a copy, and heal it."""
    with process.world.quietly(process):
        repaired(process.world, process.site, rng)


_NAMES: Final = (NotFoundError, ConflictError)
KINDS: Final[dict[str, Work]] = {
    "declare": Work(2, declare, True),
    "put": Work(120, put, True, _NAMES),
    "put_document": Work(30, put_document, True, _NAMES),
    "append": Work(20, append, True, _NAMES),
    "replace": Work(30, replace, True, _NAMES),
    "delete": Work(25, delete, True, _NAMES),
    "drop_frame": Work(10, drop_frame, True, _NAMES),
    "slow_put": Work(15, slow_put, True, _NAMES),
    "seal": Work(12, seal, True, (*_NAMES, ExpiredError)),
    "branch": Work(8, branch, True, _NAMES),
    "tag": Work(6, tag, True, _NAMES),
    "delete_ref": Work(12, delete_ref, True, _NAMES),
    "drop": Work(20, drop, True, _NAMES),
    "attribute": Work(8, attribute, True, _NAMES),
    "retain": Work(3, retain, True, _NAMES),
    "read_tile": Work(400, read_tile, False, _NAMES),
    "read_level": Work(100, read_level, False, _NAMES),
    "read_frame": Work(80, read_frame, False, _NAMES),
    "list_all": Work(60, list_all, False, _NAMES),
    "diff": Work(20, diff, False, _NAMES),
    "keep": Work(15, keep, False, _NAMES),
    "recall": Work(30, recall, False),
    "trace": Work(15, trace, False, _NAMES),
    "gc": Work(5, gc, True, (ConflictError,)),
    "compact": Work(2, compact, True, (ConflictError,)),
    "fsck": Work(1, fsck, False),
    "rebuild": Work(1, rebuild, False),
    "measure": Work(1, measure, False),
    "protect": Work(3, protect, True, (BusyError, ConflictError)),
    "scrub": Work(3, scrub, False, (BusyError,)),
    "heal": Work(1, heal, False, (BusyError, ConflictError)),
    "reopen": Work(5, reopen, False),
    "push": Work(12, push, True, (ConflictError,)),
    "demote": Work(8, demote, False),
    "pin": Work(10, pin, False, _NAMES),
    "take_over": Work(1, take_over, True, (ConflictError,)),
    "restore": Work(1, restore, False),
    "send": Work(1, send, True, (ConflictError,)),
    "fetch": Work(1, fetch, True, (ConflictError,)),
    "prefix": Work(2, prefix, False),
    "damage": Work(2, damage, False),
    "repair": Work(2, repair, False),
}


def workload(seed: int, count: int, processes: int, only: Sequence[str] = ()) -> list[Op]:
    """`count` calls (of some kinds only); the first declare the streams."""
    rng = Random(f"{seed}:workload")
    kinds = [kind for kind in KINDS if not only or kind in only]
    first = min(count, 2 * len(DECLARED))
    often = [1 if only else KINDS[kind].often for kind in kinds]
    chosen = ["declare"] * first + rng.choices(kinds, often, k=count - first)
    return [Op(number, kind, rng.randrange(processes)) for number, kind in enumerate(chosen)]


__all__ = ["KINDS", "Work", "weather", "workload"]
