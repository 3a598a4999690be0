"""The choosing of requests over a real ledger: what is asked, in which order, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.ledger.enroll import stratified_sample
from enrich.ledger.ledger import Ledger
from enrich.models import Answer, Decision, RequestSelection, RowRequest, State
from enrich.rows.reader import rank_rows, sort_keys
from tests.support.ledger import (
    CALL,
    FOUND,
    FREE_FAILURE,
    NO_MATCH,
    CommittingLedger,
    fingerprint,
    params,
    row_requests,
)
from tests.support.workspace import BOTH_BACKENDS

NEW, CAPPED, WAITING = Decision.NEW, Decision.CAPPED, Decision.WAITING


@pytest.fixture(params=BOTH_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def row_request(
    position: int, number: int, *, queue_position: int | None = None, group: str | None = None
) -> RowRequest:
    """Ask about a lead."""
    return RowRequest(position, fingerprint(number), params(number), queue_position, group)


def enroll_and_decide(
    ledger: CommittingLedger, rows: Sequence[RowRequest], selection: RequestSelection | None = None
) -> list[Decision]:
    """Read an input, mark what is wanted, and tell what was decided about each row."""
    ledger.commit(Ledger.begin_pass, selection or RequestSelection())
    ledger.commit(Ledger.enroll, CALL, rows)
    ledger.commit(Ledger.apply_limits)
    ledger.commit(Ledger.fill_queue)
    return [told.decision for told in ledger.wrapped.row_decisions(rows)]


def preview_decisions(
    ledger: CommittingLedger, rows: Sequence[RowRequest], selection: RequestSelection
) -> list[Decision]:
    """Decide without changing the ledger, as a plan does."""
    ledger.wrapped.begin_pass(selection)
    ledger.wrapped.preview(rows)
    ledger.wrapped.apply_limits()
    return [told.decision for told in ledger.wrapped.row_decisions(rows)]


def queued_leads(ledger: CommittingLedger) -> list[int]:
    """The leads that would be sent, in order."""
    sql = (
        "SELECT fingerprint FROM requests WHERE position IS NOT NULL "
        "AND state NOT IN ('submitting', 'submitted') ORDER BY position"
    )
    return [int.from_bytes(name) for (name,) in ledger.query_all(sql)]


class TestCaps:
    """`caps`: so many of a group are asked, whichever night."""

    def test_cap_takes_first_in_order(self, ledger: CommittingLedger) -> None:
        """Blank groups are not capped, and every group has its own count."""
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
        """A new lead at the top of the file does not get the place of one that was paid for."""
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
        """It was asked before, so it is none of the new that the cap leaves out."""
        ledger.start_execution()
        enroll_and_decide(ledger, [row_request(0, 1, group="a")])
        ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=1)

        selection = RequestSelection(frozenset({State.FAILED}), max_per_group=1)
        assert enroll_and_decide(ledger, [row_request(0, 2, group="a"), row_request(1, 1, group="a")], selection) == [
            CAPPED,
            Decision.RETRY,
        ]

    def test_cap_counts_duplicates_once(self, ledger: CommittingLedger) -> None:
        """The first row's group is the request's; its place is the best of all its rows."""
        rows = [
            row_request(0, 1, queue_position=3, group="a"),
            row_request(1, 2, queue_position=2, group="a"),
            row_request(2, 1, queue_position=0, group="b"),
        ]

        assert enroll_and_decide(ledger, rows, RequestSelection(max_per_group=1)) == [NEW, CAPPED, NEW]

    def test_capped_lead_without_request(self, ledger: CommittingLedger) -> None:
        """`collect` sees a lead that came after the last run as a run would."""
        ledger.start_and_enroll(1)
        rows = [row_request(0, 1, group="a"), row_request(1, 2, group="a"), row_request(2, 3)]
        assert preview_decisions(ledger, rows, RequestSelection(max_per_group=1)) == [NEW, CAPPED, NEW]

        assert [(known.position, known.capped) for known in ledger.wrapped.request_results(rows)] == [
            (0, False),
            (1, True),
        ]


class TestLimits:
    """`--limit` and `--sample`, and a plan that has them."""

    def test_limit_takes_first_in_order(self, ledger: CommittingLedger) -> None:
        """In the order of asking, not of the file."""
        rows = [row_request(n, n, queue_position=place) for n, place in enumerate([2, 0, 3, 1])]

        assert enroll_and_decide(ledger, rows, RequestSelection(limit=2)) == [
            Decision.OVER_LIMIT,
            NEW,
            Decision.OVER_LIMIT,
            NEW,
        ]
        assert queued_leads(ledger) == [1, 3]

    def test_caps_then_sample_then_limit(self, ledger: CommittingLedger) -> None:
        """Of ten leads in two groups six are left, of those a sample of three, of those two."""
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
        """A task that fails at no charge goes on in an ordinary run; `--limit 0` sends nothing."""
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
        """A plan calls it what the next run will find it to be; while a run is at work it waits."""
        ledger.start_and_enroll(1)
        ledger.claim()

        assert preview_decisions(ledger, row_requests([1]), RequestSelection()) == [WAITING]
        assert preview_decisions(ledger, row_requests([1]), RequestSelection(no_active_run=True)) == [Decision.IN_DOUBT]
        assert preview_decisions(
            ledger, row_requests([1]), RequestSelection(frozenset({State.IN_DOUBT}), no_active_run=True)
        ) == [Decision.RETRY]

    def test_plan_counts_requests_sent_since(self, ledger: CommittingLedger) -> None:
        """Of a plan for three one was asked: the same other two are left, and a failure at no charge is owed."""
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
        """What it asked again and failed again is not asked a third time by the same plan."""
        ledger.start_and_enroll(1)
        ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=1)
        planned = RequestSelection(frozenset({State.FAILED}), after_execution=ledger.execution)
        ledger.start_execution()
        assert enroll_and_decide(ledger, row_requests([1, 2]), planned) == [Decision.RETRY, NEW]
        ledger.settle(ledger.submit(), FREE_FAILURE, max_attempts=1)

        assert enroll_and_decide(ledger, row_requests([1, 2]), planned) == [Decision.PLANNED, NEW]
        assert ledger.wrapped.sent_since(1, "job") == 1


class TestInDoubt:
    """`--accept in_doubt`: taken for lost."""

    def test_accept_in_doubt_once_per_row(self, ledger: CommittingLedger) -> None:
        """Whichever batches it came in, and however often each; who left the file stays in doubt."""
        ledger.start_and_enroll(*range(4))
        for _ in range(3):
            ledger.claim()
        ledger.commit(Ledger.recover, ledger.now)
        ledger.commit(Ledger.begin_pass, RequestSelection())
        for batch in (
            [row_request(0, 0), row_request(1, 3)],
            [row_request(2, 1), row_request(3, 0)],
            [row_request(2, 1), row_request(3, 0)],
        ):
            ledger.commit(Ledger.enroll, CALL, batch)
        accepted = ledger.commit(Ledger.accept_in_doubt_as_failed)
        ledger.commit(Ledger.apply_limits)
        ledger.commit(Ledger.fill_queue)

        assert accepted == 2
        assert [ledger.state_of(number) for number in range(3)] == [State.FAILED, State.FAILED, State.IN_DOUBT]
        assert ledger.wrapped.decision_counts() == {Decision.FAILED: 2, NEW: 1}
        assert queued_leads(ledger) == [3]
        assert ledger.commit(Ledger.accept_in_doubt_as_failed) == 0


class TestSampling:
    """A sample is spread over the file and the same for the same seed."""

    @given(st.integers(0, 200), st.integers(1, 10**15), st.integers())
    def test_one_row_per_stratum(self, count: int, sample: int, seed: int) -> None:
        """As many as asked for, or all there are; in order, each in its own stretch."""
        chosen = stratified_sample(count, sample, seed)

        size = min(count, sample)
        assert len(chosen) == len(set(chosen)) == size
        assert all(n * count // size <= number < (n + 1) * count // size for n, number in enumerate(chosen))
        assert chosen == stratified_sample(count, sample, seed)

    def test_different_seeds_differ(self) -> None:
        """Another seed is another sample."""
        assert len({tuple(stratified_sample(1000, 5, seed)) for seed in range(20)}) == 20


def sorted_rows(*columns: Sequence[str]) -> list[int]:
    """The rows in the order in which they are asked."""
    frame = pl.DataFrame([pl.Series(f"^{n}$", list(cells), pl.String) for n, cells in enumerate(columns)])
    places = rank_rows(sort_keys(frame, list(range(len(columns))))).to_list()
    return sorted(range(frame.height), key=places.__getitem__)


def sorted_cells(cells: Sequence[str]) -> list[str]:
    """The cells in the order in which their rows are asked."""
    return [cells[place] for place in sorted_rows(cells)]


class TestOrder:
    """`order_by`: the largest first."""

    def test_numbers_before_text_before_blanks(self) -> None:
        """As people write numbers; text goes backwards through the alphabet."""
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
        """ISO dates are compared as such."""
        dates = ["2023-01-14", "2024-02-01", "2023-12-01", "2023-01-15"]
        assert sorted_cells(dates) == sorted(dates, reverse=True)

    def test_alphanumeric_is_text(self) -> None:
        """`B2B` is no 2."""
        assert sorted_cells(["B2B", "1", "Q3"]) == ["1", "Q3", "B2B"]

    def test_ties_use_next_column(self) -> None:
        """However they are written; then by the input's order."""
        assert sorted_rows(["1200", "1,200", "1200.0", "$1200", "7"], ["1", "9", "1", "5", "99"]) == [1, 3, 0, 2, 4]

    @given(st.lists(st.text(max_size=6)))
    def test_every_row_has_one_position(self, cells: list[str]) -> None:
        """Whatever stands in the cells."""
        assert sorted(sorted_rows(cells)) == list(range(len(cells)))

    @pytest.mark.long
    @given(numbers=st.lists(st.integers(-(10**9), 10**9)), commas=st.booleans())
    def test_whole_numbers_are_sorted_by_size(self, numbers: list[int], *, commas: bool) -> None:
        """With and without commas."""
        shown = [f"{number:,}" if commas else str(number) for number in numbers]
        assert [numbers[place] for place in sorted_rows(shown)] == sorted(numbers, reverse=True)
