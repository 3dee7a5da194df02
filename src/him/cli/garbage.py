"""`him gc`, `him compact`, `him stats` and `him retention`: what is kept, what it takes, what goes."""

import re
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
import typer

from him.cli.commands import JsonOption, RepoOption, command, group
from him.cli.session import Session, objects, session_of
from him.cli.tiers import size_text
from him.config import COLLECT_DEAD_SHARE
from him.errors import UsageError

_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only count; change nothing.")]


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    command(program, "gc", ["him gc --dry-run", "him gc", "him gc --dead-share 0.2 --json"])(gc)
    command(program, "compact", ["him compact", "him compact --dry-run --json"])(compact)
    command(program, "stats", ["him stats", "him stats --json"])(stats)
    retention = group(program, "retention", "How long streams keep their tiles: list, set.")
    command(retention, "list", ["him retention list", "him retention list --json"], within="retention")(list_)
    examples = [
        "him retention set logs --keep 30d",
        "him retention set kv_cache --task TX-423 --keep 12h",
        "him retention set logs --forever",
        "him retention set logs --reset",
    ]
    command(retention, "set", examples, within="retention")(set_)


def seconds_of(text: str) -> int:
    """A span such as 90s, 30m, 12h, 30d or 4w. Raises UsageError."""
    found = _TIME.fullmatch(text.strip())
    if found is None or float(found[1]) * _UNITS[found[2]] < 1:
        raise UsageError(f"not a span of time: {text!r}", fix="write it as 90s, 30m, 12h, 30d or 4w")
    return int(float(found[1]) * _UNITS[found[2]])


def span_text(seconds: int) -> str:
    """A span for a person, in the largest unit it is whole in."""
    if not seconds:
        return "for ever"
    unit = next(unit for unit in "wdhms" if seconds % _UNITS[unit] == 0)
    return f"{seconds // _UNITS[unit]}{unit}"


def gc(
    context: typer.Context,
    dead_share: Annotated[
        float, typer.Option("--dead-share", min=0.01, max=1, help="Give packs up from which share of dead bytes on.")
    ] = COLLECT_DEAD_SHARE,
    dry_run: DryRunOption = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Let go what nothing refers to and what retention no longer keeps; runs beside readers and writers."""
    session = session_of(context)
    with session.repository(repo) as repository, session.progress("collecting") as show:
        found = repository.gc(dead_share=dead_share, dry_run=dry_run, progress=show)
    _tell(session, msgspec.to_builtins(found), dry_run=dry_run, json=json)


def compact(
    context: typer.Context, dry_run: DryRunOption = False, repo: RepoOption = None, json: JsonOption = False
) -> None:
    """Collect, and join small packs to large ones, as a cold tier likes them (128 to 512 MB)."""
    session = session_of(context)
    with session.repository(repo) as repository, session.progress("compacting") as show:
        found = repository.compact(dry_run=dry_run, progress=show)
    _tell(session, msgspec.to_builtins(found), dry_run=dry_run, json=json)


def _tell(session: Session, found: dict[str, int], *, dry_run: bool, json: bool) -> None:
    if json:
        session.json(found)
        return
    live, dead = size_text(found["live_bytes"]), size_text(found["dead_bytes"])
    session.say(f"{live} in use and {dead} not, in {found['packs']} packs")
    if dry_run:
        return
    session.say(
        f"gave up {found['condemned_packs']} packs, copied {size_text(found['copied_bytes'])} out of them; "
        f"removed {found['removed_packs']}: {size_text(found['freed_bytes'])} freed"
    )
    if found["orphan_packs"]:
        session.say(f"removed {found['orphan_packs']} files that a crash left")
    if found["waiting_packs"]:
        session.say(f"{found['waiting_packs']} packs wait for those who still read them: run it again later")


def stats(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Show bytes by stream and tier, and what sharing, compression and deltas save."""
    session = session_of(context)
    with session.repository(repo) as repository, session.progress("measuring") as show:
        found = repository.stats(show).as_json()
    if json:
        session.json(found)
        return
    columns = ["stream", "tiles", "logical", "distinct", "stored", "here", "cold", "shared", "packed", "as deltas"]
    session.table(columns, [_stream_row(one) for one in objects(found["streams"])])
    sizes = (size_text(int(str(found[key]))) for key in ("pack_bytes", "page_bytes", "other_bytes"))
    pack_bytes, page_bytes, other = sizes
    session.say(
        f"{found['snapshots']} snapshots; {found['packs']} packs of {pack_bytes}: "
        f"{page_bytes} pages, {other} levels, chunks, bases and what nothing refers to (`him gc --dry-run`)"
    )


def _stream_row(one: Mapping[str, object]) -> list[object]:
    sizes = ("logical_bytes", "raw_bytes", "stored_bytes", "warm_bytes", "cold_bytes")
    logical, raw, stored, warm, cold = (size_text(int(str(one[key]))) for key in sizes)
    gains = [f"{one[key]:.3g}x" for key in ("sharing", "compression")]
    deltas = f"{one['deltas']}, {one['delta_gain']:.3g}x" if one["deltas"] else "none"
    return [one["stream"], one["tiles"], logical, raw, stored, warm, cold, *gains, deltas]


def list_(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Show the rules; a stream that none names is kept for ever."""
    session = session_of(context)
    with session.repository(repo) as repository:
        rules = repository.retention()
    for (stream, task), ttl_s in rules.items():
        if json:
            session.json({"stream": stream, "task": task, "ttl_s": ttl_s})
        else:
            session.say(f"{stream}{f' of task {task}' if task else ''}: {span_text(ttl_s)}")


def set_(
    context: typer.Context,
    stream: Annotated[str, typer.Argument(help="The stream whose tiles are meant.")],
    keep: Annotated[str | None, typer.Option("--keep", metavar="SPAN", help="For how long: 90s, 12h, 30d, 4w.")] = None,
    forever: Annotated[bool, typer.Option("--forever", help="Keep them for ever.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Take the rule back: the stream's own holds again.")] = False,
    task: Annotated[
        str, typer.Option("--task", help="Only tiles of snapshots with the attribute task_id of this value.")
    ] = "",
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Say how long a stream's tiles are kept; `him gc` lets older ones go, but for those under a legal hold."""
    if [keep is not None, forever, reset].count(True) != 1:
        raise UsageError("give one of --keep, --forever and --reset")
    session, ttl_s = session_of(context), -1 if reset else 0 if keep is None else seconds_of(keep)
    with session.repository(repo) as repository:
        repository.set_retention(stream, ttl_s, task=task)
        held = repository.retention().get((stream, task), 0)
    if json:
        session.json({"stream": stream, "task": task, "ttl_s": held})
    else:
        session.say(f"{stream}{f' of task {task}' if task else ''}: {span_text(held)}")
