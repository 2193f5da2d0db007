"""A bank, as far as the example needs one: another system, with a database of its own, that pays once for each key."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path


class Busy(Exception):
    """The bank asks to come back."""


def _connect() -> sqlite3.Connection:
    connection = sqlite3.connect(Path(os.environ.get("BANK_FILE", "bank.sqlite")))
    connection.execute("CREATE TABLE IF NOT EXISTS request (key TEXT, amount REAL)")
    connection.execute("CREATE TABLE IF NOT EXISTS payment (key TEXT PRIMARY KEY, account TEXT, amount REAL)")
    return connection


def pay(key: str, account: str, amount: float) -> str:
    """Pays once for each key, however often it is asked; returns the payment's reference."""
    with closing(_connect()) as connection, connection:
        asked = connection.execute("SELECT count(*) FROM request WHERE key = ?", [key]).fetchone()[0]
        connection.execute("INSERT INTO request VALUES (?, ?)", [key, amount])
        if os.environ.get("BANK_BUSY") == "once" and not asked:
            connection.commit()
            raise Busy("come back in a moment")
        connection.execute("INSERT OR IGNORE INTO payment VALUES (?, ?, ?)", [key, account, amount])
    return f"payment {key}"


def requests() -> int:
    """Returns how often it was asked to pay."""
    return _count("SELECT count(*) FROM request")


def payments() -> int:
    """Returns how often it did."""
    return _count("SELECT count(*) FROM payment")


def _count(statement: str) -> int:
    with closing(_connect()) as connection:
        return int(connection.execute(statement).fetchone()[0])
