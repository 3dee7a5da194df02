"""From anything that goes wrong to one line and one exit code."""

import errno
import traceback

import typer.exceptions

from him.cli.session import Session, json_line, plain
from him.errors import HimError, LimitError, NotFoundError, StorageError, UsageError

EXIT_UNEXPECTED = 70
"""A fault in this program (`EX_SOFTWARE`)."""
EXIT_CHECK_FAILED = 1
"""`him doctor` found something to mend, or `him demo` an answer that differs from the saved one."""
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141


def report(error: BaseException, session: Session, arguments: list[str]) -> int:
    """Say what went wrong; returns the exit code."""
    known = as_him_error(error, session, arguments)
    if known is None:
        if session.environ.get("HIM_DEBUG"):
            session.err.write("".join(traceback.format_exception(error)))
        message = f"{type(error).__name__}: {_first_line(error)}"
        fix = "this is a fault in him: run again with HIM_DEBUG=1 and report what it prints"
        _emit(session, arguments, f"{message} — {fix}", {"error": "unexpected", "message": message, "fix": fix})
        return EXIT_UNEXPECTED
    if session.environ.get("HIM_DEBUG"):
        session.err.write("".join(traceback.format_exception(error)))
    _emit(session, arguments, known.line(), {**known.as_dict()})
    return known.exit_code


def as_him_error(error: BaseException, session: Session, arguments: list[str]) -> HimError | None:
    """The error of the table that an exception stands for; None when it is a fault of this program."""
    if isinstance(error, HimError):
        return error
    if isinstance(error, typer.exceptions.TyperException):
        words = " ".join(word for word in arguments[:2] if word.isalpha())
        return UsageError(
            error.format_message().splitlines()[0],
            fix=f"see `{' '.join(filter(None, ('him', words)))} --help`, which shows examples",
        )
    if isinstance(error, OSError):
        return _from_system(error)
    if isinstance(error, MemoryError):
        return LimitError("not enough memory for this input")
    return None


def _from_system(error: OSError) -> HimError:
    """What the operating system refused, in the words of the error table."""
    reason = error.strerror or str(error)
    place = "" if error.filename is None else str(error.filename)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError(reason, place=place, fix="check the path")
    if error.errno in (errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG):
        return UsageError(reason, place=place)
    if error.errno in (errno.EACCES, errno.EPERM):
        return StorageError(reason, place=place, fix="give this user the right to it, then run the command again")
    return StorageError(reason, place=place)


def _emit(session: Session, arguments: list[str], line: str, value: dict[str, object]) -> None:
    session.err.write(f"error: {plain(line)}\n")
    if "--json" in arguments:
        session.out.write(json_line(value) + "\n")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
