"""The routes: the API under `/v1` as its documentation describes it, and the sandbox's controls under `/__`."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from enrich.sandbox.catalogue import FLOWS, MAX_PAGES
from enrich.sandbox.databar import ApiError, Databar
from enrich.sandbox.faults import FAULT_KEY, FaultMiddleware, Message, Receive, Send
from enrich.sandbox.lookups import Cascade, EnrichmentCall, Refused, make_cascade, make_enrichment_call
from enrich.sandbox.settings import Fault, Param, SandboxSettings
from enrich.sandbox.store import SandboxStore


class _StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _RunBody(_StrictBody):
    enrichments: list[StrictInt] = Field(default_factory=list, min_length=1)
    email_verifier: StrictInt | None = None


class _SingleRunBody(_RunBody):
    params: dict[str, Any]


class _BulkRunBody(_RunBody):
    params: list[dict[str, Any]] = Field(min_length=1)


class _Pagination(_StrictBody):
    pages: StrictInt = Field(1, ge=1, le=MAX_PAGES)


class _EnrichmentBody(_StrictBody):
    params: dict[str, Any]
    pagination: _Pagination | None = None


class _BulkEnrichmentBody(_StrictBody):
    params: list[dict[str, Any]] = Field(min_length=1)
    pagination: _Pagination | None = None


class _FaultsBody(_StrictBody):
    name: str = ""
    scope: str = ""
    next: int = 1
    params: dict[str, Param] = Field(default_factory=dict)
    clear: bool = False


@dataclass(frozen=True, slots=True)
class _Context:
    """The objects that the routes of one server use."""

    databar: Databar
    settings: SandboxSettings
    middleware: FaultMiddleware


# Key of the context in the ASGI scope: all servers of a process share the same routes.
_CONTEXT_KEY = "enrich.box"


async def _get_context(request: Request) -> _Context:
    context: _Context = request.scope[_CONTEXT_KEY]
    return context


async def _check_key(request: Request, x_apikey: Annotated[str, Header()]) -> _Context:
    context: _Context = request.scope[_CONTEXT_KEY]
    if x_apikey != context.settings.api_key:
        wrong = context.settings.wrong_key
        raise HTTPException(int(wrong), "Forbidden" if wrong == "403" else "Unauthorized")
    return context


#: The context of a request without and with a key.
Context = Annotated[_Context, Depends(_get_context)]
Authorized = Annotated[_Context, Depends(_check_key)]

_APP = FastAPI(title="Databar.ai API sandbox", version="0.1.2", openapi_url=None)


def build_app(store: SandboxStore, settings: SandboxSettings) -> FaultMiddleware:
    """Build the sandbox's application for one server."""
    databar = Databar(store, settings)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        scope[_CONTEXT_KEY] = context
        await _APP(scope, receive, send)

    middleware = FaultMiddleware(app, settings, databar.clock)
    context = _Context(databar, settings, middleware)
    return middleware


@_APP.exception_handler(Refused)
async def _on_refused(_: Request, refusal: Refused) -> Response:
    return JSONResponse(refusal.body, 400)


@_APP.exception_handler(ApiError)
async def _on_error(_: Request, error: ApiError) -> Response:
    return JSONResponse({"detail": str(error)}, error.status)


@_APP.get("/health")
async def _health() -> dict[str, str]:
    return {"status": "ok"}


def _cascade(context: _Context, identifier: str, body: _RunBody) -> Cascade:
    if context.settings.require_enrichments and "enrichments" not in body.model_fields_set:
        missing = {"type": "missing", "loc": ("body", "enrichments"), "msg": "Field required", "input": {}}
        raise RequestValidationError([missing])
    return make_cascade(context.databar.waterfall(identifier), body.enrichments, body.email_verifier)


def _enrichment_call(context: _Context, number: int, pagination: _Pagination | None) -> EnrichmentCall:
    return make_enrichment_call(context.databar.enrichment(number), pagination.pages if pagination else None)


def _submit(
    context: _Context,
    target: Cascade | EnrichmentCall,
    params: dict[str, Any] | list[dict[str, Any]],
    request: Request,
) -> Response:
    bulk = isinstance(params, list)
    rows = params if isinstance(params, list) else [params]
    task_id = context.databar.submit(target, rows, bulk=bulk, fault=request.scope.get(FAULT_KEY))
    status = "created" if isinstance(target, Cascade) else "processing"
    return _json(f'{{"task_id":"{task_id}","status":"{status}"}}'.encode())


@_APP.get("/v1/waterfalls/")
async def _waterfalls(context: Authorized) -> Response:
    return JSONResponse([waterfall.to_json() for waterfall in context.databar.waterfalls()])


@_APP.get("/v1/waterfalls/{identifier}")
async def _waterfall(context: Authorized, identifier: str) -> Response:
    return JSONResponse(context.databar.waterfall(identifier).to_json())


@_APP.post("/v1/waterfalls/{identifier}/run")
async def _run(context: Authorized, identifier: str, body: _SingleRunBody, request: Request) -> Response:
    return _submit(context, _cascade(context, identifier, body), body.params, request)


@_APP.post("/v1/waterfalls/{identifier}/bulk-run")
async def _bulk_run(context: Authorized, identifier: str, body: _BulkRunBody, request: Request) -> Response:
    return _submit(context, _cascade(context, identifier, body), body.params, request)


@_APP.get("/v1/enrichments/")
async def _enrichments(  # noqa: PLR0913 - the API has these params
    context: Authorized,
    q: Annotated[str | None, Query(min_length=3)] = None,
    page: Annotated[int | None, Query(ge=1)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    *,
    authorized_only: Annotated[bool, Query()] = True,  # noqa: ARG001 - the account may use all of them
    category: Annotated[str | None, Query()] = None,
) -> Response:
    found = [enrichment.summary() for enrichment in context.databar.enrichments(q, category)]
    if page is None:
        return JSONResponse(found)
    items = found[(page - 1) * limit : page * limit]
    counts = {"page": page, "limit": limit, "has_next_page": page * limit < len(found), "total_count": len(found)}
    return JSONResponse({"items": items} | counts)


@_APP.get("/v1/enrichments/{number}")
async def _enrichment(context: Authorized, number: int) -> Response:
    return JSONResponse(context.databar.enrichment(number).to_json())


@_APP.post("/v1/enrichments/{number}/run")
async def _run_enrichment(context: Authorized, number: int, body: _EnrichmentBody, request: Request) -> Response:
    return _submit(context, _enrichment_call(context, number, body.pagination), body.params, request)


@_APP.post("/v1/enrichments/{number}/bulk-run")
async def _bulk_enrichment(context: Authorized, number: int, body: _BulkEnrichmentBody, request: Request) -> Response:
    return _submit(context, _enrichment_call(context, number, body.pagination), body.params, request)


@_APP.get("/v1/flows")
async def _flows(_: Authorized) -> Response:
    return JSONResponse(list(FLOWS.values()))


@_APP.get("/v1/flows/{flow_id}")
async def _flow(_: Authorized, flow_id: str) -> Response:
    if flow_id not in FLOWS:
        raise ApiError(404, "Flow not found")
    return JSONResponse({**FLOWS[flow_id], "config": {"nodes": []}, "ui": {}, "internal_version": "1"})


@_APP.get("/v1/tasks/{task_id}")
async def _task(context: Authorized, task_id: str, *, include_partial: Annotated[bool, Query()] = False) -> Response:
    return _json(context.databar.poll(task_id, partial=include_partial))


@_APP.post("/v1/tasks/{task_id}/cancel")
async def _cancel(context: Authorized, task_id: str) -> Response:
    return _json(context.databar.cancel(task_id))


@_APP.get("/v1/user/me")
async def _me(context: Authorized) -> Response:
    return JSONResponse(context.databar.user())


@_APP.get("/__audit")
async def _audit(context: Context, *, runs: Annotated[bool, Query()] = True) -> Response:
    counts = {
        "requests": dict(context.middleware.requests),
        "faults": dict(context.middleware.faults.applied_counts),
        "busiest_second": context.middleware.peak_rate.peak,
    }
    return JSONResponse(context.databar.audit(runs=runs) | counts)


@_APP.post("/__advance")
async def _advance(context: Context, seconds: Annotated[float, Body(embed=True, ge=0)]) -> dict[str, float]:
    return context.databar.advance(seconds)


@_APP.post("/__topup")
async def _topup(context: Context, amount: Annotated[float, Body(embed=True, alias="credits")]) -> Response:
    context.databar.top_up(amount)
    return JSONResponse({"balance": context.databar.user()["balance"]})


@_APP.post("/__prices")
async def _prices(
    context: Context, prices: Annotated[dict[int, Annotated[float, Field(ge=0)]], Body(embed=True)]
) -> dict[str, int]:
    context.databar.set_prices(prices)
    return {"changed": len(prices)}


@_APP.get("/__faults")
async def _list_faults(context: Context) -> dict[str, Any]:
    faults = context.middleware.faults
    return {"chosen": faults.pending(), "happened": dict(faults.applied_counts)}


@_APP.post("/__faults")
async def _inject_faults(context: Context, body: _FaultsBody) -> Response:
    if body.clear:
        context.middleware.faults.clear()
        context.middleware.unavailable_until = 0
    else:
        try:
            context.middleware.faults.inject(Fault(body.name, scope=body.scope, params=body.params), body.next)
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, 422)
    return JSONResponse(await _list_faults(context))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
