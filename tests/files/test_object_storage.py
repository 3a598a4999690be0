"""Leads read from object storage and written back, over real HTTP to a server that speaks S3."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import polars as pl
import pytest

from enrich.errors import CommandRefused, install_hint
from enrich.files import object_store
from enrich.files.reader import InputTable
from enrich.files.writer import prepare_file, write_file
from enrich.job.locations import ObjectUrl
from enrich.job.spec import Input, Output
from tests.support.cases import in_turn
from tests.support.object_storage import BUCKET, SECRET, download_object, put_object
from tests.support.table_files import read_table, write_table
from tests.support.workspace import HEADER, SandboxApi, Workspace, make_leads


@pytest.fixture
def storage_environ(bucket: dict[str, str]) -> dict[str, str]:
    """Return the environment variables that point to the storage."""
    return bucket


@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [("a b.csv", "out-%Y.csv"), ("a.parquet", "o.xlsx"), ("a.jsonl.gz", "o.parquet")],
    ids=" to ".join,
)
def test_run_with_storage_input_and_output(
    tmp_path: Path, workspace: Workspace, api: SandboxApi, storage_environ: dict[str, Any], names: tuple[str, str]
) -> None:
    """A run reads and writes storage as on disk; the next run pays nothing, and the output can be rebuilt."""
    leads, output = names
    put_object(f"in/{leads}", write_table(tmp_path / leads, HEADER, make_leads(3)).read_bytes())
    workspace.write_job(input=f"s3://{BUCKET}/in/{leads}", output=f"s3://{BUCKET}/out/{output}")
    (workspace.folder / "tmp").mkdir()
    storage_environ = storage_environ | {"TMPDIR": str(workspace.folder / "tmp")}

    result = workspace.run_in_process("run", "job.yaml", "--json", api=api, **storage_environ)

    assert (result.exit_code, result.json_output["submitted"], result.stderr) == (0, 3, "")
    assert result.json_output["output"].startswith(f"s3://{BUCKET}/out/o")
    rows = read_table(download_object(tmp_path, result.json_output["output"].removeprefix(f"s3://{BUCKET}/")))
    assert [row[:5] for row in rows] == [HEADER, *make_leads(3)]
    assert (
        workspace.run_in_process("run", "job.yaml", "--json", api=api, **storage_environ).json_output["submitted"] == 0
    )
    assert workspace.run_in_process("collect", "job.yaml", **storage_environ).exit_code == 0
    assert list((workspace.folder / "tmp").iterdir()) == []


@pytest.mark.long
def test_urls_on_command_line(workspace: Workspace, api: SandboxApi, storage_environ: dict[str, Any]) -> None:
    """URLs work on the command line of a process with cron's environment."""
    put_object("leads.csv", write_table(workspace.folder / "leads.csv", HEADER, make_leads(1)).read_bytes())
    (workspace.folder / "leads.csv").unlink()
    places = ("--input", f"s3://{BUCKET}/leads.csv", "--output", f"s3://{BUCKET}/deep/out.csv.gz")
    result = workspace.run_subprocess("run", "job.yaml", *places, api=api, **storage_environ)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert len(read_table(download_object(workspace.folder, "deep/out.csv.gz"))) == 2


@pytest.mark.long
@pytest.mark.usefixtures("storage_environ")
def test_changed_object_changes_stamp() -> None:
    """A changed object changes the stamp, so a run notices new leads; rows that were downloaded stay as they were."""
    url = put_object("leads.csv", b"A\n1\n")
    source = InputTable(url, Input(path=str(url)))
    before = source.file_versions()
    assert source.file_versions() == before
    put_object("leads.csv", b"A\n2\n")
    assert source.file_versions() != before
    assert [frame.rows() for frame in source.batches()] == [[("1",)]]
    with patch.dict(os.environ, AWS_ENDPOINT_URL="http://127.0.0.1:9"):
        assert source.file_versions() is not None


@pytest.mark.long
@pytest.mark.usefixtures("storage_environ")
def test_error_names_url() -> None:
    """An error names the URL, not the local copy."""
    url = put_object("leads.csv", b"A,B\n1\n")
    with pytest.raises(CommandRefused, match=rf"s3://{BUCKET}/leads.csv: row 1 \(line 2\) has 1 cell"):
        list(InputTable(url, Input(path=str(url))).batches())


@pytest.mark.long
@pytest.mark.usefixtures("storage_environ")
def test_failed_output_keeps_old_object(tmp_path: Path) -> None:
    """A failed output leaves the old object whole."""
    url = put_object("out.csv", b"the old one")

    def frames() -> Iterator[pl.DataFrame]:
        yield pl.DataFrame({"A": ["1"]})
        raise CommandRefused("the input changed")

    with pytest.raises(CommandRefused, match="the input changed"):
        write_file(url, Output(path=str(url)), job="job", schema={"A": pl.String()}, frames=frames(), new_columns=0)
    assert download_object(tmp_path, "out.csv").read_bytes() == b"the old one"


@pytest.mark.long
@pytest.mark.usefixtures("storage_environ")
def test_output_collected_after_upload_error() -> None:
    """After a failed upload (here the bucket is gone), the hint is to write the output with `enrich collect`."""
    url = ObjectUrl("s3", "gone", "out.csv")
    frame = pl.DataFrame({"A": ["1"]})
    with pytest.raises(CommandRefused, match="no bucket `gone`") as caught:
        write_file(url, Output(path=str(url)), job="job", schema=frame.schema, frames=[frame], new_columns=0)
    assert "`enrich collect JOB` writes them for free" in (caught.value.hint or "")


@pytest.mark.long
@pytest.mark.usefixtures("storage_environ")
def test_multipart_upload(tmp_path: Path) -> None:
    """An output larger than one request can carry is uploaded in parts."""
    frame = pl.DataFrame({"A": [os.urandom(5_000).hex() for _ in range(1_200)]})
    url = ObjectUrl("s3", BUCKET, "out.csv")
    write_file(url, Output(path=str(url)), job="job", schema=frame.schema, frames=[frame], new_columns=0)
    assert [row[0] for row in read_table(download_object(tmp_path, "out.csv"))[1:]] == frame["A"].to_list()


@pytest.mark.long
@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"s3://{BUCKET}/none.csv", " does not exist"),
        ("s3://nobody/a.csv", ": no bucket `nobody`"),
        (f"s3://{BUCKET}/a.csv", ": the object storage cannot be reached"),
        (f"s3://{BUCKET}/b.csv", ": the endpoint has no TLS"),
        (f"s3://{BUCKET}/c.csv", ": no credentials for the object storage"),
        ("az://box/a.csv", ": no credentials for the object storage"),
    ],
)
def test_storage_errors_before_spending(
    workspace: Workspace, api: SandboxApi, storage_environ: dict[str, Any], url: str, message: str
) -> None:
    """A storage error is exit 5 in one line without secrets, before anything is spent."""
    if "reached" in message:
        storage_environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    if "no credentials" in message:
        del storage_environ["AWS_ACCESS_KEY_ID"], storage_environ["AWS_SECRET_ACCESS_KEY"]
        storage_environ["AWS_METADATA_ENDPOINT"] = "http://127.0.0.1:9"
    if "TLS" in message:
        del storage_environ["AWS_ALLOW_HTTP"]
    workspace.write_leads(make_leads(1))
    result = workspace.run_in_process("run", "job.yaml", "--input", url, api=api, **storage_environ)
    assert (result.exit_code, result.stderr.splitlines()[0]) == (5, f"error: {url}{message}")
    if "none.csv" not in url:
        result = workspace.run_in_process("run", "job.yaml", "--output", url, api=api, **storage_environ)
        assert (result.exit_code, result.stderr.splitlines()[0]) == (5, f"error: {url}{message}")
    assert SECRET not in result.stderr
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_rejected_credentials(endpoint: str, storage_environ: dict[str, Any]) -> None:
    """A server that checks credentials rejects wrong ones; the message names the variables, not their values."""
    put_object("a.csv", b"A\n1\n")
    with httpx.Client(base_url=endpoint, verify=False, trust_env=False) as http:  # noqa: S501
        http.post("/moto-api/reset-auth", content="0")
        try:
            with pytest.raises(CommandRefused, match=r"rejects these credentials") as caught:
                InputTable(ObjectUrl("s3", BUCKET, "a.csv"), Input(path="s3://leads/a.csv"))
            with pytest.raises(CommandRefused, match=r"rejects these credentials"):
                prepare_file(ObjectUrl("s3", BUCKET, "out.csv"), Path("/leads.csv"), "job")
        finally:
            http.post("/moto-api/reset-auth", content="inf")
    assert "AWS_SECRET_ACCESS_KEY" in (caught.value.hint or "")
    assert storage_environ["AWS_SECRET_ACCESS_KEY"] not in f"{caught.value.message}{caught.value.hint}"


UNUSABLE_KEY = (
    '{"type": "service_account", "private_key": "secret", "private_key_id": "1", "client_email": "a@b.example", '
    '"gcs_base_url": "http://127.0.0.1:9", "disable_oauth": false}'
)


@in_turn(
    ("scheme", "variable", "value"),
    [
        ("gs", "GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json"),
        ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", "secret"),
        ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", UNUSABLE_KEY),
        ("az", "AZURE_STORAGE_ACCOUNT_KEY", "no secret"),
        ("az", "AZURE_STORAGE_SAS_KEY", "secret"),
    ],
)
def test_unusable_credentials(monkeypatch: pytest.MonkeyPatch, scheme: str, variable: str, value: str) -> None:
    """Credentials that cannot be read are no failure of the storage. The error names the variables, not the values."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "leads")
    monkeypatch.setenv(variable, value)
    with pytest.raises(CommandRefused, match="the credentials for the object storage cannot be used") as caught:
        object_store.check_bucket(ObjectUrl(scheme, BUCKET, "a.csv"))
    assert variable.partition("_")[0] in (caught.value.hint or "")
    assert "secret" not in f"{caught.value.message}{caught.value.hint}"


@pytest.mark.long
def test_output_never_replaces_input(workspace: Workspace, api: SandboxApi, storage_environ: dict[str, Any]) -> None:
    """An output with the input's URL is an error of the job."""
    workspace.write_job(input=f"s3://{BUCKET}/a.csv", output=f"s3://{BUCKET}/a.csv")
    result = workspace.run_in_process("run", "job.yaml", api=api, **storage_environ)
    assert (result.exit_code, "are the same file" in result.stderr) == (2, True)


def test_missing_storage_extra(workspace: Workspace, api: SandboxApi) -> None:
    """Without the storage extra, one line and a hint show how to install it, also for an output."""
    workspace.write_leads(make_leads(1))
    for option in ("--input", "--output"):
        with patch.dict("sys.modules", {"obstore": None, "obstore.store": None}):
            result = workspace.run_in_process("run", "job.yaml", option, "s3://leads/a.csv", api=api)
        assert result.exit_code == 2
        assert result.stderr == (
            f"error: s3://leads/a.csv: object storage is not installed\nhint: {install_hint('storage')}\n"
        )
