"""`perdure-server`: one sentence, with the way out, on what keeps it from serving; and a database that goes away."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from perdure.v1 import agent_run_service_pb2 as pb
from perdure_client import Client
from perdure_service.store.engine import parse_url

from tests.helpers import forked
from tests.helpers.databases import DatabaseServer, not_in_another_form, url_in_form
from tests.helpers.pdfs import pdf
from tests.helpers.proxy import DatabaseProxy
from tests.helpers.rpc import Reading, Rpc, new_id, refusal_of, sequences, state_of, states_in
from tests.helpers.server import ROOT, ServerProcess, effects, sql
from tests.helpers.waiting import eventually, free_port, scaled

NOBODY_LISTENS = "postgresql://user:secret-password@127.0.0.1:1/nothing"


def perdure_server(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, with nothing in its environment but what is given.

    Forked, as an import of everything takes a second of a core; `new_perdure_server` is for what that may hide.
    """
    return forked.run(arguments, _nothing_but(environment), cwd, scaled(40))


def new_perdure_server(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `perdure_server`, by a Python that has imported nothing yet."""
    return subprocess.run(
        [sys.executable, "-m", "perdure_service", *arguments],
        cwd=cwd,
        env=_nothing_but({"PYTHONPATH": _path(), **environment}),
        capture_output=True,
        text=True,
        timeout=scaled(40),
        check=False,
    )


def _nothing_but(environment: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PERDURE_", "OTEL_", "PG"))}
    return {**kept, "GRPC_VERBOSITY": "ERROR", **environment}


def _path(*more: Path) -> str:
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(str(part) for part in (*known, ROOT, *more) if str(part))


def the_sentence(result: subprocess.CompletedProcess[str]) -> str:
    """Returns the one sentence that a failed command says on standard error."""
    assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("perdure-server: ")
    assert "Traceback" not in result.stdout + result.stderr
    return lines[0].removeprefix("perdure-server: ")


def the_finding(result: subprocess.CompletedProcess[str]) -> str:
    """Returns the one finding that `check` reports."""
    assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
    assert result.stderr == ""
    (finding,) = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert result.stdout.splitlines()[-1] == "not ready to serve"
    return finding.removeprefix("error: ")


def refusals(*arguments: str, **environment: Any) -> tuple[str, str]:
    """Returns what `check` and `serve` say about one configuration."""
    with ThreadPoolExecutor(2) as pool:
        checked = pool.submit(perdure_server, "check", **environment)
        served = pool.submit(perdure_server, "serve", *arguments, **environment)
        return the_finding(checked.result()), the_sentence(served.result())


# ---- what keeps a server from serving --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "check", "migrate"])
def test_without_a_database_it_says_how_to_name_one(command: str, tmp_path: Path) -> None:
    result = perdure_server(command, cwd=tmp_path)
    sentence = the_finding(result) if command == "check" else the_sentence(result)
    assert "PERDURE_DATABASE_URL" in sentence
    assert "perdure-server dev" in sentence


def test_a_database_that_is_down_is_named_without_its_password() -> None:
    with ThreadPoolExecutor(2) as pool:
        checked, served = pool.map(
            lambda command: perdure_server(command, PERDURE_DATABASE_URL=NOBODY_LISTENS), ("check", "serve")
        )
    assert the_finding(checked) == the_sentence(served)
    assert "nothing at 127.0.0.1:1 is down; start it, or correct the URL" in the_sentence(served)
    for result in (checked, served):
        assert "secret-password" not in result.stdout + result.stderr


def test_migrating_a_database_that_is_down_is_told_in_a_sentence() -> None:
    result = perdure_server("migrate", PERDURE_DATABASE_URL=NOBODY_LISTENS)
    sentence = the_sentence(result)
    assert "secret-password" not in result.stdout + result.stderr
    assert "down" in sentence or "reached" in sentence


@pytest.mark.parametrize("url", ["nonsense", "mysql://localhost/x"])
def test_a_url_that_is_not_of_a_database_we_know_is_told_in_a_sentence(url: str) -> None:
    finding, sentence = refusals(PERDURE_DATABASE_URL=url)
    assert finding
    assert sentence


def test_a_database_that_does_not_exist_is_named(database_url: str) -> None:
    missing = url_in_form(parse_url(database_url).set(database="no_such_database"), "postgresql")
    finding, sentence = refusals(PERDURE_DATABASE_URL=missing)
    assert finding == sentence
    assert "no_such_database" in sentence
    assert "does not exist; create it" in sentence


def test_a_database_without_our_schema_is_to_be_migrated(empty_database_url: str) -> None:
    finding, sentence = refusals(PERDURE_DATABASE_URL=empty_database_url)
    assert finding == sentence
    assert "perdure-server migrate" in sentence


def test_a_database_that_is_much_newer_than_the_program_is_left_alone(own_database_url: str) -> None:
    with sql(own_database_url) as connection:
        connection.execute(
            "INSERT INTO perdure.migration (number, name) SELECT max(number) + 1000, 'from the future' "
            "FROM perdure.migration"
        )
    finding, sentence = refusals(PERDURE_DATABASE_URL=own_database_url)
    assert finding == sentence
    assert re.search("too new|newer|upgrade", sentence)


def test_a_port_in_use_is_told(database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = perdure_server(
            "serve", "--address", address, "--agents", "tests.helpers.agents", PERDURE_DATABASE_URL=database_url
        )
    sentence = _last_sentence(result)
    assert address in sentence
    assert "PERDURE_ADDRESS" in sentence


def _last_sentence(result: subprocess.CompletedProcess[str]) -> str:
    """Returns the sentence of a command that has logged before it failed."""
    assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
    sentences = [line for line in result.stderr.splitlines() if line.startswith("perdure-server: ")]
    assert len(sentences) == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    return sentences[0].removeprefix("perdure-server: ")


@pytest.mark.parametrize("address", ["0.0.0.0:0", ":50051", "example.test:50051"])
def test_an_address_that_others_can_reach_needs_a_word(database_url: str, address: str) -> None:
    result = perdure_server(
        "serve", "--address", address, "--agents", "tests.helpers.agents", PERDURE_DATABASE_URL=database_url
    )
    sentence = _last_sentence(result)
    assert "PERDURE_INSECURE=1" in sentence
    assert "127.0.0.1" in sentence


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:99999"])
def test_a_malformed_address_is_told(database_url: str, address: str) -> None:
    result = perdure_server(
        "serve", "--address", address, "--agents", "tests.helpers.agents", PERDURE_DATABASE_URL=database_url
    )
    assert "HOST:PORT" in _last_sentence(result)


def test_an_address_that_others_can_reach_is_served_when_that_is_allowed(own_database_url: str) -> None:
    port = free_port()
    process = _serve(own_database_url, f"0.0.0.0:{port}", PERDURE_INSECURE="1")
    try:
        with Rpc(f"127.0.0.1:{port}") as rpc:
            assert eventually(lambda: refusal_of(lambda: rpc.start("counter", {})) is None, 20)
    finally:
        process.kill()
        process.wait()


def _serve(database_url: str, address: str, **environment: str) -> subprocess.Popen[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PERDURE_", "OTEL_"))}
    return subprocess.Popen(
        [
            sys.executable, "-m", "perdure_service", "serve", "--address", address, "--agents", "tests.helpers.agents",
        ],
        cwd=ROOT,
        env={**kept, "PERDURE_DATABASE_URL": database_url, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("module", ["no.such.module", "tests.helpers.nothing"])
def test_a_module_of_agents_that_does_not_exist_is_named(database_url: str, module: str) -> None:
    result = perdure_server(
        "serve", "--address", f"127.0.0.1:{free_port()}", "--agents", module, PERDURE_DATABASE_URL=database_url
    )
    assert module in _last_sentence(result)


def test_a_module_of_agents_that_cannot_be_imported_is_named_with_the_reason(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "broken_agents.py").write_text("1 / 0\n")
    result = new_perdure_server(
        "serve", "--address", f"127.0.0.1:{free_port()}", "--agents", "broken_agents",
        PERDURE_DATABASE_URL=database_url, PYTHONPATH=_path(tmp_path),
    )  # fmt: skip
    sentence = _last_sentence(result)
    assert "broken_agents" in sentence
    assert "ZeroDivisionError" in sentence or "division by zero" in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PERDURE_MAX_RUNNING", "0"), ("PERDURE_LEASE_TTL", "soon"), ("PERDURE_MODEL__TIMEOUT_S", "-1"),
    ],
)  # fmt: skip
def test_a_malformed_setting_is_named(name: str, value: str) -> None:
    sentence = the_sentence(perdure_server("check", **{"PERDURE_DATABASE_URL": NOBODY_LISTENS, name: value}))
    assert name in sentence
    assert "secret" not in sentence


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("serve", "--nothing"), ("documents",)])
def test_wrong_usage_has_its_own_exit_status(arguments: tuple[str, ...]) -> None:
    result = perdure_server(*arguments)
    assert result.returncode == 2
    assert "usage: perdure-server" in result.stderr


def test_help_and_version_need_nothing(tmp_path: Path) -> None:
    for option in ("--help", "--version"):
        result = new_perdure_server(option, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert "perdure-server" in result.stdout


def test_a_folder_with_a_broken_pdf_is_loaded_but_for_that_and_the_exit_status_says_so(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "good.pdf").write_bytes(pdf("Whales winter in the bay."))
    (tmp_path / "page.html").write_text("<h1>Harbour</h1><p>The lock opens at high tide.</p>", encoding="utf-8")
    result = perdure_server("documents", "load", str(tmp_path), PERDURE_DATABASE_URL=database_url)
    assert (result.returncode, result.stderr) == (0, "")
    (tmp_path / "broken.pdf").write_bytes(pdf("words")[:200])
    result = perdure_server("documents", "load", str(tmp_path), PERDURE_DATABASE_URL=database_url)
    assert (result.returncode, result.stderr) == (1, "")
    failed, summary = result.stdout.splitlines()
    assert failed.startswith("failed   broken.pdf: is a broken PDF: ")
    assert summary == "0 loaded, 2 unchanged, 0 removed, 1 failed, 0 new passages"


# ---- check and migrate when all is well ------------------------------------------------------------------------------


def test_check_prints_the_settings_without_secrets_and_says_that_all_is_well(database_url: str) -> None:
    result = perdure_server(
        "check",
        PERDURE_DATABASE_URL=database_url,
        PERDURE_MODEL__API_KEY="secret-key",
        PERDURE_MODEL__BASE_URL="https://me:secret-key@127.0.0.1:9/v1",
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "ready to serve"
    assert "PERDURE_MAX_RUNNING = 1000 (default)" in result.stdout
    assert re.search(r"PERDURE_DATABASE_URL = \*+ \(set\)", result.stdout)
    assert "secret-key" not in result.stdout


@not_in_another_form
def test_check_tries_the_object_store(database_url: str) -> None:
    given = {
        "PERDURE_PAYLOADS__S3_BUCKET": "payloads",
        "PERDURE_PAYLOADS__S3_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "PERDURE_PAYLOADS__S3_ACCESS_KEY_ID": "me",
        "PERDURE_PAYLOADS__S3_SECRET_ACCESS_KEY": "secret-key",
    }
    result = perdure_server("check", PERDURE_DATABASE_URL=database_url, **given)
    (warning,) = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: The object store does not answer; start it, or correct PERDURE_PAYLOADS__")
    assert result.stdout.splitlines()[-1] == "ready to serve"
    assert "secret-key" not in result.stdout


def test_check_prints_each_variable_as_one_would_set_it(database_url: str) -> None:
    given = {"PERDURE_LEASE_TTL": "PT30S", "PERDURE_MODEL__NAME": "small", "PERDURE_NAMESPACES": "a,b"}
    result = perdure_server("check", PERDURE_DATABASE_URL=database_url, **given)
    for line in (
        "PERDURE_LEASE_TTL = 30 (set)",
        "PERDURE_NAMESPACES = a,b (set)",
        "PERDURE_MODEL__NAME = small (set)",
        "PERDURE_MODEL__TIMEOUT_S = 120 (default)",
        "PERDURE_AUTH__LEEWAY = 30 (default)",
        "PERDURE_INSECURE = 0 (default)",
        "PERDURE_ADMIN_ADDRESS = unset (default)",
    ):
        assert line in result.stdout.splitlines()


def test_check_tells_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    result = perdure_server("check", cwd=tmp_path, PERDURE_AUTH__TOKENS_FILE="nowhere.yaml")
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert (result.returncode, len(errors)) == (1, 2), result.stdout + result.stderr
    assert "nowhere.yaml" in errors[0]
    assert "PERDURE_DATABASE_URL" in errors[1]


def test_a_setting_that_is_no_good_is_told_in_words_of_ours() -> None:
    sentence = the_sentence(perdure_server("check", PERDURE_LEASE_TTL="soon"))
    assert sentence.startswith("PERDURE_LEASE_TTL: ")
    assert sentence.endswith("(seconds, as 15, or ISO 8601, as PT15S)")
    sentence = the_sentence(perdure_server("check", PERDURE_AUTH__JWKS_URL="http://x.example/keys"))
    assert sentence.startswith("PERDURE_AUTH__JWKS_URL: must be https")


@pytest.mark.parametrize("command", [["dev"], ["serve"], ["migrate"], ["check"], ["documents"], ["documents", "load"]])
def test_each_command_says_what_it_does(command: list[str]) -> None:
    usage, text, *_ = perdure_server(*command, "--help").stdout.split("\n\n")
    assert (usage.startswith("usage: "), text[0].isupper(), text[-1]) == (True, True, "."), text


def test_migrate_makes_an_empty_database_ready_and_a_second_one_changes_nothing(empty_database_url: str) -> None:
    for _ in range(2):
        result = new_perdure_server("migrate", PERDURE_DATABASE_URL=empty_database_url)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "the schema is up to date"
    assert perdure_server("check", PERDURE_DATABASE_URL=empty_database_url).returncode == 0


# ---- dbos-config.yaml ------------------------------------------------------------------------------------------------


def test_the_database_of_a_dbos_config_is_honoured(database_url: str, tmp_path: Path) -> None:
    url = url_in_form(database_url, "postgresql")
    (tmp_path / "dbos-config.yaml").write_text(f"name: app\nsystem_database_url: {json.dumps(url)}\n")
    result = perdure_server("check", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "ready to serve"


def test_the_environment_goes_before_a_dbos_config(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "dbos-config.yaml").write_text(f"system_database_url: {NOBODY_LISTENS}\n")
    assert perdure_server("check", cwd=tmp_path, PERDURE_DATABASE_URL=database_url).returncode == 0
    assert "nothing at 127.0.0.1:1" in the_finding(perdure_server("check", cwd=tmp_path))


@pytest.mark.parametrize("content", ["", "name: x", "system_database_url: 3", "a: ["])
def test_a_dbos_config_without_a_database_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "dbos-config.yaml").write_text(content)
    sentence = the_sentence(perdure_server("serve", cwd=tmp_path))
    assert "dbos-config.yaml" in sentence


# ---- the database goes away ------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(own_database_url: str) -> Iterator[DatabaseProxy]:
    proxy = DatabaseProxy(own_database_url)
    yield proxy
    proxy.close()


def test_calls_fail_soon_while_the_database_is_away_and_runs_go_on_after(
    own_database_url: str, proxy: DatabaseProxy
) -> None:
    environment = {"PERDURE_PARK_AFTER": "3600", "PERDURE_TEST_EFFECTS_URL": own_database_url}
    with ServerProcess(proxy.url, **environment) as server, Rpc(server.address) as rpc:
        run_id = rpc.start("counter", {"steps": 30, "delay_s": 0.05})
        waiting = rpc.start("listener", {})
        asking = rpc.start("asker", {})
        approval = rpc.approval_of(asking)
        rpc.until(waiting, "AWAITING_INPUT")
        eventually(lambda: len(effects(own_database_url, run_id)) >= 3)
        proxy.cut()
        calls = {
            "GetRun": lambda: rpc.get(run_id),
            "StartAgent": lambda: rpc.start("counter", {}, run_id=lost, request_id=lost),
            "ListRuns": lambda: rpc.runs.ListRuns(pb.ListRunsRequest()),
            "SignalRun": lambda: rpc.signal(waiting, "lost", request_id="lost"),
            "DecideApproval": lambda: rpc.decide(approval.approval_id),
            "CancelRun": lambda: rpc.cancel(asking),
        }
        lost = new_id()
        refusals_by_name = {}
        began = time.monotonic()
        futures = [(name, _in_thread(call)) for name, call in calls.items()]
        for name, answer in futures:
            refusals_by_name[name] = answer()
        took = time.monotonic() - began
        told = {name: refusal and (refusal.code.name, refusal.reason) for name, refusal in refusals_by_name.items()}
        assert told == dict.fromkeys(calls, ("UNAVAILABLE", "STORE_UNAVAILABLE"))
        for refusal in refusals_by_name.values():
            assert refusal is not None
            assert refusal.retry_delay_s
            assert "127.0.0.1" not in refusal.text
        assert took < scaled(12)
        proxy.mend()
        assert rpc_again(lambda: rpc.get(run_id))
        assert rpc.output_of(run_id) == {"total": 435}
        rpc_again(lambda: rpc.signal(waiting, "lost", request_id="lost"))
        assert rpc.output_of(waiting) == ["lost"]
        rpc_again(lambda: rpc.decide(approval.approval_id))
        assert rpc.output_of(asking)["approved"]
        assert rpc.start_call("counter", {}, run_id=lost, request_id=lost).created
        for one in (run_id, waiting, asking):
            events = rpc.events(one)
            assert sequences(events) == list(range(1, len(events) + 1))
            assert rpc.get(one).execution == 1
            assert states_in(events)[-1] == "SUCCEEDED"
    assert sorted(set(effects(own_database_url, run_id))) == sorted(f"count {number}" for number in range(30))


def _in_thread(call: Any) -> Any:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(refusal_of, call)
    pool.shutdown(wait=False)
    return future.result


def rpc_again(call: Any) -> Any:
    """Repeats a call while the store is unavailable, as RetryInfo asks for."""

    def attempt() -> Any:
        refusal = refusal_of(lambda: answers.append(call()))
        assert refusal is None or refusal.code is grpc.StatusCode.UNAVAILABLE, refusal
        return refusal is None

    answers: list[Any] = []
    eventually(attempt, 15)
    return answers[-1]


def test_a_watch_outlives_a_short_absence_of_the_database(own_database_url: str, proxy: DatabaseProxy) -> None:
    with ServerProcess(proxy.url) as server, Rpc(server.address) as rpc, Client(server.address) as client:
        # One step whose body needs no database: it has nothing to fail by.
        run_id = rpc.start("talker", {"pieces": 40, "pause_s": 0.1})
        reading = Reading(rpc.watch(run_id))
        seen: list[int] = []
        watch = client.watch(run_id).events()
        seen.append(next(watch).sequence)
        eventually(lambda: len(reading.events) > 8)
        proxy.cut()
        before = len(reading.events)
        eventually(lambda: refusal_of(lambda: rpc.get(run_id)) is not None)
        proxy.mend()
        seen += [event.sequence for event in watch]
        assert seen == list(range(1, len(seen) + 1))
        assert state_of(rpc.end_of(run_id)) == "SUCCEEDED"
        reading.join()
        if reading.refusal is None:
            assert sequences(reading.events) == seen
        else:
            assert (reading.refusal.code.name, reading.refusal.reason) == ("UNAVAILABLE", "STORE_UNAVAILABLE")
            assert reading.refusal.retry_delay_s
        assert len(reading.events) >= before


def test_a_server_on_a_database_that_is_away_can_still_be_stopped(own_database_url: str, proxy: DatabaseProxy) -> None:
    with ServerProcess(proxy.url, PERDURE_DRAIN_TIMEOUT="1") as server:
        with Rpc(server.address) as rpc:
            rpc.until(rpc.start("listener", {}), "AWAITING_INPUT")
        proxy.cut()
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < scaled(12)


def test_a_database_server_that_is_shared_is_not_touched(database_server: DatabaseServer, database_url: str) -> None:
    """The embedded server of the session still answers, as every test before this one has cut its own way to it."""
    with sql(database_url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
