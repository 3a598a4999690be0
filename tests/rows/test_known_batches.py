"""A batch whose rows are the same as when a run enrolled it is known by the ids of its requests."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.files import csv_format
from enrich.job.job import load_job
from enrich.job.target import Target, TargetKind
from enrich.ledger import enroll, erasure
from enrich.ledger.database import Database
from enrich.ledger.erasure import ForgottenRequests, read_or_make_key
from enrich.models import Decision, RequestSelection, RowStatus
from enrich.rows.batches import RowBatch, store_batch
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from tests.support.cases import examples, in_turn

CALL = Target(TargetKind.WATERFALL, "email_getter", (833, 966), 10)
TEMPLATE = RequestTemplate(CALL, ("name",), ("email",), {"new": "email"}, None)
KEYS = {
    "version": 1,
    "input": "leads.csv",
    "waterfall": "email_getter",
    "params": {"name": "Name", "company": {"column": ["Site", "Mail"], "transform": ["domain"]}, "email": "Mail"},
}
HEADER = ["Name", "Site", "Mail", "Note"]
LEADS = [
    ["Ada", "ada.example", "ada@ada.example", "a"],
    ["Ada", "www.ada.example", "ada@ada.example", "the same request"],
    ["", "bob.example", "", "no name"],
    ["Cleo", "gmail.com", "cleo", "no domain"],
    ["", "", "", "blank"],
]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Database]:
    """Return a new ledger."""
    with closing(Database(tmp_path / "ledger.db")) as database:
        yield database


def open_input(
    folder: Path, leads: Sequence[Sequence[str]] = LEADS, forgotten: ForgottenRequests | None = None, **keys: Any
) -> JobInput:
    """Write a job and its leads, and open them."""
    with (folder / "leads.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *leads])
    (folder / "job.yaml").write_text(json.dumps({**KEYS, **keys}), encoding="utf-8")
    return JobInput(load_job(folder / "job.yaml"), forgotten)


def read(rows: JobInput, ledger: Database, template: RequestTemplate = TEMPLATE) -> list[RowBatch]:
    """Enroll the input, and return what was read."""
    batches = []
    with ledger.transaction():
        enroll.begin_pass(ledger)
        for batch in rows.batches(template, ledger=ledger):
            ids = enroll.enroll(ledger, template.target, batch.requests(), RequestSelection())
            store_batch(ledger, rows.job, batch, ids)
            batches.append(batch)
    return batches


def is_known(batches: Sequence[RowBatch]) -> bool:
    """Return whether the batch was known."""
    (batch,) = batches
    return batch.ids is not None


CELL = st.sampled_from(["", " ", "Ada", "ada.example", "a@ada.example", "gmail.com", "N/A", "é", "\u200b", "a\nb", '"'])


@given(leads=st.lists(st.tuples(CELL, CELL, CELL, CELL), min_size=1, max_size=8))
@settings(max_examples=examples(60), deadline=None)
def test_known_batch_is_as_computed(tmp_path_factory: pytest.TempPathFactory, leads: list[tuple[str, ...]]) -> None:
    """The second pass finds the same requests, and says the same of the other rows, without computing them."""
    folder = tmp_path_factory.mktemp("known")
    with closing(Database(folder / "ledger.db")) as ledger:
        rows = open_input(folder, leads)
        (computed,) = read(rows, ledger)
        decided = enroll.decision_counts(ledger)
        (known,) = read(rows, ledger)
        assert known.ids is not None
        assert not known.params
        names = dict(ledger.execute("SELECT id, fingerprint FROM requests"))
        assert [None if number is None else names[number] for number in known.ids] == computed.fingerprints
        assert enroll.decision_counts(ledger) == decided
        for batch in (known, known.complete and known.complete()):
            assert batch is not None
            assert (batch.statuses, batch.errors) == (computed.statuses, computed.errors)
            assert (batch.left_out, batch.missing) == (computed.left_out, computed.missing)
            assert batch.frame.equals(computed.frame)
        parts = list(known.parts(3))
        assert [number for part in parts for number in part.ids or ()] == known.ids
        assert [error for part in parts for error in part.errors] == known.errors
        assert sum((part.missing for part in parts), Counter()) == known.missing
        whole = [part.complete() for part in parts if part.complete is not None]
        assert [name for part in whole for name in part.fingerprints] == computed.fingerprints
        assert [part.first_position for part in parts] == list(range(0, len(leads), 3))


def change_cell(column: int) -> Callable[[list[list[str]]], None]:
    """Return a change of a cell."""

    def change(leads: list[list[str]]) -> None:
        leads[0][column] = "new.example"

    return change


@in_turn(
    ("change", "known"),
    [
        (change_cell(0), False),
        (change_cell(1), False),
        (change_cell(3), True),
        (lambda leads: leads.insert(0, LEADS[3]), False),
        (lambda leads: leads.append(LEADS[3]), False),
        (lambda leads: leads.pop(), False),
        (lambda leads: leads[0].__setitem__(slice(0, 2), ["Adaada", ".example"]), False),
        (lambda leads: leads.__setitem__(slice(0, 2), [leads[3], leads[0]]), False),
    ],
)
def test_cells_that_requests_depend_on(
    tmp_path: Path, change: Callable[[list[list[str]]], None], *, known: bool
) -> None:
    """Other cells may change, and are written as they are."""
    with closing(Database(tmp_path / "ledger.db")) as ledger:
        read(open_input(tmp_path), ledger)
        leads = [list(lead) for lead in LEADS]
        change(leads)
        batches = read(open_input(tmp_path, leads), ledger)
        assert is_known(batches) is known
        assert batches[0].frame.rows() == [tuple(lead) for lead in leads]


@in_turn(
    "changed",
    [
        {"params": {**KEYS["params"], "company": {"column": ["Site"], "transform": ["domain"]}}},  # type: ignore[dict-item]
        {"params": {"name": "Name", "company": {"value": "a.example"}}},
        {"blanks": ["Ada"]},
        {"only_if_empty": ["Site"]},
        {"where": "\"Note\" <> 'a'"},
        {"waterfall": "email_getter", "name": "other"},
        {"suppress": "list.txt"},
    ],
)
def test_what_requests_depend_on_in_the_job(tmp_path: Path, changed: dict[str, Any]) -> None:
    """With another mapping, filter or list, the requests are computed again."""
    (tmp_path / "list.txt").write_text("ada.example\n", encoding="utf-8")
    with closing(Database(tmp_path / "ledger.db")) as ledger:
        read(open_input(tmp_path), ledger)
        assert is_known(read(open_input(tmp_path), ledger))
        rows = open_input(tmp_path, **changed)
        (batch,) = read(rows, ledger)
        assert batch.ids is None
        assert is_known(read(rows, ledger))


def test_what_requests_depend_on_in_the_api(tmp_path: Path, ledger: Database) -> None:
    """Another target, and what the API says about its params, make other requests."""
    rows = open_input(tmp_path)
    read(rows, ledger)
    for template in (
        replace(TEMPLATE, target=replace(CALL, enrichments=(966,))),
        replace(TEMPLATE, required_params=("name", "company")),
        replace(TEMPLATE, email_params=()),
        replace(TEMPLATE, choices={"name": {"ada": "Ada L."}}),
    ):
        assert not is_known(read(rows, ledger, template))
        assert is_known(read(rows, ledger, template))


def test_forgotten_people(tmp_path: Path, ledger: Database) -> None:
    """The request of a person who was forgotten since is left out, and no batch tells which rows had it."""
    (batch,) = read(open_input(tmp_path), ledger)
    name, params = batch.fingerprints[0], batch.params[0]
    assert name is not None
    assert params is not None
    key = read_or_make_key(ledger.location)
    with ledger.transaction():
        erasure.forget(ledger, key, [(1, name, params)], 1)
    assert ledger.execute("SELECT count(*) FROM known_batches").fetchone() == (0,)
    (batch,) = read(open_input(tmp_path, forgotten=erasure.load_forgotten(ledger)), ledger)
    assert batch.statuses[:2] == [RowStatus.FILTERED] * 2
    assert is_known(read(open_input(tmp_path, forgotten=erasure.load_forgotten(ledger)), ledger))
    assert not is_known(read(open_input(tmp_path), ledger))


@in_turn("keys", [{"dedupe": False}, {"caps": {"by": "company", "max": 1}}])
def test_batches_that_are_never_known(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Equal rows that are sent each, and groups, are computed in every pass."""
    with closing(Database(tmp_path / "ledger.db")) as ledger:
        rows = open_input(tmp_path, **keys)
        assert [is_known(read(rows, ledger)) for _ in range(2)] == [False, False]


def test_purged_params_are_restored(tmp_path: Path, ledger: Database) -> None:
    """A known request whose params were purged gets them back when it is to be sent again."""
    rows = open_input(tmp_path)
    (batch,) = read(rows, ledger)
    with ledger.transaction():
        ledger.execute("UPDATE requests SET params = '{}', erased_ms = 1")
    assert is_known(read(rows, ledger))
    sent = {text for text in batch.params if text is not None}
    assert {text for (text,) in ledger.execute("SELECT params FROM requests")} == sent


def test_part_of_a_changed_input(tmp_path: Path, ledger: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are stored by position: those before a change stay known, and what overlaps them is replaced."""
    monkeypatch.setattr(csv_format, "read_batches", partial(csv_format.read_batches, rows_per_batch=20))
    leads = [[f"Name{number}", "a.example", "", ""] for number in range(45)]
    rows = open_input(tmp_path, leads)
    assert [batch.ids is None for batch in read(rows, ledger)] == [True] * 3
    leads[21][0] = "Other"
    batches = read(open_input(tmp_path, leads), ledger)
    assert [batch.ids is None for batch in batches] == [False, True, False]
    assert Counter(enroll.decision_counts(ledger)) == {Decision.NEW: 45}
    assert ledger.execute("SELECT count(*) FROM known_batches").fetchone() == (3,)


@in_turn("content", ["", "{}", '{"ids":[2,1]}'])
def test_damaged_batch_is_computed_again(tmp_path: Path, content: str) -> None:
    """What is stored of a batch can be computed at any time, so damage to it does not stop a run or mix up rows."""
    with closing(Database(tmp_path / "ledger.db")) as ledger:
        rows = open_input(tmp_path)
        read(rows, ledger)
        with ledger.transaction():
            ledger.execute("UPDATE known_batches SET content = ?", (content,))
        assert [is_known(read(rows, ledger)) for _ in range(2)] == [False, True]


def test_batch_that_becomes_known_during_a_pass(tmp_path: Path, ledger: Database) -> None:
    """A plan that has counted a request as new counts it once, though another process enrolls it meanwhile."""
    rows = open_input(tmp_path)
    enroll.begin_pass(ledger)
    (computed,) = rows.batches(TEMPLATE, ledger=ledger)
    enroll.preview(ledger, computed.requests(), RequestSelection())
    before = enroll.decision_counts(ledger)
    with closing(Database(tmp_path / "ledger.db")) as other:
        read(rows, other)
    (known,) = rows.batches(TEMPLATE, ledger=ledger)
    assert known.ids is not None
    enroll.preview(ledger, known.requests(), RequestSelection())
    assert enroll.decision_counts(ledger) == before
