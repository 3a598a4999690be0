"""Runs the benchmarks one after another, each within its time, and prints their tables; `make bench`.

`python -m benchmarks --only overhead,compare --write` also puts the tables into BENCHMARKS.md, each below the words of
its script.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "BENCHMARKS.md"
GENERATED = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end -->)", re.DOTALL)
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Script:
    """One file of this folder, its options, and how many seconds it may take."""

    name: str
    options: tuple[str, ...]
    seconds: float

    @property
    def path(self) -> Path:
        """Its file."""
        return HERE / f"{self.name}.py"

    @property
    def words(self) -> str:
        """What it says about itself."""
        return ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or ""


#: Together under five minutes.
SCRIPTS = (
    Script("overhead", ("--rows", "3000", "--rounds", "2"), 90),
    Script("compare", ("--rows", "3000", "--rounds", "2"), 60),
    Script("allowance", (), 30),
    Script("polls", (), 30),
    Script("million", ("--rows", "200000"), 50),
    Script("processes", ("--rows", "2000", "--rounds", "1"), 40),
)


def told(script: Script) -> str:
    """Run a script and return what it prints; one that takes too long is ended, with all that it started."""
    command = [sys.executable, "-m", f"benchmarks.{script.name}", *script.options]
    with subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            printed, _ = process.communicate(timeout=script.seconds)
        except subprocess.TimeoutExpired:
            return f"stopped: it took longer than {script.seconds:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return printed.rstrip() if process.returncode == 0 else f"failed with exit code {process.returncode}"


def machine() -> str:
    """Say when and on what this was measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    kernel = platform.release().partition("-")[0]
    return (
        f"{datetime.now(UTC).date()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {kernel}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def section(script: Script, table: str) -> str:
    """Write one table below the words of its script."""
    return f"## {script.name.capitalize()}\n\n{script.words}\n\n```text\n{table}\n```\n"


def with_tables(document: str, measured_on: str, sections: Sequence[str]) -> str:
    """Put sections into a document, in place of those that it has."""
    return GENERATED.sub(lambda _: "\n".join([f"Measured {measured_on}.\n", *sections]), document)


def chosen(only: str | None, scripts: Sequence[Script] = SCRIPTS) -> list[Script]:
    """Choose the scripts that are there, or those that are named. Raises KeyError for a name that is none."""
    by_name: Mapping[str, Script] = {script.name: script for script in scripts if script.path.exists()}
    return [by_name[name] for name in only.split(",")] if only else list(by_name.values())


def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--only", help="some of: " + ", ".join(script.name for script in chosen(None)))
    parser.add_argument("--write", action="store_true", help="put the tables into BENCHMARKS.md")
    options = parser.parse_args()
    sections = []
    print(machine())
    for script in chosen(options.only):
        print(f"\n{script.name} (at most {script.seconds:g} s)", flush=True)
        table = told(script)
        print(table, flush=True)
        sections.append(section(script, table))
    if options.write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), machine(), sections), encoding="utf-8")


if __name__ == "__main__":
    main()
