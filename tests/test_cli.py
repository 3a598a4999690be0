"""The command line: every command, its help, its words on stdout and stderr."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import httpx
import pytest

from enrich import __version__
from enrich.cli import cli
from enrich.surroundings import Options
from tests.harness import Api, Office, people, serving, shown_on, usual_signals

COMMANDS = sorted(cli.commands)


def test_every_command_of_the_contract_that_is_built_is_there() -> None:
    """The commands people have in their scripts."""
    assert set(COMMANDS) >= {"run", "collect", "status", "waterfalls", "sandbox", "schema"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(office: Office, name: str) -> None:
    """`--help` says what the command does and what each option means; it needs nothing else."""
    done = office.command(name, "--help")

    assert (done.code, done.stderr) == (0, "")
    assert f"enrich {name}" in done.stdout
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert max(parameter.opts, key=len) in done.stdout


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_all_commands(office: Office, option: str) -> None:
    """The first page names every command, each with a line of its own."""
    done = office.command(option)

    assert done.code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name}\s+\S", done.stdout, re.MULTILINE)


def test_the_first_page_fits_a_terminal(office: Office) -> None:
    """No command's line is cut off at 80 columns."""
    assert "..." not in office.command("--help", COLUMNS="80").stdout.partition("Commands:")[2]


def test_the_version_is_told(office: Office) -> None:
    """`--version` for reports of bugs."""
    assert __version__ in office.command("--version").stdout


def test_without_a_command_the_help_comes_and_exit_2(office: Office) -> None:
    """Nothing asked is a wrong usage, but a helpful one."""
    done = office.command()

    assert done.code == 2
    assert "Commands:" in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["fly"], ["run", "job.yaml", "--fast"], ["status"], ["schema", "extra"]])
def test_an_unknown_word_is_exit_2(office: Office, arguments: list[str]) -> None:
    """The error names it and where help is, on stderr; stdout stays clean."""
    done = office.command(*arguments)

    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "--help" in done.stderr


@pytest.mark.parametrize("arguments", [["fly"], ["run", "job.yaml", "--fast"], ["status"], ["collect", "no.yaml"]])
def test_an_error_is_json_where_json_was_asked_for(office: Office, arguments: list[str]) -> None:
    """Scripts read one object, whatever happens."""
    done = office.command(*arguments, "--json")

    assert done.code == 2
    assert done.receipt.keys() == {"exit_code", "error"}
    assert done.receipt["exit_code"] == 2


def test_a_near_miss_of_an_option_is_told(office: Office) -> None:
    """A typing mistake gets the right word."""
    assert "--max-credits" in office.command("run", "job.yaml", "--max-credit", "5").stderr


def test_the_schema_is_json(office: Office) -> None:
    """`enrich schema` prints a JSON Schema that names every key of a job file with its meaning."""
    done = office.command("schema")

    schema = json.loads(done.stdout)
    assert (done.code, done.stderr) == (0, "")
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) >= {"version", "input", "output", "waterfall", "params", "limits", "policy"}
    assert schema["additionalProperties"] is False
    assert all("description" in value or "$ref" in value or "allOf" in value for value in schema["properties"].values())


# waterfalls


def test_the_waterfalls_are_listed(api: Api, office: Office) -> None:
    """One line each for a person, one list for a program."""
    text = office.command("waterfalls", api=api)
    listed = office.command("waterfalls", "--json", api=api)

    assert text.code == listed.code == 0
    known = [item["identifier"] for item in json.loads(listed.stdout)]
    assert [line.split()[0] for line in text.stdout.splitlines()] == known
    assert "email_getter" in text.stdout


def test_one_waterfall_is_shown_whole(api: Api, office: Office) -> None:
    """Params, fields, providers, verifiers and prices of the one that is asked for."""
    text = office.command("waterfalls", "email_getter", api=api)
    shown = office.command("waterfalls", "email_getter", "--json", api=api)

    for word in ("first_name", "required", "email", "833", "Mailhound", "0.5 credits", "only when named", "Mailproof"):
        assert word in text.stdout
    assert shown.receipt["available_enrichments"][0]["id"] == 833


def test_an_unknown_waterfall_gets_the_nearest_name(api: Api, office: Office) -> None:
    """Exit 2 and the name that was perhaps meant."""
    done = office.command("waterfalls", "email_geter", "--json", api=api)

    assert done.code == done.receipt["exit_code"] == 2
    assert "did you mean `email_getter`?" in done.stderr


def test_the_waterfalls_of_the_sandbox_need_no_key(office: Office) -> None:
    """`--sandbox` shows what can be tried."""
    done = office.command("waterfalls", "--sandbox")

    assert (done.code, done.stderr) == (0, "")
    assert "phone_getter" in done.stdout


def test_waterfalls_with_a_wrong_key_is_exit_3(api: Api, office: Office) -> None:
    """The same exit codes as everywhere."""
    assert office.command("waterfalls", api=Api(api.base_url, "wrong")).code == 3


# status


def test_status_tells_what_the_ledger_knows(tmp_path: Path, office: Office) -> None:
    """Counts, credits, what expires when and the past executions, with the names of the receipt."""
    office.write_leads(people(12))
    with serving(tmp_path / "api.db", latency="fixed(30)") as api:
        office.run(api, Options(max_time_s=3.0, limit=5))
        waiting = office.command("status", "job.yaml", "--json").receipt
        api.advance(60)
        receipt = office.run(api, Options(limit=0))

    assert (waiting["pending"], waiting["at_the_api"], waiting["credits_spent"]) == (12, 5, 0)
    assert waiting["next_expiry"] <= waiting["last_expiry"]
    status = office.command("status", "job.yaml", "--json").receipt
    assert (status["found"], status["not_found"], status["pending"]) == (receipt.found, receipt.not_found, 7)
    assert (status["requests"], status["at_the_api"], status["next_expiry"]) == (12, 0, None)
    assert status["credits_spent"] == receipt.credits_spent
    assert [run["exit_code"] for run in status["executions"]] == [0, 13]
    text = office.command("status", "job.yaml")
    assert (text.code, text.stderr) == (0, "")
    for word in ("job: 12 requests", "found", "pending", "credits", "execution"):
        assert word in text.stdout


def test_status_of_a_job_that_never_ran(office: Office) -> None:
    """No ledger is no error, and none is made by looking."""
    done = office.command("status", "job.yaml", "--json")

    assert (done.code, done.receipt["requests"], done.receipt["executions"]) == (0, 0, [])
    assert office.command("status", "job.yaml").code == 0
    assert not office.ledger_path.parent.exists()


def test_status_needs_neither_key_nor_network(api: Api, office: Office) -> None:
    """The ledger alone is asked, even while the API is away, and the sandbox's is another one."""
    office.write_leads(people(2))
    office.run(api)

    assert office.command("status", "job.yaml", "--json", DATABAR_BASE_URL="nonsense").receipt["requests"] == 2
    assert office.command("status", "job.yaml", "--json", "--sandbox").receipt["requests"] == 0


# collect


def test_collect_writes_the_output_from_the_ledger_alone(api: Api, office: Office) -> None:
    """The lost output comes back word for word, without key or network."""
    office.write_leads(people(9))
    office.run(api)
    path = office.folder / "out.csv"
    written = path.read_bytes()
    path.unlink()
    polls = api.audit()["requests"]

    done = office.command("collect", "job.yaml", "--json")

    assert (done.code, done.stderr) == (0, "")
    assert path.read_bytes() == written
    assert done.receipt["rows"] == 9
    assert done.receipt["output"] == str(path)
    assert api.audit()["requests"] == polls


def test_collect_refuses_an_output_with_holes(api: Api, office: Office) -> None:
    """Pending rows: exit 5 and the old file stays; `--partial` writes what is there."""
    office.write_leads(people(5))
    office.run(api, Options(limit=2))
    path = office.folder / "out.csv"
    path.write_text("old\n")

    refused = office.command("collect", "job.yaml", "--json")

    assert refused.code == refused.receipt["exit_code"] == 5
    assert "3 rows are pending" in refused.stderr
    assert "--partial" in refused.stderr
    assert path.read_text() == "old\n"
    partial = office.command("collect", "job.yaml", "--partial", "--json")
    assert (partial.code, partial.receipt["pending"]) == (0, 3)
    assert len(office.output()) == 5


def test_collect_before_any_run_is_exit_5(office: Office) -> None:
    """There is nothing to collect from, and no ledger is left behind."""
    office.write_leads(people(1))

    done = office.command("collect", "job.yaml", "--json")

    assert done.code == 5
    assert "never run" in done.stderr
    assert not office.ledger_path.exists()


def test_collect_takes_other_leads_and_another_output(api: Api, office: Office) -> None:
    """Answers that were bought serve any file that asks the same."""
    office.write_leads(people(5))
    office.run(api)
    office.write_leads(people(3), name="few.csv")

    done = office.command("collect", "job.yaml", "--input", "few.csv", "--output", "few_out.parquet", "--json")

    assert (done.code, done.receipt["rows"]) == (0, 3)
    assert (office.folder / "few_out.parquet").is_file()


# Paths on the command line


def test_paths_on_the_command_line_are_relative_to_the_working_directory(api: Api, office: Office) -> None:
    """The job file's own paths are relative to the job file, wherever the command is called from."""
    office.write_leads(people(2))
    elsewhere = Office(office.folder.parent)

    from_job = elsewhere.command("run", "office/job.yaml", "--json", api=api)
    from_here = elsewhere.command(
        *("run", "office/job.yaml", "--json", "--output", "here.csv", "--ledger", "here.db"), api=api
    )

    assert from_job.receipt["output"] == str(office.folder / "out.csv")
    assert from_here.receipt["output"] == str(elsewhere.folder / "here.csv")
    assert (elsewhere.folder / "here.db").is_file()


def test_a_key_file_and_the_config_of_databar_login_are_read(api: Api, office: Office) -> None:
    """The key may come from a file that cron may read, or from where `databar login` puts it."""
    office.write_leads(people(1))
    (office.folder / "key").write_text(f"{api.api_key}\n")
    url = api.base_url

    from_file = office.command("run", "job.yaml", "--json", DATABAR_BASE_URL=url, DATABAR_API_KEY_FILE="key")
    (office.folder / ".databar").mkdir()
    (office.folder / ".databar" / "config").write_text(f"api_key={api.api_key}\n")
    from_config = office.command("run", "job.yaml", "--json", DATABAR_BASE_URL=url, DATABAR_API_KEY="")

    assert from_file.code == from_config.code == 0


def test_a_user_without_a_home_is_no_bug(api: Api, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the user may have neither HOME nor an entry in passwd: with a key in a variable that is fine."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    office.write_leads(people(1))
    monkeypatch.setattr(Path, "home", homeless)

    assert office.command("run", "job.yaml", api=api).code == 0
    assert office.command("run", "job.yaml").code == 3


# The sandbox


@pytest.mark.long
def test_the_sandbox_says_how_to_use_it_in_two_lines(office: Office) -> None:
    """What it prints is all the environment that a run needs, and it ends without a word."""
    office.write_leads(people(3))
    process = office.start("sandbox")
    assert process.stdout is not None
    try:
        environ = dict(process.stdout.readline().strip().split("=", 1) for _ in range(2))
        assert list(environ) == ["DATABAR_BASE_URL", "DATABAR_API_KEY"]
        done = subprocess.run(
            [sys.executable, "-m", "enrich", "run", "job.yaml", "--json"],
            cwd=office.folder,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=10)

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["submitted"] == 3
    assert (out, err, process.returncode) == ("", "", 0)


def test_the_sandboxs_knobs_are_checked(office: Office) -> None:
    """A wrong setting is exit 2 before anything is served."""
    done = office.command("sandbox", "--latency", "soon")

    assert done.code == 2
    assert "lognormal" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("arguments", [["sandbox"], ["run", "job.yaml", "--sandbox"], ["waterfalls", "--sandbox"]])
def test_without_its_extra_the_sandbox_says_how_to_get_it(office: Office, arguments: list[str]) -> None:
    """An installation without FastAPI is told what to install, without a traceback."""
    office.write_leads(people(1))
    block = "import sys; sys.modules['fastapi'] = None; from enrich.cli import run_command; "
    done = subprocess.run(
        [sys.executable, "-c", f"{block}sys.exit(run_command({arguments!r}))"],
        cwd=office.folder,
        env={"PATH": os.defpath, "HOME": str(office.folder), "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'databar-enrich[sandbox]'" in done.stderr
    assert "Traceback" not in done.stderr


# A terminal


@pytest.mark.long
def test_a_person_at_a_terminal_sees_the_receipt(tmp_path: Path, office: Office) -> None:
    """On a terminal the first run without a cap asks; the receipt fits a small screen; stdout stays clean."""
    office.write_leads(people(5))
    with serving(tmp_path / "api.db") as api:
        refused = _on_terminal(office, api, "n\n")
        assert api.audit()["accepted"] == 0
        agreed = _on_terminal(office, api, "y\n")
        assert api.audit()["accepted"] == 5

    assert refused[0] == 5
    assert "5 distinct requests: 5 would be sent" in refused[1]
    assert "0.00 to 17.55 credits" in refused[1]
    assert agreed[0] == 0
    assert "job: 5 rows, 5 distinct requests" in agreed[1]
    receipt = agreed[1][agreed[1].rindex("job: 5 rows") :]
    assert max(map(len, receipt.splitlines()[:-1])) <= 80


def _on_terminal(office: Office, api: Api, answer: str) -> tuple[int, str]:
    """Run the program with a terminal for stdin and stderr; answer its question; tell exit code and what it showed."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "enrich", "run", "job.yaml"],
        cwd=office.folder,
        env={"PATH": os.defpath, "HOME": str(office.folder), "TERM": "dumb", "COLUMNS": "80", **api.environ},
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
    )
    os.close(theirs)
    shown = shown_on(ours, up_to=b"Go on?")
    os.write(ours, answer.encode())
    shown += shown_on(ours)
    os.close(ours)
    out, _ = process.communicate(timeout=10)
    assert out == b""
    return process.returncode, shown.decode().replace("\r\n", "\n")


def test_quiet_shows_only_errors(office: Office, api: Api) -> None:
    """`--quiet` leaves the receipt out even when the exit code is not 0."""
    office.write_leads(people(2))
    api.fault("no-task-id")

    done = office.command("run", "job.yaml", "--quiet", api=api)

    assert (done.code, done.stdout, done.stderr) == (14, "", "")


def test_a_reader_that_leaves_is_no_bug(api: Api, office: Office) -> None:
    """`enrich schema | head -1` ends without a complaint."""
    process = office.start("schema")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()

    assert process.wait(10) == 0
    assert err == ""
    assert httpx.get(api.base_url.removesuffix("/v1") + "/health").status_code == 200


def test_ctrl_c_in_the_middle_of_an_import_has_its_exit_code(tmp_path: Path) -> None:
    """Classes are made by `exec`, out of which `python -m` takes a KeyboardInterrupt for one that nobody handled."""
    (tmp_path / "importing.py").write_text("""
import os, signal, time
from enrich import cli

def run(_):
    try:
        exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    except (KeyboardInterrupt, cli.Interrupted):
        return cli.Exit.INTERRUPTED

cli.run_command = run
cli.main()
""")
    command = [sys.executable, "-m", "importing"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False, preexec_fn=usual_signals
    )
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.long
def test_who_needs_no_cluster_waits_for_none() -> None:
    """The drivers for a server, and Ray, come with an extra, and take their time: a run over files loads neither."""
    code = (
        "import sys, enrich.pipeline, enrich.worker, enrich.report.gather; print({'psycopg', 'ray'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert told.stdout == "set()\n"
