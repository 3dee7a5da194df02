"""Known answers for what correctness hangs on, asked once a process before a repository is touched (design/013).

A part that was built wrongly, replaced by another version, or runs on a processor that errs would otherwise write what
no other machine reads, or read what was never written. The quick set takes about a millisecond; `him doctor` asks more.
"""

import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import msgspec
import numpy as np
from blake3 import blake3

from him.errors import HimError, MissingPartError
from him.index.vector import scan
from him.tile import chunks, codec, delta, downsample
from him.tile.address import blob_id
from him.tile.codec import TileHeader

Test = Callable[[], bytes]
"""Gives bytes that must be the known ones."""
_FIX: Final = "install him again with the parts of its lock file, then run `him doctor`"
_FAILURES: Final = (HimError, ArithmeticError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError)
_KEY: Final = b"whats the Elvish word for friend"
_HEADER: Final = TileHeader("uint8", (32, 32))
_BLOCKS: Final = (
    "0128b52ffd601000550600a40b0200e3811fbe5cfa9836d57311af4eec8a28aa48e68523c15ffd9c3ad87615b351ef710fad4bea8826c463019f"
    "3ddb7a18b63807df7dff07a644c6076d0b8d0734d25407fb991a07c160e1801ebc5af89735d37110ae4cea8827a847e58321bf5efc9a38d67513"
    "b14fee6f0dac4ae88625c361ff9d3cda7816b436d47311af4deb8a28c66403a13fdd7bfd9b3ad87614b251ef8d2bc96806a442c462009f3ddb79"
    "18b654f2902fcd6b098b29c76604a240df7d1bb957f69432d00710001ce1084738c211e1a08c05"
)
_XOR: Final = (
    "28b52ffd60000345030064050000d17315b648ea8c2dcf6103a546009a3cde7f11b355f7882acc6e0f006305a738da7c1eb051f39537c9002cce"
    "6002a345e7791abc5ef09200f59729cb6c0ea042e48527b95b00be50f29435d7690bad4ee0822400071000de2ac5533cc5533cc5532cc502"
)
_PATCH: Final = "28b52ffd6000036500000002005d47c90a3a23ea0101"
_ZSTD: Final = "28b52ffd600400a50000686b6e6f776e20616e7377657220010074a0e617"
_SHUFFLED: Final = (
    "28b52ffd206001030000ead3bd4e21f5c838df0bb2b20bdf38c8f5214ebdd3ea00004d9be96f0ba642bdf459909059f4bd42a60b6fe99b4d0040"
    "2f1e0dfad9b7966926c80505c8266996b7d9fa0d1e2f40c0c0c0c0bfbfbfbfbfbfbebe3e3e3f3f3f3f3f3f40404040"
)


def _pattern() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(32, 32) uint8 without a pattern to the eye."""
    spread = np.arange(1024, dtype=np.uint64) * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)
    return (spread >> np.uint64(24)).astype(np.uint8).reshape(32, 32)


def _ramp() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """(6, 4) float32 from -3 to 3."""
    return (np.arange(24, dtype=np.float32).reshape(6, 4) - np.float32(11.5)) * np.float32(0.25)


def _decoded_delta(kind: int, stored: str) -> bytes:
    made = delta.decode(kind, _HEADER, _pattern().tobytes(), bytes.fromhex(stored))
    return blake3(made).digest()[:8]


def _halved(rule: str) -> bytes:
    return downsample.halve(_pattern()[:5, :5], rule, first=True).tobytes()


def _quantised(way: str) -> bytes:
    tile = codec.encode_array(_ramp(), quantise=way)
    values = codec.values_of(tile.header, tile.payload)
    assert not isinstance(values, bytes)
    return blake3(bytes(tile.payload) + values.tobytes()).digest()[:8]


def _dots() -> bytes:
    rows = _pattern().view(np.int8)
    return blake3(scan(rows, rows[3]).astype("<i8").tobytes()).digest()[:8]


def _byte_order() -> bytes:
    return struct.pack("<HIQ", 1, 2, 3) + np.array([1, 256], dtype="<u2").tobytes() + np.float32(1.5).tobytes()


def _messages() -> bytes:
    return msgspec.msgpack.encode([1, -1, 2**40, "é", b"\0", None, 1.5]) + msgspec.json.encode({"a": [1, "é"]})


QUICK: Final[tuple[tuple[str, Test, str], ...]] = (
    ("blake3", lambda: blake3(b"abc").digest(), "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"),
    (
        "blake3 with a key", lambda: blake3(b"", key=_KEY).digest(),
        "92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26",
    ),
    ("blob_id", lambda: blob_id(1, b"header", b"payload")[:8], "0022c89b6fdb089b"),
    ("zstd", lambda: bytes(codec.decompress(codec.ZSTD, bytes.fromhex(_ZSTD), 260, 1))[-13:], b"known answer ".hex()),
    (
        "byte shuffle",
        lambda: blake3(codec.decompress(codec.SHUFFLE_ZSTD, bytes.fromhex(_SHUFFLED), 96, 4)).digest()[:8],
        "709137d440f5c1b4",
    ),
    ("delta of blocks", partial(_decoded_delta, delta.BLOCKS, _BLOCKS), "d1f45749f389a916"),
    ("delta by XOR", partial(_decoded_delta, delta.XOR, _XOR), "d1f45749f389a916"),
    ("delta by patch", partial(_decoded_delta, delta.PATCH, _PATCH), "3d2070ae5afa6c6b"),
    ("levels by mean", partial(_halved, "mean"), "726f5c807d6a6aa794"),
    ("levels by maximum", partial(_halved, "max"), "c6da78f3cacdb9f694"),
    ("levels by minimum", partial(_halved, "min"), "00033f2c2f061b5894"),
    ("int8 quantisation", partial(_quantised, "int8"), "e0ddcb83d5d91bda"),
    ("fp8 quantisation", partial(_quantised, "fp8"), "4bd1f13ecedf0f2b"),
    ("fp16 quantisation", partial(_quantised, "fp16"), "89011dc6ac446573"),
    ("int8 dot product", _dots, "25ddd5d76d02a774"),
    ("byte order", _byte_order, "0100020000000300000000000000010000010000c03f"),
    ("messages", _messages, "9701ffcf0000010000000000a2c3a9c40100c0cb3ff80000000000007b2261223a5b312c22c3a9225d7d"),
)  # fmt: skip
"""(what, test, the known answer in hex)."""

LONG: Final[tuple[tuple[str, Test, str], ...]] = (
    ("blake3 of a mebibyte", lambda: blake3(bytes(range(256)) * 4096).digest()[:8], "64479cf729396021"),
    ("all fp8 values", lambda: blake3(np.nan_to_num(_fp8()).tobytes()).digest()[:8], "7f60a5fceb116498"),
    (
        "chunk ends",
        lambda: struct.pack("<6I", *[len(part) for part in chunks.split(_long())][:6]),
        "773c0000530a00002d2d00007d2300005b240000289c0000",
    ),
    (
        "levels of all halves",
        lambda: blake3(downsample.halve(_halves(), "mean", first=True).tobytes()).digest()[:8],
        "552a05689d48c1fe",
    ),
    ("zstd both ways", lambda: blake3(_there_and_back(codec.ZSTD, 1)).digest()[:8], "c8a48cd593eb0c98"),
    ("shuffle both ways", lambda: blake3(_there_and_back(codec.SHUFFLE_ZSTD, 4)).digest()[:8], "72b98feb966466be"),
)


def failures(tests: tuple[tuple[str, Test, str], ...] = QUICK) -> Iterator[str]:
    """What gives another answer than the known one, with both in hex."""
    for name, test, known in tests:
        try:
            got = test().hex()
        except (
            HimError,
            ArithmeticError,
            AttributeError,
            ImportError,
            LookupError,
            OSError,
            TypeError,
            ValueError,
        ) as error:
            yield f"{name} fails ({type(error).__name__}: {error})"
            continue
        if got != known:
            yield f"{name} gives {got[:32]} where {known[:32]} is right"


class _Once:
    """Whether this process has passed."""

    passed = False


def ensure() -> None:
    """Run the quick set at the first call of a process.

    Raises:
        MissingPartError: a part does not work as it must; nothing was touched.
    """
    if not _Once.passed:
        for failure in failures():
            raise MissingPartError(f"the self-test failed, and nothing was touched: {failure}", fix=_FIX)
        _Once.passed = True


def _fp8() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """float32 of every fp8 byte."""
    return np.arange(256, dtype=np.uint8).view(codec.DTYPES["float8_e4m3fn"]).astype(np.float32)


def _halves() -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """(256, 256) float16: every bit pattern, what is no number among them."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256)


def _long() -> bytes:
    """100,000 bytes that repeat late."""
    return b"".join(blake3(number.to_bytes(4, "little")).digest() for number in range(3125))


def _there_and_back(kind: int, itemsize: int) -> bytes:
    tile = codec.encode_array(np.arange(60_000, dtype=np.uint8 if itemsize == 1 else np.float32))
    assert tile.codec == kind
    return bytes(codec.decompress(tile.codec, tile.stored, 60_000 * itemsize, itemsize))
