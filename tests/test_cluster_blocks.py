"""Enrolling and collecting on Ray: the same as in one process, whatever is lost on the way."""

from __future__ import annotations

import pytest

from enrich.model import Call
from enrich.question import Question

pytest.importorskip("ray", reason="Ray comes with the extra `cluster`")
pytestmark = pytest.mark.cluster

QUESTION = Question(Call("email_getter", (833,)), ("a",), (), {"email": "email"}, None)
JOB = "version: 1\nwaterfall: email_getter\nparams: {a: A}\ninput: leads/\noutput: out/\n"
