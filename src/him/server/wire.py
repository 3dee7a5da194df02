"""How the command line and the warm daemon speak: one JSON line each way over a Unix socket.

Only the standard library is imported, and little of it: this runs before every forwarded command, and its cost is the
command's start-up. A request is `{"protocol", "version", "kind", …}`; the daemon first sends the line
`{"taken":true}`, so that a stopped process is told from a busy one, then its reply.
"""

import json
import os
import socket
import stat
from collections.abc import Mapping

PROTOCOL = 1
SUN_PATH_BYTES_MAX = 100
"""A Unix socket's path is at most 107 bytes on Linux and 103 elsewhere."""
TAKEN_TIMEOUT_S = 2.0
"""How long a client waits for the daemon to take a request before it does the work itself."""
_FNV_START, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
"""FNV-1a, 64 bits. Two repositories on one socket would only turn each other away; hashlib loads OpenSSL for 4 ms."""
_CHUNK_BYTES = 1 << 16


class WireError(Exception):
    """The other side is gone, silent, or speaks something else."""


def runtime_folder(environ: Mapping[str, str], repository: str) -> str:
    """The folder for this user's sockets: `$XDG_RUNTIME_DIR/him`, or `/tmp/him-<uid>` without it."""
    base = environ.get("XDG_RUNTIME_DIR", "")
    folder = os.path.join(base, "him")
    if base and os.path.isabs(base) and len(os.fsencode(_socket_in(folder, repository))) <= SUN_PATH_BYTES_MAX:
        return folder
    return f"/tmp/him-{os.getuid()}"


def socket_path(environ: Mapping[str, str], repository: str) -> str:
    """Where the daemon of a repository (its resolved path) listens; short, whatever the repository's path."""
    return _socket_in(runtime_folder(environ, repository), repository)


def _socket_in(folder: str, repository: str) -> str:
    digest = _FNV_START
    for byte in os.fsencode(repository):
        digest = (digest ^ byte) * _FNV_PRIME % 2**64
    return os.path.join(folder, f"{digest:016x}.sock")


def trusted(folder: str) -> bool:
    """Whether a folder is a real one of this user that nobody else can enter."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def connect(path: str) -> socket.socket | None:
    """A connection to the daemon at `path`, or None when nobody trustworthy listens there."""
    if not trusted(os.path.dirname(path)):
        return None
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.settimeout(TAKEN_TIMEOUT_S)
    try:
        link.connect(path)
    except OSError:
        link.close()
        return None
    return link


def send_line(link: socket.socket, message: Mapping[str, object]) -> None:
    """Send one message. Raises WireError."""
    try:
        link.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
    except OSError as error:
        raise WireError(str(error)) from error


class LineReader:
    """Reads messages off a connection.

    Args:
        link: the connection.
        limit_bytes: how long one line may be; 0 for no limit.
    """

    def __init__(self, link: socket.socket, limit_bytes: int = 0) -> None:
        self._link = link
        self._limit = limit_bytes
        self._rest = bytearray()

    def read(self, timeout_s: float | None) -> dict[str, object]:
        """The next message.

        Args:
            timeout_s: how long each wait for bytes may last; None waits for ever.

        Raises:
            WireError: closed, silent, too long, or not a JSON object.
        """
        self._link.settimeout(timeout_s)
        seen = 0
        while (end := self._rest.find(b"\n", seen)) < 0:
            seen = len(self._rest)
            if self._limit and seen > self._limit:
                raise WireError(f"a message is longer than {self._limit} bytes")
            try:
                chunk = self._link.recv(_CHUNK_BYTES)
            except OSError as error:
                raise WireError(str(error)) from error
            if not chunk:
                raise WireError("closed before a message was complete")
            self._rest += chunk
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        try:
            message: object = json.loads(line)
        except ValueError as error:
            raise WireError("not a JSON message") from error
        if not isinstance(message, dict):
            raise WireError("not a JSON object")
        return message  # pyright: ignore[reportUnknownVariableType] - typing.cast would cost an import


def ask(path: str, message: Mapping[str, object], timeout_s: float | None = None) -> dict[str, object] | None:
    """Send a request and wait for its reply; None when there is no daemon, or it went away before it answered."""
    link = connect(path)
    if link is None:
        return None
    with link:
        try:
            send_line(link, message)
            reader = LineReader(link)
            reader.read(TAKEN_TIMEOUT_S)
            return reader.read(timeout_s)
        except WireError:
            return None
