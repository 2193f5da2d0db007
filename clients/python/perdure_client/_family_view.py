"""What a person watching a run with its children wants to know of all of them, folded from their events.

Like a `RunView`, a `FamilyView` is a value: `family.apply(event)` returns the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from perdure_client._events import ChildStarted, RunEvent
from perdure_client._run_view import RunView
from perdure_client._types import StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildView:
    """A descendant of the watched run.

    Attributes:
        view: What it does; once it has ended only how.
        depth: 1 for a child of the watched run, 2 for a child of that one …
        name: Of what runs: its agent's, or the workflow function's.
    """

    view: RunView
    depth: int
    name: str = ""

    @property
    def doing(self) -> str:
        """What it does now: its progress, or else the step that began last of those that run."""
        if self.view.progress is not None and self.view.progress.message:
            return self.view.progress.message
        running = [step.name for step in self.view.steps.values() if step.state is StepState.RUNNING]
        return running[-1] if running else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyView:
    """A run and its descendants as their watcher sees them.

    Attributes:
        root: The watched run.
        children: Its descendants by run id: each before its own, and otherwise in the order in which they were started.
    """

    root: RunView
    children: Mapping[str, ChildView] = field(default_factory=dict[str, ChildView])

    def apply(self, event: RunEvent) -> FamilyView:
        """Returns the view after an event of any of the runs."""
        family = self
        child = self.children.get(event.run_id)
        if child is not None:
            view = child.view.apply(event)
            if view.state.terminal:  # a line, and perhaps why
                view = RunView(
                    run_id=view.run_id, state=view.state, failure=view.failure, state_reason=view.state_reason,
                    start_time=view.start_time, end_time=view.end_time, last_sequence=view.last_sequence,
                )  # fmt: skip
            family = replace(self, children={**self.children, event.run_id: replace(child, view=view)})
        elif event.run_id == self.root.run_id:
            family = replace(self, root=self.root.apply(event))
        match event.data:
            case ChildStarted(child_run_id=run_id) if run_id not in self.children and run_id != self.root.run_id:
                depth = child.depth + 1 if child else 1
                new = ChildView(view=RunView(run_id=run_id), depth=depth, name=event.step_name)
                return replace(family, children=_placed(family.children, event.run_id, new))
            case _:
                return family


def _placed(children: Mapping[str, ChildView], parent: str, new: ChildView) -> dict[str, ChildView]:
    """Returns the descendants with a new one behind the last of its parent's."""
    if new.depth == 1:
        return {**children, new.view.run_id: new}
    known = list(children.items())
    at = next(index for index, (run_id, _) in enumerate(known) if run_id == parent) + 1
    while at < len(known) and known[at][1].depth >= new.depth:
        at += 1
    return dict([*known[:at], (new.view.run_id, new), *known[at:]])
