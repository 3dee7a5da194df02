"""Tiles stored as changes of others, documents stored in chunks: what is put comes back, whatever lies beneath."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder, FakeReader, FakeRng, MemDisk, Stack
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import him
from him.adapters.local import LocalDisk
from him.catalog.log import FileLog
from him.config import CHUNKS_FROM_BYTES, DELTA_DEPTH_MAX, DELTA_FLATTEN_RATIO
from him.errors import ConflictError, IntegrityError, LimitError, NotFoundError, UsageError
from him.pack.format import Rows, rows_of
from him.tier.address import AddressIndex, Location
from him.tile.address import KIND_TILE
from him.tile.chunks import CHUNKS
from him.types import BlobId, TileKey

KEY = TileKey("kv_cache", "f", 0, 0, 0)
TEXT = TileKey("skills", "code", 0, 0, 0)


@pytest.fixture
def stack() -> Stack:
    disk = MemDisk()
    FileLog.create(disk)
    return Stack(disk)


def noise(seed: int, shape: tuple[int, ...] = (256, 256, 4)) -> NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-128, 127, shape, dtype=np.int8)


def put(stack: Stack, value: NDArray[np.int8] | bytes, key: TileKey = KEY, branch: str = "main") -> BlobId:
    stack.ingest.tiles(branch, key.stream, key.frame, {(0, 0): value})
    entry = stack.at(branch).entry(key)
    assert entry is not None
    return entry.ref


def change(values: NDArray[np.int8], blocks: int, seed: int) -> NDArray[np.int8]:
    rng, changed = np.random.default_rng(seed), values.copy()
    for y, x in rng.integers(0, 16, (blocks, 2)).tolist():
        changed[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = noise(1_000 * seed + 16 * y + x, (16, 16, 4))
    return changed


def depth(stack: Stack, blob: BlobId) -> int:
    return stack.store.read(blob).delta_depth


# -- deltas


def test_s9_deltas_are_no_deeper_than_four_and_no_larger_than_thirty_percent(stack: Stack) -> None:
    values = noise(1)
    blobs = {put(stack, values): values}
    for step in range(12):
        values = change(values, 8, step)
        blobs[put(stack, values)] = values
    depths = [depth(stack, blob) for blob in blobs]
    assert max(depths) == DELTA_DEPTH_MAX
    assert depths[0] == 0
    full = len(stack.store.read(next(iter(blobs))).stored)
    for blob, wanted in blobs.items():
        found = stack.store.read(blob)
        assert not found.delta_depth or len(found.stored) <= DELTA_FLATTEN_RATIO * full
        assert np.array_equal(stack.store.read_tile(blob), wanted)
    assert stack.fsck().ok


def test_s9_what_changed_by_more_than_thirty_percent_is_stored_in_full(stack: Stack) -> None:
    values = noise(2)
    put(stack, values)
    few = put(stack, change(values, 40, 1))
    many = put(stack, change(values, 200, 2))
    assert (depth(stack, few), depth(stack, many)) == (1, 0)


def test_s1_3_tiny_deltas_are_joined(stack: Stack) -> None:
    values = noise(3)
    put(stack, values)
    for step in range(3):
        values = values.copy()
        values[step, step, 0] ^= 1
        blob = put(stack, values)
        assert depth(stack, blob) == 1, "changes that are tiny together hang on the tile stored in full"
    assert np.array_equal(stack.store.read_tile(blob), values)


def test_identity_and_directory_know_nothing_of_deltas(stack: Stack) -> None:
    values = noise(4)
    put(stack, values)
    changed = change(values, 3, 1)
    as_delta = put(stack, changed)
    other = MemDisk()
    FileLog.create(other)
    fresh = Stack(other)
    assert put(fresh, changed) == as_delta
    assert (depth(stack, as_delta), depth(fresh, as_delta)) == (1, 0)


def test_a_branch_continues_the_chain_of_its_parent(stack: Stack) -> None:
    values = noise(5)
    put(stack, values)
    stack.history.open_snapshot(parent="main", branch="dev")
    blob = put(stack, change(values, 3, 1), branch="dev")
    assert depth(stack, blob) == 1
    assert np.array_equal(stack.at("main").tile(KEY), values)


def test_a_tile_that_replaces_a_damaged_one_stands_alone(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    FileLog.create(disk)
    stack = Stack(disk)
    values = noise(6)
    put(stack, values)
    (pack,) = (tmp_path / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[20_000] ^= 1
    pack.write_bytes(data)
    changed = change(values, 3, 1)
    blob = put(stack, changed)
    assert depth(stack, blob) == 0
    assert np.array_equal(stack.store.read_tile(blob), changed)


def test_damage_below_a_delta_is_told_and_never_returned(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    FileLog.create(disk)
    stack = Stack(disk)
    values = noise(7)
    put(stack, values)
    blob = put(stack, change(values, 3, 1))
    assert depth(stack, blob) == 1
    (pack,) = (tmp_path / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[20_000] ^= 1
    pack.write_bytes(data)
    with pytest.raises(IntegrityError):
        stack.at("main").tile(KEY)
    report = stack.fsck()
    assert {fault.object for fault in report.errors} >= {blob.hex()}, "the delta cannot be read either"


# -- chunks


def prose(size: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    words = [b"".join(rng.choice([b"a", b"e", b"n", b"r", b"s", b"t"], 5)) for _ in range(400)]
    return b" ".join(words[i] for i in rng.integers(0, 400, size // 6))[:size]


def test_s1_2_a_long_text_is_stored_in_chunks_that_are_shared(stack: Stack) -> None:
    text = prose(400_000, 1)
    blob = put(stack, text, TEXT)
    assert stack.store.read(blob).codec == CHUNKS
    assert stack.at("main").tile(TEXT) == text
    before = stack.store.written_bytes
    edited = text[:200_000] + b"one more line\n" + text[200_000:]
    other = TileKey("skills", "another", 0, 0, 0)
    assert stack.at("main").document("skills", "code") == text
    put(stack, edited, other)
    assert stack.at("main").tile(other) == edited
    assert stack.store.written_bytes - before < 0.15 * len(text), "an edit stores the chunks it touches"
    assert stack.fsck().ok


def test_a_chunk_may_be_stored_as_a_delta_of_something_else(stack: Stack) -> None:
    text = prose(CHUNKS_FROM_BYTES * 4, 2)
    from him.tile.chunks import split

    part = max(map(bytes, split(text)), key=len)
    put(stack, part[:-20] + b"a longer end of it here", TileKey("skills", "part", 0, 0, 0))
    small = put(stack, part, TileKey("skills", "part", 0, 0, 0))
    assert depth(stack, small) == 1
    put(stack, text, TEXT)
    assert stack.at("main").tile(TEXT) == text
    assert stack.fsck().ok


@given(st.data())
@settings(max_examples=25)
def test_documents_of_every_length_come_back(data: st.DataObject) -> None:
    disk = MemDisk()
    FileLog.create(disk)
    stack = Stack(disk)
    text = b""
    near = st.integers(-2, 2).map(lambda off: CHUNKS_FROM_BYTES + off)
    for step in range(4):
        cut = data.draw(st.integers(0, len(text)))
        text = text[:cut] + prose(data.draw(near | st.integers(0, 200_000)), step) + text[cut:]
        blob = put(stack, text, TEXT)
        assert stack.store.read_tile(blob) == text
    assert stack.fsck().ok


@pytest.mark.parametrize("make", [lambda: noise(8), lambda: prose(300_000, 3)])
def test_a_repository_of_parts_is_rebuilt_from_packs_and_log(
    tmp_path: Path, make: Callable[[], NDArray[np.int8] | bytes]
) -> None:
    disk = LocalDisk(tmp_path)
    FileLog.create(disk)
    stack = Stack(disk)
    first = make()
    key = TEXT if isinstance(first, bytes) else KEY
    put(stack, first, key)
    second = first[:-100] + b"another end" if isinstance(first, bytes) else change(first, 3, 1)
    put(stack, second, key)
    stack.close()
    again = Stack(LocalDisk(tmp_path))
    again.store.forget_addresses()
    found = again.at("main").tile(key)
    assert found == second if isinstance(second, bytes) else np.array_equal(found, second)
    assert again.fsck().ok


# -- deltas made by clients


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[him.Repository]:
    with him.open(tmp_path / "r", create=True, reader=FakeReader(), encoder=FakeEncoder()) as opened:
        yield opened


def test_s2_2_a_clients_delta_is_verified_and_put(repo: him.Repository) -> None:
    handle, values = repo.writable("main"), noise(9)
    parent = handle.put("kv_cache", values)
    changed = change(values, 3, 1)
    packed = handle.make_delta("kv_cache", changed)
    assert packed is not None
    assert len(packed) < values.nbytes / 10
    assert np.array_equal(handle.get("kv_cache"), values), "making one writes nothing"
    tile = handle.put_delta("kv_cache", packed)
    assert np.array_equal(handle.get("kv_cache"), changed)
    assert tile.parent_tile_id == parent.tile_id
    with pytest.raises(ConflictError, match="another tile"):
        handle.put_delta("kv_cache", packed)


def test_a_clients_delta_that_leads_elsewhere_is_refused(repo: him.Repository) -> None:
    handle, values = repo.writable("main"), noise(10)
    handle.put("kv_cache", values)
    packed = handle.make_delta("kv_cache", change(values, 3, 1))
    assert packed is not None
    before = handle.info
    for at in range(0, len(packed), max(1, len(packed) // 300)):
        altered = bytearray(packed)
        altered[at] ^= 4
        with pytest.raises((UsageError, IntegrityError, LimitError, ConflictError)):
            handle.put_delta("kv_cache", bytes(altered))
    assert repo.snapshot("main").info == before
    with pytest.raises(NotFoundError):
        handle.put_delta("kv_cache", packed, x=1)


def test_no_delta_is_made_of_what_has_nothing_in_common(repo: him.Repository) -> None:
    handle = repo.writable("main")
    handle.put("kv_cache", noise(11))
    assert handle.make_delta("kv_cache", noise(12)) is None


# -- two writers who do not know of each other


def test_one_blob_stored_deep_by_one_writer_and_in_full_by_another_is_read_by_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = LocalDisk(tmp_path)
    FileLog.create(disk)
    one, other = Stack(disk, rng=FakeRng(1)), Stack(LocalDisk(tmp_path), rng=FakeRng(2), writer="test:2")
    values = noise(20)
    chain = [values]
    for step in range(3):
        chain.append(change(chain[-1], 20, 100 + step))
    common, after = chain[-1], change(chain[-1], 20, 200)
    for step in chain[:-1]:
        put(other, step, branch="B")
    commit = other.history.commit

    def meanwhile(*given: object, **named: object) -> object:
        """What `other` stores as a change three deep, `one` stores in full, and makes its own change on that."""
        monkeypatch.setattr(other.history, "commit", commit)
        put(one, common, branch="A")
        put(one, after, branch="A")
        return commit(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(other.history, "commit", meanwhile)
    put(other, common, branch="B")
    records = {blob: one.store.read(blob) for blob in {put(one, common, branch="C"), put(one, after, branch="C")}}
    assert sorted(found.delta_depth for found in records.values()) == [0, 1]
    for rebuilt in (False, True):
        for stack in (one, other):
            if rebuilt:
                stack.store.forget_addresses()
            assert np.array_equal(stack.at("A").tile(KEY), after)
            assert np.array_equal(stack.at("B").tile(KEY), common)
            assert stack.fsck().ok


def learn(index: AddressIndex, seq: int, pack: int, rows: Rows) -> None:
    """What one commit added to a pack."""
    index.add(pack, rows)
    index.reached(seq, keep=True)


def test_of_several_records_of_a_blob_the_least_deep_is_found() -> None:
    index, name = AddressIndex(MemDisk()), BlobId(bytes(range(32)))
    for seq, depth_of in enumerate([2, 3, 0, 1, 4], 1):
        learn(index, seq, seq, rows_of([(name, 64 * seq, 100, KIND_TILE, depth_of)]))
        found = index.find(name)
        assert found is not None
        assert (found.pack, found.depth) == ((1, 2) if seq < 3 else (3, 0))
        if seq == 2:
            index.flush(above=0)
    index.flush(above=0)
    assert index.find(name) == Location(3, 192, 100, 0)
    both = rows_of([(name, 64, 100, KIND_TILE, 0), (name, 128, 100, KIND_TILE, 2)])
    for rows in (both, both[::-1]):
        fresh = AddressIndex(MemDisk())
        learn(fresh, 1, 0, rows)
        assert fresh.find(name) == Location(0, 64, 100, 0)
