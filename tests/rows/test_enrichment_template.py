"""A job matched with its enrichment: paths into lists, and prices that the API does not give."""

from __future__ import annotations

from typing import Any

import pytest

from enrich.databar.description import Enrichment
from enrich.errors import CommandRefused
from enrich.job.job import load_job
from enrich.rows.template import make_request_template, name_problems
from enrich.run.budget import make_budget
from tests.support.workspace import Workspace

JOB = """\
version: 1
input: leads.csv
enrichment: 64
params: {query: Query}
"""


def describe(**changes: Any) -> Enrichment:
    """Return an enrichment in the API's format."""
    described = {
        "id": 64,
        "price": 0.5,
        "params": [{"name": "query", "is_required": True}],
        "response_fields": [{"name": "title"}],
        "pricing": {"type": "fixed"},
        "pagination": {"supported": False},
    }
    return Enrichment.model_validate(described | changes)


def problems_of(workspace: Workspace, described: Enrichment, extra_yaml: str) -> list[str]:
    """Return the messages about the names in a job, without its file."""
    job = load_job(workspace.write_job(JOB + extra_yaml))
    found = name_problems(job, described)
    return [problem.message.removeprefix(f"{workspace.job_file}:") for problem in found]


def test_rows_of_a_list_at_a_fixed_price(workspace: Workspace) -> None:
    """Whether an answer is a list does not depend on its price: each row can be a column."""
    assert problems_of(workspace, describe(), "columns: {first: title, second: 1.title}\n") == []
    for wrong in ("1.titel", "\N{ARABIC-INDIC DIGIT ONE}.title"):
        problems = problems_of(workspace, describe(), f"columns: {{second: {wrong}}}\n")
        assert problems == [f"5: columns.second: the enrichment `64` has no field `{wrong}`"]


@pytest.mark.parametrize("limits", ["", "limits: {max_credits: 5}\n"])
def test_growing_price_that_is_not_known(workspace: Workspace, limits: str) -> None:
    """Where each page costs and the API gives no price, no cap helps, and none is asked for."""
    described = describe(pagination={"supported": True}, pricing={"type": "per_row"})
    (message,) = problems_of(workspace, described, limits)
    assert message == (
        "3: enrichment: the price of the enrichment `64` grows with each page, and the API does not give it: "
        "the cost cannot be limited"
    )


def test_unknown_price_with_a_cap(workspace: Workspace) -> None:
    """An enrichment has no providers that the job could leave out."""
    job = load_job(workspace.write_job(f"{JOB}limits: {{max_credits: 5}}\n"))
    template = make_request_template(job, describe(price=None), [])
    with pytest.raises(CommandRefused) as caught:
        make_budget(job, template, None)
    assert caught.value.message == "the enrichment `64` has no price, so `max_credits` cannot be enforced"
    assert caught.value.hint == "run without `max_credits`"


def test_price_in_words() -> None:
    """A price that depends on something unknown is not given as if it were fixed."""
    assert describe().price_text == "0.5 credits"
    assert describe(pricing={"type": "per_row"}).price_text == "price unknown"
    assert describe(pagination={"supported": True}).price_text == "0.5 credits for each page"
