"""Times and sizes on the command line of `vpn`: what `hpcq` takes for the same."""

import click
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

import hpcq.units
from hpcq.errors import UsageError
from vpn.cli import cli
from vpn.units import megabytes_of, seconds_of, take_size, take_time

TYPED = st.one_of(
    st.from_regex(r"[0-9]{1,4}(\.[0-9]{1,2})? ?([kKmMgGtTpP]?(i?[bB])?|[dhms]|min)", fullmatch=True),
    st.from_regex(r"([0-9]{1,2}-)?[0-9]{1,3}:[0-9]{1,2}(:[0-9]{2})?", fullmatch=True),
    st.from_regex(r"([0-9]{1,2} ?d)? ?([0-9]{1,2}h)? ?([0-9]{1,3} ?m)? ?([0-9]{1,3}s)?", fullmatch=True),
    st.text(max_size=8),
)


def otherwise(parse, text):
    try:
        return parse(text)
    except UsageError:
        return None


@given(TYPED)
@example("1-23:59:59")
@example("1-24:00:00")
@example("1-0023:00:00")
@example("1-024:00:00")
@example("24:00:00")
@example("8:00")
@example("1e3")
@example("9" * 41)
def test_times_are_those_of_hpcq(text):
    assert seconds_of(text.strip()) == otherwise(hpcq.units.parse_duration, text)


@given(TYPED)
@example("1.5g")
@example("1B")
@example("0")
@example("2048PB")
def test_sizes_are_those_of_hpcq(text):
    assert megabytes_of(text.strip()) == otherwise(hpcq.units.parse_memory, text)


OPTION = click.Context(click.Command("c")), click.Option(["--o"])


@pytest.mark.parametrize(
    ("take", "text", "value"), [(take_time, " 10s ", 10.0), (take_time, "1h30m", 5400.0), (take_size, "5GB", 5120)]
)
def test_options(take, text, value):
    assert take(*OPTION, text) == value
    assert take(*OPTION, None) is None


@pytest.mark.parametrize("take", [take_time, take_size])
@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "soon"])
def test_what_is_no_option(take, text):
    with pytest.raises(click.BadParameter, match="write it as"):
        take(*OPTION, text)


@pytest.mark.parametrize(
    ("option", "words"), [(("--timeout", "8:00"), "is not a time"), (("--cvmfs-quota", "much"), "is not a size")]
)
def test_the_command_line_says_what_is_wrong(option, words):
    done = CliRunner().invoke(cli, ["run", *option, "--", "true"])
    assert done.exit_code == 2
    assert words in done.output
