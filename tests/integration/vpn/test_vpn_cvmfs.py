"""CVMFS in a session: squashfs images for real; cvmfs2 and cvmfsexec as recordings of them that mount such an image.

The real ones, which they were recorded from, are run by ``real_cvmfs``.

Nothing here needs root, and nothing is mounted outside of a session's own namespace.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WAN, environment, has, need

from vpn.cvmfs.servers import find

CMS, LHCB = "cms.cern.ch", "lhcb.cern.ch"
DEADLINE = 90

# What cvmfs2 does that we depend on: it reads its configuration by a shell, file after file, each in its directory;
# logs to CVMFS_USYSLOG what it finds; and ends with 0 when it has mounted and gone to the background, with its own
# status otherwise, which its last line repeats after the cause.
FAKE_CVMFS2 = """\
#!/bin/sh
printf '%s\\n' "$@" > {record}/argv
files=$(printf '%s' "$2" | sed 's/^config=//; s/:/ /g')
for file in $files; do if [ -e "$file" ]; then cd "${{file%/*}}" && . "$file"; fi; done
log() {{ echo "$(LC_ALL=C date '+%a %b %e %T %Y') ($repository) $1" >> "$CVMFS_USYSLOG"; }}
repository=$3
log "Cache directory structure created."
log "(manager 'standard') switching proxy from (none) to $CVMFS_HTTP_PROXY. Reason: set random start proxy"
set | grep ^CVMFS_ > {record}/settings
echo "LD_LIBRARY_PATH=$LD_LIBRARY_PATH" >> {record}/settings
case $3 in
{cases}
*) exec squashfuse_ll {image} "$4" ;;
esac
"""


@pytest.fixture(scope="session")
def squash():
    for program in ("mksquashfs", "squashfuse_ll", "unshare"):
        need(has(program), program)
    need(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse")
    done = subprocess.run(["unshare", "--user", "--mount", "true"], capture_output=True, check=False)
    need(done.returncode == 0, "user namespaces")
    need(not Path("/cvmfs").exists(), "a host without /cvmfs")


def image_of(directory, **files):
    """A squashfs file with these files."""
    tree = directory / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name, text in files.items():
        path = tree / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    image = directory / f"{len(list(directory.glob('*.sqsh')))}.sqsh"
    subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress"], check=True, capture_output=True)
    return image


@pytest.fixture
def image(squash, tmp_path):
    return image_of(tmp_path, sw__version="CMSSW_1\n", _dot_cvmfsdirtab="/sw\n")


def surroundings(tmp_path, path=None):
    first = f"{path}:" if path else ""
    return environment(tmp_path, TMPDIR=str(tmp_path), PATH=f"{first}{os.environ['PATH']}")


def vpn_run(tmp_path, *arguments, path=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "vpn", "run", "--mode", "none", *map(str, arguments)],
        env=surroundings(tmp_path, path), cwd=tmp_path, text=True, capture_output=True, check=False, timeout=DEADLINE,
        **options,
    )  # fmt: skip


def servers(directory):
    """FUSE servers of images below a directory; other tests, beside us on this host, have theirs."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name, line = (path / "comm").read_text(), (path / "cmdline").read_bytes()
            if name.startswith("squashfuse") and f"{directory}/".encode() in line:
                found.add(int(path.name))
        except OSError:
            continue
    return found


# --- images ------------------------------------------------------------------------------------------------------


def test_an_image_is_a_repository_and_all_else_is_as_it_was(image, tmp_path):
    before = servers(tmp_path)
    look = f"cat /cvmfs/{CMS}/sw/version; pwd; cd /; ls -A; id -u; test -w / || echo read-only; exit 7"
    done = vpn_run(tmp_path, "--cvmfs-image", f"{CMS}={image}", "--", "sh", "-c", look)
    assert done.returncode == 7, done.stderr
    version, where, *root, user, _ = done.stdout.split("\n")
    read_only = root.pop() if user == "read-only" else ""
    assert (version, where) == ("CMSSW_1", str(tmp_path))
    entries = set(root) - {str(os.getuid())}
    assert set(os.listdir("/")) | {"cvmfs"} == entries  # noqa: PTH208
    assert read_only or str(os.getuid()) in (user, *root)
    assert "squashfuse" not in Path("/proc/self/mounts").read_text()
    assert servers(tmp_path) == before


def test_every_directory_of_the_root_has_its_contents(image, tmp_path):
    count = (
        "for d in /*/; do test -L ${d%/} || echo $d $(ls -A $d | wc -l); done | grep -v -e /proc/ -e /tmp/ -e /cvmfs/"
    )

    def outside():
        return set(subprocess.run(["sh", "-c", count], text=True, capture_output=True, check=False).stdout.splitlines())

    before = outside()
    inside = set(vpn_run(tmp_path, "--cvmfs-image", f"{CMS}={image}", "--", "sh", "-c", count).stdout.splitlines())
    still = outside() & before  # in some of them others make files meanwhile
    assert still <= inside
    assert {line.split()[0] for line in inside} == {line.split()[0] for line in before}
    assert len(still) > 5


def test_an_image_of_all_repositories(squash, tmp_path):
    image = image_of(tmp_path, **{f"{CMS.replace('.', '_dot_')}__file": "cms", "lhcb_dot_cern_dot_ch__file": "lhcb"})
    read = f"cat /cvmfs/{CMS}/file /cvmfs/{LHCB}/file"
    done = vpn_run(tmp_path, "--cvmfs", f"{CMS},{LHCB}", "--cvmfs-image", image, "--", "sh", "-c", read)
    assert (done.returncode, done.stdout) == (0, "cmslhcb"), done.stderr
    done = vpn_run(tmp_path, "--cvmfs", "atlas.cern.ch", "--cvmfs-image", image, "--", "true")
    assert done.stderr == f"Error: cvmfs: atlas.cern.ch cannot be read in the image {image}\n"


def test_what_a_node_has_by_itself_is_used_and_kept(image, tmp_path):
    other = image_of(tmp_path, name="lhcb")
    inner = [sys.executable, "-m", "vpn", "run", "--mode", "none"]
    outer = ["--cvmfs-image", f"{CMS}={image}", "--"]
    native = vpn_run(tmp_path, *outer, *inner, "--cvmfs", CMS, "--", "cat", f"/cvmfs/{CMS}/sw/version")
    assert (native.returncode, native.stdout) == (0, "CMSSW_1\n"), native.stderr
    options = ["--cvmfs", f"{CMS},{LHCB}", "--cvmfs-image", f"{LHCB}={other}"]
    both = vpn_run(tmp_path, *outer, *inner, *options, "--", "cat", f"/cvmfs/{CMS}/sw/version", f"/cvmfs/{LHCB}/name")
    assert (both.returncode, both.stdout) == (0, "CMSSW_1\nlhcb"), both.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [("absent", "No such file or directory (it must be visible on the node)"), ("text", "could not be mounted")],
)
def test_an_image_that_is_none(squash, tmp_path, name, words):
    (tmp_path / "text").write_text("not a file system")
    done = vpn_run(tmp_path, "--cvmfs-image", f"{CMS}={name}", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (5, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("victim", ["session", "holder"])
def test_killed_it_leaves_no_mount_and_no_server(image, tmp_path, victim):
    before = servers(tmp_path)
    argv = [sys.executable, "-m", "vpn", "run", "--mode", "none", "--cvmfs-image", f"{CMS}={image}", "--", "sh", "-c",
            "echo up; exec sleep 1000"]  # fmt: skip
    with subprocess.Popen(
        argv, env=surroundings(tmp_path), stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    ) as p:
        try:
            assert p.stdout.readline() == "up\n"
            mine = servers(tmp_path) - before
            assert len(mine) == 1
            ends = [os.pidfd_open(pid) for pid in mine]
            os.kill(p.pid if victim == "session" else holder_of(mine.pop()), signal.SIGKILL)
            for end in ends:
                assert wait_readable(end)
                os.close(end)
            p.wait(DEADLINE)
        finally:
            p.kill()
    assert servers(tmp_path) == before


def test_a_squashfuse_that_is_killed_ends_the_session(image, tmp_path):
    argv = [sys.executable, "-m", "vpn", "run", "--mode", "none", "--cvmfs-image", f"{CMS}={image}", "--", "sh", "-c",
            "echo up; exec sleep 1000"]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, env=surroundings(tmp_path), **pipes) as p:
        try:
            assert p.stdout.readline() == "up\n"
            (pid,) = servers(tmp_path)
            os.kill(pid, signal.SIGKILL)
            assert p.wait(DEADLINE) == 5
            assert (
                p.stderr.read() == f"Error: cvmfs: {image}: its squashfuse has ended, maybe killed for lack of memory\n"
            )
        finally:
            p.kill()


def holder_of(pid):
    """The pid 1 of a process's pid namespace, as we see it: its parent, since it has adopted the server."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_readable(fd):
    import select  # noqa: PLC0415

    return bool(select.select([fd], [], [], DEADLINE)[0])


def test_in_a_tunnel(gateway, squash):
    image = image_of(gateway.directory, file="in the image")
    read = f"cat /cvmfs/{CMS}/file; ls /cvmfs"
    options = ("--cvmfs-image", f"{CMS}={image}", "--require", f"http://{WAN}/", "--require", f"cvmfs:{CMS}", "-v")
    credential = str(gateway.directory / "credential.json")
    for mode in ("relay", "openconnect"):
        gateway.vpn("login", "gateway", "credential", "--output", credential)
        done = gateway.vpn("node", "run", "--mode", mode, "--credential", credential, *options, "--", "sh", "-c", read)
        assert (done.returncode, done.stdout) == (0, f"in the image{CMS}\n"), done.stderr
        assert "file can be read" in done.stderr
    gateway.wait_gone([pid for pid, line in gateway.extra().items() if "squashfuse" in line])


# --- cvmfs2 and cvmfsexec ----------------------------------------------------------------------------------------


class Recorded:
    """A directory with a recorded cvmfs2, and what it was told."""

    def __init__(self, directory, image, cases=""):
        self.directory = directory
        self.image = image
        self.program = directory / "cvmfs2"
        self.write(cases)

    def write(self, cases):
        self.program.parent.mkdir(parents=True, exist_ok=True)
        self.program.write_text(FAKE_CVMFS2.format(record=self.directory, image=self.image, cases=cases))
        self.program.chmod(0o755)

    @property
    def argv(self):
        return (self.directory / "argv").read_text().splitlines()

    @property
    def settings(self):
        lines = (self.directory / "settings").read_text().splitlines()
        return {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def recorded(image, tmp_path):
    return Recorded(tmp_path / "bin", image)


OWN = ("--cvmfs-server", "http://s1.example/cvmfs", "--cvmfs-key", "/keys/a.pub")


def test_cvmfs2_is_mounted_in_the_session(recorded, tmp_path):
    before = servers(tmp_path)
    options = ("--cvmfs", CMS, *OWN, "--cvmfs-proxy", "http://squid:3128;DIRECT", "--require", f"cvmfs:{CMS}")
    done = vpn_run(tmp_path, *options, "--", "cat", f"/cvmfs/{CMS}/sw/version", path=recorded.directory)
    assert (done.returncode, done.stdout) == (0, "CMSSW_1\n"), done.stderr
    assert recorded.argv[0] == "-o"
    assert recorded.argv[2:] == [CMS, f"/cvmfs/{CMS}"]
    settings = recorded.settings
    assert settings["CVMFS_SERVER_URL"] == f"http://s1.example/cvmfs/{CMS}"
    assert settings["CVMFS_PUBLIC_KEY"] == "/keys/a.pub"
    assert settings["CVMFS_HTTP_PROXY"] == "http://squid:3128;DIRECT"
    base = tmp_path / f"hpcq-cvmfs-{os.getuid()}"
    assert settings["CVMFS_ALIEN_CACHE"] == str(base / "cache")
    assert [path.name for path in base.iterdir()] == ["cache"]
    assert servers(tmp_path) == before


def test_several_repositories_and_two_sessions_share_a_cache(recorded, tmp_path):
    read = f"cat /cvmfs/{CMS}/sw/version /cvmfs/{LHCB}/sw/version; {{ echo up; read line; }}"
    argv = [
        sys.executable,
        "-m",
        "vpn",
        "run",
        "--mode",
        "none",
        "--cvmfs",
        f"{CMS},{LHCB}",
        *OWN,
        "--",
        "sh",
        "-c",
        read,
    ]
    start = {"env": surroundings(tmp_path, recorded.directory), "text": True}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, **start, **pipes) as one, subprocess.Popen(argv, **start, **pipes) as other:
        for process in (one, other):
            assert [process.stdout.readline() for _ in range(3)] == ["CMSSW_1\n", "CMSSW_1\n", "up\n"]
        base = tmp_path / f"hpcq-cvmfs-{os.getuid()}"
        assert len(list(base.glob("session-*"))) == 2
        for process in (one, other):
            process.communicate("\n", timeout=DEADLINE)
            assert process.returncode == 0
    assert [path.name for path in base.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("status", "cause", "end", "words"),
    [
        (16, "failed to download repository manifest (7 - host connection problem)",
         "Failed to initialize root file catalog (16 - file catalog failure)", "no server answers"),
        (16, "whitelist verification failed (6): invalid whitelist signature",
         "Failed to initialize root file catalog (16 - file catalog failure)", "the public key is not this"),
        (15, "failed to open public key '/keys/a.pub'",
         "failed to load public key(s) (15 - signature verification failure)", "its public key cannot be read"),
        (23, "", "failed to discover HTTP proxy servers (23 - proxy auto-discovery failed)", "--cvmfs-proxy"),
        (4, "", "failed to mount file system", "/dev/fuse"),
    ],
)  # fmt: skip
def test_why_cvmfs2_ended(recorded, tmp_path, status, cause, end, words):
    said = f'log "{cause}"; log "{end}"' if cause else f'log "{end}"'
    recorded.write(f"{CMS}) {said}; exit {status};;")
    done = vpn_run(tmp_path, "--cvmfs", f"{LHCB},{CMS}", *OWN, "--", "echo", "ran", path=recorded.directory)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith(f"Error: cvmfs: {CMS}: cvmfs2 ended with status {status}: ")
    assert words in done.stderr
    assert done.stderr.endswith(f" (it says: {cause or end})\n")
    assert len(done.stderr.splitlines()) == 1


def test_what_could_not_be_fetched_is_said_at_the_end(recorded, tmp_path):
    unfetched = (
        "failed to fetch /b/later (hash: 4bf7c5864f846e8c9b8cbe7938080c0e53fef24c, error 7 [host connection problem])"
    )
    recorded.write(f'{CMS}) log "{unfetched}"; log "EIO (06) on /b/later"; exec squashfuse_ll {recorded.image} "$4";;')
    done = vpn_run(tmp_path, "--cvmfs", CMS, *OWN, "--", "false", path=recorded.directory)
    said = f"vpn run: cvmfs: {CMS}: /b/later could not be fetched: host connection problem (no server answers)\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_cvmfs2_that_hangs_is_ended(recorded, tmp_path):
    recorded.write(f"{CMS}) exec sleep 1000;;")
    done = vpn_run(tmp_path, "--cvmfs", CMS, *OWN, "--timeout", "5", "--", "echo", "ran", path=recorded.directory)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == f"Error: cvmfs: mounting {CMS} took more than 5 s\n"


def test_a_cvmfs2_that_is_killed_ends_the_session(recorded, tmp_path):
    stay = 'tail -f /dev/null "$2" >/dev/null 2>&1 &'  # has its configuration on its command line, as cvmfs2 has
    recorded.write(f'{CMS}) {stay} exec squashfuse_ll {recorded.image} "$4";;')
    argv = [sys.executable, "-m", "vpn", "run", "--mode", "none", "--cvmfs", CMS, *OWN, "--", "sh", "-c",
            "echo up; exec sleep 1000"]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, env=surroundings(tmp_path, recorded.directory), **pipes) as p:
        try:
            assert p.stdout.readline() == "up\n"
            (pid,) = find(f"{tmp_path}/hpcq-cvmfs-{os.getuid()}/session-")
            os.kill(pid, signal.SIGKILL)
            assert p.wait(DEADLINE) == 5
            assert p.stderr.read() == f"Error: cvmfs: {CMS}: its cvmfs2 has ended, maybe killed for lack of memory\n"
        finally:
            p.kill()


def test_a_repository_that_nothing_is_known_of(recorded, tmp_path):
    need(not Path("/etc/cvmfs").exists(), "a host without CVMFS' configuration")
    done = vpn_run(tmp_path, "--cvmfs", CMS, "--", "true", path=recorded.directory)
    assert done.returncode == 5
    assert "--cvmfs-server http://HOST/cvmfs and --cvmfs-key FILE" in done.stderr


def test_neither_program_is_there(squash, tmp_path):
    need(not has("cvmfs2") and not has("cvmfsexec"), "a host without CVMFS")
    done = vpn_run(tmp_path, "--cvmfs", CMS, "--", "true")
    assert done.returncode == 5
    assert done.stderr.startswith("Error: program: cvmfsexec and cvmfs2 were not found: put cvmfsexec on PATH")
    assert len(done.stderr.splitlines()) == 1


def distribution(root, image):
    """What `makedist` makes: a relocated cvmfs2 and its configuration."""
    recorded = Recorded(root / "usr" / "bin", image)
    for name, text in {
        "default.conf": "CVMFS_QUOTA_LIMIT=99\nCVMFS_SHARED_CACHE=yes\n",
        "default.d/50-cern.conf": "CVMFS_HTTP_PROXY=http://of-the-dist:3128\n",
        "domain.d/cern.ch.conf": "CVMFS_SERVER_URL=http://of-the-domain/\nCVMFS_KEYS_DIR=/etc/cvmfs/keys/cern.ch\n",
    }.items():
        path = root / "etc" / "cvmfs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "usr" / "lib64").mkdir()
    return recorded


def test_the_cvmfs2_of_a_cvmfsexec(image, tmp_path):
    recorded = distribution(tmp_path / "exec" / "dist", image)
    (tmp_path / "exec" / "cvmfsexec").write_text("#!/bin/sh\nexit 99\n")
    (tmp_path / "exec" / "cvmfsexec").chmod(0o755)
    done = vpn_run(tmp_path, "--cvmfs", CMS, "--", "cat", f"/cvmfs/{CMS}/sw/version", path=tmp_path / "exec")
    assert (done.returncode, done.stdout) == (0, "CMSSW_1\n"), done.stderr
    settings = recorded.settings
    assert settings["CVMFS_SERVER_URL"] == "http://of-the-domain/"
    assert settings["CVMFS_HTTP_PROXY"] == "http://of-the-dist:3128"
    assert settings["CVMFS_KEYS_DIR"] == f"{tmp_path}/exec/dist/etc/cvmfs/keys/cern.ch"
    assert (settings["CVMFS_QUOTA_LIMIT"], settings["CVMFS_SHARED_CACHE"]) == ("-1", "no")
    assert settings["LD_LIBRARY_PATH"] == f"{tmp_path}/exec/dist/usr/lib64"


def test_a_cvmfsexec_in_one_file_unpacks_itself(image, tmp_path):
    distribution(tmp_path / "packed" / "dist", image)
    wrapper = tmp_path / "one" / "cvmfsexec"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\ncp -r {tmp_path}/packed .cvmfsexec && test "$1" = -v && echo 4.36\n')
    wrapper.chmod(0o755)
    done = vpn_run(tmp_path, "--cvmfs", CMS, "--", "cat", f"/cvmfs/{CMS}/sw/version", path=wrapper.parent)
    assert (done.returncode, done.stdout) == (0, "CMSSW_1\n"), done.stderr
    wrapper.write_text("#!/bin/sh\necho cannot unpack; exit 1\n")
    done = vpn_run(tmp_path, "--cvmfs", CMS, "--", "true", path=wrapper.parent)
    assert done.returncode == 5
    assert "neither in dist beside it nor inside it (cannot unpack)" in done.stderr


def test_an_empty_repository_does_not_count(recorded, tmp_path, squash):
    recorded.write(f"{CMS}) exec true ;;")  # says that it has mounted, and has not
    done = vpn_run(tmp_path, "--cvmfs", CMS, *OWN, "--", "echo", "ran", path=recorded.directory)
    assert (done.returncode, done.stdout) == (5, "")
    assert f"/cvmfs/{CMS} is there but empty" in done.stderr
