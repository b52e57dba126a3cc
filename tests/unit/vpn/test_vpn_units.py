"""Times and sizes on the command line of `vpn`; what is one is tested with `hpcq.units`, which asks the same."""

import pytest
from click.testing import CliRunner

from vpn.cli import cli


@pytest.mark.parametrize(
    ("option", "words"),
    [
        *((("--timeout", text), "is not a time") for text in ("8:00", "", "0", "-1", "nan", "inf", "101d" * 9)),
        *((("--cvmfs-quota", text), "is not a size") for text in ("much", "", "0", "-1", "nan", "inf", "2048PB")),
    ],
)
def test_the_command_line_says_what_is_wrong(option, words):
    done = CliRunner().invoke(cli, ["run", *option, "--", "true"])
    assert done.exit_code == 2
    assert words in done.output


def test_units_are_taken():
    cvmfs = ["--cvmfs", "cms.cern.ch", "--cvmfs-quota", "5 GB", "--cvmfs-cache", "/dev/null/no"]
    done = CliRunner().invoke(cli, ["run", "--mode", "none", "--timeout", " 1h30m ", *cvmfs, "--", "sh", "-c", ""])
    assert done.exit_code != 2, done.output
