"""Digests and check sums put right after a mutation, as whoever writes hostile bytes would do."""

import struct
import zlib
from typing import Final

from blake3 import blake3

from him.catalog.checkpoint import HEAD_BYTES
from him.config import META_BYTES_MAX
from him.pack.format import FILE_HEADER_BYTES, RECORD_HEADER_BYTES, TRAILER_BYTES
from him.tile.address import blob_id

_RECORDS_MAX: Final = 200


def pack(data: bytes) -> bytes:
    """A pack's file header, its records wherever one begins, and its trailer (docs/FORMAT.md, "Packs")."""
    out = bytearray(data)
    if out[:7] == b"HIMPACK":
        out[96:FILE_HEADER_BYTES] = blake3(out[:96]).digest()
    for at in [at for at in range(0, len(out), 64) if out[at : at + 4] == b"HREC"][:_RECORDS_MAX]:
        _record(out, at)
    if out[-TRAILER_BYTES:][:8] == b"HIMPKEND":
        head = bytes(out[-TRAILER_BYTES:][:64])
        out[-TRAILER_BYTES:] = head + blake3(head).digest() + bytes(32)
    return bytes(out)


def _record(out: bytearray, at: int) -> None:
    if len(out) < at + RECORD_HEADER_BYTES:
        return
    kind, codec, meta_size, pad, size = struct.unpack_from("<BBIIQ", out, at + 6)
    body = at + RECORD_HEADER_BYTES + meta_size
    if meta_size > META_BYTES_MAX or body + pad + size > len(out):
        return
    meta, stored = bytes(out[at + RECORD_HEADER_BYTES : body]), bytes(out[body + pad : body + pad + size])
    if codec == 0 and not any(out[at + 136 : at + 152]):
        out[at + 32 : at + 64] = out[at + 64 : at + 96] = blob_id(kind, meta, stored)
    else:
        out[at + 64 : at + 96] = blake3(stored).digest()
    out[at + 224 : at + 256] = blake3(bytes(out[at : at + 224]) + meta).digest()


def parity(data: bytes) -> bytes:
    """Head and table of a parity file, one behind the other."""
    return data[:64] + blake3(data[:64] + data[96:]).digest() + data[96:]


def checkpoint(data: bytes) -> bytes:
    """A checkpoint's file."""
    head, body = data[: HEAD_BYTES - 32], data[HEAD_BYTES:]
    return head + blake3(head + body).digest() + body


def log(data: bytes) -> bytes:
    """A log's records, each naming the hash of the one before, with the published end (80 bytes) behind them."""
    out, end = bytearray(data[:-80]), data[-80:]
    offset, seq, before = 0, 0, bytes(32)
    while out[offset : offset + 4] == b"HLOG" and len(out) >= offset + 48:
        size = int.from_bytes(out[offset + 4 : offset + 8], "little")
        if offset + size + 84 > len(out):
            break
        seq += 1
        out[offset + 8 : offset + 48] = seq.to_bytes(8, "little") + before
        before = blake3(bytes(out[offset : offset + 48 + size])).digest()
        out[offset + 48 + size : offset + 84 + size] = before + (size + 84).to_bytes(4, "little")
        offset += size + 84
    return bytes(out) + end[:48] + blake3(end[:48]).digest()


def sealed(data: bytes) -> bytes:
    """`him.json` and `tier.json`: the digest is their last member."""
    body = data.partition(b',"digest":"')[0].removesuffix(b"\n").removesuffix(b"}")
    return body + b',"digest":"' + blake3(body).hexdigest().encode() + b'"}\n'


def keyring(data: bytes) -> bytes:
    """A key ring's file."""
    return data[:8] + blake3(data[40:]).digest() + data[40:]


def png(data: bytes) -> bytes:
    """The check sums of a PNG's parts."""
    out, at = bytearray(data), 8
    while data[:4] == b"\x89PNG" and len(out) >= at + 12:
        size = int.from_bytes(out[at : at + 4])
        if at + 12 + size > len(out):
            break
        out[at + 8 + size : at + 12 + size] = zlib.crc32(bytes(out[at + 4 : at + 8 + size])).to_bytes(4)
        at += 12 + size
    return bytes(out)
