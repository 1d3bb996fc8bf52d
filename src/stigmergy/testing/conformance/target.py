"""What `python -m stigmergy.testing` runs: the suite over the store that `--stigmergy-url` names."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from stigmergy.aio import AsyncStore
from stigmergy.registry import list_providers, open_store
from stigmergy.store import Store
from stigmergy.testing.conformance.suite import StoreConformance

__all__ = ["TestTarget", "maker"]


class TestTarget(StoreConformance):
    """The suite over a store given by name."""

    @pytest.fixture
    def make_store(self, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Store | AsyncStore]:
        return maker(request.config.option.stigmergy_url, tmp_path)


def maker(target: str, place: Path | str) -> Callable[..., Store | AsyncStore]:
    """What makes the stores that `target` names: a URL or a name for `open_store`, or `module:callable`.

    `{tmp}` in it is replaced by `place`, a folder that nobody has used yet. Raises `LookupError` for what is neither,
    and what importing the module raises.
    """
    target = target.replace("{tmp}", str(place))
    module, _, path = target.partition(":")
    if not path or path.startswith("//") or module.lower() in list_providers():
        return lambda: open_store(target)
    found: Any = import_module(module)
    for name in path.split("."):
        if not hasattr(found, name):
            raise LookupError(f"module {module!r} has no {path!r}")
        found = getattr(found, name)
    if not callable(found):
        raise LookupError(f"{target!r} is not callable")
    make: Callable[..., Any] = found
    return make
