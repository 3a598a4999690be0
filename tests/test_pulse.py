"""The pulse: what an execution writes down of itself while it is at work, and that it is what happened."""

from __future__ import annotations

import json
import sqlite3
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.pulse import MOST_BINS, Counts, Doing, Meter, Pulse, Traffic, read_pulse
from enrich.store.ledger import Ledger
from tests.cases import in_turn
from tests.harness import BOTH_IN_TIME, Api, Office, people, serving

#: Seconds until the next tick, and what happened until then.
TICKS = st.lists(
    st.tuples(st.floats(0, 5_000) | st.floats(0, 3), st.builds(Counts, *[st.integers(0, 500)] * 4)),
    max_size=60,
)


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def add(one: Counts, other: Counts) -> Counts:
    """Add up what happened."""
    return Counts(*(a + b for a, b in zip(one, other, strict=True)))


@given(TICKS)
def test_nothing_is_lost_however_the_ticks_come(ticks: list[tuple[float, Counts]]) -> None:
    """Late, in bursts or at once: the bins add up to what happened, and there are never many of them."""
    meter, at_s, seen = Meter(), 0.0, Counts()
    for passed_s, happened in ticks:
        at_s, seen = at_s + passed_s, add(seen, happened)
        meter.count(at_s, seen)

    traffic = meter.traffic()
    assert traffic.totals() == seen
    assert len(traffic.submitted) == (int(at_s // traffic.width_s) + 1 if ticks else 0)
    assert len({len(bins) for bins in (traffic.submitted, traffic.answered, traffic.polls, traffic.rate_limited)}) == 1
    assert len(traffic.submitted) <= MOST_BINS


@given(TICKS)
def test_merged_bins_are_those_that_were_that_wide_from_the_start(ticks: list[tuple[float, Counts]]) -> None:
    """Each tick falls into the bin of its time, whatever was merged since."""
    meter, seen = Meter(), Counts()
    times = list(accumulate(passed_s for passed_s, _ in ticks))
    for at_s, (_, happened) in zip(times, ticks, strict=True):
        seen = add(seen, happened)
        meter.count(at_s, seen)

    traffic = meter.traffic()
    expected = [0] * len(traffic.polls)
    for at_s, (_, happened) in zip(times, ticks, strict=True):
        expected[int(at_s // traffic.width_s)] += happened.polls
    assert list(traffic.polls) == expected


def test_a_process_that_was_stopped_leaves_zeros() -> None:
    """An hour without a tick is an hour of nothing, and what comes then comes then."""
    meter = Meter()
    meter.count(0.5, Counts(submitted=3))
    meter.count(3600.5, Counts(submitted=5))

    traffic = meter.traffic()
    assert (traffic.submitted[0], sum(traffic.submitted[1:-1]), traffic.submitted[-1]) == (3, 0, 2)
    assert traffic.width_s == 16


def test_a_clock_that_goes_back_moves_nothing() -> None:
    """What happened counts for the latest moment that was told; a count that fell is none."""
    meter = Meter()
    meter.count(5.0, Counts(polls=4))
    meter.count(1.0, Counts(polls=6))
    meter.count(5.5, Counts(polls=2))

    assert meter.traffic().polls == (0, 0, 0, 0, 0, 6)


def test_the_speed_is_that_of_the_last_seconds() -> None:
    """The bin that has only begun counts for as long as it lasts."""
    traffic = Traffic(
        width_s=4, submitted=(40, 8, 4, 4, 1), answered=(0, 0, 4, 6, 1), polls=(0,) * 5, rate_limited=(0,) * 5
    )

    lately, over_s = traffic.lately(elapsed_s=16.5)

    assert (lately.submitted, lately.answered, over_s) == (17, 11, 12.5)
    assert traffic.lately(0.0) == (Counts(57, 11), 0.0)


@in_turn("text", [None, "", "{}", "[]", '{"at_ms": 1}'])
def test_what_is_no_pulse_is_none(text: str | None) -> None:
    """An execution of an older version has none."""
    assert read_pulse(text) is None


def pulse_of(office: Office, execution: int = 1) -> Pulse:
    """Read what an execution has written down."""
    with_ledger = office.ledger()
    pulse = read_pulse(with_ledger.execution(execution)["pulse"])
    with_ledger.close()
    assert pulse is not None
    return pulse


def assert_tells(pulse: Pulse, receipt: Any) -> None:
    """The pulse ends with the numbers of the receipt."""
    totals = pulse.traffic.totals()
    assert (totals.submitted, totals.polls, totals.rate_limited) == (
        receipt.submitted,
        receipt.polls,
        receipt.rate_limited,
    )
    assert pulse.spent == round(receipt.credits_spent * 1_000_000)
    assert pulse.done == sum(pulse.states.values())
    assert pulse.elapsed_s <= receipt.elapsed_s + 0.001


def test_the_last_pulse_is_the_receipt(tmp_path: Path, office: Office) -> None:
    """All that was sent and heard is in it, also when some of it was told to wait."""
    office.write_leads(people(15))
    with serving(tmp_path / "api.db", rate=100.0, burst=1, retry_after=None) as api:
        receipt = office.run(api)

    pulse = pulse_of(office)
    assert receipt.exit_code == 0
    assert_tells(pulse, receipt)
    assert pulse.traffic.totals().answered == pulse.done == pulse.total == 15
    assert (pulse.found, pulse.in_flight, pulse.doing) == (receipt.found, 0, Doing.COLLECT)


def test_the_canary_and_what_was_left_count_too(tmp_path: Path, office: Office) -> None:
    """What an earlier execution left is heard by this one; a run that its canary ends has its pulse."""
    office.write_leads(people(3))
    with serving(tmp_path / "api.db", latency="fixed(600)") as api:
        office.leave_at_the_api(api)
    with serving(tmp_path / "api.db", hit_rate=0.0) as api:
        api.advance(601)
        office.write_job(canary="{rows: 2, min_hit_rate: 1.0}")
        office.write_leads(people(20))
        receipt = office.run(api)

    pulse = pulse_of(office, 2)
    assert receipt.exit_code == 15
    assert_tells(pulse, receipt)
    assert (pulse.done, pulse.total) == (3 + 2, 3 + 17)


def test_an_interrupted_or_refused_run_has_its_pulse(api: Api, office: Office) -> None:
    """A doubt is an end for this execution; a broken input comes before anything is known to be done."""
    office.write_leads(people(2))
    api.fault("no-task-id")
    receipt = office.run(api)
    assert receipt.exit_code == 14
    assert pulse_of(office).states == {"in_doubt": 1, **({"found": 1} if receipt.found else {"not_found": 1})}

    office.write_leads([*people(2), ["a"]])
    broken = office.run(api)
    assert broken.exit_code == 5
    assert (pulse_of(office, 2).total, pulse_of(office, 2).done) == (None, 0)


def test_a_pulse_that_cannot_be_written_ends_the_run_as_any_other_write_does(
    api: Api, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1 with its reason, and nothing is sent after it."""
    office.write_leads(people(3))

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Ledger, "write_pulse", full)
    done = office.command("run", "job.yaml", "--json", api=api)

    assert done.code == 1
    assert "the ledger cannot be written: database or disk is full" in done.stderr
    assert api.audit()["accepted"] == 0


def test_nothing_is_written_after_the_end(api: Api, office: Office) -> None:
    """An execution that has ended has its last pulse for good."""
    office.write_leads(people(1))
    office.run(api)
    before = pulse_of(office)
    ledger = Ledger(office.place)
    with ledger.transaction():
        ledger.write_pulse(1, json.dumps({"late": True}))
    ledger.close()

    assert pulse_of(office) == before
