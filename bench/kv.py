"""KV caches as memory: what a model says from a cache that was stored, bytes of shared prefixes, speed, look-up.

The model rows run SmolLM2-135M-Instruct in numpy (bench/kv_data.py) on prose; without its weights they say so. Bytes
and speed without the model are of normal noise in the shape of its cache: only their number and entropy matter there.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

import him
from bench import kv_cold, kv_data
from bench.codecs import _divergence
from bench.measure import Row, Rows, Took, interleaved, missing, percentile, row, share, took
from him import kv

Floats = NDArray[np.float32]
PROMPT, GREEDY, TAIL = 1_024, 64, 128
STARTS = (512, 640, 800, 1_024)
"""Tokens of the cache that are loaded before the model goes on."""
LAYERS, HEADS, DIM = 30, 3, 64
SPEED_TOKENS, ROUNDS = 4_096, 5
CACHES, CACHE_TOKENS, SYSTEM_PROMPTS, SEARCHES = 10_000, 4_000, 100, 1_000


def run(*, tiny: bool = False) -> Rows:
    """Rows of what the model says, of the same from S3, of bytes, of speed and of looking up."""
    yield from _said(tiny=tiny)
    yield from kv_cold.run(tiny=tiny)
    yield from _branches(tiny=tiny)
    yield from _speed(tiny=tiny)
    yield from _found(tiny=tiny)


# -- what the model says


def _said(*, tiny: bool) -> Rows:
    """A tiny run leaves the model out: loading it alone takes longer than all else together."""
    metrics = (
        "lossless: logits equal bit for bit", "int8: equal tokens, greedy", "int8: KL to lossless",
        "two branches of a real prefix: bytes against one",
    )  # fmt: skip
    units = ("share", "share", "nats", "× bytes")
    try:
        if tiny:
            raise kv_data.Missing("a tiny run leaves the model out")
        network = kv_data.model()
        cache = kv_data.kv_cache(PROMPT)
    except kv_data.Missing as error:
        yield from (missing("kv", metric, unit, str(error)) for metric, unit in zip(metrics, units, strict=True))
        return
    tokens = network.tokens(kv_data.text())
    prompt = tokens[:PROMPT]
    binding = kv.Binding(
        network.digest, f"gguf:{network.digest}", f"rope base {network.shape.rope_base}, pairs (2i, 2i + 1)",
        "float32", network.shape.layers, network.shape.kv_heads, network.shape.dim,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name, him.open(Path(name) / "memory.him", create=True) as repo:
        work = repo.writable("main")
        kv.save(work, "exact", cache, prompt, binding)
        kv.save(work, "int8", cache, prompt, binding, "int8")
        alike = equal = next_equal = 0
        divergence: list[float] = []
        spoken: set[int] = set()
        for begin in STARTS:
            exact, coarse = (kv.load(work, one, binding, tokens=begin).tensor for one in ("exact", "int8"))
            true, after = np.ascontiguousarray(cache[:, :, :, :begin]), tokens[begin : begin + 1]
            if exact.tobytes() != true.tobytes():
                raise AssertionError("a lossless cache gives other bytes back")
            said, logits = network.greedy(after, true, GREEDY)
            _, same_logits = network.greedy(after, np.asarray(exact), GREEDY)
            alike += sum(a.tobytes() == b.tobytes() for a, b in zip(logits, same_logits, strict=True))
            short, _ = network.greedy(after, np.asarray(coarse), GREEDY)
            equal += sum(a == b for a, b in zip(said, short, strict=True))
            (truth, _), (told, _) = (network.forward([*after, *said[:-1]], np.asarray(one)) for one in (true, coarse))
            next_equal += int((truth.argmax(axis=1) == told.argmax(axis=1)).sum())
            divergence.append(_divergence(truth, told))
            spoken.update(said)
    of = GREEDY * len(STARTS)
    yield share("kv", metrics[0], alike, of) | {"goal": "all", "holds": alike == of}
    yield share("kv", metrics[1], equal, of, distinct=len(spoken))
    yield share("kv", "int8: equal next token, on the lossless continuation", next_equal, of)
    yield row("kv", metrics[2], float(f"{np.mean(divergence):.2g}"), units[2], of=of, each=divergence)
    grown: list[Floats] = []
    for start in (PROMPT, PROMPT + TAIL):
        grown.append(network.forward(tokens[start : start + TAIL], cache)[1])
    rows = [tokens[:PROMPT] + tokens[start : start + TAIL] for start in (PROMPT, PROMPT + TAIL)]
    yield _twice(metrics[3], grown, rows, binding)


# -- bytes


def _binding(dtype: str = "float32", layers: int = LAYERS, heads: int = HEADS, dim: int = DIM) -> kv.Binding:
    return kv.Binding("noise", "noise", "none", dtype, layers, heads, dim)


def _noise(tokens: int, seed: int) -> Floats:
    made = np.random.default_rng(seed).standard_normal((LAYERS, 2, HEADS, tokens, DIM), dtype=np.float32)
    return np.asarray(made)


def _branches(*, tiny: bool) -> Rows:
    """Two caches with k whole tiles in common, and a tail each, on two branches."""
    for shared in (512, 600) if tiny else (512, 1_024, 1_300, 2_048):
        prefix = _noise(shared, 1)
        both = [np.concatenate([prefix, _noise(TAIL, seed)], axis=3) for seed in (2, 3)]
        ids = [[*range(shared), *(10**6 + seed * TAIL + n for n in range(TAIL))] for seed in (2, 3)]
        yield _twice(f"two branches, {shared} tokens shared + {TAIL} each: bytes against one", both, ids, _binding())


def _twice(metric: str, both: Sequence[Floats], ids: Sequence[Sequence[int]], binding: kv.Binding) -> Row:
    """Bytes of the second cache, on a branch, and what its own tokens from its last shared tile on come to."""
    with tempfile.TemporaryDirectory() as name, him.open(Path(name) / "memory.him", create=True) as repo:
        kv.save(repo.writable("main"), "chat", both[0], ids[0], binding)
        one = repo.stored_bytes()
        kv.save(repo.branch("other", source="main"), "chat", both[1], ids[1], binding)
        two = repo.stored_bytes()
        for branch, tensor in zip(("main", "other"), both, strict=True):
            if kv.load(repo.snapshot(branch), "chat", binding).tensor.tobytes() != tensor.tobytes():
                raise AssertionError(f"{branch} gives another cache back")
    count = both[1].shape[3]
    common = next((at for at in range(count) if ids[0][at] != ids[1][at]), count)
    own = both[1].nbytes // count * (count - common // 512 * 512)
    return row(
        "kv", metric, round(two / one, 4), "× bytes", one_bytes=one, second_bytes=two - one, tail_tiles_bytes=own,
        over_bytes=two - one - own, goal="second <= its own tiles + 64 KiB", holds=two - one <= own + 2**16,
    )  # fmt: skip


# -- speed


def _speed(*, tiny: bool) -> Rows:
    """Durable save and verified load of a float32 cache, beside numpy's file (synced; read unverified)."""
    tokens, rounds = (64, 1) if tiny else (SPEED_TOKENS, ROUNDS)
    ids, size = list(range(tokens)), LAYERS * 2 * HEADS * DIM * 4 * tokens
    with tempfile.TemporaryDirectory() as name, him.open(Path(name) / "memory.him", create=True) as repo:
        work = repo.writable("main")
        ways = {"lossless": "", "int8": "int8"}
        # One round more, which is not counted: memory and code are warm then.
        noise = {way: [_noise(tokens, 10 * at + n) for n in range(rounds + 1)] for at, way in enumerate([*ways, "npy"])}

        def npy(number: int) -> None:
            with (Path(name) / f"{number}.npy").open("wb") as file:
                np.save(file, noise["npy"][number])
                file.flush()
                os.fsync(file.fileno())

        def saved(way: str, number: int) -> Took:
            return took(lambda: kv.save(work, f"{way}-{number}", noise[way][number], ids, _binding(), ways[way]))

        def loaded(way: str, number: int) -> Took:
            return took(lambda: kv.load(work, f"{way}-{number}", _binding()))

        saves = {way: (lambda number, way=way: saved(way, number)) for way in ways}
        loads = {way: (lambda number, way=way: loaded(way, number)) for way in ways}
        save_s = interleaved({**saves, "npy": lambda number: took(lambda: npy(number))}, rounds + 1)
        load_s = interleaved(
            {**loads, "npy": lambda number: took(lambda: np.load(Path(name) / f"{number}.npy"))}, rounds + 1
        )
    for what, found, other in (("save", save_s, "np.save + fsync"), ("load", load_s, "np.load, unverified")):
        for way in ways:
            ours, theirs = ([size / one.wall / 1e9 for one in found[side][1:]] for side in (way, "npy"))
            ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
            metric = f"{what}, {way}, against {other}"
            yield row(
                "kv", metric, round(median(ours), 3), "GB/s", against=round(median(theirs), 3),
                ratio=round(ratio, 3), ratio_of="speed, ours / theirs", bytes=size, tokens=tokens,
            )  # fmt: skip


# -- look-up


def _found(*, tiny: bool) -> Rows:
    """The longest prefix among many caches: the first search of a process, later ones, and after one save."""
    count, length, prompts, searches = (60, 200, 3, 20) if tiny else (CACHES, CACHE_TOKENS, SYSTEM_PROMPTS, SEARCHES)
    binding = _binding("float16", 1, 1, 1)
    rng = np.random.default_rng(7)
    begins = rng.integers(0, 49_152, (prompts, length // 2))
    ids = np.concatenate(
        [begins[np.arange(count) % prompts], rng.integers(0, 49_152, (count, length - length // 2))], 1
    )
    tensor = np.zeros((1, 2, 1, length, 1), dtype=np.float16)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "memory.him"
        with him.open(path, create=True) as repo:
            work = repo.writable("main")
            for number in range(count):
                tensor[...] = number % 60_000
                kv.save(work, f"chat-{number}", tensor, ids[number], binding)
        with him.open(path) as repo:
            work = repo.writable("main")
            first = took(lambda: kv.longest_prefix(work, ids[0], binding)).wall
            held = sum(len(place.tokens) for place in kv._orders_of(work.parts.store).at(work.reader)[binding])
            later: list[float] = []
            for number in rng.integers(0, count, searches):
                cut = int(rng.integers(1, length))
                asked = np.concatenate([ids[number, :cut], [49_152]])
                began = time.perf_counter()
                found = kv.longest_prefix(work, asked, binding)
                later.append(time.perf_counter() - began)
                if found is None or found.tokens != cut:
                    raise AssertionError(f"{cut} tokens are shared, found was {found}")
            kv.save(work, "new", tensor, ids[0], binding)
            after = took(lambda: kv.longest_prefix(work, ids[0], binding)).wall
    what = {"caches": count, "tokens": length}
    yield row("kv", "longest prefix: first search of a process", round(first * 1e3, 2), "ms", **what, held_bytes=held)
    yield row(
        "kv", "longest prefix: later searches, p50", round(median(later) * 1e3, 4), "ms", **what,
        p95=round(percentile(later, 95) * 1e3, 4),
    )  # fmt: skip
    yield row("kv", "longest prefix: first search after a save", round(after * 1e3, 3), "ms", **what)
