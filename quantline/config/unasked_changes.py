"""What a run, a sweep or an experiment would change of the project though nobody asks for it.

All compose conf/ anew, so that overrides of an earlier composition are gone: without these checks
they would measure another model than the project's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from quantline.config.stale import flatten
from quantline.errors import ConfigError

SHOWN = 3  # changes in a message
DIGEST = "conf_sha256"
TEXT = (
    *("source", "path", "dataset", "dataset_config", "split", "column", "dataset_revision"),
    *("part", "sequences", "length", "gold"),
)
KEPT = {
    "model": ("source", "path", "id", "revision", "adapter", "converter"),
    "calibration": TEXT,
    "evaluation": TEXT,
}
NAMES = {"recipes": "recipe", "variants": "variant"}


def check_sweep(
    present: Mapping[str, Any], composed: Mapping[str, Any], asked: Sequence[str]
) -> None:
    """Check that a sweep keeps model, texts and suite unless it was asked to change them.

    Args:
        present: The content of params.yaml.
        composed: What the sweep would write there.
        asked: The overrides of the sweep.

    Raises:
        ConfigError: If it changes more.
    """
    if changes := _unasked(_kept(present) | _suite(present), composed, asked):
        raise ConfigError(
            "expected experiments on the project's model, texts and suite, found that this one "
            f"would change what no -S asks for ({changes}); dvc exp run starts from conf/, not "
            "from params.yaml: keep the project's choice there with `quantline init OVERRIDES`, or "
            "give the overrides with -S"
        )


def check_run(
    present: Mapping[str, Any], composed: Mapping[str, Any], asked: Sequence[str]
) -> None:
    """Check that a run keeps model and texts of the last one unless it was asked to change them.

    What conf/ says is another matter once conf/ was edited: then it is asked for there.

    Args:
        present: The content of params.yaml.
        composed: What the run would write there.
        asked: The overrides of the run.

    Raises:
        ConfigError: If it changes more.
    """
    if present.get(DIGEST) != composed.get(DIGEST):
        return
    if changes := _unasked(_kept(present), composed, asked):
        raise ConfigError(
            "expected a run with the model and texts of params.yaml, found that this one "
            f"would change what no override asks for ({changes}); quantline repro starts from "
            "conf/, not from params.yaml: give the overrides again, keep them with `quantline init "
            "OVERRIDES`, or go back to what conf/ says with `quantline compose` first"
        )


def check_choice(
    present: Mapping[str, Any], composed: Mapping[str, Any], asked: Sequence[str], name: str
) -> None:
    """Check that an experiment keeps the project's model and texts unless it names others.

    Args:
        present: The content of params.yaml.
        composed: What the experiment stands for.
        asked: Its overrides.
        name: What it is called.

    Raises:
        ConfigError: If it changes more.
    """
    if changes := _unasked(_kept(present), composed, asked):
        raise ConfigError(
            f"expected that {name} keeps the model and texts of params.yaml or names others, found "
            f"that it would change what no override names ({changes}): an experiment starts from "
            "the repository's own choice; give the overrides for model and texts too"
        )


def _unasked(kept: dict[str, Any], composed: Mapping[str, Any], asked: Sequence[str]) -> str:
    """Return what of that which is to be kept would change unasked; "" if nothing."""
    named = {override.lstrip("+~").partition("=")[0].partition("@")[0] for override in asked}
    if "experiment" in named:
        return ""
    changes = []
    before = flatten(kept)
    after = flatten(_kept(composed) | _suite(composed))
    for key in sorted(before.keys() & after.keys()):
        groups = {key, key.partition(".")[0], NAMES.get(key, "")}
        if key in ("suite", *NAMES):
            groups |= {"suite"}
        if before[key] != after[key] and not groups & named:
            changes.append(f"{key}: {before[key]!r} -> {after[key]!r}")
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return "; ".join(changes[:SHOWN]) + more


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what says which model and which texts these are, so far as it is there."""
    kept = {}
    for section, keys in KEPT.items():
        part = values.get(section)
        if isinstance(part, Mapping):
            kept[section] = {key: part[key] for key in keys if key in part}
    return kept


def _suite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return which recipes and variants there are, by name, so far as it is there."""
    suite: dict[str, Any] = {}
    for section in NAMES:
        if isinstance(values.get(section), Mapping):
            suite[section] = sorted(values[section])
    if "suite" in values:
        suite["suite"] = values["suite"]
    return suite
