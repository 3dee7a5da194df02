"""Hit ratios of the warm tier's eviction without hints, beside Belady's optimum, LRU and FIFO; what a decision costs.

Every policy sees the same trace and starts empty; first touches count as misses, as everywhere in the literature.
Belady's optimum is exact: it looks ahead, and need not keep what it fetched.
"""

import heapq
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
from numpy.typing import NDArray

from bench.examples import goals, repository
from bench.measure import Row, Rows, row
from him.config import TOUCH_GRAIN_NS
from him.tier.evict import EvictionPolicy, Extent

Trace = list[Extent]
SHARES = (1, 10, 25)
"""Cache sizes in percent of a trace's footprint."""
OPTIMUM_SHARE = 0.75
_PACK = 256
"""Extents of a pack."""
_RECORD = 64
"""Extents that a record of 16 MiB takes."""
_STEP_NS = TOUCH_GRAIN_NS
"""Between touches, so that each of them counts."""


def run(*, tiny: bool = False) -> Rows:
    """Rows by trace and cache size, then what touches, victims and entries cost."""
    for name, trace in _traces(2_000 if tiny else 20_000, 10_000 if tiny else 300_000):
        footprint = len(set(trace))
        for share in SHARES:
            yield from _compared(name, trace, max(1, footprint * share // 100), f"{share} %")
    length = 5_000 if tiny else 100_000
    for share in SHARES:
        room = length // 10 * share // 100
        yield from _compared("loop 1.1 × the cache", _loop(room, length), room, f"{share} %")
    trace = _examples(tiny=tiny)
    for share in SHARES:
        room = max(1, len(set(trace)) * share // 100)
        yield from _compared("example queries, 4 KiB", trace, room, f"{share} %")
    yield from _costs(20_000 if tiny else 200_000)


# -- traces


def _traces(keys: int, length: int) -> Iterator[tuple[str, Trace]]:
    rng = np.random.default_rng(20231023)
    for exponent in (0.8, 1.0, 1.2):
        yield f"Zipf {exponent}", _named(_zipf(rng, keys, length, exponent))
    yield "Zipf 1.0 and scans", _named(_scanned(rng, keys, length, record=1))
    yield "Zipf 1.0 and scans of small records", _named(_scanned(rng, keys, length, record=8))
    yield "Zipf 1.0 of records of 64 extents", _named(_records(rng, keys, length))
    yield "shifting working set", _named(_shifting(rng, keys, length))


def _named(numbers: NDArray[np.int64]) -> Trace:
    return [divmod(number, _PACK) for number in numbers.tolist()]


def _zipf(rng: np.random.Generator, keys: int, length: int, exponent: float) -> NDArray[np.int64]:
    """Independent draws of `keys` keys, the k-th with a weight of k^-exponent, scattered over the packs."""
    weights = np.arange(1, keys + 1) ** -exponent
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(length))
    return rng.permutation(keys)[np.minimum(ranks, keys - 1)]


def _scanned(rng: np.random.Generator, keys: int, length: int, record: int) -> NDArray[np.int64]:
    """Zipf 1.0; a third of the touches are scans over keys of their own, each `record` times in a row."""
    run = length // 30
    scans = np.repeat(keys + np.arange(10 * run // record + 10), record)
    parts = np.split(_zipf(rng, keys, 20 * run, 1.0), 10)
    return np.concatenate([p for n, part in enumerate(parts) for p in (part, scans[n * run : (n + 1) * run])])


def _records(rng: np.random.Generator, keys: int, length: int) -> NDArray[np.int64]:
    """Records of 64 neighbouring extents each, read whole."""
    records = _zipf(rng, keys // _RECORD, length // _RECORD, 1.0)
    return (records[:, None] * _RECORD + np.arange(_RECORD)).ravel()


def _shifting(rng: np.random.Generator, keys: int, length: int) -> NDArray[np.int64]:
    """A window of a tenth of the keys that slides over all of them: uniform within."""
    window = keys // 10
    begins = np.arange(length) * (keys - window) // length
    return begins + rng.integers(0, window, length)


def _loop(room: int, length: int) -> Trace:
    return _named(np.arange(length) % max(room + 1, room * 11 // 10))


def _examples(*, tiny: bool) -> Trace:
    """What the shipped goals read from packs, in a new process's order, asked in ten rounds of random order.

    The screens' repository is small: pieces of 4 KiB stand for extents of 256.
    """
    rng, asked, found = np.random.default_rng(7), goals(tiny=tiny), Trace()
    with repository(tiny=tiny) as repo:
        store = repo._store
        read, packs = store._read, dict[str, int]()

        def noted(blob, ref, name, at, **more):
            pack = packs.setdefault(name, len(packs))
            found.extend((pack, piece) for piece in range(at.offset >> 12, (at.offset + at.length - 1 >> 12) + 1))
            return read(blob, ref, name, at, **more)

        store._read = noted
        for _ in range(2 if tiny else 10):
            for number in rng.permutation(len(asked)):
                # Pages that the process has kept would never ask the tier again.
                for kept in (store._pages, store._parsed, store.leaves):
                    kept.clear()
                repo.query(asked[number]["goal"], "main", frame=asked[number]["frame"], budget_ms=2_000)
    return found


# -- policies


def _ours(trace: Trace, room: int, step_ns: int = _STEP_NS) -> int:
    policy, hits, now = EvictionPolicy(), 0, 0
    for key in trace:
        now += step_ns
        if key in policy:
            hits += 1
        elif len(policy) >= room:
            policy.victims(len(policy) + 1 - room, now)
        policy.touch((key,), now)
    return hits


def _lru(trace: Trace, room: int) -> int:
    kept, hits = OrderedDict[Extent, None](), 0
    for key in trace:
        if key in kept:
            hits += 1
            kept.move_to_end(key)
            continue
        if len(kept) >= room:
            kept.popitem(last=False)
        kept[key] = None
    return hits


def _fifo(trace: Trace, room: int) -> int:
    kept, hits = OrderedDict[Extent, None](), 0
    for key in trace:
        if key in kept:
            hits += 1
            continue
        if len(kept) >= room:
            kept.popitem(last=False)
        kept[key] = None
    return hits


def _belady(trace: Trace, room: int) -> int:
    """Keep what is wanted soonest; a heap of next uses, the outdated passed over."""
    following, later = [0] * len(trace), dict[Extent, int]()
    for at in range(len(trace) - 1, -1, -1):
        following[at] = later.get(trace[at], len(trace) + at)
        later[trace[at]] = at
    kept, ends, hits = dict[Extent, int](), list[tuple[int, Extent]](), 0
    for key, upcoming in zip(trace, following, strict=True):
        hits += key in kept
        kept[key] = upcoming
        heapq.heappush(ends, (-upcoming, key))
        while len(kept) > room:
            last, furthest = heapq.heappop(ends)
            if kept.get(furthest) == -last:
                del kept[furthest]
    return hits


# -- rows


def _compared(name: str, trace: Trace, room: int, size: str) -> Iterator[Row]:
    """Ours as a share of the optimum's hits, and beside LRU."""
    ours, lru, fifo, best = (policy(trace, room) / len(trace) for policy in (_ours, _lru, _fifo, _belady))
    judged = (name, size) == ("Zipf 1.0", "10 %")
    of_best, more = ours / best if best else 1.0, {"extents": room, "fifo": round(fifo, 4), "touches": len(trace)}
    yield row(
        "evict", f"{name}, cache {size}: of Belady's hits", round(ours, 4), "hit ratio", against=round(best, 4),
        ratio=round(of_best, 3), goal=f"ours / Belady >= {OPTIMUM_SHARE}" if judged else "",
        holds=of_best >= OPTIMUM_SHARE if judged else None, **more,
    )  # fmt: skip
    yield row(
        "evict", f"{name}, cache {size}: beside LRU", round(ours, 4), "hit ratio", against=round(lru, 4),
        ratio=round(ours / lru, 3) if lru else None, goal="ours / LRU >= 1", holds=ours >= lru, **more,
    )  # fmt: skip


def _costs(keys: int) -> Iterator[Row]:
    """What one key costs, in batches of a record's extents; and the memory of a full policy."""
    rng, records = np.random.default_rng(3), keys // _RECORD
    keys = records * _RECORD
    batches = [_named(record * _RECORD + np.arange(_RECORD)) for record in rng.permutation(records)]
    # The keys are the policy's, too: they are made while it is counted.
    tracemalloc.start()
    policy, now = EvictionPolicy(), 0
    for batch in batches:
        now += _STEP_NS
        policy.touch([(pack, extent) for pack, extent in batch], now)
    resident = tracemalloc.get_traced_memory()[0] / keys
    policy.victims(keys // 2, now)
    both = tracemalloc.get_traced_memory()[0] / keys * 2
    tracemalloc.stop()
    yield row("evict", "memory of an extent that is here", round(resident), "bytes", extents=keys)
    yield row("evict", "memory of an extent that is here and of its ghost", round(both), "bytes", extents=keys // 2)
    yield row("evict", "saved hotness of an extent and its ghost", round(len(policy.dump()) / keys * 2, 1), "bytes")
    took: dict[str, list[float]] = {name: [] for name in ("admission", "hit", "hit in the same second", "victim")}
    for _ in range(5):
        policy = EvictionPolicy()
        for at, name in enumerate(("admission", "hit", "hit in the same second")):
            took[name].append(_each(lambda b, p=policy, at=at: p.touch(b, min(at + 1, 2) * _STEP_NS), batches, keys))
        gone = [[_RECORD]] * records
        took["victim"].append(_each(lambda b, p=policy: p.victims(b[0], 3 * _STEP_NS), gone, keys))
    for name, values in took.items():
        yield row("evict", f"{name}, {_RECORD} keys at once", round(median(values), 3), "µs a key", keys=keys)
    singles = [[key] for key in _named(rng.permutation(keys))]
    policy = EvictionPolicy()
    for at, name in enumerate(("admission", "hit")):
        value = _each(lambda b, p=policy, at=at: p.touch(b, (at + 1) * _STEP_NS), singles, keys)
        yield row("evict", f"{name}, one key at once", round(value, 3), "µs a key", keys=keys)


def _each(work: Callable[[list], object], batches: list[list], keys: int) -> float:
    began = time.perf_counter()
    for batch in batches:
        work(batch)
    return (time.perf_counter() - began) / keys * 1e6
