"""The values that a sweep goes through, as they are typed in the place of overrides.

`recipes.gptq.bits=2,3,4` is an axis of three values; `seed=1` is the same in every experiment. In
the place of a recipe's name may stand its method, or a pattern: `recipes.*.bits=3,4` changes every
recipe that has the option.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from quantline.config.compose import compose
from quantline.config.overrides import is_path
from quantline.errors import ConfigError

ENTRY = re.compile(r"([+]{0,2})(recipes|variants)\.([^.=]+)\.([^=]+)=(.*)", re.DOTALL)
KIND = {"recipes": "method", "variants": "format"}  # by what else an entry may be called
EXAMPLE = "quantline sweep recipes.gptq.bits=3,4 recipes.gptq.group_size=32,128"
Choice = Mapping[str, str]  # key of an axis → one of its values, in Hydra's grammar


class Interval(NamedTuple):
    """A range of numbers, for a search alone.

    Attributes:
        low: Its least value.
        high: Its greatest.
        is_integer: Whether whole numbers alone are meant.
        is_logarithmic: Whether values are drawn by their logarithm.
    """

    low: float
    high: float
    is_integer: bool
    is_logarithmic: bool


@dataclass(frozen=True)
class Axis:
    """A key with its values.

    Attributes:
        key: As it was typed.
        values: In Hydra's grammar; empty for an interval.
        interval: In place of values.
    """

    key: str
    values: tuple[str, ...]
    interval: Interval | None = None


@dataclass(frozen=True)
class Space:
    """What a sweep varies.

    Attributes:
        fixed: Overrides of every experiment, as they were typed.
        axes: What varies.
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]

    @property
    def size(self) -> int | None:
        """How many experiments a grid would be; None if an axis is an interval."""
        count = 1
        for axis in self.axes:
            count *= len(axis.values)
        return count or None

    def choices(self) -> Iterator[Choice]:
        """Yield every combination of values; the last axis changes first."""
        for values in itertools.product(*(axis.values for axis in self.axes)):
            yield dict(zip((axis.key for axis in self.axes), values, strict=True))

    def overrides(self, choice: Choice) -> list[str]:
        """Return all overrides of an experiment."""
        return [*self.fixed, *(f"{key}={value}" for key, value in choice.items())]


def read_space(overrides: Sequence[str]) -> Space:
    """Tell overrides with several values from those with one.

    Raises:
        ConfigError: If none has several values, or a key is given twice.
    """
    fixed = []
    axes = []
    for override in overrides:
        axis = _read_axis(override)
        if axis is None:
            fixed.append(override)
        else:
            axes.append(axis)
    if not axes:
        raise ConfigError(
            "expected at least one override with several values, separated by commas, found none: "
            f"{EXAMPLE}"
        )
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"expected all values of {key} once, separated by commas")
    return Space(tuple(fixed), tuple(axes))


def _read_axis(override: str) -> Axis | None:
    """Return what an override varies; None if it has one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, IntervalSweep
    from hydra.errors import HydraException

    key, _, value = override.partition("=")
    if is_path(key) and Path(value).exists():
        return None  # a comma in its name
    try:
        parsed = OverridesParser.create().parse_override(f"x={value}")
    except HydraException:
        return None  # of a text with signs, or none: composing says so
    if not parsed.is_sweep_override():
        return None
    swept = parsed.value()
    if isinstance(swept, Glob):
        raise ConfigError(f"{key}: expected values separated by commas, found a glob; name them")
    if isinstance(swept, IntervalSweep):
        if swept.start is None or swept.end is None:
            raise ConfigError(f"{key}: expected interval(least, greatest), found {value}")
        whole = isinstance(swept.start, int) and isinstance(swept.end, int)
        return Axis(key, (), Interval(swept.start, swept.end, whole, "log" in swept.tags))
    values = tuple(dict.fromkeys(parsed.sweep_string_iterator()))
    return Axis(key, values)


def name_entries(overrides: Sequence[str], root: Path) -> list[str]:
    """Return overrides in which every recipe and variant is called by its own name.

    Args:
        overrides: Each with one value.
        root: The project's.

    Raises:
        ConfigError: If a name, method or pattern fits no entry that has the option.
    """
    if not any(ENTRY.fullmatch(override) for override in overrides):
        return list(overrides)
    composed = compose([each for each in overrides if not ENTRY.fullmatch(each)], root)
    named = []
    for override in overrides:
        found = ENTRY.fullmatch(override)
        if found is None:
            named.append(override)
            continue
        plus, section, called, option, value = found.groups()
        for name in matching(composed, section, called, option):
            named.append(f"{plus}{section}.{name}.{option}={value}")
    return named


def matching(composed: Mapping[str, Any], section: str, called: str, option: str) -> list[str]:
    """Return the recipes or variants that are called so.

    Args:
        composed: Parameters.
        section: "recipes" or "variants".
        called: A name; else a method (of variants a format), or a pattern such as gptq-*.
        option: That they have to have.

    Raises:
        ConfigError: If there is none.
    """
    entries = composed[section]
    if called in entries:
        return [called]
    kind = KIND[section]
    first = option.partition(".")[0]
    fitting = [
        name
        for name, entry in entries.items()
        if (entry[kind] == called or fnmatchcase(name, called)) and first in entry
    ]
    if not fitting:
        kinds = sorted({str(entry[kind]) for entry in entries.values()})
        raise ConfigError(
            f"{section}.{called}.{option}: the suite {composed['suite']} has no such entry with "
            f"this option; there are {', '.join(entries)}, with the {kind}s {', '.join(kinds)}"
        )
    return fitting
