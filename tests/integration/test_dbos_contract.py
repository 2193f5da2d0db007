"""What we rely on in DBOS 3.4 and its documentation does not promise: fails when an upgrade changes it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import dbos
import pytest
from dbos import DBOS, _core, _dbos, _migration, _outcome, _queue, _sys_db, _sys_db_postgres, _workflow_commands
from dbos._error import DBOSUnexpectedStepError
from dbos._event_loop import BackgroundEventLoop
from dbos._schemas.system_database import SystemSchema
from perdure_service.domain.runs import TERMINAL_STATUSES
from perdure_service.durable import hops, parking, replay, retries, runtime, steps, substitutes
from perdure_service.durable.executions import Parked
from perdure_service.durable.status_changes import SWEEPS
from perdure_service.durable.system_database import PerdureSystemDatabase
from perdure_service.store import dbos_tables

HANDLED = {
    # starts: the hook `_insert_workflow_status` sees them all, but for the batch and the fork
    "_insert_workflow_status",
    "init_workflows",
    "fork_workflow",
    # the end
    "update_workflow_outcome",
    "_update_workflow_outcome_in_transaction",
    # changes from outside, inside `_changing`
    "cancel_workflows",
    "resume_workflows",
    "dead_letter_workflows",
    "reenqueue_for_recovery",
    "rewind_workflow",
    # sweeps, which are ours
    "transition_delayed_workflows",
    "cancel_timed_out_workflows",
    # claims, inside `_begin`
    "start_queued_workflows",
    "start_queued_partitioned_workflows",
}
"""DBOS's methods that write a status; each is covered by `PerdureSystemDatabase`."""


OURS = {
    name: member
    for cls in reversed(PerdureSystemDatabase.__mro__)
    if cls.__module__.startswith("perdure_service.")
    for name, member in vars(cls).items()
}
"""What our system database adds to DBOS's, or overrides."""


def _writers_of_status() -> set[str]:
    """Returns the methods of DBOS's system database that put a value into the column `status`."""
    tree = ast.parse(Path(inspect.getfile(_sys_db)).read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SystemDatabase")
    writers = set()
    for method in cls.body:
        if not isinstance(method, ast.FunctionDef) or "schedule" in method.name:  # schedules have a status, too
            continue
        for call in (n for n in ast.walk(method) if isinstance(n, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            keywords = {keyword.arg for keyword in call.keywords}
            if "status" in keywords and (name == "values" or (name == "dict" and "workflow_uuid" in keywords)):
                writers.add(method.name)
        for literal in (n for n in ast.walk(method) if isinstance(n, ast.Dict)):
            keys = {key.value for key in literal.keys if isinstance(key, ast.Constant)}
            if {"workflow_uuid", "status", "queue_name", "creator_xid"} <= keys:
                writers.add(method.name)
    return writers


def test_every_writer_of_a_status_is_covered() -> None:
    assert _writers_of_status() == HANDLED
    overridden = set(OURS)
    assert HANDLED - {"_update_workflow_outcome_in_transaction"} <= overridden


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, member in OURS.items()
        if inspect.isfunction(member) and name != "__init__" and hasattr(_sys_db_postgres.PostgresSystemDatabase, name)
    ),
)
def test_what_is_overridden_still_takes_the_same_arguments(name: str) -> None:
    theirs = inspect.signature(getattr(_sys_db_postgres.PostgresSystemDatabase, name))
    ours = inspect.signature(getattr(PerdureSystemDatabase, name))
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in ours.parameters.values())
    missing = set(theirs.parameters) - set(ours.parameters)
    assert takes_anything or not missing, f"{name} has new parameters: {missing}"
    for parameter in ours.parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in theirs.parameters:
            continue
        assert parameter.default is not parameter.empty, f"DBOS does not pass {parameter.name} to {name}"


def test_every_transaction_goes_through_the_engine_or_begin() -> None:
    """`engine.connect()` is a transaction that we do not see; DBOS uses it where nothing of a run is written."""
    tree = ast.parse(Path(inspect.getfile(_sys_db)).read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SystemDatabase")
    users = {
        method.name
        for method in cls.body
        if isinstance(method, ast.FunctionDef)
        for call in ast.walk(method)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self.engine.connect"
    }
    assert users == {"update_workflow_outcome", "_begin"}


def _decorated_with_retry() -> set[str]:
    """Returns the methods of DBOS's system databases that its `db_retry` decorates."""
    return {
        method.name
        for module in (_sys_db, _sys_db_postgres)
        for cls in ast.parse(Path(inspect.getfile(module)).read_text()).body
        if isinstance(cls, ast.ClassDef)
        for method in cls.body
        if isinstance(method, ast.FunctionDef)
        for decorator in method.decorator_list
        if "db_retry" in ast.unparse(decorator)
    }


def test_every_repeat_of_a_transaction_is_ours() -> None:
    """DBOS decorates its methods at import, and closures when they are called; both get our pauses."""
    plain = {name for _, name, _ in retries.decorated()}
    assert plain == _decorated_with_retry()
    assert len(plain) > 30
    assert set(inspect.signature(_sys_db.db_retry).parameters) == {"initial_backoff", "max_backoff", "sys_db"}
    retries.install()
    try:
        assert _sys_db.db_retry is retries.repeated
        assert not list(retries.decorated())
        assert inspect.signature(PerdureSystemDatabase.get_workflow_owner).parameters
    finally:
        substitutes.restore()
    assert {name for _, name, _ in retries.decorated()} == plain


def test_dbos_decides_what_is_repeated_and_looks_at_these_two_attributes() -> None:
    text = inspect.getsource(_sys_db.db_retry)
    for known in ("retriable_postgres_exception", "sa.exc.TimeoutError", "_retry_connection_errors", "_is_sqlite"):
        assert known in text
    assert "db_retry" not in inspect.getsource(_dbos)


def test_the_tables_we_name_have_the_columns_we_use() -> None:
    tables = {table.name: table for table in SystemSchema.metadata_obj.tables.values()}
    for name, columns in dbos_tables.COLUMNS_USED.items():
        assert set(columns) <= set(tables[name].columns.keys())


def test_the_statuses_are_the_ones_we_know() -> None:
    known = {status.value for status in _sys_db.WorkflowStatusString}
    assert known == TERMINAL_STATUSES | {"PENDING", "ENQUEUED", "DELAYED"}


def test_steps_and_workflows_are_run_by_the_functions_we_replace() -> None:
    source = Path(inspect.getfile(_core)).read_text()
    assert source.count("invoke_step(") >= 3  # its definition, the decorator, run_step
    parameters = inspect.signature(steps._dbos_invoke_step).parameters
    assert {"step_name", "retries_allowed", "interval_seconds", "max_attempts", "backoff_rate", "should_retry"} <= set(
        parameters
    )
    assert list(inspect.signature(runtime._plain_execute_async).parameters)[:4] == ["dbos", "status", "func", "ctx"]
    assert list(inspect.signature(runtime._plain_execute_thread).parameters)[:4] == ["dbos", "status", "func", "ctx"]
    assert list(inspect.signature(_core.execute_dequeued_workflow).parameters) == ["dbos", "status", "owner_xid"]
    # `output_limit` measures outputs where DBOS serializes them, so that an output it refuses ends the run as an error.
    persist = inspect.getsource(replay._plain_get_wf_invoke_func)
    assert persist.count("serialize_value_as(") == source.count("serialize_value_as(") == 1
    assert persist.index("try:") < persist.index("serialize_value_as(") < persist.index("except Exception as error:")
    assert persist.count("_serialize_exception_for_persistence(") == 1
    assert inspect.getsource(_core._assemble_workflow_status).count("serialize_args(") == 1
    assert source.replace("deserialize_args(", "").count("serialize_args(") == 1  # whatever starts one comes there


def test_dbos_creates_its_system_database_by_the_one_factory_with_keywords() -> None:
    folder = Path(inspect.getfile(dbos)).parent
    calls = [
        (path.name, call)
        for path in (folder / "_dbos.py", folder / "_client.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "SystemDatabase.create"
    ]
    assert len(calls) == 3
    assert all(not call.args for _, call in calls)


def test_every_workflow_function_ends_in_the_one_function_we_replace() -> None:
    source = Path(inspect.getfile(_core)).read_text()
    assert source.count("_get_wf_invoke_func(") == 4  # its definition; threads, tasks, and workflows called directly
    parameters = list(inspect.signature(replay._plain_get_wf_invoke_func).parameters)
    assert parameters == ["dbos", "status", "release_active"]


def test_an_unexpected_step_tells_run_number_met_and_recorded_name() -> None:
    error = DBOSUnexpectedStepError("run", 3, "met", "recorded")
    assert error.inputs == ("run", 3, "met", "recorded")
    assert "recorded was recorded when met was expected" in str(error)


def test_what_stops_when_an_engine_dies_is_there() -> None:
    launch = inspect.getsource(_dbos.DBOS._launch)
    assert "self._executor_field = ThreadPoolExecutor(" in launch
    assert "self._background_event_loop.start(self._executor_field)" in launch
    destroy = inspect.getsource(_dbos.DBOS._destroy)
    for name in ("background_thread_stop_events", "_background_jobs_stop_event", "_executor_field is not None"):
        assert name in destroy
    loop = inspect.getsource(BackgroundEventLoop)
    assert "daemon=True" in loop
    assert "if not self._running or self._loop is None or self._thread is None:\n            return" in loop
    assert "self._run_background_processes" in inspect.getsource(_sys_db_postgres.PostgresSystemDatabase.run_notifier)


# ---- parking ---------------------------------------------------------------------------------------------------------


def test_the_waits_of_dbos_are_the_ones_that_are_ours() -> None:
    """What waits without us would keep its run in memory, or be cut off by the parking of another wait."""
    for cls, wait in ((_core.WorkflowHandleFuture, "future.result()"), (_core.WorkflowHandleAsyncTask, "self.task")):
        result = inspect.getsource(vars(cls)["_get_result"])
        assert result.count(wait) == 1
        assert "except (DBOSWorkflowCancelledError, DBOSAwaitedWorkflowCancelledError):" in result, "it asks the row"
        assert list(inspect.signature(vars(cls)["_get_result"]).parameters) == ["self", "polling_interval_sec"]
    for cls in (_core.WorkflowHandlePolling, _core.WorkflowHandleAsyncPolling):
        assert "await_workflow_result" in inspect.getsource(cls)
    waits = {
        name
        for name, member in vars(_sys_db.SystemDatabase).items()
        if inspect.isfunction(member)
        and re.search(r"(time|asyncio)\.sleep\(|\.wait(_async)?\(", inspect.getsource(member))
    }
    between_attempts = {"write_stream_from_step", "write_stream_from_workflow", "_notification_listener_polling"}
    ours = {
        "recv", "recv_async", "get_event", "get_event_async", "await_workflow_result", "await_workflow_result_async",
        "await_first_workflow_id", "await_first_workflow_id_async",
    }  # fmt: skip
    assert ours <= waits & set(OURS)
    assert waits - ours - between_attempts == set()


def test_sleeps_and_the_timed_wait_are_class_methods_that_sleep_after_their_record() -> None:
    source = {name: inspect.getsource(vars(DBOS)[name].__func__) for name in ("sleep", "sleep_async")}
    assert source["sleep"].index("record_sleep(") < source["sleep"].index("time.sleep(duration)")
    assert source["sleep_async"].index("record_sleep,") < source["sleep_async"].index("asyncio.sleep(duration)")
    assert "timeout" in inspect.signature(parking._plain_asyncio_wait).parameters


def test_what_ends_a_parked_execution_is_recorded_by_nobody() -> None:
    assert not issubclass(Parked, Exception)
    persist = inspect.getsource(replay._plain_get_wf_invoke_func)
    assert "BaseException" not in persist, "an outcome is made of exceptions only"
    assert "resolve_deferred" in inspect.getsource(_outcome.Immediate)
    assert "isinstance(result, DeferredResult)" in inspect.getsource(_outcome.Pending)
    assert _sys_db._dbos_null_topic == dbos_tables.NULL_TOPIC


def test_an_attempt_is_counted_by_the_claim_and_by_the_start_that_runs_at_once() -> None:
    assert "recovery_attempts=(1 if wf_status not in _enqueued_statuses else 0)" in _source_of(
        "_insert_workflow_status"
    )
    claim = re.sub(r"\s|#.*", "", _source_of("start_queued_workflows"))
    assert "recovery_attempts=self.tables.workflow_status.c.recovery_attempts+1" in claim


# ---- forks and deletions ---------------------------------------------------------------------------------------------


def _source_of(name: str) -> str:
    return inspect.getsource(getattr(_sys_db.SystemDatabase, name))


def test_a_deletion_reaches_every_table_of_a_workflow() -> None:
    source = _source_of("_delete_workflows")
    assert source.count("self.engine.begin()") == 1, "one transaction, which ours is in"
    for table in SystemSchema.metadata_obj.tables.values():
        columns = {"workflow_uuid", "destination_uuid"} & set(table.columns.keys())
        if not columns:
            continue
        cascades = any(key.ondelete == "CASCADE" for name in columns for key in table.columns[name].foreign_keys)
        assert cascades or f"self.tables.{table.name}" in source, table.name


def test_a_fork_is_one_transaction_that_copies_everything_below_a_step() -> None:
    source = _source_of("fork_workflow")
    assert source.count("self.engine.begin()") == 1
    for name in ("operation_outputs", "workflow_events_history", "workflow_events", "streams", "workflow_input"):
        assert f"self.tables.{name}" in source, name
    parameters = inspect.signature(_sys_db.SystemDatabase.fork_workflow).parameters
    assert {"original_workflow_ids", "forked_workflow_ids", "start_steps", "application_version", "queue_name"} <= set(
        parameters
    )


def test_a_wait_with_a_timeout_takes_two_numbers_and_a_result_is_read_again_in_a_replay() -> None:
    """What `domain.forks` knows of recorded steps."""
    source = Path(inspect.getfile(dbos)).with_name("_dbos.py").read_text()
    assert source.count("timeout_function_id = ctx.curr_step_function_id + 1") == 4  # recv and get_event, async too
    assert 'function_name="DBOS.getResult"' in _source_of("record_get_result")
    assert "check_operation_execution" not in _source_of("await_workflow_result")


def test_a_queue_thread_waits_on_its_event_alone_and_asks_us_before_each_claim() -> None:
    source = inspect.getsource(_queue.queue_worker_thread)
    assert set(re.findall(r"stop_event\.(\w+)", source)) == {"wait", "is_set"}
    assert source.count("stop_event.wait(") == 1
    assert source.index("get_queue(") < source.index("stop_event.wait(") < source.index("dequeue_scopes(")
    assert "count_for_queue(queue.name)" in source
    assert "target=queue_worker_thread" in inspect.getsource(_queue.queue_thread)


def test_a_claim_chooses_its_rows_by_the_gate_and_takes_those_that_we_leave_it() -> None:
    source = inspect.getsource(_sys_db.SystemDatabase.start_queued_workflows)
    begin, gate, chosen, flipped = (
        source.index(part) for part in ("self._begin(", "self._claim_gate(", "self._wf_in(", ".returning(")
    )
    assert begin < source.index("queue._worker_concurrency is not None") < gate < chosen < flipped
    assert source.count("self._wf_in(") == 1


def test_a_child_that_was_queued_is_waited_for() -> None:
    for function in (_core.start_workflow, _core.start_workflow_async, _core.workflow_wrapper):
        assert "should_execute" in inspect.getsource(function)


def _calls_of(module: object, function: str) -> list[str]:
    """Returns what is called with `function`, anywhere in a module, as source."""
    tree = ast.parse(Path(inspect.getfile(module)).read_text())  # type: ignore[arg-type]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
    return sorted(ast.unparse(call) for call in calls)


def test_outcomes_give_their_stages_to_threads_and_nothing_else() -> None:
    assert _calls_of(_outcome, "asyncio.to_thread") == [
        "asyncio.to_thread(after, lambda: Pending._raise(saved_exp))",
        "asyncio.to_thread(after, lambda: value)",
        "asyncio.to_thread(before)",
        "asyncio.to_thread(interceptor)",
    ]


def test_the_stages_that_are_answered_on_the_loop_are_those_of_a_step_and_the_one_that_returns_another() -> None:
    assert {code.co_qualname for code in hops.stages()} == {
        "invoke_step.<locals>.check_existing_result",
        "invoke_step.<locals>.record_step_result",
        "Pending.then.<locals>.<lambda>.<locals>.<lambda>",
    }
    assert replay.stage().co_qualname == "install.<locals>.get_wf_invoke_func.<locals>.observed"
    first = _outcome.Pending.then.__code__.co_consts
    assert len([code for code in first if inspect.iscode(code)]) == 1
    source = inspect.getsource(_outcome.Pending.then)
    assert "lambda: next" in source, "it returns what it was given, and does nothing"


def test_a_stage_gets_nothing_but_a_result_so_that_it_can_run_twice() -> None:
    source = inspect.getsource(_core.invoke_step)
    assert ".then(record_step_result)" in source
    assert ".intercept(check_existing_result, dbos=dbos)" in source
    assert ".then(_get_wf_invoke_func(dbos, status, entry.release))" in inspect.getsource(_core._execute_workflow_async)


def test_a_task_is_begun_by_a_coroutine_that_waits_for_nothing() -> None:
    assert hops.start_of_task().co_name == "start_workflow_task"
    tree = ast.parse(Path(inspect.getfile(_core)).read_text())
    (begins,) = (n for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef) and n.name == "start_workflow_task")
    assert not [n for n in ast.walk(begins) if isinstance(n, ast.Await | ast.AsyncFor | ast.AsyncWith)]
    assert "dbos._background_event_loop.submit_coroutine(start_workflow_task())" in _calls_of(
        _core, "dbos._background_event_loop.submit_coroutine"
    )


OWN_WAYS = {
    steps._dbos_invoke_step: "f60e7b0bb683cf4f",
    _outcome.Pending._wrap: "ed2dee2ae3a28d04",
    _outcome.Pending._intercept: "68d426af693b07de",
    _outcome.Pending._also: "5138edc7c3c08f0c",
    runtime._plain_execute_async: "ab534cdce293e4b2",
    _core.execute_dequeued_workflow: "2434b435322ba8bb",
    _core._dropping_datasource_checkpoints: "bf450628129d9758",
    _workflow_commands.delete_completed_datasource_checkpoints_async: "b8b8cc92a0bd9e30",
}
"""What `plain_steps` and `plain_runs` do in DBOS's place, by what they do it instead of. When one of these changes,
compare it with ours, and then note it here."""


@pytest.mark.parametrize("function", OWN_WAYS, ids=lambda function: function.__qualname__)
def test_what_we_do_in_dboss_place_has_not_changed_there(function: Callable[..., object]) -> None:
    assert hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16] == OWN_WAYS[function]


def test_operations_are_recorded_by_their_owner_only() -> None:
    """What `durable.recording` rests on: who writes a run's operations, and that each asks for the owner first."""
    tree = ast.parse(Path(inspect.getfile(_sys_db)).read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SystemDatabase")
    methods = {n.name: ast.unparse(n) for n in cls.body if isinstance(n, ast.FunctionDef)}
    table = r"(self\.tables\.operation_outputs|\boo\b|\btable\b)"
    inserts = re.compile(rf"insert\({table}\)")
    changes = re.compile(rf"(update|delete)\({table}\)")
    recorders = {name for name, source in methods.items() if inserts.search(source) and "operation_outputs" in source}
    assert recorders == {"_record_operation_result_txn", "record_get_result", "init_child_workflow", "fork_workflow"}
    for name in recorders - {"fork_workflow"}:
        assert "_check_owner_txn(" in methods[name]
    # A rewind takes the run from its owner, a deletion takes all of it, and a new name of the application is no output.
    assert {name for name, source in methods.items() if changes.search(source) and "operation_outputs" in source} == {
        "rewind_workflow", "_delete_workflows", "rename_application",
    }  # fmt: skip


# ---- hints -----------------------------------------------------------------------------------------------------------


def test_dbos_tells_of_messages_values_and_entries_by_these_channels_and_names() -> None:
    channels = (
        _sys_db._dbos_notifications_channel,
        _sys_db._dbos_workflow_events_channel,
        _sys_db._dbos_streams_channel,
    )
    assert channels == dbos_tables.NOTIFICATION_CHANNELS
    migrations = Path(inspect.getfile(_migration)).read_text()
    for payload, channel in zip(
        ("NEW.destination_uuid || '::' || NEW.topic", "NEW.workflow_uuid || '::' || NEW.key"), channels, strict=False
    ):
        assert f"payload text := {payload};\nBEGIN\n    PERFORM pg_notify('{channel}', payload);" in migrations
    assert 'payload = f"{workflow_id}::{name}"' in inspect.getsource(_sys_db.SystemDatabase._waiter)
    for name in ("notifications_map", "workflow_events_map", "streams_map"):
        assert f"self.{name} = ThreadSafeEventDict()" in inspect.getsource(_sys_db.SystemDatabase.__init__)


def test_the_thread_that_listens_and_those_of_queues_are_the_ones_we_replace() -> None:
    assert "self._notification_listener()" in inspect.getsource(_sys_db.SystemDatabase.run_notification_listener)
    assert "_notification_listener" in OURS
    assert "target=queue_thread, args=(evt, self)" in inspect.getsource(_dbos.DBOS._launch)
    manager = inspect.getsource(_queue.queue_thread)
    assert "stop_event.wait(timeout=check_interval)" in manager
    assert "args=(stop_event, dbos, queue)" in manager
    assert manager.count("stop_event.") == 2, "it asks it for nothing else than we answer"


def test_the_thread_that_notifies_is_the_one_we_replace() -> None:
    theirs = inspect.getsource(_sys_db_postgres.PostgresSystemDatabase.run_notifier)
    assert "time.sleep(self._notification_coalesce_sec)\n                self._flush_notifications()" in theirs
    assert "target=self._sys_db.run_notifier" in inspect.getsource(_dbos.DBOS._launch)
    signal = inspect.getsource(_sys_db_postgres.PostgresSystemDatabase._signal_notification)
    assert "with self._notifier_lock:\n            self._pending_notifications" in signal, "there before we set ours"
    assert {"run_notifier", "_signal_notification"} <= set(OURS)


def test_the_sweeps_run_only_under_the_lock_that_we_ask_for_first() -> None:
    source = inspect.getsource(_workflow_commands.background_jobs_thread)
    assert f'"{SWEEPS}"' in source
    assert "with dbos._sys_db.background_job_lock(lock_name) as acquired:\n                if acquired:" in (
        inspect.getsource(_workflow_commands._run_background_jobs)
    )


def test_a_row_that_is_to_be_queued_differs_by_run_in_id_and_queue_only() -> None:
    """What `Runtime._template` rests on."""
    source = inspect.getsource(_core._assemble_workflow_status)
    for own in ("time.time", "now(", "uuid"):
        assert own not in source.replace("workflow_uuid", "").replace("GlobalParams", ""), own
