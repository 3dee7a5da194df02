"""One table of element roles: which type names mean the same, and the word a person uses for them."""

from typing import Final

ROLE_TYPES: Final[dict[str, tuple[str, ...]]] = {
    "button": ("button", "push button", "pushbutton", "toggle button", "togglebutton", "menubutton", "splitbutton"),
    "link": ("link", "hyperlink", "a"),
    "tab": ("tab", "page tab", "pagetab"),
    "field": (
        "field", "textbox", "text field", "textfield", "searchbox", "input", "textarea", "entry", "spinbutton",
        "spin button", "password text", "edit",
    ),
    "checkbox": ("checkbox", "check box", "check", "menuitemcheckbox", "check menu item"),
    "switch": ("switch", "toggle"),
    "radio": ("radio", "radio button", "radiobutton", "menuitemradio", "radio menu item"),
    "dropdown": ("combobox", "combo box", "dropdown", "select", "listbox", "list box", "popupbutton"),
    "slider": ("slider",),
    "menuitem": ("menuitem", "menu item"),
    "menu": ("menu", "menubar", "menu bar"),
    "option": ("option", "list item", "listitem", "treeitem", "tree item"),
    "icon": ("icon", "image", "img", "graphic", "figure"),
    "heading": ("heading", "header", "title", "columnheader", "rowheader", "legend", "caption"),
    "label": ("label", "labeltext"),
    "cell": ("cell", "gridcell", "table cell", "term", "definition"),
    "text": ("text", "statictext", "paragraph", "static", "line", "status", "note", "mark", "code", "time"),
    "area": (
        "panel", "group", "region", "dialog", "alertdialog", "window", "form", "table", "grid", "row", "rowgroup",
        "list", "navigation", "banner", "main", "article", "section", "document", "toolbar", "tablist", "tabpanel",
        "tree", "radiogroup", "complementary", "contentinfo", "frame", "filler", "pane", "alert", "search",
    ),
}  # fmt: skip
"""Role → type names (ARIA, AT-SPI, widget kinds) that mean it. Spec §4.1 `type` is one of these or anything else."""

ROLE_WORDS: Final[dict[str, str]] = {"field": "text field", "menuitem": "menu item", "area": "", "text": "", "cell": ""}
"""The word embedded beside a text where it differs from the role's own name."""

_ROLE_OF: Final = {name: role for role, names in ROLE_TYPES.items() for name in names}


def role_of(kind: str) -> str:
    """The role a type name means; "" for an unknown one."""
    return _ROLE_OF.get(kind.casefold(), "")


def role_word(kind: str) -> str:
    """The word a person would say for an element of that type; "" where it would not be said."""
    role = role_of(kind)
    return ROLE_WORDS.get(role, role)
