"""Responses reach the wrong requests: every row has its own answer or none, and nothing is paid twice."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.run import poller
from enrich.run.context import RunOptions
from enrich.run.run_state import Timeouts
from enrich.run.summary import RunSummary
from enrich.sandbox import SandboxSettings
from tests.support.answer_check import ANSWER_STATUSES, misassigned_rows
from tests.support.cases import examples, first_quick
from tests.support.faulty_proxy import ChooseFault, Exchange, FaultyProxy, ProxyFault, ProxyFaultKind, faulty_proxy
from tests.support.workspace import INSTANT_API, JOB, SHORT_TIMEOUTS, SandboxApi, Workspace, make_leads, serve_api

LEADS = 40
#: Longer than any machine needs, except for an unknown task.
TIMEOUTS = replace(SHORT_TIMEOUTS, outage_s=15.0)
#: Makes the time alone never enough to believe a 404.
NO_YOUNG_TIMEOUTS = replace(TIMEOUTS, young_task_s=60.0)
#: Exit codes of a run that could not collect all answers.
UNFINISHED_EXIT_CODES = {4, 13}
DUPLICATE_ID_MESSAGE = "the API gave a task id twice"


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll again soon after a failed poll."""
    monkeypatch.setattr(poller, "FAILED_POLL_S", 0.1)


@dataclass
class Scenario:
    """A workspace whose API is behind a proxy; `api` is the API itself."""

    workspace: Workspace
    api: SandboxApi
    proxy: FaultyProxy
    settings: SandboxSettings = INSTANT_API
    bulk: bool = False

    def run_job(self, timing: Timeouts = TIMEOUTS, options: RunOptions | None = None) -> RunSummary:
        """Run the job through the proxy; assert that no row has another's answer."""
        summary = self.workspace.run_job(dataclasses.replace(self.api, base_url=self.proxy.base_url), options, timing)
        self.check_output()
        return summary

    def check_output(self) -> None:
        """Assert against the API's audit: no row has another's answer, nothing is paid twice, nothing is lost."""
        audit, rows = self.api.audit(), self.workspace.read_output()
        assert misassigned_rows(rows, audit, self.settings, bulk=self.bulk) == {}
        assert (audit["accepted_more_than_once"], audit["paid_twice"]) == (0, 0)
        accepted = {run["params"]["first_name"] for run in audit["runs"]}
        unsent = {row["First Name"] for row in rows if row["enrich_status"] == "pending"} - accepted
        assert {row["First Name"] for row in rows} == accepted | unsent | self.leads_in_doubt()

    def statuses(self) -> Counter[str]:
        """Count the rows by status."""
        return Counter(row["enrich_status"] for row in self.workspace.read_output())

    def answered_count(self) -> int:
        """Count the rows with an answer."""
        return sum(count for status, count in self.statuses().items() if status in ANSWER_STATUSES)

    def leads_in_doubt(self) -> set[str]:
        """Return the names of the leads in doubt."""
        return {row["First Name"] for row in self.workspace.read_output() if row["enrich_status"] == "in_doubt"}


@contextmanager
def make_scenario(
    folder: Path, choose_fault: ChooseFault, leads: int = LEADS, job: str = JOB, **api: object
) -> Iterator[Scenario]:
    """Make a job with its leads behind a faulty proxy."""
    settings = dataclasses.replace(INSTANT_API, **api)  # type: ignore[arg-type]
    (folder / "office").mkdir()
    workspace = Workspace(folder / "office")
    workspace.write_job(job)
    workspace.write_leads(make_leads(leads))
    with serve_api(folder / "api.db", settings) as served, faulty_proxy(served.base_url, choose_fault) as proxy:
        yield Scenario(workspace, served, proxy, settings, bulk="bulk" in job)


def every_nth(number: int, fault: ProxyFault, *kinds: str) -> ChooseFault:
    """Apply a fault to every n-th request of these kinds; by default POST and GET."""
    affected_kinds = kinds or ("POST", "GET")
    return lambda exchange: fault if exchange.kind in affected_kinds and not exchange.number % number else None


def fault_first_polls(number: int, make: Callable[[Exchange], ProxyFault]) -> ChooseFault:
    """Apply a fault to the first polls of each task."""
    polls: Counter[str] = Counter()

    def choose(exchange: Exchange) -> ProxyFault | None:
        if not exchange.is_poll:
            return None
        polls[exchange.task_id] += 1
        return make(exchange) if polls[exchange.task_id] <= number else None

    return choose


@pytest.mark.long
@pytest.mark.parametrize("after_s", [0.03, 0.0], ids=["30 ms later", "at once"])
@pytest.mark.parametrize(
    ("kinds", "nth"),
    [((), 1), (("POST",), 1), (("GET",), 1), ((), 4)],
    ids=["all", "POST", "GET", "each 4th"],
)
def test_duplicated_responses(tmp_path: Path, kinds: tuple[str, ...], nth: int, after_s: float) -> None:
    """A repeated response reaches no other request; a poll that it spoils is repeated."""
    with make_scenario(tmp_path, every_nth(nth, ProxyFault(ProxyFaultKind.REPEAT, after_s), *kinds)) as scenario:
        first = scenario.run_job()
        # When every POST is spoiled, the run stops sending after a while.
        assert scenario.answered_count() + len(scenario.leads_in_doubt()) == LEADS or first.exit_code == 4
        assert sum(scenario.proxy.fault_counts.values()) >= min(5, LEADS // nth)
        scenario.proxy.clear_faults()
        scenario.run_job()
        assert len(scenario.leads_in_doubt()) <= (0 if kinds == ("GET",) else LEADS // nth)
        assert scenario.answered_count() == LEADS - len(scenario.leads_in_doubt())


@pytest.mark.long
def test_duplicated_responses_subprocess(tmp_path: Path) -> None:
    """The same in a subprocess."""
    with make_scenario(tmp_path, every_nth(1, ProxyFault(ProxyFaultKind.REPEAT, 0.03))) as scenario:
        api = dataclasses.replace(scenario.api, base_url=scenario.proxy.base_url)
        result = scenario.workspace.run_subprocess("run", "job.yaml", "--json", api=api)
        scenario.check_output()
        assert result.exit_code in (0, 14), result.stderr
        assert scenario.answered_count() + len(scenario.leads_in_doubt()) == LEADS


@pytest.mark.long
@pytest.mark.parametrize("after_s", [0.02, 0.0], ids=["20 ms later", "at once"])
@pytest.mark.parametrize("status", [200, 404, 408, 429, 503])
def test_unsolicited_responses(tmp_path: Path, status: int, after_s: float) -> None:
    """A response on an idle connection is ignored: no request is refused or repeated because of it."""
    with make_scenario(tmp_path, every_nth(3, ProxyFault(ProxyFaultKind.UNSOLICITED, after_s, status))) as scenario:
        scenario.run_job(NO_YOUNG_TIMEOUTS)
        assert len(scenario.leads_in_doubt()) <= LEADS // 3
        assert scenario.answered_count() == LEADS - len(scenario.leads_in_doubt())
        assert scenario.api.audit()["requests"]["run"] == LEADS


def test_swapped_polls(tmp_path: Path) -> None:
    """Repeats two polls that got each other's answer."""
    with make_scenario(tmp_path, fault_first_polls(2, lambda _: ProxyFault(ProxyFaultKind.SWAP)), leads=12) as scenario:
        scenario.run_job()
        assert scenario.answered_count() == 12
        assert scenario.proxy.fault_counts["GET swap"]


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 3])
def test_poll_gets_other_task(tmp_path: Path, times: int) -> None:
    """Polls the task until its own answer comes."""
    with make_scenario(tmp_path, fault_first_polls(times, lambda _: ProxyFault(ProxyFaultKind.OTHER_TASK))) as scenario:
        summary = scenario.run_job()
        assert (summary.exit_code, scenario.answered_count()) == (0, LEADS)
        assert scenario.proxy.fault_counts["GET another"]


@pytest.mark.long
def test_polls_get_other_task_permanently(tmp_path: Path) -> None:
    """Leaves the tasks open and collects them when the API works again."""
    with make_scenario(
        tmp_path, fault_first_polls(10_000, lambda _: ProxyFault(ProxyFaultKind.OTHER_TASK)), leads=12
    ) as scenario:
        first = scenario.run_job(NO_YOUNG_TIMEOUTS, RunOptions(max_time_s=5.0))
        assert first.exit_code in UNFINISHED_EXIT_CODES
        assert scenario.statuses()["pending"] >= 10
        scenario.proxy.clear_faults()
        second = scenario.run_job()
        assert (second.exit_code, second.submitted, scenario.answered_count()) == (0, 0, 12)


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 2])
def test_poll_gets_unknown_task(tmp_path: Path, times: int) -> None:
    """Ignores an answer with an unknown id."""
    with make_scenario(
        tmp_path, fault_first_polls(times, lambda _: ProxyFault(ProxyFaultKind.UNKNOWN_TASK))
    ) as scenario:
        summary = scenario.run_job()
        assert (summary.exit_code, scenario.answered_count()) == (0, LEADS)


@pytest.mark.long
def test_invalid_response_permanently_for_one_row(tmp_path: Path) -> None:
    """The row stays open with a reason, the others are answered; it is collected when the API works again."""
    affected_leads: list[str] = []

    def choose(exchange: Exchange) -> ProxyFault | None:
        if not exchange.is_poll:
            return None
        if len(affected_leads) < 3 and exchange.task_id not in affected_leads:
            affected_leads.append(exchange.task_id)
        return (
            ProxyFault(ProxyFaultKind.UNKNOWN_TASK, task_id=f"not-{exchange.task_id}")
            if exchange.task_id in affected_leads
            else None
        )

    with make_scenario(tmp_path, choose) as scenario:
        first = scenario.run_job(NO_YOUNG_TIMEOUTS, RunOptions(max_time_s=10.0))
        assert first.exit_code in UNFINISHED_EXIT_CODES
        assert scenario.statuses()["pending"] == 3
        unanswered = [row for row in scenario.workspace.read_output() if row["enrich_status"] == "pending"]
        assert all(row["enrich_error"] for row in unanswered)
        scenario.proxy.clear_faults()
        second = scenario.run_job()
        assert (second.exit_code, second.submitted, scenario.answered_count()) == (0, 0, LEADS)


@pytest.mark.long
def test_invalid_responses_stop_submitting(tmp_path: Path) -> None:
    """Stops sending when the API answers for unknown tasks; open tasks are collected later."""
    job = JOB.replace("1000}", "1000, in_flight: 25}")
    choose_fault = fault_first_polls(
        10_000, lambda exchange: ProxyFault(ProxyFaultKind.UNKNOWN_TASK, task_id=f"not-{exchange.task_id}")
    )
    with make_scenario(tmp_path, choose_fault, leads=80, job=job) as scenario:
        first = scenario.run_job(NO_YOUNG_TIMEOUTS, RunOptions(max_time_s=20.0))
        assert first.exit_code == 4
        assert first.submitted < 80
        assert scenario.answered_count() == 0
        scenario.proxy.clear_faults()
        second = scenario.run_job()
        assert (second.exit_code, first.submitted + second.submitted, scenario.answered_count()) == (0, 80, 80)


def reuse_first_id(kind: ProxyFaultKind) -> ChooseFault:
    """Answer the second to fourth POST with the first one's id."""
    return lambda exchange: ProxyFault(kind) if exchange.is_post and 2 <= exchange.number <= 4 else None


@pytest.mark.long
def test_duplicate_task_id_sequential(tmp_path: Path) -> None:
    """The first lead keeps the id; the others stay in doubt because their own ids are unknown."""
    with make_scenario(tmp_path, reuse_first_id(ProxyFaultKind.FIRST_AFTER_POLL), leads=8) as scenario:
        first = scenario.run_job()
        assert (first.exit_code, len(scenario.leads_in_doubt())) == (14, 3)
        errors = [row["enrich_error"] for row in scenario.workspace.read_output() if row["enrich_status"] == "in_doubt"]
        assert all(DUPLICATE_ID_MESSAGE in error for error in errors), errors
        assert scenario.answered_count() == 5
        in_doubt = scenario.leads_in_doubt()
        scenario.proxy.clear_faults()
        second = scenario.run_job()
        assert (second.exit_code, second.submitted, scenario.leads_in_doubt()) == (14, 0, in_doubt)


def test_duplicate_task_id_concurrent(tmp_path: Path) -> None:
    """Nothing shows which request the id belongs to: at most one of the four has its answer."""
    with make_scenario(tmp_path, reuse_first_id(ProxyFaultKind.FIRST_AT_ONCE), leads=8) as scenario:
        scenario.workspace.run_job(dataclasses.replace(scenario.api, base_url=scenario.proxy.base_url), timing=TIMEOUTS)
        rows = [row for row in scenario.workspace.read_output() if row["enrich_status"] in ANSWER_STATUSES]
        assert max(Counter(row["enrich_task_id"] for row in rows).values()) == 1
        assert max(Counter(row["work_email"] for row in rows if row["work_email"]).values(), default=1) == 1
        assert scenario.leads_in_doubt()  # how many depends on how many POSTs were in flight together
        assert scenario.api.audit()["accepted_more_than_once"] == 0


@pytest.mark.long
def test_duplicate_task_id_in_bulk(tmp_path: Path) -> None:
    """All leads of a bulk task with another task's id are in doubt."""
    job = f"{JOB}dispatch: {{bulk: 4}}\n"
    with make_scenario(
        tmp_path,
        lambda one: ProxyFault(ProxyFaultKind.FIRST_AFTER_POLL) if one.is_post and one.number > 1 else None,
        12,
        job,
    ) as scenario:
        summary = scenario.run_job()
        assert (summary.exit_code, scenario.answered_count(), len(scenario.leads_in_doubt())) == (14, 4, 8)


@pytest.mark.long
def test_duplicate_task_id_from_earlier_run(tmp_path: Path) -> None:
    """Detects an id that an earlier run received."""
    with make_scenario(
        tmp_path,
        lambda one: ProxyFault(ProxyFaultKind.FIRST_AFTER_POLL) if one.number > 4 and one.is_post else None,
        leads=4,
    ) as scenario:
        assert scenario.run_job().exit_code == 0
        scenario.workspace.write_leads(make_leads(8))
        second = scenario.run_job()
        assert (second.exit_code, scenario.answered_count(), len(scenario.leads_in_doubt())) == (14, 4, 4)


@pytest.mark.long
def test_same_task_id_for_same_request(tmp_path: Path) -> None:
    """An API that returns the same id for the same request leaves nothing in doubt."""
    with make_scenario(
        tmp_path,
        lambda one: ProxyFault(ProxyFaultKind.FIRST_AFTER_POLL) if one.number > 1 and one.is_post else None,
        leads=1,
        hit_rate=0.0,
    ) as scenario:
        assert scenario.run_job().exit_code == 0
        scenario.workspace.write_job(policy="{refresh: {not_found: 0d}}")
        api = dataclasses.replace(scenario.api, base_url=scenario.proxy.base_url)
        second = scenario.workspace.run_job(api, timing=TIMEOUTS)
        assert (second.exit_code, second.submitted) == (0, 1)
        assert scenario.statuses() == {"not_found": 1}


STEPS_JOB = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - {name: email, waterfall: email_getter, params: {first_name: First Name, last_name: Last Name, company: Website},
     columns: {work_email: email}}
"""


@pytest.mark.long
@pytest.mark.parametrize("job", [JOB, STEPS_JOB], ids=["job", "steps"])
def test_price_of_result_that_came_again(tmp_path: Path, job: str) -> None:
    """A result that the API returns again from its cache keeps its price: the file's sum is the bill."""
    with make_scenario(
        tmp_path,
        lambda one: ProxyFault(ProxyFaultKind.FIRST_AFTER_POLL) if one.number > 1 and one.is_post else None,
        leads=1,
        job=job + "policy: {refresh: {found: 0d}}\n",
        hit_rate=1.0,
    ) as scenario:
        api = dataclasses.replace(scenario.api, base_url=scenario.proxy.base_url)
        first, second = [scenario.workspace.run_job(api, timing=TIMEOUTS) for _ in range(2)]
        assert (second.submitted, second.credits_spent, second.found) == (1, 0, 1)
        (row,) = scenario.workspace.read_output()
        assert float(row["enrich_credits"]) == first.credits_spent > 0


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("status", first_quick(1, [201, 202, 203, 206, 299]))
def test_any_2xx_with_task_id_is_accepted(tmp_path: Path, status: int, *, bulk: bool) -> None:
    """Any 2xx with a task id means that the task was accepted."""
    job = f"{JOB}dispatch: {{bulk: 5}}\n" if bulk else JOB
    with make_scenario(
        tmp_path, every_nth(1, ProxyFault(ProxyFaultKind.STATUS, status=status), "POST"), 10, job
    ) as scenario:
        summary = scenario.run_job()
        assert (summary.exit_code, summary.submitted, scenario.answered_count()) == (0, 10, 10)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["POST", "GET"])
def test_truncated_responses(tmp_path: Path, kind: str) -> None:
    """A truncated response leaves a POST in doubt; a poll is repeated."""
    with make_scenario(tmp_path, every_nth(4, ProxyFault(ProxyFaultKind.TRUNCATED), kind)) as scenario:
        scenario.run_job()
        assert len(scenario.leads_in_doubt()) == (LEADS // 4 if kind == "POST" else 0)
        assert scenario.answered_count() == LEADS - len(scenario.leads_in_doubt())


@pytest.mark.long
def test_short_404s_do_not_expire_task(tmp_path: Path) -> None:
    """Four quick 404s in a row do not expire a task, even with short timeouts."""
    with make_scenario(
        tmp_path, fault_first_polls(4, lambda _: ProxyFault(ProxyFaultKind.STATUS, status=404)), leads=6
    ) as scenario:
        summary = scenario.run_job(replace(TIMEOUTS, young_task_s=0.05))
        assert (summary.exit_code, scenario.answered_count()) == (0, 6)


@pytest.mark.long
def test_expired_task_polled_by_next_run(tmp_path: Path) -> None:
    """After a 404 that expired a task, the next run polls once more at no cost and collects the answer."""
    with make_scenario(
        tmp_path, fault_first_polls(10_000, lambda _: ProxyFault(ProxyFaultKind.STATUS, status=404)), leads=6
    ) as scenario:
        first = scenario.run_job(replace(TIMEOUTS, young_task_s=0.2))
        assert (first.exit_code, len(scenario.leads_in_doubt())) == (14, 6)
        scenario.proxy.clear_faults()
        second = scenario.run_job()
        assert (second.exit_code, second.submitted, scenario.answered_count()) == (0, 0, 6)


#: Responses in place of the account or the waterfall.
UNUSABLE_BODIES = {
    "a task": {"task_id": "x", "request_id": "x", "status": "completed", "data": [{"email": "x@elsewhere.example"}]},
    "another waterfall": {
        "identifier": "phone_getter",
        "name": "Phone",
        "available_enrichments": [],
        "email_verifiers": [],
    },
    "an account": {"first_name": "Sandra", "balance": 5.0, "plan": "sandbox", "workspace": "sandbox"},
    "a list": [],
    "nothing": {},
}


@pytest.mark.long
@pytest.mark.parametrize("path", ["/user/me", "/waterfalls/email_getter"])
@pytest.mark.parametrize("body_name", UNUSABLE_BODIES)
def test_misdelivered_user_or_waterfall_response(tmp_path: Path, path: str, body_name: str) -> None:
    """Requests the account or waterfall again when the response is another's; the run continues normally."""
    if (path, body_name) == ("/user/me", "an account"):
        pytest.skip("an answer to it")
    faulty_paths: list[str] = []

    def choose(exchange: Exchange) -> ProxyFault | None:
        if not exchange.path.endswith(path) or path in faulty_paths:
            return None
        faulty_paths.append(path)
        return ProxyFault(ProxyFaultKind.BODY, body=json.dumps(UNUSABLE_BODIES[body_name]).encode())

    with make_scenario(tmp_path, lambda _: None, leads=4) as scenario:
        assert scenario.run_job().exit_code == 0
        scenario.workspace.write_leads(make_leads(8))
        scenario.proxy.choose_fault = choose
        second = scenario.run_job()
        assert (faulty_paths, second.exit_code, second.submitted, scenario.answered_count()) == ([path], 0, 4, 8)


@pytest.mark.long
def test_duplicated_user_and_waterfall_responses(tmp_path: Path) -> None:
    """Repeated responses about account or waterfall answer no poll, and the reverse."""
    with make_scenario(
        tmp_path, every_nth(1, ProxyFault(ProxyFaultKind.REPEAT, 0.02), "OTHER", "GET"), leads=8
    ) as scenario:
        first = scenario.run_job()
        scenario.workspace.write_leads(make_leads(16))
        second = scenario.run_job()
        assert (first.exit_code, second.exit_code, scenario.answered_count()) == (0, 0, 16)
        assert first.balance_after is not None


FAULT_KINDS = {
    "POST": (
        ProxyFaultKind.REPEAT,
        ProxyFaultKind.UNSOLICITED,
        ProxyFaultKind.OTHER_TASK,
        ProxyFaultKind.TRUNCATED,
        ProxyFaultKind.STATUS,
    ),
    "GET": (
        ProxyFaultKind.REPEAT,
        ProxyFaultKind.UNSOLICITED,
        ProxyFaultKind.OTHER_TASK,
        ProxyFaultKind.SWAP,
        ProxyFaultKind.UNKNOWN_TASK,
        ProxyFaultKind.TRUNCATED,
    ),
}


@st.composite
def proxy_faults(draw: st.DrawFn, kind: str) -> ProxyFault | None:
    """Draw the fault of a response of this kind, or None."""
    if draw(st.booleans()):
        return None
    fault_kind = draw(st.sampled_from(FAULT_KINDS[kind]))
    status = draw(st.sampled_from((408, 429, 503) if fault_kind is ProxyFaultKind.UNSOLICITED else (201, 202, 203)))
    return ProxyFault(fault_kind, draw(st.sampled_from((0.0, 0.005, 0.03))), status)


@pytest.mark.long
# Without shrinking: each example is a whole run, so it would take minutes.
@settings(max_examples=examples(6), phases=[Phase.explicit, Phase.generate])
@given(
    posts=st.lists(proxy_faults("POST"), min_size=12, max_size=12),
    gets=st.lists(proxy_faults("GET"), min_size=20, max_size=60),
)
def test_random_response_faults(posts: list[ProxyFault | None], gets: list[ProxyFault | None]) -> None:
    """Every row has its own answer, or is in doubt where its POST was disturbed; the next run only improves it."""

    def choose(exchange: Exchange) -> ProxyFault | None:
        drawn = {"POST": posts, "GET": gets}.get(exchange.kind, [])
        return drawn[exchange.number - 1] if exchange.number <= len(drawn) else None

    faulty_posts = sum(fault is not None and fault.kind is not ProxyFaultKind.STATUS for fault in posts)
    with tempfile.TemporaryDirectory() as folder, make_scenario(Path(folder), choose, leads=12) as scenario:
        first = scenario.run_job(NO_YOUNG_TIMEOUTS)
        in_doubt = scenario.leads_in_doubt()
        pending = first.pending or 0  # on a busy machine the circuit breaker may end the run early
        assert scenario.answered_count() + len(in_doubt) + pending == 12
        assert len(in_doubt) <= faulty_posts
        scenario.proxy.clear_faults()
        second = scenario.run_job(NO_YOUNG_TIMEOUTS)
        assert second.submitted <= pending
        assert scenario.leads_in_doubt() <= in_doubt
