"""`enrich init`: makes a job file from a CSV that can be checked and run at once."""

from __future__ import annotations

import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import openpyxl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.commands.init import take_sample
from enrich.commands.init_columns import describe_column
from enrich.commands.init_template import JobDraft, Sample, render_job_file
from enrich.databar.description import DOCUMENTED_WATERFALLS
from enrich.files.text import TableFile
from enrich.job.document import yaml_scalar
from enrich.job.job import load_job
from enrich.job.spec import json_schema
from tests.support.cases import examples, first_quick, in_turn
from tests.support.workspace import SHORT_STARTUP_TIMEOUT, ProgramResult, SandboxApi, Workspace, make_leads

LEADS = Path(__file__).parents[2] / "sample_data" / "leads.csv"


@pytest.fixture
def sample_workspace(workspace: Workspace) -> Workspace:
    """Make a folder with the shipped sample leads and no job."""
    shutil.copy(LEADS, workspace.folder)
    workspace.job_file.unlink()
    return workspace


def test_init_check_run_with_sample(sample_workspace: Workspace) -> None:
    """init, check and run succeed without editing."""
    made = sample_workspace.run_in_process("init", "leads.csv", "--waterfall", "email_getter", "--sandbox")
    checked = sample_workspace.run_in_process("check", "leads.yaml", "--sandbox")
    ran = sample_workspace.run_in_process("run", "leads.yaml", "--sandbox", "--limit", "3", "--json")

    assert (made.exit_code, made.stdout) == (0, "")
    assert made.stderr == "Written: leads.yaml. Read it, then: enrich check leads.yaml\n"
    assert checked.exit_code == 0
    assert checked.stdout.startswith("ok: leads: 263 leads, 243 can be sent")
    assert (ran.exit_code, ran.json_output["submitted"], ran.json_output["failed"]) == (0, 3, 0)
    assert (sample_workspace.folder / "leads.yaml").stat().st_mode & 0o777 == 0o600


def test_match_confidence_is_shown(sample_workspace: Workspace) -> None:
    """Shows which headers and values each match is based on; new column names do not clash."""
    text = sample_workspace.run_in_process(
        "init", "leads.csv", "--waterfall", "email_getter", "--offline", "-o", "-"
    ).stdout

    assert "first_name: First Name # sure: by its header" in text
    assert re.search(r"company: \{column: \[Website, Email\], transform: \[domain\]\} # sure: .*web addresses", text)
    assert "found_email: email" in text
    assert "the public documentation of 2026-11" in text
    assert sorted(path.name for path in sample_workspace.folder.iterdir()) == ["leads.csv"]


def test_commented_keys_are_valid(sample_workspace: Workspace) -> None:
    """Every commented-out key is valid when the # is removed."""
    text = sample_workspace.run_in_process(
        "init", "leads.csv", "--waterfall", "email_getter", "--sandbox", "-o", "-"
    ).stdout
    usable = re.sub(r"^# (?=\w+: )(?!yaml|Email finder|More)", "", text, flags=re.MULTILINE)
    usable = re.sub(r"^# (limits|policy):$", r"\1:", usable, flags=re.MULTILINE)
    usable = re.sub(r"^#   (\w+:)", r"  \1", usable, flags=re.MULTILINE)
    (sample_workspace.folder / "job.yaml").write_text(usable, encoding="utf-8")

    model = load_job(sample_workspace.folder / "job.yaml").model

    offered = {
        "order_by",
        "caps",
        "canary",
        "suppress",
        "dispatch",
        "rejects",
        "changes",
        "metrics",
        "healthcheck",
        "notify",
    }
    assert offered <= model.model_fields_set
    assert model.limits.min_balance == 50
    assert model.email_verifier == 10


def test_param_without_column(workspace: Workspace) -> None:
    """The job file loads; check reports line, key and what to enter."""
    workspace.write_leads([["Ada", "Lovelace"]], header=["First Name", "Last Name"])
    made = workspace.run_in_process("init", "leads.csv", "--waterfall", "email_getter", "--offline")
    checked = workspace.run_in_process("check", "leads.yaml")

    assert made.exit_code == 0
    assert "REQUIRED: no matching column" in (workspace.folder / "leads.yaml").read_text(encoding="utf-8")
    assert checked.exit_code == 2
    assert re.search(r"leads.yaml:\d+: params.company: no column is set", checked.stderr)
    assert "write the name of the column" in checked.stderr


def test_existing_file_needs_force(sample_workspace: Workspace) -> None:
    """Keeps an existing job file without `--force`, as it may have been edited by hand."""
    edited = "# mine\nversion: 1\ninput: leads.csv\nparams: {first_name: [\n"
    (sample_workspace.folder / "leads.yaml").write_text(edited, encoding="utf-8")
    command = ("init", "leads.csv", "--waterfall", "email_getter", "--offline")

    refused = sample_workspace.run_in_process(*command)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert (sample_workspace.folder / "leads.yaml").read_text(encoding="utf-8") == edited
    assert sample_workspace.run_in_process(*command, "--force").exit_code == 0
    assert load_job(sample_workspace.folder / "leads.yaml").model.waterfall == "email_getter"


def test_force_replaces_the_target_of_a_link(sample_workspace: Workspace) -> None:
    """As with all files that are written: the job file stays where it is kept, and so does its input."""
    folder = sample_workspace.folder
    (folder / "kept").mkdir()
    (folder / "leads.yaml").symlink_to("kept/leads.yaml")
    command = ("init", "leads.csv", "--waterfall", "email_getter", "--offline", "--force")
    for _ in range(2):
        assert sample_workspace.run_in_process(*command).exit_code == 0
        assert (folder / "leads.yaml").is_symlink()
        assert (folder / "kept" / "leads.yaml").is_file()
        assert load_job(folder / "leads.yaml").input_path == folder / "leads.csv"


def test_force_replaces_only_job_files(sample_workspace: Workspace) -> None:
    """Keeps leads, ledgers, locks, reports and outputs even with `--force`; replaces a job file of any name."""
    folder = sample_workspace.folder
    others = {
        "leads.csv": (folder / "leads.csv").read_bytes(),
        "job.db": b"SQLite format 3\0version:",
        "job.db.lock": b"",
        "out.csv": b"version,input\n1,2\n",
        "job.yaml.gz": b"\x1f\x8b\x08",
        "compose.yaml": b"version: '3'\nservices: {}\n",
        "notes.yml": b"- call them\n",
    }
    command = ("init", "leads.csv", "--waterfall", "email_getter", "--offline", "--force", "-o")
    for name, content in others.items():
        (folder / name).write_bytes(content)
        result = sample_workspace.run_in_process(*command, name)
        assert (result.exit_code, "is not a job file" in result.stderr) == (2, True), result.stderr
        assert (folder / name).read_bytes() == content
    (folder / "nightly.job").write_text("version: 1\ninput: leads.csv\nwaterfall: x\n", encoding="utf-8")
    assert sample_workspace.run_in_process(*command, "nightly.job").exit_code == 0
    assert load_job(folder / "nightly.job").model.waterfall == "email_getter"


@pytest.mark.parametrize("edited", [None, "# mine\nversion: 1\ninput: leads.csv\n"], ids=["new", "old"])
def test_a_full_disk_leaves_the_job_file(sample_workspace: Workspace, edited: str | None) -> None:
    """A job file that cannot be written to its end leaves the old one, also with `--force`, or none."""
    target = sample_workspace.folder / "leads.yaml"
    if edited is not None:
        target.write_text(edited, encoding="utf-8")
    command = ("init", "leads.csv", "--waterfall", "email_getter", "--offline", "--force")
    result = sample_workspace.run_subprocess(*command, max_file_bytes=100)

    assert (result.exit_code, "cannot be written" in result.stderr) == (5, True), result.stderr
    assert (target.read_text(encoding="utf-8") if target.exists() else None) == edited


def test_matching_waterfalls_are_listed(workspace: Workspace) -> None:
    """Exits with 2 and lists matching waterfalls, the best first."""
    workspace.write_leads([["https://linkedin.example/in/ada"]], header=["LinkedIn"])
    result = workspace.run_in_process("init", "leads.csv", "--offline")

    assert (result.exit_code, result.stdout) == (2, "")
    listed = re.findall(r"^  (\w+)  +(\d) of (\d)", result.stderr, re.MULTILINE)
    assert {name for name, found, needed in listed if found == needed} == {"person_by_link", "phone_getter"}
    assert listed[-1][0] == "email_getter"
    assert "--waterfall ID" in result.stderr


def test_unknown_waterfall_suggestion(sample_workspace: Workspace) -> None:
    """Suggests a similar name."""
    result = sample_workspace.run_in_process("init", "leads.csv", "--waterfall", "email_geter", "--offline")
    assert result.exit_code == 2
    assert "did you mean `email_getter`?" in result.stderr


def test_api_is_queried_with_key(sample_workspace: Workspace, api: SandboxApi) -> None:
    """Names the queried API and the time in the job file."""
    text = sample_workspace.run_in_process(
        "init", "leads.csv", "--waterfall", "email_getter", "-o", "-", api=api
    ).stdout
    assert re.search(r"from the API at 127.0.0.1 on \d{4}-\d\d-\d\d", text)
    assert "833 Mailhound: 0.5 credits" in text


def test_documentation_replaces_unreachable_api(sample_workspace: Workspace) -> None:
    """Uses the documentation when the API is unreachable, and notes it on screen and in the job file."""
    unreachable_api = SandboxApi("http://127.0.0.1:9/v1", "key")
    with patch("enrich.run.run_state.Timeouts", lambda: SHORT_STARTUP_TIMEOUT):
        result = sample_workspace.run_in_process(
            "init", "leads.csv", "--waterfall", "email_getter", "-o", "-", api=unreachable_api
        )
    assert result.exit_code == 0
    assert "unreachable" in result.stderr
    assert "the public documentation" in result.stdout


def test_documentation_used_without_key(sample_workspace: Workspace) -> None:
    """Uses the documentation without a key, as new users have none."""
    result = sample_workspace.run_in_process("init", "leads.csv", "--waterfall", "person_getter", "-o", "-")
    assert result.exit_code == 0
    assert "no API key" in result.stderr
    assert "email: {column: Email, transform: [lower]}" in result.stdout


def test_schema_comment_only_if_present(sample_workspace: Workspace) -> None:
    """Adds the schema comment only if the file exists, so that editors report no missing file."""
    command = ("init", "leads.csv", "--waterfall", "email_getter", "--offline", "-o", "-")
    schema = sample_workspace.folder / "schema.json"
    assert "$schema" not in sample_workspace.run_in_process(*command).stdout
    schema.write_text("{}", encoding="utf-8")
    assert "$schema" not in sample_workspace.run_in_process(*command).stdout
    schema.write_text(sample_workspace.run_in_process("schema").stdout, encoding="utf-8")
    assert sample_workspace.run_in_process(*command).stdout.startswith("# yaml-language-server: $schema=schema.json\n")
    assert json_schema()


@pytest.mark.parametrize("separator", first_quick(2, [",", ";", "\t", "|"]))
@pytest.mark.parametrize("encoding", first_quick(2, ["utf-8", "utf-8-sig", "cp1252", "utf-16"]))
def test_separator_and_encoding_detected(workspace: Workspace, separator: str, encoding: str) -> None:
    """Detects separator and encoding as spreadsheets of many countries write them; the job reads the file unchanged."""
    rows = [["Vorname", "Nachname", "Firma, Ort", "Webseite"], ["Jürgen", "Groß", "Ä; B| C", "https://a.example"]]
    text = "\n".join(separator.join(f'"{cell}"' for cell in row) for row in rows)
    (workspace.folder / "leads.csv").write_text(text, encoding=encoding)

    made = workspace.run_in_process("init", "leads.csv", "--waterfall", "email_getter", "--offline", "--force")
    result = workspace.run_in_process("check", "leads.yaml")

    assert made.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.startswith("ok: leads: 1 lead, 1 can be sent")


def test_encoding_can_be_named(workspace: Workspace) -> None:
    """An encoding that is not detected is an error, whose option then reads the file."""
    text = "名,姓,会社名,ウェブサイト\n花子,鈴木,株式会社アクメ,https://acme.example\n"
    (workspace.folder / "leads.csv").write_text(text, encoding="cp932")
    init = ("init", "leads.csv", "--waterfall", "email_getter", "--offline")

    refused = workspace.run_in_process(*init)
    (workspace.folder / "western.csv").write_bytes("Имя,Website\nЮлия,a.example\n".encode("cp1251"))
    guessed = workspace.run_in_process("init", "western.csv", *init[2:], "-o", "-")
    unknown = workspace.run_in_process(*init, "--encoding", "shift")
    made = workspace.run_in_process(*init, "--encoding", "cp932")
    checked = workspace.run_in_process("check", "leads.yaml")

    assert refused.exit_code == 5
    assert "error: leads.csv is not UTF-8 or cp1252 text\nhint: name the encoding" in refused.stderr
    assert "encoding: cp1252} # guessed from the file; if letters are wrong, name it with --encoding" in guessed.stdout
    assert (unknown.exit_code, "unknown encoding `shift`" in unknown.stderr) == (2, True)
    assert made.exit_code == 0
    assert (checked.exit_code, checked.stderr) == (0, "")
    assert "company ← ウェブサイト (domain)   1 of 1 filled" in checked.stdout


def test_sheet_can_be_named(workspace: Workspace) -> None:
    """The first sheet of a workbook may be a summary: the error lists the others, and the option reads one."""
    book = openpyxl.Workbook()
    summary, table = book.worksheets[0], book.create_sheet("Leads #1 2026")
    summary.append(["Exported by a spreadsheet"])
    summary["C2"] = "Sheet"
    for row in (["First Name", "Last Name", "Website"], ["Ada", "Byron", "https://engine.example"]):
        table.append(row)
    book.save(workspace.folder / "leads.xlsx")
    init = ("init", "leads.xlsx", "--waterfall", "email_getter", "--offline")

    refused = workspace.run_in_process(*init)
    listed = workspace.run_in_process("init", "leads.xlsx", "--offline", "--sheet", "Leads #1 2026")
    made = workspace.run_in_process(*init, "--sheet", "Leads #1 2026")
    checked = workspace.run_in_process("check", "leads.yaml")
    other = workspace.run_in_process("init", "leads.csv", "--sheet", "Leads #1 2026")

    assert (refused.exit_code, "Or choose another sheet: Leads #1 2026" in refused.stderr) == (5, True)
    assert "hint: enrich init leads.xlsx --sheet 'Leads #1 2026' --offline --waterfall ID" in listed.stderr
    assert made.exit_code == 0, made.stderr
    assert checked.stdout.startswith("ok: leads: 1 lead, 1 can be sent")
    assert (other.exit_code, "--sheet is for workbooks" in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a,b\n1,2,3\n", "has 3 cells, but the header has 2 columns"),
        (b"a,a\n1,2\n", "has duplicate column names"),
        (b'a,b\n"1,2\n', "never closed"),
        (b"PK\x03\x04rest", "Excel"),
        (None, "does not exist"),
    ],
)
def test_not_a_table_is_refused(workspace: Workspace, content: bytes | None, message: str) -> None:
    """Refuses a file that is not a table, with the run's message and exit 5."""
    if content is not None:
        (workspace.folder / "leads.csv").write_bytes(content)
    result = workspace.run_in_process("init", "leads.csv", "--waterfall", "email_getter", "--offline")
    assert result.exit_code == 5
    assert message in result.stderr


@in_turn(
    ("header", "is_one"),
    [
        ("FIRSTNAME,LASTNAME,ACCOUNT.NAME,Owner.Email", True),
        ("contact.first_name,account.name,account.website,user.id", True),
        ("Adalina,Bironella,Mobile,a.example", False),
        ("Adalina,Bironella,Firma,info@firma.example", False),
    ],
)
def test_names_with_dots(workspace: Workspace, header: str, *, is_one: bool) -> None:
    """`ACCOUNT.NAME` may be a domain: the first line is a header if other names are usual."""
    (workspace.folder / "leads.csv").write_text(f"{header}\na,b,c,d\n")
    result = workspace.run_in_process("init", "leads.csv", "--waterfall", "email_getter", "--offline", "--force")
    assert (result.exit_code, "has no header" in result.stderr) == ((0, False) if is_one else (5, True))


def test_job_in_other_folder(workspace: Workspace) -> None:
    """Writes paths relative to the job file."""
    workspace.write_leads(make_leads(2))
    made = workspace.run_in_process(
        "init", "leads.csv", "--waterfall", "email_getter", "--offline", "-o", "jobs/night.yaml"
    )
    assert made.exit_code == 0
    assert "input: ../leads.csv" in (workspace.folder / "jobs" / "night.yaml").read_text(encoding="utf-8")
    assert workspace.run_in_process("check", "jobs/night.yaml").exit_code == 0


def test_commands_for_names_starting_with_dash(workspace: Workspace) -> None:
    """The commands that the messages show work when pasted: no name in them is parsed as an option."""
    workspace.write_leads(make_leads(2), name="-leads.csv")

    def pasted(*arguments: str, intro: str) -> ProgramResult:
        result = workspace.run_in_process(*arguments)
        (line,) = (line for line in result.stderr.splitlines() if intro in line)
        return workspace.run_in_process(*line.partition(intro)[2].replace("ID", "email_getter").split())

    assert "create one: enrich init ./-leads.csv" in workspace.run_in_process("run", "--", "-leads.csv").stderr
    made = pasted("init", "--offline", "--", "-leads.csv", intro="hint: enrich ")
    assert (made.exit_code, "then: enrich check ./-leads.yaml" in made.stderr) == (0, True)
    checked = pasted(
        *("init", "./-leads.csv", "--offline", "--force", "--waterfall", "email_getter"), intro="then: enrich "
    )
    assert checked.exit_code == 0


def test_percent_sign_in_file_name(workspace: Workspace) -> None:
    """Escapes a percent sign of the input's name in the output's name."""
    workspace.write_leads(make_leads(1), name="100%d leads.csv")
    assert (
        workspace.run_in_process("init", "100%d leads.csv", "--waterfall", "email_getter", "--offline").exit_code == 0
    )
    job = load_job(workspace.folder / "100%d leads.yaml")

    assert job.output_path(datetime.now(UTC)).name == "100%d leads_enriched.csv"


@settings(deadline=None)
@given(st.text(min_size=1))
def test_yaml_scalars_roundtrip(text: str) -> None:
    """Writes any text as a YAML scalar on one line and reads it back unchanged."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return
    written = yaml_scalar(text)
    assert "\n" not in written
    assert yaml.safe_load(f"key: {written} # comment") == {"key": text}
    assert yaml.safe_load(f"key: [{written}, {written}]") == {"key": [text, text]}


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=10)


@pytest.mark.long
@settings(deadline=None, max_examples=examples(30))
@given(st.lists(NAMES | st.sampled_from(["Email", "Website"]), unique=True, min_size=1, max_size=5))
def test_any_header_makes_valid_job(tmp_path_factory: pytest.TempPathFactory, header: list[str]) -> None:
    """Any header gives valid YAML with the correct column name."""
    path = tmp_path_factory.getbasetemp() / "strange.yaml"
    sample = Sample(TableFile(Path("leads.csv"), ";", "utf-8"), [describe_column(name, ["x"]) for name in header], 1)
    for waterfall in DOCUMENTED_WATERFALLS.values():
        path.write_text(
            render_job_file(JobDraft(sample, waterfall, "nobody", "leads.csv", "out.csv")), encoding="utf-8"
        )
        model = load_job(path).model
        assert model.params
        assert all(set(param.columns) <= {*header, "FILL THIS IN"} for param in model.params.values())


def test_samples_first_rows_only(workspace: Workspace) -> None:
    """Reads only the first rows of a large file."""
    workspace.write_leads(make_leads(1_200))
    assert take_sample(workspace.folder / "leads.csv").rows == 1_000
