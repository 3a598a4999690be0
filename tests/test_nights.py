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
from enrich.model import State
from enrich.receipt import Receipt
from enrich.sandbox.catalogue import WATERFALLS
from enrich.surroundings import Options
from tests.harness import HASTY, Api, Office, later, people, serving

DAY = 86_400


def again(*states: State) -> Options:
    """Ask these states again, by the person's word."""
    return Options(retry=frozenset(states))


def by_name(office: Office, name: str = "out.csv") -> dict[str, dict[str, str]]:
    """Return the rows of the output by the lead's first name."""
    return {row["First Name"]: row for row in office.output(name)}


def statuses(office: Office) -> list[str]:
    """Return the status column."""
    return [row["enrich_status"] for row in office.output()]


# The same leads, other leads


def test_appended_and_shuffled_leads_pay_only_for_the_new(api: Api, office: Office) -> None:
    """The row number is no identity: order and neighbours may change, the answers stay with their leads."""
    office.write_leads(people(30))
    office.run(api)
    before = by_name(office)
    leads = people(35)
    random.Random(7).shuffle(leads)
    office.write_leads(leads)

    receipt = office.run(api)

    assert (receipt.submitted, receipt.reused) == (5, 30)
    assert [row["First Name"] for row in office.output()] == [lead[0] for lead in leads]
    after = by_name(office)
    assert {name: after[name] for name in before} == before
    assert api.audit()["accepted"] == 35


def test_columns_that_are_not_asked_about_may_change(api: Api, office: Office) -> None:
    """A new note, another order of columns, a `www.` more: still the same question."""
    office.write_leads(people(6))
    office.run(api)
    header = ["Note", "Owner", "Website", "Last Name", "First Name", "Email"]
    office.write_leads(
        [["new", "me", f"company{n}.example", f" Last{n} ", f"First{n}", ""] for n in range(6)], header=header
    )

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.submitted, receipt.reused) == (0, 0, 6)
    assert [row["Note"] for row in office.output()] == ["new"] * 6


def test_another_question_is_another_payment(api: Api, office: Office) -> None:
    """Other providers, another order of them or a verifier make another question."""
    office.write_leads(people(3))
    for number, enrichments in enumerate(("[833, 966]", "[966, 833]", "[833]"), start=1):
        office.write_job(enrichments=enrichments)
        assert office.run(api).submitted == 3
        assert api.audit()["accepted"] == 3 * number
    office.write_job(enrichments="[833]", email_verifier="10")
    assert office.run(api).submitted == 3
    assert api.audit()["paid_twice"] == 0


def test_other_columns_of_the_same_answer_are_free(api: Api, office: Office) -> None:
    """The ledger keeps whole answers: a job that wants another field of them pays nothing."""
    office.write_job(waterfall="company_lookup", params="{company_website: Website}", columns="{industry: industry}")
    office.write_leads(people(9))
    first = office.run(api)
    office.write_job(
        waterfall="company_lookup", params="{company_website: Website}", columns="{city: headquarters.city, x: none}"
    )

    second = office.run(api)

    assert (second.submitted, second.found) == (0, first.found)
    assert {bool(row["city"]) for row in office.output() if row["enrich_status"] == "found"} == {True}


def test_a_lead_that_left_while_pending_is_never_paid_for(api: Api, office: Office) -> None:
    """Only what tonight's file wants is sent, whatever waits in the ledger from other nights."""
    office.write_leads(people(10))
    first = office.run(api, Options(limit=4))
    assert (first.exit_code, first.submitted, first.pending) == (0, 4, 6)
    office.write_leads(people(6))

    second = office.run(api)

    assert (second.submitted, second.pending) == (2, 0)
    assert api.audit()["accepted"] == 6


def test_a_lead_that_left_while_at_the_api_is_collected(tmp_path: Path, office: Office) -> None:
    """What was bought is fetched although tonight's file does not want it, for it may come back."""
    office.write_leads(people(4))
    with serving(tmp_path / "api.db", latency="fixed(30)") as api:
        office.leave_at_the_api(api)
        api.advance(60)
        office.write_leads([])
        empty = office.run(api)
        office.write_leads(people(4))
        back = office.run(api)
        audit = api.audit()

    assert (empty.exit_code, empty.rows, empty.submitted) == (0, 0, 0)
    assert empty.credits_spent == audit["credits_charged"]
    assert (back.submitted, back.reused, audit["accepted"]) == (0, 4, 4)


def test_a_limit_takes_the_leads_in_the_files_order(api: Api, office: Office) -> None:
    """`--limit N` asks the first N that are new; night by night the file is done."""
    office.write_leads(people(9))

    nights = [office.run(api, Options(limit=4)) for _ in range(3)]

    assert [night.submitted for night in nights] == [4, 4, 1]
    assert [night.exit_code for night in nights] == [0, 0, 0]
    assert [night.pending for night in nights] == [5, 1, 0]


def test_a_limit_counts_doubtful_requests_too(api: Api, office: Office) -> None:
    """What may have been bought is one of the N: a limit is a promise about money."""
    office.write_leads(people(9))
    api.fault("error-after", 2)

    receipt = office.run(api, Options(limit=3))

    assert api.audit()["accepted"] == 3
    assert (receipt.in_doubt, receipt.submitted, receipt.pending) == (2, 1, 6)


def test_what_is_due_first_is_asked_first(tmp_path: Path, office: Office) -> None:
    """What an earlier night left at the API is collected even by a run that may buy nothing."""
    office.write_leads(people(3))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api:
        office.leave_at_the_api(api)
        api.advance(90)
        office.write_leads(people(6))
        receipt = office.run(api, Options(limit=0))

    assert (receipt.exit_code, receipt.submitted, receipt.pending) == (0, 0, 3)
    assert statuses(office)[3:] == ["pending"] * 3
    assert any("collected first" in note for note in receipt.notes)


def test_a_result_that_expired_meanwhile_is_told_and_not_bought_again(tmp_path: Path, office: Office) -> None:
    """The API keeps a result for a day: who comes too late is told, and only `--retry expired` pays again."""
    office.write_leads(people(3))
    state = tmp_path / "api.db"
    with serving(state, latency="fixed(30)") as api:
        office.leave_at_the_api(api)
        api.advance(3 * DAY)
    with serving(state) as api:
        late = office.run(api)
        later = office.run(api)
        retried = office.run(api, again(State.EXPIRED))
        audit = api.audit()

    assert (late.exit_code, late.expired, late.submitted) == (10, 3, 0)
    assert (late.credits_unknown, late.credits_spent) == (3, 0)
    assert (later.exit_code, later.expired, later.submitted) == (0, 3, 0)
    assert (retried.exit_code, retried.expired, retried.submitted) == (0, 0, 3)
    assert audit["accepted"] == 6


# By the person's word


def test_failed_requests_are_asked_again_only_when_told(tmp_path: Path, office: Office) -> None:
    """A failure stays one, night after night, until `--retry failed`, which asks those and no others."""
    office.write_leads(people(30))
    with serving(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        first = office.run(api)
        second = office.run(api)
        doubts = office.run(api, again(State.IN_DOUBT, State.EXPIRED))
        third = office.run(api, again(State.FAILED))
        audit = api.audit()

    failed = first.failed or 0
    assert failed > 0
    assert (second.submitted, second.failed, second.exit_code) == (0, failed, 0)
    assert doubts.submitted == 0
    assert (third.submitted, third.failed, third.exit_code) == (failed, failed, 10)
    assert (audit["accepted"], audit["accepted_more_than_once"]) == (30 + failed, failed)


@pytest.mark.long
def test_failures_at_no_charge_are_asked_again_by_themselves(tmp_path: Path, office: Office) -> None:
    """A task that failed for free is sent again, up to `max_attempts`, and costs nothing extra."""
    office.write_leads(people(30))
    with serving(tmp_path / "api.db", failure_rate=0.5, free_failures=1.0) as api:
        receipt = office.run(api)
        audit = api.audit()

    assert (receipt.exit_code, receipt.failed) == (0, 0)
    assert audit["accepted"] == receipt.submitted > 30
    assert audit["paid_twice"] == 0
    assert receipt.credits_spent == pytest.approx(audit["credits_charged"])


def test_attempts_at_no_charge_come_to_an_end(tmp_path: Path, office: Office) -> None:
    """With `max_attempts: 1` a free failure is a failure."""
    office.write_job(policy="{max_attempts: 1}")
    office.write_leads(people(20))
    with serving(tmp_path / "api.db", failure_rate=0.5, free_failures=1.0) as api:
        receipt = office.run(api)

    assert (receipt.submitted, receipt.exit_code) == (20, 10)
    assert (receipt.failed or 0) > 0


def test_doubts_are_asked_again_only_when_told(api: Api, office: Office) -> None:
    """`--retry in_doubt` is the person's decision that it may cost twice."""
    office.write_leads(people(5))
    api.fault("error-after", 2)
    first = office.run(api)
    assert (first.exit_code, first.in_doubt) == (14, 2)

    retried = office.run(api, again(State.IN_DOUBT))

    assert (retried.exit_code, retried.in_doubt, retried.submitted) == (0, 0, 2)
    assert api.audit()["accepted_more_than_once"] == 2


def test_a_retry_asks_only_for_leads_of_this_file(api: Api, office: Office) -> None:
    """A doubt about a lead that is gone stays a doubt; nobody pays for it."""
    office.write_leads(people(4))
    api.fault("error-after", 4)
    office.run(api)
    office.write_leads(people(1))

    receipt = office.run(api, again(State.IN_DOUBT))

    assert (receipt.submitted, receipt.exit_code) == (1, 0)
    assert api.audit()["accepted"] == 5


def test_a_retry_that_was_refused_changes_nothing(tmp_path: Path, office: Office) -> None:
    """A person's word is for one run: when that is refused for lack of credits, tomorrow's cron does not act on it."""
    office.write_leads(people(4))
    with serving(tmp_path / "api.db", balance=50) as api:
        api.fault("error-after", 2)
        office.run(api)
        balance = api.audit()["balance"]
        api.top_up(-balance)
        refused = office.run(api, again(State.IN_DOUBT))
        api.top_up(balance)
        plain = office.run(api)
        audit = api.audit()

    assert refused.exit_code == 5
    assert (plain.exit_code, plain.in_doubt, plain.submitted) == (14, 2, 0)
    assert audit["accepted_more_than_once"] == 0


def test_a_retry_takes_a_shared_request_once(api: Api, office: Office) -> None:
    """Rows that share a doubtful request are all answered by one new run."""
    office.write_leads(people(2) * 3)
    api.fault("no-task-id", 2)
    assert office.run(api).in_doubt == 6

    receipt = office.run(api, again(State.IN_DOUBT))

    assert (receipt.submitted, receipt.in_doubt) == (2, 0)


# The age of answers


def test_answers_that_are_too_old_are_asked_again(tmp_path: Path, office: Office) -> None:
    """`policy.refresh` has an age for hits and one for misses; by default answers are good for ever."""
    state = tmp_path / "api.db"
    office.write_leads(people(20))
    with serving(state) as api:
        first = office.run(api)
        api.advance(20 * DAY)
        assert office.run(api, clock=later(20 * DAY)).submitted == 0
        office.write_job(policy="{refresh: {found: 90d, not_found: 14d}}")
        misses = office.run(api, clock=later(20 * DAY))
        assert office.run(api, clock=later(20 * DAY)).submitted == 0
        api.advance(80 * DAY)
        all_of_them = office.run(api, clock=later(100 * DAY))

    assert 0 < misses.submitted == (first.not_found or 0) < 20
    assert all_of_them.submitted == 20


def test_the_last_hit_stands_until_a_newer_one_comes(tmp_path: Path, office: Office) -> None:
    """A refresh that misses or fails does not take an address away that was paid for."""
    state = tmp_path / "api.db"
    office.write_leads(people(12))
    office.write_job(policy="{refresh: {found: 90d}}")
    with serving(state) as api:
        office.run(api)
        before = by_name(office)
        api.advance(100 * DAY)
    with serving(state, hit_rate=0.0) as api:
        api.fault("no-task-id")
        office.run(api, clock=later(100 * DAY))

    after = by_name(office)
    hits = [name for name, row in before.items() if row["enrich_status"] == "found"]
    assert hits
    for name in hits:
        assert after[name]["work_email"] == before[name]["work_email"]


def test_a_refresh_that_ends_in_doubt_is_told(tmp_path: Path, office: Office) -> None:
    """An old miss asked again without an answer is a doubt: the row and the exit code say so."""
    office.write_leads(people(3))
    office.write_job(policy="{refresh: {not_found: 14d}}")
    with serving(tmp_path / "api.db", hit_rate=0.0) as api:
        office.run(api)
        api.advance(20 * DAY)
        api.fault("error-after")

        receipt = office.run(api, clock=later(20 * DAY))

    assert (receipt.exit_code, receipt.in_doubt) == (14, 1)
    assert sorted(statuses(office)) == ["in_doubt", "not_found", "not_found"]


# Files that come back


def test_an_earlier_output_may_be_the_next_input(api: Api, office: Office) -> None:
    """Fed back in, nothing is paid again, our status columns are replaced, all other columns are kept."""
    office.write_leads(people(8))
    office.run(api)
    first = office.output()
    (office.folder / "out.csv").rename(office.folder / "again.csv")
    office.write_job(input="again.csv", columns="{work_email_2: email}")

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.submitted) == (0, 0)
    second = office.output()
    assert list(second[0]) == [
        *("First Name", "Last Name", "Website", "Email", "Note", "work_email", "work_email_2", "enrich_status"),
        *("enrich_error", "enrich_provider", "enrich_credits", "enrich_task_id", "enrich_at"),
    ]
    assert [row["work_email_2"] for row in second] == [row["work_email"] for row in first]
    assert [row["enrich_status"] for row in second] == [row["enrich_status"] for row in first]


def test_an_earlier_output_with_the_same_new_column_is_refused(api: Api, office: Office) -> None:
    """A column that the input has already is the person's: it is not overwritten in silence."""
    office.write_leads(people(2))
    office.run(api)
    (office.folder / "out.csv").rename(office.folder / "again.csv")
    office.write_job(input="again.csv")

    with pytest.raises(JobError, match="work_email"):
        office.run(api)


def test_a_name_that_only_looks_like_a_lead_may_decide_by_its_status(api: Api, office: Office) -> None:
    """`where` may look at an earlier output's status columns."""
    office.write_leads(people(12))
    first = office.run(api)
    (office.folder / "out.csv").rename(office.folder / "again.csv")
    office.write_job(input="again.csv", columns="{second: email}", where="enrich_status = 'not_found'")

    receipt = office.run(api)

    assert receipt.filtered == first.found


# Whose ledger it is


def test_the_sandbox_has_a_ledger_of_its_own(api: Api, office: Office) -> None:
    """Trying a job for free neither answers the real run nor costs it anything."""
    office.write_leads(people(4))

    free = office.command("run", "job.yaml", "--sandbox", "--json")
    real = office.command("run", "job.yaml", "--json", api=api)

    assert free.receipt["submitted"] == real.receipt["submitted"] == 4
    assert api.audit()["accepted"] == 4
    assert {path.name for path in office.ledger_path.parent.glob("*.db")} == {
        *("job.db", "job.sandbox.db", "job.sandbox.api.db"),
    }


def test_the_sandbox_remembers_from_night_to_night(office: Office) -> None:
    """The second free run pays no pretended credits either."""
    office.write_leads(people(4))
    office.command("run", "job.yaml", "--sandbox")

    receipt = office.command("run", "job.yaml", "--sandbox", "--json").receipt

    assert (receipt["submitted"], receipt["credits_spent"]) == (0, 0)


def test_a_ledger_belongs_to_one_workspace(api: Api, office: Office) -> None:
    """With the key of another workspace the ledger is refused: its answers were bought by somebody else."""
    office.write_leads(people(2))
    office.run(api)
    _execute(office, "UPDATE facts SET value = 'the other team' WHERE name = 'workspace'")

    done = office.command("run", "job.yaml", "--json", api=api)

    assert done.code == done.receipt["exit_code"] == 2
    assert "the other team" in done.stderr
    assert "sandbox" in done.stderr


def test_a_ledger_belongs_to_one_host(api: Api, office: Office) -> None:
    """The same for another API; what was never used is bound to nothing."""
    elsewhere = dataclasses.replace(api, base_url=api.base_url.replace("127.0.0.1", "localhost"))
    office.write_leads(people(2))
    assert office.run(api, Options(limit=0)).exit_code == 0
    assert office.run(elsewhere).exit_code == 0

    with pytest.raises(JobError, match="localhost"):
        office.run(api)


def test_a_new_ledger_beside_others_is_announced(api: Api, office: Office) -> None:
    """A job that was renamed would pay for everything again: the receipt says so."""
    office.write_leads(people(2))
    office.command("run", "job.yaml", api=api)
    office.write_job(output="renamed.csv")
    office.job_file.rename(office.folder / "renamed.yaml")

    done = office.command("run", "renamed.yaml", "--json", "--log-file", "log", api=api)

    announced = [json.loads(line) for line in (office.folder / "log").read_text().splitlines()]
    assert any("job.db" in line.get("text", "") and "ledger:" in line["text"] for line in announced)
    assert any("job.db" in note for note in done.receipt["notes"])


def test_the_first_ledger_and_the_sandboxs_are_no_news(api: Api, office: Office) -> None:
    """A job that was tried in the sandbox first has nothing to be warned of."""
    office.write_leads(people(2))
    first = office.command("run", "job.yaml", "--sandbox", "--json")

    done = office.command("run", "job.yaml", "--json", api=api)

    assert first.receipt["notes"] == done.receipt["notes"] == []


def test_two_jobs_may_share_a_ledger(api: Api, office: Office) -> None:
    """`ledger:` makes two jobs pay once for the same question."""
    office.write_job(ledger="shared.db")
    office.write_leads(people(3))
    office.run(api)
    office.job_file.rename(office.folder / "other.yaml")
    Office(office.folder).write_job(ledger="shared.db", output="other.csv", name="second")

    receipt = office.run(api)

    assert (receipt.job, receipt.submitted, receipt.reused) == ("second", 0, 3)


# The vendor's defaults


def _vendor_enables(monkeypatch: pytest.MonkeyPatch, *enabled: int) -> None:
    waterfall = WATERFALLS["email_getter"]
    providers = tuple(dataclasses.replace(provider, enabled=provider.id in enabled) for provider in waterfall.providers)
    monkeypatch.setitem(WATERFALLS, "email_getter", dataclasses.replace(waterfall, providers=providers))


def _asked(api: Api) -> set[tuple[int, ...]]:
    return {tuple(run["enrichments"]) for run in api.audit()["runs"]}


def test_a_change_of_the_vendors_defaults_is_told_and_not_followed(
    api: Api, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other defaults would be other questions, paid again: the ledger keeps the first ones until it is told."""
    office.write_leads(people(3))
    office.run(api)
    _vendor_enables(monkeypatch, 833, 113)
    office.write_leads(people(5))

    told = office.run(api)
    followed = office.run(api, Options(update_providers=True))
    kept = office.run(api)

    assert told.submitted == 2
    assert any("833, 113" in note and "--update-providers" in note for note in told.notes)
    assert (followed.submitted, followed.notes) == (5, [])
    assert (kept.submitted, kept.notes) == (0, [])
    assert _asked(api) == {(833, 966, 701, 745), (833, 113)}


def test_a_job_that_names_its_providers_hears_nothing_of_defaults(
    api: Api, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who chose is not told what others would get."""
    office.write_job(enrichments="[833]")
    office.write_leads(people(2))
    office.run(api)
    _vendor_enables(monkeypatch, 966)

    receipt = office.run(api)

    assert (receipt.submitted, receipt.notes) == (0, [])


# An input that changes while the run is at work


@pytest.mark.long
def test_an_input_that_changes_meanwhile_is_read_again(tmp_path: Path, office: Office) -> None:
    """The output has the rows of the new file; those that are new are pending, and exit 4 says to run again."""
    office.write_leads(people(6))
    changed: list[Path] = []
    with serving(tmp_path / "api.db", latency="fixed(0.5)") as api:
        process = office.start("run", "job.yaml", "--json", api=api)
        while api.audit()["accepted"] < 6:
            pass
        changed.append(office.write_leads(people(8)))
        out, err = process.communicate(timeout=30)
        second = office.run(api)

    receipt = json.loads(out)
    assert process.returncode == receipt["exit_code"] == 4, err
    assert "changed" in receipt["error"]
    assert (receipt["rows"], receipt["pending"], receipt["submitted"], receipt["reused"]) == (8, 2, 6, 0)
    assert (second.exit_code, second.submitted, second.reused) == (0, 2, 6)


def _execute(office: Office, sql: str, values: Sequence[object] = ()) -> None:
    db = sqlite3.connect(office.ledger_path)
    with db:
        db.execute(sql, values)
    db.close()


def test_every_execution_is_kept(api: Api, office: Office) -> None:
    """The ledger remembers each night's receipt."""
    office.write_leads(people(2))
    receipts: list[Receipt] = [office.run(api), office.run(api)]

    ledger = office.ledger()
    try:
        kept = ledger.executions("job")
    finally:
        ledger.close()
    told = [json.loads(json.dumps(receipt.as_json())) for receipt in reversed(receipts)]
    assert [json.loads(row["receipt"]) for row in kept] == told


def test_nothing_waits_for_a_patient_api(api: Api, office: Office) -> None:
    """A night with nothing to do asks the API who we are and what it offers, and nothing else."""
    office.write_leads(people(4))
    office.run(api, timing=HASTY)
    before = api.audit()["requests"]

    receipt = office.run(api, timing=HASTY)

    after = api.audit()["requests"]
    assert receipt.polls == 0
    assert {name: after[name] - before[name] for name in after} == {"me": 1, "waterfalls": 1, "run": 0, "task": 0}


def test_answers_are_collected_though_tonights_header_clashes(office: Office, tmp_path: Path) -> None:
    """What was paid for is fetched before the clash of columns ends the run."""
    office.write_leads(people(3))
    with serving(tmp_path / "api.db", latency="fixed(20)") as api:
        office.leave_at_the_api(api)
        api.advance(60)
        leads = office.folder / "leads.csv"
        leads.write_text(leads.read_text().replace("Note", "work_email"))

        done = office.command("run", "job.yaml", "--json", api=api)

    assert (done.code, "already" in done.stderr) == (2, True)
    with closing(office.ledger()) as ledger:
        assert not ledger.tasks()


def test_what_is_taken_for_lost_is_not_asked_again_in_the_same_breath(office: Office) -> None:
    """`--accept in_doubt` makes them failed: `--retry failed` beside it would pay for them once more."""
    office.write_leads(people(1))
    for states in ("failed", "expired,in_doubt"):
        done = office.command("run", "job.yaml", "--accept", "in_doubt", "--retry", states)
        assert (done.code, "would ask them again" in done.stderr) == (2, True)
