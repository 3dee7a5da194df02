"""What can go wrong, once: every kind of error with its fix, exit code and wire status.

    HimError
    ├── UsageError         the request itself is wrong: fix the input and call again
    │   └── LimitError     an input is larger than a limit in `him.config`
    ├── NotFoundError      nothing is stored under that name
    ├── ConflictError      the name is taken, or another writer got there first
    │   └── SealedError    the snapshot is sealed and cannot be written
    ├── IntegrityError     stored bytes do not match their digest (rule 1: never returned)
    ├── ExpiredError       removed on purpose by retention; not corruption
    ├── ShreddedError      its key was destroyed on purpose; not corruption
    ├── KeyNeededError     encrypted, and the keys are not at hand
    ├── DriftError         the environment is not the one a trace was recorded in; the model not the one of a KV cache
    ├── VersionError       written by newer software than this
    ├── StorageError       the disk or the store refused (full, read-only, failed fsync)
    │   └── UnavailableError   the cold store does not answer, or answers 5xx
    ├── BusyError          another process holds what is needed
    └── MissingPartError   an optional part is not installed

The table `KINDS` is the single source for the CLI's exit codes, the HTTP and gRPC statuses
and the generated page `docs/ERRORS.md`.
"""

from typing import ClassVar, Final, NamedTuple


class Kind(NamedTuple):
    """One row of the error table."""

    fix: str
    exit_code: int
    http_status: int
    grpc_status: str
    meaning: str

    @property
    def page(self) -> str:
        """Path of the docs page that explains the kinds of error."""
        return "docs/ERRORS.md"


KINDS: Final[dict[str, Kind]] = {
    "usage": Kind("correct the input; `--help` shows examples", 2, 400, "INVALID_ARGUMENT", "The request is wrong."),
    "limit": Kind("make the input smaller, or split it", 2, 413, "RESOURCE_EXHAUSTED", "An input exceeds a limit."),
    "not_found": Kind(
        "list what exists: `him snap list`, `him branch`, `him tiles ls`", 3, 404, "NOT_FOUND", "No such object."
    ),
    "conflict": Kind("choose another name, or read again and retry", 4, 409, "ABORTED", "Name taken or overtaken."),
    "sealed": Kind(
        "write to the branch (a child is opened) or `him snap create --from` it",
        4,
        409,
        "FAILED_PRECONDITION",
        "The snapshot is sealed.",
    ),
    "integrity": Kind(
        "run `him fsck`: it names each fault and what mends it", 5, 500, "DATA_LOSS", "Stored bytes are damaged."
    ),
    "expired": Kind("nothing to repair: retention removed it", 6, 410, "NOT_FOUND", "Removed by retention."),
    "shredded": Kind("nothing to repair: its key was destroyed", 6, 410, "NOT_FOUND", "Shredded on purpose."),
    "key_needed": Kind(
        "give the key ring and its passphrase: HIM_KEYS and HIM_PASSPHRASE, or `him.open(…, keys=…)`",
        13,
        403,
        "PERMISSION_DENIED",
        "It is encrypted, and the keys are not at hand.",
    ),
    "drift": Kind(
        "run under the pinned environment, or record a new trace", 7, 412, "FAILED_PRECONDITION", "Environment differs."
    ),
    "version": Kind("install a newer `him`", 8, 505, "UNIMPLEMENTED", "Written by newer software."),
    "storage": Kind(
        "free space or mend the disk, then run the command again: it resumes", 9, 507, "UNAVAILABLE", "Storage refused."
    ),
    "unavailable": Kind(
        "wait and run it again: what is warm is served meanwhile; `him tier status` shows when the store is back",
        12,
        503,
        "UNAVAILABLE",
        "The cold store does not answer.",
    ),
    "busy": Kind("wait for the other process, or stop it", 10, 503, "UNAVAILABLE", "Held by another process."),
    "missing_part": Kind("install the named extra", 11, 501, "UNIMPLEMENTED", "An optional part is missing."),
}


class HimError(Exception):
    """Base of all errors HIM raises on purpose.

    Args:
        message: what went wrong, in one line, without the fix.
        object: the object concerned (`snp_… kv_cache:chat-7 L2 (104,33)`), if any.
        place: where its bytes lie (`packs/3f….pack @ 4096`), if known.
        fix: what the user can do; the kind's own fix when left out.
    """

    kind: ClassVar[str] = "usage"

    def __init__(self, message: str, *, object: str = "", place: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.object = object
        self.place = place
        self.fix = fix or KINDS[self.kind].fix

    @property
    def exit_code(self) -> int:
        """The CLI's exit code for this error."""
        return KINDS[self.kind].exit_code

    def line(self) -> str:
        """The one line a person sees: what, which object, where, and the fix."""
        named = f" [{self.object}]" if self.object else ""
        at = f" at {self.place}" if self.place else ""
        return f"{self.message}{named}{at} — {self.fix}"

    def as_dict(self) -> dict[str, str]:
        """The JSON form used by `--json` and by HTTP problem bodies."""
        return {
            "error": self.kind,
            "message": self.message,
            "object": self.object,
            "place": self.place,
            "fix": self.fix,
        }


class UsageError(HimError):
    """The request itself is wrong."""

    kind: ClassVar[str] = "usage"


class LimitError(UsageError):
    """An input is larger than a limit in `him.config`."""

    kind: ClassVar[str] = "limit"


class NotFoundError(HimError):
    """Nothing is stored under that name."""

    kind: ClassVar[str] = "not_found"


class ConflictError(HimError):
    """The name is taken, or another writer got there first."""

    kind: ClassVar[str] = "conflict"


class SealedError(ConflictError):
    """The snapshot is sealed and cannot be written."""

    kind: ClassVar[str] = "sealed"


class IntegrityError(HimError):
    """Stored bytes do not match their digest; they are never returned."""

    kind: ClassVar[str] = "integrity"


class ExpiredError(HimError):
    """Removed on purpose by retention."""

    kind: ClassVar[str] = "expired"


class ShreddedError(HimError):
    """Its key was destroyed on purpose."""

    kind: ClassVar[str] = "shredded"


class KeyNeededError(HimError):
    """What is read or written is encrypted, and the keys are not at hand, or do not open."""

    kind: ClassVar[str] = "key_needed"


class DriftError(HimError):
    """The environment is not the one a trace was recorded in, or the model not the one a KV cache is bound to."""

    kind: ClassVar[str] = "drift"


class VersionError(HimError):
    """Written by newer software than this."""

    kind: ClassVar[str] = "version"


class StorageError(HimError):
    """The disk or the store refused."""

    kind: ClassVar[str] = "storage"


class UnavailableError(StorageError):
    """The cold store does not answer; what it holds is not lost."""

    kind: ClassVar[str] = "unavailable"


class BusyError(HimError):
    """Another process holds what is needed."""

    kind: ClassVar[str] = "busy"


class MissingPartError(HimError):
    """An optional part is not installed."""

    kind: ClassVar[str] = "missing_part"
