"""What Work Queue lets a program specify for a whole queue. A part of `WorkQueue`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcq.work_queue import constants as c
from hpcq.work_queue.categories import Category, check_mode, check_resources
from hpcq.work_queue.constants import unsupported

if TYPE_CHECKING:
    import hpcq

TUNED_ELSEWHERE = {
    "resource-submit-multiplier": "pilots are sent tasks ahead as it pays",
    "min-transfer-timeout": "URL(timeout=…) of hpcq has a limit for each",
    "foreman-transfer-timeout": "there are no foremen",
    "transfer-outlier-factor": "slow transfers go on",
    "default-transfer-rate": "rates are not guessed",
    "keepalive-interval": "a pilot that is silent for 60 s is gone",
    "keepalive-timeout": "a pilot that is silent for 60 s is gone",
    "short-timeout": "messages have no time limits of their own",
    "long-timeout": "there are no foremen",
    "category-steady-n-tasks": "a category learns from 5 tasks on",
    "wait-for-workers": "call hpcq_queue.wait_for_pilots(count) before submitting",
    "attempt-schedule-depth": "all tasks are considered",
    "wait_retrieve_many": "results are always taken as they come",
    "wait-retrieve-many": "results are always taken as they come",
    "monitor-interval": "limits are looked at twice a second",
    "force-proportional-resources": "tasks get what they ask for",
    "hungry-minimum-factor": "it is 2",
}
"""Parameters of ``tune`` that are not honoured, and why."""


class Settings:
    """Methods that specify something."""

    _queue: hpcq.Queue
    _name: str | None
    _next_id: int
    _new_mode: int
    _categories: dict[str, Category]
    hungry_minimum: int
    tasks_left: int

    def _category(self, name: str) -> Category:
        raise NotImplementedError

    def _tell(self, category: Category) -> None:
        raise NotImplementedError

    def _reopen(self, name: str) -> None:
        raise NotImplementedError

    # --- categories ---

    def specify_category_mode(self, category: str | None, mode: int) -> int:
        """How tasks of a category get memory and disk that they do not ask for; None: of all that come later."""
        check_mode(mode)
        if category is None:
            self._new_mode = mode
            return 1
        one = self._category(category)
        before, one.mode = one.mode, mode
        try:
            self._tell(one)
        except BaseException:
            one.mode = before
            raise
        return 1

    def specify_category_autolabel_resource(self, category: str, resource: str, autolabel: bool) -> None:
        """Refused."""
        unsupported("specify_category_autolabel_resource", "a category that learns, learns memory and disk")

    def specify_category_max_resources(self, category: str, rmd: Mapping[str, Any]) -> None:
        """The most a task of the category gets; what it gets where it does not ask and nothing is learned."""
        self._category(category).max = check_resources("specify_category_max_resources", rmd)
        self._tell(self._category(category))

    def specify_category_min_resources(self, category: str, rmd: Mapping[str, Any]) -> None:
        """The least a task of the category gets that does not ask."""
        self._category(category).min = check_resources("specify_category_min_resources", rmd)
        self._tell(self._category(category))

    def specify_category_first_allocation_guess(self, category: str, rmd: Mapping[str, Any]) -> None:
        """Memory and disk of the first tasks of a category that learns."""
        allowed = ("memory", "disk")
        self._category(category).guess = check_resources("specify_category_first_allocation_guess", rmd, allowed)
        self._tell(self._category(category))

    def specify_max_resources(self, rmd: Mapping[str, Any]) -> None:
        """`specify_category_max_resources` of tasks without a category."""
        self.specify_category_max_resources("default", rmd)

    def specify_min_resources(self, rmd: Mapping[str, Any]) -> None:
        """`specify_category_min_resources` of tasks without a category."""
        self.specify_category_min_resources("default", rmd)

    def specify_category_max_concurrent(self, category: str, max_concurrent: int) -> None:
        """How many tasks of the category may be out at once; negative: any number."""
        self._category(category).max_concurrent = int(max_concurrent)

    def initialize_categories(self, filename: str, rm: Any) -> None:
        """Refused."""
        unsupported("initialize_categories", "use specify_category_first_allocation_guess")

    # --- stragglers, monitoring ---

    def activate_fast_abort(self, multiplier: float) -> int:
        """Tasks that run so many times longer than others of their category get a copy elsewhere; the first result
        counts. Less than 1: never. Returns 0 when activated."""
        active = multiplier >= 1
        self._queue.speculate(max(multiplier, 1 + 1e-9) if active else None)
        return 0 if active else 1

    def activate_fast_abort_category(self, name: str, multiplier: float) -> int:
        """Refused, but for the category ``default``."""
        if name == "default":
            return self.activate_fast_abort(multiplier)
        return unsupported("activate_fast_abort_category", "use activate_fast_abort, which goes by category already")

    def enable_monitoring(self, dirname: str | None = None, watchdog: bool = True) -> int:
        """Nothing to do: every task is measured and held to the memory and disk it asked for. Returns 1."""
        if dirname:
            unsupported("enable_monitoring(dirname)", "see task.resources_measured")
        if not watchdog:
            unsupported("enable_monitoring(watchdog=False)", "leave out specify_memory and specify_disk")
        return 1

    def enable_monitoring_full(self, dirname: str | None = None, watchdog: bool = True) -> int:
        """Refused."""
        return unsupported("enable_monitoring_full", "see task.resources_measured")

    # --- the queue ---

    def specify_name(self, name: str) -> None:
        """Another name; before tasks and workers have come."""
        if name != self._name:
            self._reopen(name)

    def specify_min_taskid(self, minid: int) -> int:
        """Number tasks from here on, if that is more; returns the next number."""
        self._next_id = max(self._next_id, int(minid))
        return self._next_id

    def specify_num_tasks_left(self, ntasks: int) -> None:
        """How many tasks will still be submitted: for a `Factory` of the same program."""
        self.tasks_left = max(0, int(ntasks))

    def specify_password(self, password: str) -> None:
        """Nothing to do: a worker is let in by the queue's own key only."""

    def specify_password_file(self, file: str) -> int:
        """The same, but the file must be there (OSError)."""
        Path(file).read_bytes()
        return 1

    def specify_manager_mode(self, mode: int) -> None:
        """Nothing to do, as in Work Queue."""

    specify_master_mode = specify_manager_mode

    def specify_algorithm(self, algorithm: int) -> None:
        """Refused, but for ``WORK_QUEUE_SCHEDULE_UNSET``."""
        if algorithm != c.WORK_QUEUE_SCHEDULE_UNSET:
            unsupported(f"specify_algorithm({algorithm})", "leave it out; the scheduler chooses among pilots itself")

    def specify_task_order(self, order: int) -> None:
        """First in, first out; the other order is refused."""
        if order != c.WORK_QUEUE_TASK_ORDER_FIFO:
            unsupported("specify_task_order(WORK_QUEUE_TASK_ORDER_LIFO)", "use specify_priority of the tasks")

    def tune(self, name: str, value: float) -> int:
        """``hungry-minimum`` and ``fast-abort-multiplier``; returns 0, or -1 for a name that Work Queue has not."""
        if name == "hungry-minimum":
            self.hungry_minimum = max(1, int(value))
        elif name == "fast-abort-multiplier":
            self.activate_fast_abort(value)
        elif name in TUNED_ELSEWHERE:
            unsupported(f"tune({name!r})", TUNED_ELSEWHERE[name])
        else:
            return -1
        return 0

    def specify_manager_preferred_connection(self, mode: str) -> None:
        """Refused."""
        unsupported("specify_manager_preferred_connection", "pilots try every address of the manager in turn")

    specify_master_preferred_connection = specify_manager_preferred_connection

    def specify_priority(self, priority: int) -> None:
        """Refused."""
        unsupported("WorkQueue.specify_priority", "workers belong to one queue; there is no catalog")

    def specify_catalog_server(self, hostname: str, port: int) -> None:
        """Refused."""
        unsupported("specify_catalog_server", "workers find the queue by its connection file")

    def specify_log(self, logfile: str) -> None:
        """Refused."""
        unsupported("specify_log", "see hpcq status --json")

    def specify_transactions_log(self, logfile: str) -> None:
        """Refused."""
        unsupported("specify_transactions_log", "see hpcq tasks --json")

    def specify_keepalive_interval(self, interval: float) -> None:
        """Refused."""
        unsupported("specify_keepalive_interval", TUNED_ELSEWHERE["keepalive-interval"])

    def specify_keepalive_timeout(self, timeout: float) -> None:
        """Refused."""
        unsupported("specify_keepalive_timeout", TUNED_ELSEWHERE["keepalive-timeout"])

    def estimate_capacity(self) -> None:
        """Refused."""
        unsupported("estimate_capacity", "hungry() says how many more tasks the workers could take")

    def invalidate_cache_file(self, local_name: Any) -> None:
        """Nothing to do: files are cached by their content, so a changed one is another one. Refused for a URL."""
        if "://" in str(local_name):
            unsupported(f"invalidate_cache_file({local_name!r})", "do not have a URL cached whose content changes")
