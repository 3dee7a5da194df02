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
from him.query.score import CONTROLS, EXACT, FULL, TIE_MARGIN, Match, lexical

FEATURES: Final = (
    "lexical",
    "exact",
    "role",
    "role_wrong",
    "role_asked",
    "control_unseen",
    "meaning",
    "words",
    "seen",
    "margin",
    "rivals",
    "length",
)
"""Names and order of the model's inputs; `features_of` explains them."""
MARGIN_FULL: Final = 2_000


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

    `lexical` best of text and label; `exact` 1 when it is the same text; `role` 0…1 as asked, `role_wrong` 0…1 another;
    `role_asked`; `control_unseen`
    1 when a field or mark was asked for and this is not known to be one; `meaning`, `words`, `seen` as in
    `score.Features`; `margin` lead in evidence over the best rival, −1…1; `rivals` log of how many are as good;
    `length` log of the target's length.
    """
    best = lexical(goal, match.features, match.type)
    lead = match.evidence - max((rival.evidence for rival in rivals), default=0)
    equal = sum(rival.evidence > match.evidence - TIE_MARGIN for rival in rivals)
    unseen = goal.role in CONTROLS and role_of(match.type) not in CONTROLS
    return (
        best / FULL,
        float(best >= EXACT),
        max(0, match.features.role) / 2,
        max(0, -match.features.role) / 2,
        float(bool(goal.role)),
        float(unseen),
        match.features.meaning / FULL,
        match.features.words / FULL,
        match.features.seen / FULL,
        max(-1.0, min(1.0, lead / MARGIN_FULL)),
        math.log1p(equal),
        math.log1p(match.features.chars),
    )


def confidence(model: Calibrator, goal: Goal, match: Match, rivals: Sequence[Match]) -> float:
    """Calibrated probability that the match's box is what the goal means."""
    return model.probability(features_of(goal, match, rivals))
