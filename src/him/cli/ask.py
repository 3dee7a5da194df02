"""`him query`, `prefetch`, `replay`: find, plan ahead, prove."""

import json as jsonlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from him.cli.commands import FrameOption, JsonOption, NoDaemonOption, RepoOption, SnapshotOption, command
from him.cli.files import read_bytes
from him.cli.session import Session, objects, session_of
from him.config import BUDGET_MS, GOAL_CHARS_MAX, META_BYTES_MAX, TREE_BYTES_MAX
from him.errors import HimError, LimitError, UsageError

if TYPE_CHECKING:
    import him
    from him.query import Answer
    from him.types import QueryPlan

EXIT_NOT_IDENTICAL = 7
"""A replay that differs; the same code as drift, because the caller's next step is the same."""


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    command(
        program,
        "query",
        [
            "him query --goal \"find button 'Submit'\" --snapshot main",
            'him query --goal "find submit button" --snapshot main --frame login --budget 150 --json',
            "him query --goals goals.jsonl --snapshot main --json",
            'him query --goal "find submit button" --snapshot main --plan-only > plan.json',
        ],
    )(query)
    command(program, "prefetch", ["him prefetch --plan plan.json", "him prefetch --plan plan.json --json"])(prefetch)
    command(
        program,
        "replay",
        [
            "him replay --trace tr_01JD0Q4M8R3V5X7Z9B1C3D5F7H",
            "him replay --snapshot main --trace tr_01JD0Q4M8R3V5X7Z9B1C3D5F7H --json",
            "him replay --list",
        ],
    )(replay)


@dataclass(frozen=True, slots=True)
class Goal:
    """One question: the goal, and what the caller calls it."""

    goal: str
    frame: str | None
    budget_ms: int
    id: object = None
    named: bool = False

    @property
    def label(self) -> dict[str, object]:
        """What the caller calls it, to begin the answer's object with."""
        return {"id": self.id} if self.named else {}

    @property
    def name(self) -> str:
        """The same for a person."""
        return f"{self.id}: " if self.named else ""


def query(
    context: typer.Context,
    snapshot: SnapshotOption,
    goal: Annotated[str | None, typer.Option("--goal", metavar="TEXT", help="What to find, in plain words.")] = None,
    goals: Annotated[
        str | None,
        typer.Option(
            "--goals", metavar="FILE.jsonl", help='A {"goal","id"?,"frame"?,"budget_ms"?} a line; - for stdin.'
        ),
    ] = None,
    frame: FrameOption = None,
    budget: Annotated[
        int, typer.Option("--budget", min=1, max=3_600_000, help="Milliseconds an answer may take.")
    ] = BUDGET_MS,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Print the plan as JSON and read no tile.")] = False,
    repo: RepoOption = None,
    no_daemon: NoDaemonOption = False,
    json: JsonOption = False,
) -> None:
    """Find something on the remembered screens, within a time budget."""
    session = session_of(context)
    if (goal is None) == (goals is None):
        raise UsageError("give either --goal or --goals", fix="--goal TEXT for one question, --goals FILE for many")
    if goal is not None:
        asked = [Goal(checked_goal(goal), frame, budget)]
    else:
        asked = list(read_goals(session, goals or "", frame, budget))
    startup = Startup(session)
    failed = 0
    with session.repository(repo) as repository:
        repository.snapshot(snapshot)  # an unknown one is one error, not one a goal
        for one in asked:
            try:
                if plan_only:
                    found = repository.plan(one.goal, snapshot, frame=one.frame, budget_ms=one.budget_ms)
                    session.json({**one.label, **plan_json(found)})
                else:
                    say(session, one, answered(repository, one, snapshot, startup), as_json=json)
            except HimError as error:
                if goal is not None:
                    raise
                failed = failed or error.exit_code
                session.json({**one.label, **error.as_dict()}) if json else session.say(
                    f"{one.name}error: {error.line()}"
                )
            session.out.flush()
    if failed:
        raise typer.Exit(failed)


class Startup:
    """Milliseconds from the start of the caller's process to the receipt of its first goal."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._taken: float | None = None

    def __call__(self) -> float:
        """The same for every goal of a run: what came before them all."""
        if self._taken is None:
            self._taken = self._session.startup_ms()
        return self._taken


def answered(repository: "him.Repository", goal: Goal, snapshot: str, startup: Startup) -> "Answer":
    """One answer."""
    return repository.query(goal.goal, snapshot, frame=goal.frame, budget_ms=goal.budget_ms, startup=startup)


def checked_goal(goal: str) -> str:
    """A goal that is not empty and not too long. Raises UsageError, LimitError."""
    if not goal.strip():
        raise UsageError("the goal is empty", fix="say what to find, such as --goal \"find button 'Submit'\"")
    if len(goal) > GOAL_CHARS_MAX:
        raise LimitError(f"the goal has {len(goal)} characters, more than {GOAL_CHARS_MAX}")
    return goal


def read_goals(session: Session, path: str, frame: str | None, budget_ms: int) -> Iterator[Goal]:
    """The questions of a file, checked before the first is asked. Raises UsageError, LimitError."""
    if path == "-":
        if session.stdin is None:
            raise UsageError("no standard input here")
        text = session.stdin.read(TREE_BYTES_MAX + 1)
    else:
        text = read_text(session.path(path), TREE_BYTES_MAX)
    if len(text) > TREE_BYTES_MAX:
        raise LimitError(f"more than {TREE_BYTES_MAX} characters of goals")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield parse_goal(line, f"{path}:{number}", frame, budget_ms)


def parse_goal(line: str, place: str, frame: str | None, budget_ms: int) -> Goal:
    """One line of a goals file; what it leaves out comes from the command line. Raises UsageError."""
    value = parse_object(line, place)
    goal, own_frame, own_budget = value.get("goal"), value.get("frame"), value.get("budget_ms")
    if not isinstance(goal, str):
        raise UsageError('"goal" is not a text', place=place)
    if own_frame is not None and not isinstance(own_frame, str):
        raise UsageError('"frame" is not a text', place=place)
    if own_budget is not None and (not isinstance(own_budget, int) or isinstance(own_budget, bool) or own_budget < 1):
        raise UsageError('"budget_ms" is not a whole number above 0', place=place)
    return Goal(
        goal=checked_goal(goal),
        frame=frame if own_frame is None else own_frame,
        budget_ms=budget_ms if own_budget is None else own_budget,
        id=value.get("id"),
        named="id" in value,
    )


def parse_object(text: str, place: str) -> dict[str, object]:
    """A JSON object. Raises UsageError."""
    try:
        value: object = jsonlib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON ({error})", place=place) from error
    if not isinstance(value, dict):
        raise UsageError("not a JSON object", place=place)
    return cast("dict[str, object]", value)


def read_text(path: Path, limit_bytes: int) -> str:
    """A text file of limited size. Raises LimitError, UsageError, OSError."""
    try:
        return read_bytes(path, limit_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError("the file is not UTF-8 text", object=str(path)) from error


def plan_json(plan: "QueryPlan") -> dict[str, object]:
    """A plan in the form of the wire (spec §2.2), as `him prefetch --plan` takes it."""
    return {
        "goal": plan.goal,
        "snapshot_id": plan.snapshot_id,
        "directory": plan.directory,
        "frame": plan.frame,
        "tile_ids": plan.tile_ids,
        "tiles": [
            {
                "tile_id": tile.tile_id,
                "stream": tile.stream,
                "frame": tile.frame,
                "level": tile.level,
                "x": tile.x,
                "y": tile.y,
            }
            for tile in plan.tiles
        ],
        "coarse": [list(cell) for cell in plan.coarse],
        "rois": [[frame, list(box)] for frame, box in plan.rois],
        "acceptance": plan.acceptance,
        "budget_ms": plan.budget_ms,
    }


def say(session: Session, goal: Goal, answer: "Answer", *, as_json: bool) -> None:
    """Print an answer."""
    from him.app import answer_line

    if not as_json:
        say_answer(session, goal, answer.as_json())
    elif goal.named:
        session.json({**goal.label, **answer.as_json()})
    else:
        # The very line that a replay compares byte for byte.
        session.out.write(answer_line(answer) + "\n")


def say_answer(session: Session, goal: Goal, value: Mapping[str, object]) -> None:
    """An answer for a person."""
    box = value["bbox"]
    where = f"{value['frame']} {box}" if box else ""
    sure = f"p {value['confidence']}"
    session.say("  ".join(filter(None, (f"{goal.name}{value['status']}", where, sure, f"{value['elapsed_ms']} ms"))))
    if value["reason"]:
        session.say(f"  {value['reason']}")
    if not box:
        for candidate in objects(value["candidates"]):
            words = (candidate[name] for name in ("frame", "bbox", "type", "text"))
            session.say("  candidate " + " ".join(map(str, words)))
    session.say(f"  trace {value['trace_id']}")


def prefetch(
    context: typer.Context,
    plan: Annotated[str, typer.Option("--plan", metavar="FILE.json", help="What `him query --plan-only` printed.")],
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Look which tiles of a plan are warm (staging comes with a cold tier)."""
    session = session_of(context)
    value = parse_object(read_text(session.path(plan), META_BYTES_MAX), plan)
    with session.repository(repo) as repository:
        found = repository.prefetch(value)
    if json:
        session.json(found)
    else:
        session.say("  ".join(f"{key} {count}" for key, count in found.items()))


def replay(
    context: typer.Context,
    trace: Annotated[str | None, typer.Option("--trace", metavar="TRACE", help="The trace's id (tr_…).")] = None,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", metavar="NAME", help="Check that it exists; a trace names its own.")
    ] = None,
    list_traces: Annotated[bool, typer.Option("--list", help="List the traces instead.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Always so; accepted for scripts.")] = True,
    repo: RepoOption = None,
    no_daemon: NoDaemonOption = False,
    json: JsonOption = False,
) -> None:
    """Compute a recorded answer again and compare it byte for byte; exits with 7 when it differs."""
    session = session_of(context)
    if (trace is None) == (not list_traces):
        raise UsageError("give either --trace or --list", fix="`him replay --list` shows the traces")
    with session.repository(repo) as repository:
        if trace is None:
            for known in repository.traces():
                session.json({"trace_id": known}) if json else session.say(known)
            return
        if snapshot is not None:
            repository.snapshot(snapshot)
        value = repository.replay(trace).as_json()
    if json:
        session.json(value)
    else:
        say_replay(session, value)
    if value["identical"] is not True:
        raise typer.Exit(EXIT_NOT_IDENTICAL)


def say_replay(session: Session, value: Mapping[str, object]) -> None:
    """A replay's report for a person."""
    session.say(
        f"{'identical' if value['identical'] is True else 'NOT identical'}  grade {value['grade']}  "
        f"{value['steps']} steps: {value['recomputed']} recomputed, {value['from_trace']} from the trace"
    )
    if value["first_divergence"]:
        session.say(f"  first difference: {value['first_divergence']}")
