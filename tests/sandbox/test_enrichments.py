"""Enrichments and flows are listed, described, run and charged as the API's documents say."""

from typing import Any

import pytest

from tests.sandbox.conftest import SandboxClient, StartSandbox

EMAIL = {"email": "ada.byron@engine.example"}
PEOPLE = {"company_website": "engine.example", "limit": "4"}
ROWS = {10: EMAIL, 12: EMAIL, 60: PEOPLE, 70: {"query": "bakery"}, 80: {"phone": "+1-202-555-0123"}}


def submit(api: SandboxClient, number: int, params: Any, **body: Any) -> str:
    """Run an enrichment that must be accepted; return its task id."""
    response = api.http.post(f"/enrichments/{number}/run", json={"params": params, **body})
    assert (response.status_code, response.json().get("status")) == (200, "processing"), response.text
    return str(response.json()["task_id"])


def test_list_has_summaries(api: SandboxClient) -> None:
    """The list is plain and brief; with `page` it is an envelope; `q` searches, with three characters or more."""
    listed = api.http.get("/enrichments/").json()
    assert {each["id"] for each in listed} == set(ROWS)
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


@pytest.mark.parametrize("number", sorted(ROWS))
def test_every_enrichment_runs(api: SandboxClient, number: int) -> None:
    """A run of each enrichment answers with all of its fields, without steps."""
    described = api.http.get(f"/enrichments/{number}").json()
    data = api.task_body(submit(api, number, ROWS[number]))["data"]
    assert {tuple(row) for row in data} == {tuple(field["name"] for field in described["response_fields"])}
    [entry] = api.audit()["runs"]
    assert (entry["enrichment"], entry["params"]) == (number, ROWS[number])


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
