"""Work Queue's debug switches as Python's logging: everything goes through the loggers ``hpcq`` and ``vpn``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from hpcq.work_queue.constants import unsupported

LOGGERS = ("hpcq", "vpn")
FORMAT = "%(asctime)s %(process)d %(name)s %(levelname)s: %(message)s"

_handler: logging.Handler | None = None


def cctools_version_string() -> str:
    """The version of hpcq."""
    try:
        return version("hpcq")
    except PackageNotFoundError:  # run from a clone
        return "0"


def _send_to(handler: logging.Handler) -> None:
    global _handler  # noqa: PLW0603 - one debug log for the program, as in Work Queue
    handler.setFormatter(logging.Formatter(FORMAT))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if _handler is not None:
            logger.removeHandler(_handler)
        logger.addHandler(handler)
    if _handler is not None:
        _handler.close()
    _handler = handler


def cctools_debug_flags_set(flag: str) -> int:
    """Log in detail, whatever the flag (to standard error unless a file was named); ``clear``: no more. Returns 1."""
    if _handler is None:
        _send_to(logging.StreamHandler(sys.stderr))
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET if flag == "clear" else logging.DEBUG)
    return 1


def cctools_debug_config(name: str) -> None:
    """Nothing to do: each message names its module and process."""


def cctools_debug_config_file(path: str | None) -> None:
    """Write what is logged to this file; None or ``:stderr``: to standard error.

    Raises:
        OSError: it cannot be written.
    """
    to_terminal = path in (None, ":stderr")
    _send_to(logging.StreamHandler(sys.stderr) if to_terminal or path is None else logging.FileHandler(path))


def cctools_debug_config_file_size(size: int) -> None:
    """0 only: the file may grow without limit."""
    if size:
        unsupported("cctools_debug_config_file_size", "the debug log is not rotated; give the logger your own handler")


def set_debug_flag(*flags: str) -> None:
    """As `cctools_debug_flags_set` for each."""
    for flag in flags:
        cctools_debug_flags_set(flag)


def specify_debug_log(logfile: str) -> None:
    """Log everything to this file."""
    cctools_debug_config_file(logfile)
    set_debug_flag("all")


def specify_port_range(low_port: int, high_port: int) -> None:
    """The ports to be tried by queues that take any."""
    if low_port > high_port:
        raise TypeError(f"low_port {low_port} should be smaller than high_port {high_port}")
    os.environ["TCP_LOW_PORT"], os.environ["TCP_HIGH_PORT"] = str(low_port), str(high_port)


def port_range() -> Sequence[int]:
    """The ports to be tried by queues that take any; 0 alone leaves it to the system."""
    low = os.environ.get("WORK_QUEUE_LOW_PORT") or os.environ.get("TCP_LOW_PORT")
    high = os.environ.get("WORK_QUEUE_HIGH_PORT") or os.environ.get("TCP_HIGH_PORT")
    return range(int(low), int(high) + 1) if low and high else [0]
