"""Where settings come from: each layer over the one before, every mistake named with its file."""

import json
import re
import shlex

import pytest

from hpcq import config
from hpcq.batch.request import KNOWN, pilot_request
from hpcq.batch.templates import packaged_directory
from hpcq.cli.main import run
from hpcq.errors import UsageError
from hpcq.pilot.options import parse


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """The two files, by name; neither exists yet."""
    system, user = tmp_path / "etc" / "config.toml", tmp_path / "home" / "hpcq" / "config.toml"
    for path in (system, user):
        path.parent.mkdir(parents=True)
    monkeypatch.setattr(config, "SYSTEM_FILE", system)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in (*config.KINDS, *config.QUEUE_KINDS, "site"):
        monkeypatch.delenv(f"HPCQ_{name.upper()}", raising=False)
    return {"system": system, "user": user}


def test_defaults_alone():
    settings = config.resolve()
    assert settings.values == config.DEFAULTS
    assert set(settings.origins.values()) == {"default"}


def test_the_last_wins(files, monkeypatch):
    files["system"].write_text(
        'cores = 1\nmemory = "1GB"\nqos = "a"\naccount = "a"\n[site.x]\npartition = "s"\nqos = "b"\n'
    )
    files["user"].write_text('memory = "2GB"\nwalltime = 60\n[site.x]\npartition = "u"\nwalltime = "1:00:00"\n')
    monkeypatch.setenv("HPCQ_WALLTIME", "90")
    monkeypatch.setenv("HPCQ_ACCOUNT", "c")
    settings = config.resolve({"account": "d", "cores": None, "options": ()}, site="x")
    assert settings.values == {
        "batch": "local", "count": 1, "nodes": 1, "cores": 1, "memory": "2GB", "qos": "b", "account": "d",
        "partition": "u", "walltime": "90",
    }  # fmt: skip
    assert settings.origins == {
        "batch": "default", "count": "default", "nodes": "default", "cores": str(files["system"]),
        "memory": str(files["user"]), "qos": f"{files['system']} [site.x]", "account": "command line",
        "partition": f"{files['user']} [site.x]", "walltime": "$HPCQ_WALLTIME",
    }  # fmt: skip


def test_which_site(files, monkeypatch):
    files["user"].write_text('default_site = "a"\n[site.a]\ncores = 2\n[site.b]\ncores = 3\n[site.c]\ncores = 4\n')
    assert config.resolve().values["cores"] == 2
    monkeypatch.setenv("HPCQ_SITE", "b")
    assert config.resolve().values["cores"] == 3
    assert config.resolve(site="c").values["cores"] == 4
    with pytest.raises(UsageError, match=r"unknown site 'd' \(known are a, b, c\)"):
        config.resolve(site="d")


def test_variables_of_every_kind(monkeypatch):
    monkeypatch.setenv("HPCQ_CORES", "3")
    monkeypatch.setenv("HPCQ_EXCLUSIVE", "Yes")
    monkeypatch.setenv("HPCQ_REQUIRE", "root://a 'http://b c'")
    monkeypatch.setenv("HPCQ_TEMPLATE", "~/t")
    monkeypatch.setenv("HPCQ_GPUS", "")
    values = config.resolve().values
    assert (values["cores"], values["exclusive"], values["require"]) == (3, True, ["root://a", "http://b c"])
    assert values["template"].is_absolute()
    assert "gpus" not in values


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("CORES", "many", "HPCQ_CORES must be a number"),
        ("EXCLUSIVE", "perhaps", "true or false"),
        ("SETUP", "'", "words"),
        ("JOURNAL", "~nobody-of-that-name/x", "HPCQ_JOURNAL: there is no home directory for"),
        ("PORT", "any", "HPCQ_PORT must be a number or a range"),
    ],
)
def test_variables_that_cannot_be_read(monkeypatch, name, value, words):
    monkeypatch.setenv(f"HPCQ_{name}", value)
    with pytest.raises(UsageError, match=words):
        config.resolve()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cores = ", "is not TOML"),
        ("corse = 1", "unknown setting 'corse'; known are account, "),
        ("cores = '4'", "cores must be a number, not '4'"),
        ("cores = true", "cores must be a number, not True"),
        ("exclusive = 1", "exclusive must be true or false"),
        ("options = '--x'", "options must be a list of texts"),
        ("memory = []", "memory must be a text or a number"),
        ("variables = {A = 1}", "variables must be a table of texts"),
        ("site = 'x'", r"write tables \[site.NAME\]"),
        ("[site]\nx = 1", "site.x must be a table"),
        ("default_site = 1", "default_site must be the name"),
        ("queue = 1", r"queue must be a table, as under a line \[queue\]"),
        ("[queue]\ncores = 1", r"\[queue\]: unknown setting 'cores'; known are address, interface, port, journal"),
        ("[queue]\nport = 'any'", r"port must be a number or a range such as .20000-20100., not 'any'"),
        ("[queue]\naddress = 5", "address must be a text, not 5"),
        ("journal = 1", "journal must be true, false or a path, not 1"),
        ("template = '~nobody-of-that-name/x'", "template: there is no home directory for"),
        ("port = 1.5", "port must be a number or a range"),
        ("[site.x]\ncorse = 1\n", r"\[site.x\]: unknown setting 'corse'"),
    ],
)
def test_files_with_mistakes(files, text, words):
    files["user"].write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        config.resolve(site="x" if "[site.x]" in text else None)
    assert str(files["user"]) in str(caught.value)


def test_files_that_are_none(files):
    files["user"].write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not TOML"):
        config.resolve()
    files["user"].unlink()
    files["user"].mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        config.resolve()


def test_paths_in_a_file_are_beside_it_and_dashes_are_as_good(files):
    files["user"].write_text('template = "mine.sh.j2"\nscratch = "/tmp/x"\nmanager-timeout = 5\n')
    values = config.resolve().values
    assert values["template"] == files["user"].parent / "mine.sh.j2"
    assert str(values["scratch"]) == "/tmp/x"
    assert values["manager_timeout"] == 5


def test_where_a_queue_listens(files, monkeypatch):
    assert config.resolve_queue().values == {"port": 0, "journal": False}
    files["system"].write_text('[queue]\naddress = "192.0.2.1"\nport = 20000\n[site.x]\ninterface = "ib0"\ncores = 3\n')
    files["user"].write_text('port = "20000-20100"\n')
    settings = config.resolve_queue()
    assert settings.values.pop("journal") is False
    assert settings.values == {"address": "192.0.2.1", "port": "20000-20100"}
    assert settings.origins == {
        "address": f"{files['system']} [queue]",
        "journal": "default",
        "port": str(files["user"]),
    }
    values = config.resolve_queue(site="x").values
    assert values == {"interface": "ib0", "port": "20000-20100", "journal": False}
    monkeypatch.setenv("HPCQ_ADDRESS", "192.0.2.2")
    monkeypatch.setenv("HPCQ_PORT", "20001")
    monkeypatch.setenv("HPCQ_JOURNAL", "yes")
    values = config.resolve_queue(site="x").values
    assert values == {"address": "192.0.2.2", "port": "20001", "journal": True}
    given = {"address": None, "interface": "eth0", "port": 0, "journal": False}
    assert config.resolve_queue(given, site="x").values == {"interface": "eth0", "port": 0, "journal": False}
    assert not set(config.resolve(site="x").values) & set(config.QUEUE_KINDS)


def test_every_option_of_pilots_can_be_set():
    assert set(config.KINDS) == {*KNOWN, "batch", "count"}


@pytest.mark.parametrize(("site", "batch"), [("anvil", "slurm"), ("pleiades", "pbs")])
def test_the_example_can_be_used(files, site, batch):
    files["user"].write_text((packaged_directory() / "config.example.toml").read_text())
    values = dict(config.resolve(site=site).values)
    assert values.pop("batch") == batch
    count = values.pop("count")
    assert pilot_request("q", batch, count, values).account


def typed(capsys, line):
    status = run(shlex.split(line))
    output = capsys.readouterr()
    return status, output.out, output.err


def test_the_command(files, capsys):
    files["user"].write_text('[site.x]\nbatch = "pbs"\ncores = 3\nexclusive = true\ntemplate = "t"\n')
    status, output, error = typed(capsys, "config --site x")
    assert (status, error) == (0, "")
    assert output.startswith("site x; sites in ")
    lines = [line.split() for line in output.splitlines()]
    assert ["cores", "3", str(files["user"]), "[site.x]"] in lines
    assert ["exclusive", "true", str(files["user"]), "[site.x]"] in lines
    told = json.loads(typed(capsys, "config --site x --json")[1])
    assert told["settings"]["batch"] == {"value": "pbs", "origin": f"{files['user']} [site.x]"}
    assert told["settings"]["count"] == {"value": 1, "origin": "default"}
    assert told["settings"]["port"] == {"value": 0, "origin": "default"}
    assert typed(capsys, "config --example")[1].startswith("# Settings of pilots")
    assert typed(capsys, "config --site y")[0] == 2


def test_a_flag_is_over_the_site(files, capsys):
    files["user"].write_text('[site.x]\nbatch = "pbs"\ncores = 3\npartition = "a"\nmodules = ["gcc"]\n')
    line = "submit-pilots --name q --create --site x --dry-run --partition b"
    output = typed(capsys, line)[1]
    assert "#PBS -q b\n" in output
    assert "ncpus=3" in output
    assert "module load gcc\n" in output


@pytest.mark.parametrize("batch", ["slurm", "pbs", "torque", "local"])
def test_a_printed_template_is_the_packaged_one(capsys, tmp_path, batch):
    status, text, _ = typed(capsys, f"template {batch}")
    assert status == 0
    (tmp_path / "mine.sh.j2").write_text(text)
    common = f"submit-pilots --name q --create --batch {batch} --dry-run --cores 2"
    mine, packaged = (typed(capsys, line)[1] for line in (f"{common} --template {tmp_path}/mine.sh.j2", common))
    assert without_directory(mine) == without_directory(packaged) != ""


def without_directory(text):
    """Each rendering names a directory of its own."""
    return re.sub(r"\d{8}T\d{6}\.\d{6}-[0-9a-f]{6}|local-[0-9a-f]{6}", "X", text)


@pytest.mark.parametrize("gateway", ["login1,login2", " login1 , login2", ["login1", "login2"]])
def test_several_gateways(gateway):
    argv = pilot_request("q", "local", 1, {"vpn": "relay", "gateway": gateway}).pilot_argv
    assert argv[argv.index("--gateway") + 1] == "login1,login2"


@pytest.mark.parametrize("gateway", ["a,,b", "a,a", "../a", ["a", 1]])
def test_gateways_that_cannot_be(gateway):
    with pytest.raises(UsageError, match="--gateway"):
        pilot_request("q", "local", 1, {"gateway": gateway}, flags=True)


def pilot_told(options):
    """What a pilot reads from the command line made for it."""
    argv = list(pilot_request("q", "local", 1, options).pilot_argv)
    return parse(argv[argv.index("hpcq.pilot") + 1 :])


def test_a_tunnel_is_as_submit_pilots_was_told():
    plain = {"direct": (), "mtu": 0, "dtls": None, "tls": True, "probe_interval": 15.0, "cvmfs": None}
    assert pilot_told({}).tunnel == pilot_told({"vpn": "slirp", "tls": True}).tunnel == plain
    told = pilot_told(
        {"vpn": "openconnect", "direct": ["192.0.2.7/24,10.0.0.0/8", "2001:db8::1"], "mtu": 1400, "dtls": True}
    )
    assert told.tunnel == plain | {
        "direct": ("192.0.2.0/24", "10.0.0.0/8", "2001:db8::1/128"),
        "mtu": 1400,
        "dtls": True,
    }
    assert pilot_told({"vpn": "auto", "dtls": False, "tls": False}).tunnel == plain | {"dtls": False, "tls": False}
    for interval in (5, "5s", "0:00:05"):
        assert pilot_told({"vpn": "slirp", "probe_interval": interval}).tunnel == plain | {"probe_interval": 5.0}
    assert pilot_told({"vpn": "none", "direct": "10.0.0.0/8"}).tunnel == plain | {"direct": ("10.0.0.0/8",)}


@pytest.mark.parametrize(
    ("options", "flag", "keyword"),
    [
        ({"vpn": "none", "tls": False}, "--no-tls means nothing in mode none", "tls=False means nothing in mode none"),
        ({"tls": False}, "--no-tls means nothing in mode none", "tls=False means"),
        ({"vpn": "relay", "dtls": True}, "--dtls means nothing in mode relay", "dtls=True means nothing in mode relay"),
        ({"vpn": "socks", "dtls": False}, "--no-dtls means nothing in mode socks", "dtls=False means"),
        ({"vpn": "slirp", "mtu": 1400}, "--mtu means nothing in mode slirp", "mtu=1400 means nothing in mode slirp"),
        ({"vpn": "relay", "probe_interval": 0.5}, "0.5 s is outside 1…60", "0.5 s is outside 1…60"),
        ({"vpn": "relay", "probe_interval": "2m"}, "120 s is outside", "120 s is outside"),
        ({"vpn": "relay", "probe_interval": "often"}, "--probe-interval", "probe_interval"),
        ({"probe_interval": 5}, "--probe-interval means nothing in mode none", "probe_interval=5 means nothing"),
        ({"vpn": "openconnect", "mtu": 20}, "mtu 20 is outside", "mtu 20 is outside"),
        ({"vpn": "openconnect", "mtu": -1}, "--mtu must be", "mtu must be"),
        ({"vpn": "openconnect", "mtu": "1400"}, "--mtu must be", "mtu must be"),
        ({"vpn": "openconnect", "dtls": "yes"}, "--dtls must be true or false", "dtls must be true or false"),
        (
            {"vpn": "relay", "direct": ["example.org"]},
            "'example.org' is not a network",
            "'example.org' is not a network",
        ),
        ({"vpn": "relay", "direct": [1]}, "--direct must be a list", "direct must be a list"),
    ],
)
def test_a_tunnel_that_cannot_be_as_told(options, flag, keyword):
    for text, flags in ((flag, True), (keyword, False)):
        with pytest.raises(UsageError, match=re.escape(text)):
            pilot_request("q", "local", 1, options, flags=flags)


def test_a_tunnel_told_by_flags(capsys):
    flags = "--vpn openconnect --direct 10.0.0.0/8,192.0.2.0/24 --direct 2001:db8::/32 --no-dtls --mtu 1400"
    script = typed(capsys, f"submit-pilots --name q --create --dry-run {flags}")[1]
    assert "--vpn openconnect --direct 10.0.0.0/8,192.0.2.0/24,2001:db8::/32 --mtu 1400 --no-dtls" in script
    status, _, error = typed(capsys, "submit-pilots --name q --create --vpn openconnect --no-tls")
    assert (status, error.splitlines()) == (
        2, ["hpcq: --no-tls means nothing in mode openconnect: it is for relay and socks"],
    )  # fmt: skip


def test_where_queues_have_their_files(files, monkeypatch):
    files["user"].write_text('[queue]\nstate_dir = "queues"\n')
    assert config.resolve_queue().values["state_dir"] == files["user"].parent / "queues"
    monkeypatch.setenv("HPCQ_STATE_DIR", "/scratch/me")
    assert str(config.resolve_queue().values["state_dir"]) == "/scratch/me"
    assert config.resolve_queue({"state_dir": "/given"}).values["state_dir"] == "/given"
