"""The registry: names and URLs to providers."""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from stigmergy import (
    AsyncStore,
    MemoryStore,
    ProviderNotFound,
    Store,
    StoreFull,
    list_providers,
    open_async_store,
    open_store,
    register,
    registry,
)


@pytest.fixture(autouse=True)
def _registered_for_this_test_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install(source, **entry_points)`: a distribution with one module `shiny`, as pip would leave it."""

    def install(source: str, **entry_points: str) -> None:
        folder = tmp_path / "shiny_provider-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: shiny-provider\nVersion: 1.0\n")
        lines = [f"{name} = {path}" for name, path in entry_points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[stigmergy.providers]", *lines, ""]))
        (tmp_path / "shiny.py").write_text(dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "shiny", raising=False)

    return install


SHINY = """
    from stigmergy import MemoryStore

    class ShinyStore(MemoryStore):
        pass

    def open_shiny(url, **options):
        store = ShinyStore(**options)
        store.set("url", url)
        return store
"""


# -- names and URLs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["memory", "memory:", "memory:/", "memory://", "memory:///", "inmemory", "inmemory://", "Memory://"],
)
def test_a_store_is_opened_by_its_name_or_url(url: str) -> None:
    with open_store(url) as store:
        assert isinstance(store, MemoryStore)
        assert store.set("a", 1) == 1


def test_each_call_opens_a_new_store() -> None:
    with open_store("memory") as one, open_store("memory") as other:
        one.set("a", 1)

        assert other.get("a") is None


def test_an_async_store_is_the_other_face_of_a_new_store() -> None:
    async def use() -> None:
        async with open_async_store("memory://?max_entries=1") as store:
            assert isinstance(store, AsyncStore)
            assert isinstance(store.sync, MemoryStore)
            assert store.sync.aio is store
            await store.set("a", 1)
            with pytest.raises(StoreFull):
                await store.set("b", 1)

    asyncio.run(use())


@pytest.mark.parametrize("open", [open_store, lambda url, **options: open_async_store(url, **options).sync])
def test_options_go_to_the_provider(open: Any) -> None:
    value = [1]
    with open("memory", copy=None, max_entries=1) as store:
        store.set("a", value)

        assert store.get("a") is value
        with pytest.raises(StoreFull):
            store.set("b", 1)


@pytest.mark.parametrize(
    "url", ["memory://?history=0", "inmemory://?history=0", "memory:?history=0", "memory:///?history=0"]
)
def test_the_query_of_a_url_holds_options(url: str) -> None:
    with open_store(url) as store:
        assert "resumable" not in store.capabilities


def test_several_options_may_be_in_a_query_and_arguments_win() -> None:
    with open_store("memory://?history=0&max_entries=1", history=5) as store:
        store.set("a", 1)

        assert "resumable" in store.capabilities
        with pytest.raises(StoreFull):
            store.set("b", 1)


@pytest.mark.parametrize(
    "url",
    [
        "memory://?nonsense=1",
        "memory://?history=many",
        "memory://?history=-1",
        "memory://?history=",
        "memory://?max_entries=0",
        "memory://?copy=none",
        "memory://name",
        "memory:///name",
        "memory://user@host/0",
    ],
)
def test_a_url_that_means_nothing_to_the_memory_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"a memory store has no|max_entries must be"):
        open_store(url)


def test_an_option_that_the_provider_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        open_store("memory", nonsense=1)


def test_a_path_is_no_url_and_is_told_how_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="sqlite:///"):
        open_store(tmp_path / "state.db")  # type: ignore[arg-type]


@pytest.mark.parametrize("open", [open_store, open_async_store])
@pytest.mark.parametrize("name", ["reddis", "", "memory2", "mem", "memory/x"])
def test_an_unknown_name_lists_the_known_ones(open: Callable[[str], object], name: str) -> None:
    with pytest.raises(ProviderNotFound) as unknown:
        open(name)

    assert unknown.value.name == name
    assert unknown.value.known == tuple(list_providers())
    assert str(unknown.value) == f"no provider is called {name!r}; known: {', '.join(list_providers())}"
    assert isinstance(unknown.value, LookupError)
    assert str(pickle.loads(pickle.dumps(unknown.value))) == str(unknown.value)


def test_the_error_of_an_unknown_name_shows_no_password() -> None:
    with pytest.raises(ProviderNotFound) as unknown:
        open_store("reddis://user:xyzzy@localhost/0?token=xyzzy")

    assert unknown.value.name == "reddis"
    assert "xyzzy" not in repr(unknown.value) + str(unknown.value)


def test_the_providers_are_listed_sorted() -> None:
    register("zebra", MemoryStore)
    register("aardvark", MemoryStore)

    names = list_providers()

    assert names == sorted(set(names))
    assert {"aardvark", "inmemory", "memory", "zebra"} <= set(names)


def test_the_table_of_providers_is_sorted() -> None:
    assert list(registry._BUILT_IN) == sorted(registry._BUILT_IN)


def test_every_provider_of_the_table_has_a_factory_or_an_extra() -> None:
    for name, (path, extra) in registry._BUILT_IN.items():
        try:
            assert callable(registry._built_in(path, extra)), name
        except ImportError:
            assert extra, name


# -- registering -------------------------------------------------------------------------------------------------------


def test_a_registered_factory_is_handed_the_url_and_the_options() -> None:
    asked = []

    def factory(url: str, **options: Any) -> Store:
        asked.append((url, options))
        return MemoryStore()

    register("mine", factory)
    open_store("mine://host/path?query", size=3)
    open_async_store("mine")
    open_store("MINE://Host")

    assert asked == [("mine://host/path?query", {"size": 3}), ("mine", {}), ("MINE://Host", {})]


def test_a_name_that_is_taken_is_not_replaced() -> None:
    def first(url: str) -> Store:
        return MemoryStore(history=0)

    def second(url: str) -> Store:
        return MemoryStore()

    register("mine", first)

    with pytest.raises(ValueError, match="a provider called 'mine' exists already"):
        register("mine", second)
    assert "resumable" not in open_store("mine").capabilities


@pytest.mark.parametrize("name", ["memory", "inmemory"])
def test_a_built_in_name_is_not_replaced(name: str) -> None:
    with pytest.raises(ValueError, match=f"a provider called '{name}' exists already"):
        register(name, lambda url: MemoryStore(history=0))

    assert "resumable" in open_store(name).capabilities


def test_registering_the_same_factory_again_is_fine() -> None:
    register("mine", MemoryStore)
    register("mine", MemoryStore)

    assert "mine" in list_providers()


@pytest.mark.parametrize(
    "name", ["", "Mine", "1st", "-", "my store", "my/store", "my:store", "my_store", "mine\n", "é"]
)
def test_a_name_that_is_no_url_scheme_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a provider"):
        register(name, MemoryStore)

    assert name not in list_providers()


@pytest.mark.parametrize("name", ["a", "mine", "redis+sentinel", "my-store", "v1.2"])
def test_a_url_scheme_is_a_name(name: str) -> None:
    register(name, lambda url: MemoryStore())

    assert isinstance(open_store(f"{name}://x"), MemoryStore)


def test_a_factory_may_return_an_async_store() -> None:
    faces = []

    def factory(url: str) -> AsyncStore:
        faces.append(MemoryStore().aio)
        return faces[-1]

    register("mine", factory)

    with open_store("mine") as store:
        assert isinstance(store, Store)
        assert store.aio is faces[0]
        assert store.set("a", 1) == 1
    assert open_async_store("mine") is faces[1]


def test_a_provider_for_asyncio_only_is_opened_as_an_async_store() -> None:
    class Native(type(MemoryStore().aio)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(MemoryStore())
            self._faces.clear()

    register("mine", lambda url: Native())

    assert isinstance(open_async_store("mine"), Native)
    with pytest.raises(TypeError, match="asyncio only"):
        open_store("mine")


# -- entry points ------------------------------------------------------------------------------------------------------


def test_a_package_registers_its_provider_by_an_entry_point(install: Callable[..., None]) -> None:
    install(SHINY, shiny="shiny:open_shiny")

    assert "shiny" in list_providers()
    with open_store("shiny://host/0", history=0) as store:
        assert type(store).__name__ == "ShinyStore"
        assert store.get("url") == "shiny://host/0"
        assert "resumable" not in store.capabilities
    assert type(open_async_store("shiny").sync).__name__ == "ShinyStore"


def test_a_package_is_not_imported_until_its_provider_is_opened(install: Callable[..., None]) -> None:
    install("raise ZeroDivisionError", shiny="shiny:open_shiny")

    assert "shiny" in list_providers()
    with open_store("memory") as store:
        store.set("a", 1)
    with pytest.raises(ProviderNotFound, match="shiny"):
        open_store("unknown")
    assert "shiny" not in sys.modules
    with pytest.raises(ZeroDivisionError):
        open_store("shiny")


def test_built_in_names_win_over_entry_points(install: Callable[..., None]) -> None:
    install(SHINY, memory="shiny:open_shiny", inmemory="shiny:open_shiny")

    for name in ("memory", "inmemory"):
        assert type(open_store(name)) is MemoryStore
    assert list_providers().count("memory") == 1


def test_registered_names_win_over_entry_points(install: Callable[..., None]) -> None:
    install(SHINY, shiny="shiny:open_shiny")
    register("shiny", lambda url: MemoryStore())

    assert type(open_store("shiny")) is MemoryStore


# -- extras ------------------------------------------------------------------------------------------------------------


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BUILT_IN", {"fancy": ("fancy_engine_that_nobody_has:open_fancy", "fancy")})

    with pytest.raises(ImportError, match=r"pip install 'stigmergy\[fancy\]'") as missing:
        open_store("fancy://host")

    assert isinstance(missing.value.__cause__, ModuleNotFoundError)


def test_a_provider_without_an_extra_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BUILT_IN", {"broken": ("module_that_nobody_has:open_broken", None)})

    with pytest.raises(ModuleNotFoundError, match="module_that_nobody_has"):
        open_store("broken")
