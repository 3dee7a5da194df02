"""`python -m bench [NAME …] [--json] [--tiny | --full] [--write]`: runs benchmarks and prints one row a line."""

import argparse
import importlib
import inspect
import sys

from bench.measure import show

NAMES = (
    *("goals", "latency", "change", "codecs", "read_screen", "read_kv", "ingest", "lookup", "delta"),
    *("pyramid", "large", "commits", "kv", "evict", "tiers", "cold", "collect", "damage", "parity", "sim", "keys"),
)


def main() -> int:
    """Run what is named (all when nothing is); 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"benchmarks to run, of: {', '.join(NAMES)}")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--tiny", action="store_true", help="a small run that only shows that it works")
    parser.add_argument("--full", action="store_true", help="as long as it takes, where a run is bounded by time")
    parser.add_argument("--write", action="store_true", help="put the figures into the page that shows them, if any")
    given = parser.parse_args()
    missed = False
    for name in given.names or NAMES:
        module, rows = importlib.import_module(f"bench.{name}"), []
        full = {"full": True} if given.full and "full" in inspect.signature(module.run).parameters else {}
        for found in module.run(tiny=given.tiny, **full):
            print(show(found, as_json=given.json), flush=True)
            missed = missed or found["holds"] is False
            rows.append(found)
        if given.write and hasattr(module, "write"):
            module.write(rows)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
