"""Codecs on real data: size and speed of each, what quantising costs, and which one HIM takes for which stream.

    python -m bench codecs             measure
    python -m bench codecs --write     and put the tables into docs/design/007-codecs.md

Screens are the shipped ones in tiles; the KV cache is SmolLM2's own (bench/kv_data.py); scenes, vectors and logs are
what HIM made of the shipped screens. Every candidate must give the bytes back.
"""

import importlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

import him
from bench import kv_data
from bench.examples import goals, screens
from bench.measure import Row, Rows, missing, row
from him.adapters.minilm import MiniLmEncoder
from him.adapters.pillow import PillowDecoder
from him.catalog.reader import kv_plane, kv_tensor
from him.config import EMBEDDING_DIMS, RAW_BELOW_RATIO
from him.index import row_texts
from him.tile import codec
from him.types import Scene

Array = NDArray[Any]
Floats = NDArray[np.float32]
PAGE = Path(__file__).parent.parent / "docs" / "design" / "007-codecs.md"
ROUNDS = 3
KV_TOKENS, NEXT_TOKENS = 1_024, 128
LINES_A_DOCUMENT = 100


class Data(NamedTuple):
    """Tiles or documents of one stream as they would be put."""

    name: str
    items: Sequence[Array]


class Candidate(NamedTuple):
    """A way to store an item: to bytes and back to equal values."""

    name: str
    pack: Callable[[Array], bytes]
    unpack: Callable[[bytes, Array], Array]
    fits: Callable[[Array], bool] = lambda item: True


# -- candidates


def _zstd(level: int) -> Candidate:
    packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return Candidate(
        f"zstd {level}",
        lambda item: packer.compress(_bytes(item).data),
        lambda data, like: _like(np.frombuffer(unpacker.decompress(data), np.uint8), like),
    )


def _filtered(
    name: str, forth: Callable[[Array], Array], back: Callable[[Array, Array], Array], fits: Any
) -> Candidate:
    packer, unpacker = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    return Candidate(
        f"{name} + zstd 1",
        lambda item: packer.compress(np.ascontiguousarray(forth(item)).data),
        lambda data, like: back(np.frombuffer(unpacker.decompress(data), np.uint8), like),
        fits,
    )


def _bitshuffled() -> Candidate | None:
    """Bit planes and zstd 1 by Blosc, when numcodecs (which comes with zarr) is installed."""
    try:
        library: Any = importlib.import_module("numcodecs")
    except ImportError:
        return None
    blosc = library.Blosc(cname="zstd", clevel=1, shuffle=library.Blosc.BITSHUFFLE)
    return Candidate(
        "bitshuffle + zstd 1 (Blosc)",
        lambda item: blosc.encode(np.ascontiguousarray(item).view(_plain(item))),
        lambda data, like: _like(np.frombuffer(blosc.decode(data), np.uint8), like),
        lambda item: item.ndim > 1,
    )


def _webp() -> Candidate:
    cv2: Any = importlib.import_module("cv2")
    return Candidate(
        "WebP, lossless",
        lambda item: cv2.imencode(".webp", item, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes(),
        lambda data, like: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED),
        _pixels,
    )


def candidates() -> list[Candidate]:
    """What is tried; each names what it fits."""
    left = _filtered(
        "difference to the left", lambda item: np.diff(item, axis=1, prepend=np.uint8(0)),
        lambda data, like: np.cumsum(data.reshape(like.shape), axis=1, dtype=np.uint8), _pixels,
    )  # fmt: skip
    above = _filtered(
        "difference to above", lambda item: np.diff(item, axis=0, prepend=np.uint8(0)),
        lambda data, like: np.cumsum(data.reshape(like.shape), axis=0, dtype=np.uint8), _pixels,
    )  # fmt: skip
    planes = _filtered(
        "colour planes", lambda item: item.transpose(2, 0, 1),
        lambda data, like: np.ascontiguousarray(data.reshape(3, *like.shape[:2]).transpose(1, 2, 0)), _pixels,
    )  # fmt: skip
    shuffle = _filtered(
        "shuffle", lambda item: codec._shuffled(_bytes(item), item.itemsize),
        lambda data, like: _like(codec._unshuffled(data, like.itemsize), like), lambda item: item.itemsize > 1,
    )  # fmt: skip
    raw = Candidate("raw", lambda item: item.tobytes(), lambda data, like: _like(np.frombuffer(data, np.uint8), like))
    split = Candidate("exponent plane by zstd 1, the rest raw", _split, _joined, lambda item: item.itemsize > 1)
    bits = _bitshuffled()
    return [
        raw,
        *(_zstd(n) for n in (1, 3, 6)),
        shuffle,
        split,
        *([bits] if bits else []),
        left,
        above,
        planes,
        _webp(),
    ]


def _split(item: Array) -> bytes:
    """The plane of sign and exponent compressed, the planes below as they are."""
    planes = codec._shuffled(_bytes(item), item.itemsize).reshape(item.itemsize, -1)
    top = zstandard.compress(planes[-1].data, 1)
    return len(top).to_bytes(8, "little") + top + planes[:-1].tobytes()


def _joined(data: bytes, like: Array) -> Array:
    size = int.from_bytes(data[:8], "little")
    top = zstandard.decompress(data[8 : 8 + size])
    return _like(codec._unshuffled(np.frombuffer(data[8 + size :] + top, np.uint8), like.itemsize), like)


def _pixels(item: Array) -> bool:
    return item.ndim == 3 and item.shape[2] == 3 and item.dtype == np.uint8


def _plain(item: Array) -> str:
    """An unsigned dtype of the same width: libraries that know no bfloat16 or fp8 take that."""
    return f"u{item.itemsize}"


def _bytes(item: Array) -> NDArray[np.uint8]:
    return np.ascontiguousarray(item).reshape(-1).view(np.uint8)


def _like(data: NDArray[np.uint8], like: Array) -> Array:
    return data.view(like.dtype).reshape(like.shape)


# -- data


def _screens(*, tiny: bool) -> Data:
    """Whole 512×512×3 tiles of the shipped screens."""
    tiles: list[Array] = []
    for path in screens(tiny=tiny):
        picture = PillowDecoder().decode(path.read_bytes(), path.name)
        for y in range(0, picture.shape[0] - 511, 512):
            tiles += [picture[y : y + 512, x : x + 512].copy() for x in range(0, picture.shape[1] - 511, 512)]
    return Data("screen uint8", tiles)


def _kv(cache: Floats) -> Iterator[Data]:
    """The cache in the tiles it is put as, in every form it may be stored in."""
    plane = kv_plane(cache)
    tiles = [plane[at : at + 512] for at in range(0, plane.shape[0], 512)]
    yield Data("kv_cache float32", tiles)
    yield Data("kv_cache float16", [tile.astype(np.float16) for tile in tiles])
    yield Data("kv_cache bfloat16", [tile.astype(ml_dtypes.bfloat16) for tile in tiles])
    yield Data("kv_cache int8, a scale a column", [_int8(tile, (0,))[0] for tile in tiles])
    yield Data("kv_cache int8, a scale a channel", [_int8(tile, (0, 1))[0] for tile in tiles])
    yield Data("kv_cache fp8", [_fp8(tile, (0, 1))[0] for tile in tiles])


def _made(*, tiny: bool) -> Iterator[Data]:
    """Scenes, vectors and logs that HIM makes of every other 1080p screen (reading them takes longest here)."""
    with tempfile.TemporaryDirectory() as folder, him.open(Path(folder) / "memory.him", create=True) as repo:
        paths = [path for path in screens(tiny=tiny) if not path.stem.endswith("-4k")][::2]
        for path in paths:
            list(repo.ingest(path, "main"))
        names = [path.stem for path in paths]
        main = repo.snapshot("main")
        scenes = [bytes(main.get("scene", frame=name)) for name in names]
        yield Data("scene JSON", [np.frombuffer(scene, np.uint8) for scene in scenes])
        yield Data("emb int8", [np.asarray(main.array("emb", frame=name)) for name in names])
        texts = [row_texts(msgspec.json.decode(scene, type=Scene)) for scene in scenes]
        yield Data("emb float16", [_vectors(rows).astype(np.float16) for rows in texts])
        told = [repo.query(goal["goal"], "main").as_json() for goal in goals(tiny=tiny)]
        lines = [json.dumps(one).encode() + b"\n" for one in [*repo.log(), *told]]
        parts = [b"".join(lines[at : at + LINES_A_DOCUMENT]) for at in range(0, len(lines), LINES_A_DOCUMENT)]
        yield Data("logs JSON lines", [np.frombuffer(part, np.uint8) for part in parts])


def _vectors(texts: Sequence[str]) -> Floats:
    """(n, EMBEDDING_DIMS) unit vectors before they are rounded to int8."""
    session, tokenizer = MiniLmEncoder()._loaded()
    out = np.zeros((len(texts), EMBEDDING_DIMS), dtype=np.float32)
    for number, one in enumerate(tokenizer.encode_batch(list(texts))):
        ids = np.array([one.ids], dtype=np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        mean = session.run(["last_hidden_state"], feed)[0][0].mean(axis=0)
        out[number] = mean / np.sqrt((mean * mean).sum())
    return out


# -- measuring


def _measured(data: Data, candidate: Candidate) -> Row:
    """Size and speed of one candidate over all items: the best of ROUNDS for each, to leave out a neighbour's noise."""
    raw = stored = 0
    packing = unpacking = 0.0
    for item in data.items:
        packed, took = _best(lambda item=item: candidate.pack(item))
        back, took_back = _best(lambda packed=packed, item=item: candidate.unpack(packed, item))
        if back.tobytes() != item.tobytes():
            raise AssertionError(f"{candidate.name} gives other bytes back for {data.name}")
        raw, stored = raw + item.nbytes, stored + len(packed)
        packing, unpacking = packing + took, unpacking + took_back
    return row(
        "codecs", f"{data.name}: {candidate.name}", round(raw / stored, 3), "× smaller", bytes=raw,
        encode_mb_s=round(raw / packing / 1e6), decode_mb_s=round(raw / unpacking / 1e6), stream=data.name,
        candidate=candidate.name,
    )  # fmt: skip


def _best(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and the least processor time it took of ROUNDS (all threads: speed is per core)."""
    took: list[float] = []
    for _ in range(ROUNDS):
        began = time.process_time()
        result = call()
        took.append(time.process_time() - began)
    return result, max(min(took), 1e-9)


def _choice(data: Data, rows: Sequence[Row]) -> Row:
    """What `him.tile.codec` does with these tiles, and whether that keeps the rule: raw below RAW_BELOW_RATIO."""
    tiles = [
        codec.encode_bytes(item.tobytes()) if data.name.endswith(("JSON", "lines")) else codec.encode_array(item)
        for item in data.items
    ]
    raw, stored = sum(len(tile.payload) for tile in tiles), sum(len(tile.stored) for tile in tiles)
    chosen = sorted({codec.CODEC_NAMES[tile.codec] for tile in tiles})
    wide = "shuffle + zstd 1" if data.items[0].itemsize > 1 else "zstd 1"
    could = next(one["value"] for one in rows if one["candidate"] == wide)
    kept = (chosen == ["raw"]) == (could < RAW_BELOW_RATIO)
    return row(
        "codecs", f"{data.name}: HIM takes {', '.join(chosen)}", round(raw / stored, 3), "× smaller", against=wide,
        goal=f"raw where {wide} gains less than {RAW_BELOW_RATIO}", holds=kept, stream=data.name, chosen=chosen,
    )  # fmt: skip


# -- quantising


def _scale(tile: Floats, axes: tuple[int, ...], largest: float) -> Floats:
    peak = np.abs(tile).max(axis=axes, keepdims=True)
    return np.where(peak > 0, peak / largest, 1).astype(np.float32)


def _int8(tile: Floats, axes: tuple[int, ...]) -> tuple[Array, Floats]:
    scale = _scale(tile, axes, 127)
    return np.clip(np.rint(tile / scale), -127, 127).astype(np.int8), scale


def _fp8(tile: Floats, axes: tuple[int, ...]) -> tuple[Array, Floats]:
    scale = _scale(tile, axes, 448)
    return (tile / scale).astype(ml_dtypes.float8_e4m3fn), scale


def _by_head(tile: Floats, dim: int) -> Floats:
    """int8 with a scale for each token, head and channel."""
    parts = tile.reshape(tile.shape[0], -1, dim, tile.shape[2])
    values, scale = _int8(parts, (2,))
    return (values * scale).astype(np.float32).reshape(tile.shape)


def _shipped(quantise: str) -> Callable[[Floats], Floats]:
    """HIM's own encoding and decoding."""

    def there_and_back(tile: Floats) -> Floats:
        made = codec.encode_array(tile, quantise=quantise)
        found = codec.decode(made.header, made.codec, made.stored, expect=made.ref)
        return np.asarray(found, dtype=np.float32)

    return there_and_back


def _quantised(dim: int) -> dict[str, Callable[[Floats], Floats]]:
    """Ways to quantise a tile (rows, columns, channels), given back as float32."""

    def scaled(
        make: Callable[[Floats, tuple[int, ...]], tuple[Array, Floats]], *axes: int
    ) -> Callable[[Floats], Floats]:
        def there_and_back(tile: Floats) -> Floats:
            values, scale = make(tile, axes)
            return values.astype(np.float32) * scale

        return there_and_back

    return {
        "bfloat16": lambda tile: tile.astype(ml_dtypes.bfloat16).astype(np.float32),
        "HIM's fp16": _shipped("fp16"),
        "int8, one scale": scaled(_int8, 0, 1, 2),
        "int8, a scale a channel": scaled(_int8, 0, 1),
        "int8, a scale a token, head and channel": lambda tile: _by_head(tile, dim),
        "HIM's int8: a scale a column and channel": _shipped("int8"),
        "fp8, one scale": scaled(_fp8, 0, 1, 2),
        "fp8, a scale a column and channel": scaled(_fp8, 0),
        "HIM's fp8: a scale a channel": _shipped("fp8"),
    }


def _errors(*, tiny: bool) -> Rows:
    """What each way costs: error of keys and values, and what the model says next with such a cache."""
    network = kv_data.model()
    before, after = (64, 32) if tiny else (KV_TOKENS, NEXT_TOKENS)
    tokens = network.tokens(kv_data.text())[: before + after]
    cache = kv_data.kv_cache(before)
    exact, _ = network.forward(tokens[before:], cache)
    plane = kv_plane(cache)
    for name, there_and_back in _quantised(network.shape.dim).items():
        back = np.concatenate([there_and_back(plane[at : at + 512]) for at in range(0, before, 512)])
        said, _ = network.forward(tokens[before:], kv_tensor(back, cache.shape))
        same = float((said.argmax(axis=1) == exact.argmax(axis=1)).mean())
        key, value = (_relative(back[..., part::2], plane[..., part::2]) for part in (0, 1))
        yield row(
            "codecs", f"KV as {name}: same next token", round(same, 4), "share", of=after, way=name,
            kl=_divergence(exact, said), rms_keys=key[0], rms_values=value[0], worst=max(key[1], value[1]),
        )  # fmt: skip


def _relative(found: Floats, exact: Floats) -> tuple[float, float]:
    """RMS error over RMS value, and the largest error of a channel over that channel's peak."""
    error = found.astype(np.float64) - exact
    rms = math.sqrt(float((error**2).mean() / (exact.astype(np.float64) ** 2).mean()))
    worst = np.abs(error).max(axis=0) / np.maximum(np.abs(exact).max(axis=0), 1e-30)
    return float(f"{rms:.3g}"), float(f"{worst.max():.3g}")


def _divergence(exact: Floats, said: Floats) -> float:
    """Mean Kullback–Leibler divergence of the next token's distribution, in nats."""
    p, q = (_log_softmax(one.astype(np.float64)) for one in (exact, said))
    return float(f"{(np.exp(p) * (p - q)).sum(axis=1).mean():.2g}")


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


# -- running


def run(*, tiny: bool = False) -> Rows:
    """A row for each stream and candidate, for HIM's choice, and for each way to quantise."""
    ways = candidates()
    for data in _all(tiny=tiny):
        if not isinstance(data, Data):
            yield data
            continue
        rows = [_measured(data, one) for one in ways if one.fits(data.items[0])]
        yield from rows
        yield _choice(data, rows)
    if not any(one.name.startswith("bitshuffle") for one in ways):
        yield row(
            "codecs", "bitshuffle", 0, "× smaller", against="numcodecs is not installed: `make bench` installs it"
        )
    try:
        yield from _errors(tiny=tiny)
    except kv_data.Missing as error:
        yield missing("codecs", "KV quantised", "share", str(error))


def _all(*, tiny: bool) -> Iterator[Data | Row]:
    yield _screens(tiny=tiny)
    try:
        yield from _kv(kv_data.kv_cache(64 if tiny else KV_TOKENS))
    except kv_data.Missing as error:
        yield missing("codecs", "kv_cache", "× smaller", str(error))
    yield from _made(tiny=tiny)


# -- the page


def write(rows: Sequence[Row]) -> None:
    """Put the tables into the page, between its marks."""
    text = PAGE.read_text("utf-8")
    for name, table in (("sizes", _sizes(rows)), ("errors", _ways(rows))):
        begin, end = f"<!-- {name}: written by `python -m bench codecs --write` -->", f"<!-- end of {name} -->"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.S)  # noqa: B023
    PAGE.write_text(text, "utf-8")


def _sizes(rows: Sequence[Row]) -> str:
    lines = ["| stream | codec | times smaller | encode MB/s | decode MB/s |", "|---|---|---|---|---|"]
    for one in rows:
        if "candidate" in one and one["candidate"] != "raw":
            cells = (one["stream"], one["candidate"], f"{one['value']:.2f}", one["encode_mb_s"], one["decode_mb_s"])
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        elif "chosen" in one:
            lines.append(f"| {one['stream']} | **HIM: {', '.join(one['chosen'])}** | **{one['value']:.2f}** | | |")
    return "\n".join(lines)


def _ways(rows: Sequence[Row]) -> str:
    lines = [
        "| KV cache as | RMS error, keys | values | largest error / column peak | same next token | KL, nats |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        if "way" in one:
            errors = (f"{one[name]:.2%}" for name in ("rms_keys", "rms_values", "worst"))
            lines.append(f"| {one['way']} | {' | '.join(errors)} | {one['value']:.1%} | {one['kl']:.1e} |")
    return "\n".join(lines)
