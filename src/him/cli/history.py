"""`him init`, `snap`, `log`, `branch`: a repository and its history."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, cast

import typer

import him
from him.cli.commands import JsonOption, NoDaemonOption, RepoOption, SnapshotOption, command, group
from him.cli.place import MARKER
from him.cli.session import session_of
from him.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from him.types import Snapshot

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A branch, a tag or a snapshot id (snp_…).")]
TagOption = Annotated[
    list[str] | None,
    typer.Option("--tag", metavar="KEY=VALUE", help="An attribute, such as task_id=TX-423; repeatable."),
]


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    command(program, "init", ["him init memory", "him init /data/screens --json"])(init)
    command(program, "log", ["him log", "him log --limit 5 --json"])(log)
    command(
        program,
        "branch",
        ["him branch", "him branch experiment --from main", "him branch experiment --delete"],
    )(branch)
    snap = group(program, "snap", "Snapshots: create, seal, list, show, diff, delete, hold, tag.")
    command(
        snap,
        "create",
        ["him snap create --from snp_base --tag task_id=TX-423", "him snap create --from main --branch experiment"],
        within="snap",
    )(create)
    command(snap, "seal", ["him snap seal main"], within="snap")(seal)
    command(snap, "list", ["him snap list", "him snap list --json"], within="snap")(list_)
    command(snap, "show", ["him snap show main", "him snap show main --json"], within="snap")(show)
    command(snap, "diff", ["him snap diff main experiment"], within="snap")(diff)
    command(snap, "delete", ["him snap delete snp_01JD0Q4M8R3V5X7Z9B1C3D5F7H"], within="snap")(delete)
    command(snap, "shred", ["him snap shred snp_01JD0Q4M8R3V5X7Z9B1C3D5F7H"], within="snap")(shred)
    command(
        snap,
        "hold",
        ["him snap hold main --reason 'case 17'", "him snap hold main --release"],
        within="snap",
    )(hold)
    command(
        snap,
        "tag",
        ["him snap tag v1 --snapshot main", "him snap tag --snapshot main --tag owner=ann --tag task_id=TX-423"],
        within="snap",
    )(tag)


def time_text(time_ns: int) -> str:
    """Nanoseconds since 1970 as the wire shows them: UTC, ISO 8601, microseconds."""
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + (
        f".{time_ns % 1_000_000_000 // 1_000:06d}Z"
    )


def pairs(given: Iterable[str] | None) -> dict[str, str]:
    """`KEY=VALUE` options as a mapping. Raises UsageError."""
    found: dict[str, str] = {}
    for text in given or ():
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"not KEY=VALUE: {text!r}", fix="write it as --tag owner=ann")
        if key in found:
            raise UsageError(f"the attribute {key!r} is given twice")
        found[key] = value
    return found


def snapshot_json(snapshot: "Snapshot", refs: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    """A snapshot in the form of the wire (spec §2.1), with the names that point to it."""
    return {
        "snapshot_id": snapshot.snapshot_id,
        "parents": [parent.snapshot_id for parent in snapshot.parents],
        "created_at": time_text(snapshot.created_at),
        "tags": dict(snapshot.tags),
        "provenance": dict(snapshot.provenance),
        "merge_policy": snapshot.merge_policy,
        "sealed": snapshot.sealed,
        "lamport": snapshot.lamport,
        "writer": snapshot.writer,
        "directory": snapshot.directory.hex(),
        "refs": sorted(name for name, (_, target) in refs.items() if target == snapshot.snapshot_id),
    }


def init(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="The folder to make it in; made if it is not there.")],
    json: JsonOption = False,
) -> None:
    """Make an empty repository."""
    session = session_of(context)
    folder = session.path(path)
    if (folder / MARKER).exists():
        raise ConflictError("there is a repository already", place=str(folder), fix="use it, or choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConflictError("the folder is not empty", place=str(folder), fix="choose another folder")
    with him.open(folder, create=True) as repository:
        where = str(repository.path)
    if json:
        session.json({"path": where})
    else:
        session.say(f"made {where}")


def log(
    context: typer.Context,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many records.")] = None,
    repo: RepoOption = None,
    no_daemon: NoDaemonOption = False,
    json: JsonOption = False,
) -> None:
    """Show the commit log, newest first."""
    session = session_of(context)
    shown: list[tuple[object, ...]] = []
    with session.repository(repo) as repository:
        for record in repository.log(limit):
            if json:
                session.json(record)
                continue
            time_ns, operations = record.get("time_ns"), record.get("operations")
            shown.append(
                (
                    record.get("seq"),
                    str(record.get("hash"))[:12],
                    time_text(time_ns) if isinstance(time_ns, int) else "",
                    operations_text(operations),
                )
            )
    if not json:
        session.table(("seq", "hash", "time", "operations"), shown)


def operations_text(operations: object) -> str:
    """What a log record did, for a person; `--json` shows all of it."""
    if not isinstance(operations, list | tuple):
        return str(operations)
    words: list[str] = []
    for operation in cast("Sequence[Mapping[str, object]]", operations):
        shown = (operation.get(key) for key in ("operation", "kind", "name", "key", "value", "snapshot_id"))
        words.append(" ".join(str(text) for text in shown if text))
    return "; ".join(words)


def branch(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The branch to make or delete.")] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="OTHER", help="What to fork, in constant time.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the name; snapshots stay.")] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """List branches and tags, fork a branch, or delete a name."""
    session = session_of(context)
    if name is None and (delete or source is not None):
        raise UsageError("no NAME given", fix="write `him branch NAME --from OTHER` or `him branch NAME --delete`")
    if delete and source is not None:
        raise UsageError("--from and --delete exclude each other")
    with session.repository(repo) as repository:
        if name is None:
            refs = sorted(repository.refs().items())
            if json:
                for known, (kind, target) in refs:
                    session.json({"name": known, "kind": kind, "snapshot_id": target})
            else:
                session.table(("name", "kind", "snapshot"), [(known, kind, target) for known, (kind, target) in refs])
        elif delete:
            repository.delete_ref(name)
            session.json({"deleted": name}) if json else session.say(f"deleted {name}")
        else:
            made = repository.branch(name, source=source)
            value = {"name": name, "kind": "branch", "snapshot_id": made.id, "from": source}
            session.json(value) if json else session.say(f"{name} is {made.id}")


def create(
    context: typer.Context,
    parent: Annotated[
        str | None, typer.Option("--from", metavar="NAME", help="The parent; none makes an empty one.")
    ] = None,
    branch: Annotated[str | None, typer.Option("--branch", metavar="BRANCH", help="A branch to point to it.")] = None,
    tag: TagOption = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Open a new snapshot, empty or on a parent; prints its id."""
    session = session_of(context)
    attributes = pairs(tag)
    with session.repository(repo) as repository:
        made = repository.create_snapshot(parent=parent, branch=branch, tags=attributes)
        if json:
            session.json(snapshot_json(made.info, repository.refs()))
        else:
            session.say(made.id)


def seal(context: typer.Context, name: NameArgument, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Freeze a snapshot; later writes to its branch open a child."""
    session = session_of(context)
    with session.repository(repo) as repository:
        sealed = repository.snapshot(name).seal()
        if json:
            session.json(snapshot_json(sealed, repository.refs()))
        else:
            session.say(f"sealed {sealed.snapshot_id} at {sealed.directory.hex()}")


def list_(
    context: typer.Context, repo: RepoOption = None, no_daemon: NoDaemonOption = False, json: JsonOption = False
) -> None:
    """List snapshots, oldest first."""
    session = session_of(context)
    with session.repository(repo) as repository:
        refs = repository.refs()
        found = [snapshot_json(snapshot, refs) for snapshot in repository.snapshots()]
    if json:
        for value in found:
            session.json(value)
        return
    columns = ("snapshot", "names", "state", "created", "tags")
    session.table(columns, [snapshot_row(value) for value in found])


def snapshot_row(value: Mapping[str, object]) -> tuple[object, ...]:
    """A snapshot's JSON form as cells of a table."""
    tags = cast("Mapping[str, str]", value["tags"])
    return (
        value["snapshot_id"],
        " ".join(cast("Sequence[str]", value["refs"])),
        "sealed" if value["sealed"] else "open",
        str(value["created_at"])[:19].replace("T", " "),
        " ".join(f"{key}={text}" for key, text in tags.items()),
    )


def show(context: typer.Context, name: NameArgument, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Show a snapshot: parents, attributes, provenance and its frames."""
    session = session_of(context)
    with session.repository(repo) as repository:
        handle = repository.snapshot(name)
        value = snapshot_json(handle.info, repository.refs())
        frames: list[dict[str, object]] = [
            {
                "stream": frame.stream,
                "frame": frame.name,
                "height": frame.height,
                "width": frame.width,
                "channels": frame.channels,
                "dtype": frame.dtype,
                "tiles": [frame.rows, frame.columns],
            }
            for frame in handle.frames()
        ]
    if json:
        session.json({**value, "frames": frames})
        return
    for key, text in value.items():
        session.say(f"{key:13} {text}")
    rows = [(f["stream"], f["frame"], f"{f['width']}×{f['height']}", f["dtype"]) for f in frames]
    session.table(("stream", "frame", "size", "type"), rows)


def diff(
    context: typer.Context,
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="A branch, a tag or a snapshot id.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="A branch, a tag or a snapshot id.")],
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Show which tiles differ between two snapshots; the cost follows the changes, not the size."""
    session = session_of(context)
    columns = ("change", "stream", "frame", "level", "x", "y")
    rows: list[tuple[object, ...]] = []
    with session.repository(repo) as repository:
        for change in repository.snapshot(before).diff(repository.snapshot(after)):
            if json:
                session.json(change)
            else:
                rows.append(tuple(change.get(column) for column in columns))
    if not json:
        session.table(columns, rows)


def delete(context: typer.Context, name: NameArgument, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Drop a snapshot; what others share with it stays."""
    session = session_of(context)
    with session.repository(repo) as repository:
        known = repository.snapshot(name).id
        repository.delete_snapshot(name)
    session.json({"deleted": known}) if json else session.say(f"deleted {known}")


def shred(context: typer.Context, name: NameArgument, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Drop a snapshot and destroy its keys: what only it reached can be read by nobody any more, from no copy."""
    session = session_of(context)
    with session.repository(repo) as repository:
        gone = repository.shred(name).snapshot_id
    session.json({"shredded": gone}) if json else session.say(f"shredded {gone}")


def hold(
    context: typer.Context,
    snapshot: Annotated[str, typer.Argument(help="Branch, tag or id.")],
    reason: Annotated[str, typer.Option("--reason", help="Why it must be kept.")] = "",
    release: Annotated[bool, typer.Option("--release", help="Take the hold back.")] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Put a legal hold on a snapshot: it cannot be deleted, and retention lets nothing of it go."""
    if bool(reason) == release:
        raise UsageError("give either --reason or --release")
    session = session_of(context)
    with session.repository(repo) as repository:
        held = repository.snapshot(snapshot).id
        if release:
            repository.release_hold(held)
        else:
            repository.hold(held, reason)
    if json:
        session.json({"snapshot_id": held, "hold": reason or None})
    else:
        session.say(f"{held} is {'free' if release else 'held'}")


def tag(
    context: typer.Context,
    snapshot: SnapshotOption,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A name that stays on this snapshot.")] = None,
    tag: TagOption = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Give a snapshot a lasting name, or attributes."""
    session = session_of(context)
    attributes = pairs(tag)
    if name is None and not attributes:
        raise UsageError("nothing to set", fix="give a NAME, or attributes with --tag KEY=VALUE")
    with session.repository(repo) as repository:
        handle = repository.snapshot(snapshot)
        for key, text in attributes.items():
            handle.set_tag(key, text)
        if name is not None:
            repository.tag(name, snapshot)
        value = snapshot_json(repository.snapshot(handle.id).info, repository.refs())
    if json:
        session.json(value)
    else:
        session.say(f"{value['snapshot_id']} {' '.join(filter(None, (name, *(tag or ()))))}")
