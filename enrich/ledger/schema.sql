-- The tables of a ledger in a SQLite file. Times are milliseconds since 1970 (UTC), credits are millionths.

CREATE TABLE facts (            -- what the whole ledger is bound to: api_host, workspace
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE waterfalls (       -- as the API last described them
    identifier TEXT PRIMARY KEY,
    description TEXT NOT NULL,  -- JSON
    providers TEXT              -- JSON list of the default enrichments, resolved at first use
) STRICT, WITHOUT ROWID;

CREATE TABLE calls (            -- distinct waterfall calls: waterfall, enrichments, verifier
    id INTEGER PRIMARY KEY,
    canonical TEXT NOT NULL UNIQUE
) STRICT;

CREATE TABLE executions (       -- one `enrich run` from start to exit
    id INTEGER PRIMARY KEY,
    job TEXT NOT NULL,
    started_ms INTEGER NOT NULL,
    ended_ms INTEGER,           -- NULL: running, or killed
    exit_code INTEGER,
    cap INTEGER,                -- credits it may spend; NULL: no cap
    reserved INTEGER NOT NULL DEFAULT 0,  -- maximum price of all tasks whose price is not known yet
    spent INTEGER NOT NULL DEFAULT 0,     -- settled at a known price
    unknown INTEGER NOT NULL DEFAULT 0,   -- answers of unknown price
    submitted INTEGER NOT NULL DEFAULT 0, -- POSTs accepted
    balance_before INTEGER,     -- balance that the API reported; NULL: not reported
    balance_after INTEGER,
    receipt TEXT,               -- JSON: the run summary
    paths TEXT NOT NULL DEFAULT '[]',     -- JSON: the job's columns, which decide what is a match
    pulse TEXT                  -- JSON: progress and speed, written while it is running
) STRICT;

CREATE TABLE requests (         -- one distinct paid request
    id INTEGER PRIMARY KEY,
    fingerprint BLOB NOT NULL UNIQUE CHECK (length(fingerprint) = 16),
    call_id INTEGER NOT NULL REFERENCES calls,
    params TEXT NOT NULL,       -- JSON, as sent
    state TEXT NOT NULL CHECK (state IN
        ('pending', 'submitting', 'submitted', 'found', 'not_found', 'failed', 'expired', 'in_doubt')),
    attempts INTEGER NOT NULL DEFAULT 0,  -- accepted or unconfirmed POSTs since the last retry or refresh
    attempt_id INTEGER REFERENCES attempts,  -- the newest attempt
    answer_id INTEGER REFERENCES attempts,   -- the newest attempt that found something: its answer is used
    position INTEGER,           -- place in the queue; NULL: the current run does not select it
    erased_ms INTEGER,          -- when the params were erased
    forgotten INTEGER NOT NULL DEFAULT 0  -- 1: the fingerprint was replaced by its keyed hash
) STRICT;

CREATE INDEX queue ON requests (position)
WHERE position IS NOT NULL AND state NOT IN ('submitting', 'submitted');

CREATE INDEX erased ON requests (fingerprint) WHERE erased_ms IS NOT NULL;

CREATE TABLE bundles (          -- requests that were sent as one task (`dispatch: bulk`)
    id INTEGER PRIMARY KEY,
    execution_id INTEGER NOT NULL REFERENCES executions,
    size INTEGER NOT NULL,
    settled_ms INTEGER,
    settled_in INTEGER REFERENCES executions,
    credits INTEGER             -- price of the whole task; NULL: not known
) STRICT;

CREATE TABLE attempts (         -- one POST, never overwritten by the next
    id INTEGER PRIMARY KEY,
    request_id INTEGER NOT NULL REFERENCES requests,
    execution_id INTEGER NOT NULL REFERENCES executions,
    came_from TEXT NOT NULL,       -- state of the request before, restored when this attempt is refused
    previous_id INTEGER REFERENCES attempts,  -- the newest attempt before this one
    state TEXT NOT NULL CHECK (state IN
        ('submitting', 'refused', 'submitted', 'found', 'not_found', 'failed', 'expired', 'in_doubt')),
    task_id TEXT,
    claimed_ms INTEGER NOT NULL,   -- when the intent to send was stored
    submitted_ms INTEGER,          -- when the task id arrived
    settled_ms INTEGER,            -- when the outcome was known
    settled_in INTEGER REFERENCES executions,
    seen_alive INTEGER NOT NULL DEFAULT 0,  -- 1: the API has acknowledged the task at least once
    reserved INTEGER NOT NULL,     -- maximum price
    credits INTEGER,               -- actual price; NULL: not known
    provider TEXT,
    error TEXT,
    answer TEXT,                   -- the task as the API sent it, JSON
    erased_ms INTEGER,             -- when the answer was erased
    bundle_id INTEGER REFERENCES bundles,
    place INTEGER,                 -- index in the bulk task's list, from 0
    gone INTEGER NOT NULL DEFAULT 0  -- 1: the API deleted the result (410), so it is not polled again
) STRICT;

CREATE INDEX attempts_of_request ON attempts (request_id);

CREATE INDEX attempts_of_bundle ON attempts (bundle_id) WHERE bundle_id IS NOT NULL;

CREATE INDEX open_attempts ON attempts (state, submitted_ms) WHERE state IN ('submitting', 'submitted');

CREATE INDEX settled ON attempts (settled_in) WHERE settled_in IS NOT NULL;

CREATE INDEX task_ids ON attempts (task_id) WHERE task_id IS NOT NULL;

CREATE INDEX written_off ON attempts (claimed_ms)
WHERE state IN ('in_doubt', 'expired') AND task_id IS NOT NULL AND gone = 0;

CREATE TABLE latencies (        -- how long the recent tasks of each call took
    call TEXT NOT NULL,         -- as in calls.canonical; for bulk tasks with the size
    seconds REAL NOT NULL CHECK (seconds > 0),  -- at most this, and more than in the previous row
    answers REAL NOT NULL CHECK (answers > 0),  -- how many took this long; old ones count less
    PRIMARY KEY (call, seconds)
) STRICT, WITHOUT ROWID;

CREATE TABLE delivered (        -- rows that the change feed of a job has contained
    job TEXT NOT NULL,
    row_key BLOB NOT NULL,      -- a hash of the row's key columns and its request
    attempt_id INTEGER NOT NULL REFERENCES attempts,
    PRIMARY KEY (job, row_key)
) STRICT, WITHOUT ROWID;

CREATE TABLE forgotten (        -- people for whom no request is sent any more
    hash BLOB PRIMARY KEY       -- of the params, under the key that is stored beside the ledger
) STRICT, WITHOUT ROWID;

-- each attempt with its part of the bill (`paid`; NULL: not known); the price of a bulk task is with its first attempt
CREATE VIEW billed AS
SELECT a.*, CASE WHEN b.credits IS NULL THEN a.credits ELSE iif(a.place = 0, b.credits, 0) END AS paid
FROM attempts a LEFT JOIN bundles b ON b.id = a.bundle_id;

CREATE VIEW readable_requests AS
SELECT r.id, lower(hex(r.fingerprint)) AS fingerprint, r.state, r.params, a.provider,
       a.credits / 1e6 AS credits, a.error, a.task_id,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.submitted_ms / 1000, 'unixepoch') AS submitted_at,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.settled_ms / 1000, 'unixepoch') AS settled_at
FROM requests r LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id);

CREATE VIEW readable_attempts AS
SELECT id, request_id, execution_id, state, task_id, reserved / 1e6 AS reserved, credits / 1e6 AS credits,
       provider, error,
       strftime('%Y-%m-%dT%H:%M:%SZ', claimed_ms / 1000, 'unixepoch') AS claimed_at,
       strftime('%Y-%m-%dT%H:%M:%SZ', submitted_ms / 1000, 'unixepoch') AS submitted_at,
       strftime('%Y-%m-%dT%H:%M:%SZ', settled_ms / 1000, 'unixepoch') AS settled_at
FROM attempts;

CREATE VIEW readable_executions AS
SELECT id, job, exit_code, submitted, spent / 1e6 AS credits_spent, unknown AS credits_unknown,
       reserved / 1e6 AS credits_reserved, cap / 1e6 AS max_credits,
       strftime('%Y-%m-%dT%H:%M:%SZ', started_ms / 1000, 'unixepoch') AS started_at,
       strftime('%Y-%m-%dT%H:%M:%SZ', ended_ms / 1000, 'unixepoch') AS ended_at
FROM executions;

CREATE VIEW readable_bundles AS
SELECT b.id, b.execution_id, b.size, a.task_id, b.credits / 1e6 AS credits, b.settled_in,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.claimed_ms / 1000, 'unixepoch') AS claimed_at,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.submitted_ms / 1000, 'unixepoch') AS submitted_at,
       strftime('%Y-%m-%dT%H:%M:%SZ', b.settled_ms / 1000, 'unixepoch') AS settled_at,
       (SELECT group_concat(state || ': ' || number, ', ') FROM (SELECT state, count(*) AS number FROM attempts
        WHERE bundle_id = b.id GROUP BY state ORDER BY 2 DESC)) AS states
FROM bundles b JOIN attempts a ON a.bundle_id = b.id AND a.place = 0;
