"""A planner, workers and a reviewer: workers are killed in the midst of their tasks, and each is done exactly once.

Every task is one entry. A worker claims a task before it works on it, and writes the result through the claim: who was
taken for dead and comes back writes nothing. A dead worker's claim expires, and whoever watches takes the task over.
"""

import asyncio
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

from stigmergy import AsyncStore, ClaimLost, MemoryStore, RevisionConflict, Set, acting_as, claim

TASKS, WORKERS, DEATHS = 30, 4, 5
TTL = 0.3


async def plan(store: AsyncStore) -> None:
    await store.commit(*[Set(f"task/{number:02}", {"state": "todo", "number": number}) for number in range(TASKS)])


async def work(store: AsyncStore, name: str) -> None:
    """Do what is to be done, until this worker is killed."""
    async with store.watch(prefix="") as news:
        while True:
            for key, entry in (await store.scan("task/")).items():
                if entry.value["state"] == "todo":
                    with suppress(TimeoutError, ClaimLost, RevisionConflict):
                        await work_on(store, name, key)
            await news.aget()


async def work_on(store: AsyncStore, name: str, key: str) -> None:
    """Take one task, if nobody has it. Raises `TimeoutError` if somebody has."""
    async with claim(store, f"claim/{key}", name, TTL, timeout=0) as held:
        entry = await store.get_entry(key)
        if entry is None or entry.value["state"] != "todo":
            return
        square = 0
        for _ in range(entry.value["number"]):  # the work, in steps: anywhere in it the worker may be killed
            square += entry.value["number"]
            await asyncio.sleep(0.001)
        await held.set(key, entry.value | {"state": "done", "square": square}, if_revision=entry.revision)


async def review(store: AsyncStore) -> None:
    """Approve what is done, until all is."""
    left = TASKS
    async with store.observe(prefix="task/") as tasks:
        async for change in tasks:
            if change.value["state"] == "done":
                assert change.value["square"] == change.value["number"] ** 2
                await store.set(change.key, change.value | {"state": "approved"}, if_revision=change.revision)
                left -= 1
            if not left:
                return


class Worker(NamedTuple):
    name: str
    store: AsyncStore
    task: asyncio.Task[None]

    async def kill(self) -> None:
        """As a process dies: from one moment to the next nothing it does reaches the store, not even a farewell."""
        await self.store.close()  # of its handle, not of the store behind it
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def hire(store: AsyncStore, number: int) -> Worker:
    name = f"worker-{number}"
    handle = acting_as(store, name)
    return Worker(name, handle, asyncio.create_task(work(handle, name)))


async def kill_one_at_work(store: AsyncStore, workers: list[Worker]) -> None:
    while True:
        holders = {entry.writer for entry in (await store.scan("claim/")).values()}
        for worker in workers:
            if worker.name in holders:
                await worker.kill()
                workers.remove(worker)
                return
        await asyncio.sleep(0.001)


async def main() -> None:
    async with MemoryStore().aio as store:
        history = await store.watch(prefix="", capacity=None)
        await plan(acting_as(store, "planner"))
        workers = [hire(store, number) for number in range(WORKERS)]
        reviewing = asyncio.create_task(review(acting_as(store, "reviewer")))
        for death in range(DEATHS):
            await kill_one_at_work(store, workers)
            workers.append(hire(store, WORKERS + death))
        await reviewing
        for worker in workers:
            await worker.kill()

        changes = list(iter(history.get_nowait, None))
    done = Counter(change.key for change in changes if change.value and change.value.get("state") == "done")
    assert set(done.values()) == {1}
    assert sum(change.expired for change in changes) >= DEATHS
    print(f"{len(done)} tasks, each done once and approved, though {DEATHS} workers died at work")


if __name__ == "__main__":
    asyncio.run(main())
