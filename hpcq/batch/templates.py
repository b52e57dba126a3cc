"""From a Jinja2 template and values to a batch script.

Every ``{{ … }}`` is quoted for the shell, whatever it holds: text becomes one word, a list several. ``raw``
is the explicit exception, for text that is meant to be shell. An undefined variable, an option that was not
given, or a value with a newline or another control character is refused by name. Nothing here knows which
batch system it is for; rules about ``#SBATCH`` lines are in ``directives``.

A template is the packaged one (``hpcq/batch_templates/<batch>.sh.j2``) or the user's own file, which may
extend the packaged one: ``{% extends "hpcq/slurm.sh.j2" %}``.
"""

from __future__ import annotations

import importlib.resources
import shlex
import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path

import jinja2
import jinja2.meta

from hpcq.batch.command import CommandRunner
from hpcq.batch.text import refuse_unprintable, unprintable
from hpcq.errors import TemplateError, UsageError

COMMAND_VARIABLE = "pilot_argv"
"""The variable a template must use: without it the job would run no pilot."""

CONNECTION_VARIABLE = "connection"
"""The variable that a template must use when it has a value: without it the pilot would not find its manager."""

_COMMENT_HINT = "; the shell's ${#x} begins one for Jinja: write {% raw %}${#x}{% endraw %}"


class _Raw(str):
    """Text that ``raw`` has marked as being shell already."""

    __slots__ = ()


class NotGiven(jinja2.StrictUndefined):
    """A known variable without a value: false in ``{% if … %}``, an error anywhere else."""

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False


class _RefusedValueError(Exception):
    """A value that cannot be rendered; becomes a TemplateError with the line."""


def packaged_directory() -> Path:
    """Return the directory of the templates that come with hpcq (in a wheel, or in the checkout it runs
    from).
    """
    installed = Path(str(importlib.resources.files("hpcq"))) / "batch_templates"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "batch_templates"


def render_template(name: str, template: Path | None, values: Mapping[str, object]) -> str:
    """Render the packaged template ``name`` ("slurm.sh.j2"), or the file ``template`` instead of it.

    A value of None stands for an option that was not given.

    Raises: TemplateError: unreadable, a syntax error, an undefined variable, a value that cannot be put in a
    script; says the file, the line and the name.
    """
    path = packaged_directory() / name if template is None else template
    source = _read(path)
    environment = _environment(path)
    try:
        for key, value in values.items():
            refuse_unprintable(key, value)
        compiled = environment.from_string(source)
        _require_command(environment, source, path)
        script = compiled.render({k: _given(k, v) for k, v in values.items()}).rstrip("\n") + "\n"
    except jinja2.TemplateSyntaxError as error:
        where = error.filename if error.name else path
        hint = _COMMENT_HINT if "${#" in source and "comment" in str(error.message) else ""
        raise TemplateError(f"template {where}, line {error.lineno}: {error.message}{hint}") from error
    except jinja2.TemplateNotFound as error:
        raise TemplateError(f"template {path}: the template {error.name!r} that it names was not found") from error
    except TemplateError:
        raise
    except UsageError as error:
        raise TemplateError(f"template {path}: {error}") from error
    except Exception as error:  # a template is a program: what it calls may raise anything
        raise TemplateError(f"template {_line_of(error, path)}: {_message(error)}") from error
    _require_connection(script, values.get(CONNECTION_VARIABLE), path)
    return script


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TemplateError(f"template {path} is not UTF-8 text") from error
    except OSError as error:
        raise TemplateError(f"template {path} cannot be read: {error.strerror}") from error


def _environment(path: Path) -> jinja2.Environment:
    packaged = jinja2.FileSystemLoader(packaged_directory())
    loader = jinja2.ChoiceLoader([jinja2.PrefixLoader({"hpcq": packaged}), jinja2.FileSystemLoader(path.parent)])
    environment = jinja2.Environment(  # noqa: S701 - the output is shell, quoted by finalize, not HTML
        undefined=jinja2.StrictUndefined,
        finalize=quote_value,
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["raw"] = _raw
    return environment


def _given(name: str, value: object) -> object:
    if value is not None:
        return value
    return NotGiven(hint=f"{name} was not given; write {{% if {name} %}} … {{% endif %}} around it", name=name)


def _raw(value: object) -> _Raw:
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises, with the name
    return _Raw(value)


def quote_value(value: object) -> str:
    """Return ``value`` as it must stand in a shell script; called for every ``{{ … }}``."""
    if isinstance(value, jinja2.Undefined):
        return str(value)  # raises, with the name
    if isinstance(value, list | tuple):
        return " ".join(quote_value(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise _RefusedValueError(
            f"a value of type {type(value).__name__} cannot be put in a script: {str(value)[:60]!r}"
        )
    text = str(value)
    problem = unprintable(text)
    if problem is not None:
        raise _RefusedValueError(f"a value holds {problem}, which cannot go into a script: {text[:60]!r}")
    return text if isinstance(value, _Raw) else shlex.quote(text)


def _require_command(environment: jinja2.Environment, source: str, path: Path) -> None:
    """Refuse a template that would start no pilot (one that extends another leaves it to that)."""
    tree = environment.parse(source)
    if COMMAND_VARIABLE in jinja2.meta.find_undeclared_variables(tree):
        return
    if not any(jinja2.meta.find_referenced_templates(tree)):
        raise TemplateError(
            f"template {path} never uses {COMMAND_VARIABLE}, so no pilot would start; "
            f"end it with: exec {{{{ {COMMAND_VARIABLE} }}}}"
        )


def _require_connection(script: str, connection: object, path: Path) -> None:
    if isinstance(connection, str) and connection not in script:
        raise TemplateError(
            f"template {path} never uses {CONNECTION_VARIABLE}, which --connection inline needs; "
            'put {% include "hpcq/connection.sh.j2" %} before the line that starts the pilot'
        )


def _line_of(error: Exception, path: Path) -> str:
    """Return "FILE, line N" of the innermost template that ``error`` passed through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == "<template>":
            return f"{path}, line {frame.lineno}"
        if frame.filename.endswith(".j2") or Path(frame.filename) == path:
            return f"{frame.filename}, line {frame.lineno}"
    return str(path)


def _message(error: Exception) -> str:
    if isinstance(error, jinja2.UndefinedError | _RefusedValueError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def check_shell_syntax(script: str, origin: str, runner: CommandRunner) -> None:
    """Let ``bash -n`` read a script that bash would run, where there is a bash.

    Raises:
        TemplateError: a syntax error, with bash's own words.
    """
    interpreter = script.partition("\n")[0]
    if not interpreter.startswith("#!") or "bash" not in interpreter or shutil.which("bash") is None:
        return
    result = runner.run(["bash", "-n"], stdin=script)
    if result.status != 0:
        message = result.stderr.strip().splitlines()
        raise TemplateError(f"{origin}: the rendered script is not valid shell: {' '.join(message[:2])}")
