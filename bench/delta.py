"""Deltas against patch-from and against storing in full; chains against reads of whole tiles; documents in chunks.

Sizes are compared with the smaller of two patches (HIM's own and pyzstd's at level 3), decoding with pyzstd's, which
takes a prefix as `zstd --patch-from` does; HIM's own patch decoder is faster and stands beside it. Times are sums over
tiles of each tile's best of several interleaved repetitions.
"""

import ctypes
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyzstd
from numpy.typing import NDArray

import him
from bench.examples import screens
from bench.measure import Rows, row
from him.adapters.pillow import PillowDecoder
from him.config import CHUNKS_FROM_BYTES, DELTA_DEPTH_MAX
from him.tile import chunks, codec, delta
from him.tile.codec import TileHeader
from him.types import BlobId

Tile = NDArray[np.uint8] | NDArray[np.int8]
TILE_PX = 512
SCROLL_PX = 37
SHARES = (0.01, 0.05, 0.30)
REPEATS, REPEATS_KV = 15, 7
UNLIMITED = 2**40
"""A full size that keeps every delta, so that encodings are compared and not the rule that stores in full."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""
EDITS = 20
RECORD_BYTES = 256 + 14 + 56 + 32
"""What a small document costs beside its stored bytes: record header, tile header, index row, address row."""


class Pair(NamedTuple):
    """One tile and what became of it."""

    base: Tile
    target: Tile


def run(*, tiny: bool = False) -> Rows:
    """Rows for screens, then a KV cache, then documents."""
    keep_freed_memory()
    pictures = [np.asarray(PillowDecoder().decode(path.read_bytes(), path.stem)) for path in screens(tiny=tiny)]
    repeats, repeats_kv = (2, 2) if tiny else (REPEATS, REPEATS_KV)
    for share in SHARES:
        pairs = list(screen_changes(pictures, share))
        yield from compared(f"screen, {share:.0%} of blocks", pairs, repeats)
    yield from compared(f"screen, moved by {SCROLL_PX} px", list(screen_scrolls(pictures)), repeats, moved=True)
    shape = (64, 64, 64) if tiny else (512, 512, 64)
    for share in SHARES:
        yield from compared(f"KV, {share:.0%} of blocks", [kv_change(shape, share)], repeats_kv)
    yield from compared(f"KV, moved by {SCROLL_PX} tokens", [kv_scroll(shape)], repeats_kv, moved=True)
    yield from chained("screen", list(screen_chains(pictures)), repeats)
    yield from chained("KV", [kv_chain(shape)], repeats_kv)
    yield from documents(tiny=tiny)


# -- one change


def compared(label: str, pairs: Sequence[Pair], repeats: int, *, moved: bool = False) -> Iterator[dict[str, object]]:
    """Size, decoding and encoding of deltas over all pairs."""
    size, patch_size, full_size, in_full = 0, 0, 0, 0
    picked: dict[str, int] = {}
    decoding = dict.fromkeys(("him", "peer", "patch"), 0.0)
    encoding = dict.fromkeys(("him", "peer", "full"), 0.0)
    for pair in pairs:
        header, base, target = parts(pair)
        full = codec.compress(base, 1)[1]
        made = delta.encode(header, base, target, UNLIMITED)
        patch = delta.encode_as(delta.PATCH, header, base, target)
        theirs = peer_patch(base, target)
        assert made is not None
        assert delta.decode(made.codec, header, base, made.stored) == target == peer_unpatch(base, patch.stored)
        picked[delta.DELTA_NAMES[made.codec]] = picked.get(delta.DELTA_NAMES[made.codec], 0) + 1
        in_full += delta.encode(header, base, target, len(full)) is None
        size, patch_size = size + len(made.stored), patch_size + min(len(patch.stored), len(theirs))
        full_size += len(codec.compress(target, 1)[1])
        add(decoding, interleaved(repeats, {
            "him": lambda m=made, h=header, b=base: delta.decode(m.codec, h, b, m.stored),
            "peer": lambda p=patch, b=base: peer_unpatch(b, p.stored),
            "patch": lambda p=patch, h=header, b=base: delta.decode(p.codec, h, b, p.stored),
        }))  # fmt: skip
        add(encoding, interleaved(max(1, repeats // 2), {
            "him": lambda h=header, b=base, t=target, f=len(full): delta.encode(h, b, t, f),
            "peer": lambda b=base, t=target: peer_patch(b, t),
            "full": lambda t=target: codec.compress(t, 1),
        }))  # fmt: skip
    more = {"tiles": len(pairs), "picked": picked, "full_bytes": full_size, "stored_in_full": in_full}
    ratio, faster = size / patch_size, decoding["peer"] / decoding["him"]
    yield row(
        "delta", f"{label}: size", size, "bytes", against=patch_size, ratio=round(ratio, 3),
        goal="≤ 1.05 × patch-from", holds=ratio <= 1.05, **more,
    )  # fmt: skip
    yield row(
        "delta", f"{label}: decode", ms(decoding["him"], pairs), "ms a tile", against=ms(decoding["peer"], pairs),
        ratio=round(faster, 2), goal="" if moved else "≥ 2 × faster than patch-from",
        holds=None if moved else faster >= 2,
    )  # fmt: skip
    yield row(
        "delta", f"{label}: decode, and HIM's own patch", ms(decoding["him"], pairs), "ms a tile",
        against=ms(decoding["patch"], pairs), ratio=round(decoding["patch"] / decoding["him"], 2),
    )  # fmt: skip
    yield row(
        "delta", f"{label}: encode", ms(encoding["him"], pairs), "ms a tile", against=ms(encoding["full"], pairs),
        ratio=round(encoding["him"] / encoding["full"], 2), patch_from_ms=ms(encoding["peer"], pairs),
    )  # fmt: skip


def peer_patch(base: bytes, target: bytes) -> bytes:
    """What `zstd --patch-from` does: level 3, a window over both, long-distance matching for long ones."""
    known = pyzstd.CParameter
    window = (len(base) + len(target) - 1).bit_length()
    options = {known.compressionLevel: 3, known.windowLog: window, known.enableLongDistanceMatching: int(window > 23)}
    return pyzstd.compress(target, options, pyzstd.ZstdDict(base, is_raw=True).as_prefix)


def peer_unpatch(base: bytes, patch: bytes) -> bytes:
    """Its inverse."""
    return pyzstd.decompress(patch, pyzstd.ZstdDict(base, is_raw=True).as_prefix)


# -- chains


def chained(label: str, chains: Sequence[Sequence[Tile]], repeats: int) -> Iterator[dict[str, object]]:
    """Reading a tile that a repository keeps at the end of a chain of four, against one kept in full; both verified.

    Chains which the repository cut shorter, because a change was worth less than the tile in full, are left out.
    """
    spent, deep = dict.fromkeys(("chain", "full"), 0.0), 0
    for tiles in chains:
        with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
            kept = {side: opened.enter_context(him.open(Path(name) / side, create=True)) for side in ("chain", "full")}
            for version in tiles:
                last = kept["chain"].writable("main").put("kv_cache", version, frame="f")
            kept["full"].writable("main").put("kv_cache", tiles[-1], frame="f")
            if kept["chain"]._store.read(BlobId(bytes.fromhex(last.checksum))).delta_depth < DELTA_DEPTH_MAX:
                continue
            deep += 1
            reads = {side: partial(repo.snapshot("main").get, "kv_cache", frame="f") for side, repo in kept.items()}
            assert all(np.array_equal(np.asarray(read()), tiles[-1]) for read in reads.values())
            add(spent, interleaved(repeats, reads))
    if not deep:
        return
    ratio = spent["chain"] / spent["full"]
    yield row(
        "delta", f"{label}: chain of 4 at 5 %", ms(spent["chain"], chains[:deep]), "ms",
        against=ms(spent["full"], chains[:deep]), ratio=round(ratio, 2), goal="≤ 2 × a full read", holds=ratio <= 2,
        chains=deep, of=len(chains),
    )  # fmt: skip


# -- documents


def documents(*, tiny: bool) -> Iterator[dict[str, object]]:
    """Twenty edits of real source files: stored in full, as deltas, and in chunks; and how fast chunks are cut."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.stat().st_size)
    pool = [line for path in sources[:40] for line in path.read_bytes().splitlines(keepends=True)]
    for size in (CHUNKS_FROM_BYTES,) if tiny else (16_384, CHUNKS_FROM_BYTES, 262_144):
        joined = b"".join(path.read_bytes() for path in sources[-12:])
        histories = [edited(joined[at * size : (at + 1) * size], pool, at) for at in range(1 if tiny else 4)]
        full = sum(len(codec.compress(one, 1)[1]) + RECORD_BYTES for history in histories for one in history)
        parted, patched = sum(map(stored_in_chunks, histories)), sum(map(stored_as_deltas, histories))
        once = sum(stored_in_chunks(history[:1]) for history in histories)
        once_full = sum(len(codec.compress(history[0], 1)[1]) + RECORD_BYTES for history in histories)
        name = f"document of {size // 1024} KiB, {EDITS} edits"
        yield row("delta", f"{name}: chunks", parted, "bytes", against=full, ratio=round(parted / full, 3),
                  first_version=round(once / once_full, 2))  # fmt: skip
        yield row("delta", f"{name}: deltas", patched, "bytes", against=full, ratio=round(patched / full, 3))
    text = joined[:1_000_000]
    spent = interleaved(3, {"him": lambda: chunks.split(text), "zstd": lambda: codec.compress(text, 1)})
    yield row("delta", "cut a document into chunks", round(len(text) / spent["him"] / 1e6), "MB/s",
              against=round(len(text) / spent["zstd"] / 1e6), ratio=round(spent["him"] / spent["zstd"], 2))  # fmt: skip


def edited(document: bytes, pool: Sequence[bytes], seed: int) -> list[bytes]:
    """The document and its later versions: one to three places a time, lines removed and others put in."""
    rng = random.Random(seed)
    versions = [document]
    for _ in range(EDITS):
        lines = versions[-1].splitlines(keepends=True)
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(len(lines))
            lines[at : at + rng.choice((0, 1, 1, 4))] = rng.choices(pool, k=rng.choice((0, 1, 1, 3, 8)))
        versions.append(b"".join(lines))
    return versions


def stored_in_chunks(history: Sequence[bytes]) -> int:
    """Bytes of a history with each distinct chunk stored once and a list for each version."""
    kept: set[bytes] = set()
    total = 0
    for version in history:
        parts_of = [bytes(part) for part in chunks.split(version)]
        total += chunk_list_size(len(parts_of)) + sum(
            len(codec.compress(part, 1)[1]) + RECORD_BYTES for part in {*parts_of} - kept
        )
        kept.update(parts_of)
    return total


def chunk_list_size(count: int) -> int:
    """Bytes a list of so many chunks takes; a single chunk is the document itself."""
    return RECORD_BYTES + 36 * count if count > 1 else 0


def stored_as_deltas(history: Sequence[bytes]) -> int:
    """Bytes of a history as chains of deltas (`delta.compose`)."""
    total, depth, chain_size, root, full = 0, 0, 0, b"", 0
    last = b""
    for version in history:
        header = TileHeader("bytes", (len(version),))
        found = delta.compose(
            header, root, lambda before=last: before, version, full_size=full, chain_size=chain_size, depth=depth
        )
        if found is None:
            root, depth, chain_size = version, 0, 0
            full = len(codec.compress(version, 1)[1])
            total += full + RECORD_BYTES
        else:
            chain_size = len(found.delta.stored) + (chain_size if found.depth > 1 else 0)
            depth = found.depth
            total += len(found.delta.stored) + RECORD_BYTES
        last = version
    return total


# -- tiles


def screen_changes(pictures: Sequence[Tile], share: float) -> Iterator[Pair]:
    """Three tiles of each screen with a rectangle of another screen, which touches that share of their blocks."""
    rng = np.random.default_rng(1)
    for number, picture in enumerate(pictures):
        for base in some_tiles(picture, picture.shape[0]):
            yield Pair(base, with_rectangle(base, pictures[(number + 3) % len(pictures)], share, rng))


def with_rectangle(base: Tile, source: Tile, share: float, rng: np.random.Generator) -> Tile:
    """A copy with a rectangle of `source` at any pixel, touching about `share` of the tile's blocks."""
    blocks = share * (TILE_PX // 16) ** 2
    rows = max(2, round((blocks / 1.4) ** 0.5))
    height, width = 16 * (rows - 1), 16 * (max(2, round(blocks / rows)) - 1)
    y, x = (int(rng.integers(0, TILE_PX - side)) | 1 for side in (height, width))
    from_y, from_x = (int(rng.integers(0, source.shape[i] - side)) for i, side in enumerate((height, width)))
    target = base.copy()
    target[y : y + height, x : x + width] = source[from_y : from_y + height, from_x : from_x + width]
    return target


def screen_scrolls(pictures: Sequence[Tile]) -> Iterator[Pair]:
    """Three tiles of each screen, and what is there when the page has moved up."""
    for picture in pictures:
        height = picture.shape[0] - SCROLL_PX
        if height >= TILE_PX:
            befores, afters = some_tiles(picture, height), some_tiles(picture[SCROLL_PX:], height)
            yield from (Pair(*pair) for pair in zip(befores, afters, strict=True))


def some_tiles(picture: Tile, height: int) -> list[Tile]:
    """Up to three whole tiles, spread over the picture."""
    corners = [
        (y, x)
        for y in range(0, height - TILE_PX + 1, TILE_PX)
        for x in range(0, picture.shape[1] - TILE_PX + 1, TILE_PX)
    ]
    return [picture[y : y + TILE_PX, x : x + TILE_PX].copy() for y, x in corners[:: max(1, len(corners) // 3)][:3]]


def screen_chains(pictures: Sequence[Tile]) -> Iterator[list[Tile]]:
    """Three tiles of each screen with four successors, each with another rectangle on 5 % of its blocks."""
    rng = np.random.default_rng(2)
    for number, picture in enumerate(pictures):
        for first in some_tiles(picture, picture.shape[0]):
            tiles = [first]
            for at in range(4):
                tiles.append(with_rectangle(tiles[-1], pictures[(number + at + 1) % len(pictures)], 0.05, rng))
            yield tiles


def kv_noise(shape: tuple[int, ...], seed: int) -> NDArray[np.int8]:
    """Normal noise, quantised so that its peak is 127."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return np.rint(values * (127 / np.abs(values).max())).astype(np.int8)


def kv_change(shape: tuple[int, ...], share: float, base: Tile | None = None, seed: int = 2) -> Pair:
    """A KV tile and another with that share of its blocks new, anywhere."""
    base = kv_noise(shape, 1) if base is None else base
    rows, columns = shape[0] // 16, shape[1] // 16
    chosen = np.zeros(rows * columns, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(rows * columns)[: max(1, int(share * rows * columns))]] = True
    where = chosen.reshape(rows, columns).repeat(16, axis=0).repeat(16, axis=1)
    target = base.copy()
    target[where] = kv_noise((int(where.sum()), *shape[2:]), seed)
    return Pair(base, target)


def kv_scroll(shape: tuple[int, ...]) -> Pair:
    """A KV tile that has lost its first tokens and gained others."""
    tokens = kv_noise((shape[0] + SCROLL_PX, *shape[1:]), 3)
    return Pair(tokens[: shape[0]].copy(), tokens[SCROLL_PX:].copy())


def kv_chain(shape: tuple[int, ...]) -> list[Tile]:
    """A KV tile and four successors with 5 % of their blocks new."""
    tiles: list[Tile] = [kv_noise(shape, 1)]
    for at in range(4):
        tiles.append(kv_change(shape, 0.05, tiles[-1], 10 + at).target)
    return tiles


def parts(pair: Pair) -> tuple[TileHeader, bytes, bytes]:
    """(the target's header, canonical base, canonical target)."""
    return TileHeader(pair.target.dtype.name, pair.target.shape), pair.base.tobytes(), pair.target.tobytes()


# -- time


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, so that no call pays for fresh pages which another one finds ready.

    Fresh pages cost from 1 to 20 ms a tile of 16 MiB, by what the machine's other guests do (measured).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def interleaved(repeats: int, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each call's best of `repeats`, taking turns.

    Each goes twice and the second time counts: the first leaves the allocator as this call leaves it, not the last one.
    """
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def add(totals: dict[str, float], more: dict[str, float]) -> None:
    """Adds `more` to `totals` in place."""
    for name, value in more.items():
        totals[name] += value


def ms(seconds: float, over: Sequence[object]) -> float:
    """Milliseconds for one of `over`."""
    return round(seconds * 1_000 / len(over), 3)
