"""Reads the `regions.yaml` of a deployment, and says which cell of it a process serves."""

from __future__ import annotations

from pathlib import Path

from perdure_service.domain.regions import Place, Regions, parse_regions, place_in
from perdure_service.errors import ConfigurationError
from perdure_service.settings import Settings


def load_regions(path: Path) -> Regions:
    """Returns what the file says.

    Raises:
        ConfigurationError: It cannot be read, or does not make sense; in one sentence.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"PERDURE_REGIONS_FILE: {path} cannot be read ({why})") from error
    return parse_regions(text, f"PERDURE_REGIONS_FILE: {path}")


def locate(settings: Settings) -> tuple[Settings, Place | None]:
    """Returns the settings with the namespaces of the regions file, and this server's place; None without regions.

    Raises:
        ConfigurationError: The file is no good, or the settings do not fit it; in one sentence.
    """
    if settings.regions_file is None:
        for name, value in (("PERDURE_REGION", settings.region), ("PERDURE_CELL", settings.cell)):
            if value is not None:
                raise ConfigurationError(f"{name} is set and PERDURE_REGIONS_FILE is not; set both or neither")
        return settings, None
    place = place_in(load_regions(settings.regions_file), settings.region, settings.cell)
    declared = tuple(place.regions.namespaces)
    if "namespaces" in settings.model_fields_set and set(settings.namespaces) != set(declared):
        raise ConfigurationError(
            f"PERDURE_NAMESPACES and {settings.regions_file} name other namespaces; with regions leave the first unset"
        )
    return settings.model_copy(update={"namespaces": declared}), place
