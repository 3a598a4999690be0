"""From the input to the queue: what each row's question is to the ledger, and what an execution wants.

A pass reads the input once, batch by batch. What it has seen lies in temporary tables, so that
`enrich plan` decides by the same statements as a run, over a ledger that is only looked into.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from enrich.model import ASKED, Call, Decided, Decision, Standing, State, Wanted, Wish
from enrich.store.latencies import Latencies

#: Word for word the condition of the index `open_attempts`: without it SQLite would read all attempts.
OPEN_ATTEMPT = "state IN ('submitting', 'submitted')"
#: Likewise of the index `queue`: what this execution may ask, whatever it has been asked before.
QUEUED = "position IS NOT NULL AND state NOT IN ('submitting', 'submitted')"
_ASKED = f"decision IN ({', '.join(repr(decision.value) for decision in ASKED)})"
#: What a limit and a sample count: also what was asked since the plan that says them.
_COUNTED = f"decision IN ({', '.join(repr(decision.value) for decision in (*ASKED, Decision.PLANNED))})"

#: More than SQLite's integers can't count.
MOST = 2**62

_PASS = (
    "CREATE TEMP TABLE batch (i INTEGER PRIMARY KEY, fingerprint BLOB, params TEXT, place INTEGER, grp TEXT)",
    """CREATE TEMP TABLE seen (fingerprint BLOB PRIMARY KEY, position INTEGER NOT NULL, place INTEGER NOT NULL,
    grp TEXT, decision TEXT NOT NULL) WITHOUT ROWID""",
)


class Intake(Latencies):
    """A ledger that is joined with batches of the input."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the ledger as Database does."""
        super().__init__(path, read_only=read_only)
        for statement in _PASS:
            self._db.execute(statement)
        self.begin_pass()

    def begin_pass(self, wish: Wish | None = None) -> None:
        """Begin to read the input from its start: no request was seen yet."""
        self._wish = wish or Wish()
        self._db.execute("DELETE FROM seen")

    def look(self, wanted: Iterable[Wanted]) -> None:
        """See the requests of a batch; decide about those not seen before in this pass."""
        self._load(wanted)
        self._see()

    def enroll(self, call: Call, wanted: Iterable[Wanted]) -> None:
        """See the requests of a batch, making those that are new; `mark` puts what is wanted into the queue."""
        self._load(wanted)
        canonical = call.canonical()
        self._db.execute("INSERT OR IGNORE INTO calls (canonical) VALUES (?)", (canonical,))
        self._db.execute(
            "INSERT INTO requests (fingerprint, call_id, params, state) "
            "SELECT fingerprint, (SELECT id FROM calls WHERE canonical = ?), params, 'pending' "
            "FROM batch WHERE true ORDER BY i ON CONFLICT (fingerprint) DO NOTHING",
            (canonical,),
        )
        self._see()
        # What was purged is known by its name alone until it is to be asked again.
        self._db.execute(
            "UPDATE requests SET params = b.params, erased_ms = NULL FROM batch b JOIN seen s USING (fingerprint) "
            f"WHERE requests.erased_ms IS NOT NULL AND requests.fingerprint = b.fingerprint AND s.{_ASKED}"
        )

    def choose(self) -> None:
        """Leave out what the wish leaves out, now that the whole input was seen: caps, then sample, then limit."""
        wish = self._wish
        if wish.max_per_group is not None:
            # What was asked before counts first.
            self._leave_out(
                Decision.CAPPED,
                "SELECT fingerprint FROM (SELECT fingerprint, decision, row_number() OVER "
                "(PARTITION BY grp ORDER BY decision = 'new', place) AS number FROM seen WHERE grp IS NOT NULL) "
                "WHERE decision = 'new' AND number > ?",
                min(wish.max_per_group, MOST),
            )
        if wish.sample is not None:
            (count,) = self._db.execute(f"SELECT count(*) FROM seen WHERE {_COUNTED}").fetchone()
            self._db.execute("CREATE TEMP TABLE chosen (number INTEGER PRIMARY KEY)")
            numbers = spread(count, wish.sample, wish.seed)
            self._db.executemany("INSERT INTO chosen VALUES (?)", ((number,) for number in numbers))
            self._leave_out(
                Decision.NOT_SAMPLED,
                "SELECT fingerprint FROM (SELECT fingerprint, row_number() OVER (ORDER BY position) - 1 AS number "
                f"FROM seen WHERE {_COUNTED}) WHERE number NOT IN (SELECT number FROM chosen)",
            )
            self._db.execute("DROP TABLE chosen")
        if wish.limit is not None:
            self._leave_out(
                Decision.OVER_LIMIT,
                f"SELECT fingerprint FROM seen WHERE {_COUNTED} ORDER BY place LIMIT -1 OFFSET ?",
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
        place = "UPDATE requests SET position = s.place FROM temp.seen s WHERE s.fingerprint = requests.fingerprint AND"
        waiting = "" if self._wish.narrowed else " OR s.decision = 'waiting'"
        self._db.execute(f"{place} (s.{_ASKED}{waiting})")
        self._db.execute(f"{place} s.decision = 'planned' AND requests.id IN {at_the_api}")

    def accept_doubts(self, wanted: Iterable[Wanted]) -> int:
        """Settle what is in doubt as failed (edge f, by the person's word); its attempt stays in doubt on record."""
        self._load(wanted)
        return self._db.execute(
            "UPDATE requests SET state = 'failed' WHERE state = 'in_doubt' "
            "AND id IN (SELECT r.id FROM batch b JOIN requests r ON r.fingerprint = b.fingerprint)"
        ).rowcount

    def decided(self) -> dict[Decision, int]:
        """Count the distinct requests of this pass by what was decided about them."""
        rows = self._db.execute("SELECT decision, count(*) FROM seen GROUP BY 1")
        return {Decision(decision): count for decision, count in rows}

    def oldest_answer(self) -> int | None:
        """Tell when the oldest answer came (ms) that is used again in this pass; None: there is none."""
        (oldest_ms,) = self._db.execute(
            "SELECT min(a.settled_ms) FROM seen s JOIN requests r ON r.fingerprint = s.fingerprint "
            "JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) WHERE s.decision IN ('found', 'not_found')"
        ).fetchone()
        return None if oldest_ms is None else int(oldest_ms)

    def decisions(self, wanted: Iterable[Wanted]) -> Iterator[Decided]:
        """Tell what was decided about each row of a batch, now that the whole input was seen."""
        self._load(wanted)
        rows = self._db.execute(
            "SELECT b.i, s.position, s.decision, a.settled_ms FROM batch b "
            "JOIN seen s ON s.fingerprint = b.fingerprint "
            "LEFT JOIN requests r ON r.fingerprint = b.fingerprint "
            "LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) ORDER BY b.i"
        )
        for position, first, decision, settled_ms in rows:
            yield Decided(position, first, Decision(decision), settled_ms)

    def enrolled(self) -> dict[State, int]:
        """Count the distinct requests of this pass by their state; those in the queue are pending."""
        rows = self._db.execute(
            "SELECT CASE WHEN r.position IS NOT NULL AND r.state NOT IN ('submitting', 'submitted') "
            "THEN 'pending' ELSE r.state END, count(*) "
            "FROM seen s JOIN requests r ON r.fingerprint = s.fingerprint GROUP BY 1"
        )
        return {State(state): count for state, count in rows}

    def queued(self) -> int:
        """Count what may be asked yet."""
        (count,) = self._db.execute(f"SELECT count(*) FROM requests WHERE {QUEUED}").fetchone()
        return int(count)

    def standing(self, asked: Iterable[Wanted]) -> Iterator[Standing]:
        """Tell what is known of each row of a batch; a request never enrolled is left out, unless it is capped."""
        self.look(asked)
        rows = self._rows(
            "SELECT b.i, s.position = b.i, "
            "CASE WHEN r.answer_id IS NULL THEN coalesce(r.state, 'pending') ELSE a.state END, "
            "a.answer, a.error, a.provider, a.credits, a.task_id, a.settled_ms, a.id, "
            "s.decision = 'capped', a.erased_ms "
            "FROM batch b JOIN seen s ON s.fingerprint = b.fingerprint "
            "LEFT JOIN requests r ON r.fingerprint = b.fingerprint "
            "LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) "
            "WHERE r.id IS NOT NULL OR s.decision = 'capped' ORDER BY b.i"
        )
        for index, first, state, *known in rows:
            yield Standing(index, bool(first), State(state), *known)

    def _load(self, wanted: Iterable[Wanted]) -> None:
        # Who only looks has no transaction, and each row would be a commit of its own.
        looking = not self._db.in_transaction
        if looking:
            self._db.execute("BEGIN")
        try:
            self._db.execute("DELETE FROM batch")
            self._db.executemany("INSERT INTO batch VALUES (?, ?, ?, ?, ?)", wanted)
        finally:
            if looking:
                self._db.execute("COMMIT")

    def _see(self) -> None:
        # Of rows that ask the same, the first in the order of asking says when, the first in the input whose group.
        self._db.execute(
            f"INSERT INTO seen SELECT b.fingerprint, b.i, coalesce(b.place, b.i), b.grp, {self._decision()} "
            "FROM batch b LEFT JOIN requests r ON r.fingerprint = b.fingerprint WHERE true ORDER BY b.i "
            "ON CONFLICT (fingerprint) DO UPDATE SET place = min(place, excluded.place)"
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
        self._db.execute(f"UPDATE seen SET decision = '{decision}' WHERE fingerprint IN ({which})", values)


def spread(count: int, sample: int, seed: int) -> list[int]:
    """Choose `sample` of the numbers below `count`: one at random of each of as many equal stretches."""
    sample = min(sample, count)
    chance = random.Random(seed)  # noqa: S311 - a sample is no secret
    edges = [number * count // sample for number in range(sample + 1)] if sample else []
    return [chance.randrange(low, high) for low, high in pairwise(edges)]
