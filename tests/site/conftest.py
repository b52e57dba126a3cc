"""Fixtures of the tests that run inside the simulated site: `scripts/test`, or `scripts/site run -- pytest tests/site`.

Tests run as root of the site on its host `login`. Without a site they skip; with HPCQ_TESTS_MUST_RUN=1 they fail.
/tmp is per host, as on a cluster: what several hosts must see goes to `shared_path`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from cluster import ERRORS, RUNNING, Cluster, ended, until
from simulated_site.client import VARIABLE, Site

MUST_RUN = os.environ.get("HPCQ_TESTS_MUST_RUN") == "1"


def missing(reason: str) -> None:
    """A prerequisite is not there: skip, or fail where everything must run."""
    if MUST_RUN:
        pytest.fail(f"{reason} (HPCQ_TESTS_MUST_RUN=1)")
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.site)


@pytest.fixture(scope="session")
def site() -> Site:
    """The site this test runs in."""
    if VARIABLE not in os.environ:
        missing("not inside the simulated site: run scripts/test, or scripts/site run -- pytest tests/site")
    return Site.load()


@pytest.fixture(scope="session")
def slurm(site: Site) -> Site:
    """The site, when Slurm runs in it. In a user namespace it cannot, whatever must run."""
    if not site.slurm:
        reason = f"no Slurm in this site: {site.left_out['slurm']}"
        if site.description["root"]:
            missing(reason)
        pytest.skip(reason)
    return site


@pytest.fixture(scope="session")
def xrootd(site: Site) -> Site:
    """The site, when XRootD runs in it."""
    if "xrootd" in site.left_out:
        missing(f"no XRootD in this site: {site.left_out['xrootd']}")
    return site


@pytest.fixture
def shared_path(site: Site) -> Iterator[Path]:
    """A directory all hosts see and the ordinary user owns."""
    path = Path(tempfile.mkdtemp(dir=site.scratch))
    if site.description["root"]:
        shutil.chown(path, site.description["user"]["uid"], site.description["user"]["gid"])
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def cluster(slurm: Site, xrootd: Site, shared_path: Path) -> Iterator[Cluster]:
    one = Cluster(slurm, shared_path)
    yield one
    for program in list(RUNNING):  # of a test that has failed
        print(f"the program has printed: {ended(program, signal.SIGKILL)}{ERRORS[program].read_text()}")
    ERRORS.clear()
    one.site.run("login", ["scancel", "--me", "--signal=KILL", "--full"])
    one.site.run("login", ["scancel", "--me"])
    until(lambda: not one.jobs(), "no job is left")


@pytest.fixture
def gateway(cluster: Cluster) -> Iterator[None]:
    cluster.hpcq("vpn", "gateway", "start")
    yield
    cluster.hpcq("vpn", "gateway", "stop")
