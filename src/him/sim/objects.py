"""A bucket in memory whose replies get lost."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from him.errors import LimitError, NotFoundError, UnavailableError


class Asked(Protocol):
    """What every request passes through."""

    def ask(self, name: str, *, writes: Callable[[], None] | None = None) -> None:
        """A request; `writes` carries it out, if it changes anything. Raises UnavailableError."""
        ...

    def stale(self) -> bool:
        """Whether a list is of some time ago."""
        ...


class Bucket:
    """What the store holds, and what its lists showed some time ago."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.listed: dict[str, int] = {}
        """What a stale list still shows: names and sizes."""

    def remember(self) -> None:
        """From now on stale lists show this moment."""
        self.listed = {name: len(data) for name, data in self.objects.items()}


class SimObjects:
    """`ports.ObjectStore` on a Bucket, as one process reaches it."""

    def __init__(self, bucket: Bucket, gate: Asked) -> None:
        self._bucket, self._gate = bucket, gate

    def size(self, name: str) -> int | None:
        """Bytes, or None."""
        self._gate.ask(name)
        found = self._bucket.objects.get(name)
        return None if found is None else len(found)

    def get(self, name: str, limit: int) -> bytes:
        """A whole object."""
        self._gate.ask(name)
        found = self._found(name)
        if len(found) > limit:
            raise LimitError("the object is too large", place=name)
        return found

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Parts of an object, a request each."""
        parts: list[memoryview] = []
        for offset, size in ranges:
            self._gate.ask(name)
            found = self._found(name)
            if offset + size > len(found):
                raise NotFoundError("the object ends before the range does", place=name)
            parts.append(memoryview(found)[offset : offset + size])
        return parts

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Replace an object; of a conditional one that was carried out twice the fate is open, as with a lost reply."""
        outcomes: list[bool] = []

        def carry_out() -> None:
            outcomes.append(not if_absent or name not in self._bucket.objects)
            if outcomes[-1]:
                self._bucket.objects[name] = bytes(data)

        self._gate.ask(name, writes=carry_out)
        if if_absent and len(outcomes) > 1 and outcomes[0]:
            raise UnavailableError("a reply was lost: whose object this is remains open (simulated)", place=name)
        return outcomes[0]

    def upload(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """A large object, in one piece."""
        data = b"".join(parts)
        self._gate.ask(name, writes=lambda: self._bucket.objects.update({name: data}))

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Names and sizes, perhaps of some time ago."""
        self._gate.ask(prefix)
        if self._gate.stale():
            shown = self._bucket.listed
        else:
            shown = {name: len(data) for name, data in self._bucket.objects.items()}
        return iter(sorted((name, size) for name, size in shown.items() if name.startswith(prefix)))

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects."""

        def carry_out() -> None:
            for name in names:
                self._bucket.objects.pop(name, None)

        self._gate.ask(names[0] if names else "", writes=carry_out)

    def _found(self, name: str) -> bytes:
        found = self._bucket.objects.get(name)
        if found is None:
            raise NotFoundError("no such object", place=name)
        return found
