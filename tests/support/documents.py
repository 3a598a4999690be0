"""Parses the project's documents and runs their commands in a checkout."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from enrich.cli import run_command

ROOT = Path(__file__).parents[2]
#: The documents for users.
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
#: Including the documents for developers.
ALL_DOCUMENTS = [*DOCUMENTS, *(ROOT / f"{name}.md" for name in ("ARCHITECTURE", "RELIABILITY", "CHANGELOG"))]


def fenced_blocks(document: Path, kind: str) -> list[str]:
    """Return the fenced blocks of one kind."""
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def runnable_blocks(document: Path) -> list[tuple[str, str]]:
    """Return the console and shell blocks in the document's order, each with its kind."""
    text = document.read_text(encoding="utf-8")
    return re.findall(r"^```(console|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code_text(document: Path, without: re.Pattern[str] | None = None) -> str:
    """Return all text marked as code, in blocks or inline, except in the parts that match a pattern."""
    text = document.read_text(encoding="utf-8")
    text = text if without is None else without.sub("", text)
    inside, outside = text.split("```")[1::2], "".join(text.split("```")[::2])
    return "\n".join([*inside, *re.findall(r"`([^`]+)`", outside)])


def relative_links(document: Path) -> list[str]:
    """Return the targets of the document's links to other files."""
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    return [target for target in targets if "://" not in target]


def enrich_invocations(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each `enrich …` in shell lines or in inline code."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        try:
            words = [*lexer, ";"]
        except ValueError:  # an apostrophe: prose, or another language
            continue
        while words:
            end = next(index for index, word in enumerate(words) if set(word) <= set(";|&<>"))
            command, words = words[:end], words[end + 1 :]
            at = next((index for index, word in enumerate(command) if Path(word).name == "enrich"), None)
            # Before `enrich`, only variables, a prompt and crontab times may stand; after it, a command or an option.
            if at is not None and all("=" in word or set(word) <= set("$0123456789*/,-") for word in command[:at]):
                arguments = command[at + 1 :]
                if arguments and re.fullmatch(r"[a-z]+|--?[a-z].*", arguments[0]):
                    yield arguments


def make_checkout(folder: Path) -> Path:
    """Make a checkout whose .venv is the one that runs the tests."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("jobs", "sample_data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".enrich"))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def shell_environ(folder: Path) -> dict[str, str]:
    """Return the environment of a document's commands."""
    path = f"{folder}/.venv/bin{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(folder), "LANG": "C.UTF-8"}


def run_shell(command: str, folder: Path, **environ: str) -> str:
    """Run a document's shell command and return its output."""
    # The checkout has a .venv already: make must not install it again.
    command = command.replace("make demo", "make --old-file=.venv/run --no-print-directory demo")
    result = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=shell_environ(folder) | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, f"{command} says:\n{result.stdout}"
    return result.stdout.replace(f"{folder}/", "")


def run_words(command: str, folder: Path) -> str:
    """Do the same, but run `enrich` in this process when its arguments are plain words: starts faster."""
    words = shlex.split(command)
    if words[0] != "enrich" or set(command) & set("|&;<>"):
        return run_shell(command, folder)
    output = StringIO()
    with (
        chdir(folder),
        patch.dict(os.environ, shell_environ(folder), clear=True),
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        code = run_command(words[1:])
    assert code == 0, f"{command} says:\n{output.getvalue()}"
    return output.getvalue().replace(f"{folder}/", "")


def console_entries(block: str) -> Iterator[tuple[str, str]]:
    """Yield each `$ command` of a console block with the output below it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def output_pattern(shown: str) -> str:
    """Return a pattern for the output: any times, random names and number of polls; `…` matches any text."""
    pattern = re.escape(shown.strip())
    pattern = pattern.replace("…", ".*")
    pattern = re.sub(r"\d{4}\\-\d\d\\-\d\dT\d\d:\d\d:\d\dZ", r"\\S{20}", pattern)
    pattern = re.sub(r"polls(\\ )+\d+(\\ )+\d\\.\d\\ ", r"polls +\\d+ +\\d\\.\\d\\ ", pattern)
    return re.sub(r"(?<=\\ )\d:\d\d:\d\d\b", r"\\d:\\d\\d:\\d\\d", pattern)


def check_console(document: Path, folder: Path) -> int:
    """Run every `$ command` of a document in order and compare its output; return the number of commands."""
    return sum(check_console_block(block, folder, run_words) for block in fenced_blocks(document, "console"))


def check_console_block(block: str, folder: Path, run: Callable[[str, Path], str] = run_shell) -> int:
    """Run every `$ command` of a console block and compare its output; return the number of commands."""
    entries = list(console_entries(block))
    for command, expected in entries:
        output = run(command, folder).strip()
        assert re.fullmatch(output_pattern(expected), output, re.DOTALL), f"{command} says:\n{output}"
    return len(entries)
