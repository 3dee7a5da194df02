"""Every parser of outside bytes, fed with damaged real bytes: a value or a HimError, in bounded time and memory.

The targets are those of `python -m fuzz`, which looks for hostile bytes far longer; here mutations are random.
"""

import faulthandler
import resource
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fuzz.targets import MEMORY_BYTES, SECONDS, TARGETS

EXAMPLES = 120
"""A target: all of them take half a minute."""
HUGE = [value.to_bytes(8, "little") for value in (2**64 - 1, 2**63, 2**40, 2**31, 2**28, 0)]
HUGE += [struct.pack(">I", value) for value in (2**32 - 1, 2**31, 2**24)]


@cache
def seeds(name: str) -> list[bytes]:
    return TARGETS[name].seeds()


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """As many bytes more as a parser may take, and a traceback of where it hangs, which ends the process."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, before[1]))
    yield
    faulthandler.cancel_dump_traceback_later()
    resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """A seed after a few flips, cuts, insertions, splices with another seed, and sizes that nothing has."""
    data = bytearray(draw(st.sampled_from(seeds(name))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "remove", "insert", "repeat", "splice", "huge"])):
            case "flip" if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case "cut":
                del data[at:]
            case "remove":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=64))
            case "repeat":
                data[at:at] = data[at : at + 64] * draw(st.integers(1, 40))
            case "splice":
                other = draw(st.sampled_from(seeds(name)))
                data[at:] = other[draw(st.integers(0, len(other))) :]
            case _:
                size = draw(st.sampled_from(HUGE))
                data[at : at + len(size)] = size
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_give_a_value_or_an_error_of_ours(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES, derandomize=True)
    @given(mutated(name))
    @example(b"")
    def check(data: bytes) -> None:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        target.check(data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_taken(name: str) -> None:
    for seed in seeds(name):
        TARGETS[name].check(seed)
