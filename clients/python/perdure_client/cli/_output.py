"""Where output goes and in which form: tables for people, JSON lines for programs, remarks on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perdure_client.cli._text import clean, jsonable

_NO_TERMINAL_WIDTH = 100_000


class Output(StrEnum):
    """The form of output."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def chosen(output: Output | None) -> Output:
    """Returns the form: as told, else tables on a terminal and JSON lines into a pipe."""
    return output or (Output.TABLE if sys.stdout.isatty() else Output.JSON)


def console() -> Console:
    """Returns the console on standard output; what is no terminal never cuts a line."""
    width = None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def say(text: str) -> None:
    """Writes a remark to standard error."""
    print(clean(text), file=sys.stderr, flush=True)


def say_unreachable(regions: Sequence[str]) -> None:
    """Says that what lives in some regions is missing from what is listed."""
    say(f"No connection to {', '.join(regions)}: what lives there is missing.")


def write_line(text: str) -> None:
    """Writes a line at once."""
    print(text, flush=True)


def write_json_line(value: Any) -> None:
    """Writes plain JSON as one line, at once."""
    write_line(json.dumps(value, ensure_ascii=False))


def write_value(value: Any, form: Output = Output.JSON) -> None:
    """Writes a value of the library as YAML, or as JSON: indented on a terminal, one line into a pipe."""
    if form is Output.YAML:
        write_line(_yaml(value))
    elif sys.stdout.isatty():
        write_line(clean(json.dumps(jsonable(value), ensure_ascii=False, indent=2)))
    else:
        write_json_line(jsonable(value))


def write_item(value: Any, form: Output) -> None:
    """Writes one of many values of the library: a line of JSON, or a YAML document."""
    if form is Output.YAML:
        write_line(f"---\n{_yaml(value)}")
    else:
        write_json_line(jsonable(value))


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(jsonable(value), sort_keys=False, allow_unicode=True, width=_NO_TERMINAL_WIDTH)
    return clean(text) if sys.stdout.isatty() else text


def write_rows(headers: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> int:
    """Writes a table and returns how many rows it has."""
    screen = console()
    table = table_of(headers, rows, screen)
    if table.row_count:
        screen.print(table)
    return table.row_count


def table_of(headers: Sequence[str], rows: Iterable[Sequence[str | Text]], screen: Console) -> Table:
    """Returns a table. Where the terminal is too narrow, the last column gives way."""
    cells = [[cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row] for row in rows]
    longest_id = min(screen.width, max((row[0].cell_len for row in cells), default=0))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(headers))
    table.add_column(headers[0], no_wrap=True, min_width=longest_id)  # ids are there to be copied
    for header in headers[1:-1]:
        table.add_column(header, no_wrap=True)
    table.add_column(headers[-1])  # may be made narrower, as its column may wrap; its cells are cut instead
    for row in cells:
        row[-1].no_wrap, row[-1].overflow = True, "ellipsis"
        table.add_row(*row)
    return table
