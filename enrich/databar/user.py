"""The account of the API key."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from enrich.databar.lenient_model import CreditAmount, LenientModel, read_line


def _read_workspace(value: object) -> object:
    return read_line(value.get("name", value.get("id")) if isinstance(value, dict) else value)


class User(LenientModel):
    """The account of the API key. `balance` is in credits, None if unknown."""

    balance: CreditAmount = None
    workspace: Annotated[str, BeforeValidator(_read_workspace)] | None = None
