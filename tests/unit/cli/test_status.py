"""What ``hpcq status`` shows of a manager's answers."""

from hpcq.cli.status import ROWS, Look, lines, listed

STATUS = {
    "queue": "ana",
    "hostname": "login",
    "pid": 7,
    "tasks": {"waiting": 3, "sent": 2, "running": 1, "done": {"success": 5, "crash": 1}},
    "pilots": {"ready": 2, "gone": 0},
    "cores": 16,
    "cores_busy": 4,
}
LIMITS = {"min": 0, "max": 9, "step": 5, "interval": 30.0, "backlog": 20, "idle_timeout": 300.0}
SCALING = {
    "active": True, "paused": "no", "batch": "slurm", "limits": LIMITS, "needed": 1, "working": 2, "idle": 0,
    "coming": 1,
}  # fmt: skip


def test_lines():
    assert lines(Look(STATUS, [], {"active": False})) == [
        "queue   ana, served by process 7 on login",
        "tasks   3 waiting, 2 sent, 1 running; done: 1 crash, 5 success",
        "pilots  2 ready",
        "cores   4 of 16 busy",
    ]
    counted = STATUS | {"bytes_received": 1_200_000_000, "bytes_sent": 0}
    assert lines(Look(counted, [], {"active": False}))[4] == "tunnels 1.2 GB received, 0 B sent"
    told = lines(Look(STATUS, [], SCALING, 12.345))
    assert told[1].endswith("5 success (12.3 /s)")
    assert told[4] == "scaling paused: no; `hpcq autoscale set` resumes it (slurm)"


def test_who_is_listed_first():
    pilots = [
        {"name": "a", "job_id": "1", "state": "gone"},
        {"name": "b", "job_id": "2", "state": "ready", "ends_at": 100.0, "cores": 4, "cores_busy": 1, "tasks_done": 7},
        {"name": "c", "job_id": "3", "state": "failed", "failed_layer": "tun", "message": "no\x1b[1m device"},
    ]
    rows = listed(pilots, 40.0)
    assert [row[0] for row in rows] == ["3", "2", "1"]
    assert rows[1] == ("2", "ready", "-", "-", "1/4", "-", "-", "0:01:00", "7", "-")
    assert len(listed(pilots * 100, 0.0)) == ROWS
