"""A repository from its cold tier alone: the log, cut before what the cold tier does not hold (design/008-tiers.md).

Packs stay where they are; their receipts say that they can be fetched. A pack that had its end only after the cut is
given it by a record of the restored repository's own: so no pack of a name that is taken ever grows again.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from him.catalog.checkpoint import Fold
from him.catalog.log import END_PATH, LOG_PATH, FileLog, cut_short, parsed, records_in
from him.config import COLD_FLIGHT_MAX, COLD_PART_BYTES
from him.errors import HimError, IntegrityError, NotFoundError
from him.ports import Clock, Disk, File, ObjectStore, Progress
from him.tier import cold as copies
from him.tier.cold import Piece, Receipt
from him.tier.receipts import keep_receipts
from him.types import CommitRecord, LiveState, PackFinished, PackRange, PackRemoved


class Restored(msgspec.Struct, frozen=True):
    """What was restored, and what the cold tier did not hold."""

    commits: int
    until_ns: int
    """Time of the last restored commit, in ns since 1970; 0 when there is none."""
    left_out: int
    """Commits that the log's copy has and whose packs the cold tier lacks, or that follow one of these."""
    lacking: str
    """The first such pack; empty when nothing was left out."""
    packs: int
    cold_bytes: int


class _Cut(msgspec.Struct):
    """Up to where the log is restored: the state there, and its packs' ends and receipts."""

    state: LiveState
    end: int
    until_ns: int
    receipts: dict[str, Receipt]
    ends: list[PackFinished]
    gone: list[PackRemoved]
    """Condemned packs that the cold tier does not hold: nothing relies on them."""
    lacking: str


def restore(disk: Disk, cold: ObjectStore, clock: Clock, writer: str, progress: Progress) -> Restored:
    """Make log and receipts of a repository in an empty folder, or in what an interrupted restore left of one.

    Raises:
        NotFoundError: the cold tier holds no log.
        IntegrityError: a piece of the log, or a receipt, is missing or damaged.
        UnavailableError, StorageError: the cold tier or the disk fails; call it again.
    """
    FileLog.create(disk)
    _forget_end(disk)
    file = disk.open(LOG_PATH)
    try:
        total = _whole_log(file, cold, progress)
        cut = _cut(file, cold, progress)
        file.truncate(cut.end)
        file.sync()
    finally:
        file.close()
    keep_receipts(disk, cut.receipts.values())
    _end_packs(disk, [*cut.ends, *cut.gone], clock, writer)
    size = sum(receipt.size for receipt in cut.receipts.values())
    done = cut.state.seq
    return Restored(done, cut.until_ns, total - done, cut.lacking, len(cut.receipts), size)


def _forget_end(disk: Disk) -> None:
    """An interrupted restore may have published another end."""
    file = disk.open(END_PATH)
    try:
        file.truncate(0)
        file.sync()
    finally:
        file.close()


def _whole_log(file: File, cold: ObjectStore, progress: Progress) -> int:
    """Put the pieces together and verify the chain of hashes; how many records there are."""
    pieces = list(copies.pieces(cold))
    if not pieces:
        raise NotFoundError("the cold tier holds no log", fix="name the place that `him tier set` was given")
    for resumed in (True, False):
        for number, piece in enumerate(pieces):
            # What an interrupted restore left is kept where it verifies.
            if not resumed or piece.start + piece.size > file.size():
                progress(number, len(pieces), piece.name)
                file.write_at(piece.start, _bytes_of(cold, piece))
        file.truncate(pieces[-1].start + pieces[-1].size)
        file.sync()
        last = deque(records_in(file), maxlen=1)
        count, end = (last[0][0], last[0][3]) if last else (0, 0)
        if end == file.size() or (pieces[-1].size == COLD_PART_BYTES and cut_short(file, end)):
            # A record may go on in a piece that was never copied; any other piece ends with one.
            file.truncate(end)
            return count
    piece = next(one for one in pieces if end < one.start + one.size)
    place = f"{piece.name} @ {end - piece.start}"
    raise IntegrityError("the log's copy in the cold tier is damaged", object=f"record {count + 1}", place=place)


def _bytes_of(cold: ObjectStore, piece: Piece) -> memoryview:
    try:
        return cold.get_ranges(piece.name, [(0, piece.size)])[0]
    except NotFoundError as error:
        raise IntegrityError("a piece of the log is missing", object=piece.name, place=piece.name) from error


def _records(file: File) -> Iterator[tuple[int, bytes, CommitRecord, int]]:
    for seq, digest, body, end in records_in(file):
        yield seq, digest, parsed(seq, body), end


def _cut(file: File, cold: ObjectStore, progress: Progress) -> _Cut:
    """The longest beginning of the log of whose packs each is held."""
    known: dict[str, PackFinished] = {}
    for _, _, record, _ in _records(file):
        known.update({named.pack: named for named in record.operations if isinstance(named, PackFinished)})
    looked: dict[str, Receipt | None] = {}
    lacking: set[str] = set()
    first = ""
    while True:
        fold, end, until = Fold(), 0, 0
        for seq, digest, record, after in _records(file):
            named = (one.pack for one in record.operations if isinstance(one, PackRange | PackFinished))
            if not lacking.isdisjoint(named):
                break
            fold.apply([(seq, digest, record)])
            end, until = after, record.time_ns
        state = fold.state()
        packs = [pack for pack in state.packs if not pack.removed]
        # Only what stands at the end is asked for: a pack that the log drops again need not be there.
        names = [pack.name for pack in packs if pack.name not in looked]
        looked.update(_held(cold, names, known, progress))
        absent = [pack.name for pack in packs if looked[pack.name] is None and not pack.condemned]
        if not absent:
            held = {pack.name: found for pack in packs if (found := looked[pack.name]) is not None}
            ends = [known[pack.name] for pack in packs if pack.finished is None]
            gone = [PackRemoved(pack.name) for pack in packs if pack.name not in held]
            return _Cut(state, end, until, held, ends, gone, first)
        first = first or absent[0]
        lacking.update(absent)


def _held(
    cold: ObjectStore, names: Iterable[str], known: dict[str, PackFinished], progress: Progress
) -> dict[str, Receipt | None]:
    """The receipts of packs; None for one the cold tier does not hold whole."""
    names = list(names)
    found: dict[str, Receipt | None] = {}
    with ThreadPoolExecutor(COLD_FLIGHT_MAX, thread_name_prefix="him cold") as pool:
        work = [pool.submit(_receipt, cold, known.get(name)) for name in names]
        try:
            for number, (name, one) in enumerate(zip(names, work, strict=True)):
                found[name] = one.result()
                progress(number, len(names), name)
        except HimError:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _receipt(cold: ObjectStore, finished: PackFinished | None) -> Receipt | None:
    if finished is None or cold.size(finished.pack) != finished.size:
        return None
    found = copies.receipt_of(cold, finished.pack)
    if found is None:
        # Copied before there were receipts in the cold tier; an object is whole or not there.
        return Receipt(finished.pack, finished.size, copies.digest_of(cold, finished.pack, finished.size))
    return found if found.size == finished.size else None


def _end_packs(disk: Disk, ends: Sequence[PackFinished | PackRemoved], clock: Clock, writer: str) -> None:
    """The restored log's published end, after a record that ends packs that have none before the cut, or are gone."""
    log = FileLog(disk)
    try:
        record = CommitRecord(clock.now_ns(), writer, tuple(ends))
        log.commit(lambda: msgspec.msgpack.encode(record) if ends else None)
    finally:
        log.close()
