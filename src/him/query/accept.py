"""When to answer: accepted, tentative, ambiguous, absent or deadline, with the reason in a sentence."""

from collections.abc import Sequence
from typing import Final

import msgspec

from him.config import ACCEPT_CONFIDENCE, REJECT_CONFIDENCE
from him.query.calibrate import Calibrator, confidence
from him.query.fuse import State
from him.query.goal import Goal
from him.query.score import TIE_MARGIN, Match
from him.types import Candidate

FOUND: Final = ("accepted", "tentative")


class Verdict(msgspec.Struct, frozen=True):
    """The decision; `choice` is the candidate answered with, if any; `confidence` is P(box is right)."""

    status: str
    reason: str
    choice: Candidate | None = None
    confidence: float = 0.0


def _named(goal: Goal) -> str:
    return f"'{goal.text}'" if goal.text else f"a {goal.role}"


def accept(
    goal: Goal, matches: Sequence[Match], candidates: Sequence[Candidate], state: State, *, calibrator: Calibrator
) -> Verdict:
    """Decide from all matches and the candidates whose tiles are as they were read. Pure."""
    what = _named(goal)
    if not matches:
        return Verdict("absent", f"nothing visible resembles {what}")
    best = matches[0]
    equal = [match for match in matches if match.evidence > best.evidence - TIE_MARGIN]
    alone = confidence(calibrator, goal, best, matches[len(equal) :])
    if alone < REJECT_CONFIDENCE:
        stale = " (some tiles changed since they were read; ingest again)" if state.stale else ""
        return Verdict("absent", f"the nearest to {what} is '{best.text[:60]}', too unlike it{stale}", None, alone)
    if state.is_stale(best.frame, best.box):
        return Verdict("absent", f"the tiles under {what} changed since they were read; ingest the frame again")
    if len(equal) > 1:
        frames = len({match.frame for match in equal})
        where = f"on {frames} frames" if frames > 1 else "on this frame"
        p = max((candidate.confidence for candidate in candidates), default=0.0)
        return Verdict("ambiguous", f"{len(equal)} places {where} fit {what} equally well", None, min(p, 0.5))
    if not candidates or not state.is_read(best.frame, best.box):
        return Verdict("deadline", f"{what} was found but its tiles could not be read within the plan")
    choice = candidates[0]
    shown = f"{choice.type} '{choice.text[:60]}'"
    if choice.confidence >= ACCEPT_CONFIDENCE:
        return Verdict("accepted", f"{shown} fits {what}", choice, choice.confidence)
    if choice.confidence >= REJECT_CONFIDENCE:
        return Verdict("tentative", f"{shown} is the best fit for {what}, but not certain", choice, choice.confidence)
    return Verdict("absent", f"the nearest to {what} is {shown}, too unlike it", None, choice.confidence)
