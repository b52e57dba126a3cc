"""CVMFS for tasks: from the options of a submission to files under /cvmfs, and to where tasks are placed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
from running import run

import hpcq

cloudpickle.register_pickle_by_value(sys.modules[__name__])

CMS = "cms.cern.ch"


@pytest.fixture
def image(tmp_path):
    needed = [shutil.which("mksquashfs"), shutil.which("squashfuse_ll"), os.access("/dev/fuse", os.W_OK)]
    spaces = subprocess.run(["unshare", "--user", "--mount", "true"], capture_output=True, check=False)
    if not all(needed) or spaces.returncode:
        reason = "needs squashfs-tools, squashfuse, /dev/fuse and user namespaces"
        if os.environ.get("HPCQ_TESTS_MUST_RUN") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "version").write_text("CMSSW_1")
    made = tmp_path / "cms.sqsh"
    subprocess.run(["mksquashfs", tmp_path / "tree", made, "-quiet", "-no-progress"], check=True, capture_output=True)
    return made


def read(path):
    return Path(path).read_text()


def test_tasks_of_every_kind_read_it(queue, image):
    queue.submit_pilots(1, batch="local", cvmfs=[CMS], cvmfs_image=[f"{CMS}={image}"])
    where = f"/cvmfs/{CMS}/version"
    tasks = [
        hpcq.Task(f"cat {where}").set(features={f"cvmfs={CMS}"}),
        hpcq.PythonTask(read, where),
        hpcq.PythonTask(read, where).set(isolation="fork"),
        hpcq.PythonTask(read, where).set(isolation="fresh", network="wan"),
    ]
    assert [run(queue, task).output for task in tasks] == ["CMSSW_1"] * 4
    waiting = queue.submit(hpcq.Task("true").set(features={"cvmfs=lhcb.cern.ch"}))
    assert "cvmfs=lhcb.cern.ch" in queue.explain(waiting)
    queue.cancel(id=waiting)


def test_a_pilot_without_its_repository_takes_nothing_and_says_why(queue, image):
    queue.submit_pilots(1, batch="local", cvmfs="lhcb.cern.ch", cvmfs_image=[str(image)])
    with pytest.raises(hpcq.HpcqError, match=r"lhcb\.cern\.ch cannot be read in the image"):
        queue.wait_for_pilots(1, timeout=60)
