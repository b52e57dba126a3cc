"""Entry of a runner process; apart from `runner` so that what tasks pickle never names ``__main__``."""

from hpcq.pilot.runner import main

if __name__ == "__main__":
    main()
