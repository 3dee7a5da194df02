"""Where bytes live: the address index and the warm tier."""
