"""The end of an execution: what it cost and why, who earned it, and the receipt in the ledger."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, replace
from typing import Any

from enrich.api.client import Client
from enrich.cascade import Cascade, Earnings, read_offers
from enrich.connect import Connection
from enrich.difference import CENT, compare
from enrich.errors import CallFailed
from enrich.execution import Execution
from enrich.model import State, many, read_balance, to_credits, write_credits
from enrich.receipt import Receipt
from enrich.signals import Signals
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger

#: The answers of a run that was told to leave are read again only when that is quick.
READ_WHEN_INTERRUPTED = 100_000
#: The balance is asked for within so many seconds, or not told.
BALANCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Closing:
    """Closes the books of one execution."""

    execution: Execution
    connection: Connection
    client: Client
    journal: Journal
    signals: Signals

    async def close(self, receipt: Receipt) -> Receipt:
        """Complete a receipt that knows the rows, and write down that the execution ended."""
        execution, clock = self.execution, self.execution.clock
        tally = execution.tally
        await self.journal.do(Ledger.recover, clock.now_ms())
        known = await self.journal.do(Ledger.execution, execution.id)
        before = self.connection.balance
        after = await self._balance() if tally.settled or tally.submitted else before
        spent, hits = known["spent"], tally.settled.get(State.FOUND, 0)
        receipt = replace(
            receipt,
            execution=execution.id,
            submitted=known["submitted"],
            answers=sum(tally.settled.values()),
            credits_spent=to_credits(spent),
            credits_unknown=known["unknown"],
            cost_per_hit=to_credits(round(spent / hits)) if hits else None,
            balance_before=to_credits(before),
            balance_after=to_credits(after),
            polls=tally.polls,
            rate_limited=tally.rate_limited,
        )
        receipt = replace(
            receipt, **await self._earned(receipt), difference=await self._difference(before, after, spent)
        )
        receipt = await self._overrun(receipt, known["cap"], spent)
        await self.journal.do(
            Ledger.end_execution, execution.id, receipt.exit_code, receipt.as_json(), clock.now_ms(), after
        )
        return receipt

    async def _overrun(self, receipt: Receipt, cap: int | None, spent: int) -> Receipt:
        """Say by how much the cap was overrun, where a price that rose in flight is the reason."""
        if cap is None or spent <= cap:
            return receipt
        number, risen = await self.journal.do(Ledger.risen, self.execution.id)
        if not number:
            return receipt
        over = min(spent - cap, risen)
        note = (
            f"the credits cap was overrun by {write_credits(to_credits(over))}: {many(number, 'task')} cost "
            f"{write_credits(to_credits(risen))} more than the highest price when they were sent"
        )
        return replace(receipt, credits_over_cap=to_credits(over), notes=[*receipt.notes, note])

    async def _balance(self) -> int | None:
        """Ask for the balance after the run; a run that had to leave asks for nothing more."""
        if self.execution.giving_up.is_set() or self.signals.heard is not None:
            return None
        try:
            async with asyncio.timeout(BALANCE_S):
                return read_balance((await self.client.user()).balance)
        except (CallFailed, TimeoutError):
            return None

    async def _earned(self, receipt: Receipt) -> dict[str, Any]:
        """Tell which provider was asked, found and was paid, by the answers of this execution."""
        told = await self.journal.do(self._read, receipt) if receipt.answers else None
        if told is None:
            return {}
        return {
            "providers": [each.as_json() for each in told.providers],
            "providers_untold": told.untold,
            "credits_elsewhere": to_credits(told.elsewhere),
        }

    def _read(self, ledger: Ledger, receipt: Receipt) -> Earnings | None:
        """Read the answers of this execution; None when a signal came and they are too many."""
        cascade = Cascade(read_offers(ledger.waterfalls()))
        for settled in ledger.settled(receipt.job, receipt.execution):
            if self.signals.heard is not None and (receipt.answers or 0) > READ_WHEN_INTERRUPTED:
                return None
            cascade.add(settled)
        return cascade.earnings()

    async def _difference(self, before: int | None, after: int | None, spent: int) -> dict[str, Any] | None:
        """Take apart what the balance lost; when that is what was spent, nothing needs to be looked up."""
        if before is None or after is None:
            return None
        if abs(to_credits(before - after - spent)) < CENT:
            return None
        movements = await self.journal.do(Ledger.movements, self.execution.id)
        return asdict(compare(self.execution.id, before, after, movements))
