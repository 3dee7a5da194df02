"""What a page shows: Chromium's accessibility tree joined with boxes from the DOM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from playwright.sync_api import CDPSession, Error, Page

SCRIPT = (Path(__file__).resolve().parent / "capture.js").read_text("utf-8")

ARIA = {
    "RootWebArea": "document",
    "StaticText": "text",
    "LabelText": "label",
    "Canvas": "image",
    "SvgRoot": "image",
    "Iframe": "group",
    "IframePresentational": "group",
    "img": "image",
    "Section": "group",
    "Pre": "group",
    "DisclosureTriangle": "button",
    "Legend": "legend",
    "LayoutTable": "table",
    "LayoutTableRow": "row",
    "LayoutTableCell": "cell",
    "Abbr": "text",
    "PopUpButton": "combobox",
    "TextField": "textbox",
    "Date": "textbox",
    "Time": "textbox",
    "ColorWell": "button",
    "Figcaption": "caption",
    "DescriptionList": "list",
    "image": "image",
    "DescriptionListTerm": "term",
    "DescriptionListDetail": "definition",
    "EmbeddedObject": "group",
}
DROPPED = {"InlineTextBox", "LineBreak", "ListMarker", "none", "MenuListPopup"}
UNNAMED = {"generic", "Section", "GenericContainer"}
STATES = {
    "disabled",
    "checked",
    "selected",
    "expanded",
    "focused",
    "pressed",
    "readonly",
    "required",
    "multiline",
    "level",
    "haspopup",
    "modal",
    "invalid",
    "focusable",
}
CONTROLS = {"textbox", "searchbox", "combobox", "checkbox", "radio", "spinbutton", "slider", "switch", "listbox"}
CLICKED = CONTROLS | {"button", "link", "tab", "menuitem", "option", "menuitemcheckbox", "menuitemradio", "treeitem"}

ICON = re.compile("[\ue000-\uf8ff]")  # icon fonts put their drawings on private letters


def _state(node: dict[str, Any], role: str, seen: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for prop in node.get("properties", []):
        if prop["name"] not in STATES or "value" not in prop["value"]:
            continue
        value = prop["value"]["value"]
        value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        out[prop["name"]] = value
    disabled = bool(out.pop("disabled", False))
    focusable = bool(out.pop("focusable", False))
    if role in CLICKED or focusable or disabled:
        out["enabled"] = not disabled
    if out.get("invalid") is False:
        del out["invalid"]
    if role in CONTROLS and seen["value"]:
        out["value"] = seen["value"]
    return out


class Capture:
    """One page's visible accessibility nodes, in picture pixels."""

    def __init__(self, page: Page, scale: float) -> None:
        self.page = page
        self.scale = scale
        self.cdp: CDPSession = page.context.new_cdp_session(page)
        for domain in ("DOM", "Accessibility", "Runtime"):
            self.cdp.send(f"{domain}.enable")
        view = page.evaluate("[innerWidth, innerHeight]")
        self.size = (round(view[0] * scale), round(view[1] * scale))
        self.nodes: list[dict[str, Any]] = []
        self.known: set[int] = set()

    def pixels(self, box: list[float]) -> list[int]:
        """A CSS box as a whole-numbered picture box, cut at the picture's edge."""
        x0, y0 = max(0, round(box[0] * self.scale)), max(0, round(box[1] * self.scale))
        x1 = min(self.size[0], round((box[0] + box[2]) * self.scale))
        y1 = min(self.size[1], round((box[1] + box[3]) * self.scale))
        return [x0, y0, max(0, x1 - x0), max(0, y1 - y0)]

    def measure(self, backend: int) -> dict[str, Any] | None:
        try:
            found = self.cdp.send("DOM.resolveNode", {"backendNodeId": backend})
            answer = self.cdp.send(
                "Runtime.callFunctionOn",
                {
                    "objectId": found["object"]["objectId"],
                    "returnByValue": True,
                    "functionDeclaration": SCRIPT,
                },
            )
        except Error:  # the node has gone since the tree was read
            return None
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        seen: dict[str, Any] | None = answer["result"].get("value")
        if seen is None:
            return None
        for key in ("box", "textBox"):
            seen[key] = self.pixels(seen[key]) if seen[key] else None
        seen["wrappers"] = [self.pixels(b) for b in seen["wrappers"]]
        return seen if seen["box"][2] > 0 and seen["box"][3] > 0 else None

    def add(self, role: str, name: str, parent: str | None, seen: dict[str, Any], state: dict[str, Any]) -> str:
        ident = f"n{len(self.nodes) + 1}"
        self.nodes.append(
            {
                "id": ident,
                "parent": parent,
                "role": role,
                "name": name,
                "bbox": seen["box"],
                "state": state,
                "dom": seen,
            }
        )
        return ident

    def _frame(self, frame_id: str | None, top: str | None) -> None:
        args = {"frameId": frame_id} if frame_id else {}
        tree = self.cdp.send("Accessibility.getFullAXTree", args)["nodes"]
        by_id = {n["nodeId"]: n for n in tree}
        roots = [n for n in tree if n.get("parentId") not in by_id]
        stack = [(n["nodeId"], top) for n in reversed(roots)]
        while stack:
            ident, parent = stack.pop()
            node = by_id[ident]
            parent = self._node(node, parent)
            for child in reversed(node.get("childIds", [])):
                if child in by_id:
                    stack.append((child, parent))

    def _node(self, node: dict[str, Any], parent: str | None) -> str | None:
        """Keep one accessibility node when it shows; gives the parent for its children."""
        raw = node.get("role", {}).get("value", "none")
        backend = node.get("backendDOMNodeId")
        if node.get("ignored") or raw in DROPPED or backend is None:
            return parent
        name = " ".join(ICON.sub("", str(node.get("name", {}).get("value", ""))).split())
        if raw in UNNAMED and not name:
            return parent
        if raw == "StaticText":
            self.known.add(backend)
        seen = self._document() if raw == "RootWebArea" and parent is None else self.measure(backend)
        role = ARIA.get(raw, raw)
        if seen is None or (raw == "StaticText" and not name):
            return parent
        if role in CLICKED and seen["seen"] not in ("own", "part"):
            return parent
        return self.add(role, name, parent, seen, _state(node, role, seen))

    def _document(self) -> dict[str, Any]:
        return {
            "box": [0, 0, *self.size],
            "textBox": None,
            "wrappers": [],
            "tag": "html",
            "cls": "",
            "type": "",
            "whole": True,
            "seen": "own",
            "text": "",
            "bare": "",
            "alone": True,
            "lines": 1,
            "cut": False,
            "clickable": False,
            "label": "",
            "labelFrom": "",
            "placeholder": "",
            "value": "",
        }

    def _texts(self) -> list[dict[str, Any]]:
        """Texts that are drawn although the accessibility tree leaves them out."""
        out: list[dict[str, Any]] = []
        root = self.cdp.send("DOM.getDocument", {"depth": -1, "pierce": True})["root"]
        stack = [root]
        while stack:
            node = stack.pop()
            for key in ("children", "shadowRoots"):
                stack.extend(node.get(key, []))
            if "contentDocument" in node:
                stack.append(node["contentDocument"])
            if node["nodeType"] != 3 or node["backendNodeId"] in self.known:
                continue
            if node["nodeValue"].strip():
                seen = self.measure(node["backendNodeId"])
                if seen:
                    out.append({"text": seen["text"], "bbox": seen["box"]})
        return out

    def run(self) -> dict[str, Any]:
        """The nodes of every frame, and the texts outside the accessibility tree."""
        self._frame(None, None)
        top = self.nodes[0]["id"] if self.nodes else None
        for frame_id in self._child_frames():
            self._frame(frame_id, top)
        return {"size": list(self.size), "scale": self.scale, "nodes": self.nodes, "texts": self._texts()}

    def _child_frames(self) -> list[str]:
        self.cdp.send("Page.enable")
        tree = self.cdp.send("Page.getFrameTree")["frameTree"]
        out: list[str] = []
        stack = list(reversed(tree.get("childFrames", [])))
        while stack:
            node = stack.pop()
            out.append(node["frame"]["id"])
            stack.extend(reversed(node.get("childFrames", [])))
        return out


def public(node: dict[str, Any]) -> dict[str, Any]:
    """The part of a node that belongs into NAME.tree.json."""
    return {key: node[key] for key in ("id", "parent", "role", "name", "bbox", "state")}
