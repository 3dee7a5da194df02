"""The screens that are rendered: which page, at what size, and what is done on it first."""

from __future__ import annotations

from dataclasses import dataclass

# A step is ("click", selector), ("fill", selector, text), ("check", selector),
# ("hover", selector), ("press", key), ("js", expression) or ("wait", milliseconds).
Step = tuple[str, ...]


@dataclass(frozen=True)
class Screen:
    """One picture: a page of a program in a viewport, after some steps."""

    name: str
    program: str
    path: str
    view: tuple[int, int] = (1920, 1080)
    scale: float = 1.0
    dark: bool = False
    steps: tuple[Step, ...] = ()
    painted: tuple[str, ...] = ()  # words drawn in a canvas, which the DOM does not know

    @property
    def size(self) -> tuple[int, int]:
        return round(self.view[0] * self.scale), round(self.view[1] * self.scale)


EXAMPLES = (
    Screen(
        "adminlte-forms", "admin-lte", "admin-lte/pages/forms/general.html", painted=("Browse",),
        steps=(
            ("fill", "#exampleInputEmail1", "mara.lind@example.org"),
            ("check", "#exampleCheck1"),
        ),
    ),
    Screen(
        "adminlte-tables-4k", "admin-lte", "admin-lte/pages/tables/data.html", scale=2.0,
        steps=(
            ("js", "window.scrollTo(0, document.querySelector('#example1').getBoundingClientRect().top - 190)"),
            ("click", ".buttons-colvis"),
        ),
    ),
    Screen(
        "adminlte-mailbox-dark", "admin-lte", "admin-lte/pages/mailbox/mailbox.html", dark=True,
        steps=(
            ("js", "document.body.classList.add('dark-mode')"),
            ("js", "document.querySelector('.main-header').classList.replace('navbar-white', 'navbar-dark')"),
            ("js", "document.querySelector('.main-header').classList.remove('navbar-light')"),
        ),
    ),
    Screen("adminlte-login", "admin-lte", "admin-lte/pages/examples/login.html"),
    Screen(
        "tabler-forms-4k", "tabler-ui", "tabler-ui/dist/form-elements.html", view=(2560, 1440), scale=1.5,
        painted=("Browse",),
    ),
    Screen("tabler-dashboard", "tabler-ui", "tabler-ui/dist/index.html"),
    Screen(
        "ckeditor-table-dialog", "ckeditor4", "ckeditor4/samples/index.html",
        steps=(("click", ".cke_button__table"), ("wait", "800")),
    ),
    Screen("verdaccio-package", "verdaccio", "/-/web/detail/tide-clock"),
)

SETS = {"examples": EXAMPLES}
