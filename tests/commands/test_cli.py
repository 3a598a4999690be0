"""The command line: every command, its help, and what it prints to stdout and stderr."""

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
from enrich.cli import SECTIONS, cli
from enrich.run.context import RunOptions
from tests.support.cases import first_quick
from tests.support.program import ProgramStart, reset_signals
from tests.support.workspace import ProgramResult, SandboxApi, Workspace, make_leads, read_terminal, serve_api

CONTEXT = click.Context(cli)
COMMANDS = sorted(cli.list_commands(CONTEXT))


def test_all_commands_exist() -> None:
    """Offers all commands that users have in their scripts."""
    assert set(COMMANDS) >= {"run", "collect", "status", "waterfalls", "sandbox", "schema"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(workspace: Workspace, name: str) -> None:
    """`--help` describes the command and each option, and needs no job or key."""
    result = workspace.run_in_process(name, "--help")

    assert (result.exit_code, result.stderr) == (0, "")
    assert f"enrich {name}" in result.stdout
    command = cli.get_command(CONTEXT, name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert max(parameter.opts, key=len) in result.stdout


def test_help_has_no_formulas(workspace: Workspace) -> None:
    """A number's bounds are not shown as `[x>=0]`."""
    for commands in SECTIONS.values():
        for name in commands:
            assert not re.search(r"x[<>]|[<>]=?x", workspace.run_in_process(name, "--help").stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "job.yaml", "--limit", "-1"), "'--limit': -1 is less than 0"),
        (("run", "job.yaml", "--max-credits", "-0.5"), "'--max-credits': -0.5 is less than 0"),
        *(
            (("run", "job.yaml", "--max-credits", text), f"'--max-credits': `{text}` is not a number in plain digits")
            for text in ("nan", "inf", "1_000", "+5", " 5", "1e3", "٣", "5,5", "")
        ),
        (("run", "job.yaml", "--limit", "1_0"), "'--limit': `1_0` is not a number in plain digits"),
        (("plan", "job.yaml", "--seed", "1_0"), "'--seed': `1_0` is not a number in plain digits"),
        (("reconcile", "job.yaml", "--since", "٣"), "'--since': `٣` is not a number in plain digits"),
        (("run", "job.yaml", "--max-credits", "-1"), "'--max-credits': -1 is less than 0"),
        (("plan", "job.yaml", "--sample", "0"), "'--sample': 0 is less than 1"),
        (("plan", "job.yaml", "--sample", "1.5"), "'1.5' is not a valid integer"),
        (("sandbox", "--port", "65536"), "--port must be from 0 to 65535"),
        (("run", "job.yaml", "--engine", "ray", "--address", "ray.example:٣"), "must be HOST:PORT"),
        (("run", "job.yaml", "--engine", "ray", "--address", "ray.example:65536"), "must be HOST:PORT"),
        (
            ("run", "job.yaml", "--ledger", "postgresql://db.example:٣/leads"),
            "a URL must be postgresql://user@host:5432",
        ),
    ],
)
def test_number_out_of_range(workspace: Workspace, words: tuple[str, ...], message: str) -> None:
    """A number out of its range is exit 2 with the bound in words."""
    result = workspace.run_in_process(*words)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_all_commands(workspace: Workspace, option: str) -> None:
    """The help page lists every command on a line of its own."""
    result = workspace.run_in_process(option)

    assert result.exit_code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name}\s+\S", result.stdout, re.MULTILINE)


def test_the_first_page_fits_a_terminal(workspace: Workspace) -> None:
    """The help page fits 80 columns; no line is cut off."""
    assert "..." not in workspace.run_in_process("--help", COLUMNS="80").stdout.partition("Set up:")[2]


def test_the_page_of_a_group_fits_a_terminal(workspace: Workspace) -> None:
    """No line of the commands of `enrich ledger` is cut off."""
    assert "..." not in workspace.run_in_process("ledger", "--help", COLUMNS="80").stdout.partition("Commands:")[2]


def test_version_option(workspace: Workspace) -> None:
    """`--version` prints the version for bug reports."""
    assert __version__ in workspace.run_in_process("--version").stdout


def test_no_command_shows_help_with_exit_2(workspace: Workspace) -> None:
    """Shows the help page and exits with 2 when no command is given."""
    result = workspace.run_in_process()

    assert result.exit_code == 2
    assert "Set up:" in result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [["fly"], ["run", "job.yaml", "--fast"], ["status"], ["schema", "extra"]])
def test_unknown_command_is_exit_2(workspace: Workspace, arguments: list[str]) -> None:
    """Names the unknown command and where to find help on stderr; stdout stays empty."""
    result = workspace.run_in_process(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert "--help" in result.stderr


@pytest.mark.parametrize("arguments", [["fly"], ["run", "job.yaml", "--fast"], ["status"], ["collect", "no.yaml"]])
def test_json_errors(workspace: Workspace, arguments: list[str]) -> None:
    """Prints one JSON object for every error."""
    result = workspace.run_in_process(*arguments, "--json")

    assert result.exit_code == 2
    assert result.json_output.keys() == {"exit_code", "error"}
    assert result.json_output["exit_code"] == 2


def test_misspelled_option_suggestion(workspace: Workspace) -> None:
    """Suggests the correct name for a misspelled option."""
    assert "--max-credits" in workspace.run_in_process("run", "job.yaml", "--max-credit", "5").stderr


def test_option_without_its_value_names_the_help_of_the_command(workspace: Workspace) -> None:
    """The parser of click raises this error without the command."""
    result = workspace.run_in_process("report", "job.yaml", "--compare")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "hint: enrich report --help")


def test_schema_is_json(workspace: Workspace) -> None:
    """`enrich schema` prints a JSON Schema that describes every key of a job file."""
    result = workspace.run_in_process("schema")

    schema = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) >= {"version", "input", "output", "waterfall", "params", "limits", "policy"}
    assert schema["additionalProperties"] is False
    assert all("description" in value or "$ref" in value or "allOf" in value for value in schema["properties"].values())


# waterfalls


def test_waterfalls_list(api: SandboxApi, workspace: Workspace) -> None:
    """Prints one line a waterfall as text, and one list as JSON."""
    text = workspace.run_in_process("waterfalls", api=api)
    listed = workspace.run_in_process("waterfalls", "--json", api=api)

    assert text.exit_code == listed.exit_code == 0
    known = [item["identifier"] for item in json.loads(listed.stdout)]
    assert [line.split()[0] for line in text.stdout.splitlines()] == known
    assert "email_getter" in text.stdout


def test_waterfall_details(api: SandboxApi, workspace: Workspace) -> None:
    """Shows the params, fields, providers, verifiers and prices of one waterfall."""
    text = workspace.run_in_process("waterfalls", "email_getter", api=api)
    shown = workspace.run_in_process("waterfalls", "email_getter", "--json", api=api)

    for word in ("first_name", "required", "email", "833", "Mailhound", "0.5 credits", "only when named", "Mailproof"):
        assert word in text.stdout
    assert shown.json_output["available_enrichments"][0]["id"] == 833


def test_unknown_waterfall_suggestion(api: SandboxApi, workspace: Workspace) -> None:
    """Exits with 2 and suggests a similar name for an unknown waterfall."""
    result = workspace.run_in_process("waterfalls", "email_geter", "--json", api=api)

    assert result.exit_code == result.json_output["exit_code"] == 2
    assert "did you mean `email_getter`?" in result.stderr


def test_sandbox_waterfalls_need_no_key(workspace: Workspace) -> None:
    """`--sandbox` lists the sandbox's waterfalls without a key."""
    result = workspace.run_in_process("waterfalls", "--sandbox")

    assert (result.exit_code, result.stderr) == (0, "")
    assert "phone_getter" in result.stdout


def test_waterfalls_with_a_wrong_key_is_exit_3(api: SandboxApi, workspace: Workspace) -> None:
    """Exits with 3 when the key is wrong, as all commands do."""
    assert workspace.run_in_process("waterfalls", api=SandboxApi(api.base_url, "wrong")).exit_code == 3


# status


@pytest.mark.long
def test_status_shows_counts_and_runs(tmp_path: Path, workspace: Workspace) -> None:
    """Shows counts, credits, expiry times and past executions, under the names of the run summary."""
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db", latency="fixed(30)") as api:
        workspace.run_job(api, RunOptions(max_time_s=3.0, limit=5))
        waiting = workspace.run_in_process("status", "job.yaml", "--json").json_output
        api.advance(60)
        summary = workspace.run_job(api, RunOptions(limit=0))

    assert (waiting["pending"], waiting["at_the_api"], waiting["credits_spent"]) == (12, 5, 0)
    assert waiting["next_expiry"] <= waiting["last_expiry"]
    status = workspace.run_in_process("status", "job.yaml", "--json").json_output
    assert (status["found"], status["not_found"], status["pending"]) == (summary.found, summary.not_found, 7)
    assert (status["requests"], status["at_the_api"], status["next_expiry"]) == (12, 0, None)
    assert status["credits_spent"] == summary.credits_spent
    assert [run["exit_code"] for run in status["executions"]] == [0, 13]
    text = workspace.run_in_process("status", "job.yaml")
    assert (text.exit_code, text.stderr) == (0, "")
    for word in ("All runs: 12 requests", "found", "pending", "credits", "  run  started"):
        assert word in text.stdout


def test_status_of_new_job(workspace: Workspace) -> None:
    """A missing ledger is no error, and the command does not create one."""
    result = workspace.run_in_process("status", "job.yaml", "--json")

    assert (result.exit_code, result.json_output["requests"], result.json_output["executions"]) == (0, 0, [])
    assert workspace.run_in_process("status", "job.yaml").exit_code == 0
    assert not workspace.ledger_path.parent.exists()


def test_status_needs_neither_key_nor_network(api: SandboxApi, workspace: Workspace) -> None:
    """Reads only the ledger while the API is unreachable; the sandbox has a ledger of its own."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)

    assert (
        workspace.run_in_process("status", "job.yaml", "--json", DATABAR_BASE_URL="nonsense").json_output["requests"]
        == 2
    )
    assert workspace.run_in_process("status", "job.yaml", "--json", "--sandbox").json_output["requests"] == 0


# collect


def test_collect_from_ledger_only(api: SandboxApi, workspace: Workspace) -> None:
    """Writes a lost output again, byte for byte, without key or network."""
    workspace.write_leads(make_leads(9))
    workspace.run_job(api)
    path = workspace.folder / "out.csv"
    written = path.read_bytes()
    path.unlink()
    polls = api.audit()["requests"]

    result = workspace.run_in_process("collect", "job.yaml", "--json")

    assert (result.exit_code, result.stderr) == (0, "")
    assert path.read_bytes() == written
    assert result.json_output["rows"] == 9
    assert result.json_output["output"] == str(path)
    assert api.audit()["requests"] == polls


def test_collect_requires_partial_for_pending_rows(api: SandboxApi, workspace: Workspace) -> None:
    """With pending rows: exits with 5 and keeps the old output; `--partial` writes the rows that are ready."""
    workspace.write_leads(make_leads(5))
    workspace.run_job(api, RunOptions(limit=2))
    path = workspace.folder / "out.csv"
    path.write_text("old\n")

    refused = workspace.run_in_process("collect", "job.yaml", "--json")

    assert refused.exit_code == refused.json_output["exit_code"] == 5
    assert "3 rows pending" in refused.stderr
    assert "--partial" in refused.stderr
    assert path.read_text() == "old\n"
    partial = workspace.run_in_process("collect", "job.yaml", "--partial", "--json")
    assert (partial.exit_code, partial.json_output["pending"]) == (0, 3)
    assert len(workspace.read_output()) == 5


def test_collect_before_any_run_is_exit_5(workspace: Workspace) -> None:
    """Exits with 5 before the first run and leaves no ledger behind."""
    workspace.write_leads(make_leads(1))

    result = workspace.run_in_process("collect", "job.yaml", "--json")

    assert result.exit_code == 5
    assert "never run" in result.stderr
    assert not workspace.ledger_path.exists()


def test_collect_from_missing_ledger_leaves_no_file(workspace: Workspace) -> None:
    """A missing ledger is refused without a lock file or a folder for it."""
    workspace.write_leads(make_leads(1))
    before = set(workspace.folder.rglob("*"))

    result = workspace.run_in_process("collect", "job.yaml", "--ledger", "new/nope.db")

    assert (result.exit_code, "nope.db" in result.stderr) == (5, True)
    assert set(workspace.folder.rglob("*")) == before


def test_collect_with_other_input_and_output(api: SandboxApi, workspace: Workspace) -> None:
    """Uses stored answers for any input file with the same requests."""
    workspace.write_leads(make_leads(5))
    workspace.run_job(api)
    workspace.write_leads(make_leads(3), name="few.csv")

    result = workspace.run_in_process(
        "collect", "job.yaml", "--input", "few.csv", "--output", "few_out.parquet", "--json"
    )

    assert (result.exit_code, result.json_output["rows"]) == (0, 3)
    assert (workspace.folder / "few_out.parquet").is_file()


# Paths on the command line


@pytest.mark.long
def test_paths_on_the_command_line_are_relative_to_the_working_directory(api: SandboxApi, workspace: Workspace) -> None:
    """Resolves the job file's paths against its folder, and command-line paths against the working directory."""
    workspace.write_leads(make_leads(2))
    other_server = Workspace(workspace.folder.parent)

    from_job = other_server.run_in_process("run", "office/job.yaml", "--json", api=api)
    from_working_directory = other_server.run_in_process(
        *("run", "office/job.yaml", "--json", "--output", "here.csv", "--ledger", "here.db"), api=api
    )

    assert from_job.json_output["output"] == str(workspace.folder / "out.csv")
    assert from_working_directory.json_output["output"] == str(other_server.folder / "here.csv")
    assert (other_server.folder / "here.db").is_file()


@pytest.mark.long
def test_a_key_file_and_the_config_of_databar_login_are_read(api: SandboxApi, workspace: Workspace) -> None:
    """Reads the key from a key file (for cron) or from the config that `databar login` writes."""
    workspace.write_leads(make_leads(1))
    (workspace.folder / "key").write_text(f"{api.api_key}\n")
    url = api.base_url

    from_file = workspace.run_in_process("run", "job.yaml", "--json", DATABAR_BASE_URL=url, DATABAR_API_KEY_FILE="key")
    (workspace.folder / ".databar").mkdir()
    (workspace.folder / ".databar" / "config").write_text(f"api_key={api.api_key}\n")
    from_config = workspace.run_in_process("run", "job.yaml", "--json", DATABAR_BASE_URL=url, DATABAR_API_KEY="")

    assert from_file.exit_code == from_config.exit_code == 0


@pytest.mark.long
def test_missing_home_is_supported(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with a key in a variable when the user has no HOME and no passwd entry, as in containers."""

    def home_without_user() -> Path:
        raise RuntimeError("Could not determine home directory.")

    workspace.write_leads(make_leads(1))
    monkeypatch.setattr(Path, "home", home_without_user)

    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    assert workspace.run_in_process("run", "job.yaml").exit_code == 3


# The sandbox


@pytest.mark.long
def test_sandbox_prints_environment(workspace: Workspace) -> None:
    """Prints the complete environment that a run needs, and exits without a message."""
    workspace.write_leads(make_leads(3))
    process = workspace.start_subprocess("sandbox")
    assert process.stdout is not None
    try:
        environ = dict(process.stdout.readline().strip().split("=", 1) for _ in range(2))
        assert list(environ) == ["DATABAR_BASE_URL", "DATABAR_API_KEY"]
        with ProgramStart(("run", "job.yaml", "--json"), str(workspace.folder), environ).start() as run:
            output, errors = run.communicate(timeout=60)
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=90)

    assert (run.returncode, errors) == (0, "")
    assert json.loads(output)["submitted"] == 3
    assert (out, err, process.returncode) == ("", "", 0)


def test_sandbox_options_are_validated(workspace: Workspace) -> None:
    """Exits with 2 for an invalid setting before the sandbox serves anything."""
    result = workspace.run_in_process("sandbox", "--latency", "soon")

    assert result.exit_code == 2
    assert "lognormal" in result.stderr


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_signal_that_a_library_turns_into_its_own_error(
    workspace: Workspace, number: signal.Signals, code: int
) -> None:
    """Exits as after any signal, without a traceback."""
    prelude = f"""
import os
import enrich.commands.schema

def schema():
    try:
        os.kill(os.getpid(), {int(number)})
        return {{}}
    except Exception as error:
        raise ValueError(str(error)) from None

enrich.commands.schema.json_schema = schema
"""
    result = _run_with_prelude(workspace, prelude, "schema")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "error: interrupted: the same command resumes\n"


@pytest.mark.parametrize(("number", "code"), first_quick(1, [(signal.SIGINT, 130), (signal.SIGTERM, 143)]))
@pytest.mark.parametrize("moment", first_quick(1, ["click.echo", "cli.run_command", "cli.flush_error"]))
def test_signal_after_the_result(workspace: Workspace, moment: str, number: signal.Signals, code: int) -> None:
    """The result that is printed stands: no second document, no traceback. A second signal ends the process at once."""
    workspace.write_leads(make_leads(1))
    for signals, expected in ((1, 0), (2, code)):
        prelude = f"""
import os
import click
from enrich import cli

function = {moment}

def call_and_signal(*given, **options):
    result = function(*given, **options)
    for _ in range({signals}):
        os.kill(os.getpid(), {int(number)})
    return result

{moment} = call_and_signal
"""
        result = _run_with_prelude(workspace, prelude, "check", "job.yaml", "--json")
        assert (result.exit_code, result.stderr, result.json_output["exit_code"]) == (expected, "", 0)


def _run_with_prelude(workspace: Workspace, prelude: str, *arguments: str) -> ProgramResult:
    """Run the program in a process that runs other code first."""
    start = ProgramStart(arguments, str(workspace.folder), workspace.environment(), prelude=prelude)
    with start.start() as process:
        out, err = process.communicate(timeout=60)
    return ProgramResult(process.returncode, out, err)


@pytest.mark.long
@pytest.mark.parametrize("arguments", [["sandbox"], ["run", "job.yaml", "--sandbox"], ["waterfalls", "--sandbox"]])
def test_missing_sandbox_extra(workspace: Workspace, arguments: list[str]) -> None:
    """Without FastAPI, names what to install and prints no traceback."""
    workspace.write_leads(make_leads(1))
    block = "import sys; sys.modules['fastapi'] = None; from enrich.cli import run_command; "
    result = subprocess.run(
        [sys.executable, "-c", f"{block}sys.exit(run_command({arguments!r}))"],
        cwd=workspace.folder,
        env={"PATH": os.defpath, "HOME": str(workspace.folder), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert result.returncode == 2
    assert result.stdout == ""
    assert "pip install 'FILE[sandbox]'" in result.stderr
    assert "Traceback" not in result.stderr


# A terminal


@pytest.mark.long
def test_first_run_asks_on_terminal(tmp_path: Path, workspace: Workspace) -> None:
    """Prompts before the first run without a cap; the run summary fits a small screen; stdout stays empty."""
    workspace.write_leads(make_leads(5))
    with serve_api(tmp_path / "api.db") as api:
        refused = _run_on_terminal(workspace, api, "n\n")
        assert api.audit()["accepted"] == 0
        agreed = _run_on_terminal(workspace, api, "y\n")
        assert api.audit()["accepted"] == 5

    assert refused[0] == 5
    assert "5 requests to send · at most 17.55 credits · " in refused[1]
    assert "Spend up to 17.55 credits on 5 leads? [y/N]" in refused[1]
    assert refused[1].endswith("\nCancelled. Nothing sent.\n")
    assert agreed[0] == 0
    summary = agreed[1][agreed[1].index("✓ ") :]
    assert max(map(len, summary.splitlines()[:-1])) <= 80


@pytest.mark.long
@pytest.mark.parametrize(("answer", "options"), [("n\n", ["--quiet"]), ("\x04", [])])
def test_only_yes_skips_question(workspace: Workspace, api: SandboxApi, answer: str, options: list[str]) -> None:
    """`--quiet` hides no question about money, and Ctrl-D answers it with no."""
    workspace.write_leads(make_leads(2))

    code, shown = _run_on_terminal(workspace, api, answer, *options)

    assert (code, api.audit()["accepted"]) == (5, 0)
    assert shown.endswith("\nCancelled. Nothing sent.\n")


def _run_on_terminal(workspace: Workspace, api: SandboxApi, answer: str, *options: str) -> tuple[int, str]:
    """Run the program with a terminal for stdin and stderr; answer its prompt; return exit code and output."""
    controller, terminal = os.openpty()
    environ = {**workspace.environment(api), "TERM": "dumb", "COLUMNS": "80"}
    start = ProgramStart(("run", "job.yaml", *options), str(workspace.folder), environ)
    process = start.start(stdin=terminal, stderr=terminal)
    os.close(terminal)
    shown = read_terminal(controller, up_to=b"[y/N]")
    os.write(controller, answer.encode())
    shown += read_terminal(controller)
    os.close(controller)
    out, _ = process.communicate(timeout=90)
    assert out == ""
    return process.returncode, shown.decode().replace("\r\n", "\n")


@pytest.mark.long
def test_quiet_hides_summary(workspace: Workspace, api: SandboxApi) -> None:
    """`--quiet` hides the run summary also when the exit code is not 0."""
    workspace.write_leads(make_leads(2))
    api.inject_fault("no-task-id")

    result = workspace.run_in_process("run", "job.yaml", "--quiet", api=api)

    assert (result.exit_code, result.stdout, result.stderr) == (14, "", "")


@pytest.mark.long
def test_closed_stdout_is_no_error(api: SandboxApi, workspace: Workspace) -> None:
    """`enrich schema | head -1` ends without an error message."""
    process = workspace.start_subprocess("schema")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()

    assert process.wait(timeout=90) == 0
    assert err == ""
    assert httpx.get(api.base_url.removesuffix("/v1") + "/health").status_code == 200


@pytest.mark.long
def test_interrupt_during_import_exit_code(tmp_path: Path) -> None:
    """Exits correctly on Ctrl-C during imports: in classes made by `exec`, `python -m` reports it as unhandled."""
    (tmp_path / "importing.py").write_text("""
import os, signal, time
from enrich import cli

def run(_arguments, _signals):
    try:
        exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    except (KeyboardInterrupt, cli.Interrupted):
        return cli.ExitCode.INTERRUPTED

cli.run_command = run
os._exit(cli.main())
""")
    command = [sys.executable, "-m", "importing"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False, preexec_fn=reset_signals
    )
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.long
def test_cluster_dependencies_load_lazily() -> None:
    """A run over files loads no PostgreSQL driver and no Ray: both are optional extras and slow to import."""
    modules = "enrich.run.pipeline, enrich.cluster.worker, enrich.report.build"
    code = f"import sys, {modules}; print({{'psycopg', 'ray'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout == "set()\n"
