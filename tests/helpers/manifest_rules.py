"""What must be so in the manifests, beyond what a schema says: a rule yields a sentence for each thing that is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from perdure_service.settings import FILE_SUFFIX, Settings, secrets_of

from tests.helpers.manifest_region_rules import (
    addresses_exist,
    certificates_cover_names,
    join_lists_name_pods,
    regions_agree,
)
from tests.helpers.manifests import Document, Manifests, Pod
from tests.helpers.settings_names import variables_of

Rule = Callable[[Manifests], Iterator[str]]

LATE_S = 5
"""What a server's end may take beyond its drain: `perdure_service.app.LATE`."""
SERVER = {"perdure.dev/server": "true"}
BROUGHT = {"crdb-licence", "crdb-backups", "perdure-ca"}
"""Secrets and ConfigMaps that the operator brings; k8s/README.md says how."""


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Returns whether a label selector selects; an empty one selects everything."""
    selector = selector or {}
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for one in selector.get("matchExpressions", []):
        assert one["operator"] == "In", "no other operator is used"
        if labels.get(one["key"]) not in one["values"]:
            return False
    return True


def selectors_select(found: Manifests) -> Iterator[str]:
    """Services, budgets, policies and monitors select pods that there are, and workloads only their own."""
    pods = list(found.pods())
    for one in found.of("Service", "PodDisruptionBudget", "PodMonitor", "NetworkPolicy"):
        spec, name = one["spec"], f"{one['kind']} {one['metadata']['name']}"
        selector = {"matchLabels": spec["selector"]} if one["kind"] == "Service" else spec.get("selector")
        selector = spec["podSelector"] if one["kind"] == "NetworkPolicy" else selector
        if not any(matches(selector, pod.labels) for pod in pods):
            yield f"{name} selects no pod"
    for one in found.of("Deployment", "StatefulSet"):
        name, selector = one["metadata"]["name"], one["spec"]["selector"]
        selected = sorted(pod.name for pod in pods if matches(selector, pod.labels))
        if selected != [name]:
            yield f"{one['kind']} {name} selects the pods of {', '.join(selected) or 'nobody'}"
    for one in found.of("HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        if not found.has(target["kind"], target["name"]):
            yield f"HorizontalPodAutoscaler {one['metadata']['name']} scales {target['name']}, which is not there"
        elif "replicas" in found.get(target["kind"], target["name"])["spec"]:
            yield f"{target['kind']} {target['name']} has replicas, which each apply would put back"


def ports_exist(found: Manifests) -> Iterator[str]:
    """What leads to a port, by name or number, leads to one that a container has."""
    pods = list(found.pods())
    for one in found.of("Service"):
        for pod in pods:
            if matches({"matchLabels": one["spec"]["selector"]}, pod.labels):
                for port in one["spec"]["ports"]:
                    if port["targetPort"] not in pod.ports:
                        yield f"Service {one['metadata']['name']} leads to {port['targetPort']}, which {pod} has not"
    for pod in pods:
        for container in pod.containers:
            own = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                for action in container.get(kind, {}).values():
                    port = action.get("port") if isinstance(action, dict) else None
                    if port is not None and port not in (*own, *own.values()):
                        yield f"{pod}: the {kind} asks {port}, which the container has not"
    for one in found.of("PodMonitor"):
        for endpoint in one["spec"]["podMetricsEndpoints"]:
            for pod in pods:
                if matches(one["spec"]["selector"], pod.labels) and endpoint["port"] not in pod.ports:
                    yield f"PodMonitor {one['metadata']['name']} scrapes {endpoint['port']}, which {pod} has not"
    for one in found.of("GRPCRoute"):
        for backend in (backend for rule in one["spec"]["rules"] for backend in rule["backendRefs"]):
            if not found.has("Service", backend["name"]):
                yield f"GRPCRoute leads to the Service {backend['name']}, which is not there"
            elif backend["port"] not in [p["port"] for p in found.get("Service", backend["name"])["spec"]["ports"]]:
                yield f"GRPCRoute leads to the port {backend['port']}, which the Service {backend['name']} has not"


def references_exist(found: Manifests) -> Iterator[str]:
    """ConfigMaps and their keys, Secrets, volumes, service accounts and priority classes are there."""
    maps = {one["metadata"]["name"]: one.get("data", {}) for one in found.of("ConfigMap")}
    secrets = set(secrets_made(found)) | BROUGHT
    for pod in found.pods():
        if not found.has("ServiceAccount", pod.spec.get("serviceAccountName", "default")):
            yield f"{pod} has the service account {pod.spec.get('serviceAccountName')}, which is not there"
        priority = pod.spec.get("priorityClassName")
        if priority and not found.has("PriorityClass", priority):
            yield f"{pod} has the priority class {priority}, which is not there"
        volumes = {one["name"]: one for one in pod.spec.get("volumes", [])}
        for name in _config_maps(volumes.values()):
            if name not in maps:
                yield f"{pod} mounts the ConfigMap {name}, which is not there"
        for name in _secrets(volumes.values()):
            if name not in secrets:
                yield f"{pod} mounts the Secret {name}, which nothing makes"
        claims = found.get("StatefulSet", pod.name)["spec"].get("volumeClaimTemplates", []) if _stateful(pod) else []
        known = {*volumes, *(claim["metadata"]["name"] for claim in claims)}
        for container in pod.containers:
            yield from (f"{pod} mounts {one['name']}, which is no volume" for one in container.get("volumeMounts", [])
                        if one["name"] not in known)  # fmt: skip
            yield from _environment_problems(pod, container, maps)


def _stateful(pod: Pod) -> bool:
    return pod.kind == "StatefulSet"


def _config_maps(volumes: Any) -> Iterator[str]:
    return (one["configMap"]["name"] for one in volumes if "configMap" in one)


def _secrets(volumes: Any) -> Iterator[str]:
    for one in volumes:
        if "secret" in one:
            yield one["secret"]["secretName"]
        yield from (source["secret"]["name"] for source in one.get("projected", {}).get("sources", []))


def _environment_problems(pod: Pod, container: Document, maps: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    for source in container.get("envFrom", []):
        if source.get("configMapRef", {}).get("name") not in maps:
            yield f"{pod} takes its environment from {source}, which is not there"
    defined: set[str] = set()
    for one in container.get("env", []):
        reference = one.get("valueFrom", {}).get("configMapKeyRef")
        if reference and reference["key"] not in maps.get(reference["name"], {}):
            yield f"{pod} reads {reference['key']} of {reference['name']}, which is not there"
        for name in re.findall(r"\$\((\w+)\)", one.get("value", "")):
            if name not in defined:
                yield f"{pod}: {one['name']} uses {name}, which is not defined before it"
        defined.add(one["name"])
    for name in re.findall(r"\$\((\w+)\)", " ".join(container.get("args", []) if "command" not in container
                                                    or "bash" not in container["command"][0] else [])):  # fmt: skip
        if name not in defined:
            yield f"{pod}: an argument uses {name}, which is not defined"


def secrets_made(found: Manifests) -> Iterator[str]:
    """Yields the Secrets that cert-manager or the Job make."""
    for one in found.of("Certificate"):
        yield one["spec"]["secretName"]
    for one in found.of("Role"):
        for rule in one["rules"]:
            yield from rule.get("resourceNames", [])


def ends_in_time(found: Manifests) -> Iterator[str]:
    """Kubernetes waits longer for a server's end than preStop, the drain and the end itself may take."""
    settings = found.get("ConfigMap", "perdure-settings")["data"]
    drain = float(settings["PERDURE_DRAIN_TIMEOUT"])
    for pod in found.pods():
        if matches({"matchLabels": SERVER}, pod.labels):
            (container,) = pod.spec["containers"]
            prestop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            if not prestop:
                yield f"{pod} has no preStop: calls arrive while it drains"
            if pod.spec.get("terminationGracePeriodSeconds", 30) <= prestop + drain + LATE_S:
                yield f"{pod} is killed before it has drained"
        if pod.labels.get("app.kubernetes.io/name") == "crdb" and pod.spec["terminationGracePeriodSeconds"] < 300:
            yield f"{pod} is killed before it has drained"


def images_are_fixed(found: Manifests) -> Iterator[str]:
    """No image is `latest`; but for `dev`, each is given by its digest."""
    for pod in found.pods():
        for container in pod.containers:
            image = container["image"]
            name, _, digest = image.partition("@")
            tag = name.rpartition("/")[2].partition(":")[2]
            if not tag or tag == "latest":
                yield f"{pod}: the image {image} has no fixed tag"
            if found.overlay != "dev" and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
                yield f"{pod}: the image {image} has no digest"


def pods_are_restricted(found: Manifests) -> Iterator[str]:
    """Each pod is what the Pod Security Standard `restricted` asks for, and has no token and a read-only root."""
    labels = found.of("Namespace")[0]["metadata"]["labels"]
    if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "the namespace does not enforce `restricted`"
    for pod in found.pods():
        security = pod.spec.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
            yield f"{pod} may run as root"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod} has no seccomp profile"
        if pod.spec.get("automountServiceAccountToken") is not (pod.name == "make-certificates"):
            yield f"{pod}: automountServiceAccountToken"
        if any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod} shares something of its host"
        for volume in pod.spec.get("volumes", []):
            if not {"configMap", "projected", "secret", "emptyDir"} & set(volume):
                yield f"{pod}: the volume {volume['name']} is of a kind that `restricted` does not allow"
        for container in pod.containers:
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{pod}: {container['name']} may gain rights"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{pod}: {container['name']} may write to its image"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{pod}: {container['name']} keeps capabilities"
            resources = container.get("resources", {})
            if {"cpu", "memory"} - set(resources.get("requests", {})) or "memory" not in resources.get("limits", {}):
                yield f"{pod}: {container['name']} does not say what it needs"


def secrets_are_files(found: Manifests) -> Iterator[str]:
    """No Secret is rendered, none is in the environment, and none of the settings in ConfigMaps is a secret."""
    for one in found.of("Secret"):
        yield f"the Secret {one['metadata']['name']} is in the manifests"
    for pod in found.pods():
        for container in pod.containers:
            for one in container.get("env", []):
                if "secretKeyRef" in one.get("valueFrom", {}):
                    yield f"{pod}: {one['name']} has a Secret in the environment"
            if any("secretRef" in one for one in container.get("envFrom", [])):
                yield f"{pod}: {container['name']} has a Secret in the environment"
    for name, value in found.get("ConfigMap", "perdure-settings")["data"].items():
        if name in set(secrets_of(Settings)):
            yield f"{name} is a secret in a ConfigMap; use {name}{FILE_SUFFIX}"
        if re.search(r"://[^/@]*:[^/@]*@", value):
            yield f"{name} has a password"


def rights_are_few(found: Manifests) -> Iterator[str]:
    """Nobody has rights in the cluster, and only the Job that makes certificates has any."""
    for one in found.of("ClusterRole", "ClusterRoleBinding"):
        yield f"{one['kind']} {one['metadata']['name']}"
    for one in found.of("Role", "RoleBinding"):
        if one["metadata"]["name"] != "make-certificates":
            yield f"{one['kind']} {one['metadata']['name']}"
    for one in found.of("Role"):
        for rule in one["rules"]:
            if rule["resources"] != ["secrets"] or not set(rule["verbs"]) <= {"create", "get"}:
                yield f"Role {one['metadata']['name']} may do more than make Secrets"
            if "get" in rule["verbs"] and not rule.get("resourceNames"):
                yield f"Role {one['metadata']['name']} may read all Secrets"


def budgets_leave_room(found: Manifests) -> Iterator[str]:
    """Each workload of several pods has a budget that lets one go and keeps the others, and is spread."""
    for pod in found.pods():
        if pod.kind == "Job" or pod.replicas < 2:
            continue
        budgets = [b for b in found.of("PodDisruptionBudget") if matches(b["spec"]["selector"], pod.labels)]
        if len(budgets) != 1:
            yield f"{pod} has {len(budgets)} budgets"
        elif not 0 < budgets[0]["spec"].get("maxUnavailable", 0) < pod.replicas:
            yield f"the budget of {pod} keeps nothing, or lets nothing go"
        if not pod.spec.get("topologySpreadConstraints") and not pod.spec.get("affinity"):
            yield f"{pod} may be on one host as a whole"


def jobs_end(found: Manifests) -> Iterator[str]:
    """A Job gives up after a time, and goes away, so that the next release may have another of its name."""
    for one in found.of("Job"):
        for key in ("activeDeadlineSeconds", "ttlSecondsAfterFinished", "backoffLimit"):
            if not one["spec"].get(key):
                yield f"Job {one['metadata']['name']} has no {key}"


def settings_exist(found: Manifests) -> Iterator[str]:
    """Each PERDURE_ variable is a setting: one that does not exist would be ignored."""
    known = {*variables_of(Settings), *(f"{name}{FILE_SUFFIX}" for name in secrets_of(Settings))}
    names = set(found.get("ConfigMap", "perdure-settings")["data"])
    names |= {one["name"] for pod in found.pods() for container in pod.containers for one in container.get("env", [])}
    yield from (f"{name} is no setting" for name in sorted(names) if name.startswith("PERDURE_") and name not in known)


RULES: tuple[Rule, ...] = (
    selectors_select,
    ports_exist,
    references_exist,
    ends_in_time,
    images_are_fixed,
    pods_are_restricted,
    secrets_are_files,
    rights_are_few,
    budgets_leave_room,
    jobs_end,
    settings_exist,
    join_lists_name_pods,
    regions_agree,
    addresses_exist,
    certificates_cover_names,
)
