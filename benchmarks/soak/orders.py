"""Changes of names at random: new versions, loads, unloads, pins, deletions, returns; over the server's routes and in the source's folder.

Owns the contents that were ever made (each gets the next mark) and the order of steps that keeps `names` true.
"""

import asyncio
import random
import shutil
import time
from pathlib import Path

import httpx

from benchmarks.soak.marks import write_marked
from benchmarks.soak.names import ABSENT, Name
from benchmarks.soak.tally import Tally

_KINDS = {"swap": 5, "load": 2, "unload": 3, "pin": 1, "delete": 2}  # and how often


class Orders:
    """Changes the names of one server. `client` has the admin's key."""

    def __init__(self, client: httpx.AsyncClient, adapters_dir: Path, tally: Tally) -> None:
        self._client, self._dir, self._tally = client, adapters_dir, tally
        self._num_marks = 0

    @property
    def num_contents(self) -> int:
        """Contents that were ever made."""
        return self._num_marks

    async def change(self, name: Name, rng: random.Random) -> None:
        """Something that may be done with the name now; one that is absent comes back."""
        async with name.changing:
            kind = "return" if name.mark == ABSENT else rng.choices(list(_KINDS), list(_KINDS.values()))[0]
            work = {"swap": self._mean_anew, "return": self._mean_anew, "pin": self._pin, "delete": self._delete}.get(kind)
            if await (work(name) if work is not None else self._order(name, kind)):
                self._tally.done[kind] += 1

    async def create(self, name: Name) -> None:
        """Its first version."""
        async with name.changing:
            await self._mean_anew(name)

    async def remove(self, name: Name) -> None:
        """Make sure that it is gone."""
        async with name.changing:
            if name.mark != ABSENT:
                await self._delete(name)

    async def _mean_anew(self, name: Name) -> bool:
        mark, self._num_marks = self._num_marks, self._num_marks + 1
        if not name.published:
            name.begin(mark, time.monotonic())
            await asyncio.to_thread(write_marked, self._dir / name.id, mark)
            name.end(time.monotonic())
            return True
        folder = self._dir / "incoming" / f"{mark}"
        await asyncio.to_thread(write_marked, folder, mark)
        name.begin(mark, time.monotonic())
        done = await self._send("POST", "/v1/adapters", f"publish {name.id}", json={"name": name.id, "id": f"incoming/{mark}"})
        name.end(time.monotonic())
        await asyncio.to_thread(shutil.rmtree, folder)
        return done

    async def _delete(self, name: Name) -> bool:
        if name.pinned and not name.published:
            await self._pin(name)  # a pin is the name's: without its folder the server would go on to look for it
        name.begin(ABSENT, time.monotonic())
        if name.published:
            done = await self._send("DELETE", f"/v1/adapters/{name.id}", f"delete {name.id}")
            name.pinned = False
        else:
            gone = self._dir / f".gone-{self._num_marks}-{name.id}"  # at once for the server; removed file by file afterwards
            (self._dir / name.id).rename(gone)
            await asyncio.to_thread(shutil.rmtree, gone)
            done = True
        name.end(time.monotonic())
        return done

    async def _pin(self, name: Name) -> bool:
        name.pinned = not name.pinned
        return await self._order(name, "pin" if name.pinned else "unpin")

    async def _order(self, name: Name, verb: str) -> bool:
        return await self._send("POST", f"/v1/adapters/{name.id}/{verb}", f"{verb} {name.id}")

    async def _send(self, method: str, path: str, what: str, **options: object) -> bool:
        try:
            answer = await self._client.request(method, path, **options)  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            self._tally.lost(f"{what}: {type(error).__name__}")
            return False
        if answer.status_code != 200:
            self._tally.lost(f"{what}: {answer.status_code} {answer.text[:200]}")
        return answer.status_code == 200
