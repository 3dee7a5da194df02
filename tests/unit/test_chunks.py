"""Chunks: cut where the content says so, whatever came before; an edit changes those around it and no others."""

import json
import random

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from him.config import CHUNK_BYTES_AVERAGE, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN
from him.errors import IntegrityError, UsageError
from him.tile.chunks import GEAR, LOOSE_BELOW, STRICT_BELOW, WINDOW_BYTES, Chunk, decode_list, encode_list, split
from him.types import BlobId

ROW_BYTES = 36


def oracle(document: bytes) -> list[bytes]:
    """The definition, byte by byte: a hash of the last 32 bytes, made anew for each chunk."""
    gear = [int(value) for value in GEAR]
    chunks: list[bytes] = []
    while document:
        value, end = 0, len(document)
        for length, byte in enumerate(document, start=1):
            value = (value << 1) + gear[byte] & 0xFFFFFFFF
            below = STRICT_BELOW if length < CHUNK_BYTES_AVERAGE else LOOSE_BELOW
            if (length >= CHUNK_BYTES_MIN and value < below) or length == CHUNK_BYTES_MAX:
                end = length
                break
        chunks.append(document[:end])
        document = document[end:]
    return chunks


def log(seed: int, lines: int) -> bytes:
    """JSON lines as an agent writes them."""
    rng = random.Random(seed)
    rows = (
        {"time": 1_700_000_000 + at, "level": rng.choice(["info", "warn"]), "tile": rng.randbytes(8).hex()}
        for at in range(lines)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


DOCUMENTS = st.one_of(
    st.builds(lambda seed, size: random.Random(seed).randbytes(size), st.integers(0, 2**32), st.integers(0, 90_000)),
    st.builds(log, st.integers(0, 2**32), st.integers(0, 900)),
    st.builds(lambda piece, times: piece * times, st.binary(min_size=1, max_size=40), st.integers(0, 4_000)),
    st.binary(max_size=100),
)


@settings(max_examples=40)
@given(DOCUMENTS)
@example(b"")
@example(bytes(CHUNK_BYTES_MAX))
@example(bytes(CHUNK_BYTES_MAX + 1))
@example(bytes(range(256)) * 400)
def test_chunks_are_those_of_the_definition(document: bytes) -> None:
    assert [bytes(chunk) for chunk in split(document)] == oracle(document)


@given(DOCUMENTS)
def test_chunks_join_to_the_document_and_keep_to_their_lengths(document: bytes) -> None:
    chunks = split(document)
    assert b"".join(chunks) == document
    assert all(CHUNK_BYTES_MIN <= len(chunk) <= CHUNK_BYTES_MAX for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= CHUNK_BYTES_MAX for chunk in chunks[-1:])


@given(DOCUMENTS, st.data())
def test_what_follows_a_boundary_decides_the_rest_alone(document: bytes, data: st.DataObject) -> None:
    chunks = split(document)
    skipped = data.draw(st.integers(0, len(chunks)))
    rest = document[sum(len(chunk) for chunk in chunks[:skipped]) :]
    assert split(rest) == chunks[skipped:]


@given(DOCUMENTS, st.binary(max_size=5_000))
def test_what_is_appended_changes_the_last_chunk_only(document: bytes, more: bytes) -> None:
    before, after = split(document), split(document + more)
    assert after[: len(before) - 1] == before[:-1]


def ending_at(length: int, low: int, high: int) -> bytes:
    """A document whose only byte with a hash in `low` … `high`, of those that may end a chunk, is at `length`."""
    gear = [int(value) for value in GEAR]
    for seed in range(1_000_000):
        tail = random.Random(seed).randbytes(4)
        window = bytes(WINDOW_BYTES - 4) + tail
        value = sum(gear[byte] << shift for shift, byte in enumerate(reversed(window))) & 0xFFFFFFFF
        if low <= value < high:
            return bytes(length - 4) + tail + bytes(CHUNK_BYTES_MAX)
    raise AssertionError("none found")


@pytest.mark.parametrize(
    ("length", "strict", "cut"),
    [
        (CHUNK_BYTES_MIN - 1, True, False),
        (CHUNK_BYTES_MIN, True, True),
        (CHUNK_BYTES_MIN, False, False),
        (CHUNK_BYTES_AVERAGE - 1, True, True),
        (CHUNK_BYTES_AVERAGE - 1, False, False),
        (CHUNK_BYTES_AVERAGE, False, True),
        (CHUNK_BYTES_MAX, False, True),
    ],
)
def test_hashes_count_from_the_least_length_and_more_of_them_from_the_average(
    length: int, strict: bool, cut: bool
) -> None:
    document = ending_at(length, 0, STRICT_BELOW) if strict else ending_at(length, STRICT_BELOW, LOOSE_BELOW)
    first = len(split(document)[0])
    assert (first == length) == cut
    assert first == len(oracle(document)[0])


def test_no_window_reaches_back_over_a_boundary() -> None:
    assert WINDOW_BYTES <= CHUNK_BYTES_MIN


@pytest.mark.parametrize("kind", ["log", "noise"])
def test_an_insertion_changes_a_few_chunks_however_long_the_document(kind: str) -> None:
    changed: list[int] = []
    for seed in range(20):
        document = log(seed, 12_000) if kind == "log" else random.Random(seed).randbytes(800_000)
        at = random.Random(seed).randrange(len(document))
        before = {bytes(chunk) for chunk in split(document)}
        after = split(document[:at] + b"an inserted line\n" + document[at:])
        assert len(after) > 50
        changed.append(sum(bytes(chunk) not in before for chunk in after))
    assert max(changed) <= 5
    assert sum(changed) / len(changed) <= 2.5


def test_a_view_is_split_like_bytes_and_not_copied() -> None:
    document = log(1, 2_000)
    chunks = split(memoryview(b"xyz" + document)[3:])
    assert chunks == split(document)
    assert all(isinstance(chunk, memoryview) for chunk in chunks)
    assert all(chunk.obj is document for chunk in split(document))


def test_boundaries_are_pinned() -> None:
    """The cuts are published: if they change, equal content written before and after is stored twice."""
    assert blake3(GEAR.astype("<u4").tobytes()).hexdigest() == PINNED["gear"]
    assert [len(chunk) for chunk in split(b"".join(b"%d\n" % (at * at) for at in range(12_000)))] == PINNED["cuts"]


PINNED = {
    "gear": "fa052c0754f873a835c98e190d5d1adea1c09d0634c68d0be361d0336522339c",
    "cuts": [3625, 7564, 2264, 7292, 10611, 7383, 13391, 6421, 2819, 9468, 9694, 8273, 9608, 6961],
}


# -- lists

LISTS = st.lists(
    st.tuples(st.binary(min_size=32, max_size=32), st.integers(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)), max_size=20
)


@given(LISTS)
@example([(bytes(32), CHUNK_BYTES_MAX)])
def test_lists_come_back(rows: list[tuple[bytes, int]]) -> None:
    chunks = [Chunk(BlobId(blob), length) for blob, length in rows]
    stored = encode_list(chunks)
    assert len(stored) == ROW_BYTES * len(chunks)
    size = sum(chunk.length for chunk in chunks)
    assert decode_list(stored, size) == chunks
    assert decode_list(memoryview(stored), size) == chunks


@given(LISTS.filter(bool), st.data())
def test_altered_lists_are_refused_or_name_other_blobs(rows: list[tuple[bytes, int]], data: st.DataObject) -> None:
    stored = bytearray(encode_list([Chunk(BlobId(blob), length) for blob, length in rows]))
    size = sum(length for _, length in rows)
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] ^= 1 << data.draw(st.integers(0, 7))
    if at % ROW_BYTES < 32:
        assert [chunk.length for chunk in decode_list(bytes(stored), size)] == [length for _, length in rows]
    else:
        with pytest.raises(IntegrityError):
            decode_list(bytes(stored), size)


@given(st.binary(max_size=200), st.integers(0, 2**40))
def test_random_bytes_never_give_another_error(stored: bytes, size: int) -> None:
    try:
        chunks = decode_list(stored, size)
    except IntegrityError:
        return
    assert sum(chunk.length for chunk in chunks) == size


@pytest.mark.parametrize(
    "lengths", [[0], [5_000, 0], [CHUNK_BYTES_MAX + 1], [CHUNK_BYTES_MIN - 1, 5_000], [2**32 - 1], []], ids=str
)
def test_lengths_no_chunk_has_are_refused(lengths: list[int]) -> None:
    stored = b"".join(bytes(32) + length.to_bytes(4, "little") for length in lengths)
    with pytest.raises(IntegrityError):
        decode_list(stored, sum(lengths) or 1)


@pytest.mark.parametrize("chunk", [Chunk(BlobId(bytes(32)), 0), Chunk(BlobId(bytes(32)), CHUNK_BYTES_MAX + 1)])
def test_a_list_of_impossible_chunks_is_not_written(chunk: Chunk) -> None:
    with pytest.raises(UsageError):
        encode_list([chunk])


def test_a_short_last_chunk_is_allowed() -> None:
    chunks = [Chunk(BlobId(bytes(32)), CHUNK_BYTES_MIN), Chunk(BlobId(bytes(range(32))), 1)]
    assert decode_list(encode_list(chunks), CHUNK_BYTES_MIN + 1) == chunks
    assert np.frombuffer(encode_list(chunks), np.uint8).size == 2 * ROW_BYTES
