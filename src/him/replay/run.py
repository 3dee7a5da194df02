"""Recomputing a recorded run and telling the first step that differs."""

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from him.errors import HimError
from him.ports import Recorder
from him.replay.trace import DivergedError, Divergence, Replaying, Trace

CODE_PIN: Final = "code"
"""The pin of decision code: another one means superseded, not failed."""

Rerun = Callable[[Trace, Recorder], str]
"""Runs the trace's request again through a recorder; returns the answer's line."""


class ReplayReport(msgspec.Struct, frozen=True):
    """The verdict of a replay.

    `grade` "R2": models were recomputed too, under the environment pin. `status` is "identical", "diverged", "drift"
    (refused before start), "superseded" (other decision code) or "expired" (its inputs were removed on purpose).
    """

    trace_id: str
    identical: bool
    status: str
    grade: str
    recomputed: int
    from_trace: int
    first_divergence: dict[str, str] | None
    answer: str

    def as_json(self) -> dict[str, object]:
        """The object documented in docs/CLI_JSON.md."""
        return {
            "identical": self.identical,
            "grade": self.grade,
            "steps": self.recomputed + self.from_trace,
            "recomputed": self.recomputed,
            "from_trace": self.from_trace,
            "first_divergence": self.first_divergence,
        }


def replay(trace: Trace, pins: Callable[[], Mapping[str, str]], rerun: Rerun) -> ReplayReport:
    """Recompute a trace's run.

    Args:
        pins: the digests and versions in force now; a difference other than in code refuses the start.
        rerun: does the recorded request again.
    """
    recorder = Replaying(trace)
    answer = ""
    status = "diverged"
    try:
        now = pins()
    except HimError as error:
        recorder.differ(Divergence("environment", error.kind, "as pinned", error.line()))
        return _report(trace, recorder, "drift", answer)
    drifted = sorted(name for name in trace.pins.keys() | now.keys() if trace.pins.get(name) != now.get(name))
    if drifted and drifted != [CODE_PIN]:
        name = next(name for name in drifted if name != CODE_PIN)
        recorder.differ(Divergence("environment", name, trace.pins.get(name, "absent"), now.get(name, "absent")))
        return _report(trace, recorder, "drift", answer)
    try:
        answer = rerun(trace, recorder)
    except DivergedError:
        pass
    except HimError as error:
        status = "expired" if error.kind in ("expired", "shredded") else "diverged"
        recorder.differ(Divergence(_next_step(trace, recorder), error.kind, "verified bytes", error.line()))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if trace.whole:
            raise
        # Altered bytes of a trace may be anything: no number, no hash, a parameter that has no name.
        recorder.differ(Divergence(_next_step(trace, recorder), "input", "as recorded", f"altered: {error}"))
    _compare_end(trace, recorder, answer)
    if recorder.divergence is None and not drifted:
        return _report(trace, recorder, "identical", answer)
    if drifted:
        recorder.differ(Divergence(CODE_PIN, "superseded", trace.pins[CODE_PIN], now[CODE_PIN]))
        status = "superseded"
    return _report(trace, recorder, status, answer)


def _compare_end(trace: Trace, recorder: Replaying, answer: str) -> None:
    """What can only be told at the end: steps left over, the answer's bytes, the trace's own digest."""
    if recorder.divergence is not None:
        return
    if recorder.recomputed != len(trace.steps):
        recorder.differ(Divergence(trace.steps[recorder.recomputed].name, "step", "recorded", "not reached"))
    elif answer != trace.answer:
        recorder.differ(Divergence("answer", "output", trace.answer, answer))
    elif not trace.whole:
        recorder.differ(Divergence("trace", "digest", trace.digest, "other values"))


def _next_step(trace: Trace, recorder: Replaying) -> str:
    """The step that was due when an error struck."""
    return trace.steps[recorder.recomputed].name if recorder.recomputed < len(trace.steps) else "answer"


def _report(trace: Trace, recorder: Replaying, status: str, answer: str) -> ReplayReport:
    found = recorder.divergence
    return ReplayReport(
        trace.trace_id, status == "identical", status, "R2", recorder.recomputed, recorder.from_trace,
        None if found is None else {"status": status, **found._asdict()}, answer,
    )  # fmt: skip
