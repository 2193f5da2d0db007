"""What is too large for a row is stored apart, once, and comes back whole; it goes with the last run that uses it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from perdure.v1 import agent_run_pb2
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_client import ArtifactNotFound, Client
from perdure_service.domain.payloads import MARK, Pointer
from perdure_service.store import payloads
from perdure_service.store.engine import create_engine
from perdure_service.store.sqlstates import retrying

from tests.helpers.payload_agents import noise
from tests.helpers.rpc import Rpc, new_id, only, refused, state_of
from tests.helpers.server import ServerProcess, create_effects_table, effects, sql
from tests.helpers.waiting import scaled

LARGE = 1_500_000
"""More than two pieces, and more than a row should have."""
HUGE = 5_000_000
"""More than a message carries."""

AGENTS = ("tests.helpers.agents", "tests.helpers.payload_agents")


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[ServerProcess]:
    """A server with the agents of this module."""
    create_effects_table(database_url)
    with ServerProcess(database_url, *AGENTS, PERDURE_MAX_INPUT_BYTES="4000000") as process:
        yield process


def read(rpc: Rpc, run_id: str, offset: int = 0, **which: object) -> tuple[pb.ArtifactInfo, bytes]:
    """Returns what an artifact is, and its bytes."""
    call = rpc.runs.ReadArtifact(pb.ReadArtifactRequest(run_id=run_id, offset=offset, **which), timeout=scaled(30))
    parts = list(call)
    assert all(len(part.data) <= 256 * 1024 for part in parts)
    return parts[0].artifact, b"".join(part.data for part in parts)


def rows(url: str, statement: str, **values: object) -> list[Any]:
    """Returns what a statement finds."""
    with sql(url) as conn:
        return [row[0] for row in conn.execute(statement, values)]


def payloads_of(url: str, run_id: str) -> set[str]:
    """Returns the hashes that a run uses."""
    return set(
        rows(
            url,
            "SELECT sha256 FROM perdure.payload_use JOIN perdure.run USING (workflow_id) WHERE run_id = %(id)s",
            id=run_id,
        )
    )


def test_a_large_result_is_stored_once_and_its_rows_point_to_it(rpc: Rpc, server: ServerProcess) -> None:
    run_id, other = rpc.start("keeper", {"size": LARGE}), rpc.start("keeper", {"size": LARGE})
    assert rpc.output_of(run_id) == rpc.output_of(other) == noise(LARGE)
    stored = rows(
        server.database_url,
        "SELECT o.output FROM perdure.run AS r JOIN dbos.operation_outputs AS o ON o.workflow_uuid = r.workflow_id "
        "WHERE r.run_id = %(id)s UNION ALL "
        "SELECT o.output FROM perdure.run AS r JOIN dbos.workflow_output AS o ON o.workflow_uuid = r.workflow_id "
        "WHERE r.run_id = %(id)s UNION ALL SELECT output FROM perdure.run WHERE run_id = %(id)s",
        id=run_id,
    )
    assert len(stored) == 3
    assert all(text.startswith(MARK) for text in stored)
    used = payloads_of(server.database_url, run_id)
    assert used
    assert used == payloads_of(server.database_url, other)
    (step,) = only(rpc.events(run_id), "step_succeeded")
    assert step.step_succeeded.output_bytes > LARGE


def test_a_killed_server_replays_a_large_result_without_the_step(own_server: ServerProcess) -> None:
    own_server.start(PERDURE_AGENTS=",".join(AGENTS))
    with Rpc(own_server.address) as rpc:
        run_id = rpc.start("keeper", {"size": LARGE, "seed": 3, "wait": True})
        rpc.until(run_id, "AWAITING_INPUT")
    own_server.kill()
    own_server.start(PERDURE_AGENTS=",".join(AGENTS))
    with Rpc(own_server.address) as rpc:
        rpc.signal(run_id)
        assert rpc.output_of(run_id) == noise(LARGE, 3)
    assert effects(own_server.database_url, run_id) == ["make 3"]


def test_a_parent_takes_the_large_result_of_its_child(rpc: Rpc) -> None:
    assert rpc.output_of(rpc.start("keeper-parent", {"size": LARGE})) == LARGE


def test_a_large_input_arrives_and_is_shown(rpc: Rpc, server: ServerProcess) -> None:
    text = noise(LARGE, 4)
    run_id = rpc.start("measurer", {"text": text})
    assert rpc.output_of(run_id) == LARGE
    (stored,) = rows(
        server.database_url,
        "SELECT inputs FROM dbos.workflow_input JOIN perdure.run ON workflow_id = workflow_uuid WHERE run_id = %(id)s",
        id=run_id,
    )
    assert stored.startswith(MARK)
    run = rpc.get(run_id)
    assert json.loads(run.input_json) == {"text": text}
    assert run.input_bytes == len(run.input_json)
    _, data = read(rpc, run_id, input=True)
    assert data.decode() == run.input_json


def test_an_output_that_fits_no_message_is_left_out_and_can_be_read(rpc: Rpc) -> None:
    run_id = rpc.start("keeper", {"size": HUGE, "seed": 5})
    run = rpc.end_of(run_id)
    expected = json.dumps(noise(HUGE, 5)).encode()
    assert (state_of(run), run.output_json, run.output_bytes) == ("SUCCEEDED", "", len(expected))
    known, data = read(rpc, run_id, output=True)
    assert data == expected
    assert known == pb.ArtifactInfo(
        media_type="application/json", size_bytes=len(expected), sha256=hashlib.sha256(expected).hexdigest()
    )
    for offset in (1, 512 * 1024, 512 * 1024 + 1, len(expected) - 1, len(expected)):
        assert read(rpc, run_id, offset, output=True)[1] == expected[offset:]
    with refused("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE"):
        read(rpc, run_id, len(expected) + 1, output=True)


def test_text_that_looks_like_a_pointer_is_text(rpc: Rpc) -> None:
    text = Pointer("0" * 64, 7).text
    run_id = rpc.start("measurer", {"text": text})
    assert json.loads(rpc.get(run_id).input_json) == {"text": text}


def test_artifacts_are_told_and_read_by_name(rpc: Rpc) -> None:
    run_id = rpc.start("writer", {"size": LARGE})
    assert rpc.output_of(run_id) == "written"
    told = only(rpc.events(run_id), "artifact")
    assert [event.artifact.name for event in told] == ["inside", "twice", "twice"]
    known, data = read(rpc, run_id, name="inside")
    assert (data, known.media_type) == (noise(LARGE, 7).encode(), "application/x-noise")
    assert known.sha256 == told[0].artifact.sha256 == hashlib.sha256(data).hexdigest()
    known, data = read(rpc, run_id, name="twice")
    assert (data.decode(), known.media_type) == ("second, and the last ☂", "text/plain; charset=utf-8")
    with refused("NOT_FOUND", "ARTIFACT_NOT_FOUND"):
        read(rpc, run_id, name="none")
    with refused("NOT_FOUND", "RUN_NOT_FOUND"):
        read(rpc, new_id(), name="inside")
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "artifact"):
        read(rpc, run_id)
    with refused("INVALID_ARGUMENT", "INVALID_FIELD", "offset"):
        read(rpc, run_id, -1, name="inside")


def test_the_client_and_its_command_read_what_fits_no_message(rpc: Rpc, server: ServerProcess) -> None:
    with Client(server.address) as client:
        run_id = client.start("keeper", {"size": HUGE, "seed": 6}).run_id
        assert client.wait(run_id).output == client.get(run_id).output == noise(HUGE, 6)
        writer = client.start("writer", {"size": LARGE})
        client.wait(writer)
        assert client.read_artifact(writer, "inside").decode() == noise(LARGE, 7)
        assert b"".join(client.artifact(writer, "inside")).decode() == noise(LARGE, 7)
        with pytest.raises(ArtifactNotFound):
            client.read_artifact(writer, "none")
    command = [Path(sys.executable).with_name("perdure"), "--address", server.address]
    shown = subprocess.run([*command, "read", writer.run_id, "inside"], capture_output=True, check=True)
    assert shown.stdout.decode() == noise(LARGE, 7)
    listed = subprocess.run([*command, "artifacts", writer.run_id, "-o", "json"], capture_output=True, check=True)
    assert [json.loads(line)["name"] for line in listed.stdout.splitlines()] == ["inside", "twice"]


def test_a_payload_goes_with_the_last_run_that_uses_it(rpc: Rpc, server: ServerProcess) -> None:
    url = server.database_url
    run_ids = [rpc.start("keeper", {"size": LARGE, "seed": 9}) for _ in range(2)]
    for run_id in run_ids:
        rpc.end_of(run_id)
    forked = rpc.runs.ForkRun(pb.ForkRunRequest(run_id=run_ids[0], from_step_id=2, request_id=new_id())).run.run_id
    assert rpc.output_of(forked) == noise(LARGE, 9)
    hashes = payloads_of(url, run_ids[0])
    kept = "SELECT sha256 FROM perdure.payload WHERE sha256 = ANY(%(hashes)s)"
    for run_id in [*run_ids, forked]:
        assert set(rows(url, kept, hashes=list(hashes))) == hashes
        deleted = rpc.runs.DeleteRuns(pb.DeleteRunsRequest(run_ids=[run_id]))
        assert deleted.deleted_count == 1
    assert rows(url, kept, hashes=list(hashes)) == []


def test_a_payload_that_is_deleted_and_used_at_once_is_there_afterwards(dialect_url: str) -> None:
    engine = create_engine(dialect_url, pool_size=5, statement_timeout=timedelta(seconds=30))
    data = noise(600_000, 11).encode()
    pointer = Pointer.of(data)

    def use(name: str) -> None:
        retrying(engine, "use", lambda conn: payloads.use(conn, name, pointer, data))

    def forget(name: str) -> None:
        retrying(engine, "forget", lambda conn: payloads.forget(conn, [name]))

    use("run-0")
    with ThreadPoolExecutor(3) as pool:
        for number in range(25):
            racing = [
                pool.submit(use, f"run-{number + 1}"),
                pool.submit(forget, f"run-{number}"),
                pool.submit(use, f"run-{number + 1}"),
            ]
            for one in racing:
                one.result()
            with engine.begin() as conn:
                found = [payloads.read_piece(conn, pointer.sha256, piece) for piece in (0, 1, 2)]
            assert b"".join(piece or b"" for piece in found) == data
    forget("run-25")
    with engine.begin() as conn:
        assert payloads.place(conn, pointer.sha256) is None
    engine.dispose()


def test_a_view_without_input_and_output_says_nothing_of_them(rpc: Rpc) -> None:
    run_id = rpc.start("keeper", {"size": LARGE})
    rpc.end_of(run_id)
    request = pb.GetRunRequest(run_id=run_id, view=agent_run_pb2.AGENT_RUN_VIEW_BASIC)
    run = rpc.runs.GetRun(request).run
    assert (run.output_json, run.output_bytes, run.input_json, run.input_bytes) == ("", 0, "", 0)
