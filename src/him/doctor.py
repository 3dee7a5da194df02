"""What `him doctor` looks at: whether this machine and this installation can keep HIM's promises."""

import os
import platform
import sys
from pathlib import Path
from typing import Final

import numpy as np

from him.errors import HimError
from him.ports import Clock, Disk, TextEncoder, TextReader
from him.selftest import LONG, QUICK, failures

_PROBE: Final = "cache/doctor.probe"
_SYNCS: Final = 20
_SLOW_SYNC_MS: Final = 20.0
_FREE_BYTES_LEAST: Final = 1024**3
_HOLE_BYTES: Final = 1024 * 1024
_ADVICE: Final = {
    "zfs": "set recordsize=1M and compression=zstd",
    "btrfs": "mount with compress=zstd:6; freed ranges may not give room back",
}
"""Spec §1.3."""
_PYTHON_LEAST: Final = (3, 11)

Check = dict[str, object]


def examine(root: Path, disk: Disk, clock: Clock, encoder: TextEncoder, reader: TextReader) -> list[Check]:
    """All checks, each {"check", "ok", "detail", "fix"}; none changes the repository."""
    return [
        _python(), _space(root), *_file_system(disk, clock), _holes(root, disk), _clock(clock), _text_model(encoder),
        _reader(reader), _known_answers(),
    ]  # fmt: skip


def _check(name: str, ok: bool, detail: str, fix: str = "") -> Check:
    return {"check": name, "ok": ok, "detail": detail, "fix": "" if ok else fix}


def sqlite(fault: str | None) -> Check:
    """What trying SQLite's write-ahead log on this disk came to; None: nothing can be written here."""
    detail = fault or ("not tried: the repository is read-only" if fault is None else "a write-ahead log works")
    return _check("sqlite", not fault, detail, "keep the repository on a local file system")


def _known_answers() -> Check:
    """The self-test, with its longer set (design/013)."""
    wrong = [*failures(), *failures(LONG)]
    count = len(QUICK) + len(LONG)
    return _check("self-test", not wrong, "; ".join(wrong) or f"{count} known answers", "install him again")


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


def _holes(root: Path, disk: Disk) -> Check:
    """Whether freeing a range gives room back, which a warm budget needs; and how the file system is best set."""
    kind = _file_system_of(root)
    advice = _ADVICE.get(kind, "")
    try:
        probe = disk.open(_PROBE, create=True)
        try:
            probe.write_at(0, b"\x5a" * _HOLE_BYTES)
            probe.sync()
            full = probe.allocated()
            freed = probe.punch(0, _HOLE_BYTES // 2) and full - probe.allocated() >= _HOLE_BYTES // 2
            # What the system says it keeps has been seen to be untrue on btrfs.
            known = kind != "btrfs"
        finally:
            probe.close()
            disk.remove(_PROBE)
    except HimError as error:
        return _check("holes", False, error.message, error.fix)
    detail = f"{kind}: a freed range {'gives' if freed and known else 'may not give'} its room back"
    # Without a cold tier nothing is ever freed.
    needed = (root / "tier.json").exists()
    return _check(
        "holes", (freed and known) or not needed, f"{detail}; {advice}" if advice else detail,
        "keep repositories with a cold tier on ext4 or XFS" + (f"; {advice}" if advice else ""),
    )  # fmt: skip


def _file_system_of(root: Path) -> str:
    """The kind of file system a folder is on, by the longest mount point above it; "unknown" where nobody says."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text("utf-8", "replace").splitlines()]
    except OSError:
        return "unknown"
    here = str(root.resolve())
    above = [
        (point, kind) for _, point, kind, *_ in mounts if here == point or here.startswith(point.rstrip("/") + "/")
    ]
    return max(above, key=lambda one: len(one[0]), default=("", "unknown"))[1]


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
