"""Whether a pack holds what the log says it does, told from its own digests: no keys and no other pack are needed."""

from collections.abc import Callable, Generator, Iterator

import msgspec
import numpy as np

from him.errors import HimError, IntegrityError, NotFoundError
from him.pack import format as layout
from him.pack import merkle
from him.pack.file import read_index, read_record, walk
from him.ports import Disk, File
from him.tile.address import KIND_FOOTER, KIND_INDEX
from him.types import PackFinished, PackRange, PackState

Look = Callable[[layout.Record, str], None]
"""Asked to look at each sound record, with its place; raises what is wrong with its content."""


def check_pack(file: File, pack: PackState, look: Look, repository_id: bytes | None = None) -> Iterator[HimError]:
    """Every fault of a pack, each naming its place.

    Checked are the file header, every record's digest, the zeros between records, that each index record lists the
    records before it with their Merkle root, and that ranges and footer are those that were committed. What lies
    beyond the last committed range of a pack that grows belongs to nobody.

    Args:
        repository_id: 16 bytes; the pack must be of this repository, when given.
    """
    try:
        head = file.read_at(0, layout.FILE_HEADER_BYTES)
        layout.check_file_header(head, pack.name)
        if repository_id is not None and layout.repository_of(head) != repository_id:
            yield IntegrityError("the pack is another repository's", object=pack.name, place=f"{pack.name} @ 0")
    except HimError as error:
        yield error
    try:
        yield from _growing(file, pack, look) if pack.finished is None else _finished(file, pack.finished, look)
    except HimError as error:
        yield error


def first_fault(disk: Disk, finished: PackFinished, repository_id: bytes) -> HimError | None:
    """What is wrong with a finished pack, its first fault alone; None with a sound one. `check_pack` tells all."""
    try:
        file = disk.open(finished.pack)
    except NotFoundError:
        return IntegrityError("a pack is missing", object=finished.pack, place=finished.pack)
    try:
        state = PackState(finished.pack, 0, (), finished)
        return next(check_pack(file, state, lambda _record, _place: None, repository_id), None)
    finally:
        file.close()


def _growing(file: File, pack: PackState, look: Look) -> Iterator[HimError]:
    committed = [named for _, named in pack.ranges]
    end = committed[-1].end if committed else layout.FILE_HEADER_BYTES
    if file.size() < end:
        yield IntegrityError("the pack is cut short", object=pack.name, place=f"{pack.name} @ {file.size()}")
    found = yield from _ranges(file, pack.name, end, look)
    if found is not None and found != committed:
        wrong = next((one for one, other in zip(found, committed, strict=False) if one != other), None)
        # Of two lists that begin alike one ends earlier.
        wrong = wrong or (found or committed)[-1]
        yield IntegrityError("a range is not the one committed", object=pack.name, place=f"{pack.name} @ {wrong.start}")


def _finished(file: File, finished: PackFinished, look: Look) -> Iterator[HimError]:
    """Every range, and the footer that lists them all."""
    name, at = finished.pack, finished.size - layout.TRAILER_BYTES
    if file.size() < finished.size:
        yield IntegrityError("the pack is cut short", object=name, place=f"{name} @ {file.size()}")
    elif file.size() > finished.size:
        yield IntegrityError("bytes follow the trailer", object=name, place=f"{name} @ {finished.size}")
    offset, size, root = layout.decode_trailer(file.read_at(at, layout.TRAILER_BYTES), f"{name} @ {at}")
    place = f"{name} @ {offset}"
    if root != finished.merkle_root or offset + size != at:
        raise IntegrityError("the footer is not the one committed", object=name, place=place)
    ranges = yield from _ranges(file, name, offset, look)
    footer = read_record(file, name, offset, size)
    look(footer, place)
    between = file.read_at(offset + footer.header.record_size, size - footer.header.record_size)
    if between.count(0) != len(between):
        raise IntegrityError("padding after the footer is not zero", object=name, place=place)
    if footer.header.kind != KIND_FOOTER:
        raise IntegrityError("the footer is not the one committed", object=name, place=place)
    if ranges is None:
        return
    rows = np.concatenate([layout.rows_of([]), *(read_index(file, named) for named in ranges)])
    meta = msgspec.msgpack.encode([offset, len(rows), root])
    if merkle.root([named.merkle_root for named in ranges]) != root or footer.meta != meta:
        raise IntegrityError("the footer's root is not that of the ranges", object=name, place=place)
    if bytes(footer.stored) != layout.encode_rows(rows):
        raise IntegrityError("the footer does not list what the ranges hold", object=name, place=place)


def _ranges(file: File, name: str, end: int, look: Look) -> Generator[HimError, None, list[PackRange] | None]:
    """The ranges up to `end` as their own index records tell; None when a record among them is damaged."""
    ranges: list[PackRange] = []
    rows: list[tuple[bytes, int, int, int, int]] = []
    leaves: list[bytes] = []
    begun, sound = layout.FILE_HEADER_BYTES, True
    for offset, found in walk(file, name, begun, end):
        place = f"{name} @ {offset}"
        if isinstance(found, HimError):
            yield found
            sound = False
            continue
        header = found.header
        try:
            look(found, place)
        except HimError as error:
            yield error
        if header.kind != KIND_INDEX:
            rows.append((header.blob_id, offset, header.record_size, header.kind, header.delta_depth))
            leaves.append(header.digest)
            continue
        root, after = merkle.root(leaves), layout.aligned(offset + header.record_size)
        meta = msgspec.msgpack.encode([begun, len(rows), root])
        if sound and (found.meta != meta or bytes(found.stored) != layout.encode_rows(layout.rows_of(rows))):
            yield IntegrityError("the index record does not list the records before it", object=name, place=place)
        ranges.append(PackRange(name, begun, offset, after, root))
        begun, rows, leaves = after, [], []
    return ranges if sound else None
