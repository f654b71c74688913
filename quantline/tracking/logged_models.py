"""A variant as a model of MLflow, which `mlflow.pyfunc.load_model` opens in the variant's runtime.

MLflow stores no object of ours, and no pickle: the model names a module that loads it
(quantline/runtimes/mlflow_model.py), and bundle.json, which says where the bundle lies and which
bytes it has. A copy of the bundle lies beside that for models that were promoted, and for all with
`tracking.models: copied`.
"""

import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.files import write_json
from quantline.messages import without_secrets

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

LOADER = "quantline.runtimes.mlflow_model"
DATA = "data/variant"  # what MLflow calls the loader with
DESCRIPTION = "bundle.json"  # in there
COPY = "bundle"  # in there too: a copy of the bundle
TAG_KEY = "quantline.key"
TAG_COPIED = "quantline.bundle_copied"  # set when all of the bundle is there
MODEL_TYPE = "quantized language model"
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class BundleDescription:
    """What MLflow's model of a variant is made from; content of bundle.json.

    Attributes:
        variant: Its name, and that of the bundle's folder.
        runtime: The engine that serves it.
        artifact_sha256: Of the bundle.
        path: Where the bundle was when this was written.
        begin: Token ids that are put before every text; None if only the runtime knows, which
            reads them from a GGUF file.
        ends: Token ids at which a generated text ends; None likewise.
        requirements: What the runtime needs, as pip takes it.
        copied: Whether the bundle is copied when the model is made.
    """

    variant: str
    runtime: str
    artifact_sha256: str
    path: str
    begin: list[int] | None
    ends: list[int] | None
    requirements: list[str]
    copied: bool = False


def find_or_create_model(
    client: "MlflowClient",
    run_id: str,
    key: str,
    bundle: BundleDescription,
    params: dict[str, str],
    tags: dict[str, str],
) -> str:
    """Return the id of the model whose key is `key`, and make it if there is none.

    Args:
        client: Of the store.
        run_id: MLflow's id of the variant's run.
        key: Of that run.
        bundle: What the model is made from.
        params: Of a new model.
        tags: Of a new model.
    """
    from mlflow.entities import LoggedModelOutput

    experiment = client.get_run(run_id).info.experiment_id
    query = f"tags.`{TAG_KEY}` = '{key}'"
    for model in client.search_logged_models([experiment], filter_string=query):
        if str(model.status) == "READY":
            return str(model.model_id)
    made = client.create_logged_model(
        experiment,
        name=bundle.variant,
        source_run_id=run_id,
        tags={name: without_secrets(value) for name, value in (tags | {TAG_KEY: key}).items()},
        params=params,
        model_type=MODEL_TYPE,
    )
    model_id = str(made.model_id)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        write_model(folder, bundle, model_id, run_id)
        client.log_model_artifacts(model_id, str(folder))
    if bundle.copied:
        copy_bundle(client, model_id, Path(bundle.path))
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])
    return model_id


def write_model(folder: Path, bundle: BundleDescription, model_id: str, run_id: str) -> None:
    """Write MLmodel, requirements and bundle.json, all that a model of MLflow is."""
    import mlflow.pyfunc
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as parent:
        data = Path(parent) / Path(DATA).name
        described: dict[str, Any] = asdict(bundle)
        del described["copied"]
        write_json(data / DESCRIPTION, described)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to give an example of the input
            mlflow.pyfunc.save_model(
                str(folder),
                loader_module=LOADER,
                data_path=str(data),
                mlflow_model=Model(model_id=model_id, run_id=run_id),
                # Named, so that MLflow does not load the model to find them out.
                pip_requirements=bundle.requirements,
                signature=_signature(),
            )


def _signature() -> "ModelSignature":
    """Return what a model takes and gives: texts, and how to continue them."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    texts = Schema([ColSpec("string")])
    params = ParamSchema(
        [
            ParamSpec("max_new_tokens", "long", MAX_NEW_TOKENS),
            ParamSpec("logprobs", "boolean", False),
        ]
    )
    return ModelSignature(inputs=texts, params=params)


def copy_bundle(client: "MlflowClient", model_id: str, bundle: Path) -> None:
    """Put a copy of the bundle into a model, unless all of it is there."""
    if client.get_logged_model(model_id).tags.get(TAG_COPIED):
        return
    client.log_model_artifacts(model_id, str(bundle), f"{DATA}/{COPY}")
    client.set_logged_model_tags(model_id, {TAG_COPIED: "true"})
