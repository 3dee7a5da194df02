"""Eviction: who goes first, who never does while pinned, and that saved hotness is a hint and no more."""

from collections.abc import Callable

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from him.config import PIN_FOR_NS, PIN_TOUCHES, PIN_WINDOW_MINUTES, TOUCH_GRAIN_NS
from him.tier import evict
from him.tier.evict import EvictionPolicy, Extent

SECOND = 1_000_000_000
MINUTE = 60 * SECOND
START = 1_760_000_000 * SECOND
KEYS = st.tuples(st.integers(0, 3), st.integers(0, 9))


def full(count: int, now_ns: int = START) -> EvictionPolicy:
    """A policy with the extents (0, 0) … (0, count − 1), touched once in this order."""
    policy = EvictionPolicy()
    policy.touch([(0, number) for number in range(count)], now_ns)
    return policy


def drained(policy: EvictionPolicy, now_ns: int) -> list[Extent]:
    """All victims one by one."""
    found: list[Extent] = []
    while victims := policy.victims(1, now_ns):
        found += victims
    return found


# -- order


def test_untouched_extents_go_in_the_order_they_came() -> None:
    assert full(40).victims(100, START) == [(0, number) for number in range(40)]


@given(st.integers(8, 60), st.data())
def test_touched_extents_outlive_untouched_ones_of_the_same_age(count: int, data: st.DataObject) -> None:
    policy = full(count)
    # Up to what main may hold beside the small queue's share; newcomers come, one for each that goes.
    touched = data.draw(st.sets(st.integers(0, count - 1), max_size=count * 3 // 4))
    policy.touch([(0, number) for number in sorted(touched)], START + SECOND)
    untouched = [(0, number) for number in range(count) if number not in touched]
    for number, key in enumerate(untouched):
        assert policy.victims(1, START + SECOND) == [key]
        policy.touch([(1, number)], START + SECOND)
    assert all((0, number) in policy for number in touched)


def test_what_is_touched_again_and_again_stays_in_main_when_its_neighbours_go() -> None:
    policy = full(100)
    policy.touch([(0, number) for number in range(80)], START + SECOND)
    assert policy.victims(1, START + SECOND) == [(0, 80)]
    policy.touch([(0, number) for number in range(0, 80, 2)], START + 2 * SECOND)
    order = drained(policy, START + 2 * SECOND)
    odd, even = ({order.index((0, number)) for number in range(first, 80, 2)} for first in (1, 0))
    assert max(odd) < min(even)


def test_main_gives_way_when_the_small_queue_has_no_more_than_its_share() -> None:
    policy = full(100)
    policy.touch([(0, number) for number in range(95)], START + SECOND)
    policy.touch([(1, number) for number in range(10)], START + SECOND)
    # Else newcomers would be swept through a queue of nothing while main is never asked.
    gone = policy.victims(12, START + SECOND)
    assert gone[:5] == [(0, number) for number in range(95, 100)]
    assert sum(pack == 1 for pack, _ in gone) <= 1


def test_a_scan_of_any_length_leaves_what_is_used_alone() -> None:
    policy, now = EvictionPolicy(), START
    used = [(0, number) for number in range(80)]
    for _ in range(3):
        now += SECOND
        policy.touch(used, now)
    for number in range(5_000):
        now += SECOND
        policy.victims(len(policy) + 1 - 100, now)
        # Records of 8 KiB, read from end to end: each extent 32 times within a second.
        for _ in range(32):
            policy.touch([(1, number)], now)
        if number % 50 == 0:
            policy.touch(used, now)
    assert all(key in policy for key in used)


def test_who_comes_back_soon_enters_main_and_outlives_newcomers() -> None:
    policy = full(40)
    assert policy.victims(1, START) == [(0, 0)]
    policy.touch([(0, 0)], START + SECOND)
    policy.touch([(1, number) for number in range(40)], START + SECOND)
    assert drained(policy, START + SECOND)[-1] == (0, 0)


def test_ghosts_are_no_more_than_what_is_here() -> None:
    policy = full(10_000)
    policy.victims(9_990, START)
    # Of 9,990 names at most ten are kept: a dump of more would be larger.
    assert len(policy.dump()) < 400
    policy.touch([(0, 0)], START + SECOND)
    assert policy.victims(11, START + SECOND)[-1] == (0, 0)


def test_adopted_extents_go_before_those_with_a_history() -> None:
    policy = full(20)
    policy.adopt([(7, 1), (7, 2), (0, 5), (7, 3)])
    assert len(policy) == 23
    assert policy.victims(3, START) == [(7, 1), (7, 2), (7, 3)]


def test_what_cannot_be_freed_is_kept_and_comes_last() -> None:
    policy = full(20)
    (victim,) = policy.victims(1, START)
    policy.keep(victim)
    assert victim in policy and len(policy) == 20
    policy.keep(victim)
    policy.touch([(1, number) for number in range(40)], START)
    assert victim not in policy.victims(50, START)
    assert drained(policy, START).count(victim) == 1


def test_what_vanished_is_no_victim_and_can_come_back() -> None:
    policy = full(500)
    for number in range(0, 500, 2):
        policy.forget((0, number))
    policy.forget((9, 9))
    policy.touch([(0, 0)], START + SECOND)
    assert policy.victims(1_000, START + SECOND) == [*((0, number) for number in range(1, 500, 2)), (0, 0)]


def test_forgetting_and_coming_back_takes_no_more_and_more_room() -> None:
    policy = full(10)
    for _ in range(1_000):
        policy.forget((0, 3))
        policy.touch([(0, 3)], START)
    assert sum(map(len, policy._queues)) < 100


# -- pins (spec §9)


def touched(policy: EvictionPolicy, key: Extent, times: int, now_ns: int, gap_ns: int) -> int:
    """Touch a key at even distances; when the last touch was."""
    for number in range(times):
        policy.touch([key], now_ns + number * gap_ns)
    return now_ns + (times - 1) * gap_ns


@pytest.mark.parametrize("gap_ns", [TOUCH_GRAIN_NS, 7 * SECOND, PIN_WINDOW_MINUTES * MINUTE // PIN_TOUCHES])
@pytest.mark.parametrize("offset_ns", [0, 31 * SECOND, 59 * SECOND])
def test_s9_more_than_n_touches_in_ten_minutes_pin_for_thirty(gap_ns: int, offset_ns: int) -> None:
    policy = full(20)
    key = (0, 0)
    begin = START // MINUTE * MINUTE + 5 * MINUTE * PIN_WINDOW_MINUTES + offset_ns
    last = touched(policy, key, PIN_TOUCHES, begin, gap_ns)
    assert not policy.pinned(key, last)
    policy.touch([key], last + gap_ns)
    end = last + gap_ns + PIN_FOR_NS
    assert policy.pinned(key, end - 1) and not policy.pinned(key, end)
    assert len(policy.victims(20, end - 1)) == 19
    assert key in policy and policy.victims(20, end - 1) == []
    assert policy.victims(20, end) == [key]


def test_s9_fewer_touches_or_slower_ones_pin_nothing() -> None:
    policy = full(3)
    # 31 touches take half an hour; of 1,000 within one second one counts.
    last = touched(policy, (0, 0), 3 * PIN_TOUCHES, START + 1, MINUTE)
    last = touched(policy, (0, 1), 1_000, last // SECOND * SECOND, SECOND // 1_001)
    assert not policy.pinned((0, 0), last) and not policy.pinned((0, 1), last)
    assert len(drained(policy, last)) == 3


def test_a_clock_that_was_put_back_neither_pins_nor_breaks() -> None:
    policy = full(3)
    touched(policy, (0, 0), PIN_TOUCHES + 1, START + SECOND, SECOND)
    assert policy.pinned((0, 0), START + MINUTE)
    earlier = START - 24 * 60 * MINUTE
    policy.touch([(0, 0), (0, 1)], earlier)
    assert not policy.pinned((0, 0), earlier)
    assert sorted(drained(policy, earlier)) == [(0, 0), (0, 1), (0, 2)]


def test_pins_by_name_hold_until_their_own_end_or_are_taken_back() -> None:
    policy = full(5)
    # A pin may be older than the extent's coming.
    policy.pin([(0, 0), (1, 0)], START + MINUTE)
    policy.pin([(0, 0)], START + SECOND)
    policy.pin([(0, 1)], START + 2 * MINUTE)
    policy.touch([(1, 0)], START)
    assert policy.victims(9, START) == [(0, 2), (0, 3), (0, 4)]
    assert policy.victims(9, START + MINUTE - 1) == []
    assert sorted(policy.victims(9, START + MINUTE)) == [(0, 0), (1, 0)]
    policy.unpin([(0, 1), (5, 5)])
    assert policy.victims(9, START + MINUTE) == [(0, 1)]


def test_taking_back_a_pin_by_name_leaves_that_of_the_touches() -> None:
    policy = full(2)
    last = touched(policy, (0, 0), PIN_TOUCHES + 1, START + SECOND, SECOND)
    policy.pin([(0, 0)], last + 2 * PIN_FOR_NS)
    assert policy.victims(2, last) == [(0, 1)]
    policy.unpin([(0, 0)])
    assert policy.victims(2, last + PIN_FOR_NS - 1) == []
    assert policy.victims(2, last + PIN_FOR_NS) == [(0, 0)]


def test_a_pin_that_is_made_longer_holds_until_its_new_end() -> None:
    policy = full(1)
    policy.pin([(0, 0)], START + MINUTE)
    assert policy.victims(1, START) == []
    policy.pin([(0, 0)], START + 3 * MINUTE)
    assert policy.victims(1, START + 2 * MINUTE) == []
    assert policy.victims(1, START + 3 * MINUTE) == [(0, 0)]


def test_ends_of_pins_do_not_pile_up() -> None:
    policy = full(3)
    for number in range(5_000):
        policy.pin([(8, number)], START + number)
        policy.victims(0, START + number)
    assert len(policy._pins) < 200


# -- all of it against a model


class Machine(RuleBasedStateMachine):
    """A cache of a fixed room that asks for victims as the store does."""

    @initialize(room=st.integers(1, 25))
    def begin(self, room: int) -> None:
        self.policy, self.room, self.now = EvictionPolicy(), room, START
        self.here: set[Extent] = set()
        self.pins: dict[Extent, int] = {}
        self.times: dict[Extent, list[int]] = {}

    @rule(ns=st.sampled_from([SECOND // 3, SECOND, 20 * SECOND, 9 * MINUTE, PIN_FOR_NS]))
    def wait(self, ns: int) -> None:
        self.now += ns

    @rule(keys=st.lists(KEYS, max_size=20, unique=True))
    def read(self, keys: list[Extent]) -> None:
        for key in keys:
            if key not in self.here and len(self.here) >= self.room and not self.freed(len(self.here) + 1 - self.room):
                continue
            self.policy.touch([key], self.now)
            self.here.add(key)
            self.times.setdefault(key, []).append(self.now)

    def freed(self, count: int) -> bool:
        """Whether as much room was made as was asked for; no victim is pinned, and fewer come only for pins' sake."""
        victims = self.policy.victims(count, self.now)
        assert len(set(victims)) == len(victims) <= count and set(victims) <= self.here
        assert not [key for key in victims if self.pins.get(key, 0) > self.now]
        self.here -= set(victims)
        if len(victims) < count:
            assert all(self.policy.pinned(key, self.now) for key in self.here)
        return len(victims) == count

    @rule(count=st.integers(0, 30))
    def shrink(self, count: int) -> None:
        self.freed(min(count, len(self.here)))

    @rule(key=KEYS)
    def vanish(self, key: Extent) -> None:
        self.policy.forget(key)
        self.here.discard(key)

    @precondition(lambda self: len(self.here) < self.room)
    @rule(key=KEYS)
    def found(self, key: Extent) -> None:
        self.policy.adopt([key])
        self.here.add(key)

    @precondition(lambda self: self.here)
    @rule()
    def viewed(self) -> None:
        victims = self.policy.victims(2, self.now)
        for key in victims:
            self.policy.keep(key)

    @rule(keys=st.lists(KEYS, max_size=5), ns=st.sampled_from([SECOND, MINUTE, 40 * MINUTE]))
    def pin(self, keys: list[Extent], ns: int) -> None:
        self.policy.pin(keys, self.now + ns)
        for key in keys:
            self.pins[key] = max(self.pins.get(key, 0), self.now + ns)

    @rule(keys=st.lists(KEYS, max_size=5))
    def unpin(self, keys: list[Extent]) -> None:
        self.policy.unpin(keys)
        for key in keys:
            self.pins.pop(key, None)

    @rule()
    def restart(self) -> None:
        again = EvictionPolicy()
        assert again.load(self.policy.dump())
        assert drained(again, self.now) == drained(self.reloaded(), self.now)
        self.policy = self.reloaded()

    def reloaded(self) -> EvictionPolicy:
        """A copy by way of a dump."""
        again = EvictionPolicy()
        assert again.load(self.policy.dump())
        return again

    @invariant()
    def same(self) -> None:
        assert set(self.policy) == self.here and len(self.policy) == len(self.here) <= self.room

    def teardown(self) -> None:
        later = self.now + 41 * MINUTE
        assert sorted(drained(self.policy, later)) == sorted(self.here), "without pins everybody goes in the end"


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- hotness that is saved


STEPS = st.lists(st.tuples(st.sampled_from(["touch", "go", "forget", "pin", "wait"]), KEYS), max_size=120)


def played(policy: EvictionPolicy, steps: list[tuple[str, Extent]], now_ns: int) -> tuple[list[Extent], int]:
    """Victims on the way, and the time after."""
    gone: list[Extent] = []
    acts: dict[str, Callable[[Extent], None]] = {
        "touch": lambda key: policy.touch([key], now_ns),
        "go": lambda _: gone.extend(policy.victims(1, now_ns)),
        "forget": policy.forget,
        "pin": lambda key: policy.pin([key], now_ns + MINUTE),
        "wait": lambda _: None,
    }
    for name, key in steps:
        now_ns += 50 * SECOND if name == "wait" else SECOND
        acts[name](key)
    return gone, now_ns


@given(STEPS)
def test_the_same_history_gives_the_same_victims_and_the_same_bytes(steps: list[tuple[str, Extent]]) -> None:
    one, other = EvictionPolicy(), EvictionPolicy()
    assert played(one, steps, START) == played(other, steps, START)
    assert one.dump() == other.dump()


@given(STEPS, STEPS)
def test_a_loaded_dump_gives_the_same_victims_now_and_later(
    before: list[tuple[str, Extent]], after: list[tuple[str, Extent]]
) -> None:
    policy, again = EvictionPolicy(), EvictionPolicy()
    _, now = played(policy, before, START)
    assert again.load(policy.dump())
    assert again.dump() == policy.dump()
    assert played(again, after, now + MINUTE) == played(policy, after, now + MINUTE)
    assert drained(again, now + 99 * MINUTE) == drained(policy, now + 99 * MINUTE)


def test_who_came_back_soon_is_known_after_a_restart() -> None:
    policy, again = full(40), EvictionPolicy()
    assert policy.victims(1, START) == [(0, 0)]
    assert again.load(policy.dump())
    again.touch([(0, 0)], START + SECOND)
    again.touch([(1, number) for number in range(40)], START + SECOND)
    assert drained(again, START + SECOND)[-1] == (0, 0)


def test_a_dump_above_the_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    data, policy = full(100).dump(), EvictionPolicy()
    monkeypatch.setattr(evict, "HOTNESS_BYTES_MAX", len(data) - 1)
    assert not policy.load(data)
    monkeypatch.setattr(evict, "HOTNESS_BYTES_MAX", len(data))
    assert policy.load(data)


def test_loading_takes_the_place_of_what_was_known() -> None:
    policy = full(3)
    policy.pin([(0, 1)], START + MINUTE)
    assert policy.load(full(2).dump())
    assert policy.victims(9, START) == [(0, 0), (0, 1)]


def forged(*content: object) -> bytes:
    """A dump with a right digest and any content."""
    body = evict.msgspec.msgpack.encode(content)
    return evict._MAGIC + blake3(evict._MAGIC + body).digest() + body


BAD = {
    "nothing": b"",
    "head alone": full(3).dump()[:40],
    "another version": b"HIMHEAT\x02" + full(3).dump()[8:],
    "not a dump": b"PK\x03\x04" + bytes(100),
    "bytes behind": full(3).dump() + b"\0",
    "cut": full(3).dump()[:-1],
    "other types": forged([], [], [["a", 1, 2, 3]], [], []),
    "a field missing": forged([], [], [], []),
    "an extent twice": forged([], [(0, 1, 0, 0)], [(0, 1, 0, 0)], [], []),
    "negative": forged([], [], [(0, -1, 0, 0)], [], []),
    "hotter than can be": forged([], [], [(0, 1, 1_000_000, 0)], [], []),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_and_foreign_dumps_are_ignored(name: str) -> None:
    policy = full(5)
    assert not policy.load(BAD[name])
    assert policy.dump() == full(5).dump()


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_dump_with_one_changed_byte_is_ignored(at: int, flip: int) -> None:
    data = bytearray(full(8).dump())
    data[at % len(data)] ^= flip
    policy = EvictionPolicy()
    assert not policy.load(bytes(data)) and len(policy) == 0


def test_a_dump_cannot_pin_for_ever_what_touches_pin() -> None:
    policy = EvictionPolicy()
    assert policy.load(forged([(0, 1, 0, 2**62)], [], [(0, 2, 0, START + 99 * PIN_FOR_NS)], [], []))
    assert policy.victims(5, START) == [(0, 2)]
    assert policy.victims(5, 2**62) == [(0, 1)]


def test_of_too_many_extents_those_that_go_last_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evict, "HOTNESS_KEYS_MAX", 10)
    policy, again = full(100), EvictionPolicy()
    policy.victims(20, START)
    policy.pin([(0, 50)], START + MINUTE)
    policy.touch([(0, 97)], START + SECOND)
    assert again.load(policy.dump())
    assert list(again) == [(0, number) for number in range(90, 100)]
