"""Enrolling and collecting on Ray gives the same results as in one process, even when blocks and connections fail."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pytest
from msgspec.structs import replace

from enrich.errors import ClusterFailed, CommandRefused, EnrichError, JobError, LedgerFailed
from enrich.files import object_store
from enrich.files.reader import InputTable
from enrich.files.text import FileProblem
from enrich.job.job import load_job
from enrich.job.locations import LedgerLocation, ObjectUrl, parse_ledger_location
from enrich.job.spec import Input
from enrich.job.target import Target, TargetKind
from enrich.ledger import enroll, queue
from enrich.ledger.database import Database
from enrich.models import Decision, RequestSelection, RowStatus
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.collector import Collector
from enrich.run.context import ClusterCallbacks
from tests.support import postgres as servers
from tests.support.ledger import FOUND, NO_MATCH, CommittingLedger
from tests.support.object_storage import BUCKET, put_object
from tests.support.ray_head import RayHead
from tests.support.table_files import input_parts, read_table, write_table
from tests.support.workspace import wait_until

# Ray's own warnings.
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TEMPLATE = RequestTemplate(Target(TargetKind.WATERFALL, "email_getter", (833,)), ("a",), (), {"email": "email"}, None)
JOB = "version: 1\nwaterfall: email_getter\nparams: {a: A}\ninput: leads/\noutput: out/\n"
NAMES = [f"person {number % 40}" for number in range(150)]


@pytest.fixture(scope="module")
def _ray(ray_head: RayHead) -> Iterator[None]:
    """Connect to the cluster, with the settings of a run."""
    from enrich.cluster.connection import RAY_ENVIRONMENT  # noqa: PLC0415 - as below

    with patch.dict(os.environ, RAY_ENVIRONMENT):
        import ray  # noqa: PLC0415 - Ray reads its settings at import

        ray.init(ray_head.address, log_to_driver=False, configure_logging=False)
    yield
    heartbeat_counter.cache_clear()
    ray.shutdown()


@pytest.fixture(autouse=True)
def _small_blocks(_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split even small inputs into blocks of 25 rows."""
    from enrich.cluster import engine  # noqa: PLC0415 - as above
    from enrich.files import reader  # noqa: PLC0415 - likewise

    monkeypatch.setattr(reader, "ROWS_PER_PART", 25)
    monkeypatch.setattr(engine, "ROWS_PER_PART", 25)


def open_ledger_remotely(
    ledger_location: LedgerLocation, environ: dict[str, str], seen: Path | None = None
) -> Database:
    """Open a ledger in a Ray process that started before the server, and append its process id to `seen`."""
    os.environ.update(environ)
    if seen is not None:
        with seen.open("a") as file:
            file.write(f"{os.getpid()}\n")
    return Database(ledger_location)


def write_input_files(folder: Path, kind: str = "parquet", names: Sequence[str] = NAMES) -> None:
    """Write the leads into three files."""
    for number, country in enumerate(("DE", "DE", "FR")):
        path = folder / "leads" / f"country={country}" / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, ["A", "B"], [[name, f"{number}"] for name in names[number * 50 : (number + 1) * 50]])


def open_rows(folder: Path, more: str = "") -> JobInput:
    """Open the leads of a job as a `JobInput`."""
    (folder / "job.yaml").write_text(JOB + more)
    return JobInput(load_job(folder / "job.yaml"))


def begin_enrollment(
    folder: Path, ledger: CommittingLedger, selection: RequestSelection, environ: dict[str, str] | None = None
) -> Any:
    """Create the `SharedPass` that the blocks use."""
    from ray import cloudpickle  # noqa: PLC0415 - as above

    from enrich.cluster.engine import SharedPass  # noqa: PLC0415 - as above

    opening = partial(
        open_ledger_remotely, ledger.location, environ or {"PGPASSWORD": os.environ["PGPASSWORD"]}, folder / "seen"
    )
    return SharedPass(TEMPLATE, selection, cloudpickle.dumps(opening))


@cache
def heartbeat_counter() -> Any:
    """Start the counter that all steps share, as in a run."""
    from enrich.cluster.heartbeats import new_heartbeat_counter  # noqa: PLC0415 - as above

    return new_heartbeat_counter()


def monitor_heartbeats(callbacks: ClusterCallbacks | None = None) -> Any:
    """Create the heartbeat monitor of a step."""
    from enrich.cluster.heartbeats import HeartbeatMonitor, Heartbeats  # noqa: PLC0415 - as above

    return HeartbeatMonitor(Heartbeats(heartbeat_counter()), callbacks or ClusterCallbacks())


def enroll_locally(rows: JobInput, ledger: CommittingLedger, selection: RequestSelection) -> tuple[int, Counter[str]]:
    """Enroll all rows in this process; return the number of rows and the rows per status."""
    of_rows: Counter[str] = Counter()
    height = 0
    with ledger.wrapped.transaction():
        enroll.begin_pass(ledger.wrapped)
        for batch in rows.batches(TEMPLATE):
            enroll.enroll(ledger.wrapped, TEMPLATE.target, batch.requests(), selection)
            of_rows.update(status.value for status in batch.statuses if status is not None)
            height += batch.frame.height
        enroll.apply_limits(ledger.wrapped, selection)
        queue.fill_queue(ledger.wrapped, selection)
    return height, of_rows


def enroll_blocks(folder: Path, rows: JobInput, ledger: CommittingLedger, selection: RequestSelection) -> Any:
    """Enroll all rows on Ray; return the number of rows and the rows per status."""
    from enrich.cluster.engine import enroll_on_ray  # noqa: PLC0415 - as above

    ledger.commit(enroll.begin_pass)
    found = enroll_on_ray(rows, begin_enrollment(folder, ledger, selection), monitor_heartbeats())
    with ledger.wrapped.transaction():
        enroll.apply_limits(ledger.wrapped, selection)
        queue.fill_queue(ledger.wrapped, selection)
    return found


def queued_requests(ledger: CommittingLedger) -> list[Any]:
    """Return the queued requests in queue order."""
    rows = ledger.query_all(
        "SELECT fingerprint, params, state FROM requests WHERE queue_position IS NOT NULL ORDER BY queue_position"
    )
    return [(bytes(row[0]), *row[1:]) for row in rows]


def answer_queued(ledger: CommittingLedger, left_pending: int = 5) -> None:
    """Answer the queued requests except the last `but`; every third one is a miss."""
    for number in range(len(queued_requests(ledger)) - left_pending):
        ledger.settle(ledger.submit(f"task {number}"), FOUND if number % 3 else NO_MATCH)


@pytest.fixture
def ledger_location(postgres: servers.PostgresServer, tmp_path: Path) -> LedgerLocation:
    """Return a ledger location on the server: several processes can share a ledger only there."""
    return parse_ledger_location(tmp_path, postgres.ledger_url(), tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_enrollment_matches_single_process(
    tmp_path: Path, ledger: CommittingLedger, postgres: servers.PostgresServer, kind: str
) -> None:
    """Ray queues the same requests in the same order and skips the same rows for the same reasons."""
    write_input_files(tmp_path, kind, ["" if number % 30 == 7 else name for number, name in enumerate(NAMES)])
    rows = open_rows(tmp_path, "where: B <> '1'\ncaps: {by: country, max: 25}\n")
    selection = RequestSelection(max_per_group=25, limit=30)
    other = CommittingLedger.open(parse_ledger_location(tmp_path, postgres.ledger_url(), tmp_path))
    with closing(other.wrapped):
        ledger.start_execution()
        other.start_execution()
        height, of_rows = enroll_locally(rows, other, selection)
        found = enroll_blocks(tmp_path, rows, ledger, selection)
        assert (found.rows, found.row_decisions) == (height, {Decision(name): count for name, count in of_rows.items()})
        assert found.requests == height - sum(of_rows.values())
        assert sum(enroll.decision_counts(ledger.wrapped).values()) == sum(
            enroll.decision_counts(other.wrapped).values()
        )
        assert enroll.decision_counts(ledger.wrapped) == enroll.decision_counts(other.wrapped)
        assert queued_requests(ledger) == queued_requests(other) != []
        processes = (tmp_path / "seen").read_text().splitlines()
        assert len(processes) == len(set(processes)), "each process opens the ledger once"


def read_parts(folder: Path) -> list[list[str]]:
    """Read the rows of a dataset's parts, in order; a file of another name describes its columns."""
    return [row for part in sorted(folder.glob("part-*.parquet")) for row in read_table(part)[1:]]


def test_collection_matches_single_process(tmp_path: Path, ledger: CommittingLedger) -> None:
    """Ray writes the same table and counts; a price is on the first row of its request, even across blocks."""
    from enrich.cluster.engine import collect_on_ray  # noqa: PLC0415 - as above

    write_input_files(tmp_path)
    rows = open_rows(tmp_path, "where: B <> '1'\n")
    ledger.start_execution()
    enroll_locally(rows, ledger, RequestSelection())
    answer_queued(ledger)
    counted = collect_on_ray(
        rows, begin_enrollment(tmp_path, ledger, RequestSelection()), tmp_path / "out", monitor_heartbeats()
    )
    one = Collector(ledger.wrapped, TEMPLATE, rows)
    assert one.write(tmp_path / "one") == counted
    assert counted.statuses[RowStatus.PENDING]
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    assert len(parts) == 6
    assert read_parts(tmp_path / "out") == read_parts(tmp_path / "one") != []
    assert {part.stat().st_mode & 0o777 for part in parts} == {0o600}
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.usefixtures("bucket")
def test_reads_and_writes_object_storage(tmp_path: Path, ledger: CommittingLedger, kind: str) -> None:
    """Each task downloads the input it reads and uploads the part it writes."""
    from enrich.cluster.engine import collect_on_ray  # noqa: PLC0415 - as above

    write_input_files(tmp_path, kind)
    for path in (tmp_path / "leads").rglob(f"*.{kind}"):
        put_object(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    (tmp_path / "job.yaml").write_text(JOB.replace("leads/", f"s3://{BUCKET}/leads/"))
    rows = JobInput(load_job(tmp_path / "job.yaml"))
    ledger.start_execution()
    assert enroll_blocks(tmp_path, rows, ledger, RequestSelection()).rows == 150
    target = ObjectUrl("s3", BUCKET, "out/")
    for _ in range(2):
        counted = collect_on_ray(
            rows, begin_enrollment(tmp_path, ledger, RequestSelection()), target, monitor_heartbeats()
        )
        assert counted.statuses == {RowStatus.PENDING: 150}
    source = InputTable(target, Input(path=str(target)))
    written = pl.concat(source.batches())
    assert written["enrich_index"].to_list() == list(range(150))
    assert written["A"].to_list() == NAMES
    assert len(list(object_store.list_objects(target))) == len(source.input_files) + 1


def test_empty_dataset_has_columns(tmp_path: Path, ledger: CommittingLedger) -> None:
    """A dataset without rows still has all columns."""
    from enrich.cluster.engine import collect_on_ray  # noqa: PLC0415 - as above

    (tmp_path / "leads").mkdir()
    write_table(tmp_path / "leads" / "a.csv", ["A", "B"], [])
    rows = open_rows(tmp_path)
    ledger.start_execution()
    assert enroll_blocks(tmp_path, rows, ledger, RequestSelection()).rows == 0
    counted = collect_on_ray(
        rows, begin_enrollment(tmp_path, ledger, RequestSelection()), tmp_path / "out", monitor_heartbeats()
    )
    assert counted.statuses.total() == 0
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    assert read_table(part)[0][:3] == ["A", "B", "email"]


def test_input_errors_are_raised_unchanged(tmp_path: Path, ledger: CommittingLedger) -> None:
    """Errors name the file, the row and the remedy, without any mention of Ray; nothing is queued."""
    write_input_files(tmp_path, "csv")
    with (tmp_path / "leads" / "country=FR" / "2.csv").open("a") as file:
        file.write("one cell\n")
    rows = open_rows(tmp_path)
    with pytest.raises(CommandRefused, match=r"country=FR/2.csv: row 51 \(line 52\) has 1 cell") as caught:
        enroll_blocks(tmp_path, rows, ledger, RequestSelection())
    assert type(caught.value) is FileProblem
    write_input_files(tmp_path, "csv", [*NAMES[:-1], "7"])
    rows = open_rows(tmp_path, "where: CAST(A AS INT) > 1\n")
    with pytest.raises(JobError, match=r"job.yaml:6: where: cannot be computed") as failed:
        enroll_blocks(tmp_path, rows, ledger, RequestSelection())
    assert (failed.value.hint or "").startswith("cells are text")
    assert "person" not in f"{failed.value.message}{failed.value.hint}"


class InterruptedByTestError(Exception):
    """The error that a signal raises."""


def wait_in_block(flag: Path, rows: JobInput) -> int:
    """Touch `flag` to show that the work has begun, and wait; the first block does not wait."""
    if rows.first_position:
        flag.touch()
        time.sleep(60)
    return rows.first_position


def test_interrupt_does_not_wait_for_blocks(tmp_path: Path) -> None:
    """A signal takes effect at once, whatever the blocks are doing, and their tasks end."""
    from enrich.cluster.engine import map_blocks, split_input  # noqa: PLC0415 - as above

    write_input_files(tmp_path)
    rows = open_rows(tmp_path)
    flag = tmp_path / "begun"

    result: list[int] = []

    def check() -> None:
        if result and flag.exists():
            raise InterruptedByTestError

    watch = monitor_heartbeats(ClusterCallbacks(check))
    found = map_blocks(rows, split_input(rows, watch), partial(wait_in_block, flag), watch)
    result.append(next(found))
    with pytest.raises(InterruptedByTestError):
        result.append(next(found))
    import ray  # noqa: PLC0415 - as above

    wait_until(lambda: ray.available_resources().get("CPU") == 2, 30)


def kill_process_once(flag: Path, rows: JobInput) -> tuple[int, int]:
    """Kill this process in the middle of the first attempt."""
    height = sum(batch.frame.height for batch in rows.batches(TEMPLATE))
    if rows.first_position == 50 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return rows.first_position, height


def test_lost_block_is_retried(tmp_path: Path) -> None:
    """A lost block is retried and its result is returned once."""
    from enrich.cluster.engine import map_blocks, split_input  # noqa: PLC0415 - as above

    write_input_files(tmp_path)
    rows = open_rows(tmp_path)
    watch = monitor_heartbeats()
    result = sorted(map_blocks(rows, split_input(rows, watch), partial(kill_process_once, tmp_path / "flag"), watch))
    assert result == [(first, 25) for first in range(0, 150, 25)]
    assert (tmp_path / "flag").exists()


def kill_process(rows: JobInput) -> int:
    """Kill this process, as the system does when memory runs out."""
    if not rows.first_position:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows.first_position


def test_repeatedly_lost_block_fails(tmp_path: Path) -> None:
    """A block that is lost again and again fails instead of retrying for ever; the next run resumes."""
    from enrich.cluster.engine import map_blocks, split_input  # noqa: PLC0415 - as above

    write_input_files(tmp_path)
    rows, watch = open_rows(tmp_path), monitor_heartbeats()
    with pytest.raises(ClusterFailed, match="a task of the cluster was lost 4 times") as caught:
        list(map_blocks(rows, split_input(rows, watch), kill_process, watch))
    assert caught.value.hint == "has each machine memory enough?"


@pytest.fixture
def _full_cluster(_ray: None) -> Iterator[None]:
    """Let another user occupy the whole cluster."""
    import ray  # noqa: PLC0415 - as above

    held = ray.util.placement_group([{"CPU": 2}])
    ray.get(held.ready(), timeout=60)
    yield
    ray.util.remove_placement_group(held)


@pytest.mark.parametrize(("kind", "late"), [("parquet", False), ("csv", True)])  # CSV files are counted first
@pytest.mark.usefixtures("_full_cluster")
def test_full_cluster_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *, late: bool) -> None:
    """A full cluster is reported soon and times out, at once when the run is over time: it may stay full for hours."""
    from enrich.cluster import heartbeats  # noqa: PLC0415 - as above
    from enrich.cluster.engine import map_blocks, split_input  # noqa: PLC0415 - likewise

    monkeypatch.setattr(heartbeats, "WARN_AFTER_S", 1.0)
    monkeypatch.setattr(heartbeats, "CAPACITY_TIMEOUT_S", 60.0 if late else 3.0)
    write_input_files(tmp_path, kind)
    result: list[str] = []
    rows, watch = (
        open_rows(tmp_path),
        monitor_heartbeats(ClusterCallbacks(on_message=result.append, is_aborting=lambda: late)),
    )
    with pytest.raises(ClusterFailed, match=f"no task of the cluster ran for {1 if late else 3} s"):
        list(map_blocks(rows, split_input(rows, watch), partial(wait_in_block, tmp_path / "flag"), watch))
    assert len(result) == 1
    assert result[0].startswith("the cluster has no free capacity: waiting")


def test_slow_block_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow block is awaited however long it takes, even when the run is over time."""
    from enrich.cluster import heartbeats  # noqa: PLC0415 - as above
    from enrich.cluster.engine import map_blocks, split_input  # noqa: PLC0415 - likewise

    monkeypatch.setattr(heartbeats, "WARN_AFTER_S", 10.0)
    write_input_files(tmp_path)
    flag = tmp_path / "begun"
    rows, watch = open_rows(tmp_path), monitor_heartbeats(ClusterCallbacks(is_aborting=flag.exists))
    found = map_blocks(rows, split_input(rows, watch), partial(process_slowly, flag), watch)
    assert sorted(found) == list(range(0, 150, 25))


def process_slowly(flag: Path, rows: JobInput) -> int:
    """Take longer for the first block than no block may be at work; touch `flag` when it has begun."""
    if not rows.first_position:
        time.sleep(1)  # the first heartbeat arrives
        flag.touch()
        time.sleep(14)
    return rows.first_position


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_other_version_is_refused(tmp_path: Path, kind: str) -> None:
    """A worker with another version of enrich is refused: it might send other requests and pay for them."""
    from enrich.cluster.engine import map_blocks, split_input  # noqa: PLC0415 - as above

    write_input_files(tmp_path, kind)
    rows, watch = open_rows(tmp_path), monitor_heartbeats()
    watch.heartbeats = replace(watch.heartbeats, version="0.0.1")
    with pytest.raises(JobError, match=r"enrich 0\.0\.1 can't work with enrich"):
        list(map_blocks(rows, split_input(rows, watch), partial(wait_in_block, tmp_path / "flag"), watch))


def raise_unexpected(message: str, rows: JobInput) -> int:
    """Raise an unexpected error that quotes a row."""
    raise ValueError(f"{message} {next(rows.batches(TEMPLATE)).frame.row(0)}")


def test_unexpected_error_hides_cells(tmp_path: Path) -> None:
    """An unexpected error shows only its type and place; no cell appears in it or in Ray's logs."""
    from enrich.cluster.engine import map_blocks, split_input  # noqa: PLC0415 - as above

    write_input_files(tmp_path, names=["Nobody-Knows-Me"] * 150)
    rows, watch = open_rows(tmp_path), monitor_heartbeats()
    with pytest.raises(EnrichError, match=r"^a task of the cluster failed: ValueError at test_blocks\.py:\d+$"):
        list(map_blocks(rows, split_input(rows, watch), partial(raise_unexpected, "it was"), watch))
    import ray  # noqa: PLC0415 - as above

    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [path for path in (folder / "logs").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if b"Nobody-Knows-Me" in path.read_bytes()]


def test_enrollment_survives_database_restart(
    tmp_path: Path, own_postgres: servers.PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enrolling survives a restart of the database: unfinished blocks are done again."""
    from enrich.cluster import engine  # noqa: PLC0415 - as above
    from enrich.files import reader  # noqa: PLC0415 - likewise

    monkeypatch.setattr(reader, "ROWS_PER_PART", 2)
    monkeypatch.setattr(engine, "ROWS_PER_PART", 2)
    write_input_files(tmp_path)
    rows = open_rows(tmp_path)
    ledger = CommittingLedger.open(parse_ledger_location(tmp_path, own_postgres.ledger_url(), tmp_path))
    restarting: list[threading.Thread] = []
    map_blocks = engine.map_blocks

    def restart_after_first(*arguments: Any) -> Iterator[Any]:
        for counts in map_blocks(*arguments):
            if not restarting:
                restarting.append(threading.Thread(target=own_postgres.restart, args=("immediate",)))
                restarting[0].start()
            yield counts

    monkeypatch.setattr(engine, "map_blocks", restart_after_first)
    ledger.commit(enroll.begin_pass)
    found = engine.enroll_on_ray(
        rows, begin_enrollment(tmp_path, ledger, RequestSelection(), own_postgres.environ), monitor_heartbeats()
    )
    restarting[0].join()
    assert (found.rows, found.requests) == (150, 150)
    assert ledger.query_all("SELECT count(*) FROM requests") == [(40,)]
    assert ledger.query_all("SELECT count(*) FROM seen") == [(40,)]
    ledger.wrapped.close()


def test_missing_ledger_error(tmp_path: Path, ledger: CommittingLedger) -> None:
    """A missing ledger gives the same error and remedy as in one process."""
    from ray import cloudpickle  # noqa: PLC0415 - as above

    from enrich.cluster.engine import enroll_on_ray  # noqa: PLC0415 - as above

    write_input_files(tmp_path)
    rows = open_rows(tmp_path)
    (tmp_path / "none").touch()
    opening = partial(open_ledger_remotely, tmp_path / "none" / "ledger.db", {})
    enrollment = begin_enrollment(tmp_path, ledger, RequestSelection())
    broken = replace(enrollment, open_ledger=cloudpickle.dumps(opening))
    with pytest.raises(EnrichError) as caught:
        enroll_on_ray(rows, broken, monitor_heartbeats())
    assert "ledger" in caught.value.message
    assert isinstance(caught.value, CommandRefused | LedgerFailed)


CELLS: dict[str, Any] = {
    "text": ["a", None, ""],
    "^x.*$": ["007", "ö", "\n"],
    "whole": [1, None, -(2**62)],
    "float": [0.1, None, float("inf")],
    "truth": [True, None, False],
    "day": [date(2026, 1, 1), None, date(1, 1, 1)],
    "moment": [datetime(2026, 1, 1, 1, 2, 3, 456, UTC), None, datetime(1970, 1, 1, tzinfo=UTC)],
    "while": [timedelta(seconds=1), None, timedelta(days=-1)],
    "money": [Decimal("1.10"), None, Decimal("-2.00")],
    "bytes": [b"\0\xff", None, b""],
    "list": [["a", None], None, []],
    "struct": [{"x": 1, "y": ["z"]}, None, {"x": None, "y": None}],
    "nothing": [None, None, None],
}


def test_column_types_survive_blocks(tmp_path: Path) -> None:
    """A block has the columns of the file, with their types."""
    from enrich.cluster.engine import read_blocks  # noqa: PLC0415 - as above

    frame = pl.DataFrame(CELLS).with_columns(
        pl.Series("kind", ["x", None, "y"], pl.Enum(["x", "y"])),
        pl.Series("sort", ["x", None, "y"], pl.Categorical()),
        pl.Series("short", [0.1, None, 2.5], pl.Float32()),
        pl.Series("huge", [2**100, None, -1], pl.Int128()),
    )
    frame.write_parquet(tmp_path / "leads.parquet")
    (tmp_path / "job.yaml").write_text(JOB.replace("leads/", "leads.parquet").replace("a: A", "a: text"))
    rows = JobInput(load_job(tmp_path / "job.yaml"))
    ((first, back),) = read_blocks(tuple(input_parts(rows)), rows.full_table.input_schema)
    assert first == 0
    assert back.equals(frame)
    assert dict(back.schema) == rows.full_table.input_schema.all_columns


@pytest.mark.parametrize(("block_bytes", "expected"), [(1, [(25, 25), (50, 25), (75, 25)]), (1 << 20, [(25, 75)])])
def test_blocks_join_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, expected: list[tuple[int, int]]
) -> None:
    """Consecutive parts are read as one block up to its size; each block has the position of its first row."""
    from enrich.cluster import engine  # noqa: PLC0415 - as above

    monkeypatch.setattr(engine, "BLOCK_BYTES", block_bytes)
    write_input_files(tmp_path)
    rows = open_rows(tmp_path)
    found = list(engine.read_blocks(tuple(input_parts(rows)[1:4]), rows.full_table.input_schema))
    assert [(first, frame.height) for first, frame in found] == expected
    assert [name for _, frame in found for name in frame["A"]] == NAMES[25:100]


def test_errors_can_be_pickled() -> None:
    """Every error type is the same after pickling."""
    for error in (CommandRefused("a", "b"), FileProblem("a", "b"), JobError("a"), LedgerFailed("a", "b")):
        back = pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled two lines above
        assert (type(back), back.message, back.hint) == (type(error), error.message, error.hint)
