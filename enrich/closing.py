"""The end of an execution: what it cost and why, who earned it, and the receipt in the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from enrich.api.client import Client
from enrich.cascade import Earned, earnings, read_offers
from enrich.connect import Connection
from enrich.difference import CENT, compare
from enrich.errors import CallFailed
from enrich.execution import Execution
from enrich.model import State, to_credits, to_micros
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
            cost_per_hit=round(to_credits(spent) / hits, 6) if hits else None,
            balance_before=None if before is None else to_credits(before),
            balance_after=None if after is None else to_credits(after),
            polls=tally.polls,
            rate_limited=tally.rate_limited,
        )
        receipt = replace(
            receipt, **await self._earned(receipt), difference=await self._difference(before, after, spent)
        )
        await self.journal.do(
            Ledger.end_execution, execution.id, receipt.exit_code, receipt.as_json(), clock.now_ms(), after
        )
        return receipt

    async def _balance(self) -> int | None:
        """Ask for the balance after the run; a run that had to leave asks for nothing more."""
        if self.execution.giving_up.is_set() or self.signals.heard is not None:
            return None
        try:
            async with asyncio.timeout(BALANCE_S):
                return to_micros((await self.client.user()).balance)
        except (CallFailed, TimeoutError):
            return None

    async def _earned(self, receipt: Receipt) -> dict[str, Any]:
        """Tell which provider was asked, found and was paid, by the answers of this execution."""
        if not receipt.answers or (self.signals.heard is not None and receipt.answers > READ_WHEN_INTERRUPTED):
            return {}
        told = await self.journal.do(
            lambda ledger: earnings(ledger.settled(receipt.job, receipt.execution), read_offers(ledger.waterfalls()))
        )
        return {
            "providers": list(in_credits(told.providers)),
            "providers_untold": told.untold,
            "credits_elsewhere": to_credits(told.elsewhere),
        }

    async def _difference(self, before: int | None, after: int | None, spent: int) -> dict[str, Any] | None:
        """Take apart what the balance lost; when that is what was spent, nothing needs to be looked up."""
        if before is None or after is None:
            return None
        if abs(to_credits(before - after - spent)) < CENT:
            return None
        movements = await self.journal.do(Ledger.movements, self.execution.id)
        return asdict(compare(self.execution.id, before, after, movements))


def in_credits(providers: Sequence[Earned]) -> Iterator[dict[str, Any]]:
    """Write providers as JSON has them."""
    for each in providers:
        per_hit = None if each.per_hit is None else to_credits(round(each.per_hit))
        yield asdict(each) | {"credits": to_credits(each.credits), "cost_per_hit": per_hit}
