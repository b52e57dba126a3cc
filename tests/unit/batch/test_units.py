"""Sizes and times: what is read, what is refused, and that what is written is read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq.errors import UsageError
from hpcq.units import (
    MAX_DURATION_S,
    format_bytes,
    format_duration,
    format_slurm_time,
    parse_duration,
    parse_memory,
)


@pytest.mark.parametrize(
    ("text", "megabytes"),
    [
        ("32GB", 32768),
        ("512 MiB", 512),
        (2048, 2048),
        ("2048", 2048),
        ("1.5g", 1536),
        ("1T", 1048576),
        ("1KB", 1),
        ("1B", 1),
        (" 4 GiB ", 4096),
        (0.5, 1),
    ],
)
def test_memory(text, megabytes):
    assert parse_memory(text) == megabytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "32 gigabytes",
        "-1",
        -1,
        0,
        "0",
        "1e3",
        "32GBs",
        "\u0663GB",
        "1,5GB",
        True,
        None,
        float("nan"),
        "9" * 50,
        float("inf"),
        "1PB1",
        "32 G B",
        "1\nGB",
    ],
)
def test_memory_refused(text):
    with pytest.raises(UsageError) as caught:
        parse_memory(text, name="--memory")
    assert str(caught.value).startswith("--memory ")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8:00:00", 28800),
        ("1-02:00:00", 93600),
        ("90m", 5400),
        ("1h30m", 5400),
        ("2d", 172800),
        ("45s", 45),
        ("1h 30min", 5400),
        (3600, 3600),
        ("3600", 3600),
        (1.5, 1.5),
        ("0", 0),
        ("100:00:00", 360000),
    ],
)
def test_duration(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8:00",
        "1:60:00",
        "1:00:60",
        "1-24:00:00",
        "-5",
        -5,
        "8 hours",
        "1m1h",
        "h",
        "1e3",
        True,
        None,
        float("nan"),
        float("inf"),
        "9" * 30,
        "8:00:00\n8:00:00",
        "\u0661:00:00",
    ],
)
def test_duration_refused(text):
    with pytest.raises(UsageError, match=r"^--walltime "):
        parse_duration(text, name="--walltime")


@given(st.integers(0, MAX_DURATION_S))
def test_duration_round_trip(seconds):
    assert parse_duration(format_duration(seconds)) == seconds
    assert parse_duration(format_slurm_time(seconds)) == seconds


@given(st.one_of(st.text(), st.floats(), st.integers()))
def test_anything_is_a_number_or_a_usage_error(value):
    for parse in (parse_memory, parse_duration):
        try:
            result = parse(value)
        except UsageError:
            continue
        assert result >= 0


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (3 * 10**21, "3000.0 EB"),
    ],
)
def test_bytes_for_people(count, shown):
    assert format_bytes(count) == shown
