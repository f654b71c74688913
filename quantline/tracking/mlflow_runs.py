"""MLflow runs: one for each thing that a stage made, found again by its content.

So nothing is logged twice.
"""

import json
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.config.stale import flatten
from quantline.config.texts import Evaluation
from quantline.config.tracking import Tracking
from quantline.files import sha256_json
from quantline.messages import redacted, without_secrets
from quantline.tracking.moved_project import RUN_FILES
from quantline.tracking.store import main_root, with_client

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY = "quantline.key"
EXISTS = "RESOURCE_ALREADY_EXISTS"
FINISHED = "FINISHED"
FAILED = "FAILED"
PARAM_LENGTH = 500  # characters that MLflow keeps of a parameter
DIGEST_LENGTH = 36  # of a dataset
SOURCES = ("conf", "demo", "dvc.yaml", "hydra_plugins", "quantline", "stages")
STATUS_WIDTH = 3  # of what git says of a file before its path
NOTE = (
    "Choose *Model training* at the top left. `tags.stage = 'evaluate'` finds the runs of the "
    "variants, which hold the figures, and `tags.stage = 'compare'` the page. A run's duration is "
    "that of the stage that made it."
)


@dataclass(frozen=True)
class Dataset:
    """A text or a set of questions that figures were measured on, as MLflow shows it."""

    name: str
    sha256: str
    context: str
    source: dict[str, Any]
    profile: dict[str, Any]


def git_commit() -> str:
    """Return the commit that is checked out; "unknown" outside git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, PermissionError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def uncommitted_files() -> list[str]:
    """Return the files that figures come from and that no commit has as they are now.

    What runs write, such as params.yaml and dvc.lock, does not count; the page has the parameters.
    """
    command = ["git", "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all"]
    try:
        done = subprocess.run([*command, "--", *SOURCES], capture_output=True, check=True)
    except (FileNotFoundError, PermissionError, subprocess.CalledProcessError):
        return []
    entries = done.stdout.decode("utf-8", "backslashreplace").split("\0")
    return [entry[STATUS_WIDTH:] for entry in entries if entry]


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


def log_run(
    tracking: Tracking,
    key: str,
    name: str,
    *,
    params: dict[str, Any],
    metrics: dict[str, Any],
    tags: dict[str, str],
    files: Sequence[Path] = (),
    datasets: Sequence[Dataset] = (),
    started: float | None = None,
    logged: float | None = None,
    status: str = FINISHED,
) -> str:
    """Log to the run whose key is `key`, and make it if there is none.

    Nested parameters and metrics are logged by their path, and of the metrics those that are
    numbers.

    Args:
        tracking: The section of params.yaml.
        key: Names the content.
        name: Shown by MLflow.
        params: Of a new run; those that it has already stay.
        metrics: Added to the run.
        tags: Added to the run.
        files: Logged as artifacts.
        datasets: What the figures were measured on.
        started: When a new run began, in seconds since 1970; by default now.
        logged: When all this was known, in the same way. What is logged twice with the same time
            is there once.
        status: Of a new run: FINISHED or FAILED.

    Returns:
        MLflow's id of the run.

    Raises:
        TrackingError: As `with_client` does.
    """

    def log(client: "MlflowClient") -> str:
        from mlflow.entities import Metric, Param, RunTag

        experiment = _experiment(client, tracking.experiment)
        run = _find_or_create_run(client, experiment.experiment_id, key, name, started)
        run_id = run.info.run_id
        now = int(1000 * (logged or time.time()))
        known = run.data.params
        client.log_batch(
            run_id,
            metrics=[
                Metric(metric, value, now, 0) for metric, value in sorted(numbers(metrics).items())
            ],
            params=[
                Param(param, without_secrets(value)[:PARAM_LENGTH])
                for param, value in sorted(flatten(params).items())
                if param not in known
            ],
            tags=[RunTag(tag, without_secrets(value)) for tag, value in sorted(tags.items())],
        )
        if datasets:
            client.log_inputs(run_id, [_dataset_input(dataset) for dataset in datasets])
        for file in files:
            client.log_artifact(run_id, str(file))
        if run.info.status not in (FINISHED, FAILED):  # what is added later lengthens no run
            client.set_terminated(run_id, status, now)
        return run_id

    return with_client(tracking, log)


def _experiment(client: "MlflowClient", name: str) -> Any:
    """Return the experiment of that name, made if there is none."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment
    local = client.tracking_uri.startswith("sqlite:")
    artifacts = (main_root() / RUN_FILES).as_uri() if local else None
    tags = {"mlflow.note.content": NOTE}
    try:
        return client.get_experiment(client.create_experiment(name, artifacts, tags=tags))
    except MlflowException as error:
        if error.error_code != EXISTS:
            raise
        made = client.get_experiment_by_name(name)  # by somebody else, just now
        if made is None:
            raise
        return made


def _find_or_create_run(
    client: "MlflowClient", experiment: str, key: str, name: str, started: float | None
) -> Any:
    """Return the run whose key is `key`."""
    query = f"tags.`{KEY}` = '{key}'"
    runs = client.search_runs([experiment], filter_string=query, max_results=1)
    if runs:
        return runs[0]
    commit = git_commit()
    tags = {
        KEY: key,
        "git_commit": commit,
        "mlflow.source.git.commit": commit,
        "mlflow.source.name": "quantline",
    }
    start_time = int(1000 * started) if started else None
    return client.create_run(experiment, run_name=name, start_time=start_time, tags=tags)


def _dataset_input(dataset: Dataset) -> Any:
    """Return MLflow's entity of a dataset; its digest is as much of the sha256 as fits."""
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    entity = Entity(
        dataset.name,
        dataset.sha256[:DIGEST_LENGTH],
        dataset.source["source"],
        json.dumps(redacted(dataset.source)),
        profile=json.dumps(dataset.profile | {"sha256": dataset.sha256}),
    )
    return DatasetInput(entity, [InputTag("mlflow.data.context", dataset.context)])
