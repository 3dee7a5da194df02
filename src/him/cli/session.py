"""One run of a command: where it prints, what it may look at, and how it reaches a repository.

Commands never touch `sys.stdout`, the working folder or the environment: the same functions run in this process and,
for several callers, inside the warm daemon.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO, cast

import typer

import him
from him.cli.place import find_repository
from him.errors import NotFoundError

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH_WITHOUT_TERMINAL = 160


class Elsewhere(Exception):
    """A forwarded command means another repository than the daemon's."""


@dataclass(slots=True)
class Session:
    """What a command gets.

    Attributes:
        out, err: where it prints.
        cwd: what relative paths start from.
        environ: the environment it may look at.
        started_ns: boot-clock time at which the caller's process began.
        terminal: whether a person looks at `out`.
        width: columns for tables; 0 when unknown.
        raw: where bytes go, if the caller can take them.
        stdin: the caller's standard input, if it can be read.
        warm: the repository a daemon keeps open, by its resolved path.
    """

    out: TextIO
    err: TextIO
    cwd: str
    environ: Mapping[str, str]
    started_ns: int
    terminal: bool = False
    width: int = 0
    raw: BinaryIO | None = None
    stdin: TextIO | None = None
    warm: tuple[str, "him.Repository"] | None = None
    _console: "Console | None" = field(default=None, init=False)

    def path(self, given: str | Path) -> Path:
        """A path as the caller means it."""
        return Path(self.cwd) / Path(given).expanduser()

    def repository_path(self, named: str | None) -> str:
        """The resolved path of the repository this command works on.

        Raises:
            NotFoundError: none is named and none lies upwards of the working folder.
        """
        found = find_repository(named, self.environ, self.cwd)
        if found is None:
            raise NotFoundError(
                f"no repository in {self.cwd} or above it",
                fix="name one with --repo or HIM_REPO, or make one with `him init PATH`",
            )
        return found

    @contextmanager
    def repository(self, named: str | None) -> Generator["him.Repository"]:
        """The repository, opened for this command or kept warm by the daemon."""
        path = self.repository_path(named)
        if self.warm is not None:
            kept, repository = self.warm
            if kept != path:
                raise Elsewhere(path)
            yield repository
            return
        with him.open(path) as repository:
            yield repository

    def startup_ms(self) -> float:
        """Milliseconds from the start of the caller's process to now: call it when the work is taken up."""
        now = time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
        return round(max(0, now - self.started_ns) / 1e6, 3)

    def json(self, value: Mapping[str, object]) -> None:
        """One JSON object on one line."""
        self.out.write(json_line(value) + "\n")

    def say(self, text: str) -> None:
        """One line for a person."""
        self.out.write(plain(text) + "\n")

    def note(self, text: str) -> None:
        """One line beside the result."""
        self.err.write(plain(text) + "\n")

    @property
    def console(self) -> "Console":
        """A rich console on `out`."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(
                file=self.out,
                force_terminal=self.terminal,
                width=self.width or (None if self.terminal else TABLE_WIDTH_WITHOUT_TERMINAL),
                highlight=False,
                markup=False,
                emoji=False,
                _environ=self.environ,
            )
        return self._console

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
        """A table for a person."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(plain(str(cell))) for cell in row))
        self.console.print(table)

    @contextmanager
    def progress(self, label: str) -> Generator[Callable[[int, int, str], None]]:
        """A progress bar on a terminal's standard error, and silence elsewhere.

        Yields:
            A function of (done, total, name of the thing in work).
        """
        if not self.err.isatty():
            yield _silent
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(file=self.err), transient=True) as bar:
            task = bar.add_task(label, total=None)

            def show(done: int, total: int, name: str) -> None:
                bar.update(task, completed=done, total=total or None, description=f"{label} {plain(name)}")

            yield show


def _silent(_done: int, _total: int, _name: str) -> None:
    """No bar."""


def session_of(context: typer.Context) -> Session:
    """The session a command runs in."""
    found: object = context.obj
    if not isinstance(found, Session):
        raise TypeError("a command runs inside a session")
    return found


def session_here(started_ns: int) -> Session:
    """A session on this process's own streams."""
    return Session(
        out=sys.stdout,
        err=sys.stderr,
        cwd=str(Path.cwd()),
        environ=os.environ,
        started_ns=started_ns,
        terminal=sys.stdout.isatty(),
        raw=sys.stdout.buffer,
        stdin=sys.stdin,
    )


def json_line(value: Mapping[str, object]) -> str:
    """The one form of JSON this program prints: one line, no spaces, no NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def objects(value: object) -> "list[Mapping[str, object]]":
    """The objects in a JSON list; empty when it is none."""
    return cast("list[Mapping[str, object]]", value) if isinstance(value, list) else []


def plain(text: str) -> str:
    """Text that cannot steer a terminal: what is not printable is shown as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
