"""Provider statistics: sums over the steps of answers, and what is inferred for answers without steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.databar.description import Description, Waterfall
from enrich.databar.task_results import ParsedData, parse_data
from enrich.job.target import Target, TargetKind
from enrich.ledger import queries
from enrich.models import SettledAttempt, State
from enrich.run.provider_stats import ProviderStat, ProviderStats, ProviderTotals, count_kinds, read_descriptions
from tests.support.cases import in_turn
from tests.support.ledger import CALL
from tests.support.workspace import INSTANT_API, Workspace, make_leads, serve_api

WATERFALL = Waterfall.model_validate(
    {
        "identifier": "email_getter",
        "available_enrichments": [
            {"id": 833, "name": "Mailhound", "params": ["first_name"]},
            {"id": 966, "name": "Peoplegrid", "params": ["first_name"]},
            {"id": 701, "name": "Inboxly"},
            {"id": 745, "name": "Profilewell", "params": ["linkedin"]},
        ],
        "email_verifiers": [{"id": 10, "name": "Mailproof"}],
    }
)
SENT_PARAMS = {"first_name": "Ada"}


def settled_attempt(state: State, data: object = None, paid: int | None = 0, **changed: Any) -> SettledAttempt:
    """Return an attempt that was settled with this `data`."""
    made = SettledAttempt(1, state, CALL.canonical(), json.dumps(SENT_PARAMS), paid, json.dumps({"data": data}), 0)
    return made._replace(provider=parse_data(data).provider)._replace(**changed)


def step(provider: object, cost: object = "0", action: str = "search", **more: object) -> dict[str, object]:
    """Return a step in the API's format."""
    return {"action": action, "provider": provider, "cost": cost, **more}


def result_wrapper(email: str | None, *steps: object, provider: str | None = None) -> dict[str, object]:
    """Return a wrapper with steps."""
    return {
        "result": {"email": email},
        "enrichment_data": {provider: {"email": email}} if provider else {},
        "steps": list(steps),
    }


def stats_of(answers: Iterable[SettledAttempt], offers: Mapping[tuple[TargetKind, str], Description]) -> ProviderTotals:
    """Return the totals of these answers."""
    cascade = ProviderStats(offers)
    for kind, number in count_kinds(answers):
        cascade.add(kind, number)
    return cascade.totals()


def provider_stats(*answers: SettledAttempt) -> tuple[dict[str, ProviderStat], ProviderTotals]:
    """Return the providers by name, and the totals."""
    whole = stats_of(answers, {(TargetKind.WATERFALL, "email_getter"): WATERFALL})
    return {each.name: each for each in whole.providers}, whole


def test_steps_give_provider_stats() -> None:
    """Each provider is in order with its credits; the one with the result found it, and the others passed it on."""
    steps = step("Mailhound"), step("Peoplegrid", "1.5")
    by_name, whole = provider_stats(
        settled_attempt(State.FOUND, [result_wrapper("a@b.example", *steps, provider="Peoplegrid")], 1_500_000)
    )

    assert [each.name for each in whole.providers] == ["Mailhound", "Peoplegrid"]
    first, second = by_name["Mailhound"], by_name["Peoplegrid"]
    assert (first.reported, first.passed_on, first.cost_per_hit) == (1, 1, None)
    assert (second.found, second.cost_per_hit) == (1, 1_500_000)
    assert (whole.answers, whole.found, whole.not_reported, whole.spent, whole.unattributed) == (1, 1, 0, 1_500_000, 0)


def test_verifier_stats() -> None:
    """A match that a verifier rejects counts once, however many checks; a verified match is its provider's."""
    steps = (
        step("Mailhound"),
        step("Mailproof", "0.01", "verify"),
        step("Mailproof", "0.01", "verify"),
        step("Peoplegrid", "1"),
        step("Mailproof", "0.01", "verify", is_verified=True),
    )
    call = CALL.canonical().replace('"enrichments"', '"email_verifier": 10, "enrichments"')
    by_name, whole = provider_stats(
        settled_attempt(State.FOUND, result_wrapper("a@b.example", *steps), 1_030_000, call=call)
    )

    assert [each.name for each in whole.providers] == ["Mailhound", "Peoplegrid", "Mailproof"]
    assert (by_name["Mailhound"].rejected, by_name["Peoplegrid"].rejected) == (1, 0)
    assert by_name["Peoplegrid"].found == 1
    proof = by_name["Mailproof"]
    assert (proof.verifies, proof.reported, proof.found, proof.passed_on, proof.credits) == (True, 1, 0, 0, 30_000)
    assert whole.unattributed == 0


@in_turn("data", [None, [], {}, [None], {"email": None}, {"email": ""}, result_wrapper(None)])
def test_no_match_without_steps_is_inferred(data: object) -> None:
    """A miss without steps is inferred to have passed all providers whose inputs were sent, at no price."""
    by_name, whole = provider_stats(settled_attempt(State.NOT_FOUND, data, 50))

    assert set(by_name) == {"Mailhound", "Peoplegrid", "Inboxly"}
    assert all((each.reported, each.inferred, each.passed_on) == (0, 1, 1) for each in whole.providers)
    assert (whole.not_reported, whole.unattributed) == (0, 50)


def test_match_without_steps_is_inferred() -> None:
    """A match without steps is inferred if its data names the provider; otherwise it is not reported."""
    data = {"result": {"email": "a@b.example"}, "enrichment_data": {"Peoplegrid": {"email": "a@b.example"}}}
    by_name, whole = provider_stats(
        settled_attempt(State.FOUND, data), settled_attempt(State.FOUND, {"email": "a@b.example"})
    )

    assert {name: (each.inferred, each.found) for name, each in by_name.items()} == {
        "Mailhound": (1, 0),
        "Peoplegrid": (1, 1),
    }
    assert (whole.answers, whole.found, whole.not_reported) == (2, 2, 1)


def test_provider_from_data_without_step() -> None:
    """A provider whose data is in the answer counts as called, even without a step."""
    by_name, _ = provider_stats(
        settled_attempt(State.FOUND, result_wrapper("a@b.example", step("Mailhound"), provider="Peoplegrid"))
    )

    assert (by_name["Peoplegrid"].reported, by_name["Peoplegrid"].found) == (1, 1)


def test_unattributed_credits() -> None:
    """Failures without steps, purged answers and unknown providers give unattributed credits."""
    gone = settled_attempt(State.NOT_FOUND, answer=None, params="{}", erased=1)
    other = settled_attempt(State.NOT_FOUND, call=CALL.canonical().replace("966", "999"))
    foreign = settled_attempt(State.NOT_FOUND, call=CALL.canonical().replace("email_getter", "other"))
    _, whole = provider_stats(settled_attempt(State.FAILED, paid=7), gone, other, foreign)

    assert (whole.providers, whole.answers, whole.not_reported, whole.spent, whole.unattributed) == ([], 4, 4, 7, 7)


def test_expired_and_in_doubt_add_only_cost() -> None:
    """Expired and unconfirmed requests add only their cost."""
    _, whole = provider_stats(settled_attempt(State.EXPIRED, paid=3), settled_attempt(State.IN_DOUBT, paid=None))

    assert (whole.answers, whole.spent, whole.unattributed) == (0, 3, 3)


def test_unknown_price_leaves_bill_unchanged() -> None:
    """An unknown price adds nothing to the bill, although the steps have the providers' costs."""
    by_name, whole = provider_stats(
        settled_attempt(State.NOT_FOUND, result_wrapper(None, step("Mailhound", "2")), None)
    )

    assert (by_name["Mailhound"].credits, whole.spent, whole.unattributed) == (2_000_000, 0, 0)


def test_refund_gives_negative_unattributed() -> None:
    """A refund below the steps' costs gives negative unattributed credits, so the sum is still the bill."""
    _, whole = provider_stats(settled_attempt(State.FAILED, result_wrapper(None, step("Mailhound", "2")), 0))

    assert whole.unattributed == -2_000_000


@in_turn("cost", [None, "", "free", "NaN", "-1", -3, True, [], {}, [["1"]], "1e99"])
def test_invalid_step_cost_is_ignored(cost: object) -> None:
    """A step's invalid cost counts as 0, and the price paid is unattributed."""
    by_name, whole = provider_stats(
        settled_attempt(State.NOT_FOUND, result_wrapper(None, step("Mailhound", cost)), 500_000)
    )

    assert (by_name["Mailhound"].reported, by_name["Mailhound"].credits, whole.unattributed) == (1, 0, 500_000)


@in_turn("provider", [None, "", "  ", 833, True, ["Mailhound"], {"name": "Ada"}])
def test_step_without_name_is_ignored(provider: object) -> None:
    """A step without a name is ignored, as if the answer had no steps."""
    by_name, whole = provider_stats(settled_attempt(State.NOT_FOUND, result_wrapper(None, step(provider, "1"))))

    assert set(by_name) == {"Mailhound", "Peoplegrid", "Inboxly"}
    assert whole.unattributed == 0


@in_turn("answer", ["", "{", "[]", '"text"', "null", "[" * 100_000, '{"data": {"steps": 7}}'])
def test_unreadable_answer_is_counted(answer: str) -> None:
    """An unreadable answer is counted as an answer."""
    _, whole = provider_stats(settled_attempt(State.NOT_FOUND, answer=answer))

    assert whole.answers == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
STEPS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "provider": st.sampled_from(["Mailhound", "Peoplegrid", "Mailproof", "New"]) | JSON,
            "cost": st.sampled_from(["0.5", 1, "x"]) | JSON,
            "action": st.sampled_from(["search", "verify"]) | JSON,
            "is_verified": JSON,
            "result": JSON,
        },
    )
    | JSON,
    max_size=5,
)
ANSWERS = st.tuples(
    st.sampled_from([State.FOUND, State.NOT_FOUND, State.FAILED, State.EXPIRED]),
    st.fixed_dictionaries({"result": JSON, "steps": STEPS, "enrichment_data": JSON}) | JSON,
    st.none() | st.integers(0, 10**9),
)


@given(st.lists(ANSWERS, max_size=6))
def test_any_answer_keeps_totals(answers: list[tuple[State, object, int | None]]) -> None:
    """For any answers, the parts sum to the bill where prices are known, and providers find at most what they got."""
    by_name, whole = provider_stats(*(settled_attempt(state, data, paid) for state, data, paid in answers))

    assert whole.spent == sum(paid or 0 for _, _, paid in answers)
    if all(paid is not None for _, _, paid in answers):
        assert sum(each.credits for each in whole.providers) + whole.unattributed == whole.spent
    for each in by_name.values():
        assert 0 <= each.found <= each.reported + each.inferred <= whole.answers
        assert each.rejected <= each.reported
        assert each.passed_on >= 0
    assert sum(each.found for each in whole.providers) <= whole.found


@given(st.lists(ANSWERS, max_size=6), st.none() | st.just("completed") | JSON)
def test_usual_answers_count_as_any(answers: list[tuple[State, object, int | None]], status: object) -> None:
    """What is decoded of a usual answer gives the same counts as the whole answer."""
    attempts = [
        settled_attempt(state, data, paid, answer=json.dumps({"status": status, "data": data}))
        for state, data, paid in answers
    ]

    def read_match(_: int, parsed: ParsedData) -> tuple[str, ...]:
        return (repr(parsed.fields),)

    usual, whole = (list(count_kinds(attempts, read_match, read_whole=read_whole)) for read_whole in (False, True))
    assert usual == whole


def test_provider_that_verifies_counted_once() -> None:
    """A provider that also verifies its match is counted once a lead."""
    steps = step("Peoplegrid"), {**step("Peoplegrid"), "action": "verify"}
    by_name, _ = provider_stats(settled_attempt(State.FOUND, result_wrapper("a@b.example", *steps)))

    assert by_name["Peoplegrid"].reported == 1


def ledger_stats(workspace: Workspace) -> ProviderTotals:
    """Return the totals of the ledger of the workspace's job."""
    with closing(workspace.open_ledger()) as ledger:
        return stats_of(queries.settled_attempts(ledger, "job"), read_descriptions(ledger))


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "verifier", "bulk"),
    [
        ("wrapped", False, False),
        ("wrapped", True, False),
        ("wrapper_object", True, False),
        ("wrapped", True, True),
        ("flat", False, False),
        ("flat_list", True, True),
    ],
)
def test_stats_agree_with_audit(
    tmp_path: Path, workspace: Workspace, *, shape: str, verifier: bool, bulk: bool
) -> None:
    """With steps, matches and credits agree with the API's audit; without steps, nothing is invented."""
    more = {"email_verifier": "10"} if verifier else {}
    workspace.write_job(**more, **({"dispatch": "{bulk: 25}"} if bulk else {}))
    workspace.write_leads(make_leads(60))
    kinds = ("null", "empty_list", "empty_object", "null_result", "blank_result")
    with serve_api(tmp_path / "api.db", INSTANT_API, shape=shape, miss_kinds=kinds, charge_misses=True) as api:
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
        audit = api.audit()
    true, whole = audit["by_provider"], ledger_stats(workspace)

    assert whole.spent / 1e6 == pytest.approx(audit["credits_charged"])
    assert whole.answers == audit["charged"] == 60
    assert sum(each.credits for each in whole.providers) + whole.unattributed == whole.spent
    if not shape.startswith("wrap"):
        assert whole.not_reported == whole.found  # its provider is not reported
        assert all(each.found == each.credits == 0 for each in whole.providers)
        return
    for each in whole.providers:
        if not each.verifies:  # a miss without steps shows no price and no verification
            assert each.found == true[each.name]["found"]
            assert each.reported + each.inferred == true[each.name]["calls"]
        assert each.credits / 1e6 <= true[each.name]["credits"] + 1e-9
    assert {each.name for each in whole.providers if each.verifies} == ({"Mailproof"} if verifier else set())


@pytest.mark.long
def test_stats_with_steps_match_charges(tmp_path: Path, workspace: Workspace) -> None:
    """With all steps, requests, matches and credits of every provider and verifier equal the API's charges."""
    workspace.write_job(email_verifier="10")
    workspace.write_leads(make_leads(60))
    with serve_api(tmp_path / "api.db", INSTANT_API, miss_kinds=("null_result",), charge_misses=True) as api:
        workspace.run_in_process("run", "job.yaml", api=api)
        true = api.audit()["by_provider"]

    assert {
        each.name: {"calls": each.reported, "found": each.found, "credits": pytest.approx(each.credits / 1e6)}
        for each in ledger_stats(workspace).providers
    } == true


def test_failures_of_an_enrichment() -> None:
    """An enrichment's failures are not part of its match rate; what they cost is its own."""
    call = Target(TargetKind.ENRICHMENT, "10").canonical()
    states = (State.FOUND, State.NOT_FOUND, State.FAILED)
    by_name, whole = provider_stats(*(settled_attempt(state, paid=10, call=call) for state in states))

    assert (by_name["10"].reported, by_name["10"].found, by_name["10"].passed_on, by_name["10"].credits) == (
        2,
        1,
        1,
        30,
    )
    assert (whole.answers, whole.failed, whole.not_reported, whole.unattributed) == (3, 1, 0, 0)
