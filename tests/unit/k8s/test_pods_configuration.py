"""The servers' pods are told what a server takes: their environment is read as the server itself reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from perdure_service.rpc import security
from perdure_service.settings import Settings, configured_database_url, load_settings
from perdure_service.store.engine import parse_url
from perdure_service.store.regions_file import load_regions, locate

from tests.helpers.certificates_job import make_certificates
from tests.helpers.manifest_rules import SERVER, matches
from tests.helpers.manifests import OVERLAYS, Document, Manifests, Pod, render


def environment_of(found: Manifests, container: Document) -> dict[str, str]:
    """Returns the environment that Kubernetes gives a container."""
    maps = {one["metadata"]["name"]: one["data"] for one in found.of("ConfigMap")}
    environment: dict[str, str] = {}
    for source in container.get("envFrom", []):
        environment |= maps[source["configMapRef"]["name"]]
    for one in container["env"]:
        reference = one.get("valueFrom", {})
        if "configMapKeyRef" in reference:
            value = maps[reference["configMapKeyRef"]["name"]][reference["configMapKeyRef"]["key"]]
        elif "fieldRef" in reference:
            value = "10.1.2.3"
            assert reference["fieldRef"]["fieldPath"] == "status.podIP"
        else:
            value = re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], one["value"])
        environment[one["name"]] = value
    return environment


def settings_of(found: Manifests, container: Document, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Returns the settings of a container, with its files in a folder."""
    regions = folder / "regions.yaml"
    regions.write_text(found.get("ConfigMap", "perdure-regions")["data"]["regions.yaml"])
    files = {"/etc/perdure/regions.yaml": regions}
    program = make_certificates()
    authority = program._new_authority()
    (leaf,) = (one for one in program.LEAVES if one.secret == "perdure-tls")
    signed = program.sign(leaf, found.namespace, authority)
    for name, content in (
        ("tls.crt", signed.certificate_pem), ("tls.key", signed.key_pem), ("ca.crt", authority.certificate_pem),
    ):  # fmt: skip
        files[f"/tls/{name}"] = folder / name
        files[f"/tls/{name}"].write_bytes(content)
        files[f"/tls/{name}"].chmod(0o400)
    mounts = [one["mountPath"] for one in container["volumeMounts"]]
    for name, value in environment_of(found, container).items():
        if value in files:
            assert any(value.startswith(f"{mount}/") for mount in mounts), f"{value} is not mounted"
        monkeypatch.setenv(name, str(files.get(value, value)))
    return load_settings()


def servers(overlay: str) -> Iterator[Pod]:
    """Yields the pods of servers, standbys too."""
    return (pod for pod in render(overlay).pods() if matches({"matchLabels": SERVER}, pod.labels))


@pytest.mark.parametrize(
    ("overlay", "pod"),
    [(overlay, pod) for overlay in OVERLAYS for pod in servers(overlay)],
    ids=lambda one: str(one).removeprefix("Deployment "),
)
def test_a_server_takes_its_configuration(
    overlay: str, pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = render(overlay)
    assert environment_of(found, pod.containers[0]) == environment_of(found, pod.containers[1]), "check and serve"
    settings, place = locate(settings_of(found, pod.containers[1], tmp_path, monkeypatch))
    assert place is not None
    assert [finding.text for finding in security.findings(settings, dev=False) if finding.severity == "error"] == []
    url = parse_url(configured_database_url(settings) or "")
    assert (url.drivername, url.username, url.host, url.port) == ("cockroachdb+psycopg", "perdure", "crdb-sql", 26257)
    assert url.database == place.cell.database
    assert url.query["sslmode"] == "verify-full"
    mounts = [one["mountPath"] for one in pod.containers[1]["volumeMounts"]]
    for key in ("sslrootcert", "sslcert", "sslkey"):
        assert str(Path(str(url.query[key])).parent) in mounts
    assert settings.advertise_address == "10.1.2.3:50051"
    assert settings.insecure == (overlay == "dev")
    ports = {pod.ports[name] for name in ("grpc", "health", "metrics")}
    listens = (settings.address, settings.health_address, settings.metrics_address)
    assert ports == {int(str(address).rpartition(":")[2]) for address in listens}


@pytest.mark.parametrize("overlay", [one for one in OVERLAYS if render(one).has("Job", "perdure-migrate")])
def test_the_migrator_connects_to_a_database_that_is_no_cells(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = render(overlay)
    settings = settings_of(found, found.pod("perdure-migrate").containers[0], tmp_path, monkeypatch)
    assert settings.regions_file is not None
    regions = load_regions(settings.regions_file)
    url = parse_url(configured_database_url(settings) or "")
    assert url.username == "perdure_migrate"
    assert url.database not in [cell.database for cell in regions.cells.values()]
    made = found.get("ConfigMap", "crdb-bootstrap")["data"]["bootstrap.sql"]
    assert f"CREATE USER IF NOT EXISTS {url.username};" in made
    assert f"CREATE DATABASE IF NOT EXISTS {url.database};" in made
