"""How requests are selected over a real ledger: which are sent, in which order, and which are left out."""

from __future__ import annotations

import dataclasses
import json
import random
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.ledger import decisions, enroll, queries, queue, resume
from enrich.ledger.enroll import stratified_sample
from enrich.models import Answer, Decision, RequestBatch, RequestSelection, State
from enrich.rows.row_selection import rank_rows, sort_keys
from tests.support.ledger import (
    CALL,
    DEFAULT_SELECTION,
    FOUND,
    FREE_FAILURE,
    NO_MATCH,
    CommittingLedger,
    RowRequest,
    as_batch,
    fingerprint,
    params,
    record_statements,
    results_of,
    row_requests,
)
from tests.support.workspace import both_backends

backend = both_backends

NEW, CAPPED, WAITING = Decision.NEW, Decision.CAPPED, Decision.WAITING


def row_request(
    position: int, number: int, *, queue_position: int | None = None, group: str | None = None
) -> RowRequest:
    """Return the row of a lead."""
    return RowRequest(position, fingerprint(number), params(number), queue_position, group)


def enroll_and_decide(
    ledger: CommittingLedger, rows: RequestBatch | Sequence[RowRequest], selection: RequestSelection | None = None
) -> list[Decision]:
    """Enroll an input, fill the queue, and return the decision about each row."""
    selection = selection or DEFAULT_SELECTION
    batch = rows if isinstance(rows, RequestBatch) else as_batch(rows)
    ledger.commit(enroll.begin_pass)
    ledger.commit(enroll.enroll, CALL, batch, selection)
    ledger.commit(enroll.apply_limits, selection)
    ledger.commit(queue.fill_queue, selection)
    return [row.decision for row in enroll.row_decisions(ledger.wrapped, batch)]


def preview_decisions(
    ledger: CommittingLedger, rows: RequestBatch | Sequence[RowRequest], selection: RequestSelection
) -> list[Decision]:
    """Decide without changing the ledger, as a plan does."""
    batch = rows if isinstance(rows, RequestBatch) else as_batch(rows)
    enroll.begin_pass(ledger.wrapped)
    enroll.preview(ledger.wrapped, batch, selection)
    enroll.apply_limits(ledger.wrapped, selection)
    return [row.decision for row in enroll.row_decisions(ledger.wrapped, batch)]


def queued_leads(ledger: CommittingLedger) -> list[int]:
    """Return the leads that would be sent, in order."""
    sql = (
        "SELECT fingerprint FROM requests WHERE queue_position IS NOT NULL "
        "AND state NOT IN ('submitting', 'submitted') ORDER BY queue_position"
    )
    return [int.from_bytes(name) for (name,) in ledger.query_all(sql)]


def test_batch_is_inserted_by_one_statement(ledger: CommittingLedger) -> None:
    """New requests of a batch need one INSERT, and their params stay the very text that they were."""
    texts = ['{"a":"\\u0000"}', r'{"a":"\\u0000 \\\\u0000"}', '{"a":"\u2028 \U0001f600 %s ? ?1 \'quoted\'"}', "{}"] * 50
    batch = as_batch(RowRequest(number, fingerprint(number), text) for number, text in enumerate(texts))
    statements: list[str] = []
    record_statements(ledger.wrapped, statements)

    ledger.commit(enroll.begin_pass)
    ledger.commit(enroll.enroll, CALL, batch, DEFAULT_SELECTION)

    assert sum(statement.startswith("INSERT INTO requests") for statement in statements) == 1
    stored = ledger.query_all("SELECT params FROM requests ORDER BY fingerprint")
    assert [text for (text,) in stored] == texts


def test_requests_are_found_in_any_order(ledger: CommittingLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row finds its request, whatever left the file, joined it or moved, in batches of any size."""
    monkeypatch.setattr(decisions, "_WINDOW_EXTRA", 2)
    rng = random.Random(7)
    ledger.commit(enroll.enroll, CALL, row_requests(range(40)), DEFAULT_SELECTION)
    ids = dict(ledger.query_all("SELECT fingerprint, id FROM requests"))
    for _ in range(12):
        leads = [number for number in range(40) if rng.random() < rng.choice([0.5, 1.0])]
        for _ in range(rng.randrange(6)):
            leads.insert(rng.randrange(len(leads)), rng.randrange(60))
        leads = rng.sample(leads, len(leads)) if rng.random() < 0.2 else leads
        rows = [row_request(position, number) for position, number in enumerate(leads, 3)]
        size = rng.randrange(1, 30)

        enroll.begin_pass(ledger.wrapped)
        for start in range(0, len(rows), size):
            enroll.preview(ledger.wrapped, as_batch(rows[start : start + size]), DEFAULT_SELECTION)

        seen = ledger.wrapped.execute("SELECT id, first_position FROM seen WHERE id > 0 ORDER BY first_position")
        known = {number: position for position, number in reversed(list(enumerate(leads, 3))) if number < 40}
        assert [tuple(row) for row in seen] == sorted(
            ((ids[fingerprint(number)], position) for number, position in known.items()), key=lambda pair: pair[1]
        )
        (unknown,) = ledger.wrapped.execute("SELECT count(*) FROM seen WHERE id < 0").fetchone()
        assert unknown == len({number for number in leads if number >= 40})


class TestCaps:
    """`caps`: at most this many requests of a group are sent, over all runs."""

    def test_cap_takes_first_in_order(self, ledger: CommittingLedger) -> None:
        """A cap takes the first rows of each group in queue order; rows with a blank group are not capped."""
        groups = ["a", "a", None, "b", "a", None, None]
        rows = [row_request(n, n, queue_position=10 - n, group=group) for n, group in enumerate(groups)]

        assert enroll_and_decide(ledger, rows, RequestSelection(max_per_group=2)) == [
            CAPPED,
            NEW,
            NEW,
            NEW,
            NEW,
            NEW,
            NEW,
        ]
        assert queued_leads(ledger) == [6, 5, 4, 3, 2, 1]

    @pytest.mark.parametrize("answer", [FOUND, NO_MATCH])
    def test_cap_counts_earlier_requests(self, ledger: CommittingLedger, answer: Answer) -> None:
        """Paid requests of earlier runs count for the cap, even when a new lead comes before them in the file."""
        ledger.start_execution()
        enroll_and_decide(ledger, [row_request(0, 1, group="a")])
        ledger.settle(ledger.submit(), answer)

        result = enroll_and_decide(
            ledger,
            [row_request(0, 2, group="a"), row_request(1, 3, group="a"), row_request(2, 1, group="a")],
            RequestSelection(max_per_group=2),
        )

        assert result[:2] == [NEW, CAPPED]

    def test_retry_does_not_count_for_cap(self, ledger: CommittingLedger) -> None:
        """A retry was sent before, so the cap for new requests does not leave it out."""
        ledger.start_execution()
        enroll_and_decide(ledger, [row_request(0, 1, group="a")])
        ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=1)

        selection = RequestSelection(frozenset({State.FAILED}), max_per_group=1)
        assert enroll_and_decide(ledger, [row_request(0, 2, group="a"), row_request(1, 1, group="a")], selection) == [
            CAPPED,
            Decision.RETRY,
        ]

    def test_cap_counts_duplicates_once(self, ledger: CommittingLedger) -> None:
        """Duplicates count once: the request has its first row's group and the best queue position of its rows."""
        rows = [
            row_request(0, 1, queue_position=3, group="a"),
            row_request(1, 2, queue_position=2, group="a"),
            row_request(2, 1, queue_position=0, group="b"),
        ]

        assert enroll_and_decide(ledger, rows, RequestSelection(max_per_group=1)) == [NEW, CAPPED, NEW]

    def test_capped_lead_without_request(self, ledger: CommittingLedger) -> None:
        """`collect` decides about a lead added after the last run as a run would."""
        ledger.start_and_enroll(1)
        rows = [row_request(0, 1, group="a"), row_request(1, 2, group="a"), row_request(2, 3)]
        assert preview_decisions(ledger, rows, RequestSelection(max_per_group=1)) == [NEW, CAPPED, NEW]

        assert [(known.position, known.capped) for known in results_of(ledger.wrapped, as_batch(rows))] == [
            (0, False),
            (1, True),
        ]


def test_answers_larger_than_one_value(tmp_path: Path) -> None:
    """The answers of a batch may together be larger than the largest text that the database returns."""
    ledger = CommittingLedger.open(tmp_path / "ledger.db")
    ledger.start_and_enroll(*range(30))
    for number in range(30):
        ledger.settle(ledger.submit(), dataclasses.replace(FOUND, raw=f'{{"data":{{"n":"{number:08000}"}}}}'))
    session = ledger.wrapped.session
    assert isinstance(session, sqlite3.Connection)
    session.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)

    found = results_of(ledger.wrapped, row_requests(range(30)))

    assert [json.loads(known.answer or "")["data"]["n"] for known in found] == [
        f"{number:08000}" for number in range(30)
    ]
    ledger.wrapped.close()


def test_batch_parameters() -> None:
    """A row without a request that the ledger knows has no id, and numbers may be large."""
    batch = replace(row_requests([1, 2, 3]), positions=[1 << 40, (1 << 40) + 2, (1 << 40) + 3])
    assert decisions.batch_parameters(batch, [9, None, 1 << 50]) == (f"[9,0,0,{1 << 50}]", 1 << 40)
    assert decisions.batch_parameters(replace(batch, positions=range(7, 10)), [3, 2, 1]) == ("[3,2,1]", 7)
    assert decisions.batch_parameters(row_requests([]), []) == ("[]", 0)


class TestLimits:
    """`--limit` and `--sample`, alone and in a plan."""

    def test_limit_takes_first_in_order(self, ledger: CommittingLedger) -> None:
        """A limit takes the first requests in queue order, not in the order of the file."""
        rows = [row_request(n, n, queue_position=place) for n, place in enumerate([2, 0, 3, 1])]

        assert enroll_and_decide(ledger, rows, RequestSelection(limit=2)) == [
            Decision.OVER_LIMIT,
            NEW,
            Decision.OVER_LIMIT,
            NEW,
        ]
        assert queued_leads(ledger) == [1, 3]

    def test_caps_then_sample_then_limit(self, ledger: CommittingLedger) -> None:
        """Caps come first, then the sample, then the limit: of ten leads six, then three, then two are left."""
        rows = [row_request(n, n, group="ab"[n % 2]) for n in range(10)]

        result = enroll_and_decide(ledger, rows, RequestSelection(max_per_group=3, sample=3, limit=2))

        assert {decision: result.count(decision) for decision in result} == {
            CAPPED: 4,
            Decision.NOT_SAMPLED: 3,
            NEW: 2,
            Decision.OVER_LIMIT: 1,
        }
        assert len(queued_leads(ledger)) == 2

    def test_free_failures_and_limit(self, ledger: CommittingLedger) -> None:
        """A free failure is resent in an ordinary run, but not with `--limit 0` or a full sample."""
        for selection, sent in (
            (RequestSelection(), [1]),
            (RequestSelection(limit=0), []),
            (RequestSelection(sample=1), []),
        ):
            ledger.start_and_enroll(1)
            attempt = ledger.submit()
            assert enroll_and_decide(ledger, row_requests([1]), selection) == [WAITING]
            ledger.settle(attempt, FREE_FAILURE, max_attempts=9)
            assert queued_leads(ledger) == sent

    def test_preview_of_interrupted_requests(self, ledger: CommittingLedger) -> None:
        """For a plan an interrupted request is in doubt, as the next run will mark it; during a run it is waiting."""
        ledger.start_and_enroll(1)
        ledger.claim()

        assert preview_decisions(ledger, row_requests([1]), RequestSelection()) == [WAITING]
        assert preview_decisions(ledger, row_requests([1]), RequestSelection(no_active_run=True)) == [Decision.IN_DOUBT]
        assert preview_decisions(
            ledger, row_requests([1]), RequestSelection(frozenset({State.IN_DOUBT}), no_active_run=True)
        ) == [Decision.RETRY]

    def test_plan_counts_requests_sent_since(self, ledger: CommittingLedger) -> None:
        """A plan counts the requests sent since: of three, one was sent, two are left, and a free failure is resent."""
        ledger.start_and_enroll(1)
        waiting = ledger.submit()
        planned = RequestSelection(limit=3, after_execution=ledger.execution)
        ledger.start_execution()
        assert enroll_and_decide(ledger, row_requests([1, 2, 3, 4, 5]), planned) == [
            WAITING,
            NEW,
            NEW,
            NEW,
            Decision.OVER_LIMIT,
        ]
        ledger.settle(ledger.submit())
        again = ledger.submit()
        ledger.settle(waiting, FREE_FAILURE)

        result = enroll_and_decide(ledger, row_requests([1, 2, 3, 4, 5]), planned)

        assert result == [WAITING, Decision.PLANNED, Decision.PLANNED, NEW, Decision.OVER_LIMIT]
        ledger.settle(again, FREE_FAILURE)
        assert queued_leads(ledger) == [3, 4]

    def test_plan_retries_once(self, ledger: CommittingLedger) -> None:
        """A plan retries a request once; when that fails, the same plan does not retry it again."""
        ledger.start_and_enroll(1)
        ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=1)
        planned = RequestSelection(frozenset({State.FAILED}), after_execution=ledger.execution)
        ledger.start_execution()
        assert enroll_and_decide(ledger, row_requests([1, 2]), planned) == [Decision.RETRY, NEW]
        ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=1)

        assert enroll_and_decide(ledger, row_requests([1, 2]), planned) == [Decision.PLANNED, NEW]
        assert queries.sent_since(ledger.wrapped, 1, "job") == 1


class TestInDoubt:
    """`--accept in_doubt`: unconfirmed requests are marked as failed."""

    def test_accept_in_doubt_once_per_row(self, ledger: CommittingLedger) -> None:
        """Each unconfirmed request in the input is accepted once, however often its row comes; others stay in doubt."""
        ledger.start_and_enroll(*range(4))
        for _ in range(3):
            ledger.claim()
        ledger.commit(resume.recover, ledger.now)
        ledger.commit(enroll.begin_pass)
        for batch in (
            [row_request(0, 0), row_request(1, 3)],
            [row_request(2, 1), row_request(3, 0)],
            [row_request(2, 1), row_request(3, 0)],
        ):
            ledger.commit(enroll.enroll, CALL, as_batch(batch), DEFAULT_SELECTION)
        accepted = ledger.commit(enroll.accept_in_doubt_as_failed)
        ledger.commit(enroll.apply_limits, DEFAULT_SELECTION)
        ledger.commit(queue.fill_queue, DEFAULT_SELECTION)

        assert accepted == 2
        assert [ledger.state_of(number) for number in range(3)] == [State.FAILED, State.FAILED, State.IN_DOUBT]
        assert enroll.decision_counts(ledger.wrapped) == {Decision.FAILED: 2, NEW: 1}
        assert queued_leads(ledger) == [3]
        assert ledger.commit(enroll.accept_in_doubt_as_failed) == 0


class TestSampling:
    """A sample is spread over the file and is the same for the same seed."""

    @given(st.integers(0, 200), st.integers(1, 10**15), st.integers())
    def test_one_row_per_stratum(self, count: int, sample: int, seed: int) -> None:
        """One row of each equal part of the file is sampled, in order; with too few rows, all are."""
        chosen = stratified_sample(count, sample, seed)

        size = min(count, sample)
        assert len(chosen) == len(set(chosen)) == size
        assert all(n * count // size <= number < (n + 1) * count // size for n, number in enumerate(chosen))
        assert chosen == stratified_sample(count, sample, seed)

    def test_different_seeds_differ(self) -> None:
        """Another seed gives another sample."""
        assert len({tuple(stratified_sample(1000, 5, seed)) for seed in range(20)}) == 20


def sorted_rows(*columns: Sequence[str]) -> list[int]:
    """Return the rows in queue order."""
    frame = pl.DataFrame([pl.Series(f"^{n}$", list(cells), pl.String) for n, cells in enumerate(columns)])
    places = rank_rows(sort_keys(frame, list(range(len(columns))))).to_list()
    return sorted(range(frame.height), key=places.__getitem__)


def sorted_cells(cells: Sequence[str]) -> list[str]:
    """Return the cells in the queue order of their rows."""
    return [cells[place] for place in sorted_rows(cells)]


class TestOrder:
    """`order_by`: the largest values first."""

    def test_plus_signs_and_bare_fractions_are_numbers(self) -> None:
        """A leading plus, and a fraction without a zero, are compared as numbers."""
        cells = [".9", "5", "+7", "0.8", "-.5", "$+6", "abc", "+", "."]
        assert sorted_cells(cells) == ["+7", "$+6", "5", ".9", "0.8", "-.5", "abc", ".", "+"]

    def test_numbers_before_text_before_blanks(self) -> None:
        """Numbers come first, in any usual notation, then text in reverse alphabetical order, then blanks."""
        cells = ["", "abc", "-5", "1,200", "  ", "zed", "300", "$ 5.50", "-$6", "51-200", "€1,000,000", "0"]
        assert sorted_cells(cells) == [
            "€1,000,000",
            "1,200",
            "300",
            "51-200",
            "$ 5.50",
            "0",
            "-5",
            "-$6",
            "zed",
            "abc",
            "",
            "  ",
        ]

    def test_newest_dates_first(self) -> None:
        """ISO dates are sorted as dates, the newest first."""
        dates = ["2023-01-14", "2024-02-01", "2023-12-01", "2023-01-15"]
        assert sorted_cells(dates) == sorted(dates, reverse=True)

    def test_alphanumeric_is_text(self) -> None:
        """Text with digits, such as `B2B`, is text and not a number."""
        assert sorted_cells(["B2B", "1", "Q3"]) == ["1", "Q3", "B2B"]

    def test_ties_use_next_column(self) -> None:
        """Equal values, however written, are sorted by the next column and then by the input's order."""
        assert sorted_rows(["1200", "1,200", "1200.0", "$1200", "7"], ["1", "9", "1", "5", "99"]) == [1, 3, 0, 2, 4]

    @given(st.lists(st.text(max_size=6)))
    def test_every_row_has_one_position(self, cells: list[str]) -> None:
        """Every row gets exactly one position, whatever its cells contain."""
        assert sorted(sorted_rows(cells)) == list(range(len(cells)))

    @pytest.mark.long
    @given(numbers=st.lists(st.integers(-(10**9), 10**9)), commas=st.booleans())
    def test_whole_numbers_are_sorted_by_size(self, numbers: list[int], *, commas: bool) -> None:
        """Whole numbers are sorted by size, with and without thousands separators."""
        shown = [f"{number:,}" if commas else str(number) for number in numbers]
        assert [numbers[place] for place in sorted_rows(shown)] == sorted(numbers, reverse=True)
