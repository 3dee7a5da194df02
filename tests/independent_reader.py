"""Reads a repository by docs/FORMAT.md alone; nothing of the software is imported. Section names are the document's.

Every byte of the committed log and of the committed ranges is checked; whatever is wrong raises Damaged.
"""

import json
import math
import struct
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import ml_dtypes
import msgspec
import numpy as np
import zstandard
from blake3 import blake3

TILE, PAGE, DIRECTORY, COMPANION, INDEX, FOOTER = range(1, 7)
ROW = np.dtype([("blob", "V32"), ("at", "<u8"), ("length", "<u8"), ("kind", "u1"), ("depth", "u1"), ("zeros", "V6")])


class Damaged(ValueError):
    """The bytes are not what the document says."""


class Record(NamedTuple):
    kind: int
    codec: int
    header: bytes
    stored: bytes
    size: int
    blob: bytes
    base: bytes
    depth: int
    origin: bytes
    digest: bytes
    length: int
    end: int


def need(truth: object, what: str) -> None:
    if not truth:
        raise Damaged(what)


def H(*parts: bytes) -> bytes:
    return blake3(b"".join(parts)).digest()


def unpack(data: bytes, kind: type = list):
    value = msgspec.msgpack.decode(data)
    need(isinstance(value, kind), "MessagePack of another shape")
    return value


def merkle(digests: list[bytes]) -> bytes:
    level = [H(b"\0", digest) for digest in digests] or [H(b"\2")]
    while len(level) > 1:
        pairs = [H(b"\1", *level[i : i + 2]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def unzstd(data: bytes, base: bytes = b"") -> bytes:
    size = zstandard.frame_content_size(data)
    need(0 <= size < 2**28, "a zstd frame without its size")
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if base else None
    opener = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=2**31)
    return opener.decompress(data, allow_extra_data=False) if size else b""


def plain(codec: int, stored: bytes, itemsize: int) -> bytes:
    need(codec in (0, 1, 2), "an unknown codec")
    data = stored if codec == 0 else unzstd(stored)
    return np.frombuffer(data, "u1").reshape(itemsize, -1).T.tobytes() if codec == 2 and data else data


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name) if name.startswith(("bfloat", "float8")) else name)


def blocks(shape: list[int], itemsize: int, stored: bytes, base: bytes, size: int) -> bytes:
    """Codec 3."""
    rows, columns, cell = *shape[:2], itemsize * math.prod(shape[2:])
    down, across = -(-rows // 16), -(-columns // 16)
    data = plain(stored[0], stored[1:], itemsize)
    skip = -(-down * across // 128) * 16
    bits = np.unpackbits(np.frombuffer(data[:skip], "u1"), bitorder="little")
    need(not bits[down * across :].any(), "bits beyond the blocks")
    changed = bits[: down * across].reshape(down, across).repeat(16, 0).repeat(16, 1)[:rows, :columns].astype(bool)
    out = np.frombuffer(base[:size].ljust(size, b"\0"), "u1").reshape(rows, columns, cell).copy()
    out[changed] = np.frombuffer(data[skip:], "u1").reshape(-1, cell)
    return out.tobytes()


def parse_record(data: bytes, at: int) -> Record:
    head = data[at : at + 256]
    need(at % 64 == 0 and len(head) == 256 and head[:4] == b"HREC", f"no record at {at}")
    version, kind, codec, headers, padding, length, size = struct.unpack_from("<HBBIIQQ", head, 4)
    need(version == 1 and length + headers + padding < len(data), f"a record at {at} of another version or size")
    begin = at + 256 + headers + padding
    end = -(-(begin + length) // 64) * 64
    header, stored = data[at + 256 : at + 256 + headers], data[begin : begin + length]
    zeros = data[begin - padding : begin], data[begin + length : end], head[129:176], head[192:224]
    need(H(head[:224], header) == head[224:256], f"the digest of the header at {at}")
    need(not any(map(any, zeros)) and end <= len(data), f"not zero in the record at {at}")
    need(head[64:96] == (head[32:64] if codec == 0 else H(stored)), f"the digest of what is stored at {at}")
    need(kind != TILE or padding == 0 or begin % 4096 == 0, f"padding at {at}")
    return Record(kind, codec, header, stored, size, head[32:64], head[96:128], head[128], head[176:192],
                  head[224:256], begin + length - at, end)  # fmt: skip


class Repository:
    """`snapshots`, `refs` and `streams` as the log leaves them; every record of every pack in `records`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = json.loads((folder / "him.json").read_bytes())
        need(self.marker["format"] in (1, 2), "another format")
        self.snapshots: dict[str, dict] = {}
        self.refs, self.streams, self.lamport = {}, {}, 0
        self.retention: dict[tuple[str, str], int] = {}
        self.expired: dict[tuple[str, str], int] = {}
        self.records: list[Record] = []
        self.blobs: dict[tuple[int, bytes], list[Record]] = defaultdict(list)
        self._known: dict[tuple[int, bytes], bytes] = {}
        self._opened: dict[str, int] = {}
        self._packs: dict[str, list] = {}
        self._ranges: dict[str, list] = defaultdict(list)
        self.checkpoints = 0
        self._log()
        for path, (_, _, _, finished, _, removed) in self._packs.items():
            if not removed:
                self._pack(path, self._ranges[path], finished)
        for record in self.records:
            self._verify(record)
        self.companions = {}
        for kind, blob in self.blobs:
            if kind == COMPANION:
                found = unpack(self.payload(COMPANION, blob))
                need(self.companions.setdefault(tuple(found[:5]), (blob, found))[0] == blob, "two companions")

    # -- Commit log

    def _log(self) -> None:
        data, published = (self.folder / "log/000001.log").read_bytes(), (self.folder / "log/end").read_bytes()
        need(len(published) == 80 and H(published[:48]) == published[48:], "log/end")
        last, end, last_hash = struct.unpack("<QQ32s", published[:48])
        at, seq, before = 0, 0, bytes(32)
        while at < end:
            magic, length, number, previous = struct.unpack_from("<4sIQ32s", data, at)
            body, digest = data[at + 48 : at + 48 + length], data[at + 48 + length : at + 80 + length]
            need((magic, number, previous) == (b"HLOG", seq + 1, before), f"the chain of the log at {at}")
            need(H(data[at : at + 48 + length]) == digest, f"log record {number}")
            need(data[at + 80 + length : at + 84 + length] == struct.pack("<I", length + 84), f"length of {number}")
            at, seq, before = at + 84 + length, number, digest
            for operation in unpack(body)[2]:
                self._fold(seq, operation)
            self._checkpoint(seq, at, digest)
        need((at, seq, before) == (end, last, last_hash), "the published end")

    def _fold(self, seq: int, operation: list) -> None:
        match operation:
            case "snapshot", key, parents, created, writer, directory, policy, provenance:
                self._opened[key] = seq
                self.snapshots[key] = {
                    "snapshot_id": key, "parents": parents, "created_at": created, "writer": writer,
                    "directory": directory, "sealed": False, "lamport": 0, "levels_root": b"", "signature": b"",
                    "tags": {}, "provenance": dict(sorted(provenance.items())), "merge_policy": policy,
                }  # fmt: skip
            case "batch", key, before, after:
                need(self.snapshots[key]["directory"] == before, "a batch on another directory")
                self.snapshots[key]["directory"] = after
            case "seal", key, directory, levels, lamport, b"", b"":
                need(self.snapshots[key]["directory"] == directory, "a seal of another directory")
                self.snapshots[key] |= {"sealed": True, "levels_root": levels, "lamport": lamport}
                self.lamport = max(self.lamport, lamport)
            case "attribute", key, what, value, b"":
                tags = self.snapshots[key]["tags"] | {what: value}
                self.snapshots[key]["tags"] = {k: tags[k] for k in sorted(tags) if tags[k] is not None}
            case "drop", key:
                del self.snapshots[key]
            case "ref", name, kind, target:
                self.refs[name] = (kind, target)
                if not target:
                    del self.refs[name]
            case "stream", spec:
                self.streams[spec["name"]] = spec
            case "range", path, *numbers:
                self._ranges[path].append(numbers)
                pack = self._packs.setdefault(path, [path, seq, [], None, 0, 0])
                pack[1:3] = seq, [*pack[2], [seq, operation]]
            case "finished", path, _, _:
                self._packs[path][2:4] = [], operation
            case "condemned", path:
                self._packs[path][4] = seq
            case "removed", path:
                need(self._packs[path][4], "removed and not condemned")
                self._packs[path][2:] = [], None, self._packs[path][4], seq
            case "retention", stream, task, seconds:
                self.retention[stream, task] = seconds
                if seconds < 0:
                    del self.retention[stream, task]
            case "expired", stream, before, origins, b"", b"":
                for what in [(stream, origin) for origin in origins or [""]]:
                    self.expired[what] = max(before, self.expired.get(what, 0))
            case _:
                raise Damaged(f"an unknown operation {operation}")

    def _checkpoint(self, seq: int, end: int, digest: bytes) -> None:
        """Checkpoints: the one of this record, if there is one, is what we have folded so far."""
        file = self.folder / f"log/checkpoints/{seq:016d}"
        if file.exists():
            opened = sorted((self._opened[key], key) for key in self.snapshots)
            version = file.read_bytes()[8]
            packs = [pack[: 4 if version == 1 else 6] for pack in self._packs.values()]
            rules = [sorted([*what, value] for what, value in one.items()) for one in (self.retention, self.expired)]
            body = msgspec.msgpack.encode([
                seq, digest, self.lamport, [[at, self.snapshots[key]] for at, key in opened],
                [[name, *self.refs[name]] for name in sorted(self.refs)],
                [self.streams[name] for name in sorted(self.streams)], packs, *(rules if version == 2 else []),
            ])  # fmt: skip
            head = struct.pack("<8sH6xQQ32s", b"HIMCKPT\1", version, seq, end, digest)
            need(file.read_bytes() == head + H(head, body) + body, f"checkpoint {seq}")
            self.checkpoints += 1

    # -- Packs

    def _pack(self, path: str, ranges: list, finished: list | None) -> None:
        data = (self.folder / path).read_bytes()
        pack_id = bytes.fromhex(Path(path).stem)
        head = struct.pack("<8sH6x16s16s48x", b"HIMPACK\1", 1, bytes.fromhex(self.marker["repository_id"]), pack_id)
        need(data[:128] == head + H(head), f"the header of {path}")
        at, rows, roots = 128, [], []
        for start, index_at, end, root in ranges:
            need(start == at, f"a gap in {path} before {start}")
            digests, own = [], []
            while at < index_at:
                record = parse_record(data, at)
                digests.append(record.digest)
                own.append((record.blob, at, record.length, record.kind, record.depth, bytes(6)))
                self.records.append(record)
                self.blobs[record.kind, record.blob].append(record)
                at = record.end
            at = self._index(data, index_at, INDEX, start, own, merkle(digests))
            need((at, merkle(digests)) == (end, root), f"the range at {start} of {path}")
            rows, roots = rows + own, [*roots, root]
        if finished is not None:
            footer, root = at, merkle(roots)
            at = self._index(data, footer, FOOTER, footer, rows, root)
            trailer = struct.pack("<8sQQ32s8x", b"HIMPKEND", footer, at - footer, root)
            need(data[at:] == trailer + H(trailer) + bytes(32), f"the trailer of {path}")
            need(finished[2:] == [len(data), root], f"the end of {path}")

    def _index(self, data: bytes, at: int, kind: int, first: int, rows: list, root: bytes) -> int:
        record = parse_record(data, at)
        self.records.append(record)
        need(record.kind == kind and unpack(record.header) == [first, len(rows), root], f"the index at {at}")
        want = np.array(sorted(rows), ROW).tobytes()
        need(self.decode(record, 5) == want, f"the rows at {at}")
        return record.end

    def _verify(self, record: Record) -> None:
        data = self.decode(record, 5)
        need(len(data) == record.size, "the length of a payload")
        need(H(struct.pack("<BI", record.kind, len(record.header)), record.header, data) == record.blob, "a blob_id")
        self._known[record.kind, record.blob] = data

    def decode(self, record: Record, below: int) -> bytes:
        """Canonical payload of a record (Tiles; Deltas and chunks), not yet verified."""
        dtype, shape = unpack(record.header)[:2] if record.kind == TILE else ("bytes", [record.size])
        itemsize = 1 if dtype == "bytes" else dtype_of(dtype).itemsize
        need(record.kind == TILE or (record.codec == 0 and not any(record.origin)), "a record of another kind")
        need(record.depth < below and (record.depth == 0) == (record.codec in (0, 1, 2, 6)), "a delta's depth")
        need((record.base == bytes(32)) == (record.depth == 0), "a delta's base")
        if record.codec == 6:
            parts = [
                (record.stored[i : i + 32], record.stored[i + 32 : i + 36]) for i in range(0, len(record.stored), 36)
            ]
            chunks = [(self.payload(TILE, blob), int.from_bytes(length, "little")) for blob, length in parts]
            need(all(len(chunk) == length for chunk, length in chunks), "the length of a chunk")
            return b"".join(chunk for chunk, _ in chunks)
        if record.depth == 0:
            return plain(record.codec, record.stored, itemsize)
        base = self.payload(TILE, record.base, record.depth)
        if record.codec == 3:
            return blocks(shape, itemsize, record.stored, base, record.size)
        if record.codec == 5:
            return unzstd(record.stored, base)
        need(record.codec == 4 and len(base) == record.size, "an unknown codec")
        change = plain(2 if itemsize > 1 else 1, record.stored, itemsize)
        return (np.frombuffer(base, "u1") ^ np.frombuffer(change, "u1")).tobytes()

    def payload(self, kind: int, blob: bytes, below: int = 5) -> bytes:
        """Verified canonical payload of a blob."""
        if (kind, blob) not in self._known:
            found = [record for record in self.blobs.get((kind, blob), []) if record.depth < below]
            need(found, f"no record of {blob.hex()}")
            self._verify(min(found, key=lambda record: record.depth))
        return self._known[kind, blob]

    # -- Directory and Pages

    def frames(self, directory: bytes) -> dict[tuple[str, str], list]:
        """(stream, frame) → its record, of a whole directory."""
        found = [frame for _, frame in self._walk(directory, "")] if directory else []
        need(all(frame[11] for frame in found), "a frame without cells")
        return {(frame[0], frame[1]): frame for frame in found}

    def _walk(self, node: bytes, prefix: str) -> list[tuple[str, list]]:
        data = self.payload(DIRECTORY, node)
        if data[:4] == b"HDL\1":
            frames = [(H(*(struct.pack("<I", len(n.encode())) + n.encode() for n in f[:2])).hex(), f)
                      for f in unpack(data[4:])]  # fmt: skip
            need(frames == sorted(frames) and len(frames) <= 64, "a leaf's frames")
            need(all(path.startswith(prefix) for path, _ in frames), "a leaf's place")
            return frames
        need(data[:4] == b"HDI\1" and data[6:8] == b"\0\0", "a directory node")
        nibbles = [n for n in range(16) if int.from_bytes(data[4:6], "little") >> n & 1]
        children = list(struct.iter_unpack("<32sQ", data[8:]))
        found = [self._walk(child, prefix + f"{n:x}") for n, (child, _) in zip(nibbles, children, strict=True)]
        need([len(one) for one in found] == [count for _, count in children], "a directory's counts")
        frames = [one for part in found for one in part]
        need(len(frames) > 64, "an inner node of few frames")
        return frames

    def page(self, root: bytes) -> tuple[int, list[tuple[int, int, bytes]]]:
        """Height and [(row, column, what the slot holds)]."""
        data = self.payload(PAGE, root)
        magic, height, bitmap = struct.unpack_from("<4sB3xQ", data)
        slots, size = [n for n in range(64) if bitmap >> n & 1], 32 if height else 48
        need(magic == b"HPG\1" and data[5:8] == bytes(3) and slots, "a page")
        need(len(data) == 16 + size * len(slots), "a page's size")
        return height, [(n // 8, n % 8, data[16 + size * i : 16 + size * (i + 1)]) for i, n in enumerate(slots)]

    def cells(self, frame: list) -> dict[tuple[int, int], tuple[bytes, bytes]]:
        """(row, column) → (blob_id, origin) of a frame's level 0."""
        todo, out, height = [(frame[11], frame[12], 0, 0)], {}, frame[12]
        rows, columns = -(-frame[3] // frame[7]), -(-frame[4] // frame[8])
        least = next(h for h in range(99) if 8 ** (h + 1) >= max(rows, columns))
        need(height == least, "a root page that is not the lowest")
        while todo:
            root, height, row, column = todo.pop()
            found, entries = self.page(root)
            need(found == height, "a page of another height")
            for r, c, entry in entries:
                if height:
                    todo.append((entry, height - 1, row * 8 + r, column * 8 + c))
                else:
                    need(row * 8 + r < rows and column * 8 + c < columns, "a cell beyond the extent")
                    out[row * 8 + r, column * 8 + c] = (entry[:32], entry[32:])
        return out

    # -- Tiles

    def let_go(self, stream: str, origin: bytes, blob: bytes) -> bool:
        """Whether a tile is not there, as a record said."""
        if (TILE, blob) in self.blobs:
            return False
        opened_ns = int.from_bytes(origin[:6], "big") * 10**6
        number, digits = int.from_bytes(origin, "big"), "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
        name = "snp_" + "".join(digits[number >> 5 * at & 31] for at in range(25, -1, -1))
        need((stream, name) in self.expired or opened_ns < self.expired.get((stream, ""), 0), f"a tile of {stream}")
        return True

    def tile(self, blob: bytes) -> np.ndarray | bytes:
        """A document, or values in the dtype handed back."""
        data = self.payload(TILE, blob)
        dtype, shape, logical, quantise, scales = unpack(self.blobs[TILE, blob][0].header)
        if dtype == "bytes":
            need(shape == [len(data)], "a document's length")
            return data
        values = np.frombuffer(data, dtype_of(dtype)).reshape(shape)
        if not quantise:
            return values
        scale = np.frombuffer(scales, "<f4")
        if quantise in ("int8", "fp8"):
            per_place = scale.size == math.prod(shape[1:])
            values = values.astype("f4") * (scale.reshape(shape[1:]) if per_place else scale)
        return values.astype(dtype_of(logical))

    def tile_id(self, stream: str, frame: str, origin: bytes, level: int, x: int, y: int, blob: bytes) -> str:
        """Identities."""
        name = quote(stream, safe="") + (":" + quote(frame, safe="") if frame else "")
        numbers = struct.pack("<I", level), struct.pack("<Q", x), struct.pack("<Q", y)
        parts = [name.encode(), origin, *numbers, blob]
        return "tl_" + H(*(struct.pack("<I", len(part)) + part for part in parts)).hex()

    # -- Companions

    def levels(self, frame: list) -> dict[tuple[int, int, int], tuple[bytes, bytes, bool]]:
        """(level, row, column) → (blob_id, greatest origin, stored?) of the tiles that the companions name."""
        out, todo = {}, [(frame[11], frame[12], 0, 0, b"")] if frame[10] != "none" else []
        while todo:
            root, height, row, column, named = todo.pop()
            side_y, side_x = frame[7] * 8 ** (height + 1), frame[8] * 8 ** (height + 1)
            clip = min(side_y, frame[3] - row * side_y), min(side_x, frame[4] - column * side_x)
            need((key := (frame[10], root, height, *clip)) in self.companions, f"no companion {key}")
            own, (*_, stored_from, levels, origins, below) = self.companions[key]
            need(named in (b"", own), "a companion that is not the one named")
            need(stored_from == self._stored_from(frame, height, clip, self.page(root)[1]), "what is stored of levels")
            for m, (tiles, origin) in enumerate(zip(levels, origins, strict=True)):
                for (slot, blob), o in zip(tiles, [origin[i : i + 16] for i in range(0, len(origin), 16)], strict=True):
                    at = 3 * height + 1 + m, (row << (2 - m)) + slot // 8, (column << (2 - m)) + slot % 8
                    out[at] = (blob, o, at[0] >= stored_from)
            names = {(r, c): entry for r, c, entry in self.page(root)[1]} if height else {}
            need(sorted(8 * r + c for r, c in names) == [slot for slot, _ in below], "a companion's pages")
            for slot, companion in below:
                todo.append((names[divmod(slot, 8)], height - 1, row * 8 + slot // 8, column * 8 + slot % 8, companion))
        return out

    @staticmethod
    def _stored_from(frame: list, height: int, clip: tuple[int, int], cells: list) -> int:
        """Stored from."""

        def pixels(above: int) -> int:
            high, wide = (-(-side >> 3 * height + above) for side in clip)
            places = {(row >> above, column >> above) for row, column, _ in cells}
            return sum(min(frame[7], high - y * frame[7]) * min(frame[8], wide - x * frame[8]) for y, x in places)

        stored, allowed = 0, pixels(0) + 3 * frame[7] * frame[8]
        for above in (3, 2, 1):
            stored += pixels(above)
            if 3 * stored > allowed:
                return 3 * height + above + 1
        return 3 * height + 1

    def whole(self, frame: list) -> np.ndarray:
        """A frame's level 0; absent cells are zeros."""
        tiles = {at: self.tile(blob) for at, (blob, _) in self.cells(frame).items()}
        out = np.zeros((frame[3], frame[4], *[frame[5]][: bool(frame[5])]), dtype_of(frame[6]))
        for (row, column), values in tiles.items():
            y, x = row * frame[7], column * frame[8]
            out[y : y + values.shape[0], x : x + values.shape[1]] = values
        return out

    def levels_root(self, directory: bytes) -> bytes:
        """What a seal signs (Commit log)."""
        return self._levels_root(directory, 0) if directory else H(b"no frames")

    def _levels_root(self, node: bytes, depth: int) -> bytes:
        data = self.payload(DIRECTORY, node)
        if data[:4] == b"HDI\1":
            nibbles = [n for n in range(16) if int.from_bytes(data[4:6], "little") >> n & 1]
            children = [child for child, _ in struct.iter_unpack("<32sQ", data[8:])]
            parts = [bytes([n]) + self._levels_root(c, depth + 1) for n, c in zip(nibbles, children, strict=True)]
            return H(b"inner", *parts)
        parts = []
        for path, f in self._walk(node, ""):
            if f[10] != "none":
                reach = 8 ** (f[12] + 1)
                key = (f[10], f[11], f[12], min(f[3], f[7] * reach), min(f[4], f[8] * reach))
                parts.append(bytes(int(n, 16) for n in path) + self.companions[key][0])
        return H(b"leaf", *parts)


# -- Level rules


def exactly(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 rounded once, ties to even: by way of float32 rounded to odd where the cast itself goes that way."""
    if dtype.itemsize > 2 or dtype == np.float16:
        return values.astype(dtype)
    near = values.astype("f4")
    bits, inexact = near.view("u4"), np.isfinite(values) & (near.astype("f8") != values)
    bits = np.where(inexact & (np.abs(near) > np.abs(values)), bits - 1, bits)
    return np.where(inexact, bits | 1, bits).astype("u4").view("f4").astype(dtype)


def order(values: np.ndarray) -> np.ndarray:
    """Integers in the order of the values; floats as totalOrder has them."""
    if values.dtype.kind in "iub":
        return values
    bits = values.view(f"i{values.dtype.itemsize}")
    return bits ^ ((bits >> (8 * values.dtype.itemsize - 1)) & np.iinfo(bits.dtype).max)


@np.errstate(all="ignore")
def level_above(values: np.ndarray, rule: str, first: bool) -> np.ndarray:
    """The next level of a whole level; `first` when `values` is level 0."""
    if rule == "min-max":
        values = values if values.ndim == 3 else values[..., None]
        half = values.shape[2] // 2
        low, high = (values, values) if first else (values[..., :half], values[..., half:])
        return np.concatenate([level_above(low, "min", False), level_above(high, "max", False)], 2)
    if values.dtype.kind == "c":
        parts = values.view(f"f{values.dtype.itemsize // 2}").reshape(*values.shape, 2)
        return np.ascontiguousarray(level_above(parts, rule, first)).view(values.dtype)[..., 0]
    edges = [(0, values.shape[0] % 2), (0, values.shape[1] % 2)] + [(0, 0)] * (values.ndim - 2)
    even = np.pad(values.view(f"u{values.dtype.itemsize}"), edges, "edge").view(values.dtype)
    a, b, c, d = even[::2, ::2], even[::2, 1::2], even[1::2, ::2], even[1::2, 1::2]
    if rule in ("first", "nearest"):
        return a if rule == "first" else d
    dtype = values.dtype
    if dtype.kind in "iub" and rule == "mean":
        wide = [int_values.astype(object) for int_values in (a, b, c, d)]
        return ((sum(wide) + 2) >> 2).astype(dtype)
    if rule == "mean":
        a, b, c, d = (part.astype("f8") / (4 if dtype == np.float64 else 1) for part in (a, b, c, d))
        out = exactly(((a + c) + (b + d)) / (1 if dtype == np.float64 else 4), dtype)
        broken = np.isnan(out)
    else:
        out, pick = a, np.greater if rule == "max" else np.less
        for part in (b, c, d):
            out = np.where(pick(order(part), order(out)), part, out)
        broken = np.isnan(np.stack([a, b, c, d])).any(0) if dtype.kind not in "iub" else np.zeros(a.shape, bool)
    nan = {"float16": "007e", "bfloat16": "c07f", "float32": "0000c07f", "float64": "000000000000f87f",
           "float8_e4m3fn": "7f", "float8_e5m2": "7e"}.get(dtype.name)  # fmt: skip
    if nan and broken.any():
        out = out.copy()
        out[broken] = np.frombuffer(bytes.fromhex(nan), dtype)[0]
    return out


def derived_levels(frame: list, level0: np.ndarray):
    """((level, row, column), values, blob_id) of every tile above level 0, absent parts included."""
    values, level = level0, 0
    while level < 3 * frame[12] + 3:
        values, level = level_above(values, frame[10], level == 0), level + 1
        for y in range(0, values.shape[0], frame[7]):
            for x in range(0, values.shape[1], frame[8]):
                tile = np.ascontiguousarray(values[y : y + frame[7], x : x + frame[8]])
                header = msgspec.msgpack.encode([tile.dtype.name, tile.shape, "", "", b""])
                blob = H(struct.pack("<BI", TILE, len(header)), header, tile.tobytes())
                yield (level, y // frame[7], x // frame[8]), tile, blob
