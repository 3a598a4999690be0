"""Who earned it: what the steps of the answers add up to, and what is presumed where they are silent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.api.waterfall import Waterfall
from enrich.cascade import Cascade, Earned, Earnings, read_offers
from enrich.model import Settled, State
from tests.books import CALL
from tests.cases import first_quick, in_turn
from tests.harness import CALM, Office, people, serving

OFFER = Waterfall.model_validate(
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
ASKED = {"first_name": "Ada"}


def settled(state: State, data: object = None, paid: int | None = 0, **changed: Any) -> Settled:
    """Make an attempt that was settled with this `data`."""
    made = Settled(1, state, CALL.canonical(), json.dumps(ASKED), paid, json.dumps({"data": data}), 0)
    return made._replace(**changed)


def step(provider: object, cost: object = "0", action: str = "search", **more: object) -> dict[str, object]:
    """Make a step as the API tells it."""
    return {"action": action, "provider": provider, "cost": cost, **more}


def wrapped(email: str | None, *steps: object, by: str | None = None) -> dict[str, object]:
    """Make a wrapper with steps."""
    return {"result": {"email": email}, "enrichment_data": {by: {"email": email}} if by else {}, "steps": list(steps)}


def added_up(answers: Iterable[Settled], offers: Mapping[str, Waterfall]) -> Earnings:
    """Add up answers."""
    cascade = Cascade(offers)
    for answer in answers:
        cascade.add(answer)
    return cascade.earnings()


def told(*answers: Settled) -> tuple[dict[str, Earned], Earnings]:
    """Add up answers; providers by their names."""
    whole = added_up(answers, {"email_getter": OFFER})
    return {each.name: each for each in whole.providers}, whole


def test_steps_tell_who_was_asked() -> None:
    """Each in its place, with its price; who knew the answer has found it, the others passed it on."""
    steps = step("Mailhound"), step("Peoplegrid", "1.5")
    by_name, whole = told(settled(State.FOUND, [wrapped("a@b.example", *steps, by="Peoplegrid")], 1_500_000))

    assert [each.name for each in whole.providers] == ["Mailhound", "Peoplegrid"]
    first, second = by_name["Mailhound"], by_name["Peoplegrid"]
    assert (first.asked, first.passed_on, first.cost_per_hit) == (1, 1, None)
    assert (second.found, second.cost_per_hit) == (1, 1_500_000)
    assert (whole.answers, whole.found, whole.untold, whole.spent, whole.elsewhere) == (1, 1, 0, 1_500_000, 0)


def test_a_verifier_stands_last_and_finds_nothing() -> None:
    """What it turned down is rejected once, however often it looked; a find that holds is none of its own."""
    steps = (
        step("Mailhound"),
        step("Mailproof", "0.01", "verify"),
        step("Mailproof", "0.01", "verify"),
        step("Peoplegrid", "1"),
        step("Mailproof", "0.01", "verify", is_verified=True),
    )
    call = CALL.canonical().replace('"enrichments"', '"email_verifier": 10, "enrichments"')
    by_name, whole = told(settled(State.FOUND, wrapped("a@b.example", *steps), 1_030_000, call=call))

    assert [each.name for each in whole.providers] == ["Mailhound", "Peoplegrid", "Mailproof"]
    assert (by_name["Mailhound"].rejected, by_name["Peoplegrid"].rejected) == (1, 0)
    assert by_name["Peoplegrid"].found == 1
    proof = by_name["Mailproof"]
    assert (proof.verifies, proof.asked, proof.found, proof.passed_on, proof.credits) == (True, 1, 0, 0, 30_000)
    assert whole.elsewhere == 0


@in_turn("data", [None, [], {}, [None], {"email": None}, {"email": ""}, wrapped(None)])
def test_a_silent_miss_presumes_everybody_who_could_be_asked(data: object) -> None:
    """All but those whose inputs were not sent; no price is made up."""
    by_name, whole = told(settled(State.NOT_FOUND, data, 50))

    assert set(by_name) == {"Mailhound", "Peoplegrid", "Inboxly"}
    assert all((each.asked, each.presumed, each.passed_on) == (0, 1, 1) for each in whole.providers)
    assert (whole.untold, whole.elsewhere) == (0, 50)


def test_a_find_without_steps_is_presumed_down_to_who_found_it() -> None:
    """When its own data tells who that was; else nobody knows whom it asked."""
    data = {"result": {"email": "a@b.example"}, "enrichment_data": {"Peoplegrid": {"email": "a@b.example"}}}
    by_name, whole = told(settled(State.FOUND, data), settled(State.FOUND, {"email": "a@b.example"}))

    assert {name: (each.presumed, each.found) for name, each in by_name.items()} == {
        "Mailhound": (1, 0),
        "Peoplegrid": (1, 1),
    }
    assert (whole.answers, whole.found, whole.untold) == (2, 2, 1)


def test_a_finder_that_no_step_names_was_asked_all_the_same() -> None:
    """Its data is in the answer."""
    by_name, _ = told(settled(State.FOUND, wrapped("a@b.example", step("Mailhound"), by="Peoplegrid")))

    assert (by_name["Peoplegrid"].asked, by_name["Peoplegrid"].found) == (1, 1)


def test_what_nobody_can_tell_is_told_as_such() -> None:
    """Failures without steps, purged answers and unknown providers."""
    gone = settled(State.NOT_FOUND, answer=None, params="{}", erased=1)
    other = settled(State.NOT_FOUND, call=CALL.canonical().replace("966", "999"))
    foreign = settled(State.NOT_FOUND, call=CALL.canonical().replace("email_getter", "other"))
    _, whole = told(settled(State.FAILED, paid=7), gone, other, foreign)

    assert (whole.providers, whole.answers, whole.untold, whole.spent, whole.elsewhere) == ([], 4, 4, 7, 7)


def test_expired_and_doubtful_ones_are_no_answers() -> None:
    """They add what they cost."""
    _, whole = told(settled(State.EXPIRED, paid=3), settled(State.IN_DOUBT, paid=None))

    assert (whole.answers, whole.spent, whole.elsewhere) == (0, 3, 3)


def test_an_answer_of_unknown_price_takes_nothing_from_what_was_paid_elsewhere() -> None:
    """Its steps tell what its providers cost; the bill does not know."""
    by_name, whole = told(settled(State.NOT_FOUND, wrapped(None, step("Mailhound", "2")), None))

    assert (by_name["Mailhound"].credits, whole.spent, whole.elsewhere) == (2_000_000, 0, 0)


def test_a_refund_is_less_than_nothing_elsewhere() -> None:
    """The steps tell more than was paid: providers and the rest still add up to the bill."""
    _, whole = told(settled(State.FAILED, wrapped(None, step("Mailhound", "2")), 0))

    assert whole.elsewhere == -2_000_000


@in_turn("cost", [None, "", "free", "NaN", "-1", -3, True, [], {}, [["1"]], "1e99"])
def test_a_cost_that_is_none_is_not_counted(cost: object) -> None:
    """What was paid for it is elsewhere."""
    by_name, whole = told(settled(State.NOT_FOUND, wrapped(None, step("Mailhound", cost)), 500_000))

    assert (by_name["Mailhound"].asked, by_name["Mailhound"].credits, whole.elsewhere) == (1, 0, 500_000)


@in_turn("provider", [None, "", "  ", 833, True, ["Mailhound"], {"name": "Ada"}])
def test_a_step_without_a_name_names_nobody(provider: object) -> None:
    """Then it is as if there was none."""
    by_name, whole = told(settled(State.NOT_FOUND, wrapped(None, step(provider, "1"))))

    assert set(by_name) == {"Mailhound", "Peoplegrid", "Inboxly"}
    assert whole.elsewhere == 0


@in_turn("answer", ["", "{", "[]", '"text"', "null", "[" * 100_000, '{"data": {"steps": 7}}'])
def test_an_answer_that_nobody_can_read_breaks_nothing(answer: str) -> None:
    """It is counted."""
    _, whole = told(settled(State.NOT_FOUND, answer=answer))

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
def test_whatever_the_api_says_the_sums_hold(answers: list[tuple[State, object, int | None]]) -> None:
    """The parts add up to the bill where prices are known, and nobody found what nobody was asked for."""
    by_name, whole = told(*(settled(state, data, paid) for state, data, paid in answers))

    assert whole.spent == sum(paid or 0 for _, _, paid in answers)
    if all(paid is not None for _, _, paid in answers):
        assert sum(each.credits for each in whole.providers) + whole.elsewhere == whole.spent
    for each in by_name.values():
        assert 0 <= each.found <= each.asked + each.presumed <= whole.answers
        assert each.rejected <= each.asked
        assert each.passed_on >= 0
    assert sum(each.found for each in whole.providers) <= whole.found


def test_who_finds_and_checks_was_asked_once() -> None:
    """Nobody is asked for more leads than there are."""
    steps = step("Peoplegrid"), {**step("Peoplegrid"), "action": "verify"}
    by_name, _ = told(settled(State.FOUND, wrapped("a@b.example", *steps)))

    assert by_name["Peoplegrid"].asked == 1


def earned(office: Office) -> Earnings:
    """Add up the ledger of the office's job."""
    with closing(office.ledger()) as ledger:
        return added_up(ledger.settled("job"), read_offers(ledger.waterfalls()))


@pytest.mark.parametrize(
    ("shape", "verifier", "bulk"),
    first_quick(
        1,
        [
            ("wrapped", False, False),
            ("wrapped", True, False),
            ("wrapper_object", True, False),
            ("wrapped", True, True),
            ("flat", False, False),
            ("flat_list", True, True),
        ],
    ),
)
def test_it_agrees_with_what_the_api_charged(
    tmp_path: Path, office: Office, *, shape: str, verifier: bool, bulk: bool
) -> None:
    """With steps finds and credits are the API's own, and all are asked whom it asked; without, nothing is made up."""
    more = {"email_verifier": "10"} if verifier else {}
    office.write_job(**more, **({"dispatch": "{bulk: 25}"} if bulk else {}))
    office.write_leads(people(60))
    kinds = ("null", "empty_list", "empty_object", "null_result", "blank_result")
    with serving(tmp_path / "api.db", CALM, shape=shape, miss_kinds=kinds, charge_misses=True) as api:
        assert office.command("run", "job.yaml", api=api).code == 0
        audit = api.audit()
    true, whole = audit["by_provider"], earned(office)

    assert whole.spent / 1e6 == pytest.approx(audit["credits_charged"])
    assert whole.answers == audit["charged"] == 60
    assert sum(each.credits for each in whole.providers) + whole.elsewhere == whole.spent
    if not shape.startswith("wrap"):
        assert whole.untold == whole.found  # who found it is not told
        assert all(each.found == each.credits == 0 for each in whole.providers)
        return
    for each in whole.providers:
        if not each.verifies:  # a silent miss tells no price and no verification
            assert each.found == true[each.name]["found"]
            assert each.asked + each.presumed == true[each.name]["asked"]
        assert each.credits / 1e6 <= true[each.name]["credits"] + 1e-9
    assert {each.name for each in whole.providers if each.verifies} == ({"Mailproof"} if verifier else set())


@pytest.mark.long
def test_misses_that_tell_their_steps_are_told_to_the_credit(tmp_path: Path, office: Office) -> None:
    """Finds, questions and credits of every provider and verifier are those that the API charged."""
    office.write_job(email_verifier="10")
    office.write_leads(people(60))
    with serving(tmp_path / "api.db", CALM, miss_kinds=("null_result",), charge_misses=True) as api:
        office.command("run", "job.yaml", api=api)
        true = api.audit()["by_provider"]

    assert {
        each.name: {"asked": each.asked, "found": each.found, "credits": pytest.approx(each.credits / 1e6)}
        for each in earned(office).providers
    } == true
