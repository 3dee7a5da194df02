"""Benchmarks: ratios, counts and rates of success; `python -m bench NAME --json`."""
