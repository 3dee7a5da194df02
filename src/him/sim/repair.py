"""A damaged copy of a repository, taken through the ways a user has: told, mended, opened, healed, checked again."""

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from him.catalog.files import examine
from him.catalog.fsck import unopened
from him.catalog.marker import MARKER, parsed
from him.catalog.mend import mend
from him.catalog.salvage import marker_bytes
from him.errors import HimError, VersionError
from him.sim import checks
from him.sim.clock import SimRng
from him.sim.disk import MemDisk
from him.sim.model import Violation
from him.sim.objects import SimObjects
from him.sim.rooms import Rooms
from him.tier.pins import PINS
from him.types import Fault

if TYPE_CHECKING:
    from him.sim.world import Site, World


class Hit(NamedTuple):
    """What was done to a copy."""

    path: str
    how: str
    curable: bool
    """Whether healing has to make it whole again: a pack or parity file that others make."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.path} {self.how}"


def repaired(world: "World", site: "Site", rng: Random) -> None:
    """One file of a copy damaged: told with a remedy, and right again where healing says so. Raises Violation."""
    aside = checks.Aside(world, site)
    hit = _damaged(aside, rng, sound=not site.rotted)
    if hit is None:
        return
    world.counts["rot on a copy"] += 1
    rooms = _opened(aside, hit)
    if rooms is None:
        return
    try:
        _healed(rooms, aside, hit, rng)
    finally:
        rooms.close()


def settled(world: "World", site: "Site") -> None:
    """Whatever befell it: what is there at the end is healed, and is all that was acknowledged. Raises Violation."""
    aside = checks.Aside(world, site)
    rooms = aside.opened("settled")
    try:
        _healed(rooms, aside, Hit("the end", "of the simulation", curable=True), Random(f"{world.seed}:settled"))
    finally:
        rooms.close()


def _damaged(aside: checks.Aside, rng: Random, *, sound: bool) -> Hit | None:
    """Damage a file; None where nothing came of it. With `sound`, nothing else is damaged."""
    names = sorted(aside.volume.files)
    if rng.random() < 0.5:
        # Else nearly all are packs.
        names = [name for name in names if not name.startswith("packs/")]
    path = rng.choice(names)
    data = aside.volume.files[path].now
    curable = sound and path.startswith("packs/") and path in checks.elsewhere(aside.volume, aside.bucket)
    how = rng.random()
    if how < 0.2:
        del aside.volume.files[path]
        return Hit(path, "removed", curable)
    if how < 0.4:
        del data[rng.randrange(len(data) + 1) :]
        return Hit(path, "cut", curable)
    return Hit(path, "damaged", curable) if checks.spoil(data, rng) else None


def _opened(aside: checks.Aside, hit: Hit) -> Rooms | None:
    """The copy, mended and opened; None where that cannot be, which was told with a remedy before."""
    disk = MemDisk(volume=aside.volume)
    before = examine(disk)
    try:
        parsed(marker_bytes(disk), MARKER)
        aside.opened("as it is").close()
    except HimError as error:
        _located(error, hit)
        told = unopened(disk, before, error).errors
        if not told or not all(fault.place and fault.fix for fault in told):
            raise Violation("damage without place and remedy", f"{hit.where}: {_short(told)}") from None
    mend(disk, lambda _: SimObjects(aside.bucket, checks.Still()), SimRng("mend"))
    try:
        parsed(marker_bytes(disk), MARKER)
        return aside.opened("mended")
    except HimError as error:
        _located(error, hit)
        return None


def _healed(rooms: Rooms, aside: checks.Aside, hit: Hit, rng: Random) -> None:
    """Heal it: what is left is told again by the next check, and where nothing is, everything reads right."""
    report = rooms.care().heal()
    left = [fault for fault in report.left if fault.place != PINS]  # Nothing else tells these.
    if hit.curable and left:
        raise Violation("what others make again was not healed", f"{hit.where}: {_short(left)}")
    tolerated = checks.explained if left else checks.never
    checks.compare(rooms, aside.model, rng, tolerated, where=f"{hit.where}, healed")
    told = rooms.fsck().errors
    if {(fault.object, fault.place) for fault in told} != {(fault.object, fault.place) for fault in report.left}:
        seen = f"{_short(told)} instead of {_short(report.left)}"
        raise Violation("a check after healing tells otherwise", f"{hit.where}: {seen}")


def _short(faults: Sequence[Fault]) -> list[str]:
    return [f"{fault.object}: {fault.place}: {fault.fault}" for fault in faults[:4]]


def _located(error: HimError, hit: Hit) -> None:
    if not checks.located(error) and not isinstance(error, VersionError):
        raise Violation("an error nothing explains", f"{hit.where}: {error.kind}: {error.line()}") from None
