"""The vendor's SDK 2.8 works with the sandbox as with the real API."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.sandbox.conftest import SandboxClient, StartSandbox

databar = pytest.importorskip("databar", reason="the extra `bench` is not installed")

EMAIL = {"email": "ada.byron@engine.example"}


@pytest.fixture
def sdk(api: SandboxClient) -> Iterator[Any]:
    """Connect the SDK to a sandbox that finds everyone."""
    with databar.DatabarClient("sandbox-key", api.base_url, poll_interval_s=0) as client:
        yield client


def test_lists_and_describes(sdk: Any) -> None:
    """Enrichments, waterfalls and flows are valid by the SDK's models."""
    listed = sdk.list_enrichments()
    page = sdk.list_enrichments(page=1, limit=2)
    assert ([each.id for each in page.items], page.has_next_page) == ([each.id for each in listed[:2]], True)
    assert [each.id for each in sdk.list_enrichments(q="phone")] == [80]
    for each in listed:
        described = sdk.get_enrichment(each.id)
        assert described.params
        assert described.response_fields
    assert sdk.get_enrichment(60).pricing.parameter == "limit"
    assert sdk.get_enrichment(70).pagination.supported
    assert {each.identifier for each in sdk.list_waterfalls()} >= {"company_lookup", "person_by_link", "phone_getter"}
    [flow, *_] = sdk.list_flows()
    assert sdk.get_flow(flow.id).name == flow.name


def test_runs_enrichments(sdk: Any) -> None:
    """Single and bulk runs, pages included, return the fields that the description names."""
    task = sdk.run_enrichment(10, EMAIL)
    assert task.status == "processing"
    [verified] = sdk.poll_task(task.task_id)
    assert verified["email"] == EMAIL["email"]
    assert verified["status"]
    assert len(sdk.run_enrichment_sync(70, {"query": "bakery"}, pages=2)) == 20
    assert [row["email"] for row in sdk.run_enrichment_bulk_sync(10, [EMAIL, EMAIL])] == [EMAIL["email"]] * 2
    assert sdk.get_user().balance == pytest.approx(10_000 - 0.03 - 2)


def test_cancels_tasks(start: StartSandbox) -> None:
    """A running task is cancelled and refunded; the SDK raises on a finished one."""
    api = start(latency="fixed(60)")
    with databar.DatabarClient("sandbox-key", api.base_url, poll_interval_s=0) as sdk:
        task_id = sdk.run_enrichment(70, {"query": "bakery"}).task_id
        assert sdk.cancel_task(task_id).status == "cancelled"
        assert sdk.get_user().balance == 10_000
        with pytest.raises(databar.DatabarError):
            sdk.cancel_task(task_id)
