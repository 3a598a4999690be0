"""An API that returns the key, control and bidi characters everywhere: none of it is shown or written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.raw_server import RawServer, ReceivedRequest, Reply, http_reply, serve_replies
from tests.support.workspace import ProgramResult, SandboxApi, Workspace, make_leads

KEY = "key-5b1f0e77-that-must-not-be-seen"
#: The key, terminal controls (C0, C1, DEL), bidi controls, separators, half a surrogate pair.
HOSTILE_TEXT = (
    f"<{KEY}\x1b]0;x\x07\x1b[2J\x9b31m\x7f\0\u202eevil\u2066\u200f\u2028\u061c{KEY[:9]}\u202e{KEY[9:]}\ud800>"
)
CONTROL_CHARACTERS = {
    *map(chr, [*range(9), 11, 12, *range(14, 32), *range(127, 160), 0x61C, 0x200E, 0x200F, 0x2028, 0x2029]),
    *map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]),
}


def hostile_name(name: str) -> str:
    """Return a unique name with the hostile text."""
    return f"{name} {HOSTILE_TEXT}"


WATERFALL = {
    "identifier": "email_getter",
    "name": hostile_name("Email"),
    "description": hostile_name("Finds\nmails"),
    "input_params": [
        {"name": name, "type": hostile_name("text"), "required": True}
        for name in ("first_name", "last_name", "company")
    ],
    "output_fields": [
        {"name": "email", "label": hostile_name("E-mail")},
        {"name": hostile_name("phone"), "label": HOSTILE_TEXT},
    ],
    "available_enrichments": [
        {"id": 833, "name": hostile_name("Provider"), "price": "1", "params": [HOSTILE_TEXT]},
        {"id": 966, "name": hostile_name("Other"), "price": 2},
    ],
    "is_email_verifying": True,
    "email_verifiers": [{"id": 10, "name": hostile_name("Verifier"), "price": 1}],
}


def completed_task(task_id: str) -> dict[str, Any]:
    """Return a result with the hostile text in keys and values, providers and steps."""
    return {
        "task_id": task_id,
        "status": "completed",
        "credits_spent": 1,
        HOSTILE_TEXT: HOSTILE_TEXT,
        "error": HOSTILE_TEXT,
        "data": [
            {
                "result": {
                    "email": f"ada@engine.example{HOSTILE_TEXT}",
                    hostile_name("phone"): HOSTILE_TEXT,
                    HOSTILE_TEXT: [HOSTILE_TEXT, {HOSTILE_TEXT: HOSTILE_TEXT}],
                },
                "steps": [
                    {"provider": hostile_name("Provider"), "provider_id": 833, "result": HOSTILE_TEXT, "cost": 1}
                ],
                "enrichment_data": {hostile_name("Provider"): {"email": HOSTILE_TEXT}},
            }
        ],
    }


def answer_request(
    request: ReceivedRequest,
    post: Callable[[ReceivedRequest], Reply] | None = None,
    task: Callable[[str], Reply] | None = None,
) -> Reply:
    """Answer as a working API, except for the responses that a test replaces."""
    target = request.line.split()[1]
    if request.line.startswith("POST"):
        params = json.loads(request.body)["params"]
        return (
            post(request)
            if post
            else http_reply(200, {"task_id": f"t-{params['first_name']}", "message": HOSTILE_TEXT})
        )
    if "/tasks/" in target:
        task_id = target.rpartition("/")[2]
        return task(task_id) if task else http_reply(200, completed_task(task_id))
    if target.endswith("/user/me"):
        return http_reply(200, {"balance": 50, "workspace": hostile_name("w"), "email": HOSTILE_TEXT})
    return http_reply(
        200, [WATERFALL, {"identifier": hostile_name("other")}] if target.endswith("/waterfalls/") else WATERFALL
    )


@pytest.fixture
def hostile_workspace(workspace: Workspace) -> Iterator[Workspace]:
    """Make a job that writes every kind of file but a report; afterwards assert that none has the key or controls."""
    pytest.importorskip("apprise")
    (workspace.folder / "notify").write_text("json://127.0.0.1:9/\n", encoding="utf-8")
    (workspace.folder / "notify").chmod(0o600)
    workspace.write_job(
        rejects="rejects.csv",
        changes="{path: changes.csv, key: [Website]}",
        metrics="run.prom",
        notify="notify",
    )
    workspace.write_leads(make_leads(3))
    yield workspace
    for path in workspace.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert KEY.encode() not in content, path
            assert KEY.encode("utf-16-le") not in content, path
            assert b"\\u006b" not in content, path


def run_and_check(workspace: Workspace, server: RawServer, *arguments: str) -> ProgramResult:
    """Run a command; assert that its output has no key and no terminal controls."""
    api = SandboxApi(server.base_url, KEY)
    result = workspace.run_in_process(*arguments, api=api)
    for text in (result.stdout, result.stderr):
        assert KEY not in text
        assert not CONTROL_CHARACTERS & set(text), sorted(map(hex, map(ord, CONTROL_CHARACTERS & set(text))))
        if text.startswith("{"):
            assert KEY not in json.dumps(json.loads(text), ensure_ascii=False)
    assert "Traceback" not in result.stderr
    return result


#: Commands that show descriptions of the API.
API_COMMANDS = [
    ["plan", "job.yaml"],
    ["plan", "job.yaml", "--json"],
    ["waterfalls"],
    ["waterfalls", "email_getter"],
    ["waterfalls", "email_getter", "--json"],
    ["waterfalls", "nope"],
    ["check", "job.yaml", "--online"],
    ["doctor", "job.yaml"],
    ["report", "job.yaml"],
]
#: Commands that show answers from the ledger.
LEDGER_COMMANDS = [
    ["explain", "job.yaml", "--row", "1"],
    ["explain", "job.yaml", "--row", "1", "--json"],
    ["status", "job.yaml"],
    ["status", "job.yaml", "--json"],
    ["runs", "job.yaml"],
    ["runs", "job.yaml", "--json"],
    ["reconcile", "job.yaml"],
    ["collect", "job.yaml", "--partial"],
]
RUN = ["run", "job.yaml", "--summary", "--log-file", "log"]


def check_outputs(workspace: Workspace, server: RawServer, commands: list[list[str]]) -> None:
    """Run commands that show something."""
    for arguments in commands:
        run_and_check(workspace, server, *arguments)


@pytest.mark.long
def test_results_are_cleaned(hostile_workspace: Workspace) -> None:
    """Every answer counts, and all screens and files have the same clean text."""
    with serve_replies(answer_request) as server:
        result = run_and_check(hostile_workspace, server, *RUN)
        assert result.exit_code == 0, result.stderr
        check_outputs(hostile_workspace, server, API_COMMANDS + LEDGER_COMMANDS)
        assert run_and_check(hostile_workspace, server, *RUN, "--json").exit_code == 0
    (lead, *_) = hostile_workspace.read_output()
    assert lead["work_email"].startswith("ada@engine.example<[key] ")
    assert lead["work_email"].endswith("evil [key]?>")
    assert lead["enrich_provider"].startswith("Provider <[key]")


POST_REPLIES: dict[str, Reply] = {
    "400 named": http_reply(400, {"detail": {"company": [HOSTILE_TEXT]}}),
    "400 named by the key": http_reply(400, {"detail": {HOSTILE_TEXT: [HOSTILE_TEXT]}}),
    "422 rows": http_reply(422, {"rows": [{"position": 1, "fields": {"company": [HOSTILE_TEXT]}}]}),
    "422 FastAPI": http_reply(422, {"detail": [{"loc": ["body", "params", HOSTILE_TEXT], "msg": HOSTILE_TEXT}]}),
    "400 of the job": http_reply(400, {"detail": HOSTILE_TEXT}),
    "422 far behind": http_reply(422, {"detail": "x" * (200 - 8 - len("<")) + HOSTILE_TEXT}),
    "401": http_reply(401, {"detail": HOSTILE_TEXT}),
    "403": http_reply(403, {"detail": HOSTILE_TEXT}),
    "403 page": http_reply(403, f"<html>{HOSTILE_TEXT}".encode(errors="replace")),
    "404": http_reply(404, {"detail": HOSTILE_TEXT}),
    "406": http_reply(406, {"detail": HOSTILE_TEXT}),
    "409": http_reply(409, {"detail": {HOSTILE_TEXT: HOSTILE_TEXT}}),
    "429": http_reply(429, {"detail": HOSTILE_TEXT}, retry_after="0"),
    "500": http_reply(500, {"detail": HOSTILE_TEXT}),
    "502 page": http_reply(502, f"<html>{HOSTILE_TEXT}".encode(errors="replace")),
    "302": http_reply(302, location=f"/{KEY}"),
    "no id": http_reply(200, {"detail": HOSTILE_TEXT}),
    "evil id": http_reply(200, {"task_id": HOSTILE_TEXT}),
    "id of the key": http_reply(200, {"task_id": KEY}),
    "reason": Reply(f"HTTP/1.1 400 {KEY}\r\ncontent-length: 0\r\n\r\n".encode()),
    "no HTTP": Reply(f"{KEY}\x1b[2J\r\n\r\n".encode()),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in POST_REPLIES])
def test_post_errors_are_cleaned(hostile_workspace: Workspace, name: str) -> None:
    """Cleans POST errors in the message, the row, the log, the ledger and all commands."""
    with serve_replies(lambda seen: answer_request(seen, post=lambda _: POST_REPLIES[name])) as server:
        result = run_and_check(hostile_workspace, server, *RUN, "--max-time", "2s")
        assert result.exit_code != 1
        check_outputs(hostile_workspace, server, LEDGER_COMMANDS)


TASK_REPLIES: dict[str, Callable[[str], Reply]] = {
    "failed": lambda task_id: http_reply(
        200, {"task_id": task_id, "status": "failed", "error": HOSTILE_TEXT, "data": None}
    ),
    "failed oddly": lambda task_id: http_reply(
        200, {"task_id": task_id, "status": "failed", "error": [HOSTILE_TEXT, {HOSTILE_TEXT: HOSTILE_TEXT}]}
    ),
    "odd status": lambda task_id: http_reply(200, {"task_id": task_id, "status": HOSTILE_TEXT}),
    "gone": lambda _: http_reply(410, {"detail": HOSTILE_TEXT}),
    "unknown": lambda _: http_reply(404, {"detail": HOSTILE_TEXT}),
    "401": lambda _: http_reply(401, {"detail": HOSTILE_TEXT}),
    "500": lambda _: http_reply(500, {"detail": HOSTILE_TEXT}),
    "302": lambda _: http_reply(302, location=f"/{KEY}"),
    "302 elsewhere": lambda _: http_reply(302, location=f"http://{KEY}.example/"),
    "302 nowhere": lambda _: http_reply(302, location=f"http://[{KEY}"),
    "not JSON": lambda _: http_reply(200, f"<html>{KEY}".encode()),
    "broken JSON": lambda task_id: http_reply(200, json.dumps(completed_task(task_id)).encode()[:-9]),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in TASK_REPLIES])
def test_task_errors_are_cleaned(hostile_workspace: Workspace, name: str) -> None:
    """Cleans the errors of failed, gone and unreadable tasks."""
    with serve_replies(lambda seen: answer_request(seen, task=TASK_REPLIES[name])) as server:
        assert run_and_check(hostile_workspace, server, *RUN, "--max-time", "2s").exit_code != 1
        check_outputs(hostile_workspace, server, LEDGER_COMMANDS)


@pytest.mark.long
@pytest.mark.parametrize("escape", ["raw", "escaped"])
def test_key_is_found_in_json_escapes(hostile_workspace: Workspace, escape: str) -> None:
    """Finds the key also when every letter of it is escaped."""

    def task(task_id: str) -> Reply:
        text = json.dumps(completed_task(task_id), ensure_ascii=escape == "escaped")
        key_text = "".join(f"\\u{ord(character):04x}" for character in KEY) if escape == "escaped" else KEY
        return http_reply(200, text.replace(KEY, key_text).encode(errors="replace"))

    with serve_replies(lambda seen: answer_request(seen, task=task)) as server:
        assert run_and_check(hostile_workspace, server, *RUN).exit_code == 0
        check_outputs(hostile_workspace, server, LEDGER_COMMANDS)


def test_traceback_hides_key(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, which quotes values, does not show the key."""

    def broken(*_: object) -> None:
        raise ValueError(f"header x-apikey: {KEY}\x1b[2J")

    monkeypatch.setattr("enrich.commands.options.load_job", broken)
    workspace.write_leads(make_leads(1))
    result = workspace.run_in_process("run", "job.yaml", api=SandboxApi("http://127.0.0.1:9/v1", KEY))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "x-apikey: [key] [2J" in result.stderr
    assert KEY not in result.stderr


def test_file_names_are_escaped(workspace: Workspace) -> None:
    """Escapes file names in error messages, because anyone may choose them."""
    result = workspace.run_in_process("run", "no\x1b[2Jsuch\u202e.yaml")
    assert result.exit_code == 2
    assert not CONTROL_CHARACTERS & set(result.stderr)


@pytest.mark.parametrize(
    "words",
    [
        ("doctor", "job.yaml", "--offline"),
        ("run", "job.yaml", "--sandbox", "--summary"),
        ("status", "job.yaml"),
        ("check", "other.yaml"),
    ],
    ids=" ".join,
)
def test_names_in_the_job_are_escaped(workspace: Workspace, words: tuple[str, ...]) -> None:
    """Names of the job's files, and of those in its input folder, reach no screen with their control characters."""
    name = "\u202e\x9b2J"
    workspace.write_leads(make_leads(1))
    workspace.write_job(output=json.dumps(f"{name}.csv"), ledger=json.dumps(f"{name}.db"))
    (workspace.folder / "in").mkdir()
    for header, file in (("Email", f"in/{name}.csv"), ("Mail", "in/other.csv")):
        workspace.write_leads([["ada@engine.example"]], [header], file)
    other = workspace.job_file.read_text(encoding="utf-8").replace("leads.csv", "in/")
    (workspace.folder / "other.yaml").write_text(other, encoding="utf-8")
    result = workspace.run_in_process(*words)
    assert not CONTROL_CHARACTERS & set(result.stdout + result.stderr)
    assert "2J" in result.stdout + result.stderr
