"""The API refuses with the documented statuses and bodies, and then accepts nothing."""

from typing import Any

import httpx
import pytest

from tests.sandbox.conftest import ADA, SandboxClient, StartSandbox

BLANK = {"first_name": "Ada", "last_name": " ", "company": "engine.example"}


def test_missing_key(api: SandboxClient) -> None:
    """Without the key header, a schema error names it."""
    response = httpx.get(f"{api.base_url}/user/me", trust_env=False)
    error = response.json()["detail"][0]
    assert (response.status_code, error["loc"], error["type"]) == (422, ["header", "x-apikey"], "missing")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/waterfalls/"),
        ("GET", "/waterfalls/email_getter"),
        ("POST", "/waterfalls/email_getter/run"),
        ("POST", "/waterfalls/email_getter/bulk-run"),
        ("GET", "/tasks/1"),
        ("POST", "/tasks/1/cancel"),
        ("GET", "/user/me"),
    ],
)
def test_wrong_key(api: SandboxClient, method: str, path: str) -> None:
    """A wrong key is a 403 at every endpoint, whatever else is wrong."""
    response = api.http.request(method, path, headers={"x-apikey": "other"}, json={} if method == "POST" else None)
    assert (response.status_code, response.json()) == (403, {"detail": "Forbidden"})


def test_wrong_key_as_401(start: StartSandbox) -> None:
    """A wrong key can be a 401 instead."""
    response = start(wrong_key="401").http.get("/user/me", headers={"x-apikey": "other"})
    assert (response.status_code, response.json()) == (401, {"detail": "Unauthorized"})


def test_unknown_waterfall(api: SandboxClient) -> None:
    """An unknown waterfall is a 404, on reading and on running."""
    assert api.http.get("/waterfalls/nothing").status_code == 404
    response = api.post_run(ADA, "nothing")
    assert (response.status_code, response.json()) == (404, {"detail": "Waterfall not found"})


def test_unknown_task(api: SandboxClient) -> None:
    """An unknown task is a 404, on reading and on cancelling."""
    assert (api.get_task("nothing").status_code, api.get_task("nothing").json()) == (404, {"detail": "Task not found"})
    assert api.cancel("nothing").status_code == 404


@pytest.mark.parametrize(
    ("params", "name", "text"),
    [
        ({"first_name": "Ada", "last_name": "Byron"}, "company", "This field is required."),
        (BLANK, "last_name", "This field may not be blank."),
        (ADA | {"shoe_size": "38"}, "shoe_size", "Unknown field."),
        (ADA | {"company": 7}, "company", "Not a valid string."),
        (ADA | {"company": None}, "company", "Not a valid string."),
    ],
)
def test_bad_params(api: SandboxClient, params: dict[str, Any], name: str, text: str) -> None:
    """Bad params are a 400 that names row, param and reason; nothing is accepted."""
    response = api.post_run(params)
    assert response.status_code == 400
    assert response.json() == {
        "error": "INVALID_PARAMS",
        "detail": f"Row 1: {name}: {text}",
        "rows": [{"position": 1, "fields": {name: [text]}}],
    }
    assert api.audit()["accepted"] == 0


def test_lone_surrogate_is_rejected(api: SandboxClient) -> None:
    """Text that can't be encoded is refused like any value that is no string."""
    body = b'{"params":{"first_name":"\\ud800","last_name":"B","company":"c"}}'
    response = api.http.post("/waterfalls/email_getter/run", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["rows"][0]["fields"]) == (
        400,
        {"first_name": ["Not a valid string."]},
    )


def test_bad_params_in_bulk(api: SandboxClient) -> None:
    """One bad row, named by its position, refuses the whole bulk run."""
    response = api.post_bulk([ADA, BLANK])
    assert response.status_code == 400
    assert response.json()["rows"] == [{"position": 2, "fields": {"last_name": ["This field may not be blank."]}}]
    assert api.audit()["accepted"] == 0


def test_error_body_old_short_omits_row_index(start: StartSandbox) -> None:
    """With `old_short`, a bulk run's error lists only the wrong rows without their positions."""
    api = start(error_shape="old_short")
    assert api.post_bulk([ADA, {"first_name": "Ada"}, ADA]).json() == {
        "detail": [{"last_name": ["This field is required."], "company": ["This field is required."]}]
    }


def test_error_body_old_format(start: StartSandbox) -> None:
    """With the old format, the error has the params at the top; for a bulk run it is a list of rows."""
    api = start(error_shape="old")
    fields = {"last_name": ["This field may not be blank."]}
    assert api.post_run(BLANK).json() == {"detail": fields}
    assert api.post_bulk([ADA, BLANK]).json() == {"detail": [{}, fields]}


def test_error_body_fields_format(start: StartSandbox) -> None:
    """For a single run the error can have `fields` instead of `rows`."""
    body = start(error_shape="fields").post_run(BLANK).json()
    assert body["fields"] == {"last_name": ["This field may not be blank."]}
    assert "rows" not in body


@pytest.mark.parametrize(
    ("body", "location", "kind"),
    [
        ({}, ["body", "params"], "missing"),
        ({"params": []}, ["body", "params"], "dict_type"),
        ({"params": ADA, "enrichments": []}, ["body", "enrichments"], "too_short"),
        ({"params": ADA, "enrichments": None}, ["body", "enrichments"], "list_type"),
        ({"params": ADA, "enrichments": ["833"]}, ["body", "enrichments", 0], "int_type"),
        ({"params": ADA, "enrichments": [True]}, ["body", "enrichments", 0], "int_type"),
        ({"params": ADA, "enrichments": 833}, ["body", "enrichments"], "list_type"),
        ({"params": ADA, "email_verifier": "10"}, ["body", "email_verifier"], "int_type"),
        ({"params": ADA, "colour": "red"}, ["body", "colour"], "extra_forbidden"),
        ([], ["body"], "model_attributes_type"),
    ],
)
def test_bad_schema(api: SandboxClient, body: Any, location: list[Any], kind: str) -> None:
    """A body with another schema is a 422 with location and type."""
    response = api.http.post("/waterfalls/email_getter/run", json=body)
    error = response.json()["detail"][0]
    assert (response.status_code, error["loc"], error["type"]) == (422, location, kind)
    assert api.audit()["accepted"] == 0


def test_broken_json_is_a_schema_error(api: SandboxClient) -> None:
    """A body that is not JSON is a 422."""
    headers = {"content-type": "application/json"}
    response = api.http.post("/waterfalls/email_getter/run", content=b'{"params":', headers=headers)
    assert (response.status_code, response.json()["detail"][0]["type"]) == (422, "json_invalid")


def test_bulk_needs_rows(api: SandboxClient) -> None:
    """A bulk run without rows, or with one object instead of a list, is a 422."""
    assert api.post_bulk([]).status_code == 422
    assert api.post_bulk(ADA).status_code == 422


def test_schema_checked_before_waterfall(api: SandboxClient) -> None:
    """The schema is checked before the waterfall."""
    assert api.http.post("/waterfalls/nothing/run", json={}).status_code == 422


def test_enrichments_may_be_required(start: StartSandbox) -> None:
    """Where enrichments are required, a run without them is a 422."""
    api = start(require_enrichments=True)
    response = api.post_run()
    assert (response.status_code, response.json()["detail"][0]["loc"]) == (422, ["body", "enrichments"])
    assert api.post_run(enrichments=[833]).status_code == 200


def test_unknown_enrichment(api: SandboxClient) -> None:
    """A provider of another waterfall is a 400 in the old format."""
    response = api.post_run(enrichments=[833, 301])
    assert response.status_code == 400
    assert response.json() == {"detail": {"enrichments": ["301 is not part of this waterfall."]}}


def test_unknown_verifier(api: SandboxClient) -> None:
    """An unknown verifier is a 400, and so is any verifier where nothing is verified."""
    response = api.post_run(email_verifier=11)
    assert (response.status_code, [*response.json()["detail"]]) == (400, ["email_verifier"])
    response = api.post_run({"email": "ada@engine.example"}, "person_getter", email_verifier=10)
    assert (response.status_code, [*response.json()["detail"]]) == (400, ["email_verifier"])


def test_no_credits(start: StartSandbox) -> None:
    """A balance below the maximum price is a 406, even if the likely price is below it."""
    api = start(balance=1.51)
    response = api.post_run(enrichments=[833, 966], email_verifier=10)
    assert response.status_code == 406
    assert response.json() == {"detail": "Check the number of remaining credits or the tariff plan."}
    assert api.post_run(enrichments=[833, 966]).status_code == 200


def test_params_checked_before_balance(start: StartSandbox) -> None:
    """Params are checked before the balance."""
    assert start(balance=0).post_run(BLANK).status_code == 400


def test_bulk_requires_balance_for_all_rows(start: StartSandbox) -> None:
    """A bulk run needs a balance for the maximum price of all its rows."""
    api = start(balance=1)
    assert api.post_bulk([ADA, ADA, ADA], enrichments=[833]).status_code == 406
    assert api.post_bulk([ADA, ADA], enrichments=[833]).status_code == 200
