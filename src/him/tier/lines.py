"""Small append-only files of lines, each with its digest: a crash or a rotten byte costs the lines it meets."""

from collections.abc import Iterator
from typing import TypeVar

import msgspec
from blake3 import blake3

from him.ports import File
from him.types import MALFORMED

_T = TypeVar("_T", bound=msgspec.Struct)


def encode(value: msgspec.Struct) -> bytes:
    """A line: JSON and its digest."""
    body = msgspec.json.encode(value)
    return body + b" " + blake3(body).hexdigest().encode() + b"\n"


def decode(line: bytes, kind: type[_T]) -> _T | None:
    """What `encode` was given; None of anything else."""
    body, _, digest = line[:-1].rpartition(b" ")
    if line[-1:] != b"\n" or blake3(body).hexdigest().encode() != digest:
        return None
    try:
        return msgspec.json.decode(body, type=kind)
    except MALFORMED:
        return None


def read(file: File, start: int, kind: type[_T]) -> Iterator[tuple[_T | None, int]]:
    """What the whole lines from an offset on say, and where each ends; None for a damaged one."""
    # Nothing but a line feed ends a line: `splitlines` would let a rotten byte (a carriage return) end them all.
    *whole, _ = file.read_at(start, max(0, file.size() - start)).split(b"\n")
    for line in whole:
        start += len(line) + 1
        yield decode(line + b"\n", kind), start


def append(file: File, end: int, value: msgspec.Struct) -> int:
    """Add a line where the whole ones end, cutting what a crash left half written; where it ends now."""
    line = encode(value)
    file.truncate(end)
    try:
        file.write_at(end, line)
        file.sync()
    except BaseException:
        # Others read it at once, and must not act on a line that a power loss would take.
        file.truncate(end)
        raise
    return end + len(line)
