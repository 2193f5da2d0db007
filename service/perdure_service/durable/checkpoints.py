"""The fast way through the seam: commits of executions are presented to the checkpoint writer, many in one statement.

A commit goes this way when everything that it writes is known beforehand: the pack of its events, and where in the log
it goes. What the writer did not write goes the other way, an `Operation` with a transaction of its own, which *adopts*
what was presented: it holds the same slot, presents the same pack, and so finds out whether an earlier attempt of the
writer was committed. That other way decides everything that is not plain success: lost owners, cancelled runs,
collisions with outside writers, values that the database refuses.

**Who may write.** An execution's slot is held from before its events are taken until the commit is known, by a thread,
or by the commit itself while no thread waits for it. Whatever else the execution says meanwhile comes after it.

**What if we die on the next line?** Nobody has been told anything before the commit has returned; what was committed
is found by the execution after this one.

**What if two do it?** The slot lets one commit of an execution be under way. Two executions of a run differ in their
token, and the writer's statement asks for the owner's.

**The last step goes with the end.** A workflow's own code goes on with what a step returned while its commit is on its
way (`hops.Ahead`). If it ends before a writer has taken that row, the step and the end become one row, with one pack
(`join`): a commit less for each run. The writer's lock decides between the two. What is not written of it is the end's
to decide, whose operation records the step with it, as everybody who ends this execution's run does from then on
(`Execution.last_step`): no end is committed whose step is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from perdure_service.domain.events import MAX_PACK_CHARS, Event, Pack, event_chars
from perdure_service.durable import hops, metering
from perdure_service.durable.executions import Execution, LogEnd
from perdure_service.durable.operation import Operations
from perdure_service.durable.promises import Promise
from perdure_service.store import runs
from perdure_service.store.checkpoint_writer import CheckpointWriter
from perdure_service.store.checkpoints import CheckpointRow, OutcomeRow, Written

MAX_KEPT_OUTPUT = 2**14
"""Characters of an output that is kept for who asks for it at once; a longer one is read."""

MakeRow = Callable[[Pack, int | None], CheckpointRow]


Call = tuple[str, int]
"""Which call of DBOS's a commit is of: its kind, and the number of the operation; 0 for none."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What an execution, which lives here, has to commit.

    Attributes:
        call: See `Call`.
        execution: It.
        events: Of the commit itself; those in its buffer go before them.
        make_row: Makes the row of a pack and the first sequence of the one before.
        after: Called after the commit with what the statement returned, while nobody has been told yet.
    """

    call: Call
    execution: Execution
    events: Sequence[Event]
    make_row: MakeRow
    after: Callable[[Written], None]


class Presented:
    """A commit that the writer has been given.

    Attributes:
        row: What it was given.
        pack: Its events.
        riding: Those that were taken from the execution's buffer.
        execution: Whose it is; of a start the one that begins with it, None when none does.
        call: So that its repeat knows it.
        ahead: Whether its code has gone on.
        joins: The step that goes with it.
        written: Whether it is committed; False when that is not known, and an `Operation` must adopt it.
        returned: What the writer's statement returned of it, once it is.
    """

    def __init__(
        self,
        row: CheckpointRow,
        execution: Execution | None,
        after: Callable[[Written], None],
        *,
        call: Call | None = None,
        riding: Sequence[Event] = (),
        ahead: bool = False,
        joins: Presented | None = None,
    ) -> None:
        self.ahead = ahead
        self.joins = joins
        self.row = row
        self.pack = row.pack
        self.riding = list(riding)
        self.execution = execution
        self.call = call
        self.written: Promise[bool] = Promise()
        self.returned: Written = {}
        self._after = after

    @property
    def owner(self) -> Execution | None:
        """The execution that writes; a start is nobody's yet."""
        return self.execution if self.call else None

    def done(self, written: Written | None) -> None:
        """Tells how it ended. Must not raise: the slot, and whoever waits, would be left."""
        owner = self.owner
        if written is not None:
            self.returned = written
            with metering.telling(self.pack.workflow_id):
                self._after(written)
        if owner is None:
            if self.execution is not None:
                self.execution.rest()
        elif written is not None or not owner.leave_unanswered(self):
            owner.slot.release_by(self)
        # Else it keeps the slot until its call adopts it.
        if self.joins is not None:
            self.joins.written.cancel()
        self.written.set_result(written is not None)

    def note_end(self, written: Written) -> None:
        """Tells the execution where its log ends now, and how its run ended."""
        execution = self.execution
        if execution is None:
            return
        execution.log_end = LogEnd.of(self.pack)
        if isinstance(self.row, OutcomeRow):
            shown = self.row.shown
            known = written if shown is None or len(shown) > MAX_KEPT_OUTPUT else {**written, "output": shown}
            execution.end = partial(runs.as_ended, known, self.row.status, execution.log_end.last)


class Checkpoints:
    """See the module. Thread-safe."""

    def __init__(self, operations: Operations) -> None:
        """Creates it without a writer: everything goes the other way until `write_with`."""
        self._operations = operations
        self._writer: CheckpointWriter | None = None
        self._presented: dict[int, Presented] = {}

    def write_with(self, writer: CheckpointWriter | None) -> None:
        """Sets the writer, whose `answer` is this object's."""
        self._writer = writer

    def present(self, commit: Commit, *, wait: bool = True, ahead: bool = False) -> Presented | None:
        """Gives the writer a commit of an execution.

        Args:
            commit: It.
            wait: Whether to wait for the slot while another commit of the execution is under way.
            ahead: Whether it is a step that succeeded, and its code goes on before it is committed.

        Returns:
            None when it must go the other way.
        """
        _refuse_to_wait()
        execution = commit.execution
        if wait:
            execution.settle()
        writer, slot = self._writer, execution.slot
        if writer is None or self._operations.current is not None:
            return None
        if not slot.acquire(blocking=False):
            if not wait:
                return None
            hops.refuse_to_block()
            slot.acquire()
        end = execution.log_end
        if end is None or slot.nested:
            slot.release()
            return None
        riding, taken = execution.take(), False
        try:
            pack = Pack(execution.key.workflow_id, [*riding, *commit.events], first_sequence=end.last + 1)
            if not pack.events or sum(map(event_chars, pack.events)) > MAX_PACK_CHARS:
                return None
            row = commit.make_row(pack, end.first)
            presented = Presented(row, execution, commit.after, call=commit.call, riding=riding, ahead=ahead)
            slot.hand_to(presented)
            taken = self._submit(writer, presented)
            if not taken:
                slot.take_over(presented)
            return presented if taken else None
        finally:
            if not taken:
                execution.give_back(riding)
                slot.release()

    def join(self, commit: Commit) -> Presented | None:
        """Gives the writer the end of an execution, whose row has `Execution.last_step` in it, together with that step.

        Returns:
            None when its code is ahead of no step, or that is being written already.
        """
        execution = commit.execution
        writer, step = self._writer, _waiting_step(execution)
        if writer is None or step is None:
            return None
        lent, replaced = execution.lend(), False
        try:
            riding = [*step.pack.events, *lent]
            pack = Pack(execution.key.workflow_id, [*riding, *commit.events], first_sequence=step.pack.first_sequence)
            if sum(map(event_chars, pack.events)) > MAX_PACK_CHARS:
                return None
            execution.last_step = step.row
            row = commit.make_row(pack, step.row.previous_first)
            joined = Presented(row, execution, commit.after, call=commit.call, riding=riding, joins=step)
            replaced = writer.replace(step.row, row, partial(self._pass_on, step, joined))
        finally:
            if not replaced:
                execution.last_step = None
                execution.give_back(lent)
            execution.end_loan()
        if not replaced:
            return None
        execution.ahead = None  # nothing but the end waits for it
        writer.hurry(row)
        return joined

    @staticmethod
    def may_join(execution: Execution) -> bool:
        """Returns whether there is a step that `join` would find."""
        return _waiting_step(execution) is not None

    def _pass_on(self, step: Presented, joined: Presented) -> None:
        """Puts what joins a step in its place, while no writer can take it."""
        assert joined.execution is not None
        del self._presented[id(step.row)]
        self._presented[id(joined.row)] = joined
        joined.execution.slot.pass_on(step, joined)

    def hurry(self, presented: Presented, blocks: bool) -> None:
        """Is told that somebody waits for a commit now; `blocks` if its thread does nothing else meanwhile."""
        if self._writer is not None:
            self._writer.hurry(presented.row)
            if blocks and not presented.written.done():
                self._writer.stand_in()

    def present_start(
        self, row: CheckpointRow, execution: Execution | None, after: Callable[[Written], None]
    ) -> Presented | None:
        """Gives the writer the start of a run, with the execution that begins with it; see `present`."""
        _refuse_to_wait()
        writer = self._writer
        if writer is None or self._operations.current is not None:
            return None
        presented = Presented(row, execution, after)
        if execution is not None:
            execution.work()  # who stops must not hand over what is not there yet
        if self._submit(writer, presented):
            return presented
        if execution is not None:
            execution.rest()
        return None

    def _submit(self, writer: CheckpointWriter, presented: Presented) -> bool:
        self._presented[id(presented.row)] = presented
        taken = writer.submit(presented.row, soon=not presented.ahead)
        if not taken:
            del self._presented[id(presented.row)]
        return taken

    def answer(self, batch: Sequence[tuple[CheckpointRow, Written | None]]) -> None:
        """Is told by the writer what it has written. Must not raise, nor let one row's trouble be another's."""
        with hops.as_a_thread(), hops.waking_once():
            self._answer(batch)

    def _answer(self, batch: Sequence[tuple[CheckpointRow, Written | None]]) -> None:
        answered = [(self._presented.pop(id(row)), written) for row, written in batch]
        committed = []
        for one, written in answered:
            if written is not None:
                committed.append(one)
                with metering.telling(one.pack.workflow_id):
                    one.note_end(written)
                    self._operations.tell(one.owner, one.pack.workflow_id, [one.pack])
        if committed:
            self._operations.hint([one.pack for one in committed])
        for one, written in answered:
            with metering.telling(one.pack.workflow_id):
                one.done(written)


def _waiting_step(execution: Execution) -> Presented | None:
    """Returns the step that an execution's code is ahead of, if its row still waits."""
    step = execution.slot.holder
    return step if isinstance(step, Presented) and step.ahead and step.row.waits else None


def _refuse_to_wait() -> None:
    """Is called before anything is presented: who has no deferral to leave the answer with is about to wait for it."""
    if hops.deferral() is None:
        hops.refuse_to_block()


def adopted(execution: Execution | None, call: Call) -> Presented | None:
    """Returns what the writer was given for this very call and did not write, to be adopted; None for none."""
    presented: Presented | None = None if execution is None else execution.unanswered
    return presented if presented is not None and presented.call == call else None
