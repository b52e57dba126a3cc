"""The gateway: an ocserv run without root, for the pilots of the one user who started it."""
