"""The way to a compute node and back: a queue of its own, one short pilot, one task on the node's own network.

States: *submitted* → *ready* (now credentials are issued: they are good for an hour, a queue may take longer) →
*looked* → *left* (credentials revoked, job cancelled). However it ends, `Trip.run` leaves by the same way out; what the
batch system still lists then is the caller's to wait for (``jobs``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from hpcq.batch.base import BatchJob, get_batch_system
from hpcq.doctor.node import BRING_UP, PROBE, look
from hpcq.doctor.report import MODES, TUNNELS, Findings, compare_clocks
from hpcq.errors import BatchError, HpcqError, PilotFailedError
from hpcq.queue import Queue
from hpcq.task import PythonTask
from hpcq.units import format_duration
from vpn import GatewayClient, VpnError

LOOK = 1.0
"""Seconds between looks whether the job can still bring a pilot."""
EXAMINE = 60.0
"""Seconds that looking at a node takes at most, before its tunnels."""


class Unseen(HpcqError):  # noqa: N818 - a finding, told in the report
    """No compute node was seen; says why."""


class Trip:
    """One trip. ``say`` is told what goes on; ``untried`` says why a mode was not tried."""

    def __init__(
        self, batch: str, options: Mapping[str, Any], modes: Sequence[str], say: Callable[[str], None]
    ) -> None:
        self.batch = batch
        self.options = options
        self.modes = modes
        self.say = say
        self.queue = ""
        self.jobs: list[BatchJob] = []
        self.waited = 0.0
        self.untried: dict[str, str] = {}

    def run(self, gateway: GatewayClient | None, targets: Sequence[str], timeout: float) -> Findings:
        """Go there, look, and come back; waits ``timeout`` seconds for the pilot to start.

        Raises:
            Unseen: the job did not start in time, or its pilot could not serve, or died.
            UsageError, TemplateError: options that cannot be used.
            BatchError: the batch system refused.
        """
        with Queue() as queue:
            self.queue = queue.name
            self.jobs = queue.submit_pilots(1, batch=self.batch, **self.options)
            self.say(f"job {self.jobs[0].id} is submitted to {self.batch}; it has {format_duration(timeout)} to start")
            began = time.monotonic()
            self._await_pilot(queue, began + timeout)
            self.waited = time.monotonic() - began
            with self._credentials(gateway) as credentials:
                self.say("the pilot is there: looking, and bringing tunnels up")
                return self._ask(queue, credentials, targets)

    def _await_pilot(self, queue: Queue, deadline: float) -> None:
        while True:
            left = deadline - time.monotonic()
            try:
                if queue.wait_for_pilots(1, max(0.0, min(LOOK, left))):
                    return
            except PilotFailedError as error:
                raise Unseen(str(error)) from error
            why = queue.why_deserted()
            # Between two waits; and after it is known that the job has ended: what its pilot said is there by then.
            failed = next((pilot for pilot in queue.pilots() if pilot.failed_layer), None)
            if failed is not None:
                raise Unseen(f"its pilot on {failed.hostname} cannot serve ({failed.failed_layer}): {failed.message}")
            if why:
                raise Unseen(f"its batch job ended before its pilot was ready: {why}")
            if left <= 0:
                raise Unseen(self._still_waiting())

    def _still_waiting(self) -> str:
        job = self.jobs[0]
        try:
            status = get_batch_system(self.batch).status([job])[job.id]
            state = f"{status.state.value} ({status.reason})" if status.reason else status.state.value
        except BatchError as error:
            state = f"in a state that is not known ({error})"
        return (
            f"job {job.id} is still {state}, and no pilot has come from it; wait longer with --timeout, "
            "or choose another --partition, --account or --qos"
        )

    @contextmanager
    def _credentials(self, gateway: GatewayClient | None) -> Iterator[dict[str, bytes]]:
        """One for each mode that needs one, revoked at the end."""
        issued: dict[str, str] = {}
        known: dict[str, bytes] = {}
        try:
            if gateway is not None:
                for mode in [mode for mode in self.modes if mode in TUNNELS]:
                    try:
                        credential = gateway.issue(f"hpcq doctor, mode {mode}")
                    except VpnError as error:
                        self.untried[mode] = f"no credential: {error}"
                        continue
                    issued[mode], known[mode] = credential.username, credential.to_bytes()
            yield known
        finally:
            for username in issued.values():
                assert gateway is not None
                with suppress(VpnError):
                    gateway.revoke(username)

    def _ask(self, queue: Queue, credentials: dict[str, bytes], targets: Sequence[str]) -> Findings:
        limit = EXAMINE + len(MODES) * (BRING_UP + (PROBE if targets else 0))
        task = PythonTask(look, credentials, list(self.modes), list(targets))
        sent = time.time()
        queue.submit(task.set(network="host", isolation="fresh", walltime=limit, retries=0))
        deadline = time.monotonic() + 2 * limit
        while queue.wait(LOOK) is None:
            why = queue.why_deserted()
            if why or time.monotonic() > deadline:
                raise Unseen(f"the pilot went away while it looked: {why or 'nothing more was heard of it'}")
        if task.outcome != "success":
            detail = str(task.exception or task.message or task.std_error)
            raise Unseen(f"looking at {task.hostname or 'the node'} ended as {task.outcome}: {detail}")
        found = msgspec.json.decode(task.output, type=Findings)
        return found.with_checks(compare_clocks(sent, found, time.time()))
