"""One store, written and watched by threads and by a task of an event loop at the same time: all see the same order."""

import asyncio
from threading import Thread

from stigmergy import AsyncStore, MemoryStore, Store, Watch


def weather(store: Store) -> None:
    """A thread: let it get warm once the heating is on, and be done when it is off again."""
    store.set("room/degrees", 17)
    store.wait_for("room/heating", lambda state: state == "on", timeout=5)
    store.set("room/degrees", 23)
    store.wait_for("room/heating", lambda state: state == "off", timeout=5)


async def heating(store: AsyncStore, degrees: Watch) -> None:
    """A task: look at every temperature, and act on it."""
    async for change in degrees:
        await store.set("room/heating", "on" if change.value < 20 else "off")


def logbook(room: Watch) -> None:
    """A thread: follow everything."""
    for change in room:
        print(f"{change.revision}. {change.key}: {change.old_value} -> {change.value}")


async def main() -> None:
    store = MemoryStore()
    # A watch counts from its opening on: whatever is written from then on is in it, however late its reader starts.
    reader = Thread(target=logbook, args=(store.watch(prefix="room/"),))
    reader.start()
    async with store.aio:
        task = asyncio.create_task(heating(store.aio, await store.aio.watch("room/degrees")))
        await asyncio.to_thread(weather, store)
    await task  # its watch ended with the store,
    await asyncio.to_thread(reader.join)  # and so did this one, once it was read to its end


if __name__ == "__main__":
    asyncio.run(main())
