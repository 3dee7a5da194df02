"""Several processes of which exactly one runs at a time; the seed says when the next one takes over.

Each is a thread that runs while it holds the baton. It may be handed over at every operation on the disk or the object
store, and is when a process waits for a file's lock.
"""

import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

_STACK_BYTES: Final = 16 * 1024 * 1024


class Stopped(BaseException):
    """The simulation ended while this process was at work."""


class Deadlock(Exception):
    """Every process waits for another."""


class Task:
    """One process's thread."""

    def __init__(self, main: Callable[[], None]) -> None:
        self.main = main
        self.baton = threading.Lock()
        self.baton.acquire()
        self.waits: Callable[[], bool] | None = None
        self.done = False

    @property
    def runnable(self) -> bool:
        """Whether it could go on."""
        return not self.done and (self.waits is None or self.waits())


class Schedule:
    """Runs processes in turn.

    Args:
        rng: decides who is next and when.
        stretch: how many operations a process runs on, on average, before another may take over.
    """

    def __init__(self, rng: Random, stretch: int) -> None:
        self._rng, self._stretch = rng, stretch
        self._left = stretch
        self._tasks: list[Task] = []
        self._ended = threading.Lock()
        self._ended.acquire()
        self.current: Task | None = None
        self.failure: BaseException | None = None
        self.switches = 0

    def run(self, mains: Sequence[Callable[[], None]]) -> None:
        """Run processes until all have ended. Raises what one of them raised first, once all have ended."""
        self._tasks = [Task(main) for main in mains]
        threads = [threading.Thread(target=self._thread, args=(task,), daemon=True) for task in self._tasks]
        for thread in threads:
            thread.start()
        self._next(None)
        self._ended.acquire()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def step(self) -> None:
        """An operation of the process that runs: another may take over here. Raises Stopped."""
        self._left -= 1
        if self._left <= 0:
            self.yield_now()
        elif self.failure is not None:
            raise Stopped

    def yield_now(self) -> None:
        """Let another process, or this one, go on. Raises Stopped."""
        self._left = 1 + int(self._rng.expovariate(1 / self._stretch))
        me = self.current
        if me is not None:
            self._next(me)
        if self.failure is not None:
            raise Stopped

    def wait(self, free: Callable[[], bool]) -> None:
        """Let others go on until something is so. Raises Stopped, Deadlock."""
        me = self.current
        if me is None:
            raise Deadlock("a lock is held, and nobody runs who could give it back")
        me.waits = free
        try:
            self._next(me)
        finally:
            me.waits = None
        if self.failure is not None:
            raise Stopped

    def fail(self, error: BaseException) -> None:
        """End the simulation: every process is stopped at its next operation."""
        if self.failure is None:
            self.failure = error

    def _thread(self, task: Task) -> None:
        task.baton.acquire()
        try:
            task.main()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to whoever runs the schedule
            self.fail(error)
        task.done = True
        self._next(task)

    def _next(self, me: Task | None) -> None:
        living = [task for task in self._tasks if not task.done]
        ready = [task for task in living if task.runnable]
        if living and not ready:
            self.fail(Deadlock("every process waits for a lock"))
        # Those that wait are woken to be stopped.
        able = living if self.failure is not None else ready
        if not able:
            self.current = None
            self._ended.release()
            return
        chosen = able[self._rng.randrange(len(able))] if len(able) > 1 else able[0]
        self.current = chosen
        if chosen is me:
            return
        self.switches += 1
        chosen.baton.release()
        if me is not None and not me.done:
            me.baton.acquire()
