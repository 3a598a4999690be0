"""Sends each pending request to the API, once: room, rate slot, budget, intent on disk, one POST."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf

from enrich.databar.client import MAX_BULK_POSTS_IN_FLIGHT, MAX_POSTS_IN_FLIGHT, Client
from enrich.errors import (
    ApiCallFailed,
    BadParams,
    EnrichError,
    ExitCode,
    JobRejected,
    LeaseLost,
    LedgerFailed,
    OutOfCredits,
    RateLimited,
    RequestNotAccepted,
    SubmissionUnconfirmed,
    Unauthorized,
)
from enrich.ledger.ledger import Ledger
from enrich.ledger.queue import CapReached
from enrich.ledger.writer import LedgerWriter
from enrich.models import DUPLICATE_TASK_ID, Acceptance, Call, Claim, State, Task
from enrich.run.budget import Budget
from enrich.run.state import RunState

#: How often to look again when nobody has told of a change.
IDLE_S = 1.0


def max_posts_in_flight(bulk_size: int | None) -> int:
    """Tell how many POSTs may be on the wire at once."""
    return MAX_POSTS_IN_FLIGHT if bulk_size is None else MAX_BULK_POSTS_IN_FLIGHT


@dataclass(slots=True)
class Dispatcher:
    """pending → submitted.

    `budget` has the price to reserve for each request; `limit` is how many requests the execution
    may ask at most (a canary's); `on_task` is told of every task.
    """

    run_state: RunState
    ledger_writer: LedgerWriter
    client: Client
    call: Call
    budget: Budget
    bound_to: Mapping[str, str | None]
    on_task_accepted: Callable[[Task], None]
    limit: int | None = None
    #: Pass over what was answered before.
    only_new: bool = False
    #: Send up to so many requests as one task; None: each by itself.
    bulk_size: int | None = None
    #: So many workers work at this queue, and share the POSTs on the wire.
    workers: int = 1
    #: After so many seconds none of them waits for a task any more.
    patience_s: float = inf
    #: Attempts that are claimed and provably not on the wire yet.
    _unsent_attempts: set[int] = field(default_factory=set)
    #: Those of them that are being claimed now: a commit that failed is done again, with others.
    _claiming_attempts: set[int] = field(default_factory=set)
    #: Requests that are claimed, and whose POST was not answered yet.
    _unanswered_requests: int = 0
    #: How many requests a POST carries at most: fewer after one that was too dear, or wrong in rows nobody named.
    _current_bulk_size: int = field(init=False)
    #: It grows again up to this: less once the credits were too few for more.
    _max_bulk_size: int = field(init=False)
    _body_prefix: str = field(init=False)

    def __post_init__(self) -> None:
        """Write what all bodies begin with."""
        self._current_bulk_size = self._max_bulk_size = self.bulk_size or 1
        self._body_prefix = json.dumps(self.call.body())[:-1] + ', "params": '

    async def run(self) -> None:
        """Send until the queue is empty and nothing in flight can refill it, or the execution closes."""
        try:
            async with asyncio.TaskGroup() as posts:
                while (post_slots := await self._acquire_post_slots()) and (
                    batches := await self._claim(post_slots)
                ) is not None:
                    for claims in batches:
                        posts.create_task(self._post(claims))
        finally:
            # After the claims in the journal's order: also what was claimed while we were being cancelled.
            await self.ledger_writer.submit_or_rescue(self._release_unsent, self.run_state.clock.now_ms())

    @property
    def _max_posts_in_flight(self) -> int:
        return max_posts_in_flight(self.bulk_size) // self.workers

    async def _acquire_post_slots(self) -> int:
        """Wait until a POST may leave; tell how many may, 0 when none may any more."""
        run_state = self.run_state
        while not run_state.stop_submitting.is_set():
            post_slots = min(self._max_posts_in_flight - run_state.posts_in_flight, run_state.free_capacity)
            if self.limit is not None:
                left = self.limit - run_state.counters.attempted_requests
                if left <= 0:
                    return 0
                post_slots = min(post_slots, ceil((left - self._unanswered_requests) / self._current_bulk_size))
            now = run_state.clock.monotonic()
            breaker_delay_s = run_state.circuit_breaker.delay(now, run_state.posts_in_flight)
            if (pause_s := run_state.post_pause_s(now)) is not None:
                await run_state.wait_for_change(min(IDLE_S, pause_s))
            elif post_slots <= 0 or breaker_delay_s is None or not run_state.lease_valid():
                await run_state.wait_for_change(IDLE_S)
            elif breaker_delay_s:
                await run_state.pause(breaker_delay_s, run_state.stop_submitting)
            else:
                return await run_state.acquire_slots(
                    post_slots if run_state.circuit_breaker.is_healthy else 1, run_state.stop_submitting
                )
        return 0

    async def _claim(self, post_slots: int) -> list[list[Claim]] | None:
        """Write down the intents of up to `room` POSTs; None when there is nothing more to send.

        They leave at once: these and no others are what a kill leaves in doubt.
        """
        run_state = self.run_state
        bulk_size = self._current_bulk_size
        max_requests = post_slots * bulk_size
        if self.limit is not None:
            max_requests = min(
                max_requests, self.limit - run_state.counters.attempted_requests - self._unanswered_requests
            )
        try:
            posts, capped, may_free_budget = await self.ledger_writer.submit(
                self._claim_batches, max_requests, bulk_size, run_state.clock.now_ms()
            )
        except LeaseLost:
            raise
        except LedgerFailed as error:
            run_state.stop(error.exit_code, error)  # what is on the wire is waited for
            return None
        self._claiming_attempts.clear()
        run_state.rate_limiter.refund(post_slots - len(posts))
        if posts:
            run_state.posts_in_flight += len(posts)
            self._unanswered_requests += sum(map(len, posts))
        elif run_state.posts_in_flight or run_state.open_tasks or may_free_budget:
            await run_state.wait_for_change(IDLE_S)
        elif capped:
            run_state.stop(ExitCode.CREDITS, EnrichError(self.budget.stop_reason, self.budget.hint))
        else:
            return None
        return posts

    async def _post(self, claims: list[Claim]) -> None:
        """Send one POST, exactly once, and write down what became of it."""
        run_state = self.run_state
        attempts = tuple(claim.attempt_id for claim in claims)
        params = ",".join(claim.params for claim in claims)
        body = self._body_prefix + (f"[{params}]" if self.bulk_size else params) + "}"
        try:
            if run_state.stop_submitting.is_set():
                return
            self._unsent_attempts.difference_update(attempts)
            if not run_state.lease_valid():
                # Somebody may think that we are gone: what we sent now could be in doubt, and sent again.
                await self.ledger_writer.submit_batch(
                    Ledger.record_refused, [(one, "not sent", run_state.clock.now_ms()) for one in attempts]
                )
                return
            task_id = await self.client.submit(
                self.call.waterfall, body.encode(), len(claims) if self.bulk_size else None
            )
        except ApiCallFailed as error:
            await self._handle_post_error(attempts, error)
        else:
            now_ms = run_state.clock.now_ms()
            updates = [(attempt, task_id, now_ms) for attempt in attempts]
            acceptances = await self.ledger_writer.submit_batch(Ledger.record_accepted, updates, self.bound_to)
            if acceptances[0] is Acceptance.CONFLICT:
                self._count_unconfirmed(len(claims), SubmissionUnconfirmed(DUPLICATE_TASK_ID))
                return
            self._grow_bulk()
            run_state.counters.submitted += len(claims)
            run_state.counters.cached += sum(each is Acceptance.CACHED for each in acceptances)
            run_state.open_tasks += 1
            run_state.circuit_breaker.record_success()
            run_state.record_success()
            run_state.record_post_accepted()
            self.on_task_accepted(Task(attempts, task_id, now_ms, bulk_task_id=claims[0].bulk_task_id))
        finally:
            run_state.posts_in_flight -= 1
            self._unanswered_requests -= len(claims)
            run_state.notify_change()

    async def _handle_post_error(self, attempts: Sequence[int], error: ApiCallFailed) -> None:
        """Decide by the kind of error alone; see the table in `client`."""
        run_state = self.run_state
        now, now_ms = run_state.clock.monotonic(), run_state.clock.now_ms()
        updates = [(attempt, error.message, now_ms) for attempt in attempts]
        match error:
            case BadParams():
                run_state.record_success()
                run_state.circuit_breaker.record_success()
                await self._fail_invalid_requests(attempts, error, now_ms)
            case RequestNotAccepted() | JobRejected():
                match error:
                    case RateLimited():
                        run_state.record_post_throttled(error)
                    case OutOfCredits() if len(attempts) > 1:
                        run_state.record_success()
                        self._shrink_bulk(len(attempts))  # fewer may be affordable
                        self._max_bulk_size = self._current_bulk_size
                    case OutOfCredits() | Unauthorized() | JobRejected():
                        run_state.stop(error.exit_code, error)
                    case _:
                        run_state.circuit_breaker.record_failure(now)
                        run_state.record_failure(error)
                await self.ledger_writer.submit_batch(Ledger.record_refused, updates)
            case _:
                task_id = error.task_id if isinstance(error, SubmissionUnconfirmed) else None
                await self.ledger_writer.submit_batch(Ledger.mark_in_doubt, [(*each, task_id) for each in updates])
                self._count_unconfirmed(len(updates), error)
        self._stop_after_outage(error)

    def _count_unconfirmed(self, requests: int, error: ApiCallFailed) -> None:
        """Count a POST that may or may not have been accepted."""
        run_state = self.run_state
        run_state.counters.unconfirmed += requests
        run_state.circuit_breaker.record_failure(run_state.clock.monotonic())
        run_state.record_failure(error)

    async def _fail_invalid_requests(self, attempts: Sequence[int], error: BadParams, now_ms: int) -> None:
        """Fail the requests that are wrong. Nothing of the POST was accepted: the others are sent again."""
        if error.rows:
            self._grow_bulk()
        else:
            self._shrink_bulk(len(attempts))  # some are wrong, and nobody says which: in smaller POSTs they are found
        invalid_updates = [(attempts[row], message, now_ms) for row, message in error.rows.items()]
        valid_updates = [
            (attempt, "sent with wrong rows", now_ms) for row, attempt in enumerate(attempts) if row not in error.rows
        ]
        # Asked for at once, and so on disk in one commit.
        transitions = [(Ledger.record_rejected, invalid_updates), (Ledger.record_refused, valid_updates)]
        await asyncio.gather(
            *(self.ledger_writer.submit_batch(transition, updates) for transition, updates in transitions if updates)
        )
        self.run_state.counters.rejected += len(invalid_updates)
        self.run_state.counters.count_settled(State.FAILED, len(invalid_updates))

    def _shrink_bulk(self, size: int) -> None:
        self._current_bulk_size = max(1, min(self._current_bulk_size, size // 2))

    def _grow_bulk(self) -> None:
        self._current_bulk_size = min(self._max_bulk_size, self._current_bulk_size * 2)

    def _stop_after_outage(self, error: ApiCallFailed) -> None:
        """Send nothing more to an API that has taken no POST for too long; polling goes on."""
        failing_since = self.run_state.circuit_breaker.failing_since
        now = self.run_state.clock.monotonic()
        if failing_since is not None and now - failing_since >= self.run_state.timeouts.outage_s:
            self.run_state.stop(ExitCode.API, error)

    def _claim_batches(
        self, ledger: Ledger, max_requests: int, bulk_size: int, now_ms: int
    ) -> tuple[list[list[Claim]], bool, bool]:
        """Claim up to so many requests, in POSTs of at most that size.

        Tell also whether the cap stood in the way, and whether what other workers wait for may yet free some.
        """
        posts: list[list[Claim]] = []
        self._unsent_attempts -= self._claiming_attempts
        self._claiming_attempts.clear()
        claim = partial(
            ledger.claim,
            self.run_state.execution_id,
            self.budget.max_request_price,
            now_ms,
            only_new=self.only_new,
            bulk=self.bulk_size is not None,
        )
        try:
            while max_requests > 0 and (
                claims := claim(count=min(max_requests, bulk_size) if self.bulk_size else max_requests)
            ):
                self._claiming_attempts.update(one.attempt_id for one in claims)
                self._unsent_attempts |= self._claiming_attempts
                posts += [claims] if self.bulk_size else [[one] for one in claims]
                max_requests -= len(claims)
        except CapReached:
            may_free_budget = self.workers > 1 and ledger.has_open_since(now_ms - self.patience_s * 1000)
            return posts, True, may_free_budget
        return posts, False, False

    def _release_unsent(self, ledger: Ledger, now_ms: int) -> None:
        """Put back what was claimed and not sent: it would be in doubt otherwise. May be done again, as any move."""
        if self._unsent_attempts:
            ledger.record_refused(
                [(attempt, "not sent: the execution ended", now_ms) for attempt in sorted(self._unsent_attempts)]
            )
