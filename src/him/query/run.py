"""THE READ PATH, top-down, one stage after another as in `STAGES`.

Each stage's canonical input and output go to the recorder, and so does everything that is not a function of goal and
stored bytes: clock readings and the decision to start a stage. A replay with those from the trace gives equal bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from him.config import ACCEPT_CONFIDENCE, ANSWER_CANDIDATES_MAX, BUDGET_MS
from him.errors import UsageError
from him.index import SnapshotRows
from him.ports import Clock, Recorder, TextEncoder
from him.query import search
from him.query.accept import FOUND, Verdict, accept
from him.query.calibrate import Calibrator, shipped
from him.query.fetch import Tiles, fetch
from him.query.fuse import State, fuse
from him.query.goal import Goal, parse
from him.query.locate import locate
from him.query.plan import make
from him.query.score import Match
from him.query.source import QuerySource
from him.types import Candidate, QueryPlan

STAGES: Final = (
    "parse",
    "rows",
    "embed",
    "coarse",
    "localise",
    "bm25",
    "fuse_scores",
    "plan",
    "fetch",
    "locate",
    "accept",
)
OPTIONAL: Final = frozenset({"embed", "coarse", "localise", "bm25"})
"""Stages that may be skipped; the others are needed for an answer."""
P95_MS: Final[Mapping[str, float]] = {
    "parse": 5,
    "rows": 2,
    "embed": 12,
    "coarse": 1,
    "localise": 5,
    "bm25": 4,
    "fuse_scores": 20,
    "plan": 3,
    "fetch": 45,
    "locate": 4,
    "accept": 1,
    "serialise": 9,
}
"""What a stage is assumed to take until its own p95 has been learned (the budget line of design §8, which has 41 for
fusing and reranking; scoring each place is what there is of that)."""
_NEEDS: Final = {"coarse": "embed", "localise": "embed"}
_NS_PER_MS: Final = 1_000_000

T = TypeVar("T")


class Answer(msgspec.Struct, frozen=True):
    """The answer to a goal; `as_json` is the contract of `him query --json`."""

    status: str
    reason: str
    frame: str | None
    snapshot_id: str
    choice: Candidate | None
    confidence: float
    plan: QueryPlan
    candidates: tuple[Candidate, ...]
    stages_ms: dict[str, float]
    skipped: tuple[str, ...]
    elapsed_ms: float
    startup_ms: float
    trace_id: str

    @property
    def found(self) -> bool:
        """Whether a box is answered."""
        return self.status in FOUND

    def as_json(self) -> dict[str, Any]:
        """The contract's dict: its keys in its order, confidences to 4 decimals, milliseconds to 2."""
        return {
            "status": self.status,
            "found": self.found,
            "frame": self.frame,
            "snapshot_id": self.snapshot_id,
            "bbox": list(self.choice.bbox) if self.choice else None,
            "confidence": round(self.confidence, 4),
            "reason": self.reason,
            "plan": {
                "directory": self.plan.directory,
                "tile_ids": self.plan.tile_ids,
                "tiles": [msgspec.to_builtins(tile) for tile in self.plan.tiles],
                "acceptance": self.plan.acceptance,
                "budget_ms": self.plan.budget_ms,
            },
            "candidates": [
                {
                    "bbox": list(one.bbox),
                    "frame": one.frame,
                    "text": one.text,
                    "type": one.type,
                    "confidence": round(one.confidence, 4),
                }
                for one in self.candidates
            ],
            "stages_ms": {name: round(ms, 2) for name, ms in self.stages_ms.items()},
            "skipped": list(self.skipped),
            "elapsed_ms": round(self.elapsed_ms, 2),
            "startup_ms": round(self.startup_ms, 2),
            "trace_id": self.trace_id,
        }


class _OutOfTime(Exception):
    """A needed stage does not fit what is left of the budget."""


def _canonical(value: object) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


def _believed(name: str, learned_ms: float) -> float:
    """A learned p95 within bounds: a stage that one bad minute rules out would never run and be learned again."""
    return min(learned_ms, P95_MS[name] * (2 if name in OPTIONAL else 1))


class _Stages:
    """Runs stages under a budget and tells the recorder; knows nothing of what they do."""

    def __init__(
        self, recorder: Recorder, clock: Clock, budget_ms: int, p95_ms: Mapping[str, float], received_ns: int | None
    ) -> None:
        self._recorder = recorder
        self._clock = clock
        self._budget_ms = budget_ms
        self._p95_ms = {name: _believed(name, p95_ms.get(name, known)) for name, known in P95_MS.items()}
        self._last_ns = self._read(received_ns)
        self._start_ns = self._last_ns
        self.took_ms: dict[str, float] = {}
        self.skipped: list[str] = []

    def _read(self, known_ns: int | None = None) -> int:
        # Clock readings reach the answer (stages_ms, elapsed_ms), so a replay takes them from the trace.
        made = self._recorder.effect("clock", lambda: b"%d" % (known_ns or self._clock.monotonic_ns()))
        return int(made)

    @property
    def elapsed_ms(self) -> float:
        """From receipt to the last clock reading."""
        return (self._last_ns - self._start_ns) / _NS_PER_MS

    def _fits(self, name: str) -> bool:
        need = self._p95_ms[name]
        if name in OPTIONAL:
            # A stage that may be left out must also leave time for those that may not.
            later = STAGES[STAGES.index(name) + 1 :]
            need += sum(self._p95_ms[one] for one in (*later, "serialise") if one not in OPTIONAL)
        fits = self.elapsed_ms + need <= self._budget_ms and _NEEDS.get(name) not in self.skipped
        # An effect: learned p95s change, and a replay must skip what was skipped.
        return self._recorder.effect("start", lambda: b"1" if fits else b"0") == b"1"

    def run(self, name: str, inputs: Callable[[], object], work: Callable[[], T], output: Callable[[T], object]) -> T:
        """Run a stage and note its canonical input, output and duration.

        Raises:
            _OutOfTime: it is needed and does not fit the budget.
        """
        if not self._fits(name):
            raise _OutOfTime(name)
        result = work()
        self._recorder.step(name, _canonical(inputs()), _canonical(output(result)))
        now_ns = self._read()
        self.took_ms[name] = (now_ns - self._last_ns) / _NS_PER_MS
        self._last_ns = now_ns
        return result

    def maybe(
        self, name: str, inputs: Callable[[], object], work: Callable[[], T], output: Callable[[T], object]
    ) -> T | None:
        """Run an optional stage, or note that it was skipped and return None."""
        try:
            return self.run(name, inputs, work, output)
        except _OutOfTime:
            self.skipped.append(name)
            return None

    def finish(self) -> bool:
        """Whether the answer comes within its budget."""
        return self.elapsed_ms <= self._budget_ms


class _Query:
    """One run over one snapshot: the stages in order, keeping what is known when time runs out."""

    def __init__(
        self,
        stages: _Stages,
        source: QuerySource,
        encoder: TextEncoder,
        calibrator: Calibrator,
        blank: QueryPlan,
    ) -> None:
        self.stages = stages
        self.source = source
        self.encoder = encoder
        self.calibrator = calibrator
        self.plan = blank
        self.candidates: tuple[Candidate, ...] = ()

    def answer(self) -> Verdict:
        """Run all stages; a verdict of `deadline` when a needed one does not fit."""
        try:
            verdict = self._run()
        except _OutOfTime as late:
            return Verdict("deadline", f"no time left for stage {late.args[0]} in {self.plan.budget_ms} ms")
        if not self.stages.finish():
            took = round(self.stages.elapsed_ms)
            return Verdict("deadline", f"the answer took {took} ms of {self.plan.budget_ms} ms")
        return verdict

    def _run(self) -> Verdict:
        text = self.plan.goal
        goal = self.stages.run("parse", lambda: text, lambda: parse(text), lambda made: made)
        where = self.plan
        rows = self.stages.run(
            "rows",
            lambda: (where.directory, where.frame),
            lambda: self.source.rows(where.frame),
            lambda made: made.digest,
        )
        matches = self._search(goal, rows)
        self._plan(goal, rows, matches)
        tiles = self._fetch()
        state = self._locate(goal, rows, matches, tiles)
        return self.stages.run(
            "accept",
            lambda: (self.calibrator.digest(), self.candidates),
            lambda: accept(goal, matches, self.candidates, state, calibrator=self.calibrator),
            lambda made: made,
        )

    def _search(self, goal: Goal, rows: SnapshotRows) -> list[Match]:
        run = self.stages
        vector = run.maybe(
            "embed",
            lambda: (search.goal_text(goal), self.encoder.pin()),
            lambda: search.embed(goal, self.encoder),
            lambda made: made.tobytes(),
        )
        near: search.Scored | None = None
        if vector is not None:
            query = vector
            scan = run.maybe(
                "coarse",
                lambda: (rows.digest, query.tobytes()),
                lambda: search.by_meaning(rows, query),
                lambda made: search.coarse(rows, made.all),
            )
            if scan is not None:
                near = run.maybe("localise", lambda: rows.digest, lambda: scan, lambda made: made.best)
        elif "coarse" not in run.skipped:
            run.skipped += ["coarse", "localise"]
        worded = run.maybe(
            "bm25", lambda: (rows.digest, goal), lambda: search.by_words(rows, goal), lambda made: made.best
        )
        return run.run(
            "fuse_scores",
            lambda: (goal, rows.digest, near and near.best, worded and worded.best),
            lambda: search.fuse_scores(rows, goal, near, worded),
            lambda made: made,
        )

    def _plan(self, goal: Goal, rows: SnapshotRows, matches: Sequence[Match]) -> None:
        blank = self.plan

        def work() -> QueryPlan:
            return make(
                goal,
                self.source,
                rows,
                matches,
                search.cells_of(matches, rows),
                frame=blank.frame,
                snapshot_id=blank.snapshot_id,
                directory=blank.directory,
                budget_ms=blank.budget_ms,
            )

        self.plan = self.stages.run("plan", lambda: (blank.directory, matches), work, lambda made: made)

    def _fetch(self) -> Tiles:
        made = self.plan
        # The tiles' bytes were verified against these ids by the source, so the ids stand for them.
        return self.stages.run(
            "fetch",
            lambda: made.tile_ids,
            lambda: fetch(made, self.source),
            lambda tiles: [(str(key), *values.shape) for key, values in tiles.items()],
        )

    def _locate(self, goal: Goal, rows: SnapshotRows, matches: Sequence[Match], tiles: Tiles) -> State:
        def work() -> tuple[State, tuple[Candidate, ...]]:
            listed = sorted({match.frame for match in matches[:ANSWER_CANDIDATES_MAX]})
            state = fuse(self.plan, tiles, self.source, rows=rows, frames=listed)
            return state, locate(state, goal, matches=matches, calibrator=self.calibrator)

        state, self.candidates = self.stages.run(
            "locate",
            lambda: (self.plan.tile_ids, matches, self.calibrator.digest()),
            work,
            lambda made: (sorted(made[0].stale), sorted(made[0].read), made[1]),
        )
        return state


def answer(
    goal_text: str,
    source: QuerySource,
    recorder: Recorder,
    clock: Clock,
    encoder: TextEncoder,
    *,
    frame: str | None = None,
    budget_ms: int = BUDGET_MS,
    snapshot_id: str,
    directory: str,
    trace_id: str = "",
    startup_ms: float = 0.0,
    received_ns: int | None = None,
    p95_ms: Mapping[str, float] | None = None,
    calibrator: Calibrator | None = None,
) -> Answer:
    """Answer a goal on one snapshot within a budget.

    Args:
        goal_text: what to find, in a person's words.
        source: the snapshot's rows and tiles.
        recorder: takes step digests; makes effects, or gives them from a trace. Effects: "clock" (nanoseconds in
            decimal digits) and "start" (b"1" or b"0", whether a stage began).
        clock: for durations.
        encoder: embeds the goal; warm it before receipt if start-up is to be reported apart.
        frame: search this frame alone.
        budget_ms: from receipt to the returned answer.
        snapshot_id, directory: what the answer is about; `directory` is the hex hash `source` reads.
        trace_id, startup_ms: repeated in the answer.
        received_ns: monotonic time of receipt, when earlier than now.
        p95_ms: learned durations of stages, over `P95_MS`.
        calibrator: the shipped one when left out.

    Raises:
        UsageError: the goal is empty or too long, or the budget is not positive.
        NotFoundError: `frame` is unknown.
        IntegrityError: stored bytes are damaged.
    """
    if budget_ms <= 0:
        raise UsageError(f"the budget must be positive, not {budget_ms} ms")
    stages = _Stages(recorder, clock, budget_ms, p95_ms or {}, received_ns)
    blank = QueryPlan(goal_text, snapshot_id, directory, frame, (), (), (), ACCEPT_CONFIDENCE, budget_ms)
    query = _Query(stages, source, encoder, calibrator or shipped(), blank)
    verdict = query.answer()
    return Answer(
        status=verdict.status,
        reason=verdict.reason,
        frame=verdict.choice.frame if verdict.choice else frame,
        snapshot_id=snapshot_id,
        choice=verdict.choice,
        confidence=verdict.confidence,
        plan=query.plan,
        candidates=query.candidates,
        stages_ms=stages.took_ms,
        skipped=tuple(stages.skipped),
        elapsed_ms=stages.elapsed_ms,
        startup_ms=startup_ms,
        trace_id=trace_id,
    )
