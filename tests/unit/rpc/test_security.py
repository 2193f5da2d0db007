"""What a call needs to get in: a token, a role, a certificate; and what is written of it."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from perdure.v1 import agent_catalog_service_pb2 as catalog_pb
from perdure.v1 import agent_run_pb2 as run_pb
from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approval_pb
from perdure.v1 import operator_service_pb2 as operator_pb
from perdure.v1.operator_service_pb2_grpc import OperatorServiceStub
from perdure_service.domain.executors import Executor, ExecutorState
from perdure_service.domain.runs import RunKey, RunState
from perdure_service.domain.stranded import StrandedReason, StrandedRun
from perdure_service.durable.requests import Page
from perdure_service.errors import ConfigurationError, RunNotFound
from perdure_service.rpc import audit, security
from perdure_service.rpc.addresses import check_addresses
from perdure_service.rpc.tls import load_certificates
from perdure_service.settings import TlsSettings
from structlog.testing import LogCapture

from tests.helpers.security import Certified, IdentityProvider, SigningKey, bad_tokens, certified
from tests.helpers.waiting import eventually_async
from tests.unit.rpc.doubles import (
    NOON,
    ScriptedService,
    a_batch,
    a_run,
    an_approval,
    channel_to,
    failing,
    fails_with,
    serving,
    settings_of,
    streams,
)

KEY = SigningKey.make("one")
BAD = bad_tokens(KEY)
REQUEST = pb.GetRunRequest(run_id="foo")
SERVING = health_pb2.HealthCheckResponse.SERVING


def bearer(token: str = "", **claims: Any) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token or KEY.token(**claims)}"),)


@pytest.fixture
def provider():
    with IdentityProvider([KEY]) as provider:
        yield provider


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> list[MutableMapping[str, Any]]:
    """The lines of the audit log."""
    capture = LogCapture()
    monkeypatch.setattr(audit, "audit_log", lambda: structlog.wrap_logger(None, processors=[capture]))
    return capture.entries


# ---- tokens ----------------------------------------------------------------------------------------------------------


async def test_every_kind_of_bad_token_is_refused_before_anything_is_done(service, provider, rpc_log):
    service.script |= {"get": lambda *_, **__: a_run(), "watch": streams(a_batch(1))}
    async with serving(service, auth=provider.settings()) as served:
        for kind, (authorization, reason) in BAD.items():
            metadata = (("authorization", authorization),) if authorization else ()
            for call in (
                served.runs.GetRun(REQUEST, metadata=metadata),
                served.runs.WatchRun(pb.WatchRunRequest(run_id="foo"), metadata=metadata),
                served.channel.unary_unary("/perdure.v1.AgentRunService/GetRun")(b"\xff", metadata=metadata),
            ):
                failure = await failing(call)
                assert (failure.code.name, failure.info.reason) == ("UNAUTHENTICATED", reason), kind
                assert dict(failure.info.metadata) == {}
                assert authorization[-20:] not in failure.raw or not authorization.strip()
        assert service.calls == []
        assert (await served.runs.GetRun(REQUEST, metadata=bearer())).run.run_id == "foo"
    assert provider.reads <= 3  # at the start, and for the first made-up key
    secrets = [token for token, _ in BAD.values() if len(token) > 40]
    assert not [token for token in secrets if token.removeprefix("Bearer ") in json.dumps(rpc_log, default=str)]


async def test_the_callers_name_is_the_services(service, provider):
    service.script["signal"] = lambda *_, **__: True
    async with serving(service, auth=provider.settings()) as served:
        request = pb.SignalRunRequest(run_id="foo", name="more", payload_json="1", request_id="r")
        await served.runs.SignalRun(request, metadata=bearer(sub="ann@example.test"))
    assert service.calls[0][2]["sender"] == "ann@example.test"


async def test_a_missing_role_is_told_and_a_foreign_namespace_does_not_exist(service, provider):
    service.script |= {"cancel": lambda *_, **__: a_run(), "get": fails_with(RunNotFound("x"))}
    async with serving(service, auth=provider.settings()) as served:
        viewer = bearer(perdure_roles=["viewer"])
        failure = await failing(served.runs.CancelRun(pb.CancelRunRequest(run_id="foo"), metadata=viewer))
        assert (failure.code.name, failure.info.reason) == ("PERMISSION_DENIED", "ROLE_REQUIRED")
        assert dict(failure.info.metadata) == {"role": "operator"}
        foreign = await failing(
            served.runs.CancelRun(pb.CancelRunRequest(namespace="lab", run_id="foo"), metadata=viewer)
        )
        nowhere = await failing(
            served.runs.CancelRun(pb.CancelRunRequest(namespace="bal", run_id="foo"), metadata=viewer)
        )
        assert foreign.status.SerializeToString() == nowhere.status.SerializeToString().replace(b"bal", b"lab")
        assert foreign.info.reason == "NAMESPACE_NOT_FOUND"
        # Also where something else is wrong with the request.
        wrong = pb.CancelRunRequest(namespace="lab", run_id="a\x00")
        assert (await failing(served.runs.CancelRun(wrong, metadata=viewer))).info.reason == "NAMESPACE_NOT_FOUND"
    assert service.calls == []


async def test_health_needs_no_token_and_neither_does_reflection_where_it_is_on(service, provider):
    async with serving(service, auth=provider.settings(), reflection=True) as served:
        health = health_pb2_grpc.HealthStub(served.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(served.channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        assert await call.read() is not grpc.aio.EOF


async def test_a_stream_ends_when_its_token_expires(service, provider):
    service.script["watch"] = streams(a_batch(1), then_stay=True)
    async with serving(service, auth={**provider.settings(), "leeway": 0}) as served:
        metadata = bearer(exp=int(time.time()) + 2)
        call = served.runs.WatchRun(pb.WatchRunRequest(run_id="foo"), metadata=metadata)
        assert (await call.read()).last_sequence == 1
        lasting = served.runs.WatchRun(pb.WatchRunRequest(run_id="foo"), metadata=bearer())
        await lasting.read()
        failure = await asyncio.wait_for(failing(call), 20)
        assert (failure.code.name, failure.info.reason) == ("UNAUTHENTICATED", "TOKEN_EXPIRED")
        await eventually_async(lambda: service.closed == ["watch"])
        assert not lasting.done()
        lasting.cancel()


async def test_a_server_whose_provider_is_away_starts_and_says_to_wait(service):
    with IdentityProvider([KEY]) as provider:
        settings = {**provider.settings(), "jwks_refresh": 1}
        provider.answer = (503, b"")
        service.script["get"] = lambda *_, **__: a_run()
        async with serving(service, auth=settings) as served:
            failure = await failing(served.runs.GetRun(REQUEST, metadata=bearer()))
            assert (failure.code.name, failure.info.reason) == ("UNAVAILABLE", "KEYS_UNAVAILABLE")
            assert failure.retry_delay_s
            assert (await failing(served.runs.GetRun(REQUEST))).info.reason == "TOKEN_MISSING"
            provider.answer = None

            async def answered() -> bool:
                try:
                    return bool((await served.runs.GetRun(REQUEST, metadata=bearer())).run.run_id)
                except grpc.aio.AioRpcError:
                    return False

            await eventually_async(answered)


# ---- audit -----------------------------------------------------------------------------------------------------------


async def test_what_changes_something_is_in_the_audit_log_with_who_and_what_and_no_payload(service, audited):
    marked = "payload-that-nobody-logs"
    service.script |= {
        "start": lambda *_, **__: (a_run(), True),
        "signal": lambda *_, **__: True,
        "cancel": fails_with(RunNotFound("there is no run")),
        "decide_approval": lambda *_, **__: an_approval(),
        "get": lambda *_, **__: a_run(),
        "list_agents": lambda *_, **__: Page([], ""),
    }
    async with serving(service, caller="dev") as served:
        await served.runs.StartAgent(
            pb.StartAgentRequest(agent="research", input_json=json.dumps({"q": marked}), labels={"a": marked}),
            metadata=(("x-request-id", "call-7"),),
        )
        await served.runs.SignalRun(
            pb.SignalRunRequest(run_id="foo", name="more", payload_json=f'"{marked}"', request_id="r")
        )
        await failing(served.runs.CancelRun(pb.CancelRunRequest(run_id="foo", reason=marked)))
        await served.approvals.DecideApproval(
            approval_pb.DecideApprovalRequest(approval_id="foo/3", decision=approval_pb.DECISION_REJECT, comment=marked)
        )
        await failing(served.runs.CancelRun(pb.CancelRunRequest(namespace="nowhere", run_id="foo")))
        await served.runs.GetRun(REQUEST)
        await served.catalog.ListAgents(catalog_pb.ListAgentsRequest())
    assert marked not in str(audited)
    facts = [
        {key: value for key, value in line.items() if key not in ("event", "log_level", "call_id")} for line in audited
    ]
    service_name = "perdure.v1.AgentRunService"
    assert facts == [
        {
            "caller": "dev", "method": f"{service_name}/StartAgent", "namespace": "default", "agent": "research",
            "run_id": "foo", "outcome": "OK",
        },
        {
            "caller": "dev", "method": f"{service_name}/SignalRun", "namespace": "default", "run_id": "foo",
            "outcome": "OK",
        },
        {
            "caller": "dev", "method": f"{service_name}/CancelRun", "namespace": "default", "run_id": "foo",
            "outcome": "NOT_FOUND", "reason": "RUN_NOT_FOUND",
        },
        {
            "caller": "dev", "method": "perdure.v1.ApprovalService/DecideApproval", "namespace": "default",
            "approval_id": "foo/3", "decision": "REJECT", "outcome": "OK",
        },
        {
            "caller": "dev", "method": f"{service_name}/CancelRun", "namespace": "nowhere", "run_id": "foo",
            "outcome": "NOT_FOUND", "reason": "NAMESPACE_NOT_FOUND",
        },
    ]  # fmt: skip
    assert audited[0]["call_id"] == "call-7"
    assert {line["event"] for line in audited} == {"audit"}


async def test_nobody_is_answered_before_the_line_is_written_and_a_call_has_one_line(service, audited, monkeypatch):
    written = asyncio.Event()

    async def waits() -> None:
        await written.wait()

    monkeypatch.setattr(audit, "audit_written", waits)
    service.script["signal"] = lambda *_, **__: True
    request = pb.SignalRunRequest(run_id="foo", name="more", payload_json="1", request_id="r")
    async with serving(service, caller="dev") as served:
        call, gone = served.runs.SignalRun(request), served.runs.SignalRun(request)
        await eventually_async(lambda: len(audited) == 2)
        gone.cancel()  # between the line and the answer
        done, _ = await asyncio.wait([asyncio.ensure_future(call.code())], timeout=0.2)
        assert not done
        written.set()
        assert (await call).created
    assert [line["outcome"] for line in audited] == ["OK", "OK"]


async def test_a_start_that_waits_has_its_line_when_it_is_started_and_no_other(service, audited):
    end = asyncio.Event()

    async def outcome(*_: Any, **__: Any) -> Any:
        await end.wait()
        return a_run(state=RunState.SUCCEEDED, output_json="1", output_bytes=1)

    service.script |= {"start": lambda *_, **__: (a_run(), True), "outcome": outcome}
    request = pb.StartAgentRequest(agent="research", wait=Duration(seconds=20))
    async with serving(service, caller="dev") as served:
        call, gone = served.runs.StartAgent(request), served.runs.StartAgent(request)
        await eventually_async(lambda: len(audited) == 2)
        gone.cancel()
        await eventually_async(lambda: served.server.streams.count == 1)
        end.set()
        answer = await call
    assert (answer.created, answer.run.output_json) == (True, "1")
    assert [(line["run_id"], line["outcome"]) for line in audited] == [("foo", "OK")] * 2


async def test_a_line_that_cannot_be_written_is_an_error_of_the_server(service, audited, monkeypatch):
    async def fails() -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(audit, "audit_written", fails)
    service.script["signal"] = lambda *_, **__: True
    async with serving(service, caller="dev") as served:
        request = pb.SignalRunRequest(run_id="foo", name="more", payload_json="1", request_id="r")
        failure = await failing(served.runs.SignalRun(request))
    assert failure.code.name == "INTERNAL"
    assert "disk" not in failure.raw
    assert len(audited) == 1


async def test_what_stands_in_the_place_of_an_id_and_is_none_is_not_in_the_audit_log(service, audited):
    async with serving(service) as served:
        await failing(served.runs.StartAgent(pb.StartAgentRequest(agent="counter", run_id="a\x03: what was said")))
        await failing(served.runs.CancelRun(pb.CancelRunRequest(run_id='{"text": "what was said"}')))
    assert [line["run_id"] for line in audited] == ["(malformed)", "(malformed)"]
    assert "what was said" not in str(audited)


async def test_what_was_tried_without_a_right_is_in_the_audit_log_too(service, provider, audited):
    async with serving(service, auth=provider.settings()) as served:
        cancel = pb.CancelRunRequest(run_id="foo")
        await failing(served.runs.CancelRun(cancel, metadata=bearer(perdure_roles=["viewer"])))
        await failing(served.runs.CancelRun(cancel))
    assert [(line["caller"], line["outcome"], line["reason"]) for line in audited] == [
        ("ann", "PERMISSION_DENIED", "ROLE_REQUIRED"),
        ("", "UNAUTHENTICATED", "TOKEN_MISSING"),
    ]


# ---- the admin port --------------------------------------------------------------------------------------------------

EXECUTOR = Executor("host-1", "host:50051", "1", "north", ExecutorState.EXPIRED, 3, 10, NOON, NOON)


async def test_executors_are_listed_at_the_admin_port_and_nowhere_else(service, provider):
    service.script["list_executors"] = lambda **_: Page([EXECUTOR], "more")
    request = operator_pb.ListExecutorsRequest(page_size=7, include_gone=True)
    async with serving(service, auth=provider.settings(), admin_address="127.0.0.1:0") as served:
        failure = await _refused(OperatorServiceStub(served.channel).ListExecutors(request, metadata=bearer()))
        assert failure is grpc.StatusCode.UNIMPLEMENTED
        async with channel_to(served.admin_port) as admin:
            stub = OperatorServiceStub(admin)
            page = await stub.ListExecutors(request, metadata=bearer())
            assert (await failing(stub.ListExecutors(request))).info.reason == "TOKEN_MISSING"
            operator = bearer(perdure_roles=["operator", "approver"])
            refusal = await failing(stub.ListExecutors(request, metadata=operator))
            assert dict(refusal.info.metadata) == {"role": "admin"}
            health = health_pb2_grpc.HealthStub(admin)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
            call = admin.unary_unary("/perdure.v1.AgentRunService/GetRun")(b"", metadata=bearer())
            assert await _refused(call) is grpc.StatusCode.UNIMPLEMENTED
    (found,) = page.executors
    assert (found.executor_id, found.state, found.running, found.max_running) == (
        "host-1", operator_pb.EXECUTOR_STATE_EXPIRED, 3, 10,
    )  # fmt: skip
    assert page.next_page_token == "more"
    assert service.calls == [("list_executors", (), {"include_gone": True, "page_size": 7, "page_token": ""})]


STRANDED = StrandedRun(
    RunKey.of_api("a", "run-1"), "greet", "3", "7", RunState.QUEUED, StrandedReason.NO_EXECUTOR_OF_VERSION, None,
    True, NOON,
)  # fmt: skip


async def test_stranded_runs_are_listed_at_the_admin_port_and_nowhere_else(service, provider):
    service.script["list_stranded"] = lambda **_: Page([STRANDED], "more")
    request = operator_pb.ListStrandedRunsRequest(page_size=7)
    async with serving(service, auth=provider.settings(), admin_address="127.0.0.1:0") as served:
        failure = await _refused(OperatorServiceStub(served.channel).ListStrandedRuns(request, metadata=bearer()))
        assert failure is grpc.StatusCode.UNIMPLEMENTED
        async with channel_to(served.admin_port) as admin:
            stub = OperatorServiceStub(admin)
            page = await stub.ListStrandedRuns(request, metadata=bearer())
            operator = bearer(perdure_roles=["operator", "approver"])
            assert dict((await failing(stub.ListStrandedRuns(request, metadata=operator))).info.metadata) == {
                "role": "admin"
            }
    (found,) = page.runs
    assert (found.namespace, found.run_id, found.agent, found.agent_version) == ("a", "run-1", "greet", "3")
    assert (found.application_version, found.create_time.ToSeconds()) == ("7", int(NOON.timestamp()))
    assert found.state == run_pb.AGENT_RUN_STATE_QUEUED
    assert found.reason == operator_pb.STRANDED_REASON_NO_EXECUTOR_OF_VERSION
    assert "`perdure --namespace a cancel run-1`, then `perdure --namespace a fork run-1`" in found.advice
    assert page.next_page_token == "more"
    assert service.calls == [("list_stranded", (), {"page_size": 7, "page_token": ""})]


async def _refused(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code()


async def test_without_an_admin_address_there_is_no_admin_port(service):
    async with serving(service) as served:
        assert served.admin_port is None


# ---- certificates ----------------------------------------------------------------------------------------------------

AUTHORITY = certified("authority")
CLIENTS = certified("clients' authority")


def trusting(client: Certified | None = None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(AUTHORITY.pem)
    return grpc.ssl_channel_credentials(AUTHORITY.pem, client.key_pem, client.pem)


def tls_files(folder: Path, server: Certified, **more: Any) -> dict[str, Any]:
    certificate, key = server.write(folder)
    return {"certificate_file": certificate, "key_file": key} | more


async def answers(port: int, credentials: grpc.ChannelCredentials | None) -> bool:
    async with channel_to(port, credentials) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return True


def serial_shown(port: int) -> int:
    """Returns the serial number of the certificate that a port shows."""
    from cryptography import x509

    pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=10)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


async def test_with_a_certificate_both_ports_speak_tls_and_health_for_probes_does_not(service, tmp_path):
    files = tls_files(tmp_path, certified("localhost", AUTHORITY))
    async with serving(
        service, credentials=trusting(), tls=files, admin_address="127.0.0.1:0", health_address="127.0.0.1:0"
    ) as served:
        service.script["get"] = lambda *_, **__: a_run()
        assert (await served.runs.GetRun(REQUEST)).run.run_id == "foo"
        for port in (served.port, served.admin_port):
            assert await answers(port, trusting())
            assert not await answers(port, None)
            assert not await answers(port, grpc.ssl_channel_credentials(CLIENTS.pem))
        assert await answers(served.health_port, None)


async def test_changed_certificates_are_shown_without_a_restart_and_broken_ones_are_not(service, tmp_path):
    first, second = certified("localhost", AUTHORITY), certified("localhost", AUTHORITY)
    files = tls_files(tmp_path, first)
    service.script["watch"] = streams(a_batch(1), then_stay=True)
    async with serving(service, credentials=trusting(), tls=files) as served:

        async def shown() -> int:
            return await asyncio.to_thread(serial_shown, served.port)

        call = served.runs.WatchRun(pb.WatchRunRequest(run_id="foo"))
        await call.read()
        assert await shown() == first.serial
        files["key_file"].write_bytes(second.key_pem)  # half of a replacement
        assert await shown() == first.serial
        files["certificate_file"].write_bytes(b"nonsense")
        assert await shown() == first.serial
        files["certificate_file"].unlink()
        assert await shown() == first.serial
        certified("localhost", AUTHORITY, ends_in_days=-0.5).write(tmp_path)
        assert await shown() == first.serial
        second.write(tmp_path)
        assert await shown() == second.serial
        assert await answers(served.port, trusting())
        assert not call.done()  # what is open stays
        call.cancel()


async def test_with_authorities_of_clients_nobody_connects_without_a_certificate(service, tmp_path):
    (tmp_path / "clients.pem").write_bytes(CLIENTS.pem)
    files = tls_files(tmp_path, certified("localhost", AUTHORITY), client_ca_file=tmp_path / "clients.pem")
    client = certified("client", CLIENTS)
    async with serving(service, credentials=trusting(client), tls=files) as served:
        assert await answers(served.port, trusting(client))
        assert not await answers(served.port, trusting())
        assert not await answers(served.port, trusting(certified("client", AUTHORITY)))
        assert not await answers(served.port, trusting(certified("client")))
        assert not await answers(served.port, trusting(certified("client", CLIENTS, ends_in_days=-0.5)))
        (tmp_path / "clients.pem").write_bytes(AUTHORITY.pem)  # another authority from now on
        assert await answers(served.port, trusting(certified("client", AUTHORITY)))
        assert not await answers(served.port, trusting(client))


@pytest.mark.parametrize(
    ("breakage", "why"),
    [
        ("no certificate", "PERDURE_TLS__CERTIFICATE_FILE.*cannot be read"),
        ("no key", "PERDURE_TLS__KEY_FILE.*cannot be read"),
        ("nonsense", "PERDURE_TLS__CERTIFICATE_FILE.*no certificate"),
        ("nonsense as key", "PERDURE_TLS__KEY_FILE.*no private key"),
        ("encrypted", "PERDURE_TLS__KEY_FILE.*encrypted"),
        ("another key", "not the key of the certificate"),
        ("expired", "expired"),
        ("too early", "not valid before"),
        ("clients", "PERDURE_TLS__CLIENT_CA_FILE.*no certificate"),
    ],
)
async def test_a_certificate_that_is_no_good_is_told_in_a_sentence(service, tmp_path, breakage, why):
    from cryptography.hazmat.primitives import serialization

    good = certified("localhost", AUTHORITY)
    files = tls_files(tmp_path, good, client_ca_file=tmp_path / "clients.pem")
    (tmp_path / "clients.pem").write_bytes(CLIENTS.pem)
    encrypted = good.private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    match breakage:
        case "no certificate":
            files["certificate_file"].unlink()
        case "no key":
            files["key_file"].unlink()
        case "nonsense":
            files["certificate_file"].write_text("nonsense")
        case "nonsense as key":
            files["key_file"].write_text("nonsense")
        case "encrypted":
            files["key_file"].write_bytes(encrypted)
        case "another key":
            files["key_file"].write_bytes(AUTHORITY.key_pem)
        case "expired":
            certified("localhost", AUTHORITY, ends_in_days=-0.5).write(tmp_path)
        case "too early":
            certified("localhost", AUTHORITY, begins_in_days=1).write(tmp_path)
        case "clients":
            (tmp_path / "clients.pem").write_text("nonsense")
    with pytest.raises(ConfigurationError, match=why):
        load_certificates(TlsSettings(**files))
    with pytest.raises(ConfigurationError, match=why):
        async with serving(service, tls=files):
            pass
    (finding,) = [found for found in security.diagnose(settings_of(tls=files)) if found.severity == "error"]
    assert "\n" not in finding.text


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"certificate_file": "a"}, "belong together"),
        ({"key_file": "a"}, "belong together"),
        ({"client_ca_file": "a"}, "needs"),
    ],
)
def test_half_of_the_settings_of_tls_is_refused(given, why):
    with pytest.raises(ValueError, match=why):
        TlsSettings(**given)


# ---- addresses and check ---------------------------------------------------------------------------------------------

TLS = {"certificate_file": "a", "key_file": "b"}
AUTH = {"tokens_file": "c"}


@pytest.mark.parametrize("variable", ["address", "admin_address"])
@pytest.mark.parametrize(
    ("tls", "auth", "why"),
    [
        (None, None, "there is no authentication"),
        (TLS, None, "there is no authentication"),
        (None, AUTH, "tokens would travel in plaintext"),
        (TLS, AUTH, None),
    ],
)
def test_what_others_can_reach_needs_tls_and_authentication_or_a_word(variable, tls, auth, why):
    settings = settings_of(**{variable: "0.0.0.0:50099"}, tls=tls or {}, auth=auth or {})
    if why is None:
        check_addresses(settings)
    else:
        with pytest.raises(ConfigurationError, match=why) as refused:
            check_addresses(settings)
        assert f"PERDURE_{variable.upper()}" in refused.value.message
        assert "127.0.0.1:50099" in refused.value.message
        check_addresses(settings.model_copy(update={"insecure": True}))
    with pytest.raises(ConfigurationError, match="`dev` is for this machine only"):
        check_addresses(settings.model_copy(update={"insecure": True}), dev=True)


async def test_check_tells_what_is_wrong_and_how_calls_are_secured(tmp_path):
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text("tokens: [{token: dev-token-0123456789, caller: ann, namespaces: [moon]}]")
    tokens.chmod(0o644)
    files = tls_files(tmp_path, certified("localhost", AUTHORITY, ends_in_days=3))
    settings = settings_of(tls=files, auth={"tokens_file": tokens}, admin_address="127.0.0.1:1")
    texts = [f"{found.severity}: {found.text}" for found in security.diagnose(settings)]
    assert len(texts) == 3
    assert "expires at" in texts[0]
    assert "chmod o-r" in texts[1]
    assert "'moon'" in texts[2]
    assert not [text for text in texts if not text.startswith("warning: ")]
    assert "dev-token" not in str(texts)
    assert "over TLS" in security.describe(settings)
    assert str(tokens) in security.describe(settings)
    assert "everyone may do everything" in security.describe(settings_of())
    with IdentityProvider([KEY]) as provider:
        settings = settings_of(auth=provider.settings())
        assert security.diagnose(settings) == []
    (away,) = security.diagnose(settings)
    assert (away.severity, provider.url in away.text) == ("warning", True)


async def test_a_broken_file_of_tokens_keeps_a_server_from_starting(tmp_path):
    (tmp_path / "tokens.yaml").write_text("{")
    with pytest.raises(ConfigurationError, match="PERDURE_AUTH__TOKENS_FILE"):
        async with serving(ScriptedService(), auth={"tokens_file": tmp_path / "tokens.yaml"}):
            pass
