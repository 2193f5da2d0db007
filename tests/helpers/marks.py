"""Marks in payloads and secrets, and the search for them in everything that is logged.

Helpers and fixtures put the marks where users put what is theirs: inputs, outputs, payloads, comments, keys and
passwords. No log may hold them: those of the server processes are searched when they end, and what a test prints in
this process when it is reported.
"""

from __future__ import annotations

PAYLOAD = "marked-payload-7d41c9"
SECRET = "marked-secret-b80e25"


def marks_in(text: str) -> list[str]:
    """Returns the lines of a text that hold a mark, cut to what is around it."""
    found = []
    for line in text.splitlines():
        for mark in (PAYLOAD, SECRET):
            at = line.find(mark)
            if at >= 0:
                found.append(f"{line[:200]} … {line[max(0, at - 200) : at + 100]}")
    return found


def check_log(text: str, where: str) -> None:
    """Fails when a log holds a mark.

    Raises:
        AssertionError: It does; with the lines.
    """
    found = marks_in(text)
    assert not found, f"{len(found)} lines of {where} hold a payload or a secret, e.g. {found[:3]}"
