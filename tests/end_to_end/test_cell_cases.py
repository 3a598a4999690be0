"""The cases of `tests/data/cases`: small inputs that show how cells are read, over the whole program."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.support.cases import first_quick
from tests.support.workspace import SandboxApi, Workspace, serve_api

CASES = Path(__file__).parent.parent / "data" / "cases"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read an output: CSV or Parquet."""
    if path.suffix == ".parquet":
        return pl.read_parquet(path).to_dicts()
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", first_quick(3, sorted(path.name for path in CASES.iterdir())))
def test_case(tmp_path: Path, name: str) -> None:
    """A case has its exit code, sends its params, gives each row its status, and pays nothing in the second run."""
    expected = json.loads((CASES / name / "expected.json").read_text(encoding="utf-8"))
    workspace = Workspace(shutil.copytree(CASES / name, tmp_path / "case"))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        first, second = (workspace.run_in_process("run", "job.yaml", "--json", api=api) for _ in range(2))
        sent = sorted_params(api)

    assert [first.exit_code, second.exit_code] == [expected["exit_code"]] * 2, first.stderr
    assert sent == expected["sent"]
    assert second.json_output["submitted"] == 0
    assert first.json_output["requests"] == len(sent)
    output = next(path for path in workspace.folder.iterdir() if path.stem == "out")
    rows = read_rows(output)
    assert [row["enrich_status"] for row in rows] == expected["statuses"]
    assert first.json_output["left_out"] == expected["left_out"]
    for column, cells in expected.get("cells", {}).items():
        assert [row[column] for row in rows] == cells


def sorted_params(api: SandboxApi) -> list[dict[str, str]]:
    """Return the params of all accepted runs, in a stable order."""
    runs = [run["params"] for run in api.audit()["runs"]]
    return sorted(runs, key=lambda params: json.dumps(params, sort_keys=True))
