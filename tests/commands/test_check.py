"""`enrich check`: lists every problem of a job before it runs, without network access."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from enrich.databar.description import Waterfall, description_changes
from enrich.ledger import records
from enrich.sandbox.catalogue import WATERFALLS
from tests.support.ledger import CALL
from tests.support.workspace import JOB, SandboxApi, Workspace, make_leads


def test_valid_job_output(workspace: Workspace) -> None:
    """Reports the rows, the requests to send and the source of the waterfall's description."""
    workspace.write_leads([*make_leads(4), ["Ada", "Byron", "", "", ""]])
    result = workspace.run_in_process("check", "job.yaml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "ok: job: 5 leads, 4 can be sent, email_getter as described by the documentation of 2026-11\n"
        "  first_name ← First Name   5 of 5 filled\n"
        "  last_name ← Last Name   5 of 5 filled\n"
        "  company ← Website (domain), Email (domain)   4 of 5 filled   e.g. company0.example\n"
    )


def test_few_sendable_rows_are_a_warning(workspace: Workspace, api: SandboxApi) -> None:
    """Below 80 % it warns, by param, and the exit code stays 0; rows that the job leaves out don't count."""
    rows = [*make_leads(7), ["Ada", "Byron", "", "", ""], ["", "Byron", "a.example", "", ""], ["", "B", "", "", ""]]
    workspace.write_leads([*rows, *([["", "", "", "", "no"]] * 20)])
    workspace.write_job(where="Note <> 'no'", params="{first_name: First Name, last_name: Last Name, company: Website}")

    result = workspace.run_in_process("check", "job.yaml")

    assert result.exit_code == 0
    warning = "only 7 of 10 leads (70%) can be sent: first_name is missing in 2, company is missing in 2"
    assert result.stderr == f"warning: {warning}\n"
    params = workspace.run_in_process("check", "job.yaml", "--json").json_output["params"]
    assert params["company"] == {"filled": 8, "missing": 2}
    planned = workspace.run_in_process("plan", "job.yaml", api=api)
    assert planned.exit_code == 0
    assert "\nSkipped: 3 leads (first_name blank 2, company 1)\n" in planned.stdout
    assert workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output["missing"] == {
        "first_name": 2,
        "company": 2,
    }


@pytest.mark.parametrize("is_stepped", [False, True])
def test_key_of_the_change_feed(workspace: Workspace, *, is_stepped: bool) -> None:
    """Warns of leads without a key, and of those that share one. Leads that the job leaves out don't count."""
    notes = ["1", "2", "2", "3", "3", "3", "", " ", "left out", "left out"]
    workspace.write_leads([[*lead[:4], note] for lead, note in zip(make_leads(10), notes, strict=True)])
    if is_stepped:
        files, step = JOB.split("waterfall:")
        step = f"- name: mail\nwaterfall:{step[: step.index('limits:')]}".replace("\n", "\n  ")
        workspace.write_job(f"{files}steps:\n{step}")
    more = {"where": "Note <> 'left out'", "changes": "{path: feed.csv, key: [Note]}"}
    workspace.write_job(workspace.job_file.read_text(), **more)

    result = workspace.run_in_process("check", "job.yaml")

    assert (result.exit_code, result.stderr.splitlines()) == (
        0,
        [
            "warning: `changes.key` (Note) is blank in 2 leads: the change feed does not say which they are",
            "warning: `changes.key` (Note) is not unique: 5 leads share theirs with another one",
        ],
    )
    workspace.write_job(workspace.job_file.read_text(), changes="{path: feed.csv, key: [Note, Last Name]}")
    assert workspace.run_in_process("check", "job.yaml").stderr == ""


def test_param_from_a_status_column(workspace: Workspace, api: SandboxApi) -> None:
    """A param may read a status column of an earlier output, although the new output replaces that column."""
    workspace.write_leads(make_leads(3))
    workspace.run_in_process("run", "job.yaml", api=api)
    (workspace.folder / "out.csv").rename(workspace.folder / "leads.csv")
    workspace.write_job(
        params="{first_name: First Name, last_name: Last Name, company: enrich_provider}",
        columns="{again: email}",
    )

    for command in ("check", "plan"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        assert (result.exit_code, "Traceback" in result.stderr) == (0, False), result.stderr


def test_leaves_no_files(workspace: Workspace) -> None:
    """Leaves no ledger, lock file or output behind."""
    workspace.write_leads(make_leads(1))
    before = sorted(workspace.folder.rglob("*"))
    assert workspace.run_in_process("check", "job.yaml").exit_code == 0
    assert workspace.run_in_process("check", "job.yaml", "--sandbox", "--online").exit_code == 0
    assert sorted(workspace.folder.rglob("*")) == before


def test_needs_no_network_or_key(workspace: Workspace) -> None:
    """Passes when the API is unreachable; refuses a base URL that would send the key unencrypted."""
    workspace.write_leads(make_leads(1))
    assert workspace.run_in_process("check", "job.yaml", DATABAR_BASE_URL="http://127.0.0.1:9/v1").exit_code == 0
    assert workspace.run_in_process("check", "job.yaml", DATABAR_BASE_URL="http://api.example/v1").exit_code == 2


def test_all_problems_are_listed(workspace: Workspace) -> None:
    """Reports every problem of params, columns, expressions and paths at once, each with its line."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(
        params="{first_name: Frist Name, last_name: Surname, company: {column: [Website, Mail], transform: [domain]}}",
        only_if_empty="[Email, Phone]",
        where="Country = 'DE'",
        rejects="leads.csv",
        suppress="nobody.txt",
    )
    result = workspace.run_in_process("check", "job.yaml")

    assert (result.exit_code, result.stdout) == (2, "")
    problems = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for message in (
        "`Frist Name`",
        "`Surname`",
        "`Mail`",
        "`Phone`",
        "`Country`",
        "`rejects` and `input`",
        "`suppress`",
    ):
        assert sum(message in problem for problem in problems) == 1, message
    assert len(problems) == 7
    assert "did you mean `First Name`?" in result.stderr
    assert re.search(r"job.yaml:\d+: only_if_empty.1:", result.stderr)


def test_missing_required_params(workspace: Workspace) -> None:
    """Warns of missing required params by the documentation when the ledger has no description."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(params="{first_name: First Name}")
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == 0
    assert "requires `last_name`" in result.stderr
    assert "requires `company`" in result.stderr


def test_unknown_param_is_a_note(workspace: Workspace) -> None:
    """Reports an unknown param as a note, because the documentation may be older than the API."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(JOB.replace("columns:\n", "  linkedin: Note\ncolumns:\n"))
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == 0
    assert "note: " in result.stderr
    assert "linkedin" in result.stderr


def test_undocumented_waterfall_is_a_note(workspace: Workspace) -> None:
    """Reports an undocumented waterfall as a note, because it may still exist."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(waterfall="moon_getter")
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == 0
    assert "--online" in result.stderr


def test_ledger_waterfall_overrides_documentation(workspace: Workspace, api: SandboxApi) -> None:
    """After a run, uses the API's stored description instead of the documentation: an unknown param is an error."""
    workspace.write_leads(make_leads(1))
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    assert "as described by the API at the last run" in workspace.run_in_process("check", "job.yaml", api=api).stdout

    workspace.write_job(
        JOB.replace("columns:\n", "  linkedn: Note\ncolumns:\n"), email_verifier="99", enrichments="[7]"
    )
    result = workspace.run_in_process("check", "job.yaml", api=api)
    assert result.exit_code == 2
    assert "did you mean `linkedin`?" in result.stderr
    assert "no provider 7" in result.stderr


def test_ledger_of_other_api_is_refused(workspace: Workspace, api: SandboxApi) -> None:
    """Refuses a ledger that holds the answers of another API."""
    workspace.write_leads(make_leads(1))
    workspace.run_in_process("run", "job.yaml", api=api)
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == 2
    assert "belongs to another api host: 127.0.0.1, not api.databar.ai" in result.stderr


def test_damaged_ledger_is_reported(workspace: Workspace, api: SandboxApi) -> None:
    """Reports a damaged ledger before a run fails on it."""
    workspace.write_leads(make_leads(1))
    workspace.run_in_process("run", "job.yaml", api=api)
    for path in workspace.ledger_path.parent.glob("job.db*"):
        path.write_bytes(b"SQLite format 3\0" + b"\x17" * 4096)
    result = workspace.run_in_process("check", "job.yaml", api=api)
    assert result.exit_code == 5
    assert "damaged" in result.stderr


@pytest.mark.parametrize(
    ("changed", "message", "code"),
    [
        ({"output": "leads.csv"}, "`output` and `input` are the same file", 2),
        ({"output": "job.yaml.csv", "rejects": "job.yaml.csv"}, "are the same file", 2),
        ({"ledger": "out.csv"}, "`output` and `ledger` are the same file", 2),
        ({"output": "leads.csv/out.csv"}, "is no folder", 5),
        ({"notify": "nobody.txt"}, "`notify` cannot be read", 5),
        ({"input": "none.csv"}, "does not exist", 5),
        ({"ledger": "."}, "the ledger cannot be opened: this is a folder", 5),
    ],
)
def test_invalid_paths(workspace: Workspace, changed: dict[str, str], message: str, code: int) -> None:
    """Reports an invalid path once, before the run, with the run's exit code."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(**changed)
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(workspace: Workspace) -> None:
    """Reports an unwritable folder with exit 5, as the run would."""
    workspace.write_leads(make_leads(1))
    (workspace.folder / "out").mkdir(mode=0o500)
    workspace.write_job(output="out/leads.csv")
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == 5
    assert "`output` cannot be written" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_unreadable_ledger(workspace: Workspace) -> None:
    """Refuses an unreadable ledger; treating it as new would pay for everything again."""
    workspace.write_leads(make_leads(1))
    (workspace.folder / ".enrich").mkdir(mode=0o000)
    checked = workspace.run_in_process("check", "job.yaml")
    doctor_result = workspace.run_in_process("doctor", "job.yaml", "--offline", "--env", "DATABAR_API_KEY=key")
    (workspace.folder / ".enrich").chmod(0o700)
    assert (checked.exit_code, doctor_result.exit_code) == (5, 5)
    assert "Permission denied" in checked.stderr
    assert "Permission denied" in doctor_result.stdout


def test_input_is_read_completely(workspace: Workspace) -> None:
    """Finds a row that is too long anywhere in the file."""
    workspace.write_leads([*make_leads(30), ["too", "many", "", "", "", "cells"]])
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == 5
    assert "row 31" in result.stderr
    workspace.write_job(waterfall="moon_getter")  # of which nothing is known
    result = workspace.run_in_process("check", "job.yaml")
    assert (result.exit_code, "row 31" in result.stderr) == (5, True)


def test_missing_column_and_ragged_row(workspace: Workspace) -> None:
    """A column that is missing is reported beside a row that cannot be read, and each of them once."""
    workspace.write_leads([*make_leads(1), ["short"]], header=["First Name", "Name", "Website", "Email", "Note"])
    result = workspace.run_in_process("check", "job.yaml", "--json")
    missing, ragged = (problem["message"] for problem in result.json_output["problems"])
    assert (result.exit_code, "no column `Last Name`" in missing, "row 2 (line 3)" in ragged) == (2, True, True)


def test_skipped_rows_are_counted(workspace: Workspace, api: SandboxApi) -> None:
    """Counts skipped rows (blank required param, invalid address) as a run does, with documentation or ledger."""
    workspace.write_leads([["", "", "", email, ""] for email in ("ada@engine.example", "none", "")])
    workspace.write_job(waterfall="person_getter", params="{email: Email}", columns="{found_name: last_name}")
    for _ in range(2):
        assert "3 leads, 1 can be sent" in workspace.run_in_process("check", "job.yaml", api=api).stdout
        assert workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output["invalid"] == 2


def test_failing_expression_is_reported(workspace: Workspace) -> None:
    """Reports an expression that fails on the cells although its columns exist."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(where="CAST(Note AS INT) > 1")
    result = workspace.run_in_process("check", "job.yaml")
    assert result.exit_code == 2
    assert "TRY_CAST" in result.stderr


def test_json_is_one_object(workspace: Workspace) -> None:
    """Prints one JSON object, also when there are problems."""
    workspace.write_leads(make_leads(1))
    assert workspace.run_in_process("check", "job.yaml", "--json").json_output == {
        "exit_code": 0,
        "job": "job",
        "rows": 1,
        "can_be_asked": 1,
        "left_out": {},
        "params": {name: {"filled": 1, "missing": 0} for name in ("first_name", "last_name", "company")},
        "waterfall": "email_getter",
        "described_by": "the documentation of 2026-11",
        "changes": [],
        "notes": [],
        "problems": [],
    }
    workspace.write_job(only_if_empty="[Phone]")
    output = workspace.run_in_process("check", "job.yaml", "--json").json_output
    assert output["exit_code"] == 2
    assert output["error"] == output["problems"][0]["message"]


@pytest.mark.long
def test_online_reports_description_changes(workspace: Workspace, api: SandboxApi) -> None:
    """Reports what has changed between the API's waterfall and the ledger's copy."""
    workspace.write_leads(make_leads(1))
    workspace.run_in_process("run", "job.yaml", api=api)
    same = workspace.run_in_process("check", "job.yaml", "--online", api=api)
    assert (same.exit_code, same.stderr) == (0, "")
    assert "as described by the API now" in same.stdout

    from enrich.ledger.database import Database  # noqa: PLC0415

    ledger = Database(workspace.ledger_path)
    described, providers = records.load_description(ledger, CALL) or ({}, None)
    described["available_enrichments"][0]["price"] = 0.25
    records.save_description(ledger, CALL, described, providers or [])
    ledger.close()

    changed = workspace.run_in_process("check", "job.yaml", "--online", api=api)
    assert changed.exit_code == 0
    assert "note: provider 833 Mailhound: 0.25 credits before, 0.5 credits now (more expensive)" in changed.stderr


@pytest.mark.parametrize(("environ", "code"), [({"DATABAR_API_KEY": "wrong"}, 3), ({"DATABAR_API_KEY": ""}, 3)])
def test_online_needs_a_key(workspace: Workspace, api: SandboxApi, environ: dict[str, str], code: int) -> None:
    """Fails without a key, with the run's exit code."""
    workspace.write_leads(make_leads(1))
    assert workspace.run_in_process("check", "job.yaml", "--online", api=api, **environ).exit_code == code


def test_waterfall_change_messages() -> None:
    """Describes changes of params, fields, providers, verifiers, prices and defaults."""
    before = WATERFALLS["email_getter"].to_json()
    now = WATERFALLS["email_getter"].to_json()
    assert list(description_changes(Waterfall.model_validate(before), Waterfall.model_validate(now))) == []
    now["input_params"] = [*now["input_params"][1:3], {"name": "country", "required": True}]
    now["input_params"][0]["required"] = False
    now["output_fields"] = [{"name": "score"}]
    mailhound, peoplegrid, _, profilewell, apex = now["available_enrichments"]
    now["available_enrichments"] = [
        mailhound | {"price": "0.50"},
        peoplegrid | {"price": 0.4},
        profilewell | {"price": None},
        apex | {"enabled_by_default": True},
        {"id": 5, "name": "Newcomer", "price": 9},
    ]
    now["email_verifiers"] = now["email_verifiers"][:1]

    result = list(description_changes(Waterfall.model_validate(before), Waterfall.model_validate(now)))

    assert result == [
        "param country: new, required",
        "param first_name: removed",
        "param last_name: no longer required",
        "param linkedin: removed",
        "field email: removed",
        "field score: new",
        "provider 966 Peoplegrid: 1 credit before, 0.4 credits now (cheaper)",
        "provider 701 Inboxly: removed",
        "provider 745 Profilewell: 2 credits before, price unknown now",
        "provider 5 Newcomer: new, 9 credits",
        "verifier 12 Bouncewatch: removed",
        "default providers: now 833, 966, 745, 113, 5; runs keep the old ones",
    ]


def test_missing_job_file(workspace: Workspace, tmp_path: Path) -> None:
    """Exits with 2 when the job file is missing, as all commands do."""
    assert workspace.run_in_process("check", str(tmp_path / "none.yaml")).exit_code == 2


def test_header_with_line_break_is_one_line(workspace: Workspace) -> None:
    """A spreadsheet's header with a line break is one line on the screen."""
    (workspace.folder / "leads.csv").write_text('"First\nName",Last,Site\nAda,Byron,a.example\n')
    workspace.run_in_process("init", "leads.csv", "--waterfall", "email_getter", "--offline")
    result = workspace.run_in_process("check", "leads.yaml")
    assert "  first_name ← First\\nName   1 of 1 filled\n" in result.stdout
