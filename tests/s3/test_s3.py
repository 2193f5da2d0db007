"""Large values in a real S3-compatible server, also when it is stopped in the middle of a write: nothing is lost.

Run by `make test-s3`, which builds the server. Not part of `make test`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.durable.payloads import Payloads
from perdure_service.errors import StoreUnavailable
from perdure_service.settings import PayloadSettings
from perdure_service.store import diagnosis, payloads
from perdure_service.store.engine import create_engine
from perdure_service.store.s3 import S3Objects

from tests.helpers.payload_agents import noise
from tests.helpers.rpc import Rpc
from tests.helpers.server import ServerProcess, create_effects_table, effects, free_port
from tests.helpers.waiting import eventually, scaled

AGENTS = ("tests.helpers.agents", "tests.helpers.payload_agents")
ACCESS, SECRET = "tester", "tester-secret"
LARGE = 48_000_000
"""Six parts of an upload."""


class ObjectStore:
    """A versitygw over a folder, to stop and to start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        (folder / "payloads").mkdir(parents=True)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a server that uses it."""
        return {
            "PERDURE_PAYLOADS__S3_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "PERDURE_PAYLOADS__S3_BUCKET": "payloads",
            "PERDURE_PAYLOADS__S3_ACCESS_KEY_ID": ACCESS,
            "PERDURE_PAYLOADS__S3_SECRET_ACCESS_KEY": SECRET,
        }

    def settings(self, **changed: str) -> PayloadSettings:
        """The same for the parts of a server."""
        given = {
            "s3_endpoint": f"http://127.0.0.1:{self.port}",
            "s3_bucket": "payloads",
            "s3_access_key_id": ACCESS,
            "s3_secret_access_key": SECRET,
        }
        return PayloadSettings.model_validate(given | changed)

    def objects(self) -> S3Objects:
        """A client of it."""
        return S3Objects(self.settings())

    def start(self) -> None:
        """Starts it and waits until it serves."""
        binary = os.environ["PERDURE_TEST_S3_SERVER"]
        self._process = subprocess.Popen(
            [binary, "--access", ACCESS, "--secret", SECRET, "--port", f"127.0.0.1:{self.port}", "posix", self.folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(self._serves, 20, what="the object store serves")

    def _serves(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def upload_begun(self) -> bool:
        """Whether parts of an upload have arrived that is not complete."""
        return any(path.is_file() and path.stat().st_size > 1_000_000 for path in self.folder.rglob("*"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    """An object store of the test's own."""
    found = ObjectStore(tmp_path / "objects")
    found.start()
    yield found
    found.kill()
    shutil.rmtree(found.folder, ignore_errors=True)


def test_a_run_finishes_although_the_store_is_killed_while_it_writes(database_url: str, store: ObjectStore) -> None:
    create_effects_table(database_url)
    with ServerProcess(database_url, *AGENTS, **store.environment) as server, Rpc(server.address) as rpc:
        run_id = rpc.start("keeper", {"size": LARGE, "seed": 1})
        eventually(store.upload_begun, 60, what="an upload is under way")
        store.kill()
        rpc.until(run_id, "RUNNING")
        store.start()
        rpc.until(run_id, "SUCCEEDED", timeout=120)
        request = pb.ReadArtifactRequest(run_id=run_id, output=True)
        parts = rpc.runs.ReadArtifact(request, timeout=scaled(60))
        assert b"".join(part.data for part in parts).decode() == f'"{noise(LARGE, 1)}"'
        assert effects(database_url, run_id) == ["make 1"]


def test_what_no_row_tells_of_is_swept_and_the_rest_stays(database_url: str, store: ObjectStore) -> None:
    engine = create_engine(database_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    objects = store.objects()
    large = Payloads(engine, 65_536, objects)
    kept, orphan = large.stow_bytes(b"kept" * 50_000), large.stow_bytes(b"orphan" * 50_000)
    with engine.begin() as conn:
        large.write(conn, "run-a", kept)
    assert large.sweep() == 0, "young objects are left alone"
    assert large.sweep(older_than=timedelta(seconds=-60)) == 1
    assert [key for key, _ in objects.all()] == [kept.object_key]
    assert objects.read(orphan.object_key or "", 0, 10) is None
    assert b"".join(large.pieces(kept.pointer, 3)) == (b"kept" * 50_000)[3:]
    with engine.begin() as conn:
        gone = payloads.forget(conn, ["run-a"])
    large.forget_objects(gone)
    assert list(objects.all()) == []
    engine.dispose()


def test_a_caller_is_told_that_the_store_is_away(database_url: str, store: ObjectStore) -> None:
    engine = create_engine(database_url, pool_size=4, statement_timeout=timedelta(seconds=30))
    large = Payloads(engine, 65_536, store.objects())
    store.kill()
    with pytest.raises(StoreUnavailable, match="object store"):
        large.stow("x" * 100_000, patient=False)
    engine.dispose()


def test_a_bucket_that_does_not_exist_is_a_store_that_is_away_and_not_an_object(store: ObjectStore) -> None:
    objects = store.objects()
    objects.put("a", b"kept")
    (store.folder / "payloads").rename(store.folder / "renamed")
    for call in (
        lambda: objects.put("b", b"x"),
        lambda: objects.read("a", 0, 4),
        lambda: objects.delete("a"),
        lambda: next(objects.all()),
    ):
        with pytest.raises(StoreUnavailable):
            call()
    (store.folder / "renamed").rename(store.folder / "payloads")
    assert objects.read("a", 0, 4) == b"kept"


def test_what_is_wrong_with_the_store_is_told_in_words_of_ours(store: ObjectStore) -> None:
    def found(**changed: str) -> str:
        return " ".join(finding.text for finding in diagnosis.object_store(store.settings(**changed)))

    assert found() == ""
    assert list(store.objects().all()) == [], "what was tried out is deleted"
    assert found(s3_bucket="missing").startswith("The object store has no such bucket; ")
    assert found(s3_secret_access_key="wrong").startswith("The object store does not know the key; ")
    store.kill()
    assert found().startswith("The object store does not answer; ")
