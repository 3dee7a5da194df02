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
        "adminlte-forms",
        "admin-lte",
        "admin-lte/pages/forms/general.html",
        painted=("Browse",),
        steps=(
            ("fill", "#exampleInputEmail1", "mara.lind@example.org"),
            ("check", "#exampleCheck1"),
        ),
    ),
    Screen(
        "adminlte-tables-4k",
        "admin-lte",
        "admin-lte/pages/tables/data.html",
        scale=2.0,
        steps=(
            ("js", "window.scrollTo(0, document.querySelector('#example1').getBoundingClientRect().top - 190)"),
            ("click", ".buttons-colvis"),
        ),
    ),
    Screen(
        "adminlte-mailbox-dark",
        "admin-lte",
        "admin-lte/pages/mailbox/mailbox.html",
        dark=True,
        steps=(
            ("js", "document.body.classList.add('dark-mode')"),
            ("js", "document.querySelector('.main-header').classList.replace('navbar-white', 'navbar-dark')"),
            ("js", "document.querySelector('.main-header').classList.remove('navbar-light')"),
        ),
    ),
    Screen("adminlte-login", "admin-lte", "admin-lte/pages/examples/login.html"),
    Screen(
        "tabler-forms-4k",
        "tabler-ui",
        "tabler-ui/dist/form-elements.html",
        view=(2560, 1440),
        scale=1.5,
        painted=("Browse",),
    ),
    Screen("tabler-dashboard", "tabler-ui", "tabler-ui/dist/index.html"),
    Screen(
        "ckeditor-table-dialog",
        "ckeditor4",
        "ckeditor4/samples/index.html",
        steps=(("click", ".cke_button__table"), ("wait", "800")),
    ),
    Screen("verdaccio-package", "verdaccio", "/-/web/detail/tide-clock"),
)

ADMINATOR = "adminator-admin-dashboard/dist/"

CALIBRATION = (
    Screen("adminator-forms", "adminator", ADMINATOR + "forms.html", view=(1440, 900)),
    Screen(
        "adminator-choices",
        "adminator",
        ADMINATOR + "forms.html",
        view=(1366, 768),
        steps=(("js", "window.scrollTo(0, 1500)"),),
    ),
    Screen("adminator-users-dark", "adminator", ADMINATOR + "datatable.html", view=(1600, 900), dark=True),
    Screen("adminator-inbox", "adminator", ADMINATOR + "email.html", view=(1920, 1080)),
    Screen("adminator-signup", "adminator", ADMINATOR + "signup.html", view=(1280, 800)),
    Screen("adminator-compose-dark", "adminator", ADMINATOR + "compose.html", view=(1280, 800), dark=True),
    Screen("coreui-members", "coreui", "src/coreui-members.html", view=(1440, 900)),
    Screen("coreui-settings", "coreui", "src/coreui-settings.html", view=(1366, 768), dark=True),
    Screen("coreui-checkout", "coreui", "src/coreui-checkout.html", view=(1280, 800)),
    Screen("coreui-refund", "coreui", "src/coreui-refund.html", view=(1600, 900)),
    Screen("coreui-plant", "coreui", "src/coreui-plant.html", view=(1440, 900), dark=True, steps=(("click", "#act"),)),
    Screen("uikit-article", "uikit", "src/uikit-article.html", view=(1366, 768)),
    Screen("uikit-shop", "uikit", "src/uikit-shop.html", view=(1440, 900), steps=(("click", "#tools"),)),
    Screen(
        "uikit-tickets", "uikit", "src/uikit-tickets.html", view=(1680, 1050), dark=True, steps=(("click", "#more"),)
    ),
    Screen("uikit-contact", "uikit", "src/uikit-contact.html", view=(1280, 800)),
    Screen("jqueryui-booking", "jquery-ui", "src/jqueryui-booking.html", view=(1280, 800)),
    Screen("jqueryui-dialog", "jquery-ui", "src/jqueryui-dialog.html", view=(1366, 768), dark=True),
    Screen("jqueryui-tabs", "jquery-ui", "src/jqueryui-tabs.html", view=(1440, 900)),
    Screen("jqueryui-paint", "jquery-ui", "src/jqueryui-paint.html", view=(1280, 1024)),
    Screen("layui-grant", "layui", "src/layui-grant.html", view=(1440, 900)),
    Screen("layui-parts", "layui", "src/layui-parts.html", view=(1600, 900)),
    Screen("layui-library", "layui", "src/layui-library.html", view=(1920, 1080)),
    Screen("layui-layer", "layui", "src/layui-layer.html", view=(1366, 768)),
)

SETS = {"examples": EXAMPLES, "calibration": CALIBRATION}
