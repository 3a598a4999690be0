"""Keyed hashes of forgotten people, and the file that holds the key."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes

from enrich.errors import CommandRefused
from enrich.job.bounded_read import read_bounded
from enrich.job.locations import LedgerLocation, path_beside_ledger
from enrich.ledger.file_identity import make_private_folder


@dataclass(frozen=True, slots=True)
class ForgottenRequests:
    """Requests about forgotten people. Only their keyed hashes are known."""

    key: bytes
    hashes: frozenset[bytes] = frozenset()

    def __contains__(self, params: str) -> bool:
        """Return whether a request with these params (JSON, as sent) is about a forgotten person."""
        return bool(self.hashes) and keyed_hash(self.key, params.encode()) in self.hashes


_KEY_BYTES = 32


def key_path(ledger: LedgerLocation) -> Path:
    """Return the path of the key file. It is not in the ledger, so a copy of the ledger alone identifies no person."""
    return path_beside_ledger(ledger, ".key")


def read_key(ledger: LedgerLocation, expected_key_id: str | None) -> bytes:
    """Read the key. Raises CommandRefused when it is missing or wrong: forgotten people would be looked up again."""
    path = key_path(ledger)
    try:
        key = read_bounded(path)
    except OSError as error:
        reason = error.strerror
    else:
        if len(key) == _KEY_BYTES and expected_key_id in (None, key_id(key)):
            return key
        reason = "it is not the one that they were forgotten with"
    raise CommandRefused(
        f"{path}: the key of the erased people cannot be used: {reason}",
        "restore it from a backup: without it, erased people would be sent again",
    )


def read_or_make_key(ledger: LedgerLocation) -> bytes:
    """Read the key, or create it (mode 0600) atomically."""
    path = key_path(ledger)
    if not path.exists():
        make_private_folder(path.parent)
        temporary = path.with_name(f".{path.name}.part")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return read_key(ledger, None)


def keyed_hash(key: bytes, value: bytes) -> bytes:
    """Hash personal data so that it cannot be identified without the key."""
    return blake2b(value, key=key, digest_size=16, person=b"enrich-forgotten").digest()


def key_id(key: bytes) -> str:
    """Return an identifier of a key that does not reveal the key."""
    return blake2b(key, digest_size=16, person=b"enrich-key").hexdigest()
