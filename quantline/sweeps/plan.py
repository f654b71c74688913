"""Which experiments a sweep is, checked as a whole before any of them runs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.compose import compose, missing_inputs
from quantline.config.params import Params
from quantline.config.validation import validate
from quantline.errors import ConfigError
from quantline.files import sha256_json
from quantline.sweeps.space import ENTRY, Choice, Space, name_entries

# What experiments on one page may differ in: with another model or text to measure on, their
# figures could not stand beside each other.
VARYING = ("calibration", "recipes", "seed", "suite", "variants")
LONGEST_NAME = 100  # characters, of an experiment
SHOWN = 3  # changes in a message


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep.

    Attributes:
        label: Its name, made of what differs.
        choice: The values of the axes.
        overrides: All that it is composed with, as `quantline compose` takes them.
        composed: Its params.yaml.
        params: The same, checked.
    """

    label: str
    choice: Choice
    overrides: tuple[str, ...]
    composed: dict[str, Any]
    params: Params

    @property
    def calibration_key(self) -> str:
        """What its calibration depends on, as a hash."""
        return sha256_json([self.composed["calibration"], self.composed["seed"]])


@dataclass(frozen=True)
class Plan:
    """A sweep that can run.

    Attributes:
        space: What varies.
        base: The parameters without what varies.
        points: The experiments; of a search those that are known so far.
        variants: Those that differ between experiments, and are measured in each.
    """

    space: Space
    base: Params
    points: tuple[Point, ...]
    variants: tuple[str, ...]

    @property
    def shares_calibration(self) -> bool:
        """Whether every experiment has the calibration of the base."""
        base = self.base.model_dump(mode="json")
        key = sha256_json([base["calibration"], base["seed"]])
        return all(point.calibration_key == key for point in self.points)


def make_plan(space: Space, choices: Iterable[Choice], root: Path) -> Plan:
    """Compose and check the experiments of a sweep.

    Args:
        space: What varies.
        choices: The values of each experiment.
        root: The project's.

    Raises:
        ConfigError: If one does not compose, or they cannot stand on one page, or what varies
            changes no variant.
    """
    base = compose(name_entries(space.fixed, root), root)
    points = []
    for choice in choices:
        points.append(make_point(space, choice, root))
    names = [point.label for point in points]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"expected experiments with names of their own, found {twins[0]} twice")
    params = validate(base)
    missing: list[str] = []
    for one in (params, *(point.params for point in points)):
        missing += [line for line in missing_inputs(one) if line not in missing]
    if missing:
        raise ConfigError("\n".join(missing))
    check_one_page(base, points)
    return Plan(space, params, tuple(points), _changed_variants(base, points))


def make_point(space: Space, choice: Choice, root: Path) -> Point:
    """Compose one experiment. Raises ConfigError that says which."""
    label = label_of(space, choice)
    try:
        overrides = tuple(name_entries(space.overrides(choice), root))
        composed = compose(overrides, root)
    except ConfigError as error:
        raise ConfigError(f"experiment {label}: {error}") from None
    return Point(label, choice, overrides, composed, validate(composed))


def check_one_page(base: Mapping[str, Any], points: Sequence[Point]) -> None:
    """Check that all figures can stand beside each other. Raises ConfigError."""
    for point in points:
        others = sorted(
            key
            for key in point.composed
            if key not in VARYING and point.composed[key] != base.get(key)
        )
        if others:
            raise ConfigError(
                f"expected experiments on one model, one evaluation and one target, found that "
                f"{point.label} has another {' and '.join(others[:SHOWN])}; give one value of it, "
                "and make a sweep for each"
            )


def _changed_variants(base: Mapping[str, Any], points: Sequence[Point]) -> tuple[str, ...]:
    """Return the variants that an experiment may make otherwise than the base does."""
    named = {(found[2], found[3]) for point in points for found in _entries(point)}
    recipes = {name for section, name in named if section == "recipes"}
    variants = {name for section, name in named if section == "variants"}
    everything: dict[str, None] = {}
    all_change = False
    for point in points:
        all_change |= any(point.composed[key] != base[key] for key in ("calibration", "seed"))
        recipes |= _differing(base["recipes"], point.composed["recipes"])
        variants |= _differing(base["variants"], point.composed["variants"])
        everything |= dict.fromkeys(point.composed["variants"])
    changed = []
    for name in everything:
        users = [point.composed["variants"].get(name, {}).get("recipe") for point in points]
        if all_change or name in variants or recipes.intersection(users):
            changed.append(name)
    if not changed:
        raise ConfigError(
            "expected values that change a variant of the suite, found that "
            f"{', '.join(sorted(recipes)) or 'they'} change none; add one with +variant=NAME"
        )
    return tuple(changed)


def _entries(point: Point) -> list[re.Match[str]]:
    """Return the overrides of recipes and variants that the sweep varies."""
    varied = {key.lstrip("+").rpartition(".")[2] for key in point.choice}
    found = [ENTRY.fullmatch(override) for override in point.overrides]
    return [each for each in found if each and each[4].rpartition(".")[2] in varied]


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    return {name for name in after if after[name] != before.get(name)}


def label_of(space: Space, choice: Choice) -> str:
    """Return an experiment's name, made of what differs: gptq-bits3-group_size32."""
    words = []
    before = None
    for axis in space.axes:
        *sections, option = axis.key.lstrip("+").split(".")
        entry = sections[1] if len(sections) > 1 and sections[0] in ("recipes", "variants") else ""
        if entry and entry != before and not set(entry) & set("*?["):
            words.append(entry)
        before = entry
        words.append(option + ("" if sections else "-") + choice[axis.key].strip("'\""))
    name = re.sub(r"[^\w-]+", "_", "-".join(words), flags=re.ASCII).strip("_-")
    if len(name) <= LONGEST_NAME:
        return name
    digest = sha256_json(dict(choice))[:8]
    return f"{name[: LONGEST_NAME - len(digest) - 1]}-{digest}"


def sweep_name(space: Space) -> str:
    """Return what a sweep is called unless it is given a name: gptq-bits-group_size."""
    empty = dict.fromkeys((axis.key for axis in space.axes), "")
    return label_of(space, empty)
