"""One tile: its identity, its bytes, and its smaller self."""
