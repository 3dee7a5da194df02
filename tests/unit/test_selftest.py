"""Every primitive that correctness hangs on, broken once: the self-test says so before anything is touched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import him
from him import selftest
from him.adapters.sqlite import wal_fault
from him.errors import IntegrityError, MissingPartError
from him.tile import codec


def test_all_known_answers_are_given() -> None:
    assert list(selftest.failures()) == []
    assert list(selftest.failures(selftest.LONG)) == []
    assert all(known for _, _, known in (*selftest.QUICK, *selftest.LONG))
    assert len(selftest.QUICK) >= 15


class Hash:
    """Another digest than BLAKE3."""

    def __init__(self, data: bytes = b"", key: bytes = b"") -> None:
        self._data = bytes(data)

    def update(self, data: bytes) -> None:
        self._data += bytes(data)

    def digest(self) -> bytes:
        return bytes(32)


def raising(*_: object, **__: object) -> None:
    raise IntegrityError("it does not decode")


BROKEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "blake3": ("him.selftest.blake3", lambda _: Hash),
    "blake3 with a key": ("him.selftest.blake3", lambda real: lambda data, key=None: real(data)),
    "blob_id": ("him.tile.address.blake3", lambda _: Hash),
    "zstd": ("him.tile.codec.decompress", lambda _: raising),
    "byte shuffle": ("him.tile.codec._unshuffled", lambda _: lambda planes, _itemsize: planes),
    "delta of blocks": ("him.tile.delta._with_blocks", lambda _: lambda _grid, old, _stored, owned: old),
    "delta by XOR": ("him.tile.delta._with_xor", lambda _: lambda _grid, old, _stored, owned: old),
    "delta by patch": ("him.tile.delta._patched", lambda _: lambda _grid, old, _stored: old),
    "levels by mean": ("him.tile.downsample.cv2.resize", lambda _: raising),
    "int8 quantisation": ("him.tile.codec.np.rint", lambda _: np.floor),
    "fp8 quantisation": ("him.tile.codec._FP8_VALUES", lambda real: real * np.float32(2)),
    "int8 dot product": ("him.index.vector.np.einsum", lambda real: lambda *given: real(*given).astype(np.int8)),
    "messages": ("him.selftest.msgspec.msgpack.encode", lambda _: lambda _value: b"\xc0"),
    "byte order": (
        "him.selftest.struct.pack",
        lambda real: lambda form, *values: real(form.replace("<", ">"), *values),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_primitive_is_caught_before_anything_is_touched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, make = BROKEN[name]
    monkeypatch.setattr(selftest._Once, "passed", False)
    with monkeypatch.context() as patch:
        patch.setattr(target, make(_real(target)))
        said = list(selftest.failures())
        assert any(one.startswith(name) for one in said), said
        with pytest.raises(MissingPartError, match="nothing was touched"):
            him.open(tmp_path / "memory", create=True)
    assert not (tmp_path / "memory").exists()
    with him.open(tmp_path / "memory", create=True) as repo:
        repo.writable("main").put("skills", b"x", frame="f")
    assert selftest._Once.passed


def _real(target: str) -> Any:
    """What a dotted name stands for."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = __import__(".".join(parts[:cut]), fromlist=["_"])
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(target)


def test_it_runs_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with him.open(tmp_path / "memory", create=True):
        pass
    monkeypatch.setattr(selftest, "failures", lambda: pytest.fail("it ran again"))
    with him.open(tmp_path / "memory"):
        pass


def test_the_doctor_asks_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with him.open(tmp_path / "memory", create=True) as repo:
        told = {check["check"]: check for check in repo.doctor()}
        assert told["self-test"]["ok"] and told["sqlite"]["ok"]
        monkeypatch.setattr(codec, "DTYPES", {**codec.DTYPES, "float8_e4m3fn": codec.DTYPES["float8_e5m2"]})
        told = {check["check"]: check for check in repo.doctor()}
        assert not told["self-test"]["ok"] and "fp8" in str(told["self-test"]["detail"])
    assert "SQLite fails" in wal_fault(tmp_path / "memory" / "him.json" / "probe")
    assert list((tmp_path / "memory" / "cache").glob("doctor*")) == []
