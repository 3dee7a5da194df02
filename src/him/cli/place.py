"""Which repository a command means; standard library only, because the fast path asks first."""

import os
from collections.abc import Mapping, Sequence

MARKER = "him.json"
"""The file that makes a folder a repository."""


def find_repository(named: str | None, environ: Mapping[str, str], cwd: str) -> str | None:
    """The resolved path: `--repo`, else `HIM_REPO`, else the nearest folder upwards that holds a repository.

    Returns:
        None when nothing is named and no folder upwards is a repository. A named path is not checked.
    """
    chosen = named or environ.get("HIM_REPO")
    if chosen:
        return os.path.realpath(os.path.join(cwd, os.path.expanduser(chosen)))
    folder = os.path.realpath(cwd)
    while not os.path.isfile(os.path.join(folder, MARKER)):
        above = os.path.dirname(folder)
        if above == folder:
            return None
        folder = above
    return folder


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """The last value given to `--name VALUE` or `--name=VALUE`, read without knowing the command."""
    found: str | None = None
    for index, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == name and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(f"{name}="):
            found = argument.removeprefix(f"{name}=")
    return found
