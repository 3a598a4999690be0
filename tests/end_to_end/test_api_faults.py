"""The result of each API fault for a whole run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from enrich.exit_codes import ExitCode
from enrich.job.target import TargetKind
from enrich.run import poller
from enrich.run.run_state import Timeouts
from enrich.sandbox import Fault
from enrich.sandbox.settings import FAULT_KINDS
from tests.support.cases import first_quick
from tests.support.workspace import (
    JOB,
    JOBS,
    SHORT_TIMEOUTS,
    SandboxApi,
    Workspace,
    lead_name,
    make_leads,
    serve_api,
    wait_until,
)

#: `fault`: name in the sandbox (`get:` for a poll), injected for two of four leads. `lead is`: status of these two
#: leads after the run. `posted again`: whether the request is resent automatically: `same run` or `next run` when it
#: was certainly not accepted, `never` when that is unknown, blank when not needed. `accepted`: whether the API accepted
#: the first POST. `exit`: exit code of the run.
TABLE = """
| fault                            | lead is  | posted again | accepted | exit |
|----------------------------------|----------|--------------|----------|------|
| rate-limit                       | answered | same run     | no       | 0    |
| rate-limit-date                  | answered | same run     | no       | 0    |
| rate-limit-bare                  | answered | same run     | no       | 0    |
| redirect                         | answered | same run     | no       | 0    |
| no-credits                       | pending  | next run     | no       | 12   |
| unauthorized                     | pending  | next run     | no       | 3    |
| forbidden                        | pending  | next run     | no       | 3    |
| error-before-500                 | in_doubt | never        | no       | 14   |
| error-before-502                 | in_doubt | never        | no       | 14   |
| error-before-503                 | in_doubt | never        | no       | 14   |
| error-before-504                 | in_doubt | never        | no       | 14   |
| unavailable,seconds=0.5          | in_doubt | never        | no       | 14   |
| html                             | in_doubt | never        | no       | 14   |
| reset-before                     | in_doubt | never        | no       | 14   |
| silence-before                   | in_doubt | never        | no       | 14   |
| slow,seconds=4                   | in_doubt | never        | yes      | 14   |
| error-after-500                  | in_doubt | never        | yes      | 14   |
| error-after-502                  | in_doubt | never        | yes      | 14   |
| error-after-503                  | in_doubt | never        | yes      | 14   |
| error-after-504                  | in_doubt | never        | yes      | 14   |
| html-200                         | in_doubt | never        | yes      | 14   |
| reset-after                      | in_doubt | never        | yes      | 14   |
| silence-after                    | in_doubt | never        | yes      | 14   |
| broken-json                      | in_doubt | never        | yes      | 14   |
| wrong-json                       | in_doubt | never        | yes      | 14   |
| no-task-id                       | in_doubt | never        | yes      | 14   |
| lost-task                        | in_doubt | never        | yes      | 14   |
| slow,seconds=0.2                 | answered |              | yes      | 0    |
| late-task,seconds=0.2            | answered |              | yes      | 0    |
| odd-status                       | answered |              | yes      | 0    |
| get:rate-limit-bare              | answered |              | yes      | 0    |
| get:error-before-500             | answered |              | yes      | 0    |
| get:html                         | answered |              | yes      | 0    |
| get:html-200                     | answered |              | yes      | 0    |
| get:redirect                     | answered |              | yes      | 0    |
| get:reset-before                 | answered |              | yes      | 0    |
| get:silence-before               | answered |              | yes      | 0    |
| get:slow,seconds=1.5             | answered |              | yes      | 0    |
| get:broken-json                  | answered |              | yes      | 0    |
| get:wrong-json                   | answered |              | yes      | 0    |
| get:unauthorized                 | pending  |              | yes      | 3    |
| other-success,status=201         | answered |              | yes      | 0    |
| other-success,status=202         | answered |              | yes      | 0    |
| post:long-id                     | in_doubt | never        | yes      | 14   |
| flickering-task,seconds=0.5      | answered |              | yes      | 0    |
| wrong-date,seconds=7200          | answered |              | yes      | 0    |
| wrong-date,seconds=-90000        | answered |              | yes      | 0    |
| get:wrong-date,seconds=90000     | answered |              | yes      | 0    |
| get:odd-credits                  | answered |              | yes      | 0    |
| get:odd-credits,credits=-1       | answered |              | yes      | 0    |
| get:odd-credits,credits=1e300    | answered |              | yes      | 0    |
| get:invalid-utf8                 | answered |              | yes      | 0    |
| get:long-id                      | answered |              | yes      | 0    |
| get:deep-json                    | answered |              | yes      | 0    |
| get:many-steps,steps=20000       | answered |              | yes      | 0    |
| get:gzip-bomb                    | answered |              | yes      | 0    |
"""
LEADS, AFFECTED = 4, 2
#: A poll times out after 0.7 s; a POST, and a task that polls 404, after longer than any machine needs …
TIMEOUTS = replace(SHORT_TIMEOUTS, get_s=0.7, young_task_s=20.0, outage_s=30.0)
#: … except where the test waits for that timeout.
TIGHT_TIMEOUTS = replace(TIMEOUTS, post_s=2.0, young_task_s=0.7)
ANSWER_STATUSES = frozenset({"found", "not_found", "failed"})
#: One case of each kind, for `make test` and for enrichments; the long tests run all with a waterfall.
QUICK = {
    "rate-limit",
    "no-credits",
    "unauthorized",
    "reset-after",
    "silence-after",
    "no-task-id",
    "lost-task",
    "get:wrong-json",
    "get:unauthorized",
}


class FaultCase(NamedTuple):
    """A row of the table."""

    fault: str
    lead_status: str
    resent: str
    accepted: str
    exit_codes: str

    @property
    def timing(self) -> Timeouts:
        """The timeouts: short for faults that end only by a timeout."""
        ends_by_timeout = self.fault in {"silence-before", "silence-after", "slow,seconds=4", "lost-task"}
        return TIGHT_TIMEOUTS if ends_by_timeout else TIMEOUTS

    def inject(self, api: SandboxApi) -> None:
        """Inject the fault into the next two requests (or into all, when the whole API is down)."""
        name, *params = self.fault.split(",")
        fault = Fault.parse(",".join([f"{name}=0", *params]))
        count = 1 if fault.name == "unavailable" else AFFECTED
        api.inject_fault(fault.name, count, "get" if fault.scope == "get" else "post", **fault.params)


CASES = [FaultCase(*map(str.strip, line.strip("|").split("|"))) for line in TABLE.strip().splitlines()[2:]]


def leads_with_status(workspace: Workspace, statuses: Collection[str]) -> set[str]:
    """Return the names of the leads with one of these statuses."""
    return {row["First Name"] for row in workspace.read_output() if row["enrich_status"] in statuses}


def accepted_counts(api: SandboxApi) -> dict[str, int]:
    """Return the number of accepted runs of each lead."""
    return {lead_name(run["params"]): run["accepted"] for run in api.audit()["runs"]}


def test_table_covers_all_faults() -> None:
    """The table has every fault of the sandbox."""
    named = {Fault.parse(f"{case.fault.split(',')[0]}=0").name for case in CASES}
    assert named == set(FAULT_KINDS)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{kind} {case.fault}", marks=[] if case.fault in quick else pytest.mark.long)
        for kind, cases, quick in (
            (TargetKind.WATERFALL, CASES, QUICK),
            (TargetKind.ENRICHMENT, [case for case in CASES if case.fault in QUICK], {"reset-after"}),
        )
        for case in cases
    ],
)
def test_fault_outcomes_match_table(
    api: SandboxApi, workspace: Workspace, case: FaultCase, kind: TargetKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resends a request that was certainly not accepted; otherwise it stays in doubt and no plain run resends it."""
    monkeypatch.setattr(poller, "FAILED_POLL_S", 0.2)
    workspace.write_job(JOBS[kind])
    workspace.write_leads(make_leads(LEADS))
    case.inject(api)

    summary = workspace.run_job(api, timing=case.timing)

    assert summary.exit_code == int(case.exit_codes)
    assert api.audit()["faults"]
    if case.fault.startswith("slow"):  # carried out after the client gave up
        wait_until(lambda: sum(accepted_counts(api).values()) == LEADS)
    if summary.exit_code == ExitCode.KEY:  # the old output is kept
        assert workspace.run_in_process("collect", "job.yaml", "--partial").exit_code == 0
    affected = leads_with_status(workspace, {case.lead_status} if case.lead_status != "answered" else ANSWER_STATUSES)
    others = LEADS - len(affected)
    assert len(leads_with_status(workspace, ANSWER_STATUSES) - affected) == others
    if case.lead_status == "answered":
        assert others == 0
    elif case.lead_status == "in_doubt" and not case.fault.startswith("unavailable"):
        assert len(affected) == AFFECTED
    runs = accepted_counts(api)
    was_accepted = case.accepted == "yes" or case.resent == "same run"
    assert {runs.get(name, 0) for name in affected} == {int(was_accepted)}
    posts = api.audit()["requests"]["run"]
    refused = AFFECTED if case.resent == "same run" else 0
    assert posts <= LEADS + refused
    assert case.resent == "next run" or posts == LEADS + refused

    api.clear_faults()
    second = workspace.run_job(api, timing=case.timing)

    if case.resent == "never":
        assert (second.exit_code, second.submitted) == (14, 0)
        assert leads_with_status(workspace, {"in_doubt"}) == affected
        assert accepted_counts(api) == runs
    else:
        assert (second.exit_code, second.submitted) == (0, LEADS - len(runs))
        assert len(leads_with_status(workspace, ANSWER_STATUSES)) == LEADS
    assert api.audit()["accepted_more_than_once"] == 0


@pytest.mark.parametrize(
    ("hours", "fault"),
    first_quick(1, [(2, "rate-limit-date"), (-2, "rate-limit-date"), (2, "late-task,seconds=0.2"), (-2, "lost-task")]),
)
def test_api_clock_offset(tmp_path: Path, workspace: Workspace, hours: int, fault: str) -> None:
    """Measures Retry-After by the API's own clock; its offset makes no task too old or too young."""
    case = next(case for case in CASES if case.fault == fault)
    workspace.write_leads(make_leads(LEADS))
    with serve_api(tmp_path / "api.db", date_offset=hours * 3600.0) as api:
        case.inject(api)

        summary = workspace.run_job(api, timing=case.timing)
        second = workspace.run_job(api, timing=case.timing)

        assert summary.exit_code == second.exit_code == int(case.exit_codes)
        assert summary.elapsed_s < 60
        assert second.submitted == 0
        assert (api.audit()["accepted"], api.audit()["accepted_more_than_once"]) == (LEADS, 0)


@pytest.mark.long
def test_outage_limits_unconfirmed_requests(tmp_path: Path, workspace: Workspace) -> None:
    """Stops sending, probes one POST at a time with growing pauses, collects open tasks, then exits with 4."""
    bought, new = 5, 150
    workspace.write_job(JOB, limits="{requests_per_second: 1000, in_flight: 500}")
    workspace.write_leads(make_leads(bought))
    with serve_api(tmp_path / "api.db", latency="fixed(2.5)") as api:
        workspace.submit_without_collecting(api)
        workspace.write_leads(make_leads(bought + new))
        api.inject_fault("error-before", 10_000, "post", status=503)

        summary = workspace.run_job(api, timing=replace(TIMEOUTS, outage_s=2.5))

        assert summary.exit_code == 4
        assert len(leads_with_status(workspace, ANSWER_STATUSES)) == bought
        in_doubt_rows = summary.in_doubt or 0
        assert 5 <= in_doubt_rows <= 40
        assert summary.pending == new - in_doubt_rows
        assert api.audit()["requests"]["run"] == bought + in_doubt_rows
        claimed = _claimed_s(workspace)
        assert len(claimed) == in_doubt_rows
        pauses = [round(later - earlier, 1) for earlier, later in zip(claimed[-3:], claimed[-2:], strict=False)]
        assert pauses[0] >= 0.9
        assert pauses[1] >= 1.9
        assert api.audit()["accepted"] == bought

        api.clear_faults()
        second = workspace.run_job(api, timing=TIMEOUTS)

        assert (second.exit_code, second.submitted, second.in_doubt) == (14, new - in_doubt_rows, in_doubt_rows)
        assert api.audit()["accepted_more_than_once"] == 0


def _claimed_s(workspace: Workspace) -> list[float]:
    """Return the claim times of the requests in doubt, in seconds."""
    ledger = workspace.open_ledger()
    try:
        rows = ledger.session.execute("SELECT claimed_ms FROM attempts WHERE state = 'in_doubt' ORDER BY id").fetchall()
    finally:
        ledger.close()
    return [claimed_ms / 1000 for (claimed_ms,) in rows]
