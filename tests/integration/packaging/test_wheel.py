"""The wheel as users install it: away from the checkout, with and without a C compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ("hpcq", "vpn", "batch_templates", "hatch_build.py", "pyproject.toml", "README.md", "LICENSE")
LIMIT = 200

PROGRAM = """
import hpcq, sys
with hpcq.Queue() as queue:
    queue.submit_pilots(1, batch="local", cores=1)
    queue.submit(hpcq.PythonTask(lambda: hpcq.__file__))
    print(queue.wait(90).result())
"""


def run(command: list[str], directory: Path, **variables: str) -> str:
    environment = {**os.environ, "XDG_STATE_HOME": str(directory / "state"), **variables}
    done = subprocess.run(
        command, cwd=directory, env=environment, check=False, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(directory: Path, **variables: str) -> Path:
    """Copy the sources, build a wheel of them, unpack it as ``pip install`` would; its place."""
    clone = directory / "clone"
    clone.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, clone / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "./clone"], directory, **variables)
    (wheel,) = (directory / "dist").glob("*.whl")
    site = directory / "site"
    run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], directory)
    shutil.rmtree(clone)
    return site


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("wheel"))


def test_a_queue_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    where = run([sys.executable, "-P", "program.py"], tmp_path, PYTHONPATH=str(installed))
    assert where.strip() == str(installed / "hpcq" / "__init__.py")


def test_the_templates_are_in_it(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "hpcq", "submit-pilots", "--create", "--batch", "slurm", "--dry-run"]
    assert "#SBATCH --job-name=hpcq-default" in run(command, tmp_path, PYTHONPATH=str(installed))


def test_the_shims_are_in_it_and_load(installed: Path) -> None:
    shims = sorted(installed.glob("*/preload/*.so"))
    assert [shim.stem for shim in shims] == [path.stem for path in sorted(ROOT.glob("*/preload/*.c"))]
    assert "ready_shell" in [shim.stem for shim in shims]
    for shim in shims:
        done = subprocess.run(["true"], env={"LD_PRELOAD": str(shim)}, check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_without_a_compiler_it_installs_and_says_what_is_missing(tmp_path: Path) -> None:
    site = install(tmp_path, CC="/nonexistent/cc")
    assert not list(site.rglob("*.so"))
    probe = json.loads(run_any([sys.executable, "-P", "-m", "vpn", "probe", "--json"], tmp_path, site))
    assert "install gcc and reinstall hpcq" in json.dumps(probe)
    (tmp_path / "program.py").write_text(PROGRAM)
    assert str(site) in run([sys.executable, "-P", "program.py"], tmp_path, PYTHONPATH=str(site))


def run_any(command: list[str], directory: Path, site: Path) -> str:
    """Standard output, whatever the status."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        command, cwd=directory, env=environment, check=False, capture_output=True, text=True, timeout=LIMIT
    ).stdout
