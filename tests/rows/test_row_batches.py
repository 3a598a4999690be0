"""Batches give the same results as row by row, with no more ledger statements."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.files.csv_format import CsvWriter
from enrich.job.job import load_job
from enrich.ledger.ledger import Ledger
from enrich.models import Call, Decision, RowStatus
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.collector import answer_cells
from tests.support.cases import examples, in_turn
from tests.support.ledger import CALL as ASKED
from tests.support.ledger import FOUND, CommittingLedger, row_requests, sqlite_connection

CALL = Call("email_getter", (833, 966), 10)
JOB = """\
version: 1
input: leads.csv
waterfall: email_getter
dedupe: {dedupe}
params: {{'b "q"': B, email: {{column: [E, F]}}, a: A, c: {{value: US}}}}
"""
CELLS = st.text(alphabet='aZ@. \u00a0"\\/\b\f\n\r\t\x01\x1f\x7f\u2028\u2029e\u0301\u00e9\U0001f600', max_size=6)
#: Unicode's White_Space, as Rust strips it; Python strips \x1c to \x1f as well.
BLANKS = " \t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
MAILS = st.sampled_from(["a@b.example", "a@b", "@b.example", "a@b@c.d", "a b@c.d", "a\u2003b@c.d", "a@.", "a@\n."])


def expected_requests(
    leads: Sequence[Mapping[str, str]], *, dedupe: bool
) -> list[tuple[str | None, bytes | None, str | None]]:
    """Return each row's params, fingerprint and reason as the first version did; all ledgers depend on these bytes."""
    written = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    call = json.dumps([1, "run", CALL.waterfall, CALL.body()], sort_keys=True)
    prefix = blake2b(call.encode(), digest_size=16, person=b"enrich-request")
    times: dict[bytes, int] = {}
    asked: list[tuple[str | None, bytes | None, str | None]] = []
    for lead in leads:
        clean = {name: unicodedata.normalize("NFC", cell).strip(BLANKS) for name, cell in lead.items()}
        sent = {"a": clean["A"], 'b "q"': clean["B"], "c": "US", "email": clean["E"] or clean["F"]}
        params = {name: sent[name] for name in sorted(sent) if sent[name]}
        error = None
        if "a" not in params:
            error = "a is empty (A)"
        elif "email" in params:
            local, at, domain = params["email"].partition("@")
            if not (local and at and "." in domain) or "@" in domain or any(map(str.isspace, params["email"])):
                error = "email is no e-mail address (E, F)"
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
    with CsvWriter(raw, separator) as writer:
        writer.write(pl.DataFrame(rows, schema=dict.fromkeys(["^a$", "", "c"], pl.String), orient="row"))
    for row in rows:
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
        ("1.10", "1.1"),
        ("NaN", None),
        ('[1e400, "\\ud83d\\ude00"]', '[Infinity, "\U0001f600"]'),
        ('{"a": 18446744073709551617}', '{"a": 18446744073709551617}'),
        ("true", "true"),
        ("[]", None),
    ],
)
def test_number_precision_is_kept(value: str, text: str | None) -> None:
    """Numbers that the fast JSON parser would round or refuse are read by the exact one."""
    answer = f'{{"data": [{{"result": {{"found": {value}, "name": "Ada"}}, "steps": []}}]}}'
    assert answer_cells(answer, ["found", "name", "none"]) == [text, "Ada", None]


def count_statements(ledger: Ledger, work: Callable[[], object]) -> int:
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
    """A batch costs the ledger one statement a row to load it, and a few more."""

    ROWS, FEW = 1_000, 25

    @pytest.fixture
    def ledger(self, tmp_path: Path) -> CommittingLedger:
        """Open a ledger."""
        return CommittingLedger.open(tmp_path / "ledger.db")

    def test_two_statements_per_new_row(self, ledger: CommittingLedger) -> None:
        """A new row takes two statements, to load it and to insert its request."""
        batch = row_requests(range(self.ROWS))
        assert (
            count_statements(ledger.wrapped, lambda: ledger.commit(Ledger.enroll, ASKED, batch))
            < 2 * self.ROWS + self.FEW
        )

    def test_one_statement_per_known_row(self, ledger: CommittingLedger) -> None:
        """A known row takes one statement to enroll, preview or collect it again."""
        ledger.enroll(range(self.ROWS))
        batch = row_requests(range(self.ROWS))
        ledger.commit(Ledger.begin_pass)
        assert (
            count_statements(ledger.wrapped, lambda: ledger.commit(Ledger.enroll, ASKED, batch)) < self.ROWS + self.FEW
        )
        assert count_statements(ledger.wrapped, lambda: ledger.wrapped.preview(batch)) < self.ROWS + self.FEW
        assert count_statements(ledger.wrapped, lambda: ledger.wrapped.request_results(batch)) < self.ROWS + self.FEW

    def test_duplicate_rows_add_no_statements(self, ledger: CommittingLedger) -> None:
        """Duplicate rows are loaded once."""
        batch = row_requests([1, 2, 3] * self.ROWS)
        assert count_statements(ledger.wrapped, lambda: ledger.commit(Ledger.enroll, ASKED, batch)) < self.FEW
        assert count_statements(ledger.wrapped, lambda: ledger.wrapped.request_results(batch)) < self.FEW

    def test_selection_uses_few_statements(self, ledger: CommittingLedger) -> None:
        """Selecting, queueing and counting take a few statements, not one a row."""
        ledger.commit(Ledger.begin_pass)
        ledger.commit(Ledger.enroll, ASKED, row_requests(range(self.ROWS)))

        def follow() -> None:
            for move in (
                Ledger.apply_limits,
                Ledger.fill_queue,
                Ledger.decision_counts,
                Ledger.enrolled_counts,
                Ledger.oldest_answer_ms,
            ):
                ledger.commit(move)

        assert count_statements(ledger.wrapped, follow) < self.FEW


def test_plan_during_run_counts_requests_once(tmp_path: Path) -> None:
    """During a run, a request that was unknown at first is counted once, even after it gets an id."""
    ledger = CommittingLedger.open(tmp_path / "ledger.db")
    reader = Ledger(ledger.path, read_only=True)
    reader.preview(row_requests([1, 2]))
    ledger.start_and_enroll(1).settle(ledger.submit(), FOUND)
    reader.preview(row_requests([1, 2, 3], 2))
    assert reader.decision_counts() == {Decision.NEW: 3}
    assert [row.first_position for row in reader.row_decisions(row_requests([3, 2, 1]))] == [4, 1, 0]
    reader.close()
    ledger.wrapped.close()
