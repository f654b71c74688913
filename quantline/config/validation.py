"""Reading values into the schema, with errors that say plainly what is wrong."""

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import ValidationError

from quantline.config.params import Params
from quantline.config.recipes import RECIPES, Recipe
from quantline.config.section import Section
from quantline.config.variants import Variant
from quantline.errors import ConfigError

NAMED = {"recipes": Recipe, "variants": Variant}  # sections whose keys are names that users choose


def validate(values: dict[str, Any]) -> Params:
    """Return the typed parameters.

    Raises:
        ConfigError: With all that is wrong, each wrong key with the valid ones.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        problems = [_explain(dict(problem), values) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def _explain(problem: dict[str, Any], values: dict[str, Any]) -> str:
    """Word one of pydantic's errors as `dotted.key: what was expected, found ...`."""
    keys = [str(key) for key in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return _unknown_key(keys, _fields_at(keys[:-1], values))
    if keys[-1:] == ["[key]"]:
        keys = keys[:-1]
        if problem["type"] == "string_pattern_mismatch":
            return (
                f"{'.'.join(keys)}: a name has only a-z, 0-9, _ and -, and starts with a letter "
                "or digit"
            )
    message = problem["msg"].removeprefix("Value error, ")
    if not keys:
        return message
    if problem["type"] in ("missing", "value_error"):
        return f"{'.'.join(keys)}: {message}"
    return f"{'.'.join(keys)}: {message}, found {problem['input']!r}"


def _unknown_key(keys: list[str], valid: Iterable[str]) -> str:
    names = sorted(set(valid))
    near = difflib.get_close_matches(keys[-1], names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{'.'.join(keys)}: unknown key{hint}; valid keys here are {', '.join(names)}"


def unknown_key(dotted: str) -> str | None:
    """Say that the schema does not know a dotted key; return None for one that it knows.

    An option of a recipe is known if any method has it.
    """
    keys = dotted.split(".")
    if len(keys) == 2 and keys[0] in NAMED:
        return None
    if len(keys) == 3 and keys[0] == "recipes":
        valid = [field for recipe in RECIPES.values() for field in recipe.model_fields]
    else:
        valid = _fields_at(keys[:-1], {})
    return None if keys[-1] in valid else _unknown_key(keys, valid)


def _fields_at(keys: list[str], values: dict[str, Any]) -> list[str]:
    """Return the field names of the section at a place of the schema."""
    section: Any = Params
    for depth, key in enumerate(keys):
        if depth == 0 and key in NAMED:
            section = NAMED[key]
        elif depth == 1 and keys[0] in NAMED:
            recipe = values.get("recipes", {}).get(key, {}) if keys[0] == "recipes" else {}
            if recipe.get("method") in RECIPES:
                section = RECIPES[str(recipe["method"])]
        elif field := section.model_fields.get(key):
            section = _section_in(field.annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """Return the section among the members of a type, which may be optional."""
    for member in (annotation, *get_args(annotation)):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None
