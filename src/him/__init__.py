"""HIM: a versioned memory for agents and model state, kept as image pyramids of tiles.

    import him

    with him.open("memory", create=True) as repo:
        work = repo.writable("main")
        work.put_image(picture, "screens/login")
        print(repo.query("find button 'Submit'", "main").as_json())

Importing this package loads nothing else: its parts come with their first use, so that the command line can answer
through a warm daemon within a few milliseconds.
"""

TYPE_CHECKING = False  # as typing's, whose import would cost a third of what this package costs to load
if TYPE_CHECKING:
    from him import kv
    from him.app import Repository, SnapshotHandle, check, clone, create_ring, heal, open, open_ring, restore
    from him.errors import HimError

__version__ = "0.1.0"

_HOMES = {
    "open": "him.app",
    "check": "him.app",
    "clone": "him.app",
    "create_ring": "him.app",
    "open_ring": "him.app",
    "heal": "him.app",
    "restore": "him.app",
    "Repository": "him.app",
    "SnapshotHandle": "him.app",
    "HimError": "him.errors",
}
"""Public name → the module it is loaded from when first asked for (PEP 562)."""

_MODULES = ("kv",)
"""Public modules, loaded in the same way."""

__all__ = [
    "HimError", "Repository", "SnapshotHandle", "__version__", "check", "clone", "create_ring", "heal", "kv", "open",
    "open_ring", "restore",
]  # fmt: skip


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None and name not in _MODULES:
        raise AttributeError(f"module 'him' has no attribute {name!r}")
    from importlib import import_module

    if home is None:
        return import_module(f"him.{name}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
