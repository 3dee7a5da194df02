"""Runs a command line inside a session: whatever happens ends as printed text and an exit code."""

import typer
from typer.core import TyperGroup

from him.cli.failure import report
from him.cli.session import Elsewhere, Session


def run_words(found: TyperGroup, arguments: list[str], session: Session) -> int:
    """The exit code; raises nothing but `Elsewhere` and the BrokenPipeError of a reader that left."""
    words = arguments or ["--help"]
    try:
        # Not typer's own main(): that one prints errors its way and takes over the process's streams.
        with found.make_context("him", list(words), obj=session) as context:
            found.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except (Elsewhere, BrokenPipeError):
        raise
    except (Exception, typer.Abort) as error:  # noqa: BLE001 - the last resort: one line and a code
        return report(error, session, words)
    return 0
