"""Each fault looks to the client as in reality, and the audit shows whether the request was charged."""

import json
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest

from enrich.sandbox.faults import FaultInjector
from enrich.sandbox.settings import FAULT_KINDS, Fault
from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox, make_leads
from tests.support.cases import in_turn
from tests.support.workspace import wait_until

ResponseCheck = Callable[[httpx.Response], bool]


def is_html(response: httpx.Response) -> bool:
    """Return whether the response is an HTML page."""
    return response.text.startswith("<!doctype html>") and response.headers["content-type"].startswith("text/html")


FAULTS_BEFORE_ACCEPTANCE: list[tuple[str, dict[str, Any], int, ResponseCheck]] = [
    ("rate-limit", {}, 429, lambda r: r.headers["retry-after"] == "1"),
    ("rate-limit", {"retry_after": 7}, 429, lambda r: r.headers["retry-after"] == "7"),
    ("rate-limit-bare", {}, 429, lambda r: "retry-after" not in r.headers),
    ("error-before", {}, 500, lambda r: "detail" in r.json()),
    ("error-before-502", {}, 502, lambda r: "detail" in r.json()),
    ("error-before", {"status": 504}, 504, lambda r: "detail" in r.json()),
    ("html", {}, 502, is_html),
    ("html", {"status": 503}, 503, is_html),
    ("redirect", {}, 307, lambda r: r.headers["location"].startswith("http://elsewhere.example/v1/waterfalls/")),
    ("redirect", {"location": "/v2"}, 307, lambda r: r.headers["location"] == "/v2"),
    ("unauthorized", {}, 401, lambda r: r.json() == {"detail": "Unauthorized"}),
    ("forbidden", {}, 403, lambda r: r.json() == {"detail": "Forbidden"}),
    ("no-credits", {}, 406, lambda r: "credits" in r.json()["detail"]),
]

FAULTS_AFTER_ACCEPTANCE: list[tuple[str, int, ResponseCheck]] = [
    ("error-after", 500, lambda r: "detail" in r.json()),
    ("error-after-503", 503, lambda r: "detail" in r.json()),
    ("html-200", 200, is_html),
    ("broken-json", 200, lambda r: r.text.startswith('{"task_id"') and not r.text.endswith("}")),
    ("wrong-json", 200, lambda r: isinstance(r.json(), list)),
    ("no-task-id", 200, lambda r: r.json() == {"status": "created"}),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "params", "status", "see"), FAULTS_BEFORE_ACCEPTANCE)
def test_fault_before_acceptance(
    api: SandboxClient, name: str, params: dict[str, Any], status: int, see: ResponseCheck
) -> None:
    """The client sees the fault once; nothing was accepted, and the next request works."""
    api.inject_fault(name, **params)
    response = api.post_run()
    assert (response.status_code, see(response)) == (status, True)
    assert api.audit()["accepted"] == 0
    assert api.post_run().status_code == 200


@pytest.mark.parametrize(("name", "status", "see"), FAULTS_AFTER_ACCEPTANCE)
def test_fault_after_acceptance(api: SandboxClient, name: str, status: int, see: ResponseCheck) -> None:
    """The client sees a spoiled response, but the run was accepted and charged."""
    api.inject_fault(name)
    response = api.post_run()
    assert (response.status_code, see(response)) == (status, True)
    totals = api.audit()
    assert (totals["accepted"], totals["runs"][0]["charged"], totals["credits_charged"] > 0) == (1, 1, True)
    assert api.task_body(totals["runs"][0]["task_ids"][0])["status"] == "completed"


def test_rate_limit_with_a_date(start: StartSandbox) -> None:
    """Retry-After can be a date by the clock of the Date header."""
    api = start(date_offset=-3_600.0)
    api.inject_fault("rate-limit-date", retry_after=5)
    headers = api.post_run().headers
    wait = parsedate_to_datetime(headers["retry-after"]) - parsedate_to_datetime(headers["date"])
    assert 4 <= wait.total_seconds() <= 6


@pytest.mark.parametrize(("name", "accepted"), [("reset-before", 0), ("reset-after", 1)])
def test_reset(api: SandboxClient, name: str, accepted: int) -> None:
    """The connection is reset without a response, before or after the run was accepted."""
    api.inject_fault(name)
    with pytest.raises((httpx.ReadError, httpx.WriteError), match="reset"):
        api.post_run()
    assert api.audit()["accepted"] == accepted


@pytest.mark.parametrize(("name", "accepted"), [("silence-before", 0), ("silence-after", 1)])
def test_silence(api: SandboxClient, name: str, accepted: int) -> None:
    """No response comes until the client gives up, before or after the run was accepted."""
    api.inject_fault(name)
    api.http.timeout = httpx.Timeout(0.2)
    with pytest.raises(httpx.ReadTimeout):
        api.post_run()
    api.http.timeout = httpx.Timeout(5)
    assert api.audit()["accepted"] == accepted


def test_silence_ends_with_reset(api: SandboxClient) -> None:
    """A silent request is reset in the end, for clients without a timeout."""
    api.inject_fault("silence-before", seconds=0.1)
    with pytest.raises(httpx.ReadError):
        api.post_run()


def test_slow(api: SandboxClient) -> None:
    """The right response comes late."""
    api.inject_fault("slow", seconds=0.2)
    start = time.monotonic()
    assert api.post_run().status_code == 200
    assert time.monotonic() - start >= 0.2


@pytest.mark.long
def test_slow_run_is_accepted_after_client_timeout(api: SandboxClient) -> None:
    """A run is accepted after the client's timeout: repeating such a POST would pay twice."""
    api.inject_fault("slow", seconds=2)
    with pytest.raises(httpx.ReadTimeout):
        api.http.post("/waterfalls/email_getter/run", json={"params": ADA, "enrichments": [833]}, timeout=0.3)
    assert api.audit()["accepted"] == 0
    wait_until(lambda: api.audit()["accepted"] == 1)


def test_lost_task(api: SandboxClient) -> None:
    """An accepted run was charged, but its task stays unknown."""
    api.inject_fault("lost-task")
    task_id = api.submit()
    assert api.get_task(task_id).status_code == 404
    api.advance(3_600)
    assert api.get_task(task_id).status_code == 404
    assert api.audit()["credits_charged"] > 0


def test_late_task(api: SandboxClient) -> None:
    """An accepted run's task is unknown at first."""
    api.inject_fault("late-task", seconds=30)
    task_id = api.submit()
    assert api.get_task(task_id).status_code == 404
    api.advance(31)
    assert api.task_body(task_id)["status"] == "completed"


def test_flickering_task_returns(api: SandboxClient) -> None:
    """A known task is unknown for a while, then known again with its answer."""
    api.inject_fault("flickering-task", seconds=30)
    task_id = api.submit()
    assert [api.get_task(task_id).status_code for _ in range(6)] == [404] * 6
    api.advance(31)
    assert api.task_body(task_id)["status"] == "completed"


def test_task_flickers_after_first_poll(start: StartSandbox) -> None:
    """The first poll finds the task running, the next ones don't find it."""
    api = start(latency="fixed(60)")
    api.inject_fault("flickering-task", seconds=10)
    task_id = api.submit()
    assert [api.get_task(task_id).status_code for _ in range(3)] == [200, 404, 404]
    api.advance(11)
    assert api.task_body(task_id)["status"] == "processing"


@pytest.mark.parametrize("status", [201, 202, 203])
def test_other_success(api: SandboxClient, status: int) -> None:
    """An accepted run has the usual response with another 2xx status."""
    api.inject_fault("other-success", status=status)
    response = api.post_run()
    assert response.status_code == status
    assert api.task_body(response.json()["task_id"])["status"] == "completed"


@pytest.mark.parametrize("credits_", ["many", -5, 1e300, "NaN"])
def test_odd_credits(api: SandboxClient, credits_: float | str) -> None:
    """The task's price is invalid, and the rest of its body is right."""
    task_id = api.submit()
    right = api.task_body(task_id)
    api.inject_fault("odd-credits", credits=credits_)
    body = json.loads(api.get_task(task_id).text, parse_constant=str)
    assert body == right | {"credits_spent": credits_}


def test_invalid_utf8(api: SandboxClient) -> None:
    """A body contains bytes that are not UTF-8, and is otherwise complete."""
    task_id = api.submit()
    right = api.task_body(task_id)
    api.inject_fault("invalid-utf8")
    body = api.get_task(task_id).content
    with pytest.raises(UnicodeDecodeError):
        body.decode()
    task = json.loads(body.decode(errors="replace"))
    assert task.pop("note")
    assert task == right


@pytest.mark.parametrize("scope", ["post", "get"])
def test_long_id(api: SandboxClient, scope: str) -> None:
    """A task id is far too long; the API itself uses another one."""
    task_id = api.submit() if scope == "get" else ""
    api.inject_fault("long-id", scope=scope)
    response = api.get_task(task_id) if scope == "get" else api.post_run()
    assert {len(value) for name, value in response.json().items() if name.endswith("_id")} == {600}
    (run,) = api.audit()["runs"]
    assert len(run["task_ids"][0]) == 36


def test_deep_json(api: SandboxClient) -> None:
    """Lists are nested deeper than parsers can read."""
    task_id = api.submit()
    api.inject_fault("deep-json")
    body = api.get_task(task_id).content
    assert (body.count(b"["), body.count(b"]")) >= (100_000, 100_000)
    with pytest.raises(RecursionError):
        json.loads(body)


@pytest.mark.long
@pytest.mark.parametrize("shape", ["wrapped", "wrapper_object", "flat"])
def test_many_steps(start: StartSandbox, shape: str) -> None:
    """The list of steps is extremely long, and the result is still there."""
    api = start(shape=shape)
    task_id = api.submit()
    right = api.task_body(task_id)
    api.inject_fault("many-steps", steps=5_000)
    response = api.get_task(task_id)
    assert response.text.count('"Spare"') == 5_000
    assert "email" in response.text
    assert response.json()["credits_spent"] == right["credits_spent"]


def test_gzip_bomb(api: SandboxClient) -> None:
    """A small response becomes large when it is decompressed."""
    task_id = api.submit()
    right = api.task_body(task_id)
    api.inject_fault("gzip-bomb", mebibytes=8)
    response = api.get_task(task_id)
    assert int(response.headers["content-length"]) < 100_000
    assert len(response.content) > 8 * 2**20
    assert response.json() == right


@pytest.mark.parametrize(("seconds", "age"), [(7_200, 0), (-7_200, 0), (86_400, 600)])
def test_wrong_date(start: StartSandbox, seconds: int, age: int) -> None:
    """A response has a wrong date, and an old one has its age; the next one is right."""
    api = start(date_offset=60.0)
    api.inject_fault("wrong-date", seconds=seconds, age=age)
    wrong, right = api.post_run().headers, api.post_run().headers
    off = parsedate_to_datetime(wrong["date"]) - parsedate_to_datetime(right["date"])
    assert abs(off.total_seconds() - seconds) < 30
    assert len(wrong.get_list("date")) == 1
    assert (wrong.get("age"), right.get("age")) == (str(age) if age else None, None)


def test_odd_status(api: SandboxClient) -> None:
    """A task has unknown statuses first, then completes."""
    api.inject_fault("odd-status", polls=3)
    task_id = api.submit()
    statuses = [api.task_body(task_id)["status"] for _ in range(4)]
    assert "verifying" in statuses[:3]
    assert not {"processing", "completed", "failed"} & set(statuses[:3])
    assert statuses[3] == "completed"


def test_unavailable(api: SandboxClient) -> None:
    """For a while every request is a 503; the control endpoints still work."""
    task_id = api.submit()
    api.inject_fault("unavailable", seconds=60)
    assert [api.post_run().status_code, api.get_task(task_id).status_code] == [503, 503]
    assert httpx.get(f"{api.root}/health", trust_env=False).status_code == 503
    api.advance(61)
    assert api.get_task(task_id).status_code == 200
    assert api.audit()["accepted"] == 1


def test_after_faults_leave_refusals_alone(api: SandboxClient) -> None:
    """An after-fault leaves a refused request's response as it is, because nothing is in doubt then."""
    api.inject_fault("error-after")
    assert api.post_run({}).status_code == 400


def test_get_scope(api: SandboxClient) -> None:
    """A fault with the scope `get` waits for the poll of a task."""
    task_id = api.submit()
    api.inject_fault("broken-json", scope="get")
    assert api.post_run().status_code == 200
    assert not api.get_task(task_id).text.endswith("}")
    assert api.task_body(task_id)["status"] == "completed"


def test_default_scope_of_charged_faults_is_run(api: SandboxClient) -> None:
    """Faults that can cost money apply to runs by default, single and bulk."""
    task_id = api.submit()
    api.inject_fault("error-after", times=2)
    assert (api.get_task(task_id).status_code, api.http.get("/user/me").status_code) == (200, 200)
    assert (api.post_run().status_code, api.post_bulk([ADA]).status_code) == (500, 500)


def test_fault_for_next_n_requests(api: SandboxClient) -> None:
    """A chosen fault applies to the next N requests; the list shows how many are left and how many happened."""
    api.inject_fault("error-before", times=2, scope="me")
    assert api.http.get(f"{api.root}/__faults").json() == {"chosen": ["error-before"] * 2, "happened": {}}
    assert [api.http.get("/user/me").status_code for _ in range(3)] == [500, 500, 200]
    assert api.audit()["faults"] == {"error-before": 2}
    assert api.audit()["requests"] == {"me": 3, "500": 2}


@pytest.mark.long
def test_faults_are_drawn_by_seed(start: StartSandbox) -> None:
    """The fault seed decides which requests get a fault, whatever other requests come between."""

    def statuses(*, polls: bool, **settings: Any) -> list[int]:
        api = start(faults=(Fault("error-after", 0.4),), **settings)
        codes = []
        for params in make_leads(20):
            codes.append(api.post_run(params).status_code)
            if polls:
                api.balance()
        return codes

    once = statuses(polls=False)
    assert 3 < once.count(500) < 17
    assert statuses(polls=True) == once
    assert statuses(polls=False, fault_seed=2) != once


def test_clear_faults(start: StartSandbox) -> None:
    """Clearing ends chosen faults, fault probabilities and unavailability."""
    api = start(faults=(Fault("forbidden", 1.0),))
    assert api.post_run().status_code == 403
    api.inject_fault("unavailable", seconds=60)
    assert api.post_run().status_code == 503
    api.inject_fault("html", times=5)
    answer = api.http.post(f"{api.root}/__faults", json={"clear": True}).json()
    assert answer["chosen"] == []
    assert api.post_run().status_code == 200


@in_turn(
    ("text", "fault"),
    [
        ("html=0.5", Fault("html", 0.5, "all")),
        ("get:reset-after=0.02", Fault("reset-after", 0.02, "get")),
        ("post:slow=1,seconds=0.5", Fault("slow", 1.0, "post", {"seconds": 0.5})),
        ("error-after-503=0.1", Fault("error-after", 0.1, "post", {"status": 503})),
    ],
)
def test_fault_syntax(text: str, fault: Fault) -> None:
    """A fault is written as scope, name, probability and params."""
    assert Fault.parse(text) == fault


@in_turn(
    "text",
    [
        *("html", "html=x", "html=2", "quake=1", "run:html=1", "html=1,colour=red", "html=1,status"),
        *("get:lost-task=1", "slow=1,seconds=x", "slow=1,seconds=nan"),
    ],
)
def test_invalid_fault_syntax(text: str) -> None:
    """Text that is no fault is an error."""
    with pytest.raises(ValueError, match=r"."):
        Fault.parse(text)


def test_unknown_fault_name_at_runtime(api: SandboxClient) -> None:
    """An unknown fault is refused at runtime with a list of the valid names."""
    answer = api.http.post(f"{api.root}/__faults", json={"name": "quake"})
    assert answer.status_code == 422
    assert all(name in answer.json()["detail"] for name in FAULT_KINDS)


def test_fault_rate_matches_probability() -> None:
    """A fault happens about as often as its probability."""
    faults = FaultInjector([Fault("html", 0.1)], 1)
    assert 60 < sum(faults.draw("me") is not None for _ in range(1_000)) < 140


def test_rate_and_burst_limit(start: StartSandbox) -> None:
    """Beyond rate and burst the response is 429, and nothing is accepted."""
    api = start(rate=0.001, burst=3, retry_after=9)
    answers = [api.post_run() for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["retry-after"] == "9"
    totals = api.audit()
    assert (totals["accepted"], totals["requests"]["429"]) == (3, 2)


@pytest.mark.long
def test_rate_refills(start: StartSandbox) -> None:
    """After a while the rate allows requests again; the 429 may come without Retry-After."""
    api = start(rate=0.5, burst=1, retry_after=None)
    assert [api.post_run().status_code, api.post_run().status_code] == [200, 429]
    assert "retry-after" not in api.post_run().headers
    wait_until(lambda: api.post_run().status_code == 200)
