"""A reader that comes back scans once, then follows from a bookmark without a gap, or learns that it is too late."""

from stigmergy import Compacted, MemoryStore, Store


class Mirror:
    """A copy of everything below a prefix, that is brought up to date now and then."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store, self.prefix = store, prefix
        self.copy: dict[str, object] = {}
        self.bookmark: str | None = None

    def catch_up(self) -> str:
        """Bring the copy up to date, and say how."""
        if self.bookmark is not None:
            try:
                return self.follow(self.bookmark)
            except Compacted:
                pass  # too much has happened for the store to remember it all: start anew
        snapshot = self.store.scan(self.prefix)
        self.copy = {key: entry.value for key, entry in snapshot.items()}
        self.bookmark = snapshot.bookmark
        return f"scanned {len(snapshot)} keys"

    def follow(self, bookmark: str) -> str:
        changes = 0
        with self.store.watch(prefix=self.prefix, since=bookmark) as watch:
            while (change := watch.get_nowait()) is not None:
                changes += 1
                if change.op == "delete":
                    del self.copy[change.key]
                else:
                    self.copy[change.key] = change.value
            self.bookmark = watch.bookmark
        return f"followed {changes} changes"


def main() -> None:
    with MemoryStore(history=10) as store:
        mirror = Mirror(store, "fact:")
        store.set("fact:sky", "blue")
        print(mirror.catch_up(), mirror.copy)
        store.set("fact:sky", "grey")
        store.set("fact:sea", "blue")
        print(mirror.catch_up(), mirror.copy)
        for height in range(100):
            store.set("fact:tide", height)
        store.delete("fact:sky")
        print(mirror.catch_up(), mirror.copy)
        print(mirror.catch_up(), mirror.copy)


if __name__ == "__main__":
    main()
