"""A regions.yaml for tests: cells on databases of one PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

REGIONS = {"north": "nn1", "south": "ss1", "west": "ww1"}
"""The regions of tests, and the cell in each."""


def regions_yaml(
    databases: Mapping[str, str],
    *,
    addresses: Mapping[str, str] | None = None,
    standbys: Mapping[str, str] | None = None,
    homes: Mapping[str, Mapping[str, object]] | None = None,
    survive: str = "region",
    role: str = "perdure",
) -> str:
    """Returns a regions.yaml.

    Args:
        databases: By cell; cells without one are left out, their regions are not.
        addresses: By cell; where nobody listens unless given.
        standbys: The addresses of standbys, by cell.
        homes: By namespace, as in the file; by default the namespace `default` in the first cell.
        survive: The goal of each cell.
        role: The servers' database user.
    """
    names = list(REGIONS)
    regions = {}
    for index, (name, cell) in enumerate(REGIONS.items()):
        entry = {
            "database": databases.get(cell),
            "address": (addresses or {}).get(cell, "127.0.0.1:1"),
            "survive": survive,
        }
        if standbys and cell in standbys:
            entry["standby_address"] = standbys[cell]
        neighbours = names[index + 1 :] + names[:index]
        regions[name] = {"neighbours": neighbours, "cells": {cell: entry} if cell in databases else {}}
    namespaces = homes or {"default": {"home": next(iter(databases))}}
    return yaml.safe_dump({"regions": regions, "namespaces": namespaces, "service_role": role}, sort_keys=False)


def write_regions(folder: Path, databases: Mapping[str, str], **more: object) -> Path:
    """Writes a regions.yaml; arguments as of `regions_yaml`."""
    path = folder / "regions.yaml"
    path.write_text(regions_yaml(databases, **more))  # type: ignore[arg-type]
    return path
