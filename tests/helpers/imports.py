"""Which modules a module of this project needs, from its source."""

import ast
from functools import cache
from pathlib import Path

from quantline.config.containers import CONTAINERS
from quantline.config.recipes import RECIPES
from quantline.config.runtimes import RUNTIMES
from tests.helpers.project import ROOT

# Registry → the package whose modules fill it.
PACKAGES = {
    "RECIPES": "quantline.methods",
    "CONTAINERS": "quantline.formats",
    "RUNTIMES": "quantline.runtimes",
    "FAMILIES": "quantline.model.families",
    "FIGURES": "quantline.metrics.figures",
}
LOADERS = ("quantline.formats.container", "quantline.methods.method", "quantline.runtimes.runtime")


def loaded_by(function: str) -> list[str]:
    """Return the modules that a function of this name may load."""
    references: list[str | None] = []
    if function == "load_container":
        references = [info.implementation for info in CONTAINERS.values()]
    elif function == "load_method":
        references = [recipe.implementation for recipe in RECIPES.values()]
    elif function == "open_runtime":
        references = [info.engine for info in RUNTIMES.values()]
    return [reference.partition(":")[0] for reference in references if reference]


@cache
def modules() -> dict[str, Path]:
    """Return every module of the library and of the stages with its file."""
    found = {}
    for base in ("quantline", "stages"):
        for path in sorted((ROOT / base).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def statements(tree: ast.AST) -> list[ast.AST]:
    """Return all nodes but those that only type checkers see."""
    nodes = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        nodes.append(child)
        nodes += statements(child)
    return nodes


def imported_names(name: str) -> list[tuple[str, str]]:
    """Return (module, name) of all that a module imports by `from ... import`."""
    pairs = []
    for node in statements(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            pairs += [(node.module, alias.name) for alias in node.names]
    return pairs


@cache
def needs(name: str) -> frozenset[str]:
    """Return the modules that a module imports, names as "module:name", or loads by a registry."""
    found: set[str] = set()
    for module, imported in imported_names(name):
        found |= {module, f"{module}.{imported}", *loaded_by(imported)}
    for node in statements(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, colon, _ = node.value.partition(":")
            if colon:
                found.add(module)
    return frozenset(found & modules().keys())


@cache
def reads(name: str) -> frozenset[str]:
    """Return the modules whose registrations a module reads.

    quantline.config checks names alone, which no result depends on, and what the others that are
    left out load is in `needs`.
    """
    if name.startswith("quantline.config.") or name in LOADERS:
        return frozenset()
    packages = {PACKAGES[imported] for _, imported in imported_names(name) if imported in PACKAGES}
    return frozenset(entry for entry in modules() if entry.rpartition(".")[0] in packages)


def closure(name: str) -> set[str]:
    """Return a module with all that it needs, directly or not, and all that these read."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += needs(module)
    registrations = [reads(module) for module in reached]
    return reached.union(*registrations)
