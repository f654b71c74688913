"""MLflow runs: one for each thing that a stage made, found again by its content.

So nothing is logged twice.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.config.stale import flatten
from quantline.config.tracking import Tracking
from quantline.messages import redacted, without_secrets
from quantline.tracking.logged_models import BundleDescription, find_or_create_model
from quantline.tracking.moved_project import RUN_FILES
from quantline.tracking.run_content import Dataset, numbers
from quantline.tracking.run_origin import origin_tags
from quantline.tracking.store import RUN_S, main_root, with_client

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY = "quantline.key"
EXISTS = "RESOURCE_ALREADY_EXISTS"
FINISHED = "FINISHED"
FAILED = "FAILED"
PARAM_LENGTH = 500  # characters that MLflow keeps of a parameter
DIGEST_LENGTH = 36  # of a dataset
# Figures of the bundle or the machine, which no text was needed for.
UNTIED = ("speed/", "lm_eval/", "estimated_", "size_bytes", "bits_per_weight", "memory_mib")
PARENT = "mlflow.parentRunId"
NOTE = (
    "Choose *Model training* at the top left. A run of `compare` holds the page; below it are the "
    "runs of its variants (`tags.stage = 'evaluate'`), which hold the figures, and of the stages "
    "that led to them. A run's duration is that of the stage that made it. *Models* lists the "
    "variants as models, which `mlflow.pyfunc.load_model` opens."
)


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
    parent: str | None = None,
    model: BundleDescription | None = None,
    origin: dict[str, str] | None = None,
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
        parent: Key of the run that this one is shown below, if that is there.
        model: The bundle of a variant's run, which becomes a model of MLflow with these figures.
        origin: The user, source and commit of a new run; by default those of now.

    Returns:
        MLflow's id of the run.

    Raises:
        TrackingError: As `with_client` does.
    """

    def log(client: "MlflowClient") -> str:
        from mlflow.entities import Param, RunTag

        experiment = _experiment(client, tracking.experiment)
        new_tags = origin or origin_tags(tags.get("stage"))
        run = _find_or_create_run(client, experiment.experiment_id, key, name, started, new_tags)
        run_id = run.info.run_id
        now = int(1000 * (logged or time.time()))
        known = run.data.params
        texts = {
            param: without_secrets(value)[:PARAM_LENGTH]
            for param, value in sorted(flatten(params).items())
        }
        own_tags = dict(tags)
        if parent and (above := _find_run(client, experiment.experiment_id, parent)):
            own_tags[PARENT] = above.info.run_id
        model_id = None
        if model is not None:
            model_id = find_or_create_model(client, run_id, key, model, texts, tags)
        client.log_batch(
            run_id,
            metrics=_metrics(numbers(metrics), now, model_id, datasets),
            params=[Param(param, text) for param, text in texts.items() if param not in known],
            tags=[RunTag(tag, without_secrets(value)) for tag, value in sorted(own_tags.items())],
        )
        if datasets:
            client.log_inputs(run_id, [_dataset_input(dataset) for dataset in datasets])
        for file in files:
            client.log_artifact(run_id, str(file))
        if run.info.status not in (FINISHED, FAILED):  # what is added later lengthens no run
            client.set_terminated(run_id, status, now)
        return run_id

    is_upload = model is not None and model.copied
    return with_client(tracking, log, None if is_upload else RUN_S)


def _metrics(
    values: dict[str, float], now: int, model_id: str | None, datasets: Sequence[Dataset]
) -> list[Any]:
    """Return MLflow's entities of figures; those of a model say what they were measured on."""
    from mlflow.entities import Metric

    measured_on = {}
    if model_id is not None and datasets:
        text, gold = datasets[0], datasets[-1]
        measured_on = {False: text, True: gold}
    entities = []
    for name, value in sorted(values.items()):
        of_gold_set = name.startswith(("gold_", "tasks/"))
        dataset = None if name.startswith(UNTIED) else measured_on.get(of_gold_set)
        entities.append(
            Metric(
                name,
                value,
                now,
                0,
                model_id=model_id,
                dataset_name=dataset.name if dataset else None,
                dataset_digest=dataset.sha256[:DIGEST_LENGTH] if dataset else None,
            )
        )
    return entities


def _experiment(client: "MlflowClient", name: str) -> Any:
    """Return the experiment of that name, made if there is none."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment
    local = not client.tracking_uri.startswith("http")
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


def _find_run(client: "MlflowClient", experiment: str, key: str) -> Any:
    """Return the run whose key is `key`; None if there is none."""
    query = f"tags.`{KEY}` = '{key}'"
    runs = client.search_runs([experiment], filter_string=query, max_results=1)
    return runs[0] if runs else None


def _find_or_create_run(
    client: "MlflowClient",
    experiment: str,
    key: str,
    name: str,
    started: float | None,
    tags: dict[str, str],
) -> Any:
    """Return the run whose key is `key`; a new one gets these tags."""
    run = _find_run(client, experiment, key)
    if run is not None:
        return run
    start_time = int(1000 * started) if started else None
    return client.create_run(
        experiment, run_name=name, start_time=start_time, tags=tags | {KEY: key}
    )


def put_below(tracking: Tracking, parent: str, tags: Sequence[tuple[str, str]]) -> int:
    """Show runs below another, those that have one of some tags; return how many there are.

    A run is below one other alone: the newest that it was put below.

    Args:
        tracking: The section of params.yaml.
        parent: MLflow's id of the run above.
        tags: Name and value of the tags.

    Raises:
        TrackingError: As `with_client` does.
    """

    def put(client: "MlflowClient") -> int:
        experiment = _experiment(client, tracking.experiment).experiment_id
        found = set()
        for name, value in sorted(set(tags)):
            query = f"tags.`{name}` = '{value}'"
            found |= {
                run.info.run_id
                for run in client.search_runs([experiment], filter_string=query)
                if run.data.tags.get(PARENT) != parent
            }
        for run_id in sorted(found - {parent}):
            client.set_tag(run_id, PARENT, parent)
        return len(found)

    return with_client(tracking, put)


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
