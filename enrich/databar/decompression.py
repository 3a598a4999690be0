"""Decompresses a response body (gzip, deflate) in chunks, so that the reader can stop at any size."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

CHUNK_BYTES = 64 * 1024
#: Maximum number of gzip members in a body. Each takes time, even an empty one.
MAX_MEMBERS = 1000
#: zlib's `wbits` value for each format.
_GZIP, _ZLIB, _RAW = 31, 15, -15


class DecompressionError(Exception):
    """The body is damaged or has an unsupported encoding."""


class Decompressor:
    """Decompresses one body, given its content-encoding headers. Raises DecompressionError."""

    def __init__(self, encodings: Iterable[str]) -> None:
        named = [name.strip().lower() for line in encodings for name in line.split(",")]
        codings = [name.removeprefix("x-") for name in named if name not in {"", "identity"}]
        if len(codings) > 1 or not {"gzip", "deflate"}.issuperset(codings):
            raise DecompressionError("the response has an encoding that was not requested")
        self._encoding = codings[0] if codings else None
        self._zlib_object: zlib._Decompress | None = None
        self._members = 0
        self._pending = b""

    def decompress(self, data: bytes) -> Iterator[bytes]:
        """Yield the decompressed data in chunks of at most 64 KiB. Uncompressed data stays one chunk."""
        if self._encoding is None:
            yield data
            return
        data, self._pending, has_more = self._pending + data, b"", False
        while data or has_more:
            if self._zlib_object is None:
                if len(data) == 1:
                    self._pending = data  # the format is known from the second byte on
                    return
                self._zlib_object = self._start_member(data)
            try:
                chunk = self._zlib_object.decompress(data, CHUNK_BYTES)
            except zlib.error:
                raise DecompressionError("the compressed response is damaged") from None
            yield chunk
            if self._zlib_object.eof:
                data, has_more, self._zlib_object = self._zlib_object.unused_data, False, None
            else:
                data, has_more = self._zlib_object.unconsumed_tail, len(chunk) == CHUNK_BYTES

    def finish(self) -> None:
        """Raise DecompressionError if the body is incomplete."""
        if self._zlib_object is not None or self._pending:
            raise DecompressionError("the compressed response is truncated")

    def _start_member(self, data: bytes) -> zlib._Decompress:
        self._members += 1
        if self._members > (MAX_MEMBERS if self._encoding == "gzip" else 1):
            raise DecompressionError("the compressed response has extra data")
        if self._encoding == "gzip":
            return zlib.decompressobj(_GZIP)
        # By the standard, "deflate" is the zlib format. Some servers send raw deflate.
        is_zlib = data[0] & 0x0F == zlib.DEFLATED and int.from_bytes(data[:2]) % 31 == 0
        return zlib.decompressobj(_ZLIB if is_zlib else _RAW)
