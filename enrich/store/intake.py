"""From the input to the queue: what each row's question is to the ledger, and what an execution wants.

A pass reads the input once, batch by batch. What it has seen lies in temporary tables, so that
`enrich plan` decides by the same statements as a run, over a ledger that is only looked into.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from enrich.model import ASKED, Call, Decided, Decision, Standing, State, Wanted, Wish
from enrich.place import LedgerPlace
from enrich.store.database import PATIENCE_S
from enrich.store.latencies import Latencies

if TYPE_CHECKING:
    from enrich.store.postgres import Fence

#: Word for word the condition of the index `open_attempts`: without it SQLite would read all attempts.
OPEN_ATTEMPT = "state IN ('submitting', 'submitted')"
#: Likewise of the index `queue`: what this execution may ask, whatever it has been asked before.
QUEUED = "position IS NOT NULL AND state NOT IN ('submitting', 'submitted')"
_ASKED = f"decision IN ({', '.join(repr(decision.value) for decision in ASKED)})"
#: What a limit and a sample count: also what was asked since the plan that says them.
_COUNTED = f"decision IN ({', '.join(repr(decision.value) for decision in (*ASKED, Decision.PLANNED))})"

#: Where the number of a question of `batch b` is looked up.
_REQUESTS = "requests k ON k.fingerprint = b.fingerprint"
_STRANGERS = "(SELECT -id AS id, fingerprint FROM strangers) k ON k.fingerprint = b.fingerprint"

#: More than SQLite's integers can't count.
MOST = 2**62

_PASS = (
    # The distinct questions of a batch, each with the first row that asks it.
    "CREATE TEMP TABLE batch (i BIGINT PRIMARY KEY, fingerprint {blob} NOT NULL, place BIGINT NOT NULL, grp TEXT)",
    # Which requests they are. What the ledger does not know is a stranger, whose number is negative.
    "CREATE TEMP TABLE asks (i BIGINT PRIMARY KEY, id BIGINT NOT NULL)",
    "CREATE TEMP TABLE strangers (id {serial}, fingerprint {blob} NOT NULL UNIQUE)",
)
# By number rather than by fingerprint: a file's requests stand in the ledger nearly in its order.
_SEEN = """CREATE TEMP TABLE seen (id BIGINT PRIMARY KEY, position BIGINT NOT NULL, place BIGINT NOT NULL,
grp TEXT, decision TEXT NOT NULL)"""


class Intake(Latencies):
    """A ledger that is joined with batches of the input."""

    def __init__(
        self,
        place: LedgerPlace,
        *,
        read_only: bool = False,
        fence: Fence | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Open the ledger as Database does."""
        super().__init__(place, read_only=read_only, fence=fence, patience_s=patience_s)
        #: What was seen is known to all that work at this execution, and lies in the ledger.
        self._shared = self._db.dialect.passes_are_shared and not read_only
        self._wish = Wish()
        self._joined = False
        self.patiently(self._make_room)

    def _make_room(self) -> None:
        dialect = self._db.dialect
        self._db.begin_temporary()
        for statement in _PASS if self._shared else (*_PASS, _SEEN):
            self._db.execute(statement.format(blob=dialect.blob, serial=dialect.serial))
        self._db.commit()

    def _make_room_again(self) -> None:
        if not self._db.has_temporary("batch"):
            self._make_room()

    def regain(self, failure: BaseException) -> bool | None:
        """Do as Database does; temporary tables go with their connection."""
        regained = super().regain(failure)
        if regained is not None:
            # The server may go away again.
            self.patiently(self._make_room_again)
        return regained

    def begin_pass(self, wish: Wish | None = None) -> None:
        """Begin to read the input from its start: no request was seen yet."""
        self._wish = wish or Wish()
        self._joined = False
        self._db.clear("seen")
        self._db.clear("strangers")

    def join_pass(self, wish: Wish) -> None:
        """Take part in a pass that another process has begun, with the same wish."""
        self._wish = wish
        self._joined = True

    def look(self, wanted: Iterable[Wanted]) -> None:
        """See the requests of a batch; decide about those not seen before in this pass."""
        with self._looking():
            self._load(wanted)
            self._db.execute(
                "INSERT INTO strangers (fingerprint) SELECT fingerprint FROM batch WHERE i NOT IN (SELECT i FROM asks) "
                "ORDER BY i"
            )
            self._know(_STRANGERS)
            self._see()

    def enroll(self, call: Call, wanted: Iterable[Wanted]) -> None:
        """See the requests of a batch, making those that are new; `mark` puts what is wanted into the queue."""
        params = self._load(wanted)
        rows = self._db.execute("SELECT fingerprint FROM batch WHERE i NOT IN (SELECT i FROM asks) ORDER BY i")
        strange = [name for (name,) in rows]
        if strange:
            canonical = call.canonical()
            self._db.execute("INSERT INTO calls (canonical) VALUES (?) ON CONFLICT DO NOTHING", (canonical,))
            (number,) = self._db.execute("SELECT id FROM calls WHERE canonical = ?", (canonical,)).fetchone()
            self._db.executemany(
                "INSERT INTO requests (fingerprint, call_id, params, state) VALUES (?, ?, ?, 'pending') "
                "ON CONFLICT DO NOTHING",
                # Who enrolls the same at the same time does it in the same order, and nobody waits in a circle.
                [(name, number, params[name]) for name in (sorted(strange) if self._shared else strange)],
            )
            self._know(_REQUESTS)
        self._see()
        # What was purged is known by its name alone until it is to be asked again.
        purged = self._db.execute(
            "SELECT fingerprint, id FROM requests WHERE erased_ms IS NOT NULL "
            f"AND id IN (SELECT id FROM asks JOIN seen USING (id) WHERE {_ASKED})"
        ).fetchall()
        self._db.executemany(
            "UPDATE requests SET params = ?, erased_ms = NULL WHERE id = ?",
            [(params[name], number) for name, number in purged],
        )

    def choose(self) -> None:
        """Leave out what the wish leaves out, now that the whole input was seen: caps, then sample, then limit."""
        with self._looking():
            self._choose(self._wish)

    def _choose(self, wish: Wish) -> None:
        if wish.max_per_group is not None:
            # What was asked before counts first.
            self._leave_out(
                Decision.CAPPED,
                "SELECT id FROM (SELECT id, decision, row_number() OVER "
                "(PARTITION BY grp ORDER BY decision = 'new', place) AS number FROM seen WHERE grp IS NOT NULL) "
                "AS grouped WHERE decision = 'new' AND number > ?",
                min(wish.max_per_group, MOST),
            )
        if wish.sample is not None:
            (count,) = self._db.execute(f"SELECT count(*) FROM seen WHERE {_COUNTED}").fetchone()
            self._db.execute("CREATE TEMP TABLE chosen (number BIGINT PRIMARY KEY)")
            numbers = spread(count, wish.sample, wish.seed)
            self._db.executemany("INSERT INTO chosen VALUES (?)", ((number,) for number in numbers))
            self._leave_out(
                Decision.NOT_SAMPLED,
                "SELECT id FROM (SELECT id, row_number() OVER (ORDER BY position) - 1 AS number "
                f"FROM seen WHERE {_COUNTED}) AS counted "
                "WHERE NOT EXISTS (SELECT 1 FROM chosen WHERE chosen.number = counted.number)",
            )
            self._db.execute("DROP TABLE chosen")
        if wish.limit is not None:
            self._leave_out(
                Decision.OVER_LIMIT,
                f"SELECT id FROM seen WHERE {_COUNTED} ORDER BY place LIMIT {MOST} OFFSET ?",
                min(wish.limit, MOST),
            )

    def mark(self) -> None:
        """Put what is wanted into the queue; a lead that left the file is forgotten there, and never paid for.

        The mark is a place in the queue; it ends with the execution, and so does the person's word. What is
        at the API is marked, too: when it fails at no charge, it is asked again. Where the person said how
        many are asked at most, that holds only for what this wish has asked itself.
        """
        self._db.execute(f"UPDATE requests SET position = NULL WHERE {QUEUED}")
        at_the_api = f"(SELECT request_id FROM attempts WHERE {OPEN_ATTEMPT})"
        self._db.execute(f"UPDATE requests SET position = NULL WHERE id IN {at_the_api}")
        waiting = "" if self._wish.narrowed else " OR decision = 'waiting'"
        planned = f"decision = 'planned' AND id IN {at_the_api}"
        self._db.execute(
            "UPDATE requests SET position = (SELECT place FROM seen WHERE seen.id = requests.id) "
            f"WHERE id IN (SELECT id FROM seen WHERE {_ASKED}{waiting} OR {planned})"
        )

    def accept_doubts(self) -> int:
        """Settle what is in doubt as failed (edge f, by the person's word), of all that was seen in this pass.

        Its attempt stays in doubt on record.
        """
        accepted = self._db.execute(
            "UPDATE requests SET state = 'failed' WHERE state = 'in_doubt' AND id IN (SELECT id FROM seen)"
        ).rowcount
        self._db.execute("UPDATE seen SET decision = 'failed' WHERE decision = 'in_doubt'")
        return accepted

    def decided(self) -> dict[Decision, int]:
        """Count the distinct requests of this pass by what was decided about them."""
        rows = self._db.execute("SELECT decision, count(*) FROM seen GROUP BY 1")
        return {Decision(decision): count for decision, count in rows}

    def oldest_answer(self) -> int | None:
        """Tell when the oldest answer came (ms) that is used again in this pass; None: there is none."""
        (oldest_ms,) = self._db.execute(
            "SELECT min(a.settled_ms) FROM seen s JOIN requests r ON r.id = s.id "
            "JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) WHERE s.decision IN ('found', 'not_found')"
        ).fetchone()
        return None if oldest_ms is None else int(oldest_ms)

    def decisions(self, wanted: Iterable[Wanted]) -> Iterator[Decided]:
        """Tell what was decided about each row of a batch, now that the whole input was seen."""
        rows = list(wanted)
        with self._looking():
            self._load(rows)
            known = self._db.execute(
                "SELECT b.fingerprint, s.position, s.decision, a.settled_ms "
                f"FROM asks {self._join} batch b ON b.i = asks.i JOIN seen s ON s.id = asks.id "
                "LEFT JOIN requests r ON r.id = asks.id "
                "LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id)"
            )
            told = {name: (first, Decision(decision), settled_ms) for name, first, decision, settled_ms in known}
        for row in rows:
            if row.fingerprint in told:
                yield Decided(row.position, *told[row.fingerprint])

    def enrolled(self) -> dict[State, int]:
        """Count the distinct requests of this pass by their state; those in the queue are pending."""
        rows = self._db.execute(
            "SELECT CASE WHEN r.position IS NOT NULL AND r.state NOT IN ('submitting', 'submitted') "
            "THEN 'pending' ELSE r.state END, count(*) "
            "FROM seen s JOIN requests r ON r.id = s.id GROUP BY 1"
        )
        return {State(state): count for state, count in rows}

    def queued(self) -> int:
        """Count what may be asked yet."""
        (count,) = self._db.execute(f"SELECT count(*) FROM requests WHERE {QUEUED}").fetchone()
        return int(count)

    def standing(self, asked: Iterable[Wanted]) -> list[Standing]:
        """Tell what is known of each request of a batch; one never enrolled is left out, unless it is capped."""
        if self._joined:
            self._load(asked)  # all of it was seen, and others may be looking
        else:
            self.look(asked)
        rows = self._db.execute(
            "SELECT asks.i, CAST(s.position = asks.i AS INTEGER), "
            "CASE WHEN r.answer_id IS NULL THEN coalesce(r.state, 'pending') ELSE a.state END, "
            "a.answer, a.error, a.provider, a.credits, a.task_id, a.settled_ms, a.id, "
            "CAST(s.decision = 'capped' AS INTEGER), a.erased_ms "
            f"FROM asks {self._join} seen s ON s.id = asks.id LEFT JOIN requests r ON r.id = asks.id "
            "LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) "
            "WHERE asks.id > 0 OR s.decision = 'capped' ORDER BY asks.i"
        )
        return list(map(Standing._make, rows))

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Make one commit of it for who only looks, and has no transaction."""
        if self._db.in_transaction:
            yield
            return
        self._db.begin_temporary()
        try:
            yield
            self._db.commit()
        except BaseException:
            self._db.rollback()
            raise

    def _load(self, wanted: Iterable[Wanted]) -> dict[bytes, str]:
        """Load the distinct questions of a batch, and find the requests that they are; return their params."""
        rows = list(wanted)
        # Of rows that ask the same, the first in the input says whose group, the first in the order of asking when.
        distinct = {row.fingerprint: row for row in reversed(rows)}
        first = list(reversed(distinct.values()))
        self._db.clear("batch")
        self._db.clear("asks")
        # A fifth of the time that a row at a time would take.
        self._db.execute(
            "INSERT INTO batch SELECT CAST(value AS BIGINT), substr(?2, CAST(16 * key + 1 AS INTEGER), 16), "
            "CAST(value AS BIGINT), NULL FROM json_each(CAST(?1 AS TEXT))",
            (json.dumps([row.position for row in first]), b"".join([row.fingerprint for row in first])),
        )
        if any(row.place is not None or row.group is not None for row in first):
            places: dict[bytes, int] = {}
            for position, name, _, told, _ in rows:
                place = position if told is None else told
                places[name] = min(place, places.get(name, place))
            self._db.executemany(
                "UPDATE batch SET place = ?, grp = ? WHERE i = ?",
                [(places[row.fingerprint], row.group, row.position) for row in first],
            )
        self._db.analyse("batch")
        # A stranger remains one in this pass, though somebody else may enroll it meanwhile.
        self._know(_STRANGERS)
        self._know(_REQUESTS)
        return {name: row.params for name, row in distinct.items()}

    @property
    def _join(self) -> str:
        return self._db.dialect.ordered_join

    def _know(self, where: str) -> None:
        self._db.execute(
            f"INSERT INTO asks SELECT b.i, k.id FROM batch b {self._join} {where} WHERE true ON CONFLICT DO NOTHING"
        )
        self._db.analyse("asks")

    def _see(self) -> None:
        self._db.execute(
            f"INSERT INTO seen SELECT asks.id, b.i, b.place, b.grp, {self._decision()} "
            f"FROM asks {self._join} batch b ON b.i = asks.i LEFT JOIN requests r ON r.id = asks.id WHERE true "
            # Batches may come in any order.
            "ORDER BY asks.id ON CONFLICT (id) DO UPDATE SET "
            "place = CASE WHEN excluded.place < seen.place THEN excluded.place ELSE seen.place END, "
            "grp = CASE WHEN excluded.position < seen.position THEN excluded.grp ELSE seen.grp END, "
            "position = CASE WHEN excluded.position < seen.position THEN excluded.position ELSE seen.position END "
            "WHERE excluded.place < seen.place OR excluded.position < seen.position"
        )

    def _decision(self) -> str:
        """Write what is decided about a request before the whole input was seen."""
        wish = self._wish
        newest = "EXISTS (SELECT 1 FROM attempts a WHERE a.id = r.attempt_id AND {})".format
        cases: dict[str, Decision] = {}
        if wish.since is not None:
            settled = newest(f"a.settled_in > {wish.since:d} AND a.execution_id <= {wish.since:d}")
            # What waited when the plan was made is none of those that it said would be asked.
            cases[f"r.state = 'pending' AND {settled}"] = Decision.WAITING
            cases[f"r.state <> 'pending' AND {newest(f'a.execution_id > {wish.since:d}')}"] = Decision.PLANNED
            cases |= {f"r.state = '{state}' AND {settled}": Decision(state.value) for state in wish.retry}
        cases["r.state IS NULL OR r.state = 'pending'"] = Decision.NEW
        if wish.killed:
            # The next execution begins with putting it in doubt.
            again = State.IN_DOUBT in wish.retry
            cases["r.state = 'submitting'"] = Decision.RETRY if again else Decision.IN_DOUBT
        cases[f"r.{OPEN_ATTEMPT}"] = Decision.WAITING
        cases |= {f"r.state = '{state}'": Decision.RETRY for state in wish.retry}
        for state, before_ms in wish.stale.items():
            cases[f"r.state = '{state}' AND {newest(f'a.settled_ms < {before_ms:d}')}"] = Decision.REFRESH
        return "CASE " + "".join(f"WHEN {case} THEN '{name}' " for case, name in cases.items()) + "ELSE r.state END"

    def _leave_out(self, decision: Decision, which: str, *values: object) -> None:
        self._db.execute(f"UPDATE seen SET decision = '{decision}' WHERE id IN ({which})", values)


def spread(count: int, sample: int, seed: int) -> list[int]:
    """Choose `sample` of the numbers below `count`: one at random of each of as many equal stretches."""
    sample = min(sample, count)
    chance = random.Random(seed)  # noqa: S311 - a sample is no secret
    edges = [number * count // sample for number in range(sample + 1)] if sample else []
    return [chance.randrange(low, high) for low, high in pairwise(edges)]
