"""What the rows of a batch ask: params as sent, fingerprints, or why they ask nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, repeat

import polars as pl

from enrich.domains import domain
from enrich.job import Job
from enrich.model import RowStatus, Wanted
from enrich.privacy import Forgotten
from enrich.question import Question
from enrich.spec import Param
from enrich.tables.cells import quoted

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

#: What JSON does not write as it stands.
_ESCAPED = r'["\\\x00-\x1f]'
#: One `@` with something before it and a dot behind it.
_EMAIL = r"^[^@]+@[^@]*\.[^@]*$"
#: What Python's `str.isspace` takes for a blank.
_BLANK = r"[\s\x1c-\x1f]"

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
        places = self.places or repeat(None)
        rows = zip(count(self.first), self.fingerprints, self.params, places, self.groups, strict=False)
        return (Wanted._make(row) for row in rows if row[1] is not None)


class Asking:
    """Maps rows to questions; remembers the occurrences that `dedupe: false` tells apart."""

    def __init__(self, job: Job, question: Question, header: list[str], forgotten: Forgotten) -> None:
        params = job.model.params
        self._forgotten = forgotten
        self._occurrences: Counter[bytes] | None = None if job.model.dedupe else Counter()
        call = json.dumps([1, "run", question.call.waterfall, question.call.body()], sort_keys=True)
        self._prefix = blake2b(call.encode() + b"\0", digest_size=16, person=b"enrich-request")
        self._names = sorted(params)
        # Named by number, so that no param is in the way of another column.
        self._values = [source(params[name], header).alias(str(i)) for i, name in enumerate(self._names)]
        self._problem = _problem(self._names, params, question)
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
        left_out = ~pl.col("wanted") | pl.col("vetoed")
        why = pl.when("wanted").then(pl.lit(SUPPRESSED))
        facts = values.select(
            pl.when(left_out).then(why).otherwise(self._problem).alias("error"),
            pl.when(left_out).then(1).when(self._problem.is_not_null()).then(2).otherwise(0).alias("status"),
        )
        asked = facts.get_column("status") == 0
        params = pl.select(pl.when(asked).then(as_json(self._names, values))).to_series()
        texts: list[str | None] = params.to_list()
        errors: list[str | None] = facts.get_column("error").to_list()
        statuses = [_STATUSES[status] for status in facts.get_column("status")]
        fingerprints = self._fingerprints(params.cast(pl.Binary).to_list())
        for index, text in enumerate(texts) if self._forgotten.hashes else ():
            if text is not None and text in self._forgotten:
                statuses[index], errors[index] = RowStatus.FILTERED, FORGOTTEN
                texts[index] = fingerprints[index] = None
        kept = frame.select(pl.nth(self._kept))
        return Batch(first, kept, fingerprints, texts, statuses, errors, values.get_column("group").to_list(), places)

    def _fingerprints(self, params: Sequence[bytes | None]) -> list[bytes | None]:
        """Name requests by what is sent; stable over versions, machines and the job file's order of params."""
        prefix, occurrences = self._prefix, self._occurrences
        names: list[bytes | None] = []
        for text in params:
            if text is None:
                names.append(None)
                continue
            digest = prefix.copy()
            digest.update(text)
            name = digest.digest()
            if occurrences is not None:
                occurrence = occurrences[name]
                occurrences[name] += 1
                if occurrence:
                    digest.update(b"\0%d" % occurrence)
                    name = digest.digest()
            names.append(name)
        return names


#: By the numbers that a frame has for them.
_STATUSES = (None, RowStatus.FILTERED, RowStatus.INVALID)


def _problem(names: list[str], params: Mapping[str, Param], question: Question) -> pl.Expr:
    """Say why a row cannot be asked, whose params are the columns `0`, `1` …; null where it can."""

    def of(name: str) -> tuple[pl.Expr, str]:
        return pl.col(str(names.index(name))), f"({', '.join(params[name].columns) or 'a constant'})"

    blank = pl.all_horizontal(pl.col(str(number)) == "" for number in range(len(names)))
    problem = pl.when(blank).then(pl.lit("no param has a value"))
    for name in (name for name in reversed(question.emails) if name in names):
        value, where = of(name)
        fine = (value == "") | (value.str.contains(_EMAIL) & ~value.str.contains(_BLANK))
        problem = pl.when(fine).then(problem).otherwise(pl.lit(f"{name} is no e-mail address {where}"))
    for name in reversed(question.required):
        value, where = of(name)
        problem = pl.when(value != "").then(problem).otherwise(pl.lit(f"{name} is empty {where}"))
    return problem


def as_json(names: Sequence[str], values: pl.DataFrame) -> pl.Series:
    """Write the params of each row as one JSON object, just as `json.dumps` does; one that is '' is left out."""
    pairs = []
    for name, value in zip(names, values.iter_columns(), strict=False):
        if value.str.contains(_ESCAPED).any():
            text = pl.lit(pl.Series(list(map(quoted, value)), dtype=pl.String))
        else:
            text = '"' + pl.lit(value) + '"'
        pairs.append(pl.when(pl.lit(value) != "").then(pl.lit(f"{quoted(name)}:") + text))
    return pl.select("{" + pl.concat_str(pairs, separator=",", ignore_nulls=True) + "}").to_series()


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
