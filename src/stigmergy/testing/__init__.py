"""Tests for stores, and for programs that use them. Needs the extra `testing`; nothing else in the package imports it.

    StoreConformance          what every store must do: subclass it, give it one fixture (`conformance`)
    Colour                    one test for both colours (`colour`)
    VirtualClock, HostClock   time for tests (`clock`)
    history                   calls of concurrent clients, recorded
    linearizability           is there one order that explains a history?
    laws                      what a watch delivered, against the log of commits
    model                     a store as a dict and a list, the oracle of the state machine
    machine                   any sequence of operations, against the model
    loop                      an event loop with a seed and virtual time
    preemption                threads that are switched in the most awkward places

`stigmergy.pytest_plugin` has the fixtures `store`, `async_store`, `virtual_clock` and `seed`.
"""

from stigmergy.testing.clock import HostClock, VirtualClock
from stigmergy.testing.colour import Colour
from stigmergy.testing.conformance import StoreConformance

__all__ = ["Colour", "HostClock", "StoreConformance", "VirtualClock"]
