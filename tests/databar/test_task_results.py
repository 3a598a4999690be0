"""How task bodies are parsed, in every shape that was ever seen and in unknown ones."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from enrich.databar.task_results import (
    TaskPhase,
    TaskReply,
    column_values,
    error_text,
    is_blank,
    parse_data,
    read_answer,
    task_phase,
    value_at,
)
from enrich.models import Answer, State
from tests.support.cases import in_turn

EMAIL = "ada@engine.example"
PATHS = ["email"]


def step(provider: str, cost: object = "1.0", result: object = None, *, is_verified: object = None) -> dict[str, Any]:
    """Return a step of a waterfall in the API's format."""
    return {"action": "x", "provider": provider, "result": result, "cost": cost, "is_verified": is_verified}


def wrapper(result: object, *steps: dict[str, Any], by_provider: object = None) -> dict[str, Any]:
    """Return the wrapper of a result in the API's format."""
    return {"result": result, "result_field": ["email"], "enrichment_data": by_provider, "steps": list(steps)}


def parse_answer(**task: Any) -> Answer:
    """Parse the body of a task."""
    return read_answer(TaskReply(task, json.dumps(task)), task_phase(task), PATHS)


@in_turn(
    ("status", "phase"),
    [
        ("created", TaskPhase.RUNNING),
        ("processing", TaskPhase.RUNNING),
        ("completed", TaskPhase.COMPLETED),
        ("success", TaskPhase.COMPLETED),
        ("partially_completed", TaskPhase.COMPLETED),
        ("no_data", TaskPhase.NO_DATA),
        ("failed", TaskPhase.FAILED),
        ("error", TaskPhase.FAILED),
        ("cancelled", TaskPhase.FAILED),
        ("canceled", TaskPhase.FAILED),
        ("gone", TaskPhase.GONE),
        ("COMPLETED", TaskPhase.COMPLETED),
        (" Completed\n", TaskPhase.COMPLETED),
        ("queued_again", TaskPhase.RUNNING),
        ("", TaskPhase.RUNNING),
        (None, TaskPhase.RUNNING),
        (1, TaskPhase.RUNNING),
        (["completed"], TaskPhase.RUNNING),
    ],
)
def test_status_mapping(status: object, phase: TaskPhase) -> None:
    """Aliases and capitals are accepted; an unknown status means running, so that no task is lost."""
    assert task_phase({"status": status}) is phase


def test_missing_status_means_running() -> None:
    """A body without a status means that the task is running."""
    assert task_phase({}) is TaskPhase.RUNNING


@in_turn(
    "data",
    [
        [wrapper({"email": EMAIL}, step("A"))],
        wrapper({"email": EMAIL}, step("A")),
        {"result": {"email": EMAIL}, "steps": None},
        {"result": {"email": EMAIL}, "enrichment_data": {}},
        {"result": {"email": EMAIL}, "result_field": ["email"]},
        {"result": EMAIL, "result_field": ["email"], "steps": []},
        {"result": EMAIL, "result_field": "email", "steps": []},
        {"email": EMAIL},
        [{"email": EMAIL}],
        [None, {"email": EMAIL}],
    ],
)
@in_turn("status", ["completed", "SUCCESS", "partially_completed", "no_data"])
def test_match_found_in_every_shape(status: str, data: object) -> None:
    """A match is found in every shape; the API's documents contradict each other about it."""
    answer = parse_answer(status=status, data=data, credits_spent=2.5)
    assert (answer.state, answer.credits) == (State.FOUND, 2_500_000)
    assert value_at(parse_data(data).fields, "email") == EMAIL


@in_turn(
    "data",
    [
        None,
        [],
        {},
        [None],
        [None, None],
        [[]],
        [{}],
        {"email": None},
        {"email": ""},
        {"email": " "},
        {"email": []},
        {"email": {}},
        {"score": 91},
        wrapper(None),
        wrapper([]),
        wrapper(""),
        wrapper({"email": None}, step("A", "0")),
        [wrapper({"email": ""}, by_provider={"A": {}})],
        "nothing",
        17,
        True,
    ],
)
@in_turn("status", ["completed", "no_data"])
def test_no_match_found_in_every_shape(status: str, data: object) -> None:
    """No match is recognized in every shape; it has its price and is no failure."""
    answer = parse_answer(status=status, data=data, credits_spent=0)
    assert (answer.state, answer.error, answer.provider, answer.credits) == (State.NOT_FOUND, None, None, 0)


def test_no_match_keeps_the_api_error() -> None:
    """What the API says of a task without a match is shown with it; a match needs no reason."""
    missing = parse_answer(status="completed", data=None, error=["provider A timed out", ""], credits_spent=0)
    assert (missing.state, missing.error) == (State.NOT_FOUND, "provider A timed out")
    found = parse_answer(status="partially_completed", data={"email": "ada@a.example"}, error="provider B timed out")
    assert (found.state, found.error) == (State.FOUND, None)


@in_turn("value", [0, False, 0.0, "0", "null", [None], {"a": None}])
def test_zero_and_false_are_values(value: object) -> None:
    """0 and false are values; only null, blank text, [] and {} are blank."""
    assert not is_blank(value)
    assert parse_answer(status="completed", data={"email": value}).state is State.FOUND


@in_turn(
    ("path", "value"),
    [
        ("email", EMAIL),
        ("person.name", "Ada"),
        ("person.emails.0", "a@b.c"),
        ("person.emails.1.x", 2),
        ("person.emails", ["a@b.c", {"x": 2}]),
        ("a.b", "dotted"),
        ("person.emails.2", None),
        ("person.emails.\N{ARABIC-INDIC DIGIT ONE}.x", None),
        ("person.emails.-1", None),
        ("person.emails.x", None),
        ("person.name.first", None),
        ("email.", None),
        ("", None),
        (".", None),
        ("nobody", None),
        ("person.nobody.name", None),
    ],
)
def test_dotted_path_lookup(path: str, value: object) -> None:
    """A path leads through objects and lists; a name that contains dots comes first; an unknown path gives null."""
    fields = {
        "email": EMAIL,
        "person": {"name": "Ada", "emails": ["a@b.c", {"x": 2}]},
        "a.b": "dotted",
        "a": {"b": "nested"},
    }
    assert value_at(fields, path) == value


def test_job_columns_decide_match() -> None:
    """Only fields that the job's columns use make a match; one of them is enough."""
    task = {"status": "completed", "data": {"email": None, "phone": "1"}}
    assert read_answer(TaskReply(task, "{}"), TaskPhase.COMPLETED, ["email"]).state is State.NOT_FOUND
    assert read_answer(TaskReply(task, "{}"), TaskPhase.COMPLETED, ["email", "phone"]).state is State.FOUND


@in_turn(
    ("spent", "micros"),
    [
        (2, 2_000_000),
        (0.01, 10_000),
        ("1.5", 1_500_000),
        (" 2 ", 2_000_000),
        (0, 0),
        ("0.000001", 1),
        (1e-7, 1),
        ("0E-7", 0),
        (-1, None),
        ("-0.5", None),
        (float("nan"), None),
        (float("inf"), None),
        (10**400, None),
        ("1e400", None),
        ("", None),
        ("free", None),
        (True, None),
        (None, None),
        ([], None),
        ({"amount": 1}, None),
    ],
)
def test_credits_parsing(spent: object, micros: int | None) -> None:
    """Credits may be a number or text; anything that is not an amount is unknown, not 0."""
    assert parse_answer(status="completed", data=None, credits_spent=spent).credits == micros
    assert parse_answer(status="failed", credits_spent=spent).credits == micros


def test_missing_credits_are_unknown() -> None:
    """Without credits and steps the price is unknown."""
    assert parse_answer(status="completed", data={"email": EMAIL}).credits is None
    assert parse_answer(status="completed", data=wrapper({"email": EMAIL})).credits is None


def test_step_costs_replace_missing_credits() -> None:
    """Missing credits are the sum of the steps' costs, given as text. An unreadable cost or sum makes it unknown."""
    steps = [step("A", "1.0"), step("B", 0.5), step("C", "0")]
    assert parse_answer(status="completed", data=wrapper({}, *steps)).credits == 1_500_000
    assert parse_answer(status="completed", data=wrapper({}, *steps), credits_spent=9).credits == 9_000_000
    assert parse_answer(status="completed", data=wrapper({}, *steps, step("D", None))).credits is None
    assert parse_answer(status="completed", data=wrapper({}, step("A", 6e5), step("B", 4e5))).credits == 10**12
    assert parse_answer(status="completed", data=wrapper({}, step("A", 6e5), step("B", 5e5))).credits is None


@in_turn(
    ("task", "is_free"),
    [
        ({"credits_spent": 0}, True),
        ({"credits_spent": "0.0"}, True),
        ({"credits_spent": 0, "data": wrapper(None, step("A", "0"), step("B", 0))}, True),
        ({}, False),
        ({"credits_spent": None}, False),
        ({"credits_spent": "free"}, False),
        ({"credits_spent": 0.01}, False),
        ({"credits_spent": 1e-7}, False),
        ({"credits_spent": 0, "progress": {"processing": 0}}, True),
        ({"credits_spent": 0, "progress": {"processing": 1}}, False),
        ({"credits_spent": 0, "data": wrapper(None, step("A", "0"), step("B", "0.5"))}, False),
        ({"credits_spent": 0, "data": wrapper(None, step("A", "0"), step("B", "1e-7"))}, False),
        ({"credits_spent": 0, "data": wrapper(None, step("A", "unknown"))}, False),
        ({"data": wrapper(None, step("A", "0"))}, False),
    ],
)
def test_free_failure_requires_zero_credits(task: dict[str, Any], *, is_free: bool) -> None:
    """A failure is free only if credits are 0 and no step has a cost: free failures are resent automatically."""
    answer = parse_answer(status="failed", error="boom", **task)
    assert answer.state is State.FAILED
    assert answer.free_failure is is_free


@in_turn("status", ["completed", "no_data", "gone"])
def test_free_no_match_is_final(status: str) -> None:
    """No match at no charge is final and is not resent."""
    assert not parse_answer(status=status, credits_spent=0).free_failure


@in_turn(
    ("error", "text"),
    [
        ("boom", "boom"),
        ("  two\n lines ", "two lines"),
        (["a", "b"], "a; b"),
        (["a", None, "", ["b", {"code": 1}]], 'a; b; {"code": 1}'),
        ({"code": 1, "message": "Größe"}, '{"code": 1, "message": "Größe"}'),
        (404, "404"),
        (None, None),
        ("", None),
        (" ", None),
        ([], None),
        ({}, None),
        ([None, ""], None),
    ],
)
def test_error_is_one_line(error: object, text: str | None) -> None:
    """An error of text, a list or an object becomes one line; a failure without an error shows its status."""
    assert error_text(error) == text
    assert parse_answer(status="Cancelled", error=error).error == (text or "API: Cancelled")


def test_expired_result() -> None:
    """An expired result has an unknown price."""
    answer = parse_answer(status="gone")
    assert (answer.state, answer.credits) == (State.EXPIRED, None)
    assert "expired" in (answer.error or "")


@in_turn(
    ("data", "provider"),
    [
        (wrapper({"email": EMAIL}, by_provider={"A": {"email": "x"}, "B": {"email": EMAIL}}), "B"),
        (wrapper({"email": EMAIL}, by_provider={"A": EMAIL}), "A"),
        (wrapper({"email": EMAIL}, step("A"), step("B", result=EMAIL), step("C")), "B"),
        (wrapper({"email": EMAIL}, step("A"), step("B", is_verified=True), step("C")), "B"),
        (wrapper({"email": EMAIL}, step("A"), step("B")), "B"),
        (wrapper({"email": EMAIL}, step("A"), step(""), {"cost": 1}), "A"),
        (wrapper({"email": EMAIL}, step("A"), by_provider={"B": {"email": "x"}}), "A"),
        (wrapper({"email": EMAIL}), None),
        (wrapper({"email": None}, step("A"), by_provider={"B": {"email": None}}), None),
        ({"email": EMAIL}, None),
    ],
)
def test_provider_of_match(data: object, provider: str | None) -> None:
    """The provider of a match comes from its data, otherwise from its steps; a miss has none."""
    assert parse_answer(status="completed", data=data).provider == provider


def test_raw_answer_is_kept() -> None:
    """The paid answer is stored as it came, in readable JSON."""
    task = {"status": "completed", "data": [{"email": "größe@x.example", "more": {"a": [1, None]}}], "new_key": 1}
    written = json.dumps(task, ensure_ascii=False, indent=1)
    assert read_answer(TaskReply(task, written), TaskPhase.COMPLETED, PATHS).raw == written


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(width=32) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
#: Objects with the names that the parser looks for, and any values.
TASK_BODIES = st.fixed_dictionaries(
    {},
    optional={
        name: JSON | st.lists(st.fixed_dictionaries({}, optional={"provider": JSON, "cost": JSON, "result": JSON}))
        for name in ("result", "result_field", "steps", "enrichment_data", "email")
    },
)


@given(
    status=st.sampled_from(["completed", "failed", "gone", "no_data", "processing"]) | JSON,
    data=JSON | TASK_BODIES | st.lists(TASK_BODIES, max_size=2),
    error=JSON,
    spent=JSON,
)
def test_any_json_is_parsed(status: object, data: object, error: object, spent: object) -> None:
    """Any JSON gives an answer that can be stored."""
    task = {"status": status, "data": data, "error": error, "credits_spent": spent}
    answer = read_answer(TaskReply(task, json.dumps(task)), task_phase(task), ["email", "result", "a.0.b"])
    assert answer.state in {State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED}
    assert isinstance(answer.raw, str)
    assert answer.credits is None or answer.credits >= 0
    assert answer.error is None or ("\n" not in answer.error and answer.error)
    assert (answer.state is State.FAILED) or not answer.free_failure


BY_PROVIDER = {"a": {"b.c": 1, "title": "x"}, "a.b": {"c": 2, "title": "CTO"}, "flat": "text"}
VERIFIED = wrapper(
    {"email": EMAIL},
    step("first", is_verified=True),
    step("second", result="old@engine.example", is_verified=True),
    step("second", result=EMAIL, is_verified=False),
    by_provider=BY_PROVIDER,
)


@in_turn(
    ("path", "data", "value"),
    [
        ("$steps.0.provider", VERIFIED, "first"),
        ("$steps.9.provider", VERIFIED, None),
        ("$steps.2.is_verified", [VERIFIED], False),
        ("$is_verified", VERIFIED, False),
        ("$is_verified", wrapper({"email": EMAIL}, step("first"), step("first", is_verified=True)), True),
        ("$is_verified", wrapper({"email": EMAIL}), None),
        ("$is_verified", wrapper({"email": None}, step("first", is_verified=True)), None),
        ("$enrichment_data.a.b.title", VERIFIED, "CTO"),
        ("$enrichment_data.a.b.c", VERIFIED, 2),
        ("$enrichment_data.a.title", VERIFIED, "x"),
        ("$enrichment_data.flat", VERIFIED, "text"),
        ("$enrichment_data.none.title", VERIFIED, None),
        ("$enrichment_data", VERIFIED, BY_PROVIDER),
        ("$enrichment_data.a.title", wrapper({"email": EMAIL}), None),
        ("$result_field.0", VERIFIED, "email"),
        ("email", VERIFIED, EMAIL),
        ("$email", {"email": EMAIL}, EMAIL),
        ("$is_verified", {"email": EMAIL, "is_verified": True}, True),
        ("$email", VERIFIED, None),
        ("$steps.0.provider", None, None),
        ("0.email", [{"email": EMAIL}], EMAIL),
        ("0.email", [{"email": EMAIL}, {"email": "b@c.d"}], EMAIL),
        ("1.email", [{"email": EMAIL}], None),
        ("\N{ARABIC-INDIC DIGIT ZERO}.email", [{"email": EMAIL}], None),
        ("1.email", [None, {"email": EMAIL}], EMAIL),
        ("0", [EMAIL], EMAIL),
        ("0.email", {"0": {"email": EMAIL}}, EMAIL),
        ("result", {"email": EMAIL, "result": "deliverable", "steps": 2}, "deliverable"),
        ("result", {"email": None, "result": None, "steps": []}, None),
        ("result.email", {"result": {"email": EMAIL}, "score": 1}, EMAIL),
        ("email", {"result": {"email": EMAIL}, "score": 1}, None),
        ("0.email", [wrapper({"0": {"email": EMAIL}})], EMAIL),
    ],
)
def test_paths_beside_the_result(path: str, data: object, value: object) -> None:
    """`$` reads beside the result, a provider's name longest first; in a flat answer `$x` is `x`.

    A number reads a row of a list, also of one row.
    """
    assert column_values(data, [path]) == [value]
    assert column_values(data, ["email", path])[1] == value


@in_turn(
    ("paths", "result", "found"),
    [
        (["$is_verified", "$steps.0.provider"], None, False),
        (["$is_verified", "$steps.0.provider"], EMAIL, False),
        (["$is_verified", "email"], EMAIL, True),
        (["$enrichment_data.flat"], None, True),
        (["$enrichment_data.none"], None, False),
    ],
)
def test_steps_make_no_match(paths: list[str], result: object, *, found: bool) -> None:
    """A miss never becomes found by how it was searched; what a provider itself answered is a value."""
    data = wrapper({"email": result}, step("first", result=result, is_verified=True), by_provider=BY_PROVIDER)
    task = {"status": "completed", "data": data}
    answer = read_answer(TaskReply(task, json.dumps(task)), task_phase(task), paths)
    assert (answer.state is State.FOUND) is found
