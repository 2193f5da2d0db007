"""What must be so in the manifests about regions: an overlay, the others of its cluster and the regions file agree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from perdure_service.domain.regions import Regions, parse_regions

from tests.helpers.certificates_job import make_certificates
from tests.helpers.manifests import OVERLAYS, Manifests, Pod, render


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
    """The certificates are for each name by which nodes and clients reach the database and the servers."""
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
    for name in ("localhost", "perdure", f"perdure.{found.namespace}.svc"):
        if not _covered(name, server_names(found, "perdure-tls")):
            yield f"the certificate perdure-tls is not for {name}"
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
    # The overlay has none of cert-manager's.
    (leaf,) = (one for one in make_certificates().LEAVES if one.secret == secret)
    return [host.format(namespace=found.namespace) for host in leaf.hosts]


def _covered(name: str, names: list[str]) -> bool:
    return any(name == one or (one.startswith("*.") and name.partition(".")[2] == one[2:]) for one in names)
