"""The access log: rotation, privacy, a disk that is full."""

from __future__ import annotations

import json
import stat
import subprocess
import sys

from vpn.gateway.accesslog import Access, AccessLog, now_text


def access(number=0):
    return Access(now_text(), "pilot-1", "web.example.org", 80, "203.0.113.1", "ok", number, 2, 0.5)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_who_where_bytes_when(tmp_path):
    log = AccessLog(tmp_path / "access.log")
    log.record(access(7))
    log.close()
    (line,) = lines(tmp_path / "access.log")
    assert (line["client"], line["host"], line["address"], line["port"]) == (
        "pilot-1",
        "web.example.org",
        "203.0.113.1",
        80,
    )
    assert (line["up"], line["down"], line["outcome"]) == (7, 2, "ok")
    assert line["at"].endswith("Z")
    assert stat.S_IMODE((tmp_path / "access.log").stat().st_mode) == 0o600


def test_rotated_by_size_and_nothing_is_lost_before_the_oldest(tmp_path):
    log = AccessLog(tmp_path / "access.log", limit=1000, keep=3)
    for number in range(100):
        log.record(access(number))
    log.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert set(names) <= {"access.log", "access.log.1", "access.log.2", "access.log.3"}
    kept = [
        line["up"] for name in sorted(names, reverse=True) if name != "access.log" for line in lines(tmp_path / name)
    ]
    kept += [line["up"] for line in lines(tmp_path / "access.log")] if "access.log" in names else []
    assert kept == list(range(100))[-len(kept) :]
    assert all(path.stat().st_size < 1400 and stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


def test_what_could_not_be_written_is_counted_and_told(tmp_path):
    directory = tmp_path / "gone"
    log = AccessLog(directory / "access.log")
    for number in range(3):
        log.record(access(number))
    log.flush()
    directory.mkdir()
    log.record(access(3))
    log.close()
    first, second = lines(directory / "access.log")
    assert first["lost_lines"] == 3
    assert second["up"] == 3
    assert log.lost == 0


WRITER = """
import sys
from pathlib import Path
from vpn.gateway.accesslog import Access, AccessLog, now_text
log = AccessLog(Path(sys.argv[1]), limit=2000, keep=1000)
for number in range(300):
    log.record(Access(now_text(), sys.argv[2], "web.example.org", 80, "203.0.113.1", "ok", number, 2, 0.5))
log.flush()  # in whatever time it takes
log.close()
"""


def test_two_processes_write_one_log_and_rotate_it(tmp_path):
    path = tmp_path / "access.log"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in ("relay", "plane")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = sorted((line["client"], line["up"]) for file in tmp_path.iterdir() for line in lines(file))
    assert found == sorted((name, number) for name in ("relay", "plane") for number in range(300))
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) > 10
    assert max(sizes) < 2400
    assert sum(size < 2000 for size in sizes) <= 1  # none was rotated twice
