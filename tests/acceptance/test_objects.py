"""The cold tier's store keeps one contract in a folder and in a real bucket, and over whatever lies between."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.s3 import ACCESS_KEY, SECRET_KEY, FaultProxy, S3Server
from him.adapters import objects
from him.adapters.objects import ObjectBucket, open_store
from him.config import COLD_FLIGHT_MAX, COLD_PART_BYTES, COLD_RETRIES_MAX
from him.errors import HimError, LimitError, NotFoundError, StorageError, UnavailableError, UsageError
from him.ports import ObjectStore

GRAIN = 256 * 1024


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "cold"))
    request.getfixturevalue("s3_keys")
    server: S3Server = request.getfixturevalue("s3_server")
    return open_store(server.url(tmp_path.name))


@pytest.fixture
def far(s3_proxy: FaultProxy, s3_server: S3Server, tmp_path: Path) -> ObjectStore:
    """The bucket behind the proxy."""
    return open_store(s3_server.url(tmp_path.name, port=s3_proxy.port))


def impatient(port: int, prefix: str = "impatient", retries: int = 1) -> ObjectBucket:
    return ObjectBucket("him", prefix, endpoint=f"http://127.0.0.1:{port}", retries=retries)


def noise(size: int, seed: int = 0) -> bytes:
    return b"".join((i * 2654435761 + seed & 0xFFFFFFFF).to_bytes(4, "little") for i in range((size + 3) // 4))[:size]


# The contract, in both.


def test_what_was_put_comes_back(store: ObjectStore) -> None:
    assert store.size("packs/a.pack") is None
    assert store.put("packs/a.pack", b"one")
    assert store.put("packs/a.pack", b"other")
    assert store.get("packs/a.pack", 5) == b"other"
    assert store.size("packs/a.pack") == 5
    with pytest.raises(LimitError):
        store.get("packs/a.pack", 4)
    with pytest.raises(NotFoundError):
        store.get("packs/b.pack", 4)
    assert store.size("packs") is None
    with pytest.raises(NotFoundError):
        store.get("packs", 4)


def test_ranges_come_in_the_order_asked_for(store: ObjectStore) -> None:
    data = noise(20 * GRAIN + 7)
    store.put("p", data)
    ranges = [(i * GRAIN, GRAIN) for i in (3, 19, 0, 7)] + [(20 * GRAIN, 7), (5, 0), (5, 1), (5, 1), (len(data), 0)]
    parts = store.get_ranges("p", ranges)
    assert [bytes(part) for part in parts] == [data[at : at + size] for at, size in ranges]
    assert store.get_ranges("p", []) == []


@pytest.mark.parametrize("bad", [(0, 11), (9, 2), (10, 1), (11, 1), (2**40, 1)])
def test_a_range_past_the_end_is_not_found(store: ObjectStore, bad: tuple[int, int]) -> None:
    store.put("p", b"0123456789")
    for ranges in ([bad], [(0, 10), bad, (0, 1)]):
        with pytest.raises(NotFoundError):
            store.get_ranges("p", ranges)
    with pytest.raises(NotFoundError):
        store.get_ranges("q", [(0, 1)])


def test_an_empty_object_is_one(store: ObjectStore) -> None:
    assert store.put("e", b"", if_absent=True)
    assert not store.put("e", b"more", if_absent=True)
    store.upload("f", [])
    for name in "ef":
        assert (store.size(name), store.get(name, 0)) == (0, b"")
        with pytest.raises(NotFoundError):
            store.get_ranges(name, [(0, 1)])


def test_a_large_object_is_whole_or_not_there(store: ObjectStore) -> None:
    data = noise(2 * COLD_PART_BYTES + 12_345)
    seen: list[int | None] = []

    def parts(wrong: Exception | None = None) -> Iterator[bytes | memoryview]:
        view = memoryview(data)
        for at in range(0, len(data), 999_999):
            yield view[at : at + 999_999] if at % 2 else data[at : at + 999_999]
            seen.append(store.size("p"))
        if wrong:
            raise wrong

    class OwnError(OSError):
        pass

    with pytest.raises(OwnError):
        store.upload("p", parts(OwnError("mine")))
    assert store.size("p") is None
    with pytest.raises(StorageError, match="mine"):
        store.upload("p", parts(StorageError("mine")))
    store.upload("p", parts())
    assert set(seen) == {None}
    assert store.get("p", len(data)) == data
    store.upload("p", [b"short"])
    assert store.get("p", 5) == b"short"


def test_one_of_many_who_put_if_absent_wins(store: ObjectStore) -> None:
    names = [f"commits/{number}" for number in range(20)]

    def write(writer: int) -> list[bool]:
        return [store.put(name, b"%d" % writer, if_absent=True) for name in names]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    for number, name in enumerate(names):
        winners = [writer for writer in range(8) if won[writer][number]]
        assert len(winners) == 1
        assert store.get(name, 1) == b"%d" % winners[0]


def test_the_list_is_sorted_and_begins_with_the_prefix(store: ObjectStore) -> None:
    for name in ("a/b", "a-b", "a/c/d", "ab", "a/b2", "b", "Z"):
        store.put(name, name.encode())
    assert list(store.list("")) == [(n, len(n)) for n in ("Z", "a-b", "a/b", "a/b2", "a/c/d", "ab", "b")]
    assert [name for name, _ in store.list("a")] == ["a-b", "a/b", "a/b2", "a/c/d", "ab"]
    assert [name for name, _ in store.list("a/b")] == ["a/b", "a/b2"]
    assert [name for name, _ in store.list("a/")] == ["a/b", "a/b2", "a/c/d"]
    assert list(store.list("none/")) == []


def test_what_is_not_there_counts_as_removed(store: ObjectStore) -> None:
    store.put("a/b", b"")
    store.put("a/c", b"")
    store.delete(["a/b", "nothing", "a/b/below", "a/b"])
    store.delete(["a/b"])
    store.delete([])
    assert [name for name, _ in store.list("")] == ["a/c"]


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "../a", "a/../b", ".new/x", "a/.b", "a b", "ü", "a\n", "x" * 600]
)
def test_a_name_not_every_store_can_hold_is_refused(store: ObjectStore, name: str) -> None:
    for call in (
        lambda: store.put(name, b""),
        lambda: store.upload(name, []),
        lambda: store.get(name, 1),
        lambda: store.get_ranges(name, [(0, 0)]),
        lambda: store.delete([name]),
        lambda: store.size(name),
    ):
        with pytest.raises(UsageError):
            call()


# What lies between.


def test_no_request_fails_where_three_of_ten_are_refused(s3_proxy: FaultProxy, far: ObjectStore) -> None:
    s3_proxy.faults.refused_share = 0.3
    for number in range(10):
        far.put(f"a{number}", b"%d" % number)
    for number in range(10):
        assert far.get(f"a{number}", 9) == b"%d" % number
        assert far.size(f"a{number}") == 1
    assert [bytes(part) for part in far.get_ranges("a7", [(0, 1)] * 10)] == [b"7"] * 10
    far.upload("large", [noise(COLD_PART_BYTES)] * 2)
    assert len(list(far.list(""))) == 11
    far.delete([f"a{number}" for number in range(10)])
    assert list(far.list("a")) == []
    assert s3_proxy.counts.refused > 5


def test_a_refused_conditional_put_is_retried_and_never_answers_wrongly(s3_proxy: FaultProxy, far: ObjectStore) -> None:
    s3_proxy.faults.refused_share = 0.3
    assert all(far.put(f"k{number}", b"mine", if_absent=True) for number in range(20))
    taken = 0
    for number in range(20):
        try:
            assert not far.put(f"k{number}", b"other", if_absent=True)
            taken += 1
        except UnavailableError as error:
            assert "remains open" in error.message
    assert taken > 5
    assert s3_proxy.counts.refused > 5


def test_a_lost_reply_of_a_conditional_put_leaves_it_open(s3_proxy: FaultProxy, far: ObjectStore) -> None:
    s3_proxy.faults.lost_replies = 1
    with pytest.raises(UnavailableError, match="remains open"):
        far.put("head", b"mine", if_absent=True)
    assert s3_proxy.counts.lost == 1
    assert far.get("head", 4) == b"mine"
    assert not far.put("head", b"other", if_absent=True)


@pytest.mark.parametrize("method", ["POST", "PUT", "GET", "HEAD"])
def test_a_lost_reply_of_anything_else_is_asked_for_again_or_unavailable(
    s3_proxy: FaultProxy, far: ObjectStore, method: str
) -> None:
    data = noise(GRAIN)
    s3_proxy.faults.lost_method, s3_proxy.faults.lost_replies = method, 1
    far.put("p", data)
    assert far.size("p") == len(data)
    assert far.get("p", len(data)) == data
    far.upload("u", [data])
    assert far.get("u", len(data)) == data
    assert s3_proxy.counts.lost == 1


def test_a_lost_reply_of_an_uploads_end_is_unavailable_and_the_upload_can_be_repeated(
    s3_proxy: FaultProxy, far: ObjectStore
) -> None:
    data = noise(GRAIN)

    def parts() -> Iterator[bytes]:
        yield data
        s3_proxy.faults.lost_method, s3_proxy.faults.lost_replies = "POST", 1

    try:
        far.upload("u", parts())
    except UnavailableError:
        far.upload("u", [data])
    assert s3_proxy.counts.lost == 1
    assert far.get("u", len(data)) == data


def test_a_reply_that_ends_in_the_middle_is_never_taken_for_whole(s3_proxy: FaultProxy, far: ObjectStore) -> None:
    data = noise(8 * GRAIN)
    far.put("p", data)
    ranges = [(at, GRAIN) for at in range(0, len(data), GRAIN)]
    for call in (lambda: far.get("p", len(data)), lambda: b"".join(far.get_ranges("p", ranges))):
        s3_proxy.faults.cut_bodies = 3
        try:
            assert call() == data
        except UnavailableError:
            s3_proxy.faults.cut_bodies = 0
            assert call() == data


def test_a_request_is_tried_a_bounded_number_of_times(
    s3_proxy: FaultProxy, s3_server: S3Server, tmp_path: Path
) -> None:
    far = impatient(s3_proxy.port, tmp_path.name, retries=2)
    s3_proxy.faults.refused_share = 1
    calls: list[Callable[[], object]] = [
        lambda: far.size("p"),
        lambda: far.get("p", 1),
        lambda: far.get_ranges("p", [(0, 1)]),
        lambda: far.put("p", b""),
        lambda: far.put("p", b"", if_absent=True),
        lambda: far.upload("p", [b"1"]),
        lambda: list(far.list("")),
        lambda: far.delete(["p"]),
    ]
    for number, call in enumerate(calls, 1):
        with pytest.raises(UnavailableError, match="503"):
            call()
        assert s3_proxy.counts.requests == 3 * number
    s3_proxy.counts.requests = 0
    with pytest.raises(UnavailableError):
        far.get_ranges("p", [(0, 1)] * 200)
    with pytest.raises(UnavailableError):
        far.get_ranges("p", [(0, 1)] * 2)  # Waits its turn.
    assert s3_proxy.counts.requests < 200, "a call that failed begins nothing any more"
    s3_proxy.refuse()
    for call in calls:
        with pytest.raises(UnavailableError):
            call()
    s3_proxy.reset()
    assert far.put("p", b"", if_absent=True)


@pytest.mark.slow
def test_the_default_store_gives_up_too(s3_proxy: FaultProxy, far: ObjectStore) -> None:
    s3_proxy.faults.refused_share = 1
    for call in (lambda: far.get("p", 1), lambda: far.put("p", b"", if_absent=True)):
        s3_proxy.counts.requests = 0
        with pytest.raises(UnavailableError):
            call()
        assert 1 < s3_proxy.counts.requests <= 1 + COLD_RETRIES_MAX


def test_a_server_that_never_answers_is_unavailable(s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "COLD_REQUEST_SECONDS", 0.2)
    far = impatient(s3_proxy.port)
    s3_proxy.faults.silent = True
    for call in (lambda: far.get("p", 1), lambda: far.put("p", b""), lambda: far.put("p", b"", if_absent=True)):
        with pytest.raises(UnavailableError):
            call()
    s3_proxy.refuse()


def test_a_killed_server_is_unavailable_and_serves_again_when_it_is_back(
    s3_server: S3Server, s3_keys: None, tmp_path: Path
) -> None:
    near = impatient(s3_server.port, tmp_path.name)
    near.put("p", b"kept")
    s3_server.kill()
    try:
        with pytest.raises(UnavailableError):
            near.get("p", 4)
        with pytest.raises(UnavailableError):
            near.put("q", b"", if_absent=True)
    finally:
        s3_server.start()
    assert near.get("p", 4) == b"kept"
    assert near.put("q", b"", if_absent=True)


def test_ranges_are_bounded_in_flight_and_one_get_each(s3_proxy: FaultProxy, far: ObjectStore) -> None:
    data = noise(4 * COLD_FLIGHT_MAX)
    far.put("p", data)
    s3_proxy.faults.latency_ms = 20
    s3_proxy.counts.gets = s3_proxy.counts.bytes_down = 0
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(far.get_ranges, "p", [(at, 1) for at in range(len(data))]) for _ in range(2)]
        assert [b"".join(one.result()) for one in both] == [data] * 2
    assert s3_proxy.counts.gets == s3_proxy.counts.bytes_down == 2 * len(data)
    assert 1 < s3_proxy.counts.in_flight_max <= COLD_FLIGHT_MAX


def test_a_refusal_names_the_fix_and_no_key(
    s3_server: S3Server, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failure(url: str) -> HimError:
        with pytest.raises(StorageError) as caught:
            open_store(url).put("p", b"")
        assert not isinstance(caught.value, UnavailableError)
        assert caught.value.__suppress_context__
        return caught.value

    assert "make the bucket" in failure(s3_server.url().replace("s3://him/", "s3://nobody/")).fix
    with pytest.raises(StorageError, match="NoSuchBucket"):
        open_store(s3_server.url().replace("s3://him/", "s3://nobody/")).get("p", 1)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    said = json.dumps(failure(s3_server.url()).as_dict())
    assert "AWS_SECRET_ACCESS_KEY" in said
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong-identity")
    said += json.dumps(failure(s3_server.url()).as_dict())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    s3_proxy.faults.refused_share = 1
    for status in (400, 401, 403, 409, 500):
        s3_proxy.faults.status = status
        with pytest.raises(StorageError) as caught:
            impatient(s3_proxy.port).put("p", b"")
        said += json.dumps(caught.value.as_dict())
    assert not [key for key in ("wrong-", SECRET_KEY, ACCESS_KEY) if key in said]


def test_what_is_uploaded_has_the_storage_class_and_small_objects_have_not(
    s3_server: S3Server, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    url = s3_server.url(tmp_path.name, port=s3_proxy.port)
    far = open_store(url, "STANDARD_IA")
    far.put("log/0", b"small")
    far.put("owner", b"small", if_absent=True)
    assert s3_proxy.counts.storage_classes == []
    far.upload("packs/a", [noise(GRAIN)])
    assert s3_proxy.counts.storage_classes == ["STANDARD_IA"]
    assert far.get("packs/a", GRAIN) == noise(GRAIN)
    open_store(url).upload("packs/b", [b"1"])
    assert s3_proxy.counts.storage_classes == ["STANDARD_IA"]


@pytest.mark.parametrize("name", ["GLACIER", "DEEP_ARCHIVE", "standard_ia", "x\r\ny: z"])
def test_a_class_that_cannot_be_read_at_once_is_refused(s3_server: S3Server, s3_keys: None, name: str) -> None:
    with pytest.raises(UsageError, match="read at once") as refused:
        open_store(s3_server.url(), name)
    assert "GLACIER_IR" in refused.value.fix
    with pytest.raises(UsageError, match="folder"):
        open_store("/tmp", name)
