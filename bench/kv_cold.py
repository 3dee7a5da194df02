"""KV caches that outlive their process and their disk: saved, evicted and continued from S3, by three processes.

    python -m bench.kv_cold ROLE FOLDER [--small]     one of the processes, with the bucket of `bench.s3` in tier.json

*save* runs the model over a text, keeps what it says next from each beginning of the cache, saves the cache losslessly
and as int8, and a fork of it on another branch. *evict* copies everything to S3 and frees it here. *continue* reads the
caches back from S3 alone and goes on from them; what it says is compared with what *save* kept, which never saw a
repository. Requests go over the loopback: the GB/s are those of the server, the digests and the disk, not of a network.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

import him
from bench import kv_data
from bench.codecs import _divergence
from bench.cold import _credentials
from bench.kv_data import Model, Shape
from bench.measure import Rows, missing, row, share
from bench.s3 import binary, serve
from him import kv

Floats = NDArray[np.float32]
BUDGET: Final = 512 * 1024 * 1024
TAIL: Final = 128
GREEDY: Final = 64
METRICS: Final = (
    ("from S3, lossless: logits equal bit for bit", "share"),
    ("from S3, int8: equal tokens, greedy", "share"),
    ("from S3, int8: KL to lossless", "nats"),
    ("from S3: two branches of one prefix, bytes against one", "× bytes"),
    ("to S3: push and read back", "GB/s"),
    ("from S3: verified load, lossless", "GB/s"),
)


class Small(Model):
    """A network of the same build with random weights: what it says means nothing, but every bit of it counts."""

    def __init__(self) -> None:
        rng, self.shape = np.random.default_rng(11), Shape(3, 4, 2, 32, 1e4, 1e-5)
        width, narrow, words = 128, 64, 300
        sizes = {
            "attn_q": (width, width), "attn_k": (narrow, width), "attn_v": (narrow, width),
            "attn_output": (width, width), "ffn_gate": (256, width), "ffn_up": (256, width), "ffn_down": (width, 256),
            "attn_norm": (width,), "ffn_norm": (width,),
        }  # fmt: skip
        named = {
            f"blk.{layer}.{name}.weight": size for layer in range(self.shape.layers) for name, size in sizes.items()
        }
        named |= {"token_embd.weight": (words, width), "output_norm.weight": (width,)}
        self.weights = {
            name: np.asarray(rng.standard_normal(size, dtype=np.float32) / (np.sqrt(size[-1]) if len(size) > 1 else 1))
            for name, size in named.items()
        }
        self.digest = blake3(b"".join(weight.tobytes() for weight in self.weights.values())).hexdigest()

    def tokens(self, text: str) -> list[int]:
        """Any ids do: letters."""
        return [ord(letter) % 300 for letter in text]


def run(*, tiny: bool = False) -> Rows:
    """Rows of what is said from S3, of bytes and of speed; a tiny run takes a network of random weights."""
    try:
        binary()
        if not tiny:
            kv_data.model()
    except (FileNotFoundError, kv_data.Missing) as error:
        yield from (missing("kv", metric, unit, str(error)) for metric, unit in METRICS)
        return
    with (
        tempfile.TemporaryDirectory(prefix="him-kv-") as name,
        _credentials(),
        serve(Path(name) / "s3") as (server, _),
    ):
        folder = Path(name) / "memory"
        with him.open(folder, create=True) as repo:
            repo.set_tier(server.url("kv"), BUDGET)
        told = [process(role, folder, small=tiny) for role in ("save", "evict", "continue")]
        yield from _rows(*told)


def process(role: str, folder: Path, *, small: bool) -> dict[str, Any]:
    """What a process of its own tells. Raises RuntimeError when it failed."""
    command = [sys.executable, "-m", "bench.kv_cold", role, str(folder), *(["--small"] if small else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=kv_data.ROOT)
    if done.returncode:
        raise RuntimeError(f"{role} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _rows(saved: dict[str, Any], evicted: dict[str, Any], found: dict[str, Any]) -> Rows:
    (exact, _), (greedy, _), (nats, _), (twice, _), (push, _), (load, _) = METRICS
    bound = {"tokens": saved["tokens"], "warm_bytes_when_evicted": evicted["warm"], "fetched_bytes": found["fetched"]}
    whole = found["alike"] == found["of"] and evicted["warm"] == 0 and found["fetched"] > 0
    yield share("kv", exact, found["alike"], found["of"], **bound, begins=saved["begins"]) | {
        "goal": "all, from bytes that were only in S3", "holds": whole,
    }  # fmt: skip
    yield share("kv", greedy, found["equal"], found["of"])
    yield row("kv", nats, float(f"{found['nats']:.2g}"), "nats", of=found["of"])
    one, both, own = saved["one"], saved["both"], saved["own"]
    yield row(
        "kv", twice, round(both / one, 4), "× bytes", one_bytes=one, second_bytes=both - one, tail_tiles_bytes=own,
        goal="second <= its own tiles + 128 KiB", holds=both - one <= own + 2**17,
    )  # fmt: skip
    yield row("kv", push, round(evicted["pushed"] / evicted["push_s"] / 1e9, 3), "GB/s", bytes=evicted["pushed"])
    yield row(
        "kv", load, round(found["bytes"] / found["load_s"] / 1e9, 3), "GB/s", bytes=found["bytes"],
        against=round(found["bytes"] / found["again_s"] / 1e9, 3), against_what="the same once more, now here",
    )  # fmt: skip


# -- the three processes


def _model(*, small: bool) -> tuple[Model, kv.Binding, list[int], list[int]]:
    """Network, binding, token ids of the text, and the lengths of the cache it goes on from."""
    network = Small() if small else kv_data.model()
    shape = network.shape
    binding = kv.Binding(
        network.digest, f"gguf:{network.digest}", f"rope base {shape.rope_base}, pairs (2i, 2i + 1)",
        "float32", shape.layers, shape.kv_heads, shape.dim,
    )  # fmt: skip
    return network, binding, network.tokens(kv_data.text()), [512, 600] if small else [512, 640, 800, 1_024]


def save(folder: Path, *, small: bool) -> dict[str, Any]:
    """Compute, keep what is said from the cache in memory, save, end."""
    network, binding, tokens, begins = _model(small=small)
    count = begins[-1]
    _, cache = network.forward(tokens[:count])
    for begin in begins:
        said, logits = network.greedy(tokens[begin : begin + 1], np.ascontiguousarray(cache[:, :, :, :begin]), GREEDY)
        np.savez(folder.parent / f"said-{begin}.npz", said=said, logits=logits)
    forks = [tokens[:count] + tokens[at : at + TAIL] for at in (count, count + TAIL)]
    grown = [network.forward(fork[count:], cache)[1] for fork in forks]
    with him.open(folder) as repo:
        kv.save(repo.writable("one"), "chat", grown[0], forks[0], binding)
        one = repo.stored_bytes()
        kv.save(repo.branch("other", source="one"), "chat", grown[1], forks[1], binding)
        both = repo.stored_bytes()
        kv.save(repo.writable("main"), "exact", cache, tokens[:count], binding)
        kv.save(repo.writable("main"), "int8", cache, tokens[:count], binding, "int8")
    own = grown[1].nbytes // (count + TAIL) * (count + TAIL - count // 512 * 512)
    return {"tokens": count, "begins": begins, "own": own, "one": one, "both": both}


def evict(folder: Path, *, small: bool) -> dict[str, Any]:
    """Copy everything to S3 and free it here."""
    with him.open(folder) as repo:
        began = time.perf_counter()
        repo.tier.push(all=True)
        push_s = time.perf_counter() - began
        repo.tier.demote()
        status = repo.tier.status()
        if status.only_warm_packs:
            raise RuntimeError(f"{status.only_warm_packs} packs are not in S3")
    return {"warm": status.warm_bytes, "pushed": status.cold_bytes, "push_s": push_s}


def continue_(folder: Path, *, small: bool) -> dict[str, Any]:
    """Load each beginning and say what follows."""
    network, binding, tokens, begins = _model(small=small)
    alike = equal = 0
    nats: list[float] = []
    with him.open(folder) as repo:
        main = repo.snapshot("main")
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            whole = kv.load(main, "exact", binding).tensor
            seconds.append(time.perf_counter() - began)
        for begin in begins:
            exact, coarse = (kv.load(main, name, binding, tokens=begin).tensor for name in ("exact", "int8"))
            with np.load(folder.parent / f"said-{begin}.npz") as kept:
                said, logits = [int(one) for one in kept["said"]], kept["logits"]
            first = tokens[begin : begin + 1]
            _, same = network.greedy(first, np.asarray(exact), GREEDY)
            alike += sum(a.tobytes() == b.tobytes() for a, b in zip(logits, same, strict=True))
            short, _ = network.greedy(first, np.asarray(coarse), GREEDY)
            equal += sum(a == b for a, b in zip(said, short, strict=True))
            truth, told = (network.forward([*first, *said[:-1]], np.asarray(one))[0] for one in (exact, coarse))
            nats.append(_divergence(truth, told))
        fetched = repo.tier.status().fetched_bytes
    return {
        "alike": alike, "equal": equal, "of": GREEDY * len(begins), "nats": float(np.mean(nats)), "fetched": fetched,
        "bytes": whole.nbytes, "load_s": seconds[0], "again_s": seconds[1],
    }  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """One role."""
    role, folder = arguments[0], Path(arguments[1])
    work = {"save": save, "evict": evict, "continue": continue_}[role]
    print(json.dumps(work(folder, small="--small" in arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
