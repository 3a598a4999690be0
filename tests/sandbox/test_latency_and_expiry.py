"""Task durations and expiry follow the sandbox's own clock, which can be advanced."""

from email.utils import parsedate_to_datetime
from statistics import median
from time import time

import pytest

from enrich.sandbox.settings import parse_latency
from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox, make_leads
from tests.support.cases import in_turn


def date_of(api: SandboxClient) -> float:
    """Return the time in the API's Date header."""
    return parsedate_to_datetime(api.http.get("/user/me").headers["date"]).timestamp()


def test_advance_completes_tasks(start: StartSandbox) -> None:
    """Advancing the clock completes tasks."""
    api = start(latency="fixed(3600)")
    task_id = api.submit()
    api.advance(3_590)
    assert api.task_body(task_id)["status"] == "processing"
    api.advance(11)
    assert api.task_body(task_id)["status"] == "completed"


def test_latency_is_deterministic_per_request(start: StartSandbox) -> None:
    """A task's duration is drawn from the settings and the same for the same request."""
    result = []
    for _ in range(2):
        api = start(latency="uniform(0,1000)")
        tasks = [api.submit(params) for params in make_leads(10)]
        api.advance(500)
        result.append([api.task_body(task_id)["status"] for task_id in tasks])
    assert result[0] == result[1]
    assert set(result[0]) == {"processing", "completed"}


def test_date_follows_the_clock(start: StartSandbox) -> None:
    """There is one Date header, which follows the clock and its offset."""
    api = start(date_offset=600.0)
    assert len(api.http.get("/user/me").headers.get_list("date")) == 1
    assert date_of(api) == pytest.approx(time() + 600, abs=3)
    api.advance(86_400)
    assert date_of(api) == pytest.approx(time() + 87_000, abs=3)


def test_expired(start: StartSandbox) -> None:
    """A result expires a fixed time after completion and is then a 410."""
    api = start(latency="fixed(1800)", result_ttl=3_600.0)
    task_id = api.submit()
    api.advance(1_800 + 3_590)
    assert api.task_body(task_id)["status"] == "completed"
    api.advance(20)
    assert (api.get_task(task_id).status_code, api.get_task(task_id).json()) == (
        410,
        {"detail": "Task data has expired"},
    )


def test_expired_task_with_status_gone(start: StartSandbox) -> None:
    """An expired task can be a 200 with the status `gone` and no data."""
    api = start(expired_as="gone")
    task_id = api.submit()
    api.advance(86_401)
    assert (api.task_body(task_id)["status"], api.task_body(task_id)["data"]) == ("gone", None)


def test_cancelled_tasks_expire(start: StartSandbox) -> None:
    """A cancelled task expires after the same time."""
    api = start(latency="fixed(100000)")
    task_id = api.submit()
    api.cancel(task_id)
    api.advance(86_401)
    assert api.get_task(task_id).status_code == 410


def test_expired_results_stay_charged(api: SandboxClient) -> None:
    """An expired result stays charged."""
    api.submit(ADA, enrichments=[833])
    api.advance(100_000)
    assert api.audit()["credits_charged"] == 0.5


@in_turn("text", ["", "fixed", "fixed(a)", "fixed(-1)", "uniform(2,1)", "lognormal(0,1)", "normal(1,1)"])
def test_unknown_latency(text: str) -> None:
    """An unknown distribution is an error that shows the valid forms."""
    with pytest.raises(ValueError, match="none of lognormal"):
        parse_latency(text)


def test_distributions() -> None:
    """The distributions have the median and the bounds in their names."""
    draws = [(number + 0.5) / 1_000 for number in range(1_000)]
    assert {parse_latency("fixed(2)")(draw) for draw in draws} == {2}
    assert median(map(parse_latency("lognormal(1.2, 0.6)"), draws)) == pytest.approx(1.2, rel=0.01)
    assert all(1 < parse_latency("uniform(1,3)")(draw) < 3 for draw in draws)
