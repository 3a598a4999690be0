"""The sandbox's flows. They are listed and described, and never run."""

from collections.abc import Mapping
from typing import Any

_LEAD_FLOW: Mapping[str, Any] = {
    "id": "6f2c1d9e-5b1a-4c57-9a86-0b7d8f3e2a10",
    "name": "Lead to phone",
    "description": "Finds the email of a lead, verifies it and looks for a phone number.",
    "inputs": [
        {"id": "first_name", "description": "First name", "type": "text", "required": True},
        {"id": "last_name", "description": "Last name", "type": "text", "required": True},
        {"id": "company", "description": "Name or website", "type": "text", "required": True},
        {"id": "linkedin", "description": "Profile", "type": "text", "required": False},
    ],
    "outputs": [{"id": "email", "response_field_id": 1}, {"id": "phone", "response_field_id": 2}],
    "created_at": "2026-09-01T08:00:00Z",
    "updated_at": "2026-10-12T08:00:00Z",
}
_COMPANY_FLOW: Mapping[str, Any] = {
    "id": "b8a4d7c2-3e0f-4f6d-8c19-5d2e7a9b4c31",
    "name": "Company facts",
    "description": "Describes a company and its open positions.",
    "inputs": [{"id": "company_website", "description": "Website", "type": "text", "required": True}],
    "outputs": [{"id": "company", "response_field_id": 1}],
    "created_at": "2026-09-02T08:00:00Z",
    "updated_at": "2026-09-02T08:00:00Z",
}

#: By id, as `GET /v1/flows` lists them.
FLOWS: Mapping[str, Mapping[str, Any]] = {flow["id"]: flow for flow in (_LEAD_FLOW, _COMPANY_FLOW)}


def flow_detail(flow_id: str) -> dict[str, Any]:
    """Return the body of `GET /v1/flows/{id}`: with its graph. Raises KeyError."""
    return {**FLOWS[flow_id], "config": {"nodes": []}, "ui": {}, "internal_version": "1"}
