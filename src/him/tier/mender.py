"""What is damaged here, made again from the cold tier or from parity, and noted in the journal of healings."""

from collections.abc import Callable
from contextlib import suppress

from him.errors import HimError, IntegrityError, NotFoundError, UnavailableError
from him.pack import format as layout
from him.tier.care import Journal, What
from him.tier.mirror import Mirror
from him.tier.protect import Parity
from him.types import BlobId


class Mender:
    """Has what can make damaged bytes again, if there is anything."""

    def __init__(self, mirror: Mirror | None, parity: Parity | None, journal: Journal | None) -> None:
        self.parity = parity
        """What makes damaged bytes of finished packs again, if anything does."""
        self._mirror, self._journal = mirror, journal

    def record(
        self, blob: BlobId, name: str, offset: int, size: int, again: Callable[[], layout.Record]
    ) -> layout.Record | None:
        """A record as the cold tier has it or parity makes it, put in the place of what did not verify; or None.

        Args:
            again: reads it once more from the pack here.

        Raises:
            UnavailableError: the cold tier does not answer, and there is nothing else.
        """
        lost: HimError | None = None
        if self._mirror is not None and self._mirror.holds(name):
            try:
                data = self._mirror.fetch(name, offset, size)
                record = layout.decode_record(data, f"{name} @ {offset}", blob)
                if self._mirror.heal(name, offset, data):
                    self.note("healed", name, offset, size, why="cold")
                return record
            except (IntegrityError, UnavailableError) as error:
                lost = error
        with suppress(IntegrityError):
            if self.parity is not None and self.parity.mend(name, offset, size):
                return again()
        if isinstance(lost, UnavailableError):
            raise lost
        return None

    def pack(self, name: str) -> bool:
        """Put right what is here of a pack; whether reading it again is worth while.

        Raises:
            StorageError: the cold tier, which may have it right, does not answer, or the disk refuses.
        """
        with suppress(HimError):  # What is lost beyond parity mends nothing.
            if self.parity is not None and self.parity.protects(name) and self.parity.mend(name):
                return True
        with suppress(IntegrityError, NotFoundError):
            return self._mirror is not None and self._mirror.mend(name)
        return False

    def note(self, what: What, name: str, offset: int, size: int, *, blob: str = "", why: str = "") -> None:
        """Keep what happened to a record; a disk that refuses has not undone it."""
        if self._journal is not None:
            with suppress(HimError):
                self._journal.add(what, name, offset, size, blob=blob, why=why)
