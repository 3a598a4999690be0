"""The routes: the API under `/v1` as its documents describe it, and the sandbox's own switches under `/__`."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from enrich.sandbox.databar import Databar, ExpiredError, FinishedError, NoCreditsError, NotFoundError, Order
from enrich.sandbox.faults import Fault, Faults, Param
from enrich.sandbox.gate import FAULT, Gate, Message, Receive, Send
from enrich.sandbox.questions import Refused
from enrich.sandbox.settings import SandboxSettings
from enrich.sandbox.store import Store

_STATUSES: dict[type[Exception], int] = {
    NotFoundError: 404,
    NoCreditsError: 406,
    FinishedError: 409,
    ExpiredError: 410,
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Request(_Strict):
    enrichments: list[StrictInt] = Field(default_factory=list, min_length=1)
    email_verifier: StrictInt | None = None


class RunRequest(_Request):
    """The body of `run`."""

    params: dict[str, Any]


class BulkRunRequest(_Request):
    """The body of `bulk-run`."""

    params: list[dict[str, Any]] = Field(min_length=1)


class _Chosen(_Strict):
    name: str = ""
    scope: str = ""
    next: int = 1
    params: dict[str, Param] = Field(default_factory=dict)
    clear: bool = False


class _Moved(_Strict):
    seconds: float = Field(ge=0)


class _Credits(_Strict):
    credits: float


class _Priced(_Strict):
    prices: dict[int, Annotated[float, Field(ge=0)]]


@dataclass(frozen=True, slots=True)
class _Box:
    """What the routes of one server work on."""

    databar: Databar
    settings: SandboxSettings
    gate: Gate
    faults: Faults


# Where the gate puts it: the routes are made once, for all servers of a process.
_BOX = "enrich.box"


def _box(request: Request) -> _Box:
    box: _Box = request.scope[_BOX]
    return box


Box = Annotated[_Box, Depends(_box)]


async def _key(box: Box, x_apikey: Annotated[str, Header()]) -> None:
    if x_apikey != box.settings.api_key:
        wrong = box.settings.wrong_key
        raise HTTPException(int(wrong), "Forbidden" if wrong == "403" else "Unauthorized")


_APP = FastAPI(title="Databar.ai API sandbox", version="0.1.2", openapi_url=None)
_API = APIRouter(prefix="/v1", dependencies=[Depends(_key)])


def build(store: Store, settings: SandboxSettings) -> Gate:
    """Put the whole sandbox together, for one server."""
    databar = Databar(store, settings)
    faults = Faults(settings.faults, settings.fault_seed)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        scope[_BOX] = box
        await _APP(scope, receive, send)

    gate = Gate(app, settings, databar.clock, faults)
    box = _Box(databar, settings, gate, faults)
    return gate


@_APP.exception_handler(Refused)
async def _refused(_: Request, refusal: Refused) -> Response:
    return JSONResponse(refusal.body, 400)


for _kind, _status in _STATUSES.items():

    @_APP.exception_handler(_kind)
    async def _unhappy(_: Request, error: Exception, status: int = _status) -> Response:
        return JSONResponse({"detail": str(error)}, status)


@_APP.get("/health")
async def _health() -> dict[str, str]:
    return {"status": "ok"}


def _submit(box: _Box, identifier: str, body: _Request, rows: list[dict[str, Any]], request: Request) -> Response:
    if box.settings.require_enrichments and "enrichments" not in body.model_fields_set:
        missing = {"type": "missing", "loc": ("body", "enrichments"), "msg": "Field required", "input": {}}
        raise RequestValidationError([missing])
    bulk = isinstance(body, BulkRunRequest)
    order = Order(box.databar.waterfall(identifier), rows, body.enrichments, body.email_verifier, bulk)
    task_id = box.databar.submit(order, request.scope.get(FAULT))
    return _json(f'{{"task_id":"{task_id}","status":"created"}}'.encode())


@_API.get("/waterfalls/")
async def _waterfalls(box: Box) -> Response:
    return JSONResponse([waterfall.document() for waterfall in box.databar.waterfalls()])


@_API.get("/waterfalls/{identifier}")
async def _waterfall(box: Box, identifier: str) -> Response:
    return JSONResponse(box.databar.waterfall(identifier).document())


@_API.post("/waterfalls/{identifier}/run")
async def _run(box: Box, identifier: str, body: RunRequest, request: Request) -> Response:
    return _submit(box, identifier, body, [body.params], request)


@_API.post("/waterfalls/{identifier}/bulk-run")
async def _bulk_run(box: Box, identifier: str, body: BulkRunRequest, request: Request) -> Response:
    return _submit(box, identifier, body, body.params, request)


@_API.get("/tasks/{task_id}")
async def _task(box: Box, task_id: str, *, include_partial: Annotated[bool, Query()] = False) -> Response:
    return _json(box.databar.poll(task_id, partial=include_partial))


@_API.post("/tasks/{task_id}/cancel")
async def _cancel(box: Box, task_id: str) -> Response:
    return _json(box.databar.cancel(task_id))


@_API.get("/user/me")
async def _me(box: Box) -> Response:
    return JSONResponse(box.databar.user())


@_APP.get("/__audit")
async def _audit(box: Box, *, runs: Annotated[bool, Query()] = True) -> Response:
    counts: dict[str, Any] = {"requests": dict(box.gate.requests), "faults": dict(box.faults.happened)}
    counts["busiest_second"] = box.gate.busiest.most
    return JSONResponse(box.databar.audit(runs=runs) | counts)


@_APP.post("/__advance")
async def _advance(box: Box, body: _Moved) -> dict[str, float]:
    return {"now": box.databar.advance(body.seconds), "offset": box.databar.clock.offset}


@_APP.post("/__topup")
async def _topup(box: Box, body: _Credits) -> Response:
    box.databar.top_up(body.credits)
    return JSONResponse({"balance": box.databar.user()["balance"]})


@_APP.post("/__prices")
async def _prices(box: Box, body: _Priced) -> dict[str, int]:
    box.databar.set_prices(body.prices)
    return {"changed": len(body.prices)}


@_APP.get("/__faults")
async def _list_faults(box: Box) -> dict[str, Any]:
    return {"chosen": box.faults.chosen(), "happened": dict(box.faults.happened)}


@_APP.post("/__faults")
async def _choose_faults(box: Box, body: _Chosen) -> Response:
    if body.clear:
        box.faults.clear()
        box.gate.unavailable_until = 0
    else:
        try:
            box.faults.choose(Fault(body.name, scope=body.scope, params=body.params), body.next)
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, 422)
    return JSONResponse(await _list_faults(box))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


_APP.include_router(_API)
