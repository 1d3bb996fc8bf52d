"""Count the words of a folder's files by agents that share nothing but a store: `python word_count.py [FOLDER]`."""

import asyncio
import sys
from collections import Counter
from pathlib import Path
from threading import Thread

from stigmergy import Change, MemoryStore, RevisionConflict, Store, StoreClosed, Watch


def plan(store: Store, folder: Path) -> int:
    """Make a task of each file that is not hidden, and return how many there are."""
    paths = [path for path in sorted(folder.rglob("[!.]*")) if "/." not in path.relative_to(folder).as_posix()]
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    for number, path in enumerate(files):
        store.set(f"task:{number}", {"path": str(path), "owner": None})
    return len(files)


def work(store: Store, task: Change, name: str) -> None:
    """Count the words of one file, unless the task is another worker's."""
    if task.value["owner"] is None:
        try:
            store.set(task.key, {**task.value, "owner": name}, if_revision=task.revision)
        except (RevisionConflict, StoreClosed):
            return  # somebody else was faster
        words = Counter(Path(task.value["path"]).read_bytes().split())
        store.update("files", lambda files: {**files, name: files.get(name, 0) + 1}, default={})
        store.set(task.key.replace("task", "result"), dict(words))


def thread_worker(store: Store, tasks: Watch, name: str) -> None:
    for task in tasks:
        work(store, task, name)


async def task_worker(store: Store, tasks: Watch, name: str) -> None:
    async for task in tasks:
        await asyncio.to_thread(work, store, task, name)  # reading a file would block the event loop


def main(folder: Path) -> None:
    with MemoryStore() as store, store.watch(prefix="result:", capacity=None) as results:
        anna, bert, carl = ((store, store.observe(prefix="task:"), name) for name in ("anna", "bert", "carl"))
        workers = [Thread(target=thread_worker, args=each) for each in (anna, bert)]
        workers.append(Thread(target=asyncio.run, args=(task_worker(*carl),)))
        for worker in workers:
            worker.start()
        words = sum((Counter(results.get(timeout=60).value) for _ in range(plan(store, folder))), Counter[bytes]())
        for word, times in words.most_common(10):
            print(f"{times:>8}  {word.decode(errors='replace')!r}")
        print(f"{words.total()} words, missed: {results.dropped}, files by worker: {store.get('files')}")
    for worker in workers:  # their watches ended with the store
        worker.join()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
