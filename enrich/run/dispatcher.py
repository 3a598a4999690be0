"""Sends each pending request to the API once, beside a poller.

Order of the steps: free capacity, rate-limit slot, budget, intent on disk, one POST.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from enrich.databar.client import MAX_BULK_POSTS_IN_FLIGHT, MAX_POSTS_IN_FLIGHT, Client
from enrich.errors import (
    ApiCallFailed,
    BadParams,
    EnrichError,
    JobRejected,
    LeaseLost,
    LedgerFailed,
    OutOfCredits,
    RateLimited,
    RequestNotAccepted,
    SubmissionUnconfirmed,
    Unauthorized,
)
from enrich.exit_codes import ExitCode
from enrich.ledger import queries, queue, transitions
from enrich.ledger.database import Database
from enrich.ledger.queue import CapReached, StepCapReached
from enrich.ledger.writer import LedgerWriter
from enrich.models import DUPLICATE_TASK_ID, Acceptance, ClaimedRequest, State, Task
from enrich.run.poller import Poller
from enrich.run.run_state import RunState, WorkConfig

#: Seconds after which to check again when no change was signaled.
IDLE_S = 1.0
STEP_CAP_HINT = "raise its `max_credits`. Its other rows stay pending, and independent steps continue"


def max_posts_in_flight(bulk_size: int | None) -> int:
    """Return how many POSTs may be in flight at once."""
    return MAX_POSTS_IN_FLIGHT if bulk_size is None else MAX_BULK_POSTS_IN_FLIGHT


@dataclass(slots=True)
class Dispatcher:
    """Moves requests from pending to submitted.

    `on_task_accepted` is called for every task.
    """

    run_state: RunState
    ledger_writer: LedgerWriter
    client: Client
    config: WorkConfig
    on_task_accepted: Callable[[Task], None]
    #: Send only requests without an answer, up to this place in the queue (for a canary). None: all.
    new_up_to: int | None = None
    #: The cap of the step leaves no room for another request.
    step_cap_reached: bool = False
    #: Attempts that are claimed and certainly not sent yet. `_claim_posts` adds to them in the writer's thread.
    _unsent_attempts: set[int] = field(default_factory=set)
    #: Those of them whose claim is not committed yet. A failed commit is repeated, and may then claim others.
    _uncommitted_attempts: set[int] = field(default_factory=set)
    #: POSTs that are claimed and not answered yet. One whose acceptance waits for its commit makes room for the next,
    #: whose claim is in the same commit or a later one: a kill leaves no more of them unconfirmed.
    _unanswered_posts: int = 0
    #: Most requests per POST. Halved after a POST that cost too much, or had invalid rows that the API did not name.
    _current_bulk_size: int = field(init=False)
    #: `_current_bulk_size` grows again up to this. Lowered once the credits were too few for more.
    _max_bulk_size: int = field(init=False)
    _body_prefix: str = field(init=False)

    def __post_init__(self) -> None:
        """Serialize the common beginning of all request bodies."""
        self._current_bulk_size = self._max_bulk_size = self.config.bulk or 1
        self._body_prefix = self.config.target.body_prefix()

    async def run(self) -> None:
        """Send until the queue is empty and no open task can refill it, or submitting stops."""
        try:
            async with asyncio.TaskGroup() as posts:
                while (post_slots := await self._acquire_post_slots()) and (
                    requests_by_post := await self._next_posts(post_slots)
                ) is not None:
                    for requests in requests_by_post:
                        posts.create_task(self._post(requests))
        finally:
            # The writer runs this after the last claim, which may still add to the set.
            await self.ledger_writer.submit(
                transitions.release_unsent, self._unsent_attempts, self.run_state.clock.now_ms()
            )

    async def _acquire_post_slots(self) -> int:
        """Wait until a POST may be sent. Returns how many may be sent; 0 when submitting is over."""
        run_state = self.run_state
        max_posts = max_posts_in_flight(self.config.bulk) // run_state.in_flight_limit.workers
        while not run_state.stop_submitting.is_set():
            post_slots = min(max_posts - self._unanswered_posts, run_state.free_capacity)
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

    async def _next_posts(self, post_slots: int) -> list[list[ClaimedRequest]] | None:
        """Claim the requests of up to `post_slots` POSTs in the ledger. Returns None when nothing is left to send.

        These POSTs are sent at once: a kill leaves only them unconfirmed.
        """
        run_state = self.run_state
        bulk_size = self._current_bulk_size
        try:
            posts, reached, may_free_budget = await self.ledger_writer.submit(
                self._claim_posts, post_slots * bulk_size, bulk_size, run_state.clock.now_ms()
            )
        except LeaseLost:
            raise
        except LedgerFailed as error:
            run_state.stop(error.exit_code, error)  # POSTs in flight are waited for
            return None
        self._uncommitted_attempts.clear()
        run_state.rate_limiter.refund(post_slots - len(posts))
        run_state.queue_is_empty = not posts
        if posts:
            run_state.posts_in_flight += len(posts)
            self._unanswered_posts += len(posts)
        elif run_state.posts_in_flight or run_state.open_tasks or may_free_budget:
            await run_state.wait_for_change(IDLE_S)
        else:
            self._end_at_cap(reached)
            return None
        return posts

    def _end_at_cap(self, reached: type[CapReached] | None) -> None:
        """Note which cap ends the claims, if one does. That of a step ends the step only."""
        budget = self.config.budget
        if reached is StepCapReached:
            self.step_cap_reached = True
            reason = EnrichError(budget.step_stop_reason, STEP_CAP_HINT)
            self.run_state.exit_reasons.setdefault(ExitCode.CREDITS, reason)
        elif reached is not None:
            self.run_state.stop(ExitCode.CREDITS, EnrichError(budget.stop_reason, budget.hint))

    async def _post(self, requests: list[ClaimedRequest]) -> None:
        """Send one POST, exactly once, and record its result."""
        try:
            task_id = await self._send(requests)
            if task_id is not None:
                await self._record_accepted(requests, task_id)
        finally:
            self.run_state.posts_in_flight -= 1
            self.run_state.notify_change()

    async def _send(self, requests: list[ClaimedRequest]) -> str | None:
        """Send the POST. Returns the task id; None: there is none, which is recorded."""
        run_state = self.run_state
        attempts = [request.attempt_id for request in requests]
        params = ",".join(request.params for request in requests)
        body = self._body_prefix + (f"[{params}]" if self.config.bulk else params) + "}"
        try:
            if run_state.stop_submitting.is_set():
                return None
            self._unsent_attempts.difference_update(attempts)
            if not run_state.lease_valid():
                # The lease has expired: another process may take over this request.
                await self.ledger_writer.submit_batch(
                    transitions.record_refused, [(one, "not sent", run_state.clock.now_ms()) for one in attempts]
                )
                return None
            return await self.client.submit(
                self.config.target, body.encode(), self.config.params, len(requests) if self.config.bulk else None
            )
        except ApiCallFailed as error:
            await self._handle_post_error(attempts, error)
            return None
        finally:
            self._unanswered_posts -= 1
            run_state.notify_change()

    async def _record_accepted(self, requests: list[ClaimedRequest], task_id: str) -> None:
        """Record the task of an accepted POST, and pass it on when it is durable."""
        run_state, now_ms = self.run_state, self.run_state.clock.now_ms()
        attempts = tuple(request.attempt_id for request in requests)
        acceptances = await self.ledger_writer.submit_batch(
            transitions.record_accepted, [(attempt, task_id, now_ms) for attempt in attempts], self.config.bound_to
        )
        if acceptances[0] is Acceptance.CONFLICT:
            self._record_unconfirmed(len(requests), SubmissionUnconfirmed(DUPLICATE_TASK_ID))
            return
        self._grow_bulk()
        run_state.counters.submitted += len(requests)
        run_state.counters.cached += sum(each is Acceptance.CACHED for each in acceptances)
        run_state.open_tasks += 1
        run_state.record_post_accepted()
        bulk_task_id, step = requests[0].bulk_task_id, self.config.step or ""
        self.on_task_accepted(Task(attempts, task_id, now_ms, bulk_task_id=bulk_task_id, step=step))

    async def _handle_post_error(self, attempts: Sequence[int], error: ApiCallFailed) -> None:
        """Record a failed POST by the kind of error alone. `enrich.databar.responses` has the table."""
        run_state = self.run_state
        now_ms = run_state.clock.now_ms()
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
                        self._shrink_bulk(len(attempts))  # the credits may suffice for fewer
                        self._max_bulk_size = self._current_bulk_size
                    case OutOfCredits() | Unauthorized() | JobRejected():
                        run_state.stop(error.exit_code, error)
                    case _:
                        run_state.record_post_failed(error)
                await self.ledger_writer.submit_batch(transitions.record_refused, updates)
            case _:
                task_id = error.task_id if isinstance(error, SubmissionUnconfirmed) else None
                await self.ledger_writer.submit_batch(transitions.mark_in_doubt, [(*each, task_id) for each in updates])
                self._record_unconfirmed(len(updates), error)
        self._stop_after_outage(error)

    def _record_unconfirmed(self, requests: int, error: ApiCallFailed) -> None:
        """Record a POST that may or may not have been accepted."""
        self.run_state.counters.unconfirmed += requests
        self.run_state.record_post_failed(error)

    async def _fail_invalid_requests(self, attempts: Sequence[int], error: BadParams, now_ms: int) -> None:
        """Fail the invalid requests. The API accepted nothing of the POST, so the other requests are sent again."""
        if error.rows:
            self._grow_bulk()
        else:
            self._shrink_bulk(len(attempts))  # the API did not name the invalid rows: smaller POSTs find them
        invalid_updates = [(attempts[row], message, now_ms) for row, message in error.rows.items()]
        valid_updates = [
            (attempt, "sent with wrong rows", now_ms) for row, attempt in enumerate(attempts) if row not in error.rows
        ]
        # Submitted to the writer together, so that one commit holds both.
        operations = [(transitions.record_rejected, invalid_updates), (transitions.record_refused, valid_updates)]
        await asyncio.gather(
            *(self.ledger_writer.submit_batch(operation, updates) for operation, updates in operations if updates)
        )
        self.run_state.counters.rejected += len(invalid_updates)
        self.run_state.counters.count_settled(State.FAILED, len(invalid_updates))

    def _shrink_bulk(self, size: int) -> None:
        self._current_bulk_size = max(1, min(self._current_bulk_size, size // 2))

    def _grow_bulk(self) -> None:
        self._current_bulk_size = min(self._max_bulk_size, self._current_bulk_size * 2)

    def _stop_after_outage(self, error: ApiCallFailed) -> None:
        """Stop submitting when the API has accepted no POST for too long. Polling continues."""
        failing_since = self.run_state.circuit_breaker.failing_since
        now = self.run_state.clock.monotonic()
        if failing_since is not None and now - failing_since >= self.run_state.timeouts.outage_s:
            self.run_state.stop(ExitCode.API, error)

    def _claim_posts(
        self, ledger: Database, max_requests: int, bulk_size: int, now_ms: int
    ) -> tuple[list[list[ClaimedRequest]], type[CapReached] | None, bool]:
        """Claim up to `max_requests` requests, in POSTs of at most `bulk_size`.

        Returns the POSTs, the cap that stopped the claim, and whether tasks of other workers may free some budget.
        """
        posts: list[list[ClaimedRequest]] = []
        self._unsent_attempts -= self._uncommitted_attempts
        self._uncommitted_attempts.clear()
        budget, is_bulk = self.config.budget, self.config.bulk is not None
        try:
            while max_requests > 0 and (
                requests := queue.claim(
                    ledger,
                    self.run_state.execution_id,
                    budget.max_request_price,
                    now_ms,
                    min(max_requests, bulk_size) if is_bulk else max_requests,
                    new_up_to=self.new_up_to,
                    bulk=is_bulk,
                    priced_by=budget.priced_by,
                    step=self.config.step,
                    step_cap=budget.step_cap,
                )
            ):
                self._uncommitted_attempts.update(request.attempt_id for request in requests)
                self._unsent_attempts |= self._uncommitted_attempts
                posts += [requests] if is_bulk else [[request] for request in requests]
                max_requests -= len(requests)
        except CapReached as reached:
            may_free_budget = self.run_state.in_flight_limit.workers > 1 and queries.has_open_since(
                ledger, now_ms - self.config.patience_s * 1000
            )
            return posts, type(reached), may_free_budget
        return posts, None, False


async def submit_and_poll(poller: Poller, new_up_to: int | None = None) -> bool:
    """Submit and poll until all selected requests, or those of a canary, are settled.

    Returns False if the cap of the step left some unsent. Add the tasks that earlier runs left open to the poller
    before.
    """
    run_state = poller.run_state
    dispatcher = Dispatcher(run_state, poller.ledger_writer, poller.client, poller.config, poller.add_task, new_up_to)

    async def dispatch() -> None:
        try:
            await dispatcher.run()
        finally:
            poller.no_new_tasks = True
            run_state.notify_change()

    await run_state.run_until_abort(dispatch(), poller.run())
    return not dispatcher.step_cap_reached
