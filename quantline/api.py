"""quantline in a notebook: one model, any recipe, a bundle, its figures, and the choice.

    >>> import quantline
    >>> model = quantline.load_checkpoint("path/to/model", "work/model")
    >>> text = quantline.text_file("calibration.txt", sequences=32, length=256)
    >>> calibration = quantline.calibrate(model, text, "work/calibration")
    >>> recipe = {"method": "kquant-curvature", "mix": "Q4_K_M"}
    >>> weights = quantline.quantize(model, calibration, recipe, "work/weights/q4_k_m")
    >>> bundle = quantline.export(model, weights, "work/bundles/q4_k_m")
    >>> unseen = quantline.text_file("evaluation.txt", sequences=16, length=256)
    >>> truth = quantline.make_reference(model, calibration, text, unseen, "work/reference")
    >>> results = quantline.measure(bundle, truth, "work/metrics")
    >>> print(quantline.compare([bundle], "work/metrics", model))

Every call that makes files writes them atomically, and returns what reads them: the model, the
statistics, the weights, the bundle's folder, the figures. The stages make the same calls, and
record them in DVC and MLflow.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.config.containers import CONTAINERS
from quantline.config.params import Model
from quantline.config.recipes import Recipe, parse_recipe
from quantline.config.targets import Optimize, Target
from quantline.config.texts import Calibration, Limits, Speed, Text
from quantline.config.variants import Variant, misfits
from quantline.errors import ConfigError
from quantline.folders import atomic_folder
from quantline.run.child_process import call_in_child

if TYPE_CHECKING:
    from quantline.calibration.store import CalibrationStore
    from quantline.metrics.results import Results
    from quantline.model.checkpoint import Checkpoint
    from quantline.quantized.store import QuantizedModel

PROMPTS = ("Once upon a time", "The capital of", "2 + 2 =")  # of the smoke test
SPEED = Speed(prompt_tokens=128, new_tokens=64, repetitions=5)
CREATED_BY = "quantline.export"


@dataclass(frozen=True)
class Comparison:
    """Variants side by side; printed, it is a table with the choice and its reasons.

    Attributes:
        pick: Name of the variant to ship; None if no variant meets the target.
        reasons: The decision in sentences.
        report: Everything, by the keys of reports/compression.json.
    """

    pick: str | None
    reasons: list[str]
    report: dict[str, Any]

    def __str__(self) -> str:
        """Return the table."""
        from quantline.report.terminal import print_report

        text = io.StringIO()
        print_report(self.report, text)
        return text.getvalue()


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


def load_checkpoint(
    source: Path | str,
    folder: Path | str,
    *,
    revision: str | None = None,
    adapter: Path | str | None = None,
    converter: Path | str | None = None,
) -> "Checkpoint":
    """Load and check a trained model; weights are linked, not copied, where possible.

    Args:
        source: A folder in Hugging Face's layout, or with `revision` a model's id on the Hub.
        folder: Where to put the model.
        revision: Branch, tag or commit on the Hub.
        adapter: Folder of a LoRA adapter to merge in.
        converter: A checkout of llama.cpp to convert with, for architectures that quantline has
            no table for.

    Raises:
        StageError: unsafe_checkpoint, custom_code, unsupported_architecture, missing_file,
            missing_shard, missing_tokenizer, tokenizer_mismatch, path_escape, non_finite,
            adapter_mismatch, converter_failed, network_unavailable.
    """
    from quantline.ingest.load import load
    from quantline.model.checkpoint import Checkpoint

    values = {"source": "local", "path": str(source), "watch": str(source)}
    if revision:
        values = {"source": "hub", "id": str(source), "revision": revision, "watch": str(source)}
    if adapter:
        values["adapter"] = str(adapter)
    if converter:
        values["converter"] = str(converter)
    model = Model.model_validate(values)
    with atomic_folder(Path(folder)) as new:
        load(model, new)
    return Checkpoint(folder)


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
            "group_size": 128, "symmetric": False}.
        folder: Where to put the weights; its name is the recipe's.

    Raises:
        pydantic.ValidationError: If the recipe is wrong.
        StageError: As the method does.
    """
    from quantline.model.gguf_checkpoint import source_for_gguf
    from quantline.quantized.store import QuantizedModel
    from quantline.recipes.quantize import quantize_model

    options = parse_recipe(recipe)
    # With a converter, ggml's types are rounded from the converter's file.
    source = source_for_gguf(model.folder) if options.storage == "ggml" else model
    target = Path(folder)
    with atomic_folder(target) as new:
        quantize_model(target.name, options, source, calibration, new)
    return QuantizedModel(target)


def export(
    model: "Checkpoint",
    weights: "QuantizedModel",
    folder: Path | str,
    *,
    format: str | None = None,
    runtime: str | None = None,
    prompts: Iterable[str] = PROMPTS,
    new_tokens: int = 24,
    **options: Any,
) -> Path:
    """Write a bundle, read it back, and try it in the runtime that will serve it.

    Args:
        model: From `load_checkpoint`.
        weights: From `quantize`.
        folder: Where to put the bundle; its name is the variant's.
        format: The container; by default the recipe's own.
        runtime: Where the bundle is tried and measured; by default the container's own.
        prompts: Texts that it has to continue.
        new_tokens: How many tokens to generate for each.
        options: Further options of a variant: dtype, layout, split_max_mib, tokenizer.

    Returns:
        The folder.

    Raises:
        pydantic.ValidationError: If there is no such container, runtime or option.
        ConfigError: If recipe, container and runtime do not fit together.
        StageError: As the container does; readback_mismatch, smoke_failed, tokenizer_mismatch.
    """
    from quantline.formats.bundle.export import export_bundle
    from quantline.metrics.source_answers import answer_prompts

    recorded = weights.report["recipe"]
    name = recorded["name"]
    recipe = parse_recipe({key: value for key, value in recorded.items() if key != "name"})
    container = format or recipe.container
    if runtime is None and container in CONTAINERS:
        runtime = CONTAINERS[container].runtime
    values = {"recipe": name, "format": container, "runtime": runtime, **options}
    variant = Variant.model_validate(values)
    target = Path(folder)
    problems = [f"{target.name}{problem}" for problem in misfits(variant, {name: recipe})]
    if problems:
        raise ConfigError("\n".join(problems))

    def smoke(bundle: Path, rows: int) -> dict[str, Any]:
        arguments = {
            "bundle": str(bundle),
            "model": str(model.folder),
            "format": variant.format,
            "runtime": variant.runtime,
            "answers": answer_prompts(model, list(prompts), new_tokens),
            "tokens": new_tokens,
            "exact": recipe.storage == "none",
            "rows": rows,
            "exact_tokenizer": variant.tokenizer == "exact",
        }
        function = "quantline.runtimes.smoke.smoke_test:smoke_test"
        return call_in_child(function, arguments, Limits(), f"the smoke test of {target.name}")

    with atomic_folder(target) as new:
        export_bundle(target.name, variant, model.folder, weights, new, smoke, CREATED_BY)
    return target


def make_reference(
    model: "Checkpoint",
    calibration: "CalibrationStore",
    calibrated_on: Text,
    text: Text,
    folder: Path | str,
    *,
    gold: Path | str | None = None,
    allow_overlap: bool | Sequence[str] = False,
) -> Path:
    """Run the unquantized model on an evaluation text: what bundles are measured by.

    Args:
        model: From `load_checkpoint`.
        calibration: From `calibrate`.
        calibrated_on: The text that `calibrate` was given; it must share no document with `text`.
        text: The evaluation text, from `text_file`.
        folder: Where to put the reference.
        gold: A file of questions, as JSON lines.
        allow_overlap: Ids of gold items and documents that may stand in the other texts too, as the
            error names them; True for all.

    Returns:
        The folder.

    Raises:
        StageError: texts_overlap, dataset_invalid, artifact_changed, non_finite.
    """
    from quantline.metrics import reference

    target = Path(folder)
    questions = Path(gold) if gold else None
    with atomic_folder(target) as new:
        reference.make_reference(
            model.folder, calibration.folder, calibrated_on, text, questions, new, allow_overlap
        )
    return target


def measure(
    bundle: Path | str,
    reference: Path | str,
    folder: Path | str,
    *,
    speed: Speed = SPEED,
    limits: Limits | None = None,
) -> "Results":
    """Measure a bundle from its files, in a fresh process, in its runtime.

    Args:
        bundle: From `export`.
        reference: From `make_reference`.
        folder: Where to put the figures of all bundles.
        speed: How speed is measured.
        limits: Of time and memory.

    Raises:
        StageError: artifact_changed, if the bundle is not what its manifest says;
            runtime_unavailable, runtime_crashed, timed_out, out_of_memory, non_finite.
    """
    from quantline.formats.bundle.manifest import check_bundle
    from quantline.metrics.results import ResultFiles, write_results

    path = Path(bundle)
    manifest = check_bundle(path)
    runtime = manifest["runtime"]
    arguments = {
        "bundle": str(path),
        "runtime": runtime,
        "reference": str(reference),
        **speed.model_dump(),
    }
    function = "quantline.metrics.measure:measure_bundle"
    label = f"the measuring process of {path.name}"
    measured = call_in_child(function, arguments, limits or Limits(), label)
    return write_results(ResultFiles.of(Path(folder), path.name), manifest, runtime, measured)


def compare(
    bundles: Iterable[Path | str],
    folder: Path | str,
    model: "Checkpoint",
    target: Target | dict[str, Any] | None = None,
) -> Comparison:
    """Compare measured bundles and choose the one to ship.

    Args:
        bundles: From `export`, each of them measured.
        folder: Where `measure` put the figures.
        model: From `load_checkpoint`.
        target: As in conf/target; by default the smallest bundle wins, wherever it runs.

    Raises:
        StageError: artifact_changed, if figures are of other bytes than the bundle's.
    """
    from quantline.formats.bundle.manifest import check_bundle
    from quantline.metrics.results import ResultFiles, read_results
    from quantline.report.build import rank
    from quantline.report.rows import fill_in
    from quantline.report.variant import VariantRow

    demands = Target.model_validate(target) if target else smallest()
    rows = []
    for bundle in map(Path, bundles):
        manifest = check_bundle(bundle)
        results = read_results(ResultFiles.of(Path(folder), bundle.name), manifest)
        row = VariantRow(
            bundle.name, manifest["recipe"]["name"], manifest["format"], manifest["runtime"]
        )
        fill_in(row, bundle, manifest, results, demands, model.arch)
        rows.append(row)
    choice = rank(rows, demands, model.arch)
    report = {
        "target": demands.model_dump(mode="json"),
        "pick": choice.pick,
        "runner_up": choice.runner_up,
        "reasons": choice.reasons,
        "variants": [row.to_json() for row in rows],
    }
    return Comparison(choice.pick, choice.reasons, report)


def smallest() -> Target:
    """Return a target that every bundle meets and that ranks by size."""
    return Target(
        name="the smallest",
        optimize=Optimize(metric="size_bytes", direction="min"),
    )
