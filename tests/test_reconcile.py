"""The balance against the ledger, and what the person may decide of a doubt."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from enrich.api.waterfall import User
from enrich.difference import compare
from enrich.errors import Exit
from enrich.model import MICROS, State, read_balance
from enrich.surroundings import Options, Progress
from tests.cases import first_quick, in_turn
from tests.harness import BOTH_IN_TIME, HASTY, Api, Office, people, serving
from tests.wire import Reply, Seen, answering, http


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def credits_(amount: float) -> int:
    """Write credits as millionths."""
    return int(amount * MICROS)


def test_what_is_known_explains_the_difference() -> None:
    """Answers of known price alone: nothing is left to explain."""
    told = compare(3, credits_(100), credits_(90), [("known", True, 20, credits_(10), credits_(50))])

    assert (told.difference, told.spent.most, told.unexplained) == (10, 10, 0)


@in_turn("gone", [10.0, 12.0, 14.0])
def test_a_doubt_may_have_cost_anything_up_to_its_worst_price(gone: float) -> None:
    """Between nothing and the worst price everything is explained, and no part is said to be the one."""
    movements = [("known", True, 20, credits_(10), 0), ("in_doubt", True, 2, 0, credits_(4))]

    told = compare(1, credits_(100), credits_(100 - gone), movements)

    assert (told.in_doubt.least, told.in_doubt.most, told.unexplained) == (0, 4, 0)


def test_what_the_ledger_cannot_know_is_told_apart() -> None:
    """Above what all parts could cost it went elsewhere; below what they must cost it came from elsewhere."""
    movements = [("known", True, 20, credits_(10), 0), ("submitted", True, 1, 0, credits_(2))]

    assert compare(1, credits_(100), credits_(80), movements).unexplained == 8
    assert compare(1, credits_(100), credits_(95), movements).unexplained == -5


def test_what_was_reserved_before_can_only_give_back() -> None:
    """A task of an earlier execution had its price reserved already: settled now, the balance may rise."""
    movements = [("known", False, 1, credits_(1), credits_(3)), ("submitted", False, 1, 0, credits_(3))]

    told = compare(2, credits_(100), credits_(102), movements)

    assert (told.earlier.least, told.earlier.most) == (-2, 1)
    assert (told.at_the_api.least, told.at_the_api.most) == (-3, 0)
    assert told.unexplained == 0


def test_a_night_with_doubts_is_reconciled(tmp_path: Path, office: Office) -> None:
    """The command tells the difference, its parts, and who must decide; it changes nothing."""
    office.write_leads(people(12))
    with serving(tmp_path / "api.db") as api:
        api.fault("error-after", 2, "post", status=502)
        receipt = office.run(api, timing=HASTY)

        done = office.command("reconcile", "job.yaml", "--json", api=api)

        told = done.receipt
        assert receipt.exit_code == Exit.IN_DOUBT
        assert done.code == 0
        assert told["difference"] == pytest.approx(api.audit()["credits_charged"])
        assert told["spent"]["most"] == pytest.approx(receipt.credits_spent)
        assert told["in_doubt"]["number"] == 2
        assert told["unexplained"] == 0
        said = office.command("reconcile", "job.yaml", api=api).stdout
        assert "--retry in_doubt" in said
        assert "--accept in_doubt" in said
        assert api.audit()["accepted"] == 12


@pytest.mark.long
def test_others_who_use_the_account_are_not_blamed_on_the_job(tmp_path: Path, office: Office) -> None:
    """Credits that another ledger spent, or that were bought, are told as what they are: not ours."""
    office.write_leads(people(5))
    other = Office(office.folder / "other")
    other.folder.mkdir()
    other.write_job()
    other.write_leads(people(5, start=100))
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        office.run(api)
        theirs = other.run(api).credits_spent

        told = office.command("reconcile", "job.yaml", "--json", api=api).receipt
        assert told["unexplained"] == pytest.approx(theirs)
        assert "other users" in office.command("reconcile", "job.yaml", api=api).stdout

        api.top_up(1_000)
        told = office.command("reconcile", "job.yaml", "--json", api=api).receipt
        assert told["unexplained"] == pytest.approx(theirs - 1_000)
        assert "came in" in office.command("reconcile", "job.yaml", api=api).stdout


def test_answers_without_a_price_are_named(tmp_path: Path, office: Office) -> None:
    """Where the API hides what an answer cost, the difference is explained by their worst price."""
    office.write_leads(people(4))
    with serving(tmp_path / "api.db", hit_rate=1.0, hide_credits=True, shape="flat") as api:
        office.run(api)

        told = office.command("reconcile", "job.yaml", "--json", api=api).receipt

    assert told["unknown_price"]["number"] == 4
    assert told["unexplained"] == 0


def test_without_a_run_there_is_nothing_to_reconcile(api: Api, office: Office) -> None:
    """A job that never ran, and an execution that is not there, are refused."""
    office.write_leads(people(1))
    assert office.command("reconcile", "job.yaml", api=api).code == Exit.REFUSED
    office.run(api)
    assert office.command("reconcile", "job.yaml", "--since", "99", api=api).code == Exit.REFUSED
    assert office.command("reconcile", "job.yaml", "--since", "1", api=api).code == Exit.OK


def test_a_doubt_may_be_taken_for_lost(tmp_path: Path, office: Office) -> None:
    """`--accept in_doubt` makes it failed: told once with exit 10, never asked again by itself."""
    office.write_leads(people(6))
    with serving(tmp_path / "api.db") as api:
        api.fault("error-after", 1, "post", status=500)
        assert office.run(api, timing=HASTY).exit_code == Exit.IN_DOUBT

        accepted = office.run(api, Options(accept_doubts=True), HASTY)

        assert (accepted.exit_code, accepted.in_doubt, accepted.failed) == (Exit.SOME_FAILED, 0, 1)
        assert office.run(api, timing=HASTY).exit_code == Exit.OK
        assert api.audit()["accepted"] == 6
        with_word = office.run(api, Options(retry=frozenset({State.FAILED})), HASTY)
        assert (with_word.exit_code, with_word.submitted) == (Exit.OK, 1)


def test_to_accept_and_to_retry_are_opposites(api: Api, office: Office) -> None:
    """Both at once is a mistake of the command line."""
    office.write_leads(people(1))
    done = office.command("run", "job.yaml", "--accept", "in_doubt", "--retry", "in_doubt", api=api)
    assert done.code == Exit.USAGE
    assert api.audit()["accepted"] == 0


def test_the_receipt_and_the_status_show_the_difference(tmp_path: Path, office: Office) -> None:
    """The balance before and after, and what of it is not the credits spent."""
    office.write_leads(people(8))
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        api.fault("error-after", 1, "post", status=500)
        done = office.command("run", "job.yaml", api=api)

        assert "7 answers of known price" in done.stderr
        assert "1 in doubt, or 0.00" in done.stderr
        assert "enrich reconcile job.yaml" in done.stderr
        execution = office.command("status", "job.yaml", "--json").receipt["executions"][0]
        gone = execution["balance_before"] - execution["balance_after"]
        assert gone == pytest.approx(api.audit()["credits_charged"])
        assert gone > execution["credits_spent"]
        assert "beyond the credits spent" in office.command("status", "job.yaml").stdout


def test_no_more_is_submitted_than_can_be_fetched_in_time(tmp_path: Path, office: Office) -> None:
    """With a slow allowance and results that expire soon, few are in flight, whatever `in_flight` allows."""
    office.write_job(limits="{requests_per_second: 40, in_flight: 200}", policy="{result_ttl: 1s}")
    office.write_leads(people(40))
    seen: list[int] = []

    def show(progress: Progress) -> None:
        seen.append(progress.in_flight)

    with serving(tmp_path / "api.db", latency="fixed(0.3)") as api:
        receipt = office.run(api, show=show)

    assert receipt.exit_code == Exit.OK
    assert 0 < max(seen) <= 40 * 1 * 0.25


def test_doubts_are_remembered_until_they_are_decided(tmp_path: Path, office: Office) -> None:
    """Later runs do not hide what an earlier one left in doubt: the balance is looked at since then."""
    office.write_leads(people(4))
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        office.run(api)  # before there is any doubt
        office.write_leads(people(8))
        api.fault("error-after", 1, "post", status=500)
        doubtful = office.run(api, timing=HASTY)
        office.write_leads(people(12))
        office.run(api, timing=HASTY)
        office.run(api, timing=HASTY)

        told = office.command("reconcile", "job.yaml", "--json", api=api).receipt
        assert (told["since"], told["in_doubt"]["number"], told["unexplained"]) == (doubtful.execution, 1, 0)
        assert office.command("reconcile", "job.yaml", "--since", "4", "--json", api=api).receipt["since"] == 4
        status = office.command("status", "job.yaml", "--json").receipt
        assert status["doubts"]["number"] == 1
        assert status["doubts"]["oldest_execution"] == doubtful.execution
        assert status["doubts"]["credits_at_most"] > 0
        assert status["doubts"]["oldest_age_s"] >= 0
        assert status["balance"]["since_execution"] == doubtful.execution
        missing = status["balance"]["before"] - status["balance"]["after"] - status["balance"]["credits_spent"]
        assert 0 < missing <= status["doubts"]["credits_at_most"]
        shown = office.command("status", "job.yaml").stdout
        assert "may have cost up to" in shown
        assert f"of execution {doubtful.execution}" in shown

        office.run(api, Options(accept_doubts=True), HASTY)
        assert office.command("reconcile", "job.yaml", "--json", api=api).receipt["since"] == 5
        status = office.command("status", "job.yaml", "--json").receipt
        assert (status["doubts"], status["balance"]["since_execution"]) == (None, 5)


def test_a_cap_that_was_overrun_is_told_with_its_reason(office: Office) -> None:
    """Prices that rose while requests were at the API: how much, why, and what to look at."""
    office.write_leads(people(4))
    office.write_job(limits="{requests_per_second: 1000, max_credits: 20}", enrichments="[833]")
    with serving(office.folder / "api.db") as api:
        waterfall = httpx.get(f"{api.base_url}/waterfalls/email_getter", headers={"x-apikey": api.api_key}).json()

    def answer(seen: Seen) -> Reply:
        if seen.line.startswith("POST"):
            return http(200, {"task_id": f"t-{json.loads(seen.body)['params']['first_name']}"})
        if "/tasks/" in seen.line:
            task_id = seen.line.split()[1].rpartition("/")[2]
            done = {"task_id": task_id, "status": "completed", "credits_spent": 9, "data": {"email": "a@x.example"}}
            return http(200, done)
        return http(200, {"balance": 100, "workspace": "w"} if "/user/me" in seen.line else waterfall)

    with answering(answer) as wire:
        done = office.command("run", "job.yaml", "--json", "--receipt", api=Api(wire.base_url, "sandbox-key"))
    receipt, err = done.receipt, done.stderr

    over = receipt["credits_spent"] - 20
    assert over > 0
    assert receipt["credits_over_cap"] == pytest.approx(over)
    assert f"cap was overrun by {over:,.2f}" in receipt["notes"][-1]
    assert "over cap" in err
    assert "because a price rose" in err


@pytest.mark.parametrize("balance", first_quick(2, [-3, -0.5, "-3.5", "-1e3", "-0.000001"]))
def test_a_negative_balance_is_a_balance(office: Office, balance: object) -> None:
    """It is shown, and no run begins with it."""
    office.write_leads(people(2))
    with serving(office.folder / "api.db") as api:
        waterfall = httpx.get(f"{api.base_url}/waterfalls/email_getter", headers={"x-apikey": api.api_key}).json()

    def answer(seen: Seen) -> Reply:
        return http(200, {"balance": balance, "workspace": 7} if "/user/me" in seen.line else waterfall)

    with answering(answer) as wire:
        api = Api(wire.base_url, "sandbox-key")
        done = office.command("run", "job.yaml", "--json", api=api)
        assert (done.code, done.receipt["balance_before"]) == (Exit.REFUSED, pytest.approx(float(str(balance))))
        assert "the balance is -" in done.stderr
        planned = office.command("plan", "job.yaml", "--json", api=api).receipt
        assert planned["balance"] == pytest.approx(float(str(balance)))
        assert any("would be refused: the balance is -" in note for note in planned["notes"])
        assert all(seen.line.startswith("GET") for seen in wire.requests)


@in_turn("balance", ["NaN", "inf", "-Infinity", "much", [], {"amount": 1}, True, None, "1e400", 10**30])
def test_a_balance_that_cannot_be_read_is_not_known(balance: object) -> None:
    """It is never 0."""
    assert read_balance(User.model_validate({"balance": balance}).balance) is None
