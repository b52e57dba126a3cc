"""Entry of a runner process; apart from `runner` so that what tasks pickle never names ``__main__``."""

import os
import sys

if __name__ == "__main__":
    if sys.argv[3:4] == ["fork"]:
        from hpcq.pilot.forkhooks import install

        if os.environ.get("LD_BIND_NOW") == "hpcq":
            del os.environ["LD_BIND_NOW"]
        install()  # before the modules that it is about are imported by others
    from hpcq.pilot.runner import main

    main()
