"""Open tasks are collected before anything refuses a run, and expire only when that is certain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from pydantic import SecretStr

from enrich.databar.clock import CLOCK_SAMPLE_SPREAD_MS, CLOCK_SAMPLES, SystemClock
from enrich.databar.environment import ApiAccess
from enrich.ledger.verify import check_ledger
from enrich.models import State
from enrich.run import phases, poller
from enrich.run.context import RunOptions
from tests.support.cases import first_quick
from tests.support.raw_server import Reply, http_reply, serve_replies
from tests.support.scripted_api import (
    TIMEOUTS,
    WATERFALL,
    ScriptedApi,
    completed_reply,
    request_states,
    run_once,
    running_reply,
)
from tests.support.workspace import Workspace, make_leads


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll again soon after a response that does not count."""
    monkeypatch.setattr(poller, "FAILED_POLL_S", 0.1)


def submit_and_leave(workspace: Workspace, scripted_api: ScriptedApi, base_url: str, leads: int = 3) -> None:
    """Submit some leads, and end the run while all tasks are running."""
    workspace.write_leads(make_leads(leads))
    scripted_api.task = running_reply
    workspace.write_job(policy="{patience: 1s}")
    assert run_once(workspace, base_url).exit_code == 13
    assert request_states(workspace) == ["submitted"] * leads
    workspace.write_job()
    scripted_api.task = completed_reply
    scripted_api.clear_requests()


REFUSALS: dict[str, tuple[Callable[[ScriptedApi, Workspace], object], int]] = {
    "the waterfall is gone": (lambda api, _: setattr(api, "waterfall", http_reply(404, {"detail": "no"})), 2),
    "the waterfall is another": (
        lambda api, _: setattr(api, "waterfall", http_reply(200, WATERFALL | {"identifier": "phone_getter"})),
        4,
    ),
    "the waterfall wants more": (
        lambda api, _: setattr(
            api, "waterfall", http_reply(200, WATERFALL | {"input_params": [{"name": "age", "required": True}]})
        ),
        2,
    ),
    "the account is unknown": (lambda api, _: setattr(api, "user", http_reply(404, {"detail": "no"})), 2),
    "the account is no JSON": (lambda api, _: setattr(api, "user", http_reply(200, b"<html>")), 4),
    "the account fails": (lambda api, _: setattr(api, "user", http_reply(500, {"detail": "no"})), 4),
    "the account is a list": (lambda api, _: setattr(api, "user", http_reply(200, [1])), 4),
    "the workspace is another": (
        lambda api, _: setattr(api, "user", http_reply(200, {"balance": 1, "workspace": "theirs"})),
        2,
    ),
    "the input is broken": (lambda _, workspace: (workspace.folder / "leads.csv").write_bytes(b"\xff\xfe\x00"), 5),
    "the input is missing": (lambda _, workspace: (workspace.folder / "leads.csv").unlink(), 5),
    "`changes` and `input` are the same file": (
        lambda _, workspace: workspace.write_job(changes="{path: leads.csv, key: [Email]}"),
        2,
    ),
    "a rescue file is damaged": (
        lambda _, workspace: workspace.ledger_path.with_name("job.db.rescue").write_text("{", encoding="utf-8"),
        5,
    ),
    "the job names an unknown waterfall": (lambda _, workspace: workspace.write_job(waterfall="none_such"), 4),
}


@pytest.mark.long
@pytest.mark.parametrize("refusal", REFUSALS)
def test_open_tasks_collected_before_refusal(workspace: Workspace, refusal: str) -> None:
    """Polls each open task and keeps its answer; sends nothing new, and the run reports the reason."""
    scripted_api = ScriptedApi()
    with serve_replies(scripted_api) as server:
        submit_and_leave(workspace, scripted_api, server.base_url)
        spoil, code = REFUSALS[refusal]
        spoil(scripted_api, workspace)

        summary = run_once(workspace, server.base_url)

    assert (summary.exit_code, scripted_api.posts) == (code, [])
    assert request_states(workspace) == ["found"] * 3
    assert summary.error
    if code == 4:  # writes the output, but for a waterfall whose results it cannot have
        unknown = refusal == "the job names an unknown waterfall"
        assert (summary.found, summary.output is None) == ((None, True) if unknown else (3, False))


NOT_FOUND_REPLIES = [
    http_reply(404, {}),
    http_reply(410, {}),
    http_reply(401, {}),
    http_reply(403, {}),
    http_reply(200, {"status": "gone"}),
]


@pytest.mark.parametrize("answer", first_quick(1, NOT_FOUND_REPLIES, single=True))
def test_other_workspace_keeps_tasks_open(workspace: Workspace, answer: Reply) -> None:
    """A key that cannot see the tasks does not expire them."""
    scripted_api = ScriptedApi()
    with serve_replies(scripted_api) as server:
        submit_and_leave(workspace, scripted_api, server.base_url)
        scripted_api.user = http_reply(200, {"balance": 1, "workspace": "theirs"})
        scripted_api.task = lambda name: answer if name != "First1" else completed_reply(name)

        summary = run_once(workspace, server.base_url)

        assert (summary.exit_code, scripted_api.posts) == (2, [])
        assert "--workspace-renamed" in (summary.hint or "")
        assert request_states(workspace) == ["submitted", "found", "submitted"]

        scripted_api.task = completed_reply
        renamed = run_once(workspace, server.base_url, RunOptions(workspace_renamed=True))
        second = run_once(workspace, server.base_url)

    assert (renamed.exit_code, second.exit_code, scripted_api.posts) == (0, 0, [])
    assert request_states(workspace) == ["found"] * 3


@pytest.mark.long
def test_no_requests_to_other_host(workspace: Workspace) -> None:
    """Sends nothing to another host, not even free requests: it must not see the ledger's task ids."""
    scripted_api = ScriptedApi()
    with serve_replies(scripted_api) as server:
        submit_and_leave(workspace, scripted_api, server.base_url)
        workspace.sql("UPDATE facts SET value = 'api.other.example' WHERE name = 'api_host'")

        with pytest.raises(Exception, match=r"api\.other\.example"):
            run_once(workspace, server.base_url)

        assert (scripted_api.posts, scripted_api.polls) == ([], [])


# When a task expires


@given(pattern=st.lists(st.booleans(), min_size=0, max_size=12))
def test_only_continuous_404_expires_task(pattern: list[bool]) -> None:
    """A flickering task never expires, however often it is unknown in between."""
    from enrich.models import Task  # noqa: PLC0415
    from enrich.run.poll_schedule import OpenTask, Repeated  # noqa: PLC0415 - tests the rule without a run

    waiting, now = OpenTask(Task((1,), "t", 0), submitted_in_this_run=True, acknowledged=True, submitted_at_s=0.0), 0.0
    is_expired, run, since = False, 0, 0.0
    for missing in pattern:
        now += 17.0
        if not missing:
            waiting.unconfirmed_reply, run = Repeated(), 0
            continue
        since = now if not run else since
        run += 1
        is_expired = waiting.unconfirmed_reply.add("404", now).is_conclusive(now, 60.0)
        assert is_expired == (run >= 5 and now - since >= 60.0)


@pytest.mark.long
def test_signal_or_max_time_keeps_tasks_open(workspace: Workspace) -> None:
    """An unknown task stays open after a signal or --max-time, and the next run polls it again."""
    scripted_api = ScriptedApi()
    with serve_replies(scripted_api) as server:
        submit_and_leave(workspace, scripted_api, server.base_url)
        scripted_api.task = lambda _: http_reply(404, {})

        summary = run_once(workspace, server.base_url, RunOptions(max_time_s=0.9), replace(TIMEOUTS, young_task_s=60.0))
        assert summary.exit_code == 13
        assert request_states(workspace) == ["submitted"] * 3

        scripted_api.task = completed_reply
        assert run_once(workspace, server.base_url).exit_code == 0

    assert (request_states(workspace), scripted_api.posts) == (["found"] * 3, [])


@pytest.mark.long
def test_expired_tasks_polled_once_more(workspace: Workspace) -> None:
    """Polls expired tasks and unconfirmed ones with an id once more before the user has to pay again."""
    scripted_api = ScriptedApi()
    with serve_replies(scripted_api) as server:
        submit_and_leave(workspace, scripted_api, server.base_url)
        scripted_api.task = lambda _: http_reply(404, {})
        assert run_once(workspace, server.base_url).exit_code == 10
        assert request_states(workspace) == ["expired"] * 3
        scripted_api.task, scripted_api.polls = completed_reply, []

        summary = run_once(workspace, server.base_url)

    assert (summary.exit_code, summary.submitted, scripted_api.posts) == (0, 0, [])
    assert request_states(workspace) == ["found"] * 3
    assert summary.credits_spent == 1.5


@pytest.mark.parametrize("task_state", first_quick(1, ["completed", "running", "unknown", "gone"]))
def test_in_doubt_with_id_polled_before_retry(workspace: Workspace, task_state: str) -> None:
    """`--retry` pays only for what the API does not have."""
    scripted_api, leads = ScriptedApi(), make_leads(2)
    workspace.write_leads(leads)
    scripted_api.post = lambda name: http_reply(500, {"task_id": f"t-{name}", "detail": "sorry"})
    with serve_replies(scripted_api) as server:
        assert run_once(workspace, server.base_url).exit_code == 14
        assert workspace.sql("SELECT state, task_id FROM attempts ORDER BY id") == [
            ("in_doubt", "t-First0"),
            ("in_doubt", "t-First1"),
        ]
        scripted_api.post = ScriptedApi.post
        scripted_api.clear_requests()
        replies = iter([running_reply("First0"), running_reply("First0")])
        scripted_api.task = {
            "completed": completed_reply,
            "running": lambda name: next(replies, completed_reply(name)) if name == "First0" else completed_reply(name),
            "unknown": lambda name: http_reply(404, {}) if len(scripted_api.posts) < 2 else completed_reply(name),
            "gone": lambda name: http_reply(410, {}) if len(scripted_api.posts) < 2 else completed_reply(name),
        }[task_state]

        summary = run_once(workspace, server.base_url, RunOptions(retry=frozenset({State.IN_DOUBT})))

    bought = 2 if task_state in ("unknown", "gone") else 0
    assert (summary.exit_code, len(scripted_api.posts)) == (0, bought)
    assert request_states(workspace) == ["found"] * 2


LATE_REPLIES: dict[str, tuple[Callable[[str], Reply], int | None]] = {
    "completed": (completed_reply, 500_000),
    "failed at no charge": (
        lambda name: http_reply(200, {"task_id": f"t-{name}", "status": "failed", "credits_spent": 0}),
        0,
    ),
    "still running": (running_reply, None),
    "without a price": (lambda name: completed_reply(name, credits_spent=None), None),
    "deleted": (lambda _: http_reply(410, {}), None),
}


@pytest.mark.parametrize("late", first_quick(1, LATE_REPLIES))
def test_late_answer_of_a_resent_request_adds_its_price_only(workspace: Workspace, late: str) -> None:
    """The price is charged to the run that gets it, once. Row and request keep the newer answer."""
    scripted_api, (reply, credits_) = ScriptedApi(), LATE_REPLIES[late]
    workspace.write_leads(make_leads(2))
    scripted_api.post = lambda name: http_reply(500, {"task_id": f"t-{name}", "detail": "sorry"})
    with serve_replies(scripted_api) as server:
        assert run_once(workspace, server.base_url).exit_code == 14
        scripted_api.post = lambda name: http_reply(200, {"task_id": f"t-{name}Again", "status": "created"})
        scripted_api.task = lambda name: completed_reply(name) if name.endswith("Again") else http_reply(404, {})
        resent = run_once(workspace, server.base_url, RunOptions(retry=frozenset({State.IN_DOUBT})))
        rows = workspace.read_output()
        scripted_api.clear_requests()
        scripted_api.task = reply

        summary = run_once(workspace, server.base_url)
        polls = len(scripted_api.polls)
        last = run_once(workspace, server.base_url)

    assert (resent.exit_code, resent.submitted, resent.credits_spent) == (0, 2, 1.0)
    assert (summary.credits_spent, last.credits_spent) == (2 * (credits_ or 0) / 1_000_000, 0.0)
    assert (scripted_api.posts, polls) == ([], 2)
    assert len(scripted_api.polls) == (4 if late in ("still running", "without a price") else 2)
    assert workspace.read_output() == rows
    assert [row["work_email"] for row in rows] == ["first0again@found.example", "first1again@found.example"]
    attempts = workspace.sql("SELECT state, credits, settled_execution_id FROM attempts ORDER BY id")
    settled_in = None if credits_ is None else summary.execution
    assert attempts == [("in_doubt", credits_, settled_in)] * 2 + [("found", 500_000, resent.execution)] * 2
    assert not check_ledger(workspace.ledger_path).problems


@pytest.mark.parametrize("reply", first_quick(1, [http_reply(429, {}), http_reply(503, {})], single=True))
def test_request_whose_old_task_cannot_be_polled_is_not_resent(workspace: Workspace, reply: Reply) -> None:
    """`--retry` sends the others, and the run says why it left this one."""
    scripted_api = ScriptedApi()
    workspace.write_leads(make_leads(2))
    scripted_api.post = lambda name: http_reply(500, {"task_id": f"t-{name}", "detail": "sorry"})
    with serve_replies(scripted_api) as server:
        assert run_once(workspace, server.base_url).exit_code == 14
        scripted_api.post = lambda name: http_reply(200, {"task_id": f"t-{name}Again", "status": "created"})
        scripted_api.clear_requests()
        # The first poll is that of every run, the next one comes before the request is sent again.
        first = iter([http_reply(404, {})])
        replies = {"First0": lambda: next(first, reply), "First1": lambda: http_reply(404, {})}
        scripted_api.task = lambda name: replies[name]() if name in replies else completed_reply(name)

        summary = run_once(workspace, server.base_url, RunOptions(retry=frozenset({State.IN_DOUBT})))

    assert (summary.exit_code, scripted_api.posts) == (14, ["First1"])
    assert "1 task could not be polled, so not sent again in this run" in summary.notes
    assert request_states(workspace) == ["in_doubt", "found"]


@pytest.mark.long
def test_old_tasks_are_polled_for_a_limited_time(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are left are polled by the next run. Nothing is sent, and new leads do not wait for them."""
    scripted_api = ScriptedApi()
    workspace.write_leads(make_leads(8))
    scripted_api.post = lambda name: http_reply(500, {"task_id": f"t-{name}", "detail": "sorry"})
    with serve_replies(scripted_api) as server:
        assert run_once(workspace, server.base_url).exit_code == 14
        scripted_api.clear_requests()
        workspace.write_job(limits="{requests_per_second: 4}")
        monkeypatch.setattr(phases, "REPOLL_S", 0.1)

        first = run_once(workspace, server.base_url)
        recovered = request_states(workspace).count("found")
        workspace.write_job()
        monkeypatch.setattr(phases, "REPOLL_S", 60.0)
        second = run_once(workspace, server.base_url)

    assert (first.exit_code, second.exit_code, scripted_api.posts) == (14, 0, [])
    assert recovered < 8
    assert request_states(workspace) == ["found"] * 8
    assert sorted(scripted_api.polls) == sorted(f"First{number}" for number in range(8))


@pytest.mark.long
def test_credits_without_data_polled_once_more(workspace: Workspace) -> None:
    """A completed and charged task may not have its data yet."""
    scripted_api = ScriptedApi()
    workspace.write_leads(make_leads(1))
    first = iter([completed_reply("First0", data=None)])
    scripted_api.task = lambda name: next(first, completed_reply(name))
    with serve_replies(scripted_api) as server:
        summary = run_once(workspace, server.base_url)

    assert (summary.exit_code, summary.found, len(scripted_api.polls)) == (0, 1, 2)


@pytest.mark.long
def test_retry_after_of_post_does_not_block_polls(workspace: Workspace) -> None:
    """Polls each open task before such a run exits, and exits when an outage would end it."""
    scripted_api = ScriptedApi()
    with serve_replies(scripted_api) as server:
        submit_and_leave(workspace, scripted_api, server.base_url, leads=1)
        workspace.write_leads(make_leads(3))
        scripted_api.post = lambda _: http_reply(429, {}, retry_after="3600")
        replies = iter([running_reply("First0"), running_reply("First0")])
        scripted_api.task = lambda name: next(replies, completed_reply(name))

        summary = run_once(workspace, server.base_url, timing=replace(TIMEOUTS, outage_s=1.5))

    assert summary.exit_code == 4
    assert request_states(workspace) == ["found", "pending", "pending"]


# Unusable answers

UNUSABLE_ANSWERS: dict[str, tuple[Callable[[str], Reply], str, float | None]] = {
    "negative credits": (lambda name: completed_reply(name, credits_spent=-5), "found", None),
    "too many credits": (lambda name: completed_reply(name, credits_spent=1_000_001), "found", None),
    "credits as text": (lambda name: completed_reply(name, credits_spent="NaN"), "found", None),
    "credits as NaN": (
        lambda name: Reply(completed_reply(name).data.replace(b'"credits_spent": 0.5', b'"credits_spent": NaN')),
        "found",
        None,
    ),
    "credits as an object": (lambda name: completed_reply(name, credits_spent={"amount": 1}), "found", None),
    "many steps": (
        lambda name: completed_reply(
            name, data=[{"result": {"email": "a@b.example"}, "steps": [{"provider": "P", "cost": "0"}] * 20_000}]
        ),
        "found",
        0.5,
    ),
    "deep": (
        lambda name: http_reply(
            200, b'{"task_id":"t-%s","status":"completed","data":%s}' % (name.encode(), b"[" * 5000 + b"]" * 5000)
        ),
        "submitted",
        None,
    ),
    "not JSON": (lambda _: http_reply(200, b"<html>busy</html>"), "submitted", None),
    "no status": (lambda name: http_reply(200, {"task_id": f"t-{name}"}), "submitted", None),
    "another task": (lambda _: completed_reply("First1"), "submitted", None),
    "a long id": (lambda name: completed_reply(name, task_id="x" * 600), "submitted", None),
}


@pytest.mark.long
@pytest.mark.parametrize("answer_name", UNUSABLE_ANSWERS)
def test_unusable_answer_affects_one_row(workspace: Workspace, answer_name: str) -> None:
    """The other leads get theirs, the row has the reason, and the run is not blocked."""
    scripted_api = ScriptedApi()
    answer, state, spent = UNUSABLE_ANSWERS[answer_name]
    workspace.write_leads(make_leads(3))
    scripted_api.task = lambda name: answer(name) if name == "First0" else completed_reply(name)
    with serve_replies(scripted_api) as server:
        summary = run_once(workspace, server.base_url)
        rows = workspace.read_output()
        stored = workspace.sql("SELECT answer FROM attempts WHERE task_id = 't-First0'")
        second = run_once(workspace, server.base_url) if state == "submitted" else summary
        scripted_api.task = completed_reply
        last = run_once(workspace, server.base_url)

    assert summary.exit_code == (13 if state == "submitted" else 0)
    assert [row["enrich_status"] for row in rows[1:]] == ["found", "found"]
    assert rows[1]["work_email"] == "first1@found.example"
    assert "first1@" not in str(stored)
    assert second.exit_code in (0, 13)
    if state == "found":
        assert rows[0]["enrich_status"] == "found"
        assert rows[0]["enrich_credits"] == ("" if spent is None else str(spent))
    else:
        assert rows[0]["enrich_status"] == "pending"
        assert rows[0]["enrich_error"]
    assert last.exit_code == 0
    assert request_states(workspace) == ["found"] * 3
    assert len(scripted_api.posts) == 3


@pytest.mark.long
def test_unknown_task_ids_stop_submitting(workspace: Workspace) -> None:
    """Keeps unknown tasks' raw answers, and stops sending after 20."""
    scripted_api = ScriptedApi()
    workspace.write_job(limits="{requests_per_second: 1000, in_flight: 25}")
    workspace.write_leads(make_leads(80))
    scripted_api.task = lambda name: completed_reply(name, task_id=f"alien-{name}")
    with serve_replies(scripted_api) as server:
        summary = run_once(workspace, server.base_url, timing=replace(TIMEOUTS, outage_s=60.0))

    assert summary.exit_code == 4
    assert len(scripted_api.posts) < 80
    assert set(request_states(workspace)) <= {"submitted", "pending"}
    kept = workspace.sql("SELECT count(*) FROM attempts WHERE answer LIKE '%alien-%' AND state = 'submitted'")
    assert kept[0][0] >= 20


# Clocks


@given(steps=st.lists(st.integers(-72, 72), min_size=1, max_size=5))
def test_local_clock_steps_are_ignored(steps: list[int]) -> None:
    """Computes the time from the run's start and the monotonic clock."""
    clock = SystemClock()
    before = clock.now_ms()
    with pytest.MonkeyPatch.context() as patch:
        for hours in steps:
            patch.setattr("time.time_ns", lambda hours=hours: hours * 3_600_000_000_000)
            patch.setattr("time.time", lambda hours=hours: hours * 3_600)
            assert 0 <= clock.now_ms() - before < 60_000


@given(offsets=st.lists(st.integers(-(10**8), 10**8), min_size=0, max_size=8))
def test_clock_offset_needs_agreeing_responses(offsets: list[int]) -> None:
    """One response, or several that differ, do not change the clock."""
    clock = SystemClock()
    for number, offset in enumerate(offsets):
        before = clock.offset_ms
        clock.observe(clock._local_ms() + offset)
        last = offsets[max(0, number + 1 - CLOCK_SAMPLES) : number + 1]
        agree = len(last) == CLOCK_SAMPLES and max(last) - min(last) <= CLOCK_SAMPLE_SPREAD_MS - 100
        differ = len(last) < CLOCK_SAMPLES or max(last) - min(last) > CLOCK_SAMPLE_SPREAD_MS + 100
        if differ:
            assert clock.offset_ms == before
        if agree and abs(max(last)) > 301_000:
            assert abs(clock.offset_ms - max(last)) < 2_000
        assert clock.earliest_ms() <= clock.now_ms() + 5


def test_cached_date_header_is_ignored() -> None:
    """Ignores `Date` when an `Age` header shows a cached response."""
    from enrich.databar.client import Client  # noqa: PLC0415 - tests the header only

    received: list[int] = []

    class RecordingClock(SystemClock):
        def observe(self, api_ms: int) -> None:
            received.append(api_ms)

    async def request_user(base_url: str) -> None:
        async with Client(ApiAccess(base_url, SecretStr("key-of-the-test")), RecordingClock()) as client:
            await client.get_user()

    for more in ({}, {"age": "7200"}):
        with serve_replies(http_reply(200, {"workspace": "w"}, date="Sun, 01 Nov 2026 12:00:00 GMT", **more)) as server:
            asyncio.run(request_user(server.base_url))
    assert received == [1_793_534_400_000]
