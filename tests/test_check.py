"""`enrich check`: all that is wrong with a job, before it runs and without network."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from enrich.api.waterfall import Waterfall
from enrich.sandbox.catalogue import WATERFALLS
from enrich.setup.drift import differences
from tests.harness import JOB, Api, Office, people


def test_a_good_job_is_one_line(office: Office) -> None:
    """Rows, what can be asked, and where the waterfall's description comes from."""
    office.write_leads([*people(3), ["", "", "", "", ""]])
    done = office.command("check", "job.yaml")
    assert (done.code, done.stderr) == (0, "")
    said = "ok: job: 4 rows, 3 can be asked, email_getter as known from the documentation of 2026-11\n"
    assert done.stdout == said


def test_it_leaves_nothing_behind(office: Office) -> None:
    """Neither a ledger nor a lock nor an output."""
    office.write_leads(people(1))
    before = sorted(office.folder.rglob("*"))
    assert office.command("check", "job.yaml").code == 0
    assert office.command("check", "job.yaml", "--sandbox", "--online").code == 0
    assert sorted(office.folder.rglob("*")) == before


def test_it_needs_no_network_and_no_key(office: Office) -> None:
    """An address where nobody answers changes nothing; one that tells the key in the clear is refused."""
    office.write_leads(people(1))
    assert office.command("check", "job.yaml", DATABAR_BASE_URL="http://127.0.0.1:9/v1").code == 0
    assert office.command("check", "job.yaml", DATABAR_BASE_URL="http://api.example/v1").code == 2


def test_all_problems_are_told_at_once(office: Office) -> None:
    """Params, columns, expressions, paths: each with its line, in one go."""
    office.write_leads(people(2))
    office.write_job(
        params="{first_name: Frist Name, last_name: Surname, company: {column: [Website, Mail], transform: [domain]}}",
        only_if_empty="[Email, Phone]",
        where="Country = 'DE'",
        rejects="leads.csv",
        suppress="nobody.txt",
    )
    done = office.command("check", "job.yaml")

    assert (done.code, done.stdout) == (2, "")
    problems = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for said in ("`Frist Name`", "`Surname`", "`Mail`", "`Phone`", "`Country`", "`rejects` and `input`", "`suppress`"):
        assert sum(said in problem for problem in problems) == 1, said
    assert len(problems) == 7
    assert "did you mean `First Name`?" in done.stderr
    assert re.search(r"job.yaml:\d+: only_if_empty.1:", done.stderr)


def test_required_params_that_are_missing_are_told(office: Office) -> None:
    """By the documentation, when the ledger knows nothing yet."""
    office.write_leads(people(1))
    office.write_job(params="{first_name: First Name}")
    done = office.command("check", "job.yaml")
    assert done.code == 2
    assert "requires `last_name`" in done.stderr
    assert "requires `company`" in done.stderr


def test_a_param_that_the_documentation_lacks_is_noted_only(office: Office) -> None:
    """The documentation may be older than the API."""
    office.write_leads(people(1))
    office.write_job(JOB.replace("columns:\n", "  linkedin: Note\ncolumns:\n"))
    done = office.command("check", "job.yaml")
    assert done.code == 0
    assert "note: " in done.stderr
    assert "linkedin" in done.stderr


def test_a_waterfall_that_nobody_documented_is_noted(office: Office) -> None:
    """It may exist all the same."""
    office.write_leads(people(1))
    office.write_job(waterfall="moon_getter")
    done = office.command("check", "job.yaml")
    assert done.code == 0
    assert "--online" in done.stderr


def test_the_ledger_remembers_the_waterfall(office: Office, api: Api) -> None:
    """After a run what the API said counts, not the documentation: a param that it does not know is an error."""
    office.write_leads(people(1))
    assert office.command("run", "job.yaml", api=api).code == 0
    assert "as known from the API at the last run" in office.command("check", "job.yaml", api=api).stdout

    office.write_job(JOB.replace("columns:\n", "  linkedn: Note\ncolumns:\n"), email_verifier="99", enrichments="[7]")
    done = office.command("check", "job.yaml", api=api)
    assert done.code == 2
    assert "did you mean `linkedin`?" in done.stderr
    assert "no provider 7" in done.stderr


def test_a_ledger_of_another_api_is_refused(office: Office, api: Api) -> None:
    """It holds the answers of somebody else."""
    office.write_leads(people(1))
    office.command("run", "job.yaml", api=api)
    done = office.command("check", "job.yaml")
    assert done.code == 2
    assert "belongs to another api host: 127.0.0.1, not api.databar.ai" in done.stderr


def test_a_damaged_ledger_is_refused(office: Office, api: Api) -> None:
    """Before a night is lost to it."""
    office.write_leads(people(1))
    office.command("run", "job.yaml", api=api)
    for path in office.ledger_path.parent.glob("job.db*"):
        path.write_bytes(b"SQLite format 3\0" + b"\x17" * 4096)
    done = office.command("check", "job.yaml", api=api)
    assert done.code == 5
    assert "damaged" in done.stderr


@pytest.mark.parametrize(
    ("changed", "said", "code"),
    [
        ({"output": "leads.csv"}, "`output` and `input` are the same file", 2),
        ({"output": "job.yaml.csv", "rejects": "job.yaml.csv"}, "written twice", 2),
        ({"ledger": "out.csv"}, "`output` and `ledger` are the same file", 2),
        ({"output": "leads.csv/out.csv"}, "is no folder", 5),
        ({"notify": "nobody.txt"}, "`notify` cannot be read", 5),
        ({"input": "none.csv"}, "does not exist", 5),
    ],
)
def test_paths_that_clash_or_lead_nowhere(office: Office, changed: dict[str, str], said: str, code: int) -> None:
    """Found before the run, with the run's exit code."""
    office.write_leads(people(1))
    office.write_job(**changed)
    done = office.command("check", "job.yaml")
    assert done.code == code
    assert said in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(office: Office) -> None:
    """The night would end with exit 5."""
    office.write_leads(people(1))
    (office.folder / "out").mkdir(mode=0o500)
    office.write_job(output="out/leads.csv")
    done = office.command("check", "job.yaml")
    assert done.code == 5
    assert "`output` cannot be written" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_a_ledger_that_this_user_may_not_see(office: Office) -> None:
    """It is no new one: that would pay for everything again."""
    office.write_leads(people(1))
    (office.folder / ".enrich").mkdir(mode=0o000)
    checked = office.command("check", "job.yaml")
    doctored = office.command("doctor", "job.yaml", "--offline", "--env", "DATABAR_API_KEY=key")
    (office.folder / ".enrich").chmod(0o700)
    assert (checked.code, doctored.code) == (5, 5)
    assert "Permission denied" in checked.stderr
    assert "Permission denied" in doctored.stdout


def test_the_input_is_read_to_its_end(office: Office) -> None:
    """A row that is too long is found wherever it stands."""
    office.write_leads([*people(30), ["too", "many", "", "", "", "cells"]])
    done = office.command("check", "job.yaml")
    assert done.code == 5
    assert "row 31" in done.stderr


def test_rows_that_cannot_be_asked_are_counted(office: Office, api: Api) -> None:
    """As a run counts them: a blank required param, an address that is none; by documentation and by ledger alike."""
    office.write_leads([["", "", "", mail, ""] for mail in ("ada@engine.example", "none", "")])
    office.write_job(waterfall="person_getter", params="{email: Email}", columns="{found_name: last_name}")
    for _ in range(2):
        assert "3 rows, 1 can be asked" in office.command("check", "job.yaml", api=api).stdout
        assert office.command("run", "job.yaml", "--json", api=api).receipt["invalid"] == 2


def test_an_expression_that_fails_on_the_rows_is_told(office: Office) -> None:
    """Its columns are there; its cells cannot be computed."""
    office.write_leads(people(2))
    office.write_job(where="CAST(Note AS INT) > 1")
    done = office.command("check", "job.yaml")
    assert done.code == 2
    assert "TRY_CAST" in done.stderr


def test_json_is_one_object(office: Office) -> None:
    """Also when something is wrong."""
    office.write_leads(people(1))
    assert office.command("check", "job.yaml", "--json").receipt == {
        "exit_code": 0,
        "job": "job",
        "rows": 1,
        "can_be_asked": 1,
        "waterfall": "email_getter",
        "described_by": "the documentation of 2026-11",
        "changes": [],
        "notes": [],
        "problems": [],
    }
    office.write_job(only_if_empty="[Phone]")
    told = office.command("check", "job.yaml", "--json").receipt
    assert told["exit_code"] == 2
    assert told["error"] == told["problems"][0]["message"]


def test_online_tells_what_the_vendor_changed(office: Office, api: Api) -> None:
    """Against what the ledger remembers."""
    office.write_leads(people(1))
    office.command("run", "job.yaml", api=api)
    same = office.command("check", "job.yaml", "--online", api=api)
    assert (same.code, same.stderr) == (0, "")
    assert "as known from the API now" in same.stdout

    from enrich.store.ledger import Ledger  # noqa: PLC0415

    ledger = Ledger(office.ledger_path)
    described, providers = ledger.waterfall("email_getter") or ({}, None)
    described["available_enrichments"][0]["price"] = 0.25
    ledger.remember_waterfall("email_getter", described, providers or [])
    ledger.close()

    changed = office.command("check", "job.yaml", "--online", api=api)
    assert changed.code == 0
    assert "note: provider 833 Mailhound: 0.25 credits before, 0.5 credits now (dearer)" in changed.stderr


@pytest.mark.parametrize(("environ", "code"), [({"DATABAR_API_KEY": "wrong"}, 3), ({"DATABAR_API_KEY": ""}, 3)])
def test_online_needs_a_key(office: Office, api: Api, environ: dict[str, str], code: int) -> None:
    """With the run's exit code."""
    office.write_leads(people(1))
    assert office.command("check", "job.yaml", "--online", api=api, **environ).code == code


def test_each_change_of_a_waterfall_has_its_words() -> None:
    """Params, fields, providers, verifiers, prices, defaults."""
    before = WATERFALLS["email_getter"].document()
    now = WATERFALLS["email_getter"].document()
    assert list(differences(Waterfall.model_validate(before), Waterfall.model_validate(now))) == []
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

    told = list(differences(Waterfall.model_validate(before), Waterfall.model_validate(now)))

    assert told == [
        "param country: new, required",
        "param first_name: removed",
        "param last_name: no longer required",
        "param linkedin: removed",
        "field email: removed",
        "field score: new",
        "provider 966 Peoplegrid: 1 credits before, 0.4 credits now (cheaper)",
        "provider 701 Inboxly: removed",
        "provider 745 Profilewell: 2 credits before, price unknown now",
        "provider 5 Newcomer: new, 9 credits",
        "verifier 12 Bouncewatch: removed",
        "default providers: now 833, 966, 745, 113, 5; runs keep the old ones",
    ]


def test_a_job_that_is_not_there(office: Office, tmp_path: Path) -> None:
    """Exit 2, as everywhere."""
    assert office.command("check", str(tmp_path / "none.yaml")).code == 2
