"""Pins hold for every process at once, over critical snapshots and what their tiles are made of; room is kept free."""

from pathlib import Path

import numpy as np
import pytest
from fakes import FakeRng, MemDisk, Stack
from numpy.typing import NDArray

from him.adapters.local import LocalDisk
from him.catalog.log import FileLog
from him.catalog.reader import SnapshotReader
from him.config import COLD_FAULT_NS, EXTENT_BYTES, PIN_FOR_NS, PIN_TOUCHES, WARM_FREE_RATIO
from him.errors import LimitError, UnavailableError
from him.tier import pins as pins_module
from him.tier.mirror import Mirror
from him.tier.pins import Pins
from him.types import TileKey

MIB = 2**20
START = 10**18
SHAPE = (512, 512, 2)
Values = NDArray[np.int8]


class Hand:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.ns = START

    def now_ns(self) -> int:
        return self.ns

    def monotonic_ns(self) -> int:
        return self.ns


class Machine:
    """A repository with a cold tier in memory, opened by as many processes as are asked for."""

    def __init__(self, folder: Path, budget: int = 64 * MIB) -> None:
        from fakes import MemObjects

        self.folder, self.budget, self.cold, self.clock = folder, budget, MemObjects(), Hand()
        folder.mkdir()
        FileLog.create(LocalDisk(folder))

    def process(self, seed: str) -> tuple[Mirror, Stack]:
        mirror = Mirror(LocalDisk(self.folder), self.cold, self.clock, self.budget)
        return mirror, Stack(LocalDisk(self.folder), mirror=mirror, rng=FakeRng(seed))


def values(number: int) -> Values:
    return np.random.default_rng(number).integers(-128, 127, SHAPE, dtype=np.int8)


def key(number: int) -> TileKey:
    return TileKey("kv_cache", "f", 0, 0, number)


def put(stack: Stack, number: int, value: Values | None = None) -> None:
    stack.ingest.tiles("main", "kv_cache", "f", {(0, number): values(number) if value is None else value})


def places(stack: Stack, *numbers: int) -> list[tuple[str, int, int]]:
    return stack.store.places([stack.at("main").present(key(number)).ref for number in numbers])


def here(mirror: Mirror, places: list[tuple[str, int, int]]) -> bool:
    """Whether every byte is on this disk."""
    mirror._look_at_all()
    return all(
        mirror._packs[path].here[list(mirror._packs[path].extents(offset, size))].all() for path, offset, size in places
    )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Ten tiles of two extents each, all of them copied and here."""
    made = Machine(tmp_path / "r")
    mirror, stack = made.process("0")
    for number in range(10):
        put(stack, number)
    stack.history.finish_packs()
    mirror.push_all()
    stack.close()
    mirror.close()
    return made


def test_what_one_process_pins_another_leaves_alone_at_once(machine: Machine) -> None:
    (one, _), (other, stack) = machine.process("1"), machine.process("2")
    one.status()
    pinned, free = places(stack, 3), places(stack, 7)
    assert other.pin(pinned, START + PIN_FOR_NS) >= 2
    one.demote()
    assert here(one, pinned) and not here(one, free)
    assert one.status().pinned_bytes >= 2 * EXTENT_BYTES
    other.unpin(pinned)
    one.demote()
    assert not here(one, pinned)


def test_a_pin_outlives_the_process_that_was_killed(machine: Machine) -> None:
    other, stack = machine.process("2")
    pinned = places(stack, 3)
    other.pin(pinned, START + PIN_FOR_NS)
    # Never closed.
    third, _ = machine.process("3")
    third.demote()
    assert here(third, pinned)
    machine.clock.ns += PIN_FOR_NS + 1
    third.demote()
    assert not here(third, pinned)


def test_what_is_read_from_a_critical_snapshot_stays_for_thirty_minutes(machine: Machine) -> None:
    (mirror, stack), (other, _) = machine.process("1"), machine.process("2")
    found = stack.history.snapshot("main")
    reader = SnapshotReader(stack.store, stack.memo, found.directory, critical=True)
    plain = SnapshotReader(stack.store, stack.memo, found.directory)
    reader.tile(key(2))
    reader.tiles([key(4), key(5)])
    with reader.view(key(6)):
        pass
    plain.tile(key(8))
    machine.clock.ns += PIN_FOR_NS // 2
    reader.tile(key(2))
    other.demote()
    assert here(other, places(stack, 2, 4, 5, 6)) and not here(other, places(stack, 8))
    machine.clock.ns += PIN_FOR_NS // 2 + 10**9
    other.demote()
    # It was read once more when half of its time was over.
    assert here(other, places(stack, 2)) and not here(other, places(stack, 4))
    assert mirror.status().pinned_bytes > 0
    machine.clock.ns += PIN_FOR_NS
    other.demote()
    assert not here(other, places(stack, 2))


def delta_of(machine: Machine) -> tuple[list[tuple[str, int, int]], list[tuple[str, int, int]]]:
    """Tile 1 is stored as a delta in a later pack; the places of delta and base."""
    mirror, stack = machine.process("d")
    base = places(stack, 1)
    changed = values(1).copy()
    changed[3, 3:40] ^= 1
    put(stack, 1, changed)
    stack.history.finish_packs()
    mirror.push_all()
    blob = stack.at("main").present(key(1)).ref
    assert stack.store.read(blob).delta_depth == 1
    found = places(stack, 1)
    assert found[0][0] != base[0][0]
    mirror.demote()
    stack.close()
    mirror.close()
    return found, base


def test_reading_a_delta_touches_what_it_is_made_of(machine: Machine) -> None:
    delta, base = delta_of(machine)
    mirror, stack = machine.process("1")
    for _ in range(PIN_TOUCHES + 2):
        machine.clock.ns += 10**9
        stack.at("main").tile(key(1))
    mirror.demote()
    assert here(mirror, delta) and here(mirror, base)
    assert not here(mirror, places(stack, 7))


def test_a_delta_of_a_critical_snapshot_keeps_its_base(machine: Machine) -> None:
    delta, base = delta_of(machine)
    mirror, stack = machine.process("1")
    directory = stack.history.snapshot("main").directory
    SnapshotReader(stack.store, stack.memo, directory, critical=True).tile(key(1))
    mirror.demote()
    assert here(mirror, delta) and here(mirror, base)


def test_a_half_written_file_of_pins_pins_nothing() -> None:
    disk = MemDisk()
    pins = Pins(disk, read_only=False)
    assert pins.news() is None
    pins.change({"packs/a": {1: START, 2: START, 4: START}, "packs/b": {0: 5}}, 10)
    assert pins.news() == {"packs/a": {1: START, 2: START, 4: START}}
    assert pins.news() is None
    other = Pins(disk, read_only=False)
    pins.change({"packs/a": {1: START - 1, 2: 0, 3: START}}, 10)
    assert other.news() == pins.news() == {"packs/a": {1: START, 3: START, 4: START}}
    data = disk.files["cold/pins"]
    for at in (0, 40, len(data.now) - 1):
        data.now[at] ^= 1
        assert other.news() == {}
        data.now[at] ^= 1
        other.news()
    del data.now[20:]
    assert other.news() == {}
    pins.change({"packs/c": {0: START}}, 10)
    assert other.news() == {"packs/c": {0: START}}


def test_too_many_pins_are_refused_and_the_old_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins_module, "PINS_BYTES_MAX", 200)
    pins = Pins(MemDisk(), read_only=False)
    pins.change({"packs/a": {0: START}}, 10)
    with pytest.raises(LimitError):
        pins.change({"packs/b": {2 * number: START for number in range(100)}}, 10)
    assert pins.news() == {"packs/a": {0: START}}


def test_fetching_leaves_a_tenth_of_the_budget_to_those_who_write(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "r", 8 * MIB)
    mirror, stack = machine.process("0")
    for number in range(30):
        put(stack, number)
    stack.history.finish_packs()
    mirror.push_all()
    mirror.demote()
    for number in range(30):
        stack.at("main").tile(key(number))
        assert mirror.status().used_bytes <= machine.budget * (1 - WARM_FREE_RATIO)
    assert mirror.status().used_bytes > machine.budget * (1 - WARM_FREE_RATIO) - 2 * EXTENT_BYTES
    freed = mirror.status().freed_bytes
    put(stack, 30)
    assert mirror.status().freed_bytes == freed, "the free tenth is for this"
    assert mirror.status().used_bytes > machine.budget * (1 - WARM_FREE_RATIO) - EXTENT_BYTES


def test_while_the_cold_tier_has_trouble_nothing_is_fetched_ahead_and_pins_last_twice_as_long(
    machine: Machine,
) -> None:
    mirror, stack = machine.process("1")
    stack.at("main").tile(key(2))
    wanted, kept = places(stack, 3, 4), places(stack, 2)
    stack.close()
    mirror.demote()
    mirror, stack = machine.process("2")
    machine.cold.down = True
    with pytest.raises(UnavailableError):
        mirror.ahead(wanted[:1])
    machine.cold.down = False
    asked = len(machine.cold.requests)
    with pytest.raises(UnavailableError, match="503"):
        mirror.prefetch(wanted)
    assert len(machine.cold.requests) == asked and "503" in mirror.status().fault
    mirror.pin(kept, START + PIN_FOR_NS)
    # Who waits for what he reads is served, and then the trouble is over.
    assert mirror.ahead(kept)
    assert mirror.status().fault == "" and mirror.prefetch(wanted)
    machine.clock.ns += 2 * PIN_FOR_NS - 1
    mirror.demote()
    assert here(mirror, kept) and not here(mirror, wanted)
    machine.clock.ns += 1
    mirror.demote()
    assert not here(mirror, kept)


def test_after_a_while_one_may_try_again(machine: Machine) -> None:
    mirror, stack = machine.process("1")
    wanted = places(stack, 3)
    mirror.demote()
    machine.cold.down = True
    with pytest.raises(UnavailableError):
        mirror.prefetch(wanted)
    machine.cold.down = False
    machine.clock.ns += COLD_FAULT_NS
    assert mirror.prefetch(wanted)
