"""The cold tier behind the packs: each local pack is a sparse mirror of an object (docs/design/008-tiers.md).

Whoever reads or writes packs does so through a `Mirror`, which is a Disk like any other: a range that is not here is
fetched when it is read, and what was used least is freed when room is needed. What is here is asked from the file
system and only a hint; a record's digest decides.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import (
    COLD_FAULT_NS,
    COLD_FLIGHT_MAX,
    COLD_GAP_BYTES,
    COLD_PART_BYTES,
    EXTENT_BYTES,
    HOTNESS_BYTES_MAX,
    KEPT_BLOBS_MAX,
    OPEN_PACKS_MAX,
    PIN_AGAIN_NS,
    PIN_FOR_NS,
    PIN_STRETCH,
    TOUCH_GRAIN_NS,
    WARM_FREE_RATIO,
    WARM_PACK_RATIO,
)
from him.errors import ConflictError, IntegrityError, NotFoundError, StorageError, UnavailableError
from him.pack.parity import SUFFIX as PARITY
from him.ports import Clock, Disk, File, ObjectStore
from him.tier import cold as copies
from him.tier import lines
from him.tier.account import Account
from him.tier.cold import Claim, LogCopy, Receipt
from him.tier.evict import EvictionPolicy, Extent
from him.tier.mover import Mover
from him.tier.pins import Pins, PinsByPack
from him.tier.receipts import RECEIPTS, receipts
from him.types import PackFinished

FOLDER: Final = "cold"
PACKS: Final = "packs/"
_HOTNESS: Final = f"{FOLDER}/hotness"

_LOST: Final = "the cold tier does not hold a pack it was given"
_Names = list[str]
Ranges = list[tuple[int, int]]
"""(offset, bytes) each."""
_Run = list[Extent]
"""Missing extents of one pack, in order, that one request brings."""


class TierStatus(msgspec.Struct, frozen=True):
    """Where the bytes of the packs are."""

    budget_bytes: int
    used_bytes: int
    """What the packs take on this disk."""
    pinned_bytes: int
    cold_bytes: int
    """Of packs that the cold tier holds whole."""
    cold_packs: int
    warm_bytes: int
    """Of those packs, what is here too."""
    only_warm_packs: int
    """Finished packs that the cold tier does not hold yet."""
    fetched_bytes: int
    fetches: int
    freed_bytes: int
    passed_through: int
    """Reads that were served from the cold tier without keeping what was read, since by this process."""
    fault: str
    """Why the cold tier's last answer was none; empty when it answered."""


class _Pack:
    """A pack with a receipt; `here` says of each extent whether all of it was seen on this disk."""

    def __init__(self, number: int, name: str, size: int) -> None:
        self.number, self.name, self.size = number, name, size
        self.here: NDArray[np.bool_] = np.zeros(-(-size // EXTENT_BYTES), dtype=np.bool_)
        self.looked = False

    def extents(self, offset: int, size: int) -> range:
        """The extents that a range touches; none for no bytes."""
        return range(offset // EXTENT_BYTES, -(-min(offset + size, self.size) // EXTENT_BYTES))

    def span(self, extent: int) -> tuple[int, int]:
        """(offset, bytes) of an extent."""
        start = extent * EXTENT_BYTES
        return start, min(EXTENT_BYTES, self.size - start)


class Mirror:
    """`ports.Disk` over a folder whose finished packs are mirrored by a cold store; keeps the packs within a budget.

    The budget is a limit for all processes together. Safe to use from several threads.

    Args:
        background: copy finished packs from a thread of its own as they come; else only when asked, or short of room.
        read_only: the disk cannot be written to: what is not here is passed through, and nothing is copied or freed.
        claim: as which generation of its owners this repository writes to the cold tier, if at all.
    """

    def __init__(
        self,
        disk: Disk,
        cold: ObjectStore,
        clock: Clock,
        budget_bytes: int,
        *,
        background: bool = False,
        read_only: bool = False,
        claim: Claim = Claim(0, 0),
    ) -> None:
        self._disk = disk
        self._cold = cold
        self._generation = claim.generation
        self._log_copy = LogCopy(disk, cold, claim)
        self._clock = clock
        self.budget_bytes = budget_bytes
        self._packs: dict[str, _Pack] = {}
        self._held: dict[str, Receipt] = {}
        self._by_number: list[_Pack] = []
        self._files: dict[str, File] = {}
        self._lock = threading.RLock()
        self._used: dict[Extent, int] = {}
        self._flying: dict[Extent, threading.Event] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._policy = EvictionPolicy()
        self._finished: Callable[[], Iterable[PackFinished]] = tuple
        self._log: Callable[[int, int], bytes] = lambda _start, _limit: b""
        self._put_right: Callable[[PackFinished], bool] = lambda _: True
        self._receipts_read = self._receipts_synced = 0
        self._fetched_bytes = self._fetches = self._freed_bytes = self._passed_through = 0
        self._fault, self._fault_ns = "", 0
        self._taken = ""
        self._kept: dict[bytes, int] = {}
        self._pushing = threading.Lock()
        self._mover = Mover(self.push_all) if background and not read_only else None
        self._read_only = read_only
        self._account = Account(disk, self._recounted, read_only=read_only)
        self._receipts = disk.open(RECEIPTS, create=not read_only)
        self._pins = Pins(disk, read_only=read_only)
        self._learn_receipts()
        if not read_only:
            disk.sync_folder(FOLDER)
            self._recall()
            with self._account:
                self._learn_pins()
                self._account.used = self._recounted()

    @property
    def _limit(self) -> int:
        """What fetching may fill: the rest is kept free for what is written (spec §7 backpressure)."""
        return int(self.budget_bytes * (1 - WARM_FREE_RATIO))

    @property
    def pack_bytes(self) -> int:
        """From which size on a growing pack, which cannot be freed, is finished."""
        return int(self.budget_bytes * WARM_PACK_RATIO)

    def watch(
        self, finished: Callable[[], Iterable[PackFinished]], log: Callable[[int, int], bytes],
        put_right: Callable[[PackFinished], bool] = lambda _: True,
    ) -> None:  # fmt: skip
        """Whom to ask for what is copied.

        Args:
            finished: the finished packs.
            log: the log's bytes from an offset, at most so many.
            put_right: mends what is damaged of a pack before it is copied; whether it is worth copying then.
        """
        self._finished, self._log, self._put_right = finished, log, put_right

    # -- ports.Disk

    def open(self, path: str, *, create: bool = False) -> File:
        """A pack's file fetches what it lacks and accounts for what it is given; others are the disk's own."""
        if not path.startswith(PACKS):
            return self._disk.open(path, create=create)
        return _PackFile(self, path, self._disk.open(path, create=create or (self.holds(path) and not self._read_only)))

    def view(self, path: str, offset: int, size: int) -> memoryview:
        """A range of a file, fetched if it has to be; it cannot be freed while anything refers to it."""
        pack = self.pack(path)
        if pack is None:
            return self._disk.view(path, offset, size)
        with self.using([(pack, offset, size)]) as here:
            return self._disk.view(path, offset, size) if here else self.fetch(path, offset, size)

    def list(self, folder: str) -> _Names:
        """The disk's."""
        return self._disk.list(folder)

    def write_whole(self, path: str, *parts: bytes | memoryview) -> None:
        """The disk's."""
        self._disk.write_whole(path, *parts)

    def remove(self, path: str) -> None:
        """The disk's."""
        self._disk.remove(path)

    def sync_folder(self, folder: str) -> None:
        """The disk's."""
        self._disk.sync_folder(folder)

    def nudge(self) -> None:
        """There may be a pack to copy, or a lack of room: see to it in the background."""
        if self._mover is not None:
            self._mover.nudge()

    def close(self) -> None:
        """Keep what is known of how hot things are, and release files; a copy on its way is taken up another time."""
        if self._mover is not None:
            self._mover.stop()
        with self._lock:
            threads, self._threads = self._threads, None
        # Not under the lock: a request that ends asks for it.
        if threads is not None:
            threads.shutdown(cancel_futures=True)
        with self._lock:
            if not self._read_only:
                with contextlib.suppress(StorageError):  # Only a hint.
                    self._disk.write_whole(_HOTNESS, self._policy.dump())
            for file in (*self._files.values(), self._account, self._receipts):
                file.close()
            self._files = {}

    # -- fetching

    @contextmanager
    def using(self, wanted: Sequence[tuple[_Pack, int, int]]) -> Generator[bool]:
        """Have ranges (pack, offset, size) here, fetching what is missing, and keep this process from freeing them.

        What lies together is fetched together. Gives False when there is no room that may be used for all of them.

        Raises:
            UnavailableError: something is missing and the cold tier does not answer.
        """
        touched = {(pack.number, at) for pack, offset, size in wanted for at in pack.extents(offset, size)}
        with self._lock:
            for key in touched:
                self._used[key] = self._used.get(key, 0) + 1
        try:
            here = self._brought(touched)
            if here:
                with self._lock:
                    now = self._clock.now_ns()
                    self._policy.touch(touched, now, self._stretched(now, now + PIN_FOR_NS) - now)
            yield here
        finally:
            with self._lock:
                for key in touched:
                    left = self._used.pop(key) - 1
                    if left:
                        self._used[key] = left

    def _brought(self, touched: set[Extent]) -> bool:
        while True:
            missing, others = self._claimed(touched)
            try:
                room = not missing or self._fetched(sorted(missing))
            finally:
                self._release(missing)
            for event in others:
                event.wait()
            if not room or not others:
                return room

    def ahead(self, places: Iterable[tuple[str, int, int]]) -> bool:
        """Have ranges (path, offset, size) here; False when there is no room for all of them."""
        wanted = [(pack, offset, size) for path, offset, size in places if (pack := self.pack(path)) is not None]
        with self.using(wanted) as here:
            return here

    def prefetch(self, places: Iterable[tuple[str, int, int]]) -> bool:
        """`ahead`, of what nobody waits for: a cold tier that has trouble answering is left to those who do.

        Raises:
            UnavailableError: it gave no answer lately, or gives none.
        """
        if self._ailing(self._clock.now_ns()):
            raise UnavailableError(f"nothing is fetched ahead while the cold tier has trouble ({self._fault})")
        return self.ahead(places)

    def prefetch_all(self, progress: Callable[[int, int, str], None]) -> bool:
        """`prefetch` of every pack, a part at a time."""
        for number, pack in enumerate(tuple(self._by_number)):
            progress(number, len(self._by_number), pack.name)
            for start in range(0, pack.size, COLD_PART_BYTES):
                if not self.prefetch([(pack.name, start, min(COLD_PART_BYTES, pack.size - start))]):
                    return False
        return True

    def pack(self, path: str) -> _Pack | None:
        """A pack that the cold tier holds; None for another."""
        found = self._packs.get(path)
        if found is not None and not found.looked:
            with self._lock:
                self._look(found)
        return found

    def fetch(self, path: str, offset: int, size: int) -> memoryview:
        """A range straight from the cold tier. Raises IntegrityError (it is lost), UnavailableError, StorageError."""
        self._passed_through += 1
        return self._got(path, [(offset, size)])[0]

    def holds(self, path: str) -> bool:
        """Whether the cold tier holds this pack."""
        if path not in self._packs:
            self._learn_receipts()
        return path in self._packs

    def heal(self, path: str, offset: int, data: memoryview) -> bool:
        """Put verified bytes where others are; only over what is here, so that no half extent comes to be."""
        pack, changed = self._packs[path], False
        if self._read_only:
            return False
        with self._account, self._lock:
            self._look(pack)
            file, end = self._file(pack), offset + len(data)
            for at in pack.extents(offset, len(data)):
                start, size = pack.span(at)
                low, high = max(offset, start), min(end, start + size)
                if pack.here[at] and file.read_at(low, high - low) != bytes(data[low - offset : high - offset]):
                    file.write_at(low, data[low - offset : high - offset])
                    changed = True
        return changed

    def put_back(self, path: str, offset: int, data: bytes | memoryview) -> None:
        """Put sound bytes, of whole extents, where a pack has others or none; a file that is not mirrored just grows.

        Raises:
            StorageError: there is no room for them.
        """
        pack = self.pack(path) if self.holds(path) else None
        if pack is None:
            file = self.open(path, create=True)
            try:
                file.write_at(offset, data)
            finally:
                file.close()
            return
        new = [(pack.number, at) for at in pack.extents(offset, len(data)) if not pack.here[at]]
        if new and not self._reserved(self._bytes_of(new), self.budget_bytes):
            raise StorageError("the warm budget has no room for what was made again", place=path)
        with self._account, self._lock:
            self._file(pack).write_at(offset, data)
            pack.here[[at for _, at in new]] = True
            self._policy.adopt(new)

    def mend(self, path: str) -> bool:
        """Compare what is here of a pack with the cold tier and put right what differs.

        Returns:
            Whether reading it again is worth while: False for a pack that the cold tier does not hold. (That nothing
            differs does not say that what was read before was right: another process may have freed it then.)

        Raises:
            IntegrityError: the cold tier does not give back what its receipt says; nothing is changed then.
        """
        if not self.holds(path):
            return False
        receipt, pack = self._held[path], self._packs[path]
        ranges = [(at, min(COLD_PART_BYTES, pack.size - at)) for at in range(0, pack.size, COLD_PART_BYTES)]
        parts, digest = self._got(path, ranges), blake3()
        for part in parts:
            digest.update(part)
        if digest.hexdigest() != receipt.digest:
            raise IntegrityError("the cold tier does not give back what it was given", place=path)
        for (offset, _), part in zip(ranges, parts, strict=True):
            self.heal(path, offset, part)
        return True

    def check_copy(self, path: str, pace: Callable[[int], None]) -> None:
        """Read a pack's copy in the cold tier through.

        Raises:
            IntegrityError: it is not there, or not as its receipt says.
            UnavailableError: the cold tier does not answer.
        """
        receipt = self._held[path]
        with self._asking():
            if self._cold.size(path) != receipt.size:
                raise IntegrityError(_LOST, object=path, place=path)
            if copies.digest_of(self._cold, path, receipt.size, pace) != receipt.digest:
                raise IntegrityError("the cold tier does not give back what it was given", object=path, place=path)

    def copy_again(self, path: str, parts: Iterable[memoryview] | None) -> None:
        """Put a pack into the cold tier once more: from `parts`, or from what is here when all of it is.

        Nothing is put where another process has removed it for good.

        Raises:
            IntegrityError: not all of it is here, or it is not what the receipt says.
            ConflictError, UnavailableError, StorageError: as `push`.
        """
        receipt, pack = self._held.get(path), self._packs.get(path)
        if receipt is None or pack is None:
            return
        if parts is None:
            self._look_at_all()
            if not pack.here.all():
                raise IntegrityError("the only whole copy of a pack is lost", object=path, place=path)
            parts = (memoryview(part) for part in _parts(self._file(pack), pack.size))
        with self._asking(UnavailableError):
            self.check_owner()
            self._cold.upload(path, _of_digest(parts, receipt))
            if copies.digest_of(self._cold, path, receipt.size) != receipt.digest:
                raise IntegrityError("the cold tier gives back other bytes than it was given", object=path, place=path)
            self._cold.put(copies.receipt_name(path), lines.encode(receipt))

    def forget(self, path: str) -> None:
        """A pack is gone, or about to go: nobody asks for it any more."""
        with self._lock:
            pack = self._packs.pop(path, None)
            self._held.pop(path, None)
            self._files.pop(path, None)
            if pack is not None:
                # Its extents' names stay taken, and are never here.
                pack.size, pack.here = 0, np.zeros(0, dtype=np.bool_)

    def drop_here(self, path: str) -> None:
        """Remove what is here of a pack that is gone."""
        with self._account:
            self.forget(path)
            self._disk.remove(path)
            self._account.used = self._recounted()

    def drop(self, path: str) -> None:
        """Remove a pack that is gone from the cold tier too. Doing it again is no error.

        Raises:
            ConflictError: the cold tier is another repository's.
            UnavailableError, StorageError: it is not gone there yet; ask again.
        """
        with self._asking(UnavailableError):
            self.check_owner()
            self._cold.delete([path, copies.receipt_name(path)])
        self._keep_receipt(Receipt(path, 0, ""))

    def copies(self) -> set[str]:
        """The packs that the cold tier holds, those among them that are gone here."""
        return {receipt.pack for receipt in receipts(self._disk)}

    def resident(self, path: str) -> NDArray[np.bool_] | None:
        """Which extents of a pack are here, as far as is known; None for one that the cold tier does not hold."""
        pack = self.pack(path) if self.holds(path) else None
        return None if pack is None else pack.here.copy()

    # -- making room

    def reserve(self, size: int) -> None:
        """Account for bytes about to be appended to a growing pack, making room for them.

        Raises:
            StorageError: the budget is full of what cannot be freed.
        """
        if self._reserved(size, self.budget_bytes):
            return
        self.push_all()
        if not self._reserved(size, self.budget_bytes):
            status = self.status()
            raise StorageError(
                f"the warm budget of {self.budget_bytes} bytes is full: {status.used_bytes} are used, "
                f"{status.pinned_bytes} of them pinned",
                fix="raise it with `him tier set --budget`, unpin something, or write in smaller commits",
            )

    def demote(self, keep_bytes: int = 0) -> int:
        """Free what is used least until the packs take at most `keep_bytes` here; the bytes freed."""
        with self._account:
            self._look_at_all()
            used = self._recounted()
            freed = self._evicted(used - keep_bytes)
            self._account.used = used - freed
        return freed

    def pin(self, places: Iterable[tuple[str, int, int]], until_ns: int) -> int:
        """Keep ranges (path, offset, size) from being freed, by any process, until a time (ns since 1970); extents.

        Raises:
            LimitError: more pins than are kept.
        """
        now = self._clock.now_ns()
        return self._change_pins(places, self._stretched(now, until_ns))

    def unpin(self, places: Iterable[tuple[str, int, int]]) -> None:
        """Take pins back."""
        self._change_pins(places, 0)

    def kept_lately(self, blob: bytes) -> bool:
        """Whether `keep` pinned a blob so lately that it need not again."""
        return self._kept.get(blob, 0) > self._clock.now_ns() - PIN_AGAIN_NS

    def keep(self, blobs: Iterable[bytes], places: Iterable[tuple[str, int, int]]) -> None:
        """Pin what was read from a critical snapshot; `blobs` are remembered for `kept_lately`."""
        now = self._clock.now_ns()
        # Alike for neighbours, which are kept in one row then.
        self.pin(places, (now + PIN_FOR_NS) // TOUCH_GRAIN_NS * TOUCH_GRAIN_NS)
        with self._lock:
            if len(self._kept) > KEPT_BLOBS_MAX:
                self._kept.clear()
            self._kept.update(dict.fromkeys(blobs, now))

    def _change_pins(self, places: Iterable[tuple[str, int, int]], until_ns: int) -> int:
        changes: PinsByPack = {}
        for path, offset, size in places:
            if (pack := self.pack(path)) is not None:
                changes.setdefault(path, {}).update(dict.fromkeys(pack.extents(offset, size), until_ns))
        with self._account:
            self._pins.change(changes, self._clock.now_ns())
            self._learn_pins()
        return sum(len(extents) for extents in changes.values())

    def _learn_pins(self) -> None:
        """What other processes pinned, or took back. Only with the account's lock held."""
        news = self._pins.news()
        if news is None:
            return
        with self._lock:
            self._policy.replace_pins({
                (self._packs[name].number, extent): until
                for name, extents in news.items() if self.holds(name) for extent, until in extents.items()
            })  # fmt: skip

    def _stretched(self, now_ns: int, until_ns: int) -> int:
        """Until when a pin lasts that would end then: twice as long while the cold tier does not answer."""
        return now_ns + PIN_STRETCH * (until_ns - now_ns) if self._ailing(now_ns) else until_ns

    # -- copying to the cold tier

    def push_all(self, progress: Callable[[int, int, str], None] | None = None) -> int:
        """Copy every finished pack that the cold tier does not hold, and the log; how many packs were copied.

        Raises:
            ConflictError: the cold tier is another repository's by now.
            UnavailableError, StorageError: what was copied until then stays copied.
            IntegrityError: all was copied but what is damaged, or the cold tier gives back other bytes.
        """
        with self._pushing:
            waiting = [finished for finished in self._finished() if not self.holds(finished.pack)]
            if waiting or self._generation is not None:
                with self._asking(UnavailableError):
                    self.check_owner()
            damaged = ""
            for number, finished in enumerate(waiting):
                if progress is not None:
                    progress(number, len(waiting), finished.pack)
                if self._mover is not None and self._mover.stopped:
                    return number
                with self._asking(UnavailableError):
                    try:
                        if not self._put_right(finished):
                            lacking = not finished.pack.endswith(PARITY) and finished in self._finished()
                            damaged = damaged or (finished.pack if lacking else "")
                            continue
                        self.push(finished)
                    except NotFoundError:
                        if any(finished.pack == one.pack for one in self._finished()):
                            raise
                        continue  # Another process has let it go meanwhile.
                    self._log_copy.extend(self._log)
            with self._asking(UnavailableError):
                self._log_copy.extend(self._log)
            if damaged:
                raise IntegrityError(
                    "a pack is cut short or missing, and was not copied", object=damaged, place=damaged
                )
            return len(waiting)

    def check_owner(self) -> None:
        """Before anything is written to the cold tier or deleted there. Raises ConflictError when it is another's."""
        try:
            copies.check_owner(self._cold, self._generation)
        except ConflictError as error:
            self._taken = error.message
            raise
        self._taken = ""

    def push(self, finished: PackFinished) -> None:
        """Copy a finished pack and read it back; only then may anything of it be freed. Resumes what was begun.

        Raises:
            ConflictError: the cold tier holds another pack of that name.
            IntegrityError: the cold tier gives back other bytes than it was given, twice.
            UnavailableError, StorageError: it does not answer, or refuses.
        """
        file = self._disk.open(finished.pack)
        try:
            size, digest, read = finished.size, blake3(), 0
            for part in _parts(file, size):
                digest.update(part)
                read += len(part)
            if read < size:
                return  # Another process makes it again.
            receipt = Receipt(finished.pack, size, digest.hexdigest())
            if copies.receipt_of(self._cold, finished.pack) not in (None, receipt):
                if self.holds(finished.pack):
                    return  # Another process was faster, and has freed what was just read here.
                # The repository was copied and both went on with one pack.
                raise ConflictError("the cold tier holds another pack of that name", place=finished.pack)
            for _ in range(2):
                if self._cold.size(finished.pack) != size:
                    self._cold.upload(finished.pack, _parts(file, size))
                if copies.digest_of(self._cold, finished.pack, size) == receipt.digest:
                    self._cold.put(copies.receipt_name(finished.pack), lines.encode(receipt))
                    self._keep_receipt(receipt)
                    return
                self._cold.delete([finished.pack])
        finally:
            file.close()
        raise IntegrityError("the cold tier gives back other bytes than it was given", place=finished.pack)

    def status(self) -> TierStatus:
        """Figures of this moment."""
        with self._account:
            used = self._recounted()
            self._account.used = used
            self._look_at_all()
            self._learn_pins()
        with self._lock:
            warm = sum(pack.span(int(at))[1] for pack in self._by_number for at in np.flatnonzero(pack.here))
            return TierStatus(
                self.budget_bytes, used, self._pinned_bytes(),
                sum(pack.size for pack in self._by_number), len(self._by_number), warm,
                sum(1 for finished in self._finished() if finished.pack not in self._packs),
                self._fetched_bytes, self._fetches, self._freed_bytes, self._passed_through, self._taken or self._fault,
            )  # fmt: skip

    # -- inner: what is here

    def _learn_receipts(self) -> None:
        """Receipts that were added since the last look, by any process."""
        if self._receipts.size() == self._receipts_read:
            return
        # One that is being written may yet be taken back: whoever writes one holds the account.
        with contextlib.nullcontext() if self._read_only else self._account, self._lock:
            for receipt, end in lines.read(self._receipts, self._receipts_read, Receipt):
                self._receipts_read = end
                if receipt is None:
                    continue
                if not receipt.digest:
                    self.forget(receipt.pack)
                    continue
                if receipt.pack in self._packs:
                    continue
                pack = _Pack(len(self._by_number), receipt.pack, receipt.size)
                self._held[receipt.pack] = receipt
                self._by_number.append(pack)
                self._packs[receipt.pack] = pack

    def _keep_receipt(self, receipt: Receipt) -> None:
        with self._account:
            self._learn_receipts()
            lines.append(self._receipts, self._receipts_read, receipt)
            self._learn_receipts()

    def _look(self, pack: _Pack) -> None:
        """Ask the file system which extents are here; new ones become candidates to be freed."""
        fresh = np.zeros(len(pack.here), dtype=np.bool_)
        for start, end in self._file(pack).data_runs():
            whole = -(-pack.size // EXTENT_BYTES) if end >= pack.size else end // EXTENT_BYTES
            fresh[-(-start // EXTENT_BYTES) : whole] = True
        for at in np.flatnonzero(pack.here & ~fresh):
            self._policy.forget((pack.number, int(at)))
        self._policy.adopt([(pack.number, int(at)) for at in np.flatnonzero(fresh & ~pack.here)])
        pack.here[:] = fresh
        pack.looked = True

    def _pinned_bytes(self) -> int:
        now = self._clock.now_ns()
        return EXTENT_BYTES * sum(self._policy.pinned(key, now) for key in self._policy)

    def _look_at_all(self) -> None:
        with self._lock:
            for pack in self._by_number:
                self._look(pack)

    def _file(self, pack: _Pack) -> File:
        file = self._files.get(pack.name)
        if file is None:
            file = self._disk.open(pack.name, create=not self._read_only)
            if file.size() < pack.size and not self._read_only:
                file.truncate(pack.size)
            self._files[pack.name] = file
            if len(self._files) > OPEN_PACKS_MAX:
                # Closed once no thread uses it any more.
                del self._files[next(iter(self._files))]
        return file

    def _recall(self) -> None:
        with contextlib.suppress(NotFoundError, StorageError):
            file = self._disk.open(_HOTNESS)
            self._policy.load(file.read_at(0, min(file.size(), HOTNESS_BYTES_MAX)))
            file.close()

    # -- inner: fetching

    def _claimed(self, touched: set[Extent]) -> tuple[set[Extent], Sequence[threading.Event]]:
        """The missing extents that this thread fetches, and whom to wait for to have the others."""
        with self._lock:
            gone = {key for key in touched if not self._by_number[key[0]].here[key[1]]}
            others = [self._flying[key] for key in gone if key in self._flying]
            mine = {key for key in gone if key not in self._flying}
            event = threading.Event()
            self._flying.update(dict.fromkeys(mine, event))
            return mine, others

    def _release(self, mine: set[Extent]) -> None:
        with self._lock:
            for key in mine:
                self._flying.pop(key).set()

    def _fetched(self, missing: Sequence[Extent]) -> bool:
        """Fetch extents into their files; False when there was no room."""
        if not self._reserved(self._bytes_of(missing), self._limit):
            self.nudge()
            return False
        room = True
        try:
            for run, start, data in self._in_flight(tuple(self._runs(missing))):
                room = self._kept_run(run, start, data)
                if not room:
                    break
        finally:
            with self._lock:
                here = [key for key in missing if self._by_number[key[0]].here[key[1]]]
            if len(here) < len(missing):
                # Nobody will touch these: whoever asked gets an error. They are here all the same.
                with self._account, self._lock:
                    self._policy.adopt(here)
                    lacking = self._bytes_of(missing) - self._bytes_of(here)
                    self._account.used -= lacking
        return room

    def _bytes_of(self, extents: Iterable[Extent]) -> int:
        return sum(self._by_number[number].span(at)[1] for number, at in extents)

    def _runs(self, missing: Sequence[Extent]) -> Iterator[_Run]:
        """Extents that one request is to bring: of one pack, close together, COLD_PART_BYTES from end to end."""
        run: _Run = []
        for number, at in missing:
            if run and (
                number != run[0][0]
                or (at + 1 - run[0][1]) * EXTENT_BYTES > COLD_PART_BYTES
                or (at - run[-1][1] - 1) * EXTENT_BYTES > COLD_GAP_BYTES
            ):
                yield run
                run = []
            run.append((number, at))
        if run:
            yield run

    def _in_flight(self, runs: Sequence[_Run]) -> Iterator[tuple[_Run, int, memoryview]]:
        """Each run, in order, with where its bytes begin in the pack and these; COLD_FLIGHT_MAX are on their way."""
        if len(runs) == 1:
            yield (runs[0], *self._run_bytes(runs[0]))
            return
        flight: deque[Future[tuple[int, memoryview]]] = deque()
        try:
            for number, run in enumerate(runs):
                for ahead in runs[number + len(flight) : number + COLD_FLIGHT_MAX]:
                    flight.append(self._requests().submit(self._run_bytes, ahead))
                yield (run, *flight.popleft().result())
        finally:
            for one in flight:
                one.cancel()

    def _requests(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(COLD_FLIGHT_MAX, thread_name_prefix="him cold")
            return self._threads

    def _run_bytes(self, run: _Run) -> tuple[int, memoryview]:
        """Where a run begins in its pack, and its bytes with those of its gaps."""
        pack = self._by_number[run[0][0]]
        start, end = pack.span(run[0][1])[0], sum(pack.span(run[-1][1]))
        return start, self._got(pack.name, [(start, end - start)])[0]

    def _kept_run(self, run: _Run, begins: int, data: memoryview) -> bool:
        """Keep the extents of a run; False where this disk refuses, whatever the budget allows."""
        try:
            self._write_run(run, begins, data)
        except StorageError:
            return False
        return True

    def _write_run(self, run: _Run, begins: int, data: memoryview) -> None:
        """Keep the extents of a run; what lies in its gaps is here already, or nobody asked for it."""
        pack = self._by_number[run[0][0]]
        for _, at in run:
            start, size = pack.span(at)
            self._file(pack).write_at(start, data[start - begins : start - begins + size])
            with self._lock:
                pack.here[at] = True

    @contextmanager
    def _asking(self, failure: type[StorageError] = StorageError) -> Generator[None]:
        """Note whether the cold tier answers; `failure` says that it does not (others may be of this disk)."""
        try:
            yield
        except failure as error:
            self._fault, self._fault_ns = error.message, self._clock.now_ns()
            raise
        self._fault = ""

    def _ailing(self, now_ns: int) -> bool:
        """Whether the cold tier gave no answer when it was last asked, which was lately."""
        return bool(self._fault) and now_ns < self._fault_ns + COLD_FAULT_NS

    def _got(self, path: str, ranges: Ranges) -> Sequence[memoryview]:
        with self._asking():
            try:
                parts = self._cold.get_ranges(path, ranges)
            except NotFoundError as error:
                raise IntegrityError(_LOST, object=path, place=path) from error
        with self._lock:
            self._fetches += len(ranges)
            self._fetched_bytes += sum(size for _, size in ranges)
        return parts

    # -- inner: the account

    def _reserved(self, size: int, limit: int) -> bool:
        """Whether `size` more bytes fit below `limit`, after freeing what may be freed; then they are accounted for."""
        if self._read_only:
            return False
        with self._account:
            used = self._account.used
            if used + size > limit:
                used -= self._evicted(used + size - limit)
            if used + size > limit:
                # What others fetched, and what a crash left counted, is seen by looking anew.
                self._look_at_all()
                used = self._recounted()
                used -= self._evicted(used + size - limit)
            fits = used + size <= limit
            self._account.used = used + size if fits else used
            return fits

    def _evicted(self, size: int) -> int:
        """Free at least `size` bytes if that is possible; how many were freed."""
        freed = 0
        self._learn_pins()
        if self._receipts_synced < self._receipts_read:
            # Whoever wrote them may have died before they were durable.
            self._receipts.sync()
            self._receipts_synced = self._receipts_read
        with self._lock:
            lent: list[Extent] = []
            while freed < size:
                keys = tuple(self._policy.victims(-(-(size - freed) // EXTENT_BYTES), self._clock.now_ns()))
                if not keys:
                    break
                for key in keys:
                    took = self._freed(key)
                    freed += took or 0
                    if took is None:
                        lent.append(key)
            for key in lent:
                self._policy.keep(key)
        self._freed_bytes += freed
        return freed

    def _freed(self, key: Extent) -> int | None:
        """Free an extent; the bytes that gave, or None when someone is using it."""
        number, at = key
        # What was kept of hotness may be of other packs.
        pack = self._by_number[number] if number < len(self._by_number) else None
        if pack is not None and not pack.looked:
            self._look(pack)
        if pack is None or at >= len(pack.here) or not pack.here[at]:
            return 0
        file, (start, length) = self._file(pack), pack.span(at)
        taken = file.allocated()
        if key in self._used or not file.punch(start, length):
            return None
        pack.here[at] = False
        # Not simply its length: another process may have freed it before.
        return taken - file.allocated()

    def _recounted(self) -> int:
        """What the packs take here, asked from the file system."""
        used = 0
        for name in self._disk.list(PACKS.rstrip("/")):
            file = self._disk.open(PACKS + name)
            used += file.allocated()
            file.close()
        return used


class _PackFile:
    """A pack: what the cold tier holds is fetched as it is read, what grows is accounted for as it is written."""

    def __init__(self, mirror: Mirror, path: str, file: File) -> None:
        self._mirror, self._path, self._file = mirror, path, file
        self.truncate, self.sync, self.lock, self.unlock = file.truncate, file.sync, file.lock, file.unlock
        self.allocated, self.data_runs, self.punch, self.close = file.allocated, file.data_runs, file.punch, file.close

    def size(self) -> int:
        """Of the whole pack, wherever it is."""
        pack = self._mirror.pack(self._path)
        return self._file.size() if pack is None else pack.size

    def write_at(self, offset: int, *parts: bytes | memoryview) -> None:
        """Make room, then write."""
        self._mirror.reserve(sum(len(part) for part in parts))
        self._file.write_at(offset, *parts)

    def read_at(self, offset: int, size: int) -> bytes:
        """The range, fetched where it has to be."""
        pack = self._mirror.pack(self._path)
        if pack is None:
            return self._file.read_at(offset, size)
        size = max(0, min(size, pack.size - offset))
        with self._mirror.using([(pack, offset, size)]) as here:
            return self._file.read_at(offset, size) if here else bytes(self._mirror.fetch(self._path, offset, size))

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """The range, fetched where it has to be."""
        pack = self._mirror.pack(self._path)
        if pack is None:
            return self._file.read_into(offset, buffer)
        size = max(0, min(len(buffer), pack.size - offset))
        with self._mirror.using([(pack, offset, size)]) as here:
            if here:
                return self._file.read_into(offset, buffer[:size])
            buffer[:size] = self._mirror.fetch(self._path, offset, size)
            return size


def _parts(file: File, size: int) -> Iterator[bytes]:
    """A file's bytes, COLD_PART_BYTES at a time."""
    for start in range(0, size, COLD_PART_BYTES):
        yield file.read_at(start, min(COLD_PART_BYTES, size - start))


def _of_digest(parts: Iterable[memoryview], receipt: Receipt) -> Iterator[memoryview]:
    """The parts, as long as they make what the receipt says; before the last one is given that is certain."""
    digest, last = blake3(), memoryview(b"")
    for part in parts:
        digest.update(part)
        if last:
            yield last
        last = part
    if digest.hexdigest() != receipt.digest:
        raise IntegrityError("what is left of the pack is not what was copied", object=receipt.pack, place=receipt.pack)
    yield last
