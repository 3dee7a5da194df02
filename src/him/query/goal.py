"""From a person's sentence to what is looked for: verb, role, target text, and how the text belongs to the target."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

import msgspec

from him.config import GOAL_CHARS_MAX
from him.errors import LimitError, UsageError

VERBS: Final[dict[str, str]] = {
    "find": "find", "locate": "find", "where is": "find", "where's": "find", "where are": "find", "show": "find",
    "show me": "find", "look for": "find", "search for": "find", "point to": "find", "point at": "find",
    "highlight": "find", "see": "find", "go to": "click", "navigate to": "click", "click": "click",
    "click on": "click", "double click": "click", "double-click": "click", "right click": "click", "press": "click",
    "push": "click", "hit": "click", "tap": "click", "tap on": "click", "select": "click", "choose": "click",
    "pick": "click", "open": "click", "activate": "click", "toggle": "click", "check": "click", "tick": "click",
    "uncheck": "click", "expand": "click", "collapse": "click", "close": "click", "switch to": "click",
    "type in": "type", "type into": "type", "type": "type", "enter text in": "type", "enter text into": "type",
    "enter": "type", "focus": "type", "fill in": "type", "fill out": "type", "fill": "type",
}  # fmt: skip
"""Opening words of a goal → what is to be done: find, click or type."""

VERB_ROLES: Final[dict[str, str]] = {
    "tick": "checkbox", "check": "checkbox", "uncheck": "checkbox", "toggle": "switch", "type in": "field",
    "type into": "field", "type": "field", "enter text in": "field", "enter text into": "field", "enter": "field",
    "fill in": "field", "fill out": "field", "fill": "field",
}  # fmt: skip
"""What a verb is done to, when the target comes without a noun; toggled are also buttons, so there only when quoted."""

NOUNS: Final[dict[str, str]] = {
    "push button": "button", "toggle button": "button", "radio button": "radio", "menu button": "button",
    "button": "button", "btn": "button", "link": "link", "hyperlink": "link", "anchor": "link", "tab": "tab",
    "text field": "field", "text box": "field", "text area": "field", "input field": "field", "input box": "field",
    "entry field": "field", "search field": "field", "field": "field", "input": "field", "textbox": "field",
    "textfield": "field", "textarea": "field", "box": "field", "check box": "checkbox", "checkbox": "checkbox",
    "tick box": "checkbox", "tickbox": "checkbox", "radio": "radio", "toggle switch": "switch", "switch": "switch",
    "drop-down list": "dropdown", "drop-down menu": "dropdown", "dropdown list": "dropdown",
    "dropdown menu": "dropdown", "drop-down": "dropdown", "drop down": "dropdown", "dropdown": "dropdown",
    "combo box": "dropdown", "combobox": "dropdown", "select box": "dropdown", "selector": "dropdown",
    "list box": "dropdown", "slider": "slider", "menu item": "menuitem", "menu entry": "menuitem",
    "menuitem": "menuitem", "tree item": "option", "list item": "option", "icon": "icon", "heading": "heading",
    "headline": "heading", "column header": "heading", "header": "heading",
}  # fmt: skip
"""What a person calls an element → its role (`him.index.roles`)."""

NOUNS_BESIDE_QUOTES: Final[dict[str, str]] = {
    **NOUNS, "entry": "field", "select": "dropdown", "toggle": "switch", "item": "menuitem", "menu": "menu",
    "option": "option", "image": "icon", "picture": "icon", "logo": "icon", "title": "heading", "label": "label",
    "text": "", "message": "", "paragraph": "", "cell": "cell", "dialog": "area", "panel": "area",
    "table": "area", "group": "area", "section": "area", "window": "area",
}  # fmt: skip
"""Nouns that may as well belong to the text looked for, so they count only when that text is quoted. A text can stand
on anything, so it is no role."""

KINDS: Final[dict[str, str]] = {
    "menu": "menu", "submenu": "menu", "toggle": "switch", "option": "option", "item": "menuitem", "image": "icon",
    "picture": "icon", "logo": "icon", "dialog": "area", "dialogue": "area", "window": "area", "panel": "area",
    "table": "area", "form": "area", "group": "area", "section": "area", "page": "", "screen": "", "view": "",
    "folder": "", "mailbox": "", "category": "", "list": "", "card": "", "tile": "", "row": "", "column": "",
    "pane": "", "popup": "", "pop-up": "",
}  # fmt: skip
"""What else a person calls a thing when its name comes first: "Junk folder" → its role, or "" where it has none. What
is clicked to reach an area is no area."""

REGIONS: Final = frozenset(
    {
        "toolbar", "tool bar", "sidebar", "side bar", "navbar", "nav bar", "menu bar", "menubar", "title bar",
        "status bar", "tab bar", "bar", "footer", "header", "banner", "dialog", "dialogue", "modal", "popup", "pop-up",
        "list", "form", "navigation", "nav", "menu", "submenu", "dropdown", "drop-down", "panel", "pane", "page",
        "screen", "view", "window", "table", "grid", "row", "column", "tree", "section", "group", "area", "card",
        "drawer", "tab", "tabs", "box", "folder", "breadcrumb", "breadcrumbs", "side", "corner", "top", "bottom",
        "left", "right", "middle", "center", "centre",
    }
)  # fmt: skip
"""Nouns of surroundings: "… in the side menu" says where an unquoted target lies."""

_ACTS: Final = frozenset(
    {
        "add", "archive", "close", "copy", "create", "delete", "download", "duplicate", "edit", "export", "import",
        "insert", "leave", "manage", "merge", "move", "new", "open", "print", "refresh", "reload", "remove", "rename",
        "reset", "save", "send", "share", "show", "upload", "view",
    }
)  # fmt: skip
"""Before a kind these have it as their object: "New folder" is no folder called New."""
_REGION_WORDS_MAX: Final = 4

_QUOTES: Final = re.compile(
    r"“([^”]*)”|«([^»]*)»|„([^“”]*)[“”]|‘((?:[^’]|’(?=\w))*)’(?!\w)"
    r"|(?<!\w)\"([^\"]*)\"|(?<!\w)'((?:[^']|'(?=\w))*)'(?!\w)|(?<!\w)`([^`]*)`"
)
_LABELLED: Final = r"(?:label(?:led|ed)(?: as| with)?|with (?:the )?label)"
_PLACEHOLDER: Final = r"(?:(?:with )?(?:the |a )?placeholder(?: text)?|(?:that )?hints?)"
_NAMED: Final = (
    r"(?:named|called|titled|marked|saying|reading|(?:that|which) (?:says|reads)"
    r"|with (?:the )?(?:text|name|title|caption|words?))"
)
_SAYS: Final = rf"(?P<label>{_LABELLED})|(?P<placeholder>{_PLACEHOLDER})|(?P<name>{_NAMED}|for|to|of|:)"
_PLACED: Final = r"(?:in|on|at|under|below|above|near|beside|inside|within|from|next to|by|of)(?: the| a)?"
_ARTICLES: Final = r"(?:(?:the|a|an|my|this|that|me)\s+)*"
_ORDINALS: Final = {
    "first": 1,
    "1st": 1,
    "second": 2,
    "2nd": 2,
    "third": 3,
    "3rd": 3,
    "fourth": 4,
    "4th": 4,
    "last": -1,
}


def _alternatives(words: Iterable[str]) -> str:
    # Longest first: "menu item" before "menu"; a plural "s" is let pass.
    return "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in sorted(words, key=lambda w: (-len(w), w)))


_VERB: Final = re.compile(
    rf"^(?:please\s+|can you\s+|could you\s+)*(?P<verb>{_alternatives(VERBS)})(?!\w)\s*{_ARTICLES}", re.IGNORECASE
)
_NOUN: Final = re.compile(rf"(?<!\w)(?P<noun>{_alternatives(NOUNS)})s?(?!\w)", re.IGNORECASE)
_NOUN_BESIDE: Final = re.compile(rf"(?<!\w)(?P<noun>{_alternatives(NOUNS_BESIDE_QUOTES)})s?(?!\w)", re.IGNORECASE)
_THEN_TEXT: Final = re.compile(
    rf"^(?P<noun>{_alternatives(NOUNS)})s?\s*(?:is\s+)?(?:{_SAYS})\s*{_ARTICLES}(?P<text>.+)$", re.IGNORECASE
)
_NOUN_LAST: Final = re.compile(rf"^(?P<text>.+?)\s+(?P<noun>{_alternatives(NOUNS)})s?$", re.IGNORECASE)
_NOUN_FIRST: Final = re.compile(rf"^(?P<noun>{_alternatives(NOUNS)})\s+(?P<text>.+)$", re.IGNORECASE)
_NOUN_INSIDE: Final = re.compile(
    rf"^(?P<text>.+?)\s+(?P<noun>{_alternatives(NOUNS)})\s+{_PLACED}\s+(?P<context>.+)$", re.IGNORECASE
)
_KIND_LAST: Final = re.compile(rf"^(?P<text>.+?)\s+(?P<noun>{_alternatives(KINDS)})$", re.IGNORECASE)
_REGION_LAST: Final = re.compile(
    r"^(?P<text>.+)\s+(?:in|on|of|at|from|inside|under|within)\s+the\s+"
    rf"(?P<context>(?:\S+\s+){{0,{_REGION_WORDS_MAX}}}?(?:{_alternatives(REGIONS)}))$",
    re.IGNORECASE,
)
_LINKING: Final = re.compile(r"(?<!\w)(?:the|a|an|this|that|my|your|all|to|of|in|on|at|for|and|or|by)$", re.IGNORECASE)
"""Words a name does not end in: "Back to the list" is no list called "Back to the"."""
_REGION_NOUN: Final = re.compile(rf"(?:^|\s+)(?:{_alternatives(REGIONS)})$", re.IGNORECASE)
_HERE: Final = re.compile(
    r"\s+(?:(?:in|on|of|at)\s+(?:the|this)\s+(?:page|screen|window|picture|screenshot)|here)$", re.IGNORECASE
)
_END_PUNCTUATION: Final = re.compile(r"[\s?!.]+$")


class Goal(msgspec.Struct, frozen=True):
    """What is looked for.

    Attributes:
        raw: the goal as given, white space collapsed.
        verb: "find", "click", "type" or "".
        role: a role of `him.index.roles`, or "".
        text: the target text; "" when only a role is asked for.
        variants: texts that may be meant, `text` first, then longer readings; one unless the target stood unquoted.
        quoted: the target stood in quotation marks.
        relation: "label" or "placeholder" when the goal says that is what the text is; else "".
        context: text of something the target lies in or near; "" when none is named.
        ordinal: 1, 2, … in reading order among equals, -1 the last, 0 not said.
    """

    raw: str
    verb: str
    role: str
    text: str
    variants: tuple[str, ...]
    quoted: bool
    relation: str = ""
    context: str = ""
    ordinal: int = 0


def parse(goal: str) -> Goal:
    """Understand a goal such as `find button 'Submit'` or `the field labelled Email`.

    Raises:
        UsageError: nothing is asked for, or the text cannot be encoded.
        LimitError: longer than GOAL_CHARS_MAX.
    """
    if len(goal) > GOAL_CHARS_MAX:
        raise LimitError(f"a goal may have {GOAL_CHARS_MAX} characters, this one has {len(goal)}")
    if any(unicodedata.category(c) == "Cs" for c in goal):
        raise UsageError("the goal is not valid text (lone surrogates)", fix="pass it as UTF-8")
    raw = " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in goal).split())
    quotes = [match for match in _QUOTES.finditer(raw) if any(c.isalnum() for c in match.group())]
    if not any(not c.isspace() and unicodedata.category(c)[0] not in "PC" for c in raw):
        raise UsageError("the goal is empty", fix="say what to find: find button 'Submit'")
    return _quoted(raw, quotes) if quotes else _unquoted(raw)


def _inside(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _verb(text: str) -> tuple[str, str]:
    """(the verb as in VERBS or "", what follows it and its articles)."""
    match = _VERB.match(text)
    if match is None:
        return "", re.sub(rf"^{_ARTICLES}", "", text, flags=re.IGNORECASE)
    return " ".join(match["verb"].casefold().split()), text[match.end() :]


def _role(noun: str) -> str:
    return NOUNS_BESIDE_QUOTES[" ".join(noun.casefold().split())]


def _quoted(raw: str, quotes: list[re.Match[str]]) -> Goal:
    """The words outside the quotation marks say what the quoted texts are."""
    text, context, relation = "", "", ""
    around: list[str] = []
    start = 0
    for match in quotes:
        before = raw[start : match.start()].rstrip(" :")
        start = match.end()
        around.append(before)
        says = re.search(rf"(?:{_SAYS})$", before, re.IGNORECASE)
        placed = re.search(rf"(?<!\w){_PLACED}(?:\s+\w+)?$", before, re.IGNORECASE)
        if text and placed:
            context = context or _inside(match)
            around[-1] = before[: placed.start()]  # "in the dropdown 'City'": that noun is not the target's
        elif not text:
            text = _inside(match)
            if says:
                relation = "label" if says["label"] else "placeholder" if says["placeholder"] else ""
    around.append(raw[start:])
    verb, before = _verb(around[0].strip() + " ")
    # After the target, "in the table" says where it is and not what it is.
    after = [re.sub(rf"(?<!\w){_PLACED}(?!\w).*$", " ", part, flags=re.IGNORECASE) for part in around[1:]]
    rest = re.sub(rf"{_LABELLED}|{_PLACEHOLDER}|{_NAMED}", " ", " | ".join([before, *after]), flags=re.IGNORECASE)
    noun = _NOUN_BESIDE.search(rest)
    role = _role(noun["noun"]) if noun else "field" if relation else VERB_ROLES.get(verb, "")
    ordinal = next((_ORDINALS[word] for word in rest.casefold().split() if word in _ORDINALS), 0)
    return Goal(raw, VERBS.get(verb, ""), role, text, (text,), True, relation, context, ordinal)


def region_name(context: str) -> str:
    """Surroundings without the noun that says what they are: "Users table" → "Users", "table" → ""."""
    return _REGION_NOUN.sub("", context)


def _placed(text: str) -> tuple[str, str]:
    """(text without the surroundings at its end, the nearest of them); "Sign in" and "Terms of service" stay whole."""
    context = ""
    while match := _REGION_LAST.match(text):
        text, context = match["text"].rstrip(" ,"), match["context"]
    return text, context


def _kind(text: str, verb: str) -> tuple[str, str] | None:
    """(role or "", text without the kind of thing at its end) of "Junk folder"; None when it has none."""
    match = _KIND_LAST.match(text)
    if match is None or match["text"].split()[0].casefold() in _ACTS or _LINKING.search(match["text"]):
        return None
    role = KINDS[" ".join(match["noun"].casefold().split())]
    return "" if role == "area" and VERBS.get(verb) == "click" else role, match["text"]


def _unquoted(raw: str) -> Goal:
    """Without quotation marks the words themselves decide; other readings stay as variants."""
    whole = _END_PUNCTUATION.sub("", raw) or raw
    verb, rest = _verb(whole)
    rest = _HERE.sub("", rest).strip()
    implied = "" if verb == "toggle" or not rest else VERB_ROLES.get(verb, "")
    rest = rest or whole
    placed, context = _placed(rest)
    role, text, relation = implied, placed, ""
    if match := _THEN_TEXT.match(placed):
        role, text = _role(match["noun"]), match["text"]
        relation = "label" if match["label"] else "placeholder" if match["placeholder"] else ""
    elif match := _NOUN_LAST.match(placed):
        role, text = _role(match["noun"]), match["text"]
    elif kind := _kind(placed, verb):
        role, text = kind
    elif match := _NOUN_FIRST.match(placed):
        role, text = _role(match["noun"]), match["text"]
    elif match := _NOUN_INSIDE.match(placed):
        role, text, context = _role(match["noun"]), match["text"], match["context"]
    elif match := _NOUN.fullmatch(placed):
        role, text = _role(match["noun"]), ""
    text = text.strip(" ,;:\"'`“”‘’«»") or text
    variants = tuple(dict.fromkeys((text, placed, rest, whole))) if text else ()
    return Goal(raw, VERBS.get(verb, ""), role, text, variants, False, relation, context, 0)
