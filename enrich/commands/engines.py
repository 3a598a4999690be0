"""The options that say who carries a run's work: this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from enrich.errors import JobError
from enrich.job.locations import STDIN, PostgresLocation

if TYPE_CHECKING:
    from enrich.job.job import Job
    from enrich.run.cluster import ClusterEngine
    from enrich.run.context import ClusterOptions


def _check_address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Read HOST:PORT."""
    if value is not None and not value.rpartition(":")[2].isdecimal():
        raise click.BadParameter("must be HOST:PORT, as `ray start --head` prints it")
    if value is not None and "://" in value:
        raise click.BadParameter("must be HOST:PORT without `ray://`: run it on a machine of the cluster")
    return value


ENGINE_OPTIONS = (
    click.option("--engine", type=click.Choice(["ray"]), help="Let Ray carry the work; the ledger is in PostgreSQL."),
    click.option(
        "--address", callback=_check_address, metavar="HOST:PORT", help="The Ray cluster; default: one on this machine."
    ),
    click.option("--workers", type=click.IntRange(min=1), help="Actors of Ray that send and poll; default: the CPUs."),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say who carries its work."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


def make_cluster_options(
    job: Job, engine: str | None, address: str | None, workers: int | None
) -> ClusterOptions | None:
    """Put together over what the work is spread; None: this machine alone. Raises JobError when it can't be."""
    from enrich.run.context import ClusterOptions

    if engine is None:
        if address is not None or workers is not None:
            raise click.UsageError("--address and --workers are for --engine ray")
        return None
    if not isinstance(job.ledger, PostgresLocation):
        message = f"--engine ray needs a ledger that all workers reach, and this is a file: {job.ledger}"
        raise job.error(["ledger"], message, "keep it in PostgreSQL: `ledger: postgresql://host/database`")
    if address is not None and job.input_path == STDIN:
        raise click.UsageError("what comes through a pipe is not seen by the machines at --address: put it into a file")
    if find_spec("ray") is None:
        raise JobError("--engine ray needs the extra `cluster`", "pip install 'databar-enrich[cluster]'")
    return ClusterOptions(address, workers)


@contextmanager
def open_engine(job: Job, cluster: ClusterOptions | None) -> Iterator[ClusterEngine | None]:
    """Have a Ray cluster at work while the block runs. Raises ClusterFailed when it can't be reached or started."""
    if cluster is None or not isinstance(job.ledger, PostgresLocation):
        yield None
        return
    from enrich.cluster.connection import connect_ray

    with connect_ray(cluster.address) as cpus:
        from enrich.cluster.engine import RayCluster

        yield RayCluster(job.ledger, cluster.workers or cpus)
