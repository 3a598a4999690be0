"""Whatever connections deliver to whom: every row has its own answer or none, and nothing is paid twice."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from enrich import poller
from enrich.execution import Timing
from enrich.receipt import Receipt
from enrich.sandbox import SandboxSettings
from enrich.surroundings import Options
from tests.cases import examples, first_quick
from tests.harness import CALM, HASTY, JOB, Api, Office, people, serving
from tests.out_of_step import Act, Choose, Exchange, Proxy, Trick, out_of_step
from tests.own_answers import ANSWERS, wrong_rows

LEADS = 40
#: Longer than any machine needs, but for a task that is not known.
TIMING = replace(HASTY, outage_s=15.0)
#: So that a 404 is not believed because of the time that passed.
SURE = replace(TIMING, young_s=60.0)
#: How a run may end that cannot fetch all answers.
UNFINISHED = {4, 13}
TWICE = "the API gave a task id twice"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again soon after a poll that failed."""
    monkeypatch.setattr(poller, "FAILED_POLL_S", 0.1, raising=False)


@dataclass
class Scene:
    """An office whose API is behind a proxy; `api` is the API itself."""

    office: Office
    api: Api
    proxy: Proxy
    settings: SandboxSettings = CALM
    bulk: bool = False

    def run(self, timing: Timing = TIMING, options: Options | None = None) -> Receipt:
        """Run the job through the proxy; no row may have another's answer, whatever happens."""
        receipt = self.office.run(replace(self.api, base_url=self.proxy.base_url), options, timing)
        self.check()
        return receipt

    def check(self) -> None:
        """Hold the output against the API: no row with another's answer, nothing paid twice, nothing lost."""
        audit, rows = self.api.audit(), self.office.output()
        assert wrong_rows(rows, audit, self.settings, bulk=self.bulk) == {}
        assert (audit["accepted_more_than_once"], audit["paid_twice"]) == (0, 0)
        accepted = {run["params"]["first_name"] for run in audit["runs"]}
        unsent = {row["First Name"] for row in rows if row["enrich_status"] == "pending"} - accepted
        assert {row["First Name"] for row in rows} == accepted | unsent | self.doubtful()

    def statuses(self) -> Counter[str]:
        """Count the rows by status."""
        return Counter(row["enrich_status"] for row in self.office.output())

    def answered(self) -> int:
        """Count the rows that have an answer."""
        return sum(count for status, count in self.statuses().items() if status in ANSWERS)

    def doubtful(self) -> set[str]:
        """Name the leads in doubt."""
        return {row["First Name"] for row in self.office.output() if row["enrich_status"] == "in_doubt"}


@contextmanager
def scene(folder: Path, choose: Choose, leads: int = LEADS, job: str = JOB, **api: object) -> Iterator[Scene]:
    """Set the scene: a job, its leads, and what the proxy does."""
    settings = replace(CALM, **api)  # type: ignore[arg-type]
    (folder / "office").mkdir()
    office = Office(folder / "office")
    office.write_job(job)
    office.write_leads(people(leads))
    with serving(folder / "api.db", settings) as served, out_of_step(served.base_url, choose) as proxy:
        yield Scene(office, served, proxy, settings, bulk="bulk" in job)


def every(number: int, trick: Trick, *kinds: str) -> Choose:
    """Play a trick with each so many-th request of these kinds, or of both."""
    concerned = kinds or ("POST", "GET")
    return lambda exchange: trick if exchange.kind in concerned and not exchange.number % number else None


def first_polls(number: int, make: Callable[[Exchange], Trick]) -> Choose:
    """Play a trick with the first polls of each task."""
    polls: Counter[str] = Counter()

    def choose(exchange: Exchange) -> Trick | None:
        if not exchange.is_poll:
            return None
        polls[exchange.task_id] += 1
        return make(exchange) if polls[exchange.task_id] <= number else None

    return choose


@pytest.mark.parametrize("after_s", first_quick(1, [0.03, 0.0]), ids=["30 ms later", "at once"])
@pytest.mark.parametrize(
    ("kinds", "share"),
    first_quick(1, [((), 1), (("POST",), 1), (("GET",), 1), ((), 4)]),
    ids=["all", "POST", "GET", "each 4th"],
)
def test_answers_come_twice(tmp_path: Path, kinds: tuple[str, ...], share: int, after_s: float) -> None:
    """A connection that says its answer again gives it to no other; a poll that it spoils is made again."""
    with scene(tmp_path, every(share, Trick(Act.REPEAT, after_s), *kinds)) as played:
        first = played.run()
        # An API all of whose POSTs are spoilt is left alone after a while.
        assert played.answered() + len(played.doubtful()) == LEADS or first.exit_code == 4
        assert sum(played.proxy.happened.values()) >= min(5, LEADS // share)
        played.proxy.heal()
        played.run()
        assert len(played.doubtful()) <= (0 if kinds == ("GET",) else LEADS // share)
        assert played.answered() == LEADS - len(played.doubtful())


@pytest.mark.long
def test_answers_come_twice_to_a_process(tmp_path: Path) -> None:
    """The program as a person starts it does the same."""
    with scene(tmp_path, every(1, Trick(Act.REPEAT, 0.03))) as played:
        api = replace(played.api, base_url=played.proxy.base_url)
        done = played.office.enrich("run", "job.yaml", "--json", api=api)
        played.check()
        assert done.code in (0, 14), done.stderr
        assert played.answered() + len(played.doubtful()) == LEADS


@pytest.mark.parametrize("after_s", first_quick(1, [0.02, 0.0]), ids=["20 ms later", "at once"])
@pytest.mark.parametrize("status", first_quick(2, [200, 404, 408, 429, 503]))
def test_answers_that_nobody_asked_for(tmp_path: Path, status: int, after_s: float) -> None:
    """What comes on an idle connection answers no request: none is refused or repeated because of it."""
    with scene(tmp_path, every(3, Trick(Act.UNASKED, after_s, status))) as played:
        played.run(SURE)
        assert len(played.doubtful()) <= LEADS // 3
        assert played.answered() == LEADS - len(played.doubtful())
        assert played.api.audit()["requests"]["run"] == LEADS


def test_polls_are_swapped(tmp_path: Path) -> None:
    """Two polls that get each other's answer are both made again."""
    with scene(tmp_path, first_polls(2, lambda _: Trick(Act.SWAP))) as played:
        played.run()
        assert played.answered() == LEADS
        assert played.proxy.happened["GET swap"]


@pytest.mark.parametrize("times", first_quick(1, [1, 3]))
def test_a_poll_gets_another_tasks_answer(tmp_path: Path, times: int) -> None:
    """However often: the task is polled until its own answer comes."""
    with scene(tmp_path, first_polls(times, lambda _: Trick(Act.ANOTHER))) as played:
        receipt = played.run()
        assert (receipt.exit_code, played.answered()) == (0, LEADS)
        assert played.proxy.happened["GET another"]


@pytest.mark.long
def test_polls_get_another_tasks_answer_for_ever(tmp_path: Path) -> None:
    """The tasks are left at the API, and fetched when it is well again."""
    with scene(tmp_path, first_polls(10_000, lambda _: Trick(Act.ANOTHER)), leads=12) as played:
        first = played.run(SURE, Options(max_time_s=2.0))
        assert first.exit_code in UNFINISHED
        assert played.statuses()["pending"] >= 10
        played.proxy.heal()
        second = played.run()
        assert (second.exit_code, second.submitted, played.answered()) == (0, 0, 12)


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 2])
def test_a_poll_gets_the_answer_of_a_task_that_nobody_has(tmp_path: Path, times: int) -> None:
    """An id that was never given is no answer."""
    with scene(tmp_path, first_polls(times, lambda _: Trick(Act.NOWHERE))) as played:
        receipt = played.run()
        assert (receipt.exit_code, played.answered()) == (0, LEADS)


@pytest.mark.long
def test_the_same_strange_answer_for_ever(tmp_path: Path) -> None:
    """Its row stays unanswered and says why; the others are answered; it is answered when the API is well again."""
    victims: list[str] = []

    def choose(exchange: Exchange) -> Trick | None:
        if not exchange.is_poll:
            return None
        if len(victims) < 3 and exchange.task_id not in victims:
            victims.append(exchange.task_id)
        return Trick(Act.NOWHERE, task_id=f"not-{exchange.task_id}") if exchange.task_id in victims else None

    with scene(tmp_path, choose) as played:
        first = played.run(SURE, Options(max_time_s=10.0))
        assert first.exit_code in UNFINISHED
        assert played.statuses()["pending"] == 3
        unanswered = [row for row in played.office.output() if row["enrich_status"] == "pending"]
        assert all(row["enrich_error"] for row in unanswered)
        played.proxy.heal()
        second = played.run()
        assert (second.exit_code, second.submitted, played.answered()) == (0, 0, LEADS)


@pytest.mark.long
def test_strange_answers_to_everybody_stop_the_sending(tmp_path: Path) -> None:
    """An API that answers for tasks that nobody has gets no more leads; what it has is fetched later."""
    job = JOB.replace("1000}", "1000, in_flight: 25}")
    strange = first_polls(10_000, lambda exchange: Trick(Act.NOWHERE, task_id=f"not-{exchange.task_id}"))
    with scene(tmp_path, strange, leads=80, job=job) as played:
        first = played.run(SURE, Options(max_time_s=20.0))
        assert first.exit_code == 4
        assert first.submitted < 80
        assert played.answered() == 0
        played.proxy.heal()
        second = played.run()
        assert (second.exit_code, first.submitted + second.submitted, played.answered()) == (0, 80, 80)


def one_id_for_four(act: Act) -> Choose:
    """Answer the second to fourth POST with the first one's id."""
    return lambda exchange: Trick(act) if exchange.is_post and 2 <= exchange.number <= 4 else None


def test_one_id_for_four_posts(tmp_path: Path) -> None:
    """The first keeps it; the others are in doubt and stay so, as nobody knows their own ids."""
    with scene(tmp_path, one_id_for_four(Act.FIRST), leads=8) as played:
        first = played.run()
        assert (first.exit_code, len(played.doubtful())) == (14, 3)
        errors = [row["enrich_error"] for row in played.office.output() if row["enrich_status"] == "in_doubt"]
        assert all(TWICE in error for error in errors), errors
        assert played.answered() == 5
        doubtful = played.doubtful()
        played.proxy.heal()
        second = played.run()
        assert (second.exit_code, second.submitted, played.doubtful()) == (14, 0, doubtful)


def test_one_id_for_four_posts_at_once(tmp_path: Path) -> None:
    """Nothing shows whose it is: at most one of the four has its answer."""
    with scene(tmp_path, one_id_for_four(Act.SHARED), leads=8) as played:
        played.office.run(replace(played.api, base_url=played.proxy.base_url), timing=TIMING)
        rows = [row for row in played.office.output() if row["enrich_status"] in ANSWERS]
        assert max(Counter(row["enrich_task_id"] for row in rows).values()) == 1
        assert max(Counter(row["work_email"] for row in rows if row["work_email"]).values(), default=1) == 1
        assert len(played.doubtful()) >= 3
        assert played.api.audit()["accepted_more_than_once"] == 0


def test_one_id_for_all_bulk_tasks(tmp_path: Path) -> None:
    """All leads of a bulk task whose id another has are in doubt."""
    job = f"{JOB}dispatch: {{bulk: 4}}\n"
    with scene(tmp_path, lambda one: Trick(Act.FIRST) if one.is_post and one.number > 1 else None, 12, job) as played:
        receipt = played.run()
        assert (receipt.exit_code, played.answered(), len(played.doubtful())) == (14, 4, 8)


def test_an_id_of_an_earlier_run(tmp_path: Path) -> None:
    """The ledger remembers whose an id is."""
    with scene(tmp_path, lambda one: Trick(Act.FIRST) if one.number > 4 and one.is_post else None, leads=4) as played:
        assert played.run().exit_code == 0
        played.office.write_leads(people(8))
        second = played.run()
        assert (second.exit_code, played.answered(), len(played.doubtful())) == (14, 4, 4)


def test_the_same_id_for_the_same_question_is_accepted(tmp_path: Path) -> None:
    """An API that remembers what it answered gives the id again: that is no doubt."""
    with scene(
        tmp_path, lambda one: Trick(Act.FIRST) if one.number > 1 and one.is_post else None, leads=1, hit_rate=0.0
    ) as played:
        assert played.run().exit_code == 0
        played.office.write_job(policy="{refresh: {not_found: 0d}}")
        api = replace(played.api, base_url=played.proxy.base_url)
        second = played.office.run(api, timing=TIMING)
        assert (second.exit_code, second.submitted) == (0, 1)
        assert played.statuses() == {"not_found": 1}


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("status", first_quick(1, [201, 202, 203, 206, 299]))
def test_any_success_with_an_id_is_an_acceptance(tmp_path: Path, status: int, *, bulk: bool) -> None:
    """The task was accepted, whichever 2xx says so."""
    job = f"{JOB}dispatch: {{bulk: 5}}\n" if bulk else JOB
    with scene(tmp_path, every(1, Trick(Act.STATUS, status=status), "POST"), 10, job) as played:
        receipt = played.run()
        assert (receipt.exit_code, receipt.submitted, played.answered()) == (0, 10, 10)


@pytest.mark.parametrize("kind", first_quick(1, ["POST", "GET"]))
def test_answers_end_in_the_middle(tmp_path: Path, kind: str) -> None:
    """A POST is in doubt then; a poll is made again."""
    with scene(tmp_path, every(4, Trick(Act.CUT), kind)) as played:
        played.run()
        assert len(played.doubtful()) == (LEADS // 4 if kind == "POST" else 0)
        assert played.answered() == LEADS - len(played.doubtful())


def test_a_few_404s_are_not_believed(tmp_path: Path) -> None:
    """However soon they come and however little is waited for: four in a row say nothing of a task."""
    with scene(tmp_path, first_polls(4, lambda _: Trick(Act.STATUS, status=404)), leads=6) as played:
        receipt = played.run(replace(TIMING, young_s=0.05))
        assert (receipt.exit_code, played.answered()) == (0, 6)


def test_a_task_that_was_unknown_long_enough_is_asked_for_again(tmp_path: Path) -> None:
    """A 404 is believed in the end, but the next run asks once more, which costs nothing, and fetches the answer."""
    with scene(tmp_path, first_polls(10_000, lambda _: Trick(Act.STATUS, status=404)), leads=6) as played:
        first = played.run(replace(TIMING, young_s=0.2))
        assert (first.exit_code, len(played.doubtful())) == (14, 6)
        played.proxy.heal()
        second = played.run()
        assert (second.exit_code, second.submitted, played.answered()) == (0, 0, 6)


#: What comes for a question about the account or the waterfall.
STRANGE = {
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


@pytest.mark.parametrize("where", ["/user/me", "/waterfalls/email_getter"])
@pytest.mark.parametrize("what", first_quick(1, STRANGE, single=True))
def test_a_question_about_the_account_or_the_waterfall_gets_anothers_answer(
    tmp_path: Path, where: str, what: str
) -> None:
    """What is no answer to it is asked for again: the run goes on as if it had not come."""
    if (where, what) == ("/user/me", "an account"):
        pytest.skip("an answer to it")
    odd: list[str] = []

    def choose(exchange: Exchange) -> Trick | None:
        if not exchange.path.endswith(where) or where in odd:
            return None
        odd.append(where)
        return Trick(Act.BODY, body=json.dumps(STRANGE[what]).encode())

    with scene(tmp_path, lambda _: None, leads=4) as played:
        assert played.run().exit_code == 0
        played.office.write_leads(people(8))
        played.proxy.choose = choose
        second = played.run()
        assert (odd, second.exit_code, second.submitted, played.answered()) == ([where], 0, 4, 8)


def test_other_answers_come_twice(tmp_path: Path) -> None:
    """What the API says of the account and the waterfall is no answer to a poll, nor the other way round."""
    with scene(tmp_path, every(1, Trick(Act.REPEAT, 0.02), "OTHER", "GET"), leads=8) as played:
        first = played.run()
        played.office.write_leads(people(16))
        second = played.run()
        assert (first.exit_code, second.exit_code, played.answered()) == (0, 0, 16)
        assert first.balance_after is not None


TRICKS = {
    "POST": (Act.REPEAT, Act.UNASKED, Act.ANOTHER, Act.CUT, Act.STATUS),
    "GET": (Act.REPEAT, Act.UNASKED, Act.ANOTHER, Act.SWAP, Act.NOWHERE, Act.CUT),
}


@st.composite
def tricks(draw: st.DrawFn, kind: str) -> Trick | None:
    """Draw what happens to an answer of this kind, if anything."""
    if draw(st.booleans()):
        return None
    act = draw(st.sampled_from(TRICKS[kind]))
    status = draw(st.sampled_from((408, 429, 503) if act is Act.UNASKED else (201, 202, 203)))
    return Trick(act, draw(st.sampled_from((0.0, 0.005, 0.03))), status)


@pytest.mark.long
# Each example is a whole run: to make one smaller would take minutes.
@settings(max_examples=examples(10), phases=[Phase.explicit, Phase.generate])
@given(
    posts=st.lists(tricks("POST"), min_size=12, max_size=12),
    gets=st.lists(tricks("GET"), min_size=20, max_size=60),
)
def test_in_any_order_of_disturbances(posts: list[Trick | None], gets: list[Trick | None]) -> None:
    """A row is answered with its own, or in doubt where its POST was disturbed; the next run only makes it better."""

    def choose(exchange: Exchange) -> Trick | None:
        drawn = {"POST": posts, "GET": gets}.get(exchange.kind, [])
        return drawn[exchange.number - 1] if exchange.number <= len(drawn) else None

    disturbed = sum(trick is not None and trick.act is not Act.STATUS for trick in posts)
    with tempfile.TemporaryDirectory() as folder, scene(Path(folder), choose, leads=12) as played:
        played.run(SURE)
        doubtful = played.doubtful()
        assert played.answered() + len(doubtful) == 12
        assert len(doubtful) <= disturbed
        played.proxy.heal()
        second = played.run(SURE)
        assert second.submitted == 0
        assert played.doubtful() <= doubtful
