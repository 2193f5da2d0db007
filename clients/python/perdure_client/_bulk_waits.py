"""How the ends of many runs are told, over one stream after the other: who has no answer is named again."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import grpc
from perdure.v1 import agent_run_service_pb2 as pb

from perdure_client import _requests
from perdure_client._config import Config
from perdure_client._convert import run_from
from perdure_client._errors import PerdureError, ServerUnavailable
from perdure_client._retry import Backoff, Patience
from perdure_client._rpc_errors import from_status, had_held
from perdure_client._transport import WAIT_RUNS, Exchange, Silence, Transport
from perdure_client._types import Run
from perdure_client._watch import call_metadata, failure_from

_NAMED_AT_ONCE = 1_000
"""Runs that one message may name."""
_SILENCE_S = 3600.0
"""After so long without an end the stream is opened anew. Runs may take days, and a connection that is dead is noticed
by its keepalive much sooner."""

_log = logging.getLogger("perdure_client")


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitResult:
    """What came of waiting for one of many runs: its end, or an error.

    Attributes:
        run_id: The run.
        run: The run as it ended, without input and output; None when it cannot be waited for.
        error: What `get` would raise; None when it has ended.
    """

    run_id: str
    run: Run | None = None
    error: PerdureError | None = None


class BulkWaiter:
    """Waits for what it is given; read it until None. Nothing is sent before the first read."""

    def __init__(self, transport: Transport, config: Config, runs: Iterable[Run | str]) -> None:
        self._transport = transport
        self._config = config
        self._unanswered = dict.fromkeys(map(_requests.run_id_of, runs))
        self._told: deque[WaitResult] = deque()
        self._backoff = Backoff()
        self._answered = False
        self._closed = False
        self._opened_s = 0.0
        self._outage: Patience | None = None
        self._stream: Exchange[pb.WaitRunsRequest, pb.WaitRunsResponse] | None = None

    async def read(self) -> WaitResult | None:
        """Returns the next end, in their order; None after the last, or after `close`.

        Raises:
            PerdureError: No run can be waited for, or no server answered for too long.
        """
        self._outage = None
        while not self._closed and not self._told:
            if not self._unanswered:
                self._cancel()
                return None
            try:
                await self._take()
            except PerdureError as failure:
                self._cancel()
                if self._closed:
                    return None
                if self._outage is None:
                    self._outage = Patience.of_outage(self._config, self._backoff, answered=self._answered)
                delay_s = self._outage.delay_before_repeat_s(failure)
                if delay_s is None:
                    raise
                _log.info("stream of ends broke, going on in %.2f s: %s", delay_s, failure)
                await self._transport.sleep(delay_s)
            except BaseException:
                self._cancel()
                raise
        return None if self._closed else self._told.popleft()

    def close(self) -> None:
        """Ends the stream. Runs go on."""
        self._closed = True
        self._cancel()

    async def _take(self) -> None:
        """Takes the next message of ends.

        Raises:
            PerdureError: The stream broke, or a run should be asked for again.
        """
        try:
            response = await self._open().read(_SILENCE_S)
        except grpc.RpcError as error:
            if had_held(error, self._opened_s):  # the server has had nothing to tell, which is no outage
                self._answered, self._outage = True, None
            raise failure_from(error, self._config) from error
        except Silence:
            self._cancel()  # nothing is wrong: the next one opens another
            return
        if response is None:
            raise ServerUnavailable(f"{self._config.address} ended the stream too early")
        self._answered = True
        self._backoff.reset()
        again: PerdureError | None = None
        for one in response.runs:
            failure = from_status(one.error) if one.WhichOneof("result") == "error" else None
            if failure is not None and failure.retryable:
                again = failure
            elif one.run_id in self._unanswered:
                del self._unanswered[one.run_id]
                run = None if failure is not None else run_from(one.run)
                self._told.append(WaitResult(run_id=one.run_id, run=run, error=failure))
        if again is not None and not self._told:
            raise again
        if again is not None:
            self._cancel()  # those that were told are read first, and then all others are asked for again

    def _open(self) -> Exchange[pb.WaitRunsRequest, pb.WaitRunsResponse]:
        if self._stream is None:
            self._opened_s = time.monotonic()
            self._stream = self._transport.exchange(WAIT_RUNS, metadata=call_metadata(self._config))
            run_ids = list(self._unanswered)
            for first in range(0, len(run_ids), _NAMED_AT_ONCE):
                named = run_ids[first : first + _NAMED_AT_ONCE]
                self._stream.send(pb.WaitRunsRequest(namespace=self._config.namespace, run_ids=named))
            self._stream.finish()
        return self._stream

    def _cancel(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()
