"""What must be so in the manifests, beyond what a schema says: a rule yields a sentence for each thing that is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from perdure_service.domain.regions import Regions, parse_regions
from perdure_service.settings import FILE_SUFFIX, Settings, secrets_of

from tests.helpers.manifests import OVERLAYS, Document, Manifests, Pod, render
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


def topology(found: Manifests) -> Mapping[str, str]:
    """Returns the facts of an overlay."""
    return dict(found.get("ConfigMap", "topology")["data"])


def regions_of(found: Manifests) -> Regions:
    """Returns the regions that an overlay's servers know."""
    return parse_regions(found.get("ConfigMap", "perdure-regions")["data"]["regions.yaml"], "regions.yaml")


def clusters(found: Manifests) -> list[Manifests]:
    """Returns the overlays that make one cluster of CockroachDB with this one; itself first."""
    group = found.overlay.rpartition("/")[0]
    others = [one for one in OVERLAYS if group and one.startswith(f"{group}/") and one != found.overlay]
    return [found, *map(render, others)]


def _in_namespaces(found: Manifests) -> dict[str, Manifests]:
    return {one.namespace: one for one in clusters(found)}


def join_lists_name_pods(found: Manifests) -> Iterator[str]:
    """Each address that a node joins by is that of a pod; there is one in every region, and all have the same list."""
    if found.overlay == "dev":
        return
    known = _in_namespaces(found)
    addresses = topology(found)["CRDB_JOIN"].split(",")
    if len(addresses) < 3:
        yield "fewer than three nodes to join by"
    for address in addresses:
        match = re.fullmatch(r"(crdb(?:-\w)?)-(\d+)\.crdb\.([\w-]+)\.svc\.cluster\.local:26258", address)
        if match is None:
            yield f"{address} is not the name of a pod with the port of rpc"
        elif match[3] not in known:
            yield f"{address} is in a namespace that no overlay has"
        elif not known[match[3]].has("StatefulSet", match[1]):
            yield f"{address} is of a StatefulSet that is not there"
        elif int(match[2]) >= known[match[3]].pod(match[1]).replicas:
            yield f"{address} is a pod that is not there"
    for namespace, other in known.items():
        if f".{namespace}.svc" not in topology(found)["CRDB_JOIN"]:
            yield f"no node of {namespace} is in the join list"
        if topology(other)["CRDB_JOIN"] != topology(found)["CRDB_JOIN"]:
            yield f"{other.overlay} has another join list"


def regions_agree(found: Manifests) -> Iterator[str]:
    """The regions file, the facts of the overlays, the localities of the nodes and the standbys say the same."""
    regions, facts = regions_of(found), topology(found)
    region, cell = facts["REGION"], regions.cells.get(facts["CELL"])
    if region not in regions.names:
        yield f"the region {region} is not in the regions file"
    if cell is None or cell.region != region or cell.database != facts["DATABASE"]:
        yield f"the cell {facts['CELL']} with the database {facts['DATABASE']} is not that of the region {region}"
    if "DATABASES" in facts and facts["DATABASES"].split() != [one.database for one in regions.cells.values()]:
        yield "DATABASES are not those of the cells"
    for pod in found.pods():
        if pod.labels.get("app.kubernetes.io/name") == "crdb":
            locality = [arg for arg in pod.containers[0]["args"] if arg.startswith("--locality=")]
            if len(locality) != 1 or not re.fullmatch(r"--locality=region=\$\(REGION\),zone=[\w$()-]+", locality[0]):
                yield f"{pod}: its locality is not region and zone"
            (source,) = [one for one in pod.containers[0]["env"] if one["name"] == "REGION"]
            if source.get("valueFrom", {}).get("configMapKeyRef", {}).get("key") != "REGION":
                yield f"{pod}: its region is not that of the overlay"
        if pod.labels.get("app.kubernetes.io/name") == "perdure-standby":
            yield from _standby_problems(pod, regions, region)
    others = {topology(other)["REGION"] for other in clusters(found)}
    if others != set(regions.names):
        yield f"the overlays are of {', '.join(sorted(others))}, the regions file has {', '.join(regions.names)}"


def _standby_problems(pod: Pod, regions: Regions, region: str) -> Iterator[str]:
    values = {one["name"]: one.get("value") for one in pod.containers[-1]["env"]}
    cell = regions.cells.get(values["PERDURE_CELL"] or "")
    if cell is None or cell.secondary != region:
        yield f"{pod}: the cell {values['PERDURE_CELL']} has not {region} as its secondary region"
    elif cell.database != values["DATABASE"]:
        yield f"{pod}: the database {values['DATABASE']} is not that of the cell {cell.name}"


def addresses_exist(found: Manifests) -> Iterator[str]:
    """Where servers are said to be in the regions file there is a headless Service with that port."""
    known = _in_namespaces(found)
    for cell in regions_of(found).cells.values():
        for address in filter(None, (cell.address, cell.standby_address)):
            match = re.fullmatch(r"([\w-]+)\.([\w-]+)\.svc\.cluster\.local:(\d+)", address)
            other = known.get(match[2]) if match else None
            if match is None or other is None or not other.has("Service", match[1]):
                yield f"{cell.name}: there is no Service at {address}"
                continue
            service = other.get("Service", match[1])["spec"]
            if service.get("clusterIP") != "None" or int(match[3]) not in [port["port"] for port in service["ports"]]:
                yield f"{cell.name}: the Service at {address} is not headless, or has another port"
            if not _covered(address.partition(":")[0], server_names(found, "perdure-tls")):
                yield f"{cell.name}: the certificate perdure-tls is not for {address}"


def certificates_cover_names(found: Manifests) -> Iterator[str]:
    """CockroachDB's certificate is for each name by which nodes and clients reach it, in every cluster."""
    names = server_names(found, "crdb-node-tls")
    wanted = {"localhost", "crdb", "crdb-sql"}
    for pod in found.pods():
        for container in pod.containers:
            text = " ".join([*container.get("args", []), *(one.get("value", "") for one in container.get("env", []))])
            text = text.replace("$(POD_NAME)", f"{pod.name}-0").replace("$(POD_NAMESPACE)", found.namespace)
            wanted |= set(re.findall(r"([\w.-]+):2625[78]", text)) - {""}
    wanted |= {address.partition(":")[0] for address in topology(found)["CRDB_JOIN"].split(",") if address}
    for name in sorted(wanted):
        if not _covered(name, names):
            yield f"the certificate crdb-node-tls is not for {name}"
    users = {"crdb-root-tls": "root", "perdure-migrate-tls": "perdure_migrate", "perdure-db-tls": "perdure"}
    for one in found.of("Certificate"):
        name, spec = one["metadata"]["name"], one["spec"]
        if spec["secretName"] != name:
            yield f"Certificate {name} is put into {spec['secretName']}"
        if spec["commonName"] != users.get(name, spec["commonName"]):
            yield f"Certificate {name} is for the user {spec['commonName']}"
        if name == "perdure-db-tls" and spec["commonName"] != regions_of(found).service_role:
            yield f"Certificate {name} is not for the role of the regions file"


def server_names(found: Manifests, secret: str) -> list[str]:
    """Returns the names that a server's certificate is for."""
    for one in found.of("Certificate"):
        if one["spec"]["secretName"] == secret:
            return list(one["spec"]["dnsNames"])
    from tests.helpers.certificates_job import make_certificates  # the overlay has none of cert-manager's

    (leaf,) = (one for one in make_certificates().LEAVES if one.secret == secret)
    return [host.format(namespace=found.namespace) for host in leaf.hosts]


def _covered(name: str, names: list[str]) -> bool:
    return any(name == one or (one.startswith("*.") and name.partition(".")[2] == one[2:]) for one in names)


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
