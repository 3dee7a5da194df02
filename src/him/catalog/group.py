"""Group commit: batches that threads of one process commit at the same time share one record and its syncs.

A thread queues its request. If nobody leads it leads: it commits all that wait, its own among them, and then hands the
lead to the first of those who came meanwhile. The others sleep until their request is settled for them.
"""

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from him.catalog.changes import FrameChange
from him.catalog.lease import Lease
from him.errors import HimError
from him.types import Snapshot, SnapshotId


class Begun(NamedTuple):
    """When a batch began: what it finds stored from then on can be relied on, or is looked at again."""

    epoch: int
    """`WarmStore.epoch`."""
    condemned: int
    """`WarmStore.condemned`."""
    lease: Lease


class Request:
    """A batch that waits for its turn; settled once somebody committed it, or tried to."""

    def __init__(self, target: SnapshotId, changes: Sequence[FrameChange], begun: Begun) -> None:
        self.target = target
        self.changes = changes
        self.begun = begun
        self.result: Snapshot | None = None
        self.error: HimError | None = None
        self.settled = False
        self.woken = threading.Event()

    def fail(self, error: HimError) -> None:
        """Keep the first error: a copy, for each thread raises its own."""
        if self.error is None:
            self.error = copy.copy(error)

    def settle(self) -> None:
        """Let its thread go on."""
        self.settled = True
        self.woken.set()

    def outcome(self) -> Snapshot:
        """The snapshot as the batch left it. Raises the batch's error."""
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


class Queue:
    """Requests that wait, and whether a thread leads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._led = False

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> list[Request]:
        """All that wait, oldest first; the leader must settle them."""
        with self._lock:
            taken = list(self._waiting)
            self._waiting.clear()
            return taken

    def pass_through(self, request: Request, lead: Callable[[], None]) -> None:
        """Return once the request is settled, by the thread that leads or by calling `lead` (which takes it) here.

        When `lead` raises, or this thread is interrupted, the request does not wait any more.
        """
        with self._lock:
            self._waiting.append(request)
            leading, self._led = not self._led, True
        try:
            if not leading:
                request.woken.wait()
                leading = not request.settled
            if leading:
                lead()
        finally:
            with self._lock:
                if request in self._waiting:
                    self._waiting.remove(request)
                # One that was woken to lead, and interrupted before it knew, hands on too.
                if leading or (request.woken.is_set() and not request.settled):
                    self._hand_on()

    def _hand_on(self) -> None:
        self._led = bool(self._waiting)
        if self._led:
            self._waiting[0].woken.set()
