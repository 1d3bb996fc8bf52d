"""What every provider that keeps a log is made of: an engine, asked by flows, over a transport that waits.

One design for all of them: a dense revision and a log of changes, written in the same atomic step as the values. What
an engine notifies is a wake-up and no more; whoever reads the log knows by `revision == last + 1` that nothing is
missing. `_log.py` makes stores of that, and `_reader.py` feeds their watches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from stigmergy.checks import check_number, check_seconds
from stigmergy.flow import Flow, Operation, Scan
from stigmergy.model import Change, Op, Ttl

__all__ = [
    "AsyncTransport",
    "Done",
    "Encoded",
    "Engine",
    "Found",
    "Limits",
    "Page",
    "Place",
    "Request",
    "Stored",
    "Transport",
    "Value",
    "limits",
]

T = TypeVar("T")

_LONGEST_HISTORY = 2**32
"""Records, or seconds."""
_LONGEST_TIMEOUT = 1e6
"""In seconds, eleven days: SQLite counts milliseconds in 32 bits."""


class Value(NamedTuple):
    """A value as it is stored: bytes, and the id of the codec that made them. Anything else there is damage."""

    codec: str
    data: bytes


class Stored(NamedTuple):
    """An entry as it is stored."""

    value: Value
    revision: int
    commit: int
    writer: str | None
    time: float
    expires: float | None
    meta: str | None
    """JSON."""


class Encoded(NamedTuple):
    """A write as an engine takes it; `op` is `None` for a `Check`."""

    op: Op | None
    key: str
    value: Value | None
    if_revision: int | None
    ttl: Ttl
    writer: str | None
    meta: str | None


class Place(NamedTuple):
    """A moment in one life of an engine: all that its user has seen of it.

    A life is told from another by its history: where the epoch is gone, the head is below a place, or another record
    stands at its revision, the engine lost its past. Whoever notices begins a new life, above all revisions seen.
    """

    epoch: str
    revision: int
    time: float
    """Of the record at `revision`; 0.0 where it is not known."""


class Found(NamedTuple):
    """Entries as they all were at a place, sorted by key."""

    entries: Mapping[str, Stored]
    place: Place


class Done(NamedTuple):
    """What came of a commit: one revision per write, and the place of the last."""

    revisions: tuple[int | None, ...]
    place: Place


class Page(NamedTuple):
    """The next records of the log."""

    changes: Sequence[Change]
    """As stored: a value is a `Value`, or `None` where there was none; `meta` is JSON."""
    head: Place
    """Where the log ends; there may be more records than those of the page."""
    oldest: int
    """The revision of the oldest record there is; of the next one to come if there is none."""
    due: float | None
    """In how many seconds the next deadline comes due."""

    def follows(self, epoch: str, revision: int) -> bool:
        """Whether nothing is missing behind `revision` of the life `epoch`."""
        revisions = [change.revision for change in self.changes]
        dense = revisions == [*range(revision + 1, revision + 1 + len(revisions))]
        return self.head.epoch == epoch and dense and (bool(revisions) or self.head.revision == revision)


class Request(Operation[T]):
    """The smallest thing that an engine does atomically. It goes to the transport, and through no middleware."""

    __slots__ = ()
    name = "request"


class Engine(ABC):
    """Where entries and their log are kept. Its methods are flows over requests, for both colours.

    They are given the place that was seen last, begin a new life where they must, and make due deadlines into changes
    before all else; `read` only where it meets one. All raise `Unavailable` and `OutcomeUnknown`.
    """

    capabilities: ClassVar[frozenset[str]]

    @abstractmethod
    def read(self, key: str, seen: Place) -> Flow[Stored | None]:
        """The entry at `key`, unless it is past its deadline."""

    @abstractmethod
    def scan(self, request: Scan, seen: Place) -> Flow[Found]:
        """What `Store.scan` finds."""

    @abstractmethod
    def commit(self, writes: Sequence[Encoded], seen: Place) -> Flow[Done]:
        """What `Store.commit` does. Raises `RevisionConflict`."""

    @abstractmethod
    def log(self, after: int, seen: Place) -> Flow[Page]:
        """The first records after the revision `after`; none if those are forgotten."""

    @abstractmethod
    def wait(self, place: Place, seconds: float) -> Flow[None]:
        """Return when there may be records behind `place`, and at the latest after so many seconds."""

    @abstractmethod
    def transport(self) -> Transport:
        """A new transport, which connects when it is first used."""

    def async_transport(self) -> AsyncTransport | None:
        """Same as `transport`, for event loops; `None` if requests are to be made in threads."""
        return None


class Limits(NamedTuple):
    """What a store is told when it is made, in plain form: how much of the log is kept, and for how long it waits."""

    history: int
    history_seconds: float | None
    timeout: float


def limits(history: int, history_seconds: float | None, timeout: float) -> Limits:
    """Return them checked, none beyond what engines can count to. Raises `TypeError`, `ValueError`."""
    return Limits(
        min(check_number("history", history, 100), _LONGEST_HISTORY),
        None if history_seconds is None else min(check_seconds("history_seconds", history_seconds), _LONGEST_HISTORY),
        min(check_seconds("timeout", timeout), _LONGEST_TIMEOUT),
    )


class Transport(Protocol):
    """What makes requests, each on a connection that nobody else uses at the time."""

    def request(self, request: Operation[Any]) -> Any:
        """Make `request`, and return what came of it."""
        ...

    def interrupt(self) -> None:
        """Let a request that waits for something to happen return or fail soon. From any thread."""
        ...

    def close(self) -> None:
        """Close the connections: idle ones now, each other one when its request has ended."""
        ...

    def abandon(self) -> None:
        """In a child process: forget the parent's connections, and touch none."""
        ...


class AsyncTransport(Protocol):
    """Same as `Transport`, for any number of event loops, each with connections of its own."""

    async def request(self, request: Operation[Any]) -> Any:
        """Same as `Transport.request`. Cancelled, it leaves no connection in the midst of a request."""
        ...

    async def close(self) -> None:
        """Close the connections of this loop, and let those of other loops be closed there."""
        ...

    def close_soon(self) -> None:
        """Let the connections of all loops be closed there. From any thread."""
        ...

    def abandon(self) -> None:
        """Same as `Transport.abandon`."""
        ...
