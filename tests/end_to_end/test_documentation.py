"""The documents are correct: their commands run as shown, and the names in them exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from msgspec import structs

from enrich.cli import cli
from enrich.job.job import load_job
from enrich.job.spec import SteppedJobModel
from enrich.job.target import SOURCES_KEY
from enrich.report.data import Report
from tests.support.cases import in_turn
from tests.support.documents import (
    ALL_DOCUMENTS,
    DOCUMENTS,
    ROOT,
    check_console,
    code_text,
    enrich_invocations,
    fenced_blocks,
    make_checkout,
    relative_links,
    run_shell,
)
from tests.support.message_texts import message_texts
from tests.support.reference_pages import GENERATED, PAGES, with_reference

each_document = in_turn("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT))


def keys_of_a_job() -> set[str]:
    """Return all keys of a job file, at any depth."""
    schema = SteppedJobModel.model_json_schema()
    models = [schema, *schema["$defs"].values()]
    return {key for model in models for key in model["properties"]} - {SOURCES_KEY}


def parse_command_line(arguments: list[str]) -> None:
    """Parse arguments as the command line does; raises click.UsageError for an unknown name, a missing argument."""
    command: click.Command = cli
    while isinstance(command, click.Group) and arguments:
        name, *arguments = arguments
        if name in ("-h", "--help", "--version"):
            return
        known = command.get_command(click.Context(command), name)
        if known is None:
            raise click.UsageError(f"there is no command {name}")
        command = known
    command.make_parser(click.Context(command)).parse_args(list(arguments))
    try:
        command.make_context(command.name, list(arguments))
    except click.MissingParameter:
        if arguments:  # without any, it is the name of the command
            raise
    except (click.exceptions.Exit, click.BadParameter):  # a help text; a word such as ROW for a value
        return


@pytest.mark.long
@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_console_blocks_match_output(document: Path, tmp_path: Path) -> None:
    """Every `$ command` runs in a fresh checkout, in the document's order, and prints the output below it."""
    shown = document.read_text(encoding="utf-8").count("\n$ ")
    assert check_console(document, make_checkout(tmp_path)) == shown


@pytest.mark.long
def test_python_blocks_run(tmp_path: Path) -> None:
    """The Python of the documents runs in a fresh checkout."""
    blocks = {document.name: fenced_blocks(document, "python") for document in DOCUMENTS}
    folder = make_checkout(tmp_path)
    for number, block in enumerate(block for blocks_of_one in blocks.values() for block in blocks_of_one):
        script = folder / f"block{number}.py"
        script.write_text(block, encoding="utf-8")
        run_shell(f"python {script}", folder)
    assert blocks["python.md"]


@each_document
def test_documented_jobs_load(document: Path, tmp_path: Path) -> None:
    """Every block with a whole job file is valid; partial ones have only existing keys."""
    for number, block in enumerate(fenced_blocks(document, "yaml")):
        if re.search(r"^version:", block, re.MULTILINE):
            path = tmp_path / f"job{number}.yaml"
            path.write_text(block, encoding="utf-8")
            load_job(path)
        elif isinstance(part := yaml.safe_load(block), dict) and "apiVersion" in part:
            parse_command_line(shlex.split(part["spec"]["entrypoint"])[1:])  # another program's file
        elif isinstance(part, dict):
            assert part.keys() <= SteppedJobModel.model_fields.keys()


def test_documents_name_one_key_file() -> None:
    """All documents use one path of the key file: that of `enrich cron`, which the README prints."""
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert len(set(re.findall(r"/etc/enrich/[\w.]*key\w*", text))) == 1


def test_shipped_jobs_load() -> None:
    """The jobs of the examples and of `jobs/` are valid."""
    jobs = [*(ROOT / "jobs").glob("*.yaml"), *(ROOT / "examples" / "jobs").glob("*.yaml")]
    assert len(jobs) >= 4
    for job in jobs:
        load_job(job)


def test_all_job_keys_are_documented() -> None:
    """The documents mention every key of the job file."""
    shown = "\n".join(map(code_text, DOCUMENTS))
    alone = {key for path in re.findall(r"^[\w.]+$", shown, re.MULTILINE) for key in path.split(".")}
    assert keys_of_a_job() - alone - set(re.findall(r"(\w+):", shown)) == set()


def test_all_keys_of_the_report_are_documented() -> None:
    """The page of the report names every key that `report --json` prints."""
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    keys = {field.encode_name for field in structs.fields(Report)} | {"exit_code", "cost_per_lead"}
    assert keys - set(re.findall(r"`(\w+)`", page)) == set()


@in_turn("page", PAGES)
def test_reference_pages_are_current(page: str) -> None:
    """The generated parts are those of the present commands and schema (`make reference` writes them)."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert GENERATED.search(text)
    assert text == with_reference(page)


@pytest.mark.long
def test_troubleshooting_quotes_the_source() -> None:
    """Each message of the troubleshooting page is a text of the source, and stands in one place."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| (?:`([^`]+)`|``(.+?) ?``) \|", page, re.MULTILINE)
    messages = [one or other for one, other in quoted]
    texts = [text for module in (ROOT / "enrich").rglob("*.py") for text in message_texts(module)]
    assert len(messages) > 50
    assert [message for message in messages if not any(message in text for text in texts)] == []
    assert len(messages) == len(set(messages))


def test_commands_in_messages_can_be_copied() -> None:
    """Each command in a message has its arguments: in backticks, or after a colon to the end. A bare name is a noun."""
    shown = re.compile(r"`enrich ([^`]+ [^`]+)`|(?:^\s*|: )enrich (.*\S)$", re.MULTILINE)
    wrong = []
    for module in (ROOT / "enrich").rglob("*.py"):
        for quoted, last in (found for text in message_texts(module) for found in shown.findall(text)):
            name, *arguments = re.sub(r"…|\{\w+\}", "JOB", quoted or last).split()
            try:
                if (command := cli.get_command(click.Context(cli), name)) is not None:
                    command.make_context(name, arguments)
            except click.UsageError as error:
                wrong.append(f"{module.name}: enrich {quoted or last}: {error.format_message()}")
    assert not wrong


@each_document
def test_documented_commands_exist(document: Path) -> None:
    """Every `enrich …` in a block or a sentence has an existing command and options."""
    wrong = []
    for arguments in enrich_invocations(code_text(document, GENERATED)):
        try:
            parse_command_line(arguments)
        except click.UsageError as error:
            wrong.append(f"enrich {' '.join(arguments)}: {error.format_message()}")
    assert not wrong


def test_unknown_commands_are_detected() -> None:
    """The check detects wrong commands and options in all forms that documents use."""
    shown = (
        "enrich rnu job\nX=y enrich run job --max-tiem 5h | tee x\n15 2 * * * K=/k /opt/bin/enrich ledger chekc J; ls"
    )
    found = list(enrich_invocations(shown))
    assert len(found) == 3
    for arguments in found:
        with pytest.raises(click.UsageError):
            parse_command_line(arguments)


@in_turn("document", ALL_DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    """Relative links point to existing files and headings."""
    for link in relative_links(document):
        name, _, heading = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
