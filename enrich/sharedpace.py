"""One pace for several processes: its state lies in shared memory, under a lock that dies with who holds it."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from mmap import mmap
from typing import Any, TypeVar

from enrich.pace import Pace

T = TypeVar("T")

#: A state is some hundred bytes, and some kilobytes with a thousand requests on the wire.
LARGEST = 1 << 18
_LENGTH = 4


class Slate:
    """What processes write down for each other, in a file that all of them have open.

    A state is written beside the one that counts; then a single byte says that it counts. Who is killed in between has
    written nothing, and the system gives the lock to the next.
    """

    SIZE = 1 + 2 * LARGEST

    def __init__(self, file: int) -> None:
        """Share the open file of this descriptor, of `Slate.SIZE` bytes."""
        self.file = file
        self._memory = mmap(file, self.SIZE)
        self._turns = os.open(f"/dev/fd/{file}", os.O_RDWR)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the others waiting, some microseconds."""
        fcntl.lockf(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep the others waiting who want to do this, too: SQLite alone would look again only every now and then."""
        fcntl.flock(self._turns, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._turns, fcntl.LOCK_UN)

    def read(self) -> dict[str, Any]:
        """Read the state that counts."""
        start = 1 + LARGEST * self._memory[0]
        end = start + _LENGTH + int.from_bytes(self._memory[start : start + _LENGTH], "little")
        state: dict[str, Any] = pickle.loads(self._memory[start + _LENGTH : end])  # noqa: S301 - ours alone
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Write a state that counts from now on."""
        self._memory[0] = self.begin(state)

    def begin(self, state: dict[str, Any]) -> int:
        """Write a state that does not count yet; return where it lies."""
        other = 1 - self._memory[0]
        written = pickle.dumps(state, pickle.HIGHEST_PROTOCOL)
        start = 1 + LARGEST * other
        self._memory[start : start + _LENGTH + len(written)] = len(written).to_bytes(_LENGTH, "little") + written
        return other

    def close(self) -> None:
        """Keep nothing open but the file."""
        self._memory.close()
        os.close(self._turns)


class SharedPace(Pace):
    """A pace of which others know: each call begins with what they did, and tells them what it changed."""

    __slots__ = ("_held", "slate")  # not among the attributes that are shared

    def __init__(self, slate: Slate) -> None:
        """Go on with what the slate says."""
        self.slate = slate
        self._held = False
        vars(self).update(slate.read())

    def together(self, method: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Call a method of Pace on the state that all share."""
        if self._held:
            return method(self, *args, **kwargs)
        with self.slate.held():
            self._held = True
            try:
                vars(self).update(self.slate.read())
                result = method(self, *args, **kwargs)
                self.slate.write(vars(self))
            finally:
                self._held = False
        return result


def _share() -> None:
    """Do so with whatever a pace can do, and whatever it remembers."""
    for name, member in vars(Pace).items():
        method = member.fget if isinstance(member, property) else member
        if name.startswith("_") or not callable(method):
            continue
        call = partialmethod(SharedPace.together, method)
        setattr(SharedPace, name, property(partial(_get, method)) if isinstance(member, property) else call)


def _get(method: Callable[[Pace], object], pace: SharedPace) -> object:
    return pace.together(method)


_share()
