"""The story of one lead: everything that happened to it, told from input and ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from enrich.look.prospects import outlook
from enrich.model import State
from enrich.spec import Policy, Refresh
from enrich.store.lock import hold
from enrich.surroundings import Options
from tests.cases import in_turn
from tests.harness import BOTH_IN_TIME, IN_A_FILE, Api, Office, kill, later, people, serving, until

DAY = 86_400


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def tell(office: Office, *which: str) -> dict[str, Any]:
    """Ask as a program would."""
    done = office.command("explain", "job.yaml", *which, "--json")
    assert done.code == 0, done.stderr
    return done.receipt


def shown(office: Office, *which: str) -> str:
    """Ask as a person would."""
    done = office.command("explain", "job.yaml", *which)
    assert (done.code, done.stderr) == (0, "")
    return done.stdout


def only(told: dict[str, Any]) -> dict[str, Any]:
    """The one row that was told of."""
    (row,) = told["rows"]
    found: dict[str, Any] = row
    return found


def test_every_row_is_told_as_the_output_has_it(tmp_path: Path, office: Office) -> None:
    """Found, missed and failed: status, provider, price, task, time and answer are those of the output."""
    office.write_leads(people(30))
    with serving(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0) as api:
        office.run(api)

    seen = set()
    for number, output in enumerate(office.output(), start=1):
        row = only(tell(office, "--row", str(number)))
        seen.add(output["enrich_status"])
        assert row["status"] == output["enrich_status"]
        attempt = row["request"]["attempts"][-1]
        assert attempt["task_id"] == output["enrich_task_id"]
        assert attempt["settled_at"] == output["enrich_at"]
        assert (attempt["provider"] or "") == output["enrich_provider"]
        assert attempt["credits"] == float(output["enrich_credits"])
        assert ((attempt["answer"] or {}).get("email") or "") == output["work_email"]
        assert (row["why"] or "") == output["enrich_error"]
        assert row["params"]["first_name"] == output["First Name"]
        if number > 12 and len(seen) == 3:
            break
    assert seen == {"found", "not_found", "failed"}


def test_a_person_reads_the_whole_story(api: Api, office: Office) -> None:
    """What it asks with and from which cell, the intent, the task, the answer, the price, and what comes next."""
    office.write_leads(people(12))
    office.run(api)
    number = next(n for n, row in enumerate(office.output(), start=1) if row["work_email"])
    output = office.output()[number - 1]

    text = shown(office, "--row", str(number))

    assert text.startswith(f"row {number}: found\n")
    assert f"company{number - 1}.example'  from Website: 'https://www.company{number - 1}.example/about'" in text
    for word in ("intent written", "credits reserved at most", f"accepted as task {output['enrich_task_id']}"):
        assert word in text
    assert f"{float(output['enrich_credits']):,.2f} credits, by {output['enrich_provider']}" in text
    assert f"email: {output['work_email']}" in text
    assert "stays as it is: the job has no policy.refresh for found" in text


def test_rows_that_are_never_asked_say_why(api: Api, office: Office) -> None:
    """Invalid names the param, filtered names the rule."""
    office.write_job(only_if_empty="[Email]", where="Note <> 'out'")
    office.write_leads(
        [
            ["Ada", "", "engine.example", "", ""],
            ["Ada", "King", "engine.example", "ada@engine.example", ""],
            ["Ada", "King", "engine.example", "", "out"],
            ["Ada", "King", "engine.example", "", ""],
        ]
    )
    office.run(api)

    told = [only(tell(office, "--row", str(number))) for number in (1, 2, 3, 4)]

    assert [row["status"] for row in told[:3]] == ["invalid", "filtered", "filtered"]
    assert told[0]["why"] == "last_name is empty (Last Name)"
    assert told[1]["why"] == "only_if_empty: Email has a value"
    assert told[2]["why"] == "where: Note <> 'out'"
    assert [row["request"] for row in told[:3]] == [None, None, None]
    assert told[3]["request"] is not None
    assert "row 2: filtered, only_if_empty: Email has a value" in shown(office, "--row", "2")
    assert "first_name  not asked  from First Name: 'Ada'" in shown(office, "--row", "1")


def test_rows_that_share_a_request_name_each_other(api: Api, office: Office) -> None:
    """Several rows match, whatever the case of the letters and the blanks around; all are told."""
    first, second = people(2)
    office.write_leads([first, second, first, [" First0 ", *first[1:]]])
    office.run(api)

    told = tell(office, "--match", "First Name=fIRST0 ")

    assert [(row["row"], row["shared_with"]) for row in told["rows"]] == [(1, [3, 4]), (3, [1, 4]), (4, [1, 3])]
    assert (told["matches"], told["gone"]) == (3, [])
    assert len({row["fingerprint"] for row in told["rows"]}) == 1
    assert "the same is asked by row 1, 4; paid once" in shown(office, "--row", "3")


def test_rows_that_are_not_deduplicated_have_their_own_stories(api: Api, office: Office) -> None:
    """With `dedupe: false` each occurrence is a request, and none is another's other question."""
    office.write_job(dedupe="false")
    office.write_leads(people(1) * 2)
    office.run(api)

    first, second = tell(office, "--match", "First Name=First0")["rows"]

    assert first["request"]["attempts"][0]["task_id"] != second["request"]["attempts"][0]["task_id"]
    assert first["shared_with"] == second["shared_with"] == first["other_questions"] == []


def test_no_more_than_twenty_are_told_of(office: Office) -> None:
    """The number of all is told."""
    office.write_leads([[*row[:2], "engine.example", "", "same"] for row in people(25)])

    told = tell(office, "--match", "Note=same")

    assert (told["matches"], len(told["rows"])) == (25, 20)
    assert "25 rows match; the first 20:" in shown(office, "--match", "Note=same")


def test_a_job_that_never_ran_is_told(office: Office) -> None:
    """The row is there, and nothing was ever asked; looking makes no ledger."""
    office.write_leads(people(2))

    text = shown(office, "--row", "2")

    assert "job has never run: nothing was ever asked" in text
    assert "row 2: pending" in text
    assert not office.ledger_path.parent.exists()


def test_a_row_that_is_new_has_no_story_yet(api: Api, office: Office) -> None:
    """The job has run, this row has not."""
    office.write_leads(people(1))
    office.run(api)
    office.write_leads(people(2))

    assert "never asked so far; the next run asks" in shown(office, "--row", "2")


def test_a_doubt_is_the_persons_to_decide(api: Api, office: Office) -> None:
    """The doubt, what may have been lost, and both ways out; a retry is the next attempt of the same story."""
    office.write_leads(people(1))
    api.fault("no-task-id")
    office.run(api)

    row = only(tell(office, "--row", "1"))
    assert row["status"] == "in_doubt"
    assert "--retry in_doubt" in row["request"]["outlook"]
    assert "--accept in_doubt" in row["request"]["outlook"]
    (doubt,) = row["request"]["attempts"]
    assert (doubt["task_id"], doubt["credits"]) == (None, None)
    assert "price not known" in shown(office, "--row", "1")

    office.run(api, Options(retry=frozenset({State.IN_DOUBT})))
    attempts = only(tell(office, "--row", "1"))["request"]["attempts"]
    assert [attempt["execution"] for attempt in attempts] == [1, 2]
    assert attempts[0] == doubt


def test_a_doubt_that_was_taken_for_lost_says_so(api: Api, office: Office) -> None:
    """The attempt stays in doubt on record, the request has failed by the person's word."""
    office.write_leads(people(1))
    api.fault("no-task-id")
    office.run(api)
    office.run(api, Options(accept_doubts=True))

    row = only(tell(office, "--row", "1"))

    assert row["status"] == "failed"
    assert row["request"]["attempts"][0]["state"] == "in_doubt"
    assert "taken for lost by --accept in_doubt" in row["request"]["outlook"]


@IN_A_FILE  # a server has its own time
def test_a_lead_that_was_refreshed_twice_has_three_attempts(tmp_path: Path, office: Office) -> None:
    """Each with its execution; the last hit stands, and the next refresh has its day."""
    office.write_job(policy="{refresh: {found: 90d, not_found: 14d}}")
    office.write_leads(people(1))
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        for number in range(3):
            office.run(api, clock=later(number * 100 * DAY))
            api.advance(100 * DAY)

    row = only(tell(office, "--row", "1"))

    assert [attempt["execution"] for attempt in row["request"]["attempts"]] == [1, 2, 3]
    assert {attempt["state"] for attempt in row["request"]["attempts"]} == {"found"}
    assert row["request"]["outlook"].startswith("would be asked again on ")
    assert row["request"]["outlook"].endswith("by policy.refresh (found: 90d)")


@IN_A_FILE  # a server has its own time
def test_the_last_hit_stands_when_its_refresh_missed(tmp_path: Path, office: Office) -> None:
    """The row is found, as in the output; the story has the miss, too."""
    office.write_job(policy="{refresh: {found: 90d}}")
    office.write_leads(people(1))
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        office.run(api)
        api.advance(100 * DAY)
    with serving(tmp_path / "api.db", hit_rate=0.0) as api:
        office.run(api, clock=later(100 * DAY))

    row = only(tell(office, "--row", "1"))

    assert row["status"] == office.output()[0]["enrich_status"] == "found"
    assert [attempt["state"] for attempt in row["request"]["attempts"]] == ["found", "not_found"]


def test_a_lead_that_left_the_file_is_found_in_the_ledger(api: Api, office: Office) -> None:
    """By a column that the job asks with, through its transforms; the rows that are there are not gone."""
    office.write_leads(people(3))
    office.run(api)
    office.write_leads(people(2, start=1))

    for match in ("First Name=first0", "Website=http://COMPANY0.example/"):
        told = tell(office, "--match", match)
        assert (told["matches"], told["rows"]) == (0, [])
        (gone,) = told["gone"]
        assert gone["params"]["last_name"] == "Last0"
        assert len(gone["attempts"]) == 1
    text = shown(office, "--match", "First Name=first0")
    assert "no row of" in text
    assert "not in the input any more, but in the ledger:" in text
    assert tell(office, "--match", "First Name=First1")["gone"] == []
    assert tell(office, "--match", "Note=note 0")["gone"] == []


def test_another_question_about_the_same_lead_is_told(api: Api, office: Office) -> None:
    """Other providers make another request; both belong to the lead's story."""
    office.write_leads(people(1))
    office.run(api)
    office.write_job(enrichments="[833]")
    office.run(api)

    row = only(tell(office, "--match", "Last Name=Last0"))

    assert row["request"]["enrichments"] == [833]
    (other,) = row["other_questions"]
    assert len(other["enrichments"]) > 1
    assert "also asked as another question" in shown(office, "--row", "1")


@pytest.mark.long
def test_it_can_be_asked_while_a_run_is_at_work(tmp_path: Path, office: Office) -> None:
    """What waits at the API says until when; after a kill it waits for the next run."""
    office.write_leads(people(1))
    with serving(tmp_path / "api.db", latency="fixed(3600)") as api:
        process = office.start("run", "job.yaml", api=api)
        until(lambda: api.audit()["accepted"] == 1)
        until(lambda: office.at_the_api() == 1)
        text = shown(office, "--row", "1")
        kill(process)

    assert text.startswith("row 1: pending\n")
    assert "waits at the API, which keeps the result until about " in text


@pytest.mark.parametrize(
    ("which", "code", "words"),
    [
        ([], 2, "--row N or --match"),
        (["--row", "1", "--match", "Note=x"], 2, "--row N or --match"),
        (["--row", "0"], 2, "--row"),
        (["--row", "3"], 2, "the input has 2 rows"),
        (["--match", "Email"], 2, "COLUMN=VALUE"),
        (["--match", "First_Name=x"], 2, "did you mean `First Name`"),
    ],
)
def test_a_wrong_question_is_exit_2(office: Office, which: list[str], code: int, words: str) -> None:
    """The message says what is right."""
    office.write_leads(people(2))

    done = office.command("explain", "job.yaml", *which)

    assert done.code == code
    assert words in done.stderr


def test_a_column_may_have_an_equals_sign_in_its_name(office: Office) -> None:
    """The longest name counts."""
    office.write_job(params="{first_name: a, last_name: a=b, company: c}")
    office.write_leads([["1", "2", "3"], ["b=2", "x", "y"]], header=["a", "a=b", "c"])

    assert [row["row"] for row in tell(office, "--match", "a=b=2")["rows"]] == [1]


@IN_A_FILE
def test_nothing_is_taken_or_changed(api: Api, office: Office) -> None:
    """It needs neither the lock nor the network, and leaves the ledger as it is."""
    office.write_leads(people(2))
    office.run(api)
    before = office.ledger_path.read_bytes()
    calls = api.audit()["requests"]

    with hold(office.place, 0):
        shown(office, "--row", "1")

    assert office.ledger_path.read_bytes() == before
    assert api.audit()["requests"] == calls


@in_turn(
    ("state", "at_work", "words"),
    [
        (State.PENDING, None, "asked by the next run"),
        (State.SUBMITTING, True, "right now"),
        (State.SUBMITTING, False, "the next run puts it in doubt"),
        (State.SUBMITTING, None, "or was when the program ended"),
        (State.FAILED, None, "only by --retry failed"),
        (State.EXPIRED, None, "only by --retry expired"),
        (State.FOUND, None, "no policy.refresh for found"),
    ],
)
def test_every_state_has_its_outlook(state: State, at_work: bool | None, words: str) -> None:  # noqa: FBT001 - a table
    """Nobody is left without a word of what comes next."""
    assert words in outlook(state, [], Policy(refresh=Refresh()), 0, at_work=at_work)
