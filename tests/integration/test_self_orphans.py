"""Runs that the database has as running on an executor which does not run them: it finds them and puts them back."""

from __future__ import annotations

import time

from tests.helpers.rpc import Rpc, in_seconds, only, sequences
from tests.helpers.server import ServerProcess, effects, sql


def test_a_run_whose_claim_was_committed_and_never_heard_of_is_found_and_run_once(own_server: ServerProcess) -> None:
    with own_server, Rpc(own_server.address) as rpc:
        run_id = rpc.start("counter", {"steps": 2}, start_time=in_seconds(3600))
        workflow_id = f"default.{run_id}.r"
        # What a claim has written of which the reply was lost: a living owner, and nobody who executes.
        with sql(own_server.database_url) as connection:
            (executor_id,) = connection.execute("SELECT executor_id FROM perdure.executor").fetchone() or ("",)
            connection.execute(
                "UPDATE dbos.workflow_status SET status = 'PENDING', executor_id = %s, owner_xid = 'nobody', "
                "delay_until_epoch_ms = NULL, updated_at = %s WHERE workflow_uuid = %s",
                (executor_id, int(time.time() * 1000) - 3_600_000, workflow_id),
            )
        assert rpc.output_of(run_id) == {"total": 1}
        events = rpc.events(run_id)
        (recovered,) = only(events, "recovered")
        assert recovered.recovered.from_executor_id == executor_id
        reasons = [event.state_changed.reason for event in only(events, "state_changed")]
        assert "its executor never began it" in reasons
        assert effects(own_server.database_url, run_id) == ["count 0", "count 1"]
        assert sequences(events) == list(range(1, len(events) + 1))
