"""A cluster's API for each overlay, with the definitions of the custom resources that overlays hold."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.control_plane import ControlPlane

HERE = Path(__file__).parent
K8S = HERE.parents[1] / "k8s"
KUBECTL = Path(sys.executable).parent / "kubectl"


def overlays() -> list[str]:
    """Returns the overlays, in the order in which clusters would be made; not what they have in common."""
    files = sorted((K8S / "overlays").glob("*/kustomization.yaml")) + sorted(
        (K8S / "overlays").glob("multi-cluster/*/kustomization.yaml")
    )
    kinds = {path.parent: yaml.safe_load(path.read_text())["kind"] for path in files}
    return [str(folder.relative_to(K8S / "overlays")) for folder, kind in kinds.items() if kind == "Kustomization"]


@pytest.fixture(scope="module", params=overlays())
def overlay(request: pytest.FixtureRequest) -> str:
    """The folder of an overlay, as a user types it."""
    return f"k8s/overlays/{request.param}"


@pytest.fixture(scope="module")
def cluster(overlay: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The API of a cluster in which nothing but the definitions has been applied."""
    control_plane = ControlPlane(tmp_path_factory.mktemp("control-plane"), KUBECTL)
    try:
        control_plane.start()
        control_plane.apply(*(f"--filename={path}" for path in sorted((HERE / "definitions").glob("*.yaml"))))
        done = control_plane.run("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        assert done.returncode == 0, done.stderr
        yield control_plane
    finally:
        control_plane.stop()
