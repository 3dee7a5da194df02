"""`him scrub`, `him heal` and `him parity`: what keeps stored bytes sound, and mends those that are not."""

import re
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Final

import msgspec
import typer

import him
from him.cli.commands import JsonOption, RepoOption, command, group
from him.cli.history import time_text
from him.cli.session import Session, session_of
from him.cli.tiers import bytes_of, size_text
from him.config import PARITY_DATA, PARITY_EXTRA
from him.errors import KINDS, HimError, UsageError

_SHAPE: Final = re.compile(r"(\d{1,3})\+(\d{1,3})")
_DAY_NS: Final = 24 * 3600 * 10**9


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    again = ["him scrub", "him scrub --rate 20MB --limit 50GB", "him scrub --copies --json", "him scrub --status"]
    command(program, "scrub", again)(scrub)
    command(program, "heal", ["him heal", "him heal --json"])(heal)
    parity = group(program, "parity", "Parity files that make lost packs again: set, off, update, status.")
    command(parity, "set", ["him parity set 10+4", "him parity set 4+2"], within="parity")(set_)
    command(parity, "off", ["him parity off"], within="parity")(off)
    command(parity, "update", ["him parity update", "him parity update --all --json"], within="parity")(update)
    command(parity, "status", ["him parity status", "him parity status --json"], within="parity")(status)


def scrub(
    context: typer.Context,
    rate: Annotated[
        str, typer.Option("--rate", metavar="SIZE", help="Read at most so much a second: 20MB. Default: at full speed.")
    ] = "",
    limit: Annotated[
        str, typer.Option("--limit", metavar="SIZE", help="End after about so much; the next scrub goes on there.")
    ] = "",
    copies: Annotated[bool, typer.Option("--copies", help="Read what the cold tier holds, too.")] = False,
    no_heal: Annotated[bool, typer.Option("--no-heal", help="Only tell what is damaged.")] = False,
    show_status: Annotated[bool, typer.Option("--status", help="Only tell what scrubbing has come to.")] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Read what is stored, longest unread first, and mend what is damaged. Exits with 5 when some of it cannot be.

    May be interrupted: the next scrub goes on with what is left. Needs no keys.
    """
    session = session_of(context)
    if show_status:
        _scrub_status(session, repo, json=json)
        return
    most = bytes_of(limit) if limit else None
    files = read = faults = left = 0
    with session.repository(repo) as repository, session.progress("scrubbing") as show:
        total = repository.care.scrubbed().files
        for one in repository.care.scrub(paced(bytes_of(rate)) if rate else None, heal=not no_heal, copies=copies):
            show(files, total, one.name)
            files, read = files + 1, read + one.size_bytes
            faults, left = faults + len(one.faults), left + len(one.left)
            for error in one.faults:
                _tell(session, error, "" if error in one.left else "healed", json=json)
            if most is not None and read >= most:
                break
    value: dict[str, object] = {
        "ok": not left,
        "files": files,
        "of": total,
        "bytes": read,
        "faults": faults,
        "left": left,
    }
    if json:
        session.json(value)
    else:
        session.say(f"read {files} of {total} files, {size_text(read)}: {faults} faults, {left} of them left")
    if left:
        raise typer.Exit(KINDS["integrity"].exit_code)


def paced(bytes_per_s: int, wait: Callable[[float], object] = time.sleep) -> Callable[[int], None]:
    """Waits after what was read for as long as the rate asks."""
    if bytes_per_s < 1:
        raise UsageError("a rate of nothing", fix="give at least 1 byte a second, such as 20MB")
    begun, read = time.monotonic(), 0

    def pace(size: int) -> None:
        nonlocal read
        read += size
        ahead = read / bytes_per_s - (time.monotonic() - begun)
        if ahead > 0:
            wait(ahead)

    return pace


def _tell(session: Session, error: HimError, state: str, *, json: bool) -> None:
    if json:
        session.json({"fault": error.message, "object": error.object, "place": error.place, "state": state or "left"})
    else:
        session.say(f"{error.message} [{error.object}] at {error.place} — {state or error.fix}")


def _scrub_status(session: Session, repo: str | None, *, json: bool) -> None:
    with session.repository(repo) as repository:
        found = repository.care.scrubbed()
    if json:
        session.json(msgspec.to_builtins(found))
        return
    oldest = f"all since {time_text(found.oldest_ns)}" if found.oldest_ns else f"{found.never_read} never"
    session.say(f"{found.files} files, {oldest}; {len(found.healed)} healings, {len(found.quarantined)} in quarantine")
    for event in (*found.healed[-10:], *found.quarantined):
        session.say(f"{time_text(event.time_ns)} {event.what} {event.pack} @ {event.offset}: {event.why}")


def heal(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Mend what is damaged: from parity, the cold tier, or what says the same. Exits with 5 when something is left.

    What cannot be mended is set aside: put the same content again, and it is whole.
    """
    session = session_of(context)
    with session.progress("healing") as show:
        report = him.heal(session.repository_path(repo), progress=show)
    if json:
        session.json({"ok": report.ok, **msgspec.to_builtins(report)})
    else:
        for fault in report.healed:
            session.say(f"healed: {fault.fault} [{fault.object}] at {fault.place}")
        for fault in report.left:
            session.say(f"left: {fault.fault} [{fault.object}] at {fault.place} — {fault.fix}")
        session.say(f"{len(report.healed)} healed, {len(report.left)} left, {report.quarantined} records in quarantine")
    if not report.ok:
        raise typer.Exit(KINDS["integrity"].exit_code)


def set_(
    context: typer.Context,
    shape: Annotated[
        str, typer.Argument(metavar="PACKS+PARITY", help="Such as 10+4: any 4 files of 14 may be lost.")
    ] = (f"{PARITY_DATA}+{PARITY_EXTRA}"),
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Protect packs by parity files from now on; `him parity update` (or scrub, or gc) writes them."""
    session = session_of(context)
    found = _SHAPE.fullmatch(shape)
    if found is None:
        raise UsageError(f"not a shape of groups: {shape!r}", fix="write it as 10+4")
    data, extra = int(found[1]), int(found[2])
    if data < 1:
        raise UsageError("a group of no packs", fix="write it as 10+4, or use `him parity off`")
    with session.repository(repo) as repository:
        repository.care.set_parity(data, extra)
    if json:
        session.json({"data": data, "extra": extra})
    else:
        session.say(
            f"any {extra} of {data + extra} files of a group may be lost, at {100 * extra / data:.0f} % more space"
        )


def off(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Protect nothing any more; the parity files go with the next update."""
    session = session_of(context)
    with session.repository(repo) as repository:
        repository.care.set_parity(0, 0)
        repository.care.protect()
    session.json({"data": 0, "extra": 0}) if json else session.say("no parity is kept any more")


def update(
    context: typer.Context,
    everything: Annotated[
        bool, typer.Option("--all", help="End the packs that are being written first, so that all is protected.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Write the parity that is missing; may be interrupted and run again. Exits with 5 when a pack is damaged."""
    session = session_of(context)
    with session.repository(repo) as repository, session.progress("protecting") as show:
        made = repository.care.protect(show, all=everything)
        found = repository.care.parity()
    for error in made.unsound:
        _tell(session, error, "", json=json)
    if json:
        session.json({
            "made_groups": made.made_groups, "removed_groups": made.removed_groups, "mended_files": made.mended_files,
            "written_bytes": made.written_bytes, "unsound_packs": len(made.unsound), **msgspec.to_builtins(found),
        })  # fmt: skip
    else:
        session.say(
            f"made {made.made_groups} groups ({size_text(made.written_bytes)}), removed {made.removed_groups}, "
            f"mended {made.mended_files} parity files"
        )
        _parity(session, msgspec.to_builtins(found))
    if made.unsound:
        raise typer.Exit(KINDS["integrity"].exit_code)


def status(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Show what is protected, and what waits for it."""
    session = session_of(context)
    with session.repository(repo) as repository:
        found = msgspec.to_builtins(repository.care.parity())
    session.json(found) if json else _parity(session, found)


def _parity(session: Session, found: Mapping[str, int]) -> None:
    session.say(
        f"{found['protected_packs']} packs ({size_text(found['protected_bytes'])}) in {found['groups']} groups, by "
        f"{size_text(found['parity_bytes'])} of parity; {found['waiting_packs']} packs "
        f"({size_text(found['waiting_bytes'])}) wait; {found['damaged_files']} parity files are damaged"
    )
