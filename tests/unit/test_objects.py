"""The cold store's URLs, and a folder that serves as a bucket: whole, durable, tidy after a crash."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from him.adapters.folder import ObjectFolder
from him.adapters.objects import ObjectBucket, open_store
from him.errors import HimError, StorageError, UnavailableError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> ObjectFolder:
    return ObjectFolder(tmp_path / "cold")


# URLs.


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_a_path_is_a_folder(tmp_path: Path, form: str) -> None:
    store = open_store(form.format(tmp_path / "with space").replace(" ", "%20" if "file" in form else " "))
    assert isinstance(store, ObjectFolder)
    assert (tmp_path / "with space").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gs://bucket",
        "http://127.0.0.1/bucket",
        "file://elsewhere/folder",
        "s3://",
        "s3://Bucket",
        "s3://bucket/../x",
        "s3://bucket?colour=red",
        "s3://bucket?path_style=maybe",
        "s3://bucket?endpoint=ftp://127.0.0.1",
        "s3://bucket?endpoint=https://",
        "s3://bucket?endpoint=http://[::1",
        "s3://bucket?endpoint=http://127.0.0.1:99999",
        "s3://bucket?endpoint=http://storage.example",
        "s3://bucket?endpoint=http://127.0.0.1.example",
        "s3://[bucket",
    ],
)
def test_a_url_that_names_no_store_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    # What the library itself would take for leave.
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with pytest.raises(UsageError):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAXX:hush@bucket",
        "s3://bucket?access_key_id=AKIAXX",
        "s3://bucket?Secret=hush",
        "s3://bucket?aws_session_token=hush",
        "s3://bucket?endpoint=https://AKIAXX:hush@storage.example",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    with pytest.raises(UsageError, match="holds credentials") as caught:
        open_store(url)
    assert "AKIAXX" not in caught.value.line()
    assert "hush" not in caught.value.line()
    assert "AWS_ACCESS_KEY_ID" in caught.value.fix


def test_the_environment_holds_credentials_and_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="no credentials") as caught:
        open_store("s3://bucket")
    assert "AWS_ACCESS_KEY_ID" in caught.value.fix
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    assert isinstance(open_store("s3://bucket/a/b/?region=eu-north-1&path_style=false"), ObjectBucket)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.example")
    with pytest.raises(UsageError, match="could be read on the way"):
        open_store("s3://bucket")
    assert isinstance(open_store("s3://bucket?endpoint=http://[::1]:1"), ObjectBucket)


# The folder.


def test_an_object_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_call_returns(
    folder: ObjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of system calls is the contract here: nothing else tells a cache from a disk."""
    done: list[tuple[str, str]] = []
    real_sync, real_replace, real_link = os.fsync, os.replace, os.link

    def sync(descriptor: int) -> None:
        done.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        done.append(("name", str(target)))
        real_replace(source, target)

    def link(source: Path, target: Path) -> None:
        done.append(("name", str(target)))
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "link", link)
    root = tmp_path / "cold"
    for if_absent in (False, True):
        done.clear()
        target = f"a{if_absent}/b/c"
        folder.put(target, b"x", if_absent=if_absent)
        content, *made, named, last = done
        assert content[0] == "sync"
        assert Path(content[1]).parent == root / ".new"
        assert made == [("sync", str(root)), ("sync", str(root / target.split("/")[0]))]
        assert named == ("name", str(root / target))
        assert last == ("sync", str((root / target).parent))
    done.clear()
    folder.delete(["aTrue/b/c"])
    assert done == [("sync", str(root / "aTrue/b"))]


def test_what_a_killed_writer_left_is_removed_but_not_what_is_being_written(
    folder: ObjectFolder, tmp_path: Path
) -> None:
    new = tmp_path / "cold" / ".new"

    def parts() -> Iterator[bytes]:
        yield b"first"
        code = (
            "import os, sys; from pathlib import Path; from him.adapters.folder import ObjectFolder\n"
            "def parts():\n  yield b'half'\n  os.kill(os.getpid(), 9)\n"
            "ObjectFolder(Path(sys.argv[1])).upload('dead', parts())"
        )
        died = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cold")], check=False)
        assert died.returncode == -9
        assert sorted(file.read_bytes() for file in new.iterdir()) == [b"first", b"half"]
        ObjectFolder(tmp_path / "cold").put("other", b"")
        assert [file.read_bytes() for file in new.iterdir()] == [b"first"]
        yield b" and last"

    folder.upload("alive", parts())
    assert list(new.iterdir()) == []
    assert folder.get("alive", 99) == b"first and last"
    assert [name for name, _ in folder.list("")] == ["alive", "other"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageError),
        (errno.EDQUOT, StorageError),
        (errno.EACCES, StorageError),
        (errno.EROFS, StorageError),
        (errno.EIO, UnavailableError),
        (errno.ESTALE, UnavailableError),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "link", "open"])
def test_what_the_system_refuses_is_typed_and_leaves_nothing(
    folder: ObjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[HimError]
) -> None:
    folder.put("was", b"here")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os, call, refuse)
        with pytest.raises(HimError) as caught:
            folder.put("x", b"data", if_absent=True)
        assert type(caught.value) is kind
        if call == "open":
            with pytest.raises(kind):
                folder.get("was", 4)
    assert list((tmp_path / "cold" / ".new").iterdir()) == []
    assert [name for name, _ in folder.list("")] == ["was"]


def test_a_folder_that_went_away_is_unavailable_not_empty(folder: ObjectFolder, tmp_path: Path) -> None:
    folder.put("a/b", b"1")
    (tmp_path / "cold").rename(tmp_path / "unmounted")
    for call in (
        lambda: folder.size("a/b"),
        lambda: folder.get("a/b", 1),
        lambda: folder.get_ranges("a/b", [(0, 1)]),
        lambda: folder.put("a/c", b""),
        lambda: list(folder.list("")),
        lambda: folder.delete(["a/b"]),
    ):
        with pytest.raises(UnavailableError, match="not there"):
            call()
    (tmp_path / "unmounted").rename(tmp_path / "cold")
    assert folder.get("a/b", 1) == b"1"


def test_a_folder_below_a_missing_one_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be made"):
        open_store(str(tmp_path / "not mounted" / "cold"))
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "cold"):
        with pytest.raises(StorageError):
            open_store(str(path))


def test_an_object_stands_where_a_folder_is_needed(folder: ObjectFolder) -> None:
    folder.put("a", b"1")
    with pytest.raises(StorageError):
        folder.put("a/b", b"2")
    assert folder.size("a/b") is None


def test_nothing_that_is_no_file_is_an_object(folder: ObjectFolder, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cold" / "pipe")
    (tmp_path / "cold" / "link").symlink_to("/etc/passwd")
    (tmp_path / "cold" / "no name").touch()
    assert list(folder.list("")) == []
    assert folder.size("pipe") is None
    with pytest.raises(HimError):
        folder.get("link", 10_000)
