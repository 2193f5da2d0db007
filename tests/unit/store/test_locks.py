"""What locks rows names them by their keys.

CockroachDB locks rows when it scans them, before it looks at conditions that the scan does not have: a statement that
locks what it finds by a state would lock all rows of that state.
"""

from __future__ import annotations

import re

import pytest

from tests.helpers.sql_source import in_source

LOCKS = re.compile(r"\bFOR (NO KEY )?UPDATE\b")
KEYS = ("workflow_uuid", "workflow_id", "sha256", "name")
BY_KEY = re.compile(
    rf"(WHERE|AND) (\w\.)?({'|'.join(KEYS)}) (= (ANY\()?(CAST\()?\$\d|IN \(SELECT workflow_id FROM i\))"
)
LOCKING = {str(each): each.place for kind in in_source() for each in kind if LOCKS.search(each.text)}


@pytest.mark.parametrize("text", sorted(LOCKING))
def test_a_statement_locks_by_keys(text: str) -> None:
    assert BY_KEY.search(text), LOCKING[text]
