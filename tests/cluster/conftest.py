"""One Ray cluster for all tests that need not start or end one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.postgres import PostgresServer
from tests.support.ray_head import RayHead, start_ray_head


@pytest.fixture(scope="session")
def ray_head(endpoint: str, _shared_postgres: PostgresServer) -> Iterator[RayHead]:
    """Start a cluster whose processes reach the shared database and the object storage."""
    from tests.support.object_storage import storage_environ  # noqa: PLC0415 - slow to import

    with start_ray_head(_shared_postgres.environ | storage_environ(endpoint)) as head:
        yield head
