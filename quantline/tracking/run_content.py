"""What runs are about: a variant's bytes, the texts it was measured on, and its figures."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.stale import flatten
from quantline.config.texts import Evaluation
from quantline.files import sha256_json, versions
from quantline.tracking.logged_models import BundleDescription


@dataclass(frozen=True)
class Dataset:
    """A text or a set of questions that figures were measured on, as MLflow shows it."""

    name: str
    sha256: str
    context: str
    source: dict[str, Any]
    profile: dict[str, Any]


def variant_run(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return key, name, params and tags of the run of a variant's bytes.

    They are the same for every stage that adds to it.

    Args:
        manifest: Of the variant's bundle.
    """
    recipe = dict(manifest["recipe"])
    recipe["recipe"] = recipe.pop("name")
    calibration = manifest["calibration"] or {}
    tags = {key: manifest[key] for key in ("variant", "format", "runtime", "artifact_sha256")}
    tags |= {
        "recipe": recipe["recipe"],
        "recipe_sha256": sha256_json(manifest["recipe"]),
        "source_sha256": sha256_json(manifest["source"].get("files", {})),
        "calibration_sha256": calibration.get("text_sha256", "none"),
    }
    return {
        "key": f"{manifest['variant']}:{manifest['artifact_sha256']}",
        "name": manifest["variant"],
        "params": {**recipe, "format": manifest["format"], "runtime": manifest["runtime"]},
        "tags": tags,
    }


def evaluation_datasets(evaluation: Evaluation, reference: dict[str, Any]) -> list[Dataset]:
    """Return the evaluation text and the gold set as MLflow's data sets.

    Args:
        evaluation: The section of params.yaml.
        reference: The content of reference.json, which has their hashes.
    """
    named = ("source", "path", "dataset", "dataset_config", "split")
    source = evaluation.model_dump(mode="json", include=set(named))
    source["dataset_revision"] = reference.get("dataset_revision")
    text = Dataset(
        name="evaluation",
        sha256=reference["text_sha256"],
        context="evaluation",
        source={key: value for key, value in source.items() if value},
        profile={"tokens": reference["tokens"]},
    )
    if not reference["gold_sha256"]:
        return [text]
    gold = Dataset(
        name="gold",
        sha256=reference["gold_sha256"],
        context="gold",
        source={"source": "file", "path": evaluation.gold},
        profile={"items": reference["gold_items"]},
    )
    return [text, gold]


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among nested values, by names that MLflow takes: `tasks/x/accuracy`."""
    found = {}
    for name, value in flatten(values, "/").items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[re.sub(r"[^\w./: -]", "_", name)] = float(value)
    return found


def chart_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return a variant's metrics by the names that MLflow gets.

    The figures of each task of the gold set go under `tasks`: the page of charts sorts sections by
    name, and so shows the figures of the whole sets first.
    """
    renamed = dict(metrics)
    if "gold_tasks" in renamed:
        renamed["tasks"] = renamed.pop("gold_tasks")
    return renamed


def bundle_description(
    bundle: Path,
    manifest: dict[str, Any],
    begin: list[int] | None,
    ends: list[int] | None,
    copied: bool,
) -> BundleDescription:
    """Return what MLflow's model of a variant is made from.

    Args:
        bundle: Its folder.
        manifest: Of the bundle.
        begin: Token ids that are put before every text; None if only the bundle's runtime knows.
        ends: Token ids at which a generated text ends; None likewise.
        copied: Whether MLflow keeps a copy of every bundle.
    """
    installed = versions("mlflow", "quantline")
    return BundleDescription(
        variant=manifest["variant"],
        runtime=manifest["runtime"],
        artifact_sha256=manifest["artifact_sha256"],
        path=str(bundle.resolve()),
        begin=begin,
        ends=ends,
        requirements=[f"{name}=={number}" for name, number in installed.items()],
        copied=copied,
    )
