"""Writing recipes, variants and suites of conf/ for a grid of options.

A recipe's file takes all options from its method's base file, `conf/recipe/_<method>.yaml`, and
says only what differs; a variant's says its recipe, and its format and runtime where they are not
the recipe's own.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from quantline.causes import raise_if_of_machine
from quantline.config.containers import CONTAINERS
from quantline.config.ggml_recipes import GgmlRecipe
from quantline.config.recipes import (
    AUTO,
    GROUP_SIZES,
    RECIPES,
    WHOLE_ROW,
    Budget,
    GridBudget,
    GroupedRecipe,
    GroupSize,
    Recipe,
)
from quantline.config.refinement import Refinement
from quantline.errors import ConfigError
from quantline.files import write_text

GROUP_LABELS: dict[GroupSize, str] = {AUTO: str(max(GROUP_SIZES)), WHOLE_ROW: "row"}  # in names


class GridPoint(NamedTuple):
    """A recipe of a grid, and the variant that deploys it."""

    recipe: str
    variant: str


def as_flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def base_options(conf: Path, method: str) -> dict[str, Any]:
    """Return the options of a method's base file.

    Raises:
        ConfigError: If there is no such method, or no such file.
    """
    if method not in RECIPES:
        raise ConfigError(RECIPES.unknown(method))
    path = conf / "recipe" / f"_{method}.yaml"
    if not path.is_file():
        raise ConfigError(f"expected {path} with all options of {method}, found no such file")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def recipe_yaml(
    name: str, options: Mapping[str, Any], base: Mapping[str, Any], comment: str = ""
) -> str:
    """Return the file of a recipe.

    Args:
        name: The recipe's name.
        options: All its options.
        base: The options of its method's base file.
        comment: A line that says what it is for.
    """
    different = {key: value for key, value in options.items() if base.get(key) != value}
    bases = [f"_{options['method']}@_here_"] + (["_self_"] if different else [])
    lines = [f"# @package recipes.{name}"]
    lines += [f"# {comment}"] if comment else []
    lines += [f"defaults: [{', '.join(bases)}]"]
    lines += [""] if different else []
    for key, value in different.items():
        if isinstance(value, dict) and value:
            known = base.get(key) or {}
            lines.append(f"{key}:")
            for option, inner in value.items():
                if option not in known or known[option] != inner:
                    lines.append(f"  {option}: {as_flow(inner)}")
        else:
            lines.append(f"{key}: {as_flow(value)}")
    return "\n".join(lines) + "\n"


def variant_yaml(name: str, options: Mapping[str, Any], method: str) -> str:
    """Return the file of a variant.

    Args:
        name: The variant's name.
        options: Its options; format and runtime are left out where they follow from the method.
        method: Of its recipe.
    """
    container = options.get("format") or RECIPES[method].container
    lines = [f"# @package variants.{name}", "defaults: [_variant@_here_, _self_]", ""]
    lines.append(f"recipe: {options['recipe']}")
    if container != RECIPES[method].container:
        lines.append(f"format: {container}")
    if options.get("runtime") not in (None, CONTAINERS[container].runtime):
        lines.append(f"runtime: {options['runtime']}")
    for key in ("dtype", "layout", "split_max_mib", "tokenizer"):
        if key in options:
            lines.append(f"{key}: {as_flow(options[key])}")
    return "\n".join(lines) + "\n"


def suite_yaml(name: str, comment: str, recipes: Iterable[str], variants: Iterable[str]) -> str:
    """Return the file of a suite."""
    lines = ["# @package _global_", f"# {comment}", "defaults:"]
    for group, names in (("recipe", recipes), ("variant", variants)):
        lines += [f"  - /{group}:", *(f"      - {entry}" for entry in names)]
    return "\n".join([*lines, "", f"suite: {name}"]) + "\n"


def comment_of(path: Path) -> str:
    """Return the line of a file that says what it is for; "" if there is no such line or file."""
    if not path.is_file():
        return ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line.removeprefix("# ")
    return ""


def read_suite(path: Path) -> tuple[str, list[str], list[str]]:
    """Return (comment, recipes, variants) of a suite's file.

    Raises:
        ConfigError: If it has another form than `suite_yaml` gives it: its other content would be
            lost when it is written again.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        groups = {key: names for entry in values["defaults"] for key, names in entry.items()}
        recipes = groups.pop("/recipe")
        variants = groups.pop("/variant")
        rest = [*groups, *(values.keys() - {"defaults", "suite"})]
        are_names = all(isinstance(name, str) for name in [*recipes, *variants])
    except (AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise_if_of_machine(error)
        rest = [f"{type(error).__name__}: {error}"]
        are_names = True
    if rest or not are_names:
        found = "; ".join(map(str, rest)) or "names that are no texts"
        raise ConfigError(
            f"expected a suite with lists of recipes and variants and nothing else in {path}, "
            f"found {found}; choose another --suite, or add to that file yourself"
        )
    return comment_of(path), list(recipes), list(variants)


def recipe_name(recipe: Recipe, base: Mapping[str, Any]) -> str:
    """Return a name that tells a recipe from the others of its method.

    Such as gptq-w3g32-curvature, q4_k_m-budget or gptq-w2g32-refined16; other options that differ
    from the base are appended, such as gptq-w4g128-damping0_05. Group sizes chosen layer by layer
    are g128, as they are at most; 128 in every layer is then gptq-w4g128-group_size128.

    Args:
        recipe: The recipe.
        base: The options of its method's base file.
    """
    options = recipe.model_dump(mode="json")
    named = {"method", "bits", "group_size", "curvature", "budget", "mix"}
    refined = ""
    if isinstance(recipe, GroupedRecipe):
        size = GROUP_LABELS.get(recipe.group_size, str(recipe.group_size))
        if str(base.get("group_size")) != str(recipe.group_size) and size == GROUP_LABELS[AUTO]:
            named.remove("group_size")
        name = f"{recipe.method}-w{recipe.bits}g{size}" + ("-curvature" * recipe.curvature)
        usual = recipe.refine == Refinement(steps=recipe.refine.steps)
        if recipe.refine.steps and usual:
            named.add("refine")
            refined = f"-refined{recipe.refine.steps}"
    elif isinstance(recipe, GgmlRecipe):
        name = options["mix"].lower() + recipe.method.removeprefix("kquant")
    else:
        name = recipe.method
    for key, value in options.items():
        if key not in named and base.get(key) != value:
            text = as_flow(value).lower()
            word = "".join(letter if letter.isalnum() else "_" for letter in text)
            name += f"-{key}{word}"
    return name + _budget_name(recipe.size_budget) + refined


def _budget_name(budget: Budget | None) -> str:
    """Return what a budget adds to a recipe's name, such as -budget or -budget3_5bpw-onnx."""
    if budget is None:
        return ""
    limit = ""
    if budget.bits_per_weight is not None:
        limit = f"{budget.bits_per_weight:g}bpw"
    elif budget.size_mib is not None:
        limit = f"{budget.size_mib:g}mib"
    other = "-onnx" if isinstance(budget, GridBudget) and budget.format == "onnx" else ""
    return f"-budget{limit.replace('.', '_')}{other}"


def variant_name(recipe: str, container: str) -> str:
    """Return the name of a variant: the recipe's, with the format unless that is safetensors."""
    if container == "safetensors":
        return recipe
    return f"{container}-{recipe}"


def write_grid(
    conf: Path,
    method: str,
    options: Mapping[str, list[Any]],
    container: str | None = None,
    suite: str = "sweep",
) -> list[GridPoint]:
    """Write recipe, variant and suite files for all combinations of some options.

    Files that exist already stay as they are; the suite's is extended.

    Args:
        conf: The folder conf/.
        method: The recipes' method.
        options: Option → the values that it takes.
        container: The variants' format; by default the method's own.
        suite: The suite that the recipes and variants are added to; it is made if there is none.

    Raises:
        ConfigError: For an unknown method, format, option or value, or if a file of one of the
            names holds another recipe or variant; nothing is written then.
    """
    base = base_options(conf, method)
    container = container or RECIPES[method].container
    if not CONTAINERS[container].can_carry(RECIPES[method]):
        carried = ", ".join(CONTAINERS[container].methods())
        raise ConfigError(f"{container} carries the methods {carried}, found {method}")
    files: dict[Path, str] = {}
    points = []
    for values in product(*options.values()):
        recipe = _parse(method, base | dict(zip(options, values, strict=True)))
        parsed = recipe.model_dump(mode="json")
        chosen = {key: parsed[key] for key in base}
        name = recipe_name(recipe, base)
        variant = variant_name(name, container)
        path = conf / "recipe" / f"{name}.yaml"
        _add(files, path, recipe_yaml(name, chosen, base, comment_of(path)))
        text = variant_yaml(variant, {"recipe": name, "format": container}, method)
        _add(files, conf / "variant" / f"{variant}.yaml", text)
        point = GridPoint(name, variant)
        if point not in points:
            points.append(point)
    path = conf / "suite" / f"{suite}.yaml"
    if path.is_file():
        comment, recipes, variants = read_suite(path)
    else:
        comment, recipes, variants = "Written by `quantline grid`.", ["none"], ["bf16"]
    recipes += [point.recipe for point in points if point.recipe not in recipes]
    variants += [point.variant for point in points if point.variant not in variants]
    files[path] = suite_yaml(suite, comment, recipes, variants)
    for file, text in files.items():
        write_text(file, text)
    return points


def _add(files: dict[Path, str], path: Path, text: str) -> None:
    """Add a file to those to write. Raises ConfigError if there is another of that name."""
    present = files.get(path)
    if present is None and path.is_file():
        present = path.read_text(encoding="utf-8")
    if present not in (None, text):
        raise ConfigError(
            f"expected no other {path.parent.name} called {path.stem} than the one of the grid, "
            f"found one in {path}; rename it, or leave out what differs"
        )
    files[path] = text


def _parse(method: str, options: dict[str, Any]) -> Recipe:
    """Check the options of a recipe. Raises ConfigError."""
    try:
        return RECIPES[method].model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            valid = ", ".join(sorted(RECIPES[method].model_fields))
            raise ConfigError(f"{method} has no option {key}; it has {valid}") from None
        raise ConfigError(f"{method}.{key}: {problem['msg']}, found {problem['input']!r}") from None
