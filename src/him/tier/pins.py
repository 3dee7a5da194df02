"""Pins by name, for all processes of a repository at once: a small file that is read whenever room is made."""

from collections.abc import Mapping
from typing import Final

import msgspec
from blake3 import blake3

from him.config import PINS_BYTES_MAX
from him.errors import LimitError, NotFoundError
from him.ports import Disk
from him.types import MALFORMED

PinsByPack = dict[str, dict[int, int]]
"""Pack → extent → until when, in ns since 1970."""

PINS: Final = "cold/pins"
_DIGEST: Final = 32
_Rows = dict[str, list[tuple[int, int, int]]]
"""Pack → (first extent, last, until) of neighbours that are pinned alike."""


class Pins:
    """The file; every call only with the account's lock held. It is replaced whole: a crash leaves old or new."""

    def __init__(self, disk: Disk, *, read_only: bool) -> None:
        self._disk = disk
        self._read_only = read_only
        self._seen = b""

    def news(self) -> PinsByPack | None:
        """All pins, when they are others than at the last look; else None."""
        data = b"" if self._read_only else self._read()
        if data == self._seen:
            return None
        self._seen = data
        return _parsed(data)

    def change(self, changes: Mapping[str, Mapping[int, int]], now_ns: int) -> None:
        """Pin extents until a time (the later of two counts), or take pins back (0); those that have ended go.

        Raises:
            LimitError: more pins than are kept.
        """
        if self._read_only:
            return
        before = self._read()
        pins = _parsed(before)
        for pack, extents in changes.items():
            known = pins.setdefault(pack, {})
            for extent, until in extents.items():
                known[extent] = max(until, known.get(extent, 0)) if until else 0
        body = msgspec.msgpack.encode(_rows(pins, now_ns))
        if _DIGEST + len(body) > PINS_BYTES_MAX:
            raise LimitError("more extents are pinned than can be", fix="unpin something, or pin whole frames")
        data = blake3(body).digest() + body
        if data != before:  # Neighbours that are read one by one share an extent.
            self._disk.write_whole(PINS, data)

    def _read(self) -> bytes:
        try:
            file = self._disk.open(PINS)
        except NotFoundError:
            return b""
        try:
            return file.read_at(0, min(file.size(), PINS_BYTES_MAX))
        finally:
            file.close()


def _rows(pins: PinsByPack, now_ns: int) -> _Rows:
    found: _Rows = {}
    for pack in sorted(pins):
        rows: list[tuple[int, int, int]] = []
        for extent, until in sorted(pins[pack].items()):
            if until <= now_ns:
                continue
            if rows and rows[-1][1:] == (extent - 1, until):
                rows[-1] = (rows[-1][0], extent, until)
            else:
                rows.append((extent, extent, until))
        if rows:
            found[pack] = rows
    return found


def _parsed(data: bytes) -> PinsByPack:
    if blake3(data[_DIGEST:]).digest() != data[:_DIGEST]:
        return {}
    try:
        rows = msgspec.msgpack.decode(data[_DIGEST:], type=_Rows)
    except MALFORMED:
        return {}
    return {
        pack: {extent: until for first, last, until in found for extent in range(first, last + 1)}
        for pack, found in rows.items()
    }
