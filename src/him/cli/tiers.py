"""`him tier`: what is on this disk, what is only in the cold tier, and moving it."""

import re
from typing import Annotated, Final

import msgspec
import typer

import him
from him.cli.commands import FrameOption, JsonOption, RepoOption, SnapshotOption, command, group
from him.cli.history import time_text
from him.cli.session import session_of
from him.config import PIN_MINUTES
from him.errors import UsageError

_UNITS: Final = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", re.IGNORECASE)

StreamOption = Annotated[str, typer.Option("--stream", metavar="STREAM", help="The stream, such as kv_cache.")]


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    tier = group(program, "tier", "The cold tier behind the packs: set, status, push, demote, admit, pin, unpin.")
    set_to = [
        "him tier set --cold s3://memory/agents --budget 200GB",
        "him tier set --cold /mnt/archive --budget 20GiB",
        "him tier set --cold s3://memory/agents --budget 50GB --take-over",
    ]
    command(tier, "set", set_to, within="tier")(set_)
    command(tier, "status", ["him tier status", "him tier status --json"], within="tier")(status)
    command(tier, "push", ["him tier push", "him tier push --all"], within="tier")(push)
    command(tier, "demote", ["him tier demote", "him tier demote --keep 5GB"], within="tier")(demote)
    named = "--snapshot main --stream kv_cache --frame chat-7"
    command(tier, "admit", [f"him tier admit {named}"], within="tier")(admit)
    command(tier, "pin", [f"him tier pin {named} --minutes 60"], within="tier")(pin)
    command(tier, "unpin", [f"him tier unpin {named}"], within="tier")(unpin)
    again = ["him restore s3://memory/agents memory", "him restore /mnt/archive memory --budget 50GB --all"]
    command(program, "restore", again)(restore)


def bytes_of(text: str) -> int:
    """A size such as 500MB, 20GiB or 1048576. Raises UsageError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"not a size: {text!r}", fix="write it as 500MB, 20GiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def size_text(size: int) -> str:
    """A size for a person: three digits and a unit."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, _ = value / 1000, units.pop(0)
    return f"{value:.3g} {units[0]}"


def set_(
    context: typer.Context,
    cold: Annotated[str, typer.Option("--cold", metavar="PLACE", help="A folder, or s3://bucket/prefix.")],
    budget: Annotated[str, typer.Option("--budget", metavar="SIZE", help="What the packs may take here: 200GB.")],
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Write there in place of the repository that does: it then only reads.")
    ] = False,
    storage_class: Annotated[
        str, typer.Option("--storage-class", metavar="CLASS", help="Of packs copied to S3: STANDARD_IA, GLACIER_IR, …")
    ] = "",
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Name the cold tier and the warm budget; credentials for S3 come from the environment (AWS_…)."""
    session, size = session_of(context), bytes_of(budget)
    place = cold if "://" in cold else str(session.path(cold))
    with session.repository(repo) as repository:
        repository.set_tier(place, size, take_over=take_over, storage_class=storage_class)
    if json:
        session.json({"cold": place, "budget_bytes": size})
    else:
        session.say(f"the packs may take {size_text(size)} here; the rest goes to {place}")


def status(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Show what is here, what is only in the cold tier, and whether that answers."""
    session = session_of(context)
    with session.repository(repo) as repository:
        found = repository.tier.status()
    if json:
        session.json(msgspec.to_builtins(found))
        return
    used, pinned = size_text(found.used_bytes), size_text(found.pinned_bytes)
    session.say(f"here: {used} of {size_text(found.budget_bytes)}, {pinned} pinned")
    session.say(
        f"cold: {size_text(found.cold_bytes)} in {found.cold_packs} packs, {size_text(found.warm_bytes)} of it here too"
    )
    session.say(
        f"only here: {found.only_warm_packs} finished packs" + (" (`him tier push`)" if found.only_warm_packs else "")
    )
    session.say(f"the cold tier does not answer: {found.fault}" if found.fault else "the cold tier answered last time")


def push(
    context: typer.Context,
    everything: Annotated[
        bool, typer.Option("--all", help="End the packs that are being written first: a restore then has everything.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Copy finished packs to the cold tier and read them back; may be interrupted and run again."""
    session = session_of(context)
    with session.repository(repo) as repository, session.progress("copying") as show:
        count = repository.tier.push(show, all=everything)
    if json:
        session.json({"packs": count})
    else:
        session.say(f"copied {count} packs")


def demote(
    context: typer.Context,
    keep: Annotated[str, typer.Option("--keep", metavar="SIZE", help="What the packs may still take here.")] = "0",
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Free what is used least; what the cold tier does not hold yet is copied there first."""
    session = session_of(context)
    with session.repository(repo) as repository, session.progress("copying") as show:
        repository.tier.push(show)
        freed = repository.tier.demote(bytes_of(keep))
    if json:
        session.json({"freed_bytes": freed})
    else:
        session.say(f"freed {size_text(freed)}")


def admit(
    context: typer.Context,
    stream: StreamOption,
    snapshot: SnapshotOption,
    frame: FrameOption = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Fetch a frame's tiles from the cold tier ahead of use."""
    session = session_of(context)
    with session.repository(repo) as repository:
        there = repository.tier.admit(snapshot, stream, frame or "")
    if json:
        session.json({"admitted": there})
    else:
        session.say("it is here" if there else "there is no room for all of it: pins or the budget stand in the way")


def pin(
    context: typer.Context,
    stream: StreamOption,
    snapshot: SnapshotOption,
    frame: FrameOption = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, max=525_600, help="For how long.")] = PIN_MINUTES,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Keep a frame's tiles here for a while."""
    session = session_of(context)
    with session.repository(repo) as repository:
        repository.tier.admit(snapshot, stream, frame or "")
        count = repository.tier.pin(snapshot, stream, frame or "", minutes)
    if json:
        session.json({"extents": count, "minutes": minutes})
    else:
        session.say(f"pinned for {minutes:g} minutes")


def unpin(
    context: typer.Context,
    stream: StreamOption,
    snapshot: SnapshotOption,
    frame: FrameOption = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Let a frame's tiles be freed again."""
    session = session_of(context)
    with session.repository(repo) as repository:
        repository.tier.unpin(snapshot, stream, frame or "")
    if json:
        session.json({"unpinned": True})
    else:
        session.say("it may be freed")


def restore(
    context: typer.Context,
    cold: Annotated[str, typer.Argument(metavar="COLD", help="The cold tier: a folder, or s3://bucket/prefix.")],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="The new repository: a new or empty folder.")],
    budget: Annotated[str, typer.Option("--budget", metavar="SIZE", help="What the packs may take here.")] = "20GiB",
    everything: Annotated[bool, typer.Option("--all", help="Fetch all packs now, not as they are read.")] = False,
    json: JsonOption = False,
) -> None:
    """Make a repository from its cold tier alone; may be interrupted and run again.

    It only reads the cold tier, so the first repository may live on. To go on in its place:
    `him tier set --cold COLD --budget SIZE --take-over`.
    """
    session = session_of(context)
    place = cold if "://" in cold else str(session.path(cold))
    with session.progress("restoring") as show:
        found = him.restore(
            place, session.path(dest), budget_bytes=bytes_of(budget), everything=everything, progress=show
        )
    if json:
        until = time_text(found.until_ns) if found.commits else ""
        session.json({
            "commits": found.commits, "until": until, "left_out": found.left_out, "lacking": found.lacking,
            "packs": found.packs, "cold_bytes": found.cold_bytes,
        })  # fmt: skip
        return
    when = f", the last of {time_text(found.until_ns)}" if found.commits else ""
    session.say(f"restored {found.commits} commits{when}; {size_text(found.cold_bytes)} in {found.packs} packs")
    if found.left_out:
        session.say(f"left out: {found.left_out} later commits, since the cold tier does not hold {found.lacking}")
