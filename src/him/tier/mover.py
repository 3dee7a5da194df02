"""A thread that copies packs while others work."""

import contextlib
import threading
from collections.abc import Callable

from him.errors import HimError


class Mover:
    """A thread that works when it is nudged; what it meets is seen by whoever works in the foreground."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._wanted, self.stopped = work, threading.Event(), False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def nudge(self) -> None:
        """Work soon, and once more if that was begun already."""
        self._wanted.set()
        with self._lock:
            if self._thread is None and not self.stopped:
                self._thread = threading.Thread(target=self._run, name="him mover", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End after the pack at hand."""
        self.stopped = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            if self.stopped:
                return
            self._wanted.clear()
            with contextlib.suppress(HimError):
                self._work()
