"""From a trained model to quantized weights: load it, calibrate once, quantize by any recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.config.params import AUTO, Model
from quantline.config.recipes import Recipe, parse_recipe
from quantline.config.texts import Calibration, Text
from quantline.folders import atomic_folder

if TYPE_CHECKING:
    from quantline.calibration.store import CalibrationStore
    from quantline.model.checkpoint import Checkpoint
    from quantline.quantized.store import QuantizedModel


def load_checkpoint(
    source: Path | str,
    folder: Path | str,
    *,
    revision: str | None = None,
    adapter: Path | str | None = None,
    converter: Path | str | None = AUTO,
) -> "Checkpoint":
    """Load and check a trained model; weights are linked, not copied, where possible.

    Args:
        source: A folder in Hugging Face's layout, or with `revision` a model's id on the Hub.
        folder: Where to put the model.
        revision: Branch, tag or commit on the Hub.
        adapter: Folder of a LoRA adapter to merge in.
        converter: What makes GGUF files of the model: auto is quantline itself for families that it
            has a table of, else the converter of the llama.cpp that is installed; a checkout of
            llama.cpp; None is quantline alone.

    Raises:
        StageError: unsafe_checkpoint, custom_code, unsupported_architecture, missing_file,
            missing_shard, missing_tokenizer, tokenizer_mismatch, path_escape, non_finite,
            adapter_mismatch, network_unavailable.
    """
    from quantline.ingest.load import load
    from quantline.model.checkpoint import Checkpoint

    values = {"source": "local", "path": str(source), "watch": str(source)}
    if revision:
        values = {"source": "hub", "id": str(source), "revision": revision, "watch": str(source)}
    if adapter:
        values["adapter"] = str(adapter)
    choice = {"converter": str(converter) if converter else None}
    model = Model.model_validate(values | choice)
    with atomic_folder(Path(folder)) as new:
        load(model, new)
    return Checkpoint(folder)


def text_file(
    path: Path | str,
    *,
    sequences: int,
    length: int,
    part: tuple[float, float] = (0.0, 1.0),
    column: str = "text",
) -> Text:
    """Name a text to calibrate or to measure on; it is read when it is used.

    Args:
        path: A .txt file, whose documents are separated by blank lines, or a .jsonl file.
        sequences: At most so many sequences.
        length: Tokens of a sequence.
        part: Share of the documents to take, from and to.
        column: The key of the text in a .jsonl file.
    """
    return Text(
        source="file",
        path=str(path),
        column=column,
        part=part,
        sequences=sequences,
        length=length,
        watch=str(path),
    )


def calibrate(
    model: "Checkpoint",
    text: Text,
    folder: Path | str,
    *,
    gradients: bool = True,
    seed: int = 0,
) -> "CalibrationStore":
    """Run the model on a text and keep statistics of every linear layer, for all methods.

    Args:
        model: From `load_checkpoint`.
        text: From `text_file`.
        folder: Where to put the statistics.
        gradients: Whether to collect second moments of the output gradients too, as
            kquant-curvature, recipes with `curvature` and budgets need.
        seed: Seed of the labels that are sampled for the gradients.

    Raises:
        StageError: dataset_invalid, calibration_empty, non_finite.
    """
    from quantline.calibration.calibrate import CalibrationRun
    from quantline.calibration.store import CalibrationStore

    settings = Calibration(**text.model_dump(), curvature=gradients)
    run = CalibrationRun(model, settings, seed)
    with atomic_folder(Path(folder)) as new:
        run.collect(new)
    return CalibrationStore(folder)


def quantize(
    model: "Checkpoint",
    calibration: "CalibrationStore",
    recipe: Recipe | dict[str, Any],
    folder: Path | str,
) -> "QuantizedModel":
    """Quantize the model's weights by one recipe.

    Args:
        model: From `load_checkpoint`.
        calibration: From `calibrate`.
        recipe: As in conf/recipe: a method and its options, such as {"method": "gptq", "bits": 4,
            "group_size": "auto", "symmetric": "auto"}.
        folder: Where to put the weights; its name is the recipe's.

    Raises:
        pydantic.ValidationError: If the recipe is wrong.
        StageError: As the method does.
    """
    from quantline.formats.gguf.source import source_for_gguf
    from quantline.quantized.store import QuantizedModel
    from quantline.recipes.quantize import quantize_model

    options = parse_recipe(recipe)
    # ggml's types are rounded from what GGUF files are made of, which may be a converter's file.
    source = source_for_gguf(model.folder) if options.storage == "ggml" else model
    target = Path(folder)
    with atomic_folder(target) as new:
        quantize_model(target.name, options, source, calibration, new)
    return QuantizedModel(target)
