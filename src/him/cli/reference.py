"""Writes the generated pages: the command line's reference and the table of errors (`make docs`)."""

from pathlib import Path
from typing import Final

import typer
import typer.main
from typer.core import TyperGroup

from him.cli.commands import EXAMPLES
from him.cli.failure import EXIT_CHECK_FAILED, EXIT_INTERRUPTED, EXIT_READER_GONE, EXIT_UNEXPECTED
from him.cli.main import program
from him.errors import KINDS

WIDTH: Final = 100
MADE: Final = "<!-- Made by `make docs`; a test checks that it is current. -->\n"


def help_of(words: tuple[str, ...]) -> str:
    """The help text of a command, as `him WORDS --help` prints it at a fixed width."""
    found = typer.main.get_command(program)
    context = typer.Context(found, info_name="him", terminal_width=WIDTH, max_content_width=WIDTH)
    for word in words:
        if not isinstance(found, TyperGroup):
            raise KeyError(words)
        found = found.commands[word]
        context = typer.Context(found, info_name=word, parent=context, terminal_width=WIDTH, max_content_width=WIDTH)
    return found.get_help(context).rstrip()


def command_page() -> str:
    """docs/CLI.md."""
    parts = [
        "# The command line\n",
        MADE,
        "The repository comes from `--repo`, else from `HIM_REPO`, else it is the nearest folder upwards that holds a\n"
        "`him.json`. `--json` prints one JSON object a line on standard output ([the contract](CLI_JSON.md)); what is\n"
        "wrong is one line on standard error and an exit code from [the table](ERRORS.md). `HIM_DEBUG=1` adds the\n"
        "traceback. Shell completion: `him --install-completion`.\n\n"
        "While `him daemon start` runs for a repository, `query`, `replay`, `log`, `tiles ls` and `snap list` are\n"
        "answered by it; `--no-daemon` keeps a command in its own process.\n",
        f"```text\n{help_of(())}\n```\n",
    ]
    for name in sorted(EXAMPLES):
        parts.append(f"## him {name}\n\n```text\n{help_of(tuple(name.split()))}\n```\n")
    return "\n".join(parts)


def error_page() -> str:
    """docs/ERRORS.md."""
    rows = [
        f"| `{name}` | {kind.exit_code} | {kind.http_status} | `{kind.grpc_status}` | {kind.meaning} | {kind.fix} |"
        for name, kind in KINDS.items()
    ]
    lines = [
        "# Errors\n",
        MADE,
        "Every error names its kind, the object concerned, where its bytes lie, and what to do. On the command line\n"
        "it is one line on standard error, `error: …`, and with `--json` one object on standard output:\n",
        '```json\n{"error":"not_found","message":"…","object":"…","place":"…","fix":"…"}\n```\n',
        "| kind | exit code | HTTP | gRPC | meaning | fix, unless the error names a better one |",
        "|---|---|---|---|---|---|",
        *rows,
        "\nFurther exit codes of the command line:\n",
        "| exit code | meaning |",
        "|---|---|",
        "| 0 | done; `him query` that found nothing is done too |",
        f"| {EXIT_CHECK_FAILED} | `him doctor` found something to mend, or `him demo` a wrong answer |",
        f"| {KINDS['integrity'].exit_code} | `him fsck` found a fault |",
        f"| {KINDS['drift'].exit_code} | `him replay` is not identical |",
        f"| {EXIT_UNEXPECTED} | a fault in HIM itself; run again with `HIM_DEBUG=1` and report it |",
        f"| {EXIT_INTERRUPTED} | interrupted |",
        f"| {EXIT_READER_GONE} | the reader of standard output went away |",
    ]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Path of each generated page, from the top of the tree, with its text."""
    return {"docs/CLI.md": command_page(), "docs/ERRORS.md": error_page()}


def main() -> None:
    """Write the pages into the source tree this module lies in."""
    top = Path(__file__).resolve().parents[3]
    for path, text in pages().items():
        (top / path).parent.mkdir(exist_ok=True)
        (top / path).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
