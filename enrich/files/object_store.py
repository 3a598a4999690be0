"""Accesses object storage (S3, Google, Azure). Credentials and endpoint come from the standard variables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, BinaryIO

from enrich.errors import CommandRefused, needs_extra
from enrich.files.atomic import recovery_hint
from enrich.job.locations import ObjectUrl

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

ObjectVersion = tuple[str | None, int, str]
_ERROR_CODE = re.compile(r"<Code>(\w+)</Code>|status code: (\d+ [A-Z][\w ]*\w)")
#: Without credentials, obstore queries the metadata server of a cloud machine. These errors mean that this failed.
_NO_CREDENTIALS = re.compile(r"169\.254\.|/latest/api/token|metadata\.google|MissingAccount|MissingCredentials")
_UNUSABLE_CREDENTIALS = re.compile(r"(?:Open|Decode)Credentials|ReadPem|InvalidAccessKey|SasComponent|DecodeSasKey")
CREDENTIAL_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def download(url: ObjectUrl, into: BinaryIO) -> ObjectVersion:
    """Copy an object to a file and return its version. Raises CommandRefused."""
    with _open_store(url) as store:
        result = store.get(url.key)
        into.writelines(result.stream())
        return _version_of(result.meta)


def download_range(url: ObjectUrl, start: int, length: int) -> bytes:
    """Return a byte range of an object. Raises CommandRefused."""
    with _open_store(url) as store:
        return bytes(store.get_range(url.key, start=start, length=length))


def object_version(url: ObjectUrl) -> ObjectVersion | None:
    """Return the version of an object, which changes with its content. None if it is missing. Raises CommandRefused."""
    with _open_store(url) as store:
        try:
            return _version_of(store.head(url.key))
        except FileNotFoundError:
            return None


def list_objects(url: ObjectUrl) -> Iterator[tuple[str, ObjectVersion]]:
    """Yield the keys in a folder (recursively), each with the object's version. Raises CommandRefused.

    Consoles and other programs mark a folder by an empty object, which has no file extension and is left out.
    """
    with _open_store(url) as store:
        for page in store.list(url.key.rstrip("/") or None):
            for meta in page:
                if meta["size"] or "." in meta["path"].rpartition("/")[2]:
                    yield meta["path"], _version_of(meta)


def read_object(url: ObjectUrl) -> bytes | None:
    """Return the content of a small object. None if it does not exist. Raises CommandRefused."""
    with _open_store(url) as store:
        try:
            return bytes(store.get(url.key).bytes())
        except FileNotFoundError:
            return None


def delete_objects(url: ObjectUrl, keys: list[str]) -> None:
    """Delete objects of a bucket by their keys. Raises CommandRefused."""
    if keys:
        with _open_store(url) as store:
            store.delete(keys)


def check_bucket(url: ObjectUrl) -> None:
    """Check access to the bucket before any credits are spent. Raises CommandRefused if it is missing or denied."""
    with _open_store(url) as store:
        next(iter(store.list(url.key)), None)


def upload(url: ObjectUrl, file: BinaryIO, kind: str = "output") -> None:
    """Copy a file of the run to an object atomically. `kind` is its key in the job file. Raises CommandRefused."""
    file.seek(0)
    try:
        with _open_store(url) as store:
            store.put(url.key, file)
    except CommandRefused as error:
        raise CommandRefused(error.message, recovery_hint(error.hint, kind)) from error


def _version_of(meta: ObjectMeta) -> ObjectVersion:
    return meta["e_tag"], meta["size"], meta["last_modified"].isoformat()


@contextmanager
def _open_store(url: ObjectUrl) -> Iterator[ObjectStore]:
    """Open the bucket for the block. Storage errors become CommandRefused: a code, as texts may have secrets."""
    with needs_extra("storage", f"{url}: object storage is not installed"):
        from obstore.exceptions import BaseError  # noqa: PLC0415 - an optional dependency
        from obstore.store import from_url  # noqa: PLC0415
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    try:
        yield from_url(
            f"{url.scheme}://{url.bucket}",
            client_options={"connect_timeout": "10s", "timeout": "10m", "allow_http": allow_http},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(minutes=1)},
        )
    except (BaseError, FileNotFoundError) as error:
        raise _storage_error(url, error) from None


def _storage_error(url: ObjectUrl, error: Exception) -> CommandRefused:
    message = str(error)
    code = next((next(filter(None, found)) for found in _ERROR_CODE.findall(message)), "")
    credentials_hint = f"set {CREDENTIAL_VARIABLES[url.scheme]}"
    if "NoSuchBucket" in message:
        return CommandRefused(f"{url}: no bucket `{url.bucket}`", "check the URL and the region")
    if isinstance(error, FileNotFoundError):
        return CommandRefused(f"{url} does not exist", "check the URL")
    if _NO_CREDENTIALS.search(message):
        return CommandRefused(f"{url}: no credentials for the object storage", credentials_hint)
    if re.search(r"status code: 40[13]", message):
        return CommandRefused(f"{url}: the object storage rejects these credentials ({code})", credentials_hint)
    if _UNUSABLE_CREDENTIALS.search(message):
        return CommandRefused(f"{url}: the credentials for the object storage cannot be used", credentials_hint)
    if "BadScheme" in message:
        return CommandRefused(f"{url}: the endpoint has no TLS", "to allow it, set AWS_ALLOW_HTTP=true")
    if re.search(r"kind: (Connect|Timeout)|error sending request", message):
        return CommandRefused(f"{url}: the object storage cannot be reached", "check the network and the endpoint")
    return CommandRefused(f"{url}: the object storage failed ({code or type(error).__name__})", credentials_hint)
