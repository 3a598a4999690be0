"""Makes a task's body hard to process; its status and result stay correct."""

import gzip
import json
from collections.abc import Callable, Mapping
from math import nan
from typing import Any

from enrich.sandbox.faults import Param

_STEP = {"action": "search", "provider": "Nobody", "result": "not_found", "details": None, "cost": "0"}
_MEBIBYTE = 2**20


def _odd_credits(body: bytes, params: Mapping[str, Param]) -> bytes:
    spent = params["credits"]
    return _to_json(json.loads(body) | {"credits_spent": nan if spent == "NaN" else spent})


def _invalid_utf8(body: bytes, _: Mapping[str, Param]) -> bytes:
    return body.replace(b"{", b'{"note":"\xff\xc3\x28\xed\xa0\x80",', 1)


def _long_id(body: bytes, params: Mapping[str, Param]) -> bytes:
    task = json.loads(body)
    names = [name for name in ("task_id", "request_id") if name in task]
    return _to_json(task | dict.fromkeys(names, "x" * int(params["length"])))


def _deep_json(body: bytes, params: Mapping[str, Param]) -> bytes:
    depth = int(params["depth"])
    return body.replace(b"{", b'{"deep":' + b"[" * depth + b"]" * depth + b",", 1)


def _many_steps(body: bytes, params: Mapping[str, Param]) -> bytes:
    task = json.loads(body)
    data = task.get("data")
    single = data[0] if isinstance(data, list) and len(data) == 1 else data
    holder = single if isinstance(single, dict) and isinstance(single.get("steps"), list) else task
    holder["steps"] = [*[_STEP] * int(params["steps"]), *holder.get("steps", [])]
    return _to_json(task)


#: Fault name to the function that changes the body.
BODY_FAULTS: Mapping[str, Callable[[bytes, Mapping[str, Param]], bytes]] = {
    "odd-credits": _odd_credits,
    "invalid-utf8": _invalid_utf8,
    "long-id": _long_id,
    "deep-json": _deep_json,
    "many-steps": _many_steps,
}


def gzip_bomb(body: bytes, mebibytes: int) -> bytes:
    """Compress a body that is larger by `mebibytes` MiB when it is unpacked."""
    return gzip.compress(body + b" " * (mebibytes * _MEBIBYTE), compresslevel=1)


def _to_json(task: Any) -> bytes:  # noqa: ANN401  # a JSON document
    return json.dumps(task, ensure_ascii=False, separators=(",", ":")).encode()
