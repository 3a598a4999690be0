"""What to say about a column that the input lacks. A header that may be a lead is never quoted."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from enrich.files.text import looks_like_cell
from enrich.job.cell_text import clean
from enrich.job.name_hints import did_you_mean, suggest_name


def is_headerless(header: Sequence[str], job_columns: Iterable[str]) -> bool:
    """Check whether the first line looks like a lead: it has none of the job's columns, but the shape of a cell."""
    return not set(header) & set(job_columns) and any(map(looks_like_cell, header))


def missing_column_hint(column: str, header: Sequence[str], job_columns: Iterable[str]) -> str | None:
    """Return a hint on a column that the header lacks. None: no hint."""
    if twin := next((name for name in header if name != column and clean(name) == clean(column)), None):
        shown = f"the input's name is {json.dumps(twin)}, the job's is {json.dumps(column)}"
        return f"they look alike, but {shown}: write the input's, in double quotes"
    if set(header) & set(job_columns):
        return suggest_name(column, [name for name in header if not looks_like_cell(name)])
    # Without a single column of the job the first line may be a lead, so only a name that differs little is shown.
    by_fold = {_fold(name): name for name in header}
    close = get_close_matches(_fold(column), by_fold, n=1, cutoff=0.8)
    return did_you_mean(by_fold[close[0]]) if close else None


def _fold(name: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))
