"""`him sim`: the seeded simulator, on no repository but its own."""

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

import him
from him.cli.commands import JsonOption, command
from him.cli.failure import EXIT_CHECK_FAILED
from him.cli.session import Session, session_of
from him.errors import UsageError

if TYPE_CHECKING:
    from him.sim.run import Report


def register(program: typer.Typer) -> None:
    """Add this command to the program."""
    examples = [
        "him sim --seed 7 --ops 2000",
        "him sim --seeds 20 --json",
        "him sim --seed 7 --processes 1 --no-shrink",
    ]
    command(program, "sim", examples)(sim)


def sim(
    context: typer.Context,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The first seed.")] = 1,
    ops: Annotated[int, typer.Option("--ops", min=1, max=1_000_000, help="Calls a seed.")] = 2_000,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, from the first on.")] = 1,
    processes: Annotated[int, typer.Option("--processes", min=1, max=8, help="Processes on one repository.")] = 3,
    shrink: Annotated[bool, typer.Option("--shrink/--no-shrink", help="Cut a failure down.")] = True,
    plant: Annotated[str, typer.Option("--plant", hidden=True, help="A bug to plant.")] = "",
    json: JsonOption = False,
) -> None:
    """Try the program itself: random calls of several processes under power losses, failing disks and lost replies.

    What is read is compared with a plain model. The same seed does the same again, so a failure can be sent in as one
    line. Exits with 1 when something was lost or wrong.
    """
    from him.sim.plant import planted  # Only here: it brings every room with it.
    from him.sim.run import simulate

    session, failed = session_of(context), False
    with session.progress("simulating") as show:
        for number in range(seed, seed + seeds):
            show(number - seed, seeds, f"seed {number}")
            with planted(plant):
                report = simulate(number, ops, processes=processes)
                case = _shrunk(number, ops, processes, report) if report.failure and shrink else ""
            _tell(session, report, case, json=json)
            failed = failed or report.failure is not None
    if failed:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _shrunk(seed: int, ops: int, processes: int, report: "Report") -> str:
    """A smaller case that fails alike, as text."""
    from him.sim.run import ALL_FAULTS
    from him.sim.shrink import shrink
    from him.sim.workload import workload

    case, found = shrink(seed, workload(seed, ops, processes), processes, ALL_FAULTS, report)
    assert found.failure is not None
    calls = " ".join(f"{op.kind}#{op.number}@{op.process % case.processes}" for op in case.ops)
    faults = ", ".join(sorted(case.faults)) or "none"
    return f"{len(case.ops)} calls of {case.processes} processes, faults: {faults}; {found.failure.seen}\n{calls}"


def _tell(session: Session, report: "Report", case: str, *, json: bool) -> None:
    if json:
        session.json({**msgspec.to_builtins(report), "commit": _commit(), "smallest": case})
        return
    faults = sum(report.faults.values())
    session.say(
        f"seed {report.seed}: {report.operations} calls ({report.writes} writes), {report.records} commits, "
        f"{faults} faults, {report.switches} switches: {'FAILED' if report.failure else 'sound'}"
    )
    if report.failure is not None:
        session.say(f"{report.failure.check}: {report.failure.seen} ({_commit()})")
        for line in (*report.failure.events, *(["the smallest case:", *case.splitlines()] if case else [])):
            session.say(f"  {line}")


def _commit() -> str:
    """Which source this is: the version, and what git says of it where it is a work tree."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(him.__file__).parent, capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(str(error)) from error
    return f"him {him.__version__} {told.stdout.strip()}".strip()
