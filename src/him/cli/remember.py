"""`him ingest`: pictures, folders of pictures and arrays into a snapshot."""

from typing import Annotated

import typer

from him.cli.commands import FrameOption, JsonOption, RepoOption, command
from him.cli.session import session_of
from him.errors import NotFoundError


def register(program: typer.Typer) -> None:
    """Add this command to the program."""
    command(
        program,
        "ingest",
        [
            "him ingest login.png --snapshot main",
            "him ingest login.png --snapshot main --frame login --tree login.json --json",
            "him ingest screens/ --snapshot main",
            "him ingest cache.npy --snapshot main --stream kv_cache --frame chat-7",
        ],
    )(ingest)


def ingest(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A picture, a folder of pictures, or an .npy array.")],
    snapshot: Annotated[
        str, typer.Option("--snapshot", metavar="NAME", help="A branch (made if unknown) or an open snapshot.")
    ],
    frame: FrameOption = None,
    tree: Annotated[
        str | None, typer.Option("--tree", metavar="FILE.json", help="An accessibility tree beside one picture.")
    ] = None,
    stream: Annotated[
        str | None, typer.Option("--stream", metavar="STREAM", help="The stream of an array; pictures go to screen.")
    ] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Remember what is in a file or a folder; run it again after a break and it resumes."""
    session = session_of(context)
    source = session.path(path)
    if not source.exists():
        raise NotFoundError("no such file or folder", object=path, fix="check the path")
    beside = None if tree is None else session.path(tree)
    if beside is not None and not beside.is_file():
        raise NotFoundError("no such tree file", object=str(tree), fix="check the path given to --tree")
    count = written = stored = 0
    with session.repository(repo) as repository, session.progress("reading") as show:
        for report in repository.ingest(source, snapshot, frame=frame, tree=beside, stream=stream, progress=show):
            value = report.as_json()
            count, written = count + 1, written + report.tiles_written
            stored += report.bytes_stored
            if json:
                session.json(value)
                session.out.flush()
            else:
                session.say(
                    f"{value['frame']}: {value['tiles_written']} tiles written, {value['tiles_reused']} reused, "
                    f"{value['elements']} elements, {value['bytes_stored']} bytes, {value['ms']} ms"
                    + (f" ({report.note})" if report.note else "")
                )
    if not json and count != 1:
        session.say(f"{count} frames, {written} tiles, {stored} bytes")
