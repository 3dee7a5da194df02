"""How a command is declared: its examples belong to its help, and options that many share are spelt once."""

from collections.abc import Callable, Sequence
from typing import Annotated, Final, ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

EXAMPLES: Final[dict[str, tuple[str, ...]]] = {}
"""Full name of each command → its examples, as the help, the docs and the tests show them."""

RepoOption = Annotated[
    str | None,
    typer.Option("--repo", metavar="PATH", help="The repository; else HIM_REPO, else the nearest folder upwards."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
SnapshotOption = Annotated[
    str, typer.Option("--snapshot", metavar="NAME", help="A branch, a tag or a snapshot id (snp_…).")
]
FrameOption = Annotated[
    str | None, typer.Option("--frame", metavar="FRAME", help="The frame, such as a screen's name.")
]
NoDaemonOption = Annotated[bool, typer.Option("--no-daemon", help="Answer in this process, even if a daemon runs.")]


def group(parent: typer.Typer, name: str, about: str) -> typer.Typer:
    """A group of commands under one word."""
    made = typer.Typer(help=about, rich_markup_mode=None, pretty_exceptions_enable=False)
    parent.add_typer(made, name=name)
    return made


def command(
    parent: typer.Typer, name: str, examples: Sequence[str], *, within: str = ""
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare a command with its examples.

    Args:
        parent: the program or one of its groups.
        name: the command's own word.
        examples: complete command lines.
        within: the group's word, for the full name.
    """
    EXAMPLES[f"{within} {name}".strip()] = tuple(examples)

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        about = (function.__doc__ or "").strip()
        # \b keeps the lines of the paragraph as they are.
        shown = "\n".join(f"  {line}" for line in examples)
        parent.command(name, help=f"{about}\n\n\b\nExamples:\n{shown}")(function)
        return function

    return declare
