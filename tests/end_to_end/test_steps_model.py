"""Random jobs with steps against a model of them: what each step sends, what it costs, and what the output says."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enrich.run.context import RunOptions
from enrich.sandbox import databar
from enrich.sandbox.answers import Answer
from enrich.sandbox.lookups import Lookup
from tests.end_to_end.test_step_plans import make_plan
from tests.support.cases import examples
from tests.support.workspace import SandboxApi, Workspace, serve_api

#: The only param of each waterfall, and two fields of its result.
PARAMS = {"person_by_link": "link", "company_lookup": "company_website"}
FIELDS = {"person_by_link": ["work_email", "first_name"], "company_lookup": ["name", "linkedin"]}
#: The columns of the input, with cells that a row may have. Equal ones are frequent.
INPUT = {"A": ["a1", "a2", "a3", "v1", ""], "B": ["b1", "b2", "-"], "T": ["t1", "t2"], "M": ["m1", "", "-"]}
BLANK = ("", "-")
OPERATORS = {"=": str.__eq__, "<>": str.__ne__}
#: The waterfall, and the param as sent.
Key = tuple[str, str]
Row = dict[str, str]


@dataclass
class Step:
    """A step. `where` is a column, an operator and a text."""

    name: str
    waterfall: str
    sources: list[str]
    columns: dict[str, str]
    where: tuple[str, str, str] | None
    only_if_empty: list[str]

    @property
    def status(self) -> str:
        """The column with its status."""
        return f"enrich_{self.name}_status"

    def selects(self, row: Row) -> bool:
        """Return whether the condition holds."""
        holds = self.where is None or OPERATORS[self.where[1]](row[self.where[0]], self.where[2])
        return holds and all(row[column] in BLANK for column in self.only_if_empty)

    def as_json(self) -> dict[str, Any]:
        """Return the step as in a job file."""
        step = {name: getattr(self, name) for name in ("name", "waterfall", "columns", "only_if_empty")}
        where = {"where": "\"{}\" {} '{}'".format(*self.where)} if self.where else {}
        return step | {"params": {PARAMS[self.waterfall]: self.sources}} | where


def make_steps(rng: random.Random) -> list[Step]:
    """Make two to four steps. They may share columns, and `M` is one of the input, too."""
    steps: list[Step] = []
    for number in range(rng.randint(2, 4)):
        given = [column for step in steps for column in (*step.columns, step.status)]
        waterfall = rng.choice(list(PARAMS))
        columns = {rng.choice("xyzM"): name for name in FIELDS[waterfall][: rng.randint(1, 2)]}
        values = ["", "v1", "t1", "found", "failed"]
        where = (rng.choice(["T", "T", *given]), rng.choice(list(OPERATORS)), rng.choice(values))
        sources = rng.sample(sorted({"A", "B", "M", *given}), rng.randint(1, 2))
        empty = rng.sample(sorted({"M", *given}), rng.choice([0, 0, 1]))
        steps.append(Step(f"s{number}", waterfall, sources, columns, where if rng.random() < 0.5 else None, empty))
    return steps


def answer_of(key: Key) -> tuple[str, dict[str, str], int]:
    """Return outcome, fields and price (millionths) of a request. The fields may be blank."""
    rng = random.Random(str(key))
    outcome, price = rng.choice([("found", 500_000)] * 3 + [("missed", 0), ("failed", 250_000)])
    return outcome, {name: rng.choice(["v1", "v2", "a1", ""]) for name in FIELDS[key[0]] if outcome == "found"}, price


def make_answer(lookup: Lookup, *_: object, **__: object) -> Answer:
    """Answer a request of the sandbox."""
    (value,) = lookup.params.values()
    outcome, fields, price = answer_of((lookup.target.canonical["waterfall"], value))
    data = json.dumps([{"result": fields, "steps": []}]) if fields else "null"
    return Answer(outcome, data, '"wrong"' if outcome == "failed" else "null", price)  # type: ignore[arg-type]


@dataclass
class Model:
    """A job, and what its ledger has: the requests that each step has sent, and the names of the rows they are for."""

    steps: list[Step]
    merge: str
    complete: list[str]
    sent: set[tuple[str, Key]] = field(default_factory=set)
    named: set[tuple[object, ...]] = field(default_factory=set)

    def run(self, rows: Sequence[Row]) -> tuple[list[Row], list[int], dict[str, int]]:
        """Run the job. Return the cells of the output, the price of each row, and how many requests each step sends."""
        tables, found = [dict(row) for row in rows], [dict[str, str]() for _ in rows]
        prices, billed, new = [0] * len(rows), set[Key](), dict[str, int]()
        for number, step in enumerate(self.steps):
            given = {column for each in self.steps[:number] for column in (*each.columns, each.status)}
            texts = (next((table[name] for name in step.sources if table[name] not in BLANK), "") for table in tables)
            requests = [(step.waterfall, text) for text in texts]
            selected = [step.selects(table) for table in tables]
            names = [self._names(step, row, key) for row, key in zip(rows, requests, strict=True)]
            sending = [place for place, (_, text) in enumerate(requests) if selected[place] and text]
            requested = {name for place in sending for name in names[place]}
            # A row keeps what was sent for it, if that was not for another row which has the same cells.
            kept = [place for place, own in enumerate(names) if not selected[place] and own & self.named - requested]
            to_send = {requests[place] for place in sending} - {key for _, key in self.sent}
            new[step.name] = len(to_send)
            self.sent |= {(step.name, key) for key in to_send}
            self.named |= requested
            for place, (key, table, row) in enumerate(zip(requests, tables, rows, strict=True)):
                is_blank = selected[place] and given.isdisjoint(step.sources)
                outcome, fields, price = "invalid" if is_blank else "filtered", dict[str, str](), 0
                if place in sending or (place in kept and (step.name, key) in self.sent):
                    outcome, fields, price = answer_of(key)
                    prices[place] += 0 if key in billed else price
                    billed.add(key)
                values = {column: fields[name] for column, name in step.columns.items() if fields.get(name)}
                found[place] = values | found[place]
                for column in step.columns:
                    is_replaced = self.merge == "overwrite" or row.get(column, "") in BLANK
                    table[column] = found[place].get(column, row.get(column, "")) if is_replaced else row[column]
                is_answer = outcome in ("found", "missed")
                table[step.status] = ("found" if values else "not_found") if is_answer else outcome
        return [table | {"enrich_status": self._row_status(table)} for table in tables], prices, new

    def _row_status(self, table: Row) -> str:
        present = {table[step.status] for step in self.steps}
        if all(table[column] not in BLANK for column in self.complete):
            return "found"
        present = {"not_found" if status == "found" else status for status in present}
        return next(status for status in ("failed", "not_found", "invalid", "filtered") if status in present)

    def _names(self, step: Step, row: Row, key: Key) -> set[tuple[object, ...]]:
        """Return both names of a row in a step: by all of its cells, and by those that are sent."""
        sent = {column: row[column] for each in self.steps for column in each.sources if column in row}
        return {(step.name, key, *sorted(cells.items())) for cells in (row, sent)}


@pytest.fixture(scope="module")
def answering_api() -> Iterator[SandboxApi]:
    """Serve an API with the answers of `answer_of`."""
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as folder:
        patched.setattr(databar, "make_answer", make_answer)
        with serve_api(Path(folder) / "api.db") as api:
            yield api


@pytest.mark.long
@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_two_runs_of_a_random_job(answering_api: SandboxApi, seed: int) -> None:
    """Runs send what the model sends, plans foresee it, and output, collect and explain say what the model says.

    Between the runs, a cell, the order of the rows and a condition change.
    """
    rng = random.Random(seed)
    steps = make_steps(rng)
    model = Model(steps, rng.choice(["fill_empty", "overwrite"]), list(rng.choice(steps).columns))
    rows = [{name: rng.choice(cells) for name, cells in INPUT.items()} for _ in range(rng.randint(2, 8))]
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        for _ in range(2):
            job = {"version": 1, "input": "leads.csv", "output": "out.csv", "limits": {"requests_per_second": 1000}}
            job |= {"merge": model.merge, "complete": model.complete, "steps": [step.as_json() for step in steps]}
            workspace.write_job(json.dumps(job))
            workspace.write_leads([list(row.values()) for row in rows], list(INPUT))
            plan, _ = make_plan(workspace, answering_api, RunOptions())
            summary = workspace.run_job(answering_api)
            expected, prices, new = model.run(rows)

            assert {step["name"]: step["submitted"] for step in summary.steps} == new
            assert plan.steps[0].to_submit == new[steps[0].name]
            assert all(step.at_most >= number for step, number in zip(plan.steps, new.values(), strict=True))
            written = workspace.read_output()
            assert [{name: row[name] for name in expected[0]} for row in written] == expected
            assert [float(row["enrich_credits"] or 0) * 1e6 for row in written] == pytest.approx(prices)
            content = (workspace.folder / "out.csv").read_bytes()
            assert workspace.run_in_process("collect", "job.yaml").exit_code == 0
            assert (workspace.folder / "out.csv").read_bytes() == content
            explained = workspace.run_in_process("explain", "job.yaml", "--row", "1", "--json").json_output["rows"][0]
            assert [step["status"] for step in explained["steps"]] == [written[0][step.status] for step in steps]
            rng.shuffle(rows)
            column = rng.choice(list(INPUT))
            rng.choice(rows)[column] = rng.choice(INPUT[column])
            changed = rng.choice(steps)
            changed.where = ("T", rng.choice(list(OPERATORS)), "t1") if changed.where is None else None
