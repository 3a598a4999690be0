"""The rescue file: taken in once, whatever the ledger has meanwhile; refused when damaged; erased with the ledger."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.errors import Refused
from enrich.model import State
from enrich.store.ledger import Ledger
from enrich.store.records import check
from enrich.store.rescue import remove_taken, take_in_files
from enrich.store.rescue_file import Paid, RescueFile, read_rescue
from tests.books import BOUND, CALL, FOUND, MISSED, Books, fingerprint, params
from tests.cases import first_quick
from tests.harness import CALM, Api, Office, people, serving, until

RUN = ("run", "job.yaml", "--json")


def paid(number: int, state: str = "submitted", task: str | None = "task", **more: Any) -> Paid:
    """Write about the request of a lead."""
    told: dict[str, Any] = {
        "ledger": "/somewhere/leads.db",
        "attempt": number,
        "fingerprint": fingerprint(number).hex(),
        "call": CALL.canonical(),
        "params": params(number),
        "paths": ["email"],
        "state": state,
        "task_id": task,
        "claimed_ms": 1_000,
        "submitted_ms": None if task is None else 2_000,
        "settled_ms": None if state in ("submitting", "submitted") else 3_000,
        "reserved": 5,
    }
    if state in ("found", "not_found"):
        told |= {"answer": (FOUND if state == "found" else MISSED).raw, "credits": 2}
    return Paid(**{**BOUND, **told, **more})


def take(books: Books, *lines: Paid) -> str:
    """Take in lines; say what came of them."""
    return str(books.do(Ledger.take_in, lines, "job", 9_000))


def states(books: Books) -> dict[int, str]:
    """Tell where each lead's request stands."""
    rows = books.ledger._db.execute("SELECT fingerprint, state FROM requests").fetchall()
    return {int.from_bytes(name): state for name, state in rows}


def sound(books: Books) -> None:
    """Expect that all invariants hold."""
    assert check(books.place).problems == []


# Into the ledger


def test_a_new_ledger_gets_everything(books: Books) -> None:
    """Open tasks are asked for again, answers count, doubts stay doubts; what was not accepted is free to be sent."""
    lines = [
        paid(1, task="a"),
        paid(2, "found", task="b"),
        paid(3, "not_found", task="c"),
        paid(4, "in_doubt", task=None),
        paid(5, "submitting", task=None),
        paid(6, "refused", task=None),
        paid(7, "failed", task="d", credits=0),
    ]

    said = take(books, *lines)

    assert said == "1 tasks to fetch, 3 answers, 2 unconfirmed requests (in_doubt)"
    assert states(books) == {
        1: "submitted",
        2: "found",
        3: "not_found",
        4: "in_doubt",
        5: "in_doubt",
        7: "failed",
    }
    (task,) = books.ledger.tasks()
    assert (task.task_id, task.paths) == ("a", ("email",))
    assert books.ledger.fact("workspace") == BOUND["workspace"]
    sound(books)
    assert take(books, *lines).endswith("already known")
    sound(books)


def test_the_attempt_that_was_on_the_wire_is_completed(books: Books) -> None:
    """The file says `submitting`; the rescue file has what the API said."""
    books.begin(1, 2, 3, 4)
    claims = [books.claim() for _ in range(4)]
    assert claims
    lines = [
        paid(1, task="a"),
        paid(2, "found", task="b"),
        paid(3, "refused", task=None),
        paid(4, "in_doubt", task=None),
    ]

    said = take(books, *lines)

    assert said == "1 tasks to fetch, 1 answers, 1 unconfirmed requests (in_doubt), 1 requests that were not accepted"
    assert states(books) == {1: "submitted", 2: "found", 3: "pending", 4: "in_doubt"}
    sound(books)


def test_a_doubt_is_cleared_by_its_task(books: Books) -> None:
    """A run between has put it in doubt."""
    books.begin(1)
    books.claim()
    books.do(Ledger.recover, 1_500)

    take(books, paid(1, task="a"))

    assert states(books) == {1: "submitted"}
    assert books.one("SELECT count(*) FROM attempts") == (1,)
    sound(books)


def test_what_the_ledger_knows_better_stays(books: Books) -> None:
    """An answer is not replaced, a task that another request has is not asked for in its place."""
    books.begin(1, 2)
    books.settle(books.submit("a"))
    books.submit("b")

    take(books, paid(1, task="z", claimed_ms=500), paid(2, task="b", claimed_ms=500), paid(3, task="a"))

    assert states(books) == {1: "found", 2: "submitted", 3: "in_doubt"}
    assert [task.task_id for task in books.ledger.tasks()] == ["b"]
    sound(books)


def test_requests_that_were_sent_as_one_task_stay_together(books: Books) -> None:
    """All of them or none: answers go by their places."""
    whole = [paid(number, task="t", bundle=1, place=number, size=3) for number in range(3)]
    torn = [paid(number, task="u", bundle=2, place=number - 10, size=3, claimed_ms=1_001) for number in (10, 11)]

    take(books, *whole, *torn)

    (task,) = books.ledger.tasks()
    assert (task.task_id, len(task.attempts)) == ("t", 3)
    assert states(books) == dict.fromkeys(range(3), "submitted") | dict.fromkeys((10, 11), "in_doubt")
    sound(books)


def test_another_workspace_is_refused(books: Books) -> None:
    """Nothing is taken in."""
    books.begin(1)
    books.submit("a")

    with pytest.raises(Refused, match="another workspace"):
        take(books, paid(2, workspace="theirs"))


STATES = ["submitting", "submitted", "in_doubt", "refused", "found", "not_found", "failed", "expired"]


@given(
    moves=st.lists(st.sampled_from(["claim", "submit", "settle", "doubt"]), max_size=8),
    told=st.lists(
        st.tuples(st.integers(0, 7), st.sampled_from(STATES), st.integers(0, 5), st.sampled_from([1_000, 1_001]))
    ),
)
def test_any_file_leaves_any_ledger_sound(
    tmp_path_factory: pytest.TempPathFactory, moves: list[str], told: list[tuple[int, str, int, int]]
) -> None:
    """Taken in twice or in parts it changes nothing more, no task belongs to two requests, and no answer is lost."""
    books = Books.open(tmp_path_factory.mktemp("any") / "job.db").begin(*range(8))
    for number, move in enumerate(moves):
        attempt = books.claim().attempt_id
        if move != "claim":
            books.do(Ledger.accepted, [(attempt, f"task-{number}", books.now)], BOUND)
        if move == "settle":
            books.settle(attempt)
        if move == "doubt":
            books.do(Ledger.doubt, [(attempt, "404", books.now, None)])
    before = states(books)
    lines = [
        paid(
            number,
            state,
            None if state in ("submitting", "in_doubt", "refused") else f"task-{task}",
            attempt=at,
            claimed_ms=claimed,
        )
        for at, (number, state, task, claimed) in enumerate(told)
    ]

    take(books, *lines)

    sound(books)
    after = states(books)
    assert {name for name, state in before.items() if state == "found"} <= {
        name for name, state in after.items() if state == "found"
    }
    open_tasks = [task.task_id for task in books.ledger.tasks()]
    assert len(open_tasks) == len(set(open_tasks))
    counted = books.one("SELECT count(*) FROM attempts")
    take(books, *lines)
    sound(books)
    assert (states(books), books.one("SELECT count(*) FROM attempts")) == (after, counted)
    books.ledger.close()


# The file


def test_it_survives_the_way_through_the_file(tmp_path: Path) -> None:
    """Of several lines about an attempt the last counts; room that was not used is no line."""
    file = RescueFile(tmp_path / "job.db")
    assert file.append([paid(1, "submitting", task=None), paid(2)])
    assert file.append([paid(1, "found", error="ü\n\u2028", answer='{"data": "\\u0000"}')])
    assert file.path == tmp_path / "job.db.rescue"

    lines = read_rescue(file.path)  # as a kill leaves it

    assert [(line.attempt, line.state) for line in lines] == [(1, "found"), (2, "submitted")]
    assert lines[0].error == "ü\n\u2028"
    file.close()
    assert read_rescue(file.path) == lines
    assert b"\0" not in file.path.read_bytes()


def test_a_second_file_does_not_replace_the_first(tmp_path: Path) -> None:
    """What was not taken in yet stays."""
    for number in range(3):
        file = RescueFile(tmp_path / "job.db")
        file.append([paid(number)])
        file.close()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.db.rescue", "job.db.rescue.2", "job.db.rescue.3"]


def test_without_its_folder_it_lies_beside_the_output(tmp_path: Path) -> None:
    """With all that was written before."""
    ledger, output = tmp_path / ".enrich" / "job.db", tmp_path / "out"
    ledger.parent.mkdir()
    output.mkdir()
    file = RescueFile(ledger, [output])
    file.append([paid(1)])
    ledger.parent.rename(tmp_path / "moved")

    assert file.append([paid(2)])
    file.close()

    assert file.path == output / "job.db.rescue"
    assert [line.attempt for line in read_rescue(file.path)] == [1, 2]


def test_a_file_of_another_ledger_beside_the_output_is_left_alone(tmp_path: Path) -> None:
    """Two jobs may write into one folder."""
    file = RescueFile(tmp_path / "gone" / "job.db", [tmp_path])
    file.append([paid(1)])
    file.close()
    (tmp_path / "here").mkdir()

    with closing(Ledger(tmp_path / "here" / "job.db")) as ledger, ledger.transaction():
        assert take_in_files(ledger, [tmp_path], "job", 1) == []
    assert (tmp_path / "job.db.rescue").exists()


GOOD = paid(1).line()


@pytest.mark.parametrize(
    "content",
    first_quick(
        3,
        [
            b"",
            b"\n",
            GOOD[:-1],
            GOOD[:-20] + b"\n",
            GOOD.replace(b'"format": 1', b'"format": 2'),
            GOOD.replace(b"fingerprint", b"footprint"),
            GOOD.replace(b'"claimed_ms": 1000', b'"claimed_ms": "1000"'),
            GOOD + b"{}\n",
            GOOD + b"\xff\n",
            GOOD.replace(b'"submitted"', b'"pending"'),
            paid(1, "found").line().replace(b'"answer"', b'"error"'),
            b"[" * 100_000 + b"\n",
        ],
    ),
)
def test_a_damaged_file_is_refused_and_stays(api: Api, office: Office, content: bytes) -> None:
    """By run, forget and purge, with its name and without its content; nothing is sent."""
    office.write_leads(people(2))
    assert office.run(api).exit_code == 0
    file = office.ledger_path.with_name("job.db.rescue")
    file.write_bytes(content)

    for command in (RUN, ("purge", "job.yaml", "--older-than", "1d", "--yes")):
        done = office.command(*command, api=api)
        assert done.code == 5, done.stderr
        assert "job.db.rescue" in done.stderr
        assert "Traceback" not in done.stderr
        assert "first_name" not in done.stderr
    assert file.read_bytes() == content
    assert api.audit()["accepted"] == 2


# With the program


def left_beside(office: Office, api: Api) -> Path:
    """Lose the ledger under a run that has paid for three leads; return the rescue file."""
    office.write_leads(people(3))
    process = office.start(*RUN, api=api)
    until(lambda: office.at_the_api() == 3)
    office.ledger_path.unlink()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    return office.ledger_path.with_name("job.db.rescue")


@pytest.mark.long
def test_a_kill_after_it_was_taken_in_does_no_harm(tmp_path: Path, office: Office) -> None:
    """The next run takes it in again, and it changes nothing."""
    with serving(tmp_path / "api.db", latency="fixed(2)") as api:
        file = left_beside(office, api)
        content = file.read_bytes()
        assert office.enrich(*RUN, api=api).code == 0
        file.write_bytes(content)

        done = office.enrich(*RUN, api=api)

        assert done.code == 0, done.stderr
        assert not file.exists()
        assert any("3 already known" in note for note in done.receipt["notes"])
        assert api.audit()["accepted"] == 3
        assert office.command("ledger", "check", "job.yaml").code == 0


@pytest.mark.long
def test_forget_and_purge_reach_it(tmp_path: Path, office: Office) -> None:
    """What is running is refused as ever; what was answered is erased; no file with it stays."""
    with serving(tmp_path / "api.db", latency="fixed(2)") as api:
        file = left_beside(office, api)
        forget = ("forget", "job.yaml", "--match", "First Name=First1", "--yes")
        gone = office.command(*forget, api=api)
        assert (gone.code, "job.db.rescue holds" in gone.stderr) == (5, True), gone.stderr
        assert file.exists()
        assert office.enrich(*RUN, api=api).code == 0
        file.write_bytes(b"".join(line.line() for line in lines_of(office)))

        assert office.command(*forget, api=api).code == 0
        assert not file.exists()
        assert b"First1" not in office.ledger_path.read_bytes()


def lines_of(office: Office) -> Sequence[Paid]:
    """Write a rescue file about all that a ledger has."""
    with closing(office.ledger()) as ledger:
        return list(ledger.answered_attempts())


def test_the_sandbox_has_its_own(tmp_path: Path, office: Office) -> None:
    """A real run takes in nothing of a rehearsal."""
    office.write_leads(people(2))
    (office.ledger_path.parent).mkdir()
    office.ledger_path.with_name("job.sandbox.db.rescue").write_bytes(paid(1, workspace=None, api_host=None).line())
    with serving(tmp_path / "api.db", CALM) as api:
        assert office.run(api).exit_code == 0
        assert office.ledger_path.with_name("job.sandbox.db.rescue").exists()
        assert len(json.loads(json.dumps(office.output()))) == 2


def test_removing_it_says_when_it_cannot(tmp_path: Path) -> None:
    """A folder in its place is named."""
    (tmp_path / "job.db.rescue").mkdir()
    with pytest.raises(Refused, match=r"job\.db\.rescue"):
        remove_taken([(tmp_path / "job.db.rescue", None)])  # type: ignore[list-item] # what was in it does not matter


def test_states_of_a_line_are_those_of_an_attempt() -> None:
    """But `pending`, which is no attempt's."""
    assert set(STATES) - {"refused"} == {state.value for state in State} - {"pending"}
