"""The Dockerfile: what it copies is there, what it installs is pinned, and what runs is nobody in particular."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[3]
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]


def arguments_of(instruction: str) -> list[str]:
    """Returns what follows an instruction, each time that it is there."""
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = {source for rest in arguments_of("COPY") if "--from" not in rest for source in rest.split()[:-1]}
    assert sources == kept
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_base_image_has_a_version_and_no_other_image_is_used() -> None:
    (base,) = [rest for rest in arguments_of("ARG") if rest.startswith("PYTHON=")]
    assert re.fullmatch(r"PYTHON=python:\d+\.\d+\.\d+-[\w-]+", base)
    assert arguments_of("FROM") == ["${PYTHON} AS build", "${PYTHON}"]


def test_everything_is_installed_by_the_pinned_versions() -> None:
    installs = [part for rest in arguments_of("RUN") for part in rest.split("&&") if "pip install" in part]
    assert installs
    assert [part for part in installs if "-c constraints.txt" not in part and "--no-deps" not in part] == []
    assert not re.search(r"https?://", (ROOT / "Dockerfile").read_text())


def test_it_runs_as_the_user_that_the_manifests_name() -> None:
    deployment = next(yaml.safe_load_all((ROOT / "k8s/base/perdure/server/deployment.yaml").read_text()))
    security = deployment["spec"]["template"]["spec"]["securityContext"]
    assert arguments_of("USER") == [f"{security['runAsUser']}:{security['runAsGroup']}"]


def test_it_is_the_server_that_runs() -> None:
    assert arguments_of("ENTRYPOINT") == ['["perdure-server"]']
    assert arguments_of("CMD") == ['["serve"]']
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", " ".join(arguments_of("LABEL"))))
    assert labels == {"title", "description", "licenses", "version", "revision"}
