"""One file per outside thing; each knows only ports, types, errors and config."""
