"""README and docs use plain words and the terms of the field: a net for what slips in, not a goal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.cases import in_turn
from tests.support.documents import ROOT
from tests.support.message_texts import message_texts

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
#: Words and patterns that prose does not have, each with what it says instead.
BANNED = {
    r"(?<!every )(?<!each )nights?": "run",
    r"doubts?|doubtful": "unconfirmed",
    r"receipts?|slips?": "run summary",
    r"executions?": "run",
    r"questions": "requests",
    r"asked|asks? (?:for|only|again)": "sent, requested",
    r"hits?": "match",
    r"presumed|untold|elsewhere": "inferred, not reported, unattributed",
    r"at the api": "running at Databar",
    r"on the wire": "being sent",
    r"enroll(?:s|ed|ing)?|rescue[ds]": "queueing, recovering",
    r"breathes?|pulses?|signs? of life": "heartbeat",
    r"needs? you": "action required",
    r"freez(?:es?|ing)|(?<!bold and )frozen": "save",
    r"crews?|shifts?|heirs?|witness(?:es)?|muster": "workers, takeover, observers",
    r"(?<!object )storages?": "object storage",
    r"nobody|told|tells?(?<!can't tell)": "an active sentence with a subject",
    r"h[eo]lds? against": "compares",
    r"so many|by itself|at work|goes on|mend(?:s|ed|ing)?": "plain words",
    r"knows|wants(?!=)|earn(?:s|ed)?|lives|lived|dies|dead": "things do not know, want, earn, live or die",
    r"neither|nor": "a list, or a positive sentence",
    r"\w*colours?|honou?red|behaviours?": "American spelling",
    r"beside|anew|as it stands|off a terminal|of (?:its|their) own": "plain words",
    r"rehears\w*|heard?|hears|riddles?": "sandbox run",
    r"(?:enrich|program|ledger|page|job|API|file|summary) (?:says|asks|thinks|sees|forgets)": "the verb of a thing",
}
PATTERN = re.compile("|".join(rf"\b(?:{words})\b" for words in BANNED), re.IGNORECASE)
SQL = re.compile(r"\b(?:SELECT|UPDATE|INSERT|DELETE|CREATE|WHERE|CASE|JOIN|VALUES|COALESCE|PRAGMA)\b")
#: A sentence whose subject is a clause: "Who tries this turns …", "What was paid for is …".
CLAUSE_AS_SUBJECT = re.compile(r"(?:^|[.!?] )(?:Who(?:ever)? [a-z]|What (?:was|is) )[^?.|]*[.|]", re.MULTILINE)
#: What is no prose: code, quotations, targets of links.
NO_PROSE = re.compile(r"^```.*?^```|``.+?``|`[^`]*`|^> .*?$|(?<=\])\([^)]*\)", re.MULTILINE | re.DOTALL)
#: The modules with messages, options and comments of written files. Not those of the report page.
SOURCES = [
    path
    for path in sorted((ROOT / "enrich").rglob("*.py"))
    if path.parent.name != "report" and path.name != "answers.py"  # whose texts are seeds
]
#: A newcomer reads it once.
README_WORDS = 1_000


def prose(document: Path) -> str:
    """Return a document's prose, on lines of the same numbers."""
    text = document.read_text(encoding="utf-8")
    return NO_PROSE.sub(lambda match: "\n" * match[0].count("\n"), text)


def sentences(path: Path) -> list[str]:
    """Return the texts of a module that have several words. SQL is none of them."""
    return [text for text in message_texts(path) if " " in text and not SQL.search(text)]


@in_turn("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT))
def test_words_are_plain(document: Path) -> None:
    """No sentence has a banned word, or a clause as its subject."""
    text = prose(document)
    found = [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0].strip()}"
        for pattern in (PATTERN, CLAUSE_AS_SUBJECT)
        for match in pattern.finditer(text)
    ]
    assert found == []


@pytest.mark.long
@in_turn("path", SOURCES, ids=lambda path: path.relative_to(ROOT))
def test_messages_are_plain(path: Path) -> None:
    """No message, help text or comment in a written file has a banned word."""
    found = {match[0]: text for text in sentences(path) for match in PATTERN.finditer(NO_PROSE.sub("", text))}
    assert found == {}


def test_readme_is_short() -> None:
    """The README is read in a few minutes, code and table included."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


def test_banned_words_are_detected() -> None:
    """The patterns find words in other cases and at the end of a sentence."""
    wrong = "Tonight's plan is Frozen. A witness was told so many hits. It runs every night, and you can't tell why."
    assert [match[0] for match in PATTERN.finditer(wrong)] == ["Frozen", "witness", "told", "so many", "hits"]
    assert CLAUSE_AS_SUBJECT.search("It ends. Who tries something wakes nobody.")
    assert not CLAUSE_AS_SUBJECT.search("What is sent")
