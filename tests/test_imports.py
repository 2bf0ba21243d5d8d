"""The house rules that a machine can check: who imports whom, what stays light, how long a file is."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "feddm_flwr"
FILES = sorted(PACKAGE.rglob("*.py"))

#: A room, which is a folder or a file at the top, imports only rooms on lines above its own. docs/architecture.md says
#: what is in each.
LEVELS = [
    "config storage vector",
    "compute protocol aggregation codecs data reporting privacy",
    "exchange models",
    "training evaluation",
    "extensions",
    "server node cli contrib",  # three processes, and what users add: never each other
    "server_app client_app __main__",
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms.split()}
#: No torch at all, not even inside a function.
NO_TORCH = {"config", "storage", "vector", "protocol", "aggregation", "data", "reporting", "privacy"}
#: A node does not know Flower: client_app hands it plain values.
FLWR = {"server_app", "client_app", "server", "cli"}
#: Costly to import: only inside the functions that need them, but for the rooms that are about them.
HEAVY = {"bitsandbytes", "torch", "diffusers", "datasets", "flwr_datasets", "matplotlib", "sklearn", "ray"}
MAY_BE_HEAVY = {"codecs", "compute", "evaluation", "exchange", "models", "server", "training", "contrib"}
#: Of rooms that are light, the modules that nobody imports before torch is needed.
HEAVY_MODULES = {"cli.trained_model", "node.train", "node.evaluate", "node.kept"}


def module_of(path: Path) -> str:
    """The module of a file below the package, such as `codecs.grid`; that of a folder's `__init__` is the folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_of(path): path for path in FILES}


@cache
def imports(path: Path, *, top_level: bool = False) -> frozenset[str]:
    """Names of the modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    found: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            parent = node.module.removeprefix("feddm_flwr").removeprefix(".")
            modules = {alias.name for alias in node.names if f"{parent}.{alias.name}".removeprefix(".") in MODULES}
            found |= {f"{node.module}.{name}" for name in modules}
            if len(modules) < len(node.names):
                found.add(node.module)
    return frozenset(found)


def own(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    names = (name.removeprefix("feddm_flwr.") for name in imports(path) if name.startswith("feddm_flwr."))
    return {*names} & {*MODULES}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def packages(path: Path, *, top_level: bool = False) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path, top_level=top_level)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module: str) -> None:
    if module:
        here = room_of(module)
        assert here in LEVEL, f"{here} has no line in LEVELS"
        for other in own(MODULES[module]):
            assert room_of(other) == here or LEVEL[room_of(other)] < LEVEL[here], f"{module} imports {other}"


def test_within_a_room_there_are_no_circles() -> None:
    graph = {module: own(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in graph[module]:
                walk(other, (*above, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_the_doors_of_the_app_are_light() -> None:
    # Flower loads the server's before it starts the nodes.
    assert own(PACKAGE / "server_app.py") == {"server.run"}
    assert imports(PACKAGE / "server_app.py", top_level=True) == {"__future__", "flwr.app", "flwr.serverapp"}


@pytest.mark.parametrize("module", MODULES)
def test_flwr_and_torch_stay_where_they_belong(module: str) -> None:
    found, here = packages(MODULES[module]), room_of(module)
    if here not in FLWR:
        assert "flwr" not in found
    if here in NO_TORCH:
        assert not found & {"torch", "diffusers"}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_late(module: str) -> None:
    if room_of(module) not in MAY_BE_HEAVY and module not in HEAVY_MODULES:
        assert not packages(MODULES[module], top_level=True) & HEAVY


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_one_idea(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 400


def test_the_house_is_as_it_is_drawn() -> None:
    """Every room of the list is there, and the arrows between rooms are counted for who changes them."""
    assert {room_of(module) for module in MODULES} - {""} == {*LEVEL}
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        arrows[room_of(module)] |= {room_of(other) for other in own(path)} - {room_of(module)}
    up = [(a, b) for a, found in arrows.items() for b in found if a and b and LEVEL[b] >= LEVEL[a]]
    print(f"{len(LEVEL)} rooms on {len(LEVELS)} levels, {sum(map(len, arrows.values()))} arrows, {len(up)} upward")
    assert not up


@pytest.mark.parametrize("module", MODULES)
def test_a_docstring_begins_with_what_the_function_does(module: str) -> None:
    """As in "Returns the gradient norm of every parameter"; a property names what it is."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text, decorators = ast.get_docstring(node), {ast.unparse(of) for of in node.decorator_list}
            if text and not decorators & {"property", "contextmanager"}:
                assert re.match(r"[A-Z][a-z]+s\b", text), f"{module}.{node.name}: {text.splitlines()[0]!r}"


def test_the_documents_have_the_levels_that_hold() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.M)
    told = {int(level): {*re.findall(r"`(\w+)`", rooms)} for level, rooms in rows}
    assert told == {number + 1: {*rooms.split()} for number, rooms in enumerate(LEVELS)}
