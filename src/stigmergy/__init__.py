"""Watchable shared state for software agents.

General layout, each module importing only those above it:

    _core       machinery that knows no store: forks, helper threads
    errors      StateError and its children
    model       what travels: Entry, Change, Snapshot, Set, Delete, Check
    keys        the grammar of keys, scopes
    values      isolation: how values are copied
    codec       how values become bytes, where they leave the process
    checks      bad input, refused before anything has changed
    flow        logic that never waits: operations, steps, run and arun
    threads     what an async interface does by blocking
    subscription  the buffer of one watch
    watch       Watch: what a program holds, and the two ways to wait
    hub         which watches does a change reach; recent changes
    store       Store: the contract
    aio         AsyncStore: the same, awaited
    bridge      the async interface of a store that was written for threads
    middleware  logic around every operation
    hooks       functions around reads and writes
    scope       handles: a store through a scope, an identity or a guard
    reducers    values that are merged instead of replaced
    lease       what a claim is made of: an entry with a ttl, taken, renewed and released
    claims      one owner at a time, with fencing
    tracing     spans and durations, by OpenTelemetry
    recipes     programs on the pieces above: the blackboard
    registry    names and URLs to providers
    providers   memory, sqlite, redis
    testing     the conformance suite, and tools for tests: imported by nothing above or below
    pytest_plugin  fixtures for pytest
    demo, cli   the command line
"""

from stigmergy.aio import AsyncStore
from stigmergy.claims import AsyncClaim, Claim, claim, owner_of
from stigmergy.errors import (
    AccessDenied,
    ClaimLost,
    Compacted,
    DamagedValue,
    InvalidKey,
    InvalidValue,
    Lagged,
    OutcomeUnknown,
    ProviderNotFound,
    RevisionConflict,
    StateError,
    StoreClosed,
    StoreFull,
    Unavailable,
    Unsupported,
    WatchClosed,
)
from stigmergy.flow import Call, Commit, Flow, GetEntry, Next, OpenWatch, Operation, Scan, Sleep, Step
from stigmergy.hooks import Hooks, compose_hooks, with_hooks
from stigmergy.keys import Scope, scoped_key
from stigmergy.middleware import Middleware, apply_middleware
from stigmergy.model import Change, Check, Delete, Entry, Op, Set, Snapshot, Write
from stigmergy.providers.memory import MemoryStore
from stigmergy.reducers import with_reducers
from stigmergy.registry import list_providers, open_async_store, open_store, register
from stigmergy.scope import acting_as, agent_store, guarded, scoped
from stigmergy.store import Store
from stigmergy.watch import Opening, Watch

__all__ = [
    "AccessDenied",
    "AsyncClaim",
    "AsyncStore",
    "Call",
    "Change",
    "Check",
    "Claim",
    "ClaimLost",
    "Commit",
    "Compacted",
    "DamagedValue",
    "Delete",
    "Entry",
    "Flow",
    "GetEntry",
    "Hooks",
    "InvalidKey",
    "InvalidValue",
    "Lagged",
    "MemoryStore",
    "Middleware",
    "Next",
    "Op",
    "OpenWatch",
    "Opening",
    "Operation",
    "OutcomeUnknown",
    "ProviderNotFound",
    "RevisionConflict",
    "Scan",
    "Scope",
    "Set",
    "Sleep",
    "Snapshot",
    "StateError",
    "Step",
    "Store",
    "StoreClosed",
    "StoreFull",
    "Unavailable",
    "Unsupported",
    "Watch",
    "WatchClosed",
    "Write",
    "acting_as",
    "agent_store",
    "apply_middleware",
    "claim",
    "compose_hooks",
    "guarded",
    "list_providers",
    "open_async_store",
    "open_store",
    "owner_of",
    "register",
    "scoped",
    "scoped_key",
    "with_hooks",
    "with_reducers",
]
