"""What a cold tier holds beside the packs, and whose it is (docs/design/008-tiers.md).

him.json                 which repository it is of
receipts/NAME.pack       that packs/NAME.pack was read back whole
log/START                the log's bytes from START on, in pieces; each follows from those before
log/GENERATION/START     the same, by the repository that has taken the cold tier over since
owners/GENERATION        that it has, and up to where the log of those before is its own too
"""

import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3

from him.config import COLD_PART_BYTES
from him.errors import ConflictError, IntegrityError, NotFoundError, UnavailableError
from him.ports import Disk, ObjectStore
from him.tier import lines
from him.types import MALFORMED

_LOG_KNOWN: Final = "cold/log"
_OWNERS: Final = "owners/"
_SMALL_OBJECT_MAX: Final = 1024 * 1024
_TAKE_OVER: Final = "name another place with `him tier set`, or take this one over: `him tier set --take-over`"

ReadLog = Callable[[int, int], bytes]
"""The log's bytes from an offset on, at most so many."""


class Receipt(msgspec.Struct, frozen=True):
    """That the cold tier gave back a pack byte for byte after it was copied there."""

    pack: str
    size: int
    digest: str
    """BLAKE3 of the object, in hex; empty where the pack is gone from both tiers."""


class Piece(NamedTuple):
    """An object that holds a part of the log; of its bytes the first `size` count."""

    name: str
    generation: int
    start: int
    size: int


class _Owner(msgspec.Struct, frozen=True):
    """What `owners/GENERATION` holds. `before`: (generation, where the log ceases to be that one's), in order."""

    nonce: str
    before: tuple[tuple[int, int], ...]


class Claim(NamedTuple):
    """Who copies the log, and from which byte on; generation None: nobody here, it is only read."""

    generation: int | None
    begins: int


# -- packs


def receipt_name(pack: str) -> str:
    """Where the receipt of `packs/NAME` lies."""
    return f"receipts/{pack.rpartition('/')[2]}"


def receipt_of(cold: ObjectStore, pack: str) -> Receipt | None:
    """The receipt the cold tier keeps of a pack, if any. Raises IntegrityError for what is none."""
    try:
        found = lines.decode(cold.get(receipt_name(pack), _SMALL_OBJECT_MAX), Receipt)
    except NotFoundError:
        return None
    if found is None or found.pack != pack:
        raise IntegrityError("a receipt in the cold tier is damaged", object=pack, place=receipt_name(pack))
    return found


def digest_of(cold: ObjectStore, pack: str, size: int, pace: Callable[[int], None] | None = None) -> str:
    """BLAKE3 of an object, read in full, or empty where it is shorter; `pace` is told of every part."""
    digest = blake3()
    for start in range(0, size, COLD_PART_BYTES):
        try:
            part = cold.get_ranges(pack, [(start, min(COLD_PART_BYTES, size - start))])[0]
        except NotFoundError:
            return ""
        digest.update(part)
        if pace is not None:
            pace(len(part))
    return digest.hexdigest()


# -- whose it is


def newest(cold: ObjectStore) -> int:
    """The generation of the repository that has taken the cold tier over last; 0 for the first."""
    known = [name.removeprefix(_OWNERS) for name, _ in cold.list(_OWNERS)]
    generation = max((int(digits) for digits in known if re.fullmatch(r"\d{8}", digits)), default=0)
    # The list may be behind.
    while cold.size(_owner_name(generation + 1)) is not None:
        generation += 1
    return generation


def check_owner(cold: ObjectStore, generation: int | None) -> None:
    """Whether this generation may write. Raises ConflictError when another has followed it, or it never might."""
    if generation is None:
        raise ConflictError("the repository was restored from this cold tier and only reads it", fix=_TAKE_OVER)
    if cold.size(_owner_name(generation + 1)) is not None:
        raise ConflictError("another repository has taken the cold tier over", fix=_TAKE_OVER)


def take_over(cold: ObjectStore, log: ReadLog, nonce: str) -> Claim:
    """Become the one who writes to a cold tier; the copy of the log is shared up to where it is this one.

    Raises:
        ConflictError: another did so at the same time.
        UnavailableError, StorageError: whether it is taken over is open; do it again.
    """
    generation, before = newest(cold) + 1, dict[int, int]()
    for piece, data in _readable(cold):
        same = _common(data, log(piece.start, len(data)))
        if same:
            before[piece.generation] = piece.start + same
        if same < len(data):
            break
    owner = _Owner(nonce, tuple(sorted(before.items())))
    name = _owner_name(generation)
    try:
        won = cold.put(name, msgspec.json.encode(owner), if_absent=True)
    except UnavailableError as error:
        try:
            won = _owner(cold, generation).nonce == nonce
        except NotFoundError:
            raise error from None  # It was not carried out.
    if not won:
        raise ConflictError("another repository takes the cold tier over at this moment", object=name)
    return Claim(generation, max(before.values(), default=0))


def _owner_name(generation: int) -> str:
    return f"{_OWNERS}{generation:08d}"


def _owner(cold: ObjectStore, generation: int) -> _Owner:
    name = _owner_name(generation)
    try:
        return msgspec.json.decode(cold.get(name, _SMALL_OBJECT_MAX), type=_Owner)
    except MALFORMED as error:
        raise IntegrityError(f"an owner of the cold tier does not parse: {error}", object=name, place=name) from error


def _readable(cold: ObjectStore) -> Iterator[tuple[Piece, bytes]]:
    """The pieces with their bytes, up to the first that is missing or damaged."""
    try:
        for piece in pieces(cold):
            yield piece, cold.get(piece.name, COLD_PART_BYTES)[: piece.size]
    except (IntegrityError, NotFoundError):
        return


def _common(one: bytes, other: bytes) -> int:
    """How many leading bytes are the same."""
    count = min(len(one), len(other))
    differ = np.frombuffer(one, np.uint8, count) != np.frombuffer(other, np.uint8, count)
    return int(differ.argmax()) if differ.any() else count


# -- the log


def pieces(cold: ObjectStore) -> Iterator[Piece]:
    """The pieces of the newest owner's log, in order. Raises IntegrityError when one is missing."""
    generation, start = newest(cold), 0
    before = _owner(cold, generation).before if generation else ()
    for of, end in [*before, (generation, None)]:
        while end is None or start < end:
            name = _piece_name(of, start)
            size = cold.size(name)
            if size is None:
                break
            if not 0 < size <= COLD_PART_BYTES:
                raise IntegrityError("a piece of the log has a size that none has", object=name, place=name)
            piece = Piece(name, of, start, size if end is None else min(size, end - start))
            yield piece
            start += piece.size
        if _begin_beyond(cold, of, start) if end is None else start < end:
            name = _piece_name(of, start)
            raise IntegrityError("a piece of the log is missing in the cold tier", object=name, place=name)


def _piece_name(generation: int, start: int) -> str:
    return f"log/{start:016d}" if not generation else f"log/{generation:08d}/{start:016d}"


def _begin_beyond(cold: ObjectStore, generation: int, end: int) -> bool:
    """Whether there are pieces that begin behind the end."""
    folder = _piece_name(generation, 0)[:-16]
    names = [name.removeprefix(folder) for name, _ in cold.list(folder)]
    return any(int(digits) > end for digits in names if re.fullmatch(r"\d{16}", digits))


class LogCopy:
    """Copies what the log has grown by. Of two processes that do so at once one writes a piece, and both go on."""

    def __init__(self, disk: Disk, cold: ObjectStore, claim: Claim) -> None:
        self._disk, self._cold, self._claim = disk, cold, claim
        self._end: int | None = None

    def extend(self, log: ReadLog) -> None:
        """Copy up to the log's end; what is there is compared, so that no piece ever follows from another log.

        Raises:
            ConflictError: the copy goes on otherwise than this log.
        """
        generation = self._claim.generation
        if generation is None:
            return
        if self._end is None:
            self._end = self._known(generation)
        before = begun = self._end
        while True:
            name = _piece_name(generation, self._end)
            size = self._cold.size(name)
            if size is None:
                piece = log(self._end, COLD_PART_BYTES)
                if not piece:
                    break
                self._cold.put(name, piece, if_absent=True)
                continue
            if size > COLD_PART_BYTES or self._cold.get(name, size) != log(self._end, size):
                raise ConflictError("the cold tier holds the log of another repository", place=name, fix=_TAKE_OVER)
            before, self._end = self._end, self._end + size
        if begun != self._end:
            self._disk.write_whole(_LOG_KNOWN, msgspec.json.encode((before, self._end)))

    def _known(self, generation: int) -> int:
        """Where the copy ended when it was last looked at, if that piece is there still; else where it begins."""
        try:
            file = self._disk.open(_LOG_KNOWN)
            data = file.read_at(0, file.size())
            file.close()
            last, end = msgspec.json.decode(data, type=tuple[int, int])
        except (NotFoundError, *MALFORMED):
            return self._claim.begins
        there = self._cold.size(_piece_name(generation, last)) == end - last
        return end if there and last >= self._claim.begins else self._claim.begins
