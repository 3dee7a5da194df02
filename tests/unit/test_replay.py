"""Traces: what was recorded is recomputed, and the first difference is named."""

from collections.abc import Callable, Mapping

import msgspec
import pytest
from fakes import MemDisk
from hypothesis import given
from hypothesis import strategies as st

from him.errors import ExpiredError, HimError, IntegrityError, NotFoundError, StorageError, UsageError
from him.ports import Recorder
from him.replay import Recording, Trace, load, replay, save
from him.replay.trace import FOLDER, names, new_trace

ID = "tr_00000000000000000000000001"
PINS = {"code": "c1", "encoder": "e1", "python": "3.11"}


def program(recorder: Recorder, numbers: list[int], clock: Callable[[], int]) -> str:
    """A little run: a clock reading, two steps, another reading."""
    start = int(recorder.effect("clock", lambda: b"%d" % clock()))
    total = sum(numbers)
    recorder.step("sum", repr(numbers).encode(), b"%d" % total)
    best = max(numbers)
    recorder.step("max", repr(numbers).encode(), b"%d" % best)
    end = int(recorder.effect("clock", lambda: b"%d" % clock()))
    return f"{total} {best} took {end - start}"


def recorded() -> Trace:
    recording = Recording()
    ticks = iter([100, 107])
    answer = program(recording, [1, 2, 3], lambda: next(ticks))
    request: dict[str, str | int | float | None] = {"numbers": "1 2 3"}
    return new_trace(ID, "query", "snp_x", "ab", request, PINS, recording, answer).with_digest()


def rerun(trace: Trace, recorder: Recorder) -> str:
    return program(recorder, [int(part) for part in str(trace.request["numbers"]).split()], lambda: 1 / 0)


def run(trace: Trace, how: Callable[[Trace, Recorder], str] = rerun, pins: Mapping[str, str] = PINS):
    return replay(trace, lambda: pins, how)


def test_an_untouched_trace_is_identical_and_says_what_was_recomputed() -> None:
    report = run(recorded())
    assert report.as_json() == {
        "identical": True, "grade": "R2", "steps": 4, "recomputed": 2, "from_trace": 2, "first_divergence": None,
    }  # fmt: skip
    assert report.answer == "6 3 took 7"
    assert report.status == "identical"


@pytest.mark.parametrize(
    ("change", "step", "what"),
    [
        ({"answer": "6 3 took 8"}, "answer", "output"),
        ({"request": {"numbers": "1 2 4"}}, "sum", "input"),
        ({"snapshot_id": "snp_y"}, "trace", "digest"),
        ({"digest": ""}, "trace", "digest"),
    ],
)
def test_an_altered_trace_differs_and_names_the_step(change: dict, step: str, what: str) -> None:
    report = run(msgspec.structs.replace(recorded(), **change))
    assert not report.identical
    assert report.status == "diverged"
    assert report.first_divergence is not None
    assert (report.first_divergence["step"], report.first_divergence["what"]) == (step, what)
    assert report.first_divergence["expected"] != report.first_divergence["got"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("field", ["name", "inputs", "output"])
def test_an_altered_step_is_named(number: int, field: str) -> None:
    trace = recorded()
    steps = list(trace.steps)
    name = steps[number].name
    steps[number] = msgspec.structs.replace(steps[number], **{field: "0" * 64})
    report = run(msgspec.structs.replace(trace, steps=tuple(steps)))
    assert not report.identical
    assert report.first_divergence is not None
    assert report.first_divergence["step"] == name


def test_steps_that_are_missing_or_too_many_are_named() -> None:
    trace = recorded()
    fewer = run(msgspec.structs.replace(trace, steps=trace.steps[:1]))
    more = run(msgspec.structs.replace(trace, steps=(*trace.steps, trace.steps[0])))
    for report, step in ((fewer, "max"), (more, "sum")):
        assert not report.identical
        assert report.first_divergence is not None
        assert report.first_divergence["step"] == step


def test_a_run_that_asks_for_another_effect_stops_there() -> None:
    trace = recorded()
    for effects in ((), trace.effects[:1], (msgspec.structs.replace(trace.effects[0], name="rng"), trace.effects[1])):
        report = run(msgspec.structs.replace(trace, effects=effects))
        assert not report.identical
        assert report.first_divergence is not None
        assert report.first_divergence["what"] == "effect"


def test_an_altered_effect_shows_in_the_answer() -> None:
    trace = recorded()
    effects = (trace.effects[0], msgspec.structs.replace(trace.effects[1], value=b"109"))
    report = run(msgspec.structs.replace(trace, effects=effects))
    assert report.first_divergence is not None
    assert report.first_divergence["step"] == "answer"


def test_another_computation_is_named_at_its_first_differing_step() -> None:
    def other(trace: Trace, recorder: Recorder) -> str:
        recorder.effect("clock", lambda: b"")
        recorder.step("sum", b"[1, 2, 3]", b"6")
        recorder.step("max", b"[1, 2, 3]", b"2")
        recorder.effect("clock", lambda: b"")
        return "6 2 took 7"

    report = run(recorded(), other)
    assert report.first_divergence is not None
    assert (report.first_divergence["step"], report.first_divergence["what"]) == ("max", "output")
    assert report.recomputed == 2


def test_drift_is_refused_before_the_start() -> None:
    def never(trace: Trace, recorder: Recorder) -> str:
        raise AssertionError("started")

    for pins in (
        {**PINS, "encoder": "e2"},
        {**PINS, "new": "x"},
        {"code": "c1"},
        {**PINS, "code": "c2", "python": "4"},
    ):
        report = run(recorded(), never, pins)
        assert (report.identical, report.status) == (False, "drift")
        assert report.first_divergence is not None
        assert report.first_divergence["step"] == "environment"

    def broken() -> Mapping[str, str]:
        raise IntegrityError("model.onnx is not the pinned file", object="model.onnx")

    report = replay(recorded(), broken, never)
    assert (report.identical, report.status) == (False, "drift")


def test_other_decision_code_is_superseded_not_failed() -> None:
    report = run(recorded(), pins={**PINS, "code": "c2"})
    assert (report.identical, report.status) == (False, "superseded")
    assert report.first_divergence is not None
    assert report.first_divergence["step"] == "code"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (IntegrityError("stored bytes do not match"), "diverged"),
        (StorageError("disk"), "diverged"),
        (ExpiredError("gone"), "expired"),
    ],
)
def test_inputs_that_cannot_be_read_are_named_at_the_step_that_was_due(error: HimError, status: str) -> None:
    def damaged(trace: Trace, recorder: Recorder) -> str:
        recorder.effect("clock", lambda: b"")
        recorder.step("sum", b"[1, 2, 3]", b"6")
        raise error

    report = run(recorded(), damaged)
    assert (report.identical, report.status) == (False, status)
    assert report.first_divergence is not None
    assert report.first_divergence["step"] == "max"


def test_a_crash_of_an_untouched_trace_is_not_hidden() -> None:
    def buggy(trace: Trace, recorder: Recorder) -> str:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run(recorded(), buggy)


# -- files


def test_traces_are_saved_listed_and_loaded() -> None:
    disk, trace = MemDisk(), recorded()
    save(disk, trace)
    assert load(disk, ID)[0] == trace
    assert load(disk, ID)[0].whole
    assert names(disk) == [ID]
    save(disk, msgspec.structs.replace(trace, trace_id=ID[:-1] + "0"))
    assert names(disk) == [ID[:-1] + "0", ID]


@pytest.mark.parametrize("bad", ["", "tr_", "snp_1", "tr_../../etc/passwd", "tr_" + "A" * 65, "tr_a/b"])
def test_what_is_no_trace_id_is_refused(bad: str) -> None:
    with pytest.raises(UsageError):
        load(MemDisk(), bad)


def test_an_unknown_trace_is_not_found() -> None:
    with pytest.raises(NotFoundError):
        load(MemDisk(), ID)


SAVED = MemDisk()
save(SAVED, recorded())
TEXT = bytes(SAVED.files[f"{FOLDER}/{ID}.json"].now)


def replay_bytes(data: bytes) -> bool:
    """Whether a trace file with these bytes is identical; errors only of our own kinds."""
    disk = MemDisk()
    disk.open(f"{FOLDER}/{ID}.json", create=True).write_at(0, data)
    try:
        trace, _ = load(disk, ID)
    except HimError:
        return False
    return run(trace).identical


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_trace_is_noticed(bit: int) -> None:
    assert replay_bytes(TEXT)
    for at in range(len(TEXT)):
        altered = bytearray(TEXT)
        altered[at] ^= 1 << bit
        # White space around the document carries nothing.
        if bytes(altered).strip() != TEXT.strip():
            assert not replay_bytes(bytes(altered)), (at, bit, bytes(altered)[max(0, at - 20) : at + 20])


@given(st.integers(0, len(TEXT) - 2))
def test_a_cut_trace_is_noticed(size: int) -> None:
    assert not replay_bytes(TEXT[:size])
