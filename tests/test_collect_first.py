"""What was paid for is collected before anything refuses a run, and is written off only when that is sure."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from enrich import poller
from enrich.api.credentials import Access
from enrich.execution import Timing
from enrich.job import load_job
from enrich.model import CLOCK_AGREES_MS, CLOCK_ANSWERS, State, SystemClock
from enrich.pipeline import run as run_job
from enrich.receipt import Receipt
from enrich.store.lock import hold
from enrich.store.opening import opened
from enrich.surroundings import Options, Surroundings
from tests.cases import first_quick
from tests.harness import HASTY, Office, people
from tests.wire import Reply, Seen, answering, http

TIMING = replace(HASTY, start_s=3.0, young_s=0.4, outage_s=10.0, no_data_s=0.1)
WATERFALL = {
    "identifier": "email_getter",
    "name": "E-mail",
    "input_params": [{"name": name, "required": True} for name in ("first_name", "last_name", "company")],
    "output_fields": [{"name": "email"}],
    "available_enrichments": [{"id": 833, "name": "Mailhound", "price": "0.5"}],
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again soon after an answer that does not count."""
    monkeypatch.setattr(poller, "FAILED_POLL_S", 0.1)


@dataclass
class Odd:
    """An API whose answers a test can exchange; tasks are named after the lead, and answered by `task`."""

    user: Reply = field(default_factory=lambda: http(200, {"balance": 100, "workspace": "ours"}))
    waterfall: Reply = field(default_factory=lambda: http(200, WATERFALL))
    post: Callable[[str], Reply] = lambda name: http(200, {"task_id": f"t-{name}", "status": "created"})
    task: Callable[[str], Reply] = lambda name: completed(name)  # noqa: PLW0108 - it is defined below
    posts: list[str] = field(default_factory=list)
    polls: list[str] = field(default_factory=list)

    def __call__(self, seen: Seen) -> Reply:
        """Answer."""
        path = seen.line.split()[1]
        if seen.line.startswith("POST"):
            name = re.findall(rb'"first_name": ?"(\w+)"', seen.body)[0].decode()
            self.posts.append(name)
            return self.post(name)
        if "/tasks/" in path:
            name = path.rpartition("-")[2]
            self.polls.append(name)
            return self.task(name)
        if path.endswith("/waterfalls/"):
            return http(200, [WATERFALL])
        return self.user if path.endswith("/me") else self.waterfall

    def asked(self) -> None:
        """Forget what was asked so far."""
        self.posts.clear()
        self.polls.clear()


def completed(name: str, **more: Any) -> Reply:
    """Say that a task found the lead's address."""
    body = {"task_id": f"t-{name}", "status": "completed", "data": [{"email": f"{name.lower()}@found.example"}]}
    return http(200, body | {"credits_spent": 0.5} | more)


def running(name: str) -> Reply:
    """Say that a task is at work."""
    return http(200, {"task_id": f"t-{name}", "status": "processing"})


def night(office: Office, base_url: str, options: Options | None = None, timing: Timing = TIMING) -> Receipt:
    """Run the job against an odd API."""
    job = load_job(office.job_file)
    with hold(job.ledger, 0), opened(job.ledger) as (ledger, _):
        around = Surroundings(job, Access(base_url, SecretStr("key-of-the-test")), ledger, timing=timing)
        return run_job(around, options or Options())


def states(office: Office) -> list[str]:
    """Tell where the requests stand, in the order of the input."""
    return [state for (state,) in office.sql("SELECT state FROM requests ORDER BY id")]


def left_behind(office: Office, odd: Odd, base_url: str, leads: int = 3) -> None:
    """Buy for some leads, and leave while all tasks run."""
    office.write_leads(people(leads))
    odd.task = running
    office.write_job(policy="{patience: 1s}")
    assert night(office, base_url).exit_code == 13
    assert states(office) == ["submitted"] * leads
    office.write_job()
    odd.task = completed
    odd.asked()


REFUSALS: dict[str, tuple[Callable[[Odd, Office], object], int]] = {
    "the waterfall is gone": (lambda odd, _: setattr(odd, "waterfall", http(404, {"detail": "no"})), 2),
    "the waterfall is another": (
        lambda odd, _: setattr(odd, "waterfall", http(200, WATERFALL | {"identifier": "phone_getter"})),
        4,
    ),
    "the waterfall wants more": (
        lambda odd, _: setattr(
            odd, "waterfall", http(200, WATERFALL | {"input_params": [{"name": "age", "required": True}]})
        ),
        2,
    ),
    "the account is unknown": (lambda odd, _: setattr(odd, "user", http(404, {"detail": "no"})), 2),
    "the account is no JSON": (lambda odd, _: setattr(odd, "user", http(200, b"<html>")), 4),
    "the account fails": (lambda odd, _: setattr(odd, "user", http(500, {"detail": "no"})), 4),
    "the account is a list": (lambda odd, _: setattr(odd, "user", http(200, [1])), 4),
    "the workspace is another": (
        lambda odd, _: setattr(odd, "user", http(200, {"balance": 1, "workspace": "theirs"})),
        2,
    ),
    "the input is broken": (lambda _, office: (office.folder / "leads.csv").write_bytes(b"\xff\xfe\x00"), 5),
    "the input is missing": (lambda _, office: (office.folder / "leads.csv").unlink(), 5),
    "the changes would replace the input": (
        lambda _, office: office.write_job(changes="{path: leads.csv, key: [Email]}"),
        2,
    ),
    "a rescue file is damaged": (
        lambda _, office: office.ledger_path.with_name("job.db.rescue").write_text("{", encoding="utf-8"),
        5,
    ),
    "the job names an unknown waterfall": (lambda _, office: office.write_job(waterfall="none_such"), 4),
}


@pytest.mark.parametrize("refusal", first_quick(3, REFUSALS, single=True))
def test_what_runs_is_collected_before_a_run_is_refused(office: Office, refusal: str) -> None:
    """Each open task is asked for and its answer kept; nothing new is sent, and the run says why."""
    odd = Odd()
    with answering(odd) as wire:
        left_behind(office, odd, wire.base_url)
        spoil, code = REFUSALS[refusal]
        spoil(odd, office)

        receipt = night(office, wire.base_url)

    assert (receipt.exit_code, odd.posts) == (code, [])
    assert states(office) == ["found"] * 3
    assert receipt.error


UNSEEN = [http(404, {}), http(410, {}), http(401, {}), http(403, {}), http(200, {"status": "gone"})]


@pytest.mark.parametrize("answer", first_quick(1, UNSEEN, single=True))
def test_another_workspace_writes_nothing_off(office: Office, answer: Reply) -> None:
    """A key that cannot see the tasks proves nothing about them."""
    odd = Odd()
    with answering(odd) as wire:
        left_behind(office, odd, wire.base_url)
        odd.user = http(200, {"balance": 1, "workspace": "theirs"})
        odd.task = lambda name: answer if name != "First1" else completed(name)

        receipt = night(office, wire.base_url)

        assert (receipt.exit_code, odd.posts) == (2, [])
        assert "--workspace-renamed" in (receipt.hint or "")
        assert states(office) == ["submitted", "found", "submitted"]

        odd.task = completed
        renamed = night(office, wire.base_url, Options(workspace_renamed=True))
        again = night(office, wire.base_url)

    assert (renamed.exit_code, again.exit_code, odd.posts) == (0, 0, [])
    assert states(office) == ["found"] * 3


def test_nothing_is_sent_to_another_host(office: Office) -> None:
    """Not even the free questions: the ledger's task ids are not that host's business."""
    odd = Odd()
    with answering(odd) as wire:
        left_behind(office, odd, wire.base_url)
        office.sql("UPDATE facts SET value = 'api.other.example' WHERE name = 'api_host'")

        with pytest.raises(Exception, match=r"api\.other\.example"):
            night(office, wire.base_url)

        assert (odd.posts, odd.polls) == ([], [])


# When a task is lost


@given(pattern=st.lists(st.booleans(), min_size=0, max_size=12))
def test_a_404_counts_only_without_a_break(pattern: list[bool]) -> None:
    """A task that flickers is never written off, however often it is unknown in between."""
    from enrich.model import Task  # noqa: PLC0415
    from enrich.poller import Waiting  # noqa: PLC0415 - the rule alone

    waiting, now = Waiting(Task((1,), "t", 0), fresh=True, alive=True, born=0.0), 0.0
    believed, run, since = False, 0, 0.0
    for missing in pattern:
        now += 17.0
        if not missing:
            waiting.repeated, run = None, 0
            continue
        since = now if not run else since
        run += 1
        believed = waiting.repeats("404", now).enough(now, 60.0)
        assert believed == (run >= 5 and now - since >= 60.0)


def test_a_signal_or_the_end_of_the_time_writes_nothing_off(office: Office) -> None:
    """The API that does not know a task for a while is asked again by the next run."""
    odd = Odd()
    with answering(odd) as wire:
        left_behind(office, odd, wire.base_url)
        odd.task = lambda _: http(404, {})

        receipt = night(office, wire.base_url, Options(max_time_s=0.9), replace(TIMING, young_s=60.0))
        assert receipt.exit_code == 13
        assert states(office) == ["submitted"] * 3

        odd.task = completed
        assert night(office, wire.base_url).exit_code == 0

    assert (states(office), odd.posts) == (["found"] * 3, [])


def test_what_was_written_off_is_asked_for_once_more(office: Office) -> None:
    """A 404 that was believed and a doubt with an id: the next run asks before a person has to pay."""
    odd = Odd()
    with answering(odd) as wire:
        left_behind(office, odd, wire.base_url)
        odd.task = lambda _: http(404, {})
        assert night(office, wire.base_url).exit_code == 10
        assert states(office) == ["expired"] * 3
        odd.task, odd.polls = completed, []

        receipt = night(office, wire.base_url)

    assert (receipt.exit_code, receipt.submitted, odd.posts) == (0, 0, [])
    assert states(office) == ["found"] * 3
    assert receipt.credits_spent == 1.5


@pytest.mark.parametrize("then", first_quick(1, ["completed", "running", "unknown", "gone"]))
def test_a_doubt_with_an_id_is_asked_for_before_it_is_bought_again(office: Office, then: str) -> None:
    """`--retry` pays for what the API does not have, and for nothing else."""
    odd, office_leads = Odd(), people(2)
    office.write_leads(office_leads)
    odd.post = lambda name: http(500, {"task_id": f"t-{name}", "detail": "sorry"})
    with answering(odd) as wire:
        assert night(office, wire.base_url).exit_code == 14
        assert office.sql("SELECT state, task_id FROM attempts ORDER BY id") == [
            ("in_doubt", "t-First0"),
            ("in_doubt", "t-First1"),
        ]
        odd.post = Odd.post
        odd.asked()
        still = iter([running("First0"), running("First0")])
        odd.task = {
            "completed": completed,
            "running": lambda name: next(still, completed(name)) if name == "First0" else completed(name),
            "unknown": lambda name: http(404, {}) if len(odd.posts) < 2 else completed(name),
            "gone": lambda name: http(410, {}) if len(odd.posts) < 2 else completed(name),
        }[then]

        receipt = night(office, wire.base_url, Options(retry=frozenset({State.IN_DOUBT})))

    bought = 2 if then in ("unknown", "gone") else 0
    assert (receipt.exit_code, len(odd.posts)) == (0, bought)
    assert states(office) == ["found"] * 2


def test_credits_without_data_are_asked_for_once_more(office: Office) -> None:
    """A task that says it is done and has cost something may not have its data yet."""
    odd = Odd()
    office.write_leads(people(1))
    first = iter([completed("First0", data=None)])
    odd.task = lambda name: next(first, completed(name))
    with answering(odd) as wire:
        receipt = night(office, wire.base_url)

    assert (receipt.exit_code, receipt.found, len(odd.polls)) == (0, 1, 2)


def test_a_long_retry_after_of_a_post_does_not_silence_polls(office: Office) -> None:
    """Each open task is asked for before such a run leaves, and it leaves when an outage would end it."""
    odd = Odd()
    with answering(odd) as wire:
        left_behind(office, odd, wire.base_url, leads=1)
        office.write_leads(people(3))
        odd.post = lambda _: http(429, {}, retry_after="3600")
        asked = iter([running("First0"), running("First0")])
        odd.task = lambda name: next(asked, completed(name))

        receipt = night(office, wire.base_url, timing=replace(TIMING, outage_s=1.5))

    assert receipt.exit_code == 4
    assert states(office) == ["found", "pending", "pending"]


# Poison

POISON: dict[str, tuple[Callable[[str], Reply], str, float | None]] = {
    "negative credits": (lambda name: completed(name, credits_spent=-5), "found", None),
    "too many credits": (lambda name: completed(name, credits_spent=1_000_001), "found", None),
    "credits as text": (lambda name: completed(name, credits_spent="NaN"), "found", None),
    "credits as NaN": (
        lambda name: Reply(completed(name).data.replace(b'"credits_spent": 0.5', b'"credits_spent": NaN')),
        "found",
        None,
    ),
    "credits as an object": (lambda name: completed(name, credits_spent={"amount": 1}), "found", None),
    "many steps": (
        lambda name: completed(
            name, data=[{"result": {"email": "a@b.example"}, "steps": [{"provider": "P", "cost": "0"}] * 20_000}]
        ),
        "found",
        0.5,
    ),
    "deep": (
        lambda name: http(
            200, b'{"task_id":"t-%s","status":"completed","data":%s}' % (name.encode(), b"[" * 5000 + b"]" * 5000)
        ),
        "submitted",
        None,
    ),
    "no JSON": (lambda _: http(200, b"<html>busy</html>"), "submitted", None),
    "no status": (lambda name: http(200, {"task_id": f"t-{name}"}), "submitted", None),
    "another task": (lambda _: completed("First1"), "submitted", None),
    "a long id": (lambda name: completed(name, task_id="x" * 600), "submitted", None),
}


@pytest.mark.parametrize("poison", first_quick(2, POISON, single=True))
def test_one_answer_costs_that_answer(office: Office, poison: str) -> None:
    """The other leads get theirs, the row says what is wrong, and the run is not held."""
    odd = Odd()
    answer, state, spent = POISON[poison]
    office.write_leads(people(3))
    odd.task = lambda name: answer(name) if name == "First0" else completed(name)
    with answering(odd) as wire:
        receipt = night(office, wire.base_url)
        rows = office.output()
        healed = night(office, wire.base_url) if state == "submitted" else receipt
        odd.task = completed
        last = night(office, wire.base_url)

    assert receipt.exit_code == (13 if state == "submitted" else 0)
    assert [row["enrich_status"] for row in rows[1:]] == ["found", "found"]
    assert rows[1]["work_email"] == "first1@found.example"
    assert healed.exit_code in (0, 13)
    if state == "found":
        assert rows[0]["enrich_status"] == "found"
        assert rows[0]["enrich_credits"] == ("" if spent is None else str(spent))
    else:
        assert rows[0]["enrich_status"] == "pending"
        assert rows[0]["enrich_error"]
    assert last.exit_code == 0
    assert states(office) == ["found"] * 3
    assert len(odd.posts) == 3


def test_ids_that_no_attempt_has_stop_submitting(office: Office) -> None:
    """Somebody else's tasks, again and again: kept raw, and after 20 nothing more is bought."""
    odd = Odd()
    office.write_job(limits="{requests_per_second: 1000, in_flight: 25}")
    office.write_leads(people(80))
    odd.task = lambda name: completed(name, task_id=f"alien-{name}")
    with answering(odd) as wire:
        receipt = night(office, wire.base_url, timing=replace(TIMING, outage_s=60.0))

    assert receipt.exit_code == 4
    assert len(odd.posts) < 80
    assert set(states(office)) <= {"submitted", "pending"}
    kept = office.sql("SELECT count(*) FROM attempts WHERE answer LIKE '%alien-%' AND state = 'submitted'")
    assert kept[0][0] >= 20


# Clocks


@given(steps=st.lists(st.integers(-72, 72), min_size=1, max_size=5))
def test_steps_of_the_local_clock_change_no_time(steps: list[int]) -> None:
    """The clock of a run is the one it began with, counted on."""
    clock = SystemClock()
    before = clock.now_ms()
    with pytest.MonkeyPatch.context() as patch:
        for hours in steps:
            patch.setattr("time.time_ns", lambda hours=hours: hours * 3_600_000_000_000)
            patch.setattr("time.time", lambda hours=hours: hours * 3_600)
            assert 0 <= clock.now_ms() - before < 60_000


@given(offsets=st.lists(st.integers(-(10**8), 10**8), min_size=0, max_size=8))
def test_a_clock_offset_needs_answers_that_agree(offsets: list[int]) -> None:
    """One answer, or several that differ, leave the clock as it is."""
    clock = SystemClock()
    for number, offset in enumerate(offsets):
        before = clock.offset_ms
        clock.observe(clock._local_ms() + offset)
        last = offsets[max(0, number + 1 - CLOCK_ANSWERS) : number + 1]
        agree = len(last) == CLOCK_ANSWERS and max(last) - min(last) <= CLOCK_AGREES_MS - 100
        differ = len(last) < CLOCK_ANSWERS or max(last) - min(last) > CLOCK_AGREES_MS + 100
        if differ:
            assert clock.offset_ms == before
        if agree and abs(max(last)) > 301_000:
            assert abs(clock.offset_ms - max(last)) < 2_000
        assert clock.earliest_ms() <= clock.now_ms() + 5


def test_a_date_from_a_cache_is_no_clock() -> None:
    """An `Age` header says that the answer is old."""
    from enrich.api.client import Client  # noqa: PLC0415 - the header alone

    heard: list[int] = []

    class Heard(SystemClock):
        def observe(self, api_ms: int) -> None:
            heard.append(api_ms)

    async def asking(base_url: str) -> None:
        async with Client(Access(base_url, SecretStr("key-of-the-test")), Heard()) as client:
            await client.user()

    for more in ({}, {"age": "7200"}):
        with answering(http(200, {"workspace": "w"}, date="Sun, 01 Nov 2026 12:00:00 GMT", **more)) as wire:
            asyncio.run(asking(wire.base_url))
    assert heard == [1_793_534_400_000]
