"""A node's cache: bounded, shared, whole after crashes, not to be damaged by tasks."""

import fcntl
import os
import subprocess
import sys
import tempfile
import threading

import pytest

from hpcq.files import cache as module
from hpcq.files.cache import Cache
from hpcq.files.digests import of_bytes
from hpcq.pilot.contents import Contents


def put(cache, data):
    content = of_bytes(data)
    if not cache.make_room(len(data)):
        return None
    descriptor, part = cache.new_part()
    os.write(descriptor, data)
    cache.adopt(content.digest, descriptor, part)
    cache.drop_part(descriptor, part)
    return content.digest


def get(cache, digest):
    descriptor = cache.open(digest)
    if descriptor is None:
        return None
    try:
        return os.pread(descriptor, 1 << 20, 0)
    finally:
        os.close(descriptor)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path, 1000)


def test_what_was_put_is_found_by_every_pilot(cache, tmp_path):
    digest = put(cache, b"data")
    assert get(Cache(tmp_path, 1000), digest) == b"data"
    assert get(cache, of_bytes(b"other").digest) is None


def test_private(cache):
    assert cache.root.stat().st_mode & 0o777 == 0o700


def test_what_was_used_longest_ago_goes_first(cache):
    first, second = put(cache, b"a" * 400), put(cache, b"b" * 400)
    assert get(cache, first)
    third = put(cache, b"c" * 400)
    assert get(cache, second) is None
    assert get(cache, first)
    assert get(cache, third)


def test_what_there_is_is_looked_at_when_it_may_be_too_much_only(cache, monkeypatch):
    looks = []
    files = module._files
    monkeypatch.setattr(module, "_files", lambda directory: looks.append(directory) or files(directory))
    for number in range(200):
        assert put(cache, b"%050d" % number)
        assert sum(path.stat().st_size for path in cache._objects.iterdir()) <= cache.limit
    assert len(looks) < 150  # two directories each time, every third or so: a sixteenth is one file here
    cache.limit = 100_000
    looks.clear()
    for number in range(200):
        assert put(cache, b"%051d" % number)
    assert not looks


@pytest.mark.parametrize("noted", [b"", b"x", b"-1", b"99999999999999999999"])
def test_whatever_is_noted_of_its_size_it_stays_under_its_limit_and_takes_what_fits(cache, noted):
    first = put(cache, b"a" * 400)
    (cache.root / "lock").write_bytes(noted)
    assert put(cache, b"b" * 500)
    assert get(cache, first)
    last = put(cache, b"c" * 500)
    assert get(cache, last)
    assert sum(path.stat().st_size for path in cache._objects.iterdir()) == 900


def test_what_was_reserved_and_did_not_come_takes_no_room_for_ever(cache):
    for _ in range(10):
        assert cache.make_room(900)
    digest = put(cache, b"a" * 100)
    assert cache.make_room(900)
    assert get(cache, digest)


def test_pilots_that_share_it_count_together(cache, tmp_path):
    other = Cache(tmp_path, 1000)
    for number in range(40):
        assert put((cache, other)[number % 2], b"%0300d" % number)
        assert sum(path.stat().st_size for path in cache._objects.iterdir()) <= 1000


def test_what_can_never_fit_displaces_nothing(cache):
    digest = put(cache, b"a" * 900)
    assert put(cache, b"b" * 1001) is None
    assert get(cache, digest)


def test_what_is_kept_stays(cache):
    kept = put(cache, b"k" * 600)
    assert cache.pin(kept)
    assert not cache.make_room(500)
    assert get(cache, kept)
    cache.close()
    assert cache.make_room(500)


def test_an_output_that_stays_for_later_tasks_counts_and_is_not_displaced(cache):
    contents = Contents(cache, "p", None, lambda digests: None)
    kept = contents.keep(iter([b"k" * 300, b"k" * 300]), "file", False).digest
    first = put(cache, b"a" * 300)
    assert put(cache, b"b" * 500) is None  # not even without the first
    second = put(cache, b"c" * 300)
    assert get(cache, first) is None
    assert get(cache, second)
    assert get(cache, kept) == b"k" * 600
    with pytest.raises(OSError, match="does not fit into the node's cache"):
        contents.keep(iter([b"m" * 500]), "file", False)
    assert get(cache, kept)
    cache.close()  # its pilot ends: nobody needs it
    assert put(cache, b"d" * 900)
    assert get(cache, kept) is None


def test_a_reader_has_all_of_what_is_removed_meanwhile(cache):
    digest = put(cache, b"a" * 900)
    descriptor = cache.open(digest)
    put(cache, b"b" * 900)
    assert get(cache, digest) is None
    assert os.pread(descriptor, 1000, 0) == b"a" * 900
    os.close(descriptor)


def test_a_dead_pilots_parts_go_a_living_ones_stay(cache, tmp_path):
    living, kept = cache.new_part()
    dead, left = cache.new_part()
    os.close(dead)
    Cache(tmp_path, 1000)
    assert kept.exists()
    assert not left.exists()
    cache.drop_part(living, kept)


def test_a_part_that_a_starting_pilot_takes_for_a_dead_ones_is_made_again(cache, tmp_path, monkeypatch):
    make = tempfile.mkstemp

    def made(**options):
        monkeypatch.undo()
        found = make(**options)
        Cache(tmp_path, 10)  # before the part is locked
        return found

    monkeypatch.setattr(tempfile, "mkstemp", made)
    descriptor, part = cache.new_part()
    cache.adopt(b"d", descriptor, part)
    cache.drop_part(descriptor, part)
    assert cache.digests() == [b"d"]


def test_another_boot_begins_empty(cache, tmp_path):
    digest = put(cache, b"data")
    (cache.root / "boot").write_text("another")
    assert get(Cache(tmp_path, 1000), digest) is None


def test_a_truncated_object_is_dropped(cache):
    digest = put(cache, b"data")
    assert cache.open(digest, 5) is None
    assert not (cache.root / "objects" / digest.hex()).exists()


def test_a_task_that_writes_through_a_link_damages_it_for_nobody_after_it(cache, tmp_path):
    digest = put(cache, b"data")
    assert cache.link(digest, tmp_path / "link")
    (tmp_path / "link").chmod(0o644)
    (tmp_path / "link").write_bytes(b"DATA")
    (tmp_path / "link").chmod(0o444)
    assert cache.open(digest, 4) is None


def test_a_copy_is_the_tasks_own(cache, tmp_path):
    digest = put(cache, b"data")
    descriptor = cache.open(digest)
    module.copy(descriptor, tmp_path / "own", 0o644)
    os.close(descriptor)
    with (tmp_path / "own").open("ab") as file:
        file.write(b" more")
    assert (tmp_path / "own").read_bytes() == b"data more"
    assert get(cache, digest) == b"data"


def test_somebody_elses_directory_is_not_used(tmp_path):
    (tmp_path / f"hpcq-cache-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"hpcq-cache-{os.getuid()}").chmod(0o777)
    with pytest.raises(PermissionError, match="not a private directory"):
        Cache(tmp_path)


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / f"hpcq-cache-{os.getuid()}").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError):
        Cache(tmp_path)


def test_one_at_a_time_fetches(cache):
    """Many threads, each with the lock for a moment: never two at once, and no lock file is left."""
    digest, inside, most = of_bytes(b"x").digest, [], []

    def fetch():
        for _ in range(50):
            lock = cache.lock(digest)
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            cache.unlock(digest, lock)

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert not list((cache.root / "locks").iterdir())


def test_the_lock_of_a_killed_pilot_is_free(cache, tmp_path):
    digest = of_bytes(b"x").digest
    program = (
        "import sys, pathlib; from hpcq.files.cache import Cache\n"
        "Cache(pathlib.Path(sys.argv[1]), 1000).lock(bytes.fromhex(sys.argv[2])); print('locked', flush=True)\n"
        "sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), digest.hex()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout.readline() == "locked\n"
        with (cache.root / "locks" / digest.hex()).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.kill()
        cache.unlock(digest, cache.lock(digest))
