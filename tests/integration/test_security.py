"""A server with all of its doors locked: whom it lets in, to what, and what the others can find out: nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from perdure.v1 import agent_run_service_pb2, agent_run_service_pb2_grpc, approval_service_pb2
from perdure_client import ApprovalState, Client, ExecutorState, PermissionDenied, Unauthenticated, Unimplemented
from perdure_service.domain import tokens
from perdure_service.domain.callers import Caller, Role
from perdure_service.domain.cursors import Cursor
from perdure_service.rpc.access import ACCESS

from tests.helpers.rpc import Refusal, new_id
from tests.helpers.schema import METHODS, call, has_field, request_of, without_times
from tests.helpers.security import Certified, IdentityProvider, SigningKey, bad_tokens, certified
from tests.helpers.server import ROOT, ServerProcess, create_effects_table
from tests.helpers.waiting import eventually, free_port, scaled

OURS = "default"
THEIRS = f"tenant-{new_id()[-8:]}"
NOWHERE = f"nobody-{new_id()[-8:]}"
ALL_ROLES = [role.value for role in Role]
RUNS = "perdure.v1.AgentRunService/"
WAIT_S = 1.0


@dataclass
class Locked:
    """The server, its provider, and how to call it."""

    server: ServerProcess
    provider: IdentityProvider
    key: SigningKey
    admin_port: int
    folder: Path
    authority: Certified
    client: Certified
    statements_path: Path
    channels: list[grpc.Channel] = field(default_factory=list)

    def channel(self, port: int | None = None, client: Certified | None = None) -> grpc.Channel:
        """Returns a channel with a connection of its own, by default with the certificate that opens the door."""
        client = client or self.client
        channel = grpc.secure_channel(
            f"localhost:{port or self.server.port}",
            grpc.ssl_channel_credentials(self.authority.pem, client.key_pem, client.pem),
            options=[("grpc.use_local_subchannel_pool", 1)],
        )
        self.channels.append(channel)
        return channel

    def token(self, namespaces: list[str], roles: list[str], sub: str = "ann") -> str:
        return self.key.token(sub=sub, perdure_namespaces=namespaces, perdure_roles=roles)

    def library(self, token: str, port: int | None = None) -> Client:
        """Returns the product's own client."""
        return Client(
            f"127.0.0.1:{port or self.server.port}",
            token=token,
            namespace=THEIRS,
            root_certificates=self.authority.pem,
            client_certificate=self.client.pem,
            client_key=self.client.key_pem,
            server_name="localhost",
            timeout=scaled(20),
        )

    def statements(self) -> list[str]:
        """Returns what calls have asked the database so far."""
        return self.statements_path.read_text().splitlines()


@pytest.fixture(scope="module")
def locked(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    """A server with TLS, certificates of clients, tokens of a provider and an admin port."""
    create_effects_table(database_url)
    folder = tmp_path_factory.mktemp("locked")
    authority, key, admin_port = certified("authority"), SigningKey.make("first"), free_port()
    certificate, private = certified("localhost", authority).write(folder)
    (folder / "clients.pem").write_bytes(authority.pem)
    statements = folder / "statements"
    statements.touch()
    with (
        IdentityProvider([key]) as provider,
        ServerProcess(
            database_url,
            "tests.helpers.statements",
            command="serve",
            PERDURE_TEST_STATEMENTS=str(statements),
            PERDURE_NAMESPACES=f"{OURS},{THEIRS}",
            PERDURE_TLS__CERTIFICATE_FILE=str(certificate),
            PERDURE_TLS__KEY_FILE=str(private),
            PERDURE_TLS__CLIENT_CA_FILE=str(folder / "clients.pem"),
            PERDURE_AUTH__JWKS_URL=provider.url,
            PERDURE_AUTH__ISSUER=provider.settings()["issuer"],
            PERDURE_AUTH__AUDIENCE=provider.settings()["audience"],
            PERDURE_ADMIN_ADDRESS=f"127.0.0.1:{admin_port}",
            PERDURE_REFLECTION="1",
            PERDURE_LOG_FORMAT="json",
        ) as server,
    ):
        client = certified("client", authority)
        made = Locked(server, provider, key, admin_port, folder, authority, client, statements)
        yield made
        for channel in made.channels:
            channel.close()


@pytest.fixture(scope="module")
def channel(locked: Locked) -> grpc.Channel:
    return locked.channel()


@dataclass(frozen=True)
class Tenant:
    """What the other tenant has: a run that listens, one with a child, and one that asks."""

    listener: str
    parent: str
    asker: str
    approval: str


@pytest.fixture(scope="module")
def theirs(locked: Locked) -> Tenant:
    with locked.library(locked.token([THEIRS], ALL_ROLES, "bob")) as client:
        listener = client.start("listener", {"signals": 2}).run_id
        parent = client.start("parent", {"children": 1, "seconds": 600}).run_id
        asker = client.start("asker", {}).run_id
        eventually(lambda: client.get(listener).state == "AWAITING_INPUT", 30)
        eventually(lambda: client.get(f"{parent}.1").run_id, 30)
        approval = eventually(lambda: [one.approval_id for one in client.approvals(run=asker)], 30)[0]
        return Tenant(listener, parent, asker, approval)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def outcome(channel: grpc.Channel, method: str, request: Any, token: str) -> tuple[str, bytes, bytes]:
    """Makes a call; returns its status, and every byte that came of it: the answer, or the error's text and details."""
    timeout = scaled(WAIT_S if method.endswith("WaitRun") else 20)
    try:
        answer = call(channel, method, request, bearer(token), timeout=timeout)
    except grpc.RpcError as error:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        return error.code().name, (error.details() or "").encode(), bytes(details)
    if method.endswith("/WaitRuns") and answer.runs[0].HasField("error"):  # its items have errors of their own
        error = answer.runs[0].error
        return CODES[error.code], error.message.encode(), error.SerializeToString(deterministic=True)
    return "OK", without_times(answer).SerializeToString(deterministic=True), b""


CODES = {code.value[0]: code.name for code in grpc.StatusCode}

# ---- two tenants -----------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "StartAgent": {"agent": "counter", "input_json": "{}", "validate_only": True},
    "SignalRun": {"name": "more", "payload_json": "1"},
    "CancelRun": {"reason": "mine now"},
    "ForkRun": {"validate_only": True},
    "DeleteRuns": {"validate_only": True},
    "DecideApproval": {"decision": approval_service_pb2.DECISION_APPROVE},
    "WatchRun": {"include_children": True},
    "ListRuns": {}, "GetRun": {}, "WaitRun": {}, "WaitRuns": {}, "ListRunEvents": {}, "ListSteps": {},
    "GetRunTrace": {}, "ListApprovals": {}, "GetApproval": {}, "WatchApprovals": {},
    "ReadArtifact": {"input": True},
}  # fmt: skip
"""How to ask each method that has a namespace; ids are added by the name of their field."""
WITHOUT_NAMESPACE = {
    "StartAgents", "ListAgents", "GetAgent", "ListExecutors", "ListQueues", "ListStrandedRuns", "ListCells",
    "EvacuateCell", "ReturnCell",
}  # fmt: skip
ID_FIELDS = ("run_id", "run_ids", "parent_run_id", "approval_id")


def asked(method: str, namespace: str, run_id: str, approval_id: str, request_id: str) -> Any:
    """Returns a request of a method about a run and an approval of a namespace."""
    fields = {
        "namespace": namespace,
        "run_id": run_id,
        "run_ids": [run_id],
        "parent_run_id": run_id,
        "approval_id": approval_id,
        "request_id": request_id,
    }
    return request_of(method, **fields, **VARIANTS[method.partition("/")[2]])


NAMESPACED = sorted(method for method in METHODS if has_field(method, "namespace"))
WITH_IDS = [method for method in NAMESPACED if any(has_field(method, name) for name in ID_FIELDS)]


def test_every_method_of_the_schema_has_a_case_here(locked: Locked, channel: grpc.Channel) -> None:
    assert {method.partition("/")[2] for method in NAMESPACED} == set(VARIANTS)
    assert {method.partition("/")[2] for method in set(METHODS) - set(NAMESPACED)} == WITHOUT_NAMESPACE
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    served = {
        service.name
        for answer in stub.ServerReflectionInfo(iter([request]), timeout=scaled(20))
        for service in answer.list_services_response.service
    }
    ours = {name for name in served if not name.startswith("grpc.")}
    assert ours | {"perdure.v1.OperatorService"} == {method.partition("/")[0] for method in METHODS}


@pytest.mark.parametrize("method", NAMESPACED)
def test_a_namespace_of_another_tenant_is_answered_as_none(
    locked: Locked, channel: grpc.Channel, theirs: Tenant, method: str
) -> None:
    """With everything that is in it, to somebody with every role, by the same bytes and without a statement."""
    before = locked.statements()
    token = locked.token([OURS], ALL_ROLES)
    for run_id in (theirs.asker, "gone"):
        told = {
            namespace: outcome(channel, method, asked(method, namespace, run_id, theirs.approval, "r"), token)
            for namespace in (THEIRS, NOWHERE)
        }
        status, text, details = told[THEIRS]
        assert status == "NOT_FOUND"
        assert b"NAMESPACE_NOT_FOUND" in details
        names = THEIRS.encode(), NOWHERE.encode()
        assert (status, text.replace(*names), details.replace(*names)) == told[NOWHERE]
    assert locked.statements() == before


def test_an_item_of_a_stream_about_another_tenants_namespace_is_answered_as_none(
    locked: Locked, channel: grpc.Channel, theirs: Tenant
) -> None:
    before = locked.statements()
    service = "perdure.v1.AgentRunService"
    told = {}
    for namespace in (THEIRS, NOWHERE):
        start = asked(f"{service}/StartAgent", namespace, theirs.asker, theirs.approval, "r")
        item = request_of(f"{service}/StartAgents", start=start)
        answer = call(channel, f"{service}/StartAgents", item, bearer(locked.token([OURS], ALL_ROLES)))
        told[namespace] = answer.error.SerializeToString(deterministic=True)
    assert b"NAMESPACE_NOT_FOUND" in told[THEIRS]
    assert len(THEIRS) == len(NOWHERE)
    assert told[THEIRS].replace(THEIRS.encode(), NOWHERE.encode()) == told[NOWHERE]
    assert locked.statements() == before


@pytest.mark.parametrize("method", WITH_IDS)
def test_a_run_of_another_tenant_is_answered_as_none(
    locked: Locked, channel: grpc.Channel, theirs: Tenant, method: str
) -> None:
    """Under each name it could be asked for by, by the same bytes and the same statements."""
    token = locked.token([OURS], ALL_ROLES)
    names = {
        "a run": (theirs.listener, _another(theirs.listener)),
        "a child": (f"{theirs.parent}.1", f"{_another(theirs.parent)}.1"),
        "a workflow": (f"{THEIRS}.{theirs.listener}.r", f"{THEIRS}.{_another(theirs.listener)}.r"),
        "the workflow of a child": (f"{THEIRS}.{theirs.parent}.r-1", f"{THEIRS}.{_another(theirs.parent)}.r-1"),
    }
    if method.endswith("/StartAgent"):
        del names["a child"]
    for kind, (existing, missing) in names.items():
        told, statements = [], []
        for run_id, approval_id in ((existing, theirs.approval), (missing, _another_approval(theirs))):
            before = len(locked.statements())
            request = asked(method, OURS, run_id, approval_id, new_id())
            status, *parts = outcome(channel, method, request, token)
            swaps = ((run_id, existing), (approval_id, theirs.approval))
            told.append((status, *(_swapped(part, *swaps) for part in parts)))
            statements.append(locked.statements()[before:])
        assert told[0] == told[1], kind
        assert statements[0] == statements[1], kind


def _another(run_id: str) -> str:
    """Returns an id of the same shape that nobody has."""
    return run_id[:-6] + ("000000" if run_id[-6:] != "000000" else "111111")


def _another_approval(theirs: Tenant) -> str:
    return theirs.approval.replace(theirs.asker, _another(theirs.asker))


def _swapped(part: bytes, *pairs: tuple[str, str]) -> bytes:
    for old, new in pairs:
        part = part.replace(old.encode(), new.encode())
    return part


def start(channel: grpc.Channel, token: str, **fields: Any) -> Any:
    method = RUNS + "StartAgent"
    return call(channel, method, request_of(method, agent="listener", request_id=new_id(), **fields), bearer(token))


def test_an_id_of_another_tenant_is_free(locked: Locked, channel: grpc.Channel, theirs: Tenant) -> None:
    answer = start(channel, locked.token([OURS], ALL_ROLES), run_id=theirs.listener)
    assert (answer.created, answer.run.namespace, answer.run.caller) == (True, OURS, "ann")
    call(channel, RUNS + "CancelRun", request_of(RUNS + "CancelRun", run_id=theirs.listener),
         bearer(locked.token([OURS], ALL_ROLES)))  # fmt: skip
    with locked.library(locked.token([THEIRS], ALL_ROLES, "bob")) as client:
        assert client.get(theirs.listener).state == "AWAITING_INPUT"


def test_the_tokens_of_lists_and_streams_of_another_tenant_open_nothing(
    locked: Locked, channel: grpc.Channel, theirs: Tenant
) -> None:
    bob, ann = locked.token([THEIRS], ALL_ROLES, "bob"), locked.token([OURS], ALL_ROLES)
    page = call(channel, RUNS + "ListRuns", request_of(RUNS + "ListRuns", namespace=THEIRS, page_size=1), bearer(bob))
    assert page.next_page_token
    request = request_of(RUNS + "ListRuns", namespace=OURS, page_token=page.next_page_token)
    assert outcome(channel, RUNS + "ListRuns", request, ann)[0] == "INVALID_ARGUMENT"
    mine = start(channel, ann, run_id=new_id()).run.run_id
    watched = call(
        channel, RUNS + "WatchRun", request_of(RUNS + "WatchRun", namespace=THEIRS, run_id=theirs.asker), bearer(bob)
    )
    request = request_of(RUNS + "WatchRun", namespace=OURS, run_id=mine, cursor=watched.cursor)
    assert outcome(channel, RUNS + "WatchRun", request, ann)[0] == "INVALID_ARGUMENT"


def test_what_is_made_up_in_a_cursor_or_a_page_token_opens_nothing_of_another_tenant(
    locked: Locked, channel: grpc.Channel, theirs: Tenant
) -> None:
    """Neither is signed: whoever has one can put in the ids of others, and learns not even whether they exist."""
    ann = locked.token([OURS], ALL_ROLES)
    mine = start(channel, ann, run_id=new_id()).run.run_id
    call(channel, RUNS + "CancelRun", request_of(RUNS + "CancelRun", run_id=mine), bearer(ann))
    root, child = f"{OURS}.{mine}.r", f"{THEIRS}.{theirs.parent}.r-1"
    told = []
    for names in ([child, f"{THEIRS}.{theirs.listener}.r"], [f"{THEIRS}.{_another(theirs.parent)}.r-1", "nobody.x.r"]):
        request = agent_run_service_pb2.WatchRunRequest(
            run_id=mine, include_children=True, cursor=Cursor(root, 0, dict.fromkeys(names, 0)).encode()
        )
        stub = agent_run_service_pb2_grpc.AgentRunServiceStub(channel)
        responses = list(stub.WatchRun(request, metadata=bearer(ann), timeout=scaled(20)))  # it has ended, so this does
        assert {event.run_id for response in responses for event in response.events} == {mine}
        told.append([(len(one.events), one.cursor, one.caught_up) for one in responses])
    assert told[0] == told[1]
    runs, approvals = RUNS + "ListRuns", "perdure.v1.ApprovalService/ListApprovals"
    late, early = "2999-01-01T00:00:00+00:00", "2000-01-01T00:00:00+00:00"
    for method, position, made_for in (
        (runs, [late, child], [OURS, {}]),
        (approvals, [early, f"{THEIRS}.{theirs.asker}.r", 0], ["approvals", OURS, ["PENDING"], ""]),
    ):
        token = tokens.encode([1, position, made_for])
        page = call(channel, method, request_of(method, namespace=OURS, page_token=token), bearer(ann))
        found = page.runs if method == runs else page.approvals
        assert {one.namespace for one in found} <= {OURS}


def test_the_other_tenant_saw_nothing_of_all_this_and_can_do_it_all_itself(
    locked: Locked, channel: grpc.Channel, theirs: Tenant
) -> None:
    """The control: the same requests are good, they do reach the database, and what they change was not changed yet."""
    with locked.library(locked.token([THEIRS], ALL_ROLES, "bob")) as client:
        kinds = [event.kind for run_id in (theirs.listener, theirs.asker) for event in client.events(run_id)]
        assert "signal_received" not in kinds
        assert client.get_approval(theirs.approval).state is ApprovalState.PENDING
        last = {"DecideApproval": 1, "CancelRun": 2, "WaitRuns": 3}
        token = locked.token([THEIRS], ALL_ROLES, "bob")
        for method in sorted(NAMESPACED, key=lambda method: last.get(method.partition("/")[2], 0)):
            before = len(locked.statements())
            run_id = new_id() if method.endswith("/StartAgent") else theirs.listener
            request = asked(method, THEIRS, run_id, theirs.approval, new_id())
            assert outcome(channel, method, request, token)[0] == "OK", method
            # What is validated only is not looked up.
            assert len(locked.statements()) > before or method.endswith("/StartAgent"), method
        assert [run.run_id for run in client.list(limit=10)]
        # Who did it is in the run.
        assert client.get(theirs.listener).caller == client.get(f"{theirs.parent}.1").caller == "bob"
        assert client.get(theirs.listener).state_reason == "cancelled by bob: mine now"
        (signal,) = client.events(theirs.listener, kinds=["signal_received"])
        assert signal.data.sender == "bob"
        assert client.get_approval(theirs.approval).decided_by == "bob"


# ---- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [None, *Role])
def test_each_role_gets_what_the_table_says_on_every_method(locked: Locked, channel: grpc.Channel, role: Any) -> None:
    roles = [role.value] if role else []
    token = locked.token([OURS], roles)
    admin = locked.channel(locked.admin_port)
    for method in sorted(METHODS):
        request = (
            asked(method, OURS, _another(new_id()), f"{new_id()}/1", new_id())
            if method in NAMESPACED
            else request_of(method, agent="counter")
        )
        where = admin if "OperatorService" in method else channel
        status, _, details = outcome(where, method, request, token)
        if Caller("ann", roles=frozenset(map(Role, roles))).may(ACCESS[method].role):
            # Without regions there is no cell to move, which only those are told who may move one.
            passed = {"INVALID_ARGUMENT"} if method.endswith("Cell") else {"OK", "NOT_FOUND"}
            assert status in passed, method
        else:
            assert status == "PERMISSION_DENIED", method
            assert b"ROLE_REQUIRED" in details
            assert ACCESS[method].role.value.encode() in details


def test_operators_calls_are_at_the_admin_port_only(locked: Locked) -> None:
    token = locked.token([], ["admin"])
    with locked.library(token) as client, pytest.raises(Unimplemented):
        list(client.executors())
    with locked.library(token, locked.admin_port) as client:
        (executor,) = client.executors()
        assert (executor.state, executor.max_running) == (ExecutorState.ALIVE, 1000)
        assert str(locked.server.port) in executor.address
        with pytest.raises(Unimplemented):
            list(client.list())
    operator = locked.token([THEIRS], ["operator"])
    with locked.library(operator, locked.admin_port) as client, pytest.raises(PermissionDenied):
        list(client.executors())


def test_the_command_line_comes_in_with_files_and_variables(locked: Locked) -> None:
    certificate, key = locked.client.write(locked.folder, "client")
    command = [sys.executable, "-c", "from perdure_client.cli import main; main()", "--server-name", "localhost"]
    environment = {
        "PERDURE_ADDRESS": locked.server.address,
        "PERDURE_ADMIN_ADDRESS": f"127.0.0.1:{locked.admin_port}",
        "PERDURE_CA_FILE": str(locked.folder / "clients.pem"),
        "PERDURE_CLIENT_CERTIFICATE_FILE": str(certificate),
        "PERDURE_CLIENT_KEY_FILE": str(key),
        "PERDURE_TOKEN": locked.token([THEIRS], ["admin"]),
        "PERDURE_NAMESPACE": THEIRS,
    }
    for arguments in (["executors"], ["agents"]):
        done = subprocess.run(
            [*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[0])


# ---- tokens and certificates -----------------------------------------------------------------------------------------


def test_a_new_key_of_the_provider_is_taken_without_a_restart(locked: Locked, channel: grpc.Channel) -> None:
    second = SigningKey.make("second", "RS256")
    request = request_of(RUNS + "ListRuns", page_size=1)
    token = second.token()
    locked.provider.keys.append(second)
    # At once, unless another unknown key was looked up a moment ago.
    eventually(lambda: outcome(channel, RUNS + "ListRuns", request, token)[0] == "OK", 20)
    seen = locked.provider.reads
    for number in range(200):
        made_up = SigningKey(f"made-up-{number}", second.private, "RS256").token()
        assert outcome(channel, RUNS + "ListRuns", request, made_up)[0] == "UNAUTHENTICATED"
    assert locked.provider.reads <= seen + 2
    locked.provider.answer = (503, b"")  # away: what is known goes on
    assert outcome(channel, RUNS + "ListRuns", request, token)[0] == "OK"
    locked.provider.answer = None


def test_every_bad_token_is_refused_on_unary_and_streaming_methods(locked: Locked, channel: grpc.Channel) -> None:
    before = locked.statements()
    for kind, (authorization, reason) in bad_tokens(locked.key).items():
        metadata = (("authorization", authorization),) if authorization else ()
        for method in (RUNS + "GetRun", RUNS + "WatchRun"):
            with pytest.raises(grpc.RpcError) as refused:
                call(channel, method, request_of(method, run_id="x"), metadata)
            refusal = Refusal.of(refused.value)
            assert (refusal.code.name, refusal.reason) == ("UNAUTHENTICATED", reason), kind
            assert refusal.metadata == {}
    assert locked.statements() == before


def test_nobody_connects_without_a_certificate_of_the_right_authority(locked: Locked) -> None:
    port = locked.server.port
    stranger = certified("client")
    credentials = {
        "none": grpc.ssl_channel_credentials(locked.authority.pem),
        "of a stranger": grpc.ssl_channel_credentials(locked.authority.pem, stranger.key_pem, stranger.pem),
    }
    request = request_of(RUNS + "ListRuns")
    token = locked.token([OURS], ALL_ROLES)
    for kind, credential in credentials.items():
        for where in (port, locked.admin_port):
            with grpc.secure_channel(f"localhost:{where}", credential) as channel:
                assert outcome(channel, RUNS + "ListRuns", request, token)[0] == "UNAVAILABLE", kind
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        assert outcome(channel, RUNS + "ListRuns", request, token)[0] == "UNAVAILABLE"


def test_a_replaced_certificate_is_shown_without_a_restart(locked: Locked, channel: grpc.Channel) -> None:
    other = certified("another authority")
    request, token = request_of(RUNS + "ListRuns", page_size=1), locked.token([OURS], ALL_ROLES)
    trusting_other = grpc.ssl_channel_credentials(other.pem, locked.client.key_pem, locked.client.pem)

    def trusted_by_other() -> bool:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(f"localhost:{locked.server.port}", trusting_other, options) as fresh:
            return outcome(fresh, RUNS + "ListRuns", request, token)[0] == "OK"

    assert not trusted_by_other()
    certified("localhost", other).write(locked.folder)
    assert trusted_by_other()
    assert outcome(channel, RUNS + "ListRuns", request, token)[0] == "OK"  # the old connection goes on
    certified("localhost", locked.authority).write(locked.folder)
    assert not trusted_by_other()
    (locked.folder / "server.pem").write_text("nonsense")
    assert outcome(locked.channel(), RUNS + "ListRuns", request, token)[0] == "OK"
    assert "tls.not_reloaded" in locked.server.log


def test_the_library_tells_a_bad_token_from_an_old_one(locked: Locked) -> None:
    for token, reason in ((locked.key.token(exp=int(time.time()) - 600), "TOKEN_EXPIRED"), ("x", "TOKEN_INVALID")):
        with locked.library(token) as client, pytest.raises(Unauthenticated) as refused:
            client.get("x")
        assert refused.value.reason == reason


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_says_who_did_what_and_holds_no_token(locked: Locked, theirs: Tenant) -> None:
    """Last, over all that the tests above have done."""
    log = locked.server.log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    audits = [line for line in lines if line["event"] == "audit"]
    done = {(line["caller"], line["method"].partition("/")[2], line["outcome"]) for line in audits}
    assert {("bob", "StartAgent", "OK"), ("bob", "DecideApproval", "OK"), ("ann", "CancelRun", "NOT_FOUND")} <= done
    assert ("ann", "CancelRun", "PERMISSION_DENIED") in done
    assert ("", "GetRun", "UNAUTHENTICATED") not in done
    (cancelled,) = [line for line in audits if line["method"] == RUNS + "CancelRun" and line["caller"] == "bob"]
    assert (cancelled["outcome"], cancelled["namespace"], cancelled["run_id"]) == ("OK", THEIRS, theirs.listener)
    assert cancelled["call_id"]
    assert [line for line in lines if line["event"] == "rpc.failed" and line["reason"] == "TOKEN_INVALID"]
    assert "mine now" not in log
    assert "eyJ" not in log  # how every JSON Web Token begins
