"""What can go wrong, as one flat tree under `StateError`.

Every error keeps its facts as attributes, survives pickling, and speaks of keys and revisions, never of values.
Waiting too long is the builtin `TimeoutError`.
"""

__all__ = [
    "AccessDenied",
    "ClaimLost",
    "Compacted",
    "DamagedValue",
    "InvalidKey",
    "InvalidValue",
    "Lagged",
    "OutcomeUnknown",
    "ProviderNotFound",
    "RevisionConflict",
    "StateError",
    "StoreClosed",
    "StoreFull",
    "Unavailable",
    "Unsupported",
    "WatchClosed",
]


class StateError(Exception):
    """The base of every error that a store raises by itself."""


class StoreClosed(StateError):
    """The store was closed; nothing can be asked of it any more."""

    def __str__(self) -> str:
        return "the store is closed"


class RevisionConflict(StateError):
    """A condition did not hold: the key is at revision `actual` (0: absent), not at `expected`; nothing was changed."""

    def __init__(self, key: str, expected: int, actual: int) -> None:
        super().__init__(key, expected, actual)
        self.key = key
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return f"{self.key!r} is {_at(self.actual)}, expected {_at(self.expected)}"


class InvalidKey(StateError, ValueError):
    """A key, prefix, scope or owner outside the grammar of keys; `key` is the offender's `repr`, cut short."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid key {self.key}: {self.reason}"


class InvalidValue(StateError, TypeError):
    """The store's copier or codec cannot take a value of type `type`; nothing was changed."""

    def __init__(self, key: str, type: str) -> None:
        super().__init__(key, type)
        self.key = key
        self.type = type

    def __str__(self) -> str:
        return f"{self.key!r} cannot hold this value of type {self.type}"


class StoreFull(StateError):
    """The commit would leave more than `max_entries` entries; nothing was changed."""

    def __init__(self, max_entries: int) -> None:
        super().__init__(max_entries)
        self.max_entries = max_entries

    def __str__(self) -> str:
        return f"the store may hold {self.max_entries} entries"


class WatchClosed(StateError):
    """The watch has ended, and everything it had buffered was taken."""

    def __str__(self) -> str:
        return "the watch has ended"


class Lagged(StateError):
    """The reader was too slow: `missed` changes gave way to newer ones. The watch goes on with the next read."""

    def __init__(self, missed: int) -> None:
        super().__init__(missed)
        self.missed = missed

    def __str__(self) -> str:
        return f"{self.missed} changes were missed"


class Compacted(StateError):
    """The store cannot continue from `since`: it forgot what came next, or it never was at that moment.

    `oldest` is the oldest revision that it could still deliver. Scan, then watch from the snapshot's bookmark.
    """

    def __init__(self, since: int | str, oldest: int) -> None:
        super().__init__(since, oldest)
        self.since = since
        self.oldest = oldest

    def __str__(self) -> str:
        known = f"from revision {self.oldest} on, of this store and its present life"
        return f"cannot continue from {self.since!r}: changes are remembered {known}"


class AccessDenied(StateError, PermissionError):
    """The handle may not do `action` to `key`; nothing was changed."""

    def __init__(self, action: str, key: str) -> None:
        super().__init__()
        self.args = (action, key)  # given to an OSError, two arguments would be its errno and strerror
        self.action = action
        self.key = key

    def __str__(self) -> str:
        return f"this handle may not {self.action} {self.key!r}"


class ClaimLost(StateError):
    """`owner` no longer holds the claim on `key` that had the fencing token `token`."""

    def __init__(self, key: str, owner: str, token: int) -> None:
        super().__init__(key, owner, token)
        self.key = key
        self.owner = owner
        self.token = token

    def __str__(self) -> str:
        return f"{self.owner!r} lost its claim on {self.key!r} (token {self.token})"


class ProviderNotFound(StateError, LookupError):
    """No provider is called `name`; `known` lists those that are."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        hint = f"; for a file: sqlite:///{self.name}" if "." in self.name else ""
        return f"no provider is called {self.name!r}; known: {', '.join(self.known)}{hint}"


class Unsupported(StateError):
    """The store lacks a capability that the program requires."""

    def __init__(self, capability: str) -> None:
        super().__init__(capability)
        self.capability = capability

    def __str__(self) -> str:
        return f"this store is not {self.capability!r}"


class Unavailable(StateError):
    """The engine was not reached, or refused: the operation surely did nothing and may be tried again.

    Not for ever: a path or a password that is wrong is `Unavailable` each time.
    """


class OutcomeUnknown(StateError):
    """The connection was lost after the request had left: the operation happened, or it did not."""


class DamagedValue(StateError):
    """What the engine keeps at `key` cannot be read back; other keys are not affected."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"what is stored at {self.key!r} cannot be read"


def _at(revision: int) -> str:
    return f"at revision {revision}" if revision else "absent"
