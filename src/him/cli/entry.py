"""Where `him` starts: asks a warm daemon first and imports the real command line only without one."""

import os
import sys
import time

FORWARDED = (("query",), ("replay",), ("log",), ("tiles", "ls"), ("snap", "list"))
"""Commands a daemon may answer: they only read the repository, and take no input beside their arguments."""
KEPT_HERE = frozenset({"--help", "--no-daemon", "-"})
"""Arguments that keep a command in this process."""
PASSED_ON = ("HIM_REPO", "HIM_DEBUG", "COLUMNS", "COLORTERM", "FORCE_COLOR", "NO_COLOR", "TERM")
"""The part of the environment that a forwarded command may look at."""


def process_start_ns() -> int:
    """When this process began, in nanoseconds of the boot clock (in ticks of 10 ms where /proc tells it)."""
    now = _boot_ns()
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        started = ticks * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return now
    return min(started, now)


def _boot_ns() -> int:
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def through_daemon(arguments: list[str], started_ns: int) -> int | None:
    """The exit code of a command that a running daemon answered; None when it must run here."""
    if not any(tuple(arguments[: len(words)]) == words for words in FORWARDED):
        return None
    if KEPT_HERE.intersection(arguments) or "_HIM_COMPLETE" in os.environ:
        return None
    if any(argument.startswith(("/dev/", "/proc/")) for argument in arguments):
        return None  # `--goals <(…)` names a descriptor of this process
    from him.cli.place import find_repository, option_value

    try:
        cwd = os.getcwd()
    except OSError:
        return None
    repository = find_repository(option_value(arguments, "--repo"), os.environ, cwd)
    if repository is None:
        return None
    from him.server.wire import PROTOCOL, ask, socket_path

    path = socket_path(os.environ, repository)
    if not os.path.exists(path):
        return None
    import him

    reply = ask(
        path,
        {
            "protocol": PROTOCOL,
            "version": him.__version__,
            "kind": "run",
            "arguments": arguments,
            "cwd": cwd,
            "environ": {name: os.environ[name] for name in PASSED_ON if name in os.environ},
            "started_ns": started_ns,
            "terminal": sys.stdout.isatty(),
            "width": _width(),
        },
    )
    if reply is None or not isinstance(code := reply.get("exit"), int):
        return None
    sys.stdout.write(str(reply.get("stdout", "")))
    sys.stdout.flush()
    sys.stderr.write(str(reply.get("stderr", "")))
    return code


def _width() -> int:
    """Columns to lay tables out for; 0 when nobody looks."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0
    except (OSError, ValueError):
        return 0


def main() -> None:
    """The console script `him`."""
    started_ns = process_start_ns()
    for stream in (sys.stdout, sys.stderr):
        # JSON is UTF-8 whatever the locale; what UTF-8 cannot carry is shown escaped, never as a traceback.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # pyright: ignore[reportUnknownMemberType,reportAttributeAccessIssue]
    arguments = sys.argv[1:]
    try:
        code = through_daemon(arguments, started_ns)
        if code is None:
            from him.cli.main import run_here

            code = run_here(arguments, started_ns)
        sys.stdout.flush()
    except BrokenPipeError:
        # `him log | head`: the reader has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
