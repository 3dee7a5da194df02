"""A trace: what a run was asked, what came from outside, and the digest of every step and of the answer.

That of an encrypted snapshot is encrypted, under a key that is destroyed with the snapshot, and holds the secret of the
directory it read.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec
from blake3 import blake3

from him.crypto import unwrap, wrap
from him.errors import HimError, IntegrityError, NotFoundError, ShreddedError, UsageError, VersionError
from him.ports import Disk
from him.types import MALFORMED, TRACE_PREFIX, BlobId, Fault, Ref, Secret

FOLDER: Final = "spool"
_VERSION: Final = 1
_ENCRYPTED: Final = 2
_BYTES_MAX: Final = 64 * 1024 * 1024
_FIX: Final = "delete the file: what it recorded cannot be proved any more"


class Effect(msgspec.Struct, frozen=True, array_like=True):
    """Something from outside that went into the run: a clock reading, a decision that hung on time."""

    name: str
    value: bytes


class Step(msgspec.Struct, frozen=True, array_like=True):
    """A computed step: hex BLAKE3 of its canonical input and output."""

    name: str
    inputs: str
    output: str


class Trace(msgspec.Struct, frozen=True):
    """Everything needed to recompute a run and to tell the first step that differs.

    `request` is the call's parameters as strings; `pins` are digests and versions of all that decides the result
    (code, models, calibrator, runtime); `answer` is the exact line that was returned.
    """

    version: int
    trace_id: str
    kind: str
    snapshot_id: str
    directory: str
    request: dict[str, str | int | float | None]
    pins: dict[str, str]
    effects: tuple[Effect, ...]
    steps: tuple[Step, ...]
    answer: str
    digest: str = ""

    def with_digest(self) -> "Trace":
        """The trace with the digest of all its other fields."""
        return msgspec.structs.replace(self, digest=_digest(self))

    @property
    def whole(self) -> bool:
        """Whether no byte of it was changed since it was saved."""
        return self.digest == _digest(self)


class TraceKey(NamedTuple):
    """What a trace is encrypted with, and the secret of the directory that was read."""

    key_id: bytes
    key: bytes
    directory: Secret


class _Encrypted(msgspec.Struct, frozen=True):
    """The file of an encrypted trace: `body` is base64 of what is encrypted, `digest` the hex BLAKE3 of the rest."""

    version: int
    trace_id: str
    snapshot_id: str
    key_id: str
    body: bytes
    digest: str = ""

    def with_digest(self) -> "_Encrypted":
        plain = msgspec.json.encode(msgspec.structs.replace(self, digest=""), order="sorted")
        return msgspec.structs.replace(self, digest=blake3(plain).hexdigest())


class _Body(msgspec.Struct, frozen=True):
    trace: Trace
    secret: str


class Recording:
    """`ports.Recorder` that notes what passes."""

    def __init__(self) -> None:
        self.effects: list[Effect] = []
        self.steps: list[Step] = []

    def effect(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Make the outside effect and note its value."""
        value = make()
        self.effects.append(Effect(name, value))
        return value

    def step(self, name: str, inputs: bytes, output: bytes) -> None:
        """Note the digests of a computed step."""
        self.steps.append(Step(name, blake3(inputs).hexdigest(), blake3(output).hexdigest()))


class Divergence(NamedTuple):
    """Where a replay first differed from its trace."""

    step: str
    what: str
    expected: str
    got: str


class Replaying:
    """`ports.Recorder` that gives outside effects from a trace and compares every step with it."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._effects = 0
        self.recomputed = 0
        self.divergence: Divergence | None = None

    @property
    def from_trace(self) -> int:
        """Effects taken from the trace so far."""
        return self._effects

    def effect(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The recorded value of the next outside effect.

        Raises:
            DivergedError: the run asks for another effect than it did when recorded.
        """
        if self._effects >= len(self._trace.effects) or self._trace.effects[self._effects].name != name:
            asked = self._trace.effects[self._effects].name if self._effects < len(self._trace.effects) else "nothing"
            self.differ(Divergence(name, "effect", asked, name))
            raise DivergedError
        self._effects += 1
        return self._trace.effects[self._effects - 1].value

    def step(self, name: str, inputs: bytes, output: bytes) -> None:
        """Compare with the recorded digests; the first difference is kept."""
        number = self.recomputed
        self.recomputed += 1
        if number >= len(self._trace.steps):
            self.differ(Divergence(name, "step", "nothing", name))
            return
        recorded = self._trace.steps[number]
        if recorded.name != name:
            self.differ(Divergence(name, "step", recorded.name, name))
        elif recorded.inputs != (got := blake3(inputs).hexdigest()):
            self.differ(Divergence(name, "input", recorded.inputs, got))
        elif recorded.output != (got := blake3(output).hexdigest()):
            self.differ(Divergence(name, "output", recorded.output, got))

    def differ(self, found: Divergence) -> None:
        """Keep the first divergence."""
        self.divergence = self.divergence or found


class DivergedError(Exception):
    """The run left the recorded path, so that nothing after it can be compared; caught in `run`."""


def save(disk: Disk, trace: Trace, key: TraceKey | None = None) -> None:
    """Write a trace into the spool. It is evidence, not state: it is not synced on the query's path.

    Args:
        key: of a trace of an encrypted snapshot.
    """
    whole: Trace | _Encrypted = trace.with_digest()
    if key is not None:
        body = msgspec.json.encode(_Body(whole, bytes(key.directory).hex()))
        sealed = wrap(key.key, trace.trace_id.encode(), body)
        whole = _Encrypted(_ENCRYPTED, trace.trace_id, trace.snapshot_id, key.key_id.hex(), sealed).with_digest()
    path = f"{FOLDER}/{trace.trace_id}.json"
    file = disk.open(path, create=True)
    try:
        file.write_at(0, msgspec.json.encode(whole, order="sorted") + b"\n")
    except HimError:
        disk.remove(path)
        raise
    finally:
        file.close()


def load(disk: Disk, trace_id: str, key_of: Callable[[bytes], bytes | None] = lambda _id: None) -> tuple[Trace, Ref]:
    """Read a trace, and how its directory is referred to.

    Args:
        key_of: a key of the key ring by its id.

    Raises:
        UsageError: not a trace id.
        NotFoundError: no such trace.
        IntegrityError: the file is no trace at all (a trace with altered values loads; its replay tells).
        ShreddedError: its key was destroyed.
    """
    digits = trace_id.removeprefix(TRACE_PREFIX)
    if not trace_id.startswith(TRACE_PREFIX) or not digits.isalnum() or len(digits) > 64:
        raise UsageError(f"not a trace id: {trace_id!r}", fix="trace ids begin with tr_ and come with every answer")
    path = f"{FOLDER}/{trace_id}.json"
    try:
        file = disk.open(path)
    except NotFoundError as error:
        raise NotFoundError("no such trace", object=trace_id, fix="see the trace_id of an answer") from error
    try:
        found = _parsed(file.read_at(0, _BYTES_MAX), trace_id, path)
    finally:
        file.close()
    if isinstance(found, Trace):
        return found, BlobId(_hex(found.directory, trace_id, path))
    key = key_of(_hex(found.key_id, trace_id, path))
    if key is None:
        raise ShreddedError("the trace was shredded with its snapshot", object=trace_id, place=path)
    try:
        body = msgspec.json.decode(unwrap(key, trace_id.encode(), found.body), type=_Body)
    except (IntegrityError, *MALFORMED) as error:
        raise IntegrityError(f"the trace does not decrypt ({error})", object=trace_id, place=path) from error
    return body.trace, Secret(_hex(body.secret, trace_id, path))


def _hex(digits: str, trace_id: str, path: str) -> bytes:
    try:
        return bytes.fromhex(digits)
    except ValueError as error:
        raise IntegrityError(f"the trace does not parse ({error})", object=trace_id, place=path) from error


class _Version(msgspec.Struct):
    version: int


def _parsed(data: bytes, trace_id: str, path: str) -> Trace | _Encrypted:
    """The trace behind the bytes of a file.

    Raises:
        IntegrityError: no trace at all. VersionError: one of newer software.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version == _ENCRYPTED:
            return msgspec.json.decode(data, type=_Encrypted)
        # A version that does not match the digest is no newer one: its replay tells.
        if version > _VERSION and not _altered(data):
            raise VersionError(
                f"the trace has version {version}, this software knows {_VERSION}", object=trace_id, place=path
            )
        return msgspec.json.decode(data, type=Trace)
    except MALFORMED as error:
        raise IntegrityError(f"the trace does not parse ({error})", object=trace_id, place=path) from error


def _altered(data: bytes) -> bool:
    """Whether this is a trace of ours whose version alone was changed."""
    try:
        return msgspec.structs.replace(msgspec.json.decode(data, type=Trace), version=_VERSION).whole
    except MALFORMED:
        return False


def faults(disk: Disk) -> Iterator[Fault]:
    """What is wrong with traces in the spool: a part of fsck."""
    for trace_id in names(disk):
        path = f"{FOLDER}/{trace_id}.json"
        try:
            file = disk.open(path)
        except NotFoundError:
            continue
        try:
            data = file.read_at(0, _BYTES_MAX)
            found = _parsed(data, trace_id, path)
            if not (found.whole if isinstance(found, Trace) else found.with_digest() == found):
                yield Fault(trace_id, path, "the trace does not match its digest", _FIX, "trace")
        except IntegrityError as error:
            yield Fault(trace_id, path, error.message, _FIX, "trace")
        except VersionError as error:
            yield Fault(trace_id, path, error.message, error.fix, "version")
        finally:
            file.close()


def names(disk: Disk) -> list[str]:
    """Ids of the traces in the spool, oldest first (they are ULIDs)."""
    return [name.removesuffix(".json") for name in disk.list(FOLDER) if name.endswith(".json")]


def new_trace(
    trace_id: str,
    kind: str,
    snapshot_id: str,
    directory: str,
    request: dict[str, str | int | float | None],
    pins: dict[str, str],
    recording: Recording,
    answer: str,
) -> Trace:
    """The trace of a finished run."""
    return Trace(
        _VERSION, trace_id, kind, snapshot_id, directory, request, pins,
        tuple(recording.effects), tuple(recording.steps), answer,
    )  # fmt: skip


def _digest(trace: Trace) -> str:
    return blake3(msgspec.json.encode(msgspec.structs.replace(trace, digest=""), order="sorted")).hexdigest()
