"""The routes: the API under `/v1` as its documents describe it, and the sandbox's own switches under `/__`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from enrich.sandbox.databar import Databar, ExpiredError, FinishedError, NoCreditsError, NotFoundError, Order
from enrich.sandbox.faults import Fault, Faults, Param
from enrich.sandbox.gate import FAULT, Gate
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


class _Advance(_Strict):
    seconds: float = Field(ge=0)


class _TopUp(_Strict):
    credits: float


class _Prices(_Strict):
    prices: dict[int, Annotated[float, Field(ge=0)]]


def build(store: Store, settings: SandboxSettings) -> Gate:
    """Put the whole sandbox together, for one server."""
    databar = Databar(store, settings)
    faults = Faults(settings.faults, settings.fault_seed)
    app = FastAPI(title="Databar.ai API sandbox", version="0.1.2", openapi_url=None)
    gate = Gate(app, settings, databar.clock, faults)

    @app.exception_handler(Refused)
    async def refused(_: Request, refusal: Refused) -> Response:
        return JSONResponse(refusal.body, 400)

    for kind, status in _STATUSES.items():

        @app.exception_handler(kind)
        async def unhappy(_: Request, error: Exception, status: int = status) -> Response:
            return JSONResponse({"detail": str(error)}, status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    app.include_router(_waterfalls(databar, settings))
    app.include_router(_tasks(databar, settings))
    app.include_router(_switches(databar, gate, faults))
    return gate


def _key(settings: SandboxSettings) -> Any:  # noqa: ANN401  # FastAPI's marker
    async def check(x_apikey: Annotated[str, Header()]) -> None:
        if x_apikey != settings.api_key:
            raise HTTPException(int(settings.wrong_key), "Forbidden" if settings.wrong_key == "403" else "Unauthorized")

    return Depends(check)


def _waterfalls(databar: Databar, settings: SandboxSettings) -> APIRouter:
    api = APIRouter(prefix="/v1/waterfalls", dependencies=[_key(settings)])

    def submit(
        identifier: str, body: _Request, rows: list[dict[str, Any]], request: Request, *, bulk: bool
    ) -> Response:
        if settings.require_enrichments and "enrichments" not in body.model_fields_set:
            missing = {"type": "missing", "loc": ("body", "enrichments"), "msg": "Field required", "input": {}}
            raise RequestValidationError([missing])
        order = Order(databar.waterfall(identifier), rows, body.enrichments, body.email_verifier, bulk)
        task_id = databar.submit(order, request.scope.get(FAULT))
        return _json(f'{{"task_id":"{task_id}","status":"created"}}'.encode())

    @api.get("/")
    async def waterfalls() -> Response:
        return JSONResponse([waterfall.document() for waterfall in databar.waterfalls()])

    @api.get("/{identifier}")
    async def waterfall(identifier: str) -> Response:
        return JSONResponse(databar.waterfall(identifier).document())

    @api.post("/{identifier}/run")
    async def run(identifier: str, body: RunRequest, request: Request) -> Response:
        return submit(identifier, body, [body.params], request, bulk=False)

    @api.post("/{identifier}/bulk-run")
    async def bulk_run(identifier: str, body: BulkRunRequest, request: Request) -> Response:
        return submit(identifier, body, body.params, request, bulk=True)

    return api


def _tasks(databar: Databar, settings: SandboxSettings) -> APIRouter:
    api = APIRouter(prefix="/v1", dependencies=[_key(settings)])

    @api.get("/tasks/{task_id}")
    async def task(task_id: str, *, include_partial: Annotated[bool, Query()] = False) -> Response:
        return _json(databar.poll(task_id, partial=include_partial))

    @api.post("/tasks/{task_id}/cancel")
    async def cancel(task_id: str) -> Response:
        return _json(databar.cancel(task_id))

    @api.get("/user/me")
    async def me() -> Response:
        return JSONResponse(databar.user())

    return api


def _switches(databar: Databar, gate: Gate, faults: Faults) -> APIRouter:
    switches = APIRouter()

    def happening() -> dict[str, Any]:
        return {"chosen": faults.chosen(), "happened": dict(faults.happened)}

    @switches.get("/__audit")
    async def audit(*, runs: Annotated[bool, Query()] = True) -> Response:
        counts = {"requests": dict(gate.requests), "faults": dict(faults.happened)}
        return JSONResponse(databar.audit(runs=runs) | counts)

    @switches.post("/__advance")
    async def advance(body: _Advance) -> dict[str, float]:
        return {"now": databar.advance(body.seconds), "offset": databar.clock.offset}

    @switches.post("/__topup")
    async def topup(body: _TopUp) -> Response:
        databar.top_up(body.credits)
        return JSONResponse({"balance": databar.user()["balance"]})

    @switches.post("/__prices")
    async def prices(body: _Prices) -> dict[str, int]:
        databar.set_prices(body.prices)
        return {"changed": len(body.prices)}

    @switches.get("/__faults")
    async def list_faults() -> dict[str, Any]:
        return happening()

    @switches.post("/__faults")
    async def choose_faults(body: _Chosen) -> Response:
        if body.clear:
            faults.clear()
            gate.unavailable_until = 0
            return JSONResponse(happening())
        try:
            faults.choose(Fault(body.name, scope=body.scope, params=body.params), body.next)
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, 422)
        return JSONResponse(happening())

    return switches


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
