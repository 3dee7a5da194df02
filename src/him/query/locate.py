"""Which of the read elements is meant: candidates with calibrated confidence."""

from collections.abc import Sequence
from typing import Final

from him.config import ANSWER_CANDIDATES_MAX
from him.index import SnapshotRows
from him.index.roles import role_of
from him.ports import TextEncoder
from him.query import search
from him.query.calibrate import Calibrator, confidence, shipped
from him.query.fuse import State, letters
from him.query.goal import Goal
from him.query.score import Match
from him.types import Box, Candidate

LETTERS_ONLY: Final = frozenset({"heading", "text", "label", "cell"})
"""Roles of which nothing but the text is shown."""


def found(rows: SnapshotRows, goal: Goal, encoder: TextEncoder | None) -> list[Match]:
    """The scored matches of a goal, by meaning too when an encoder is given."""
    near = search.by_meaning(rows, search.embed(goal, encoder)) if encoder is not None else None
    return search.fuse_scores(rows, goal, near, search.by_words(rows, goal))


def locate(
    state: State,
    goal: Goal,
    *,
    matches: Sequence[Match] | None = None,
    encoder: TextEncoder | None = None,
    calibrator: Calibrator | None = None,
) -> tuple[Candidate, ...]:
    """Candidates best first, at most ANSWER_CANDIDATES_MAX; none touches a tile that changed since it was read.

    All matches compete for the confidence, also those that are not listed.

    Args:
        state: what `fuse` returned.
        goal: what is looked for.
        matches: the scored matches, when they are known; scored again when left out.
        encoder: used only to score again.
        calibrator: the shipped one when left out.
    """
    matches = found(state.rows, goal, encoder) if matches is None else matches
    model = calibrator or shipped()
    out: list[Candidate] = []
    for place, match in enumerate(matches[:ANSWER_CANDIDATES_MAX]):
        if state.is_stale(match.frame, match.box):
            continue
        rivals = [*matches[:place], *matches[place + 1 :]]
        p = confidence(model, goal, match, rivals)
        out.append(Candidate(box_shown(state, match), match.frame, match.text, match.type, p))
    return tuple(out)


def box_shown(state: State, match: Match) -> Box:
    """The box to answer with: a control whole; of text in a tree the letters, where their pixels were read."""
    if match.source not in ("tree", "fused") or role_of(match.type) not in LETTERS_ONLY:
        return match.box
    buffer = state.buffer(match.frame, match.box)
    return letters(match.box, buffer) if buffer else match.box
