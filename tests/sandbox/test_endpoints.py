"""The endpoints as the API documents them: waterfalls, enrichments, tasks, the account."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from enrich.sandbox import SandboxSettings
from enrich.sandbox.server import serve_in_thread
from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox

# Each endpoint responds as the API's documents describe

WATERFALLS = {
    "email_getter",
    "person_getter",
    "phone_getter",
    "company_lookup",
    "person_by_link",
    "job_postings_getter",
}
ROWS = {
    "email_getter": ADA,
    "person_getter": {"email": "ada.byron@engine.example"},
    "phone_getter": {"linkedin": "https://linkedin.example/in/ada-byron"},
    "company_lookup": {"company_website": "https://www.engine.example/about"},
    "person_by_link": {"link": "https://linkedin.example/in/ada-byron"},
    "job_postings_getter": {"company_website": "engine.example"},
}


def test_health(api: SandboxClient) -> None:
    """The health endpoint needs no key."""
    response = httpx.get(f"{api.root}/health", trust_env=False)
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_lists_waterfalls(api: SandboxClient) -> None:
    """The list shows each waterfall as its own endpoint does."""
    listed = api.http.get("/waterfalls/").json()
    assert {waterfall["identifier"] for waterfall in listed} == WATERFALLS
    for waterfall in listed:
        assert api.http.get(f"/waterfalls/{waterfall['identifier']}").json() == waterfall


def test_describes_a_waterfall(api: SandboxClient) -> None:
    """A waterfall has params, output fields, priced providers and verifiers; prices are numbers or texts."""
    email = api.http.get("/waterfalls/email_getter").json()
    assert [param["name"] for param in email["input_params"] if param["required"]] == [*ADA]
    assert email["output_fields"] == [{"name": "email", "label": "Email", "type": "text"}]
    assert email["is_email_verifying"]
    assert {"id": 10, "price": "0.01"}.items() <= email["email_verifiers"][0].items()
    assert {833, 966} <= {provider["id"] for provider in email["available_enrichments"]}
    assert isinstance(email["available_enrichments"][0]["price"], float)
    person = api.http.get("/waterfalls/person_getter").json()
    assert person["available_enrichments"][0]["price"] == "0.5"
    assert (person["is_email_verifying"], person["email_verifiers"]) == (False, [])


def test_waterfalls_have_three_providers(api: SandboxClient) -> None:
    """Each waterfall has three or more providers, one of them off by default."""
    for waterfall in api.http.get("/waterfalls/").json():
        enabled = [provider["enabled_by_default"] for provider in waterfall["available_enrichments"]]
        assert (len(enabled) >= 3, enabled.count(False)) == (True, 1)


@pytest.mark.parametrize("waterfall", sorted(WATERFALLS))
def test_every_waterfall_runs(api: SandboxClient, waterfall: str) -> None:
    """A run of each waterfall returns all of its output fields."""
    fields = [field["name"] for field in api.http.get(f"/waterfalls/{waterfall}").json()["output_fields"]]
    result = api.task_body(api.submit(ROWS[waterfall], waterfall))["data"][0]["result"]
    assert list(result) == fields
    assert all(result.values())


def test_run_returns_created_task(api: SandboxClient) -> None:
    """A run returns only its task id and the status `created`."""
    body = api.post_run(ADA, enrichments=[833, 966], email_verifier=10).json()
    assert body.keys() == {"task_id", "status"}
    assert body["status"] == "created"
    assert str(UUID(body["task_id"])) == body["task_id"]


def test_task_has_deprecated_request_id(api: SandboxClient) -> None:
    """A task has `task_id` and the deprecated `request_id`; a single one has no progress."""
    task_id = api.submit()
    task = api.task_body(task_id)
    assert (task["task_id"], task["request_id"]) == (task_id, task_id)
    assert "progress" not in task


def test_user(api: SandboxClient) -> None:
    """The user has a balance, a plan and a workspace."""
    user = api.http.get("/user/me").json()
    assert user.keys() == {"first_name", "email", "balance", "plan", "workspace"}
    assert user["balance"] == 10_000


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("/waterfalls", "/waterfalls/"),
        ("/waterfalls/email_getter/", "/waterfalls/email_getter"),
        ("/user/me/", "/user/me"),
    ],
)
def test_wrong_trailing_slash_redirects(api: SandboxClient, wrong: str, right: str) -> None:
    """A path with the wrong trailing slash redirects with 307 to the right one."""
    response = api.http.get(wrong)
    assert (response.status_code, response.headers["location"]) == (307, api.base_url + right)


def test_redirected_run_is_not_accepted(api: SandboxClient) -> None:
    """A run posted to the wrong path is redirected and not accepted."""
    assert api.http.post("/waterfalls/email_getter/run/", json={"params": ADA}).status_code == 307
    assert api.audit()["accepted"] == 0


def test_cancels_a_running_task(start: StartSandbox) -> None:
    """Cancelling refunds a running task, marks it as cancelled, and works once."""
    api = start(latency="fixed(60)")
    task_id = api.submit(enrichments=[833, 966])
    assert api.balance() == 9998.5
    answer = api.cancel(task_id)
    assert (answer.status_code, answer.json()["status"], answer.json()["credits_spent"]) == (200, "cancelled", 0)
    assert api.balance() == 10_000
    assert api.task_body(task_id)["status"] == "cancelled"
    again = api.cancel(task_id)
    assert (again.status_code, again.json()) == (409, {"detail": "Task has already finished"})
    assert api.audit()["runs"][0]["charged"] == 0
    api.advance(120)
    assert api.task_body(task_id)["status"] == "cancelled"
    assert api.balance() == 10_000


def test_does_not_cancel_a_finished_task(api: SandboxClient) -> None:
    """Cancelling a finished task is a 409 and changes nothing."""
    task_id = api.submit()
    before = api.task_body(task_id)
    answer = api.cancel(task_id)
    assert (answer.status_code, answer.json()) == (409, {"detail": "Task has already finished"})
    assert api.task_body(task_id) == before


def test_responses_have_no_nagle_delay(api: SandboxClient) -> None:
    """Responses on one connection are not delayed by 40 ms each (Nagle's algorithm)."""
    task_id = api.submit()
    times = [time.monotonic()]
    for _ in range(50):
        api.task_body(task_id)
        times.append(time.monotonic())
    assert min(end - start for start, end in pairwise(times)) < 0.04


def test_changed_price_is_charged(tmp_path: Path) -> None:
    """A changed price is shown and charged at once, even after a restart."""
    settings = SandboxSettings(latency="fixed(0)", hit_rate=1.0, failure_rate=0.0)
    with serve_in_thread(tmp_path / "state.db", settings) as first:
        switch = first.base_url.removesuffix("/v1") + "/__prices"
        httpx.post(switch, json={"prices": {833: 4.5}}, trust_env=False).raise_for_status()
    with serve_in_thread(tmp_path / "state.db", settings) as second:
        api = SandboxClient(second.base_url, second.api_key)
        offered = api.http.get("/waterfalls/email_getter").json()["available_enrichments"]
        assert [provider["price"] for provider in offered[:2]] == [4.5, 1.0]
        api.http.post("/waterfalls/email_getter/run", json={"params": ADA, "enrichments": [833]})
        assert api.audit()["credits_charged"] == 4.5
        api.http.close()


# Enrichments and flows are listed, described, run and charged as the API's documents say

EMAIL = {"email": "ada.byron@engine.example"}
PEOPLE = {"company_website": "engine.example", "limit": "4"}
ENRICHMENT_ROWS = {10: EMAIL, 12: EMAIL, 60: PEOPLE, 70: {"query": "bakery"}, 80: {"phone": "+1-202-555-0123"}}


def submit(api: SandboxClient, number: int, params: Any, **body: Any) -> str:
    """Run an enrichment that must be accepted; return its task id."""
    response = api.http.post(f"/enrichments/{number}/run", json={"params": params, **body})
    assert (response.status_code, response.json().get("status")) == (200, "processing"), response.text
    return str(response.json()["task_id"])


def test_list_has_summaries(api: SandboxClient) -> None:
    """The list is plain and brief; with `page` it is an envelope; `q` searches, with three characters or more."""
    listed = api.http.get("/enrichments/").json()
    assert {each["id"] for each in listed} == set(ENRICHMENT_ROWS)
    assert "params" not in listed[0]
    page = api.http.get("/enrichments/", params={"page": 2, "limit": 3}).json()
    assert (page["items"], page["has_next_page"], page["total_count"]) == (listed[3:], False, len(listed))
    assert [each["id"] for each in api.http.get("/enrichments/", params={"q": "phone"}).json()] == [80]
    assert api.http.get("/enrichments/", params={"q": "ph"}).status_code == 422


def test_describes_an_enrichment(api: SandboxClient) -> None:
    """An enrichment has params with choices, response fields, pricing and pagination."""
    people = api.http.get("/enrichments/60").json()
    assert people["pricing"] == {"type": "per_parameter", "parameter": "limit"}
    assert [param["name"] for param in people["params"] if param["is_required"]] == ["company_website", "limit"]
    assert people["params"][2]["choices"]["items"][0] == {"id": "entry", "name": "entry"}
    assert api.http.get("/enrichments/70").json()["pagination"] == {"supported": True, "per_page": 10}
    assert api.http.get("/enrichments/99").status_code == 404


@pytest.mark.parametrize("number", sorted(ENRICHMENT_ROWS))
def test_every_enrichment_runs(api: SandboxClient, number: int) -> None:
    """A run of each enrichment answers with all of its fields, without steps."""
    described = api.http.get(f"/enrichments/{number}").json()
    data = api.task_body(submit(api, number, ENRICHMENT_ROWS[number]))["data"]
    assert {tuple(row) for row in data} == {tuple(field["name"] for field in described["response_fields"])}
    [entry] = api.audit()["runs"]
    assert (entry["enrichment"], entry["params"]) == (number, ENRICHMENT_ROWS[number])


def test_price_per_parameter_and_page(api: SandboxClient) -> None:
    """The price is multiplied with the param, or with the pages; so many rows come."""
    people = api.task_body(submit(api, 60, PEOPLE))
    assert (len(people["data"]), people["credits_spent"]) == (4, 0.6)
    places = api.task_body(submit(api, 70, {"query": "bakery"}, pagination={"pages": 3}))
    assert (len(places["data"]), places["credits_spent"]) == (30, 3.0)
    assert api.task_body(submit(api, 70, {"query": "bakery"}))["credits_spent"] == 1.0
    assert api.audit()["credits_charged"] == 4.6


@pytest.mark.parametrize(
    ("number", "body", "named"),
    [
        (10, {"params": {}}, "email"),
        (60, {"params": {**PEOPLE, "limit": "many"}}, "limit"),
        (60, {"params": {**PEOPLE, "seniority": "boss"}}, "seniority"),
        (10, {"params": EMAIL, "pagination": {"pages": 2}}, "pagination"),
    ],
)
def test_refuses_wrong_params(api: SandboxClient, number: int, body: Any, named: str) -> None:
    """Missing params, other choices, a price without a number and pages where there are none are refused."""
    response = api.http.post(f"/enrichments/{number}/run", json=body)
    assert response.status_code == 400
    assert named in response.text
    assert api.audit()["accepted"] == 0


def test_pages_are_bounded(api: SandboxClient) -> None:
    """1 to 100 pages are allowed."""
    for pages in (0, 101):
        body = {"params": {"query": "bakery"}, "pagination": {"pages": pages}}
        assert api.http.post("/enrichments/70/run", json=body).status_code == 422


def test_bulk_is_aligned(start: StartSandbox) -> None:
    """A bulk run answers along its rows, null where nothing was found."""
    api = start(hit_rate=0.5, seed=3)
    rows = [{"phone": f"+1-202-555-01{number:02}"} for number in range(20)]
    response = api.http.post("/enrichments/80/bulk-run", json={"params": rows})
    data = api.task_body(response.json()["task_id"])["data"]
    assert len(data) == len(rows)
    assert [row["phone"] for row in data if row] == [sent["phone"] for sent, row in zip(rows, data, strict=True) if row]
    assert 0 < data.count(None) < len(rows)


def test_cancel_refunds(start: StartSandbox) -> None:
    """A cancelled run is refunded whole, and the audit counts it."""
    api = start(latency="fixed(60)")
    task_id = submit(api, 70, {"query": "bakery"}, pagination={"pages": 5})
    assert api.balance() == 9_995
    assert api.cancel(task_id).json()["status"] == "cancelled"
    totals = api.audit()
    assert (api.balance(), totals["refunded"], totals["charged"]) == (10_000, 1, 0)


def test_real_prices(start: StartSandbox) -> None:
    """The prices can be of the real API's order: 3 to 35 credits for a company, an email, a phone."""
    api = start(prices="real")
    spans = {"company_lookup": (3, 15), "email_getter": (4, 6), "phone_getter": (7, 35)}
    for name, (lowest, highest) in spans.items():
        offered = api.http.get(f"/waterfalls/{name}").json()["available_enrichments"]
        prices = [float(provider["price"]) for provider in offered]
        assert (min(prices), max(prices)) == (lowest, highest)
    api.http.post(f"{api.root}/__prices", json={"prices": {510: 8}})
    assert api.http.get("/waterfalls/phone_getter").json()["available_enrichments"][0]["price"] == 8


def test_flows_are_listed_and_described(api: SandboxClient) -> None:
    """A flow has typed inputs; one of them has its graph, too."""
    listed = api.http.get("/flows").json()
    assert {field["type"] for flow in listed for field in flow["inputs"]} == {"text"}
    detail = api.http.get(f"/flows/{listed[0]['id']}").json()
    assert listed[0].items() <= detail.items()
    assert "config" in detail
    assert api.http.get("/flows/nothing").status_code == 404
