"""Small inputs that are sound: of the golden repositories, of the demo's screens, or made by the software here."""

import hashlib
import io
import struct
from functools import cache
from pathlib import Path
from typing import Final
from unittest import mock

import msgspec
import numpy as np
from PIL import Image

from him.adapters import keyfile
from him.catalog.log import END_BYTES as END_BYTES
from him.catalog.log import LOG_PATH
from him.pack import format as layout
from him.pack import parity
from him.pack.encrypted import encrypted as encrypted_draft
from him.pack.file import walk
from him.perception.scene import build
from him.perception.tree import parse_tree
from him.replay.trace import Effect, Recording, new_trace
from him.sim.disk import MemDisk
from him.tier.settings import TierSettings
from him.tile import chunks, codec, delta
from him.tile.address import KIND_COMPANION, KIND_DIRECTORY, KIND_PAGE, KIND_TILE
from him.types import HashKey, KeyEntry, Secret, SnapshotId

ROOT: Final = Path(__file__).parent.parent
GOLDEN: Final = tuple(ROOT / f"tests/golden/v{version}/repository" for version in (1, 2))
SECRET: Final = Secret(b"s" * 32)
PASSPHRASE: Final = "correct horse"
REPOSITORY_ID: Final = "00112233445566778899aabbccddeeff"
BYTES_MAX: Final = 20_000
"""Of one seed."""
_OF_A_KIND: Final = 12
"""Records of the golden repositories that are taken, of each kind."""


class Rng:
    """The same bytes always."""

    def token(self, size: int) -> bytes:
        """So many bytes."""
        return hashlib.shake_128(b"seed").digest(size)


RNG: Final = Rng()


@cache
def _records() -> tuple[layout.Record, ...]:
    """Small records of the golden repositories."""
    found: list[layout.Record] = []
    for path in sorted(path for golden in GOLDEN for path in golden.glob("packs/*.pack")):
        disk = MemDisk()
        disk.write_whole("pack", path.read_bytes())
        for _, one in walk(disk.open("pack"), "pack", layout.FILE_HEADER_BYTES, path.stat().st_size):
            if isinstance(one, layout.Record) and one.header.record_size < BYTES_MAX:
                found.append(one)
    return tuple(found)


def _payloads(kind: int) -> list[bytes]:
    """Payloads of one kind, of all sizes there are."""
    found = sorted(
        {bytes(one.stored) for one in _records() if one.header.kind == kind}, key=lambda one: (len(one), one)
    )
    return found[:: max(1, len(found) // _OF_A_KIND)]


def _tiles() -> list[layout.Record]:
    """Tiles of every codec, dtype and way of quantising there is."""
    unlike: dict[tuple[int, bytes], layout.Record] = {}
    for one in _records():
        if one.header.kind == KIND_TILE:
            unlike.setdefault((one.header.codec, one.meta[:12]), one)
    return list(unlike.values())


def packs() -> list[bytes]:
    """Whole small packs, single records, rows."""
    files = [path.read_bytes() for golden in GOLDEN for path in sorted(golden.glob("packs/*.pack"))]
    whole = [data for data in files if len(data) < BYTES_MAX]
    single = [bytes(data[128:1024]) for data in files] + [data[-1024:] for data in files]
    draft = encrypted_draft(layout.Draft(KIND_TILE, 1, SECRET.blob_id, b"m", b"x" * 40, 40), SECRET, _HASH_KEY)
    return [*whole, *single, b"".join(layout.encode_record(0, draft).parts)]


_HASH_KEY: Final = HashKey(bytes(16), bytes(32))


def encrypted() -> list[bytes]:
    """Kind, codec, size u64, nonce (24), stored bytes."""
    made: list[bytes] = []
    for one in _tiles()[:20]:
        body = len(one.meta).to_bytes(4, "little") + one.meta + bytes(one.stored)
        head = struct.pack("<BBQ", KIND_TILE, one.header.codec, one.header.raw_size)
        draft = layout.Draft(KIND_TILE, one.header.codec, SECRET.blob_id, one.meta, one.stored, one.header.raw_size)
        sealed = encrypted_draft(draft, SECRET, _HASH_KEY)
        made += [head + bytes(24) + body, head + sealed.nonce + bytes(sealed.stored)]
    return made


def parities() -> list[bytes]:
    """Head (96) and table of a parity file; the zeros and chunks between are left out."""
    member = parity.Member("packs/00.pack", 100, bytes(32), bytes(32))
    group = parity.Group((member, parity.Member("packs/01.pack", 7, bytes(32), bytes(32))), (bytes(32), bytes(32)))
    head, _, table = parity.encode_ends(bytes(16), group, 0)
    return [head + table]


def pages() -> list[bytes]:
    """Of every height there is."""
    return _payloads(KIND_PAGE)


def directories() -> list[bytes]:
    """Leaves and inner nodes, plain and encrypted."""
    plain = _payloads(KIND_DIRECTORY)
    rows = [msgspec.msgpack.decode(one[4:]) for one in plain if one[:4] == b"HDL\x01"]
    leaves = [b"HDL\x02" + msgspec.msgpack.encode([[*row, True] for row in found]) for found in rows[:3]]
    return [*plain, *leaves, b"HDI\x02\x03\x00\x00\x00" + 2 * (b"\x01" + bytes(40))]


def companions() -> list[bytes]:
    """Of pages of every height there is."""
    return _payloads(KIND_COMPANION)


def logs() -> list[bytes]:
    """Bodies of records; and the beginning of a log with its published end behind it."""
    whole = (GOLDEN[1] / LOG_PATH).read_bytes()
    bodies, ends, offset = dict[bytes, bytes](), [0], 0
    while offset < len(whole):
        size = int.from_bytes(whole[offset + 4 : offset + 8], "little")
        body = whole[offset + 48 : offset + 48 + size]
        bodies.setdefault(bytes(byte for byte in body if 97 <= byte <= 122)[:12], body)
        offset += size + 84
        ends.append(offset)
    end = (GOLDEN[1] / "log/end").read_bytes()
    begun = [whole[: ends[count]] + struct.pack("<QQ", count, ends[count]) + bytes(64) for count in (1, 3, 8)]
    return [*bodies.values(), *begun, whole[: ends[4]] + end]


def checkpoints() -> list[bytes]:
    """Of versions 2 and 1."""
    return [path.read_bytes() for golden in GOLDEN for path in sorted(golden.glob("log/checkpoints/*"))]


def markers() -> list[bytes]:
    """`him.json` of formats 1 and 2."""
    return [(golden / "him.json").read_bytes() for golden in GOLDEN]


def tiers() -> list[bytes]:
    """`tier.json`."""
    return [TierSettings("s3://bucket/a", 2**30, 3, 7, "GLACIER").encoded(), TierSettings("x", 1, None).encoded()]


def traces() -> list[bytes]:
    """A trace, and what is encrypted of one."""
    recording = Recording()
    recording.effects.append(Effect("clock", b"\0" * 8))
    recording.step("rank", b"in", b"out")
    made = new_trace("tr_0", "query", "snp_0", "00" * 32, {"goal": "x", "k": 3, "b": 1.5}, {"a": "b"}, recording, "{}")
    whole = msgspec.json.encode(made.with_digest(), order="sorted")
    return [whole + b"\n", b'{"trace":' + whole + b',"secret":"' + b"00" * 32 + b'"}']


def tiles() -> list[bytes]:
    """Codec, length of the header u16, header, stored bytes."""
    return [
        struct.pack("<BH", one.header.codec, len(one.meta)) + one.meta + bytes(one.stored)
        for one in _tiles()
        if one.header.codec <= codec.SHUFFLE_ZSTD
    ]


@cache
def base() -> tuple[bytes, bytes]:
    """(payload, header) of the tile that deltas change: uint8 of 64×64."""
    values = (np.arange(4096, dtype=np.int64) ** 2 % 251).astype(np.uint8)
    return values.tobytes(), msgspec.msgpack.encode(codec.TileHeader("uint8", (64, 64)))


def deltas() -> list[bytes]:
    """A client's deltas; and bare ones: shape, codec, stored bytes."""
    payload, header = base()
    values = np.frombuffer(payload, dtype=np.uint8).reshape(64, 64).copy()
    values[3:9, 20:40] ^= 1
    made: list[bytes] = []
    for how in (delta.BLOCKS, delta.XOR, delta.PATCH):
        change = delta.encode_as(how, codec.parse_header(header), payload, values.tobytes())
        given = delta.ClientDelta("tl_" + "0" * 64, header, how, change.stored, "0" * 64)
        made += [msgspec.msgpack.encode(given), bytes([0, how - delta.BLOCKS]) + change.stored]
    return made


def chunk_lists() -> list[bytes]:
    """Size of the document u64, rows."""
    made = [chunks.Chunk(SECRET.blob_id, length) for length in (5000, 2048, 65536, 17)]
    return [(5000 + 2048 + 65536 + 17).to_bytes(8, "little") + chunks.encode_list(made)]


def trees() -> list[bytes]:
    """A real tree cut to some nodes, and a small one of every member."""
    whole = msgspec.json.decode((ROOT / "examples/screens/adminlte-login.tree.json").read_bytes())
    small = [{"id": 1, "role": "button", "name": "Ok", "bbox": [1, 2.5, 30, 40], "state": {"checked": True, "x": 1.5}}]
    return [msgspec.json.encode(whole[:12]), msgspec.json.encode([*small, {**small[0], "id": "2", "parent": 1}])]


def scenes() -> list[bytes]:
    """What such a tree makes."""
    return [
        msgspec.json.encode(build((600, 800), (), (), parse_tree(one), {"a": "b"}), order="sorted") for one in trees()
    ]


def kv_records() -> list[bytes]:
    """The document beside a cache."""
    binding = {"model": "m", "tokenizer": "t", "positions": "rope", "dtype": "float16"}
    binding |= {"layers": 2, "kv_heads": 3, "dim": 4}
    return [msgspec.msgpack.encode([1, binding, "kv_cache", [bytes(32)], bytes(8)])]


def keyrings() -> list[bytes]:
    """A ring whose passphrase is derived cheaply, empty and with keys."""
    with mock.patch.multiple(keyfile, _MEMORY_KIB=64, _ITERATIONS=1, _LANES=1):
        disk = MemDisk()
        ring = keyfile.KeyFile.create(disk, "ring", REPOSITORY_ID, keyfile.Passphrase(PASSPHRASE, RNG), RNG)
        empty = bytes(disk.files["ring"].now)
        ring.change([KeyEntry(bytes(16), bytes(32), "open", SnapshotId("snp_0"))], ())
        return [empty, bytes(disk.files["ring"].now)]


def arrays() -> list[bytes]:
    """`.npy` of both orders and versions, and of no value."""
    made: list[bytes] = []
    for values in (np.arange(24, dtype="<f4").reshape(4, 6), np.zeros((2, 3, 2), ">i2", order="F"), np.zeros((0, 3))):
        for version in ((1, 0), (2, 0)):
            file = io.BytesIO()
            np.lib.format.write_array(file, values, version=version)
            made.append(file.getvalue())
    return made


def _saved(picture: Image.Image, kind: str, **given: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **given)
    return file.getvalue()


def pngs() -> list[bytes]:
    """Of every colour type, with text, transparency and EXIF."""
    colour = Image.frombytes("RGBA", (9, 5), bytes(range(180)))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    made = [_saved(colour.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1")]
    return [*made, _saved(colour, "PNG", exif=exif), _saved(colour.convert("P"), "PNG", transparency=3)]


def pictures() -> list[bytes]:
    """Of every format that is read."""
    colour = Image.frombytes("RGB", (9, 5), bytes(range(135)))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        *pngs(),
        _saved(colour, "BMP"),
        _saved(colour, "WEBP"),
        *(_saved(colour, "JPEG", exif=e) for e in (exif, b"")),
    ]
