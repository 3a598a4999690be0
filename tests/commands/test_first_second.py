"""What the commands import that people wait for: time at the start is time spent on imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.cases import first_quick
from tests.support.workspace import SandboxApi, Workspace

#: Runs a command as `enrich` does, then prints the names of all modules that it imported. Those that the interpreter
#: itself imports at its start are not among them, such as the `sitecustomize` of some Linux distributions.
_PRINT_MODULES = """
import sys
of_the_interpreter = set(sys.modules)
from enrich.cli import main

main()
print("modules:", *(sys.modules.keys() - of_the_interpreter))
"""
#: It comes with a compiler of extension modules.
_OF_A_COMPILER = {"cython_runtime"}
_PYDANTIC = {"annotated_types", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection"}
_READS_LEDGER = {"click", "msgspec", "yaml"} | _PYDANTIC
#: Slow parts of the standard library.
_SLOW = {"asyncio", "concurrent", "http", "multiprocessing", "ssl", "unittest"}


def imported(*arguments: str) -> set[str]:
    """Return the modules that a command imports."""
    command = [sys.executable, "-c", _PRINT_MODULES, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    modules = done.stdout.rpartition("modules:")[2].split()
    assert "enrich.cli" in modules
    return set(modules)


def third_party(modules: set[str]) -> set[str]:
    """Return the packages that are neither ours nor of the standard library."""
    packages = {name.partition(".")[0] for name in modules} - {"enrich"} - _OF_A_COMPILER
    return {name for name in packages if name not in sys.stdlib_module_names and not name.startswith("_")}


def test_help_imports() -> None:
    """`enrich --help` imports click, msgspec and what prints an error, and no command."""
    modules = imported("--help")

    assert third_party(modules) == {"click", "msgspec", "typing_extensions"}
    assert {name for name in modules if name.startswith("enrich")} == {
        "enrich",
        "enrich.cli",
        "enrich.commands",
        "enrich.commands.streams",
        "enrich.databar",
        "enrich.databar.text_filter",
        "enrich.errors",
        "enrich.exit_codes",
        "enrich.models",
    }
    assert not modules & _SLOW


@pytest.mark.parametrize("command", first_quick(0, ["status", "runs"]))
def test_status_imports(api: SandboxApi, workspace: Workspace, command: str) -> None:
    """`status` and `runs` import what reads a job and a ledger: no polars, no HTTP, nothing that runs a job."""
    workspace.write_leads([["Ada", "Quill", "quill.example"]])
    workspace.run_job(api)

    modules = imported(command, str(workspace.job_file))

    assert third_party(modules) <= _READS_LEDGER
    heavy = ("enrich.run", "enrich.rows", "enrich.files", "enrich.monitoring", "enrich.cluster", "enrich.report")
    light = {"enrich.run", "enrich.run.balance", "enrich.run.progress", "enrich.run.terminal_text"}
    assert {name for name in modules if name.startswith(heavy)} == light
    assert not modules & _SLOW


@pytest.mark.long
def test_check_imports(api: SandboxApi, workspace: Workspace) -> None:
    """`check` reads the input, so it needs polars, but nothing that runs a job, no report, no `init` and no HTTP."""
    workspace.write_leads([["Ada", "Quill", "quill.example"]])
    workspace.run_job(api)

    modules = imported("check", str(workspace.job_file))

    assert third_party(modules) <= _READS_LEDGER | {"polars", "python_calamine"}
    assert {name for name in modules if name.startswith("enrich.run.")} == {"enrich.run.preflight"}
    assert not any(name.startswith("enrich.report") for name in modules)
    assert not {name for name in modules if name.startswith("enrich.commands.init")}
