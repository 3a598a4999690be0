"""`enrich reconcile`: compares the balance with the ledger, and shows decisions on unconfirmed requests."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from enrich.commands.reconcile import format_reconciliation
from enrich.databar.description import Enrichment, User, Waterfall
from enrich.exit_codes import ExitCode
from enrich.ledger.lock import lock_ledger
from enrich.models import MICROS_PER_CREDIT, State, read_balance, to_micros
from enrich.run.balance import explain_balance
from enrich.run.context import RunOptions
from enrich.run.progress import Progress
from tests.support.cases import in_turn
from tests.support.raw_server import ReceivedRequest, Reply, http_reply, serve_replies
from tests.support.workspace import (
    BOTH_BACKENDS,
    SHORT_TIMEOUTS,
    SandboxApi,
    Workspace,
    make_leads,
    serve_api,
)


def credits_(amount: float) -> int:
    """Convert credits to millionths."""
    return int(amount * MICROS_PER_CREDIT)


def test_known_prices_explain_difference() -> None:
    """Known prices alone explain the whole difference."""
    comparison = explain_balance(3, credits_(100), credits_(90), [("known", True, 20, credits_(10), credits_(50))])

    assert (comparison.difference, comparison.spent.most, comparison.unexplained) == (10, 10, 0)


def test_unchanged_balance_is_one_line() -> None:
    """Says that the balance is unchanged, if there is nothing to explain."""
    comparison = explain_balance(4, credits_(9981.91), credits_(9981.91), [])

    assert list(format_reconciliation(comparison)) == ["Balance unchanged since run 4: 9,981.91"]


def test_unchanged_balance_with_parts() -> None:
    """Shows the parts of an unchanged balance, if there are any."""
    comparison = explain_balance(4, credits_(100), credits_(100), [("known", True, 20, credits_(10), 0)])

    lines = list(format_reconciliation(comparison))

    assert lines[0] == "Balance unchanged since run 4: 100.00"
    assert [line.split()[0] for line in lines[1:]] == ["10.00", "10.00"]
    assert lines[2].endswith("added: a top-up, or refunds")


@in_turn("difference", [10.0, 12.0, 14.0])
def test_unconfirmed_cost_range(difference: float) -> None:
    """Explains any cost between nothing and the maximum price, without naming one request."""
    changes = [("known", True, 20, credits_(10), 0), ("in_doubt", True, 2, 0, credits_(4))]

    comparison = explain_balance(1, credits_(100), credits_(100 - difference), changes)

    assert (comparison.in_doubt.least, comparison.in_doubt.most, comparison.unexplained) == (0, 4, 0)


def test_one_request_is_singular() -> None:
    """Each part is a number with its noun, in the singular for one."""
    movements = [
        ("known", True, 1, credits_(1), 0),
        ("known", False, 1, credits_(1), credits_(1)),
        *((state, True, 1, 0, credits_(1)) for state in ("submitted", "in_doubt", "expired", "found")),
    ]
    text = "\n".join(format_reconciliation(explain_balance(1, credits_(100), credits_(95), movements)))
    for words in (
        "1 result of known price",
        "1 result of earlier requests",
        "1 request running at Databar",
        "1 unconfirmed request",
        "1 expired request",
        "1 result of unknown price",
    ):
        assert f"  {words}\n" in text


def test_a_higher_balance_is_more() -> None:
    """A balance that rose is said to be more, not less by a negative number."""
    lines = list(format_reconciliation(explain_balance(1, credits_(100), credits_(105), [])))
    assert lines[1].split() == ["5.00", "credits", "more.", "The", "ledger", "explains:"]


def test_external_changes_are_separated() -> None:
    """Attributes what exceeds the maximum price to others, and what is below the minimum to a top-up."""
    changes = [("known", True, 20, credits_(10), 0), ("submitted", True, 1, 0, credits_(2))]

    assert explain_balance(1, credits_(100), credits_(80), changes).unexplained == 8
    assert explain_balance(1, credits_(100), credits_(95), changes).unexplained == -5


def test_earlier_reservations_can_be_returned() -> None:
    """The balance may rise when a task settles whose price an earlier execution reserved."""
    changes = [("known", False, 1, credits_(1), credits_(3)), ("submitted", False, 1, 0, credits_(3))]

    comparison = explain_balance(2, credits_(100), credits_(102), changes)

    assert (comparison.earlier.least, comparison.earlier.most) == (-2, 1)
    assert (comparison.at_the_api.least, comparison.at_the_api.most) == (-3, 0)
    assert comparison.unexplained == 0


def test_reconcile_with_unconfirmed_requests(tmp_path: Path, workspace: Workspace) -> None:
    """Shows the difference, its parts and the decisions to take; changes nothing."""
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db") as api:
        api.inject_fault("error-after", 2, "post", status=502)
        summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)

        result = workspace.run_in_process("reconcile", "job.yaml", "--json", api=api)

        output = result.json_output
        assert summary.exit_code == ExitCode.IN_DOUBT
        assert result.exit_code == 0
        assert output["difference"] == pytest.approx(api.audit()["credits_charged"])
        assert output["spent"]["most"] == pytest.approx(summary.credits_spent)
        assert output["in_doubt"]["number"] == 2
        assert output["unexplained"] == 0
        message = workspace.run_in_process("reconcile", "job.yaml", api=api).stdout
        assert "\n  enrich run job.yaml --retry in_doubt\n" in message
        assert "\n  enrich run job.yaml --accept in_doubt\n" in message
        assert api.audit()["accepted"] == 12


@pytest.mark.long
def test_spending_by_others_is_not_attributed(tmp_path: Path, workspace: Workspace) -> None:
    """Reports credits that another ledger spent, or that were added, as external."""
    workspace.write_leads(make_leads(5))
    other = Workspace(workspace.folder / "other")
    other.folder.mkdir()
    other.write_job()
    other.write_leads(make_leads(5, start=100))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)
        spent_by_other = other.run_job(api).credits_spent

        output = workspace.run_in_process("reconcile", "job.yaml", "--json", api=api).json_output
        assert output["unexplained"] == pytest.approx(spent_by_other)
        assert "other users" in workspace.run_in_process("reconcile", "job.yaml", api=api).stdout

        api.top_up(1_000)
        output = workspace.run_in_process("reconcile", "job.yaml", "--json", api=api).json_output
        assert output["unexplained"] == pytest.approx(spent_by_other - 1_000)
        assert "added: a top-up" in workspace.run_in_process("reconcile", "job.yaml", api=api).stdout


@BOTH_BACKENDS
def test_run_in_progress_is_noted(api: SandboxApi, workspace: Workspace) -> None:
    """Balance and ledger are read one after the other: a run in progress may spend in between."""
    workspace.write_leads(make_leads(1))
    workspace.run_job(api)

    quiet = workspace.run_in_process("reconcile", "job.yaml", api=api)
    with lock_ledger(workspace.ledger_location, 0):
        noted = workspace.run_in_process("reconcile", "job.yaml", "--json", api=api)

    assert (quiet.exit_code, noted.exit_code) == (0, 0)
    assert "in progress" not in quiet.stderr
    assert "a run of this ledger is in progress" in noted.stderr


def test_unpriced_answers_are_listed(tmp_path: Path, workspace: Workspace) -> None:
    """Explains answers of unknown price by their maximum price."""
    workspace.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", hit_rate=1.0, hide_credits=True, shape="flat") as api:
        workspace.run_job(api)

        output = workspace.run_in_process("reconcile", "job.yaml", "--json", api=api).json_output

    assert output["unknown_price"]["number"] == 4
    assert output["unexplained"] == 0


def test_reconcile_without_runs(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses a job that never ran and an execution that does not exist."""
    workspace.write_leads(make_leads(1))
    assert workspace.run_in_process("reconcile", "job.yaml", api=api).exit_code == ExitCode.REFUSED
    workspace.run_job(api)
    assert workspace.run_in_process("reconcile", "job.yaml", "--since", "99", api=api).exit_code == ExitCode.REFUSED
    assert workspace.run_in_process("reconcile", "job.yaml", "--since", "1", api=api).exit_code == ExitCode.OK


def test_accept_in_doubt(tmp_path: Path, workspace: Workspace) -> None:
    """`--accept in_doubt` marks them as failed: exits once with 10 and never resends them automatically."""
    workspace.write_leads(make_leads(6))
    with serve_api(tmp_path / "api.db") as api:
        api.inject_fault("error-after", 1, "post", status=500)
        assert workspace.run_job(api, timing=SHORT_TIMEOUTS).exit_code == ExitCode.IN_DOUBT

        accepted = workspace.run_job(api, RunOptions(accept_in_doubt=True), SHORT_TIMEOUTS)

        assert (accepted.exit_code, accepted.in_doubt, accepted.failed) == (ExitCode.SOME_FAILED, 0, 1)
        assert workspace.run_job(api, timing=SHORT_TIMEOUTS).exit_code == ExitCode.OK
        assert api.audit()["accepted"] == 6
        retried = workspace.run_job(api, RunOptions(retry=frozenset({State.FAILED})), SHORT_TIMEOUTS)
        assert (retried.exit_code, retried.submitted) == (ExitCode.OK, 1)


def test_accept_and_retry_conflict(api: SandboxApi, workspace: Workspace) -> None:
    """Refuses `--accept` and `--retry` of the same requests together."""
    workspace.write_leads(make_leads(1))
    result = workspace.run_in_process("run", "job.yaml", "--accept", "in_doubt", "--retry", "in_doubt", api=api)
    assert result.exit_code == ExitCode.USAGE
    assert api.audit()["accepted"] == 0


def test_summary_and_status_show_difference(tmp_path: Path, workspace: Workspace) -> None:
    """Shows the balance before and after, and the part that differs from the credits spent."""
    workspace.write_leads(make_leads(8))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        api.inject_fault("error-after", 1, "post", status=500)
        result = workspace.run_in_process("run", "job.yaml", "-v", api=api)

        assert "7 results of known price" in result.stderr
        assert "1 unconfirmed request, or 0.00" in result.stderr
        assert "enrich reconcile job.yaml" in result.stderr
        execution = workspace.run_in_process("status", "job.yaml", "--json").json_output["executions"][0]
        difference = execution["balance_before"] - execution["balance_after"]
        assert difference == pytest.approx(api.audit()["credits_charged"])
        assert difference > execution["credits_spent"]
        assert "beyond the credits spent" in workspace.run_in_process("status", "job.yaml").stdout


@pytest.mark.long
def test_open_tasks_limited_by_expiry(tmp_path: Path, workspace: Workspace) -> None:
    """Limits open tasks below `in_flight` when sending is slow and results expire soon."""
    workspace.write_job(limits="{requests_per_second: 40, in_flight: 200}", policy="{result_ttl: 1s}")
    workspace.write_leads(make_leads(40))
    seen: list[int] = []

    def show(progress: Progress) -> None:
        seen.append(progress.in_flight)

    with serve_api(tmp_path / "api.db", latency="fixed(0.3)") as api:
        summary = workspace.run_job(api, on_progress=show)

    assert summary.exit_code == ExitCode.OK
    assert 0 < max(seen) <= 40 * 1 * 0.25


@pytest.mark.long
def test_unconfirmed_requests_persist(tmp_path: Path, workspace: Workspace) -> None:
    """Compares the balance since the first unconfirmed request; later runs do not hide it."""
    workspace.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)  # no unconfirmed request yet
        workspace.write_leads(make_leads(8))
        api.inject_fault("error-after", 1, "post", status=500)
        in_doubt = workspace.run_job(api, timing=SHORT_TIMEOUTS)
        workspace.write_leads(make_leads(12))
        workspace.run_job(api, timing=SHORT_TIMEOUTS)
        workspace.run_job(api, timing=SHORT_TIMEOUTS)

        output = workspace.run_in_process("reconcile", "job.yaml", "--json", api=api).json_output
        assert (output["since"], output["in_doubt"]["number"], output["unexplained"]) == (in_doubt.execution, 1, 0)
        assert (
            workspace.run_in_process("reconcile", "job.yaml", "--since", "4", "--json", api=api).json_output["since"]
            == 4
        )
        status = workspace.run_in_process("status", "job.yaml", "--json").json_output
        assert status["doubts"]["number"] == 1
        assert status["doubts"]["oldest_execution"] == in_doubt.execution
        assert status["doubts"]["credits_at_most"] > 0
        assert status["doubts"]["oldest_age_s"] >= 0
        assert status["balance"]["since_execution"] == in_doubt.execution
        missing = status["balance"]["before"] - status["balance"]["after"] - status["balance"]["credits_spent"]
        assert 0 < missing <= status["doubts"]["credits_at_most"]
        shown = workspace.run_in_process("status", "job.yaml").stdout
        assert "may have cost up to" in shown
        assert f"from run {in_doubt.execution}" in shown

        workspace.run_job(api, RunOptions(accept_in_doubt=True), SHORT_TIMEOUTS)
        assert workspace.run_in_process("reconcile", "job.yaml", "--json", api=api).json_output["since"] == 5
        status = workspace.run_in_process("status", "job.yaml", "--json").json_output
        assert (status["doubts"], status["balance"]["since_execution"]) == (None, 5)


@BOTH_BACKENDS
def test_cap_overrun_is_explained(workspace: Workspace) -> None:
    """Explains an overrun by prices that rose while tasks were open: how much, why, and where to look."""
    workspace.write_leads(make_leads(4))
    workspace.write_job(limits="{requests_per_second: 1000, max_credits: 20}", enrichments="[833]")
    with serve_api(workspace.folder / "api.db") as api:
        waterfall = httpx.get(f"{api.base_url}/waterfalls/email_getter", headers={"x-apikey": api.api_key}).json()

    def answer(request: ReceivedRequest) -> Reply:
        if request.line.startswith("POST"):
            return http_reply(200, {"task_id": f"t-{json.loads(request.body)['params']['first_name']}"})
        if "/tasks/" in request.line:
            task_id = request.line.split()[1].rpartition("/")[2]
            result = {"task_id": task_id, "status": "completed", "credits_spent": 9, "data": {"email": "a@x.example"}}
            return http_reply(200, result)
        return http_reply(200, {"balance": 100, "workspace": "w"} if "/user/me" in request.line else waterfall)

    with serve_replies(answer) as server:
        result = workspace.run_in_process(
            "run", "job.yaml", "--json", "--summary", api=SandboxApi(server.base_url, "sandbox-key")
        )
    summary, err = result.json_output, result.stderr

    over = summary["credits_spent"] - 20
    assert over > 0
    assert summary["credits_over_cap"] == pytest.approx(over)
    assert f"cap was exceeded by {over:,.2f}" in summary["notes"][-1]
    assert "credits over the cap: a price rose" in err
    assert "because a price rose" in err


@pytest.mark.long
@pytest.mark.parametrize("balance", [-3, -0.5, "-3.5", "-1e3", "-0.000001"])
def test_negative_balance(workspace: Workspace, balance: object) -> None:
    """Shows a negative balance and refuses to run with it."""
    workspace.write_leads(make_leads(2))
    with serve_api(workspace.folder / "api.db") as api:
        waterfall = httpx.get(f"{api.base_url}/waterfalls/email_getter", headers={"x-apikey": api.api_key}).json()

    def answer(request: ReceivedRequest) -> Reply:
        return http_reply(200, {"balance": balance, "workspace": 7} if "/user/me" in request.line else waterfall)

    with serve_replies(answer) as server:
        api = SandboxApi(server.base_url, "sandbox-key")
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
        assert (result.exit_code, result.json_output["balance_before"]) == (
            ExitCode.REFUSED,
            pytest.approx(float(str(balance))),
        )
        assert "the balance is -" in result.stderr
        planned = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        assert planned["balance"] == pytest.approx(float(str(balance)))
        assert any("would be refused: the balance is -" in note for note in planned["notes"])
        assert all(seen.line.startswith("GET") for seen in server.requests)


@in_turn(
    "balance",
    [
        *("NaN", "inf", "-Infinity", "much", "1_000", "+5", "٣", "9" * 1_000_000 + "x", "1e400"),
        *([], {"amount": 1}, True, None, 10**30, 10**400),
    ],
)
def test_unreadable_credits_are_unknown(balance: object) -> None:
    """An unreadable balance is unknown, never 0, and so is a price."""
    assert read_balance(User.model_validate({"balance": balance}).balance) is None
    provider = {"id": 1, "price": balance}
    waterfall = Waterfall.model_validate({"identifier": "w", "available_enrichments": [provider]})
    assert to_micros(waterfall.available_enrichments[0].price) is None
    assert to_micros(Enrichment.model_validate(provider).price) is None


@in_turn(("price", "micros"), [("1.50", 1_500_000), ("0E-7", 0), ("1e-05", 10), (1e-05, 10), (2, 2_000_000)])
def test_readable_credits(price: object, micros: int) -> None:
    """A number and its text are the same price. A text may have an exponent: Python's decimals write zero as `0E-7`."""
    assert to_micros(price) == read_balance(price) == micros
