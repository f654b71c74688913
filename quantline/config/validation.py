"""Reading values into the schema, with errors that say plainly what is wrong."""

import difflib
import math
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from quantline.config.params import Params
from quantline.config.recipes import RECIPES, Recipe
from quantline.config.section import Section
from quantline.config.variants import Variant
from quantline.errors import ConfigError
from quantline.messages import secrets_of_environment, shortened, variable_in, without_secrets

CREDENTIALS_BELONG = (
    "for a server set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN; for a database use what its client reads, such as ~/.pgpass"
)
MOST_VALUES = 100_000  # more than a suite of a thousand variants has
LARGEST = 2**53  # that C, JSON and MLflow take exactly
LONGEST_VALUE = 200  # characters of a value in a message
NAMED = {"recipes": Recipe, "variants": Variant}  # sections whose keys are names that users choose


def validate(values: dict[str, Any]) -> Params:
    """Return the typed parameters.

    Raises:
        ConfigError: With all that is wrong, each wrong key with the valid ones.
    """
    _check_form(values)
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        problems = [_explain(dict(problem), values) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def _check_form(values: dict[str, Any]) -> None:
    """Refuse what YAML's aliases make endless, numbers beyond what C takes, and credentials."""
    if _size(values, {}, set()) > MOST_VALUES:
        raise ConfigError(
            f"expected at most {MOST_VALUES:,} values, found more, or one that contains itself; "
            "write them out without YAML's anchors and aliases"
        )
    problems = [
        f"{key}: expected a number of at most 2^53, found {value}"
        for key, value in _numbers(values)
        if abs(value) > LARGEST
    ]
    secrets = secrets_of_environment()
    for key, value in _texts(values):
        if without_secrets(value, secrets) == value:
            continue
        if key == "tracking.uri":
            problem = "no credentials in the address: params.yaml is kept in git; "
            problems.append(f"{key}: {problem}{CREDENTIALS_BELONG}")
        elif variable := variable_in(value):
            problems.append(
                f"{without_secrets(key)}: expected no credentials, found the value of the "
                f"environment variable {variable}: params.yaml is kept in git; take it out, or "
                "unset the variable if its value is an ordinary word"
            )
        else:
            problems.append(
                f"{without_secrets(key)}: expected no credentials, found what looks like some: "
                "params.yaml is kept in git; take them out, and revoke them if it was shared"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _size(value: Any, known: dict[int, float], inside: set[int]) -> float:
    """Return the number of values in a nested one, each alias counted; infinity for a circle."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in inside:
        return math.inf
    if id(value) not in known:
        inside.add(id(value))
        entries = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(entry, known, inside) for entry in entries)
        inside.remove(id(value))
    return known[id(value)]


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in a nested value, and each key, with the path to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield path, str(key)
            yield from _texts(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, path)


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Yield each whole number in a nested value with the path to it."""
    if isinstance(value, int):
        yield path, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _numbers(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for entry in value:
            yield from _numbers(entry, path)


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
    if problem["type"] == "missing" and len(keys) == 1 and keys[0] in NAMED:
        return f"{keys[0]}: expected at least one, found none; name some with {keys[0][:-1]}=[...]"
    message = problem["msg"].removeprefix("Value error, ")
    if not keys:
        return message
    if problem["type"] in ("missing", "value_error"):
        return f"{'.'.join(keys)}: {message}"
    return f"{'.'.join(keys)}: {message}, found {shortened(repr(problem['input']), LONGEST_VALUE)}"


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
    if knows(dotted) or (len(keys) == 2 and keys[0] in NAMED):
        return None
    if len(keys) == 3 and keys[0] == "recipes":
        valid = [field for recipe in RECIPES.values() for field in recipe.model_fields]
    else:
        valid = _fields_at(keys[:-1], {})
    return None if keys[-1] in valid else _unknown_key(keys, valid)


def knows(dotted: str) -> bool:
    """Whether the schema has a dotted key that is no entry of recipes and variants."""
    keys = dotted.split(".")
    return keys[0] not in NAMED and bool(_types_at(keys))


def is_text(dotted: str) -> bool:
    """Whether the schema wants any text at a dotted key, or a text or null."""
    types = _types_at(dotted.split("."))
    return bool(types) and all(kind in (str, type(None)) for kind in types)


def _types_at(keys: list[str]) -> list[Any]:
    """Return the types that the schema allows at a place; none if it has no such place."""
    types: list[Any] = [Params]
    for key in keys:
        inner: list[Any] = []
        for kind in types:
            if get_origin(kind) is dict:
                inner += _alternatives(get_args(kind)[1])
            elif isinstance(kind, type) and issubclass(kind, Section):
                sections = RECIPES.values() if kind is Recipe else [kind]
                for section in sections:
                    if field := section.model_fields.get(key):
                        inner += _alternatives(field.annotation)
        types = inner
    return types


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types of a union, without what Annotated adds to them."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _alternatives(member)]
    return [annotation]


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
