"""A real kube-apiserver takes every overlay as it stands, twice, and refuses what is misspelt.

Run by `make test-k8s`, which builds the server. Not part of `make test`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from tests.helpers.control_plane import VERSION, ControlPlane
from tests.k8s.conftest import overlays

Object = dict[str, Any]
MAKERS_OF_PODS = ("CronJob", "DaemonSet", "Deployment", "Job", "StatefulSet")
EXPECTED_WARNINGS = ("spec.SessionAffinity is ignored for headless services",)
"""Said at every change of a headless Service, of the default that the server itself has filled in."""


@pytest.fixture(scope="module")
def objects(cluster: ControlPlane, overlay: str) -> list[Object]:
    """What the overlay consists of, as kubectl renders it."""
    done = cluster.run("kustomize", overlay)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def first_answer(cluster: ControlPlane, overlay: str) -> str:
    """What kubectl says when the overlay is applied to an empty cluster, as its README says."""
    return cluster.apply("--kustomize", overlay)


@pytest.fixture(scope="module")
def applied(first_answer: str, objects: list[Object]) -> list[Object]:
    """The objects of the overlay, in a cluster to which it was applied."""
    return objects


def warnings_in(answer: str) -> list[str]:
    return [line for line in answer.splitlines() if "Warning" in line and not line.endswith(EXPECTED_WARNINGS)]


def pods_of(objects: list[Object]) -> list[Object]:
    """Returns a pod of each object that makes some, as its controller would make it."""
    pods = []
    for obj in objects:
        if obj["kind"] in MAKERS_OF_PODS:
            spec = obj["spec"]["jobTemplate"]["spec"] if obj["kind"] == "CronJob" else obj["spec"]
            pod = copy.deepcopy(spec["template"])
            metadata = {"name": obj["metadata"]["name"], "namespace": obj["metadata"]["namespace"]}
            pod.update(apiVersion="v1", kind="Pod", metadata={**pod["metadata"], **metadata})
            for claim in spec.get("volumeClaimTemplates", ()):
                name = claim["metadata"]["name"]
                volume = {"name": name, "persistentVolumeClaim": {"claimName": f"{name}-0"}}
                pod["spec"].setdefault("volumes", []).append(volume)
            pods.append(pod)
    return pods


def misspelt(obj: Object) -> Object:
    """Returns the object with a letter too many in the name of the last field of its spec, or of itself."""
    changed = copy.deepcopy(obj)
    within = changed["spec"] if isinstance(changed.get("spec"), dict) and changed["spec"] else changed
    field = [key for key in within if key not in ("apiVersion", "kind", "metadata")][-1]
    within[f"{field}z"] = within.pop(field)
    return changed


def test_every_overlay_is_tried() -> None:
    assert overlays() == [
        "dev",
        "single-cluster",
        "multi-cluster/europe-west1",
        "multi-cluster/us-east1",
        "multi-cluster/us-west1",
    ]


def test_the_api_takes_all_of_an_overlay(first_answer: str, objects: list[Object]) -> None:
    assert first_answer.count("serverside-applied") == len(objects) > 20
    assert warnings_in(first_answer) == []


def test_an_overlay_that_is_applied_again_changes_nothing(
    cluster: ControlPlane, overlay: str, applied: list[Object]
) -> None:
    first = cluster.versions(applied)
    answer = cluster.apply("--kustomize", overlay)

    assert cluster.versions(applied) == first
    assert len(first) == len(applied)
    assert warnings_in(answer) == []


def test_what_the_api_has_is_what_the_overlay_says(cluster: ControlPlane, overlay: str, applied: list[Object]) -> None:
    done = cluster.run("diff", "--server-side", "--kustomize", overlay)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pods_of_an_overlay_are_admitted_to_its_namespace(cluster: ControlPlane, applied: list[Object]) -> None:
    pods = pods_of(applied)
    answer = cluster.apply("--dry-run=server", "--filename=-", given=yaml.safe_dump_all(pods))

    assert answer.count("serverside-applied") == len(pods) > 3
    assert warnings_in(answer) == []


def test_a_pod_that_may_gain_rights_is_not_admitted(cluster: ControlPlane, applied: list[Object]) -> None:
    pod = pods_of(applied)[0]
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    done = cluster.run("create", "--dry-run=server", "--filename=-", given=yaml.safe_dump(pod))

    assert done.returncode != 0
    assert 'violates PodSecurity "restricted' in done.stderr


def test_a_misspelt_field_is_refused_in_every_kind_of_object(cluster: ControlPlane, applied: list[Object]) -> None:
    by_kind = {obj["kind"]: obj for obj in applied if set(obj) > {"apiVersion", "kind", "metadata"}}
    changed = [misspelt(obj) for obj in by_kind.values()]
    answer = cluster.run("apply", "--server-side", "--filename=-", given=yaml.safe_dump_all(changed))

    assert {"Deployment", "NetworkPolicy", "Service", "StatefulSet"} <= set(by_kind)
    assert answer.stdout == "", "taken, although a field of it is misspelt"
    assert answer.stderr.count("field not declared in schema") == len(changed), answer.stderr


def test_the_server_is_of_the_version_that_the_documents_name(cluster: ControlPlane) -> None:
    done = cluster.run("version", "--output=yaml")

    assert yaml.safe_load(done.stdout)["serverVersion"]["gitVersion"] == VERSION
