"""One target in a process of its own: `python -m fuzz.engine TARGET CORPUS [libFuzzer's options]`."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import atheris


def main() -> None:
    """Feed the target until the time is over or it breaks the contract; libFuzzer says the rest on stderr."""
    with atheris.instrument_imports(include=["him"]), contextlib.redirect_stderr(Path(os.devnull).open("w")):
        from fuzz.targets import MEMORY_BYTES, TARGETS
    name, corpus, *options = sys.argv[1:]
    target = TARGETS[name]
    for number, seed in enumerate(target.seeds()):
        Path(corpus, f"seed-{number:02d}").write_bytes(seed)
    # Once everything is imported: what threads reserve then is not the parser's.
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.RLIM_INFINITY))
    atheris.Setup([sys.argv[0], *options, corpus], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
