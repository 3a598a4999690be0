"""One run after another: which requests are paid again, and which never are."""

from __future__ import annotations

import dataclasses
import json
import random
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from enrich.errors import JobError
from enrich.ledger import records, transitions
from enrich.models import State
from enrich.run.context import RunOptions
from enrich.run.summary import RunSummary
from enrich.sandbox.catalogue import WATERFALLS, Provider
from enrich.sandbox.databar import Databar
from tests.support.cases import first_quick
from tests.support.workspace import (
    BOTH_BACKENDS,
    SHORT_TIMEOUTS,
    SandboxApi,
    Workspace,
    clock_ahead,
    make_leads,
    serve_api,
)

DAY = 86_400


def retry_options(*states: State) -> RunOptions:
    """Return the options of `--retry` with these states."""
    return RunOptions(retry=frozenset(states))


def rows_by_first_name(workspace: Workspace, name: str = "out.csv") -> dict[str, dict[str, str]]:
    """Return the rows of the output by the lead's first name."""
    return {row["First Name"]: row for row in workspace.read_output(name)}


def status_column(workspace: Workspace) -> list[str]:
    """Return the status column."""
    return [row["enrich_status"] for row in workspace.read_output()]


# The same leads, other leads


def test_only_new_leads_are_sent(api: SandboxApi, workspace: Workspace) -> None:
    """Row numbers are no identity: order and neighbors may change, the answers stay with their leads."""
    workspace.write_leads(make_leads(10))
    workspace.run_job(api)
    before = rows_by_first_name(workspace)
    leads = make_leads(15)
    random.Random(7).shuffle(leads)
    workspace.write_leads(leads)

    summary = workspace.run_job(api)

    assert (summary.submitted, summary.reused) == (5, 10)
    assert [row["First Name"] for row in workspace.read_output()] == [lead[0] for lead in leads]
    after = rows_by_first_name(workspace)
    assert {name: after[name] for name in before} == before
    assert api.audit()["accepted"] == 15


def test_unrelated_columns_may_change(api: SandboxApi, workspace: Workspace) -> None:
    """A changed note, another column order or a `www.` is still the same request."""
    workspace.write_leads(make_leads(6))
    workspace.run_job(api)
    header = ["Note", "Owner", "Website", "Last Name", "First Name", "Email"]
    workspace.write_leads(
        [["new", "me", f"company{n}.example", f" Last{n} ", f"First{n}", ""] for n in range(6)], header=header
    )

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted, summary.reused) == (0, 0, 6)
    assert [row["Note"] for row in workspace.read_output()] == ["new"] * 6


@BOTH_BACKENDS
def test_known_rows_give_the_same_night(api: SandboxApi, workspace: Workspace) -> None:
    """Plan, run and collect say and write the same whether they know the rows from the last run or compute them."""
    nameless = [["", "", "", "", ""], ["", "Last1", "company1.example", "", "x"]]
    leads = [*make_leads(6), *make_leads(3), *nameless, *make_leads(2, start=6)]
    workspace.write_leads(leads)
    workspace.run_job(api)

    def night() -> tuple[object, ...]:
        said: list[object] = []
        for command in ("plan", "run", "collect"):
            result = workspace.run_in_process(command, "job.yaml", "--json", api=api).json_output
            said.append({name: result[name] for name in result if name not in ("execution", "elapsed_s")})
            said.append((workspace.folder / "out.csv").read_bytes())
        return tuple(said)

    known = night()
    assert workspace.sql("SELECT count(*) FROM known_batches") == [(1,)]
    workspace.sql("DELETE FROM known_batches")
    assert night() == known
    leads[0] = ["Other", *leads[0][1:]]
    workspace.write_leads([*leads, *make_leads(1, start=20)])
    assert workspace.run_job(api).submitted == 2
    assert api.audit()["accepted"] == 10


@pytest.mark.long
def test_other_providers_are_sent_again(api: SandboxApi, workspace: Workspace) -> None:
    """Other providers, their order or a verifier make another request."""
    workspace.write_leads(make_leads(3))
    for number, enrichments in enumerate(("[833, 966]", "[966, 833]", "[833]"), start=1):
        workspace.write_job(enrichments=enrichments)
        assert workspace.run_job(api).submitted == 3
        assert api.audit()["accepted"] == 3 * number
    workspace.write_job(enrichments="[833]", email_verifier="10")
    assert workspace.run_job(api).submitted == 3
    assert api.audit()["paid_twice"] == 0


@pytest.mark.long
def test_other_result_columns_are_free(api: SandboxApi, workspace: Workspace) -> None:
    """The ledger keeps whole answers: a job that uses another field of them pays nothing."""
    workspace.write_job(waterfall="company_lookup", params="{company_website: Website}", columns="{about: description}")
    workspace.write_leads(make_leads(9))
    first = workspace.run_job(api)
    workspace.write_job(
        waterfall="company_lookup", params="{company_website: Website}", columns="{rounds: funding.rounds}"
    )

    second = workspace.run_job(api)

    assert (second.submitted, second.found) == (0, first.found)
    assert {bool(row["rounds"]) for row in workspace.read_output() if row["enrich_status"] == "found"} == {True}


@pytest.mark.long
def test_removed_pending_lead_is_not_sent(api: SandboxApi, workspace: Workspace) -> None:
    """Sends only the input's leads, even if others are pending in the ledger."""
    workspace.write_leads(make_leads(10))
    first = workspace.run_job(api, RunOptions(limit=4))
    assert (first.exit_code, first.submitted, first.pending) == (0, 4, 6)
    workspace.write_leads(make_leads(6))

    second = workspace.run_job(api)

    assert (second.submitted, second.pending) == (2, 0)
    assert api.audit()["accepted"] == 6


@pytest.mark.long
def test_removed_open_lead_is_collected(tmp_path: Path, workspace: Workspace) -> None:
    """Collects an open lead that is no longer in the input, because it may come back."""
    workspace.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", latency="fixed(30)") as api:
        workspace.submit_without_collecting(api)
        api.advance(60)
        workspace.write_leads([])
        empty = workspace.run_job(api)
        workspace.write_leads(make_leads(4))
        back = workspace.run_job(api)
        audit = api.audit()

    assert (empty.exit_code, empty.rows, empty.submitted) == (0, 0, 0)
    assert empty.credits_spent == audit["credits_charged"]
    assert (back.submitted, back.reused, audit["accepted"]) == (0, 4, 4)


@pytest.mark.long
def test_limit_follows_file_order(api: SandboxApi, workspace: Workspace) -> None:
    """`--limit N` sends the first N new rows, so that the file is finished run by run."""
    workspace.write_leads(make_leads(9))

    runs = [workspace.run_job(api, RunOptions(limit=4)) for _ in range(3)]

    assert [run_summary.submitted for run_summary in runs] == [4, 4, 1]
    assert [run_summary.exit_code for run_summary in runs] == [0, 0, 0]
    assert [run_summary.pending for run_summary in runs] == [5, 1, 0]


def test_limit_counts_unconfirmed(api: SandboxApi, workspace: Workspace) -> None:
    """Unconfirmed requests count toward `--limit`, because they may have been charged."""
    workspace.write_leads(make_leads(9))
    api.inject_fault("error-after", 2)

    summary = workspace.run_job(api, RunOptions(limit=3))

    assert api.audit()["accepted"] == 3
    assert (summary.in_doubt, summary.submitted, summary.pending) == (2, 1, 6)


@pytest.mark.long
def test_open_tasks_collected_with_zero_limit(tmp_path: Path, workspace: Workspace) -> None:
    """Collects an earlier run's open tasks even when the run may send nothing."""
    workspace.write_leads(make_leads(3))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        workspace.submit_without_collecting(api)
        api.advance(90)
        workspace.write_leads(make_leads(6))
        summary = workspace.run_job(api, RunOptions(limit=0))

    assert (summary.exit_code, summary.submitted, summary.pending) == (0, 0, 3)
    assert status_column(workspace)[3:] == ["pending"] * 3
    assert "collecting 3 tasks of an earlier run first" in summary.notes


@pytest.mark.long
def test_expired_result_is_not_resent(tmp_path: Path, workspace: Workspace) -> None:
    """The API keeps a result for a day: later runs report it, and only `--retry expired` pays again."""
    workspace.write_leads(make_leads(3))
    state = tmp_path / "api.db"
    with serve_api(state, latency="fixed(30)") as api:
        workspace.submit_without_collecting(api)
        api.advance(3 * DAY)
    with serve_api(state) as api:
        late = workspace.run_job(api)
        later = workspace.run_job(api)
        retried = workspace.run_job(api, retry_options(State.EXPIRED))
        audit = api.audit()

    assert (late.exit_code, late.expired, late.submitted) == (10, 3, 0)
    assert (late.credits_unknown, late.credits_spent) == (3, 0)
    assert (later.exit_code, later.expired, later.submitted) == (0, 3, 0)
    assert (retried.exit_code, retried.expired, retried.submitted) == (0, 0, 3)
    assert audit["accepted"] == 6


# With --retry


def test_failed_requests_need_retry(tmp_path: Path, workspace: Workspace) -> None:
    """A failed request stays failed until `--retry failed`, which resends those and no others."""
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        first = workspace.run_job(api)
        second = workspace.run_job(api)
        in_doubt_rows = workspace.run_job(api, retry_options(State.IN_DOUBT, State.EXPIRED))
        third = workspace.run_job(api, retry_options(State.FAILED))
        audit = api.audit()

    failed = first.failed or 0
    assert failed > 0
    assert (second.submitted, second.failed, second.exit_code) == (0, failed, 0)
    assert in_doubt_rows.submitted == 0
    assert (third.submitted, third.failed, third.exit_code) == (failed, failed, 10)
    assert (audit["accepted"], audit["accepted_more_than_once"]) == (12 + failed, failed)


@pytest.mark.long
def test_free_failures_are_retried(tmp_path: Path, workspace: Workspace) -> None:
    """Resends a task that failed for free, up to `max_attempts`, at no extra cost."""
    workspace.write_leads(make_leads(30))
    with serve_api(tmp_path / "api.db", failure_rate=0.5, free_failures=1.0) as api:
        summary = workspace.run_job(api)
        audit = api.audit()

    assert (summary.exit_code, summary.failed) == (0, 0)
    assert audit["accepted"] == summary.submitted > 30
    assert audit["paid_twice"] == 0
    assert summary.credits_spent == pytest.approx(audit["credits_charged"])


@pytest.mark.long
def test_max_attempts_limits_free_failures(tmp_path: Path, workspace: Workspace) -> None:
    """With `max_attempts: 1` a free failure is a failure."""
    workspace.write_job(policy="{max_attempts: 1}")
    workspace.write_leads(make_leads(20))
    with serve_api(tmp_path / "api.db", failure_rate=0.5, free_failures=1.0) as api:
        summary = workspace.run_job(api)

    assert (summary.submitted, summary.exit_code) == (20, 10)
    assert (summary.failed or 0) > 0


@pytest.mark.long
def test_in_doubt_needs_retry(api: SandboxApi, workspace: Workspace) -> None:
    """`--retry in_doubt` resends, at the user's risk of paying twice."""
    workspace.write_leads(make_leads(5))
    api.inject_fault("error-after", 2)
    first = workspace.run_job(api)
    assert (first.exit_code, first.in_doubt) == (14, 2)

    retried = workspace.run_job(api, retry_options(State.IN_DOUBT))

    assert (retried.exit_code, retried.in_doubt, retried.submitted) == (0, 0, 2)
    assert api.audit()["accepted_more_than_once"] == 2


@pytest.mark.long
def test_retry_only_for_rows_in_input(api: SandboxApi, workspace: Workspace) -> None:
    """Does not retry a lead that is no longer in the input; it stays in doubt."""
    workspace.write_leads(make_leads(4))
    api.inject_fault("error-after", 4)
    workspace.run_job(api)
    workspace.write_leads(make_leads(1))

    summary = workspace.run_job(api, retry_options(State.IN_DOUBT))

    assert (summary.submitted, summary.exit_code) == (1, 0)
    assert api.audit()["accepted"] == 5


@pytest.mark.long
def test_retry_is_not_remembered_after_refusal(tmp_path: Path, workspace: Workspace) -> None:
    """`--retry` applies to one run: when that run is refused for lack of credits, the next does not repeat it."""
    workspace.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", balance=50) as api:
        api.inject_fault("error-after", 2)
        workspace.run_job(api)
        balance = api.audit()["balance"]
        api.top_up(-balance)
        refused = workspace.run_job(api, retry_options(State.IN_DOUBT))
        api.top_up(balance)
        plain = workspace.run_job(api)
        audit = api.audit()

    assert refused.exit_code == 5
    assert (plain.exit_code, plain.in_doubt, plain.submitted) == (14, 2, 0)
    assert audit["accepted_more_than_once"] == 0


@pytest.mark.long
def test_retry_of_shared_request_once(api: SandboxApi, workspace: Workspace) -> None:
    """Rows that share an unconfirmed request are all answered by one retry."""
    workspace.write_leads(make_leads(2) * 3)
    api.inject_fault("no-task-id", 2)
    assert workspace.run_job(api).in_doubt == 6

    summary = workspace.run_job(api, retry_options(State.IN_DOUBT))

    assert (summary.submitted, summary.in_doubt) == (2, 0)


# The age of answers


@pytest.mark.long
def test_refresh_of_old_answers(tmp_path: Path, workspace: Workspace) -> None:
    """`policy.refresh` has an age for matches and one for no matches; by default answers are good forever."""
    state = tmp_path / "api.db"
    workspace.write_leads(make_leads(20))
    with serve_api(state) as api:
        first = workspace.run_job(api)
        api.advance(20 * DAY)
        assert workspace.run_job(api, clock=clock_ahead(20 * DAY)).submitted == 0
        workspace.write_job(policy="{refresh: {found: 90d, not_found: 14d}}")
        misses = workspace.run_job(api, clock=clock_ahead(20 * DAY))
        assert workspace.run_job(api, clock=clock_ahead(20 * DAY)).submitted == 0
        api.advance(80 * DAY)
        refreshed = workspace.run_job(api, clock=clock_ahead(100 * DAY))

    assert 0 < misses.submitted == (first.not_found or 0) < 20
    assert refreshed.submitted == 20


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "limits"),
    [
        (RunOptions(), {"limits": "{max_credits: 4}"}),
        (RunOptions(max_time_s=0), {}),
        (RunOptions(limit=1), {}),
        (RunOptions(limit=0), {}),
    ],
    ids=str,
)
def test_refresh_that_ends_early(
    tmp_path: Path, workspace: Workspace, options: RunOptions, limits: dict[str, str]
) -> None:
    """A request that was to be refreshed and was not keeps its answer, and counts as reused."""
    workspace.write_leads(make_leads(6))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)
        workspace.write_job(policy="{refresh: {found: 0s}}", **limits)
        summary = workspace.run_job(api, options)
    assert summary.submitted < 6
    assert (summary.found, summary.pending, summary.reused) == (6, 0, 6 - summary.submitted)


@pytest.mark.long
def test_last_match_kept_during_refresh(tmp_path: Path, workspace: Workspace) -> None:
    """A refresh without match or with a failure keeps the paid address."""
    state = tmp_path / "api.db"
    workspace.write_leads(make_leads(12))
    workspace.write_job(policy="{refresh: {found: 90d}}")
    with serve_api(state) as api:
        workspace.run_job(api)
        before = rows_by_first_name(workspace)
        api.advance(100 * DAY)
    with serve_api(state, hit_rate=0.0) as api:
        api.inject_fault("no-task-id")
        workspace.run_job(api, clock=clock_ahead(100 * DAY))

    after = rows_by_first_name(workspace)
    hits = [name for name, row in before.items() if row["enrich_status"] == "found"]
    assert hits
    for name in hits:
        assert after[name]["work_email"] == before[name]["work_email"]


@pytest.mark.long
def test_refresh_ending_in_doubt(tmp_path: Path, workspace: Workspace) -> None:
    """An old no match that was resent without an answer is in doubt, in the row and by the exit code."""
    workspace.write_leads(make_leads(3))
    workspace.write_job(policy="{refresh: {not_found: 14d}}")
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        workspace.run_job(api)
        api.advance(20 * DAY)
        api.inject_fault("error-after")

        summary = workspace.run_job(api, clock=clock_ahead(20 * DAY))

    assert (summary.exit_code, summary.in_doubt) == (14, 1)
    assert sorted(status_column(workspace)) == ["in_doubt", "not_found", "not_found"]


# The output as input


@pytest.mark.long
def test_output_as_next_input(api: SandboxApi, workspace: Workspace) -> None:
    """With its own output as input, pays nothing again, replaces the status columns, and keeps all other columns."""
    workspace.write_leads(make_leads(8))
    workspace.run_job(api)
    first = workspace.read_output()
    (workspace.folder / "out.csv").rename(workspace.folder / "again.csv")
    workspace.write_job(input="again.csv", columns="{work_email_2: email}")

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted) == (0, 0)
    second = workspace.read_output()
    assert list(second[0]) == [
        *("First Name", "Last Name", "Website", "Email", "Note", "work_email", "work_email_2", "enrich_status"),
        *("enrich_error", "enrich_provider", "enrich_credits", "enrich_task_id", "enrich_at"),
    ]
    assert [row["work_email_2"] for row in second] == [row["work_email"] for row in first]
    assert [row["enrich_status"] for row in second] == [row["enrich_status"] for row in first]


def test_output_as_input_with_column_clash(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses to overwrite a column that the input has already."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    (workspace.folder / "out.csv").rename(workspace.folder / "again.csv")
    workspace.write_job(input="again.csv")

    with pytest.raises(JobError, match="work_email"):
        workspace.run_job(api)


@pytest.mark.long
def test_where_uses_status_columns(api: SandboxApi, workspace: Workspace) -> None:
    """`where` may use an earlier output's status columns."""
    workspace.write_leads(make_leads(12))
    first = workspace.run_job(api)
    (workspace.folder / "out.csv").rename(workspace.folder / "again.csv")
    workspace.write_job(input="again.csv", columns="{second: email}", where="enrich_status = 'not_found'")

    summary = workspace.run_job(api)

    assert summary.filtered == first.found


# The ledger's owner


@pytest.mark.long
def test_sandbox_ledger_is_separate(api: SandboxApi, workspace: Workspace) -> None:
    """Sandbox runs neither answer the real run nor cost anything."""
    workspace.write_leads(make_leads(4))

    free = workspace.run_in_process("run", "job.yaml", "--sandbox", "--json")
    real_run = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert free.json_output["submitted"] == real_run.json_output["submitted"] == 4
    assert api.audit()["accepted"] == 4
    assert {path.name for path in workspace.ledger_path.parent.glob("*.db")} == {
        *("job.db", "job.sandbox.db", "job.sandbox.api.db"),
    }


@pytest.mark.long
def test_sandbox_reuses_answers(workspace: Workspace) -> None:
    """The second sandbox run pays no pretended credits either."""
    workspace.write_leads(make_leads(4))
    workspace.run_in_process("run", "job.yaml", "--sandbox")

    summary = workspace.run_in_process("run", "job.yaml", "--sandbox", "--json").json_output

    assert (summary["submitted"], summary["credits_spent"]) == (0, 0)


def test_ledger_bound_to_workspace(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses the key of another workspace, because another account bought the ledger's answers."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    _execute_sql(workspace, "UPDATE facts SET value = 'the other team' WHERE name = 'workspace'")

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert result.exit_code == result.json_output["exit_code"] == 2
    assert "the other team" in result.stderr
    assert "sandbox" in result.stderr


@pytest.mark.long
def test_ledger_bound_to_host(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses another API; an unused ledger is bound to none."""
    other_server = dataclasses.replace(api, base_url=api.base_url.replace("127.0.0.1", "localhost"))
    workspace.write_leads(make_leads(2))
    assert workspace.run_job(api, RunOptions(limit=0)).exit_code == 0
    assert workspace.run_job(other_server).exit_code == 0

    with pytest.raises(JobError, match="localhost"):
        workspace.run_job(api)


@pytest.mark.long
def test_new_ledger_beside_others_is_reported(api: SandboxApi, workspace: Workspace) -> None:
    """A renamed job would pay for everything again: the summary has a note."""
    workspace.write_leads(make_leads(2))
    workspace.run_in_process("run", "job.yaml", api=api)
    workspace.write_job(output="renamed.csv")
    workspace.job_file.rename(workspace.folder / "renamed.yaml")

    result = workspace.run_in_process("run", "renamed.yaml", "--json", "--log-file", "log", api=api)

    announced = [json.loads(line) for line in (workspace.folder / "log").read_text().splitlines()]
    assert any("job.db" in line.get("text", "") for line in announced)
    assert any("job.db" in note for note in result.json_output["notes"])


@pytest.mark.long
def test_first_and_sandbox_ledgers_are_not_reported(api: SandboxApi, workspace: Workspace) -> None:
    """Does not warn about a job that was run in the sandbox first."""
    workspace.write_leads(make_leads(2))
    first = workspace.run_in_process("run", "job.yaml", "--sandbox", "--json")

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert first.json_output["notes"] == result.json_output["notes"] == []


@pytest.mark.long
def test_shared_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """`ledger:` makes two jobs pay once for the same request."""
    workspace.write_job(ledger="shared.db")
    workspace.write_leads(make_leads(3))
    workspace.run_job(api)
    workspace.job_file.rename(workspace.folder / "other.yaml")
    Workspace(workspace.folder).write_job(ledger="shared.db", output="other.csv", name="second")

    summary = workspace.run_job(api)

    assert (summary.job, summary.submitted, summary.reused) == ("second", 0, 3)


# The vendor's defaults


def set_default_providers(monkeypatch: pytest.MonkeyPatch, *enabled: int) -> None:
    """Make these the providers of the sandbox's waterfall that are enabled by default."""
    providers = WATERFALLS["email_getter"].providers
    set_providers(monkeypatch, [dataclasses.replace(each, enabled=each.id in enabled) for each in providers])


def set_providers(monkeypatch: pytest.MonkeyPatch, providers: Iterable[Provider]) -> None:
    """Make these the providers of the sandbox's waterfall."""
    waterfall = dataclasses.replace(WATERFALLS["email_getter"], providers=tuple(providers))
    monkeypatch.setitem(WATERFALLS, "email_getter", waterfall)


def _request_counts(api: SandboxApi) -> set[tuple[int, ...]]:
    return {tuple(run["enrichments"]) for run in api.audit()["runs"]}


@pytest.mark.long
def test_changed_provider_defaults_are_reported(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeps the stored provider defaults, because new ones would be charged again, until `--update-providers`."""
    workspace.write_leads(make_leads(3))
    workspace.run_job(api)
    set_default_providers(monkeypatch, 833, 113)
    workspace.write_leads(make_leads(5))

    result = workspace.run_job(api)
    planned = workspace.run_in_process("plan", "job.yaml", "--update-providers", "-o", "new.plan", api=api)
    updated = workspace.run_job(api, RunOptions(update_providers=True))
    kept = workspace.run_job(api)

    assert result.submitted == 2
    assert any("833, 113" in note and "--update-providers" in note for note in result.notes)
    assert planned.stdout.startswith("5 requests to send")
    assert "job.yaml --plan new.plan --update-providers\n" in planned.stdout
    assert (updated.submitted, updated.notes) == (5, [])
    assert (kept.submitted, kept.notes) == (0, [])
    assert _request_counts(api) == {(833, 966, 701, 745), (833, 113)}


@pytest.mark.long
def test_removed_default_provider_is_named(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names a provider of the stored defaults that the API no longer lists, and the remedy under a cap."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    set_providers(monkeypatch, [each for each in WATERFALLS["email_getter"].providers if each.id in (966, 701)])

    (note,) = workspace.run_job(api).notes
    capped = workspace.run_in_process("run", "job.yaml", "--max-credits", "5", api=api)

    assert "this ledger keeps 833, 966, 701, 745, but the API no longer lists 833, 745; --update-providers" in note
    assert capped.exit_code == 5
    assert "switch to the current defaults with --update-providers, or run without `max_credits`" in capped.stderr


@pytest.mark.long
def test_explicit_providers_ignore_default_changes(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Does not report changed defaults when the job names its providers."""
    workspace.write_job(enrichments="[833]")
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    set_default_providers(monkeypatch, 966)

    summary = workspace.run_job(api)

    assert (summary.submitted, summary.notes) == (0, [])


# The input changes during the run


@pytest.mark.long
def test_input_changed_during_run(tmp_path: Path, workspace: Workspace) -> None:
    """The output has the new file's rows; new ones are pending, and exit 4 means run again."""
    workspace.write_leads(make_leads(6))
    changed: list[Path] = []
    with serve_api(tmp_path / "api.db", latency="fixed(0.5)") as api:
        process = workspace.start_subprocess("run", "job.yaml", "--json", api=api)
        while api.audit()["accepted"] < 6:
            pass
        changed.append(workspace.write_leads(make_leads(8)))
        out, err = process.communicate(timeout=90)
        second = workspace.run_job(api)

    summary = json.loads(out)
    assert process.returncode == summary["exit_code"] == 4, err
    assert "changed" in summary["error"]
    assert (summary["rows"], summary["pending"], summary["submitted"], summary["reused"]) == (8, 2, 6, 0)
    assert (second.exit_code, second.submitted, second.reused) == (0, 2, 6)


STEPS_JOB = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - name: first
    waterfall: email_getter
    params: {first_name: First Name, last_name: Last Name, company: Website}
    columns: {work_email: email}
  - {name: second, waterfall: person_getter, params: {email: work_email}, columns: {link: linkedin_url}}
changes: {path: changes.csv, key: [First Name]}
"""


@pytest.mark.parametrize("steps", first_quick(1, [False, True]))
@pytest.mark.parametrize("change", first_quick(1, ["broken", "gone", "columns"]))
def test_input_unusable_after_requests_were_sent(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, change: str, *, steps: bool
) -> None:
    """Whatever is wrong with the changed input, the run ends with exit 4, and the next one resumes."""
    leads = workspace.write_leads(make_leads(4))
    content = leads.read_text()
    submit = Databar.submit

    def change_input(*arguments: Any, **options: Any) -> str:
        match change:
            case "broken":
                leads.write_text(content + "a,b\n")
            case "gone":
                leads.unlink(missing_ok=True)
            case _:
                leads.write_text("A,B\n1,2\n")
        return submit(*arguments, **options)

    if steps:
        workspace.write_job(STEPS_JOB)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        with monkeypatch.context() as patched:
            patched.setattr(Databar, "submit", change_input)
            summary = workspace.run_job(api)
        leads.write_text(content)
        second = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted) == (4, 4)
    assert str(summary.error).startswith("the input changed during the run: ")
    assert summary.credits_spent > 0
    assert (second.exit_code, second.submitted) == (0, 4 if steps else 0)


def test_output_fails_after_the_input_changed(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with the output is said, though the input has changed, too."""
    workspace.write_leads(make_leads(2))
    submit = Databar.submit

    def change_files(*arguments: Any, **options: Any) -> str:
        workspace.write_leads(make_leads(3))
        (workspace.folder / "out.csv").mkdir(exist_ok=True)
        return submit(*arguments, **options)

    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        monkeypatch.setattr(Databar, "submit", change_files)
        summary = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted) == (1, 2)
    assert "out.csv" in str(summary.error)


def test_input_grows_between_steps(tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were added during the first step are pending, though the second step has read them."""
    workspace.write_job(STEPS_JOB)
    leads = workspace.write_leads(make_leads(3))
    submit = Databar.submit

    def add_rows(*arguments: Any, **options: Any) -> str:
        if not leads.read_bytes().count(b"First4"):
            workspace.write_leads(make_leads(5))
        return submit(*arguments, **options)

    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        monkeypatch.setattr(Databar, "submit", add_rows)
        summary = workspace.run_job(api)

    assert (summary.exit_code, summary.error) == (4, "the input changed during the run")
    assert (summary.rows, summary.submitted, summary.found, summary.pending) == (5, 6, 3, 2)


def _execute_sql(workspace: Workspace, sql: str, values: Sequence[object] = ()) -> None:
    db = sqlite3.connect(workspace.ledger_path)
    with db:
        db.execute(sql, values)
    db.close()


@pytest.mark.long
def test_all_executions_are_stored(api: SandboxApi, workspace: Workspace) -> None:
    """The ledger stores each run's summary."""
    workspace.write_leads(make_leads(2))
    summaries: list[RunSummary] = [workspace.run_job(api), workspace.run_job(api)]

    ledger = workspace.open_ledger()
    try:
        kept = records.list_executions(ledger, "job")
    finally:
        ledger.close()
    output = [json.loads(json.dumps(summary.as_json())) for summary in reversed(summaries)]
    assert [row.read_summary() for row in kept] == output


@pytest.mark.long
def test_run_without_new_requests(api: SandboxApi, workspace: Workspace) -> None:
    """A run with nothing to do requests only the account and the waterfall."""
    workspace.write_leads(make_leads(4))
    workspace.run_job(api, timing=SHORT_TIMEOUTS)
    before = api.audit()["requests"]

    summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)

    after = api.audit()["requests"]
    assert summary.polls == 0
    assert {name: after[name] - before[name] for name in after} == {"me": 1, "waterfalls": 1, "run": 0, "task": 0}


def test_open_tasks_collected_despite_header_clash(workspace: Workspace, tmp_path: Path) -> None:
    """Collects open tasks before the header clash ends the run."""
    workspace.write_leads(make_leads(3))
    with serve_api(tmp_path / "api.db", latency="fixed(20)") as api:
        workspace.submit_without_collecting(api)
        api.advance(60)
        leads = workspace.folder / "leads.csv"
        leads.write_text(leads.read_text().replace("Note", "work_email"))

        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert (result.exit_code, "already" in result.stderr) == (2, True)
    with closing(workspace.open_ledger()) as ledger:
        assert not transitions.submitted_tasks(ledger)


def test_accepted_in_doubt_is_not_retried_at_once(workspace: Workspace) -> None:
    """`--accept in_doubt` marks them as failed: `--retry failed` in the same run would pay again."""
    workspace.write_leads(make_leads(1))
    for states in ("failed", "expired,in_doubt"):
        result = workspace.run_in_process("run", "job.yaml", "--accept", "in_doubt", "--retry", states)
        assert (result.exit_code, "contradict each other" in result.stderr) == (2, True)
