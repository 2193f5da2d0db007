"""The wheel: what is in it, and that its client needs three packages and nothing else."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT
from tests.helpers.waiting import scaled

PIP_S = 60
BLOCKER = """
import importlib.abc, sys

ALLOWED = {"perdure", "perdure_client", "grpc", "google", "typing_extensions", *sys.stdlib_module_names}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Blocker())
"""
"""Makes everything unimportable but the client, what it depends on, and what that depends on."""


def pip(*arguments: str, cwd: Path = ROOT) -> None:
    """Runs pip without a network."""
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments],
        cwd=cwd,
        env={**os.environ, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=scaled(PIP_S),
        check=False,
    )
    assert result.returncode == 0, (result.stdout, result.stderr)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    assert importlib.util.find_spec("hatchling"), "hatchling builds the wheel; it belongs to the dependency group `dev`"
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-compile", "--target", str(folder), str(wheel))
    return folder


def run_alone(installed: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with the installed wheel, where nothing else can be imported but what the client depends on."""
    dropped = ("PYTHON", "PERDURE_", "OTEL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKER + program],
        cwd=installed.parent,
        env={**kept, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=scaled(30),
        check=False,
    )


def metadata(wheel: Path) -> tuple[str, list[str]]:
    """Returns the version and the requirements."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        fields = Parser().parsestr(archive.read(name).decode())
    return str(fields["Version"]), fields.get_all("Requires-Dist", [])


def test_it_has_the_three_packages_and_nothing_else(files: set[str]) -> None:
    folders = {name.partition("/")[0] for name in files if ".dist-info/" not in name}
    assert folders == {"perdure", "perdure_service", "perdure_client"}
    harness = "perdure_service/testing/"  # for authors; our own tests are nowhere
    strangers = [name.removeprefix(harness) for name in files if "test" in name.lower().removeprefix(harness)]
    assert not [*strangers, *(name for name in files if "__pycache__" in name)]
    for licence in ("LICENSE", "METADATA", "entry_points.txt"):
        assert any(name.endswith(licence) and ".dist-info/" in name for name in files), licence


def test_it_has_every_file_of_the_packages(files: set[str]) -> None:
    packages = {
        "perdure": ROOT / "protos" / "perdure",
        "perdure_service": ROOT / "service" / "perdure_service",
        "perdure_client": ROOT / "clients" / "python" / "perdure_client",
    }
    for package, folder in packages.items():
        kinds = ("*.py", "*.pyi", "*.proto", "py.typed")
        here = {f"{package}/{path.relative_to(folder).as_posix()}" for kind in kinds for path in folder.rglob(kind)}
        assert here == {name for name in files if name.startswith(f"{package}/")}
        assert f"{package}/py.typed" in files
    assert len([name for name in files if name.endswith(".proto")]) >= 6


def test_it_asks_for_three_packages_unless_an_extra_is_wanted(wheel: Path) -> None:
    _, requirements = metadata(wheel)
    plain = {re.split(r"[^\w-]", one)[0] for one in requirements if "extra ==" not in one}
    assert plain == {"grpcio", "protobuf", "googleapis-common-protos"}


def test_the_client_works_without_anything_of_the_service_or_the_command(wheel: Path, installed: Path) -> None:
    program = """
import perdure_client, perdure_service
assert "site-packages" not in perdure_client.__file__, perdure_client.__file__
"""
    result = run_alone(installed, program)
    assert "perdure_service is not installed here" in result.stderr, "the blocker works"
    program = """
import types
import perdure_client
from perdure_client import *

public = {
    name for name, value in vars(perdure_client).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
}
assert public | {"__version__"} == set(perdure_client.__all__), public ^ set(perdure_client.__all__)
assert len(perdure_client.__all__) == len(set(perdure_client.__all__))
for name in ("dbos", "sqlalchemy", "typer", "rich"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
try:
    with Client("127.0.0.1:1", timeout=0.5, connect_timeout=0.2) as client:
        client.get("x")
except PerdureError as error:
    print(error.code, error.reason)
print(perdure_client.__version__, perdure_client.__file__)
"""
    result = run_alone(installed, program)
    assert result.returncode == 0, result.stderr
    error, where = result.stdout.splitlines()
    assert error.startswith("UNAVAILABLE") or error.startswith("DEADLINE_EXCEEDED")
    version, _ = metadata(wheel)
    assert where == f"{version} {installed / 'perdure_client' / '__init__.py'}"


def test_the_generated_code_can_be_used_alone(installed: Path) -> None:
    program = """
from perdure.v1 import agent_run_service_pb2, agent_run_service_pb2_grpc
print(agent_run_service_pb2.StartAgentRequest(agent="brief").agent)
"""
    result = run_alone(installed, program)
    assert (result.returncode, result.stdout, result.stderr) == (0, "brief\n", "")


@pytest.mark.parametrize(
    ("program", "extra", "status"),
    [
        ("from perdure_client.cli import main; main()", "perdure[cli]", 2),
        ("import perdure_client.demo", "perdure[cli,service,embedded]", 1),
    ],
    ids=["perdure", "the demonstration"],
)
def test_a_command_without_its_extra_says_what_to_install(
    installed: Path, program: str, extra: str, status: int
) -> None:
    result = run_alone(installed, program)
    assert result.returncode == status, result.stderr
    (line,) = result.stderr.splitlines()
    assert f"pip install '{extra}'" in line


def test_its_commands_and_agents_are_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        told = archive.read(name).decode()
    for line in (
        "perdure = perdure_client.cli:main",
        "perdure-server = perdure_service.__main__:main",
        "research = perdure_service.agents.research",
        "notes = perdure_service.agents.notes",
        "assistant = perdure_service.agents.assistant",
        "briefing = perdure_service.agents.briefing",
    ):
        assert line in told.splitlines()
