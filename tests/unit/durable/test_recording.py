"""What an execution's recording answers, and what it leaves to the database."""

from __future__ import annotations

from perdure_service.durable.recording import Answer, Recording
from perdure_service.store.recordings import Page, RecordedOperation


def recorded(number: int, name: str = "step") -> RecordedOperation:
    return RecordedOperation(number, name, f"output {number}", None, "json", None)


def page(*numbers: int, last: bool = False) -> Page:
    return Page([recorded(number) for number in numbers], last)


def test_a_run_of_which_nothing_is_recorded_is_never_read() -> None:
    recording = Recording(nothing=True)
    assert recording.take(1) is Answer.NOTHING
    assert recording.take(1000) is Answer.NOTHING
    assert recording.next_after(1000) is Answer.NOTHING


def test_what_was_read_is_answered_in_any_order_and_what_is_beyond_must_be_read() -> None:
    recording = Recording()
    assert recording.take(1) is Answer.UNREAD
    recording.extend(page(1, 2, 4))
    assert recording.take(4) == recorded(4)
    assert recording.take(3) is Answer.NOTHING
    assert recording.take(1) == recorded(1)
    assert recording.take(5) is Answer.UNREAD
    recording.extend(page(5, last=True))
    assert recording.take(5) == recorded(5)
    assert recording.take(6) is Answer.NOTHING


def test_each_number_is_answered_once_as_a_second_question_may_be_about_the_executions_own_doing() -> None:
    recording = Recording()
    recording.extend(page(1, last=True))
    assert recording.take(1) == recorded(1)
    assert recording.take(2) is Answer.NOTHING
    assert recording.take(1) is Answer.ASK
    assert recording.take(2) is Answer.ASK


def test_a_number_that_is_not_read_yet_can_be_asked_for_again() -> None:
    recording = Recording()
    assert recording.take(1) is Answer.UNREAD
    assert recording.take(1) is Answer.UNREAD
    recording.extend(page(1, last=True))
    assert recording.take(1) == recorded(1)


def test_the_first_operation_after_the_end_of_the_code_is_found_although_others_were_taken() -> None:
    recording = Recording()
    assert recording.next_after(0) is Answer.UNREAD
    recording.extend(page(1, 3, 5))
    recording.take(3)
    assert recording.next_after(1) == (3, "step")
    assert recording.next_after(3) == (5, "step")
    assert recording.next_after(5) is Answer.UNREAD
    recording.extend(page(last=True))
    assert recording.next_after(5) is Answer.NOTHING
