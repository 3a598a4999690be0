"""The job file: its valid content, and errors that name the line and the nearest valid name."""

from __future__ import annotations

import json
import traceback
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from enrich.errors import JobError, suggest_name
from enrich.job.document import YamlDocument
from enrich.job.field_types import parse_duration
from enrich.job.job import Job, Overrides, load_job
from enrich.job.spec import Input, Output, json_schema
from tests.support.cases import in_turn

BASE_JOB = """\
version: 1
input: leads.csv
waterfall: email_getter
params:
  company: Company
"""


def load_job_text(folder: Path, text: str, overrides: Overrides | None = None, name: str = "job.yaml") -> Job:
    """Write a job file and load it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return load_job(path, overrides)


def job_errors(folder: Path, text: str | bytes) -> list[str]:
    """Return the error lines of a wrong job file, without the file's path, and the hint."""
    path = folder / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(JobError) as caught:
        load_job(path)
    message = [line.removeprefix(str(path)).removeprefix(":") for line in caught.value.message.splitlines()]
    assert all(line.startswith(str(path)) for line in caught.value.message.splitlines())
    return [*message, f"hint: {caught.value.hint}"] if caught.value.hint else message


def test_all_keys_are_read(tmp_path: Path) -> None:
    """Every documented key is read in its long form."""
    job = load_job_text(
        tmp_path,
        """\
version: 1
name: leads
input: {path: ../in.csv, separator: ";", encoding: cp1252}
output: {path: out.csv, separator: "\\t", encoding: utf-16}
ledger: .enrich/leads.db
waterfall: email_getter
enrichments: [833, 966]
email_verifier: 10
params:
  first_name: First Name
  last_name: {column: Last Name, transform: [trim]}
  company: {column: [Website, Email], transform: [trim, lower, domain]}
  city: [City, Town]
  country: {value: US}
columns:
  work_email: email
only_if_empty: [Email]
where: Country = 'DE' AND "Team Size" <> ''
dedupe: false
limits:
  requests_per_second: 20
  in_flight: 200
  max_credits: 500.5
policy:
  result_ttl: 24h
  refresh: {found: 90d, not_found: 14d}
  max_attempts: 3
  patience: 1h30m
""",
    )
    model = job.model
    assert (job.name, model.waterfall, model.enrichments, model.email_verifier) == (
        "leads",
        "email_getter",
        [833, 966],
        10,
    )
    assert (job.input.separator, job.input.encoding) == (";", "cp1252")
    assert (job.output.separator, job.output.encoding) == ("\t", "utf-16")
    assert {name: param.columns for name, param in model.params.items()} == {
        "first_name": ["First Name"],
        "last_name": ["Last Name"],
        "company": ["Website", "Email"],
        "city": ["City", "Town"],
        "country": [],
    }
    assert model.params["company"].transform == ["trim", "lower", "domain"]
    assert model.params["country"].value == "US"
    assert model.columns == {"work_email": "email"}
    assert (model.only_if_empty, model.dedupe) == (["Email"], False)
    assert (model.limits.requests_per_second, model.limits.in_flight, job.max_credits) == (20, 200, 500.5)
    assert model.policy.refresh.found == timedelta(days=90)
    assert model.policy.patience == timedelta(hours=1, minutes=30)


def test_defaults(tmp_path: Path) -> None:
    """The shortest job file has five lines; all other keys have defaults."""
    job = load_job_text(tmp_path, BASE_JOB, name="Leads of May.yaml")
    model = job.model
    assert job.name == "Leads of May"
    assert job.input_path == tmp_path / "leads.csv"
    assert job.output_path(datetime(2026, 11, 1).astimezone()) == tmp_path / "leads_enriched.csv"
    assert job.ledger == tmp_path / ".enrich/Leads of May.db"
    assert (job.input.separator, job.input.encoding, job.output.separator, job.output.encoding) == (",", "utf-8") * 2
    assert (model.enrichments, model.email_verifier, model.columns, model.where) == (None, None, None, None)
    assert (model.only_if_empty, model.dedupe) == ([], True)
    assert (model.limits.requests_per_second, model.limits.in_flight, job.max_credits) == (None, None, None)
    assert (model.policy.result_ttl, model.policy.patience) == (timedelta(hours=24), timedelta(hours=1))
    assert (model.policy.max_attempts, model.policy.refresh.found, model.policy.refresh.not_found) == (3, None, None)


TEXT_HINT = "hint: remove the escape, or write the character itself"
NUMBER_HINT = "hint: write numbers in plain digits, such as 1000 or 0.5, and put text in quotes"


@in_turn(
    ("word", "kind"),
    [
        ("NO", "a boolean"),
        ("yes", "a boolean"),
        ("1.5", "a number"),
        ("1000", "a number"),
        ("null", "nothing"),
        ("~", "nothing"),
        ("2024-01-01", "a date"),
        ("2024-01-01 10:00:00", "a date"),
    ],
)
@in_turn(
    ("before", "key"),
    [
        ("  country:\n    value: ", "params.country.value"),
        ("  country:\n    column: ", "params.country.column"),
        ("  country:\n    column: [Country, ", "params.country.column.1"),
        ("  country: ", "params.country.column"),
        ("where: ", "where"),
        ("name: ", "name"),
        ("columns:\n  work_email: ", "columns.work_email"),
    ],
)
def test_ambiguous_yaml_values_need_quotes(tmp_path: Path, word: str, kind: str, before: str, key: str) -> None:
    """Values that YAML misreads (`no`, postcodes) are refused, and the message shows what to type."""
    if kind == "nothing" and key in {"where", "name"}:
        return  # keys that may be left out
    text = f"{BASE_JOB}{before}{word}{']' if '[' in before else ''}\n"
    line = len(text.splitlines())
    assert job_errors(tmp_path, text) == [f"{line}: {key}: must be text, but YAML reads it as {kind}: put it in quotes"]


@in_turn("number", ["1_000", "+5", "0x10", "0b11", "5_0.5", "1.0e+3", ".inf", "-.inf", ".NaN", "0500", "1:30"])
def test_unusual_yaml_numbers_are_refused(tmp_path: Path, number: str) -> None:
    """A number that is not written in plain digits is refused with what YAML reads."""
    for key in ("limits: {max_credits: ", "limits: {in_flight: ", "params: {first: {value: "):
        text = BASE_JOB.partition("params")[0] + f"{key}{number}{'}' * key.count('{')}\n"
        (message, hint) = job_errors(tmp_path, text)
        assert f": YAML reads `{number}` as " in f": {message}"
        assert hint == NUMBER_HINT


@in_turn(("number", "cap"), [("1000", 1000), ("0", 0), ("0.5", 0.5), (".5", 0.5), ("5.", 5), ("7.25", 7.25)])
def test_plain_yaml_numbers(tmp_path: Path, number: str, cap: float) -> None:
    """Plain digits, with decimals or without, are a number."""
    assert load_job_text(tmp_path, f"{BASE_JOB}limits: {{max_credits: {number}}}\n").max_credits == cap


def test_null_param_needs_quotes(tmp_path: Path) -> None:
    """A param without a value is null to YAML and must be quoted."""
    for before, key in [("  x:", "params.x.column"), ("  x:\n    value:", "params.x.value")]:
        (result,) = job_errors(tmp_path, f"{BASE_JOB}{before}\n")
        assert result.endswith(f"{key}: must be text, but YAML reads it as nothing: put it in quotes")


@in_turn("word", ["NO", "00501", "1.5", "null", "2024-01-01", "=", "!x", "*x", "&x"])
def test_quoted_values_are_text(tmp_path: Path, word: str) -> None:
    """Quoting, the message's remedy, makes the value text."""
    job = load_job_text(tmp_path, f"{BASE_JOB}  a: {{value: '{word}'}}\n  b: \"{word}\"\n")
    assert job.model.params["a"].value == word
    assert job.model.params["b"].columns == [word]


@in_turn(
    ("text", "expected"),
    [
        (
            "version: 1\n",
            [
                "1: input: is missing",
                "1: waterfall: is missing, set a `waterfall` or an `enrichment`",
                "1: params: is missing",
            ],
        ),
        (BASE_JOB.replace("version: 1\n", ""), ["1: version: is missing", "hint: begin the file with `version: 1`"]),
        (BASE_JOB.replace("version: 1", "version: 2"), ["1: version: must be 1"]),
        (BASE_JOB.replace("version: 1", "version: '1'"), ["1: version: must be 1"]),
        (f"{BASE_JOB}inputs: x\n", ["6: inputs: unknown key", "hint: did you mean `input`?"]),
        (f"{BASE_JOB}Where: x\n", ["6: Where: unknown key", "hint: did you mean `where`?"]),
        (f"{BASE_JOB}zzz: 1\n", ["6: zzz: unknown key"]),
        (f"{BASE_JOB}max_credits: 1\n", ["6: max_credits: unknown key", "hint: it is a key of `limits`"]),
        (f"{BASE_JOB}found: 90d\n", ["6: found: unknown key", "hint: it is a key of `policy.refresh`"]),
        (f"{BASE_JOB}limits:\n  in_flght: 3\n", ["7: limits.in_flght: unknown key", "hint: did you mean `in_flight`?"]),
        (f"{BASE_JOB}policy:\n  patence: 3h\n", ["7: policy.patence: unknown key", "hint: did you mean `patience`?"]),
        (f"{BASE_JOB}dispatch:\n  buk: 5\n", ["7: dispatch.buk: unknown key", "hint: did you mean `bulk`?"]),
        (
            f"{BASE_JOB}policy:\n  refresh:\n    foud: 3d\n",
            ["8: policy.refresh.foud: unknown key", "hint: did you mean `found`?"],
        ),
        (f"{BASE_JOB}  x:\n    colum: A\n", ["7: params.x.colum: unknown key", "hint: did you mean `column`?"]),
        (f"{BASE_JOB}  str: {{colum: A}}\n", ["6: params.str.colum: unknown key", "hint: did you mean `column`?"]),
        (f"{BASE_JOB}  x: {{columns: A}}\n", ["6: params.x.columns: unknown key", "hint: did you mean `column`?"]),
        (
            f"{BASE_JOB}output:\n  paht: x.csv\n",
            ["7: output.paht: unknown key", "hint: did you mean `path`?"],
        ),
        (
            BASE_JOB.replace("leads.csv", "{path: a.csv, seperator: ;}"),
            ["2: input.seperator: unknown key", "hint: did you mean `separator`?"],
        ),
        (f"{BASE_JOB}  x: {{}}\n", ["6: params.x: needs either `column` or `value`"]),
        (f"{BASE_JOB}  x: {{column: A, value: b}}\n", ["6: params.x: needs either `column` or `value`"]),
        (f"{BASE_JOB}  x: {{value: b, transform: [trim]}}\n", ["6: params.x: a constant `value` has no `transform`"]),
        (f"{BASE_JOB}  x: {{column: A, transform: trim}}\n", ["6: params.x.transform: must be a list: [...]"]),
        (
            f"{BASE_JOB}  x: {{column: A, transform: [trimm]}}\n",
            ["6: params.x.transform.0: must be 'trim', 'lower', 'domain' or 'host'", "hint: did you mean `trim`?"],
        ),
        (f"{BASE_JOB}  x: []\n", ["6: params.x.column: must not be empty"]),
        (f"{BASE_JOB}  x: ''\n", ["6: params.x.column.0: must not be empty"]),
        (f"{BASE_JOB}  x: {{value: ''}}\n", ["6: params.x.value: must not be empty"]),
        (BASE_JOB.replace(":\n  company: Company", ": {}"), ["4: params: must not be empty"]),
        (BASE_JOB.replace(":\n  company: Company", ":"), ["4: params: must be a mapping of keys"]),
        (BASE_JOB.replace("company: Company", "- company"), ["4: params: must be a mapping of keys"]),
        (f"{BASE_JOB}columns: [email]\n", ["6: columns: must be a mapping of keys"]),
        (f"{BASE_JOB}columns: {{}}\n", ["6: columns: must not be empty"]),
        (f"{BASE_JOB}limits:\n", ["6: limits: must be a mapping of keys"]),
        (f"{BASE_JOB}only_if_empty: Email\n", ["6: only_if_empty: must be a list: [...]"]),
        (f"{BASE_JOB}enrichments: []\n", ["6: enrichments: must not be empty"]),
        (f"{BASE_JOB}enrichments:\n  - 833\n  - '966'\n", ["8: enrichments.1: must be a whole number"]),
        (f"{BASE_JOB}email_verifier: '10'\n", ["6: email_verifier: must be a whole number"]),
        (f"{BASE_JOB}dedupe: 'no'\n", ["6: dedupe: must be true or false"]),
        (
            f"{BASE_JOB}name: a/b\n",
            ["6: name: must have only letters, digits and . _ -, and begin with a letter or digit"],
        ),
        (
            BASE_JOB.replace("leads.csv", "[leads.csv]"),
            [
                "2: input: must be one path, not a list",
                "hint: for several files: a folder, or a pattern such as leads/*.csv",
            ],
        ),
        (f"{BASE_JOB}output: [a.csv]\n", ["6: output: must be one path, not a list"]),
        (
            f"{BASE_JOB}policy: {{max_attempts: {'9' * 5000}}}\n",
            ["6: a number of 5,000 characters", "hint: put it in quotes if it is text"],
        ),
        (f"{BASE_JOB}limits: {{in_flight: 0}}\n", ["6: limits.in_flight: must be at least 1"]),
        (
            f"{BASE_JOB}limits: {{requests_per_second: 0}}\n",
            ["6: limits.requests_per_second: must be above 0"],
        ),
        (
            f"{BASE_JOB}limits: {{requests_per_second: .inf}}\n",
            ["6: YAML reads `.inf` as inf", NUMBER_HINT],
        ),
        (f"{BASE_JOB}limits: {{max_credits: '5'}}\n", ["6: limits.max_credits: must be a number of credits"]),
        (f"{BASE_JOB}limits: {{max_credits: yes}}\n", ["6: limits.max_credits: must be a number of credits"]),
        (
            f"{BASE_JOB}limits: {{max_credits: -1}}\n",
            ["6: limits.max_credits: must be at least 0"],
        ),
        (
            f"{BASE_JOB}limits: {{max_credits: .nan}}\n",
            ["6: YAML reads `.nan` as nan", NUMBER_HINT],
        ),
        (
            f"{BASE_JOB}limits: {{max_credits: 1e+13}}\n",
            ["6: limits.max_credits: must be a number of credits"],
        ),
        (
            f"{BASE_JOB}policy: {{max_attempts: 0}}\n",
            ["6: policy.max_attempts: must be at least 1"],
        ),
        (
            f"{BASE_JOB}policy: {{patience: 60}}\n",
            ["6: policy.patience: a duration is a number with its unit: 90d, 24h, 30m or 45s"],
        ),
        *(
            (
                f"{BASE_JOB}policy: {{patience: {days}d}}\n",
                ["6: policy.patience: this duration is too long: at most 100000d"],
            )
            for days in (9**20, 100_001)
        ),
        (
            BASE_JOB.replace("leads.csv", '{path: a.csv, separator: ";;"}'),
            ['2: input.separator: must be one character, such as "," or ";" or "\\t", and not a quote or line end'],
        ),
        (
            f"{BASE_JOB}output: {{path: a.csv, separator: '\"'}}\n",
            ['6: output.separator: must be one character, such as "," or ";" or "\\t", and not a quote or line end'],
        ),
        (
            f"{BASE_JOB}output: {{path: a.csv, encoding: utf9}}\n",
            ["6: output.encoding: unknown encoding: use a name such as utf-8, cp1252 or utf-16"],
        ),
        (
            BASE_JOB.replace("leads.csv", "{path: a.csv, encoding: base64}"),
            ["2: input.encoding: unknown encoding: use a name such as utf-8, cp1252 or utf-16"],
        ),
        (
            f"{BASE_JOB}output: out.xls\n",
            [
                "6: output: `out.xls` has an unsupported file type",
                "hint: use .csv, .csv.gz, .tsv, .tsv.gz, .jsonl, .jsonl.gz, .parquet, .xlsx; for a folder: leads/",
            ],
        ),
        (
            f"{BASE_JOB}output: out.parquet/\n",
            ["6: output: `out.parquet/`: a folder must not have a file extension", "hint: as in out/leads/"],
        ),
        (
            f"{BASE_JOB}output: {{path: a.csv, encoding: idna}}\n",
            ["6: output.encoding: unknown encoding: use a name such as utf-8, cp1252 or utf-16"],
        ),
        (
            f"{BASE_JOB}output: {{path: a.csv, encoding: punycode}}\n",
            ["6: output.encoding: unknown encoding: use a name such as utf-8, cp1252 or utf-16"],
        ),
        (
            f"{BASE_JOB}output: {{path: a.csv, encoding: unicode_escape}}\n",
            ["6: output.encoding: unknown encoding: use a name such as utf-8, cp1252 or utf-16"],
        ),
        (
            f"{BASE_JOB}output: {{path: a.csv, encoding: RAW-unicode-escape}}\n",
            ["6: output.encoding: unknown encoding: use a name such as utf-8, cp1252 or utf-16"],
        ),
        (
            f"{BASE_JOB}output: {{path: a.csv, encoding: latin-1, separator: €}}\n",
            ["6: output: `separator` has no code in the encoding latin-1"],
        ),
        (
            f"{BASE_JOB}rejects: {{path: a.csv, encoding: ascii, separator: §}}\n",
            ["6: rejects: `separator` has no code in the encoding ascii"],
        ),
        (BASE_JOB.replace("leads.csv", '"a\\0.csv"'), ["2: has a NUL character", TEXT_HINT]),
        (f'{BASE_JOB}columns: {{"a\\0b": email}}\n', ["6: has a NUL character", TEXT_HINT]),
        (f'{BASE_JOB}  "a\\ud800": Company\n', ["6: has half a character (\\ud800)", TEXT_HINT]),
        (f'{BASE_JOB}  x: {{value: "a\\uDC0Ab"}}\n', ["6: has half a character (\\udc0a)", TEXT_HINT]),
        (f"{BASE_JOB}where:\n  \"First = '\\ud83d\\ude00'\"\n", ["7: has half a character (\\ud83d)", TEXT_HINT]),
        (f'{BASE_JOB}blanks: [x, "\\ud800"]\n', ["6: has half a character (\\ud800)", TEXT_HINT]),
        (f'{BASE_JOB}output: "a\\uD800.csv"\n', ["6: has half a character (\\ud800)", TEXT_HINT]),
        (BASE_JOB.replace("version: 1", "version: true"), ["1: version: must be a whole number"]),
        (BASE_JOB.replace("version: 1", "version: 1.0"), ["1: version: must be a whole number"]),
        (
            f"{BASE_JOB}limits: {{max_credits: 0500}}\n",
            [
                "6: YAML reads `0500` as 320",
                NUMBER_HINT,
            ],
        ),
        (
            f"{BASE_JOB}limits: {{max_credits: 1:30}}\n",
            [
                "6: YAML reads `1:30` as 90",
                NUMBER_HINT,
            ],
        ),
        (
            f"{BASE_JOB}  zip: 00501\n",
            [
                "6: YAML reads `00501` as 321",
                NUMBER_HINT,
            ],
        ),
        (BASE_JOB.replace("email_getter", "../x"), ["3: waterfall: must be an identifier such as email_getter"]),
        (BASE_JOB.replace("email_getter", "a?b=1"), ["3: waterfall: must be an identifier such as email_getter"]),
        (f"{BASE_JOB}waterfall: x\n", ["6: `waterfall` is set twice", "hint: remove one of the two"]),
        (f"{BASE_JOB}  company: B\n", ["6: `company` is set twice", "hint: remove one of the two"]),
        (f"{BASE_JOB}  x: {{column: A, column: B}}\n", ["6: `column` is set twice", "hint: remove one of the two"]),
        (f"{BASE_JOB}where: &a x\nname: *a\n", ["7: YAML aliases (*a) are not allowed: write the value out"]),
        (f"{BASE_JOB}  <<: {{a: A}}\n", None),
        (f"{BASE_JOB}? [a]\n: 1\n", ["6: a key must be text", "hint: put a text with { or [ in quotes"]),
        (f"{BASE_JOB}where: !!python/name:os.system x\n", None),
        (
            f"{BASE_JOB}where: 2024-13-45\n",
            ["6: `2024-13-45` is not a valid timestamp", "hint: put it in quotes if it is text"],
        ),
        (
            f"{BASE_JOB}where: !!timestamp x\n",
            ["6: `x` is not a valid timestamp", "hint: put it in quotes if it is text"],
        ),
        (f"{BASE_JOB}where: !!bool x\n", ["6: `x` is not a valid bool", "hint: put it in quotes if it is text"]),
        (
            f"{BASE_JOB}output: %Y.csv\n",
            ["6: found character '%' that cannot start any token", "hint: put it in quotes if it is text"],
        ),
        (
            f"{BASE_JOB}suppress: *.txt\n",
            ["6: expected alphabetic or numeric character, but found '.'", "hint: put it in quotes if it is text"],
        ),
        (f"{BASE_JOB}---\n{BASE_JOB}", ["6: but found another document"]),
        (
            "version: 1\n\tinput: x\n",
            ["2: found character '\\t' that cannot start any token", "hint: indent with blanks"],
        ),
        (
            "version: 1\ninput: [a\nwaterfall: b\n",
            [
                "3: expected ',' or ']', but got ':'",
                "hint: close the bracket of line 2, and put commas between its items",
            ],
        ),
        ("version: 1\ninput: 'a\nwaterfall: b\n", ["2: found unexpected end of stream", "hint: close the quote"]),
        (
            "version: 1\ninput a.csv\nwaterfall: b\n",
            ["2: could not find expected ':'", "hint: put a colon and a blank after the key"],
        ),
        (
            "version: 1\nparams\n  a: A\n",
            ["2: could not find expected ':'", "hint: put a colon and a blank after the key"],
        ),
        (
            'version: 1\ninput: "C:\\leads.csv"\n',
            ["2: found unknown escape character 'l'", "hint: put it in single quotes, where \\ is no escape"],
        ),
        ("version: 1\nparams: {a: {{A}}}\n", ["2: a key must be text", "hint: put a text with { or [ in quotes"]),
        ("version: 1\nname: \x01\n", None),
        ("", [" a job file must be a mapping of keys", "hint: create one: enrich init CSV"]),
        ("# nothing\n", [" a job file must be a mapping of keys", "hint: create one: enrich init CSV"]),
        ("- version: 1\n", [" a job file must be a mapping of keys", "hint: create one: enrich init CSV"]),
        ("version 1", [" a job file must be a mapping of keys", "hint: create one: enrich init CSV"]),
        ("name: Größe".encode("cp1252"), [" the job file is not UTF-8 text", "hint: save it as UTF-8"]),
    ],
)
def test_error_names_line_and_suggestion(tmp_path: Path, text: str | bytes, expected: list[str] | None) -> None:
    """An error names file, line, key and, where there is one, the nearest valid name."""
    found = job_errors(tmp_path, text)
    assert found == expected if expected is not None else found


@pytest.mark.parametrize("text", [b"Vorname;Nachname\nS\xf6ren;Wei\xdf\n", b"First Name\nAda\n"])
def test_csv_as_job_file(tmp_path: Path, text: bytes) -> None:
    """A CSV given as a job file gives the command that makes a job of it, ready to run."""
    path = tmp_path / "my leads.csv"
    path.write_bytes(text)
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert caught.value.hint == f"JOB must be a YAML file. To create one: enrich init '{path}'"


def test_ledger_as_job_file(tmp_path: Path) -> None:
    """A ledger given as a job file gives no command that would read it as leads."""
    path = tmp_path / "leads.db"
    path.write_bytes(b"SQLite format 3\0\xff")
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert caught.value.hint == "JOB must be the job file, not its ledger"


def test_all_errors_are_listed(tmp_path: Path) -> None:
    """All errors are listed at once in line order, each with its own nearest name."""
    text = """\
version: 2
input: {pth: leads.csv}
output: 5
waterfall: email_getter
params:
  company: {colum: Company}
  country: NO
limits:
  in_fligth: 3
  in_flight: 0
policy:
  refresh: {foud: 3d}
  result_ttl: 24
were: x
"""
    assert job_errors(tmp_path, text) == [
        "1: version: must be 1",
        "2: input.pth: unknown key, did you mean `path`?",
        "3: output: must be a mapping of keys",
        "6: params.company.colum: unknown key, did you mean `column`?",
        "7: params.country.column: must be text, but YAML reads it as a boolean: put it in quotes",
        "9: limits.in_fligth: unknown key, did you mean `in_flight`?",
        "10: limits.in_flight: must be at least 1",
        "12: policy.refresh.foud: unknown key, did you mean `found`?",
        "13: policy.result_ttl: a duration is a number with its unit: 90d, 24h, 30m or 45s",
        "14: were: unknown key, did you mean `where`?",
    ]


@in_turn(
    "text",
    [
        "api_key: SECRET\n" + BASE_JOB,
        BASE_JOB + "api_key: SECRET\nwhere: 5\n",
        BASE_JOB + "limits: {api_key: SECRET}\n",
        BASE_JOB + "databar_api_key: SECRET\n",
        BASE_JOB + "api_key: SECRET\napi_key: SECRET\n",
        BASE_JOB + "input: {path: x, api_key: SECRET}\n",
        BASE_JOB + "api_key: {key: SECRET}\n",
        BASE_JOB + "api_key: [SECRET\n",
    ],
)
def test_api_key_in_job_is_refused(tmp_path: Path, text: str) -> None:
    """An API key in a job file is refused, because job files are shared; the message shows where it belongs."""
    with pytest.raises(JobError) as caught:
        load_job_text(tmp_path, text)
    assert "SECRET" not in f"{caught.value.message}{caught.value.hint}"
    if text.startswith("api_key"):
        assert caught.value.message.endswith("job.yaml:1: api_key: the API key does not belong in the job file")
        assert "DATABAR_API_KEY" in (caught.value.hint or "")
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_missing_job_file(tmp_path: Path) -> None:
    """A missing job file or a folder in its place is an error."""
    with pytest.raises(JobError, match="the job file does not exist"):
        load_job(tmp_path / "none.yaml")
    with pytest.raises(JobError, match="cannot be read: Is a directory"):
        load_job(tmp_path)


@in_turn(
    "text",
    [
        "\ufeff" + BASE_JOB,
        BASE_JOB.replace("\n", "\r\n"),
        "---\n" + BASE_JOB,
        BASE_JOB + "...\n",
        BASE_JOB.rstrip("\n"),
    ],
)
def test_file_encodings_and_line_ends(tmp_path: Path, text: str) -> None:
    """A byte order mark, Windows line ends and YAML document markers are accepted."""
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode())
    assert load_job(path).model == load_job_text(tmp_path, BASE_JOB).model


def test_keys_are_text(tmp_path: Path) -> None:
    """Keys are text, such as a param `no` or a column 2024, whatever type YAML gives them."""
    job = load_job_text(tmp_path, f"{BASE_JOB}  NO: A\n  1: B\n  2024-01-01: C\ncolumns: {{null: email, 1.0: name}}\n")
    assert list(job.model.params) == ["company", "NO", "1", "2024-01-01"]
    assert job.model.columns == {"null": "email", "1.0": "name"}


def test_path_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are resolved against the job file's folder, because cron starts in the home folder."""
    other_server = tmp_path / "elsewhere"
    other_server.mkdir()
    monkeypatch.chdir(other_server)
    text = BASE_JOB.replace("leads.csv", "../in/leads.csv") + "output: ../out/x.csv\nledger: ../state/x.db\n"
    now = datetime(2026, 11, 1).astimezone()

    job = load_job_text(tmp_path, text, name="jobs/job.yaml")
    assert (job.input_path, job.output_path(now), job.ledger) == (
        tmp_path / "in/leads.csv",
        tmp_path / "out/x.csv",
        tmp_path / "state/x.db",
    )
    result = Overrides(input=Path("a.csv"), output=Path("b/c.parquet"), ledger=Path("../d.db"))
    job = load_job_text(tmp_path, text, result, name="jobs/job.yaml")
    monkeypatch.chdir(tmp_path)
    assert (job.input_path, job.output_path(now)) == (other_server / "a.csv", other_server / "b/c.parquet")
    assert isinstance(job.ledger, Path)
    assert job.ledger.resolve() == tmp_path / "d.db"
    absolute = load_job_text(tmp_path, f"{BASE_JOB}output: {tmp_path}/o.csv\n", Overrides(input=tmp_path / "i.csv"))
    assert (absolute.input_path, absolute.output_path(now)) == (tmp_path / "i.csv", tmp_path / "o.csv")


def test_relative_job_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's paths stay the same when the working directory changes later."""
    load_job_text(tmp_path, BASE_JOB, name="jobs/job.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_job(Path("jobs/job.yaml")).input_path == tmp_path / "jobs/leads.csv"


@in_turn(
    ("output", "name"),
    [
        ("leads-%Y-%m-%d.csv", "leads-2026-11-01.csv"),
        ("'%Y/%H%M.parquet'", "2026/0930.parquet"),
        ("100%%.csv.gz", "100%.csv.gz"),
        ("plain.CSV", "plain.CSV"),
    ],
)
def test_date_in_output_name(tmp_path: Path, output: str, name: str) -> None:
    """Codes of strftime are filled in with local time, in folders too; a % in the job's own folder is no code."""
    home = tmp_path / "50%Y off"
    job = load_job_text(home, f"{BASE_JOB}output: {output}\n")
    assert job.output_path(datetime(2026, 11, 1, 9, 30).astimezone()) == home / name


@in_turn(
    ("leads", "name"),
    [
        ("leads.csv", "leads_enriched.csv"),
        ("leads.csv.gz", "leads_enriched.csv"),
        ("leads.tsv", "leads_enriched.csv"),
        ("leads", "leads_enriched.csv"),
        ("may.2026.csv", "may.2026_enriched.csv"),
        ("in/100%Y.csv", "100%Y_enriched.csv"),
    ],
)
def test_default_output_name(tmp_path: Path, leads: str, name: str) -> None:
    """The default output lies beside the job file; a % in the input's name is no date code."""
    now = datetime(2026, 11, 1).astimezone()
    assert load_job_text(tmp_path, BASE_JOB.replace("leads.csv", leads)).output_path(now) == tmp_path / name
    assert load_job_text(tmp_path, BASE_JOB, Overrides(input=Path(leads))).output_path(now) == tmp_path / name


def test_ledger_is_no_folder(tmp_path: Path) -> None:
    """A folder as ledger keeps its name in a sandbox run, whose ledger would be outside the folder."""
    path = tmp_path / "job.yaml"
    path.write_text(f"{BASE_JOB}ledger: .\n", encoding="utf-8")
    assert load_job(path, Overrides(sandbox=True)).ledger == tmp_path


def test_sandbox_ledger_path(tmp_path: Path) -> None:
    """The sandbox has a ledger of its own, so its answers are never mixed with paid ones."""
    sandbox = Overrides(sandbox=True)
    assert load_job_text(tmp_path, BASE_JOB, sandbox).ledger == tmp_path / ".enrich/job.sandbox.db"
    assert load_job_text(tmp_path, f"{BASE_JOB}name: leads\n", sandbox).ledger == tmp_path / ".enrich/leads.sandbox.db"
    assert load_job_text(tmp_path, f"{BASE_JOB}ledger: a.db\n", sandbox).ledger == tmp_path / "a.sandbox.db"


def test_command_line_cap_overrides(tmp_path: Path) -> None:
    """The cap from the command line is a number of credits; no value means "no cap" by mistake."""
    text = f"{BASE_JOB}limits: {{max_credits: 5}}\n"
    assert load_job_text(tmp_path, text).max_credits == 5
    assert load_job_text(tmp_path, text, Overrides(max_credits=0)).max_credits == 0
    assert load_job_text(tmp_path, text, Overrides(max_credits=7.5)).max_credits == 7.5
    for invalid_cap in (float("nan"), float("inf"), -1.0, 1e13):
        with pytest.raises(JobError, match="--max-credits"):
            load_job_text(tmp_path, text, Overrides(max_credits=invalid_cap))


@in_turn(
    ("text", "seconds"),
    [
        ("45s", 45),
        ("30m", 1800),
        ("24h", 86_400),
        ("90d", 7_776_000),
        ("1h30m", 5400),
        ("1d 2h 3m 4s", 93_784),
        ("0s", 0),
    ],
)
def test_duration_syntax(text: str, seconds: int) -> None:
    """Units follow each other from the longest to the shortest."""
    assert parse_duration(text) == timedelta(seconds=seconds)


@in_turn(
    "odd",
    ["", " ", "5", 5, 1.5, None, True, "h", "٣h", "1_0h", "+1h", "-1h", "1.5h", "1h1h", "30m1h", "1 hour", "1w", "24H"],
)
def test_invalid_durations(odd: object) -> None:
    """A number without a unit is refused: reading days as seconds could cost money."""
    with pytest.raises(ValueError, match="a duration is a number with its unit"):
        parse_duration(odd)


def test_line_of_every_key(tmp_path: Path) -> None:
    """Every key has a line; a missing key has the line of its nearest existing parent."""
    job = load_job_text(tmp_path, f"{BASE_JOB}  x:\n    column:\n      - A\n      - B\nwhere: a\n")
    line = job.document.line_of
    assert [line(["version"]), line(["params"]), line(["params", "company"]), line(["where"])] == [1, 4, 5, 10]
    assert [line(["params", "x", "column", 1]), line(["params", "x", "column", 7]), line(["params", "x", "value"])] == [
        9,
        7,
        6,
    ]
    assert [line([]), line(["columns", "email"])] == [1, 1]
    error = job.error(["params", "x", "column", 0], "said", "do this")
    assert error.message == f"{tmp_path}/job.yaml:8: params.x.column.0: said"
    assert error.hint == "do this"


def test_nearest_name_suggestion() -> None:
    """A close name is suggested, or all names when they are few."""
    assert suggest_name("first name", ["First Name", "Last Name"]) == "did you mean `First Name`?"
    assert suggest_name("E-Mail", ["email", "phone"]) == "did you mean `email`?"
    assert suggest_name("zzz", ["email", "phone"]) == "known: email, phone"
    assert suggest_name("zzz", [f"column {number}" for number in range(13)]) is None
    assert suggest_name("zzz", []) is None


def test_schema_accepts_short_forms() -> None:
    """The JSON Schema accepts the short forms that the program accepts."""
    schema = json_schema()
    text, several = {"type": "string", "minLength": 1}, {"type": "array"}
    definitions = schema["$defs"]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert [form["type"] for form in definitions["Param"]["anyOf"]] == ["string", "array", "object"]
    assert [form["type"] for form in definitions["Input"]["anyOf"]] == ["string", "object"]
    assert [form["type"] for form in definitions["Output"]["anyOf"]] == ["string", "object"]
    column = definitions["Param"]["anyOf"][-1]["properties"]["column"]["anyOf"]
    assert column[0] == text
    assert several.items() <= column[1].items()
    assert schema["required"] == ["version", "input"]
    assert schema["oneOf"] == [
        {"required": ["waterfall", "params"]},
        {"required": ["enrichment", "params"]},
        {"required": ["steps"]},
    ]
    assert schema["additionalProperties"] is False
    credits_ = definitions["Limits"]["properties"]["max_credits"]["anyOf"][0]
    assert (credits_["minimum"], credits_["type"]) == (0, "number")


def test_schema_is_deterministic() -> None:
    """The schema is deterministic, because it is kept in a file, and describes every key."""
    schema = json_schema()
    assert json.dumps(schema) == json.dumps(json_schema())
    assert json.loads(json.dumps(schema)) == schema
    for name, key in schema["properties"].items():
        assert key.get("description") or "$ref" in key or name == "version", name


@given(st.text() | st.text(alphabet="abc: -[]{}&*!|>'\"#%\n\t,?123", max_size=60))
def test_any_text_is_handled(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Any text gives a job or an error that names the file."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert caught.value.message.startswith(str(path))


def test_yaml_constructs_no_objects(tmp_path: Path) -> None:
    """YAML tags construct no objects: a job file can't run code."""
    path = tmp_path / "job.yaml"
    path.write_text("a: !!python/object/apply:os.system [echo]\n", encoding="utf-8")
    assert YamlDocument(path).data == {"a": ["echo"]}


@in_turn("encoding", ["no-such", "", "base64", "rot13", "locale", "undefined", "utf-8\0"])
def test_unknown_encoding(encoding: str) -> None:
    """A name that is no encoding of text is refused, so that no file is opened with it."""
    for model in (Input, Output):
        with pytest.raises(ValidationError, match="encoding"):
            model.model_validate({"path": "a.csv", "encoding": encoding})


@in_turn("separator", ["", ";;", "\\t", '"', "\n", "\r", "\0"])
def test_invalid_separators(separator: str) -> None:
    """Quotes and line ends are no valid separators, because they have their own meaning in CSV."""
    for model in (Input, Output):
        with pytest.raises(ValidationError, match="must be one character"):
            model.model_validate({"path": "a.csv", "separator": separator})


@in_turn(
    ("overrides", "message"),
    [
        (Overrides(output="out.xls"), "--output: `out.xls` has an unsupported file type"),
        (Overrides(output="s3://leads"), "--output: an object storage URL needs a bucket"),
        (Overrides(input="ftp://leads/a.csv"), "--input: `ftp://` is an unknown object storage"),
        (Overrides(ledger="s3://leads/a.db"), "--ledger: `s3://` cannot be used for a ledger"),
    ],
)
def test_error_in_an_option_names_it(tmp_path: Path, overrides: Overrides, message: str) -> None:
    """What the command line replaces is not an error of the job file, which has another value."""
    (tmp_path / "job.yaml").write_text(BASE_JOB)
    with pytest.raises(JobError) as caught:
        load_job(tmp_path / "job.yaml", overrides)
    assert caught.value.message.startswith(message)
    (tmp_path / "job.yaml").write_text(f"{BASE_JOB}output: a.xls\n")
    with pytest.raises(JobError, match=r"job.yaml:6: output: `a.xls` has"):
        load_job(tmp_path / "job.yaml", Overrides(ledger="a.db"))
