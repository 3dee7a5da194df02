"""The seeded simulator: production modules on a disk, an object store, a clock and a scheduler that can be replayed.

`run.simulate(seed, ops)` runs a workload of several processes under the faults of `faults.FAULTS` and compares all that
is read with a plain model. The same seed and number of operations give the same events; a failure can be cut down
(`shrink`). What holds whatever happens are rules 1 and 2 of design §5.
"""
