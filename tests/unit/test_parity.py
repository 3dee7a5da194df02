"""Parity of packs: what is lost or damaged is made again, byte for byte, or named."""

from collections.abc import Iterator

import numpy as np
import pytest
from fakes import FakeRng, Faults, PowerLoss, Stack, new_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from him.adapters import isal
from him.catalog.garbage import Choice, Collector
from him.config import PARITY_CHUNK_BYTES
from him.errors import BusyError, IntegrityError, UsageError
from him.pack import galois
from him.pack import parity as code
from him.pack.parity import Group, Member
from him.ports import ErasureCode
from him.tier.protect import OFF, Made, Parity, Shape, chosen
from him.tier.scrub import Scrubber
from him.types import PackFinished, StreamSpec, TileKey

CHUNK = PARITY_CHUNK_BYTES
NOISE = StreamSpec("noise", tile_height=256, tile_width=256, dtype="uint8")


def arithmetics() -> list[ErasureCode]:
    found = isal.load()
    assert found is not None, "ISA-L is missing: pip install pyeclib"
    return [galois.product, found]


def test_the_field_is_one() -> None:
    for one in range(1, 256):
        assert galois.multiply(one, galois.inverse(one)) == 1
    a, b, c = 7, 131, 254
    assert galois.multiply(a, galois.multiply(b, c)) == galois.multiply(galois.multiply(a, b), c)
    assert galois.multiply(a, b ^ c) == galois.multiply(a, b) ^ galois.multiply(a, c)
    assert galois.multiply(2, 128) == 0x1D


@given(st.integers(1, 12), st.integers(1, 6), st.data())
@settings(max_examples=40, deadline=None)
def test_any_lost_chunks_up_to_the_parity_are_made_again(count: int, extra: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(count * 100 + extra)
    chunks = [rng.integers(0, 256, 257, dtype=np.uint8) for _ in range(count)]
    for arithmetic in arithmetics():
        whole = [*chunks, *code.parity_of(arithmetic, chunks, extra)]
        lost = data.draw(st.sets(st.integers(0, count + extra - 1), min_size=1, max_size=extra))
        have = [number for number in range(count + extra) if number not in lost][:count]
        made = code.made_again(arithmetic, count, extra, {number: whole[number] for number in have}, sorted(lost))
        assert all((made[at] == whole[number]).all() for at, number in enumerate(sorted(lost)))


def test_every_implementation_gives_the_same_bytes() -> None:
    chunks = [np.random.default_rng(at).integers(0, 256, 4099, dtype=np.uint8) for at in range(10)]
    first, second = ([part.tobytes() for part in code.parity_of(one, chunks, 4)] for one in arithmetics())
    assert first == second
    assert galois.cauchy(10, 4)[0].tolist() == [221, 152, 173, 157, 93, 150, 61, 170, 142, 244]


def group_of(names: str, extra: int, size: int = 10) -> Group:
    return Group(tuple(Member(name, size, name.encode()) for name in names), (b"",) * extra)


def packs_of(names: str, size: int = 10) -> dict[str, PackFinished]:
    return {name: PackFinished(name, size, name.encode()) for name in names}


def test_which_groups_stay_and_which_are_made() -> None:
    shape = Shape(4, 2)
    kept, new = chosen(packs_of("abcdef"), [], shape)
    assert (kept, [[pack.pack for pack in group] for group in new]) == ([], [list("abcd"), list("ef")])
    full, part = group_of("abcd", 2), group_of("ef", 1)
    assert chosen(packs_of("abcdef"), [full, part], shape) == ([full, part], [])
    # What is not full is made anew when there is something to add, and what has lost a pack always.
    kept, new = chosen(packs_of("abcdefg"), [full, part], shape)
    assert (kept, [[pack.pack for pack in group] for group in new]) == ([full], [list("efg")])
    kept, new = chosen(packs_of("abdef"), [full, part], shape)
    assert (kept, [[pack.pack for pack in group] for group in new]) == ([], [list("abde"), list("f")])
    assert chosen(packs_of("ab"), [full], OFF) == ([], [])
    assert chosen(packs_of("abcd"), [full], Shape(4, 1))[0] == []


def test_packs_of_like_size_go_together() -> None:
    packs = {name: PackFinished(name, size, b"") for name, size in zip("abcd", (1, 9, 2, 8), strict=True)}
    assert [[pack.pack for pack in group] for group in chosen(packs, [], Shape(2, 1))[1]] == [["b", "d"], ["c", "a"]]


def test_a_shape_that_cannot_be() -> None:
    for shape in (Shape(0, 1), Shape(1, 0), Shape(60, 5)):
        with pytest.raises(UsageError, match="no group has"):
            shape.checked()


class Protected:
    """A repository in memory with 14 packs, protected 10+4 (two groups), and what every pack holds."""

    def __init__(self, shape: Shape = Shape(10, 4), packs: int = 14) -> None:
        self.disk = new_disk()
        self.stack = Stack(self.disk, parity=shape)
        self.stack.history.declare_stream(NOISE)
        self.packs, self.opened = packs, 0
        for number in range(packs):
            # Of different sizes, one larger than a chunk.
            cells = {(0, at): noise(100 * number + at) for at in range(17 if number == 3 else 1 + number % 4)}
            self.stack.ingest.tiles("main", "noise", f"f{number}", cells)
            self.stack.history.finish_packs()
        self.update()
        self.base = self.disk.copy()
        self.bytes = {name: bytes(file.now) for name, file in self.disk.files.items() if name.startswith("packs/")}

    @property
    def parity(self) -> Parity:
        assert self.stack.store.parity is not None
        return self.stack.store.parity

    def update(self) -> Made:
        return self.parity.update(silent)

    def names(self, suffix: str = ".pack") -> list[str]:
        return sorted(name for name in self.bytes if name.endswith(suffix))

    def reopened(self) -> Stack:
        self.stack.close()
        self.opened += 1
        self.stack = Stack(self.disk, parity=Shape(10, 4), rng=FakeRng(self.opened))
        return self.stack

    def read_all(self) -> None:
        for number in range(self.packs):
            for at in range(17 if number == 3 else 1 + number % 4):
                found = self.stack.at("main").tile(TileKey("noise", f"f{number}", 0, 0, at))
                assert np.array_equal(found, noise(100 * number + at))

    def as_before(self) -> None:
        assert {name: bytes(self.disk.files[name].now) for name in self.bytes if name in self.disk.files} == self.bytes


def noise(seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (256, 256), dtype=np.uint8)


@pytest.fixture(scope="module")
def made() -> Protected:
    return Protected()


@pytest.fixture
def protected(made: Protected) -> Iterator[Protected]:
    """The same repository, as it was, for each test."""
    made.stack.close()
    made.disk = made.base.copy()
    made.reopened()
    yield made


def test_everything_is_protected_once(protected: Protected) -> None:
    status = protected.parity.status()
    assert (status.groups, status.protected_packs, status.waiting_packs, status.damaged_files) == (2, 14, 0, 0)
    # The group of four has its share of parity: 4 · 4/10, rounded up.
    assert len(protected.names(".parity")) == 4 + 2
    before = dict(protected.disk.files)
    protected.update()
    assert {name: file for name, file in before.items() if name.startswith("packs/")} == {
        name: file for name, file in protected.disk.files.items() if name.startswith("packs/")
    }


@pytest.mark.parametrize("seed", range(6))
def test_four_lost_packs_of_fourteen_files_are_healed_byte_for_byte(protected: Protected, seed: int) -> None:
    group = max((held for held in protected.parity.groups()), key=lambda held: len(held.group.members))
    files = [member.name for member in group.group.members] + list(group.names)
    assert len(files) == 14
    for at in np.random.default_rng(seed).permutation(14)[:4]:
        del protected.disk.files[files[at]]
    protected.reopened()
    protected.read_all()
    protected.update()
    for name in files:
        protected.stack.store.mend(name)
    protected.as_before()
    assert protected.stack.fsck().ok


def test_a_fifth_lost_file_is_an_error_that_says_so(protected: Protected) -> None:
    group = max((held for held in protected.parity.groups()), key=lambda held: len(held.group.members))
    for name in [member.name for member in group.group.members[:5]]:
        del protected.disk.files[name]
    protected.reopened()
    with pytest.raises(IntegrityError, match=r"only 9 of 14 chunks are sound, and parity needs 10"):
        protected.parity.mend(group.group.members[0].name)
    assert not protected.stack.fsck().ok


def test_damage_in_every_file_is_healed_where_its_row_has_enough(protected: Protected) -> None:
    """More files than the group has parity are hit, but no row of chunks more than that."""
    group = max((held for held in protected.parity.groups()), key=lambda held: len(held.group.members))
    long = next(member.name for member in group.group.members if member.size > CHUNK)
    for number, name in enumerate([member.name for member in group.group.members if member.name != long][:4]):
        protected.disk.files[name].now[1000 * (number + 1)] ^= 1
    protected.disk.files[long].now[CHUNK + 77] ^= 1
    protected.reopened()
    assert protected.stack.fsck().ok
    protected.as_before()
    assert len({event.pack for event in protected.stack.journal.healed()}) == 5


def test_without_parity_the_same_damage_is_found(protected: Protected) -> None:
    for name in protected.names():
        protected.disk.files[name].now[1000] ^= 1
    protected.stack.store.mender.parity = None
    assert len({fault.place.split(" ")[0] for fault in protected.stack.fsck().errors}) == 14


@pytest.mark.parametrize("kind", ["flip", "cut", "zeros", "swap", "longer", "gone"])
def test_reading_heals_and_writes_back(protected: Protected, kind: str) -> None:
    for name in protected.names()[:2]:
        data = protected.disk.files[name].now
        if kind == "flip":
            data[len(data) // 2] ^= 4
        elif kind == "cut":
            del data[len(data) // 2 :]
        elif kind == "zeros":
            data[4096:8192] = bytes(4096)
        elif kind == "swap":
            data[4096:8192], data[8192:12288] = data[8192:12288], data[4096:8192]
        elif kind == "longer":
            data += b"rot"
        else:
            del protected.disk.files[name]
    protected.reopened()
    protected.read_all()
    assert protected.stack.fsck().ok
    protected.as_before()
    if kind != "longer":
        assert protected.stack.journal.healed()


def test_a_damaged_parity_file_is_made_again(protected: Protected) -> None:
    first, second, *_ = protected.names(".parity")
    protected.disk.files[first].now[3] ^= 1
    del protected.disk.files[second]
    protected.reopened()
    assert protected.parity.status().damaged_files == 2
    protected.update()
    protected.as_before()
    protected.disk.files[first].now[code.chunk_at(0) + 7] ^= 1
    found = protected.parity.check_file(first)
    assert found is not None
    assert found.place == f"{first} @ {code.chunk_at(0)}"
    assert protected.parity.mend_file(first)
    protected.as_before()


def test_damage_is_mended_before_a_pack_is_protected_anew(protected: Protected) -> None:
    """A group that is not full is replaced by a larger one; what is damaged in it must not be left behind."""
    small = min((held for held in protected.parity.groups()), key=lambda held: len(held.group.members))
    hurt = small.group.members[0].name
    protected.disk.files[hurt].now[5000] ^= 1
    protected.stack.ingest.tiles("main", "noise", "more", {(0, 0): noise(9999)})
    protected.stack.history.finish_packs()
    made = protected.update()
    assert (made.made_groups, made.removed_groups, made.unsound) == (1, 1, ())
    assert bytes(protected.disk.files[hurt].now) == protected.bytes[hurt]


def test_a_group_stays_while_one_of_its_packs_is_beyond_it(protected: Protected) -> None:
    small = min((held for held in protected.parity.groups()), key=lambda held: len(held.group.members))
    for member in small.group.members[:3]:
        protected.disk.files[member.name].now[5000] ^= 1
    protected.stack.ingest.tiles("main", "noise", "more", {(0, 0): noise(9999)})
    protected.stack.history.finish_packs()
    made = protected.update()
    assert len(made.unsound) == 3
    assert small.names in [held.names for held in protected.parity.groups()]


def test_one_process_at_a_time_updates(protected: Protected) -> None:
    held = protected.disk.open("care/lock", create=True)
    held.lock(wait=True)
    with pytest.raises(BusyError):
        protected.update()
    held.close()
    protected.update()


def test_what_is_collected_leaves_its_group_first(protected: Protected) -> None:
    for number in range(7):
        protected.stack.ingest.tiles("main", "noise", f"f{number}", {(0, at): noise(7) for at in range(17)})
    stack = protected.stack
    Collector(stack.history, stack.projection, stack.store, stack.clock, tuple).run(Choice(0.01, 0))
    status = protected.parity.status()
    assert status.waiting_packs == 0
    assert not [
        held
        for held in protected.parity.groups()
        if any(member.name not in protected.disk.files for member in held.group.members)
    ]
    assert stack.fsck().ok


@pytest.mark.parametrize("keep", ["all", "half", "none"])
def test_a_power_loss_while_parity_is_written_costs_nothing(protected: Protected, keep: str) -> None:
    """The head is written last: packs stay readable, half a parity file is none, and the next update makes it."""
    for name in protected.names(".parity"):
        del protected.disk.files[name]
    protected.reopened()
    before = protected.disk.copy()
    protected.disk.faults = Faults()
    protected.update()
    operations = protected.disk.faults.count
    assert operations > 20
    for at in range(1, operations + 1, 5):
        disk = before.copy()
        disk.faults = Faults(at, "power")
        with pytest.raises(PowerLoss):
            stack = Stack(disk, parity=Shape(10, 4))
            stack.store.protect(silent)
            raise PowerLoss
        after = disk.after_power_loss(lambda: keep)
        stack = Stack(after, parity=Shape(10, 4))
        assert all(one.group.rows for one in stack.parity.groups())
        stack.parity.update(silent)
        found = {name: bytes(file.now) for name, file in after.files.items() if name.startswith("packs/")}
        assert found == protected.bytes
        stack.close()


def test_what_is_put_again_mends_a_record_that_nothing_could_heal(protected: Protected) -> None:
    """A damaged record must not count as stored for whoever puts the same content."""
    stack = protected.stack
    stack.store.mender.parity = None
    place = stack.store.place(stack.at("main").entry(TileKey("noise", "f0", 0, 0, 0)).ref)  # pyright: ignore
    name, _, offset = place.partition(" @ ")
    protected.disk.files[name].now[int(offset) + 300] ^= 1
    stack = protected.reopened()
    stack.store.mender.parity = None
    with pytest.raises(IntegrityError, match=r"not zero|not match"):
        stack.at("main").tile(TileKey("noise", "f0", 0, 0, 0))
    assert list(stack.journal.quarantined()) == [(name, int(offset))]
    stack.ingest.tiles("other", "noise", "again", {(0, 0): noise(0)})
    assert np.array_equal(stack.at("main").tile(TileKey("noise", "f0", 0, 0, 0)), noise(0))
    stack = protected.reopened()
    stack.store.mender.parity = None
    assert np.array_equal(stack.at("main").tile(TileKey("noise", "f0", 0, 0, 0)), noise(0))


def silent(_done: int, _total: int, _what: str) -> None:
    """Nobody watches."""


def test_what_a_missing_pack_held_can_be_put_again(protected: Protected) -> None:
    """Nobody has read from it since it was lost: its content must not be taken for stored even so."""
    stack = protected.reopened()
    stack.store.mender.parity = None
    blob = stack.at("main").entry(TileKey("noise", "f5", 0, 0, 0)).ref  # pyright: ignore
    del protected.disk.files[stack.store.place(blob).split(" ")[0]]
    stack = protected.reopened()
    stack.store.mender.parity = None
    scrubbed = Scrubber(
        stack.disk, stack.store, stack.journal, stack.clock, stack.projection.state().packs, lambda _size: None
    )
    assert [one.left[0].message for one in scrubbed.run() if one.left] == ["a pack is missing"]
    stack.ingest.tiles("other", "noise", "again", {(0, at): noise(500 + at) for at in range(2)})
    for _ in range(2):
        for at in range(2):
            found = stack.at("other").tile(TileKey("noise", "again", 0, 0, at))
            assert np.array_equal(found, noise(500 + at))
        stack = protected.reopened()
        stack.store.mender.parity = None
