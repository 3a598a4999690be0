"""A client sees each fault of the proxy as described, and without faults no difference."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import httpx
import pytest

from tests.support.faulty_proxy import (
    ChooseFault,
    Exchange,
    FaultyProxy,
    ProxyFault,
    ProxyFaultKind,
    faulty_proxy,
    random_faults,
)
from tests.support.workspace import SandboxApi

LEAD = {"first_name": "Ada", "last_name": "Byron", "company": "engine.example"}


class ProxiedClient:
    """Sends requests to the API through the proxy, over one connection if possible."""

    def __init__(self, proxy: FaultyProxy, api: SandboxApi) -> None:
        self.http = httpx.Client(verify=False, trust_env=False, timeout=5, headers={"x-apikey": api.api_key})  # noqa: S501
        self.url = proxy.base_url

    def post_run(self, name: str = "Ada") -> httpx.Response:
        """Submit a run; return the response."""
        params = LEAD | {"first_name": name}
        return self.http.post(f"{self.url}/waterfalls/email_getter/run", json={"params": params, "enrichments": [833]})

    def submit(self, name: str = "Ada") -> str:
        """Submit a run; return its task id."""
        return str(self.post_run(name).json()["task_id"])

    def get_task(self, task_id: str) -> httpx.Response:
        """Poll a task; return the response."""
        return self.http.get(f"{self.url}/tasks/{task_id}")

    def task_body(self, task_id: str) -> dict[str, Any]:
        """Poll a task; return its body."""
        read: dict[str, Any] = self.get_task(task_id).json()
        return read


@contextmanager
def open_client(api: SandboxApi, choose_fault: ChooseFault) -> Iterator[ProxiedClient]:
    """Open a client behind a proxy with faults."""
    with faulty_proxy(api.base_url, choose_fault) as proxy:
        client = ProxiedClient(proxy, api)
        try:
            yield client
        finally:
            client.http.close()


def faults_for(kind: str, *faults: ProxyFault | None) -> Callable[[Exchange], ProxyFault | None]:
    """Apply these faults to the first requests of a kind, in order."""
    return lambda exchange: (
        faults[exchange.number - 1] if exchange.kind == kind and exchange.number <= len(faults) else None
    )


def test_no_faults_by_default(api: SandboxApi) -> None:
    """Forwards every answer unchanged, and the sandbox's controls work."""
    with open_client(api, lambda _: None) as client:
        task_id = client.submit()
        assert client.task_body(task_id)["task_id"] == task_id
        assert client.http.get(client.url.removesuffix("/v1") + "/__audit").json()["accepted"] == 1


@pytest.mark.parametrize("after_s", [0.0, 0.01])
def test_repeated_response(api: SandboxApi, after_s: float) -> None:
    """Sends the previous response to the next request on the same connection."""
    with open_client(api, faults_for("GET", None, ProxyFault(ProxyFaultKind.REPEAT, after_s))) as client:
        first, second = client.submit("Ada"), client.submit("Bela")
        client.get_task(first)
        host, port = client.url.split("/")[2].split(":")
        with socket.create_connection((host, int(port)), 5) as raw:
            head = f"GET /v1/tasks/{second} HTTP/1.1\r\nhost: {host}\r\nx-apikey: {api.api_key}\r\n\r\n"
            raw.sendall(head.encode())
            seen = b""
            while seen.count(b"HTTP/1.1 200") < 2 or seen.count(b"}") < 2:
                seen += raw.recv(65536)
        assert seen.count(second.encode()) == 4


def test_unsolicited_response(api: SandboxApi) -> None:
    """Sends a 429 in the same write."""
    with open_client(api, faults_for("POST", ProxyFault(ProxyFaultKind.UNSOLICITED, 0.0, status=429))) as client:
        assert client.post_run().status_code == 200
    assert api.audit()["accepted"] == 1


def test_swapped_polls(api: SandboxApi) -> None:
    """Two polls get each other's answers."""
    swap = ProxyFault(ProxyFaultKind.SWAP)
    with open_client(api, faults_for("GET", swap, swap)) as client, open_client(api, lambda _: None) as other:
        first, second = client.submit("Ada"), client.submit("Bela")
        other.url = client.url
        received: dict[str, str] = {}
        threads = [
            Thread(
                target=lambda sender=sender, task_id=task_id: received.update(
                    {task_id: sender.task_body(task_id)["task_id"]}
                )
            )
            for sender, task_id in ((client, first), (other, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert received == {first: second, second: first}


def test_swap_without_partner(api: SandboxApi) -> None:
    """A response waits for a partner only for a limited time."""
    with open_client(api, faults_for("GET", ProxyFault(ProxyFaultKind.SWAP))) as client:
        task_id = client.submit()
        assert client.task_body(task_id)["task_id"] == task_id


def test_response_of_other_task(api: SandboxApi) -> None:
    """A poll gets an earlier poll's answer; a POST gets a known id that was polled."""
    with open_client(api, faults_for("GET", None, ProxyFault(ProxyFaultKind.OTHER_TASK))) as client:
        first, second = client.submit("Ada"), client.submit("Bela")
        right = client.get_task(first).content
        assert client.get_task(second).content == right
        assert client.task_body(second)["task_id"] == second
    with open_client(
        api,
        faults_for(
            "POST",
            ProxyFault(ProxyFaultKind.OTHER_TASK),
            None,
            ProxyFault(ProxyFaultKind.OTHER_TASK),
            ProxyFault(ProxyFaultKind.FIRST_AT_ONCE),
        ),
    ) as client:
        first, second = client.submit("Chidi"), client.submit("Dolores")
        assert first != second
        client.get_task(second)
        assert (client.submit("Emre"), client.submit("Freya")) == (second, first)
    assert api.audit()["accepted"] == 6


def test_response_of_unknown_task(api: SandboxApi) -> None:
    """The response has a task id that does not exist, and looks like a result."""
    with open_client(
        api,
        faults_for(
            "GET", ProxyFault(ProxyFaultKind.UNKNOWN_TASK), ProxyFault(ProxyFaultKind.UNKNOWN_TASK, task_id="nowhere")
        ),
    ) as client:
        task_id = client.submit()
        other_lead = client.task_body(task_id)
        assert other_lead["task_id"] != task_id
        assert other_lead["status"] == "completed"
        assert client.task_body(task_id)["request_id"] == "nowhere"
    with open_client(api, faults_for("POST", ProxyFault(ProxyFaultKind.UNKNOWN_TASK))) as client:
        assert client.get_task(client.submit("Bela")).status_code == 404


def test_truncated_response(api: SandboxApi) -> None:
    """The connection ends in the middle of the body."""
    with open_client(api, faults_for("GET", ProxyFault(ProxyFaultKind.TRUNCATED))) as client:
        task_id = client.submit()
        with pytest.raises(httpx.RemoteProtocolError):
            client.get_task(task_id)
        assert client.task_body(task_id)["task_id"] == task_id


def test_changed_status(api: SandboxApi) -> None:
    """The body comes with another 2xx status."""
    with open_client(api, faults_for("POST", ProxyFault(ProxyFaultKind.STATUS, status=203))) as client:
        response = client.post_run()
        assert response.status_code == 203
        assert client.task_body(response.json()["task_id"])["status"] == "completed"


def test_reset_is_forwarded(api: SandboxApi) -> None:
    """Forwards the API's connection reset."""
    api.inject_fault("reset-after")
    with open_client(api, lambda _: None) as client, pytest.raises(httpx.ReadError, match="reset"):
        client.post_run()
    assert api.audit()["accepted"] == 1


def test_random_faults_follow_seed() -> None:
    """The same seed chooses the same faults, about as often as configured; none with probability 0."""
    exchanges = [Exchange("POST" if number % 2 else "GET", number, 1, "/v1/tasks/x") for number in range(1, 2_001)]

    def chosen_faults(seed: int) -> list[ProxyFault | None]:
        choose = random_faults({ProxyFaultKind.REPEAT: (0.1, 0.0), ProxyFaultKind.UNSOLICITED: (0.0, 0.3)}, seed)
        return [choose(exchange) for exchange in exchanges]

    assert chosen_faults(1) == chosen_faults(1) != chosen_faults(2)
    posts = [fault for fault, exchange in zip(chosen_faults(1), exchanges, strict=True) if exchange.is_post]
    assert {fault.kind for fault in posts if fault} == {ProxyFaultKind.REPEAT}
    assert 60 < sum(fault is not None for fault in posts) < 140
    assert {fault.status for fault in chosen_faults(1) if fault and fault.kind is ProxyFaultKind.UNSOLICITED} <= {
        408,
        429,
        503,
    }
