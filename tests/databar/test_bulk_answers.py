"""How a bulk task and a rejected bulk POST are parsed, in every shape that was ever seen and in unknown ones."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from enrich.databar.responses import parse_body, wrong_rows
from enrich.databar.task_results import BulkReader, TaskPhase, TaskReply, task_phase
from enrich.models import Answer, State
from enrich.run.output_cells import answer_cells
from tests.support.cases import in_turn

ADA = {"email": "ada@engine.example"}
PARAMS = ("first_name", "last_name", "company")
INVALID_PARAM = {"company": ["This field is required."]}
INVALID_PARAM_MESSAGE = "company: This field is required."

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def parse_bulk_answer(size: int, **task: Any) -> tuple[list[Answer], int | None]:
    """Parse the answer of a bulk task of `size` rows."""
    return BulkReader().read(TaskReply(task, json.dumps(task)), task_phase(task), size, ["email"])


def state_names(answers: list[Answer]) -> list[str]:
    """Return the names of the answers' states."""
    return [answer.state.value for answer in answers]


# The answer of a task


def test_rows_get_their_own_answer() -> None:
    """Rows get their answers in the order sent; wrappers, flat fields and lists of one work as in a single run."""
    wrapper = {"result": ADA, "steps": [{"provider": "Mailhound", "cost": "1.0"}], "enrichment_data": {}}
    rows = [wrapper, None, ADA, [ADA], {"email": None, "phone": "1"}]
    answers, price = parse_bulk_answer(5, status="completed", data=rows, credits_spent=2.5)

    assert state_names(answers) == ["found", "not_found", "found", "found", "not_found"]
    assert (price, [answer.credits for answer in answers]) == (2_500_000, [None] * 5)
    assert answers[0].provider == "Mailhound"
    assert json.loads(answers[2].raw or "") == {"data": ADA}


@in_turn("data", [None, [], {}, [None, None], [{}, []]])
def test_empty_data_is_no_match(data: object) -> None:
    """Empty data means no match, in every form the API uses."""
    assert state_names(parse_bulk_answer(2, status="completed", data=data, credits_spent=0)[0]) == ["not_found"] * 2


@in_turn("data", [[ADA], [ADA, ADA, ADA], ADA, "text", 7, True])
def test_unaligned_data_fails_all_rows(data: object) -> None:
    """Unaligned data fails all rows, so no row gets another's answer; the body is kept once, not as the first row's."""
    answers, price = parse_bulk_answer(2, status="completed", data=data, credits_spent=1)

    assert state_names(answers) == ["failed", "failed"]
    assert "the rows cannot be matched" in str(answers[1].error)
    assert (price, answers[0].free_failure) == (1_000_000, False)
    assert json.loads(answers[0].raw or "")["bundle"]["data"] == data
    assert answers[1].raw is None


def test_lists_of_matches_without_order() -> None:
    """After a list with fewer rows than the task, a full list may be unordered matches; one with null is in order."""
    reader = BulkReader()

    def states(*data: object, **fields: object) -> list[str]:
        task = {"status": "completed", "data": list(data), "credits_spent": 1, **fields}
        return state_names(reader.read(TaskReply(task, json.dumps(task)), task_phase(task), 2, ["email"])[0])

    assert states(ADA, ADA) == ["found", "found"]
    assert states(ADA) == ["failed", "failed"]
    assert states(None, None) == ["not_found", "not_found"]
    assert states(ADA, None, ADA) == ["failed", "failed"]
    assert states(ADA, ADA) == ["failed", "failed"]
    assert states(ADA, None) == ["found", "not_found"]
    assert states(ADA, ADA) == ["found", "found"]
    states(ADA, status="cancelled")
    states(ADA, status="failed", error="boom")
    states(ADA, progress={"processing": 1})
    states(ADA, ADA, ADA)
    assert states(ADA, ADA) == ["found", "found"]


@in_turn("data", [ADA, [ADA], [[ADA]], {"result": ADA, "steps": []}])
def test_one_row_without_a_list(data: object) -> None:
    """The answer of a task of one row needs no list: there is no doubt whose it is."""
    answers, price = parse_bulk_answer(1, status="completed", data=data, credits_spent=1)
    assert (state_names(answers), price) == (["found"], 1_000_000)
    assert answer_cells(answers[0].raw or "", ["email"]) == [ADA["email"]]


def test_rows_are_kept_as_written() -> None:
    """The raw JSON of a row is what the API sent, with its numbers as they are written."""
    rows = '{"n": 1.10, "m": 12345678901234567.123}, {"n": 1e400},\n{"n": %s}' % ("9" * 5000)
    body = parse_body(b'{"data": [{"n": 0}], "status": "completed", "data": [%s, null]}' % rows.encode(), "some-key")
    answers, _ = BulkReader().read(TaskReply(*body), TaskPhase.COMPLETED, 4, ["n"])
    assert state_names(answers) == ["found", "found", "found", "not_found"]
    assert ", ".join((answer.raw or "").removeprefix('{"data":')[:-1] for answer in answers[:3]) == rows.replace(
        "\n", " "
    )


@in_turn(
    ("failed", "other_state", "free"),
    [
        (0, "not_found", False),
        (1, "failed", False),
        (2, "failed", True),
        (9, "failed", True),
        ("2", "not_found", False),
        (1.0, "failed", False),
        (2.0, "failed", True),
        (1.5, "not_found", False),
        (10**400, "failed", True),
        (True, "not_found", False),
    ],
)
def test_missing_rows_in_partial_failure(failed: object, other_state: str, *, free: bool) -> None:
    """After a partial failure, the failed rows are unknown; they are resent only when all rows failed at no charge."""
    progress = {"total": 3, "failed": failed}
    answers, _ = parse_bulk_answer(
        3, status="partially_completed", data=[ADA, None, None], progress=progress, credits_spent=0
    )

    assert state_names(answers) == ["found", other_state, other_state]
    assert answers[1].free_failure is free
    if failed == 1 and failed is not True:
        assert "1 of the 2 rows without a result failed" in str(answers[1].error)


@in_turn(
    ("status", "progress", "free"),
    [
        ("failed", {"failed": 2, "processing": 0}, True),
        ("failed", {"failed": 1, "processing": 1}, False),
        ("cancelled", {"failed": 0, "processing": 2}, False),
        ("partially_completed", {"failed": 2, "processing": 1}, False),
    ],
)
def test_failure_with_running_rows_is_not_free(status: str, progress: object, *, free: bool) -> None:
    """A failed task that counts rows as running can still be charged for them: they are not resent."""
    answers, _ = parse_bulk_answer(2, status=status, data=[None, None], progress=progress, credits_spent=0)

    assert state_names(answers) == ["failed"] * 2
    assert [answer.free_failure for answer in answers] == [free] * 2


@in_turn(
    ("status", "data", "credits_", "free"),
    [
        ("failed", None, 0, True),
        ("failed", [None, None], 0, True),
        ("cancelled", [], 0, True),
        ("cancelled", [ADA], 0, False),
        ("failed", None, 1, False),
        ("failed", None, None, False),
    ],
)
def test_failed_task_fails_all_rows(status: str, data: object, credits_: object, *, free: bool) -> None:
    """A failed task fails all rows; it is free only if the API reports so and returned nothing."""
    answers, _ = parse_bulk_answer(2, status=status, data=data, credits_spent=credits_, error=["no", "way"])

    assert state_names(answers) == ["failed"] * 2
    assert [answer.free_failure for answer in answers] == [free] * 2
    assert answers[1].error == "no; way"


def test_expired_task_has_unknown_price() -> None:
    """The zero in the body of an expired task is not its price."""
    answers, price = parse_bulk_answer(2, status="gone", data=None, credits_spent=0)

    assert (state_names(answers), price) == (["expired"] * 2, None)


@given(
    task=st.dictionaries(
        st.sampled_from(["status", "data", "error", "progress", "credits_spent"]),
        json_values | st.lists(json_values, min_size=3, max_size=3),
    ),
    phase=st.sampled_from([phase for phase in TaskPhase if phase is not TaskPhase.RUNNING]),
)
@example(task={"data": [[[]] * 9, {"a": 10**400}, {"\ud800": "\udfff"}]}, phase=TaskPhase.COMPLETED)
def test_any_json_is_judged(task: dict[str, Any], phase: TaskPhase) -> None:
    """Any JSON gives one answer a row that the ledger can store and read, without a price for single rows."""
    body = parse_body(json.dumps(task).encode(), "some-key")
    answers, price = BulkReader().read(TaskReply(*body), phase, 3, ["email"])

    assert len(answers) == 3
    assert price is None or price >= 0
    for answer in answers:
        assert answer.credits is None
        assert answer.state in {State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED}
        assert (answer.raw is not None) or answer.state in {State.FAILED, State.EXPIRED}
        if answer.raw is not None:
            json.loads(answer.raw.encode())


# A refused POST


@in_turn(
    "body",
    [
        {"error": "INVALID_PARAMS", "detail": "Row 2: …", "rows": [{"position": 2, "fields": INVALID_PARAM}]},
        {"detail": [{}, INVALID_PARAM, {}]},
        {"detail": [{"loc": ["body", "params", 1, "company"], "msg": "This field is required."}]},
        {"rows": [{"position": 2.0, "fields": INVALID_PARAM}]},
        {"detail": [{"loc": ["body", "params", 1.0, "company"], "msg": "This field is required."}]},
    ],
    ids=["new", "old", "FastAPI", "new, not an integer", "FastAPI, not an integer"],
)
def test_invalid_row_is_identified(body: object) -> None:
    """The invalid row is found in each format of the error body."""
    assert wrong_rows(body, 3, PARAMS) == {1: INVALID_PARAM_MESSAGE}


@in_turn(
    "body",
    [
        {"rows": [{"position": 0, "fields": INVALID_PARAM}]},
        {"rows": [{"position": 4, "fields": INVALID_PARAM}, {"position": 1, "fields": INVALID_PARAM}]},
        {"rows": [{"fields": INVALID_PARAM}]},
        {"rows": [{"position": "1", "fields": INVALID_PARAM}]},
        {"rows": [{"position": True, "fields": INVALID_PARAM}]},
        {"detail": [INVALID_PARAM]},
        {"detail": INVALID_PARAM},
        {"fields": INVALID_PARAM},
        {"detail": [{"loc": ["body", "params", -1, "company"], "msg": "x"}]},
        {"detail": [{"loc": ["body", "params", "company"], "msg": "x"}]},
        {"detail": [{"loc": ["body", "params", True, "company"], "msg": "x"}]},
    ],
)
def test_error_without_row_index(body: object) -> None:
    """Without a row index any of the rows may be invalid; a POST of one row is about that row."""
    assert wrong_rows(body, 3, PARAMS) == {}
    assert list(wrong_rows(body, 1, PARAMS) or {}) == [0]


@in_turn(
    "body",
    [
        None,
        [],
        {"detail": "Row 1: company: This field is required."},
        {"error": "BATCH_TOO_LARGE", "detail": "At most 50 rows are allowed."},
        {"detail": {"enrichments": ["5 is not part of this waterfall."]}},
        {"detail": [{"loc": ["body", "params"], "msg": "too many"}]},
        {"detail": {"code": "PLAN", "reason": "Upgrade your plan."}},
        {"detail": [{}, {"phone": ["This field is required."]}, {}]},
        {"rows": [{"position": 2, "fields": {"phone": ["This field is required."]}}]},
        {"rows": []},
    ],
)
def test_error_not_about_rows(body: object) -> None:
    """An error that is not about rows is about the job or the API."""
    assert wrong_rows(body, 3, PARAMS) is None
    assert wrong_rows(body, 1, PARAMS) is None


@given(
    body=json_values
    | st.fixed_dictionaries(
        {},
        optional={
            "detail": json_values
            | st.lists(st.fixed_dictionaries({"loc": st.lists(json_values | st.just("params")), "msg": json_values})),
            "rows": st.lists(st.fixed_dictionaries({"position": json_values, "fields": json_values})),
            "fields": json_values,
        },
    ),
    size=st.integers(1, 5),
)
def test_any_error_body_is_parsed(body: object, size: int) -> None:
    """Any error body names only rows that were sent, each with a message."""
    named = wrong_rows(body, size, PARAMS)

    assert named is None or all(0 <= row < size and isinstance(message, str) for row, message in named.items())
