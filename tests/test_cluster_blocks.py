"""Enrolling and collecting on Ray: the same as in one process, whatever is lost on the way."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pytest

from enrich.collector import Collector
from enrich.engine import Boss
from enrich.errors import ClusterFailed, EnrichError, JobError, LedgerFailed, Refused
from enrich.job import load_job
from enrich.model import Call, Decision, RowStatus, Wish
from enrich.place import LedgerPlace, Url, locate_ledger
from enrich.question import Question
from enrich.rows import Rows
from enrich.spec import Input
from enrich.store.ledger import Ledger
from enrich.tables import storage
from enrich.tables.source import Source
from tests import postgres as servers
from tests.books import FOUND, MISSED, Books
from tests.buckets import BUCKET, pointing_to, put
from tests.harness import until
from tests.tables import load, save

# Ray warns of what Ray does.
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUESTION = Question(Call("email_getter", (833,)), ("a",), (), {"email": "email"}, None)
JOB = "version: 1\nwaterfall: email_getter\nparams: {a: A}\ninput: leads/\noutput: out/\n"
NAMES = [f"person {number % 40}" for number in range(150)]


@pytest.fixture(scope="module")
def _ray(endpoint: str) -> Iterator[None]:
    """Start Ray on this machine, with two processes at work that find the storage."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # noqa: PLC0415 - it reads its settings when it is imported

    with patch.dict(os.environ, pointing_to(endpoint)):
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=100 << 20,
        )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _small_blocks(_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide even small inputs."""
    from enrich.cluster import source  # noqa: PLC0415 - as above
    from enrich.tables import parts  # noqa: PLC0415 - likewise

    monkeypatch.setattr(parts, "ROWS", 25)
    monkeypatch.setattr(source, "ROWS", 25)


def opened(place: LedgerPlace, environ: dict[str, str], seen: Path | None = None) -> Ledger:
    """Open a ledger in a process of Ray, which was started before the server, and write down that it did."""
    os.environ.update(environ)
    if seen is not None:
        with seen.open("a") as file:
            file.write(f"{os.getpid()}\n")
    return Ledger(place)


def lay(folder: Path, kind: str = "parquet", names: Sequence[str] = NAMES) -> None:
    """Write leads in three files."""
    for number, country in enumerate(("DE", "DE", "FR")):
        path = folder / "leads" / f"country={country}" / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, ["A", "B"], [[name, f"{number}"] for name in names[number * 50 : (number + 1) * 50]])


def rows_of(folder: Path, more: str = "") -> Rows:
    """Open the leads of a job."""
    (folder / "job.yaml").write_text(JOB + more)
    return Rows(load_job(folder / "job.yaml"))


def taken(folder: Path, books: Books, wish: Wish, environ: dict[str, str] | None = None) -> Any:
    """Make the pass that blocks take part in."""
    from enrich.cluster.blocks import Pass  # noqa: PLC0415 - as above

    opening = partial(opened, books.place, environ or {"PGPASSWORD": os.environ["PGPASSWORD"]}, folder / "seen")
    return Pass(load_job(folder / "job.yaml"), QUESTION, wish, opening)


def watching(boss: Boss | None = None) -> Any:
    """Watch over a step."""
    from enrich.cluster.presence import Presence, Watch, new_ear  # noqa: PLC0415 - as above

    return Watch(Presence(new_ear()), boss or Boss())


def alone(rows: Rows, books: Books, wish: Wish) -> tuple[int, Counter[str]]:
    """Enroll in this process."""
    of_rows: Counter[str] = Counter()
    height = 0
    with books.ledger.transaction():
        books.ledger.begin_pass(wish)
        for batch in rows.batches(QUESTION):
            books.ledger.enroll(QUESTION.call, batch.asked())
            of_rows.update(status.value for status in batch.statuses if status is not None)
            height += batch.frame.height
        books.ledger.choose()
        books.ledger.mark()
    return height, of_rows


def together(folder: Path, rows: Rows, books: Books, wish: Wish, **options: Any) -> Any:
    """Enroll on Ray."""
    from enrich.cluster.enroll import enroll_on_ray  # noqa: PLC0415 - as above

    books.do(Ledger.begin_pass, wish)
    found = enroll_on_ray(rows, taken(folder, books, wish), watching(), **options)
    with books.ledger.transaction():
        books.ledger.choose()
        books.ledger.mark()
    return found


def queue_of(books: Books) -> list[Any]:
    """Look at what is to be asked, in its order."""
    rows = books.all("SELECT fingerprint, params, state FROM requests WHERE position IS NOT NULL ORDER BY position")
    return [(bytes(row[0]), *row[1:]) for row in rows]


def answer(books: Books, but: int = 5) -> None:
    """Answer what is in the queue, each third a miss; leave the last."""
    for number in range(len(queue_of(books)) - but):
        books.settle(books.submit(f"task {number}"), FOUND if number % 3 else MISSED)


@pytest.fixture
def place(postgres: servers.Postgres, tmp_path: Path) -> LedgerPlace:
    """Name the place of a ledger: several processes share one only on a server."""
    return locate_ledger(tmp_path, postgres.url(), tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_cluster_enrolls_what_one_process_enrolls(
    tmp_path: Path, books: Books, postgres: servers.Postgres, kind: str
) -> None:
    """The same requests in the same order, the same left out and for the same reasons."""
    lay(tmp_path, kind, ["" if number % 30 == 7 else name for number, name in enumerate(NAMES)])
    rows = rows_of(tmp_path, "where: B <> '1'\ncaps: {by: country, max: 25}\n")
    wish = Wish(max_per_group=25, limit=30)
    other = Books.open(locate_ledger(tmp_path, postgres.url(), tmp_path))
    with closing(other.ledger):
        books.start()
        other.start()
        height, of_rows = alone(rows, other, wish)
        told: list[int] = []
        found = together(tmp_path, rows, books, wish, tell=lambda so_far: told.append(so_far.rows))
        assert (found.rows, found.of_rows) == (height, {Decision(name): count for name, count in of_rows.items()})
        assert found.asked == height - sum(of_rows.values())
        assert sum(books.ledger.decided().values()) == sum(other.ledger.decided().values())
        assert books.ledger.decided() == other.ledger.decided()
        assert queue_of(books) == queue_of(other) != []
        assert told == sorted(told)
        assert told[-1] == 150
        processes = (tmp_path / "seen").read_text().splitlines()
        assert len(processes) == len(set(processes)), "each process opens the ledger once"


def test_a_cluster_collects_what_one_process_collects(tmp_path: Path, books: Books) -> None:
    """The same table, and the same counts; a price stands on the first row that asked, wherever the others are."""
    from enrich.cluster.collect import collect_on_ray  # noqa: PLC0415 - as above

    lay(tmp_path)
    rows = rows_of(tmp_path, "where: B <> '1'\n")
    books.start()
    alone(rows, books, Wish())
    answer(books)
    told: list[int] = []
    counted = collect_on_ray(
        rows,
        taken(tmp_path, books, Wish()),
        tmp_path / "out",
        watching(),
        tell=lambda so_far: told.append(so_far.statuses.total()),
    )
    one = Collector(books.ledger, load_job(tmp_path / "job.yaml"), QUESTION, rows)
    assert one.write(tmp_path / "one") == counted
    assert counted.statuses[RowStatus.PENDING]
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    assert len(parts) == len(told) == 6
    assert [row for part in parts for row in load(part)[1:]] == load(next((tmp_path / "one").glob("*.parquet")))[1:]
    assert {part.stat().st_mode & 0o777 for part in parts} == {0o600}
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.usefixtures("bucket")
def test_a_cluster_reads_from_a_storage_and_writes_to_one(tmp_path: Path, books: Books, kind: str) -> None:
    """Every task fetches what it reads, and sends what it writes."""
    from enrich.cluster.collect import collect_on_ray  # noqa: PLC0415 - as above

    lay(tmp_path, kind)
    for path in (tmp_path / "leads").rglob(f"*.{kind}"):
        put(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    (tmp_path / "job.yaml").write_text(JOB.replace("leads/", f"s3://{BUCKET}/leads/"))
    rows = Rows(load_job(tmp_path / "job.yaml"))
    books.start()
    assert together(tmp_path, rows, books, Wish()).rows == 150
    target = Url("s3", BUCKET, "out/")
    for _ in range(2):
        counted = collect_on_ray(rows, taken(tmp_path, books, Wish()), target, watching())
        assert counted.statuses == {RowStatus.PENDING: 150}
    source = Source(target, Input(path=str(target)))
    written = pl.concat(source.batches())
    assert written["enrich_index"].to_list() == list(range(150))
    assert written["A"].to_list() == NAMES
    assert len(list(storage.below(target))) == len(source.leaves) + 1


def test_no_rows_are_a_dataset_too(tmp_path: Path, books: Books) -> None:
    """With its columns."""
    from enrich.cluster.collect import collect_on_ray  # noqa: PLC0415 - as above

    (tmp_path / "leads").mkdir()
    save(tmp_path / "leads" / "a.csv", ["A", "B"], [])
    rows = rows_of(tmp_path)
    books.start()
    assert together(tmp_path, rows, books, Wish()).rows == 0
    counted = collect_on_ray(rows, taken(tmp_path, books, Wish()), tmp_path / "out", watching())
    assert counted.statuses.total() == 0
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    assert load(part)[0][:3] == ["A", "B", "email"]


def test_what_is_wrong_with_the_input_is_raised_as_it_is(tmp_path: Path, books: Books) -> None:
    """With its file, its row and its remedy, and no word of Ray; nothing is queued."""
    lay(tmp_path, "csv")
    with (tmp_path / "leads" / "country=FR" / "2.csv").open("a") as file:
        file.write("one cell\n")
    rows = rows_of(tmp_path)
    with pytest.raises(Refused, match=r"country=FR/2.csv: row 51 \(line 52\) has 1 cell") as caught:
        together(tmp_path, rows, books, Wish())
    assert type(caught.value) is Refused
    lay(tmp_path, "csv", [*NAMES[:-1], "7"])
    rows = rows_of(tmp_path, "where: CAST(A AS INT) > 1\n")
    with pytest.raises(JobError, match=r"job.yaml:6: where: cannot be computed") as failed:
        together(tmp_path, rows, books, Wish())
    assert (failed.value.hint or "").startswith("cells are text")
    assert "person" not in f"{failed.value.message}{failed.value.hint}"


def test_what_cannot_be_divided_is_refused(tmp_path: Path, books: Books) -> None:
    """The caller does it in one process."""
    from enrich.cluster.collect import collect_on_ray  # noqa: PLC0415 - as above

    lay(tmp_path)
    for more in ("dedupe: false\n", "order_by: B\n"):
        with pytest.raises(Refused, match=r"can't be enrolled part by part: `(dedupe|order_by)"):
            together(tmp_path, rows_of(tmp_path, more), books, Wish())
    rows = rows_of(tmp_path, "dedupe: false\n")
    with pytest.raises(Refused, match="can't be collected part by part: `dedupe"):
        collect_on_ray(rows, taken(tmp_path, books, Wish()), tmp_path / "out", watching())


class GivenUpError(Exception):
    """What a signal raises."""


def wait_there(flag: Path, rows: Rows) -> int:
    """Be slow but for the first block: say that the work has begun, and wait."""
    if rows.first:
        flag.touch()
        time.sleep(60)
    return rows.first


def test_who_gives_up_does_not_wait(tmp_path: Path) -> None:
    """A signal is heard within a moment, whatever the blocks are at; their tasks end."""
    from enrich.cluster.blocks import divided, on_blocks  # noqa: PLC0415 - as above

    lay(tmp_path)
    rows = rows_of(tmp_path)
    flag = tmp_path / "begun"

    done: list[int] = []

    def check() -> None:
        if done and flag.exists():
            raise GivenUpError

    watch = watching(Boss(check))
    found = on_blocks(rows, divided(rows, watch), partial(wait_there, flag), watch)
    done.append(next(found))
    with pytest.raises(GivenUpError):
        done.append(next(found))
    import ray  # noqa: PLC0415 - as above

    until(lambda: ray.available_resources().get("CPU") == 2, 30)


def die_once(flag: Path, rows: Rows) -> tuple[int, int]:
    """Be killed in the middle, the first time."""
    height = sum(batch.frame.height for batch in rows.batches(QUESTION))
    if rows.first == 50 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return rows.first, height


def test_a_block_is_done_again_when_its_process_is_lost(tmp_path: Path) -> None:
    """What comes of it is told once."""
    from enrich.cluster.blocks import divided, on_blocks  # noqa: PLC0415 - as above

    lay(tmp_path)
    rows = rows_of(tmp_path)
    watch = watching()
    done = sorted(on_blocks(rows, divided(rows, watch), partial(die_once, tmp_path / "flag"), watch))
    assert done == [(first, 25) for first in range(0, 150, 25)]
    assert (tmp_path / "flag").exists()


def die(rows: Rows) -> int:
    """Be killed, as for want of memory."""
    if rows.first < 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows.first


def test_a_block_that_ends_its_process_again_and_again_is_given_up(tmp_path: Path) -> None:
    """It would never come to an end; the next run resumes."""
    from enrich.cluster.blocks import divided, on_blocks  # noqa: PLC0415 - as above

    lay(tmp_path)
    rows, watch = rows_of(tmp_path), watching()
    with pytest.raises(ClusterFailed, match=r"0\.parquet from row (1|26) on was lost 4 times"):
        list(on_blocks(rows, divided(rows, watch), die, watch))


@pytest.fixture
def _no_room(_ray: None) -> Iterator[None]:
    """Let others have all of the cluster."""
    import ray  # noqa: PLC0415 - as above

    held = ray.util.placement_group([{"CPU": 2}])
    ray.get(held.ready(), timeout=60)
    yield
    ray.util.remove_placement_group(held)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.usefixtures("_no_room")
def test_a_cluster_that_has_no_room_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *, late: bool
) -> None:
    """It is told soon, and at once when the time is up; others may need the machines the whole night."""
    from enrich.cluster import presence  # noqa: PLC0415 - as above
    from enrich.cluster.blocks import divided, on_blocks  # noqa: PLC0415 - likewise

    monkeypatch.setattr(presence, "ROOM_S", 1.0)
    monkeypatch.setattr(presence, "NO_ROOM_S", 60.0 if late else 3.0)
    lay(tmp_path, kind)
    told: list[str] = []
    rows, watch = rows_of(tmp_path), watching(Boss(tell=told.append, late=lambda: late))
    with pytest.raises(ClusterFailed, match=f"nobody in the cluster was at work for {1 if late else 3} s"):
        list(on_blocks(rows, divided(rows, watch), partial(wait_there, tmp_path / "flag"), watch))
    assert len(told) == 1
    assert told[0].startswith("the cluster has no room for the input: waiting")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_who_is_at_work_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """However long a block takes, and though it is late."""
    from enrich.cluster import presence  # noqa: PLC0415 - as above
    from enrich.cluster.blocks import divided, on_blocks  # noqa: PLC0415 - likewise

    monkeypatch.setattr(presence, "ROOM_S", 15.0)
    lay(tmp_path, kind)
    rows, watch = rows_of(tmp_path), watching(Boss(late=lambda: True))
    assert sorted(on_blocks(rows, divided(rows, watch), take_long, watch))


def take_long(rows: Rows) -> int:
    """Be slow with one block."""
    time.sleep(0 if rows.first else 18)
    return rows.first


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_another_version_does_no_block(tmp_path: Path, kind: str) -> None:
    """It might ask other questions, and pay for them."""
    from enrich.cluster.blocks import divided, on_blocks  # noqa: PLC0415 - as above

    lay(tmp_path, kind)
    rows, watch = rows_of(tmp_path), watching()
    watch.presence = replace(watch.presence, version="0.0.1")
    with pytest.raises(JobError, match=r"enrich 0\.0\.1 can't work with enrich"):
        list(on_blocks(rows, divided(rows, watch), partial(wait_there, tmp_path / "flag"), watch))


def fail(how: str, rows: Rows) -> int:
    """Fail as nobody foresaw."""
    raise ValueError(f"{how} {next(rows.batches(QUESTION)).frame.row(0)}")


def test_a_failure_that_nobody_foresaw_tells_no_cell(tmp_path: Path) -> None:
    """Only what it is and where it was: neither here nor in the logs of Ray is there a person."""
    from enrich.cluster.blocks import divided, on_blocks  # noqa: PLC0415 - as above

    lay(tmp_path, names=["Nobody-Knows-Me"] * 150)
    rows, watch = rows_of(tmp_path), watching()
    with pytest.raises(EnrichError, match=r"^a task of the cluster failed: ValueError at test_cluster_blocks.py:\d+$"):
        list(on_blocks(rows, divided(rows, watch), partial(fail, "it was"), watch))
    import ray  # noqa: PLC0415 - as above

    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [path for path in (folder / "logs").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if b"Nobody-Knows-Me" in path.read_bytes()]


def test_enrolling_survives_a_restart_of_the_database(
    tmp_path: Path, own_postgres: servers.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was in the middle is done again."""
    from enrich.cluster import source  # noqa: PLC0415 - as above
    from enrich.tables import parts  # noqa: PLC0415 - likewise

    monkeypatch.setattr(parts, "ROWS", 2)
    monkeypatch.setattr(source, "ROWS", 2)
    lay(tmp_path)
    rows = rows_of(tmp_path)
    books = Books.open(locate_ledger(tmp_path, own_postgres.url(), tmp_path))
    restarting: list[threading.Thread] = []

    def restart(_: object) -> None:
        if not restarting:
            restarting.append(threading.Thread(target=own_postgres.restart, args=("immediate",)))
            restarting[0].start()

    from enrich.cluster.enroll import enroll_on_ray  # noqa: PLC0415 - as above

    books.do(Ledger.begin_pass, Wish())
    found = enroll_on_ray(rows, taken(tmp_path, books, Wish(), own_postgres.environ), watching(), tell=restart)
    restarting[0].join()
    assert (found.rows, found.asked) == (150, 150)
    assert books.all("SELECT count(*) FROM requests") == [(40,)]
    assert books.all("SELECT count(*) FROM seen") == [(40,)]
    books.ledger.close()


def test_a_ledger_that_is_gone_is_told(tmp_path: Path, books: Books) -> None:
    """As in one process, with what to do."""
    from enrich.cluster.enroll import enroll_on_ray  # noqa: PLC0415 - as above

    lay(tmp_path)
    rows = rows_of(tmp_path)
    (tmp_path / "none").touch()
    opening = partial(opened, tmp_path / "none" / "ledger.db", {})
    broken = replace(taken(tmp_path, books, Wish()), opening=opening)
    with pytest.raises(EnrichError) as caught:
        enroll_on_ray(rows, broken, watching())
    assert "ledger" in caught.value.message
    assert isinstance(caught.value, Refused | LedgerFailed)


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


def test_every_type_comes_through_a_block(tmp_path: Path) -> None:
    """As it went in, whatever Arrow calls it."""
    from enrich.cluster.source import PartSource, from_block, read, to_block  # noqa: PLC0415 - as above
    from enrich.tables.cells import json_column  # noqa: PLC0415 - likewise

    frame = pl.DataFrame(CELLS).with_columns(
        pl.Series("kind", ["x", None, "y"], pl.Enum(["x", "y"])),
        pl.Series("sort", ["x", None, "y"], pl.Categorical()),
        pl.Series("short", [0.1, None, 2.5], pl.Float32()),
        pl.Series("huge", [2**100, None, -1], pl.Int128()),
        json_column(["1.0", None, "[1,2]"]).alias("json"),
    )
    schema = dict(frame.schema)
    ((first, back),) = from_block(to_block(7, frame), schema)
    assert first == 7
    assert back.equals(frame)
    assert back.schema == frame.schema
    frame.drop("json").write_parquet(tmp_path / "leads.parquet")
    (tmp_path / "job.yaml").write_text(JOB.replace("leads/", "leads.parquet").replace("a: A", "a: text"))
    rows = Rows(load_job(tmp_path / "job.yaml"))
    import ray  # noqa: PLC0415 - as above

    presence = watching().presence
    dataset = ray.data.read_datasource(PartSource(rows.parts(), rows.shape, presence), override_num_blocks=1)
    block = ray.get(next(iter(dataset.iter_internal_ref_bundles())).block_refs[0])
    ((_, back),) = from_block(block, rows.known)
    assert back.equals(frame.drop("json"))
    assert next(read((rows.parts()[0],), rows.shape, presence)).num_rows == 3


def test_blocks_that_were_put_together_are_taken_apart() -> None:
    """Each stretch of rows that follow one another has its place."""
    import pyarrow as pa  # noqa: PLC0415 - comes with Ray

    from enrich.cluster.source import failure, from_block, to_block  # noqa: PLC0415 - as above

    schema = {"A": pl.String()}
    blocks = [to_block(first, pl.DataFrame({"A": [f"{first}", "x"]})) for first in (4, 6, 2)]
    found = [(first, frame["A"].to_list()) for first, frame in from_block(pa.concat_tables(blocks), schema)]
    assert found == [(4, ["4", "x", "6", "x"]), (2, ["2", "x"])]
    assert list(from_block(to_block(0, pl.DataFrame(schema=schema)), schema)) == []
    mixed = pa.concat_tables([*blocks, failure(Refused("the file is gone", "look"))], promote_options="default")
    with pytest.raises(Refused, match="the file is gone") as caught:
        list(from_block(mixed, schema))
    assert caught.value.hint == "look"


def test_what_travels_can_be_packed() -> None:
    """Every error comes back as it was."""
    for error in (Refused("a", "b"), JobError("a"), LedgerFailed("a", "b")):
        back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
        assert (type(back), back.message, back.hint) == (type(error), error.message, error.hint)


QUIET = """
import os
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from enrich.cluster.connection import connected
from enrich.cluster.enroll import enroll_on_ray
from enrich.cluster.blocks import Pass
from enrich.model import Wish
from enrich.spec import Input
from enrich.store.ledger import Ledger
from enrich.tables import storage
from enrich.tables.source import Source
from tests.test_cluster_blocks import QUESTION, opened, rows_of, watching
from enrich.job import load_job
import sys

folder = Path(sys.argv[1])
rows = rows_of(folder)
Ledger(folder / "quiet.db").close()
with connected(None):
    taken = Pass(load_job(folder / "job.yaml"), QUESTION, Wish(), partial(opened, folder / "quiet.db", {}))
    assert enroll_on_ray(rows, taken, watching()).rows == 150
"""


def test_nothing_is_said_on_the_terminal(tmp_path: Path) -> None:
    """Neither a bar nor a log line: success is silent."""
    lay(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path)], capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
