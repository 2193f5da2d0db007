"""The variants that throughput is measured of, each a load generator and what it drives: all up at the same time."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from perdure_service.durable.migrate import migrate_all

from tests.helpers.databases import DatabaseServer
from tests.helpers.server import ServerProcess
from tests.load import grpc_load
from tests.load.generators import Answer, Generator
from tests.load.usage import Meter, database_processes, spent

ASYNC, SYNC, ONE_CALL, BULK = "gRPC, async agent", "gRPC, sync agent", "gRPC, one call", "gRPC, bulk start"
DBOS_ASYNC, DBOS_SYNC = "plain DBOS, async", "plain DBOS, sync"
RESTATE, CEILING = "Restate 1.7", "the batched SQL alone"
NAMES = (ASYNC, ONE_CALL, BULK, SYNC, DBOS_ASYNC, DBOS_SYNC, RESTATE, CEILING)
BASELINE = {
    ASYNC: DBOS_ASYNC, ONE_CALL: DBOS_ASYNC, BULK: DBOS_ASYNC, SYNC: DBOS_SYNC, RESTATE: DBOS_ASYNC, CEILING: DBOS_ASYNC
}  # fmt: skip
"""What a variant is compared with as plain DBOS."""
SERVER_SETTINGS = {"PERDURE_LOG_LEVEL": "warning", "PERDURE_LOG_FORMAT": "json", "PERDURE_MAX_RUNNING": "2000"}
WARM_S = 0.5
Say = Callable[[str], None]


@dataclass
class Variant:
    """One of `NAMES`, running.

    Attributes:
        order: What the generator is told beside clients and seconds.
        groups: Processes by group: client, server, database.
        database_url: The database of its own; none of Restate.
        operations: How many it has done, with those to warm up.
    """

    name: str
    generator: Generator
    order: Mapping[str, Any]
    groups: Mapping[str, Sequence[psutil.Process]]
    database_url: str | None
    operations: int = 0

    def measure(self, url: str, clients: int, seconds: float) -> tuple[Answer, dict[str, float | None]]:
        """Has it work, after a moment to warm up; returns what it did and the measures of a row."""
        self.operations += self.generator.load(clients, min(WARM_S, seconds), **self.order).count
        meter = Meter(url, self.groups)
        before = meter.read()
        answer = self.generator.load(clients, seconds, **self.order)
        cost = spent(before, meter.read())
        self.operations += answer.count
        if not (count := answer.count):
            return answer, {}  # no run has ended in this time: that is no rate
        values: dict[str, float | None] = {
            "runs/s": answer.per_second,
            "p50 ms": answer.latency_ms(0.5),
            "p99 ms": answer.latency_ms(0.99),
            "repeated calls/run": answer.repeats / count or None,
            **{f"{name} CPU ms/run": 1000 * cost[name] / count for name in self.groups},
        }
        if self.database_url is not None and "transaction_ids" in cost:
            values["write commits/run"] = cost["transaction_ids"] / count
        return answer, values


@dataclass
class Fleet:
    """All variants of a benchmark that are there.

    Attributes:
        missing: Why others are not, a sentence each.
    """

    server: DatabaseServer
    stack: ExitStack
    options: argparse.Namespace
    variants: list[Variant] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    _service: tuple[str, ServerProcess] | None = None

    def start(self, names: Sequence[str]) -> None:
        """Starts some, and what they need."""
        database = database_processes(self.server.url)
        for name in names:
            if name in (ASYNC, SYNC, ONE_CALL, BULK):
                self._add_grpc(name, database)
            elif name in (DBOS_ASYNC, DBOS_SYNC):
                self.add_dbos(name, database)
            elif name == RESTATE:
                self._add_restate()
            else:
                self._add_ceiling(database)

    def service(self) -> tuple[str, ServerProcess]:
        """Returns the server and its database's URL, which the variants of gRPC share."""
        if self._service is None:
            url = self.migrated()
            process = ServerProcess(url, "tests.load.agents", **SERVER_SETTINGS)
            self.stack.enter_context(process)
            self._service = (url, process)
        return self._service

    def migrated(self) -> str:
        """Returns a migrated database of its own (on CockroachDB the shared one)."""
        url = self.server.migrated("bench", lambda url: migrate_all(url, lambda _line: None))
        self.stack.callback(self.server.drop_of, url)
        return url

    def add_dbos(self, name: str, database: Sequence[psutil.Process], driver: str = "psycopg") -> Variant:
        """Starts plain DBOS, on a database of its own."""
        url = self.migrated()
        mode = "sync" if name.startswith(DBOS_SYNC) else "async"
        generator = self.generator("plain_dbos", url, mode, driver)
        groups = {"server": [generator.process], "database": database}
        self.variants.append(Variant(name, generator, {}, groups, url))
        return self.variants[-1]

    def generator(self, module: str, *arguments: str) -> Generator:
        """Starts a load generator."""
        generator = Generator(module, *arguments)
        self.stack.callback(generator.close)
        return generator

    def _add_grpc(self, name: str, database: Sequence[psutil.Process]) -> None:
        if name == BULK and not grpc_load.BULK:
            self.missing.append(f"{name}: not there yet (StartAgents).")
            return
        url, process = self.service()
        assert process._process is not None
        generator = self.generator("grpc_load", process.address)
        agent = "two-steps-blocking" if name == SYNC else "two-steps"
        groups = {"client": [generator.process], "server": [psutil.Process(process._process.pid)], "database": database}
        self.variants.append(
            Variant(name, generator, {"agent": agent, "bulk": name == BULK, "waits": name == ONE_CALL}, groups, url)
        )

    def _add_ceiling(self, database: Sequence[psutil.Process]) -> None:
        if importlib.util.find_spec("perdure_service.store.checkpoint_writer") is None:
            self.missing.append(f"{CEILING}: not there yet (the checkpoint writer).")
            return
        url = self.migrated()
        generator = self.generator("statements_load", url)
        groups = {"server": [generator.process], "database": database}
        self.variants.append(Variant(CEILING, generator, {}, groups, url))

    def _add_restate(self) -> None:
        server, python = self.options.restate_server, self.options.restate_python
        wrk = shutil.which("wrk")
        if not (server and python and wrk):
            self.missing.append(
                f"{RESTATE}: not installed. `npm install @restatedev/restate-server@1.7`, `pip install restate-sdk "
                "hypercorn` into a virtual environment and `wrk` from the system's packages, then `--restate-server "
                "PATH --restate-python PATH`."
            )
            return
        generator = self.generator("restate_load", str(server), str(python), wrk)
        found = generator.ask(processes=True)
        groups = {name: [psutil.Process(one) for one in found[name]] for name in found}
        self.variants.append(Variant(RESTATE, generator, {}, {"client": [generator.process], **groups}, None))


def add_restate_options(parser: argparse.ArgumentParser) -> None:
    """Adds where Restate is."""
    group = parser.add_argument_group("Restate, to compare with")
    group.add_argument("--restate-server", type=Path, metavar="PATH", help="the program `restate-server`, 1.7")
    group.add_argument(
        "--restate-python", type=Path, metavar="PATH", help="a Python that has restate-sdk and hypercorn"
    )
