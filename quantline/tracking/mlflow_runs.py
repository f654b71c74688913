"""MLflow: one run for each thing that a stage made, found again by its content, so that nothing is logged twice."""

import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quantline.config.compose import flat, project_root
from quantline.config.params import Evaluation, Tracking
from quantline.errors import Failure, StageError
from quantline.files import sha256_json

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY = "quantline.key"
FINISHED = "FINISHED"
MAX_PARAM = 500  # characters that MLflow keeps of a parameter
MAX_DIGEST = 36  # of a dataset
NOTE = ("Choose *Model training* at the top left. `tags.stage = 'evaluate'` finds the runs of the variants, which hold the figures, "
        "and `tags.stage = 'compare'` the page. A run's duration is that of the stage that made it.")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Dataset:
    """A text or a set of questions that figures were measured on, as MLflow shows it beside the run."""

    name: str
    sha256: str
    context: str
    source: dict[str, Any]
    profile: dict[str, Any]


def main_root() -> Path:
    """The root of the main repository, also inside the copies where DVC runs queued experiments."""
    root = project_root()
    for folder in root.parents:
        if folder.name == ".dvc" and root.is_relative_to(folder / "tmp"):
            return folder.parent
    return root


def tracking_uri(uri: str) -> str:
    """The URI with a relative sqlite path resolved against the main repository."""
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        return prefix + str(main_root() / uri.removeprefix(prefix))
    return uri


def git_commit() -> str:
    """The commit that is checked out, or "unknown" outside git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def of_variant(manifest: dict) -> dict[str, Any]:
    """The run of a variant's bytes, as `record` takes it: the same for every stage that adds to it."""
    recipe = {"recipe" if key == "name" else key: value for key, value in manifest["recipe"].items()}
    about = {key: manifest[key] for key in ("variant", "format", "runtime", "artifact_sha256")}
    return {
        "key": f"{manifest['variant']}:{manifest['artifact_sha256']}", "name": manifest["variant"],
        "params": {**recipe, "format": manifest["format"], "runtime": manifest["runtime"]},
        "tags": about | {"recipe": recipe["recipe"], "recipe_sha256": sha256_json(manifest["recipe"]),
                         "source_sha256": sha256_json(manifest["source"].get("files", {})),
                         "calibration_sha256": (manifest["calibration"] or {}).get("text_sha256", "none")},
    }


def evaluation_datasets(evaluation: Evaluation, reference: dict) -> list[Dataset]:
    """The evaluation text and the gold set, whose hashes `reference` (reference.json) has."""
    named = evaluation.model_dump(mode="json", include={"source", "path", "dataset", "dataset_config", "split"})
    named |= {"dataset_revision": reference.get("dataset_revision")}
    text = Dataset("evaluation", reference["text_sha256"], "evaluation", {key: one for key, one in named.items() if one},
                   {"tokens": reference["tokens"]})
    if not reference["gold_sha256"]:
        return [text]
    return [text, Dataset("gold", reference["gold_sha256"], "gold", {"source": "file", "path": evaluation.gold},
                          {"items": reference["gold_items"]})]


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among nested values, by names that MLflow takes, such as `tasks/facts/accuracy`."""
    return {re.sub(r"[^\w./: -]", "_", name): float(value) for name, value in flat(values, "/").items()
            if isinstance(value, int | float) and not isinstance(value, bool)}


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """A variant's metrics under the names that MLflow gets: what was found for each task of the gold set goes under `tasks`.
    The page of charts sorts sections by their names, and so shows the figures of the whole sets first.
    """
    return {{"gold_tasks": "tasks"}.get(name, name): value for name, value in metrics.items()}


def without_secrets(text: object) -> str:
    """What an error says, without the credentials that an address in it may hold."""
    return re.sub(r"//[^/@\s]+@", "//", str(text))


def with_client(tracking: Tracking, work: Callable[["MlflowClient"], Result]) -> Result:
    """What `work` returns, given a client of the tracking store.

    Raises StageError(network_unavailable) if a server does not answer or refuses.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A server that is down should stop a stage within seconds, not after MLflow's minutes of trying.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    for name in ("alembic", "mlflow.store"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(tracking.uri)
    try:
        return work(MlflowClient(tracking_uri=uri, registry_uri=uri))
    except (MlflowException, OSError) as error:
        if uri.startswith("sqlite:"):
            raise
        raise StageError(Failure.NETWORK_UNAVAILABLE, "expected an MLflow server at tracking.uri, but it does not take "
                         f"the run: {without_secrets(error)}; start it, or compose with tracking=local") from None


def record(tracking: Tracking, key: str, name: str, params: dict[str, Any], metrics: dict[str, Any],
           tags: dict[str, str], files: list[Path], datasets: Sequence[Dataset] = (), started: float | None = None) -> str:
    """Log to the run whose key is `key`, making it, begun at `started` (seconds since 1970; None: now), if there is none.
    Returns the MLflow run id.

    Nested parameters and metrics are logged by their path, and of the metrics those that are numbers.
    Raises StageError(network_unavailable) if a tracking server does not answer.
    """
    return with_client(tracking, lambda client: _record(client, tracking.experiment, key, name, flat(params),
                                                        numbers(metrics), tags, files, datasets, started))


def _record(client: "MlflowClient", experiment_name: str, key: str, name: str, params: dict[str, Any],
            metrics: dict[str, float], tags: dict[str, str], files: list[Path], datasets: Sequence[Dataset],
            started: float | None) -> str:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.time import get_current_time_millis

    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        local = client.tracking_uri.startswith("sqlite:")
        place = (main_root() / "mlartifacts").as_uri() if local else None
        experiment = client.get_experiment(client.create_experiment(experiment_name, place, tags={"mlflow.note.content": NOTE}))
    found = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{KEY}` = '{key}'", max_results=1)
    commit = git_commit() if not found else ""
    run = found[0] if found else client.create_run(
        experiment.experiment_id, run_name=name, start_time=started and int(1000 * started),
        tags={KEY: key, "git_commit": commit, "mlflow.source.git.commit": commit, "mlflow.source.name": "quantline"})
    known, now = run.data.params, get_current_time_millis()
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(metric, value, now, 0) for metric, value in sorted(metrics.items())],
        params=[Param(param, str(value)[:MAX_PARAM]) for param, value in sorted(params.items()) if param not in known],
        tags=[RunTag(tag, str(value)) for tag, value in sorted(tags.items())],
    )
    if datasets:
        client.log_inputs(run.info.run_id, [_input(dataset) for dataset in datasets])
    for file in files:
        client.log_artifact(run.info.run_id, str(file))
    if run.info.status != FINISHED:  # what is added later does not lengthen it
        client.set_terminated(run.info.run_id)
    return run.info.run_id


def _input(dataset: Dataset) -> Any:
    """MLflow's entity of a dataset; its digest is as much of the sha256 as there is room for."""
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    entity = Entity(dataset.name, dataset.sha256[:MAX_DIGEST], dataset.source["source"], json.dumps(dataset.source),
                    profile=json.dumps(dataset.profile | {"sha256": dataset.sha256}))
    return DatasetInput(entity, [InputTag("mlflow.data.context", dataset.context)])
