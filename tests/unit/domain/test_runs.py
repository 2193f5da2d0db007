"""Ids, states and hashes of runs."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perdure_service.domain import runs
from perdure_service.domain.runs import RunKey, RunState, derive_state, logged_state
from perdure_service.errors import InvalidArgument

run_ids = st.from_regex(runs.RUN_ID, fullmatch=True)
namespaces = st.from_regex(runs.NAMESPACE, fullmatch=True)
paths = st.lists(st.integers(0, 10_000), max_size=4)


@given(namespaces, run_ids, paths)
def test_a_run_and_its_children_are_found_by_both_of_their_ids(namespace: str, run_id: str, path: list[int]) -> None:
    api_id = ".".join([run_id, *map(str, path)])
    key = RunKey.of_api(namespace, api_id)
    assert RunKey.of_workflow(key.workflow_id) == key
    child = f"{key.workflow_id}-7"  # as DBOS names children
    assert RunKey.of_workflow(child) == RunKey.of_api(namespace, f"{api_id}.7")


@given(namespaces, namespaces, run_ids, run_ids)
def test_different_runs_have_different_workflow_ids(a: str, b: str, one: str, other: str) -> None:
    same = (a, one) == (b, other)
    assert (RunKey.of_api(a, one).workflow_id == RunKey.of_api(b, other).workflow_id) == same


def test_a_clients_id_is_never_taken_for_another_runs_child() -> None:
    assert RunKey.of_api("default", "foo-1").workflow_id != f"{RunKey.of_api('default', 'foo').workflow_id}-1"


@given(st.text(max_size=30))
def test_a_foreign_workflow_keeps_its_id(workflow_id: str) -> None:
    key = RunKey.of_workflow(workflow_id, "theirs")
    assert key.workflow_id == workflow_id
    assert key.run_id == workflow_id or re.fullmatch(r".+\..+\.r(-\d+)*", workflow_id)


def test_server_made_ids_are_in_order_of_time_and_not_for_clients() -> None:
    made = [runs.new_run_id() for _ in range(50)]
    assert len(set(made)) == 50
    assert [one[:20] for one in made] == sorted(one[:20] for one in made)
    for one in made:
        with pytest.raises(InvalidArgument, match="server-made"):
            runs.check_client_run_id(one)


@pytest.mark.parametrize("bad", ["", "A", "a_b", "-a", "a.b", "a" * 65, "ä", "a\n", "a/b"])
def test_malformed_ids_are_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="run_id"):
        runs.check_client_run_id(bad)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_the_hash_does_not_depend_on_the_order_of_members(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert runs.input_sha256("a", value) == runs.input_sha256("a", turned)
    assert runs.input_sha256("a", value) != runs.input_sha256("b", value)
    assert json.loads(runs.canonical_json(value)) == json.loads(json.dumps(value))


def test_what_json_does_not_have_has_no_hash() -> None:
    with pytest.raises(ValueError, match="JSON"):
        runs.input_sha256("a", {"x": math.nan})


STATUSES = ["DELAYED", "ENQUEUED", "PENDING", *sorted(runs.TERMINAL_STATUSES)]


def test_every_combination_has_a_state_and_only_terminal_statuses_are_terminal() -> None:
    for status, waiting, approvals, reason, execution in itertools.product(
        STATUSES, [None, "sleep", "signal:x", "approval"], [0, 2], [None, runs.DEADLINE_PASSED], [0, 1]
    ):
        state = derive_state(
            status, waiting_for=waiting, open_approvals=approvals, end_reason=reason, execution=execution
        )
        assert state.terminal == (status in runs.TERMINAL_STATUSES)
    with pytest.raises(ValueError, match="unknown"):
        derive_state("NEW", waiting_for=None, open_approvals=0, end_reason=None, execution=0)


@pytest.mark.parametrize(
    ("waiting_for", "state"),
    [
        (None, RunState.RUNNING),
        ("sleep", RunState.SLEEPING),
        ("signal:x", RunState.AWAITING_INPUT),
        ("approval", RunState.AWAITING_INPUT),
    ],
)
def test_the_log_last_told_of_what_the_run_waits_for(waiting_for: str | None, state: RunState) -> None:
    assert logged_state("PENDING", waiting_for=waiting_for, execution=1) is state
    assert logged_state("DELAYED", waiting_for=waiting_for, execution=1) is state, "parked"
    assert logged_state("ENQUEUED", waiting_for=waiting_for, execution=1) is RunState.QUEUED
