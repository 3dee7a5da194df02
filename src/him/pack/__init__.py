"""Many tiles in one append-only, self-describing file."""
