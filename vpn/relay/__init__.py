"""The relay: SOCKS5 as a pure codec, and bytes carried between two connections."""
