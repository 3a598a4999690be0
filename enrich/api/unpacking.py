"""Unpacks an answer's body (gzip, deflate) piece by piece, so that its reader can stop at any size."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

PIECE_BYTES = 64 * 1024
#: The most gzip members of a body: each costs time, even an empty one.
MOST_MEMBERS = 1000
#: What zlib calls the formats.
_GZIP, _ZLIB, _RAW = 31, 15, -15


class Unreadable(Exception):
    """The body is damaged, or in an encoding that cannot be read."""


class Unpacker:
    """Unpacks one body, whose content-encoding headers are given. Raises Unreadable."""

    def __init__(self, encodings: Iterable[str]) -> None:
        named = [name.strip().lower() for line in encodings for name in line.split(",")]
        codings = [name.removeprefix("x-") for name in named if name not in {"", "identity"}]
        if len(codings) > 1 or not {"gzip", "deflate"}.issuperset(codings):
            raise Unreadable("the answer is in an encoding that was not asked for")
        self._coding = codings[0] if codings else None
        self._inflate: zlib._Decompress | None = None
        self._members = 0
        self._held = b""

    def unpack(self, data: bytes) -> Iterator[bytes]:
        """Unpack what came, in pieces of at most 64 KiB; what is not packed stays one piece."""
        if self._coding is None:
            yield data
            return
        data, self._held, more = self._held + data, b"", False
        while data or more:
            if self._inflate is None:
                if len(data) == 1:
                    self._held = data  # the second byte tells the format
                    return
                self._inflate = self._begin(data)
            try:
                piece = self._inflate.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise Unreadable("the answer is packed, and damaged") from None
            yield piece
            if self._inflate.eof:
                data, more, self._inflate = self._inflate.unused_data, False, None
            else:
                data, more = self._inflate.unconsumed_tail, len(piece) == PIECE_BYTES

    def finish(self) -> None:
        """Check that the body came to its end."""
        if self._inflate is not None or self._held:
            raise Unreadable("the answer is packed, and its end is missing")

    def _begin(self, data: bytes) -> zlib._Decompress:
        self._members += 1
        if self._members > (MOST_MEMBERS if self._coding == "gzip" else 1):
            raise Unreadable("the answer is packed, and more follows its end")
        if self._coding == "gzip":
            return zlib.decompressobj(_GZIP)
        # By its name deflate is zlib's format; some servers send the raw one.
        is_zlib = data[0] & 0x0F == zlib.DEFLATED and int.from_bytes(data[:2]) % 31 == 0
        return zlib.decompressobj(_ZLIB if is_zlib else _RAW)
