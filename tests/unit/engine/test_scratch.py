"""A pilot's directory goes with it, whatever tasks made of it."""

import os
import subprocess
import sys
from pathlib import Path

from hpcq.pilot.scratch import remove_tree, scratch_directory

ORDINARY_USER = 65534


def test_a_directory_is_private_and_removed(tmp_path):
    with scratch_directory(tmp_path) as scratch:
        assert scratch.stat().st_mode & 0o777 == 0o700
        (scratch / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_pilot_left_is_removed_and_a_living_ones_kept(tmp_path):
    with scratch_directory(tmp_path) as living:
        (living / "file").touch()
        dead = tmp_path / f"hpcq-pilot-{os.getuid()}-dead"
        dead.mkdir()
        (dead / "file").touch()
        foreign = tmp_path / "other"
        foreign.mkdir()
        with scratch_directory(tmp_path) as second:
            assert {p.name for p in tmp_path.iterdir()} == {living.name, second.name, "other"}


def test_links_out_of_it_are_not_followed(tmp_path):
    (tmp_path / "outside").mkdir(mode=0o500)
    with scratch_directory(tmp_path) as scratch:
        (scratch / "link").symlink_to(tmp_path / "outside")
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o500


def test_read_only_directories_are_removed(tmp_path):
    """As an ordinary user: to root nothing is read-only."""
    child = os.fork()
    if child == 0:
        try:
            tree = tmp_path / "tree"
            if os.geteuid() == 0:
                os.chown(tmp_path, ORDINARY_USER, ORDINARY_USER)
                os.chdir(tmp_path)  # the ordinary user may not search the way to it
                os.setuid(ORDINARY_USER)
                tree = Path("tree")
            (tree / "a" / "b").mkdir(parents=True)
            (tree / "a" / "b" / "c").touch()
            for directory in (tree / "a" / "b", tree / "a", tree):
                directory.chmod(0o000)
            remove_tree(tree)
            os._exit(int(tree.exists()))
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_runner_imports_little():
    """Every runner on every node does."""
    code = "import sys, hpcq.pilot.runner; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"asyncio", "ssl", "psutil", "cryptography", "hpcq.queue", "hpcq.manager", "vpn"} & set(modules)
