"""The dependency rules: who may import whom, function-local imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rexrag"
FILES = sorted(PACKAGE.rglob("*.py"))

FOUNDATION = {
    *("rexrag.types", "rexrag.errors", "rexrag.sections", "rexrag.config", "rexrag.metrics"),
    "rexrag.retrieval.backoff",  # arithmetic that both the settings and the retriever need
    "rexrag.retrieval.settings",
}
APART = ("rexrag.engine", "rexrag.actors", "rexrag.buffer", "rexrag.learner")
ENGINE_OF_ACTORS = {"rexrag.engine.protocol"}
"""What `actors/` knows of `engine/`; its module `build` alone knows the engines themselves."""
ENTRANCES = {"rexrag.cli", "rexrag.__main__"}
MAX_TOP_MODULES = 14
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_RAY_FILES = 16


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def names_imported(module: str) -> Iterator[str]:
    """Dotted names, most specific first known: `from a import b` gives `a.b` where that is a module, else `a`."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            base = node.module or ""
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def own_imports(module: str) -> set[str]:
    return {name for name in names_imported(module) if name in MODULES}


def libraries(module: str) -> set[str]:
    return {name.partition(".")[0] for name in names_imported(module)} - {"rexrag"}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def reachable(module: str) -> set[str]:
    found: set[str] = set()
    todo = [module]
    while todo:
        for name in own_imports(todo.pop()) - found:
            found.add(name)
            todo.append(name)
    return found


def is_entrance(module: str) -> bool:
    return module in ENTRANCES or within(module, "rexrag.commands")


def is_shell(module: str) -> bool:
    return module.endswith("_actor")


def test_the_walk_sees_the_package() -> None:
    assert "rexrag.errors" in own_imports("rexrag.recipe")
    assert "rexrag.run.train" in own_imports("rexrag.cli"), "function-local imports are seen"


@pytest.mark.parametrize("module", sorted(FOUNDATION))
def test_the_foundation_imports_nothing_above_it(module: str) -> None:
    assert own_imports(module) <= FOUNDATION


def test_the_top_shows_the_rooms() -> None:
    top = [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    assert len(top) <= MAX_TOP_MODULES, sorted(top)


def room_of(module: str) -> str | None:
    return next((room for room in APART if within(module, room)), None)


def crossings(module: str) -> set[str]:
    """What a module of one room imports, directly or not, of the others."""
    found: set[str] = set()
    for name in {module, *reachable(module)} - {"rexrag.actors.build"}:
        home = room_of(name)
        if home is not None and home == room_of(module):
            found |= {other for other in own_imports(name) if room_of(other) not in (None, home)}
    return found


@pytest.mark.parametrize("module", [module for module in sorted(MODULES) if room_of(module)])
def test_engine_actors_buffer_and_learner_never_import_one_another(module: str) -> None:
    allowed = ENGINE_OF_ACTORS if within(module, "rexrag.actors") else set()
    assert crossings(module) <= allowed
    if "rexrag.actors.build" not in {module, *reachable(module)}:
        assert {name for name in reachable(module) if room_of(name) not in (None, room_of(module))} <= allowed


def test_only_run_and_the_entrances_know_all_parts() -> None:
    for module in MODULES:
        if room_of(module) is None and not within(module, "rexrag.run") and not is_entrance(module):
            assert not {name for name in own_imports(module) if room_of(name)}, module


def test_nothing_but_the_entrances_imports_run() -> None:
    users = {module for module in MODULES if any(within(name, "rexrag.run") for name in own_imports(module))}
    assert not {user for user in users if not within(user, "rexrag.run") and not is_entrance(user)}


def test_the_model_room_serves_learner_and_warm_start_and_knows_neither() -> None:
    apart = (*APART, "rexrag.preparation", "rexrag.run")
    for module in MODULES:
        if within(module, "rexrag.model"):
            assert not [name for name in reachable(module) if any(within(name, room) for room in apart)], module


def test_no_cycles() -> None:
    graph = {module: own_imports(module) - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_names_come_from_the_module_that_defines_them() -> None:
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                own = node.module == "rexrag"
                package = MODULES[node.module].name == "__init__.py"
                submodules = all(f"{node.module}.{alias.name}" in MODULES for alias in node.names)
                assert not own or submodules, f"{module}:{node.lineno}: imports from the package itself"
                assert not package or submodules, f"{module}:{node.lineno}: imports a name through {node.module}"


def test_ray_stays_in_the_shells_and_in_run() -> None:
    users = {module for module in MODULES if "ray" in libraries(module)}
    assert len(users) <= MAX_RAY_FILES, sorted(users)
    for module in users:
        assert is_shell(module) or within(module, "rexrag.run"), f"{module} is no shell and imports ray"


def test_no_torch_in_types_settings_and_buffer() -> None:
    for module in MODULES:
        if module in FOUNDATION or within(module, "rexrag.buffer"):
            users = {name for name in {module, *reachable(module)} if libraries(name) & {"torch", "transformers"}}
            assert not users, f"{module} reaches torch through {users}"


def test_the_pure_parts_run_where_their_shells_libraries_are_missing() -> None:
    heavy = {"pydantic", "ray", "tantivy", "vllm", "faiss"}
    pure = [m for m in MODULES if within(m, "rexrag.learner") and not is_shell(m)]
    for module in [*pure, "rexrag.engine.torch_engine"]:
        users = {name: libraries(name) & heavy for name in {module, *reachable(module)} if libraries(name) & heavy}
        assert not users, f"{module} needs {users}"


def test_importing_the_settings_loads_nothing_heavy() -> None:
    code = "import sys, rexrag.config; print(*({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_writing_text_files_loads_no_torch() -> None:
    code = "import sys, rexrag.worlds.write, rexrag.data.check; print(*({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import sys, rexrag.cli; print(*({'torch', 'ray', 'tantivy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_a_head_and_a_screen(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree_of(module_of(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_is_annotated(path: Path) -> None:
    for node in ast.walk(tree_of(module_of(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            spec = node.args
            named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
            bare = [a.arg for a in named if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{node.name}:{node.lineno}: {bare}"
            assert node.returns is not None, f"{node.name}:{node.lineno}: no return annotation"
