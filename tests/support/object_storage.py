"""Object storage for tests: an S3 server on loopback with one bucket."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast
from unittest.mock import patch

import httpx

from enrich.files import object_store
from enrich.job.locations import ObjectUrl

SECRET = "not-to-be-shown"
BUCKET = "leads"


@contextmanager
def serve_s3() -> Iterator[str]:
    """Serve S3 on loopback."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - slow to import, and most tests don't need it

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


def storage_environ(endpoint: str) -> dict[str, str]:
    """Return the variables that point a program to the server."""
    variables = {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    return variables | {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET}


@contextmanager
def make_bucket(endpoint: str) -> Iterator[dict[str, str]]:
    """Make a new bucket and point this process to the server."""
    variables = storage_environ(endpoint)
    with httpx.Client(base_url=endpoint, verify=False, trust_env=False, timeout=60) as http:  # noqa: S501
        http.post("/moto-api/reset")
        http.put(f"/{BUCKET}").raise_for_status()
    with patch.dict(os.environ, variables):
        yield variables


def put_object(key: str, content: bytes) -> ObjectUrl:
    """Store an object."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        url = ObjectUrl("s3", BUCKET, key)
        object_store.upload(url, cast("BinaryIO", file))
    return url


def download_object(folder: Path, key: str) -> Path:
    """Download an object."""
    path = folder / key.rpartition("/")[2]
    with path.open("wb") as file:
        object_store.download(ObjectUrl("s3", BUCKET, key), file)
    return path
