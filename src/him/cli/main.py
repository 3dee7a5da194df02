"""The program: all commands together, run with errors as one line."""

import os
from typing import Annotated

import typer
import typer.main

import him
from him.cli import (
    ask,
    caches,
    care,
    demo,
    garbage,
    history,
    keys,
    remember,
    service,
    simulation,
    tiers,
    tiles,
    transfer,
    upkeep,
)
from him.cli.running import run_words
from him.cli.session import Session, session_here, session_of

ABOUT = """HIM: a versioned memory for agents and model state.

Screens, caches, skills and logs as pyramids of tiles: branch them, search them in 150 ms, replay every answer.

\b
Start here:
  him demo
  him init memory
  him ingest screen.png --repo memory --snapshot main
  him query --repo memory --snapshot main --goal "find button 'Submit'"
"""

COMPLETION = "_HIM_COMPLETE"
"""The variable through which a shell asks for completions."""

program = typer.Typer(
    name="him", help=ABOUT, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=False
)


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        session_of(context).say(f"him {him.__version__}")
        raise typer.Exit


@program.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Carry the options of the program itself; its text is `ABOUT`."""


for room in (
    history,
    remember,
    ask,
    tiles,
    caches,
    tiers,
    garbage,
    keys,
    transfer,
    care,
    upkeep,
    service,
    simulation,
    demo,
):
    room.register(program)


def run(arguments: list[str], session: Session) -> int:
    """Run one command line; returns its exit code."""
    return run_words(typer.main.get_group(program), arguments, session)


def run_here(arguments: list[str], started_ns: int) -> int:
    """Run one command line in this process."""
    if COMPLETION in os.environ:
        program(prog_name="him")
    try:
        session = session_here(started_ns)
    except FileNotFoundError:
        os.chdir("/")  # the working folder was deleted: relative paths mean nothing, the rest still works
        session = session_here(started_ns)
    return run(arguments, session)
