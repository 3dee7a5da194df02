"""Goals with true boxes for rendered screens, from what their DOM says.

    python bench/pages/goals.py pick --captures bench/pages/.work/examples --wanted WANTED.jsonl --out goals.jsonl
    python bench/pages/goals.py auto --captures bench/pages/.work/calibration --count 500 --seed 7 --out goals.jsonl

`pick` takes hand-written goals, which name class, role, text and frame, and works out
their boxes; it stops when one of them is not true of the screens. `auto` writes goals
from templates. Both use the same rules of what is unique, absent or ambiguous.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Box = list[int]
CLICKED = {"button", "link", "tab", "menuitem", "menuitemcheckbox", "menuitemradio", "option", "treeitem"}
CONTROLS = {"textbox", "searchbox", "combobox", "checkbox", "radio", "spinbutton", "slider", "switch", "listbox"}
TYPED = {"textbox", "searchbox", "spinbutton"}
TICKED = {"checkbox", "switch"}
CHOSEN = {"listbox", "combobox"}
# What a role word in a goal may stand for.
FAMILY = {
    "": set(),
    "field": CONTROLS,
    "heading": {"heading"},
    "cell": {"cell", "gridcell", "columnheader", "rowheader"},
    "radio": {"radio"},
    "slider": {"slider"},
    **dict.fromkeys(CLICKED, CLICKED),
    **dict.fromkeys(TICKED, TICKED),
    **dict.fromkeys(TYPED, TYPED | {"combobox"}),
    **dict.fromkeys(CHOSEN, CHOSEN),
}
RANK = [CLICKED, CONTROLS, {"heading"}, {"cell", "gridcell", "columnheader", "rowheader"}, {"label", "text"}]
SLIVER = 4  # CSS pixels: less than this of a thing, at the edge of a pane, shows nothing of it
READABLE = re.compile(r"(?=.*[^\W\d])[\w\s.,:;!?'’\"()&+#@€$%/–—…·-]+")  # and not only digits
WIDE = 4  # a wrapper is as right as its text while it is at most this many times as large


def norm(text: str) -> str:
    """A text without case, outer punctuation and double spaces."""
    return " ".join(text.casefold().split()).strip(" :*….,")


def area(box: Box) -> int:
    return box[2] * box[3]


def overlap(a: Box, b: Box) -> float:
    """How much of the smaller box lies in the other."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return w * h / max(1, min(area(a), area(b))) if w > 0 and h > 0 else 0.0


@dataclass
class Thing:
    """Something visible on a screen which has a text or a name."""

    screen: str
    role: str
    box: Box | None
    text: str  # the text a person would ask for
    names: set[str]  # every text it may be known by, normalised
    dom: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return next((i for i, roles in enumerate(RANK) if self.role in roles), len(RANK))

    @property
    def asked(self) -> bool:
        """Whether it shows well enough to be asked for."""
        d = self.dom
        return bool(d) and d["seen"] == "own" and d["whole"] and not d["cut"] and self.box is not None

    @property
    def shown(self) -> bool:
        """Whether its letters, if it has any, are in full view too."""
        return self.asked and (self.role in CONTROLS or bool(self.dom["textBox"]) or not self.dom["text"])

    @property
    def plain(self) -> bool:
        """Whether its text is one readable line."""
        shown = self.dom.get("textBox") is not None and norm(self.dom.get("bare", "")) == norm(self.text)
        return self.asked and shown and self.dom["lines"] <= 2 and 2 <= len(norm(self.text)) <= 40

    def boxes(self) -> list[Box]:
        """The boxes any of which is a right answer."""
        own, letters = self.box, self.dom.get("textBox")
        assert own is not None
        if self.role in CONTROLS:
            return [own] + [w for w in self.dom["wrappers"] if w != own]
        if not letters:
            return [own]
        limit = WIDE * area(letters)
        if self.role in CLICKED:
            out = [own] + [w for w in self.dom["wrappers"] if area(w) <= limit]
            out += [letters] if area(own) > limit else []
        else:
            out = [letters] + ([own] if area(own) <= limit else [])
        return [b for i, b in enumerate(out) if b not in out[:i]]


def things_of(capture: dict[str, Any]) -> list[Thing]:
    """Everything on one screen that a goal's text can mean."""
    out: list[Thing] = []
    for node in capture["nodes"]:
        dom, role = node["dom"], node["role"]
        if role == "document" or min(node["bbox"][2:]) < SLIVER * capture["scale"]:
            continue
        text = dom["bare"] or dom["text"] or node["name"]
        if role in CONTROLS:
            text = dom["label"] or node["name"]
        names = {
            norm(t)
            for t in (node["name"], dom["label"], dom["placeholder"], dom["value"], dom["bare"])
            if len(t) <= 120
        }
        if len(dom["text"]) <= 120:
            names.add(norm(dom["text"]))
        names.discard("")
        if names:
            out.append(Thing(capture["name"], role, node["bbox"], text, names, dom))
    for extra in capture["texts"]:
        out.append(Thing(capture["name"], "text", extra["bbox"], extra["text"], {norm(extra["text"])}))
    return out


def clusters(things: list[Thing]) -> list[list[Thing]]:
    """Put together what lies on one another: a cell, its link and the link's letters."""
    groups: list[list[Thing]] = []
    for thing in sorted(things, key=lambda t: -area(t.box or [0, 0, 0, 0])):
        for group in groups:
            first = group[0]
            if (
                first.screen == thing.screen
                and first.box
                and thing.box
                and any(overlap(t.box or [0, 0, 0, 0], thing.box) >= 0.8 for t in group)
            ):
                group.append(thing)
                break
        else:
            groups.append([thing])
    return groups


@dataclass
class World:
    """All screens of a set."""

    captures: list[dict[str, Any]]

    @cached_property
    def things(self) -> list[Thing]:
        return [thing for capture in self.captures for thing in things_of(capture)]

    @property
    def screens(self) -> list[str]:
        return [c["name"] for c in self.captures]

    def matches(self, text: str, role: str, frame: str | None) -> list[Thing]:
        """One thing for each place where the text stands, in the stated role if there is one."""
        roles = FAMILY[role]
        found = [
            t
            for t in self.things
            if (frame is None or t.screen == frame)
            and norm(text) in t.names
            and (not roles or t.role in roles or (role == "button" and "btn" in t.dom.get("cls", "")))
        ]
        return [min(group, key=lambda t: t.rank) for group in clusters(found)]

    def hinted(self, text: str, role: str, frame: str | None) -> bool:
        """Whether the text stands anywhere, even as a part of something longer."""
        roles, pattern = FAMILY[role], re.compile(r"(?<!\w)" + re.escape(norm(text)) + r"(?!\w)")
        return any(
            pattern.search(name)
            for t in self.things
            if (frame is None or t.screen == frame) and (not roles or t.role in roles)
            for name in t.names
        )


class Untrue(Exception):
    """A goal says something which the screens do not bear out."""


def resolve(world: World, want: dict[str, Any]) -> dict[str, Any]:
    """The finished goal for a wanted one: its boxes and its screen."""
    text, role, frame, kind = want["text"], want.get("role", ""), want.get("frame"), want["class"]
    goal: dict[str, Any] = {"id": "", "goal": want["goal"], "frame": frame, "class": kind, "boxes": [], "screen": frame}
    if kind == "absent":
        if world.hinted(text, role, frame):
            raise Untrue(f"{want['goal']!r}: it is there")
        return goal
    found = world.matches(text, role, frame)
    if len({t.screen for t in found}) > 1:
        raise Untrue(f"{want['goal']!r}: on several screens: {sorted({t.screen for t in found})}")
    if not found:
        raise Untrue(f"{want['goal']!r}: nothing like it")
    goal["screen"] = found[0].screen
    if kind == "ambiguous":
        if len(found) < 2:
            raise Untrue(f"{want['goal']!r}: only one")
        if not all(t.box for t in found) or not all(t.shown for t in found):
            raise Untrue(f"{want['goal']!r}: a candidate is hardly seen")
        goal["boxes"] = sorted((t.boxes()[0] for t in found), key=lambda b: (b[1], b[0]))
        return goal
    if len(found) > 1:
        raise Untrue(f"{want['goal']!r}: {len(found)} of them")
    thing = found[0]
    if kind == "field" and (thing.role not in CONTROLS or not thing.asked):
        raise Untrue(f"{want['goal']!r}: no field that shows, but a {thing.role}")
    if kind == "text" and (thing.role in CONTROLS or not thing.plain):
        raise Untrue(f"{want['goal']!r}: no plain text, but a {thing.role}")
    goal["boxes"] = thing.boxes()
    return goal


PHRASES: dict[str, list[tuple[str, str]]] = {
    "button": [
        ("find button '{}'", "button"),
        ("find the {} button", "button"),
        ("click '{}'", ""),
        ("where is the '{}' button", "button"),
        ("press '{}'", ""),
        ('locate button "{}"', "button"),
    ],
    "link": [
        ("find link '{}'", "link"),
        ('find link "{}"', "link"),
        ("click '{}'", ""),
        ("open '{}'", ""),
        ("where is the link '{}'", "link"),
        ("find '{}'", ""),
    ],
    "tab": [("find tab '{}'", "tab"), ("locate the tab '{}'", "tab"), ("open the {} tab", "tab")],
    "menuitem": [("find menu item '{}'", "menuitem"), ("choose '{}' in the menu", "menuitem")],
    "heading": [("find heading '{}'", "heading"), ("where is the heading '{}'", "heading"), ("find '{}'", "")],
    "text": [("find '{}'", ""), ("find text '{}'", ""), ('where does it say "{}"', ""), ("locate '{}'", "")],
    "cell": [("find the cell '{}'", "cell"), ("find '{}'", ""), ("where is '{}' in the table", "cell")],
    "checkbox": [("find checkbox '{}'", "checkbox"), ("tick '{}'", "field"), ("where is the {} checkbox", "checkbox")],
    "radio": [("find radio button '{}'", "radio"), ("select the option '{}'", "field")],
    "switch": [("find switch '{}'", "switch"), ("toggle '{}'", "field")],
    "combobox": [
        ("find the dropdown '{}'", "combobox"),
        ("find the '{}' select box", "field"),
        ("where is the {} dropdown", "combobox"),
    ],
    "textbox": [
        ("find the '{}' field", "field"),
        ("find the field labelled '{}'", "field"),
        ("where is the {} field", "field"),
        ("type into '{}'", "field"),
        ("find text box '{}'", "field"),
    ],
}
NEARLY = {
    "sign in": "Sign out",
    "save": "Save as draft",
    "cancel": "Cancel order",
    "submit": "Resubmit",
    "delete": "Undelete",
    "edit": "Edit history",
    "next": "Next week",
    "search": "Search history",
    "add": "Add sibling",
    "apply": "Apply to all",
    "close": "Close account",
    "password": "Old password",
    "email": "Email signature",
    "name": "Maiden name",
    "home": "Home address",
}
NEVER = [
    "Eject disk",
    "Rotate left",
    "Mute microphone",
    "Burn CD",
    "Translate page",
    "Sync calendar",
    "Track parcel",
    "Refill toner",
    "Unlock vault",
    "Book a flight",
    "Play trailer",
    "Zoom to fit",
    "Invite guest",
    "Mirror screen",
    "Rewind tape",
    "Weigh parcel",
    "Feed the cat",
    "Empty cache",
]


def phrase(role: str, text: str, rng: random.Random) -> tuple[str, str]:
    """A goal's words and the role they state."""
    key = {
        "searchbox": "textbox",
        "spinbutton": "textbox",
        "slider": "textbox",
        "listbox": "combobox",
        "menuitemcheckbox": "menuitem",
        "menuitemradio": "menuitem",
        "option": "menuitem",
        "treeitem": "link",
        "gridcell": "cell",
        "columnheader": "cell",
        "rowheader": "cell",
        "label": "text",
    }.get(role, role)
    words, stated = rng.choice(PHRASES.get(key, PHRASES["text"]))
    return words.format(text), stated


def _absent(world: World, screen: str, rng: random.Random) -> dict[str, Any]:
    """Something which is not there: another word, a near word, or a real word as a wrong control."""
    here = [t for t in world.things if t.screen == screen and t.plain]
    way = rng.choice(["never", "nearly", "control", "twisted"])
    role = rng.choice(["button", "link", "field"])
    text = rng.choice(NEVER)
    if way == "control" and here:
        # neither labels, which may belong to a field, nor what a click on may do something
        plain = [t for t in here if t.rank in (2, 3) and not t.dom["clickable"]]
        text = rng.choice(plain or here).text
    elif way == "nearly":
        text = NEARLY[rng.choice(sorted(NEARLY))]
    elif way == "twisted" and here:
        first, second = rng.choice(here).text.split(), rng.choice(here).text.split()
        text = " ".join(first[:1] + second[-1:])
    words, stated = phrase("textbox" if role == "field" else role, text, rng)
    return {"goal": words, "class": "absent", "text": text, "role": stated}


def _ambiguous(world: World, screen: str, rng: random.Random) -> dict[str, Any] | None:
    counts: dict[tuple[str, str], int] = {}
    for t in world.things:
        if t.screen == screen and t.plain and (t.role in CLICKED or t.rank == 4) and READABLE.fullmatch(t.text):
            counts[(t.role, t.text)] = counts.get((t.role, t.text), 0) + 1
    many = sorted(key for key, n in counts.items() if n > 1)
    if not many:
        return None
    role, text = rng.choice(many)
    words, stated = phrase(role, text, rng)
    controls = world.matches(text, "field", screen)
    return None if controls and not stated else {"goal": words, "class": "ambiguous", "text": text, "role": stated}


def _present(world: World, screen: str, kind: str, rng: random.Random) -> dict[str, Any] | None:
    if kind == "field":
        pool = [
            t
            for t in world.things
            if t.screen == screen
            and t.role in CONTROLS
            and t.asked
            and t.dom["labelFrom"] in ("label", "labelledby", "near", "placeholder", "own")
        ]
    else:
        pool = [
            t
            for t in world.things
            if t.screen == screen
            and t.plain
            and t.rank <= 4
            and t.role not in CONTROLS
            and t.dom["alone"]
            and READABLE.fullmatch(t.text)
            and not re.search(r"\s\d+$", t.text)
        ]
        clicked = [t for t in pool if t.rank == 0]
        pool = clicked if clicked and rng.random() < 0.6 else pool
    if not pool:
        return None
    thing = rng.choice(pool)
    text = thing.text.strip(" :*")
    words, stated = phrase(thing.role, text, rng)
    return {"goal": words, "class": kind, "text": text, "role": stated}


def automatic(world: World, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Goals from templates, spread over classes and screens."""
    rng = random.Random(seed)
    kinds = ["text"] * 9 + ["field"] * 5 + ["absent"] * 3 + ["ambiguous"] * 3
    done: set[tuple[str, str | None]] = set()
    made = tries = 0
    while made < count and tries < 60 * count:
        tries += 1
        kind, screen = kinds[made % len(kinds)], rng.choice(world.screens)
        frame = screen if rng.random() < 0.6 else None
        if kind == "absent":
            want: dict[str, Any] | None = _absent(world, screen, rng)
        elif kind == "ambiguous":
            want = _ambiguous(world, screen, rng)
        else:
            want = _present(world, screen, kind, rng)
        if want is None or len(want["text"]) > 40 or (want["goal"].casefold(), frame) in done:
            continue
        try:
            goal = resolve(world, {**want, "frame": frame})
        except Untrue:
            continue
        done.add((want["goal"].casefold(), frame))
        made += 1
        yield goal


def load(folder: Path, only: list[str]) -> World:
    files = sorted(folder.glob("*.capture.json"))
    captures = [json.loads(f.read_text("utf-8")) for f in files]
    return World([c for c in captures if not only or c["name"] in only])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["pick", "auto", "list"], help="list shows what can be asked for")
    parser.add_argument("--captures", type=Path, required=True, help="folder that render.py wrote captures to")
    parser.add_argument("--only", nargs="*", default=[], help="names of single screens")
    parser.add_argument("--wanted", type=Path, help="hand-written goals for `pick`")
    parser.add_argument("--out", type=Path, help="the goals file to write")
    parser.add_argument("--count", type=int, default=500, help="how many goals `auto` makes")
    parser.add_argument("--seed", type=int, default=7)
    return parser.parse_args(argv)


def picked(world: World, wanted: Path) -> list[dict[str, Any]]:
    """The finished goals of a file of wanted ones; all complaints are told at once."""
    goals, wrong = [], []
    for line in wanted.read_text("utf-8").splitlines():
        try:
            goals.append(resolve(world, json.loads(line)))
        except Untrue as complaint:
            wrong.append(str(complaint))
    if wrong:
        raise SystemExit("\n".join(wrong))
    return goals


def main(argv: list[str]) -> int:
    args = parse(argv)
    world = load(args.captures, args.only)
    if args.way == "list":
        for t in world.things:
            if t.asked and t.rank < len(RANK):
                print(t.screen, t.role, repr(t.text), t.dom["labelFrom"], t.box, sep="\t")
        return 0
    goals = picked(world, args.wanted) if args.way == "pick" else list(automatic(world, args.count, args.seed))
    for number, goal in enumerate(goals, 1):
        goal["id"] = f"g{number:03d}"
    args.out.write_text("".join(json.dumps(g, ensure_ascii=False) + "\n" for g in goals), "utf-8")
    tally = {k: sum(g["class"] == k for g in goals) for k in ("text", "field", "absent", "ambiguous")}
    print(len(goals), tally, "named frames:", sum(g["frame"] is not None for g in goals))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
