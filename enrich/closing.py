"""The end of an execution: what it cost and why, who earned it, and the receipt in the ledger."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, replace
from typing import Any

from enrich.cascade import ProviderStats, ProviderTotals, load_waterfalls
from enrich.connect import Preflight
from enrich.databar.client import Client
from enrich.difference import ROUNDING_CREDITS, explain_balance
from enrich.errors import ApiCallFailed
from enrich.execution import RunState
from enrich.ledger.ledger import Ledger
from enrich.ledger.writer import LedgerWriter
from enrich.model import State, format_credits, pluralize, read_balance, to_credits
from enrich.receipt import RunSummary
from enrich.signals import SignalHandler

#: The answers of a run that was told to leave are read again only when that is quick.
MAX_READ_WHEN_INTERRUPTED = 100_000
#: The balance is asked for within so many seconds, or not told.
BALANCE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RunFinisher:
    """Closes the books of one execution."""

    run_state: RunState
    preflight: Preflight
    client: Client
    ledger_writer: LedgerWriter
    signals: SignalHandler

    async def finish_run(self, summary: RunSummary) -> RunSummary:
        """Complete a receipt that knows the rows, and write down that the execution ended."""
        run_state, clock = self.run_state, self.run_state.clock
        counters = run_state.counters
        await self.ledger_writer.submit(Ledger.recover, clock.now_ms())
        totals = await self.ledger_writer.submit(Ledger.execution, run_state.execution_id)
        before = self.preflight.balance
        after = await self._balance() if counters.settled or counters.submitted else before
        spent, matches = totals["spent"], counters.settled.get(State.FOUND, 0)
        summary = replace(
            summary,
            execution=run_state.execution_id,
            submitted=totals["submitted"],
            answers=sum(counters.settled.values()),
            credits_spent=to_credits(spent),
            credits_unknown=totals["unknown"],
            cost_per_hit=to_credits(round(spent / matches)) if matches else None,
            balance_before=to_credits(before),
            balance_after=to_credits(after),
            polls=counters.polls,
            rate_limited=counters.rate_limited,
        )
        summary = replace(
            summary, **await self._provider_fields(summary), difference=await self._balance_change(before, after, spent)
        )
        summary = await self._with_overrun(summary, totals["cap"], spent)
        await self.ledger_writer.submit(
            Ledger.end_execution, run_state.execution_id, summary.exit_code, summary.as_json(), clock.now_ms(), after
        )
        return summary

    async def _with_overrun(self, summary: RunSummary, cap: int | None, spent: int) -> RunSummary:
        """Say by how much the cap was overrun, where a price that rose in flight is the reason."""
        if cap is None or spent <= cap:
            return summary
        number, price_rise = await self.ledger_writer.submit(Ledger.cost_overruns, self.run_state.execution_id)
        if not number:
            return summary
        overrun = min(spent - cap, price_rise)
        note = (
            f"the credits cap was overrun by {format_credits(to_credits(overrun))}: {pluralize(number, 'task')} cost "
            f"{format_credits(to_credits(price_rise))} more than the highest price when they were sent"
        )
        return replace(summary, credits_over_cap=to_credits(overrun), notes=[*summary.notes, note])

    async def _balance(self) -> int | None:
        """Ask for the balance after the run; a run that had to leave asks for nothing more."""
        if self.run_state.stop_polling.is_set() or self.signals.received is not None:
            return None
        try:
            async with asyncio.timeout(BALANCE_TIMEOUT_S):
                return read_balance((await self.client.get_user()).balance)
        except (ApiCallFailed, TimeoutError):
            return None

    async def _provider_fields(self, summary: RunSummary) -> dict[str, Any]:
        """Tell which provider was asked, found and was paid, by the answers of this execution."""
        totals = await self.ledger_writer.submit(self._read_provider_totals, summary) if summary.answers else None
        if totals is None:
            return {}
        return {
            "providers": [each.as_json() for each in totals.providers],
            "providers_untold": totals.not_reported,
            "credits_elsewhere": to_credits(totals.unattributed),
        }

    def _read_provider_totals(self, ledger: Ledger, summary: RunSummary) -> ProviderTotals | None:
        """Read the answers of this execution; None when a signal came and they are too many."""
        stats = ProviderStats(load_waterfalls(ledger.waterfalls()))
        for settled in ledger.settled_attempts(summary.job, summary.execution):
            if self.signals.received is not None and (summary.answers or 0) > MAX_READ_WHEN_INTERRUPTED:
                return None
            stats.add(settled)
        return stats.totals()

    async def _balance_change(self, before: int | None, after: int | None, spent: int) -> dict[str, Any] | None:
        """Take apart what the balance lost; when that is what was spent, nothing needs to be looked up."""
        if before is None or after is None:
            return None
        if abs(to_credits(before - after - spent)) < ROUNDING_CREDITS:
            return None
        movements = await self.ledger_writer.submit(Ledger.credit_movements, self.run_state.execution_id)
        return asdict(explain_balance(self.run_state.execution_id, before, after, movements))
