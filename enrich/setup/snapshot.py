"""The waterfalls as the vendor's public documentation names them, for work without the API."""

from __future__ import annotations

from enrich.api.waterfall import Field, Param, Waterfall

#: When the documentation was read.
DOCUMENTED_ON = "2026-11"


def _make_documented(
    identifier: str, name: str, required: str, fields: str = "", *, verifying: bool = False
) -> Waterfall:
    return Waterfall(
        identifier=identifier,
        name=name,
        input_params=[Param(name=param, required=True) for param in required.split()],
        output_fields=[Field(name=field) for field in fields.split()],
        is_email_verifying=verifying,
    )


#: Params and, where they are documented, fields. Providers and prices are told by the API alone.
DOCUMENTED_WATERFALLS: dict[str, Waterfall] = {
    waterfall.identifier: waterfall
    for waterfall in (
        _make_documented("email_getter", "Email finder", "first_name last_name company", "email", verifying=True),
        _make_documented("person_getter", "Person finder", "email", "first_name last_name linkedin_url"),
        _make_documented("company_lookup", "Company lookup", "company_website"),
        _make_documented("person_by_link", "Person by link", "link"),
        _make_documented("phone_getter", "Phone finder", "linkedin"),
        _make_documented("job_postings_getter", "Job postings", "company_website"),
    )
}
