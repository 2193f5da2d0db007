"""The Job that makes certificates, as its own service account at a real API server: it may do what it must, no more."""

from __future__ import annotations

import json
import ssl
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.certificates_job import make_certificates
from tests.helpers.control_plane import ControlPlane
from tests.k8s.conftest import KUBECTL

program = make_certificates()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster's API with the overlay `dev`."""
    control_plane = ControlPlane(tmp_path_factory.mktemp("control-plane"), KUBECTL)
    try:
        control_plane.start()
        control_plane.apply("--kustomize", "k8s/overlays/dev")
        yield control_plane
    finally:
        control_plane.stop()


@pytest.fixture(scope="module")
def secrets(cluster: ControlPlane) -> Any:
    """The API as the pod of the Job sees it."""
    token = cluster.run("--namespace=perdure", "create", "token", "make-certificates")
    assert token.returncode == 0, token.stderr
    access = json.loads(cluster.run("config", "view", "--raw", "--output=json").stdout)["clusters"][0]["cluster"]
    tls = ssl.create_default_context(cafile=access["certificate-authority"])
    return program.Secrets(access["server"], "perdure", token.stdout.strip(), tls)


def names(cluster: ControlPlane) -> set[str]:
    done = cluster.run("--namespace=perdure", "get", "secrets", "--output=json")
    return {one["metadata"]["name"] for one in json.loads(done.stdout)["items"]}


def test_it_makes_the_secrets_that_the_pods_mount(cluster: ControlPlane, secrets: Any) -> None:
    program.make_all(secrets, "perdure")
    assert names(cluster) == {program.AUTHORITY, *(leaf.secret for leaf in program.LEAVES)}
    before = {leaf.secret: secrets.read(leaf.secret) for leaf in program.LEAVES}
    program.make_all(secrets, "perdure")
    assert {leaf.secret: secrets.read(leaf.secret) for leaf in program.LEAVES} == before


def test_it_may_not_read_what_others_made(cluster: ControlPlane, secrets: Any, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("of others")
    cluster.run("--namespace=perdure", "create", "secret", "generic", "theirs", f"--from-file={tmp_path}")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        secrets.read("theirs")
    for verb in ("list", "update", "delete"):
        done = cluster.run(
            "--namespace=perdure", "auth", "can-i", verb, "secrets",
            "--as=system:serviceaccount:perdure:make-certificates",
        )  # fmt: skip
        assert done.stdout.strip() == "no", verb
