"""The warm store and its address index: batches, lent memory, buffers used again, and an index that may lie."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fakes import MemDisk, Stack, new_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from him.adapters.local import LocalDisk
from him.catalog.log import FileLog
from him.config import BUFFER_FROM_BYTES
from him.errors import IntegrityError, NotFoundError
from him.pack.format import Rows, rows_of
from him.tier.address import AddressIndex, Location
from him.tile.address import KIND_PAGE, KIND_TILE
from him.types import BlobId, TileKey


def blob(number: int) -> BlobId:
    """Ids of which many share their first eight, some their first sixteen bytes with another."""
    high, low = (number // 8).to_bytes(8, "big"), (number // 2).to_bytes(8, "big")
    return BlobId(high + low + number.to_bytes(16, "big"))


def shares_a_row(number: int, numbers: set[int]) -> bool:
    return number in numbers or number ^ 1 in numbers


# -- the address index


def learn(index: AddressIndex, seq: int, pack: int, rows: Rows) -> None:
    """What one commit added to a pack."""
    index.add(pack, rows)
    index.reached(seq, keep=True)


@pytest.fixture
def tiny_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.address.ADDRESS_TAIL_ROWS", 16)


@given(batches=st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=40, unique=True), min_size=1, max_size=12))
@settings(max_examples=60)
def test_addresses_are_found_in_tail_and_segments(batches: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("him.tier.address.ADDRESS_TAIL_ROWS", 16)
        disk = MemDisk()
        index = AddressIndex(disk)
        where: dict[int, list[Location]] = {}
        for seq, numbers in enumerate(batches, 1):
            fresh = [n for n in numbers if n & 1 == 0]
            learn(index, seq, seq, rows_of([(blob(n), 64 * n, n + 1, KIND_TILE, 0) for n in fresh]))
            for n in fresh:
                where.setdefault(n, []).append(Location(seq, 64 * n, n + 1, 0))
            index.flush()
        again = AddressIndex(disk)
        again.load(len(batches))
        for n, told in where.items():
            assert index.find(blob(n)) == told[-1], "the newest place counts"
            assert again.find(blob(n)) in [*told, None], "the tail was not written"
        everything = list(range(402))
        missing = index.missing([blob(n) for n in everything])
        for n, gone in zip(everything, missing, strict=True):
            assert gone == (index.find(blob(n)) is None)
            if not shares_a_row(n, set(where)):
                assert gone


def test_segments_stay_few_and_are_loaded_again(tiny_segments: None) -> None:
    disk = MemDisk()
    index = AddressIndex(disk)
    for seq in range(1, 101):
        learn(index, seq, 0, rows_of([(blob(2 * (20 * seq + i)), 64 * i, 1, KIND_TILE, 0) for i in range(18)]))
        index.flush()
    assert len(disk.list("cache/addresses")) <= 6
    again = AddressIndex(disk)
    again.load(100)
    assert again.position == 100
    assert all(again.find(blob(2 * (20 * seq + 3))) == Location(0, 192, 1, 0) for seq in range(1, 101))


def test_leftovers_of_a_merge_and_segments_of_the_future_are_dropped(tiny_segments: None) -> None:
    disk = MemDisk()
    index = AddressIndex(disk)
    learn(index, 5, 0, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(20)]))
    (old,) = disk.list("cache/addresses")
    kept = bytes(disk.files[f"cache/addresses/{old}"].now)
    learn(index, 9, 0, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(20, 60)]))
    assert disk.list("cache/addresses") == ["0000000000000009.seg"]
    disk.write_whole(f"cache/addresses/{old}", kept)
    again = AddressIndex(disk)
    again.load(9)
    assert again.position == 9
    assert disk.list("cache/addresses") == ["0000000000000009.seg"]
    early = AddressIndex(disk)
    early.load(8)
    assert early.position == 0
    assert not disk.list("cache/addresses")


def test_a_segment_that_is_replaced_while_it_is_mapped_is_taken_whole_or_not_at_all(
    tiny_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes other rows under the same name between two looks at the file."""
    own, others = MemDisk(), MemDisk()
    learn(AddressIndex(own), 5, 0, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(20)]))
    learn(AddressIndex(others), 5, 0, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(100, 160)]))
    view = own.view

    def late(path: str, offset: int, size: int) -> memoryview:
        own.write_whole(path, bytes(others.files[path].now))
        return view(path, offset, size)

    monkeypatch.setattr(own, "view", late)
    again = AddressIndex(own)
    again.load(5)
    found = [again.find(blob(2 * n)) is not None for n in range(20)]
    assert again.position == 0 or all(found)


def test_damaged_rows_are_never_merged_into_a_segment_that_looks_sound(tiny_segments: None) -> None:
    disk = MemDisk()
    learn(AddressIndex(disk), 5, 0, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(20)]))
    (path,) = (name for name in disk.files if name.endswith(".seg"))
    disk.files[path].now[130] ^= 1
    again = AddressIndex(disk)
    again.load(5)
    learn(again, 6, 1, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(20, 60)]))
    assert again.damaged
    assert not again.sound()
    assert all(again.find(blob(2 * n)) is not None for n in range(20, 60))


@pytest.mark.parametrize("mode", ["refuse", "late"])
def test_a_segment_never_claims_rows_of_a_tail_that_could_not_be_written(tiny_segments: None, mode: str) -> None:
    disk = MemDisk()
    index = AddressIndex(disk)
    learn(index, 1, 0, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(3)]))
    disk.faults.at, disk.faults.mode = disk.faults.count + 1, mode
    learn(index, 2, 0, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(3, 40)]))
    disk.faults.at = None
    index.flush()
    again = AddressIndex(disk)
    again.load(2)
    for found in (index, again) if again.position == 2 else (index,):
        assert all(found.find(blob(2 * n)) is not None for n in range(40))


@pytest.mark.parametrize("at", [0, 9, 20, 30, 60, 100])
def test_a_damaged_head_costs_the_segment_and_a_damaged_row_is_told(tiny_segments: None, at: int) -> None:
    disk = MemDisk()
    index = AddressIndex(disk)
    learn(index, 5, 0, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(20)]))
    data = disk.files["cache/addresses/0000000000000005.seg"].now
    data[at] ^= 1
    again = AddressIndex(disk)
    again.load(5)
    assert again.position == (5 if at == 100 else 0), "zeros behind the head are not looked at"
    data[200] ^= 1
    again = AddressIndex(disk)
    again.load(5)
    assert at != 100 or not again.sound()
    assert index.sound()


# -- the store on a real disk


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    disk = LocalDisk(tmp_path)
    FileLog.create(disk)
    return Stack(disk)


def noise(seed: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-128, 127, shape, dtype=np.int8)


def put(stack: Stack, count: int, shape: tuple[int, ...] = (512, 512, 8)) -> dict[tuple[int, int], NDArray[np.int8]]:
    cells = {(0, number): noise(number, shape) for number in range(count)}
    stack.ingest.tiles("main", "kv_cache", "f", cells)
    return cells


def test_a_batch_comes_back_in_the_order_asked_for(stack: Stack) -> None:
    cells = put(stack, 5)
    reader = stack.at("main")
    order = [(0, 3), (0, 0), (0, 3), (0, 4)]
    found = reader.tiles([TileKey("kv_cache", "f", 0, y, x) for y, x in order])
    for cell, values in zip(order, found, strict=True):
        assert np.array_equal(values, cells[cell])
    with pytest.raises(NotFoundError):
        reader.tiles([TileKey("kv_cache", "f", 0, 0, 9)])


def test_values_stay_what_they_are_while_buffers_are_used_again(stack: Stack) -> None:
    cells = put(stack, 6)
    reader = stack.at("main")
    assert cells[0, 0].nbytes >= BUFFER_FROM_BYTES
    held = {x: reader.tile(TileKey("kv_cache", "f", 0, 0, x)) for x in (0, 1)}
    part = np.asarray(reader.tile(TileKey("kv_cache", "f", 0, 0, 2)))[5:7]
    for _ in range(5):
        for x in range(6):
            assert np.array_equal(reader.tile(TileKey("kv_cache", "f", 0, 0, x)), cells[0, x])
    assert all(np.array_equal(values, cells[0, x]) for x, values in held.items())
    assert np.array_equal(part, cells[0, 2][5:7]), "a slice keeps the memory it looks at"
    addresses = {np.asarray(reader.tile(TileKey("kv_cache", "f", 0, 0, 5))).ctypes.data for _ in range(10)}
    assert len(addresses) <= 2, "memory nobody refers to is used again"


def test_buffers_of_a_batch_are_not_used_again_before_it_is_written(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("him.ingest.ARRAY_PART_BYTES", 3 * 512 * 512)
    given = {(0, x): noise(x, (512, 512, 1)) >> (x % 3 * 3) for x in range(40)}
    stack.ingest.tiles("main", "kv_cache", "f", given)
    reader = stack.at("main")
    for (y, x), values in given.items():
        assert np.array_equal(reader.tile(TileKey("kv_cache", "f", 0, y, x)), values)
    assert stack.fsck().ok


def test_closing_waits_for_work_that_asks_for_the_lock(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    closing = threading.Event()
    shutdown = ThreadPoolExecutor.shutdown

    def signalled(self: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        closing.set()
        shutdown(self, wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", signalled)

    def asks(number: int) -> bool:
        begun.set()
        return closing.wait(10) and not stack.store.has(blob(number))

    begun = threading.Event()
    asked = stack.store._pool().submit(asks, 1)
    assert begun.wait(10)
    ending = threading.Thread(target=stack.store.close, daemon=True)
    ending.start()
    ending.join(10)
    assert not ending.is_alive()
    assert asked.result()


def test_more_packs_than_files_may_be_open(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 1)
    monkeypatch.setattr("him.tier.warm.OPEN_PACKS_MAX", 3)
    cells = {(0, number): noise(number, (64, 64, 2)) for number in range(12)}
    for cell, values in cells.items():
        stack.ingest.tiles("main", "kv_cache", "f", {cell: values})
    reader = stack.at("main")
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for _ in range(2):
        for (y, x), values in cells.items():
            assert np.array_equal(reader.tile(TileKey("kv_cache", "f", 0, y, x)), values)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before + 3
    assert stack.fsck().ok


def test_a_view_lends_the_packs_own_memory(stack: Stack) -> None:
    cells = put(stack, 2)
    with stack.at("main").view(TileKey("kv_cache", "f", 0, 0, 1)) as values:
        assert np.array_equal(values, cells[0, 1])
        assert not np.asarray(values).flags.writeable
        assert np.asarray(values).ctypes.data % 4096 == 0, "what is stored raw lies on pages of memory"


def test_a_view_of_damaged_bytes_is_refused(stack: Stack, tmp_path: Path) -> None:
    put(stack, 1)
    (pack,) = (tmp_path / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[100_000] ^= 1
    pack.write_bytes(data)
    with pytest.raises(IntegrityError), stack.at("main").view(TileKey("kv_cache", "f", 0, 0, 0)):
        pass


def test_what_is_compressed_or_quantised_is_lent_as_a_copy(stack: Stack) -> None:
    flat = np.zeros((512, 512, 8), dtype=np.int8)
    stack.ingest.tiles("main", "kv_cache", "flat", {(0, 0): flat})
    with stack.at("main").view(TileKey("kv_cache", "flat", 0, 0, 0)) as values:
        assert np.array_equal(values, flat)


def test_pages_put_together_are_those_put_one_by_one(stack: Stack) -> None:
    payloads = [bytes([number]) * (100 + number) for number in range(40)]
    one = [stack.store.put_page(KIND_PAGE, payload) for payload in payloads[:7]]
    written = stack.store.written_pages
    blobs = stack.store.put_pages(KIND_PAGE, [*payloads, payloads[3]])
    assert blobs[:7] == one
    assert blobs[40] == blobs[3]
    assert stack.store.written_pages - written == 33, "what is there, or is there twice in a batch, is written once"
    assert [stack.store.page(KIND_PAGE, blob) for blob in blobs] == [*payloads, payloads[3]]


def test_a_rotten_address_index_is_made_anew(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("him.tier.address.ADDRESS_TAIL_ROWS", 4)
    cells = put(stack, 6, (64, 64, 2))
    stack.close()
    folder = tmp_path / "cache/addresses"
    rotten = 0
    for file in folder.iterdir():
        data = bytearray(file.read_bytes())
        for row in range(128, len(data), 32):
            data[row + 20] ^= 1  # The offset's unit: every row now leads elsewhere.
            rotten += 1
        file.write_bytes(data)
    assert rotten
    again = Stack(LocalDisk(tmp_path))
    reader = again.at("main")
    for (y, x), values in cells.items():
        assert np.array_equal(reader.tile(TileKey("kv_cache", "f", 0, y, x)), values)
    assert again.fsck().ok


def test_of_two_places_in_memory_the_other_is_found_when_a_pack_goes() -> None:
    """Two packs hold one tile; a collection of another process gives up the one that was learnt last."""
    index = AddressIndex(MemDisk())
    for number in range(2):
        learn(index, number + 1, number, rows_of([(blob(2), 64, 1, KIND_TILE, 0)]))
    index.condemned = frozenset({1})
    assert index.missing([blob(2)] * 20) == [False] * 20
    index.condemned, index.removed = frozenset(), frozenset({1})
    assert index.find(blob(2)) == Location(0, 64, 1, 0)
    index.flush(above=0)
    assert index.find(blob(2)) == Location(0, 64, 1, 0)


def test_rows_that_were_learnt_in_part_name_no_commit(tiny_segments: None) -> None:
    """A finished pack brings rows of older commits, which a segment that was written before it would lack."""
    disk = MemDisk()
    index = AddressIndex(disk)
    index.add(0, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(20)]))
    assert disk.list("cache/addresses") == ["0000000000000000.0.part"]
    other = AddressIndex(disk)
    other.load(9)
    assert other.position == 0
    index.add(1, rows_of([(blob(2 * n), 64, 1, KIND_TILE, 0) for n in range(20, 25)]))
    index.reached(9, keep=True)
    assert disk.list("cache/addresses") == ["0000000000000009.seg"]
    other = AddressIndex(disk)
    other.load(9)
    assert other.position == 9
    assert all(found.find(blob(2 * n)) is not None for n in range(25) for found in (index, other))


def test_a_row_that_names_no_pack_is_told_and_the_index_made_anew() -> None:
    stack = Stack(new_disk())
    stack.ingest.append("main", "logs", [{"n": 1}], writer="w")
    (frame,) = stack.at("main").frames()
    stack.store.close()
    stack.store._addresses.flush(above=0)
    segment = next(path for path in stack.disk.files if path.endswith(".seg"))
    data = stack.disk.files[segment].now
    count = (len(data) - 128) // 32
    for row in range(count):
        data[128 + 16 * count + 16 * row + 2] ^= 1
    again = Stack(stack.disk)
    (key,) = again.at("main").keys("logs", frame.name)
    assert again.at("main").tile(key) == b'{"n":1}\n'
    again.close()
