"""A job matched with its waterfall: providers, maximum price, required params and result columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from enrich.databar.description import User, Waterfall
from enrich.errors import CommandRefused, JobError
from enrich.job.job import load_job
from enrich.rows.template import RequestTemplate, default_providers, make_request_template
from enrich.run.budget import make_budget
from tests.support.workspace import Workspace

JOB = """\
version: 1
input: leads.csv
waterfall: email_getter
params:
  first_name: First Name
  last_name: Last Name
  company: Website
"""


def waterfall_json(**changes: Any) -> Waterfall:
    """Return a waterfall in the API's format."""
    message = {
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
    return Waterfall.model_validate(message | changes)


def build_template(
    workspace: Workspace,
    extra_yaml: str = "",
    waterfall: Waterfall | None = None,
    providers: Sequence[int] | None = None,
) -> RequestTemplate:
    """Build the request template of a job."""
    waterfall = waterfall or waterfall_json()
    job = load_job(workspace.write_job(JOB + extra_yaml))
    return make_request_template(job, waterfall, default_providers(waterfall) if providers is None else providers)


def job_error(workspace: Workspace, extra_yaml: str = "", waterfall: Waterfall | None = None) -> tuple[str, str | None]:
    """Return the error message, without the job file's path, and the hint."""
    with pytest.raises(JobError) as caught:
        build_template(workspace, extra_yaml, waterfall)
    return caught.value.message.removeprefix(f"{workspace.job_file}:"), caught.value.hint


def test_default_providers(workspace: Workspace) -> None:
    """Add-ons run only when the job names them; a provider without a default is enabled."""
    assert build_template(workspace).target.enrichments == (833, 966)
    assert build_template(workspace, providers=[966]).target.enrichments == (966,)


def test_provider_listed_twice(workspace: Workspace) -> None:
    """A provider that the API lists twice is sent and priced once."""
    numbers = [833, 966, 833]
    waterfall = waterfall_json(available_enrichments=[{"id": number, "price": "0.5"} for number in numbers])
    made = build_template(workspace, waterfall=waterfall)
    assert (made.target.enrichments, made.worst_price) == ((833, 966), 1_000_000)


def test_provider_order_of_job(workspace: Workspace) -> None:
    """The job's order of providers is the order of the requests, so it is part of the fingerprint."""
    assert build_template(workspace, "enrichments: [966, 113, 833]\n").target.enrichments == (966, 113, 833)


def test_max_price(workspace: Workspace) -> None:
    """The maximum price, in millionths, is each provider's price and a verification of each result."""
    assert build_template(workspace).worst_price == 1_750_000
    assert build_template(workspace, "enrichments: [113]\n").worst_price == 3_000_000
    assert build_template(workspace, "email_verifier: 10\n").worst_price == 1_950_000


@pytest.mark.parametrize("price", [None, "free", "", -1, "nan"])
def test_unknown_price(workspace: Workspace, price: object) -> None:
    """With an unknown price a run without a cap may go on; a cap that can't be kept is refused."""
    waterfall = waterfall_json(available_enrichments=[{"id": 833, "price": "1"}, {"id": 966, "price": price}])
    made = build_template(workspace, waterfall=waterfall)
    assert made.worst_price is None
    assert make_budget(load_job(workspace.job_file), made, None).max_request_price == 0
    capped = load_job(workspace.write_job(f"{JOB}limits: {{max_credits: 5}}\n"))
    with pytest.raises(CommandRefused, match="has no price"):
        make_budget(capped, made, None)
    assert make_budget(capped, build_template(workspace), None).max_request_price == 1_750_000


def test_unlisted_provider_has_unknown_price(workspace: Workspace) -> None:
    """A provider that is no longer listed, known from the ledger's first run, has an unknown price."""
    assert build_template(workspace, providers=[833, 1]).worst_price is None


def test_required_params_and_emails(workspace: Workspace) -> None:
    """A param is an email by its type or by its name."""
    made = build_template(workspace)
    assert made.required_params == ("first_name", "last_name", "company")
    assert made.email_params == ("email", "second")


def test_default_result_columns(workspace: Workspace) -> None:
    """Each result field becomes a column; new column → field of the result."""
    assert build_template(workspace).columns == {"email": "email", "score": "score"}
    assert build_template(workspace, "columns: {work: email, city: person.city}\n").columns == {
        "work": "email",
        "city": "person.city",
    }


@pytest.mark.parametrize(
    ("more", "message", "hint"),
    [
        (
            "  compani: X\n",
            "8: params.compani: the waterfall `email_getter` has no param with this name",
            "did you mean `company`?",
        ),
        (
            "  zzz: X\n",
            "8: params.zzz: the waterfall `email_getter` has no param with this name",
            "known: first_name, last_name, company, email, second",
        ),
        (
            "enrichments:\n  - 833\n  - 5\n",
            "10: enrichments.1: `email_getter` has no provider 5",
            "it has 833 A, 113 Add-on, 966 B",
        ),
        ("enrichments: [833, 833]\n", "8: enrichments.1: provider 833 is set twice", "remove one of the two"),
        ("email_verifier: 9\n", "8: email_verifier: `email_getter` has no verifier 9", "it has 10 V"),
    ],
)
def test_unknown_names_are_reported(workspace: Workspace, more: str, message: str, hint: str) -> None:
    """Unknown names are reported with the job file's line and the valid names."""
    assert job_error(workspace, more) == (message, hint)


def test_unmapped_required_param(workspace: Workspace) -> None:
    """A required param without a column is an error before anything is sent."""
    known = {"name": "linkedin", "required": True}
    message, hint = job_error(
        workspace, waterfall=waterfall_json(input_params=[known, *waterfall_json().model_dump()["input_params"]])
    )
    assert message == "4: params: the waterfall `email_getter` requires `linkedin`"
    assert hint == "map it: linkedin: <a column of the input>"


def test_verifier_not_supported(workspace: Workspace) -> None:
    """A verifier is refused where none is supported: the API would ignore it, or charge for nothing."""
    message, _ = job_error(workspace, "email_verifier: 10\n", waterfall_json(is_email_verifying=False))
    assert message == "8: email_verifier: the waterfall `email_getter` verifies no e-mails"


def test_incomplete_waterfall_is_accepted(workspace: Workspace) -> None:
    """A waterfall without verifiers and defaults, as in older API documents, is accepted."""
    waterfall = Waterfall.model_validate({"identifier": "email_getter", "is_email_verifying": True})
    made = build_template(workspace, "enrichments: [1]\nemail_verifier: 2\ncolumns: {a: b}\n", waterfall)
    assert (made.target.enrichments, made.target.email_verifier, made.worst_price) == ((1,), 2, None)
    assert "set `enrichments`" in (job_error(workspace, "columns: {a: b}\n", waterfall)[1] or "")
    assert "set `columns`" in (job_error(workspace, "enrichments: [1]\n", waterfall)[1] or "")


def test_null_keys_are_optional() -> None:
    """Keys of the waterfall may be null, because the API's documents leave it open."""
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
    assert [User.model_validate({"workspace": name}).workspace for name in ("", " ", {"name": ""}, {})] == [None] * 4


def test_waterfall_json_roundtrip() -> None:
    """The ledger's stored JSON of a waterfall gives the same request template."""
    waterfall = waterfall_json()
    assert Waterfall.model_validate(waterfall.model_dump()) == waterfall
