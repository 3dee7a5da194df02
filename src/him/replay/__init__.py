"""Recording a run and recomputing it byte for byte (design §10)."""

from him.replay.run import ReplayReport, replay
from him.replay.trace import Recording, Trace, load, save

__all__ = ["Recording", "ReplayReport", "Trace", "load", "replay", "save"]
