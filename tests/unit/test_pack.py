"""Packs: every byte is covered by a digest or must be zero, so that no flipped bit is ever returned."""

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from fakes import MemDisk
from hypothesis import given
from hypothesis import strategies as st

from him.config import FORMAT_VERSION, PACK_ALIGN_BYTES, PAYLOAD_ALIGN_BYTES, PAYLOAD_ALIGN_FROM_BYTES
from him.errors import HimError, IntegrityError, VersionError
from him.pack import format as layout
from him.pack import merkle
from him.pack.file import PackWriter, read_index, read_record, walk
from him.ports import File
from him.tile.address import KIND_FOOTER, KIND_INDEX, KIND_PAGE, KIND_TILE, blob_id
from him.types import BlobId, PackFinished, PackRange

NAME = "packs/00.pack"
RECORD_SIZES = [0, 1, 63, 64, 65, 300, 5000, PAYLOAD_ALIGN_FROM_BYTES]


def payload_of(number: int, size: int) -> bytes:
    return np.random.default_rng(number).bytes(size)


def write_pack(sizes: list[int], *, finished: bool = True) -> tuple[File, list[PackRange], PackFinished | None]:
    """A pack with a range for every two records, and its footer."""
    file = MemDisk().open(NAME, create=True)
    file.write_at(0, layout.encode_file_header(bytes(range(16)), bytes(range(16, 32))))
    writer = PackWriter(file, NAME, layout.FILE_HEADER_BYTES)
    ranges = []
    for number, size in enumerate(sizes):
        payload = payload_of(number, size)
        kind = KIND_PAGE if number % 3 == 2 else KIND_TILE
        meta = b"meta" * (number % 4)
        writer.append([layout.Draft(kind, 0, blob_id(kind, meta, payload), meta, payload, size, bytes(range(16)))])
        if number % 2 or number == len(sizes) - 1:
            ranges.append(writer.close_range())
    if not finished:
        return file, ranges, None
    rows = np.concatenate([read_index(file, named) for named in ranges])
    return file, ranges, writer.finish(rows, [named.merkle_root for named in ranges])


def index_rows(file: File, *ranges: PackRange) -> list[tuple[bytes, int, int, int]]:
    """(blob_id, offset, length, kind) of the ranges' index records, in their order."""
    return [row for named in ranges for row in index_rows_of(read_index(file, named).tobytes())]


def index_rows_of(payload: bytes | memoryview) -> list[tuple[bytes, int, int, int]]:
    return [
        (row["blob"].tobytes(), int(row["offset"]), int(row["length"]), int(row["kind"]))
        for row in layout.decode_rows(payload, NAME)
    ]


def a_draft(payload: bytes, meta: bytes = b"") -> layout.Draft:
    return layout.Draft(KIND_TILE, 0, blob_id(KIND_TILE, meta, payload), meta, payload, len(payload))


def encoded(offset: int, draft: layout.Draft) -> tuple[bytes, int]:
    record = layout.encode_record(offset, draft)
    return b"".join(record.parts), record.size


# -- what was written comes back


@given(st.lists(st.integers(0, 3000) | st.sampled_from(RECORD_SIZES), min_size=1, max_size=9))
def test_records_round_trip_through_index_and_walk(sizes: list[int]) -> None:
    file, ranges, _ = write_pack(sizes)
    rows = index_rows(file, *ranges)
    assert len(rows) == len(sizes)
    wanted = {payload_of(number, size) for number, size in enumerate(sizes)}
    assert {read_record(file, NAME, at, length, BlobId(blob)).stored for blob, at, length, _ in rows} == wanted
    for named in ranges:
        found = list(walk(file, NAME, named.start, named.end))
        assert not [one for _, one in found if isinstance(one, IntegrityError)]
        leaves = [
            one.header.digest for at, one in found if not isinstance(one, IntegrityError) and at != named.index_offset
        ]
        assert merkle.root(leaves) == named.merkle_root
    assert [r.end for r in ranges[:-1]] == [r.start for r in ranges[1:]]


def test_index_rows_are_sorted_and_name_their_kind() -> None:
    file, ranges, _ = write_pack([10, 20])
    rows = index_rows(file, ranges[0])
    assert rows == sorted(rows)
    assert [kind for *_, kind in rows] == [KIND_TILE, KIND_TILE]


def test_large_raw_payloads_lie_on_memory_pages() -> None:
    file, ranges, _ = write_pack([5, PAYLOAD_ALIGN_FROM_BYTES, 7, PAYLOAD_ALIGN_FROM_BYTES + 3])
    large = 0
    for blob, at, length, _ in index_rows(file, *ranges):
        assert at % PACK_ALIGN_BYTES == 0
        record = read_record(file, NAME, at, length, BlobId(blob))
        if len(record.stored) >= PAYLOAD_ALIGN_FROM_BYTES:
            large += 1
            start = at + layout.RECORD_HEADER_BYTES + len(record.meta) + record.header.pad_size
            assert start % PAYLOAD_ALIGN_BYTES == 0
    assert large == 2


def test_header_fields_of_later_work_are_there_and_zero() -> None:
    file, ranges, _ = write_pack([10])
    ((_, at, length, _),) = index_rows(file, ranges[0])
    header = read_record(file, NAME, at, length).header
    assert (header.delta_depth, header.flags, any(header.delta_base), any(header.key_id)) == (0, 0, False, False)
    assert not any(header.parity_group)
    assert not any(header.nonce)
    assert header.origin == bytes(range(16))


def test_the_footer_lists_every_range_and_the_trailer_finds_it() -> None:
    file, ranges, finished = write_pack([10, 20, 30, 40, 50])
    assert finished is not None
    assert finished.size == file.size()
    at = finished.size - layout.TRAILER_BYTES
    offset, size, root = layout.decode_trailer(file.read_at(at, layout.TRAILER_BYTES), NAME)
    assert root == finished.merkle_root == merkle.root([named.merkle_root for named in ranges])
    assert offset == ranges[-1].end
    footer = read_record(file, NAME, offset, size)
    assert footer.header.kind == KIND_FOOTER
    rows = index_rows(file, *ranges)
    assert len(layout.decode_rows(footer.stored, NAME)) == len(rows) == 5
    assert footer.stored == layout.encode_rows(np.concatenate([read_index(file, named) for named in ranges]))
    assert index_rows_of(footer.stored) == sorted(rows)


def test_a_half_written_record_is_overwritten_by_the_next_one() -> None:
    disk = MemDisk()
    file = disk.open(NAME, create=True)
    file.write_at(0, layout.encode_file_header(bytes(16), bytes(16)))
    writer = PackWriter(file, NAME, layout.FILE_HEADER_BYTES)
    disk.faults.at, disk.faults.mode = disk.faults.count + 1, "partial"
    large = payload_of(1, 20_000)
    with pytest.raises(HimError):
        writer.append([a_draft(large)])
    assert writer.end == layout.FILE_HEADER_BYTES
    small = payload_of(2, 30)
    writer.append([a_draft(small)])
    named = writer.close_range()
    finished = writer.finish(read_index(file, named), [named.merkle_root])
    assert file.size() == finished.size, "nothing of the half-written record is left behind the trailer"
    assert not [one for _, one in walk(file, NAME, named.start, named.end) if isinstance(one, IntegrityError)]


# -- every flipped bit


def problems(file: File, ranges: list[PackRange], finished: PackFinished) -> Iterator[str]:
    """What fsck looks at in one pack, without the rest of a repository."""
    try:
        layout.check_file_header(file.read_at(0, layout.FILE_HEADER_BYTES), NAME)
    except HimError as error:
        yield error.place
    for named in ranges:
        leaves = []
        for at, found in walk(file, NAME, named.start, named.end):
            if isinstance(found, IntegrityError):
                yield found.place
            elif at != named.index_offset:
                leaves.append(found.header.digest)
        if merkle.root(leaves) != named.merkle_root:
            yield f"{NAME} @ {named.start}"
    try:
        at = finished.size - layout.TRAILER_BYTES
        offset, size, _ = layout.decode_trailer(file.read_at(at, layout.TRAILER_BYTES), f"{NAME} @ {at}")
        record = read_record(file, NAME, offset, size)
        rest = file.read_at(offset + record.header.record_size, size - record.header.record_size)
        if any(rest):
            yield f"{NAME} @ {offset}"
    except HimError as error:
        yield error.place


def test_every_flipped_bit_of_a_pack_is_noticed_and_none_is_returned() -> None:
    file, ranges, finished = write_pack([0, 5, 70, 33])
    assert finished is not None
    assert not list(problems(file, ranges, finished))
    rows = index_rows(file, *ranges)
    truth = {row[0]: read_record(file, NAME, row[1], row[2]).stored for row in rows}
    for at in range(file.size()):
        # Every byte, with a bit that wanders through all eight.
        original = file.read_at(at, 1)
        file.write_at(at, bytes([original[0] ^ 1 << at % 8]))
        places = list(problems(file, ranges, finished))
        assert places, f"byte {at} is not covered"
        assert all(place.startswith(NAME) for place in places)
        for blob, start, length, _ in rows:
            try:
                assert read_record(file, NAME, start, length, BlobId(blob)).stored == truth[blob]
            except IntegrityError as error:
                assert error.place.startswith(f"{NAME} @ {start}")
        file.write_at(at, original)


def test_all_bits_of_a_record_are_covered_when_it_is_read() -> None:
    payload, meta = payload_of(3, 40), b"some meta"
    blob = blob_id(KIND_TILE, meta, payload)
    data, size = encoded(192, a_draft(payload, meta))
    for bit in range(size * 8):
        altered = bytearray(data[:size])
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            layout.decode_record(bytes(altered), "here", blob)


def test_zeros_before_a_large_payload_are_checked() -> None:
    payload = payload_of(4, PAYLOAD_ALIGN_FROM_BYTES)
    blob = blob_id(KIND_TILE, b"", payload)
    data, size = encoded(128, a_draft(payload))
    pad = layout.decode_header(data, "").pad_size
    assert pad > 1000
    altered = bytearray(data[:size])
    altered[layout.RECORD_HEADER_BYTES + pad // 2] = 1
    with pytest.raises(IntegrityError, match="padding"):
        layout.decode_record(bytes(altered), "here", blob)


def test_a_walk_goes_on_behind_a_destroyed_header() -> None:
    file, ranges, _ = write_pack([100, 200, 300, 400], finished=False)
    rows = sorted(index_rows(file, ranges[0]), key=lambda row: row[1])
    file.write_at(rows[0][1], b"\xff" * 100)
    found = list(walk(file, NAME, ranges[0].start, ranges[0].end))
    assert isinstance(found[0][1], IntegrityError)
    assert [at for at, one in found if not isinstance(one, IntegrityError)] == [rows[1][1], ranges[0].index_offset]


def test_a_cut_pack_is_noticed_at_every_length() -> None:
    file, ranges, _ = write_pack([100, 200], finished=False)
    whole = file.read_at(0, file.size())
    for size in range(ranges[0].start, len(whole)):
        cut = MemDisk().open(NAME, create=True)
        cut.write_at(0, whole[:size])
        found = list(walk(cut, NAME, ranges[0].start, ranges[0].end))
        assert any(isinstance(one, IntegrityError) for _, one in found), size


# -- records in the wrong place


def test_a_whole_record_in_anothers_place_is_refused() -> None:
    file, ranges, _ = write_pack([500, 500], finished=False)
    one, other = sorted(index_rows(file, ranges[0]), key=lambda row: row[1])
    file.write_at(one[1], file.read_at(other[1], other[2]))
    with pytest.raises(IntegrityError, match="another record"):
        read_record(file, NAME, one[1], one[2], BlobId(one[0]))


def test_an_index_of_another_range_is_refused() -> None:
    file, ranges, _ = write_pack([10, 20, 30, 40], finished=False)
    first, second = ranges
    swapped = msgspec.structs.replace(first, index_offset=second.index_offset, end=second.end)
    with pytest.raises(IntegrityError):
        read_index(file, swapped)
    with pytest.raises(IntegrityError):
        read_index(file, msgspec.structs.replace(first, merkle_root=bytes(32)))


def test_a_tile_does_not_pass_for_an_index() -> None:
    file, ranges, _ = write_pack([10, 20], finished=False)
    tile = index_rows(file, ranges[0])[0]
    with pytest.raises(HimError):
        read_index(file, msgspec.structs.replace(ranges[0], index_offset=tile[1], end=tile[1] + tile[2]))


# -- newer software


def test_a_record_of_a_newer_format_is_a_version_error() -> None:
    data, size = encoded(128, a_draft(b"payload", b"m"))
    head = bytearray(data[: layout.RECORD_HEADER_BYTES - 32])
    head[4:6] = (FORMAT_VERSION + 1).to_bytes(2, "little")
    newer = bytes(head) + blake3(bytes(head) + b"m").digest() + data[layout.RECORD_HEADER_BYTES : size]
    with pytest.raises(VersionError):
        layout.decode_record(newer, "here")


def test_a_damaged_version_is_damage_not_newer_software() -> None:
    data, size = encoded(128, a_draft(b"payload", b"m"))
    altered = bytearray(data[:size])
    altered[5] ^= 64
    with pytest.raises(IntegrityError):
        layout.decode_record(bytes(altered), "here")


def test_a_pack_of_a_newer_format_is_a_version_error() -> None:
    header = bytearray(layout.encode_file_header(bytes(16), bytes(16)))
    head = header[:96]
    head[8:10] = (FORMAT_VERSION + 1).to_bytes(2, "little")
    newer = bytes(head) + blake3(bytes(head)).digest()
    with pytest.raises(VersionError):
        layout.check_file_header(newer[: layout.FILE_HEADER_BYTES], NAME)
    header[8] ^= 2
    with pytest.raises(IntegrityError):
        layout.check_file_header(bytes(header), NAME)


# -- Merkle roots


def test_merkle_roots_differ_with_order_length_and_level() -> None:
    leaves = [bytes([i]) * 32 for i in range(9)]
    roots = [merkle.root(leaves[:n]) for n in range(10)]
    assert len(set(roots)) == 10
    assert merkle.root(leaves[::-1]) != roots[9]
    assert merkle.root([merkle.root(leaves[:2]), leaves[2]]) != merkle.root(leaves[:3])


def test_index_kind_is_not_confused_with_footer() -> None:
    assert KIND_INDEX != KIND_FOOTER
    with pytest.raises(IntegrityError):
        layout.decode_rows(bytes(57), NAME)
