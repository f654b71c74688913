"""MLflow's model registry: the variant to ship as a version of a registered model, and the alias that points to it.

A version is known by the hash of its bundle, so the same bytes are one version however often they are compared.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from quantline.config.compose import project_root
from quantline.config.params import Tracking
from quantline.config.params import Registry
from quantline.tracking.mlflow_runs import main_root, with_client, without_secrets

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

SHA256 = "artifact_sha256"
MISSING = "RESOURCE_DOES_NOT_EXIST"
UPLOADED = "bundle"  # the folder of an uploaded bundle among its run's artifacts


class NoRegistry(Exception):
    """The tracking store keeps runs, but no models."""


def in_queued_copy() -> bool:
    """Whether this is one of the copies of the workspace where DVC runs queued experiments; they are thrown away."""
    return main_root() != project_root()


def register(tracking: Tracking, run_id: str, bundle: Path, tags: dict[str, str], description: str) -> tuple[str, bool]:
    """(the version that holds the bundle of `tags[artifact_sha256]`, whether it is new); the alias points to it then.

    Raises NoRegistry; StageError(network_unavailable) if a server has a registry but does not take the version.
    """
    from mlflow.exceptions import MlflowException

    def work(client: "MlflowClient") -> tuple[str, bool]:
        try:
            return _register(client, tracking.registry, run_id, bundle, tags, description)
        except MlflowException as error:
            if _is_absent(error):
                raise NoRegistry(without_secrets(error)) from None
            raise

    return with_client(tracking, work)


def _is_absent(error: "MlflowException") -> bool:
    """Whether a server says that it has no model registry: it knows no such address, or its store keeps no models."""
    return error.error_code in ("ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "NOT_IMPLEMENTED") or \
        "model registry functionality is unavailable" in str(error).lower()


def _register(client: "MlflowClient", registry: Registry, run_id: str, bundle: Path, tags: dict[str, str],
              description: str) -> tuple[str, bool]:
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(registry.name).aliases
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        client.create_registered_model(registry.name)
        aliases = {}
    same = client.search_model_versions(f"name = '{registry.name}' and tags.`{SHA256}` = '{tags[SHA256]}'")
    numbers = sorted((one.version for one in same), key=int)
    number = numbers[-1] if numbers else None
    if number is None:
        source = bundle.resolve().as_uri()
        if registry.upload:
            client.log_artifacts(run_id, str(bundle), UPLOADED)
            source = f"{client.get_run(run_id).info.artifact_uri}/{UPLOADED}"
        number = client.create_model_version(registry.name, source, run_id, tags=tags, description=description).version
    if str(aliases.get(registry.alias)) != str(number):
        client.set_registered_model_alias(registry.name, registry.alias, number)
    return str(number), not numbers
