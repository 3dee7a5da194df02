"""The read path: plan → fetch → fuse → locate → accept (spec §2.3).

`run.answer` runs it all under a budget and a recorder. Step by step:

    goal = parse("find button 'Submit'")
    made = plan(goal, source, encoder, snapshot_id=…, directory=…)
    tiles = fetch(made, source)
    state = fuse(made, tiles, source)
    candidates = locate(state, goal, encoder=encoder)
"""

from him.config import BUDGET_MS
from him.ports import TextEncoder
from him.query import search as _search
from him.query.fetch import Tiles, fetch
from him.query.fuse import Buffer, State, fuse
from him.query.goal import Goal, parse
from him.query.locate import found, locate
from him.query.plan import make as _make
from him.query.run import Answer, answer
from him.query.source import QuerySource
from him.types import QueryPlan


def plan(
    goal: Goal | str,
    source: QuerySource,
    encoder: TextEncoder | None = None,
    *,
    frame: str | None = None,
    budget_ms: int = BUDGET_MS,
    snapshot_id: str = "",
    directory: str = "",
) -> QueryPlan:
    """The tiles a query would read, without reading any; by words alone when no encoder is given.

    Raises:
        UsageError: the goal is empty or too long.
        NotFoundError: `frame` is unknown.
        IntegrityError: stored bytes are damaged.
    """
    goal = parse(goal) if isinstance(goal, str) else goal
    rows = source.rows(frame)
    matches = found(rows, goal, encoder)
    return _make(
        goal,
        source,
        rows,
        matches,
        _search.cells_of(matches, rows),
        frame=frame,
        snapshot_id=snapshot_id,
        directory=directory,
        budget_ms=budget_ms,
    )


__all__ = [
    "Answer",
    "Buffer",
    "Goal",
    "QueryPlan",
    "QuerySource",
    "State",
    "Tiles",
    "answer",
    "fetch",
    "fuse",
    "locate",
    "parse",
    "plan",
]
