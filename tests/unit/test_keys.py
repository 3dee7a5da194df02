"""Encrypted streams: what is shared, what opens, what is gone once it is shredded (docs/design/015-keys.md)."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fakes import FakeEncoder, FakeReader, FakeRng, MemDisk, picture
from numpy.typing import NDArray

import him
from him.adapters.keyfile import KeyFile, Passphrase
from him.adapters.local import LocalDisk
from him.app import Repository
from him.app.rings import create_ring, open_ring
from him.catalog import keys
from him.catalog.log import FileLog, parsed
from him.crypto import decrypt_note, keyed, unwrap
from him.errors import ConflictError, HimError, IntegrityError, KeyNeededError, NotFoundError, ShreddedError, UsageError
from him.pack import format as layout
from him.pack.encrypted import decrypted
from him.pack.file import walk
from him.ports import KeyRing
from him.pyramid import directory, page
from him.tile import codec
from him.tile.address import KIND_DIRECTORY, KIND_PAGE
from him.tile.chunks import CHUNKS, decode_list
from him.types import BlobId, DirectoryWrapped, KeyEntry, Secret, SnapshotId, StreamSpec

Tile = NDArray[np.uint8]
PASS = "correct horse"
SIDE = 64
HIDDEN = b"the password is hunter2, and nobody else may know"
ID = "00112233445566778899aabbccddeeff"


def opened(path: Path, ring: KeyRing | None = None) -> Repository:
    return him.open(path, create=True, reader=FakeReader(), encoder=FakeEncoder(), keys=ring)


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repository]:
    """A repository with a key ring and encrypted streams `vault` and `papers`; `open` is not."""
    path = tmp_path / "repo"
    opened(path).close()
    with opened(path, create_ring(path, PASS)) as made:
        made.declare_stream(StreamSpec("vault", tile_height=SIDE, tile_width=SIDE, level_rule="mean", encrypted=True))
        made.declare_stream(StreamSpec("papers", content="bytes", tile_height=1, tile_width=1, encrypted=True))
        made.declare_stream(StreamSpec("open", tile_height=SIDE, tile_width=SIDE))
        yield made


def noise(seed: int, side: int = SIDE) -> Tile:
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def ring_of(repo: Repository) -> KeyFile:
    return open_ring(repo.path, PASS)


def every_byte(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


# -- what is written and read


def test_what_is_encrypted_reads_as_it_was_and_stands_nowhere(repo: Repository, tmp_path: Path) -> None:
    values, long = noise(1, 5 * SIDE + 7), HIDDEN * 10_000
    work = repo.writable("main")
    work.put_array("vault", values, frame="secret frame")
    work.put("papers", HIDDEN, frame="short")
    work.put("papers", long, frame="long")
    work.append("logs", [{"n": 1}])
    assert (work.array("vault", frame="secret frame") == values).all()
    assert (work.get("papers", frame="short"), work.get("papers", frame="long")) == (HIDDEN, long)
    level = work.get("vault", frame="secret frame", level=2)
    work.seal()
    assert np.array_equal(repo.snapshot("main").get("vault", frame="secret frame", level=2), level)
    repo.close()
    written = every_byte(tmp_path)
    assert b"secret frame" not in written and HIDDEN[:20] not in written
    assert not any(values[row : row + 1].tobytes() in written for row in range(0, len(values), 50))
    with opened(repo.path, open_ring(repo.path, PASS)) as again:
        assert again.fsck().ok
        assert (again.snapshot("main").array("vault", frame="secret frame") == values).all()


def test_equal_content_is_stored_once_over_frames_and_branches(repo: Repository) -> None:
    repo.writable("main").put_array("vault", noise(1, 4 * SIDE), frame="a")
    before = repo.stored_bytes()
    repo.writable("main").put_array("vault", noise(1, 4 * SIDE), frame="b")
    repo.branch("other", source="main").put_array("vault", noise(1, 4 * SIDE), frame="c")
    assert repo.stored_bytes() - before < 4 * SIDE * SIDE, "pages alone"


def test_without_keys_plain_streams_work_and_encrypted_ones_say_what_to_do(repo: Repository) -> None:
    work = repo.writable("main")
    work.put("vault", noise(1), frame="a")
    work.seal()
    work = repo.writable("plain")
    work.put("open", noise(2), frame="b")
    repo.close()
    with opened(repo.path) as blind:
        assert np.array_equal(blind.snapshot("plain").get("open", frame="b"), noise(2))
        blind.writable("plain").put("open", noise(3), frame="c")
        report = blind.fsck()
        assert report.ok and [note.object for note in report.notes] == [blind.refs()["main"][1]]
        for refused in (
            lambda: blind.snapshot("main").get("vault", frame="a"),
            lambda: blind.writable("plain").put("vault", noise(4), frame="d"),
            lambda: blind.branch("child", source="main"),
            lambda: blind.shred("main"),
            lambda: blind.gc(),
        ):
            with pytest.raises(KeyNeededError) as raised:
                refused()
            assert "HIM_PASSPHRASE" in raised.value.fix or "him keys create" in raised.value.fix
    with opened(repo.path, open_ring(repo.path, PASS)) as again:
        assert np.array_equal(again.snapshot("main").get("vault", frame="a"), noise(1))
        assert np.array_equal(again.snapshot("plain").get("open", frame="c"), noise(3))


def test_a_stream_is_encrypted_from_then_on_and_frames_never_half(repo: Repository) -> None:
    work = repo.writable("main")
    work.put_array("screen", picture(200, 300, {(20, 20): "Submit"}), frame="old")
    work.put("logs", b"{}\n", frame="l")
    assert repo.encrypt("screen") == ["screen", "scene", "emb"]
    with pytest.raises(ConflictError, match="encrypted"):
        work.put("screen", picture(200, 300, {}), frame="old")
    work.put_image(picture(300, 400, {(20, 20): "Cancel"}), "new")
    assert {(one.stream, one.name): one.encrypted for one in work.frames()} == {
        ("logs", "l"): False, ("screen", "old"): False, ("screen", "new"): True, ("scene", "new"): True,
        ("emb", "new"): True,
    }  # fmt: skip
    work.put_image(picture(200, 300, {(20, 20): "Submit"}), "old")
    assert {one.encrypted for one in work.frames("screen")} == {True}
    answer = repo.query("find button 'Submit'", "main")
    assert answer.status == "accepted" and repo.replay(answer.trace_id).identical
    assert repo.writable("main").put_image(picture(200, 300, {(20, 20): "Submit"}), "old").bytes_stored == 0
    assert b"Submit" not in every_byte(repo.path / "spool") + every_byte(repo.path / "packs")


def test_damaged_and_misplaced_ciphertext_is_told(repo: Repository) -> None:
    work = repo.writable("main")
    work.put("vault", noise(1), frame="a")
    work.seal()
    repo.close()
    (pack,) = (repo.path / "packs").glob("*.pack")
    data = bytearray(pack.read_bytes())
    data[128 + 256 + 999] ^= 4
    pack.write_bytes(data)
    with opened(repo.path, open_ring(repo.path, PASS)) as again, pytest.raises(IntegrityError) as raised:
        again.snapshot("main").get("vault", frame="a")
    assert raised.value.place.startswith("packs/")
    with opened(repo.path) as blind:
        assert [fault.kind for fault in blind.fsck().errors] == ["record"], "seen without keys"


def test_collections_keep_what_encrypted_snapshots_reach(repo: Repository) -> None:
    work = repo.writable("main")
    for number in range(40):
        work.put("vault", noise(number), frame="a", x=number % 4)
    work.put("papers", HIDDEN * 10_000, frame="long")
    work.seal()
    repo.gc(dead_share=0.01)
    repo.gc(dead_share=0.01)
    assert repo.fsck().ok
    found = repo.snapshot("main").get_many("vault", [(0, x) for x in range(4)], frame="a")
    assert all(np.array_equal(values, noise(36 + x)) for x, values in enumerate(found))
    assert repo.snapshot("main").get("papers", frame="long") == HIDDEN * 10_000
    assert repo.stats().streams


# -- shredding


class Attacker:
    """Who has every file there ever was, and all keys that are left; opens what can be opened."""

    def __init__(self, copies: Sequence[Path], ring: KeyFile) -> None:
        self._ring = ring
        self._records: dict[bytes, tuple[layout.RecordHeader, bytes]] = {}
        self.opened: list[bytes] = []
        found: list[Secret] = []
        for copy in copies:
            disk = LocalDisk(copy)
            found += self._wrapped(disk)
            for file in sorted((copy / "packs").glob("*.pack")):
                for _, record in walk(disk.open(f"packs/{file.name}"), f"packs/{file.name}", 128, file.stat().st_size):
                    self._records[record.header.blob_id] = record.header, bytes(record.stored)
            self._read_traces(copy)
            self._read_memo(copy)
        self._follow(found)

    def knows(self, what: bytes) -> bool:
        return any(what in one for one in self.opened)

    def _wrapped(self, disk: LocalDisk) -> Iterator[Secret]:
        log = FileLog(disk, read_only=True)
        for seq, _, body in log.read(0):
            for one in parsed(seq, body).operations:
                if isinstance(one, DirectoryWrapped):
                    yield from self._unwrapped(one.snapshot_id.encode() + one.wrap.directory, one.wrap.wrapped)
        log.close()

    def _unwrapped(self, bound: bytes, wrapped: bytes) -> Iterator[Secret]:
        for key in [*(one.key for one in self._ring.entries()), self._ring.hash_key.key]:
            with suppress(IntegrityError):
                yield Secret(unwrap(key, bound, wrapped))

    def _follow(self, secrets: list[Secret]) -> None:
        seen: set[bytes] = set()
        while secrets:
            secret = secrets.pop()
            held = self._records.get(secret.blob_id)
            if held is None or secret in seen:
                continue
            seen.add(secret)
            head, stored = held
            meta, body = decrypted(
                secret, head.kind, head.codec, head.raw_size, head.origin, head.key_id, head.nonce, stored
            )
            if head.kind == KIND_DIRECTORY:
                node = directory._parse(bytes(body))
                if isinstance(node, tuple):
                    secrets += [Secret(frame.root) for frame in node if frame.root]
                else:
                    secrets += [Secret(child) for child, _ in node.values()]
            elif head.kind == KIND_PAGE:
                secrets += [Secret(raw[:32]) for _, raw in page.decode(bytes(body)).slots()]
            elif head.codec == CHUNKS:
                size = int(np.prod(codec.parse_header(meta).shape))
                secrets += [Secret(chunk.ref) for chunk in decode_list(body, size, encrypted=True)]
            else:
                self.opened.append(bytes(codec.unpack(meta, head.codec, body)))

    def _read_traces(self, copy: Path) -> None:
        for file in (copy / "spool").glob("*.json"):
            found = msgspec.json.decode(file.read_bytes())
            for entry in self._ring.entries():
                with suppress(IntegrityError, KeyError):
                    self.opened.append(unwrap(entry.key, file.stem.encode(), msgspec.json.decode(
                        msgspec.json.encode(found["body"]), type=bytes)))  # fmt: skip

    def _read_memo(self, copy: Path) -> None:
        self.opened.append(every_byte(copy / "cache"))


def story(repo: Repository, keep: Callable[[], None]) -> SnapshotId:
    """What is hidden was in `first` alone, or is in its past: of a child, of a dropped copy, of a trace."""
    work = repo.writable("main")
    work.put("papers", HIDDEN, frame="hidden")
    work.put("papers", b"shared by all", frame="shared")
    work.put_image(picture(200, 300, {(20, 20): "Submit"}), "login")
    first = work.seal().snapshot_id
    keep()
    assert repo.query("find button 'Submit'", "main").status == "accepted"
    copy = repo.branch("copy", source="main")
    copy.put("papers", b"more", frame="more")
    copy.seal()
    repo.delete_ref("copy")
    repo.delete_snapshot(copy.id)
    child = repo.writable("main")
    child.put("papers", b"other", frame="other")
    keep()
    child.put_many("papers", {(0, 0): None}, frame="hidden")
    for stream in ("screen", "scene", "emb"):
        child.put_many(stream, {(0, 0): None}, frame="login")
    child.put("papers", b"newest", frame="newest")
    keep()
    return first


STEPS = {
    "its own key": lambda entry: entry.purpose == keys.SEALED and not entry.of,
    "the base of its child": lambda entry: entry.purpose == keys.BASE,
    "its traces": lambda entry: entry.purpose == keys.TRACE,
    "the past of an open child": lambda entry: entry.purpose == keys.OPEN,
}


def shredded(repo: Repository, tmp_path: Path) -> tuple[Attacker, Attacker]:
    """What an attacker opens before and after."""
    copies: list[Path] = []

    def keep() -> None:
        copies.append(tmp_path / f"copy{len(copies)}")
        shutil.copytree(repo.path, copies[-1], ignore=shutil.ignore_patterns("*-wal", "*-shm"))

    repo.encrypt("screen")
    first = story(repo, keep)
    before = Attacker([*copies, repo.path], ring_of(repo))
    repo.shred(first)
    keep()
    return before, Attacker(copies, ring_of(repo))


def test_what_only_a_shredded_snapshot_reached_is_gone_and_the_rest_is_there(repo: Repository, tmp_path: Path) -> None:
    before, after = shredded(repo, tmp_path)
    assert all(before.knows(what) for what in (HIDDEN, b"shared by all", b"newest", b"Submit"))
    assert after.knows(b"shared by all") and after.knows(b"newest") and after.knows(b"other")
    assert not after.knows(HIDDEN) and not after.knows(b"Submit")
    main = repo.snapshot("main")
    assert main.get("papers", frame="shared") == b"shared by all"
    report = repo.fsck()
    assert report.ok and report.shredded == 1
    repo.gc(dead_share=0.01)
    repo.gc(dead_share=0.01)
    assert repo.fsck().ok and main.get("papers", frame="newest") == b"newest"
    main.put("papers", b"goes on", frame="shared")


@pytest.mark.parametrize("step", STEPS)
def test_each_step_of_shredding_is_needed(
    repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    spared, real = STEPS[step], keys._is_needless

    def sparing(entry: KeyEntry, *rest: object) -> bool:
        return real(entry, *rest) and not spared(entry)  # pyright: ignore

    monkeypatch.setattr(keys, "_is_needless", sparing)
    _, after = shredded(repo, tmp_path)
    assert after.knows(HIDDEN) or after.knows(b"Submit")


def test_open_snapshots_get_new_keys_when_another_is_shredded(
    repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys.DirectoryKeys, "renewed", lambda self, found: [])
    _, after = shredded(repo, tmp_path)
    assert after.knows(HIDDEN)


def test_dropped_snapshots_lose_their_keys_when_another_is_shredded(
    repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = keys.DirectoryKeys.tidy
    monkeypatch.setattr(keys.DirectoryKeys, "tidy", lambda self, live, *, dropped: real(self, live, dropped=False))
    _, after = shredded(repo, tmp_path)
    assert after.knows(HIDDEN)


def test_a_shredded_snapshot_is_told_from_one_that_never_was(repo: Repository) -> None:
    work = repo.writable("main")
    work.put("papers", HIDDEN)
    first = work.seal().snapshot_id
    with pytest.raises(ConflictError, match="named by main"):
        repo.shred("main")
    repo.hold(first, "court")
    repo.delete_ref("main")
    with pytest.raises(ConflictError, match="legal hold"):
        repo.shred(first)
    repo.release_hold(first)
    repo.shred(first)
    with pytest.raises(ShreddedError):
        repo.snapshot(first)
    with pytest.raises(NotFoundError):
        repo.snapshot("snp_01ARZ3NDEKTSV4RRFFQ69G5FAV")


def test_a_crash_before_the_keys_are_destroyed_is_finished_by_the_next_collection(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = repo.writable("main")
    work.put("papers", HIDDEN)
    first = work.seal().snapshot_id
    repo.delete_ref("main")
    with monkeypatch.context() as patch:
        patch.setattr(keys.DirectoryKeys, "tidy", lambda self, live, *, dropped: None)
        repo.shred(first)
    assert [one.snapshot_id for one in ring_of(repo).entries()] == [first]
    repo.gc()
    assert not ring_of(repo).entries()


def test_sealing_ends_the_key_of_the_open_time(repo: Repository) -> None:
    work = repo.writable("main")
    work.put("papers", HIDDEN)
    (was,) = ring_of(repo).entries()
    work.seal()
    (now,) = ring_of(repo).entries()
    assert (was.purpose, now.purpose) == (keys.OPEN, keys.SEALED) and was.key != now.key


# -- secrets in the program


def test_a_secret_shows_its_blob_id_and_is_not_written() -> None:
    secret = Secret(bytes(range(32)))
    shown = f"{secret} {secret!r} {secret.hex()} {[secret]}"
    assert bytes(secret).hex() not in shown and secret.blob_id.hex() in shown
    for encode in (msgspec.json.encode, msgspec.msgpack.encode):
        with pytest.raises(TypeError):
            encode(secret)
    assert secret.blob_id != BlobId(bytes(secret))


def test_remembered_results_need_what_they_are_about() -> None:
    from fakes import DictMemo

    from him.adapters.notes import EncryptedMemo

    held, key = DictMemo(), bytes(range(32))
    memo = EncryptedMemo(held, key)
    memo.put("text", [(b"pixels", HIDDEN)])
    assert memo.get("text", b"pixels") == HIDDEN
    assert memo.get("text", b"other") is None and memo.get("boxes", b"pixels") is None
    ((kind, place), value) = next(iter(held.items.items()))
    assert kind == "text" and b"pixels" not in place and HIDDEN[:9] not in value
    with pytest.raises(IntegrityError):
        decrypt_note(keyed(key, b"text", b"guess"), value)


# -- the ring


@pytest.fixture
def disk() -> MemDisk:
    return MemDisk()


def ring_on(disk: MemDisk, passphrase: str = PASS) -> KeyFile:
    return KeyFile(disk, "ring", ID, Passphrase(passphrase, FakeRng(7)), FakeRng(8))


def made_on(disk: MemDisk) -> KeyFile:
    return KeyFile.create(disk, "ring", ID, Passphrase(PASS, FakeRng(1)), FakeRng(2))


def entry(number: int) -> KeyEntry:
    return KeyEntry(bytes([number]) * 16, bytes([number]) * 32, keys.OPEN, SnapshotId(f"snp_{number}"))


def test_a_ring_is_what_it_was_told_for_every_process(disk: MemDisk) -> None:
    one, other = made_on(disk), ring_on(disk)
    one.change([entry(1), entry(2)], ())
    assert other.get(entry(2).key_id) == entry(2).key
    other.change([entry(3)], [entry(1).key_id])
    assert [*one.entries()] == [entry(2), entry(3)]
    assert one.get(entry(1).key_id) is None
    assert one.hash_key == other.hash_key


def test_a_ring_opens_with_its_passphrase_for_its_repository_alone(disk: MemDisk) -> None:
    made_on(disk)
    with pytest.raises(KeyNeededError, match="passphrase"):
        ring_on(disk, "wrong")
    with pytest.raises(KeyNeededError, match="another repository"):
        KeyFile(disk, "ring", "0" * 32, Passphrase(PASS, FakeRng()), FakeRng())
    with pytest.raises(NotFoundError, match="no key ring"):
        KeyFile(disk, "elsewhere", ID, Passphrase(PASS, FakeRng()), FakeRng())
    with pytest.raises(ConflictError):
        made_on(disk)
    with pytest.raises(UsageError):
        Passphrase("", FakeRng())


def test_another_passphrase_takes_the_place_of_the_first(disk: MemDisk) -> None:
    ring = made_on(disk)
    ring.change([entry(1)], ())
    ring.rewrap(Passphrase("battery staple", FakeRng(5)))
    with pytest.raises(KeyNeededError):
        ring_on(disk)
    assert [*ring_on(disk, "battery staple").entries()] == [entry(1)]


def test_every_damaged_byte_of_a_ring_is_told(disk: MemDisk) -> None:
    made_on(disk).change([entry(1)], ())
    file = disk.open("ring")
    data = file.read_at(0, file.size())
    for at in range(0, len(data), 7):
        file.write_at(at, bytes([data[at] ^ 1]))
        with pytest.raises(IntegrityError):
            ring_on(disk)
        file.write_at(at, data[at : at + 1])
    assert [*ring_on(disk).entries()] == [entry(1)]


def test_destroyed_keys_are_overwritten_where_the_file_was(disk: MemDisk) -> None:
    ring = made_on(disk)
    ring.change([entry(1)], ())
    before = disk.open("ring")
    ring.change((), [entry(1).key_id])
    assert before.read_at(0, before.size()).strip(b"\0") == b""


def test_a_ring_is_not_kept_in_the_repository(tmp_path: Path) -> None:
    opened(tmp_path / "repo").close()
    with pytest.raises(UsageError, match="copies"):
        create_ring(tmp_path / "repo", PASS, tmp_path / "repo" / "ring")


def test_the_environment_names_ring_and_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ring = tmp_path / "repo", tmp_path / "my.ring"
    opened(path).close()
    create_ring(path, PASS, ring)
    monkeypatch.setenv("HIM_KEYS", str(ring))
    (tmp_path / "word").write_text(f"{PASS}\n")
    monkeypatch.setenv("HIM_PASSPHRASE_FILE", str(tmp_path / "word"))
    with opened(path) as repo:
        repo.encrypt("logs")
        repo.writable("main").append("logs", [{"say": HIDDEN.decode()}])
    assert HIDDEN not in every_byte(path)
    monkeypatch.setenv("HIM_PASSPHRASE_FILE", str(tmp_path / "none"))
    with pytest.raises(HimError):
        opened(path)
