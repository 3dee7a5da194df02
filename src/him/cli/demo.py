"""`him demo`: the main job from end to end on real screens, with the answers checked against saved boxes."""

import json as jsonlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

import him
from him.cli.commands import JsonOption, command
from him.cli.failure import EXIT_CHECK_FAILED
from him.cli.pictures import MarkedBox, draw, paint_over
from him.cli.place import MARKER
from him.cli.session import Session, session_of
from him.config import BUDGET_MS
from him.errors import ConflictError, MissingPartError, NotFoundError, UsageError
from him.types import Box

if TYPE_CHECKING:
    from him.ingest import IngestReport

SHOWN: Final = (
    "g001", "g007", "g049", "g056", "g053", "g033", "g020", "g062", "g066", "g078", "g090", "g102", "g044", "g101",
)  # fmt: skip
"""The goals shown, in this order: every screen, text and fields, with and without a frame, one that stands for several
places, one that is nowhere. `bench/` judges all of them."""
SHOWN_BUDGET_MS: Final = 2_000
"""What is shown is whether answers are right, on any machine; the times taken are printed beside the usual budget."""
NEW_WORD: Final = "Approve"
"""What the changed screen says where it said something else."""


def register(program: typer.Typer) -> None:
    """Add this command to the program."""
    command(
        program,
        "demo",
        [
            "him demo",
            "him demo --out out/demo",
            "him demo my.png --goal \"find button 'Save'\" --goal 'find the search field'",
        ],
    )(demo)


@dataclass(frozen=True, slots=True)
class SavedGoal:
    """A goal with what is right: the boxes come from the page itself, not from HIM."""

    id: str
    goal: str
    frame: str | None
    kind: str
    boxes: tuple[Box, ...]
    screen: str | None


@dataclass(slots=True)
class Asked:
    """A goal with its answer."""

    goal: str
    answer: dict[str, object]
    right: bool | None = None

    @property
    def box(self) -> Box | None:
        """The answered box."""
        return as_box(self.answer["bbox"])

    @property
    def frame(self) -> str:
        """The answered frame."""
        return str(self.answer["frame"])


@dataclass(slots=True)
class Result:
    """What the demo did, as `--json` prints it."""

    out: Path
    ingested: "list[IngestReport]" = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    change: dict[str, object] = field(default_factory=dict)
    replay: dict[str, object] = field(default_factory=dict)
    times_ms: dict[str, float] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether nothing that was checked came out wrong."""
        answers = all(one.right is not False for one in self.asked)
        return answers and self.change.get("right", True) is True and self.replay.get("identical") is True

    def as_json(self) -> dict[str, object]:
        """One object for the whole demo."""
        return {
            "out": str(self.out),
            "agrees": self.agrees,
            "ingested": [report.as_json() for report in self.ingested],
            "asked": [{"goal": one.goal, "right": one.right, **one.answer} for one in self.asked],
            "change": self.change,
            "replay": self.replay,
            "times_ms": self.times_ms,
        }


def demo(
    context: typer.Context,
    picture: Annotated[str | None, typer.Argument(metavar="[MY.png]", help="Your own picture instead.")] = None,
    goal: Annotated[
        list[str] | None, typer.Option("--goal", metavar="TEXT", help="What to find on it; repeatable.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="Where to leave pictures and repository.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Remember real screens, find things on them, change one in a branch, replay an answer."""
    session = session_of(context)
    if (picture is None) != (goal is None):
        raise UsageError("a picture and a --goal belong together", fix="him demo my.png --goal \"find button 'Save'\"")
    if picture is not None and not session.path(picture).is_file():
        raise NotFoundError("no such picture", object=picture, fix="check the path")
    folder = Path(tempfile.mkdtemp(prefix="him-demo-")) if out is None else fresh_folder(session.path(out))
    began = time.perf_counter()
    with him.open(folder / "memory", create=True) as repository:
        repository.warm()
        stage = Stage(session, repository, Result(folder), quiet=json)
        stage.result.times_ms["open and load models"] = since(began)
        if picture is not None:
            stage.own_picture(session.path(picture), goal or [])
        else:
            stage.shipped_screens(screens_folder())
    stage.finish()
    if json:
        session.json(stage.result.as_json())
    if not stage.result.agrees:
        raise typer.Exit(EXIT_CHECK_FAILED)


class Stage:
    """Plays the demo and tells what happens."""

    def __init__(self, session: Session, repository: "him.Repository", result: Result, *, quiet: bool) -> None:
        self.session = session
        self.repository = repository
        self.result = result
        self.quiet = quiet

    def own_picture(self, picture: Path, goals: Sequence[str]) -> None:
        """The main job on the user's picture; nothing is known that could be compared."""
        self.say(f"1. Remember {picture.name}")
        self.ingest(picture, "main")
        self.say("2. Find")
        for goal in goals:
            self.ask(SavedGoal("", goal, None, "", (), None))
        self.draw({picture.stem: picture})
        self.replay()

    def shipped_screens(self, folder: Path) -> None:
        """The main job on the screens that come with HIM."""
        pictures = {path.stem: path for path in sorted(folder.glob("*.png"))}
        self.say(f"1. Remember {len(pictures)} screens (pixels alone; their trees only judge)")
        self.ingest(folder, "main")
        self.say("2. Find, and compare with the boxes saved from the pages themselves")
        for saved in chosen(saved_goals(folder / "goals.jsonl")):
            self.ask(saved)
        self.draw(pictures)
        self.change(pictures)
        self.replay()

    def ingest(self, path: Path, snapshot: str, frame: str | None = None) -> None:
        """Ingest with a bar, noting what it cost."""
        began = time.perf_counter()
        with self.session.progress("reading") as show:
            for report in self.repository.ingest(path, snapshot, frame=frame, progress=show):
                self.result.ingested.append(report)
                self.say(
                    f"   {report.frame}: {report.tiles_written} tiles, {report.elements} elements, {report.ms:.0f} ms"
                )
        self.result.times_ms[f"ingest {path.name}"] = since(began)

    def ask(self, saved: SavedGoal) -> None:
        """Ask one goal and judge the answer."""
        answer = self.query(saved.goal, "main", saved.frame)
        asked = Asked(saved.goal, answer, judged(saved, answer))
        self.result.asked.append(asked)
        where = f"{asked.frame} {list(asked.box)}" if asked.box else str(answer["reason"])
        mark = {True: "✓", False: "✗", None: "·"}[asked.right]
        self.say(f"   {mark} {saved.goal} → {answer['status']} {where}")

    def query(self, goal: str, snapshot: str, frame: str | None = None) -> dict[str, object]:
        """An answer in the form of the wire."""
        found = self.repository.query(goal, snapshot, frame=frame, budget_ms=SHOWN_BUDGET_MS)
        return found.as_json()

    def draw(self, pictures: dict[str, Path]) -> None:
        """Leave a copy of each picture with what was found on it."""
        began = time.perf_counter()
        for name, path in pictures.items():
            marks = [
                MarkedBox(one.box, one.goal, one.right is not False)
                for one in self.result.asked
                if one.box is not None and one.frame == name
            ]
            draw(path, self.result.out / f"{name}.found.png", marks)
        self.result.times_ms["draw pictures"] = since(began)
        self.say(f"   pictures with the boxes: {self.result.out}")

    def change(self, pictures: dict[str, Path]) -> None:
        """Fork, paint over one thing on one screen, and ask both branches."""
        old = next((one for one in self.result.asked if one.right and one.box and one.frame in pictures), None)
        if old is None or old.box is None:
            self.result.change = {"right": False}
            return
        self.say(f"3. Branch, and write {NEW_WORD!r} over what {old.goal!r} found on {old.frame}")
        changed = self.result.out / f"{old.frame}.changed.png"
        paint_over(pictures[old.frame], changed, old.box, NEW_WORD)
        began = time.perf_counter()
        self.repository.branch("experiment", source="main")
        self.result.times_ms["fork"] = since(began)
        before = len(self.result.ingested)
        self.ingest(changed, "experiment", old.frame)
        report = self.result.ingested[before]
        differing = [
            d
            for d in self.repository.snapshot("main").diff(self.repository.snapshot("experiment"))
            if d.get("stream") == "screen" and d.get("level") == 0
        ]
        new_goal = f"find '{NEW_WORD}'"
        asked = {
            (goal, branch): self.query(goal, branch, old.frame)
            for goal in (old.goal, new_goal)
            for branch in ("main", "experiment")
        }
        found_new = as_box(asked[new_goal, "experiment"]["bbox"])
        still_old = as_box(asked[old.goal, "main"]["bbox"])
        gone_old = as_box(asked[old.goal, "experiment"]["bbox"])
        right = (
            found_new is not None
            and old.box.contains_point(*found_new.centre)
            and still_old == old.box
            and (gone_old is None or not old.box.contains_point(*gone_old.centre))
            and as_box(asked[new_goal, "main"]["bbox"]) is None
        )
        self.result.change = {
            "right": right,
            "frame": old.frame,
            "tiles_of_frame": report.tiles_written + report.tiles_reused,
            "tiles_stored": report.tiles_written,
            "tiles_read_again": report.tiles_read,
            "tiles_differing": len(differing),
            "answers": [{"goal": goal, "branch": branch, **value} for (goal, branch), value in asked.items()],
        }
        self.say(
            f"   of {report.tiles_written + report.tiles_reused} tiles, {report.tiles_written} stored and "
            f"{report.tiles_read} read again; the branches differ in {len(differing)}"
        )
        for (goal, branch), value in asked.items():
            self.say(f"   {branch}: {goal} → {value['status']} {value['bbox'] or ''}")
        self.say(f"   {'✓' if right else '✗'} each branch answers for itself")

    def replay(self) -> None:
        """Compute the first answer again and compare every byte."""
        self.say("4. Replay")
        began = time.perf_counter()
        self.result.replay = self.repository.replay(str(self.result.asked[0].answer["trace_id"])).as_json()
        self.result.times_ms["replay"] = since(began)
        value = self.result.replay
        mark = "✓ identical" if value["identical"] is True else f"✗ differs: {value['first_divergence']}"
        self.say(f"   {mark}, {value['recomputed']} of {value['steps']} steps computed again")

    def finish(self) -> None:
        """The table of real timings."""
        elapsed = [float(str(one.answer["elapsed_ms"])) for one in self.result.asked]
        self.result.times_ms |= {"query, median": round(median(elapsed), 1), "query, slowest": round(max(elapsed), 1)}
        within = sum(one <= BUDGET_MS for one in elapsed)
        if not self.quiet:
            rows = [(name, f"{value:.1f}") for name, value in self.result.times_ms.items()]
            self.session.table(("step", "ms"), rows)
            self.session.say(f"{within} of {len(elapsed)} answers within {BUDGET_MS} ms")
            checked = [one for one in self.result.asked if one.right is not None]
            if checked:
                right = sum(one.right is True for one in checked)
                self.session.say(f"{right} of {len(checked)} answers agree with the saved boxes")
            self.session.say(f"everything is left in {self.result.out}")

    def say(self, text: str) -> None:
        """A line of the story."""
        if not self.quiet:
            self.session.say(text)
            self.session.out.flush()


def since(began: float) -> float:
    """Milliseconds since a reading of the performance counter."""
    return round((time.perf_counter() - began) * 1000, 2)


def as_box(value: object) -> Box | None:
    """A box of the wire."""
    if not isinstance(value, list | tuple):
        return None
    x, y, w, h = (int(number) for number in cast("Sequence[int]", value))
    return Box(x, y, w, h)


def judged(saved: SavedGoal, answer: dict[str, object]) -> bool | None:
    """Whether an answer is right: its centre lies in a saved box, or it rightly names none."""
    if not saved.kind:
        return None
    if saved.kind in ("absent", "ambiguous"):
        return answer["status"] == saved.kind
    box = as_box(answer["bbox"])
    if box is None or (saved.screen is not None and answer["frame"] != saved.screen):
        return False
    return any(right.contains_point(*box.centre) for right in saved.boxes)


def saved_goals(path: Path) -> list[SavedGoal]:
    """The goals that come with the screens."""
    found: list[SavedGoal] = []
    for line in path.read_text("utf-8").splitlines():
        if line.strip():
            row = jsonlib.loads(line)
            boxes = tuple(Box(*box) for box in row["boxes"])
            found.append(SavedGoal(row["id"], row["goal"], row["frame"], row["class"], boxes, row["screen"]))
    return found


def chosen(goals: Iterable[SavedGoal]) -> list[SavedGoal]:
    """The goals the demo shows."""
    known = {goal.id: goal for goal in goals}
    return [known[name] for name in SHOWN if name in known]


def screens_folder() -> Path:
    """The shipped screens: inside the installed package, or in the source tree. Raises MissingPartError."""
    package = Path(him.__file__).parent
    for folder in (package / "examples" / "screens", package.parents[1] / "examples" / "screens"):
        if (folder / "goals.jsonl").is_file():
            return folder
    raise MissingPartError("the example screens are not installed", fix="use your own: him demo my.png --goal TEXT")


def fresh_folder(folder: Path) -> Path:
    """The output folder, without the repository an earlier demo left there. Raises ConflictError."""
    folder.mkdir(parents=True, exist_ok=True)
    memory = folder / "memory"
    if (memory / MARKER).is_file():
        shutil.rmtree(memory)
    elif memory.exists():
        raise ConflictError("in the way, and not a repository", place=str(memory), fix="choose another --out")
    return folder
