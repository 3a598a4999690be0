-- The tables of a ledger in a SQLite file. Times are milliseconds since 1970 (UTC), credits are millionths.

CREATE TABLE facts (            -- what the whole ledger is bound to: api_host, workspace
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE targets (          -- waterfalls and enrichments, as the API last described them
    kind TEXT NOT NULL,         -- waterfall, enrichment
    identifier TEXT NOT NULL,
    description TEXT NOT NULL,  -- JSON
    providers TEXT,             -- JSON list of a waterfall's default enrichments, resolved at first use
    PRIMARY KEY (kind, identifier)
) STRICT, WITHOUT ROWID;

CREATE TABLE calls (            -- distinct calls: a waterfall with enrichments and verifier, an enrichment with pages
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
    summary TEXT,               -- JSON: the run summary
    paths TEXT NOT NULL DEFAULT '[]',     -- JSON: the job's columns, which decide what is a match; by step
    progress TEXT                  -- JSON: progress and speed, written while it is running
) STRICT;

CREATE TABLE requests (         -- one distinct paid request
    id INTEGER PRIMARY KEY,
    fingerprint BLOB NOT NULL UNIQUE CHECK (length(fingerprint) = 16),
    call_id INTEGER NOT NULL REFERENCES calls,
    params TEXT NOT NULL,       -- JSON, as sent
    state TEXT NOT NULL CHECK (state IN
        ('pending', 'submitting', 'submitted', 'found', 'not_found', 'failed', 'expired', 'in_doubt')),
    attempt_count INTEGER NOT NULL DEFAULT 0,  -- accepted or unconfirmed POSTs since the last retry or refresh
    attempt_id INTEGER REFERENCES attempts,  -- the newest attempt
    answer_id INTEGER REFERENCES attempts,   -- the newest attempt with a match: its answer is used. By other columns it may be none
    queue_position INTEGER,     -- place in the queue; NULL: the current run does not select it
    erased_ms INTEGER,          -- when the params were erased
    forgotten INTEGER NOT NULL DEFAULT 0  -- 1: the fingerprint was replaced by its keyed hash
) STRICT;

CREATE INDEX queue ON requests (queue_position)
WHERE queue_position IS NOT NULL AND state NOT IN ('submitting', 'submitted');

CREATE INDEX erased ON requests (fingerprint) WHERE erased_ms IS NOT NULL;

CREATE TABLE bulk_tasks (          -- requests that were sent as one task (`dispatch: bulk`)
    id INTEGER PRIMARY KEY,
    execution_id INTEGER NOT NULL REFERENCES executions,
    size INTEGER NOT NULL,
    settled_ms INTEGER,
    settled_execution_id INTEGER REFERENCES executions,
    credits INTEGER             -- price of the whole task; NULL: not known
) STRICT;

CREATE TABLE attempts (         -- one POST, never overwritten by the next
    id INTEGER PRIMARY KEY,
    request_id INTEGER NOT NULL REFERENCES requests,
    execution_id INTEGER NOT NULL REFERENCES executions,
    previous_state TEXT NOT NULL,       -- state of the request before, restored when this attempt is refused
    previous_id INTEGER REFERENCES attempts,  -- the newest attempt before this one
    state TEXT NOT NULL CHECK (state IN
        ('submitting', 'refused', 'submitted', 'found', 'not_found', 'failed', 'expired', 'in_doubt')),
    task_id TEXT,
    claimed_ms INTEGER NOT NULL,   -- when the intent to send was stored
    submitted_ms INTEGER,          -- when the task id arrived
    settled_ms INTEGER,            -- when the outcome was known
    settled_execution_id INTEGER REFERENCES executions,
    acknowledged INTEGER NOT NULL DEFAULT 0,  -- 1: the API has acknowledged the task at least once
    reserved INTEGER NOT NULL,     -- maximum price
    credits INTEGER,               -- actual price; NULL: not known
    provider TEXT,
    error TEXT,
    answer TEXT,                   -- the task as the API sent it, JSON
    erased_ms INTEGER,             -- when the answer was erased
    bulk_task_id INTEGER REFERENCES bulk_tasks,
    bulk_index INTEGER,            -- index in the bulk task's list, from 0
    gone INTEGER NOT NULL DEFAULT 0,  -- 1: the API deleted the result (410), so it is not polled again
    step TEXT                      -- the step of the job that sent it; NULL: a job without steps
) STRICT;

CREATE INDEX attempts_of_request ON attempts (request_id);

CREATE INDEX costs_of_steps ON attempts (step, execution_id, bulk_task_id, bulk_index, credits, reserved)
WHERE step IS NOT NULL;

CREATE INDEX attempts_of_bulk_task ON attempts (bulk_task_id) WHERE bulk_task_id IS NOT NULL;

CREATE INDEX open_attempts ON attempts (state, submitted_ms) WHERE state IN ('submitting', 'submitted');

CREATE INDEX settled ON attempts (settled_execution_id) WHERE settled_execution_id IS NOT NULL;

CREATE INDEX task_ids ON attempts (task_id) WHERE task_id IS NOT NULL;

CREATE INDEX written_off ON attempts (claimed_ms)
WHERE state IN ('in_doubt', 'expired') AND task_id IS NOT NULL AND gone = 0;

CREATE TABLE latencies (        -- how long the recent tasks of each call took
    call TEXT NOT NULL,         -- as in calls.canonical; for bulk tasks with the size
    seconds REAL NOT NULL CHECK (seconds > 0),  -- at most this, and more than in the previous row
    answers REAL NOT NULL CHECK (answers > 0),  -- how many took this long; old ones count less
    PRIMARY KEY (call, seconds)
) STRICT, WITHOUT ROWID;

CREATE TABLE known_batches (    -- batches of inputs whose rows are mapped to requests
    job TEXT NOT NULL,
    position INTEGER NOT NULL,  -- of the first row of the batch in the input
    digest BLOB NOT NULL,       -- of the content, and of all that the requests of its rows depend on
    content TEXT NOT NULL,      -- JSON: the ids of the requests, and why the other rows have none
    PRIMARY KEY (job, position)
) STRICT, WITHOUT ROWID;

CREATE TABLE delivered (        -- values that the change feed of a job has contained, without the values
    job TEXT NOT NULL,
    row_key BLOB NOT NULL,      -- a hash of the row's key columns; of a further row with these also of its request
    field TEXT NOT NULL,        -- the column of the job
    attempt_id INTEGER NOT NULL REFERENCES attempts,  -- its answer has the value
    path TEXT NOT NULL,         -- where the answer has it
    PRIMARY KEY (job, row_key, field)
) STRICT, WITHOUT ROWID;

CREATE TABLE forgotten (        -- people for whom no request is sent any more
    hash BLOB PRIMARY KEY       -- of the params, under the key that is stored beside the ledger
) STRICT, WITHOUT ROWID;

CREATE TABLE step_rows (        -- rows of a job with steps that are recorded with a request; others may share it
    request_id INTEGER NOT NULL REFERENCES requests,
    row_hash INTEGER NOT NULL,  -- of job, step and the cells of the row that the steps send
    PRIMARY KEY (request_id, row_hash)
) STRICT, WITHOUT ROWID;

-- each attempt with its part of the bill (`paid`; NULL: not known); the price of a bulk task is with its first attempt
CREATE VIEW billed AS
SELECT a.*, CASE WHEN b.credits IS NULL THEN a.credits ELSE iif(a.bulk_index = 0, b.credits, 0) END AS paid
FROM attempts a LEFT JOIN bulk_tasks b ON b.id = a.bulk_task_id;

CREATE VIEW readable_requests AS
SELECT r.id, lower(hex(r.fingerprint)) AS fingerprint, r.state, r.params, a.provider,
       a.credits / 1e6 AS credits, a.error, a.task_id,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.submitted_ms / 1000, 'unixepoch') AS submitted_at,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.settled_ms / 1000, 'unixepoch') AS settled_at
FROM requests r LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id);

CREATE VIEW readable_attempts AS
SELECT id, request_id, execution_id, step, state, task_id, reserved / 1e6 AS reserved, credits / 1e6 AS credits,
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

CREATE VIEW readable_bulk_tasks AS
SELECT b.id, b.execution_id, b.size, a.task_id, b.credits / 1e6 AS credits, b.settled_execution_id,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.claimed_ms / 1000, 'unixepoch') AS claimed_at,
       strftime('%Y-%m-%dT%H:%M:%SZ', a.submitted_ms / 1000, 'unixepoch') AS submitted_at,
       strftime('%Y-%m-%dT%H:%M:%SZ', b.settled_ms / 1000, 'unixepoch') AS settled_at,
       (SELECT group_concat(state || ': ' || number, ', ') FROM (SELECT state, count(*) AS number FROM attempts
        WHERE bulk_task_id = b.id GROUP BY state ORDER BY 2 DESC)) AS states
FROM bulk_tasks b JOIN attempts a ON a.bulk_task_id = b.id AND a.bulk_index = 0;
