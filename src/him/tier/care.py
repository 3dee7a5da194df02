"""What happened to damaged bytes, for all processes of a repository: an append-only journal that can be deleted.

A record that could not be healed is in *quarantine*: it is read only where there is no other of its blob, and does not
count as stored, so that whoever puts the same content again mends it.
"""

import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, Literal

import msgspec

from him.config import CARE_EVENTS_KEPT, CARE_JOURNAL_BYTES_MAX
from him.errors import NotFoundError
from him.ports import Clock, Disk, File
from him.tier import lines

JOURNAL: Final = "care/journal"
_HEAD_BYTES: Final = 256
"""Of a file that only grows the beginning stays."""
What = Literal["healed", "quarantined", "released"]


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the journal."""

    time_ns: int
    what: What
    pack: str
    offset: int
    size: int
    blob: str = ""
    """Of a record in quarantine, in hex."""
    why: str = ""
    """Where sound bytes came from, or what is wrong."""


class Journal:
    """The file; safe to use from several threads."""

    def __init__(self, disk: Disk, clock: Clock, *, read_only: bool = False) -> None:
        self._disk, self._clock, self._read_only = disk, clock, read_only
        self._file: File | None = None
        self._end, self._head = 0, b""
        # The file's lock holds between processes; threads of one share its descriptor.
        self._threads = threading.RLock()
        self._held: dict[tuple[str, int], Event] = {}
        self._healed: list[Event] = []

    def add(self, what: What, pack: str, offset: int, size: int, *, blob: str = "", why: str = "") -> None:
        """Note an event, if anything can be written. Raises StorageError."""
        if self._read_only or (what == "quarantined" and (pack, offset) in self.quarantined()):
            return
        with self._threads:
            file = self._file = self._file or self._disk.open(JOURNAL, create=True)
            file.lock(wait=True)
            try:
                self._learn(file)
                event = Event(self._clock.now_ns(), what, pack, offset, size, blob, why)
                self._end = lines.append(file, self._end, event)
                self._apply(event)
                if self._end > CARE_JOURNAL_BYTES_MAX:
                    self._shorten(file)
            finally:
                file.unlock()

    def quarantined(self) -> Mapping[tuple[str, int], Event]:
        """Records in quarantine, by pack and offset."""
        with self._threads:
            with suppress(NotFoundError):
                self._file = self._file or self._disk.open(JOURNAL)
                if self._file.size() != self._end:
                    self._learn(self._file)
            return dict(self._held)

    def healed(self) -> list[Event]:
        """What was healed, oldest first; the journal keeps the last ones."""
        self.quarantined()
        return list(self._healed)

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _learn(self, file: File) -> None:
        if file.size() < self._end or file.read_at(0, len(self._head)) != self._head:
            # Another process has shortened it.
            self._end, self._held, self._healed = 0, {}, []
        self._head = file.read_at(0, _HEAD_BYTES)
        for event, end in lines.read(file, self._end, Event):
            self._end = end
            if event is not None:
                self._apply(event)

    def _apply(self, event: Event) -> None:
        if event.what == "quarantined":
            self._held[event.pack, event.offset] = event
            return
        for key in [one for one in self._held if one[0] == event.pack and _within(one[1], event)]:
            del self._held[key]
        if event.what == "healed":
            self._healed = [*self._healed[-CARE_EVENTS_KEPT + 1 :], event]

    def _shorten(self, file: File) -> None:
        """Keep what holds still. A crash in between loses events, never bytes of a pack."""
        kept = b"".join(map(lines.encode, (*self._healed, *self._held.values())))
        file.truncate(0)
        file.write_at(0, kept)
        file.sync()
        self._end = len(kept)


def _within(offset: int, event: Event) -> bool:
    return event.offset <= offset < event.offset + event.size
