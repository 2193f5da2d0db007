"""Twenty thousand mutated messages over every RPC of the schema leave a server that serves, and a log that is whole."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import perdure.v1
import pytest
from google.protobuf.message import DecodeError, Message
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_service.domain.events import decode_events

from tests.conftest import SEED
from tests.helpers import marks
from tests.helpers.mutations import Mutator, Rpc, rpcs
from tests.helpers.rpc import Rpc as Stubs
from tests.helpers.rpc import new_id
from tests.helpers.server import ServerProcess, sql
from tests.helpers.waiting import scaled

MESSAGES = 20_000
AT_ONCE = 48
CHANNELS = 4
WAIT_S = 0.1
"""The deadline of a WaitRun, which would wait for as long as it may."""
PAYLOAD_FIELDS = frozenset({"input_json", "payload_json", "comment", "string_value"})
UNMARKED = b"x" * len(marks.PAYLOAD)
ANSWERS = frozenset(
    {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
     "RESOURCE_EXHAUSTED"}
)  # fmt: skip
MODULES = [
    importlib.import_module(f"perdure.v1.{module.name}")
    for module in pkgutil.iter_modules(perdure.v1.__path__)
    if module.name.endswith("_service_pb2")
]
RPCS = rpcs(*MODULES)
CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@pytest.fixture(scope="module")
def seeds(rpc: Stubs) -> dict[str, list[str]]:
    """What makes a request mean something: ids of runs in all states, approvals, agents, cursors and page tokens."""
    done, failed = rpc.start("counter", {"steps": 2}), rpc.start("failing")
    waiting, asking = rpc.start("listener", {"signals": 1_000}), rpc.start("asker")
    for run_id in (done, failed):
        rpc.end_of(run_id)
    cursor = rpc.stream(done)[-1].cursor
    approval = rpc.approval_of(asking).approval_id
    runs = [done, failed, waiting, asking, *(new_id() for _ in range(5))]
    return {
        "run_id": runs,
        "agent": ["counter", "listener", "asker", "nobody"],
        "agent_version": ["", "1"],
        "namespace": ["", "default", "elsewhere"],
        "approval_id": [approval, f"{done}/1"],
        "request_id": ["r-1", "r-2", "r-3"],
        "name": ["more", "counter"],
        "cursor": [cursor],
        "page_token": ["", ""],
        "input_json": ["", "{}", '{"steps": 1}', f'{{"steps": 1, "note": "{marks.PAYLOAD}"}}', marks.PAYLOAD],
        "payload_json": ["", "1", "{}", f'"{marks.PAYLOAD}"', marks.PAYLOAD],
        "comment": [marks.PAYLOAD],
        "string_value": [marks.PAYLOAD],
    }


def test_every_rpc_of_the_schema_is_mutated() -> None:
    assert {path.split("/")[1].removeprefix("perdure.v1.") for path in (one.path for one in RPCS)} >= {
        "AgentRunService",
        "ApprovalService",
        "AgentCatalogService",
    }
    assert len(RPCS) >= 15


@pytest.mark.timeout(300)
async def test_mutated_messages_leave_the_server_serving_with_no_internal_error(
    rpc: Stubs, server: ServerProcess, database_url: str, seeds: dict[str, list[str]]
) -> None:
    began = time.monotonic()
    seen = len(server.log)  # a run that fails, as one of the seeds does, has its traceback there
    answers: Counter[tuple[str, str]] = Counter()
    wrong: list[tuple[str, str, str, bytes]] = []
    messages = requests(seeds)
    channels = [
        grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CHANNELS)
    ]

    async def work(channel: grpc.aio.Channel) -> None:
        for one, data in messages:
            code, text = await answer_to(channel, one, data)
            answers[one.path, code] += 1
            if code not in ANSWERS and (code, one.path) != ("DEADLINE_EXCEEDED", "/perdure.v1.AgentRunService/WaitRun"):
                wrong.append((one.path, code, text, data[:200]))

    try:
        await asyncio.gather(*(work(channels[number % CHANNELS]) for number in range(AT_ONCE)))
    finally:
        for channel in channels:
            await channel.close()

    # A method that nobody serves says so, whatever it is asked, or that it is no message.
    unserved = {path for path, code in answers if code == "UNIMPLEMENTED"}
    understood = {path for path, code in answers if code not in ("UNIMPLEMENTED", "INVALID_ARGUMENT")}
    wrong = [one for one in wrong if one[1] != "UNIMPLEMENTED"]
    assert not wrong, f"PERDURE_TEST_SEED={SEED}: {len(wrong)} wrong answers, e.g. {wrong[:5]}"
    assert sum(answers.values()) == MESSAGES
    # Not all was refused at the door: of each RPC that is served, some requests made sense.
    assert understood == {one.path for one in RPCS} - unserved
    print(f"{MESSAGES} messages in {time.monotonic() - began:.0f} s")

    run_id = rpc.start("counter", {"steps": 1})
    assert rpc.output_of(run_id) == {"total": 0}
    lines = server.log[seen:].splitlines()
    assert not [line[:2_000] for line in lines if "Traceback" in line or "error_id" in line]
    every_log_is_whole(database_url)


def requests(seeds: dict[str, list[str]]) -> Iterator[tuple[Rpc, bytes]]:
    """Yields the requests of all RPCs by turns."""
    rng = random.Random(f"{SEED}:fuzz")
    mutator = Mutator(rng, seeds)
    for number in range(MESSAGES):
        one = RPCS[number % len(RPCS)]
        data = mutator.request(one)
        # A flipped bit may make a comment a namespace, which is no secret: it is logged.
        yield one, data.replace(marks.PAYLOAD.encode(), UNMARKED) if is_misplaced(one, data) else data


def is_misplaced(one: Rpc, data: bytes) -> bool:
    """Returns whether a request has a payload in a field for something else."""
    try:
        message = one.request.FromString(data)
    except DecodeError:
        return False
    return any(marks.PAYLOAD in str(value) for name, value in texts_in(message) if name not in PAYLOAD_FIELDS)


def texts_in(message: Message) -> Iterator[tuple[str, Any]]:
    """Yields the texts of a message, and those of the messages in it, by the names of their fields."""
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield from ((field.name, key) for key in value)
            inner = list(value.values())
        else:
            inner = list(value) if field.is_repeated else [value]
        for each in inner:
            if isinstance(each, Message):
                yield from texts_in(each)
            else:
                yield field.name, each


async def answer_to(channel: grpc.aio.Channel, one: Rpc, data: bytes) -> tuple[str, str]:
    """Returns the code and the text of an answer; of a stream that goes on, the first message is enough.

    Of a stream in both directions it is the answer to its one item.
    """
    try:
        if one.path.endswith("/WaitRuns"):
            waits = channel.stream_stream(one.path)(iter([data]), timeout=scaled(30))
            with suppress(TimeoutError):  # a run of it has not ended
                async with asyncio.timeout(WAIT_S):
                    await waits.read()
            waits.cancel()
            return "OK", ""
        if one.both_ways:
            answer = await channel.stream_stream(one.path)(iter([data]), timeout=scaled(30)).read()
            error = pb.StartAgentsResponse.FromString(answer).error
            return CODES[error.code], error.message
        if one.streaming:
            call = channel.unary_stream(one.path)(data, timeout=scaled(30))
            await call.read()
            call.cancel()
        else:
            await channel.unary_unary(one.path)(data, timeout=WAIT_S if one.path.endswith("/WaitRun") else scaled(30))
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


def every_log_is_whole(database_url: str) -> None:
    """Checks that the events of every run are numbered without a gap, and can be read."""
    with sql(database_url) as connection:
        packs = connection.execute(
            "SELECT workflow_id, first_sequence, event_count, events FROM perdure.run_event "
            "ORDER BY workflow_id, first_sequence"
        ).fetchall()
    last: dict[str, int] = {}
    for workflow_id, first, count, text in packs:
        assert first == last.get(workflow_id, 0) + 1, workflow_id
        events = decode_events(text, first)
        assert len(events) == count, workflow_id
        last[workflow_id] = events[-1].sequence
    assert last
