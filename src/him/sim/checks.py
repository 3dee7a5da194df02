"""Checkers that stand beside the workload: whole repositories compared with the model, on copies and elsewhere."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Final

from him.catalog.restore import restore
from him.errors import ExpiredError, HimError, IntegrityError, NotFoundError, StorageError
from him.pack.galois import product
from him.ports import silent
from him.sim.clock import SimClock, SimRng
from him.sim.disk import BLOCK_BYTES, MemDisk, Volume
from him.sim.ledger import END, LOG
from him.sim.model import Model, Value, Violation
from him.sim.objects import Bucket, SimObjects
from him.sim.rooms import REPOSITORY_ID, Rooms, SimMemo, furnish
from him.sim.schedule import Schedule
from him.tier.care import Journal
from him.tier.cold import Claim
from him.tier.protect import Parity
from him.tier.receipts import receipts
from him.tier.warm import WarmStore
from him.types import TileKey

if TYPE_CHECKING:
    from him.catalog.reader import SnapshotReader
    from him.sim.world import Process, Site, World

Tolerated = Callable[[HimError], bool]
"""Whether an error in place of what was asked for has a reason."""
_SNAPSHOTS: Final = 3
_FRAMES: Final = 4


class Still:
    """What SimObjects ask of a gate, where nothing fails."""

    def ask(self, name: str, *, writes: Callable[[], None] | None = None) -> None:
        """Carry a request out."""
        if writes is not None:
            writes()

    def stale(self) -> bool:
        """Never."""
        return False


def absent(reader: "SnapshotReader", key: TileKey) -> None:
    """Nothing is readable that the model does not have. Raises Violation."""
    try:
        reader.tile(key)
    except NotFoundError:
        return
    raise Violation("a tile nobody put", str(key))


def compare(rooms: Rooms, model: Model, rng: Random, tolerated: Tolerated, *, where: str) -> None:
    """Names and snapshots are the model's, and of some of them all tiles. Raises Violation."""
    refs = dict(rooms.history.refs())
    if refs != model.refs:
        raise Violation("names differ", f"{where}: {refs} instead of {model.refs}")
    found = {str(one.snapshot_id): (one.directory, one.sealed, dict(one.tags)) for one in rooms.history.snapshots()}
    wanted = {str(name): (snap.directory, snap.sealed, snap.tags) for name, snap in model.snapshots.items()}
    if found != wanted:
        differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        raise Violation("snapshots differ", f"{where}: {differing}")
    if {spec.name for spec in rooms.projection.streams().values()} != set(model.streams):
        raise Violation("streams differ", where)
    names = sorted(model.snapshots)
    for name in rng.sample(names, min(_SNAPSHOTS, len(names))):
        read_all(rooms, model, model.snapshots[name].directory, rng, tolerated, where=where)


def read_all(rooms: Rooms, model: Model, directory: bytes, rng: Random, tolerated: Tolerated, *, where: str) -> None:
    """All tiles of some frames of a directory. Raises Violation."""
    content = model.content(directory)
    reader = rooms.reader(directory)
    try:
        listed = [(one.stream, one.name) for one in reader.frames()]
        if listed != sorted(content.frames):
            raise Violation("frames differ", f"{where}: {listed}")
    except HimError as error:
        _judge(error, tolerated, where)
    names = sorted(content.frames)
    for name in rng.sample(names, min(_FRAMES, len(names))):
        for place, cell in content.frames[name].cells.items():
            key = TileKey(*name, 0, *place)
            try:
                got = reader.tile(key)
            except ExpiredError as error:
                if not model.gone(name[0], cell.origin):
                    raise Violation("expired before its time", f"{where}: {error.line()}") from None
            except HimError as error:
                _judge(error, tolerated, f"{where}: {key}")
            else:
                if Value.of(got) != cell.value:
                    raise Violation("wrong bytes", f"{where}: {key}")


def _judge(error: HimError, tolerated: Tolerated, where: str) -> None:
    if not tolerated(error):
        raise Violation("an error nothing explains", f"{where}: {error.kind}: {error.line()}") from None


def never(_: HimError) -> bool:
    """No error has a reason."""
    return False


def located(error: HimError) -> bool:
    """Damage that says where it is."""
    return isinstance(error, IntegrityError) and bool(error.place or error.object)


def explained(error: HimError) -> bool:
    """Damage that says where it is, or what a disk or store refused for it."""
    return located(error) or isinstance(error, StorageError)


# -- rot


def elsewhere(volume: Volume, bucket: Bucket) -> set[str]:
    """Packs and parity files that are in the cold tier whole, or that a whole group of parity makes again."""
    disk, objects = MemDisk(volume=volume), bucket.objects
    found = {
        receipt.pack
        for receipt in receipts(disk)
        if receipt.pack in volume.files
        and receipt.size == len(volume.files[receipt.pack].now) == len(objects.get(receipt.pack, b""))
    }
    for held in Parity(disk, product, REPOSITORY_ID, tuple, Journal(disk, SimClock())).groups():
        names = {*(member.name for member in held.group.members), *held.names}
        if len(held.whole) == len(held.names) and names <= volume.files.keys():
            found |= names
    return found


def spoil(data: bytearray, rng: Random) -> bool:
    """Flip a bit, zero a sector, or swap or misplace a block; whether that changed anything."""
    if not data:
        return False
    before, at, how = bytes(data), rng.randrange(len(data)), rng.random()
    blocks = len(data) // BLOCK_BYTES
    if how < 0.5 or (how >= 0.7 and blocks < 2):
        data[at] ^= 1 << rng.randrange(8)
    elif how < 0.7:
        start = at // 512 * 512
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    else:
        one, other = (BLOCK_BYTES * block for block in rng.sample(range(blocks), 2))
        first, second = data[one : one + BLOCK_BYTES], data[other : other + BLOCK_BYTES]
        data[other : other + BLOCK_BYTES] = first
        if how < 0.85:
            data[one : one + BLOCK_BYTES] = second
    return bytes(data) != before


# -- copies


class Aside:
    """A copy of a repository and its bucket as they stand, cut to what is published; nobody else sees it."""

    def __init__(self, world: "World", site: "Site") -> None:
        site.ledger.look(site.volume)
        self.model = site.ledger.model
        self.volume = site.volume.copy()
        ends = site.ledger.ends
        del self.volume.files[LOG].now[ends[-1] if ends else 0 :]
        self.bucket = Bucket()
        self.bucket.objects = dict(world.bucket.objects)
        self.claim = world.claim

    def opened(self, name: str) -> Rooms:
        """The copy, opened. Raises what opening does."""
        disk = MemDisk(volume=self.volume)
        cold = SimObjects(self.bucket, Still())
        return Rooms(disk, cold, SimClock(), SimRng(name), name, SimMemo(), self.claim)


def prefix(world: "World", site: "Site", rng: Random) -> None:
    """A beginning of the log, cut at a record's end or within one, opens and is what it then was. Raises Violation."""
    aside = Aside(world, site)
    ledger = site.ledger
    if not ledger.ends:
        return
    count = max(0, len(ledger.ends) - int(rng.expovariate(1 / 15)))
    cut = ledger.ends[count - 1] if count else 0
    if count < len(ledger.ends) and rng.random() < 0.6:
        cut = rng.randrange(cut, ledger.ends[count])
    del aside.volume.files[LOG].now[cut:]
    # The published end is not synced: it may be old, or of nothing.
    aside.volume.files[END].now.clear()
    for path in [path for path in aside.volume.files if path.startswith("cache/")]:
        del aside.volume.files[path]
    rooms = aside.opened("prefix")
    model = ledger.at(count)
    whole = not any(at > count for at in ledger.model.removed_at)
    rotted = bool(site.rotted)
    try:
        if whole:
            compare(rooms, model, rng, located if rotted else never, where=f"the log up to record {count}")
        elif dict(rooms.history.refs()) != model.refs:
            raise Violation("names differ", f"the log up to record {count}")
    finally:
        rooms.close()


def damaged(world: "World", site: "Site", rng: Random) -> None:
    """One file of a copy, or of its bucket, damaged: what is read is right, or a located error. Raises Violation."""
    aside = Aside(world, site)
    in_bucket = rng.random() < 0.2
    names = sorted(aside.bucket.objects if in_bucket else aside.volume.files)
    if not names:
        return
    path = rng.choice(names)
    data = bytearray(aside.bucket.objects[path]) if in_bucket else aside.volume.files[path].now
    how = rng.random()
    if how < 0.1:
        del data[rng.randrange(len(data) + 1) :]
    elif not spoil(data, rng):
        return
    if in_bucket:
        aside.bucket.objects[path] = bytes(data)
    world.counts["rot on a copy"] += 1
    where = f"{path} damaged"
    try:
        rooms = aside.opened("damage")
    except HimError as error:
        _judge(error, located, where)
        return
    try:
        compare(rooms, aside.model, rng, explained, where=where)
        if rng.random() < 0.3:
            rooms.fsck()
    except HimError as error:
        _judge(error, located, where)
    finally:
        rooms.close()


# -- elsewhere


@contextmanager
def other(process: "Process", name: str) -> Generator[Rooms]:
    """Another repository, opened by this process."""
    site = process.world.sites[name]
    writer = f"p{process.number}.{process.life}.{process.act.number}"
    rooms = Rooms(process.disk(name), None, process.clock(), process.rng(writer), writer, site.memo)
    try:
        yield rooms
        rooms.close()
    finally:
        rooms.projection.close()
        # What was written there was written, whatever became of the call.
        if not process.gate.dead:
            site.ledger.look(site.volume)


def opened_elsewhere(process: "Process", rooms: Rooms, name: str, rng: Random) -> None:
    """What is in the other repository is what the model says; and its snapshots are the first one's."""
    site, ours = process.world.sites[name], process.site.model
    with process.world.quietly(process):
        site.ledger.look(site.volume, up_to=rooms.log.head()[0])
        for known, snap in site.model.snapshots.items():
            mine = ours.snapshots.get(known)
            if mine is not None and mine.sealed and snap.sealed and mine.directory != snap.directory:
                raise Violation("a snapshot became another one on its way", known)

        def expired(error: HimError) -> bool:
            return isinstance(error, IntegrityError) and bool(ours.expired)

        rooms.history.refresh()
        if rooms.projection.position()[0] == site.model.seq:
            compare(rooms, site.model, rng, expired, where=f"site {name}")


def restored(process: "Process", rng: Random) -> None:
    """A repository made from the cold tier alone has all that was pushed to it. Raises Violation."""
    world, site = process.world, process.site
    alone = rng.random() < 0.5
    volume = Volume()
    floor, removed = world.pushed, len(site.model.removed_at)
    if alone:
        process.gate.quiet += 1
    try:
        disk = MemDisk(process.gate, volume)
        try:
            found = restore(disk, process.objects(), process.clock(), "restore", silent)
        except NotFoundError:
            if floor:
                raise Violation("nothing can be restored", f"up to record {floor} was pushed") from None
            return
        process.gate.quiet += 1
        try:
            site.ledger.look(site.volume)
            undisturbed = len(site.model.removed_at) == removed
            if found.commits < floor and undisturbed:
                raise Violation("a restore lacks what was pushed", f"{found} instead of {floor} records")
            if found.commits > site.model.seq:
                raise Violation("a restore has what was not published", f"{found}, {site.model.seq} records")
            furnish(volume, Claim(None, 0))
            rooms = Rooms(disk, process.objects(), SimClock(), SimRng("restore"), "restored", SimMemo(), Claim(None, 0))
            try:
                model = site.ledger.at(found.commits)
                compare(rooms, model, rng, never if undisturbed else located, where=f"restored to {found.commits}")
                if rng.random() < 0.3 and undisturbed and not (report := rooms.fsck()).ok:
                    raise Violation("fsck names a fault where there is none", f"restored: {report.errors[:3]}")
            finally:
                rooms.close()
        finally:
            process.gate.quiet -= 1
    finally:
        if alone:
            process.gate.quiet -= 1


@contextmanager
def slowed(store: WarmStore, schedule: Schedule) -> Generator[None]:
    """Let others work between the steps of a batch."""
    put = store.put_prepared

    def late(tiles: list[object]) -> int:
        for _ in range(3):
            schedule.yield_now()
        done = put(tiles)  # type: ignore[arg-type]
        for _ in range(3):
            schedule.yield_now()
        return done

    store.put_prepared = late  # type: ignore[method-assign]
    try:
        yield
    finally:
        del store.put_prepared
