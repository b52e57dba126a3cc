"""From values to scripts: quoting that a shell undoes exactly, and refusals that name what is wrong."""

import os
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq.batch.base import PilotRequest, get_batch_system
from hpcq.batch.directives import check_directives, slurm_words
from hpcq.batch.templates import packaged_directory, render_template
from hpcq.batch.text import last_lines, printable, refuse_unprintable, unprintable
from hpcq.errors import TemplateError, UsageError

HOSTILE = [
    "a b; rm -rf /",
    "$(x)",
    "`x`",
    "'",
    '"',
    "\\",
    "é ☃",
    "-n",
    "~",
    "*",
    "#",
    "{{ x }}",
    "a" * 10_000,
    "",
]
printable_text = st.text().filter(lambda text: unprintable(text) is None)


def render(tmp_path: Path, source: str, **values: object) -> str:
    path = tmp_path / "mine.sh.j2"
    path.write_text(source, encoding="utf-8")
    return render_template("slurm.sh.j2", path, {"pilot_argv": ("true",), **values})


@pytest.mark.parametrize("value", HOSTILE)
def test_every_value_is_one_word(tmp_path, value):
    script = render(tmp_path, "exec {{ pilot_argv }} {{ x }}", x=value)
    assert shlex.split(script) == ["exec", "true", value]


@given(words=st.lists(printable_text))
def test_a_list_is_as_many_words(tmp_path_factory, words):
    script = render(tmp_path_factory.getbasetemp(), "{{ pilot_argv }}", pilot_argv=tuple(words))
    assert shlex.split(script) == words


def test_expressions_are_quoted_whole_and_raw_is_not(tmp_path):
    source = "{{ '--x=' ~ x }} {{ 'y z' }} {{ x | raw }} {{ pilot_argv }}"
    assert render(tmp_path, source, x="a b") == "'--x=a b' 'y z' a b true\n"


def test_numbers_and_paths(tmp_path):
    assert render(tmp_path, "{{ n }} {{ p }} {{ pilot_argv }}", n=16, p=Path("/a b")) == "16 '/a b' true\n"


@pytest.mark.parametrize(
    "value", ["a\nb", "a\rb", "a\x00b", "\x1b[0m", "a\u2028b", os.fsdecode(b"\xff"), "\x85", "\x7f"]
)
def test_control_characters_are_refused_by_name(tmp_path, value):
    with pytest.raises(TemplateError, match=r"mine\.sh\.j2: partition holds "):
        render(tmp_path, "{{ pilot_argv }}", partition=value)
    with pytest.raises(UsageError, match=r"^options\[1\] holds "):
        refuse_unprintable("options", ("ok", value))
    with pytest.raises(UsageError, match=r"^environment\.A holds "):
        refuse_unprintable("environment", {"A": value})


def refused(tmp_path: Path, source: str, **values: object) -> str:
    with pytest.raises(TemplateError) as caught:
        render(tmp_path, source, **values)
    message = str(caught.value)
    assert message.count(str(tmp_path / "mine.sh.j2")) == 1
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "expression", ["{{ qeue }}", "{% if qeue %}{% endif %}", "{{ qeue | raw }}", "{{ qeue | upper }}"]
)
def test_an_undefined_variable_is_named_with_its_line(tmp_path, expression):
    message = refused(tmp_path, "{{ pilot_argv }}\n\n" + expression)
    assert "line 3" in message
    assert "'qeue' is undefined" in message


def test_an_option_that_was_not_given(tmp_path):
    assert render(tmp_path, "{% if qos %}{{ qos }}{% endif %}{{ pilot_argv }}", qos=None) == "true\n"
    for expression in ("{{ qos }}", "{{ qos | upper }}", "{{ qos | raw }}"):
        message = refused(tmp_path, "{{ pilot_argv }}\n" + expression, qos=None)
        assert "line 2: qos was not given; write {% if qos %}" in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\n{% if %}", "line 2"),
        ("{{ pilot_argv", "line 1"),
        ("echo ${#x}", "begins one for Jinja: write {% raw %}${#x}{% endraw %}"),
        ("{% extends 'nowhere.j2' %}{{ pilot_argv }}", "'nowhere.j2' that it names was not found"),
        ("\n{{ 1 / 0 }}{{ pilot_argv }}", "line 2: ZeroDivisionError"),
        ("{{ {'a': 1} }}{{ pilot_argv }}", "line 1: a value of type dict"),
        ("{{ true }}{{ pilot_argv }}", "a value of type bool"),
        ("{{ 'a\\nb' }}{{ pilot_argv }}", "a value holds a newline"),
        ("echo hello", "never uses pilot_argv"),
        ("", "never uses pilot_argv"),
    ],
)
def test_other_mistakes(tmp_path, source, words):
    assert words in refused(tmp_path, source)


def test_files_that_cannot_be_templates(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, words in (("absent", "No such file"), (".", "Is a directory"), ("binary", "not UTF-8")):
        with pytest.raises(TemplateError, match=words):
            render_template("slurm.sh.j2", tmp_path / name, {})


def test_a_template_may_extend_the_packaged_one(tmp_path):
    source = '{% extends "hpcq/local.sh.j2" %}\n{% block setup %}\nmodule load gcc\n{% endblock %}\n'
    script = render(tmp_path, source, modules=(), setup=(), environment={}, epilogue=(), connection=None)
    assert "\nmodule load gcc\n" in script
    assert script.endswith("\nexec true\n")


def test_packaged_templates_are_found():
    assert {path.name for path in packaged_directory().glob("*.j2")} >= {"slurm.sh.j2", "local.sh.j2"}


@given(st.text(alphabet=" ab'\"\\#=\t", max_size=12))
def test_slurm_words_agree_with_the_shell_where_there_is_no_backslash(text):
    def attempt(split):
        try:
            return split(text)
        except ValueError:
            return None

    if "\\" not in text:
        theirs = attempt(lambda t: shlex.split(t, comments=True))
        ours = attempt(slurm_words)
        # An empty quoted word: sbatch passes no argument where the shell passes an empty one. Nobody can want
        # it.
        assert ours == theirs or (theirs is not None and "" in theirs)


def test_slurm_words_as_opt_c_has_them():
    assert slurm_words(r" --comment='a b' -C x\ y#c # no") == ["--comment=a b", "-C", "x y"]
    assert slurm_words(r" 'a\'b' ") == ["a'b"]


GOOD = "#!/bin/bash\n# a comment\n#SBATCH --time=1\n\n#SBATCH --mem='1 # 2'\necho\n"


def test_directives_that_work():
    check_directives(GOOD, "#SBATCH", "template t")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo\n", "must begin with #!"),
        ("", "must begin with #!"),
        (GOOD + "#SBATCH --qos=x\n", r"line 7 .*--qos=x.* after the first command \(line 6\)"),
        ("#!/bin/sh\n#SBATCH --comment='a\\b'\n", "line 2 .* backslash"),
        ("#!/bin/sh\n#SBATCH --comment='a\n", "line 2 .*No closing quotation"),
    ],
)
def test_directives_that_do_not(script, words):
    with pytest.raises(TemplateError, match=words) as caught:
        check_directives(script, "#SBATCH", "template t")
    assert str(caught.value).startswith("template t: ")


@given(st.text())
def test_what_is_shown_of_output_is_printable(text):
    assert all(unprintable(line) is None for line in last_lines(text, 5))
    assert unprintable(printable(text)) in (None, "a newline")


ASKED = {
    "modules": ("mark-modules",),
    "setup": ("mark-setup",),
    "environment": {"X": "mark-environment"},
    "epilogue": ("mark-epilogue",),
    "pilot_argv": ("mark-pilot",),
}
ASKED_OF_SCHEDULERS = {
    **{name: f"mark-{name}" for name in ("partition", "account", "constraint", "mail", "job_name")},
    "exclusive": True,
    "gpus": 7777,
    "memory_mb": 8888,
    "walltime_s": 4321,
}

OPTIONS = {"pbs": {"options": ("-l mark-options",)}, "slurm": {"options": ("--mark-options",)}}


@pytest.mark.parametrize(("batch", "nodes"), [("local", 1), ("pbs", 1), ("pbs", 2), ("slurm", 1), ("slurm", 2)])
def test_whatever_is_asked_for_is_in_the_script(batch, nodes):
    """An option that is taken and then left out would be noticed by nobody before the job fails."""
    values = ASKED if batch == "local" else ASKED | ASKED_OF_SCHEDULERS | OPTIONS[batch]
    script = get_batch_system(batch).render(PilotRequest(queue="q", nodes=nodes, **values)).script
    marks = ["excl", "7777", "8888", "1:12:01", *re.findall(r"mark-\w+", repr(values))]
    assert [mark for mark in marks if mark not in script and (batch != "local" or mark.startswith("mark-"))] == []
