"""Sends each pending request to the API, once: room, rate slot, budget, intent on disk, one POST."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf

from enrich.api.client import BULK_POSTS_ON_THE_WIRE, POSTS_ON_THE_WIRE, Client
from enrich.budget import Budget
from enrich.errors import (
    Ambiguous,
    BadParams,
    CallFailed,
    EnrichError,
    Exit,
    JobRejected,
    LeaseLost,
    LedgerFailed,
    NotAccepted,
    OutOfCredits,
    RateLimited,
    Unauthorized,
)
from enrich.execution import Execution
from enrich.model import TASK_ID_TWICE, Acceptance, Call, Claim, State, Task
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.store.moves import CapReached

#: How often to look again when nobody has told of a change.
IDLE_S = 1.0


def posts_on_the_wire(bulk: int | None) -> int:
    """Tell how many POSTs may be on the wire at once."""
    return POSTS_ON_THE_WIRE if bulk is None else BULK_POSTS_ON_THE_WIRE


@dataclass(slots=True)
class Dispatcher:
    """pending → submitted.

    `budget` has the price to reserve for each request; `limit` is how many requests the execution
    may ask at most (a canary's); `on_task` is told of every task.
    """

    execution: Execution
    journal: Journal
    client: Client
    call: Call
    budget: Budget
    bound_to: Mapping[str, str | None]
    on_task: Callable[[Task], None]
    limit: int | None = None
    #: Pass over what was answered before.
    only_new: bool = False
    #: Send up to so many requests as one task; None: each by itself.
    bulk: int | None = None
    #: So many workers work at this queue, and share the POSTs on the wire.
    workers: int = 1
    #: After so many seconds none of them waits for a task any more.
    patience_s: float = inf
    #: Attempts that are claimed and provably not on the wire yet.
    _unsent: set[int] = field(default_factory=set)
    #: Those of them that are being claimed now: a commit that failed is done again, with others.
    _claiming: set[int] = field(default_factory=set)
    #: Requests that are claimed, and whose POST was not answered yet.
    _unanswered: int = 0
    #: How many requests a POST carries at most: fewer after one that was too dear, or wrong in rows nobody named.
    _size: int = field(init=False)
    #: It grows again up to this: less once the credits were too few for more.
    _widest: int = field(init=False)
    _head: str = field(init=False)

    def __post_init__(self) -> None:
        """Write what all bodies begin with."""
        self._size = self._widest = self.bulk or 1
        self._head = json.dumps(self.call.body())[:-1] + ', "params": '

    async def run(self) -> None:
        """Send until the queue is empty and nothing in flight can refill it, or the execution closes."""
        try:
            async with asyncio.TaskGroup() as posts:
                while (room := await self._room()) and (claimed := await self._claim(room)) is not None:
                    for claims in claimed:
                        posts.create_task(self._post(claims))
        finally:
            # After the claims in the journal's order: also what was claimed while we were being cancelled.
            await self.journal.do_or_keep(self._unclaim, self.execution.clock.now_ms())

    @property
    def _most_on_the_wire(self) -> int:
        return posts_on_the_wire(self.bulk) // self.workers

    async def _room(self) -> int:
        """Wait until a POST may leave; tell how many may, 0 when none may any more."""
        execution = self.execution
        while not execution.closing.is_set():
            room = min(self._most_on_the_wire - execution.on_the_wire, execution.room)
            if self.limit is not None:
                left = self.limit - execution.tally.asked
                if left <= 0:
                    return 0
                room = min(room, ceil((left - self._unanswered) / self._size))
            now = execution.clock.monotonic()
            ill = execution.breaker.delay(now, execution.on_the_wire)
            if (shut := execution.posts_paused(now)) is not None:
                await execution.wait_change(min(IDLE_S, shut))
            elif room <= 0 or ill is None or not execution.holds():
                await execution.wait_change(IDLE_S)
            elif ill:
                await execution.pause(ill, execution.closing)
            else:
                return await execution.rate_slots(room if execution.breaker.healthy else 1, execution.closing)
        return 0

    async def _claim(self, room: int) -> list[list[Claim]] | None:
        """Write down the intents of up to `room` POSTs; None when there is nothing more to send.

        They leave at once: these and no others are what a kill leaves in doubt.
        """
        execution = self.execution
        size = self._size
        rows = room * size
        if self.limit is not None:
            rows = min(rows, self.limit - execution.tally.asked - self._unanswered)
        try:
            posts, capped, awaited = await self.journal.do(self._claim_some, rows, size, execution.clock.now_ms())
        except LeaseLost:
            raise
        except LedgerFailed as error:
            execution.stop(error.exit_code, error)  # what is on the wire is waited for
            return None
        self._claiming.clear()
        execution.pace.give_back(room - len(posts))
        if posts:
            execution.on_the_wire += len(posts)
            self._unanswered += sum(map(len, posts))
        elif execution.on_the_wire or execution.in_flight or awaited:
            await execution.wait_change(IDLE_S)
        elif capped:
            execution.stop(Exit.CREDITS, EnrichError(self.budget.reason, self.budget.hint))
        else:
            return None
        return posts

    async def _post(self, claims: list[Claim]) -> None:
        """Send one POST, exactly once, and write down what became of it."""
        execution = self.execution
        attempts = tuple(claim.attempt_id for claim in claims)
        params = ",".join(claim.params for claim in claims)
        body = self._head + (f"[{params}]" if self.bulk else params) + "}"
        try:
            if execution.closing.is_set():
                return
            self._unsent.difference_update(attempts)
            if not execution.holds():
                # Somebody may think that we are gone: what we sent now could be in doubt, and sent again.
                await self.journal.together(
                    Ledger.refused, [(one, "not sent", execution.clock.now_ms()) for one in attempts]
                )
                return
            task_id = await self.client.run(self.call.waterfall, body.encode(), len(claims) if self.bulk else None)
        except CallFailed as error:
            await self._not_submitted(attempts, error)
        else:
            now_ms = execution.clock.now_ms()
            told = [(attempt, task_id, now_ms) for attempt in attempts]
            means = await self.journal.together(Ledger.accepted, told, self.bound_to)
            if means[0] is Acceptance.TAKEN:
                self._in_doubt(len(claims), Ambiguous(TASK_ID_TWICE))
                return
            self._widen()
            execution.tally.submitted += len(claims)
            execution.tally.cached += sum(each is Acceptance.CACHED for each in means)
            execution.in_flight += 1
            execution.breaker.good()
            execution.good_answer()
            execution.post_accepted()
            self.on_task(Task(attempts, task_id, now_ms, bundle=claims[0].bundle))
        finally:
            execution.on_the_wire -= 1
            self._unanswered -= len(claims)
            execution.notify()

    async def _not_submitted(self, attempts: Sequence[int], error: CallFailed) -> None:
        """Decide by the kind of error alone; see the table in `client`."""
        execution = self.execution
        now, now_ms = execution.clock.monotonic(), execution.clock.now_ms()
        told = [(attempt, error.message, now_ms) for attempt in attempts]
        match error:
            case BadParams():
                execution.good_answer()
                execution.breaker.good()
                await self._reject(attempts, error, now_ms)
            case NotAccepted() | JobRejected():
                match error:
                    case RateLimited():
                        execution.throttle_posts(error)
                    case OutOfCredits() if len(attempts) > 1:
                        execution.good_answer()
                        self._narrow(len(attempts))  # fewer may be affordable
                        self._widest = self._size
                    case OutOfCredits() | Unauthorized() | JobRejected():
                        execution.stop(error.exit_code, error)
                    case _:
                        execution.breaker.bad(now)
                        execution.bad_answer(error)
                await self.journal.together(Ledger.refused, told)
            case _:
                task_id = error.task_id if isinstance(error, Ambiguous) else None
                await self.journal.together(Ledger.doubt, [(*each, task_id) for each in told])
                self._in_doubt(len(told), error)
        self._leave_an_ill_api(error)

    def _in_doubt(self, requests: int, error: CallFailed) -> None:
        """Count a POST that may or may not have been accepted."""
        execution = self.execution
        execution.tally.doubtful += requests
        execution.breaker.bad(execution.clock.monotonic())
        execution.bad_answer(error)

    async def _reject(self, attempts: Sequence[int], error: BadParams, now_ms: int) -> None:
        """Fail the requests that are wrong. Nothing of the POST was accepted: the others are sent again."""
        if error.rows:
            self._widen()
        else:
            self._narrow(len(attempts))  # some are wrong, and nobody says which: in smaller POSTs they are found
        wrong = [(attempts[row], said, now_ms) for row, said in error.rows.items()]
        fine = [
            (attempt, "sent with wrong rows", now_ms) for row, attempt in enumerate(attempts) if row not in error.rows
        ]
        # Asked for at once, and so on disk in one commit.
        moves = [(Ledger.rejected, wrong), (Ledger.refused, fine)]
        await asyncio.gather(*(self.journal.together(move, told) for move, told in moves if told))
        self.execution.tally.rejected += len(wrong)
        self.execution.tally.count(State.FAILED, len(wrong))

    def _narrow(self, size: int) -> None:
        self._size = max(1, min(self._size, size // 2))

    def _widen(self) -> None:
        self._size = min(self._widest, self._size * 2)

    def _leave_an_ill_api(self, error: CallFailed) -> None:
        """Send nothing more to an API that has taken no POST for too long; polling goes on."""
        ill_since = self.execution.breaker.ill_since
        now = self.execution.clock.monotonic()
        if ill_since is not None and now - ill_since >= self.execution.timing.outage_s:
            self.execution.stop(Exit.API, error)

    def _claim_some(self, ledger: Ledger, rows: int, size: int, now_ms: int) -> tuple[list[list[Claim]], bool, bool]:
        """Claim up to so many requests, in POSTs of at most that size.

        Tell also whether the cap stood in the way, and whether what other workers wait for may yet free some.
        """
        posts: list[list[Claim]] = []
        self._unsent -= self._claiming
        self._claiming.clear()
        claim = partial(
            ledger.claim,
            self.execution.id,
            self.budget.price,
            now_ms,
            only_new=self.only_new,
            bulk=self.bulk is not None,
        )
        try:
            while rows > 0 and (claims := claim(room=min(rows, size) if self.bulk else rows)):
                self._claiming.update(one.attempt_id for one in claims)
                self._unsent |= self._claiming
                posts += [claims] if self.bulk else [[one] for one in claims]
                rows -= len(claims)
        except CapReached:
            awaited = self.workers > 1 and ledger.awaits(now_ms - self.patience_s * 1000)
            return posts, True, awaited
        return posts, False, False

    def _unclaim(self, ledger: Ledger, now_ms: int) -> None:
        """Put back what was claimed and not sent: it would be in doubt otherwise. May be done again, as any move."""
        if self._unsent:
            ledger.refused([(attempt, "not sent: the execution ended", now_ms) for attempt in sorted(self._unsent)])
