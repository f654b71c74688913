"""MLflow: one run for each thing that a stage made, found again by its content, so that nothing is logged twice."""

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import Tracking, project_root
from stages.tracking.failures import Failure, StageError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY = "quantline.key"
MAX_PARAM = 500  # characters that MLflow keeps of a parameter


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


def record(tracking: Tracking, key: str, name: str, params: dict[str, Any], metrics: dict[str, float],
           tags: dict[str, str], files: list[Path]) -> str:
    """Log to the run whose key is `key`, making it if there is none. Returns the MLflow run id.

    Raises StageError(network_unavailable) if a tracking server does not answer.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(tracking.uri)
    # A server that is down should stop a stage within seconds, not after MLflow's minutes of trying.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return _record(client, tracking.experiment, key, name, params, metrics, tags, files)
    except (MlflowException, OSError) as error:
        if uri.startswith("sqlite:"):
            raise
        raise StageError(Failure.NETWORK_UNAVAILABLE, "expected an MLflow server at tracking.uri, but it does not "
                         f"take the run: {error}; start it, or compose with tracking=local") from error


def _record(client: "MlflowClient", experiment_name: str, key: str, name: str, params: dict[str, Any],
            metrics: dict[str, float], tags: dict[str, str], files: list[Path]) -> str:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.time import get_current_time_millis

    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        local = client.tracking_uri.startswith("sqlite:")
        place = (main_root() / "mlartifacts").as_uri() if local else None
        experiment = client.get_experiment(client.create_experiment(experiment_name, artifact_location=place))
    found = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{KEY}` = '{key}'", max_results=1)
    run = found[0] if found else client.create_run(
        experiment.experiment_id, run_name=name, tags={KEY: key, "git_commit": git_commit()})
    known, now = run.data.params, get_current_time_millis()
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(metric, float(value), now, 0) for metric, value in sorted(metrics.items())],
        params=[Param(param, str(value)[:MAX_PARAM]) for param, value in sorted(params.items()) if param not in known],
        tags=[RunTag(tag, str(value)) for tag, value in sorted(tags.items())],
    )
    for file in files:
        client.log_artifact(run.info.run_id, str(file))
    client.set_terminated(run.info.run_id)
    return run.info.run_id
