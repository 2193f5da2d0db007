"""Makes an authority and the certificates that it signs, as Secrets of the pod's own namespace; what is there stays.

**If it dies on any line**, the next one continues: each Secret is created whole, and the authority before all others.
**If two do it at once**, each Secret has one maker, and the other signs by what is there. Nothing is renewed: a
certificate lives as long as its authority.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts the token of a service account, and the authority of its own API server."""
LIFETIME = timedelta(days=825)
"""What many clients take at most."""
CLOCKS = timedelta(minutes=5)
"""How far the clocks of nodes may differ."""
AUTHORITY = "perdure-ca"


@dataclass(frozen=True)
class Leaf:
    """A certificate that is wanted.

    Attributes:
        secret: The Secret that it is put in.
        name: Its common name; to CockroachDB, the user.
        hosts: What it is valid for; `{namespace}` is the pod's own. Empty for a client.
    """

    secret: str
    name: str
    hosts: tuple[str, ...] = ()


LEAVES = (
    Leaf(
        "crdb-node-tls",
        "node",
        ("localhost", "127.0.0.1", "crdb", "crdb-sql", "*.crdb.{namespace}.svc.cluster.local"),
    ),
    Leaf("crdb-root-tls", "root"),
    Leaf("perdure-migrate-tls", "perdure_migrate"),
    Leaf("perdure-db-tls", "perdure"),
    Leaf(
        "perdure-tls",
        "perdure",
        (
            "localhost",
            "127.0.0.1",
            "perdure",
            "perdure.{namespace}.svc",
            "perdure.{namespace}.svc.cluster.local",
            "perdure-pods.{namespace}.svc.cluster.local",
        ),
    ),
)


@dataclass(frozen=True)
class Signed:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key in PEM, PKCS#8, not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


class Secrets:
    """The Secrets of a namespace, by Kubernetes' API."""

    def __init__(self, url: str, namespace: str, token: str, tls: ssl.SSLContext | None) -> None:
        """Connects to nothing yet.

        Args:
            url: The API server's.
            namespace: The namespace.
            token: Who asks.
            tls: What the API server's certificate is checked by; None where the URL is plain http.
        """
        self._url = f"{url}/api/v1/namespaces/{namespace}/secrets"
        self._token = token
        self._tls = tls

    def read(self, name: str) -> dict[str, bytes] | None:
        """Returns what is in a Secret; None if there is no such one."""
        try:
            found = self._call("GET", f"{self._url}/{name}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return {key: base64.b64decode(value) for key, value in found["data"].items()}

    def create(self, name: str, data: dict[str, bytes]) -> bool:
        """Creates a Secret of certificates; returns whether it was not there."""
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": {"name": name},
            "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
        }
        try:
            self._call("POST", self._url, json.dumps(body).encode())
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def _call(self, method: str, url: str, body: bytes | None = None) -> dict[str, dict[str, str]]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers, method=method)  # noqa: S310 - the API server's own URL
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:  # noqa: S310
            return dict(json.load(answer))


def make_all(secrets: Secrets, namespace: str) -> None:
    """Makes what is missing, and prints a line for each Secret."""
    authority = _authority(secrets)
    for leaf in LEAVES:
        if secrets.read(leaf.secret) is not None:
            print(f"{leaf.secret}: is there")
            continue
        signed = sign(leaf, namespace, authority)
        made = secrets.create(
            leaf.secret,
            {"tls.crt": signed.certificate_pem, "tls.key": signed.key_pem, "ca.crt": authority.certificate_pem},
        )
        print(f"{leaf.secret}: {'made' if made else 'is there'}")


def _authority(secrets: Secrets) -> Signed:
    """Returns the authority, which may be another process's."""
    found = secrets.read(AUTHORITY)
    if found is None:
        made = _new_authority()
        # Read again also where it was made here: what is signed must be by what is stored.
        secrets.create(AUTHORITY, {"tls.crt": made.certificate_pem, "tls.key": made.key_pem})
        found = secrets.read(AUTHORITY)
    if found is None:
        raise RuntimeError(f"the Secret {AUTHORITY} was created and is not there; run this again")
    key = serialization.load_pem_private_key(found["tls.key"], password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RuntimeError(f"the Secret {AUTHORITY} has a key of another kind; it must be ECDSA")
    return Signed(x509.load_pem_x509_certificate(found["tls.crt"]), key)


def _new_authority() -> Signed:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "perdure")])
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return Signed(certificate, key)


def sign(leaf: Leaf, namespace: str, authority: Signed) -> Signed:
    """Returns a certificate that the authority signed, with a key of its own.

    Args:
        leaf: What it says.
        namespace: Put into its hosts.
        authority: Who signs.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, leaf.name)])
    uses = [*([ExtendedKeyUsageOID.SERVER_AUTH] if leaf.hosts else []), ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        _builder(name, authority.certificate.subject, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    if leaf.hosts:
        hosts = [_host(host.format(namespace=namespace)) for host in leaf.hosts]
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return Signed(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def main() -> None:
    """Makes the certificates in the cluster that this pod is in."""
    url = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    namespace = os.environ["POD_NAMESPACE"]
    tls = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    try:
        make_all(Secrets(url, namespace, (ACCOUNT / "token").read_text(), tls), namespace)
    except urllib.error.HTTPError as error:
        sys.exit(f"the API server refused: {error.code} {error.reason}")
    except urllib.error.URLError as error:
        sys.exit(f"the API server cannot be reached: {error.reason}")


if __name__ == "__main__":
    main()
