"""Sends each pending request to the API, once: room, rate slot, budget, intent on disk, one POST."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from enrich.api.client import POSTS_ON_THE_WIRE, Client
from enrich.budget import Budget
from enrich.errors import (
    BadParams,
    CallFailed,
    EnrichError,
    Exit,
    JobRejected,
    NotAccepted,
    OutOfCredits,
    RateLimited,
    Unauthorized,
)
from enrich.execution import Execution
from enrich.model import Call, Claim, State, Task
from enrich.store.journal import Journal
from enrich.store.ledger import CapReached, Ledger

#: How often to look again when nobody has told of a change.
IDLE_S = 1.0


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
    #: Attempts that are claimed and provably not on the wire yet.
    _unsent: set[int] = field(default_factory=set)

    async def run(self) -> None:
        """Send until the queue is empty and nothing in flight can refill it, or the execution closes."""
        try:
            async with asyncio.TaskGroup() as posts:
                while (room := await self._room()) and (claims := await self._claim(room)) is not None:
                    for claim in claims:
                        posts.create_task(self._post(claim))
        finally:
            # After the claims in the journal's order: also what was claimed while we were being cancelled.
            await self.journal.do(self._unclaim, self.execution.clock.now_ms())

    async def _room(self) -> int:
        """Wait until a POST may leave; tell how many may, 0 when none may any more."""
        execution = self.execution
        while not execution.closing.is_set():
            room = min(POSTS_ON_THE_WIRE - execution.on_the_wire, execution.room)
            if self.limit is not None:
                left = self.limit - execution.tally.asked
                if left <= 0:
                    return 0
                room = min(room, left - execution.on_the_wire)
            now = execution.clock.monotonic()
            ill = execution.breaker.delay(now, execution.on_the_wire)
            if room <= 0 or ill is None:
                await execution.wait_change(IDLE_S)
            elif ill:
                await execution.pause(ill, execution.closing)
            else:
                return await execution.rate_slots(room if execution.breaker.healthy else 1, execution.closing)
        return 0

    async def _claim(self, room: int) -> list[Claim] | None:
        """Write down the intents of up to `room` requests; None when there is nothing more to send.

        Their POSTs leave at once: these and no others are what a kill leaves in doubt.
        """
        execution = self.execution
        claims, capped = await self.journal.do(self._claim_some, room, execution.clock.now_ms())
        execution.pace.give_back(room - len(claims))
        if claims:
            execution.on_the_wire += len(claims)
        elif execution.on_the_wire or execution.in_flight:
            await execution.wait_change(IDLE_S)
        elif capped:
            execution.stop(Exit.CREDITS, EnrichError(self.budget.reason, self.budget.hint))
        else:
            return None
        return claims

    async def _post(self, claim: Claim) -> None:
        """Send one request, exactly once, and write down what became of it."""
        execution, attempt = self.execution, claim.attempt_id
        body = json.dumps(self.call.body())[:-1] + ', "params": ' + claim.params + "}"
        try:
            if execution.closing.is_set():
                return
            self._unsent.discard(attempt)
            task_id = await self.client.run(self.call.waterfall, body.encode())
        except CallFailed as error:
            await self._not_submitted(attempt, error)
        else:
            now_ms = execution.clock.now_ms()
            await self.journal.do(Ledger.accepted, attempt, task_id, now_ms, self.bound_to)
            execution.tally.submitted += 1
            execution.in_flight += 1
            execution.breaker.good()
            execution.good_answer()
            self.on_task(Task(attempt, task_id, now_ms))
        finally:
            execution.on_the_wire -= 1
            execution.notify()

    async def _not_submitted(self, attempt: int, error: CallFailed) -> None:
        """Decide by the kind of error alone; see the table in `client`."""
        execution = self.execution
        now, now_ms = execution.clock.monotonic(), execution.clock.now_ms()
        match error:
            case BadParams():
                execution.good_answer()
                execution.breaker.good()
                await self.journal.do(Ledger.rejected, attempt, error.message, now_ms)
                execution.tally.rejected += 1
                execution.tally.count(State.FAILED)
            case NotAccepted() | JobRejected():
                match error:
                    case RateLimited():
                        execution.throttle(error)
                    case OutOfCredits() | Unauthorized() | JobRejected():
                        execution.stop(error.exit_code, error)
                    case _:
                        execution.breaker.bad(now)
                        execution.bad_answer(error)
                await self.journal.do(Ledger.refused, attempt, error.message, now_ms)
            case _:
                await self.journal.do(Ledger.doubt, attempt, error.message, now_ms)
                execution.tally.doubtful += 1
                execution.breaker.bad(now)
                execution.bad_answer(error)
        self._leave_an_ill_api(error)

    def _leave_an_ill_api(self, error: CallFailed) -> None:
        """Send nothing more to an API that has taken no POST for too long; polling goes on."""
        ill_since = self.execution.breaker.ill_since
        now = self.execution.clock.monotonic()
        if ill_since is not None and now - ill_since >= self.execution.timing.outage_s:
            self.execution.stop(Exit.API, error)

    def _claim_some(self, ledger: Ledger, room: int, now_ms: int) -> tuple[list[Claim], bool]:
        """Claim up to `room` requests; tell also whether the cap stood in the way."""
        claims: list[Claim] = []
        try:
            while len(claims) < room and (
                claim := ledger.claim(self.execution.id, self.budget.price, now_ms, only_new=self.only_new)
            ):
                claims.append(claim)
                self._unsent.add(claim.attempt_id)
        except CapReached:
            return claims, True
        return claims, False

    def _unclaim(self, ledger: Ledger, now_ms: int) -> None:
        """Put back what was claimed and not sent: it would be in doubt otherwise."""
        for attempt_id in sorted(self._unsent):
            ledger.refused(attempt_id, "not sent: the execution ended", now_ms)
        self._unsent.clear()
