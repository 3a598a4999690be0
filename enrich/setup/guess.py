"""Guesses which column serves which param, from headers and values; says how sure it is, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from enrich.databar.waterfall import Waterfall
from enrich.setup.concepts import (
    COMPANY_NAME,
    DOMAIN,
    EMAIL,
    EXCLUDING_WORDS,
    FIRST_NAME,
    FULL_NAME,
    LAST_NAME,
    Column,
    ColumnKind,
    column_kind_of,
    split_words,
)

Confidence = Literal["sure", "likely", "a guess"]

#: Shares of the values: that prove a kind, that would contradict it, that a few strays may be.
PROVING_SHARE, CONTRADICTING_SHARE, DOMINANT_SHARE = 0.5, 0.1, 0.8
#: Private mailboxes tell nothing of a company.
MAX_FREE_MAIL_SHARE = 0.2
#: Fewer values say nothing about how often a host comes.
MIN_VALUES = 4


@dataclass(frozen=True, slots=True)
class ColumnMatch:
    """Where a param's values come from."""

    columns: tuple[str, ...]
    transform: tuple[str, ...]
    confidence: Confidence
    reason: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    """How well a column serves a concept."""

    column: Column
    score: int
    confidence: Confidence
    reason: str


def match_columns(params: Sequence[str], columns: Sequence[Column]) -> dict[str, ColumnMatch | None]:
    """Choose columns for the params; None where none fits.

    A column serves one param only, but for the domain taken out of it. Equal input gives equal guesses.
    """
    matches: dict[str, ColumnMatch | None] = dict.fromkeys(params)
    kinds = {param: column_kind_of(param) for param in params}
    for param, concept in kinds.items():
        if concept is DOMAIN:
            matches[param] = _match_domain(columns)
    open_kinds = {
        param: COMPANY_NAME if concept is DOMAIN else concept
        for param, concept in kinds.items()
        if matches[param] is None
    }
    candidates = [
        (fit.score, -param_index, -column_index, param, fit)
        for param_index, (param, concept) in enumerate(open_kinds.items())
        for column_index, column in enumerate(columns)
        if column.name and (fit := _make_candidate(concept, column, columns))
    ]
    used_columns: set[str] = set()
    for *_, param, fit in sorted(candidates, key=lambda each: each[:3], reverse=True):
        if matches[param] is None and fit.column.name not in used_columns:
            used_columns.add(fit.column.name)
            by_name = kinds[param] is DOMAIN
            reason = f"{fit.reason}; no column holds the company's website" if by_name else fit.reason
            confidence = "a guess" if by_name else fit.confidence
            matches[param] = ColumnMatch((fit.column.name,), open_kinds[param].transform, confidence, reason)
    return matches


def _match_domain(columns: Sequence[Column]) -> ColumnMatch | None:
    """Take the company's domain from its website, else from the address of a person who works there."""
    sites = _ranked_candidates(DOMAIN, columns)[:1]
    mails = [
        fit
        for fit in _ranked_candidates(EMAIL, columns)[:1]
        if fit.column.filled_count and fit.column.free_mail_share < MAX_FREE_MAIL_SHARE
    ]
    candidates = sites + mails
    if not candidates:
        return None
    reason = (
        "; ".join(f"{fit.column.name!r}: {fit.reason}" for fit in candidates)
        if len(candidates) > 1
        else candidates[0].reason
    )
    confidence = candidates[0].confidence if sites else "a guess"
    return ColumnMatch(tuple(fit.column.name for fit in candidates), DOMAIN.transform, confidence, reason)


def _ranked_candidates(kind: ColumnKind, columns: Sequence[Column]) -> list[_Candidate]:
    candidates = [fit for column in columns if column.name and (fit := _make_candidate(kind, column, columns))]
    return sorted(candidates, key=lambda fit: -fit.score)


def _make_candidate(kind: ColumnKind, column: Column, columns: Sequence[Column]) -> _Candidate | None:
    header_score = kind.header_score(column.name) or _german_last_name_score(kind, column, columns)
    if kind is FULL_NAME and header_score != _EXACT_HEADER:
        return None
    share = _share_in_format(kind, column)
    if kind.value_format is None:
        if not header_score or _is_not_a_name(kind, column):
            return None
        confidence: Confidence = "sure" if header_score == _EXACT_HEADER and column.filled_count else "likely"
        return _Candidate(column, header_score * 10, confidence, _blank_reason(column) or "by its header")
    if column.filled_count and share < CONTRADICTING_SHARE:
        return None
    if not header_score and (share < DOMINANT_SHARE or EXCLUDING_WORDS.intersection(split_words(column.name))):
        return None
    if kind is DOMAIN and (_is_linkedin_urls(column) or (not header_score and _is_single_site(column))):
        return None
    proven = share >= PROVING_SHARE
    share_text = f"{share:.0%} of its values are {kind.value_format}"
    if not header_score:
        return _Candidate(column, 5, "a guess", f"{share_text}; its header says nothing of it")
    confidence = "sure" if header_score == _EXACT_HEADER and proven else "likely"
    return _Candidate(
        column, header_score * 10 + proven * 5, confidence, _blank_reason(column) or f"by its header; {share_text}"
    )


_EXACT_HEADER = 3


def _share_in_format(kind: ColumnKind, column: Column) -> float:
    if kind.value_format is None:
        return 0.0
    if kind is DOMAIN:
        return min(1.0, column.format_shares["web addresses"] + column.format_shares["domains"])
    return column.format_shares[kind.value_format]


def _blank_reason(column: Column) -> str | None:
    return None if column.filled_count else "by its header; all values that were looked at are blank"


def _is_not_a_name(kind: ColumnKind, column: Column) -> bool:
    """Tell whether a column holds addresses or numbers where names are asked for."""
    if kind not in (FIRST_NAME, LAST_NAME, FULL_NAME, COMPANY_NAME):
        return False
    return (
        max(column.format_shares["e-mail addresses"], column.format_shares["web addresses"]) >= PROVING_SHARE
        or column.numeric_share >= PROVING_SHARE
    )


def _is_single_site(column: Column) -> bool:
    """Tell whether the addresses lead to one site, as those of photos do."""
    return column.filled_count >= MIN_VALUES and column.top_host_share > DOMINANT_SHARE


def _is_linkedin_urls(column: Column) -> bool:
    return column.format_shares["LinkedIn profiles"] + column.format_shares["LinkedIn company pages"] >= PROVING_SHARE


def _german_last_name_score(kind: ColumnKind, column: Column, columns: Sequence[Column]) -> int:
    """Take `Name` for the last name where a first name stands beside it and no other last name."""
    if (
        kind is not LAST_NAME
        or FULL_NAME.header_score(column.name) != _EXACT_HEADER
        or column.name.casefold() != "name"
    ):
        return 0
    names = [other.name for other in columns]
    has_first_name = any(FIRST_NAME.header_score(name) == _EXACT_HEADER for name in names) and not any(
        map(LAST_NAME.header_score, names)
    )
    return 1 if has_first_name and column.spaced_share < PROVING_SHARE else 0


def unmatched_reason(param: str, columns: Sequence[Column]) -> str | None:
    """Say what stands in the way of a param that found no column."""
    if column_kind_of(param) in (FIRST_NAME, LAST_NAME):
        whole = _ranked_candidates(FULL_NAME, columns)[:1]
        if whole and whole[0].column.spaced_share >= PROVING_SHARE:
            return f"{whole[0].column.name!r} seems to hold whole names: split it into two columns"
    return None


def existing_result_columns(fields: Iterable[str], columns: Sequence[Column]) -> list[str]:
    """Name the columns that hold already what the waterfall finds."""
    kinds = [column_kind_of(field) for field in fields]
    return [candidates[0].column.name for concept in kinds if (candidates := _ranked_candidates(concept, columns))]


def count_matched_params(waterfall: Waterfall, columns: Sequence[Column]) -> tuple[int, int]:
    """Count the required params of a waterfall that a column was found for, and all of them."""
    required = [param.name for param in waterfall.input_params if param.required]
    matches = match_columns(required, columns)
    return sum(each is not None for each in matches.values()), len(required)


def result_column_names(fields: Sequence[str], header: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (new column, field), the names not among the header's, whatever their case."""
    used_names = {name.casefold() for name in header}
    for field in fields:
        names = (field, f"found_{field}", *(f"found_{field}_{number}" for number in range(2, len(used_names) + 3)))
        name = next(name for name in names if name.casefold() not in used_names)
        used_names.add(name.casefold())
        yield name, field
