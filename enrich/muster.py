"""Musters the crew of an execution, and sees to what is left when workers of it were lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from enrich.crew import Carrier, Crew
from enrich.dispatcher import posts_on_the_wire
from enrich.execution import Execution
from enrich.hands import AtFile, AtServer
from enrich.model import SystemClock
from enrich.place import Postgres
from enrich.shift import Shift
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.surroundings import Options, Surroundings, rescue_folders
from enrich.worker import Errand

#: How often it is looked whether a lease of another ran out, in seconds.
LOOK_AGAIN_S = 0.5


def muster(around: Surroundings, options: Options, execution: Execution, shift: Shift, work: int) -> Crew | None:
    """Make the crew for so many requests; None: there is no need of one."""
    ledger, engine = around.ledger.place, around.engine
    most = min(execution.in_flight_limit, posts_on_the_wire(shift.bulk), work)
    workers = min(options.processes if engine is None else engine.workers, most)
    if workers < (2 if engine is None else 1):
        return None
    errand = Errand(
        replace(shift, processes=workers),
        around.access,
        ledger,
        execution.id,
        around.timing,
        execution.in_flight_limit // workers,
        execution.result_ttl_s / workers,  # each has its share of the rate to fetch with
        around.clock.now_ms() - SystemClock().now_ms(),
        execution.poll_times,
        around.ledger.owner,
        rescue_folders=rescue_folders(around.job),
    )
    carrier: Carrier = AtServer(ledger) if isinstance(ledger, Postgres) else AtFile(around.lock)
    return Crew(execution, errand, carrier if engine is None else engine.carrier)


async def bury(crew: Crew, journal: Journal, note: Callable[[str], None]) -> None:
    """Tell that workers were lost, and wait until what they were at is in doubt, or anybody's."""
    execution = crew.execution
    if not crew.carrier.heirs:
        doubtful = await journal.do(Ledger.recover, execution.clock.now_ms())
        what = "a process of the run was killed or could not be started"
        note(f"{what}: {doubtful} requests are in doubt; one process goes on alone")
        return
    lost = ", ".join(f"{count} times: {why}" if count > 1 else why for why, count in Counter(crew.lost).items())
    note(f"workers were lost ({lost}): what they were at was given to others")
    while (others := await journal.do(Ledger.others)) and not execution.giving_up.is_set():
        left_s = max(other.left_s for other in others)
        await execution.pause(min(max(left_s, 0.01), LOOK_AGAIN_S), execution.giving_up)
    await journal.do(Ledger.recover, execution.clock.now_ms())
