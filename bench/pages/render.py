"""Render pages of open-source programs into pictures with accessibility trees.

    npm install --prefix bench/pages
    python bench/pages/render.py --set examples --out examples/screens

Writes NAME.png and NAME.tree.json into --out, and NAME.capture.json, which
goals.py reads, into --work. Nothing but the loopback is asked for a file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import urlsplit

from capture import Capture, public
from PIL import Image
from playwright.sync_api import Browser, Page, Route, sync_playwright
from screens import SETS, Screen, Step
from server import serve
from verdaccio_server import serve_verdaccio

HERE = Path(__file__).resolve().parent
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-lcd-text",
    "--font-render-hinting=none",
    "--hide-scrollbars",
]
CALM = (
    "*, *::before, *::after { transition: none !important; animation-duration: 1ms !important; "
    "animation-delay: 0s !important; caret-color: transparent !important; }"
)


def only_loopback(route: Route) -> None:
    """Let requests to this machine pass and end every other one."""
    url = urlsplit(route.request.url)
    if url.scheme in ("data", "blob") or url.hostname == "127.0.0.1":
        route.continue_()
    else:
        route.abort()


def take_step(page: Page, step: Step) -> None:
    verb, *args = step
    if verb == "js":
        page.evaluate(args[0])
    elif verb == "wait":
        page.wait_for_timeout(int(args[0]))
    elif verb == "press":
        page.keyboard.press(args[0])
    elif verb == "fill":
        page.fill(args[0], args[1])
    elif verb == "check":
        page.check(args[0], force=True)
    elif verb in ("click", "hover"):
        getattr(page.locator(args[0]).first, verb)()
    else:
        raise ValueError(f"unknown step {verb!r}")
    page.wait_for_timeout(150)


def settle(page: Page) -> None:
    """Wait until fonts are in and charts have been drawn."""
    page.wait_for_load_state("load")
    page.evaluate("document.fonts.ready.then(() => true)")
    page.wait_for_timeout(1800)


def save_png(raw: Path, out: Path) -> None:
    """Store the picture as small as it gets without changing a pixel."""
    with Image.open(raw) as image:
        image.convert("RGB").save(out, optimize=True)
    if which("optipng"):
        # -nc and -np: keep true colours, no palette
        subprocess.run(["optipng", "-quiet", "-o2", "-nc", "-np", "-strip", "all", str(out)], check=True)


def shoot(browser: Browser, screen: Screen, url: str, out: Path, work: Path) -> None:
    """Open one page, do its steps, and save picture, tree and capture."""
    context = browser.new_context(
        viewport={"width": screen.view[0], "height": screen.view[1]},
        device_scale_factor=screen.scale,
        color_scheme="dark" if screen.dark else "light",
        locale="en-US",
        timezone_id="UTC",
        reduced_motion="reduce",
    )
    context.route("**/*", only_loopback)
    page = context.new_page()
    page.goto(url, wait_until="domcontentloaded")
    page.add_style_tag(content=CALM)
    settle(page)
    for step in screen.steps:
        take_step(page, step)
    page.mouse.move(1, screen.view[1] - 2)
    page.wait_for_timeout(400)
    raw = work / f"{screen.name}.raw.png"
    page.screenshot(path=raw)
    shown: dict[str, Any] = Capture(page, screen.scale).run()
    context.close()
    shown.update(name=screen.name, program=screen.program)
    shown["texts"] += [{"text": word, "bbox": None} for word in screen.painted]
    save_png(raw, out / f"{screen.name}.png")
    raw.unlink()
    write_rows(out / f"{screen.name}.tree.json", [public(n) for n in shown["nodes"]])
    (work / f"{screen.name}.capture.json").write_text(json.dumps(shown, ensure_ascii=False), "utf-8")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON list with one object a line."""
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(SETS), default="examples", help="which list of screens")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and trees")
    parser.add_argument("--modules", type=Path, default=HERE / "node_modules", help="installed npm packages")
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="folder for captures")
    parser.add_argument("--only", nargs="*", default=[], help="names of single screens")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser's program file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    screens = [s for s in SETS[args.set] if not args.only or s.name in args.only]
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as profile:
        base = stack.enter_context(serve(args.modules))
        packages = ""
        if any(s.program == "verdaccio" for s in screens):
            packages = stack.enter_context(serve_verdaccio(args.modules))
        play = stack.enter_context(sync_playwright())
        browser = play.chromium.launch(
            executable_path=args.chromium,
            headless=True,
            args=ARGS,
            env={"HOME": profile},
        )
        for screen in screens:
            url = packages + screen.path if screen.program == "verdaccio" else f"{base}/{screen.path}"
            shoot(browser, screen, url, args.out, args.work)
            print(f"{screen.name}: {screen.size[0]}x{screen.size[1]}", flush=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
