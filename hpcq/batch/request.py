"""From options by their names to what is asked of a batch system: the same for the command line and `Queue`. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcq import servers, state_dir
from hpcq.batch.base import PilotRequest
from hpcq.batch.environment import python_command
from hpcq.batch.pilot_command import pilot_argv
from hpcq.errors import UsageError
from hpcq.units import parse_duration, parse_memory
from vpn import (
    MODES,
    PROBE_INTERVAL,
    as_flag,
    check_honoured,
    check_mtu,
    check_probe_interval,
    gateway_names,
    make_cvmfs,
    split_networks,
    whole_image,
)
from vpn import UsageError as VpnUsageError

_SAME = ("nodes", "partition", "account", "qos", "constraint", "reservation", "exclusive", "mail", "job_name")
_LISTS = ("options", "modules", "setup", "epilogue")
_PILOT = ("environment", "vpn", "gateway", "require", "scratch", "cache_size", "manager_timeout", "drain_timeout")
_TUNNEL = ("direct", "mtu", "dtls", "tls", "probe_interval")
_CVMFS = ("cvmfs", "cvmfs_image", "cvmfs_proxy", "cvmfs_server", "cvmfs_key", "cvmfs_cache", "cvmfs_quota")
KNOWN = (
    "cores", "memory", "disk", "gpus", "walltime", *_SAME, *_LISTS, "template", "variables", "connection",
    *_PILOT, *_TUNNEL, *servers.OPTIONS, *_CVMFS,
)  # fmt: skip
"""The options of pilots, by name."""
_DRAIN_TIMEOUT = {"pbs": 7.0}
"""Seconds a pilot gives its running tasks after SIGTERM, where the batch system leaves it less time than it would
take: PBS sends SIGKILL after 10 s, unless the site has set another kill_delay.
"""
_TARGET = re.compile(r"(?:roots?|https?)://[^\s/]+\S*|cvmfs:[A-Za-z0-9][A-Za-z0-9._-]*")


def pilot_request(
    queue: str, batch: str, count: int, options: Mapping[str, Any], *, flags: bool = False
) -> PilotRequest:
    """What to ask of batch system ``batch``; options that are None are left out.

    ``flags`` makes errors name options as they are typed on the command line.

    Raises:
        UsageError: an unknown option or a value that cannot be used, by name.
    """
    unknown = sorted(set(options) - set(KNOWN))
    if unknown:
        raise UsageError(f"unknown pilot option {unknown[0]!r}; known are {', '.join(KNOWN)}")
    given = {name: value for name, value in options.items() if value is not None}

    def shown(name: str) -> str:
        return "--" + name.replace("_", "-") if flags else name

    def seconds(name: str) -> float | None:
        return parse_duration(given[name], name=shown(name)) if name in given else None

    walltime = seconds("walltime")
    memory_mb = parse_memory(given["memory"], name=shown("memory")) if "memory" in given else None
    disk_mb = parse_memory(given["disk"], name=shown("disk")) if "disk" in given else None
    walltime_s = None if walltime is None else int(walltime)
    cores = given.get("cores", 1)
    gpus = _count(given["gpus"], shown("gpus")) if "gpus" in given else None
    drain_timeout = seconds("drain_timeout")
    scratch = Path(given["scratch"]).absolute() if "scratch" in given else None
    environment = Path(given["environment"]) if "environment" in given else None
    inline = _inline(given, shown("connection"))
    argv = pilot_argv(
        None if inline else state_dir.connection_file(queue),
        batch=batch,
        cores=cores,
        memory_mb=memory_mb,
        disk_mb=disk_mb,
        gpus=gpus,
        walltime_s=walltime_s,
        gateway=servers.server_name(given, shown) or _gateways(given.get("gateway"), shown("gateway")),
        tunnel=_tunnel(given, shown, flags=flags),
        cvmfs=_cvmfs(given, scratch, shown),
        require=_targets(given.get("require", ()), shown("require")),
        scratch=scratch,
        python=python_command(environment, scratch),
        cache_mb=parse_memory(given["cache_size"], name=shown("cache_size")) if "cache_size" in given else None,
        manager_timeout_s=seconds("manager_timeout"),
        drain_timeout_s=_DRAIN_TIMEOUT.get(batch) if drain_timeout is None else drain_timeout,
    )
    texts: dict[str, Any] = {name: given[name] for name in _SAME if name in given}
    texts |= {name: _strings(given[name], shown(name)) for name in _LISTS if name in given}
    return PilotRequest(
        queue=queue,
        pilot_argv=argv,
        count=count,
        cores=cores,
        gpus=gpus,
        memory_mb=memory_mb,
        walltime_s=walltime_s,
        template=Path(given["template"]) if "template" in given else None,
        environment=given.get("variables", {}),
        inline=inline,
        **texts,
    )


def _inline(given: Mapping[str, Any], name: str) -> bool:
    how = given.get("connection", "file")
    if how not in ("file", "inline"):
        raise UsageError(f"{name} must be file or inline, not {how!r}")
    return bool(how == "inline")


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{name} must be a whole number of at least 0, not {value!r}")
    return value


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{name} must be a list of strings, not {value!r}")
    return tuple(value)


def _gateways(value: Any, name: str) -> str | None:
    """One name or several, as a pilot takes them: ``A,B``."""
    if value is None:
        return None
    text = value if isinstance(value, str) else ",".join(_strings(value, name))
    try:
        return ",".join(gateway_names(text))
    except VpnUsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _tunnel(given: Mapping[str, Any], shown: Callable[[str], str], *, flags: bool) -> tuple[str, ...]:
    """The tunnel's mode and settings as arguments of a pilot; raises UsageError for what the mode would ignore."""
    mode = given.get("vpn", "none")
    if mode not in MODES:
        raise UsageError(f"{shown('vpn')} {mode!r} is not a tunnel mode; known are {', '.join(MODES)}")
    for name in ("dtls", "tls"):
        if not isinstance(given.get(name, True), bool):
            raise UsageError(f"{shown(name)} must be true or false, not {given[name]!r}")
    mtu, direct = _count(given.get("mtu", 0), shown("mtu")), given.get("direct", ())
    interval = parse_duration(given.get("probe_interval", PROBE_INTERVAL), name=shown("probe_interval"))
    try:
        asked = {name: given[name] for name in (*_TUNNEL, "server") if name in given} | {"probe_interval": interval}
        check_honoured(mode, asked, as_flag if flags else lambda name, value: f"{name}={value!r}")
        check_mtu(mtu)
        check_probe_interval(interval)
        networks = split_networks([direct] if isinstance(direct, str) else _strings(direct, shown("direct")))
    except VpnUsageError as error:
        raise UsageError(str(error)) from None
    argv = ["--vpn", mode] if "vpn" in given else []
    argv += ["--direct", ",".join(networks)] if networks else []
    argv += ["--mtu", str(mtu)] if mtu else []
    argv += [as_flag("dtls", given["dtls"])] if "dtls" in given else []
    argv += ["--probe-interval", f"{interval:g}"] if interval != PROBE_INTERVAL else []
    return (*argv, *(["--no-tls"] if given.get("tls") is False else []))


def _cvmfs(given: Mapping[str, Any], scratch: Path | None, shown: Callable[[str], str]) -> str | None:
    """CVMFS settings as a pilot takes them; relative paths are taken from here."""
    names = ("image", "key", "server")
    lists = {name: _strings(given.get(f"cvmfs_{name}", ()), shown(f"cvmfs_{name}")) for name in names}
    quota = parse_memory(given["cvmfs_quota"], name=shown("cvmfs_quota")) if "cvmfs_quota" in given else None
    asked = given.get("cvmfs") or lists["image"]
    cache = Path(given["cvmfs_cache"]) if "cvmfs_cache" in given else scratch if asked else None
    try:
        settings = make_cvmfs(
            given.get("cvmfs"),
            images=[whole_image(image) for image in lists["image"]],
            proxy=given.get("cvmfs_proxy"),
            servers=lists["server"],
            keys=[str(Path(key).absolute()) for key in lists["key"]],
            cache=None if cache is None else str(cache.absolute()),
            quota=quota,
        )
    except VpnUsageError as error:
        raise UsageError(str(error)) from None
    return None if settings is None else settings.to_json()


def _targets(value: Any, name: str) -> tuple[str, ...]:
    for target in _strings(value, name):
        if _TARGET.fullmatch(target) is None:
            raise UsageError(f"{name} {target!r} is not root://HOST:PORT, http://HOST or cvmfs:REPOSITORY")
    return tuple(value)
