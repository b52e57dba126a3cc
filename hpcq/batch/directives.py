"""What makes ``#SBATCH`` lines mean what they say. Pure.

sbatch reads directives itself, with quoting rules of its own, and stops at the first line that is neither
blank nor a comment; a directive after it is ignored without a word. Rules: ``_get_argument`` and
``_opt_batch_script`` in Slurm's ``src/sbatch/opt.c`` (a backslash escapes the next character even inside
single quotes, where the shell keeps it).
"""

from __future__ import annotations

import shlex

from hpcq.errors import TemplateError


def check_directives(script: str, prefix: str, origin: str) -> None:
    """Refuse a script whose ``prefix`` lines ("#SBATCH") the batch system would ignore or read differently.

    Raises: TemplateError: no ``#!`` line; a directive after the first command; one with quotes that do not
    match or with a backslash that sbatch and the shell take differently. Lines are those of the rendered
    script.
    """
    lines = script.splitlines()
    if not lines or not lines[0].startswith("#!"):
        raise TemplateError(f"{origin}: the script must begin with #!, such as #!/bin/bash")
    command_line = 0
    for number, line in enumerate(lines, start=1):
        if line.startswith(prefix):
            where = f"{origin}: line {number} of the rendered script ({line[:80]})"
            if command_line:
                raise TemplateError(f"{where} comes after the first command (line {command_line}) and is ignored")
            _check_words(line[len(prefix) :], where)
        elif not command_line and line.strip() and not line.startswith("#"):
            command_line = number


def refuse_quotes(script: str, prefix: str, origin: str) -> None:
    """Refuse ``prefix`` lines whose words hold quotes: PBS reads one that is quoted inside another in its own way.

    Raises: TemplateError: names the line.
    """
    for number, line in enumerate(script.splitlines(), start=1):
        if line.startswith(prefix):
            for word in slurm_words(line[len(prefix) :]):
                if set("'\"") & set(word):
                    where = f"{origin}: line {number} of the rendered script ({line[:80]})"
                    raise TemplateError(f"{where} holds a quote, which PBS may read in another way: leave it out")


def _check_words(text: str, where: str) -> None:
    try:
        read = slurm_words(text)
        meant = shlex.split(text, comments=True)
    except ValueError as error:
        raise TemplateError(f"{where} cannot be read: {error}") from error
    if read != meant:
        raise TemplateError(f"{where} would be read as {shlex.join(read)}: a backslash cannot be used there")


def slurm_words(text: str) -> list[str]:
    """Split the rest of a ``#SBATCH`` line as sbatch does.

    Raises:
        ValueError: a quote without its match.
    """
    words: list[str] = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
        elif text[position] == "#":
            break
        else:
            word, position = _slurm_word(text, position)
            words.append(word)
    return words


def _slurm_word(text: str, position: int) -> tuple[str, int]:
    word, quote, escaped = "", "", False
    while position < len(text):
        character = text[position]
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "\"'":
            quote = character
        elif character == "#" or character.isspace():
            break
        else:
            word += character
        position += 1
    if quote:
        raise ValueError(f"No closing quotation for {quote}")
    return word, position
