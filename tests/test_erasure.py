"""Forgetting a person and purging old answers: gone from the file, remembered as paid for, never bought again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from enrich.store.records import check
from tests.cases import first_quick
from tests.harness import BOTH_IN_TIME, IN_A_FILE, Api, Office, people, serving


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """A calm API."""
    with serving(tmp_path / "api.db") as served:
        yield served


@pytest.fixture
def office(office: Office, api: Api) -> Office:
    """A job with six leads, three of them answered."""
    office.write_leads(people(6))
    assert office.command("run", "job.yaml", "--limit", "3", api=api).code == 0
    return office


def bytes_of(office: Office) -> bytes:
    """All that the ledger's files hold; on a server, all that its tables tell."""
    if office.server:
        tables = office.sql("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        return repr([office.sql(f"SELECT * FROM {table}") for (table,) in tables]).encode()
    return b"".join(path.read_bytes() for path in office.ledger_path.parent.glob("job.db*"))


def forget(office: Office, *matches: str) -> int:
    """Forget who matches; return how many requests were."""
    options = [word for match in matches for word in ("--match", match)]
    done = office.command("forget", "job.yaml", *options, "--yes", "--json")
    assert done.code == 0, done.stderr
    return int(done.receipt["requests"])


def test_a_forgotten_person_is_in_no_byte_of_the_ledger(office: Office) -> None:
    """Params, answer, task and error are overwritten, not only unlinked; the books still balance."""
    email = office.output()[1]["work_email"]
    assert email.encode() in bytes_of(office)
    assert b"First1" in bytes_of(office)

    assert forget(office, "First Name= first1 ", "Last Name=LAST1") == 1

    for trace in (b"First1", b"company1.example", email.encode(), office.output()[1]["enrich_task_id"].encode()):
        assert trace not in bytes_of(office)
    assert b"First0" in bytes_of(office)
    assert check(office.place).problems == []


def test_the_group_of_a_forgotten_person_is_gone_too(office: Office, api: Api) -> None:
    """What a run has seen of its input says by whom its leads were capped."""
    office.write_job(caps="{by: Note, max: 1}")
    assert office.command("run", "job.yaml", api=api).code == 0
    forget(office, "First Name=First1")
    assert b"note 1" not in bytes_of(office)


def test_who_reads_the_ledger_as_it_was_keeps_the_person_in_it(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long report, say: that is told, and the same command takes her out when it has ended."""
    words = ("forget", "job.yaml", "--match", "First Name=First1", "--yes")
    with closing(office.ledger()) as report, report.still(), monkeypatch.context() as soon:
        soon.setattr("enrich.store.sqlite.PATIENCE_S", 0.1)
        soon.setattr("enrich.store.postgres.SEEN_S", 0.1)
        assert report.counts()
        refused = office.command(*words)
    kept = office.server is not None or b"First1" in bytes_of(office)  # what is deleted no table tells
    again = office.command(*words)

    assert (refused.code, kept, again.code) == (5, True, 0)
    assert "is being read" in refused.stderr
    assert b"First1" not in bytes_of(office)


def test_a_forgotten_person_is_never_asked_about_again(office: Office, api: Api) -> None:
    """Not by the next run, nor by --retry; her row says why, and what she cost stays in the books."""
    spent = office.command("status", "job.yaml", "--json").receipt["credits_spent"]
    assert forget(office, "First Name=First1") == 1
    assert forget(office, "First Name=First4") == 1

    done = office.command("run", "job.yaml", "--json", "--retry", "failed,expired,in_doubt", api=api)

    assert (done.code, done.receipt["submitted"], done.receipt["filtered"]) == (0, 2, 2)
    rows = office.output()
    assert [row["enrich_error"] for row in (rows[1], rows[4])] == ["forgotten at the person's wish"] * 2
    assert rows[1]["work_email"] == rows[4]["work_email"] == ""
    audit = api.audit()
    assert audit["accepted"] == 5
    now = office.command("status", "job.yaml", "--json").receipt["credits_spent"]
    assert now == pytest.approx(audit["credits_charged"]) != spent


def test_a_person_is_found_by_what_was_sent_or_answered_when_the_input_has_left_her(office: Office) -> None:
    """By a param, by the column it came from, and by the e-mail that was found."""
    by_answer = office.output()[2]["work_email"]
    office.write_leads(people(1, start=50))

    assert forget(office, "first_name=First0") == 1
    assert forget(office, "Last Name=Last1", "First Name=First1") == 1
    assert forget(office, f"work_email={by_answer}") == 1
    assert forget(office, f"Email={by_answer}") == 0


def test_all_that_is_asked_for_must_hold(office: Office) -> None:
    """One person's first name with another's last name is nobody."""
    assert forget(office, "First Name=First1", "Last Name=Last2") == 0


def test_a_name_that_is_nowhere_is_a_mistake(office: Office) -> None:
    """A typo must not pass for `nothing to erase`."""
    done = office.command("forget", "job.yaml", "--match", "Frist Name=First1", "--yes")
    assert (done.code, "did you mean `First Name`?" in done.stderr) == (2, True)
    assert office.command("forget", "job.yaml", "--match", "First1", "--yes").code == 2


@pytest.mark.parametrize(
    "words", first_quick(1, [("forget", "--match", "First Name=First1"), ("purge", "--older-than", "1d")], single=True)
)
def test_off_a_terminal_erasing_needs_a_yes(office: Office, words: tuple[str, ...]) -> None:
    """Nobody is there to be asked."""
    done = office.enrich(words[0], "job.yaml", *words[1:])
    assert (done.code, "--yes" in done.stderr) == (2, True)
    assert b"First1" in bytes_of(office)


def test_who_waits_at_the_api_is_not_forgotten_yet(tmp_path: Path) -> None:
    """The answer would come back; it is collected first."""
    office = Office(tmp_path)
    office.write_job()
    office.write_leads(people(2))
    with serving(tmp_path / "api.db", latency="fixed(600)") as api:
        office.leave_at_the_api(api)
        done = office.command("forget", "job.yaml", "--match", "First Name=First1", "--yes")
    assert (done.code, "wait at the API" in done.stderr) == (5, True)


@IN_A_FILE
def test_without_the_key_nothing_is_asked(office: Office, api: Api) -> None:
    """Those who were forgotten could not be told from new leads."""
    forget(office, "First Name=First1")
    office.ledger_path.with_name("job.db.key").unlink()

    done = office.command("run", "job.yaml", api=api)

    assert (done.code, "job.db.key" in done.stderr) == (5, True)
    assert api.audit()["accepted"] == 3


@pytest.mark.parametrize("key", first_quick(1, [None, b"", b"x" * 100, bytes(32)]))
@IN_A_FILE
def test_another_key_is_not_believed(office: Office, api: Api, key: bytes | None) -> None:
    """Neither a run nor the next wish to be forgotten goes on with it: the first would be asked about again."""
    forget(office, "First Name=First1")
    path = office.ledger_path.with_name("job.db.key")
    path.unlink()
    if key is not None:
        path.write_bytes(key)

    run = office.command("run", "job.yaml", api=api)
    again = office.command("forget", "job.yaml", "--match", "First Name=First2", "--yes")

    assert (run.code, again.code) == (5, 5)
    assert "job.db.key" in run.stderr
    assert "job.db.key" in again.stderr
    assert api.audit()["accepted"] == 3


@pytest.mark.parametrize(
    "change", first_quick(1, [{"email_verifier": "10"}, {"enrichments": "[701]"}, {"dedupe": "false"}])
)
def test_a_forgotten_person_is_not_asked_of_others_either(office: Office, api: Api, change: dict[str, str]) -> None:
    """Whoever is asked, and however often she is in the file, the question is about her."""
    forget(office, "First Name=First1")
    office.write_leads([*people(6), people(2)[1]])
    office.write_job(**change)

    done = office.command("run", "job.yaml", "--json", api=api)

    assert (done.code, done.receipt["filtered"]) == (0, 2)
    assert sum(run["accepted"] for run in api.audit()["runs"] if run["params"]["first_name"] == "First1") == 1


def test_who_was_purged_can_still_be_forgotten(office: Office, api: Api) -> None:
    """Her row of the input tells what was sent, when the ledger does not any more."""
    office.command("purge", "job.yaml", "--older-than", "0s", "--yes")
    assert forget(office, "First Name=First1") == 1
    office.write_job(email_verifier="10")
    done = office.command("run", "job.yaml", "--json", api=api)
    assert (done.code, done.receipt["filtered"]) == (0, 1)


def test_what_was_purged_is_not_bought_again(office: Office, api: Api) -> None:
    """The values are gone, from the file and from the output; that they were paid for is known."""
    emails = [row["work_email"] for row in office.output()[:3]]

    done = office.command("purge", "job.yaml", "--older-than", "0s", "--yes", "--json")

    assert (done.code, done.receipt["requests"]) == (0, 3)
    assert not any(email.encode() in bytes_of(office) for email in emails if email)
    assert b"First1" not in bytes_of(office)
    again = office.command("run", "job.yaml", "--json", api=api)
    assert (again.receipt["submitted"], again.receipt["reused"]) == (3, 3)
    assert all("purged" in row["enrich_error"] and not row["work_email"] for row in office.output()[:3])
    assert check(office.place).problems == []


def test_what_was_purged_can_be_refreshed(office: Office, api: Api) -> None:
    """When policy.refresh asks again, the params come from the input once more."""
    before = office.output()
    office.command("purge", "job.yaml", "--older-than", "0s", "--yes")
    office.write_job(policy="{refresh: {found: 0s, not_found: 0s}}")

    done = office.command("run", "job.yaml", "--json", api=api)

    assert (done.code, done.receipt["submitted"]) == (0, 6)
    assert [row["work_email"] for row in office.output()[:3]] == [row["work_email"] for row in before[:3]]
    assert check(office.place).problems == []


def test_younger_answers_stay(office: Office) -> None:
    """Nothing is purged before its time."""
    assert office.command("purge", "job.yaml", "--older-than", "1d", "--yes", "--json").receipt["requests"] == 0
    assert b"First1" in bytes_of(office)


def test_what_was_purged_can_be_explained(office: Office) -> None:
    """Its story is known, but for what was said."""
    office.command("purge", "job.yaml", "--older-than", "0s", "--yes")
    told = office.command("explain", "job.yaml", "--row", "2", "--json").receipt
    (row,) = told["rows"]
    assert (row["status"], "purged" in row["why"]) == (office.output()[1]["enrich_status"], True)
    assert [attempt["answer"] for attempt in row["request"]["attempts"]] == [None]
