"""Where runs live: the regions, the cells in them, the home of each namespace, and what a `regions.yaml` must say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perdure_service.domain.runs import LOCAL_CELL, NAMESPACE, cell_of
from perdure_service.errors import ConfigurationError, InvalidArgument

CELL = r"[a-z][a-z0-9]{1,15}"
"""What a cell may be called: an id that its servers make is the name, a hyphen and 36 characters, 64 at most."""
REGION = r"[a-z][a-z0-9-]{0,62}"
"""What a region may be called: CockroachDB's regions are the values of `region` in its nodes' localities."""
IDENTIFIER = r"[a-z_][a-z0-9_]{0,62}"
"""What a database and a role may be called: what SQL takes as a name without quotes."""
ADDRESS = r"[A-Za-z0-9.-]+:[0-9]{1,5}"
LEAST_REGIONS_TO_SURVIVE_ONE = 3
"""https://www.cockroachlabs.com/docs/stable/multiregion-survival-goals#survive-region-failures"""


class SurvivalGoal(StrEnum):
    """What the database of a cell survives without losing what was committed."""

    REGION = "region"
    ZONE = "zone"


@dataclass(frozen=True, slots=True)
class Cell:
    """One home database and the executors that serve it.

    Attributes:
        name: What the ids that its servers make begin with.
        region: Its home region: the database's primary region.
        secondary: The nearest neighbour of its region, which the database's leases fail over to; empty for none.
        survive: What its database survives.
        database: Its database's name.
        address: Where servers of other cells reach its servers, host:port.
        standby_address: Where those are that take it over when its region is lost, host:port; empty for none.
    """

    name: str
    region: str
    secondary: str
    survive: SurvivalGoal
    database: str
    address: str
    standby_address: str = ""


@dataclass(frozen=True, slots=True)
class Home:
    """Where the runs of a namespace live whose ids their clients gave.

    Attributes:
        cell: The name of the cell.
        former: Cells that were its home before, where runs may be.
        paused: Whether nothing may be started there, as the namespace is being moved.
    """

    cell: str
    former: tuple[str, ...] = ()
    paused: bool = False

    @property
    def all(self) -> tuple[str, ...]:
        """The home and the former ones."""
        return (self.cell, *self.former)


@dataclass(frozen=True, slots=True)
class Regions:
    """A `regions.yaml` that makes sense.

    Attributes:
        neighbours: By region, its neighbours, the nearest first.
        cells: By name.
        namespaces: By name.
        service_role: The database user of the servers.
    """

    neighbours: Mapping[str, tuple[str, ...]]
    cells: Mapping[str, Cell]
    namespaces: Mapping[str, Home]
    service_role: str

    @property
    def names(self) -> tuple[str, ...]:
        """The regions, in the order of the file."""
        return tuple(self.neighbours)

    def cells_in(self, region: str) -> tuple[Cell, ...]:
        """Returns the cells of a region."""
        return tuple(cell for cell in self.cells.values() if cell.region == region)

    def cell_for_start(self, region: str) -> Cell:
        """Returns the cell in which a run starts that shall live in a region.

        Raises:
            InvalidArgument: There is no such region, or it is no run's home.
        """
        found = self.cells_in(region)
        if not found:
            homes = ", ".join(dict.fromkeys(cell.region for cell in self.cells.values()))
            raise InvalidArgument("home_region", f"is not a region where runs can live; they can in {homes}")
        return found[0]

    def homes_of(self, namespace: str, run_id: str) -> tuple[Cell, ...]:
        """Returns the cells in which a run may live, the likeliest first.

        An id that a server made names its cell. Any other id lives in the home that its namespace has, or had when the
        run was started; so does one whose cell is not known, as of runs that are older than the regions.

        Args:
            namespace: One that is declared.
            run_id: The run, or a child of it, which lives where its parent does.
        """
        cell = self.cells.get(cell_of(run_id) or "")
        if cell is not None:
            return (cell,)
        return tuple(self.cells[name] for name in self.namespaces[namespace].all)


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process is.

    Attributes:
        regions: All there is.
        cell: The cell that it serves.
        region: The region that it is in: the cell's home, or its secondary one.
    """

    regions: Regions
    cell: Cell
    region: str


def place_in(regions: Regions, region: str | None, cell: str | None) -> Place:
    """Returns the place of a server.

    Args:
        regions: All there is.
        region: PERDURE_REGION.
        cell: PERDURE_CELL.

    Raises:
        ConfigurationError: The two do not name one cell.
    """
    if region is None:
        raise ConfigurationError(f"PERDURE_REGION is unset; set it to one of {', '.join(regions.names)}")
    if region not in regions.neighbours:
        raise ConfigurationError(
            f"PERDURE_REGION is {region}, which the regions file does not have; it has {', '.join(regions.names)}"
        )
    here = regions.cells_in(region)
    if cell is not None:
        found = regions.cells.get(cell)
        if found is None:
            raise ConfigurationError(
                f"PERDURE_CELL is {cell}, which the regions file does not have; it has {', '.join(regions.cells)}"
            )
        if region not in (found.region, found.secondary):
            raise ConfigurationError(
                f"PERDURE_CELL is {cell}, whose home is {found.region}"
                + (f" and whose secondary region is {found.secondary}" if found.secondary else "")
                + f"; a server in {region} cannot serve it"
            )
        if region != found.region and found.survive is not SurvivalGoal.REGION:
            raise ConfigurationError(
                f"a server in {region} cannot stand by for the cell {cell}, which says `survive: zone`: its database "
                f"is lost with {found.region}"
            )
        return Place(regions, found, region)
    if len(here) != 1:
        which = "no cell" if not here else f"the cells {', '.join(one.name for one in here)}"
        raise ConfigurationError(f"the region {region} has {which}; say in PERDURE_CELL which one this server serves")
    return Place(regions, here[0], region)


def describe(place: Place | None) -> Iterator[str]:
    """Yields what a server's operator should see of its place, a line each; nothing without regions."""
    if place is None:
        return
    stands_by = "" if place.region == place.cell.region else f", and is in {place.region}: it stands by"
    yield f"regions: this server serves the cell {place.cell.name} of {place.cell.region}{stands_by}"
    for cell in place.regions.cells.values():
        secondary = f", then {cell.secondary}" if cell.secondary else ""
        standby = f", standby at {cell.standby_address}" if cell.standby_address else ""
        yield (
            f"cell {cell.name}: home {cell.region}{secondary}; survives the loss of a {cell.survive}; database "
            f"{cell.database}; servers at {cell.address}{standby}"
        )
    for name, home in place.regions.namespaces.items():
        former = f", formerly {', '.join(home.former)}" if home.former else ""
        yield f"namespace {name}: home {home.cell}{former}{'; paused' if home.paused else ''}"


# ---- reading the file ------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _CellEntry(_Strict):
    database: Annotated[str, Field(pattern=f"^{IDENTIFIER}$")]
    address: Annotated[str, Field(pattern=f"^{ADDRESS}$")]
    standby_address: Annotated[str, Field(pattern=f"^{ADDRESS}$")] = ""
    survive: SurvivalGoal = SurvivalGoal.REGION


class _RegionEntry(_Strict):
    neighbours: tuple[str, ...] = ()
    cells: dict[Annotated[str, Field(pattern=f"^{CELL}$")], _CellEntry] = Field(default_factory=dict)


class _NamespaceEntry(_Strict):
    home: str
    former_homes: tuple[str, ...] = ()
    paused: bool = False


class _Document(_Strict):
    regions: dict[Annotated[str, Field(pattern=f"^{REGION}$")], _RegionEntry] = Field(min_length=1)
    namespaces: dict[Annotated[str, Field(pattern=f"^{NAMESPACE.pattern}$")], _NamespaceEntry] = Field(min_length=1)
    service_role: Annotated[str, Field(pattern=f"^{IDENTIFIER}$")] = "perdure"


class _Loader(yaml.SafeLoader):
    """YAML whose mappings have every key once: the last of two equal ones would win, and nobody would know."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigurationError(f"line {key_node.start_mark.line + 1} has a key that is not a name")
        if key_node.value in seen:
            raise ConfigurationError(f"line {key_node.start_mark.line + 1} has the key {key_node.value} again")
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_regions(text: str, source: str) -> Regions:
    """Returns what a `regions.yaml` says.

    Args:
        text: The file's.
        source: Its name, for errors.

    Raises:
        ConfigurationError: It does not make sense; one sentence says where.
    """
    try:
        document = _Document.model_validate(yaml.load(text, _Loader))  # noqa: S506 - a SafeLoader
        return _checked(document)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{source}: is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ConfigurationError(f"{source}: {_said(error)}") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {error.message}") from None


def _said(error: ValidationError) -> str:
    first = error.errors(include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        return f"{path} is an unknown key"
    if first["loc"][-1:] == ("[key]",):
        return f"{path} is not a name that can be had there ({first['msg']})"
    return f"{path or 'its top'}: {first['msg'].removeprefix('Value error, ')}"


@dataclass
class _Found:
    """What has been read so far, to tell repetitions."""

    cells: dict[str, Cell] = field(default_factory=dict)
    databases: dict[str, str] = field(default_factory=dict)


def _checked(document: _Document) -> Regions:
    regions = document.regions
    found = _Found()
    for name, entry in regions.items():
        _check_neighbours(name, entry.neighbours, regions)
        for cell_name, cell_entry in entry.cells.items():
            _add_cell(found, Cell(
                cell_name,
                name,
                entry.neighbours[0] if entry.neighbours else "",
                cell_entry.survive,
                cell_entry.database,
                cell_entry.address,
                cell_entry.standby_address,
            ), len(regions))  # fmt: skip
    if not found.cells:
        raise ConfigurationError("no region has a cell, so no run could live anywhere")
    homes = {name: _home(name, entry, found.cells) for name, entry in document.namespaces.items()}
    return Regions(
        MappingProxyType({name: entry.neighbours for name, entry in regions.items()}),
        MappingProxyType(found.cells),
        MappingProxyType(homes),
        document.service_role,
    )


def _check_neighbours(name: str, neighbours: Sequence[str], regions: Mapping[str, _RegionEntry]) -> None:
    for neighbour in neighbours:
        if neighbour not in regions:
            raise ConfigurationError(f"regions.{name} has the neighbour {neighbour}, which is an unknown region")
        if neighbour == name:
            raise ConfigurationError(f"regions.{name} is its own neighbour")
    if len(set(neighbours)) < len(neighbours):
        raise ConfigurationError(f"regions.{name} has a neighbour twice")


def _add_cell(found: _Found, cell: Cell, regions: int) -> None:
    """Adds a cell if it may be beside those that there are."""
    where = f"regions.{cell.region}.cells.{cell.name}"
    if cell.name == LOCAL_CELL:
        raise ConfigurationError(f"{where}: {LOCAL_CELL} is what servers without regions are called; choose another")
    known = found.cells.get(cell.name)
    if known is not None:
        raise ConfigurationError(f"the prefix {cell.name} has two homes, {known.region} and {cell.region}")
    for other in found.cells:
        if other.startswith(cell.name) or cell.name.startswith(other):
            # Ids would be told apart by the hyphen, people and searches by prefix would not.
            raise ConfigurationError(f"the prefixes {other} and {cell.name} overlap; rename one of the cells")
    if cell.database in found.databases:
        raise ConfigurationError(
            f"the cells {found.databases[cell.database]} and {cell.name} have the same database {cell.database}"
        )
    if cell.survive is SurvivalGoal.REGION and not cell.secondary:
        raise ConfigurationError(
            f"{where} is to survive the loss of its region and has no secondary one: give {cell.region} a neighbour, "
            "or say `survive: zone`"
        )
    if cell.survive is SurvivalGoal.REGION and regions < LEAST_REGIONS_TO_SURVIVE_ONE:
        raise ConfigurationError(
            f"{where} is to survive the loss of a region, which takes {LEAST_REGIONS_TO_SURVIVE_ONE} regions, and "
            f"there are {regions}"
        )
    for address in (cell.address, cell.standby_address):
        if address and not 0 < int(address.rpartition(":")[2]) < 65_536:
            raise ConfigurationError(f"{where}: {address} has no port that can be")
    found.cells[cell.name] = cell
    found.databases[cell.database] = cell.name


def _home(name: str, entry: _NamespaceEntry, cells: Mapping[str, Cell]) -> Home:
    for cell in (entry.home, *entry.former_homes):
        if cell not in cells:
            raise ConfigurationError(f"namespaces.{name} lives in {cell}, which is an unknown cell")
    if len({entry.home, *entry.former_homes}) < 1 + len(entry.former_homes):
        raise ConfigurationError(f"namespaces.{name} has a home twice")
    return Home(entry.home, entry.former_homes, entry.paused)
