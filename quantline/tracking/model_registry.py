"""MLflow's model registry: the picked variant as a version of a registered model, with an alias.

A version is known by the hash of its bundle, so the same bytes are one version however often they
are compared.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quantline.config.compose import project_root
from quantline.config.tracking import Registry, Tracking
from quantline.messages import without_secrets
from quantline.tracking.store import RUN_S, main_root, with_client

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

SHA256 = "artifact_sha256"
MISSING = "RESOURCE_DOES_NOT_EXIST"
NO_REGISTRY = ("ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "NOT_IMPLEMENTED")
UPLOADED = "bundle"  # the folder of an uploaded bundle among its run's artifacts


class NoRegistryError(Exception):
    """The tracking store keeps runs, but no models."""


class Version(NamedTuple):
    """A version of a registered model, and whether it is new."""

    number: str
    is_new: bool


def in_queued_copy() -> bool:
    """Whether this is a copy of the workspace where DVC runs a queued experiment.

    Such copies are thrown away.
    """
    return main_root() != project_root()


def register(
    tracking: Tracking, run_id: str, bundle: Path, tags: dict[str, str], description: str
) -> Version:
    """Register a bundle, unless its bytes are a version already, and point the alias to it.

    Args:
        tracking: The section of params.yaml, with a registry.
        run_id: MLflow's id of the variant's run.
        bundle: The folder in artifacts/exports.
        tags: Of a new version; `artifact_sha256` names the bytes.
        description: Of a new version.

    Raises:
        NoRegistryError: If the store keeps no models.
        TrackingError: As `with_client` does.
    """
    from mlflow.exceptions import MlflowException

    registry = tracking.registry
    assert registry is not None, "tracking.registry is null"

    def use(client: "MlflowClient") -> Version:
        try:
            return _register(client, registry, run_id, bundle, tags, description)
        except MlflowException as error:
            if _has_no_registry(error):
                raise NoRegistryError(without_secrets(error)) from None
            raise

    # A bundle may take long to upload.
    return with_client(tracking, use, None if registry.upload else RUN_S)


def _has_no_registry(error: "MlflowException") -> bool:
    """Whether a server answers that it knows no such address, or that its store keeps no models."""
    unavailable = "model registry functionality is unavailable" in str(error).lower()
    return error.error_code in NO_REGISTRY or unavailable


def _register(
    client: "MlflowClient",
    registry: Registry,
    run_id: str,
    bundle: Path,
    tags: dict[str, str],
    description: str,
) -> Version:
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(registry.name).aliases
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        client.create_registered_model(registry.name)
        aliases = {}
    query = f"name = '{registry.name}' and tags.`{SHA256}` = '{tags[SHA256]}'"
    known = sorted(int(version.version) for version in client.search_model_versions(query))
    if known:
        number = str(known[-1])
    else:
        source = bundle.resolve().as_uri()
        if registry.upload:
            client.log_artifacts(run_id, str(bundle), UPLOADED)
            source = f"{client.get_run(run_id).info.artifact_uri}/{UPLOADED}"
        version = client.create_model_version(
            registry.name, source, run_id, tags=tags, description=description
        )
        number = str(version.version)
    if str(aliases.get(registry.alias)) != number:
        client.set_registered_model_alias(registry.name, registry.alias, number)
    return Version(number, not known)
