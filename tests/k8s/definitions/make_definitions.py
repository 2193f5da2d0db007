"""Makes the definitions of custom resources in this folder from the published Go modules that `go.mod` pins.

Run in a checkout, with Go: `.venv/bin/python tests/k8s/definitions/make_definitions.py`. cert-manager and the Gateway
API publish theirs; those of the Prometheus operator are made from its types, by the generator with which it makes them.
What is left out are the descriptions, three quarters of the text; no rule is changed.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CERT_MANAGER = "github.com/cert-manager/cert-manager"
GATEWAY_API = "sigs.k8s.io/gateway-api"
MONITORING = "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring"
GENERATOR = "sigs.k8s.io/controller-tools/cmd/controller-gen"
KINDS = (
    "cert-manager.io_certificates",
    "cert-manager.io_issuers",
    "gateway.networking.k8s.io_backendtlspolicies",
    "gateway.networking.k8s.io_gateways",
    "gateway.networking.k8s.io_grpcroutes",
    "monitoring.coreos.com_podmonitors",
    "monitoring.coreos.com_prometheusrules",
)
"""Those whose resources the overlays may hold, by the names of their files in the modules."""


def main() -> None:
    """Writes the files."""
    with tempfile.TemporaryDirectory() as generated:
        go("run", GENERATOR, "crd:crdVersions=v1", f"paths={MONITORING}/v1", f"output:crd:dir={generated}")
        sources = {
            CERT_MANAGER: Path(go("list", "-m", "-f", "{{.Dir}}", CERT_MANAGER)) / "deploy/crds",
            GATEWAY_API: Path(go("list", "-m", "-f", "{{.Dir}}", GATEWAY_API)) / "config/crd/standard",
            MONITORING: Path(generated),
        }
        for module, folder in sources.items():
            version = go("list", "-m", "-f", "{{.Version}}", module)
            for path in sorted(folder / f"{kind}.yaml" for kind in KINDS):
                if path.exists():
                    definition = without_descriptions(yaml.safe_load(path.read_text()))
                    text = yaml.safe_dump(definition, sort_keys=True, width=120)
                    (HERE / path.name).write_text(f"# From {module} {version} (Apache-2.0).\n{text}")


def go(*arguments: str) -> str:
    """Runs Go here; returns what it prints."""
    done = subprocess.run(["go", *arguments], cwd=HERE, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def without_descriptions(node: Any, *, names: bool = False) -> Any:
    """Returns a part of a definition without its descriptions.

    Args:
        node: The part.
        names: Whether its keys are the names of fields, of which one may be called `description`.
    """
    if isinstance(node, list):
        return [without_descriptions(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        key: without_descriptions(value, names=not names and key == "properties")
        for key, value in node.items()
        if names or key != "description" or not isinstance(value, str)
    }


if __name__ == "__main__":
    main()
