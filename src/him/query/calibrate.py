"""From match features to a probability: a logistic with coefficients that `bench/calibrate.py` fitted."""

import math
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Final

import msgspec
from blake3 import blake3

from him.errors import IntegrityError
from him.index.roles import role_of
from him.query.goal import Goal
from him.query.likeness import EXACT, FULL
from him.query.score import CLICKABLE, CONTROLS, TIE_MARGIN, Match, lexical

FEATURES: Final = (
    "lexical",
    "exact",
    "part",
    "labelled",
    "beside",
    "role",
    "role_wrong",
    "control_unseen",
    "click_unseen",
    "button_unseen",
    "heading_unasked",
    "meaning",
    "words",
    "seen",
    "margin",
    "rivals",
    "length",
)
"""Names and order of the model's inputs; `features_of` explains them."""
MARGIN_FULL: Final = 800
"""A lead beyond this makes an answer no surer."""


class Calibrator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A logistic model and where it comes from.

    `ece` is the expected calibration error on held-out pages with its 95 % interval; `n` counts goals.
    """

    version: int
    features: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float
    n: int
    split: str
    ece: float | None
    ece_interval: tuple[float, float] | None
    provenance: str

    def digest(self) -> str:
        """Hex BLAKE3 of what decides probabilities."""
        return blake3(msgspec.json.encode((self.version, self.features, self.weights, self.bias))).hexdigest()

    def probability(self, values: Sequence[float]) -> float:
        """P(right) of one feature vector, rounded to four decimals."""
        logit = math.fsum([self.bias, *(w * v for w, v in zip(self.weights, values, strict=True))])
        return round(1 / (1 + math.exp(-max(-30.0, min(30.0, logit)))), 4)


def decoded(data: bytes) -> Calibrator:
    """A calibrator from its JSON.

    Raises:
        IntegrityError: not a calibrator, or one for other features.
    """
    try:
        model = msgspec.json.decode(data, type=Calibrator)
    except msgspec.MsgspecError as error:
        raise IntegrityError(
            f"calibrator.json cannot be read: {error}", object="calibrator.json", fix="reinstall him"
        ) from error
    if model.features != FEATURES or len(model.weights) != len(FEATURES):
        raise IntegrityError("calibrator.json is for other features", object="calibrator.json", fix="reinstall him")
    return model


@cache
def shipped() -> Calibrator:
    """The calibrator inside the package."""
    return decoded((resources.files("him") / "data" / "calibrator.json").read_bytes())


def features_of(goal: Goal, match: Match, rivals: Sequence[Match]) -> tuple[float, ...]:
    """The model's inputs for a match among `rivals` (all other matches of the same goal), in the order of FEATURES.

    `lexical` best of text and label; `exact` 1 when it is the same text; `part` 1 when it stands in a longer line;
    `labelled` 1 when the label fits and not the text, `beside` 1 when that is one by its place alone; `role` 0…1 as
    asked, `role_wrong` 0…1 another; `control_unseen`, `click_unseen` and `button_unseen` 1 when a control, something
    to click, a button was asked for and this is not known to be one; `heading_unasked` 1 when this is a heading and
    that was not asked for; `meaning`, `words`, `seen` as in `score.Features`; `margin` lead in evidence over the best
    rival, −1…1; `rivals` log of how many are as good; `length` log of the target's length.
    """
    known, role = match.features, role_of(match.type)
    best = lexical(goal, known, match.type)
    lead = match.evidence - max((rival.evidence for rival in rivals), default=0)
    equal = sum(rival.evidence > match.evidence - TIE_MARGIN for rival in rivals)
    unseen = bool(goal.role) and known.role < 1
    return (
        best / FULL,
        float(best >= EXACT),
        float(known.part > 0),
        float(known.label > known.text),
        float(known.beside),
        max(0, known.role) / 2,
        max(0, -known.role) / 2,
        float(unseen and goal.role in CONTROLS),
        float(unseen and goal.role in CLICKABLE - CONTROLS),
        float(unseen and goal.role == "button"),
        float(role == "heading" and goal.role not in ("", "heading")),
        known.meaning / FULL,
        1.0 if best >= EXACT else known.words / FULL,  # "3h" is "3 h", though it shares no word with it
        known.seen / FULL,
        max(-1.0, min(1.0, lead / MARGIN_FULL)),
        math.log1p(equal),
        math.log1p(known.chars),
    )


def confidence(model: Calibrator, goal: Goal, match: Match, rivals: Sequence[Match]) -> float:
    """Calibrated probability that the match's box is what the goal means."""
    return model.probability(features_of(goal, match, rivals))
