"""A job's `where` is refused when it is too long to evaluate in time or is about more than one row."""

from __future__ import annotations

import json

import pytest

from tests.support.workspace import ProgramResult, SandboxApi, Workspace, make_leads

VALID_EXPRESSIONS = {
    "alternatives": " OR ".join(f"Note = '{number}'" for number in range(200)) + " OR TRUE",
    "a long list": f"Note NOT IN ({','.join(repr(str(number)) for number in range(20_000))})",
    "words in quotes": "\"Note\" <> 'SUM(x) OVER select -- '' count(*)' AND TRUE",
    "words in comments": "TRUE /* count(*) ' */ -- row_number() '",
    "nested": "COALESCE(" * 20 + "Note" + ", '')" * 20 + " IS NOT NULL",
    "an impossible number": "1/0 > 1 OR TRUE",
}
REFUSED_EXPRESSIONS = {
    "3,000 AND": " AND ".join(["Note = 'a'"] * 3_000),
    "30,000 OR": " OR ".join(["Note = 'a'"] * 30_000),
    "sums": f"1{'+1' * 20_000} > 0",
    "texts": f"Note{'||Note' * 5_000} > ''",
    "brackets": f"{'(' * 5_000}TRUE{')' * 5_000}",
    "NOT": f"{'NOT ' * 5_000}TRUE",
    "minus": f"{'- ' * 5_000}1 > 0",
    "CASE": f"CASE {' '.join(['WHEN TRUE THEN TRUE'] * 5_000)} END",
    "calls": "COALESCE(" * 5_000 + "Note" + ")" * 5_000 + " = ''",
    "memory": "LPAD(Note, 999999999999) = ''",
    "memory, too": "rpad (Note, 99999999999, 'x') = ''",
    "a null": "NULL",
    "a text": "Note",
    "several columns": "*",
    "two columns": "TRUE) AS selected, (Note",
    "two statements": "TRUE) AS selected FROM leads; SELECT (TRUE",
} | {
    function: function
    for function in (
        "ROW_NUMBER() > 1",
        "row_number () = 1",
        "RANK() = 1",
        "NTILE(2) = 1",
        "LAG(Note) = 'a'",
        "LEAD(Note, 1) IS NULL",
        "SUM(1) OVER () > 1",
        "FIRST_VALUE(Note) = 'a'",
        "COUNT(*) > 1",
        "COUNT(DISTINCT Note) > 1",
        "MAX(Note) = 'a'",
        "Note = MAX(Note)",
        "Note = FIRST(Note)",
        "COALESCE(LAST(Note), '') <> ''",
        "STRING_AGG(Note, ',') = ''",
        "ARRAY_AGG(Note) IS NULL",
        "UNNEST(STRING_TO_ARRAY(Note, ',')) = 'a'",
        "Note IN (SELECT Note FROM leads)",
        "EXISTS (SELECT 1)",
        "COLUMNS('.*') = 'a'",
        "MEDIAN(Note) = 1",
        "TRUE -- ' \n AND ROW_NUMBER() > 1 --'",
    )
}


def run_job(workspace: Workspace, where: str) -> ProgramResult:
    """Run the job with a `where` in its own process, because it may panic or hang."""
    text = workspace.write_job().read_text(encoding="utf-8")
    workspace.job_file.write_text(f"{text}where: {json.dumps(where)}\n", encoding="utf-8")
    return workspace.run_subprocess("run", "job.yaml", "--json", api=SandboxApi("http://127.0.0.1:9/v1", "key-77"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in REFUSED_EXPRESSIONS])
def test_non_row_expressions_are_refused(workspace: Workspace, name: str) -> None:
    """An expression about several rows is exit 2 with the key's name, quickly and without a crash."""
    workspace.write_leads(make_leads(3))
    result = run_job(workspace, REFUSED_EXPRESSIONS[name])
    assert result.exit_code == 2, result.stderr
    assert "job.yaml:" in result.stderr
    assert "where: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.long
@pytest.mark.parametrize("name", VALID_EXPRESSIONS)
def test_long_row_expressions_work(api: SandboxApi, workspace: Workspace, name: str) -> None:
    """A long expression about one row works and keeps every row."""
    workspace.write_leads(make_leads(3))
    text = workspace.write_job().read_text(encoding="utf-8")
    workspace.job_file.write_text(f"{text}where: {json.dumps(VALID_EXPRESSIONS[name])}\n", encoding="utf-8")
    result = workspace.run_in_process("run", "job.yaml", api=api)
    assert (result.exit_code, result.stderr) == (0, "")
    assert {row["enrich_status"] for row in workspace.read_output()} <= {"found", "not_found"}
    assert len(workspace.read_output()) == 3
