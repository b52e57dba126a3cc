"""CVMFS: settings, what cvmfs2 is told, what its end means, the node's cache, a root to mount on."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shlex
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hpcq.batch.request import pilot_request
from hpcq.errors import UsageError as HpcqUsageError
from hpcq.pilot.options import parse
from vpn.cli import cli
from vpn.cvmfs import client
from vpn.cvmfs.cache import STALE, session_room, trim
from vpn.cvmfs.client import Installation, Room
from vpn.cvmfs.log import troubles_in
from vpn.cvmfs.settings import Cvmfs, Image, make_cvmfs, whole_image
from vpn.errors import TunnelError, UsageError
from vpn.probes import Stage, probe_cvmfs
from vpn.roots import building_site

CMS = "cms.cern.ch"
ROOM = Room("/scratch/own", "/scratch/cache")
NODE = Installation("/usr/bin/cvmfs2")
DIST = Installation("/sw/dist/usr/bin/cvmfs2", "/sw/dist", "/sw/dist/usr/lib64")
names = st.from_regex(r"\A[a-z][a-z0-9]{0,8}(\.[a-z][a-z0-9]{0,8}){1,3}\Z")
paths = st.from_regex(r"\A/[ -~]{0,30}\Z")


# --- settings ----------------------------------------------------------------------------------------------------


@given(
    repositories=st.lists(names, min_size=1, max_size=4).map(tuple),
    images=st.lists(st.builds(Image, paths, names), max_size=3, unique_by=lambda image: image.repository).map(tuple),
    proxy=st.sampled_from(["", "DIRECT", "http://a:3128;DIRECT", "http://a'b:1|http://c:2"]),
    cache=st.just("") | paths,
    quota=st.integers(1000, 10**6),
)
def test_settings_cross_a_command_line(repositories, images, proxy, cache, quota):
    settings = Cvmfs(repositories, images, proxy, cache=cache, quota=quota)
    assert Cvmfs.from_json(shlex.split(shlex.quote(settings.to_json()))[0]) == settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"repositories": ("cms",)}, "'cms' is not a CVMFS repository"),
        ({"repositories": ("../etc.x",)}, "is not a CVMFS repository"),
        ({"repositories": ()}, "no CVMFS repository"),
        ({"quota": 10}, "at least 1000 MB"),
        ({"cache": "scratch"}, "whole path"),
        ({"cache": "/a\nb"}, "cannot be a path"),
        ({"servers": ("http://x/cvmfs",)}, "given together"),
        ({"keys": ("/k",)}, "given together"),
        ({"servers": ("x",), "keys": ("/k",)}, "is not http://HOST/cvmfs"),
        ({"proxy": "a\nCVMFS_X=1"}, "line break"),
        ({"images": (Image("/a"), Image("/b", CMS))}, "no place for another"),
        ({"images": (Image("/a", CMS), Image("/b", CMS))}, "the same place"),
    ],
)
def test_settings_that_cannot_be_used(change, words):
    with pytest.raises(UsageError, match=words):
        Cvmfs(**({"repositories": (CMS,)} | change))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"repositories":["x"]}', '{"nonsense":1}', '{"quota":"many"}'])
def test_what_are_no_settings(text):
    with pytest.raises(UsageError):
        Cvmfs.from_json(text)


def test_options_as_they_are_written():
    settings = make_cvmfs("cms.cern.ch, atlas.cern.ch,cms.cern.ch", images=["lhcb.cern.ch=/l.sqsh"], quota=2000)
    assert settings == Cvmfs((CMS, "atlas.cern.ch"), (Image("/l.sqsh", "lhcb.cern.ch"),), quota=2000)
    assert make_cvmfs(None) is None
    assert make_cvmfs([CMS]) == Cvmfs((CMS,))
    assert make_cvmfs(None, images=["/with=sign.sqsh"]) == Cvmfs((), (Image("/with=sign.sqsh"),))
    with pytest.raises(UsageError, match="without a repository"):
        make_cvmfs(None, proxy="DIRECT")
    with pytest.raises(UsageError, match="'' is not a CVMFS repository"):
        make_cvmfs("")


def test_vpn_run_refuses_what_is_no_repository():
    done = CliRunner().invoke(cli, ["run", "--mode", "none", "--cvmfs", "cms", "--", "true"])
    assert (done.exit_code, done.output) == (2, "Error: 'cms' is not a CVMFS repository, as cms.cern.ch is\n")


def test_a_pilot_gets_what_submit_pilots_was_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = {"cvmfs": "cms.cern.ch", "cvmfs_image": ["lhcb.cern.ch=l.sqsh"], "cvmfs_quota": "2GB", "scratch": "/"}
    request = pilot_request("q", "local", 1, options)
    argv = list(request.pilot_argv)
    told = parse(argv[argv.index("hpcq.pilot") + 1 :])
    assert told.tunnel["cvmfs"] == Cvmfs((CMS,), (Image(f"{tmp_path}/l.sqsh", "lhcb.cern.ch"),), cache="/", quota=2048)
    assert "--cvmfs" not in pilot_request("q", "local", 1, {"scratch": "/s"}).pilot_argv
    for wrong in ({"cvmfs": "x"}, {"cvmfs_proxy": "DIRECT"}, {"cvmfs_image": "one text"}):
        with pytest.raises(HpcqUsageError):
            pilot_request("q", "local", 1, wrong)


# --- cvmfs2 ------------------------------------------------------------------------------------------------------


def test_configuration_is_read_in_the_order_of_the_documentation():
    found = client.configuration_files(NODE, ROOM, CMS, ["60-egi.conf", "50-cern.conf"], "config.cern.ch")
    assert found == [
        "/scratch/own/cms.cern.ch.first.conf",
        "/etc/cvmfs/default.conf",
        "/etc/cvmfs/default.d/50-cern.conf",
        "/etc/cvmfs/default.d/60-egi.conf",
        "/cvmfs/config.cern.ch/etc/cvmfs/default.conf",
        "/etc/cvmfs/default.local",
        "/cvmfs/config.cern.ch/etc/cvmfs/domain.d/cern.ch.conf",
        "/etc/cvmfs/domain.d/cern.ch.conf",
        "/etc/cvmfs/domain.d/cern.ch.local",
        "/cvmfs/config.cern.ch/etc/cvmfs/config.d/cms.cern.ch.conf",
        "/etc/cvmfs/config.d/cms.cern.ch.conf",
        "/etc/cvmfs/config.d/cms.cern.ch.local",
        "/scratch/own/cms.cern.ch.last.conf",
    ]


def test_the_configuration_repository_does_not_configure_itself():
    found = client.configuration_files(NODE, ROOM, "config.cern.ch", [], "config.cern.ch")
    assert not any(path.startswith("/cvmfs/") for path in found)


@given(
    st.dictionaries(
        st.from_regex(r"\ACVMFS_[A-Z]{1,8}\Z"), st.text(st.characters(codec="ascii", exclude_characters="\0\n"))
    )
)
def test_a_shell_reads_what_was_written(values):
    text = client.configuration(values)
    assert dict(word.split("=", 1) for word in shlex.split(text)) == values


def test_the_cache_is_node_local_and_shared_and_the_proxy_ours():
    values = client.last_settings(Cvmfs((CMS,), proxy="http://p:3128"), ROOM, CMS)
    assert values["CVMFS_HTTP_PROXY"] == "http://p:3128"
    assert values["CVMFS_ALIEN_CACHE"] == "/scratch/cache"
    assert (values["CVMFS_SHARED_CACHE"], values["CVMFS_QUOTA_LIMIT"]) == ("no", "-1")
    assert "CVMFS_HTTP_PROXY" not in client.last_settings(Cvmfs((CMS,)), ROOM, CMS)
    assert client.first_settings() == {"CVMFS_HTTP_PROXY": "DIRECT", "CVMFS_NFILES": "131072"}


def test_servers_and_keys_of_ones_own():
    settings = Cvmfs((CMS,), servers=("http://a/cvmfs", "http://b/cvmfs/"), keys=("/k1", "/k2"))
    values = client.last_settings(settings, ROOM, CMS)
    assert values["CVMFS_SERVER_URL"] == "http://a/cvmfs/cms.cern.ch;http://b/cvmfs/cms.cern.ch"
    assert values["CVMFS_PUBLIC_KEY"] == "/k1:/k2"
    assert values["CVMFS_KEYS_DIR"] == ""


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("CVMFS_KEYS_DIR=/etc/cvmfs/keys/cern.ch", "CVMFS_KEYS_DIR=/sw/dist/etc/cvmfs/keys/cern.ch"),
        ('CVMFS_PUBLIC_KEY="/etc/cvmfs/a.pub:/etc/cvmfs/b.pub"',
         'CVMFS_PUBLIC_KEY="/sw/dist/etc/cvmfs/a.pub:/sw/dist/etc/cvmfs/b.pub"'),
        (". /etc/cvmfs/common.conf", ". /sw/dist/etc/cvmfs/common.conf"),
        ("K=/cvmfs/config.cern.ch/etc/cvmfs/keys", "K=/cvmfs/config.cern.ch/etc/cvmfs/keys"),
        ("K=$CVMFS_MOUNT_DIR/config/etc/cvmfs/keys", "K=$CVMFS_MOUNT_DIR/config/etc/cvmfs/keys"),
        ("K=/etc/cvmfs-other", "K=/etc/cvmfs-other"),
    ],
)  # fmt: skip
def test_the_configuration_of_a_relocated_installation_names_what_is_in_it(line, moved):
    text = client.relocated(f"{line}\n", "/sw/dist/etc/cvmfs/domain.d/cern.ch.conf", "/sw/dist")
    assert text == f"cd /sw/dist/etc/cvmfs/domain.d\n{moved}\n"


@pytest.mark.parametrize("character", list(':,"\\`$'))
def test_a_path_that_cvmfs2_cannot_be_told_of(character):
    path = f"/a{character}b/c"
    with pytest.raises(TunnelError, match=r"cvmfs2 cannot be told of a path with . in it; see --cvmfs-cache"):
        client.command(NODE, ["/fine", path], CMS)
    with pytest.raises(TunnelError, match="in it; see --cvmfs-key"):
        client.last_settings(Cvmfs((CMS,), servers=("http://a/cvmfs",), keys=(path,)), ROOM, CMS)


def test_a_relocated_installation_has_its_own_libraries():
    assert DIST.environment == {"LD_LIBRARY_PATH": "/sw/dist/usr/lib64", "CVMFS_LIBRARY_PATH": "/sw/dist/usr/lib64"}
    assert NODE.environment == {}
    assert client.command(DIST, ["/a", "/b"], CMS) == [
        "/sw/dist/usr/bin/cvmfs2", "-o", "config=/a:/b", CMS, "/cvmfs/cms.cern.ch",
    ]  # fmt: skip


def test_the_repository_of_configurations():
    texts = [
        "X=1\nCVMFS_CONFIG_REPOSITORY=a.cern.ch\n",
        "# CVMFS_CONFIG_REPOSITORY=c.ch\n",
        " CVMFS_CONFIG_REPOSITORY='b.cern.ch'\n",
    ]
    assert client.config_repository_of(texts) == "b.cern.ch"
    assert client.config_repository_of([]) == ""


@pytest.mark.parametrize(
    ("status", "words"),
    [(16, "no answer from server or proxy"), (23, "--cvmfs-proxy"), (9, "disk is full"), (4, "/dev/fuse"),
     (99, "status 99"), (-9, "signal 9")],
)  # fmt: skip
def test_what_a_status_means(status, words):
    error = client.explain_end(CMS, status, "start\nthe last word\n\n", "")
    assert words in error.message
    assert error.message.startswith("cms.cern.ch: cvmfs2 ended with ")
    assert error.message.endswith(" (it says: the last word)")
    assert len(error.message.splitlines()) == 1
    assert error.layer == "cvmfs"


def log_of(*lines, end="Failed to initialize root file catalog (16 - file catalog failure)"):
    """A log as cvmfs2 2.12 writes it when it cannot mount."""
    begin = [
        "Cache directory structure created.",
        "(manager 'standard') switching proxy from (none) to DIRECT. Reason: set random start proxy from the first "
        "proxy group [Current host: http://127.0.0.1:8000/cvmfs/cms.cern.ch]",
        "(manager 'external') switching proxy from (none) to DIRECT. Reason: cloned [Current host: ]",
    ]
    return "".join(f"Mon Nov 23 21:27:56 2026 (cms.cern.ch) {line}\n" for line in [*begin, *lines, end])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["whitelist verification failed (6): invalid whitelist signature"], "the public key is not this repository's"),
        (["whitelist lifetime verification failed, expired", "whitelist verification failed (5): expired whitelist"],
         "its whitelist has ended"),
        (["failed to download repository manifest (7 - host connection problem)"], "no server answers"),
        (["failed to download repository manifest (9 - host returned HTTP error)"], "the server does not have it"),
        (["failed to download repository manifest (6 - proxy connection problem)"], "give --cvmfs-proxy"),
        (["(manager 'standard') failed to resolve IP addresses for nosuch (4 - unknown host name)",
          "failed to download repository manifest (6 - proxy connection problem)"], "give --cvmfs-proxy"),
        ([], "one that is no repository"),
    ],
)  # fmt: skip
def test_the_cause_in_the_log_of_the_real_client(lines, words):
    error = client.explain_end(CMS, 16, "CernVM-FS: loading Fuse module... \n", log_of(*lines))
    assert words in error.message
    last = lines[-1] if lines else "Failed to initialize root file catalog (16 - file catalog failure)"
    assert error.message.endswith(f" (it says: {last})")


def test_a_key_that_is_not_there():
    end = "failed to load public key(s) (15 - signature verification failure)"
    error = client.explain_end(CMS, 15, "", log_of("failed to open public key '/k.pub'", end=end))
    assert error.message.endswith("its public key cannot be read (it says: failed to open public key '/k.pub')")


def test_no_proxy_was_found():
    end = "failed to discover HTTP proxy servers (23 - proxy auto-discovery failed)"
    assert "it found no proxy: give --cvmfs-proxy" in client.explain_end(CMS, 23, "", log_of(end=end)).message


def test_what_could_not_be_read_while_it_was_mounted():
    unfetched = (
        "failed to fetch /b/c/later (hash: 4bf7c5864f846e8c9b8cbe7938080c0e53fef24c, error 7 [host connection problem])"
    )
    catalog = "failed to fetch file catalog at cms.cern.ch:/b (hash: 4bf7, error 9 [host returned HTTP error])"
    offline = "warning, could not apply updated catalog revision, entering offline mode"
    inode = "failed to open inode: 263, CAS key 4bf7c5864f846e8c9b8cbe7938080c0e53fef24c, error code 2"
    log = log_of(offline, unfetched, inode, unfetched, catalog, end="EIO (06) on /b/c/later")
    assert list(troubles_in(log)) == [
        "its servers cannot be reached: only what is in the cache can be read",
        "/b/c/later could not be fetched: host connection problem (no server answers)",
        "file catalog at cms.cern.ch:/b could not be fetched: host returned HTTP error "
        "(the server does not have it, or refuses it)",
    ]
    assert list(troubles_in(log_of())) == []


@given(st.integers(-64, 255), st.text(max_size=2000), st.text(max_size=2000))
def test_any_end_is_one_line(status, said, log):
    assert len(client.explain_end(CMS, status, said, log).message.replace("\x85", "").splitlines()) == 1
    assert len(client.explain_image("/x", status, said).message.splitlines()) == 1


def test_a_client_that_was_killed(monkeypatch):
    def listdir(path):
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(TunnelError, match="Transport endpoint is not connected: its cvmfs2 has ended"):
        asyncio.run(probe_cvmfs(f"cvmfs:{CMS}", Stage()))


# --- the cache ---------------------------------------------------------------------------------------------------


def fill(cache, sizes):
    """Files of these sizes, the first the longest unused; their names."""
    for index, size in enumerate(sizes):
        path = cache / f"{index % 256:02x}" / f"file{index}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
        os.utime(path, (1_000_000 + index, 1_000_000))
    return {path.name for path in cache.rglob("file*")}


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    fill(tmp_path, [8192] * 10)
    assert trim(str(tmp_path), 5 * 8192) == 6 * 8192
    assert {path.name for path in tmp_path.rglob("file*")} == {"file6", "file7", "file8", "file9"}
    assert trim(str(tmp_path), 5 * 8192) == 0


def test_a_cache_within_its_quota_is_left_alone(tmp_path):
    names = fill(tmp_path, [4096] * 5)
    assert trim(str(tmp_path), 5 * 4096) == 0
    assert fill(tmp_path, []) == names
    assert trim(str(tmp_path / "absent"), 1) == 0


def test_what_cvmfs2_notes_of_its_cache_is_not_contents(tmp_path):
    fill(tmp_path, [4096] * 5)
    (tmp_path / "cvmfschecksum.cms.cern.ch").write_text("x" * 53)
    assert trim(str(tmp_path), 0) == 5 * 4096
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["cvmfschecksum.cms.cern.ch"]


def test_one_session_trims_at_a_time_and_downloads_go_on(tmp_path):
    fill(tmp_path, [4096] * 5)
    (tmp_path / "txn").mkdir()
    (tmp_path / "txn" / "file-in-work").write_bytes(b"x" * 4096)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert trim(str(tmp_path), 0) == 0
    os.close(other)
    assert trim(str(tmp_path), 0) == 5 * 4096
    assert (tmp_path / "txn" / "file-in-work").exists()


def test_what_killed_sessions_had_begun_to_fetch_is_removed(tmp_path):
    (tmp_path / "txn").mkdir()
    for name, age in (("left", 2 * STALE), ("fresh", 0.0)):
        (tmp_path / "txn" / name).write_bytes(b"x")
        then = time.time() - age
        os.utime(tmp_path / "txn" / name, (then, then))
    assert trim(str(tmp_path), 1 << 30) == 0
    assert [path.name for path in (tmp_path / "txn").iterdir()] == ["fresh"]


def test_a_room_is_private_and_goes_and_the_cache_stays(tmp_path):
    with session_room(str(tmp_path)) as one, session_room(str(tmp_path)) as other:
        assert one.cache == other.cache
        assert one.own != other.own
        assert Path(one.own).stat().st_mode & 0o777 == 0o700
        Path(one.cache, "kept").touch()
    assert not Path(one.own).exists()
    assert Path(one.cache, "kept").exists()


def test_the_room_of_a_killed_session_is_removed_by_the_next(tmp_path):
    with session_room(str(tmp_path)) as room:
        dead = Path(room.own).with_name("session-dead")
    (dead / "full").mkdir(parents=True)
    with session_room(str(tmp_path)) as alive:
        assert not dead.exists()
        with session_room(str(tmp_path)):
            assert Path(alive.own).exists()


def test_a_room_somebody_else_could_write_to_is_refused(tmp_path):
    base = tmp_path / f"hpcq-cvmfs-{os.getuid()}"
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(TunnelError, match="not a private directory"), session_room(str(tmp_path)):
        pass
    base.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TunnelError, match="not a private directory"), session_room(str(tmp_path)):
        pass


def test_a_room_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TunnelError, match="give --cvmfs-cache"), session_room(str(tmp_path / "file")):
        pass


# --- a root to mount on ------------------------------------------------------------------------------------------

MOUNTS = "".join(
    f"{number} 1 0:1 / {point} rw - tmpfs tmpfs rw\n"
    for number, point in enumerate(
        ["/", "/proc", "/sys", "/sys/fs/cgroup", "/dev/pts", "/home/a", "/tmp", "/usr/x\\040y"]
    )
)


def test_a_root_is_built_where_nothing_is_mounted_below():
    assert building_site(["dev", "home", "proc", "sys", "tmp", "usr"], MOUNTS) == "tmp"
    with pytest.raises(TunnelError, match="no directory of the root"):
        building_site(["dev", "proc", "sys", "home"], MOUNTS)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("a.sqfs", "{here}/a.sqfs"),
        ("cms.cern.ch=a.sqfs", "cms.cern.ch={here}/a.sqfs"),
        ("/data/run=7/a.sqfs", "/data/run=7/a.sqfs"),
        ("cms.cern.ch=/data/run=7/a.sqfs", "cms.cern.ch=/data/run=7/a.sqfs"),
    ],
)
def test_an_image_is_made_whole_also_below_a_directory_with_an_equals_sign(text, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert whole_image(text) == whole.format(here=tmp_path)
