"""`enrich plan`: what it says is what a run then does, and looking costs nothing."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enrich.errors import EnrichError, JobError, LedgerLocked, Refused
from enrich.forecast import Plan
from enrich.job import load_job
from enrich.model import ASKED, Decision, State
from enrich.plan import make_plan
from enrich.planfile import FrozenPlan, read_plan, write_plan
from enrich.store.database import exists
from enrich.store.lock import hold
from enrich.surroundings import Options
from tests.cases import examples
from tests.harness import BOTH_IN_TIME, IN_A_FILE, Api, Done, Office, people, serving

#: What one request of the standard job may cost at worst, in credits.
WORST = 3.51
PAID = {decision.value for decision in ASKED}


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def planned(office: Office, api: Api, options: Options | None = None, rows: Path | None = None) -> Plan:
    """Make a plan in this process."""
    return make_plan(load_job(office.job_file), api.access, options or Options(), rows)[0]


def frozen_plan(office: Office, api: Api, options: Options | None = None, rows: Path | None = None) -> FrozenPlan:
    """Make a plan to be kept to."""
    return make_plan(load_job(office.job_file), api.access, options or Options(), rows)[1]


def plan(office: Office, api: Api, *arguments: str) -> Done:
    """Run `enrich plan` on the job."""
    return office.command("plan", "job.yaml", *arguments, api=api)


def decisions(path: Path) -> list[dict[str, str]]:
    """Read what `--rows` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def accepted(api: Api) -> dict[str, int]:
    """Count the accepted runs by the question, which the first name tells."""
    return {run["params"]["first_name"]: run["accepted"] for run in api.audit()["runs"]}


def alter(office: Office, sql: str) -> None:
    """Change the ledger behind the program's back."""
    office.sql(sql)


# What a run does is what the plan said


@dataclass(frozen=True)
class Case:
    """Some leads by number (None: one that can't be asked), what happened before, and what is wished for now."""

    leads: list[int | None]
    history: list[tuple[str, int]] = field(default_factory=list)
    options: Options = field(default_factory=Options)
    job: dict[str, str] = field(default_factory=dict)


CASES = st.builds(
    Case,
    leads=st.lists(st.one_of(st.integers(0, 9), st.none()), max_size=14),
    history=st.lists(
        st.tuples(st.sampled_from(["limit", "sample", "doubt", "age", "submitting"]), st.integers(1, 4)), max_size=3
    ),
    options=st.builds(
        Options,
        limit=st.one_of(st.none(), st.integers(0, 6)),
        sample=st.one_of(st.none(), st.integers(1, 6), st.just(10**12)),
        seed=st.integers(0, 3),
        retry=st.frozensets(st.sampled_from([State.FAILED, State.IN_DOUBT])),
    ),
    job=st.fixed_dictionaries(
        {},
        optional={
            "caps": st.sampled_from(["{by: Note, max: 1}", "{by: company, max: 2}"]),
            "order_by": st.just("[Note, Website]"),
            "where": st.just("Note <> 'g2'"),
            "policy": st.just("{refresh: {found: 5d, not_found: 3d}}"),
            "canary": st.just("{rows: 100, min_hit_rate: 1}"),
        },
    ),
)


@contextmanager
def played(api: Api, case: Case, number: int) -> Iterator[Office]:
    """Set the scene: an office in which all this has happened; `number` keeps the leads of cases apart."""
    with tempfile.TemporaryDirectory() as folder:
        office = Office(Path(folder))
        office.write_leads([lead(number, each) for each in case.leads])
        for what, count in case.history:
            office.write_job()
            if what == "doubt":
                api.fault("error-after", count)
                office.run(api, Options(limit=count))
                api.heal()
            elif what in ("limit", "sample"):
                office.run(api, Options(limit=count) if what == "limit" else Options(sample=count))
            elif exists(office.place):
                alter(office, HISTORY[what].format(count=count))
        office.write_job(**case.job)
        yield office


HISTORY = {
    "age": "UPDATE attempts SET settled_ms = settled_ms - 345600000 WHERE id % 3 <> {count} % 3",
    # As a kill -9 leaves it: the intent is on disk, the POST on the wire.
    "submitting": "UPDATE attempts SET state = 'submitting', settled_ms = NULL WHERE state = 'in_doubt' "
    "AND id = (SELECT attempt_id FROM requests WHERE attempt_id = attempts.id AND state = 'in_doubt')",
}


def lead(case: int, number: int | None) -> list[str]:
    """Make a row; half of the companies are shared by two leads."""
    if number is None:
        return ["Nobody", "", "https://nobody.example", "", "g0"]
    return [f"P{case}x{number}", "Lead", f"https://c{number // 2}.example", "", f"g{number % 4}"]


@pytest.fixture(scope="module")
def mixed() -> Iterator[Api]:
    """Serve an API that finds, misses and fails."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder) / "api.db", failure_rate=0.2, free_failures=0.0, hit_rate=0.6) as api,
    ):
        yield api


_numbers = iter(range(10**6))


@pytest.mark.long
@settings(max_examples=examples(20), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES, frozen=st.booleans())
def test_a_run_asks_exactly_what_the_plan_said(mixed: Api, case: Case, *, frozen: bool) -> None:
    """For any input and any past: the same rows, the same requests, no more credits than at most."""
    with played(mixed, case, next(_numbers)) as office:
        said, kept = make_plan(load_job(office.job_file), mixed.access, case.options, office.folder / "rows.csv")
        rows = decisions(office.folder / "rows.csv")
        before, spent = accepted(mixed), mixed.audit()["credits_charged"]
        assert (said.rows, len(rows)) == (len(case.leads), len(case.leads))

        receipt = office.run(mixed, Options(plan=kept) if frozen else case.options)

        now = accepted(mixed)
        assert {name for name in now if now[name] != before.get(name, 0)} == {
            row["First Name"] for row in rows if row["plan_decision"] in PAID
        }
        assert sum(now.values()) - sum(before.values()) == said.to_submit == receipt.submitted
        assert (receipt.rows, receipt.requests) == (said.rows, said.requests)
        assert said.cost.most is not None
        assert mixed.audit()["credits_charged"] - spent <= said.cost.most + 1e-9
        capped = sum(row["plan_decision"] == "capped" for row in rows)
        shown = [row for row in office.output() if row["enrich_error"].startswith("capped")]
        assert capped <= len(shown) == sum(row["enrich_status"] == "filtered" for row in shown)
        if frozen:
            assert office.run(mixed, Options(plan=kept)).submitted == 0
        written = (office.folder / "out.csv").read_bytes()
        assert office.command("collect", "job.yaml", "--partial").code == 0
        assert (office.folder / "out.csv").read_bytes() == written


@pytest.mark.long
@settings(max_examples=examples(12), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_a_plan_that_was_cut_short_is_gone_on_with(mixed: Api, case: Case) -> None:
    """Started again it asks what is left of the plan: in all the very requests that it named, each once."""
    with played(mixed, case, next(_numbers)) as office:
        said, kept = make_plan(load_job(office.job_file), mixed.access, case.options, office.folder / "rows.csv")
        before = accepted(mixed)
        mixed.fault("no-credits", 1, "post")
        nights = [office.run(mixed, Options(plan=kept))]
        mixed.heal()
        nights += [office.run(mixed, Options(plan=kept)) for _ in range(2)]

        now = accepted(mixed)
        assert {name: now[name] - before.get(name, 0) for name in now if now[name] != before.get(name, 0)} == {
            row["First Name"]: 1 for row in decisions(office.folder / "rows.csv") if row["plan_decision"] in PAID
        }
        assert sum(night.submitted for night in nights) == said.to_submit
        assert nights[2].submitted == 0


# Why a row is or isn't paid for


def test_every_row_is_told_its_reason(api: Api, office: Office) -> None:
    """New, answered, duplicate, invalid with its param, filtered by what, beyond the limit."""
    office.write_job(where="Note <> 'no'", suppress="never.txt")
    (office.folder / "never.txt").write_text("company3.example\n")
    office.write_leads(people(1))
    office.run(api)
    old, other, gone, kept, late = people(5)
    unnamed = ["", "Last", "https://company9.example", "", ""]
    office.write_leads([old, other, [*other[:4], "again"], unnamed, [*gone[:4], "no"], kept, late])

    done = plan(office, api, "--rows", "rows.csv", "--limit", "1")

    assert (done.code, done.stderr) == (0, "")
    told = decisions(office.folder / "rows.csv")
    assert [(row["plan_decision"], row["plan_why"], row["plan_same_as_row"]) for row in told] == [
        (told[0]["plan_decision"], told[0]["plan_why"], ""),
        ("new", "never answered", ""),
        ("duplicate", "asks what an earlier row asks: new", "2"),
        ("invalid", "first_name is empty (First Name)", ""),
        ("filtered", "left out by where", ""),
        ("filtered", "suppressed: listed as never to be sent", ""),
        ("over_limit", "beyond --limit", ""),
    ]
    assert told[0]["plan_why"].startswith("answered before")
    assert float(told[0]["plan_age_days"]) < 1
    assert told[0]["plan_answered_at"].endswith("Z")


def test_the_rows_of_an_earlier_plan_are_replaced(api: Api, office: Office) -> None:
    """A file that `--rows` wrote can be planned again."""
    office.write_leads(people(2))
    plan(office, api, "--rows", "rows.csv")

    done = plan(office, api, "--input", "rows.csv", "--rows", "again.csv")

    assert done.code == 0, done.stderr
    assert (office.folder / "again.csv").read_text() == (office.folder / "rows.csv").read_text()


@IN_A_FILE
def test_the_rows_replace_neither_the_job_nor_the_input(api: Api, office: Office) -> None:
    """Nor a ledger: exit 2, and the files stay."""
    office.write_leads(people(2))
    office.run(api)
    for path in (office.job_file, office.folder / "leads.csv", office.ledger_path):
        before = path.read_bytes()
        assert plan(office, api, "--rows", str(path)).code == 2
        assert path.read_bytes() == before


def test_what_is_at_the_api_waits_and_is_not_paid_again(tmp_path: Path, office: Office) -> None:
    """A task of an earlier run is collected; it is kept out of what the cap has room for."""
    office.write_job(limits="{requests_per_second: 1000, max_credits: 10}")
    office.write_leads(people(1))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api:
        office.leave_at_the_api(api)
        office.write_leads(people(4))
        told = planned(office, api)

    assert told.decisions[Decision.WAITING] == 1
    assert (told.to_submit, told.covered) == (3, 1)  # 10 - 3.51 has room for one at its worst price


# What it says


def test_the_json_has_the_contracts_names(api: Api, office: Office) -> None:
    """Counts, cost, balance, what the cap allows and the time at the set rate."""
    office.write_job(limits="{requests_per_second: 10, max_credits: 8}")
    office.write_leads(people(4))

    told = plan(office, api, "--json").receipt

    assert (told["rows"], told["requests"], told["to_submit"], told["exit_code"]) == (4, 4, 4, 0)
    assert told["cost"] == {"min": 0.0, "likely": None, "max": 4 * WORST}
    assert (told["balance"], told["max_credits"], told["cap_allows"]) == (10_000, 8, 2)
    assert told["seconds"] == 1.0  # four requests and six polls, at ten a second


def test_likely_is_what_requests_have_cost_so_far(api: Api, office: Office) -> None:
    """The ledger's own credits per request, times what would be sent."""
    office.write_leads(people(12))
    receipt = office.run(api)
    office.write_leads(people(20))

    told = planned(office, api)

    assert told.to_submit == 8
    assert told.cost.likely == pytest.approx(receipt.credits_spent / 12 * 8, abs=1e-5)


def test_a_price_that_nobody_knows_is_not_shown_as_nothing(
    api: Api, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cost and cap are null, and unknown in words; with a cap the plan is refused as the run would be."""
    office.write_leads(people(2))
    monkeypatch.setattr("enrich.question._worst_price", lambda *_: None)

    told = plan(office, api, "--json").receipt

    assert (told["to_submit"], told["cost"]["max"], told["cap_allows"], told["worst_price"]) == (2, None, None, None)
    assert "0.00 to an unknown number of credits" in plan(office, api).stdout
    assert plan(office, api, "--max-credits", "5").code == Refused.exit_code


def test_one_run_for_every_row_is_planned_as_such(api: Api, office: Office) -> None:
    """With `dedupe: false` equal rows are paid for each, and each has its own decision."""
    office.write_job(dedupe="false")
    office.write_leads(people(2) * 3)
    office.run(api, Options(limit=3))

    told, kept = make_plan(load_job(office.job_file), api.access, Options(limit=2), office.folder / "rows.csv")
    receipt = office.run(api, Options(plan=kept))

    assert (told.requests, told.to_submit, receipt.submitted) == (6, 2, 2)
    rows = [row["plan_decision"] for row in decisions(office.folder / "rows.csv")]
    assert rows[3:] == ["new", "new", "over_limit"]
    assert set(rows[:3]) <= {"found", "not_found"}


def test_it_costs_nothing_and_leaves_nothing(api: Api, office: Office) -> None:
    """No POST, no ledger, no lock, no output."""
    office.write_leads(people(3))

    done = plan(office, api)

    assert done.code == 0
    assert "3 would be sent" in done.stdout
    assert sorted(path.name for path in office.folder.iterdir()) == ["job.yaml", "leads.csv"]
    assert api.audit()["accepted"] == 0


@IN_A_FILE
def test_it_changes_no_ledger(api: Api, office: Office) -> None:
    """Looking leaves every byte of it as it was."""
    office.write_leads(people(3))
    office.run(api, Options(limit=1))
    before = office.ledger_path.read_bytes()

    plan(office, api, "--rows", "rows.csv", "-o", "night.plan")

    assert office.ledger_path.read_bytes() == before


def test_it_looks_while_a_run_is_at_work(api: Api, office: Office) -> None:
    """The lock is the run's; the plan says that it may be overtaken, and none can be frozen."""
    office.write_leads(people(3))
    office.run(api, Options(limit=1))
    with hold(office.place, 0):
        done = plan(office, api)
        frozen = plan(office, api, "-o", "night.plan")

    assert (done.code, "a run is at work" in done.stdout, "2 would be sent" in done.stdout) == (0, True, True)
    assert frozen.code == LedgerLocked.exit_code
    assert not (office.folder / "night.plan").exists()


@IN_A_FILE
def test_an_older_ledger_is_left_alone(api: Api, office: Office) -> None:
    """It is not migrated by a look, and the hint says what does it without asking anything."""
    office.write_leads(people(1))
    office.run(api)
    alter(office, "PRAGMA user_version = 0")

    done = plan(office, api)

    assert done.code == Refused.exit_code
    assert "older version" in done.stderr
    assert "--limit 0" in done.stderr


def test_a_balance_that_is_too_low_is_told(tmp_path: Path, office: Office) -> None:
    """The plan is shown all the same, with what a run would say."""
    office.write_leads(people(1))
    with serving(tmp_path / "api.db", balance=2.0) as api:
        done = plan(office, api)
    assert done.code == 0
    assert "a run would be refused: the balance is 2 credits" in done.stdout


# Frozen plans


def freeze(office: Office, api: Api, *arguments: str) -> str:
    """Freeze a plan; return its name."""
    done = plan(office, api, "-o", "night.plan", *arguments)
    assert done.code == 0, done.stderr
    return "night.plan"


def test_a_frozen_plan_is_run_once(api: Api, office: Office) -> None:
    """The second time nothing is left of it; the file is readable by its owner only."""
    office.write_leads(people(9))
    name = freeze(office, api, "--limit", "4")

    nights = [office.command("run", "job.yaml", "--plan", name, "--json", api=api).receipt for _ in range(2)]

    assert [(night["exit_code"], night["submitted"], night["pending"]) for night in nights] == [(0, 4, 5), (0, 0, 5)]
    assert (office.folder / name).stat().st_mode & 0o777 == 0o600


CHANGES: dict[str, Any] = {
    "the input": lambda office: office.write_leads(people(8)),
    "the job file, or the options": lambda office: office.write_job(suppress="never.txt", where="Note <> 'x'"),
    "the providers": lambda office: alter(office, "UPDATE waterfalls SET providers = '[833]'"),
    "the list of `suppress`": lambda office: (office.folder / "never.txt").write_text("other.example\n"),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_plan_is_refused_when_its_ground_changed(api: Api, office: Office, what: str) -> None:
    """The input, the job, the providers, the list of those never sent: exit 5, named, nothing sent."""
    office.write_job(suppress="never.txt")
    (office.folder / "never.txt").write_text("gone.example\n")
    office.write_leads(people(9))
    office.run(api, Options(limit=0))
    name = freeze(office, api)
    CHANGES[what](office)

    done = office.command("run", "job.yaml", "--plan", name, api=api)

    assert done.code == Refused.exit_code
    assert f"{what} changed since the plan was made" in done.stderr
    assert api.audit()["accepted"] == 0


def test_a_plan_is_refused_when_a_price_changed(api: Api, office: Office) -> None:
    """What would cost other than it said is not bought."""
    office.write_leads(people(2))
    told = frozen_plan(office, api)
    first, *others = told.ground.providers
    dearer = [first.model_copy(update={"price": 1}), *others]
    ground = told.ground.model_copy(update={"providers": dearer})

    receipt = office.run(api, Options(plan=told.model_copy(update={"ground": ground})))

    assert (receipt.exit_code, receipt.submitted) == (5, 0)
    assert str(receipt.error).startswith("the prices changed")


def test_a_plan_that_was_killed_half_way_spends_no_more_than_it_said(tmp_path: Path, office: Office) -> None:
    """What is at the API from the first start counts once: the second asks all that is left."""
    office.write_leads(people(6))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api:
        told = frozen_plan(office, api)
        first = office.run(api, Options(limit=3, max_time_s=2.0))
        api.advance(90)
    with serving(tmp_path / "api.db", latency="fixed(0)") as api:
        receipt = office.run(api, Options(plan=told))
        assert (receipt.exit_code, receipt.submitted, receipt.pending) == (0, 6 - first.submitted, 0)
        assert (api.audit()["accepted"], api.audit()["paid_twice"]) == (6, 0)


def test_the_credits_of_a_plan_are_its_cap(api: Api, office: Office) -> None:
    """With `--max-credits` frozen, the run keeps to it, whatever the job says."""
    office.write_job(limits="{requests_per_second: 1000, max_credits: 500}")
    office.write_leads(people(6))
    name = freeze(office, api, "--max-credits", "3")

    done = office.command("run", "job.yaml", "--plan", name, "--json", api=api)

    assert (done.code, done.receipt["submitted"]) == (12, 0)


@pytest.mark.parametrize("option", [("--limit", "1"), ("--sample", "2"), ("--max-credits", "1"), ("--retry", "failed")])
def test_a_plan_has_its_own_wishes(api: Api, office: Office, option: tuple[str, str]) -> None:
    """Options that would choose otherwise are refused."""
    office.write_leads(people(2))
    done = office.command("run", "job.yaml", "--plan", freeze(office, api), *option, api=api)
    assert (done.code, "--plan has its own" in done.stderr) == (2, True)


@pytest.mark.parametrize("content", ["", "{}", '{"version": 2}', "First Name\nÅ\n"])
def test_what_is_no_plan_is_refused(api: Api, office: Office, content: str) -> None:
    """It is named; no traceback."""
    office.write_leads(people(1))
    (office.folder / "night.plan").write_text(content)

    done = office.command("run", "job.yaml", "--plan", "night.plan", api=api)

    assert (done.code, "no plan of this version" in done.stderr) == (JobError.exit_code, True)


@IN_A_FILE
def test_a_plan_replaces_only_a_plan(api: Api, office: Office) -> None:
    """`-o` with the name of the input, the job or the ledger destroys nothing."""
    office.write_leads(people(2))
    office.run(api)
    for path in (office.job_file, office.folder / "leads.csv", office.ledger_path):
        before = path.read_bytes()
        done = plan(office, api, "-o", str(path))
        assert (done.code, "no plan" in done.stderr) == (2, True), done.stderr
        assert path.read_bytes() == before
    freeze(office, api)
    freeze(office, api)


def test_a_plan_survives_its_file(api: Api, office: Office) -> None:
    """What is read is what was written."""
    office.write_leads(people(2))
    told = frozen_plan(office, api, Options(sample=1, seed=7, retry=frozenset({State.FAILED})))
    path = office.folder / "night.plan"

    write_plan(path, told)

    assert read_plan(path) == told
    assert "First0" not in path.read_text()
    assert json.loads(path.read_text())["version"] == 1
    with pytest.raises(EnrichError):
        write_plan(office.folder / "missing" / "night.plan", told)


def test_what_is_no_file_is_not_replaced(office: Office, api: Api) -> None:
    """A device or a pipe that is named by mistake stays what it is."""
    office.write_leads(people(1))
    os.mkfifo(office.folder / "pipe.csv")
    for words in (("-o", "pipe.csv"), ("--rows", "pipe.csv")):
        done = plan(office, api, *words)
        assert (done.code, "it is no file" in done.stderr) == (5, True)
    assert (office.folder / "pipe.csv").is_fifo()
