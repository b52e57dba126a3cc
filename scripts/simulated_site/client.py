"""How tests and the demo reach the hosts of the site they run in.

Needs nothing but the standard library. Works for root of the site (the command `scripts/site run` starts); the
ordinary user of the site cannot enter other hosts, as on a real one.

    site = Site.load()
    site.run("cn1", ["hostname"]).stdout
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulated_site.errors import SiteError

VARIABLE = "HPCQ_SIMULATED_SITE"
RUN_DEADLINE = 180.0
USER_PATH = "/usr/local/bin:/usr/bin:/bin"  # what login gives an ordinary user on Debian: no sbin


@dataclass(frozen=True)
class Site:
    """The site this process is in. `description` is what `site.json` holds."""

    description: dict[str, Any]

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Site:
        """The site named by HPCQ_SIMULATED_SITE; `SiteError` outside one."""
        found = path or os.environ.get(VARIABLE)
        if not found:
            raise SiteError(f"not inside a simulated site ({VARIABLE} is not set): start with scripts/site run -- …")
        try:
            return cls(json.loads(Path(found).read_text()))
        except (OSError, ValueError) as error:
            raise SiteError(f"cannot read the description of the site, {found}: {error}") from error

    @property
    def hosts(self) -> dict[str, dict[str, Any]]:
        """Per host: `pid` of its holder, `address`, `compute`."""
        return dict(self.description["hosts"])

    @property
    def user(self) -> str:
        """Name of the ordinary user."""
        return str(self.description["user"]["name"])

    @property
    def home(self) -> Path:
        """Home of the ordinary user, shared by all hosts."""
        return Path(self.description["user"]["home"])

    @property
    def scratch(self) -> Path:
        """A directory shared by all hosts in which everybody may write."""
        return Path(self.description["scratch"])

    @property
    def slurm(self) -> bool:
        """Whether Slurm runs here."""
        return bool(self.description["slurm"])

    @property
    def xrootd_url(self) -> str:
        """Prefix of the exported files, with the slash."""
        return str(self.description["xrootd_url"])

    @property
    def left_out(self) -> dict[str, str]:
        """What this site lacks, and why."""
        return dict(self.description["left_out"])

    def environment(self, user: bool, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """A login environment for the user; the caller's own, with the site's variables, for root."""
        tools = str(Path(self.description["python"]).parent)
        if user:
            identity = {"HOME": str(self.home), "USER": self.user, "LOGNAME": self.user, "SHELL": "/bin/bash"}
            base = identity | {"PATH": f"{tools}:{USER_PATH}", "LANG": "C.UTF-8"}
            base |= {key: os.environ[key] for key in ("TERM", "COLUMNS", "LINES", "NO_COLOR") if key in os.environ}
        else:
            base = dict(os.environ) | {"PATH": f"{tools}:{os.environ.get('PATH', USER_PATH)}:/usr/sbin:/sbin"}
            base["PYTHONPATH"] = self.description["scripts"]
        base |= {VARIABLE: self.description["path"], "HPCQ_PYTHON": self.description["python"]}
        if self.slurm:
            base["SLURM_CONF"] = self.description["slurm_conf"]
        return base | dict(extra or {})

    def command(self, host: str, argv: Sequence[str], *, user: bool = True, cwd: str | None = None) -> list[str]:
        """The argv that runs `argv` on `host`; one process from first to last, so that signals arrive."""
        if host not in self.hosts:
            raise SiteError(f"no host {host!r} in this site; there are {', '.join(self.hosts)}")
        enter = ["nsenter", f"--target={self.hosts[host]['pid']}", "--mount", "--net", "--uts", "--"]
        where = cwd or (str(self.home) if user else "/")
        into = ["/bin/sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", where]
        return [*enter, *(self._as_user() if user else []), *into, *argv]

    def _as_user(self) -> list[str]:
        ids = self.description["user"]
        if self.description["root"]:
            return ["setpriv", f"--reuid={ids['uid']}", f"--regid={ids['gid']}", "--init-groups", "--"]
        return ["unshare", "--user", f"--map-user={ids['uid']}", f"--map-group={ids['gid']}", "--"]

    def popen(
        self,
        host: str,
        argv: Sequence[str],
        *,
        user: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start `argv` on `host` in a session of its own (`options` as for `subprocess.Popen`)."""
        settings: dict[str, Any] = {"start_new_session": True} | options
        command = self.command(host, argv, user=user, cwd=cwd)
        return subprocess.Popen(command, env=self.environment(user, env), **settings)

    def run(
        self,
        host: str,
        argv: Sequence[str],
        *,
        user: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float = RUN_DEADLINE,
        check: bool = False,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` on `host` to its end and capture what it prints.

        After `timeout` seconds its whole process group is killed and `subprocess.TimeoutExpired` raised. With
        `check`, a status other than 0 raises `SiteError` with what the command wrote.
        """
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(host, argv, user=user, env=env, cwd=cwd, text=True, **pipes) as process:
            try:
                out, err = process.communicate(stdin, timeout=timeout)
            except BaseException:
                kill_group(process)
                raise
        if check and process.returncode:
            raise SiteError(f"{' '.join(argv)} on {host} ended with {process.returncode}: {err.strip() or out}")
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """End the session `popen` started, at once, and reap its leader."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
