"""The files that hold a variant's figures, and that they belong to the bytes of its bundle.

metrics/<variant>.json has the quality, metrics/<variant>.speed.json the speed, which differs from
run to run, metrics/items/<variant>.json the answers to the gold set, and
metrics/<variant>.lm-eval.json what tasks of lm-evaluation-harness found.
metrics/summary/<variant>.json has the few figures that DVC's tables show.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.errors import Failure, StageError
from quantline.files import known_sha256, read_json, read_json_list, sha256_file, write_json
from quantline.metrics.figure import columns_of, figure_of, is_measured
from quantline.paths import METRICS
from quantline.run.lineage import (
    Lineage,
    artifact_id,
    lineage_file,
    make_again,
    read_lineage,
    write_lineage,
)

SIZES = ("size_bytes", "bits_per_weight", "layer_bits_per_weight")  # of the manifest
SHOWN = ("mean_kld", "perplexity", "gold_accuracy")


@dataclass(frozen=True)
class ResultFiles:
    """Where the figures of a variant are.

    Attributes:
        quality: Quality figures.
        speed: Speed figures.
        answers: The gold set, item by item.
        lm_eval: Metrics of lm-evaluation-harness.
        summary: The few figures of DVC's tables, by their headings.
    """

    quality: Path
    speed: Path
    answers: Path
    lm_eval: Path
    summary: Path

    @classmethod
    def of(cls, folder: Path, variant: str) -> "ResultFiles":
        """Return the paths of a variant's files in the folder metrics/."""
        return cls(
            quality=folder / f"{variant}.json",
            speed=folder / f"{variant}.speed.json",
            answers=folder / "items" / f"{variant}.json",
            lm_eval=folder / f"{variant}.lm-eval.json",
            summary=folder / "summary" / f"{variant}.json",
        )


@dataclass(frozen=True)
class Results:
    """The figures of a variant.

    Attributes:
        quality: The content of metrics/<variant>.json.
        speed: The content of metrics/<variant>.speed.json.
        answers: The content of metrics/items/<variant>.json.
    """

    quality: dict[str, Any]
    speed: dict[str, Any]
    answers: list[dict[str, Any]]

    def summary(self) -> str:
        """Return the chief figures in one line."""
        parts = []
        for key in SHOWN:
            if key in self.quality:
                parts.append(f"{figure_of(key).label} {self.quality[key]:.5g}")
        return ", ".join([*parts, f"{self.speed['decode_tok_s']:.0f} tokens/s"])


def write_results(
    files: ResultFiles, manifest: dict[str, Any], runtime: str, measured: dict[str, Any]
) -> Results:
    """Write what was measured on a bundle, with the hash of its bytes.

    Args:
        files: Where to.
        manifest: Of the bundle.
        runtime: In which it was measured.
        measured: What `measure_bundle` returned.
    """
    write_json(files.answers, measured["items"])
    measured_on = {
        "artifact_sha256": manifest["artifact_sha256"],
        "runtime": runtime,
        "runtime_version": measured["runtime_version"],
    }
    # Bundles of before have less in their manifests.
    size = {key: manifest[key] for key in SIZES if key in manifest}
    answers = {"items_sha256": sha256_file(files.answers)}
    experts = manifest.get("experts") or {}
    quality = measured["quality"] | measured_on | size | experts | answers
    speed = measured["speed"] | measured_on
    write_json(files.speed, speed)
    write_json(files.quality, quality)
    write_json(files.summary, summarized(quality | speed))
    return Results(quality, speed, measured["items"])


def summarized(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the few figures that DVC's tables show, by their headings there."""
    shown = {}
    for column in columns_of("dvc"):
        value = figures.get(column.key)
        if is_measured(value):
            shown[column.heading] = value * column.style.scale
    return shown


def read_results(files: ResultFiles, manifest: dict[str, Any]) -> Results:
    """Read the figures of a bundle.

    Raises:
        StageError: artifact_changed, if they are not of the bundle's bytes in its runtime.
    """
    quality = read_json(files.quality)
    speed = read_json(files.speed)
    changed = []
    for path, figures in ((files.quality, quality), (files.speed, speed)):
        if any(figures.get(key) != manifest[key] for key in ("artifact_sha256", "runtime")):
            changed.append(path)
    answers = files.answers
    if not answers.is_file() or quality.get("items_sha256") != sha256_file(answers):
        changed.append(answers)
    if changed:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"{changed[0]} belongs to other bytes than the bundle on disk; measure it again: "
            f"{make_again(f'metrics/{files.quality.stem}')}",
        )
    return Results(quality, speed, read_json_list(answers))


def write_lm_eval(
    files: ResultFiles, manifest: dict[str, Any], runtime: str, measured: dict[str, Any]
) -> None:
    """Write the metrics of tasks, beside those that were measured before on the same bytes.

    Args:
        files: Where to.
        manifest: Of the bundle.
        runtime: In which it was measured.
        measured: What `run_tasks` returned.
    """
    measured_on = {"artifact_sha256": manifest["artifact_sha256"], "runtime": runtime}
    tasks = read_lm_eval(files, manifest) | measured["tasks"]
    write_json(files.lm_eval, measured_on | measured | {"tasks": tasks})
    bundle = f"exports/{manifest['variant']}"
    made_from = Lineage(artifacts={bundle: artifact_id(bundle)})
    artifact = f"{METRICS.name}/{files.lm_eval.stem}"
    write_lineage(files.lm_eval.parent, lineage_file(artifact), made_from, [files.lm_eval.name])


def read_lm_eval(files: ResultFiles, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return metrics of lm-evaluation-harness, task by task.

    What was measured on other bytes than the bundle's, or in another runtime, is left out.

    Raises:
        StageError: artifact_changed, if it is not what the stage wrote.
    """
    if not files.lm_eval.is_file():
        return {}
    lineage = read_lineage(f"{METRICS.name}/{files.lm_eval.stem}")
    written = lineage.contents.get(files.lm_eval.name) if lineage else None
    if written != known_sha256(files.lm_eval):
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"{files.lm_eval} is not what its stage wrote; remove it, and run `quantline lm-eval` "
            "again",
        )
    results = read_json(files.lm_eval)
    if any(results.get(key) != manifest[key] for key in ("artifact_sha256", "runtime")):
        return {}
    return results["tasks"]


def task_values(tasks: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of all tasks by one name each, such as "arc_easy/acc/none"."""
    values = {}
    for task, result in tasks.items():
        for metric, figure in result["metrics"].items():
            values[f"{task}/{metric.replace(',', '/')}"] = figure["value"]
    return values
