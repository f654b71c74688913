"""MLflow's model registry: a promoted variant as a version of a registered model, with an alias.

A version is known by the hash of its bundle, so the same bytes are one version however often they
are promoted. It keeps a copy of the bundle, which nothing changes later.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quantline.config.compose import project_root
from quantline.config.tracking import Registry, Tracking
from quantline.messages import without_secrets
from quantline.tracking.logged_models import (
    BundleDescription,
    copy_bundle,
    find_or_create_model,
)
from quantline.tracking.store import main_root, with_client

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

SHA256 = "artifact_sha256"
# What MLflow answers where there is no model of a name, and no version with an alias.
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
NO_REGISTRY = ("ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "NOT_IMPLEMENTED")


class NoRegistryError(Exception):
    """The tracking store keeps runs, but no models."""


class NotPromotedError(Exception):
    """The version that has the alias is to keep it; the message says why."""


class Champion(NamedTuple):
    """The version that has the alias.

    Attributes:
        number: Of the version.
        tags: Of the version, as it was promoted.
    """

    number: str
    tags: Mapping[str, str]


class Version(NamedTuple):
    """A version of a registered model.

    Attributes:
        number: Of the version.
        is_new: Whether it was made now.
        replaced: Number of the version that had the alias before; None if none had, or this one.
    """

    number: str
    is_new: bool
    replaced: str | None


class Candidate(NamedTuple):
    """A bundle that is to be promoted.

    Attributes:
        run_id: MLflow's id of the variant's run.
        key: Of that run.
        model: What MLflow's model of it is made from.
        tags: Of a new version; `artifact_sha256` names the bytes.
        description: Of a new version.
    """

    run_id: str
    key: str
    model: BundleDescription
    tags: dict[str, str]
    description: str


def in_queued_copy() -> bool:
    """Whether this is a copy of the workspace where DVC runs a queued experiment.

    Such copies are thrown away.
    """
    return main_root() != project_root()


def register(
    tracking: Tracking,
    candidate: Candidate,
    objections: Callable[[Champion], Sequence[str]],
) -> Version:
    """Register a bundle, unless its bytes are a version already, and give it the alias.

    Args:
        tracking: The section of params.yaml, with a registry.
        candidate: What is promoted.
        objections: Says of the version that has the alias, if that has other bytes, why it is to
            keep it.

    Raises:
        NotPromotedError: If there are objections; nothing is registered then.
        NoRegistryError: If the store keeps no models.
        TrackingError: As `with_client` does.
    """
    from mlflow.exceptions import MlflowException

    registry = tracking.registry
    assert registry is not None, "tracking.registry is null"

    def use(client: "MlflowClient") -> Version:
        try:
            return _register(client, registry, candidate, objections)
        except MlflowException as error:
            if _has_no_registry(error):
                raise NoRegistryError(without_secrets(error)) from None
            raise

    return with_client(tracking, use, None)  # a bundle may take long to upload


def _has_no_registry(error: "MlflowException") -> bool:
    """Whether a server answers that it knows no such address, or that its store keeps no models."""
    unavailable = "model registry functionality is unavailable" in str(error).lower()
    return error.error_code in NO_REGISTRY or unavailable


def _register(
    client: "MlflowClient",
    registry: Registry,
    candidate: Candidate,
    objections: Callable[[Champion], Sequence[str]],
) -> Version:
    exists, champion = _champion(client, registry)
    wanted = candidate.tags[SHA256]
    if champion is not None and champion.tags.get(SHA256) == wanted:
        return Version(champion.number, False, None)
    if champion is not None and (reasons := objections(champion)):
        raise NotPromotedError("; ".join(reasons))
    if not exists:
        client.create_registered_model(registry.name)
    query = f"name = '{registry.name}' and tags.`{SHA256}` = '{wanted}'"
    known = sorted(int(version.version) for version in client.search_model_versions(query))
    number = str(known[-1]) if known else _make_version(client, registry.name, candidate)
    client.set_registered_model_alias(registry.name, registry.alias, number)
    return Version(number, not known, champion.number if champion else None)


def _champion(client: "MlflowClient", registry: Registry) -> tuple[bool, Champion | None]:
    """Return whether the registered model exists, and its version that has the alias."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(registry.name).aliases
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
        return False, None
    if registry.alias not in aliases:
        return True, None
    number = str(aliases[registry.alias])
    try:
        version = client.get_model_version(registry.name, number)
    except MlflowException as error:  # the version was deleted, and the alias left
        if error.error_code not in MISSING:
            raise
        return True, None
    return True, Champion(number, dict(version.tags))


def _make_version(client: "MlflowClient", name: str, candidate: Candidate) -> str:
    """Make a version of MLflow's model of the bundle, with a copy of it; return its number."""
    model_id = find_or_create_model(
        client, candidate.run_id, candidate.key, candidate.model, {}, candidate.tags
    )
    copy_bundle(client, model_id, Path(candidate.model.path))
    source = f"models:/{model_id}"
    if not client.tracking_uri.startswith("http"):
        # Without a server MLflow would look for the model in the process's own store, not in this.
        source = client.get_logged_model(model_id).artifact_location
    version = client.create_model_version(
        name,
        source,
        candidate.run_id,
        tags=candidate.tags,
        description=candidate.description,
        model_id=model_id,
    )
    return str(version.version)
