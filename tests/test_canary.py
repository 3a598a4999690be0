"""The canary: the first answers are judged before the rest is bought."""

from __future__ import annotations

from pathlib import Path

import pytest

from enrich.canary import judge
from enrich.errors import Exit
from enrich.model import State
from enrich.sandbox.databar import Databar
from enrich.sandbox.questions import Refused
from enrich.spec import Canary
from enrich.surroundings import Options
from tests.cases import first_quick, in_turn
from tests.harness import BOTH_IN_TIME, Office, kill, people, serving, until

LEADS = 30
CANARY = "{rows: 6, min_hit_rate: 0.5}"


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


@pytest.fixture
def careful(office: Office) -> Office:
    """Make an office whose job has a canary of six."""
    office.write_job(canary=CANARY)
    office.write_leads(people(LEADS))
    return office


def test_good_answers_release_the_rest(tmp_path: Path, careful: Office) -> None:
    """Nobody notices a canary that lives."""
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        receipt = careful.run(api)
    assert (receipt.exit_code, receipt.submitted, receipt.found) == (0, LEADS, LEADS)


def test_bad_answers_stop_the_run(tmp_path: Path, careful: Office) -> None:
    """Exit 15 with what was seen; only the first were paid, the rest is pending, the old output stays."""
    (careful.folder / "out.csv").write_text("of yesterday\n")
    with serving(tmp_path / "api.db", hit_rate=0.0) as api:
        done = careful.command("run", "job.yaml", "--json", api=api)
        assert api.audit()["accepted"] == 6

    assert (done.code, done.receipt["submitted"], done.receipt["pending"]) == (15, 6, LEADS - 6)
    assert "0 of 6 answers found something (0%), at least 50% were wished for; 6 not_found" in done.stderr
    assert (careful.folder / "out.csv").read_text() == "of yesterday\n"


def test_started_again_it_judges_the_next(tmp_path: Path, careful: Office) -> None:
    """What was asked stays answered; each start risks no more than the canary's rows."""
    with serving(tmp_path / "api.db", hit_rate=0.0) as api:
        nights = [careful.run(api) for _ in range(3)]
        assert (api.audit()["accepted"], api.audit()["paid_twice"]) == (18, 0)
    assert [(night.exit_code, night.submitted, night.reused) for night in nights] == [
        (15, 6, 0),
        (15, 6, 6),
        (15, 6, 12),
    ]


@pytest.mark.parametrize(("leads", "limit"), first_quick(1, [(5, None), (6, None), (LEADS, 4), (LEADS, 6)]))
def test_with_no_more_wanted_than_the_canary_nothing_is_judged(
    tmp_path: Path, careful: Office, leads: int, limit: int | None
) -> None:
    """There is no rest to protect."""
    careful.write_leads(people(leads))
    with serving(tmp_path / "api.db", hit_rate=0.0) as api:
        receipt = careful.run(api, Options(limit=limit))
    assert (receipt.exit_code, receipt.submitted) == (0, limit or leads)


def test_a_limit_above_the_canary_holds_for_both_together(tmp_path: Path, careful: Office) -> None:
    """The canary's rows are among those that the limit allows."""
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        receipt = careful.run(api, Options(limit=10))
        assert api.audit()["accepted"] == 10
    assert (receipt.exit_code, receipt.submitted, receipt.pending) == (0, 10, LEADS - 10)


def test_failures_at_no_charge_stop_it_too(tmp_path: Path, careful: Office) -> None:
    """An API that fails every task is asked six times, although each of them could be asked again."""
    with serving(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0) as api:
        receipt = careful.run(api)
        assert api.audit()["accepted"] == 6
    assert (receipt.exit_code, receipt.submitted, receipt.pending) == (15, 6, LEADS)


def test_doubts_are_no_answers(tmp_path: Path, careful: Office) -> None:
    """When nothing is known of the first, nothing more is risked."""
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        api.fault("error-after", 100)
        receipt = careful.run(api)
        assert api.audit()["accepted"] == 6
    assert (receipt.exit_code, receipt.in_doubt) == (15, 6)
    assert "no answer came" in str(receipt.error)


def test_what_the_api_refuses_counts_among_the_first(
    tmp_path: Path, careful: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping that every row is refused for is noticed after six, not after all."""

    def refuse(*_: object) -> str:
        raise Refused({"error": "INVALID_PARAMS", "rows": [{"position": 1, "fields": {"company": ["Bad."]}}]})

    monkeypatch.setattr(Databar, "submit", refuse)
    with serving(tmp_path / "api.db") as api:
        receipt = careful.run(api)
        assert api.audit()["requests"]["run"] == 6
    assert (receipt.exit_code, receipt.failed, receipt.pending) == (15, 6, LEADS - 6)


def test_answers_that_do_not_come_in_time_stop_it(tmp_path: Path, careful: Office) -> None:
    """Beyond the patience nothing was seen: exit 15, and the next run collects what was bought."""
    careful.write_job(canary=CANARY, policy="{patience: 1s}")
    with serving(tmp_path / "api.db", latency="fixed(60)", hit_rate=1.0) as api:
        receipt = careful.run(api)
        assert (receipt.exit_code, receipt.submitted) == (15, 6)
        api.advance(120)
        careful.write_leads(people(6))
        assert careful.run(api).found == 6
        assert api.audit()["accepted"] == 6


def test_refusals_by_the_rate_do_not_count(tmp_path: Path, careful: Office) -> None:
    """A 429 is no answer about a lead."""
    with serving(tmp_path / "api.db", hit_rate=0.0) as api:
        api.fault("rate-limit", 5, "post", retry_after=0)
        receipt = careful.run(api)
        assert api.audit()["accepted"] == 6
    assert (receipt.exit_code, receipt.submitted) == (15, 6)


def test_the_cap_comes_before_the_canary(tmp_path: Path, careful: Office) -> None:
    """Who ran out of credits among the first is told that."""
    careful.write_job(canary=CANARY, limits="{requests_per_second: 1000, max_credits: 4, in_flight: 1}")
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        receipt = careful.run(api)
        assert api.audit()["credits_charged"] <= 4
    assert receipt.exit_code == Exit.CREDITS
    assert receipt.submitted < 6


@pytest.mark.long
def test_a_kill_among_the_first_costs_nothing_twice(tmp_path: Path, careful: Office) -> None:
    """Kill -9 in the middle of the canary: the next start collects its answers and judges six of its own."""
    with serving(tmp_path / "api.db", hit_rate=0.0, latency="fixed(60)") as api:
        process = careful.start("run", "job.yaml", api=api)
        try:
            until(lambda: api.audit()["accepted"] == 6)
        finally:
            kill(process)
        api.advance(120)
    with serving(tmp_path / "api.db", hit_rate=0.0) as api:
        receipt = careful.run(api)
        assert (receipt.exit_code, receipt.submitted) == (15, 6)
        assert (api.audit()["accepted"], api.audit()["paid_twice"]) == (12, 0)


@in_turn("of", [7, 20, 100])
def test_a_share_that_is_met_exactly_is_enough(of: int) -> None:
    """11 of 20 are 55 %, however a computer writes 0.55."""
    for found in range(1, of + 1):
        canary = Canary(rows=of, min_hit_rate=found / of)
        assert judge(canary, {State.FOUND: found, State.NOT_FOUND: of - found}) is None
        assert judge(canary, {State.FOUND: found - 1, State.NOT_FOUND: of - found + 1}) is not None


@pytest.mark.long
def test_what_is_asked_again_is_no_canary(tmp_path: Path, careful: Office) -> None:
    """Misses that are due are misses again: only leads that were never answered are sent first, and judged."""
    with serving(tmp_path / "api.db", hit_rate=0.5) as api:
        careful.write_job(ledger="scout.db", output="scout.csv")
        careful.run(api)
        found = {row["Last Name"] for row in careful.output("scout.csv") if row["enrich_status"] == "found"}
        misses = [row for row in people(LEADS) if row[1] not in found]
        hits = [row for row in people(LEADS) if row[1] in found]
        assert min(len(misses), len(hits)) > 6
        careful.write_leads(misses)
        careful.write_job()
        assert careful.run(api).not_found == len(misses)

        careful.write_leads([*misses, *hits])
        careful.write_job(canary=CANARY, policy="{refresh: {not_found: 0s}}")
        receipt = careful.run(api)

    assert (receipt.exit_code, receipt.submitted, receipt.found) == (0, LEADS, len(hits))


def test_only_what_is_new_is_judged(tmp_path: Path, careful: Office) -> None:
    """Due answers that come back do not hide that the new leads find nothing."""
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        careful.write_job()
        careful.run(api)
    careful.write_leads([*people(LEADS), *people(10, start=LEADS)])
    careful.write_job(canary=CANARY, policy="{refresh: {found: 0s}}")

    with serving(tmp_path / "api.db", hit_rate=0.0) as api:
        stopped = careful.run(api)

    assert (stopped.exit_code, stopped.submitted) == (15, 6)
    assert "0 of 6 answers" in (stopped.error or "")
