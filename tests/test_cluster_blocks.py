"""Enrolling and collecting on Ray: the same as in one process, whatever is lost on the way."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from enrich.errors import EnrichError, JobError, LedgerFailed, Refused
from enrich.job import load_job
from enrich.model import Call, Decision, RowStatus, Wish
from enrich.place import LedgerPlace, Postgres
from enrich.place import Postgres as PostgresPlace
from enrich.question import Question
from enrich.rows import Rows
from enrich.store.ledger import Ledger
from tests import postgres as servers
from tests.harness import until
from tests.tables import load, save

pytest.importorskip("ray", reason="Ray comes with the extra `cluster`")
pytestmark = pytest.mark.cluster

QUESTION = Question(Call("email_getter", (833,)), ("a",), (), {"email": "email"}, None)
JOB = "version: 1\nwaterfall: email_getter\nparams: {a: A}\ninput: leads/\noutput: out/\n"
