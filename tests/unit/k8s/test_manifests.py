"""Each overlay renders to what Kubernetes takes, and keeps the rules; each rule is seen to fail where it is broken."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

from tests.helpers import manifest_rules as rules
from tests.helpers.certificates_job import make_certificates
from tests.helpers.manifest_rules import RULES, Rule
from tests.helpers.manifests import K8S, OVERLAYS, Document, Manifests, render, render_folder
from tests.helpers.network_policies import Network

KUBERNETES = "1.37"
OLDEST = "1.34"
"""The oldest that the manifests are checked against; on it, and with `locality-static`, all of them are taken."""
HERE = Path(__file__).parent
DEFINITIONS = HERE.parents[1] / "k8s" / "definitions"
"""Those of the custom resources, which `make test-k8s` gives to a real API server."""
ONE = "single-cluster"


@pytest.fixture(scope="module", autouse=True)
def _schemas_are_read_once() -> Iterator[None]:
    """The library reads megabytes of them again for each object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
        yield


@cache
def custom_schemas() -> dict[str, Any]:
    """Returns the schema of each version of each custom resource, in which no field is left out."""
    found = {}
    for path in DEFINITIONS.glob("*.yaml"):
        spec = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        for one in spec["versions"]:
            key = f"{spec['group']}/{one['name']} {spec['names']['kind']}"
            found[key] = closed(one["schema"]["openAPIV3Schema"])
            found[key]["properties"]["metadata"] = {"type": "object"}
    return found


def closed(schema: Any) -> Any:
    """Returns a schema that refuses fields that it does not know, as an API server does."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if made.get("type") == "object" and isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", bool(made.get("x-kubernetes-preserve-unknown-fields")))
    return made


def validate(document: Document, version: str = KUBERNETES) -> None:
    """Raises an error where Kubernetes, or the definition of a custom resource, does not take an object."""
    schema = custom_schemas().get(f"{document['apiVersion']} {document['kind']}")
    if schema is None:
        kubernetes_validate.validate(document, version, strict=True)
    else:
        jsonschema.Draft202012Validator(schema).validate(document)


@cache
def validate_once(text: str) -> None:
    """Validates an object, which may be the same in several overlays."""
    validate(json.loads(text))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_takes_every_object_of_the_overlay(overlay: str) -> None:
    found = render(overlay)
    for document in found.documents:
        validate_once(json.dumps(document).replace(found.namespace, "perdure"))
        if document["kind"] not in ("Namespace", "PriorityClass"):
            assert document["metadata"]["namespace"] == found.namespace
    names = [(one["kind"], one["metadata"]["name"]) for one in found.documents]
    assert len(names) == len(set(names))


def test_the_oldest_kubernetes_that_is_supported_takes_them_too() -> None:
    for document in render("single-cluster").documents:
        validate(document, OLDEST)


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("Deployment", "perdure", ("spec", "template", "spec", "terminationGracePeriodSecs"), 120),
        ("StatefulSet", "crdb", ("spec", "podManagementPolicie"), "Parallel"),
        ("Job", "crdb-init", ("spec", "backofLimit"), 3),
        ("NetworkPolicy", "crdb", ("spec", "igress"), []),
        ("HorizontalPodAutoscaler", "perdure", ("spec", "minReplicas"), "three"),
        ("Certificate", "perdure-tls", ("spec", "dnsName"), "perdure"),
        ("Certificate", "perdure-tls", ("spec", "usages"), ["serving"]),
        ("Issuer", "perdure-ca", ("spec", "acme"), {}),
        ("GRPCRoute", "perdure", ("spec", "hostname"), "x"),
        ("BackendTLSPolicy", "perdure", ("spec", "validation", "host"), "x"),
        ("PodMonitor", "crdb", ("spec", "podMetricsEndpoints", 0, "portname"), "x"),
        ("PrometheusRule", "perdure", ("spec", "groups", 0, "rules", 0, "expression"), "1"),
    ],
)
def test_a_field_that_does_not_exist_is_refused(kind: str, name: str, path: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(render("single-cluster").get(kind, name))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        validate(document)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_overlay_keeps_the_rule(overlay: str, rule: Rule) -> None:
    assert list(rule(render(overlay))) == []


# ---- each rule broken on purpose -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Break:
    """What is done to a manifest, as `broken.yaml` says it.

    Attributes:
        rule: The rule that must see it.
        overlay: The overlay in which.
        of: Kind and name of the object; of a generated ConfigMap without its hash.
        at: The way into it; `name=x` is the item of a list that has this name.
        how: What is done there: `set`, `remove`, `append`, `reverse`, or `replace` in a text.
        value: What is put there.
        said: What the rule says.
    """

    rule: Rule
    overlay: str
    of: tuple[str, str]
    at: tuple[str, ...]
    how: str
    value: Any
    said: str

    def __call__(self, found: Manifests) -> None:
        """Does it."""
        *way, last = self.at
        place: Any = found.get(*self.of)
        for key in way:
            place = _step(place, key)
        match self.how:
            case "set":
                place[last] = self.value
            case "remove":
                place.pop(int(last) if isinstance(place, list) else last)
            case "append":
                place[last].append(self.value)
            case "reverse":
                place[last].reverse()
            case "replace":
                old, new = self.value
                last = int(last) if isinstance(place, list) else last
                assert old in place[last]
                place[last] = place[last].replace(old, new)
            case _:
                raise AssertionError(self.how)


def _step(place: Any, key: str) -> Any:
    if isinstance(place, list):
        name = key.removeprefix("name=")
        return next(one for one in place if one["name"] == name) if name != key else place[int(key)]
    return place[key]


def breaks() -> Iterator[Break]:
    """Yields what is broken on purpose."""
    by_name = {rule.__name__: rule for rule in RULES}
    for name, entries in yaml.safe_load((HERE / "broken.yaml").read_text()).items():
        for one in entries:
            (how,) = set(one) - {"in", "of", "at", "said"}
            yield Break(
                by_name[name], one.get("in", ONE), tuple(one["of"].split()), tuple(one["at"].split()), how, one[how],
                one["said"],
            )  # fmt: skip


BROKEN = tuple(breaks())


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.rule.__name__}-{broken.said}")
def test_a_broken_manifest_is_named(broken: Break) -> None:
    assert broken.said in "; ".join(broken.rule(render(broken.overlay).changed(broken)))


def test_every_rule_has_been_broken() -> None:
    assert {broken.rule for broken in BROKEN} == set(RULES)


# ---- the components that no overlay has ------------------------------------------------------------------------------


def test_zones_may_be_fixed_where_kubernetes_does_not_tell_them(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    folder = tmp_path / "k8s" / "overlays" / ONE
    file = folder / "kustomization.yaml"
    file.write_text(
        file.read_text().replace(
            "/components/bring-up\n", "/components/bring-up\n  - ../../components/locality-static\n"
        )
    )
    facts = folder / "topology.env"
    for number, zone in enumerate("abc"):
        facts.write_text(facts.read_text().replace(f"crdb-{number}.", f"crdb-{zone}-0."))
    found = Manifests(ONE, tuple(render_folder(folder)))
    assert [pod.name for pod in found.pods() if pod.kind == "StatefulSet"] == ["crdb-a", "crdb-b", "crdb-c"]
    for document in found.of("StatefulSet"):
        validate(document)
        # Each would replace its one pod at once, all three together: a budget is not asked when a pod is updated.
        assert document["spec"]["updateStrategy"] == {"type": "OnDelete"}
    for rule in RULES:
        assert list(rule(found)) == []
    for zone in "abc":
        pod = found.pod(f"crdb-{zone}").spec
        assert {"name": "ZONE", "value": f"us-east1-{zone}"} in pod["containers"][0]["env"]
        assert pod["nodeSelector"] == {"topology.kubernetes.io/zone": f"us-east1-{zone}"}


def test_the_shell_of_the_administrator_fits_in() -> None:
    shell = render_folder(K8S / "components" / "sql-shell")
    found = Manifests(ONE, (*render(ONE).documents, *shell))
    for document in shell:
        validate(document)
    for rule in RULES:
        assert list(rule(found)) == []
    assert {one for one in Network(found).open() if "crdb-sql-shell" in one} == {("crdb-sql-shell", "crdb", 26257)}


def test_every_component_is_in_an_overlay_or_tried_above() -> None:
    used = {"locality-static", "sql-shell"}
    for path in (K8S / "overlays").rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text())
        used |= {Path(one).name for one in (*content.get("components", []), *content.get("resources", []))}
    assert {path.name for path in (K8S / "components").iterdir()} <= used


# ---- what the manifests say of other parts of the product ------------------------------------------------------------


def test_the_job_makes_the_certificates_that_cert_manager_would() -> None:
    wanted = {
        one["spec"]["secretName"]: (
            one["spec"]["commonName"],
            {*one["spec"].get("dnsNames", []), *one["spec"].get("ipAddresses", [])},
        )
        for one in render(ONE).of("Certificate")
        if not one["spec"].get("isCA")
    }
    made = {
        leaf.secret: (leaf.name, {host.format(namespace="perdure") for host in leaf.hosts})
        for leaf in make_certificates().LEAVES
    }
    assert made == wanted
    assert set(rules.secrets_made(render("dev"))) == {*made, make_certificates().AUTHORITY}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_scripts_in_jobs_are_correct_shell(overlay: str) -> None:
    for pod in render(overlay).pods():
        for container in pod.containers:
            command = [*container.get("command", []), *container.get("args", [])]
            if command and command[0] in ("/bin/bash", "/bin/sh"):
                shell = command[0].rpartition("/")[2]
                done = subprocess.run([shell, "-n", "-c", command[2]], capture_output=True, text=True, check=False)
                assert (done.returncode, done.stderr) == (0, ""), pod


def test_the_route_names_every_public_service_and_no_other() -> None:
    from perdure_service.rpc.server import SERVICES

    (rule,) = render(ONE).get("GRPCRoute", "perdure")["spec"]["rules"]
    assert {one["method"]["service"] for one in rule["matches"]} == {*SERVICES, "grpc.health.v1.Health"}


def test_the_alerts_ask_for_metrics_that_there_are() -> None:
    documented = (K8S.parent / "service" / "docs" / "telemetry.md").read_text()
    known = {name.replace(".", "_") for name in re.findall(r"^\| `([a-z.]+)` \|", documented, re.MULTILINE)}
    groups = {group["name"]: group["rules"] for group in render(ONE).of("PrometheusRule")[0]["spec"]["groups"]}
    asked = {name for one in groups["perdure"] for name in re.findall(r"\b(?:perdure|db)_[a-z_]+\b(?!=)", one["expr"])}
    asked = {re.sub(r"_(seconds|total)$", "", name) for name in asked} - {
        "db_response_status_code", "db_client_connection_state",
    }  # fmt: skip
    assert asked, "the alerts name no metric of ours"
    assert asked <= known


def test_dev_needs_nothing_that_a_cluster_does_not_bring() -> None:
    assert {one["apiVersion"].partition("/")[0] for one in render("dev").documents} <= {
        "v1", "apps", "batch", "networking.k8s.io", "rbac.authorization.k8s.io", "scheduling.k8s.io",
    }  # fmt: skip


def test_the_readme_names_what_is_to_be_brought_and_every_component() -> None:
    text = (K8S / "README.md").read_text()
    rows = re.findall(r"^\| (?:Secret|ConfigMap) `([a-z-]+)` \|", text, re.MULTILINE)
    assert set(rows) == rules.BROUGHT
    table = text[text.index("| folder |") : text.index("## What was tried")]
    named = set(re.findall(r"`(?:components/)?([a-z-]+)`", table))
    assert {path.name for path in (K8S / "components").iterdir()} <= named
