"""Who may import whom. Read from the sources, imports inside functions included; broken by one wrong line."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

ENGINE = {
    "errors",
    "task",
    "options",
    "outcome",
    "messages",
    "protocol",
    "scheduler",
    "serialize",
    "versions",
    "functions",
    "roster",
}
"""The pure part: no sockets, no processes."""

ALLOWED = {
    "errors": set(),
    "units": {"errors"},
    "state_dir": {"errors"},
    "addresses": {"errors"},
    "reach": set(),
    "lock": {"errors", "state_dir"},
    "messages": {"errors"},
    "versions": {"messages"},
    "outcome": set(),
    "options": {"errors", "files"},
    "task": {"errors", "files", "options", "outcome", "serialize"},
    "files": {"errors", "messages", "options", "outcome", "parcels", "protocol", "roster", "task", "transport"},
    "protocol": {"errors", "messages"},
    "parcels": set(),
    "serialize": {"errors", "parcels"},
    "functions": {"messages"},
    "roster": {"messages"},
    "scheduler": {"errors", "outcome"},
    "connection": {"errors", "identity", "messages", "state_dir"},
    "identity": {"connection"},
    "secure": set(),
    "transport": {"reach", "connection", "errors", "messages", "protocol", "secure"},
    "credentials": {"messages", "roster", "servers", "transport"},
    "servers": {"errors", "state_dir"},
    "questions": {"addresses", "errors", "messages", "roster", "scheduler", "transport", "units"},
    "client": {"connection", "errors", "messages", "protocol", "transport"},
    "readiness": {"errors", "messages", "roster", "scheduler"},
    "door": {"secure"},
    "links": {
        "addresses", "connection", "door", "files", "messages", "parcels", "questions", "roster", "transport",
        "versions",
    },
    "dispatch": {"files", "functions", "links", "messages", "outcome", "parcels", "roster", "scheduler"},
    "packing": {
        "dispatch", "errors", "files", "messages", "options", "parcels", "protocol", "scheduler", "serialize", "task",
    },
    "inquiry": {"errors", "jobs", "manager", "scaling", "scheduler", "task"},
    "manager": {
        "connection", "credentials", "dispatch", "errors", "files", "links", "messages", "outcome", "parcels",
        "questions", "readiness", "roster", "scheduler", "transport",
    },
    "autoscale": {"errors"},
    "config": {"errors", "state_dir"},
    "journal": {"errors", "outcome", "roster", "state_dir", "task"},
    "report": {"journal", "outcome", "units"},
    "scaling": {"autoscale", "batch", "config", "errors", "jobs", "manager", "roster", "scheduler", "servers", "units"},
    "jobs": {"batch", "config", "errors", "manager", "servers", "state_dir", "units"},
    "batch": {"connection", "errors", "servers", "state_dir", "units"},
    "doctor": {"batch", "errors", "queue", "state_dir", "task", "units"},
}  # fmt: skip
"""Module or package of hpcq: what of hpcq it may import besides itself. Others are not limited here."""

NEVER = {
    "pilot": {
        "batch",
        "cli",
        "client",
        "dispatch",
        "functions",
        "jobs",
        "manager",
        "packing",
        "queue",
        "roster",
        "scheduler",
    },
    "queue": {"cli", "pilot", "client"},
}  # fmt: skip

NO_IO = {"asyncio", "socket", "ssl", "subprocess", "threading", "select", "selectors", "signal", "time", "random"}
"""What a pure module may not import: the world, and the clock."""

PURE = [
    "scheduler/machine",
    "scheduler/records",
    "scheduler/events",
    "protocol",
    "messages",
    "functions",
    "roster",
    "readiness",
    "task",
    "options",
    "outcome",
    "autoscale",
    "doctor/report",
    "report",
]


def imports(path):
    """Dotted names a file imports, ``from a import b`` as both ``a`` and ``a.b``; type-only imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def part(path):
    """The module or package of hpcq a file belongs to."""
    return path.relative_to(ROOT / "hpcq").parts[0].removesuffix(".py")


def parts():
    return sorted({part(path) for path in files("hpcq")} - {"__init__"})


def used_by(name):
    """Parts of hpcq that a part imports."""
    known = set(parts())
    found = set()
    for path in files("hpcq"):
        if part(path) == name:
            found.update(dotted.split(".")[1] for dotted in imports(path) if dotted.startswith("hpcq."))
    return (found & known) - {name}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_layer_imports_only_what_is_below_it(name):
    assert used_by(name) <= ALLOWED[name]


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_must_stay_apart_is_apart(name):
    assert not used_by(name) & NEVER[name]


@pytest.mark.parametrize("path", files("vpn"), ids=lambda path: str(path.relative_to(ROOT)))
def test_vpn_knows_nothing_of_hpcq(path):
    assert not {name for name in imports(path) if name.split(".")[0] == "hpcq"}


@pytest.mark.parametrize("path", files("hpcq"), ids=lambda path: str(path.relative_to(ROOT)))
def test_hpcq_uses_only_the_public_names_of_vpn(path):
    tree = ast.parse((ROOT / "vpn/__init__.py").read_text())
    public = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    used = {name for name in imports(path) if name.split(".")[0] == "vpn"} - {"vpn"}
    assert used <= {f"vpn.{name}" for name in public}


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_not_know_the_world(name):
    assert not {dotted.split(".")[0] for dotted in imports(ROOT / f"hpcq/{name}.py")} & NO_IO


VPN_PURE = [
    "gateway/credentials",
    "gateway/fragments",
    "gateway/openings",
    "gateway/policy",
    "gateway/tickets",
    "modes/dialogue",
    "pulse",
    "relay/bucket",
    "relay/dns",
    "relay/packets",
    "relay/socks5",
]


@pytest.mark.parametrize("name", VPN_PURE)
def test_pure_modules_of_the_tunnels_do_not_know_the_world(name):
    assert not {dotted.split(".")[0] for dotted in imports(ROOT / f"vpn/{name}.py")} & NO_IO


def test_the_relay_knows_nothing_of_gateways_and_modes():
    found = {name for path in files("vpn/relay") for name in imports(path)}
    assert not {name for name in found if name.startswith(("vpn.gateway", "vpn.modes", "vpn.session"))}


@pytest.mark.parametrize("name", ["core", "choice", "lanes", "doom", "durations", "account"])
def test_the_core_of_the_pilot_is_pure(name):
    assert not imports(ROOT / f"hpcq/pilot/{name}.py") & (NO_IO - {"signal"})  # names of signals, for messages
    assert "hpcq.scheduler" not in imports(ROOT / f"hpcq/pilot/{name}.py")


def test_only_serialize_uses_cloudpickle():
    users = {str(path.relative_to(ROOT)) for path in files("hpcq") if "cloudpickle" in imports(path)}
    assert users == {"hpcq/serialize.py"}


def test_every_module_of_the_engine_is_looked_at():
    assert set(ALLOWED) >= ENGINE
    assert set(ALLOWED) <= set(parts())
