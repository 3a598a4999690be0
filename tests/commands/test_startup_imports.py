"""The packages that `plan` and `run` import; test_first_second.py holds the lists of the shorter commands."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.cases import in_turn
from tests.support.workspace import SandboxApi, Workspace, make_leads

#: Runs the command with these arguments, then prints the packages beside Python's own that were imported.
SCRIPT = """
import sys
of_the_interpreter = set(sys.modules)
from enrich.cli import main
code = main()
assert not code, code
names = {name.partition(".")[0] for name in sys.modules.keys() - of_the_interpreter} - sys.stdlib_module_names
print(*(name for name in names if not name.startswith("_")), file=sys.stderr)
"""
#: `annotated_types` to `typing_inspection` are those of pydantic, and `cython_runtime` is of PyYAML.
INPUT = {
    *("click", "databar_enrich", "enrich", "msgspec", "polars", "python_calamine"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
    *("yaml", "cython_runtime"),
}
API = INPUT | {"aiohappyeyeballs", "certifi", "httptools", "idna"}
RUN = API | {"uvloop"}


@pytest.mark.long
@in_turn(
    ("command", "allowed"),
    [("plan", API), ("run", RUN)],
    ids=["plan", "run"],
)
def test_commands_import_what_they_need(workspace: Workspace, api: SandboxApi, command: str, allowed: set[str]) -> None:
    """A command whose job has nothing to send, and no web addresses, imports these packages at most."""
    workspace.write_job(params="{first_name: First Name, last_name: Last Name, company: Website}")
    workspace.write_leads(make_leads(2))
    workspace.run_in_process("run", "job.yaml", api=api)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, command, "job.yaml"],
        cwd=workspace.folder,
        env=workspace.environment(api),
        capture_output=True,
        text=True,
        check=True,
    )

    assert set(result.stderr.splitlines()[-1].split()) <= allowed
