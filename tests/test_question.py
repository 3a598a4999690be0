"""A job held against a waterfall: the providers, the worst price, the params it must have, the columns it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from enrich.api.waterfall import User, Waterfall
from enrich.budget import make_budget
from enrich.errors import JobError, Refused
from enrich.job import load_job
from enrich.question import Question, default_providers, make_question
from tests.harness import Office

JOB = """\
version: 1
input: leads.csv
waterfall: email_getter
params:
  first_name: First Name
  last_name: Last Name
  company: Website
"""


def described(**changes: Any) -> Waterfall:
    """Describe a waterfall as the API does."""
    said = {
        "identifier": "email_getter",
        "input_params": [
            {"name": "first_name", "type": "text", "required": True},
            {"name": "last_name", "type": "text", "required": True},
            {"name": "company", "type": "text", "required": True},
            {"name": "email", "type": "text"},
            {"name": "second", "type": "email", "required": False},
        ],
        "output_fields": [{"name": "email", "label": "E-mail", "type": "text"}, {"name": "score"}],
        "available_enrichments": [
            {"id": 833, "name": "A", "price": "0.5", "params": ["first_name"], "enabled_by_default": True},
            {"id": 113, "name": "Add-on", "price": 3, "enabled_by_default": False},
            {"id": 966, "name": "B", "price": 1.25},
        ],
        "is_email_verifying": True,
        "email_verifiers": [{"id": 10, "name": "V", "price": "0.1"}],
    }
    return Waterfall.model_validate(said | changes)


def question(
    office: Office, more: str = "", waterfall: Waterfall | None = None, providers: Sequence[int] | None = None
) -> Question:
    """Make the question of a job."""
    waterfall = waterfall or described()
    job = load_job(office.write_job(JOB + more))
    return make_question(job, waterfall, default_providers(waterfall) if providers is None else providers)


def refusal(office: Office, more: str = "", waterfall: Waterfall | None = None) -> tuple[str, str | None]:
    """Return the message, without the job file's path, and the hint."""
    with pytest.raises(JobError) as caught:
        question(office, more, waterfall)
    return caught.value.message.removeprefix(f"{office.job_file}:"), caught.value.hint


def test_the_providers_are_those_enabled_by_default(office: Office) -> None:
    """Add-ons run only when they are named; a provider that says nothing is enabled."""
    assert question(office).call.enrichments == (833, 966)
    assert question(office, providers=[966]).call.enrichments == (966,)


def test_the_job_s_order_of_providers_is_kept(office: Office) -> None:
    """It is the order in which they are asked, and so it is part of the question."""
    assert question(office, "enrichments: [966, 113, 833]\n").call.enrichments == (966, 113, 833)


def test_the_worst_price_is_everybody_asked_and_checked(office: Office) -> None:
    """In millionths: each provider, and a verification of what each found."""
    assert question(office).worst_price == 1_750_000
    assert question(office, "enrichments: [113]\n").worst_price == 3_000_000
    assert question(office, "email_verifier: 10\n").worst_price == 1_950_000


@pytest.mark.parametrize("price", [None, "free", "", -1, "nan"])
def test_a_price_that_is_not_known_is_not_nought(office: Office, price: object) -> None:
    """Without a cap the run may go on; a cap that cannot be kept is refused."""
    waterfall = described(available_enrichments=[{"id": 833, "price": "1"}, {"id": 966, "price": price}])
    made = question(office, waterfall=waterfall)
    assert made.worst_price is None
    assert make_budget(load_job(office.job_file), made, None).price == 0
    capped = load_job(office.write_job(f"{JOB}limits: {{max_credits: 5}}\n"))
    with pytest.raises(Refused, match="names no price"):
        make_budget(capped, made, None)
    assert make_budget(capped, question(office), None).price == 1_750_000


def test_a_provider_that_the_api_no_longer_lists_has_no_known_price(office: Office) -> None:
    """The ledger may keep it from the first run: what it costs today nobody says."""
    assert question(office, providers=[833, 1]).worst_price is None


def test_required_params_and_emails_are_known(office: Office) -> None:
    """A param is an e-mail by its type or by its name."""
    made = question(office)
    assert made.required == ("first_name", "last_name", "company")
    assert made.emails == ("email", "second")


def test_the_columns_are_the_waterfall_s_fields_unless_the_job_names_some(office: Office) -> None:
    """New column: field of the result."""
    assert question(office).columns == {"email": "email", "score": "score"}
    assert question(office, "columns: {work: email, city: person.city}\n").columns == {
        "work": "email",
        "city": "person.city",
    }


@pytest.mark.parametrize(
    ("more", "message", "hint"),
    [
        (
            "  compani: X\n",
            "8: params.compani: the waterfall `email_getter` has no such param",
            "did you mean `company`?",
        ),
        (
            "  zzz: X\n",
            "8: params.zzz: the waterfall `email_getter` has no such param",
            "known: first_name, last_name, company, email, second",
        ),
        (
            "enrichments:\n  - 833\n  - 5\n",
            "10: enrichments.1: `email_getter` has no provider 5",
            "it has 833 A, 113 Add-on, 966 B",
        ),
        ("enrichments: [833, 833]\n", "8: enrichments.1: provider 833 is there twice", "remove one of the two"),
        ("email_verifier: 9\n", "8: email_verifier: `email_getter` has no verifier 9", "it has 10 V"),
    ],
)
def test_what_the_waterfall_lacks_is_told(office: Office, more: str, message: str, hint: str) -> None:
    """With the line of the job file and what there is instead."""
    assert refusal(office, more) == (message, hint)


def test_a_required_param_must_be_mapped(office: Office) -> None:
    """It is told before anything is asked."""
    known = {"name": "linkedin", "required": True}
    message, hint = refusal(
        office, waterfall=described(input_params=[known, *described().model_dump()["input_params"]])
    )
    assert message == "4: params: the waterfall `email_getter` requires `linkedin`"
    assert hint == "map it: linkedin: <a column of the input>"


def test_a_waterfall_that_verifies_nothing_takes_no_verifier(office: Office) -> None:
    """The API would ignore it, or charge for nothing."""
    message, _ = refusal(office, "email_verifier: 10\n", described(is_email_verifying=False))
    assert message == "8: email_verifier: the waterfall `email_getter` verifies no e-mails"


def test_a_waterfall_that_says_little_is_taken_at_the_job_s_word(office: Office) -> None:
    """Older documents know neither verifiers nor defaults; nothing is refused for what nobody says."""
    waterfall = Waterfall.model_validate({"identifier": "email_getter", "is_email_verifying": True})
    made = question(office, "enrichments: [1]\nemail_verifier: 2\ncolumns: {a: b}\n", waterfall)
    assert (made.call.enrichments, made.call.email_verifier, made.worst_price) == ((1,), 2, None)
    assert "say which `enrichments`" in (refusal(office, "columns: {a: b}\n", waterfall)[1] or "")
    assert "say which `columns`" in (refusal(office, "enrichments: [1]\n", waterfall)[1] or "")


def test_null_is_as_good_as_left_out() -> None:
    """The API's documents do not tell which keys may be null."""
    waterfall = Waterfall.model_validate(
        {
            "identifier": "w",
            "description": None,
            "input_params": [{"name": "a", "type": None, "required": None}],
            "available_enrichments": [{"id": "833", "name": None, "price": None, "enabled_by_default": None}],
            "is_email_verifying": None,
            "email_verifiers": None,
        }
    )
    assert waterfall.input_params[0].required is False
    assert waterfall.available_enrichments[0].enabled_by_default is True
    assert (waterfall.available_enrichments[0].id, waterfall.email_verifiers) == (833, [])
    assert User.model_validate({"email": "x", "balance": None}).balance is None
    assert User.model_validate({"balance": "5.5", "workspace": "w"}).balance == "5.5"


def test_what_was_described_can_be_remembered() -> None:
    """The ledger keeps the description as JSON and makes the same question of it."""
    waterfall = described()
    assert Waterfall.model_validate(waterfall.model_dump()) == waterfall
