"""Work Queue's own names (cctools, ``ndcctools.work_queue``): a script runs after changing its import line.

::

    import hpcq.work_queue as wq        # was: import ndcctools.work_queue as wq

    q = wq.WorkQueue(port=9123, name="analysis")
    with wq.Factory("slurm", manager=q) as workers:
        t = wq.Task("./sim 1 > out"); t.specify_input_file("sim"); t.specify_output_file("out-1", "out"); q.submit(t)
        while not q.empty():
            t = q.wait(5)

What cannot be honoured raises `NotImplementedError` that names it and says what to do instead; nothing is ignored.

=============================================== =======================================================================
name                                            here
=============================================== =======================================================================
**constants** ``WORK_QUEUE_…``                  all, with Work Queue's values
``Task(command)``                               a shell command; ``output`` holds standard output and error
``PythonTask(func, *args, **kwargs)``           in a warm interpreter; ``output`` is the value or the exception object,
                                                its remote traceback as ``__cause__``, else a `PythonTaskNoResult`
``RemoteTask``, ``specify_coprocess``,          refused: use ``PythonTask``
``remote_map``, ``…pair``, ``…tree_reduce``
``specify_command, _tag, _category, _priority`` as there
``specify_feature``                             features of pilots: ``host=NAME``, ``tunnel=MODE``
``specify_file, _input_file, _output_file``,    as there: outputs of a task that failed come back too, others when one
``_directory``                                  is missing; ``CACHE``, ``SYMLINK`` (a link to the node's cache, with
                                                ``CACHE``), ``FAILURE_ONLY``, ``SUCCESS_ONLY``; ``WATCH`` is refused
``specify_buffer, _url``                        as there; URLs ``http``, ``https`` and ``root``, through the tunnel
``specify_file_command``                        the command runs as a task of its own; with ``CACHE`` once for all
``specify_file_piece``                          of inputs; outputs refused
``specify_max_retries``                         as there; unless specified, a lost task is tried without end
``specify_cores, _memory, _disk, _gpus``        as there, but a task that asks for nothing gets one core, not a whole
                                                worker; memory and disk are limits also without monitoring
``specify_running_time(_max)``, ``_end_time``,  as there
``_start_time_min``
``specify_running_time_min``                    with a longer ``_max`` only
``specify_environment_variable``                as there; None unsets
``specify_algorithm``, ``_snapshot_file``,      refused (``SCHEDULE_UNSET`` is not)
``_monitor_output``, ``_environment`` (poncho)
``id tag category command result`` …            as there. ``return_status`` is 128 + N after signal N; ``result`` is
                                                ``SIGNAL`` when a function's process died, ``MAX_RETRIES`` when a task
                                                was lost too often
``exhausted_attempts``, ``app_delay``,          refused: not measured for each task
``send_input_…``, ``receive_output_…``,
``total_bytes_…``, ``total_transfer_time``
``resources_measured, _requested, _allocated``, ``memory disk cpu_time wall_time cores_avg start end``, and
``limits_exceeded``                             ``bytes_received bytes_sent`` (MB) if counted; others refused
``WorkQueue(port, name, shutdown, debug_log)``  as there; a range of ports too; ``ssl=True`` is always so; a key of
                                                your own, ``stats_log``, ``transactions_log`` and the status display
                                                are refused. ``hpcq_queue`` is the `hpcq.Queue` below
``submit wait wait_for_tag empty hungry``,      as there; tasks run also while the program is not in ``wait``
``cancel_by_taskid, _tasktag, _category``,
``task_state``
``map pair tree_reduce``                        as there, and what the function raises is raised; ``env`` is refused
``stats stats_hierarchy stats_category status`` the fields that are known; others are refused
``workers_summary``, ``shutdown_workers``,      as there
``block_host(_with_timeout)``,
``unblock_host``, ``blacklist…``
``specify_draining_by_hostname``                refused: use ``block_host``
``specify_category_mode``                       ``FIXED``, ``MAX``, ``MAX_THROUGHPUT``; others are refused
``specify_(category_)max_resources``, ``…min…`` cores, memory, disk, gpus; no minimum of memory or disk where learned
``specify_category_first_allocation_guess``     memory and disk
``specify_category_max_concurrent``             as there
``specify_category_autolabel_resource``,        refused
``initialize_categories``
``activate_fast_abort``                         slow tasks get a copy elsewhere and the first result counts;
                                                ``…_category`` is refused
``enable_monitoring``                           nothing to do; a directory, ``watchdog=False`` and ``…_full`` are
                                                refused
``specify_name``                                until a task or worker has come
``specify_password(_file)``                     nothing to do: a worker must have the queue's own key
``specify_min_taskid, _num_tasks_left``         as there
``specify_manager_mode``                        nothing to do, as there
``invalidate_cache_file``                       nothing to do: files are cached by content; a URL is refused
``tune``                                        ``hungry-minimum``, ``fast-abort-multiplier``; others are refused
``specify_algorithm, _task_order(LIFO)``,       refused
``_priority, _catalog_server, _log``,
``_transactions_log, _keepalive_…``,
``_manager_preferred_connection``,
``estimate_capacity``
``Factory(batch_type, manager…)``               hpcq's batch systems; ``min_workers max_workers workers_per_cycle
                                                tasks_per_worker timeout factory_timeout cores memory disk gpus
                                                batch_options scratch_dir python_env debug debug_file``; a worker has
                                                one core unless told otherwise; other attributes are refused
``cctools_debug_…``, ``set_debug_flag``,        Python's logging under ``hpcq`` and ``vpn``
``specify_debug_log``
``specify_port_range``                          as there
``work_queue_…`` (the C functions)              refused: use the classes
=============================================== =======================================================================
"""

from __future__ import annotations

from typing import Any

from hpcq.work_queue import constants
from hpcq.work_queue.constants import *  # noqa: F403 - all of them are public, as there
from hpcq.work_queue.constants import unsupported as _unsupported
from hpcq.work_queue.debug import (
    cctools_debug_config,
    cctools_debug_config_file,
    cctools_debug_config_file_size,
    cctools_debug_flags_set,
    cctools_version_string,
    set_debug_flag,
    specify_debug_log,
    specify_port_range,
)
from hpcq.work_queue.factory import Factory
from hpcq.work_queue.queue import WorkQueue
from hpcq.work_queue.tasks import PythonTask, PythonTaskNoResult, RemoteTask, Task

__version__ = cctools_version_string()

__all__ = [
    "Factory",
    "PythonTask",
    "PythonTaskNoResult",
    "RemoteTask",
    "Task",
    "WorkQueue",
    "cctools_debug_config",
    "cctools_debug_config_file",
    "cctools_debug_config_file_size",
    "cctools_debug_flags_set",
    "cctools_version_string",
    "set_debug_flag",
    "specify_debug_log",
    "specify_port_range",
]
__all__ += constants.__all__


def __getattr__(name: str) -> Any:
    if name.startswith(("work_queue_", "rmsummary", "cctools_")):
        _unsupported(f"{name}, a function of the C library,", "use WorkQueue, Task and Factory")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
