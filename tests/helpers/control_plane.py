"""A real kube-apiserver on a real etcd, on loopback: what it takes and refuses is what a cluster would.

There are no controllers and no kubelets: what is applied is checked, admitted and stored, and nothing of it runs.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.helpers.go_programs import program
from tests.helpers.waiting import eventually, free_port, scaled

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests/k8s/control_plane"
VERSION = "v1.34.1"
"""Of the kube-apiserver, as its go.mod and its ldflags say."""


class ControlPlane:
    """One cluster's API, with nothing in it, until `stop`.

    Attributes:
        folder: Where its data, its logs and the kubeconfig lie.
    """

    def __init__(self, folder: Path, kubectl: Path) -> None:
        self.folder = folder
        self._kubectl = kubectl
        self._port = free_port()
        self._token = secrets.token_hex(16)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> ControlPlane:
        """Starts both and waits until the API is ready, all of its own objects made."""
        etcd = self._start_etcd()
        self._start_api(etcd)
        self._kubeconfig().write_text(yaml.safe_dump(self._access()))
        eventually(self._ready, 60, what="the kube-apiserver is ready")
        return self

    def stop(self) -> None:
        """Ends both."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait(scaled(20))

    def run(self, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs kubectl against it, with `given` as its input; the caller looks at the exit status."""
        return subprocess.run(
            [self._kubectl, "--kubeconfig", self._kubeconfig(), *arguments],
            cwd=ROOT,
            input=given,
            capture_output=True,
            text=True,
            timeout=scaled(60),
            check=False,
        )

    def apply(self, *arguments: str, given: str | None = None) -> str:
        """Applies on the server's side; returns what kubectl says, warnings too.

        Raises:
            AssertionError: Something was refused; with what the server said of it.
        """
        done = self.run("apply", "--server-side", *arguments, given=given)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def versions(self, objects: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Returns the versions that it has of some objects, by kind and name."""
        done = self.run("get", "--filename=-", "--output=json", given=yaml.safe_dump_all(objects))
        assert done.returncode == 0, done.stderr
        return {
            f"{each['kind']}/{each['metadata']['name']}": each["metadata"]["resourceVersion"]
            for each in json.loads(done.stdout)["items"]
        }

    def _start_etcd(self) -> str:
        client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self._spawn(
            "etcd",
            f"--data-dir={self.folder / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        )
        return client

    def _start_api(self, etcd: str) -> None:
        key = self.folder / "service-accounts.key"
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
        tokens = self.folder / "tokens.csv"
        tokens.write_text(f"{self._token},admin,admin,system:masters\n")
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--cert-dir={self.folder / 'certificates'}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            # It waits for the accounts and the addresses that controllers would make.
            "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=10.96.0.0/16",
        )

    def _spawn(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [str(program(PROGRAMS / name)), *arguments]
            self._processes.append(subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log))

    def _access(self) -> dict[str, Any]:
        certificate = str(self.folder / "certificates" / "apiserver.crt")
        cluster = {"server": f"https://127.0.0.1:{self._port}", "certificate-authority": certificate}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": self._token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }

    def _kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    def _ready(self) -> bool:
        for process in self._processes:
            if process.poll() is not None:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
                raise RuntimeError(f"a part of the control plane has ended with {process.returncode}:\n{logs}")
        return self.run("get", "--raw", "/readyz").returncode == 0
