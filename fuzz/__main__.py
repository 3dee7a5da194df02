"""`python -m fuzz [TARGET …] [--seconds N] [--seed N]`: fuzzes targets one after the other, and prints a line for each.

What was found worth keeping stays in fuzz/out/corpus, so that the next run goes on from there; inputs that broke the
contract are in fuzz/out/crashes, and each line is added to fuzz/out/report.jsonl.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from fuzz.targets import SECONDS, TARGETS

OUT: Final = Path(__file__).parent / "out"
_INPUT_BYTES_MAX: Final = 32 * 1024
_RSS_MB: Final = 2048


def fuzz(name: str, seconds: int, seed: int) -> dict[str, object]:
    """Run one target; what came of it. Its whole output is in fuzz/out/TARGET.log."""
    corpus, crashes = OUT / "corpus" / name, OUT / "crashes" / name
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    command = [
        *(sys.executable, "-m", "fuzz.engine", name, str(corpus)),
        *(f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={SECONDS}", f"-rss_limit_mb={_RSS_MB}"),
        *(f"-max_len={_INPUT_BYTES_MAX}", f"-artifact_prefix={crashes}/", "-print_final_stats=1"),
    ]
    threads = {f"{one}_NUM_THREADS": "1" for one in ("OMP", "OPENBLAS", "MKL")}
    with (OUT / f"{name}.log").open("w+", errors="replace") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | threads, check=False)
        log.seek(0)
        text = log.read()
    executions = _last(r"number_of_executed_units: (\d+)", text)
    return {
        "target": name,
        "seconds": seconds,
        "seed": seed,
        "executions": executions,
        "executions_per_second": _last(r"average_exec_per_sec: +(\d+)", text),
        "edges": _last(r"cov: (\d+)", text),
        "features": _last(r"ft: (\d+)", text),
        "peak_rss_mb": _last(r"peak_rss_mb: +(\d+)", text),
        "crashes": sorted(path.name for path in set(crashes.iterdir()) - before),
        "exit": done.returncode,
    }


def _last(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def main() -> int:
    """Run what is named (all when nothing is); 1 when anything broke the contract."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of: {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer's mutations, not 0 (default: 1)")
    given = parser.parse_args()
    if unknown := set(given.targets) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("atheris") is None:
        print("atheris is missing — call: .venv/bin/python -m pip install '.[fuzz]'", file=sys.stderr)
        return 2
    OUT.mkdir(exist_ok=True)
    failed = False
    for name in given.targets or TARGETS:
        found = fuzz(name, given.seconds, given.seed)
        broken = bool(found["crashes"]) or found["exit"] != 0
        failed = failed or broken
        print(
            f"{name:11} {found['executions']:>10,} executions {found['executions_per_second']:>7,}/s"
            f" {found['edges']:>6,} edges {found['features']:>7,} features {found['peak_rss_mb']:>5} MB"
            f" {len(found['crashes'])} crashes" + (f" — see fuzz/out/{name}.log" if broken else ""),
            flush=True,
        )  # fmt: skip
        with (OUT / "report.jsonl").open("a") as report:
            report.write(json.dumps(found) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
