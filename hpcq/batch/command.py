"""The one place that runs a batch system's commands.

A command gets an argv (never a shell), the C locale so that its messages can be recognised (but for those whose
environment becomes a job's), no terminal, a time limit and a bound on its output. It runs in its own session, so that
Ctrl-C does not cut a submission in two (see ``interrupts``); when its time is up, everything it started is killed. What
its output means is its caller's business.

Failures: ``BatchError`` when the command is not there, cannot be started, does not end in time or prints
without end. A non-zero exit status is a result, not a failure.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, cast

from hpcq.batch.text import last_lines
from hpcq.errors import BatchError

COMMAND_TIME_LIMIT = 60.0
"""Seconds. Slurm's own message timeout is 10 s, with retries; a hung server would hold a command for ever."""
OUTPUT_LIMIT = 64 * 2**20
"""Bytes of output: a listing of 100 000 jobs of Slurm fits, or of 20 000 of PBS, which says 2 KB of each."""
REAP_TIME_LIMIT = 5.0
"""Seconds that a killed command gets to be reaped (one stuck in a dead file system is left to the kernel)."""


_PREFIX = re.compile(r"^'?[a-z]+: (?:error|fatal): |^q[a-z]+: ")
"""What the lines begin with in which Slurm's or PBS's commands say what is wrong."""


class NoAnswerError(BatchError):
    """A command took longer than its time limit. What it was to do may have been done all the same."""


@dataclass(frozen=True)
class CommandResult:
    """What a command did: its argv, exit status (-N for signal N), standard output and standard error."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


class CommandRunner:
    """Runs commands of the batch system; each program is looked up on PATH once."""

    def __init__(self, *, time_limit: float = COMMAND_TIME_LIMIT, output_limit: int = OUTPUT_LIMIT) -> None:
        self.time_limit = time_limit
        self.output_limit = output_limit
        self._found: dict[str, str] = {}

    def find(self, program: str) -> str:
        """Return the path of ``program``.

        Raises:
            BatchError: not on PATH; says which host this is and what works without a batch system.
        """
        if program not in self._found:
            path = shutil.which(program)
            if path is None:
                raise BatchError(
                    f"{program} not found on {socket.gethostname()}; is this a login node? "
                    "`--batch local` needs no batch system"
                )
            self._found[program] = path
        return self._found[program]

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        keep_variable: Callable[[str], bool] = lambda name: True,
        keep_locale: bool = False,
    ) -> CommandResult:
        """Run ``argv`` to its end and return what it did.

        ``keep_variable`` says which environment variables the command may see (many change what it does). With
        ``keep_locale`` it gets the caller's locale, not C: what submits a job hands it its environment.

        Raises:
            BatchError: see the module.
        """
        environment = {name: value for name, value in os.environ.items() if keep_variable(name)}
        if not keep_locale:
            environment["LC_ALL"] = "C"
        try:
            with tempfile.TemporaryFile() as source:
                # A file, not a pipe: a command that never reads it cannot make us wait.
                source.write(stdin.encode())
                source.seek(0)
                process = self._start(argv, environment, source)
                try:
                    stdout, stderr = self._collect(argv[0], process)
                finally:
                    _kill_session(process)
                    _close_outputs(process)
        except OSError as error:  # no descriptor left, or the disk of temporary files is full
            raise BatchError(f"{argv[0]} cannot be run on {socket.gethostname()}: {error}") from error
        return CommandResult(tuple(argv), process.returncode, stdout, stderr)

    def _start(self, argv: Sequence[str], environment: dict[str, str], source: IO[bytes]) -> subprocess.Popen[bytes]:
        path = self.find(argv[0])
        try:
            return subprocess.Popen(
                [path, *argv[1:]],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise BatchError(f"{path} cannot be started on {socket.gethostname()}: {error}") from error

    def _collect(self, program: str, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        """Read both outputs until the command has ended.

        The end of the process counts, not the end of its output: some batch clients leave a helper behind
        that keeps the pipes open for a minute.
        """
        outputs = {stream.fileno(): bytearray() for stream in _outputs(process)}
        deadline = time.monotonic() + self.time_limit
        with selectors.DefaultSelector() as selector, _exit_descriptor(process.pid) as ended:
            for descriptor in outputs:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            if ended is not None:
                selector.register(ended, selectors.EVENT_READ)
            while any(descriptor in selector.get_map() for descriptor in outputs):
                ready = [key.fd for key, _ in selector.select(max(0.0, deadline - time.monotonic()))]
                for descriptor in outputs.keys() & set(ready):
                    if not _read_available(descriptor, outputs[descriptor], self.output_limit + 1):
                        selector.unregister(descriptor)
                self._check_size(program, outputs)
                if ended in ready:
                    for descriptor, data in outputs.items():
                        _read_available(descriptor, data, self.output_limit + 1)
                    break
                self._check_time(program, deadline)
        self._check_size(program, outputs)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.returncode is None:
            raise self._too_slow(program)
        stdout, stderr = outputs.values()
        return _text(stdout), _text(stderr)

    def _check_size(self, program: str, outputs: dict[int, bytearray]) -> None:
        if sum(map(len, outputs.values())) > self.output_limit:
            raise BatchError(
                f"{program} on {socket.gethostname()} printed more than {self.output_limit} bytes; stopped it"
            )

    def _check_time(self, program: str, deadline: float) -> None:
        if time.monotonic() >= deadline:
            raise self._too_slow(program)

    def _too_slow(self, program: str) -> NoAnswerError:
        return NoAnswerError(
            f"{program} on {socket.gethostname()} did not answer within {self.time_limit:g} s; "
            "the batch system may be overloaded or down: try again later"
        )


@contextlib.contextmanager
def _exit_descriptor(pid: int) -> Iterator[int | None]:
    """Give a descriptor that becomes readable when ``pid`` ends, or None on kernels before 5.3."""
    try:
        descriptor = os.pidfd_open(pid)
    except (OSError, AttributeError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_available(descriptor: int, into: bytearray, limit: int) -> bool:
    """Read what is there, up to ``limit`` in all; False at the end of the stream."""
    while len(into) < limit:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return True
        if not data:
            return False
        into += data
    return True


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill and reap a command that is still running, with whatever it started in its process group.

    One that ended by itself is left alone, with the helpers it meant to leave behind.
    """
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(REAP_TIME_LIMIT)


def _outputs(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Return the two pipes, which are there because they were asked for."""
    return cast("IO[bytes]", process.stdout), cast("IO[bytes]", process.stderr)


def _close_outputs(process: subprocess.Popen[bytes]) -> None:
    for stream in _outputs(process):
        stream.close()


def _text(data: bytearray) -> str:
    return data.decode("utf-8", errors="replace")


def refusal(result: CommandResult, where: str = "") -> BatchError:
    """Return the error for a failed command, in its own words; all it printed is in the error's notes."""
    program = result.argv[0]
    lines = [line.strip() for line in (result.stderr + "\n" + result.stdout).splitlines() if line.strip()]
    said = [_PREFIX.sub("", line) for line in lines if _PREFIX.match(line)] or lines[-3:]
    message = "; ".join(last_lines("\n".join(said), 4)) or f"exit status {result.status} and no message"
    place = ", ".join(filter(None, (f"host {socket.gethostname()}", where)))
    error = BatchError(f'{program} refused: "{message}" ({place})')
    error.add_note(f"command: {shlex.join(result.argv)}\nexit status: {result.status}\n" + "\n".join(lines))
    return error
