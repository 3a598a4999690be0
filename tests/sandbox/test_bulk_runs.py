"""A bulk run is one task whose data is in the order of its rows."""

from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox, make_leads


def test_results_are_aligned_with_rows(start: StartSandbox) -> None:
    """The data has one element a row, null for no match; the progress counts them."""
    api = start(hit_rate=0.5)
    task = api.task_body(api.submit_bulk(make_leads(20)))
    found = [row for row in task["data"] if row is not None]
    assert (task["status"], len(task["data"])) == ("completed", 20)
    assert 0 < len(found) < 20
    missed = 20 - len(found)
    assert task["progress"] == {"total": 20, "completed": len(found), "no_data": missed, "failed": 0, "processing": 0}
    assert api.task_body(api.submit(make_leads(20)[0]))["data"] in ([task["data"][0]], None, [], {})


def test_bulk_cost_equals_single_runs(api: SandboxClient) -> None:
    """A bulk run costs as much as its rows in single runs."""
    bulk = api.task_body(api.submit_bulk(make_leads(5), enrichments=[833, 966]))
    singles = [api.submit_and_get(params, enrichments=[833, 966]) for params in make_leads(5)]
    assert bulk["credits_spent"] == sum(task["credits_spent"] for task in singles)
    assert [[row] for row in bulk["data"]] == [task["data"] for task in singles]


def test_partially_completed_status(start: StartSandbox) -> None:
    """With some failed rows the status is `partially_completed`, and the errors are in a list."""
    api = start(failure_rate=0.3)
    task = api.task_body(api.submit_bulk(make_leads(20)))
    failed = task["progress"]["failed"]
    assert (task["status"], len(task["data"])) == ("partially_completed", 20)
    assert 0 < failed <= len(task["error"])
    assert task["data"].count(None) == failed


def test_failed_status_when_all_rows_fail(start: StartSandbox) -> None:
    """A bulk run with only failed rows has failed."""
    api = start(failure_rate=1.0)
    assert api.task_body(api.submit_bulk(make_leads(3)))["status"] == "failed"


def test_partial_rows(start: StartSandbox) -> None:
    """A running bulk task shows its finished rows only on request."""
    api = start(latency="uniform(10,1000)")
    task_id = api.submit_bulk(make_leads(20))
    api.advance(500)
    task, partial = api.task_body(task_id), api.task_body(task_id, include_partial="true")
    result = partial["progress"]["completed"]
    assert (task["status"], task["data"], task["credits_spent"]) == ("processing", None, 0)
    assert (partial["status"], len(partial["data"])) == ("processing", result)
    assert 0 < result < 20
    api.advance(600)
    assert len(api.task_body(task_id)["data"]) == 20


def test_cancel_keeps_finished_rows(start: StartSandbox) -> None:
    """Cancelling keeps and charges the finished rows, and refunds the rest."""
    api = start(latency="uniform(10,1000)")
    task_id = api.submit_bulk(make_leads(20), enrichments=[833])
    api.advance(500)
    task = api.cancel(task_id).json()
    result = task["progress"]["completed"]
    assert (task["status"], len(task["data"]), task["progress"]["processing"]) == ("cancelled", result, 0)
    assert task["credits_spent"] == result * 0.5
    api.advance(1_000)
    assert api.balance() == 10_000 - result * 0.5
    assert sum(run["charged"] for run in api.audit()["runs"]) == result


def test_flat_result_shapes(start: StartSandbox) -> None:
    """The flat shapes also apply to the rows of a bulk run."""
    api = start(shape="flat_list")
    [row] = api.task_body(api.submit_bulk([ADA]))["data"]
    assert row.keys() == {"email"}


def test_audit_counts_each_row(api: SandboxClient) -> None:
    """The audit counts each row, with identical rows in one entry."""
    api.submit_bulk([ADA, ADA, *make_leads(3)])
    totals = api.audit()
    assert (totals["accepted"], totals["distinct"], totals["accepted_more_than_once"]) == (5, 4, 1)


def test_matches_without_alignment(start: StartSandbox) -> None:
    """Before July 2026 the data held only the matches in no order; the counts were the same."""
    api = start(hit_rate=0.5, bulk_data="hits")
    task = api.task_body(api.submit_bulk(make_leads(20)))
    assert None not in task["data"]
    assert len(task["data"]) == task["progress"]["completed"] < 20


def test_too_many_rows(start: StartSandbox) -> None:
    """Beyond the row limit, a bulk run is a 400 that names no row, and nothing is accepted."""
    api = start(bulk_limit=3)
    answer = api.post_bulk(make_leads(4))
    assert (answer.status_code, answer.json()["error"]) == (400, "BATCH_TOO_LARGE")
    assert api.audit()["accepted"] == 0
    assert api.task_body(api.submit_bulk(make_leads(3)))["status"] == "completed"
