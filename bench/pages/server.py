"""A loopback web server for the files of installed npm packages."""

from __future__ import annotations

import hashlib
import mimetypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SOURCES = Path(__file__).resolve().parent / "src"
# Photographs carry no licence of their own in these packages: draw a placeholder.
PHOTO = re.compile(r"(/demo/(photos|faces|products)/|/dist/img/(user|photo|prod|avatar)|\.jpe?g$)")


def placeholder(path: str) -> bytes:
    """A plain drawing of a head and shoulders, coloured by the path it stands for."""
    hue = int(hashlib.sha256(path.encode()).hexdigest()[:4], 16) % 360
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="160" height="160" viewBox="0 0 160 160">'
        f'<rect width="160" height="160" fill="hsl({hue},35%,62%)"/>'
        f'<circle cx="80" cy="62" r="30" fill="hsl({hue},40%,85%)"/>'
        f'<path d="M20 160c0-40 27-58 60-58s60 18 60 58z" fill="hsl({hue},40%,85%)"/></svg>'
    ).encode()


class Packages:
    """Finds the file that a URL path stands for."""

    def __init__(self, modules: Path) -> None:
        self.modules = modules.resolve()
        self.plugins = self._adminlte_plugins()

    def _adminlte_plugins(self) -> list[tuple[str, str]]:
        """AdminLTE's own table of where its build copies each plugin from."""
        table = self.modules / "admin-lte" / "build" / "npm" / "Plugins.js"
        if not table.is_file():
            return []
        pairs = re.findall(r"from: '([^']+)',\s*to: '([^']+)'", table.read_text("utf-8"))
        return [(to.strip("/"), source.strip("/")) for source, to in pairs]

    def _candidates(self, path: str) -> Iterator[Path]:
        if path.startswith("src/"):
            yield SOURCES / path[len("src/") :]
            return
        yield self.modules / path
        prefix = "admin-lte/"
        if not path.startswith(prefix + "plugins/"):
            return
        wanted = path[len(prefix) :]
        for to, source in self.plugins:
            if wanted == to or wanted.startswith(to + "/"):
                tail = source + wanted[len(to) :]
                yield self.modules / "admin-lte" / tail
                yield self.modules.parent / tail
                yield self.modules / tail.removeprefix("node_modules/")

    def find(self, path: str) -> Path | None:
        roots = (self.modules, SOURCES)
        for file in self._candidates(path.strip("/")):
            real = file.resolve()
            if real.is_file() and any(real.is_relative_to(root) for root in roots):
                return real
        return None


def _handler(packages: Packages) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if PHOTO.search(path):
                self._send(placeholder(path), "image/svg+xml")
                return
            file = packages.find(path)
            if file is None:
                self.send_error(404)
                return
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            self._send(file.read_bytes(), kind)

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            text = kind.startswith("text/") or kind.endswith("javascript")
            self.send_header("Content-Type", kind + ("; charset=utf-8" if text else ""))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    return Handler


@contextmanager
def serve(modules: Path) -> Iterator[str]:
    """Serve the packages below `modules`; gives the base URL."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler(Packages(modules)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
