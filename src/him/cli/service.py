"""`him daemon start|stop|status|run`: a warm process that answers for the command line."""

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer
from typer.core import TyperGroup

import him
from him.cli.commands import JsonOption, RepoOption, command, group
from him.cli.running import run_words
from him.cli.session import Elsewhere, Session, session_of
from him.cli.tiers import bytes_of
from him.cli.upkeep import paced
from him.errors import BusyError, HimError, NotFoundError, StorageError
from him.server import wire
from him.server.daemon import Daemon, make_runtime_folder

if TYPE_CHECKING:
    from him.server.daemon import Message

STATUS_TIMEOUT_S: Final = 5.0
_POLL_S: Final = 0.05
PASS_AGAIN_S: Final = 60.0
"""Between one pass of the background scrubber and the next."""

IdleOption = Annotated[
    float | None, typer.Option("--idle", min=0.1, metavar="SECONDS", help="End after this long without a request.")
]
ScrubOption = Annotated[
    str, typer.Option("--scrub", metavar="SIZE", help="Scrub in the background, at most so much a second: 20MB.")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long to wait.")]


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    daemon = group(program, "daemon", "A warm process that answers for the command line: start, stop, status, run.")
    command(
        daemon,
        "start",
        ["him daemon start", "him daemon start --repo memory --idle 3600", "him daemon start --scrub 20MB"],
        within="daemon",
    )(start)
    command(daemon, "stop", ["him daemon stop"], within="daemon")(stop)
    command(daemon, "status", ["him daemon status --json"], within="daemon")(status)
    command(daemon, "run", ["him daemon run --repo memory"], within="daemon")(run)


def ask(socket: str, kind: str) -> dict[str, object] | None:
    """A daemon's answer to a control message; None when there is none."""
    return wire.ask(socket, {"protocol": wire.PROTOCOL, "kind": kind}, STATUS_TIMEOUT_S)


def start(
    context: typer.Context,
    repo: RepoOption = None,
    idle: IdleOption = None,
    scrub: ScrubOption = "",
    timeout: TimeoutOption = 60.0,
    json: JsonOption = False,
) -> None:
    """Start a daemon in the background and wait until it answers."""
    session = session_of(context)
    path = session.repository_path(repo)
    socket = wire.socket_path(session.environ, path)
    if ask(socket, "status") is not None:
        raise BusyError(
            "a daemon already serves this repository", place=socket, fix="use it, or `him daemon stop` first"
        )
    # Opened here once, so that a repository that cannot be opened is reported as it would be by any command.
    him.open(path).close()
    make_runtime_folder(str(Path(socket).parent))
    log = Path(socket).with_suffix(".log")
    words = [sys.executable, "-m", "him.cli.entry", "daemon", "run", "--repo", path]
    words += [] if idle is None else ["--idle", str(idle)]
    words += ["--scrub", str(bytes_of(scrub))] if scrub else []
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as output:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    value = wait_for(process, socket, log, timeout)
    session.json(value) if json else session.say(f"serving {path} (pid {value['pid']})")


def wait_for(process: "subprocess.Popen[bytes]", socket: str, log: Path, timeout_s: float) -> dict[str, object]:
    """The status of a daemon that has just been started, once it answers. Raises StorageError."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = ask(socket, "status")
        if value is not None:
            return value
        if process.poll() is not None:
            break
        time.sleep(_POLL_S)
    ended = process.poll()
    if ended is None:
        process.terminate()
        process.wait()
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    why = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    what = f"did not answer within {timeout_s} s" if ended is None else f"ended with code {ended}"
    raise StorageError(f"the daemon {what}: {why}", place=str(log), fix="run `him daemon run` to watch it start")


def stop(
    context: typer.Context, repo: RepoOption = None, timeout: TimeoutOption = 10.0, json: JsonOption = False
) -> None:
    """Stop the daemon; a command it is running is finished first."""
    session = session_of(context)
    socket = wire.socket_path(session.environ, session.repository_path(repo))
    value = ask(socket, "stop")
    if value is None:
        raise NotFoundError("no daemon serves this repository", place=socket, fix="nothing to do")
    deadline = time.monotonic() + timeout
    while Path(socket).exists():
        if time.monotonic() > deadline:
            raise BusyError("the daemon is still busy", place=socket, fix=f"wait, or end process {value.get('pid')}")
        time.sleep(_POLL_S)
    session.json({"stopped": True, "pid": value.get("pid")}) if json else session.say("stopped")


def status(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Say whether a daemon runs, and what it has done."""
    session = session_of(context)
    path = session.repository_path(repo)
    socket = wire.socket_path(session.environ, path)
    value = ask(socket, "status")
    if value is None:
        value = {"running": False, "repository": path, "socket": socket}
    if json:
        session.json(value)
    else:
        state = f"running (pid {value['pid']}, {value['served']} served)" if value["running"] else "not running"
        session.say(f"{state}: {path}")


def run(context: typer.Context, repo: RepoOption = None, idle: IdleOption = None, scrub: ScrubOption = "") -> None:
    """Serve in the foreground until stopped."""
    session = session_of(context)
    path = session.repository_path(repo)
    program = cast("TyperGroup", context.find_root().command)
    os.chdir("/")  # a long-lived process must not hold the caller's folder
    daemon = Daemon(path, wire.socket_path(session.environ, path), idle_s=idle)
    try:
        with him.open(path) as repository:
            warm_up(repository)
            daemon.listen()
            session.note(f"serving {path} on {daemon.path}")
            session.err.flush()
            with scrubbing(repository, bytes_of(scrub) if scrub else 0):
                daemon.serve(lambda message: execute(program, message, path, repository))
    finally:
        daemon.close()


@contextmanager
def scrubbing(repository: "him.Repository", bytes_per_s: int) -> Generator[None]:
    """Scrub pass after pass in a thread beside the commands, for as long as the block lasts; 0 does nothing."""
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            # Another process scrubs, or the disk refuses: the next pass comes soon enough.
            with suppress(HimError):
                for _ in repository.care.scrub(paced(bytes_per_s, ended.wait)):
                    if ended.is_set():
                        return
            ended.wait(PASS_AGAIN_S)

    thread = threading.Thread(target=work, name="him scrub", daemon=True)
    if bytes_per_s:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if bytes_per_s:
            thread.join()


def warm_up(repository: "him.Repository") -> None:
    """Load the models and the rows of every branch, so that the first query is as fast as the next."""
    repository.warm()
    for name, (kind, _) in repository.refs().items():
        if kind == "branch":
            with suppress(HimError):  # a damaged branch is reported to who asks for it; the others are served
                repository.warm(name)


def execute(program: TyperGroup, message: "Message", path: str, repository: "him.Repository") -> dict[str, object]:
    """Run a forwarded command as the caller's own process would, and return what it printed."""
    arguments, environ, started = message.get("arguments"), message.get("environ"), message.get("started_ns")
    width = message.get("width")
    if not isinstance(arguments, list) or not isinstance(environ, Mapping) or not isinstance(started, int):
        return {"retry": "not a command"}
    out, err = io.StringIO(), io.StringIO()
    session = Session(
        out=out,
        err=err,
        cwd=str(message.get("cwd")),
        environ=cast("Mapping[str, str]", environ),
        started_ns=started,
        terminal=message.get("terminal") is True,
        width=width if isinstance(width, int) else 0,
        warm=(path, repository),
    )
    try:
        code = run_words(program, cast("list[str]", arguments), session)
    except Elsewhere:
        return {"retry": "another repository"}
    return {"exit": code, "stdout": out.getvalue(), "stderr": err.getvalue()}
