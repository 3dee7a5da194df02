"""`him keys`: what is encrypted, and with which passphrase."""

from typing import Annotated

import typer

from him.cli.commands import JsonOption, RepoOption, command, group
from him.cli.session import Session, session_of
from him.errors import KeyNeededError

KeysOption = Annotated[
    str | None, typer.Option("--keys", metavar="FILE", help="The key ring, outside the repository; else HIM_KEYS.")
]


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    keys = group(program, "keys", "The key ring: create, encrypt streams, status, another passphrase.")
    examples = ["him keys create", "him keys create --keys /media/key/him.ring --json"]
    command(keys, "create", examples, within="keys")(create)
    command(keys, "encrypt", ["him keys encrypt screen", "him keys encrypt logs --json"], within="keys")(encrypt)
    command(keys, "status", ["him keys status", "him keys status --json"], within="keys")(status)
    examples = ["him keys passphrase", "him keys passphrase --json"]
    command(keys, "passphrase", examples, within="keys")(passphrase)


def create(context: typer.Context, keys: KeysOption = None, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Make the repository's key ring, under the passphrase in HIM_PASSPHRASE, HIM_PASSPHRASE_FILE or asked for.

    Without the ring and its passphrase nothing that is encrypted can be read, by anybody: keep a copy apart from the
    copies of the repository.
    """
    from him.app.rings import create_ring, ring_path

    session = session_of(context)
    folder = session.repository_path(repo)
    path = session.path(keys) if keys is not None else ring_path(folder, session.environ)
    create_ring(folder, _asked(session, "", twice=True), path)
    _said(session, {"keys": str(path)}, f"made {path}", json=json)


def encrypt(
    context: typer.Context,
    streams: Annotated[list[str], typer.Argument(metavar="STREAM…", help="Streams, such as screen or kv_cache.")],
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """From now on encrypt the frames of streams that are put or replaced; those that are there stay as they are."""
    session = session_of(context)
    with session.repository(repo) as repository:
        named = [name for stream in streams for name in repository.encrypt(stream)]
    _said(session, {"encrypted": named}, f"from now on encrypted: {', '.join(named)}", json=json)


def status(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Where the key ring is, whether it opens, and which streams are encrypted."""
    from him.app.rings import passphrase_of, ring_path

    session = session_of(context)
    folder = session.repository_path(repo)
    path = ring_path(folder, session.environ)
    with session.repository(repo) as repository:
        state = repository.key_state()
    there = path.is_file()
    shown: dict[str, object] = {
        "keys": str(path),
        "there": there,
        "opened": state.opened,
        "encrypted": list(state.streams),
    }
    what = "opened" if state.opened else "there, not opened" if there else "not there"
    if there and not state.opened and not passphrase_of(session.environ):
        what += " (HIM_PASSPHRASE is not set)"
    _said(session, shown, f"{path}: {what}; encrypted: {', '.join(state.streams) or 'nothing'}", json=json)


def passphrase(context: typer.Context, repo: RepoOption = None, json: JsonOption = False) -> None:
    """Open the key ring with another passphrase from now on: HIM_NEW_PASSPHRASE, its _FILE, or asked for."""
    from him.app.rings import change_passphrase, open_ring, ring_path

    session = session_of(context)
    folder = session.repository_path(repo)
    path = ring_path(folder, session.environ)
    ring = open_ring(folder, _asked(session, ""), path)
    change_passphrase(ring, _asked(session, "NEW_", twice=True))
    _said(session, {"keys": str(path)}, f"{path} opens with the new passphrase alone", json=json)


def _asked(session: Session, prefix: str, *, twice: bool = False) -> str:
    from him.app.rings import passphrase_of

    found = passphrase_of(session.environ, prefix)
    if found or not session.terminal:
        if not found:
            raise KeyNeededError(
                "no passphrase",
                fix=f"set HIM_{prefix}PASSPHRASE, or HIM_{prefix}PASSPHRASE_FILE, or run it in a terminal",
            )
        return found
    return str(typer.prompt("new passphrase" if twice else "passphrase", hide_input=True, confirmation_prompt=twice))


def _said(session: Session, value: dict[str, object], text: str, *, json: bool) -> None:
    session.json(value) if json else session.say(text)
