"""KV caches: bit for bit or quantised, bound to one model, found by their beginning, stored once."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
from fakes import FakeClock, FakeEncoder, FakeReader, FakeRng, Faults, MemDisk, PowerLoss, Stack, new_disk
from hypothesis import given, settings
from hypothesis import strategies as st

import him
from him import kv
from him.adapters.pillow import PillowDecoder
from him.errors import (
    ConflictError,
    DriftError,
    HimError,
    IntegrityError,
    LimitError,
    NotFoundError,
    SealedError,
    UsageError,
)
from him.handle import Parts, SnapshotHandle
from him.types import StreamSpec

BINDING = kv.Binding("blake3:weights", "blake3:vocabulary", "rope base 10000", "float32", layers=2, kv_heads=2, dim=4)
OTHERS = {
    "model": "blake3:other",
    "tokenizer": "blake3:other",
    "positions": "rope base 10000, scaled by 2",
    "dtype": "float16",
    "layers": 3,
    "kv_heads": 1,
    "dim": 8,
}
TILE_ROWS = 512


def tensor(token_ids: Sequence[int], binding: kv.Binding = BINDING) -> np.ndarray:
    """What a causal model would cache: a token's values hang on the tokens up to it, and on nothing else."""
    made = np.empty((binding.layers, 2, binding.kv_heads, len(token_ids), binding.dim), dtype=np.float32)
    state = 0
    for at, token in enumerate(token_ids):
        state = hash((state, int(token))) & 0xFFFFFFFF
        size = made[:, :, :, at].size
        made[:, :, :, at] = np.random.default_rng(state).standard_normal(size).reshape(made[:, :, :, at].shape)
    return made.astype(ml_dtypes.bfloat16 if binding.dtype == "bfloat16" else binding.dtype)


def handle(stack: Stack, name: str = "main", *, write: bool = True) -> SnapshotHandle:
    """A handle on a repository in memory."""
    info = stack.history.writable(name) if write else stack.history.snapshot(name)

    def query(*_: object, **__: object) -> None:
        raise AssertionError("no query here")

    parts = Parts(stack.store, stack.memo, stack.history, stack.ingest, PillowDecoder(), query)
    return SnapshotHandle(parts, info, stack.history.lease())


@pytest.fixture
def stack() -> Iterator[Stack]:
    made = Stack(new_disk())
    yield made
    assert not made.fsck().errors
    made.close()


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


# -- round trips


@settings(max_examples=25)
@given(
    layers=st.integers(1, 3), heads=st.integers(1, 3), dim=st.integers(1, 300), count=st.integers(1, 40),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]), seed=st.integers(0, 2**32 - 1), data=st.data(),
)  # fmt: skip
def test_a_cache_comes_back_bit_for_bit_and_in_part(
    layers: int, heads: int, dim: int, count: int, dtype: str, seed: int, data: st.DataObject
) -> None:
    binding = kv.Binding("m", "t", "p", dtype, layers, heads, dim)
    rng = np.random.default_rng(seed)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    # Any bits at all, NaNs with payloads included.
    whole = rng.integers(0, 256, layers * 2 * heads * count * dim * kind.itemsize, dtype=np.uint8).view(kind)
    whole = whole.reshape(layers, 2, heads, count, dim)
    ids = rng.integers(0, 2**32, count, dtype=np.uint32)
    work = handle(Stack(new_disk()))
    kv.save(work, "c", whole, ids, binding)
    back = kv.load(work, "c", binding)
    assert same(back.tensor, whole) and back.token_ids.tolist() == ids.tolist()
    few = data.draw(st.integers(1, count))
    part = kv.load(work, "c", binding, tokens=few)
    assert same(part.tensor, np.ascontiguousarray(whole[:, :, :, :few]))
    assert part.token_ids.tolist() == ids[:few].tolist()


@pytest.mark.parametrize(("quantise", "most"), [("int8", 1 / 250), ("fp8", 1 / 15), ("fp16", 2**-11)])
def test_quantised_stays_within_a_step_and_takes_less(stack: Stack, quantise: str, most: float) -> None:
    ids = list(range(700))
    whole, work = tensor(ids), handle(stack)
    exact = kv.save(work, "exact", whole, ids, BINDING)
    report = kv.save(work, "c", whole, ids, BINDING, quantise)
    assert report.bytes_stored < exact.bytes_stored * (0.6 if quantise == "fp16" else 0.4)
    back = kv.load(work, "c", BINDING).tensor
    assert back.dtype == np.float32
    assert not same(back, whole)
    # A quantised tile's steps are those of its columns' peaks; the whole's peak bounds them all.
    assert np.abs(back - whole).max() <= most * np.abs(whole).max() * 1.001
    assert same(kv.load(work, "exact", BINDING).tensor, whole)


def test_saved_otherwise_quantised_it_leaves_the_stream_it_was_in(stack: Stack) -> None:
    ids = [5, 6, 7]
    work = handle(stack)
    kv.save(work, "c", tensor(ids), ids, BINDING)
    kv.save(work, "c", tensor(ids), ids, BINDING, "int8")
    assert [frame.stream for frame in work.frames()] == ["kv_int8", "kv_records"]
    kv.save(work, "c", tensor(ids), ids, BINDING)
    assert [frame.stream for frame in work.frames()] == ["kv_cache", "kv_records"]
    assert same(kv.load(work, "c", BINDING).tensor, tensor(ids))


def test_values_that_fit_no_int8_come_back_all_the_same(stack: Stack) -> None:
    ids = list(range(70))
    whole, work = tensor(ids), handle(stack)
    whole[0, 0, 0, 3, 1], whole[1, 1, 0, 4, 0] = np.inf, np.nan
    kv.save(work, "c", whole, ids, BINDING, "int8")
    assert same(kv.load(work, "c", BINDING).tensor, whole)


def test_a_partial_load_reads_only_the_tiles_it_needs(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(3 * TILE_ROWS + 5))
    whole, work = tensor(ids), handle(stack)
    kv.save(work, "c", whole, ids, BINDING)
    read: list[bytes] = []
    plain = stack.store.read_tile
    monkeypatch.setattr(stack.store, "read_tile", lambda blob: (read.append(blob), plain(blob))[1])
    for count, tiles in ((1, 1), (TILE_ROWS, 1), (TILE_ROWS + 1, 2), (3 * TILE_ROWS, 3), (len(ids), 4)):
        read.clear()
        assert same(kv.load(work, "c", BINDING, tokens=count).tensor, np.ascontiguousarray(whole[:, :, :, :count]))
        # One more is the record.
        assert len(read) == tiles + 1


# -- bindings


@pytest.mark.parametrize("field", OTHERS)
def test_another_model_is_refused_by_the_name_of_what_differs(stack: Stack, field: str) -> None:
    work, ids = handle(stack), [1, 2, 3]
    kv.save(work, "c", tensor(ids), ids, BINDING)
    other = msgspec.structs.replace(BINDING, **{field: OTHERS[field]})
    for ask in (
        lambda: kv.load(work, "c", other),
        lambda: kv.load(work, "c", other, tokens=1),
        lambda: kv.longest_prefix(work, ids, other),
    ):
        with pytest.raises(DriftError, match=f"\\({field}: ") as refused:
            ask()
        assert ";" not in refused.value.message, "only what differs is named"
    assert BINDING.digest() != other.digest()


def test_a_search_sees_only_the_caches_of_its_model(stack: Stack) -> None:
    work, ids = handle(stack), [1, 2, 3, 4]
    assert kv.longest_prefix(work, ids, BINDING) is None
    other = msgspec.structs.replace(BINDING, model="other")
    kv.save(work, "theirs", tensor(ids), ids, other)
    kv.save(work, "ours", tensor(ids[:2]), ids[:2], BINDING)
    assert kv.longest_prefix(work, ids, BINDING) == ("ours", 2, "")
    assert kv.longest_prefix(work, ids, other) == ("theirs", 4, "")
    assert [(one.frame, one.tokens, one.binding.model) for one in kv.caches(work)] == [
        ("ours", 2, "blake3:weights"), ("theirs", 4, "other"),
    ]  # fmt: skip


@pytest.mark.parametrize("field", OTHERS)
def test_no_field_of_a_binding_is_empty(field: str) -> None:
    empty = "  " if isinstance(OTHERS[field], str) else 0
    with pytest.raises(UsageError, match=field):
        kv.Binding(**{**BINDING.fields(), field: empty})


def test_a_binding_has_a_limit() -> None:
    with pytest.raises(LimitError):
        msgspec.structs.replace(BINDING, model="x" * 10_000)


# -- what does not fit


@pytest.mark.parametrize(
    "wrong",
    {
        "too few ids": (tensor([1, 2, 3]), [1, 2], ""),
        "no ids": (tensor([1]), [], ""),
        "negative": (tensor([1]), [-1], ""),
        "too large": (tensor([1]), [2**32], ""),
        "far too large": (tensor([1]), [2**70], ""),
        "no integers": (tensor([1]), [0.5], ""),
        "words": (tensor([1]), ["a"], ""),
        "ragged": (tensor([1, 2]), [[1], [1, 2]], ""),
        "another dtype": (tensor([1]).astype(np.float16), [1], ""),
        "no floats": (tensor([1]).astype(np.int8), [1], ""),
        "another shape": (tensor([1])[0], [1], ""),
        "another quantisation": (tensor([1]), [1], "int4"),
    }.values(),
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(stack: Stack, wrong: tuple) -> None:
    whole, ids, quantise = wrong
    work = handle(stack)
    seq = stack.log.head()[0]
    with pytest.raises(UsageError):
        kv.save(work, "c", whole, ids, BINDING, quantise)
    assert stack.log.head()[0] == seq


def test_what_is_not_there_is_said(stack: Stack) -> None:
    work, ids = handle(stack), [1, 2]
    with pytest.raises(NotFoundError, match="no KV cache 'c'"):
        kv.load(work, "c", BINDING)
    kv.save(work, "c", tensor(ids), ids, BINDING)
    for count in (0, 3, -1):
        with pytest.raises(UsageError, match="2 tokens"):
            kv.load(work, "c", BINDING, tokens=count)
    work.seal()
    with pytest.raises(SealedError):
        kv.save(work, "d", tensor(ids), ids, BINDING)


def test_tokens_never_stand_for_tiles_that_were_put_otherwise(stack: Stack) -> None:
    work, ids = handle(stack), [1, 2, 3]
    kv.save(work, "c", tensor(ids), ids, BINDING)
    kv.save(work, "d", tensor(ids[:1]), ids[:1], BINDING)
    assert kv.longest_prefix(work, ids, BINDING) == ("c", 3, "")
    values = np.asarray(work.get("kv_cache", frame="c")) + 1
    work.put("kv_cache", values, frame="c")
    with pytest.raises(ConflictError, match="not those"):
        kv.load(work, "c", BINDING)
    assert kv.longest_prefix(work, ids, BINDING) == ("d", 1, "")
    work.put_array("kv_cache", tensor(ids), frame="c")
    assert same(kv.load(work, "c", BINDING).tensor, tensor(ids)), "the same tiles are the same cache"
    assert kv.longest_prefix(work, ids, BINDING) == ("c", 3, "")
    work.put_array("kv_cache", tensor([9, 9, 9]), frame="c")
    assert kv.longest_prefix(work, ids, BINDING) == ("d", 1, "")
    work.put_many("kv_cache", {(0, 0): None}, frame="c")
    with pytest.raises(ConflictError):
        kv.load(work, "c", BINDING)


@pytest.mark.parametrize("document", [b"", b"\x95\x01", b"{}", msgspec.msgpack.encode([1, {}, "kv_cache", [], b""])])
def test_a_record_that_is_none_is_an_integrity_error(stack: Stack, document: bytes) -> None:
    work = handle(stack)
    kv.save(work, "c", tensor([1]), [1], BINDING)
    work.put("kv_records", document, frame="c")
    for ask in (
        lambda: kv.load(work, "c", BINDING),
        lambda: kv.longest_prefix(work, [1], BINDING),
        lambda: kv.caches(work),
    ):
        with pytest.raises(IntegrityError):
            ask()


def test_a_stream_of_the_users_own_with_that_name_is_kept(stack: Stack) -> None:
    stack.history.declare_stream(StreamSpec("kv_int8"))
    work = handle(stack)
    with pytest.raises(ConflictError):
        kv.save(work, "c", tensor([1]), [1], BINDING, "int8")
    assert work.frames() == []


# -- prefixes


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def oracle(there: dict[str, tuple[tuple[int, ...], str]], asked: Sequence[int]) -> tuple[str, int, str] | None:
    """Compares with each: most tokens, then first by ids, quantisation and name."""
    most = max((shared(ids, asked) for ids, _ in there.values()), default=0)
    if not most:
        return None
    _, quantise, name = min((ids, q, name) for name, (ids, q) in there.items() if shared(ids, asked) == most)
    return name, most, quantise


TOKEN = st.sampled_from([0, 1, 255, 256, 2**31, 2**32 - 1])
ROW = st.lists(TOKEN, min_size=1, max_size=7).map(tuple)
NAME = st.sampled_from(["a", "b", "c", "d", "é", ""])


@settings(max_examples=40)
@given(
    steps=st.lists(st.tuples(NAME, ROW, st.sampled_from(["", "", "int8"])), min_size=1, max_size=12),
    asked=st.lists(st.lists(TOKEN, max_size=9), min_size=1, max_size=6),
    fork=st.integers(0, 12),
)
def test_longest_prefix_is_what_comparing_with_each_would_find(
    steps: list[tuple[str, tuple[int, ...], str]], asked: list[list[int]], fork: int
) -> None:
    stack = Stack(new_disk())
    work, there = handle(stack), {}
    forked = None
    for number, (name, ids, quantise) in enumerate(steps):
        if number == fork:
            stack.history.open_snapshot(parent="main", branch="dev")
            forked = dict(there)
        kv.save(work, name, tensor(ids), ids, BINDING, quantise)
        there[name] = (ids, quantise)
        for row in asked:
            assert kv.longest_prefix(work, row, BINDING) == oracle(there, row)
    if forked is not None:
        dev = handle(stack, "dev", write=False)
        for row in asked:
            assert kv.longest_prefix(dev, row, BINDING) == oracle(forked, row)
    # A process that finds it all at once says the same.
    fresh = handle(Stack(stack.disk.copy()), write=False)
    for row in asked:
        assert kv.longest_prefix(fresh, row, BINDING) == oracle(there, row)


def test_what_a_search_finds_loads(stack: Stack) -> None:
    work, prompt = handle(stack), list(range(900))
    kv.save(work, "chat", tensor(prompt), prompt, BINDING)
    asked = [*prompt[:600], 7, 7]
    found = kv.longest_prefix(work, asked, BINDING)
    assert found == ("chat", 600, "")
    back = kv.load(work, found.frame, BINDING, tokens=found.tokens)
    assert same(back.tensor, tensor(asked)[:, :, :, :600].copy()) and back.token_ids.tolist() == asked[:600]


# -- bytes


def stored(stack: Stack) -> int:
    return stack.store.written_bytes


def test_a_grown_cache_stores_its_last_tile_and_the_new_ones(stack: Stack) -> None:
    work, ids = handle(stack), list(range(2 * TILE_ROWS + 100))
    first = kv.save(work, "c", tensor(ids), ids, BINDING)
    assert (first.tiles_written, first.tiles_reused) == (3, 0)
    again = kv.save(work, "c", tensor(ids), ids, BINDING)
    assert (again.tiles_written, again.tiles_reused) == (0, 3)
    ids += range(TILE_ROWS)
    grown = kv.save(work, "c", tensor(ids), ids, BINDING)
    assert (grown.tiles_written, grown.tiles_reused) == (2, 2)
    assert same(kv.load(work, "c", BINDING).tensor, tensor(ids))


@pytest.mark.parametrize("quantise", ["", "int8", "fp16"])
def test_one_prefix_is_stored_once_over_frames_and_branches(stack: Stack, quantise: str) -> None:
    prompt, size = list(range(4 * TILE_ROWS)), {"": 4, "int8": 1, "fp16": 2}[quantise]
    a_token = BINDING.layers * 2 * BINDING.kv_heads * BINDING.dim * size
    work = handle(stack)
    before = stored(stack)
    kv.save(work, "chat-0", tensor(prompt), prompt, BINDING, quantise)
    whole = stored(stack) - before
    assert whole > 4 * TILE_ROWS * a_token
    stack.history.open_snapshot(parent="main", branch="dev")
    for number, (branch, tail) in enumerate((("main", 1), ("dev", 2), ("dev", 3))):
        ids = prompt + [10_000 + number] * 40 * tail
        before = stored(stack)
        report = kv.save(handle(stack, branch), f"chat-{number + 1}", tensor(ids), ids, BINDING, quantise)
        assert (report.tiles_written, report.tiles_reused) == (1, 4)
        # Its own tail, the ids as they are, one page of each frame and the directory.
        assert stored(stack) - before < 40 * tail * a_token + len(ids) * 4 + 16_384 + (4 * 32 if quantise else 0)
        assert stored(stack) - before < whole / 2
    # A prefix that ends within a tile shares the tiles before that one.
    ids = [*prompt[: 2 * TILE_ROWS + 1], 77]
    report = kv.save(handle(stack, "dev"), "short", tensor(ids), ids, BINDING, quantise)
    assert (report.tiles_written, report.tiles_reused) == (1, 2)


# -- all or nothing


def run(stack: Stack, ids: list[int], quantise: str = "") -> None:
    kv.save(handle(stack), "c", tensor(ids), ids, BINDING, quantise)


@pytest.mark.parametrize("mode", ["refuse", "partial", "power", "power-after"])
def test_a_save_that_dies_leaves_the_cache_before_or_after(mode: str) -> None:
    """At every changing operation of a save over a cache that was there, and between quantisations."""
    old, new = list(range(30)), [*range(20), *range(90, 140)]
    base = Stack(new_disk())
    run(base, old)
    ready = base.disk.copy()
    counted = ready.copy()
    counted.faults = Faults()
    run(Stack(counted), new, "int8")
    total = counted.faults.count
    assert total > 5
    outcomes = set()
    for at in range(1, total + 1):
        disk: MemDisk = ready.copy()
        disk.faults = Faults(at, mode)
        done = False
        try:
            run(Stack(disk, rng=FakeRng(1), clock=FakeClock()), new, "int8")
            done = True
        except (HimError, PowerLoss):
            pass
        for left in (disk.copy(), disk.after_power_loss(lambda: "none"), disk.after_power_loss(lambda: "half")):
            after = Stack(left)
            assert not after.fsck().errors
            work = handle(after, write=False)
            found = kv.longest_prefix(work, new, BINDING)
            assert found in (("c", 20, ""), ("c", 70, "int8"))
            there, quantise = (old, "") if found.tokens == 20 else (new, "int8")
            back = kv.load(work, "c", BINDING)
            assert back.token_ids.tolist() == there
            assert np.abs(back.tensor - tensor(there)).max() <= (0.02 if quantise else 0)
            assert {frame.stream for frame in work.frames()} == {f"kv_{quantise or 'cache'}", "kv_records"}
            assert not done or found.tokens == 70, "what was acknowledged is there"
            outcomes.add(found.tokens)
            after.close()
    assert outcomes == {20, 70}


def test_a_flipped_bit_is_never_a_cache(tmp_path: Path) -> None:
    ids = list(range(600))
    with him.open(tmp_path / "m", create=True, reader=FakeReader(), encoder=FakeEncoder()) as repo:
        kv.save(repo.writable("main"), "c", tensor(ids), ids, BINDING)
    (pack,) = tmp_path.glob("m/packs/*.pack")
    whole = pack.read_bytes()
    at = whole.find(np.arange(600, dtype=">u4").tobytes()[100:140])
    for place in (len(whole) // 3, at) if at > 0 else (len(whole) // 3,):
        pack.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with (
            him.open(tmp_path / "m", reader=FakeReader(), encoder=FakeEncoder()) as repo,
            pytest.raises(IntegrityError),
        ):
            kv.load(repo.snapshot("main"), "c", BINDING)


def test_kv_is_public() -> None:
    assert him.kv is kv
    assert "kv" in dir(him)
