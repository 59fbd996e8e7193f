"""Strangers' templates: limited in time and memory, apart from the API, and never in each other's way for long."""

import asyncio
import time

import pytest

from server.api.text.template_worker import TemplateWorkers
from server.errors import Overloaded, TemplateFailed, ValidationFailed

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set ns = namespace(x='a' * 1000000) %}{% for i in range(20) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
MESSAGES = {"messages": [{"role": "user", "content": "hé"}]}


@pytest.fixture
async def workers():
    workers = TemplateWorkers(timeout_s=0.5, num_workers=1)
    yield workers
    await workers.close()


async def test_renders_and_says_why_not(workers: TemplateWorkers) -> None:
    assert await workers.render("{{ messages[0].content }}!", MESSAGES) == "hé!"
    with pytest.raises(TemplateFailed, match="no such role"):
        await workers.render("{{ raise_exception('no such role') }}", MESSAGES)
    assert await workers.render("again", MESSAGES) == "again"


async def test_an_endless_template_is_ended_and_the_next_one_served(workers: TemplateWorkers) -> None:
    started_at = time.monotonic()
    with pytest.raises(TemplateFailed, match="took more than 0.5 s"):
        await workers.render(ENDLESS, MESSAGES)
    assert time.monotonic() - started_at < 10
    assert await workers.render("ok", MESSAGES) == "ok"


async def test_a_greedy_template_does_not_take_the_machine_down(workers: TemplateWorkers) -> None:
    with pytest.raises(TemplateFailed):
        await workers.render(HUGE, MESSAGES)
    assert await workers.render("ok", MESSAGES) == "ok"


async def test_a_caller_that_leaves_frees_the_worker(workers: TemplateWorkers) -> None:
    await workers.render("start", MESSAGES)
    task = asyncio.create_task(workers.render(ENDLESS, MESSAGES))
    await asyncio.sleep(0.05)
    task.cancel()
    assert await workers.render("ok", MESSAGES) == "ok"


async def test_an_endless_template_leaves_a_worker_to_the_others() -> None:
    workers = TemplateWorkers(timeout_s=1.0, num_workers=2)
    try:
        endless = [asyncio.create_task(workers.render(ENDLESS, MESSAGES)) for _ in range(6)]
        await asyncio.sleep(0)
        assert await workers.render("ok", MESSAGES) == "ok"
        errors = await asyncio.gather(*endless, return_exceptions=True)
        assert all(isinstance(error, TemplateFailed) for error in errors)
        assert sum("a moment ago" in str(error) for error in errors) == 5  # those behind the first were not tried
        with pytest.raises(TemplateFailed, match="a moment ago"):
            await workers.render(ENDLESS, MESSAGES)
    finally:
        await workers.close()
    assert not workers._processes and not workers._turns


async def test_killed_workers_are_forgotten(workers: TemplateWorkers) -> None:
    with pytest.raises(TemplateFailed):
        await workers.render(ENDLESS, MESSAGES)
    await asyncio.gather(*workers._ending)
    assert not workers._processes


async def test_nobody_waits_for_a_worker_for_ever() -> None:
    workers = TemplateWorkers(timeout_s=30.0, num_workers=1, max_wait_s=0.1)
    try:
        await workers.render("start", MESSAGES)
        endless = asyncio.create_task(workers.render(ENDLESS, MESSAGES))
        await asyncio.sleep(0)
        for template in (ENDLESS, "another"):
            with pytest.raises(Overloaded, match="busy"):
                await workers.render(template, MESSAGES)
        endless.cancel()
        await asyncio.gather(endless, return_exceptions=True)
        assert len(workers._turns) == 0
    finally:
        await workers.close()


async def test_variables_that_cannot_be_handed_over_cost_no_worker(workers: TemplateWorkers) -> None:
    with pytest.raises(ValidationFailed, match="`chat_template_kwargs`") as caught:
        await workers.render("ok", MESSAGES | {"x": 1 << 64})
    assert caught.value.param == "chat_template_kwargs" and not workers._processes
