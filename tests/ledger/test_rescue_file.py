"""The rescue file: imported once whatever the ledger contains, refused when damaged, erased with the ledger."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from enrich.errors import CommandRefused, LedgerLocked
from enrich.ledger import queue, records, rescue_file, rescue_import, rescue_recorder, resume, transitions
from enrich.ledger.database import Database
from enrich.ledger.database_copy import copy_ledger
from enrich.ledger.rescue_file import RescuedAttempt, RescueFile, read_rescue_file
from enrich.ledger.rescue_import import import_rescue_files, remove_imported_files
from enrich.ledger.verify import check_ledger
from enrich.models import Answer, State
from tests.support.cases import in_turn
from tests.support.ledger import BINDING, CALL, FOUND, NO_MATCH, CommittingLedger, fingerprint, params
from tests.support.workspace import INSTANT_API, SandboxApi, Workspace, make_leads, serve_api, wait_until

RUN = ("run", "job.yaml", "--json")


def rescue_record(number: int, state: str = "submitted", task: str | None = "task", **more: Any) -> RescuedAttempt:
    """Return the rescued attempt of a lead."""
    result: dict[str, Any] = {
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
        result |= {"answer": (FOUND if state == "found" else NO_MATCH).raw, "credits": 2}
    return RescuedAttempt(**{**BINDING, **result, **more})


def import_lines(ledger: CommittingLedger, *lines: RescuedAttempt) -> str:
    """Import lines; return the message about them."""
    return str(ledger.commit(rescue_import.import_rescued, lines, "job", 9_000))


def request_states(ledger: CommittingLedger) -> dict[int, str]:
    """Return the state of each lead's request."""
    rows = ledger.wrapped.session.execute("SELECT fingerprint, state FROM requests").fetchall()
    return {int.from_bytes(name): state for name, state in rows}


def assert_sound(ledger: CommittingLedger) -> None:
    """Check that all invariants hold."""
    assert check_ledger(ledger.location).problems == []


# Import


def test_new_ledger_imports_everything(ledger: CommittingLedger) -> None:
    """Open tasks are polled, answers count, unconfirmed ones stay so; requests that were refused may be sent."""
    lines = [
        rescue_record(1, task="a"),
        rescue_record(2, "found", task="b"),
        rescue_record(3, "not_found", task="c"),
        rescue_record(4, "in_doubt", task=None),
        rescue_record(5, "submitting", task=None),
        rescue_record(6, "refused", task=None),
        rescue_record(7, "failed", task="d", credits=0),
    ]

    message = import_lines(ledger, *lines)

    assert message == "1 tasks to fetch, 3 answers, 2 unconfirmed requests (in_doubt)"
    assert request_states(ledger) == {
        1: "submitted",
        2: "found",
        3: "not_found",
        4: "in_doubt",
        5: "in_doubt",
        7: "failed",
    }
    (task,) = transitions.submitted_tasks(ledger.wrapped)
    assert (task.task_id, task.column_paths) == ("a", ("email",))
    assert records.read_fact(ledger.wrapped, "workspace") == BINDING["workspace"]
    assert_sound(ledger)
    assert import_lines(ledger, *lines).endswith("already in the ledger")
    assert_sound(ledger)


def test_submitting_attempt_is_completed(ledger: CommittingLedger) -> None:
    """An attempt that the ledger has as `submitting` gets its outcome from the rescue file."""
    ledger.start_and_enroll(1, 2, 3, 4)
    claims = [ledger.claim() for _ in range(4)]
    assert claims
    lines = [
        rescue_record(1, task="a"),
        rescue_record(2, "found", task="b"),
        rescue_record(3, "refused", task=None),
        rescue_record(4, "in_doubt", task=None),
    ]

    message = import_lines(ledger, *lines)

    assert (
        message == "1 tasks to fetch, 1 answers, 1 unconfirmed requests (in_doubt), 1 requests that were not accepted"
    )
    assert request_states(ledger) == {1: "submitted", 2: "found", 3: "pending", 4: "in_doubt"}
    assert_sound(ledger)


def test_answer_belongs_to_the_run_that_got_it(ledger: CommittingLedger) -> None:
    """What a task of an earlier run has cost is spent in the last run, which had the answer: the first has ended."""
    ledger.start_and_enroll(1)
    ledger.submit("a")
    ledger.commit(records.end_execution, ledger.execution, 13, {}, ledger.now)
    first, last = ledger.execution, ledger.start_execution()

    import_lines(ledger, rescue_record(1, "found", task="a"))

    spent = [records.read_execution(ledger.wrapped, run).spent for run in (first, last)]
    assert (spent, request_states(ledger)) == ([0, 2], {1: "found"})
    assert ledger.execution_counters[1] == 0
    assert_sound(ledger)


def test_in_doubt_is_resolved_by_task_id(ledger: CommittingLedger) -> None:
    """A task id from the rescue file resolves a request that a run in between marked in doubt."""
    ledger.start_and_enroll(1)
    ledger.claim()
    ledger.commit(resume.recover, 1_500)

    import_lines(ledger, rescue_record(1, task="a"))

    assert request_states(ledger) == {1: "submitted"}
    assert ledger.query_one("SELECT count(*) FROM attempts") == (1,)
    assert_sound(ledger)


def test_newer_ledger_state_is_kept(ledger: CommittingLedger) -> None:
    """An answer is not replaced, and a task id that another request has is not used again."""
    ledger.start_and_enroll(1, 2)
    ledger.settle(ledger.submit("a"))
    ledger.submit("b")

    import_lines(
        ledger,
        rescue_record(1, task="z", claimed_ms=500),
        rescue_record(2, task="b", claimed_ms=500),
        rescue_record(3, task="a"),
    )

    assert request_states(ledger) == {1: "found", 2: "submitted", 3: "in_doubt"}
    assert [task.task_id for task in transitions.submitted_tasks(ledger.wrapped)] == ["b"]
    assert_sound(ledger)


@pytest.mark.parametrize(
    ("earlier", "state", "open_task"),
    [
        ("found", "submitted", "new"),
        ("failed", "submitted", "new"),
        ("submitted", "submitted", "new"),
        ("found", "in_doubt", None),
        ("in_doubt", "in_doubt", None),
        ("failed", "found", None),
        ("found", "not_found", None),
    ],
)
def test_older_copy_of_ledger_imports_later_attempt(
    ledger: CommittingLedger, earlier: str, state: str, open_task: str | None
) -> None:
    """What was sent again (refresh, --retry) after the copy was made is not lost; a match stands meanwhile."""
    ledger.start_and_enroll(1)
    attempt = ledger.submit("old")
    if earlier == "in_doubt":
        ledger.commit(transitions.mark_in_doubt, [(attempt, "404", ledger.now, None)])
    elif earlier != "submitted":
        ledger.settle(attempt, Answer(State(earlier), credits=1, raw=FOUND.raw))
    line = rescue_record(1, state, None if state == "in_doubt" else "new", claimed_ms=ledger.now + 1)

    for _ in range(2):
        import_lines(ledger, line)

        assert request_states(ledger) == {1: state}
        assert [task.task_id for task in transitions.submitted_tasks(ledger.wrapped)] == [open_task] * bool(open_task)
        assert ledger.query_one("SELECT answer_id FROM requests") == (
            {"found": attempt}.get(earlier, 2 if state == "found" else None),
        )
        assert_sound(ledger)


def test_lost_ledger_keeps_answer_and_later_task(ledger: CommittingLedger) -> None:
    """A request that was found, and sent again, gets both: the answer, and the task that waits."""
    message = import_lines(
        ledger, rescue_record(1, "found", "old"), rescue_record(1, task="new", attempt=2, claimed_ms=4_000)
    )

    assert message == "1 tasks to fetch, 1 answers"
    assert [task.task_id for task in transitions.submitted_tasks(ledger.wrapped)] == ["new"]
    assert ledger.query_one("SELECT answer_id IS NOT NULL FROM requests") == (1,)
    assert_sound(ledger)


def test_answers_of_a_part_of_a_bulk_task_are_kept(ledger: CommittingLedger) -> None:
    """The copy of the ledger was made while a bulk task was sent; one of its rows was sent again after its answer."""
    ledger.start_and_enroll(0, 1, 2)
    assert len(ledger.commit(queue.claim, ledger.execution, 5, 1_000, 3, bulk=True)) == 3
    lines = [
        rescue_record(number, "found", "bulk", attempt=number, bulk_task=1, bulk_index=number, size=3, credits=0)
        for number in range(2)
    ]

    for _ in range(2):
        import_lines(ledger, *lines, rescue_record(2, task="again", attempt=9, claimed_ms=4_000))

        assert request_states(ledger) == {0: "found", 1: "found", 2: "submitted"}
        assert [task.task_id for task in transitions.submitted_tasks(ledger.wrapped)] == ["again"]
        assert_sound(ledger)


def test_part_of_a_bulk_task_is_not_polled(ledger: CommittingLedger) -> None:
    """A row of an unconfirmed bulk task was sent again while the rescue file was away: its answers have no rows."""
    ledger.start_and_enroll(0, 1)
    ledger.commit(queue.claim, ledger.execution, 5, 1_000, 2, bulk=True)
    ledger.commit(resume.recover, 1_500)
    import_lines(ledger, rescue_record(0, task="again", attempt=9, claimed_ms=4_000))
    bulk = [rescue_record(number, task="bulk", bulk_task=1, bulk_index=number, size=2) for number in range(2)]

    for _ in range(2):
        import_lines(ledger, *bulk)

        assert request_states(ledger) == {0: "submitted", 1: "in_doubt"}
        assert [task.task_id for task in transitions.submitted_tasks(ledger.wrapped)] == ["again"]
        assert resume.written_off_tasks(ledger.wrapped, 0) == []
        assert_sound(ledger)


def test_unconfirmed_part_of_a_bulk_task_is_not_polled(ledger: CommittingLedger) -> None:
    """The file has only some rows of a task that was being sent, with the id that came with an error."""
    ledger.start_and_enroll(0, 1, 2)
    ledger.commit(queue.claim, ledger.execution, 5, 1_000, 3, bulk=True)

    import_lines(
        ledger,
        *(rescue_record(number, "in_doubt", "bulk", bulk_task=1, bulk_index=number, size=3) for number in range(2)),
    )

    assert request_states(ledger) == dict.fromkeys(range(3), "in_doubt")
    assert resume.written_off_tasks(ledger.wrapped, 0) == []
    assert_sound(ledger)


def test_one_row_of_a_bulk_task_is_not_polled_alone(ledger: CommittingLedger) -> None:
    """The first row of the task's answer would be taken for that of this row."""
    import_lines(ledger, rescue_record(1, task="bulk", bulk_task=1, bulk_index=1, size=2))

    assert request_states(ledger) == {1: "in_doubt"}
    assert resume.written_off_tasks(ledger.wrapped, 0) == []
    assert_sound(ledger)


@pytest.mark.parametrize("size", [2, 3], ids=["whole", "part"])
def test_task_id_of_a_bulk_task_is_not_polled_for_another_request(ledger: CommittingLedger, size: int) -> None:
    """Another request was answered with the id of a bulk task: its answer would be that of the first row."""
    bulk = [rescue_record(number, task="t", bulk_task=1, bulk_index=number, size=size) for number in range(2)]

    import_lines(ledger, *bulk, rescue_record(9, task="t", claimed_ms=4_000))

    assert request_states(ledger)[9] == "in_doubt"
    assert all(len(task.attempts) == 2 for task in transitions.submitted_tasks(ledger.wrapped))
    assert_sound(ledger)


def test_refreshed_and_new_rows_of_a_bulk_task_stay_together(ledger: CommittingLedger) -> None:
    """A lost ledger: some rows of a bulk task that waits were answered before."""
    answered = [rescue_record(number, "found", f"old{number}") for number in range(2)]
    bulk = [
        rescue_record(number, task="new", attempt=10 + number, bulk_task=1, bulk_index=number, size=4, claimed_ms=4_000)
        for number in range(4)
    ]

    message = import_lines(ledger, *bulk, *answered)

    assert message == "4 tasks to fetch, 2 answers"
    (task,) = transitions.submitted_tasks(ledger.wrapped)
    assert (task.task_id, len(task.attempts)) == ("new", 4)
    assert ledger.query_one("SELECT count(answer_id) FROM requests") == (2,)
    assert_sound(ledger)


def test_bulk_requests_stay_together(ledger: CommittingLedger) -> None:
    """The rows of a bulk task are imported all or not at all, because answers are matched by their order."""
    whole = [rescue_record(number, task="t", bulk_task=1, bulk_index=number, size=3) for number in range(3)]
    torn = [
        rescue_record(number, task="u", bulk_task=2, bulk_index=number - 10, size=3, claimed_ms=1_001)
        for number in (10, 11)
    ]

    import_lines(ledger, *whole, *torn)

    (task,) = transitions.submitted_tasks(ledger.wrapped)
    assert (task.task_id, len(task.attempts)) == ("t", 3)
    assert request_states(ledger) == dict.fromkeys(range(3), "submitted") | dict.fromkeys((10, 11), "in_doubt")
    assert_sound(ledger)


def test_other_workspace_is_refused(ledger: CommittingLedger) -> None:
    """A rescue file of another workspace is refused, and nothing is imported."""
    ledger.start_and_enroll(1)
    ledger.submit("a")

    with pytest.raises(CommandRefused, match="another workspace"):
        import_lines(ledger, rescue_record(2, workspace="theirs"))


STATES = ["submitting", "submitted", "in_doubt", "refused", "found", "not_found", "failed", "expired"]


@given(
    moves=st.lists(st.sampled_from(["claim", "submit", "settle", "doubt"]), max_size=8),
    attempts=st.lists(
        st.tuples(st.integers(0, 7), st.sampled_from(STATES), st.integers(0, 5), st.sampled_from([1_000, 1_001])),
        unique_by=lambda attempt: (attempt[0], attempt[3]),  # a file has one line for each POST
    ),
)
@example(moves=[], attempts=[(0, "submitted", 1, 1_000), (0, "failed", 1, 1_001)])
@example(moves=[], attempts=[(0, "submitted", 1, 1_000), (1, "submitted", 1, 1_000), (1, "submitted", 0, 1_001)])
def test_any_rescue_file_keeps_ledger_sound(
    tmp_path_factory: pytest.TempPathFactory, moves: list[str], attempts: list[tuple[int, str, int, int]]
) -> None:
    """A second import changes nothing, no task belongs to two requests, and no answer is lost."""
    ledger = CommittingLedger.open(tmp_path_factory.mktemp("any") / "job.db").start_and_enroll(*range(8))
    for number, move in enumerate(moves):
        attempt = ledger.claim().attempt_id
        if move != "claim":
            ledger.commit(transitions.record_accepted, [(attempt, f"task-{number}", ledger.now)], BINDING)
        if move == "settle":
            ledger.settle(attempt)
        if move == "doubt":
            ledger.commit(transitions.mark_in_doubt, [(attempt, "404", ledger.now, None)])
    matches = "SELECT fingerprint FROM requests WHERE answer_id IS NOT NULL"
    before = ledger.query_all(matches)
    lines = [
        rescue_record(
            number,
            state,
            None if state in ("submitting", "in_doubt", "refused") else f"task-{task}",
            attempt=at,
            claimed_ms=claimed,
        )
        for at, (number, state, task, claimed) in enumerate(attempts)
    ]

    import_lines(ledger, *lines)

    assert_sound(ledger)
    after = request_states(ledger)
    assert set(before) <= set(ledger.query_all(matches))
    open_tasks = [task.task_id for task in transitions.submitted_tasks(ledger.wrapped)]
    assert len(open_tasks) == len(set(open_tasks))
    counted = ledger.query_one("SELECT count(*) FROM attempts")
    import_lines(ledger, *lines)
    assert_sound(ledger)
    assert (request_states(ledger), ledger.query_one("SELECT count(*) FROM attempts")) == (after, counted)
    ledger.wrapped.close()


# The file


def test_second_writer_is_refused(tmp_path: Path) -> None:
    """While a run that reserves or writes a rescue file is alive, no other run uses the ledger, lock file or not."""
    ledger = tmp_path / "job.db"
    first = RescueFile(ledger)
    with pytest.raises(LedgerLocked, match=r"job\.db: another run is using this ledger"):
        RescueFile(ledger)
    assert first.append([rescue_record(1)])
    with pytest.raises(LedgerLocked):
        RescueFile(ledger)
    first.close()

    RescueFile(ledger).close()


def test_rescue_file_roundtrip(tmp_path: Path) -> None:
    """The last of several lines about an attempt counts; unused preallocated space is no line."""
    file = RescueFile(tmp_path / "job.db")
    assert file.append([rescue_record(1, "submitting", task=None), rescue_record(2)])
    assert file.append([rescue_record(1, "found", error="ü\n\u2028", answer='{"data": "\\u0000"}')])
    assert file.path == tmp_path / "job.db.rescue"

    lines = read_rescue_file(file.path)  # before it is closed, as after a kill

    assert [(line.attempt, line.state) for line in lines] == [(1, "found"), (2, "submitted")]
    assert lines[0].error == "ü\n\u2028"
    file.close()
    assert read_rescue_file(file.path) == lines
    assert b"\0" not in file.path.read_bytes()


def test_second_file_does_not_replace_first(tmp_path: Path) -> None:
    """A second file does not replace one that has not been imported."""
    for number in range(3):
        file = RescueFile(tmp_path / "job.db")
        file.append([rescue_record(number)])
        file.close()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.db.rescue", "job.db.rescue.2", "job.db.rescue.3"]


def test_fallback_location_beside_output(tmp_path: Path) -> None:
    """If the ledger's folder is gone, the file moves beside the output with all earlier lines."""
    ledger, output = tmp_path / ".enrich" / "job.db", tmp_path / "out"
    ledger.parent.mkdir()
    output.mkdir()
    file = RescueFile(ledger, [output])
    file.append([rescue_record(1)])
    ledger.parent.rename(tmp_path / "moved")

    assert file.append([rescue_record(2)])
    file.close()

    assert file.path == output / "job.db.rescue"
    assert [line.attempt for line in read_rescue_file(file.path)] == [1, 2]


def test_new_place_is_durable_before_the_old_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut while the file moves to another place leaves one of the two."""
    ledger, output = tmp_path / ".enrich" / "job.db", tmp_path / "out"
    ledger.parent.mkdir()
    output.mkdir()
    file = RescueFile(ledger, [output])
    file.append([rescue_record(1)])
    old = file.path
    assert old is not None
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(rescue_file, "fsync_dir", lambda folder: synced.append((folder, old.exists())))
    write_at = rescue_file._write_at
    monkeypatch.setattr(
        rescue_file, "_write_at", lambda number, content, end: not end and write_at(number, content, end)
    )

    assert file.append([rescue_record(2)])

    assert file.path is not None
    assert synced == [(file.path.parent, True)]
    assert not old.exists()
    file.close()


def test_rescue_file_of_other_ledger(tmp_path: Path) -> None:
    """A rescue file of another ledger in the same folder is not imported: two jobs may share a folder."""
    file = RescueFile(tmp_path / "gone" / "job.db", [tmp_path])
    file.append([rescue_record(1)])
    file.close()
    (tmp_path / "here").mkdir()

    with closing(Database(tmp_path / "here" / "job.db")) as ledger, ledger.transaction():
        assert import_rescue_files(ledger, [tmp_path], "job", 1) == []
    assert (tmp_path / "job.db.rescue").exists()


@in_turn(
    ("recorded", "is_own"),
    [
        ("here/a/.enrich/job.db", True),
        ("before/a/.enrich/job.db", True),
        ("deep/er/a/.enrich/job.db", True),
        ("other/a/.enrich/job.db", False),  # its project is still there
        ("before/b/.enrich/job.db", False),
        ("before/a/job.db", False),
    ],
)
@in_turn("output", ["", "out"])
def test_rescue_file_of_moved_project(tmp_path: Path, output: str, recorded: str, *, is_own: bool) -> None:
    """A rescue file beside the output is that of this ledger, too, if the folder of the project was moved since."""
    (tmp_path / "other").mkdir()
    ledger_path, folder = tmp_path / "here" / "a" / ".enrich" / "job.db", tmp_path / "here" / output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.db.rescue").write_bytes(rescue_record(1, ledger=str(tmp_path / recorded)).to_line())

    with closing(Database(ledger_path)) as ledger, ledger.transaction():
        assert bool(import_rescue_files(ledger, [folder], "job", 1)) == is_own


@pytest.mark.long
def test_moved_project_imports_its_rescue_file(api: SandboxApi, workspace: Workspace) -> None:
    """After a project was moved, a run imports its rescue file; it names one that may be of another ledger."""
    workspace.write_leads(make_leads(2))
    rescued = rescue_record(1, "found", ledger=str(workspace.folder.with_name("before") / ".enrich" / "job.db"))
    unclear = rescue_record(2, "found", ledger="/somewhere/else/job.db")
    for name, line in (("job.db.rescue", rescued), ("job.db.rescue.2", unclear)):
        (workspace.folder / name).write_bytes(line.model_copy(update={"api_host": None, "workspace": None}).to_line())

    notes = workspace.run_in_process("run", "job.yaml", "--json", api=api).json_output["notes"]

    assert any("job.db.rescue was imported: 1 answers" in note for note in notes), notes
    assert any("job.db.rescue.2 was not imported" in note for note in notes), notes
    assert [path.name for path in workspace.folder.glob("*.rescue*")] == ["job.db.rescue.2"]


VALID_LINE = rescue_record(1).to_line()


@pytest.mark.long
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        VALID_LINE[:-1],
        VALID_LINE[:-20] + b"\n",
        VALID_LINE.replace(b'"format": 1', b'"format": 2'),
        VALID_LINE.replace(b"fingerprint", b"footprint"),
        VALID_LINE.replace(b'"claimed_ms": 1000', b'"claimed_ms": "1000"'),
        VALID_LINE + b"{}\n",
        VALID_LINE + b"\xff\n",
        VALID_LINE.replace(b'"submitted"', b'"pending"'),
        rescue_record(1, "found").to_line().replace(b'"answer"', b'"error"'),
        b"[" * 100_000 + b"\n",
    ],
)
def test_damaged_rescue_file_is_refused(api: SandboxApi, workspace: Workspace, content: bytes) -> None:
    """Run, forget and purge refuse a damaged rescue file by name, without showing its content, and send nothing."""
    workspace.write_leads(make_leads(2))
    assert workspace.run_job(api).exit_code == 0
    file = workspace.ledger_path.with_name("job.db.rescue")
    file.write_bytes(content)

    for command in (RUN, ("purge", "job.yaml", "--older-than", "1d", "--yes")):
        result = workspace.run_in_process(*command, api=api)
        assert result.exit_code == 5, result.stderr
        assert "job.db.rescue" in result.stderr
        assert "Traceback" not in result.stderr
        assert "first_name" not in result.stderr
    assert file.read_bytes() == content
    assert api.audit()["accepted"] == 2


# With the program


def run_without_ledger(workspace: Workspace, api: SandboxApi) -> Path:
    """Lose the ledger during a run that has paid for three leads; return the rescue file."""
    workspace.write_leads(make_leads(3))
    process = workspace.start_subprocess(*RUN, api=api)
    wait_until(lambda: workspace.open_task_count() == 3)
    workspace.ledger_path.unlink()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    return workspace.ledger_path.with_name("job.db.rescue")


@pytest.mark.long
def test_import_is_idempotent_after_kill(tmp_path: Path, workspace: Workspace) -> None:
    """After a kill the next run imports the file again, which changes nothing."""
    with serve_api(tmp_path / "api.db", latency="fixed(2)") as api:
        file = run_without_ledger(workspace, api)
        content = file.read_bytes()
        assert workspace.run_subprocess(*RUN, api=api).exit_code == 0
        file.write_bytes(content)

        result = workspace.run_subprocess(*RUN, api=api)

        assert result.exit_code == 0, result.stderr
        assert not file.exists()
        assert any("3 already in the ledger" in note for note in result.json_output["notes"])
        assert api.audit()["accepted"] == 3
        assert workspace.run_in_process("ledger", "check", "job.yaml").exit_code == 0


def test_commands_name_the_rescue_file(api: SandboxApi, workspace: Workspace) -> None:
    """Where only a rescue file has the data, commands that need the ledger name the file; `plan` has a note."""
    workspace.write_leads(make_leads(2))
    workspace.ledger_path.parent.mkdir()
    workspace.ledger_path.with_name("job.db.rescue").write_bytes(rescue_record(1).to_line())

    reading = (("status",), ("runs",), ("explain", "--row", "1"))
    for command in (
        *(("cancel",), ("collect", "--partial"), ("reconcile",), ("purge", "--older-than", "1d", "--yes")),
        *reading,
    ):
        result = workspace.run_in_process(command[0], "job.yaml", *command[1:], api=api)
        assert (result.exit_code, "job.db.rescue still has its data" in result.stderr) == (5, True), result.stderr
    plan = workspace.run_in_process("plan", "job.yaml", api=api)
    assert "job.db.rescue: it does not send again what that has" in plan.stdout
    # That of another ledger is not this one's, although it is beside the output.
    of_another = rescue_record(1, ledger=str(workspace.folder / "other" / "job.db")).to_line()
    workspace.ledger_path.with_name("job.db.rescue").unlink()
    (workspace.folder / "job.db.rescue").write_bytes(of_another)
    assert "job.db.rescue" not in workspace.run_in_process("plan", "job.yaml", api=api).stdout
    for command in reading:
        result = workspace.run_in_process(command[0], "job.yaml", *command[1:])
        assert (result.exit_code, "job has never run" in result.stdout) == (0, True)


@pytest.mark.long
def test_forget_and_purge_clean_rescue_file(tmp_path: Path, workspace: Workspace) -> None:
    """Forget and purge refuse running tasks, erase imported answers, and leave no rescue file that contains them."""
    with serve_api(tmp_path / "api.db", latency="fixed(2)") as api:
        file = run_without_ledger(workspace, api)
        forget = ("forget", "job.yaml", "--match", "First Name=First1", "--yes")
        gone = workspace.run_in_process(*forget, api=api)
        assert (gone.exit_code, "job.db.rescue still has its data" in gone.stderr) == (5, True), gone.stderr
        assert file.exists()
        assert workspace.run_subprocess(*RUN, api=api).exit_code == 0
        file.write_bytes(b"".join(line.to_line() for line in rescue_lines_of_ledger(workspace)))

        assert workspace.run_in_process(*forget, api=api).exit_code == 0
        assert not file.exists()
        assert b"First1" not in workspace.ledger_path.read_bytes()


def rescue_lines_of_ledger(workspace: Workspace) -> Sequence[RescuedAttempt]:
    """Write a rescue file about all attempts in a ledger."""
    with closing(workspace.open_ledger()) as ledger:
        return list(rescue_recorder._read_attempts(ledger, rescue_recorder._ANSWERED))


def test_sandbox_rescue_file_is_separate(tmp_path: Path, workspace: Workspace) -> None:
    """A real run does not import a sandbox run's rescue file."""
    workspace.write_leads(make_leads(2))
    (workspace.ledger_path.parent).mkdir()
    workspace.ledger_path.with_name("job.sandbox.db.rescue").write_bytes(
        rescue_record(1, workspace=None, api_host=None).to_line()
    )
    with serve_api(tmp_path / "api.db", INSTANT_API) as api:
        assert workspace.run_job(api).exit_code == 0
        assert workspace.ledger_path.with_name("job.sandbox.db.rescue").exists()
        assert len(json.loads(json.dumps(workspace.read_output()))) == 2


def test_copy_without_rescue_file_is_refused(tmp_path: Path, ledger: CommittingLedger) -> None:
    """A copy would lack what the rescue file has, and no run of the copy reads that file: its tasks would be lost."""
    ledger.start_and_enroll(1)
    file, target = ledger.path.with_name("ledger.db.rescue"), tmp_path / "copy.db"
    file.write_bytes(rescue_record(1).to_line())
    ledger.wrapped.close()

    with pytest.raises(CommandRefused, match=r"ledger\.db\.rescue has what the last run could not write"):
        copy_ledger(ledger.path, target)

    assert (target.exists(), file.exists()) == (False, True)


def test_failed_removal_is_reported(tmp_path: Path) -> None:
    """A file that can't be removed, here a folder in its place, is reported by name."""
    (tmp_path / "job.db.rescue").mkdir()
    with pytest.raises(CommandRefused, match=r"job\.db\.rescue"):
        remove_imported_files([(tmp_path / "job.db.rescue", None)])  # type: ignore[list-item] # any content


def test_rescue_line_states() -> None:
    """A rescue line may have any state of an attempt; `pending` is none."""
    assert set(STATES) - {"refused"} == {state.value for state in State} - {"pending"}


@pytest.mark.parametrize("is_known", [False, True])
def test_answer_of_another_requests_task_is_not_imported(ledger: CommittingLedger, *, is_known: bool) -> None:
    """The request is unconfirmed, whether the ledger has its attempt or not."""
    ledger.start_and_enroll(1, 2)
    ledger.settle(ledger.submit("task-of-1"))
    if is_known:
        ledger.claim()

    import_lines(ledger, rescue_record(2, "found", "task-of-1", claimed_ms=ledger.now, answer=FOUND.raw, credits=2))

    assert request_states(ledger) == {1: "found", 2: "in_doubt"}
    assert_sound(ledger)
