"""The target of the requests: a waterfall or an enrichment, with what all of its requests have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from msgspec import Struct


class TargetKind(StrEnum):
    """The kind of target: its key in the job file, and a part of the API's addresses."""

    WATERFALL = "waterfall"
    ENRICHMENT = "enrichment"


class Target(Struct, frozen=True):
    """The waterfall or enrichment that gets the params of each row. A request is a target with params.

    `enrichments` are the provider ids of a waterfall, in order. `pages` is how many an enrichment fetches.
    """

    kind: TargetKind
    id: str
    enrichments: tuple[int, ...] = ()
    email_verifier: int | None = None
    pages: int = 1

    @classmethod
    def from_json(cls, call: Mapping[str, Any]) -> Target:
        """Return the target of a canonical text that was parsed."""
        kind = next(kind for kind in TargetKind if kind in call)
        pages = call.get("pagination", {}).get("pages", 1)
        return cls(kind, str(call[kind]), tuple(call.get("enrichments", ())), call.get("email_verifier"), pages)

    def as_json(self) -> dict[str, Any]:
        """Return the target as an object: its body, and its id under its kind."""
        return self.body() | {self.kind.value: self.id if self.kind is TargetKind.WATERFALL else int(self.id)}

    def canonical(self) -> str:
        """Return the target as canonical JSON: equal targets have equal text."""
        return json.dumps(self.as_json(), sort_keys=True)

    def body(self) -> dict[str, Any]:
        """Return the request body without `params`."""
        if self.kind is TargetKind.ENRICHMENT:
            # The API returns one page by default.
            return {} if self.pages == 1 else {"pagination": {"pages": self.pages}}
        verifier = {} if self.email_verifier is None else {"email_verifier": self.email_verifier}
        return {"enrichments": list(self.enrichments), **verifier}

    def body_prefix(self) -> str:
        """Return the beginning of every request body. The params and a closing brace follow."""
        inner = json.dumps(self.body())[1:-1]
        return f'{{{inner}{", " if inner else ""}"params": '

    @property
    def path(self) -> str:
        """The API's path of its description, which begins those of its runs."""
        return f"/{self.kind}s/{quote(self.id, safe='')}"

    @property
    def title(self) -> str:
        """Its name in a list: a waterfall's says what it is, a number alone does not."""
        return self.id if self.kind is TargetKind.WATERFALL else f"{self.kind} {self.id}"

    @property
    def label(self) -> str:
        """Its name in a sentence."""
        return f"the {self.kind} `{self.id}`"
