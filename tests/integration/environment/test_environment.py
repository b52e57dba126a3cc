"""Pilots in another Python environment: pointed to, shipped as an archive, or refused because versions differ."""

from __future__ import annotations

import site
import subprocess
import sys
import sysconfig
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest

import hpcq
from hpcq.batch.environment import pack, python_command

WAIT = 90


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that sees our packages."""
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=WAIT)
    ours = {*site.getsitepackages(), sysconfig.get_paths()["purelib"], str(Path(hpcq.__file__).parents[1])}
    (packages_of(place) / "ours.pth").write_text("\n".join(f"import site; site.addsitedir({one!r})" for one in ours))
    return place


def packages_of(environment: Path) -> Path:
    (packages,) = environment.glob("lib/python3*/site-packages")
    return packages


def prefix() -> str:
    return sys.prefix


def run_in(environment: Path, **options: object) -> str:
    with hpcq.Queue() as queue:
        queue.submit_pilots(1, batch="local", environment=environment, **options)
        queue.submit(hpcq.PythonTask(lambda: __import__("sys").prefix))
        task = queue.wait(WAIT)
        assert task is not None, queue.pilots()
        value = task.result()
        assert isinstance(value, str)
        return value


def test_a_directory_is_used_where_it_is(environment: Path) -> None:
    assert run_in(environment) == str(environment)


def test_an_archive_is_unpacked_once_on_the_node(environment: Path, tmp_path: Path) -> None:
    archive = tmp_path / "environment.tar.gz"
    assert pack(environment, archive) == archive.stat().st_size
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    first = run_in(archive, scratch=scratch)
    assert Path(first).is_relative_to(scratch)
    mark = Path(first) / "still-there"
    mark.touch()
    assert run_in(archive, scratch=scratch) == first
    assert mark.exists()


def test_an_archive_with_a_top_directory_works_too(environment: Path, tmp_path: Path) -> None:
    archive = tmp_path / "environment.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(environment, arcname="analysis")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert run_in(archive, scratch=scratch).endswith("/tree/analysis")


def test_half_an_unpacking_is_done_again(environment: Path, tmp_path: Path) -> None:
    archive = tmp_path / "environment.tar.gz"
    pack(environment, archive)
    place = Path(python_command(archive, tmp_path)[-1])
    (place / "tree" / "bin").mkdir(parents=True)
    (place / "tree" / "bin" / "python").write_text("")
    assert run_in(archive, scratch=tmp_path) == str(place / "tree")


def test_another_version_is_refused_with_both_named(environment: Path) -> None:
    other = packages_of(environment) / "cloudpickle-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: cloudpickle\nVersion: 0.0.1\n")
    with hpcq.Queue() as queue:
        (job,) = queue.submit_pilots(1, batch="local", environment=environment)
        queue.submit(hpcq.PythonTask(prefix))
        said = ""
        deadline = time.monotonic() + WAIT
        while "refused" not in said and time.monotonic() < deadline:
            assert queue.wait(0.2) is None
            said = job.output.read_text() if job.output.exists() else ""
    assert "0.0.1" in said
    assert version("cloudpickle") in said
    assert "refused" in said


@pytest.mark.parametrize("content", [None, b"not a tar archive"])
def test_what_is_no_environment_is_refused_at_once(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "environment"
    if content is not None:
        path.write_bytes(content)
    with hpcq.Queue() as queue, pytest.raises(hpcq.UsageError, match="environment"):
        queue.submit_pilots(1, batch="local", environment=path)


def test_a_link_where_the_archive_is_to_be_unpacked_is_not_followed(environment: Path, tmp_path: Path) -> None:
    archive = tmp_path / "environment.tar"
    pack(environment, archive)
    ours = tmp_path / "ours"
    (ours / "tree").mkdir(parents=True)
    (ours / "tree" / "thesis").touch()
    command = python_command(archive, tmp_path)
    Path(command[-1]).symlink_to(ours)
    done = subprocess.run([*command, "-c", ""], capture_output=True, text=True, check=False, timeout=WAIT)
    assert done.returncode == 1
    assert "it is not ours; give another --scratch" in done.stderr
    assert (ours / "tree" / "thesis").exists()
