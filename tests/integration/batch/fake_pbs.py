"""qsub, qstat, qdel and qrerun as an OpenPBS 23.06 server answered them: its messages, exit statuses, ids and JSON.

Run as a program under one of these names; ``FAKE_PBS`` is the directory of the server's state. Time is the number in
``now``: a test moves it. A job starts ``start_after`` seconds after its submission while ``slots`` allow, ends by
itself after ``runs`` seconds with ``exit``, and is dead ten seconds after a qdel. ``down``, ``hang`` and ``banner`` are
the server's and the site's moods; without ``history`` ended jobs are forgotten.
"""

import fcntl
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

USAGE = "usage: qsub [-a date_time] [-A account_string] [-c interval]\n\t[-C directive_prefix] …\n       qsub --version"
KILL_DELAY = 10
DEFAULTS = {
    "now": 0, "next": 0, "jobs": {}, "slots": 4, "start_after": 0, "runs": None, "exit": 0, "history": True,
    "down": False, "hang": [], "banner": False, "broken_json": False, "max_array": 10000, "per_user": None,
    "disabled": [], "forbidden": [], "max_walltime": None,
}  # fmt: skip


class RefusedError(Exception):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def walltime(text: str) -> int:
    parts = text.split(":")
    if not all(part.isdecimal() for part in parts):
        raise RefusedError("qsub: Illegal attribute or resource value Resource_List.walltime", 166)
    return sum(int(part) * 60**place for place, part in enumerate(reversed(parts)))


# --- the server ---


def advance(state):
    """What has happened by now."""
    for job in state["jobs"].values():
        subs = job["subs"] if job["array"] else [job]
        for sub in subs:
            step(state, sub)
        if job["array"] and all(sub["state"] == "F" for sub in subs):
            job["state"] = "F"
        elif job["array"] and any(sub["state"] != "Q" for sub in subs):
            job["state"] = "B"


def step(state, job):
    now = state["now"]
    running = sum(sub["state"] == "R" for one in state["jobs"].values() for sub in one["subs"] or [one])
    due = now >= job["submitted"] + state["start_after"]
    if job["state"] == "Q" and due and running < state["slots"] and not job["reason"]:
        job.update(state="R", started=now, host=f"n{running + 1}")
    if job["state"] != "R":
        return
    if job["killed"] is not None and now >= job["killed"] + KILL_DELAY:
        finish(job, 91, 271, "terminated by alice@pbs1")
    elif job["walltime"] and now >= job["started"] + job["walltime"] + KILL_DELAY:
        finish(job, 93, -29, "exceeded resource walltime")
    elif state["runs"] is not None and now >= job["started"] + state["runs"]:
        code = state["exit"]
        finish(job, 92 if code == 0 else 93, code, "finished" if code == 0 else "failed")


def finish(job, substate, code, how):
    job.update(state="F", substate=substate, exit=code, end=how)


# --- qsub ---

FLAGS = {"f": 0, "h": 0, "V": 0, "z": 0, "I": 0, "J": 1, "N": 1, "A": 1, "q": 1, "l": 1, "j": 1, "o": 1, "e": 1, "m": 1,
         "M": 1, "r": 1, "k": 1, "W": 1, "P": 1, "S": 1, "p": 1, "v": 1}  # fmt: skip


def options(words):
    """qsub's options and what is left over."""
    found, position = [], 0
    while position < len(words) and words[position].startswith("-"):
        word = words[position]
        if word[1:2] not in FLAGS:
            raise RefusedError(f"qsub: invalid option -- '{word[1:2]}'\n{USAGE}", 2)
        if FLAGS[word[1]] and len(word) == 2:
            position += 1
            found.append((word[1], words[position]))
        else:
            found.append((word[1], word[2:]))
        position += 1
    return found, words[position:]


def directives(text):
    found = []
    for line in text.splitlines():
        if line.startswith("#PBS"):
            own, rest = options(shlex.split(line[4:]))
            if rest:
                raise RefusedError(f"qsub: directive error: {line[4:]}", 2)
            found += own
        elif line.strip() and not line.startswith("#"):
            break
    return found


def qsub(state, argv):
    given, rest = options(argv)
    if len(rest) != 1:
        raise RefusedError(USAGE, 2)
    if not Path(rest[0]).is_file():
        raise RefusedError("qsub: script file:: No such file or directory", 1)
    script = Path(rest[0]).read_text()
    chosen = {}
    resources = {}
    for name, value in [*directives(script), *given]:
        chosen[name] = value
        if name == "l":
            resources.update(part.partition("=")[::2] for part in value.split(",") if part)
    check_options(chosen)
    check_resources(resources)
    check_queue(state, chosen.get("q", "workq"), resources)
    number = state["next"]
    state["next"] += 1
    array = chosen.get("J")
    indexes = range(int(array.split("-")[0]), int(array.split("-")[1]) + 1) if array else ()
    if len(indexes) > state["max_array"]:
        raise RefusedError("qsub: Array job exceeds server or queue size limit", 3)
    job_id = f"{number}[].pbs1" if array else f"{number}.pbs1"
    limit = walltime(resources["walltime"]) if "walltime" in resources else None
    name = chosen.get("N", Path(rest[0]).name)

    def new(own):
        return {
            "id": own, "name": name, "state": "Q", "submitted": state["now"], "killed": None, "walltime": limit,
            "substate": 10, "exit": None, "end": "", "host": "", "array": False, "subs": [], "output": chosen.get("o"),
            "reason": "", "queue": chosen.get("q", "workq"),
        }  # fmt: skip

    job = new(job_id)
    job["array"] = bool(array)
    job["subs"] = [new(f"{number}[{index}].pbs1") for index in indexes]
    if int(re.search(r"ncpus=(\d+)", resources.get("select", "ncpus=1"))[1]) > 32:
        for one in [job, *job["subs"]]:
            one["reason"] = "Can Never Run: Insufficient amount of resource: ncpus (R: 64 A: 8 T: 8)"
    state["jobs"][job_id] = job
    print(job_id)


def check_options(chosen):
    name = chosen.get("N", "x")
    if re.search(r"\s", name):
        raise RefusedError(f"qsub: illegal -N value\n{USAGE}", 2)
    if len(name) > 230:
        raise RefusedError("qsub: Job name is too long ", 2)
    array = re.fullmatch(r"(\d+)-(\d+)", chosen.get("J", "0-1"))
    if array is None or int(array[1]) >= int(array[2]):
        raise RefusedError(f"qsub: illegal -J value\n{USAGE}", 2)


def check_resources(resources):
    known = {"select", "place", "walltime", "ncpus", "mem", "nodes", "software"}
    for name in resources:
        if name not in known:
            raise RefusedError(f"qsub: Unknown resource Resource_List.{name}", 187)
    if "select" in resources and {"ncpus", "mem"} & resources.keys():
        raise RefusedError(
            'qsub: "-lresource=" cannot be used with "select" or "place", resource is: '
            + sorted({"ncpus", "mem"} & resources.keys())[-1],
            5,
        )
    for part in resources.get("select", "1").split(":")[1:]:
        name, _, value = part.partition("=")
        if name not in {"ncpus", "mem", "ngpus", "mpiprocs", "model"}:
            raise RefusedError(f"qsub: Unknown resource: {name}", 187)
        if name == "ncpus" and not value.isdecimal():
            raise RefusedError("qsub: Illegal attribute or resource value select.ncpus", 166)


def check_queue(state, queue, resources):
    if queue not in {"workq", "short", "priv"}:
        raise RefusedError("qsub: Unknown queue", 170)
    if queue in state["disabled"]:
        raise RefusedError("qsub: Queue is not enabled", 173)
    if queue in state["forbidden"]:
        raise RefusedError("qsub: Unauthorized Request ", 159)
    if state["max_walltime"] and walltime(resources.get("walltime", "0")) > state["max_walltime"]:
        raise RefusedError("qsub: Job violates queue and/or server resource limits", 188)
    waiting = sum(job["state"] != "F" for job in state["jobs"].values())
    if state["per_user"] is not None and waiting >= state["per_user"]:
        raise RefusedError("qsub: would exceed queue generic's per-user limit", 38)


# --- qstat ---


def find(state, name, finished=True):
    """The job or subjob of an id, with or without the server's name."""
    full = name if name.endswith(".pbs1") else f"{name}.pbs1"
    if not re.match(r"\d", name):
        raise RefusedError(f"qstat: Unknown queue destination {name}", 170)
    found = {sub["id"]: sub for job in state["jobs"].values() for sub in [job, *job["subs"]]}.get(full)
    if found is None or (found["state"] == "F" and not state["history"]):
        raise RefusedError(f"Unknown Job Id {full}", 153)
    if found["state"] == "F" and not finished:
        raise RefusedError(f"{full} Job has finished, use -x or -H to obtain historical job information", 35)
    return found


def qstat(state, argv):
    history, arrays, full, as_json = (flag in argv for flag in ("-x", "-t", "-f", "json"))
    if history and not state["history"]:
        raise RefusedError("qstat: PBS is not configured to maintain job history", 1)
    status, shown = 0, []
    for name in [word for word in argv if not word.startswith("-") and word != "json"]:
        try:
            job = find(state, name, finished=history)
        except RefusedError as error:
            print(f"qstat: {error}", file=sys.stderr)
            status = error.status
            continue
        shown += [job, *(job["subs"] if arrays else [])]
    if as_json:
        print_json(state, shown)
    elif full:
        for job in shown:
            print_text(state, job)
    return status


def comment(job):
    if job["state"] == "Q":
        return job["reason"] or "Not Running: Not enough free nodes available"
    if job["state"] == "F" and not job["host"]:
        return "Not Running: Not enough free nodes available and terminated"
    ran = (
        "Job Array Began at Sun Nov 22 at 17:06"
        if job["array"]
        else f"Job run at Sun Nov 22 at 17:02 on ({job['host']}:ncpus=1)"
    )
    return f"{ran} and {job['end']}" if job["end"] else ran


def attributes(state, job):
    letter = job["state"]
    if letter == "F" and "[" in job["id"] and not job["array"]:
        parent = state["jobs"][re.sub(r"\[\d+\]", "[]", job["id"])]
        letter = "F" if parent["state"] == "F" else "X"
    told = {"Job_Name": job["name"], "Job_Owner": "alice@pbs1", "job_state": letter, "queue": job["queue"]}
    if job["host"]:
        told |= {"exec_host": f"{job['host']}/0*8", "exec_vnode": f"({job['host']}:ncpus=8)"}
    told |= {"substate": 42 if letter == "R" else job["substate"], "comment": comment(job)}
    if job["exit"] is not None:
        told["Exit_status"] = job["exit"]
    if job["array"]:
        told["Exit_status"] = 1
    return told


def print_json(state, shown):
    """As qstat writes it: by hand, with tabs; what looks like a number loses its quotes."""
    lines = ["{", '\t"timestamp":\t1795367182,', '\t"pbs_version":\t"23.06.06",']
    lines.append('\t"pbs_server":\t"pbs1"' + ("," if shown else ""))
    blocks = []
    for job in shown:
        own = [f'\t\t\t"{name}":\t{plain(value)}' for name, value in attributes(state, job).items()]
        variables = (
            '\t\t\t"Variable_List":\t{\n\t\t\t\t"Q":\t"it\\\\\'s \\\\\\"q\\\\\\"",\n\t\t\t\t"NUM":\t100000\n\t\t\t}'
        )
        if state["broken_json"]:
            variables = '\t\t\t"Variable_List":\t{\n\t\t\t\t"Q":\t"it"s",\n\t\t\t}'
        blocks.append(f'\t\t"{job["id"]}":\t{{\n' + ",\n".join([*own, variables]) + "\n\t\t}")
    if shown:
        lines += ['\t"Jobs":\t{', ",\n".join(blocks), "\t}"]
    print("\n".join([*lines, "}"]))


def plain(value):
    text = str(value)
    try:
        number = float(text)
    except ValueError:
        return json.dumps(text)
    return str(int(number)) if number == int(number) else text


def print_text(state, job):
    print(f"Job Id: {job['id']}")
    for name, value in attributes(state, job).items():
        print(f"    {name} = {value}")
    print("    Variable_List = PBS_O_HOME=/home/alice,PBS_O_LANG=C.UTF-8,")
    print("\tPBS_O_LOGNAME=alice,NL=l1\nl2,job_state = F\n")


# --- qdel ---


def qdel(state, argv):
    status = 0
    for name in argv:
        ranged = re.fullmatch(r"(\d+)\[(\d+)-(\d+)\](?:\.pbs1)?", name)
        names = [name]
        if ranged:
            names = [f"{ranged[1]}[{index}]" for index in range(int(ranged[2]), int(ranged[3]) + 1)]
        for one in names:
            try:
                delete(state, find(state, one), ranged is not None)
            except RefusedError as error:
                print(f"qdel: {error}", file=sys.stderr)
                status = error.status
    return status


def delete(state, job, of_range):
    if job["state"] == "F":
        if not of_range:
            raise RefusedError(f"Job has finished {job['id']}", 35)
        return
    for one in job["subs"] or [job]:
        if one["state"] == "Q":
            finish(one, 91, None, "terminated")
        elif one["state"] == "R" and one["killed"] is None:
            one["killed"] = state["now"]


def qrerun(state, argv):
    """As an operator's, or as the server does it by itself when a node fails: back into the queue under the same id."""
    for name in argv:
        job = find(state, name)
        if job["state"] != "R":
            raise RefusedError(f"qrerun: Request invalid for state of job {job['id']}", 168)
        job.update(state="Q", host="", submitted=state["now"])


# --- the program ---


def main():
    home = Path(os.environ["FAKE_PBS"])
    name, argv = Path(sys.argv[0]).name, sys.argv[1:]
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = {**DEFAULTS, **json.loads((home / "state.json").read_text())}
        with (home / "calls").open("a") as calls:
            calls.write(json.dumps({"argv": [name, *argv], "environment": dict(os.environ)}) + "\n")
        if name in state["hang"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.pause()
        if state["banner"]:
            print("*** Welcome. 4711 nodes; 12.pbs1 was yesterday's record ***")
            print("Warning: your home is 99% full", file=sys.stderr)
        status = answer(name, argv, state)
        if state["banner"]:
            print("Bye.")
        (home / "state.json").write_text(json.dumps(state))
    sys.exit(status)


def answer(name, argv, state):
    if state["down"]:
        print("Connection refused", file=sys.stderr)
        where = (
            "Couldn't connect to cluster: pbs1"
            if name == "qdel"
            else f"{name}: cannot connect to server pbs1 (errno=15010)"
        )
        print(where, file=sys.stderr)
        if "json" in argv:
            print_json(state, [])
        return 255 if name == "qstat" else 162
    advance(state)
    try:
        return {"qsub": qsub, "qstat": qstat, "qdel": qdel, "qrerun": qrerun}[name](state, argv) or 0
    except RefusedError as error:
        print(error, file=sys.stderr)
        return error.status


if __name__ == "__main__":
    main()
