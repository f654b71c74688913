"""A project's own MLflow database, and a server that does not answer."""

from pathlib import Path
from typing import TYPE_CHECKING

from quantline.config.tracking import Tracking

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

DOWN = ["tracking=server", "tracking.uri=http://127.0.0.1:9"]  # overrides


def client_of(root: Path) -> "MlflowClient":
    """Return MLflow's client of the database."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")


def runs(root: Path) -> "list[Run]":
    """Return all runs in the database."""
    client = client_of(root)
    experiment = client.get_experiment_by_name("quantline")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def local(root: Path) -> Tracking:
    """Return the settings that name the database."""
    return Tracking(uri=f"sqlite:///{root}/mlflow.db", experiment="quantline")
