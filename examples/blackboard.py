"""A blackboard: agents write under their own names, their notes are merged, and the plan belongs to its author."""

import asyncio
from operator import add

from stigmergy import AccessDenied, AsyncStore, MemoryStore
from stigmergy.recipes.blackboard import Blackboard


async def take_part(board: Blackboard[AsyncStore], name: str, note: str) -> None:
    mine = board.agent(name)
    await mine.wait_for("plan", bool)
    await mine.set("notes", {f"{name}: {note}"})
    try:
        await mine.set("plan", "something else")
    except AccessDenied:
        await mine.set("refused", [name])


async def main() -> None:
    board = Blackboard(MemoryStore().aio, reducers={"notes": set.union, "refused": add}, owned=["plan"])
    async with board.watch("plan", "refused") as watch, asyncio.TaskGroup() as agents:
        agents.create_task(take_part(board, "critic", "too long"))
        agents.create_task(take_part(board, "poet", "too dry"))
        await board.agent("planner").set("plan", "a book about ants")
        print(sorted([f"{change.key} by {change.writer}" for change in [await watch.aget() for _ in range(3)]]))
    print(sorted(await board.all.get("notes")))
    print(await board.all.get("plan"))


if __name__ == "__main__":
    asyncio.run(main())
