"""Coverage-guided fuzzing of every parser of outside bytes: `python -m fuzz` (docs/TESTING.md)."""
