"""Rule 2 under a disk that fails at every single operation: refused, half done, done but denied, or the power gone.

One workload touches every kind of commit. It runs once for every changing operation it makes, with that one failing.
Afterwards the repository opens, fsck is clean, all that was acknowledged is there byte for byte, and nothing else.
"""

import random
from collections.abc import Callable

import numpy as np
import pytest
from fakes import FakeClock, FakeRng, Faults, FaultsAt, MemDisk, PowerLoss, Stack, new_disk, picture, together

from him.catalog.log import CHECKPOINT_FOLDER
from him.errors import HimError
from him.types import StreamSpec

Step = Callable[[Stack], object]
View = dict[str, object]


def array(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


GRID = StreamSpec("grid", tile_height=8, tile_width=8, dtype="uint8", level_rule="mean")

STEPS: list[Step] = [
    lambda s: s.history.writable("main"),
    lambda s: s.history.declare_stream(GRID),
    lambda s: s.ingest.array("main", "grid", "f0", array(1, 12, 10)),
    lambda s: s.ingest.tiles("main", "grid", "f0", {(0, 0): array(2, 8, 8), (9, 1): array(3, 5, 8)}),
    lambda s: s.ingest.append("main", "logs", [{"n": 1}, {"n": 2}], writer="w"),
    lambda s: s.ingest.picture("main", "login", picture(60, 260, {(10, 10): "Submit", (12, 150): "Cancel"})),
    lambda s: s.history.open_snapshot(parent="main", branch="dev", tags={"owner": "me"}),
    lambda s: s.ingest.array("dev", "grid", "f0", array(4, 9, 7)),
    lambda s: s.ingest.tiles("dev", "grid", "f0", {(0, 0): None}),
    lambda s: s.ingest.append("main", "logs", [{"n": 3}], writer="w"),
    lambda s: s.history.set_attribute("main", "task_id", "t-1"),
    lambda s: s.history.set_ref("v1", "tag", "main"),
    lambda s: s.history.seal("main"),
    lambda s: s.history.writable("main"),
    lambda s: s.ingest.array("main", "grid", "f1", array(5, 9, 9)),
    lambda s: s.history.open_snapshot(branch="scratch"),
    lambda s: s.history.delete_ref("scratch"),
    lambda s: s.history.drop(next(one.snapshot_id for one in s.history.snapshots() if not s.named(one.snapshot_id))),
    lambda s: s.ingest.array("dev", "kv_cache", "chat", np.arange(2 * 2 * 2 * 9 * 4.0).reshape(2, 2, 2, 9, 4)),
]


class Named(Stack):
    """A Stack that can show its content without ids, which differ once something failed."""

    def named(self, snapshot_id: str) -> list[str]:
        return [name for name, (_, target) in self.history.refs().items() if target == snapshot_id]

    def view(self) -> View:
        content = self.content()
        shown: View = {"streams": sorted(self.projection.streams()), "snapshots": len(self.history.snapshots())}
        for name, (kind, target) in self.history.refs().items():
            sealed, lamport, tags, parents = content[target]
            shown[name] = (kind, sealed, lamport, tags, len(parents))
            for key, value in content.items():
                if key.startswith(f"{target} "):
                    frame = key.removeprefix(f"{target} ")
                    height, width, cells = value
                    # A log frame's name holds the id of the snapshot that wrote it.
                    frame = "logs" if frame.startswith("logs") else frame
                    shown[f"{name} {frame}"] = (height, width, [(k.y, k.x, v) for k, v in cells.items()])
        return shown


def expected() -> tuple[list[View], int]:
    """The view after every step, the first before any, and how many changing operations it all takes."""
    disk = new_disk()
    stack = Named(disk)
    views = [stack.view()]
    for step in STEPS:
        step(stack)
        views.append(stack.view())
    count = disk.faults.count
    assert stack.fsck().ok
    return views, count


def run(disk: MemDisk) -> tuple[Named, int, HimError | None]:
    """Run the workload until a step fails; how many were acknowledged."""
    stack = Named(disk)
    for number, step in enumerate(STEPS):
        try:
            step(stack)
        except HimError as error:
            return stack, number, error
    return stack, len(STEPS), None


def every(quick: int) -> pytest.MarkDecorator:
    """A quick test takes every n-th operation (each mode others), the slow one takes all."""
    return pytest.mark.parametrize("stride", [quick, pytest.param(1, marks=pytest.mark.slow)])


def points(operations: int, stride: int, phase: int) -> range:
    return range(1 + phase % stride, operations + 1, stride)


MODES = ["refuse", "partial", "late"]
POWER_MODES = ["power", "power-after"]
KEPT = ["none", "all", "half", "random"]


def check_sound(disk: MemDisk, views: list[View], why: str) -> Named:
    stack = Named(disk, rng=FakeRng(777), clock=FakeClock(1_800_000_000_000_000_000))
    found = stack.view()
    assert found in views, why
    report = stack.fsck()
    assert report.ok, f"{why}: {report.errors}"
    # What the projection and the memo know must follow from the log alone.
    stack.history.rebuild()
    stack.store.forget_addresses()
    assert stack.view() == found, why
    return stack


@pytest.fixture(params=["roomy", "cramped"])
def cramped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tiny packs and segments and frequent checkpoints bring footers, merges and restoring into the workload."""
    if request.param == "cramped":
        monkeypatch.setattr("him.tier.warm.PACK_TARGET_BYTES", 6_000)
        monkeypatch.setattr("him.tier.address.ADDRESS_TAIL_ROWS", 4)
        monkeypatch.setattr("him.tier.address.ADDRESS_MERGE_RATIO", 2)
        monkeypatch.setattr("him.catalog.history.CHECKPOINT_RECORDS", 3)
    return request.param == "cramped"


def test_the_workload_touches_what_it_should(cramped: bool) -> None:
    disk = new_disk()
    stack, done, error = run(disk)
    assert (done, error) == (len(STEPS), None)
    kinds = {kind.split(" ")[0] for kind in disk.faults.kinds}
    assert {"write", "sync", "create", "sync_folder"} <= kinds
    assert any(pack.finished for pack in stack.projection.state().packs) == cramped
    assert bool([path for path in disk.files if path.endswith(".seg")]) == cramped
    assert bool([path for path in disk.files if path.startswith(f"{CHECKPOINT_FOLDER}/")]) == cramped


@every(4)
@pytest.mark.parametrize("mode", MODES)
def test_a_failed_operation_leaves_nothing_and_loses_nothing(cramped: bool, mode: str, stride: int) -> None:
    views, operations = expected()
    for at in points(operations, stride, MODES.index(mode)):
        disk = new_disk(Faults(at, mode))
        stack, done, error = run(disk)
        why = f"{mode} {at}: {disk.faults.kinds[at - 1]} in step {done}, {error}"
        check_sound(disk.copy(), [views[done]], f"another process after {why}")
        # The same process goes on as if nothing had happened.
        for step in STEPS[done:]:
            step(stack)
        assert stack.view() == views[-1], why
        assert stack.fsck().ok, (why, stack.fsck().errors)
        stack.close()
        check_sound(disk, views[-1:], f"reopened after {why}")


@every(8)
@pytest.mark.parametrize("mode", MODES)
def test_a_disk_that_stays_bad_for_a_while_leaves_a_sound_repository(cramped: bool, mode: str, stride: int) -> None:
    """Even undoing fails: then the commit may be in doubt, and is either whole or absent."""
    views, operations = expected()
    for at in points(operations, stride, MODES.index(mode)):
        for times in (2, 3, 1000):
            disk = new_disk(Faults(at, mode, times))
            stack, done, error = run(disk)
            why = f"{mode} {at} × {times}: {disk.faults.kinds[at - 1]} in step {done}, {error}"
            disk.faults.at = None
            check_sound(disk.copy(), views[done : done + 2], f"another process after {why}")
            # The process that saw the failures may go on as well.
            stack.ingest.append("after", "logs", [1], writer="w")
            report = stack.fsck()
            assert report.ok, (why, report.errors)
            stack.close()
            again = Named(disk)
            assert again.fsck().ok, why
            assert [one.name for one in again.at("after").frames()], why


def keeper(name: str, seed: int) -> Callable[[], str]:
    if name != "random":
        return lambda: name
    rng = random.Random(seed)
    return lambda: rng.choice(["all", "half", "none"])


def steps_before_power_fails(disk: MemDisk) -> int:
    """How many steps were acknowledged when the process ended."""
    done = 0
    try:
        stack = Named(disk)
        for step in STEPS:
            step(stack)
            done += 1
    except PowerLoss:
        pass
    return done


@every(4)
@pytest.mark.parametrize("mode", POWER_MODES)
@pytest.mark.parametrize("kept", KEPT)
def test_a_power_loss_loses_nothing_acknowledged(cramped: bool, mode: str, kept: str, stride: int) -> None:
    views, operations = expected()
    for at in points(operations, stride, KEPT.index(kept) + POWER_MODES.index(mode)):
        disk = new_disk(Faults(at, mode))
        done = steps_before_power_fails(disk)
        why = f"{mode} {at}, unsynced kept: {kept}: {disk.faults.kinds[at - 1]} in step {done}"
        left = disk.after_power_loss(keeper(kept, at))
        stack = check_sound(left, views[done : done + 2], why)
        stack.ingest.append("after", "logs", [1], writer="w")
        stack.close()
        again = Named(left)
        assert again.fsck().ok, why


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_power_losses_with_any_unsynced_bytes_kept(cramped: bool, seed: int) -> None:
    rng = random.Random(seed)
    views, operations = expected()
    for at in range(1, operations + 1):
        disk = new_disk(Faults(at, rng.choice(["power", "power-after"])))
        done = steps_before_power_fails(disk)
        left = disk.after_power_loss(keeper("random", seed * 1000 + at))
        check_sound(left, views[done : done + 2], f"seed {seed} operation {at}")


@every(4)
def test_a_process_killed_at_any_operation_leaves_a_sound_repository(cramped: bool, stride: int) -> None:
    """kill -9: what was written is there, synced or not; locks are gone."""
    views, operations = expected()
    for at in range(1, operations + 1, stride):
        for mode in POWER_MODES:
            disk = new_disk(Faults(at, mode))
            done = steps_before_power_fails(disk)
            check_sound(disk.copy(), views[done : done + 2], f"{mode} {at}: {disk.faults.kinds[at - 1]} in step {done}")


# -- batches that are committed together

GROUPS = 3
GROUP = 4


def row_write(stack: Stack, row: int) -> Step:
    branch = "dev" if row % GROUP == 2 else "main"
    return lambda: stack.ingest.tiles(branch, "grid", "g", {(row, 0): array(row, 8, 8)})


def rows_of(stack: Stack) -> dict[int, bytes]:
    """Every row of the groups that can be seen, with its bytes."""
    found: dict[int, bytes] = {}
    for branch in ("main", "dev"):
        if branch in stack.history.refs():
            reader = stack.at(branch)
            for frame in reader.frames("grid"):
                for key in reader.keys("grid", frame.name):
                    found[key.y] = reader.tile(key).tobytes()
    return found


def run_groups(disk: MemDisk) -> tuple[Named | None, list[list[int]], dict[int, BaseException | None]]:
    """Groups of writes, each in threads; (the stack, which rows went together, what each write raised)."""
    told: dict[int, BaseException | None] = {}
    groups: list[list[int]] = []
    try:
        stack = Named(disk)
        for step in (
            lambda: stack.history.declare_stream(GRID),
            lambda: stack.history.writable("main"),
            lambda: stack.history.writable("dev"),
        ):
            step()
        for number in range(GROUPS):
            groups.append(list(range(1 + number * GROUP, 1 + (number + 1) * GROUP)))
            errors = together(stack, [row_write(stack, row) for row in groups[-1]])
            told |= dict(zip(groups[-1], errors, strict=True))
    except (HimError, PowerLoss):
        return None, groups, told
    return stack, groups, told


def group_operations() -> int:
    disk = new_disk()
    stack, _, told = run_groups(disk)
    assert stack is not None
    assert set(told.values()) == {None}
    assert sum(len(record.operations) > 2 for _, _, record in stack.history.records()) == GROUPS
    return disk.faults.count


def check_rows(disk: MemDisk, told: dict[int, BaseException | None], why: str, *, doubt: bool = False) -> None:
    """What was acknowledged is there byte for byte, what failed is not (unless power went before it could tell)."""
    stack = Named(disk, rng=FakeRng(777), clock=FakeClock(1_800_000_000_000_000_000))
    found = rows_of(stack)
    wanted = {row: array(row, 8, 8).tobytes() for row, error in told.items() if error is None}
    assert {row: found.get(row) for row in wanted} == wanted, why
    if not doubt:
        assert found == wanted, why
    assert all(found[row] == array(row, 8, 8).tobytes() for row in found), why
    report = stack.fsck()
    assert report.ok, (why, report.errors)
    stack.history.rebuild()
    stack.store.forget_addresses()
    assert rows_of(stack) == found, why


@every(6)
@pytest.mark.parametrize("mode", MODES)
def test_a_failed_operation_fails_its_group_or_its_batch_alone(cramped: bool, mode: str, stride: int) -> None:
    for at in points(group_operations(), stride, MODES.index(mode)):
        disk = new_disk(Faults(at, mode))
        stack, _, told = run_groups(disk)
        why = f"{mode} {at}: {disk.faults.kinds[at - 1]}, {told}"
        if stack is None:
            continue  # Before the groups: the workload above is about that.
        check_rows(disk.copy(), told, f"another process after {why}")
        failed = [row for row, error in told.items() if error is not None]
        assert all(isinstance(told[row], HimError) for row in failed), why
        if failed:
            assert together(stack, [row_write(stack, row) for row in failed]) == [None] * len(failed), why
        check_rows(disk.copy(), told | dict.fromkeys(failed), f"repeated after {why}")
        stack.close()


@every(6)
@pytest.mark.parametrize("mode", POWER_MODES)
@pytest.mark.parametrize("kept", KEPT)
def test_a_power_loss_leaves_all_of_a_group_or_nothing(cramped: bool, mode: str, kept: str, stride: int) -> None:
    for at in points(group_operations(), stride, KEPT.index(kept) + POWER_MODES.index(mode)):
        disk = new_disk(Faults(at, mode))
        _, groups, told = run_groups(disk)
        why = f"{mode} {at}, unsynced kept: {kept}: {disk.faults.kinds[at - 1]}, {told}"
        left = disk.after_power_loss(keeper(kept, at))
        check_rows(left, told, why, doubt=True)
        rows = rows_of(Named(left, rng=FakeRng(778)))
        for group in groups:
            assert len({row in rows for row in group}) == 1, why


def test_a_read_only_look_after_a_power_loss_shows_all_that_was_acknowledged() -> None:
    """The published end is not synced: a stale one must not hide whole records, even from who may not write."""
    from him.catalog.log import FileLog

    disk = new_disk()
    stack = Named(disk)
    for step in STEPS[:4]:
        step(stack)
    left = disk.after_power_loss(lambda: "none")
    assert FileLog(left, read_only=True).head() == stack.log.head()


def test_a_record_whose_sync_failed_does_not_come_back_after_a_power_loss() -> None:
    """A failed sync may have made it durable: undoing it has to last, or the next to open would publish it."""
    disk = new_disk()
    stack = Named(disk)
    for step in STEPS[:3]:
        step(stack)
    before = stack.log.head()
    disk.faults = FaultsAt("sync log/000001.log", "partial")
    disk.sync_folder("log")
    with pytest.raises(HimError):
        STEPS[3](stack)
    assert stack.log.head() == before
    left = disk.after_power_loss(lambda: "none")
    assert Named(left).log.head() == before


def test_who_opens_while_another_mends_the_end_waits() -> None:
    from him.catalog.log import LOG_PATH, FileLog

    disk = new_disk()
    stack = Named(disk)
    for step in STEPS[:4]:
        step(stack)
    left = disk.after_power_loss(lambda: "none")
    other = left.open(LOG_PATH)
    assert other.lock(wait=False)
    with pytest.raises(AssertionError, match="wait for ever"):
        FileLog(left)
    other.unlock()
    assert FileLog(left).head() == stack.log.head()
