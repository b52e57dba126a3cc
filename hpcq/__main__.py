"""``python -m hpcq``: the command line."""

from hpcq.cli.main import main

if __name__ == "__main__":
    main()
