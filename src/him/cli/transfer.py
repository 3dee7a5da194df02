"""`him push`, `him pull` and `him clone`: snapshots between repositories."""

from typing import Annotated

import msgspec
import typer

import him
from him.app import TransferReport
from him.cli.commands import JsonOption, RepoOption, command
from him.cli.session import Session, session_of
from him.cli.tiers import size_text
from him.errors import UsageError

RefsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="REF", help="Branches and tags; their ancestors come with them.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Set branches that have other snapshots there. Tags stay.")]


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    command(program, "push", ["him push ../backup main v1", "him push /mnt/backup/memory --all"])(push)
    command(program, "pull", ["him pull ../colleague", "him pull ../colleague experiment"])(pull)
    command(program, "clone", ["him clone memory copy", "him clone memory copy --ref main --ref v1"])(clone)


def push(
    context: typer.Context,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The repository to send to.")],
    refs: RefsArgument = None,
    every: Annotated[bool, typer.Option("--all", help="All branches and tags whose heads are sealed.")] = False,
    force: ForceOption = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Send sealed snapshots to another repository; what it has is not sent. Run again after a break it goes on."""
    session = session_of(context)
    if bool(refs) == every:
        raise UsageError(
            "name branches and tags, or --all" if not refs else "names and --all exclude each other",
            fix="write `him push OTHER main` or `him push OTHER --all`",
        )
    with session.repository(repo) as repository, session.progress("sending") as show:
        report = repository.push(session.path(other), refs or None, force=force, progress=show)
    tell(session, report, json=json)


def pull(
    context: typer.Context,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The repository to get from.")],
    refs: RefsArgument = None,
    force: ForceOption = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Get sealed snapshots from another repository: the branches and tags named, or all of them."""
    session = session_of(context)
    with session.repository(repo) as repository, session.progress("getting") as show:
        report = repository.pull(session.path(other), refs or None, force=force, progress=show)
    tell(session, report, json=json)


def clone(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The repository to copy from.")],
    path: Annotated[str, typer.Argument(metavar="DEST", help="The folder to make the new one in.")],
    ref: Annotated[
        list[str] | None, typer.Option("--ref", metavar="REF", help="Only this branch or tag; may be repeated.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a repository of the branches and tags of another one. Run again after a break it goes on."""
    session = session_of(context)
    with session.progress("copying") as show:
        report = him.clone(session.path(source), session.path(path), refs=ref or None, progress=show)
    tell(session, report, json=json)


def tell(session: Session, report: TransferReport, *, json: bool) -> None:
    """The report, and on standard error what was left out."""
    if report.left_open:
        names = ", ".join(report.left_open)
        session.note(
            f"left out, still written to: {names} (`him snap seal {report.left_open[0]}`, then run this again)"
        )
    if json:
        session.json(msgspec.to_builtins(report))
        return
    for move in report.refs:
        session.say(f"{move.name}: {move.before or 'new'} -> {move.after}")
    if not report.refs:
        session.say("no branch or tag had to be set")
    session.say(
        f"sent {len(report.snapshots)} snapshots, {report.records} records of {size_text(report.sent_bytes)};"
        f" found there {report.present_records} of {size_text(report.present_bytes)}"
    )
