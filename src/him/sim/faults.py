"""What may go wrong in the simulator, how often, and why HIM can recover from it: the list is the simulator's contract.

A fault that is not here does not happen on the live repository. What nothing can recover from (rot in what has no
second copy) is tried on copies of it, where the answer has to be a located error and never a wrong byte
(`checks.damaged`).
"""

from typing import Final, NamedTuple


class Fault(NamedTuple):
    """One way to fail."""

    name: str
    every: int
    """About once in so many operations of its kind: port calls of the disk or the store, or workload calls."""
    why: str
    """Why recovery is possible."""


DISK: Final = (
    Fault("write refused", 1_500, "nothing was changed; a commit that fails is undone, or finished by the next one"),
    Fault("write partial", 1_500, "nobody reads beyond the last committed range, or the published end"),
    Fault("write late", 3_000, "done and reported as failed: what is there and named by no record is nobody's"),
    Fault("fsync lost", 500, "the pack is abandoned, the record is cut: neither is trusted again"),
    Fault("read error", 20_000, "the call fails; nothing depends on a read that gave nothing"),
)
"""Of single operations on the disk."""

SPELLS: Final = (
    Fault("disk full", 900, "what grows is refused; what is there stays, and work goes on when space returns"),
    Fault("store down", 700, "what is here is served; pushes are taken up again"),
    Fault("clock jump", 500, "order comes from the log's numbers; times are for people and for retention"),
    Fault("kill", 150, "locks die with the process, its tail is finished or cut, its orphans are collected"),
    Fault("power loss", 400, "a record is durable before it is published, and what it names before the record"),
    Fault("memo lost", 400, "results by content are computed again"),
    Fault("rot", 200, "the file is a cache, a hint or a copy: the log, the packs, the cold tier or parity have it too"),
)
"""Of workload calls: they begin there and last for some."""

STORE: Final = (
    Fault("store 5xx", 60, "the request did nothing and is tried again"),
    Fault("reply lost", 60, "the request was carried out: it is recognised as our own by what is there"),
    Fault("request twice", 60, "objects have one content a name, or a nonce"),
    Fault("list stale", 3, "lists are asked for no decision that single look-ups do not confirm"),
)
"""Of single requests to the object store."""

FAULTS: Final = {fault.name: fault for fault in (*DISK, *SPELLS, *STORE)}
"""By name."""

CRASH_FATES: Final = ("all", "none", "none", "torn")
"""What becomes of each unsynced piece, or name, at a power loss, drawn alike."""

ROTTING: Final = (
    "log/end",
    "log/checkpoints/",
    "cache/addresses/",
    "cold/hotness",
    "cold/pins",
    "cold/account",
    "packs/",
)
"""Files that may rot on the live repository; a pack only where the cold tier holds all of it, or, nothing else being
damaged, a whole group of parity."""
