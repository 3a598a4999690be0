"""Objects in a storage of the cloud (S3, Google, Azure); credentials and endpoint come from its usual variables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, BinaryIO

from enrich.errors import JobError, Refused
from enrich.place import Url

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

Stamp = tuple[str | None, int, str]
_CODE = re.compile(r"<Code>(\w+)</Code>|status code: (\d+ [A-Z][\w ]*\w)")
#: Without credentials the machine itself is asked for them, as in a data centre.
_NO_CREDENTIALS = re.compile(r"169\.254\.|/latest/api/token|metadata\.google|MissingAccount|MissingCredentials")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def fetch(url: Url, into: BinaryIO) -> Stamp:
    """Copy an object to a file. Raises Refused."""
    store = _store(url)
    with _told(url):
        got = store.get(url.key)
        into.writelines(got.stream())
        return _stamp(got.meta)


def fetch_range(url: Url, start: int, length: int) -> bytes:
    """Return some bytes of an object. Raises Refused."""
    store = _store(url)
    with _told(url):
        return bytes(store.get_range(url.key, start=start, length=length))


def stamp(url: Url) -> Stamp | None:
    """Return what tells one content of an object from another; None when it is gone. Raises Refused."""
    store = _store(url)
    with _told(url):
        try:
            return _stamp(store.head(url.key))
        except FileNotFoundError:
            return None


def below(url: Url) -> Iterator[tuple[str, Stamp]]:
    """Yield the keys below a folder, each with what tells one content from another. Raises Refused."""
    store = _store(url)
    with _told(url):
        for some in store.list(url.key.rstrip("/") or None):
            yield from ((meta["path"], _stamp(meta)) for meta in some)


def read(url: Url) -> bytes | None:
    """Return a small object as a whole; None when it is not there. Raises Refused."""
    store = _store(url)
    with _told(url):
        try:
            return bytes(store.get(url.key).bytes())
        except FileNotFoundError:
            return None


def remove(url: Url, keys: list[str]) -> None:
    """Remove objects of a bucket. Raises Refused."""
    store = _store(url)
    if keys:
        with _told(url):
            store.delete(keys)


def check(url: Url) -> None:
    """Ask for the bucket before anything is spent. Raises Refused when it is not there or refuses us."""
    store = _store(url)
    with _told(url):
        next(iter(store.list(url.key)), None)


def send(url: Url, file: BinaryIO) -> None:
    """Copy a file to an object, which appears whole or not at all. Raises Refused."""
    store = _store(url)
    with _told(url):
        store.put(url.key, file)


def _stamp(meta: ObjectMeta) -> Stamp:
    return meta["e_tag"], meta["size"], meta["last_modified"].isoformat()


def _store(url: Url) -> ObjectStore:
    try:
        from obstore.store import from_url  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise JobError(f"{url}: storage URLs need their extra", "pip install 'databar-enrich[storage]'") from None
    plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    with _told(url):
        return from_url(
            f"{url.scheme}://{url.bucket}",
            client_options={"connect_timeout": "10s", "timeout": "10m", "allow_http": plain},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(minutes=1)},
        )


@contextmanager
def _told(url: Url) -> Iterator[None]:
    """Tell what went wrong by its code alone: the storage's own words may hold what is secret."""
    from obstore.exceptions import BaseError  # noqa: PLC0415 - an extra

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        words = str(error)
        code = next((next(filter(None, found)) for found in _CODE.findall(words)), "")
        credentials = f"set {_CREDENTIALS[url.scheme]}"
        if "NoSuchBucket" in words:
            told = Refused(f"{url}: there is no bucket `{url.bucket}`", "check the URL and the region")
        elif isinstance(error, FileNotFoundError):
            told = Refused(f"{url} does not exist", "check the URL")
        elif _NO_CREDENTIALS.search(words):
            told = Refused(f"{url}: there are no credentials for the storage", credentials)
        elif re.search(r"status code: 40[13]", words):
            told = Refused(f"{url}: the storage refuses these credentials ({code})", credentials)
        elif "BadScheme" in words:
            told = Refused(f"{url}: the endpoint has no TLS", "if that is meant, set AWS_ALLOW_HTTP=true")
        elif re.search(r"kind: (Connect|Timeout)|error sending request", words):
            told = Refused(f"{url}: the storage cannot be reached", "check the network and the endpoint")
        else:
            told = Refused(f"{url}: the storage failed ({code or type(error).__name__})", credentials)
        raise told from None
