"""Guesses which column serves which param, from headers and values; says how sure it is, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from enrich.api.waterfall import Waterfall
from enrich.setup.concepts import (
    COMPANY_NAME,
    DOMAIN,
    EMAIL,
    FIRST_NAME,
    FULL_NAME,
    LAST_NAME,
    OTHERS,
    Column,
    Concept,
    concept_of,
    words,
)

Sure = Literal["sure", "likely", "a guess"]

#: Shares of the values: that prove a kind, that would contradict it, that a few strays may be.
PROVES, CONTRADICTS, MOST = 0.5, 0.1, 0.8
#: Private mailboxes tell nothing of a company.
FREE_MAIL_AT_MOST = 0.2
#: Fewer values say nothing about how often a host comes.
FEW = 4


@dataclass(frozen=True, slots=True)
class Guess:
    """Where a param's values come from."""

    columns: tuple[str, ...]
    transform: tuple[str, ...]
    sure: Sure
    why: str


@dataclass(frozen=True, slots=True)
class _Fit:
    """How well a column serves a concept."""

    column: Column
    score: int
    sure: Sure
    why: str


def guess(params: Sequence[str], columns: Sequence[Column]) -> dict[str, Guess | None]:
    """Choose columns for the params; None where none fits.

    A column serves one param only, but for the domain taken out of it. Equal input gives equal guesses.
    """
    found: dict[str, Guess | None] = dict.fromkeys(params)
    exact = {param: concept_of(param) for param in params}
    for param, concept in exact.items():
        if concept is DOMAIN:
            found[param] = _domain(columns)
    wanted = {
        param: COMPANY_NAME if concept is DOMAIN else concept
        for param, concept in exact.items()
        if found[param] is None
    }
    fits = [
        (fit.score, -place, -position, param, fit)
        for place, (param, concept) in enumerate(wanted.items())
        for position, column in enumerate(columns)
        if column.name and (fit := _fit(concept, column, columns))
    ]
    taken: set[str] = set()
    for *_, param, fit in sorted(fits, key=lambda each: each[:3], reverse=True):
        if found[param] is None and fit.column.name not in taken:
            taken.add(fit.column.name)
            by_name = exact[param] is DOMAIN
            why = f"{fit.why}; no column holds the company's website" if by_name else fit.why
            sure = "a guess" if by_name else fit.sure
            found[param] = Guess((fit.column.name,), wanted[param].transform, sure, why)
    return found


def _domain(columns: Sequence[Column]) -> Guess | None:
    """Take the company's domain from its website, else from the address of a person who works there."""
    sites = _best(DOMAIN, columns)[:1]
    mails = [fit for fit in _best(EMAIL, columns)[:1] if fit.column.filled and fit.column.free_mail < FREE_MAIL_AT_MOST]
    chosen = sites + mails
    if not chosen:
        return None
    why = "; ".join(f"{fit.column.name!r}: {fit.why}" for fit in chosen) if len(chosen) > 1 else chosen[0].why
    sure = chosen[0].sure if sites else "a guess"
    return Guess(tuple(fit.column.name for fit in chosen), DOMAIN.transform, sure, why)


def _best(concept: Concept, columns: Sequence[Column]) -> list[_Fit]:
    fits = [fit for column in columns if column.name and (fit := _fit(concept, column, columns))]
    return sorted(fits, key=lambda fit: -fit.score)


def _fit(concept: Concept, column: Column, columns: Sequence[Column]) -> _Fit | None:
    named = concept.named(column.name) or _german_name(concept, column, columns)
    if concept is FULL_NAME and named != _EXACT:
        return None
    share = _share(concept, column)
    if concept.kind is None:
        if not named or _is_no_name(concept, column):
            return None
        sure: Sure = "sure" if named == _EXACT and column.filled else "likely"
        return _Fit(column, named * 10, sure, _blank(column) or "by its header")
    if column.filled and share < CONTRADICTS:
        return None
    if not named and (share < MOST or OTHERS.intersection(words(column.name))):
        return None
    if concept is DOMAIN and (_is_profiles(column) or (not named and _is_one_site(column))):
        return None
    proven = share >= PROVES
    shown = f"{share:.0%} of its values are {concept.kind}"
    if not named:
        return _Fit(column, 5, "a guess", f"{shown}; its header says nothing of it")
    sure = "sure" if named == _EXACT and proven else "likely"
    return _Fit(column, named * 10 + proven * 5, sure, _blank(column) or f"by its header; {shown}")


_EXACT = 3


def _share(concept: Concept, column: Column) -> float:
    if concept.kind is None:
        return 0.0
    if concept is DOMAIN:
        return min(1.0, column.shares["web addresses"] + column.shares["domains"])
    return column.shares[concept.kind]


def _blank(column: Column) -> str | None:
    return None if column.filled else "by its header; all values that were looked at are blank"


def _is_no_name(concept: Concept, column: Column) -> bool:
    """Tell whether a column holds addresses or numbers where names are asked for."""
    if concept not in (FIRST_NAME, LAST_NAME, FULL_NAME, COMPANY_NAME):
        return False
    return max(column.shares["e-mail addresses"], column.shares["web addresses"]) >= PROVES or column.numeric >= PROVES


def _is_one_site(column: Column) -> bool:
    """Tell whether the addresses lead to one site, as those of photos do."""
    return column.filled >= FEW and column.top_host > MOST


def _is_profiles(column: Column) -> bool:
    return column.shares["LinkedIn profiles"] + column.shares["LinkedIn company pages"] >= PROVES


def _german_name(concept: Concept, column: Column, columns: Sequence[Column]) -> int:
    """Take `Name` for the last name where a first name stands beside it and no other last name."""
    if concept is not LAST_NAME or FULL_NAME.named(column.name) != _EXACT or column.name.casefold() != "name":
        return 0
    names = [other.name for other in columns]
    beside = any(FIRST_NAME.named(name) == _EXACT for name in names) and not any(map(LAST_NAME.named, names))
    return 1 if beside and column.spaced < PROVES else 0


def unmatched(param: str, columns: Sequence[Column]) -> str | None:
    """Say what stands in the way of a param that found no column."""
    if concept_of(param) in (FIRST_NAME, LAST_NAME):
        whole = _best(FULL_NAME, columns)[:1]
        if whole and whole[0].column.spaced >= PROVES:
            return f"{whole[0].column.name!r} seems to hold whole names: split it into two columns"
    return None


def already_known(fields: Iterable[str], columns: Sequence[Column]) -> list[str]:
    """Name the columns that hold already what the waterfall finds."""
    concepts = [concept_of(field) for field in fields]
    return [fits[0].column.name for concept in concepts if (fits := _best(concept, columns))]


def fitness(waterfall: Waterfall, columns: Sequence[Column]) -> tuple[int, int]:
    """Count the required params of a waterfall that a column was found for, and all of them."""
    required = [param.name for param in waterfall.input_params if param.required]
    found = guess(required, columns)
    return sum(each is not None for each in found.values()), len(required)


def new_names(fields: Sequence[str], header: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (new column, field), the names not among the header's, whatever their case."""
    taken = {name.casefold() for name in header}
    for field in fields:
        names = (field, f"found_{field}", *(f"found_{field}_{number}" for number in range(2, len(taken) + 3)))
        name = next(name for name in names if name.casefold() not in taken)
        taken.add(name.casefold())
        yield name, field
