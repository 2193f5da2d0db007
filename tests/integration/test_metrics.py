"""What Prometheus sees of a server: every metric of the table, with the attributes that the table allows."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from perdure_client import Client, RunState
from perdure_service.telemetry import METRICS
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.server import ServerProcess, create_effects_table
from tests.helpers.waiting import eventually, free_port

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def metrics_address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def server(database_url: str, metrics_address: str) -> Iterator[ServerProcess]:
    create_effects_table(database_url)
    with ServerProcess(database_url, PERDURE_METRICS_ADDRESS=metrics_address, PERDURE_MAX_RUNNING="2") as process:
        yield process


def scrape(address: str) -> Samples:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as response:  # the test's own server
        text = response.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """Returns the sum of all samples of a name that have these labels; 0 when there are none."""
    return sum(v for (n, have), v in samples.items() if n == name and set(labels.items()) <= set(have))


def test_a_scrape_tells_what_the_server_did(server: ServerProcess, metrics_address: str) -> None:
    with Client(server.address) as client:
        client.start("flaky", {"failures": 2}, run_id="metered")
        assert client.wait("metered").succeeded
        waiting = [client.start("listener", {}, run_id=f"waits-{n}") for n in range(2)]
        for run in waiting:
            eventually(lambda run=run: client.get(run).state is RunState.AWAITING_INPUT)
        # Only now: while the slot of the first run is given back, whoever comes next may find it free.
        client.start("counter", {"steps": 1}, run_id="queued")
        with client.watch("waits-0") as updates:
            next(iter(updates))
            first = scrape(metrics_address)
            assert value(first, "perdure_watchers", perdure_watch="run") == 1
            client.signal("waits-0", "more", 1)
            assert client.wait("queued").succeeded, "its turn came when a slot was free"
        with pytest.raises(Exception, match="no run"):
            client.get("nosuch")
        client.cancel("waits-1")

    samples = scrape(metrics_address)
    ours = {name for name, _ in samples}
    assert value(first, "perdure_runs", perdure_agent="listener", perdure_state="AWAITING_INPUT") == 2
    assert value(first, "perdure_runs", perdure_agent="counter", perdure_state="QUEUED") == 1
    assert value(first, "perdure_queue_age_seconds") > 0
    assert value(first, "perdure_executions") == 2
    flaky = {"perdure_agent": "flaky", "perdure_step_name": "flaky_step"}
    assert value(samples, "perdure_step_attempts_total", **flaky, perdure_outcome="retried") == 2
    assert value(samples, "perdure_step_attempts_total", **flaky, perdure_outcome="succeeded") == 1
    assert value(samples, "perdure_step_duration_seconds_count", **flaky) == 1
    assert value(samples, "perdure_run_start_latency_seconds_count") == 4
    assert value(samples, "perdure_run_start_latency_seconds_sum", perdure_agent="counter") > 0, "it was queued"
    # Each but the queued one begins at once, unless a claim is just looking: the first one when a server begins.
    waited = [
        value(samples, "perdure_run_start_latency_seconds_sum", perdure_agent=one) for one in ("flaky", "listener")
    ]
    assert min(waited) == 0, "they were not"
    for agent, state in (("flaky", "SUCCEEDED"), ("listener", "CANCELLED")):
        assert value(samples, "perdure_run_duration_seconds_count", perdure_agent=agent, perdure_state=state) == 1
    assert value(samples, "perdure_event_lag_seconds_count") > 0
    assert value(samples, "db_client_connection_count") > 0
    assert value(samples, "db_client_connection_max") == 20
    get_run = {"rpc_method": "perdure.v1.AgentRunService/GetRun"}
    assert value(samples, "rpc_server_call_duration_seconds_count", **get_run, rpc_response_status_code="OK") > 0
    assert (
        value(samples, "rpc_server_call_duration_seconds_count", **get_run, rpc_response_status_code="NOT_FOUND") == 1
    )
    assert "target_info" in ours

    # Nothing but what the table has; and no id of a run anywhere.
    allowed = {label.replace(".", "_") for metric in METRICS for label in metric.attributes} | {"le"}
    names = tuple(metric.name.replace(".", "_") for metric in METRICS)
    for name, labels in samples:
        if name != "target_info":
            assert name.startswith(names), name
            assert {label for label, _ in labels} <= allowed
            assert not [text for _, text in labels if text in ("metered", "queued", "waits-0", "default")]


def test_counts_of_runs_are_asked_for_once_in_a_while(server: ServerProcess, metrics_address: str) -> None:
    before = scrape(metrics_address)
    with Client(server.address) as client:
        run = client.start("listener", {})
        eventually(lambda: client.get(run).state is RunState.AWAITING_INPUT)
        after = scrape(metrics_address)
        client.cancel(run)
    of_runs = [
        {labels: v for (name, labels), v in samples.items() if name == "perdure_runs"} for samples in (before, after)
    ]
    assert of_runs[0] == of_runs[1], "the same answer within 15 seconds, whoever asks"


def test_a_port_in_use_is_told_in_one_sentence(server: ServerProcess, metrics_address: str) -> None:
    for address, why in ((metrics_address, "Address already in use"), ("127.0.0.1:nine", "it must be HOST:PORT")):
        other = ServerProcess(server.database_url, command="serve", PERDURE_METRICS_ADDRESS=address)
        with pytest.raises(RuntimeError, match="PERDURE_METRICS_ADDRESS") as caught, other:
            pass
        assert why in str(caught.value)
        assert "Traceback" not in str(caught.value)
    with grpc.insecure_channel(server.address) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
