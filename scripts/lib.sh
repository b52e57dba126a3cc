# Preparing this machine for scripts/demo and scripts/test; sourced by them.
#
#   setup full    Debian packages (root only) and a virtual environment with everything
#   setup light   a virtual environment for the checks: no packages, no physics libraries
#
# Afterwards HPCQ_PYTHON is the environment's Python. An interrupted setup is finished by the next one.
# shellcheck shell=bash

HPCQ_CLONE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
HPCQ_SERIES="$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo 3.11)"
HPCQ_PACKAGES=(
    slirp4netns openconnect ocserv xrootd-server xrootd-client slurm-wlm slurm-wlm-torque munge iproute2 nftables iptables
    iputils-ping squashfuse squashfs-tools microsocks openssh-server openssh-client ocproxy passt busybox-static curl
    python3-venv gcc libc6-dev libpython$HPCQ_SERIES-testsuite
)
HPCQ_SERVICES=(
    munge.service slurmctld.service slurmd.service ocserv.service ocserv.socket ssh.service ssh.socket
)
HPCQ_SOURCES=(hpcq vpn batch_templates hatch_build.py pyproject.toml README.md LICENSE)
HPCQ_POLICY=/usr/sbin/policy-rc.d
HPCQ_POLICY_MARK="# by hpcq: no service starts while scripts/lib.sh installs packages"

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "setup: $*"
    exit 1
}

# Run pytest; its status 5, "no tests collected", is fine when the user's own selection (-k …) has none here.
selected() {
    local status=0
    "$@" || status=$?
    if ((status == 5 && ${HPCQ_SELECTION:-0})); then return 0; fi
    return "$status"
}

cache_directory() {
    local base="${XDG_CACHE_HOME:-${HOME:?is not set}/.cache}"
    if ((EUID == 0)); then base=/var/cache; fi # where ordinary users of the simulated site can read
    printf '%s/hpcq/%s' "$base" "$(printf '%s' "$HPCQ_CLONE" | sha256sum | cut -c 1-12)"
}

setup() {
    local kind="$1" cache
    umask 022
    cache="$(cache_directory)"
    mkdir -p "$cache" || fail "cannot make $cache"
    HPCQ_LOG="$cache/setup.log"
    exec {HPCQ_LOCK}>"$cache/lock"
    flock --nonblock "$HPCQ_LOCK" || {
        say "another setup of this clone is running; waiting for it"
        flock "$HPCQ_LOCK"
    }
    : >"$HPCQ_LOG"
    if [[ $kind == full ]]; then install_packages; fi
    prepare_environment "$cache/venv" "$kind"
    install_project "$cache"
    exec {HPCQ_LOCK}>&-
    export HPCQ_PYTHON="$cache/venv/bin/python"
    keep_caches_in "$cache"
}

# The tools' own caches: the clone may belong to somebody else.
keep_caches_in() {
    export RUFF_CACHE_DIR="$1/ruff" MYPY_CACHE_DIR="$1/mypy" HYPOTHESIS_STORAGE_DIRECTORY="$1/hypothesis"
    export PYTEST_ADDOPTS="-o cache_dir=$1/pytest ${PYTEST_ADDOPTS:-}" PYTHONDONTWRITEBYTECODE=1
}

# Run a command with its output in the log; on failure show the end of it. It holds the lock too: when we are killed
# and it is not, the next setup waits for it.
logged() {
    local what="$1"
    shift
    printf '\n== %s: %s\n' "$what" "$*" >>"$HPCQ_LOG"
    "$@" >>"$HPCQ_LOG" 2>&1 </dev/null && return
    say "$what failed; the end of $HPCQ_LOG:"
    tail -n 25 "$HPCQ_LOG" >&2
    return 1
}

# --- Debian packages -------------------------------------------------------------------------------------------

missing_packages() {
    local package
    for package in "${HPCQ_PACKAGES[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' || printf '%s\n' "$package"
    done
}

install_packages() {
    local missing
    if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
        say "not a Debian machine: nothing installed; programs that are missing are left out"
        return
    fi
    if ((EUID == 0)); then restore_policy; fi # of a run that was killed
    mapfile -t missing < <(missing_packages)
    if ((${#missing[@]} == 0)); then return; fi
    if ((EUID != 0)); then
        say "not root: these packages are missing and what needs them is left out: ${missing[*]}"
        return
    fi
    say "installing ${missing[*]}"
    apt_install "${missing[@]}" || give_up_packages
}

give_up_packages() {
    if [[ ${HPCQ_TESTS_MUST_RUN:-} == 1 ]]; then fail "packages are missing and HPCQ_TESTS_MUST_RUN=1"; fi
    say "going on without these packages; what needs them is left out"
}

apt_install() {
    local status=0
    trap restore_policy EXIT
    trap 'exit 130' INT TERM HUP
    deny_services
    mapfile -t HPCQ_NEW_SERVICES < <(services_present no)
    export DEBIAN_FRONTEND=noninteractive
    {
        logged "apt-get update" apt-get update -q &&
            logged "apt-get install" apt-get install -q -y --no-install-recommends \
                -o DPkg::Lock::Timeout=300 "$@"
    } {HPCQ_LOCK}>&- || status=1
    disable_new_services
    restore_policy
    trap - EXIT INT TERM HUP
    return "$status"
}

# Debian starts a server as soon as it is installed, unless this program says 101.
deny_services() {
    if [[ -e $HPCQ_POLICY ]]; then mv "$HPCQ_POLICY" "$HPCQ_POLICY.hpcq-saved"; fi
    printf '#!/bin/sh\n%s\nexit 101\n' "$HPCQ_POLICY_MARK" >"$HPCQ_POLICY"
    chmod 755 "$HPCQ_POLICY"
}

restore_policy() {
    if grep -qsxF "$HPCQ_POLICY_MARK" "$HPCQ_POLICY"; then rm -f "$HPCQ_POLICY"; fi
    if [[ -e $HPCQ_POLICY.hpcq-saved ]]; then mv "$HPCQ_POLICY.hpcq-saved" "$HPCQ_POLICY"; fi
}

# The servers whose units are installed (yes) or not (no).
services_present() {
    local unit present
    for unit in "${HPCQ_SERVICES[@]}"; do
        present=no
        if [[ -e /lib/systemd/system/$unit ]]; then present=yes; fi
        if [[ $present == "$1" ]]; then printf '%s\n' "$unit"; fi
    done
}

# Nor may they start at the next boot.
disable_new_services() {
    local unit
    command -v systemctl >/dev/null || return 0
    for unit in "${HPCQ_NEW_SERVICES[@]}"; do
        if [[ -e /lib/systemd/system/$unit ]]; then logged "disable $unit" systemctl disable "$unit" || true; fi
    done
}

# --- Python ----------------------------------------------------------------------------------------------------

# The system's Python first: one under root's home cannot be run by the simulated site's ordinary user.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or later: neither /usr/bin/python3 nor python3 on PATH"
}

# $1: the environment, $2: full or light. The stamp is written last, so half an environment has none.
prepare_environment() {
    local venv="$1" kind="$2" python want have
    python="$(find_python)"
    want="$(cat "$HPCQ_CLONE/pyproject.toml" <("$python" -VV) | sha256sum | cut -c 1-32)"
    have="$(cat "$venv/stamp" 2>/dev/null || true)"
    if [[ $have == "$want full" || $have == "$want $kind" ]] && "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        return
    fi
    say "preparing a Python environment in $venv"
    rm -f "$venv/stamp" "$venv/project"
    logged "python -m venv" "$python" -m venv --clear "$venv" ||
        fail "cannot make a virtual environment with $python (Debian: apt-get install python3-venv)"
    install_dependencies "$venv" "$kind"
    printf '%s' "$want $kind" >"$venv/stamp"
}

install_dependencies() {
    local venv="$1" extras="test,dev" build
    if [[ $2 == full ]]; then extras="hep,plots,test,dev"; fi
    build="$(dirname "$venv")/build"
    copy_sources "$build"
    logged "pip install .[$extras]" pip_install "$venv" --no-compile "$build[$extras]" hatchling ||
        fail "cannot install the dependencies"
    # On all CPUs, which pip does not; files for other Pythons are among them, so its status says nothing.
    logged "compile" "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" || true
}

install_project() {
    local cache="$1" venv="$1/venv" want
    want="$(sources_hash)"
    if [[ $(cat "$venv/project" 2>/dev/null || true) == "$want" ]]; then return; fi
    say "installing hpcq into $venv"
    copy_sources "$cache/build"
    rm -f "$venv/project"
    logged "pip install hpcq" pip_install "$venv" --no-deps --no-build-isolation --force-reinstall "$cache/build" ||
        fail "cannot build and install hpcq"
    printf '%s' "$want" >"$venv/project"
}

pip_install() {
    local venv="$1"
    shift
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@"
}

# Built from a copy: the clone may be read-only, and stays as it is.
copy_sources() {
    rm -rf "$1"
    mkdir "$1"
    tar -C "$HPCQ_CLONE" --exclude=__pycache__ --exclude='*.so' -cf - "${HPCQ_SOURCES[@]}" | tar -C "$1" -xf -
}

sources_hash() {
    cd "$HPCQ_CLONE"
    find "${HPCQ_SOURCES[@]}" -type f ! -path '*/__pycache__/*' ! -name '*.so' -print0 | sort -z |
        xargs -0 sha256sum | sha256sum | cut -c 1-32
}
