"""Decides, as Kubernetes' network does, whether network policies let a connection through."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.manifest_rules import matches
from tests.helpers.manifests import Manifests

HERE = "here"
"""Stands for the namespace of the manifests."""


@dataclass(frozen=True)
class Peer:
    """One end of a connection.

    Attributes:
        name: For messages.
        namespace: The labels of its namespace; `HERE` for that of the manifests, None for what is in no pod.
        labels: Its labels.
        address: Its address.
        ports: Its ports that have a name.
    """

    name: str
    namespace: Mapping[str, str] | str | None
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = "10.200.0.1"
    ports: Mapping[str, int] = field(default_factory=dict)


def peers_in(found: Manifests) -> list[Peer]:
    """Returns the pods of the manifests."""
    return [Peer(pod.name, HERE, pod.labels, ports=pod.ports) for pod in found.pods()]


class Network:
    """The network of a namespace with its policies."""

    def __init__(self, found: Manifests) -> None:
        """Takes the policies of the manifests."""
        self._found = found
        self._policies: dict[tuple[str, frozenset[tuple[str, str]]], list[Mapping[str, Any]]] = {}

    def allows(self, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
        """Returns whether the policies let `source` connect to a port of `target`."""
        return self._passes("Egress", source, target, target, port, protocol) and self._passes(
            "Ingress", target, source, target, port, protocol
        )

    def open(self) -> Iterator[tuple[str, str, int]]:
        """Yields each pair of workloads, and each port that one of them has, where the one may reach the other."""
        peers = peers_in(self._found)
        numbers = sorted({number for peer in peers for number in peer.ports.values()} | {50053})
        for source in peers:
            for target in peers:
                for port in numbers:
                    if self.allows(source, target, port):
                        yield source.name, target.name, port

    def _passes(self, direction: str, subject: Peer, other: Peer, target: Peer, port: int, protocol: str) -> bool:
        if subject.namespace != HERE:
            return True
        specs = self._of(direction, subject)
        peers = "to" if direction == "Egress" else "from"
        return not specs or any(
            _has_port(rule.get("ports"), target, port, protocol) and _is_among(self._found, rule.get(peers), other)
            for spec in specs
            for rule in spec.get(direction.lower(), [])
        )

    def _of(self, direction: str, subject: Peer) -> list[Mapping[str, Any]]:
        """Returns the policies that select a pod."""
        key = direction, frozenset(subject.labels.items())
        if key not in self._policies:
            self._policies[key] = [
                policy["spec"]
                for policy in self._found.of("NetworkPolicy")
                if direction in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], subject.labels)
            ]
        return self._policies[key]


def _is_among(found: Manifests, peers: Iterable[Mapping[str, Any]] | None, other: Peer) -> bool:
    return peers is None or any(_is(found, one, other) for one in peers)


def _is(found: Manifests, peer: Mapping[str, Any], other: Peer) -> bool:
    if "ipBlock" in peer:
        address, block = ipaddress.ip_address(other.address), peer["ipBlock"]
        # A pod of this cluster is never meant by addresses here, although some networks would let it through.
        outside = other.namespace is None
        inside = address in ipaddress.ip_network(block["cidr"])
        return outside and inside and not any(address in ipaddress.ip_network(x) for x in block.get("except", []))
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": found.namespace} if other.namespace == HERE else other.namespace
        assert not isinstance(labels, str)
        if not matches(peer["namespaceSelector"], labels):
            return False
    elif other.namespace != HERE:
        return False
    return matches(peer.get("podSelector"), other.labels)


def _has_port(ports: Iterable[Mapping[str, Any]] | None, target: Peer, port: int, protocol: str) -> bool:
    if ports is None:
        return True
    return any(
        one.get("protocol", "TCP") == protocol and target.ports.get(one["port"], one["port"]) == port for one in ports
    )
