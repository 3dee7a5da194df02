"""Run verdaccio on the loopback with a few tiny packages of our own in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG = """\
storage: {storage}
self_path: {storage}
web:
  enable: true
  title: Workshop packages
  showInfo: false
auth:
  htpasswd:
    file: {storage}/htpasswd
uplinks: {{}}
packages:
  '**':
    access: $all
    publish: $all
log: {{ type: stdout, format: pretty, level: error }}
"""

README = """\
# {name}

{text}. No dependencies, one function, and a table of numbers.

## Usage

    const find = require('{name}');
    console.log(find('today').first);

## Options

| Option | Default | Meaning |
| ------ | ------- | ------- |
| unit | metric | metric or imperial |
| round | 2 | digits after the point |
| locale | en | language of the month names |

## Contributing

Bug reports are welcome. Please run the tests before you send a change.
"""

# name, version, description, keywords, author
TINY = [
    ("paint-swatch", "1.4.2", "Names and values of wall paint colours", ["colour", "paint"], "Ines Roth"),
    ("bolt-sizes", "0.9.0", "Metric bolt and nut sizes as a small table", ["metric", "hardware"], "Jonas Weir"),
    ("tide-clock", "2.1.0", "Rough tide times from the phase of the moon", ["clock", "sea"], "Mara Lind"),
    ("seed-planner", "3.0.1", "When to sow which vegetables", ["garden", "calendar"], "Ines Roth"),
    ("bike-gears", "0.3.5", "Gear ratios for touring bicycles", ["bicycle", "ratio"], "Tomas Vale"),
    ("soup-stock", "1.0.0", "Keeps count of the jars in the pantry", ["kitchen"], "Mara Lind"),
]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait(url: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url + "/-/ping", timeout=2).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def _publish(base: str, work: Path) -> None:
    """Publish the tiny packages into the server at `base`."""
    rc = work / "npmrc"
    rc.write_text(f"//{base.removeprefix('http://')}/:_authToken=none\n", "utf-8")
    for name, version, text, words, author in TINY:
        folder = work / name
        folder.mkdir()
        manifest = {
            "name": name,
            "version": version,
            "description": text,
            "keywords": words,
            "author": author,
            "license": "MIT",
            "main": "index.js",
        }
        (folder / "package.json").write_text(json.dumps(manifest), "utf-8")
        (folder / "index.js").write_text("module.exports = {};\n", "utf-8")
        (folder / "README.md").write_text(README.format(name=name, text=text), "utf-8")
        subprocess.run(
            ["npm", "publish", "--registry", base, "--userconfig", str(rc), "--no-provenance"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=120,
        )


@contextmanager
def serve_verdaccio(modules: Path) -> Iterator[str]:
    """Start verdaccio from `modules`; gives its base URL and stops it afterwards."""
    with tempfile.TemporaryDirectory() as temp:
        work = Path(temp)
        config = work / "config.yaml"
        config.write_text(CONFIG.format(storage=work / "storage"), "utf-8")
        base = f"http://127.0.0.1:{_free_port()}"
        server = subprocess.Popen(
            [
                "node",
                str(modules.resolve() / "verdaccio" / "bin" / "verdaccio"),
                "--config",
                str(config),
                "--listen",
                base.removeprefix("http://"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=work,
            env={**os.environ, "HOME": temp},
        )
        try:
            _wait(base)
            _publish(base, work)
            yield base
        finally:
            server.terminate()
            server.wait(timeout=20)
