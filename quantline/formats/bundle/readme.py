"""The README of a bundle, which is a model card of the Hub.

What it is, the lines that serve it, how it was made, and the terms that it is under. The figures
come in where a bundle is published, for they are measured on the bundle that lies here.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantline.files import MIB
from quantline.messages import in_markdown
from quantline.model.dequantized import said_of
from quantline.model.origin import Origin, origin_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

SERVE = "## Serve it"
TEMPLATE = """\
# {title}

{what}
What was done to it, step by step, is in manifest.json; what it answers, in smoke.json.{said}

    artifact sha256  {sha256}

{limits}{evaluation}{serve}
## How it was made

{made}
## Terms

{terms}
"""
# Formats with a library of their own among those that the Hub knows.
LIBRARIES = {"safetensors": "transformers", "gguf": "gguf", "onnx": "onnx"}


def bundle_readme(
    manifest: dict[str, Any],
    serve_text: str,
    evaluation: str = "",
    results: "Sequence[EvalResult]" = (),
    base_model: str | None = None,
) -> str:
    """Return README.md for a bundle.

    Args:
        manifest: The content of its manifest.json.
        serve_text: The section "## Serve it", which its container writes.
        evaluation: Sections with figures, in Markdown.
        results: The same for the card's model-index.
        base_model: The model's id on the Hub, where the source is no model of the Hub.
    """
    origin = origin_of(manifest)
    limits = "".join(f"* {sentence}\n" for sentence in manifest.get("limits", ()))
    body = TEMPLATE.format(
        title=in_markdown(f"{origin.name}, {manifest['variant']}"),
        what=describe(manifest, base_model),
        said=f"\n{said}" if (said := said_of(manifest["transforms"])) else "",
        limits=f"## Limits\n\n{limits}\n" if limits else "",
        evaluation=f"{evaluation.rstrip()}\n\n" if evaluation else "",
        serve=serve_text,
        sha256=manifest["artifact_sha256"],
        made=how_made(manifest),
        terms=terms(origin),
    )
    return card_text(manifest, body, results, base_model)


def card_text(
    manifest: dict[str, Any],
    body: str,
    results: "Sequence[EvalResult]" = (),
    base_model: str | None = None,
) -> str:
    """Return a card with the metadata that the Hub goes by, and a body in Markdown.

    Args:
        manifest: Of a bundle.
        body: Under the metadata.
        results: What was measured.
        base_model: The model's id on the Hub, where the source is no model of the Hub.
    """
    from huggingface_hub import ModelCard, ModelCardData

    origin = origin_of(manifest)
    base = origin.hub_id or base_model
    license = origin.license
    # A licence without a name is what its file says.
    unnamed = not license and bool(origin.legal)
    data = ModelCardData(
        base_model=base,
        language=list(origin.languages) or None,
        license="other" if unnamed else license,
        license_name="see-the-file" if unnamed else origin.license_name,
        license_link=origin.legal[0] if unnamed else origin.license_link,
        library_name=LIBRARIES.get(manifest["format"]),
        pipeline_tag=manifest.get("task", "text-generation"),
        tags=["quantline", manifest["recipe"]["method"], manifest["format"]],
        quantized_by="quantline",
        model_name=origin.name if results else None,
        eval_results=list(results) or None,
    )
    if base:
        # To the Hub a file that is not rounded is one of the model's "quantizations" too: the same
        # model in another container.
        data["base_model_relation"] = "quantized"
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")  # refuses what is no valid card
    return str(card)


def describe(manifest: dict[str, Any], base_model: str | None = None) -> str:
    """Return what a bundle is, in two sentences."""
    origin = origin_of(manifest)
    base = origin.hub_id or base_model
    name = in_markdown(origin.name)
    named = f"[{name}](https://huggingface.co/{base})" if base else name
    recipe = manifest["recipe"]
    rounded = "not rounded" if recipe["method"] == "none" else f"rounded by {recipe['method']}"
    return (
        f"{named}, {rounded}: recipe {recipe['name']} ({recipe['method']}) in "
        f"{manifest['format']}, measured in {manifest['runtime']}. "
        f"{manifest['bits_per_weight']:.2f} bits per weight, "
        f"{manifest['size_bytes'] / MIB:.1f} MiB."
    )


def how_made(manifest: dict[str, Any]) -> str:
    """Return a list of what a bundle was made from and with."""
    origin = origin_of(manifest)
    options = manifest["recipe"].items()
    recipe = ", ".join(f"{key} {value}" for key, value in options if value not in (None, {}))
    weights: Counter[str] = Counter()
    for tensor in manifest["tensors"].values():
        weights[tensor["actual"]] += tensor["weights"]
    total = weights.total()
    types = ", ".join(f"{kind} {count / total:.1%}" for kind, count in weights.most_common())
    lines = [
        f"source: {origin.hub_id or origin.name}"
        + (f" at {origin.revision}" if origin.revision else ""),
        f"recipe: {recipe}",
        f"types of weights: {types}",
    ]
    calibration = manifest.get("calibration")
    if calibration:
        parts = ", ".join(f"{key} {value}" for key, value in sorted(calibration.items()))
        lines.append(f"calibration: {parts}")
    versions = manifest.get("versions", {})
    installed = [f"{name} {version}" for name, version in versions.items() if version != "absent"]
    lines.append(f"made by: quantline, {manifest['created_by']}, with {', '.join(installed)}")
    return "".join(f"* {in_markdown(line)}\n" for line in lines)


def terms(origin: Origin) -> str:
    """Return under which terms a bundle is, in sentences."""
    license = origin.license_name or origin.license
    if not license and not origin.legal:
        return (
            "The source names no licence and has no file with one. Ask whoever made it before you "
            "hand this on."
        )
    sentence = f"Those of the source: {license}." if license else "Those of the source."
    if origin.legal:
        files = ", ".join(origin.legal)
        sentence += f" Its own texts lie beside this one: {files}."
    if origin.license_link:
        sentence += f" {origin.license_link}"
    return in_markdown(sentence)
