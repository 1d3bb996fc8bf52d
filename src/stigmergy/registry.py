"""Names and URLs to providers."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from types import MappingProxyType
from typing import Any, TypeAlias

from stigmergy.aio import AsyncStore
from stigmergy.errors import ProviderNotFound
from stigmergy.store import Store

__all__ = ["Factory", "list_providers", "open_async_store", "open_store", "register"]

Factory: TypeAlias = Callable[..., Store | AsyncStore]
"""`factory(url, **options)` opens a new store."""

_NAME = re.compile(r"[a-z][a-z0-9+.-]*")
_GROUP = "stigmergy.providers"

# Name: where its factory is, and the extra that brings what it needs. Sorted; a test looks.
_BUILT_IN = MappingProxyType(
    {
        "inmemory": ("stigmergy.providers.memory:open_memory", None),
        "memory": ("stigmergy.providers.memory:open_memory", None),
        "redis": ("stigmergy.providers.redis:open_redis", "redis"),
        "rediss": ("stigmergy.providers.redis:open_redis", "redis"),
        "sqlite": ("stigmergy.providers.sqlite:open_sqlite", None),
        "unix": ("stigmergy.providers.redis:open_redis", "redis"),
        "valkey": ("stigmergy.providers.redis:open_redis", "redis"),
        "valkeys": ("stigmergy.providers.redis:open_redis", "redis"),
    }
)
_registered: dict[str, Factory] = {}


def open_store(url: str, **options: Any) -> Store:
    """Open a new store: `open_store("memory")`, `open_store("memory://?history=0")`. `options` go to the provider.

    Raises `ProviderNotFound`, which lists the known names; `ImportError`, which says what to install; `TypeError` for a
    provider that is for asyncio only (`open_async_store` opens it); what the provider raises.
    """
    store = _opened(url, options)
    return store.sync if isinstance(store, AsyncStore) else store


def open_async_store(url: str, **options: Any) -> AsyncStore:
    """Same as `open_store`, for asyncio."""
    store = _opened(url, options)
    return store if isinstance(store, AsyncStore) else store.aio


def register(name: str, factory: Factory) -> None:
    """Make `factory(url, **options)` the provider called `name`, for URLs that begin with `name:` or are `name`.

    Raises `ValueError` for a name that is no URL scheme, or is taken. A package registers its own for everybody by an
    entry point in the group `stigmergy.providers`; built-in names win over those, and names registered here too.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a provider: lower-case letters, digits, '+', '.', '-'")
    if name in _BUILT_IN or _registered.setdefault(name, factory) is not factory:
        raise ValueError(f"a provider called {name!r} exists already")


def list_providers() -> list[str]:
    """Return the names of all providers, sorted."""
    return sorted({*_BUILT_IN, *_registered, *_entry_points()})


def _opened(url: str, options: dict[str, Any]) -> Store | AsyncStore:
    if not isinstance(url, str):
        raise TypeError(
            f"a store is opened by a name or a URL (a file: sqlite:///state.db), not by a {type(url).__name__}"
        )
    return _factory(url)(url, **options)


def _factory(url: str) -> Factory:
    name = url.partition(":")[0].lower()
    if name in _BUILT_IN:
        return _built_in(*_BUILT_IN[name])
    if name in _registered:
        return _registered[name]
    entry_points = _entry_points()
    if name in entry_points:
        factory: Factory = entry_points[name].load()
        return factory
    raise ProviderNotFound(name, tuple(list_providers()))


def _built_in(path: str, extra: str | None) -> Factory:
    module, _, attribute = path.partition(":")
    try:
        factory: Factory = getattr(import_module(module), attribute)
    except ImportError as error:
        if extra is None:
            raise
        raise ImportError(f"this provider needs an extra: pip install 'stigmergy[{extra}]'") from error
    return factory


def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=_GROUP)}
