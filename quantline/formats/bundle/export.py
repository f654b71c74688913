"""Exporting one variant: write its container, read it back, try it, and say what was made.

Exporting a GGUF variant imports neither torch nor transformers.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantline.config.containers import CONTAINERS
from quantline.config.variants import Variant
from quantline.errors import Reason
from quantline.files import (
    MIB,
    check_made,
    read_json,
    sha256_json,
    versions,
    write_json,
    write_text,
)
from quantline.formats.bundle.manifest import MANIFEST, README, SMOKE, files_of_bundle
from quantline.formats.bundle.readme import bundle_readme
from quantline.formats.bundle.verify_container import check_container, substitutions
from quantline.formats.container import load_container
from quantline.model.tensor_source import TensorSource
from quantline.quantized.store import QuantizedModel

if TYPE_CHECKING:
    from quantline.model.gguf_checkpoint import GgufCheckpoint

Smoke = Callable[[Path, int], dict[str, Any]]
Check = Callable[["GgufCheckpoint"], None]


def export_bundle(
    name: str,
    variant: Variant,
    model: Path,
    quantized: QuantizedModel,
    folder: Path,
    check: Check,
    smoke: Smoke,
    created_by: str,
) -> dict[str, Any]:
    """Make a bundle in a folder, checked and tried.

    Args:
        name: The variant's name.
        variant: What to export.
        model: The unquantized model, as load made it.
        quantized: The weights of the variant's recipe.
        folder: An empty folder for the bundle.
        check: Called with a source that llama.cpp's converter made; refuses one whose logits are
            not the checkpoint's.
        smoke: Called with the folder and the number of rows of the embedding once the files are
            there; tries the bundle in its runtime and returns the content of smoke.json.
        created_by: Names the run, for the manifest.

    Returns:
        The content of manifest.json.

    Raises:
        StageError: missing_file (reason export_artifact_missing), if there is no model; as the
            container's `open_source` and `write`, `check`, `check_container` and `smoke` do.
    """
    loaded = _manifest_of_model(model)
    container = load_container(variant.format)
    source = container.open_source(model)
    if source.converted:
        check(source)
    requested = container.write(source, quantized, folder, variant)
    recipe = quantized.report["recipe"]
    fail_on_substitution = recipe["substitution"] == "fail"
    tensors = check_container(container, folder, source, quantized, requested, fail_on_substitution)
    size_bytes = sum(file["bytes"] for file in files_of_bundle(folder).values())
    for path, text in container.texts(model, folder).items():
        write_text(folder / path, text)
    for path in loaded.get("card", {}).get("legal", ()):
        shutil.copyfile(model / path, folder / path)
    files = files_of_bundle(folder)
    rows = source.shape(source.arch.embedding)[0]
    trace = smoke(folder, rows)
    substituted = substitutions(tensors)
    around = (source.arch.embedding, source.arch.head, source.arch.head_bias)
    hashes = {path: file["sha256"] for path, file in files.items()}
    report = quantized.report
    manifest = {
        "variant": name,
        "recipe": recipe,
        "format": variant.format,
        "runtime": variant.runtime,
        "task": loaded.get("task", "text-generation"),
        "source": loaded["source"] | {"files": loaded["files"]},
        "card": loaded.get("card", {}),
        "transforms": transforms(source, loaded, quantized, variant, substituted),
        "tensors": tensors,
        "layers": report.get("layers", report.get("tensors", {})),
        "limits": container.limits(source),
        "substituted_share": sum(pair["share"] for pair in substituted),
        "bits_per_weight": bits_per_weight(tensors.values()),
        "layer_bits_per_weight": bits_per_weight(
            tensor for name, tensor in tensors.items() if name not in around
        ),
        "size_bytes": size_bytes,
        "files": files,
        "artifact_sha256": sha256_json(hashes),
        "versions": versions(*container_packages()),
        "calibration": report["calibration"],
        "experts": report.get("experts", {}),
        "created_by": created_by,
    }
    write_json(folder / MANIFEST, manifest)
    write_json(folder / SMOKE, trace)
    write_text(
        folder / README,
        bundle_readme(manifest, container.serve(manifest | {"helped": trace.get("helped")})),
    )
    return manifest


def _manifest_of_model(model: Path) -> dict[str, Any]:
    """Read what `load` says of the model."""
    path = model / MANIFEST
    check_made(path, "load", Reason.EXPORT_ARTIFACT_MISSING)
    return read_json(path)


def transforms(
    source: TensorSource,
    loaded: dict[str, Any],
    quantized: QuantizedModel,
    variant: Variant,
    substituted: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return every step that was applied to the model, in order.

    Args:
        source: What the container was written from.
        loaded: The manifest of the unquantized model.
        quantized: Its report has the steps of quantize.
        variant: The step of the export itself.
        substituted: What `substitutions` returned.
    """
    steps = list(loaded["transforms"])
    if source.converted:
        steps.append(cast("GgufCheckpoint", source).step)
    steps += quantized.report["transforms"]
    steps.append({"step": "export", **variant.model_dump(mode="json")})
    for pair in substituted:
        steps.append({"step": "substitute", **pair})
    return steps


def bits_per_weight(tensors: Iterable[dict[str, Any]]) -> float:
    """Return the bits per weight of some entries of the manifest's `tensors`."""
    size = 0
    weights = 0
    for tensor in tensors:
        size += tensor["bytes"]
        weights += tensor["weights"]
    return 8 * size / weights if weights else 0.0


def container_packages() -> set[str]:
    """Return the packages that write or read the containers there are."""
    packages: set[str] = set()
    for info in CONTAINERS.values():
        packages.update(info.packages)
    return packages


def summarize(manifest: dict[str, Any]) -> str:
    """Return what was made, in one line: size, bits per weight, and types that were replaced."""
    parts = [
        f"{manifest['size_bytes'] / MIB:.1f} MiB",
        f"{manifest['bits_per_weight']:.2f} bits per weight",
    ]
    for step in manifest["transforms"]:
        if step["step"] == "substitute":
            parts.append(
                f"{step['share']:.0%} of the weights in {step['actual']} instead of "
                f"{step['requested']}"
            )
    return ", ".join(parts)
