"""The XRootD server of host `wan`: a real one, run by an ordinary user, with real physics input.

The files come from the installed package scikit-hep-testdata (0.2.0 carries them in its wheel).
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from simulated_site import plan
from simulated_site.client import Site
from simulated_site.daemons import Daemon, asked
from simulated_site.errors import SiteError

CONFIGURATION = """\
all.role server
all.export /store r/o
all.export /upload
oss.localroot {data}
all.adminpath {admin}
all.pidpath {admin}
xrd.port {port}
xrd.network nodnr
"""


def test_file(name: str) -> Path:
    """Where the test data package keeps `name`."""
    spec = importlib.util.find_spec("skhep_testdata")
    if spec is None or spec.origin is None:
        raise SiteError("the package scikit-hep-testdata is not installed: pip install scikit-hep-testdata==0.2.0")
    path = Path(spec.origin).parent / "data" / name
    if not path.exists():
        raise SiteError(f"scikit-hep-testdata carries no {name}: install the release 0.2.0, which does")
    return path


def fill(store: Path) -> None:
    """Put the exported files into `store`."""
    for name in plan.ROOT_FILES:
        shutil.copyfile(test_file(name), store / name)
        (store / name).chmod(0o644)


def configure(store: Path, admin: Path, port: int = plan.XROOTD_PORT) -> Path:
    """Write the server's configuration; `store` is exported as /store. Returns its path."""
    configuration = store.parent.parent / "xrootd.cfg"
    configuration.write_text(CONFIGURATION.format(data=store.parent, admin=admin, port=port))
    return configuration


def start(site: Site) -> Daemon:
    """The server, not yet ready."""
    fill(plan.STORE)
    home = Path(site.description["user"]["home"])
    admin = home.parent / "xrootd-admin"
    own(site, admin, 0o700)
    own(site, plan.STORE.parent / "upload", 0o755)
    configuration = configure(plan.STORE, admin)
    return Daemon(site, "wan", "xrootd", ["xrootd", "-c", str(configuration)], user=True)


def own(site: Site, directory: Path, mode: int) -> None:
    """A directory of the ordinary user's (who in a one-id namespace is us under another number)."""
    directory.mkdir(mode=mode)
    if site.description["root"]:
        shutil.chown(directory, site.description["user"]["uid"], site.description["user"]["gid"])


def wait_ready(site: Site, daemon: Daemon) -> None:
    """Ready when the login node can see a file by the server's name."""
    server = f"root://{plan.XROOTD_NAME}:{plan.XROOTD_PORT}"
    question = ["xrdfs", server, "stat", f"/store/{plan.ROOT_FILES[0]}"]
    daemon.wait_until(lambda: asked(site, "login", question))
