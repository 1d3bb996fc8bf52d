"""Two agents on one store: each has its own corner, what is global needs a grant, and a task is done by one of them."""

from stigmergy import AccessDenied, ClaimLost, MemoryStore, Scope, agent_store, claim, scoped_key


def main() -> None:
    store = MemoryStore()
    planner = agent_store(store, agent="planner", session="s1", global_write=["plan"])
    worker = agent_store(store, agent="worker", session="s1", global_write=["results:", "task:"])

    planner.set("global:plan", ["look", "write"])
    planner.set(scoped_key(Scope.AGENT, "mood", owner="planner"), "hopeful")
    print("the worker reads the plan:", worker.get("global:plan"))
    for key in "global:plan", scoped_key(Scope.AGENT, "mood", owner="planner"):
        try:
            worker.update(key, lambda value: None)
        except AccessDenied as denied:
            print(denied)

    with claim(worker, "global:task:look", "worker", ttl=60) as held:
        held.set("global:results:look", "an anthill")
    result = store.get_entry("global:results:look")
    assert result is not None
    print(f"{result.value}, by {result.writer}")

    try:
        with claim(worker, "global:task:write", "worker", ttl=60) as held:
            store.delete("global:task:write")  # somebody takes the task away
            held.set("global:results:write", "too late")
    except ClaimLost as lost:
        print(lost.owner, "lost", lost.key, "and wrote", store.get("global:results:write"))


if __name__ == "__main__":
    main()
