"""The warm daemon: keeps one repository open with its models loaded and runs forwarded commands.

Connections are read by small threads, so that a busy daemon still answers `status` and `stop`; the commands run one
after the other on the thread that opened the repository.
"""

import fcntl
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple

import him
from him.config import DAEMON_REQUEST_BYTES_MAX
from him.errors import BusyError, StorageError
from him.server import wire

READERS_MAX: Final = 16
"""Connections read at once; more wait in the listen queue."""
REQUEST_TIMEOUT_S: Final = 5.0
_BACKLOG: Final = 64
_TICK_S: Final = 0.5

Message = Mapping[str, object]
Execute = Callable[[Message], Message]


class _Job(NamedTuple):
    message: Message
    link: socket.socket


class Daemon:
    """Serves one repository on one socket.

    Args:
        repository: resolved path of the repository.
        path: the socket's path, from `wire.socket_path`.
        idle_s: ends by itself after this long without a request; None never does.

    Raises:
        BusyError: another daemon holds the socket.
        StorageError: the runtime folder is not safe or cannot be made.
    """

    def __init__(self, repository: str, path: str, *, idle_s: float | None = None) -> None:
        self.repository = repository
        self.path = path
        self.idle_s = idle_s
        self.served = 0
        self._started_ns = time.monotonic_ns()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._readers = threading.BoundedSemaphore(READERS_MAX)
        self._lock = _lock(path)
        self._listener: socket.socket | None = None
        self._identity = _identity(repository)

    def listen(self) -> None:
        """Open the socket: from now on clients are answered. Call when the repository is warm."""
        Path(self.path).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The folder lets nobody else in, so there is no moment in which the mode matters.
            listener.bind(self.path)
            Path(self.path).chmod(0o600)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise StorageError(f"cannot listen: {error.strerror}", place=self.path) from error
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def serve(self, execute: Execute) -> None:
        """Run commands until stopped, idle for too long, or the repository is replaced under its path."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        last = time.monotonic()
        while not self._stopping.is_set():
            try:
                job = self._jobs.get(timeout=_TICK_S)
            except queue.Empty:
                if _identity(self.repository) != self._identity:
                    break
                if self.idle_s is not None and time.monotonic() - last > self.idle_s:
                    break
                continue
            if job is None:
                break
            if _identity(self.repository) != self._identity:
                # Deleted and made again at the same path: nothing held here is true any more.
                _reply(job.link, {"retry": "the repository was replaced"})
                break
            _reply(job.link, execute(job.message))
            self.served += 1
            last = time.monotonic()

    def close(self) -> None:
        """Take the socket away and let waiting clients do their work themselves."""
        self._stopping.set()
        Path(self.path).unlink(missing_ok=True)
        if self._listener is not None:
            self._listener.close()
        while not self._jobs.empty():
            job = self._jobs.get_nowait()
            if job is not None:
                _reply(job.link, {"retry": "the daemon stopped"})
        os.close(self._lock)

    def status(self) -> dict[str, object]:
        """What `him daemon status` shows."""
        return {
            "running": True,
            "pid": os.getpid(),
            "repository": self.repository,
            "socket": self.path,
            "served": self.served,
            "uptime_s": (time.monotonic_ns() - self._started_ns) // 1_000_000_000,
            "idle_s": self.idle_s,
        }

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping.set()
        self._jobs.put(None)

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            self._readers.acquire()
            try:
                link, _ = listener.accept()
            except OSError:
                self._readers.release()
                return
            threading.Thread(target=self._read, args=(link,), daemon=True).start()

    def _read(self, link: socket.socket) -> None:
        try:
            self._take(link)
        except (OSError, wire.WireError) as error:
            _reply(link, {"retry": str(error)})
        finally:
            self._readers.release()

    def _take(self, link: socket.socket) -> None:
        message = wire.LineReader(link, DAEMON_REQUEST_BYTES_MAX).read(REQUEST_TIMEOUT_S)
        wire.send_line(link, {"taken": True})
        kind = message.get("kind")
        if message.get("protocol") != wire.PROTOCOL:
            _reply(link, {"retry": "another protocol"})
        elif kind == "run" and message.get("version") != him.__version__:
            _reply(link, {"retry": "another version"})
        elif kind == "status":
            _reply(link, self.status())
        elif kind == "stop":
            _reply(link, self.status())
            self._stopping.set()
            self._jobs.put(None)
        elif kind == "run":
            self._jobs.put(_Job(message, link))
        else:
            _reply(link, {"retry": "unknown request"})


def _reply(link: socket.socket, message: Message) -> None:
    """Send the last line of a conversation; a client that left is nobody's problem."""
    with link:
        try:
            link.settimeout(REQUEST_TIMEOUT_S)
            wire.send_line(link, message)
        except (OSError, wire.WireError):
            return


def _identity(repository: str) -> tuple[int, int] | None:
    """What tells a repository from another one made later at the same path."""
    try:
        found = Path(repository, "him.json").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def make_runtime_folder(folder: str) -> None:
    """Make the folder for sockets if it is not there, for this user alone. Raises OSError, StorageError."""
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    if not wire.trusted(folder):
        raise StorageError(
            "the folder for sockets can be entered by others",
            place=folder,
            fix=f"chmod 700 {folder}, or set XDG_RUNTIME_DIR to a folder of your own",
        )


def _lock(path: str) -> int:
    """Hold the right to serve `path` for the life of this process; dies with it."""
    folder = str(Path(path).parent)
    try:
        make_runtime_folder(folder)
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot use the folder for sockets: {error.strerror}", place=folder) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise BusyError(
            "a daemon already serves this repository", place=path, fix="use it, or `him daemon stop` first"
        ) from error
    return descriptor
