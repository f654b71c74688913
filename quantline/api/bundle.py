"""From quantized weights to a bundle that is read back and tried."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.config.containers import CONTAINERS
from quantline.config.recipes import parse_recipe
from quantline.config.texts import Limits
from quantline.config.variants import Variant, misfits
from quantline.errors import ConfigError
from quantline.folders import atomic_folder
from quantline.run.child_process import call_in_child

if TYPE_CHECKING:
    from quantline.model.checkpoint import Checkpoint
    from quantline.quantized.store import QuantizedModel

PROMPTS = ("Once upon a time", "The capital of", "2 + 2 =")  # of the smoke test
CREATED_BY = "quantline.export"


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
    from quantline.runtimes.converted_logits import check_logits

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

    def check(converted: Any) -> None:
        check_logits(converted, Limits(), None)

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
        export_bundle(target.name, variant, model.folder, weights, new, check, smoke, CREATED_BY)
    return target
