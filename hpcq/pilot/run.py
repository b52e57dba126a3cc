"""Entry of a runner process; apart from `runner` so that what tasks pickle never names ``__main__``."""

import sys

if __name__ == "__main__":
    if sys.argv[3:4] == ["fork"]:
        from hpcq.pilot.forkhooks import install

        install()  # before the modules that it is about are imported by others
    from hpcq.pilot.runner import main

    main()
