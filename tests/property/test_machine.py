"""A state machine over the simulated world: calls and crashes in any order Hypothesis thinks of, against the model.

Each rule is one call of one of two processes (`him.sim.workload`) with all its checks; beside them stand what befalls
processes and the machine. What is random within a call follows from its number, so that examples shrink.
"""

from collections.abc import Callable
from contextlib import ExitStack
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from him.sim.small import small
from him.sim.workload import DECLARED, KINDS
from him.sim.world import Op, Process, World

PROCESSES = st.integers(0, 1)
NUMBERS = st.integers(0, 9_999)
SOON = st.integers(1, 120)


def calm(_process: Process, _rng: Random) -> None:
    """Nothing happens but what the rules say."""


class Machine(RuleBasedStateMachine):
    """Two processes on one repository with a cold tier, and a second repository to send to."""

    def __init__(self) -> None:
        super().__init__()
        self._within = ExitStack()
        self._within.enter_context(small())
        self.world = World(1, 2, frozenset(), KINDS, calm)

    def teardown(self) -> None:
        try:
            self.run(Op(0, "fsck", 0), close=True)
        finally:
            self._within.close()

    def run(self, *ops: Op, close: bool = False) -> None:
        self.world.run(ops, close=close)

    @initialize()
    def declare_all(self) -> None:
        self.run(*(Op(number, "declare", 0) for number in range(len(DECLARED))))

    @rule(process=PROCESSES, after=SOON)
    def kill(self, process: int, after: int) -> None:
        """The process ends at one of its next operations."""
        self.world.processes[process].kill_in = after

    @rule(after=SOON)
    def power_loss(self, after: int) -> None:
        """The machine stops at one of its next operations."""
        self.world.power_in = after

    @rule(length=SOON)
    def full_disk(self, length: int) -> None:
        self.world.weather.full = length

    @rule(length=SOON)
    def store_away(self, length: int) -> None:
        self.world.weather.down = min(length, 20)

    @rule(ms=st.sampled_from([-3_600_000, 60_000, 86_400_000]))
    def clock_jumps(self, ms: int) -> None:
        self.world.clock.jump(ms)

    @rule()
    def caches_are_lost(self) -> None:
        self.world.sites["a"].memo.items.clear()

    @rule(first=NUMBERS, kinds=st.lists(st.sampled_from(["put", "slow_put", "gc", "seal", "delete"]), max_size=4))
    def at_once(self, first: int, kinds: list[str]) -> None:
        """Both processes work at the same time."""
        self.run(*(Op(first + at, kind, at) for at, kind in enumerate(kinds)))


def call_of(kind: str) -> Callable[[Machine, int, int], None]:
    def call(self: Machine, process: int, number: int) -> None:
        self.run(Op(number, kind, process))

    call.__name__ = call.__qualname__ = kind
    return call


for _kind in KINDS:
    setattr(Machine, f"call_{_kind}", rule(process=PROCESSES, number=NUMBERS)(call_of(_kind)))

Machine.TestCase.settings = settings(
    max_examples=12, stateful_step_count=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip


class TestMachine(Machine.TestCase):
    """The quick run."""


@pytest.mark.slow
class TestLongMachine(Machine.TestCase):
    """A longer one."""

    settings = settings(Machine.TestCase.settings, max_examples=150, stateful_step_count=80)


def test_the_machine_has_the_rules_it_should() -> None:
    wanted = {
        "put", "delete", "drop_frame", "replace", "branch", "seal", "tag", "gc", "compact", "demote", "pin", "push",
        "reopen", "rebuild", "attribute", "retain", "send", "fetch", "restore", "heal", "scrub", "protect", "take_over",
    }  # fmt: skip
    assert wanted <= KINDS.keys()
    assert sum(hasattr(one, "hypothesis_stateful_rule") for one in vars(Machine).values()) >= 20 + 7
