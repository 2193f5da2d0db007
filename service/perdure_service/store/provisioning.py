"""Decides by which SQL the roles, databases and rights of the cells are made, on PostgreSQL and on CockroachDB.

PostgreSQL has no regions: there the same cells are plain databases, and the clauses about regions are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from perdure_service.domain.regions import Cell, Regions, SurvivalGoal
from perdure_service.store import cells
from perdure_service.store.migrations import Change

_GOALS = {SurvivalGoal.REGION: "REGION FAILURE", SurvivalGoal.ZONE: "ZONE FAILURE"}


def database_changes(regions: Regions, cell: Cell, *, cockroach: bool) -> Sequence[Change]:
    """Returns what makes the servers' role and the database of a cell; for any database of the same cluster."""
    return (
        _role(regions.service_role, cockroach),
        *(_multi_region(regions, cell) if cockroach else _plain(cell)),
        Change(
            f"the right to connect to {cell.database}",
            f"GRANT CONNECT ON DATABASE {cell.database} TO {regions.service_role}",
        ),
    )


def cell_changes(regions: Regions, cell: Cell) -> Sequence[Change]:
    """Returns what follows the migrations in the database of a cell."""
    return (
        cells.record(cell),
        Change("rights on the schemas", f"GRANT USAGE ON SCHEMA perdure, dbos TO {regions.service_role}"),
        Change(
            "rights on the tables",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA perdure, dbos TO {regions.service_role}",
        ),
    )


def _role(role: str, cockroach: bool) -> Change:
    """Without a password: how the role proves itself (a certificate, a password) is the operator's to say."""
    return Change(
        f"the role {role}",
        f"CREATE ROLE {'IF NOT EXISTS ' if cockroach else ''}{role} WITH LOGIN",
        f"SELECT 1 FROM pg_roles WHERE rolname = '{role}'",
    )


def _plain(cell: Cell) -> Iterator[Change]:
    yield Change(
        f"the database {cell.database}",
        f"CREATE DATABASE {cell.database}",
        f"SELECT 1 FROM pg_database WHERE datname = '{cell.database}'",
    )


def _multi_region(regions: Regions, cell: Cell) -> Iterator[Change]:
    """Makes the database as it shall be, or makes it so: it may be older than a region or a goal of the file."""
    database = cell.database
    known = f"SELECT 1 FROM [SHOW REGIONS FROM DATABASE {database}] WHERE "
    names = ", ".join(f'"{name}"' for name in regions.names)
    goal = _GOALS[cell.survive]
    yield Change(
        f"the database {database}",
        f'CREATE DATABASE IF NOT EXISTS {database} PRIMARY REGION "{cell.region}" REGIONS {names} SURVIVE {goal}',
        f"SELECT 1 FROM pg_database WHERE datname = '{database}'",
    )
    # Only where there is none: to move a home is a decision of its own.
    yield Change(
        f"the primary region of {database}",
        f'ALTER DATABASE {database} SET PRIMARY REGION "{cell.region}"',
        known + '"primary"',
    )
    for name in regions.names:
        if name != cell.region:
            yield Change(
                f"the region {name} of {database}",
                f'ALTER DATABASE {database} ADD REGION IF NOT EXISTS "{name}"',
                known + f"region = '{name}'",
            )
    yield Change(
        f"what {database} survives",
        f"ALTER DATABASE {database} SURVIVE {goal}",
        f"SELECT 1 FROM [{cells.survival_goal(cell)}] WHERE survival_goal = '{cell.survive}'",
    )
    if cell.secondary:
        yield Change(
            f"the secondary region of {database}",
            f'ALTER DATABASE {database} SET SECONDARY REGION "{cell.secondary}"',
            known + f"region = '{cell.secondary}' AND \"secondary\"",
        )
