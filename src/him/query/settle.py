"""What a goal says beyond text and role: which of equal places is meant, and which control a text stands beside."""

from typing import Final

import msgspec

from him.config import CANDIDATES_MAX
from him.index import SnapshotRows
from him.index.roles import role_of
from him.index.vector import top
from him.query.goal import Goal, region_name
from him.query.likeness import EXACT, similarity
from him.query.score import CONTROLS, ROLE_WEIGHT, TEXT_WEIGHT, TIE_MARGIN, Match, lexical, role_fit
from him.types import Box, Node

BESIDE_MALUS: Final = 30
_MARKS: Final = frozenset({"checkbox", "radio", "switch"})
_TEXTS: Final = frozenset({"text", "label", "button", "cell", ""})
"""Roles that what names a control may have been taken for."""


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
        anchors = _anchors(rows, goal.context)
        if not anchors and not goal.quoted:
            anchors = _anchors(rows, region_name(goal.context))
        chosen = _nearest(equal, anchors)
    if chosen is None:
        return matches
    ahead = matches[0].evidence + 2 * TIE_MARGIN - chosen.evidence
    raised = msgspec.structs.replace(chosen, evidence=chosen.evidence + ahead, score=chosen.score + ahead)
    return [raised, *(match for match in matches if match is not chosen)]


def _beside(text: Box, control: Box, role: str) -> int | None:
    """How far a control is from the text that may name it, in pixels, or None where a name never stands.

    Distances allowed are measured in heights of the text, so that they hold at any scale.
    """
    unit = min(max(text.h, 10), 40)
    if role in _MARKS:
        apart = max(control.x - text.x - text.w, text.x - control.x - control.w)
        level = abs(2 * control.y + control.h - 2 * text.y - text.h) // 2
        return max(0, apart) + level if -unit <= apart <= 2 * unit and level <= unit else None
    below = control.y - text.y - text.h
    if -unit // 3 <= below <= 3 * unit // 2 and -unit <= text.x - control.x + 10 * unit <= 11 * unit:
        return 2 * max(0, below) + abs(text.x - control.x) // 2
    gap, drop = control.x - text.x - text.w, text.y - control.y
    low = max(control.h - text.h, 0)
    if -unit <= gap <= 12 * unit and -unit // 2 <= drop <= min(low + unit // 2, 2 * unit + control.h // 2):
        return max(0, gap) + 4
    return None


def with_neighbours(rows: SnapshotRows, goal: Goal, matches: list[Match]) -> list[Match]:
    """Matches, where a text that names an unnamed control beside it stands for that control.

    Only when a control is asked for and the text itself is none. A scene's own label edges count more; they miss
    high text areas, labels within a frame of their own and fields behind a prefix.
    """
    if goal.role not in CONTROLS:
        return matches
    named = [match for match in matches if max(match.features.text, match.features.label) >= EXACT]
    taken = {(match.frame, match.node) for match in named}
    used = {(match.frame, label) for match in named for label in match.labels}
    found: list[Match] = []
    for match in matches:
        free = role_of(match.type) in _TEXTS and match.features.role < 1 and (match.frame, match.node) not in used
        control = _nearest_control(rows, match, taken) if free and match.features.text >= EXACT else None
        if control is None:
            found.append(match)
            continue
        role = role_fit(goal.role, control.type, control.source)
        features = match.features._replace(text=0, label=match.features.text - BESIDE_MALUS, beside=1, role=role)
        evidence = TEXT_WEIGHT * lexical(goal, features, control.type) + ROLE_WEIGHT * role
        found.append(
            msgspec.structs.replace(
                match, node=control.id, box=control.bbox, type=control.type, source=control.source, features=features,
                evidence=evidence, score=evidence + match.score - match.evidence,
            )
        )  # fmt: skip
    return found


def _nearest_control(rows: SnapshotRows, match: Match, taken: set[tuple[str, str]]) -> Node | None:
    frame = int(rows.frame[match.place])
    nodes, relations = rows.frames[frame].scene.nodes, rows.relations(frame)
    near = [
        (cost, number)
        for number, node in enumerate(nodes)
        if role_of(node.type) in CONTROLS
        and (match.frame, node.id) not in taken
        # A mark stands close to its text, so an edge to another text is to be believed.
        and not (role_of(node.type) in _MARKS and relations.labels(node.id))
        and (cost := _beside(match.box, node.bbox, role_of(node.type))) is not None
    ]
    return nodes[min(near)[1]] if near else None
