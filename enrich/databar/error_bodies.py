"""Extracts the wrong params, and their rows, from an error response (400, 422). Pure functions, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from enrich.databar.json_values import whole_number

#: Keys of the request body besides `params`. An error about one of them concerns the job, not a row.
BODY_KEYS = frozenset({"params", "enrichments", "email_verifier", "body", "x-apikey"})
#: Keys of an error object that are not param names.
ERROR_KEYS = frozenset({"position", "error", "code", "message", "msg", "type", "status", "detail"})


def wrong_params(body: object) -> dict[int, str]:
    """Return the param errors of a single request as `{0: message}`. {} if the body names no param.

    Supported shapes are `{"rows": [{"fields": {…}}]}`, `{"fields": {…}}`, `{"detail": {…}}`, `{"detail": [{…}]}` and
    FastAPI's `{"detail": [{"loc": ["body", "params", NAME], "msg": …}]}`.
    """
    message = _format_errors(complaint for _, complaint in _param_errors(body))
    return {0: message} if message else {}


def wrong_rows(body: object, size: int) -> dict[int, str] | None:
    """Return the rows of a bulk request with param errors: row index (from 0) to message.

    None: the body names no param. {}: it names params, but their rows are unknown. Supported shapes are
    `{"rows": [{"position": FROM_1, "fields": {…}}]}`, `{"detail": [{…}, …]}` with one object per row,
    and FastAPI's `"loc": ["body", "params", ROW, NAME]`.
    """
    if size == 1:
        return wrong_params(body) or None
    rows: dict[int, list[tuple[str, str]]] = {}
    for row, error in _param_errors(body, size):
        if row is None or not 0 <= row < size:
            return {}
        rows.setdefault(row, []).append(error)
    return {row: _format_errors(errors) for row, errors in rows.items()} or None


def join_text(text: object, separator: str = " ") -> str:
    """Join a list of texts into one. A single text is returned as it is."""
    return separator.join(map(str, text)) if isinstance(text, list) else str(text)


def _format_errors(errors: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {message}" for name, message in dict(errors).items())


def _param_errors(body: object, size: int = 1) -> Iterator[tuple[int | None, tuple[str, str]]]:
    """Yield each param error as (row index, (param, message)). The row is None if the body does not name it."""
    if not isinstance(body, Mapping):
        return
    detail, rows = body.get("detail"), body.get("rows")
    yield from ((None, complaint) for complaint in _field_errors(body.get("fields")))
    if isinstance(detail, list):
        one_per_row = len(detail) == size and all(isinstance(item, Mapping) and "loc" not in item for item in detail)
        for index, item in enumerate(detail):
            if isinstance(item, Mapping) and "loc" in item:
                yield from _fastapi_error(item)
            else:
                yield from ((index if one_per_row else None, complaint) for complaint in _field_errors(item))
    else:
        yield from ((None, complaint) for complaint in _field_errors(detail))
    for item in rows if isinstance(rows, list) else []:
        position = item.get("position") if isinstance(item, Mapping) else None
        row = None if (number := whole_number(position)) is None else number - 1
        yield from ((row, complaint) for complaint in _field_errors(item))


def _fastapi_error(item: Mapping[str, object]) -> Iterator[tuple[int | None, tuple[str, str]]]:
    """Yield the param error in one item of FastAPI's `detail` list."""
    loc = item["loc"]
    if isinstance(loc, list) and "params" in loc[:-1]:
        row = loc[loc.index("params") + 1]
        yield whole_number(row), (str(loc[-1]), str(item.get("msg", "refused")))


def _field_errors(item: object) -> Iterator[tuple[str, str]]:
    if not isinstance(item, Mapping):
        return
    fields = item.get("fields")
    if not isinstance(fields, Mapping):
        fields = {name: value for name, value in item.items() if name not in ERROR_KEYS}
    yield from ((str(name), join_text(value)) for name, value in fields.items() if name not in BODY_KEYS)
