"""The choosing of requests over a real ledger: what is asked, in which order, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.model import Answer, Decision, State, Wanted, Wish
from enrich.order import ranks, sort_keys
from enrich.store.intake import spread
from enrich.store.ledger import Ledger
from tests.books import CALL, FOUND, FREE_FAILURE, MISSED, Books, fingerprint, params, wanted
from tests.harness import BOTH

NEW, CAPPED, WAITING = Decision.NEW, Decision.CAPPED, Decision.WAITING


@pytest.fixture(params=BOTH)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def row(position: int, number: int, *, place: int | None = None, group: str | None = None) -> Wanted:
    """Ask about a lead."""
    return Wanted(position, fingerprint(number), params(number), place, group)


def choose(books: Books, rows: Sequence[Wanted], wish: Wish | None = None) -> list[Decision]:
    """Read an input, mark what is wanted, and tell what was decided about each row."""
    books.do(Ledger.begin_pass, wish or Wish())
    books.do(Ledger.enroll, CALL, rows)
    books.do(Ledger.choose)
    books.do(Ledger.mark)
    return [told.decision for told in books.ledger.decisions(rows)]


def look(books: Books, rows: Sequence[Wanted], wish: Wish) -> list[Decision]:
    """Decide without changing the ledger, as a plan does."""
    books.ledger.begin_pass(wish)
    books.ledger.look(rows)
    books.ledger.choose()
    return [told.decision for told in books.ledger.decisions(rows)]


def queue(books: Books) -> list[int]:
    """The leads that would be sent, in order."""
    sql = (
        "SELECT fingerprint FROM requests WHERE position IS NOT NULL "
        "AND state NOT IN ('submitting', 'submitted') ORDER BY position"
    )
    return [int.from_bytes(name) for (name,) in books.all(sql)]


class TestCaps:
    """`caps`: so many of a group are asked, whichever night."""

    def test_the_first_in_the_order_of_asking_are_asked(self, books: Books) -> None:
        """Blank groups are not capped, and every group has its own count."""
        groups = ["a", "a", None, "b", "a", None, None]
        rows = [row(n, n, place=10 - n, group=group) for n, group in enumerate(groups)]

        assert choose(books, rows, Wish(max_per_group=2)) == [CAPPED, NEW, NEW, NEW, NEW, NEW, NEW]
        assert queue(books) == [6, 5, 4, 3, 2, 1]

    @pytest.mark.parametrize("answer", [FOUND, MISSED])
    def test_who_was_asked_before_counts_first(self, books: Books, answer: Answer) -> None:
        """A new lead at the top of the file does not get the place of one that was paid for."""
        books.start()
        choose(books, [row(0, 1, group="a")])
        books.settle(books.submit(), answer)

        told = choose(books, [row(0, 2, group="a"), row(1, 3, group="a"), row(2, 1, group="a")], Wish(max_per_group=2))

        assert told[:2] == [NEW, CAPPED]

    def test_a_retry_keeps_its_place(self, books: Books) -> None:
        """It was asked before, so it is none of the new that the cap leaves out."""
        books.start()
        choose(books, [row(0, 1, group="a")])
        books.settle(books.submit(), FREE_FAILURE, max_attempts=1)

        wish = Wish(frozenset({State.FAILED}), max_per_group=1)
        assert choose(books, [row(0, 2, group="a"), row(1, 1, group="a")], wish) == [CAPPED, Decision.RETRY]

    def test_rows_that_ask_the_same_count_once(self, books: Books) -> None:
        """The first row's group is the request's; its place is the best of all its rows."""
        rows = [row(0, 1, place=3, group="a"), row(1, 2, place=2, group="a"), row(2, 1, place=0, group="b")]

        assert choose(books, rows, Wish(max_per_group=1)) == [NEW, CAPPED, NEW]

    def test_a_capped_lead_is_told_even_when_it_was_never_enrolled(self, books: Books) -> None:
        """`collect` sees a lead that came after the last run as a run would."""
        books.begin(1)
        rows = [row(0, 1, group="a"), row(1, 2, group="a"), row(2, 3)]
        assert look(books, rows, Wish(max_per_group=1)) == [NEW, CAPPED, NEW]

        assert [(known.position, known.capped) for known in books.ledger.standing(rows)] == [(0, False), (1, True)]


class TestLimits:
    """`--limit` and `--sample`, and a plan that has them."""

    def test_a_limit_takes_the_first_places(self, books: Books) -> None:
        """In the order of asking, not of the file."""
        rows = [row(n, n, place=place) for n, place in enumerate([2, 0, 3, 1])]

        assert choose(books, rows, Wish(limit=2)) == [Decision.OVER_LIMIT, NEW, Decision.OVER_LIMIT, NEW]
        assert queue(books) == [1, 3]

    def test_caps_come_before_the_sample_and_the_sample_before_the_limit(self, books: Books) -> None:
        """Of ten leads in two groups six are left, of those a sample of three, of those two."""
        rows = [row(n, n, group="ab"[n % 2]) for n in range(10)]

        told = choose(books, rows, Wish(max_per_group=3, sample=3, limit=2))

        assert {decision: told.count(decision) for decision in told} == {
            CAPPED: 4,
            Decision.NOT_SAMPLED: 3,
            NEW: 2,
            Decision.OVER_LIMIT: 1,
        }
        assert len(queue(books)) == 2

    def test_what_waits_is_asked_again_unless_the_person_gave_a_number(self, books: Books) -> None:
        """A task that fails at no charge goes on in an ordinary run; `--limit 0` sends nothing."""
        for wish, sent in ((Wish(), [1]), (Wish(limit=0), []), (Wish(sample=1), [])):
            books.begin(1)
            attempt = books.submit()
            assert choose(books, wanted([1]), wish) == [WAITING]
            books.settle(attempt, FREE_FAILURE, max_attempts=9)
            assert queue(books) == sent

    def test_what_a_killed_run_left_on_the_wire_is_a_doubt(self, books: Books) -> None:
        """A plan calls it what the next run will find it to be; while a run is at work it waits."""
        books.begin(1)
        books.claim()

        assert look(books, wanted([1]), Wish()) == [WAITING]
        assert look(books, wanted([1]), Wish(killed=True)) == [Decision.IN_DOUBT]
        assert look(books, wanted([1]), Wish(frozenset({State.IN_DOUBT}), killed=True)) == [Decision.RETRY]

    def test_a_plan_counts_what_was_asked_since(self, books: Books) -> None:
        """Of a plan for three one was asked: the same other two are left, and a failure at no charge is owed."""
        books.begin(1)
        waiting = books.submit()
        planned = Wish(limit=3, since=books.execution)
        books.start()
        assert choose(books, wanted([1, 2, 3, 4, 5]), planned) == [WAITING, NEW, NEW, NEW, Decision.OVER_LIMIT]
        books.settle(books.submit())
        again = books.submit()
        books.settle(waiting, FREE_FAILURE)

        told = choose(books, wanted([1, 2, 3, 4, 5]), planned)

        assert told == [WAITING, Decision.PLANNED, Decision.PLANNED, NEW, Decision.OVER_LIMIT]
        books.settle(again, FREE_FAILURE)
        assert queue(books) == [3, 4]

    def test_a_plan_asks_a_retry_once(self, books: Books) -> None:
        """What it asked again and failed again is not asked a third time by the same plan."""
        books.begin(1)
        books.settle(books.submit(), FREE_FAILURE, max_attempts=1)
        planned = Wish(frozenset({State.FAILED}), since=books.execution)
        books.start()
        assert choose(books, wanted([1, 2]), planned) == [Decision.RETRY, NEW]
        books.settle(books.submit(), FREE_FAILURE, max_attempts=1)

        assert choose(books, wanted([1, 2]), planned) == [Decision.PLANNED, NEW]
        assert books.ledger.asked_since(1, "job") == 1


class TestDoubts:
    """`--accept in_doubt`: taken for lost."""

    def test_all_that_was_seen_in_the_pass_is_accepted_once(self, books: Books) -> None:
        """Whichever batches it came in, and however often each; who left the file stays in doubt."""
        books.begin(*range(4))
        for _ in range(3):
            books.claim()
        books.do(Ledger.recover, books.now)
        books.do(Ledger.begin_pass, Wish())
        for batch in ([row(0, 0), row(1, 3)], [row(2, 1), row(3, 0)], [row(2, 1), row(3, 0)]):
            books.do(Ledger.enroll, CALL, batch)
        accepted = books.do(Ledger.accept_doubts)
        books.do(Ledger.choose)
        books.do(Ledger.mark)

        assert accepted == 2
        assert [books.state(number) for number in range(3)] == [State.FAILED, State.FAILED, State.IN_DOUBT]
        assert books.ledger.decided() == {Decision.FAILED: 2, NEW: 1}
        assert queue(books) == [3]
        assert books.do(Ledger.accept_doubts) == 0


class TestSpread:
    """A sample is spread over the file and the same for the same seed."""

    @given(st.integers(0, 200), st.integers(1, 10**15), st.integers())
    def test_one_of_each_stretch(self, count: int, sample: int, seed: int) -> None:
        """As many as asked for, or all there are; in order, each in its own stretch."""
        chosen = spread(count, sample, seed)

        size = min(count, sample)
        assert len(chosen) == len(set(chosen)) == size
        assert all(n * count // size <= number < (n + 1) * count // size for n, number in enumerate(chosen))
        assert chosen == spread(count, sample, seed)

    def test_seeds_differ(self) -> None:
        """Another seed is another sample."""
        assert len({tuple(spread(1000, 5, seed)) for seed in range(20)}) == 20


def order(*columns: Sequence[str]) -> list[int]:
    """The rows in the order in which they are asked."""
    frame = pl.DataFrame([pl.Series(f"^{n}$", list(cells), pl.String) for n, cells in enumerate(columns)])
    places = ranks(sort_keys(frame, list(range(len(columns))))).to_list()
    return sorted(range(frame.height), key=places.__getitem__)


def by(cells: Sequence[str]) -> list[str]:
    """The cells in the order in which their rows are asked."""
    return [cells[place] for place in order(cells)]


class TestOrder:
    """`order_by`: the largest first."""

    def test_numbers_come_before_text_and_blanks_last(self) -> None:
        """As people write numbers; text goes backwards through the alphabet."""
        cells = ["", "abc", "-5", "1,200", "  ", "zed", "300", "$ 5.50", "-$6", "51-200", "€1,000,000", "0"]
        assert by(cells) == ["€1,000,000", "1,200", "300", "51-200", "$ 5.50", "0", "-5", "-$6", "zed", "abc", "", "  "]

    def test_dates_go_from_the_newest(self) -> None:
        """ISO dates are compared as such."""
        dates = ["2023-01-14", "2024-02-01", "2023-12-01", "2023-01-15"]
        assert by(dates) == sorted(dates, reverse=True)

    def test_a_letter_before_a_number_makes_it_text(self) -> None:
        """`B2B` is no 2."""
        assert by(["B2B", "1", "Q3"]) == ["1", "Q3", "B2B"]

    def test_equal_numbers_are_decided_by_the_next_column(self) -> None:
        """However they are written; then by the input's order."""
        assert order(["1200", "1,200", "1200.0", "$1200", "7"], ["1", "9", "1", "5", "99"]) == [1, 3, 0, 2, 4]

    @given(st.lists(st.text(max_size=6)))
    def test_every_row_has_one_place(self, cells: list[str]) -> None:
        """Whatever stands in the cells."""
        assert sorted(order(cells)) == list(range(len(cells)))

    @given(numbers=st.lists(st.integers(-(10**9), 10**9)), commas=st.booleans())
    def test_whole_numbers_are_sorted_by_size(self, numbers: list[int], *, commas: bool) -> None:
        """With and without commas."""
        shown = [f"{number:,}" if commas else str(number) for number in numbers]
        assert [numbers[place] for place in order(shown)] == sorted(numbers, reverse=True)
