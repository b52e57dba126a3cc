"""A coffea analysis on an executor: the dimuon spectrum of a real ROOT file, read from disk and through XRootD."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from executor_help import DEADLINE, missing

import hpcq

try:
    import awkward
    import numpy
    import skhep_testdata
    from coffea import processor
    from coffea.nanoevents import BaseSchema
except ModuleNotFoundError as error:
    missing(f"{error.name} is not installed")

FILE = "uproot-Zmumu.root"
ENTRIES = 2304
CHUNK = 500
XROOTD = "all.export / r/o\noss.localroot {store}\nall.adminpath {admin}\nall.pidpath {admin}\nxrd.port {port}\n"


class Spectrum(processor.ProcessorABC):  # type: ignore[misc, valid-type, unused-ignore]
    """The invariant mass of the two muons, computed from their momenta."""

    def process(self, events: Any) -> dict[str, Any]:
        mass = numpy.sqrt(
            (events.E1 + events.E2) ** 2
            - (events.px1 + events.px2) ** 2
            - (events.py1 + events.py2) ** 2
            - (events.pz1 + events.pz2) ** 2
        )
        counts, _ = numpy.histogram(awkward.to_numpy(mass), bins=60, range=(60, 120))
        return {"entries": len(events), "chunks": 1, "pids": {os.getpid()}, "mass": counts}

    def postprocess(self, accumulator: dict[str, Any]) -> dict[str, Any]:
        return accumulator


def analyse(executor: Any, url: str) -> dict[str, Any]:
    runner = processor.Runner(executor=executor, schema=BaseSchema, chunksize=CHUNK)
    found: dict[str, Any] = runner({"Zmumu": {"files": {url: "events"}}}, processor_instance=Spectrum())
    return found


@pytest.fixture(scope="module")
def local_file() -> str:
    return str(skhep_testdata.data_path(FILE))


@pytest.fixture(scope="module")
def expected(local_file: str) -> dict[str, Any]:
    """What coffea finds without us."""
    return analyse(processor.IterativeExecutor(status=False), local_file)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (found["entries"], found["chunks"]) == (ENTRIES, -(-ENTRIES // CHUNK))
    assert os.getpid() not in found["pids"]
    assert (found["mass"] == expected["mass"]).all()
    assert 90 <= 60 + int(found["mass"].argmax()) <= 91


def test_it_is_the_pool_of_coffea(executor: hpcq.Executor, local_file: str, expected: dict[str, Any]) -> None:
    check(analyse(processor.FuturesExecutor(pool=executor, status=False), local_file), expected)


def test_coffea_may_merge_on_the_pilots(executor: hpcq.Executor, local_file: str, expected: dict[str, Any]) -> None:
    check(analyse(processor.FuturesExecutor(pool=executor, merging=(2, 2, 3), status=False), local_file), expected)


def test_coffea_may_make_the_pool_itself(state: Path, local_file: str, expected: dict[str, Any]) -> None:
    check(analyse(processor.FuturesExecutor(pool=hpcq.Executor, workers=2, status=False), local_file), expected)


@pytest.fixture(scope="module")
def remote_file(local_file: str) -> Iterator[str]:
    """The same file on an XRootD server of this module's own."""
    if shutil.which("xrootd") is None:
        missing("xrootd is not installed")
    if importlib.util.find_spec("fsspec_xrootd") is None or importlib.util.find_spec("XRootD") is None:
        missing("fsspec-xrootd or xrootd is not installed for Python")
    with tempfile.TemporaryDirectory(prefix="hpcq-xrootd-") as directory, xrootd(Path(directory), local_file) as port:
        yield f"root://localhost:{port}//{FILE}"


@contextlib.contextmanager
def xrootd(home: Path, file: str) -> Iterator[int]:
    """A server of one file; its port. It refuses to run as root, so there it becomes nobody, who owns ``home``."""
    store, admin = home / "store", home / "admin"
    for directory in (store, admin):
        directory.mkdir()
    shutil.copy(file, store / FILE)
    port = free_port()
    (home / "xrootd.cfg").write_text(XROOTD.format(store=store, admin=admin, port=port))
    command = ["xrootd", "-c", str(home / "xrootd.cfg"), "-l", str(home / "log")]
    if os.geteuid() == 0:
        command += ["-R", "nobody"]
        for path in (home, *home.rglob("*")):
            shutil.chown(path, "nobody")
    with subprocess.Popen(command) as server:
        try:
            wait_for_server(server, port)
            yield port
        finally:
            server.terminate()


def free_port() -> int:
    """One that no connection is given: the system would give another program one of those before it is taken."""
    for port in random.sample(range(12_000, 20_000), 50):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise AssertionError("no port is free")


def wait_for_server(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        assert server.poll() is None, "xrootd ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end, "xrootd does not listen"
            time.sleep(0.05)
        else:
            return


def test_the_file_may_come_through_xrootd(executor: hpcq.Executor, remote_file: str, expected: dict[str, Any]) -> None:
    check(analyse(processor.FuturesExecutor(pool=executor, status=False), remote_file), expected)
