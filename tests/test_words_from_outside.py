"""An API that echoes the key and puts control and bidi characters everywhere: none of it is shown or written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness import Api, Done, Office, people
from tests.wire import Reply, Seen, Wire, answering, http

KEY = "key-5b1f0e77-that-must-not-be-seen"
#: The key, what steers terminals (C0, C1, DEL), what turns the direction of text, separators, half a character.
EVIL = f"<{KEY}\x1b]0;x\x07\x1b[2J\x9b31m\x7f\0\u202eevil\u2066\u200f\u2028\u061c{KEY[:9]}\u202e{KEY[9:]}\ud800>"
STEERING = {
    *map(chr, [*range(9), 11, 12, *range(14, 32), *range(127, 160), 0x61C, 0x200E, 0x200F, 0x2028, 0x2029]),
    *map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]),
}


def evil(name: str) -> str:
    """Make a name of it that is still unique."""
    return f"{name} {EVIL}"


WATERFALL = {
    "identifier": "email_getter",
    "name": evil("Email"),
    "description": evil("Finds\nmails"),
    "input_params": [
        {"name": name, "type": evil("text"), "required": True} for name in ("first_name", "last_name", "company")
    ],
    "output_fields": [{"name": "email", "label": evil("E-mail")}, {"name": evil("phone"), "label": EVIL}],
    "available_enrichments": [
        {"id": 833, "name": evil("Provider"), "price": "1", "params": [EVIL]},
        {"id": 966, "name": evil("Other"), "price": 2},
    ],
    "is_email_verifying": True,
    "email_verifiers": [{"id": 10, "name": evil("Verifier"), "price": 1}],
}


def completed(task_id: str) -> dict[str, Any]:
    """A result with it in keys and values, providers and steps."""
    return {
        "task_id": task_id,
        "status": "completed",
        "credits_spent": 1,
        EVIL: EVIL,
        "error": EVIL,
        "data": [
            {
                "result": {"email": f"ada@engine.example{EVIL}", evil("phone"): EVIL, EVIL: [EVIL, {EVIL: EVIL}]},
                "steps": [{"provider": evil("Provider"), "provider_id": 833, "result": EVIL, "cost": 1}],
                "enrichment_data": {evil("Provider"): {"email": EVIL}},
            }
        ],
    }


def answers(
    seen: Seen, post: Callable[[Seen], Reply] | None = None, task: Callable[[str], Reply] | None = None
) -> Reply:
    """Answer as an API that works, but for what a test wants otherwise."""
    target = seen.line.split()[1]
    if seen.line.startswith("POST"):
        params = json.loads(seen.body)["params"]
        return post(seen) if post else http(200, {"task_id": f"t-{params['first_name']}", "message": EVIL})
    if "/tasks/" in target:
        task_id = target.rpartition("/")[2]
        return task(task_id) if task else http(200, completed(task_id))
    if target.endswith("/user/me"):
        return http(200, {"balance": 50, "workspace": evil("w"), "email": EVIL})
    return http(200, [WATERFALL, {"identifier": evil("other")}] if target.endswith("/waterfalls/") else WATERFALL)


@pytest.fixture
def leads(office: Office) -> Iterator[Office]:
    """Make a job that writes every file there is; in the end none has the key or steers a terminal."""
    pytest.importorskip("apprise")
    (office.folder / "notify").write_text("json://127.0.0.1:9/\n", encoding="utf-8")
    (office.folder / "notify").chmod(0o600)
    office.write_job(
        rejects="rejects.csv",
        changes="{path: changes.csv, key: [Website]}",
        report="report.html",
        metrics="run.prom",
        notify="notify",
    )
    office.write_leads(people(3))
    yield office
    for path in office.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert KEY.encode() not in content, path
            assert KEY.encode("utf-16-le") not in content, path
            assert b"\\u006b" not in content, path


def shown(office: Office, wire: Wire, *arguments: str) -> Done:
    """Run a command; nothing that it shows has the key or steers a terminal."""
    api = Api(wire.base_url, KEY)
    done = office.command(*arguments, api=api)
    for text in (done.stdout, done.stderr):
        assert KEY not in text
        assert not STEERING & set(text), sorted(map(hex, map(ord, STEERING & set(text))))
        if text.startswith("{"):
            assert KEY not in json.dumps(json.loads(text), ensure_ascii=False)
    assert "Traceback" not in done.stderr
    return done


LOOKING = [
    ["plan", "job.yaml"],
    ["plan", "job.yaml", "--json"],
    ["waterfalls"],
    ["waterfalls", "email_getter"],
    ["waterfalls", "email_getter", "--json"],
    ["waterfalls", "nope"],
    ["check", "job.yaml", "--online"],
    ["doctor", "job.yaml"],
    ["explain", "job.yaml", "--row", "1"],
    ["explain", "job.yaml", "--row", "1", "--json"],
    ["status", "job.yaml"],
    ["status", "job.yaml", "--json"],
    ["runs", "job.yaml"],
    ["runs", "job.yaml", "--json"],
    ["reconcile", "job.yaml"],
    ["report", "job.yaml"],
    ["collect", "job.yaml", "--partial"],
]
RUN = ["run", "job.yaml", "--receipt", "--log-file", "log"]


def look(office: Office, wire: Wire) -> None:
    """Look at all that can be looked at."""
    for arguments in LOOKING:
        shown(office, wire, *arguments)


@pytest.mark.long
def test_what_was_answered_is_cleaned_everywhere(leads: Office) -> None:
    """Every answer counts, with the clean text, and it is the same in all that is shown and written."""
    with answering(answers) as wire:
        done = shown(leads, wire, *RUN)
        assert done.code == 0, done.stderr
        look(leads, wire)
        assert shown(leads, wire, *RUN, "--json").code == 0
    (lead, *_) = leads.output()
    assert lead["work_email"].startswith("ada@engine.example<[key] ")
    assert lead["work_email"].endswith("evil [key]?>")
    assert lead["enrich_provider"].startswith("Provider <[key]")


SAYING: dict[str, Reply] = {
    "400 named": http(400, {"detail": {"company": [EVIL]}}),
    "400 named by the key": http(400, {"detail": {EVIL: [EVIL]}}),
    "422 rows": http(422, {"rows": [{"position": 1, "fields": {"company": [EVIL]}}]}),
    "422 FastAPI": http(422, {"detail": [{"loc": ["body", "params", EVIL], "msg": EVIL}]}),
    "400 of the job": http(400, {"detail": EVIL}),
    "422 far behind": http(422, {"detail": "x" * (200 - 8 - len("<")) + EVIL}),
    "401": http(401, {"detail": EVIL}),
    "403": http(403, {"detail": EVIL}),
    "403 page": http(403, f"<html>{EVIL}".encode(errors="replace")),
    "404": http(404, {"detail": EVIL}),
    "406": http(406, {"detail": EVIL}),
    "409": http(409, {"detail": {EVIL: EVIL}}),
    "429": http(429, {"detail": EVIL}, retry_after="0"),
    "500": http(500, {"detail": EVIL}),
    "502 page": http(502, f"<html>{EVIL}".encode(errors="replace")),
    "302": http(302, location=f"/{KEY}"),
    "no id": http(200, {"detail": EVIL}),
    "evil id": http(200, {"task_id": EVIL}),
    "id of the key": http(200, {"task_id": KEY}),
    "reason": Reply(f"HTTP/1.1 400 {KEY}\r\ncontent-length: 0\r\n\r\n".encode()),
    "no HTTP": Reply(f"{KEY}\x1b[2J\r\n\r\n".encode()),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in SAYING])
def test_what_the_api_says_of_a_post_is_cleaned(leads: Office, name: str) -> None:
    """In the error, the row, the log, the ledger and whatever is told of it."""
    with answering(lambda seen: answers(seen, post=lambda _: SAYING[name])) as wire:
        done = shown(leads, wire, *RUN, "--max-time", "2s")
        assert done.code != 1
        look(leads, wire)


TELLING: dict[str, Callable[[str], Reply]] = {
    "failed": lambda task_id: http(200, {"task_id": task_id, "status": "failed", "error": EVIL, "data": None}),
    "failed oddly": lambda task_id: http(200, {"task_id": task_id, "status": "failed", "error": [EVIL, {EVIL: EVIL}]}),
    "odd status": lambda task_id: http(200, {"task_id": task_id, "status": EVIL}),
    "gone": lambda _: http(410, {"detail": EVIL}),
    "unknown": lambda _: http(404, {"detail": EVIL}),
    "401": lambda _: http(401, {"detail": EVIL}),
    "500": lambda _: http(500, {"detail": EVIL}),
    "302": lambda _: http(302, location=f"/{KEY}"),
    "302 elsewhere": lambda _: http(302, location=f"http://{KEY}.example/"),
    "302 nowhere": lambda _: http(302, location=f"http://[{KEY}"),
    "no JSON": lambda _: http(200, f"<html>{KEY}".encode()),
    "broken JSON": lambda task_id: http(200, json.dumps(completed(task_id)).encode()[:-9]),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in TELLING])
def test_what_the_api_says_of_a_task_is_cleaned(leads: Office, name: str) -> None:
    """Failed, gone or not readable."""
    with answering(lambda seen: answers(seen, task=TELLING[name])) as wire:
        assert shown(leads, wire, *RUN, "--max-time", "2s").code != 1
        look(leads, wire)


@pytest.mark.parametrize("escape", ["raw", "escaped"])
def test_the_key_is_found_in_every_spelling_of_json(leads: Office, escape: str) -> None:
    """Also where every letter of it is an escape."""

    def task(task_id: str) -> Reply:
        text = json.dumps(completed(task_id), ensure_ascii=escape == "escaped")
        spelled = "".join(f"\\u{ord(letter):04x}" for letter in KEY) if escape == "escaped" else KEY
        return http(200, text.replace(KEY, spelled).encode(errors="replace"))

    with answering(lambda seen: answers(seen, task=task)) as wire:
        assert shown(leads, wire, *RUN).code == 0
        look(leads, wire)


def test_a_bug_does_not_show_the_key(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace quotes values, too."""

    def broken(*_: object) -> None:
        raise ValueError(f"header x-apikey: {KEY}\x1b[2J")

    monkeypatch.setattr("enrich.commands.options.load", broken)
    office.write_leads(people(1))
    done = office.command("run", "job.yaml", api=Api("http://127.0.0.1:9/v1", KEY))
    assert done.code == 1
    assert "Traceback" in done.stderr
    assert "x-apikey: [key] [2J" in done.stderr
    assert KEY not in done.stderr


def test_the_name_of_a_file_does_not_steer_the_terminal(office: Office) -> None:
    """Errors quote names that anybody may have chosen."""
    done = office.command("run", "no\x1b[2Jsuch\u202e.yaml")
    assert done.code == 2
    assert not STEERING & set(done.stderr)
