"""Which elements may be meant: proposals by meaning, words and letters, then one exact score for each place."""

from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from him.config import CANDIDATES_MAX
from him.index import SnapshotRows
from him.index.roles import role_of, role_word
from him.index.text import SCORE_SCALE
from him.index.vector import scan, top
from him.ports import TextEncoder
from him.query.goal import Goal
from him.query.likeness import FULL
from him.query.plan import Cell, coarse_cells
from him.query.score import Features, Fit, Match, fit_of, is_line, meaning, ranked, role_in_place, scored
from him.query.settle import settled, with_neighbours
from him.types import Node

OCCURRENCES_MAX: Final = 1_000
"""Places of one row that are scored; more equal ones change no decision."""
MATCHES_MAX: Final = 200
"""Places that are compared with one another."""


class Scored(NamedTuple):
    """Rows with scores, best first, and the score of every row (for the features)."""

    best: list[tuple[int, int]]
    all: NDArray[np.int64]


def goal_text(goal: Goal) -> str:
    """What is embedded for a goal: the shape of `him.index.row_text`."""
    return ", ".join(part for part in (goal.text, role_word(goal.role) if goal.role else "") if part) or goal.raw


def embed(goal: Goal, encoder: TextEncoder) -> NDArray[np.int8]:
    """(EMBEDDING_DIMS,) int8 vector of the goal."""
    return encoder.encode([goal_text(goal)])[0]


def by_meaning(rows: SnapshotRows, vector: NDArray[np.int8]) -> Scored:
    """Nearest rows by exact dot product."""
    dots = scan(rows.vectors, vector)
    return Scored(top(dots, CANDIDATES_MAX), dots)


def by_words(rows: SnapshotRows, goal: Goal) -> Scored:
    """Rows by BM25; `all` holds the share of the goal's words each row has, per mille."""
    query = goal.text or goal.raw
    share = rows.words.coverage(query) * FULL // SCORE_SCALE
    return Scored(top(rows.words.scores(query), CANDIDATES_MAX), share)


def by_letters(rows: SnapshotRows, goal: Goal) -> set[int]:
    """Rows that share trigrams with any variant of the target: exact, contained and misread texts."""
    return {row for text in goal.variants for row, _ in top(rows.grams.scores(text), CANDIDATES_MAX)}


def coarse(rows: SnapshotRows, scores: NDArray[np.int64]) -> tuple[Cell, ...]:
    """Coarse cells by the best visible row under each; `scores` is (n_rows,)."""
    return coarse_cells(rows, np.arange(len(rows.row), dtype=np.int64), scores[rows.row])


def cells_of(matches: Iterable[Match], rows: SnapshotRows) -> tuple[Cell, ...]:
    """Coarse cells by the fused scores: the same rule as `coarse`, on what is known once words count too."""
    best = list(matches)
    places = [match.place for match in best]
    scores = [match.score for match in best]
    return coarse_cells(rows, np.array(places, dtype=np.int64), np.array(scores, dtype=np.int64))


def _of_role(rows: SnapshotRows, role: str) -> set[int]:
    return {number for number, content in enumerate(rows.contents) if role_of(content.type) == role}


def _seen(node: Node) -> int:
    return round(FULL * min(1.0, max(0.0, node.confidence)))


def fuse_scores(rows: SnapshotRows, goal: Goal, near: Scored | None, worded: Scored | None) -> list[Match]:
    """Every proposed place with its final score, best first, at most CANDIDATES_MAX.

    A pure function of goal, rows and of whether `near` and `worded` were computed. A feature that was skipped is
    taken to agree with the text.
    """
    proposed = by_letters(rows, goal) if goal.text else _of_role(rows, goal.role)
    for found in (near, worded):
        if found is not None and goal.text:
            proposed |= {row for row, _ in found.best}
    matches: list[Match] = []
    for number in sorted(proposed):
        content = rows.contents[number]
        # When only a role was asked for, these have it.
        fit = fit_of(goal, content.text, content.label) if goal.text else Fit(FULL, 0, None)
        guess = 9 * max(fit.text, fit.label) // 10
        cosine = meaning(int(near.all[number])) if near is not None else guess
        words = int(worded.all[number]) if worded is not None and goal.text else guess
        share = max(1, FULL * (fit.part[1] - fit.part[0]) // fit.part[2]) if fit.part else 0
        for place in rows.occurrences(number)[:OCCURRENCES_MAX].tolist():
            frame, node = rows.place(place)
            role = role_in_place(goal.role, node, rows.relations(int(rows.frame[place])))
            part = share if is_line(node) else 0
            chars = len(goal.text)
            features = Features(fit.text, fit.label, part, 0, role, cosine, words, _seen(node), chars)
            matches.append(scored(goal, place, frame, node, fit, content.label, features))
    matches.sort(key=lambda match: (-match.score, match.frame, match.box.y, match.box.x, match.node))
    known = [_labelled(rows, match) for match in matches[:MATCHES_MAX]]
    best = ranked(with_neighbours(rows, goal, known))[:CANDIDATES_MAX]
    return settled(rows, goal, best) if best else best


def _labelled(rows: SnapshotRows, match: Match) -> Match:
    found = rows.relations(int(rows.frame[match.place])).labels(match.node)
    return msgspec.structs.replace(match, labels=found) if found else match
