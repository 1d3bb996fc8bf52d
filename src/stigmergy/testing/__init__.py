"""Tests for stores, and for programs that use them. Needs the extra `testing`; nothing else in the package imports it.

    StoreConformance  what every store must do: subclass it, give it one fixture (`conformance`, `report`)
    StoreMachine      any sequence of operations, against a store that is a dict and a list (`machine`, `model`)
    record_calls, check_linearizable, check_revisions
                      is there one order that explains what concurrent clients were told? (`traffic`, `history`,
                      `linearizability`)
    record_watches, check_watched, check_watch, check_observe, check_log
                      what watches delivered, against the log of commits (`traffic`, `laws`)
    preemption        threads that are switched in the most awkward places
    SeededLoop, run_seeded, Stuck
                      an event loop with a seed and virtual time (`loop`)
    Colour            one test for both colours (`colour`)
    VirtualClock, HostClock
                      time for tests (`clock`)

`python -m stigmergy.testing URL` judges a store; `stigmergy.pytest_plugin` has the fixtures `store`, `async_store`,
`virtual_clock` and `seed`.
"""

from stigmergy.testing.clock import HostClock, VirtualClock
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance import StoreConformance
from stigmergy.testing.history import Client, History, Invocation, overlap
from stigmergy.testing.laws import check_log, check_observe, check_watch
from stigmergy.testing.linearizability import check_linearizable, check_revisions
from stigmergy.testing.loop import LeftBehind, SeededLoop, Stuck, run_seeded
from stigmergy.testing.machine import StoreMachine
from stigmergy.testing.model import ModelStore, ModelWatch
from stigmergy.testing.preemption import preemption
from stigmergy.testing.traffic import Watched, check_watched, record_calls, record_watches

__all__ = [
    "Client",
    "Colour",
    "History",
    "HostClock",
    "Invocation",
    "LeftBehind",
    "ModelStore",
    "ModelWatch",
    "SeededLoop",
    "StoreConformance",
    "StoreMachine",
    "Stuck",
    "VirtualClock",
    "Watched",
    "check_linearizable",
    "check_log",
    "check_observe",
    "check_revisions",
    "check_watch",
    "check_watched",
    "overlap",
    "preemption",
    "record_calls",
    "record_watches",
    "run_seeded",
]
