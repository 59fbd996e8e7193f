"""Strangers' templates: limited in time and memory, apart from the API, and never in each other's way for long."""

import asyncio
import time

import pytest

from server.api.text.template_worker import TemplateWorkers
from server.errors import TemplateFailed

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
