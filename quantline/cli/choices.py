"""`quantline list` and `quantline show`: what there is to choose from."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from quantline.cli.program import PARAMS, app, examples, stop
from quantline.config.catalogue import GROUPS, Choice, choice_of, choices, used_in
from quantline.config.compose import project_root, to_yaml
from quantline.config.containers import CONTAINERS
from quantline.config.recipes import RECIPES, Recipe
from quantline.config.runtimes import RUNTIMES
from quantline.doctor.packages import missing_runtimes
from quantline.errors import ConfigError
from quantline.messages import say

CHOSEN = "*"
REGISTERED = ("methods", "formats", "runtimes")  # which no file of conf/ has
KINDS = (*GROUPS, *REGISTERED)
SHOWN = (*GROUPS.values(), *(kind.removesuffix("s") for kind in REGISTERED))
Row = tuple[str, ...]


def _complete_kind(incomplete: str) -> list[str]:
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def _complete_group(incomplete: str) -> list[str]:
    return [group for group in SHOWN if group.startswith(incomplete)]


def _complete_name(context: typer.Context, incomplete: str) -> list[str]:
    from quantline.config.catalogue import names_of

    try:
        names = names_of(project_root(), context.params.get("group") or "")
    except ConfigError:
        return []
    return [name for name in names if name.startswith(incomplete)]


@app.command(
    "list",
    epilog=examples(
        "quantline list models",
        "quantline list variants --names",
        "quantline list runtimes      (and which of them are installed)",
    ),
)
def list_choices(
    kind: Annotated[
        str, typer.Argument(help=", ".join(KINDS), autocompletion=_complete_kind, metavar="KIND")
    ],
    names: Annotated[bool, typer.Option("--names", help="The names alone, one a line")] = False,
) -> None:
    """List what there is to choose from; an asterisk marks what params.yaml has."""
    try:
        if kind not in KINDS:
            raise ConfigError(f"expected one of {', '.join(KINDS)}, found {kind}")
        heads, rows = _registered(kind) if kind in REGISTERED else _of_conf(kind)
    except ConfigError as error:
        raise stop(error) from None
    if names:
        for row in rows:
            say(row[0])
        return
    _print(heads, rows, _chosen(kind))


@app.command(
    epilog=examples(
        "quantline show recipe gptq-w4g128",
        "quantline show target edge",
        "quantline show method awq",
    )
)
def show(
    group: Annotated[
        str,
        typer.Argument(help=", ".join(SHOWN), autocompletion=_complete_group, metavar="GROUP"),
    ],
    name: Annotated[
        str, typer.Argument(help="Of the choice", autocompletion=_complete_name, metavar="NAME")
    ],
) -> None:
    """Show one choice with all its options, what they mean, and where it is used."""
    try:
        if group not in SHOWN:
            raise ConfigError(f"expected one of {', '.join(SHOWN)}, found {group}")
        if f"{group}s" in REGISTERED:
            _show_registered(group, name)
            return
        root = project_root()
        choice = choice_of(root, group, name)
        suites = used_in(root, group, name)
    except ConfigError as error:
        raise stop(error) from None
    path = Path("conf") / group / f"{name}.yaml"
    say(f"# {path}" + (f": {choice.comment}" if choice.comment else ""))
    if group == "recipe" and choice.options.get("method") in RECIPES:
        _show_recipe(choice)
    elif choice.options:
        say(to_yaml(choice.options).rstrip("\n"))
    else:
        say((root / path).read_text(encoding="utf-8").rstrip("\n"))
    if suites:
        say(f"# in the suites {', '.join(suites)}")
    if group == "recipe":
        variants = [
            each.name for each in choices(root, "variant") if each.options.get("recipe") == name
        ]
        say(f"# deployed by the variants {', '.join(variants) or 'none yet'}")
    say(f"# take it: {_how_to_take(choice)}")


def _how_to_take(choice: Choice) -> str:
    if choice.group == "recipe":
        return f"+recipe={choice.name}, with a variant of it"
    if choice.group == "variant":
        return f"+recipe={choice.options.get('recipe')} +variant={choice.name}"
    needs = [key for key in ("path", "id", "uri") if key in choice.options]
    empty = [key for key in needs if _is_needed(choice, key)]
    also = "".join(f" {choice.group}.{key}=..." for key in empty)
    return f"{choice.group}={choice.name}{also}"


def _is_needed(choice: Choice, key: str) -> bool:
    source = choice.options.get("source")
    if choice.options[key] is not None:
        return False
    return key == "uri" or (key == "id") == (source == "hub" and choice.group == "model")


def _show_recipe(choice: Choice) -> None:
    """Print a recipe's options, each with its meaning."""
    recipe = RECIPES[choice.options["method"]]
    for key, value in choice.options.items():
        say(f"{_one_line(key, value)}{_meaning(recipe, key)}")


def _one_line(key: str, value: Any) -> str:
    from quantline.config.grid import as_flow

    return f"{key}: {as_flow(value)}"


def _meaning(recipe: type[Recipe], key: str) -> str:
    field = recipe.model_fields.get(key)
    return f"  # {field.description}" if field and field.description else ""


def _show_registered(group: str, name: str) -> None:
    """Print what registered itself under a name. Raises ConfigError."""
    if group == "method":
        recipe = RECIPES[name]
        say(f"# {(recipe.__doc__ or '').strip().splitlines()[0]}")
        for key, field in recipe.model_fields.items():
            say(f"{key}: {field.description or ''}".rstrip(": "))
        carriers = [info.name for info in CONTAINERS.values() if info.can_carry(recipe)]
        say(f"# goes into {', '.join(carriers)}")
        return
    values = vars(CONTAINERS[name] if group == "format" else RUNTIMES[name])
    for key, value in values.items():
        if key not in ("implementation", "engine", "colour", "marker"):
            shown = ", ".join(sorted(value)) if isinstance(value, tuple | frozenset) else value
            say(f"{key}: {shown}")


def _of_conf(kind: str) -> tuple[Row, list[Row]]:
    """Return the columns' heads, and a row for each choice of a group."""
    group = GROUPS[kind]
    heads, cells = COLUMNS.get(group, (("for",), lambda options: ()))
    found = choices(project_root(), group)
    return ("name", *heads), [
        (one.name, *cells(one.options), one.comment)
        if heads[-1] == "for"
        else (one.name, *cells(one.options))
        for one in found
    ]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _cells(*keys: str) -> Callable[[dict[str, Any]], Row]:
    return lambda options: tuple(_text(options.get(key)) for key in keys)


def _recipe_cells(options: dict[str, Any]) -> Row:
    bits = options.get("bits", options.get("mix"))
    budget = "yes" if options.get("budget") is not None else "-"
    return _text(options.get("method")), _text(bits), _text(options.get("group_size")), budget


def _target_cells(options: dict[str, Any]) -> Row:
    gates = [
        f"{gate['metric']} {gate['operator']} {gate['threshold']:g}"
        for gate in options.get("gates") or []
        if gate.get("required")
    ]
    formats = options.get("formats")
    return "every" if formats is None else _text(formats), "; ".join(gates)


def _suite_cells(options: dict[str, Any]) -> Row:
    counts = (len(options.get(key, ())) for key in ("recipes", "variants"))
    return tuple(str(count) if options else "-" for count in counts)


# Group → the columns after the name, and the cells of a choice's options; "for" is its comment.
COLUMNS: dict[str, tuple[Row, Callable[[dict[str, Any]], Row]]] = {
    "model": (("source", "id", "path"), _cells("source", "id", "path")),
    "calibration": (
        ("source", "text", "sequences", "length"),
        lambda options: (
            _text(options.get("source")),
            _text(options.get("path") or options.get("dataset")),
            *_cells("sequences", "length")(options),
        ),
    ),
    "suite": (("recipes", "variants", "for"), _suite_cells),
    "recipe": (("method", "bits", "group", "budget"), _recipe_cells),
    "variant": (("recipe", "format", "runtime"), _cells("recipe", "format", "runtime")),
    "target": (("formats", "required gates", "for"), _target_cells),
}
COLUMNS["evaluation"] = COLUMNS["calibration"]


def _registered(kind: str) -> tuple[Row, list[Row]]:
    """Return the columns' heads, and a row for each registered name."""
    if kind == "methods":
        return ("name", "for"), [
            (name, (recipe.__doc__ or "").strip().splitlines()[0])
            for name, recipe in RECIPES.items()
        ]
    if kind == "formats":
        return ("name", "runtime", "methods"), [
            (info.name, info.runtime, ", ".join(info.methods())) for info in CONTAINERS.values()
        ]
    absent = missing_runtimes()
    rows: list[Row] = []
    for info in RUNTIMES.values():
        one = absent.get(info.name)
        here = "installed" if one is None else f"not installed: {one.remedy}"
        rows.append((info.name, ", ".join(info.formats), here))
    return ("name", "formats", "here"), rows


def _chosen(kind: str) -> set[str]:
    """Return the names that params.yaml has; none where it says nothing of them."""
    from quantline.config.compose import load_params

    try:
        params = load_params(project_root() / PARAMS)
    except ConfigError:
        return set()
    if kind in ("recipes", "variants"):
        return set(getattr(params, kind))
    if kind == "runtimes":
        return {variant.runtime for variant in params.variants.values()}
    if kind == "formats":
        return {variant.format for variant in params.variants.values()}
    if kind == "methods":
        return {recipe.method for recipe in params.recipes.values()}
    return {"suites": {params.suite}, "targets": {params.target.name}}.get(kind, set())


def _print(heads: Row, rows: list[Row], chosen: set[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from quantline.messages import plain

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for number, head in enumerate(heads):
        table.add_column(head, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(CHOSEN if row[0] in chosen else "", *(escape(plain(cell)) for cell in row))
    Console(file=sys.stdout).print(table)
