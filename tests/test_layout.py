"""The shape of the package: what imports what, what is public, and that the colours agree."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar

import stigmergy
from stigmergy import AsyncStore, Hooks, MemoryStore, Store, apply_middleware, with_hooks

ROOT = Path(stigmergy.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
PUBLIC = [name for name in MODULES if not re.search(r"\._", name)]
# The demo is a program: nobody imports from it.
LIBRARY = [name for name in PUBLIC if not name.startswith("stigmergy.demo.")]
# The map in the docstring of the package: each line is one name, or several, and two spaces before what it is.
MAP = ", ".join(re.findall(r"^    (\S.*?)  ", stigmergy.__doc__ or "", re.MULTILINE)).split(", ")


class Import(NamedTuple):
    module: str
    """What is imported: a module, or a package and a name in it."""
    line: int


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[Import]:
    """What is imported when the module is: not within functions, and not for type checkers only."""
    pending: list[ast.AST] = [tree(module)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(inner if inner in MODULES else str(node.module), node.lineno)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)


@cache
def own_imports(module: str) -> list[Import]:
    return [each for each in imports(module) if each.module.split(".")[0] == "stigmergy"]


def place(module: str) -> str:
    """The name on the map under which `module` is."""
    return module.split(".")[1]


def imported_by_the_package() -> set[str]:
    """The modules that `import stigmergy` brings."""
    found: set[str] = set()
    pending = ["stigmergy"]
    while pending:
        module = pending.pop()
        if module not in found:
            found.add(module)
            pending += [each.module for each in own_imports(module)]
    return found


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=100)


# -- the map -----------------------------------------------------------------------------------------------------------


def test_the_map_shows_every_module_and_no_other() -> None:
    there = {place(module) for module in MODULES if module not in ("stigmergy", "stigmergy.__main__")}

    assert set(MAP) == there
    assert len(MAP) == len(set(MAP))


def test_a_module_imports_only_modules_listed_above_it() -> None:
    core = imported_by_the_package()
    wrong = []
    for module in MODULES.keys() - {"stigmergy"}:
        own = "" if module == "stigmergy.__main__" else place(module)
        above = MAP[: MAP.index(own)] if own else MAP
        for imported, line in own_imports(module):
            where = f"{module}, line {line}, imports {imported}"
            if imported == "stigmergy":
                wrong += [f"{where}, which imports it"] * (module in core)
            elif place(imported) != own:
                wrong += [f"{where}, which is not above it"] * (place(imported) not in above)
                wrong += [f"{where}, which is private"] * bool(re.search(r"\._(?!core\.)", imported))

    assert sorted(wrong) == []


def test_providers_share_only_private_modules() -> None:
    for module in MODULES:
        if module.startswith("stigmergy.providers."):
            for imported, line in own_imports(module):
                if place(imported) == "providers":
                    assert re.search(r"\._", imported), f"{module}, line {line}, imports {imported}"


def test_nothing_imports_the_tools_for_tests_but_themselves() -> None:
    assert [
        f"{module}, line {line}"
        for module in MODULES
        for imported, line in own_imports(module)
        if imported.startswith("stigmergy.testing") and not module.startswith("stigmergy.testing")
    ] == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: {each.module for each in own_imports(module)} - {"stigmergy"} for module in MODULES}
    while leaves := [module for module in graph if not graph[module] & graph.keys()]:
        for module in leaves:
            del graph[module]

    assert graph == {}


def test_the_package_does_nothing_but_re_export() -> None:
    docstring, *statements, exported = tree("stigmergy").body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(each, ast.ImportFrom) for each in statements)
    assert {each.module.split(".")[0] for each in imports("stigmergy")} == {"stigmergy"}
    assert ast.unparse(exported).startswith("__all__ = [")


# -- public names ------------------------------------------------------------------------------------------------------


def defined_in(module: ModuleType) -> set[str]:
    """The public names that a module defines itself."""
    names: set[str] = set()
    for node in tree(module.__name__).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_") and not isinstance(getattr(module, name, None), TypeVar)}


def test_a_modules_all_is_sorted_and_names_what_is_there() -> None:
    for name in PUBLIC:
        module = importlib.import_module(name)
        exported = getattr(module, "__all__", [])

        assert exported == sorted(set(exported)), name
        assert [each for each in exported if not hasattr(module, each)] == [], name
        assert MODULES[name].name == "__init__.py" or set(exported) <= defined_in(module), name


def test_the_package_exports_every_public_name_it_imports() -> None:
    there = {
        name for name, item in vars(stigmergy).items() if not name.startswith("_") and not isinstance(item, ModuleType)
    }

    assert there == set(stigmergy.__all__)


def test_what_the_package_exports_is_public_where_it_is_defined() -> None:
    for node in tree("stigmergy").body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert {alias.name for alias in node.names} <= set(module.__all__), node.module


def members(item: type) -> dict[str, Any]:
    return {name: member for name, member in vars(item).items() if not name.startswith("_")}


def without_docstring(name: str) -> list[str]:
    """The public classes and functions of a module that say nothing themselves: generated docstrings do not count."""
    public = set(getattr(importlib.import_module(name), "__all__", []))
    definitions = [
        each for each in tree(name).body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    ]
    documented = {each.name for each in definitions if ast.get_docstring(each)}
    return [each.name for each in definitions if each.name in public and each.name not in documented]


def is_documented(item: type, name: str) -> bool:
    """Whether a method has a docstring, or one that it overrides."""
    return any((vars(base)[name].__doc__ or "").strip() for base in item.__mro__ if name in vars(base))


def test_everything_public_has_a_docstring() -> None:
    modules = [importlib.import_module(name) for name in LIBRARY]
    public = [getattr(module, name) for module in modules for name in getattr(module, "__all__", [])]

    assert [module.__name__ for module in modules if not module.__doc__] == []
    assert [f"{name}.{each}" for name in LIBRARY for each in without_docstring(name)] == []
    assert [
        f"{item.__module__}.{item.__name__}.{member}"
        for item in filter(inspect.isclass, public)
        for member, value in members(item).items()
        if isinstance(value, (FunctionType, property, classmethod, staticmethod))
        and not member.startswith("test_")  # its name is a sentence
        and not is_documented(item, member)
    ] == []


# -- the two colours ---------------------------------------------------------------------------------------------------

OPENING = {"watch", "observe"}
"""What returns a `Watch` in one colour, and in the other what is yet to be opened."""
PLAIN = {*OPENING, "require"}


def methods(item: type) -> dict[str, FunctionType]:
    return {name: member for name, member in members(item).items() if isinstance(member, FunctionType)}


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any, Any]]:
    signature = inspect.signature(function)
    return [(each.name, each.kind, each.default, each.annotation) for each in signature.parameters.values()]


def test_both_colours_have_the_same_methods() -> None:
    assert list(methods(Store)) == list(methods(AsyncStore))
    assert set(members(Store)) - set(members(AsyncStore)) == {"aio", "blocking"}
    assert set(members(AsyncStore)) - set(members(Store)) == {"sync"}


def test_a_method_has_the_same_parameters_and_result_in_both_colours() -> None:
    for name, plain in methods(Store).items():
        awaited = getattr(AsyncStore, name)
        results = [inspect.signature(method).return_annotation for method in (plain, awaited)]

        assert parameters(plain) == parameters(awaited), name
        assert results == (["Watch", "Opening"] if name in OPENING else [results[0]] * 2), name


def test_exactly_what_returns_at_once_is_plain_in_the_async_colour() -> None:
    assert {
        name for name, function in methods(AsyncStore).items() if not inspect.iscoroutinefunction(function)
    } == PLAIN
    assert not any(map(inspect.iscoroutinefunction, methods(Store).values()))


def test_the_primitives_are_the_same_five() -> None:
    assert Store.__abstractmethods__ == AsyncStore.__abstractmethods__
    assert Store.__abstractmethods__ == {"get_entry", "scan", "commit", "open_watch", "close"}


def test_the_async_twin_says_what_it_is_the_same_as() -> None:
    for name, method in methods(AsyncStore).items():
        assert (method.__doc__ or "").startswith(f"Same as `Store.{name}`"), name


def implementations() -> list[type]:
    """The stores of the package, of either colour, public and private."""
    memory = MemoryStore()

    class Blocking(MemoryStore):
        blocking = True

    layered = apply_middleware(memory, with_hooks(Hooks()))
    stores = [memory, memory.aio, Blocking().aio, layered, layered.aio]
    return [type(store) for store in stores]


def test_a_store_takes_the_parameters_of_the_contract() -> None:
    for implementation in implementations():
        contract = AsyncStore if issubclass(implementation, AsyncStore) else Store
        for name, declared in methods(contract).items():
            there, where = getattr(implementation, name), f"{implementation.__name__}.{name}"
            assert parameters(there) == parameters(declared), where
            assert inspect.iscoroutinefunction(there) is inspect.iscoroutinefunction(declared), where


# -- what importing costs ----------------------------------------------------------------------------------------------


def imported_modules(program: str) -> set[str]:
    """The modules that a fresh interpreter imports for `program`."""
    report = run_python("-X", "importtime", "-c", program).stderr
    return set(re.findall(r"^import time:.*\|\s*(\S+)$", report, re.MULTILINE))


def test_importing_the_library_does_not_import_asyncio() -> None:
    modules = imported_modules("import stigmergy")

    assert "stigmergy.store" in modules
    assert [module for module in modules if module.split(".")[0] in ("asyncio", "concurrent", "socket", "ssl")] == []
    assert [module for module in modules if re.match(r"stigmergy\.(bridge|cli|demo)", module)] == []


def test_a_program_without_asyncio_stays_without_it() -> None:
    modules = imported_modules(
        "from stigmergy import open_store\n"
        "with open_store('memory') as store:\n"
        "    watch = store.watch('a')\n"
        "    store.set('a', 1, ttl=60)\n"
        "    assert watch.get(timeout=60).value == 1\n"
        "    assert store.update('a', lambda value: value + 1) == 2\n"
        "    assert store.wait_for('a', lambda value: value == 2).revision == 2\n"
    )

    assert "asyncio" not in modules
    assert "stigmergy.bridge" not in modules


def test_the_core_needs_nothing_but_the_standard_library() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); import stigmergy; stigmergy.open_store('memory')"

    assert run_python("-I", "-S", "-c", program).stderr == ""


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "py.typed").exists()
