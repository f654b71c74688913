"""Reading values into the schema, and errors that say plainly what is wrong with them."""

import difflib
from collections.abc import Iterable
from typing import get_args

from pydantic import ValidationError

from quantline.config.params import Gate, Params, Variant
from quantline.config.recipes import RECIPES, Recipe
from quantline.config.section import ConfigError, Section


def validate(values: dict) -> Params:
    """The typed parameters. Raises ConfigError that names each wrong key and lists the valid ones."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(one) for one in error.errors())) from None


def _explain(error: dict) -> str:
    """One of pydantic's errors as `dotted.key: what was expected, what was found`."""
    where = [str(part) for part in error["loc"]]
    if where[:1] == ["recipes"] and len(where) > 2 and where[2] in RECIPES:
        del where[2]  # pydantic names the method here; it is no key of params.yaml
    dotted = ".".join(where)
    if error["type"] == "extra_forbidden":
        valid = _fields(error["loc"][:-1])
        return f"{dotted}: unknown key{_nearest(where[-1], valid)}; valid keys here are {', '.join(sorted(valid))}"
    if error["type"] == "union_tag_invalid":
        found = error["ctx"]["tag"]
        return f"{dotted}.method: unknown method {found!r}{_nearest(found, RECIPES)}; there are {', '.join(RECIPES)}"
    if where[-1:] == ["[key]"]:
        dotted = ".".join(where[:-1])
        if error["type"] == "string_pattern_mismatch":
            return f"{dotted}: a name has only a-z, 0-9, _ and -, and starts with a letter or digit"
    said = error["msg"].removeprefix("Value error, ")
    if not where:
        return said
    return f"{dotted}: {said}" + ("" if error["type"] in ("missing", "value_error") else f", found {error['input']!r}")


def unknown_key(dotted: str) -> str | None:
    """What to say of a dotted key that the schema does not know; None for one that it knows."""
    where = dotted.split(".")
    valid = _fields(tuple(where[:-1]))
    if where[0] == "recipes" and len(where) == 3:
        valid = [field for recipe in RECIPES.values() for field in recipe.model_fields]
    if where[-1] in valid or (len(where) == 2 and where[0] in ("recipes", "variants")):
        return None
    return f"{dotted}: unknown key{_nearest(where[-1], valid)}; valid keys here are {', '.join(sorted(set(valid)))}"


def _nearest(word: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _fields(where: tuple[str | int, ...]) -> list[str]:
    """The field names of the section at this place of the schema."""
    section: type[Section] = Params
    for part in where:
        if section is Params and part in ("recipes", "variants"):
            section = Variant if part == "variants" else Recipe
        elif part in RECIPES and section is Recipe:
            section = RECIPES[part]
        elif part == "gates":
            section = Gate
        elif field := section.model_fields.get(str(part)):
            inner = (field.annotation, *get_args(field.annotation))  # a section that may be left out is a union
            section = next((one for one in inner if isinstance(one, type) and issubclass(one, Section)), section)
    return list(section.model_fields)
