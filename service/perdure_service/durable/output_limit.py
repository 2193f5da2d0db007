"""How large a value may be that an agent produces, and what becomes of one that is larger, or that cannot be stored.

A value that the database refuses must not leave a run that nobody ends. So each value is measured as it will be
stored, in bytes, before the database sees it. What ends a run or a step may be large (see `payloads`); what is
published, streamed or asked is kept in its row, which should stay below 1 MiB (CockroachDB's advice):

* **the output of a run** in `persist` (`dbos/_core.py`), where DBOS serializes it: raising there ends the run as
  FAILED with `OutputTooLarge`, and a child's parent gets that error instead of the output;
* **the result of a step** as its checkpoint is written: the error is recorded in its place and raised in the agent's
  code. The body ran once and is not repeated, by no retry (they are over) and by no replay (which reads the error);
* **what is published, streamed or asked**: the call raises and nothing is written;
* **the arguments of a workflow that code starts** by DBOS's own calls, which know nothing of an agent's types: where
  they are no JSON the error says what to do instead.

**What if we die on the next line?** Nothing is kept in memory: a replay measures again, or reads what was recorded.
"""

from __future__ import annotations

from typing import Any

from dbos import WorkflowSerializationFormat, _core
from dbos._serialization import Serializer, serialize_args, serialize_exception, serialize_value_as
from dbos._sys_db import OperationResultInternal

from perdure_service.domain.authoring import OutputTooLarge
from perdure_service.durable import values
from perdure_service.durable.substitutes import substitute

_serialize_error = _core._serialize_exception_for_persistence

MAX_ROW_BYTES = 2**20
"""The largest value that is kept in its row: what is published, streamed or asked."""

PLAIN_JSON = (
    "Its arguments are stored as plain JSON: call the agent itself, which takes typed ones, or give DBOS.start_workflow"
    " and DBOS.enqueue_workflow plain values (`model.model_dump(mode='json')`)"
)


class OutputLimit:
    """The limit of one server, in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    def install(self) -> None:
        """Makes DBOS measure the outputs of runs, store any text that is returned or raised, and explain TypeErrors."""

        def measured(value: Any, serialization: str | None, serializer: Serializer) -> tuple[str | None, str]:
            text, name = serialize_value_as(value, serialization, serializer)
            text = _encodable(text or "")
            self.check_text("the output of the run", text)
            return text, name

        def storable(error: Exception, serialization: str | None, serializer: Serializer) -> str:
            return _encodable(_serialize_error(error, serialization, serializer))

        def explained(
            args: Any, kwargs: Any, serialization: WorkflowSerializationFormat | None, serializer: Serializer
        ) -> tuple[str, str]:
            try:
                return serialize_args(args, kwargs, serialization, serializer)
            except TypeError as error:
                if serialization is not WorkflowSerializationFormat.PORTABLE:
                    raise
                raise TypeError(f"{error}. {PLAIN_JSON}") from None

        # Looked up by these names in the module: the first two by `persist`, the last by whatever starts a workflow.
        substitute(_core, "serialize_value_as", measured)
        substitute(_core, "_serialize_exception_for_persistence", storable)
        substitute(_core, "serialize_args", explained)

    def check_text(self, what: str, text: str) -> None:
        """Refuses a text that takes more than the limit.

        Raises:
            OutputTooLarge: It is too large.
        """
        self.check_size(what, len(text.encode()))

    def check_size(self, what: str, size_bytes: int) -> None:
        """Refuses what takes more bytes than the limit.

        Raises:
            OutputTooLarge: It is too large.
        """
        self._check(what, size_bytes, self.max_bytes, "PERDURE_MAX_OUTPUT_BYTES")

    def check_row(self, what: str, text: str) -> None:
        """Refuses a text that takes more than the limit, or than a row.

        Raises:
            OutputTooLarge: It is too large.
        """
        self.check_text(what, text)
        self._check(what, len(text.encode()), MAX_ROW_BYTES, "the most for a value of this kind")

    @staticmethod
    def _check(what: str, size_bytes: int, max_bytes: int, why: str) -> None:
        if size_bytes > max_bytes:
            raise OutputTooLarge(
                f"{what} takes {size_bytes} bytes, more than {max_bytes} ({why}); "
                "keep it elsewhere and return a reference"
            )

    def check(self, what: str, value: Any) -> None:
        """Refuses a value whose JSON takes more than the limit, or than a row.

        Raises:
            OutputTooLarge: It is too large.
        """
        self.check_row(what, values.to_json(value))

    def refuse_result(self, result: OperationResultInternal, serializer: Serializer) -> OutputTooLarge | None:
        """Puts an error in the place of a step's result that is too large; returns it, to be raised once recorded."""
        output = result["output"]
        if output is None:
            return None
        try:
            self.check_text(f"the result of step {result['function_name']!r}", output)
        except OutputTooLarge as error:
            result["output"] = None
            result["error"], result["serialization"] = serialize_exception(error, None, serializer)
            return error
        return None


def _encodable(text: str) -> str:
    """Returns JSON or ASCII text that a database takes: half a surrogate pair as JSON's escape of it.

    It cannot be encoded, and a run whose end cannot be written would stay as it is for ever.
    """
    return text.encode(errors="backslashreplace").decode()
