"""The session's side of ``preload/socks.c``: the table it shares, what is asked of it, and the forwarder."""
