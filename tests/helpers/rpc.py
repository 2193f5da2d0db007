"""Talks to a server with the generated stubs alone, and reads its errors as any gRPC client would."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from perdure.v1 import agent_catalog_service_pb2_grpc, agent_run_service_pb2_grpc, approval_service_pb2_grpc
from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_pb2 as approval_state_pb
from perdure.v1 import approval_service_pb2 as approval_pb
from perdure.v1 import run_event_pb2 as event_pb

from tests.helpers import marks
from tests.helpers.waiting import eventually, scaled

TIMEOUT_S = 20.0
TERMINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED"})


def new_id(prefix: str = "run") -> str:
    """Returns a run id that no other test has."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def duration(seconds: float) -> Duration:
    """Returns seconds as a message."""
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def in_seconds(seconds: float) -> Timestamp:
    """Returns the time some seconds from now as a message."""
    message = Timestamp()
    message.FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds))
    return message


def state_of(run: run_pb.AgentRun) -> str:
    """Returns a run's state without its prefix."""
    return run_pb.AgentRunState.Name(run.state).removeprefix("AGENT_RUN_STATE_")


def state_name(number: int) -> str:
    """Returns the name of a run's state without its prefix."""
    return run_pb.AgentRunState.Name(number).removeprefix("AGENT_RUN_STATE_")


def approval_state(approval: Any) -> str:
    """Returns an approval's state without its prefix."""
    return approval_state_pb.ApprovalState.Name(approval.state).removeprefix("APPROVAL_STATE_")


def kind_of(event: event_pb.RunEvent) -> str:
    """Returns the kind of an event."""
    return str(event.WhichOneof("kind"))


def kinds_of(events: Iterable[event_pb.RunEvent]) -> list[str]:
    """Returns the kinds of events."""
    return [kind_of(event) for event in events]


def only(events: Iterable[event_pb.RunEvent], kind: str) -> list[event_pb.RunEvent]:
    """Returns the events of a kind."""
    return [event for event in events if kind_of(event) == kind]


def states_in(events: Iterable[event_pb.RunEvent]) -> list[str]:
    """Returns the states that a run went through."""
    return [state_name(event.state_changed.to_state) for event in only(events, "state_changed")]


def events_of(responses: Iterable[pb.WatchRunResponse]) -> list[event_pb.RunEvent]:
    """Returns all events of a stream."""
    return [event for response in responses for event in response.events]


def sequences(events: Iterable[event_pb.RunEvent]) -> list[int]:
    """Returns the numbers of events."""
    return [event.sequence for event in events]


def valid_text(events: Iterable[event_pb.RunEvent], stream: str = "text") -> str:
    """Returns the text of a stream as a client shows it: an `attempt_reset` voids its step's earlier text."""
    texts: dict[int, str] = {}
    for event in events:
        if kind_of(event) == "output_delta" and event.output_delta.stream == stream:
            texts[event.step_id] = texts.get(event.step_id, "") + event.output_delta.text
        elif kind_of(event) == "attempt_reset":
            texts.pop(event.step_id, None)
    return "".join(texts.values())


@dataclass(frozen=True)
class Refusal:
    """An error as it came over the wire."""

    code: grpc.StatusCode
    text: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    retry_delay_s: float | None = None

    @classmethod
    def of(cls, error: grpc.RpcError) -> Refusal:
        """Reads an error; one without `google.rpc.Status` has no reason."""
        facts: dict[str, Any] = {}
        for key, value in error.trailing_metadata() or ():
            if key != "grpc-status-details-bin":
                continue
            status = status_pb2.Status.FromString(value)
            assert status.code == error.code().value[0]
            for packed in status.details:
                info, bad, retry = (
                    error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo(),
                )  # fmt: skip
                if packed.Unpack(info):
                    assert info.domain == "perdure.dev"
                    facts.update(reason=info.reason, metadata=dict(info.metadata))
                elif packed.Unpack(bad):
                    facts.update(fields=tuple(one.field for one in bad.field_violations))
                elif packed.Unpack(retry):
                    facts.update(retry_delay_s=retry.retry_delay.ToTimedelta().total_seconds())
        return cls(error.code(), error.details() or "", **facts)


def refusal_of(call: Callable[[], Any]) -> Refusal | None:
    """Makes a call and returns how it was refused; None when it was not."""
    try:
        call()
    except grpc.RpcError as error:
        return Refusal.of(error)
    return None


class _Refused:
    refusal: Refusal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.refusal, name)


@contextmanager
def refused(code: str, reason: str, field_path: str | None = None) -> Iterator[_Refused]:
    """Expects a call to be refused with a code and a reason, and with a violation of a field when one is given."""
    result = _Refused()
    try:
        yield result
    except grpc.RpcError as error:
        result.refusal = Refusal.of(error)
    else:
        raise AssertionError(f"it was not refused with {code} {reason}")
    assert (result.refusal.code.name, result.refusal.reason) == (code, reason), result.refusal
    if field_path is not None:
        assert field_path in result.refusal.fields, result.refusal


class Rpc:
    """The stubs of one address, with the few calls that nearly every test makes."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", 16 * 2**20),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
        )
        self.runs = agent_run_service_pb2_grpc.AgentRunServiceStub(self.channel)
        self.approvals = approval_service_pb2_grpc.ApprovalServiceStub(self.channel)
        self.agents = agent_catalog_service_pb2_grpc.AgentCatalogServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Rpc:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_call(self, agent: str, run_input: Any = None, **fields: Any) -> pb.StartAgentResponse:
        """StartAgent, with JSON text as input."""
        metadata = fields.pop("metadata", None)
        text = json.dumps({} if run_input is None else run_input)
        request = pb.StartAgentRequest(agent=agent, input_json=text, **fields)
        return self.runs.StartAgent(request, timeout=scaled(TIMEOUT_S), metadata=metadata)

    def start(self, agent: str, run_input: Any = None, **fields: Any) -> str:
        """Starts an agent under an id of its own; returns the id. A `counter` gets a payload to search the logs for."""
        if agent == "counter" and isinstance(run_input, dict) and "run_id" not in fields:
            run_input = {"note": marks.PAYLOAD, **run_input}
        fields.setdefault("run_id", new_id(agent))
        return self.start_call(agent, run_input, **fields).run.run_id

    def get(self, run_id: str) -> run_pb.AgentRun:
        """The run, with input and output."""
        request = pb.GetRunRequest(run_id=run_id, view=run_pb.AGENT_RUN_VIEW_FULL)
        return self.runs.GetRun(request, timeout=scaled(TIMEOUT_S)).run

    def end_of(self, run_id: str) -> run_pb.AgentRun:
        """Waits for a run's end."""
        request = pb.WaitRunRequest(run_id=run_id, view=run_pb.AGENT_RUN_VIEW_FULL)
        response = self.runs.WaitRun(request, timeout=scaled(TIMEOUT_S))
        assert not response.timed_out, response.run
        return response.run

    def output_of(self, run_id: str) -> Any:
        """Waits for a run's success; returns its output."""
        run = self.end_of(run_id)
        assert state_of(run) == "SUCCEEDED", run
        return json.loads(run.output_json)

    def until(self, run_id: str, *states: str, timeout: float = 10) -> run_pb.AgentRun:
        """Waits until a run is in one of some states."""

        def arrived() -> run_pb.AgentRun:
            run = self.get(run_id)
            assert state_of(run) in states, run
            return run

        return eventually(arrived, timeout, what=f"{run_id} is {states}")

    def watch(self, run_id: str, timeout: float = TIMEOUT_S, **fields: Any) -> Any:
        """Opens a stream."""
        return self.runs.WatchRun(pb.WatchRunRequest(run_id=run_id, **fields), timeout=scaled(timeout))

    def stream(self, run_id: str, **fields: Any) -> list[pb.WatchRunResponse]:
        """Returns all responses of a stream that ends."""
        return list(self.watch(run_id, **fields))

    def events(self, run_id: str, **fields: Any) -> list[event_pb.RunEvent]:
        """Returns the events of a run that ends."""
        return events_of(self.stream(run_id, **fields))

    def signal(self, run_id: str, payload: Any = 1, name: str = "more", request_id: str | None = None) -> bool:
        """SignalRun; returns whether this call delivered it."""
        request = pb.SignalRunRequest(
            run_id=run_id, name=name, payload_json=json.dumps(payload), request_id=request_id or new_id("signal")
        )
        return bool(self.runs.SignalRun(request, timeout=scaled(TIMEOUT_S)).created)

    def cancel(self, run_id: str, reason: str = "") -> run_pb.AgentRun:
        """CancelRun."""
        return self.runs.CancelRun(pb.CancelRunRequest(run_id=run_id, reason=reason), timeout=scaled(TIMEOUT_S)).run

    def approval_of(self, run_id: str, *states: str) -> approval_state_pb.Approval:
        """Waits until a run has an approval in one of some states (PENDING), and returns it."""
        numbers = [approval_state_pb.ApprovalState.Value(f"APPROVAL_STATE_{state}") for state in states]
        request = approval_pb.ListApprovalsRequest(run_id=run_id, states=numbers)

        def asked() -> Any:
            found = self.approvals.ListApprovals(request, timeout=scaled(TIMEOUT_S)).approvals
            return found and found[0]

        return eventually(asked, what=f"{run_id} has an approval")

    def decide(self, approval_id: str, approve: bool = True, **fields: Any) -> approval_state_pb.Approval:
        """DecideApproval."""
        decision = approval_pb.DECISION_APPROVE if approve else approval_pb.DECISION_REJECT
        request = approval_pb.DecideApprovalRequest(approval_id=approval_id, decision=decision, **fields)
        return self.approvals.DecideApproval(request, timeout=scaled(TIMEOUT_S)).approval


class Reading:
    """Reads a stream in a thread, until it ends or is closed.

    Attributes:
        responses: What came so far.
        refusal: The error it ended with; None while it is open, and when it ended well.
    """

    def __init__(self, call: Any) -> None:
        self.responses: list[Any] = []
        self.refusal: Refusal | None = None
        self._call = call
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def events(self) -> list[event_pb.RunEvent]:
        return events_of(self.responses)

    @property
    def open(self) -> bool:
        return self._thread.is_alive()

    def _read(self) -> None:
        try:
            for response in self._call:
                self.responses.append(response)
        except grpc.RpcError as error:
            self.refusal = Refusal.of(error)

    def join(self, timeout: float = TIMEOUT_S) -> list[Any]:
        """Waits for the stream's end; returns the responses."""
        self._thread.join(scaled(timeout))
        assert not self._thread.is_alive(), "the stream is still open"
        return self.responses

    def close(self) -> None:
        """Closes the stream, as a client does that goes away."""
        self._call.cancel()
        self._thread.join(scaled(TIMEOUT_S))
