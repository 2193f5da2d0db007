"""What a regions.yaml says, what it is refused for, and where runs live by it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from perdure_service.domain.regions import Regions, SurvivalGoal, describe, parse_regions, place_in
from perdure_service.domain.runs import new_run_id
from perdure_service.errors import ConfigurationError, InvalidArgument
from perdure_service.settings import load_settings
from perdure_service.store.regions_file import locate

DOCUMENT = Path(__file__).resolve().parents[3] / "service" / "docs" / "regions.md"
GOOD = re.search(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]  # type: ignore[index]


def regions(text: str = GOOD) -> Regions:
    return parse_regions(text, "regions.yaml")


def changed(old: str, new: str, *, times: int = 1) -> str:
    """Returns the good file with a piece replaced."""
    assert old in GOOD
    return GOOD.replace(old, new, times)


def test_the_file_of_the_documentation_is_understood() -> None:
    found = regions()
    assert found.names == ("us-east1", "us-west1", "europe-west1")
    use1 = found.cells["use1"]
    assert (use1.region, use1.secondary, use1.survive) == ("us-east1", "us-west1", SurvivalGoal.REGION)
    assert (use1.database, use1.address) == ("perdure_use1", "perdure.us-east1.example:50051")
    assert found.namespaces["eu"].all == ("euw1", "use1")
    assert found.service_role == "perdure"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (changed("usw1:", "use1:"), "the prefix use1 has two homes, us-east1 and us-west1"),
        (changed("usw1:", "use:"), "the prefixes use1 and use overlap"),
        (changed("usw1:", "local:"), "local is what servers without regions are called"),
        (changed("[us-west1, ", "[us-west2, "), "regions.us-east1 has the neighbour us-west2, .*unknown region"),
        (changed("[us-east1, us-west1]", "[europe-west1]"), "regions.europe-west1 is its own neighbour"),
        (changed("[us-east1, us-west1]", "[us-east1, us-east1]"), "has a neighbour twice"),
        (changed("[us-east1, us-west1]", "[]"), "euw1 is to survive the loss of its region and has no secondary one"),
        (changed("perdure_usw1", "perdure_use1"), "the cells use1 and usw1 have the same database perdure_use1"),
        (changed("perdure_usw1", "Perdure;DROP"), "usw1.database: .*pattern"),
        (changed("home: euw1", "home: euw2"), "namespaces.eu lives in euw2, which is an unknown cell"),
        (changed("former_homes: [use1]", "former_homes: [euw1]"), "namespaces.eu has a home twice"),
        (changed("former_homes", "former_home"), "namespaces.eu.former_home is an unknown key"),
        (changed("survive: region ", "survive: planet "), "use1.survive: "),
        (changed("perdure.us-east1.example:50051", "perdure.us-east1.example"), "use1.address: .*pattern"),
        (changed("perdure.us-east1.example:50051", "perdure.us-east1.example:99999"), "has no port that can be"),
        (changed("  us-west1:\n", "  us-east1:\n"), "line 10 has the key us-east1 again"),
        (changed("use1: ", "USE1: "), "regions.us-east1.cells.USE1 is not a name"),
        ("regions: [", "is not YAML"),
        ("", "its top: "),
        ("regions: {}\nnamespaces: {}", "regions: "),
        ("? [a]\n: b", "line 1 has a key that is not a name"),
        ("regions: {here: {}}\nnamespaces: {default: {home: use1}}", "no region has a cell"),
        (
            "regions: {a: {neighbours: [b], cells: {aa: {database: d, address: 'h:1'}}}, b: {}}\n"
            "namespaces: {default: {home: aa}}",
            "takes 3 regions, and there are 2",
        ),
    ],
)
def test_what_makes_no_sense_is_said_in_one_sentence(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^regions\.yaml: .*{complaint}") as caught:
        regions(text)
    assert "\n" not in caught.value.message


def test_a_cell_that_survives_a_zone_only_needs_no_neighbour() -> None:
    text = "regions: {here: {cells: {aa: {database: d, address: 'h:1', survive: zone}}}}\nnamespaces: {x: {home: aa}}"
    assert regions(text).cells["aa"].secondary == ""


def test_an_id_that_a_server_made_lives_in_the_cell_that_it_names() -> None:
    found = regions()
    run_id = new_run_id("usw1")
    for one in (run_id, f"{run_id}.5", f"{run_id}.5.2"):
        assert [cell.name for cell in found.homes_of("default", one)] == ["usw1"]


@pytest.mark.parametrize("run_id", ["mine", "use1-mine", "mine.3", "local-0198c4a0-0000-7000-8000-000000000000"])
def test_any_other_id_lives_in_a_home_of_its_namespace_the_present_one_first(run_id: str) -> None:
    assert [cell.name for cell in regions().homes_of("eu", run_id)] == ["euw1", "use1"]


def test_a_start_with_a_home_region_goes_to_a_cell_there_or_is_refused() -> None:
    found = regions()
    assert found.cell_for_start("us-west1").name == "usw1"
    with pytest.raises(InvalidArgument, match=r"home_region: .*they can in us-east1, us-west1, europe-west1"):
        found.cell_for_start("asia-south1")


def test_a_server_serves_the_one_cell_of_its_region_or_the_one_it_is_told() -> None:
    assert place_in(regions(), "us-west1", None).cell.name == "usw1"
    assert place_in(regions(), "us-west1", "use1").cell.name == "use1", "as its standby"


@pytest.mark.parametrize(
    ("region", "cell", "complaint"),
    [
        (None, None, "PERDURE_REGION is unset; set it to one of us-east1, us-west1, europe-west1"),
        ("us-east2", None, "PERDURE_REGION is us-east2, which the regions file does not have"),
        ("us-east1", "use2", "PERDURE_CELL is use2, which the regions file does not have; it has use1, usw1, euw1"),
        ("europe-west1", "use1", "PERDURE_CELL is use1, whose home is us-east1 and whose secondary region is us-west1"),
    ],
)
def test_a_place_that_is_none_is_refused(region: str | None, cell: str | None, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        place_in(regions(), region, cell)


def test_a_region_with_two_cells_needs_to_be_told_which() -> None:
    more = changed("      usw1:", "      uswx: {database: x, address: 'h:1'}\n      usw1:")
    with pytest.raises(ConfigurationError, match="us-west1 has the cells uswx, usw1; say in PERDURE_CELL"):
        place_in(regions(more), "us-west1", None)


def test_a_place_is_described_line_by_line() -> None:
    lines = list(describe(place_in(regions(), "us-east1", None)))
    assert lines[0] == "regions: this server serves the cell use1 of us-east1"
    assert next(describe(place_in(regions(), "us-west1", "use1"))).endswith("and is in us-west1: it stands by")
    assert (
        "cell use1: home us-east1, then us-west1; survives the loss of a region; database perdure_use1; servers at "
        "perdure.us-east1.example:50051"
    ) in lines
    assert "namespace eu: home euw1, formerly use1" in lines
    assert list(describe(None)) == []


def test_the_settings_get_the_namespaces_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "regions.yaml"
    path.write_text(GOOD)
    settings, place = locate(load_settings(regions_file=path, region="europe-west1"))
    assert settings.namespaces == ("default", "eu")
    assert place is not None
    assert place.cell.name == "euw1"
    with pytest.raises(ConfigurationError, match="name other namespaces"):
        locate(load_settings(regions_file=path, region="europe-west1", namespaces=("default",)))
    with pytest.raises(ConfigurationError, match=r"PERDURE_REGIONS_FILE: .*missing.yaml cannot be read \(No such file"):
        locate(load_settings(regions_file=tmp_path / "missing.yaml", region="europe-west1"))


@pytest.mark.parametrize("setting", ["region", "cell"])
def test_a_region_without_a_file_is_refused(setting: str) -> None:
    with pytest.raises(ConfigurationError, match=f"PERDURE_{setting.upper()} is set and PERDURE_REGIONS_FILE is not"):
        locate(load_settings(**{setting: "use1"}))


def test_without_a_file_there_is_no_place() -> None:
    assert locate(load_settings())[1] is None
