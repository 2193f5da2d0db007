"""The network policies let through what is needed, and nothing else: every pair of pods and every port is tried."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.manifests import OVERLAYS, Manifests, render
from tests.helpers.network_policies import HERE, Network, Peer, peers_in

SQL, RPC, HTTP, GRPC, METRICS, ADMIN, OTLP = 26257, 26258, 8080, 50051, 9464, 50053, 4317

NEEDED = {
    ("perdure", "crdb", SQL),
    ("perdure", "perdure", GRPC),  # suspicion
    ("crdb", "crdb", RPC),
    ("crdb-init", "crdb", RPC),
    ("crdb-bootstrap", "crdb", SQL),
    ("crdb-backups", "crdb", SQL),
    ("perdure-migrate", "crdb", SQL),
    ("perdure", "otel-collector", OTLP),
    ("otel-collector", "jaeger", OTLP),
}
"""Between the workloads, as the manifests' addresses have it. A standby needs what a server needs."""

DNS = Peer(
    "dns", {"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"}, ports={"dns": 53, "dns-tcp": 53}
)
CLIENT = Peer("client", {"kubernetes.io/metadata.name": "shop", "perdure.dev/clients": "true"})
STRANGER = Peer("stranger", {"kubernetes.io/metadata.name": "shop"}, {"perdure.dev/server": "true"})
GATEWAY = Peer("gateway", {"kubernetes.io/metadata.name": "gateway"})
PROMETHEUS = Peer("prometheus", {"kubernetes.io/metadata.name": "monitoring"})
MODEL = Peer("model", None, address="203.0.113.7")
OTHER_REGION = Peer("other region", None, address="10.2.7.7")
OFFICE = Peer("office", None, address="10.99.0.1")
METADATA = Peer("cloud metadata", None, address="169.254.169.254")


def family(name: str) -> str:
    """Returns what a standby, or the nodes of a zone, stand for."""
    return "perdure" if name.startswith("perdure-standby") else name


def outside(found: Manifests) -> Iterator[tuple[Peer, Peer, int, bool]]:
    """Yields connections over the border of the namespace, and whether they are needed."""
    peers = {peer.name: peer for peer in peers_in(found)}
    server, node = peers["perdure"], peers["crdb"]
    monitored = found.overlay != "dev"
    yield from ((peer, DNS, 53, True) for peer in peers.values())
    yield CLIENT, server, GRPC, True
    yield STRANGER, server, GRPC, False
    yield from ((CLIENT, node, port, False) for port in (SQL, RPC, HTTP))
    yield from ((CLIENT, server, port, False) for port in (ADMIN, METRICS, 50052))
    yield GATEWAY, server, GRPC, monitored
    yield PROMETHEUS, server, METRICS, monitored
    yield PROMETHEUS, node, HTTP, monitored
    yield PROMETHEUS, node, SQL, False
    yield server, MODEL, 443, True
    yield server, MODEL, 80, False
    yield node, MODEL, 443, True  # telemetry of the licence, backups
    yield from ((peers[name], MODEL, 443, False) for name in ("perdure-migrate", "crdb-bootstrap") if name in peers)
    for place in (OFFICE, METADATA):
        yield from ((peer, place, 443, False) for peer in (server, node))
    regions = found.overlay.startswith("multi-cluster/")
    yield OTHER_REGION, node, RPC, regions
    yield node, OTHER_REGION, RPC, regions
    yield OTHER_REGION, server, GRPC, regions
    yield server, OTHER_REGION, GRPC, regions
    yield from ((OTHER_REGION, node, port, False) for port in (SQL, HTTP))
    yield OFFICE, node, RPC, False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pods_may_connect_to_each_other_as_they_need_to_and_not_otherwise(overlay: str) -> None:
    found = render(overlay)
    names = {pod.name for pod in found.pods()}
    needed = {
        (source, target, port)
        for source in names
        for target in names
        for one, other, port in NEEDED
        if (family(source), family(target)) == (one, other)
    }
    assert set(Network(found).open()) == needed


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_over_the_border_of_the_namespace_goes_what_must(overlay: str) -> None:
    found = render(overlay)
    network = Network(found)
    wrong = [
        f"{source.name} -> {target.name}:{port} {'is needed' if needed else 'is not needed'}"
        for source, target, port, needed in outside(found)
        if network.allows(source, target, port) is not needed
    ]
    assert wrong == []


def test_the_job_that_makes_certificates_reaches_the_api_server_and_nothing_of_ours() -> None:
    found = render("dev")
    (job,) = (peer for peer in peers_in(found) if peer.name == "make-certificates")
    api, network = Peer("api server", None, address="10.96.0.1"), Network(found)
    assert network.allows(job, api, 443)
    assert network.allows(job, api, 6443)
    assert not [one for one in network.open() if "make-certificates" in one]


@pytest.mark.parametrize("name", ["crdb", "perdure", "names", "otel-collector", "perdure-monitoring"])
def test_without_one_of_the_policies_something_is_cut_off_or_open(name: str) -> None:
    found = render("single-cluster")
    network, broken = Network(found), Network(found.without("NetworkPolicy", name))
    inside = set(broken.open()) == set(network.open())
    over_the_border = all(
        broken.allows(source, target, port) is needed for source, target, port, needed in outside(found)
    )
    assert not (inside and over_the_border)


def test_a_pod_that_others_bring_is_reached_by_nobody() -> None:
    found = render("single-cluster")
    guest = Peer("guest", HERE, {"app": "guest"})
    assert not Network(found).allows(CLIENT, guest, 80)
    assert not Network(found).allows(guest, MODEL, 443)
    assert Network(found.without("NetworkPolicy", "default-deny")).allows(CLIENT, guest, 80)
