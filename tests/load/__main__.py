"""Runs benchmarks: `python -m tests.load [NAME …] [--json FILE] [--write]`, and each one's own options."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from perdure_service.store import embedded

from tests.helpers.databases import DatabaseServer, given_server
from tests.helpers.server import sql
from tests.load import article, frame, growth, herd, idle, latency, recovery, regions, throughput
from tests.load.usage import is_cockroach

BENCHMARKS = {
    one.name: one
    for one in (
        throughput.BENCHMARK,
        throughput.SLOW_COMMITS,
        article.BENCHMARK,
        latency.BENCHMARK,
        idle.BENCHMARK,
        growth.BENCHMARK,
        recovery.BENCHMARK,
        herd.BENCHMARK,
        regions.BENCHMARK,
    )
}
MAX_CONNECTIONS = 700
"""Of the embedded server, which has fewer by default: the article's 512 clients are a connection each."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what was asked for and prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all without one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {frame.DOCUMENT.name}")
    for benchmark in BENCHMARKS.values():
        benchmark.add_options(parser)
    parser.add_argument("--database-url", metavar="URL", help="a PostgreSQL or CockroachDB; databases are made on it")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    results = {}
    with database_server(options.database_url) as server:
        for name in options.names or BENCHMARKS:
            say(f"== {name}")
            results[name] = BENCHMARKS[name].run(options, server, say)
            print(f"\n{results[name].markdown()}\n", flush=True)
            # Each time, or the next one's failure would take with it what was measured for half an hour.
            frame.write_results(results, options.json, frame.DOCUMENT if options.write else None)


def say(text: str) -> None:
    """Says how far it has come."""
    print(text, flush=True)


@contextmanager
def database_server(url: str | None = None) -> Iterator[DatabaseServer]:
    """Returns the server of a URL, or that the environment names (PERDURE_TEST_…_URL), else an embedded PostgreSQL."""
    if (server := _server_of(url) if url else given_server()) is not None:
        try:
            yield server
        finally:
            server.drop_all()
        return
    data_dir = Path(tempfile.mkdtemp(prefix="perdure-bench-"))
    embedded.MAX_CONNECTIONS = MAX_CONNECTIONS
    try:
        with embedded.start(data_dir) as postgres:
            yield DatabaseServer(postgres.url("postgres"), cockroach=False)
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


def _server_of(url: str) -> DatabaseServer:
    with sql(url) as connection:
        return DatabaseServer(url, is_cockroach(connection))


if __name__ == "__main__":
    main()
