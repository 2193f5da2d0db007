"""Harnesses of a test's own, one after the other in one process, with and without a model and a database."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from perdure_service.testing import AgentHarness, Breaks, CrashNeverHappened, Fails, ScriptedModel

from tests.helpers import harness_agents  # noqa: F401 - declares the agents
from tests.helpers.databases import DatabaseServer
from tests.helpers.waiting import eventually, scaled


async def test_harnesses_follow_each_other_and_leave_no_thread(database_server: DatabaseServer) -> None:
    before = {thread for thread in threading.enumerate() if thread.name != "perdure-agent"}
    for number in range(3):
        async with AgentHarness(database_url=database_server.url, timeout_s=scaled(15)) as harness:
            assert await harness.run("adder", {"steps": number}) == number

    def gone() -> bool:
        return not [
            thread
            for thread in threading.enumerate()
            if thread not in before and not thread.name.startswith(("perdure-agent", "asyncio_"))
        ]

    eventually(gone, what=f"no thread is left of {[thread.name for thread in threading.enumerate()]}")


async def test_a_person_can_be_played_by_the_test(database_server: DatabaseServer) -> None:
    async with AgentHarness(database_url=database_server.url, timeout_s=scaled(15)) as harness:
        run = await harness.start("everything")
        await harness.reject(run, "not now", title="Go on?")
        await harness.signal(run, "word", 1)
        assert (await run.result())[1:3] == [False, "not now"]


async def test_a_scripted_model_answers_fails_and_breaks_off(database_server: DatabaseServer) -> None:
    model = ScriptedModel([Fails(503), Breaks("half an "), "a first answer", "a second one"])
    async with AgentHarness(model=model, database_url=database_server.url, timeout_s=scaled(15)) as harness:
        run = await harness.start("asks-model", {"question": "why?"})
        assert await run.result() == "a second one"
        assert await run.output("answer") == "a first answera second one"
    assert [call.prompt for call in model.calls] == ["why?", "why?", "why?", "a first answer"]


async def test_an_answer_that_is_recorded_is_not_asked_for_again(database_server: DatabaseServer) -> None:
    model = ScriptedModel(lambda call: f"re: {call.prompt}")
    async with AgentHarness(model=model, database_url=database_server.url, timeout_s=scaled(15)) as harness:
        await harness.crash_after_step("asks-model", 1)
        assert await harness.run("asks-model", {"question": "why?"}) == "re: re: why?"
        assert harness.crashes == 1
    assert len(model.calls) == 2


async def test_a_harness_without_a_url_brings_a_database_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERDURE_TEST_DATABASE_URL", raising=False)
    data_dir = Path(tempfile.mkdtemp(prefix="perdure-test-"))
    # When the process ends: the harness's server stops then, and its own exit hook, registered later, comes first.
    atexit.register(shutil.rmtree, data_dir, ignore_errors=True)
    async with AgentHarness(data_dir=data_dir, timeout_s=scaled(15)) as harness:
        assert await harness.run("adder") == 3


async def test_a_test_that_forgets_its_crash_fails(database_server: DatabaseServer) -> None:
    harness = AgentHarness(database_url=database_server.url, timeout_s=scaled(15))
    with pytest.raises(CrashNeverHappened, match="no run of adder was started to crash"):
        async with harness:
            await harness.crash_after_step("adder", 1)


async def test_a_function_that_decides_and_raises_is_named(database_server: DatabaseServer) -> None:
    def decide(_approval: object) -> None:
        raise KeyError("my mistake")

    async with AgentHarness(decide=decide, database_url=database_server.url, timeout_s=scaled(15)) as harness:
        with pytest.raises(RuntimeError, match="the harness broke: KeyError"):
            await harness.run("everything")
