"""The command line `him`: thin, fast to start, one JSON object a line when asked."""
