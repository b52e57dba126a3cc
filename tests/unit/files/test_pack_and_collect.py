"""Directories as archives, outputs in a sandbox: nothing that leads outside passes either way."""

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from hpcq.files import digests, pack
from hpcq.pilot import collect


def archive(root, follow=True):
    return b"".join(pack.chunks(str(root), follow))


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "a ü").write_bytes(b"A" * 1000)
    (root / "sub" / "run").write_text("#!/bin/sh\n")
    (root / "sub" / "run").chmod(0o755)
    (root / "sub" / "up").symlink_to("../a ü")
    (root / ("n" * 200)).write_text("long")
    return root


def test_a_directory_comes_back_as_it_was(tree, tmp_path):
    pack.unpack(io.BytesIO(archive(tree)), tmp_path / "back")
    back = tmp_path / "back"
    assert (back / "a ü").read_bytes() == b"A" * 1000
    assert (back / "sub" / "empty").is_dir()
    assert (back / "sub" / "up").readlink() == Path("../a ü")
    assert (back / "sub" / "run").stat().st_mode & stat.S_IXUSR
    assert (back / ("n" * 200)).read_text() == "long"
    assert archive(back) == archive(tree)


def test_the_same_content_gives_the_same_digest_whatever_its_age(tree):
    before = digests.of_chunks(pack.chunks(str(tree), True))
    os.utime(tree / "a ü", (5, 5))
    assert digests.of_chunks(pack.chunks(str(tree), True)) == before


def test_a_link_to_a_file_outside_is_followed_in_what_the_user_gave_only(tree, tmp_path):
    (tmp_path / "elsewhere").write_text("E")
    (tree / "out").symlink_to(tmp_path / "elsewhere")
    pack.unpack(io.BytesIO(archive(tree)), tmp_path / "back")
    assert (tmp_path / "back" / "out").read_text() == "E"
    assert not (tmp_path / "back" / "out").is_symlink()
    with pytest.raises(pack.PackError, match="outside the directory"):
        archive(tree, follow=False)


@pytest.mark.parametrize("target", ["/etc", "..", "nothing", "loop"])
def test_other_links_are_refused_by_name(tree, target):
    (tree / "loop").symlink_to(target)
    with pytest.raises(pack.PackError, match="loop is a link that leads to"):
        archive(tree)


def test_pipes_are_refused_not_waited_for(tree):
    os.mkfifo(tree / "pipe")
    with pytest.raises(pack.PackError, match="neither a file nor"):
        archive(tree)


def member(name, kind=tarfile.REGTYPE, link="", data=b""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def hostile(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return io.BytesIO(buffer.getvalue())


@pytest.mark.parametrize(
    "members",
    [
        [member("../escaped", data=b"x")],
        [member("/tmp/hpcq-escaped", data=b"x")],
        [member("l", tarfile.SYMTYPE, "/etc")],
        [member("l", tarfile.SYMTYPE, "..")],
        [member("l", tarfile.SYMTYPE, "../.."), member("l/escaped", data=b"x")],
        [member("d", tarfile.DIRTYPE), member("l", tarfile.SYMTYPE, "d"), member("l/x", data=b"x")],
        [member("d", tarfile.DIRTYPE), member("d/l", tarfile.SYMTYPE, ".."), member("e", tarfile.SYMTYPE, "d/l/../x")],
        [member("h", tarfile.LNKTYPE, "/etc/passwd")],
        [member("c", tarfile.CHRTYPE)],
        [member("f", tarfile.FIFOTYPE)],
        [member("twice", data=b"1"), member("twice", data=b"2")],
    ],
)
def test_hostile_archives_are_refused(tmp_path, members):
    (tmp_path / "box").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - which of many
        pack.unpack(hostile(*members), tmp_path / "box" / "into")
    assert not (tmp_path / "box" / "escaped").exists()
    assert not (tmp_path / "escaped").exists()


def test_no_archive_at_all(tmp_path):
    with pytest.raises(pack.PackError, match="cannot be unpacked"):
        pack.unpack(io.BytesIO(b"garbage" * 1000), tmp_path / "into")


# --- outputs ---


@pytest.fixture
def box(tmp_path):
    box = tmp_path / "box"
    box.mkdir()
    (box / "o").write_text("out")
    return box


def taken(box, name):
    output = collect.open_output(str(box), name)
    try:
        return output.kind, b"".join(output.chunks())
    finally:
        os.close(output.descriptor)


def test_a_file_and_links_to_it_inside(box):
    (box / "l").symlink_to("o")
    (box / "absolute").symlink_to(box / "o")
    assert taken(box, "o") == taken(box, "l") == taken(box, "absolute") == ("file", b"out")


def test_a_directory(box, tmp_path):
    (box / "d").mkdir()
    (box / "d" / "x").write_text("X")
    kind, data = taken(box, "d")
    pack.unpack(io.BytesIO(data), tmp_path / "got")
    assert (kind, (tmp_path / "got" / "x").read_text()) == ("dir", "X")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: None, r"'p' is missing.*its sandbox has 'o'"),
        (lambda p: p.symlink_to("/etc/passwd"), "leads out of the sandbox, to /etc/passwd"),
        (lambda p: p.symlink_to("/etc"), "leads out of the sandbox"),
        (lambda p: p.symlink_to("../"), "leads out of the sandbox"),
        (lambda p: p.symlink_to("/dev/null"), "leads out of the sandbox"),
        (lambda p: p.symlink_to("nowhere"), "leads nowhere"),
        (lambda p: p.symlink_to("p"), "cannot be read: Too many levels"),
        (os.mkfifo, "neither a file"),
    ],
)
def test_others_are_refused_by_name(box, make, why):
    make(box / "p")
    with pytest.raises(collect.OutputError, match=why):
        collect.open_output(str(box), "p")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a/../../x"])
def test_names_are_checked_here_too(box, name):
    with pytest.raises(collect.OutputError, match="cannot be used"):
        collect.open_output(str(box), name)


def test_a_parent_that_is_a_link_outside(box):
    (box / "d").symlink_to("/etc")
    with pytest.raises(collect.OutputError, match="leads out of the sandbox"):
        collect.open_output(str(box), "d/passwd")


# --- digests ---


def test_a_changed_file_has_another_digest(tmp_path):
    known, path = digests.Digests(), tmp_path / "f"
    path.write_text("1")
    os.utime(path, (1000, 1000))
    first, _ = known.of_path(str(path))
    assert known.of_path(str(path))[0] == first
    path.write_text("2")
    os.utime(path, (2000, 2000))
    assert known.of_path(str(path))[0] != first


def test_a_file_changed_within_the_clocks_tick_is_read_again(tmp_path):
    known, path = digests.Digests(), tmp_path / "f"
    path.write_text("1")
    status = path.stat()
    first, _ = known.of_path(str(path))
    path.write_text("2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert known.of_path(str(path))[0] != first


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
def test_what_is_not_a_file_is_not_read_for_ever(tmp_path, make):
    make(tmp_path / "p")
    with pytest.raises(OSError, match="neither a file"):
        digests.Digests().of_path(str(tmp_path / "p"))
