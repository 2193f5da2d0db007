"""Certificates, tokens and an identity provider for tests, made when they are needed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

ISSUER = "https://issuer.test"
AUDIENCE = "perdure-test"
DAY_S = 86_400
"""Longer than any run of the tests: tokens are made when they are collected."""


# ---- certificates ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certified:
    """A certificate and its private key."""

    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def serial(self) -> int:
        return self.certificate.serial_number

    def write(self, folder: Path, name: str = "server") -> tuple[Path, Path]:
        """Puts certificate and key into a folder as Kubernetes would: by replacing, each at once."""
        paths = folder / f"{name}.pem", folder / f"{name}-key.pem"
        for path, content in zip(paths, (self.pem, self.key_pem), strict=True):
            new = path.with_suffix(".new")
            new.write_bytes(content)
            new.chmod(0o600)
            new.replace(path)
        return paths


def certified(
    name: str, authority: Certified | None = None, *, begins_in_days: float = -1, ends_in_days: float = 30
) -> Certified:
    """Makes a certificate for a name; without an authority it is one."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject if authority else subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begins_in_days))
        .not_valid_after(now + timedelta(days=ends_in_days))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(authority.private if authority else private, hashes.SHA256())
    )
    return Certified(certificate, private)


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SigningKey:
    """A private key of an identity provider, by its name."""

    key_id: str
    private: Any
    algorithm: str = "ES256"

    @classmethod
    def make(cls, key_id: str, algorithm: str = "ES256") -> SigningKey:
        if algorithm.startswith("ES"):
            return cls(key_id, ec.generate_private_key(ec.SECP256R1()), algorithm)
        return cls(key_id, rsa.generate_private_key(public_exponent=65537, key_size=2048), algorithm)

    @property
    def public_pem(self) -> bytes:
        return self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def jwk(self) -> dict[str, Any]:
        algorithm = jwt.get_algorithm_by_name(self.algorithm)
        public = algorithm.to_jwk(self.private.public_key(), as_dict=True)
        return {**public, "kid": self.key_id, "alg": self.algorithm, "use": "sig"}

    def token(self, *, headers: dict[str, Any] | None = None, without: tuple[str, ...] = (), **claims: Any) -> str:
        """Returns a token; everything about it is good unless told otherwise."""
        values = good_claims() | claims
        values = {name: value for name, value in values.items() if name not in without}
        header = {name: value for name, value in ({"kid": self.key_id} | (headers or {})).items() if value is not None}
        return jwt.encode(values, self.private, algorithm=self.algorithm, headers=header)


def good_claims() -> dict[str, Any]:
    now = int(time.time())
    return {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "ann",
        "iat": now,
        "exp": now + 3600,
        "perdure_namespaces": ["default"],
        "perdure_roles": ["admin"],
    }


def raw_token(header: Any, claims: Any, signature: bytes = b"") -> str:
    """Returns what looks like a token, signed by nobody."""

    def part(value: Any) -> str:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    return ".".join((part(header), part(claims), part(signature)))


def with_hmac(header: dict[str, Any], claims: Any, secret: bytes) -> str:
    """Returns a token whose signature is an HMAC with a secret, such as a public key: PyJWT refuses to make it."""
    unsigned = raw_token(header, claims).rpartition(".")[0]
    signature = hmac.new(secret, unsigned.encode(), hashlib.sha256).digest()
    return raw_token(header, claims, signature)


def bad_tokens(key: SigningKey) -> dict[str, tuple[str, str]]:
    """Returns every kind of bad token: what is sent as `authorization`, and the reason of the refusal."""
    now = int(time.time())
    stranger = SigningKey.make(key.key_id, key.algorithm)
    good = key.token()
    head, body, signature = good.split(".")
    header = {"kid": key.key_id, "typ": "JWT"}
    bad = {
        "forged": stranger.token(),
        "claims exchanged": f"{head}.{raw_token({}, good_claims() | {'sub': 'root'}).split('.')[1]}.{signature}",
        "signature cut off": f"{head}.{body}.",
        "alg none": raw_token({**header, "alg": "none"}, good_claims()),
        "alg None": raw_token({**header, "alg": "None"}, good_claims()),
        "no alg": raw_token(header, good_claims()),
        "HS256 with the public key": with_hmac({**header, "alg": "HS256"}, good_claims(), key.public_pem),
        "another algorithm of the family": raw_token({**header, "alg": "RS512"}, good_claims(), b"x" * 256),
        "wrong issuer": key.token(iss="https://other.test"),
        "wrong audience": key.token(aud="somebody-else"),
        "without audience": key.token(without=("aud",)),
        "without issuer": key.token(without=("iss",)),
        "without expiry": key.token(without=("exp",)),
        "without subject": key.token(without=("sub",)),
        "empty subject": key.token(sub=""),
        "subject with a line break": key.token(sub="ann\nadmin"),
        "long subject": key.token(sub="a" * 257),
        "not yet valid": key.token(nbf=now + DAY_S),
        "from the future": key.token(iat=now + DAY_S),
        "expiry that is no number": key.token(exp="tomorrow"),
        "infinite expiry": raw_token({**header, "alg": key.algorithm}, b'{"exp": 1e999}', b"x"),
        "unknown key": SigningKey("nobodys", key.private, key.algorithm).token(),
        "kid that is no text": raw_token({"alg": key.algorithm, "kid": 1}, good_claims(), b"x"),
        "namespaces that are no list": key.token(perdure_namespaces="*"),
        "roles that are no texts": key.token(perdure_roles=[1]),
        "not a token": "x",
        "two dots": "..",
        "deeply nested": raw_token(b"[" * 2000, {}, b"x"),
    }
    refusals = {name: (f"Bearer {token}", "TOKEN_INVALID") for name, token in bad.items()}
    return refusals | {
        "expired": (f"Bearer {key.token(exp=now - 600)}", "TOKEN_EXPIRED"),
        "no token": ("", "TOKEN_MISSING"),
        "another scheme": ("Basic YTpi", "TOKEN_MISSING"),
        "only the scheme": ("Bearer ", "TOKEN_MISSING"),
        "no scheme": (good, "TOKEN_MISSING"),
    }


# ---- an identity provider --------------------------------------------------------------------------------------------


@dataclass
class IdentityProvider:
    """Publishes keys on loopback; a test changes them, or what is answered, while it runs."""

    keys: list[SigningKey] = field(default_factory=list)
    reads: int = 0
    answer: tuple[int, bytes] | None = None

    def __enter__(self) -> IdentityProvider:
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.reads += 1
                status, body = provider.answer or (
                    200,
                    json.dumps({"keys": [key.jwk for key in provider.keys]}).encode(),
                )
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", body.decode())
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/keys"

    def settings(self) -> dict[str, str]:
        """The settings of a server that trusts it."""
        return {"jwks_url": self.url, "issuer": ISSUER, "audience": AUDIENCE}
