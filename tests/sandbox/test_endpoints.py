"""Each endpoint responds as the API's documents describe."""

import time
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from enrich.sandbox import SandboxSettings
from enrich.sandbox.server import serve_in_thread
from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox

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
