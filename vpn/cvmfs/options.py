"""The options of CVMFS on a command line."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vpn.cvmfs.settings import QUOTA, make_cvmfs, whole_image
from vpn.units import MAX_MEMORY_MB, megabytes_in


def _take_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    exact = None if value is None else megabytes_in(value.strip())
    if value is not None and (exact is None or not 0 < exact <= MAX_MEMORY_MB):
        raise click.BadParameter(f"{value!r} is not a size: write it as 5GB, 512MiB or 4000 (MB)", ctx, param)
    return None if exact is None else math.ceil(exact)


_OPTIONS = (
    click.option("--cvmfs", "cvmfs_repositories", metavar="REPO,…", help="Readable at /cvmfs: cms.cern.ch,…"),
    click.option("--cvmfs-image", multiple=True, metavar="[REPO=]FILE", help="A squashfs copy of it, or of /cvmfs."),
    click.option("--cvmfs-proxy", metavar="PROXY", help="CVMFS_HTTP_PROXY.  [default: the node's, else DIRECT]"),
    click.option("--cvmfs-server", multiple=True, metavar="URL", help="http://HOST/cvmfs, with --cvmfs-key."),
    click.option("--cvmfs-key", multiple=True, metavar="FILE", help="Its public key."),
    click.option("--cvmfs-cache", metavar="DIR", help="On a disk of the node.  [default: TMPDIR or /tmp]"),
    click.option(
        "--cvmfs-quota",
        callback=_take_size,
        metavar="SIZE",
        help=f"Of the node's cache: 5GB, or MB.  [default: {QUOTA}]",
    ),
)


def cvmfs_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them to a command, which gets them as one argument: ``cvmfs``, a ``Cvmfs`` or None."""

    @functools.wraps(command)
    def with_cvmfs(*args: Any, **values: Any) -> Any:
        cvmfs = make_cvmfs(
            values.pop("cvmfs_repositories"),
            images=[whole_image(image) for image in values.pop("cvmfs_image")],
            proxy=values.pop("cvmfs_proxy"),
            servers=values.pop("cvmfs_server"),
            keys=[str(Path(key).absolute()) for key in values.pop("cvmfs_key")],
            cache=_whole(values.pop("cvmfs_cache")),
            quota=values.pop("cvmfs_quota"),
        )
        return command(*args, cvmfs=cvmfs, **values)

    for option in reversed(_OPTIONS):
        with_cvmfs = option(with_cvmfs)
    return with_cvmfs


def _whole(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
