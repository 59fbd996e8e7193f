"""Adapters fetched before anybody asks (preloaded-adapter-ids). A failure is logged; the first request tries again and hears the reason."""

import asyncio
import logging

from server.api.adapters import AdapterSelection
from server.api.state import Api
from server.errors import ServerError
from server.ipc.messages import Prefetch

log = logging.getLogger(__name__)


def preload(api: Api) -> asyncio.Task[None]:
    """Start fetching in the background, one after the other."""
    return asyncio.create_task(_preload(api), name="preload adapters")


async def _preload(api: Api) -> None:
    ready = await api.engine.wait_ready()
    for adapter_id in api.settings.preloaded_adapter_ids:
        try:
            source = api.source(None)
            adapter = await api.adapters.resolve(AdapterSelection(source, api.places.spelling(source, adapter_id)), ready.layout)
        except ServerError as error:
            log.error("adapter %r was not preloaded: %s", adapter_id, error.message)
            continue
        api.engine.tell(Prefetch(adapter.ref))
        log.info("adapter %r is preloaded", adapter_id)
