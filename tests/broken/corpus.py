"""Broken repositories: how each is made of a sound one, and what must be said of it.

A sound one is the golden repository of format 2, opened once (so that there are caches), asked a query (so that there
is a trace) and, where a recipe wants it, put before a cold tier with a part of it freed here.
"""

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import msgspec
from blake3 import blake3
from fakes import FakeEncoder, FakeReader
from golden import build

import him
from bench import damage
from him.catalog import checkpoint, marker
from him.catalog.checkpoint import Mark
from him.pack import format as layout
from him.sealed import sealed
from him.types import PackState, RefSet

GOLDEN = Path(__file__).parents[1] / "golden"
BUDGET = 16 * 1024 * 1024
BLOCK = 4096


class Place:
    """A copy of a sound repository that may be broken."""

    def __init__(self, folder: Path, packs: dict[str, PackState]) -> None:
        self.folder = folder
        self.root, self.cold = folder / damage.REPOSITORY, folder / damage.COLD
        self.packs = packs
        self.log = self.root / "log/000001.log"

    def file(self, path: str) -> "Bytes":
        return Bytes(self.root / path)

    def finished(self, number: int = 0) -> "Bytes":
        """A finished pack that is not condemned; the largest comes first."""
        packs = [pack for pack in self.packs.values() if pack.finished and not pack.condemned]
        return self.file(sorted(packs, key=lambda pack: -pack.finished.size)[number].name)

    def growing(self) -> "Bytes":
        return self.file(next(name for name, pack in sorted(self.packs.items()) if pack.finished is None))

    def checkpoint(self) -> "Bytes":
        """The newest."""
        return Bytes(sorted((self.root / "log/checkpoints").iterdir())[-1])

    def trace(self) -> "Bytes":
        return Bytes(next((self.root / "spool").iterdir()))

    def segment(self) -> "Bytes":
        return Bytes(next((self.root / "cache/addresses").iterdir()))

    def uncached(self) -> None:
        shutil.rmtree(self.root / "cache")

    def spareless(self) -> None:
        """Without the spare copy of the log."""
        (self.root / "care/log").unlink()

    def other(self) -> Path:
        """Another repository."""
        other = self.folder / "other"
        with him.open(other, create=True, reader=FakeReader(), encoder=FakeEncoder()) as repo:
            for number in range(3):
                repo.writable("main").put("skills", b"another repository's %d" % number * 400, frame=f"{number}")
        return other


class Bytes:
    """A file whose bytes are changed in place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()

    def put(self, at: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def flip(self, at: int) -> None:
        self.put(at, bytes([self.data[at] ^ 4]))

    def cut(self, size: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(size)

    def zero(self, at: int, size: int = BLOCK) -> None:
        self.put(at, bytes(min(size, len(self.data) - at)))

    def swap(self, one: int, other: int, size: int = BLOCK) -> None:
        data = self.data
        self.put(one, data[other : other + size])
        self.put(other, data[one : one + size])

    def append(self, data: bytes) -> None:
        self.put(len(self.data), data)

    def records(self, kind: int) -> list[int]:
        """Where records of a kind begin."""
        found, at = list[int](), layout.FILE_HEADER_BYTES
        while (data := self.data[at:])[:4] == b"HREC":
            head = layout.decode_header(data, "")
            if head.kind == kind:
                found.append(at)
            at = layout.aligned(at + head.record_size)
        return found


class Finding(NamedTuple):
    """A fault (or a note) that must be named: its kind, and patterns of the rest."""

    kind: str
    object: str
    place: str
    fault: str
    fix: str


class Recipe(NamedTuple):
    """A way to break a repository, and what must hold then."""

    damage: Callable[[Place], object]
    errors: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    reads: str = "all"
    """"all", "some" or "few" (the rest are located errors), "none" (it does not open), "older" (an earlier state)."""
    remedy: Callable[[Place], object] | None = None
    """What the fix says; all can be read after it, and nothing is wrong. None: it is for a copy to mend."""
    tiered: bool = False
    raises: str = ""
    """The kind of error that bars every entry point, fsck too."""


def rebuild(place: Place) -> None:
    him.check(place.root, rebuild=True)


def delete(path: str) -> Callable[[Place], object]:
    return lambda place: place.file(path).path.unlink()


def nothing(_place: Place) -> None:
    pass


def reset_tier(place: Place) -> None:
    (place.root / "tier.json").unlink(missing_ok=True)
    with him.open(place.root) as repo:
        repo.set_tier(str(place.cold), BUDGET)


# -- how things are broken that one line does not say


def foreign_marker(place: Place) -> None:
    shutil.copy(place.other() / "him.json", place.root / "him.json")


def unsealed_marker(place: Place, change: Callable[[marker.Marker], marker.Marker]) -> None:
    """As format 2 wrote it at first, changed."""
    told = marker.parsed(place.file("him.json").data, "")
    place.file("him.json").path.write_bytes(msgspec.json.encode(change(told)) + b"\n")


def flipped_id(told: marker.Marker) -> marker.Marker:
    digit = "0" if told.repository_id[5] == "1" else "1"
    return msgspec.structs.replace(told, repository_id=told.repository_id[:5] + digit + told.repository_id[6:])


def marker_of_format(place: Place, number: int) -> None:
    told = marker.parsed(place.file("him.json").data, "")
    place.file("him.json").path.write_bytes(msgspec.structs.replace(told, format=number).encoded())


def older_log(place: Place) -> None:
    """A log, with its end, as it was a hundred records before."""
    with him.open(place.root) as repo:
        head = repo._log.head()[0]
        end = repo._log._end_of(head - 100)
    place.file("log/000001.log").cut(end)
    place.file("log/end").path.write_bytes(b"")
    place.uncached()


def foreign_log(place: Place) -> None:
    other = place.other()
    for name in ("000001.log", "end"):
        shutil.copy(other / "log" / name, place.root / "log" / name)
    shutil.rmtree(place.root / "log/checkpoints")
    place.uncached()


def foreign_pack(place: Place) -> None:
    other = next((place.other() / "packs").iterdir())
    shutil.copy(other, place.finished().path)


def last_record(place: Place) -> int:
    """Where the last record of the log begins."""
    data = place.log.read_bytes()
    return len(data) - int.from_bytes(data[-4:], "little")


def cut_at_the_damage(place: Place) -> None:
    """As the fix says."""
    fix = next(fault.fix for fault in him.check(place.root).errors if fault.kind == "log")
    found = re.search(r"cut log/000001.log to its first (\d+) bytes", fix)
    assert found is not None, fix
    place.file("log/000001.log").cut(int(found[1]))
    (place.root / "log/end").unlink()
    shutil.rmtree(place.root / "log/checkpoints")
    shutil.rmtree(place.root / "cache", ignore_errors=True)
    assert not (place.root / "care/log").exists()


def lost_log(place: Place) -> None:
    """A record in the middle is damaged, and nothing bridges it."""
    place.file("log/000001.log").flip(len(place.log.read_bytes()) // 2)
    shutil.rmtree(place.root / "log/checkpoints")
    place.uncached()


def future_checkpoint(place: Place) -> None:
    file = place.checkpoint()
    mark, body = checkpoint.decode_file(file.data, "")
    with mock.patch("him.catalog.checkpoint._PLAIN", 9):
        file.path.write_bytes(checkpoint.encode_file(Mark(*mark), body))


def other_checkpoint(place: Place) -> None:
    """The older one under the newer one's name."""
    older, newer = sorted((place.root / "log/checkpoints").iterdir())
    shutil.copy(older, newer)


def tile_of(place: Place) -> tuple[Bytes, int]:
    """A pack's largest tile that is stored in full."""
    pack = place.finished()
    return pack, max(pack.records(1), key=lambda at: layout.decode_header(pack.data[at:], "").stored_size)


def list_of(place: Place) -> tuple[Bytes, int]:
    """A pack's first index record."""
    pack = place.finished()
    return pack, pack.records(5)[0]


def fetched(place: Place) -> None:
    """Have everything here."""
    damage.content(place.root)


def between(place: Place) -> None:
    """A byte of what fills up to the next record is no zero."""
    pack, data = place.finished(), place.finished().data
    ends = (at + layout.decode_header(data[at:], "").record_size for at in pack.records(1))
    pack.put(next(end for end in ends if end % 64), b"x")


def future_record(place: Place, change: Callable[[bytearray], None]) -> None:
    """A tile's record as newer software may write it: its header verifies."""
    pack, at = tile_of(place)
    head = layout.decode_header(pack.data[at:], "")
    data = bytearray(pack.data[at : at + 256 + head.meta_size])
    change(data)
    data[224:256] = blake3(bytes(data[:224]) + bytes(data[256:])).digest()
    pack.put(at, bytes(data))


def future_pack(place: Place) -> None:
    pack = place.finished()
    head = bytearray(pack.data[:128])
    head[8] = 9
    head[96:128] = blake3(bytes(head[:96])).digest()[:32]
    pack.put(0, bytes(head))


def future_operation(place: Place) -> None:
    with him.open(place.root) as repo:
        body = msgspec.msgpack.encode([1, "newer", [["entangle", "what is not known"]]])
        repo._log.commit(lambda: body)


def longer_operation(place: Place) -> None:
    with him.open(place.root) as repo:
        body = msgspec.msgpack.encode([1, "newer", [["ref", "name", "tag", "", "one more"]]])
        repo._log.commit(lambda: body)


def ref_to_nothing(place: Place) -> None:
    with him.open(place.root) as repo:
        repo._history.append(lambda: [RefSet("lost", "branch", "snp_01HF7YAYW8DSB5WQX0GHAE0M70")])


def without_ref(place: Place) -> None:
    with him.open(place.root) as repo:
        repo.delete_ref("lost")


def other_projection(place: Place) -> None:
    with sqlite3.connect(place.root / "cache/projection.sqlite") as connection:
        connection.execute("DELETE FROM refs WHERE name = 'v1'")
    connection.close()


def future_trace(place: Place) -> None:
    told = json.loads(place.trace().data)
    place.trace().path.write_bytes(json.dumps({**told, "version": 9}).encode())


def interrupted_restore(place: Place) -> None:
    (place.root / "him.json").rename(place.root / "restoring.json")


def future_tier(place: Place) -> None:
    class Newer(msgspec.Struct):
        cold: str
        budget_bytes: int
        erasure: str

    place.file("tier.json").path.write_bytes(sealed(Newer(str(place.cold), BUDGET, "4+2")))


MARKER = Finding("marker", "him.json", "him.json", "damaged|parse|missing", "fsck --rebuild")
LIST = Finding("list", "packs/|list", r"packs/.* @ \d+", ".", "fsck --rebuild")
RECORD = Finding("record", "^[0-9a-f]{64}$|^repository$", r"packs/.* @ \d+", "digest|header", "him heal")
TILE = Finding("tile", "snp_", "packs|nowhere", ".", "him heal")
LOG = Finding("log", "record|log", r"log/000001.log", ".", "rebuild.*spare copy")
CHECKPOINT = Finding("checkpoint", "checkpoint 120", "log/checkpoints", ".", "delete the file")
CACHE = Finding("cache", ".", "cache/", ".", "rebuild.*delete the folder cache")
PACK = Finding("pack", "packs/", "packs/", "missing", "him heal.*copy")


RECIPES: dict[str, Recipe] = {
    # him.json
    "marker: bit flipped": Recipe(lambda p: p.file("him.json").flip(20), (MARKER,), reads="none", remedy=rebuild),
    "marker: cut": Recipe(lambda p: p.file("him.json").cut(50), (MARKER,), reads="none", remedy=rebuild),
    "marker: empty": Recipe(lambda p: p.file("him.json").cut(0), (MARKER,), reads="none", remedy=rebuild),
    "marker: removed": Recipe(delete("him.json"), (MARKER,), reads="none", remedy=rebuild),
    "marker: zeroed": Recipe(lambda p: p.file("him.json").zero(0), (MARKER,), reads="none", remedy=rebuild),
    "marker: garbage behind": Recipe(
        lambda p: p.file("him.json").append(b"xx"), (MARKER,), reads="none", remedy=rebuild
    ),
    "marker: halves swapped": Recipe(
        lambda p: p.file("him.json").swap(0, 40, 40), (MARKER,), reads="none", remedy=rebuild
    ),
    "marker: a block of the log": Recipe(
        lambda p: p.file("him.json").put(10, p.log.read_bytes()[:60]), (MARKER,), reads="none", remedy=rebuild
    ),
    "marker: another repository's": Recipe(
        foreign_marker, (MARKER._replace(fault="another repository's"),), reads="none", remedy=rebuild
    ),
    "marker: without a digest": Recipe(
        lambda p: unsealed_marker(p, lambda told: told),
        notes=(MARKER._replace(fault="no digest"),), remedy=rebuild,
    ),
    "marker: another digit in an id without a digest": Recipe(
        lambda p: unsealed_marker(p, flipped_id), (MARKER._replace(fault="another repository's"),), reads="none",
        remedy=rebuild,
    ),
    "marker: an older one": Recipe(
        lambda p: marker_of_format(p, 1), (MARKER._replace(fault="format 1.*records of format 2"),), remedy=rebuild
    ),
    "marker: of newer software": Recipe(lambda p: marker_of_format(p, 99), raises="version"),
    # the log
    "log: bit flipped before a checkpoint": Recipe(
        lambda p: p.file("log/000001.log").flip(5000),
        (LOG._replace(fault="damaged; what it said before record 81 is taken from the checkpoint"),), remedy=rebuild,
    ),
    "log: bit flipped in the last record, no caches": Recipe(
        lambda p: (p.file("log/000001.log").flip(last_record(p) + 60), p.uncached(), p.spareless()),
        (LOG._replace(fix="cut log/000001.log"),), reads="none", remedy=cut_at_the_damage,
    ),
    "log: cut": Recipe(
        lambda p: p.file("log/000001.log").cut(last_record(p) + 30), (LOG._replace(fault="cut short"),), remedy=rebuild
    ),
    "log: cut, no caches": Recipe(
        lambda p: (p.file("log/000001.log").cut(last_record(p) + 30), p.uncached(), p.spareless()),
        (LOG._replace(fault="cut short", fix="cut log/000001.log"),), reads="none", remedy=cut_at_the_damage,
    ),
    "log: removed": Recipe(delete("log/000001.log"), (LOG._replace(fault="missing"),), remedy=rebuild),
    "log: removed, and its copy": Recipe(
        lambda p: (p.file("log/000001.log").path.unlink(), p.spareless()),
        (LOG._replace(fault="missing", fix="put log/000001.log back"),),
        notes=(
            Finding("checkpoint", "checkpoint 120", "checkpoints", r"tells of \d+ snapshots, and of the names", ""),
            Finding("pack", "packs/", "packs/", r"\d+ records are sound", ""),
        ), reads="none",
    ),
    "log: removed, with a cold tier": Recipe(
        lambda p: (p.file("log/000001.log").path.unlink(), p.spareless()),
        (LOG._replace(fault="missing", fix="him restore"),), remedy=rebuild, tiered=True,
    ),
    "log: 4 KiB zeroed": Recipe(
        lambda p: p.file("log/000001.log").zero(8192), (LOG._replace(fault="taken from the checkpoint"),),
        remedy=rebuild,
    ),
    "log: blocks swapped": Recipe(
        lambda p: p.file("log/000001.log").swap(4096, 12288), (LOG._replace(fault="taken from the checkpoint"),),
        remedy=rebuild,
    ),
    "log: a block of a pack": Recipe(
        lambda p: p.file("log/000001.log").put(8192, p.finished().data[:BLOCK]), (LOG._replace(fault="checkpoint"),),
        remedy=rebuild,
    ),
    "log: nothing bridges the damage": Recipe(lost_log, (LOG,), remedy=rebuild),
    "log: nothing bridges the damage, and no copy": Recipe(
        lambda p: (lost_log(p), p.spareless()), (LOG._replace(fix="cut log/000001.log"),),
        notes=(Finding("log", "commit log", "log", r"first \d+ records are whole", ""),), reads="none",
    ),
    "log: an older copy": Recipe(
        older_log, (Finding("log", "commit log", "checkpoints", "older copy", "rebuild.*newest copy"),), reads="older",
        remedy=rebuild,
    ),
    "log: an older copy, nothing else tells": Recipe(
        lambda p: (older_log(p), p.spareless()),
        (Finding("log", "commit log", "checkpoints", "older copy", "newest copy"),), reads="older",
    ),
    "log: garbage behind": Recipe(lambda p: p.file("log/000001.log").append(b"HLOG" + bytes(500)), remedy=nothing),
    "log: another repository's": Recipe(
        foreign_log, (Finding("log", "commit log", "log/000001.log", "another one's", "own log"),), reads="older"
    ),
    "log: an operation of newer software": Recipe(future_operation, raises="version"),
    "log: an operation with a new member": Recipe(longer_operation, raises="version"),
    "log: a ref to no snapshot": Recipe(
        ref_to_nothing, (Finding("ref", "^lost$", "log", "names no snapshot", "him branch lost --delete"),),
        remedy=without_ref,
    ),
    "end: bit flipped": Recipe(
        lambda p: p.file("log/end").flip(3),
        notes=(Finding("log", "log/end", "log/end", "digest", "nothing to do"),), remedy=nothing,
    ),
    "end: cut": Recipe(
        lambda p: p.file("log/end").cut(70), notes=(Finding("log", "log/end", "log/end", "digest", "nothing"),),
        remedy=nothing,
    ),
    "end: removed": Recipe(
        delete("log/end"), notes=(Finding("log", "log/end", "log/end", "missing", "nothing"),), remedy=nothing
    ),
    "end: an older one": Recipe(
        lambda p: p.file("log/end").path.write_bytes((GOLDEN / "v1/repository/log/end").read_bytes()), remedy=nothing
    ),
    "spare copy: bit flipped": Recipe(
        lambda p: p.file("care/log").flip(5000),
        notes=(Finding("log", "spare copy", "care/log @", "damaged", "delete the file"),), remedy=delete("care/log"),
    ),
    "spare copy: cut": Recipe(lambda p: p.file("care/log").cut(5000), remedy=nothing),
    "turn: garbage": Recipe(lambda p: p.file("log/turn").path.write_bytes(b"garbage"), remedy=nothing),
    # checkpoints
    "checkpoint: bit flipped": Recipe(
        lambda p: p.checkpoint().flip(300), (CHECKPOINT,), remedy=lambda p: p.checkpoint().path.unlink()
    ),
    "checkpoint: cut": Recipe(
        lambda p: p.checkpoint().cut(300), (CHECKPOINT,), remedy=lambda p: p.checkpoint().path.unlink()
    ),
    "checkpoint: 4 KiB zeroed": Recipe(
        lambda p: p.checkpoint().zero(0), (CHECKPOINT,), remedy=lambda p: p.checkpoint().path.unlink()
    ),
    "checkpoint: of another record": Recipe(
        other_checkpoint, (CHECKPOINT,), remedy=lambda p: p.checkpoint().path.unlink()
    ),
    "checkpoint: of newer software": Recipe(
        future_checkpoint, notes=(Finding("version", "checkpoint 120", "checkpoints", "version 9", "nothing"),),
        remedy=nothing,
    ),
    # packs
    "pack: bit flipped in a tile": Recipe(
        lambda p: tile_of(p)[0].flip(tile_of(p)[1] + 400), (RECORD, TILE), reads="some"
    ),
    "pack: bit flipped in a record's header": Recipe(
        lambda p: tile_of(p)[0].flip(tile_of(p)[1] + 40), (RECORD,), reads="some"
    ),
    "pack: bit flipped in a list": Recipe(lambda p: list_of(p)[0].flip(list_of(p)[1] + 300), (LIST,), remedy=rebuild),
    "pack: bit flipped in the footer, no caches": Recipe(
        lambda p: (p.finished().flip(p.finished().records(6)[0] + 300), p.uncached()), (LIST,), remedy=rebuild
    ),
    "pack: cut in the trailer": Recipe(
        lambda p: p.finished().cut(len(p.finished().data) - 60), (LIST,), remedy=rebuild
    ),
    "pack: cut to a third": Recipe(
        lambda p: p.finished().cut(len(p.finished().data) // 3),
        (Finding("record|pack", ".", "packs/", ".", "heal"), TILE), reads="some",
    ),
    "pack: header zeroed": Recipe(lambda p: p.finished().zero(0, 128), (LIST,), remedy=rebuild),
    "pack: something between records": Recipe(between, (LIST,), remedy=rebuild),
    "pack: garbage behind": Recipe(lambda p: p.finished().append(b"x" * 5000), (LIST,), remedy=rebuild),
    "pack: 4 KiB zeroed": Recipe(lambda p: p.finished().zero(8192), (RECORD,), reads="some"),
    "pack: blocks swapped": Recipe(lambda p: p.finished().swap(8192, 20480), (RECORD,), reads="some"),
    "pack: a block of another pack": Recipe(
        lambda p: p.finished().put(8192, p.finished(1).data[8192 : 8192 + BLOCK]), (RECORD,), reads="some"
    ),
    "pack: removed": Recipe(lambda p: p.finished().path.unlink(), (PACK, TILE), reads="some"),
    "pack: removed, no caches": Recipe(
        lambda p: (p.finished().path.unlink(), p.uncached()), (PACK, TILE), reads="some"
    ),
    "pack: another repository's": Recipe(
        foreign_pack, (Finding("pack", "packs/", "packs/.* @ 0", "another repository's", "own pack"),), reads="some"
    ),
    "pack: an older copy of one that grows": Recipe(
        lambda p: p.growing().cut(p.packs[f"packs/{p.growing().path.name}"].ranges[0][1].end),
        (Finding("pack", "packs/", "packs/", "cut short", "heal"),), reads="some",
    ),
    "pack: the last list of one that grows is cut": Recipe(
        lambda p: p.growing().cut(p.packs[f"packs/{p.growing().path.name}"].ranges[-1][1].end - 100), (LIST,),
        remedy=rebuild,
    ),
    "pack: of newer software": Recipe(
        future_pack, (Finding("version", ".", "packs/", "newer", "newer `him`"),), remedy=None
    ),
    "pack: a record of a newer version": Recipe(
        lambda p: future_record(p, lambda data: data.__setitem__(4, 9)),
        (Finding("version", "[0-9a-f]{64}", "packs/", "newer", "newer `him`"),), reads="some",
    ),
    "pack: a record with a new flag": Recipe(
        lambda p: future_record(p, lambda data: data.__setitem__(129, 1)),
        (Finding("version", "[0-9a-f]{64}", "packs/", "flag", "newer `him`"),), reads="some",
    ),
    "pack: a record of a new codec": Recipe(
        lambda p: future_record(p, lambda data: data.__setitem__(7, 99)),
        (Finding("version", "[0-9a-f]{64}", "packs/", "codec 99", "newer `him`"),), reads="some",
    ),
    "pack: damaged before a cold tier": Recipe(
        lambda p: (fetched(p), tile_of(p)[0].flip(tile_of(p)[1] + 400)),
        notes=(Finding("pack", "packs/", "packs/", "mended from the cold tier", "nothing"),), remedy=nothing,
        tiered=True,
    ),
    "pack: removed before a cold tier": Recipe(lambda p: p.finished().path.unlink(), remedy=nothing, tiered=True),
    # caches
    "cache: a projection that says something else": Recipe(other_projection, (CACHE,), reads="older", remedy=rebuild),
    "cache: a projection that is none": Recipe(
        lambda p: p.file("cache/projection.sqlite").zero(0, 10_000), remedy=nothing
    ),
    "cache: readings that are none": Recipe(lambda p: p.file("cache/memo.sqlite").swap(0, 4096), remedy=nothing),
    "cache: another row in a segment": Recipe(lambda p: p.segment().flip(1000), (CACHE,), remedy=rebuild),
    "cache: a segment that is cut": Recipe(lambda p: p.segment().cut(900), notes=(CACHE,), remedy=nothing),
    "cache: removed": Recipe(Place.uncached, remedy=nothing),
    # the cold tier's files
    "tier.json: bit flipped": Recipe(
        lambda p: p.file("tier.json").flip(12), (Finding("tier", "tier.json", "tier.json", "damaged", "tier set"),),
        reads="none", remedy=reset_tier, tiered=True,
    ),
    "tier.json: removed": Recipe(
        delete("tier.json"), (Finding("tier", "tier.json", "tier.json", "missing", "tier set"),), reads="few",
        remedy=reset_tier, tiered=True,
    ),
    "tier.json: of newer software": Recipe(future_tier, raises="version", tiered=True),
    "receipts: bit flipped": Recipe(
        lambda p: p.file("cold/receipts").flip(30),
        (Finding("tier", "receipt", "cold/receipts @ 0", "digest", "rebuild"),), reads="some", remedy=rebuild,
        tiered=True,
    ),
    "receipts: a carriage return": Recipe(
        lambda p: p.file("cold/receipts").put(30, b"\r"),
        (Finding("tier", "receipt", "cold/receipts @ 0", "digest", "rebuild"),), reads="some", remedy=rebuild,
        tiered=True,
    ),
    "receipts: removed": Recipe(
        delete("cold/receipts"), (Finding("pack", ".", r"packs/.* @ \d+", ".", "rebuild.*cold tier"),), reads="few",
        notes=(Finding("tier", "receipts", "cold/receipts", "gone", "rebuild"),), remedy=rebuild, tiered=True,
    ),
    "account: bit flipped": Recipe(
        lambda p: p.file("cold/account").flip(2), notes=(Finding("tier", "cold/account", "cold", "digest", "nothing"),),
        remedy=nothing, tiered=True,
    ),
    "pins: bit flipped": Recipe(
        lambda p: p.file("cold/pins").flip(40), (Finding("tier", "cold/pins", "cold", "digest", "tier pin"),),
        tiered=True,
    ),
    "hotness: garbage": Recipe(lambda p: p.file("cold/hotness").zero(0, 100), remedy=nothing, tiered=True),
    # the rest
    "lease: of a dead process, damaged": Recipe(
        lambda p: ((p.root / "leases").mkdir(exist_ok=True), (p.root / "leases/7").write_bytes(b"x" * 40)),
        notes=(Finding("lease", "leases/7", "leases/7", "digest", "nothing"),), remedy=nothing,
    ),
    "trace: bit flipped": Recipe(
        lambda p: p.trace().flip(p.trace().data.index(b'"answer"') + 30),
        (Finding("trace", "tr_", "spool/tr_", "digest|parse", "delete"),), remedy=lambda p: p.trace().path.unlink(),
    ),
    "trace: cut": Recipe(
        lambda p: p.trace().cut(200), (Finding("trace", "tr_", "spool/tr_", "parse", "delete"),),
        remedy=lambda p: p.trace().path.unlink(),
    ),
    "trace: its version damaged": Recipe(
        lambda p: p.trace().put(p.trace().data.index(b'"version":1') + 10, b"3"),
        (Finding("trace", "tr_", "spool/tr_", "digest", "delete"),), remedy=lambda p: p.trace().path.unlink(),
    ),
    "restore: what it left": Recipe(
        lambda p: shutil.copy(p.root / "him.json", p.root / "restoring.json"),
        notes=(Finding("file", "restoring.json", "restoring.json", "left", "delete"),),
        remedy=delete("restoring.json"),
    ),
    "restore: interrupted": Recipe(interrupted_restore, raises="conflict"),
    "files: of nobody": Recipe(
        lambda p: [(p.root / name).write_bytes(b"?") for name in ("notes.txt", "packs/x.tmp", "log/old")],
        notes=tuple(Finding("file", name, name, "no file", "move") for name in ("notes.txt", "packs/x.tmp", "log/old")),
        remedy=nothing,
    ),
    "files: of two repositories": Recipe(
        lambda p: shutil.copytree(p.other() / "packs", p.root / "packs", dirs_exist_ok=True),
        notes=(Finding("pack", "packs/", "packs/", "another repository's pack", "move"),), remedy=nothing,
    ),
}  # fmt: skip


def sound(folder: Path, *, tiered: bool) -> damage.Content:
    """Make the repository that recipes break; what can be read of it."""
    root = folder / damage.REPOSITORY
    shutil.copytree(GOLDEN / "v2/repository", root)
    clock = build.GoldenClock()
    with mock.patch("him.tier.warm.ADDRESS_KEPT_ROWS", 5):
        him.check(root, rebuild=True)
        if tiered:
            with him.open(root) as repo:
                repo.set_tier(str(folder / damage.COLD), BUDGET)
        with him.open(root, clock=clock, reader=FakeReader(), encoder=FakeEncoder()) as repo:
            repo.query("find button 'Submit'", "pictures", budget_ms=60_000)
            if tiered:
                repo.tier.push()
                repo.tier.pin("deltas", "plane", frame="chain", minutes=10**6)
    return damage.content(root)


def freed(folder: Path) -> None:
    """What the cold tier holds is no longer here."""
    with him.open(folder / damage.REPOSITORY) as repo:
        assert repo.tier.demote() > 0
