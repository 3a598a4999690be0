"""Runs the benchmarks one after another, each with a time limit, and prints their tables; `make bench`.

`python -m benchmarks --only overhead compare --write` also writes the tables into BENCHMARKS.md, each below the
docstring of its script.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "BENCHMARKS.md"
GENERATED = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end -->)", re.DOTALL)
SECTION = re.compile(r"^(?=## )", re.MULTILINE)
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Script:
    """A script of this folder, its options, and its time limit in seconds."""

    name: str
    options: tuple[str, ...]
    timeout_s: float

    @property
    def path(self) -> Path:
        """The script's file."""
        return HERE / f"{self.name}.py"

    @property
    def docstring(self) -> str:
        """The script's module docstring."""
        return ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or ""


#: Together under five minutes on an idle machine. A script is killed at its time limit.
SCRIPTS = (
    Script("overhead", ("--rows", "10000", "--seconds", "110"), 165),
    Script("compare", ("--rows", "5000", "--seconds", "30"), 55),
    Script("allowance", (), 20),
    Script("polls", (), 20),
    Script("in_flight", (), 60),
    Script("million", ("--growth", "10000,100000"), 60),
    Script("startup", (), 40),
)


def run_script(script: Script) -> str:
    """Run a script and return its output. At the time limit, it is killed with all processes that it started.

    Raises RuntimeError when it timed out or failed.
    """
    command = [sys.executable, "-m", f"benchmarks.{script.name}", *script.options]
    with subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            printed, _ = process.communicate(timeout=script.timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{script.name} took longer than {script.timeout_s:g} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"{script.name} failed with exit code {process.returncode}")
    return str(printed).rstrip()


def describe_machine() -> str:
    """Return the date and the machine of this measurement."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    kernel = platform.release().partition("-")[0]
    return (
        f"{datetime.now(UTC).date()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {kernel}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def format_section(script: Script, table: str) -> str:
    """Return the section of a script: its docstring, then its table."""
    return (
        f"## {script.name.capitalize()}\n\n{script.docstring}\n\n"
        f"Measured {describe_machine()}:\n\n```text\n{table}\n```\n\n"
    )


def insert_tables(document: str, sections: Sequence[str]) -> str:
    """Insert sections into a document; they replace those with the same heading."""

    def merge_sections(found: re.Match[str]) -> str:
        parts = [part for part in SECTION.split(found[0]) if part.strip()]
        return "".join({part.splitlines()[0]: part for part in [*parts, *sections]}.values())

    return GENERATED.sub(merge_sections, document)


def main() -> None:
    """Run the chosen scripts."""
    present = {script.name: script for script in SCRIPTS if script.path.exists()}
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=present, default=list(present))
    parser.add_argument("--write", action="store_true", help="put the tables into BENCHMARKS.md")
    options = parser.parse_args()
    print(f"{describe_machine()}\n")
    sections, failures = [], []
    for script in (present[name] for name in options.only):
        print(f"{script.name} (at most {script.timeout_s:g} s)", flush=True)
        try:
            table = run_script(script)
        except RuntimeError as error:
            failures.append(str(error))
        else:
            print(f"{table}\n", flush=True)
            sections.append(format_section(script, table))
    if options.write:
        DOCUMENT.write_text(insert_tables(DOCUMENT.read_text(encoding="utf-8"), sections), encoding="utf-8")
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
