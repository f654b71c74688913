"""What there is to choose from: the files of conf/, composed as a run would compose them.

A choice's file says what differs from its base, so only the composition has all of its options.
"""

from pathlib import Path
from typing import Any, NamedTuple, cast

from quantline.config.compose import hydra_config
from quantline.config.grid import comment_of, read_suite
from quantline.errors import ConfigError

# What is listed → the group of conf/ that has it.
GROUPS = {
    "models": "model",
    "calibrations": "calibration",
    "evaluations": "evaluation",
    "suites": "suite",
    "recipes": "recipe",
    "variants": "variant",
    "targets": "target",
    "trackings": "tracking",
    "executors": "executor",
    "experiments": "experiment",
}
NAMED_SECTIONS = ("recipe", "variant")  # groups whose choices lie under their names


class Choice(NamedTuple):
    """One choice of a group.

    Attributes:
        group: As overrides name it, such as "recipe".
        name: The choice's.
        comment: What its file says that it is for.
        options: All its options; of a suite, its recipes and variants.
    """

    group: str
    name: str
    comment: str
    options: dict[str, Any]


def names_of(root: Path, group: str) -> list[str]:
    """Return the names of a group's choices, sorted; base files are none."""
    return sorted(path.stem for path in (root / "conf" / group).glob("[!_]*.yaml"))


def choices(root: Path, group: str) -> list[Choice]:
    """Return all choices of a group with their options.

    Args:
        root: The project's.
        group: As overrides name it.

    Raises:
        ConfigError: If conf/ does not compose.
    """
    names = names_of(root, group)
    if group == "suite":
        return [_suite(root, name) for name in names]
    if group in NAMED_SECTIONS:
        recipes = ",".join(names_of(root, "recipe"))
        variants = ",".join(names_of(root, "variant"))
        config = hydra_config([f"recipe=[{recipes}]", f"variant=[{variants}]"], root)
        all_options = config[f"{group}s"]
        return [_choice(root, group, name, all_options.get(name, {})) for name in names]
    # Each at a place of its own, by number: a name may have a dot in it.
    places = [f"+{group}@listed.n{number}={name}" for number, name in enumerate(names)]
    if group == "experiment":
        return [_choice(root, group, name, {}) for name in names]
    listed = hydra_config(places, root)["listed"]
    return [
        _choice(root, group, name, listed.get(f"n{number}", {}))
        for number, name in enumerate(names)
    ]


def choice_of(root: Path, group: str, name: str) -> Choice:
    """Return one choice of a group.

    Raises:
        ConfigError: If there is none of that name, or conf/ does not compose.
    """
    from quantline.config.overrides import near

    names = names_of(root, group)
    if name not in names:
        raise ConfigError(
            f"there is no {group} {name}{near(name, names)}; there are {', '.join(names)}"
        )
    return next(choice for choice in choices(root, group) if choice.name == name)


def used_in(root: Path, group: str, name: str) -> list[str]:
    """Return the suites that have a recipe or variant."""
    if group not in NAMED_SECTIONS:
        return []
    return [
        suite.name for suite in choices(root, "suite") if name in suite.options.get(f"{group}s", ())
    ]


def _choice(root: Path, group: str, name: str, options: Any) -> Choice:
    comment = comment_of(root / "conf" / group / f"{name}.yaml")
    return Choice(group, name, comment, dict(cast(dict[str, Any], options)))


def _suite(root: Path, name: str) -> Choice:
    path = root / "conf" / "suite" / f"{name}.yaml"
    try:
        comment, recipes, variants = read_suite(path)
    except ConfigError:  # one that does more than list names: what it does is in its file
        return Choice("suite", name, comment_of(path), {})
    return Choice("suite", name, comment, {"recipes": recipes, "variants": variants})
