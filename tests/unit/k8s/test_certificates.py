"""The certificates of the Job: good for both ends of a connection, whoever made them, and however often."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.certificates_job import make_certificates

program = make_certificates()

Stored = dict[str, dict[str, Any]]


@contextmanager
def api_server(stored: Stored, dies_after: int | None = None) -> Iterator[str]:
    """Serves the two requests of Kubernetes' API that the program makes; yields the URL.

    Args:
        stored: The Secrets.
        dies_after: After so many were created it fails.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(stored.get(self.path.rpartition("/")[2]), 404)

        def do_POST(self) -> None:
            secret = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = secret["metadata"]["name"]
            with lock:
                if dies_after is not None and len(stored) >= dies_after:
                    self._answer(None, 500)
                elif name in stored:
                    self._answer(None, 409)
                else:
                    stored[name] = secret
                    self._answer(secret, 201)

        def _answer(self, secret: dict[str, Any] | None, otherwise: int) -> None:
            assert self.headers["Authorization"] == "Bearer token-of-the-pod"
            assert self.path.startswith("/api/v1/namespaces/perdure/secrets")
            self.send_response(otherwise if secret is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(secret or {}).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def make(url: str) -> None:
    """Runs the program."""
    program.make_all(program.Secrets(url, "perdure", "token-of-the-pod", None), "perdure")


def context(purpose: int, stored: Stored, secret: str, folder: Path) -> ssl.SSLContext:
    """Returns one end of TLS, which shows a certificate and asks the other for one."""
    import base64

    files = {}
    for key, value in stored[secret]["data"].items():
        files[key] = folder / f"{secret}-{key}"
        files[key].write_bytes(base64.b64decode(value))
    made = ssl.SSLContext(purpose)
    made.load_cert_chain(files["tls.crt"], files["tls.key"])
    made.load_verify_locations(files["ca.crt"])
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def subject_seen(stored: Stored, server: str, client: str, host: str, folder: Path) -> str:
    """Connects a client to a server by name; returns whom the server sees.

    Raises:
        ssl.SSLError: One of the two refuses the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = context(ssl.PROTOCOL_TLS_CLIENT, stored, client, folder).wrap_bio(to_client, to_server, server_hostname=host)
    other = context(ssl.PROTOCOL_TLS_SERVER, stored, server, folder).wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (one, other):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    certificate = other.getpeercert()
    assert certificate
    return dict(pair for part in certificate["subject"] for pair in part)["commonName"]


def test_servers_and_clients_know_each_other_by_them(tmp_path: Path) -> None:
    stored: Stored = {}
    with api_server(stored) as url:
        make(url)
    assert set(stored) == {"perdure-ca", *(leaf.secret for leaf in program.LEAVES)}
    assert {secret["type"] for secret in stored.values()} == {"kubernetes.io/tls"}
    node = "crdb-0.crdb.perdure.svc.cluster.local"
    assert subject_seen(stored, "crdb-node-tls", "perdure-db-tls", "crdb-sql", tmp_path) == "perdure"
    assert subject_seen(stored, "crdb-node-tls", "crdb-root-tls", "crdb-sql", tmp_path) == "root"
    assert subject_seen(stored, "crdb-node-tls", "perdure-migrate-tls", "crdb-sql", tmp_path) == "perdure_migrate"
    assert subject_seen(stored, "crdb-node-tls", "crdb-node-tls", node, tmp_path) == "node"
    pods = "perdure-pods.perdure.svc.cluster.local"
    assert subject_seen(stored, "perdure-tls", "perdure-tls", pods, tmp_path) == "perdure"
    with pytest.raises(ssl.SSLError, match=r"not valid for|mismatch"):
        subject_seen(stored, "crdb-node-tls", "perdure-db-tls", "crdb-0.crdb.elsewhere.svc.cluster.local", tmp_path)
    with pytest.raises(ssl.SSLError):
        subject_seen(stored, "perdure-db-tls", "perdure-db-tls", "crdb-sql", tmp_path)


def test_a_second_one_changes_nothing() -> None:
    stored: Stored = {}
    with api_server(stored) as url:
        make(url)
        before = json.dumps(stored)
        make(url)
    assert json.dumps(stored) == before


@pytest.mark.parametrize("created", range(6))
def test_one_that_died_is_followed_by_one_that_continues(created: int, tmp_path: Path) -> None:
    stored: Stored = {}
    with api_server(stored, dies_after=created) as url, pytest.raises(program.urllib.error.HTTPError):
        make(url)
    assert len(stored) == created
    with api_server(stored) as url:
        make(url)
    assert subject_seen(stored, "crdb-node-tls", "perdure-db-tls", "crdb-sql", tmp_path) == "perdure"


def test_two_at_once_make_one_set(tmp_path: Path) -> None:
    stored: Stored = {}
    with api_server(stored) as url, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(make, url) for _ in range(4)]:
            done.result()
    for client in ("perdure-db-tls", "crdb-root-tls", "perdure-migrate-tls"):
        assert subject_seen(stored, "crdb-node-tls", client, "crdb-sql", tmp_path)
    assert subject_seen(stored, "perdure-tls", "perdure-tls", "perdure", tmp_path)
