"""A model as load leaves it, and bundles that are exported from it without a runtime."""

import json
import shutil
from pathlib import Path
from typing import Any

from quantline.config.recipes import parse_recipe
from quantline.formats.bundle.export import export_bundle
from quantline.model.checkpoint import Checkpoint
from quantline.model.configuration import write_configuration
from quantline.quantized.store import QuantizedModel
from quantline.text.special_tokens import write_special_tokens
from quantline.text.transformers_tokenizer import ask
from tests.helpers.quantized import rounded
from tests.helpers.variants import variant

NONE = {"method": "none"}
RTN = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}
TRACE = {"passed": True}
# What a smoke test says of each prompt.
SMOKE_CHECKS = (
    "finite",
    "non_empty",
    "varied",
    "like_source",
    "tokenizer_parity",
    "vocabulary",
)
REPEATABLE = "repeatable"  # what it says besides of the one that is answered twice


def loaded_model(folder: Path, checkpoint: Path) -> Path:
    """Copy a checkpoint, with the manifest and the configuration that load puts beside it."""
    shutil.copytree(checkpoint, folder)
    write_configuration(folder)
    manifest = {
        "source": {"kind": "local", "path": "m", "revision": None, "adapter": None},
        "transforms": [{"step": "convert_tokenizer", "class": "X"}],
        "files": {"model.safetensors": {"sha256": "0" * 64, "bytes": 1}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return settled(folder)


def settled(folder: Path) -> Path:
    """Write down what transformers says of a folder's tokenizer, as load does."""
    write_special_tokens(folder, ask(folder).special)
    return folder


def store_of(folder: Path, model: Path, recipe: dict[str, Any]) -> QuantizedModel:
    """Round a model to nearest on a recipe's grid, as if its method had."""
    options = parse_recipe(recipe).model_dump(mode="json")
    return rounded(
        folder,
        Checkpoint(model),
        bits=options.get("bits", 0),
        group_size=options.get("group_size", 32),
        symmetric=options.get("symmetric", False),
        recipe={"name": "r", **options},
    )


def export(
    folder: Path,
    model: Path,
    quantized: QuantizedModel,
    format: str,
    helped: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Export a bundle whose smoke test passes, with help or without; return its manifest."""
    trace = TRACE | ({"helped": helped} if helped else {})
    folder.mkdir(parents=True)
    return export_bundle(
        name=folder.name,
        variant=variant(format, recipe="r", **options),
        model=model,
        quantized=quantized,
        folder=folder,
        check=lambda converted: None,
        smoke=lambda bundle, rows: trace | {"rows": rows},
        created_by="export-0123",
    )
