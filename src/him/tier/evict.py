"""What goes first when the warm tier is full: S3-FIFO over extents, with pins (design §9, spec §9).

S3-FIFO (Yang et al., SOSP 2023): a new extent enters the *small* queue; it leaves it for *main* when it was wanted
again meanwhile, else it is freed and its name stays for a while among the *ghosts*; who comes back as a ghost enters
main at once. What main comes to is freed, or goes round again at one frequency less. A hit only counts, and moves
nothing: so what is read once, however much it is, goes through the small queue and leaves main alone.

An extent holds many records, so the touches of one second are one touch: who reads a pack from end to end, record by
record, wants each of its extents once. Pinned extents lie apart until their pins end, so that nobody walks over them.

The budget is no business of this module: the small queue's share is one of what is here, and the caller asks for as
many victims as it needs. Memory (`bench evict` measures it): 0.2 KB an extent that is here and as much a ghost, of
which there are at most as many; so a tier of 64 GiB takes at most 0.1 GB.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

import msgspec
from blake3 import blake3

from him.config import (
    EVICT_FREQUENCY_MAX,
    EVICT_PROMOTE_FROM,
    EVICT_SMALL_DIVISOR,
    HOTNESS_BYTES_MAX,
    HOTNESS_KEYS_MAX,
    PIN_FOR_NS,
    PIN_STRETCH,
    PIN_TOUCHES,
    PIN_WINDOW_MINUTES,
    TOUCH_GRAIN_NS,
)
from him.types import MALFORMED

Extent = tuple[int, int]
"""Pack number (its rank in the log) and the extent's rank in the pack; all extents are of one size."""

_SMALL, _MAIN, _PINNED, _GONE = range(4)
_MINUTE_NS: Final = 60_000_000_000
_DIGIT: Final = 10
"""Bits in which the touches of a minute are counted."""
_DIGIT_SUM: Final = (1 << _DIGIT) - 1
"""A number modulo this is the sum of its digits, as long as the sum is less: a window has at most 660 seconds."""
_WINDOW: Final = (1 << _DIGIT * (PIN_WINDOW_MINUTES + 1)) - 1
"""The minute that runs and those before it, one more than the window has: no touch within the window is missed."""
_MAGIC: Final = b"HIMHEAT\x01"
_DIGEST: Final = 32


class _Entry:
    """An extent that is here: where it stands, and how it was wanted."""

    __slots__ = ("frequency", "key", "pinned_until", "queue", "recent", "tick")

    def __init__(self, key: Extent, queue: int, tick: int, frequency: int = 0, pinned_until: int = 0) -> None:
        self.key, self.queue, self.tick = key, queue, tick
        self.frequency, self.pinned_until = frequency, pinned_until
        self.recent = 1
        """Touches of the last minutes, a digit a minute, the minute of `tick` lowest."""


class _Hotness(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What `dump` keeps: rows of (pack, extent, frequency, pinned until), oldest first; ghosts; pins by name."""

    pinned: list[tuple[int, int, int, int]]
    main: list[tuple[int, int, int, int]]
    small: list[tuple[int, int, int, int]]
    ghosts: list[tuple[int, int]]
    pins: list[tuple[int, int, int]]


_decoder: Final = msgspec.msgpack.Decoder(_Hotness)


class EvictionPolicy:
    """Which extents are here and which of them go first. Deterministic; times in ns since 1970; not thread-safe."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is here, and nothing is known."""
        self._entries: dict[Extent, _Entry] = {}
        self._queues: tuple[deque[_Entry], deque[_Entry]] = (deque(), deque())
        self._count = [0, 0, 0, 0]
        """Entries by queue; of the gone, those that still lie in one."""
        self._ghosts: OrderedDict[Extent, None] = OrderedDict()
        self._ends: list[tuple[int, Extent]] = []
        """A heap of when pinned entries are looked at again; outdated ones are passed over."""
        self._pins: dict[Extent, int] = {}
        self._pins_swept = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._entries)

    def __contains__(self, key: Extent) -> bool:
        return key in self._entries

    # -- what happened

    def touch(self, keys: Iterable[Extent], now_ns: int, pin_for_ns: int = PIN_FOR_NS) -> None:
        """Extents were read; those that were not here are here from now on.

        Args:
            pin_for_ns: how long those that were touched often enough are pinned, at most PIN_STRETCH × PIN_FOR_NS.
        """
        find, tick = self._entries.get, now_ns // TOUCH_GRAIN_NS
        minute = now_ns // _MINUTE_NS
        for key in keys:
            entry = find(key)
            if entry is None:
                self._admit(key, tick)
            elif entry.tick != tick:
                if entry.frequency < EVICT_FREQUENCY_MAX:
                    entry.frequency += 1
                passed = minute - entry.tick * TOUCH_GRAIN_NS // _MINUTE_NS
                entry.tick = tick
                if passed:
                    # A clock that was put back starts anew.
                    kept = 0 <= passed <= PIN_WINDOW_MINUTES
                    entry.recent = entry.recent << _DIGIT * passed & _WINDOW if kept else 0
                entry.recent += 1
                if entry.recent % _DIGIT_SUM > PIN_TOUCHES:
                    entry.pinned_until = now_ns + pin_for_ns

    def adopt(self, keys: Sequence[Extent]) -> None:
        """Extents are here of which nothing is known: they go before all others, the first of them first."""
        for key in reversed(keys):
            if key not in self._entries:
                self._ghosts.pop(key, None)
                entry = self._entries[key] = _Entry(key, _SMALL, 0)
                self._queues[_SMALL].appendleft(entry)
                self._count[_SMALL] += 1

    def forget(self, key: Extent) -> None:
        """An extent is no longer here, for another reason than being a victim."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._count[entry.queue] -= 1
        if entry.queue != _PINNED:
            self._count[_GONE] += 1
        entry.queue = _GONE
        if self._count[_GONE] > len(self._entries) + 64:
            self._queues = (self._living(_SMALL), self._living(_MAIN))
            self._count[_GONE] = 0

    def keep(self, key: Extent) -> None:
        """A victim could not be freed: it is still here, and is the last that main comes to."""
        if key not in self._entries:
            self._ghosts.pop(key, None)
            self._put(_Entry(key, _MAIN, 0), _MAIN)

    # -- pins

    def pin(self, keys: Iterable[Extent], until_ns: int) -> None:
        """Leave extents alone, whether they are here yet or not; of several pins of one the latest end counts."""
        for key in keys:
            if self._pins.get(key, 0) < until_ns:
                self._pins[key] = until_ns

    def unpin(self, keys: Iterable[Extent]) -> None:
        """End what `pin` began, all pins of an extent at once; those that touches began stay."""
        for key in keys:
            entry = self._entries.get(key)
            if self._pins.pop(key, None) is not None and entry is not None and entry.queue == _PINNED:
                heapq.heappush(self._ends, (entry.pinned_until, key))

    def replace_pins(self, pins: Mapping[Extent, int]) -> None:
        """These are the pins by name, and no others."""
        self.unpin([key for key, until in self._pins.items() if pins.get(key) != until])
        for key, until in pins.items():
            self.pin([key], until)

    def pinned(self, key: Extent, now_ns: int) -> bool:
        """Whether an extent is left alone at a time."""
        return self._pinned_until(key, now_ns) > now_ns

    # -- what goes

    def victims(self, count: int, now_ns: int) -> list[Extent]:
        """Up to `count` extents to free, in order; fewer when all others are pinned.

        They count as gone: what cannot be freed after all is handed back by `keep`.
        """
        self._release(now_ns)
        found: list[Extent] = []
        small, main = self._queues
        living = self._count
        while len(found) < count and living[_SMALL] + living[_MAIN]:
            share = (living[_SMALL] + living[_MAIN]) // EVICT_SMALL_DIVISOR
            from_small = living[_SMALL] > share or not living[_MAIN]
            entry = (small if from_small else main).popleft()
            if entry.queue == _GONE:
                living[_GONE] -= 1
                continue
            living[entry.queue] -= 1
            until = self._pinned_until(entry.key, now_ns) if entry.pinned_until or self._pins else 0
            if until > now_ns:
                self._put(entry, _PINNED)
                heapq.heappush(self._ends, (until, entry.key))
            elif from_small and entry.frequency >= EVICT_PROMOTE_FROM:
                entry.frequency = 0
                self._put(entry, _MAIN)
            elif not from_small and entry.frequency:
                entry.frequency -= 1
                self._put(entry, _MAIN)
            else:
                del self._entries[entry.key]
                found.append(entry.key)
                if from_small:
                    self._ghosts[entry.key] = None
        while len(self._ghosts) > len(self._entries):
            self._ghosts.popitem(last=False)
        return found

    # -- hotness

    def dump(self) -> bytes:
        """What `load` takes: at most HOTNESS_BYTES_MAX; of more than HOTNESS_KEYS_MAX extents those that go last."""
        pinned = [entry for entry in self._entries.values() if entry.queue == _PINNED]
        rows: list[list[tuple[int, int, int, int]]] = []
        room = HOTNESS_KEYS_MAX
        for entries in (pinned, self._living(_MAIN), self._living(_SMALL)):
            first = max(0, len(entries) - room)
            rows.append([(*one.key, one.frequency, one.pinned_until) for one in islice(entries, first, None)])
            room -= len(rows[-1])
        ghosts = list(islice(self._ghosts, max(0, len(self._ghosts) - room), None))
        pins = [(*key, until) for key, until in islice(self._pins.items(), HOTNESS_KEYS_MAX // 10)]
        body = msgspec.msgpack.encode(_Hotness(rows[0], rows[1], rows[2], ghosts, pins))
        return _MAGIC + blake3(_MAGIC + body).digest() + body

    def load(self, data: bytes) -> bool:
        """Take over the order of victims from a dump, in place of what is known; of anything else nothing: False.

        What is no longer here is to be forgotten by the caller, and what the dump does not name to be adopted.
        """
        hotness = _parsed(data)
        if hotness is None:
            return False
        self.clear()
        self._pins = {(pack, extent): until for pack, extent, until in hotness.pins}
        for queue, rows in ((_SMALL, hotness.small), (_MAIN, hotness.main), (_PINNED, hotness.pinned)):
            for pack, extent, frequency, until in rows:
                self._put(_Entry((pack, extent), queue, 0, frequency, until), queue)
                if queue == _PINNED:
                    self._ends.append((max(until, self._pins.get((pack, extent), 0)), (pack, extent)))
        heapq.heapify(self._ends)
        self._ghosts = OrderedDict.fromkeys(key for key in hotness.ghosts if key not in self._entries)
        return True

    # -- within

    def _admit(self, key: Extent, tick: int) -> None:
        queue = _SMALL
        if key in self._ghosts:
            del self._ghosts[key]
            queue = _MAIN
        self._put(_Entry(key, queue, tick), queue)

    def _put(self, entry: _Entry, queue: int) -> None:
        self._entries[entry.key] = entry
        entry.queue = queue
        self._count[queue] += 1
        if queue != _PINNED:
            self._queues[queue].append(entry)

    def _living(self, queue: int) -> deque[_Entry]:
        return deque(entry for entry in self._queues[queue] if entry.queue == queue)

    def _pinned_until(self, key: Extent, now_ns: int) -> int:
        entry, until = self._entries.get(key), self._pins.get(key, 0)
        # Touches pin no longer than this: more is a clock that was put back, or a dump that lies.
        if entry is not None and until < entry.pinned_until <= now_ns + PIN_STRETCH * PIN_FOR_NS:
            return entry.pinned_until
        return until

    def _release(self, now_ns: int) -> None:
        """Back into main with those whose pins have ended; forget the ends of pins when they have become many."""
        while self._ends and self._ends[0][0] <= now_ns:
            key = heapq.heappop(self._ends)[1]
            entry = self._entries.get(key)
            if entry is not None and entry.queue == _PINNED:
                until = self._pinned_until(key, now_ns)
                if until > now_ns:
                    heapq.heappush(self._ends, (until, key))
                else:
                    self._count[_PINNED] -= 1
                    self._put(entry, _MAIN)
        if len(self._pins) > 2 * self._pins_swept:
            self._pins = {key: until for key, until in self._pins.items() if until > now_ns}
            self._pins_swept = len(self._pins) + 64


def _parsed(data: bytes) -> _Hotness | None:
    """A dump's content; None when it is not one, is damaged, or cannot be of this policy."""
    head = len(_MAGIC) + _DIGEST
    if not head < len(data) <= HOTNESS_BYTES_MAX or data[: len(_MAGIC)] != _MAGIC:
        return None
    if blake3(_MAGIC + data[head:]).digest() != data[len(_MAGIC) : head]:
        return None
    try:
        found = _decoder.decode(data[head:])
    except MALFORMED:
        return None
    rows = [*found.small, *found.main, *found.pinned]
    sound = (
        len({row[:2] for row in rows}) == len(rows) <= HOTNESS_KEYS_MAX
        and all(min(row) >= 0 and row[2] <= EVICT_FREQUENCY_MAX for row in rows)
        and len(found.ghosts) <= HOTNESS_KEYS_MAX
    )
    return found if sound else None
