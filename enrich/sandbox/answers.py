"""Decides what a run finds and costs: invents people and companies, and writes the `data` of a task as JSON.

Each result depends only on the seed and the lookup.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, TypeVar

from enrich.sandbox.catalogue import Service, to_credits
from enrich.sandbox.lookups import Cascade, EnrichmentCall, Lookup
from enrich.sandbox.settings import SandboxSettings

T = TypeVar("T")

Fields = dict[str, Any]

FIRST_NAMES = ("Ada", "Bela", "Chidi", "Dolores", "Emre", "Freya", "Goran", "Hana", "Ines", "Jonas", "Kemal", "Lucía")
LAST_NAMES = ("Abara", "Brandt", "Castellano", "Dvořák", "Eriksen", "Fontaine", "Grünwald", "Holm", "Ivers", "Jansen")
TITLES = ("Head of Sales", "Founder", "Operations Lead", "Data Engineer", "Marketing Manager", "Finance Director")
INDUSTRIES = ("Software", "Logistics", "Agriculture", "Textiles", "Machine tools", "Hospitality")
CITIES = ("Lisbon", "Utrecht", "Ghent", "Tampere", "Graz", "Duluth")
_MAILBOX_STATES = (
    ("valid", "accepted"),
    ("valid", "accepted"),
    ("valid", "accepted"),
    ("catch_all", "the domain accepts any address"),
    ("invalid", "no such mailbox"),
)
AREA_CODES = ("202", "303", "404", "512", "617", "702", "808", "916")


class SeededRandom:
    """Returns a number between 0 and 1 for each label; always the same one for the same seed and subject."""

    def __init__(self, seed: int, subject: str) -> None:
        self._key = blake2b(f"{seed}\n{subject}".encode(), digest_size=32).digest()

    def __call__(self, label: str) -> float:
        """Return the number of a label; never 0 and never 1."""
        digest = blake2b(label.encode(), key=self._key, digest_size=8).digest()
        return ((int.from_bytes(digest) >> 12) + 0.5) / 2**52

    def pick(self, label: str, choices: Sequence[T]) -> T:
        """Return one of the choices."""
        return choices[int(self(label) * len(choices))]


def invent_fields(target: str, params: Mapping[str, str], draw: SeededRandom) -> Fields:
    """Invent the result of a waterfall or of an enrichment (its id as text) for a known person or company."""
    return _INVENTORS[target](params, draw)


def invent_rows(target: str, params: Mapping[str, str], count: int, draw: SeededRandom) -> list[Fields]:
    """Invent `count` rows of an enrichment that lists several. A larger count gives the same rows and further ones."""
    return [_ROW_INVENTORS[target](params, draw, number) for number in range(count)]


def ascii_name(text: str) -> str:
    """Spell a name in the ASCII letters of an email address: `Zoë` is `zoe`, `Łukasz` is `lukasz`, `김` is `gim`."""
    return "".join(_ascii_letter(character) for character in unicodedata.normalize("NFC", text))


def _ascii_letter(character: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if c.isascii() and c.isalnum())
    if plain or not character.isalpha():
        return plain.lower()
    # Letters without an ASCII base: the last word of the Unicode name, as in ZHE, HANGUL SYLLABLE GIM, IDEOGRAPH-674E.
    name = re.sub(r" WITH .*", "", unicodedata.name(character, "x"))
    return re.sub(r"[^a-z0-9]", "", re.split(r"[ -]", name)[-1].lower())


def domain_of(company: str) -> str:
    """Return the company's domain: the text itself if it is a domain or URL, else an invented one."""
    bare = re.sub(r"^[a-z]+://", "", company.strip().lower()).split("/")[0].removeprefix("www.")
    if re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", bare):
        return bare
    return ("-".join(filter(None, map(ascii_name, company.split()))) or "company") + ".example"


def invent_email(params: Mapping[str, str], draw: SeededRandom) -> Fields:
    """Invent a work email address from the name."""
    first = ascii_name(params["first_name"]) or "info"
    last = ascii_name(params["last_name"]) or "office"
    local = draw.pick("pattern", (f"{first}.{last}", f"{first}.{last}", f"{first[0]}{last}", f"{first}_{last[0]}"))
    return {"email": f"{local}@{domain_of(params['company'])}"}


def _invent_person(params: Mapping[str, str], draw: SeededRandom) -> Fields:
    local = params["email"].partition("@")[0]
    words = [word.capitalize() for word in re.split(r"[^\w]+|_|\d+", local) if word]
    first = words[0] if len(words) > 1 else draw.pick("first", FIRST_NAMES)
    last = words[-1] if words else draw.pick("last", LAST_NAMES)
    link = f"https://linkedin.example/in/{ascii_name(first)}-{ascii_name(last)}"
    return {"first_name": first, "last_name": last, "linkedin_url": link}


def _invent_phone(_: Mapping[str, str], draw: SeededRandom) -> Fields:
    return {"phone": f"+1-{draw.pick('area', AREA_CODES)}-555-01{int(draw('line') * 100):02d}"}


def _invent_company(params: Mapping[str, str], draw: SeededRandom) -> Fields:
    name, employees = _company_name(params["company_website"]), int(5 * 400 ** draw("employees"))
    industries = sorted({draw.pick(f"industry {number}", INDUSTRIES) for number in range(2)})
    rounds = 1 + int(draw("rounds") * 4)
    return {
        "name": name,
        "description": f"{name} is in {industries[0].lower()}, in {draw.pick('city', CITIES)}.",
        "linkedin": f"https://linkedin.example/company/{ascii_name(name)}",
        "employees": employees,
        "industries": industries,
        "revenue": employees * 120_000,
        "funding": {"total": rounds * 2_500_000, "rounds": rounds},
    }


def _company_name(website: str) -> str:
    return domain_of(website).split(".")[0].replace("-", " ").title()


def _invent_linked_person(params: Mapping[str, str], draw: SeededRandom) -> Fields:
    words = [word.capitalize() for word in re.findall(r"[^\W\d_]+", params["link"].rstrip("/").split("/")[-1])]
    first = words[0] if words else draw.pick("first", FIRST_NAMES)
    last = words[1] if len(words) > 1 else draw.pick("last", LAST_NAMES)
    local = f"{ascii_name(first)}.{ascii_name(last)}"
    company = f"{draw.pick('company', LAST_NAMES)} {draw.pick('partner', LAST_NAMES)}"
    return {
        "first_name": first,
        "last_name": last,
        "work_email": f"{local}@{domain_of(company)}",
        "personal_email": f"{local}@mail.example",
    }


def _invent_job_postings(params: Mapping[str, str], draw: SeededRandom) -> Fields:
    site = domain_of(params["company_website"])
    titles = sorted({draw.pick(f"job {number}", TITLES) for number in range(1 + int(draw("jobs") * 4))})
    return {
        "jobs": titles,
        "job_links": [f"https://{site}/jobs/{ascii_name(title)}" for title in titles],
        "descriptions": [f"{title} wanted" for title in titles],
        "locations": [draw.pick(title, CITIES) for title in titles],
    }


def _verify_email(params: Mapping[str, str], draw: SeededRandom) -> Fields:
    status, reason = draw.pick("status", _MAILBOX_STATES)
    return {"email": params["email"], "status": status, "reason": reason}


def _check_phone(params: Mapping[str, str], draw: SeededRandom) -> Fields:
    line_type, carrier = draw.pick("line", ("mobile", "landline")), f"{draw.pick('carrier', CITIES)} Telecom"
    return {"phone": params["phone"], "line_type": line_type, "carrier": carrier}


def _invent_employee(params: Mapping[str, str], draw: SeededRandom, row: int) -> Fields:
    first, last = draw.pick(f"{row} first", FIRST_NAMES), draw.pick(f"{row} last", LAST_NAMES)
    link = f"https://linkedin.example/in/{ascii_name(first)}-{ascii_name(last)}"
    title = f"{draw.pick(f'{row} title', TITLES)} of {_company_name(params['company_website'])}"
    return {"first_name": first, "last_name": last, "title": title, "linkedin_url": link}


def _invent_place(params: Mapping[str, str], draw: SeededRandom, row: int) -> Fields:
    name = f"{draw.pick(f'{row} name', LAST_NAMES)} {params['query'].title()}"
    return {
        "name": name,
        "address": f"{1 + int(draw(f'{row} number') * 99)} Station Road, {draw.pick(f'{row} city', CITIES)}",
        "phone": f"+1-{draw.pick(f'{row} area', AREA_CODES)}-555-01{int(draw(f'{row} line') * 100):02d}",
        "website": f"https://{domain_of(name)}",
    }


_INVENTORS: Mapping[str, Callable[[Mapping[str, str], SeededRandom], Fields]] = {
    "email_getter": invent_email,
    "person_getter": _invent_person,
    "phone_getter": _invent_phone,
    "company_lookup": _invent_company,
    "person_by_link": _invent_linked_person,
    "job_postings_getter": _invent_job_postings,
    "10": _verify_email,
    "12": _verify_email,
    "80": _check_phone,
}
_ROW_INVENTORS: Mapping[str, Callable[[Mapping[str, str], SeededRandom, int], Fields]] = {
    "60": _invent_employee,
    "70": _invent_place,
}


# `free`: a failure that costs nothing and ends when sent again. `no_data`: no match, with that status for a while.
Outcome = Literal["found", "missed", "no_data", "failed", "free"]

_VERIFIER_REJECT_SHARE = 0.1  # probability of a wrong find, which the verifier rejects
_FAIL_TWICE_SHARE = 0.3  # share of the free failures that fail twice


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a run: JSON texts for the task's body, and the true cost in millionths.

    `steps` is a JSON list of [provider or verifier, found, millionths], also when the body has no steps.
    """

    outcome: Outcome
    data: str
    error: str
    cost: int
    steps: str = "[]"


@dataclass(slots=True)
class _Search:
    """A search for a lookup: what the providers of its cascade, or its enrichment, returned."""

    lookup: Lookup
    draw: SeededRandom
    settings: SandboxSettings
    bulk: bool
    cost: int = 0
    result: Fields | list[Fields] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    by_provider: dict[str, Fields] = field(default_factory=dict)
    provider_results: list[tuple[str, bool, int]] = field(default_factory=list)

    def run(self) -> Answer:
        """Search, and return the answer."""
        target = self.lookup.target
        if isinstance(target, Cascade):
            self._run_cascade(target)
        else:
            self._run_enrichment(target)
        if self.result is not None:
            return self._answer("found", self._data_json(self.result))
        return self._answer("missed", "null") if self.bulk else self._missed_answer()

    def fail(self) -> Answer:
        """Return the answer of a search that costs something, and fails."""
        target = self.lookup.target
        if isinstance(target, Cascade):
            source = target.providers[0].name
            self._add_step("search", target.providers[0], "error", target.providers[0].cost)
        else:
            source = target.offer.data_source
            self.cost = self.lookup.worst_case
            self.provider_results.append((source, False, self.cost))
        shows_steps = bool(self.steps) and not self.bulk and self.draw("failure shows steps") < 1 / 2
        data = self._data_json({}) if shows_steps else "null"
        return self._answer("failed", data, _error_json(self.draw, f"{source}: unexpected response."))

    def _run_enrichment(self, target: EnrichmentCall) -> None:
        """Run the one source. It has no steps; a match costs its whole price."""
        enrichment, params = target.offer, self.lookup.params
        is_found = enrichment.always_answers or self.draw("known") < self.settings.hit_rate
        if is_found or self.settings.charge_misses:
            self.cost = self.lookup.worst_case
        self.provider_results.append((enrichment.data_source, is_found, self.cost))
        if is_found and enrichment.priced_by is None and target.pages is None:
            self.result = invent_fields(str(enrichment.id), params, self.draw)
        elif is_found:
            count = target.units(params) if target.pages is None else (enrichment.per_page or 1) * target.pages
            self.result = invent_rows(str(enrichment.id), params, count, self.draw)

    def _run_cascade(self, cascade: Cascade) -> None:
        """Call the providers in turn. The last one finds all known people, so any cascade has the same hit rate."""
        verifier, params, draw = cascade.verifier, self.lookup.params, self.draw
        usable_providers = [provider for provider in cascade.providers if params.keys() >= set(provider.params)]
        is_known = draw("known") < self.settings.hit_rate
        for provider in usable_providers:
            last = provider is usable_providers[-1]
            is_found = is_known and (last or draw(f"{provider.id} knows") < provider.coverage)
            # With a verifier, some finds are wrong, and the verifier rejects them.
            is_wrong = verifier and not last and draw(f"{provider.id} is wrong") < _VERIFIER_REJECT_SHARE
            if not is_found and not is_wrong:
                self._add_step("search", provider, "not_found", provider.cost if self.settings.charge_misses else 0)
                self.by_provider[provider.name] = {}
                continue
            found = invent_fields(cascade.offer.identifier, params, draw)
            if verifier and is_wrong:
                self._add_step("search", provider, "found", 0)
                self._add_step("verify", verifier, "invalid", verifier.cost)
                self.by_provider[provider.name] = {name: f"old-{value}" for name, value in found.items()}
                continue
            self._add_step("search", provider, "found", provider.cost, verified=verifier is not None)
            self.provider_results[-1] = (provider.name, True, provider.cost)
            if verifier:
                self._add_step("verify", verifier, "valid", verifier.cost, verified=True)
            self.by_provider[provider.name] = {**found, "score": 60 + int(draw("score") * 40)}
            self.result = found
            break

    def _add_step(self, action: str, provider: Service, result: str, cost: int, *, verified: bool = False) -> None:
        self.cost += cost
        self.provider_results.append((provider.name, False, cost))
        self.steps.append(
            {
                "action": action,
                "provider": provider.name,
                "result": result,
                "details": None,
                "cost": str(to_credits(cost)),
                "is_verified": verified,
                "provider_logo": f"https://logos.example/{provider.id}.png",
            }
        )

    def _missed_answer(self) -> Answer:
        outputs = self.lookup.target.offer.outputs
        kind = self.draw.pick("miss", self.settings.miss_kinds)
        if kind == "no_data":
            return self._answer("no_data", "null")
        blank = {"null_result": None, "blank_result": ""}
        if kind in blank:
            return self._answer("missed", self._data_json(dict.fromkeys(outputs, blank[kind])))
        return self._answer("missed", {"empty_list": "[]", "empty_object": "{}"}.get(kind, "null"))

    def _data_json(self, result: Fields | list[Fields]) -> str:
        """Write the result. An enrichment's is flat: nothing is beside it, and several rows are a list of them."""
        data: Any = result
        if isinstance(self.lookup.target, Cascade) and self.settings.shape.startswith("wrap"):
            data = {
                "result": result,
                "result_field": list(result),
                "enrichment_data": self.by_provider,
                "steps": self.steps,
            }
        if not self.bulk and isinstance(data, dict) and self.settings.shape in ("wrapped", "flat_list"):
            data = [data]
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

    def _answer(self, outcome: Outcome, data: str, error: str = "null") -> Answer:
        """Return the answer with these steps and their cost."""
        return Answer(outcome, data, error, self.cost, json.dumps(self.provider_results))


def make_answer(lookup: Lookup, attempt: int, draw: SeededRandom, settings: SandboxSettings, *, bulk: bool) -> Answer:
    """Return the answer to a lookup; only free failures depend on `attempt` (1 for the first request)."""
    search = _Search(lookup, draw, settings, bulk)
    if draw("fails") < settings.failure_rate:
        if draw("fails at a price") >= settings.free_failures:
            return search.fail()
        if attempt <= 1 + (draw("fails twice") < _FAIL_TWICE_SHARE):
            return Answer("free", "null", _error_json(draw, "Provider unavailable, please try again later."), 0)
    return search.run()


def _error_json(draw: SeededRandom, text: str) -> str:
    return json.dumps([text, "Task failed."] if draw("error is a list") < 1 / 2 else text)
