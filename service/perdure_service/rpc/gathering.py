"""Puts the answers of several cells together: lists that say which regions are missing, deletions, the inbox."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any, Protocol, TypeVar

from perdure.v1 import agent_run_service_pb2 as pb
from perdure.v1 import approval_service_pb2 as approval_pb

from perdure_service.domain.approvals import ApprovalState
from perdure_service.domain.regions import Cell, Place
from perdure_service.domain.runs import RunKey
from perdure_service.errors import PerdureError
from perdure_service.rpc import approval_requests, requests
from perdure_service.rpc.calls import current_call
from perdure_service.rpc.handlers import RpcContext
from perdure_service.rpc.streams import closing
from perdure_service.store import approvals as approval_store
from perdure_service.store import runs as run_store

T = TypeVar("T")

LIST_TIMEOUT_S = 3.0
"""How long a list waits for another cell: a region that does not answer must not hang what the others have."""
REOPEN_S = 5.0
"""How long after a region was lost the inbox looks for it again."""
MAX_LIST_BYTES = 2 * 2**20
"""About the most that a page of several cells carries. Clients take 4 MiB unless they say otherwise."""
MAX_SAMPLE = 100
"""Ids that DeleteRunsResponse has as a sample."""


class Ask(Protocol):
    """Returns a cell's answer to a unary call."""

    async def __call__(
        self, method: Any, cell: Cell, request: Any, context: RpcContext, within_s: float | None = None
    ) -> Any:
        """Returns it, within some seconds if it is another cell's."""
        ...


AskStream = Callable[[Any, Cell, Any, RpcContext], AsyncIterator[Any]]


class Gathering:
    """Asks all cells that may have something, at the same time."""

    def __init__(self, place: Place, ask: Ask, ask_stream: AskStream) -> None:
        """Makes one.

        Args:
            place: Where this server is.
            ask: Asks one cell.
            ask_stream: The same for a streaming call.
        """
        self._regions = place.regions
        self._own = place.cell
        self._ask = ask
        self._ask_stream = ask_stream

    # ---- lists -------------------------------------------------------------------------------------------------------

    async def runs(self, method: Any, request: pb.ListRunsRequest, context: RpcContext) -> pb.ListRunsResponse:
        """Returns a page of the runs of all cells, newest first."""
        which = requests.list_runs(request)
        parent = which.run_filter.parent_run_id
        pages, unreachable = await self._pages(method, self._cells(which.namespace, parent), request, context)

        def place_of(run: Any) -> tuple[Any, ...]:
            workflow_id = RunKey.of_api(which.namespace, run.run_id).workflow_id
            return (run.create_time.seconds, run.create_time.nanos, workflow_id)

        found = [(page.runs, bool(page.next_page_token)) for page in pages]
        taken, more = merged(found, place_of, which.page_size, newest_first=True)
        token = ""
        if more:
            last = taken[-1]
            key = RunKey.of_api(which.namespace, last.run_id)
            token = run_store.token_after(key, last.create_time.ToDatetime(UTC), which.run_filter)
        return pb.ListRunsResponse(runs=taken, next_page_token=token, unreachable=unreachable)

    async def approvals(
        self, method: Any, request: approval_pb.ListApprovalsRequest, context: RpcContext
    ) -> approval_pb.ListApprovalsResponse:
        """Returns a page of the approvals of all cells, oldest first."""
        which = approval_requests.list_approvals(request)
        pages, unreachable = await self._pages(method, self._cells(which.namespace, which.run_id), request, context)

        def place_of(one: Any) -> tuple[Any, ...]:
            workflow_id = RunKey.of_api(which.namespace, one.run_id).workflow_id
            return (one.create_time.seconds, one.create_time.nanos, workflow_id, one.step_id)

        found = [(page.approvals, bool(page.next_page_token)) for page in pages]
        taken, more = merged(found, place_of, which.page_size, newest_first=False)
        token = ""
        if more:
            last = taken[-1]
            token = approval_store.token_after(
                RunKey.of_api(which.namespace, last.run_id),
                last.step_id,
                last.create_time.ToDatetime(UTC),
                states=which.states or frozenset({ApprovalState.PENDING}),
                run_id=which.run_id,
            )
        return approval_pb.ListApprovalsResponse(approvals=taken, next_page_token=token, unreachable=unreachable)

    def _cells(self, namespace: str, run_id: str) -> Sequence[Cell]:
        """Returns the cells to ask: those where a run may live, or all."""
        return self._regions.homes_of(namespace, run_id) if run_id else tuple(self._regions.cells.values())

    async def _pages(
        self, method: Any, cells: Sequence[Cell], request: Any, context: RpcContext
    ) -> tuple[list[Any], list[str]]:
        """Returns the pages of those cells that answer, and the regions of the others.

        Raises:
            PerdureError: None answers, or one refuses.
        """
        answers = await asyncio.gather(
            *(self._ask(method, cell, request, context, LIST_TIMEOUT_S) for cell in cells), return_exceptions=True
        )
        pages, lost = [], []
        for cell, answer in zip(cells, answers, strict=True):
            if isinstance(answer, PerdureError) and answer.status == "UNAVAILABLE":
                lost.append(cell.region)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                pages.append(answer)
        if not pages:
            raise next(answer for answer in answers if isinstance(answer, PerdureError))
        return pages, sorted(set(lost))

    # ---- deletions ---------------------------------------------------------------------------------------------------

    async def delete(self, method: Any, request: pb.DeleteRunsRequest, context: RpcContext) -> pb.DeleteRunsResponse:
        """Deletes in all cells that may have one of the runs; returns the sums.

        Raises:
            RegionUnavailable: One of them cannot be reached; in the others it may have been done, and a repeat does
                the rest.
        """
        command = requests.delete_runs(request, caller=current_call().caller)
        ids: dict[str, list[str]] = {}
        for run_id in command.run_ids:
            for cell in self._regions.homes_of(command.namespace, run_id):
                ids.setdefault(cell.name, []).append(run_id)
        calls = []
        for name in ids or self._regions.cells:
            sent = pb.DeleteRunsRequest()
            sent.CopyFrom(request)
            if ids:
                del sent.run_ids[:]
                sent.run_ids.extend(ids[name])
            calls.append(self._ask(method, self._regions.cells[name], sent, context))
        # All to their end: one that fails must not leave the others' outcome unknown.
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        asked = Counter(run_id for of_cell in ids.values() for run_id in of_cell)
        return _deleted(asked, [answer for answer in answers if isinstance(answer, pb.DeleteRunsResponse)])

    # ---- the inbox ---------------------------------------------------------------------------------------------------

    async def inbox(
        self, method: Any, request: approval_pb.WatchApprovalsRequest, context: RpcContext
    ) -> AsyncIterator[approval_pb.WatchApprovalsResponse]:
        """Yields the inboxes of all cells as one; one that is lost is looked for again, and said to be missing."""
        # One place: a watcher that is slow makes all of them slow, and fills no memory.
        pieces: asyncio.Queue[_Piece] = asyncio.Queue(1)
        pumps = [
            asyncio.create_task(self._pump(pieces, method, cell, request, context))
            for cell in self._regions.cells.values()
        ]
        caught_up: set[str] = set()
        lost: dict[str, str] = {}
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece.error, BaseException):
                    raise piece.error
                name = piece.cell.name
                if piece.answer is None:
                    lost[name] = piece.cell.region
                else:
                    lost.pop(name, None)
                    caught_up |= {name} if piece.answer.caught_up else set()
                yield approval_pb.WatchApprovalsResponse(
                    approvals=() if piece.answer is None else piece.answer.approvals,
                    caught_up=caught_up | lost.keys() >= self._regions.cells.keys(),
                    unreachable=sorted(set(lost.values())),
                )
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, pieces: asyncio.Queue[_Piece], method: Any, cell: Cell, request: Any, context: RpcContext
    ) -> None:
        """Passes on what a cell's inbox yields, for as long as it is wanted."""
        while True:
            try:
                async with closing(self._ask_stream(method, cell, request, context)) as answers:
                    async for answer in answers:
                        await pieces.put(_Piece(cell, answer))
            except PerdureError as error:
                if error.status != "UNAVAILABLE" or cell.name == self._own.name:
                    await pieces.put(_Piece(cell, error=error))
                    return
            except Exception as error:  # noqa: BLE001 - raised where it is read
                await pieces.put(_Piece(cell, error=error))
                return
            await pieces.put(_Piece(cell))
            await asyncio.sleep(REOPEN_S)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What came from a cell's inbox: an answer, an error that ends all, or neither when the cell is lost."""

    cell: Cell
    answer: approval_pb.WatchApprovalsResponse | None = None
    error: BaseException | None = None


def merged(
    pages: Sequence[tuple[Sequence[T], bool]],
    place_of: Callable[[T], tuple[Any, ...]],
    page_size: int,
    *,
    newest_first: bool,
) -> tuple[list[T], bool]:
    """Returns a page of what several lists have, and whether more follows.

    A list that goes on behind its page may have something between its last item and those of the others that lie
    behind that. So the merged page ends where the first such list ends, and the next one begins there in all of them.

    Items of one place in the order are told apart by their ids, in Python's order of text, which may not be the
    database's. So of two runs of different cells that were created in the same microsecond one might be in no page.

    Args:
        pages: By list, its items in order, and whether it goes on.
        place_of: An item's place in the order.
        page_size: The most to return.
        newest_first: Whether the order is descending.
    """
    pick = max if newest_first else min
    ends = [place_of(items[-1]) for items, goes_on in pages if goes_on and items]
    end = pick(ends) if ends else None
    items = sorted((item for page, _ in pages for item in page), key=place_of, reverse=newest_first)
    if end is not None:
        items = [item for item in items if (place_of(item) >= end if newest_first else place_of(item) <= end)]
    taken: list[T] = []
    size_bytes = 0
    for item in items[:page_size]:
        size_bytes += item.ByteSize()  # type: ignore[attr-defined]
        if taken and size_bytes > MAX_LIST_BYTES:
            break
        taken.append(item)
    return taken, bool(taken) and (end is not None or len(taken) < len(items))


def _deleted(asked: Counter[str], answers: Sequence[pb.DeleteRunsResponse]) -> pb.DeleteRunsResponse:
    """Returns the sum of deletions.

    Args:
        asked: In how many cells each id was looked for.
        answers: Of the cells.
    """
    missing = Counter(run_id for answer in answers for run_id in answer.missing_run_ids)
    return pb.DeleteRunsResponse(
        deleted_count=sum(answer.deleted_count for answer in answers),
        sample_run_ids=[run_id for answer in answers for run_id in answer.sample_run_ids][:MAX_SAMPLE],
        more=any(answer.more for answer in answers),
        unfinished_run_ids=[run_id for answer in answers for run_id in answer.unfinished_run_ids],
        missing_run_ids=[run_id for run_id, cells in asked.items() if missing[run_id] == cells],
    )
