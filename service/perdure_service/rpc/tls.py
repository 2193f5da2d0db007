"""Decides which certificate the server shows and whose clients it lets in, also after the files were replaced."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from perdure_service.errors import ConfigurationError
from perdure_service.rpc.watched_files import WatchedFiles
from perdure_service.settings import TlsSettings

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Certificates:
    """What a server needs for TLS, read and checked.

    Attributes:
        chain: PEM of its certificate and those above it.
        key: PEM of the private key.
        client_authorities: PEM of the authorities of clients; None asks clients for nothing.
        expires_at: When its certificate is no longer good.
    """

    chain: bytes
    key: bytes
    client_authorities: bytes | None
    expires_at: datetime

    @property
    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """The same for gRPC."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_authorities)


def load_certificates(tls: TlsSettings) -> Certificates:
    """Reads and checks the files of a server that speaks TLS.

    Raises:
        ConfigurationError: A file cannot be read or used, the key is of another certificate, or that is not valid now.
    """
    assert tls.certificate_file is not None
    assert tls.key_file is not None
    chain = _read(tls.certificate_file, "PERDURE_TLS__CERTIFICATE_FILE")
    key = _read(tls.key_file, "PERDURE_TLS__KEY_FILE")
    certificate = _certificates(chain, tls.certificate_file, "PERDURE_TLS__CERTIFICATE_FILE")[0]
    _check_key(certificate, key, tls.key_file)
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        expired = now >= certificate.not_valid_after_utc
        when = certificate.not_valid_after_utc if expired else certificate.not_valid_before_utc
        raise ConfigurationError(
            f"PERDURE_TLS__CERTIFICATE_FILE: the certificate of {tls.certificate_file} "
            f"{'expired' if expired else 'is not valid before'} {when:%Y-%m-%d %H:%M} UTC; renew it"
        )
    authorities = None
    if tls.client_ca_file is not None:
        authorities = _read(tls.client_ca_file, "PERDURE_TLS__CLIENT_CA_FILE")
        _certificates(authorities, tls.client_ca_file, "PERDURE_TLS__CLIENT_CA_FILE")
    return Certificates(chain, key, authorities, certificate.not_valid_after_utc)


def server_credentials(tls: TlsSettings) -> grpc.ServerCredentials:
    """Returns the credentials of one port, which follow the files; make others for another port.

    Raises:
        ConfigurationError: As `load_certificates`.
    """
    paths = [path for path in (tls.certificate_file, tls.key_file, tls.client_ca_file) if path is not None]
    files = WatchedFiles(*paths)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before every handshake, in a thread of its own; None means what there is."""
        if not files.changed():
            return None
        try:
            certificates = load_certificates(tls)
        except ConfigurationError as error:
            # Perhaps half of a replacement; the other half changes the files again.
            _log.warning("tls.not_reloaded", error=error.message)
            return None
        _log.info("tls.reloaded", expires_at=certificates.expires_at.isoformat())
        return certificates.configuration

    return grpc.dynamic_ssl_server_credentials(
        load_certificates(tls).configuration,
        fetch,  # type: ignore[arg-type]  # gRPC takes None for "as before", its stubs do not
        require_client_authentication=tls.client_ca_file is not None,
    )


def _read(path: Path, variable: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{variable}: {path} cannot be read ({error.strerror})") from error


def _certificates(pem: bytes, path: Path, variable: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigurationError(f"{variable}: {path} holds no certificate in PEM") from error


def _check_key(certificate: x509.Certificate, pem: bytes, path: Path) -> None:
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise ConfigurationError(f"PERDURE_TLS__KEY_FILE: {path} is encrypted; decrypt it") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(f"PERDURE_TLS__KEY_FILE: {path} holds no private key in PEM") from error
    if key.public_key() != certificate.public_key():
        raise ConfigurationError(
            f"PERDURE_TLS__KEY_FILE: {path} is not the key of the certificate in PERDURE_TLS__CERTIFICATE_FILE"
        )
