"""Small limits and no threads: so that some thousand operations meet every end of a pack, checkpoint and eviction.

Each constant of `him.config` is replaced in every module that has taken it over, for the length of a `with` block. Work
that production spreads over threads is done at once, in order, by the process's own: a thread of it that waited for
the baton while it holds a lock of the process would stop the world.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

LIMITS: Final[dict[str, float]] = {
    "PACK_TARGET_BYTES": 24 * 1024,
    "PACK_RANGES_MAX": 40,
    "CHECKPOINT_RECORDS": 40,
    "ADDRESS_TAIL_ROWS": 60,
    "ADDRESS_KEPT_ROWS": 10,
    "ADDRESS_MERGE_RATIO": 2,
    "EXTENT_BYTES": 4096,
    "COLD_PART_BYTES": 32 * 1024,
    "COLD_GAP_BYTES": 4096,
    "WARM_PACK_RATIO": 1 / 8,
    "SYNC_AHEAD_BYTES": 8 * 1024,
    "CHUNKS_FROM_BYTES": 8 * 1024,
    "DELTA_FROM_BYTES": 256,
    "DELTA_TINY_BYTES": 512,
    "PAGE_CACHE_BYTES": 512 * 1024,
    "TRANSFER_BATCH_BYTES": 16 * 1024,
    "OPEN_PACKS_MAX": 4,
    "COLLECT_COPY_BYTES": 8 * 1024,
    "PIN_TOUCHES": 3,
    "PARITY_CHUNK_BYTES": 4096,
    "CARE_JOURNAL_BYTES_MAX": 4096,
}


class Inline:
    """An executor that has done what it was given."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[_P, _R], /, *given: _P.args, **named: _P.kwargs) -> Future[_R]:
        """Do it now."""
        done: Future[_R] = Future()
        try:
            done.set_result(work(*given, **named))
        except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
            done.set_exception(error)
        return done

    def map(self, work: Callable[[Any], _R], items: Iterable[Any]) -> Iterator[_R]:
        """Do all of it now."""
        return iter([work(item) for item in items])

    def shutdown(self, **_: object) -> None:
        """Nothing is on its way."""


@contextmanager
def small() -> Generator[None]:
    """Put the limits in place, and take them back.

    Raises:
        LookupError: a limit that no module has: it was renamed.
    """
    places = {**dict.fromkeys(LIMITS, 0), "ThreadPoolExecutor": 0}
    taken: list[tuple[Any, str, object]] = []
    rooms = ("him.tier", "him.catalog", "him.pyramid", "him.pack", "him.tile", "him.ingest")
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(rooms):
            continue
        for constant in places:
            if hasattr(module, constant):
                places[constant] += 1
                taken.append((module, constant, getattr(module, constant)))
                setattr(module, constant, LIMITS.get(constant, Inline))
    try:
        if unknown := [constant for constant, count in places.items() if not count]:
            raise LookupError(f"no module has {', '.join(unknown)}")
        yield
    finally:
        for module, constant, value in taken:
            setattr(module, constant, value)
