"""What every answer of the API means, over real HTTP: the table at the top of `client`, line by line."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
from pydantic import SecretStr

from enrich.databar.client import Client
from enrich.databar.clock import SystemClock
from enrich.databar.environment import ApiAccess
from enrich.databar.responses import wrong_rows
from enrich.databar.task_results import has_value, parse_data
from enrich.errors import (
    ApiCallFailed,
    BadParams,
    InvalidPollResponse,
    JobRejected,
    OutOfCredits,
    RateLimited,
    RequestNotAccepted,
    RequestRefused,
    SubmissionUnconfirmed,
    TaskUnknown,
    Unauthorized,
    UnexpectedResponse,
)
from enrich.job.target import Target, TargetKind
from enrich.run.output_cells import answer_cells
from tests.support.cases import in_turn
from tests.support.raw_server import ConnectionAction, ReceivedRequest, Reply, http_reply, serve_replies, unused_port
from tests.support.workspace import SandboxApi, serve_api

T = TypeVar("T")

KEY = "key-5b1f0e77-that-nobody-may-see"
SOME = Target(TargetKind.WATERFALL, "w")
EMAIL_GETTER, NO_SUCH = Target(TargetKind.WATERFALL, "email_getter"), Target(TargetKind.WATERFALL, "no_such")
BODY = b'{"enrichments": [833], "params": {"first_name": "Ada", "last_name": "Byron", "company": "engine.example"}}'
PARAMS = ("first_name", "last_name", "company")
CREATED = http_reply(200, {"task_id": "t-1", "status": "created"})


@pytest.fixture(scope="module")
def shared_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxApi]:
    """Serve one API to all tests of this file."""
    with serve_api(tmp_path_factory.mktemp("api") / "api.db") as api:
        yield api


@pytest.fixture
def api(shared_api: SandboxApi) -> Iterator[SandboxApi]:
    """Return that API, without faults left by another test."""
    yield shared_api
    shared_api.clear_faults()


@dataclass
class RecordingClock(SystemClock):
    """A clock that records the API's time."""

    observed: list[int] = field(default_factory=list)

    def observe(self, api_ms: int) -> None:
        """Record the API's time."""
        self.observed.append(api_ms)


def call_api(
    base_url: str,
    call: Callable[[Client], Awaitable[T]],
    key: str = KEY,
    clock: SystemClock | None = None,
    seconds: float = 30.0,
) -> T:
    """Make calls with a new client."""

    async def run_call() -> T:
        access = ApiAccess(base_url, SecretStr(key))
        async with Client(access, clock or SystemClock(), post_timeout_s=seconds, get_timeout_s=seconds) as client:
            return await call(client)

    return asyncio.run(run_call())


def expect_failure(
    base_url: str, call: Callable[[Client], Awaitable[object]], key: str = KEY, seconds: float = 30.0
) -> ApiCallFailed:
    """Return the error of a call that must fail."""
    return expect_failures(base_url, [call], key, seconds)[0]


def failure_kinds(base_url: str, calls: list[Callable[[Client], Awaitable[object]]]) -> list[type[ApiCallFailed]]:
    """Return the error type of each call."""
    return [type(error) for error in expect_failures(base_url, calls)]


def expect_failures(
    base_url: str, calls: list[Callable[[Client], Awaitable[object]]], key: str = KEY, seconds: float = 30.0
) -> list[ApiCallFailed]:
    """Return the errors of calls that must fail; no error text contains the key."""

    async def each(client: Client) -> list[ApiCallFailed]:
        errors = []
        for call in calls:
            with pytest.raises(ApiCallFailed) as caught:
                await call(client)
            errors.append(caught.value)
        return errors

    errors = call_api(base_url, each, key, seconds=seconds)
    for error in errors:
        written = "".join(traceback.format_exception(error)) + repr(error) + str(error) + str(error.hint)
        assert key not in written
    return errors


def timeout_for(fault: str) -> float:
    """Return a long timeout, or a short one for faults that never answer."""
    return 0.3 if fault.startswith(("silence", "slow")) else 30.0


async def submit_run(client: Client) -> str:
    """Submit one run."""
    return await client.submit(EMAIL_GETTER, BODY)


async def get_task(client: Client) -> dict[str, Any]:
    """Poll a task."""
    return (await client.poll_task("t-1")).body


@pytest.mark.parametrize(
    ("fault", "params", "kind", "accepted"),
    [
        ("unauthorized", {}, Unauthorized, 0),
        ("forbidden", {}, Unauthorized, 0),
        ("no-credits", {}, OutOfCredits, 0),
        ("rate-limit", {}, RateLimited, 0),
        ("rate-limit-date", {}, RateLimited, 0),
        ("rate-limit-bare", {}, RateLimited, 0),
        ("redirect", {}, RequestNotAccepted, 0),
        ("error-before", {"status": 500}, SubmissionUnconfirmed, 0),
        ("error-before", {"status": 502}, SubmissionUnconfirmed, 0),
        ("error-before", {"status": 503}, SubmissionUnconfirmed, 0),
        ("error-before", {"status": 504}, SubmissionUnconfirmed, 0),
        ("error-before", {"status": 599}, SubmissionUnconfirmed, 0),
        ("error-after", {"status": 500}, SubmissionUnconfirmed, 1),
        ("error-after", {"status": 503}, SubmissionUnconfirmed, 1),
        ("unavailable", {"seconds": 0}, SubmissionUnconfirmed, 0),
        ("html", {}, SubmissionUnconfirmed, 0),
        ("html-200", {}, SubmissionUnconfirmed, 1),
        ("reset-before", {}, SubmissionUnconfirmed, 0),
        ("reset-after", {}, SubmissionUnconfirmed, 1),
        ("silence-before", {}, SubmissionUnconfirmed, 0),
        ("silence-after", {}, SubmissionUnconfirmed, 1),
        ("broken-json", {}, SubmissionUnconfirmed, 1),
        ("wrong-json", {}, SubmissionUnconfirmed, 1),
        ("no-task-id", {}, SubmissionUnconfirmed, 1),
    ],
)
def test_post_faults_are_classified(
    api: SandboxApi, fault: str, params: dict[str, Any], kind: type[ApiCallFailed], accepted: int
) -> None:
    """Only a POST that was provably not accepted is `NotAccepted`, and no fault makes the client post twice."""
    before = api.audit()
    api.inject_fault(fault, count=2, scope="post", **params)

    error = expect_failure(api.base_url, submit_run, key=api.api_key, seconds=timeout_for(fault))

    assert type(error) is kind
    after = api.audit()
    assert after["requests"]["run"] == before["requests"].get("run", 0) + 1
    assert after["accepted"] == before["accepted"] + accepted


@pytest.mark.parametrize(
    ("fault", "params", "kind"),
    [
        ("unauthorized", {}, Unauthorized),
        ("forbidden", {}, Unauthorized),
        ("rate-limit", {}, RateLimited),
        ("rate-limit-bare", {}, RateLimited),
        ("redirect", {}, RequestNotAccepted),
        ("error-before", {"status": 500}, RequestNotAccepted),
        ("error-before", {"status": 503}, RequestNotAccepted),
        ("error-after", {"status": 502}, RequestNotAccepted),
        ("unavailable", {"seconds": 0}, RequestNotAccepted),
        ("html", {}, RequestNotAccepted),
        ("html-200", {}, InvalidPollResponse),
        ("silence-before", {}, RequestNotAccepted),
        ("slow", {}, RequestNotAccepted),
        ("broken-json", {}, InvalidPollResponse),
        ("wrong-json", {}, InvalidPollResponse),
    ],
)
def test_poll_faults_are_retryable(
    api: SandboxApi, fault: str, params: dict[str, Any], kind: type[ApiCallFailed]
) -> None:
    """A poll can be repeated after any fault but a refused key; none of them loses the task."""
    task_id = call_api(api.base_url, submit_run, api.api_key)
    api.inject_fault(fault, scope="get", **params)

    error = expect_failure(
        api.base_url, lambda client: client.poll_task(task_id), key=api.api_key, seconds=timeout_for(fault)
    )
    api.clear_faults()

    assert type(error) is kind
    assert call_api(api.base_url, lambda client: client.poll_task(task_id), api.api_key).body["task_id"] == task_id


def test_run_returns_task_id(api: SandboxApi) -> None:
    """A submitted run returns its task id, and the task can be polled."""
    task_id = call_api(api.base_url, submit_run, api.api_key)
    answer = call_api(api.base_url, lambda client: client.poll_task(task_id), api.api_key).body
    assert answer["status"] == "completed"


def test_wrong_key_error(api: SandboxApi) -> None:
    """A refused key is a key error that does not show the key."""
    assert type(expect_failure(api.base_url, submit_run)) is Unauthorized
    assert type(expect_failure(api.base_url, lambda client: client.get_user())) is Unauthorized


def test_unknown_waterfall_error(api: SandboxApi) -> None:
    """A 404 for a run or for the waterfall is an error of the job."""
    assert isinstance(
        expect_failure(api.base_url, lambda client: client.submit(NO_SUCH, BODY), api.api_key), JobRejected
    )
    assert isinstance(
        expect_failure(api.base_url, lambda client: client.get_description(NO_SUCH), api.api_key), JobRejected
    )


def test_unknown_and_expired_task(api: SandboxApi) -> None:
    """A poll's 404 is an error of its own; a 410 is an answer."""
    assert type(expect_failure(api.base_url, get_task, api.api_key)) is TaskUnknown
    task_id = call_api(api.base_url, submit_run, api.api_key)
    call_api(api.base_url, lambda client: client.poll_task(task_id), api.api_key)
    api.advance(100_000)
    assert call_api(api.base_url, lambda client: client.poll_task(task_id), api.api_key).body == {"status": "gone"}


@in_turn("error_shape", ["new", "fields", "old"])
def test_error_400_about_row_or_job(tmp_path: Path, error_shape: Literal["new", "fields", "old"]) -> None:
    """A complaint about a param is about the row, one about a provider about the job, in every body format."""
    with serve_api(tmp_path / "api.db", error_shape=error_shape) as api:
        body = BODY.replace(b', "company": "engine.example"', b"")
        error = expect_failure(api.base_url, lambda client: client.submit(EMAIL_GETTER, body, PARAMS), api.api_key)
        assert type(error) is BadParams
        assert error.message == "company: This field is required."
        body = BODY.replace(b"833", b"1")
        assert (
            type(expect_failure(api.base_url, lambda client: client.submit(EMAIL_GETTER, body), api.api_key))
            is JobRejected
        )


@in_turn(
    ("status", "kind"),
    [
        (204, SubmissionUnconfirmed),
        (301, RequestNotAccepted),
        (302, RequestNotAccepted),
        (303, RequestNotAccepted),
        (304, RequestNotAccepted),
        (307, RequestNotAccepted),
        (308, RequestNotAccepted),
        (400, JobRejected),
        (402, SubmissionUnconfirmed),
        (405, SubmissionUnconfirmed),
        (408, SubmissionUnconfirmed),
        (409, SubmissionUnconfirmed),
        (410, SubmissionUnconfirmed),
        (418, SubmissionUnconfirmed),
        (422, JobRejected),
        (501, SubmissionUnconfirmed),
        (505, SubmissionUnconfirmed),
        (520, SubmissionUnconfirmed),
    ],
)
def test_other_run_statuses(status: int, kind: type[ApiCallFailed]) -> None:
    """The status decides, whatever the body is; a task id counts only with a 2xx."""
    bodies: list[object] = [None, b"<html>", {"detail": "said"}, {"task_id": "t-1"}, ["said"]]
    replies = iter([http_reply(status, None if status in (204, 304) else body) for body in bodies])
    with serve_replies(lambda _: next(replies)) as server:
        assert failure_kinds(server.base_url, [submit_run] * len(bodies)) == [kind] * len(bodies)
        assert len(server.requests) == len(bodies)


@in_turn(
    ("status", "kind"),
    [
        (400, RequestRefused),
        (409, RequestRefused),
        (418, RequestRefused),
        (422, RequestRefused),
        (500, RequestNotAccepted),
        (406, OutOfCredits),
    ],
)
def test_other_poll_statuses_keep_task(status: int, kind: type[ApiCallFailed]) -> None:
    """A poll's 400 does not mean an unknown task: a firewall's answer must not expire a paid task."""
    with serve_replies(http_reply(status, {"detail": [{"loc": ["path", "task_id"], "msg": "said"}]})) as server:
        assert type(expect_failure(server.base_url, get_task)) is kind


@pytest.mark.parametrize(
    "detail", ["no \x1b]0;owned\x07\x1b[2J\nerror: more", [{"loc": ["\x1b[31m"], "msg": "\u202e"}]]
)
def test_api_messages_are_one_clean_line(detail: object) -> None:
    """Messages of the API are shown as one line without control characters."""
    with serve_replies(http_reply(406, {"detail": detail})) as server:
        assert expect_failure(server.base_url, submit_run).message.isprintable()


@in_turn("where", ["/v1/other", "http://127.0.0.1:{port}/steal", "http://[", "http://127.0.0.1:99999/", "gopher:x"])
def test_post_redirects_are_not_followed(where: str) -> None:
    """A redirected POST was not accepted; it is not posted again, and the key goes to no other host."""
    with serve_replies(CREATED) as other_server:
        statuses = [301, 302, 303, 307, 308]
        replies = iter([http_reply(status, location=where.format(port=other_server.port)) for status in statuses])
        with serve_replies(lambda _: next(replies)) as server:
            assert failure_kinds(server.base_url, [submit_run] * len(statuses)) == [RequestNotAccepted] * len(statuses)
            assert len(server.requests) == len(statuses)
        assert not other_server.requests


@in_turn("status", [301, 302, 307, 308])
def test_get_redirect_to_same_host(status: int) -> None:
    """A GET follows a redirect on the same host, such as a moved slash."""

    def answer(request: ReceivedRequest) -> Reply:
        return (
            http_reply(200, {"workspace": "w"})
            if request.line.startswith("GET /v1/moved")
            else http_reply(status, location="/v1/moved")
        )

    with serve_replies(answer) as server:
        assert call_api(server.base_url, lambda client: client.get_user()).workspace == "w"
        assert [seen.line for seen in server.requests] == ["GET /v1/user/me HTTP/1.1", "GET /v1/moved HTTP/1.1"]


@in_turn("where", ["http://127.0.0.1:{port}/steal", "//127.0.0.1:{port}/steal", "http://localhost:{port}/"])
def test_get_redirect_to_other_host_is_refused(where: str) -> None:
    """A GET does not follow a redirect to another host or port, because it would carry the key."""
    with (
        serve_replies(http_reply(200, {})) as other_server,
        serve_replies(http_reply(302, location=where.format(port=other_server.port))) as server,
    ):
        error = expect_failure(server.base_url, lambda client: client.get_user())
        assert type(error) is RequestNotAccepted
        assert error.message == "the API redirects to another host"
        assert not other_server.requests


@in_turn("where", ["/v1/user/me", "http://[", "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "https://127.0.0.1/"])
def test_redirect_loops_fail(where: str) -> None:
    """A redirect that leads to no answer is one ordinary API failure."""
    with serve_replies(http_reply(302, location=where)) as server:
        assert type(expect_failure(server.base_url, lambda client: client.get_user())) is RequestNotAccepted
        assert len(server.requests) <= 3


@in_turn(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry_after": "7"}, 7.0),
        ({"retry_after": "0.5"}, 0.5),
        ({"retry_after": "-3"}, 0.0),
        ({"retry_after": "nan"}, None),
        ({"retry_after": "inf"}, None),
        ({"retry_after": "1e3"}, None),
        ({"retry_after": "-0"}, 0.0),
        ({"retry_after": "86400"}, 3600.0),
        ({"retry_after": "9" * 500}, 3600.0),
        ({"retry_after": "1_0"}, None),
        ({"retry_after": "\u00b2"}, None),
        ({"retry_after": "soon"}, None),
        ({"retry_after": ""}, None),
        ({"retry_after": "Sun, 01 Nov 2026 12:00:05 GMT", "date": "Sun, 01 Nov 2026 12:00:00 GMT"}, 5.0),
        ({"retry_after": "Sun, 01 Nov 2026 11:00:00 GMT", "date": "Sun, 01 Nov 2026 12:00:00 GMT"}, 0.0),
        ({"retry_after": "Sun, 01 Nov 2026 12:00:05 GMT"}, None),
        ({"retry_after": "Sun, 01 Nov 2026 12:00:05 -0000", "date": "Sun, 01 Nov 2026 12:00:00 GMT"}, None),
        ({"retry_after": "Fri, 31 Dec 9999 23:59:59 GMT", "date": "Sun, 01 Nov 2026 12:00:00 GMT"}, 3600.0),
        ({"retry_after": "Fri, 31 Dec 9999 23:59:59 -2359", "date": "Mon, 01 Jan 0001 00:00:00 +2359"}, 3600.0),
        ({"retry_after": "Sat, 01 Jan 0000 00:00:00 GMT", "date": "Sun, 01 Nov 2026 12:00:00 GMT"}, 0.0),
        ({"retry_after": "Sun, 01 Nov 20260 12:00:05 GMT", "date": "Sun, 01 Nov 2026 12:00:00 GMT"}, None),
        ({"retry_after": "Sun, 01 Nov 2026 12:00:05 +9999999999", "date": "Sun, 01 Nov 2026 12:00:00 GMT"}, None),
        ({"retry_after": "Sun, 01 Nov 2026 12:00:05 GMT", "date": "Sun, 01 Nov 99999999999999999999 12:00:00"}, None),
        ({"retry_after": ", , :", "date": ", , :"}, None),
        ({"retry_after": "Sun, 99 Nov 2026 12:00:05 GMT", "date": "Sun, 01 Nov 2026 12:00:00 GMT"}, None),
    ],
)
def test_retry_after_formats(headers: dict[str, str], seconds: float | None) -> None:
    """A date is compared with the API's own clock; an unreadable value is None."""
    with serve_replies(http_reply(429, {"detail": "Too Many Requests"}, **headers)) as server:
        error = expect_failure(server.base_url, submit_run)
    assert isinstance(error, RateLimited)
    assert error.retry_after == seconds


@in_turn(
    ("body", "task_id"),
    [
        ({"task_id": "abc"}, "abc"),
        ({"request_id": "abc"}, "abc"),
        ({"task_id": "new", "request_id": "old"}, "new"),
        ({"task_id": None, "request_id": "old"}, "old"),
        ({"task_id": "", "request_id": "old"}, "old"),
        ({"task_id": 17}, "17"),
        ({"task_id": "t" * 512}, "t" * 512),
        ({"task_id": "..t/1"}, "..t/1"),
        (b'\xef\xbb\xbf{"task_id": "abc"}', "abc"),
        ('{"task_id": "abc"}'.encode("utf-16"), "abc"),
        ('{"task_id": "abc"}'.encode("utf-16-le"), "abc"),
        ('{"task_id": "abc"}'.encode("utf-32"), "abc"),
        (b'{"task_id": "abc", "note": "\xff\t\x01", "n": %s, "m": NaN}' % (b"9" * 5000), "abc"),
    ],
)
def test_task_id_names_and_types(body: object, task_id: str) -> None:
    """`request_id` is accepted as the older name, and an id may have any form."""
    with serve_replies(http_reply(200, body)) as server:
        assert call_api(server.base_url, submit_run) == task_id


@in_turn(
    "body",
    [
        None,
        b"",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        {},
        [],
        "t-1",
        17,
        {"task_id": True},
        {"task_id": "t-1\0"},
        {"task_id": "t-1\u202e"},
        {"task_id": "\ud800"},
        {"task_id": f"t-{KEY}"},
        {"task_id": " "},
        {"task_id": "."},
        {"task_id": ".."},
        {"task_id": "t" * 513},
        {"task_id": 1.5},
        {"task_id": []},
    ],
)
def test_success_without_task_id_is_in_doubt(body: object) -> None:
    """A success without a task id is in doubt and not resent, because it may have been accepted."""
    with serve_replies(http_reply(200, body)) as server:
        assert type(expect_failure(server.base_url, submit_run)) is SubmissionUnconfirmed


@pytest.mark.long
@in_turn(
    "reply",
    [
        Reply(action=ConnectionAction.CLOSE),
        Reply(action=ConnectionAction.RESET),
        Reply(action=ConnectionAction.HANG),
        Reply(b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"task_id":', ConnectionAction.CLOSE),
        Reply(b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"task_id":', ConnectionAction.RESET),
        Reply(b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"task_id":', ConnectionAction.HANG),
        Reply(b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"tas\r\n', ConnectionAction.CLOSE),
        Reply(b"HTTP/1.1 200 OK\r\ncontent-le", ConnectionAction.CLOSE),
        Reply(b"SSH-2.0-OpenSSH_9.2\r\n\r\n", ConnectionAction.CLOSE),
        Reply(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope"),
        Reply(b"HTTP/1.1 100 Continue\r\n\r\n", ConnectionAction.CLOSE),
    ],
    ids=str,
)
def test_broken_connection_after_send_is_in_doubt(reply: Reply) -> None:
    """A connection that breaks after the request was sent leaves it in doubt; the client posts once."""
    with serve_replies(reply) as server:
        seconds = 0.3 if reply.action is ConnectionAction.HANG else 30.0
        assert type(expect_failure(server.base_url, submit_run, seconds=seconds)) is SubmissionUnconfirmed
        assert len(server.requests) == 1


@in_turn(("host", "scheme"), [("127.0.0.1", "http"), ("127.0.0.1", "https"), ("no-such-host.invalid", "https")])
def test_connection_failure_is_not_accepted(host: str, scheme: str) -> None:
    """A refused connection or an unknown host name means not sent: the request may be sent again."""
    base_url = f"{scheme}://{host}:{unused_port()}/v1"
    assert type(expect_failure(base_url, submit_run)) is RequestNotAccepted
    assert type(expect_failure(base_url, get_task)) is RequestNotAccepted


@in_turn(
    ("status", "body", "kind", "rows"),
    [
        (400, {"rows": [{"position": 2, "fields": {"company": ["Bad."]}}]}, BadParams, {1: "company: Bad."}),
        (422, {"detail": [{"loc": ["body", "params", 0, "company"], "msg": "no"}]}, BadParams, {0: "company: no"}),
        (400, {"detail": [{"company": ["Bad."]}]}, BadParams, {}),
        (400, {"error": "BATCH_TOO_LARGE", "detail": "At most 2 rows."}, JobRejected, None),
        (404, {"detail": "Not Found"}, JobRejected, None),
        (413, b"<html>", JobRejected, None),
        (409, {}, SubmissionUnconfirmed, None),
        (502, b"<html>", SubmissionUnconfirmed, None),
    ],
)
def test_bulk_rejection_details(status: int, body: object, kind: type, rows: dict[int, str] | None) -> None:
    """A rejected bulk run names the wrong rows, or that there are too many, or nothing about the rows."""
    with serve_replies(http_reply(status, body)) as server:
        error = expect_failure(
            server.base_url, lambda client: client.submit(EMAIL_GETTER, b'{"params": []}', PARAMS, rows=3)
        )
        assert isinstance(error, kind)
        assert getattr(error, "rows", None) == rows
        assert server.requests[0].line == "POST /v1/waterfalls/email_getter/bulk-run HTTP/1.1"


@in_turn("status", [400, 401, 403, 404, 406, 422, 429, 500])
def test_echoed_key_is_redacted(status: int) -> None:
    """A key that the API echoes is redacted: messages reach the ledger, the output and the log."""
    bodies = [
        {"detail": f"Invalid API key {KEY}"},
        {"detail": {"x": KEY}},
        {"detail": [{"loc": ["header", "x-apikey"], "msg": KEY}]},
        {"fields": {"company": [KEY]}},
    ]
    replies = iter([http_reply(status, body) for body in bodies * 2])
    with serve_replies(lambda _: next(replies)) as server:
        failure_kinds(server.base_url, [submit_run] * len(bodies) + [get_task] * len(bodies))


@in_turn(
    ("body", "named"),
    [
        ({"detail": {"company": ["This field is required."]}}, "company: This field is required."),
        ({"detail": [{"company": ["Too long.", "Too odd."]}]}, "company: Too long. Too odd."),
        (
            {"error": "INVALID_PARAMS", "detail": "x", "rows": [{"position": 1, "fields": {"company": ["No."]}}]},
            "company: No.",
        ),
        ({"error": "INVALID_PARAMS", "detail": "x", "fields": {"company": "No."}}, "company: No."),
        ({"detail": [{"loc": ["body", "params", "company"], "msg": "No.", "type": "t"}]}, "company: No."),
        ({"detail": [{"loc": ["body", "params", 0, "company"], "msg": "No."}]}, "company: No."),
        ({"detail": [{"loc": ["body", "params", "company", "str"], "msg": "No."}]}, "company: No."),
        ({"detail": {"company": ["No."], "phone": ["Required."]}}, "company: No."),
        ({"detail": {"Company": ["No."]}}, "company: No."),
        ({"rows": [{"position": 1, "fields": {"params.company": "No."}}]}, "company: No."),
        ({"detail": [{"loc": ["body", "params"], "msg": "Field required"}]}, None),
        ({"detail": [{"loc": ["body", "enrichments"], "msg": "Field required"}]}, None),
        ({"detail": [{"loc": ["header", "x-apikey"], "msg": "Field required"}]}, None),
        ({"detail": [{"loc": None, "msg": "No."}]}, None),
        ({"detail": {"enrichments": ["1 is not part of this waterfall."]}}, None),
        ({"rows": [{"position": 1, "fields": {"email_verifier": ["No."]}}]}, None),
        ({"detail": {"code": "DISABLED", "message": "This waterfall is switched off."}}, None),
        ({"detail": {"code": "PLAN", "reason": "Upgrade your plan."}}, None),
        ({"detail": {"quota": {"limit": 100, "used": 100}}}, None),
        ({"detail": {"non_field_errors": ["No."]}}, None),
        ({"detail": {"phone": ["Required."]}}, None),
        ({"detail": [{"phone": ["Required."]}]}, None),
        ({"fields": {"phone": ["Required."]}}, None),
        ({"rows": [{"position": 1, "fields": {"phone": ["Required."]}}]}, None),
        ({"rows": [{"position": 1, "reason": "Upgrade your plan."}]}, None),
        ({"detail": [{"loc": ["body", "params", "phone"], "msg": "Required."}]}, None),
        ({"detail": "Row 1: company: This field is required."}, None),
        ({"detail": None, "rows": None, "fields": None}, None),
        ({"detail": [None, 1, "x"], "rows": [None, {}]}, None),
        ([], None),
        (None, None),
    ],
)
def test_param_names_in_400_bodies(body: object, named: str | None) -> None:
    """Only a complaint about a param that the job sends names a row; any other is about the job."""
    assert (wrong_rows(body, 1, PARAMS) or {}).get(0) == named


def test_malformed_error_bodies() -> None:
    """A malformed error body still gives a message."""
    invalid_locations: list[object] = [None, 5, "body", {}, []]
    replies = iter([http_reply(422, {"detail": [{"loc": loc, "msg": None}, 1]}) for loc in invalid_locations])
    with serve_replies(lambda _: next(replies)) as server:
        assert failure_kinds(server.base_url, [submit_run] * len(invalid_locations)) == [JobRejected] * len(
            invalid_locations
        )


@in_turn(
    "answer",
    [
        f"{KEY} is not HTTP\r\n\r\n",
        f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nx: {KEY}\r\n",
        f"HTTP/1.1 200 OK\r\nx: {KEY}\r\ncontent-length: 9\r\n\r\n{KEY[0]}",
        f"HTTP/1.1 200 OK\r\nx: {KEY}{'a' * 10_000}\r\n\r\n",
        f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{KEY}\r\n",
    ],
)
def test_non_http_response_is_not_quoted(answer: str) -> None:
    """A response that is not HTTP is not quoted: messages are stored and logged, and it could contain personal data."""
    with serve_replies(Reply(answer.encode(), ConnectionAction.CLOSE)) as server:
        error = expect_failure(server.base_url, submit_run)
    assert (type(error), error.message) == (
        SubmissionUnconfirmed,
        "no response from the API: the connection ended too early, or the response is not HTTP",
    )


@in_turn("body", [None, [], "x", 1, {}, {"task_id": "t-1"}, b"[" * 100_000])
def test_invalid_task_body_is_retried(body: object) -> None:
    """A task body without a status is retried: it has no news of the task."""
    with serve_replies(http_reply(200, body)) as server:
        assert type(expect_failure(server.base_url, get_task)) is InvalidPollResponse


@in_turn(
    ("body", "kind"),
    [([], UnexpectedResponse), ("x", UnexpectedResponse), (5, UnexpectedResponse), (b"<html>", RequestNotAccepted)],
)
def test_malformed_user_and_waterfalls(body: object, kind: type[ApiCallFailed]) -> None:
    """User and waterfalls are parsed leniently, but a wrong top-level type is an error."""
    with serve_replies(http_reply(200, body)) as server:
        assert type(expect_failure(server.base_url, lambda client: client.get_user())) is kind
        assert type(expect_failure(server.base_url, lambda client: client.get_description(SOME))) is kind
        if body != []:
            assert type(expect_failure(server.base_url, lambda client: client.list_descriptions(SOME.kind))) is kind


@in_turn("body", [{}, {"name": "w"}, {"identifier": None}, {"identifier": []}, {"identifier": True}])
def test_waterfall_requires_identifier(body: object) -> None:
    """A waterfall needs an identifier; a list only loses the items without one."""
    with serve_replies(http_reply(200, body)) as server:
        assert type(expect_failure(server.base_url, lambda client: client.get_description(SOME))) is UnexpectedResponse
    with serve_replies(http_reply(200, [body, {"identifier": 5}, None, "x"])) as server:
        assert [
            each.identifier for each in call_api(server.base_url, lambda client: client.list_descriptions(SOME.kind))
        ] == ["5"]


@in_turn("status", [401, 403])
@in_turn(
    ("body", "kind"),
    [
        (b"<!DOCTYPE html><title>Attention Required! | Cloudflare</title>", RequestNotAccepted),
        (b"error code: 1020", RequestNotAccepted),
        (b"\xff\xfe<", RequestNotAccepted),
        ({"detail": "Invalid API key"}, Unauthorized),
        (None, Unauthorized),
    ],
)
def test_html_403_is_not_about_the_key(status: int, body: object, kind: type[ApiCallFailed]) -> None:
    """A 403 with an HTML page comes from a firewall or CDN; the API itself refuses a key with JSON."""
    calls: list[Callable[[Client], Awaitable[object]]] = [submit_run, get_task, lambda client: client.get_user()]
    with serve_replies(http_reply(status, body, content_type="text/html")) as server:
        errors = expect_failures(server.base_url, calls)
    assert all(isinstance(error, kind) for error in errors)
    assert all(("check the key" in (error.hint or "")) == (kind is Unauthorized) for error in errors)


def test_proxy_407_is_not_accepted() -> None:
    """A 407 comes from a proxy, so the request was not accepted."""
    with serve_replies(http_reply(407, b"<html>")) as server:
        assert failure_kinds(server.base_url, [submit_run, get_task]) == [RequestNotAccepted, RequestRefused]
        assert "the proxy requires a login" in expect_failure(server.base_url, submit_run).message


@in_turn("body", [b"<html>", b"", {"detail": "x"}])
def test_html_with_other_statuses(body: object) -> None:
    """With HTML, too, a 429 is a 429, and a request with a 5xx may have been accepted."""
    replies = iter([http_reply(429, body), http_reply(503, body)])
    with serve_replies(lambda _: next(replies)) as server:
        assert failure_kinds(server.base_url, [submit_run, submit_run]) == [RateLimited, SubmissionUnconfirmed]


def test_lone_surrogate_is_replaced() -> None:
    """A lone surrogate, which is legal JSON, is replaced: databases and files can't store it."""
    with serve_replies(
        http_reply(200, rb'{"status": "completed", "data": {"email": "a\ud83d\ude00b\ud800c"}}')
    ) as server:
        assert call_api(server.base_url, get_task)["data"] == {"email": "a\U0001f600b?c"}


def test_large_integers_are_kept() -> None:
    """An integer longer than 64 bits keeps all digits: it may be the id of a paid task."""
    number = 123456789012345678901234
    with serve_replies(
        http_reply(200, {"task_id": number, "status": "completed", "data": [number, -(2**63) - 1]})
    ) as server:
        assert call_api(server.base_url, submit_run) == str(number)
        assert call_api(server.base_url, lambda client: client.poll_task(str(number))).body["data"] == [
            number,
            -(2**63) - 1,
        ]


@in_turn(
    "body",
    [
        '{"task_id": "t-1", "status": "completed", "data": {"n": %s, "m": 0}}',
        '\ufeff{"task_id": "t-1", "status": "completed", "data": {"n": %s}}',
        '{"task_id": "t-1", "status": "completed", "data": {"n": %s, "m": [NaN, -Infinity]}}',
        '{"task_id": "t-1", "status": "completed", "data": {"n": %s, "m": "\x1b\\ud800"}}',
        '{"task_id": "t-1", "status": "completed", "data": {"n": %s, "m": "\udcff"}}',
    ],
)
@in_turn("number", ["1.10", "12345678901234567.123", "1e400", "-1E+400", "1" + "0" * 5000, "-0.0"])
def test_numbers_are_kept_as_written(body: str, number: str) -> None:
    """A number is kept as it is written, whatever else has to be cleaned, and however large it is."""
    with serve_replies(http_reply(200, (body % number).encode(errors="surrogateescape"))) as server:
        reply = call_api(server.base_url, lambda client: client.poll_task("t-1"))
    assert answer_cells(reply.raw, ["n"]) == [number]
    assert has_value(parse_data(reply.body["data"]), ["n"])
    json.loads(reply.raw, parse_int=str, parse_constant=pytest.fail)


def test_request_headers_and_paths() -> None:
    """One header holds the key, no cookie is kept, and names in paths are quoted."""
    with serve_replies(http_reply(200, {"task_id": "../user/me", "status": "x"}, set_cookie="a=b; Path=/")) as server:

        async def both(client: Client) -> None:
            await client.submit(Target(TargetKind.WATERFALL, "a/b?c"), BODY)
            await client.poll_task("../user/me")

        call_api(server.base_url, both)
        first, second = server.requests
    assert first.line == "POST /v1/waterfalls/a%2Fb%3Fc/run HTTP/1.1"
    assert second.line == "GET /v1/tasks/..%2Fuser%2Fme HTTP/1.1"
    assert first.body == BODY
    assert f"x-apikey: {KEY}" in first.head
    assert "content-type: application/json" in first.head
    assert "cookie" not in second.head.lower()


@in_turn(
    ("date", "observed_ms"),
    [
        ("Sun, 01 Nov 2026 12:00:00 GMT", [1_793_534_400_000]),
        ("yesterday", []),
        ("", []),
        ("Sun, 01 Nov 99999 12:00:00 GMT", []),
    ],
)
def test_clock_observes_date_header(date: str, observed_ms: list[int]) -> None:
    """The `Date` header sets the clock, because ours may be far off; an unreadable date is ignored."""
    clock = RecordingClock()
    with serve_replies(http_reply(200, {"workspace": "w"}, date=date)) as server:
        call_api(server.base_url, lambda client: client.get_user(), clock=clock)
    assert clock.observed == observed_ms
