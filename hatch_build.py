"""Build hook of the wheel: compiles the LD_PRELOAD shims of ``vpn/preload`` and ``hpcq/preload``.

Works for wheels, ``pip install .`` and editable installs. Without a working C compiler the installation still
succeeds: the parts that need a shim say so when they are used. ``python hatch_build.py`` compiles them in a
checkout that is not installed. The wheel gets a platform tag only when a shim is in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # only compiling in a checkout
    BuildHookInterface = object  # type: ignore[assignment,misc]

PLACES = ("vpn/preload", "hpcq/preload")

FLAGS = [
    "-std=gnu11", "-O2", "-fPIC", "-shared", "-D_FORTIFY_SOURCE=0", "-fno-strict-aliasing",
    "-fstack-protector-strong", "-Wall", "-Wextra", "-Werror", "-Werror=shadow", "-Werror=strict-prototypes",
    "-Werror=missing-declarations",
    "-Werror=implicit-function-declaration", "-Werror=pointer-arith", "-Werror=format=2", "-Werror=undef",
    "-Wl,-z,now", "-Wl,-z,relro", "-Wl,-z,defs",
]  # fmt: skip


def compile_shims(root: Path) -> tuple[list[Path], list[str]]:
    """Compile every ``*.c`` in the `PLACES` of ``root`` beside itself; returns the shims built and one warning for each
    that was not.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        lacking = "tunnels that need an LD_PRELOAD shim will not work, and short commands are slower"
        return [], [f"no C compiler: {lacking}; install gcc and reinstall"]
    built, warnings = [], []
    for file in sorted(file for place in PLACES for file in (root / place).glob("*.c")):
        target = file.with_suffix(".so")
        unfinished = target.with_suffix(f".{os.getpid()}.tmp")
        command = [*compiler.split(), *FLAGS, "-o", str(unfinished), str(file), "-ldl"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return [], [f"the C compiler {compiler} cannot be run: {error}"]
        if done.returncode == 0:
            unfinished.replace(target)
            built.append(target)
        else:
            unfinished.unlink(missing_ok=True)
            warnings.append(f"{file.name} was not compiled: {done.stderr.strip()}")
    return built, warnings


class Hook(BuildHookInterface):  # type: ignore[type-arg,misc]
    """Compiles the shims and puts them into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        built, warnings = compile_shims(root)
        for warning in warnings:
            self.app.display_warning(f"hpcq: {warning}")
        if not built:
            return
        if version != "editable":
            build_data["force_include"].update({str(path): str(path.relative_to(root)) for path in built})
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


if __name__ == "__main__":
    shims, problems = compile_shims(Path(__file__).resolve().parent)
    for shim in shims:
        print(shim.name)
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)
