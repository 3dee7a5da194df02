"""What `him doctor` looks at: whether this machine and this installation can keep HIM's promises."""

import os
import platform
import sys
from pathlib import Path
from typing import Final

import numpy as np

from him.errors import HimError
from him.ports import Clock, Disk, TextEncoder, TextReader

_PROBE: Final = "cache/doctor.probe"
_SYNCS: Final = 20
_SLOW_SYNC_MS: Final = 20.0
_FREE_BYTES_LEAST: Final = 1024**3
_PYTHON_LEAST: Final = (3, 11)

Check = dict[str, object]


def examine(root: Path, disk: Disk, clock: Clock, encoder: TextEncoder, reader: TextReader) -> list[Check]:
    """All checks, each {"check", "ok", "detail", "fix"}; none changes the repository."""
    return [_python(), _space(root), *_file_system(disk, clock), _clock(clock), _text_model(encoder), _reader(reader)]


def _check(name: str, ok: bool, detail: str, fix: str = "") -> Check:
    return {"check": name, "ok": ok, "detail": detail, "fix": "" if ok else fix}


def _python() -> Check:
    return _check(
        "python", sys.version_info >= _PYTHON_LEAST, platform.python_version(), "install Python 3.11 or newer"
    )


def _space(root: Path) -> Check:
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    return _check("free space", free >= _FREE_BYTES_LEAST, f"{free // 2**20} MiB free", "free at least 1 GiB")


def _file_system(disk: Disk, clock: Clock) -> list[Check]:
    """Locks exclude, and a durable write takes a bearable time."""
    try:
        first, second = disk.open(_PROBE, create=True), disk.open(_PROBE)
    except HimError as error:
        return [_check("writable", False, error.message, error.fix)]
    try:
        excluded = first.lock(wait=False) and not second.lock(wait=False)
        took: list[float] = []
        for number in range(_SYNCS):
            began = clock.monotonic_ns()
            first.write_at(number * 512, bytes(512))
            first.sync()
            took.append((clock.monotonic_ns() - began) / 1e6)
    except HimError as error:
        return [_check("writable", False, error.message, error.fix)]
    finally:
        first.close()
        second.close()
        disk.remove(_PROBE)
    middle = sorted(took)[_SYNCS // 2]
    return [
        _check("writable", True, "files can be made and removed"),
        _check(
            "locks", excluded, "an exclusive lock excludes", "use a local file system: locks do not hold on this one"
        ),
        _check("fsync", middle <= _SLOW_SYNC_MS, f"{middle:.2f} ms in the middle of {_SYNCS}", "use a faster disk"),
    ]


def _clock(clock: Clock) -> Check:
    first, second = clock.monotonic_ns(), clock.monotonic_ns()
    return _check("clock", second >= first and clock.now_ns() > 0, "runs forward", "mend the system clock")


def _text_model(encoder: TextEncoder) -> Check:
    try:
        vector = encoder.encode(["Submit"])[0]
        return _check("text model", bool(np.any(vector)), f"pin {encoder.pin()[:12]}", "install him again")
    except HimError as error:
        return _check("text model", False, error.message, error.fix)


def _reader(reader: TextReader) -> Check:
    try:
        reader.detect(np.full((64, 64, 3), 255, dtype=np.uint8))
        return _check("text reader", True, f"pin {reader.pin()[:12]}")
    except HimError as error:
        return _check("text reader", False, error.message, error.fix)
