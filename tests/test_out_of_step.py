"""Each trick of the proxy is seen by a client as it says; without tricks nothing is seen of it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import httpx
import pytest

from tests.harness import Api
from tests.out_of_step import Act, Choose, Exchange, Proxy, Trick, by_chance, out_of_step

LEAD = {"first_name": "Ada", "last_name": "Byron", "company": "engine.example"}


class Client:
    """Talks to the API through the proxy, over one connection when it can."""

    def __init__(self, proxy: Proxy, api: Api) -> None:
        self.http = httpx.Client(verify=False, trust_env=False, timeout=5, headers={"x-apikey": api.api_key})  # noqa: S501
        self.url = proxy.base_url

    def post(self, name: str = "Ada") -> httpx.Response:
        """Submit a run."""
        params = LEAD | {"first_name": name}
        return self.http.post(f"{self.url}/waterfalls/email_getter/run", json={"params": params, "enrichments": [833]})

    def run(self, name: str = "Ada") -> str:
        """Submit a run; return its task id."""
        return str(self.post(name).json()["task_id"])

    def get(self, task_id: str) -> httpx.Response:
        """Poll a task."""
        return self.http.get(f"{self.url}/tasks/{task_id}")

    def task(self, task_id: str) -> dict[str, Any]:
        """Poll a task; return its body."""
        read: dict[str, Any] = self.get(task_id).json()
        return read


@contextmanager
def talking(api: Api, choose: Choose) -> Iterator[Client]:
    """Talk through a proxy with tricks."""
    with out_of_step(api.base_url, choose) as proxy:
        client = Client(proxy, api)
        try:
            yield client
        finally:
            client.http.close()


def on(kind: str, *tricks: Trick | None) -> Callable[[Exchange], Trick | None]:
    """Play these tricks with the first requests of a kind, in order."""
    return lambda exchange: (
        tricks[exchange.number - 1] if exchange.kind == kind and exchange.number <= len(tricks) else None
    )


def test_without_tricks_nothing_is_seen_of_it(api: Api) -> None:
    """Every answer is the API's own, and the switches work."""
    with talking(api, lambda _: None) as client:
        task_id = client.run()
        assert client.task(task_id)["task_id"] == task_id
        assert client.http.get(client.url.removesuffix("/v1") + "/__audit").json()["accepted"] == 1


@pytest.mark.parametrize("after_s", [0.0, 0.01])
def test_an_answer_comes_twice(api: Api, after_s: float) -> None:
    """The next request on that connection gets the answer of the one before."""
    with talking(api, on("GET", None, Trick(Act.REPEAT, after_s))) as client:
        first, second = client.run("Ada"), client.run("Bela")
        client.get(first)
        host, port = client.url.split("/")[2].split(":")
        with socket.create_connection((host, int(port)), 5) as raw:
            head = f"GET /v1/tasks/{second} HTTP/1.1\r\nhost: {host}\r\nx-apikey: {api.api_key}\r\n\r\n"
            raw.sendall(head.encode())
            seen = b""
            while seen.count(b"HTTP/1.1 200") < 2 or seen.count(b"}") < 2:
                seen += raw.recv(65536)
        assert seen.count(second.encode()) == 4


def test_an_answer_that_was_not_asked_for(api: Api) -> None:
    """A 429 follows in the same breath."""
    with talking(api, on("POST", Trick(Act.UNASKED, 0.0, status=429))) as client:
        assert client.post().status_code == 200
    assert api.audit()["accepted"] == 1


def test_two_polls_are_swapped(api: Api) -> None:
    """Each gets the other's answer."""
    swap = Trick(Act.SWAP)
    with talking(api, on("GET", swap, swap)) as client, talking(api, lambda _: None) as other:
        first, second = client.run("Ada"), client.run("Bela")
        other.url = client.url
        got: dict[str, str] = {}
        threads = [
            Thread(target=lambda who=who, asked=asked: got.update({asked: who.task(asked)["task_id"]}))
            for who, asked in ((client, first), (other, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == {first: second, second: first}


def test_a_swap_without_a_partner_is_none(api: Api) -> None:
    """An answer waits for another to be swapped with, but not for ever."""
    with talking(api, on("GET", Trick(Act.SWAP))) as client:
        task_id = client.run()
        assert client.task(task_id)["task_id"] == task_id


def test_another_tasks_answer(api: Api) -> None:
    """A poll gets what an earlier one got; a POST gets an id that is already known and was polled."""
    with talking(api, on("GET", None, Trick(Act.ANOTHER))) as client:
        first, second = client.run("Ada"), client.run("Bela")
        right = client.get(first).content
        assert client.get(second).content == right
        assert client.task(second)["task_id"] == second
    with talking(api, on("POST", Trick(Act.ANOTHER), None, Trick(Act.ANOTHER), Trick(Act.SHARED))) as client:
        first, second = client.run("Chidi"), client.run("Dolores")
        assert first != second
        client.get(second)
        assert (client.run("Emre"), client.run("Freya")) == (second, first)
    assert api.audit()["accepted"] == 6


def test_a_task_of_nowhere(api: Api) -> None:
    """Its id is nobody's, and its answer looks like one."""
    with talking(api, on("GET", Trick(Act.NOWHERE), Trick(Act.NOWHERE, task_id="nowhere"))) as client:
        task_id = client.run()
        stranger = client.task(task_id)
        assert stranger["task_id"] != task_id
        assert stranger["status"] == "completed"
        assert client.task(task_id)["request_id"] == "nowhere"
    with talking(api, on("POST", Trick(Act.NOWHERE))) as client:
        assert client.get(client.run("Bela")).status_code == 404


def test_half_an_answer(api: Api) -> None:
    """The connection ends in the middle of the body."""
    with talking(api, on("GET", Trick(Act.CUT))) as client:
        task_id = client.run()
        with pytest.raises(httpx.RemoteProtocolError):
            client.get(task_id)
        assert client.task(task_id)["task_id"] == task_id


def test_another_status(api: Api) -> None:
    """A body comes with another 2xx."""
    with talking(api, on("POST", Trick(Act.STATUS, status=203))) as client:
        response = client.post()
        assert response.status_code == 203
        assert client.task(response.json()["task_id"])["status"] == "completed"


def test_a_reset_stays_one(api: Api) -> None:
    """What the API breaks off is broken off."""
    api.fault("reset-after")
    with talking(api, lambda _: None) as client, pytest.raises(httpx.ReadError, match="reset"):
        client.post()
    assert api.audit()["accepted"] == 1


def test_chances_follow_the_seed() -> None:
    """The same seed plays the same tricks, about as often as it shall; nothing happens without a chance."""
    exchanges = [Exchange("POST" if number % 2 else "GET", number, 1, "/v1/tasks/x") for number in range(1, 2_001)]

    def played(seed: int) -> list[Trick | None]:
        choose = by_chance({Act.REPEAT: (0.1, 0.0), Act.UNASKED: (0.0, 0.3)}, seed)
        return [choose(exchange) for exchange in exchanges]

    assert played(1) == played(1) != played(2)
    posts = [trick for trick, exchange in zip(played(1), exchanges, strict=True) if exchange.is_post]
    assert {trick.act for trick in posts if trick} == {Act.REPEAT}
    assert 60 < sum(trick is not None for trick in posts) < 140
    assert {trick.status for trick in played(1) if trick and trick.act is Act.UNASKED} <= {408, 429, 503}
