"""``python -m vpn``."""

from vpn.cli import cli

if __name__ == "__main__":
    cli(prog_name="python -m vpn")
