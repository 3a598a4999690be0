"""One night after another: what is paid for again, and what never is."""

from __future__ import annotations

import dataclasses
import json
import random
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from enrich.errors import JobError
from enrich.models import State
from enrich.run.context import RunOptions
from enrich.run.summary import RunSummary
from enrich.sandbox.catalogue import WATERFALLS
from tests.support.workspace import SHORT_TIMEOUTS, SandboxApi, Workspace, clock_ahead, make_leads, serve_api

DAY = 86_400


def retry_options(*states: State) -> RunOptions:
    """Ask these states again, by the person's word."""
    return RunOptions(retry=frozenset(states))


def rows_by_first_name(workspace: Workspace, name: str = "out.csv") -> dict[str, dict[str, str]]:
    """Return the rows of the output by the lead's first name."""
    return {row["First Name"]: row for row in workspace.read_output(name)}


def status_column(workspace: Workspace) -> list[str]:
    """Return the status column."""
    return [row["enrich_status"] for row in workspace.read_output()]


# The same leads, other leads


def test_only_new_leads_are_sent(api: SandboxApi, workspace: Workspace) -> None:
    """The row number is no identity: order and neighbours may change, the answers stay with their leads."""
    workspace.write_leads(make_leads(30))
    workspace.run_job(api)
    before = rows_by_first_name(workspace)
    leads = make_leads(35)
    random.Random(7).shuffle(leads)
    workspace.write_leads(leads)

    summary = workspace.run_job(api)

    assert (summary.submitted, summary.reused) == (5, 30)
    assert [row["First Name"] for row in workspace.read_output()] == [lead[0] for lead in leads]
    after = rows_by_first_name(workspace)
    assert {name: after[name] for name in before} == before
    assert api.audit()["accepted"] == 35


def test_unrelated_columns_may_change(api: SandboxApi, workspace: Workspace) -> None:
    """A new note, another order of columns, a `www.` more: still the same question."""
    workspace.write_leads(make_leads(6))
    workspace.run_job(api)
    header = ["Note", "Owner", "Website", "Last Name", "First Name", "Email"]
    workspace.write_leads(
        [["new", "me", f"company{n}.example", f" Last{n} ", f"First{n}", ""] for n in range(6)], header=header
    )

    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.submitted, summary.reused) == (0, 0, 6)
    assert [row["Note"] for row in workspace.read_output()] == ["new"] * 6


def test_other_providers_are_sent_again(api: SandboxApi, workspace: Workspace) -> None:
    """Other providers, another order of them or a verifier make another question."""
    workspace.write_leads(make_leads(3))
    for number, enrichments in enumerate(("[833, 966]", "[966, 833]", "[833]"), start=1):
        workspace.write_job(enrichments=enrichments)
        assert workspace.run_job(api).submitted == 3
        assert api.audit()["accepted"] == 3 * number
    workspace.write_job(enrichments="[833]", email_verifier="10")
    assert workspace.run_job(api).submitted == 3
    assert api.audit()["paid_twice"] == 0


def test_other_result_columns_are_free(api: SandboxApi, workspace: Workspace) -> None:
    """The ledger keeps whole answers: a job that wants another field of them pays nothing."""
    workspace.write_job(waterfall="company_lookup", params="{company_website: Website}", columns="{industry: industry}")
    workspace.write_leads(make_leads(9))
    first = workspace.run_job(api)
    workspace.write_job(
        waterfall="company_lookup", params="{company_website: Website}", columns="{city: headquarters.city, x: none}"
    )

    second = workspace.run_job(api)

    assert (second.submitted, second.found) == (0, first.found)
    assert {bool(row["city"]) for row in workspace.read_output() if row["enrich_status"] == "found"} == {True}


def test_removed_pending_lead_is_not_sent(api: SandboxApi, workspace: Workspace) -> None:
    """Only what tonight's file wants is sent, whatever waits in the ledger from other nights."""
    workspace.write_leads(make_leads(10))
    first = workspace.run_job(api, RunOptions(limit=4))
    assert (first.exit_code, first.submitted, first.pending) == (0, 4, 6)
    workspace.write_leads(make_leads(6))

    second = workspace.run_job(api)

    assert (second.submitted, second.pending) == (2, 0)
    assert api.audit()["accepted"] == 6


@pytest.mark.long
def test_removed_open_lead_is_collected(tmp_path: Path, workspace: Workspace) -> None:
    """What was bought is fetched although tonight's file does not want it, for it may come back."""
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
    """`--limit N` asks the first N that are new; night by night the file is done."""
    workspace.write_leads(make_leads(9))

    runs = [workspace.run_job(api, RunOptions(limit=4)) for _ in range(3)]

    assert [night.submitted for night in runs] == [4, 4, 1]
    assert [night.exit_code for night in runs] == [0, 0, 0]
    assert [night.pending for night in runs] == [5, 1, 0]


def test_limit_counts_unconfirmed(api: SandboxApi, workspace: Workspace) -> None:
    """What may have been bought is one of the N: a limit is a promise about money."""
    workspace.write_leads(make_leads(9))
    api.inject_fault("error-after", 2)

    summary = workspace.run_job(api, RunOptions(limit=3))

    assert api.audit()["accepted"] == 3
    assert (summary.in_doubt, summary.submitted, summary.pending) == (2, 1, 6)


def test_open_tasks_collected_with_zero_limit(tmp_path: Path, workspace: Workspace) -> None:
    """What an earlier night left at the API is collected even by a run that may buy nothing."""
    workspace.write_leads(make_leads(3))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        workspace.submit_without_collecting(api)
        api.advance(90)
        workspace.write_leads(make_leads(6))
        summary = workspace.run_job(api, RunOptions(limit=0))

    assert (summary.exit_code, summary.submitted, summary.pending) == (0, 0, 3)
    assert status_column(workspace)[3:] == ["pending"] * 3
    assert any("collected first" in note for note in summary.notes)


@pytest.mark.long
def test_expired_result_is_not_resent(tmp_path: Path, workspace: Workspace) -> None:
    """The API keeps a result for a day: who comes too late is told, and only `--retry expired` pays again."""
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


# By the person's word


def test_failed_requests_need_retry(tmp_path: Path, workspace: Workspace) -> None:
    """A failure stays one, night after night, until `--retry failed`, which asks those and no others."""
    workspace.write_leads(make_leads(30))
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
    assert (audit["accepted"], audit["accepted_more_than_once"]) == (30 + failed, failed)


@pytest.mark.long
def test_free_failures_are_retried(tmp_path: Path, workspace: Workspace) -> None:
    """A task that failed for free is sent again, up to `max_attempts`, and costs nothing extra."""
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


def test_in_doubt_needs_retry(api: SandboxApi, workspace: Workspace) -> None:
    """`--retry in_doubt` is the person's decision that it may cost twice."""
    workspace.write_leads(make_leads(5))
    api.inject_fault("error-after", 2)
    first = workspace.run_job(api)
    assert (first.exit_code, first.in_doubt) == (14, 2)

    retried = workspace.run_job(api, retry_options(State.IN_DOUBT))

    assert (retried.exit_code, retried.in_doubt, retried.submitted) == (0, 0, 2)
    assert api.audit()["accepted_more_than_once"] == 2


@pytest.mark.long
def test_retry_only_for_rows_in_input(api: SandboxApi, workspace: Workspace) -> None:
    """A doubt about a lead that is gone stays a doubt; nobody pays for it."""
    workspace.write_leads(make_leads(4))
    api.inject_fault("error-after", 4)
    workspace.run_job(api)
    workspace.write_leads(make_leads(1))

    summary = workspace.run_job(api, retry_options(State.IN_DOUBT))

    assert (summary.submitted, summary.exit_code) == (1, 0)
    assert api.audit()["accepted"] == 5


@pytest.mark.long
def test_retry_is_not_remembered_after_refusal(tmp_path: Path, workspace: Workspace) -> None:
    """A person's word is for one run: when that is refused for lack of credits, tomorrow's cron does not act on it."""
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
    """Rows that share a doubtful request are all answered by one new run."""
    workspace.write_leads(make_leads(2) * 3)
    api.inject_fault("no-task-id", 2)
    assert workspace.run_job(api).in_doubt == 6

    summary = workspace.run_job(api, retry_options(State.IN_DOUBT))

    assert (summary.submitted, summary.in_doubt) == (2, 0)


# The age of answers


@pytest.mark.long
def test_refresh_of_old_answers(tmp_path: Path, workspace: Workspace) -> None:
    """`policy.refresh` has an age for hits and one for misses; by default answers are good for ever."""
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
        all_of_them = workspace.run_job(api, clock=clock_ahead(100 * DAY))

    assert 0 < misses.submitted == (first.not_found or 0) < 20
    assert all_of_them.submitted == 20


@pytest.mark.long
def test_last_match_kept_during_refresh(tmp_path: Path, workspace: Workspace) -> None:
    """A refresh that misses or fails does not take an address away that was paid for."""
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
    """An old miss asked again without an answer is a doubt: the row and the exit code say so."""
    workspace.write_leads(make_leads(3))
    workspace.write_job(policy="{refresh: {not_found: 14d}}")
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        workspace.run_job(api)
        api.advance(20 * DAY)
        api.inject_fault("error-after")

        summary = workspace.run_job(api, clock=clock_ahead(20 * DAY))

    assert (summary.exit_code, summary.in_doubt) == (14, 1)
    assert sorted(status_column(workspace)) == ["in_doubt", "not_found", "not_found"]


# Files that come back


@pytest.mark.long
def test_output_as_next_input(api: SandboxApi, workspace: Workspace) -> None:
    """Fed back in, nothing is paid again, our status columns are replaced, all other columns are kept."""
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
    """A column that the input has already is the person's: it is not overwritten in silence."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    (workspace.folder / "out.csv").rename(workspace.folder / "again.csv")
    workspace.write_job(input="again.csv")

    with pytest.raises(JobError, match="work_email"):
        workspace.run_job(api)


@pytest.mark.long
def test_where_uses_status_columns(api: SandboxApi, workspace: Workspace) -> None:
    """`where` may look at an earlier output's status columns."""
    workspace.write_leads(make_leads(12))
    first = workspace.run_job(api)
    (workspace.folder / "out.csv").rename(workspace.folder / "again.csv")
    workspace.write_job(input="again.csv", columns="{second: email}", where="enrich_status = 'not_found'")

    summary = workspace.run_job(api)

    assert summary.filtered == first.found


# Whose ledger it is


@pytest.mark.long
def test_sandbox_ledger_is_separate(api: SandboxApi, workspace: Workspace) -> None:
    """Trying a job for free neither answers the real run nor costs it anything."""
    workspace.write_leads(make_leads(4))

    free = workspace.run_in_process("run", "job.yaml", "--sandbox", "--json")
    real = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert free.json_output["submitted"] == real.json_output["submitted"] == 4
    assert api.audit()["accepted"] == 4
    assert {path.name for path in workspace.ledger_path.parent.glob("*.db")} == {
        *("job.db", "job.sandbox.db", "job.sandbox.api.db"),
    }


@pytest.mark.long
def test_sandbox_reuses_answers(workspace: Workspace) -> None:
    """The second free run pays no pretended credits either."""
    workspace.write_leads(make_leads(4))
    workspace.run_in_process("run", "job.yaml", "--sandbox")

    summary = workspace.run_in_process("run", "job.yaml", "--sandbox", "--json").json_output

    assert (summary["submitted"], summary["credits_spent"]) == (0, 0)


def test_ledger_bound_to_workspace(api: SandboxApi, workspace: Workspace) -> None:
    """With the key of another workspace the ledger is refused: its answers were bought by somebody else."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    _execute_sql(workspace, "UPDATE facts SET value = 'the other team' WHERE name = 'workspace'")

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert result.exit_code == result.json_output["exit_code"] == 2
    assert "the other team" in result.stderr
    assert "sandbox" in result.stderr


@pytest.mark.long
def test_ledger_bound_to_host(api: SandboxApi, workspace: Workspace) -> None:
    """The same for another API; what was never used is bound to nothing."""
    other_server = dataclasses.replace(api, base_url=api.base_url.replace("127.0.0.1", "localhost"))
    workspace.write_leads(make_leads(2))
    assert workspace.run_job(api, RunOptions(limit=0)).exit_code == 0
    assert workspace.run_job(other_server).exit_code == 0

    with pytest.raises(JobError, match="localhost"):
        workspace.run_job(api)


@pytest.mark.long
def test_new_ledger_beside_others_is_reported(api: SandboxApi, workspace: Workspace) -> None:
    """A job that was renamed would pay for everything again: the receipt says so."""
    workspace.write_leads(make_leads(2))
    workspace.run_in_process("run", "job.yaml", api=api)
    workspace.write_job(output="renamed.csv")
    workspace.job_file.rename(workspace.folder / "renamed.yaml")

    result = workspace.run_in_process("run", "renamed.yaml", "--json", "--log-file", "log", api=api)

    announced = [json.loads(line) for line in (workspace.folder / "log").read_text().splitlines()]
    assert any("job.db" in line.get("text", "") and "ledger:" in line["text"] for line in announced)
    assert any("job.db" in note for note in result.json_output["notes"])


@pytest.mark.long
def test_first_and_sandbox_ledgers_are_not_reported(api: SandboxApi, workspace: Workspace) -> None:
    """A job that was tried in the sandbox first has nothing to be warned of."""
    workspace.write_leads(make_leads(2))
    first = workspace.run_in_process("run", "job.yaml", "--sandbox", "--json")

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert first.json_output["notes"] == result.json_output["notes"] == []


@pytest.mark.long
def test_shared_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """`ledger:` makes two jobs pay once for the same question."""
    workspace.write_job(ledger="shared.db")
    workspace.write_leads(make_leads(3))
    workspace.run_job(api)
    workspace.job_file.rename(workspace.folder / "other.yaml")
    Workspace(workspace.folder).write_job(ledger="shared.db", output="other.csv", name="second")

    summary = workspace.run_job(api)

    assert (summary.job, summary.submitted, summary.reused) == ("second", 0, 3)


# The vendor's defaults


def _set_default_providers(monkeypatch: pytest.MonkeyPatch, *enabled: int) -> None:
    waterfall = WATERFALLS["email_getter"]
    providers = tuple(dataclasses.replace(provider, enabled=provider.id in enabled) for provider in waterfall.providers)
    monkeypatch.setitem(WATERFALLS, "email_getter", dataclasses.replace(waterfall, providers=providers))


def _request_counts(api: SandboxApi) -> set[tuple[int, ...]]:
    return {tuple(run["enrichments"]) for run in api.audit()["runs"]}


@pytest.mark.long
def test_changed_provider_defaults_are_reported(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other defaults would be other questions, paid again: the ledger keeps the first ones until it is told."""
    workspace.write_leads(make_leads(3))
    workspace.run_job(api)
    _set_default_providers(monkeypatch, 833, 113)
    workspace.write_leads(make_leads(5))

    result = workspace.run_job(api)
    followed = workspace.run_job(api, RunOptions(update_providers=True))
    kept = workspace.run_job(api)

    assert result.submitted == 2
    assert any("833, 113" in note and "--update-providers" in note for note in result.notes)
    assert (followed.submitted, followed.notes) == (5, [])
    assert (kept.submitted, kept.notes) == (0, [])
    assert _request_counts(api) == {(833, 966, 701, 745), (833, 113)}


@pytest.mark.long
def test_explicit_providers_ignore_default_changes(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who chose is not told what others would get."""
    workspace.write_job(enrichments="[833]")
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    _set_default_providers(monkeypatch, 966)

    summary = workspace.run_job(api)

    assert (summary.submitted, summary.notes) == (0, [])


# An input that changes while the run is at work


@pytest.mark.long
def test_input_changed_during_run(tmp_path: Path, workspace: Workspace) -> None:
    """The output has the rows of the new file; those that are new are pending, and exit 4 says to run again."""
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


def _execute_sql(workspace: Workspace, sql: str, values: Sequence[object] = ()) -> None:
    db = sqlite3.connect(workspace.ledger_path)
    with db:
        db.execute(sql, values)
    db.close()


@pytest.mark.long
def test_all_executions_are_stored(api: SandboxApi, workspace: Workspace) -> None:
    """The ledger remembers each night's receipt."""
    workspace.write_leads(make_leads(2))
    summaries: list[RunSummary] = [workspace.run_job(api), workspace.run_job(api)]

    ledger = workspace.open_ledger()
    try:
        kept = ledger.executions("job")
    finally:
        ledger.close()
    output = [json.loads(json.dumps(receipt.as_json())) for receipt in reversed(summaries)]
    assert [json.loads(row["receipt"]) for row in kept] == output


@pytest.mark.long
def test_run_without_new_requests(api: SandboxApi, workspace: Workspace) -> None:
    """A night with nothing to do asks the API who we are and what it offers, and nothing else."""
    workspace.write_leads(make_leads(4))
    workspace.run_job(api, timing=SHORT_TIMEOUTS)
    before = api.audit()["requests"]

    summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)

    after = api.audit()["requests"]
    assert summary.polls == 0
    assert {name: after[name] - before[name] for name in after} == {"me": 1, "waterfalls": 1, "run": 0, "task": 0}


def test_open_tasks_collected_despite_header_clash(workspace: Workspace, tmp_path: Path) -> None:
    """What was paid for is fetched before the clash of columns ends the run."""
    workspace.write_leads(make_leads(3))
    with serve_api(tmp_path / "api.db", latency="fixed(20)") as api:
        workspace.submit_without_collecting(api)
        api.advance(60)
        leads = workspace.folder / "leads.csv"
        leads.write_text(leads.read_text().replace("Note", "work_email"))

        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)

    assert (result.exit_code, "already" in result.stderr) == (2, True)
    with closing(workspace.open_ledger()) as ledger:
        assert not ledger.submitted_tasks()


def test_accepted_in_doubt_is_not_retried_at_once(workspace: Workspace) -> None:
    """`--accept in_doubt` makes them failed: `--retry failed` beside it would pay for them once more."""
    workspace.write_leads(make_leads(1))
    for states in ("failed", "expired,in_doubt"):
        result = workspace.run_in_process("run", "job.yaml", "--accept", "in_doubt", "--retry", states)
        assert (result.exit_code, "would ask them again" in result.stderr) == (2, True)
