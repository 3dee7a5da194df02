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
from him.query.plan import Cell, coarse_cells
from him.query.score import (
    EXACT,
    FULL,
    TIE_MARGIN,
    Features,
    Match,
    meaning,
    ranked,
    role_fit,
    scored,
    similarity,
    texts,
)
from him.types import Box, Node

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


def _anchors(rows: SnapshotRows, text: str) -> list[tuple[str, Box]]:
    """Places of what a goal names as the target's surroundings."""
    near = [row for row, _ in top(rows.grams.scores(text), CANDIDATES_MAX)]
    named = [row for row in near if similarity(text, rows.contents[row].text) >= EXACT]
    return [(rows.place(at)[0], rows.box(at)) for row in named for at in rows.occurrences(row).tolist()]


def _relation(box: Box, anchor: Box) -> tuple[int, int]:
    """(0 inside, 1 in its row, 2 elsewhere; distance in pixels) of a place to what it is said to be near."""
    if anchor.contains_point(*box.centre):
        return 0, 0
    dx = max(0, box.x - anchor.x - anchor.w, anchor.x - box.x - box.w)
    dy = max(0, box.y - anchor.y - anchor.h, anchor.y - box.y - box.h)
    return (1 if dy == 0 else 2), dx + dy


def _nearest(equal: list[Match], anchors: list[tuple[str, Box]]) -> Match | None:
    """The one place that alone is inside or in the row of an anchor, or is nearer by far than the next."""
    found = [
        (min(places), number)
        for number, match in enumerate(equal)
        if (places := [_relation(match.box, box) for frame, box in anchors if frame == match.frame])
    ]
    found.sort()
    if not found:
        return None
    alone = len(found) == 1 or found[0][0][0] < found[1][0][0] or 2 * found[0][0][1] < found[1][0][1]
    return equal[found[0][1]] if alone else None


def settled(rows: SnapshotRows, goal: Goal, matches: list[Match]) -> list[Match]:
    """Break a tie at the top by what the goal says: "the second …", "… in the 'Users' table"; else leave it."""
    equal = [match for match in matches if match.evidence > matches[0].evidence - TIE_MARGIN]
    chosen: Match | None = None
    if len(equal) > 1 and goal.ordinal:
        ordered = sorted(equal, key=lambda match: (match.frame, match.box.y, match.box.x))
        at = goal.ordinal - 1 if goal.ordinal > 0 else goal.ordinal
        chosen = ordered[at] if -len(ordered) <= at < len(ordered) else None
    elif len(equal) > 1 and goal.context:
        chosen = _nearest(equal, _anchors(rows, goal.context))
    if chosen is None:
        return matches
    ahead = matches[0].evidence + 2 * TIE_MARGIN - chosen.evidence
    raised = msgspec.structs.replace(chosen, evidence=chosen.evidence + ahead, score=chosen.score + ahead)
    return [raised, *(match for match in matches if match is not chosen)]


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
        if goal.text:
            text, label = texts(goal, content.text, content.label)
        else:
            text, label = FULL, 0  # only a role was asked for, and these have it
        guess = 9 * max(text, label) // 10
        cosine = meaning(int(near.all[number])) if near is not None else guess
        words = int(worded.all[number]) if worded is not None and goal.text else guess
        for place in rows.occurrences(number)[:OCCURRENCES_MAX].tolist():
            frame, node = rows.place(place)
            role = role_fit(goal.role, node.type, node.source)
            features = Features(text, label, role, cosine, words, _seen(node), len(goal.text))
            matches.append(scored(goal, place, frame, node, content.label, features))
    matches.sort(key=lambda match: (-match.score, match.frame, match.box.y, match.box.x, match.node))
    best = ranked(matches[:MATCHES_MAX])[:CANDIDATES_MAX]
    return settled(rows, goal, best) if best else best
