"""The law of the house: which room may import which, who reads the environment, what an import costs.

A room is what follows ``magi_attention.`` in a module's name. Every import counts, also one inside a function
and one that only type checkers see.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "magi_attention"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

FOUNDATION = {"errors", "env"}
LANGUAGE = {"common", "mask"} | FOUNDATION
MACHINE = {"plan", "kernels"} | LANGUAGE
LIBRARY = {"attention", "explain", "config", "dist", "testing"} | MACHINE
DOORS = {"api", "functional", "comm", "utils"}
EVERYTHING = {"package", "benchmarking"} | DOORS | LIBRARY
FRAMEWORKS = {"transformers"}

MAY_IMPORT = {
    "errors": set(),
    "env": set(),
    "common": {"errors"},
    "config": {"common", "errors"},
    "mask": {"common", "errors"},
    "plan": LANGUAGE,
    "kernels": {"plan"} | LANGUAGE,
    "attention": MACHINE,
    "explain": MACHINE,
    "dist": {"config", "attention"} | MACHINE,
    "testing": {"attention"} | MACHINE,
    "benchmarking": LIBRARY,
    "api": EVERYTHING,
    "functional": EVERYTHING,
    "comm": EVERYTHING,
    "utils": EVERYTHING,
    "integrations": EVERYTHING,
    "cli": EVERYTHING,
    "dropin": DOORS | {"errors"},
    "package": DOORS | LIBRARY,
}
"""The package's own ``__init__`` is the room "package"; it may import doors only inside functions."""


@dataclass(frozen=True)
class Import:
    line: int
    target: str
    eager: bool


def room_of(module: str) -> str:
    """``magi_attention.mask.bands`` -> ``mask``; the package itself -> ``package``."""
    parts = module.split(".")
    if len(parts) == 1:
        return "package"
    return "cli" if parts[1] == "__main__" else parts[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def targets(node: ast.AST, package: str) -> list[str]:
    """Full names that an import statement, or a call of ``import_module`` with a literal, refers to."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            if level:
                base = package.split(".")[: len(package.split(".")) - level + 1]
                module = ".".join([*base, module] if module else base)
            return [f"{module}.{alias.name}" for alias in names]
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def imports(tree: ast.AST, package: str, eager: bool = True) -> Iterator[Import]:
    """Every import of our own modules below ``tree``, with whether importing the module runs it."""
    for node in ast.iter_child_nodes(tree):
        for target in targets(node, package):
            if target.split(".")[0] == PACKAGE:
                yield Import(node.lineno, target, eager)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        lazy = lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        yield from imports(node, package, eager and not lazy)


def target_room(target: str) -> str:
    """The room of an imported name; a public name such as ``magi_attention.Mask`` belongs to the package."""
    room = room_of(target)
    return room if room in MAY_IMPORT else "package"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a module with this source does against the law, one sentence each."""
    room = room_of(module)
    if room not in MAY_IMPORT:
        return [f"{module}: no room is called {room}"]
    found = []
    for item in imports(ast.parse(source), module if is_package else module.rpartition(".")[0]):
        goal = target_room(item.target)
        if goal != room and goal not in MAY_IMPORT[room]:
            found.append(f"{module}:{item.line}: {room} may not import {item.target}")
        if room == "package" and goal in DOORS and item.eager:
            found.append(f"{module}:{item.line}: {item.target} must be imported inside a function")
    return found


def environment_lines(source: str) -> list[int]:
    """Lines of code that touch the process environment."""
    words = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in words:
                lines.append(node.lineno)
            case ast.ImportFrom(module="os", names=names) if words & {alias.name for alias in names}:
                lines.append(node.lineno)
    return lines


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_rooms_import_only_what_they_may():
    found = [v for p in modules() for v in violations(module_of(p), p.read_text(), p.name == "__init__.py")]
    assert modules() and not found, "\n".join(found)


def test_only_env_reads_the_environment():
    readers = {module_of(path) for path in modules() if environment_lines(path.read_text())}
    assert readers == {"magi_attention.env"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("magi_attention.mask.bands", "from magi_attention.plan.tiles import build_plan"),
        ("magi_attention.mask.bands", "def f():\n    import magi_attention.kernels.ops"),
        ("magi_attention.mask.bands", "from ..attention import attention"),
        ("magi_attention.mask.bands", "from magi_attention import attention"),
        ("magi_attention.mask.bands", "from magi_attention import Mask"),
        ("magi_attention.mask.bands", "import importlib\nimportlib.import_module('magi_attention.dist')"),
        ("magi_attention.errors", "from magi_attention import env"),
        ("magi_attention.common.range", "from magi_attention.env import sanity_check"),
        (
            "magi_attention.kernels.ops",
            "if TYPE_CHECKING:\n    from magi_attention.attention import attention",
        ),
        ("magi_attention.attention", "from magi_attention.api import calc_attn"),
        ("magi_attention.attention", "from magi_attention.config import DistAttnConfig"),
        ("magi_attention.dist.runtime", "from magi_attention.functional import dispatch"),
        ("magi_attention.api.functools", "from magi_attention.cli import main"),
        ("magi_attention.kernels.ops", "from magi_attention.integrations import sequences"),
        ("magi_attention.api.functools", "def f():\n    import magi_attention.integrations.transformers"),
        ("magi_attention.testing.oracle", "from magi_attention.dist import runtime"),
        ("magi_attention.attic.old", "import torch"),
    ],
)
def test_the_checker_finds_a_forbidden_import(module, source):
    assert len(violations(module, source)) == 1


def test_the_package_imports_doors_only_lazily():
    door = "from magi_attention.api import calc_attn"
    assert len(violations(PACKAGE, door, is_package=True)) == 1
    assert violations(PACKAGE, f"def f():\n    {door}", is_package=True) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("magi_attention.mask.bands", "import torch\nfrom magi_attention.errors import complaint"),
        ("magi_attention.mask.bands", "from . import builders\nfrom ..common import AttnRange"),
        ("magi_attention.kernels.ops", "from magi_attention.plan.tiles import TilePlan"),
        ("magi_attention.api.functools", "from magi_attention.functional import dispatch"),
        ("magi_attention.cli.info", "from magi_attention import Mask, attention, api"),
        ("magi_attention.__main__", "from magi_attention.api import calc_attn"),
    ],
)
def test_the_checker_lets_lawful_imports_pass(module, source):
    assert violations(module, source) == []


@pytest.mark.parametrize(
    "source", ["import os\nos.environ['X']", "import os\nos.getenv('X')", "from os import environ"]
)
def test_the_checker_finds_environment_reads(source):
    assert environment_lines(source)
    assert not environment_lines('"""os.environ is not read here."""')


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE.parent), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_a_framework_is_imported_by_its_integration_alone():
    found = {
        (module_of(path), name.split(".")[0])
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        for name in targets(node, "")
        if name.split(".")[0] in FRAMEWORKS
    }
    assert found == {("magi_attention.integrations.transformers", "transformers")}


@pytest.mark.parametrize("module", ["magi_attention", "magi_attention.kernels.ops"])
def test_import_leaves_triton_alone(module):
    result = run_python(f"import sys, {module}; sys.exit('triton' in sys.modules)")
    assert result.returncode == 0, f"import {module} loads triton. {result.stderr}"


@pytest.mark.parametrize("first", ["api", "attention", "explain", "testing"])
def test_functions_are_found_whatever_was_imported_before(first):
    result = run_python(
        f"import magi_attention.{first}\nfrom magi_attention import attention, explain\n"
        "assert [x.__qualname__ for x in (attention, explain)] == ['attention', 'explain']"
    )
    assert result.returncode == 0, result.stderr
