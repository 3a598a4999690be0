"""Batches give the same results as row by row, with no more ledger statements."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.databar.task_results import column_values
from enrich.files import csv_format
from enrich.job.cell_text import clean
from enrich.job.job import load_job
from enrich.job.target import Target, TargetKind
from enrich.ledger import enroll, queue
from enrich.ledger.database import Database
from enrich.models import Decision, RequestBatch, RowStatus
from enrich.rows.addresses import LEFT_OUT, email_address
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.output_cells import answer_cells, answer_columns, to_cell
from tests.support.cases import examples, in_turn
from tests.support.ledger import CALL as ASKED
from tests.support.ledger import DEFAULT_SELECTION, FOUND, CommittingLedger, row_requests, sqlite_connection

CALL = Target(TargetKind.WATERFALL, "email_getter", (833, 966), 10)
JOB = """\
version: 1
input: leads.csv
waterfall: email_getter
dedupe: {dedupe}
blanks: []
params: {{'b "q"': B, email: {{column: [E, F]}}, a: A, c: {{value: US}}}}
"""
CELLS = st.text(alphabet='aZ@. \u00a0"\\/\b\f\n\r\t\x01\x1f\x7f\u2028\u2029e\u0301\u00e9\U0001f600', max_size=6)
MAILS = st.sampled_from(["a@b.example", "a@b", "@b.example", "a@b@c.d", "a b@c.d", "a\u2003b@c.d", "a@.", "a@\n."])


def expected_requests(
    leads: Sequence[Mapping[str, str]], *, dedupe: bool
) -> list[tuple[str | None, bytes | None, str | None]]:
    """Return each row's params, fingerprint and reason as the first version did; all ledgers depend on these bytes."""
    written = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    call = json.dumps([1, "waterfall", CALL.id, CALL.body()], sort_keys=True)
    prefix = blake2b(call.encode(), digest_size=16, person=b"enrich-request")
    times: dict[bytes, int] = {}
    asked: list[tuple[str | None, bytes | None, str | None]] = []
    for lead in leads:
        emails = [email_address(clean(lead[name]).lower()) for name in ("E", "F")]
        email = next((text for text in emails if text and not text.startswith(LEFT_OUT)), "")
        sent = {"a": clean(lead["A"]), 'b "q"': clean(lead["B"]), "c": "US", "email": email}
        params = {name: sent[name] for name in sorted(sent) if sent[name]}
        error = None if "a" in params else "a blank (A)"
        if error:
            asked.append((None, None, error))
            continue
        text = written(params)
        digest = prefix.copy()
        digest.update(b"\0" + text.encode())
        name = digest.digest()
        if not dedupe:
            times[name] = times.get(name, -1) + 1
            if times[name]:
                digest.update(b"\0%d" % times[name])
        asked.append((text, digest.digest(), None))
    return asked


@pytest.mark.long
@given(
    leads=st.lists(st.fixed_dictionaries({"A": CELLS, "B": CELLS, "E": CELLS | MAILS, "F": MAILS}), min_size=1),
    dedupe=st.booleans(),
)
@settings(max_examples=examples(200), deadline=None)
def test_fingerprints_are_stable(
    tmp_path_factory: pytest.TempPathFactory, leads: list[dict[str, str]], *, dedupe: bool
) -> None:
    """With other bytes in params or fingerprints, every ledger would pay for all its leads again."""
    folder = tmp_path_factory.mktemp("leads")
    with (folder / "leads.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["A", "B", "E", "F"], *([lead[name] for name in "ABEF"] for lead in leads)])
    job = folder / "job.yaml"
    job.write_text(JOB.format(dedupe=str(dedupe).lower()), encoding="utf-8")
    template = RequestTemplate(CALL, ("a",), ("email",), {"new": "email"}, None)
    (batch,) = JobInput(load_job(job)).batches(template)
    assert list(zip(batch.params, batch.fingerprints, batch.errors, strict=True)) == expected_requests(
        leads, dedupe=dedupe
    )
    assert [status is RowStatus.INVALID for status in batch.statuses] == [name is None for name in batch.fingerprints]


@given(
    rows=st.lists(st.tuples(*[st.none() | st.text("ab ,;\t\"'\r\n|\0\ufeff\u2028é", max_size=4)] * 3), max_size=6),
    separator=st.sampled_from([",", ";", "\t", "|", " ", "a"]),
)
@settings(max_examples=examples(200), deadline=None)
def test_csv_output_matches_csv_module(rows: list[tuple[str | None, ...]], separator: str) -> None:
    """Cells are quoted only where needed and blanks are empty, the same as with Python's csv module."""
    raw, text = io.BytesIO(), io.StringIO()
    header = ["^a$", "", "c"]
    csv_format.write(raw, header, [pl.DataFrame(rows, dict.fromkeys(header, pl.String), orient="row")], separator)
    for row in [header, *rows]:
        line = io.StringIO()
        csv.writer(line, delimiter=separator).writerow(row)
        text.write(line.getvalue().removesuffix("\r\n") + "\n")
    assert raw.getvalue() == text.getvalue().encode()


@in_turn(
    ("value", "text"),
    [
        ('"a@b.example"', "a@b.example"),
        ('" "', None),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1.10", "1.10"),
        ("NaN", None),
        ('[1e400, "\\ud83d\\ude00"]', '[1e400, "\U0001f600"]'),
        ('{"a": 18446744073709551617}', '{"a": 18446744073709551617}'),
        ("true", "true"),
        ("[]", None),
    ],
)
def test_number_precision_is_kept(value: str, text: str | None) -> None:
    """Numbers that the fast JSON parser would round or refuse are read by the exact one."""
    answer = f'{{"data": [{{"result": {{"found": {value}, "name": "Ada"}}, "steps": []}}]}}'
    assert answer_cells(answer, ["found", "name", "none"]) == [text, "Ada", None]
    assert [cells.item() for cells in answer_columns([answer], ["found", "name", "none"])] == [text, "Ada", None]


FIELDS = st.dictionaries(
    st.sampled_from(["email", "name", "a.b", "$x", "x", "result", "steps", "1"]),
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["", " ", "\u200b", "Ada", "é", "-"])
    | st.just({"b": "c"}),
    max_size=4,
)
DATA = FIELDS | st.fixed_dictionaries(
    {"result": st.none() | FIELDS | st.just("Ada")},
    optional={"steps": st.just([]), "result_field": st.just(["email"]), "enrichment_data": FIELDS},
)


@given(
    data=st.none() | DATA | st.lists(st.none() | DATA, max_size=2),
    paths=st.lists(
        st.sampled_from(["email", "name", "a.b", "x", "$x", "$steps", "$is_verified", "a", "1", "1.a"]), max_size=3
    ),
)
@settings(max_examples=examples(300), deadline=None)
def test_usual_answers_are_read_as_others(data: object, paths: list[str]) -> None:
    """The short way for answers of text gives what the general one gives, for every shape of an answer."""
    answer, expected = json.dumps({"data": data}), list(map(to_cell, column_values(data, paths)))
    assert answer_cells(answer, paths) == expected
    compact = json.dumps(
        {"task_id": "a", "status": "completed", "n": 1.5, "data": data, "error": None}, separators=(",", ":")
    )
    columns = [cells.to_list() for cells in answer_columns([None, answer, compact], paths)]
    assert columns == [[None, cell, cell] for cell in expected]


def enroll_batch(ledger: CommittingLedger, batch: RequestBatch) -> None:
    """Enroll a batch in a transaction of its own."""
    ledger.commit(enroll.enroll, ASKED, batch, DEFAULT_SELECTION)


def read_results(ledger: CommittingLedger, batch: RequestBatch) -> None:
    """Read the results of a batch."""
    enroll.request_results(ledger.wrapped, batch, DEFAULT_SELECTION)


def count_statements(ledger: Database, work: Callable[[], object]) -> int:
    """Count SQLite's statements; one that is executed for many rows counts once a row."""
    count = 0

    def count_statement(_: str) -> None:
        nonlocal count
        count += 1

    sqlite_connection(ledger).set_trace_callback(count_statement)
    work()
    sqlite_connection(ledger).set_trace_callback(None)
    return count


class TestStatements:
    """A batch costs the ledger a few statements, however many rows it has."""

    ROWS, FEW = 1_000, 25

    @pytest.fixture
    def ledger(self, tmp_path: Path) -> Iterator[CommittingLedger]:
        """Open a ledger."""
        ledger = CommittingLedger.open(tmp_path / "ledger.db")
        with closing(ledger.wrapped):
            yield ledger

    def test_new_rows_take_few_statements(self, ledger: CommittingLedger) -> None:
        """New rows are inserted together."""
        batch = row_requests(range(self.ROWS))
        statements = count_statements(ledger.wrapped, lambda: enroll_batch(ledger, batch))
        assert statements < self.FEW

    def test_known_rows_take_few_statements(self, ledger: CommittingLedger) -> None:
        """Known rows are enrolled, previewed and collected together."""
        ledger.enroll(range(self.ROWS))
        batch = row_requests(range(self.ROWS))
        ledger.commit(enroll.begin_pass)
        statements = count_statements(ledger.wrapped, lambda: enroll_batch(ledger, batch))
        assert statements < self.FEW
        statements = count_statements(ledger.wrapped, lambda: enroll.preview(ledger.wrapped, batch, DEFAULT_SELECTION))
        assert statements < self.FEW
        statements = count_statements(ledger.wrapped, lambda: read_results(ledger, batch))
        assert statements < self.FEW

    def test_duplicate_rows_add_no_statements(self, ledger: CommittingLedger) -> None:
        """Duplicate rows are loaded once."""
        batch = row_requests([1, 2, 3] * self.ROWS)
        statements = count_statements(ledger.wrapped, lambda: enroll_batch(ledger, batch))
        assert statements < self.FEW
        statements = count_statements(ledger.wrapped, lambda: read_results(ledger, batch))
        assert statements < self.FEW

    def test_selection_uses_few_statements(self, ledger: CommittingLedger) -> None:
        """Selecting, queueing and counting take a few statements, not one a row."""
        ledger.commit(enroll.begin_pass)
        ledger.commit(enroll.enroll, ASKED, row_requests(range(self.ROWS)), DEFAULT_SELECTION)

        def follow() -> None:
            ledger.commit(enroll.apply_limits, DEFAULT_SELECTION)
            ledger.commit(queue.fill_queue, DEFAULT_SELECTION)
            ledger.commit(enroll.decision_counts)
            ledger.commit(enroll.enrolled_counts)
            ledger.commit(enroll.oldest_answer_ms)

        assert count_statements(ledger.wrapped, follow) < self.FEW


def test_plan_during_run_counts_requests_once(tmp_path: Path) -> None:
    """During a run, a request that was unknown at first is counted once, even after it gets an id."""
    ledger = CommittingLedger.open(tmp_path / "ledger.db")
    reader = Database(ledger.path, read_only=True)
    enroll.begin_pass(reader)
    enroll.preview(reader, row_requests([1, 2]), DEFAULT_SELECTION)
    ledger.start_and_enroll(1).settle(ledger.submit(), FOUND)
    enroll.preview(reader, row_requests([1, 2, 3], 2), DEFAULT_SELECTION)
    assert enroll.decision_counts(reader) == {Decision.NEW: 3}
    assert [row.first_position for row in enroll.row_decisions(reader, row_requests([3, 2, 1]))] == [4, 1, 0]
    reader.close()
    ledger.wrapped.close()
