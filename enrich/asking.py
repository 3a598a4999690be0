"""What the rows of a batch ask: params as sent, fingerprints, or why they ask nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import polars as pl

from enrich.domains import domain
from enrich.job import Job
from enrich.model import RowStatus, Wanted
from enrich.privacy import Forgotten
from enrich.question import Question
from enrich.spec import Param

#: The columns that we add behind the job's own; an earlier output's are replaced.
STATUS_COLUMNS: dict[str, pl.DataType] = {
    "enrich_status": pl.String(),
    "enrich_error": pl.String(),
    "enrich_provider": pl.String(),
    "enrich_credits": pl.Float64(),
    "enrich_task_id": pl.String(),
    "enrich_at": pl.String(),
}

#: The columns of the change feed behind its key.
CHANGE_COLUMNS = ("field", "old", "new", "provider", "at")

#: Writes params as they are sent; made once, as json.dumps would for every row.
_written = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

#: Why a row is filtered, where the job's expressions are not the reason.
SUPPRESSED = "suppressed: listed as never to be sent"
FORGOTTEN = "forgotten at the person's wish"


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows in the input's order. `first` is the position of the first, from 0.

    `frame` has the input's columns in their types, as they are written back. The lists run along it: a row either
    has a fingerprint and params (JSON, as sent), or a status (`invalid`, `filtered`) and perhaps the reason.
    `groups` are what `caps` counts, `places` the order of asking; None: the input's.
    """

    first: int
    frame: pl.DataFrame
    fingerprints: list[bytes | None]
    params: list[str | None]
    statuses: list[RowStatus | None]
    errors: list[str | None]
    groups: list[str | None]
    places: list[int] | None = None

    def asked(self) -> Iterator[Wanted]:
        """Yield what the rows ask that ask something."""
        rows = zip(self.fingerprints, self.params, self.groups, strict=True)
        for index, (fingerprint, params, group) in enumerate(rows):
            if fingerprint is not None and params is not None:
                place = self.places[index] if self.places else None
                yield Wanted(self.first + index, fingerprint, params, place, group)


class _Ask(NamedTuple):
    """What a row asks, or why it doesn't."""

    fingerprint: bytes | None = None
    params: str | None = None
    status: RowStatus | None = None
    error: str | None = None


class Asking:
    """Maps rows to questions; remembers the occurrences that `dedupe: false` tells apart."""

    def __init__(self, job: Job, question: Question, header: list[str], forgotten: Forgotten) -> None:
        self._params = job.model.params
        self._question = question
        self._forgotten = forgotten
        self._occurrences: Counter[bytes] | None = None if job.model.dedupe else Counter()
        call = json.dumps([1, "run", question.call.waterfall, question.call.body()], sort_keys=True)
        self._prefix = blake2b(call.encode(), digest_size=16, person=b"enrich-request")
        self._names = sorted(self._params)
        # Named by number, so that no param is in the way of another column.
        self._values = [source(self._params[name], header).alias(str(i)) for i, name in enumerate(self._names)]
        self._group = _group(job, header).alias("group")
        self._kept = [place for place, name in enumerate(header) if name not in STATUS_COLUMNS]

    def batch(
        self,
        first: int,
        frame: pl.DataFrame,
        wanted: pl.Series,
        suppressed: pl.Series | None,
        places: list[int] | None,
    ) -> Batch:
        """Ask for a frame whose first row has this position; `wanted` and `suppressed` run along it."""
        vetoed = pl.lit(value=False) if suppressed is None else pl.lit(suppressed)
        values = frame.select(*self._values, self._group, pl.lit(wanted).alias("wanted"), vetoed.alias("vetoed"))
        asks: list[_Ask] = []
        groups: list[str | None] = []
        for *row, group, keep, veto in values.iter_rows():
            asks.append(self._ask(row, keep=keep, veto=veto))
            groups.append(group)
        return Batch(
            first,
            frame.select(pl.nth(self._kept)),
            [ask.fingerprint for ask in asks],
            [ask.params for ask in asks],
            [ask.status for ask in asks],
            [ask.error for ask in asks],
            groups,
            places,
        )

    def _ask(self, row: list[str], *, keep: bool, veto: bool) -> _Ask:
        if not keep:
            return _Ask(status=RowStatus.FILTERED)
        if veto:
            return _Ask(status=RowStatus.FILTERED, error=SUPPRESSED)
        params = {name: value for name, value in zip(self._names, row, strict=True) if value}
        if error := self._problem(params):
            return _Ask(status=RowStatus.INVALID, error=error)
        text = _written(params)
        if text in self._forgotten:
            return _Ask(status=RowStatus.FILTERED, error=FORGOTTEN)
        return _Ask(self._fingerprint(text), text)

    def _problem(self, params: dict[str, str]) -> str | None:
        """Say why a row cannot be asked."""
        for name in self._question.required:
            if name not in params:
                return f"{name} is empty ({self._sources(name)})"
        for name in filter(params.get, self._question.emails):
            local, at, domain = params[name].partition("@")
            if not (local and at and "." in domain) or "@" in domain or any(map(str.isspace, params[name])):
                return f"{name} is no e-mail address ({self._sources(name)})"
        return None if params else "no param has a value"

    def _sources(self, name: str) -> str:
        return ", ".join(self._params[name].columns) or "a constant"

    def _fingerprint(self, params: str) -> bytes:
        """Name a request by what is sent; stable over versions, machines and the job file's order of params."""
        digest = self._prefix.copy()
        digest.update(b"\0" + params.encode())
        shared = digest.digest()
        if self._occurrences is None:
            return shared
        occurrence = self._occurrences[shared]
        self._occurrences[shared] += 1
        if occurrence:
            digest.update(b"\0%d" % occurrence)
        return digest.digest()


def _group(job: Job, header: list[str]) -> pl.Expr:
    """Compute what `caps` counts: a param as it is sent, or a column; null where it is blank."""
    if job.model.caps is None:
        return pl.lit(None, pl.String)
    by = job.model.caps.by
    param = job.model.params.get(by)
    value = clean(pl.nth(header.index(by))) if param is None else source(param, header)
    return pl.when(value != "").then(value.str.to_lowercase())


def source(param: Param, header: list[str]) -> pl.Expr:
    """Compute a param: NFC, without outer blanks; '' where nothing is to be sent.

    Columns are taken by their place: polars would read a name like `^x$` as a pattern.
    """
    if param.value is not None:
        return clean(pl.lit(param.value))
    candidates = []
    for column in param.columns:
        value = pl.nth(header.index(column))
        for transform in param.transform:
            value = TRANSFORMS[transform](value)
        value = clean(value)
        candidates.append(pl.when(value != "").then(value))
    return pl.coalesce([*candidates, pl.lit("")])


def clean(text: pl.Expr) -> pl.Expr:
    """Normalise (Unicode NFC) and cut outer blanks."""
    return text.str.normalize("NFC").str.strip_chars()


TRANSFORMS = {
    "trim": lambda text: text.str.strip_chars(),
    "lower": lambda text: text.str.to_lowercase(),
    "domain": domain,
}
