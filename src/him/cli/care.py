"""`him fsck` and `him doctor`: is what is stored sound, and is this machine fit for it."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated, Final

import typer

import him
from him.cli.commands import JsonOption, RepoOption, command
from him.cli.failure import EXIT_CHECK_FAILED
from him.cli.place import find_repository
from him.cli.session import Session, objects, session_of
from him.errors import KINDS, HimError
from him.server import wire

PARTS: Final = ("numpy", "cv2", "blake3", "zstandard", "msgspec", "ml_dtypes", "rapidocr", "onnxruntime", "tokenizers")


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    command(program, "fsck", ["him fsck", "him fsck --rebuild", "him fsck --repo memory --json"])(fsck)
    command(program, "doctor", ["him doctor", "him doctor --json"])(doctor)


def fsck(
    context: typer.Context,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make catalogs, address segments and indexes again from the log.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Verify every stored byte; each fault is named with its place. Exits with 5 when there is one."""
    session = session_of(context)
    with session.progress("checking") as show:
        report = him.check(session.repository_path(repo), rebuild=rebuild, progress=show)
    value = report.as_json()
    if json:
        session.json(value)
    else:
        for fault in objects(value["errors"]):
            session.say(f"{fault['fault']} [{fault['object']}] at {fault['place']} — {fault['fix']}")
        session.say(
            f"{'sound' if report.ok else 'NOT sound'}: {value['tiles']} tiles in {value['packs']} packs, "
            f"{value['bytes']} bytes; {value['expired']} expired, {value['shredded']} shredded"
        )
    if not report.ok:
        raise typer.Exit(KINDS["integrity"].exit_code)


def doctor(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Check this machine and, where there is one, the repository; says how to mend what is wrong."""
    session = session_of(context)
    checks = [*machine_checks(session), *repository_checks(session, repo)]
    for check in checks:
        if json:
            session.json(check)
        else:
            line = f"{'ok  ' if check['ok'] else 'FAIL'} {check['check']}: {check['detail']}"
            session.say(line if check["ok"] else f"{line} — {check['fix']}")
    if not all(check["ok"] for check in checks):
        raise typer.Exit(EXIT_CHECK_FAILED)


def check(name: str, ok: bool, detail: str, fix: str = "") -> dict[str, object]:
    """One line of the doctor's report."""
    return {"check": name, "ok": ok, "detail": detail, "fix": "" if ok else fix}


def machine_checks(session: Session) -> Iterator[dict[str, object]]:
    """What can be told without a repository."""
    missing = [part for part in PARTS if find_spec(part) is None]
    yield check("parts", not missing, ", ".join(missing) or "all there", "pip install him")
    yield check(
        "cores", True, str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    )
    found = find_repository(None, session.environ, session.cwd) or session.cwd
    folder = wire.runtime_folder(session.environ, found)
    safe = not os.path.lexists(folder) or wire.trusted(folder)
    yield check("sockets", safe, folder, f"chmod 700 {folder}, or set XDG_RUNTIME_DIR to a folder of your own")


def repository_checks(session: Session, named: str | None) -> Iterator[dict[str, object]]:
    """What the repository says of itself; without one, that there is none."""
    path = find_repository(named, session.environ, session.cwd)
    if path is None:
        yield check("python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer")
        yield check("repository", True, "none here; only the machine was checked")
        return
    try:
        with session.repository(named) as repository:
            yield check("repository", True, path)
            yield from repository.doctor()
    except HimError as error:
        yield check("repository", False, f"{path}: {error.message}", error.fix)
        return
    running = wire.ask(
        wire.socket_path(session.environ, path), {"protocol": wire.PROTOCOL, "kind": "status"}, wire.TAKEN_TIMEOUT_S
    )
    yield check("daemon", True, f"running, pid {running.get('pid')}" if running else "not running")
